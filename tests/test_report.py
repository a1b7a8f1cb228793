"""Reports: what the numbers mean, and that the page stands alone."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur
from secateur import report


def test_summary_follows_the_layer_into_sparse_execution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = secateur.Pruner(
        model,
        optimizer,
        criterion=secateur.Magnitude(),
        granularity=secateur.Block(32),
        schedule=secateur.OneShot(0.5),
        scope="layer",
    )
    before = report.summary(pruner, model)
    assert [layer.sparsity for layer in before] == [0.0, 0.0]
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    pruner.remove()
    secateur.sparsify(model, optimizer, block=32)
    first, last = report.summary(pruner, model)
    assert first == report.LayerReport(
        name="0.weight",
        shape=(96, 64),
        units=6,
        target=0.5,
        sparsity=0.5,
        floor_held=False,
        runs="block-sparse 32x32",
    )
    assert (last.units, last.target, last.sparsity) == (3, 0.5, pytest.approx(2 / 3))
    together = report.Table.of_layers([first, last]).rows[-1]
    assert together[2:5] == ("9", "50.0%", f"{(0.5 * 96 * 64 + 2 / 3 * 96 * 32) / (96 * 96):.1%}")


def test_state_bytes_counts_weights_gradients_and_moments() -> None:
    model = nn.Linear(10, 7, bias=False)
    optimizer = torch.optim.Adam(model.parameters())
    assert report.state_bytes(model, optimizer) == 280
    model(torch.randn(2, 10)).sum().backward()
    assert report.state_bytes(model, optimizer) == 560
    optimizer.step()
    assert report.state_bytes(model, optimizer) == 4 * 280 + 4  # and Adam's step count


def test_peak_memory_is_in_bytes() -> None:
    assert 2**25 < report.peak_memory() < 2**42  # torch alone takes over 100 MiB


def test_paired_takes_turns() -> None:
    calls: list[str] = []
    a, b, ratio = report.paired(lambda: calls.append("a"), lambda: calls.append("b"), pairs=3)
    assert calls == ["a", "b"] * 4
    assert min(a, b, ratio) > 0


def test_paired_refuses_no_pairs() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        report.paired(lambda: None, lambda: None, pairs=0)


def _runs() -> tuple[report.Run, report.Run]:
    dense = report.Run("dense", [3.0, 2.0, 1.5], [0.0] * 3, [10.0, 12.0, 11.0])
    pruned = report.Run("pruned", [3.0, 2.5, 1.75], [0.0, 0.5, 0.5], [10.0, 11.0, 5.0])
    dense.results, pruned.results = {"loss & co": 1.5}, {"loss & co": 1.75}
    dense.parameters, pruned.parameters = 1000, 250
    dense.bytes, pruned.bytes = 2**22, 2**20
    pruned.sparse_from = 2
    return dense, pruned


def test_table_of_runs() -> None:
    rows = {row[0]: row[1:] for row in report.Table.of_runs(*_runs(), (20.0, 8.0, 2.5)).rows}
    assert rows["parameters"] == ("1,000", "250", "25.0%")
    assert rows["loss & co"] == ("1.5000", "1.7500", "+0.2500")
    assert rows["ms/step, steps 0 to 1"] == ("11.0", "10.5", "1.05x as fast")
    assert rows["ms/step, steps 2 to 2"] == ("11.0", "5.0", "2.20x as fast")
    assert rows["ms/step, in turns"] == ("20.0", "8.0", "2.50x as fast")
    assert rows["weights, gradients, moments"] == ("4.0 MiB", "1.0 MiB", "25.0%")


def test_page_is_well_formed_and_stands_alone(tmp_path: Path) -> None:
    dense, pruned = _runs()
    table = report.Table.of_runs(dense, pruned, (20.0, 8.0, 2.5))
    picture, page = tmp_path / "report.png", tmp_path / "report.html"
    report.plot(dense, pruned, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    report.page("A <title>", "a note", [table], picture, page)

    class Parser(HTMLParser):
        text, images, outside, open = "", 0, [], []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "img"):
                self.open.append(tag)
            for key, value in attrs:
                if key in ("src", "href"):
                    self.images += (value or "").startswith("data:image/png;base64,")
                    self.outside += [value] if not (value or "").startswith("data:") else []

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

        def handle_data(self, data: str) -> None:
            self.text += data

    parser = Parser()
    parser.feed(page.read_text(encoding="utf-8"))
    assert parser.open == []
    assert parser.outside == []
    assert parser.images == 1
    assert "A <title>" in parser.text
    assert "loss & co" in parser.text


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*secateur\[demo\]"):
        report.plot(*_runs(), tmp_path / "report.png")
