"""Runs TROLL in verl's own engines and trainer on one device: ``python -m benchmarks.gpu.engines``."""
