"""Writes the tables of bench/README.md and the plot from the CSV files of bench/results."""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from bench import topk
from bench.block_sparse import DENSITIES, PASSES, PATTERNS, ROWS, SHAPES, SPARSE

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README = HERE / "README.md"
BEGIN, END = "<!-- python -m bench.report: begin -->", "<!-- python -m bench.report: end -->"

Row = Mapping[str, str]

BASE = {
    "dtype": "float32",
    "rows": str(ROWS[0]),
    "shape": f"{SHAPES[0][0]}x{SHAPES[0][1]}",
    "density": str(SPARSE),
    "pattern": PATTERNS[0],
}
DENSITY = [str(density) for density in DENSITIES]
CASE = ("pass", "dtype", "rows", "shape", "block", "density", "pattern")
# What we set out to reach, forward and backward over dense torch of the same dtype, by density.
# Dense torch was known to make 75 % of the float32 peak then.
TARGETS = {
    "1": {"0.25": 1.5, "0.1": 4.0, "0.05": 7.0},
    "8": {"0.5": 1.2, "0.25": 2.4, "0.1": 5.5, "0.05": 10.0},
    "16": {"0.5": 1.6, "0.25": 3.2, "0.1": 8.0, "0.05": 13.0},
    "32": {"0.5": 1.9, "0.25": 3.8, "0.1": 9.5, "0.05": 16.0},
    "64": {"0.5": 2.0, "0.25": 4.0, "0.1": 10.0, "0.05": 17.0},
    "128": {"0.5": 2.0, "0.25": 4.0, "0.1": 10.0, "0.05": 17.0},
}
OF_BFLOAT16 = 0.85  # is asked of that, in blocks of 16 and up
FEW = {"1": 0.8 / SPARSE, "8": 0.8 / SPARSE}  # forward, by rows

# Beside the products: file, what it holds, its columns.
OTHERS = {
    "topk": (
        "Selection among 16 M scores in 50 tensors",
        ("scores", "keep", "ours ms", "GB/s", "of dot", *(f"x {peer}" for peer in topk.PEERS)),
    ),
    "scores": (
        "Scores of a 4096 x 4096 weight",
        ("score", "dtype", "ours ms", "GB/s", "x torch"),
    ),
    "nm": (
        "N:M masks by |g*w|",
        ("n:m", "dtype", "shape", "ours ms", "GB/s", "of dot", "x topk", "x ranks"),
    ),
}

PEERS_OF = {
    "fwd": ("dense", "bsr", "scipy", "sparselab"),
    "fwd+bwd": ("dense", "masked", "sparselab"),
}


def read(name: str) -> list[Row]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def where(rows: Sequence[Row], wanted: Row) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def times(row: Row, other: str = "dense") -> str:
    """How many times as fast as ``other``; what loses is marked."""
    if not row[f"x {other}"]:
        return ""
    factor = float(row[f"x {other}"])
    return f"{factor:.2f}" if factor >= 1 else f"**{factor:.2f} ▼**"


def with_peak(row: Row) -> str:
    return f"{times(row)} ({100 * float(row['of peak']):.0f} %)"


def with_target(row: Row, target: float | None) -> str:
    """Times dense torch, of how many that were the target, and the most that the machine allows.

    That is when all multiply-adds run at the peak, or all bytes at the rate of reading.
    """
    if target is None:
        return ""
    found = float(row["x dense"])
    most = found / max(float(row["of peak"]), float(row["of read"]))
    met = f"{found:.2f}" if found >= target else f"**{found:.2f} ▼**"
    return f"{met} of {target:.3g} (at most {most:.1f})"


def what_does_not_shrink(rows: Sequence[Row]) -> str:
    """A Markdown table of a line through the times at all densities, by least relative errors."""
    lines = [
        "| block | ms at density 0 | one pass over x, y, dY, dX | share of peak beyond |",
        "| --- | --- | --- | --- |",
    ]
    for block in sorted({row["block"] for row in rows}, key=int):
        found = where(rows, {"block": block})
        ms = [float(row["ours ms"]) for row in found]
        slope, start = np.polyfit(
            [float(r["density"]) for r in found], ms, 1, w=[1 / t for t in ms]
        )
        row = found[0]
        work = float(row["GFLOP/s"]) * float(row["ours ms"]) / float(row["density"])  # Mflop
        (n, k), m = map(int, row["shape"].split("x")), int(row["rows"])
        moved = 3 * m * (n + k) * (4 if row["dtype"] == "float32" else 2) / float(row["read GB/s"])
        share = work / slope / float(row["peak GFLOP/s"])
        lines.append(f"| {block} | {start:.2f} | {moved / 1e6:.2f} | {100 * share:.0f} % |")
    return "\n".join(lines)


