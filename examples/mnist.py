"""Train LeNet-300-100 on MNIST twice, dense and pruned, and compare."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur
from secateur import report

MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


class LeNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.hidden1, self.relu1 = nn.Linear(784, 300), nn.ReLU()
        self.hidden2, self.relu2 = nn.Linear(300, 100), nn.ReLU()
        self.head = nn.Linear(100, 10)


def read_idx(path: Path, md5: str | None) -> Tensor:
    """An IDX file of unsigned bytes: two zeros, 8, the rank, the sizes (big-endian), the data."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SystemExit(f"expected {path} (make mnist gets it): {error.strerror}") from error
    got = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if md5 not in (None, got):
        raise SystemExit(f"expected {path} with md5 {md5}, got {got}; --unchecked takes other data")
    rank = raw[3] if raw[:3] == b"\0\0\x08" else 0
    shape = tuple(np.frombuffer(raw[4 : 4 + 4 * rank], ">u4"))
    if rank == 0 or len(raw) != 4 + 4 * rank + np.prod(shape, dtype=np.int64):
        raise SystemExit(f"expected an IDX file of unsigned bytes, got {path} ({len(raw)} bytes)")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape).copy())


def read(folder: Path, checked: bool) -> list[Tensor]:
    """Train images, train labels, test images, test labels; images as (n, 784) around zero."""
    files = [read_idx(folder / name, md5 if checked else None) for name, md5 in MD5.items()]
    for images, labels in (files[:2], files[2:]):
        if images.shape != (len(labels), 28, 28) or len(labels) == 0 or labels.max() > 9:
            got = f"{tuple(images.shape)} and {tuple(labels.shape)}"
            raise SystemExit(f"expected n images of 28x28 and n labels from 0 to 9, got {got}")
    mean, std = 0.1307, 0.3081  # of MNIST's training pixels, as fractions of 255
    return [(t.flatten(1) / 255 - mean) / std if t.ndim == 3 else t.long() for t in files]


def train(args: argparse.Namespace, data: list[Tensor], prune: bool) -> report.Run:
    run = report.Run("pruned" if prune else "dense")
    torch.manual_seed(args.seed)
    batches = torch.Generator().manual_seed(args.seed)
    images, labels, test_images, test_labels = data
    model = LeNet()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    begin, end, every = args.steps // 10, args.steps // 2, args.steps // 50 or 1
    if prune:
        pruner = secateur.Pruner(
            model,
            optimizer,
            criterion=secateur.Taylor(ema=0.9),
            granularity=secateur.Block(args.block),
            schedule=secateur.Cubic(args.sparsity, begin, end, every),
            exclude="head",  # 0.4 % of the weights
        )
        print(pruner)

    def update() -> float:
        chosen = torch.randint(len(images), (args.batch,), generator=batches)
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    for step in common.progress(run, args.steps):
        run.loss.append(update())
        run.sparsity.append(pruner.sparsity() if prune else 0.0)
        if prune and step == end:
            pruner.remove()
            secateur.sparsify(model, optimizer)
            run.layers, run.sparse_from = report.summary(pruner, model), step + 1

    with torch.no_grad():
        run.results["train loss"] = F.cross_entropy(model(images), labels).item()
        run.results["test loss"] = F.cross_entropy(model(test_images), test_labels).item()
        hits = model(test_images).argmax(1) == test_labels
        run.results["test accuracy"] = hits.double().mean().item()
    return run.close(model, optimizer, update)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.options(__doc__, steps=3000, batch=256, lr=1e-3, sparsity=0.9, block=8)
    parser.add_argument("--data", type=Path, default="data/mnist", help="folder of the IDX files")
    parser.add_argument(
        "--unchecked", action="store_true", help="take other IDX files too, such as Fashion-MNIST"
    )
    args = common.parse(parser, argv)
    data = read(args.data, checked=not args.unchecked)
    runs = [train(args, data, prune) for prune in (False, True)]
    common.finish("LeNet-300-100 on MNIST", *runs, args)


if __name__ == "__main__":
    common.run(main)
