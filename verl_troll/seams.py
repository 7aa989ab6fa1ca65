"""Where the package depends on a host's code without patching it: the definitions, and fingerprints of those read.

Each :class:`Seam` has a section in docs/upstream.md. ``verl-troll doctor`` compares the installed hosts with the table,
as does ``tests/plugin/test_host_contract.py``, which also finds overridden methods that are missing here. Patches name
their own definitions (``Patch.replaces``).
"""

from __future__ import annotations

from dataclasses import dataclass

DOCUMENT = "docs/upstream.md"
"""The page that says of each seam what relies on it, and what would end it."""


@dataclass(frozen=True)
class Seam:
    """One place where the package depends on a host; definitions are ``"module:qualified.name"``.

    Attributes:
        section: heading in docs/upstream.md.
        ours: files that depend on it.
        recheck: what to re-check after a change.
        overrides: methods that our classes override; a class means all of its methods.
        uses: definitions that our code names.
        callers: host code that our code relies on without naming it.
    """

    section: str
    ours: tuple[str, ...]
    recheck: str
    overrides: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    callers: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        return self.overrides + self.uses + self.callers


FSDP = "verl.workers.engine.fsdp.transformer_impl:FSDPEngine"
MEGATRON = "verl.workers.engine.megatron.transformer_impl:MegatronEngine"
BASE = "verl.workers.engine.base:BaseEngine"
WORKERS = "verl.workers.engine_workers"
TRAINER = "verl.trainer.ppo.v1.trainer_base:PPOTrainer"
V0 = "verl.trainer.ppo.ray_trainer:RayPPOTrainer"
FULLY_ASYNC = "verl.experimental.fully_async_policy.fully_async_trainer:FullyAsyncTrainer"
CORE = "verl.trainer.ppo.core_algos"
VLLM = "verl.workers.rollout.vllm_rollout.vllm_async_server"
SGLANG = "verl.workers.rollout.sglang_rollout.async_sglang_server"
LOOPS = "verl.experimental.agent_loop"
ENGINES = "verl_troll/plugin/engines"

