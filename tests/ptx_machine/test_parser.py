"""What is read of a text, and what is not."""

from __future__ import annotations

import pytest

from ptx_machine import ParseError, parse
from ptx_machine.syntax import SINK, Address, Literal, Name, Register, Variable, Vector

TEXT = """
// A comment; with {braces}
.version 9.4
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.global .align 1 .b8 unused[4] = {1, 2, 3, 4};
.visible .entry first(
    .param .u64 first_param_0, /* .u32 */
    .param .u64 .ptr .global .align 1 first_param_1
)
.reqntid 128, 2
{
    .reg .pred 	%p<3>;
    .reg .b32 %r<2>, %other;
    .shared .align 8 .b8 own[24];
    .loc 1 2 3, function_name $L__info_string0, inlined_at 1 82 15 // a;b
$L__tmp0:
    @!%p1 ld.global.v2.b32 { %r0, _ }, [ %r1 + -4 ];
    mov.b32 %r0, global_smem;
LAST: bra.uni
        $L__tmp0;
}
    .file 1 "a.py"
.section .debug_abbrev
{
.b8 1 // DW
}
.entry second() { ret; }
"""


def test_a_module():
    module = parse(TEXT)
    assert module.target == "sm_90a"
    first, second = module.kernels.values()
    assert (first.name, second.name) == ("first", "second")
    assert first.parameters == {"first_param_0": "u64", "first_param_1": "u64"}
    assert first.threads == (128, 2, 1)
    assert second.threads is None
    assert first.registers == {
        **{f"%p{index}": "pred" for index in range(3)},
        **dict.fromkeys(("%r0", "%r1", "%other"), "b32"),
    }
    assert first.shared == {"global_smem": Variable(None, 16), "own": Variable(24, 8)}
    assert first.labels == {"$L__tmp0": 0, "LAST": 2}
    load, move, branch = first.instructions
    assert (load.opcode, load.predicate, load.negated) == ("ld.global.v2.b32", "%p1", True)
    assert load.operands == (Vector((Register("%r0"), SINK)), Address(Register("%r1"), -4))
    assert load.line == TEXT[: TEXT.index("@!%p1")].count("\n") + 1
    assert move.operands == (Register("%r0"), Name("global_smem"))
    assert (branch.operands, branch.text) == ((Name("$L__tmp0"),), "bra.uni $L__tmp0")


@pytest.mark.parametrize("text", ["0x1F", "-3", "0f3F800000", "0dBFF0000000000000", "0x7632U"])
def test_literals(text):
    (kernel,) = parse(f".entry k() {{ mov.b32 %r0, {text}; }}").kernels.values()
    assert kernel.instructions[0].operands[1] == Literal(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n.func f() {}", "line 2: unknown directive: '.func"),
        (".const .b32 x;", "line 1: unknown directive: '.const .b32 x'"),
        (".entry k(.param .u64) { ret; }", "line 1: unknown parameter: '.param .u64'"),
        (".entry k() .pragma { ret; }", "line 1: unknown directive: '.pragma'"),
        (".entry k() {\n.local .b8 x[4];\nret; }", "line 2: unknown directive: '.local"),
        (".entry k() {\nret;\nADD 1; }", "line 3: no instruction: 'ADD 1'"),
        (".entry k() {\nret }", "line 2: no statement: 'ret'"),
        (".entry k() {\nret;", "line 1: a kernel without an end"),
        (".entry k() { mov.b32 %r0, a+b; }", r"line 1: no operand: 'a\+b'"),
        (".entry k() { mov.b32 {%r0, [x]}, a; }", "line 1: no operand: '\\[x\\]'"),
        (".entry k() { mov.b32 {%r0, x}, a; }", "line 1: no element of a vector: 'x'"),
        (".entry k() { .reg .b32 r0; }", "line 1: no register: 'r0'"),
    ],
)
def test_what_is_not_known_is_refused(text, message):
    with pytest.raises(ParseError, match=message):
        parse(text)
