"""A list of updates in one launch: each gets its own bits, and errors name the index."""

from __future__ import annotations

import re
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pytest
import torch

from hogstream.kernels import multi_tensor_rmsprop_
from hogstream.kernels.backends.cpu_threads import MIN_BYTES_PER_THREAD, PIECE_ELEMENTS
from update_testing import (
    BACKENDS,
    COMPUTE,
    CPU_BACKENDS,
    DTYPES,
    FULL,
    VARIANTS,
    Backend,
    State,
    assert_same_bits,
    extreme,
    formula,
    fresh_state,
    normal,
    update_list_,
    worn_state,
)

# Lengths around one cache line and one block, with empty tensors first, last and in between.
LENGTHS = [0, 1, 15, 16, 17, 0, 1023, 1024, 1025, 2048, 5000, 0]
# Each variant of one dtype of 16 bits and of one of more; test_bits has it of all.
VARIANTS_OF_DTYPES = [
    pytest.param(*dtype.values, *options.values, id=f"{dtype.id}-{options.id}")
    for place, options in enumerate(VARIANTS)
    for dtype in DTYPES[place % 2 :: 2]
]
GUARD = 3  # elements on either side of each tensor, which no update may touch


def update_all(
    backend: Backend, states: list[State], grads: list[torch.Tensor], **options: Any
) -> list[State]:
    """The states after one call for all of them, each in the middle of a guarded buffer."""
    guarded = [state.map(lambda tensor: _guarded(tensor, backend)) for state in states]
    grads = [grad.to(backend.device) for grad in grads]
    update_list_(
        [buffers.map(_inside) for buffers in guarded], grads, backend=backend.name, **options
    )
    for buffers in guarded:
        for buffer in buffers:
            assert buffer is None or torch.all(buffer[:GUARD] == 7)
            assert buffer is None or torch.all(buffer[-GUARD:] == 7)
    return [buffers.map(_inside).map(torch.Tensor.cpu) for buffers in guarded]


def _guarded(tensor: torch.Tensor, backend: Backend) -> torch.Tensor:
    around = torch.full((GUARD,), 7, dtype=tensor.dtype)
    return torch.cat([around, tensor, around]).to(backend.device)


def _inside(buffer: torch.Tensor) -> torch.Tensor:
    return buffer[GUARD:-GUARD]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "options"), VARIANTS_OF_DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_tensor_gets_the_bits_of_the_formula(backend, dtype, options):
    states = [fresh_state(normal(n, dtype, seed), **options) for seed, n in enumerate(LENGTHS)]
    for step in range(2):
        grads = [extreme(n, dtype, 100 * step + seed) for seed, n in enumerate(LENGTHS)]
        expected = [formula(s, g, **options) for s, g in zip(states, grads, strict=True)]
        states = update_all(backend, states, grads, **options)
        for actual, wanted in zip(states, expected, strict=True):
            assert_same_bits(actual, wanted)


