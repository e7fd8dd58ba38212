"""Sparse gradients of embeddings, and state by rows: what a step makes of them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from hogstream.optim import RMSprop, RMSpropAsync, export_state
from row_testing import Table, updated_rows
from update_testing import CPU_BACKENDS, bits

ROWS, WIDTH = 12, 7
FULL: dict[str, Any] = {"centered": True, "momentum": 0.9}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"rowwise": True},
    {"lazy_decay": True},
    {"rowwise": True, "lazy_decay": True, "weight_decay": 0.1},
    {"eps_inside_sqrt": False, "maximize": True, **FULL},
]


class Model(nn.Module):
    """Two tables with sparse gradients, and what has dense ones."""

    def __init__(self, *, sparse: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(ROWS, WIDTH, sparse=sparse)
        self.bags = nn.EmbeddingBag(ROWS, WIDTH, sparse=sparse, mode="sum")
        self.linear = nn.Linear(WIDTH, 1)

    def forward(self, seed: int) -> torch.Tensor:
        """A loss, of words that are drawn; some of them are there twice."""
        torch.manual_seed(seed)
        words, bags = torch.randint(0, ROWS, (5,)), torch.randint(0, ROWS, (5, 3))
        loss: torch.Tensor = self.linear(self.words(words) * self.bags(bags)).square().sum()
        return loss


def table_of(optimizer: RMSpropAsync, param: torch.Tensor) -> Table:
    state = optimizer.state[param]
    names = "square_avg", "grad_avg", "momentum_buffer", "last_update"
    return Table(
        *(
            each if each is None else each.detach().clone()
            for each in (param, *map(state.get, names))
        )  # type: ignore[arg-type]
    )


def assert_same(actual: Table, expected: Table) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert (got is None) == (want is None)
        assert got is None or want is None or torch.equal(got, want)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_rows_are_updated_beside_dense_parameters(backend, options):
    model = Model()
    optimizer = RMSpropAsync(
        [
            {"params": [model.words.weight, *model.linear.parameters()]},
            {"params": model.bags.parameters(), "lr": 0.5, **options},
        ],
        backend=backend.name,
    )
    alone = copy.deepcopy(model.linear)
    dense = RMSpropAsync(alone.parameters(), backend=backend.name)
    for number in range(1, 5):
        optimizer.zero_grad()
        model(number).backward()
        expected = []
        for param, of_group in ((model.words.weight, {}), (model.bags.weight, options)):
            grad = param.grad
            assert grad is not None
            assert not grad.is_coalesced()
            lr = {"lr": 0.5} if param is model.bags.weight else {}
            made = updated_rows(
                table_of(optimizer, param), grad._indices()[0], grad._values(), number,
                **lr, **of_group,
            )  # fmt: skip
            expected.append((param, made))
        for mine, theirs in zip(alone.parameters(), model.linear.parameters(), strict=True):
            mine.grad = theirs.grad
        optimizer.step()
        dense.step()
        for param, made in expected:
            assert_same(table_of(optimizer, param), made)
            assert optimizer.state[param]["step"] == number
        for mine, theirs in zip(alone.parameters(), model.linear.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_a_mixed_step_keeps_the_plan_of_what_is_dense():
    model = Model()
    optimizer = RMSpropAsync(model.parameters())
    plans: list[Any] = []
    for number in range(4):
        optimizer.zero_grad()
        model(number).backward()
        optimizer.step()
        plans.append(optimizer._plan)
    assert plans[2] is plans[3]  # the second step's is compiled
    assert len(plans[3].premises.reached) == 2


@pytest.mark.parametrize("rowwise", [False, True])
def test_a_gradient_may_be_dense_at_one_step_and_sparse_at_the_next(rowwise):
    params = [Parameter(torch.ones(ROWS, WIDTH)) for _ in range(2)]
    changing, dense = (RMSpropAsync([param], rowwise=rowwise) for param in params)
    for number in range(6):
        torch.manual_seed(number)
        grad = torch.randn(ROWS, WIDTH)  # of all rows, so that both mean the same
        params[1].grad = grad
        params[0].grad = grad.to_sparse(1) if number % 3 == 1 else grad.clone()
        changing.step()
        dense.step()
        assert torch.equal(*params)


def test_a_gradient_that_becomes_none_leaves_its_parameter_alone():
    model = Model()
    optimizer = RMSpropAsync(model.parameters())
    for number in range(3):
        optimizer.zero_grad()
        model(number).backward()
        if number == 2:
            model.words.weight.grad = None
            before = table_of(optimizer, model.words.weight)
        optimizer.step()
    assert_same(table_of(optimizer, model.words.weight), before)
    assert optimizer.state[model.words.weight]["step"] == 2
    assert optimizer.state[model.bags.weight]["step"] == 3


@pytest.mark.parametrize("option", ["rowwise", "lazy_decay"])
@pytest.mark.parametrize("shape", [(), (5,), (5, 2, 3), (0, 4), (4, 0)], ids=str)
def test_parameters_of_any_shape_may_have_state_by_rows(option, shape):
    param = Parameter(torch.ones(shape))
    options: dict[str, Any] = {option: True}
    optimizer = RMSpropAsync([param], alpha=0.5, lr=1.0, eps=0.0, **options)
    param.grad = torch.full(shape, 2.0)
    optimizer.step()
    rows = shape[:1] or (1,)
    by_row = "square_avg" if option == "rowwise" else "last_update"
    assert optimizer.state[param][by_row].shape == rows
    if param.numel():
        torch.testing.assert_close(param.detach(), torch.full(shape, 1 - 2**0.5))


def test_complex_rows_are_those_of_their_parts():
    torch.manual_seed(0)
    whole = Parameter(torch.randn(ROWS, 3, dtype=torch.complex64))
    parts = Parameter(torch.view_as_real(whole.detach()).reshape(ROWS, 6).clone())
    grads = torch.randn(4, 3, dtype=torch.complex64)
    index = torch.tensor([[1, 5, 1, 2]])
    whole.grad = torch.sparse_coo_tensor(index, grads, whole.shape, check_invariants=False)
    as_parts = torch.view_as_real(grads).reshape(4, 6)
    parts.grad = torch.sparse_coo_tensor(index, as_parts, parts.shape, check_invariants=False)
    for param in (whole, parts):
        RMSpropAsync([param], rowwise=True).step()
    assert torch.equal(torch.view_as_real(whole.detach()).reshape(ROWS, 6), parts)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("saved_by", ["state_dict", "pickle"])
def test_a_run_goes_on_as_if_it_had_not_ended(options, saved_by):
    def train(model: Model, optimizer: RMSpropAsync, numbers: range) -> None:
        for number in numbers:
            optimizer.zero_grad()
            model(number).backward()
            optimizer.step()

    whole, half = Model(), Model()
    straight = RMSpropAsync(whole.parameters(), **options)
    train(whole, straight, range(6))
    optimizer = RMSpropAsync(half.parameters(), **options)
    train(half, optimizer, range(3))
    if saved_by == "pickle":
        half, optimizer = copy.deepcopy((half, optimizer))
    else:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        # Made with other options: those of the state count.
        optimizer = RMSpropAsync(half.parameters())
        train(copy.deepcopy(half), optimizer, range(0))
        optimizer.load_state_dict(torch.load(file))
    train(half, optimizer, range(3, 6))
    for one, other in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(one, other)
        for name, value in straight.state[one].items():
            assert torch.equal(optimizer.state[other][name], value), name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradients_may_grow_after_a_step(backend):
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = RMSpropAsync(embedding.parameters(), backend=backend.name)
    before = embedding.weight.detach().clone()
    embedding(torch.zeros(0, dtype=torch.int64)).sum().backward()
    optimizer.step()
    assert torch.equal(embedding.weight, before)
    embedding(torch.tensor([1])).sum().backward()  # which adds to the gradient that there is
    optimizer.step()
    changed = (embedding.weight != before).any(dim=1)
    assert changed.tolist() == [False, True, False, False]


def test_state_decays_from_when_it_is_asked_to():
    param = Parameter(torch.zeros(2, 1))
    optimizer = RMSpropAsync([param], alpha=0.5)
    group, state = optimizer.param_groups[0], optimizer.state[param]

    def step(row: int) -> None:
        index = torch.tensor([[row]])
        param.grad = torch.sparse_coo_tensor(index, torch.ones(1, 1), (2, 1), check_invariants=True)
        optimizer.step()

    for _ in range(20):
        step(0)
    group["lazy_decay"] = True
    step(0)
    # No step before is made up for: ms = 0.5*ms + 0.5.
    assert state["square_avg"][0].item() == pytest.approx(1 - 0.5**21)
    step(1)
    group["lazy_decay"] = False
    step(1)
    assert "last_update" not in state
    group["lazy_decay"] = True
    step(0)
    assert state["square_avg"][0].item() == pytest.approx(0.5 * (1 - 0.5**21) + 0.5)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("rowwise", [False, True])
def test_complex_state_turns_into_rows_and_back(rowwise, steps):
    param = Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    optimizer = RMSpropAsync([param], alpha=0.0, rowwise=rowwise)
    for _ in range(steps):
        param.grad = torch.tensor([[1 + 2j, 3 + 4j], [0, 0]])
        optimizer.step()
    optimizer.param_groups[0]["rowwise"] = not rowwise
    param.grad = torch.tensor([[1 + 2j, 3 + 4j], [0, 0]])
    optimizer.step()
    found = optimizer.state[param]["square_avg"]
    expected = torch.tensor([[1 + 4j, 9 + 16j], [0, 0]]) if rowwise else torch.tensor([7.5, 0.0])
    assert torch.equal(found, expected)
    other = RMSpropAsync([Parameter(torch.zeros(2, 2, dtype=torch.complex64))], rowwise=rowwise)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[other.param_groups[0]["params"][0]]["square_avg"], expected)


def test_state_by_rows_and_by_elements_turn_into_each_other():
    param = Parameter(torch.zeros(2, 2))
    optimizer = RMSpropAsync([param], alpha=0.5)
    param.grad = torch.tensor([[2.0, 4.0], [0.0, 0.0]])
    optimizer.step()
    assert optimizer.state[param]["square_avg"].tolist() == [[2.0, 8.0], [0.0, 0.0]]
    param.grad = torch.zeros(2, 2)
    optimizer.param_groups[0]["rowwise"] = True
    optimizer.step()  # 0.5 * (2 + 8)/2
    assert optimizer.state[param]["square_avg"].tolist() == [2.5, 0.0]
    optimizer.param_groups[0]["rowwise"] = False
    optimizer.step()
    assert optimizer.state[param]["square_avg"].tolist() == [[1.25, 1.25], [0.0, 0.0]]


def test_steps_are_told_apart_beyond_2_to_the_24():
    param = Parameter(torch.zeros(3, 2))
    optimizer = RMSpropAsync([param], lazy_decay=True)
    state = optimizer.state[param]
    state["step"].fill_(2.0**24)
    for row in (0, 1, 2):
        grad = torch.sparse_coo_tensor(
            torch.tensor([[row]]), torch.ones(1, 2), (3, 2), check_invariants=True
        )
        param.grad = grad
        optimizer.step()
    assert state["last_update"].tolist() == [(1 << 24) + number for number in (1, 2, 3)]


def test_shared_state_is_shared_with_its_rows():
    param = Parameter(torch.zeros(3, 2).share_memory_())
    optimizer = RMSpropAsync([param], lazy_decay=True, rowwise=True).share_memory()
    state = optimizer.state[param]
    assert all(state[name].is_shared() for name in ("step", "square_avg", "last_update"))
    param.grad = torch.ones(3, 2)
    optimizer.step()
    assert state["last_update"].tolist() == [1, 1, 1]
    optimizer.param_groups[0]["rowwise"] = False
    with pytest.raises(RuntimeError, match="outgrown square_avg, and other processes"):
        optimizer.step()


SIXTEEN: list[dict[str, Any]] = [
    {"stochastic_rounding": True, "seed": 3},
    {"kahan_sum": True},
    {"kahan_sum": True, "rowwise": True},
    {"stochastic_rounding": True, "lazy_decay": True},
]


@pytest.mark.parametrize("options", SIXTEEN, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_of_16_bits_are_rounded_alike_by_all_backends(dtype, options):
    pytest.importorskip("numba")
    found = []
    for backend in ("numpy", "numba"):
        model = Model().to(dtype)
        optimizer = RMSpropAsync(model.parameters(), backend=backend, lr=1e-3, **options)
        for number in range(3):
            optimizer.zero_grad()
            model(number).backward()
            optimizer.step()
        states = [optimizer.state[param] for param in model.parameters()]
        found.append([*model.parameters(), *(v for each in states for v in each.values())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("options", SIXTEEN[:2], ids=str)
def test_all_rows_once_are_rounded_as_a_dense_parameter(options):
    params = [Parameter(torch.ones(ROWS, WIDTH, dtype=torch.bfloat16)) for _ in range(2)]
    sparse, dense = (RMSpropAsync([param], lr=1e-3, **options) for param in params)
    for number in range(4):
        torch.manual_seed(number)
        params[1].grad = torch.randn(ROWS, WIDTH).bfloat16()
        params[0].grad = params[1].grad.to_sparse(1)
        sparse.step()
        dense.step()
        assert torch.equal(bits(params[0].detach()), bits(params[1].detach()))


def test_a_loss_scale_is_taken_out_of_rows_and_an_infinite_gradient_leaves_them_out():
    models = [Model(), Model()]
    plain, scaled = (RMSpropAsync(each.parameters()) for each in models)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number in range(4):
        for optimizer in (plain, scaled):
            optimizer.zero_grad()
        models[0](number).backward()
        scaler.scale(models[1](number)).backward()
        if number == 2:
            grad = models[1].words.weight.grad
            assert grad is not None
            grad._values()[0, 0] = torch.inf
        else:
            plain.step()
        scaler.step(scaled)
        scaler.update(2.0**10)
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(one, other)


def test_the_norm_is_of_the_sums_of_rows():
    embedding, dense = nn.Embedding(4, 2, sparse=True), nn.Embedding(4, 2)
    dense.load_state_dict(embedding.state_dict())
    for each in (embedding, dense):
        (30 * each(torch.tensor([1, 1, 2]))).sum().backward()
    torch.nn.utils.clip_grad_norm_(dense.parameters(), 1.0)
    RMSpropAsync(embedding.parameters(), max_grad_norm=1.0).step()
    RMSpropAsync(dense.parameters()).step()
    torch.testing.assert_close(embedding.weight, dense.weight)


def sparse_in_two_axes(param: Parameter) -> torch.Tensor:
    return torch.ones_like(param).to_sparse()


def beyond_the_table(param: Parameter) -> torch.Tensor:
    index = torch.tensor([[0, len(param)]])
    return torch.sparse_coo_tensor(index, torch.ones(2, WIDTH), param.shape, check_invariants=False)


BAD_GRADS: list[tuple[Callable[[Parameter], torch.Tensor], type[Exception], str]] = [
    (sparse_in_two_axes, ValueError, "grad of param 1 in group 0 .* got 2 sparse axes"),
    (beyond_the_table, IndexError, "rows of grad of param 1 in group 0 .* got 12 at 1"),
]


@pytest.mark.parametrize(("grad", "error", "message"), BAD_GRADS)
def test_a_bad_gradient_is_refused_before_anything_has_changed(grad, error, message):
    params = [Parameter(torch.ones(ROWS, WIDTH)) for _ in range(3)]
    optimizer = RMSpropAsync(params)
    params[0].grad = torch.ones(ROWS, WIDTH)
    params[1].grad = grad(params[1])
    params[2].grad = torch.ones(ROWS, WIDTH).to_sparse(1)
    with pytest.raises(error, match=message):
        optimizer.step()
    for param in params:
        assert (param == 1).all()
        assert optimizer.state[param]["step"] == 0
        assert not optimizer.state[param]["square_avg"].any()


def test_a_parameter_in_another_order_is_refused_by_rows():
    param = Parameter(torch.ones(WIDTH, ROWS).T)
    optimizer = RMSpropAsync([param], rowwise=True)
    param.grad = torch.ones(ROWS, WIDTH)
    with pytest.raises(ValueError, match=r"param 0 in group 0 must be contiguous .* strides"):
        optimizer.step()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rowwise": 1}, "rowwise must be True or False, got 1"),
    ({"rowwise": True, "centered": True}, "centered must be False with rowwise=True"),
    ({"lazy_decay": True, "momentum": 0.9}, "momentum must be 0 with lazy_decay=True"),
    ({"lazy_decay": True, "capturable": True}, "lazy_decay must be False with capturable=True"),
    ({"rowwise": True, "differentiable": True}, "rowwise must be False with differentiable=True"),
    ({"rowwise": True, "flat": True}, "rowwise of group 0 must be False with flat=True"),
    ({"lazy_decay": True, "flat": True}, "lazy_decay of group 0 must be False with flat=True"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        RMSpropAsync([Parameter(torch.ones(2, 2))], **options)


def test_torch_cannot_take_state_by_rows():
    optimizer = RMSprop([Parameter(torch.ones(2, 2))], rowwise=True)
    with pytest.raises(ValueError, match="rowwise of group 0 must be False for torch"):
        export_state(optimizer, to="torch")
