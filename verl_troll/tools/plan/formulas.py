"""Every formula of the plan: one method per number, with its unit, its reason and the test that measures it.

``--explain`` prints the source of these methods by section. Each class is a section and uses the numbers of the classes
above it. Formulas without a test are counted by hand from the code they describe.
"""

from __future__ import annotations

from math import ceil, floor
from typing import NoReturn

import torch

from verl_troll.core import lm_head
from verl_troll.core.kernels.logits_torch import block_elements
from verl_troll.tools.plan.number import Explanation, TestName, explain, number, sections
from verl_troll.tools.plan.setting import SUPPORTS, PlanError, Setting


class Run:
    """A run as the formulas see it: inputs and computed numbers.

    Args:
        device: device type, which determines the block sizes.
        block: logits per block of the torch forms; by default that of ``device``.
    """

    def __init__(self, setting: Setting, *, device: str = "cuda", block: int | None = None) -> None:
        model, hardware = setting.model, setting.hardware
        self.setting = setting
        self.tokens, self.prompt_tokens, self.sequences = setting.tokens, setting.prompt_tokens, setting.sequences
        self.micro_batch_tokens = setting.micro_batch_tokens
        self.tp, self.pp, self.cp, self.dp = setting.tp, setting.pp, setting.cp, setting.dp
        self.epochs, self.mini_batches = setting.epochs, setting.mini_batches
        self.k, self.kept_ids = setting.k, setting.kept_ids
        self.fused, self.entropy, self.reuse_logits = setting.fused, setting.entropy, setting.reuse_logits
        self.support = setting.support
        self.megatron, self.triton = setting.backend == "megatron", setting.form == "triton"
        self.dtype_bytes, self.half = setting.dtype_bytes, setting.dtype_bytes == 2
        self.vocab, self.hidden, self.tied = model.vocab, model.hidden, model.tied
        self.parameters, self.active_parameters = model.parameters, model.active_parameters
        self.flops, self.memory_bandwidth = hardware.flops, hardware.memory_bandwidth
        self.link_bandwidth, self.network_bandwidth = hardware.link_bandwidth, hardware.network_bandwidth
        self.latency, self.launch, self.gpus_per_node = hardware.latency, hardware.launch, hardware.gpus_per_node
        self.block_elements = block_elements(torch.device(device)) if block is None else block
        self.read_tokens, self.read_columns = lm_head._READ_BLOCK.get(device, lm_head._DEVICE_READ_BLOCK)
        self.write_tokens, self.write_elements = lm_head._GRADIENT_BLOCK.get(device, lm_head._DEVICE_GRADIENT_BLOCK)

    @property
    def inputs(self) -> dict[str, float]:
        """The inputs of the formulas."""
        given = {name: x for name, x in vars(self).items() if not hasattr(type(self), name)}
        return {name: x for name, x in given.items() if isinstance(x, int | float)}

    @property
    def numbers(self) -> dict[str, float]:
        """The results of all formulas."""
        return {name: getattr(self, name) for names in sections(type(self)).values() for name in names}

    @property
    def explanations(self) -> dict[str, dict[str, Explanation]]:
        """How each number was computed, by section and name."""
        return {title: {name: explain(self, name) for name in names} for title, names in sections(type(self)).items()}


def _unknown(support: NoReturn) -> NoReturn:
    """Refuse a support rule without its own numbers. mypy finds formulas that do not cover all of ``Support``."""
    raise PlanError(f"--support must be one of {', '.join(SUPPORTS)}, got {support!r}")


def _by_form(run: Run) -> TestName:
    return "test_kernels_in_the_interpreter" if run.triton else "test_small_tensors"


def _by_head(run: Run) -> TestName:
    if run.triton:
        return "test_kernels_in_the_interpreter"
    return "test_memory_of_fused_heads" if run.fused else "test_memory_of_the_update"


