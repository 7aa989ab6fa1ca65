"""Rewards for verl's ``reward.custom_reward_function``: mathematics, and sandboxed code."""
