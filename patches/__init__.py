"""Changes to host packages that a subclass or a registry could not make; see ``registry.Patch``."""
