"""Plot the curves of one run from its ``metrics.jsonl``, and summarise it in a few lines."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

REWARD = "critic/score/mean"
ENTROPY = "actor/entropy"
KL_BEFORE, KL_BEFORE_MAX = "troll/kl_before", "troll/kl_before_max"
KL_AFTER, KL_AFTER_MAX = "troll/kl_after", "troll/kl_after_max"
PROJECTED_SHARE = "troll/projected_share"
HELD_OUT_PREFIX = "val-core/"

# Okabe and Ito's palette, safe for the common forms of colour blindness.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"

Row = dict[str, Any]


def read(metrics: Path) -> list[Row]:
    """Rows of a run, one per step, with the key ``step``.

    Raises:
        ValueError: the file has no step.
    """
    with metrics.open(encoding="utf-8") as lines:
        parsed = [json.loads(line) for line in lines]
    rows = [{"step": row["step"], **row["data"]} for row in parsed]
    if not rows:
        raise ValueError(f"{metrics} holds no step: the run ended before its first one")
    return rows


def held_out_success(row: Row) -> float | None:
    """Held-out success at a step; None if it was not measured."""
    return next((value for key, value in row.items() if key.startswith(HELD_OUT_PREFIX) and "/mean@" in key), None)


def kl_bound(hydra_folder: Path) -> float | None:
    """The run's KL bound in nats; None for a run without TROLL."""
    from omegaconf import OmegaConf

    config = OmegaConf.load(hydra_folder / ".hydra" / "config.yaml")
    value = OmegaConf.select(config, "actor_rollout_ref.actor.policy_loss.troll.kl_bound")
    return None if value is None else float(value)


def series(rows: list[Row], key: str) -> tuple[list[int], list[float]]:
    """Steps that have ``key``, and their values."""
    pairs = [(row["step"], float(row[key])) for row in rows if key in row]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _absent(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no projection in this run", transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_yticks([])


def _success(axes: Axes, rows: list[Row]) -> None:
    axes.plot(*series(rows, REWARD), color=GREY, linewidth=1, alpha=0.7, label="training reward")
    measured = [(row["step"], value) for row in rows if (value := held_out_success(row)) is not None]
    axes.plot(*zip(*measured, strict=True), color=BLUE, marker="o", linewidth=2, label="held-out success")
    axes.set(title="Success", ylabel="share of right answers", ylim=(0, 1))
    axes.legend(loc="lower right", frameon=False)


def _kl(axes: Axes, rows: list[Row], bound: float | None) -> None:
    axes.set(title="KL from the old policy, per token", ylabel="nats")
    if not any(KL_BEFORE in row for row in rows):
        _absent(axes)
        return
    for key, colour, style, label in (
        (KL_BEFORE_MAX, ORANGE, "-", "largest, before projection"),
        (KL_AFTER_MAX, BLUE, "-", "largest, after projection"),
        (KL_BEFORE, ORANGE, ":", "mean, before projection"),
        (KL_AFTER, BLUE, ":", "mean, after projection"),
    ):
        steps, values = series(rows, key)
        axes.plot(steps, [max(value, 1e-6) for value in values], color=colour, linestyle=style, label=label)
    axes.set_yscale("log")
    if bound is not None:
        axes.axhline(bound, color="black", linestyle="--", linewidth=1, label=f"bound, {bound:g} nats")
    # Make room for the legend below the curves.
    low, high = axes.get_ylim()
    axes.set_ylim(low * (low / high) ** 0.45, high)
    axes.legend(loc="lower center", ncols=2, frameon=False, fontsize=8.5)


def _share(axes: Axes, rows: list[Row]) -> None:
    axes.set(title="Projected tokens", ylabel="share of response tokens")
    if not any(PROJECTED_SHARE in row for row in rows):
        _absent(axes)
        return
    steps, values = series(rows, PROJECTED_SHARE)
    axes.bar(steps, values, color=GREEN, width=0.8)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=1))


def _entropy(axes: Axes, rows: list[Row]) -> None:
    axes.plot(*series(rows, ENTROPY), color=BLUE, linewidth=2)
    axes.set(title="Entropy of the policy, per token", ylabel="nats")
    axes.set_ylim(bottom=0)


def draw(rows: list[Row], picture: Path, title: str, bound: float | None) -> None:
    """Plot the four curves of a run as a PNG.

    Args:
        rows: from :func:`read`.
        picture: path of the PNG.
        title: title above the curves.
        bound: KL bound in nats; None draws no bound.
    """
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    _success(axes[0, 0], rows)
    _kl(axes[0, 1], rows, bound)
    _share(axes[1, 0], rows)
    _entropy(axes[1, 1], rows)
    for panel in axes.flat:
        panel.set_xlabel("training step")
        panel.set_xlim(0, rows[-1]["step"] + 1)
        panel.set_axisbelow(True)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, fontsize=13)
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def summary(rows: list[Row]) -> str:
    """A few lines about a run."""
    measured = [value for row in rows if (value := held_out_success(row)) is not None]
    lines = [f"  {rows[-1]['step']} steps"]
    if measured:
        lines.append(f"  held-out success: {measured[0]:.2f} before training, {measured[-1]:.2f} at the end")
    shares = series(rows, PROJECTED_SHARE)[1]
    if shares:
        acting = sum(share > 0.01 for share in shares)
        lines.append(
            f"  projected tokens: {sum(shares) / len(shares):.1%} on average, above 1 % in {acting} of {len(shares)} "
            "steps"
        )
        lines.append(
            f"  largest KL of a token: {max(series(rows, KL_BEFORE_MAX)[1]):.3g} nats before projection, "
            f"{max(series(rows, KL_AFTER_MAX)[1]):.3g} nats after"
        )
    return "\n".join(lines)


def main() -> None:
    """Plot the curves of a finished run again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, with metrics.jsonl")
    folder: Path = parser.parse_args().run
    picture = folder / "curves.png"
    rows = read(folder / "metrics.jsonl")
    draw(rows, picture, folder.name, kl_bound(folder / "hydra"))
    print(summary(rows))
    print(f"  curves:  {picture}")


if __name__ == "__main__":
    main()
