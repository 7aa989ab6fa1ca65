"""The options of ``verl-troll plan``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from verl_troll.tools.plan import report
from verl_troll.tools.plan.formulas import Plan
from verl_troll.tools.plan.setting import (
    BACKENDS,
    DTYPE_BYTES,
    FORMS,
    SUPPORTS,
    Backend,
    Hardware,
    Model,
    PlanError,
    Setting,
    model_from_config,
)

_SUFFIXES = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def _number(text: str) -> float:
    factor = _SUFFIXES.get(text[-1:], 1.0)
    try:
        return float(text[:-1] if text[-1:] in _SUFFIXES else text) * factor
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 8192, 8.2B or 3.35e12") from None


def _whole(text: str) -> int:
    value = _number(text)
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``verl-troll plan``."""
    model = parser.add_argument_group("model, by its configuration or by its sizes")
    model.add_argument("--model", type=Path, metavar="PATH", help="Hugging Face config.json, or its folder")
    model.add_argument("--vocab", type=_whole, metavar="N", help="ids, padding left out")
    model.add_argument("--hidden", type=_whole, metavar="N", help="hidden size")
    model.add_argument("--parameters", type=_number, metavar="N", help="embedding and head included, e.g. 8.2B")
    model.add_argument("--active-parameters", type=_number, metavar="N", help="used for one token (default: all)")
    model.add_argument("--tied", action="store_true", help="embedding and head share their weight")

    layout = parser.add_argument_group("layout")
    layout.add_argument("--backend", choices=BACKENDS, help="default: megatron with --tp or --pp, fsdp otherwise")
    layout.add_argument("--gpus", type=_whole, metavar="N", help="all GPUs; those left by --tp, --pp, --cp are dp")
    layout.add_argument("--tp", type=_whole, default=1, metavar="N", help="tensor parallel ranks")
    layout.add_argument("--pp", type=_whole, default=1, metavar="N", help="pipeline stages")
    layout.add_argument("--cp", type=_whole, default=1, metavar="N", help="context parallel or Ulysses ranks")
    layout.add_argument("--dp", type=_whole, metavar="N", help="data parallel ranks (default 1, or from --gpus)")

    step = parser.add_argument_group("step; --tokens, or --prompts, --samples and --response-length")
    step.add_argument("--tokens", type=_whole, metavar="N", help="response tokens per step, of all samples")
    step.add_argument("--prompts", type=_whole, metavar="N", help="prompts per step")
    step.add_argument("--samples", type=_whole, metavar="N", help="samples per prompt")
    step.add_argument("--response-length", type=_whole, metavar="N", help="mean tokens of a response")
    step.add_argument(
        "--prompt-length", type=_whole, default=0, metavar="N", help="mean tokens of a prompt (default 0)"
    )
    step.add_argument("--prompt-tokens", type=_whole, metavar="N", help="with --tokens: prompt tokens of all samples")
    step.add_argument(
        "--micro-batch-tokens",
        type=_whole,
        default=16384,
        metavar="N",
        help="of one data-parallel rank (default 16384)",
    )
    step.add_argument("--epochs", type=_whole, default=1, metavar="N", help="ppo_epochs (default 1)")
    step.add_argument("--mini-batches", type=_whole, default=1, metavar="N", help="updates per epoch (default 1)")

    troll = parser.add_argument_group("TROLL")
    troll.add_argument("--k", type=_whole, default=64, metavar="N", help="most ids kept (default 64)")
    troll.add_argument(
        "--kept-ids",
        type=_number,
        default=10.0,
        metavar="N",
        help="mean ids kept of a token (default 10: the paper, arXiv 2510.03817, reports 5 to 10 on average at the "
        "default settings); a run logs it as troll/support_size",
    )
    troll.add_argument("--support", choices=SUPPORTS, default="union", help="default union")
    troll.add_argument("--fused", action="store_true", help="use_fused_kernels=True, also for vanilla")
    troll.add_argument("--entropy", action="store_true", help="the update needs the entropy")
    troll.add_argument("--no-reuse-logits", action="store_true", help="reuse_logits=False")
    troll.add_argument("--kernels", choices=FORMS, default="triton", help="triton (default, as on GPUs) or torch")
    troll.add_argument(
        "--dtype",
        choices=DTYPE_BYTES,
        help="of the logits (default bfloat16; float32 on Megatron, which converts them, unless --fused)",
    )

    rates = parser.add_argument_group(
        "rates",
        "The defaults are nominal: NVIDIA's data sheets of the H100 SXM and the DGX H100; latencies are assumed. What "
        "kernels reach of the memory's rate was measured on one NVIDIA H200, see --explain.",
    )
    nominal = Hardware()
    for field, words in (
        ("flops", "dense bfloat16 flop/s"),
        ("memory_bandwidth", "GPU memory, bytes/s by its data sheet"),
        ("link_bandwidth", "inside a node, bytes/s in one direction"),
        ("network_bandwidth", "between nodes, bytes/s per GPU"),
        ("latency", "seconds per collective"),
        ("launch", "seconds per small GPU operation"),
    ):
        default = getattr(nominal, field)
        rates.add_argument(
            f"--{field.replace('_', '-')}",
            type=_number,
            default=default,
            metavar="X",
            help=f"{words} (default {default:g})",
        )
    rates.add_argument(
        "--gpus-per-node",
        type=_whole,
        default=nominal.gpus_per_node,
        metavar="N",
        help=f"default {nominal.gpus_per_node}",
    )

    parser.add_argument("--explain", action="store_true", help="print every formula with its value and its reason")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, in bytes and seconds")


