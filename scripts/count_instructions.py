"""Counts the instructions of compiled CPU lanes under callgrind; run it as a script.

An exact number where a clock is too noisy: what a lane does for an update, and for each element of
it, as compiled for Haswell. It needs valgrind and a minute, most of which goes to importing torch.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"
SIZES = (1 << 6, 1 << 12)
UPDATES = (256, 512)


def main() -> None:
    """Prints both numbers."""
    with TemporaryDirectory() as folder:
        counts = iter(_counted(Path(folder)))
        per_update = []
        for _ in SIZES:
            few, many = next(counts), next(counts)
            per_update.append((many - few) / (UPDATES[1] - UPDATES[0]))
    per_element = (per_update[1] - per_update[0]) / (SIZES[1] - SIZES[0])
    print(f"{per_update[0] - per_element * SIZES[0]:.1f} instructions for each update")
    print(f"{per_element:.4f} instructions for each element")


def _counted(folder: Path) -> list[int]:
    """Instructions between the marks that ``run_updates`` makes, in its order."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(SUPPORT),
        "NUMBA_CPU_NAME": "haswell",  # valgrind knows no AVX-512
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(folder / "numba"),
    }
    itself = [sys.executable, "-W", "ignore", __file__, "run_updates"]
    # So that compiled code is in the cache: compiling it under valgrind takes minutes.
    subprocess.run(itself, env=environment, check=True)
    tool = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--dump-before=getppid"]
    file = folder / "counts"
    subprocess.run(
        [*tool, "--quiet", f"--callgrind-out-file={file}", *itself, "counted"],
        env=environment,
        check=True,
    )
    dumps = sorted(folder.glob("counts.*"), key=lambda path: int(path.suffix[1:]))
    totals = [re.findall(r"^totals: (\d+)", path.read_text("utf-8"), re.M) for path in dumps]
    return [int(total) for (total,) in totals[1::2]]  # each other is what lies between runs


async def run_updates(counted: bool) -> None:
    """Runs updates on a lane by hand, between two calls of ``getppid`` each time."""
    from lanes_by_hand import lanes_by_hand, updates_of

    for elements in SIZES:
        async with lanes_by_hand(depth=max(UPDATES), elements=elements) as lanes:
            (lane,) = lanes.lanes
            for number in (1, *UPDATES):  # the first loads what is compiled
                for update in updates_of(lanes, number):
                    lane.launch(update)
                if number == 1:
                    lanes.threads[0].run()
                    lanes._deliver_landed()
                    _count_from_here(counted)
                    continue
                os.getppid()
                lanes.threads[0].run()
                os.getppid()
                lanes._deliver_landed()


def _count_from_here(counted: bool) -> None:
    if counted:
        command = ["callgrind_control", "--instr=on", str(os.getpid())]
        subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run_updates"]:
        asyncio.run(run_updates(counted="counted" in sys.argv))
    else:
        main()
