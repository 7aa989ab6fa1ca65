"""Settings are checked on the driver, against verl's real Hydra configuration; errors name the key."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.workers.engine import EngineRegistry

from verl_troll.core.comparison import RULES
from verl_troll.plugin import backends
from verl_troll.plugin.settings import TrollConfig, TrollConfigError

TROLL = "actor_rollout_ref.actor.policy_loss.troll"
BASE = (
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.name=vllm",
)


@pytest.fixture(autouse=True)
def verl_config() -> Iterator[None]:
    with initialize_config_module("verl.trainer.config", version_base=None):
        yield


def build(*overrides: str, troll: bool = True, trainer: str = "ppo_trainer") -> Any:
    """The actor's settings, as verl builds them from a command line."""
    group = ("+troll=default",) if troll else ()
    config = compose(trainer, overrides=[*BASE, *group, *overrides])
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_group_switches_troll_on_with_the_published_defaults(strategy: str) -> None:
    actor = build(f"actor_rollout_ref.actor.strategy={strategy}")
    settings = actor.policy_loss.troll
    assert actor.policy_loss.loss_mode == "troll"
    assert actor.engine.troll is settings
    assert (settings.kl_bound, settings.alpha, settings.k, settings.dropped_mass) == (0.05, 1.0, 64, 1e-5)
    assert settings.max_log_ratio == 10
    assert (settings.support, settings.importance_ratio, settings.step_size_gradient) == ("union", "token", "implicit")
    assert (settings.reuse_logits, settings.kernels) == (True, "auto")


def test_without_the_group_nothing_changes() -> None:
    actor = build(troll=False)
    assert type(actor).__name__ == "FSDPActorConfig"
    assert not hasattr(actor.engine, "troll")


def test_settings_are_overridden_without_a_plus() -> None:
    settings = build(f"{TROLL}.kl_bound=0.01", f"{TROLL}.k=256", f"{TROLL}.support=anchored").policy_loss.troll
    assert (settings.kl_bound, settings.k, settings.support) == (0.01, 256, "anchored")
    settings = build(f"{TROLL}.reuse_logits=False", f"{TROLL}.kernels=torch").policy_loss.troll
    assert (settings.reuse_logits, settings.kernels) == (False, "torch")


@pytest.mark.parametrize("trainer", ["ppo_trainer", "ppo_megatron_trainer"])
def test_fused_kernels_are_accepted(trainer: str) -> None:
    assert build("actor_rollout_ref.model.use_fused_kernels=True", trainer=trainer).policy_loss.loss_mode == "troll"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("kl_bound", "0"),
        ("kl_bound", "-0.1"),
        ("kl_bound", ".nan"),
        ("kl_bound", ".inf"),
        ("kl_bound", "true"),
        ("kl_bound", "wide"),
        ("max_log_ratio", "0"),
        ("max_log_ratio", "80"),
        ("max_log_ratio", ".nan"),
        ("alpha", "-1"),
        ("alpha", ".inf"),
        ("k", "0"),
        ("k", "1.5"),
        ("k", "true"),
        ("k", "32767"),
        ("dropped_mass", "1"),
        ("dropped_mass", "-1e-5"),
        ("dropped_mass", ".nan"),
        ("support", "both"),
        ("importance_ratio", "word"),
        ("step_size_gradient", "off"),
        ("one_sided", "maybe"),
        ("reuse_logits", "maybe"),
        ("reuse_logits", "2"),
        ("kernels", "cuda"),
    ],
)
def test_value_out_of_range_is_refused_by_name(setting: str, value: str) -> None:
    with pytest.raises(InstantiationException) as error:
        build(f"{TROLL}.{setting}={value}")
    message = str(error.value.__cause__ or error.value)
    assert f"{TROLL}.{setting}=" in message
    assert "allowed is" in message


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
def test_every_trainer_of_verl_is_accepted(mode: str) -> None:
    assert build(f"trainer.v1.trainer_mode={mode}").engine.troll.host.trainer_mode == mode


