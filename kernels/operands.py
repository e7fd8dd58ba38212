"""What a kernel may be given: checks arrays and tensors, and lays them flat without a copy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.dlpack import from_dlpack

ArrayLike = torch.Tensor | npt.NDArray[Any]

#: Parameter dtype to compute type: the type of ``ms`` and of all arithmetic.
COMPUTE_DTYPES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
#: What parameter dtypes are called in options, results and compiled kernels.
DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in COMPUTE_DTYPES}
_FLOATS = (np.float16, np.float32, np.float64)
_ALLOWED = "float16, bfloat16, float32 or float64"


class Operands(NamedTuple):
    """One update's tensors: flat, contiguous, checked, sharing storage with what was given.

    Attributes:
        param: Shape (n,), a dtype of ``COMPUTE_DTYPES``.
        grad: Shape (n,), a dtype of ``COMPUTE_DTYPES``.
        ms: Shape (n,), the compute type of ``param``.
        grad_avg: As ``ms``; None if the update is not centered.
        momentum_buffer: As ``ms``; None if the update has no momentum.
        kahan_comp: What rounding has left of ``param``: shape (n,), dtype of ``param``; None if the
            update has no Kahan summation, or the parameter is not of 16 bits.
    """

    param: torch.Tensor
    grad: torch.Tensor
    ms: torch.Tensor
    grad_avg: torch.Tensor | None = None
    momentum_buffer: torch.Tensor | None = None
    kahan_comp: torch.Tensor | None = None

    @property
    def written(self) -> list[torch.Tensor]:
        """What an update writes."""
        every = self.param, *self[2:]
        return [tensor for tensor in every if tensor is not None]


def check_param(param: torch.Tensor, name: str = "param") -> None:
    """Checks that a parameter's dtype and layout can be updated in place.

    Raises:
        TypeError: If ``param`` is not of a dtype in ``COMPUTE_DTYPES``.
        ValueError: If it is sparse or has no memory, or its elements do not fill one block of it.
    """
    if param.dtype not in COMPUTE_DTYPES:
        raise TypeError(f"{name} must be {_ALLOWED}, got {short(param.dtype)}")
    check_dense(name, param)


def check_grad(
    param: torch.Tensor, grad: torch.Tensor, name: str = "grad", param_name: str = "param"
) -> None:
    """Checks that a gradient fits its parameter; their memory layouts may differ.

    Raises:
        TypeError: If ``grad`` is not of a dtype in ``COMPUTE_DTYPES``.
        ValueError: If ``grad`` is sparse, or shapes or devices differ.
    """
    if grad.layout != torch.strided:
        raise ValueError(f"{name} must be dense, got layout {short(grad.layout)}")
    if grad.dtype not in COMPUTE_DTYPES:
        raise TypeError(f"{name} must be {_ALLOWED}, got {short(grad.dtype)}")
    if grad.shape != param.shape:
        raise ValueError(
            f"{name} must have the shape of {param_name}, {tuple(param.shape)}, "
            f"got {tuple(grad.shape)}"
        )
    if grad.device != param.device:
        raise ValueError(f"{name} must be on {param.device} as {param_name}, got {grad.device}")


def check_operands(
    param: ArrayLike,
    grad: ArrayLike,
    ms: ArrayLike,
    grad_avg: ArrayLike | None = None,
    momentum_buffer: ArrayLike | None = None,
    kahan_comp: ArrayLike | None = None,
    names: Sequence[str] = Operands._fields,
) -> Operands:
    """Checks one update's operands and lays them flat.

    Args:
        param: Any shape; float16, bfloat16 (torch only), float32 or float64. NumPy array or tensor.
        grad: Shape, device and strides of ``param``; any of these dtypes.
        ms: The same, but of the compute type: float64 for float64 parameters, else float32.
        grad_avg: As ``ms``; None if the update is not centered.
        momentum_buffer: As ``ms``; None if the update has no momentum.
        kahan_comp: As ``param``; None if the update has no Kahan summation.
        names: What errors call the operands, in their order.

    Raises:
        TypeError: If an operand is of a wrong type or dtype.
        ValueError: If shapes, devices or strides differ, or memory is read-only or not contiguous.
    """
    param_name, grad_name, *state_names = names
    param = as_tensor(param_name, param, written=True)
    grad = as_tensor(grad_name, grad, written=False)
    state = [
        each if each is None else as_tensor(name, each, written=True)
        for name, each in zip(state_names, (ms, grad_avg, momentum_buffer, kahan_comp), strict=True)
    ]
    check_param(param, param_name)
    check_grad(param, grad, grad_name, param_name)
    for name, each in zip(state_names, state, strict=True):
        if each is not None:
            dtype = param.dtype if each is state[-1] else COMPUTE_DTYPES[param.dtype]
            _check_state(param, each, dtype, name, param_name)
    check_not_negated(param, param_name)
    grad = grad.resolve_neg()
    for name, tensor in zip(names[1:], (grad, *state), strict=True):
        if tensor is not None:
            _check_laid_out_as(param, tensor, name, param_name)
    flat = [each if each is None else lay_flat(each) for each in state]
    return Operands(lay_flat(param), lay_flat(grad), *flat)  # type: ignore[arg-type]  # ms is one


def _check_state(
    param: torch.Tensor, state: torch.Tensor, dtype: torch.dtype, name: str, param_name: str
) -> None:
    if state.dtype != dtype:
        raise TypeError(
            f"{name} must be {short(dtype)} for {short(param.dtype)} params, "
            f"got {short(state.dtype)}"
        )
    if state.layout != torch.strided or state.shape != param.shape:
        raise ValueError(
            f"{name} must be dense and have the shape of {param_name}, {tuple(param.shape)}, "
            f"got {short(state.layout)}, {tuple(state.shape)}"
        )
    if state.device != param.device:
        raise ValueError(f"{name} must be on {param.device} as {param_name}, got {state.device}")
    check_not_negated(state, name)


def check_not_negated(tensor: torch.Tensor, name: str) -> None:
    """Checks that memory is what a tensor says that it is.

    Raises:
        ValueError: If it is a lazily negated view.
    """
    if tensor.is_neg():
        raise ValueError(f"{name} must be memory as it is, got a lazily negated view of it")


def _check_laid_out_as(
    param: torch.Tensor, tensor: torch.Tensor, name: str, param_name: str
) -> None:
    check_dense(name, tensor)
    if not same_layout(tensor, param):
        raise ValueError(
            f"{name} must have the strides of {param_name}, {param.stride()}, got {tensor.stride()}"
        )


def lay_flat(tensor: torch.Tensor) -> torch.Tensor:
    """A view of shape (n,) of a tensor whose elements fill one block of memory, in memory order."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def own_view(flat: torch.Tensor, like: torch.Tensor, start: int) -> torch.Tensor:
    """A tensor over a part of flat memory that is its whole storage to torch.

    So it is saved as what it is, where a usual view is saved with all of the memory, or refused
    (by safetensors). The memory lives for as long as the tensor. ``share_memory_()`` moves the
    tensor out of it.

    Args:
        flat: Shape (n,).
        like: Has the shape and strides.
        start: Its first element in ``flat``.
    """
    view = flat.as_strided(like.size(), like.stride(), start)
    # Some versions of torch set the strides of axes of size 1 to 1.
    return from_dlpack(view).as_strided(like.size(), like.stride())


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two dense tensors of one shape hold their elements in the same memory order."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    return all(
        size == 1 or stride == other
        for size, stride, other in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a strided tensor's elements fill one block of memory, each once, in any order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def as_tensor(
    name: str, array: ArrayLike, *, written: bool, dtypes: Sequence[type[np.generic]] = _FLOATS
) -> torch.Tensor:
    """A tensor as it is, or one over the memory of an array.

    Args:
        name: What errors call it.
        array: It.
        written: Whether it will be; if not, one that is read-only is copied.
        dtypes: Which an array may be of.

    Raises:
        TypeError: If it is neither, or an array of another dtype or a class of its own.
        ValueError: If an array is read-only and will be written, or has strides that no tensor has.
    """
    if isinstance(array, torch.Tensor):
        return array
    if not isinstance(array, np.ndarray):
        raise TypeError(
            f"{name} must be a NumPy array or a torch tensor, got {type(array).__name__}"
        )
    # A mask, or a unit, is not in the memory that a kernel sees.
    if isinstance(array, np.ma.MaskedArray) or (
        type(array).__array_ufunc__ is not np.ndarray.__array_ufunc__
    ):
        raise TypeError(
            f"{name} must be a plain NumPy array, got a {type(array).__name__}, whose class has "
            "arithmetic of its own"
        )
    if written and not array.flags.writeable:
        raise ValueError(f"{name} must be writable, got a read-only array")
    if array.dtype not in dtypes:  # of this machine's byte order
        *most, last = (each.__name__ for each in dtypes)
        allowed = f"{', '.join(most)} or {last}" if most else last
        raise TypeError(f"{name} must be native {allowed}, got {array.dtype}")
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        raise ValueError(f"{name} must be contiguous, got strides of {array.strides} bytes")
    # torch cannot wrap read-only memory without a warning, and a gradient may well be read-only.
    return torch.from_numpy(array if array.flags.writeable else array.copy(order="K"))


