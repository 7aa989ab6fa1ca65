"""What a command line would train with, before it is run: composed by verl's own entry point."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from verl_troll.plugin.command_line import look

ACTOR = "actor_rollout_ref.actor"
LOSS = f"{ACTOR}.policy_loss"
BASE = (
    f"{ACTOR}.ppo_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.name=vllm",
)


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set by look.
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")


def seen(*arguments: str) -> dict[str, Any]:
    return look([*BASE, *arguments])


@pytest.mark.parametrize("configuration", [(), ("--config-name=ppo_megatron_trainer.yaml",)])
def test_troll_is_on_with_its_settings(configuration: tuple[str, ...]) -> None:
    found = seen("+troll=sequence", f"{LOSS}.troll.kl_bound=0.01", *configuration)
    assert found["announcement"].startswith("TROLL is on: kl_bound=0.01, ")
    assert "importance_ratio=sequence" in found["announcement"]
    assert (found["loss"], found["refused"], found["problems"]) == ("troll", None, [])


@pytest.mark.parametrize(
    ("arguments", "loss"),
    [
        ((), "vanilla"),
        (("+baseline=gspo", "+size=8b", "+fsdp=default"), "gspo"),
        # The letters of the method are in "controller".
        (
            ("global_profiler.global_tool_config.nsys.controller_nsight_options.trace=cuda", "+my_controller=1"),
            "vanilla",
        ),
        # A name, and a key of the user's own that resembles a group.
        (("trainer.experiment_name=troll", "+tasks=4"), "vanilla"),
    ],
)
def test_a_run_without_troll_is_none_of_its_business(arguments: tuple[str, ...], loss: str) -> None:
    assert seen(*arguments) == {"announcement": None, "loss": loss, "refused": None, "problems": []}


@pytest.mark.parametrize(
    ("arguments", "problem", "hint"),
    [
        (["+trol=default"], "+trol=default sets a key that nothing reads", "write +troll=default"),
        (["+Troll=default"], "+Troll=default sets a key", "write +troll=default"),
        (["+trol=defualt"], "+trol=defualt sets a key", "write +troll=default"),
        (["+baselin=gspo"], "+baselin=gspo sets a key", "write +baseline=gspo"),
        (["+troll=default", "+taks=gsm8k"], "+taks=gsm8k sets a key", "write +task=gsm8k"),
        (["+troll@elsewhere=default"], "+troll@elsewhere=default does not switch TROLL on", "write +troll=default"),
        (["+troll.kl_bound=1"], "+troll.kl_bound=1 does not switch TROLL on", "write +troll=default"),
        (["+troll=default", "~troll"], "~troll takes +troll=... back", "leave it out"),
        ([f"{LOSS}.loss_mode=troll"], f"{LOSS}.loss_mode=troll without TROLL's settings", "write +troll=default"),
        (["+baseline=gspo", f"{LOSS}.loss_mode=cispo"], "+baseline=gspo is given, and another", "leave out one"),
    ],
)
def test_another_loss_than_meant_is_a_problem(arguments: list[str], problem: str, hint: str) -> None:
    found = seen(*arguments)
    assert found["refused"] is None
    (one,) = found["problems"]
    assert one[0].startswith(problem)
    assert one[1].startswith(hint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+troll=defualt"], "Could not find 'troll/defualt'\nAvailable options in 'troll':\n\tdefault\n"),
        (["troll=default"], "Could not override 'troll'. No match in the defaults list.\nTo append"),
        (["+troll=null"], "ValueError: Config group override must be a string or a list"),
        (["--no-such-option"], "main_ppo.py: error: unrecognized arguments: --no-such-option"),
        (["--multirun"], "Only one of --run, --multirun"),
        (["--help"], "it does not start"),
        (["+troll=default", "+baseline=gspo"], "+baseline=gspo and +troll=... each set the policy loss"),
        (["+troll=default", f"{LOSS}.troll.kl_bound=-1"], f"{LOSS}.troll.kl_bound=-1: allowed is"),
        (["+troll=default", "trainer.n_gpus_per_node=7"], "must be divisible by minimal possible batch size (7)"),
    ],
)
def test_what_a_run_would_refuse_is_shown_in_its_words(arguments: list[str], message: str) -> None:
    found = seen(*arguments)
    assert message in found["refused"]
    assert "HYDRA_FULL_ERROR" not in found["refused"]
    assert found["announcement"] is None


def test_settings_without_the_group_are_explained_beside_hydras_advice() -> None:
    found = seen(f"{LOSS}.troll.kl_bound=0.1")
    assert f"Could not override '{LOSS}.troll.kl_bound'" in found["refused"]
    assert found["problems"] == [(f"{LOSS}.troll.kl_bound=0.1 does not switch TROLL on", "write +troll=default")]


def test_users_own_configuration_is_composed(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "hydra:\n  searchpath: [pkg://verl.trainer.config]\n"
        "defaults: [ppo_trainer, troll: sequence, _self_]\n"
        "my_own: {trol: default}\n"
    )
    found = seen(f"--config-path={tmp_path}", "--config-name=mine")
    assert "importance_ratio=sequence" in found["announcement"], found
    assert found["problems"] == []
    (tmp_path / "other.yaml").write_text("trainer: {}\n")
    assert "the configuration has no" in look([f"--config-path={tmp_path}", "--config-name=other"])["refused"]
