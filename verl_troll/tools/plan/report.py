"""The plan as tables, as explained formulas, and as JSON."""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass
from typing import Any

from verl_troll.tools.plan.formulas import Plan
from verl_troll.tools.plan.setting import Setting

_WIDTH = 118
_LABEL = 70


@dataclass(frozen=True)
class Line:
    """One row of a table: vanilla's cost and TROLL's."""

    label: str
    vanilla: float
    troll: float
    total: bool = False

    @property
    def difference(self) -> float:
        """TROLL's minus vanilla's."""
        return self.troll - self.vanilla


@dataclass(frozen=True)
class Table:
    """Rows in one unit."""

    title: str
    unit: str
    lines: tuple[Line, ...]


def tables(plan: Plan) -> tuple[Table, ...]:
    """The tables to print, without rows that do not apply to the run."""
    small = Line("ids, log-probabilities and projection of each token, at their peak", 0, plan.small)
    if plan.fused:
        memory = [
            Line("blocks of logits, gradients of the head and of its input", plan.vanilla_update, plan.fused_gradients),
            small,
            Line("peak", plan.vanilla_peak, plan.troll_peak, total=True),
        ]
    else:
        memory = [
            Line("logits, one per token of the micro-batch and column", plan.logits, plan.logits),
            Line("gradient of the logits, where not written over them", plan.vanilla_update, plan.troll_gradient),
            Line("working rows, or the largest logits of groups of columns", 0, plan.update_block),
            small,
            Line("peak (the items above do not all fall together)", plan.vanilla_peak, plan.troll_peak, total=True),
        ]
        if not plan.megatron:
            memory.append(
                Line("peak, vanilla without flash-attention", plan.vanilla_peak_torch, plan.troll_peak, total=True)
            )
    both = plan.tp > 1 or plan.cp > 1
    collectives = (
        Line("update, vocabulary: message per token", plan.vanilla_sent, plan.troll_sent),
        Line("old-log-prob pass, vocabulary: message per token", plan.vanilla_old_sent, plan.troll_old_sent),
        Line("update, shared tokens: received per token", plan.vanilla_shared, plan.troll_shared),
        Line("old-log-prob pass, shared tokens: received per token", plan.vanilla_old_shared, plan.troll_old_shared),
        Line("received per GPU and step", plan.vanilla_received, plan.troll_received, total=True),
    )
    calls = (
        Line("vocabulary, per micro-batch of the update", plan.vanilla_calls, plan.troll_calls),
        Line("vocabulary, per micro-batch of the old-log-prob pass", plan.vanilla_old_calls, plan.troll_old_calls),
        Line("per GPU and step", plan.vanilla_all_calls, plan.troll_all_calls, total=True),
    )
    time = (
        Line("actor: matrix products of old pass and updates", plan.actor_seconds, plan.actor_seconds),
        Line("passes over the logits", plan.vanilla_reading, plan.troll_reading),
        Line("search for the most probable ids", 0, plan.troll_searching),
        Line("support and projection of each token", 0, plan.troll_small),
        Line("launches of small operations", 0, plan.troll_launches),
        *([Line("collectives", plan.vanilla_collectives, plan.troll_collectives)] if both else []),
        Line("batch through the network", plan.vanilla_carrying, plan.troll_carrying),
        Line(
            "together",
            plan.actor_seconds + plan.vanilla_seconds,
            plan.actor_seconds + plan.troll_seconds,
            total=True,
        ),
    )
    return (
        Table("Memory of the update, per GPU that holds the head", "bytes", tuple(memory)),
        Table(
            "Memory of the old-log-prob pass, per GPU that holds the head",
            "bytes",
            (Line("peak, logits included", plan.logits + plan.vanilla_old, plan.logits + plan.troll_old, total=True),),
        ),
        Table(
            "Carried with the batch through TransferQueue",
            "bytes",
            (
                Line("per response token", plan.verl_response, plan.verl_response + plan.troll_response),
                Line("stored per step, whole job", plan.verl_step, plan.verl_step + plan.troll_step),
                Line("written and read per GPU and step", plan.verl_moved, plan.verl_moved + plan.troll_moved),
            ),
        ),
        *([Table("Collectives: bytes", "bytes", collectives)] if both else []),
        *([Table("Collectives: number", "", calls)] if both else []),
        Table("Time per step, at the given rates, on a GPU that holds the head", "s", time),
    )


def text(plan: Plan) -> str:
    """The tables as text."""
    lines = [*_heading(plan), ""]
    for table in tables(plan):
        lines.append(f"{table.title:<{_LABEL}}{'vanilla':>15}{'TROLL':>15}{'difference':>18}")
        for line in table.lines:
            label = f"{'=' if line.total else ' '} {line.label}"
            lines.append(
                f"{label:<{_LABEL}}{amount(line.vanilla, table.unit):>15}{amount(line.troll, table.unit):>15}"
                f"{_signed(line.difference, table.unit):>18}"
            )
        lines.append("")
    difference = plan.troll_seconds - plan.vanilla_seconds
    verdict = (
        f"Predicted: {amount(abs(difference), 's')} {'more' if difference > 0 else 'less'} a step than with clipping, "
        f"{abs(plan.share):.1%} of the least that the actor can take with it. Attention, recomputation and "
        "rollout, alike for both, are left out: the share of a whole step is smaller."
    )
    notes = (
        f"{_baseline(plan.setting)} Times are the least certain. TROLL's kernels and flash-attention were timed on one "
        "NVIDIA H200; for other cards their passes are scaled by the memory's rate, search and projection are not. All "
        "other passes are counted by hand and taken at a copy's rate on that card; the remaining rates are nominal "
        "unless you give measured ones. --explain prints every formula, its reason, and the test that measures it."
    )
    lines += textwrap.wrap(verdict, _WIDTH)
    lines += textwrap.wrap(notes, _WIDTH)
    return "\n".join(lines)


