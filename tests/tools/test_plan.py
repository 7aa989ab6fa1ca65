"""``verl-troll plan``: its formulas against measurements at sizes that run here.

Memory is measured from the storages that operations allocate and free, traffic from what they read and write. Both are
exact; the plan may be off by ``TOLERANCE``. The Triton kernels are measured in Triton's interpreter, in their own
process (``tests/core/kernels/interpreted_plan.py``). Not measured: times, flash-attention's cross-entropy, and verl's
fused kernel for Megatron.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.processes import run
from tests.distributed.batches import VOCAB, make_batch
from tests.distributed.launch import run_ranks
from tests.distributed.vocab_scenarios import Traffic
from verl_troll.core.comparison import RULES
from verl_troll.core.kernels import logits_torch as logits_module
from verl_troll.core.kernels.logits_torch import block_elements
from verl_troll.core.lm_head import LinearHead
from verl_troll.core.logits import DenseLogits
from verl_troll.core.loss import BatchLosses, PolicyTerms, policy_terms
from verl_troll.core.support import Selection, SparsePolicy, select
from verl_troll.core.vocab import VocabLogits, VocabShard
from verl_troll.plugin import carry
from verl_troll.plugin.layout import TokenLayout
from verl_troll.tools import cli
from verl_troll.tools.plan import command, report
from verl_troll.tools.plan.formulas import Plan
from verl_troll.tools.plan.number import TestName
from verl_troll.tools.plan.setting import SUPPORTS, Model, PlanError, Setting, model_from_config

TOLERANCE = 0.25
HOST_BLOCK = block_elements(torch.device("cpu"))
DTYPES = {torch.float32: 4, torch.bfloat16: 2}
LIMITS: dict[str, Any] = {"k": 64, "dropped_mass": 1e-5}
ROOT = Path(__file__).parents[2]
EMPTY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


class Meter(TorchDispatchMode):
    """While active, counts bytes that operations allocate, read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.moved = self.operations = 0
        self._known: set[int] = set()
        self._outside = self.active = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        # A nested tensor hides the storage it is a view of.
        if not self.active or name == "_nested_get_values":
            return result
        read = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_iter(result) if isinstance(x, Tensor)]
        old = {x.untyped_storage()._cdata for x in read}
        new = [x.untyped_storage() for x in written if x.untyped_storage()._cdata not in old]
        for storage in new:
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        # The others are views, or do no work yet.
        if self._outside and (new or func._schema.is_mutable) and name not in EMPTY:
            self.operations += 1
            self.moved += sum(x.nbytes for x in read + written)
        return result

    def leaves_out_passes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Ignore bytes and operations inside the passes over logits."""
        for name in ("read_rows", "write_gradient"):
            monkeypatch.setattr(logits_module, name, self._around(getattr(logits_module, name)))

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            self._outside = False
            try:
                return function(*arguments, **options)
            finally:
                self._outside = True

        return called

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def test_the_meter_knows_what_is_held_and_what_was_freed() -> None:
    x = torch.zeros(1000)
    with Meter() as meter:
        y = x + 1
        y.add_(1)
        z = y[:10]
        assert (meter.live, meter.peak, meter.moved, meter.operations) == (4000, 4000, 16000, 2)
        del y
        assert meter.live == 4000
        del z
        assert meter.live == 0
        torch.ones(5)
    assert (meter.live, meter.peak) == (0, 4000)


def plan_of(rows: int, vocab: int, *, hidden: int = 8, block: int = HOST_BLOCK, **options: Any) -> dict[str, float]:
    """The plan's numbers for one micro-batch of response tokens on this host."""
    model = Model(vocab, hidden, 1e12, 1e12)
    defaults: dict[str, Any] = {
        "backend": "fsdp",
        "form": "torch",
        "micro_batch_tokens": rows,
        "prompt_tokens": 0,
        "kept_ids": 1,
    }
    options = defaults | options
    setting = Setting(model=model, tokens=rows, **options)
    return Plan(setting, device="cpu", block=block).numbers


def close(what: str, measured: float, predicted: float) -> None:
    assert measured == pytest.approx(predicted, rel=TOLERANCE), (
        f"{what}: measured {measured:,.0f}, the plan says {predicted:,.0f}. Where the code has changed on purpose, "
        "the constant in verl_troll/tools/plan/formulas.py follows"
    )


