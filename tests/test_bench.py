"""What the benchmarks promise, and benchmarks that are checks as well."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import block_sparse, harness, optimizers, report, topk
from bench.harness import Call
from torch import Tensor

NO_PEERS = {"scipy": None, "sparselab": None}
SMALL = block_sparse.Problem(8, (64, 32), 8, 0.25, "uniform", "float32")


class Machine:
    """Calls that take as long as they are told, by a timer of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.called: list[str] = []

    def timer(self, run: Callable[[], Any]) -> float:
        before = self.now
        run()
        return self.now - before

    def takes(self, name: str, seconds: float) -> Callable[[], str]:
        def run() -> str:
            self.called.append(name)
            self.now += seconds
            return name

        return run


def refuse(result: Any) -> None:
    raise RuntimeError(f"expected something else, got {result}")


def test_a_wrong_result_raises_before_anything_is_timed() -> None:
    machine = Machine()

    calls = {
        "right": Call(machine.takes("right", 1e-3), lambda result: None),
        "wrong": Call(machine.takes("wrong", 1e-3), refuse),
    }
    with pytest.raises(RuntimeError, match="wrong is wrong: expected something else"):
        harness.measure(calls, 0.1, pytest.fail)
    assert machine.called == ["right", "wrong"]


def test_calls_take_turns_in_an_order_that_changes() -> None:
    machine = Machine()
    names = ["ours", "dense", "peer"]
    calls = {name: Call(machine.takes(name, 1e-3)) for name in names}
    harness.measure(calls, 0.0, machine.timer)
    timed = machine.called[len(names) :]
    rounds = [timed[i : i + len(names)] for i in range(0, len(timed), len(names))]
    assert [sorted(r) for r in rounds] == [sorted(names)] * harness.CALLS
    assert len({tuple(r) for r in rounds}) > 1


def test_the_median_of_at_least_15_calls_and_of_5_where_one_is_slow() -> None:
    machine = Machine()
    lengths = iter([9.0, *[0.2] * 9, *[0.4] * 5, 0.3])  # the first is the check
    calls = {
        "short": Call(lambda: machine.takes("short", next(lengths))()),
        "long": Call(machine.takes("long", 0.6)),
    }
    times = harness.measure(calls, 0.0, machine.timer)
    assert (times["short"].calls, times["long"].calls) == (15, 5)
    assert times["short"].seconds == pytest.approx(0.2)


def test_what_a_call_needs_is_prepared_each_time_and_not_timed() -> None:
    machine = Machine()
    calls = {"a": Call(machine.takes("a", 1e-3), prepare=machine.takes("fresh", 9.0))}
    assert harness.measure(calls, 0.0, machine.timer)["a"].seconds == pytest.approx(1e-3)
    assert machine.called == ["fresh", "a"] * (1 + harness.CALLS)


def test_on_a_gpu_the_time_is_that_between_two_events_after_l2_is_emptied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 2.0  # milliseconds

    class Buffer:
        def zero_(self) -> None:
            done.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *size, dtype: Buffer())
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
    timer, name = harness.timer()
    assert (timer(lambda: done.append("run")), name) == (2e-3, "cuda")
    assert done == ["flush", "record", "run", "record", "wait"]


def test_a_peer_that_cannot_do_it_is_left_out_and_named_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert harness.runs("fine", Call(lambda: 1))
    assert not harness.runs("bsr", Call(lambda: refuse("x")))
    assert not harness.runs("bsr", Call(lambda: refuse("x")))
    line = "bsr is left out where it does not run: expected something else, got x\n"
    assert capsys.readouterr().out == line


def test_short_calls_go_on_as_long_as_asked() -> None:
    machine = Machine()
    calls = {name: Call(machine.takes(name, 1e-3)) for name in ("a", "b")}
    assert harness.measure(calls, 0.5, machine.timer)["a"].calls == 250


def test_a_call_on_the_cpu_is_timed_as_users_make_it() -> None:
    """A default device, the CPU even, is a mode that every method of a tensor passes through."""
    with torch.device("cpu"):
        one = torch._C._len_torch_function_stack()
    before = torch._C._len_torch_function_stack()
    harness.set_device(argparse.ArgumentParser(), "cpu")
    assert torch._C._len_torch_function_stack() == before == one - 1


