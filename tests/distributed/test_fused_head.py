"""``use_fused_kernels`` with TROLL on verl's real engines: same results from hidden states as from logits.

verl replaces the forward function of a model's class for the whole process, so each launch uses one kind only.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from verl.utils.experimental.torch_functional import FusedLinearForPPO, FusedLinearForPPOFunction
from verl.utils.kernel import linear_cross_entropy as kernel

from tests.distributed import batches, fsdp_scenarios, megatron_scenarios, megatron_stock
from tests.distributed.fsdp_scenarios import Setup
from tests.distributed.launch import run_ranks
from tests.distributed.megatron_stock import Layout
from tests.distributed.test_fsdp_engine import LAST_PLACE, METHODS, assert_same
from tests.distributed.test_megatron_engine import ANCHORED, LR, UNION, run
from tests.distributed.test_megatron_engine import assert_same as assert_same_training
from verl_troll.plugin.engines import fused_head

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fsdp_scenarios.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Embedding and output layer share weights: verl's own fused path on FSDP2 cannot read separate ones."""
    return megatron_stock.write_model(tmp_path_factory.mktemp("tied"), "qwen2", layers=2, tie=True)


@pytest.fixture(scope="module")
def batch() -> TensorDict:
    return batches.make_batch()


# --- FSDP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "methods", [("union", "anchored"), pytest.param(("sequence", "detached"), marks=slow)], ids="-".join
)
def test_loss_gradient_and_metrics_are_those_without_fused_kernels(
    model_path: str, batch: TensorDict, methods: tuple[str, ...]
) -> None:
    common: dict[str, Any] = {"use_kl_loss": True, "entropy_coeff": 0.01, "micro_batch_size": 8}
    whole = [Setup(model_path, METHODS[method], **common) for method in methods]
    references = run_ranks(fsdp_scenarios.each, 1, (whole, batch))[0]
    assert 0.05 < references[0]["metrics"]["troll/projected_share"] < 0.95
    fused = [replace(setup, use_fused_kernels=True) for setup in whole]
    cuts: list[dict[str, Any]] = [
        {"micro_batch_size": 4},
        {"use_dynamic_bsz": True, "max_token_len": 24},
        {"use_remove_padding": False, "micro_batch_size": 4},
        # verl's Triton kernel needs a GPU; TROLL's reading, which replaces it, does not.
        {"fused_backend": "triton", "micro_batch_size": 2},
        # verl falls back to torch where liger_kernel is missing; TROLL's reading replaces both.
        {"fused_backend": "liger", "micro_batch_size": 2},
    ]
    for ranks in (1, 2):
        chosen = [replace(setup, **cut) for cut in cuts for setup in fused]
        for rank in run_ranks(fsdp_scenarios.each, ranks, (chosen, batch)):
            for index, result in enumerate(rank):
                assert result["engine"] == "TrollFSDPEngine"
                reference = references[index % len(fused)]
                assert_same(result, reference)
                for name in ("kl_loss", "actor/entropy_loss"):
                    assert result["metrics"][name] == pytest.approx(reference["metrics"][name], rel=1e-4), name


def test_sequence_parallel_ranks_agree_with_one_rank(tmp_path: Path, batch: TensorDict) -> None:
    whole = Setup(fsdp_scenarios.write_model(tmp_path, attention=False), METHODS["union"], entropy_coeff=0.01)
    reference = run_ranks(fsdp_scenarios.each, 1, ([whole], batch))[0][0]
    for rank in run_ranks(fsdp_scenarios.each, 2, ([replace(whole, ulysses=2, use_fused_kernels=True)], batch)):
        # What attention sees differs by rank, and so does the gradient of the weights that mask it out.
        assert_same(rank[0], reference, skip="self_attn")


