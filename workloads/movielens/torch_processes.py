"""Matrix factorisation as people write it for torch: processes, sparse embeddings, no lock.

Each process goes through batches that it draws, over embeddings in shared memory, with an optimizer
of its own: ``torch.optim.SparseAdam``, as ``torch.optim.RMSprop`` takes no sparse gradients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from hogstream.profiling.measure.by_hand import HandRun
from hogstream.workloads.movielens.factorization import SPREAD
from hogstream.workloads.movielens.fold import Fold

#: Ratings of a batch, and the learning rate: of those tried, what reached 0.934 first.
BATCH, LR = 1024, 0.02


class Factors(nn.Module):
    """Embeddings of users and items: biases first, then factors."""

    def __init__(self, fold: Fold, width: int, seed: int) -> None:
        """Makes first values as ``factorization.make_parameters`` does."""
        super().__init__()
        generator, ratings = torch.Generator().manual_seed(seed), fold.ratings
        self.users, self.items = (
            nn.Embedding(count, width, sparse=True)
            for count in (ratings.user_count, ratings.item_count)
        )
        for embedding in (self.users, self.items):
            embedding.weight.data = SPREAD * torch.randn(
                embedding.weight.shape, generator=generator
            )
            embedding.weight.data[:, 0] = 0

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Predictions less the mean of all ratings, and the rows that they come of."""
        p, q = self.users(users), self.items(items)
        return p[:, 0] + q[:, 0] + (p[:, 1:] * q[:, 1:]).sum(1), p, q

    def tables(self) -> dict[str, torch.Tensor]:
        """Copies of both, by name."""
        embeddings = {"users": self.users, "items": self.items}
        return {name: each.weight.detach().clone() for name, each in embeddings.items()}


def samples(fold: Fold) -> tuple[torch.Tensor, ...]:
    """Users, items and ratings less their mean, of the training part."""
    ratings = fold.ratings
    users, items = (each[fold.train].astype(np.int64) for each in (ratings.users, ratings.items))
    return tuple(map(torch.from_numpy, (users, items, fold.centred)))


def work(run: HandRun) -> None:
    """What each process does."""
    model: Any = run.model
    users, items, values = run.extra["samples"]
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=LR)
    decay = run.extra["weight_decay"] / 2
    while run.going():
        batch = torch.randint(0, len(users), (BATCH,))
        predicted, p, q = model(users[batch], items[batch])
        error = (predicted - values[batch]).square().sum() / 2
        optimizer.zero_grad()
        (error + decay * (p.square().sum() + q.square().sum())).backward()
        optimizer.step()
        run.landed(error.item())
