"""Which updates were lost in races: counts that the kernels keep beside a parameter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: The rows of ``RaceCounters.counts``.
LANDED, SURVIVED, OVERWRITTEN = range(3)


@dataclass(frozen=True, eq=False)
class RaceCounters:
    """Counts of what landed in each block of a flat parameter, and of what of it is lost.

    A kernel counts block by block, whatever else writes there at the same time:

    - LANDED: one more for each update, added atomically after the block has been written.
    - SURVIVED: the witness. It is read before the block is, and one more than was read is stored
      after the block has been: with no more protection than the parameter has. So an update that
      another overwrites, which had read the block before, takes its count with it.
    - OVERWRITTEN: for each update, how many others landed while it was under way.

    An update of ``blocks`` blocks counts as so many; one of some parts of the parameter, as many as
    each part has an element in. Numbers are exact when no update is under way;
    until then some may have been counted in one row and not yet in another.

    A block is counted as a whole. Its window, from the witness's read to its store, holds those of
    all its elements: if no windows overlapped, nothing was lost, but two updates whose windows did
    may have met in no element, or each may have kept some. The smaller the block, the closer.

    Attributes:
        elements: How many the parameter has.
        block: How many elements are counted together; the last block may have fewer.
        counts: int64, shape (3, blocks), contiguous, on the parameter's device. Kernels write it
            wherever it lies: it may be moved to shared memory, or come from a checkpoint.

    Raises:
        TypeError: If ``counts`` is not an int64 tensor.
        ValueError: If there are fewer than 0 elements or than 1 in a block, or ``counts`` has
            another shape or is not contiguous.
    """

    elements: int
    block: int
    counts: torch.Tensor

    def __post_init__(self) -> None:
        if self.elements < 0:
            raise ValueError(f"elements must be >= 0, got {self.elements!r}")
        if self.block < 1:
            raise ValueError(f"block must be >= 1, got {self.block!r}")
        if not isinstance(self.counts, torch.Tensor) or self.counts.dtype != torch.int64:
            kind = getattr(self.counts, "dtype", type(self.counts).__name__)
            raise TypeError(f"counts must be an int64 tensor, got {kind}")
        if self.counts.shape != (3, self.blocks) or not self.counts.is_contiguous():
            raise ValueError(
                f"counts must be contiguous and of shape {(3, self.blocks)}, "
                f"got {tuple(self.counts.shape)} with strides {self.counts.stride()}"
            )

    @classmethod
    def zeros(cls, elements: int, block: int, device: torch.device | str = "cpu") -> RaceCounters:
        """Counters of which none has counted yet.

        Args:
            elements: How many the parameter has.
            block: How many are counted together: as its ``Backend.race_block`` has it.
            device: Where the parameter is.

        Raises:
            ValueError: If there are fewer than 0 elements or than 1 in a block.
        """
        blocks = max(-(-elements // max(block, 1)), 0)
        return cls(elements, block, torch.zeros(3, blocks, dtype=torch.int64, device=device))

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return -(-self.elements // self.block)

    @property
    def landed(self) -> int:
        """How many updates of a block have landed."""
        return self._total(LANDED)

    @property
    def lost(self) -> int:
        """How many of those that landed are in the parameter no more.

        Each is counted once, however many overwrote it, and not at all if the update that
        overwrote it is itself lost to one that had read it.
        """
        landed, survived, _ = self.counts.sum(dim=1).tolist()
        return int(landed - survived)

    @property
    def overwritten(self) -> int:
        """How many pairs of updates of a block overlapped; never fewer than were lost."""
        return self._total(OVERWRITTEN)

    @property
    def lost_fraction(self) -> float | None:
        """The share of updates that were lost, or None if none has landed."""
        landed, survived, _ = self.counts.sum(dim=1).tolist()
        return (landed - survived) / landed if landed else None

    def _total(self, row: int) -> int:
        return int(self.counts[row].sum())
