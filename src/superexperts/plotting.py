"""Shared by all pictures: colours, figures, labels that do not overlap, and saving."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from superexperts.core.errors import OutputError
from superexperts.core.runs import write_bytes

__all__ = [
    "COLUMN",
    "DARK",
    "LETTERS",
    "LIGHT",
    "PAGE",
    "Grid",
    "Spots",
    "Theme",
    "figure_in",
    "grid_of",
    "points_of",
    "put_names",
    "put_title",
    "save",
    "shorten",
]

COLUMN, PAGE = 3.4, 7.0  # inches: one column and the full width of a two-column paper
BESIDE = 0.6
"""Inches left of the axes, for the labels."""
LETTERS = ".letters.svg"
"""Ending of an SVG for a web page: text stays text instead of outlines, and raster parts have a lower resolution."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a picture. Marks are near the palette of Okabe and Ito, which colour-blind readers can distinguish,
    and dark enough for text (contrast of WCAG AA: 4.5 to 1 for text, 3 to 1 for lines)."""

    ink: str
    muted: str
    faint: str
    """Grid lines and shades."""
    paper: str
    accent: str
    """Super experts, and what lowers accuracy."""
    gain: str
    """What raises accuracy."""
    unreached: str
    """Experts that no token was routed to."""
    scale: tuple[str, ...]
    """The heatmap's colours from small to large, evenly rising in contrast to `paper`."""
    lines: tuple[str, ...]


