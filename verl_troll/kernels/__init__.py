"""GPU forms, in Triton, of what :mod:`verl_troll.logits` and :mod:`verl_troll.projection` compute in torch.

Importing this package needs no Triton; its modules do. Ask :func:`available` first.

Shapes: N packed tokens, C columns, R rows of interest (indices into N), W ids per row, n outcomes.
"""

from __future__ import annotations

import functools
import os

import torch
from packaging.version import Version
from torch import Tensor

# The first release with tl.topk (torch 2.8 brings it along), and the first that compiles it for AMD GPUs.
MINIMUM_TRITON = Version("3.4")
MINIMUM_TRITON_ROCM = Version("3.8")
MAX_K = 1024
CHOICES = ("auto", "torch")
_choice = ["auto"]


@functools.cache
def _triton_serves() -> bool:
    try:
        import triton
    except ImportError:
        return False
    return Version(triton.__version__) >= (MINIMUM_TRITON if torch.version.hip is None else MINIMUM_TRITON_ROCM)


def choose(choice: str) -> None:
    """Let :func:`available` decide (``auto``), or do without the kernels in this process (``torch``)."""
    if choice not in CHOICES:
        raise ValueError(f"kernels must be one of {CHOICES}, got {choice!r}")
    _choice[0] = choice


def available(device: torch.device) -> bool:
    """Whether the kernels run on tensors of ``device``.

    True on a GPU with Triton 3.4 (CUDA) or 3.8 (ROCm) or later, and on the CPU where Triton's interpreter is on
    (``TRITON_INTERPRET=1`` before Triton is first imported). The interpreter is for tests: it is slow.
    """
    if _choice[0] == "torch":
        return False
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    return device.type == ("cpu" if interpreted else "cuda") and _triton_serves()


def read_rows(
    logits: Tensor, rows: Tensor, columns: int, *, k: int = 0, energy: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """The softmax's normaliser over the first ``columns`` columns at ``rows``, and the k largest logits there.

    One pass over the logits of these rows, without gradient.

    Args:
        logits: ``[N, C]`` float, contiguous in the last dimension; float64 only with ``k = 0``.
        rows: ``[R]`` int64.
        columns: at most C.
        k: at most 1024; may exceed ``columns``.
        energy: whether to sum the energy.

    Returns:
        peak, mass, energy: ``[R]`` in the working dtype (at least float32), as in
            :class:`verl_troll.logits.Normaliser`; energy is None unless asked for. A NaN or ``+inf`` among the logits
            makes mass NaN.
        values: ``[R, k]`` by falling value, equal ones by rising column; beyond the columns there are, ``-inf``.
        ids: ``[R, k]`` int64, their columns; beyond the columns there are, -1.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    from verl_troll.kernels import logits as form

    return form.read_rows(logits, rows, columns, k, energy)


def write_gradient(
    out: Tensor,
    logits: Tensor,
    rows: Tensor,
    columns: int,
    peak: Tensor,
    a: Tensor,
    b: Tensor | None,
    ids: Tensor,
    corrections: Tensor,
) -> None:
    """Write ``exp(x - peak) (a + b (x - peak)) + correction`` for the logits x at ``rows``, and 0 everywhere else.

    One read of the logits at ``rows``, one write of ``out``. Sums are rounded to the dtype of ``out`` once. A logit of
    ``-inf`` counts as no mass.

    Args:
        out: ``[N, C]``, of the dtype of ``logits``; may be ``logits`` itself, but must not overlap it otherwise.
        logits: ``[N, C]`` float, contiguous in the last dimension.
        rows: ``[R]`` int64 without repetition.
        columns: columns from here on are 0.
        peak, a: ``[R]``.
        b: ``[R]``, or None for 0.
        ids: ``[R, W]`` int64 below ``columns``, each once per row; negative for none.
        corrections: ``[R, W]``.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    from verl_troll.kernels import logits as form

    form.write_gradient(out, logits, rows, columns, peak, a, b, ids, corrections)


def project(
    new: Tensor, old: Tensor, kl_bound: float, tolerance: float, implicit: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of :class:`verl_troll.projection.Projection` from ``new, old [R, n]``, differentiable in ``new``.

    As :func:`verl_troll.projection.project` computes them, without a host synchronisation.

    Args:
        new, old: ``[R, n]`` float32 or float64.
        kl_bound: eps > 0, in nats.
        tolerance: relative slack below the bound.
        implicit: whether to differentiate through the step size.
    """
    from verl_troll.kernels import projection as form

    return form.ProjectKernel.apply(new, old, kl_bound, tolerance, implicit)  # type: ignore[no-untyped-call, no-any-return]
