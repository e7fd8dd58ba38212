"""Rows of a table, drawn from a Zipf distribution: as words, users and items are met."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class ZipfRows:
    """Draws rows of a table, of which the one of rank r comes in proportion to ``r**-exponent``.

    The table is finite, and so is the distribution: it is drawn from exactly, by a uniform number
    that is looked up in the sums of probabilities. The sums are in float64: of ten million rows
    they are right to 1e-9. Which row has which rank is a random permutation, so that the rows that
    are drawn often are no neighbours.

    Attributes:
        row_of_rank: int64, shape (rows,); the first is drawn most often.
    """

    def __init__(self, rows: int, exponent: float, generator: np.random.Generator) -> None:
        """Sums up and permutes: 16 bytes a row, and 8 more meanwhile.

        Args:
            rows: How many the table has, at least 1.
            exponent: At least 0, where all rows are as likely.
            generator: What the permutation, and then rows, are drawn from.
        """
        weights = np.arange(1, rows + 1, dtype=np.float64) ** -exponent
        self._same_row = float(np.square(weights).sum() / weights.sum() ** 2)
        self._sums = np.cumsum(weights, out=weights)
        self._generator = generator
        self.row_of_rank: npt.NDArray[np.int64] = generator.permutation(rows)

    @property
    def same_row(self) -> float:
        """The probability that two draws are of the same row: the sum of squared probabilities."""
        return self._same_row

    def draw(self, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
        """Rows, each drawn by itself: int64, of that shape."""
        # Below the last sum also when it is rounded, as what is drawn is below 1.
        drawn = self._generator.random(shape) * self._sums[-1]
        rows: npt.NDArray[np.int64] = self.row_of_rank[
            np.searchsorted(self._sums, drawn, side="right")
        ]
        return rows
