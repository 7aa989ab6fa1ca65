"""Rewards for verl's ``reward.custom_reward_function``: mathematics, and code in a sandbox."""
