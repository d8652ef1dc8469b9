"""The pictures of a study's report: title, caption and text alternative of each, and its drawings.

matplotlib draws each picture for a paper and for the page, in light and dark colours. The values that the page shows
on pointing are data on top of the picture (`Spots`), so that no second library has to draw the same picture.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from superexperts.adapters.norms import Changes, adapter_changes
from superexperts.benchmarks import title_of
from superexperts.checkpoints.source import resolve
from superexperts.core.console import note
from superexperts.core.errors import DataError, ExpertsError, ModelError
from superexperts.core.runs import read_json
from superexperts.core.types import ExpertKey, ExpertSet, Profile, key_name
from superexperts.plotting import DARK, LETTERS, LIGHT, PAGE, Spots, Theme
from superexperts.profiling.criterion import super_experts
from superexperts.profiling.plots import plot_heatmap, plot_layers
from superexperts.reports.plots import (
    ForestRow,
    LearningCurve,
    Mark,
    WeightChanges,
    plot_forest,
    plot_sink_layers,
    plot_training,
    plot_weight_changes,
)
from superexperts.reports.tables import run_difference
from superexperts.results.results import Comparison, Results, signed_points

__all__ = ["Picture", "drawn", "pictures", "rule_of"]

MAX_HEATMAPS, MAX_LAYERS = 8, 2
"""Most heatmaps, and pictures of peaks by layer, on the page; more would make it large. `figures/` has all of them."""
BLOCKS = {"prune": "pruning", "lora": "LoRA"}

Draw = Callable[[Sequence[Path], Theme], Spots]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of the report."""

    name: str
    """Stem of its files."""
    section: str
    """results, experts, sinks, weights or training."""
    title: str
    alt: str
    """Text alternative."""
    caption: str
    draw: Draw
    on_page: bool = True


def pictures(folder: Path, results: Results, chosen: ExpertSet | None) -> list[Picture]:
    """All pictures that can be drawn from the files in a study's folder, in the order of the page."""
    profile = Profile.load(folder / "profile") if (folder / "profile" / "profile.json").is_file() else None
    found = [_forest(results, "base"), _forest(results, "control")]
    if profile is not None:
        found += _of_corpora(profile, chosen)
        found.append(_weights(folder, results, profile))
    if (folder / "profile" / "sinks.json").is_file():
        found.append(_sinks(read_json(folder / "profile" / "sinks.json", "sinks")))
    found.append(_training(folder, results))
    return [picture for picture in found if picture is not None]


def drawn(picture: Picture, folder: Path) -> dict[str, Any]:
    """Writes `folder`/NAME.png and .svg; returns what the page needs: two SVGs as `data:` URLs, and the spots."""
    addresses = {}
    with tempfile.TemporaryDirectory() as scratch:
        light, dark = (Path(scratch) / f"{theme}{LETTERS}" for theme in ("light", "dark"))
        spots = picture.draw([folder / f"{picture.name}.svg", folder / f"{picture.name}.png", light], LIGHT)
        if picture.on_page:
            picture.draw([dark], DARK)
            for name, path in (("light", light), ("dark", dark)):
                svg = _small(path.read_text(encoding="utf-8"))
                addresses[name] = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
    return {
        "name": picture.name,
        "section": picture.section,
        "title": picture.title,
        "alt": picture.alt,
        "caption": picture.caption,
        "on_page": picture.on_page,
        "spots": dataclasses.asdict(spots),
        **addresses,
    }


def _small(svg: str) -> str:
    """A smaller SVG: without metadata, comments and ids, and with two digits after the decimal point."""
    svg = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: 'DejaVu Sans', Verdana, sans-serif", svg)
    return re.sub(r">\s+<", "><", re.sub(r"\s+", " ", svg)).strip()


def rule_of(chosen: ExpertSet | None) -> dict[str, Any]:
    """The numbers of the criterion that chose the experts; those of arXiv 2507.23279 if a file has none."""
    return {"percentile": 99.5, "ratio": 10.0, "depth": 0.75} | (dict(chosen.rule) if chosen is not None else {})


def _forest(results: Results, family: Any) -> Picture | None:
    rows = results.family(family)
    if not rows:
        return None
    everything = {(row.variant, row.reference, row.task): row for row in results.comparisons}
    tasks = [None, *results.columns] if family == "base" else [None]
    lines = []
    for row in rows:
        variant, reference = results.variant(row.variant), results.variant(row.reference)
        marks = {
            "all items" if task is None else title_of(task): _mark(results, found)
            for task in tasks
            if (found := everything.get((row.variant, row.reference, task))) is not None
        }
        title = _short(variant.title) + ("" if family == "base" else f" − {_short(reference.title)}")
        lines.append(ForestRow(title=title, block=BLOCKS[variant.kind], marks=marks))
    lines = [line for block in BLOCKS.values() for line in lines if line.block == block]
    to = results.base.title if family == "base" else "the control"
    alt = "; ".join(f"{line.block}, {line.title}: {_spoken(line.marks['all items'])}" for line in lines)
    return Picture(
        name="differences" if family == "base" else "controls",
        section="results" if family == "base" else "controls",
        title=f"Differences to {to}",
        alt=f"Forest plot. Over all items, in points: {alt}.",
        caption="Filled marks: detected after Holm's adjustment. Lines: 95% intervals."
        + (" Small dots: single runs." if any(row.marks["all items"].runs for row in lines) else "")
        + " Pruning and LoRA have separate scales.",
        draw=lambda paths, theme: plot_forest(lines, paths, unit=f"difference to {to}, percentage points", theme=theme),
    )


