"""Compares the installed hosts with the code that the package was written for, without importing them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from verl_troll.patches import registry
from verl_troll.seams import DOCUMENT, FINGERPRINTS, SEAMS

_DISTRIBUTIONS = {"megatron": "megatron-core", "transfer_queue": "TransferQueue"}
# Rooms that a run on an accelerator does not use.
_CPU_ONLY = ("verl_troll/cpu/", "verl_troll/embedded/", "patches/cpu/")


@dataclass(frozen=True)
class Dependence:
    """What depends on some definitions of a host.

    Attributes:
        name: of the seam or the patch.
        ours: files that depend on them.
        recheck: what must hold for them to go on working.
        fingerprints: ``"module:qualified.name" -> fingerprint`` of the source that was read.
    """

    name: str
    ours: tuple[str, ...]
    recheck: str
    fingerprints: dict[str, str]

    @property
    def cpu_only(self) -> bool:
        """Whether only CPU mode and the rollout ``hf`` use them."""
        return all(file.startswith(_CPU_ONLY) for file in self.ours)


@dataclass(frozen=True)
class Difference:
    """A :class:`Dependence` whose host has other code.

    Attributes:
        on: what depends on it.
        hosts: the distributions concerned.
        changed: definitions with other source.
        gone: why each of the others could not be found.
    """

    on: Dependence
    hosts: tuple[str, ...]
    changed: tuple[str, ...]
    gone: tuple[str, ...]


def distribution(name: str) -> str:
    """The distribution that holds the definition ``name``."""
    root = name.partition(".")[0]
    return _DISTRIBUTIONS.get(root, root)


def dependences() -> Iterator[Dependence]:
    """All seams and patches."""
    for seam in SEAMS:
        recheck = f"{seam.recheck} ({DOCUMENT}, {seam.section!r})"
        yield Dependence(seam.section, seam.ours, recheck, {name: FINGERPRINTS[name] for name in seam.targets})
    for patch in registry.every():
        file = patch.install.__module__.removeprefix("verl_troll.").replace(".", "/") + ".py"
        recheck = f"is it still right, and still needed? {patch.why}"
        yield Dependence(f"patch {patch.name}", (file,), recheck, dict(patch.replaces))


def compare() -> tuple[int, list[Difference]]:
    """The number of definitions compared, and where they differ; hosts that are not installed are left out."""
    compared: set[str] = set()
    differences = []
    for dependence in dependences():
        changed, gone = [], {}
        for name, fingerprint in dependence.fingerprints.items():
            try:
                actual = registry.source_fingerprint(name)
            except registry.NotInstalledError:
                continue
            except LookupError as error:
                gone[name] = str(error)
            else:
                if actual != fingerprint:
                    changed.append(name)
            compared.add(name)
        if changed or gone:
            hosts = dict.fromkeys(map(distribution, (*changed, *gone)))
            differences.append(Difference(dependence, tuple(hosts), tuple(changed), tuple(gone.values())))
    return len(compared), differences
