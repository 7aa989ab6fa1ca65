"""How a pretrained model does on candidate tasks before training: ``python -m benchmarks.study survey``.

A task suits the study if the model is right on some samples and wrong on others of the same prompt: groups whose
samples all score the same teach GRPO nothing. Each candidate takes about a minute; one that is in the results file
is not measured again.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from verl_troll.embedded.generation import Completion, Request, generate
from verl_troll.tasks.reasoning_gym import Problems, prepare_problems
from verl_troll.tasks.rewards.reasoning_gym import compute_score

FILE = Path(__file__).with_name("survey.jsonl")

PROMPTS, SAMPLES = 32, 8
"""Prompts per candidate, and samples per prompt."""

GROUP = 4
"""Samples per prompt in training; the share of mixed groups is also given for this many."""

KEPT = 64
"""TROLL's default ``k``."""

SEED = 7

FORMS: dict[str, dict[str, Any]] = {
    "last number": {"answer_from": "last-number", "strict": False},
    "bare number": {"answer_from": "last-number", "strict": True},
    "response": {"answer_from": "response", "strict": True},
}
"""Ways to read an answer: a response's last number, a number and nothing else, the whole response."""

_NUMBERS = ("last number", "bare number")
_TEXT = ("response",)


@dataclass(frozen=True)
class Candidate:
    """A generator of reasoning-gym with settings.

    Attributes:
        name: unique.
        dataset: the generator.
        settings: its settings.
        response_length: maximum tokens of a response.
        instruction: added to each question.
        forms: names in :data:`FORMS`.
    """

    name: str
    dataset: str
    settings: dict[str, Any] = field(default_factory=dict)
    response_length: int = 16
    instruction: str = ""
    forms: tuple[str, ...] = _NUMBERS


def _chain_sum(terms: int, digits: tuple[int, int], instruction: str = "") -> Candidate:
    low, high = digits
    name = f"chain_sum, {terms} terms, {low if low == high else f'{low}-{high}'} digits"
    settings = {"min_terms": terms, "max_terms": terms, "min_digits": low, "max_digits": high}
    return Candidate(f"{name}, told" if instruction else name, "chain_sum", settings, instruction=instruction)


TOLD = "Give only the number as your final answer.\nAnswer:"
"""Of a dozen instructions the one after which the model answers with a bare number most often."""

_ANIMALS = {"min_animals": 1, "max_animals": 2, "min_instances": 1, "max_instances": 5}
_SMALL_EQUATIONS = {"min_terms": 2, "max_terms": 2, "max_value": 10}

