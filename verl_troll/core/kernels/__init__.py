"""GPU forms, in Triton, of what :mod:`verl_troll.core.logits` and :mod:`verl_troll.core.projection` compute in torch.

Importing this package needs no Triton; its modules do. Ask :func:`available` first.

Shapes: N packed tokens, C columns, R rows of interest (indices into N), W, M and V ids per row, n outcomes.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

import torch
from packaging.version import Version
from torch import Tensor

# The first release with tl.topk (torch 2.8 brings it along), and the first that compiles it for AMD GPUs.
MINIMUM_TRITON = Version("3.4")
MINIMUM_TRITON_ROCM = Version("3.8")
MAX_K = 1024
# With more ids per policy the solver's kernel runs out of registers.
MAX_K_OF_TERMS = 511
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


@contextlib.contextmanager
def chosen(choice: str) -> Iterator[None]:
    """:func:`choose` inside, what was chosen before afterwards, also where something raises."""
    before = _choice[0]
    choose(choice)
    try:
        yield
    finally:
        _choice[0] = before


def available(device: torch.device) -> bool:
    """Whether the kernels run on tensors of ``device``.

    True on a GPU with Triton 3.4 (CUDA) or 3.8 (ROCm) or later, and on the CPU where Triton's interpreter is on
    (``TRITON_INTERPRET=1`` before Triton is first imported). The interpreter is for tests: it is slow.
    """
    if _choice[0] == "torch":
        return False
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    return device.type == ("cpu" if interpreted else "cuda") and _triton_serves()


def hindrance(device: torch.device, k: int) -> str | None:
    """Why the kernels cannot take ``k`` ids on an accelerator, None where they can or where there is no accelerator."""
    if device.type != "cuda":
        return None
    if _choice[0] == "torch":
        return "kernels=torch was chosen"
    if not _triton_serves():
        least = MINIMUM_TRITON if torch.version.hip is None else MINIMUM_TRITON_ROCM
        return f"Triton {least} or later is not installed (torch 2.8 brings 3.4 along)"
    return None if k <= MAX_K_OF_TERMS else f"they hold at most {MAX_K_OF_TERMS} ids of a policy"


def read_rows(
    logits: Tensor, rows: Tensor, ids: Tensor, columns: int, *, k: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The softmax's normaliser over the first ``columns`` columns at ``rows``, logits at ``ids``, and the k largest.

    One pass over the logits of these rows, without gradient; with ``k`` a few groups of columns are read again. The
    normaliser has the same bits whatever else is read, and whichever rows are read beside.

    Args:
        logits: ``[N, C]`` float32, bfloat16 or float16, contiguous in the last dimension.
        rows: ``[R]`` int64.
        ids: ``[R, W]`` int64 below ``columns``; negative for none.
        columns: at most C.
        k: at most 1024; may exceed ``columns``.

    Returns:
        peak, mass, energy: ``[R]`` float32, as in :class:`verl_troll.core.logits.Normaliser`. A NaN or ``+inf`` among
            the logits makes mass NaN.
        values: ``[R, W]`` float32; 0 where the id is negative.
        top_values: ``[R, k]`` float32 by falling value, equal ones by rising column; beyond the columns, ``-inf``.
        top_ids: ``[R, k]`` int64, their columns; beyond the columns there are, -1.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    from verl_troll.core.kernels import logits as form

    return form.read_rows(logits, rows, ids, columns, k)


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

    One read of the logits at ``rows``, one write of ``out``, whose version counter rises. Sums are rounded to the
    dtype of ``out`` once. A logit of ``-inf`` counts as no mass.

    Args:
        out: ``[N, C]``, of the dtype of ``logits``; may be ``logits`` itself, but must not overlap it otherwise.
        logits: ``[N, C]`` float32, bfloat16 or float16, contiguous in the last dimension.
        rows: ``[R]`` int64 without repetition.
        columns: columns from here on are 0.
        peak, a: ``[R]`` float32.
        b: ``[R]`` float32, or None for 0.
        ids: ``[R, W]`` int64 below ``columns``, each once per row; negative for none.
        corrections: ``[R, W]`` float32.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    from verl_troll.core.kernels import logits as form

    form.write_gradient(out, logits, rows, columns, peak, a, b, ids, corrections)


def keep(
    ids: Tensor,
    values: Tensor,
    sampled_ids: Tensor,
    sampled_values: Tensor,
    peak: Tensor,
    mass: Tensor,
    mass_to_keep: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of :class:`verl_troll.core.support.SparsePolicy` from the k largest logits of each row.

    Args:
        ids, values: ``[R, k]`` int64 and float32, by falling value; ``-inf`` where there are fewer.
        sampled_ids, sampled_values: ``[R]`` int64 and ``[R, 1]`` float32.
        peak, mass: ``[R]`` float32, over the whole vocabulary.
        mass_to_keep: ids are kept while those before them have less mass.

    Returns:
        ids ``[R, k + 1]`` int64, log_probs ``[R, k + 1]`` float32, sampled ``[R]`` int64.
    """
    from verl_troll.core.kernels import tokens as form

    return form.keep(ids, values, sampled_ids, sampled_values, peak, mass, mass_to_keep)


