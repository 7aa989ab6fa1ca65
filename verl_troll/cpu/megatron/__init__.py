"""Megatron in CPU mode: verl's real Megatron engine on gloo, for tests.

Nothing here is active until a :class:`verl_troll.cpu.megatron.config.CpuMcoreEngineConfig` is built, which the Hydra
group ``+cpu=megatron`` puts in the place of verl's engine configuration.

=============  =======================================================================================
``config``     the engine configuration that asks for CPU mode, and allows float32
``engine``     verl's Megatron engine, each entry point run with the CPU as Megatron's accelerator
``device``     what Megatron asks of ``torch.cuda``, answered by the CPU
``layers``     stand-ins for TransformerEngine's layers
``attention``  a stand-in for TransformerEngine's attention, with context parallelism
``bridges``    mbridge's models, built from those layers
=============  =======================================================================================
"""
