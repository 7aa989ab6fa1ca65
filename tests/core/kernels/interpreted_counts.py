"""Operations that a step issues besides its kernels, counted in Triton's interpreter (run by ``test_kernels.py``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.core.kernels import interpreter
from verl_troll.core import lm_head
from verl_troll.core.comparison import RULES
from verl_troll.core.kernels import logits_triton as logits_form
from verl_troll.core.kernels import tokens_triton as tokens_form
from verl_troll.core.lm_head import LinearHead
from verl_troll.core.logits import DenseLogits, LogitsSource
from verl_troll.core.loss import policy_terms
from verl_troll.core.support import Selection, SparsePolicy, select
from verl_troll.core.vocab import VocabLogits

# Operations that launch nothing: views and allocations.
FREE = {
    "view", "_unsafe_view", "unsqueeze", "squeeze", "expand", "slice", "select", "permute", "transpose", "t", "detach",
    "alias", "as_strided", "unbind", "split", "empty", "empty_like", "empty_strided", "new_empty", "view_as",
    "promote_types", "lift_fresh", "_reshape_alias", "new_empty_strided",
}  # fmt: skip
ROWS, VOCAB, K = 8, 96, 6


class Counting(TorchDispatchMode):
    """Counts torch's operations and those that wait for the device, without the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.split("::")[1]
        if name not in FREE:
            self.operations[name] += 1
        return function(*args, **(kwargs or {}))

    @property
    def waits(self) -> list[str]:
        return [name for name in self.operations if name in ("nonzero", "_local_scalar_dense", "item", "masked_select")]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    interpreter.shrink()
    mode = Counting()

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def call(*args: Any, **kwargs: Any) -> None:
                mode.launches[self.name] += 1
                with _disable_current_modes():
                    self.kernel[grid](*args, **kwargs)

            return call

    for module, names in (
        (logits_form, ("_read", "_search", "_write")),
        (tokens_form, ("_keep", "_terms", "_combine")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Counted(name, getattr(module, name)))
    return mode


def problem() -> tuple[Tensor, Tensor, Tensor]:
    logits = 3 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0))
    return logits, torch.arange(ROWS), logits.argmax(-1)


def old_pass(source: LogitsSource | Tensor, *, entropy: bool) -> SparsePolicy:
    _, rows, ids = problem()
    return select(VocabLogits.of(source, rows), ids, Selection(K, 1e-3), entropy=entropy)


def update(rule: str, source: LogitsSource, leaves: list[Tensor], old: SparsePolicy, *, entropy: bool) -> None:
    rows = torch.arange(ROWS)
    terms = policy_terms(rule, VocabLogits.of(source, rows), old, Selection(K, 1e-3), kl_bound=0.05, entropy=entropy)
    loss = (terms.log_ratio.exp() + terms.regression_kl).sum()
    torch.autograd.grad(loss if terms.entropy is None else loss + terms.entropy.sum(), leaves)


@pytest.mark.parametrize("entropy", [False, True], ids=["plain", "entropy"])
def test_an_old_pass(counting: Counting, entropy: bool) -> None:
    logits, *_ = problem()
    with counting:
        old_pass(logits, entropy=entropy)
    # argmax of the problem is among the operations.
    assert counting.operations.total() <= 8 and not counting.waits, counting.operations
    assert counting.launches == Counter(["_read", "_search", "_keep"])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("entropy", [False, True], ids=["plain", "entropy"])
def test_an_update(counting: Counting, rule: str, entropy: bool) -> None:
    logits, *_ = problem()
    old = old_pass(logits, entropy=False)
    counting.launches.clear()
    leaf = (logits + 0.1).requires_grad_()
    with counting:
        update(rule, DenseLogits(leaf, reuse=True), [leaf], old, entropy=entropy)
    assert counting.operations.total() <= 20 and not counting.waits, counting.operations
    searched = ["_search", "_keep"] if rule == "union" else []
    assert counting.launches == Counter(["_read", *searched, "_terms", "_combine", "_write"])


@pytest.mark.parametrize("rule", RULES)
def test_a_fused_head_with_the_blocks_of_a_gpu(counting: Counting, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many blocks as for 8,192 tokens x 151,936 columns: 8 blocks of tokens read, 10 of columns in backward."""
    tokens, read_columns = lm_head._DEVICE_READ_BLOCK
    gradient_tokens, elements = lm_head._DEVICE_GRADIENT_BLOCK
    assert (8192 / tokens, read_columns >= 151_936, gradient_tokens) == (8, True, 8192)
    parts = -(-151_936 // (elements // 8192))
    monkeypatch.setattr(lm_head, "_READ_BLOCK", {"cpu": (1, VOCAB)})
    monkeypatch.setattr(lm_head, "_GRADIENT_BLOCK", {"cpu": (ROWS, ROWS * -(-VOCAB // parts))})
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(ROWS, 4, generator=generator), torch.randn(VOCAB, 4, generator=generator)
    with counting:
        old = old_pass(LinearHead(hidden, weight), entropy=False)
        read = counting.operations.total() + counting.launches.total()
        leaves = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
        update(rule, LinearHead(*leaves), list(leaves), old, entropy=False)
    assert read <= 60 and not counting.waits
    assert counting.launches["_write"] == parts == 10
    assert counting.operations.total() + counting.launches.total() - read <= 250, counting.operations
