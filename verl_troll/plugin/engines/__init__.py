"""verl's engines with TROLL, one file per backend; :mod:`verl_troll.plugin.backends` lists them."""
