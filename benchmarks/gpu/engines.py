"""Runs TROLL in verl's own engines and trainer on one device, and checks correctness and cost.

    python -m benchmarks.gpu.engines --device cuda --out FOLDER [--only fsdp2 trainer] [--seconds 170] [--tiny]

========  =============================================================================================================
fsdp2     verl's FSDP2 engine: the Triton kernels against the torch forms, the first update, time and memory of a step
fsdp      the same on FSDP1, which needs an accelerator
megatron  the same on verl's Megatron engine at tensor-parallel size 1, with layers that need no TransformerEngine
model     time and memory of a step on FSDP2 with a model of 1.5 billion parameters (random weights)
trainer   three steps of verl's trainer for each method, with the embedded rollout on the device
========  =============================================================================================================

FOLDER/gpu_engines.json is rewritten after every row. A row is passed, failed or skipped, with the reason; the exit
status is 1 if one failed. Parts run in separate processes, one after the other; the trainers run side by side on eight
or more cores.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PARTS = ("fsdp2", "fsdp", "megatron", "model", "trainer")
ENGINES = PARTS[:4]
SUPPORTS = ("anchored", "union")
NEEDED = {
    "fsdp2": ("verl", "tensordict", "transformers"),
    "fsdp": ("verl", "tensordict", "transformers"),
    "megatron": ("verl", "tensordict", "transformers", "megatron.core", "mbridge"),
    "model": ("verl", "tensordict", "transformers"),
    "trainer": ("verl", "ray", "transfer_queue", "transformers"),
}
# Seconds reserved for the trainers, however long the engines take.
TRAINER_SECONDS = 90.0


@dataclass
class EngineRow:
    """One case of one part.

    Attributes:
        checks: value, limit and whether it passed, by name.
        facts: further numbers.
        reason: why it failed or was skipped.
    """

    part: str
    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, tuple[float, float, bool]] = field(default_factory=dict)
    reason: str = ""
    skipped: bool = False
    seconds: float = 0.0

    def check(self, name: str, value: float, limit: float) -> None:
        """Require ``value`` to be at most ``limit``; NaN fails."""
        self.checks[name] = (float(value), limit, float(value) <= limit)

    @property
    def status(self) -> str:
        if self.skipped:
            return "skipped"
        return "failed" if self.reason or not all(passed for _, _, passed in self.checks.values()) else "passed"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"status": self.status, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Size:
    """Sizes of the model and of two batches, one for comparisons and one for timing."""

    vocab: int
    hidden: int
    layers: int
    prompt: tuple[int, int]
    response: tuple[int, int]
    timed_prompt: tuple[int, int]
    timed_response: tuple[int, int]
    repeat: int
    heads: tuple[int, int] = (8, 4)
    intermediate: int = 0


SIZES = {
    "full": Size(151_936, 512, 4, (16, 64), (32, 128), (64, 128), (512, 512), repeat=3),
    "tiny": Size(512, 32, 2, (2, 7), (3, 12), (2, 7), (3, 12), repeat=1),
    # Qwen2.5-1.5B's.
    "model": Size(
        *(151_936, 1536, 28), (16, 64), (32, 128), (256, 512), (1024, 1024), repeat=5, heads=(12, 2), intermediate=8960
    ),
}


class Clock:
    """Tracks the time left for a part."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


Report = Callable[[EngineRow], None]


def run_case(report: Report, part: str, name: str, clock: Clock, case: Callable[[EngineRow], None]) -> None:
    """Run one case and report its row, even if it raises."""
    row = EngineRow(part, name)
    begin = time.perf_counter()
    if clock.left <= 0:
        row.skipped, row.reason = True, "no time was left"
    else:
        try:
            case(row)
        except Exception:
            row.reason = traceback.format_exc()[-3000:]
    row.seconds = round(time.perf_counter() - begin, 3)
    report(row)


# verl's engines.


