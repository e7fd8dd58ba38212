"""Threads that part and meet, barriers, shared and global memory, and what goes wrong there."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ptx_machine import (
    ExecutionError,
    GlobalMemory,
    Journal,
    Pretended,
    UnknownInstructionError,
    execute,
    race,
)
from ptx_machine.scalars import Array
from ptx_testing import launch, memory_of, program, run

#: Where this thread's word of the first array is, in %d0.
_OWN = "mad.wide.u32 %d0, %r31, 4, %d31;"


def words(count: int, value: int = 0) -> Array:
    return np.full(count, value, np.uint32)


# Threads that part


def test_a_predicate_is_for_some_threads():
    out = words(32, 7)
    run(
        f"""{_OWN}
        and.b32 %r0, %r31, 1;
        setp.eq.b32 %p0, %r0, 0;
        mov.u32 %r1, 1;
        @!%p0 mov.u32 %r1, 2;
        setp.lt.u32 %p1, %r31, 30;
        @%p1 st.global.b32 [%d0], %r1;""",
        out,
    )
    assert out.tolist() == [1, 2] * 15 + [7, 7]


def test_threads_that_part_meet_again():
    out = words(32)
    run(
        f"""{_OWN}
        setp.lt.u32 %p0, %r31, 10;
        @%p0 bra LESS;
        mov.u32 %r1, 100;
        bra.uni MEET;
    LESS:
        mov.u32 %r1, 200;
    MEET:
        add.s32 %r1, %r1, %r31;
        bar.sync 0;
        st.global.b32 [%d0], %r1;""",
        out,
    )
    assert out.tolist() == [200 + i for i in range(10)] + [100 + i for i in range(10, 32)]


def test_each_thread_loops_as_often_as_it_wants():
    out = words(32)
    run(
        f"""{_OWN}
        mov.u32 %r1, 0;
        mov.u32 %r2, 0;
    AGAIN:
        setp.ge.u32 %p0, %r2, %r31;
        @%p0 bra DONE;
        add.s32 %r2, %r2, 1;
        add.s32 %r1, %r1, %r2;
        bra AGAIN;
    DONE:
        st.global.b32 [%d0], %r1;""",
        out,
    )
    assert out.tolist() == [i * (i + 1) // 2 for i in range(32)]


def test_some_threads_return_before_others():
    out = words(64, 9)
    run(
        f"""{_OWN}
        setp.ge.u32 %p0, %r31, 40;
        @%p0 ret;
        bar.sync 0;
        st.global.b32 [%d0], %r31;""",
        out,
        threads=64,
    )
    assert out.tolist() == [*range(40), *[9] * 24]


# Barriers and shared memory

_REVERSED = f"""{_OWN}
    shl.b32 %r0, %r31, 2;
    mov.b32 %r1, dynamic;
    add.s32 %r2, %r1, %r0;
    st.shared.b32 [%r2], %r31;
    st.global.b32 [%d0], %r31;
    BARRIER
    sub.s32 %r3, %r1, %r0;
    ld.shared.b32 %r4, [%r3+252];
    st.global.b32 [%d0], %r4;"""


def _reversed_by_warps(barrier: str, seed: int) -> Array:
    out = words(64)
    made = program(_REVERSED.replace("BARRIER", barrier), threads=64)
    race([launch(made, [out])], memory_of([out]), seed)
    return out


def test_a_barrier_waits_for_all_warps():
    for seed in range(10):
        assert _reversed_by_warps("bar.sync 0;", seed).tolist() == list(range(63, -1, -1))


def test_without_the_barrier_warps_overtake_each_other():
    results = [_reversed_by_warps("", seed) for seed in range(10)]
    assert any((result == 0xA5A5A5A5).any() for result in results)


def test_blocks_have_shared_memory_of_their_own():
    out = words(4 * 32)
    run(
        """mad.lo.s32 %r0, %r30, 32, %r31;
        mad.wide.u32 %d0, %r0, 4, %d31;
        setp.eq.b32 %p0, %r31, 0;
        @%p0 st.shared.b32 [dynamic+16], %r30;
        bar.sync 0;
        ld.shared.b32 %r1, [dynamic+16];
        st.global.b32 [%d0], %r1;""",
        out,
        blocks=4,
    )
    assert out.tolist() == sorted([0, 1, 2, 3] * 32)


def test_threads_of_a_warp_must_meet_at_one_barrier():
    with pytest.raises(ExecutionError, match="one warp wait at different barriers"):
        run(
            """setp.lt.u32 %p0, %r31, 10;
            @%p0 bra LESS;
            bar.sync 0;
            bra DONE;
        LESS:
            bar.sync 0;
        DONE:"""
        )


# Memory


def test_vectors_are_loaded_and_stored_as_a_whole():
    source, out = np.arange(32 * 4, dtype=np.uint32), words(32 * 4)
    run(
        """mad.wide.u32 %d0, %r31, 16, %d31;
        mad.wide.u32 %d1, %r31, 16, %d30;
        ld.global.L1::evict_first.v4.b32 { %r0, _, %r2, %r3 }, [%d0 + 0];
        st.global.cs.v2.b32 [ %d1 + 8 ], { %r2, %r3 };
        st.global.v2.b32 [%d1], {%r0, 5};""",
        source,
        out,
    )
    assert out.reshape(32, 4).tolist() == [[4 * i, 5, 4 * i + 2, 4 * i + 3] for i in range(32)]


def test_narrow_loads_fill_wide_registers():
    source, out = np.full(32, -2, np.int8), np.zeros((32, 2), np.uint32)
    run(
        """cvt.u64.u32 %d2, %r31;
        add.s64 %d0, %d31, %d2;
        mad.wide.u32 %d1, %r31, 8, %d30;
        ld.global.s8 %r0, [%d0];
        ld.global.b8 %r1, [%d0];
        st.global.v2.b32 [%d1], {%r0, %r1};""",
        source,
        out,
    )
    assert out.tolist() == [[2**32 - 2, 254]] * 32


def test_registers_are_split_and_joined_from_the_lowest_part_on():
    out = words(32)
    run(
        f"""{_OWN}
        mov.b32 %r0, {{1, 2}};
        mov.b32 {{%h0, %h1}}, %r0;
        mov.b32 {{_, %h2}}, 0x30004;
        mov.b32 %r1, {{%h1, %h2}};
        st.global.b32 [%d0], %r1;""",
        out,
    )
    assert out.tolist() == [0x30002] * 32


#: Fills two matrices of shared memory with numbers in their order, and names their rows in %r4.
_MATRICES = f"""{_OWN}
    shl.b32 %r0, %r31, 2;
    mov.b32 %r1, dynamic;
    add.s32 %r2, %r1, %r0;
    shl.b32 %r5, %r31, 1;
    add.s32 %r6, %r5, 1;
    cvt.u16.u32 %h0, %r5;
    cvt.u16.u32 %h1, %r6;
    mov.b32 %r3, {{%h0, %h1}};
    st.shared.b32 [%r2], %r3;
    add.s32 %r7, %r3, 0x400040;
    st.shared.b32 [%r2+128], %r7;
    bar.sync 0;
    shl.b32 %r4, %r31, 4;
    and.b32 %r4, %r4, 255;
    add.s32 %r4, %r4, %r1;"""


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_a_warp_loads_matrices_by_rows_or_columns(trans):
    out = words(64)
    run(
        f"""{_MATRICES}
        ldmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 {{%r8, %r9}}, [%r4];
        st.global.b32 [%d0], %r8;
        st.global.b32 [%d0+128], %r9;""",
        out,
    )
    matrices = np.arange(128, dtype=np.uint16).reshape(2, 8, 8)
    expected = matrices.transpose(0, 2, 1) if trans else matrices
    assert out.view(np.uint16).tolist() == expected.reshape(-1).tolist()


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_a_warp_stores_what_it_loads(trans):
    out = words(64)
    run(
        f"""{_MATRICES}
        ldmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 {{%r8, %r9}}, [%r4];
        bar.sync 0;
        stmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 [%r4], {{%r9, %r8}};
        bar.sync 0;
        ld.shared.b32 %r10, [%r2];
        ld.shared.b32 %r11, [%r2+128];
        st.global.b32 [%d0], %r11;
        st.global.b32 [%d0+128], %r10;""",
        out,
    )
    assert out.view(np.uint16).tolist() == list(range(128))


# What the threads of a warp exchange


@pytest.mark.parametrize(
    ("kind", "told", "expected"),
    [
        ("bfly", "5", [lane ^ 5 for lane in range(32)]),
        ("idx", "7", [7] * 32),
        ("idx", "%r5", [(3 * lane) % 32 for lane in range(32)]),
    ],
)
def test_a_shuffle_gives_a_thread_what_another_has(kind, told, expected):
    out = words(64)
    run(
        f"""{_OWN}
        mul.lo.s32 %r5, %r31, 3;
        shfl.sync.{kind}.b32 %r0, %r31, {told}, 31, -1;
        st.global.b32 [%d0], %r0;""",
        out,
        threads=64,
    )
    assert out.tolist() == [*expected, *(32 + lane for lane in expected)]


@pytest.mark.parametrize(
    ("kind", "of_lower", "of_upper"),
    [("max.s32", 15, 47), ("max.u32", 2**32 - 1, 47), ("min.s32", -16, 16), ("add.s32", -16, 1008)],
)
def test_a_reduction_gives_a_warp_what_its_numbers_make(kind, of_lower, of_upper):
    out = words(64)
    run(
        f"""{_OWN}
        sub.s32 %r1, %r31, 16;
        mov.b32 %r2, -1;
        redux.sync.{kind} %r0, %r1, %r2;
        st.global.b32 [%d0], %r0;""",
        out,
        threads=64,
    )
    assert out.tolist() == [of_lower % 2**32] * 32 + [of_upper] * 32


def test_a_warp_exchanges_while_another_is_elsewhere():
    out = words(64)
    run(
        f"""{_OWN}
        setp.lt.u32 %p0, %r31, 32;
        @%p0 bra DONE;
        shfl.sync.bfly.b32 %r0, %r31, 1, 31, -1;
        st.global.b32 [%d0], %r0;
    DONE:""",
        out,
        threads=64,
    )
    assert out.tolist() == [0] * 32 + [thread ^ 1 for thread in range(32, 64)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "setp.lt.u32 %p0, %r31, 8; @%p0 shfl.sync.bfly.b32 %r0, %r31, 1, 31, -1;",
            "all threads of a warp must take part",
        ),
        (
            "redux.sync.max.s32 %r0, %r31, 255;",
            "the only members known are all threads of a warp",
        ),
        (
            "mov.b32 %r1, dynamic; setp.lt.u32 %p0, %r31, 8;"
            "@%p0 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r1];",
            "all threads of a warp must take part",
        ),
        (
            "mov.b32 %r1, dynamic; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r1+8];",
            "shared address 0x8 is not a multiple of 16",
        ),
        (
            "mad.wide.u32 %d0, %r31, 4, %d31; ld.global.b32 %r0, [%d0+4];",
            r"block 0, thread 31, line 16, 'ld.global.b32 %r0, \[%d0\+4\]': address 0x[0-9a-f]+ "
            r"\(that of a \+128 bytes\) is in no region: 4 bytes",
        ),
        (
            "mad.wide.u32 %d0, %r31, 4, %d31; setp.eq.b32 %p0, %r31, 9;"
            "@%p0 st.global.b32 [%d0+-40], %r31;",
            "thread 9, .*is in no region: 4 bytes",
        ),
        (
            "mad.wide.u32 %d0, %r31, 4, %d31; ld.global.v2.b32 {%r0, %r1}, [%d0];",
            "thread 1, .*is not a multiple of 8",
        ),
        ("mov.u64 %d0, 0; ld.global.b32 %r0, [%d0];", "address 0x0 is in no region"),
        ("ld.shared.b32 %r0, [dynamic+256];", "shared address 0x100 .* the 256 bytes"),
        ("ld.shared.b32 %r0, [dynamic+2];", "shared address 0x2 is not a multiple of 4"),
        ("add.s32 %r0, %r1, 1;", "register %r1 is read before it is written"),
        ("@%p0 add.s32 %r0, %r31, 1;", "thread 0, .*predicate has not been written"),
    ],
)
def test_what_goes_wrong_is_told(body, message):
    out = words(32)
    with pytest.raises(ExecutionError, match=message):
        run(body, out)


def test_a_part_that_was_never_written_may_be_joined_to_one_that_is_used():
    out = words(32)
    run(
        "mov.b64 %d0, {%r31, %r0}; mov.b64 {%r1, _}, %d0;"
        "mad.wide.u32 %d1, %r31, 4, %d31; st.global.b32 [%d1], %r1;",
        out,
    )
    assert out.tolist() == list(range(32))


def test_arrays_may_not_overlap():
    array = np.zeros(16, np.uint8)
    memory = GlobalMemory()
    memory.add("first", array[4:8])
    memory.add("after", array[8:])
    with pytest.raises(ValueError, match="none and first share addresses"):
        memory.add("none", array[:5])
    with pytest.raises(ValueError, match="an array must be contiguous"):
        memory.add("strided", array[::2])


def test_pretended_memory_holds_what_was_touched():
    size = 1 << 40
    memory = GlobalMemory()
    region = memory.pretend("huge", size, lambda offset: np.full(Pretended.PAGE, 3, np.uint8))
    made = program(
        """mul.wide.u32 %d0, %r31, 0x40000000;
        mad.lo.s64 %d0, %d0, 8, %d31;
        ld.global.b32 %r0, [%d0];
        add.s32 %r0, %r0, %r31;
        st.global.b32 [%d0], %r0;"""
    )
    first = launch(made, [], 1)._replace(arguments=[region.base])
    execute(first, memory)
    assert len(region.pages) == 32
    assert region.pages[5 * (1 << 33) // Pretended.PAGE].view(np.uint32)[0] == 0x03030308
    with pytest.raises(ExecutionError, match=re.escape(f"(that of huge +{size} bytes)")):
        execute(first._replace(arguments=[region.base + size - 31 * (1 << 33)]), memory)


# Atomic operations


@pytest.mark.parametrize(
    ("operation", "value", "start", "expected"),
    [
        ("add.u32", "%r31", 1, 1 + 31 * 32 // 2),
        ("min.s32", "-5", 3, 2**32 - 5),
        ("max.u32", "%r31", 3, 31),
        ("and.b32", "6", 3, 2),
        ("or.b32", "%r31", 0, 31),
        ("xor.b32", "1", 0, 0),
        ("exch.b32", "%r31", 0, 31),
        ("add.f32", "0f3F800000", 0, np.float32(32).view(np.uint32)),
    ],
)
def test_threads_of_a_warp_take_their_turns(operation, value, start, expected):
    out = words(1, start)
    run(f"mov.b32 %r0, {value}; red.global.gpu.relaxed.{operation} [%d31], %r0;", out)
    assert out[0] == expected


def test_an_atomic_operation_returns_what_was_there():
    counter, seen = words(1), words(64)
    made = program(
        """atom.global.gpu.acq_rel.add.u32 %r0, [%d31], 1;
        mad.wide.u32 %d0, %r0, 4, %d30;
        st.global.b32 [%d0], 1;""",
        parameters=2,
    )
    race([launch(made, [counter, seen], 2)], memory_of([counter, seen]), 0)
    assert counter[0] == 64
    assert seen.tolist() == [1] * 64


@pytest.mark.parametrize(("added", "writes"), [(0, [False]), (1, [False, True])])
def test_adding_nothing_is_a_read(added, writes):
    counter, journal = words(1, 7), Journal()
    memory = memory_of([counter])
    memory.region("a").observers.append(journal)
    made = program(
        f"""setp.eq.b32 %p0, %r31, 0;
        @%p0 atom.global.gpu.acquire.add.u32 %r0, [%d31], {added};"""
    )
    execute(launch(made, [counter]), memory)
    assert [event.writes for event in journal.events] == writes
    assert counter[0] == 7 + added


def test_a_lock_lets_one_in_at_a_time():
    """One thread of each warp takes a lock by compare-and-swap, and counts."""
    lock, count = words(1), words(1)
    made = program(
        """setp.ne.b32 %p0, %r31, 0;
        @%p0 ret;
    TRY:
        atom.global.gpu.acquire.cas.b32 %r0, [%d31], 0, 1;
        setp.ne.b32 %p1, %r0, 0;
        @%p1 bra TRY;
        ld.global.b32 %r1, [%d30];
        add.s32 %r1, %r1, 1;
        st.global.b32 [%d30], %r1;
        atom.global.gpu.release.exch.b32 %r2, [%d31], 0;""",
        parameters=2,
    )
    launches = [launch(made, [lock, count], 3, number) for number in range(4)]
    race(launches, memory_of([lock, count]), 5)
    assert count[0] == 12


# What is refused before anything runs


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("vote.sync.any.pred %p0, %p1, -1;", "line 16, .*vote.sync.any.pred: unknown instruction"),
        ("ld.global.nc.b32 %r0, [%d31];", "unknown qualifier 'nc'"),
        ("ld.b32 %r0, [%d31];", "it must say its space"),
        ("ld.global.release.b32 %r0, [%d31];", "a load cannot release"),
        ("st.global.acquire.b32 [%d31], %r0;", "a store cannot acquire"),
        ("ld.global.v4.b32 {%r0, %r1}, [%d31];", "4 elements are accessed, and 2 named"),
        ("ld.param.b32 %r0, [p0];", "p0 is not of 32 bits"),
        ("ld.param.b64 %d0, [q];", "no such parameter: q"),
        ("atom.global.add.s64 %d0, [%d31], 1;", "no add of s64 in global memory"),
        ("atom.global.cas.b32 %r0, [%d31], 1;", "takes 4 operands, got 3"),
        (
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1}, [dynamic];",
            "takes 4 registers",
        ),
        ("stmatrix.sync.aligned.m16n8.x1.shared.b8 [dynamic], {%r0};", "unknown qualifiers"),
        ("shfl.sync.up.b32 %r0, %r1, 1, 0, -1;", "unknown qualifiers"),
        ("shfl.sync.bfly.b32 %r0, %r1, 1, 0x1c1f, -1;", "those within a whole warp"),
        ("redux.sync.max.f32 %r0, %r1, -1;", "unknown qualifiers"),
        ("redux.sync.max.s32 %r0, %r1;", "takes 3 operands, got 2"),
        ("ld.global.b32 %r0;", "takes 2 operands, got 1"),
        ("add.s32 %r0, %d1, 1;", "%d1 has 64 bits, not the 32 needed"),
        ("add.s32 %r0, %q1, 1;", "no such register: %q1"),
        ("add.s32 5, %r1, 1;", "no register for a result"),
        ("add.s32 %r0, %r1;", "takes 2 operands and a result, got 1"),
        ("add.s32 %r0, %r1, other;", "no such operand here"),
        ("add.s32 %r0, %r1, 0f3F800000;", "0f3F800000 is no literal of type s32"),
        ("add.rn.f32 %r0, %r1, 1;", "1 is no literal of type f32"),
        ("mov.u32 %r0, %clock;", "no such register: %clock"),
        ("mov.b32 {%h0, %h1, %h2}, %r0;", "32 bits have no 3 parts"),
        ("bra NOWHERE;", "no such label"),
        ("bar.sync 1;", "the only barrier known is 0"),
    ],
)
def test_what_is_not_known_is_refused(body, message):
    with pytest.raises(UnknownInstructionError, match=message):
        program(body)


def test_a_launch_must_have_the_threads_that_the_kernel_requires():
    made = launch(program(""), [words(1)])
    with pytest.raises(ValueError, match=r"must be \(32, 1, 1\), .* got \(64, 1, 1\)"):
        execute(made._replace(threads=(64, 1, 1)), GlobalMemory())


def test_a_launch_must_have_the_arguments_that_the_kernel_takes():
    with pytest.raises(ValueError, match="arguments must be 1, got 2"):
        execute(launch(program(""), [words(1), words(1)]), GlobalMemory())
