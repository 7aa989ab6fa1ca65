"""Every formula of the plan, as text: what ``--explain`` prints is what is computed.

A formula is a Python expression over the run's numbers (:func:`inputs`) and earlier formulas, or one for each case, of
which the first that applies counts. It has a unit, a reason, and where it can be measured on a small machine the test
in ``tests/tools/test_plan.py`` that does; formulas without one are counted by hand from the code that they speak of.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from verl_troll.core import lm_head
from verl_troll.core.kernels.logits_torch import block_elements
from verl_troll.tools.plan.setting import Setting

_MEMORY = "test_memory_of_the_update"
_SMALL = "test_small_tensors"
_KERNELS = "test_kernels_in_the_interpreter"
_VANILLA = "test_vanillas_own_memory"
_FUSED = "test_memory_of_fused_heads"
_CARRIED = "test_carried_bytes"
_SENT = "test_collectives_on_two_ranks"
_VANILLA_MEGATRON = "test_vanillas_own_memory_on_megatron"
_VANILLA_SENT = "test_vanillas_own_collectives"


@dataclass(frozen=True)
class Formula:
    """One number of the plan.

    Attributes:
        name: how later formulas call it.
        expression: Python; or one expression for each case, by the condition under which it applies.
        unit: of the value; empty for a count.
        reason: why it is so, in one line.
        test: the test that measures it; or one for each case, empty where none does.
    """

    name: str
    expression: str | Mapping[str, str]
    unit: str
    reason: str
    test: str | Mapping[str, str] = ""


@dataclass(frozen=True)
class Value:
    """A formula's value in one run, the expression that gave it, and the test that measures that."""

    value: float
    expression: str
    test: str