class Host:
    """One of verl's engines, with the method selectable per pass; ``setup`` is a test scenario's."""

    def __init__(self, device: str, setup: Any) -> None:
        self.device = torch.device(device)
        self.setup = setup
        self.engine: Any = self.build(setup)

    def build(self, setup: Any) -> Any:
        """Build the engine."""
        raise NotImplementedError

    def loss_function(self, setup: Any, troll: dict[str, Any] | None) -> Any:
        """verl's loss function; also configures the engine with these TROLL settings, or without TROLL."""
        raise NotImplementedError

    def old_pass(self, batch: Any, setup: Any) -> dict[str, Tensor]:
        """Model outputs of the old-log-prob pass, on the CPU."""
        raise NotImplementedError

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The model's parameters."""
        raise NotImplementedError

    def gradient(self, parameter: torch.nn.Parameter) -> Tensor | None:
        """The parameter's gradient after the backward pass."""
        return parameter.grad

    def forget(self) -> None:
        """Remove the last method's settings from the engine's configuration."""
        object.__setattr__(self.engine.engine_config, "troll", None)

    def move(self, scale: float) -> None:
        """Perturb every parameter relatively, to simulate updates."""
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                local = _local(parameter)
                generator = torch.Generator(local.device).manual_seed(number)
                noise = torch.randn(local.shape, generator=generator, device=local.device, dtype=torch.float32)
                local.mul_((1 + scale * noise).to(local.dtype))

    def loss(self, batch: Any, setup: Any, loss_function: Any) -> tuple[float, dict[str, float], Tensor]:
        """Loss, metrics and gradient (as one vector) of a mini-batch."""
        from tests.distributed.batches import with_settings

        data = with_settings(batch, setup, calculate_entropy=False)
        with self.engine.train_mode():
            self.engine.optimizer_zero_grad()
            result = self.engine.forward_backward_batch(data, loss_function, forward_only=False)
            found = [
                _local(g).detach().float().flatten() for p in self.parameters() if (g := self.gradient(p)) is not None
            ]
            vector = torch.cat(found)
            self.engine.optimizer_zero_grad()
        return float(sum(result["loss"])), _metrics(result["metrics"]), vector

    def step(self, batch: Any, setup: Any, loss_function: Any) -> None:
        """One update, including the optimizer step."""
        from tests.distributed.batches import with_settings

        data = with_settings(batch, setup, calculate_entropy=False)
        with self.engine.train_mode():
            self.engine.train_batch(data, loss_function)


class FsdpHost(Host):
    """verl's FSDP or FSDP2 engine."""

    def build(self, setup: Any) -> Any:
        from tests.distributed import fsdp_scenarios

        return fsdp_scenarios.build(setup)[0]

    def loss_function(self, setup: Any, troll: dict[str, Any] | None) -> Any:
        from verl.workers.utils.losses import ppo_loss

        from tests.distributed import fsdp_scenarios

        self.forget()
        actor = fsdp_scenarios.actor_of(dataclasses.replace(setup, troll=troll), self.engine.engine_config)
        return functools.partial(ppo_loss, config=actor)

    def old_pass(self, batch: Any, setup: Any) -> dict[str, Tensor]:
        from tests.distributed import fsdp_scenarios

        return fsdp_scenarios.old_pass(self.engine, batch, setup)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        yield from self.engine.module.parameters()


class MegatronHost(Host):
    """verl's Megatron engine."""

    def build(self, setup: Any) -> Any:
        from tests.distributed import megatron_stock

        return megatron_stock.build(setup)

    def loss_function(self, setup: Any, troll: dict[str, Any] | None) -> Any:
        from verl.workers.config import ActorConfig
        from verl.workers.utils.losses import ppo_loss

        from tests.distributed import megatron_scenarios

        self.forget()
        if troll is not None:
            return megatron_scenarios.loss_function(self.engine, setup, troll)
        actor = ActorConfig(strategy="megatron", rollout_n=1, ppo_micro_batch_size_per_gpu=setup.micro_batch_size)
        return functools.partial(ppo_loss, config=actor)

    def old_pass(self, batch: Any, setup: Any) -> dict[str, Tensor]:
        from tests.distributed import megatron_stock

        return megatron_stock.old_pass(self.engine, batch, setup)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        for module in self.engine.module:
            yield from module.parameters()

    def gradient(self, parameter: torch.nn.Parameter) -> Tensor | None:
        gradient: Tensor | None = getattr(parameter, "main_grad", None)
        return gradient


