"""Writes data sets in verl's format: ``python -m verl_troll.tasks gsm8k --out DIR``."""
