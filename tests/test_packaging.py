"""What `pip install .` installs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from benchmarks.processes import run

ROOT = Path(__file__).resolve().parents[1]


def test_wheel_holds_the_package_its_patches_and_its_configurations(tmp_path: Path) -> None:
    # Built from a copy, because a build leaves its folder in the tree.
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "runs"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "verl_troll/*.py", "verl_troll/**/*.py", "patches/*.py", "configs/**/*.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    expected = {name if name.startswith("verl_troll/") else f"verl_troll/{name}" for name in tracked}
    assert "verl_troll/configs/troll/default.yaml" in expected
    assert "verl_troll/patches/registry.py" in expected
    assert expected | {"verl_troll/py.typed", "verl_troll/configs/__init__.py"} <= names
    assert not any(name.startswith(("tests/", "patches/", "configs/", "examples/")) for name in names)
