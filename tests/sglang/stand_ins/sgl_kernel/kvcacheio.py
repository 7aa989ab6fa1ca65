"""Stand-in: transfers between the host's and the accelerator's cache."""

from verl_troll_stand_in import names_of

__getattr__ = names_of(__name__)