def _of_vanilla(run: Run) -> TestName:
    if run.fused:
        return "" if run.megatron else "test_memory_of_fused_heads"
    return "test_vanillas_own_memory_on_megatron" if run.megatron else ""


class Sizes(Run):
    """Sizes."""

    @number()
    def gpus(self) -> float:
        """One GPU per rank of the grid."""
        return self.tp * self.pp * self.cp * self.dp

    @number("tokens")
    def step_tokens(self) -> float:
        """The actor processes prompts and responses."""
        return self.tokens + self.prompt_tokens

    @number("tokens")
    def mini_batch(self) -> float:
        """Per data-parallel rank."""
        return ceil(self.step_tokens / (self.mini_batches * self.dp))

    @number("rows")
    def rows(self) -> float:
        """Tokens of a micro-batch on one GPU. Memory formulas treat all as response tokens."""
        return ceil(min(self.micro_batch_tokens, self.mini_batch) / self.cp)

    @number("columns")
    def columns(self) -> float:
        """Megatron splits the vocabulary evenly; FSDP does not."""
        return ceil(self.vocab / self.tp)

    @number()
    def old_cuts(self) -> float:
        """Micro-batches of the old pass."""
        return ceil(self.step_tokens / (self.dp * self.micro_batch_tokens))

    @number()
    def cuts(self) -> float:
        """Micro-batches in all updates of a step."""
        return self.epochs * self.mini_batches * ceil(self.mini_batch / self.micro_batch_tokens)

    @number("rows")
    def gpu_rows(self) -> float:
        """Tokens per GPU in a pass over the step."""
        return self.step_tokens / (self.dp * self.cp)

    @number("rows")
    def gpu_responses(self) -> float:
        """Only the response tokens, which are all that TROLL reads."""
        return self.tokens / (self.dp * self.cp)

    @number("ids")
    def width(self) -> float:
        """Maximum ids kept per token: K selected ids and the sampled one."""
        return min(self.k + 1, self.vocab)

    @number()
    def searches(self) -> float:
        """Whether the update searches for ids (1, union) or reuses those of the old pass (0, anchored)."""
        if self.support == "anchored":
            return 0
        if self.support == "union":
            return 1
        _unknown(self.support)

    @number()
    def outcomes(self) -> float:
        """Maximum outcomes per token: anchored adds one for the rest, union up to as many ids of the new policy."""
        if self.support == "anchored":
            return self.width + 1
        if self.support == "union":
            return 2 * self.width
        _unknown(self.support)

    @number("columns", lambda run: "test_kernels_in_the_interpreter" if run.triton else "")
    def group(self) -> float:
        """Columns per group. The Triton kernels search only the groups with the largest maxima."""
        if self.k <= 64:
            return 64
        if self.k <= 256:
            return 32
        return 16


