"""Tasks for a pretrained model: problems of reasoning-gym that SmolLM2-135M-Instruct sometimes solves.

``python -m benchmarks.study survey`` measured the candidates; ``docs/study.md`` says why these were chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

from verl_troll.tasks.reasoning_gym import Problems

TRAIN, HELD_OUT = 2000, 64


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


def _sums(*, digits: int, train: int, strict: bool = False) -> Problems:
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": digits}
    return Problems("chain_sum", settings, train, HELD_OUT, answer_from="last-number", strict=strict)


PRETRAINED: dict[str, PretrainedTask] = {
    task.name: task
    for task in (
        PretrainedTask("sums", _sums(digits=1, train=128)),
        PretrainedTask("larger_sums", _sums(digits=2, train=TRAIN)),
        PretrainedTask("bare_sums", _sums(digits=1, train=128, strict=True)),
    )
}
"""The tasks by name."""
