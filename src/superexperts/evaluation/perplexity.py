"""Perplexity: exp of the mean negative log-likelihood of a token, the first of each sequence not being predicted.

Shape suffixes: B sequences, L tokens per sequence, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from rich.progress import track
from scipy import stats
from torch import LongTensor, Tensor, nn
from transformers import PreTrainedTokenizerBase

from superexperts.core.console import is_main_process, stderr
from superexperts.core.distributed import gathered, my_share
from superexperts.core.errors import Field, ModelError
from superexperts.core.runs import write_json
from superexperts.data.packing import corpus_sequences, reference_windows
from superexperts.models.finite import not_finite_error

__all__ = [
    "Perplexity",
    "measured_perplexity",
    "perplexity",
    "perplexity_of",
    "sequence_losses",
    "sequences_of",
    "write_perplexity",
]

PERPLEXITY_SCHEMA = "superexperts/perplexity/1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The perplexity of a corpus over sequences of one length."""

    value: float
    """exp of the mean over all predicted tokens, which is the mean over the sequences."""
    interval: tuple[float, float] | None
    """95%, by Student's t on the mean losses of the sequences, taken as independent; None for one sequence."""


def sequences_of(
    corpus: str,
    data_dir: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    column: str | None,
    seq_len: int,
    tokens: int | None,
) -> Tensor:
    """Token ids [B, L] of a corpus; without `tokens` all of it, in the windows of the paper's code."""
    if tokens is None:
        return reference_windows(corpus, data_dir, tokenizer, seq_len=seq_len, column=column)
    return corpus_sequences(corpus, data_dir, tokenizer, tokens=tokens, seq_len=seq_len, column=column)


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
    """The perplexity from the mean losses (nats) of sequences of one length.

    `ModelError` if a logit was not a number, or if the result overflows.
    """
    mean = float(losses_B.mean())
    if math.isnan(mean):
        raise ModelError("a logit is not a number; try ", Field("dtype"), " float32", field="model")
    # exp overflows float64 at about 709.
    if mean > 700:
        raise ModelError(
            f"its perplexity is exp({mean:.0f}), more than a number holds; check the checkpoint", field="model"
        )
    if len(losses_B) == 1:
        return Perplexity(value=math.exp(mean), interval=None)
    # The interval is computed on the mean loss, where it is symmetric, and then exponentiated.
    half = float(stats.t.ppf(0.975, len(losses_B) - 1)) * float(losses_B.std()) / math.sqrt(len(losses_B))
    return Perplexity(value=math.exp(mean), interval=(math.exp(mean - half), math.exp(min(mean + half, 700))))


def measured_perplexity(model: nn.Module, sequences_BL: LongTensor | Tensor, *, description: str) -> Perplexity:
    """The perplexity over sequences [B, L]. Each process takes its share of them, and all return the same result."""
    mine = my_share(range(len(sequences_BL)))
    losses: dict[int, float] = {}
    if mine:
        found = sequence_losses(model, sequences_BL[list(mine)], description=description)
        losses = dict(zip(mine, found.tolist(), strict=True))
    for part in gathered(losses):
        losses |= part
    losses_B = torch.tensor([losses[i] for i in range(len(sequences_BL))], dtype=torch.float64)
    if not losses_B.isfinite().all():
        raise not_finite_error(model, torch.as_tensor(sequences_BL[int((~losses_B.isfinite()).nonzero()[0, 0])]))
    return perplexity_of(losses_B)


def perplexity(model: nn.Module, sequences_BL: LongTensor | Tensor, batch_size: int = 8) -> float:
    """The perplexity alone."""
    return perplexity_of(sequence_losses(model, sequences_BL, batch_size)).value


def write_perplexity(
    folder: Path, measured: Perplexity, corpus: str, sequences_BL: Tensor, reference_windows: bool
) -> None:
    """Writes perplexity.json, in the main process only, with what it was measured on."""
    value = {
        "schema": PERPLEXITY_SCHEMA,
        "corpus": corpus,
        "tokens": sequences_BL.numel(),
        "seq_len": sequences_BL.shape[1],
        "reference_windows": reference_windows,
        "perplexity": measured.value,
        "interval": measured.interval,
    }
    if is_main_process:
        write_json(folder / "perplexity.json", value)
