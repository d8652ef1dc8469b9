"""The picture of a comparison.

Suffix of the array's name: L decoder layers, C columns (routed experts, the shared one last).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from superexperts.core.types import ExpertKey, key_name
from superexperts.plotting import COLUMN, LIGHT, PAGE, Theme, figure_in, put_names, put_title, save

__all__ = ["plot_changes"]

NAMED = 12
"""Experts are named in the picture up to this number."""


def plot_changes(
    changes: Mapping[ExpertKey, float | None],
    layers: int,
    sizes: Mapping[int, int],
    shared: Sequence[int],
    title: str,
    path: Path,
    theme: Theme = LIGHT,
) -> None:
    """Relative Frobenius norm of the change of each changed expert (log scale), one row per decoder layer.

    `changes`: None for an expert that is missing, reshaped or has no norm to compare with; `sizes`: number of routed
    experts of each MoE layer; `shared`: the layers with a shared expert. The suffix of `path` decides between PNG and
    SVG.
    """
    experts = max(sizes.values(), default=0)
    width = experts + bool(shared)
    norm_LC = np.full((layers, width), np.nan)
    for (layer, expert), value in changes.items():
        norm_LC[layer, experts if expert == "shared" else expert] = np.nan if value is None else value
    found_LC = np.ma.masked_where(~(norm_LC > 0), norm_LC)
    inches = COLUMN if width <= 24 else PAGE
    height = min(8.0, max(1.1, layers * (0.27 if layers <= 12 else 0.1))) + 1.15
    with figure_in(inches, height, theme) as figure:
        axes = figure.add_subplot()
        for layer in range(layers):
            here = sizes.get(layer, 0)
            spans = [(0, here)] * (here > 0) + [(experts, experts + 1)] * (layer in shared)
            for start, end in spans:
                place = (start - 0.5, layer - 0.5)
                axes.add_patch(Rectangle(place, end - start, 1, facecolor=theme.faint, lw=0, zorder=0.5))
        marks: list[Any] = [Patch(facecolor=theme.faint, label="identical")]
        extent = (-0.5, width - 0.5, layers - 0.5, -0.5)
        if found_LC.count():
            low, high = float(found_LC.min()), float(found_LC.max())
            image = axes.imshow(
                found_LC,
                cmap=LinearSegmentedColormap.from_list("changes", theme.scale[2:]),
                # A log scale from a number to itself has no width; matplotlib would fail on a single changed expert.
                norm=LogNorm(low, high if high > low else low * 1.1),
                extent=extent,
                aspect="auto",
                interpolation="none",
                zorder=1,
            )
            bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=max(12.0, height * 8), shrink=0.9)
            bar.outline.set_visible(False)
            bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            bar.ax.minorticks_off()
        lost = [key for key, value in changes.items() if value is None]
        for layer, expert in lost:
            x = experts if expert == "shared" else expert
            axes.add_patch(Rectangle((x - 0.5, layer - 0.5), 1, 1, facecolor=theme.accent, lw=0, zorder=1.5))
        if lost:
            marks.append(Patch(facecolor=theme.accent, label="missing or reshaped"))
        axes.set(xlim=extent[:2], ylim=extent[2:], xlabel="expert", ylabel="layer")
        axes.yaxis.set_major_locator(MaxNLocator(min(12, layers), integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True, steps=[1, 2, 5, 10]))
        if shared:
            axes.axvline(experts - 0.5, color=theme.paper, lw=1.5)
            axes.annotate(
                "shared", (width - 0.5, 1), xycoords=("data", "axes fraction"), xytext=(0, 4),
                textcoords="offset points", ha="right", fontsize=7, color=theme.muted,
            )  # fmt: skip
        put_title(axes, "Relative change of every expert", title, inches)
        figure.legend(handles=marks, loc="outside lower center", ncols=len(marks))
        named = list(changes) if len(changes) <= NAMED else []
        points = [(float(experts if expert == "shared" else expert), float(layer)) for layer, expert in named]
        put_names(axes, points, [key_name(key) for key in named], theme)
        save(figure, path)
