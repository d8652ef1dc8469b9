"""One frozen dataclass per command: the text under a field is also the option's help, and checks name the option."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from superexperts.core.console import is_shown
from superexperts.core.errors import Field
from superexperts.core.settings import CheckpointConfig, ModelConfig, SeededConfig, ServerConfig, Switch
from superexperts.core.settings import require as _require
from superexperts.core.settings import require_device as _require_device
from superexperts.core.settings import require_seed as _require_seed
from superexperts.core.settings import require_sequences as _require_sequences
from superexperts.core.settings import require_url as _require_url

__all__ = [
    "TASKS",
    "CheckpointConfig",
    "EvaluateConfig",
    "ModelConfig",
    "ServerConfig",
    "identity",
]

TASKS = ("mmlu", "gsm8k", "arc_easy", "boolq", "medqa", "vmlu")
"""The benchmarks of the result table, asked unless told otherwise."""
MORE_TASKS = ("arc_challenge", "openbookqa")
"""Benchmarks that can be asked as well."""

# Where a result goes and how it is shown does not change what it is.
NOT_IDENTITY = (
    *("out", "json", "model", "experts", "data", "data_dir", "adapter", "silence", "profile", "like"),
    *("base_url", "concurrency", "timeout", "retries"),
    *("recipe", "eval_data", "checkpoint_steps", "resume", "report_to"),
)


def identity(config: Any, **contents: Any) -> dict[str, Any]:
    """What a stage's result depends on: its options but paths, and the contents (hashes) that the paths lead to."""
    options = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_IDENTITY}
    return {"options": {name: str(value) for name, value in options.items()}, **contents}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ServerConfig, SeededConfig):
    """Ask a model, or a model with an adapter, the benchmarks' questions; answers are kept as they are given.

    Example: superexperts evaluate pocket --data-dir pocket --tasks gsm8k,boolq --limit 50 --out runs/base

    Example: superexperts evaluate NAME --engine api --base-url http://localhost:8000/v1 --tasks gsm8k --out runs/served
    """

    engine: Literal["hf", "vllm", "sglang", "api"] = "hf"
    """What runs the model: transformers in this process, vLLM, SGLang, or an OpenAI-compatible server (`api`; MODEL is
    then its name there)."""
    base_url: str | None = None
    """api: URL of the server, such as http://localhost:8000/v1; one that ends in /chat/completions is asked as a chat.
    """
    adapter: Path | None = None
    """Adapter folder that `train` wrote."""
    silence: str | None = None
    """Experts (file or inline) that answer 0 in this run, as if their down_proj were pruned."""
    tasks: str = ",".join(TASKS)
    """Benchmarks, separated by commas; beside these: arc_challenge, openbookqa."""
    protocol: Literal["generative", "loglikelihood"] = "generative"
    """`generative`: zero-shot, free text, read by `extract`; `loglikelihood`: the harness's own few-shot tasks, the
    most probable choice (GSM8K generates)."""
    num_fewshot: int | None = None
    """loglikelihood: examples before each question; default: 5 for mmlu, gsm8k and vmlu, 25 for arc_challenge, else 0.
    """
    split: Literal["default", "test"] = "default"
    """`test`: VMLU's test rows, whose answers are not published; `extract` writes the file to submit."""
    out: Path = Path("runs/evaluate")
    """Folder for answers/."""
    limit: int | None = None
    """Items per benchmark, the first ones; default: all. A larger one asks only what is new."""
    shuffle: Switch = False
    """limit: a sample drawn with --seed instead of the first items."""
    batch_size: int = 64
    """Prompts per generation batch."""
    max_new_tokens: int = 512
    """Longest answer in tokens."""
    perplexity: str | None = None
    """Also measure the perplexity on this corpus (names as for profile)."""
    column: str | None = None
    """perplexity: column of a .jsonl file or Hub data set that holds the text; default: text."""
    tokens: int = 16384
    """perplexity: tokens of the corpus, BOS of each sequence counted."""
    seq_len: int = 512
    """perplexity: tokens per sequence."""
    reference_windows: Switch = False
    """perplexity: all of the corpus in windows as the paper's code cuts them (--seq-len 2048 there), with one BOS in
    front of the first; --tokens does not count."""
    variant: str = "base"
    """Name of this variant in the answers."""
    data_dir: Path | None = None
    """Folder of local benchmark files instead of the Hub, or `pocket`; default: the environment's SUPEREXPERTS_DATA."""
    json: Switch = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_seed(self.seed)
        _require(is_shown(self.variant), "variant", self.variant, "has characters that no terminal shows; rename it")
        known = ",".join(TASKS + MORE_TASKS)
        unknown = [task for task in self.task_names if task not in TASKS + MORE_TASKS]
        _require(not unknown, "tasks", ",".join(unknown), f"is unknown; choose from {known}")
        _require(bool(self.task_names), "tasks", self.tasks, f"names none; choose from {known}")
        _require(self.limit is None or self.limit > 0, "limit", self.limit, "is not positive; give at least 1")
        shuffled = self.shuffle and self.limit is None
        _require(not shuffled, "shuffle", True, "does nothing when all items are asked; give ", Field("limit"))
        if self.protocol == "generative":
            why = ("does nothing for ", Field("protocol"), " generative, which shows no examples; leave it out")
            _require(self.num_fewshot is None, "num_fewshot", self.num_fewshot, *why)
        else:
            fits = self.num_fewshot is None or self.num_fewshot >= 0
            _require(fits, "num_fewshot", self.num_fewshot, "is negative; give 0 or more")
            why = (
                "needs ",
                Field("engine"),
                " hf, vllm or sglang: a server gives no log-probabilities of what it is asked",
            )
            _require(self.engine != "api", "protocol", self.protocol, *why)
        if self.split == "test":
            unknown = [task for task in self.task_names if task != "vmlu"]
            why = (f"is for vmlu only; {', '.join(unknown)} is asked with ", Field("split"), " default, in another run")
            _require(not unknown, "split", self.split, *why)
        _require(self.batch_size > 0, "batch_size", self.batch_size, "is not positive; give at least 1")
        _require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "is not positive; give at least 1")
        _require_sequences(self.tokens, self.seq_len)
        why = ("does nothing without ", Field("perplexity"), "; name a corpus there")
        _require(self.perplexity is not None or not self.reference_windows, "reference_windows", True, *why)
        _require(self.perplexity is not None or self.column is None, "column", self.column, *why)
        _require_device(self.device)
        both = self.adapter is not None and self.silence is not None
        _require(
            not both,
            "silence",
            self.silence,
            "excludes ",
            Field("adapter"),
            "; merge the adapter into a checkpoint first",
        )
        missing = self.engine == "api" and self.base_url is None
        _require(
            not missing, "base_url", self.base_url, "is missing for ", Field("engine"), " api; give the server's URL"
        )
        if self.base_url is not None:
            _require(
                self.engine == "api",
                "base_url",
                self.base_url,
                "excludes ",
                Field("engine"),
                f" {self.engine}; give api",
            )
            _require_url("base_url", self.base_url)
        if self.engine != "hf":
            why = ("needs ", Field("engine"), f" hf, not {self.engine}; ")
            _require(self.silence is None, "silence", self.silence, *why, "or prune and serve that checkpoint")
            _require(self.adapter is None, "adapter", str(self.adapter), *why, "or merge it into a checkpoint")
            _require(self.perplexity is None, "perplexity", self.perplexity, *why, "leave it out")

    @property
    def task_names(self) -> tuple[str, ...]:
        """The benchmarks, in the order given, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.tasks.split(",") if name.strip()))