CANDIDATES: tuple[Candidate, ...] = (
    _chain_sum(2, (1, 1)),
    _chain_sum(2, (1, 2)),
    _chain_sum(2, (2, 2)),
    _chain_sum(3, (1, 1)),
    _chain_sum(3, (1, 2)),
    _chain_sum(4, (1, 1)),
    _chain_sum(2, (1, 1), TOLD),
    _chain_sum(2, (1, 2), TOLD),
    Candidate(
        "basic_arithmetic, 2 terms, 1 digit",
        "basic_arithmetic",
        {"min_terms": 2, "max_terms": 2, "max_digits": 1, "allow_negation": False},
    ),
    Candidate(
        "basic_arithmetic, 3 terms, 1 digit",
        "basic_arithmetic",
        {"min_terms": 3, "max_terms": 3, "max_digits": 1, "allow_negation": False},
    ),
    Candidate("products, 1 digit", "products", {"max_digits": 1}),
    Candidate("products, 1-2 digits", "products", {"max_digits": 2}),
    Candidate("simple_equations, 2 terms, to 10", "simple_equations", _SMALL_EQUATIONS),
    Candidate("leg_counting, 1-2 animals, to 5", "leg_counting", _ANIMALS),
    Candidate("count_bits, to 63", "count_bits", {"max_n": 63}),
    Candidate("letter_counting, 2-5 words", "letter_counting", {"min_words": 2, "max_words": 5}),
    Candidate("gcd, to 20", "gcd", {"max_value": 20}),
    Candidate("gcd, to 100", "gcd", {"max_value": 100}),
    Candidate("lcm, to 12", "lcm", {"max_value": 12}),
    Candidate("simple_geometry, 3 sides", "simple_geometry", {"max_sides": 3}),
    Candidate("count_primes, to 30", "count_primes", {"max_n": 30}),
    Candidate("aiw, siblings", "aiw", {"task_types": ["siblings"]}),
    Candidate("coin_flip, 3 trials", "coin_flip", {"max_trials": 3}),
    Candidate("spell_backward, 3-4 letters", "spell_backward", {"max_word_len": 4}, forms=_TEXT),
    Candidate("calendar_arithmetic, leap years", "calendar_arithmetic", {"tasks": ["is_leap_year"]}, forms=_TEXT),
    Candidate("calendar_arithmetic, weekdays", "calendar_arithmetic", {"tasks": ["weekday_offset"]}, forms=_TEXT),
    Candidate(
        "fraction_simplification, to 10",
        "fraction_simplification",
        {"max_value": 10, "max_factor": 10, "styles": ["plain"]},
        forms=_TEXT,
    ),
    Candidate(
        "word_sorting, 3 words", "word_sorting", {"max_words": 3, "max_word_length": 6}, response_length=24, forms=_TEXT
    ),
    Candidate(
        "number_sorting, 3 numbers",
        "number_sorting",
        {"max_numbers": 3, "max_decimals": 0},
        response_length=24,
        forms=_TEXT,
    ),
    Candidate("prime_factorization, to 20", "prime_factorization", {"max_value": 20}, forms=_TEXT),
    Candidate("color_cube_rotation, 1 turn", "color_cube_rotation", {"max_rotations": 1}, forms=_TEXT),
)


class Recorder(nn.Module):
    """A model that notes the entropy and the mass of the most likely ids at every token that it samples."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.entropies: list[torch.Tensor] = []
        self.masses: list[torch.Tensor] = []

    def forward(self, **inputs: Any) -> Any:
        """The model's output."""
        output = self.model(**inputs)
        log_probs = output.logits[:, -1].float().log_softmax(-1)
        probs = log_probs.exp()
        self.entropies.append(-(probs * log_probs).sum(-1))
        self.masses.append(probs.topk(min(KEPT, probs.shape[-1])).values.sum(-1))
        return output


def mixed_share(right: Iterable[int], samples: int, group: int) -> float:
    """Expected share of mixed groups of ``group`` samples, drawn from ``samples`` of which some are right."""
    shares = [
        1 - (math.comb(count, group) + math.comb(samples - count, group)) / math.comb(samples, group) for count in right
    ]
    return sum(shares) / len(shares)


def _complete(
    model: nn.Module, tokenizer: Any, rows: pd.DataFrame, candidate: Candidate, temperature: float, samples: int
) -> list[Completion]:
    prompts = [
        tuple(tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False))
        for prompt in rows["prompt"]
    ]
    return generate(
        model,
        [
            Request(
                prompt,
                candidate.response_length,
                temperature=temperature,
                stop_ids=frozenset({tokenizer.eos_token_id}),
                noise=(SEED, index, sample),
            )
            for index, prompt in enumerate(prompts)
            for sample in range(samples)
        ],
    )


def _right(row: Any, text: str, form: str) -> bool:
    return compute_score(row.data_source, text, None, {**row.extra_info, **FORMS[form]})["acc"] == 1


