"""The methods on models that are not ours."""
