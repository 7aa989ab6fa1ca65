"""The command line: ``verl-troll doctor``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from verl_troll import __version__, doctor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    parser = argparse.ArgumentParser(prog="verl-troll", description="TROLL for verl")
    parser.add_argument("--version", action="version", version=f"verl_troll {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="say what is installed, registered and patched on this host, and what is wrong")
    parser.parse_args(arguments)
    return doctor.run()
