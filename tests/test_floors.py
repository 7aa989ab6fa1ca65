"""The rooms import one another only as setup.cfg allows, and ``lint-imports`` catches violations."""

from __future__ import annotations

import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTION = "importlinter:contract:"


def _contracts() -> dict[str, str]:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return {name.removeprefix(SECTION): config[name]["name"] for name in config.sections() if name.startswith(SECTION)}


CONTRACTS = _contracts()


def lint(folder: Path, contract: str) -> subprocess.CompletedProcess[str]:
    """``lint-imports`` on the package in ``folder``."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--contract", contract]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package with its links, for tests to break."""
    for name in ("verl_troll", "patches", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    assert (tmp_path / "verl_troll/patches").is_symlink()
    return tmp_path


@pytest.mark.parametrize("contract", CONTRACTS)
def test_package_keeps_the_contract(contract: str) -> None:
    done = lint(ROOT, contract)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{CONTRACTS[contract]} KEPT" in done.stdout


def in_function(statement: str) -> str:
    return f"def late():\n    {statement}"


BROKEN = [
    ("rooms", "verl_troll/plugin/metrics.py", "import verl_troll.cpu.critic"),
    ("rooms", "verl_troll/plugin/metrics.py", "import verl_troll.embedded.rollout"),
    ("rooms", "verl_troll/plugin/metrics.py", in_function("import verl_troll.tasks.catalog")),
    ("rooms", "verl_troll/embedded/generation.py", "import verl_troll.cpu.platform"),
    ("rooms", "verl_troll/tasks/catalog.py", "import verl_troll.plugin.carry"),
    ("rooms", "verl_troll/tools/doctor.py", in_function("import verl_troll.plugin.inspection")),
    ("rooms", "verl_troll/core/logits.py", "import verl_troll.patches.registry"),
    ("rooms", "patches/ray_init.py", in_function("import verl_troll.plugin.cluster_check")),
    ("rooms", "patches/cpu/vllm_cpu_linear.py", in_function("import verl_troll.cpu.vllm_weights")),
    ("rooms", "patches/verl_fused_head.py", "import verl_troll.core.lm_head"),
    ("core", "verl_troll/core/logits.py", "import verl_troll.versions"),
    ("core", "verl_troll/core/logits.py", in_function("import verl")),
    ("core", "verl_troll/core/kernels/logits_triton.py", "import transformers"),
    ("cpu", "verl_troll/cpu/critic.py", in_function("import verl_troll.plugin.settings")),
    ("links", "verl_troll/plugin/metrics.py", "import patches"),
    ("mathematics", "verl_troll/core/logits.py", in_function("import verl_troll.core.loss")),
]


@pytest.mark.parametrize(("contract", "file", "code"), BROKEN, ids=lambda value: value.split()[-1])
def test_forbidden_import_is_named(copy: Path, contract: str, file: str, code: str) -> None:
    importer = file.removesuffix(".py").replace("/", ".")
    if importer.startswith("patches."):
        importer = f"verl_troll.{importer}"
    path = copy / file
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{code}\n", encoding="utf-8")
    done = lint(copy, contract)
    assert done.returncode != 0
    assert f"{CONTRACTS[contract]} BROKEN" in done.stdout
    assert f"{importer} -> {code.split()[-1]} (l." in done.stdout


def test_room_missing_from_the_contract_is_named(copy: Path) -> None:
    (copy / "verl_troll/attic.py").touch()
    done = lint(copy, "rooms")
    assert done.returncode != 0
    assert "attic" in done.stdout
