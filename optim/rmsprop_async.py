"""RMSprop for asynchronous training, as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, overload

import torch
from torch.optim import Optimizer

from hogstream.kernels.backends import Backend, check_backend, select_backend
from hogstream.kernels.hyperparameters import HYPERPARAMETERS, Hyperparameters
from hogstream.kernels.operands import (
    COMPUTE_DTYPES,
    Operands,
    check_grad,
    check_operands,
    check_param,
    same_layout,
)


class _Update(NamedTuple):
    """One parameter's update: checked, not yet applied."""

    param: torch.Tensor
    backend: Backend
    operands: Operands
    hyperparameters: Hyperparameters
    step: torch.Tensor


class RMSpropAsync(Optimizer):
    """RMSprop with epsilon inside the root, and state that may be shared between workers.

    Per parameter, with ``ms`` (``state["square_avg"]``) starting at zero::

        ms    = alpha*ms + ((1 - alpha)*grad)*grad
        param = param - (lr*grad) / sqrt(ms + eps)

    as in ChainerRL's ``RMSpropAsync``: the non-centered "shared RMSProp" of Mnih et al. 2016
    (arXiv 1602.01783). Every backend gives the same bits.

    State is made here, not at the first step, so that it can be shared before workers start. Its
    names are those of ``torch.optim.RMSprop``: ``step`` (float32 scalar) and ``square_avg`` (shape
    of the parameter; float64 for float64 parameters, else float32). A parameter whose gradient is
    None is left alone, its state too.

    Args:
        params: Parameters, named parameters or groups; float16, bfloat16, float32 or float64.
        lr: Learning rate, finite and >= 0.
        alpha: Decay of ``ms``, in [0, 1).
        eps: Finite and >= 0.
        weight_decay: Finite and >= 0.
        eps_inside_sqrt: If false, divide by ``sqrt(ms) + eps``, as ``torch.optim.RMSprop``.
        decoupled_weight_decay: Shrink the parameter by ``1 - lr*weight_decay`` instead of adding
            ``weight_decay*param`` to the gradient.
        maximize: Ascend the gradient.
        backend: ``"triton"``, ``"numba"`` or ``"numpy"``; None picks by device.

    Raises:
        TypeError: If a parameter or number is of a wrong type or dtype.
        ValueError: If a parameter cannot be updated in place, a number is out of range, or
            ``backend`` is unknown or cannot take a parameter's device.
        RuntimeError: If ``backend`` is not available here.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        eps_inside_sqrt: bool = True,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        backend: str | None = None,
    ) -> None:
        check_backend(backend)
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "eps_inside_sqrt": eps_inside_sqrt,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
        }
        Hyperparameters.from_group(defaults)
        self.backend = backend
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, and makes their state.

        Args:
            param_group: ``{"params": ...}``, and any hyperparameter that differs from the defaults.

        Raises:
            TypeError: As for the class.
            ValueError: As for the class, or if a parameter is in another group already.
            RuntimeError: If no backend is available for a parameter's device.
        """
        Hyperparameters.from_group({**self.defaults, **param_group})
        params = param_group["params"]
        if isinstance(params, torch.Tensor):
            params = [params]
        elif not isinstance(params, set):  # which torch refuses, as it has no order
            params = list(params)  # an iterator may be read only once
        for index, param in enumerate(params):
            tensor = param[1] if isinstance(param, tuple) else param
            if isinstance(tensor, torch.Tensor):  # torch refuses anything else, in its own words
                check_param(tensor, f"param {index}")
                select_backend(self.backend, tensor.device.type)
        super().add_param_group({**param_group, "params": params})
        for param in self.param_groups[-1]["params"]:
            self.state[param] = _new_state(param)

    def share_memory(self) -> RMSpropAsync:
        """Moves all state to shared memory, for other processes to update too.

        The parameters themselves are shared by ``module.share_memory()``. CUDA tensors are shared
        as they are.

        Returns:
            The optimizer itself.
        """
        for state in self.state.values():
            for tensor in state.values():
                tensor.share_memory_()
        return self

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient.

        All gradients are checked before the first parameter is changed.

        Args:
            closure: Clears the gradients, computes the loss and returns it; called first.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError: If a gradient has another dtype than its parameter.
            ValueError: If a gradient is sparse, or of another shape or device, or a group's
                hyperparameter is out of range.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for update in self._checked_updates():
            update.backend.update_(update.operands, update.hyperparameters)
            torch.autograd.graph.increment_version(update.param)  # autograd notices the change
            update.step.add_(1)
        return loss

    def _checked_updates(self) -> list[_Update]:
        updates = []
        for group_index, group in enumerate(self.param_groups):
            hyperparameters = Hyperparameters.from_group(group)
            for index, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                name = f"param {index} in group {group_index}"
                grad, state = param.grad, self.state[param]
                check_grad(param, grad, f"grad of {name}")
                if not same_layout(grad, param):
                    grad = torch.empty_like(param).copy_(grad)
                if not same_layout(state["square_avg"], param):
                    raise ValueError(
                        f"{name} must keep the strides that the optimizer was made with, "
                        f"{state['square_avg'].stride()}, got {param.stride()}"
                    )
                updates.append(
                    _Update(
                        param,
                        select_backend(self.backend, param.device.type),
                        check_operands(param, grad, state["square_avg"]),
                        hyperparameters,
                        state["step"],
                    )
                )
        return updates

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads hyperparameters and state, in place: tensors that are shared stay shared.

        A ``torch.optim.RMSprop`` state is taken too, if it is neither centered nor has momentum;
        hyperparameters that it does not know stay as they are. So does ``backend``, which is not
        part of the state.

        Args:
            state_dict: From ``state_dict()``.

        Raises:
            TypeError: If a hyperparameter is of a wrong type.
            ValueError: If groups, parameters, names of state or shapes differ, a hyperparameter is
                out of range, or the state has momentum or is centered. Nothing is loaded then.
        """
        state, groups = dict(self.state), self.param_groups
        final: dict[str, Any] = {}

        def check(_: Optimizer, loaded: dict[str, Any]) -> None:
            _check_loadable(self, loaded)
            final.update(loaded)

        def restore(_: Optimizer) -> None:
            # torch has cast square_avg to the parameters' dtype, and made new tensors.
            for group, old in zip(self.param_groups, groups, strict=True):
                for name in HYPERPARAMETERS:
                    group.setdefault(name, old[name])
            for param, saved in _pair(self, final):
                for name, tensor in state[param].items():
                    if saved:
                        tensor.copy_(torch.as_tensor(saved[name]))
                    else:
                        tensor.zero_()
                self.state[param] = state[param]

        # After the user's hooks that may change the dict, and before those that may change state.
        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: torch's state of an optimizer, and the backend."""
        return {**super().__getstate__(), "backend": self.backend}


