"""The tested verl versions and the one way to override them. All other files read them from here."""

from __future__ import annotations

import importlib.metadata
import os
import warnings

from packaging.specifiers import SpecifierSet

VERL = "0.9.1"
"""The version to install."""
TESTED_VERL = f">={VERL},<0.9.2"
"""PEP 440 specifier of the tested versions, for which the patches of verl are written."""
TESTED = {
    "verl": VERL,
    "megatron-core": "0.16.1",
    "mbridge": "0.15.1",
    "TransferQueue": "0.1.11",
    "ray": "2.60.0",
    "transformers": "5.10.4",
    "vllm": "0.27.1",
}
"""The hosts whose code the package overrides, relies on or patches, in the versions that were tested."""
OVERRIDE_VARIABLE = "VERL_TROLL_ALLOW_UNTESTED"


class UntestedVersionError(RuntimeError):
    """This plugin was not tested with the installed verl."""


def installed_verl() -> str:
    """Version of the installed verl.

    Raises:
        UntestedVersionError: verl is not installed.
    """
    try:
        return importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError:
        raise UntestedVersionError(
            f"verl is not installed; verl_troll.plugin needs verl {TESTED_VERL}: pip install 'verl=={VERL}'"
        ) from None


def is_tested(version: str) -> bool:
    """Whether verl ``version`` is in the tested range."""
    return SpecifierSet(TESTED_VERL).contains(version, prereleases=True)


def goes_on_untested(message: str) -> bool:
    """Whether the user allows untested versions; if so, warn with ``message``."""
    if os.environ.get(OVERRIDE_VARIABLE) != "1":
        return False
    warnings.warn(f"{message} Going on because {OVERRIDE_VARIABLE}=1.", stacklevel=3)
    return True


def check_verl_version() -> None:
    """Refuse an untested verl; with ``VERL_TROLL_ALLOW_UNTESTED=1`` only warn.

    Raises:
        UntestedVersionError: verl is missing, or its version is outside the tested range.
    """
    version = installed_verl()
    message = f"verl {version} is installed, but verl_troll was tested with verl {TESTED_VERL} only."
    if is_tested(version) or goes_on_untested(message):
        return
    raise UntestedVersionError(
        f"{message} Install a tested version (pip install 'verl=={VERL}'), or set {OVERRIDE_VARIABLE}=1 to go on at "
        f"your own risk."
    )
