"""Runs the suite in CPU mode unless tests.device says otherwise, offline, with one thread per process."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tests import device

os.environ.update(
    device.environment(),
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
)

import pytest
import torch
from beartype import beartype
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook, jaxtyped

# Checks every call of the core against its types, shapes included, except in modules of Triton kernels, whose source
# Triton parses itself.
CORE = ("logits", "lm_head", "vocab", "support", "projection", "loss", "wire")
with install_import_hook([f"verl_troll.core.{module}" for module in CORE], "beartype.beartype"):
    from verl_troll.core import kernels, loss, wire  # noqa: F401
for name in ("read_rows", "write_gradient", "project"):
    setattr(kernels, name, jaxtyped(getattr(kernels, name), typechecker=beartype))

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Lets wrong types and shapes past the check above, for tests of the core's own errors."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)
