"""Make the quickstart's training inputs: problems, a tokenizer and a model. A finished folder is left unchanged.

``smollm2`` is a pretrained model (:mod:`smollm2`). ``tiny`` is made here, with a short supervised phase: the result
depends only on the constants below, so all runs of a repository start from the same model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from task import SOLUTION_LENGTH, Problem, check, noisy_solution, problems
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from verl_troll.tasks.prepare import TaskError

VERSION = 1
"""Increment when a change below invalidates older folders."""

SEED = 0
TRAIN_PROBLEMS = 4096
HELD_OUT_PROBLEMS = 256

TEACHER_ERROR_RATE = 0.2
WARM_START_STEPS = 400
WARM_START_BATCH = 64
WARM_START_RATE = 2e-3

MODEL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    # The default of 0.02 suits wide models; this makes learning several times faster here.
    "initializer_range": 0.06,
}

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus Qwen's two special tokens."""
    # transformers loads a byte-level tokenizer for every Qwen2 model, whatever was saved.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate([*alphabet, END_OF_TEXT, END_OF_TURN])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=END_OF_TEXT, eos_token=END_OF_TURN)
    fast.chat_template = (
        "{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}<|im_end|>\n{% endif %}{% endfor %}"
    )
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A Qwen2 model with random weights: 0.3 million parameters, plus 128 for each token besides the bytes."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **MODEL,
    )
    return Qwen2ForCausalLM(config)


def rows(chosen: list[Any], split: str, data_source: str = "chain") -> pd.DataFrame:
    """verl's columns for problems with a ``text`` and an ``answer``."""
    return pd.DataFrame(
        {
            "data_source": data_source,
            "prompt": [{"role": "user", "content": problem.text}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {"index": index, "split": split},
        }
        for index, problem in enumerate(chosen)
    )


def lessons(held_out: set[Problem]) -> Iterator[tuple[str, str]]:
    """Endless problems that are not held out, with a careless teacher's solutions."""
    rng = random.Random(SEED + 1)
    return (
        (problem.text, noisy_solution(problem, TEACHER_ERROR_RATE, rng))
        for problem in problems(rng)
        if problem not in held_out
    )


def collate(tokenizer: PreTrainedTokenizerFast, batch: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of a batch; only the solution and the end of the turn are labelled."""
    texts, solutions = zip(*batch, strict=True)
    prompts = tokenizer(list(texts)).input_ids
    answers = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(solutions)).input_ids]
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
    labels = torch.full((len(batch), longest), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        begin, end = len(prompt), len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, begin:end] = ids[row, begin:end]
    return ids, labels


def warm_start(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Iterator[tuple[str, str]],
    steps: int = WARM_START_STEPS,
    batch_size: int = WARM_START_BATCH,
) -> None:
    """Teach the solution format, including a careless teacher's errors, by next-token prediction."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_START_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, WARM_START_RATE, total_steps=steps)
    model.train()
    begin = time.monotonic()
    for step in range(1, steps + 1):
        ids, labels = collate(tokenizer, list(itertools.islice(pairs, batch_size)))
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            left = (time.monotonic() - begin) / step * (steps - step)
            print(
                f"  warm start {step}/{steps}   loss {loss.item():.3f} nats/token   {left:.0f} s left",
                flush=True,
            )
    model.eval()


@torch.no_grad()
def sampled_success(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, chosen: list[Problem]) -> float:
    """Share of problems solved by one sampled solution."""
    torch.manual_seed(SEED)
    ids = torch.tensor([tokenizer(problem.text).input_ids for problem in chosen])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=SOLUTION_LENGTH + 1, do_sample=True, top_k=0
    )
    solutions = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return sum(check(s, p.answer) for s, p in zip(solutions, chosen, strict=True)) / len(chosen)


def prepare_tiny(folder: Path) -> dict[str, float]:
    """Write data set and model; return what to note about them."""
    rng = random.Random(SEED)
    unique = list(dict.fromkeys(itertools.islice(problems(rng), 2 * (TRAIN_PROBLEMS + HELD_OUT_PROBLEMS))))
    held_out, train = unique[:HELD_OUT_PROBLEMS], unique[HELD_OUT_PROBLEMS : HELD_OUT_PROBLEMS + TRAIN_PROBLEMS]
    rows(train, "train").to_parquet(folder / "train.parquet")
    rows(held_out, "held-out").to_parquet(folder / "held_out.parquet")
    # With one thread, sums and thus the model are reproducible on a machine.
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    warm_start(model, tokenizer, lessons(set(held_out)))
    success = sampled_success(model, tokenizer, held_out)
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    print(f"  the warm-started model solves {success:.0%} of the held-out problems")
    return {"held_out_success": success}


def main() -> int:
    """Fill the folder given on the command line, unless it is already complete; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder for the data set and the model")
    parser.add_argument("--model", choices=("smollm2", "tiny"), required=True)
    args = parser.parse_args()
    folder: Path = args.folder
    transformers_logging.disable_progress_bar()
    done = folder / "done.json"
    if done.exists() and json.loads(done.read_text())["version"] == VERSION:
        print(f"  reusing the data set and the model in {folder}")
        return 0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    notes: dict[str, float] = {}
    if args.model == "tiny":
        notes = prepare_tiny(folder)
    else:
        import smollm2

        try:
            smollm2.prepare(folder)
        except (RuntimeError, TaskError) as error:
            print(f"quickstart: {error}", file=sys.stderr)
            return 1
    done.write_text(json.dumps({"version": VERSION, **notes}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
