"""Measures a profile: opens a model in the way that was chosen, and runs a corpus through it.

Shape suffixes: B sequences, L tokens per sequence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from superexperts.checkpoints import float8
from superexperts.checkpoints.source import ModelSource
from superexperts.core.console import note, progress
from superexperts.core.distributed import my_share
from superexperts.core.types import CorpusProfile, Statistic
from superexperts.models.cpu_attention import padded_values
from superexperts.models.decoder import stopped_after
from superexperts.models.hooks import tapped
from superexperts.models.loading import empty_model, load_model, pick_device, settings_of
from superexperts.models.streaming import StreamedModel
from superexperts.profiling.accumulator import Accumulator, merged
from superexperts.profiling.streamed import banks_below, profile_streamed, quick_look

__all__ = ["Way", "opened", "profile_corpus"]

Way = Literal["in memory", "streamed", "quick"]


@torch.inference_mode()
def profile_corpus(
    model: nn.Module,
    ids_BL: Tensor,
    *,
    mask_BL: Tensor | None = None,
    batch_size: int = 8,
    depth: float = 1.0,
    description: str | None = None,
) -> CorpusProfile:
    """Runs int64 sequences [B, L] through the model and returns the statistics of every expert.

    `mask_BL` (1 for tokens, 0 for padding) keeps padding out of every number. Apart from rounding, the result does not
    depend on the batch size. Only layers below round(depth x layers) are run, up to their last experts; the profile has
    no others. `description` shows a progress bar. `ModelError` if an expert writes inf or nan.
    """
    mask_BL = torch.ones_like(ids_BL) if mask_BL is None else mask_BL
    device = next(model.parameters()).device
    banks = banks_below(model, depth)
    accumulator = Accumulator(model, banks, ids_BL)
    starts = my_share(range(0, len(ids_BL), batch_size))
    with (
        tapped(model, accumulator),
        padded_values(),
        stopped_after(model, banks[-1].path, banks[-1].layer) as forward,
        progress(description, len(starts)) as bar,
    ):
        for start in starts:
            ids, mask = ids_BL[start : start + batch_size].to(device), mask_BL[start : start + batch_size].to(device)
            accumulator.start_batch(start, mask)
            # Without padding no mask is passed: attention that is only causal has faster kernels.
            forward(input_ids=ids, attention_mask=None if bool(mask.all()) else mask, use_cache=False)
            bar()
    return CorpusProfile(tokens=int(mask_BL.sum()), experts=merged(accumulator).rows())


@contextlib.contextmanager
def opened(
    source: ModelSource,
    *,
    way: Way,
    device: str,
    dtype: str,
    spread: bool,
    depth: float,
    statistic: Statistic,
    batch_size: int,
    budget: int,
    folder: Path,
) -> Iterator[tuple[nn.Module, Callable[[str, Tensor], CorpusProfile]]]:
    """Yields the model, without weights unless it is in memory, and a function that profiles one corpus on it.

    The function takes the name of the corpus, for the progress bar, and its int64 token ids [B, L]. `budget` bytes of
    hidden states of a streamed model stay in memory, the others go to a file in `folder`.
    """
    if way == "in memory":
        model = load_model(source, device=device, dtype=dtype, spread=spread)
        yield (
            model,
            lambda name, ids_BL: profile_corpus(
                model, ids_BL, batch_size=batch_size, depth=depth, description=f"profile {name}"
            ),
        )
        return
    with float8.opened(source.folder, settings_of(source), source.field) as checkpoint:
        empty = empty_model(source, device=device, dtype=dtype)
        streamed = StreamedModel(empty, checkpoint, pick_device(device))

        def profile_one(name: str, ids_BL: Tensor) -> CorpusProfile:
            description = f"profile {name}"
            if way == "quick":
                return quick_look(streamed, ids_BL, depth=depth, statistic=statistic, description=description)
            return profile_streamed(
                streamed,
                ids_BL,
                batch_size=batch_size,
                depth=depth,
                budget=budget,
                folder=folder,
                description=description,
            )

        yield streamed.model, profile_one
        note(f"profile: {checkpoint.bytes_read / 1e9:.3g} GB of weights were read")
