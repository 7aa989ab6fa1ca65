"""The doctor reports good and broken installs correctly, and a broken plugin stops a run before it starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import processes
from verl_troll.tools import doctor
from verl_troll.versions import OVERRIDE_VARIABLE, VERL

HIDE_VERL = """
import importlib.abc, importlib.metadata, sys

class _Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "verl":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, _Hide())
_version = importlib.metadata.version

def version(name):
    if name == "verl":
        raise importlib.metadata.PackageNotFoundError(name)
    return _version(name)

importlib.metadata.version = version
"""


def run(arguments: list[str], path: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python; ``path`` comes first on the module path."""
    environment = {**os.environ, **variables}
    if path is not None:
        environment["PYTHONPATH"] = f"{path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return processes.run([sys.executable, *arguments], env=environment)


def pretend_verl_version(folder: Path, version: str) -> None:
    """Write metadata of another verl version, found before the installed one's."""
    metadata = folder / f"verl-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: verl\nVersion: {version}\n")


def test_good_install_passes_and_names_what_is_registered_and_patched() -> None:
    done = run(["-m", "verl_troll", "doctor"])
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in (
        f"verl {VERL}",
        "definitions that verl_troll relies on are those that were tested",
        "policy loss 'troll' is verl_troll.plugin.policy_loss.troll_policy_loss",
        "engine fsdp2: verl_troll.plugin.engines.fsdp.TrollFSDPEngine",
        "engine megatron: verl_troll.plugin.engines.megatron.TrollMegatronEngine, registered for cuda/nvidia, cuda/amd",
        "+troll=default builds",
        "patch verl-metric-names",
        "patch verl-gloo-backend",
        "No problem found.",
    ):
        assert expected in done.stdout
    assert "FAIL" not in done.stdout


FSDP = "verl/workers/engine/fsdp/transformer_impl.py"