SEAMS = (
    Seam(
        "Logits hook",
        (f"{ENGINES}/mixin.py", "verl_troll/plugin/passes.py"),
        "is the loss function called with student_logits when distillation_use_topk is set, and the cross-entropy "
        "skipped when distillation_only is; are its tensors in model_output when the loss is called?",
        overrides=tuple(f"{host}.forward_backward_batch" for host in (BASE, FSDP, MEGATRON)),
        uses=("verl.utils.tensordict_utils:assign_non_tensor",),
        callers=(
            f"{FSDP}WithLMHead.prepare_model_outputs",
            f"{FSDP}WithLMHead.forward_step",
            f"{MEGATRON}WithLMHead._lm_head_logits_processor",
            f"{MEGATRON}WithLMHead.forward_step",
            f"{MEGATRON}WithLMHead.postprocess_micro_batch_func",
        ),
    ),
    Seam(
        "Kernels at start",
        (f"{ENGINES}/mixin.py",),
        "is the model on its device, and _autocast_dtype set on FSDP, when initialize returns; is nothing trained "
        "before?",
        overrides=tuple(f"{host}.initialize" for host in (BASE, FSDP, MEGATRON)),
        uses=("verl.utils.device:get_device_name",),
        callers=(),
    ),
    Seam(
        "Fused head",
        (f"{ENGINES}/mixin.py", f"{ENGINES}/megatron.py", "verl_troll/plugin/passes.py"),
        "is prepare_model_inputs called with each micro-batch before its forward pass, in the same thread; do the "
        "fused path's log_probs keep a last dimension until they are nested; does Megatron hand over the hidden states "
        "of all tensor-parallel ranks' tokens as [s, b, D], and leave the sum of their gradient to us?",
        overrides=tuple(f"{host}WithLMHead.prepare_model_inputs" for host in (FSDP, MEGATRON)),
        uses=(
            "verl.utils.tensordict_utils:get_non_tensor_data",
            "megatron.core.tensor_parallel.mappings:copy_to_tensor_model_parallel_region",
        ),
        callers=(
            "verl.models.transformers.monkey_patch:patch_forward_with_backends",
            "verl.models.mcore.util:postprocess_thd_engine",
            f"{MEGATRON}._maybe_enable_fused_kernels",
        ),
    ),
    Seam(
        "Cache emptied for distillation",
        (f"{ENGINES}/megatron.py",),
        "is _distillation_use_topk_active still read in optimizer_step, and for nothing else?",
        overrides=(f"{MEGATRON}.optimizer_step",),
    ),
    Seam(
        "Steps without a finite loss",
        (f"{ENGINES}/mixin.py",),
        "does optimizer_step still follow each forward_backward_batch on every rank, and may it be left out?",
        overrides=tuple(f"{host}.optimizer_step" for host in (BASE, FSDP, MEGATRON)),
        callers=("verl.workers.engine.base:BaseEngine.train_batch",),
    ),
    Seam(
        "Reference pass without the adapter",
        (f"{ENGINES}/mixin.py",),
        "does the reference pass of a LoRA actor still run inside disable_adapter()?",
        overrides=tuple(f"{host}.disable_adapter" for host in (BASE, FSDP, MEGATRON)),
    ),
    Seam(
        "Engines by vendor",
        ("verl_troll/plugin/backends.py", "verl_troll/plugin/inspection.py"),
        "is (device, vendor) still looked up before device alone, and _engines nested by model type and backend?",
        uses=("verl.workers.engine.base:EngineRegistry",),
    ),
    Seam(
        "Settings of the method",
        (
            "verl_troll/plugin/actor_config.py",
            "verl_troll/plugin/settings.py",
            "verl_troll/plugin/command_line.py",
        ),
        "is the actor's _target_ built on the driver before ray.init and again in each actor worker, its engine "
        "configuration handed to the engine as it is, and its validate called once per run, on the driver; does main "
        "do no more before run_ppo than command_line.py does?",
        overrides=(
            *(f"verl.workers.config.actor:{name}ActorConfig.__post_init__" for name in ("FSDP", "Mcore")),
            *(f"verl.workers.config.actor:{name}ActorConfig.validate" for name in ("", "FSDP")),
        ),
        callers=(
            "verl.trainer.main_ppo:main",
            "verl.utils.config:validate_config",
            f"{WORKERS}:ActorRolloutRefWorker.init_model",
        ),
    ),
    Seam(
        "Loading of the plugin",
        ("verl_troll/plugin/__init__.py",),
        "does every process that builds an engine, and the trainer, import external_lib first, and let its errors out?",
        callers=(
            "verl.workers.config.model:HFModelConfig.__post_init__",
            "verl.utils.import_utils:import_external_libs",
        ),
    ),
    Seam(
        "Policy loss",
        ("verl_troll/plugin/policy_loss.py",),
        "is the registered loss called with these arguments after global_batch_info is set, and does agg_loss divide "
        "by the mini-batch's counts?",
        uses=(
            f"{CORE}:agg_loss",
            f"{CORE}:register_policy_loss",
        ),
        callers=("verl.workers.utils.losses:ppo_loss",),
    ),
    Seam(
        "Layout of the tokens",
        (f"{ENGINES}/megatron.py", f"{ENGINES}/fsdp.py", "verl_troll/plugin/carry.py"),
        "do the logits lie as the input ids do (packing, padding, context-parallel chunks), and are response tokens "
        "predicted one row earlier?",
        uses=(
            "verl.workers.utils.padding:no_padding_2_padding",
            "verl.models.mcore.util:preprocess_thd_engine",
            "verl.models.mcore.util:preprocess_bshd_engine",
            f"{MEGATRON}._get_context_parallel_layout",
            "verl.utils.ulysses:get_ulysses_sequence_parallel_group",
        ),
    ),
    Seam(
        "Outputs of the old-log-prob pass",
        ("verl_troll/plugin/carry.py", "verl_troll/plugin/passes.py"),
        "does everything in model_output still reach the batch of the update?",
        callers=(
            f"{WORKERS}:TrainingWorker.infer_batch",
            f"{WORKERS}:ActorRolloutRefWorker.compute_log_prob",
            f"{TRAINER}._compute_old_log_prob",
        ),
    ),
    Seam(
        "Padded batches of v0 trainers",
        (f"{ENGINES}/padded_batches.py", "verl_troll/plugin/carry.py"),
        "does each rank get the samples of its old pass for the update, with response_mask padded and input_ids not; "
        "do extra_fields of an agent loop's output become columns of objects?",
        callers=(
            f"{V0}._compute_old_log_prob",
            f"{V0}._update_actor",
            f"{FULLY_ASYNC}._compute_old_log_prob",
            f"{LOOPS}.agent_loop:AgentLoopWorker._postprocess",
            "verl.workers.utils.padding:left_right_2_no_padding",
        ),
    ),
    Seam(
        "Metrics",
        ("verl_troll/plugin/metrics.py", "patches/verl_metric_names.py"),
        "are SUM metrics added over micro-batches and averaged over data-parallel ranks, and names in _max taken by "
        "their largest?",
        uses=("verl.utils.metric.utils:Metric",),
        callers=(
            "verl.utils.metric.utils:reduce_metrics",
            f"{WORKERS}:TrainingWorker._postprocess_output",
        ),
    ),
    Seam(
        "Old policy from the rollout engine",
        tuple(f"verl_troll/plugin/rollout/{name}.py" for name in ("__init__", "agent_loops", "client")),
        "does every attempt of an asynchronous client go through LLMServerClient.generate, with extra_fields of the "
        "server's output, and does every field of an agent loop's output reach the batch?",
        overrides=(
            "verl.workers.rollout.llm_server:LLMServerClient.generate",
            f"{LOOPS}.agent_loop:AgentLoopBase.run",
            f"{LOOPS}.agent_loop:AgentLoopOutput.as_dict",
            f"{LOOPS}.single_turn_agent_loop:SingleTurnAgentLoop.run",
            f"{LOOPS}.tool_agent_loop:ToolAgentLoop.run",
        ),
        uses=(
            f"{LOOPS}.agent_loop:register",
            "verl.workers.rollout.replica:RolloutReplicaRegistry",
        ),
        callers=("verl.workers.rollout.llm_server:FullyAsyncLLMServerClient.generate",),
    ),
    Seam(
        "vLLM server",
        ("verl_troll/plugin/rollout/vllm.py",),
        "does the server sample through self.engine.generate, and read the sampled token's log-probability alone?",
        overrides=(
            *(f"{VLLM}:vLLMHttpServer.{name}" for name in ("_preprocess_engine_kwargs", "run_server", "generate")),
            f"{VLLM}:vLLMReplica.__init__",
        ),
    ),
    Seam(
        "SGLang server",
        ("verl_troll/plugin/rollout/sglang.py", "verl_troll/plugin/rollout/__init__.py"),
        "does the server read one answer of self.tokenizer_manager.generate_request, on the first node, and of its "
        "meta_info the sampled tokens' log-probabilities alone; does the loader import SGLang without an accelerator?",
        overrides=(
            *(f"{SGLANG}:SGLangHttpServer.{name}" for name in ("launch_server", "generate")),
            f"{SGLANG}:SGLangReplica.__init__",
        ),
        uses=("verl.workers.rollout.replica:_load_sglang",),
    ),
    Seam(
        "CPU platform",
        ("verl_troll/cpu/platform.py", "verl_troll/cpu/__init__.py"),
        "does the interface have new members, and is a platform still chosen by VERL_PLATFORM?",
        overrides=("verl.plugin.platform.platform_base:PlatformBase",),
        uses=("verl.plugin.platform.platform_manager:PlatformRegistry",),
    ),
    Seam(
        "Rollout hf",
        ("verl_troll/embedded/rollout.py", "verl_troll/embedded/generation.py", "verl_troll/cpu/__init__.py"),
        "what does the trainer call on a replica, its servers and the training side, and with which arguments?",
        overrides=(
            *(
                f"verl.workers.rollout.base:BaseRollout.{name}"
                for name in ("__init__", "resume", "release", "update_weights")
            ),
            "verl.workers.rollout.replica:RolloutReplica.launch_servers",
        ),
        uses=("transformers.cache_utils:Cache.batch_select_indices",),
    ),
    Seam(
        "Weights to standalone replicas",
        ("verl_troll/cpu/checkpoint_engine.py",),
        "in which order and on which ranks are the members of the interface called?",
        overrides=("verl.checkpoint_engine.base:CheckpointEngine",),
        uses=("verl.checkpoint_engine.base:CheckpointEngineRegistry",),
    ),
    Seam(
        "Replay buffer",
        ("verl_troll/embedded/replay_buffer.py",),
        "which arguments does a custom sampler get, and does ReplayBuffer take poll_interval?",
        uses=("verl.trainer.ppo.v1.replay_buffer:ReplayBuffer",),
        callers=(f"{TRAINER}._build_replay_buffer",),
    ),
    Seam(
        "Critic on the CPU",
        ("verl_troll/cpu/critic.py",),
        "are the critic's engine settings unpickled in its worker before the model is built?",
        overrides=("verl.workers.config.engine:FSDPEngineConfig.__post_init__",),
    ),
    Seam(
        "Megatron's device",
        ("verl_troll/cpu/megatron/config.py", "verl_troll/cpu/megatron/engine.py"),
        "are ENTRY_POINTS all that verl's workers call, and is dtype still checked against two values?",
        overrides=("verl.workers.config.engine:McoreEngineConfig.__post_init__",),
    ),
    Seam(
        "Megatron's layers",
        ("verl_troll/cpu/megatron/layers.py", "verl_troll/cpu/megatron/attention.py"),
        "do the stand-ins get the same arguments, and have TransformerEngine's parameter names and sharding?",
        overrides=(
            "megatron.core.models.backends:LocalSpecProvider",
            "megatron.core.tensor_parallel.layers:ColumnParallelLinear",
            "megatron.core.transformer.module:MegatronModule.__init__",
            "megatron.core.transformer.moe.router:Router.gating",
        ),
    ),
    Seam(
        "mbridge's models",
        ("verl_troll/cpu/megatron/bridges.py",),
        "do the bridges still ask these three methods for the configuration, the layers and the model's arguments?",
        overrides=(
            "mbridge.core.llm_bridge:LLMBridge._build_base_config",
            "mbridge.core.llm_bridge:LLMBridge._get_gptmodel_args",
            "mbridge.core.llm_bridge:LLMBridge._get_transformer_layer_spec",
            "mbridge.models.llama:LLaMABridge._get_gptmodel_args",
        ),
        uses=("mbridge.core.bridge:register_model",),
    ),
)


