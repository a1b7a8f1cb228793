"""Gradient pruning: a weight that the loss hardly depends on, |gradient * weight| < 1e-3, goes."""

import torch
from torch import nn

import secateur

EPSILON = 1e-3
torch.manual_seed(11)
x, y = torch.randn(64, 4), torch.randn(64, 3)

# 1. Once, with no optimizer: one backward pass, then prune by its gradients.
model = nn.Linear(4, 3)
nn.functional.mse_loss(model(x), y).backward()
secateur.prune_(model, secateur.Taylor(), secateur.Element(), threshold=EPSILON)
print("after one backward pass", model.weight.data, sep="\n")

# 2. While training: two lines, and the loop stays as it was.
model = nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
pruner = secateur.Pruner(
    model,
    optimizer,
    criterion=secateur.Taylor(),
    granularity=secateur.Element(),
    schedule=secateur.Threshold(EPSILON, every=10),
)
for step in range(41):
    loss = nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()  # scores, prunes and then updates
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.4f}, sparsity {pruner.sparsity():.0%}")
print("after training", model.weight.data, sep="\n")
