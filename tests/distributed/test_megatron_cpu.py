"""verl's stock Megatron engine in CPU mode matches transformers, however the model is split over ranks."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor

from tests.distributed import megatron_stock as scenarios
from tests.distributed.launch import RankFailedError, run_ranks
from tests.distributed.megatron_stock import Layout
from verl_troll.versions import OVERRIDE_VARIABLE, TESTED

# By number of ranks; the first layout on one rank is the reference for gradients.
LAYOUTS: dict[str, dict[int, list[dict[str, Any]]]] = {
    "qwen2": scenarios.DENSE,
    "qwen2-tied": {1: [{}], 2: [{"tensor": 2}, {"pipeline": 2}]},
    "qwen3": {1: [{}], 2: [{"tensor": 2}, {"pipeline": 2}, {"context": 2}]},
    "llama": {1: [{}], 2: [{"tensor": 2}]},
    "qwen3_moe": {1: [{}], 2: [{"expert": 2}, {"tensor": 2}, {"tensor": 2, "expert": 2, "expert_tensor": 1}]},
}


@pytest.fixture(scope="module")
def batch() -> TensorDict:
    return scenarios.make_batch()


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> str:
    return scenarios.write_model(tmp_path_factory.mktemp("qwen2"))


def gather(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Several ranks' results as one: outputs of all samples, weights of the first rank."""
    return {
        "grad_norm": next(rank["grad_norm"] for rank in ranks if rank["grad_norm"]),
        "loaded": ranks[0]["loaded"],
        "trained": ranks[0]["trained"],
        **{
            name: {sample: row for rank in ranks for sample, row in rank[name].items()}
            for name in ("log_probs", "entropy", "after")
        },
    }


def assert_rows(rows: dict[int, Tensor], expected: dict[int, Tensor] | list[Tensor], case: object) -> None:
    """Equal to 1e-4 except at each sample's last token, whose successor belongs to the next sample."""
    assert len(rows) == len(expected)
    for sample, row in rows.items():
        other = expected[sample][: len(row) - 1]
        torch.testing.assert_close(row[:-1], other, rtol=0, atol=1e-4, msg=lambda text: f"{case}: {text}")


@pytest.mark.parametrize("model", LAYOUTS)
def test_every_layout_agrees_with_transformers_and_with_one_rank(
    model: str, batch: TensorDict, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind, _, tied = model.partition("-")
    path = scenarios.write_model(tmp_path_factory.mktemp(model), kind, tie=bool(tied))
    on_disk = load_file(f"{path}/model.safetensors")
    expected = scenarios.transformers_log_probs(path, batch)
    reference: dict[str, Any] = {}
    for world_size, layouts in LAYOUTS[model].items():
        ranks = run_ranks(scenarios.each, world_size, ([Layout(path, **layout) for layout in layouts], batch))
        for layout, results in zip(layouts, zip(*ranks, strict=True), strict=True):
            case = (model, world_size, layout)
            result = gather(list(results))
            reference = reference or result
            assert_rows(result["log_probs"], expected, case)
            assert_rows(result["entropy"], reference["entropy"], case)
            assert result["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5), case
            assert result["grad_norm"][0] > 0.1
            assert_rows(result["after"], reference["after"], case)
            for rank in results:
                # Every rank takes part in the export and has the full weights under transformers' names.
                assert rank["loaded"].keys() == rank["trained"].keys() == on_disk.keys(), case
                for name, weight in on_disk.items():
                    assert torch.equal(rank["loaded"][name], weight), (case, name)
                    torch.testing.assert_close(rank["trained"][name], reference["trained"][name], rtol=0, atol=1e-5)
    moved = max((reference["trained"][name] - on_disk[name]).abs().max().item() for name in on_disk)
    assert moved > 1e-2


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("qwen2", {"tensor": 2}), ("qwen2", {"pipeline": 2}), ("qwen3_moe", {"expert": 2})],
    ids=["tensor", "pipeline", "expert"],
)
def test_checkpoint_brings_back_weights_and_optimizer(
    tmp_path: Path, batch: TensorDict, kind: str, layout: dict[str, Any]
) -> None:
    model = scenarios.write_model(tmp_path / "model", kind)
    # Steps that depend on Adam's counter and moments.
    setup = Layout(model, **layout, lr=1e-3, adam_eps=1e-4)
    for rank in run_ranks(scenarios.resumed, 2, (setup, batch, str(tmp_path / "checkpoint"))):
        for name, weight in rank["saved"].items():
            assert torch.equal(rank["loaded"][name], weight), name
            assert not torch.equal(rank["expected"][name], weight), name
            torch.testing.assert_close(rank["resumed"][name], rank["expected"][name], rtol=0, atol=1e-6, msg=name)


def test_engine_works_in_a_thread_that_did_not_build_it(qwen2: str, batch: TensorDict) -> None:
    result = run_ranks(scenarios.other_thread, 1, (Layout(qwen2), batch))[0]
    assert_rows(result["log_probs"], scenarios.transformers_log_probs(qwen2, batch), "thread")
    assert not result["leaked"]


def test_nothing_changes_before_an_engine_is_asked_for() -> None:
    result = run_ranks(scenarios.before_any_engine, 1)[0]
    assert result["current_device"] == "torch.cuda"
    assert "verl-megatron-engine" not in result["patches"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"param_offload": True}, "param_offload=True is not supported"),
        # The actor may have them.
        (
            {"use_fused_kernels": True, "forward_only": True},
            "use_fused_kernels=True of a reference policy is not supported",
        ),
    ],
)
def test_an_unsupported_setting_is_named_with_whose_it_is(settings: dict[str, Any], message: str) -> None:
    from verl_troll.cpu.megatron.config import CpuMcoreEngineConfig

    with pytest.raises(ValueError, match=message):
        CpuMcoreEngineConfig(**settings)


@pytest.mark.parametrize("host", ["megatron-core", "mbridge"])
def test_another_version_of_the_layers_is_refused_by_name(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On megatron-core 0.18, mbridge 0.15.1 would fail at ``ModelType.encoder_and_decoder`` when it builds a model."""
    from verl_troll.cpu.megatron.config import CpuMcoreEngineConfig

    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.18.0" if name == host else version(name))
    monkeypatch.delenv(OVERRIDE_VARIABLE, raising=False)
    message = (
        f"subclasses {host} {TESTED[host]}, but {host} 0.18.0 is installed; .* pip install '{host}=={TESTED[host]}'"
    )
    with pytest.raises(ImportError, match=message):
        CpuMcoreEngineConfig()
    monkeypatch.setenv(OVERRIDE_VARIABLE, "1")
    with pytest.warns(UserWarning, match="Going on"):
        CpuMcoreEngineConfig()


@pytest.mark.parametrize(
    "setting",
    [{"expert": 2, "tensor": 2}, {"transformer": {"attention_dropout": 0.1}}, {"transformer": {"fp8": "hybrid"}}],
    ids=["expert tensor parallel", "dropout", "fp8"],
)
def test_what_the_stand_ins_do_not_have_is_refused(qwen2: str, batch: TensorDict, setting: dict[str, Any]) -> None:
    with pytest.raises(RankFailedError, match="CPU mode"):
        run_ranks(scenarios.each, 1, ([replace(Layout(qwen2), **setting)], batch))
