"""Tasks for a pretrained model: problems of reasoning-gym that SmolLM2-135M-Instruct sometimes solves.

``python -m benchmarks.study survey`` measured the candidates; ``docs/study.md`` says why these were chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

from verl_troll.tasks.reasoning_gym import Problems

HELD_OUT = 64


@dataclass(frozen=True)
class PretrainedTask:
    """A generator of reasoning-gym, and how much a response may say.

    Attributes:
        name: verl's ``data_source``.
        problems: the generator with its settings, and what of a response is the answer; only full marks count.
        prompt_length: maximum tokens of a prompt, including the chat template's.
        response_length: maximum tokens of a response, including the end of the turn.
    """

    name: str
    problems: Problems
    prompt_length: int = 48
    response_length: int = 16


SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
TRAIN = 128
"""Training problems; there are 200 such sums, and 400 pairs of numbers up to 20."""
BARE = "Give only the number as your final answer.\nAnswer:"


PRETRAINED: dict[str, PretrainedTask] = {
    task.name: task
    for task in (
        PretrainedTask("sums", Problems("chain_sum", SUMS, TRAIN, HELD_OUT, answer_from="last-number")),
        PretrainedTask(
            "divisors",
            Problems("gcd", {"max_value": 20}, TRAIN, HELD_OUT, answer_from="last-number"),
            prompt_length=64,
        ),
        PretrainedTask(
            "bare_sums",
            Problems(
                "chain_sum",
                SUMS,
                TRAIN,
                HELD_OUT,
                answer_from="last-number",
                strict=True,
                instruction=BARE,
            ),
        ),
    )
}
"""The tasks by name."""