class UpdateMemory(Sizes):
    """Memory of the update, bytes per GPU."""

    @number("bytes")
    def logits(self) -> float:
        """One per token and column. A fused head never holds them all."""
        if self.fused:
            return 0
        return self.rows * self.columns * self.dtype_bytes

    @number("bytes")
    def head_gradient(self) -> float:
        """The gradient of the head's weight."""
        return self.columns * self.hidden * self.dtype_bytes

    @number("bytes", _of_vanilla)
    def vanilla_update(self) -> float:
        """Flash-attention and Megatron write the gradient over the logits, unless the entropy needs them. Fused heads
        hold float32 blocks of 512 tokens (FSDP) or a gradient of 9,504 columns (Megatron).
        """
        if self.fused and self.megatron:
            return (
                self.rows * min(self.columns, 9504) * self.dtype_bytes
                + self.head_gradient
                + 2 * self.rows * self.hidden * self.dtype_bytes
            )
        if self.fused:
            return (
                5 * min(self.rows, 512) * self.columns * 4
                + 2 * self.head_gradient
                + self.rows * self.hidden * self.dtype_bytes
            )
        if self.megatron and self.entropy:
            return 3 * self.logits
        if self.entropy:
            return 2 * self.logits
        return 0

    @number("bytes", lambda run: "" if run.fused or run.megatron else "test_vanillas_own_memory")
    def vanilla_update_torch(self) -> float:
        """Without flash-attention, torch computes the gradient row by row, then stacks the rows."""
        if self.fused or self.megatron:
            return self.vanilla_update
        if self.half and self.entropy:
            return 7 * self.logits
        if self.half:
            return 2 * self.logits
        if self.entropy:
            return 6 * self.logits
        return 3 * self.logits

    @number("bytes", "test_memory_of_the_update")
    def troll_gradient(self) -> float:
        """reuse_logits writes the gradient over the logits, with or without the entropy."""
        if self.fused or self.reuse_logits:
            return 0
        return self.logits

    @number("rows")
    def read_rows(self) -> float:
        """Rows of a block of logits that a fused head reads."""
        return min(self.rows, self.read_tokens)

    @number("columns")
    def read_width(self) -> float:
        """Columns of the same block."""
        return min(self.columns, self.read_columns)

    @number("bytes", _by_head)
    def read_block(self) -> float:
        """The torch forms copy some rows in float32; the Triton kernels write the maximum of each group. A fused head
        also computes a block of logits.
        """
        if self.fused and self.triton:
            return (
                self.read_rows * (self.read_width + self.hidden) * self.dtype_bytes
                + self.read_rows * ceil(self.read_width / self.group) * self.dtype_bytes
            )
        if self.fused:
            return self.read_rows * (self.read_width + self.hidden) * self.dtype_bytes + 4 * min(
                self.block_elements, self.read_rows * self.read_width
            )
        if self.triton:
            return self.rows * ceil(self.columns / self.group) * self.dtype_bytes
        if self.half:
            return min(self.rows, floor(self.block_elements / self.columns)) * self.columns * 6
        return min(self.rows, floor(self.block_elements / self.columns)) * self.columns * 12

    @number("bytes", _by_head)
    def update_block(self) -> float:
        """The same in the update. The kernels need none if the update does not search."""
        if self.triton and not self.searches and not self.fused:
            return 0
        return self.read_block

    @number("rows")
    def write_rows(self) -> float:
        """Rows of a block of logits whose gradient a fused head computes."""
        return min(self.rows, self.write_tokens)

    @number("columns")
    def write_columns(self) -> float:
        """Columns of the same block."""
        return min(self.columns, floor(self.write_elements / self.write_rows))

    @number("bytes", _by_head)
    def write_block(self) -> float:
        """The Triton kernels write in place; a fused head holds a block of logits."""
        if self.fused and self.triton:
            return self.write_rows * self.write_columns * self.dtype_bytes
        if self.fused:
            return self.write_rows * self.write_columns * self.dtype_bytes + 4 * min(
                self.block_elements, self.write_rows * self.write_columns
            )
        if self.triton:
            return 0
        return self.read_block

    @number("bytes", _by_form)
    def small_reading(self) -> float:
        """The old ids, unpacked and picked for this GPU, and the values read. A fused head joins its blocks."""
        return self.rows * (
            80
            + 12 * self.width * (1 if self.cp == 1 else 2)
            + (12 if self.searches else 4) * self.width * (2 if self.fused else 1)
        )

    @number("bytes", _by_form)
    def small(self) -> float:
        """Peak of tensors per token and outcome: ids, log-probabilities, gradients, the torch form's float64."""
        if not self.triton:
            return self.rows * self.outcomes * 130
        if self.support == "anchored":
            return self.rows * (80 + (26 if self.tp * self.cp == 1 else 36) * self.width + 12 * self.kept_ids)
        if self.support == "union":
            return self.rows * (140 + (77 if self.tp > 1 else 56 if self.cp == 1 else 68) * self.width)
        _unknown(self.support)

    @number("bytes", _by_form)
    def small_kept(self) -> float:
        """Those saved for the backward pass; with the kernels, also the inputs of the gradient kernel."""
        if not self.triton:
            return self.rows * self.outcomes * 43
        if self.support == "anchored":
            return self.rows * (100 + (20 if self.tp == 1 else 37) * self.width)
        if self.support == "union":
            return self.rows * (100 + (40 if self.tp == 1 else 78) * self.width)
        _unknown(self.support)

    @number(
        "bytes",
        lambda run: (
            "" if not run.fused else "test_kernels_in_the_interpreter" if run.triton else "test_memory_of_fused_heads"
        ),
    )
    def fused_gradients(self) -> float:
        """A block of logits, the gradients of weight and hidden states, and a float32 part of the weight's gradient if
        it is summed over several blocks.
        """
        if not self.fused:
            return 0
        return (
            self.write_block
            + self.head_gradient
            + self.rows * self.hidden * (4 + 2 * self.dtype_bytes)
            + (
                0
                if self.half and self.rows <= self.write_tokens
                else self.write_columns * self.hidden * (6 if self.half else 4)
            )
        )

    @number("bytes", _by_head)
    def troll_update(self) -> float:
        """The largest of three peaks: reading, projection, backward pass."""
        if self.fused:
            return max(self.update_block + self.small_reading, self.small, self.small_kept + self.fused_gradients)
        if self.triton:
            return max(self.update_block + self.small_reading, self.small, self.small_kept + self.troll_gradient)
        return max(self.update_block, self.small, self.small_kept + self.write_block + self.troll_gradient)

    @number("bytes")
    def vanilla_peak(self) -> float:
        """Logits included."""
        return self.logits + self.vanilla_update

    @number("bytes")
    def vanilla_peak_torch(self) -> float:
        """The same without flash-attention."""
        return self.logits + self.vanilla_update_torch

    @number("bytes")
    def troll_peak(self) -> float:
        """The same with TROLL."""
        return self.logits + self.troll_update


