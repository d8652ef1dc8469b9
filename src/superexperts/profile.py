"""What every expert writes: per (layer, expert) the peak of |down_proj output|, where it came from, and token counts.

Shape suffixes: B sequences, L tokens per sequence, N tokens routed to one expert, D hidden size.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from . import moe
from .artifacts import CorpusProfile, ExpertKey, ExpertStats, Profile, key_order
from .config import ProfileConfig, identity
from .console import note, stderr
from .corpora import digest_ids, documents, local_data, pack
from .errors import ModelError, OptionError
from .model import checkpoint_folder, load_model, load_tokenizer
from .plots import plot_heatmap, plot_layers
from .rundir import completed, fingerprint, prepare_folder, write_json, write_manifest
from .select import super_experts

__all__ = ["profile_corpus", "run"]


class _Recorder:
    """Keeps per expert the largest |output| so far and where it was; the first of equals wins.

    Peaks are compared in float32; the tensors seen are never kept.
    """

    def __init__(self, keys: Collection[ExpertKey]) -> None:
        self._rows = {
            key: ExpertStats(
                layer=key[0], expert=key[1], tokens=0, output_max=0.0, channel=None, position=None, token_id=None
            )
            for key in sorted(keys, key=key_order)
        }
        self._ids_BL = torch.empty(0, 0, dtype=torch.long)
        self._real_T = torch.empty(0, dtype=torch.bool)

    def start_batch(self, ids_BL: Tensor, mask_BL: Tensor) -> None:
        self._ids_BL = ids_BL
        self._real_T = mask_BL.flatten().bool()

    def __call__(self, call: moe.ExpertCall) -> None:
        real_N = self._real_T[call.token_N]
        token_N, output_ND = call.token_N[real_N], call.output_ND[real_N]
        if not len(token_N):
            return
        row = self._rows[call.layer, call.expert]
        magnitude_ND = output_ND.float().abs()
        at = int(magnitude_ND.argmax())
        peak = float(magnitude_ND.flatten()[at])
        if not torch.isfinite(magnitude_ND).all():
            raise ModelError(
                f"MODEL: L{call.layer} expert {call.expert} writes a value that is not finite; try --dtype float32"
            )
        changes: dict[str, Any] = {"tokens": row.tokens + len(token_N)}
        if row.tokens == 0 or peak > row.output_max:
            token = int(token_N[at // output_ND.shape[1]])
            changes |= {
                "output_max": peak,
                "channel": at % output_ND.shape[1],
                "position": token % self._ids_BL.shape[1],
                "token_id": int(self._ids_BL.flatten()[token]),
            }
        self._rows[row.key] = dataclasses.replace(row, **changes)

    def rows(self) -> tuple[ExpertStats, ...]:
        return tuple(self._rows.values())


@torch.inference_mode()
def profile_corpus(
    model: nn.Module,
    ids_BL: Tensor,
    *,
    mask_BL: Tensor | None = None,
    batch_size: int = 8,
    description: str | None = None,
) -> CorpusProfile:
    """Runs int64 sequences [B, L] through the model and returns every expert's statistics.

    `mask_BL` (1 for tokens, 0 for padding) keeps padding out of every number. The result does not depend on the batch
    size but for rounding. `description` shows a progress bar. `ModelError` if an expert writes inf or nan.
    """
    mask_BL = torch.ones_like(ids_BL) if mask_BL is None else mask_BL
    device = next(model.parameters()).device
    recorder = _Recorder(moe.expert_keys(moe.find_banks(model)))
    starts: Sequence[int] = range(0, len(ids_BL), batch_size)
    with moe.tapped(model, recorder):
        hidden = description is None or not stderr.is_terminal
        for start in track(starts, description or "", console=stderr, disable=hidden, transient=True):
            ids, mask = ids_BL[start : start + batch_size].to(device), mask_BL[start : start + batch_size].to(device)
            recorder.start_batch(ids, mask)
            # base_model: the decoder without its language-model head, whose logits nothing here needs
            cast(Any, model).base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return CorpusProfile(tokens=int(mask_BL.sum()), experts=recorder.rows())


def run(config: ProfileConfig) -> dict[str, Any]:
    """The command: profiles each corpus, writes profile.json and the pictures."""
    started = time.monotonic()
    names = tuple(dict.fromkeys(config.corpus)) or ("pocket",)
    tokenizer = load_tokenizer(config)
    sequences = {name: _sequences(config, name, tokenizer) for name in names}
    inputs = identity(
        config,
        model=fingerprint(checkpoint_folder(config.model, config.revision)),
        corpora={name: digest_ids(ids_BL) for name, ids_BL in sequences.items()},
    )
    if completed(config.out, "profile", inputs):
        note(f"profile: {config.out} is up to date, nothing to do")
        return summary(Profile.load(config.out), config, tokenizer)
    model = load_model(config)
    context = getattr(moe.text_config(model), "max_position_embeddings", None)  # a state-space model has no limit
    if context is not None and config.seq_len > context:
        raise OptionError(f"--seq-len: {config.seq_len} is over the model's context of {context}; give at most that")
    moe.find_banks(model)
    prepare_folder(config.out)
    profile = Profile(
        model=config.model,
        num_layers=moe.num_layers(model),
        corpora={
            name: profile_corpus(model, ids_BL, batch_size=config.batch_size, description=f"profile {name}")
            for name, ids_BL in sequences.items()
        },
    )
    write_json(config.out / "profile.json", profile.to_json())
    outputs = ["profile.json"]
    for name, corpus in profile.corpora.items():
        chosen = [row.key for row in super_experts(corpus.experts, profile.num_layers, depth=config.depth)]
        stem = "".join(letter if letter.isalnum() else "-" for letter in name)
        for suffix in ("png", "svg"):
            heatmap, layers = f"heatmap-{stem}.{suffix}", f"layers-{stem}.{suffix}"
            plot_heatmap(profile, name, chosen, config.out / heatmap, depth=config.depth)
            plot_layers(profile, name, chosen, config.out / layers, depth=config.depth)
            outputs += [heatmap, layers]
    write_manifest(config.out, "profile", inputs, outputs, time.monotonic() - started)
    return summary(profile, config, tokenizer)


def _sequences(config: ProfileConfig, name: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    texts = documents(name, config.column, local_data(config.data_dir))
    return pack(texts, tokenizer, corpus=name, tokens=config.tokens, seq_len=config.seq_len)


def summary(profile: Profile, config: ProfileConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Per corpus the super experts by the paper's criterion, the ten largest peaks and the unreached experts."""
    corpora = {}
    for name, corpus in profile.corpora.items():
        top = sorted(corpus.experts, key=lambda row: -row.output_max)[:10]
        found = super_experts(corpus.experts, profile.num_layers, depth=config.depth)
        corpora[name] = {
            "tokens": corpus.tokens,
            "super": [row.key for row in found],
            "unreached": sum(row.tokens == 0 for row in corpus.experts),
            "top": [
                dataclasses.asdict(row) | {"token": "" if row.token_id is None else tokenizer.decode([row.token_id])}
                for row in top
            ],
        }
    return {"out": str(config.out), "model": profile.model, "num_layers": profile.num_layers, "corpora": corpora}
