"""``hogstream inspect``, and what it reads in the code of a kernel."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hogstream.cli.main import main
from hogstream.profiling.assembly.inspection import VARIANTS
from hogstream.profiling.assembly.parse import inspect_amd, inspect_nvidia

Command = Callable[..., tuple[int, str, str]]

ONE_KERNEL = ("--kernel", "float32 rmsprop inside coupled host-lr")

RESOURCES = "Function k:\n  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:448\n"
PTX = """
	ld.global.b64 { %rd18 }, [ %rd19 + 0 ];
	mad.lo.s64 	%rd25, %rd27, 24, %rd19;
	@%p3 bra 	$L__BB0_2;
	ld.global.v4.b32 { %r47, %r48, %r49, %r50 }, [ %rd50 + 0 ];
	ld.global.L1::evict_first.v2.b64 { %rd1, %rd2 }, [ %rd50 + 16 ];
	add.rn.f32 	%r27, %r25, %r23;
	sqrt.rn.f32 	%r39, %r37;
	div.rn.f32 	%r43, %r41, %r39;
	st.global.v4.b32 [ %rd9 + 0 ], { %r1, %r2, %r3, %r4 };
	st.shared.b32 [ %r9 + 0 ], %r1;
	ret;
$L__BB0_2:
	@%p4 ld.global.b32 { %r15 }, [ %rd59 + 0 ];
	@!%p5 ld.global.b16 { %rs1 }, [ %rd58 + 0 ];
	@%p4 st.global.b32 [ %rd59 + 0 ], { %r17 };
"""
AMDGCN = """
	v_add_f32_e32 v3, v4, v5
	v_pk_add_f32 v[4:5], v[6:7], v[8:9]
	v_fma_f32 v7, v8, v9, v10
    .sgpr_count:     40
    .sgpr_spill_count: 0
    .vgpr_count:     36
    .vgpr_spill_count: 0
"""
LLIR = """
  %46 = load <1 x i64>, ptr addrspace(1) %45, align 8, !dbg !36
  %68 = tail call <4 x float> @llvm.amdgcn.raw.ptr.buffer.load.v4f32(ptr addrspace(8) %66, i32 %67, i32 0, i32 0), !dbg !50
  %69 = fadd <2 x float> %68, %68, !dbg !51
  %70 = fadd float %1, %2, !dbg !51
  %71 = tail call float @llvm.sqrt.f32(float %70), !dbg !82
  %72 = fdiv float %70, %71, !dbg !84
  tail call void @llvm.amdgcn.raw.ptr.buffer.store.v2i32(<2 x i32> %73, ptr addrspace(8) %66, i32 %67, i32 0, i32 0), !dbg !70
  %153 = select i1 %151, i32 %152, i32 -2147483648, !dbg !87
  %154 = tail call i16 @llvm.amdgcn.raw.ptr.buffer.load.i16(ptr addrspace(8) %147, i32 %153, i32 0, i32 0), !dbg !87
  tail call void @llvm.amdgcn.raw.ptr.buffer.store.f32(float %171, ptr addrspace(8) %149, i32 %153, i32 0, i32 0), !dbg !97
