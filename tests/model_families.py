"""Tiny random models of the families used with verl, saved with a tokenizer in the form that verl loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from transformers import PreTrainedModel

VOCAB = 128

# With head size 4, the scaled frequency already shows over a few tokens.
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# What distinguishes each family, by transformers' model type. Some tie their output weights, as small models do.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "llama": {"tie_word_embeddings": True, "rope_parameters": {**_LLAMA3, "rope_theta": 5e5}},
    "smollm3": {
        "tie_word_embeddings": True,
        "no_rope_layers": [1, 0],
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
    },
    "apertus": {"rope_parameters": {**_LLAMA3, "rope_theta": 12e6}},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
}


def write_family(folder: Path, family: str, **others: Any) -> str:
    """Write a random two-layer model of :data:`FAMILIES`, with ``others`` in its configuration; return the path."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=4,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        pad_token_id=VOCAB - 2,
        bos_token_id=None,
        eos_token_id=VOCAB - 1,
    )
    config = AutoConfig.for_model(family, **{**sizes, **FAMILIES[family], **others})
    return save(AutoModelForCausalLM.from_config(config, dtype=torch.float32), folder)


def save(model: PreTrainedModel, folder: Path) -> str:
    """Give ``model`` random weights with peaked outputs and write it with a tokenizer; return the path."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1, 0.2) if "norm" in name else parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    words = {**{f"t{index}": index for index in range(VOCAB - 2)}, "<pad>": VOCAB - 2, "<eos>": VOCAB - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return str(folder)


# Vision-language models, whose images become tokens of the prompt.
VISION: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3_vl": {
        "text_config": {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
    "qwen2_5_vl": {
        "text_config": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {"fullatt_block_indexes": [1], "window_size": 8},
    },
}
IMAGE, VIDEO, VISION_START, VISION_END = range(120, 124)
PATCH = {"patch_size": 4, "temporal_patch_size": 2}
MERGE = 2


def write_vision(folder: Path, family: str) -> str:
    """Write a random model of :data:`VISION` with two text and two vision layers; return the path."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    text: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=VOCAB - 2,
        bos_token_id=None,
        eos_token_id=VOCAB - 1,
    )
    vision: dict[str, Any] = dict(
        depth=2,
        hidden_size=16,
        num_heads=2,
        intermediate_size=32,
        out_hidden_size=32,
        spatial_merge_size=MERGE,
        **PATCH,
    )
    config = AutoConfig.for_model(
        family,
        text_config={**text, **VISION[family]["text_config"]},
        vision_config={**vision, **VISION[family]["vision_config"]},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    return save(AutoModelForImageTextToText.from_config(config, dtype=torch.float32), folder)


def with_images(batch: TensorDict, path: str, sizes: dict[int, list[tuple[int, int]]]) -> TensorDict:
    """``batch`` with random images in the prompts, as verl's agent loop passes them to an engine.

    verl's processor needs torchvision for videos. Here transformers' image processor and the model's own
    ``get_rope_index`` prepare images and positions in the same way.

    Args:
        path: the model that the batch is for.
        sizes: height and width in pixels of a sample's images, by index in the batch; other samples have none.
    """
    import numpy as np
    from PIL import Image
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path)).model
    processor = Qwen2VLImageProcessorPil(merge_size=MERGE, min_pixels=64, max_pixels=1024, **PATCH)
    generator = np.random.default_rng(0)
    rows = []
    for index, values in enumerate(zip(*(field.unbind() for field in batch.values()), strict=True)):
        row = dict(zip(batch.keys(), values, strict=True))
        prompt, images = row["prompts"], {}
        if index in sizes:
            pixels = [generator.integers(0, 255, (*size, 3), dtype=np.uint8) for size in sizes[index]]
            images = dict(processor([Image.fromarray(image) for image in pixels], return_tensors="pt"))
            for grid in images["image_grid_thw"]:
                tokens = [VISION_START, *[IMAGE] * (int(grid.prod()) // MERGE**2), VISION_END]
                prompt = torch.cat([prompt[:1], torch.tensor(tokens), prompt[1:]])
        ids = torch.cat([prompt, row["responses"]])
        positions, _ = model.get_rope_index(
            ids[None], (ids == IMAGE).int()[None], image_grid_thw=images.get("image_grid_thw")
        )
        text_positions = torch.arange(len(ids))[None]
        row.update(
            prompts=prompt,
            input_ids=ids,
            position_ids=torch.cat([text_positions, positions[:, 0]]),
            multi_modal_inputs=images,
        )
        rows.append(row)
    return list_of_dict_to_tensordict(rows)
