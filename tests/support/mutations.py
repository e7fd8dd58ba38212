"""Faults in the lanes, made on purpose: seeds of the simulation must find each of them.

Each drops or moves one wait, reference, order or counter: in a copy of the packages, for compiled
code is kept by what files say, which a process of its own runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGES = ("kernels", "optim", "scheduler")
#: Seeds that a fault may take, and how long one of them may take, in seconds.
SEEDS, LIMIT = 2000, 10


class Mutation(NamedTuple):
    """A fault.

    Attributes:
        module: Of ``scheduler/lanes``, or wherever faults are made.
        changes: Texts that each are there once, and what comes in their place.
    """

    module: str
    changes: tuple[tuple[str, str], ...]


def changed(module: str, old: str, new: str = "") -> Mutation:
    """A fault of one change."""
    return Mutation(module, ((old, new),))


def _error_is_0(module: str, call: str) -> Mutation:
    """Drops a call of the driver's, which would have gone well."""
    return changed(module, f"error = {call}\n", "error = 0\n")


_COUNT = "    return error if error != 0 else count_on(lane, settings)\n"
_SETTLE = "            settle(lane, settings)\n"

MUTATIONS = {
    # Waits
    "a row does not wait for its gradient": _error_is_0(
        "cuda_launch", "wait_for(lane, made, settings)"
    ),
    "a row does not wait for its turn": _error_is_0(
        "cuda_launch", "wait_for(lane, atomic_load(last + WORD * LANE_EVENT), settings)"
    ),
    "a row does not wait for its lane's batch": changed(
        "cuda_launch",
        "    if error == 0 and tail != 0:\n",
        "    if error == 0 and tail < 0:\n",
    ),
    "a batch does not wait for its gradients": _error_is_0(
        "cuda_batch_launch", "wait_for(lane, atomic_load(events + WORD * index), settings)"
    ),
    "a batch waits for the gradient of its last lane": changed(
        "cuda", "sorted(group, key=lambda each: each.place)", "group"
    ),
    "a batch does not wait for its lanes": _error_is_0(
        "cuda_batch_launch", "follow_lane(lane, lane_of_batch(batch, index), settings)"
    ),
    "a batch does not wait for a batch before it": changed(
        "cuda_batch_launch", "    if tail != 0 and tail != lane:\n", "    if tail < 0:\n"
    ),
    "a batch does not wait for what a lane computes": changed(
        "cuda_batch_launch", " or atomic_load(other + WORD * COMPUTES)\n", "\n"
    ),
    "a batch does not wait for updates of a lane": changed(
        "cuda_batch_launch", "counter != atomic_load(other + WORD * NUMBER) or ", ""
    ),
    "lanes do not wait for a batch": changed(
        "cuda_batch_launch",
        "            atomic_store(other + WORD * TAIL, lane)\n",
        "            pass\n",
    ),
    "lanes do not wait for what was there before": changed(
        "cuda",
        "            self.lanes[-1].follow_current()  # which",
        "            # which",
    ),
    "a computation does not wait for its inputs": changed(
        "cuda", "        self.follow_current()\n        return", "        return"
    ),
    "nobody knows that a lane computes": changed(
        "cuda", "        self.words[rings.COMPUTES] = 1\n"
    ),
    "a row by itself waits for the default stream": changed(
        "cuda",
        "submit(self.address, self._launched, self._settings, event, maker)",
        "submit(self.address, self._launched, self._settings, event, 0)",
    ),
    "a row of a batch waits for the default stream": changed(
        "cuda", "record(self._settings, event, maker)", "record(self._settings, event, 0)"
    ),
    "the loop records no event": changed(
        "cuda_loop", "    notice(lane, settings)\n    batch", "    batch"
    ),
    "the loop records the event of another row": changed(
        "cuda_loop",
        "        launch = launch_of(lane, index)\n        made, batch",
        "        launch = launch_of(lane, index + 1)\n        made, batch",
    ),
    "a row that was recorded is recorded again": changed(
        "cuda_loop", "            atomic_store(launch + WORD * UNRECORDED, 0)\n"
    ),
    # Order
    "no row has its event recorded": changed(
        "cuda_launch",
        "        error = record_lane(lane, settings)\n        atomic_store(settings + WORD * LAST",
        "        atomic_store(settings + WORD * LAST",
    ),
    "no row is the last in order": changed(
        "cuda_launch",
        "        error = record_lane(lane, settings)\n"
        "        atomic_store(settings + WORD * LAST, lane)\n",
        "        error = record_lane(lane, settings)\n",
    ),
    "no batch has its event recorded": changed(
        "cuda_batch_launch",
        "    error = record_lane(lane, settings)\n    if error == 0 and atomic",
        "    error = 0\n    if error == 0 and atomic",
    ),
    "no batch is the last in order": changed(
        "cuda_batch_launch",
        "        atomic_store(settings + WORD * LAST, lane)\n    for index",
        "        pass\n    for index",
    ),
    "rows are launched out of turn": changed(
        "native_loop",
        "    return bool(atomic_load(settings + WORD * NEXT) =="
        " atomic_load(row + WORD * TICKET))\n",
        "    return True\n",
    ),
    "the turn is not passed on": changed(
        "native_loop", "    atomic_store(settings + WORD * NEXT, following)\n"
    ),
    "the turn is passed on by one too many": changed(
        "native_loop",
        "atomic_load(row + WORD * TICKET) + 1\n",
        "atomic_load(row + WORD * TICKET) + 2\n",
    ),
    "a lane does not wait for its batch": changed(
        "cuda_batch_launch", "    atomic_store(lane + WORD * WAITS, 1)\n"
    ),
    "a lane waits for its batch for ever": changed(
        "cuda_batch_launch", "    atomic_store(lane + WORD * WAITS, 0)\n"
    ),
    "a batch is launched without the others": changed(
        "cuda_batch_launch",
        "    if arrived == atomic_load(batch + WORD * BATCH_LANES):\n",
        "    if arrived:\n",
    ),
    "a graph has no order": changed(
        "cuda_graphs", "[last[branch]] if branch in last else []", "[]"
    ),
    "a graph does not look first": changed("cuda_graphs", "                after.append(looks)\n"),
    "a graph does not clear first": changed(
        "cuda_graphs", "elements, arguments, [cleared])", "elements, arguments, [])"
    ),
    "the counter is written before the update": Mutation(
        "cuda_launch",
        (
            (
                "    if error == 0:\n        found = ",
                "    if error == 0:\n        error = count_on(lane, settings)\n"
                "    if error == 0:\n        found = ",
            ),
            (f"WORD * LAST, lane)\n{_COUNT}", "WORD * LAST, lane)\n    return error\n"),
        ),
    ),
    "the counter is written before the batch": Mutation(
        "cuda_batch_launch",
        (
            (
                "    if error == 0:\n        error = driver(settings, LAUNCH_GRAPH,",
                "    if error == 0:\n        error = count_on(lane, settings)\n"
                "    if error == 0:\n        error = driver(settings, LAUNCH_GRAPH,",
            ),
            (
                f"        error = lead(lane, batch, settings)\n{_COUNT}",
                "        error = lead(lane, batch, settings)\n    return error\n",
            ),
        ),
    ),
    "the verdict is copied before the update": Mutation(
        "cuda_dense_update",
        (
            ("        error = fetch_verdict(lane, found, settings)\n", "        error = 0\n"),
            (
                "        error = clear_verdict(lane, settings)\n",
                "        error = clear_verdict(lane, settings)\n"
                "        error = fetch_verdict(lane, found, settings)\n",
            ),
        ),
    ),
    "the verdict of rows is copied before they are looked at": Mutation(
        "cuda_row_update",
        (
            (
                "    error = clear_verdict(lane, settings)\n    for part",
                "    error = clear_verdict(lane, settings)\n"
                "    fetch_verdict(lane, found, settings)\n    for part",
            ),
            (
                "    return error if error != 0 else fetch_verdict(lane, found, settings)\n\n\n"
                "@njit\ndef check_gradient",
                "    return error\n\n\n@njit\ndef check_gradient",
            ),
        ),
    ),
    "the verdict of a batch is not copied": changed(
        "cuda_batch_launch",
        "        error = driver(settings, COPY_TO_HOST, (found, verdicts, size, stream))\n",
        "        error = 0\n",
    ),
    "the verdict is not cleared": changed(
        "cuda_calls",
        "    return driver(settings, SET_MEMORY, (verdict, 0, 2, stream))\n",
        "    return 0\n",
    ),
    "all lanes have one verdict": changed(
        "cuda", "lanes.verdicts.address + WORD * index", "lanes.verdicts.address"
    ),
    # Counters
    "rows land one too early": changed(
        "cuda_loop",
        "atomic_load(launch + WORD * LANDS_WITH))\n",
        "atomic_load(launch + WORD * LANDS_WITH) - 1)\n",
    ),
    "a number is used again": changed(
        "cuda_launch", "        atomic_store(lane + WORD * NUMBER, number)\n", "        pass\n"
    ),
    "a batch's rows land with their own lane": changed(
        "cuda_batch_launch",
        "LANDS_ON, atomic_load(batch + WORD * BATCH_ON))\n",
        "LANDS_ON, lane)\n",
    ),
    "a row has landed before it is taken down": Mutation(
        "cuda_loop",
        (
            (
                "    land_row(lane, settings)\n",
                "    landed = atomic_load(lane + WORD * LANDED)\n"
                "    atomic_store(lane + WORD * LANDED, landed + 1)\n"
                "    wake_loop(lane, settings)\n"
                "    atomic_store(lane + WORD * LANDED, landed)\n"
                "    land_row(lane, settings)\n",
            ),
        ),
    ),
    "updates left out are counted": changed("rings", "1 if outcome == DONE else 0", "1"),
    "versions are not counted": changed("rings", "1 if outcome == DONE else 0", "0"),
    "a snapshot says it is newer": changed(
        "cuda_launch",
        "    atomic_store(row + WORD * STALENESS, version(settings))\n",
        "    atomic_store(row + WORD * STALENESS, version(settings) + 2)\n",
    ),
    # Locks
    "the lock is not held until the landing": changed(
        "cuda_loop",
        "        atomic_store(thread + WORD * HELD, rows_of(batch))\n",
        "        unlock(settings)\n",
    ),
    "the lock is not let go of": changed(
        "cuda_loop", "        if held == 1:\n            unlock(settings)\n"
    ),
    "rows are launched while others hold the lock": changed(
        "cuda_loop", "atomic_load(thread + WORD * HELD) or ", ""
    ),
    # Rows
    "rows are not locked": changed(
        "cuda_kernels", '            "LOCKED": self._locked,\n', '            "LOCKED": False,\n'
    ),
    "rows that are copied are not locked": changed(
        "cuda_kernels", '"BITS": bits, "LOCKED": self._locked, ', '"BITS": bits, "LOCKED": False, '
    ),
    "gradients of rows are not looked at": changed(
        "cuda_row_update",
        "    if atomic_load(kernel + WORD * FINITE_FUNCTION) == 0:\n",
        "    if True:\n",
    ),
    "the verdict on rows forbids nothing": changed(
        "cuda_row_update",
        "    set_argument(thread, place, verdict)\n",
        "    set_argument(thread, place, verdict + _SPARE)\n",
    ),
    "an update in flight does not hold its rows": changed(
        "compiled",
        "        self._in_flight.append(work)\n",
        "        self._in_flight.append(work)\n"
        "        if isinstance(work, Update) and isinstance(work.checked.table, RowTable):\n"
        "            work.grad = work.checked.table.parts = None\n",
    ),
    # Wake-ups
    "the thread is not woken for a row": changed(
        "cuda_launch", "    wake(atomic_load(lane + WORD * LANE_THREAD))\n"
    ),
    "the thread is not woken for a batch": changed(
        "native_loop", "    wake(atomic_load(lane + WORD * LANE_THREAD))\n"
    ),
    "the event loop is not woken": changed(
        "cuda_loop",
        "    atomic_store(lane + WORD * LANDED, landed + 1)\n    wake_loop(lane, settings)\n",
        "    atomic_store(lane + WORD * LANDED, landed + 1)\n",
    ),
    # Errors
    "an error at submission is lost": changed(
        "cuda_launch", "        error = atomic_load(launch + WORD * ERROR)\n", "        error = 0\n"
    ),
    "an error of a launch is lost": changed(
        "cuda_launch",
        "    atomic_store(launch + WORD * ERROR, error)\n"
        "    atomic_store(launch + WORD * LANDS_WITH",
        "    atomic_store(launch + WORD * LANDS_WITH",
    ),
    "an error of a batch is lost": changed(
        "cuda_batch_launch", "    atomic_store(batch + WORD * BATCH_ERROR, error)\n"
    ),
    "nobody looks whether the device has failed": changed(
        "cuda_loop", "                look_for_failure(lane, settings)\n", "                pass\n"
    ),
    "rows do not land when the device has failed": changed(
        "cuda_loop",
        "    if atomic_load(settings + WORD * FAILED):\n        return True\n",
    ),
    "a row that fails is not settled": changed(
        "cuda_launch",
        f"        error = enqueue_row(lane, row, launch, thread, settings)\n"
        f"        if error != 0:\n{_SETTLE}",
        "        error = enqueue_row(lane, row, launch, thread, settings)\n",
    ),
    "a batch that fails is not settled": changed(
        "cuda_batch_launch",
        f"        error = enqueue_batch(lane, batch, settings)\n        if error != 0:\n{_SETTLE}",
        "        error = enqueue_batch(lane, batch, settings)\n",
    ),
    "a graph that cannot be made fails nothing": changed(
        "cuda", "                each.lane.launch_next(error)\n", "                pass\n"
    ),
    "times that cannot be read stop the delivery": changed(
        "cuda",
        "        except CudaError:  # such as a device lost since",
        "        except OSError:  # such as a device lost since",
    ),
    # References
    "an update in flight does not hold its gradient": changed(
        "compiled",
        "        self._in_flight.append(work)\n",
        "        self._in_flight.append(work)\n"
        "        if isinstance(work, Update):\n"
        "            work.grad = None\n",
    ),
    "rows are delivered when they are launched": changed(
        "compiled",
        "native_loop.landed(self.address) - self",
        "self.words[rings.TAKEN] - self",
    ),
    "a graph in flight is destroyed": changed(
        "cuda_graphs", "        if self._in_flight:\n            return\n"
    ),
    "a graph is not counted as in flight": changed(
        "cuda_batches",
        "        graph.take()\n",
        "        graph.take()\n        graph._in_flight = 0\n",
    ),
    "a graph that is kept is destroyed": changed(
        "cuda_graphs", "        if self._dropped:\n", "        if not self._dropped:\n"
    ),
    "a batch in flight is used again": changed(
        "cuda", "each for each in batches if each.has_landed()", "each for each in batches"
    ),
    "a row remembers its batch": changed(
        "cuda_batch_launch", "    atomic_store(launch + WORD * BATCH, 0)\n"
    ),
    "a row remembers where its batch's verdict was": changed(
        "cuda_batch_launch",
        "    atomic_store(launch + WORD * FOUND, atomic_load(launch + WORD * FOUND_ALONE))\n",
    ),
    "a row keeps other hyperparameters": changed(
        "compiled",
        "work.hyperparameters is not self._hyperparameters",
        "self._hyperparameters is None",
    ),
    "pinned memory is not freed": changed(
        "cuda", "        self._closing.callback(self.pinned.free)\n"
    ),
    "a stream is destroyed": changed(
        "cuda_device",
        "        self._idle_streams.append(stream)\n",
        '        self.driver.call("cuStreamDestroy_v2", address(stream))\n',
    ),
}


