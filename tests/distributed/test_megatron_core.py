"""The mathematics on the sharded logits of a real megatron-core model, under its own pipeline schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed import megatron_core_scenarios as scenarios
from tests.distributed.launch import run_ranks
from tests.distributed.megatron_core_scenarios import Shape

SHAPES = {
    2: [Shape(tensor=2), Shape(tensor=2, sequence_parallel=True), Shape(pipeline=2)],
    4: [Shape(tensor=4), Shape(tensor=2, pipeline=2, sequence_parallel=True)],
}


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The union of what all ranks know; where they overlap, they must agree."""
    whole: dict[str, Any] = {"old": {}, "reports": [], "gradients": {}}
    for result in results:
        if result["reports"]:
            assert not whole["reports"] or result["reports"] == whole["reports"]
            whole["reports"] = result["reports"]
        for index, (ids, log_probs) in result["old"].items():
            if index in whole["old"]:
                assert torch.equal(ids, whole["old"][index][0])
                assert torch.equal(log_probs, whole["old"][index][1])
            whole["old"][index] = (ids, log_probs)
        whole["gradients"].update(result["gradients"])
    return whole


@pytest.mark.parametrize(("rule", "noise"), [("union", 0.003), ("anchored", 0.025)])
def test_every_shape_agrees_with_one_rank(rule: str, noise: float) -> None:
    method: dict[str, Any] = {"rule": rule, "noise": noise}
    reference = merged([run_ranks(scenarios.each, 1, ([Shape(**method)],))[0][0]])
    assert len(reference["old"]) == len(reference["reports"]) == scenarios.MICRO_BATCHES
    assert all(0.05 < report["projected"] < 0.95 for report in reference["reports"])
    assert all((ids < scenarios.VOCAB).all() for ids, _ in reference["old"].values())
    padding = reference["gradients"]["output_layer.weight"][scenarios.VOCAB :]
    assert padding.shape[0] > 0
    assert (padding == 0).all()
    scale = max(grad.abs().max().item() for grad in reference["gradients"].values())

    for ranks, shapes in SHAPES.items():
        chosen = [replace(shape, **method) for shape in shapes]
        by_rank = run_ranks(scenarios.each, ranks, (chosen,))
        for place, shape in enumerate(chosen):
            result = merged([results[place] for results in by_rank])
            for index, (ids, log_probs) in reference["old"].items():
                assert torch.equal(result["old"][index][0], ids), shape
                torch.testing.assert_close(result["old"][index][1], log_probs, rtol=0, atol=5e-6)
            for report, expected in zip(result["reports"], reference["reports"], strict=True):
                assert report == pytest.approx(expected, rel=1e-5), shape
            assert result["gradients"].keys() == reference["gradients"].keys()
            for name, grad in reference["gradients"].items():
                torch.testing.assert_close(
                    result["gradients"][name], grad, rtol=0, atol=1e-5 * scale, msg=f"{shape} {name}"
                )
