"""Words embedded: gradients, losses, what is learned and what the command says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

pytest.importorskip("numba")

from hogstream.profiling.results.embedding_schema import Embedding
from hogstream.profiling.results.files import decoded
from hogstream.scheduler import SchedulerSettings
from hogstream.scheduler.policies import COMPILED_POLICIES
from hogstream.scheduler.workers.native_steps import NativeState
from hogstream.workloads.embedding import Corpus, read_corpus
from hogstream.workloads.embedding import measure as job
from hogstream.workloads.embedding.corpus import windows_within
from hogstream.workloads.embedding.gensim import GENSIM, GENSIM_FILE
from hogstream.workloads.embedding.skip_gram import (
    HYPERPARAMETERS,
    HeldOut,
    make_parameters,
    make_worker,
    skip_gram,
)
from make_text import make_text


def test_the_gradient_is_that_of_the_loss():
    torch.manual_seed(0)
    words, contexts = (torch.randn(5, 6, dtype=torch.float64) for _ in range(2))
    for each in (words, contexts):
        each.requires_grad_()
    # Word 2 has words 1, 1 and 0 near it. Noise is 1, 2 and 0: each counts for the pairs whose
    # context it is not.
    tokens = np.array([1, 2, 1, 0], np.int32)
    firsts, lasts = np.zeros(4, np.int32), np.full(4, 4, np.int32)
    noise = np.roll(np.array([1, 2, 0, 3], np.int32), (2654435761 * 4 >> 32) + 3)
    rows = np.full(1, 7), np.full(9, 7)
    grads = np.full((1, 6), np.nan), np.full((9, 6), np.nan)
    tables = tuple(each.detach().numpy() for each in (words, contexts))
    samples = tokens, firsts, lasts, noise
    loss = skip_gram(3)(tables, samples, NativeState(1, rows, grads))
    scores = contexts @ words[2]
    wanted = -logsigmoid(scores[[1, 1, 0]]).sum()
    wanted -= (torch.tensor([1, 3, 2]) * logsigmoid(-scores[[1, 2, 0]])).sum()
    wanted.backward()
    assert rows[0].tolist() == [2]
    assert rows[1].tolist() == [1, 1, 0, 1, 2, 0, -1, -1, -1]
    assert loss == pytest.approx(wanted.item())
    made = torch.zeros(5, 6, dtype=torch.float64)
    made.index_add_(0, torch.from_numpy(rows[1][:6]), torch.from_numpy(grads[1][:6]))
    torch.testing.assert_close(made, contexts.grad)
    assert words.grad is not None
    torch.testing.assert_close(torch.from_numpy(grads[0][0]), words.grad[2])


@pytest.mark.parametrize("score", [-800.0, -30.0, 30.0, 800.0])
def test_the_loss_of_a_large_score_is_finite(score):
    tables = np.array([[1.0]]), np.array([[score], [score]])
    rows, grads = (np.zeros(1, int), np.zeros(3, int)), (np.zeros((1, 1)), np.zeros((3, 1)))
    samples = tuple(np.array(each, np.int32) for each in ([0, 0], [0, 0], [2, 2], [1, 1]))
    loss = skip_gram(1)(tables, samples, NativeState(0, rows, grads))
    # One of the two terms is 0, and so is its slope.
    assert rows[1].tolist() == [0, 1, -1]
    assert loss == pytest.approx(abs(score))
    assert grads[1][:2].ravel() == pytest.approx([-1, 0] if score < 0 else [0, 1], abs=1e-12)


def test_a_word_that_stands_alone_has_no_rows():
    tables = np.ones((2, 1)), np.ones((2, 1))
    rows, grads = (np.zeros(1, int), np.zeros(4, int)), (np.zeros((1, 1)), np.zeros((4, 1)))
    samples = tuple(np.array(each, np.int32) for each in ([0, 1], [0, 1], [1, 2], [1, 0]))
    assert skip_gram(2)(tables, samples, NativeState(0, rows, grads)) == 0
    assert [each.tolist() for each in rows] == [[-1], [-1] * 4]


def test_held_out_losses_are_those_of_the_paper():
    rng = np.random.default_rng(0)
    words, contexts = (rng.normal(size=(4, 3)).astype(np.float32) for _ in range(2))
    held_out = HeldOut(*(np.array(each, np.int32) for each in ([0, 3], [1, 2], [[2, -1], [0, 1]])))
    scores = torch.from_numpy(words @ contexts.T).double()
    wanted = -logsigmoid(scores[0, 1]) - logsigmoid(-scores[0, 2])
    wanted += -logsigmoid(scores[3, 2]) - logsigmoid(-scores[3, [0, 1]]).sum()
    assert held_out.loss(words, contexts) == pytest.approx(wanted.item() / 2)


def test_samples_take_noise_from_all_places():
    places = (np.arange(1000) * 2654435761 % 2**32) * 1000 >> 32
    noise = np.arange(1000, dtype=np.int32)
    windows = windows_within(np.full(1000, 1000, np.int32), np.array([1000]), 1, generator())
    tables = np.zeros((1001, 16), np.float32), np.zeros((1001, 16), np.float32)
    rows = np.zeros(1, np.int64), np.zeros(4, np.int64)
    grads = np.zeros((1, 16), np.float32), np.zeros((4, 16), np.float32)
    taken = []
    for sample in range(1, 999):
        skip_gram(2)(tables, (*windows, noise), NativeState(sample, rows, grads))
        taken.append(rows[1][2:].tolist())
    assert taken == ((places[1:999, None] + [2, 3]) % 1000).tolist()
    assert len(np.unique(taken)) > 800


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def test_pieces_of_the_text_come_each_once_and_in_another_order():
    tokens = np.zeros(20_000, np.int32)
    windows = windows_within(tokens, np.array([20_000]), 5, generator())
    shared = make_parameters(small_corpus(), 16, seed=0)
    worker = make_worker(shared, windows, tokens, 5, 5, seed=3)
    first, second = (np.concatenate(worker.epochs.take(0, 1, 20_000)) for _ in range(2))
    for order in (first, second):
        assert sorted(order) == list(range(20_000))
        assert 0 < (np.diff(order) != 1).sum() < 20
    assert not np.array_equal(first, second)


def small_corpus() -> Corpus:
    counts, tokens = np.array([3, 2]), np.array([0, 1, 0, 1, 0], np.int32)
    return Corpus(("a", "b"), counts, tokens, np.array([2, 5]))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    make_text(path, 20_000, vocabulary=200, topics=4)
    return path


def task_of(text: Path, **settings: Any) -> job.Task:
    task = job.Task(
        corpus=read_corpus(text, 1),
        data=text.name,
        width=16,
        window=5,
        negative=5,
        min_count=1,
        epochs=2,
        rounds=1,
        seed=0,
        workers=(1,),
        policies=("lock-free",),
    )
    return replace(task, **settings)


@pytest.mark.parametrize("policy", COMPILED_POLICIES)
async def test_every_policy_learns(text, policy):
    task = task_of(text)
    parts = job.Parts.of(task)
    settings = SchedulerSettings(workers=2, policy=policy, hyperparameters=HYPERPARAMETERS)
    training = await job.train(task, parts, settings, seed=0)
    untrained = make_parameters(task.corpus, task.width, seed=0).views
    before = parts.evaluated.loss(*(table.numpy() for table in untrained.values()))
    noise = (parts.evaluated.noise >= 0).sum(1).mean()
    assert before == pytest.approx(np.log(2) * (1 + noise))
    assert training.loss < before * 0.8


async def test_a_training_by_one_worker_is_repeated_by_its_seed(text):
    task = task_of(text)
    parts = job.Parts.of(task)
    settings = SchedulerSettings(workers=1, hyperparameters=HYPERPARAMETERS)
    first, again, other = [await job.train(task, parts, settings, seed) for seed in (4, 4, 5)]
    assert first.loss == again.loss != other.loss
    assert first.staleness == 0


async def test_words_of_a_topic_become_alike(text, monkeypatch):
    made = []

    def keep(*arguments: Any) -> Any:
        made.append(make_parameters(*arguments))
        return made[-1]

    monkeypatch.setattr(job, "make_parameters", keep)
    task = task_of(text, epochs=5)
    settings = SchedulerSettings(workers=2, hyperparameters=HYPERPARAMETERS)
    await job.train(task, job.Parts.of(task), settings, seed=0)
    vectors = made[0].views["words"].numpy()
    vectors = vectors - vectors.mean(0)  # what all have in common: it is no topic
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    topics = np.array([int(word[1:]) % 4 for word in task.corpus.words])
    alike = (vectors @ vectors.T)[~np.eye(len(vectors), dtype=bool)]
    same = (topics[:, None] == topics)[~np.eye(len(vectors), dtype=bool)]
    assert alike[same].mean() > alike[~same].mean() + 0.5


@pytest.mark.slow
def test_the_command_trains_all_in_turn(
    hogstream: Callable[..., tuple[int, str, str]], text: Path, tmp_path: Path
) -> None:
    json_file = tmp_path / "result.json"
    status, out, err = hogstream(
        *("embedding", text, "--workers", "1,2", "--epochs", "1", "--width", "16"),
        *("--rounds", "2", "--min-count", "3", "--json", json_file),
    )
    assert status == 0, err
    result = decoded(json_file.read_bytes(), Embedding)
    assert (result.settings.data, result.settings.min_count) == ("topics.txt", 3)
    assert result.settings.words == pytest.approx(0.98 * 20_000, rel=0.01)
    ours = [run for run in result.results if run.name in COMPILED_POLICIES]
    names = [name for name in COMPILED_POLICIES for _ in range(2)]
    assert [run.name for run in ours] == names
    assert [run.workers for run in ours] == [1, 2] * len(COMPILED_POLICIES)
    for run in ours:
        assert len(run.words_per_second.samples) == len(run.loss.samples) == 2
        assert run.gains.keys() >= {*COMPILED_POLICIES} - {run.name}
        assert run.speedup is not None
        assert run.loss.median < 6 * np.log(2)
    said = " ".join(out.split())
    assert "Lock-free with 2 workers, in multiples of the words per s with as many:" in said
    assert "1 epoch, 2 rounds, tables of 16 columns, a window of 5, 5 words of noise" in said


BAD: list[tuple[list[str], str]] = [
    ([], "FILE is missing: any text will do"),
    (["nowhere.txt"], "nowhere.txt: cannot be read: No such file or directory"),
    ([str(Path(__file__).parent)], "workloads: cannot be read: Is a directory"),
    ([str(Path(__file__)), "--window", "0"], "0 is not in the range x>=1"),
    ([str(Path(__file__)), "--policy", "awaited"], "'awaited' is not one of"),
    ([str(Path(__file__)), "--workers", "0"], "each must be an integer from 1 to"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_refused(
    hogstream: Callable[..., tuple[int, str, str]], options: list[str], message: str
) -> None:
    status, _, err = hogstream("embedding", *options)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have words, got none"),
        ("a b a b\n", "must have at least two sentences, one a line, to hold out one"),
        (
            "a\nb\na\nb\n",
            "the text is too short: what is held out has no two words near each other",
        ),
    ],
)
def test_texts_of_no_use_are_refused(
    hogstream: Callable[..., tuple[int, str, str]], tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(text)
    status, _, err = hogstream("embedding", path, "--min-count", "1")
    assert status == 2
    assert f"{path}: {message}" in err.splitlines()[-1]


async def test_sentences_of_one_word_train_nothing(text: Path) -> None:
    task = task_of(text)
    alone = replace(task.corpus, tokens=task.corpus.tokens[:3], ends=np.array([1, 2, 3]))
    parts = job.Parts.of(task)._replace(train=alone)
    training = await job.train(task, parts, SchedulerSettings(workers=1), seed=0)
    assert not training.staleness
    assert training.loss == pytest.approx(6 * np.log(2), rel=0.05)


def test_gensim_trains_on_the_same_text(text: Path) -> None:
    pytest.importorskip("gensim")
    task = task_of(text)
    parts = job.Parts.of(task)
    for name in (GENSIM, GENSIM_FILE):
        training = job.train_gensim(name, 1, 0, task, parts)
        assert training.seconds > 0
        assert training.loss < 6 * np.log(2)
