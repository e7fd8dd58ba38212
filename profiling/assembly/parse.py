"""What the code of a compiled kernel says of its registers, memory accesses and arithmetic.

Arithmetic is judged where it still stands as it was asked for: in PTX, and in LLVM's language for
AMD. Below that a correctly rounded root or division is itself made of approximations and fused
multiply-adds (MUFU and FFMA in SASS, v_rsq and v_fma in AMD's instructions), and rightly so.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

#: How many accesses of each width, in bits.
Widths = dict[int, int]


@dataclass(frozen=True)
class Findings:
    """What one thread of a kernel takes and does.

    A kernel has two paths, one of which is taken: one for blocks that are full and aligned, one
    that masks each access. What is read before they part (tables, lr) is left out.

    Attributes:
        registers: On AMD, vector registers.
        spills: What does not fit them: bytes of stack on NVIDIA, registers on AMD.
        loads: Of global memory, in the path of full blocks.
        stores: Likewise.
        masked_loads: Of global memory, in the other path.
        masked_stores: Likewise.
        fused: Multiply-adds that are rounded once.
        approximate: Operations that are not correctly rounded, or that flush denormals to zero.
    """

    registers: int
    spills: int
    loads: Widths
    stores: Widths
    masked_loads: Widths
    masked_stores: Widths
    fused: int
    approximate: int


def inspect_nvidia(ptx: str, resources: str) -> Findings:
    """Reads a kernel for an NVIDIA device.

    Args:
        ptx: Its PTX.
        resources: What ``cuobjdump -res-usage`` says of its machine code.
    """
    return Findings(
        registers=_total(r"\bREG:(\d+)", resources),
        spills=_total(r"\b(?:STACK|LOCAL):(\d+)", resources),
        **_by_path(_ptx_accesses(ptx)),
        fused=len(re.findall(r"\b(?:fma|mad)\.\S*f(?:16|32|64)", ptx)),
        approximate=len(re.findall(r"\S*\.(?:approx|full|ftz)\b", ptx)),
    )


def inspect_amd(llir: str, amdgcn: str) -> Findings:
    """Reads a kernel for an AMD device.

    Args:
        llir: It in LLVM's language.
        amdgcn: Its instructions and metadata.
    """
    operations = re.findall(
        r"= (f(?:add|sub|mul|div)) ([a-z ]*?)(?:<(\d) x )?(half|float|double)\b", llir
    )
    # Fusing happens below LLVM's language. There each sum becomes an instruction: one that is
    # missing was fused. (Two of float32 may share one, in LLVM's language already.)
    sums = sum(
        int(lanes or 1) // (2 if lanes and kind == "float" else 1)
        for name, _, lanes, kind in operations
        if name in ("fadd", "fsub")
    )
    kept = len(re.findall(r"\bv_(?:pk_)?(?:add|sub|subrev)_f(?:32|64)", amdgcn))
    approximations = re.findall(r"!fpmath|call .*@llvm\.amdgcn\.(?:sqrt|rcp|fdiv)", llir)
    return Findings(
        registers=_total(r"\.vgpr_count:\s*(\d+)", amdgcn),
        spills=_total(r"\.[sv]gpr_spill_count:\s*(\d+)", amdgcn),
        **_by_path(_llvm_accesses(llir)),
        fused=max(0, sums - kept) + len(re.findall(r"call .*@llvm\.fmuladd", llir)),
        approximate=len(approximations) + sum(1 for _, flags, *_ in operations if flags),
    )


def _total(pattern: str, text: str) -> int:
    """The sum of the numbers that a pattern finds, at least one."""
    numbers = re.findall(pattern, text)
    if not numbers:  # 0 would pass for a good number
        raise ValueError(f"code must hold {pattern!r}")
    return sum(map(int, numbers))


# An access: whether it is masked, whether it is a load or a store, and its width in bits.
_Access = tuple[bool, str, int]


def _by_path(accesses: list[_Access]) -> dict[str, Widths]:
    def widths(masked: bool, kind: str) -> Widths:
        return dict(Counter(bits for *what, bits in accesses if what == [masked, kind]))

    return {
        "loads": widths(False, "load"),
        "stores": widths(False, "store"),
        "masked_loads": widths(True, "load"),
        "masked_stores": widths(True, "store"),
    }


def _ptx_accesses(ptx: str) -> list[_Access]:
    """Masked accesses carry a predicate; what has none before the first branch is of no path."""
    branch = re.search(r"@!?%p\d+\s+bra\b", ptx)
    parting = branch.start() if branch else 0
    pattern = r"(@!?%p\d+\s+)?\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\b"
    return [
        (
            bool(match[1]),
            {"ld": "load", "st": "store"}[match[2]],
            int(match[3] or 1) * int(match[4]),
        )
        for match in re.finditer(pattern, ptx)
        if match[1] or match.start() > parting
    ]


def _llvm_accesses(llir: str) -> list[_Access]:
    """An element that is masked out has an offset beyond the end of its buffer."""
    masked = set(re.findall(r"(%\S+) = select i1 .*, i32 -2147483648\b", llir))
    pattern = (
        r"@llvm\.amdgcn\.raw\.ptr\.buffer\.(load|store)\.(?:v(\d+))?[a-z]+(\d+)"
        r"\(.*?ptr addrspace\(8\) %\S+, i32 (%?\w+)"
    )
    return [
        (offset in masked, kind, int(count or 1) * int(bits))
        for kind, count, bits, offset in re.findall(pattern, llir)
    ]
