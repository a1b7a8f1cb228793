"""The examples as a stranger runs them, made small."""

from __future__ import annotations

import hashlib
import math
import runpy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(EXAMPLES))  # where `python examples/gpt.py` finds common.py
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What an example hands to its report; the report is still made."""
    import common

    calls: list[tuple[object, ...]] = []
    finish = common.finish

    def spy(*args: object) -> None:
        calls.append(args)
        finish(*args)

    monkeypatch.setattr(common, "finish", spy)
    return calls


def check(finished: list[tuple[object, ...]], out: Path, steps: int, sparsity: float) -> int:
    ((_, dense, pruned, _),) = finished
    assert (out / "report.png").stat().st_size > 10_000
    assert "data:image/png;base64," in (out / "report.html").read_text(encoding="utf-8")
    for run in (dense, pruned):
        assert len(run.loss) == len(run.sparsity) == len(run.ms) == steps
        assert all(map(math.isfinite, [*run.loss, *run.results.values()]))
    assert dense.loss[: steps // 10 + 1] == pruned.loss[: steps // 10 + 1]  # until pruning begins
    assert dense.sparsity == [0.0] * steps
    assert pruned.sparse_from == steps // 2 + 1
    assert all(layer.target == sparsity for layer in pruned.layers)
    assert any(layer.runs.startswith("block-sparse") for layer in pruned.layers)
    assert pruned.parameters < dense.parameters
    assert pruned.bytes < dense.bytes
    return sum(layer.units for layer in pruned.layers)


def test_gpt(
    tmp_path: Path,
    finished: list[tuple[object, ...]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    import gpt

    size = ["--batch=2", "--context=16", "--heads=1", "--depth=2", "--threads=1"]
    gpt.main(["--steps=20", *size, f"--out={tmp_path}"])
    units = check(finished, tmp_path, steps=20, sparsity=0.8)
    pruned = finished[0][2]
    # All units are 32x32 here, so the share of dead weights is the share of dead units.
    assert pruned.sparsity[-1] == pytest.approx(round(0.8 * units) / units, abs=1e-12)
    shown = capsys.readouterr()
    for words in ("validation loss", "in turns", "peak memory", "layers.1.down", "together"):
        assert words in shown.out
    assert "ms/step" in shown.err


def test_bible_is_the_expected_text() -> None:
    import kjv

    text = kjv.text()
    assert (text.shape, text.dtype) == ((4_139_440,), torch.int64)
    assert text.unique().tolist() == list(range(63))


def write_mnist(folder: Path) -> None:
    """Ten classes that a linear model tells apart, in MNIST's files."""
    random = np.random.default_rng(0)
    shapes = random.integers(0, 256, (10, 28, 28))
    for part, n in (("train", 200), ("t10k", 50)):
        labels = random.integers(0, 10, n)
        images = np.clip(shapes[labels] + random.integers(-20, 21, (n, 28, 28)), 0, 255)
        for kind, data in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, data.ndim]) + np.array(data.shape, ">u4").tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(header + data.astype("u1").tobytes())


def test_mnist(tmp_path: Path, finished: list[tuple[object, ...]]) -> None:
    import mnist

    write_mnist(tmp_path)
    size = ["--steps=60", "--batch=32", "--threads=1"]
    mnist.main([*size, f"--data={tmp_path}", "--unchecked", f"--out={tmp_path}"])
    check(finished, tmp_path, steps=60, sparsity=0.9)
    assert finished[0][2].results["test accuracy"] > 0.9


def test_mnist_refuses_other_files(tmp_path: Path) -> None:
    import mnist

    with pytest.raises(SystemExit, match=r"expected .*train-images.*make mnist gets it"):
        mnist.main(["--data", str(tmp_path)])
    write_mnist(tmp_path)
    raw = (tmp_path / "train-images-idx3-ubyte").read_bytes()
    with pytest.raises(SystemExit, match=f"md5 6bbc9ace.*got {hashlib.md5(raw).hexdigest()}"):
        mnist.main(["--data", str(tmp_path)])
    (tmp_path / "train-images-idx3-ubyte").write_bytes(raw[:-1])
    with pytest.raises(SystemExit, match="expected an IDX file"):
        mnist.main(["--data", str(tmp_path), "--unchecked"])
    (tmp_path / "train-images-idx3-ubyte").write_bytes(
        (tmp_path / "t10k-images-idx3-ubyte").read_bytes()
    )
    with pytest.raises(SystemExit, match=r"n images of 28x28 .* got \(50, 28, 28\) and \(200,\)"):
        mnist.main(["--data", str(tmp_path), "--unchecked"])


def test_gradient_pruning(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    script = EXAMPLES / "gradient_pruning.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 40
    names = runpy.run_path(str(script))
    dead = names["model"].weight == 0
    assert dead.any()
    assert torch.equal(names["pruner"].masks["weight"], ~dead)
    assert f"sparsity {names['pruner'].sparsity():.0%}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpt", "mnist"])
def test_examples_stay_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 9", "--steps: expected a whole number from 10 to"),
        ("--batch many", "--batch: expected a whole number from 1 to"),
        ("--sparsity 80", "--sparsity: expected a number between 0 and 1, got '80'"),
        ("--lr nan", "--lr: expected a number between 0 and 1, got 'nan'"),
        ("--context 4097", "--context: expected a whole number from 1 to 4096"),
        ("--out setup/readme/report", "--out: cannot make the folder"),
    ],
)
def test_bad_options_say_what_was_expected(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import gpt

    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup").write_text("a file where a folder should be")
    with pytest.raises(SystemExit, match="2"):
        gpt.main(arguments.split())
    assert message in capsys.readouterr().err


def test_ctrl_c_ends_without_a_traceback() -> None:
    import common

    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="stopped"):
        common.run(main)