def logits_of(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Old logits, new logits and sampled ids; so flat that K ends every selection."""
    generator = torch.Generator().manual_seed(rows)
    old = torch.randn(rows, vocab, generator=generator)
    new = old + 0.5 * torch.randn(rows, vocab, generator=generator)
    sampled = torch.randint(vocab, (rows,), generator=generator)
    return old.to(dtype), new.to(dtype), sampled


def terms_of(rule: str, logits: Tensor | LinearHead, rows: Tensor, old: SparsePolicy, **options: Any) -> PolicyTerms:
    reuse, entropy = options.pop("reuse_logits", False), options.pop("entropy", False)
    source = DenseLogits(logits, reuse=reuse) if isinstance(logits, Tensor) else logits
    new = VocabLogits.of(source, rows, options.pop("shard", None))
    return policy_terms(rule, new, old, Selection(**LIMITS | options), kl_bound=0.05, entropy=entropy)


def loss_of(terms: PolicyTerms) -> Tensor:
    return terms.log_ratio.exp().sum() + terms.regression_kl.sum()


@dataclass
class Engine:
    """What a pass needs from an engine."""

    vocab: int
    group: dist.ProcessGroup | None = None

    def token_layout(self, shape: tuple[int, int], data: TensorDict, data_format: str) -> TokenLayout:
        return TokenLayout(torch.arange(shape[1]), shape, None)

    def vocab_shard(self, columns: int) -> VocabShard:
        if self.group is None:
            return VocabShard.whole(columns)
        return VocabShard.even(columns, self.vocab, self.group)


@dataclass
class Passes:
    """Old pass and update of one micro-batch, called as by an engine and measured on this rank.

    Attributes:
        samples, length: number of samples, and response tokens of each.
        sharp: factor on the logits of most tokens.
        group: ranks that share the vocabulary.
        watch: called with each meter before use.
        old, update: the measurements.
        kept_ids: mean number of ids kept per token.
        kept, backward: bytes held after the forward pass, and at the peak of the backward pass.
    """

    rule: str
    vocab: int
    samples: int
    length: int
    k: int = 64
    sharp: float = 1.0
    group: dist.ProcessGroup | None = None
    watch: Callable[[Meter], None] = lambda _: None
    old: Meter = field(default_factory=Meter)
    update: Meter = field(default_factory=Meter)
    kept_ids: float = 0.0
    kept: int = 0
    backward: int = 0

    @property
    def rows(self) -> int:
        return self.samples * self.length

    def run(self) -> None:
        from verl.utils.tensordict_utils import assign_non_tensor

        from verl_troll.plugin.passes import OldPolicyPass, UpdatePass
        from verl_troll.plugin.policy_loss import _terms
        from verl_troll.plugin.settings import HostSettings, TrollConfig

        # A one-token prompt, and a last token that predicts nothing.
        old, new, ids = logits_of(self.samples * (self.length + 1), self.vocab)
        # Most tokens keep few ids, one the maximum.
        old[1:], new[1:] = self.sharp * old[1:], self.sharp * old[1:] + new[1:] - old[1:]
        if self.group is not None:
            shard = VocabShard.even(self.vocab // dist.get_world_size(self.group), self.vocab, self.group)
            old, new = old[:, shard.start : shard.stop].clone(), new[:, shard.start : shard.stop].clone()
        leaf = new.requires_grad_()
        whole = torch.arange(self.samples + 1)

        def nested(values: Tensor, length: int) -> Tensor:
            return torch.nested.nested_tensor_from_jagged(values, whole * length)

        answers = nested(ids.view(self.samples, -1)[:, 1:].flatten(), self.length)
        batch = TensorDict(
            {
                "input_ids": nested(ids, self.length + 1),
                "prompts": nested(ids.view(self.samples, -1)[:, 0].contiguous(), 1),
                "responses": answers,
                "response_mask": torch.ones_like(answers),
            },
            batch_size=[self.samples],
        )
        assign_non_tensor(batch, batch_num_tokens=self.rows, dp_size=1)
        config = TrollConfig(k=self.k, support=self.rule, host=HostSettings(external_lib="verl_troll.plugin"))
        engine = Engine(self.vocab, self.group)
        reading = OldPolicyPass(config, engine, entropy=True)
        self.watch(self.old)
        with self.old:
            reading(data=batch, student_logits=old.unsqueeze(0))
            # From here on there are no logits.
            peak = self.old.peak
            packed = reading._packed_support()
        self.old.peak = peak
        batch.update(packed)
        self.kept_ids = packed[carry.COUNTS].values().float().mean().item()
        del packed

        def inner(model_output: dict[str, Tensor], **_: Any) -> tuple[Tensor, dict[str, Any]]:
            terms = _terms.get()
            assert terms is not None
            batch_terms = terms.padded(torch.Size((self.samples, self.length)))
            loss, regression = batch_terms.log_ratio.exp().sum(), batch_terms.regression_kl.sum()
            terms.losses = BatchLosses(loss, regression, torch.zeros(2), torch.zeros(2))
            return loss, {}

        updating = UpdatePass(config, engine, inner, entropy=False)
        self.watch(self.update)
        with self.update:
            output = updating(data=batch, student_logits=leaf.unsqueeze(0))
            output = {name: nested(x.flatten(), self.length + 1) for name, x in output.items() if x is not None}
            loss, _ = updating(output, batch)
            del output
            self.kept = self.update.live
            peak, self.update.peak = self.update.peak, self.kept
            loss.backward()
            self.backward = self.update.peak
        self.update.peak = max(peak, self.backward)

    def confirm(self, predicted: dict[str, float], *, kept: int) -> None:
        """Assert that the plan agrees; ``kept`` is the measured memory held until the gradient is written."""
        close("peak of the update", self.update.peak, predicted["troll_update"])
        close("kept for the backward pass", kept, predicted["small_kept"])
        close("peak of the old pass", self.old.peak, predicted["troll_old"])
        close("read and written in the update", self.update.moved, self.rows * predicted["small_bytes"])
        close("read and written in the old pass", self.old.moved, self.rows * predicted["old_small_bytes"])
        close("operations of the update", self.update.operations, predicted["update_launches"])
        close("operations of the old pass", self.old.operations, predicted["old_launches"])


# --- measured against predicted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [4, 16, 64])
def test_carried_bytes(k: int) -> None:
    tokens = carry.response_tokens(make_batch(samples=40))
    responses = tokens.mask.shape[0]
    policy = select(
        VocabLogits.of(6 * logits_of(responses, VOCAB)[0], torch.arange(responses)),
        tokens.ids,
        Selection(**LIMITS | {"k": k}),
    )
    fields = carry.pack(policy.ids, policy.log_probs, tokens)
    kept = fields[carry.COUNTS].values().float().mean().item()
    carried = sum(field.values().nbytes for field in fields.values())
    predicted = plan_of(responses, VOCAB, k=k, kept_ids=kept, sequences=40)
    assert predicted["troll_step"] == pytest.approx(carried, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reuse", [True, False], ids=["reused", "kept"])
@pytest.mark.parametrize("rule", ["union", "anchored"])
def test_memory_of_the_update(rule: str, reuse: bool, dtype: torch.dtype) -> None:
    rows, vocab = 40, 151_936
    old, new, sampled = logits_of(rows, vocab, dtype)
    # Out of order, so that they are a copy as on an accelerator, not a view.
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    policy = select(VocabLogits.of(old, order), sampled, Selection(**LIMITS))
    leaf = new.requires_grad_()
    with Meter() as meter:
        loss_of(terms_of(rule, leaf, order, policy, reuse_logits=reuse)).backward()
    predicted = plan_of(rows, vocab, support=rule, reuse_logits=reuse, dtype_bytes=DTYPES[dtype])
    close("peak beside the logits", meter.peak, predicted["troll_update"])
    close("peak", leaf.nbytes + meter.peak, predicted["troll_peak"])


@pytest.mark.parametrize("samples", [10, 40])
@pytest.mark.parametrize("rule", ["union", "anchored"])
def test_small_tensors(rule: str, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes held, bytes moved and operations outside the passes over the logits, for a small vocabulary."""
    # Blocks small enough to be negligible.
    monkeypatch.setattr(logits_module, "_HOST_BLOCK", 100 * 150)
    passes = Passes(rule, 150, samples, 8000 // samples)
    passes.old.leaves_out_passes(monkeypatch)
    passes.update.leaves_out_passes(monkeypatch)
    passes.run()
    predicted = plan_of(passes.rows, 150, support=rule, block=0, kept_ids=passes.kept_ids)
    passes.confirm(predicted, kept=passes.kept)


def test_kernels_in_the_interpreter() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/core/kernels/interpreted_plan.py"]
    done = run(command, cwd=ROOT, env=environment | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout


# --- vanilla's own, measured --------------------------------------------------------------------------------------


def megatrons_log_probs(dtype: torch.dtype, entropy: bool, grad: bool) -> tuple[float, list[tuple[str, int]]]:
    """Peak besides the logits, relative to their size, and collectives of verl's Megatron path, on every rank."""
    from megatron.core import parallel_state
    from verl.utils.megatron.tensor_parallel import vocab_parallel_entropy, vocab_parallel_log_probs_from_logits

    parallel_state.initialize_model_parallel(dist.get_world_size())
    logits = torch.randn(64, 1, 5000).to(dtype).requires_grad_(grad) * 1.0
    targets = torch.randint(5000, (64, 1))
    with torch.compiler.set_stance("force_eager"), torch.set_grad_enabled(grad), Traffic() as traffic, Meter() as meter:
        # As in verl's engine: the entropy overwrites its input.
        copy = logits.clone() if entropy else logits
        loss = vocab_parallel_entropy(logits).sum() if entropy else torch.zeros(())
        loss = loss + vocab_parallel_log_probs_from_logits(copy, targets).sum()
        if grad:
            torch.autograd.grad(loss, logits)
    return meter.peak / logits.nbytes, traffic.sent


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_vanillas_own_memory(dtype: torch.dtype, entropy: bool) -> None:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits_v2

    _, leaf, targets = logits_of(64, 5000, dtype)
    with Meter() as meter:
        loss = logprobs_from_logits_v2(leaf.requires_grad_(), targets).float().sum()
        if entropy:
            loss = loss + entropy_from_logits(leaf).float().sum()
        loss.backward()
    sizes = {"dtype_bytes": DTYPES[dtype], "entropy": entropy}
    close("without flash-attention", meter.peak, plan_of(64, 5000, **sizes)["vanilla_update_torch"])


def test_vanillas_own_memory_on_megatron() -> None:
    predicted = plan_of(64, 5000, backend="megatron", dtype_bytes=4)
    with_entropy = plan_of(64, 5000, backend="megatron", dtype_bytes=4, entropy=True)
    logits = predicted["logits"]
    for entropy, grad, expected in (
        (False, True, predicted["vanilla_update"]),
        (True, True, with_entropy["vanilla_update"]),
        (True, False, predicted["vanilla_old"]),
    ):
        measured, _ = run_ranks(megatrons_log_probs, 1, (torch.float32, entropy, grad))[0]
        assert measured * logits == pytest.approx(expected, rel=TOLERANCE, abs=0.05 * logits), (entropy, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_fused_heads(dtype: torch.dtype) -> None:
    from verl.utils.experimental.torch_functional import FusedLinearForPPOFunction

    rows, vocab, units = 1024, 20_000, 128
    predicted = plan_of(rows, vocab, hidden=units, fused=True, support="anchored", dtype_bytes=DTYPES[dtype])
    hidden = torch.randn(rows, units).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocab, units)).to(dtype).requires_grad_()
    sampled = torch.randint(vocab, (rows,))
    with Meter() as meter:
        FusedLinearForPPOFunction.apply(hidden, weight, sampled, 1.0, 512)[0].sum().backward()
    close("vanilla", meter.peak, predicted["vanilla_update"])
    with torch.no_grad(), Meter() as meter:
        FusedLinearForPPOFunction.apply(hidden, weight, sampled, 1.0, 512)
    close("vanilla, old pass", meter.peak, predicted["vanilla_old"])

    everything = torch.arange(rows)
    policy = select(
        VocabLogits.of(LinearHead(hidden.detach(), weight.detach()), everything), sampled, Selection(**LIMITS)
    )
    hidden.grad = weight.grad = None
    with Meter() as meter:
        loss_of(terms_of("anchored", LinearHead(hidden, weight), everything, policy)).backward()
    close("TROLL", meter.peak, predicted["troll_update"])


# --- collectives ------------------------------------------------------------------------------------------------------


def trolls_collectives(rows: int, vocab: int) -> dict[str, list[tuple[str, int]]]:
    world, rank = dist.get_world_size(), dist.get_rank()
    columns = vocab // world
    old, new, sampled = logits_of(rows, vocab)
    here = slice(rank * columns, (rank + 1) * columns)
    group = dist.group.WORLD
    assert group is not None
    shard = VocabShard.even(columns, vocab, group)
    everything = torch.arange(rows)
    sent = {}
    with Traffic() as traffic:
        policy = select(
            VocabLogits.of(old[:, here].clone(), everything, shard), sampled, Selection(**LIMITS), entropy=True
        )
    sent["old"] = traffic.sent
    for rule in ("union", "anchored"):
        for entropy in (False, True):
            leaf = new[:, here].clone().requires_grad_()
            with Traffic() as traffic:
                terms = terms_of(rule, leaf, everything, policy, shard=shard, entropy=entropy)
                loss_of(terms).backward()
            sent[f"{rule}{' with entropy' if entropy else ''}"] = traffic.sent
    return sent


def handed_over(sent: list[tuple[str, int]], ranks: int) -> tuple[int, float]:
    """Number of collectives, and bytes of one whole message; in an all-gather each rank sends its share."""
    return len(sent), sum(size * (ranks if name.startswith("_allgather") else 1) for name, size in sent) / len(sent)


@pytest.mark.parametrize("ranks", [1, 2])
def test_collectives_on_two_ranks(ranks: int) -> None:
    rows, vocab = 20, 300
    for by_rank in run_ranks(trolls_collectives, ranks, (rows, vocab)):
        for case, sent in by_rank.items():
            options = {"support": case.split()[0] if case != "old" else "union", "entropy": case.endswith("entropy")}
            predicted = plan_of(rows, vocab, backend="megatron", tp=ranks, **options)
            calls, size = ("troll_old_calls", "troll_old_sent") if case == "old" else ("troll_calls", "troll_sent")
            expected = (predicted[calls], rows * predicted[size])
            assert (handed_over(sent, ranks) if sent else (0, 0)) == expected, case


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_vanillas_own_collectives(entropy: bool) -> None:
    predicted = plan_of(64, 10_000, backend="megatron", tp=2, entropy=entropy)
    for _, sent in run_ranks(megatrons_log_probs, 2, (torch.float32, entropy, True)):
        assert {name for name, _ in sent} == {"allreduce_"}
        assert (len(sent), sum(size for _, size in sent)) == (
            predicted["vanilla_calls"],
            64 * predicted["vanilla_sent"],
        )


# --- model configurations ---------------------------------------------------------------------------------------------

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "llama": {"head_dim": 48},
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {"head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 192},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configurations_parameters_are_those_of_transformers_model(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }
    config = AutoConfig.for_model(family, **sizes, **FAMILIES[family])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    ours = model_from_config(tmp_path)
    assert ours == model_from_config(tmp_path / "config.json")
    assert (ours.vocab, ours.hidden, ours.tied) == (1000, 256, family == "qwen2")
    # Norms and biases are not counted.
    assert ours.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.004)
    unused = 5 * 12 * 3 * 256 * 192 if family == "qwen3_moe" else 0
    assert ours.parameters - ours.active_parameters == unused


def test_a_vision_language_configuration_is_that_of_its_text(tmp_path: Path) -> None:
    text = {
        "vocab_size": 1000,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": text, "hidden_size": 7, "tie_word_embeddings": True})
    )
    assert model_from_config(tmp_path) == Model(1000, 64, 145_920, 145_920, True)


# --- command line -----------------------------------------------------------------------------------------------------

SIZES = "--vocab 151936 --hidden 4096 --parameters 8.2B"
STEP = "--tokens 1M"


def plan(capsys: pytest.CaptureFixture[str], arguments: str) -> tuple[int, str]:
    status = cli.main(["plan", *shlex.split(arguments)])
    return status, capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (f"{STEP}", "--vocab is missing"),
        (f"{SIZES}", "--prompts is missing"),
        (f"{SIZES} --prompts 8 --samples 8", "--response-length is missing"),
        (f"{SIZES} --prompts 8 --samples 0 --response-length 9", "--samples must be at least 1, got 0"),
        (f"{SIZES} {STEP} --samples 8", "--samples and --tokens exclude each other"),
        (f"{SIZES} {STEP} --prompt-length 8", "--prompt-length and --tokens exclude each other"),
        (f"{SIZES} --prompt-tokens 8", "--prompt-tokens goes with --tokens"),
        (f"{SIZES} {STEP} --prompt-tokens -1", "--prompt-tokens must be at least 0, got -1"),
        (f"{SIZES} {STEP} --model /nowhere", "--vocab and --model exclude each other"),
        (f"{STEP} --model /nowhere", "--model /nowhere: no Hugging Face configuration"),
        (f"--vocab 2M --hidden 8 --parameters 8B {STEP}", "--vocab must be between 2 and 1048576, got 2000000"),
        (f"--vocab 1000 --hidden 0 --parameters 8B {STEP}", "--hidden must be at least 1, got 0"),
        (f"--vocab 1000 --hidden 1000 --parameters 1M {STEP}", "--parameters must be more than"),
        (f"{SIZES} --active-parameters 9B {STEP}", "--active-parameters must be at most --parameters"),
        (f"{SIZES} {STEP} --gpus 6 --tp 4", "--gpus must be a multiple of tp * pp * cp = 4, got 6"),
        (f"{SIZES} {STEP} --gpus 8 --tp 4 --dp 4", "--dp must be 2 with --gpus 8"),
        (f"{SIZES} {STEP} --gpus 8 --tp 0", "--tp must be at least 1, got 0"),
        (f"{SIZES} {STEP} --tp 2 --backend fsdp", "--tp must be 1 with --backend fsdp, got 2"),
        (f"{SIZES} {STEP} --pp 2 --backend fsdp", "--pp must be 1 with --backend fsdp, got 2"),
        (f"{SIZES} {STEP} --k 0", "--k must be between 1 and 32766, got 0"),
        (f"{SIZES} {STEP} --k 512", "--k must be at most 511, or --kernels torch must be given, got 512"),
        (f"{SIZES} {STEP} --k 4 --kept-ids 6", "--kept-ids must be between 1 and 5"),
        (f"{SIZES} {STEP} --epochs 0", "--epochs must be at least 1, got 0"),
        (f"{SIZES} --tokens 4 --mini-batches 5", "--mini-batches must be so many that"),
        (f"{SIZES} {STEP} --micro-batch-tokens 0", "--micro-batch-tokens must be at least 1, got 0"),
        (f"{SIZES} {STEP} --network-bandwidth 0", "--network-bandwidth must be finite and above 0"),
        (f"{SIZES} {STEP} --latency -1", "--latency must be finite and at least 0"),
    ],
)
def test_invalid_options_are_refused_by_name(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *shlex.split(arguments)]) == 2
    output = capsys.readouterr().err
    assert output.startswith("verl-troll plan: --")
    assert message in output