def _baseline(setting: Setting) -> str:
    if setting.fused:
        return "Vanilla runs verl's fused kernels too."
    if setting.backend == "megatron":
        return "Vanilla runs verl's and Megatron's own operations; --fused compares verl's fused kernels."
    return "Vanilla is taken at its best: flash-attention writes over the logits, the entropy is compiled."


def _heading(plan: Plan) -> list[str]:
    setting, model, hardware = plan.setting, plan.setting.model, plan.setting.hardware
    active = "" if model.active_parameters == model.parameters else f" ({_count(model.active_parameters)} active)"
    grid = " x ".join(f"{name.upper()} {getattr(setting, name)}" for name in ("tp", "pp", "cp", "dp"))
    return [
        f"Model     {_count(model.parameters)} parameters{active}, vocabulary {model.vocab:,}, hidden size "
        f"{model.hidden:,}",
        f"Layout    {plan.gpus:,.0f} GPUs: {grid}, {setting.backend}",
        f"Step      {setting.tokens:,} response and {setting.prompt_tokens:,} prompt tokens, {setting.epochs} epoch(s) "
        f"of {setting.mini_batches} mini-batch(es)",
        f"On a GPU  micro-batches of {plan.rows:,.0f} tokens x {plan.columns:,.0f} columns, "
        f"{setting.dtype_bytes} bytes per logit; {plan.old_cuts:,.0f} in the old pass, "
        f"{plan.cuts:,.0f} in the updates",
        f"TROLL     support {setting.support}, K {setting.k}, {setting.kept_ids:g} ids kept per token, {setting.form} "
        f"kernels{', fused head' if setting.fused else ''}{', entropy' if setting.entropy else ''}",
        f"Rates     {hardware.flops / 1e12:g} Tflop/s, memory {hardware.memory_bandwidth / 1e9:g} GB/s, link "
        f"{hardware.link_bandwidth / 1e9:g} GB/s, network {hardware.network_bandwidth / 1e9:g} GB/s, "
        f"{hardware.latency * 1e6:g} us per collective, {hardware.launch * 1e6:g} us per launch",
    ]


def _count(value: float) -> str:
    return f"{value / 1e9:.3g} billion" if value >= 1e9 else f"{value / 1e6:.3g} million"


def amount(value: float, unit: str) -> str:
    """Human-readable: bytes in binary units, seconds in s, ms or us."""
    size = abs(value)
    if size == 0:
        return "0"
    if unit == "bytes":
        for name, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if size >= 0.995 * factor:
                return f"{value / factor:,.2f} {name}"
        return f"{value:,.0f} B"
    if unit == "s":
        if size >= 0.9995:
            return f"{value:,.2f} s"
        return f"{value * 1e3:,.2f} ms" if size >= 1e-5 else f"{value * 1e6:,.2f} us"
    return f"{value:,.0f}"


def _signed(value: float, unit: str) -> str:
    return f"{'+' if value > 0 else ''}{amount(value, unit)}"


def explanation(plan: Plan) -> str:
    """Every formula with its value, its reason and its test."""
    inputs = ", ".join(f"{name} = {value:g}" for name, value in plan.inputs.items())
    lines = ["Inputs", *_indented(inputs, 2, 2)]
    for title, formulas in plan.explanations.items():
        lines += ["", title]
        for name, found in formulas.items():
            value = f"{found.value:,.6g}" if abs(found.value) < 1e6 else f"{found.value:,.0f}"
            unit = f" {found.unit}" if found.unit else ""
            measured = f" [measured: {found.measured}]" if found.measured else ""
            lines += _indented(f"{name} = {found.expression}", 2, 6)
            lines += _indented(f"= {value}{unit}: {found.reason}{measured}", 6, 6)
    return "\n".join(lines)


def _indented(words: str, first: int, others: int) -> list[str]:
    return textwrap.wrap(words, _WIDTH, initial_indent=" " * first, subsequent_indent=" " * others)


def as_json(plan: Plan) -> dict[str, Any]:
    """The setting, the value of every formula, and the tables, in bytes and seconds."""
    return {
        "setting": dataclasses.asdict(plan.setting),
        "values": plan.numbers,
        "tables": [
            {
                "title": table.title,
                "unit": table.unit or "count",
                "lines": [
                    {"label": line.label, "vanilla": line.vanilla, "troll": line.troll, "difference": line.difference}
                    for line in table.lines
                ],
            }
            for table in tables(plan)
        ],
    }