def check_dense(name: str, tensor: torch.Tensor) -> None:
    """Checks that a tensor's elements fill one block of memory, which is there.

    Raises:
        ValueError: If not, or if it is sparse.
    """
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be dense, got layout {short(tensor.layout)}")
    if not is_dense(tensor):
        raise ValueError(
            f"{name} must fill one block of memory (contiguous, or a permutation of that), "
            f"got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
        )
    # Kernels are given addresses. Distributed tensors and other wrappers have none, nor have the
    # zeros that autograd does not write out, or a tensor whose storage was freed.
    if tensor.numel() and tensor.device.type != "meta" and not tensor.data_ptr():
        raise ValueError(
            f"{name} must have memory of its own, got a {type(tensor).__name__} that has none"
        )


def check_disjoint(named: Iterable[tuple[Sequence[str], Any]], *, in_turn: bool = False) -> None:
    """Checks that no memory is written by an update of a list and used by anything else in it.

    Args:
        named: What errors call each update's operands, and the operands: a named tuple of tensors.
        in_turn: Whether updates that write the same memory come one after the other: parameters
            may share it then, and so may state of one kind.

    Raises:
        ValueError: If a parameter or its state overlaps another tensor.
    """
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), kind, name)
        for names, operands in named
        for kind, name, tensor in zip(operands._fields, names, operands, strict=True)
        if tensor is not None and tensor.numel() and tensor.data_ptr()  # which meta tensors lack
    )
    last: dict[str, tuple[int, str]] = {}  # of each kind the span that reaches furthest
    for start, end, kind, name in spans:
        for other_kind, (other_end, other) in last.items():
            may_share = kind == other_kind and (in_turn or kind == "grad")
            if start < other_end and not may_share:
                raise ValueError(f"{other} and {name} must not overlap in memory")
        if kind not in last or end > last[kind][0]:
            last[kind] = end, name


def short(thing: torch.dtype | torch.layout) -> str:
    """What errors call it."""
    return str(thing).removeprefix("torch.")
