"""Pictures for a paper's column and for the report: rendered in memory through matplotlib's object interface.

Suffix of the arrays' names: L decoder layers (dense ones counted), C columns (routed experts, the shared one last).
Every function takes a `Theme`; the report shows the light or the dark one, as the reader's system asks for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, LogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from superexperts.core.types import CorpusProfile, ExpertKey, Profile, key_name, key_order
from superexperts.plotting import (
    COLUMN,
    LIGHT,
    PAGE,
    Spots,
    Theme,
    figure_in,
    grid_of,
    points_of,
    put_names,
    put_title,
    save,
)
from superexperts.profiling.criterion import considered, layers_below, peak, threshold

__all__ = ["plot_heatmap", "plot_layers"]


def plot_heatmap(
    profile: Profile,
    corpus: str,
    chosen: Sequence[ExpertKey],
    path: Path | Sequence[Path],
    depth: float = 0.75,
    width: float | None = None,
    theme: Theme = LIGHT,
    ring: str = "chosen",
) -> Spots:
    """Every expert's peak |down_proj output| (log scale): a row per decoder layer, under its true number.

    `chosen` experts are ringed and named, in the legend `ring`. PNG or SVG by the suffix of `path`, or several; layers
    without experts are hatched, and layers that the criterion leaves out for their `depth` are washed out. `width` is
    in inches; by default a column's up to 24 experts, else a page's. Returns the cells.
    """
    section = profile.corpora[corpus]
    routed = sorted({row.expert for row in section.experts if row.expert != "shared"}, key=int)
    shared = any(row.expert == "shared" for row in section.experts)
    experts = max(map(int, routed), default=-1) + 1
    layers = layers_below(profile.depth, profile.num_layers)  # the others were not run
    peak_LC = np.full((layers, experts + shared), np.nan)
    for row in section.experts:
        peak_LC[row.layer, experts if row.expert == "shared" else int(row.expert)] = peak(row, profile.statistic)
    reached_LC = np.ma.masked_where(~(peak_LC > 0), peak_LC)
    inches = width or (COLUMN if peak_LC.shape[1] <= 24 else PAGE)
    height = min(8.0, max(1.1, layers * (0.27 if layers <= 12 else 0.1))) + 1.15
    first_out = layers_below(depth, profile.num_layers)

    with figure_in(inches, height, theme) as figure:
        axes = figure.add_subplot()
        axes.set_facecolor(theme.paper)
        extent = (-0.5, peak_LC.shape[1] - 0.5, layers - 0.5, -0.5)
        marks: list[Any] = []
        for layer in np.flatnonzero(np.isnan(peak_LC).all(axis=1)):
            axes.add_patch(_hatched(theme, (extent[0], layer - 0.5), peak_LC.shape[1], 1))
        if np.isnan(peak_LC).all(axis=1).any():
            marks.append(_hatched(theme, (0, 0), 1, 1, label="no experts"))
        if (peak_LC == 0).any():
            unreached_LC = np.ma.masked_where(peak_LC != 0, np.ones_like(peak_LC))
            axes.imshow(
                unreached_LC, cmap=ListedColormap([theme.unreached]), extent=extent, aspect="auto", interpolation="none"
            )
            marks.append(Patch(facecolor=theme.unreached, label="no token"))
        if reached_LC.count():
            low, high = float(reached_LC.min()), float(reached_LC.max())
            norm = LogNorm(low, high if high > low else low * 1.1)
            image = axes.imshow(
                reached_LC,
                cmap=LinearSegmentedColormap.from_list("peaks", theme.scale),
                norm=norm,
                extent=extent,
                aspect="auto",
                interpolation="none",
            )
            bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=max(12.0, height * 8), shrink=0.9)
            bar.outline.set_visible(False)
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            bar.ax.minorticks_off()
        if first_out < layers:
            axes.add_patch(
                Rectangle((extent[0], first_out - 0.5), peak_LC.shape[1], 99999, color=theme.paper, alpha=0.55, lw=0)
            )
            axes.axhline(first_out - 0.5, color=theme.ink, lw=0.8, ls=(0, (4, 2)))
            marks.append(Line2D([], [], color=theme.ink, lw=0.8, ls=(0, (4, 2)), label=f"depth {depth:g}"))
        if shared:
            axes.axvline(experts - 0.5, color=theme.paper, lw=1.5)
        points = [(experts if expert == "shared" else expert, layer) for layer, expert in chosen]
        mark: Any = {"marker": "o", "mfc": "none", "mec": theme.accent, "mew": 1.4, "ms": 7.5, "ls": "none"}
        if points:
            for x, y in points:
                axes.plot(x, y, path_effects=[withStroke(linewidth=3, foreground=theme.paper)], clip_on=False, **mark)
            marks.insert(0, Line2D([], [], label=ring, **mark))
        axes.set(xlim=extent[:2], ylim=extent[2:], xlabel="expert", ylabel="layer")
        axes.yaxis.set_major_locator(MaxNLocator(min(12, layers), integer=True, steps=[1, 2, 5, 10]))
        _expert_ticks(axes, experts, shared, theme)
        put_title(axes, "Peak |down_proj output| of every expert", _source(profile, corpus, section), inches)
        if marks:
            figure.legend(handles=marks, loc="outside lower center", ncols=len(marks))
        put_names(axes, points, [key_name(key) for key in chosen], theme)
        save(figure, path)
        columns = [*(f"E{expert}" for expert in range(experts)), *(["shared"] * shared)]
        return Spots(grids=(grid_of(axes, [f"L{layer}" for layer in range(layers)], columns, peak_LC),))


def plot_layers(
    profile: Profile,
    corpus: str,
    chosen: Sequence[ExpertKey],
    path: Path | Sequence[Path],
    depth: float = 0.75,
    percentile: float = 99.5,
    ratio: float = 10.0,
    width: float | None = None,
    theme: Theme = LIGHT,
) -> Spots:
    """Each layer's largest peak over the peaks of all its experts, and the criterion's two bounds (log scale).

    `chosen` experts are ringed and named, and so is the largest peak that was not chosen. PNG or SVG by the suffix.
    Returns each layer's largest and the chosen ones as points.
    """
    section = profile.corpora[corpus]
    reached = [row for row in section.experts if peak(row, profile.statistic) > 0]
    rows = considered(section.experts, profile.num_layers, depth)
    count = layers_below(profile.depth, profile.num_layers)  # the others were not run
    first_out = layers_below(depth, profile.num_layers)
    inches = width or (COLUMN if count <= 16 else PAGE)
    with figure_in(inches, 2.75, theme) as figure:
        axes = figure.add_subplot()
        axes.grid(axis="y", color=theme.faint, lw=0.5)
        axes.set_axisbelow(True)
        axes.scatter(
            [row.layer for row in reached],
            [peak(row, profile.statistic) for row in reached],
            s=9,
            color=theme.muted,
            alpha=0.35,
            lw=0,
            rasterized=True,  # ten thousand experts are ten thousand elements of an SVG otherwise
        )
        tops = {
            row.layer: peak(row, profile.statistic)
            for row in sorted(reached, key=lambda row: peak(row, profile.statistic))
        }
        layers = sorted(tops)
        for start, end in itertools.pairwise(layers):
            if end == start + 1:  # a line never leads over a layer without experts
                axes.plot((start, end), (tops[start], tops[end]), color=theme.gain, lw=1.3)
        axes.plot(layers, [tops[layer] for layer in layers], "o", color=theme.gain, ms=2.8)
        axes.set_yscale("log")
        if first_out < count:
            axes.axvspan(first_out - 0.5, count - 0.5, color=theme.faint, alpha=0.45, lw=0)
        bounds: list[tuple[float, str]] = []
        if any(peak(row, profile.statistic) > 0 for row in rows):
            bound = threshold([peak(row, profile.statistic) for row in rows], percentile, ratio)
            bounds = sorted([(bound.ratio, f"max/{ratio:g}"), (bound.percentile, f"P{percentile:g}")])
        for (value, name), side in zip(bounds, ("top", "bottom"), strict=False):
            if value > 0:
                axes.axhline(value, color=theme.ink, lw=0.8, ls=(0, (4, 2)))
                place: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
                style: Any = {"va": side, "fontsize": 6.5, "linespacing": 0.95, "color": theme.ink}
                shift = (4, 0)  # so that the two never meet
                axes.annotate(f"{name}\n{value:.3g}", (1, value), xytext=shift, **place, **style)
        peaks = {row.key: peak(row, profile.statistic) for row in reached}
        ringed = [key for key in chosen if key in peaks]
        points = [(float(key[0]), peaks[key]) for key in ringed]
        for x, y in points:
            axes.plot(x, y, "o", mfc="none", mec=theme.accent, mew=1.4, ms=7.5, clip_on=False)
        axes.set(xlim=(-0.5, count - 0.5), xlabel="layer", ylabel="peak")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.12)  # room for the names
        axes.xaxis.set_major_locator(MaxNLocator(14, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        handles = [
            Line2D([], [], color=theme.gain, marker="o", ms=2.8, lw=1.3, label="layer's largest"),
            Line2D([], [], color=theme.muted, marker="o", ms=3, ls="none", alpha=0.5, label="each expert"),
        ]
        if first_out < count:
            handles.append(Patch(facecolor=theme.faint, alpha=0.6, label=f"past depth {depth:g}"))  # type: ignore[arg-type]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        put_title(axes, "Peak |down_proj output| by layer", _source(profile, corpus, section), inches)
        rest = [row for row in rows if row.key not in chosen and peak(row, profile.statistic) > 0]
        quiet = [max(rest, key=lambda row: peak(row, profile.statistic))] if rest else []
        points += [(float(row.layer), peak(row, profile.statistic)) for row in quiet]
        avoid = [(x, value) for value, _ in bounds if value > 0 for x in np.linspace(-0.5, count - 0.5, 80)]
        for start, end in itertools.pairwise(layers):
            between = np.geomspace(tops[start], tops[end], 12)
            avoid += zip(np.linspace(start, end, 12), between, strict=True)
        names = [key_name(key) for key in (*ringed, *(row.key for row in quiet))]
        put_names(axes, points, names, theme, quiet=[key_name(row.key) for row in quiet], avoid=avoid)
        save(figure, path)
        largest = {row.layer: row for row in sorted(reached, key=lambda row: peaks[row.key])}
        told = {row.key for row in largest.values()} | set(ringed)
        said = [
            (float(layer), peaks[layer, expert], f"{key_name((layer, expert))}: {peaks[layer, expert]:.3g}")
            for layer, expert in sorted(told, key=key_order)
        ]
        return Spots(points=points_of(axes, said))


def _hatched(theme: Theme, corner: tuple[float, float], width: float, height: float, label: str = "") -> Rectangle:
    return Rectangle(corner, width, height, facecolor="none", edgecolor=theme.faint, hatch="/////", lw=0, label=label)


def _expert_ticks(axes: Axes, width: int, shared: bool, theme: Theme) -> None:
    """Routed experts by index below; the shared one is named above its column, where it meets no number."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if width / step <= 16)
    axes.set_xticks(range(0, width, step))
    if shared:
        place: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        style: Any = {"ha": "right", "fontsize": 7, "color": theme.muted}
        axes.annotate("shared", (width + 0.5, 1), xytext=(0, 4), **place, **style)


def _source(profile: Profile, corpus: str, section: CorpusProfile) -> str:
    return f"{Path(profile.model).name} on {Path(corpus).name}, {section.tokens:,} tokens"