def test_old_pass_gives_verls_log_probs_entropy_and_the_same_support(model_path: str, batch: TensorDict) -> None:
    plain = [Setup(model_path, None), Setup(model_path, METHODS["union"])]
    stock, dense = run_ranks(fsdp_scenarios.old_policies, 1, (plain, batch))[0]
    fused = [replace(plain[1], use_fused_kernels=True, use_remove_padding=packed) for packed in (True, False)]
    packed, padded = run_ranks(fsdp_scenarios.old_policies, 1, (fused, batch))[0]
    for ours in (packed, padded):
        assert set(ours) == set(dense)
    for sample, mask in enumerate(batch["response_mask"].unbind()):
        window = slice(-len(mask) - 1, -1)
        for found in (packed, padded):
            for name in ("log_probs", "entropy"):
                own, expected = found[name][sample][window], stock[name][sample][window]
                torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5, msg=f"{name} of {sample}")
        for ours in (packed, padded):
            for name in ("troll_old_counts", "troll_old_ids"):
                assert torch.equal(ours[name][sample], dense[name][sample]), (name, sample)
            own, expected = ours["troll_old_log_probs"][sample], dense["troll_old_log_probs"][sample]
            torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


def test_an_unchanged_policy_is_inside_the_region(model_path: str, batch: TensorDict) -> None:
    """The two passes multiply blocks of different heights, so the ratio is 1 only up to rounding."""
    setups = [Setup(model_path, METHODS[name], use_fused_kernels=True) for name in ("union", "anchored")]
    for result in run_ranks(fsdp_scenarios.each, 1, (setups, batch, 0.0))[0]:
        metrics = result["metrics"]
        assert metrics["troll/kl_before_max"] < 1e-9
        assert metrics["troll/projected_share"] == 0
        assert metrics["troll/regression_loss"] == 0
        # A mean of differences of log-probabilities, each of which may be off by one unit in the last place.
        assert metrics["actor/ppo_kl"] == pytest.approx(0, abs=LAST_PLACE)


