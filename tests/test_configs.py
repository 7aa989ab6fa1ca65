"""The configuration layers compose with verl's real Hydra configuration into settings that verl accepts."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config

from verl_troll.plugin.settings import TrollConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ACTOR = "actor_rollout_ref.actor"


@dataclass(frozen=True)
class Estimator:
    """What ``+estimator=`` sets, and the losses it is used with."""

    adv_estimator: str
    sets: dict[str, Any]
    troll: str = "troll=default"
    clipped: str = "baseline=vanilla"


GROUPS_OF_8 = {"actor_rollout_ref.rollout.n": 8}
KL_IN_REWARD = {
    "algorithm.use_kl_in_reward": True,
    "algorithm.kl_penalty": "kl",
    "algorithm.kl_ctrl.kl_coef": 0.001,
}
ESTIMATORS = {
    "grpo": Estimator(
        "grpo",
        {**GROUPS_OF_8, "algorithm.norm_adv_by_std_in_grpo": True, f"{ACTOR}.loss_agg_mode": "token-mean"},
    ),
    "dr_grpo": Estimator(
        "grpo",
        {
            **GROUPS_OF_8,
            "algorithm.norm_adv_by_std_in_grpo": False,
            f"{ACTOR}.loss_agg_mode": "seq-mean-token-sum-norm",
            f"{ACTOR}.loss_scale_factor": 768,
            f"{ACTOR}.use_kl_loss": False,
        },
    ),
    "gspo": Estimator(
        "grpo",
        {
            **GROUPS_OF_8,
            "algorithm.norm_adv_by_std_in_grpo": True,
            f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean",
        },
        troll="troll=sequence",
        clipped="baseline=gspo",
    ),
    "reinforce_plus_plus": Estimator("reinforce_plus_plus", {**GROUPS_OF_8, **KL_IN_REWARD, "algorithm.gamma": 1.0}),
    "rloo": Estimator("rloo", {**GROUPS_OF_8, **KL_IN_REWARD}),
    "ppo": Estimator(
        "gae",
        {
            **GROUPS_OF_8,
            "algorithm.gamma": 1.0,
            "algorithm.lam": 1.0,
            "critic.optim.lr": 1e-5,
            "critic.cliprange_value": 0.5,
        },
    ),
}
# What `+baseline=` sets under the actor besides loss_mode.
RIVALS: dict[str, dict[str, Any]] = {
    "vanilla": {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0},
    "gspo": {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4, "loss_agg_mode": "seq-mean-token-mean"},
    "cispo": {"clip_ratio_low": 10.0, "clip_ratio_high": 0.2},
    "dppo_kl": {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05, "clip_ratio_c": 1e4},
    "dppo_tv": {"clip_ratio_low": 0.15, "clip_ratio_high": 0.15, "clip_ratio_c": 1e4},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05, "loss_agg_mode": "seq-mean-token-mean"},
    "geo_mean": {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4},
    "clip_cov": {
        "clip_ratio_low": 1.0,
        "clip_ratio_high": 1.0,
        "policy_loss.clip_cov_ratio": 0.0002,
        "policy_loss.clip_cov_lb": 1.0,
        "policy_loss.clip_cov_ub": 5.0,
    },
    "kl_cov": {"policy_loss.kl_cov_ratio": 0.002, "policy_loss.ppo_kl_coef": 1.0},
}
# What `+size=` sets: offload, tensor-parallel sizes of the Megatron actor (None: the group's own) and of the rollout.
SIZES = {
    "0_6b": (False, None, 1),
    "1_7b": (False, None, 1),
    "4b": (False, None, 1),
    "8b": (True, None, 2),
    "14b": (True, None, 4),
    "30b_a3b": (True, 1, 4),
    "235b_a22b": (True, 4, 8),
}
ENGINES = ("fsdp=default", "megatron=dense", "megatron=moe")
INFERENCE = ("vllm", "sglang")
LOSSES = sorted({(name, loss) for name, one in ESTIMATORS.items() for loss in (one.troll, one.clipped)})
LOSSES += [("grpo", f"baseline={name}") for name in RIVALS if name != "vanilla"]
LOSSES += [("grpo", "troll=published")]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


@pytest.fixture(autouse=True)
def verl_config() -> Iterator[None]:
    with initialize_config_module("verl.trainer.config", version_base=None):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a configuration and a tokenizer, which verl reads to build a critic's settings."""
    from tests.trainer.run import make_assets

    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    return f"{folder}/model"


def composed(*overrides: str) -> Any:
    return compose("ppo_trainer", overrides=list(overrides))


def checked(config: Any) -> Any:
    """The actor's settings, after verl's own check of the whole run.

    Raises:
        Exception: whatever verl raises for a configuration it does not accept.
    """
    validate_config(config, need_reference_policy(config), need_critic(config))
    omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor)


