"""Make a study task's training inputs: problems, a tokenizer, and a small model after a supervised phase.

As in the quickstart, everything is made here, the result depends only on constants, and a finished folder is left
unchanged.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tokenizers import AddedToken
from transformers.utils import logging as transformers_logging

from benchmarks.study.reward import compute_score
from benchmarks.study.tasks import NAMES, PRETRAINED, TASKS, PretrainedTask, Problem, Task
from benchmarks.study.tasks.quickstart import quickstart
from verl_troll.tasks.reasoning_gym import SPLITS, prepare_problems

_quickstart = quickstart("prepare")

VERSION = 1
"""Increment when a change invalidates older folders."""

KEPT = 64
"""The mass of this many most likely ids is reported; TROLL's default ``k``."""

MODEL = "smollm2"
"""Folder of the pretrained model, beside those of the tasks."""

SAMPLES = 8
"""Samples per held-out problem in :func:`measure`."""


def make_tokenizer(task: Task) -> Any:
    """The quickstart's tokenizer, plus one token for each of the task's words."""
    tokenizer = _quickstart.make_tokenizer()
    # As added tokens: the tokenizer class that transformers loads splits text into bytes and merges.
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in task.words])
    return tokenizer


def split(task: Task) -> tuple[list[Problem], list[Problem]]:
    """Held-out problems and training problems."""
    held_out, train = _quickstart.HELD_OUT_PROBLEMS, _quickstart.TRAIN_PROBLEMS
    drawn = itertools.islice(task.problems(random.Random(_quickstart.SEED)), 2 * (held_out + train))
    unique = list({problem.text: problem for problem in drawn}.values())
    return unique[:held_out], unique[held_out : held_out + train]


def lessons(task: Task, held_out: list[Problem]) -> Iterator[tuple[str, str]]:
    """Endless problems that are not held out, with the careless teacher's solutions."""
    rng, left_out = random.Random(_quickstart.SEED + 1), {problem.text for problem in held_out}
    return (
        (problem.text, task.solution(problem, task.error_rate, rng))
        for problem in task.problems(rng)
        if problem.text not in left_out
    )


@torch.no_grad()
def measure(task: Task, model: Any, tokenizer: Any, problems: list[Problem]) -> dict[str, float]:
    """Success, and means over response tokens, of responses sampled at temperature 1.

    Returns:
        ``success``; ``entropy`` in nats; ``kept_mass``, the mass of the ``KEPT`` most likely ids.
    """
    torch.manual_seed(_quickstart.SEED)
    problems = [problem for problem in problems for _ in range(SAMPLES)]
    prompts = tokenizer([problem.text for problem in problems], padding=True, padding_side="left", return_tensors="pt")
    begin = prompts.input_ids.shape[1]
    ids = model.generate(**prompts, max_new_tokens=task.response_length, do_sample=True, top_k=0)
    responses = ids[:, begin:]
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    scores = [compute_score(task.name, text, problem.answer) for text, problem in zip(texts, problems, strict=True)]
    ended = (responses == tokenizer.eos_token_id).int().cumsum(1)
    counted = (ended == 0) | ((ended == 1) & (responses == tokenizer.eos_token_id))
    mask = torch.cat([prompts.attention_mask, counted.long()], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits[:, begin - 1 : -1][counted]
    log_probs = logits.float().log_softmax(-1)
    probs = log_probs.exp()
    return {
        "success": sum(scores) / len(scores),
        "entropy": -(probs * log_probs).sum(-1).mean().item(),
        "kept_mass": probs.topk(min(KEPT, probs.shape[-1])).values.sum(-1).mean().item(),
    }


def fill(task: Task, folder: Path) -> None:
    """Make a task's files in an empty folder; see :func:`prepare`."""
    held_out, train = split(task)
    _quickstart.rows(train, "train", task.name).to_parquet(folder / "train.parquet")
    _quickstart.rows(held_out, "held-out", task.name).to_parquet(folder / "held_out.parquet")
    torch.manual_seed(_quickstart.SEED)
    tokenizer = make_tokenizer(task)
    model = _quickstart.make_model(tokenizer)
    _quickstart.warm_start(
        model, tokenizer, lessons(task, held_out), steps=task.warm_start_steps, batch_size=task.warm_start_batch
    )
    rng = random.Random(_quickstart.SEED)
    prompts = tokenizer([problem.text for problem in held_out + train]).input_ids
    responses = tokenizer([task.solution(problem, task.error_rate, rng) for problem in held_out + train]).input_ids
    done = {
        "version": VERSION,
        **measure(task, model, tokenizer, held_out),
        "longest_prompt": max(map(len, prompts)),
        "longest_response": max(map(len, responses)) + 1,
        "parameters": model.num_parameters(),
    }
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    (folder / "done.json").write_text(json.dumps(done, indent=2) + "\n")


def prepare_model(folder: Path) -> None:
    """Write the pretrained model to ``folder``, unless complete; 540 MB, shared by all its tasks."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
            quickstart("smollm2").write_model(Path(made, "new"))
            os.rename(Path(made, "new"), folder)


def fill_pretrained(task: PretrainedTask, folder: Path, model: Path) -> None:
    """Make a pretrained task's files in an empty folder; see :func:`prepare`."""
    prepare_problems(task.problems, SPLITS, folder)
    done: dict[str, int] = {"version": VERSION}
    for split, name in zip(SPLITS, ("train", "held_out"), strict=True):
        rows = pd.read_parquet(folder / f"{split}.parquet")
        (folder / f"{split}.parquet").unlink()
        # verl names its metrics of held-out problems after it.
        rows.assign(data_source=task.name).to_parquet(folder / f"{name}.parquet")
        done[name] = len(rows)
    (folder / "model").symlink_to(model, target_is_directory=True)
    (folder / "done.json").write_text(json.dumps(done, indent=2) + "\n")


def prepare(name: str, folder: Path) -> dict[str, float]:
    """Fill ``folder`` with ``train.parquet``, ``held_out.parquet``, ``model/`` and ``done.json``, unless complete.

    Args:
        name: name of the task.
        folder: an incomplete or outdated one is replaced.

    Returns:
        ``done.json``: ``version``, the results of :func:`measure`, ``longest_prompt``, ``longest_response`` (in
        tokens, including the end of the turn), ``parameters``. Of a pretrained task ``version``, ``train``,
        ``held_out``.
    """
    done = folder / "done.json"
    if not done.exists() or json.loads(done.read_text()).get("version") != VERSION:
        folder.parent.mkdir(parents=True, exist_ok=True)
        threads = torch.get_num_threads()
        # With one thread, sums and thus the model are reproducible on a machine.
        torch.set_num_threads(1)
        try:
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
                (new := Path(made, "new")).mkdir()
                if name in PRETRAINED:
                    prepare_model(model := folder.parent / MODEL)
                    fill_pretrained(PRETRAINED[name], new, model.resolve())
                else:
                    fill(TASKS[name], new)
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(new, folder)
        finally:
            torch.set_num_threads(threads)
    found: dict[str, float] = json.loads(done.read_text())
    return found


def main() -> None:
    """Prepare the task given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=NAMES)
    parser.add_argument("--out", type=Path, required=True, help="folder for the task's data set and model")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    print(json.dumps(prepare(arguments.task, arguments.out), indent=2))


if __name__ == "__main__":
    main()