def _short(title: str) -> str:
    """A title within its block: `LoRA on attention` -> `attention`."""
    return title.removeprefix("prune ").removeprefix("LoRA on ")


def _mark(results: Results, row: Comparison) -> Mark:
    runs: tuple[float, ...] = ()
    if max(row.runs) > 1:
        variant, reference = results.variant(row.variant), results.variant(row.reference)
        runs = tuple(run_difference(results, run, reference, row.task) for run in variant.runs)
    return Mark(difference=row.difference, low=row.low, high=row.high, detected=row.detected, runs=runs)


def _spoken(mark: Mark) -> str:
    said = f"{signed_points(mark.difference)}, interval {signed_points(mark.low)} to {signed_points(mark.high)}"
    return said + (", detected" if mark.detected else ", not detected")


def _of_corpora(profile: Profile, chosen: ExpertSet | None) -> list[Picture]:
    rule = rule_of(chosen)
    found = []
    for number, (name, section) in enumerate(profile.corpora.items()):
        if chosen is not None:
            keys = list(chosen.experts)
        else:
            rows = super_experts(section.experts, profile.num_layers, depth=rule["depth"], statistic=profile.statistic)
            keys = [row.key for row in rows]
        top = sorted(section.experts, key=lambda row: -row.output_max)[:5]
        largest = ", ".join(f"{key_name(row.key)} {row.output_max:.3g}" for row in top)
        ringed = f"Ringed: {', '.join(map(key_name, keys[:12]))}." if keys else ""
        short = re.sub(r"[^\w.-]+", "-", Path(name).name)
        found += [
            Picture(
                name=f"heatmap-{short}",
                title=f"Peaks of every expert on {name}",
                alt=f"Heatmap of every expert's peak on {name}, a row per layer. Largest: {largest}. {ringed}",
                caption="Each cell is one expert's largest |down_proj output| over all tokens of the corpus, on a log "
                "scale.",
                draw=_heatmap(profile, name, keys, rule, "super expert" if chosen is None else "chosen"),
                section="experts",
                on_page=number < MAX_HEATMAPS,
            ),
            Picture(
                name=f"layers-{short}",
                title=f"Peaks by layer on {name}",
                alt=f"Peaks of the experts by layer on {name}, and the criterion's two bounds. Largest: {largest}.",
                caption="The same peaks by layer. A super expert is above both dashed lines.",
                draw=_layers(profile, name, keys, rule),
                section="experts",
                on_page=number < MAX_LAYERS,
            ),
        ]
    return found


def _heatmap(profile: Profile, corpus: str, keys: Sequence[ExpertKey], rule: Mapping[str, Any], ring: str) -> Draw:
    return lambda paths, theme: plot_heatmap(
        profile, corpus, keys, paths, depth=rule["depth"], width=PAGE, theme=theme, ring=ring
    )


def _layers(profile: Profile, corpus: str, keys: Sequence[ExpertKey], rule: Mapping[str, Any]) -> Draw:
    numbers = {name: rule[name] for name in ("depth", "percentile", "ratio")}
    return lambda paths, theme: plot_layers(profile, corpus, keys, paths, width=PAGE, theme=theme, **numbers)


def _sinks(report: Mapping[str, Any]) -> Picture:
    """The picture of `sinks.json`, which `profile` writes on request."""
    try:
        before = {int(row["layer"]): tuple(row["before"]) for row in report["layers"]}
        after = {int(row["layer"]): tuple(row["after"]) for row in report["layers"]}
        silent = ExpertSet.parse(",".join(report["experts"])).experts
    except (KeyError, TypeError, ValueError, ExpertsError) as error:
        raise DataError(f"a field of sinks.json is missing or wrong ({error}); profile again", field="sinks") from error
    said = "; ".join(
        f"layer {layer} {100 * statistics.fmean(before[layer]):.0f}% and {100 * statistics.fmean(after[layer]):.0f}%"
        for layer in before
    )
    named = ", ".join(report["experts"][:8])
    return Picture(
        name="sinks",
        section="sinks",
        title="Attention on the first token",
        alt=f"Share of attention on the first token by layer, unchanged and with {named} silenced: {said}.",
        caption="Lines are means over the heads of a layer, dots are single heads. What the super experts contribute "
        "to the attention sink is the difference between the two.",
        draw=lambda paths, theme: plot_sink_layers(before, after, silent, paths, theme=theme),
    )


