"""CUDA graphs of updates: many launches in one, where a launch costs more than an update."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack, suppress
from typing import Generic, NamedTuple, Protocol, TypeVar

from hogstream.kernels.launch_table import ELEMENTS, GRAD
from hogstream.scheduler.lanes.cuda_dense_update import UNUSED
from hogstream.scheduler.lanes.cuda_device import CudaDevice, DeviceMemory, Function
from hogstream.scheduler.lanes.cuda_driver import CudaError, address, address_array
from hogstream.scheduler.lanes.cuda_kernels import UpdateKernels
from hogstream.scheduler.lanes.rings import WORD

#: Arguments that every kernel of Triton's takes after its own: where its scratch is.
SCRATCH = 2


class Droppable(Protocol):
    """What a cache lets go of."""

    def drop(self) -> None:
        """It is not kept any more."""


T = TypeVar("T", bound=Droppable)


class RepeatCache(Generic[T]):
    """Keeps what is made for a key, and makes it only for a key that comes again.

    So those pay nothing whose keys never do. Keys and things not asked for longest are dropped.
    """

    def __init__(self, size: int) -> None:
        """An empty one.

        Args:
            size: How many things it holds at most; and how many keys that came once.
        """
        self._size = size
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()

    def find(self, key: Hashable, make: Callable[[], T]) -> T | None:
        """What was made for a key, or is made now; None the first time."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > self._size:
                self._seen.popitem(last=False)
            return None
        del self._seen[key]
        made = self._kept[key] = make()
        if len(self._kept) > self._size:
            self._kept.popitem(last=False)[1].drop()
        return made

    def clear(self) -> None:
        """Drops everything."""
        while self._kept:
            self._kept.popitem()[1].drop()
        self._seen.clear()


class Node(NamedTuple):
    """One update in a graph.

    Attributes:
        columns: Of its ``LaunchTable``, which has one part: addresses and the number of elements.
        branch: Those of one branch are launched one after the other.
    """

    columns: Sequence[int]
    branch: Hashable


class UpdateGraph:
    """A CUDA graph of updates: branches beside each other, each in order.

    It is made node by node, not captured: so no stream is needed for it, and nothing that others
    launch meanwhile, from any thread, can get into it or break it.

    Attributes:
        handle: That the driver launches.
        verdicts: Where on the device it finds out which updates to leave out, 8 bytes each; 0 if
            nobody asks.
    """

    def __init__(
        self,
        device: CudaDevice,
        kernels: UpdateKernels,
        nodes: Sequence[Node],
        factors: Sequence[int],
        counts: int,
    ) -> None:
        """Makes it.

        Args:
            device: Where.
            kernels: What updates launch.
            nodes: The updates.
            factors: Of all of them, as kernels take them.
            counts: Address of what races are counted with, or 0.

        Raises:
            CudaError: If the driver refuses; nothing is left.
        """
        self._device = device
        self._kernels = kernels
        self._in_flight = 0
        self._dropped = False
        self._memory = DeviceMemory(device, WORD * len(nodes)) if kernels.finite else None
        self.verdicts = self._memory.address if self._memory else 0
        try:
            with device.current():
                graph = device.driver.make("cuGraphCreate", 0)
                try:
                    self._add_nodes(graph, nodes, factors, counts)
                    self.handle = device.driver.make(
                        "cuGraphInstantiateWithFlags", address(graph), ctypes.c_ulonglong(0)
                    )
                finally:
                    device.driver.call("cuGraphDestroy", address(graph))
        except BaseException:
            if self._memory:
                self._memory.free()
            raise

    def take(self) -> None:
        """It is about to be launched."""
        self._in_flight += 1

    def give_back(self) -> None:
        """A batch lets go of it, all of which has landed; once dropped, it goes with the last."""
        self._in_flight -= 1
        if self._dropped:
            with suppress(CudaError):  # the device has failed, which all that lands says
                self.drop()

    def drop(self) -> None:
        """Destroys it as soon as no batch has it."""
        self._dropped = True
        if self._in_flight:
            return
        with ExitStack() as each:
            if self._memory:
                each.callback(self._memory.free)
            each.callback(self._device.driver.call, "cuGraphExecDestroy", address(self.handle))

    def _add_nodes(
        self, graph: int, nodes: Sequence[Node], factors: Sequence[int], counts: int
    ) -> None:
        kernels = self._kernels
        cleared = self._clear_verdicts(graph, len(nodes)) if kernels.finite else 0
        last: dict[Hashable, int] = {}
        for index, (columns, branch) in enumerate(nodes):
            grad, elements = columns[GRAD], columns[ELEMENTS]
            verdict = self.verdicts + WORD * index if kernels.finite else 0
            after = [last[branch]] if branch in last else []
            if kernels.finite:
                arguments = [grad, elements, verdict]
                looks = self._add_kernel(graph, kernels.finite, elements, arguments, [cleared])
                after.append(looks)
            arguments = [*columns, *factors, *[0] * UNUSED, verdict, counts]
            last[branch] = self._add_kernel(graph, kernels.update, elements, arguments, after)

    def _clear_verdicts(self, graph: int, count: int) -> int:
        parameters = _MemsetParameters(self.verdicts, 0, 0, 4, 2 * count, 1)
        return self._device.driver.make(
            "cuGraphAddMemsetNode",
            address(graph),
            None,
            ctypes.c_size_t(0),
            ctypes.byref(parameters),
            address(self._device.context),
        )

    def _add_kernel(
        self,
        graph: int,
        function: Function,
        elements: int,
        arguments: Sequence[int],
        after: Sequence[int],
    ) -> int:
        """Adds a launch behind others."""
        values = (ctypes.c_int64 * (len(arguments) + SCRATCH))(*arguments)
        places = address_array(
            [ctypes.addressof(values) + WORD * place for place in range(len(values))]
        )
        parameters = _KernelParameters(
            function.handle,
            *(-(-elements // self._kernels.block), 1, 1),
            *(function.threads, 1, 1),
            function.shared,
            ctypes.cast(places, ctypes.c_void_p),
            None,
            None,
            None,
        )
        return self._device.driver.make(
            "cuGraphAddKernelNode_v2",
            address(graph),
            address_array(after) if after else None,
            ctypes.c_size_t(len(after)),
            ctypes.byref(parameters),
        )


class _KernelParameters(ctypes.Structure):
    """``CUDA_KERNEL_NODE_PARAMS_v2``."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z")),
        *((name, ctypes.c_uint) for name in ("block_x", "block_y", "block_z")),
        ("shared", ctypes.c_uint),
        ("arguments", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


class _MemsetParameters(ctypes.Structure):
    """``CUDA_MEMSET_NODE_PARAMS``."""

    _fields_ = (
        ("target", ctypes.c_uint64),
        ("pitch", ctypes.c_size_t),
        ("value", ctypes.c_uint),
        ("element_size", ctypes.c_uint),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )
