"""The whole suite runs in CPU mode, without hubs, one thread per process."""

from __future__ import annotations

import os

os.environ.update(
    VERL_PLATFORM="cpu",
    VERL_USE_EXTERNAL_MODULES="verl_troll.cpu",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
)

import torch

torch.set_num_threads(1)
