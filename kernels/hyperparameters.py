"""What an update is made with: the numbers and switches of RMSprop, checked once."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("a finite number >= 0", lambda value: 0.0 <= value < math.inf),
    "alpha": ("a number >= 0 and <= 1", lambda value: 0.0 <= value <= 1.0),
    "eps": ("a finite number >= 0", lambda value: 0.0 <= value < math.inf),
    "weight_decay": ("a finite number >= 0", lambda value: 0.0 <= value < math.inf),
    "momentum": ("a finite number >= 0", lambda value: 0.0 <= value < math.inf),
}


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers and switches of one RMSprop update.

    Defaults are those of ChainerRL's ``RMSpropAsync``; Mnih et al. 2016 (arXiv 1602.01783) use
    ``lr=7e-4, alpha=0.99, eps=0.1``.

    Attributes:
        lr: Learning rate, finite and >= 0.
        alpha: Decay of the mean square, in [0, 1].
        eps: Keeps the denominator from zero, finite and >= 0.
        weight_decay: Finite and >= 0; coupled (L2) unless ``decoupled_weight_decay``.
        momentum: Decay of the momentum buffer, finite and >= 0; 0 for none.
        centered: Divide by the standard deviation: take the square of the mean gradient from the
            mean square (Graves 2013, arXiv 1308.0850). What becomes less than 0 is taken as 0.
        lr_in_momentum: The buffer takes steps that have been multiplied by ``lr``, as
            TensorFlow's; if false, ``lr`` multiplies the buffer, as torch's.
        eps_inside_sqrt: Divide by ``sqrt(ms + eps)``; if false, by ``sqrt(ms) + eps``, as torch.
        decoupled_weight_decay: Shrink the parameter by ``1 - lr * weight_decay`` instead of adding
            ``weight_decay * param`` to the gradient (Loshchilov and Hutter, arXiv 1711.05101).
        maximize: Ascend the gradient.
        stochastic_rounding: Round a parameter of 16 bits up or down by chance, so that it gets
            where it goes in the mean, also by steps that are too small for it.
        kahan_sum: Keep what rounding leaves of a parameter of 16 bits, and add it at the next
            update (Kahan summation; Zamirai et al. 2020, arXiv 2010.06192).

    Raises:
        TypeError: If a number is not a real number, or a switch not a bool.
        ValueError: If a number is NaN or out of its range, or ``stochastic_rounding`` and
            ``kahan_sum`` are both on.
    """

    lr: float = 0.01
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    lr_in_momentum: bool = False
    eps_inside_sqrt: bool = True
    decoupled_weight_decay: bool = False
    maximize: bool = False
    stochastic_rounding: bool = False
    kahan_sum: bool = False

    def __post_init__(self) -> None:
        for name, (allowed, holds) in _RANGES.items():
            value = _as_float(name, getattr(self, name), allowed)
            if not holds(value):
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
            object.__setattr__(self, name, value)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.stochastic_rounding and self.kahan_sum:
            raise ValueError(
                "kahan_sum must be False with stochastic_rounding=True, which leaves nothing to be "
                "added later, got True"
            )

    @classmethod
    def from_group(cls, group: dict[str, Any]) -> Hyperparameters:
        """The hyperparameters in an optimizer's parameter group, which may hold more."""
        return cls(**{name: group[name] for name in HYPERPARAMETERS})

    def check_held_by(self, dtype: torch.dtype) -> None:
        """Checks that no number is lost where the update of a parameter rounds it.

        What is only small stays: a denormal, or a ``1 - lr*weight_decay`` that becomes 1.

        Args:
            dtype: Of the parameter. All are computed with in float32 but float64, which holds all
                but what overflows in ``1 - lr*weight_decay``.

        Raises:
            ValueError: If ``lr``, ``eps``, ``weight_decay`` or ``momentum`` would become 0 without
                being 0, a number infinite, or ``alpha`` 1 without being 1.
        """
        double = dtype == torch.float64
        compute = "float64" if double else "float32"
        held = map(float, self.in_float64 if double else self.in_float32)
        for name, value, rounded in zip(_FACTOR_NAMES, self.factors, held, strict=True):
            lost = (rounded == 0.0) != (value == 0.0)
            lost |= name == "alpha" and (rounded == 1.0) != (value == 1.0)
            if lost or math.isinf(rounded):
                raise ValueError(
                    f"{name} must be a number that {compute}, the compute type, can hold, "
                    f"got {value!r}, which becomes {rounded!r} there"
                )

    @cached_property
    def switches(self) -> Switches:
        """What the code of the update depends on."""
        return Switches(
            eps_inside_sqrt=self.eps_inside_sqrt,
            coupled=self.weight_decay != 0.0 and not self.decoupled_weight_decay,
            centered=self.centered,
            momentum=self.momentum != 0.0,
            lr_in_momentum=self.momentum != 0.0 and self.lr_in_momentum,
            stochastic=self.stochastic_rounding,
            compensated=self.kahan_sum,
        )

    def with_grad_factor(self, factor: float) -> Hyperparameters:
        """These, with gradients multiplied by a factor before all else."""
        scaled = copy(self)
        for rounded in ("in_float32", "in_float64", "in_memory"):
            vars(scaled).pop(rounded, None)
        vars(scaled)["factors"] = self.factors._replace(sign=self.factors.sign * factor)
        return scaled

    @cached_property
    def factors(self) -> Factors:
        """What the update multiplies by and adds, in float64.

        Each is rounded to float32 once, to nearest even, by who computes in that: NumPy takes
        ``in_float32``, compiled CPU code rounds in ``numba_vectors.factors_at``, and Triton in
        ``triton_pieces.round_factors``.
        """
        return Factors(
            lr=self.lr,
            alpha=self.alpha,
            beta=1.0 - self.alpha,  # made here, in float64
            eps=self.eps,
            weight_decay=self.weight_decay,
            shrink=1.0 - self.lr * self.weight_decay if self.decoupled_weight_decay else 1.0,
            sign=-1.0 if self.maximize else 1.0,
            momentum=self.momentum,
        )

    @cached_property
    def in_float32(self) -> tuple[np.float32, ...]:
        """The factors in their order, each rounded once to nearest even; too large is infinite."""
        with np.errstate(over="ignore"):
            return tuple(np.asarray(self.factors, np.float32))

    @cached_property
    def in_float64(self) -> tuple[np.float64, ...]:
        """The factors in their order."""
        return tuple(np.asarray(self.factors, np.float64))

    @cached_property
    def in_memory(self) -> ctypes.Array[ctypes.c_double]:
        """The factors in their order, for compiled code, which is given their address.

        Behind them is room for the key of a step, of 64 bits.
        """
        return (ctypes.c_double * (len(self.factors) + 1))(*self.factors)


