"""Whether an adapter does anything: keys and modules fit, tokens reach its experts, logits move."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor

from . import lora
from .asker import instances, quiet
from .config_adapters import CheckAdapterConfig
from .console import note
from .corpora import documents, local_data, pack
from .errors import DataError
from .folders import adapter_folder
from .model import load_model, load_tokenizer
from .server import api, as_chat, request_url

__all__ = ["gate", "run"]

CHARACTERS = 200
"""Of each text that a server is to continue."""


def run(config: CheckAdapterConfig) -> dict[str, Any]:
    """The command; writes nothing. `DataError` for an adapter that does not fit or changes no logit."""
    if config.base_url is not None:
        return _served(config, config.base_url)
    folder = adapter_folder(config.adapter)
    _, tensors = lora.read_adapter(folder, "ADAPTER")
    tokenizer = load_tokenizer(config)
    data_dir = local_data(config.data_dir)
    texts = documents(config.corpus, data_dir=None if str(data_dir) == "pocket" else data_dir)
    sequences_BL = pack(texts, tokenizer, corpus=config.corpus, tokens=config.tokens, seq_len=config.seq_len)
    adapted = lora.load_adapter(load_model(config), folder, "ADAPTER")
    effect = gate(adapted, list(sequences_BL), folder, "ADAPTER")
    return {
        "adapter": str(folder),
        "corpus": config.corpus,
        "keys": len(tensors),
        **dataclasses.asdict(effect),
        "unreached": [name for name, count in effect.probe_experts.items() if not count],
    }


def _served(config: CheckAdapterConfig, url: str) -> dict[str, Any]:
    """What a server makes of the adapter: greedy continuations under both names; `DataError` where all are the same."""
    data_dir = local_data(config.data_dir)
    texts = documents(config.corpus, data_dir=None if str(data_dir) == "pocket" else data_dir)
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
            f"ADAPTER: {url} continues all {len(beginnings)} prompts of {config.corpus} alike as "
            f"{str(config.adapter)!r} and as {config.model!r}; it may not apply the adapter: check its log, or give "
            "text that the adapter is for"
        )
    return {"adapter": str(config.adapter), "corpus": config.corpus, "prompts": len(beginnings), "differ": differ}


def gate(adapted: PeftModel, sequences: Sequence[Tensor], folder: Path, option: str) -> lora.Effect:
    """Measures the adapter on rows of token ids [L]: `DataError` if no logit changes, a note on experts that no token
    reached."""
    effect = lora.adapter_effect(adapted, sequences)
    unreached = [name for name, count in effect.probe_experts.items() if not count]
    told = f"{', '.join(unreached)} saw none of {effect.probe_tokens:,} probe tokens"
    if effect.none:
        why = f" ({told})" if unreached else ""
        raise DataError(
            f"{option}: {folder} changes no logit of {effect.probe_tokens:,} probe tokens{why}; train it, or give "
            "text that reaches its experts"
        )
    if unreached:
        note(f"{option}: {told}; {len(effect.probe_experts) - len(unreached)} other adapted experts were reached")
    return effect
