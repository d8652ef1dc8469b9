"""Whether an adapter does anything: keys and modules fit, tokens reach its experts, logits move.

Shape suffixes: B sequences, L tokens per sequence, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from superexperts.adapters import lora
from superexperts.adapters.exposure import counting
from superexperts.checkpoints.source import adapter_folder
from superexperts.core.config_adapters import CheckAdapterConfig
from superexperts.core.console import note
from superexperts.core.errors import DataError, EffectError, Field, OptionError
from superexperts.data.corpora import corpus_sequences, corpus_texts
from superexperts.engines.harness import instances, quiet
from superexperts.engines.server import api, as_chat, request_url
from superexperts.models.loading import load_model, load_tokenizer

__all__ = ["Effect", "adapter_effect", "gate", "run"]

CHARACTERS = 200
"""Of each text that a server is to continue."""


def run(config: CheckAdapterConfig) -> dict[str, Any]:
    """The command; writes nothing. `DataError` for an adapter that does not fit or changes no logit."""
    if config.base_url is not None:
        return _served(config, config.base_url)
    folder = adapter_folder(config.adapter)
    _, tensors = lora.read_adapter(folder, "adapter")
    tokenizer = load_tokenizer(config)
    sequences_BL = corpus_sequences(
        config.corpus, config.data_dir, tokenizer, tokens=config.tokens, seq_len=config.seq_len, column=config.column
    )
    adapted = lora.load_adapter(load_model(config), folder, "adapter")
    effect = gate(adapted, list(sequences_BL), folder, "adapter")
    return {
        "adapter": str(folder),
        "corpus": config.corpus,
        "keys": len(tensors),
        **dataclasses.asdict(effect),
        "unreached": [name for name, count in effect.probe_experts.items() if not count],
    }


def _served(config: CheckAdapterConfig, url: str) -> dict[str, Any]:
    """What a server makes of the adapter: greedy continuations under both names; `DataError` where all are the same."""
    texts = corpus_texts(config.corpus, config.data_dir, config.column)
    beginnings = [text[:CHARACTERS] for text in itertools.islice((t for t in texts if t.strip()), config.prompts)]
    replies = []
    for name in (config.model, str(config.adapter)):
        asker = api(
            name,
            request_url(url),
            concurrency=config.concurrency,
            timeout=config.timeout,
            retries=config.retries,
            seed=config.seed,
        )
        prompts = as_chat(asker, beginnings)
        with quiet():
            replies.append(asker.generate_until(instances(prompts, config.max_new_tokens)))
    differ = sum(base != adapted for base, adapted in zip(*replies, strict=True))
    if not differ:
        raise DataError(
            (
                f"{url} continues all {len(beginnings)} prompts of {config.corpus} alike as "
                f"{str(config.adapter)!r} and as {config.model!r}; it may not apply the adapter: check its log, "
                "or give text that the adapter is for"
            ),
            field="adapter",
        )
    return {"adapter": str(config.adapter), "corpus": config.corpus, "prompts": len(beginnings), "differ": differ}


def gate(adapted: PeftModel, sequences: Sequence[Tensor], folder: Path, field: str) -> Effect:
    """Measures the adapter on rows of token ids [L]: `DataError` if no logit changes, a note on experts that no token
    reached."""
    effect = adapter_effect(adapted, sequences)
    unreached = [name for name, count in effect.probe_experts.items() if not count]
    told = f"{', '.join(unreached)} saw none of {effect.probe_tokens:,} probe tokens"
    if effect.none:
        why = f" ({told})" if unreached else ""
        raise DataError(
            (
                f"{folder} changes no logit of {effect.probe_tokens:,} probe tokens{why}; train it, or give text "
                "that reaches its experts"
            ),
            field=field,
        )
    if unreached:
        note(f"{field}: {told}; {len(effect.probe_experts) - len(unreached)} other adapted experts were reached")
    return effect


# ---- what an adapter does ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """How far an adapter moves a model on some text."""

    max_logit_change: float
    """Largest |logit with the adapter - logit without|."""
    kl: float
    """KL(with || without) of the next token in nats, mean over positions."""
    probe_tokens: int
    """Tokens of the text."""
    probe_share: float | None
    """Share of them that reach an adapted expert in some layer; None for an adapter on no expert."""
    probe_experts: dict[str, int]
    """How many of them each adapted expert sees."""

    @property
    def none(self) -> bool:
        """Whether no logit moves."""
        return not self.max_logit_change > 0


@contextlib.contextmanager
def _scaled_to_zero(model: nn.Module) -> Iterator[None]:
    scalings = [module.scaling for module in model.modules() if isinstance(module, LoraLayer)]
    before = [dict(scaling) for scaling in scalings]
    for scaling in scalings:
        scaling.update(dict.fromkeys(scaling, 0.0))
    try:
        yield
    finally:
        for scaling, values in zip(scalings, before, strict=True):
            scaling.update(values)


@torch.no_grad()
def adapter_effect(model: PeftModel, sequences_BL: Iterable[Tensor]) -> Effect:
    """Compares the model with its adapter against itself without, on rows of token ids [L] (lengths may differ).

    "Without" keeps the layers in place and sets their scaling to 0: the same sums in the same order, so that an adapter
    that does nothing measures exactly 0, where `disable_adapter` would leave the last bits of another order of sums.
    Rows run one by one, so nothing is padded and at most two [L, V] tensors are held.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    change, divergence, positions = 0.0, 0.0, 0
    with counting(model, training=False) as exposure:
        for ids_L in sequences_BL:
            ids_BL = ids_L[None].to(next(model.parameters()).device)
            exposure.on = True
            with_LV = model(input_ids=ids_BL, use_cache=False).logits[0].float()
            exposure.on = False
            with _scaled_to_zero(model):
                without_LV = model(input_ids=ids_BL, use_cache=False).logits[0].float()
            if not with_LV.isfinite().all():
                raise EffectError(
                    "the adapter makes logits that are not finite: training diverged; lower ", Field("learning_rate")
                )
            change = max(change, float((with_LV - without_LV).abs().max()))
            divergence += float(
                F.kl_div(without_LV.log_softmax(-1), with_LV.log_softmax(-1), reduction="sum", log_target=True)
            )
            positions += len(ids_L)
    for module, training in modes:
        module.training = training
    if not positions:
        raise OptionError("no row to measure the adapter's effect on; give at least one", field="data")
    return Effect(
        max_logit_change=change,
        kl=divergence / positions,
        probe_tokens=positions,
        probe_share=exposure.share() if exposure.experts else None,
        probe_experts=exposure.by_expert(together=False),  # every process measures the same rows
    )
