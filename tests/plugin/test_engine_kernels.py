"""What an engine checks and warns about its kernels at start-up, before any training on a GPU."""

from __future__ import annotations

import logging

import pytest
import torch

from verl_troll.core import kernels
from verl_troll.plugin.engines.mixin import check_kernels
from verl_troll.plugin.settings import TrollConfig, TrollConfigError

GPU = torch.device("cuda")


def serve(monkeypatch: pytest.MonkeyPatch, serves: bool) -> None:
    monkeypatch.setattr(kernels, "_triton_is_recent", lambda: serves)


def test_the_default_does_not_warn(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    serve(monkeypatch, True)
    check_kernels(TrollConfig(), GPU)
    serve(monkeypatch, False)
    check_kernels(TrollConfig(k=2000), torch.device("cpu"))
    assert not caplog.records


def test_more_ids_than_the_kernels_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, True)
    check_kernels(TrollConfig(k=511), GPU)
    with pytest.raises(TrollConfigError, match=r"policy_loss\.troll\.k=512: on a GPU allowed is at most 511"):
        check_kernels(TrollConfig(k=512), GPU)


@pytest.mark.parametrize(
    ("choice", "serves", "k", "reason"),
    [
        ("torch", True, 64, "kernels=torch was chosen"),
        ("torch", True, 2000, "kernels=torch was chosen"),
        ("auto", False, 64, "or later is not installed"),
    ],
)
def test_the_torch_forms_on_a_gpu_are_named(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    choice: str,
    serves: bool,
    k: int,
    reason: str,
) -> None:
    serve(monkeypatch, serves)
    with caplog.at_level(logging.WARNING):
        check_kernels(TrollConfig(kernels=choice, k=k), GPU)
    (record,) = caplog.records
    assert reason in record.getMessage() and "milliseconds" in record.getMessage()
