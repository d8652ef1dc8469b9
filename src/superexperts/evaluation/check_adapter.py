"""The command `check-adapter`: does an adapter fit its model, does text reach its experts, and do logits change?"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from superexperts.checkpoints.source import adapter_folder, local_folder, resolve
from superexperts.core.console import stdout
from superexperts.core.errors import DataError, Field
from superexperts.core.settings import (
    SERVER_OPTIONS,
    SeededConfig,
    ServerConfig,
    Switch,
    require,
    require_device,
    require_seed,
    require_sequences,
    require_unused,
    require_url,
)
from superexperts.data.corpora import local_data, require_corpus

__all__ = ["CheckAdapterConfig", "run", "show"]

PROMPT_CHARACTERS = 200
"""How much of each text a server is given to continue."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckAdapterConfig(ServerConfig, SeededConfig):
    """Does the adapter fit the model, does text reach it, and does it change anything? Exit code 2 if it does not.

    Example: superexperts check-adapter pocket runs/lora --tokens 2048

    Example: superexperts check-adapter BASE ADAPTER --base-url http://localhost:8000/v1
    """

    adapter: Positional[Annotated[Path, tyro.conf.arg(metavar="ADAPTER")]]
    """Adapter folder, or the output folder of `train` that holds it."""
    corpus: str = "pocket"
    """Probe text; names as for profile."""
    column: str | None = None
    """Column of a .jsonl file or Hub data set that holds the text; default: text."""
    tokens: int = 2048
    """Probe tokens, the BOS of each sequence included."""
    seq_len: int = 256
    """Tokens per sequence."""
    base_url: str | None = None
    """Check what an OpenAI-compatible server does with the adapter instead; MODEL and ADAPTER are its names for the
    base model and for the adapter."""
    prompts: int = 32
    """Server: how many texts both continue from their beginning."""
    max_new_tokens: int = 32
    """Server: tokens of each continuation."""
    data_dir: Path | None = None
    """Folder of local data files instead of the Hub; default: the environment's SUPEREXPERTS_DATA."""
    json: Switch = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_sequences(self.tokens, self.seq_len)
        require_device(self.device)
        require_seed(self.seed)
        require(self.prompts > 0, "prompts", self.prompts, "is not positive; give at least 1")
        require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "is not positive; give at least 1")
        if self.base_url is None:
            of_a_server = ["prompts", "max_new_tokens", *SERVER_OPTIONS]
            require_unused(self, of_a_server, "without ", Field("base_url"))
        else:
            require_url("base_url", self.base_url)
            of_loading = ["tokens", "seq_len", "revision", "trust_remote_code", "dtype"]
            require_unused(self, of_loading, "with ", Field("base_url"), ", where the server runs the model")
            adapter = str(self.adapter)
            require(
                adapter != self.model,
                "adapter",
                adapter,
                "is also given as ",
                Field("model"),
                "; give the server's name for the adapter",
            )


def check(config: CheckAdapterConfig) -> None:
    """What is wrong without looking into the files, before any library is imported."""
    require_corpus(config.corpus)
    local_data(config.data_dir)
    if config.base_url is None:
        adapter_folder(config.adapter)
        local_folder(config.model)


def run(config: CheckAdapterConfig) -> dict[str, Any]:
    """Checks the adapter and returns the numbers that `show` prints; writes nothing.

    `DataError` or `ModelError` for an adapter that does not fit the model, `DataError` for one that changes nothing.
    """
    if config.base_url is not None:
        return _check_served(config, config.base_url)
    # Imported here, so that --help and a wrong option do not wait for torch.
    from superexperts.adapters.effect import require_effect
    from superexperts.adapters.files import read_adapter
    from superexperts.adapters.lora import load_adapter
    from superexperts.data.packing import corpus_sequences
    from superexperts.models.loading import load_model, load_tokenizer

    folder = adapter_folder(config.adapter)
    _, tensors = read_adapter(folder, "adapter")
    source = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    tokenizer = load_tokenizer(source)
    sequences_BL = corpus_sequences(
        config.corpus, config.data_dir, tokenizer, tokens=config.tokens, seq_len=config.seq_len, column=config.column
    )
    adapted = load_adapter(load_model(source, device=config.device, dtype=config.dtype), folder, "adapter")
    effect = require_effect(adapted, list(sequences_BL), folder, "adapter")
    return {
        "adapter": str(folder),
        "corpus": config.corpus,
        "keys": len(tensors),
        **dataclasses.asdict(effect),
        "unreached": effect.unreached,
    }


def _check_served(config: CheckAdapterConfig, url: str) -> dict[str, Any]:
    """Compares a server's greedy continuations under the base model's name and the adapter's; `DataError` if all are
    the same."""
    # Imported here, so that --help and a wrong option do not wait for the harness.
    from superexperts.data.corpora import corpus_texts
    from superexperts.engines.harness import instances, quiet
    from superexperts.engines.server import api, as_chat, request_url

    texts = corpus_texts(config.corpus, config.data_dir, config.column)
    beginnings = [
        text[:PROMPT_CHARACTERS] for text in itertools.islice((t for t in texts if t.strip()), config.prompts)
    ]
    replies = []
    for name in (config.model, str(config.adapter)):
        server = api(
            name,
            request_url(url),
            concurrency=config.concurrency,
            timeout=config.timeout,
            retries=config.retries,
            seed=config.seed,
        )
        prompts = as_chat(server, beginnings)
        with quiet():
            replies.append(server.generate_until(instances(prompts, config.max_new_tokens)))
    differ = sum(base != adapted for base, adapted in zip(*replies, strict=True))
    if not differ:
        raise DataError(
            f"{url} continues all {len(beginnings)} prompts of {config.corpus} alike as {str(config.adapter)!r} and as "
            f"{config.model!r}; it may not apply the adapter: check its log, or give text that the adapter is for",
            field="adapter",
        )
    return {"adapter": str(config.adapter), "corpus": config.corpus, "prompts": len(beginnings), "differ": differ}


def show(result: dict[str, Any]) -> None:
    """Prints what `run` returned."""
    if "differ" in result:
        counts = f"{result['differ']:,} of {result['prompts']:,} continuations of {result['corpus']} differ"
        stdout.print(f"{counts} as {result['adapter']}", soft_wrap=True, markup=False)
        return
    share = "" if result["probe_share"] is None else f"; {100 * result['probe_share']:.1f}% reach an adapted expert"
    stdout.print(f"{result['keys']:,} keys, each in its place", soft_wrap=True)
    stdout.print(f"{result['probe_tokens']:,} probe tokens of {result['corpus']}{share}", soft_wrap=True, markup=False)
    for name, tokens in result["probe_experts"].items():
        stdout.print(f"{name}: {tokens:,} tokens")
    stdout.print(f"logits change by up to {result['max_logit_change']:.3g} (KL {result['kl']:.3g} nats)")
