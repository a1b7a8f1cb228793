"""What the examples share: their options, the progress bar, and the report at the end."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

from secateur import report


def whole(least: int, most: int = 10**9) -> Callable[[str], int]:
    """An argparse type: a whole number from ``least`` to ``most``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {least} to {most}, got {text!r}"
            )
        return value

    return parse


def between(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number strictly between ``low`` and ``high``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = low
        if not low < value < high:
            raise argparse.ArgumentTypeError(
                f"expected a number between {low:g} and {high:g}, got {text!r}"
            )
        return value

    return parse


def options(
    description: str, *, steps: int, batch: int, lr: float, sparsity: float, block: int
) -> argparse.ArgumentParser:
    """The options that every example has; the keywords are its defaults."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=whole(10), default=steps, help="optimizer steps of each of the two runs")
    add("--batch", type=whole(1), default=batch, help="sequences or images in a batch")
    add("--lr", type=between(0, 1), default=lr, help="largest learning rate of the schedule")
    add("--sparsity", type=between(0, 1), default=sparsity, help="share of the units to prune")
    add("--block", type=whole(1), default=block, help="side of the square blocks that are pruned")
    add("--seed", type=whole(0), default=0, help="of the initial weights and of the batches")
    add(
        "--threads",
        type=whole(1),
        default=torch.get_num_threads(),
        help="CPU threads torch computes with",
    )
    add("--out", type=Path, default=Path(), help="where report.html and report.png go")
    add(
        "--quick",
        dest="steps",
        action="store_const",
        const=60,
        default=argparse.SUPPRESS,
        help="60 steps only: to see that it works, not what it reaches",
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, apply --threads, make the folder of --out."""
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: cannot make the folder {args.out}: {error.strerror}")
    return args


def progress(run: report.Run, steps: int) -> Iterator[int]:
    """Count the steps under a progress bar and time each; the body logs loss and sparsity."""
    patience = 0.2 if sys.stderr.isatty() else 10  # seconds; a log file needs few lines
    with tqdm(range(steps), desc=run.name.rjust(6), unit="step", mininterval=patience) as bar:
        for step in bar:
            start = time.perf_counter()
            yield step
            run.ms.append((time.perf_counter() - start) * 1e3)
            now = f"loss {run.loss[-1]:.3f}, sparsity {run.sparsity[-1]:.0%}"
            bar.set_postfix_str(f"{now}, {run.ms[-1]:.0f} ms/step", refresh=False)


def finish(title: str, dense: report.Run, pruned: report.Run, args: argparse.Namespace) -> None:
    """Time the two by turns, print the tables, write report.html and report.png."""
    pairs = report.paired(dense.again, pruned.again)
    tables = [report.Table.of_layers(pruned.layers), report.Table.of_runs(dense, pruned, pairs)]
    note = (
        f"{args.steps} steps of {args.batch}, learning rate {args.lr:g}, seed {args.seed}; "
        f"torch {torch.__version__}, {args.threads} threads, {platform.machine()}. "
        "Every number was measured in this run."
    )
    console = Console()
    for table in tables:
        console.print(table)
    console.print(note, style="dim")
    report.plot(dense, pruned, args.out / "report.png")
    report.page(title, note, tables, args.out / "report.png", args.out / "report.html")
    console.print(f"wrote {args.out / 'report.html'} and {args.out / 'report.png'}")


def run(main: Callable[[], None]) -> None:
    """Run an example's main; Ctrl-C ends it without a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
