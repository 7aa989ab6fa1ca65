"""A study of RL losses on small language models that are trained from scratch."""