@pytest.mark.parametrize("mode", ["sync", "colocate_async", "separate_async"])
@pytest.mark.parametrize("engine", ["vllm", "sglang", "hf"])
def test_every_trainer_takes_the_old_policy_from_every_engine_that_has_it(mode: str, engine: str) -> None:
    settings = support(f"trainer.v1.trainer_mode={mode}", f"actor_rollout_ref.rollout.name={engine}")
    assert settings.policy_loss.troll.host.bypass_mode


def support(*overrides: str) -> Any:
    """The actor's settings, with the old policy from the rollout engine."""
    return build("+troll=rollout_support", *overrides, troll=False)


def test_the_rollout_engine_is_asked_for_what_the_loss_is_set_to() -> None:
    rollout = compose(
        "ppo_trainer", overrides=[*BASE, "+troll=rollout_support", f"{TROLL}.k=9"]
    ).actor_rollout_ref.rollout
    assert rollout.custom.troll == {"k": 9, "dropped_mass": 1e-5}
    assert support(f"{TROLL}.k=9").policy_loss.troll.host.rollout.support_wanted == {"k": 9, "dropped_mass": 1e-5}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("algorithm.rollout_correction.bypass_mode=False", "algorithm.rollout_correction.bypass_mode"),
        ("trainer.v1.trainer_mode=mine", "trainer.v1.trainer_mode"),
        ("actor_rollout_ref.rollout.name=trtllm", "actor_rollout_ref.rollout.name"),
        ("actor_rollout_ref.rollout.top_p=0.95", "actor_rollout_ref.rollout.top_p"),
        ("actor_rollout_ref.rollout.top_k=50", "actor_rollout_ref.rollout.top_k"),
        ("+actor_rollout_ref.rollout.repetition_penalty=1.1", "actor_rollout_ref.rollout.repetition_penalty"),
        ("actor_rollout_ref.rollout.logprobs_mode=raw_logprobs", "actor_rollout_ref.rollout.logprobs_mode"),
        ("actor_rollout_ref.rollout.calculate_log_probs=False", "actor_rollout_ref.rollout.calculate_log_probs"),
        ("actor_rollout_ref.rollout.disaggregation.enabled=True", "actor_rollout_ref.rollout.disaggregation.enabled"),
        ("actor_rollout_ref.model.mtp.enable_rollout=True", "actor_rollout_ref.model.mtp.enable_rollout"),
        (
            "+actor_rollout_ref.rollout.engine_kwargs.vllm.speculative_config={method: ngram}",
            "actor_rollout_ref.rollout.engine_kwargs.vllm.speculative_config",
        ),
        (
            "'+actor_rollout_ref.rollout.engine_kwargs.vllm={speculative-config: {method: ngram}}'"[1:-1],
            "actor_rollout_ref.rollout.engine_kwargs.vllm.speculative_config",
        ),
        (
            "+actor_rollout_ref.rollout.engine_kwargs.vllm.logprobs_mode=raw_logprobs",
            "actor_rollout_ref.rollout.engine_kwargs.vllm.logprobs_mode",
        ),
        ("actor_rollout_ref.model.external_lib=[mine,verl_troll.plugin]", "actor_rollout_ref.model.external_lib"),
        ("algorithm.rollout_correction.rollout_is=token", "algorithm.rollout_correction.rollout_is"),
        ("algorithm.rollout_correction.rollout_rs=token_k1", "algorithm.rollout_correction.rollout_rs"),
    ],
)
def test_rollout_engine_that_cannot_give_the_old_policy_is_refused(override: str, key: str) -> None:
    with pytest.raises(InstantiationException) as error:
        support(override)
    message = str(error.value.__cause__ or error.value)
    assert f"{key}=" in message
    assert "allowed is" in message


