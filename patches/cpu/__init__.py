"""Patches for CPU mode (:mod:`verl_troll.cpu`) alone: a run on GPUs applies none of these."""
