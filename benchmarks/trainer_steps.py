"""Measures whole steps of verl's trainer with clipping and with TROLL, without an accelerator.

    python -m benchmarks.trainer_steps [--steps 6] [--rounds 2] [--models head trunk] [--json FILE] [--markdown]

There are two random models: in one the head dominates (two narrow layers, a vocabulary of 150 000), in the other the
trunk (many layers, the tokenizer's few hundred ids). The real trainer trains each with verl's clipping, TROLL anchored
and TROLL union, otherwise identically. Reported are the medians of verl's own ``timing_s/*`` after the first two steps
of each run. Methods alternate run by run, which is coarse: generation is the same work in all of them, so the ratio of
``gen`` shows how much the machine itself varied. Takes ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Spread
from benchmarks.table import grid, number

PARTS = ("gen", "old_log_prob", "update_actor", "step")
WARM_UP = 2
# Standard deviation of the logits of the tokenizer's ids.
_LOGIT_DEVIATION = 10.0


@dataclass(frozen=True)
class RandomModel:
    """A random Qwen2.

    Attributes:
        vocab: rows of the embedding and of the head; None for the tokenizer's size.
        hidden, layers: size of the trunk.
        prompts, samples, response: prompts per step, samples per prompt, tokens per response (no early stop).
    """

    vocab: int | None
    hidden: int
    layers: int
    prompts: int = 8
    samples: int = 4
    response: int = 32


MODELS = {
    "head": RandomModel(vocab=150_000, hidden=64, layers=2),
    "trunk": RandomModel(vocab=None, hidden=256, layers=12),
}
METHODS = {
    "vanilla": [],
    "anchored": ["+troll=default", "actor_rollout_ref.actor.policy_loss.troll.support=anchored"],
    "union": ["+troll=default", "actor_rollout_ref.actor.policy_loss.troll.support=union"],
}


def make_assets(folder: Path, model: RandomModel) -> None:
    """Write the model, its tokenizer and its prompts to ``folder``."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.trainer.run import make_assets as make_tiny_assets

    make_tiny_assets(folder)
    tiny = json.loads((folder / "model" / "config.json").read_text())
    torch.manual_seed(0)
    network = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=model.vocab or tiny["vocab_size"],
            hidden_size=model.hidden,
            intermediate_size=4 * model.hidden,
            num_hidden_layers=model.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tiny["eos_token_id"],
            pad_token_id=tiny["pad_token_id"],
        )
    )
    with torch.no_grad():
        # Make outputs as peaked as a trained model's, on the tokenizer's ids.
        own = network.lm_head.weight[: tiny["vocab_size"] - 2]
        own.mul_(_LOGIT_DEVIATION / (own.std() * model.hidden**0.5))
    network.save_pretrained(folder / "model")


def run(name: str, method: str, steps: int, folder: Path) -> list[dict[str, Any]]:
    """Run the trainer once; return the metrics of the steps after the first two."""
    from tests.trainer.run import run_trainer

    model = MODELS[name]
    assets = folder / name
    if not assets.exists():
        assets.mkdir(parents=True)
        make_assets(assets, model)
    out = Path(tempfile.mkdtemp(prefix=f"{name}-{method}-", dir=folder))
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    sequences = model.prompts * model.samples
    overrides = [
        *METHODS[method],
        f"data.train_batch_size={model.prompts}",
        f"data.max_response_length={model.response}",
        f"{rollout}.n={model.samples}",
        f"{rollout}.ignore_eos=True",
        f"{rollout}.log_prob_micro_batch_size_per_gpu={sequences // 2}",
        f"{actor}.ppo_mini_batch_size={model.prompts // 2}",
        f"{actor}.ppo_micro_batch_size_per_gpu={sequences // 2}",
        f"{actor}.optim.lr=3e-4",
        "trainer.total_epochs=1000000",
        f"trainer.total_training_steps={steps}",
    ]
    rows = run_trainer(assets, out, overrides)
    return [row for row in rows if row["step"] > WARM_UP]


def summary(name: str, method: str, steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians and quartiles of verl's timings over the steps of all rounds, with the model's settings."""
    result: dict[str, Any] = {
        "model": name,
        "method": method,
        **dataclasses.asdict(MODELS[name]),
        "steps": len(steps),
        "response_length": steps[-1]["response_length/mean"],
    }
    for part in PARTS:
        result[part] = dataclasses.asdict(Spread.of([row[f"timing_s/{part}"] for row in steps]))
    if "troll/projected_share" in steps[-1]:
        result["projected_share"] = Spread.of([row["troll/projected_share"] for row in steps]).median
        result["support_size"] = Spread.of([row["troll/support_size"] for row in steps]).median
    return result


def render(results: Sequence[dict[str, Any]], markdown: bool) -> str:
    """Seconds of each part with quartiles, and the ratio to vanilla."""
    columns = ["model", "method"]
    for part in PARTS:
        columns += [f"{part}, s", "quartiles", "ratio"]
    cells = []
    for result in results:
        base = next((one for one in results if (one["model"], one["method"]) == (result["model"], "vanilla")), None)
        row = [result["model"], result["method"]]
        for part in PARTS:
            own = result[part]
            row += [number(own["median"]), f"{number(own['low'])} to {number(own['high'])}"]
            row.append("" if base is None else f"{own['median'] / base[part]['median']:.2f}")
        cells.append([*row, number(result.get("projected_share", 0.0)), number(result.get("support_size", 0.0))])
    return grid([*columns, "projected share", "kept ids"], cells, markdown)


def main(given: Sequence[str] | None = None) -> int:
    """Run the trainer for every model and method, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer_steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=6, help=f"steps per run; the first {WARM_UP} are dropped")
    parser.add_argument("--rounds", type=int, default=2, help="runs per method")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(given)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.steps <= WARM_UP:
        parser.error(f"--steps must be above {WARM_UP}, the number of dropped steps, got {options.steps}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from benchmarks.measure import machine

    facts = machine("cpu")
    steps: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, _, method in itertools.product(options.models, range(options.rounds), options.methods):
            begin = time.perf_counter()
            steps.setdefault((name, method), []).extend(run(name, method, options.steps, Path(folder)))
            print(f"{name}, {method}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    results = [summary(name, method, found) for (name, method), found in steps.items()]
    print(", ".join(f"{name} {value}" for name, value in facts.items()), end="\n\n")
    print(render(results, options.markdown))
    if options.json is not None:
        rows = [{**result, "machine": facts} for result in results]
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
