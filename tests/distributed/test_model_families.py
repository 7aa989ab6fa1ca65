"""Every model family on verl's real engines: transformers' values, a bounded update, checkpoints and exports."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.distributed import batches, family_scenarios, fsdp_scenarios
from tests.distributed.fsdp_scenarios import Setup
from tests.distributed.launch import RankFailedError, run_ranks
from tests.distributed.megatron_stock import Layout
from tests.model_families import FAMILIES, IMAGE, with_images, write_family, write_vision

# With no dropped mass, rounding cannot move an id across the edge of the support.
TROLL: dict[str, Any] = {"support": "union", "k": 20, "dropped_mass": 0.0}
# The same optimizer for both engines; in the second step some tokens leave the region and some do not.
OPTIMIZER: dict[str, Any] = {"lr": 0.003, "adam_eps": 1.0}
# Families that mbridge supports.
MEGATRON = ("qwen2", "qwen3", "llama", "qwen3_moe")
# verl averages these over micro-batches, so they depend on how a mini-batch is cut; one engine sums its losses.
CUT_DEPENDENT = {"actor/ppo_kl", "actor/pg_clipfrac", "loss"}


class Life(NamedTuple):
    """A model's path, its checkpoint, and its ranks' results."""

    path: str
    folder: Path
    result: dict[str, Any]


@pytest.fixture(scope="module")
def batch() -> TensorDict:
    return batches.make_batch().exclude("rollout_is_weights")


def dense_log_probs(path: str, batch: TensorDict, weights: dict[str, Tensor] | None = None) -> list[Tensor]:
    """Log-probabilities ``[r, V]`` of every response token of each sample, by transformers, one sample at a time.

    Args:
        weights: replace the model's own.
    """
    with_vision = "multi_modal_inputs" in batch
    auto = AutoModelForImageTextToText if with_vision else AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    images = list(batch["multi_modal_inputs"]) if with_vision else [{}] * len(batch)
    results = []
    with torch.no_grad():
        if weights is not None:
            model.load_state_dict(weights)
        for ids, response, image in zip(batch["input_ids"].unbind(), batch["responses"].unbind(), images, strict=True):
            inputs = {**image, "mm_token_type_ids": (ids == IMAGE).int()[None]} if image else {}
            logits = model(ids[None], **inputs).logits[0] / batches.TEMPERATURE
            results.append(logits.log_softmax(-1)[len(ids) - 1 - len(response) : -1])
    return results


def assert_log_probs(output: dict[int, dict[str, Tensor]], dense: list[Tensor], batch: TensorDict) -> None:
    """Log-probabilities of all response tokens equal those of ``dense``."""
    assert sorted(output) == list(range(len(dense)))
    for sample, response in enumerate(batch["responses"].unbind()):
        own = output[sample]["log_probs"][-len(response) - 1 : -1]
        expected = dense[sample].gather(-1, response[:, None])[:, 0]
        torch.testing.assert_close(own, expected, rtol=0, atol=2e-5, msg=str(sample))


def assert_support(output: dict[int, dict[str, Tensor]], dense: list[Tensor], batch: TensorDict) -> None:
    """The k most probable ids and the sampled one, with their log-probabilities, at tokens that take part."""
    for sample, mask in enumerate(batch["response_mask"].unbind()):
        row = output[sample]
        counts = row["troll_old_counts"].tolist()
        ids = row["troll_old_ids"].long().split(counts)
        values = row["troll_old_log_probs"].split(counts)
        for t, sampled in enumerate(batch["responses"].unbind()[sample].tolist()):
            expected = sorted({*dense[sample][t].topk(TROLL["k"]).indices.tolist(), sampled}) if mask[t] else []
            assert sorted(ids[t].tolist()) == expected, (sample, t)
            torch.testing.assert_close(values[t], dense[sample][t][ids[t]], rtol=0, atol=2e-5)


def assert_weights(weights: dict[str, Tensor], folder: Path) -> None:
    """Exported weights equal those in a model's file, name by name; tied output weights may be exported too."""
    files = load_file(folder / "model.safetensors")
    if "visual.patch_embed.proj.weight" in files:
        # verl exports Qwen2.5-VL under transformers' current names, its files use older ones; vLLM reads both.
        files = {re.sub("^model", "model.language_model", name): weight for name, weight in files.items()}
        files = {re.sub("^visual", "model.visual", name): weight for name, weight in files.items()}
    tied = weights.keys() - files.keys()
    if tied:
        assert tied == {"lm_head.weight"}
        assert torch.equal(weights["lm_head.weight"], files["model.embed_tokens.weight"])
    assert weights.keys() - tied == files.keys()
    for name, weight in files.items():
        assert torch.equal(weights[name], weight), name