@pytest.fixture
def other_verl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the doctor finds a copy of verl, for tests to change."""
    installed = find_spec("verl")
    assert installed is not None
    assert installed.origin is not None
    shutil.copytree(Path(installed.origin).parent, tmp_path / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    spec = ModuleSpec("verl", None, origin=str(tmp_path / "verl/__init__.py"), is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "verl")]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec if name == "verl" else find_spec(name))
    monkeypatch.delenv(OVERRIDE_VARIABLE, raising=False)
    monkeypatch.setenv("VERL_PLATFORM", "")
    return tmp_path


def host_code(capsys: pytest.CaptureFixture[str]) -> tuple[doctor._Report, str]:
    report = doctor._Report()
    doctor._check_host_code(report)
    return report, capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        # A comment is enough to read it again.
        (
            "loss_function: Callable, forward_only=False)",
            "loss_function: Callable, forward_only=False):  #",
            "changed: ",
        ),
        ("def forward_backward_batch(", "def forward_backward(", "missing: "),
        ("class FSDPEngine(", "class FSDPEngine((", "cannot be read: "),
    ],
)
def test_an_edited_host_of_the_right_version_is_reported(
    old: str, new: str, said: str, other_verl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, before = host_code(capsys)
    assert report.failures == report.warnings == 0, before
    path = other_verl / FSDP
    source = path.read_text(encoding="utf-8")
    assert old in source
    path.write_text(source.replace(old, new), encoding="utf-8")
    report, out = host_code(capsys)
    assert report.failures >= 1
    assert report.summary() != "No problem found."
    for part in (
        "FAIL  Logits hook: not the code that was tested",
        said,
        "used by verl_troll/plugin/engines/mixin.py, ",
        "to check: is the loss function called with student_logits ",
        f"-> pip install --force-reinstall --no-deps 'verl=={VERL}', or ",
    ):
        assert part in out


def test_a_missing_module_of_the_host_is_reported(other_verl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (other_verl / "verl/utils/fsdp_utils.py").unlink()
    report, out = host_code(capsys)
    assert report.failures == 1
    assert "FAIL  patch verl-fsdp2-snapshot: not the code that was tested" in out
    assert "missing: verl.utils.fsdp_utils does not exist in the installed verl" in out
    assert "used by patches/verl_fsdp2_snapshot.py" in out


def test_what_cpu_mode_alone_uses_ends_no_run_on_an_accelerator(
    other_verl: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = other_verl / "verl/plugin/platform/platform_manager.py"
    path.write_text(path.read_text(encoding="utf-8").replace("class PlatformRegistry:", "class PlatformRegistry: #"))
    report, out = host_code(capsys)
    assert (report.failures, report.warnings) == (0, 1)
    assert "warn  CPU platform: not the code that was tested" in out
    assert "so in CPU mode and with the rollout hf alone" in out
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    report, out = host_code(capsys)
    assert (report.failures, report.warnings) == (1, 0)
    monkeypatch.setenv(OVERRIDE_VARIABLE, "1")
    report, out = host_code(capsys)
    assert (report.failures, report.warnings) == (0, 1)
    assert report.summary() == "1 warning(s)."


def test_the_code_of_hosts_is_read_without_importing_them() -> None:
    hosts = "{'verl', 'ray', 'transformers', 'megatron.core', 'mbridge', 'transfer_queue', 'vllm'}"
    code = f"import sys; from verl_troll.tools import host_code as h; h.compare(); print({hosts} & set(sys.modules))"
    assert run(["-c", code]).stdout == "set()\n"


def test_hosts_that_are_not_installed_are_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, everything = host_code(capsys)
    absent = ("mbridge", "megatron")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in absent else find_spec(name))
    report, rest = host_code(capsys)
    assert report.summary() == "No problem found."
    assert int(rest.split()[2]) < int(everything.split()[2])


SETTINGS = (
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.name=vllm",
)


@pytest.mark.parametrize(
    ("word", "status", "said"),
    [
        ("+troll=default", 0, "ok    TROLL is on: kl_bound=0.05, "),
        ("+trol=default", 1, "FAIL  +trol=default sets a key that nothing reads\n        -> write +troll=default"),
    ],
)
def test_command_line_is_read_as_a_run_would_read_it(word: str, status: int, said: str) -> None:
    done = run(["-m", "verl_troll", "doctor", "--", "--config-name=ppo_megatron_trainer.yaml", *SETTINGS, word])
    assert done.returncode == status, done.stdout + done.stderr
    assert said in done.stdout.split("Command line\n")[1]


def test_hidden_groups_are_reported(tmp_path: Path) -> None:
    hider = tmp_path / "hydra_plugins/__init__.py"
    hider.parent.mkdir()
    hider.touch()
    by_hand = "hydra.searchpath=[pkg://verl_troll.configs]"
    done = run(["-m", "verl_troll", "doctor", "--", *SETTINGS, "+troll=default"], tmp_path)
    assert done.returncode == 1
    assert f"{hider} hides the plugins of other packages" in done.stdout
    assert (
        f"-> remove that file, since hydra_plugins is shared by packages; until then write '{by_hand}'" in done.stdout
    )
    assert "reinstall verl_troll" not in done.stdout
    assert "FAIL  +troll=default sets a key that nothing reads: Hydra does not find the group" in done.stdout
    assert "TROLL is off: the policy loss is 'vanilla'" in done.stdout
    # By hand.
    assert "ok    configuration: +troll=default builds" in done.stdout


def test_missing_verl_is_explained_and_the_package_still_imports(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE_VERL)
    done = run(["-m", "verl_troll", "doctor"], tmp_path)
    assert done.returncode == 1
    assert "verl is not installed" in done.stdout
    assert f"pip install verl=={VERL}" in done.stdout
    done = run(["-c", "import verl_troll; print(verl_troll.project.__name__)"], tmp_path)
    assert done.stdout.strip() == "project"


def test_untested_version_fails_with_a_hint_and_can_be_allowed(tmp_path: Path) -> None:
    pretend_verl_version(tmp_path, "0.8.0")
    done = run(["-m", "verl_troll", "doctor"], tmp_path, VERL_TROLL_ALLOW_UNTESTED="")
    assert done.returncode == 1
    assert "verl 0.8.0 is outside the tested range" in done.stdout
    assert "VERL_TROLL_ALLOW_UNTESTED=1" in done.stdout
    assert "the plugin does not load" in done.stdout
    assert "No problem found" not in done.stdout
    # The metadata alone are of another version, so the code is that of the tests.
    allowed = run(["-m", "verl_troll", "doctor"], tmp_path, VERL_TROLL_ALLOW_UNTESTED="1")
    assert allowed.returncode == 0, allowed.stdout + allowed.stderr
    assert "warn  verl 0.8.0 is untested" in allowed.stdout
    assert allowed.stdout.endswith("1 warning(s).\n")

    importing = ["-c", "import verl_troll.plugin.actor_config"]
    gpu = {"VERL_PLATFORM": "", "VERL_USE_EXTERNAL_MODULES": ""}
    refused = run(importing, tmp_path, VERL_TROLL_ALLOW_UNTESTED="", **gpu)
    assert refused.returncode != 0
    assert "UntestedVersionError" in refused.stderr
    allowed = run(importing, tmp_path, VERL_TROLL_ALLOW_UNTESTED="1", **gpu)
    assert allowed.returncode == 0, allowed.stderr
    assert "Going on because VERL_TROLL_ALLOW_UNTESTED=1" in allowed.stderr


def test_the_tests_run_on_an_untested_version_that_is_allowed(tmp_path: Path) -> None:
    """The warning that says so is no error, as others of this package are in tests."""
    pretend_verl_version(tmp_path, "0.8.0")
    test = "tests/patches/test_patches.py::test_metric_names_keep_their_namespace"
    options = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = run([*options, test], tmp_path, VERL_TROLL_ALLOW_UNTESTED="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert "Going on because VERL_TROLL_ALLOW_UNTESTED=1" in done.stdout


def test_broken_plugin_is_reported_with_its_own_error(tmp_path: Path) -> None:
    (tmp_path / "takes_the_name.py").write_text(
        "from verl.trainer.ppo.core_algos import register_policy_loss\n"
        "register_policy_loss('troll')(lambda *a, **k: None)\n"
    )
    done = run(["-m", "verl_troll", "doctor"], tmp_path, VERL_USE_EXTERNAL_MODULES="verl_troll.cpu,takes_the_name")
    assert done.returncode == 1
    assert "verl already has a policy loss 'troll'" in done.stdout


@pytest.mark.parametrize("breakage", ["version", "import"])
def test_plugin_that_fails_to_load_ends_the_run_before_ray_starts(tmp_path: Path, breakage: str) -> None:
    if breakage == "version":
        pretend_verl_version(tmp_path, "0.8.0")
        expected = "UntestedVersionError"
        variables = {"VERL_PLATFORM": "", "VERL_USE_EXTERNAL_MODULES": "", "VERL_TROLL_ALLOW_UNTESTED": ""}
    else:
        (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['verl_troll.plugin.engines'] = None\n")
        expected, variables = "verl_troll.plugin.engines", {}
    done = run(
        [
            "-m",
            "verl.trainer.main_ppo",
            f"hydra.run.dir={tmp_path}/hydra",
            "+troll=default",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
            "actor_rollout_ref.rollout.name=vllm",
        ],
        tmp_path,
        HYDRA_FULL_ERROR="1",
        **variables,
    )
    assert done.returncode != 0
    assert expected in done.stderr
    assert "ray init kwargs" not in done.stdout


def found(**facts: Any) -> dict[str, Any]:
    """What the plugin's inspection prints of a good install."""
    engine = {"name": "mine.Engine", "troll": True, "registered": [["cuda", "nvidia"]]}
    good = {
        "platform": "P",
        "device": "cuda",
        "vendor": "nvidia",
        "available": True,
        "policy_loss": "p",
        "engines": {"fsdp": engine},
        "missing_engines": {},
        "search_path_error": None,
        "config_error": None,
        "patches": [],
    }
    return {**good, **facts}