def test_tables_here_name_every_file() -> None:
    assert options("estimator") == sorted(ESTIMATORS)
    assert options("baseline") == sorted(RIVALS)
    assert options("size") == sorted(SIZES)
    assert options("inference") == sorted(INFERENCE)


# The engine and what a run needs besides. Without `+fsdp` or `+megatron`: verl's defaults, as in a user's own script.
BARE: tuple[str, ...] = (
    f"{ACTOR}.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
)
BARE += ("actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4", "data.max_response_length=768")
HOSTS = {
    "fsdp": ("+fsdp=default", "+inference=vllm"),
    "megatron": ("+megatron=dense", "+inference=vllm"),
    "verl": ("actor_rollout_ref.rollout.name=vllm",),
    "verl-megatron": ("model_engine=megatron", "actor_rollout_ref.rollout.name=vllm"),
    "cpu": ("+cpu=default",),
    "cpu-fsdp": ("+fsdp=default", "+cpu=default"),
    "cpu-megatron": ("+megatron=dense", "+cpu=megatron", "trainer.n_gpus_per_node=2"),
}


def in_ci(host: str, loss: str) -> bool:
    """TROLL on both engines, other losses on one."""
    return host == "fsdp" or (host == "megatron" and loss.startswith("troll="))


@pytest.mark.parametrize(
    ("host", "estimator", "loss"),
    [
        pytest.param(host, estimator, loss, marks=() if in_ci(host, loss) else pytest.mark.slow)
        for host, (estimator, loss) in itertools.product(HOSTS, LOSSES)
    ],
)
def test_every_estimator_and_loss_sets_what_it_names(host: str, estimator: str, loss: str, model: str) -> None:
    more = [f"actor_rollout_ref.model.path={model}", *BARE]
    config = composed(*HOSTS[host], f"+estimator={estimator}", f"+{loss}", *more)
    actor = checked(config)

    group, _, option = loss.partition("=")
    expected = {"algorithm.adv_estimator": ESTIMATORS[estimator].adv_estimator, **ESTIMATORS[estimator].sets}
    expected |= {f"{ACTOR}.{key}": value for key, value in RIVALS.get(option, {}).items() if group == "baseline"}
    for key, value in expected.items():
        assert OmegaConf.select(config, key) == value, key
    if group == "troll":
        assert actor.policy_loss.loss_mode == "troll"
        assert isinstance(actor.engine.troll, TrollConfig)
        assert actor.engine.troll.importance_ratio == ("sequence" if estimator == "gspo" else "token")
    else:
        assert actor.policy_loss.loss_mode == config.baseline_loss == option
        assert not hasattr(actor.engine, "troll")
    assert actor.strategy == ("megatron" if "megatron" in host else "fsdp" if host == "verl" else "fsdp2")
    assert need_critic(config) == (estimator == "ppo")
    assert need_reference_policy(config) == (estimator in ("rloo", "reinforce_plus_plus"))
    if estimator == "ppo":
        critic = omega_conf_to_dataclass(config.critic)
        assert critic.model.path == model
        assert critic.ppo_micro_batch_size_per_gpu == actor.ppo_micro_batch_size_per_gpu == 4
        assert critic.ppo_max_token_len_per_gpu == actor.ppo_max_token_len_per_gpu


