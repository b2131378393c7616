"""What scripts/benchmark.py runs, one module for each benchmark."""