def _local(tensor: Any) -> Tensor:
    """This rank's part of a tensor; on one rank, all of it."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor.data
    return local


def _metrics(metrics: dict[str, Any]) -> dict[str, float]:
    from verl.utils.metric import Metric

    return {name: float(Metric.aggregate_dp([one])) for name, one in metrics.items() if isinstance(one, Metric)}


def agreement(host: Host, setup: Any, troll: dict[str, Any], batch: Any, row: EngineRow) -> None:
    """Check one support rule on one engine: kernels against torch, log-probs against verl's, two updates.

    The first update is on the old policy's own weights, the second after a move. Both forms share the forward pass, so
    any difference is theirs.
    """
    from tests.distributed.batches import by_sample, with_old_policy
    from verl_troll.core import kernels

    bf16 = host.device.type == "cuda"
    forms: dict[str, dict[str, Tensor]] = {}
    for form in ("auto", "torch"):
        host.loss_function(setup, {**troll, "kernels": form})
        forms[form] = host.old_pass(batch, setup)
        row.facts[f"kernels, {form}"] = kernels.available(host.device)
    host.loss_function(setup, None)
    verls = host.old_pass(batch, setup)

    tokens = other_support = 0
    apart = alone = 0.0
    for ours, other in zip(*(by_sample(forms[form]) for form in ("auto", "torch")), strict=True):
        for policy, policy_torch in zip(*map(_by_token, (ours, other)), strict=True):
            tokens += 1
            both = policy.keys() & policy_torch.keys()
            mass = sum(math.exp(one[token]) for one in (policy, policy_torch) for token in one.keys() - both)
            apart = max(apart, *(abs(policy[token] - policy_torch[token]) for token in both))
            alone, other_support = max(alone, mass), other_support + (mass > 0)
    row.facts["tokens"] = tokens
    row.facts["tokens with another support"] = other_support
    row.facts["kept ids"] = forms["auto"]["troll_old_counts"].values().float().sum().item() / max(1, tokens)
    # Rounding can change which id is the last one kept.
    row.check("mass of ids that one form keeps alone", alone, 2e-5)
    row.check("log-probs of the support apart", apart, 1e-3)
    # In bfloat16, verl rounds its log-probs.
    values = forms["auto"]["log_probs"].values(), verls["log_probs"].values()
    inside = _response(batch)
    row.check("log-probs from verl's", (values[0] - values[1])[inside].abs().max().item(), 0.5 if bf16 else 1e-4)

    loss_function = host.loss_function(setup, {**troll, "kernels": "auto"})
    shard = with_old_policy(batch, forms["auto"])
    _, metrics, _ = host.loss(shard, setup, loss_function)
    row.facts["kl_before_max of the first update"] = metrics["troll/kl_before_max"]
    row.facts["ppo_kl of the first update"] = metrics["actor/ppo_kl"]
    row.facts["first update exact"] = metrics["troll/kl_before_max"] < 1e-12 and metrics["actor/ppo_kl"] == 0
    row.check("KL of the first update", metrics["troll/kl_before_max"], 1e-4 if bf16 else 1e-6)

    host.move(0.03)
    results = {}
    for form in ("auto", "torch"):
        loss_function = host.loss_function(setup, {**troll, "kernels": form})
        results[form] = host.loss(shard, setup, loss_function)
    (loss, metrics, gradient), (loss_torch, metrics_torch, gradient_torch) = results["auto"], results["torch"]
    row.facts["loss"], row.facts["loss, torch"] = loss, loss_torch
    row.facts |= {name: metrics[name] for name in ("troll/kl_before", "troll/kl_after_max", "troll/projected_share")}
    row.check("loss apart, relative", abs(loss - loss_torch) / max(1e-6, abs(loss_torch)), 1e-2 if bf16 else 1e-4)
    distance = (gradient - gradient_torch).norm() / gradient_torch.norm()
    row.check("gradient apart, relative", distance.item(), 2e-2 if bf16 else 1e-3)
    shares = "troll/projected_share"
    row.check("projected share apart", abs(metrics[shares] - metrics_torch[shares]), 2e-2)
    row.check("KL after projection", metrics["troll/kl_after_max"], 0.05 * (1 + 1e-5))
    row.check("no token was projected", float(metrics[shares] == 0), 0)


def _by_token(sample: dict[str, Tensor]) -> Iterator[dict[int, float]]:
    """Log-probs by id, for each token with a support."""
    counts = [int(count) for count in sample["troll_old_counts"].tolist() if count > 0]
    for ids, log_probs in zip(
        sample["troll_old_ids"].split(counts), sample["troll_old_log_probs"].split(counts), strict=True
    ):
        yield dict(zip(ids.tolist(), log_probs.tolist(), strict=True))


def _response(batch: Any) -> Tensor:
    """Positions in the packed batch whose logits predict a response token."""
    from verl_troll.plugin import carry

    return carry.response_tokens(batch).rows


def cost(host: Host, setup: Any, batch: Any, repeat: int, row: EngineRow) -> None:
    """Measure time and peak memory of the old pass and of an update with optimizer step, the methods in turn.

    On a GPU also the time that its kernels took in one more turn: what is left of a pass's time is the host's.
    """
    from tests.distributed.batches import with_old_policy

    row.facts["tokens"] = int(batch["input_ids"].values().shape[0])
    row.facts["response tokens"] = int(batch["response_mask"].values().sum())
    methods = {"vanilla": None, **{name: {"support": name} for name in SUPPORTS}}
    shards: dict[str, Any] = {}

    def turn(method: str, measure: Callable[[str, Callable[[], Any]], None]) -> None:
        loss_function = host.loss_function(setup, methods[method])
        measure("old pass", functools.partial(host.old_pass, batch, setup))
        measure("update", functools.partial(host.step, shards[method], setup, loss_function))

    for method, troll in methods.items():
        loss_function = host.loss_function(setup, troll)
        shards[method] = with_old_policy(batch, host.old_pass(batch, setup))
        host.step(shards[method], setup, loss_function)
    seconds: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    busy: dict[str, float] = {}
    for method in [*methods] * repeat:

        def clock(phase: str, work: Callable[[], Any], method: str = method) -> None:
            took, extra = _measure(work, host.device)
            seconds.setdefault(f"{method}, {phase}", []).append(took)
            memory[f"{method}, {phase}"] = max(extra, memory.get(f"{method}, {phase}", 0.0))

        turn(method, clock)
    for method in methods if host.device.type == "cuda" else ():

        def profile(phase: str, work: Callable[[], Any], method: str = method) -> None:
            kernels = _kernel_seconds(work)
            busy[f"{method}, {phase}"] = sum(kernels.values())
            slowest = sorted(kernels, key=kernels.__getitem__, reverse=True)[:10]
            row.facts[f"{method}, {phase}, slowest kernels, s"] = {name: round(kernels[name], 5) for name in slowest}

        turn(method, profile)
    for name, took_each in seconds.items():
        row.facts[f"{name}, s"] = round(statistics.median(took_each), 5)
        row.facts[f"{name}, from and to, s"] = [round(min(took_each), 5), round(max(took_each), 5)]
        if name in busy:
            row.facts[f"{name}, of its kernels, s"] = round(busy[name], 5)
            row.facts[f"{name}, MiB above the engine"] = round(memory[name], 1)
    for phase in ("old pass", "update"):
        for method in SUPPORTS:
            row.facts[f"{method} over vanilla, {phase}"] = round(
                row.facts[f"{method}, {phase}, s"] / row.facts[f"vanilla, {phase}, s"], 3
            )


def _measure(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds, and peak MiB above what was allocated before (0 on the CPU)."""
    cuda = device.type == "cuda"
    resting = 0
    if cuda:
        torch.cuda.synchronize()
        resting = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return seconds, (torch.cuda.max_memory_allocated() - resting) / 2**20 if cuda else 0.0