@pytest.mark.usefixtures("restore")
def test_one_thread_is_measured_in_cpu_time() -> None:
    names = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        names.append(harness.timer()[1])
    assert names == ["cpu", "wall"]


def test_a_missing_peer_is_named_and_its_cells_stay_empty(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modules = {}
    for name in ("scipy", "sparselab"):
        monkeypatch.setitem(sys.modules, name, None)
        modules[name] = harness.peer(name)
        assert f"{name} is not installed" in capsys.readouterr().out
    problem = replace(SMALL, block=1)
    rows = list(block_sparse.measured(problem, modules, {"float32": 1e12}, 1e11, 0.0))
    assert [row["pass"] for row in rows] == list(block_sparse.PASSES)
    for row in rows:
        assert row["calls"] >= 15
        assert row["x dense"] > 0
        assert row["x scipy"] is row["scipy ms"] is row["x sparselab"] is None
    assert rows[0]["x bsr"] > 0


def test_alone_no_call_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[list[str]] = []
    measure = harness.measure

    def logged(calls: Any, *args: Any) -> Any:
        together.append(list(calls))
        return measure(calls, *args)

    monkeypatch.setattr(harness, "measure", logged)
    rows = list(block_sparse.measured(SMALL, NO_PEERS, {"float32": 1e12}, 1e11, 0.0, alone=True))
    assert together == [["ours"], ["dense"]] * len(block_sparse.PASSES)
    assert all(row["x dense"] and row["x masked"] is None for row in rows)


@pytest.mark.parametrize("problem", [SMALL, replace(SMALL, block=1, pattern="zipf")])
def test_every_call_of_every_pass_is_checked_and_one_bad_element_is_enough(
    problem: block_sparse.Problem,
) -> None:
    modules = {name: harness.peer(name) for name in ("scipy", "sparselab")}
    seen = set()
    for name, _, _, calls in block_sparse.passes(problem, modules):
        for who, call in calls.items():
            result = call.run()
            assert call.check is not None
            assert call.check(result) < 1e-5
            outputs = result if isinstance(result, tuple) else (result,)
            for i, output in enumerate(map(torch.as_tensor, outputs)):
                bad = output.detach().clone(memory_format=torch.contiguous_format)
                # The slot with the most in it: some of sparselab's are padding.
                bad.view(-1)[bad.abs().argmax()] *= 1.001
                with pytest.raises(RuntimeError, match="within"):
                    call.check((*outputs[:i], bad, *outputs[i + 1 :]))
            seen.add((name, who))
    assert {("fwd", "ours"), ("dX", "ours"), ("dW", "ours"), ("fwd+bwd", "masked")} < seen


@pytest.mark.parametrize("density", block_sparse.DENSITIES)
def test_a_skewed_pattern_has_as_many_blocks_as_a_uniform_one(density: float) -> None:
    counts = {}
    for pattern in block_sparse.PATTERNS:
        torch.manual_seed(0)
        problem = replace(SMALL, shape=(512, 256), density=density, pattern=pattern)
        counts[pattern] = block_sparse.live_mask(problem).sum(1)
    live = round(density * 64 * 32)
    assert counts["uniform"].sum() == counts["zipf"].sum() == live
    if density < 1:
        spread = {pattern: count.double().std() for pattern, count in counts.items()}
        assert spread["zipf"] > 2 * spread["uniform"]
        assert not torch.equal(counts["zipf"], counts["zipf"].sort(descending=True).values)


def test_peers_of_selection_are_checked_too() -> None:
    scores = [torch.tensor([1.0, 4.0, 3.0]), torch.tensor([2.0, 5.0])]
    weights = [torch.ones(3), torch.ones(2)]
    right = [torch.tensor([False, True, True]), torch.tensor([False, True])]

    def same(masks: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(masks, right, strict=True))

    numpy = harness.peer("numpy")
    assert same(topk.by_partition(numpy, scores, 3))
    assert same(topk.by_prune(weights, scores, 3))
    topk.check_peer(right, scores, 3)
    for mask in ([True, True, False], [False, False, True]):  # 1 instead of 3, 4 forgotten
        with pytest.raises(RuntimeError, match="expected the 3 best"):
            topk.check_peer([torch.tensor(mask), right[1]], scores, 3)


def test_report_rewrites_what_is_between_its_markers_only() -> None:
    text = f"before {report.BEGIN} old {report.END} after"
    assert report.rewritten(text, "new") == f"before {report.BEGIN}\nnew\n{report.END} after"
    with pytest.raises(ValueError, match="expected one"):
        report.rewritten(text.replace(report.END, ""), "new")


def test_report_lists_what_loses_to_a_peer() -> None:
    rows = report.read("block_sparse")
    losing = rows[-1] | {"rows": "77", "x bsr": "0.5", "x scipy": "1.5"}
    lines = report.tables([*rows, losing]).splitlines()
    assert [line for line in lines if "| 77 |" in line] == [
        f"| bsr | {losing['pass']} | {losing['dtype']} | 77 | {losing['shape']} | "
        f"{losing['block']} | {losing['density']} | {losing['pattern']} | **0.50 ▼** |"
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--threads", "0"], "expected a number of at least 1, got '0'"),
        (["--threads", "two"], "expected a number of at least 1, got 'two'"),
        (["--csv", "{tmp}/file/rows.csv"], "expected a file to write, got"),
        (["--json", "{tmp}"], "expected a file to write, got"),
    ],
)
def test_wrong_options_are_refused_before_measuring(
    wrong: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["topk", *(text.format(tmp=tmp_path) for text in wrong)])
    monkeypatch.setattr(harness, "measure", pytest.fail)
    with pytest.raises(SystemExit, match="2"):
        topk.main()
    assert message in capsys.readouterr().err


