"""The command line: ``verl-troll doctor``, ``verl-troll plan``, ``verl-troll report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from verl_troll import __version__
from verl_troll.tools import doctor
from verl_troll.tools.plan import command as plan
from verl_troll.tools.report import command as report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    parser = argparse.ArgumentParser(prog="verl-troll", description="TROLL for verl")
    parser.add_argument("--version", action="version", version=f"verl_troll {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor_help = "show what is installed, registered and patched on this host, and what is wrong"
    doctors = commands.add_parser("doctor", help=doctor_help, description=doctor_help)
    doctors.add_argument(
        "arguments",
        nargs="*",
        help="after --: the arguments of your python -m verl.trainer.main_ppo; says what it would train with",
    )
    plan_help = "predict what TROLL adds per GPU and per step at any scale, compared with vanilla clipping"
    plan.add_options(commands.add_parser("plan", help=plan_help, description=plan_help))
    report_help = "compare runs by arm, with intervals over seeds, on one HTML page"
    report.add_options(commands.add_parser("report", help=report_help, description=report_help))
    options = parser.parse_args(arguments)
    if options.command == "plan":
        return plan.run(options)
    if options.command == "report":
        return report.run(options)
    return doctor.run(options.arguments)