def test_without_settings_the_fused_path_is_verls_own(tied: str, batch: TensorDict) -> None:
    stock, own = (
        run_ranks(fsdp_scenarios.old_policies, 1, ([Setup(tied, None, use_fused_kernels=fused)], batch))[0][0]
        for fused in (False, True)
    )
    assert set(own) == set(stock) == {"log_probs", "entropy"}
    for name in own:
        for sample, mask in enumerate(batch["response_mask"].unbind()):
            window = slice(-len(mask) - 1, -1)
            torch.testing.assert_close(own[name][sample][window], stock[name][sample][window], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
def test_gradient_of_the_entropy_bonus_is_verls_own(model_path: str, batch: TensorDict, fused: bool) -> None:
    """Without advantages and regression only the entropy is left; verl's own path is the one without fused kernels."""
    still = batch.clone()
    still["advantages"] = torch.nested.nested_tensor_from_jagged(
        torch.zeros_like(batch["advantages"].values()), batch["advantages"].offsets()
    )
    vanilla = Setup(model_path, None, entropy_coeff=1.0)
    reference = run_ranks(fsdp_scenarios.each, 1, ([vanilla], still))[0][0]
    troll = [
        replace(vanilla, troll={**METHODS[name], "alpha": 0.0}, use_fused_kernels=fused)
        for name in ("union", "anchored")
    ]
    for result in run_ranks(fsdp_scenarios.each, 1, (troll, still))[0]:
        assert_same(result, reference)
        expected = reference["metrics"]["actor/entropy_loss"]
        assert result["metrics"]["actor/entropy_loss"] == pytest.approx(expected, rel=1e-5)


def test_lora(tied: str, batch: TensorDict) -> None:
    """The pass without the adapter equals the reference pass, and verl's own."""
    setup = Setup(tied, METHODS["union"], lora_rank=4)
    plain = run_ranks(fsdp_scenarios.lora_passes, 1, (setup, batch))[0]
    fused = run_ranks(fsdp_scenarios.lora_passes, 1, (replace(setup, use_fused_kernels=True), batch))[0]
    assert fused["old_fields"] == plain["old_fields"]
    assert fused["reference_fields"] == ["log_probs"]
    torch.testing.assert_close(fused["reference"], plain["reference"], rtol=1e-5, atol=1e-5)
    assert fused["moved"] == pytest.approx(plain["moved"], rel=1e-3)
    assert fused["trained"] == plain["trained"]
    assert fused["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)


def test_half_precision_stays_in_the_region(model_path: str, batch: TensorDict) -> None:
    for method in ("union", "anchored"):
        setup = Setup(model_path, METHODS[method], param_dtype="bf16", lr=1e-2, use_fused_kernels=True)
        history = run_ranks(fsdp_scenarios.train_steps, 2, (setup, batch, 3))[0]
        assert all(torch.isfinite(torch.tensor(list(step.values()))).all() for step in history)
        assert history[-1]["troll/kl_before"] > 0.05
        assert history[-1]["troll/kl_after_max"] <= 0.05 * (1 + 1e-5)


def test_update_without_the_support_says_what_is_missing(model_path: str, batch: TensorDict) -> None:
    setup = Setup(model_path, use_fused_kernels=True)
    error = run_ranks(fsdp_scenarios.update_without_support, 1, (setup, batch))[0]
    assert error.startswith("MissingSupportError")


SIZES: dict[str, Any] = dict(
    vocab_size=batches.VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)
# Models whose head is more than a matrix product, and what the refusal must name.
HEADS: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({"head_dim": 8, "final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "phi": ({}, "a bias"),
    "cohere": ({"logit_scale": 0.25}, "logit_scale"),
    "granite": ({"logits_scaling": 8.0}, "logits_scaling"),
}


def test_heads_that_are_more_than_a_product_are_refused_by_name(tmp_path: Path, batch: TensorDict) -> None:
    paths = {}
    for kind, (more, _) in HEADS.items():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more}), dtype=torch.float32)
        model.save_pretrained(tmp_path / kind)
        paths[kind] = str(tmp_path / kind)
    errors = run_ranks(fsdp_scenarios.refused_heads, 1, (paths, batch))[0]
    for kind, (_, named) in HEADS.items():
        assert f"use_fused_kernels=True: the head of {kind} also has {named}, which" in errors[kind]
        assert "Set it to False" in errors[kind]


# --- the patch --------------------------------------------------------------------------------------------------------


