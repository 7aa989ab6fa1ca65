"""Tests on SGLang, in their own environment (``bash tests/run.sh --sglang``)."""

from __future__ import annotations

import importlib.util
import os

# SGLang does not choose the CPU by itself.
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"

if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]
