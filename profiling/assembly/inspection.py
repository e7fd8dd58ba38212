"""What compiled kernels take and do, on devices that need not be here."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator
from dataclasses import asdict, dataclass
from itertools import product, starmap, zip_longest

from hogstream.kernels.operands import DTYPE_NAMES
from hogstream.profiling.assembly.parse import Findings, inspect_amd, inspect_nvidia
from hogstream.profiling.results.profile_schema import CompiledKernel

#: The code of one kernel, by stage of its compilation.
Code = dict[str, str]

#: Devices that kernels are compiled for, and the assembly that each has.
TARGETS = {
    "sm_80": ("ptx", "sass"),
    "sm_90": ("ptx", "sass"),
    "sm_100": ("ptx", "sass"),
    "gfx942": ("amdgcn",),
}

# What ``inspect_kernel`` reads, for an NVIDIA device or not.
_STAGES = {True: ("ptx", "resources"), False: ("llir", "amdgcn")}


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for.

    Attributes:
        kernel: ``rmsprop`` (one tensor) or ``multi_tensor``; these ``watched``, with race counters
            (one tensor only) and a verdict; ``finite`` or ``multi_tensor_finite``, which find it.
        dtype: Of parameters and gradients.
        eps_inside_sqrt: As in ``rmsprop_``; None, as what follows, if the kernel updates nothing.
        coupled: Whether weight decay goes through the gradient.
        centered: Whether there is a mean of gradients.
        momentum: Whether there is a momentum buffer.
        lr_in_momentum: Whether what goes into that has been multiplied by lr.
        lr_on_device: Whether the kernel reads lr from the device's memory.
    """

    kernel: str
    dtype: str
    eps_inside_sqrt: bool | None = None
    coupled: bool | None = None
    centered: bool | None = None
    momentum: bool | None = None
    lr_in_momentum: bool | None = None
    lr_on_device: bool | None = None

    @property
    def updates(self) -> bool:
        """Whether it is a kernel of the update."""
        return self.eps_inside_sqrt is not None

    @property
    def name(self) -> str:
        """Words, such as ``rmsprop float32 inside coupled uncentered plain host-lr``."""
        words = [self.kernel, self.dtype]
        if self.updates:
            words.append("inside" if self.eps_inside_sqrt else "outside")
            words.append("coupled" if self.coupled else "uncoupled")
            words.append("centered" if self.centered else "uncentered")
            if self.momentum:
                words.append("lr-in-momentum" if self.lr_in_momentum else "momentum")
            else:
                words.append("plain")
            words.append("device-lr" if self.lr_on_device else "host-lr")
        return " ".join(words)


_DTYPES = DTYPE_NAMES.values()

_BOTH = (True, False)
# With momentum or without, and where lr goes with it.
_MOMENTA = ((False, False), (True, False), (True, True))

#: All that an update may take, and of what watches it those that take the most registers.
VARIANTS = (
    *(
        Variant(kernel, dtype, inside, coupled, centered, *momentum, lr_on_device)
        for kernel, dtype in product(("rmsprop", "multi_tensor"), _DTYPES)
        for inside, coupled, centered in product(_BOTH, _BOTH, _BOTH)
        for momentum in _MOMENTA
        for lr_on_device in (False, True)
    ),
    *(
        Variant(kernel, dtype, True, True, centered, momentum, False, True)
        for kernel, dtype in product(("watched_rmsprop", "watched_multi_tensor"), _DTYPES)
        for centered, momentum in product(_BOTH, _BOTH)
    ),
    *starmap(Variant, product(("finite", "multi_tensor_finite"), _DTYPES)),
)


def variants_named(words: str) -> list[Variant]:
    """The variants whose names have all of these words; all variants, if there are none.

    Raises:
        ValueError: If no name has them all.
    """
    wanted = set(words.split())
    found = [variant for variant in VARIANTS if wanted <= set(variant.name.split())]
    if not found:
        columns = zip_longest(*(variant.name.split() for variant in VARIANTS))
        known = dict.fromkeys(word for column in columns for word in column if word is not None)
        raise ValueError(f"must be words of one kernel's name ({', '.join(known)}), got {words!r}")
    return found


def compile_kernels(
    target: str, words: str = "", emit: str | None = None
) -> Generator[tuple[Variant, Code], None, None]:
    """Compiles kernels in another process, one in which Triton does not interpret.

    Args:
        target: One of ``TARGETS``.
        words: Which kernels, as in ``variants_named``.
        emit: Assembly that is wanted besides what ``inspect_kernel`` reads.

    Yields:
        Each kernel with its code, as soon as that is there.

    Raises:
        RuntimeError: If Triton, or one of its tools, is missing or fails.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed; pip install triton (Linux only)")
    stages = {*_STAGES[_is_nvidia(target)], *([emit] if emit else [])}
    command = [sys.executable, "-m", "hogstream.profiling.assembly.compile"]
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    environment["PYTHONSAFEPATH"] = "1"  # -m would import from the working directory
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [*command, target, ",".join(sorted(stages)), words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            yield from zip(variants_named(words), map(json.loads, process.stdout), strict=False)
        except BaseException:  # interrupted, or nobody wants the rest
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if process.wait() != 0:
            errors.seek(0)
            reason = errors.read().rstrip().rpartition("\n")[2]
            raise RuntimeError(f"cannot compile for {target}: {reason}")


def inspect_kernel(target: str, code: Code) -> Findings:
    """What the code of one kernel says."""
    if _is_nvidia(target):
        return inspect_nvidia(code["ptx"], code["resources"])
    return inspect_amd(code["llir"], code["amdgcn"])


def describe(target: str, variant: Variant, findings: Findings) -> CompiledKernel:
    """What one kernel takes and does, as a result says it."""
    return CompiledKernel(target=target, **asdict(variant), **asdict(findings))


def _is_nvidia(target: str) -> bool:
    return "ptx" in TARGETS[target]
