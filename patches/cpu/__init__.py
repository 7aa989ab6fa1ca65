"""Patches for CPU mode (:mod:`verl_troll.cpu`) only; a run on GPUs applies none of them."""
