"""Perplexity: exp of the mean negative log-likelihood of a token, the first of each sequence not being predicted.

Shape suffixes: B sequences, L tokens per sequence, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import LongTensor, Tensor, nn

from .console import stderr
from .errors import ModelError

__all__ = ["perplexity"]


@torch.inference_mode()
def perplexity(
    model: nn.Module, sequences_BL: LongTensor | Tensor, batch_size: int = 8, *, description: str | None = None
) -> float:
    """Perplexity of full sequences of token ids [B, L], L at least 2, without padding.

    Log-likelihoods are taken in float32 whatever the model's dtype and summed in float64, so that the batch size
    changes nothing but the model's own rounding. `ModelError` if a logit is not a number, or if
    the model is so sure and so wrong that the result overflows. `description` shows a progress bar.
    """
    batch, length = sequences_BL.shape
    assert batch > 0, "no sequence"
    assert length > 1, "nothing to predict"
    device = next(model.parameters()).device
    total = 0.0
    hidden = description is None or not stderr.is_terminal
    starts = range(0, batch, batch_size)
    for start in track(starts, description or "", console=stderr, disable=hidden, transient=True):
        ids_BL = sequences_BL[start : start + batch_size].to(device)
        logits_BLV = cast(Any, model)(input_ids=ids_BL, use_cache=False).logits[:, :-1].float()
        loss_N = F.cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten(), reduction="none")
        total += float(loss_N.double().sum())
    mean = total / (batch * (length - 1))
    if math.isnan(mean):
        raise ModelError("MODEL: a logit is not a number; try --dtype float32")
    if mean > 700:
        raise ModelError(f"MODEL: its perplexity is exp({mean:.0f}), more than a number holds; check the checkpoint")
    return math.exp(mean)