class OldPassMemory(UpdateMemory):
    """Memory of the old-log-prob pass, bytes per GPU."""

    @number("bytes", _of_vanilla)
    def vanilla_old(self) -> float:
        """verl computes the entropy here. Megatron copies the logits for it; FSDP compiles it, counted as free."""
        if self.fused and self.megatron:
            return self.rows * ceil(self.columns / 1024) * 16
        if self.fused:
            return 3 * min(self.rows, 512) * self.columns * 4
        if self.megatron:
            return 3 * self.logits
        return 0

    @number("bytes", _by_form)
    def troll_old(self) -> float:
        """The block being read, and the candidates of every token."""
        if self.triton:
            return max(
                self.read_block + self.rows * (100 + 12 * self.width * (2 if self.fused else 1)),
                self.rows * (80 + 24 * self.width if self.tp == 1 else 90 + 60 * self.width),
            )
        return self.read_block + self.rows * self.width * 40


class Carried(OldPassMemory):
    """Carried with the batch."""

    @number("bytes/token")
    def verl_response(self) -> float:
        """int64: responses, response_mask, loss_mask, input_ids, position_ids; float32: rollout_log_probs, rm_scores,
        log_probs, entropy, old_log_probs, advantages, returns.
        """
        return 5 * 8 + 7 * 4

    @number("bytes/token")
    def verl_prompt(self) -> float:
        """int64: prompts, input_ids, position_ids; float32: log_probs."""
        return 3 * 8 + 4

    @number("bytes")
    def verl_step(self) -> float:
        """Stored in the queue."""
        return self.tokens * self.verl_response + self.prompt_tokens * self.verl_prompt

    @number("bytes/token", "test_carried_bytes")
    def troll_response(self) -> float:
        """An int16 count, and 48 bits per kept id with its log-probability."""
        return 2 + 6 * self.kept_ids

    @number("bytes", "test_carried_bytes")
    def troll_step(self) -> float:
        """Stored in the queue."""
        return self.tokens * self.troll_response + 6 * self.sequences

    @number("bytes")
    def verl_moved(self) -> float:
        """Per GPU: the old pass reads the rollout's fields and writes log_probs and entropy; the update reads all."""
        return (
            self.tokens * (self.verl_response + 48 + 8) + self.prompt_tokens * (self.verl_prompt + 24 + 8)
        ) / self.dp

    @number("bytes")
    def troll_moved(self) -> float:
        """Per GPU: the old pass writes it and the update reads it once, for any number of epochs."""
        return 2 * self.troll_step / self.dp


