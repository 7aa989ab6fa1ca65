"""Attacks on the product that count what held and what fell: ``python -m benchmarks.attack --help``."""