def _weights(folder: Path, results: Results, profile: Profile) -> Picture | None:
    adapters = {
        run.name: adapter
        for _, run in results.runs
        if (adapter := folder / "variants" / run.name / "train" / "adapter").is_dir()
    }
    found: Mapping[str, Changes] = {}
    missing = ""
    if adapters:
        try:
            found = adapter_changes(resolve(results.model, results.revision, fetch=False), adapters)
        except (ModelError, DataError) as error:
            note(f"report: no weight changes ({error})")
            missing = " The base model's weights are not on this machine, so LoRA's changes are not shown."
    panels = []
    for variant in results.others:
        own = [found[run.name] for run in variant.runs if run.name in found]
        if variant.kind == "prune":
            names = {name for run in variant.runs for name in run.experts or ()}
            silenced = ExpertSet.parse(",".join(sorted(names))).experts if names else ()
            panels.append(WeightChanges(title=variant.title, experts=dict.fromkeys(silenced), others={}))
        elif own:
            panels.append(WeightChanges(title=variant.title, experts=_mean_of(own), others=_mean_of_others(own)))
    if not panels:
        return None
    rows = next(iter(profile.corpora.values())).experts
    banks = itertools.groupby((row for row in rows if row.expert != "shared"), key=lambda row: row.layer)
    sizes = {layer: 1 + max(int(row.expert) for row in bank) for layer, bank in banks}
    widest = max(sizes.values(), default=0)
    # The profile has no rows for layers past its depth. Assume that they have as many experts as the widest one.
    sizes |= dict.fromkeys(range(max(sizes, default=0) + 1, profile.num_layers), widest)
    shared = any(row.expert == "shared" for row in rows)
    said = "; ".join(f"{panel.title}: {_changes_spoken(panel)}" for panel in panels)
    return Picture(
        name="weights",
        section="weights",
        title="What each variant changes",
        alt=f"A heatmap per variant, layers by experts. {said}.",
        caption="Frobenius norm of LoRA's change divided by that of the weights it changes, over the three matrices of "
        "an expert; for several runs, the mean over those that change the expert. Crosses mark experts that a run "
        f"silences.{missing}",
        draw=lambda paths, theme: plot_weight_changes(
            panels, paths, layers=profile.num_layers, sizes=sizes, shared=shared, theme=theme
        ),
    )


def _mean_of(runs: Sequence[Changes]) -> dict[ExpertKey, float | None]:
    keys = dict.fromkeys(key for run in runs for key in run.experts)
    return {key: statistics.fmean(run.experts[key] for run in runs if key in run.experts) for key in keys}


def _mean_of_others(runs: Sequence[Changes]) -> dict[int, float]:
    layers = dict.fromkeys(layer for run in runs for layer in run.others)
    return {layer: statistics.fmean(run.others[layer] for run in runs if layer in run.others) for layer in layers}


def _changes_spoken(panel: WeightChanges) -> str:
    values = [value for value in (*panel.experts.values(), *panel.others.values()) if value is not None]
    if not values:
        return f"{len(panel.experts)} experts silenced"
    what = f"{len(panel.experts)} experts" if panel.experts else f"attention of {len(panel.others)} layers"
    return f"{what} by {100 * min(values):.2g}% to {100 * max(values):.2g}%"


def _training(folder: Path, results: Results) -> Picture | None:
    curves = []
    for variant, run in results.runs:
        path = folder / "variants" / run.name / "train" / "training.json"
        if path.is_file():
            log = read_json(path, "training")
            pairs = {
                name: [(float(step), float(loss)) for step, loss in log.get(name) or ()]
                for name in ("loss", "eval_loss")
            }
            if pairs["loss"]:
                curves.append(
                    LearningCurve(
                        variant=_short(variant.title),
                        run=f"seed {run.seed}",
                        train=pairs["loss"],
                        evaluated=pairs["eval_loss"],
                    )
                )
    if not curves:
        return None
    ends = "; ".join(
        f"{curve.variant}, {curve.run}, {first:.3g} over the first and {last:.3g} over the last tenth of the steps"
        for curve in curves
        for first, last in [_tenths([loss for _, loss in curve.train])]
    )
    return Picture(
        name="training",
        section="training",
        title="Learning curves",
        alt=f"Loss by optimiser step: {ends}.",
        caption="Loss on the response tokens of the training rows. Faint: single steps. Strong: mean over a tenth of "
        "the steps. Dashed: held-out rows, if there are any.",
        draw=lambda paths, theme: plot_training(curves, paths, theme=theme),
    )


def _tenths(losses: Sequence[float]) -> tuple[float, float]:
    """Means over the first and the last tenth of the steps; the loss of a single step depends mostly on its batch."""
    count = max(1, round(len(losses) / 10))
    return statistics.fmean(losses[:count]), statistics.fmean(losses[-count:])
