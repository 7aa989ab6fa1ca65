"""The report's pictures, one panel each. Colour, line style and marker all distinguish the arms.

The palette is Okabe and Ito's, safe for the common forms of colour blindness.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from verl_troll.tools.report import metrics
from verl_troll.tools.report.comparison import (
    Cell,
    TaskComparison,
    final_success,
    largest_of,
    mean_of,
    median_of,
    series_of,
)
from verl_troll.tools.report.runs import Series
from verl_troll.tools.report.statistics import Curve, Interval, mean_curve, spread

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "oo")
_WIDTH_INCHES, _HEIGHT_INCHES, _DPI = 4.4, 2.9, 170
_LEGEND_ROW_INCHES = 0.19
_MAX_LABEL = 52
_THIN: dict[str, Any] = {"linewidth": 0.9, "fillstyle": "none", "markersize": 3.5}
_SHARE_FLOOR = 1e-8
_KL_FLOOR = 1e-6
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Picture:
    """A drawn panel.

    Attributes:
        name: file name, without folder and suffix.
        figure: the matplotlib figure.
        caption: what is drawn.
        gist: alt text with the numbers.
    """

    name: str
    figure: Any
    caption: str
    gist: str

    def png(self) -> bytes:
        """The picture as PNG; equal figures give equal bytes."""
        from matplotlib import rc_context

        buffer = io.BytesIO()
        with rc_context(_STYLE):
            self.figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
        return buffer.getvalue()


@dataclass(frozen=True)
class Panel:
    """A picture to draw; ``draw`` returns None if the runs have no data for it."""

    section: str
    name: str
    needs: str
    draw: Callable[[TaskComparison], Picture | None]


def printable(text: str) -> str:
    """``text`` as a label: glyphs missing from the font become ``?``, long text is shortened in the middle."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap()
    clean = "".join(c if ord(c) in known and c.isprintable() else "?" for c in " ".join(text.split()))
    if len(clean) > _MAX_LABEL:
        clean = f"{clean[: _MAX_LABEL // 2 - 1]}…{clean[-_MAX_LABEL // 2 :]}"
    # matplotlib hides labels that start with an underscore.
    return f" {clean}" if clean.startswith("_") else clean


def number(value: float) -> str:
    """Three significant figures."""
    return f"{value:#.3g}".removesuffix(".")


def rate_text(rate: float) -> str:
    """A learning rate as ``3e-4``."""
    mantissa, _, exponent = f"{rate:e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if rate else "0"


def share(value: float) -> str:
    """Three decimals."""
    return f"{value:.3f}"


def with_interval(interval: Interval, form: Callable[[float], str]) -> str:
    """Mean and interval as text."""
    if interval.low is None or interval.high is None:
        return form(interval.mean)
    return f"{form(interval.mean)} ({form(interval.low)} to {form(interval.high)})"


def _style(comparison: TaskComparison, arm: str) -> dict[str, Any]:
    index = list(comparison.best).index(arm)
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": _LINES[index % len(_LINES)],
        "marker": _MARKERS[index % len(_MARKERS)],
    }


class _Canvas:
    """One panel, with its legend below."""

    def __init__(self, title: str, ylabel: str, xlabel: str = "training step") -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
        self.axes = self.figure.subplots()
        self.axes.set_title(title)
        self.axes.set_xlabel(xlabel)
        self.axes.set_ylabel(ylabel)
        self.entries: list[tuple[Any, str]] = []

    def line(self, curve: Curve, style: dict[str, Any]) -> Any:
        marks = max(1, math.ceil(len(curve.steps) / 11))
        return self.axes.plot(curve.steps, curve.mean, markevery=marks, **style)[0]

    def curve(self, curve: Curve, label: str, style: dict[str, Any]) -> None:
        self.entries.append((self.line(curve, style), printable(label)))
        self.axes.fill_between(curve.steps, curve.low, curve.high, color=style["color"], alpha=0.16, linewidth=0)

    def two_kinds(self, bold: str, thin: str) -> None:
        """Explain bold and thin lines in the legend, for all arms."""
        from matplotlib.lines import Line2D

        for label, look in ((bold, dict[str, Any]()), (thin, _THIN)):
            self.entries.append((Line2D([], [], color="#666666", marker="o", **look), label))

    def whole_steps(self) -> None:
        from matplotlib.ticker import MaxNLocator

        self.axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))

    def logarithmic(self) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        self.axes.set_yscale("log")
        low, high = self.axes.get_ylim()
        self.axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
        # matplotlib's default labels need mathtext, which is off because names from logs could be parsed as it.
        self.axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        self.axes.yaxis.set_minor_formatter(NullFormatter())

    def finished(self) -> Any:
        """The figure, made taller by its legend."""
        if self.entries:
            handles, labels = zip(*self.entries, strict=True)
            columns = 1 if max(map(len, labels)) > 24 else 2
            rows = math.ceil(len(labels) / columns)
            self.figure.set_figheight(_HEIGHT_INCHES + rows * _LEGEND_ROW_INCHES)
            self.figure.legend(
                handles,
                labels,
                loc="outside lower center",
                ncols=columns,
                frameon=False,
                fontsize=8.5,
                handlelength=3.2,
            )
        return self.figure


