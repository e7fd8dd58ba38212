from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from hogstream.scheduler import SharedParameters
from hogstream.scheduler.checkpoints import load_checkpoint, save_checkpoint
from hogstream.scheduler.update_state import KINDS
from update_testing import COMPUTE, bits, normal, special

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def values(elements: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([special(dtype), normal(elements, dtype, seed=elements)])[:elements]


@given(
    shapes=st.dictionaries(NAMES, SHAPES, min_size=1, max_size=5),
    dtype=st.sampled_from(list(COMPUTE)),
    workers=st.integers(0, 3),
    kinds=st.sets(st.sampled_from(KINDS)),
    counts_races=st.booleans(),
    version=st.integers(0, 2**63 - 1),
    seeds=st.dictionaries(NAMES, st.integers(-(2**63), 2**64 - 1), max_size=3),
)
def test_what_is_saved_comes_back(
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    workers: int,
    kinds: set[str],
    counts_races: bool,
    version: int,
    seeds: dict[str, int],
) -> None:
    saved, loaded = (
        SharedParameters({name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()})
        for _ in range(2)
    )
    saved.flat.copy_(values(saved.elements, dtype))
    saved.versions[0] = version
    states = [saved.make_state(kinds)]
    if workers:
        states.append(saved.make_worker_state(workers, kinds))
    for state in states:
        for tensor in state.named().values():
            tensor.copy_(values(tensor.numel(), tensor.dtype).view_as(tensor))
    if counts_races:
        saved.count_races(3).counts.fill_(version)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        save_checkpoint(path, saved, iterations=range(workers), seeds=seeds)
        checkpoint = load_checkpoint(path, loaded)

    assert torch.equal(bits(loaded.flat), bits(saved.flat))
    assert checkpoint.version == loaded.version == version
    assert checkpoint.iterations == tuple(range(workers))
    assert checkpoint.seeds == seeds
    assert (loaded.worker_state is None) == (not workers)
    for before, after in ((saved.state, loaded.state), (saved.worker_state, loaded.worker_state)):
        if before is None or after is None:
            continue
        assert before.named().keys() == after.named().keys() == {"ms", *kinds}
        for name, tensor in before.named().items():
            assert torch.equal(bits(after.named()[name]), bits(tensor))
    assert (loaded.races is None) == (not counts_races)
    if saved.races is not None and loaded.races is not None:
        assert torch.equal(loaded.races.counts, saved.races.counts)