def test_typo_is_refused() -> None:
    with pytest.raises(ConfigCompositionException):
        build(f"{TROLL}.kl_bund=0.1")
    with pytest.raises(InstantiationException, match="kl_bund"):
        build(f"+{TROLL}.kl_bund=0.1")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("trainer.v1.trainer_mode=mine", "trainer.v1.trainer_mode"),
        ("algorithm.rollout_correction.bypass_mode=True", "algorithm.rollout_correction.bypass_mode"),
        ("actor_rollout_ref.actor.pad_to_length=True", "actor_rollout_ref.actor.pad_to_length"),
        ("actor_rollout_ref.actor.fsdp_config.pad_to_length=True", "actor_rollout_ref.actor.fsdp_config.pad_to_length"),
        ("distillation.enabled=True", "distillation.enabled"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=vanilla", "actor_rollout_ref.actor.policy_loss.loss_mode"),
        ("actor_rollout_ref.model.external_lib=my_models", "actor_rollout_ref.model.external_lib"),
        ("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm", "actor_rollout_ref.actor.loss_scale_factor"),
        ("actor_rollout_ref.actor.strategy=fsdp_turbo", "actor_rollout_ref.actor.strategy"),
        ("model_engine=veomni", "actor_rollout_ref.actor.strategy"),
        ("model_engine=torchtitan", "actor_rollout_ref.actor.strategy"),
    ],
)
def test_unsupported_combination_is_refused_with_its_key(override: str, key: str) -> None:
    with pytest.raises(InstantiationException) as error:
        build(override)
    message = str(error.value.__cause__ or error.value)
    assert f"{key}=" in message
    assert "allowed is" in message


def refused(*overrides: str, group: str = "+troll=default") -> str:
    """What a run with these overrides is refused with."""
    with pytest.raises(InstantiationException) as error:
        build(group, *overrides, troll=False)
    return str(error.value.__cause__ or error.value)


def test_speculative_decoding_in_sglangs_own_settings_is_refused() -> None:
    engine = "actor_rollout_ref.rollout.engine_kwargs.sglang.speculative_algorithm"
    message = refused("actor_rollout_ref.rollout.name=sglang", f"+{engine}=EAGLE", group="+troll=rollout_support")
    assert message.startswith(f"{engine}='EAGLE' is not supported")
    # Another engine's settings, and neutral ones, are not read.
    support(f"+{engine}=EAGLE", "+actor_rollout_ref.rollout.engine_kwargs.vllm.speculative_config=null")
    # Nor are they without the group: sampled tokens are all that counts then.
    build("+actor_rollout_ref.rollout.engine_kwargs.vllm.speculative_config={method: ngram}")


def test_the_group_for_bypass_mode_is_named_only_where_it_would_be_accepted() -> None:
    bypass = "algorithm.rollout_correction.bypass_mode=True"
    advice = "write +troll=rollout_support in the place of"
    assert advice in refused(bypass)
    assert advice in refused(bypass, "actor_rollout_ref.rollout.name=sglang")
    assert advice in refused(bypass, "trainer.v1.trainer_mode=colocate_async")
    message = refused(bypass, "actor_rollout_ref.rollout.name=trtllm")
    assert message.startswith("algorithm.rollout_correction.bypass_mode=True")
    assert "rollout_support" not in message


def test_a_trainer_of_ones_own_is_not_told_to_compute_what_the_rollout_engine_supplies() -> None:
    mine = "trainer.v1.trainer_mode=mine"
    assert "must compute old log-probs in the actor" in refused(mine)
    message = refused(mine, group="+troll=rollout_support")
    assert message.startswith("trainer.v1.trainer_mode='mine'")
    assert "in the actor" not in message


def test_the_modules_to_load_are_those_of_the_group() -> None:
    mine = "actor_rollout_ref.model.external_lib=[mine]"
    assert "external_lib=[your.module,verl_troll.plugin]'" in refused(mine)
    both = "external_lib=[your.module,verl_troll.plugin,verl_troll.plugin.rollout]'"
    assert both in refused(mine, group="+troll=rollout_support")


@pytest.mark.parametrize("group", ["default", "rollout_support"])
def test_another_loss_is_told_to_leave_out_whatever_group_was_given(group: str) -> None:
    message = refused("actor_rollout_ref.actor.policy_loss.loss_mode=gspo", group=f"+troll={group}")
    assert "leave out +troll=..." in message


LOSSES = [("gspo", "default"), ("vanilla", "sequence"), ("cispo", "rollout_support")]


