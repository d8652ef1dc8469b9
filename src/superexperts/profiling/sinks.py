"""Attention sinks: the share of attention on the first token, by layer and head, with and without some experts.

Shape suffixes: B sequences, H heads, Q and K query and key positions.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from rich.progress import track
from torch import Tensor, nn

from superexperts.core.console import stderr
from superexperts.core.errors import Field, ModelError
from superexperts.core.types import ExpertKey, key_name
from superexperts.models.banks import find_banks
from superexperts.models.decoder import decoder_layers, language_model, text_config
from superexperts.models.hooks import silenced
from superexperts.plotting import LIGHT, PAGE, Theme, figure_in, put_title, save

__all__ = ["SINKS_SCHEMA", "SinkReport", "attention_sinks", "compare_sinks", "plot_sinks"]

SINKS_SCHEMA = "superexperts/sinks/1"
A_SINK = 0.01
"""Heads that give the first token a smaller share than this have no sink and are left out of the decay."""

Shares = dict[int, tuple[float, ...]]
"""Layer -> for each head the mean share of attention on the first token. Layers without attention are left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinkReport:
    """`sinks.json`: the sinks of the unchanged model, and with `experts` silent."""

    model: str
    corpus: str
    experts: tuple[ExpertKey, ...]
    before: Shares
    after: Shares

    @property
    def decay(self) -> dict[int, float | None]:
        """For each layer the lost share of the sink: the mean over its heads of 1 - after / before.

        This is our reading of the attention sink decay rate D_sink of arXiv 2507.23279. Heads under 1% before are left
        out; None for a layer that has no others.
        """
        found: dict[int, float | None] = {}
        for layer, before in self.before.items():
            lost = [1 - b / a for a, b in zip(before, self.after[layer], strict=True) if a >= A_SINK]
            found[layer] = sum(lost) / len(lost) if lost else None
        return found

    def to_json(self) -> dict[str, Any]:
        """A JSON value that names its schema."""
        layers = [
            {"layer": layer, "before": self.before[layer], "after": self.after[layer], "decay": self.decay[layer]}
            for layer in self.before
        ]
        experts = [key_name(key) for key in self.experts]
        return {
            "schema": SINKS_SCHEMA, "model": self.model, "corpus": self.corpus, "experts": experts, "layers": layers,
        }  # fmt: skip


@torch.inference_mode()
def attention_sinks(model: nn.Module, ids_BL: Tensor, *, description: str | None = None) -> Shares:
    """The mean share of attention that int64 sequences [B, L] give their first token, over all other positions.

    Attention on a learned sink (gpt_oss) falls on no token and is not counted. Sequences run one by one and each
    layer's attention is reduced at once, so that only H x L x L values are in memory. `ModelError` if no layer returns
    its attention weights.
    """
    sums: dict[int, Tensor] = {}

    def hook(layer: int, _: nn.Module, __: Any, output: Any) -> None:
        weights_BHQK = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        # An attention module returns its output and its weights; a decoder layer or a router returns something else.
        if isinstance(weights_BHQK, Tensor) and weights_BHQK.ndim == 4 and weights_BHQK.shape[-2] == ids_BL.shape[1]:
            # Query 0 can attend only to itself, so its share is always 1 and is left out.
            share_H = weights_BHQK[:, :, 1:, 0].double().mean((0, 2)).cpu()
            sums[layer] = sums.get(layer, torch.zeros_like(share_H)) + share_H

    device, path = next(model.parameters()).device, find_banks(model)[0].path
    language = language_model(model, path)
    with contextlib.ExitStack() as hooks:
        for number, layer in enumerate(decoder_layers(model, path)):
            for module in layer.children():
                handle = module.register_forward_hook(lambda *call, number=number: hook(number, *call))
                hooks.callback(handle.remove)
        hooks.enter_context(_eager_attention(language))
        hidden = description is None or not stderr.is_terminal
        for ids in track(torch.split(ids_BL, 1), description or "", console=stderr, disable=hidden, transient=True):
            language(input_ids=ids.to(device), use_cache=False)
    if not sums:
        family = text_config(model).model_type
        raise ModelError(f"{family} returns no attention weights; leave out ", Field("sinks"), field="model")
    return {layer: tuple((sums[layer] / len(ids_BL)).tolist()) for layer in sorted(sums)}


def compare_sinks(
    model: nn.Module, ids_BL: Tensor, experts: Collection[ExpertKey], *, name: str, corpus: str
) -> SinkReport:
    """The sinks with all experts, and with `experts` silent."""
    before = attention_sinks(model, ids_BL, description="sinks")
    with silenced(model, experts):
        after = attention_sinks(model, ids_BL, description="sinks, experts silent")
    return SinkReport(model=name, corpus=corpus, experts=tuple(experts), before=before, after=after)


@contextlib.contextmanager
def _eager_attention(language: nn.Module) -> Iterator[None]:
    """Within the block attention of a language model uses the one implementation that returns its weights. Parts for
    pictures and sound keep theirs, which may be the only one that they have."""
    before = cast(Any, language).config._attn_implementation
    cast(Any, language).set_attn_implementation("eager")
    try:
        yield
    finally:
        cast(Any, language).set_attn_implementation(before)


def plot_sinks(report: SinkReport, path: Path | Sequence[Path], theme: Theme = LIGHT) -> None:
    """Layers by heads: attention on the first token with all experts, and with some silent; beside each layer its decay
    (`SinkReport.decay`, the paper's D_sink). The suffix of each path decides between PNG and SVG."""
    layers = list(report.before)
    heads = max(map(len, report.before.values()))
    height = min(7.0, max(1.0, 0.16 * len(layers) + 0.4)) + 1.0
    with figure_in(PAGE, height, theme) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        named = ", ".join(map(key_name, report.experts[:4])) + (" and more" if len(report.experts) > 4 else "")
        for axes, shares, title in ((left, report.before, "all experts"), (right, report.after, f"{named} silent")):
            share_LH = np.full((len(layers), heads), np.nan)
            for row, layer in enumerate(layers):
                share_LH[row, : len(shares[layer])] = shares[layer]
            image = axes.imshow(
                share_LH,
                cmap=LinearSegmentedColormap.from_list("sinks", theme.scale),
                vmin=0,
                vmax=1,
                aspect="auto",
                interpolation="none",
            )
            axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
            axes.set_xlabel("head")
            axes.set_xticks(range(0, heads, max(1, heads // 8)))
            put_title(axes, "Attention on the first token", title, PAGE / 2)
        beside: Any = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 6.5}
        for row, layer in enumerate(layers):
            lost = report.decay[layer]
            label = "no sink" if lost is None else f"{100 * lost:.0f}%".replace("-", "\N{MINUS SIGN}")
            right.annotate(label, (1, row), xytext=(4, 0), va="center", color=theme.ink, **beside)
        top: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 6.5}
        right.annotate("D_sink", (1, 1), xytext=(4, 3), color=theme.muted, **top)
        left.set_ylabel("layer")
        bar = figure.colorbar(image, ax=[left, right], pad=0.015, shrink=0.9)
        bar.outline.set_visible(False)
        save(figure, path)
