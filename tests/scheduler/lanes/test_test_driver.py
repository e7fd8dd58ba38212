"""The driver that tests of CUDA lanes run on: it means what CUDA's does, and finds what is wrong.

``test_test_driver_kernels`` has what its kernels compute, and what takes how long in counted time.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch

from cuda_program import Program
from cuda_testing import (
    DEINITIALIZED,
    ILLEGAL_ADDRESS,
    INVALID_CONTEXT,
    INVALID_HANDLE,
    INVALID_IMAGE,
    INVALID_VALUE,
    NOT_FOUND,
    NOT_READY,
    SOURCES,
    SUCCESS,
    Driver,
    TestDevice,
)
from process_testing import run_python

SEEDS = range(8)


@contextmanager
def program(seed: int = 0, *, finds: list[str] | None = None, **options: Any) -> Iterator[Program]:
    """A program on a driver of its own, whose violations have these texts, in order."""
    with Driver(seed, **{"abort": False, **options}) as driver, Program(driver) as host:
        yield host
    found = driver.violations()
    assert len(found) == len(finds or []), found
    assert all(text in each for text, each in zip(finds or [], found, strict=True)), found


# ---- streams and events ----


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stream_does_its_operations_in_order(seed):
    with program(seed, log=True) as host:
        streams = [host.stream() for _ in range(3)]
        filled = [torch.zeros(3000) for _ in streams]
        for value in range(1, 9):
            for stream, tensor in zip(streams, filled, strict=True):
                host.fill(stream, tensor, value)
        for stream in streams:
            host.synchronize(stream)
        assert all(tensor.eq(8).all() for tensor in filled)
        for number in {each.stream for each in host.driver.log()}:
            mine = [each for each in host.driver.log() if each.stream == number]
            assert [each.number for each in mine] == list(range(1, 9))
            assert all(before.ended <= after.begun for before, after in pairwise(mine))


def test_a_stream_that_is_held_begins_nothing():
    with program() as host:
        held, other = host.stream(), host.stream()
        tensor = torch.zeros(4)
        host.driver.hold(held)
        host.fill(held, tensor, 1.0)
        host.write(other, 7)
        host.driver.wait_idle(other)
        assert tensor.eq(0).all()
        assert host.waits(held)
        host.driver.release(held)
        host.driver.wait_idle(held)
        assert tensor.eq(1).all()
        assert host.query(held) == SUCCESS


def test_an_event_is_done_until_it_is_recorded():
    with program() as host:
        stream, event = host.stream(), host.event()
        assert host.driver.call("cuEventQuery", event) == SUCCESS
        host("cuEventSynchronize", event)
        host("cuStreamWaitEvent", stream, event, 0)
        host.synchronize(stream)
        host.driver.hold(stream)
        host("cuEventRecord", event, stream)
        assert host.driver.call("cuEventQuery", event) == NOT_READY
        host.driver.release(stream)
        host("cuEventSynchronize", event)
        assert host.driver.call("cuEventQuery", event) == SUCCESS


def test_an_event_that_is_recorded_again_stands_for_the_later_record():
    with program() as host:
        held, other, event = host.stream(), host.stream(), host.event()
        host.driver.hold(held)
        host("cuEventRecord", event, held)
        host("cuEventRecord", event, other)
        host("cuEventSynchronize", event)
        host.driver.release(held)
        host.synchronize(held)


def test_a_wait_is_for_what_was_recorded_when_it_was_called():
    with program() as host:
        held, waits, other = (host.stream() for _ in range(3))
        event = host.event()
        host.driver.hold(held)
        host("cuEventRecord", event, held)
        host("cuStreamWaitEvent", waits, event, 0)
        host("cuEventRecord", event, other)
        host("cuEventSynchronize", event)
        assert host.waits(waits)
        host.driver.release(held)
        host.synchronize(waits)
        host.driver.hold(held)  # and not for what is recorded later
        host("cuStreamWaitEvent", waits, event, 0)
        host("cuEventRecord", event, held)
        host.synchronize(waits)
        host.driver.release(held)
        host.synchronize(held)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_value_is_written_after_what_the_stream_did_before(seed):
    with program(seed) as host:
        stream = host.stream()
        tensor = torch.zeros(5000)
        host.fill(stream, tensor, 1.0)
        host.write(stream, 3)
        while host.value() != 3:
            os.sched_yield()
        assert tensor.eq(1).all()
        host.driver.host_write(tensor.data_ptr(), tensor.nbytes, poison=True)
        assert tensor.isnan().all()


@pytest.mark.parametrize(
    ("flags", "waits"), [(1, False), (0, True)], ids=["non-blocking", "blocking"]
)
def test_the_default_stream_and_others(flags, waits):
    with program() as host:
        stream = host.stream(flags)
        for first, second in ((0, stream), (stream, 0)):
            host.driver.hold(first)
            host.write(first, 1)
            host.write(second, 2, place=1)
            if waits:
                assert host.waits(second)
                host.driver.release(first)
            host.synchronize(second)
            host.driver.release(first)
            host.synchronize(first)


def test_kernels_copies_and_memsets_move_what_they_should():
    with program() as host:
        stream = host.stream()
        first, second = torch.zeros(9), torch.zeros(9)
        host.fill(stream, first, 2.5)
        host("cuMemcpyDtoDAsync_v2", second.data_ptr() + 4, first.data_ptr(), 12, stream)
        host("cuMemsetD32Async", first.data_ptr(), 0x3F800000, 2, stream)
        host("cuMemcpyDtoHAsync_v2", second.data_ptr() + 24, first.data_ptr() + 4, 8, stream)
        host.synchronize(stream)
        assert first.tolist() == [1.0] * 2 + [2.5] * 7
        assert second.tolist() == [0.0] + [2.5] * 3 + [0.0] * 2 + [1.0, 2.5, 0.0]


def test_arguments_of_a_kernel_are_copied_by_the_call():
    with program() as host:
        stream, tensor = host.stream(), torch.zeros(3)
        host.driver.hold(stream)
        function = host.device.function("fill_kernel", {"STORAGE": "fp32", "BLOCK": 1024})
        values = host.launch(function, 1, (tensor.data_ptr(), 3, 0x40000000), stream)
        ctypes.memset(values, 0xFF, 40)
        host.driver.release(stream)
        host.synchronize(stream)
        assert tensor.eq(2).all()


def test_memory_that_was_allocated_holds_nothing_to_rely_on():
    with program() as host:
        for allocate, free in (
            ("cuMemAlloc_v2", "cuMemFree_v2"),
            ("cuMemHostAlloc", "cuMemFreeHost"),
        ):
            address = host.make(allocate, ctypes.c_size_t(16), *([2] if "Host" in allocate else []))
            assert all((ctypes.c_float * 4).from_address(address)[i] != 0 for i in range(4))
            host(free, address)


# ---- graphs ----


@pytest.mark.parametrize("seed", SEEDS)
def test_nodes_of_a_graph_come_after_those_they_depend_on(seed):
    tensor = torch.zeros(4)
    with program(seed) as host, host.graph() as graph:
        last = graph.fill(tensor, 1.0)
        other = graph.memset(tensor, 0, after=[last])
        graph.fill(tensor, 3.0, after=[other])
        graph.fill(torch.zeros(1), 5.0)
        stream = host.stream()
        launches = 3
        for _ in range(launches):
            host("cuGraphLaunch", graph.executable(), stream)
            host.synchronize(stream)
            assert tensor.eq(3).all()
            tensor.zero_()


def test_a_graph_is_launched_behind_its_stream_and_its_own_last_launch():
    tensor = torch.zeros(4)
    with program() as host, host.graph() as graph:
        graph.fill(tensor, 1.0)
        held, other = host.stream(), host.stream()
        executable = graph.executable()
        host.driver.hold(held)
        host("cuGraphLaunch", executable, held)
        host("cuGraphLaunch", executable, other)
        assert host.waits(other)
        host.driver.release(held)
        host.synchronize(other)


def test_an_executable_graph_is_a_copy_and_ends_when_it_is_done():
    tensor = torch.zeros(4)
    with program() as host:
        stream = host.stream()
        host.driver.hold(stream)
        with host.graph() as graph:
            graph.fill(tensor, 1.0)
            executable = graph.executable()
            graph.fill(tensor, 2.0)
            host("cuGraphLaunch", executable, stream)
        host.driver.release(stream)  # the graph and what was launched were destroyed
        host.synchronize(stream)
        assert tensor.eq(1).all()


def test_the_order_of_nodes_beside_each_other_is_of_the_seed():
    def last_value(seed: int) -> float:
        tensor = torch.zeros(1)
        with program(seed) as host, host.graph() as graph:
            host.driver.allow_races(tensor.data_ptr(), 4)
            for value in (1.0, 2.0):
                graph.fill(tensor, value)
            stream = host.stream()
            host("cuGraphLaunch", graph.executable(), stream)
            host.synchronize(stream)
        return tensor.item()

    values = [last_value(seed) for seed in range(16)]
    assert values == [last_value(seed) for seed in range(16)]
    assert {*values} == {1.0, 2.0}


# ---- what it refuses ----

NEED_A_CONTEXT: dict[str, tuple[Any, ...]] = {
    "cuCtxGetStreamPriorityRange": (0, 0),
    "cuCtxPopCurrent_v2": (None,),
    "cuStreamCreateWithPriority": (0, 1, 0),
    "cuStreamQuery": (0,),
    "cuStreamIsCapturing": (0, 0),
    "cuStreamSynchronize": (0,),
    "cuStreamWaitEvent": (0, 0, 0),
    "cuStreamWriteValue64_v2": (0, 8, 1, 0),
    "cuEventCreate": (0, 2),
    "cuEventRecord": (0, 0),
    "cuMemsetD32Async": (8, 0, 1, 0),
    "cuMemcpyDtoHAsync_v2": (8, 16, 4, 0),
    "cuMemcpyDtoDAsync_v2": (8, 16, 4, 0),
    "cuMemHostAlloc": (0, 8, 0),
    "cuMemHostGetDevicePointer_v2": (0, 0, 0),
    "cuMemFreeHost": (8,),
    "cuMemAlloc_v2": (0, 8),
    "cuMemFree_v2": (8,),
    "cuModuleLoadData": (0, b""),
    "cuGraphInstantiateWithFlags": (0, 0, 0),
    "cuGraphLaunch": (0, 0),
}


@pytest.mark.parametrize("function", NEED_A_CONTEXT)
def test_what_needs_a_context_refuses_without(function):
    with program() as host, host.without_context():
        assert host.driver.call(function, *NEED_A_CONTEXT[function]) == INVALID_CONTEXT


def test_a_launch_on_the_default_stream_needs_a_context_and_others_need_none():
    tensor = torch.zeros(1)
    with program() as host:
        stream, event = host.stream(), host.event()
        with host.without_context():
            with pytest.raises(RuntimeError, match=f"CUDA error {INVALID_CONTEXT}"):
                host.fill(0, tensor, 1.0)
            host.fill(stream, tensor, 1.0)
            host("cuEventRecord", event, stream)
            host("cuEventSynchronize", event)
        assert tensor.eq(1).all()


def test_a_context_is_current_on_the_thread_that_computes():
    with Driver() as driver:
        device = TestDevice(driver)
        stream = device.make_stream()
        assert device.current_stream() == 0
        assert driver.call("cuStreamQuery", 0) == INVALID_CONTEXT
        with device.computing(stream):
            assert device.current_stream() == stream
            assert driver.call("cuStreamQuery", 0) == SUCCESS
        assert device.current_stream() == 0
        assert driver.call("cuStreamQuery", 0) == INVALID_CONTEXT
        made = device.make_on(stream, 5, 2.0, torch.float64)
        driver.wait_idle(stream)
        assert made.tolist() == [2.0] * 5


REFUSED: dict[str, tuple[int, Callable[[Program], int]]] = {
    "an image that is none": (
        INVALID_IMAGE,
        lambda host: host.driver.call("cuModuleLoadData", host.out, bytes(64)),
    ),
    "a name that the module has not": (
        NOT_FOUND,
        lambda host: host.driver.call(
            "cuModuleGetFunction", host.out, host.filler(), b"rmsprop_kernel"
        ),
    ),
    "no program": (INVALID_VALUE, lambda host: host.try_fill(programs=0)),
    "too many threads": (INVALID_VALUE, lambda host: host.try_fill(threads=2048)),
    "a value at an odd address": (
        INVALID_VALUE,
        lambda host: host.driver.call("cuStreamWriteValue64_v2", host.stream(), 4, 1, 0),
    ),
    "times of an event without": (
        INVALID_HANDLE,
        lambda host: host.driver.call("cuEventElapsedTime", host.out, host.event(), host.event()),
    ),
    "memory that is not pinned": (
        INVALID_VALUE,
        lambda host: host.driver.call("cuMemHostGetDevicePointer_v2", host.out, 4096, 0),
    ),
    "another device": (101, lambda host: host.driver.call("cuDeviceGet", host.out, 1)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    error, call = REFUSED[case]
    with program() as host:
        assert call(host) == error


EXPORTED = """
    cuInit cuDeviceGet cuDeviceGetAttribute cuDevicePrimaryCtxRetain cuCtxPushCurrent_v2
    cuCtxPopCurrent_v2 cuCtxGetStreamPriorityRange cuThreadExchangeStreamCaptureMode cuGetErrorName
    cuStreamCreateWithPriority cuStreamDestroy_v2 cuStreamQuery cuStreamSynchronize
    cuStreamIsCapturing cuStreamWaitEvent cuStreamWriteValue64_v2 cuEventCreate cuEventRecord
    cuEventQuery
    cuEventSynchronize cuEventElapsedTime cuEventDestroy_v2 cuLaunchKernel cuMemsetD32Async
    cuMemcpyDtoHAsync_v2 cuMemcpyDtoDAsync_v2 cuMemHostAlloc cuMemHostGetDevicePointer_v2
    cuMemFreeHost cuMemAlloc_v2 cuMemFree_v2 cuModuleLoadData cuModuleGetFunction cuGraphCreate
    cuGraphDestroy cuGraphAddKernelNode_v2 cuGraphAddMemsetNode cuGraphInstantiateWithFlags
    cuGraphLaunch cuGraphExecDestroy
