"""Benchmarks that are checks as well."""

from __future__ import annotations

import sys

import pytest
import torch
from bench import optimizers


@pytest.mark.usefixtures("restore")
def test_no_optimizer_of_torch_moves_a_dead_weight(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundred steps each, in every implementation that torch has; exits otherwise."""
    monkeypatch.setattr(sys, "argv", ["optimizers"])
    optimizers.main()
    assert "exactly zero" in capsys.readouterr().out
    assert torch.get_num_threads() == 1
