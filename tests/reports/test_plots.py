"""A study's pictures: marks where the numbers are, and what can be pointed at where the marks are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from superexperts.plotting import DARK, LETTERS, LIGHT, Spots
from superexperts.profiling.plots import plot_heatmap
from superexperts.reports import plots
from superexperts.reports.plots import (
    ForestRow,
    LearningCurve,
    Mark,
    WeightChanges,
    plot_forest,
    plot_sink_layers,
    plot_training,
    plot_weight_changes,
    smoothed,
)
from tests.support.study_folder import profile

ROWS = [
    ForestRow(
        title="super $x$",
        block="pruning",
        marks={
            "all items": Mark(difference=-0.4, low=-0.5, high=-0.3, detected=True),
            "MMLU": Mark(difference=-0.2, low=-0.3, high=-0.1, detected=False),
        },
    ),
    ForestRow(
        title="random", block="LoRA", marks={"all items": Mark(difference=0.02, low=-0.01, high=0.05, detected=False)}
    ),
    ForestRow(
        title="super",
        block="LoRA",
        marks={"all items": Mark(difference=0.03, low=0.01, high=0.05, detected=True, runs=(0.01, 0.05))},
    ),
]
CURVES = [
    LearningCurve(variant="super", run="seed 0", train=[(step, 2.0 - step / 300) for step in range(1, 301)]),
    LearningCurve(variant="super", run="seed 1", train=[(1, 2.0), (2, 1.0)], evaluated=[(2, 1.5)]),
    LearningCurve(variant="attention", run="seed 0", train=[(1, 2.0)]),
]
CHANGES = [
    WeightChanges(title="prune", experts={(1, 2): None, (2, "shared"): None}, others={}),
    WeightChanges(title="few", experts={(1, 2): 0.01, (2, "shared"): 0.1}, others={}),
    WeightChanges(title="many", experts={(3, expert): 0.02 + expert / 1000 for expert in range(40)}, others={0: 0.05}),
]
DRAW: dict[str, Callable[..., Spots]] = {
    "forest": lambda path, **theme: plot_forest(ROWS, path, unit="points", **theme),
    "training": lambda path, **theme: plot_training(CURVES, path, **theme),
    "sinks": lambda path, **theme: plot_sink_layers(
        {0: [0.1, 0.3], 3: [0.9]}, {0: [0.1], 3: [0.2]}, [(1, 2)], path, **theme
    ),
    "weights": lambda path, **theme: plot_weight_changes(
        CHANGES, path, layers=4, sizes={1: 40, 2: 40, 3: 40}, shared=True, **theme
    ),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that were laid out instead of saved."""
    figures: list[Figure] = []

    def keep(figure: Figure, path: object) -> None:
        figure.draw_without_rendering()
        figures.append(figure)

    monkeypatch.setattr(plots, "save", keep)
    return figures


def test_forest_has_every_difference_interval_and_run(drawn: list[Figure]) -> None:
    spots = DRAW["forest"](Path("x.png"))
    panels = [axes for axes in drawn[0].axes if axes.lines]
    assert [axes.get_title() for axes in drawn[0].axes[:2]] == ["all items", "MMLU"]
    found = []
    for axes in panels:
        marks = [line for line in axes.lines if line.get_marker() in "Do" and line.get_markersize() > 3]
        found += [(line.get_xdata()[0], line.get_markerfacecolor() != LIGHT.paper) for line in marks]
        spans = [tuple(line.get_xdata()) for line in axes.lines if line.get_marker() == "None"][1:]
        assert all(low < line.get_xdata()[0] < high for line, (low, high) in zip(marks, spans, strict=True))
    assert found == [(-40, True), (-20, False), (2, False), (3, True)]
    dots = [list(line.get_xdata()) for axes in panels for line in axes.lines if line.get_markersize() < 2]
    assert dots == [[1, 5]]
    assert panels[0].get_xlim() == panels[1].get_xlim() != panels[2].get_xlim()  # a scale for each block
    assert [text for _, _, text in spots.points][::3] == [
        "pruning, super $x$, all items: −40.0 points, −50.0 to −30.0; detected",
        "LoRA, super, all items: +3.0 points, +1.0 to +5.0; runs +1.0, +5.0; detected",
    ]


def test_curves_are_smoothed_and_every_run_is_there(drawn: list[Figure]) -> None:
    random = np.random.default_rng(0).normal(size=101)
    means = smoothed(random)
    assert means[50] == pytest.approx(random[45:56].mean())
    assert means[0] == pytest.approx(random[:6].mean())
    assert means[-1] == pytest.approx(random[-6:].mean())
    assert list(smoothed([3.0])) == [3.0]
    spots = DRAW["training"](Path("x.png"))
    left, right = drawn[0].axes
    strong = [line for line in left.lines if line.get_linewidth() == 1.4]
    assert [to_hex(line.get_color()) for line in strong] == list(LIGHT.lines[:2])
    assert strong[0].get_xdata()[-1] == 300
    assert len(strong[0].get_xdata()) < 200
    assert len([line for line in right.lines if line.get_linewidth() == 1.4]) == 1
    said = [text for _, _, text in spots.points]
    assert "super, seed 1, step 2: 1.5 on held-out rows" in said
    assert "attention, seed 0, step 1: 2" in said
    assert len(said) < 60


