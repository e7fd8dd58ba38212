"""What epsilon does to small gradients, inside of the root and outside, by our own optimizer."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes

from hogstream.optim import RMSpropAsync
from hogstream.profiling.report import drawing
from hogstream.profiling.report.drawing import DAY, LOOKS, Plot

PICTURE = "epsilon.svg"

_STEPS = 2000  # after which the mean square is that of the gradient, but for 2e-9 of it
_TOLD = (1e-6, 1e-5, 1e-4, 1e-3)  # gradients
_MARKED = 5e-6  # one that the picture marks
_LOOK_OF = {
    "outside of the root: torch": LOOKS[1],
    "inside: RMSpropAsync, pfrl, keras, optax": LOOKS[0],
}


def movement(gradients: npt.ArrayLike, *, inside: bool) -> npt.NDArray[np.float64]:
    """How far a step moves a parameter whose gradient stays the same, in multiples of ``lr``.

    Args:
        gradients: Positive.
        inside: Whether epsilon, 1e-8, is inside of the root.

    Returns:
        The shape of ``gradients``.
    """
    grad = torch.as_tensor(gradients, dtype=torch.float64)
    param = torch.zeros_like(grad, requires_grad=True)
    param.grad = grad
    optimizer = RMSpropAsync([param], lr=1.0, eps_inside_sqrt=inside, backend="numpy")
    for _ in range(_STEPS):
        before = param.detach().clone()
        optimizer.step()
    return (before - param.detach()).numpy()


def told(_: Path) -> list[str]:
    """What ``docs/guide/migrate.md`` shows: the picture, a sentence and a table."""
    outside, inside = (movement(_TOLD, inside=each) for each in (False, True))
    (one, other) = (movement(_MARKED, inside=each) for each in (False, True))
    sentence = (
        f"At a gradient of {_short(_MARKED)}, epsilon inside of the root moves a parameter "
        f"{one.item() / other.item():.0f} times less."
    )
    lines = [
        f"| {_short(gradient)} | {one:.3f} | {other:.3f} | {one / other:.1f}x |"
        for gradient, one, other in zip(_TOLD, outside, inside, strict=True)
    ]
    columns = "| gradient | step over `lr`, epsilon outside | inside | the one over the other |"
    picture = f"![Size of a step against that of the gradient](../results/{PICTURE})"
    return [picture, sentence, "\n".join([columns, "|---:|---:|---:|---:|", *lines])]


def _short(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-")


def draw(path: Path) -> None:
    """Saves the picture; the suffix says the format."""
    gradients = np.logspace(-8, 0, 65)
    curves = [movement(gradients, inside=each) for each in (False, True)]
    marked = [movement(_MARKED, inside=each).item() for each in (False, True)]

    def draw_on(axes: Axes) -> None:
        for values, each, look in zip(curves, marked, _LOOK_OF.values(), strict=True):
            axes.plot(gradients, values, **look.line)
            axes.plot(_MARKED, each, look.marker, color=DAY[look.color])
        axes.vlines(_MARKED, min(marked), max(marked), color=DAY["quiet"], linewidth=1)
        text = f"{marked[0] / marked[1]:.0f} times, at {_short(_MARKED)}  "
        axes.text(_MARKED, marked[1] * 3, text, ha="right", color=DAY["quiet"])
        drawing.logarithmic(axes, "x", gradients)
        drawing.logarithmic(axes, "y", np.concatenate(curves))

    plot = Plot(
        "A step, when a gradient stays the same",
        "",
        draw_on,
        x="size of the gradient",
        y="size of the step, in multiples of lr; eps=1e-8",
        width=620,
        height=300,
    )
    with matplotlib.rc_context({"svg.hashsalt": "epsilon"}):  # the same file each time
        drawing.save([plot], path, looks=_LOOK_OF)
