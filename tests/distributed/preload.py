"""What every rank needs; the fork server imports it once."""

import verl.workers.engine_workers  # noqa: F401
from transformers import Qwen2ForCausalLM  # noqa: F401

import tests.conftest  # noqa: F401  (sets CPU mode before verl is imported)
import verl_troll.cpu.megatron.bridges
import verl_troll.plugin  # noqa: F401
