"""What two processes check of distributed parameters: each function is one check, run by both.

They are run in one pair of processes, as starting those takes longer than all of them.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor, reduce_scatter_tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import LayerNorm, Linear, Module, Parameter, Sequential, Tanh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from hogstream.optim import RMSprop
from hogstream.optim.parameters import own_part, placement_of

PROCESSES = 2
OPTIONS: dict[str, Any] = {"lr": 0.01, "momentum": 0.5, "centered": True}
MakeOptimizer = Callable[..., Optimizer]


def model_of(seed: int = 0) -> Sequential:
    """A model whose rows do not divide evenly among processes, and of which one has a part only."""
    torch.manual_seed(seed)
    return Sequential(Linear(5, 7), Tanh(), Linear(7, 8), LayerNorm(8), Linear(8, 1))


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 5, generator=generator)


def sharded(model: Sequential, mesh: DeviceMesh, **options: Any) -> Sequential:
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def train(model: Module, optimizer: Optimizer, steps: range, *, clip: bool = False) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)).float().square().mean().backward()
        if clip:
            clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def values_of(model: Module, optimizer: Optimizer) -> list[torch.Tensor]:
    """Parameters and their state, whole."""
    params = list(model.parameters())
    states = [optimizer.state[param] for param in params]
    names = ("step", "square_avg", "grad_avg", "momentum_buffer")
    parts = [state[name] for state in states for name in names if name in state]
    return [full(each).clone() for each in (*params, *parts)]


def assert_follows(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def fsdp_follows_one_process(mesh: DeviceMesh, _: Path) -> None:
    for clip in (False, True):
        whole, parts = model_of(), sharded(model_of(), mesh)
        optimizers = [RMSprop(each.parameters(), **OPTIONS) for each in (whole, parts)]
        train(whole, optimizers[0], range(4), clip=clip)
        train(parts, optimizers[1], range(4), clip=clip)
        assert_follows(values_of(parts, optimizers[1]), values_of(whole, optimizers[0]))
        for param in parts.parameters():
            state = optimizers[1].state[param]
            assert placement_of(state["square_avg"]) == placement_of(param)
            assert type(state["step"]) is torch.Tensor


def clipping_in_the_step_follows_torch(mesh: DeviceMesh, _: Path) -> None:
    clipped = sharded(model_of(), mesh), sharded(model_of(), mesh)
    ours = RMSprop(clipped[0].parameters(), lr=0.01, momentum=0.5, max_grad_norm=0.1)
    theirs = torch.optim.RMSprop(clipped[1].parameters(), lr=0.01, momentum=0.5)
    train(clipped[0], ours, range(4))
    train(clipped[1], theirs, range(4), clip=True)
    assert_follows(values_of(clipped[0], ours), values_of(clipped[1], theirs))


def fsdp_in_mixed_precision_follows_torch(mesh: DeviceMesh, _: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    results = []
    for make in (RMSprop, torch.optim.RMSprop):
        model = sharded(model_of(), mesh, mp_policy=policy)
        optimizer = make(model.parameters(), **OPTIONS)
        train(model, optimizer, range(4), clip=True)
        results.append(values_of(model, optimizer))
    assert_follows(*results)


def fsdp_in_half_precision_keeps_what_rounding_leaves(mesh: DeviceMesh, _: Path) -> None:
    whole, parts = Linear(5, 7).bfloat16(), Linear(5, 7).bfloat16()
    for model in (whole, parts):
        for param in model.parameters():
            torch.nn.init.constant_(param, 0.1)
    fully_shard(parts, mesh=mesh)
    for model in (whole, parts):
        optimizer = RMSprop(model.parameters(), lr=1e-4, kahan_sum=True)
        for __ in range(4):
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
        for param in model.parameters():
            assert placement_of(optimizer.state[param]["kahan_comp"]) == placement_of(param)
    pairs = zip(whole.parameters(), parts.parameters(), strict=True)
    assert all(torch.equal(one, full(other)) for one, other in pairs)


def fsdp_of_a_model_that_was_on_meta(mesh: DeviceMesh, _: Path) -> None:
    with torch.device("meta"):
        model = Linear(5, 3)
    fully_shard(model, mesh=mesh)
    optimizer = RMSprop(model.parameters(), **OPTIONS)
    assert not optimizer.state
    model.to_empty(device="cpu")
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.5)
    train(model, optimizer, range(2))
    assert all(state["step"] == 2 for state in optimizer.state.values())


def fsdp_with_frozen_layers(mesh: DeviceMesh, _: Path) -> None:
    results = []
    for make in (RMSprop, torch.optim.RMSprop):
        model = model_of()
        model[2].requires_grad_(False)
        sharded(model, mesh)
        # Not centered: in the first steps that is a difference of numbers that are nearly equal.
        optimizer = make(model.parameters(), lr=0.01, momentum=0.5)
        train(model, optimizer, range(2))
        assert len(optimizer.state) == 6
        model[2].requires_grad_(True)
        train(model, optimizer, range(2, 4))
        results.append(values_of(model, optimizer))
    assert_follows(*results)


def converted_between_steps(mesh: DeviceMesh, _: Path) -> None:
    whole, parts = model_of(), sharded(model_of(), mesh)
    optimizers = [RMSprop(each.parameters(), **OPTIONS) for each in (whole, parts)]
    for model, optimizer in zip((whole, parts), optimizers, strict=True):
        train(model, optimizer, range(2))
        model.double()
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert_follows(values_of(parts, optimizers[1]), values_of(whole, optimizers[0]))
    assert all(p.dtype == torch.float64 for p in parts.parameters())


def tensor_parallel_follows_one_process(mesh: DeviceMesh, _: Path) -> None:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    whole, parts = (Sequential(Linear(5, 6), Tanh(), Linear(6, 3)) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    for model in (whole, parts):  # which every process must have the same
        for param in model.parameters():
            dist.broadcast(param.data, 0)
    parallelize_module(parts, mesh, plan)
    optimizers = [RMSprop(each.parameters(), **OPTIONS) for each in (whole, parts)]
    train(whole, optimizers[0], range(4))
    train(parts, optimizers[1], range(4))
    assert_follows(values_of(parts, optimizers[1]), values_of(whole, optimizers[0]))


def fsdp_over_tensor_parallel_follows_torch(_: DeviceMesh, __: Path) -> None:
    for shape in ((1, PROCESSES), (PROCESSES, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        results = []
        for make in (RMSprop, torch.optim.RMSprop):
            torch.manual_seed(0)
            model = Sequential(Linear(5, 6), Tanh(), Linear(6, 3))
            parallelize_module(model, mesh["tensor"], plan)
            sharded(model, mesh["data"])
            optimizer = make(model.parameters(), **OPTIONS)
            train(model, optimizer, range(4), clip=True)
            results.append(values_of(model, optimizer))
        assert_follows(*results)


def sequence_parallel_follows_torch(mesh: DeviceMesh, _: Path) -> None:
    """Its gradients are sums of which each process has a part."""
    results = []
    for make in (RMSprop, torch.optim.RMSprop):
        torch.manual_seed(0)
        norm = parallelize_module(LayerNorm(5), mesh, SequenceParallel(sequence_dim=0))
        optimizer = make(norm.parameters(), **OPTIONS)
        for step in range(3):
            optimizer.zero_grad()
            inputs = distribute_tensor(batch(step), mesh, [Shard(0)])
            norm(inputs).square().sum().backward()
            optimizer.step()
        results.append(values_of(norm, optimizer))
    assert_follows(*results)


def gradients_placed_otherwise(mesh: DeviceMesh, _: Path) -> None:
    results = []
    for make in (RMSprop, torch.optim.RMSprop):
        values = torch.linspace(-1, 1, 24).reshape(6, 4)
        param = Parameter(distribute_tensor(values, mesh, [Shard(0)]))
        whole = Parameter(distribute_tensor(values.clone(), mesh, [Replicate()]))
        optimizer = make([param, whole], lr=0.1)
        for placement in (Shard(0), Shard(0), Shard(0), Shard(1), Replicate(), Shard(0)):
            param.grad = distribute_tensor(values, mesh, [placement])
            whole.grad = DTensor.from_local(values, mesh, [Replicate()])
            optimizer.step()
        for __ in range(2):  # the same but for being parts of a sum
            whole.grad = DTensor.from_local(values / PROCESSES, mesh, [Partial()])
            optimizer.step()
        results.append([full(param), full(whole)])
    assert_follows(*results)


def gradients_that_are_still_on_their_way(mesh: DeviceMesh, _: Path) -> None:
    values = torch.linspace(-1, 1, 24).reshape(6, 4)
    param = Parameter(distribute_tensor(torch.zeros(6, 4), mesh, [Shard(0)]))
    optimizer = RMSprop([param], lr=0.5, alpha=0.0, eps=0.0)
    part = values.chunk(PROCESSES)[mesh.get_rank()]
    for __ in range(3):
        coming = reduce_scatter_tensor(values, "avg", 0, mesh)
        assert isinstance(coming, AsyncCollectiveTensor)
        param.grad = DTensor.from_local(coming, mesh, [Shard(0)])
        before = own_part(param).detach().clone()
        optimizer.step()
        assert torch.equal(own_part(param), before - 0.5 * part.sign())


def gradients_that_are_not_distributed_alike(mesh: DeviceMesh, _: Path) -> None:
    plain = Parameter(torch.ones(4, 2))
    param = Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    optimizer = RMSprop([plain, param])
    with torch.no_grad():
        param.grad, plain.grad = torch.ones(4, 2), torch.ones(4, 2)
    with pytest.raises(
        TypeError, match="grad of param 1 in group 0 must be a DTensor as its param, got a T"
    ):
        optimizer.step()
    assert plain.eq(1).all()
    assert full(param).eq(1).all()


def flat_memory_is_refused(mesh: DeviceMesh, _: Path) -> None:
    model = sharded(model_of(), mesh)
    with pytest.raises(
        ValueError, match="param 0 in group 0 must be a plain tensor with flat=True"
    ):
        RMSprop(model.parameters(), flat=True)


def checkpoints_go_on(mesh: DeviceMesh, _: Path) -> None:
    """Whole or in parts, by name or flattened, into an optimizer that has stepped or not."""
    for options in (
        StateDictOptions(),
        StateDictOptions(full_state_dict=True),
        StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        StateDictOptions(flatten_optimizer_state_dict=True),
    ):
        model, optimizer = make_sharded(mesh, seed=0)
        train(model, optimizer, range(3))
        saved = copy.deepcopy(get_state_dict(model, optimizer, options=options))
        twin, other = make_sharded(mesh, seed=1)
        train(twin, other, range(int(options.full_state_dict)))
        set_state_dict(
            twin, other, model_state_dict=saved[0], optim_state_dict=saved[1], options=options
        )
        for each, its in ((model, optimizer), (twin, other)):
            train(each, its, range(3, 5))
        pairs = zip(values_of(model, optimizer), values_of(twin, other), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs), options


def make_sharded(mesh: DeviceMesh, seed: int) -> tuple[Sequential, Optimizer]:
    model = sharded(model_of(seed), mesh)
    return model, RMSprop(model.parameters(), **OPTIONS)


def whole_state_is_not_loaded_into_parts(mesh: DeviceMesh, _: Path) -> None:
    model = model_of()
    optimizer = RMSprop(model.parameters(), **OPTIONS)
    train(model, optimizer, range(2))
    parts, other = make_sharded(mesh, seed=0)
    before = values_of(parts, other)
    with pytest.raises(TypeError, match="square_avg of parameter 0 must be a DTensor as its param"):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(map(torch.equal, values_of(parts, other), before))


def saves_what_one_process_loads(mesh: DeviceMesh, folder: Path) -> None:
    """Beside: what the same training in one process has come to."""
    model, optimizer = make_sharded(mesh, seed=0)
    train(model, optimizer, range(3))
    save(model, optimizer, folder / "by two")


def loads_what_one_process_saved(mesh: DeviceMesh, folder: Path) -> None:
    model, optimizer = make_sharded(mesh, seed=1)
    load(model, optimizer, folder / "by one")
    train(model, optimizer, range(3, 5))
    assert_follows(values_of(model, optimizer), trained_in_one_process(range(5)))


def save(model: Module, optimizer: Optimizer, folder: Path) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # if one process saves
        save_checkpoint({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)


def load(model: Module, optimizer: Optimizer, folder: Path) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": of_model, "optimizer": of_optimizer}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # if one process loads
        load_checkpoint(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def trained_in_one_process(steps: range) -> list[torch.Tensor]:
    model = model_of()
    optimizer = RMSprop(model.parameters(), **OPTIONS)
    train(model, optimizer, steps)
    return values_of(model, optimizer)


def optimizer_alone_is_saved_and_loaded(mesh: DeviceMesh, _: Path) -> None:
    model, optimizer = make_sharded(mesh, seed=0)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    before = values_of(model, optimizer)[len(list(model.parameters())) :]
    train(model, optimizer, range(2, 4))
    set_optimizer_state_dict(model, optimizer, saved)
    after = values_of(model, optimizer)[len(list(model.parameters())) :]
    assert all(map(torch.equal, before, after))


def data_parallel_follows_one_process(_: DeviceMesh, __: Path) -> None:
    parallel = DistributedDataParallel(model_of())
    optimizer = RMSprop(parallel.parameters(), **OPTIONS)
    train(parallel, optimizer, range(3))
    assert_follows(values_of(parallel, optimizer), trained_in_one_process(range(3)))


CHECKS: dict[str, Callable[[DeviceMesh, Path], None]] = {
    check.__name__: check
    for check in (
        fsdp_follows_one_process,
        clipping_in_the_step_follows_torch,
        fsdp_in_mixed_precision_follows_torch,
        fsdp_in_half_precision_keeps_what_rounding_leaves,
        fsdp_of_a_model_that_was_on_meta,
        fsdp_with_frozen_layers,
        converted_between_steps,
        tensor_parallel_follows_one_process,
        fsdp_over_tensor_parallel_follows_torch,
        sequence_parallel_follows_torch,
        gradients_placed_otherwise,
        gradients_that_are_still_on_their_way,
        gradients_that_are_not_distributed_alike,
        flat_memory_is_refused,
        checkpoints_go_on,
        optimizer_alone_is_saved_and_loaded,
        whole_state_is_not_loaded_into_parts,
        saves_what_one_process_loads,
        loads_what_one_process_saved,
        data_parallel_follows_one_process,
    )
}


def run_checks(rank: int, folder: Path) -> None:
    """Runs all checks in one of the processes, which leaves what went wrong beside."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    try:
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for name, check in CHECKS.items():
            try:
                check(mesh, folder)
                result = "right"
            except Exception:
                result = traceback.format_exc()
            (folder / f"{name}.{rank}").write_text(result)
            dist.barrier()
    finally:
        dist.destroy_process_group()