class Collectives(Carried):
    """Collectives between tensor- and context-parallel ranks."""

    @number()
    def ring(self) -> float:
        """How many times a rank sends and receives each message."""
        return 2 * (self.tp - 1) / self.tp

    @number("bytes/token", lambda run: "" if run.fused else "test_vanillas_own_collectives")
    def vanilla_sent(self) -> float:
        """All-reduces of the maximum logit, the target's logit and the normaliser; three more for the entropy."""
        if self.tp == 1:
            return 0
        if self.fused:
            return 4 * ceil(self.columns / 1024) + 12
        return 12 * (2 if self.entropy else 1)

    @number("", lambda run: "" if run.fused else "test_vanillas_own_collectives")
    def vanilla_calls(self) -> float:
        """All-reduces per micro-batch of the update."""
        if self.tp == 1:
            return 0
        if self.fused:
            return 3
        if self.entropy:
            return 6
        return 3

    @number("bytes/token")
    def vanilla_old_sent(self) -> float:
        """As in the update, with the entropy."""
        if self.tp == 1:
            return 0
        if self.fused:
            return 4 * ceil(self.columns / 1024) + 12
        return 24

    @number()
    def vanilla_old_calls(self) -> float:
        """All-reduces per micro-batch of the old pass."""
        if self.tp == 1:
            return 0
        if self.fused:
            return 3
        return 6

    @number("bytes/token", "test_collectives_on_two_ranks")
    def troll_old_sent(self) -> float:
        """K logits and ids, the sampled logit, the two parts of the normaliser, the entropy."""
        if self.tp == 1:
            return 0
        return 8 * min(self.k, self.vocab) + 16

    @number("", "test_collectives_on_two_ranks")
    def troll_old_calls(self) -> float:
        """An all-to-all for merging, and an all-gather."""
        if self.tp == 1:
            return 0
        return 2

    @number(
        "bytes/token",
        lambda run: "test_kernels_in_the_interpreter" if run.triton else "test_collectives_on_two_ranks",
    )
    def troll_sent(self) -> float:
        """As in the old pass if the update searches; otherwise the logits at the old ids, and one slot per rank for its
        normaliser. The kernels always compute the entropy.
        """
        if self.tp == 1:
            return 0
        if self.searches:
            return 8 * min(self.k, self.vocab) + (16 if self.entropy or self.triton else 12)
        return 4 * (self.width + (3 if self.entropy or self.triton else 2) * self.tp)

    @number("", "test_collectives_on_two_ranks")
    def troll_calls(self) -> float:
        """An all-to-all and an all-gather if the update searches, else one all-reduce; none in the backward pass."""
        if self.tp == 1:
            return 0
        if self.searches:
            return 2
        return 1

    @number("bytes/token")
    def vanilla_shared(self) -> float:
        """Log-probabilities (and entropy), gathered from the ranks that share the tokens."""
        if self.cp == 1:
            return 0
        return 4 * (self.cp - 1) * (2 if self.entropy else 1)

    @number("bytes/token")
    def troll_shared(self) -> float:
        """Three more values per token: log-ratio, regression KL, whether projected."""
        if self.cp == 1:
            return 0
        return 4 * (self.cp - 1) * (5 if self.entropy else 4)

    @number("bytes/token")
    def vanilla_old_shared(self) -> float:
        """Log-probabilities and entropy."""
        if self.cp == 1:
            return 0
        return 8 * (self.cp - 1)

    @number("bytes/token")
    def troll_old_shared(self) -> float:
        """The same, and the kept ids with their log-probabilities, all-reduced."""
        if self.cp == 1:
            return 0
        return 8 * (self.cp - 1) + 2 * (self.cp - 1) * 8 * self.width

    @number("bytes")
    def vanilla_received(self) -> float:
        """Per GPU and step. Vanilla also sends for prompts."""
        return self.epochs * self.gpu_rows * (self.vanilla_sent * self.ring + self.vanilla_shared) + self.gpu_rows * (
            self.vanilla_old_sent * self.ring + self.vanilla_old_shared
        )

    @number("bytes")
    def troll_received(self) -> float:
        """Per GPU and step."""
        return (
            self.epochs * (self.gpu_responses * self.troll_sent * self.ring + self.gpu_rows * self.troll_shared)
            + self.gpu_responses * self.troll_old_sent * self.ring
            + self.gpu_rows * self.troll_old_shared
        )

    @number()
    def vanilla_all_calls(self) -> float:
        """Collectives per GPU and step."""
        return self.cuts * (self.vanilla_calls + (0 if self.cp == 1 else 2 if self.entropy else 1)) + self.old_cuts * (
            self.vanilla_old_calls + (0 if self.cp == 1 else 2)
        )

    @number()
    def troll_all_calls(self) -> float:
        """Collectives per GPU and step; with context parallelism, two of them are small ones for the metrics."""
        return self.cuts * (self.troll_calls + (0 if self.cp == 1 else 7 if self.entropy else 6)) + self.old_cuts * (
            self.troll_old_calls + (0 if self.cp == 1 else 3)
        )