declare float @llvm.amdgcn.raw.ptr.buffer.load.f32(ptr addrspace(8) readonly captures(none), i32, i32, i32 immarg) #4
declare float @llvm.fmuladd.f32(float, float, float) #4
"""  # noqa: E501 - as LLVM writes it


def test_reads_the_accesses_of_each_path_in_ptx():
    findings = inspect_nvidia(PTX, RESOURCES)
    assert findings.loads == {128: 2}
    assert findings.stores == {128: 1}
    assert findings.masked_loads == {32: 1, 16: 1}
    assert findings.masked_stores == {32: 1}


def test_sees_a_narrow_access_in_full_blocks():
    scalar = PTX.replace("st.global.v4.b32", "st.global.b32")
    assert inspect_nvidia(scalar, RESOURCES).stores == {32: 1}


@pytest.mark.parametrize("operation", ["fma.rn.f32", "fma.rn.f64", "mad.f32", "fma.rn.bf16x2"])
def test_sees_a_fused_operation_in_ptx(operation):
    assert inspect_nvidia(PTX, RESOURCES).fused == 0
    assert inspect_nvidia(f"{PTX}\t{operation} \t%r1, %r2, %r3, %r4;", RESOURCES).fused == 1


@pytest.mark.parametrize(
    "operation", ["sqrt.approx.f32", "div.full.f32", "sqrt.approx.ftz.f32", "add.ftz.f32"]
)
def test_sees_an_approximate_operation_in_ptx(operation):
    assert inspect_nvidia(PTX, RESOURCES).approximate == 0
    assert inspect_nvidia(f"{PTX}\t{operation} \t%r1, %r2;", RESOURCES).approximate == 1


def test_reads_the_registers_and_spills_of_nvidia():
    findings = inspect_nvidia(PTX, RESOURCES.replace("STACK:0", "STACK:8"))
    assert (findings.registers, findings.spills) == (40, 8)
    assert inspect_nvidia(PTX, RESOURCES).spills == 0
    with pytest.raises(ValueError, match="REG"):
        inspect_nvidia(PTX, "")


def test_reads_the_accesses_of_each_path_in_llvm():
    findings = inspect_amd(LLIR, AMDGCN)
    assert findings.loads == {128: 1}
    assert findings.stores == {64: 1}
    assert findings.masked_loads == {16: 1}
    assert findings.masked_stores == {32: 1}


def test_sees_a_fused_operation_of_amd():
    assert inspect_amd(LLIR, AMDGCN).fused == 0
    assert inspect_amd(LLIR, AMDGCN.replace("v_pk_add_f32", "v_pk_fma_f32")).fused == 1
    muladd = "%1 = call float @llvm.fmuladd.f32(float %1, float %2, float %3)"
    assert inspect_amd(LLIR + muladd, AMDGCN).fused == 1


@pytest.mark.parametrize(
    "operation",
    [
        "%2 = tail call float @llvm.amdgcn.sqrt.f32(float %1)",
        "%3 = fdiv contract float %1, %2",
        "%3 = fmul nnan afn <2 x float> %1, %2",
        "%3 = fdiv float %1, %2, !fpmath !9",
    ],
)
def test_sees_an_approximate_operation_of_amd(operation):
    assert inspect_amd(LLIR, AMDGCN).approximate == 0
    assert inspect_amd(LLIR + operation, AMDGCN).approximate == 1


def test_reads_the_registers_and_spills_of_amd():
    spilling = AMDGCN.replace("vgpr_spill_count: 0", "vgpr_spill_count: 3")
    assert inspect_amd(LLIR, spilling).registers == 36
    assert inspect_amd(LLIR, spilling).spills == 3
    assert (
        inspect_amd(LLIR, AMDGCN.replace("sgpr_spill_count: 0", "sgpr_spill_count: 2")).spills == 2
    )


def test_names_tell_variants_apart():
    updates, watched, finite = 2 * 4 * 2 * 2 * 2, 2 * 4, 2 * 4
    assert len({variant.name for variant in VARIANTS}) == updates + watched + finite


@pytest.fixture
def hogstream(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``hogstream inspect``; returns exit status, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hogstream", "inspect", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, captured.out, captured.err

    return run


@pytest.mark.slow
def test_inspect_prints_a_table_and_writes_what_it_says(hogstream: Command, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    json_file = tmp_path / "inspect.json"
    status, out, err = hogstream("--target", "gfx942", "--kernel", "float64", "--json", json_file)
    assert (status, err) == (0, "")
    assert f"wrote {json_file}" in out
    results = json.loads(json_file.read_text())["results"]
    assert len(results) == 2 * 2 * 2 * 2 + 2 + 2
    for kernel in ("rmsprop", "multi_tensor"):
        found = [result for result in results if result["kernel"] == kernel]
        low, high = (pick(result["registers"] for result in found) for pick in (min, max))
        assert re.search(rf"{kernel} +float64 +{low}(-{high})? +0 ", out)
        assert all(result["loads"] for result in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "emit", "pattern"),
    [
        ("sm_90", "ptx", r"\.target sm_90"),
        ("sm_90", "sass", r"MUFU\.RSQ"),
        ("gfx942", "amdgcn", r"v_add_f32"),
    ],
)
def test_inspect_emits_assembly(hogstream: Command, target: str, emit: str, pattern: str) -> None:
    pytest.importorskip("triton")
    status, out, _ = hogstream("--target", target, "--emit", emit, *ONE_KERNEL)
    assert status == 0
    assert re.findall("^// (.*host-lr)$", out, re.MULTILINE) == [
        "rmsprop float32 inside coupled host-lr"
    ]
    assert re.search(pattern, out)
    assert "Kernels for" not in out


def test_inspect_needs_triton(hogstream: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # it cannot be found
    message = "hogstream: Triton is not installed; pip install triton (Linux only)\n"
    assert hogstream("--target", "sm_90") == (2, "", message)


@pytest.mark.slow
def test_inspect_tells_which_tool_failed(
    hogstream: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    tool = tmp_path / "cuobjdump"
    tool.write_text("#!/bin/sh\necho release 13.1, V13.1.0\n[ $1 = --version ]\n")
    tool.chmod(0o755)
    monkeypatch.setenv("TRITON_CUOBJDUMP_PATH", str(tool))
    status, out, err = hogstream("--target", "sm_90", *ONE_KERNEL)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(f"cannot compile for sm_90: .*{tool}.* non-zero exit status 1", err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--target'. Choose from: sm_80, sm_90, sm_100, gfx942"),
        (["--target", "sm_1"], "'--target': 'sm_1' is not one of"),
        (["--target", "sm_90", "--emit", "llir"], "'--emit': 'llir' is not one of"),
        (
            ["--target", "sm_90", "--emit", "amdgcn"],
            "'--emit': sm_90 has ptx and sass, got 'amdgcn'",
        ),
        (["--target", "gfx942", "--emit", "sass"], "'--emit': gfx942 has amdgcn, got 'sass'"),
        (["--target", "sm_90", "--kernel", "zap"], "'--kernel': must be words of .* got 'zap'"),
        (["--target", "sm_90", "--kernel", "coupled uncoupled"], "'--kernel': must be words"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_status_2(
    hogstream: Command, arguments: list[str], message: str
) -> None:
    status, out, err = hogstream(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err), err