def test_report_sets_results_beside_their_targets() -> None:
    row = {"x dense": "8.0", "of peak": "0.5", "of read": "0.8"}
    assert report.with_target(row, 8.0) == "8.00 of 8 (at most 10.0)"
    assert report.with_target({**row, "of read": "0.1"}, 9.5) == "**8.00 ▼** of 9.5 (at most 16.0)"
    assert report.with_target(row, None) == ""


def test_report_tells_what_does_not_shrink() -> None:
    def row(density: float) -> dict[str, str]:  # 2 ms, and 40 for all weights at half the peak
        ms = 2 + 40 * density
        gflops = 100 * 40 * density / ms
        case = {"block": "8", "dtype": "float32", "rows": "512", "shape": "4096x1024"}
        found = {"density": density, "ours ms": ms, "GFLOP/s": gflops}
        machine = {"peak GFLOP/s": "200", "read GB/s": "50"}
        return case | machine | {name: str(x) for name, x in found.items()}

    table = report.what_does_not_shrink([row(d) for d in (1.0, 0.5, 0.1)])
    assert table.splitlines()[-1] == "| 8 | 2.00 | 0.63 | 50 % |"


def test_report_lists_columns() -> None:
    rows = [{"scores": "|g*w|", "keep": "16", "ours ms": "5.2549", "x topk": "0.5", "cpu": "Zen"}]
    table = report.listed(rows, ("scores", "keep", "ours ms", "x topk"))
    assert table.splitlines()[0] == "| scores | keep | ours ms | x topk |"
    assert table.splitlines()[2] == "| \\|g*w\\| | 16 | 5.25 | **0.50 ▼** |"


def test_report_marks_what_loses() -> None:
    assert report.times({"x dense": "0.87"}) == "**0.87 ▼**"
    assert report.times({"x dense": "1.5"}) == "1.50"
    assert report.times({"x dense": ""}) == ""


def test_tables_of_the_readme_are_those_of_the_results() -> None:
    """Run `python -m bench.report` where this fails."""
    text = Path(report.README).read_text("utf-8")
    assert report.rewritten(text, report.everything()) == text


@pytest.mark.usefixtures("restore")
def test_no_optimizer_of_torch_moves_a_dead_weight(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hundred steps each, in every implementation that torch has; exits otherwise."""
    monkeypatch.setattr(sys, "argv", ["optimizers"])
    optimizers.main()
    assert "exactly zero" in capsys.readouterr().out
    assert torch.get_num_threads() == 1