SECTIONS: dict[str, tuple[Formula, ...]] = {
    "Sizes": (
        Formula("gpus", "tp * pp * cp * dp", "", "every GPU has one place in the grid of ranks"),
        Formula("step_tokens", "tokens + prompt_tokens", "tokens", "the actor reads prompts and responses"),
        Formula("mini_batch", "ceil(step_tokens / (mini_batches * dp))", "tokens", "a data-parallel rank's share"),
        Formula(
            "rows",
            "ceil(min(micro_batch_tokens, mini_batch) / cp)",
            "rows",
            "tokens of a micro-batch on one GPU; memory is reckoned as if all were response tokens",
        ),
        Formula("columns", "ceil(vocab / tp)", "columns", "Megatron splits the vocabulary evenly; FSDP does not"),
        Formula("old_cuts", "ceil(step_tokens / (dp * micro_batch_tokens))", "", "micro-batches of the old pass"),
        Formula(
            "cuts",
            "epochs * mini_batches * ceil(mini_batch / micro_batch_tokens)",
            "",
            "micro-batches of all updates of a step",
        ),
        Formula("gpu_rows", "step_tokens / (dp * cp)", "rows", "tokens that one GPU reads in a pass over the step"),
        Formula("gpu_responses", "tokens / (dp * cp)", "rows", "response tokens among them; TROLL reads only these"),
        Formula("width", "min(k + 1, vocab)", "ids", "most ids of a token: K selected ones and the sampled one"),
        Formula(
            "outcomes",
            {"anchored": "width + 1", "union": "2 * width"},
            "",
            "anchored adds one rest outcome; union may add as many ids of the new policy",
        ),
        Formula(
            "group",
            {"k <= 64": "64", "k <= 256": "32", "True": "16"},
            "columns",
            "the Triton kernels search the groups of columns whose largest logits are largest",
            {"triton": _KERNELS, "True": ""},
        ),
    ),
    "Memory of the update, bytes per GPU": (
        Formula(
            "logits",
            {"fused": "0", "True": "rows * columns * dtype_bytes"},
            "bytes",
            "one per token and column; a fused head never holds them all",
        ),
        Formula("head_gradient", "columns * hidden * dtype_bytes", "bytes", "the gradient of the head's weight"),
        Formula(
            "vanilla_update",
            {
                "fused and megatron": "rows * min(columns, 9504) * dtype_bytes + head_gradient "
                "+ 2 * rows * hidden * dtype_bytes",
                "fused": "5 * min(rows, 512) * columns * 4 + 2 * head_gradient + rows * hidden * dtype_bytes",
                "megatron and entropy": "3 * logits",
                "entropy": "2 * logits",
                "True": "0",
            },
            "bytes",
            "the gradient goes over the logits (flash-attention, Megatron), which the entropy needs whole; fused: "
            "float32 blocks of 512 tokens (FSDP), or a gradient of 9,504 columns (Megatron)",
            {"megatron and not fused": _VANILLA_MEGATRON, "fused and not megatron": _FUSED, "True": ""},
        ),
        Formula(
            "vanilla_update_torch",
            {
                "fused or megatron": "vanilla_update",
                "half and entropy": "7 * logits",
                "half": "2 * logits",
                "entropy": "6 * logits",
                "True": "3 * logits",
            },
            "bytes",
            "without flash-attention torch makes the gradient row by row and then stacks the rows",
            {"fused or megatron": "", "True": _VANILLA},
        ),
        Formula(
            "troll_gradient",
            {"fused or reuse_logits": "0", "True": "logits"},
            "bytes",
            "reuse_logits writes the gradient over the logits, entropy or not",
            _MEMORY,
        ),
        Formula(
            "read_block",
            {
                "fused": "min(rows, read_tokens) * (min(columns, read_columns) + hidden) * dtype_bytes + "
                "(min(rows, read_tokens) * ceil(min(columns, read_columns) / group) * dtype_bytes if triton else "
                "4 * min(block_elements, min(rows, read_tokens) * min(columns, read_columns)))",
                "triton": "rows * ceil(columns / group) * dtype_bytes",
                "half": "min(rows, floor(block_elements / columns)) * columns * 6",
                "True": "min(rows, floor(block_elements / columns)) * columns * 12",
            },
            "bytes",
            "the torch forms copy some rows in float32, the Triton kernels write each group's largest logit; a fused "
            "head computes a block of logits",
            {"triton": _KERNELS, "fused": _FUSED, "True": _MEMORY},
        ),
        Formula(
            "update_block",
            {"triton and anchored and not fused": "0", "True": "read_block"},
            "bytes",
            "anchored searches nothing in the update: its ids are the old ones",
            {"triton": _KERNELS, "fused": _FUSED, "True": _MEMORY},
        ),
        Formula(
            "write_columns",
            "min(columns, floor(write_elements / min(rows, write_tokens)))",
            "columns",
            "of a block whose gradient a fused head makes",
        ),
        Formula(
            "write_block",
            {
                "fused": "min(rows, write_tokens) * write_columns * dtype_bytes "
                "+ (0 if triton else 4 * min(block_elements, min(rows, write_tokens) * write_columns))",
                "triton": "0",
                "True": "read_block",
            },
            "bytes",
            "the Triton kernels write in place; a fused head has a block of logits",
            {"triton": _KERNELS, "fused": _FUSED, "True": _MEMORY},
        ),
        Formula(
            "small_reading",
            "rows * (80 + 12 * width * (1 if cp == 1 else 2) + (12 if union else 4) * width * (2 if fused else 1))",
            "bytes",
            "the old ids, unpacked and then this GPU's picked out, and what was read; a fused head joins its blocks",
            {"triton": _KERNELS, "True": _SMALL},
        ),
        Formula(
            "small",
            {
                "triton and anchored": "rows * (80 + (26 if tp * cp == 1 else 36) * width + 12 * kept_ids)",
                "triton": "rows * (140 + (77 if tp > 1 else 56 if cp == 1 else 68) * width)",
                "True": "rows * outcomes * 130",
            },
            "bytes",
            "ids, log-probabilities, gradients and the torch form's float64, per token and outcome, at their peak",
            {"triton": _KERNELS, "True": _SMALL},
        ),
        Formula(
            "small_kept",
            {
                "triton and anchored": "rows * (100 + (20 if tp == 1 else 37) * width)",
                "triton": "rows * (100 + (40 if tp == 1 else 78) * width)",
                "True": "rows * outcomes * 43",
            },
            "bytes",
            "those among them that wait for the backward pass; with the kernels also those from which it is written",
            {"triton": _KERNELS, "True": _SMALL},
        ),
        Formula(
            "fused_gradients",
            {
                "fused": "write_block + head_gradient + rows * hidden * (4 + 2 * dtype_bytes) "
                "+ (0 if half and rows <= write_tokens else write_columns * hidden * (6 if half else 4))",
                "True": "0",
            },
            "bytes",
            "blocks of logits, the gradients of the weight and of the hidden states, and of the weight a part in "
            "float32 where it is summed",
            {"fused and triton": _KERNELS, "fused": _FUSED, "True": ""},
        ),
        Formula(
            "troll_update",
            {
                "fused": "max(update_block + small_reading, small, small_kept + fused_gradients)",
                "triton": "max(update_block + small_reading, small, small_kept + troll_gradient)",
                "True": "max(update_block, small, small_kept + write_block + troll_gradient)",
            },
            "bytes",
            "reading, projection and backward pass have their peaks one after the other",
            {"triton": _KERNELS, "fused": _FUSED, "True": _MEMORY},
        ),
        Formula("vanilla_peak", "logits + vanilla_update", "bytes", "logits and all that comes beside them"),
        Formula("vanilla_peak_torch", "logits + vanilla_update_torch", "bytes", "the same without flash-attention"),
        Formula("troll_peak", "logits + troll_update", "bytes", "the same with TROLL"),
    ),
    "Memory of the old-log-prob pass, bytes per GPU": (
        Formula(
            "vanilla_old",
            {
                "fused and megatron": "rows * ceil(columns / 1024) * 16",
                "fused": "3 * min(rows, 512) * columns * 4",
                "megatron": "3 * logits",
                "True": "0",
            },
            "bytes",
            "verl asks for the entropy here: Megatron copies the logits for it; FSDP compiles it, taken as free",
            {"megatron and not fused": _VANILLA_MEGATRON, "fused and not megatron": _FUSED, "True": ""},
        ),
        Formula(
            "troll_old",
            {
                "triton": "max(read_block + rows * (100 + 12 * width * (2 if fused else 1)), "
                "rows * (80 + 24 * width if tp == 1 else 90 + 60 * width))",
                "True": "read_block + rows * width * 40",
            },
            "bytes",
            "the block, and the candidates of every token",
            {"triton": _KERNELS, "True": _SMALL},
        ),
    ),
    "Carried with the batch": (
        Formula(
            "verl_response",
            "5 * 8 + 7 * 4",
            "bytes/token",
            "int64: responses, response_mask, loss_mask, input_ids, position_ids; float32: rollout_log_probs, "
            "rm_scores, log_probs, entropy, old_log_probs, advantages, returns",
        ),
        Formula(
            "verl_prompt",
            "3 * 8 + 4",
            "bytes/token",
            "int64: prompts, input_ids, position_ids; float32: log_probs",
        ),
        Formula("verl_step", "tokens * verl_response + prompt_tokens * verl_prompt", "bytes", "stored in the queue"),
        Formula(
            "troll_response",
            "2 + 6 * kept_ids",
            "bytes/token",
            "int16 count; 48 bits for each kept id and its log-probability",
            _CARRIED,
        ),
        Formula("troll_step", "tokens * troll_response", "bytes", "stored in the queue", _CARRIED),
        Formula(
            "verl_moved",
            "(tokens * (verl_response + 48 + 8) + prompt_tokens * (verl_prompt + 24 + 8)) / dp",
            "bytes",
            "per GPU: the old pass reads what the rollout wrote and writes log_probs and entropy; the update reads all",
        ),
        Formula(
            "troll_moved",
            "2 * troll_step / dp",
            "bytes",
            "per GPU: written by the old pass, read by the update once, whatever the epochs",
        ),
    ),
    "Collectives between tensor- and context-parallel ranks": (
        Formula("ring", "2 * (tp - 1) / tp", "", "a rank sends and receives this many times a message"),
        Formula(
            "vanilla_sent",
            {
                "tp == 1": "0",
                "fused": "4 * ceil(columns / 1024) + 12",
                "True": "12 * (2 if entropy else 1)",
            },
            "bytes/token",
            "largest logit, target's logit and normaliser, each all-reduced; so the entropy's three",
            {"fused": "", "True": _VANILLA_SENT},
        ),
        Formula(
            "vanilla_calls",
            {"tp == 1": "0", "fused": "3", "entropy": "6", "True": "3"},
            "",
            "all-reduces per micro-batch of the update",
            {"fused": "", "True": _VANILLA_SENT},
        ),
        Formula(
            "vanilla_old_sent",
            {"tp == 1": "0", "fused": "4 * ceil(columns / 1024) + 12", "True": "24"},
            "bytes/token",
            "as above with the entropy",
        ),
        Formula("vanilla_old_calls", {"tp == 1": "0", "fused": "3", "True": "6"}, "", "so many all-reduces"),
        Formula(
            "troll_old_sent",
            {"tp == 1": "0", "True": "8 * min(k, vocab) + 16"},
            "bytes/token",
            "K logits and ids, the sampled logit, the normaliser in two parts, the entropy",
            _SENT,
        ),
        Formula("troll_old_calls", {"tp == 1": "0", "True": "2"}, "", "one all-to-all to merge, one all-gather", _SENT),
        Formula(
            "troll_sent",
            {
                "tp == 1": "0",
                "anchored": "4 * (width + (3 if entropy or triton else 2) * tp)",
                "union": "8 * min(k, vocab) + (16 if entropy or triton else 12)",
            },
            "bytes/token",
            "anchored: the logits at the old ids, and a slot per rank for its normaliser; union: as the old pass. The "
            "kernels read the entropy always",
            {"triton": _KERNELS, "True": _SENT},
        ),
        Formula(
            "troll_calls",
            {"tp == 1": "0", "anchored": "1", "union": "2"},
            "",
            "one all-reduce, or an all-to-all and an all-gather; none in the backward pass",
            _SENT,
        ),
        Formula(
            "vanilla_shared",
            {"cp == 1": "0", "True": "4 * (cp - 1) * (2 if entropy else 1)"},
            "bytes/token",
            "log-probabilities (and entropy) gathered from the ranks that share the tokens",
        ),
        Formula(
            "troll_shared",
            {"cp == 1": "0", "True": "4 * (cp - 1) * (5 if entropy else 4)"},
            "bytes/token",
            "three numbers more per token: log-ratio, regression KL, projected or not",
        ),
        Formula(
            "vanilla_old_shared",
            {"cp == 1": "0", "True": "8 * (cp - 1)"},
            "bytes/token",
            "log-probabilities and entropy",
        ),
        Formula(
            "troll_old_shared",
            {"cp == 1": "0", "True": "8 * (cp - 1) + 2 * (cp - 1) * 8 * width"},
            "bytes/token",
            "and the kept ids with their log-probabilities, all-reduced",
        ),
        Formula(
            "vanilla_received",
            "epochs * gpu_rows * (vanilla_sent * ring + vanilla_shared) "
            "+ gpu_rows * (vanilla_old_sent * ring + vanilla_old_shared)",
            "bytes",
            "per GPU and step; vanilla sends for prompts too",
        ),
        Formula(
            "troll_received",
            "epochs * (gpu_responses * troll_sent * ring + gpu_rows * troll_shared) "
            "+ gpu_responses * troll_old_sent * ring + gpu_rows * troll_old_shared",
            "bytes",
            "per GPU and step",
        ),
        Formula(
            "vanilla_all_calls",
            "cuts * (vanilla_calls + (0 if cp == 1 else 2 if entropy else 1)) "
            "+ old_cuts * (vanilla_old_calls + (0 if cp == 1 else 2))",
            "",
            "collectives per GPU and step",
        ),
        Formula(
            "troll_all_calls",
            "cuts * (troll_calls + (0 if cp == 1 else 7 if entropy else 6)) "
            "+ old_cuts * (troll_old_calls + (0 if cp == 1 else 3))",
            "",
            "so; with context parallelism two small ones for the metrics among them",
        ),
    ),
    "Kernels, timed on one NVIDIA H200: 8,192 tokens x 151,936 bfloat16 logits, K 64": (
        Formula("timed_bytes", "8192 * 151936 * 2", "bytes", "the logits that were read"),
        Formula("timed_bandwidth", "4.8e12", "bytes/s", "its data sheet's; passes are scaled to other cards by theirs"),
        Formula(
            "copy_pass",
            "1.17e-3 * timed_bandwidth / (2 * timed_bytes)",
            "",
            "a copy reads and writes them in 1.17 ms, a pass so many times what the data sheet's rate would take. Used "
            "for all that was not timed: torch's, verl's and Megatron's operations, and products on logits",
        ),
        Formula(
            "torch_pass",
            "3.5 * copy_pass",
            "",
            "TROLL's torch forms took 111 to 122 ms for old pass and update, where passes at a copy's rate and small "
            "operations come to 40",
        ),
        Formula(
            "flash_pass", "2.12e-3 * timed_bandwidth / (3 * timed_bytes)", "", "flash-attention, 2.12 ms for three"
        ),
        Formula(
            "old_pass",
            "6.28e-3 * timed_bandwidth / timed_bytes",
            "",
            "flash-attention's cross-entropy and torch's compiled entropy, 6.28 ms",
        ),
        Formula("read_pass", "0.58e-3 * timed_bandwidth / timed_bytes", "", "the reading kernel, 0.58 ms"),
        Formula("write_pass", "1.26e-3 * timed_bandwidth / (2 * timed_bytes)", "", "the writing kernel, 1.26 ms"),
        Formula(
            "search_seconds",
            "0.38e-3 / 8192 * (ceil(columns / group) + k * group) / (ceil(151936 / 64) + 64 * 64)",
            "s",
            "per token, of 0.38 ms; in proportion to the groups and to the columns of those that are chosen. Not bound "
            "by the memory: taken as it is on other cards",
        ),
        Formula(
            "terms_seconds",
            "(0.37e-3 + 0.007e-3 + 0.006e-3) / 8192 * outcomes / 130",
            "s",
            "per token: the projection (0.37 ms; 0.04 with every token inside the region), the choice of ids and the "
            "gradient's corrections, in proportion to the outcomes. Not bound by the memory either",
        ),
    ),
    "Time, seconds per step on a GPU that holds the head": (
        Formula(
            "trunk_parameters",
            "active_parameters - vocab * hidden * (1 if tied else 2)",
            "",
            "what one token uses besides embedding and head",
        ),
        Formula(
            "step_flops",
            "step_tokens * (trunk_parameters + vocab * hidden) * (2 + 6 * epochs)",
            "flop",
            "2 per parameter and token in the old pass, 6 in an update; no attention, no recomputation, no rollout",
        ),
        Formula("actor_seconds", "step_flops / (gpus * flops)", "s", "at the nominal rate, the least it can take"),
        Formula("row_bytes", "columns * dtype_bytes", "bytes", "the logits of one token on one GPU"),
        Formula(
            "vanilla_old_passes",
            {
                "fused and megatron": "0",
                "fused": "(26 if half else 13) * copy_pass",
                "megatron": "20 * copy_pass",
                "True": "old_pass",
            },
            "",
            "FSDP: flash-attention's cross-entropy and the compiled entropy. Megatron: copy 2, largest 1, subtract 2, "
            "exp 2, sum 1, divide 2, product 2; then 8 of the cross-entropy. Fused, FSDP: torch's operations",
        ),
        Formula(
            "vanilla_passes",
            {
                "fused and megatron": "3 * copy_pass",
                "fused": "(66 if half else 34) * copy_pass",
                "megatron": "(10 + (26 if entropy else 0)) * copy_pass",
                "True": "3 * flash_pass + (8 * copy_pass if entropy else 0)",
            },
            "",
            "FSDP: flash-attention reads, reads and writes. Megatron: largest 1, subtract 2, exp 2, sum 1, divide 2, "
            "multiply 2. Fused, Megatron: its gradient written once and read twice",
        ),
        Formula(
            "troll_old_passes",
            {
                "triton": "read_pass + (copy_pass if fused else 0)",
                "True": "(18 if fused else 17 if half else 8) * torch_pass",
            },
            "",
            "one reading; a fused head first writes the block; the torch forms copy, group, subtract, exp and sum",
        ),
        Formula(
            "troll_passes",
            {
                "triton": "read_pass + 2 * write_pass + (4 * copy_pass if fused else 0)",
                "True": "(40 if fused else 39 if half else 18) * torch_pass",
            },
            "",
            "read; read and write; a fused head writes the block twice more and reads it twice for its gradients",
        ),
        Formula(
            "vanilla_reading",
            "gpu_rows * row_bytes * (vanilla_old_passes + epochs * vanilla_passes) / memory_bandwidth",
            "s",
            "passes over the logits of all tokens, at the memory's rate",
        ),
        Formula(
            "troll_reading",
            "(gpu_responses * row_bytes * (troll_old_passes + epochs * troll_passes) "
            "+ (0 if fused else epochs * (gpu_rows - gpu_responses) * row_bytes * "
            "(write_pass if triton else copy_pass))) / memory_bandwidth",
            "s",
            "passes over the logits of response tokens; the gradient of the others is filled with 0",
        ),
        Formula(
            "troll_searching",
            {"triton": "gpu_responses * search_seconds * (1 + (epochs if union else 0))", "True": "0"},
            "s",
            "in the old pass, and in the update under union; the torch forms search in the passes above",
        ),
        Formula(
            "small_bytes",
            {
                "triton": "1600 + 95 * width + 110 * kept_ids + (0 if tp == 1 else 160 if anchored else 330) * width",
                "anchored": "2900 * outcomes",
                "union": "4900 * outcomes",
            },
            "bytes/token",
            "what torch's operations on ids and log-probabilities read and write in the update, beside the kernels",
            {"triton": _KERNELS, "True": _SMALL},
        ),
        Formula(
            "old_small_bytes",
            {
                "triton": "900 + 25 * width + 130 * kept_ids + (0 if tp == 1 else 190) * width",
                "True": "390 * width",
            },
            "bytes/token",
            "and in the old pass",
            {"triton": _KERNELS, "True": _SMALL},
        ),
        Formula(
            "troll_small",
            "gpu_responses * (old_small_bytes + epochs * small_bytes) * copy_pass / memory_bandwidth "
            "+ (gpu_responses * epochs * terms_seconds if triton else 0)",
            "s",
            "support and projection of response tokens, as if all were projected",
        ),
        Formula(
            "update_launches",
            {
                "triton and anchored": "125 if tp == 1 else 170",
                "triton": "125 if tp == 1 else 190",
                "anchored": "560",
                "union": "900",
            },
            "",
            "operations of unpacking, support, projection and metrics per micro-batch, both ways; more where ranks "
            "merge what they found",
            {"triton": _KERNELS, "True": _SMALL},
        ),
        Formula(
            "sequence_launches",
            "21",
            "",
            "and of each sample: verl pads three tensors more",
            {"triton": _KERNELS, "True": _SMALL},
        ),
        Formula(
            "old_launches",
            {"triton": "56 if tp == 1 else 110", "True": "95"},
            "",
            "operations of the old pass per micro-batch: candidates and packing",
            {"triton": _KERNELS, "True": _SMALL},
        ),
        Formula(
            "troll_launches",
            "(cuts * update_launches + epochs * sequences / dp * sequence_launches + old_cuts * old_launches) * launch",
            "s",
            "had the GPU to wait for each; vanilla's few are left out",
        ),
        Formula(
            "group_bandwidth",
            {"tp * cp <= gpus_per_node": "link_bandwidth", "True": "network_bandwidth"},
            "bytes/s",
            "ranks that share a micro-batch talk inside a node if they fit",
        ),
        Formula(
            "vanilla_collectives",
            "vanilla_all_calls * latency + vanilla_received / group_bandwidth",
            "s",
            "a latency for each and the bytes at the link's rate, nothing overlapped",
        ),
        Formula("troll_collectives", "troll_all_calls * latency + troll_received / group_bandwidth", "s", "so"),
        Formula("vanilla_carrying", "verl_moved / network_bandwidth", "s", "at the network's rate; a queue is slower"),
        Formula("troll_carrying", "(verl_moved + troll_moved) / network_bandwidth", "s", "so"),
        Formula(
            "vanilla_seconds",
            "vanilla_reading + vanilla_collectives + vanilla_carrying",
            "s",
            "what vanilla does where TROLL does something else",
        ),
        Formula(
            "troll_seconds",
            "troll_reading + troll_searching + troll_small + troll_launches + troll_collectives + troll_carrying",
            "s",
            "what TROLL does in its place",
        ),
        Formula(
            "share",
            "(troll_seconds - vanilla_seconds) / (actor_seconds + vanilla_seconds)",
            "",
            "of the actor's own time, which is a least one",
        ),
    ),
}

