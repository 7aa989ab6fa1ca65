"""What an attack is, and what it reports."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class Extent:
    """How hard to attack.

    Attributes:
        scale: multiplies the number of tries; 1 is what docs/reliability.md quotes.
        seed: of every random choice.
        device: where tensors live.
        folder: an empty one for files.
    """

    folder: Path
    scale: float = 1.0
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def tries(self, count: int) -> int:
        """``count`` at this scale, at least 1."""
        return max(1, round(count * self.scale))


@dataclass
class Outcome:
    """What an attack found.

    Attributes:
        tried: number of tries.
        fell: number of tries in which the product did not do what it promises.
        examples: a line for each of the first ones that fell.
        skipped: why nothing was tried here (no GPU, not root), if nothing was.
    """

    tried: int = 0
    fell: int = 0
    examples: list[str] = field(default_factory=list)
    skipped: str = ""

    def record(self, held: bool, example: str) -> None:
        """Count one try; ``example`` says what was tried and what happened."""
        self.count(1, [] if held else [example])

    def count(self, tried: int, fell: Iterable[str]) -> None:
        """Count many tries at once; ``fell`` has a line for each that fell."""
        lines = list(fell)
        self.tried += tried
        self.fell += len(lines)
        self.examples += lines[: MAX_EXAMPLES - len(self.examples)]


MAX_EXAMPLES = 5


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside: for many small tensors, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Attack:
    """One row of the table.

    Attributes:
        name: for ``--only``.
        promise: what must hold, in a few words.
        run: carries it out.
    """

    name: str
    promise: str
    run: Callable[[Extent], Outcome]
