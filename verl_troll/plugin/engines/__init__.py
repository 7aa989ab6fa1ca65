"""verl's engines with TROLL, one file per backend, listed in :mod:`verl_troll.plugin.backends`."""