def _label(comparison: TaskComparison, cell: Cell) -> str:
    several = len(comparison.of_arm(cell.arm)) > 1
    return f"{cell.arm}, lr {rate_text(cell.rate)}" if several and cell.rate is not None else cell.arm


def _last(curve: Curve, form: Callable[[float], str]) -> str:
    low, high = curve.low[-1], curve.high[-1]
    ends = None if math.isnan(low) else low, None if math.isnan(high) else high
    return f"{with_interval(Interval(curve.mean[-1], *ends, 0), form)} at step {curve.steps[-1]}"


def _where(comparison: TaskComparison) -> str:
    return ", each arm at its best learning rate" if comparison.several_rates else ""


def _curves(
    comparison: TaskComparison,
    name: str,
    title: str,
    ylabel: str,
    select: Callable[[Cell], list[Series]],
    form: Callable[[float], str] = number,
    hold: bool = False,
    positive: bool = False,
) -> Picture | None:
    curves = {arm: curve for arm, cell in comparison.best.items() if (curve := mean_curve(select(cell), hold=hold))}
    if not curves:
        return None
    canvas = _Canvas(title, ylabel)
    for arm, curve in curves.items():
        canvas.curve(curve, _label(comparison, comparison.best[arm]), _style(comparison, arm))
    canvas.whole_steps()
    values = [value for curve in curves.values() for value in curve.mean]
    if positive and min(values) > 0 and max(values) > 50 * min(values):
        canvas.logarithmic()
    elif positive and min(values) >= 0:
        highs = [value for curve in curves.values() for value in curve.high if not math.isnan(value)]
        canvas.axes.set_ylim(0, 1.08 * max(*values, *highs, 1e-12))
    gist = "; ".join(f"{arm} {_last(curve, form)}" for arm, curve in curves.items())
    caption = f"{title} over training: mean over seeds and its 95 % interval at each step{_where(comparison)}."
    return Picture(name, canvas.finished(), caption, f"{title}. {gist}.")


def _held_out(comparison: TaskComparison) -> Picture | None:
    def select(cell: Cell) -> list[Series]:
        return [run.held_out() for run in cell.runs]

    return _curves(
        comparison, "held-out-success", "Held-out success", "share of right answers", select, share, hold=True
    )


def _metric_panel(
    section: str,
    name: str,
    title: str,
    ylabel: str,
    *metrics: str,
    form: Callable[[float], str] = number,
    hold: bool = False,
    positive: bool = False,
) -> Panel:
    def draw(comparison: TaskComparison) -> Picture | None:
        def select(cell: Cell) -> list[Series]:
            return series_of(cell, *metrics)

        return _curves(comparison, name, title, ylabel, select, form, hold, positive)

    return Panel(section, name, f"{title.lower()} ({' or '.join(metrics)})", draw)


def _success_by_rate(comparison: TaskComparison) -> Picture | None:
    title = "Final success by learning rate"
    canvas = _Canvas(title, "final held-out success", "learning rate (log scale)")
    gist = []
    for arm in comparison.best:
        found = [
            (cell.rate, interval)
            for cell in comparison.of_arm(arm)
            if cell.rate and (interval := cell.interval(final_success))
        ]
        if not found:
            continue
        style = _style(comparison, arm)
        rates, means = [rate for rate, _ in found], [interval.mean for _, interval in found]
        # A missing interval is drawn without a bar.
        errors = [
            [0.0 if interval.low is None else max(interval.mean - interval.low, 0) for _, interval in found],
            [0.0 if interval.high is None else max(interval.high - interval.mean, 0) for _, interval in found],
        ]
        # Shift arms sideways so that error bars at one rate do not overlap.
        shift = 1.012 ** (2 * list(comparison.best).index(arm) - len(comparison.best) + 1)
        bars = canvas.axes.errorbar([rate * shift for rate in rates], means, errors, capsize=2, elinewidth=1, **style)
        canvas.entries.append((bars, printable(arm)))
        points = ", ".join(f"{with_interval(interval, share)} at {rate_text(rate)}" for rate, interval in found)
        gist.append(f"{arm} {points}")
    rates = sorted({cell.rate for cell in comparison.cells if cell.rate and cell.interval(final_success)})
    if len(rates) < 2:
        return None
    from matplotlib.ticker import NullLocator

    canvas.axes.set_xscale("log")
    canvas.axes.xaxis.set_minor_locator(NullLocator())
    canvas.axes.set_xticks(rates, [rate_text(rate) for rate in rates])
    caption = (
        f"{title}: mean over seeds with its 95 % interval, including diverged runs. Arms are shifted slightly at each "
        "rate."
    )
    return Picture("success-by-rate", canvas.finished(), caption, f"{title}. {'; '.join(gist)}.")