def _new_state(param: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "square_avg": torch.zeros_like(
            param,
            dtype=COMPUTE_DTYPES[param.dtype],
            memory_format=torch.preserve_format,
            requires_grad=False,
        ),
    }


def _pair(
    optimizer: Optimizer, state_dict: dict[str, Any]
) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Each parameter with its saved state, which is empty if none was saved."""
    return [
        (param, state_dict["state"].get(saved_id, {}))
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
        for param, saved_id in zip(group["params"], saved["params"], strict=True)
    ]


def _check_loadable(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if saved_sizes != sizes:
        raise ValueError(f"state_dict must have groups of {sizes} parameters, got {saved_sizes}")
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        for name in ("momentum", "centered"):
            if saved.get(name):
                raise ValueError(
                    f"{name} of group {index} must be off to be loaded, got {saved[name]}"
                )
        Hyperparameters.from_group({**group, **saved})
    for index, (param, saved) in enumerate(_pair(optimizer, state_dict)):
        if saved and saved.keys() != {"step", "square_avg"}:
            raise ValueError(
                f"state of parameter {index} must have step and square_avg, got {sorted(saved)}"
            )
        for name, shape in (("step", ()), ("square_avg", tuple(param.shape))):
            got = tuple(torch.as_tensor(saved[name]).shape) if saved else shape
            if got != shape:
                raise ValueError(f"{name} of parameter {index} must have shape {shape}, got {got}")
