"""Profile, prune, LoRA-train and evaluate the super experts of Mixture-of-Experts language models.

    import superexperts as se

    model, tokenizer = se.load("pocket")
    profile = se.profile(model, tokenizer, corpus="pocket", tokens=4096, seq_len=128)
    chosen = se.select(profile, rule="super")
    with se.silenced(model, chosen):
        ...

Importing the package takes no time: each function imports what it needs when it is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from superexperts.core.types import ExpertKey, ExpertSet, Profile

__version__ = "0.1.0"

__all__ = ["__version__", "load", "profile", "select", "silenced"]


def load(
    model: str = "pocket",
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer.

    `model` is a checkpoint folder, a Hub name or `pocket`. `dtype` "auto" is the checkpoint's own on a GPU and
    float32 on a CPU. `ModelError` if there is no such checkpoint or if it does not load.
    """
    from superexperts.checkpoints.source import resolve
    from superexperts.models.loading import load_model, load_tokenizer

    source = resolve(model, revision, trust_remote_code=trust_remote_code)
    return load_model(source, device=device, dtype=dtype), load_tokenizer(source)


def profile(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    corpus: str = "pocket",
    tokens: int = 16384,
    seq_len: int = 512,
    batch_size: int = 8,
    depth: float = 0.75,
    column: str | None = None,
    data_dir: Path | None = None,
) -> Profile:
    """What every expert of a model in memory writes on a corpus; the arguments are those of the command `profile`.

    Any Mixture-of-Experts model of transformers 5 that lets its experts implementation be replaced will do, loaded by
    `load` or not. `tokens` counts the BOS of each sequence, and layers from `round(depth x layers)` on are not run.
    """
    from superexperts.core.types import Profile
    from superexperts.data.packing import corpus_sequences
    from superexperts.models.decoder import num_layers
    from superexperts.profiling.measure import profile_corpus

    ids_SL = corpus_sequences(corpus, data_dir, tokenizer, tokens=tokens, seq_len=seq_len, column=column)
    measured = profile_corpus(model, ids_SL, batch_size=batch_size, depth=depth)
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    return Profile(model=name, num_layers=num_layers(model), depth=depth, statistic="all", corpora={corpus: measured})


def select(profile: Profile, rule: str = "super", **settings: Any) -> ExpertSet:
    """Experts chosen from a profile by one of the rules of the command `select`.

    `settings` are those that the rule reads, such as `count=4`; the others keep the command's defaults. `like` may be
    an `ExpertSet`. `OptionError` for a rule that does not exist, or a setting that does not fit the others.
    """
    from superexperts.profiling.select import choose

    return choose(profile, rule, **settings)


def silenced(model: nn.Module, experts: ExpertSet | Collection[ExpertKey]) -> contextlib.AbstractContextManager[None]:
    """Within the block the chosen experts answer 0, as if their `down_proj` were pruned; no weight is touched.

    `experts` is an `ExpertSet` or (layer, expert) pairs, with "shared" for a layer's shared expert.
    """
    from superexperts.core.types import ExpertSet
    from superexperts.models.hooks import silenced as silence

    return silence(model, experts.experts if isinstance(experts, ExpertSet) else experts)
