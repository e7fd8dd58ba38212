"""Updates that race on the machine that executes PTX, and the truth about what they lost."""

from __future__ import annotations

import numpy as np
import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import COMPUTE_DTYPES, Operands
from hogstream.kernels.race_counters import LANDED, OVERWRITTEN, SURVIVED
from ptx_compiling import Compiled
from ptx_machine import Journal, Lineage, count_bits, race
from ptx_machine.observers import Event
from ptx_machine.scalars import Array
from ptx_updates import Device, Watch
from scheduler_testing import COUNTING

UPDATES = 5


def check_race(compiled: Compiled, seed: int) -> int:
    """Races updates of one parameter, and holds what they counted against the truth.

    Each subtracts 1, so that an element says itself how many updates are in it.

    Args:
        compiled: A form that counts.
        seed: Of the race, and of what is raced for.

    Returns:
        How many updates some element has lost, summed over blocks.

    Raises:
        AssertionError: If the counts say other than they promise.
    """
    random = np.random.default_rng(seed)
    elements = int(random.integers(1, 3)) * compiled.block + int(random.integers(0, 3)) * 9
    dtype = getattr(torch, compiled.form.dtype)
    device = Device()
    offset = int(random.integers(0, 2))
    param = device.put("param", torch.zeros(elements, dtype=dtype), offset)
    grad = device.put("grad", torch.ones(elements, dtype=dtype))
    ms = device.put("ms", torch.zeros(elements, dtype=COMPUTE_DTYPES[dtype]))
    blocks = -(-elements // compiled.block)
    counts = device.put("counts", torch.zeros(3, blocks, dtype=torch.int64))
    watch = Watch(
        device.put("lr", torch.ones((), dtype=torch.float64))
        if compiled.form.lr_on_device
        else None,
        device.put("verdict", torch.zeros(1, dtype=torch.int32)) if compiled.form.checked else None,
        counts,
    )
    lineages = {
        name: Lineage(len(tensor), tensor.element_size())
        for name, tensor in (("param", param), ("ms", ms))
    }
    lineages["counts"], journal = Lineage(3 * blocks, 8), Journal()
    for name, lineage in lineages.items():
        device.memory.region(name).observers.append(lineage)
    device.memory.region("counts").observers.append(journal)
    hyperparameters = Hyperparameters(**COUNTING, eps_inside_sqrt=compiled.form.eps_inside_sqrt)
    table = LaunchTable([Operands(param, grad, ms)])
    launches = [device.update(compiled, table, hyperparameters, watch) for _ in range(UPDATES)]
    race(launches, device.memory, seed)
    assert torch.equal(
        -param.double(), torch.from_numpy(count_bits(lineages["param"].held)).double()
    ), "an element is not what the updates in it make"
    lost = _most_lost(lineages, compiled.block)
    _check_counts(counts.numpy(), lost, lineages["counts"], journal)
    return int(lost.sum())


def _most_lost(lineages: dict[str, Lineage], block: int) -> Array:
    """For each block, how many updates the element lost that lost most: int64, (blocks,)."""
    lost = np.maximum(lineages["param"].lost(), lineages["ms"].lost())
    return np.maximum.reduceat(lost, np.arange(0, len(lost), block))


def _check_counts(counts: Array, lost: Array, lineage: Lineage, journal: Journal) -> None:
    blocks = counts.shape[1]
    landed, survived, overwritten = counts[LANDED], counts[SURVIVED], counts[OVERWRITTEN]
    assert (landed == UPDATES).all(), f"{landed} have landed, not {UPDATES}"
    held = count_bits(lineage.held).reshape(3, blocks)
    assert (survived == held[SURVIVED]).all(), f"{survived} survived, not {held[SURVIVED]}"
    overlapping = _overlapping(journal.events, blocks)
    assert (overwritten == overlapping).all(), f"{overwritten} overlapped, not {overlapping}"
    assert (landed - survived <= overwritten).all(), "more were lost than overlapped"
    assert (lost <= overwritten).all(), f"elements lost {lost}, of {overwritten} that overlapped"
    unseen = (lost > 0) & (landed == survived)
    assert not unseen.any(), f"elements lost {lost}, and the witness knows of none"


def _overlapping(events: list[Event], blocks: int) -> Array:
    """For each block, how many updates landed while another was under way: int64, (blocks,)."""
    pairs = np.zeros(blocks, np.int64)
    for block in range(blocks):
        here = [each for each in events if each.offset == 8 * (LANDED * blocks + block)]
        landed = {each.launch: each.after for each in here if each.writes}
        began: dict[int, int] = {}
        for each in here:
            began.setdefault(each.launch, each.after)
        for launch, end in landed.items():
            pairs[block] += sum(began[launch] <= other < end for other in landed.values())
    return pairs
