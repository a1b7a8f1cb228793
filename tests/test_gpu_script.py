"""bench/gpu.sh as far as it can be told without a GPU: what it runs, and what it says of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench import gpu

ROOT = Path(__file__).parent.parent
STEPS = ["check", "build", "tests", "sanitize", "bench"]


def script(
    *arguments: str, python: str | Path = sys.executable
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh", *arguments],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
    )


def summary(output: str) -> dict[str, str]:
    """What became of each step."""
    return dict(re.findall(r"^(\w+) +(\w+) +\d+ s ", output, re.MULTILINE))


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """One that takes every command well, but for what has to do with `pytest`."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\n[ "$2" != pytest ]\n')
    stub.chmod(0o755)
    return stub


def test_help_names_every_step() -> None:
    done = script("--help")
    assert done.returncode == 0
    assert re.findall(r"^  (\w+)  ", done.stdout, re.MULTILINE) == STEPS


def test_an_unknown_step_is_refused() -> None:
    done = script("build", "test")
    assert done.returncode == 2
    assert done.stderr.startswith("expected a step (check build tests sanitize bench), ")
    assert done.stderr.endswith("got 'test'\n")


def test_a_dry_run_prints_the_commands_of_every_step() -> None:
    done = script("--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert summary(done.stdout) == dict.fromkeys(STEPS, "planned")
    commands = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    for wanted in ("SECATEUR_CUDA=ON", "memcheck", "racecheck", "bench.block_sparse"):
        assert any(wanted in command for command in commands), wanted
    for name in re.findall(r"tests/\w+\.py", done.stdout):
        assert (ROOT / name).is_file(), name
    for module in re.findall(r"-m bench\.(\w+)", done.stdout):
        assert (ROOT / "bench" / f"{module}.py").is_file(), module


def test_a_dry_run_leaves_the_logs_of_a_real_one() -> None:
    log = ROOT / "build" / "gpu" / "bench.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    before = log.read_text() if log.exists() else None
    log.write_text("of a real run\n")
    try:
        script("--dry-run", "bench")
        assert log.read_text() == "of a real run\n"
    finally:
        log.unlink() if before is None else log.write_text(before)


def test_steps_can_be_chosen_and_benchmarks_be_short() -> None:
    done = script("--dry-run", "--quick", "bench")
    assert list(summary(done.stdout)) == ["bench"]
    assert "--device cuda --quick --csv build/gpu/results/scores.csv" in done.stdout
    assert "bench/results" not in done.stdout


def test_after_a_step_that_fails_the_others_run_and_the_status_tells(python: Path) -> None:
    done = script("check", "tests", "bench", "--quick", python=python)
    assert done.returncode == 1
    assert summary(done.stdout) == {"check": "passed", "tests": "FAILED", "bench": "passed"}
    assert done.stdout.endswith("failed: tests; to run that again: bench/gpu.sh tests\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = script("check", "tests", "bench")
    assert done.returncode == 1
    assert "failed: check tests bench;" in done.stdout
    assert len(re.findall("^expected a (GPU|torch with CUDA), got", done.stdout, re.MULTILINE)) == 3


def test_what_is_missing_is_told_by_version(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.missing(
        ["pytest>=8", "pytest>=999", "torch", "no-such-package>=1", "sh", "no-such-program"]
    )
    assert capsys.readouterr().out.split() == [
        "pytest>=999",
        "no-such-package>=1",
        "no-such-program",
    ]


@pytest.mark.parametrize(
    ("name", "folder"),
    [("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"), ("NVIDIA A100-SXM4", "nvidia-a100-sxm4")],
)
def test_results_are_filed_by_the_name_of_the_gpu(
    name: str, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    gpu.name()
    assert capsys.readouterr().out == f"{folder}\n"
