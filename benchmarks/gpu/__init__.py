"""The check that needs a GPU: ``python -m benchmarks.gpu``."""
