"""Reads the scalars of a TensorBoard event file, one checked record after the other."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_RECORD_BYTES = 64 * 2**20
"""Longer records are refused; one of a scalar has about 60 bytes."""

_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_BLOCK_BYTES = 2**20


class DamagedError(ValueError):
    """The file is damaged; the message says where."""


@dataclass
class Extent:
    """What the scalars of a file extend over; false if there is none.

    Attributes:
        first, last: lowest and highest step of any scalar, shown or not.
        begun, ended: when its first and its latest event were written, in seconds since 1970.
    """

    first: int = 2**63
    last: int = -1
    begun: float = 0.0
    ended: float = 0.0

    def __bool__(self) -> bool:
        return self.last >= 0

    def see(self, event: Any, has_scalar: bool) -> None:
        """Include an event."""
        self.begun = self.begun or event.wall_time
        self.ended = max(self.ended, event.wall_time)
        if has_scalar:
            self.first, self.last = min(self.first, event.step), max(self.last, event.step)


def scalars(
    stream: BinaryIO, wanted: Callable[[str], bool], cut: Callable[[], None], extent: Extent
) -> Iterator[tuple[str, int, Any]]:
    """Tag, step and value of each scalar, in the order written.

    A restart is ``("", step, None)``: what was logged before at this step or later does not count.

    Args:
        stream: an event file.
        wanted: whether to read a tag.
        extent: is extended by every event.
        cut: called if the last record is incomplete, as an interrupted run leaves it.

    Raises:
        DamagedError: a record before the last is damaged, or one is too long.
        ImportError: tensorboard is not installed.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    new_style: set[str] = set()
    for start, record in _records(stream, cut):
        try:
            event = Event.FromString(record)
        except DecodeError:
            raise DamagedError(f"the record at byte {start} is not an event") from None
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            yield "", event.step, None
        has_scalar = False
        for value in event.summary.value:
            # Only the first value of a tag says what its tensors are.
            if value.metadata.plugin_data.plugin_name == "scalars":
                new_style.add(value.tag)
            kind = value.WhichOneof("value")
            if kind != "simple_value" and not (kind == "tensor" and value.tag in new_style):
                continue
            has_scalar = True
            if wanted(value.tag):
                yield value.tag, event.step, value.simple_value if kind == "simple_value" else _scalar(value.tensor)
        extent.see(event, has_scalar)


def _scalar(tensor: Any) -> float | None:
    """The value of a tensor with one element; None if it is none."""
    from tensorboard.util.tensor_util import make_ndarray

    try:
        return float(make_ndarray(tensor).item())
    except (TypeError, ValueError, OverflowError):
        return None


def _records(stream: BinaryIO, cut: Callable[[], None]) -> Iterator[tuple[int, bytes]]:
    """Each record and where it starts, in bytes."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    start = 0
    while header := stream.read(_HEADER.size):
        if len(header) < _HEADER.size:
            return cut()
        length, checksum = _HEADER.unpack(header)
        sound = masked_crc32c(header[:8]) == checksum
        if sound and length > MAX_RECORD_BYTES:
            raise DamagedError(
                f"the record at byte {start} has {length} bytes; more than {MAX_RECORD_BYTES} are not read"
            )
        if sound:
            body = stream.read(length + _CHECKSUM.size)
            if len(body) < length + _CHECKSUM.size:
                return cut()
            record = body[:length]
            sound = masked_crc32c(record) == _CHECKSUM.unpack(body[length:])[0]
        if not sound:
            # A file system that lost power leaves zeros at the end.
            if _only_zeros(stream):
                return cut()
            raise DamagedError(f"the record at byte {start} does not match its checksum")
        yield start, record
        start += len(header) + len(body)
    return None


def _only_zeros(stream: BinaryIO) -> bool:
    return all(block.count(0) == len(block) for block in iter(lambda: stream.read(_BLOCK_BYTES), b""))
