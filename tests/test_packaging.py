"""What is installed, and that Hydra finds the configuration groups however it was installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import hydra
import pytest

from benchmarks.processes import run

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = "hydra_plugins/verl_troll_search_path.py"
# Composes verl's configuration with the site-packages folder of argument 1. The dependencies' folder, argument 2, is a
# plain path: what is installed there editably is not found.
COMPOSE = """
import site, sys
from importlib.util import find_spec
from pathlib import Path

_, folder, dependencies, *overrides = sys.argv
site.addsitedir(folder)
sys.path.append(dependencies)
from hydra import compose, initialize_config_dir

configurations = Path(find_spec("verl").origin).parent / "trainer/config"
with initialize_config_dir(str(configurations), version_base=None):
    print(compose("ppo_trainer", overrides=overrides).actor_rollout_ref.actor.policy_loss.loss_mode)
"""


def pip(*arguments: str | Path) -> None:
    run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, because a build leaves its folders in the tree."""
    folder = tmp_path_factory.mktemp("copy") / "source"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "runs"))
    # Namespace packages are found by folder; this one is not to be packaged.
    (folder / "verl_troll/plugin/__pycache__").mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--wheel-dir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


def files() -> set[str]:
    """Tracked files that belong in the package, by their names in it."""
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
    return expected | {"verl_troll/py.typed", "verl_troll/configs/__init__.py", PLUGIN}


def test_wheel_holds_the_package_its_patches_its_configurations_and_the_search_path(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert files() <= names
    assert not any(name.startswith(("tests/", "patches/", "configs/", "examples/")) for name in names)
    # A file there would hide the plugins of every other package.
    assert "hydra_plugins/__init__.py" not in names


def test_source_distribution_holds_them_too(source: Path, tmp_path: Path) -> None:
    pip("install", "--target", tmp_path / "tools", "setuptools>=77")
    build = "import sys, setuptools.build_meta as backend; print(backend.build_sdist(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "tools")}
    run([sys.executable, "-c", build, str(tmp_path)], cwd=source, env=environment, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert files() <= names


@pytest.mark.parametrize("form", ["wheel", "editable", "PYTHONPATH"])
def test_one_word_switches_troll_on(form: str, source: Path, wheel: Path, tmp_path: Path) -> None:
    folder = source
    if form != "PYTHONPATH":
        what = [wheel] if form == "wheel" else ["--editable", source]
        pip("install", "--no-deps", "--ignore-installed", "--prefix", tmp_path / "prefix", *what)
        folder = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "prefix")}))
    dependencies = Path(hydra.__file__).parents[1]
    command = [sys.executable, "-S", "-c", COMPOSE, str(folder), str(dependencies), "+troll=default"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = run(command, env=environment, cwd=tmp_path)
    assert done.stdout == "troll\n", done.stderr[-3000:]


def test_wheel_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    """Its command loads the plugin, applies the patches, and reads a command line with the configuration group."""
    run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    binaries = tmp_path / "venv/bin"
    pip("--python", binaries / "python", "install", "--no-deps", wheel)
    # A plain path: nothing that is installed editably in the dependencies' folder is found.
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(f"{Path(hydra.__file__).parents[1]}\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = "import verl_troll, verl_troll.patches.registry as patches; print(verl_troll.__file__, patches.__file__)"
    done = run([str(binaries / "python"), "-c", where], env=environment, cwd=tmp_path, check=True)
    assert all(file.startswith(str(site)) for file in done.stdout.split())
    settings = ("actor.ppo_micro_batch_size_per_gpu=1", "rollout.log_prob_micro_batch_size_per_gpu=1")
    line = [*(f"actor_rollout_ref.{setting}" for setting in settings), "actor_rollout_ref.rollout.name=hf"]
    command = [str(binaries / "verl-troll"), "doctor", "--", *line, "+troll=default"]
    done = run(command, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("patch verl-metric-names", "TROLL is on: kl_bound=0.05, ", "No problem found."):
        assert part in done.stdout


# Prints what a Hydra application with these overrides loads and composes.
APPLICATION = """
import json, sys
from hydra import compose, initialize

with initialize(config_path=None, version_base=None):
    config = dict(compose(overrides=sys.argv[1:]))
print(json.dumps([config, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.mark.parametrize("with_verl", [True, False])
def test_other_hydra_applications_load_nothing_more(with_verl: bool, tmp_path: Path) -> None:
    hidden = 'import sys\nsys.modules["verl"] = None\n'
    (tmp_path / "sitecustomize.py").write_text("" if with_verl else hidden)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    # Without verl, a key with the name of a group of ours is a key.
    overrides = ["+some_key=1"] + ([] if with_verl else ["+task=2"])
    done = run([sys.executable, "-c", APPLICATION, *overrides], env=environment, cwd=tmp_path, check=True)
    config, modules = json.loads(done.stdout)
    assert config == ({"some_key": 1} if with_verl else {"some_key": 1, "task": 2})
    assert "hydra_plugins" in modules
    assert not {"torch", "verl_troll"} & set(modules)
    assert with_verl is False or "verl" not in modules