def all_pairs(axes: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Few rows with one value per axis, in which every pair of values of two axes occurs."""
    places = list(itertools.combinations(range(len(axes)), 2))
    missing = {(i, a, j, b) for i, j in places for a in axes[i] for b in axes[j]}

    def new(row: tuple[str, ...]) -> set[tuple[int, str, int, str]]:
        return {(i, row[i], j, row[j]) for i, j in places} & missing

    rows = []
    while missing:
        rows.append(max(itertools.product(*axes), key=lambda row: len(new(row))))
        missing -= new(rows[-1])
    return rows


METHODS = ("grpo,troll=default", "gspo,troll=sequence", "ppo,troll=default", "rloo,baseline=vanilla")
LAYERS: tuple[Sequence[str], ...] = (ENGINES, list(SIZES), INFERENCE, METHODS, options("task"))


def check_layers(engine: str, size: str, inference: str, method: str, task: str, *, model: str) -> None:
    estimator, loss = method.split(",")
    nodes = 8 if engine == "megatron=moe" else 1
    config = composed(
        f"+{engine}",
        f"+size={size}",
        f"+inference={inference}",
        f"+estimator={estimator}",
        f"+{loss}",
        f"+task={task}",
        f"actor_rollout_ref.model.path={model}",
        f"trainer.nnodes={nodes}",
    )
    actor = checked(config)
    offload, tensor_parallel, rollout_parallel = SIZES[size]
    rollout = config.actor_rollout_ref.rollout
    assert actor.engine.param_offload == actor.engine.optimizer_offload == offload
    assert actor.use_dynamic_bsz
    assert actor.ppo_max_token_len_per_gpu == rollout.log_prob_max_token_len_per_gpu
    # verl raises in the first step if a sequence does not fit.
    assert actor.ppo_max_token_len_per_gpu >= config.data.max_prompt_length + config.data.max_response_length
    assert (rollout.name, rollout.tensor_model_parallel_size) == (inference, rollout_parallel)
    # The trust region is around the policy that sampled.
    assert (rollout.temperature, rollout.top_p, rollout.top_k) == (1.0, 1, -1)
    assert actor.policy_loss.loss_mode == ("troll" if loss.startswith("troll") else loss.partition("=")[2])
    if engine == "fsdp=default":
        assert actor.strategy == config.critic.strategy == config.actor_rollout_ref.ref.strategy == "fsdp2"
        return
    assert actor.engine.tensor_model_parallel_size == (
        tensor_parallel or {"megatron=dense": 2, "megatron=moe": 1}[engine]
    )
    assert actor.engine.override_transformer_config["recompute_granularity"] == ("full" if offload else None)
    assert actor.engine.expert_model_parallel_size == (8 if engine == "megatron=moe" else 1)
    for follower in (config.actor_rollout_ref.ref.megatron, config.critic.megatron):
        for name in ("tensor", "pipeline", "context", "expert"):
            key = f"{name}_{'model_' if name != 'context' else ''}parallel_size"
            assert follower[key] == getattr(actor.engine, key), key
        assert follower.expert_tensor_parallel_size == actor.engine.expert_tensor_parallel_size
        assert follower.param_offload == offload


@pytest.mark.parametrize("row", all_pairs(LAYERS), ids=" ".join)
def test_any_two_layers_go_together(row: tuple[str, ...], model: str) -> None:
    check_layers(*row, model=model)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_all_layers_go_together(engine: str, model: str) -> None:
    for row in itertools.product(*LAYERS[1:]):
        check_layers(engine, *row, model=model)


def flat(node: Any, prefix: str = "") -> set[str]:
    if not isinstance(node, dict):
        return {prefix}
    return set().union(*(flat(value, f"{prefix}.{key}" if prefix else key) for key, value in node.items()))


def test_only_the_loss_overrides_what_another_layer_sets() -> None:
    sets: dict[str, set[str]] = {}
    for layer, groups in {
        "engine": ("fsdp", "megatron"),
        "size": ("size",),
        "inference": ("inference",),
        "estimator": ("estimator",),
        "loss": ("troll", "baseline"),
        "task": ("task",),
    }.items():
        sets[layer] = set()
        for path in (path for group in groups for path in (CONFIGS / group).glob("*.yaml")):
            written: Any = OmegaConf.to_container(OmegaConf.load(path))
            written.pop("defaults", None)
            sets[layer] |= flat(written)
    shared = {
        (first, second): sets[first] & sets[second]
        for first, second in itertools.combinations(sets, 2)
        if sets[first] & sets[second]
    }
    assert shared == {("estimator", "loss"): {f"{ACTOR}.loss_agg_mode"}}


def test_order_of_the_layers_does_not_matter(model: str) -> None:
    layers = ["+megatron=moe", "+size=30b_a3b", "+inference=sglang", "+estimator=ppo", "+troll=default"]
    layers += [f"+task={options('task')[0]}"]
    results = []
    for order in (layers, layers[::-1]):
        config = composed(*order, f"actor_rollout_ref.model.path={model}")
        results.append(OmegaConf.to_container(config, resolve=True))
    assert results[0] == results[1]


def test_published_aggregation_of_a_loss_wins_over_the_estimators() -> None:
    config = composed("+estimator=dr_grpo", "+baseline=gspo", "actor_rollout_ref.rollout.name=vllm")
    assert config.actor_rollout_ref.actor.loss_agg_mode == "seq-mean-token-mean"


def test_a_setting_on_the_command_line_wins_wherever_it_stands() -> None:
    settings = [f"{ACTOR}.clip_ratio_high=0.28", f"{ACTOR}.ppo_max_token_len_per_gpu=4096"]
    settings += ["actor_rollout_ref.rollout.n=16", "actor_rollout_ref.rollout.tensor_model_parallel_size=1"]
    layers = ["+fsdp=default", "+size=8b", "+inference=vllm", "+estimator=grpo", "+baseline=vanilla"]
    for overrides in ([*settings, *layers], [*layers, *settings]):
        config = composed(*overrides)
        assert config.actor_rollout_ref.actor.clip_ratio_high == 0.28
        assert config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu == 4096
        assert (config.actor_rollout_ref.rollout.n, config.actor_rollout_ref.rollout.tensor_model_parallel_size) == (
            16,
            1,
        )


def test_dr_grpo_divides_by_the_response_length_of_the_task() -> None:
    config = composed("+estimator=dr_grpo", "data.max_response_length=4321", "actor_rollout_ref.rollout.name=vllm")
    assert config.actor_rollout_ref.actor.loss_scale_factor == 4321


PUBLISHED_LOSS = {
    "kl_bound": 0.05,
    "alpha": 1.0,
    "k": 64,
    "dropped_mass": 1e-5,
    "support": "union",
    "max_log_ratio": 10.0,
    "importance_ratio": "token",
    "step_size_gradient": "implicit",
    "one_sided": False,
}
PUBLISHED_TRAINER = {
    "data.train_batch_size": 256,
    "data.max_prompt_length": 2048,
    "data.max_response_length": 4096,
    f"{ACTOR}.ppo_mini_batch_size": 32,
    f"{ACTOR}.ppo_epochs": 1,
    f"{ACTOR}.loss_agg_mode": "token-mean",
    f"{ACTOR}.use_kl_loss": False,
    f"{ACTOR}.entropy_coeff": 0,
    f"{ACTOR}.optim.lr": 1e-6,
    f"{ACTOR}.optim.weight_decay": 0,
    f"{ACTOR}.optim.lr_scheduler_type": "constant",
    f"{ACTOR}.optim.lr_warmup_steps_ratio": 0,
    f"{ACTOR}.optim.clip_grad": 1,
    "algorithm.adv_estimator": "grpo",
    "algorithm.norm_adv_by_std_in_grpo": True,
    "algorithm.use_kl_in_reward": False,
    "actor_rollout_ref.rollout.n": 8,
    "actor_rollout_ref.rollout.temperature": 1,
    "actor_rollout_ref.rollout.top_p": 1,
    "actor_rollout_ref.rollout.top_k": -1,
    "actor_rollout_ref.rollout.val_kwargs.do_sample": False,
    "actor_rollout_ref.rollout.val_kwargs.temperature": 0,
    "actor_rollout_ref.rollout.val_kwargs.n": 1,
    "trainer.test_freq": 10,
    "trainer.total_training_steps": 1001,
    "trainer.val_before_train": False,
}


def recipe_of_the_authors() -> tuple[list[str], dict[str, list[str]]]:
    """The overrides of the command in docs/recipes.md, and those of its other arms."""
    section = (CONFIGS.parent / "docs" / "recipes.md").read_text().partition("\n## As the authors ran it\n")[2]
    section = section.partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("    ")]
    words = shlex.split(" ".join(line.rstrip("\\") for line in lines))
    assert words[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ") and "`" in line]
    return words[3:], {name: arm.strip("`").split() for name, arm in rows}


def test_recipe_of_the_authors_sets_what_their_configuration_sets(model: str) -> None:
    recipe, arms = recipe_of_the_authors()
    path = f"actor_rollout_ref.model.path={model}"
    config = composed(*recipe, path)
    actor = checked(config)
    assert {name: getattr(actor.policy_loss.troll, name) for name in PUBLISHED_LOSS} == PUBLISHED_LOSS
    assert {key: OmegaConf.select(config, key) for key in PUBLISHED_TRAINER} == PUBLISHED_TRAINER

    replaced = {"+estimator=grpo", "+troll=published"}
    assert replaced < set(recipe)
    shared = [word for word in recipe if word not in replaced]
    clip, gspo, gspo_troll = (checked(composed(*shared, *arm, path)) for arm in arms.values())
    assert (clip.policy_loss.loss_mode, clip.clip_ratio_low, clip.clip_ratio_high, clip.clip_ratio_c) == (
        "vanilla",
        0.2,
        0.2,
        10,
    )
    assert (gspo.policy_loss.loss_mode, gspo.clip_ratio_low, gspo.clip_ratio_high) == ("gspo", 0.2, 0.2)
    assert (gspo_troll.policy_loss.troll.importance_ratio, gspo_troll.loss_agg_mode) == ("sequence", "token-mean")


def test_published_is_written_out_and_does_not_follow_the_defaults() -> None:
    written = OmegaConf.load(CONFIGS / "troll" / "published.yaml")
    assert OmegaConf.select(written, f"{ACTOR}.policy_loss.troll") == PUBLISHED_LOSS


def test_235b_places_its_layers() -> None:
    config = composed("+megatron=moe", "+size=235b_a22b", "+inference=vllm", "trainer.nnodes=8", *BARE)
    engine = omega_conf_to_dataclass(config.actor_rollout_ref.actor).engine
    ends = [engine.override_transformer_config[f"num_layers_in_{end}_pipeline_stage"] for end in ("first", "last")]
    assert sum(ends) + (engine.pipeline_model_parallel_size - 2) * 12 == 94
