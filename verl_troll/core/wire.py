"""How a support travels with the batch: the limits of its form."""

from __future__ import annotations

# Ids lie below this.
MAX_VOCAB_SIZE = 1 << 20
# A token's count, K and the sampled id, fits int16.
MAX_K = 2**15 - 2
