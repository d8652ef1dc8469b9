"""Pictures of a study: differences, learning curves, attention sinks, changes of weights.

The functions take plain values and no files of a study. Each returns the spots that show a value on pointing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import NDArray

from superexperts.core.types import ExpertKey, key_name
from superexperts.plotting import LIGHT, PAGE, Spots, Theme, figure_in, points_of, save, shorten

__all__ = [
    "ForestRow",
    "LearningCurve",
    "Mark",
    "WeightChanges",
    "plot_forest",
    "plot_sink_layers",
    "plot_training",
    "plot_weight_changes",
    "smoothed",
]

MINUS = "\N{MINUS SIGN}"
POINTS_PER_CURVE = 40
"""Points of a curve that show a value; more would be too close to each other to select."""
STROKES = 150
"""Line segments of a smoothed curve; more would not be visible."""
MARKED = 24
"""Up to this many changed experts are drawn as large marks; more are drawn as cells."""

Pairs = Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """A difference of two accuracies with its 95% interval, all in -1..1."""

    difference: float
    low: float
    high: float
    detected: bool
    """Whether it was detected."""
    runs: tuple[float, ...] = ()
    """The differences of single runs; empty for one run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForestRow:
    """A line of a forest plot."""

    title: str
    block: str
    """Rows of one block, such as all of pruning, share a scale."""
    marks: Mapping[str, Mark]
    """By panel."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """One run's losses as (step, loss)."""

    variant: str
    run: str
    """Such as `seed 1`."""
    train: Pairs
    evaluated: Pairs = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightChanges:
    """How much a variant changes the weights, as the mean over its runs."""

    title: str
    experts: Mapping[ExpertKey, float | None]
    """Relative norm of the change; None for an expert that is silenced."""
    others: Mapping[int, float]
    """Layer -> relative norm of the change of its attention."""


def plot_forest(rows: Sequence[ForestRow], path: Path | Sequence[Path], *, unit: str, theme: Theme = LIGHT) -> Spots:
    """Forest plot: differences in points with 95% intervals, single runs as small dots; a panel per name in the marks.

    A filled mark was detected. `unit` is written below, such as `difference to base, percentage points`. The rows of a
    block share one scale over all panels. PNG or SVG by the suffix.
    """
    panels = list(dict.fromkeys(panel for row in rows for panel in row.marks))
    blocks = {name: list(group) for name, group in itertools.groupby(rows, lambda row: row.block)}
    longest = max((len(row.title) for row in rows), default=0)
    height = 0.55 + 0.24 * len(rows) + 0.34 * len(blocks)
    points: list[tuple[float, float, str]] = []
    with figure_in(PAGE, height, theme) as figure:
        grid = figure.add_gridspec(
            len(blocks), len(panels),
            width_ratios=[1.9, *[1.0] * (len(panels) - 1)], height_ratios=[len(own) + 0.8 for own in blocks.values()],
        )  # fmt: skip
        drawn: list[tuple[Axes, list[tuple[float, float, str]]]] = []
        for down, (name, own) in enumerate(blocks.items()):
            first: Axes | None = None
            for across, panel in enumerate(panels):
                axes = figure.add_subplot(grid[down, across], sharex=first, sharey=first)
                first = first or axes
                drawn.append((axes, _forest_panel(axes, own, panel, theme, large=across == 0)))
                if down == 0:
                    axes.set_title(panel, fontsize=7.5, fontweight="normal" if across else "bold")
                axes.tick_params(axis="y", length=0, labelleft=across == 0)
                axes.tick_params(axis="x", labelsize=6 if across else 7)
                axes.xaxis.set_major_locator(MaxNLocator(2 if across else 6, steps=[1, 2, 5, 10], integer=True))
            assert first is not None
            first.set_yticks(range(len(own)), [shorten(row.title, 70 if len(panels) == 1 else 38) for row in own])
            first.set_ylim(len(own) - 0.5, -0.5)
            if len(blocks) > 1 and longest:
                first.set_ylabel(name, fontsize=7, color=theme.muted)
        figure.supxlabel(unit, fontsize=7.5, color=theme.muted)
        save(figure, path)
        for axes, said in drawn:
            points += points_of(axes, said)
    return Spots(points=tuple(points))


