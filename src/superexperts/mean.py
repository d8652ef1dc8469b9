"""The mean answer of chosen experts over a corpus, with one decoder layer in memory at a time.

Shape suffixes: S sequences, B sequences of a batch, L tokens per sequence, N tokens routed to one expert, D hidden
size.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from . import moe
from .artifacts import ExpertKey, key_name
from .console import progress
from .decoder import layer_by_layer
from .errors import DataError
from .stream import StreamedModel

__all__ = ["mean_outputs"]


@torch.inference_mode()
def mean_outputs(
    streamed: StreamedModel, ids_SL: Tensor, experts: Collection[ExpertKey], *, batch_size: int
) -> dict[ExpertKey, Tensor]:
    """Per expert the mean [D] of its down_proj's output, bias included, over the tokens routed to it, in float64.

    Each token counts once, whatever its routing weight. `DataError` for an expert that no token of `ids_SL` (int64
    [S, L]) reaches.
    """
    sums: dict[ExpertKey, Tensor] = {}
    counts = dict.fromkeys(experts, 0)

    def tap(call: moe.BankCall) -> None:
        for heard in call.each():
            key = (heard.layer, heard.expert)
            if key in counts:
                added_D = heard.output_ND.double().sum(0).cpu()
                sums[key] = sums[key] + added_D if key in sums else added_D
                counts[key] += len(heard.token_N)

    layers = range(max(layer for layer, _ in experts) + 1)
    some = next(iter(streamed.banks.values()))
    batches = [batch_BL.to(streamed.device) for batch_BL in torch.split(ids_SL, batch_size)]
    hidden: list[Tensor | None] = [None] * len(batches)
    with (
        moe.tapped(streamed.model, tap),
        layer_by_layer(streamed.model, some.path) as run,
        streamed.running(layers, whole=True) as loaded,
        progress("mean outputs", len(layers)) as bar,
    ):
        for layer in loaded:
            for number, ids_BL in enumerate(batches):
                hidden[number] = run(layer, hidden[number], input_ids=ids_BL, use_cache=False)
            bar()
    silent = [key_name(key) for key, count in counts.items() if not count]
    if silent:
        told = f"{silent[0]} saw none of {ids_SL.numel():,} tokens, so it has no mean"
        raise DataError(f"--corpus: {told}; give more --tokens, or other text")
    return {key: sums[key] / counts[key] for key in experts}
