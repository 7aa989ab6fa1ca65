"""The critic in CPU mode: verl's own model, with an attention that CPUs have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from verl.utils import model as verl_model

from tests.trainer.run import make_assets
from verl_troll.cpu.critic import CpuCriticEngineConfig
from verl_troll.patches import registry
from verl_troll.patches.cpu import verl_value_model


def test_critic_is_built_with_the_attention_of_its_configuration(tmp_path: Path) -> None:
    assert verl_value_model.PATCH in registry.applied()
    make_assets(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "model", attn_implementation="sdpa", num_labels=1)
    critic = verl_model.load_valuehead_model(str(tmp_path / "model"), torch.float32, config, False)
    assert critic.config._attn_implementation == "sdpa"
    assert critic(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 1)


def test_settings_are_refused_outside_cpu_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CpuCriticEngineConfig(strategy="fsdp2").strategy == "fsdp2"
    monkeypatch.delenv("VERL_PLATFORM")
    with pytest.raises(RuntimeError, match=r"leave out \+cpu=.* VERL_PLATFORM=cpu VERL_USE_EXTERNAL_MODULES="):
        CpuCriticEngineConfig(strategy="fsdp2")