def _forest_panel(
    axes: Axes, rows: Sequence[ForestRow], panel: str, theme: Theme, *, large: bool
) -> list[tuple[float, float, str]]:
    axes.axvline(0, color=theme.ink, lw=0.8)
    axes.grid(axis="x", color=theme.faint, lw=0.5)
    axes.spines[["left"]].set_visible(False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", MINUS)))
    said: list[tuple[float, float, str]] = []
    for height, row in enumerate(rows):
        mark = row.marks.get(panel)
        if mark is None:
            continue
        colour = (theme.accent if mark.difference < 0 else theme.gain) if mark.detected else theme.muted
        axes.plot((100 * mark.low, 100 * mark.high), (height, height), color=colour, lw=1.4)
        if mark.runs:
            dots = [100 * run for run in mark.runs]
            axes.plot(dots, [height + 0.27] * len(dots), "o", ms=1.9, color=theme.ink, mew=0, alpha=0.75)
        axes.plot(
            100 * mark.difference, height, "D" if large else "o", ms=4 if large else 3.6, color=colour,
            mfc=colour if mark.detected else theme.paper, mew=1.2,
        )  # fmt: skip
        span = f"{_signed(mark.low)} to {_signed(mark.high)}"
        text = f"{row.block}, {row.title}, {panel}: {_signed(mark.difference)} points, {span}"
        if mark.runs:
            text += f"; runs {', '.join(map(_signed, mark.runs))}"
        said.append((100 * mark.difference, height, text + ("; detected" if mark.detected else "; not detected")))
    return said


def _signed(share: float) -> str:
    text = f"{100 * abs(share):.1f}"
    return text if float(text) == 0 else f"{MINUS if share < 0 else '+'}{text}"


def smoothed(losses: Sequence[float]) -> NDArray[np.float64]:
    """The mean over a window of a tenth of the curve around each value, as much of it as there is at the ends."""
    values, reach = np.asarray(losses, dtype=np.float64), max(1, len(losses) // 20)
    total = np.concatenate([[0.0], np.cumsum(values)])
    start = np.maximum(np.arange(len(values)) - reach, 0)
    end = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    return np.asarray((total[end] - total[start]) / (end - start))


def plot_training(curves: Sequence[LearningCurve], path: Path | Sequence[Path], theme: Theme = LIGHT) -> Spots:
    """Learning curves, a panel per variant, a colour per run: training loss (smoothed; single steps faint behind it)
    and, dashed with marks, evaluation loss. PNG or SVG by the suffix."""
    variants = list(dict.fromkeys(curve.variant for curve in curves))
    columns = min(3, len(variants))
    lines = -(-len(variants) // columns)
    runs = list(dict.fromkeys(curve.run for curve in curves))
    drawn: list[tuple[Axes, list[tuple[float, float, str]]]] = []
    with figure_in(PAGE, 0.5 + 1.75 * lines, theme) as figure:
        panels: Any = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
        for axes, variant in itertools.zip_longest(panels, variants):
            if variant is None:
                axes.set_visible(False)
                continue
            axes.grid(axis="y", color=theme.faint, lw=0.5)
            axes.set_title(shorten(variant, 36), loc="left", fontsize=7.5)
            axes.set_rasterization_zorder(0)  # single steps are pixels, all in one picture
            said: list[tuple[float, float, str]] = []
            for curve in (one for one in curves if one.variant == variant):
                colour = theme.lines[runs.index(curve.run) % len(theme.lines)]
                steps, means = [step for step, _ in curve.train], smoothed([loss for _, loss in curve.train])
                losses = [loss for _, loss in curve.train]
                axes.plot(steps, losses, color=colour, lw=0.5, alpha=0.28, zorder=-1)
                thin = [*range(0, len(steps) - 1, max(1, len(steps) // STROKES)), len(steps) - 1]
                axes.plot([steps[i] for i in thin], means[thin], color=colour, lw=1.4)
                if curve.evaluated:
                    axes.plot(*zip(*curve.evaluated, strict=True), "s", ls=(0, (3, 1.5)), color=colour, lw=1, ms=3)
                name = f"{variant}, {curve.run}"
                some = max(1, -(-len(steps) // POINTS_PER_CURVE))
                picked = sorted({*range(0, len(steps), some), len(steps) - 1} - {-1})
                said += [(steps[i], float(means[i]), f"{name}, step {steps[i]:g}: {means[i]:.3g}") for i in picked]
                said += [(x, y, f"{name}, step {x:g}: {y:.3g} on held-out rows") for x, y in curve.evaluated]
            drawn.append((axes, said))
        for axes in panels:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        drawn[0][0].set_ylim(bottom=0)
        handles = [Line2D([], [], color=theme.muted, lw=1.4, label="training, smoothed")]
        if any(curve.evaluated for curve in curves):
            handles.append(
                Line2D([], [], color=theme.muted, lw=1, ls=(0, (3, 1.5)), marker="s", ms=3, label="held out")
            )
        if len(runs) > 1:
            colours = itertools.cycle(theme.lines)
            handles += [
                Line2D([], [], color=colour, lw=1.4, label=run) for run, colour in zip(runs, colours, strict=False)
            ]
        figure.supxlabel("optimiser step", fontsize=7.5, color=theme.muted)
        figure.supylabel("loss", fontsize=7.5, color=theme.muted)
        figure.legend(handles=handles, loc="outside upper right", ncols=min(6, len(handles)))
        save(figure, path)
        points = [point for axes, said in drawn for point in points_of(axes, said)]
    return Spots(points=tuple(points))


def plot_sink_layers(
    before: Mapping[int, Sequence[float]],
    after: Mapping[int, Sequence[float]],
    silent: Sequence[ExpertKey],
    path: Path | Sequence[Path],
    theme: Theme = LIGHT,
) -> Spots:
    """Attention on the first token by layer: the mean over the heads as a line, each head as a dot; the model as it is
    and with the `silent` experts silenced. PNG or SVG by the suffix."""
    named = ", ".join(map(key_name, silent[:4])) + (" and more" if len(silent) > 4 else "")
    said = []
    with figure_in(PAGE, 2.5, theme) as figure:
        axes = figure.add_subplot()
        axes.grid(axis="y", color=theme.faint, lw=0.5)
        axes.set_rasterization_zorder(0)  # of a large model's heads there are thousands
        kinds: Any = (
            (before, theme.gain, "-", "o", "base model", -0.06),
            (after, theme.accent, (0, (4, 1.5)), "D", f"{named} silenced", 0.06),
        )
        for shares, colour, style, marker, name, shift in kinds:
            means = {layer: 100 * sum(heads) / len(heads) for layer, heads in shares.items()}
            x = [layer + shift for layer, heads in shares.items() for _ in heads]
            y = [100 * share for heads in shares.values() for share in heads]
            axes.plot(x, y, "o", color=colour, ms=2.2, alpha=0.35, mew=0, zorder=-1)
            axes.plot(
                list(means), list(means.values()), color=colour, ls=style, lw=1.4, marker=marker, ms=3.6, label=name
            )
            said += [(layer, mean, f"layer {layer}, {name}: {mean:.1f}%") for layer, mean in means.items()]
        axes.set(xlabel="layer", ylabel="attention on the first token, %", ylim=(-2, 102))
        axes.xaxis.set_major_locator(MaxNLocator(14, integer=True, steps=[1, 2, 5, 10]))
        figure.legend(loc="outside upper left", ncols=2)
        save(figure, path)
        points = points_of(axes, sorted(said, key=lambda one: one[0]))
    return Spots(points=points)


def plot_weight_changes(
    panels: Sequence[WeightChanges],
    path: Path | Sequence[Path],
    *,
    layers: int,
    sizes: Mapping[int, int],
    shared: bool,
    theme: Theme = LIGHT,
) -> Spots:
    """A small heatmap per variant: the relative norm of each expert's change, and of attention's in a column of its
    own; silenced experts are crossed out. `sizes`: routed experts of each MoE layer; `layers`: decoder layers in all.
    PNG or SVG by the suffix."""
    experts = max(sizes.values(), default=0)
    gap = max(1, round(experts / 24))
    lone = experts + gap  # where the shared experts' column begins, if there is one
    right = lone + (2 * gap if shared else 0)
    width = right + 2 * gap if any(panel.others for panel in panels) else right - gap
    values = [v for panel in panels for v in (*panel.experts.values(), *panel.others.values()) if v]
    norm = LogNorm(min(values) / 1.5, max(values) * 1.05) if values else None
    scale = LinearSegmentedColormap.from_list("changes", theme.scale[2:])
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    tall = min(1.6, max(0.5, 0.11 * layers))
    drawn: list[tuple[Axes, list[tuple[float, float, str]]]] = []
    with figure_in(PAGE, 0.5 + lines * (tall + 0.3), theme) as figure:
        grid: Any = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes, panel in itertools.zip_longest(grid.flat, panels):
            if panel is None:
                axes.set_visible(False)
                continue
            axes.set_title(shorten(panel.title, 48), loc="left", fontsize=7.5)
            for layer, size in sizes.items():
                axes.barh(layer, size, left=-0.5, height=1, color=theme.faint, lw=0, alpha=0.6)
                if shared:
                    axes.barh(layer, gap, left=lone - 0.5, height=1, color=theme.faint, lw=0, alpha=0.6)
            if width > right:
                axes.barh(range(layers), 2 * gap, left=right - 0.5, height=1, color=theme.faint, lw=0, alpha=0.6)
            drawn.append((axes, _changed(axes, panel, lone, right, gap, norm, scale, theme)))
        first = grid[0, 0]
        first.set(xlim=(-0.5, width - 0.5), ylim=(layers - 0.5, -0.5))
        first.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if experts / step <= 9)
        ticks = {float(x): str(x) for x in range(0, experts, step)}
        if shared:
            ticks[lone + gap / 2 - 0.5] = "S"
        if width > right:
            ticks[right + gap - 0.5] = "A"
        first.set_xticks(list(ticks), list(ticks.values()))
        for axes in grid.flat[len(panels) - columns : len(panels)]:  # nothing is below them
            axes.tick_params(labelbottom=True)
        figure.supxlabel("expert" + ("; S: shared" if shared else "") + ("; A: attention" if width > right else ""),
                         fontsize=7.5, color=theme.muted)  # fmt: skip
        figure.supylabel("layer", fontsize=7.5, color=theme.muted)
        if norm is not None:
            bar = figure.colorbar(
                ScalarMappable(norm, scale), ax=grid, pad=0.015, aspect=max(12.0, 10.0 * lines), shrink=0.9
            )
            bar.outline.set_visible(False)
            bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
            bar.ax.minorticks_off()
        if any(value is None for panel in panels for value in panel.experts.values()):
            crossed = Line2D([], [], color=theme.accent, marker="X", ls="none", ms=5, label="silenced")
            rest = Patch(facecolor=theme.faint, label="unchanged")
            figure.legend(handles=[crossed, rest], loc="outside upper right", ncols=2)
        save(figure, path)
        points = [point for axes, said in drawn for point in points_of(axes, said)]
    return Spots(points=tuple(points))


def _changed(
    axes: Axes, panel: WeightChanges, lone: int, right: int, gap: int, norm: LogNorm | None, scale: Any, theme: Theme
) -> list[tuple[float, float, str]]:
    """Draws what one variant changes."""
    said = []
    for (layer, expert), value in panel.experts.items():
        x = lone + gap / 2 - 0.5 if expert == "shared" else float(expert)
        wide = gap if expert == "shared" else 1
        name = f"{panel.title}, {key_name((layer, expert))}"
        if value is None:
            if len(panel.experts) <= MARKED:
                axes.plot(x, layer, "X", color=theme.accent, mec=theme.paper, mew=0.5, ms=6, clip_on=False)
            else:
                axes.barh(layer, wide, left=x - wide / 2, height=1, color=theme.accent, lw=0)
            said.append((x, float(layer), f"{name}: silenced"))
        else:
            colour = scale(norm(value)) if norm is not None and value else theme.faint
            if len(panel.experts) <= MARKED:
                axes.plot(x, layer, "s", color=colour, mec=theme.ink, mew=0.5, ms=5.5, clip_on=False)
            else:
                axes.barh(layer, wide, left=x - wide / 2, height=1, color=colour, lw=0)
            said.append((x, float(layer), f"{name}: {100 * value:.3g}% of its norm"))
    for layer, value in panel.others.items():
        colour = scale(norm(value)) if norm is not None and value else theme.faint
        axes.barh(layer, 2 * gap, left=right - 0.5, height=1, color=colour, lw=0)
        said.append((right + gap - 0.5, float(layer), f"{panel.title}, attention of layer {layer}: {100 * value:.3g}%"))
    return said
