"""Trains a classifier by Hogwild: processes update the same parameters, and no one waits."""

import asyncio
from collections.abc import Iterator

import torch

from hogstream.scheduler import ModelWorker, ProcessScheduler, SharedParameters

PROCESSES, UPDATES = 2, 1_000
Batch = tuple[torch.Tensor, torch.Tensor]


def make_model() -> torch.nn.Module:
    """Two layers with batch normalisation, whose statistics all processes share as well."""
    return torch.nn.Sequential(
        *(torch.nn.Linear(2, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU()),
        torch.nn.Linear(64, 2),
    )


def batches(seed: int) -> Iterator[Batch]:
    """Points of the plane for ever, and whether each lies within the unit circle."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(64, 2, generator=generator)
        yield x, (x.square().sum(dim=1) < 1).long()


def loss_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross entropy."""
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


def make_worker(shared: SharedParameters, process: int) -> ModelWorker:
    """Called in each process: its worker, with a model and data of its own."""
    return ModelWorker(shared, make_model(), loss_of, batches(seed=1 + process))


async def main() -> None:
    """Trains; says how good the model is, and how stale its updates were."""
    torch.manual_seed(0)
    model = make_model()
    shared = SharedParameters.from_module(model)
    losses: list[float] = []
    async with ProcessScheduler(shared, processes=PROCESSES, lr=0.003) as scheduler:
        report = await scheduler.run(
            make_worker, updates=UPDATES, on_loss=lambda worker, loss: losses.append(loss)
        )
    x, labels = next(batches(seed=0))
    accuracy = (model.eval()(x).argmax(dim=1) == labels).float().mean().item()
    print(f"accuracy {accuracy:.2f} after {report.updates} updates by {PROCESSES} processes")
    print(f"loss: {sum(losses[:50]) / 50:.3f} at first, {sum(losses[-50:]) / 50:.3f} in the end")
    print(f"staleness: {report.to_dict()['staleness']['mean']:.1f} versions on average")


if __name__ == "__main__":
    asyncio.run(main())
