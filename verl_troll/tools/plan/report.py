"""The plan as tables, as formulas with their reasons, and as JSON."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from verl_troll.tools.plan.formulas import SECTIONS, Value, evaluate, inputs
from verl_troll.tools.plan.setting import Setting

_WIDTH = 118
_LABEL = 70


@dataclass(frozen=True)
class Line:
    """One item of a table: what vanilla takes and what TROLL takes, as names of formulas, or sums of such, or 0."""

    label: str
    vanilla: str
    troll: str
    total: bool = False


@dataclass(frozen=True)
class Table:
    """Items in one unit."""

    title: str
    unit: str
    lines: tuple[Line, ...]


def tables(setting: Setting) -> tuple[Table, ...]:
    """What is printed for this run; items that it does not have are left out."""
    memory = [Line("logits, one per token of the micro-batch and column", "logits", "logits")]
    if setting.fused:
        memory = [
            Line("blocks of logits, gradients of the head and of its input", "vanilla_update", "fused_gradients"),
            Line("ids, log-probabilities and projection of each token, at their peak", "0", "small"),
            Line("peak", "vanilla_peak", "troll_peak", total=True),
        ]
    else:
        memory += [
            Line("gradient of the logits, where not written over them", "vanilla_update", "troll_gradient"),
            Line("working rows, or the largest logits of groups of columns", "0", "update_block"),
            Line("ids, log-probabilities and projection of each token, at their peak", "0", "small"),
            Line("peak (the items above do not all fall together)", "vanilla_peak", "troll_peak", total=True),
        ]
        if setting.backend == "fsdp":
            memory.append(Line("peak, vanilla without flash-attention", "vanilla_peak_torch", "troll_peak", total=True))
    both = setting.tp > 1 or setting.cp > 1
    collectives = (
        Line("update, vocabulary: message per token", "vanilla_sent", "troll_sent"),
        Line("old-log-prob pass, vocabulary: message per token", "vanilla_old_sent", "troll_old_sent"),
        Line("update, shared tokens: received per token", "vanilla_shared", "troll_shared"),
        Line("old-log-prob pass, shared tokens: received per token", "vanilla_old_shared", "troll_old_shared"),
        Line("received per GPU and step", "vanilla_received", "troll_received", total=True),
    )
    calls = (
        Line("vocabulary, per micro-batch of the update", "vanilla_calls", "troll_calls"),
        Line("vocabulary, per micro-batch of the old-log-prob pass", "vanilla_old_calls", "troll_old_calls"),
        Line("per GPU and step", "vanilla_all_calls", "troll_all_calls", total=True),
    )
    time = (
        Line("actor: matrix products of old pass and updates", "actor_seconds", "actor_seconds"),
        Line("passes over the logits", "vanilla_reading", "troll_reading"),
        Line("search for the most probable ids", "0", "troll_searching"),
        Line("support and projection of each token", "0", "troll_small"),
        Line("launches of small operations", "0", "troll_launches"),
        *([Line("collectives", "vanilla_collectives", "troll_collectives")] if both else []),
        Line("batch through the network", "vanilla_carrying", "troll_carrying"),
        Line("together", "actor_seconds + vanilla_seconds", "actor_seconds + troll_seconds", total=True),
    )
    return (
        Table("Memory of the update, per GPU that holds the head", "bytes", tuple(memory)),
        Table(
            "Memory of the old-log-prob pass, per GPU that holds the head",
            "bytes",
            (Line("peak, logits included", "logits + vanilla_old", "logits + troll_old", total=True),),
        ),
        Table(
            "Carried with the batch through TransferQueue",
            "bytes",
            (
                Line("per response token", "verl_response", "verl_response + troll_response"),
                Line("stored per step, whole job", "verl_step", "verl_step + troll_step"),
                Line("written and read per GPU and step", "verl_moved", "verl_moved + troll_moved"),
            ),
        ),
        *([Table("Collectives: bytes", "bytes", collectives)] if both else []),
        *([Table("Collectives: number", "", calls)] if both else []),
        Table("Time per step, at the given rates, on a GPU that holds the head", "s", time),
    )


def rows(table: Table, values: Mapping[str, Value]) -> Iterator[tuple[Line, float, float]]:
    """Each line of ``table`` with vanilla's and TROLL's number."""
    for line in table.lines:
        yield line, _sum(line.vanilla, values), _sum(line.troll, values)


def _sum(names: str, values: Mapping[str, Value]) -> float:
    return sum(values[name].value for name in names.split(" + ") if name != "0")


def text(setting: Setting) -> str:
    """The tables, as they are printed."""
    values = evaluate(inputs(setting))
    lines = [*_heading(setting, values), ""]
    for table in tables(setting):
        lines.append(f"{table.title:<{_LABEL}}{'vanilla':>15}{'TROLL':>15}{'difference':>18}")
        for line, vanilla, troll in rows(table, values):
            label = f"= {line.label}" if line.total else f"  {line.label}"
            lines.append(
                f"{label:<{_LABEL}}{amount(vanilla, table.unit):>15}{amount(troll, table.unit):>15}"
                f"{_signed(troll - vanilla, table.unit):>18}"
            )
        lines.append("")
    difference = values["troll_seconds"].value - values["vanilla_seconds"].value
    verdict = (
        f"Predicted: {amount(abs(difference), 's')} {'more' if difference > 0 else 'less'} a step than with clipping, "
        f"{abs(values['share'].value):.1%} of the least that the actor can take with it. Attention, recomputation and "
        "rollout, alike for both, are left out: the share of a whole step is smaller."
    )
    notes = (
        f"{_baseline(setting)} Times are the least certain. TROLL's kernels and flash-attention were timed on one "
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


def _heading(setting: Setting, values: Mapping[str, Value]) -> list[str]:
    model, hardware = setting.model, setting.hardware
    active = "" if model.active_parameters == model.parameters else f" ({_count(model.active_parameters)} active)"
    grid = " x ".join(f"{name.upper()} {getattr(setting, name)}" for name in ("tp", "pp", "cp", "dp"))
    return [
        f"Model     {_count(model.parameters)} parameters{active}, vocabulary {model.vocab:,}, hidden size "
        f"{model.hidden:,}",
        f"Layout    {values['gpus'].value:,.0f} GPUs: {grid}, {setting.backend}",
        f"Step      {setting.tokens:,} response and {setting.prompt_tokens:,} prompt tokens, {setting.epochs} epoch(s) "
        f"of {setting.mini_batches} mini-batch(es)",
        f"On a GPU  micro-batches of {values['rows'].value:,.0f} tokens x {values['columns'].value:,.0f} columns, "
        f"{setting.dtype_bytes} bytes per logit; {values['old_cuts'].value:,.0f} in the old pass, "
        f"{values['cuts'].value:,.0f} in the updates",
        f"TROLL     support {setting.support}, K {setting.k}, {setting.kept_ids:g} ids kept per token, {setting.form} "
        f"kernels{', fused head' if setting.fused else ''}{', entropy' if setting.entropy else ''}",
        f"Rates     {hardware.flops / 1e12:g} Tflop/s, memory {hardware.memory_bandwidth / 1e9:g} GB/s, link "
        f"{hardware.link_bandwidth / 1e9:g} GB/s, network {hardware.network_bandwidth / 1e9:g} GB/s, "
        f"{hardware.latency * 1e6:g} us per collective, {hardware.launch * 1e6:g} us per launch",
    ]


def _count(value: float) -> str:
    return f"{value / 1e9:.3g} billion" if value >= 1e9 else f"{value / 1e6:.3g} million"


def amount(value: float, unit: str) -> str:
    """A number a person can read: bytes in binary units, seconds in s, ms or us."""
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


def explanation(setting: Setting) -> str:
    """Every formula with its value, its reason and the test that measures it."""
    values = evaluate(inputs(setting))
    lines = [
        "Inputs",
        *textwrap.wrap(
            ", ".join(f"{name} = {value:g}" for name, value in inputs(setting).items()),
            _WIDTH,
            initial_indent="  ",
            subsequent_indent="  ",
        ),
    ]
    for title, formulas in SECTIONS.items():
        lines += ["", title]
        for formula in formulas:
            found = values[formula.name]
            number = f"{found.value:,.6g}" if abs(found.value) < 1e6 else f"{found.value:,.0f}"
            lines += textwrap.wrap(
                f"{formula.name} = {found.expression}", _WIDTH, initial_indent="  ", subsequent_indent="      "
            )
            measured = f" [measured: {found.test}]" if found.test else ""
            lines += textwrap.wrap(
                f"= {number}{' ' + formula.unit if formula.unit else ''}: {formula.reason}{measured}",
                _WIDTH,
                initial_indent="      ",
                subsequent_indent="      ",
            )
    return "\n".join(lines)


def as_json(setting: Setting) -> dict[str, Any]:
    """Inputs, every formula's value, and the tables, in bytes and seconds."""
    values = evaluate(inputs(setting))
    return {
        "setting": dataclasses.asdict(setting),
        "values": {name: value.value for name, value in values.items()},
        "tables": [
            {
                "title": table.title,
                "unit": table.unit or "count",
                "lines": [
                    {"label": line.label, "vanilla": vanilla, "troll": troll, "difference": troll - vanilla}
                    for line, vanilla, troll in rows(table, values)
                ],
            }
            for table in tables(setting)
        ],
    }