FORMULAS: tuple[Formula, ...] = tuple(formula for section in SECTIONS.values() for formula in section)

_FUNCTIONS = {"ceil": math.ceil, "floor": math.floor, "min": min, "max": max}


def inputs(setting: Setting, *, device: str = "cuda", block: int | None = None) -> dict[str, float]:
    """Names and numbers that the formulas start from.

    Args:
        device: type of the device whose blocks are worked on at a time.
        block: elements of logits that the torch forms work on at a time; those of ``device`` by default.
    """
    numbers: dict[str, float] = {
        name: value
        for part in (setting, setting.model, setting.hardware)
        for name, value in ((field.name, getattr(part, field.name)) for field in dataclasses.fields(part))
        if isinstance(value, int | float)
    }
    read_tokens, read_columns = lm_head._READ_BLOCK.get(device, lm_head._DEVICE_READ_BLOCK)
    write_tokens, write_elements = lm_head._GRADIENT_BLOCK.get(device, lm_head._DEVICE_GRADIENT_BLOCK)
    return numbers | {
        "megatron": setting.backend == "megatron",
        "anchored": setting.support == "anchored",
        "union": setting.support == "union",
        "triton": setting.form == "triton",
        "half": setting.dtype_bytes == 2,
        "block_elements": block_elements(torch.device(device)) if block is None else block,
        "read_tokens": read_tokens,
        "read_columns": read_columns,
        "write_tokens": write_tokens,
        "write_elements": write_elements,
    }


def evaluate(numbers: Mapping[str, float]) -> dict[str, Value]:
    """All formulas, by name, from :func:`inputs`."""
    names: dict[str, object] = {**_FUNCTIONS, **numbers}
    values: dict[str, Value] = {}
    for formula in FORMULAS:
        expression = _case(formula.expression, names)
        result = _value(expression, names)
        values[formula.name] = Value(result, expression, _case(formula.test, names))
        names[formula.name] = result
    return values


def _case(cases: str | Mapping[str, str], names: Mapping[str, object]) -> str:
    """The first that applies."""
    if isinstance(cases, str):
        return cases
    return next(text for condition, text in cases.items() if _value(condition, names))


def _value(expression: str, names: Mapping[str, object]) -> float:
    # The expressions are this module's own.
    result: float = eval(expression, {"__builtins__": {}}, names)
    return result
