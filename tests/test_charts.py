"""What a chart shows can be read: its labels do not overlap, and its legend covers nothing."""

import itertools

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from hstu_cli import charts
from hstu_cli.charts import Panel, Timeline

HISTORIES = (128, 256, 512, 1024, 2048, 4096)
DEFAULT_GRID = [f"{n * k // 32} of {n}" for n in HISTORIES for k in (0, 16, 24, 28, 30, 31)]
"""The labels of a panel of `bench-layer`'s default grid."""


@pytest.mark.parametrize(
    "labels",
    [
        DEFAULT_GRID,
        ["1 user", "2 users", "4 users", "8 users"],
        DEFAULT_GRID[:6],
        DEFAULT_GRID[-charts.MOST_LEVEL_LABELS :],
    ],
    ids=["default grid", "users", "one history", "the longest labels that are level"],
)
def test_labels_and_legend_cover_nothing(labels: list[str]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    heights = [float(i + 1) for i in range(len(labels))]
    names = ("native", "eager", "L20, published, bf16")
    panels = [
        Panel("Speed-up, 256 candidates, batch size 8", "x", labels, dict.fromkeys(names, heights), heights),
        Timeline("Memory", "MB", "ms", {"baseline": ([0, 1], [2, 3])}),
    ] * 2
    figure = charts._figure("title", panels)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    for axes in figure.axes:
        legend, area = axes.get_legend().get_window_extent(renderer), axes.get_window_extent(renderer)
        assert legend.x0 >= area.x1
        assert legend.x1 <= figure.bbox.x1
        assert area.width > 0.5 * figure.bbox.width / 2  # the bars keep most of the room
    for axes in figure.axes[::2]:
        ticks = axes.get_xticklabels()
        assert [tick.get_text() for tick in ticks] == labels
        for one, other in itertools.pairwise(ticks):
            assert _apart(one, other, renderer)


def _apart(one, other, renderer) -> bool:
    """Whether two labels, both turned by one angle about their middle, do not overlap."""
    from math import radians, sin

    height = min(_upright_height(tick, renderer) for tick in (one, other))
    distance = other.get_window_extent(renderer).x0 - one.get_window_extent(renderer).x0
    if one.get_rotation() == 0:
        return one.get_window_extent(renderer).x1 < other.get_window_extent(renderer).x0
    return distance * sin(radians(one.get_rotation())) >= height


def _upright_height(tick, renderer) -> float:
    """Of the label's letters, were it level."""
    angle = tick.get_rotation()
    tick.set_rotation(0)
    height = tick.get_window_extent(renderer).height
    tick.set_rotation(angle)
    return height
