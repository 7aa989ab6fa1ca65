"""Writes the page: all tables, pictures and inputs in one HTML file."""

from __future__ import annotations

import base64
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_troll import __version__
from verl_troll.tools.report import tables
from verl_troll.tools.report.comparison import TaskComparison
from verl_troll.tools.report.figures import Picture, pictures
from verl_troll.tools.report.runs import Run
from verl_troll.tools.report.statistics import MAX_CURVE_STEPS

_PACKAGES = ("numpy", "scipy", "matplotlib", "jinja2", "tensorboard")

RULES = (
    (
        "Held-out success",
        "at a step is val-core/<data source>/<variable>/mean@<samples>: for each data source the metric with the most "
        "samples, then averaged over data sources.",
    ),
    (
        "Final and best",
        "are a run's last and highest held-out success. The best of many steps is biased upwards.",
    ),
    (
        "Mean over steps",
        "is the area under the held-out success curve (trapezoid rule), divided by the number of steps. A run that "
        "ended early keeps its last value, here and in the success and reward curves; other curves average the runs "
        "that have the step.",
    ),
    (
        "Long curves",
        f"are drawn at {MAX_CURVE_STEPS:,} of their steps, evenly spaced, first and last included; a curve of largest "
        "values shows the largest since the step before. Tables use every step.",
    ),
    (
        "Range",
        "is that of float32: a larger value counts as infinite, a smaller one as 0.",
    ),
    (
        "Steps to a threshold",
        "is the first step whose held-out success reaches it, without interpolation, averaged over the runs that reach "
        "it. By default the threshold is halfway from the mean start of all runs to the highest mean final success of "
        "an arm.",
    ),
    (
        "Diverged",
        "is a run whose status says so; or that logged a non-finite held-out success, training reward, entropy, "
        "gradient norm or ppo_kl; or whose last held-out success is below half of its first.",
    ),
    (
        "Intervals",
        "are 95 % percentile bootstrap intervals of the mean over seeds or pairs (scipy.stats.bootstrap, 9999 "
        "resamples, fixed random state) of at least three values; equal values give zero width. With few seeds they "
        "are too narrow: with five they cover the mean of normal values in about 83 % of cases. Bands around curves "
        "are pointwise, not for the whole curve.",
    ),
    (
        "Paired differences",
        "are between runs with the same seed, task and, where stated, learning rate; seeds that only one arm has are "
        "left out. Ties are exact. There is no correction for multiple comparisons.",
    ),
    (
        "Best learning rate",
        "is the one with the arm's highest mean final success, the lower rate in a tie. It is selected on the runs "
        "shown, which flatters every arm, and more so the more rates it was tried at.",
    ),
    (
        "Stable range",
        "is the run of neighbouring rates around the best whose mean final success is at least 90 % of the best "
        "rate's; its width is their number and the ratio of highest to lowest.",
    ),
    (
        "At the end",
        "is the mean over the last tenth of the logged steps. Mean KL, ppo_kl and projected share are means over all "
        "steps; seconds per step are the median over steps.",
    ),
)


@dataclass(frozen=True)
class PageSection:
    """A section of one comparison; empty sections are left out."""

    title: str
    tables: Sequence[tables.TextTable]
    pictures: Sequence[Picture]
    lines: Sequence[str] = ()


@dataclass(frozen=True)
class Part:
    """One comparison, ready to render."""

    title: str
    summary: str
    sections: Sequence[PageSection]
    absent: Sequence[str]


def _title(comparison: TaskComparison, alone: bool) -> str:
    named = ", ".join(part for part in (comparison.task, comparison.section) if part)
    return named or ("Results" if alone else "Runs without a task")


def part(comparison: TaskComparison, alone: bool = True) -> Part:
    """Tables and pictures of one comparison.

    Args:
        comparison: from :func:`~verl_troll.tools.report.comparison.compare`.
        alone: whether it is the only one on the page.
    """
    drawn, absent = pictures(comparison)
    stability = [table for table in (tables.stable(comparison), tables.rates(comparison)) if table]
    found = {
        "Summary": [table for table in (tables.success(comparison), tables.policy(comparison)) if table],
        "Paired differences": [
            table for table in (tables.paired(comparison), tables.paired_at_equal_rates(comparison)) if table
        ],
        "Stability": stability,
    }
    lines = {"Stability": tables.divergences(comparison)}
    order = ("Summary", "Paired differences", "Learning curves", "Stability", "Trust region", "Support", "Cost")
    sections = [
        PageSection(title, found.get(title, ()), drawn.get(title, ()), lines.get(title, ()))
        for title in order
        if found.get(title) or drawn.get(title) or lines.get(title)
    ]
    if not found["Paired differences"]:
        absent.append(_no_pairs(comparison))
    return Part(_title(comparison, alone), _summary(comparison), sections, absent)


