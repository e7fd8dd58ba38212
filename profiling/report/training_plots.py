"""What is drawn of trainings: loss and metric against time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes

from hogstream.profiling.report import drawing
from hogstream.profiling.report.drawing import DASHED, Looks, Plot
from hogstream.profiling.report.rows import target_text
from hogstream.profiling.results.schema import Train, TrainRun
from hogstream.profiling.wording import counted

_Point = tuple[float, float]


def losses(train: Train, looks: Looks) -> list[Plot]:
    """The loss of the first round, in decades; none if nobody told losses."""
    curves = _drawn({run.policy: _smoothed(run.losses) for run in train.results})
    heights = [y for curve in curves.values() for _, y in curve]

    def draw(axes: Axes) -> None:
        if min(heights) > 0:
            drawing.logarithmic(axes, "y", heights)
        _draw(axes, curves, looks)

    text = f"Loss against seconds, of the first round. {_reached(train)}"
    y = "of the first round, running mean"
    return [_plot("Loss", text, draw, y)] if curves else []


def metrics(train: Train, looks: Looks) -> list[Plot]:
    """The metric of the first round, and the target."""
    settings = train.settings
    heights = sorted(y for run in train.results for _, y in run.metrics)
    few = len(heights) // 10  # first steps towards it, which may be far away, are left out
    shown = heights[few:] if settings.higher_is_better else heights[: len(heights) - few]
    low, high = (end(*shown, settings.target, settings.target) for end in (min, max))
    curves = _drawn(
        {
            run.policy: [point for point in run.metrics if low <= point[1] <= high]
            for run in train.results
        }
    )

    def draw(axes: Axes) -> None:
        _draw(axes, curves, looks)
        axes.axhline(settings.target, **DASHED)
        room = 0.05 * (high - low) or 1.0
        axes.set_ylim(low - room, high + room)

    title = settings.metric[:1].upper() + settings.metric[1:]
    text = f"{title} against seconds, of the first round. {_reached(train)}"
    y = f"of the first round; dashed: the target, {settings.target:g}"
    return [_plot(title, text, draw, y)] if curves else []


def reached_text(run: TrainRun) -> str:
    """Who trained, and when the target was reached, if it was."""
    rounds = f"in {sum(run.reached)} of {counted(len(run.reached), 'round')}"
    if not run.mostly_reached:
        return f"{run.policy}: {rounds}"
    return f"{run.policy}: {run.seconds_to_target.median:.2f} s, {rounds}"


def _plot(title: str, text: str, draw: Callable[[Axes], None], y: str) -> Plot:
    return Plot(title, text, draw, x="seconds", y=y, width=520, height=300)


def _reached(train: Train) -> str:
    told = "; ".join(map(reached_text, train.results))
    return f"Reached {target_text(train)} (medians): {told}."


def _drawn(curves: Mapping[str, list[_Point]]) -> dict[str, list[_Point]]:
    return {policy: curve for policy, curve in curves.items() if curve}


def _draw(axes: Axes, curves: Mapping[str, list[_Point]], looks: Looks) -> None:
    axes.grid(True, axis="y")
    axes.set_xlim(0, max(x for curve in curves.values() for x, _ in curve) * 1.02 or 1)
    axes.locator_params(axis="x", nbins=6)
    for policy, curve in curves.items():
        look, every = looks[policy], max(1, len(curve) // 8)
        axes.plot([x for x, _ in curve], [y for _, y in curve], **look.line)
        for x, y in curve[every - 1 :: every]:
            drawing.mark(axes, x, y, look, f"{policy}: {y:.4g} after {x:.2f} s")


def _smoothed(points: Sequence[_Point]) -> list[_Point]:
    """Running means, over which single batches do not hide the course."""
    window = max(1, min(len(points) // 20, 10))
    return [
        (points[end - 1][0], sum(y for _, y in points[end - window : end]) / window)
        for end in range(window, len(points) + 1)
    ]