"""


def test_has_each_function_by_the_name_of_its_version():
    with Driver() as driver:
        assert {*driver.calls} == {*EXPORTED.split()}
        assert all(hasattr(driver.library, name) for name in driver.calls)


def test_says_what_it_is():
    with program() as host:
        word = ctypes.c_int()
        for attribute, value in ((75, 9), (76, 0), (122, 1)):
            host("cuDeviceGetAttribute", ctypes.byref(word), attribute, 0)
            assert word.value == value
        lowest, highest = ctypes.c_int(), ctypes.c_int()
        host("cuCtxGetStreamPriorityRange", ctypes.byref(lowest), ctypes.byref(highest))
        assert lowest.value > highest.value
        word.value = 0  # lanes may have left another on this thread
        host("cuThreadExchangeStreamCaptureMode", ctypes.byref(word))
        for mode, before in ((1, 0), (0, 1)):
            word.value = mode
            host("cuThreadExchangeStreamCaptureMode", ctypes.byref(word))
            assert word.value == before
        name = ctypes.c_char_p()
        host("cuGetErrorName", 700, ctypes.byref(name))
        assert name.value == b"CUDA_ERROR_ILLEGAL_ADDRESS"
        assert host.driver.call("cuGetErrorName", 12345, ctypes.byref(name)) == INVALID_VALUE


# ---- what it finds: each case, and the same program put right ----


def missing_wait(host: Program, right: bool) -> None:
    tensor, other = torch.zeros(8), host.stream()
    stream, event = host.stream(), host.event()
    host.fill(stream, tensor, 1.0)
    host("cuEventRecord", event, stream)
    if right:
        host("cuStreamWaitEvent", other, event, 0)
    host.copy(other, torch.zeros(8), tensor)
    host.idle()


def wait_for_too_little(host: Program, right: bool) -> None:
    tensor, other = torch.zeros(8), host.stream()
    stream, event = host.stream(), host.event()
    if not right:
        host("cuEventRecord", event, stream)
    host.fill(stream, tensor, 1.0)
    if right:
        host("cuEventRecord", event, stream)
    host("cuStreamWaitEvent", other, event, 0)
    host.fill(other, tensor, 2.0)
    host.idle()


def default_stream_and_another(host: Program, right: bool) -> None:
    tensor, stream = torch.zeros(8), host.stream(0 if right else 1)
    host.driver.hold(0)
    host.fill(0, tensor, 1.0)
    host.fill(stream, tensor, 2.0)
    host.driver.release(0)
    host.idle()


def host_that_looks(host: Program, right: bool) -> None:
    """The host goes on when a value tells that all before it is done, or without a look."""
    tensor, stream, other = torch.zeros(8), host.stream(), host.stream()
    host.driver.hold(stream)
    host.fill(stream, tensor, 1.0)
    host.write(stream, 1)
    if right:
        host.driver.release(stream)
        host.driver.wait_idle(stream)
    host.fill(other, tensor, 2.0)
    host.driver.release(stream)
    host.idle()


def host_that_asks(host: Program, right: bool) -> None:
    tensor, stream, other = torch.zeros(8), host.stream(), host.stream()
    host.fill(stream, tensor, 1.0)
    host.driver.wait_idle(stream)  # the host learns nothing by it
    if right:
        assert host.query(stream) == SUCCESS
    host.fill(other, tensor, 2.0)
    host.idle()


def nodes_beside_each_other(host: Program, right: bool) -> None:
    tensor, stream = torch.zeros(8), host.stream()
    with host.graph() as graph:
        first = graph.fill(tensor, 1.0)
        between = graph.fill(torch.zeros(1), 1.0, after=[first])
        graph.fill(tensor, 2.0, after=[between] if right else [])
        host("cuGraphLaunch", graph.executable(), stream)
        host.idle()


def graph_and_kernel(host: Program, right: bool) -> None:
    tensor, stream, other = torch.zeros(8), host.stream(), host.stream()
    with host.graph() as graph:
        graph.memset(tensor, 0)
        host("cuGraphLaunch", graph.executable(), stream)
        host.fill(stream if right else other, tensor, 2.0)
        host.idle()


def gradient_written_too_soon(host: Program, right: bool) -> None:
    tensor, stream = torch.zeros(8), host.stream()
    host.driver.hold(stream)
    host.copy(stream, torch.zeros(8), tensor)
    if right:
        host.driver.release(stream)
        host.driver.wait_idle(stream)
    host.driver.host_write(tensor.data_ptr(), tensor.nbytes)
    host.driver.release(stream)
    host.idle()


def event_destroyed_while_recorded(host: Program, right: bool) -> None:
    stream, event = host.stream(), host.make("cuEventCreate", 2)
    host.driver.hold(stream)
    host("cuEventRecord", event, stream)
    if not right:
        host("cuEventDestroy_v2", event)
    host.driver.release(stream)
    host.idle()
    if right:
        host("cuEventDestroy_v2", event)


def event_destroyed_while_waited_for(host: Program, right: bool) -> None:
    stream, event = host.stream(), host.make("cuEventCreate", 2)
    host.driver.hold(stream)
    host("cuStreamWaitEvent", stream, event, 0)
    if right:
        host.driver.release(stream)
        host.driver.wait_idle(stream)
    host("cuEventDestroy_v2", event)
    host.driver.release(stream)
    host.idle()


def memory_freed_while_used(host: Program, right: bool) -> None:
    stream, address = host.stream(), host.make("cuMemAlloc_v2", ctypes.c_size_t(64))
    host.driver.hold(stream)
    host("cuMemsetD32Async", address, 0, 2, stream)
    if right:
        host.driver.release(stream)
        host.driver.wait_idle(stream)
    host("cuMemFree_v2", address)
    host.driver.release(stream)
    host.idle()


def memory_used_after_free(host: Program, right: bool) -> None:
    stream, address = host.stream(), host.make("cuMemAlloc_v2", ctypes.c_size_t(64))
    if right:
        host("cuMemsetD32Async", address, 0, 2, stream)
        host.idle()
    host("cuMemFree_v2", address)
    if not right:
        host("cuMemsetD32Async", address, 0, 2, stream)
        host.idle()


def memory_freed_twice(host: Program, right: bool) -> None:
    address = host.make("cuMemAlloc_v2", ctypes.c_size_t(64))
    for _ in range(1 if right else 2):
        host.driver.call("cuMemFree_v2", address)


def memory_beyond(host: Program, right: bool) -> None:
    stream, address = host.stream(), host.make("cuMemAlloc_v2", ctypes.c_size_t(64))
    host("cuMemsetD32Async", address, 0, 16 if right else 17, stream)
    host.idle()
    host("cuMemFree_v2", address)


def destroyed_event(host: Program, right: bool) -> None:
    event = host.make("cuEventCreate", 2)
    if right:
        assert host.driver.call("cuEventQuery", event) == SUCCESS
    host("cuEventDestroy_v2", event)
    if not right:
        assert host.driver.call("cuEventQuery", event) == INVALID_HANDLE


def destroyed_stream(host: Program, right: bool) -> None:
    stream = host.make("cuStreamCreateWithPriority", 1, 0)
    if not right:
        host("cuStreamDestroy_v2", stream)
    assert host.query(stream) == (SUCCESS if right else INVALID_HANDLE)


def unknown_stream(host: Program, right: bool) -> None:
    stream = host.stream() if right else 0x1234
    assert host.query(stream) == (SUCCESS if right else INVALID_HANDLE)


def destroyed_executable(host: Program, right: bool) -> None:
    stream = host.stream()
    with host.graph() as graph:
        executable = graph.executable()
        if right:
            host("cuGraphLaunch", executable, stream)
            host.idle()
    if not right:
        assert host.driver.call("cuGraphLaunch", executable, stream) == INVALID_HANDLE


def scratch(host: Program, right: bool) -> None:
    assert host.try_fill(scratch=0 if right else 8) == SUCCESS
    host.idle()


def programs(host: Program, right: bool) -> None:
    assert host.try_fill(programs=1 if right else 2) == SUCCESS
    host.idle()


def pending(host: Program, right: bool) -> None:
    stream = host.stream()
    if not right:
        host.driver.hold(stream)
    host.fill(stream, torch.zeros(1), 1.0)
    if right:
        host.idle()


def leak(function: str, destroy: str, *arguments: Any) -> Callable[[Program, bool], None]:
    def leaks(host: Program, right: bool) -> None:
        made = host.make(function, *arguments)
        if right:
            host(destroy, made)

    return leaks


FOUND: dict[str, tuple[Callable[[Program, bool], None], str]] = {
    "a wait is missing": (missing_wait, "race: copy (operation 1 of stream"),
    "a wait for too little": (wait_for_too_little, "race: fill_kernel (operation 2 of stream"),
    "the default stream waits for none": (
        default_stream_and_another,
        "race: fill_kernel (operation 1 of stream",
    ),
    "the host has not looked": (host_that_looks, "race: fill_kernel (operation 1 of stream"),
    "the host has not asked": (host_that_asks, "race: fill_kernel (operation 1 of stream"),
    "nodes beside each other": (nodes_beside_each_other, "race: node 2 (fill_kernel) of graph"),
    "a graph and a kernel": (graph_and_kernel, "writes memory that memset (operation 1 of stream"),
    "a gradient is written too soon": (gradient_written_too_soon, "the host may write memory that"),
    "an event is destroyed that is pending": (
        event_destroyed_while_recorded,
        "is destroyed while a stream has yet to record it",
    ),
    "an event is destroyed that is waited for": (
        event_destroyed_while_waited_for,
        "is destroyed while a stream has yet to wait for it",
    ),
    "memory is freed that is used": (memory_freed_while_used, "memory is freed that memset"),
    "memory is used that was freed": (memory_used_after_free, "writes memory that was freed"),
    "memory is freed twice": (memory_freed_twice, "memory is freed that was freed before"),
    "beyond an allocation": (memory_beyond, "writes memory beyond an allocation of 64 bytes"),
    "an event that was destroyed": (destroyed_event, "cuEventQuery is given an event that was"),
    "a stream that was destroyed": (destroyed_stream, "cuStreamQuery is given a stream that was"),
    "a stream that is unknown": (unknown_stream, "cuStreamQuery is given a stream that is unknown"),
    "a graph that was destroyed": (
        destroyed_executable,
        "cuGraphLaunch is given an executable graph that was destroyed",
    ),
    "scratch that is not needed": (scratch, "fill_kernel needs no scratch memory"),
    "too many programs": (programs, "2 programs of fill_kernel for 8 elements"),
    "operations are pending": (pending, "1 operations are pending on stream"),
    "an event leaks": (leak("cuEventCreate", "cuEventDestroy_v2", 2), "leak: 1 events"),
    "a graph leaks": (leak("cuGraphCreate", "cuGraphDestroy", 0), "leak: 1 graphs"),
    "device memory leaks": (
        leak("cuMemAlloc_v2", "cuMemFree_v2", ctypes.c_size_t(24)),
        "leak: 24 bytes of device memory",
    ),
    "pinned memory leaks": (
        leak("cuMemHostAlloc", "cuMemFreeHost", ctypes.c_size_t(24), 0),
        "leak: 24 bytes of host memory",
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_finds(case):
    wrong, text = FOUND[case]
    with program(finds=[text]) as host:
        wrong(host, False)
    with program() as host:
        wrong(host, True)


def test_races_by_design_are_none():
    tensor = torch.zeros(8)
    texts = ["race: fill_kernel (operation 2 of stream"]
    with program(finds=texts) as host:
        first, second = host.stream(), host.stream()
        host.driver.allow_races(tensor.data_ptr(), 16)
        host.fill(first, tensor[:4], 1.0)
        host.fill(second, tensor[:4], 2.0)
        host.fill(first, tensor[3:6], 1.0)
        host.fill(second, tensor[4:5], 2.0)  # which is beyond
        host.idle()


@pytest.mark.slow
def test_what_hardware_would_crash_on_ends_the_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(SOURCES.parent)!r})\n"
        "from cuda_program import Program\n"
        "from cuda_testing import Driver\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    Program(Driver())('cuEventDestroy_v2', 5)\n"
        "    os._exit(0)\n"
        "print(os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGABRT, flush=True)\n"
        "with Driver(1) as driver, Program(driver) as host:\n"
        "    host.write(host.stream(), 3)\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        print(driver.call('cuInit', 0), flush=True)\n"
        "        driver.close()\n"
        "        sys.exit(5)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "    host.idle()\n"
        "print(driver.violations())\n"
    )
    assert run_python(str(script)).split("\n") == ["True", "3", "5", "[]", ""]


# ---- errors ----


def test_a_call_fails_that_was_told_to():
    with program() as host:
        stream = host.stream()
        before = host.driver.calls["cuStreamQuery"]
        host.driver.fail("cuStreamQuery", before + 2, 999)
        assert [host.query(stream) for _ in range(3)] == [SUCCESS, 999, SUCCESS]
        host.driver.fail("cuStreamWriteValue64_v2", 1, ILLEGAL_ADDRESS)
        with pytest.raises(
            RuntimeError, match="cuStreamWriteValue64_v2 failed with CUDA error 700"
        ):
            host.write(stream, 4)
        host.synchronize(stream)
        assert host.value() == 0
        with pytest.raises(KeyError):
            host.driver.fail("cuStreamQuery_v3", 1, 999)


def test_a_device_that_is_lost_does_nothing_more():
    tensor = torch.zeros(8)
    with program() as host:
        stream, event = host.stream(), host.event()
        host.driver.hold(stream)
        host.fill(stream, tensor, 1.0)
        host("cuEventRecord", event, stream)
        host.driver.lose()
        host.driver.release(stream)
        host.driver.wait_idle(stream)
        for function in ("cuStreamQuery", "cuStreamSynchronize", "cuCtxPushCurrent_v2"):
            assert host.driver.call(function, stream) == ILLEGAL_ADDRESS
        for _ in range(1000):
            os.sched_yield()
            assert host.driver.call("cuEventQuery", event) == ILLEGAL_ADDRESS
    assert tensor.eq(0).all()


def test_contexts_of_a_device_that_is_lost_are_forgotten():
    with program() as host:
        host.driver.lose()  # so that none is popped any more
    with program() as host, host.without_context():
        assert host.driver.call("cuStreamQuery", 0) == INVALID_CONTEXT


def test_what_was_made_before_it_closed_is_known_after():
    with Driver(abort=False, log=True) as driver, Program(driver) as host:
        stream = host.stream()
        host.write(stream, 1)
        host.synchronize(stream)
        event = host.make("cuEventCreate", 2)
    assert driver.calls["cuStreamSynchronize"] == 1
    assert [(each.name, each.number) for each in driver.log()] == [("write of a value", 1)]
    assert driver.violations() == ["leak: 1 events were never destroyed"]
    assert driver.call("cuStreamQuery", stream) == DEINITIALIZED
    with program(finds=["cuEventQuery is given an event that was destroyed"]) as host:
        assert host.driver.calls["cuStreamSynchronize"] == 0
        assert host.query(stream) == SUCCESS  # streams stay
        assert host.driver.call("cuEventQuery", event) == INVALID_HANDLE


def test_one_driver_is_open_at_a_time():
    with Driver(), pytest.raises(RuntimeError, match="is open in this process"):
        Driver()
    with pytest.raises(ValueError, match="mode must be"):
        Driver(mode="fast")
