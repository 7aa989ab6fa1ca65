"""The scripts for real models give verl a command line that it accepts, for any values of their variables."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import need_critic
from verl.utils.config import omega_conf_to_dataclass

from benchmarks.processes import run
from tests.test_configs import ESTIMATORS, INFERENCE, RIVALS, checked, options

ROOT = Path(__file__).resolve().parents[1]
# By script: engine, model, and a Megatron actor's parallel sizes (tensor, pipeline, context, expert).
SCRIPTS: dict[str, tuple[str, str, tuple[int, int, int, int]]] = {
    "run_qwen3_0_6b_fsdp.sh": ("fsdp2", "Qwen/Qwen3-0.6B", (1, 1, 1, 1)),
    "run_qwen3_1_7b_fsdp.sh": ("fsdp2", "Qwen/Qwen3-1.7B", (1, 1, 1, 1)),
    "run_qwen3_4b_fsdp.sh": ("fsdp2", "Qwen/Qwen3-4B", (1, 1, 1, 1)),
    "run_qwen3_8b_fsdp.sh": ("fsdp2", "Qwen/Qwen3-8B", (1, 1, 1, 1)),
    "run_qwen3_14b_fsdp.sh": ("fsdp2", "Qwen/Qwen3-14B", (1, 1, 1, 1)),
    "run_llama3_1_8b_fsdp.sh": ("fsdp2", "meta-llama/Llama-3.1-8B-Instruct", (1, 1, 1, 1)),
    "run_smollm3_3b_fsdp.sh": ("fsdp2", "HuggingFaceTB/SmolLM3-3B", (1, 1, 1, 1)),
    "run_apertus_8b_fsdp.sh": ("fsdp2", "swiss-ai/Apertus-8B-Instruct-2509", (1, 1, 1, 1)),
    "run_qwen3_8b_megatron.sh": ("megatron", "Qwen/Qwen3-8B", (2, 1, 1, 1)),
    "run_qwen3_30b_a3b_megatron.sh": ("megatron", "Qwen/Qwen3-30B-A3B", (1, 1, 1, 8)),
    "run_qwen3_235b_a22b_megatron.sh": ("megatron", "Qwen/Qwen3-235B-A22B", (4, 8, 1, 8)),
}


@pytest.fixture(scope="module")
def path_with_stand_in(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ``PATH`` whose ``python3`` prints its arguments as JSON."""
    folder = tmp_path_factory.mktemp("stand-in")
    stand_in = folder / "python3"
    stand_in.write_text(f"#!{sys.executable} -S\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stand_in.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(autouse=True)
def verl_config() -> Iterator[None]:
    with initialize_config_module("verl.trainer.config", version_base=None):
        yield


def command(script: str, path: str, *arguments: str, **variables: str) -> list[str]:
    """The overrides that a script passes to verl."""
    done = run(
        ["bash", str(ROOT / "examples" / script), *arguments],
        env={"PATH": path, "HOME": os.environ["HOME"], **variables},
    )
    assert done.returncode == 0, done.stderr
    words: list[str] = json.loads(done.stdout)
    assert words[:2] == ["-m", "verl.trainer.main_ppo"]
    return words[2:]


def configuration(script: str, path: str, *arguments: str, **variables: str) -> Any:
    return compose("ppo_trainer", overrides=command(script, path, *arguments, **variables))


def test_table_names_every_script() -> None:
    assert sorted(SCRIPTS) == sorted(path.name for path in (ROOT / "examples").glob("run_*.sh"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_trains_with_troll_on_sizes_that_fit_together(script: str, path_with_stand_in: str) -> None:
    strategy, model, parallel = SCRIPTS[script]
    config = configuration(script, path_with_stand_in)
    actor = checked(config)
    engine = actor.engine
    assert engine.troll is actor.policy_loss.troll
    assert (actor.strategy, config.actor_rollout_ref.model.path) == (strategy, model)
    assert config.algorithm.adv_estimator == "grpo"
    if strategy == "megatron":
        sizes = ("tensor_model", "pipeline_model", "context", "expert_model")
        assert parallel == tuple(getattr(engine, f"{name}_parallel_size") for name in sizes)
    tensor, pipeline, context, expert = parallel
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    assert ranks % (tensor * pipeline * context) == 0
    assert ranks % (expert * pipeline) == 0
    assert config.trainer.n_gpus_per_node % tensor == 0
    replicas = ranks // (tensor * pipeline * context)
    rollout = config.actor_rollout_ref.rollout
    assert ranks % (rollout.tensor_model_parallel_size * rollout.data_parallel_size) == 0
    assert config.trainer.n_gpus_per_node % rollout.tensor_model_parallel_size == 0
    assert config.data.train_batch_size % actor.ppo_mini_batch_size == 0
    assert actor.ppo_mini_batch_size * rollout.n % replicas == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_has_one_shape(script: str) -> None:
    lines = (ROOT / "examples" / script).read_text().splitlines()
    assert len(lines) <= 40
    assert "set -euo pipefail" in lines
    assert lines[-1] == '  "$@"'
    names = [line.partition("=")[0] for line in lines if not line.startswith("#") and line.partition("=")[0].isupper()]
    assert names == ["MODEL", "ESTIMATOR", "LOSS", "TASK", "ROLLOUT", "NNODES", "GPUS_PER_NODE"]


@pytest.mark.parametrize("script", ["run_qwen3_8b_fsdp.sh", "run_qwen3_8b_megatron.sh"])
def test_variables_choose_the_layers(script: str, path_with_stand_in: str) -> None:
    def chosen(**variables: str) -> list[str]:
        return command(script, path_with_stand_in, **variables)

    for estimator, one in ESTIMATORS.items():
        words = chosen(ESTIMATOR=estimator)
        assert f"+estimator={estimator}" in words
        assert f"+{one.troll}" in words
    for rival in RIVALS:
        words = chosen(LOSS=rival)
        assert f"+baseline={rival}" in words
        assert not any(word.startswith("+troll") for word in words)
    for inference in INFERENCE:
        assert f"+inference={inference}" in chosen(ROLLOUT=inference)
    for task in options("task"):
        assert f"+task={task}" in chosen(TASK=task)
    words = chosen(MODEL="/models/mine", NNODES="3", GPUS_PER_NODE="4")
    assert {"actor_rollout_ref.model.path=/models/mine", "trainer.nnodes=3", "trainer.n_gpus_per_node=4"} <= set(words)


def test_gspo_with_its_own_clipping(path_with_stand_in: str) -> None:
    config = configuration("run_qwen3_8b_fsdp.sh", path_with_stand_in, ESTIMATOR="gspo", LOSS="gspo")
    actor = checked(config)
    assert type(actor).__name__ == "FSDPActorConfig"
    assert (actor.policy_loss.loss_mode, actor.loss_agg_mode, actor.clip_ratio_low) == (
        "gspo",
        "seq-mean-token-mean",
        3e-4,
    )


def test_ppo_trains_a_critic_from_the_same_model(path_with_stand_in: str) -> None:
    config = configuration("run_qwen3_8b_megatron.sh", path_with_stand_in, ESTIMATOR="ppo")
    assert need_critic(config)
    assert config.critic.model.path == "Qwen/Qwen3-8B"
    assert config.critic.megatron.tensor_model_parallel_size == 2


def test_megatron_variables(path_with_stand_in: str) -> None:
    variables = {"TP": "2", "PP": "2", "CP": "2", "EP": "4", "ROUTER_REPLAY": "R2"}
    config = configuration("run_qwen3_30b_a3b_megatron.sh", path_with_stand_in, **variables)
    engine = omega_conf_to_dataclass(config.actor_rollout_ref.actor).engine
    assert (engine.tensor_model_parallel_size, engine.pipeline_model_parallel_size) == (2, 2)
    assert (engine.context_parallel_size, engine.expert_model_parallel_size) == (2, 4)
    assert engine.router_replay.mode == "R2"
    assert config.actor_rollout_ref.ref.megatron.expert_model_parallel_size == 4


def test_arguments_win_over_the_script(path_with_stand_in: str) -> None:
    for script in SCRIPTS:
        words = command(script, path_with_stand_in, "data.train_batch_size=7", "trainer.experiment_name=two words")
        assert words[-2:] == ["data.train_batch_size=7", "trainer.experiment_name=two words"]
    config = configuration("run_qwen3_8b_fsdp.sh", path_with_stand_in, "data.train_batch_size=7", "trainer.nnodes=9")
    assert (config.data.train_batch_size, config.trainer.nnodes) == (7, 9)


@pytest.mark.parametrize(("variable", "group"), [("LOSS", "baseline"), ("ESTIMATOR", "estimator"), ("TASK", "task")])
def test_unknown_choice_is_refused_with_what_there_is(variable: str, group: str, path_with_stand_in: str) -> None:
    with pytest.raises(MissingConfigException) as error:
        configuration("run_qwen3_8b_fsdp.sh", path_with_stand_in, **{variable: "no_such"})
    assert f"{group}/no_such" in str(error.value)
    assert all(option in str(error.value) for option in options(group))


@pytest.mark.parametrize(
    ("script", "variables"),
    [
        ("run_qwen3_8b_megatron.sh", {"TP": "4", "CP": "2"}),
        pytest.param("run_qwen3_14b_fsdp.sh", {"LOSS": "cispo"}, marks=pytest.mark.slow),
    ],
)
def test_verl_itself_prints_the_same_configuration(
    script: str, variables: dict[str, str], path_with_stand_in: str
) -> None:
    done = run(["bash", str(ROOT / "examples" / script), "--cfg", "job", "--resolve"], env={**os.environ, **variables})
    assert done.returncode == 0, done.stderr[-3000:]
    in_process = configuration(script, path_with_stand_in, **variables)
    assert OmegaConf.to_container(OmegaConf.create(done.stdout)) == OmegaConf.to_container(in_process, resolve=True)
