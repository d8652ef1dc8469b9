"""The mean answer of chosen experts over a corpus, with one decoder layer in memory at a time.

Shape suffixes: S sequences, B sequences of a batch, L tokens per sequence, N tokens routed to one expert, D hidden
size.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from superexperts.checkpoints.reader import Checkpoint
from superexperts.checkpoints.source import resolve
from superexperts.core.config_surgery import PruneConfig
from superexperts.core.console import progress
from superexperts.core.errors import DataError, Field
from superexperts.core.types import ExpertKey, key_name
from superexperts.data.corpora import corpus_sequences
from superexperts.models.decoder import layer_by_layer
from superexperts.models.experts import BankCall
from superexperts.models.hooks import tapped
from superexperts.models.loading import empty_model, load_tokenizer, pick_device
from superexperts.models.streaming import StreamedModel

__all__ = ["mean_outputs", "means", "sequences"]


def sequences(config: PruneConfig) -> Tensor:
    """The corpus that the options name, as int64 token ids [S, L]."""
    return corpus_sequences(
        config.corpus,
        config.data_dir,
        load_tokenizer(resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code)),
        tokens=config.tokens,
        seq_len=config.seq_len,
        column=config.column,
    )


def means(
    config: PruneConfig, base: Checkpoint, ids_SL: Tensor, experts: Collection[ExpertKey]
) -> dict[ExpertKey, Tensor]:
    """`mean_outputs` of a checkpoint, in float32 on a CPU, else in the checkpoint's dtype."""
    device = pick_device(config.device)
    source = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    dtype = "float32" if device.type == "cpu" else "auto"
    streamed = StreamedModel(empty_model(source, device=config.device, dtype=dtype), base, device)
    return mean_outputs(streamed, ids_SL, experts, batch_size=config.batch_size)


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

    def tap(call: BankCall) -> None:
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
        tapped(streamed.model, tap, streamed.experts),
        layer_by_layer(streamed.model, some.path) as run,
        streamed.running(layers, batches=len(batches)) as loaded,
        progress("mean outputs", len(layers)) as bar,
    ):
        for layer in loaded:
            for number, ids_BL in enumerate(batches):
                hidden[number] = run(layer, hidden[number], input_ids=ids_BL, use_cache=False)
            bar()
    silent = [key_name(key) for key, count in counts.items() if not count]
    if silent:
        told = f"{silent[0]} saw none of {ids_SL.numel():,} tokens, so it has no mean"
        raise DataError(f"{told}; give more ", Field("tokens"), ", or other text", field="corpus")
    return {key: sums[key] / counts[key] for key in experts}