def gather(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The first rank's result, with the passes of all ranks merged."""
    for rank in ranks:
        assert rank["history"] == ranks[0]["history"]
    passes = {key: {i: row for rank in ranks for i, row in rank[key].items()} for key in ("old", "after")}
    return {**ranks[0], **passes}


def assert_old_pass(result: dict[str, Any], path: str, batch: TensorDict) -> None:
    """Log-probabilities and support equal those of transformers' model."""
    dense = dense_log_probs(path, batch)
    assert_log_probs(result["old"], dense, batch)
    assert_support(result["old"], dense, batch)


def assert_updates(result: dict[str, Any], batch: TensorDict) -> None:
    """Ratio one in the first step, projected tokens in the last, and the bound holds in all."""
    first, *_, last = result["history"]
    assert first["troll/kl_before_max"] == 0
    assert first["troll/projected_share"] == 0
    batches.assert_loss_at_ratio_one(first["actor/pg_loss"], batch)
    assert 0.05 < last["troll/projected_share"] < 0.95
    assert last["troll/kl_before_max"] > 0.05
    assert all(step["troll/kl_after_max"] <= 0.05 * (1 + 1e-5) for step in result["history"])


def assert_resumed(result: dict[str, Any], tolerance: float = 0.0) -> None:
    """The checkpoint restores the weights bit for bit; the next step moves them as before."""
    for name, weight in result["saved"].items():
        assert torch.equal(result["reloaded"][name], weight), name
        torch.testing.assert_close(result["resumed"][name], result["final"][name], rtol=0, atol=tolerance, msg=name)
    assert any(not torch.equal(result["final"][name], weight) for name, weight in result["saved"].items())
    for name, value in result["metrics"].items():
        assert result["resumed_metrics"][name] == pytest.approx(value, rel=10 * tolerance, abs=tolerance), name


def assert_life(result: dict[str, Any], path: str, exported: Path, batch: TensorDict) -> None:
    """What holds for every family on every engine.

    Args:
        path: the model before the updates.
        exported: the model in the checkpoint, as transformers loads it.
    """
    assert_old_pass(result, path, batch)
    assert_weights(result["loaded"], Path(path))
    assert_updates(result, batch)
    assert_weights(result["saved"], exported)
    assert_log_probs(result["after"], dense_log_probs(str(exported), batch), batch)


def fsdp_life(path: str, folder: Path, batch: TensorDict, **settings: Any) -> dict[str, Any]:
    """A life on two FSDP2 ranks."""
    contents = ("model", "optimizer", "extra", "hf_model")
    setup = Setup(path, TROLL, **{"micro_batch_size": 2, "save_contents": contents, **OPTIMIZER, **settings})
    return gather(run_ranks(family_scenarios.live, 2, (setup, TROLL, batch, str(folder))))


@pytest.fixture(scope="module")
def on_fsdp(tmp_path_factory: pytest.TempPathFactory, batch: TensorDict) -> Callable[[str], Life]:
    """The life of a family on FSDP2, run once."""

    @functools.cache
    def live(family: str) -> Life:
        model, folder = tmp_path_factory.mktemp(family), tmp_path_factory.mktemp(f"{family}-fsdp")
        path = write_family(model, family)
        result = fsdp_life(path, folder, batch, load_tokenizer=True)
        assert_life(result, path, folder / "huggingface", batch)
        return Life(path, folder, result)

    return live


@pytest.mark.parametrize("family", FAMILIES)
def test_fsdp2(family: str, on_fsdp: Callable[[str], Life]) -> None:
    result = on_fsdp(family).result
    assert result["engine"] == "TrollFSDPEngine"
    assert_resumed(result)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_shards_are_the_export(tmp_path: Path, family: str, on_fsdp: Callable[[str], Life]) -> None:
    """verl's model merger writes bf16."""
    _, checkpoint, result = on_fsdp(family)
    run_ranks(family_scenarios.merge, 1, (str(checkpoint), str(tmp_path)))
    assert_weights({name: weight.bfloat16() for name, weight in result["saved"].items()}, tmp_path)


@pytest.mark.parametrize("family", MEGATRON)
def test_megatron(tmp_path: Path, family: str, batch: TensorDict, on_fsdp: Callable[[str], Life]) -> None:
    """Two tensor-parallel ranks match FSDP2, down to each id of the support."""
    path, _, expected = on_fsdp(family)
    layout = Layout(path, tensor=2, micro_batch_size=4, **OPTIMIZER)
    result = gather(run_ranks(family_scenarios.live, 2, (layout, TROLL, batch, str(tmp_path))))
    assert result["engine"] == "TrollMegatronEngine"
    assert_life(result, path, tmp_path / "model" / "huggingface", batch)
    assert_resumed(result, tolerance=1e-6)
    for sample, row in expected["old"].items():
        for name in ("troll_old_counts", "troll_old_ids"):
            assert torch.equal(result["old"][sample][name], row[name]), (sample, name)
    for own, step in zip(result["history"], expected["history"], strict=True):
        for name in step.keys() - CUT_DEPENDENT:
            assert own[name] == pytest.approx(step[name], rel=1e-3, abs=1e-5), name
    for name, weight in result["saved"].items():
        torch.testing.assert_close(weight, expected["saved"][name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(MEGATRON)))
def test_megatron_names_a_family_that_it_does_not_know(tmp_path: Path, family: str, batch: TensorDict) -> None:
    path = write_family(tmp_path, family)
    with pytest.raises(RankFailedError, match=f"Unregistered model type: {family}, now only support"):
        run_ranks(family_scenarios.live, 1, (Layout(path), TROLL, batch, str(tmp_path)))


def test_megatron_refuses_a_scaling_of_positions_that_it_would_not_do(tmp_path: Path, batch: TensorDict) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    path = write_family(tmp_path, "qwen2", rope_parameters=rope)
    with pytest.raises(RankFailedError, match=r"CPU mode does not support rope_parameters=.*yarn"):
        run_ranks(family_scenarios.live, 1, (Layout(path), TROLL, batch, str(tmp_path)))


# Height and width of each sample's images; some samples have none.
SOME = {0: [(16, 16)], 2: [(8, 16)], 3: [(16, 8), (16, 16)], 6: [(24, 16)]}
EVERYWHERE: dict[int, list[tuple[int, int]]] = {
    sample: [(16, 16)] if sample % 2 else [(16, 8), (24, 16)] for sample in range(8)
}


@pytest.mark.parametrize(
    ("family", "images", "settings"),
    [
        ("qwen3_vl", SOME, {}),
        pytest.param("qwen3_vl", SOME, {"use_remove_padding": False}, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", SOME, {"use_dynamic_bsz": True, "max_token_len": 40}, marks=pytest.mark.slow),
        ("qwen2_5_vl", EVERYWHERE, {"use_remove_padding": False}),
    ],
    ids=["qwen3_vl", "qwen3_vl-padded", "qwen3_vl-dynamic", "qwen2_5_vl-padded"],
)
def test_vision(
    tmp_path: Path, batch: TensorDict, family: str, images: dict[int, Any], settings: dict[str, Any]
) -> None:
    path = write_vision(tmp_path / "model", family)
    batch = with_images(batch, path, images)
    result = fsdp_life(path, tmp_path / "checkpoint", batch, **settings)
    assert_life(result, path, tmp_path / "checkpoint" / "huggingface", batch)
    assert_resumed(result)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "use_remove_padding", "error"),
    [
        (SOME, False, "'BaseModelOutputWithPooling' object has no attribute 'mean'"),
        (EVERYWHERE, True, "name '_flash_use_top_left_mask' is not defined"),
    ],
    ids=["text alone", "without flash attention"],
)
def test_what_verl_itself_cannot_do_with_qwen2_5_vl(
    tmp_path: Path, batch: TensorDict, images: dict[int, Any], use_remove_padding: bool, error: str
) -> None:
    """Without TROLL, as docs/models.md says."""
    path = write_vision(tmp_path, "qwen2_5_vl")
    setup = Setup(path, None, micro_batch_size=1, use_remove_padding=use_remove_padding)
    with pytest.raises(RankFailedError, match=error):
        run_ranks(fsdp_scenarios.old_policies, 1, ([setup], with_images(batch, path, images)))