def _kernel_seconds(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds that each kernel and kind of copy took on the GPU, by its full name: many begin alike."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / 1e6 for event in profile.key_averages()}


def make_batch(size: Size, *, timed: bool = False) -> Any:
    """A ragged batch of random tokens with advantages, without the fields that only some scenarios need."""
    from tests.distributed import batches

    batch = batches.make_batch(
        vocab=size.vocab,
        prompt_length=size.timed_prompt if timed else size.prompt,
        response_length=size.timed_response if timed else size.response,
    )
    return batch.exclude("rollout_is_weights", "ref_log_prob")


def sampled(batch: Any, path: str, device: str) -> Any:
    """The batch with responses sampled from the model at ``path`` by the embedded rollout's code."""
    from transformers import AutoModelForCausalLM

    from verl_troll.embedded.generation import Request, generate

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    prompts = [tuple(prompt.tolist()) for prompt in batch["prompts"].unbind()]
    lengths = batch["responses"].offsets().diff().tolist()
    requests = [
        Request(prompt, length, noise=(number,))
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        if length
    ]
    completions = iter(generate(model, requests))
    responses = [next(completions).token_ids if length else [] for length in lengths]
    sequences = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    batch = batch.clone()
    for name, rows in (("responses", responses), ("input_ids", sequences)):
        values = torch.tensor([token for row in rows for token in row])
        batch[name] = torch.nested.nested_tensor_from_jagged(values, batch[name].offsets())
    return batch


def fsdp(strategy: str, device: str, size: Size, clock: Clock, report: Report) -> None:
    """Run the cases of one FSDP strategy; each engine is built once and used for all methods."""
    with tempfile.TemporaryDirectory() as folder:
        for fused in (False, True):
            kind = "fused head" if fused else "logits"
            host: list[Host] = []
            batch: list[Any] = []
            # verl's fused kernels cannot read an untied head, since FSDP2 shards it separately.
            path = write_model(Path(folder, f"tied-{fused}"), size, device, tied=fused)
            setup = fsdp_setup(path, strategy, device, fused=fused)

            def start(row: EngineRow, setup: Any = setup, host: list[Host] = host, batch: list[Any] = batch) -> None:
                batch[:] = [sampled(make_batch(size), setup.model_path, device)]
                host.append(FsdpHost(device, setup))
                row.facts["engine"] = type(host[0].engine).__name__

            run_case(report, strategy, f"{kind}: engine", clock, start)
            if host:
                cases(host[0], setup, batch[0], size, kind, clock, report)
            host.clear()
            release(device)


def fsdp_setup(path: str, strategy: str, device: str, *, fused: bool = False) -> Any:
    """The settings of an FSDP engine."""
    from tests.distributed.fsdp_scenarios import Setup

    return Setup(
        path,
        None,
        strategy=strategy,
        use_fused_kernels=fused,
        micro_batch_size=8,
        max_token_len=1 << 20,
        param_dtype="bf16" if device == "cuda" else "fp32",
        temperature=1.0,
        lr=1e-6,
    )


def model(device: str, size: Size, clock: Clock, report: Report) -> None:
    """Measure the cost of a step with one model."""

    def case(row: EngineRow) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = write_model(Path(folder), size, device, tied=True)
            setup = fsdp_setup(path, "fsdp2", device)
            host = FsdpHost(device, setup)
        row.facts["parameters"] = sum(parameter.numel() for parameter in host.parameters())
        cost(host, setup, make_batch(size, timed=True), size.repeat, row)

    run_case(report, "model", "cost of a step", clock, case)


def cases(host: Host, setup: Any, batch: Any, size: Size, kind: str, clock: Clock, report: Report) -> None:
    """Run comparisons on a small batch and a measurement on a large one, the most informative first."""
    part = getattr(setup, "strategy", "megatron")
    packings = [setup.use_remove_padding] if part == "megatron" else [True, False]
    for number, packed in enumerate(packings):
        for temperature in (1.0, 0.8):
            chosen = dataclasses.replace(setup, use_remove_padding=packed, temperature=temperature)
            for support in SUPPORTS:
                name = f"{kind}: {support}, temperature {temperature}, {'packed' if packed else 'padded'}"
                case = functools.partial(agreement, host, chosen, {"support": support}, batch)
                run_case(report, part, name, clock, case)
        if number == 0:
            timed = make_batch(size, timed=True)
            case = functools.partial(
                cost, host, dataclasses.replace(setup, use_remove_padding=packed), timed, size.repeat
            )
            run_case(report, part, f"{kind}: cost of a step", clock, case)


def release(device: str) -> None:
    """Free an engine's memory before the next one is built."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def write_model(folder: Path, size: Size, device: str, *, tied: bool) -> str:
    """Write a random Qwen2 whose outputs are as peaked as a trained model's; return its path."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate or 4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads[0],
        num_key_value_heads=size.heads[1],
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.device(device), torch.no_grad():
        model = Qwen2ForCausalLM(config)
        for layer in model.model.layers:
            for weight in (weight for weight in layer.parameters() if weight.ndim == 2):
                weight.normal_(0, weight.shape[1] ** -0.5)
            # Larger than the embedding, so a tied head does not repeat its input.
            layer.mlp.down_proj.weight.mul_(20)
        model.lm_head.weight.mul_(10 / (model.lm_head.weight.std() * size.hidden**0.5))
    model.save_pretrained(folder)
    return str(folder)


def megatron(device: str, size: Size, clock: Clock, report: Report) -> None:
    """Run the cases of the Megatron engine, with separate engines for packed and padded."""
    from tests.distributed.megatron_stock import Layout
    from tests.distributed.megatron_stock import write_model as write

    with tempfile.TemporaryDirectory() as folder:
        # Writes the tokenizer, which verl requires.
        write(Path(folder))
        path = write_model(Path(folder), size, device, tied=False)
        for packed in (True, False):
            kind = "packed" if packed else "padded"
            host: list[Host] = []
            batch: list[Any] = []
            layout = Layout(path, use_remove_padding=packed, micro_batch_size=8, lr=1e-6, temperature=1.0)

            def start(row: EngineRow, layout: Any = layout, host: list[Host] = host, batch: list[Any] = batch) -> None:
                batch[:] = [sampled(make_batch(size), layout.model_path, device)]
                host.append(MegatronHost(device, layout))
                row.facts["engine"] = type(host[0].engine).__name__

            run_case(report, "megatron", f"{kind}: engine", clock, start)
            if host:
                cases(host[0], layout, batch[0], size, kind, clock, report)
            host.clear()
            release(device)


def engine_part(part: str, options: argparse.Namespace, report: Report) -> None:
    """Run one engine part in this process."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    if part == "fsdp" and options.device == "cpu":
        report(EngineRow(part, "all", skipped=True, reason="FSDP1 needs an accelerator"))
        return
    import torch.distributed as dist

    import verl_troll.plugin  # noqa: F401
    from tests.device import backend

    with tempfile.TemporaryDirectory() as folder:
        if options.device == "cuda":
            torch.cuda.set_device(0)
        store = dist.FileStore(str(Path(folder, "store")), 1)
        dist.init_process_group(backend(options.device), store=store, rank=0, world_size=1)
        # Wait until the parts before this one are done; the line holds the time left.
        clock = Clock(float(sys.stdin.readline() if options.wait else options.seconds))
        size = SIZES["tiny" if options.tiny else "full"]
        if part == "megatron":
            megatron(options.device, size, clock, report)
        elif part == "model":
            model(options.device, size if options.tiny else SIZES["model"], clock, report)
        else:
            fsdp(part, options.device, size, clock, report)


# The trainer.

STEPS = 3
SHOWN = (
    "timing_s/",
    "troll/",
    "training/rollout_",
    "perf/max_memory",
    "critic/score/mean",
    "actor/ppo_kl",
    "actor/grad_norm",
    "response_length/mean",
)
ACTOR = "actor_rollout_ref.actor"
RUNS = {
    "vanilla": [],
    "union": ["+troll=default", f"{ACTOR}.policy_loss.troll.support=union"],
    "anchored": ["+troll=default", f"{ACTOR}.policy_loss.troll.support=anchored"],
    "union, FSDP1": ["+troll=default", f"{ACTOR}.policy_loss.troll.support=union"],
}


def train(method: str, device: str, folder: Path, clock: Clock, row: EngineRow) -> None:
    """Run three steps of verl's trainer with one method and the embedded rollout on the device."""
    from tests.trainer.run import probe_lines, run_trainer

    troll = method != "vanilla"
    out = folder / method.replace(", ", "-")
    overrides = [
        *RUNS[method],
        f"{ACTOR}.strategy={'fsdp' if 'FSDP1' in method else 'fsdp2'}",
        f"{ACTOR}.fsdp_config.use_torch_compile=false",
        # Low, since a task that is learned at once leaves no gradient.
        f"{ACTOR}.optim.lr=1e-5",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        "+ray_kwargs.ray_init.object_store_memory=1000000000",
        f"trainer.total_training_steps={STEPS}",
    ]
    rows = run_trainer(folder / "assets", out, overrides, probe=troll, limit=max(5.0, clock.left), device=device)
    row.check("steps that are missing", float([one["step"] for one in rows] != list(range(1, STEPS + 1))), 0)
    for number, one in enumerate(rows, start=1):
        row.facts[f"step {number}"] = {
            name: round(float(value), 5)
            for name, value in one.items()
            # verl writes NaN as null.
            if value is not None and name.startswith(SHOWN)
        }
        finite = one["actor/grad_norm"] is not None and math.isfinite(one["actor/grad_norm"])
        row.check(f"gradient is not a number, step {number}", float(not finite), 0)
        difference = one.get("training/rollout_probs_diff_mean", float("nan"))
        # Fails if the rollout did not receive the previous step's weights.
        row.check(f"rollout's probabilities from the actor's, step {number}", difference, 0.02)
    if troll:
        row.check("KL after projection", max(one["troll/kl_after_max"] for one in rows), 0.05 * (1 + 1e-5))
        row.check("tokens that did not converge", max(one["troll/unconverged"] for one in rows), 0)
        lines = probe_lines(out)
        row.facts["kernels"] = sorted({bool(line["kernels"]) for line in lines})
        row.check("passes without the kernels", float(device == "cuda" and row.facts["kernels"] != [True]), 0)
        sent = [sorted(line["digest"] for line in lines if line["pass"] == kind) for kind in ("old", "update")]
        row.check("supports that changed on the way", float(sent[0] != sent[1] or not sent[0]), 0)


def trainer_part(options: argparse.Namespace, jobs: int, clock: Clock, report: Report) -> None:
    """Run all methods, ``jobs`` at a time."""
    from tests.trainer.run import make_assets

    chosen = [name for name in RUNS if name in options.methods and (options.device != "cpu" or "FSDP1" not in name)]
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor(jobs) as threads:
        folder = Path(name)
        (folder / "assets").mkdir()
        make_assets(folder / "assets", hidden_size=32 if options.tiny else 256)
        for method in chosen:
            case = functools.partial(train, method, options.device, folder, clock)
            threads.submit(run_case, report, "trainer", method, clock, case)


# The command line.


def missing(part: str) -> list[str]:
    """Packages that a part needs but that are not installed."""
    absent = []
    for name in NEEDED[part]:
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            absent.append(name)
    return absent


def machine(device: str) -> dict[str, Any]:
    """Facts that the numbers depend on."""
    facts = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    for name in ("triton", "transformers", "verl", "ray", "megatron.core", "flash_attn"):
        if not (spec := _spec(name)):
            continue
        try:
            facts[name] = importlib.metadata.version(name.replace(".", "-"))
        except importlib.metadata.PackageNotFoundError:
            facts[name] = str(spec.origin)
    if device == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def _spec(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None


class Results:
    """The rows so far, in one file that is replaced atomically."""

    def __init__(self, folder: Path, machine: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "gpu_engines.json"
        self.content: dict[str, Any] = {"machine": machine, "rows": []}
        self.write()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and print its outcome."""
        self.content["rows"].append(row)
        self.write()
        print(f"{row['status']:8} {row['seconds']:7.1f} s  {row['part']}: {row['name']}", flush=True)
        for name, (value, limit, passed) in row["checks"].items():
            if not passed:
                print(f"         {name}: {value} is not at most {limit}", flush=True)
        if row["reason"]:
            print("         " + row["reason"].strip().replace("\n", "\n         "), flush=True)

    def write(self) -> None:
        """Write all rows."""
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.content, indent=1) + "\n")
        draft.replace(self.path)


def engine_parts(parts: Sequence[str], options: argparse.Namespace, clock: Clock, results: Results) -> None:
    """Run engine parts in separate processes. With enough cores they all import at once, then work in turn."""
    together = _jobs(options) > 1
    with tempfile.TemporaryDirectory() as name:
        logs = {part: Path(name, f"{part}.log") for part in parts}
        rows = {part: Path(name, f"{part}.jsonl") for part in parts}
        processes: dict[str, subprocess.Popen[bytes]] = {}

        def start(part: str) -> None:
            from tests.device import environment

            command = [
                sys.executable,
                "-m",
                "benchmarks.gpu.engines",
                "--part",
                part,
                "--out",
                str(rows[part]),
                "--wait",
            ]
            command += ["--device", options.device, *(["--tiny"] if options.tiny else [])]
            variables = {**os.environ, **environment(options.device), "TROLL_TEST_DEVICE": options.device}
            if part == "megatron":
                # Compiling Megatron's small functions would take longer than the whole measurement.
                variables["TORCHDYNAMO_DISABLE"] = "1"
            with logs[part].open("wb") as log:
                processes[part] = subprocess.Popen(
                    command, env=variables, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
                )

        try:
            for part in parts if together else ():
                start(part)
            for part in parts:
                if part not in processes:
                    start(part)
                process = processes[part]
                assert process.stdin is not None
                process.stdin.write(f"{max(1.0, clock.left - 3)}\n".encode())
                process.stdin.close()
                seen = 0
                while True:
                    ended = process.poll() is not None
                    lines = rows[part].read_text().splitlines() if rows[part].exists() else []
                    for line in lines[seen:]:
                        results.add(json.loads(line))
                    seen = len(lines)
                    if ended or clock.left <= 0:
                        break
                    time.sleep(0.1)
                if process.poll() != 0:
                    why = f"exit status {process.returncode}" if ended else "not finished in time"
                    tail = logs[part].read_text(errors="replace")[-3000:]
                    results.add(EngineRow(part, "process", reason=f"{why}\n{tail}").as_dict())
        finally:
            for process in processes.values():
                process.kill()
                process.wait()


def _jobs(options: argparse.Namespace) -> int:
    jobs: int = options.jobs or (4 if (os.cpu_count() or 1) >= 8 else 1)
    return jobs


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.engines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--methods", nargs="+", choices=RUNS, default=list(RUNS), help="the trainer's methods")
    parser.add_argument("--seconds", type=float, default=170.0, help="time limit for everything")
    parser.add_argument("--jobs", type=int, help="parallel processes; by default 4, or 1 with fewer than eight cores")
    parser.add_argument("--tiny", action="store_true", help="small models, for a dry run")
    parser.add_argument("--part", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    return options


def main(given: Sequence[str] | None = None) -> int:
    """Run the parts; return 1 if a row failed."""
    options = arguments(given)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("VERL_LOGGING_LEVEL", "ERROR")
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", RAY_USAGE_STATS_ENABLED="0")
    # The machine may have no other interface.
    os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
    if options.part:

        def append(row: EngineRow) -> None:
            with options.out.open("a") as file:
                file.write(json.dumps(row.as_dict()) + "\n")

        engine_part(options.part, options, append)
        sys.stdout.flush()
        # Keep library threads from holding up exit.
        os._exit(0)
    clock = Clock(options.seconds)
    results = Results(options.out, machine(options.device))
    parts = []
    for part in options.only:
        if absent := missing(part):
            reason = f"not installed: {', '.join(absent)}"
            results.add(EngineRow(part, "all", skipped=True, reason=reason).as_dict())
        else:
            parts.append(part)
    engines = [part for part in ENGINES if part in parts]
    if engines:
        reserve = TRAINER_SECONDS if "trainer" in parts else 0.0
        engine_parts(engines, options, Clock(max(0.5 * clock.left, clock.left - reserve)), results)
    if "trainer" in parts:
        trainer_part(options, _jobs(options), clock, lambda row: results.add(row.as_dict()))
    rows = results.content["rows"]
    counts = {status: sum(row["status"] == status for row in rows) for status in ("passed", "failed", "skipped")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
