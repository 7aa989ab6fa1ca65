"""Sends weights from the actor to SGLang through shared memory; verl imports it as ``model.external_lib``.

SGLang patches how torch pickles tensors, so that CUDA tensors name their device; the patch cannot handle CPU tensors.
The attribute below tells SGLang that it has already patched.
"""

from __future__ import annotations

import torch.multiprocessing
from torch.multiprocessing import reductions

reductions._reduce_tensor_original = reductions.reduce_tensor  # type: ignore[attr-defined]
# Sender and receiver have no common parent that could pass file descriptors on.
torch.multiprocessing.set_sharing_strategy("file_system")