def _no_pairs(comparison: TaskComparison) -> str:
    if comparison.baseline is None:
        return "paired differences (this task has no baseline arm)"
    if len(comparison.best) == 1:
        return "paired differences (there is only one arm)"
    return "paired differences (no arm has a seed with held-out success in common with the baseline)"


def _summary(comparison: TaskComparison) -> str:
    runs = comparison.runs
    seeds = {run.seed for run in runs if run.seed is not None}
    rates = {cell.rate for cell in comparison.cells if cell.rate is not None}
    parts = [_count(len(runs), "run"), _count(len(comparison.best), "arm")]
    parts += [_count(len(seeds), "seed")] if seeds else []
    parts += [_count(len(rates), "learning rate")] if rates else []
    text = f"{', '.join(parts)}."
    if comparison.baseline is not None and len(comparison.best) > 1:
        text += f" Baseline: {comparison.baseline}."
    if early := len(comparison.ended_early()):
        text += f" {_count(early, 'run')} ended early, before step {comparison.last_step}."
    statuses = Counter(run.status for run in runs if run.status)
    if statuses:
        text += f" Status: {', '.join(f'{count} {status}' for status, count in statuses.items())}."
    return text


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _inputs(runs: Sequence[Run]) -> tables.TextTable:
    counts = Counter((run.argument, run.kind) for run in runs)
    files = {key: len({run.source for run in runs if (run.argument, run.kind) == key}) for key in counts}
    rows = [
        [tables.Entry(argument), tables.Entry(kind), tables.Entry(str(files[argument, kind])), tables.Entry(str(count))]
        for (argument, kind), count in counts.items()
    ]
    return tables.TextTable("Inputs, as given.", ["Argument", "Format", "Files or folders", "Runs"], rows)


def _versions() -> str:
    found = [f"verl_troll {__version__}", f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def write(
    comparisons: Sequence[TaskComparison],
    runs: Sequence[Run],
    out: Path,
    command: str,
    notes: Sequence[str],
    faults: Sequence[str] = (),
) -> list[Path]:
    """Write the page, and its pictures to a folder beside it; both are overwritten.

    Args:
        comparisons: from :func:`~verl_troll.tools.report.comparison.compare`.
        runs: all runs.
        out: the page; the folder is named after it, with ``-figures``.
        command: the command line, shown on the page.
        notes: what reading left out, as expected.
        faults: what could not be read, file by file.

    Returns:
        The paths of the pictures.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = out.with_name(f"{out.stem}-figures")
    folder.mkdir(parents=True, exist_ok=True)
    parts = [part(comparison, alone=len(comparisons) == 1) for comparison in comparisons]
    images: dict[tuple[int, str], str] = {}
    paths = []
    for index, found in enumerate(parts):
        for picture in (picture for section in found.sections for picture in section.pictures):
            png = picture.png()
            paths.append(folder / f"task{index + 1}-{picture.name}.png")
            paths[-1].write_bytes(png)
            images[index, picture.name] = base64.b64encode(png).decode("ascii")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    arms = list(dict.fromkeys(arm for comparison in comparisons for arm in comparison.best))
    text = environment.get_template("page.html.j2").render(
        title=f"{' vs. '.join(arms)}: report of verl_troll"
        if len(arms) <= 4
        else f"{len(arms)} arms: report of verl_troll",
        parts=parts,
        images=images,
        runs=len(runs),
        arms=arms,
        inputs=_inputs(runs),
        versions=_versions(),
        command=command,
        notes=notes,
        faults=faults,
        rules=RULES,
    )
    # Names in logs may contain lone surrogates, which UTF-8 cannot encode.
    out.write_text(text, encoding="utf-8", errors="replace")
    return paths
