"""Measurements, each a command of its own that prints ratios taken side by side in one run."""