def measure(
    candidate: Candidate,
    model: Any,
    tokenizer: Any,
    prompts: int = PROMPTS,
    show: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """One row per form of the answer.

    Args:
        model: in evaluation mode.
        prompts: number of problems.
        show: is given some problems with answers.

    Yields:
        ``success`` and ``greedy``, shares of right samples and of right greedy responses; ``mixed`` and
        ``mixed_of_group``, shares of groups of ``SAMPLES`` and ``GROUP`` samples that hold right and wrong ones;
        ``prompt_length`` and ``response_length``, mean tokens; ``ended``, share of samples that end by themselves;
        ``entropy`` in nats and ``kept_mass`` of ``KEPT`` ids, means over response tokens.
    """
    problems = Problems(candidate.dataset, candidate.settings, 1, prompts, SEED, instruction=candidate.instruction)
    with tempfile.TemporaryDirectory() as folder:
        prepare_problems(problems, ["test"], Path(folder))
        rows = pd.read_parquet(Path(folder, "test.parquet"))
    recorder = Recorder(model)
    sampled = _complete(recorder, tokenizer, rows, candidate, 1.0, SAMPLES)
    # A prompt is read once for all its samples.
    for noted in (recorder.entropies, recorder.masses):
        noted[0] = noted[0].repeat_interleave(SAMPLES)
    greedy = _complete(model, tokenizer, rows, candidate, 0.0, 1)
    answers, best = (
        tokenizer.batch_decode([done.token_ids for done in found], skip_special_tokens=True)
        for found in (sampled, greedy)
    )
    groups = [answers[start : start + SAMPLES] for start in range(0, len(answers), SAMPLES)]
    problem_rows = list(rows.itertuples())
    for row, group, text in list(zip(problem_rows, groups, best, strict=True))[:2]:
        answer = row.reward_model["ground_truth"]
        show(f"  {row.prompt[0]['content']!r} ({answer}): {group[:3]}, greedy {text!r}")
    questions = [tokenizer(prompt[0]["content"]).input_ids for prompt in rows["prompt"]]
    for form in candidate.forms:
        right = [
            sum(_right(row, text, form) for text in group) for row, group in zip(problem_rows, groups, strict=True)
        ]
        yield {
            "name": candidate.name,
            "form": form,
            "dataset": candidate.dataset,
            "settings": candidate.settings,
            "instruction": candidate.instruction,
            "prompts": prompts,
            "success": sum(right) / len(answers),
            "greedy": sum(_right(row, text, form) for row, text in zip(problem_rows, best, strict=True)) / prompts,
            "mixed": mixed_share(right, SAMPLES, SAMPLES),
            "mixed_of_group": mixed_share(right, SAMPLES, GROUP),
            "prompt_length": sum(map(len, questions)) / prompts,
            "response_length": sum(len(done.token_ids) for done in sampled) / len(sampled),
            "ended": sum(done.stop_reason == "completed" for done in sampled) / len(sampled),
            "entropy": torch.cat(recorder.entropies).mean().item(),
            "kept_mass": torch.cat(recorder.masses).mean().item(),
        }


def read(file: Path = FILE) -> list[dict[str, Any]]:
    """The measured rows."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def run(model_folder: Path, file: Path = FILE, prompts: int = PROMPTS, say: Callable[[str], None] = print) -> None:
    """Measure the candidates that ``file`` does not hold with as many prompts, and append a row for each form."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = {row["name"] for row in read(file) if row["prompts"] >= prompts}
    left = [candidate for candidate in CANDIDATES if candidate.name not in done]
    if not left:
        return
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    for candidate in left:
        say(candidate.name)
        rows = list(measure(candidate, model, tokenizer, prompts, say))
        with file.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in rows))


def table(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The Markdown table of ``docs/study.md``."""
    header = ["candidate", "answer", "prompts", "success", "greedy", f"mixed of {SAMPLES}", f"mixed of {GROUP}"]
    header += ["prompt", "response", "entropy", f"mass on {KEPT}"]
    yield f"| {' | '.join(header)} |"
    yield f"|{' --- |' * len(header)}"
    # Later rows replace earlier ones.
    for row in {(row["name"], row["form"]): row for row in rows}.values():
        shares = [f"{row[name]:.2f}" for name in ("success", "greedy", "mixed", "mixed_of_group")]
        numbers = [f"{row['prompt_length']:.0f}", f"{row['response_length']:.0f}", f"{row['entropy']:.2f}"]
        cells = [row["name"], row["form"], str(row["prompts"]), *shares, *numbers, f"{row['kept_mass']:.3f}"]
        yield f"| {' | '.join(cells)} |"
