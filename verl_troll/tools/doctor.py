"""``verl-troll doctor``: shows what is installed, registered and patched on this host, and how to fix problems.

It only needs torch. The code of the hosts is compared without importing it (:mod:`verl_troll.tools.host_code`). Checks
that need verl run in a separate process (:mod:`verl_troll.plugin.inspection`), so a plugin that cannot be imported is
reported with the error that a run would give.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from verl_troll import __version__
from verl_troll.tools import host_code
from verl_troll.versions import OVERRIDE_VARIABLE, TESTED, TESTED_VERL, VERL, is_tested

_REQUIRED = ("torch", "verl", "ray", "hydra-core", "tensordict", "TransferQueue", "transformers")
_OPTIONAL = ("vllm", "sglang", "megatron-core", "flash-attn")
_VARIABLES = ("VERL_PLATFORM", "VERL_USE_EXTERNAL_MODULES", "VERL_ENGINE_DEVICE", "VERL_ENGINE_VENDOR")
_TIMEOUT_SECONDS = 600


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


class _Report:
    """Prints findings; counts the failures, and the warnings: what the user allows, or few runs need."""

    def __init__(self) -> None:
        self.failures = self.warnings = 0

    def note(self, text: str) -> None:
        print(f"        {text}")

    def good(self, text: str) -> None:
        print(f"  ok    {text}")

    def warn(self, text: str, hint: str | None = None) -> None:
        self.warnings += 1
        self._finding("warn", text, hint)

    def bad(self, text: str, hint: str | None = None) -> None:
        self.failures += 1
        self._finding("FAIL", text, hint)

    def hint(self, text: str) -> None:
        print(f"        -> {text}")

    def _finding(self, kind: str, text: str, hint: str | None) -> None:
        indented = text.expandtabs(4).replace("\n", "\n        ")
        print(f"  {kind}  {indented}")
        if hint is not None:
            self.hint(hint)

    def summary(self) -> str:
        if self.failures:
            return f"{self.failures} problem(s) found."
        return f"{self.warnings} warning(s)." if self.warnings else "No problem found."


def run(arguments: Sequence[str] = ()) -> int:
    """Print the report. Return 0 if TROLL would run on this host, 1 if something needs fixing.

    Args:
        arguments: those of ``python -m verl.trainer.main_ppo``, to say what they would train with.
    """
    report = _Report()
    print(f"verl_troll {__version__} on Python {platform.python_version()}")
    print("Versions")
    verl = _check_versions(report)
    if verl is not None:
        print("Code of the hosts")
        _check_host_code(report)
    print("Plugin")
    if verl is None:
        report.bad(
            "not loaded: verl is not installed", f"pip install 'verl_troll[cpu]', or verl=={VERL} with your stack"
        )
    else:
        facts = _ask(report, "verl_troll.plugin.inspection")
        if facts is not None:
            _report_facts(report, facts)
            if arguments:
                print("Command line")
                found = _ask(report, "verl_troll.plugin.command_line", *arguments)
                if found is not None:
                    _report_command_line(report, found, arguments)
    print(report.summary())
    return 0 if report.failures == 0 else 1


def _check_versions(report: _Report) -> str | None:
    for name in _REQUIRED:
        version = _version(name)
        if version is None:
            report.bad(f"{name} is not installed", f"pip install {f'verl=={VERL}' if name == 'verl' else name}")
        elif name == "verl":
            _check_verl(report, version)
        else:
            report.good(f"{name} {version}")
    for name in _OPTIONAL:
        report.note(f"{name} {_version(name) or 'not installed (optional)'}")
    for name in _VARIABLES:
        if name in os.environ:
            report.note(f"{name}={os.environ[name]}")
    return _version("verl")


def _check_verl(report: _Report, version: str) -> None:
    if is_tested(version):
        report.good(f"verl {version} (tested: {TESTED_VERL})")
    elif os.environ.get(OVERRIDE_VARIABLE) == "1":
        report.warn(
            f"verl {version} is untested (tested: {TESTED_VERL}), allowed by {OVERRIDE_VARIABLE}=1",
            f"pip install 'verl=={VERL}', or check what differs below",
        )
    else:
        report.bad(
            f"verl {version} is outside the tested range {TESTED_VERL}",
            f"pip install 'verl=={VERL}', or set {OVERRIDE_VARIABLE}=1 to continue at your own risk",
        )


def _check_host_code(report: _Report) -> None:
    compared, differences = host_code.compare()
    if not differences:
        report.good(f"the {compared} definitions that verl_troll relies on are those that were tested")
        return
    allowed = os.environ.get(OVERRIDE_VARIABLE) == "1"
    on_cpu = os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"
    for difference in differences:
        on = difference.on
        spare = on.cpu_only and not on_cpu
        lines = [
            f"{on.name}: not the code that was tested",
            *(f"changed: {name}" for name in difference.changed),
            *(f"missing: {reason}" for reason in difference.gone),
            f"used by {', '.join(on.ours)}{', so in CPU mode and with the rollout hf alone' if spare else ''}",
            f"to check: {on.recheck}",
        ]
        (report.warn if spare or allowed else report.bad)("\n".join(lines))
    hosts = sorted({host for difference in differences for host in difference.hosts})
    tested = " ".join(f"'{host}=={TESTED[host]}'" for host in hosts)
    risk = "" if allowed else f" and set {OVERRIDE_VARIABLE}=1 to go on at your own risk"
    report.hint(f"pip install --force-reinstall --no-deps {tested}, or check what is asked above{risk}")


def _ask(report: _Report, module: str, *arguments: str) -> dict[str, Any] | None:
    """The JSON that ``module`` prints."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    by_hand = shlex.join(["python", "-m", module, *arguments])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        report.bad(f"no answer within {_TIMEOUT_SECONDS} s", f"run '{by_hand}'")
        return None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        what = "the command line cannot be examined" if arguments else "the plugin does not load"
        report.bad(
            f"{what}: {lines[-1] if lines else f'exit status {done.returncode}'}",
            f"fix this error, a run would fail on it too; '{by_hand}' shows the traceback",
        )
        return None
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def _report_facts(report: _Report, facts: dict[str, Any]) -> None:
    report.good(f"platform {facts['platform']}, device {facts['device']}, vendor {facts['vendor']}")
    if not facts["available"]:
        report.note("no such device here: expected on a head node; for CPU mode set")
        report.note("VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES=verl_troll.cpu")
    report.good(f"policy loss 'troll' is {facts['policy_loss']}")
    for backend, chosen in facts["engines"].items():
        if chosen["troll"]:
            report.good(f"engine {backend}: {chosen['name']}, registered for {_listed(chosen['registered'])}")
        else:
            report.bad(
                f"engine {backend}: verl would use {chosen['name']}, but TROLL's is registered for "
                f"{_listed(chosen['registered'])}",
                "set VERL_ENGINE_DEVICE and VERL_ENGINE_VENDOR to one of these, or report your device",
            )
    for backend, needs in facts["missing_engines"].items():
        report.note(f"engine {backend}: not available, verl's needs {needs}")
    if facts["search_path_error"] is not None:
        hidden = "hides the plugins" in facts["search_path_error"]
        mend = "remove that file, since hydra_plugins is shared by packages" if hidden else "reinstall verl_troll"
        report.bad(
            f"Hydra would take +troll=default for a key that nothing reads: {facts['search_path_error']}",
            f"{mend}; until then write 'hydra.searchpath=[pkg://verl_troll.configs]' before it",
        )
    if facts["config_error"] is None:
        report.good("configuration: +troll=default builds")
    else:
        report.bad(
            f"configuration group troll=default does not build: {facts['config_error']}",
            "reinstall verl_troll (pip install --force-reinstall --no-deps)"
            if all(chosen["troll"] for chosen in facts["engines"].values())
            else "see the engines above",
        )
    for patch in facts["patches"]:
        report.good(f"patch {patch['name']} on {patch['host']}: {patch['why']}")
        report.note(f"no longer needed once: {patch['upstream']}")


def _report_command_line(report: _Report, found: dict[str, Any], arguments: Sequence[str]) -> None:
    if found["refused"] is not None:
        report.bad(
            f"the run would be refused: {found['refused']}",
            "do as it says: a run would end with this error before Ray starts",
        )
    for problem, hint in found["problems"]:
        report.bad(problem, hint)
    if found["announcement"] is not None:
        report.good(found["announcement"])
    elif found["loss"] is not None and found["loss"] != "troll":
        baseline = next((f" in the place of {word}" for word in arguments if word.startswith("+baseline=")), "")
        report.note(f"TROLL is off: the policy loss is {found['loss']!r}; +troll=default{baseline} switches it on")


def _listed(pairs: Iterable[Iterable[str]]) -> str:
    return ", ".join("/".join(pair) for pair in pairs)
