"""Every block of code in docs/ runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
import torch.nn.utils.prune
from torch import nn

import secateur

PAGE = Path(__file__).parent.parent / "docs" / "training.md"
BLOCKS = re.findall(r"^## (.+?)$|^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)


def named_blocks() -> list[Any]:
    """(heading, code) of each block; the first one comes before any heading."""
    heading, found = "shared", []
    for title, code in BLOCKS:
        heading = title or heading
        if code:
            found.append((heading, code))
    return found


NAMED = named_blocks()


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize(("heading", "code"), NAMED[1:], ids=[h for h, _ in NAMED[1:]])
def test_the_block_runs(
    heading: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")
    torch.manual_seed(0)
    model = small()
    names: dict[str, Any] = {
        "secateur": secateur,
        "torch": torch,
        "model": model,
        "other": small(),
        "optimizer": torch.optim.AdamW(model.parameters()),
        "device": "cpu",
        "loss_fn": nn.functional.mse_loss,
        "data": [(torch.randn(8, 12), torch.randn(8, 4)) for _ in range(16)],
    }
    exec(NAMED[0][1], names)
    try:
        exec(compile(code, f"{PAGE.name}: {heading}", "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    pruner = names["pruner"]
    if pruner.steps > 6:
        assert pruner.sparsity() == pytest.approx(0.8, abs=0.01)
    if "pruner.remove()" not in code:
        pruner.check()
