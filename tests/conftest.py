"""Runs the suite in CPU mode unless tests.device says otherwise, offline, with one thread per process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tests import device

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

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
CORE = ("logits", "lm_head", "vocab", "support", "comparison", "projection", "loss", "wire")
with install_import_hook([f"verl_troll.core.{module}" for module in CORE], "beartype.beartype"):
    from verl_troll.core import kernels, loss, wire  # noqa: F401
for name in ("read_rows", "write_gradient", "project"):
    setattr(kernels, name, jaxtyped(getattr(kernels, name), typechecker=beartype))

torch.set_num_threads(1)

# For pytest-xdist. Tests that take a minute and share nothing that takes long to make go to workers one by one; these,
# and modules as long as that, go first, so that at the end no worker waits for another.
ALONE = (
    "tests/core/test_kernels.py::test_in_the_interpreter",
    "tests/benchmarks/test_gpu_check.py::test_a_dry_run",
    "tests/benchmarks/test_gpu_engines.py::test_engines_on_a_cpu",
    "tests/tools/test_plan.py::test_kernels_in_the_interpreter",
    "tests/trainer/test_async.py",
    "tests/trainer/test_estimators.py",
    "tests/trainer/test_full_disk.py",
    "tests/trainer/test_megatron_trainer.py",
    "tests/trainer/test_trainer.py",
    "tests/trainer/test_two_nodes.py",
)
LONG = (*ALONE, "tests/trainer/", "tests/distributed/")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling | None:
    """``--dist loadscope``: modules as a whole, since their tests share fixtures, but the long ones come first."""
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class LongestFirst(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if nodeid.startswith(ALONE) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return LongestFirst(config, log)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Lets wrong types and shapes past the check above, for tests of the core's own errors."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)
