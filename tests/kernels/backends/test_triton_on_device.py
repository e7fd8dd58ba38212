"""Compiled kernels at full size, on a device: the bits of NumPy, far offsets, several streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hogstream.kernels import multi_tensor_rmsprop_, rmsprop_
from hogstream.kernels.backends.select import select_backend
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import check_operands
from hogstream.kernels.race_counters import RaceCounters
from hogstream.optim import RMSpropAsync
from update_testing import COMPUTE, DTYPES, VARIANTS, bits

pytestmark = pytest.mark.gpu

ELEMENTS = 10**8


def values(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """10^8 values of either sign on the device, over as many magnitudes as the dtype has room for.

    Made there: with NumPy it would take longer than all updates together.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    exponents = torch.rand(ELEMENTS, generator=generator, device="cuda").mul_(30).sub_(20)
    signs = torch.rand(ELEMENTS, generator=generator, device="cuda").sub_(0.5).sign_()
    return exponents.exp2_().mul_(signs).to(dtype)


@pytest.fixture(scope="module", params=DTYPES)
def operands(request: pytest.FixtureRequest) -> tuple[torch.Tensor, ...]:
    dtype = request.param
    param, grad = values(dtype, 0), values(dtype, 1)
    return param, grad, values(COMPUTE[dtype], 2).abs_()


@pytest.mark.parametrize("options", VARIANTS)
def test_a_hundred_million_elements_have_the_bits_of_numpy(operands, options):
    expected = [tensor.cpu() for tensor in operands]
    rmsprop_(*expected, backend="numpy", **options)
    wanted = [bits(tensor.cuda()) for tensor in (expected[0], expected[2])]

    param, grad, ms = (tensor.clone() for tensor in operands)
    rmsprop_(param, grad, ms, **options)
    assert all(map(torch.equal, map(bits, (param, ms)), wanted))

    # As a list of unequal lengths, of which the later ones are not aligned.
    param, grad, ms = (tensor.clone() for tensor in operands)
    cuts = [ELEMENTS // 3 + 1, ELEMENTS // 7 + 2]
    cuts.append(ELEMENTS - sum(cuts))
    params, grads, mss = (tensor.split(cuts) for tensor in (param, grad, ms))
    multi_tensor_rmsprop_(params, grads, mss, **options)
    assert all(map(torch.equal, map(bits, (param, ms)), wanted))


@pytest.mark.parametrize("tensors", [1, 2], ids=["one", "list"])
def test_offsets_beyond_32_bits(tensors):
    """2^31 elements and some: an offset of 32 bits would wrap around before the last block."""
    elements = 2**31 + 4099
    param, grad = (torch.ones(elements, dtype=torch.float16, device="cuda") for _ in range(2))
    ms = torch.zeros(elements, device="cuda")
    numbers: dict[str, Any] = {"lr": 0.5, "alpha": 0.0, "eps": 0.0}
    if tensors == 1:
        rmsprop_(param, grad, ms, **numbers)
    else:
        small, small_ms = torch.ones(5, device="cuda").half(), torch.zeros(5, device="cuda")
        multi_tensor_rmsprop_([param, small], [grad, small.clone()], [ms, small_ms], **numbers)
    assert torch.all(param == 0.5)
    assert torch.all(ms == 1)


def test_each_stream_waits_for_the_table_that_it_reads():
    """Steps on changing streams, each with gradients elsewhere: no launch reads an old table."""
    params = [torch.nn.Parameter(torch.zeros(1000, device="cuda")) for _ in range(50)]
    optimizer = RMSpropAsync(params, lr=1.0, alpha=0.0, eps=0.0)
    streams = [torch.cuda.Stream() for _ in range(3)]
    kept = []  # so that addresses never repeat
    for step in range(30):
        stream = streams[step % 3]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**6)
            for param in params:
                param.grad = torch.full_like(param, -1.0 if step % 2 else 1.0)
                kept.append(param.grad)
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.all(param == 0) for param in params)


@pytest.mark.parametrize("streams", [1, 16])
def test_updates_that_race_are_all_counted(streams):
    """Each update that survives in an element adds exactly 1 to it, and one stream loses none."""
    elements, updates = (1 << 18) + 77, 320
    param, grad, ms = (
        torch.full((elements,), value, dtype=torch.float64, device="cuda") for value in (0, -1, 0)
    )
    backend = select_backend("triton", "cuda")
    assert backend.race_block is not None
    counters = RaceCounters.zeros(elements, backend.race_block(param.dtype, param.device), "cuda")
    table = LaunchTable([check_operands(param, grad, ms)])
    numbers = Hyperparameters(lr=1.0, alpha=0.0, eps=0.0)
    side_by_side = [torch.cuda.Stream() for _ in range(streams)]
    verdicts = torch.zeros(streams, 1, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    for update in range(updates):
        with torch.cuda.stream(side_by_side[update % streams]):
            backend.update_(table, numbers, None, counters, verdicts[update % streams])
    torch.cuda.synchronize()

    landed, survived, overwritten = counters.counts
    assert torch.all(landed == updates)
    assert torch.all((survived >= 1) & (survived <= landed))
    assert torch.all(landed - survived <= overwritten)
    if streams == 1:
        assert counters.overwritten == 0
    alone = (overwritten == 0).repeat_interleave(counters.block)[:elements]
    assert torch.all(param[alone] == updates)
