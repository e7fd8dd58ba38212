from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from hogstream.scheduler import SharedParameters
from hogstream.scheduler.checkpoints import load_checkpoint, save_checkpoint
from update_testing import COMPUTE, bits, normal, special

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def values(elements: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([special(dtype), normal(elements, dtype, seed=elements)])[:elements]


@given(
    shapes=st.dictionaries(NAMES, SHAPES, min_size=1, max_size=5),
    dtype=st.sampled_from(list(COMPUTE)),
    workers=st.integers(0, 3),
    counts_races=st.booleans(),
    version=st.integers(0, 2**63 - 1),
    seeds=st.dictionaries(NAMES, st.integers(-(2**63), 2**64 - 1), max_size=3),
)
def test_what_is_saved_comes_back(
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    workers: int,
    counts_races: bool,
    version: int,
    seeds: dict[str, int],
) -> None:
    saved, loaded = (
        SharedParameters({name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()})
        for _ in range(2)
    )
    saved.flat.copy_(values(saved.elements, dtype))
    saved.ms.copy_(values(saved.elements, saved.ms.dtype))
    saved.versions[0] = version
    if workers:
        worker_ms = saved.make_worker_ms(workers)
        worker_ms.copy_(values(worker_ms.numel(), worker_ms.dtype).view_as(worker_ms))
    if counts_races:
        saved.count_races(3).counts.fill_(version)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        save_checkpoint(path, saved, iterations=range(workers), seeds=seeds)
        checkpoint = load_checkpoint(path, loaded)

    assert torch.equal(bits(loaded.flat), bits(saved.flat))
    assert torch.equal(bits(loaded.ms), bits(saved.ms))
    assert checkpoint.version == loaded.version == version
    assert checkpoint.iterations == tuple(range(workers))
    assert checkpoint.seeds == seeds
    assert (loaded.worker_ms is None) == (not workers)
    if saved.worker_ms is not None and loaded.worker_ms is not None:
        assert torch.equal(bits(loaded.worker_ms), bits(saved.worker_ms))
    assert (loaded.races is None) == (not counts_races)
    if saved.races is not None and loaded.races is not None:
        assert torch.equal(loaded.races.counts, saved.races.counts)
