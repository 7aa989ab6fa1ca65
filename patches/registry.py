"""How to patch a host package: declared, version-gated, idempotent, and tied to the source it was written for.

Each module in this folder holds one :class:`Patch` as ``PATCH``. A patch imports no other room of this package: its
caller passes in what it needs (:func:`apply`). ``replaces`` lists every host definition that the patch depends on, with
the fingerprint of the source it was written for. ``tests/patches/test_patches.py`` fails if an installed host no longer
matches, so no patch outlives the code it was made for.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, ParamSpec

from packaging.specifiers import SpecifierSet

from verl_troll.versions import OVERRIDE_VARIABLE, goes_on_untested

P = ParamSpec("P")


class PatchError(RuntimeError):
    """A patch does not support the installed host version."""


class NotInstalledError(LookupError):
    """A host is not installed."""


@dataclass(frozen=True)
class Patch(Generic[P]):
    """One change to a host package.

    Attributes:
        name: short identifier, printed by ``verl-troll doctor``.
        host: the patched distribution, for example ``verl``.
        versions: PEP 440 specifier of the host versions the patch was tested on.
        why: one sentence on what makes the patch necessary.
        upstream: what would make it unnecessary (issue, pull request, or the file and line to change).
        install: makes the change, with the arguments of :func:`apply`; called at most once per process.
        replaces: ``"module:qualified.name" -> fingerprint`` of each host definition that the patch depends on.
    """

    name: str
    host: str
    versions: str
    why: str
    upstream: str
    install: Callable[P, None]
    replaces: Mapping[str, str] = field(default_factory=dict)


_applied: dict[str, Patch[...]] = {}


def every() -> tuple[Patch[...], ...]:
    """All patches of this folder and its subfolders, whether applied or not."""
    name = __name__.rpartition(".")[0]
    modules = pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}.")
    names = [module.name for module in modules if not module.ispkg and module.name != __name__]
    return tuple(importlib.import_module(name).PATCH for name in names)


def applied() -> tuple[Patch[...], ...]:
    """Patches in force in this process, in the order of application."""
    return tuple(_applied.values())


def apply(patch: Patch[P], *args: P.args, **kwargs: P.kwargs) -> None:
    """Install ``patch`` once, with these arguments; later calls do nothing.

    Raises:
        PatchError: the installed host version is outside ``patch.versions``, and the user did not allow it.
    """
    if patch.name in _applied:
        return
    version = importlib.metadata.version(patch.host)
    message = (
        f"patch {patch.name!r} was written for {patch.host} {patch.versions}, but {patch.host} {version} is installed."
    )
    if not SpecifierSet(patch.versions).contains(version, prereleases=True) and not goes_on_untested(message):
        raise PatchError(f"{message} Install a tested version, or set {OVERRIDE_VARIABLE}=1 to go on at your own risk.")
    patch.install(*args, **kwargs)
    _applied[patch.name] = patch


@functools.lru_cache
def _parsed(path: Path, _modified: int) -> tuple[str, ast.Module]:
    text = path.read_text(encoding="utf-8")
    return text, ast.parse(text)


def source_fingerprint(target: str) -> str:
    """First 16 hex digits of the SHA-256 of a host definition's source, read without importing the module.

    Args:
        target: ``"module:qualified.name"``, for example ``"verl.utils.py_functional:rename_dict"``.

    Raises:
        NotInstalledError: the host is not installed.
        LookupError: the module or the definition does not exist, or the module is not Python of this version.
    """
    module, _, name = target.partition(":")
    # Import only the top-level package: a submodule could pull in an accelerator stack.
    root, *rest = module.split(".")
    spec = importlib.util.find_spec(root)
    if spec is None or not spec.submodule_search_locations:
        raise NotInstalledError(f"{root} is not installed")
    # A namespace package (megatron) has no file of its own and may have several folders.
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    if spec.origin is None and rest and not any((folder / rest[0]).exists() for folder in folders):
        raise NotInstalledError(f"{root}.{rest[0]} is not installed")
    bases = [folder.joinpath(*rest) for folder in folders]
    files = [file for base in bases for file in (base.with_suffix(".py"), base / "__init__.py") if file.exists()]
    if not files:
        raise LookupError(f"{module} does not exist in the installed {root}")
    path = files[0]
    try:
        text, tree = _parsed(path, path.stat().st_mtime_ns)
    except (SyntaxError, UnicodeDecodeError) as error:
        raise LookupError(f"{module} cannot be read: {error}") from error
    node: ast.AST = tree
    for part in name.split("."):
        for child in ast.iter_child_nodes(node):
            if getattr(child, "name", None) == part:
                node = child
                break
        else:
            raise LookupError(f"{module} has no {name}")
    segment = ast.get_source_segment(text, node)
    if segment is None:
        raise LookupError(f"{module} has no source for {name}")
    return hashlib.sha256(segment.encode()).hexdigest()[:16]
