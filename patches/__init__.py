"""Changes to host packages that a subclass or a registry could not make; see ``registry.Patch``.

Those for CPU mode alone are in :mod:`verl_troll.patches.cpu`.
"""
