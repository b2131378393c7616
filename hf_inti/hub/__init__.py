"""Pushing a model with its card, code and endpoint handler."""