class Kernels(Collectives):
    """Kernels, timed on one NVIDIA H200: 8,192 tokens x 151,936 bfloat16 logits, K 64."""

    @number("bytes")
    def timed_bytes(self) -> float:
        """Size of the logits."""
        return 8192 * 151936 * 2

    @number("bytes/s")
    def timed_bandwidth(self) -> float:
        """From that card's data sheet. For other cards, passes are scaled by theirs."""
        return 4.8e12

    @number()
    def copy_pass(self) -> float:
        """A copy reads and writes the logits in 1.17 ms: this many times as long per pass as at the data sheet's rate.
        Used for everything not timed: torch's, verl's and Megatron's operations, matrix products on logits.
        """
        return 1.17e-3 * self.timed_bandwidth / (2 * self.timed_bytes)

    @number()
    def torch_pass(self) -> float:
        """TROLL's torch forms took 111 to 122 ms for old pass and update; passes at a copy's rate and small operations
        add up to only 40 ms.
        """
        return 3.5 * self.copy_pass

    @number()
    def flash_pass(self) -> float:
        """Flash-attention, 2.12 ms for three passes."""
        return 2.12e-3 * self.timed_bandwidth / (3 * self.timed_bytes)

    @number()
    def old_pass(self) -> float:
        """Flash-attention's cross-entropy and torch's compiled entropy, 6.28 ms."""
        return 6.28e-3 * self.timed_bandwidth / self.timed_bytes

    @number()
    def read_pass(self) -> float:
        """The reading kernel, 0.58 ms."""
        return 0.58e-3 * self.timed_bandwidth / self.timed_bytes

    @number()
    def write_pass(self) -> float:
        """The writing kernel, 1.26 ms."""
        return 1.26e-3 * self.timed_bandwidth / (2 * self.timed_bytes)

    @number("s")
    def search_seconds(self) -> float:
        """Per token (0.38 ms for all), proportional to the number of groups plus the columns of those chosen. Not bound
        by memory, so not scaled to other cards.
        """
        return 0.38e-3 / 8192 * (ceil(self.columns / self.group) + self.k * self.group) / (ceil(151936 / 64) + 64 * 64)

    @number("s")
    def terms_seconds(self) -> float:
        """Per token: the projection (0.37 ms for all; 0.04 ms if every token is inside the region), the choice of ids,
        and the gradient corrections; proportional to the outcomes. Not bound by memory either.
        """
        return (0.37e-3 + 0.007e-3 + 0.006e-3) / 8192 * self.outcomes / 130


