"""Pictures: what is drawn where, taken from the figure itself, and that files are whole and the same each time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from superexperts.core.errors import OutputError
from superexperts.core.types import CorpusProfile
from superexperts.plotting import DARK, LIGHT, Theme
from superexperts.profiling import plots
from superexperts.profiling.criterion import considered, threshold
from superexperts.profiling.plots import plot_corpora, plot_heatmap, plot_layers, plot_top
from tests.support.study_folder import profile

CHOSEN = ((1, 2), (2, 5))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that were drawn instead of saved."""
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    return figures


def texts(figure: Figure) -> dict[str, tuple[float, float]]:
    return {text.get_text(): getattr(text, "xy", (np.nan, np.nan)) for text in figure.axes[0].texts}


def test_heatmap_puts_each_expert_on_its_own_layer(drawn: list[Figure]) -> None:
    found = profile(layers=5, experts=8, dense=1)
    plot_heatmap(found, "pocket", CHOSEN, Path("x.png"), ring="super expert")
    axes = drawn[0].axes[0]
    image = axes.images[-1]
    values = np.ma.filled(image.get_array(), np.nan)
    assert values.shape == (5, 9)  # the shared expert last
    assert np.isnan(values[0]).all()  # dense
    assert np.isnan(values[1, 0])  # reached by no token
    for row in found.corpora["pocket"].experts:
        if row.tokens:
            assert values[row.layer, 8 if row.expert == "shared" else row.expert] == row.output_max
    assert tuple(image.get_extent()) == (-0.5, 8.5, 4.5, -0.5)
    assert texts(drawn[0])["L1E2"] == pytest.approx((2, 1))
    assert texts(drawn[0])["L2E5"] == pytest.approx((5, 2))
    rings = [
        tuple(map(float, (line.get_xdata()[0], line.get_ydata()[0]))) for line in axes.lines if line.get_marker() == "o"
    ]
    assert rings == [(2, 1), (5, 2)]
    dashed = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert dashed == [3.5]  # round(0.75 * 5) = 4 layers are considered
    legend = [text.get_text() for text in drawn[0].legends[0].texts]
    assert legend == ["super expert", "no experts", "no token", "depth 0.75"]


def test_layers_plot_shows_the_criterion(drawn: list[Figure]) -> None:
    found = profile()
    plot_layers(found, "pocket", CHOSEN, Path("x.png"))
    axes = drawn[0].axes[0]
    bound = threshold([row.output_max for row in considered(found.corpora["pocket"].experts, 5, 0.75)])
    dashed = sorted(line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--")
    assert dashed == pytest.approx(sorted([bound.percentile, bound.ratio]))
    assert texts(drawn[0])["L1E2"] == pytest.approx((1, 900))
    assert texts(drawn[0])["L2E5"] == pytest.approx((2, 450))


def test_names_do_not_cover_each_other(drawn: list[Figure]) -> None:
    chosen = [(1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, "shared"), (1, "shared")]
    plot_heatmap(profile(experts=64), "pocket", chosen, Path("x.png"))  # type: ignore[arg-type]
    figure = drawn[0]
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text().startswith("L")]
    assert len(boxes) == 7
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]
    title = figure.axes[0].get_title(loc="left")
    assert title.startswith("Peak |down_proj output|")


@pytest.mark.parametrize("layers", [[12, 13, 15], [17, 19, 20], [10, 11, 12, 13, 14]])
def test_no_name_stands_at_the_ring_of_another_layer(drawn: list[Figure], layers: list[int]) -> None:
    """In a picture of 61 layers rings stand close: a name is nearest to its own ring, or tied to it by a line."""
    chosen = [(layer, 3) for layer in layers]
    plot_layers(profile(layers=61, experts=64), "pocket", chosen, Path("x.png"))  # type: ignore[arg-type]
    axes = drawn[0].axes[0]
    names = [text for text in axes.texts if text.get_text().startswith("L")]
    assert len(names) == len(chosen) + 1
    drawn[0].draw_without_rendering()
    boxes = {name: Text.get_window_extent(name) for name in names}  # without the line
    rings = {name: axes.transData.transform(name.xy) for name in names}
    for name, box in boxes.items():
        gaps = {
            other: np.hypot(*np.maximum(np.maximum(box.min - ring, ring - box.max), 0)) for other, ring in rings.items()
        }
        assert gaps[name] == min(gaps.values()) or name.arrow_patch is not None, name.get_text()
        assert not [other for other in names if other is not name and box.overlaps(boxes[other])]