def _before_and_after(comparison: TaskComparison, largest: bool) -> Picture | None:
    before, after = (metrics.KL_BEFORE_MAX, metrics.KL_AFTER_MAX) if largest else (metrics.KL_BEFORE, metrics.KL_AFTER)
    title = "Largest KL of a token" if largest else "Mean KL per token"
    combine = _largest_curve if largest else mean_curve
    canvas = _Canvas(title, "nats (log scale)")
    gist = []
    for arm, cell in comparison.best.items():
        style = _style(comparison, arm)
        drawn = []
        for metric, look in ((before, _THIN), (after, {})):
            curve = combine(series_of(cell, metric))
            if curve:
                raised = Curve(curve.steps, tuple(max(value, _KL_FLOOR) for value in curve.mean), curve.low, curve.high)
                drawn.append(canvas.line(raised, {**style, **look}))
        if drawn:
            canvas.entries.append((drawn[-1], printable(_label(comparison, cell))))
        if ends := [
            f"{number(interval.mean)} {when}"
            for metric, when in ((before, "before"), (after, "after"))
            if (interval := cell.interval(largest_of(metric) if largest else mean_of(metric)))
        ]:
            gist.append(f"{arm} {' and '.join(ends)}")
    if not canvas.entries:
        return None
    canvas.two_kinds("after projection", "before projection")
    canvas.whole_steps()
    bounds = sorted({bound for run in comparison.runs if (bound := run.kl_bound()) is not None and bound > 0})
    for bound in bounds:
        line = canvas.axes.axhline(bound, color="black", linestyle="--", linewidth=1)
        canvas.entries.append((line, f"bound, {bound:g} nats"))
    canvas.logarithmic()
    over = "largest of all seeds" if largest else "mean over seeds"
    caption = (
        f"{title} from the old policy, before the projection (thin, open markers) and after it{_where(comparison)}: "
        f"{over} at each step. {_bound_words(bounds)} Values below {_KL_FLOOR:g} are drawn at {_KL_FLOOR:g}."
    )
    summed = "largest value of a run, averaged over runs" if largest else "mean over steps, averaged over runs"
    name = "kl-largest" if largest else "kl-mean"
    return Picture(
        name, canvas.finished(), caption, f"{title}, {summed}, in nats: {'; '.join(gist)}. {_bound_words(bounds)}"
    )


def _bound_words(bounds: Sequence[float]) -> str:
    if not bounds:
        return "The runs state no bound."
    return f"The dashed line is the bound of {' and '.join(f'{bound:g}' for bound in bounds)} nats."


def _largest_curve(runs: Sequence[Series]) -> Curve:
    """The largest value at each step (:func:`spread`), or between it and the one before."""
    values: dict[int, float] = {}
    for series in map(Series.finite, runs):
        for step, value in zip(series.steps, series.values, strict=True):
            values[step] = max(value, values.get(step, value))
    every = sorted(values)
    steps = spread(every)
    largest = dict.fromkeys(steps, -math.inf)
    number = 0
    for step in every:
        number += step > steps[number]
        largest[steps[number]] = max(values[step], largest[steps[number]])
    nothing = (math.nan,) * len(steps)
    return Curve(tuple(steps), tuple(largest.values()), nothing, nothing)


def _left_out_mass(comparison: TaskComparison) -> Picture | None:
    title = "Dropped probability mass"
    canvas = _Canvas(title, "1 - kept mass (log scale)")
    gist = []
    for arm, cell in comparison.best.items():
        drawn = []
        for metric, whose, look in (
            (metrics.NEW_KEPT_MASS, "new policy", _THIN),
            (metrics.OLD_KEPT_MASS, "old policy", {}),
        ):
            curve = mean_curve(series_of(cell, metric))
            if curve:
                left = tuple(max(1 - value, _SHARE_FLOOR) for value in curve.mean)
                raised = Curve(curve.steps, left, curve.low, curve.high)
                drawn.append(canvas.line(raised, {**_style(comparison, arm), **look}))
                gist.append(f"{arm}, {whose}, {number(left[-1])}")
        if drawn:
            canvas.entries.append((drawn[-1], printable(_label(comparison, cell))))
    if not canvas.entries:
        return None
    canvas.two_kinds("old policy", "new policy")
    canvas.logarithmic()
    canvas.whole_steps()
    caption = (
        f"{title} of the support{_where(comparison)}: 1 - {metrics.OLD_KEPT_MASS} and 1 - {metrics.NEW_KEPT_MASS} "
        f"(thin, open markers), mean over seeds. Values below {_SHARE_FLOOR:g} are drawn at {_SHARE_FLOOR:g}."
    )
    return Picture("left-out-mass", canvas.finished(), caption, f"{title}, at the last step: {'; '.join(gist)}.")


