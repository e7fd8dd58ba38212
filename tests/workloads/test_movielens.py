"""Ratings factorised: gradients, orders, errors and what the command says, against hand work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.profiling.measure.by_hand import ByHand
from hogstream.profiling.results.files import decoded
from hogstream.profiling.results.movielens_schema import MovieLens
from hogstream.scheduler import SchedulerSettings, StreamScheduler
from hogstream.scheduler.workers.native_steps import NativeState
from hogstream.workloads.movielens import (
    factorization,
    factorization_machine,
    torch_processes,
)
from hogstream.workloads.movielens.block_order import BlockOrder
from hogstream.workloads.movielens.cross_validation import Point, Training
from hogstream.workloads.movielens.factorization import factorise
from hogstream.workloads.movielens.factorization_machine import features, learn
from hogstream.workloads.movielens.fold import Fold
from hogstream.workloads.movielens.ratings import Ratings, folds


def planted(users: int = 80, items: int = 50, seed: int = 0) -> Ratings:
    """Half of all ratings of some users, of rank 1 and from 1 to 5."""
    rng = np.random.default_rng(seed)
    of_user, of_item = np.nonzero(rng.random((users, items)) < 0.5)
    taste, quality = rng.uniform(-1, 1, users), rng.uniform(-1, 1, items)
    values = 3 + 2 * taste[of_user] * quality[of_item]
    return Ratings(
        of_user.astype(np.int32),
        of_item.astype(np.int32),
        values.astype(np.float32),
        users,
        items,
    )


def first_fold(ratings: Ratings) -> Fold:
    train, test = next(iter(folds(ratings)))
    return Fold(ratings, train, test)


def test_the_gradient_is_that_of_half_the_squared_error():
    torch.manual_seed(0)
    users, items = (torch.randn(rows, 6, dtype=torch.float64) for rows in (4, 3))
    for each in (users, items):
        each.requires_grad_()
    samples = np.array([2]), np.array([1]), np.array([0.7])
    rows = np.full(1, -1), np.full(1, -1)
    grads = np.zeros((1, 6)), np.zeros((1, 6))
    tables = tuple(each.detach().numpy() for each in (users, items))
    squared = factorise()(tables, samples, NativeState(0, rows, grads))
    p, q = users[2], items[1]
    error = p[0] + q[0] + p[1:] @ q[1:] - 0.7
    (error**2 / 2).backward()
    assert (rows[0][0], rows[1][0]) == (2, 1)
    assert squared == pytest.approx(error.item() ** 2)
    for grad, table, row in zip(grads, (users, items), (2, 1), strict=True):
        assert table.grad is not None
        torch.testing.assert_close(torch.from_numpy(grad[0]), table.grad[row])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_an_order_has_each_sample_once_and_each_worker_users_of_its_own(workers):
    """As parts are dealt; and users of one worker are neighbours."""
    ratings = planted()
    order = BlockOrder(ratings.users, ratings.items, workers, seed=1)
    generator = np.random.default_rng(0)
    for _ in range(3):
        parts = order(generator)
        assert len(parts) == workers**2
        assert sorted(np.concatenate(parts)) == list(range(len(ratings.values)))
        owned = [
            {int(user) for part in parts[worker::workers] for user in ratings.users[part]}
            for worker in range(workers)
        ]
        assert sum(map(len, owned)) == ratings.user_count
        assert all(max(each) - min(each) == len(each) - 1 for each in owned)
        sizes = [sum(map(len, parts[worker::workers])) for worker in range(workers)]
        assert max(sizes) < 1.2 * min(sizes)


def test_an_order_for_more_workers_than_there_is_to_do_has_empty_parts():
    ratings = planted(12, 10)
    parts = BlockOrder(ratings.users, ratings.items, 9, seed=1)(np.random.default_rng(0))
    assert len(parts) == 81
    assert sorted(np.concatenate(parts)) == list(range(len(ratings.values)))
    for worker in range(9):
        owned = {int(user) for part in parts[worker::9] for user in ratings.users[part]}
        others = {
            int(u) for at, part in enumerate(parts) if at % 9 != worker for u in ratings.users[part]
        }
        assert not owned & others


@pytest.mark.parametrize("workers", [2, 3])
def test_parts_that_are_dealt_at_once_have_items_of_their_own(workers):
    ratings = planted(400, 160)
    parts = BlockOrder(ratings.users, ratings.items, workers, seed=1)(np.random.default_rng(0))
    for turn in range(0, workers**2, workers):
        items = [set(ratings.items[part].tolist()) for part in parts[turn : turn + workers]]
        assert sum(map(len, items)) == len(set.union(*items))
        assert all(max(each) - min(each) < 160 / workers * 1.3 for each in items)


def test_errors_are_those_of_predictions_that_are_cut_off():
    ratings = Ratings(
        np.array([0, 1, 0, 1], np.int32),
        np.array([0, 0, 1, 1], np.int32),
        np.array([1.0, 3.0, 5.0, 3.0], np.float32),
        2,
        2,
    )
    fold = Fold(ratings, np.array([0, 1]), np.array([2, 3]))
    assert fold.mean == 2.0
    tables = {
        "users": torch.tensor([[0.5, 2.0], [1.0, 3.0]]),
        "items": torch.tensor([[0.0, 0.0], [0.5, 2.0]]),
    }
    # 2 + 0.5 + 0.5 + 4 = 7, cut off at 5: an error of 0; 2 + 1 + 0.5 + 6 as well: one of 2.
    predicted = factorization.predict(tables, fold)
    assert predicted.tolist() == [7.0, 9.5]
    assert fold.rmse(predicted) == pytest.approx(np.sqrt((0 + 4) / 2))


def of_pairs(rows: torch.Tensor) -> torch.Tensor:
    """The product of the factors of each two rows, added up."""
    products = [rows[i, 1:] @ rows[j, 1:] for i in range(len(rows)) for j in range(i)]
    return torch.stack(products).sum()


def test_a_machines_gradient_is_that_of_half_the_squared_error():
    torch.manual_seed(0)
    table = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    of_sample = np.array([[8, 1, 3, 5]], np.int32)
    rows, grads = (np.full(4, -1),), (np.zeros((4, 6)),)
    samples = of_sample, np.array([0.7])
    squared = learn()((table.detach().numpy(),), samples, NativeState(0, rows, grads))
    chosen = table[[8, 1, 3, 5]]
    error = chosen[:, 0].sum() + of_pairs(chosen) - 0.7
    (error**2 / 2).backward()
    assert rows[0].tolist() == [8, 1, 3, 5]
    assert squared == pytest.approx(error.item() ** 2)
    assert table.grad is not None
    torch.testing.assert_close(torch.from_numpy(grads[0]), table.grad[[8, 1, 3, 5]])


def test_a_machine_predicts_all_pairs():
    fold = first_fold(planted(12, 9))
    shared = factorization_machine.make_parameters(fold, 5, seed=0)
    table = shared.views["features"]
    table[:, 0] = torch.arange(len(table)) / 10
    predicted = factorization_machine.predict(shared.views, fold)
    for place, of_sample in enumerate(features(fold)[fold.test][:5]):
        rows = table[torch.from_numpy(of_sample).long()]
        expected = float(fold.mean) + float(rows[:, 0].sum() + of_pairs(rows))
        assert predicted[place] == pytest.approx(expected, rel=1e-5)


def test_features_are_numbered_through_and_counts_are_of_the_training_part():
    users, items = np.array([0, 0, 0, 1], np.int32), np.array([0, 1, 1, 1], np.int32)
    ratings = Ratings(users, items, np.ones(4, np.float32), 2, 2)
    found = features(Fold(ratings, np.array([0, 1]), np.array([2, 3])))
    # Two users, two items, ten tenths of each: of the users, 1 has fewer ratings than 0.
    assert found.tolist() == [[0, 2, 9, 14], [0, 3, 9, 19], [0, 3, 9, 19], [1, 3, 4, 19]]


@pytest.mark.parametrize("model", [factorization, factorization_machine], ids=["mf", "fm"])
@pytest.mark.parametrize("policy", ["lock-free", "locked", "row-locked", "ordered"])
async def test_it_learns_what_was_planted(policy, model):
    fold = first_fold(planted())
    shared = model.make_parameters(fold, 16, seed=0)
    before = fold.rmse(model.predict(shared.views, fold))
    settings = SchedulerSettings(
        workers=2, policy=policy, hyperparameters=Hyperparameters(lr=0.01, alpha=0.99, eps=1e-3)
    )
    async with StreamScheduler(shared, settings) as scheduler:
        updates = 30 * len(fold.train)
        report = await scheduler.run(model.make_worker(shared, fold, 2, 0), updates=updates)
    assert report.updates == shared.version == updates
    assert fold.rmse(model.predict(shared.views, fold)) < before / 3


@pytest.mark.parametrize(
    ("target", "seconds"),
    [(0.96, 0.1), (0.95, 0.1), (0.945, 0.125), (0.94, 0.15), (0.93, 0.2), (0.92, None)],
)
def test_a_target_is_reached_between_two_copies(target, seconds):
    points = [Point(0.1, 1, 0.95), Point(0.2, 2, 0.93), Point(0.3, 3, 0.94)]
    reached = Training(0.3, points, None).reached(target)
    assert reached == (None if seconds is None else pytest.approx(seconds))


def write(ratings: Ratings, path: Path) -> Path:
    columns = ratings.users + 1, ratings.items + 1, ratings.values
    lines = [f"{user}\t{item}\t{value}\t0" for user, item, value in zip(*columns, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
def test_the_command_trains_each_fold_with_all(
    hogstream: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    data, json_file = write(planted(), tmp_path / "u.data"), tmp_path / "result.json"
    status, out, err = hogstream(
        *(
            "movielens",
            "--data",
            data,
            "--model",
            "fm",
            "--width",
            "16",
            "--epochs",
            "6",
            "--folds",
            "2",
        ),
        *("--repeats", "1", "--target", "0.5", "--weight-decay", "0.01", "--json", json_file),
    )
    assert status == 0, err
    result = decoded(json_file.read_bytes(), MovieLens)
    assert (result.settings.data, result.settings.users, result.settings.items) == (
        "u.data",
        80,
        50,
    )
    names = [run.name for run in result.results]
    assert names[:5] == ["lock-free", "locked", "row-locked", "ordered", "one alone"]
    for run in result.results[:5]:
        assert len(run.seconds.samples) == len(run.reached) == 2
        assert all(run.reached)
        assert run.curve[-1][1] == 6
        assert run.gains.keys() == {*names} - {run.name}
    assert result.results[4].staleness == 0
    said = " ".join(out.split())
    assert "Lock-free has reached 0.5" in said
    alone, ours = (np.array(result.results[place].seconds.samples) for place in (4, 0))
    longer = np.median(alone) / np.median(ours)
    assert f"For all 6 epochs one alone takes {longer:.2f} times as long" in said
    assert "ratings of 50 items by 80 users, in 2 folds, 1 time each" in said


@pytest.mark.slow
async def test_processes_with_torch_learn_what_was_planted():
    fold = first_fold(planted())
    model = torch_processes.Factors(fold, 8, seed=0)
    extra = {"samples": torch_processes.samples(fold), "weight_decay": 0.01}
    losses: list[float] = []
    async with ByHand(torch_processes.work, model, processes=1, extra=extra) as by_hand:
        report = await by_hand.run(updates=60, on_loss=lambda _, loss: losses.append(loss))
    assert (report.updates, len(losses)) == (60, 60)
    assert losses[-1] < losses[0] / 2


BAD: list[tuple[list[str], str]] = [
    (["--data", "nowhere"], "Path 'nowhere' does not exist"),
    (["--folds", "1"], "1 is not in the range x>=2"),
    (["--policy", "awaited"], "'awaited' is not one of"),
    (["--target", "0"], "must be a finite number > 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_refused(
    hogstream: Callable[..., tuple[int, str, str]], options: list[str], message: str
) -> None:
    status, _, err = hogstream("movielens", *options)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err


def test_data_that_is_none_is_refused(
    hogstream: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    path = tmp_path / "u.data"
    path.write_text("1 2 3\n")
    status, _, err = hogstream("movielens", "--data", path)
    assert status == 2
    assert f"{path}, line 1: must be in the format of one of" in err


def test_surprise_trains_on_the_same_fold() -> None:
    surprise: Any = pytest.importorskip("surprise")
    from hogstream.workloads.movielens import surprise as beside

    assert surprise
    fold = first_fold(planted())
    model = beside.svd(0).fit(beside.trainset(fold))
    test = fold.test[0]
    one = fold.ratings.users[test], fold.ratings.items[test]
    predicted = model.predict(*map(int, one)).est
    alone = fold._replace(test=fold.test[:1])
    assert alone.rmse(beside.predict(model, alone)) == pytest.approx(
        abs(predicted - fold.ratings.values[test])
    )
