"""Opens files that a user gave."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from verl_troll.tools.report.errors import ReportError, shown_path

EVENT_FILE = "tfevents"
"""Part of the names of TensorBoard's event files."""


def opened(path: Path) -> BinaryIO:
    """An open file. Others are refused: reading a pipe or a device may never end.

    Raises:
        ReportError: it is none, or cannot be read.
    """
    kind = stat.S_IFMT(status(path, shown_path(path)).st_mode)
    if kind != stat.S_IFREG:
        raise ReportError(f"{shown_path(path)} is {_KINDS.get(kind, 'not a file')}: give a file or a folder of a run")
    try:
        # Were it replaced by a pipe just now, opening would not wait.
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    except OSError as error:
        raise ReportError(f"{shown_path(path)} cannot be read: {error.strerror}") from None


def status(path: Path, shown: str) -> os.stat_result:
    """What is at ``path``.

    Raises:
        ReportError: nothing, or nothing that can be reached.
    """
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno == errno.ENOENT and os.path.islink(path):
            raise ReportError(f"{shown} is a link to what does not exist") from None
        if error.errno == errno.ENOENT:
            raise ReportError(f"{shown} does not exist: give a file or a folder of a run") from None
        raise ReportError(f"{shown} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ReportError(f"{shown} cannot be read: {error}") from None


_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
