"""The heavy operations, each in two forms: torch, which runs anywhere and is the reference, and Triton for GPUs.

Each form has a module of its own: ``logits_torch`` and ``logits_triton``, ``projection_torch`` and
``projection_triton``. ``tokens_triton`` does for Triton what :mod:`~verl_troll.core.support` and
:mod:`~verl_troll.core.loss` do for each token in torch. The functions below choose a form for each call. Importing
this package does not import Triton.
"""

from __future__ import annotations

import functools
import os
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from packaging.version import Version
from torch import Tensor

from verl_troll.core.kernels import logits_torch, projection_torch

# The first release with tl.topk (torch 2.8 ships it), and the first that compiles it for AMD GPUs.
MINIMUM_TRITON = Version("3.4")
MINIMUM_TRITON_ROCM = Version("3.8")
MAX_K = 1024
"""Largest ``k`` of the Triton form of :func:`read_rows`."""
MAX_K_OF_TERMS = 511
"""Largest number of ids per policy for the solver's kernel, which runs out of registers beyond it."""

Form = Literal["auto", "torch"]
"""``auto``: Triton where it is :func:`available`; ``torch``: never."""
FORMS: tuple[str, ...] = get_args(Form)


@functools.cache
def _triton_is_recent() -> bool:
    try:
        import triton
    except ImportError:
        return False
    return Version(triton.__version__) >= (MINIMUM_TRITON if torch.version.hip is None else MINIMUM_TRITON_ROCM)


def available(device: torch.device, form: str = "auto") -> bool:
    """Whether the Triton forms can run on tensors of ``device``.

    True on a GPU with Triton 3.4 (CUDA) or 3.8 (ROCm) or later, and on the CPU under Triton's interpreter
    (``TRITON_INTERPRET=1`` before Triton is first imported). The interpreter is for tests: it is slow.
    """
    if form == "torch":
        return False
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    return device.type == ("cpu" if interpreted else "cuda") and _triton_is_recent()


def reads_with_triton(logits: Tensor, form: str = "auto") -> bool:
    """Whether the Triton form reads logits like these: those computed with in float32."""
    return available(logits.device, form) and logits_torch.working_dtype(logits) == torch.float32


def why_torch(device: torch.device, k: int, form: str = "auto") -> str | None:
    """Why a GPU needs the torch forms for ``k`` ids per policy; None if it does not, or if there is no GPU."""
    if device.type != "cuda":
        return None
    if form == "torch":
        return "kernels=torch was chosen"
    if not _triton_is_recent():
        minimum = MINIMUM_TRITON if torch.version.hip is None else MINIMUM_TRITON_ROCM
        return f"Triton {minimum} or later is not installed (torch 2.8 brings 3.4 along)"
    return None if k <= MAX_K_OF_TERMS else f"they hold at most {MAX_K_OF_TERMS} ids of a policy"


def read_rows(
    logits: Float[Tensor, "tokens columns"],
    rows: Int[Tensor, " rows"],
    ids: Int[Tensor, "rows ids"],
    columns: int,
    *,
    k: int = 0,
    energy: bool = False,
    form: str = "auto",
) -> tuple[
    Float[Tensor, " rows"],
    Float[Tensor, " rows"],
    Float[Tensor, " rows"] | None,
    Float[Tensor, "rows ids"],
    Float[Tensor, "rows k"],
    Int[Tensor, "rows k"],
]:
    """Read the first ``columns`` columns of ``logits`` at ``rows`` once, without gradient.

    The normaliser has the same bits whatever else is read, and whichever rows are read with it. In Triton, finding the
    ``k`` largest reads a few groups of columns again.

    Args:
        logits: float32, float64 (torch only), bfloat16 or float16; in Triton contiguous in the last dimension.
        rows: indices into the tokens.
        ids: columns whose logits to return, below ``columns``; negative for none.
        columns: at most the columns of ``logits``.
        k: number of largest logits to return; may exceed ``columns``.
        energy: whether the entropy will be needed.

    Returns:
        max_logit, sumexp, energy: as in :class:`verl_troll.core.logits.Normaliser`, in the working dtype (float32 for
            half precisions); energy is None if not requested. In Triton, a NaN or ``+inf`` among the logits
            makes sumexp NaN.
        values: logits at ``ids``; 0 where the id is negative.
        top_values: the largest logits by falling value, equal ones by rising column; ``-inf`` beyond ``columns``.
        top_ids: int64, their columns; -1 beyond ``columns``.

    Raises:
        ValueError: in Triton, an argument is out of range; the message names it.
    """
    with torch.no_grad():
        if not reads_with_triton(logits, form) or k > MAX_K:
            return logits_torch.read_rows(logits, rows, ids, columns, k, energy)
        from verl_troll.core.kernels import logits_triton

        max_logit, sumexp, total_energy, *read = logits_triton.read_rows(logits, rows, ids, columns, k)
        values, top_values, top_ids = read
        return max_logit, sumexp, total_energy if energy else None, values, top_values, top_ids


def write_gradient(
    out: Float[Tensor, "tokens columns"],
    logits: Float[Tensor, "tokens columns"],
    rows: Int[Tensor, " rows"],
    columns: int,
    max_logit: Float[Tensor, " rows"],
    level: Float[Tensor, " rows"],
    slope: Float[Tensor, " rows"] | None,
    ids: Int[Tensor, "rows ids"],
    corrections: Float[Tensor, "rows ids"],
    *,
    form: str = "auto",
) -> None:
    """Write the gradient of everything that was read to ``out``, in one pass.

    At the first ``columns`` columns j of row ``rows[r]``, with ``x`` the logits::

        out[j] = exp(x[j] - max_logit[r]) (level[r] + slope[r] (x[j] - max_logit[r]))
                 + corrections[r, w where ids[r, w] == j]

    and 0 everywhere else. A sum is rounded once, to the dtype of ``out``. A logit of ``-inf`` has no mass.

    Args:
        out: of the dtype of ``logits``; may be ``logits`` itself, but must not overlap it otherwise.
        rows: without duplicates.
        slope: None for 0.
        ids: columns, each once per row; negative for none.

    Raises:
        ValueError: in Triton, an argument is out of range; the message names it.
    """
    if reads_with_triton(logits, form):
        from verl_troll.core.kernels import logits_triton

        logits_triton.write_gradient(out, logits, rows, columns, max_logit, level, slope, ids, corrections)
    else:
        logits_torch.write_gradient(out, logits, rows, columns, max_logit, level, slope, ids, corrections)


def project(
    new: Float[Tensor, "rows outcomes"],
    old: Float[Tensor, "rows outcomes"],
    kl_bound: float,
    tolerance: float,
    implicit: bool,
    *,
    form: str = "auto",
) -> projection_torch.Fields:
    """The fields of :class:`verl_troll.core.projection.Projection`, differentiable with respect to ``new``.

    The Triton form does not synchronise with the host.

    Args:
        new, old: float32 or float64 log-probabilities.
        kl_bound: eps > 0, in nats.
        tolerance: relative slack below the bound.
        implicit: whether to differentiate through the step size.
    """
    if available(new.device, form):
        from verl_troll.core.kernels import projection_triton

        return projection_triton.Project.apply(new, old, kl_bound, tolerance, implicit)  # type: ignore[no-untyped-call, no-any-return]
    return projection_torch.Project.apply(new, old, kl_bound, tolerance, implicit)  # type: ignore[no-untyped-call, no-any-return]