def _seconds(comparison: TaskComparison) -> Picture | None:
    title = "Time per step"
    found = {
        arm: interval
        for arm, cell in comparison.best.items()
        if (interval := cell.interval(median_of(metrics.STEP_SECONDS)))
    }
    if not found:
        return None
    canvas = _Canvas(title, "", "seconds, median over steps")
    for row, (arm, interval) in enumerate(found.items()):
        index = list(comparison.best).index(arm)
        canvas.axes.barh(
            row,
            interval.mean,
            height=0.62,
            color=_COLOURS[index % len(_COLOURS)],
            hatch=_HATCHES[index % len(_HATCHES)],
            edgecolor="white",
        )
        end = interval.mean
        if interval.low is not None and interval.high is not None:
            ends = [[max(interval.mean - interval.low, 0)], [max(interval.high - interval.mean, 0)]]
            canvas.axes.errorbar(interval.mean, row, xerr=ends, color="black", capsize=3, elinewidth=1.2)
            end = interval.high
        canvas.axes.annotate(
            number(interval.mean), (end, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5
        )
    canvas.axes.set_yticks(range(len(found)), [_wrapped(printable(arm)) for arm in found])
    canvas.axes.invert_yaxis()
    canvas.axes.grid(axis="y", visible=False)
    canvas.axes.margins(x=0.2)
    canvas.axes.set_xlim(left=0)
    canvas.figure.set_figheight(max(_HEIGHT_INCHES, 1.1 + 0.45 * len(found)))
    gist = "; ".join(f"{arm} {with_interval(interval, number)} s" for arm, interval in found.items())
    caption = f"{title}: median over the steps of a run, mean over seeds with its 95 % interval{_where(comparison)}."
    return Picture("seconds-per-step", canvas.finished(), caption, f"{title}. {gist}.")


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 20))


PANELS = (
    Panel("Learning curves", "held-out-success", "held-out success (val-core/*/mean@*)", _held_out),
    _metric_panel(
        "Learning curves", "reward", "Training reward", "mean score", *metrics.REWARDS, form=share, hold=True
    ),
    Panel(
        "Stability",
        "success-by-rate",
        "success by learning rate (runs with different learning rates)",
        _success_by_rate,
    ),
    _metric_panel("Stability", "entropy", "Entropy of the policy", "nats per token", metrics.ENTROPY, positive=True),
    _metric_panel("Stability", "grad-norm", "Gradient norm", "norm", metrics.GRAD_NORM, positive=True),
    _metric_panel("Stability", "distinct-answers", "Distinct answers", "share per prompt", metrics.DISTINCT_ANSWERS),
    _metric_panel(
        "Stability", "response-length", "Response length", "tokens, mean", metrics.RESPONSE_LENGTH, positive=True
    ),
    Panel(
        "Trust region",
        "kl-largest",
        f"largest KL of a token ({metrics.KL_BEFORE_MAX}, {metrics.KL_AFTER_MAX})",
        lambda comparison: _before_and_after(comparison, largest=True),
    ),
    Panel(
        "Trust region",
        "kl-mean",
        f"mean KL per token ({metrics.KL_BEFORE}, {metrics.KL_AFTER})",
        lambda comparison: _before_and_after(comparison, largest=False),
    ),
    _metric_panel("Trust region", "ppo-kl", "verl's KL estimate", "nats per token", metrics.PPO_KL),
    _metric_panel(
        "Trust region",
        "projected-share",
        "Projected share",
        "share of response tokens",
        metrics.PROJECTED_SHARE,
        positive=True,
    ),
    _metric_panel("Support", "support-size", "Support size", "ids kept per token", metrics.SUPPORT_SIZE, positive=True),
    Panel(
        "Support",
        "left-out-mass",
        f"dropped probability mass ({metrics.OLD_KEPT_MASS}, {metrics.NEW_KEPT_MASS})",
        _left_out_mass,
    ),
    Panel("Cost", "seconds-per-step", f"time per step ({metrics.STEP_SECONDS})", _seconds),
)


def pictures(comparison: TaskComparison) -> tuple[dict[str, list[Picture]], list[str]]:
    """The pictures of each section, and what is missing."""
    from matplotlib import rc_context

    drawn: dict[str, list[Picture]] = {}
    absent = []
    for panel in PANELS:
        with rc_context(_STYLE):
            picture = panel.draw(comparison)
        if picture is None:
            absent.append(panel.needs)
        else:
            drawn.setdefault(panel.section, []).append(picture)
    return drawn, absent