def by_dense(rows: Sequence[Row]) -> str:
    """What dense torch makes of the peak, by the cases where it does as much work as ours."""
    found = where(rows, {**BASE, "dtype": rows[0]["dtype"], "pass": "fwd+bwd", "density": "1.0"})
    shares = [float(row["of peak"]) / float(row["x dense"]) for row in found]
    return f", of which dense torch makes {100 * statistics.median(shares):.0f} %" if shares else ""


def pivot(
    rows: Sequence[Row], across: str, columns: Sequence[str], cell: Callable[[Row], str] = times
) -> str:
    """A Markdown table, one line a block size; empty cells are what was not measured."""
    lines = [["block", *columns], ["---"] * (1 + len(columns))]
    for block in sorted({row["block"] for row in rows}, key=int):
        found = {row[across]: cell(row) for row in where(rows, {"block": block})}
        lines.append([block, *(found.get(column, "") for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(rows: Sequence[Row]) -> str:
    """All tables, with headings."""
    first = rows[0]
    environment = ("cpu", "isa", "threads", "clock", "torch", "secateur", "scipy", "sparselab")
    parts = [
        "Measured on " + ", ".join(f"{name} {first[name]}" for name in environment) + ".",
        "; ".join(
            f"{dtype}: peak {float(found[0]['peak GFLOP/s']):.0f} GFLOP/s{by_dense(found)}"
            for dtype in ("float32", "bfloat16")
            if (found := where(rows, {"dtype": dtype}))
        )
        + f"; read bandwidth {float(first['read GB/s']):.0f} GB/s. **▼** marks what loses.",
    ]

    def add(title: str, table: str) -> None:
        if table.count("\n") > 1:  # not for a part of the grid that was not measured
            parts.extend((f"### {title}", table))

    def at(wanted: Row) -> list[Row]:
        return where(rows, {**BASE, **wanted})

    for dtype, least in (("float32", 1), ("bfloat16", 16)):
        asked = {
            block: {d: t if dtype == "float32" else OF_BFLOAT16 * t for d, t in targets.items()}
            for block, targets in TARGETS.items()
            if int(block) >= least
        }
        of = {"pass": "fwd+bwd", "dtype": dtype}
        densities = list(TARGETS["8"])
        found = [r for d in densities for r in at({**of, "density": d}) if r["block"] in asked]
        add(
            f"fwd+bwd, {dtype}, {ROWS[0]} rows: times dense torch, of the target, by density",
            pivot(
                found,
                "density",
                densities,
                lambda r, asked=asked: with_target(r, asked[r["block"]].get(r["density"])),
            ),
        )
    found = [r for m in FEW for r in at({"pass": "fwd", "rows": m})]
    add(
        f"fwd, {BASE['dtype']}, density {SPARSE}: times dense torch, of the target, by rows",
        pivot(found, "rows", list(FEW), lambda r: with_target(r, FEW[r["rows"]])),
    )
    for dtype in ("float32", "bfloat16"):
        found = [r for d in DENSITY for r in at({"pass": "fwd+bwd", "dtype": dtype, "density": d})]
        add(f"fwd+bwd, {dtype}, {ROWS[0]} rows: what does not shrink", what_does_not_shrink(found))
    for dtype, name in itertools.product(("float32", "bfloat16"), PASSES):
        found = [r for d in DENSITY for r in at({"pass": name, "dtype": dtype, "density": d})]
        add(
            f"{name}, {dtype}, {ROWS[0]} rows: times dense torch (share of peak), by density",
            pivot(found, "density", DENSITY, with_peak),
        )
    sparse = f"{BASE['dtype']}, density {SPARSE}"
    batches = [str(m) for m in sorted(ROWS)]
    for name in ("fwd", "fwd+bwd"):
        found = [r for m in batches for r in at({"pass": name, "rows": m})]
        add(f"{name}, {sparse}: times dense torch, by rows", pivot(found, "rows", batches))
    shapes = [f"{n}x{k}" for n, k in SHAPES]
    found = [r for shape in shapes for r in at({"pass": "fwd+bwd", "shape": shape})]
    add(
        f"fwd+bwd, {sparse}, {ROWS[0]} rows: times dense torch, by shape",
        pivot(found, "shape", shapes),
    )
    found = [r for pattern in PATTERNS for r in at({"pass": "fwd+bwd", "pattern": pattern})]
    add(
        f"fwd+bwd, {sparse}: GFLOP/s on uniform and on skewed rows of blocks",
        pivot(found, "pattern", PATTERNS, lambda r: f"{float(r['GFLOP/s']):.0f}"),
    )
    found = [r for name in PASSES for r in at({"pass": name})]
    add(
        f"{sparse}: milliseconds of each pass",
        pivot(found, "pass", PASSES, lambda r: f"{float(r['ours ms']):.2f}"),
    )
    add(
        f"{sparse}: largest error, over that of dense torch",
        pivot(
            found, "pass", PASSES, lambda r: f"{float(r['error']) / float(r['dense error']):.1f}"
        ),
    )
    for name, peers in PEERS_OF.items():
        found = [{**r, "peer": peer} for peer in peers for r in at({"pass": name})]
        add(
            f"{name}, {sparse}: times as fast as each peer",
            pivot(found, "peer", peers, lambda r: times(r, r["peer"])),
        )
    lost = [
        f"| {peer} | {' | '.join(row[key] for key in CASE)} | {times(row, peer)} |"
        for peer in dict.fromkeys(name for names in PEERS_OF.values() for name in names)
        if peer != "dense"
        for row in rows
        if row[f"x {peer}"] and float(row[f"x {peer}"]) < 1
    ]
    head = f"| peer | {' | '.join(CASE)} | times as fast |"
    parts.append("### Every case that loses to another peer than dense torch")
    parts.append("\n".join([head, "| --- " * (len(CASE) + 2) + "|", *lost]) if lost else "None.")
    return "\n\n".join(parts)


def listed(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A Markdown table of some columns, one line a row; numbers with two decimals."""

    def cell(row: Row, name: str) -> str:
        value = row[name]
        if name.startswith("x "):
            return times(row, name.removeprefix("x "))
        if name.endswith((" ms", "GB/s", "of dot")):
            return f"{float(value):.2f}"
        return value.replace("|", "\\|")

    lines = [columns, ["---"] * len(columns), *([cell(r, c) for c in columns] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def everything() -> str:
    """What stands between the markers."""
    parts = [tables(read("block_sparse"))]
    for name, (title, columns) in OTHERS.items():
        rows = read(name)
        machine = ", ".join(f"{key} {rows[0][key]}" for key in ("cpu", "isa", "threads", "clock"))
        parts += [f"### {title}", f"`python -m bench.{name}` on {machine}.", listed(rows, columns)]
    return "\n\n".join(parts)


def rewritten(text: str, new: str) -> str:
    """``text`` with ``new`` between the markers.

    Raises:
        ValueError: the markers do not stand in ``text`` once each, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after or END in before + after:
        raise ValueError(f"expected one {BEGIN!r} and then one {END!r}, got another text")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Speed-up over density, one line a block size."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "secateur"  # the same rows give the same file
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True, layout="constrained")
    every = {key: value for key, value in BASE.items() if key != "density"}
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        found = where(rows, {**every, "dtype": dtype, "pass": "fwd+bwd"})
        for block in dict.fromkeys(row["block"] for row in found):
            line = where(found, {"block": block})
            axis.plot(
                [float(row["density"]) for row in line],
                [float(row["x dense"]) for row in line],
                marker="o",
                label=f"block {block}",
            )
        axis.plot(DENSITIES, [1 / d for d in DENSITIES], "k--", label="1 / density")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="sparsity", title=dtype)
        axis.invert_xaxis()
        axis.set_xticks(DENSITIES, [f"{100 * (1 - d):.0f} %" for d in DENSITIES])
        axis.set_yticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("forward and backward, times dense torch")
    axes[0].legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    README.write_text(rewritten(README.read_text("utf-8"), everything()), "utf-8")
    plot(read("block_sparse"), RESULTS / "block_sparse.svg")


if __name__ == "__main__":
    main()