FINGERPRINTS: dict[str, str] = {
    "verl.trainer.ppo.ray_trainer:RayPPOTrainer._compute_old_log_prob": "cc4d75fa4d6abb45",
    "verl.trainer.ppo.ray_trainer:RayPPOTrainer._update_actor": "601a6fa2029023d0",
    f"{FULLY_ASYNC}._compute_old_log_prob": "d38bc0bb909ebf90",
    "verl.experimental.agent_loop.agent_loop:AgentLoopWorker._postprocess": "18800e6625438d3d",
    "verl.workers.utils.padding:left_right_2_no_padding": "63d71cac822f21fa",
    "mbridge.core.bridge:register_model": "800de4a70fd7b9e7",
    "mbridge.core.llm_bridge:LLMBridge._build_base_config": "0819908d2e2bf4b3",
    "mbridge.core.llm_bridge:LLMBridge._get_gptmodel_args": "0a6f89db5c385253",
    "mbridge.core.llm_bridge:LLMBridge._get_transformer_layer_spec": "311673f0953e85dd",
    "mbridge.models.llama:LLaMABridge._get_gptmodel_args": "9155f32291528cb4",
    "megatron.core.models.backends:LocalSpecProvider": "1671ebf8fa87df01",
    "megatron.core.tensor_parallel.layers:ColumnParallelLinear": "1bdad2a9930e1f4d",
    "megatron.core.tensor_parallel.mappings:copy_to_tensor_model_parallel_region": "9182b1eb4adf705e",
    "megatron.core.transformer.module:MegatronModule.__init__": "5b8b5da5b9793159",
    "megatron.core.transformer.moe.router:Router.gating": "e50c359791c20921",
    "transformers.cache_utils:Cache.batch_select_indices": "790b61ba0ffa4196",
    "verl.checkpoint_engine.base:CheckpointEngine": "2c120ed3be72b995",
    "verl.checkpoint_engine.base:CheckpointEngineRegistry": "6a3af369e5b8dca0",
    "verl.experimental.agent_loop.agent_loop:AgentLoopBase.run": "db752658fd4ae4b7",
    "verl.experimental.agent_loop.agent_loop:AgentLoopOutput.as_dict": "1a49ab278d409c5d",
    "verl.experimental.agent_loop.agent_loop:register": "64d24585ff79fc33",
    "verl.experimental.agent_loop.single_turn_agent_loop:SingleTurnAgentLoop.run": "1b7d1f5a2b5493ba",
    "verl.experimental.agent_loop.tool_agent_loop:ToolAgentLoop.run": "319ba4e58723056c",
    "verl.models.mcore.util:postprocess_thd_engine": "f3f6b6e8b2087b1b",
    "verl.models.mcore.util:preprocess_bshd_engine": "9279efabb3c76d5c",
    "verl.models.mcore.util:preprocess_thd_engine": "2665543e660f3e81",
    "verl.models.transformers.monkey_patch:patch_forward_with_backends": "86a549d0bfbd34f9",
    "verl.plugin.platform.platform_base:PlatformBase": "509afde7ce222670",
    "verl.plugin.platform.platform_manager:PlatformRegistry": "9a03cf3a8b9d08cf",
    "verl.trainer.main_ppo:main": "02d2b3ef6012de20",
    "verl.trainer.ppo.core_algos:agg_loss": "baa1eabb337dd663",
    "verl.trainer.ppo.core_algos:register_policy_loss": "2efd6173c0b91759",
    "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer": "85c712c7e7d2c215",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._build_replay_buffer": "6f86000f22fb5161",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._compute_old_log_prob": "83f5ebb52f228635",
    "verl.utils.config:validate_config": "9e2d82e4b51e7099",
    "verl.utils.import_utils:import_external_libs": "5e2b0668fae9faed",
    "verl.utils.metric.utils:Metric": "091f96e8b3381622",
    "verl.utils.metric.utils:reduce_metrics": "5f9b1d486fc8ad87",
    "verl.utils.tensordict_utils:assign_non_tensor": "f93e82f2a802a4dc",
    "verl.utils.tensordict_utils:get_non_tensor_data": "e9030f3a7c3e3796",
    "verl.utils.ulysses:get_ulysses_sequence_parallel_group": "ede40bde9ffbc5ed",
    "verl.workers.config.actor:FSDPActorConfig.__post_init__": "ecc6f37901fceee4",
    "verl.workers.config.actor:McoreActorConfig.__post_init__": "6ee0f9a3179bd072",
    "verl.workers.config.engine:FSDPEngineConfig.__post_init__": "240e3b3fa1d32f85",
    "verl.workers.config.engine:McoreEngineConfig.__post_init__": "b765951a5edb6eb1",
    "verl.workers.config.model:HFModelConfig.__post_init__": "0c0cbf7ad5cb0aca",
    "verl.workers.rollout.llm_server:FullyAsyncLLMServerClient.generate": "504b91bba31123c0",
    "verl.workers.rollout.llm_server:LLMServerClient.generate": "e54e294d02b7abe2",
    "verl.workers.engine.base:BaseEngine.disable_adapter": "e502c926992b4503",
    "verl.workers.engine.base:BaseEngine.forward_backward_batch": "a3d79858823ce727",
    "verl.workers.engine.base:BaseEngine.optimizer_step": "0d5c7936ee97a476",
    "verl.workers.engine.base:BaseEngine.train_batch": "624bdd4d515d8bf6",
    "verl.workers.engine.base:EngineRegistry": "54452eee12791cda",
    "verl.utils.device:get_device_name": "988490435e4a4d23",
    "verl.workers.config.actor:ActorConfig.validate": "64611f992cdeb05a",
    "verl.workers.config.actor:FSDPActorConfig.validate": "a1fb8a4b2a7eac26",
    "verl.workers.engine.base:BaseEngine.initialize": "96ad1d9753b998af",
    f"{FSDP}.initialize": "0264a3806e8bc03a",
    f"{MEGATRON}.initialize": "56dd8bbd2044d536",
    f"{FSDP}.disable_adapter": "2b882ad9bee16dcc",
    f"{FSDP}.forward_backward_batch": "097af0bab5e69f68",
    f"{FSDP}.optimizer_step": "12157de690eeda82",
    f"{FSDP}WithLMHead.forward_step": "dc1a472be40ea7b8",
    f"{FSDP}WithLMHead.prepare_model_outputs": "06c245b398a0a84f",
    f"{FSDP}WithLMHead.prepare_model_inputs": "ef54213906ac028a",
    f"{MEGATRON}._maybe_enable_fused_kernels": "f7605976fc3f3c09",
    f"{MEGATRON}WithLMHead.prepare_model_inputs": "f9746f2984e4f0d4",
    f"{MEGATRON}._get_context_parallel_layout": "85cc2e4ac2a8f37e",
    f"{MEGATRON}.disable_adapter": "f9778961b228673d",
    f"{MEGATRON}.forward_backward_batch": "22aae1c6ec269a4a",
    f"{MEGATRON}.optimizer_step": "1c126740dceee749",
    f"{MEGATRON}WithLMHead._lm_head_logits_processor": "9a380b63ca57b24f",
    f"{MEGATRON}WithLMHead.forward_step": "c0021371d94e1228",
    f"{MEGATRON}WithLMHead.postprocess_micro_batch_func": "2bbb54f2f17cf777",
    "verl.workers.engine_workers:ActorRolloutRefWorker.compute_log_prob": "f36e71f7fd744809",
    "verl.workers.engine_workers:ActorRolloutRefWorker.init_model": "8bf2619c9dbfa877",
    "verl.workers.engine_workers:TrainingWorker._postprocess_output": "bf451c562c2d6a13",
    "verl.workers.engine_workers:TrainingWorker.infer_batch": "8e6ae2d7c16d4f1f",
    "verl.workers.rollout.base:BaseRollout.__init__": "2de866efdb5c8678",
    "verl.workers.rollout.base:BaseRollout.release": "9308eea9edcbb1c6",
    "verl.workers.rollout.base:BaseRollout.resume": "1b20617f125a9247",
    "verl.workers.rollout.base:BaseRollout.update_weights": "aaaef08eb59cee92",
    "verl.workers.rollout.replica:RolloutReplica.launch_servers": "8d43971ac3dc8d22",
    "verl.workers.rollout.replica:RolloutReplicaRegistry": "25b47c8795c668ea",
    "verl.workers.rollout.replica:_load_sglang": "d862ee34a00bd9af",
    f"{SGLANG}:SGLangHttpServer.generate": "8d043dad981b5ed7",
    f"{SGLANG}:SGLangHttpServer.launch_server": "af239ece10683c78",
    f"{SGLANG}:SGLangReplica.__init__": "e5059318ebd21880",
    "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer._preprocess_engine_kwargs": "92b8c9d865312cfd",
    "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer.generate": "ea45828267c4470e",
    "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer.run_server": "c7aea4516a115fdd",
    "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMReplica.__init__": "b4ec65a90ba70a73",
    "verl.workers.utils.losses:ppo_loss": "d7a7f4ab82c8a092",
    "verl.workers.utils.padding:no_padding_2_padding": "c37d19e7d9c31e69",
}