LIGHT = Theme(
    ink="#1f1d1a",
    muted="#6b665e",
    faint="#dcd7cd",
    paper="#ffffff",
    accent="#c25500",
    gain="#0072b2",
    unreached="#e3d3b8",
    scale=("#eef3f6", "#cfe0ea", "#a3c6db", "#68a3c8", "#2f7bb0", "#0f5390", "#06285c"),
    lines=("#c25500", "#0072b2", "#009e73", "#cc79a7", "#b08900", "#7a4ea3", "#1f1d1a"),
)
DARK = Theme(
    ink="#ece8e1",
    muted="#a39d93",
    faint="#3a3f47",
    paper="#191c21",
    accent="#ff8a3d",
    gain="#5ab8f0",
    unreached="#54473a",
    scale=("#20282f", "#26404f", "#2a5d78", "#3583a5", "#5caeca", "#a5d8e2", "#f3fbf5"),
    lines=("#ff8a3d", "#5ab8f0", "#3ecfa0", "#e39cc6", "#e6c34a", "#9ad4f5", "#ece8e1"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid of cells of a picture, with a value for each."""

    box: tuple[float, float, float, float]
    """Left, top, width and height as fractions of the picture's width and height."""
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    """By row and column; None for an empty cell."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spots:
    """The parts of a picture that show a value on pointing."""

    grids: tuple[Grid, ...] = ()
    points: tuple[tuple[float, float, str], ...] = ()
    """Left and top as fractions of the picture's width and height, and the text to show."""


def grid_of(axes: Axes, rows: Sequence[str], columns: Sequence[str], values_RC: NDArray[np.float64]) -> Grid:
    """The axes of a drawn figure as a grid; `values_RC` [rows, columns] are rounded to three digits, nan is empty."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    box, whole = axes.get_window_extent(), figure.bbox
    place = (box.x0 / whole.width, 1 - box.y1 / whole.height, box.width / whole.width, box.height / whole.height)
    return Grid(
        box=cast(Any, tuple(round(float(value), 4) for value in place)),
        rows=tuple(rows),
        columns=tuple(columns),
        values=tuple(tuple(None if math.isnan(v) else float(f"{v:.3g}") for v in row) for row in values_RC.tolist()),
    )


def points_of(axes: Axes, points: Sequence[tuple[float, float, str]]) -> tuple[tuple[float, float, str], ...]:
    """(x, y, text) in data coordinates of a drawn figure's axes, converted to points of `Spots`."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    found = []
    for x, y, text in points:
        left, bottom = axes.transData.transform((x, y))
        found.append(
            (round(float(left / figure.bbox.width), 4), round(float(1 - bottom / figure.bbox.height), 4), text)
        )
    return tuple(found)


@contextmanager
def figure_in(width: float, height: float, theme: Theme) -> Iterator[Figure]:
    """A figure of this size in inches in the colours of the theme; matplotlib's settings change only in the block."""
    settings: Any = {
        "font.size": 7.5,
        "axes.labelsize": 7.5,
        "axes.titlesize": 8.5,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "legend.frameon": False,
        "legend.handlelength": 1.6,
        "text.color": theme.ink,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.muted,
        "axes.facecolor": "none",
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "hatch.linewidth": 0.6,
        "svg.hashsalt": "superexperts",  # makes the file reproducible
        "text.parse_math": False,  # names may contain a dollar sign
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor=theme.paper)
        yield figure


def save(figure: Figure, paths: Path | Sequence[Path]) -> None:
    """Renders in memory, then writes each file atomically, as PNG or SVG by its suffix (see `LETTERS`)."""
    for path in [paths] if isinstance(paths, Path) else paths:
        kind = path.suffix.removeprefix(".").lower()
        if kind not in ("png", "svg"):
            raise OutputError(f"{path.name}: pictures are .png or .svg, not {path.suffix!r}; choose one of the two")
        buffer = io.BytesIO()
        small = path.name.endswith(LETTERS)
        with mpl.rc_context({"svg.fonttype": "none" if small else "path"}):
            dpi = 140 if small else 200  # in an SVG only for the raster parts
            figure.savefig(buffer, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
        write_bytes(path, buffer.getvalue())
        figure.set_layout_engine(None)  # saves the second layout for another format; "none" would still draw twice


def put_title(axes: Axes, title: str, source: str, inches: float) -> None:
    axes.set_title(f"{title}\n", loc="left", fontsize=8.5, fontweight="bold")
    axes.annotate(
        shorten(source, int((inches - BESIDE) * 17)),
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 5),
        textcoords="offset points",
        fontsize=7,
        alpha=0.75,
    )


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def put_names(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    theme: Theme,
    quiet: Sequence[str] = (),
    avoid: Sequence[tuple[float, float]] = (),
) -> None:
    """Writes a name beside each point, in the place with the least overlap with rings, other names and `avoid`.

    Names in `quiet` are thin and grey. This fixes the layout, so nothing may be added to the figure afterwards.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    frame, unit = axes.get_window_extent(), figure.dpi / 72
    centres = [axes.transData.transform(point) for point in points]
    boxes = [Bbox.from_bounds(x - 5 * unit, y - 5 * unit, 10 * unit, 10 * unit) for x, y in centres]
    for x, y in (axes.transData.transform(point) for point in avoid):
        boxes.append(Bbox.from_bounds(x - unit, y - unit, 2 * unit, 2 * unit))
    sides = [(math.cos(turn), math.sin(turn)) for turn in (0, math.pi, math.pi / 2, -math.pi / 2, 0.8, 2.3, -0.8, -2.3)]
    for point, (x, y), name in zip(points, centres, names, strict=True):
        colour = theme.muted if name in quiet else theme.accent
        style: Any = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
        style |= {"fontweight": "normal" if name in quiet else "bold"}
        probe = axes.text(0, 0, name, **style)
        size = probe.get_window_extent()
        probe.remove()
        taken = np.array([box.extents for box in boxes])
        places: list[tuple[float, int, tuple[float, float], Bbox, bool]] = []
        for far in (7.0, 14.0, 22.0, 32.0, 44.0):
            for dx, dy in sides:
                shift_x = dx * (far * unit + size.width / 2)
                shift_y = dy * (far * unit + size.height / 2)
                left, bottom = x + shift_x - size.width / 2, y + shift_y - size.height / 2
                box = Bbox.from_bounds(left, bottom, size.width, size.height)
                outside = size.width * size.height - float(_overlaps(box, np.array([frame.extents])).sum())
                covered = float(_overlaps(box, taken).sum()) + 10 * outside
                # A name that is nearer to another ring would be taken for the name of that one.
                astray = any(_distance(box, other) < _distance(box, (x, y)) for other in centres)
                covered += 0.1 * astray * size.width * size.height
                places.append((covered, len(places), (shift_x / unit, shift_y / unit), box, astray))
        _, rank, shift, box, astray = min(places, key=lambda place: place[:2])
        text = axes.annotate(
            name,
            point,
            xytext=shift,
            textcoords="offset points",
            path_effects=[withStroke(linewidth=2.2, foreground=theme.paper)],
            annotation_clip=False,
            # a line connects the ring with a name that had to move away
            arrowprops={"arrowstyle": "-", "lw": 0.7, "color": colour, "shrinkA": 0, "shrinkB": 4}
            if rank > 7 or astray
            else None,
            **style,
        )
        text.set_in_layout(False)
        boxes.append(box)
    figure.set_layout_engine(None)  # names were placed in this layout; computing it again takes as long as drawing


def _distance(box: Bbox, point: Sequence[float] | NDArray[np.float64]) -> float:
    """Distance from a point to a box."""
    return math.hypot(max(box.x0 - point[0], 0, point[0] - box.x1), max(box.y0 - point[1], 0, point[1] - box.y1))


def _overlaps(box: Bbox, others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area of the overlap of a box with each of the others, given as rows of (left, bottom, right, top)."""
    sides = np.minimum(others[:, 2:], box.max) - np.maximum(others[:, :2], box.min)
    return cast(NDArray[np.float64], sides.clip(min=0).prod(1))
