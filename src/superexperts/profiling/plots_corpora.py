"""Pictures of the largest peaks: of one corpus as bars, of several corpora side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator

from superexperts.core.types import ExpertKey, Profile, key_name, key_order
from superexperts.plotting import COLUMN, LIGHT, PAGE, Theme, figure_in, put_title, save, shorten
from superexperts.profiling.criterion import considered, peak, threshold
from superexperts.profiling.stability import found_on

__all__ = ["plot_corpora", "plot_top"]

MARKERS = "osD^vPX*"
"""One more than there are colours, so that a pair of the two comes again only after 56 corpora."""


def plot_top(
    profile: Profile,
    corpus: str,
    chosen: Sequence[ExpertKey],
    path: Path | Sequence[Path],
    count: int = 12,
    theme: Theme = LIGHT,
) -> None:
    """The `count` largest peaks as bars (log scale), the `chosen` experts in the accent colour, and the two bounds."""
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
        source = f"{Path(profile.model).name} on {Path(corpus).name}, {section.tokens:,} tokens"
        put_title(axes, "Largest peaks of |down_proj output|", source, COLUMN)
        save(figure, path)


def plot_corpora(
    profile: Profile, keys: Sequence[ExpertKey], path: Path | Sequence[Path], theme: Theme = LIGHT
) -> None:
    """The experts in `keys`, a row each, with a mark per corpus at its peak (log scale): do the corpora agree?

    A mark is filled where the expert is a super expert of that corpus by the paper's criterion; those that are one of
    any corpus have their names in the accent colour.
    """
    found = found_on(profile)
    width = COLUMN if len(profile.corpora) <= 3 else PAGE
    with figure_in(width, 1.35 + 0.2 * max(1, len(keys)), theme) as figure:
        axes = figure.add_subplot()
        axes.grid(axis="y", color=theme.faint, lw=0.5)
        for place, (name, corpus) in enumerate(profile.corpora.items()):
            peaks = {row.key: peak(row, profile.statistic) for row in corpus.experts}
            rows = [row for row, key in enumerate(keys) if peaks[key] > 0]
            # Marks of several corpora that agree lie on each other: each a little below the one before.
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


def _label_decades(axes: Axes) -> None:
    """Numbers at powers of ten of a logarithmic axis, and between them where there would be hardly two."""
    low, high = axes.get_xlim()
    if high < 30 * low:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