def test_lora(tmp_path: Path, batch: TensorDict) -> None:
    """The adapter and the merged export are both the trained policy."""
    path = write_family(tmp_path / "model", "qwen3")
    contents = ("model", "optimizer", "extra")
    result = fsdp_life(
        path, tmp_path / "checkpoint", batch, lora_rank=4, merge_lora=True, lr=0.03, save_contents=contents
    )
    assert_old_pass(result, path, batch)
    assert_updates(result, batch)
    assert_resumed(result)

    merged = load_file(Path(path, "model.safetensors"))
    merged["lm_head.weight"] = merged["model.embed_tokens.weight"]
    pairs = {name: weight for name, weight in result["adapter"].items() if "lora_A" in name}
    assert len(pairs) == 2 * 7, "layers, linear layers of each"
    for name, down in pairs.items():
        up = result["adapter"][name.replace("lora_A", "lora_B")]
        # verl's alpha divided by the rank.
        merged[name.removeprefix("base_model.model.").replace(".lora_A", "")] += 16 / 4 * up @ down
    assert_log_probs(result["after"], dense_log_probs(path, batch, merged), batch)
    assert result["saved"].keys() == merged.keys()
    for name, weight in merged.items():
        assert result["saved"][name].dtype == torch.bfloat16, "what verl sends merged weights in"
        torch.testing.assert_close(result["saved"][name], weight.bfloat16(), rtol=0.01, atol=1e-6, msg=name)
