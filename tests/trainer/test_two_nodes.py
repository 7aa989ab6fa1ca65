"""verl's real trainer on a Ray cluster of several nodes, including nodes with no or another version of the package."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks.processes import run
from tests.trainer.checks import assert_projected_within_bound, assert_side_channel_exact
from tests.trainer.run import PROBE_MODULE, make_assets, probe_lines, run_trainer
from tests.trainer.two_nodes import Node, cluster, equipped, other_python
from verl_troll import __version__
from verl_troll.versions import VERL

pytestmark = pytest.mark.trainer


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    return folder


@pytest.mark.slow
def test_troll_runs_on_every_node(assets: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    node = equipped(out, ["verl_troll.cpu", PROBE_MODULE])
    with cluster([node, node]) as overrides:
        rows = run_trainer(assets, out, ["+troll=default", *overrides, "trainer.total_training_steps=2"], probe=True)
    assert [row["step"] for row in rows] == [1, 2]
    assert_projected_within_bound(rows)
    assert_side_channel_exact(out, steps=2, samples=32, epochs=1)
    seen = defaultdict(list)
    for line in probe_lines(out):
        assert line["engine"] == "TrollFSDPEngine"
        seen[line["node"]].append(line["pass"])
    # Two steps of 32 samples, half on each node.
    assert [sorted(passes) for passes in seen.values()] == [["old"] * 32 + ["update"] * 32] * 2


def test_nodes_without_the_package_or_with_another_version_are_refused(assets: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    bare, older = other_python(tmp_path / "bare", None), other_python(tmp_path / "older", "0.0.9")
    with cluster([equipped(out), Node(bare), Node(older)]) as overrides:
        with pytest.raises(AssertionError) as failure:
            run_trainer(assets, out, ["+troll=default", *overrides, "data.train_batch_size=9"])
        # This driver connects before loading the plugin. It runs outside the clone: Ray's workers search its folder.
        address = overrides[0].partition("=")[2]
        program = f"import ray; ray.init('{address}'); import verl_troll.plugin"
        late = run([sys.executable, "-c", program], cwd=tmp_path)
    assert "the trainer ended with 1:" in str(failure.value)
    assert late.returncode == 1
    for log in (str(failure.value), late.stderr):
        error = log[log.rindex("ClusterError: ") :]
        assert (
            f"2 of 3 nodes of the Ray cluster do not have this driver's verl_troll {__version__}, verl {VERL}:" in error
        )
        assert re.search(rf"node 127\.0\.0\.3 \(\w{{56}}\): verl_troll missing, verl {re.escape(VERL)}\n", error)
        assert re.search(rf"node 127\.0\.0\.4 \(\w{{56}}\): verl_troll 0\.0\.9, verl {re.escape(VERL)}\n", error)
        assert "node 127.0.0.2" not in error
        assert f"pip install 'verl=={VERL}', and verl_troll {__version__} from the driver's clone or wheel" in error
    # Ray labels every line from the cluster with its process: nothing ran there that printed anything.
    assert "pid=" not in (out / "trainer.log").read_text()
    assert not (out / "metrics.jsonl").exists()