def setting_from(arguments: argparse.Namespace) -> Setting:
    """The setting that the options describe.

    Raises:
        PlanError: an option is missing, is out of range or contradicts another; the message names it.
    """
    backend: Backend = arguments.backend or ("megatron" if arguments.tp > 1 or arguments.pp > 1 else "fsdp")
    tokens, prompt_tokens, sequences = _tokens(arguments)
    dtype = arguments.dtype or ("float32" if backend == "megatron" and not arguments.fused else "bfloat16")
    return Setting(
        model=_model(arguments),
        backend=backend,
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        sequences=sequences,
        dp=_data_parallel(arguments),
        reuse_logits=not arguments.no_reuse_logits,
        form=arguments.kernels,
        dtype_bytes=DTYPE_BYTES[dtype],
        hardware=Hardware(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Hardware)}),
        **{
            name: getattr(arguments, name)
            for name in (
                "micro_batch_tokens",
                "tp",
                "pp",
                "cp",
                "epochs",
                "mini_batches",
                "k",
                "kept_ids",
                "support",
                "fused",
                "entropy",
            )
        },
    )


def _model(arguments: argparse.Namespace) -> Model:
    sizes = ("vocab", "hidden", "parameters", "active_parameters")
    given = [name for name in sizes if getattr(arguments, name) is not None]
    if arguments.model is not None:
        if given or arguments.tied:
            name = (given or ["tied"])[0].replace("_", "-")
            raise PlanError(f"--{name} and --model exclude each other: the configuration says it")
        return model_from_config(arguments.model)
    missing = [name for name in sizes[:3] if name not in given]
    if missing:
        raise PlanError(f"--{missing[0]} is missing: give --model, or all of --vocab, --hidden and --parameters")
    return Model(
        arguments.vocab,
        arguments.hidden,
        arguments.parameters,
        arguments.parameters if arguments.active_parameters is None else arguments.active_parameters,
        arguments.tied,
    )


def _tokens(arguments: argparse.Namespace) -> tuple[int, int, int]:
    """Response tokens, prompt tokens and samples per step; 0 samples if unknown."""
    parts = ("prompts", "samples", "response_length")
    given = [name for name in parts if getattr(arguments, name) is not None]
    if arguments.tokens is not None:
        if given or arguments.prompt_length:
            name = (given or ["prompt_length"])[0].replace("_", "-")
            raise PlanError(f"--{name} and --tokens exclude each other")
        return arguments.tokens, arguments.prompt_tokens or 0, 0
    if arguments.prompt_tokens is not None:
        raise PlanError("--prompt-tokens goes with --tokens; with --prompts give --prompt-length")
    for name in parts:
        if name not in given:
            raise PlanError(
                f"--{name.replace('_', '-')} is missing: give --tokens, or all of --prompts, --samples and "
                "--response-length"
            )
        if getattr(arguments, name) < 1:
            raise PlanError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if arguments.prompt_length < 0:
        raise PlanError(f"--prompt-length must be at least 0, got {arguments.prompt_length}")
    samples = arguments.prompts * arguments.samples
    return samples * arguments.response_length, samples * arguments.prompt_length, samples


def _data_parallel(arguments: argparse.Namespace) -> int:
    if arguments.gpus is None:
        return 1 if arguments.dp is None else int(arguments.dp)
    for name in ("tp", "pp", "cp"):
        if getattr(arguments, name) < 1:
            raise PlanError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    copy = arguments.tp * arguments.pp * arguments.cp
    if arguments.gpus < 1 or arguments.gpus % copy:
        raise PlanError(f"--gpus must be a multiple of tp * pp * cp = {copy}, got {arguments.gpus}")
    dp = int(arguments.gpus // copy)
    if arguments.dp not in (None, dp):
        raise PlanError(f"--dp must be {dp} with --gpus {arguments.gpus} and tp * pp * cp = {copy}, got {arguments.dp}")
    return dp


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; return 0, or 2 if the options are invalid."""
    try:
        plan = Plan(setting_from(arguments))
    except PlanError as error:
        print(f"verl-troll plan: {error}", file=sys.stderr)
        return 2
    print(report.text(plan))
    if arguments.explain:
        print(f"\n{report.explanation(plan)}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report.as_json(plan), indent=2) + "\n", encoding="utf-8")
    return 0
