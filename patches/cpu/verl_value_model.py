"""Patch: build the critic's model with the attention from its configuration.

verl hard-codes ``flash_attention_2``, which needs an accelerator. Applied in CPU mode, in processes that hold a critic
(:mod:`verl_troll.cpu.critic`).
"""

from __future__ import annotations

from typing import Any

from verl_troll.patches.registry import Patch
from verl_troll.versions import TESTED_VERL


def _install() -> None:
    from transformers import AutoModelForTokenClassification
    from verl.utils import model

    def load_valuehead_model(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
        """verl's first choice: a token classifier with one label. verl imports this function at each call."""
        return AutoModelForTokenClassification.from_pretrained(
            local_path,
            dtype=torch_dtype,
            config=model_config,
            attn_implementation=model_config._attn_implementation,
            trust_remote_code=trust_remote_code,
        )

    model.load_valuehead_model = load_valuehead_model


PATCH = Patch(
    name="verl-value-model",
    host="verl",
    versions=TESTED_VERL,
    why="verl builds every critic with flash_attention_2, whatever override_config.attn_implementation says.",
    upstream="verl/utils/model.py, load_valuehead_model: attn_implementation from model_config, as for the actor",
    install=_install,
    replaces={"verl.utils.model:load_valuehead_model": "d7528f4ff909c7c3"},
)