def test_outside_of_a_reading_verls_fused_path_is_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 7, 5, generator=generator), torch.randn(11, 5, generator=generator)
    ids = torch.randint(0, 11, (1, 7), generator=generator)
    own = FusedLinearForPPOFunction.apply(hidden, weight, ids, 0.7)
    calls: list[tuple[Tensor, Tensor, float]] = []

    def reader(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return torch.ones(1, 7, 3)

    def outside() -> None:
        found = FusedLinearForPPO()(hidden, weight, ids, 0.7)
        assert all(torch.equal(a, b) for a, b in zip(found, own, strict=True))
        # verl's kernel needs a GPU.
        with pytest.raises(RuntimeError, match="NVTX"):
            kernel.linear_cross_entropy(hidden[0], weight, ids[0], 0.7, "none")

    outside()
    with fused_head.reading(reader):
        for found, entropy in (
            FusedLinearForPPO()(hidden, weight, ids, 0.7),
            kernel.linear_cross_entropy(hidden, weight, ids, 0.7, "none", None),
        ):
            assert found.shape == (1, 7, 3)
            assert entropy is None
    assert len(calls) == 2
    for arguments in calls:
        assert arguments[0] is hidden
        assert arguments[1] is weight
        assert arguments[2] == 0.7
    with pytest.raises(ZeroDivisionError), fused_head.reading(lambda *_: torch.ones(1 // 0)):
        FusedLinearForPPO()(hidden, weight, ids, 0.7)
    outside()


# --- Megatron ---------------------------------------------------------------------------------------------------------

LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [
        {"tensor": 2},
        {"tensor": 2, "sequence_parallel": False},
        {"context": 2},
        {"pipeline": 2},
        {"pipeline": 2, "virtual_pipeline": 2},
    ],
}
MORE: dict[int, list[dict[str, Any]]] = {
    1: [{"micro_batch_size": 8}, {"use_dynamic_bsz": True, "max_token_len": 24}],
    2: [{}, {"tensor": 2, "use_distributed_optimizer": False}],
    4: [{"tensor": 2, "context": 2}, {"tensor": 4}, {"tensor": 2, "pipeline": 2, "sequence_parallel": False}],
}


def check_layouts(
    path: str, method: dict[str, Any], batch: TensorDict, layouts: dict[int, list[dict[str, Any]]]
) -> None:
    """Fused training in every layout, compared with one rank without fused kernels."""
    settings = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k2", "entropy_coeff": 0.01}
    batch = batch.exclude("rollout_is_weights")
    base = Layout(path, lr=LR[method["support"]])
    (reference,) = run([base], method, batch, 1, **settings)
    assert 0.05 < reference["history"][-1]["troll/projected_share"] < 0.95
    for ranks, chosen in layouts.items():
        cases = [replace(base, use_fused_kernels=True, **layout) for layout in chosen]
        for layout, result in zip(chosen, run(cases, method, batch, ranks, **settings), strict=True):
            assert result["engine"] == "TrollMegatronEngine"
            assert_same_training(result, reference, (ranks, layout))
            entropies = [
                torch.cat([row["entropy"] for _, row in sorted(found["old"].items())]) for found in (result, reference)
            ]
            assert torch.equal(*(values != 0 for values in entropies))
            torch.testing.assert_close(*entropies, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "method", "layouts"),
    [
        pytest.param("qwen3", ANCHORED, LAYOUTS, id="anchored"),
        pytest.param("qwen3", ANCHORED, MORE, id="anchored-more", marks=slow),
        pytest.param("qwen2", UNION, LAYOUTS, id="union", marks=slow),
        pytest.param("qwen2", UNION, MORE, id="union-more", marks=slow),
    ],
)
def test_megatron_layouts_agree_with_one_rank_without_fused_kernels(
    tmp_path: Path, batch: TensorDict, kind: str, method: dict[str, Any], layouts: dict[int, list[dict[str, Any]]]
) -> None:
    check_layouts(megatron_stock.write_model(tmp_path, kind), method, batch, layouts)


@slow
def test_megatron_weights_that_are_the_embeddings(tmp_path: Path, batch: TensorDict) -> None:
    path = megatron_stock.write_model(tmp_path, "qwen3", tie=True)
    check_layouts(path, ANCHORED, batch, {1: [{}], 2: [{"tensor": 2}, {"pipeline": 2}]})


@slow
def test_megatron_experts(tmp_path: Path, batch: TensorDict) -> None:
    path = megatron_stock.write_model(tmp_path, "qwen3_moe")
    check_layouts(path, ANCHORED, batch, {2: [{"expert": 2}, {"tensor": 2, "expert": 2, "expert_tensor": 1}]})


@pytest.mark.parametrize("method", [UNION, pytest.param(ANCHORED, marks=slow)], ids=["union", "anchored"])
def test_megatron_padded_vocabulary_counts_for_nothing(
    tmp_path: Path, batch: TensorDict, method: dict[str, Any]
) -> None:
    path = megatron_stock.write_model(tmp_path, "qwen3")
    batch = batch.exclude("rollout_is_weights")
    base = Layout(path, lr=LR[method["support"]])
    (reference,) = run([base], method, batch, 1)
    for tensor in (1, 2):
        layout = replace(base, tensor=tensor, use_fused_kernels=True)
        result = run_ranks(megatron_scenarios.train_with_padding, tensor, (layout, method, batch))[0]
        assert_same_training(result, reference, tensor)
        assert result["padding_moved"] == 0
