"""Records the support of the tokens that one agent loop asks the rollout servers for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from verl_troll.plugin.rollout.token_support import FIELD, SupportRequest, TokenSupport

__all__ = ["Recorder", "recording"]

EMBEDDED = "hf"
"""Name of the rollout of :mod:`verl_troll.embedded`, whose server returns the candidates as they are."""


@dataclass
class Recorder:
    """What the servers sampled for one agent loop, in order.

    verl's asynchronous clients ask again, on weights of a later version, for the rest of a response whose request was
    aborted. Each attempt's tokens then have the support of the version that sampled them.

    Attributes:
        attempts: supports of the attempts that sampled tokens.
        versions: the weight version of each, verl's ``global_steps`` of the last synchronisation.
        without_support: whether an attempt sampled tokens and returned no support.
    """

    attempts: list[TokenSupport] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)
    without_support: bool = False

    @property
    def token_versions(self) -> NDArray[np.int32]:
        """``[r]``, the weight version of each sampled token; -1 where the server named none."""
        versions = np.array([-1 if version is None else version for version in self.versions], dtype=np.int32)
        return np.repeat(versions, [len(attempt.tokens) for attempt in self.attempts])

    def take(self, output: TokenOutput) -> None:
        """Move an attempt's support here."""
        support = output.extra_fields.pop(FIELD, None)
        if support is not None:
            self.attempts.append(support)
            self.versions.append(output.extra_fields.get("global_steps"))
        elif output.token_ids:
            self.without_support = True


class _RecordingClient(LLMServerClient):
    """Stands between verl's base client and a client derived from it, where every single attempt passes."""

    recorder: Recorder

    async def generate(self, request_id: str, **arguments: Any) -> TokenOutput:
        rollout = self.config.actor_rollout_ref.rollout
        params = arguments["sampling_params"]
        wanted = None
        if rollout.name == EMBEDDED and _samples_the_policy(params, rollout):
            wanted = SupportRequest(**rollout.custom.troll)
            arguments["sampling_params"] = {**params, "logprobs": wanted.k}
        output: TokenOutput = await super().generate(request_id, **arguments)
        if wanted is not None and output.token_ids:
            ids, log_probs = output.extra_fields.pop("top_logprobs")
            output.extra_fields[FIELD] = TokenSupport.read(
                output.token_ids,
                output.log_probs,
                [ids.shape[1]] * len(ids),
                ids.flatten(),
                log_probs.flatten(),
                wanted,
                f"the rollout {EMBEDDED!r}, request {request_id},",
            )
        self.recorder.take(output)
        return output


def _samples_the_policy(params: Mapping[str, Any], rollout: Any) -> bool:
    # Validation and greedy requests sample from another distribution, which no update uses.
    return (
        bool(params.get("logprobs", False))
        and params.get("temperature", rollout.temperature) == rollout.temperature
        and params.get("top_p", rollout.top_p) == 1.0
        and params.get("top_k", rollout.top_k) in (-1, 0)
    )


def recording(client: LLMServerClient, recorder: Recorder) -> LLMServerClient:
    """A client that shares the state of ``client``, and shows every attempt to ``recorder``.

    Raises:
        TypeError: the client is not verl's.
    """
    kind = type(client)
    if not isinstance(client, LLMServerClient):
        raise TypeError(
            f"{kind.__module__}.{kind.__qualname__} is not derived from verl's LLMServerClient: with the old policy "
            "from the rollout engine every request must pass verl's client"
        )
    bases = (_RecordingClient,) if kind is LLMServerClient else (kind, _RecordingClient)
    own: LLMServerClient = object.__new__(type(f"Recording{kind.__name__}", bases, {"recorder": recorder}))
    # The same dictionary: what the client learns about its servers stays known.
    own.__dict__ = client.__dict__
    return own
