"""A short training to look at, which needs no data set: an MLP on random images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from hogstream.kernels.backends.select import select_backend
from hogstream.profiling.environment import best_device, describe_environment
from hogstream.profiling.event_loop import run
from hogstream.scheduler import ModelWorker, SharedParameters, StreamScheduler, Timeline

WORKERS = 4
UPDATES = 100
_BATCH, _INPUTS, _HIDDEN, _CLASSES = 32, 64, 128, 10

Batch = tuple[torch.Tensor, torch.Tensor]


def train_sample(lanes: Path) -> dict[str, Any]:
    """Trains for some updates, lock-free, on CUDA if there is any.

    Args:
        lanes: Where the timeline goes.

    Returns:
        ``environment``, ``settings``, and how it ended: ``partial`` and ``error``.
    """
    device, timeline = best_device(), Timeline()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # workers are the parallelism, as in train
    try:
        run(_train(device, timeline))
    finally:
        torch.set_num_threads(threads)
    timeline.write(lanes)
    return {
        "environment": describe_environment(device, select_backend(None, device.type).name),
        "settings": {"workers": WORKERS, "updates": UPDATES, "policy": "lock-free"},
        "partial": False,
        "error": None,
    }


async def _train(device: torch.device, timeline: Timeline) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(_INPUTS, _HIDDEN), torch.nn.ReLU(), torch.nn.Linear(_HIDDEN, _CLASSES)
    ).to(device)
    shared = SharedParameters.from_module(model)
    worker = ModelWorker(shared, model, _loss, _batches(device))
    async with StreamScheduler(shared, workers=WORKERS, timeline=timeline) as scheduler:
        await scheduler.run(worker, updates=UPDATES)


def _batches(device: torch.device) -> Iterator[Batch]:
    generator = torch.Generator(device).manual_seed(0)
    while True:
        images = torch.rand(_BATCH, _INPUTS, device=device, generator=generator)
        yield images, torch.randint(_CLASSES, (_BATCH,), device=device, generator=generator)


def _loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    images, labels = batch
    return functional.cross_entropy(model(images), labels)