@pytest.mark.parametrize("trainer", ["ppo_trainer", "ppo_megatron_trainer"])
@pytest.mark.parametrize(("baseline", "variant"), LOSSES)
def test_two_losses_are_refused_in_either_order(trainer: str, baseline: str, variant: str) -> None:
    words = (f"+baseline={baseline}", f"+troll={variant}")
    for order in (words, words[::-1]):
        with pytest.raises(InstantiationException) as error:
            build(*order, troll=False, trainer=trainer)
        message = str(error.value.__cause__)
        assert f"+baseline={baseline}" in message and "+troll=" in message
        assert "Leave out one" in message


@pytest.mark.parametrize("loss", ["vanilla", "gspo", "null"])
@pytest.mark.parametrize("troll_first", [True, False])
def test_another_loss_mode_beside_the_group_is_refused_in_either_order(loss: str, troll_first: bool) -> None:
    words = ("+troll=default", f"actor_rollout_ref.actor.policy_loss.loss_mode={loss}")
    with pytest.raises(InstantiationException, match=r"policy_loss\.loss_mode=.* allowed is troll"):
        build(*(words if troll_first else words[::-1]), troll=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["troll=default"], r"use \+troll=default"),
        (["++troll=default"], "force-add of config groups is not supported"),
        (["+troll=defualt"], "Available options in 'troll':\n\tdefault"),
        (["+troll=Default"], "Available options in 'troll':\n\tdefault"),
        (["+troll=default", "+troll=sequence"], "Multiple values for troll"),
        (["+baseline=gsop"], "Available options in 'baseline'"),
        (["+baseline=gspo", "+baseline=cispo"], "Multiple values for baseline"),
    ],
)
def test_hydra_itself_refuses(words: list[str], message: str) -> None:
    with pytest.raises(HydraException, match=message):
        build(*words, troll=False)


def test_a_setting_in_the_wrong_place_is_refused() -> None:
    with pytest.raises(InstantiationException, match=r"troll=.*kl_bound.*: nothing reads this key"):
        build("+troll.kl_bound=0.01")


def test_searchpath_on_the_command_line_is_harmless() -> None:
    with_it, without = (
        compose("ppo_trainer", overrides=[*BASE, *more, "+troll=sequence"])
        for more in (["hydra.searchpath=[pkg://verl_troll.configs]"], [])
    )
    assert with_it == without


@pytest.mark.parametrize("trainer", ["ppo_trainer", "ppo_megatron_trainer"])
def test_the_driver_says_once_which_loss_trains(trainer: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1", f"{TROLL}.k=32"]
    config = compose(trainer, overrides=[*BASE, *more, "+troll=sequence"])
    validate_config(config, use_reference_policy=False, use_critic=False)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "TROLL" in line)
    assert line == (
        "TROLL is on: kl_bound=0.05, alpha=1.0, k=32, dropped_mass=1e-05, support=union, max_log_ratio=10.0, "
        "importance_ratio=sequence, step_size_gradient=implicit, one_sided=False, reuse_logits=True, kernels=auto, "
        "old policy from the actor"
    )
    # A worker builds the settings, too.
    omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert "TROLL" not in capsys.readouterr().out


def test_the_driver_says_that_the_rollout_engine_gives_the_old_policy(capsys: pytest.CaptureFixture[str]) -> None:
    support().validate(1, 1024)
    assert capsys.readouterr().out.endswith("old policy from the rollout engine\n")


MEGATRON = "actor_rollout_ref.actor.megatron"