def test_changes_lie_on_their_experts(drawn: list[Figure]) -> None:
    spots = DRAW["weights"](Path("x.png"))
    prune, few, many = (axes for axes in drawn[0].axes[:3])
    crosses = [line for line in prune.lines if line.get_marker() == "X"]
    assert (crosses[0].get_xdata()[0], crosses[0].get_ydata()[0]) == (2, 1)
    squares = [line for line in few.lines if line.get_marker() == "s"]
    assert [line.get_ydata()[0] for line in squares] == [1, 2]
    assert squares[1].get_xdata()[0] > 40  # the shared expert, past the others
    cells = [patch for patch in many.patches if patch.get_y() == 2.5 and patch.get_width() == 1]
    assert [patch.get_x() + 0.5 for patch in cells] == list(range(40))
    shades = [sum(patch.get_facecolor()[:3]) for patch in cells]
    assert shades == sorted(shades, reverse=True)  # the larger the darker
    said = [text for _, _, text in spots.points]
    assert said[:4] == [
        "prune, L1E2: silenced",
        "prune, L2shared: silenced",
        "few, L1E2: 1% of its norm",
        "few, L2shared: 10% of its norm",
    ]
    assert said[-1] == "many, attention of layer 0: 5%"


def test_means_over_heads_by_layer(drawn: list[Figure]) -> None:
    spots = DRAW["sinks"](Path("x.png"))
    lines = [line for line in drawn[0].axes[0].lines if line.get_linestyle() != "None"]
    assert [list(line.get_ydata()) for line in lines] == [pytest.approx([20, 90]), pytest.approx([10, 20])]
    assert [text for _, _, text in spots.points] == [
        "layer 0, base model: 20.0%",
        "layer 0, L1E2 silenced: 10.0%",
        "layer 3, base model: 90.0%",
        "layer 3, L1E2 silenced: 20.0%",
    ]


def colour_at(image: Image.Image, left: float, top: float) -> tuple[int, ...]:
    found: Any = image.getpixel((round(left * image.width), round(top * image.height)))
    return tuple(found[:3])


def test_what_is_pointed_at_is_where_it_was_drawn(tmp_path: Path) -> None:
    """In the picture itself the pixels at a spot have the colour of its mark."""
    spots = DRAW["weights"](tmp_path / "x.png")
    image = Image.open(tmp_path / "x.png")
    accent = tuple(int(LIGHT.accent[i : i + 2], 16) for i in (1, 3, 5))
    assert [colour_at(image, left, top) == accent for left, top, _ in spots.points[:4]] == [True, True, False, False]
    forest = DRAW["forest"](tmp_path / "y.png")
    image = Image.open(tmp_path / "y.png")
    assert colour_at(image, *forest.points[0][:2]) == accent
    assert colour_at(image, *forest.points[1][:2]) == (255, 255, 255)  # not detected: hollow
    (grid,) = plot_heatmap(profile(), "pocket", [], tmp_path / "z.png").grids
    image = Image.open(tmp_path / "z.png")
    left, top, width, height = grid.box
    shades = {
        value: sum(colour_at(image, left + (x + 0.5) * width / 9, top + (y + 0.5) * height / 5))
        for y, row in enumerate(grid.values[:3])
        for x, value in enumerate(row)
        if value
    }
    assert [shades[value] for value in sorted(shades)] == sorted(shades.values(), reverse=True)


@pytest.mark.parametrize("name", DRAW)
def test_files_for_paper_and_page(name: str, tmp_path: Path) -> None:
    paths = [tmp_path / "one.svg", tmp_path / "one.png", tmp_path / f"one{LETTERS}"]
    spots = DRAW[name](paths)
    assert DRAW[name]([tmp_path / "two.svg"]) == spots
    assert paths[0].read_bytes() == (tmp_path / "two.svg").read_bytes()
    DRAW[name]([tmp_path / f"dark{LETTERS}"], theme=DARK)
    for path in tmp_path.glob("*.svg"):
        ElementTree.parse(path)
    assert "<text" not in paths[0].read_text()
    letters = paths[2].read_text()
    assert "<text" in letters
    sizes = {re.search(r'viewBox="([^"]+)"', path.read_text())[1] for path in tmp_path.glob("*.svg")}  # type: ignore[index]
    assert len(sizes) == 1
    assert all(0 <= left <= 1 and 0 <= top <= 1 and text for left, top, text in spots.points)
    with Image.open(paths[1]) as image:
        assert image.width == 1400