#: The names of the hyperparameters, as in arguments and parameter groups.
HYPERPARAMETERS = tuple(field.name for field in fields(Hyperparameters))
_SWITCHES = tuple(
    field.name for field in fields(Hyperparameters) if isinstance(field.default, bool)
)


class Switches(NamedTuple):
    """What the formula's code depends on: each backend compiles it for those that are used.

    Attributes:
        eps_inside_sqrt: Whether epsilon is added before the root, or behind it.
        coupled: Whether weight decay is added to the gradient.
        centered: Whether there is a mean of gradients.
        momentum: Whether there is a momentum buffer.
        lr_in_momentum: Whether what goes into that has been multiplied by ``lr``.
        stochastic: Whether parameters are rounded stochastically, if they are of 16 bits.
        compensated: Whether there is Kahan compensation, if they are.
    """

    eps_inside_sqrt: bool = True
    coupled: bool = False
    centered: bool = False
    momentum: bool = False
    lr_in_momentum: bool = False
    stochastic: bool = False
    compensated: bool = False

    @property
    def of_formula(self) -> tuple[bool, ...]:
        """Those that the formula takes: what is stored is rounded outside of it."""
        return self[:5]

    @property
    def of_descent(self) -> tuple[bool, ...]:
        """Those that it takes where ``ms`` has its new value already."""
        return (self.eps_inside_sqrt, *self[2:5])

    def of_dtype(self, dtype: torch.dtype) -> Switches:
        """What of these is of account for parameters of a dtype."""
        if dtype.itemsize == 2:
            return self
        return self._replace(stochastic=False, compensated=False)

    @property
    def bits(self) -> int:
        """As a number that has a bit for each."""
        return sum([switch << place for place, switch in enumerate(self)])

    @classmethod
    def of_bits(cls, bits: int) -> Switches:
        """Those of such a number."""
        return cls(*(bool(bits >> place & 1) for place in range(len(cls._fields))))


class Factors(NamedTuple):
    """What the formula has besides arrays, as float64; in every backend in this order.

    ``shrink`` and ``sign`` are exactly 1 when unused: a product with 1 changes no bit, so kernels
    need no branch for them.

    Attributes:
        lr: Learning rate.
        alpha: What stays of the mean square.
        beta: ``1 - alpha``.
        eps: Keeps the denominator from zero.
        weight_decay: What of the parameter is added to the gradient, if ``coupled``.
        shrink: ``1 - lr * weight_decay`` if weight decay is decoupled.
        sign: What gradients are multiplied by: -1 to maximize; and what unscales or clips them.
        momentum: What stays of the momentum buffer.
    """

    lr: float
    alpha: float
    beta: float
    eps: float
    weight_decay: float
    shrink: float
    sign: float
    momentum: float


# What errors call the factors.
_FACTOR_NAMES = (*Factors._fields[:5], "1 - lr*weight_decay", "the sign", "momentum")


def _as_float(name: str, value: Any, allowed: str) -> float:
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except OverflowError:  # an integer beyond float64
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be {allowed}, got {value!r}") from None
