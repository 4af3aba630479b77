"""Bars of a benchmark's rows as PNG or SVG, or with its tables and its record as one HTML page."""

import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hstu_cli.errors import InputError, RunError, UnavailableError, UsageError
from hstu_cli.report import FILE_WIDTH, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

SUFFIXES = (".png", ".svg", ".html")

MOST_LEVEL_LABELS = 8
"""With more of them, the labels of a panel stand upright and are small, so that none covers another."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: groups of bars, one of each series at each label; None leaves a gap. `limits` are marks above them."""

    title: str
    unit: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    limits: Sequence[float | None] | None = None


@dataclass(frozen=True, slots=True)
class Timeline:
    """One chart: values that change at moments and stay between them, by the name of the line: times and values."""

    title: str
    unit: str
    time_unit: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]


def check_plot(path: Path) -> None:
    """Refuse a plot that cannot be written, before the run: UsageError, UnavailableError or InputError."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: choose a name that ends with {', '.join(SUFFIXES)}.")
    if find_spec("matplotlib") is None:
        raise UnavailableError("--plot needs matplotlib: pip install 'hstu[plot]'.")
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"--plot {path} cannot be written: there is no such folder, or it is one.")


def write_plot(
    path: Path, title: str, panels: Sequence[Panel | Timeline], tables: Sequence["Table"], record: Mapping
) -> None:
    """Draw the panels into a file of the kind that its name asks for; RunError where it cannot be written."""
    figure = _figure(title, panels)
    try:
        if path.suffix.lower() == ".html":
            path.write_text(_page(title, figure, tables, record), encoding="utf-8")
        else:
            figure.savefig(path, dpi=150)
    except OSError as error:
        raise RunError(f"--plot {path} could not be written: {error.strerror or error}.") from error


def _figure(title: str, panels: Sequence[Panel | Timeline]) -> "Figure":
    """All panels, two in a row."""
    from matplotlib.figure import Figure

    columns = min(2, len(panels)) or 1
    rows = -(-len(panels) // columns) or 1
    figure = Figure(figsize=(7 * columns, 3.2 * rows + 0.6), layout="constrained")
    figure.suptitle(title)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        if isinstance(panel, Timeline):
            _draw_lines(axes, panel)
        else:
            _draw_bars(axes, panel)
        limits = " (dashed: limit)" if isinstance(panel, Panel) and panel.limits else ""
        axes.set_title(panel.title + limits, fontsize="medium")
        axes.set_ylabel(panel.unit)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))  # outside: it covers no bar and no limit
    return figure


def _draw_bars(axes: "Axes", panel: Panel) -> None:
    """Groups of bars, and the limits above them."""
    width = 0.8 / max(1, len(panel.series))
    for offset, (name, values) in enumerate(panel.series.items()):
        places = [i + offset * width for i, value in enumerate(values) if value is not None]
        axes.bar(places, [value for value in values if value is not None], width, label=name)
    centers = [i + (len(panel.series) - 1) * width / 2 for i in range(len(panel.labels))]
    for center, limit in zip(centers, panel.limits or (), strict=False):
        if limit is not None:
            axes.hlines(limit, center - 0.4, center + 0.4, colors="black", linestyles="dashed")
    many = len(panel.labels) > MOST_LEVEL_LABELS
    tilt = 90 if many else 30 if max(map(len, panel.labels), default=0) > 8 else 0
    axes.set_xticks(centers, panel.labels, rotation=tilt, fontsize="x-small" if many else None)


def _draw_lines(axes: "Axes", panel: Timeline) -> None:
    """One line of steps for each series."""
    for name, (times, values) in panel.series.items():
        axes.plot(times, values, drawstyle="steps-post", label=name, linewidth=1)
    axes.set_xlabel(panel.time_unit)
    axes.set_ylim(bottom=0)


def _page(title: str, figure: "Figure", tables: Sequence["Table"], record: Mapping[str, Any]) -> str:
    """One page without references to anything outside it."""
    from rich.console import Console

    drawing = io.StringIO()
    figure.savefig(drawing, format="svg")
    console = Console(record=True, file=io.StringIO(), width=FILE_WIDTH)
    for table in tables:
        console.print(table)
    text = console.export_html(inline_styles=True, code_format='<pre style="font-family:monospace">{code}</pre>')
    data = json.dumps(plain(record), ensure_ascii=False, indent=1)
    svg = drawing.getvalue()
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<body>\n{svg[svg.index('<svg') :]}\n{text}\n"
        f"<details><summary>The record</summary><pre>{html.escape(data)}</pre></details>\n</body></html>\n"
    )
