"""Sets who reads the head in place of verl's fused kernels. Importing this module applies the patch."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from verl_troll.patches import registry
from verl_troll.patches.verl_fused_head import PATCH, HeadReader

__all__ = ["reading"]

_reader: contextvars.ContextVar[HeadReader | None] = contextvars.ContextVar("verl_troll_head_reader", default=None)

registry.apply(PATCH, _reader.get)


@contextlib.contextmanager
def reading(reader: HeadReader) -> Iterator[None]:
    """Within this context, call ``reader`` in place of verl's fused kernels."""
    token = _reader.set(reader)
    try:
        yield
    finally:
        _reader.reset(token)
