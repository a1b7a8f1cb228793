"""Train a character-level GPT on the King James Bible twice, dense and pruned, and compare."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import common
import kjv
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur
from secateur import report


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, 64)).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, symbols: int, context: int, width: int, depth: int) -> None:
        super().__init__()
        self.symbol, self.position = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Layer(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)
        for name, parameter in self.named_parameters():  # GPT-2's initial weights
            if parameter.ndim == 2:
                shrink = (2 * depth) ** -0.5 if "proj" in name or "down" in name else 1.0
                nn.init.normal_(parameter, std=0.02 * shrink)
            elif "bias" in name:
                nn.init.zeros_(parameter)

    def loss(self, windows: Tensor) -> Tensor:
        x = self.layers(self.symbol(windows[:, :-1]) + self.position.weight)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), windows[:, 1:].flatten())


def train(args: argparse.Namespace, text: Tensor, prune: bool) -> report.Run:
    torch.manual_seed(args.seed)
    batches = torch.Generator().manual_seed(args.seed)
    run = report.Run("pruned" if prune else "dense")
    parts = text.tensor_split([int(0.95 * len(text))])
    training, validation = (part.unfold(0, args.context + 1, 1) for part in parts)
    model = GPT(int(text.max()) + 1, args.context, 64 * args.heads, args.depth)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, args.steps, pct_start=0.1, cycle_momentum=False
    )
    begin, end, every = args.steps // 10, args.steps // 2, args.steps // 50 or 1
    if prune:
        pruner = secateur.Pruner(
            model,
            optimizer,
            criterion=secateur.Taylor(ema=0.9),
            granularity=secateur.Block(args.block),
            schedule=secateur.Cubic(args.sparsity, begin, end, every),
            scope=args.scope,
            exclude="head",  # 0.5 % of the weights
        )
        print(pruner)

    def update() -> float:
        chosen = torch.randint(len(training), (args.batch,), generator=batches)
        loss = model.loss(training[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    for step in common.progress(run, args.steps):
        run.loss.append(update())
        run.sparsity.append(pruner.sparsity() if prune else 0.0)
        scheduler.step()
        if prune and step == end:
            pruner.remove()
            secateur.sparsify(model, optimizer)
            run.layers, run.sparse_from = report.summary(pruner, model), step + 1

    with torch.no_grad():
        for name, part in (("train loss", training), ("validation loss", validation)):
            spread = part[torch.linspace(0, len(part) - 1, 256).long()].split(32)
            run.results[name] = sum(model.loss(windows).item() for windows in spread) / len(spread)
    return run.close(model, optimizer, update)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.options(__doc__, steps=1000, batch=16, lr=1e-3, sparsity=0.8, block=32)
    add = parser.add_argument
    add("--scope", choices=("global", "layer"), default="global", help="who competes with whom")
    add("--context", type=common.whole(1, 4096), default=64, help="characters the model sees")
    add("--heads", type=common.whole(1), default=4, help="attention heads of 64 features")
    add("--depth", type=common.whole(1), default=4, help="transformer layers")
    args = common.parse(parser, argv)
    text = kjv.text()
    runs = [train(args, text, prune) for prune in (False, True)]
    common.finish("Character-level GPT on the King James Bible", *runs, args)


if __name__ == "__main__":
    common.run(main)