@pytest.mark.parametrize("troll", [True, False])
def test_a_configuration_that_does_not_build_for_its_engine_is_not_told_to_reinstall(
    troll: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = {"name": "verl.Engine", "troll": troll, "registered": [["cuda", "nvidia"]]}
    facts = found(engines={"fsdp": engine}, config_error="verl would run the actor on verl.Engine")
    doctor._report_facts(doctor._Report(), facts)
    said = capsys.readouterr().out
    assert ("reinstall verl_troll" in said) == troll
    assert ("see the engines above" in said) != troll


def test_a_refusal_by_the_host_is_not_blamed_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    refused: dict[str, Any] = {
        "refused": "Install megatron-core.",
        "problems": [],
        "announcement": None,
        "loss": "troll",
    }
    doctor._report_command_line(doctor._Report(), refused, [])
    said = capsys.readouterr().out
    assert "Install megatron-core." in said
    assert "change the command line" not in said


def test_beside_a_baseline_the_advice_takes_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    off: dict[str, Any] = {"refused": None, "problems": [], "announcement": None, "loss": "gspo"}
    doctor._report_command_line(doctor._Report(), off, ["+baseline=gspo", "trainer.nnodes=1"])
    assert "+troll=default in the place of +baseline=gspo switches it on" in capsys.readouterr().out
    doctor._report_command_line(doctor._Report(), off, ["trainer.nnodes=1"])
    assert "+troll=default switches it on" in capsys.readouterr().out


def test_what_fails_to_examine_a_command_line_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, what in (((), "the plugin does not load"), (("a=b c",), "the command line cannot be examined")):
        assert doctor._ask(doctor._Report(), "verl_troll.no_such_module", *arguments) is None
        said = capsys.readouterr().out
        assert what in said
        assert "'python -m verl_troll.no_such_module" in said
        assert ("'a=b c'" in said) == bool(arguments)
