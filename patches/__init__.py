"""Changes to host packages that no subclass or registry can make; see ``registry.Patch``.

Patches for CPU mode only are in :mod:`verl_troll.patches.cpu`.
"""