@pytest.mark.parametrize(
    "arguments", ["--tokens many", "--tokens 1.5", "--tokens 1e400", "--tokens nan", "--support other", "--dtype int8"]
)
def test_what_is_no_number_or_choice_is_refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", *shlex.split(f"{SIZES} {arguments}")])
    assert arguments.split()[0] in capsys.readouterr().err


VARIANTS = {
    "fsdp": "--gpus 8",
    "ulysses": "--gpus 8 --cp 4 --entropy --no-reuse-logits --kernels torch",
    "megatron": "--gpus 64 --tp 4 --pp 2 --cp 2 --support anchored --entropy",
    "fused": "--gpus 8 --fused --support anchored",
    "fused megatron": "--gpus 8 --tp 2 --fused --kernels torch",
}


def plan_from(arguments: str) -> Plan:
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    return Plan(command.setting_from(parser.parse_args(shlex.split(arguments))))


@pytest.mark.parametrize("variant", VARIANTS)
def test_tables_fit_a_terminal_and_agree_with_the_json(
    variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    status, output = plan(capsys, f"{SIZES} {STEP} {VARIANTS[variant]} --explain --json {file}")
    assert status == 0
    assert max(map(len, output.splitlines())) <= 120
    written = json.loads(file.read_text())
    for table in written["tables"]:
        assert table["title"] in output
        for line in table["lines"]:
            unit = "" if table["unit"] == "count" else table["unit"]
            printed = [text for text in output.splitlines() if text[2:70].strip() == line["label"]]
            difference = f"{'+' if line['difference'] > 0 else ''}{report.amount(line['difference'], unit)}"
            assert any(text.endswith(f" {difference}") for text in printed), line
            assert line["difference"] == line["troll"] - line["vanilla"]
    for name in written["values"]:
        assert re.search(rf"^  {name} = ", output, re.MULTILINE), name


def test_the_tests_that_formulas_name_are_here() -> None:
    assert all(callable(globals()[test]) for test in get_args(TestName) if test)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_explained_is_what_is_computed(variant: str) -> None:
    """Each printed expression, evaluated from the printed numbers alone, gives the printed value."""
    plan = plan_from(f"{SIZES} {STEP} {VARIANTS[variant]}")
    explained = {name: found for section in plan.explanations.values() for name, found in section.items()}
    assert list(explained) == list(plan.numbers)
    names: dict[str, Any] = {"ceil": math.ceil, "floor": math.floor, "min": min, "max": max, **plan.inputs}
    for name, found in explained.items():
        assert found.value == plan.numbers[name] == eval(found.expression, {"__builtins__": {}}, names), name
        assert found.reason, name
        names[name] = found.value


@pytest.mark.parametrize(
    ("options", "expression"),
    [
        ("--kernels torch", "rows * outcomes * 130"),
        ("--support anchored", "rows * (80 + (26 if tp * cp == 1 else 36) * width + 12 * kept_ids)"),
        ("", "rows * (140 + (77 if tp > 1 else 56 if cp == 1 else 68) * width)"),
    ],
)
def test_the_case_that_applies_is_explained(options: str, expression: str) -> None:
    plan = plan_from(f"{SIZES} {STEP} {options}")
    assert plan.explanations["Memory of the update, bytes per GPU"]["small"].expression == expression


def test_the_plan_knows_every_support_rule() -> None:
    assert set(SUPPORTS) == set(RULES)


@pytest.mark.parametrize(("option", "allowed"), [("support", "union, anchored"), ("backend", "fsdp, megatron")])
def test_a_rule_or_backend_without_numbers_is_refused_by_name(option: str, allowed: str) -> None:
    sizes: dict[str, Any] = {
        "model": Model(1000, 8, 1e6, 1e6),
        "tokens": 9,
        "prompt_tokens": 0,
        "micro_batch_tokens": 9,
    }
    with pytest.raises(PlanError, match=f"^--{option} must be one of {allowed}, got 'other'$"):
        Setting(**sizes | {"backend": "fsdp", option: "other"})


def test_a_formula_without_a_case_for_the_support_rule_says_so() -> None:
    plan = plan_from(f"{SIZES} {STEP}")
    plan.support = "other"  # type: ignore[assignment]
    for name in ("searches", "outcomes", "small", "small_kept", "small_bytes", "update_launches"):
        with pytest.raises(PlanError, match=r"^--support must be one of union, anchored, got 'other'$"):
            getattr(plan, name)


def test_peaks_and_totals_are_those_of_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    setting = Setting(Model(1000, 8, 1e6, 1e6), "megatron", 10_000, 500, 1000, tp=2, cp=2, dp=2)
    time = report.tables(Plan(setting))[-1]
    *parts, total = [(line.vanilla, line.troll) for line in time.lines]
    assert total == pytest.approx([sum(column) for column in zip(*parts, strict=True)])


def test_a_plan_needs_neither_verl_nor_a_gpu() -> None:
    code = (
        "import sys, torch; from verl_troll.tools import cli; "
        f"cli.main(['plan', *{shlex.split(SIZES + ' ' + STEP)!r}]); "
        "assert 'verl' not in sys.modules and not torch.cuda.is_initialized()"
    )
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr


def commands_in_docs() -> list[tuple[str, str]]:
    """The commands in docs/scale.md and the output shown below each."""
    blocks = re.findall(
        r"```console\n\$ verl-troll plan (.*?[^\\])\n(.*?)```", (ROOT / "docs/scale.md").read_text(), re.S
    )
    return [(command.replace("\\\n", " "), output) for command, output in blocks]


def test_docs_show_what_the_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    shown = commands_in_docs()
    assert len(shown) == 3
    for arguments, output in shown:
        assert plan(capsys, arguments) == (0, output)