def test_group_switches_troll_on_for_the_megatron_actor() -> None:
    parallel = ("tensor_model_parallel_size=4", "pipeline_model_parallel_size=2", "context_parallel_size=2")
    actor = build(*(f"{MEGATRON}.{size}" for size in parallel), trainer="ppo_megatron_trainer")
    assert actor.strategy == "megatron"
    assert actor.engine.tensor_model_parallel_size == 4
    assert actor.engine.troll is actor.policy_loss.troll


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"{MEGATRON}.pad_to_length=True", f"{MEGATRON}.pad_to_length"),
        (f"{MEGATRON}.dynamic_context_parallel=True", f"{MEGATRON}.dynamic_context_parallel"),
        ("actor_rollout_ref.model.mtp.enable=True", "actor_rollout_ref.model.mtp.enable"),
    ],
)
def test_what_the_megatron_actor_does_not_support_is_refused_with_its_key(override: str, key: str) -> None:
    more = [f"{MEGATRON}.max_seqlen_per_dp_cp_rank=1024"] if "dynamic" in key else []
    with pytest.raises(InstantiationException) as error:
        build(override, *more, trainer="ppo_megatron_trainer")
    message = str(error.value.__cause__ or error.value)
    assert f"{key}=" in message
    assert "allowed is" in message


def test_megatron_actor_without_megatron_core_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.BACKENDS, "megatron", replace(backends.BACKENDS["megatron"], engine=None))
    with pytest.raises(InstantiationException, match=r"Install megatron-core"):
        build(trainer="ppo_megatron_trainer")


def test_users_own_external_library_goes_beside_the_plugin() -> None:
    build("actor_rollout_ref.model.external_lib=[json,verl_troll.plugin]")


@pytest.mark.parametrize(
    "mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
def test_every_aggregation_mode_is_accepted(mode: str) -> None:
    build(f"actor_rollout_ref.actor.loss_agg_mode={mode}", "actor_rollout_ref.actor.loss_scale_factor=128")


def test_engine_of_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "npu")
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "unheard-of")
    with pytest.raises(InstantiationException, match="not on a TROLL engine"):
        build()


def test_engine_that_verl_has_for_npus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = EngineRegistry._engines["language_model"]["megatron"]
    monkeypatch.setitem(registered, "npu", registered["cuda"])  # MindSpeed, if installed
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "npu")
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "huawei")
    with pytest.raises(InstantiationException, match="not on a TROLL engine"):
        build(trainer="ppo_megatron_trainer")


@pytest.mark.parametrize("trainer", ["ppo_trainer", "ppo_megatron_trainer"])
@pytest.mark.parametrize("group", ["dense", "moe"])
def test_megatron_groups_compose_with_either_of_verls_configurations(trainer: str, group: str) -> None:
    overrides = (f"+megatron={group}", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4096")
    config = compose(trainer, overrides=[*BASE, *overrides, "+troll=default", f"{MEGATRON}.context_parallel_size=2"])
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert actor.engine.troll is actor.policy_loss.troll
    assert actor.engine.context_parallel_size == config.actor_rollout_ref.ref.megatron.context_parallel_size == 2
    assert actor.engine.expert_model_parallel_size == (8 if group == "moe" else 1)
    assert config.critic.strategy == "megatron"


def test_group_refers_only_to_keys_that_verl_has() -> None:
    config = compose("ppo_trainer", overrides=[*BASE, "+troll=default"])
    host = OmegaConf.to_container(config.actor_rollout_ref.actor.policy_loss.troll.host, resolve=True)
    assert host == {
        "_target_": "verl_troll.plugin.settings.HostSettings",
        "trainer_mode": "sync",
        "bypass_mode": False,
        "rollout": {
            "_target_": "verl_troll.plugin.settings.RolloutSettings",
            "name": "vllm",
            "top_p": 1,
            "top_k": -1,
            "repetition_penalty": 1.0,
            "logprobs_mode": "processed_logprobs",
            "calculate_log_probs": True,
            "disaggregation": False,
            "speculative_decoding": False,
            "engine_kwargs": {"vllm": {}, "sglang": {}, "trtllm": {}},
            "support_wanted": None,
            "correction_weights": None,
            "correction_rejection": None,
        },
        "distillation": False,
        "multi_token_prediction": False,
        "external_lib": "verl_troll.plugin",
        "baseline": None,
        "misplaced": None,
    }


def test_a_new_rule_of_the_core_is_a_value_of_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrollConfigError, match="support='made_up': allowed is one of union, anchored"):
        TrollConfig(support="made_up")
    monkeypatch.setitem(RULES, "made_up", RULES["anchored"])
    assert TrollConfig(support="made_up").support == "made_up"
