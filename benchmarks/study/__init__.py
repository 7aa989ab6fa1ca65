"""A study of RL losses on small language models trained from scratch."""
