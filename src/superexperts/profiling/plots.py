"""Pictures of a profile, for the column of a paper and for the report.

Suffix of the arrays' names: L decoder layers (dense ones counted), C columns (routed experts, the shared one last).
Every function takes a `Theme`: the report shows the light or the dark one, depending on the reader's system.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, LogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from superexperts.core.parallel import parallel_map
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
    shorten,
)
from superexperts.profiling.criterion import considered, found_on, layers_below, peak, super_experts_of, threshold

__all__ = ["draw_pictures", "plot_corpora", "plot_heatmap", "plot_layers", "plot_top"]

MARKERS = "osD^vPX*"
"""There is one more marker than colours, so that a pair of both repeats only after 56 corpora."""


def draw_pictures(profile: Profile, folder: Path) -> list[str]:
    """Draws every picture of a profile as PNG and SVG into a folder; returns their names."""
    drawings: list[Callable[[], object]] = []
    drawn: list[Path] = []
    stems: set[str] = set()
    depth = profile.criterion_depth
    for name, corpus in profile.corpora.items():
        # Two files of the same name in different folders get pictures with different names.
        plain = "".join(letter if letter.isalnum() else "-" for letter in Path(name).name)
        numbered = (f"{plain}-{number}" for number in itertools.count(2))
        stem = next(stem for stem in itertools.chain([plain], numbered) if stem not in stems)
        stems.add(stem)
        chosen = [row.key for row in super_experts_of(profile, corpus)]
        heatmap, layers, top = (_both(folder, f"{kind}-{stem}") for kind in ("heatmap", "layers", "top"))
        drawings += [
            functools.partial(plot_heatmap, profile, name, chosen, heatmap, depth=depth, ring="super expert"),
            functools.partial(plot_layers, profile, name, chosen, layers, depth=depth),
            functools.partial(plot_top, profile, name, chosen, top),
        ]
        drawn += [*heatmap, *layers, *top]
    if len(profile.corpora) > 1:
        corpora = _both(folder, "corpora")
        drawings.append(functools.partial(plot_corpora, profile, _largest(profile, 12), corpora))
        drawn += corpora
    parallel_map(operator.call, drawings, worth=1)
    return [path.name for path in drawn]


def _both(folder: Path, stem: str) -> list[Path]:
    """The PNG and the SVG of a picture, which are drawn in one go."""
    return [folder / f"{stem}.{suffix}" for suffix in ("png", "svg")]


def _largest(profile: Profile, count: int) -> list[ExpertKey]:
    """The experts with the largest peaks on any corpus."""
    best: dict[ExpertKey, float] = {}
    for corpus in profile.corpora.values():
        for row in corpus.experts:
            best[row.key] = max(best.get(row.key, 0.0), peak(row, profile.statistic))
    return sorted(best, key=lambda key: (-best[key], key_order(key)))[:count]


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

    `chosen` experts are ringed and named; `ring` is their name in the legend. The suffix of each `path` decides between
    PNG and SVG. Layers without experts are hatched, and layers below `depth`, which the criterion leaves out, are pale.
    `width` is in inches; the default is a column for up to 24 experts, else a page. Returns the cells.
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
    """The largest peak of each layer over those of all its experts, and the two bounds of the criterion (log scale).

    `chosen` experts are ringed and named; the largest peak that was not chosen is named too. The suffix of each `path`
    decides between PNG and SVG. Returns the largest peak of each layer and the chosen experts as points.
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
        labelled = {row.key for row in largest.values()} | set(ringed)
        texts = [
            (float(layer), peaks[layer, expert], f"{key_name((layer, expert))}: {peaks[layer, expert]:.3g}")
            for layer, expert in sorted(labelled, key=key_order)
        ]
        return Spots(points=points_of(axes, texts))


