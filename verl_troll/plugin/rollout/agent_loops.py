"""Agent loops that pass the rollout engine's support on to the sample's fields.

They take the names of verl's own: data sets name loops (column ``agent_name``), and so does verl's fully asynchronous
trainer.
"""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop

from verl_troll.plugin import carry
from verl_troll.plugin.rollout.client import Recorder, recording
from verl_troll.plugin.rollout.token_support import TokenSupport

__all__ = ["RolloutSupportMixin", "SupportSingleTurnAgentLoop", "SupportToolAgentLoop"]


class _OutputWithSupport(AgentLoopOutput):
    """verl's output for one trajectory, with the support among the sample's fields."""

    def as_dict(self) -> dict[str, Any]:
        fields: dict[str, Any] = super().as_dict()
        fields.update(fields["extra_fields"].pop(carry.SAMPLE))
        return fields


class RolloutSupportMixin(AgentLoopBase):
    """Adds the support to your own agent loop: ``@register("mine") class Mine(RolloutSupportMixin, AgentLoop): ...``.

    The engine's tokens must reach the trainer unchanged and in order; other tokens need ``response_mask`` 0.
    """

    server_manager: Any

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """verl's loop, with the support added to its output.

        Raises:
            TypeError: the loop returns several outputs, or its client is not verl's.
            ValueError: the generated tokens are not the engine's.
        """
        recorder = Recorder()
        self.server_manager = recording(self.server_manager, recorder)
        output = await super().run(sampling_params, **kwargs)
        if not isinstance(output, AgentLoopOutput):
            raise TypeError(
                f"{type(self).__name__} returned {type(output).__name__}: with the old policy from the rollout engine, "
                "an agent loop must return one AgentLoopOutput"
            )
        if recorder.without_support or not recorder.attempts:
            # Validation samples have no support; an update on one reports what is missing.
            return output
        fields = TokenSupport.join(recorder.attempts).to_fields(
            output.prompt_ids, output.response_ids, output.response_mask, recorder.token_versions
        )
        output = _OutputWithSupport.model_construct(_fields_set=output.model_fields_set, **output.__dict__)
        output.extra_fields[carry.SAMPLE] = fields
        return output


@register("single_turn_agent")
class SupportSingleTurnAgentLoop(RolloutSupportMixin, SingleTurnAgentLoop):
    """verl's ``single_turn_agent``."""


@register("tool_agent")
class SupportToolAgentLoop(RolloutSupportMixin, ToolAgentLoop):
    """verl's ``tool_agent``."""
