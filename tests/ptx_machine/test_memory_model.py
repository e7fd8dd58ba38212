"""What racing threads may see of each other, and what they may not."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ptx_machine import Journal, Lineage, Program, execute, race
from ptx_testing import launch, memory_of, program

SEEDS = 150


def outcomes(*bodies: str) -> Counter[tuple[int, ...]]:
    """What launches of one thread each that race leave at %d30, over seeds.

    At %d31 they have 64 words, and at %d30 four.
    """
    only = "setp.ne.b32 %p7, %r31, 0;\n@%p7 ret;\n"
    return outcomes_of([program(only + body, parameters=2) for body in bodies])


def outcomes_of(programs: list[Program]) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for seed in range(SEEDS):
        arrays = [np.zeros(64, np.uint32), np.zeros(4, np.uint32)]
        launches = [launch(made, arrays, 1, index) for index, made in enumerate(programs)]
        race(launches, memory_of(arrays), seed)
        found[tuple(arrays[1].tolist())] += 1
    return found


def passing(store: str, load: str) -> Counter[tuple[int, ...]]:
    """A message and then its flag are written; the flag and then the message are read."""
    return outcomes(
        f"st.global.b32 [%d31], 1; st.global{store}.b32 [%d31+64], 1;",
        f"ld.global{load}.b32 %r0, [%d31+64]; ld.global.b32 %r1, [%d31];"
        "st.global.b32 [%d30], %r0; st.global.b32 [%d30+4], %r1;",
    )


def test_who_acquires_sees_what_was_released():
    seen = passing(".gpu.release", ".gpu.acquire")
    assert (1, 0, 0, 0) not in seen
    assert {(0, 0, 0, 0), (1, 1, 0, 0)} <= seen.keys()


@pytest.mark.parametrize(
    ("store", "load"),
    [
        (".gpu.relaxed", ".gpu.acquire"),
        (".gpu.release", ".gpu.relaxed"),
        (".cta.release", ".gpu.acquire"),
        (".gpu.release", ".cta.acquire"),
        ("", ""),
    ],
)
def test_without_either_a_message_may_be_missed(store, load):
    assert (1, 0, 0, 0) in passing(store, load)


def test_fences_order_what_stands_on_either_side():
    body = (
        "st.global.b32 [%d31+{own}], 1; {fence} ld.global.b32 %r0, [%d31+{other}];"
        "st.global.b32 [%d30+{out}], %r0;"
    )

    def both(fence: str) -> Counter[tuple[int, ...]]:
        return outcomes(
            body.format(own=0, other=64, out=0, fence=fence),
            body.format(own=64, other=0, out=4, fence=fence),
        )

    assert (0, 0, 0, 0) in both("")
    assert (0, 0, 0, 0) not in both("fence.sc.gpu;")


def test_a_thread_sees_its_own_stores_and_no_element_go_back():
    seen = outcomes(
        "st.global.b32 [%d31], 1; ld.global.b32 %r0, [%d31]; st.global.b32 [%d30], %r0;"
        "st.global.b32 [%d31], 2;",
        "ld.global.b32 %r0, [%d31]; ld.global.b32 %r1, [%d31];"
        "st.global.b32 [%d30+4], %r0; st.global.b32 [%d30+8], %r1;",
    )
    assert {result[0] for result in seen} == {1}
    assert all(first <= second for _, first, second, _ in seen)
    assert any(first < second for _, first, second, _ in seen)


def blocks_of_two_warps(barrier: str) -> Counter[tuple[int, ...]]:
    """As ``passing``, but thread 32 handles the message, and thread 0 the flag."""
    own = "setp.eq.b32 %p0, %r31, 0; setp.eq.b32 %p1, %r31, 32;"
    bodies = (
        f"{own} @%p1 st.global.b32 [%d31], 1; {barrier}"
        "@%p0 st.global.gpu.release.b32 [%d31+64], 1;",
        f"{own} @%p0 ld.global.gpu.acquire.b32 %r0, [%d31+64];"
        f"@%p0 st.global.b32 [%d30], %r0; {barrier}"
        "@%p1 ld.global.b32 %r0, [%d31]; @%p1 st.global.b32 [%d30+4], %r0;",
    )
    programs = [program(body, parameters=2, threads=64) for body in bodies]
    return outcomes_of(programs)


def test_barriers_join_what_warps_have_written_and_acquired():
    assert (1, 0, 0, 0) not in blocks_of_two_warps("bar.sync 0;")
    assert (1, 0, 0, 0) in blocks_of_two_warps("")


#: Adds 1 to what each thread has at %d31, without any protection.
_ADD = """mad.wide.u32 %d0, %r31, 4, %d31;
    ld.global.b32 %r0, [%d0];
    add.s32 %r0, %r0, 1;
    st.global.b32 [%d0], %r0;"""


def test_lost_updates_are_known_to_the_element():
    made, lost = program(_ADD), 0
    for seed in range(30):
        counters = np.zeros(32, np.uint32)
        memory = memory_of([counters])
        lineage = Lineage(32, 4)
        memory.region("a").observers.append(lineage)
        race([launch(made, [counters], 1, number) for number in range(6)], memory, seed)
        np.testing.assert_array_equal(6 - lineage.lost(), counters)
        lost += lineage.lost().sum()
    assert lost > 0


def test_nothing_is_lost_one_after_another():
    made = program(_ADD)
    counters, lineage, journal = np.zeros(32, np.uint32), Lineage(32, 4), Journal()
    memory = memory_of([counters])
    memory.region("a").observers += [lineage, journal]
    for number in range(3):
        execute(launch(made, [counters], 1, number), memory)
    assert counters.tolist() == [3] * 32
    assert lineage.held.tolist() == [0b111] * 32
    assert [event.launch for event in journal.events if event.writes] == sorted([0, 1, 2] * 32)


def test_a_seed_gives_the_same_race_again():
    made = program(_ADD)

    def once(seed: int) -> list[int]:
        counters = np.zeros(32, np.uint32)
        race([launch(made, [counters], 1, n) for n in range(6)], memory_of([counters]), seed)
        return counters.tolist()

    assert [once(seed) for seed in range(8)] == [once(seed) for seed in range(8)]
    assert len({tuple(once(seed)) for seed in range(8)}) > 1
