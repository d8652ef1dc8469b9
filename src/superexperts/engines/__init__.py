"""The registry of engines: what can run a model and answer prompts. To add one: write a file like `vllm.py`, and add
its line here.

Nothing heavy is imported here: the command line needs the names of the engines before it loads any library.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from superexperts.core.errors import Field, OptionError

__all__ = ["ENGINES", "Engine", "Opening", "in_process_engines", "open_engine", "require_engine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """What runs a model."""

    help: str
    """What it is, for the help of the command line."""
    module: str | None = None
    """Module with a function `open_engine(opening)`, which returns a `HarnessModel`. None for transformers: the
    caller loads that model."""
    package: str | None = None
    """Python package that must be installed."""
    in_process: bool = False
    """Whether the model is a transformers model in this process, so that it can take adapters, silence experts, and
    measure perplexity."""
    server: bool = False
    """Whether a server runs the model, which is then known by its name there only."""
    loglikelihood: bool = True
    """Whether it returns log-probabilities of given text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opening:
    """What an engine may need to open a model; it takes what it has a use for."""

    model: str
    """The model's name on the server; for the other engines it stands in messages only."""
    folder: Path | None = None
    """The checkpoint; None for a server."""
    dtype: str = "auto"
    trust_remote_code: bool = False
    batch_size: int = 64
    max_new_tokens: int = 512
    seed: int = 0
    base_url: str | None = None
    """URL of the server."""
    concurrency: int = 8
    """Requests at a time."""
    timeout: float = 300
    """Seconds that a request may take."""
    retries: int = 3
    """How often a failed request is repeated."""


ENGINES: dict[str, Engine] = {
    "hf": Engine(help="transformers in this process", in_process=True),
    "vllm": Engine(help="vLLM", module="superexperts.engines.vllm", package="vllm"),
    "sglang": Engine(help="SGLang", module="superexperts.engines.sglang", package="sglang"),
    "api": Engine(
        help="an OpenAI-compatible server (MODEL is then its name there)",
        module="superexperts.engines.server",
        server=True,
        loglikelihood=False,
    ),
}
"""Name -> engine."""


def in_process_engines() -> tuple[str, ...]:
    """Names of the engines that can take adapters, silence experts, and measure perplexity."""
    return tuple(name for name, engine in ENGINES.items() if engine.in_process)


def require_engine(name: str, field: str = "engine") -> None:
    """`OptionError` about `field` if the package that the engine needs is not installed."""
    package = ENGINES[name].package
    if package is not None and importlib.util.find_spec(package) is None:
        raise OptionError(
            f"{name!r} needs the package {package}, which is not installed; pip install {package}, or use ",
            Field(field),
            " hf",
            field=field,
        )


def open_engine(name: str, opening: Opening) -> Any:
    """The `HarnessModel` of an engine that opens models itself; `OptionError` if its package is not installed."""
    module = ENGINES[name].module
    assert module is not None, f"the caller loads the model of {name}"
    require_engine(name)
    return importlib.import_module(module).open_engine(opening)
