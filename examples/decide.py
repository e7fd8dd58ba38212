"""Says which way to train your own model is the fastest, and what it costs: `hogstream decide`."""

from collections.abc import Callable, Iterator

import torch

from hogstream.profiling import decide

SECONDS, PROCESSES = 2.0, False  # to measure: 60 and True

Batch = tuple[torch.Tensor, torch.Tensor]


def batches() -> Iterator[Batch]:
    """Random points, and which of ten coordinates is the largest."""
    while True:
        x = torch.randn(32, 64)
        yield x, x[:, :10].argmax(dim=1)


def loss_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross entropy of a batch."""
    points, largest = batch
    return torch.nn.functional.cross_entropy(model(points), largest)


def make() -> tuple[torch.nn.Module, Callable[..., torch.Tensor], Iterator[Batch]]:
    """Yours: a model, its loss, and batches; called once in each process."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    return model, loss_of, batches()


if __name__ == "__main__":  # other processes import this
    decision = decide(make, seconds=SECONDS, processes=PROCESSES)
    for way in decision.results:
        speed = way.updates_per_second
        low, high = speed.interval or (0, 0)  # none, if it was interrupted
        print(f"{way.name:<44} {speed.median:>8.0f} updates/s (95 %: {low:.0f} to {high:.0f})")
    print(decision.answer)