def test_no_text_leaves_the_paper(drawn: list[Figure], monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture one column wide, of two corpora, and one with long names."""

    def keep(figure: Figure, _: Path) -> None:
        figure.draw_without_rendering()
        drawn.append(figure)

    monkeypatch.setattr(plots, "save", keep)
    long = "Magistrates and Morals: a corpus of law.jsonl"
    section = profile().corpora["pocket"]
    found = dataclasses.replace(
        profile(), model="DeepSeek-Coder-V2-Lite-Instruct-MAGNUM-BF16", corpora={long: section, "b": section}
    )
    plot_corpora(found, CHOSEN, Path("x.png"))
    plot_top(found, long, CHOSEN, Path("x.png"))
    plot_layers(found, long, CHOSEN, Path("x.png"))
    for figure in drawn:
        numbers = figure.axes[0].get_xticklabels()  # of which some are beyond the axis and not drawn
        for text in set(figure.findobj(Text)) - set(numbers):
            box = text.get_window_extent()
            assert not text.get_text() or (box.x0 >= 0 and box.x1 <= figure.bbox.x1), text
    ticks = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
    assert {"500", "1000"} <= set(ticks)  # peaks of one decade have more than one number below them


def test_corpora_are_marked_by_the_criterion_however_deep_the_profile(
    drawn: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert in the last quarter of the layers is not a super expert, as in the table and in the other pictures."""
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    section = profile(layers=8).corpora["pocket"]
    late = [dataclasses.replace(row, output_max=5000.0) if row.key == (7, 3) else row for row in section.experts]
    corpora = {name: dataclasses.replace(section, experts=tuple(late)) for name in "ab"}
    found = dataclasses.replace(profile(layers=8), depth=1.0, corpora=corpora)
    plot_corpora(found, [(1, 2), (7, 3)], Path("x.png"))
    filled = [line for line in drawn[0].axes[0].lines if line.get_markerfacecolor() != "none"]
    assert [list(line.get_xdata()) for line in filled] == [[900], [900]]


def test_seven_corpora_look_different_and_their_super_experts_are_filled(
    drawn: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    one = profile(experts=80).corpora["pocket"]
    flat = dataclasses.replace(
        one, experts=tuple(dataclasses.replace(row, output_max=min(row.output_max, 1.0)) for row in one.experts)
    )
    corpora = {name: flat if name == "flat" else one for name in ("a", "b", "c", "d", "e", "flat", "g")}
    plot_corpora(dataclasses.replace(profile(experts=80), corpora=corpora), [(1, 2), (3, 1)], Path("x.png"))
    axes = drawn[0].axes[0]
    filled = [line for line in axes.lines if line.get_markerfacecolor() != "none"]
    assert [list(line.get_xdata()) for line in filled] == [[] if name == "flat" else [900] for name in corpora]
    assert len({(line.get_color(), line.get_marker()) for line in filled}) == 7
    assert len({line.get_color() for line in filled}) == 7
    assert [text.get_text() for text in drawn[0].legends[0].texts] == list(corpora)
    assert [label.get_color() == LIGHT.accent for label in axes.get_yticklabels()] == [True, False]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_can_be_read_on_their_paper(theme: Theme) -> None:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(colour: str) -> float:
        dark, bright = sorted((light(colour), light(theme.paper)))
        return (bright + 0.05) / (dark + 0.05)

    assert all(contrast(colour) >= 4.5 for colour in (theme.ink, theme.muted, theme.accent, theme.gain))
    assert all(contrast(colour) >= 3 for colour in theme.lines)


DRAW: dict[str, Callable[[Path], object]] = {
    "heatmap": lambda path: plot_heatmap(profile(), "pocket", CHOSEN, path),
    "layers": lambda path: plot_layers(profile(), "pocket", CHOSEN, path, theme=DARK),
    "corpora": lambda path: plot_corpora(profile(), CHOSEN, path),
    "top": lambda path: plot_top(profile(), "pocket", CHOSEN, path),
}


@pytest.mark.parametrize("name", DRAW)
def test_files_are_whole_and_repeatable(name: str, tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    for path in (tmp_path / "one.png", tmp_path / "one.svg", tmp_path / "two.svg"):
        DRAW[name](path)
    assert dict(mpl.rcParams) == before
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert ElementTree.parse(tmp_path / "one.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    with Image.open(tmp_path / "one.png") as image:
        assert image.width in (680, 1400)  # a column or a page at 200 dpi
        assert len(image.convert("L").getcolors() or []) > 20
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.png", "one.svg", "two.svg"]


@pytest.mark.parametrize(("layers", "experts", "dense"), [(2, 2, 0), (27, 64, 1), (61, 160, 3)])
def test_shapes_from_tiny_to_the_largest(layers: int, experts: int, dense: int, tmp_path: Path) -> None:
    found = profile(layers=layers, experts=experts, dense=dense)
    chosen = [(dense, 1), (layers - 1, "shared")]
    plot_heatmap(found, "pocket", chosen, tmp_path / "heatmap.svg")  # type: ignore[arg-type]
    plot_layers(found, "pocket", chosen, tmp_path / "layers.svg")  # type: ignore[arg-type]
    for name in ("heatmap.svg", "layers.svg"):
        assert 5_000 < (tmp_path / name).stat().st_size < 400_000


def test_a_profile_without_any_peak_is_drawn(drawn: list[Figure]) -> None:
    full = profile(layers=3, experts=2)
    rows = [dataclasses.replace(row, tokens=0, output_max=0.0) for row in full.corpora["pocket"].experts]
    found = dataclasses.replace(full, corpora={"pocket": CorpusProfile(tokens=0, experts=tuple(rows))})
    plot_heatmap(found, "pocket", (), Path("x.svg"))
    plot_layers(found, "pocket", (), Path("y.svg"))
    assert [text.get_text() for text in drawn[0].legends[0].texts] == ["no experts", "no token", "depth 0.75"]
    assert not drawn[1].axes[0].texts[1:]  # the subtitle only: no bound and no name


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"x\.pdf: pictures are \.png or \.svg"):
        plot_heatmap(profile(), "pocket", CHOSEN, tmp_path / "x.pdf")
    assert not list(tmp_path.iterdir())
