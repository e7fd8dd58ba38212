"""Trains a small classifier with four lock-free workers, and saves a checkpoint."""

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from hogstream.scheduler import (
    ModelWorker,
    SharedParameters,
    StreamScheduler,
    load_checkpoint,
    save_checkpoint,
)

UPDATES = 600
Batch = tuple[torch.Tensor, torch.Tensor]


def batches(seed: int) -> Iterator[Batch]:
    """Points of the plane for ever, and whether each lies within the unit circle."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(64, 2, generator=generator)
        yield x, (x.square().sum(dim=1) < 1).long()


def loss_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross entropy."""
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


async def main() -> None:
    """Trains; says how good the model is, and how stale its updates were."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    shared = SharedParameters.from_module(model)
    worker = ModelWorker(shared, model, loss_of, batches(seed=1))
    async with StreamScheduler(shared, workers=4, policy="lock-free", lr=0.003) as scheduler:
        report = await scheduler.run(worker, updates=UPDATES)
    x, labels = next(batches(seed=2))
    accuracy = (model(x).argmax(dim=1) == labels).float().mean().item()
    print(f"accuracy {accuracy:.2f} after {report.updates} updates")
    print(f"staleness: {report.to_dict()['staleness']['mean']:.1f} versions on average")
    with tempfile.TemporaryDirectory() as folder:  # yours would be one that stays
        path = Path(folder) / "run.safetensors"
        save_checkpoint(path, shared, seeds={"batches": 1})
        print(f"loaded version {load_checkpoint(path, shared).version}")


if __name__ == "__main__":
    asyncio.run(main())