def plot_top(
    profile: Profile,
    corpus: str,
    chosen: Sequence[ExpertKey],
    path: Path | Sequence[Path],
    count: int = 12,
    theme: Theme = LIGHT,
) -> None:
    """The `count` largest peaks as bars (log scale), `chosen` experts in the accent colour, and the bound."""
    section = profile.corpora[corpus]
    considered_rows = considered(section.experts, profile.num_layers, profile.criterion_depth)
    rows = sorted(considered_rows, key=lambda row: (-peak(row, profile.statistic), key_order(row.key)))[:count]
    rows = [row for row in rows if peak(row, profile.statistic) > 0]
    with figure_in(COLUMN, 0.95 + 0.17 * max(1, len(rows)), theme) as figure:
        axes = figure.add_subplot()
        peaks = [peak(row, profile.statistic) for row in rows]
        colours = [theme.accent if row.key in chosen else theme.gain for row in rows]
        bars = axes.barh(range(len(rows)), peaks, color=colours, height=0.68)
        over: Any = [withStroke(linewidth=2.2, foreground=theme.paper)]  # the bound, which a number may lie on
        axes.bar_label(
            bars, [f"{value:.4g}" for value in peaks], padding=2, fontsize=6.5, color=theme.ink, path_effects=over
        )
        axes.set_yticks(range(len(rows)), [key_name(row.key) for row in rows])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xscale("log")
        if peaks:
            bound = threshold([peak(row, profile.statistic) for row in considered_rows])
            axes.axvline(bound.value, color=theme.ink, lw=0.8, ls=(0, (4, 2)))
            low = min(peaks[-1], bound.value)
            axes.set_xlim(low / 2, peaks[0] * (peaks[0] / low) ** 0.25 * 1.6)
        _label_decades(axes)
        axes.set_xlabel("peak; dashed: the criterion's bound")
        put_title(axes, "Largest peaks of |down_proj output|", _source(profile, corpus, section), COLUMN)
        save(figure, path)


def plot_corpora(
    profile: Profile, keys: Sequence[ExpertKey], path: Path | Sequence[Path], theme: Theme = LIGHT
) -> None:
    """Whether corpora agree: the experts in `keys`, one row each, with a mark per corpus at its peak (log scale).

    A mark is filled if the expert is a super expert of that corpus by the paper's criterion. The names of experts that
    are super experts of any corpus have the accent colour.
    """
    found = found_on(profile)
    width = COLUMN if len(profile.corpora) <= 3 else PAGE
    with figure_in(width, 1.35 + 0.2 * max(1, len(keys)), theme) as figure:
        axes = figure.add_subplot()
        axes.grid(axis="y", color=theme.faint, lw=0.5)
        for place, (name, corpus) in enumerate(profile.corpora.items()):
            peaks = {row.key: peak(row, profile.statistic) for row in corpus.experts}
            rows = [row for row, key in enumerate(keys) if peaks[key] > 0]
            # Marks of corpora that agree would cover each other, so each is drawn a little below the one before.
            shift = (place - (len(profile.corpora) - 1) / 2) * 0.6 / max(1, len(profile.corpora))
            colour, marker = theme.lines[place % len(theme.lines)], MARKERS[place % len(MARKERS)]
            style: Any = {"ls": "none", "marker": marker, "ms": 3.6, "color": colour, "mew": 0.8}
            for filled in (True, False):
                some = [row for row in rows if (name in found.get(keys[row], ())) == filled]
                axes.plot(
                    [peaks[keys[row]] for row in some],
                    [row + shift for row in some],
                    mfc=colour if filled else "none",
                    label=shorten(Path(name).name, 24) if filled else None,
                    **style,
                )
        axes.set_yticks(range(len(keys)), [key_name(key) for key in keys])
        for label, key in zip(axes.get_yticklabels(), keys, strict=True):
            if key in found:
                label.set(color=theme.accent, fontweight="bold")
        axes.set_ylim(len(keys) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xscale("log")
        _label_decades(axes)
        axes.set_xlabel("peak |down_proj output|;\nfilled: a super expert of that corpus")
        figure.legend(loc="outside lower center", ncols=4 if width == PAGE else 3)
        put_title(axes, "The largest peaks, corpus by corpus", Path(profile.model).name, width)
        save(figure, path)


def _hatched(theme: Theme, corner: tuple[float, float], width: float, height: float, label: str = "") -> Rectangle:
    return Rectangle(corner, width, height, facecolor="none", edgecolor=theme.faint, hatch="/////", lw=0, label=label)


def _expert_ticks(axes: Axes, width: int, shared: bool, theme: Theme) -> None:
    """Puts the indices of routed experts below the axis and names the shared one above it, clear of the numbers."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if width / step <= 16)
    axes.set_xticks(range(0, width, step))
    if shared:
        place: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        style: Any = {"ha": "right", "fontsize": 7, "color": theme.muted}
        axes.annotate("shared", (width + 0.5, 1), xytext=(0, 4), **place, **style)


def _source(profile: Profile, corpus: str, section: CorpusProfile) -> str:
    return f"{Path(profile.model).name} on {Path(corpus).name}, {section.tokens:,} tokens"


def _label_decades(axes: Axes) -> None:
    """Puts numbers at the powers of ten of a log axis, and between them if there would be fewer than two."""
    low, high = axes.get_xlim()
    if high < 30 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
