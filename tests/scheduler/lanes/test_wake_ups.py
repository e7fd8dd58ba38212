"""Lanes and the event loop sleep while there is nothing to do: no wake-up is ever lost."""

from __future__ import annotations

import pytest

from interleavings import Program, StuckError, explore, functions_of

ONE_LANE = {
    "one at a time": Program([(0, 0), (0, 1), (0, 0), (0, 2)]),
    "all at once": Program([(0, 0)] * 3),
    # As one does who waits for an error, or for a place in the queue.
    "not for the low water": Program([*[(0, 0)] * 3, (0, 1), (0, 0)], low_water=2),
}
TWO_LANES = {
    "in turns": Program([(0, 0), (0, 1), (1, 0), (1, 1)], lanes=2),
    "beside each other": Program([(0, 0), (1, 0)], lanes=2),
    "one goes on": Program([(0, 0), (1, 0), (0, 1), (0, 0)], lanes=2),
    "ordered": Program([(0, 0), (1, 0)], lanes=2, ordered=True),
    "ordered, one goes on": Program([(0, 0), (1, 0), (0, 0)], lanes=2, ordered=True),
}
PROGRAMS = ONE_LANE | TWO_LANES


@pytest.mark.parametrize(
    "name", [*ONE_LANE, *(pytest.param(name, marks=pytest.mark.slow) for name in TWO_LANES)]
)
def test_every_update_is_delivered_and_every_thread_ends(name):
    assert explore(PROGRAMS[name], functions_of()) > 100


def later(line: str, than: str) -> list[tuple[str, str]]:
    """Moves a line of the source to after another."""
    return [(line, ""), (than, than + line)]


READ = "    os.read(self._event.reader, _SIGNAL_BYTES)\n"
LISTEN = "    native_loop.listen(self.settings.address)\n"
DELIVER = "        lane.deliver()\n"
LANDED = "    atomic_store(lane + WORD * LANDED, taken + 1)\n"
WAKE_OTHERS = "    pass_turn(row, thread, settings)\n    wake_loop(lane, settings)\n"
LAUNCHED = '    """\n    atomic_store(lane + WORD * LAUNCHED, launched)\n'
WAKE = "    wake(atomic_load(lane + WORD * LANE_THREAD))\n"
NEXT = "    atomic_store(settings + WORD * NEXT, following)\n"
WAKE_OWNER = "        wake(owner)  # in vain, if the ticket is not handed out yet\n"
LOOKS_AGAIN = [("    if not has_work(thread, settings):\n", "    if True:\n")]

#: Changes that lose a wake-up, by what is wrong then; and the program that shows it.
LOSSES = {
    "the loop listens before it reads its event": (later(READ, than=LISTEN), "one at a time"),
    "the loop listens after it has delivered": (later(LISTEN, than=DELIVER), "all at once"),
    "a lane wakes the loop before it has landed": (
        later(LANDED, than=WAKE_OTHERS),
        "one at a time",
    ),
    "a lane is woken before it has a row": (
        [(LAUNCHED + WAKE, LAUNCHED.replace("    atomic", WAKE + "    atomic"))],
        "one at a time",
    ),
    "a lane does not look for a row again": (LOOKS_AGAIN, "one at a time"),
    "a lane does not look for its turn again": (LOOKS_AGAIN, "ordered"),
    "the next in order is woken before its turn": (later(NEXT, than=WAKE_OWNER), "ordered"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_wake_up_would_be_found(loss):
    changes, program = LOSSES[loss]
    with pytest.raises(StuckError):
        explore(PROGRAMS[program], functions_of(*changes))
