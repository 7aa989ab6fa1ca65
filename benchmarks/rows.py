"""The case of a measurement, and its resulting row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.measure import Spread, Times

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """Parameters of one measurement.

    Attributes:
        vocab, tokens: size of the logits ``[tokens, vocab]``, over all ranks.
        k: cap on the number of kept ids.
        dtype: dtype of the logits.
        ranks: number of ranks that share the vocabulary.
        device: ``cpu`` or ``cuda``.
        response_share: share of response tokens; verl reads all tokens, TROLL only these.
        hidden: width of the hidden states, for the head only.
    """

    vocab: int = 151_936
    tokens: int = 1024
    k: int = 64
    dtype: str = "float32"
    ranks: int = 1
    device: str = "cpu"
    response_share: float = 1.0
    hidden: int = 896

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def logits_bytes(self) -> int:
        """Bytes of the logits, over all ranks."""
        return self.tokens * self.vocab * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Floor:
    """The minimum cost of the work on this machine, by rates measured in the same turns.

    Attributes:
        seconds: bytes divided by bandwidth, plus operations divided by the matrix-product rate.
        byte_count, operations: the bytes that must move, and the operations required.
        counted: what these are.
    """

    seconds: float
    byte_count: int
    counted: str
    operations: int = 0


@dataclass
class Row:
    """One method in one case.

    Attributes:
        measurement: name of the module.
        method, phase: what was timed.
        parameters: parameters of the case.
        seconds: None if nothing was timed.
        ratio: time relative to ``baseline``: the median over turns of the ratio within a turn.
        extra_bytes: peak allocation above the inputs.
        facts: further numbers, by name.
        skipped: why the case was skipped.
    """

    measurement: str
    method: str
    parameters: dict[str, Any]
    phase: str = ""
    seconds: Spread | None = None
    ratio: float | None = None
    baseline: str = ""
    extra_bytes: int | None = None
    floor: Floor | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    skipped: str | None = None

    def as_dict(self, machine: dict[str, Any]) -> dict[str, Any]:
        """Plain values, for JSON."""
        row = {**dataclasses.asdict(self), "machine": machine}
        row["ratio_to_floor"] = self.ratio_to_floor
        return row

    @property
    def ratio_to_floor(self) -> float | None:
        """Time relative to the floor."""
        if self.floor is None or self.seconds is None or self.floor.seconds == 0:
            return None
        return self.seconds.median / self.floor.seconds


def parameters(case: Case, *names: str) -> dict[str, Any]:
    """The named parameters of a case."""
    return {name: getattr(case, name) for name in names}


def phase_seconds(times: Times, name: str, phases: Sequence[str]) -> list[float]:
    """Seconds of each turn, summed over the given phases."""
    return [sum(turn) for turn in zip(*(times[name][phase] for phase in phases), strict=True)]


def ratio(own: Sequence[float], base: Sequence[float]) -> float:
    """Median over turns of the ratio within a turn."""
    return Spread.of([a / b for a, b in zip(own, base, strict=True)]).median
