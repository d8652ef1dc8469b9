"""The mean output of chosen experts over a corpus, computed with one decoder layer in memory at a time.

Shape suffixes: S sequences, B sequences of a batch, L tokens per sequence, N tokens routed to one expert, D hidden
size.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from superexperts.core.console import progress
from superexperts.core.errors import DataError, Field
from superexperts.core.types import ExpertKey, key_name
from superexperts.models.experts import BankCall
from superexperts.models.hooks import tapped
from superexperts.models.layer_by_layer import Kept, layer_by_layer
from superexperts.models.streaming import StreamedModel

__all__ = ["mean_outputs"]


@torch.inference_mode()
def mean_outputs(
    streamed: StreamedModel, ids_SL: Tensor, experts: Collection[ExpertKey], *, batch_size: int
) -> dict[ExpertKey, Tensor]:
    """For each expert the mean output [D] of its down_proj, bias included, over the tokens routed to it, in float64.

    `ids_SL` are int64 token ids [S, L]. Each token counts once, whatever its routing weight. `DataError` for an expert
    that no token reaches.
    """
    sums: dict[ExpertKey, Tensor] = {}
    counts = dict.fromkeys(experts, 0)

    def add(call: BankCall) -> None:
        for one in call.each():
            key = (one.layer, one.expert)
            if key in counts:
                # float64: a super expert's outputs span from 1e3 to 1e-3, and thousands of them are added.
                added_D = one.output_ND.double().sum(0).cpu()
                sums[key] = sums[key] + added_D if key in sums else added_D
                counts[key] += len(one.token_N)

    # Later layers cannot change what these experts write, so they are never loaded.
    layers = range(max(layer for layer, _ in experts) + 1)
    any_bank = next(iter(streamed.banks.values()))
    batches = [batch_BL.to(streamed.device) for batch_BL in torch.split(ids_SL, batch_size)]
    kept: list[Kept] = [{}] * len(batches)
    with (
        tapped(streamed.model, add, streamed.experts),
        layer_by_layer(streamed.model, any_bank.path) as run,
        streamed.running(layers, batches=len(batches)) as loaded,
        progress("mean outputs", len(layers)) as bar,
    ):
        for layer in loaded:
            for number, ids_BL in enumerate(batches):
                kept[number] = run(layer, kept[number], input_ids=ids_BL, use_cache=False)
            bar()
    unreached = [key_name(key) for key, count in counts.items() if not count]
    if unreached:
        raise DataError(
            f"none of {ids_SL.numel():,} tokens reached {unreached[0]}, so it has no mean; give more ",
            Field("tokens"),
            ", or other text",
            field="corpus",
        )
    return {key: sums[key] / counts[key] for key in experts}
