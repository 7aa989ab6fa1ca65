"""Stand-in: no images are transformed."""

from __future__ import annotations

from enum import Enum

from verl_troll_stand_in import names_of


class InterpolationMode(Enum):
    """Names of torchvision's interpolations, which transformers puts into a table when imported."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


__getattr__ = names_of(__name__)
