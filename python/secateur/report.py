"""What a training run measured: numbers, tables, plots and a page that holds them.

rich and matplotlib come with the ``demo`` extra and are imported where they are used.
"""

from __future__ import annotations

import base64
import html
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.layers import walk
from secateur.nn import BlockSparseLinear
from secateur.pruner import Pruner

__all__ = [
    "LayerReport",
    "Run",
    "Table",
    "page",
    "paired",
    "peak_memory",
    "plot",
    "state_bytes",
    "summary",
]


@dataclass(frozen=True)
class LayerReport:
    """How one pruned weight ended.

    Attributes:
        name: the parameter's name.
        shape: the weight's shape.
        units: how many units (weights or groups) the layer was divided into.
        target: the sparsity asked of the layer; under a global scope, of all layers together.
        sparsity: the share of its weights that is dead.
        floor_held: whether its best unit lives only because a layer keeps at least one.
        runs: "dense", or "block-sparse" with the size of the blocks.
    """

    name: str
    shape: tuple[int, ...]
    units: int
    target: float
    sparsity: float
    floor_held: bool
    runs: str


def summary(pruner: Pruner, model: nn.Module) -> list[LayerReport]:
    """How each weight of the pruner stands, and how the model runs its layer now.

    Args:
        pruner: at work, or removed after it.
        model: the pruner's model; before or after :func:`secateur.sparsify`.
    """
    modules = dict(walk(model))
    reports = []
    for layer in pruner.layers:
        module = modules.get(layer.name.rpartition(".")[0])
        runs = "dense"
        if isinstance(module, BlockSparseLinear):
            runs = "block-sparse " + "x".join(map(str, module.weight.block))
        reports.append(
            LayerReport(
                name=layer.name,
                shape=tuple(layer.shape),
                units=layer.units,
                target=layer.target,
                sparsity=layer.sparsity,
                floor_held=layer.floor_held,
                runs=runs,
            )
        )
    return reports


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that training keeps between steps: weights, gradients, moments, buffers, patterns."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, BlockSparseLinear):
            tensors += module.weight.pattern.tensors()
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    for state in optimizer.state.values():
        tensors += [t for t in state.values() if isinstance(t, torch.Tensor)]
    # A layer's buffers are tensors of its pattern.
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def peak_memory() -> int:
    """Largest resident size of this process since it started, in bytes."""
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def paired(
    first: Callable[[], object], second: Callable[[], object], pairs: int = 15
) -> tuple[float, float, float]:
    """Time two functions by turns, so that a machine's noise falls on both alike.

    Args:
        first, second: called ``pairs`` times each after one call that is not counted.
        pairs: at least 1.

    Returns:
        The median of each in milliseconds, and the median of the ratios first / second, pair by
        pair: above 1 where ``second`` is the faster one.

    Raises:
        ValueError: ``pairs`` is below 1.
    """
    if pairs < 1:
        raise ValueError(f"expected pairs to be at least 1, got {pairs}")
    times: list[tuple[float, float]] = []
    for _ in range(pairs + 1):
        start = time.perf_counter()
        first()
        middle = time.perf_counter()
        second()
        times.append(((middle - start) * 1e3, (time.perf_counter() - middle) * 1e3))
    a, b = zip(*times[1:], strict=True)
    ratio = statistics.median(x / y for x, y in times[1:])
    return statistics.median(a), statistics.median(b), ratio


@dataclass
class Run:
    """One training run, step by step.

    Attributes:
        name: what tables and plots call it.
        loss, sparsity, ms: one number a step; ``sparsity`` is the share of pruned weights that is
            dead, ``ms`` the step's time in milliseconds.
        sparse_from: the first step that ran block-sparse, or None.
        layers: how each pruned weight ended.
        results: what the run reached, for example ``{"validation loss": 1.5}``.
        parameters: how many parameters the model holds at the end.
        bytes: :func:`state_bytes` at the end.
        again: makes one more training step; for :func:`paired`.
    """

    name: str
    loss: list[float] = field(default_factory=list)
    sparsity: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    sparse_from: int | None = None
    layers: list[LayerReport] = field(default_factory=list)
    results: dict[str, float] = field(default_factory=dict)
    parameters: int = 0
    bytes: int = 0
    again: Callable[[], object] | None = None

    def close(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, again: Callable[[], object]
    ) -> Run:
        """Take down what the run ended with: ``parameters``, ``bytes`` and ``again``."""
        self.parameters = sum(p.numel() for p in model.parameters())
        self.bytes = state_bytes(model, optimizer)
        self.again = again
        return self


