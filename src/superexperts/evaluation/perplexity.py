"""Perplexity: exp of the mean negative log-likelihood of a token, the first of each sequence not being predicted.

Shape suffixes: B sequences, L tokens per sequence, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from rich.progress import track
from scipy import stats
from torch import LongTensor, Tensor, nn

from superexperts.core.console import stderr
from superexperts.core.errors import Field, ModelError

__all__ = ["Perplexity", "perplexity", "perplexity_of", "sequence_losses"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A corpus' perplexity over sequences of one length."""

    value: float
    """exp of the mean over all predicted tokens, which is the mean over the sequences."""
    interval: tuple[float, float] | None
    """95%, from Student's t on the sequences' mean losses, which are taken to be independent; None for one sequence."""


@torch.inference_mode()
def sequence_losses(
    model: nn.Module, sequences_BL: LongTensor | Tensor, batch_size: int = 8, *, description: str | None = None
) -> Tensor:
    """Mean negative log-likelihood of the predicted tokens of each full sequence [B, L], L at least 2 -> float64 [B].

    Log-likelihoods are taken in float32 whatever the model's dtype and summed in float64, so that the batch size
    changes nothing but the model's own rounding. `description` shows a progress bar.
    """
    batch, length = sequences_BL.shape
    assert batch > 0, "no sequence"
    assert length > 1, "nothing to predict"
    device = next(model.parameters()).device
    losses = []
    hidden = description is None or not stderr.is_terminal
    starts = range(0, batch, batch_size)
    for start in track(starts, description or "", console=stderr, disable=hidden, transient=True):
        ids_BL = sequences_BL[start : start + batch_size].to(device)
        logits_BLV = cast(Any, model)(input_ids=ids_BL, use_cache=False).logits[:, :-1].float()
        loss_N = F.cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten(), reduction="none")
        losses.append(loss_N.view(len(ids_BL), length - 1).double().mean(1).cpu())
    return torch.cat(losses)


def perplexity_of(losses_B: Tensor) -> Perplexity:
    """From the losses of sequences of one length. `ModelError` if a logit was not a number, or if the model is so sure
    and so wrong that the result overflows."""
    mean = float(losses_B.mean())
    if math.isnan(mean):
        raise ModelError("a logit is not a number; try ", Field("dtype"), " float32", field="model")
    if mean > 700:
        raise ModelError(
            f"its perplexity is exp({mean:.0f}), more than a number holds; check the checkpoint", field="model"
        )
    if len(losses_B) == 1:
        return Perplexity(value=math.exp(mean), interval=None)
    half = float(stats.t.ppf(0.975, len(losses_B) - 1)) * float(losses_B.std()) / math.sqrt(len(losses_B))
    return Perplexity(value=math.exp(mean), interval=(math.exp(mean - half), math.exp(min(mean + half, 700))))


def perplexity(model: nn.Module, sequences_BL: LongTensor | Tensor, batch_size: int = 8) -> float:
    """The perplexity alone."""
    return perplexity_of(sequence_losses(model, sequences_BL, batch_size)).value
