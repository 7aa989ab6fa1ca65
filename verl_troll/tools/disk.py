"""Says which file system is full, for what starts runs: the log of a run that failed for it may lie on it.

    python -m verl_troll.tools.disk [FOLDER ...]    # and where Ray and temporary files are; silent if there is space

Only the standard library is needed: a launcher can run this file before anything is installed.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NEARLY_FULL_SHARE, NEARLY_FULL_BYTES = 0.01, 2**30
"""Less free than both the share and the bytes is nearly full."""
_PROBE_BYTES = 2**20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Place:
    """What a run writes, where, and how to have it written elsewhere."""

    what: str
    path: Path
    remedy: str


@dataclass
class _Disk:
    """A file system with the places on it, and what was least free."""

    mount: Path
    size: int
    free: int
    when: float
    files_left: bool
    places: list[Place]


def of_every_run() -> list[Place]:
    """Where Ray and temporary files go."""
    temporary = Path(os.environ.get("TMPDIR") or "/tmp")
    ray = os.environ.get("RAY_TMPDIR")
    return [
        Place("Ray's logs and spilled objects", Path(ray) if ray else Path("/tmp"), "RAY_TMPDIR=FOLDER"),
        Place("temporary files", temporary, "TMPDIR=FOLDER"),
        Place("Ray's objects in shared memory", Path("/dev/shm"), "in a container, a larger --shm-size"),
    ]


class Watch:
    """Remembers how little was free while a run went on: much of what filled a disk is removed when the run ends.

    Args:
        places: what the run writes, besides :func:`of_every_run`; need not exist yet.
    """

    def __init__(self, places: Sequence[Place] = ()) -> None:
        self._places = [*places, *of_every_run()]
        self._disks: dict[int, _Disk] = {}
        self.look()

    def look(self) -> None:
        """Look at all file systems, in microseconds unless one is remote."""
        for place in self._places:
            try:
                path = next(parent for parent in (place.path, *place.path.parents) if parent.exists())
                device, now = path.stat().st_dev, os.statvfs(path)
            except (OSError, StopIteration):
                continue
            free = now.f_frsize * (now.f_bfree if os.geteuid() == 0 else now.f_bavail)
            seen = self._disks.setdefault(
                device, _Disk(_mount(path), now.f_frsize * now.f_blocks, free, time.time(), True, [])
            )
            if free < seen.free:
                seen.free, seen.when = free, time.time()
            seen.size = now.f_frsize * now.f_blocks
            seen.files_left &= now.f_files == 0 or now.f_ffree > 0
            if place not in seen.places:
                seen.places.append(place)

    def complaint(self) -> str:
        """A line for each file system that is or was full or nearly so; empty if none is. Writes a little to each."""
        self.look()
        lines = []
        for disk in self._disks.values():
            refused = next(filter(None, map(_refused, disk.places)), "")
            limit = min(NEARLY_FULL_SHARE * disk.size, NEARLY_FULL_BYTES)
            # Some, such as /proc, have no size.
            if not refused and disk.files_left and (disk.free >= limit or not disk.size):
                continue
            when = time.strftime("%H:%M:%S", time.localtime(disk.when))
            state = refused or ("nearly full" if disk.free else "full")
            if not disk.files_left:
                state = "full: it can hold no more files"
            what = ", ".join(dict.fromkeys(place.what for place in disk.places))
            remedies = "; ".join(dict.fromkeys(f"{place.what}: {place.remedy}" for place in disk.places))
            lines.append(
                f"The file system at {disk.mount} is {state} ({_bytes(disk.free)} of {_bytes(disk.size)} free at "
                f"{when}). It holds: {what}. This may be why the run failed, and why the log does not say so. Free "
                f"space there, or write elsewhere ({remedies})."
            )
        return "\n".join(lines)


def _mount(path: Path) -> Path:
    path = path.resolve()
    return next(parent for parent in (path, *path.parents) if parent.is_mount() or parent == parent.parent)


def _refused(place: Place) -> str:
    """Why a file there cannot be written, quotas included; empty if it can."""
    try:
        path = next(parent for parent in (place.path, *place.path.parents) if parent.is_dir())
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in _FULL:
            return f"full: {os.strerror(error.errno)}" if error.errno != errno.EROFS else "read-only"
    return ""


def _bytes(number: float) -> str:
    unit = 0
    while number >= 1024 and unit < len(_UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.3g} {_UNITS[unit]}" if number < 1000 else f"{number:.0f} {_UNITS[unit]}"


def main(folders: Sequence[str]) -> int:
    """Print the complaint; the exit status is 1 if there is one."""
    text = Watch(
        [Place(f"what is written to {folder}", Path(folder), "another folder") for folder in folders]
    ).complaint()
    if text:
        print(text, file=sys.stderr)
    return int(bool(text))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