@dataclass(frozen=True)
class Table:
    """Rows of text under a title, shown the same way in a terminal and on a page.

    The first column is set to the left, the others to the right.
    """

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    @classmethod
    def of_layers(cls, layers: Iterable[LayerReport]) -> Table:
        """Shape, target and reached sparsity of each layer, and how it runs."""
        layers = list(layers)
        rows = [
            (
                layer.name.removesuffix(".weight"),
                "x".join(map(str, layer.shape)),
                f"{layer.units:,}",
                f"{layer.target:.1%}",
                f"{layer.sparsity:.1%}",
                layer.runs + (", floor held" if layer.floor_held else ""),
            )
            for layer in layers
        ]
        sizes = [math.prod(layer.shape) for layer in layers]
        units = [layer.units for layer in layers]
        target = sum(layer.target * n for layer, n in zip(layers, units, strict=True)) / sum(units)
        dead = sum(layer.sparsity * n for layer, n in zip(layers, sizes, strict=True)) / sum(sizes)
        rows.append(("together", "", f"{sum(units):,}", f"{target:.1%}", f"{dead:.1%}", ""))
        return cls("Pruned layers", ("layer", "shape", "units", "target", "reached", "runs"), rows)

    @classmethod
    def of_runs(cls, dense: Run, pruned: Run, pairs: tuple[float, float, float]) -> Table:
        """The two runs side by side; ``pairs`` is what :func:`paired` returned."""
        cut = pruned.sparse_from or 0
        a, b, ratio = pairs
        state = pruned.bytes / dense.bytes
        rows = [
            (
                "parameters",
                f"{dense.parameters:,}",
                f"{pruned.parameters:,}",
                f"{pruned.parameters / dense.parameters:.1%}",
            ),
            *(
                (name, f"{dense.results[name]:.4f}", f"{value:.4f}", _change(dense, pruned, name))
                for name, value in pruned.results.items()
            ),
            _ms(f"ms/step, steps 0 to {cut - 1}", dense.ms[:cut], pruned.ms[:cut]),
            _ms(f"ms/step, steps {cut} to {len(pruned.ms) - 1}", dense.ms[cut:], pruned.ms[cut:]),
            ("ms/step, in turns", f"{a:.1f}", f"{b:.1f}", f"{ratio:.2f}x as fast"),
            (
                "weights, gradients, moments",
                f"{dense.bytes / 2**20:.1f} MiB",
                f"{pruned.bytes / 2**20:.1f} MiB",
                f"{state:.1%}",
            ),
            ("peak memory of the process", "", "", f"{peak_memory() / 2**20:,.0f} MiB"),
        ]
        return cls("Whole model", ("", dense.name, pruned.name, "pruned against dense"), rows)

    def __rich__(self) -> Any:
        table = _extra("rich.table").Table(title=self.title, title_justify="left")
        for i, name in enumerate(self.head):
            table.add_column(name, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def html(self) -> str:
        """The table as HTML."""

        def line(tag: str, cells: Sequence[str]) -> str:
            body = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
            return f"<tr>{body}</tr>"

        return (
            f"<h2>{html.escape(self.title)}</h2>\n<table>\n<thead>{line('th', self.head)}</thead>\n"
            + "\n".join(line("td", row) for row in self.rows)
            + "\n</table>"
        )


def plot(dense: Run, pruned: Run, path: Path) -> None:
    """Write loss, sparsity and milliseconds over the steps of both runs as a PNG."""
    figure = _extra("matplotlib.figure").Figure(figsize=(9, 8), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 2.2])
    # Where the runs agree, the thin dense line lies on the wide pruned one and both are seen.
    for run, colour, width in ((pruned, "#14b8a6", 3.5), (dense, "#1e293b", 1.3)):
        for axis, values in zip(axes, (run.loss, run.sparsity, run.ms), strict=True):
            if axis is axes[1]:
                axis.plot([100 * v for v in values], color=colour, lw=width, label=run.name)
                continue
            axis.plot(values, color=colour, lw=0.6, alpha=0.2)
            axis.plot(_smooth(values), color=colour, lw=width, label=run.name)
    for axis, label in zip(axes, ("training loss", "sparsity, %", "ms/step"), strict=True):
        axis.set_ylabel(label)
        axis.grid(color="#e2e8f0")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#94a3b8")
        if pruned.sparse_from is not None:
            axis.axvline(pruned.sparse_from, color="#0d9488", lw=1, ls=(0, (4, 3)))
    axes[1].set_ylim(0, 100)
    # A step that a busy machine made ten times as long must not flatten all the others.
    usual = sorted(dense.ms + pruned.ms)
    axes[2].set_ylim(0, 1.15 * usual[int(0.98 * (len(usual) - 1))])
    axes[0].legend(frameon=False)
    if pruned.sparse_from is not None:
        axes[0].annotate(
            "block-sparse from here",
            (pruned.sparse_from, 1),
            xycoords=("data", "axes fraction"),
            xytext=(6, -12),
            textcoords="offset points",
            color="#0d9488",
        )
    axes[2].set_xlabel("step")
    axes[2].set_xlim(0, max(1, len(pruned.ms) - 1))
    figure.savefig(path, dpi=150)


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #0f172a; max-width: 60rem; margin: 3rem auto;
       padding: 0 1.5rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem }
.note { color: #64748b; margin-top: .25rem } img { width: 100% }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { color: #64748b; font-weight: 500; border-bottom: 1px solid #94a3b8 }
th, td { text-align: right; padding: .3rem .75rem }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
td { border-bottom: 1px solid #e2e8f0 }
"""


def page(title: str, note: str, tables: Iterable[Table], picture: Path, path: Path) -> None:
    """Write one self-contained HTML page: title, note, the picture (a PNG), the tables."""
    image = base64.b64encode(picture.read_bytes()).decode()
    path.write_text(
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p class="note">{html.escape(note)}</p>
<img alt="Training loss, sparsity and milliseconds a step, over the steps of both runs"
 src="data:image/png;base64,{image}">
{"".join(table.html() for table in tables)}
</body>
</html>
""",
        encoding="utf-8",
    )


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"secateur.report needs {module.partition('.')[0]}, which the demo extra brings: "
            "pip install 'secateur[demo]'"
        ) from error


def _change(dense: Run, pruned: Run, name: str) -> str:
    return f"{pruned.results[name] - dense.results[name]:+.4f}"


def _ms(label: str, dense: Sequence[float], pruned: Sequence[float]) -> tuple[str, ...]:
    if not dense or not pruned:
        return (label, "-", "-", "")
    a, b = statistics.median(dense), statistics.median(pruned)
    return (label, f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}x as fast")


def _smooth(values: Sequence[float], half: int = 10) -> list[float]:
    """Running median: unmoved by the odd slow step."""
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
