"""Training every method under one recipe, for a fair comparison."""