def terms(
    old_ids: Tensor,
    old_log_probs: Tensor,
    sampled: Tensor,
    new_ids: Tensor | None,
    new_values: Tensor,
    peak: Tensor,
    mass: Tensor,
    *,
    kl_bound: float,
    tolerance: float,
    implicit: bool,
    vocab_size: int,
    k: int,
    mass_to_keep: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The terms of :func:`verl_troll.core.loss.policy_terms` and their gradients to log-probabilities, in one kernel.

    Args:
        old_ids, old_log_probs: ``[R, W]`` int64 and float32.
        sampled: ``[R]`` int64.
        new_ids: ``[R, M]`` int64, ids kept of the new policy (``union``); None for ``anchored``.
        new_values: ``[R, M]`` log-probabilities of these, or ``[R, W]`` logits at ``old_ids``.
        peak, mass: ``[R]`` of the new policy, over the whole vocabulary.
        kl_bound, tolerance, implicit: as in :func:`project`.
        vocab_size, k, mass_to_keep: as the support was selected.

    Returns:
        values: ``[3, R]`` log-ratio, regression KL, log-probability of the sampled id.
        statistics: ``[12, R]``, see :data:`verl_troll.core.loss.STATISTICS`.
        ids: ``[R, V]`` int64 ids whose log-probability the terms depend on, V being W or W + M; negative for none.
        ratio_gradient, regression_gradient: ``[R, V]``, gradients of the first two values to these log-probabilities.
    """
    from verl_troll.core.kernels import tokens as form

    return form.terms(
        old_ids,
        old_log_probs,
        sampled,
        new_ids,
        new_values,
        peak,
        mass,
        kl_bound=kl_bound,
        tolerance=tolerance,
        implicit=implicit,
        vocab_size=vocab_size,
        k=k,
        mass_to_keep=mass_to_keep,
    )


def combine(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_entropy: Tensor | None,
    ratio_gradient: Tensor,
    regression_gradient: Tensor,
    sampled: Tensor,
    mass: Tensor,
    energy: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What :func:`write_gradient` takes, from the gradients of the loss to the values of :func:`terms`.

    Args:
        grads: three times ``[R]``, in the order of the values.
        grad_entropy: ``[R]``, or None.
        ratio_gradient, regression_gradient: as :func:`terms` gave them.
        sampled: ``[R]`` int64.
        mass, energy: ``[R]`` of the new policy.

    Returns:
        corrections ``[R, V]``, level ``[R]`` and slope ``[R]``, None without the entropy.
    """
    from verl_troll.core.kernels import tokens as form

    return form.combine(grads, grad_entropy, ratio_gradient, regression_gradient, sampled, mass, energy)


def project(
    new: Tensor, old: Tensor, kl_bound: float, tolerance: float, implicit: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of :class:`verl_troll.core.projection.Projection` from ``new, old [R, n]``, differentiable in ``new``.

    As :func:`verl_troll.core.projection.project` computes them, without a host synchronisation.

    Args:
        new, old: ``[R, n]`` float32 or float64.
        kl_bound: eps > 0, in nats.
        tolerance: relative slack below the bound.
        implicit: whether to differentiate through the step size.
    """
    from verl_troll.core.kernels import projection as form

    return form.ProjectKernel.apply(new, old, kl_bound, tolerance, implicit)  # type: ignore[no-untyped-call, no-any-return]
