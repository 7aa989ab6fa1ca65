"""The configuration group ``task`` on top of verl's own configuration; rewards as verl loads and calls them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import verl.trainer
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.reward import get_custom_reward_fn

from verl_troll.tasks.__main__ import GENERATED
from verl_troll.tasks.catalog import TASKS

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "task"
NAMES = [path.stem for path in sorted(CONFIGS.glob("*.yaml"))]
RIGHT = {
    "gsm8k": ("#### 7", "7"),
    "dapo_math": ("Answer: 7", "7"),
    "eurus_math": ("\\boxed{14/2}", "7"),
    "eurus_code": ("```python\nprint(7)\n```", json.dumps({"inputs": [""], "outputs": ["7"]})),
    "reasoning_gym": ("4 + 3 = 7", "7"),
}
SCORED_BY_ENTRY = {
    "dataset": "chain_sum",
    "settings": "{}",
    "entry": json.dumps({"question": "4 + 3 =", "answer": "7", "metadata": {}}),
    "answer_from": "last-number",
    "strict": False,
}


def composed(name: str, *overrides: str, base: str = "ppo_trainer") -> DictConfig:
    folder = str(Path(verl.trainer.__file__).parent / "config")
    with initialize_config_dir(folder, version_base=None):
        return compose(base, overrides=[f"+task={name}", *overrides])


def test_every_training_set_has_a_configuration() -> None:
    assert sorted([*(name for name, task in TASKS.items() if "train" in task.sources), GENERATED]) == NAMES
    assert sorted(RIGHT) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_reward_loads_and_scores_through_verl(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/someone")
    config = composed(name)
    assert config.data.train_files == f"/someone/data/{name}/train.parquet"
    assert config.data.val_files == f"/someone/data/{name}/test.parquet"
    score = get_custom_reward_fn(config)
    assert score is not None
    # Anything but a coroutine runs in a thread, so it does not block the worker's event loop.
    assert not inspect.iscoroutinefunction(score)
    response, truth = RIGHT[name]
    given = {"data_source": "x", "ground_truth": truth, "extra_info": {"num_turns": None, **SCORED_BY_ENTRY}}
    assert score(solution_str=response, **given)["score"] == 1
    assert score(solution_str="no", **given)["score"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_the_reward_are_those_of_the_function(name: str) -> None:
    settings = composed(name).reward.custom_reward_function
    function = __import__(settings.path.removeprefix("pkg://"), fromlist=["compute_score"]).compute_score
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert OmegaConf.to_container(settings.reward_kwargs) == defaults


def test_everything_can_be_overridden_beside_the_other_groups() -> None:
    config = composed(
        "eurus_code",
        "+troll=default",
        "data.train_files=/elsewhere",
        "data.max_response_length=77",
        "reward.custom_reward_function.reward_kwargs.slots=3",
        base="ppo_megatron_trainer",
    )
    assert (config.data.train_files, config.data.max_response_length) == ("/elsewhere", 77)
    assert config.reward.custom_reward_function.reward_kwargs.slots == 3
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == "troll"
