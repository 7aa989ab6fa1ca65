"""Tests on vLLM's CPU build, in their own environment (``bash tests/run.sh --vllm``)."""

from __future__ import annotations

import importlib.util
import os

os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="1")

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