class Plan(Kernels):
    """Time, seconds per step on a GPU that holds the head."""

    @number()
    def trunk_parameters(self) -> float:
        """Parameters used per token, without embedding and head."""
        return self.active_parameters - self.vocab * self.hidden * (1 if self.tied else 2)

    @number("flop")
    def step_flops(self) -> float:
        """Per parameter and token, 2 in the old pass and 6 in an update; no attention, recomputation or rollout."""
        return self.step_tokens * (self.trunk_parameters + self.vocab * self.hidden) * (2 + 6 * self.epochs)

    @number("s")
    def actor_seconds(self) -> float:
        """A lower bound, at the nominal rate."""
        return self.step_flops / (self.gpus * self.flops)

    @number("bytes")
    def row_bytes(self) -> float:
        """The logits of one token on one GPU."""
        return self.columns * self.dtype_bytes

    @number()
    def vanilla_old_passes(self) -> float:
        """FSDP: flash-attention's cross-entropy and the compiled entropy; fused, torch's operations. Megatron: copy 2,
        max 1, subtract 2, exp 2, sum 1, divide 2, product 2, then 8 for the cross-entropy.
        """
        if self.fused and self.megatron:
            return 0
        if self.fused:
            return (26 if self.half else 13) * self.copy_pass
        if self.megatron:
            return 20 * self.copy_pass
        return self.old_pass

    @number()
    def vanilla_passes(self) -> float:
        """FSDP: flash-attention reads, then reads and writes. Megatron: max 1, subtract 2, exp 2, sum 1, divide 2,
        multiply 2; fused, it writes the gradient once and reads it twice.
        """
        if self.fused and self.megatron:
            return 3 * self.copy_pass
        if self.fused:
            return (66 if self.half else 34) * self.copy_pass
        if self.megatron:
            return (10 + (26 if self.entropy else 0)) * self.copy_pass
        return 3 * self.flash_pass + (8 * self.copy_pass if self.entropy else 0)

    @number()
    def troll_old_passes(self) -> float:
        """One read; a fused head first writes the block; the torch forms copy, group, subtract, exp and sum."""
        if self.triton:
            return self.read_pass + (self.copy_pass if self.fused else 0)
        return (18 if self.fused else 17 if self.half else 8) * self.torch_pass

    @number()
    def troll_passes(self) -> float:
        """Read, then read and write; a fused head writes the block twice more and reads it twice for its gradients."""
        if self.triton:
            return self.read_pass + 2 * self.write_pass + (4 * self.copy_pass if self.fused else 0)
        return (40 if self.fused else 39 if self.half else 18) * self.torch_pass

    @number("s")
    def vanilla_reading(self) -> float:
        """Passes over the logits of all tokens, at the memory bandwidth."""
        return (
            self.gpu_rows
            * self.row_bytes
            * (self.vanilla_old_passes + self.epochs * self.vanilla_passes)
            / self.memory_bandwidth
        )

    @number("s")
    def troll_reading(self) -> float:
        """Passes over the logits of response tokens; the gradient of the others is filled with zeros."""
        return (
            self.gpu_responses * self.row_bytes * (self.troll_old_passes + self.epochs * self.troll_passes)
            + (
                0
                if self.fused
                else self.epochs
                * (self.gpu_rows - self.gpu_responses)
                * self.row_bytes
                * (self.write_pass if self.triton else self.copy_pass)
            )
        ) / self.memory_bandwidth

    @number("s")
    def troll_searching(self) -> float:
        """In the old pass, and in the update if it searches. The passes above include the torch forms' search."""
        if self.triton:
            return self.gpu_responses * self.search_seconds * (1 + (self.epochs if self.searches else 0))
        return 0

    @number("bytes/token", _by_form)
    def small_bytes(self) -> float:
        """Read and written by torch's operations on ids and log-probabilities in the update, besides the kernels."""
        if self.support == "anchored":
            if self.triton:
                return 3700 + 155 * self.width + 310 * self.kept_ids + (0 if self.tp == 1 else 160) * self.width
            return 3150 * self.outcomes
        if self.support == "union":
            if self.triton:
                return 3700 + 155 * self.width + 310 * self.kept_ids + (0 if self.tp == 1 else 330) * self.width
            return 5000 * self.outcomes
        _unknown(self.support)

    @number("bytes/token", _by_form)
    def old_small_bytes(self) -> float:
        """The same in the old pass."""
        if self.triton:
            return 1550 + 25 * self.width + 400 * self.kept_ids + (0 if self.tp == 1 else 190) * self.width
        return 650 + 390 * self.width + 275 * self.kept_ids

    @number("s")
    def troll_small(self) -> float:
        """Support and projection of response tokens, as if all were projected."""
        return self.gpu_responses * (
            self.old_small_bytes + self.epochs * self.small_bytes
        ) * self.copy_pass / self.memory_bandwidth + (
            self.gpu_responses * self.epochs * self.terms_seconds if self.triton else 0
        )

    @number("", _by_form)
    def update_launches(self) -> float:
        """Operations per micro-batch of the update, forward and backward: unpacking, support, projection, metrics."""
        if self.support == "anchored":
            if self.triton:
                return 185 if self.tp == 1 else 230
            return 636
        if self.support == "union":
            if self.triton:
                return 185 if self.tp == 1 else 250
            return 995
        _unknown(self.support)

    @number("", _by_form)
    def old_launches(self) -> float:
        """Operations per micro-batch of the old pass: candidates and packing."""
        if self.triton:
            return 93 if self.tp == 1 else 147
        return 132

    @number("s")
    def troll_launches(self) -> float:
        """As if the GPU waited for each launch. Vanilla has few, which are left out."""
        return (self.cuts * self.update_launches + self.old_cuts * self.old_launches) * self.launch

    @number("bytes/s")
    def group_bandwidth(self) -> float:
        """Ranks that share a micro-batch communicate inside a node if they fit."""
        if self.tp * self.cp <= self.gpus_per_node:
            return self.link_bandwidth
        return self.network_bandwidth

    @number("s")
    def vanilla_collectives(self) -> float:
        """One latency per collective, plus the bytes at the link's rate; nothing overlaps."""
        return self.vanilla_all_calls * self.latency + self.vanilla_received / self.group_bandwidth

    @number("s")
    def troll_collectives(self) -> float:
        """Counted the same way."""
        return self.troll_all_calls * self.latency + self.troll_received / self.group_bandwidth

    @number("s")
    def vanilla_carrying(self) -> float:
        """At the network's rate; the queue is slower."""
        return self.verl_moved / self.network_bandwidth

    @number("s")
    def troll_carrying(self) -> float:
        """At the same rate."""
        return (self.verl_moved + self.troll_moved) / self.network_bandwidth

    @number("s")
    def vanilla_seconds(self) -> float:
        """Vanilla's part that TROLL replaces."""
        return self.vanilla_reading + self.vanilla_collectives + self.vanilla_carrying

    @number("s")
    def troll_seconds(self) -> float:
        """TROLL's replacement."""
        return (
            self.troll_reading
            + self.troll_searching
            + self.troll_small
            + self.troll_launches
            + self.troll_collectives
            + self.troll_carrying
        )

    @number()
    def share(self) -> float:
        """TROLL's extra time, relative to the lower bound of the actor's time with vanilla."""
        return (self.troll_seconds - self.vanilla_seconds) / (self.actor_seconds + self.vanilla_seconds)