class Caught(NamedTuple):
    """How a fault was found.

    Attributes:
        seeds: How many it took; None if none found it.
        by: What was seen.
    """

    seeds: int | None
    by: str


def run(name: str, seeds: int = SEEDS) -> Caught:
    """Runs seeds with a fault until one finds it.

    Raises:
        KeyError: If there is no such fault.
        ValueError: If it is none of the sources as they are.
    """
    with tempfile.TemporaryDirectory(prefix="hogstream-mutation-") as folder:
        copy_with(MUTATIONS[name], Path(folder, "hogstream"))
        program = Path(__file__).with_name("simulate.py")
        command = [sys.executable, str(program), "--seeds", f"{seeds}", "--limit", f"{LIMIT}"]
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return _caught(done.returncode, done.stdout + done.stderr)


def copy_with(
    mutation: Mutation,
    folder: Path,
    modules: str = "scheduler/lanes",
    packages: Sequence[str] = PACKAGES,
) -> None:
    """Copies packages, with a fault.

    Args:
        mutation: The fault.
        folder: Where to.
        modules: Where its module is.
        packages: Which to copy.

    Raises:
        ValueError: If it is none of the sources as they are.
    """
    for package in packages:
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    path = folder / modules / f"{mutation.module}.py"
    source = path.read_text("utf-8")
    for old, new in mutation.changes:
        if source.count(old) != 1:
            raise ValueError(f"{mutation.module} must have this once: {old!r}")
        source = source.replace(old, new)
    path.write_text(source, "utf-8")


