"""The page: everything that was computed, drawn and read, in one file of HTML."""

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
from verl_troll.tools.report.comparison import Comparison
from verl_troll.tools.report.figures import Picture, pictures
from verl_troll.tools.report.read import Run

_PACKAGES = ("numpy", "scipy", "matplotlib", "jinja2", "tensorboard")

RULES = (
    (
        "Held-out success",
        "of a step is val-core/<data source>/<variable>/mean@<samples>, of each data source the one with the most "
        "samples, averaged over data sources.",
    ),
    (
        "Final and best",
        "are the last and the highest held-out success of a run. The best of many steps is biased upwards.",
    ),
    (
        "Mean over steps",
        "is the area under the curve of held-out success by the trapezoid rule, over the number of steps. A run that "
        "ended early keeps its last value, here and in the curves of success and reward; other curves average the runs "
        "that have the step.",
    ),
    (
        "Steps to a threshold",
        "are counted to the first step whose held-out success reaches it, nothing interpolated, averaged over the runs "
        "that reach it. By default the threshold is half-way from the mean start of all runs to the highest mean final "
        "success of an arm.",
    ),
    (
        "Diverged",
        "is a run whose status says so; or that logged a held-out success, training reward, entropy, gradient norm or "
        "ppo_kl that is not finite; or whose last held-out success is below half of its first.",
    ),
    (
        "Intervals",
        "are 95 % percentile bootstrap intervals of the mean over seeds or pairs (scipy.stats.bootstrap, 9999 "
        "resamples, fixed random state), with at least three values; of equal values the interval has no width. With "
        "few seeds they are too narrow: at five they cover the mean of normal values in about 83 % of cases. Bands of "
        "curves hold for each step, not for the whole curve.",
    ),
    (
        "Paired differences",
        "are taken between runs of equal seed, task and, where said, learning rate; seeds that only one arm has are "
        "left out. A tie is an exact one. No correction for many comparisons was made.",
    ),
    (
        "Best learning rate",
        "of an arm has its highest mean final success, the lower rate in a tie. It is chosen by the runs that are then "
        "shown, which flatters every arm, and more so the more rates it was tried at.",
    ),
    (
        "Stable range",
        "is made of neighbouring tried rates around the best whose mean final success is at least 90 % of the best "
        "rate's; its width is their number and the highest over the lowest.",
    ),
    (
        "At the end",
        "is the mean over the last tenth of the logged steps. Mean KL, ppo_kl and projected share are means over all "
        "steps; seconds per step are the median over steps.",
    ),
)


@dataclass(frozen=True)
class Section:
    """A part of a comparison; empty ones are left out."""

    title: str
    tables: Sequence[tables.Table]
    pictures: Sequence[Picture]
    lines: Sequence[str] = ()


@dataclass(frozen=True)
class Part:
    """One comparison, as it is set."""

    title: str
    summary: str
    sections: Sequence[Section]
    absent: Sequence[str]


def _title(comparison: Comparison, alone: bool) -> str:
    named = ", ".join(part for part in (comparison.task, comparison.section) if part)
    return named or ("Results" if alone else "Runs that name no task")


def part(comparison: Comparison, alone: bool = True) -> Part:
    """Tables and pictures of one comparison.

    Args:
        comparison: from :func:`~verl_troll.tools.report.comparison.compare`.
        alone: whether it is the page's only one.
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
        Section(title, found.get(title, ()), drawn.get(title, ()), lines.get(title, ()))
        for title in order
        if found.get(title) or drawn.get(title) or lines.get(title)
    ]
    if not found["Paired differences"]:
        absent.append(_no_pairs(comparison))
    return Part(_title(comparison, alone), _summary(comparison), sections, absent)


def _no_pairs(comparison: Comparison) -> str:
    if comparison.baseline is None:
        return "paired differences (the baseline is no arm of this task)"
    if len(comparison.best) == 1:
        return "paired differences (there is one arm)"
    return "paired differences (no arm has a seed and held-out success in common with the baseline)"


def _summary(comparison: Comparison) -> str:
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


def _inputs(runs: Sequence[Run]) -> tables.Table:
    counts = Counter((run.argument, run.kind) for run in runs)
    files = {key: len({run.source for run in runs if (run.argument, run.kind) == key}) for key in counts}
    rows = [
        [tables.Entry(argument), tables.Entry(kind), tables.Entry(str(files[argument, kind])), tables.Entry(str(count))]
        for (argument, kind), count in counts.items()
    ]
    return tables.Table("Inputs, as given.", ["Argument", "Format", "Files or folders", "Runs"], rows)


def _versions() -> str:
    found = [f"verl_troll {__version__}", f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def write(
    comparisons: Sequence[Comparison], runs: Sequence[Run], out: Path, command: str, notes: Sequence[str]
) -> list[Path]:
    """Write the page and, in a folder beside it, its pictures; both are overwritten.

    Args:
        comparisons: from :func:`~verl_troll.tools.report.comparison.compare`.
        runs: all of them.
        out: the page; the folder is named after it, with ``-figures``.
        command: the command line, for the page's provenance.
        notes: what was left out in reading.

    Returns:
        The pictures' paths.
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
        rules=RULES,
    )
    # Names in logs may hold halves of surrogate pairs, which UTF-8 has no bytes for.
    out.write_text(text, encoding="utf-8", errors="replace")
    return paths