@pytest.mark.parametrize("shift", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_at_any_alignment(backend, dtype, shift):
    """Some of a list aligned to 16 bytes, others not, in one launch."""

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        room = torch.empty(len(tensor) + shift, dtype=tensor.dtype, device=backend.device)
        return room[shift:].copy_(tensor)

    states = [worn_state(3000, dtype, seed, **FULL) for seed in (0, 10)]
    grads = [extreme(3000, dtype, seed) for seed in (20, 21)]
    aligned, others = (state.map(lambda t: t.to(backend.device, copy=True)) for state in states)
    lists = [
        [aligned, others.map(shifted)],
        *(
            [aligned, others._replace(**{name: shifted(getattr(others, name))})]
            for name in ("param", "grad_avg", "momentum_buffer")
        ),
    ]
    for on_device in lists:
        on_device = [state.map(torch.clone) if state is aligned else state for state in on_device]
        expected = [
            formula(state.map(torch.Tensor.cpu), grad, **FULL)
            for state, grad in zip(on_device, grads, strict=True)
        ]
        update_list_(on_device, [g.to(backend.device) for g in grads], backend=backend.name, **FULL)
        for actual, wanted in zip(on_device, expected, strict=True):
            assert_same_bits(actual.map(torch.Tensor.cpu), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_shapes_and_layouts_may_differ(backend):
    dtypes = [*COMPUTE, *reversed(COMPUTE)]
    params = [normal(840, dtype, seed) for seed, dtype in enumerate(dtypes)]
    grads = [normal(840, dtype, 50 + seed) for seed, dtype in enumerate(dtypes)]
    expected = [formula(fresh_state(p), g) for p, g in zip(params, grads, strict=True)]

    def laid_out(flat: torch.Tensor, place: int) -> torch.Tensor:
        flat = flat.to(backend.device)
        return flat.reshape(24, 35).T if place % 2 else flat.reshape(4, 5, 42)

    mss = [torch.zeros(840, dtype=COMPUTE[dtype]) for dtype in dtypes]
    lists = [[laid_out(t, i) for i, t in enumerate(ts)] for ts in (params, grads, mss)]
    multi_tensor_rmsprop_(*lists, backend=backend.name)
    for place, wanted in enumerate(expected):
        param, ms = lists[0][place].cpu(), lists[2][place].cpu()
        assert torch.equal(param, laid_out(wanted.param, place).cpu())
        assert torch.equal(ms, laid_out(wanted.ms, place).cpu())


@pytest.mark.usefixtures("several_threads")
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_threads_share_a_list_by_bytes(backend):
    """Pieces end inside a tensor, between tensors and beside empty ones: no bit differs."""
    whole = MIN_BYTES_PER_THREAD // 4
    lengths = [10, 0, 2 * whole, 1001, 0, whole, PIECE_ELEMENTS - 1016, 0, PIECE_ELEMENTS, 5]
    states = [worn_state(n, torch.float32, seed, **FULL) for seed, n in enumerate(lengths)]
    grads = [normal(n, torch.float32, 70 + seed) for seed, n in enumerate(lengths)]
    actual = update_all(backend, states, grads, **FULL)
    for state, grad, got in zip(states, grads, actual, strict=True):
        assert_same_bits(got, formula(state, grad, **FULL))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_arrays_and_tensors_may_be_mixed(backend):
    array, tensor = np.full(5, 2.0, np.float32), torch.full((3,), 2.0)
    mss: list[Any] = [np.zeros(5, np.float32), torch.zeros(3)]
    grads: list[Any] = [torch.ones(5), np.ones(3, np.float32)]
    version = tensor._version
    options: dict[str, Any] = {"lr": 0.5, "alpha": 0.0, "eps": 0.0}
    multi_tensor_rmsprop_([array, tensor], grads, mss, backend=backend.name, **options)
    assert array.tolist() == [1.5] * 5
    assert tensor.tolist() == [1.5] * 3
    assert tensor._version == version + 1


def test_two_updates_may_share_a_gradient():
    params, grad = [torch.ones(4), torch.zeros(4)], torch.full((4,), 3.0)
    multi_tensor_rmsprop_(
        params, [grad, grad], [torch.zeros(4), torch.zeros(4)], lr=0.25, alpha=0.0, eps=0.0
    )
    assert [param.tolist() for param in params] == [[0.75] * 4, [-0.25] * 4]


def test_an_empty_list_is_nothing_to_do():
    multi_tensor_rmsprop_([], [], [])


def lists_of(count: int) -> dict[str, Any]:
    return {name: [torch.full((2, 3), 0.5) for _ in range(count)] for name in NAMES}


NAMES = ("params", "grads", "mss", "grad_avgs", "momentum_buffers")
HALVES = torch.full((2, 3), 0.5)

# Each message with what it refuses: the list's name, and what stands third in it.
REFUSED: dict[str, tuple[type[Exception], str, Any]] = {
    "params[2] must be a NumPy array or a torch tensor, got list": (TypeError, "params", [0.5]),
    "params[2] must be float16, bfloat16, float32 or float64, got int32": (
        TypeError,
        "params",
        HALVES.int(),
    ),
    "params[2] must be dense, got layout sparse_coo": (ValueError, "params", HALVES.to_sparse()),
    "grads[2] must be float16, bfloat16, float32 or float64, got int64": (
        TypeError,
        "grads",
        HALVES.long(),
    ),
    "grads[2] must have the shape of params[2], (2, 3), got (3,)": (
        ValueError,
        "grads",
        torch.ones(3),
    ),
    "grads[2] must be on cpu as params[2], got meta": (ValueError, "grads", HALVES.to("meta")),
    "grads[2] must have the strides of params[2], (3, 1), got (1, 2)": (
        ValueError,
        "grads",
        torch.ones(3, 2).T,
    ),
    "mss[2] must be float32 for float32 params, got float64": (TypeError, "mss", HALVES.double()),
    "mss[2] must be dense and have the shape of params[2], (2, 3), got strided, (6,)": (
        ValueError,
        "mss",
        torch.ones(6),
    ),
    "mss[2] must be memory as it is, got a lazily negated view": (
        ValueError,
        "mss",
        torch._neg_view(HALVES),
    ),
    "grad_avgs[2] must be float32 for float32 params, got float16": (
        TypeError,
        "grad_avgs",
        HALVES.half(),
    ),
    "grad_avgs[2] must be a NumPy array or a torch tensor, got NoneType": (
        TypeError,
        "grad_avgs",
        None,
    ),
    "momentum_buffers[2] must be dense and have the shape of params[2], (2, 3), got": (
        ValueError,
        "momentum_buffers",
        torch.ones(3, 2),
    ),
    "momentum_buffers[2] must have the strides of params[2], (3, 1), got (1, 2)": (
        ValueError,
        "momentum_buffers",
        torch.ones(3, 2).T,
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_an_error_names_the_index_and_nothing_has_changed(message):
    error, name, wrong = REFUSED[message]
    lists = lists_of(4)
    lists[name][2] = wrong
    with pytest.raises(error, match=re.escape(message)):
        multi_tensor_rmsprop_(**lists, **FULL)
    assert torch.all(torch.stack([tensors[0] for tensors in lists.values()]) == 0.5)


OVERLAPS = [
    *combinations_with_replacement([name for name in NAMES if name != "grads"], 2),
    *(("grads", name) for name in NAMES if name != "grads"),
]


@pytest.mark.parametrize(("one", "other"), OVERLAPS, ids="-".join)
def test_memory_that_is_written_is_used_once_in_a_list(one, other):
    lists = lists_of(4)
    buffer = torch.full((10,), 0.5)
    lists[one][1], lists[other][3] = buffer[:6].reshape(2, 3), buffer[4:].reshape(2, 3)
    message = re.escape(f"{one}[1] and {other}[3] must not overlap in memory")
    with pytest.raises(ValueError, match=message):
        multi_tensor_rmsprop_(**lists, **FULL)
    assert torch.all(buffer == 0.5)
    assert torch.all(lists["params"][0] == 0.5)


def test_an_overlap_behind_a_long_gradient_is_seen():
    """A gradient read twice reaches over a parameter that starts after a shorter one has ended."""
    buffer = torch.full((40,), 0.5)
    lists = lists_of(3)
    lists["params"] = [torch.full((30,), 0.5), torch.full((4,), 0.5), buffer[20:24]]
    for name in NAMES[2:]:
        lists[name] = [torch.full((n,), 0.5) for n in (30, 4, 4)]
    lists["grads"] = [buffer[:30], buffer[2:6], torch.ones(4)]
    with pytest.raises(ValueError, match=r"grads\[0\] and params\[2\] must not overlap"):
        multi_tensor_rmsprop_(**lists, **FULL)


def test_refuses_lists_that_are_none_or_of_other_lengths():
    tensor = torch.ones(3)
    with pytest.raises(TypeError, match="params must be a list or tuple of arrays or tensors"):
        multi_tensor_rmsprop_(tensor, [tensor], [tensor])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one length, got .*'params': 1, 'grads': 2, 'mss': 1"):
        multi_tensor_rmsprop_([tensor], [tensor, tensor], [tensor])
    with pytest.raises(TypeError, match="momentum_buffers must be a list or tuple of arrays"):
        multi_tensor_rmsprop_(*[[tensor]] * 3, momentum_buffers=tensor, momentum=0.9)  # type: ignore[arg-type]
    lengths = re.escape("{'params': 1, 'grads': 1, 'mss': 1, 'grad_avgs': 2}")
    with pytest.raises(ValueError, match=f"and grad_avgs must be of one length, got {lengths}"):
        multi_tensor_rmsprop_(*[[tensor]] * 3, grad_avgs=[tensor] * 2, centered=True)


def test_state_is_given_if_it_is_used_and_only_then():
    tensors = [torch.ones(3)]
    needed: dict[str, dict[str, Any]] = {
        "grad_avgs": {"centered": True},
        "momentum_buffers": {"momentum": 0.5},
    }
    for name, options in needed.items():
        (option,) = options
        state: dict[str, Any] = {name: tensors}
        with pytest.raises(ValueError, match=f"{name} must be given with {option}, got None"):
            multi_tensor_rmsprop_(*[tensors] * 3, **options)
        with pytest.raises(ValueError, match=f"{name} must be None without {option}, got list"):
            multi_tensor_rmsprop_(*[tensors] * 3, **state)


def test_a_device_that_a_backend_cannot_take_stops_all():
    params = [torch.ones(3), torch.ones(3, device="meta")]
    lists = [params, [torch.ones_like(p) for p in params], [torch.zeros_like(p) for p in params]]
    with pytest.raises(ValueError, match="takes cpu tensors, got one on meta"):
        multi_tensor_rmsprop_(*lists)
    assert torch.all(params[0] == 1)


def test_refuses_numbers_and_backends_as_for_one_tensor():
    lists = dict(list(lists_of(1).items())[:3])
    for wrong, message in (({"lr": -1.0}, "lr must be"), ({"backend": "cuda"}, "backend must be")):
        with pytest.raises(ValueError, match=message):
            multi_tensor_rmsprop_(*lists.values(), **wrong)
    with pytest.raises(ValueError, match="backend must be"):
        multi_tensor_rmsprop_([], [], [], backend="cuda")
