"""Megatron in CPU mode: verl's real Megatron engine on gloo, for tests.

Building a :class:`verl_troll.cpu.megatron.config.CpuMcoreEngineConfig` activates it; the Hydra group ``+cpu=megatron``
uses that instead of verl's engine configuration.

=============  =======================================================================================
``config``     the engine configuration that enables CPU mode and allows float32
``engine``     runs each entry point of verl's Megatron engine with the CPU as the accelerator
``device``     maps Megatron's use of ``torch.cuda`` to the CPU
``layers``     replacements for TransformerEngine's layers
``attention``  a replacement for TransformerEngine's attention, with context parallelism
``bridges``    mbridge's models, built from these layers
=============  =======================================================================================
"""