def _caught(code: int, output: str) -> Caught:
    if code == 0:
        return Caught(None, "nothing")
    found = re.search(r"make simulate SEEDS=(\d+):", output)
    seeds = None if found is None else int(found[1]) + 1
    if "hangs for" in output:
        return Caught(seeds, "it hangs")
    if code < 0:
        return Caught(seeds, f"signal {-code}")
    told = re.search(r"^seed \d+: (.*)$", output, re.MULTILINE)
    return Caught(seeds, output[-300:] if told is None else told[1])


def main(names: list[str]) -> None:
    """Prints a table of faults, and how each was found; exits with 1 if one was not."""
    print("| Fault | Found by | Seeds |\n|---|---|---|")
    missed = 0
    for name in names or MUTATIONS:
        caught = run(name)
        missed += caught.seeds is None
        print(f"| {name} | {_brief(caught.by)} | {caught.seeds or '-'} |", flush=True)
    sys.exit(missed > 0)


def _brief(text: str) -> str:
    """A line of a message, without numbers."""
    text = text.replace("AssertionError(", "").strip("()'\"").split("\\n")[0]
    text = re.sub(r"\(operation \d+ of stream \d+\) |on stream \d+ ", "", text)
    return text[:110].replace("|", "/")


if __name__ == "__main__":
    main(sys.argv[1:])
