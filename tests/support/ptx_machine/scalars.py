"""The types of PTX, and the NumPy arrays that hold them.

A register is an array of unsigned integers, one for each thread; an instruction looks at its bits
as the type that it names. A packed type is looked at as twice as many numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

#: Integers by how many bits they have.
UNSIGNED: dict[int, np.dtype[Any]] = {8 * size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


class Scalar(NamedTuple):
    """A type of PTX.

    Attributes:
        name: Such as ``f32``.
        bits: How wide it is; 1 for a predicate.
        dtype: What NumPy computes with.
    """

    name: str
    bits: int
    dtype: np.dtype[Any]

    @property
    def raw(self) -> np.dtype[Any]:
        """Of an array that holds its bits."""
        return self.dtype if self.bits == 1 else UNSIGNED[self.bits]

    @property
    def is_float(self) -> bool:
        """Whether it is a floating-point number, or several."""
        return self.dtype.kind == "f"


SCALARS = {
    name: Scalar(name, bits, np.dtype(dtype))
    for name, bits, dtype in [
        ("pred", 1, "?"),
        *((f"{kind}{8 * size}", 8 * size, f"u{size}") for kind in "bu" for size in (1, 2, 4, 8)),
        *((f"s{8 * size}", 8 * size, f"i{size}") for size in (1, 2, 4, 8)),
        ("f16", 16, "f2"),
        ("f32", 32, "f4"),
        ("f64", 64, "f8"),
        ("f16x2", 32, "f2"),
        ("f32x2", 64, "f4"),
    ]
}


def constant(text: str, scalar: Scalar) -> Any:
    """A literal as a NumPy scalar of a type's dtype; integers wrap around, as PTX has it.

    Raises:
        ValueError: If the text is no literal of that type.
    """
    if text[:2].lower() in ("0f", "0d"):
        bits = 32 if text[1] in "fF" else 64
        if bits != scalar.bits or scalar.dtype.itemsize != bits // 8 or scalar.name[0] in "us":
            raise ValueError(f"{text} is no literal of type {scalar.name}")
        return UNSIGNED[bits].type(int(text[2:], 16)).view(scalar.dtype)
    if scalar.is_float:
        raise ValueError(f"{text} is no literal of type {scalar.name}")
    value = int(text.rstrip("U"), 0)
    if scalar.bits == 1:
        return np.bool_(value)
    return scalar.raw.type(value % (1 << scalar.bits)).view(scalar.dtype)
