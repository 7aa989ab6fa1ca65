"""A checkpoint that a full disk cut off is not resumed from: verl's trainer goes on from the one before."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.attack.launchers import small_disk
from tests.trainer.run import make_assets, run_trainer

pytestmark = [pytest.mark.trainer, pytest.mark.slow]

DISK_BYTES = 800_000
"""One checkpoint of about 0.5 MB fits, two do not."""


def test_resumes_from_the_last_whole_checkpoint(tmp_path: Path) -> None:
    make_assets(tmp_path)
    with small_disk(tmp_path / "disk", DISK_BYTES) as disk:
        if disk is None:
            pytest.skip("needs the right to mount")
        settings = [
            "+troll=default",
            "trainer.save_freq=1",
            "trainer.resume_mode=auto",
            f"trainer.default_local_dir={disk}/checkpoints",
        ]
        with pytest.raises(AssertionError, match=r"the trainer ended with 1"):
            run_trainer(tmp_path, tmp_path / "first", [*settings, "trainer.total_training_steps=3"])
        # The second is cut off, and stays.
        assert (disk / "checkpoints" / "global_step_2").is_dir()
        assert (disk / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "1"
        short = ["trainer.total_training_steps=2", "trainer.save_freq=-1"]
        resumed = run_trainer(tmp_path, tmp_path / "second", [*settings, *short])
        assert [row["step"] for row in resumed] == [2]
