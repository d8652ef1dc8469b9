"""The command `evaluate`: asks a model the questions of benchmarks, and keeps the answers unchanged.

Base model, pruned checkpoint and adapter are asked in the same way, with the same prompts and greedily. Nothing is
scored here; `extract` does that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from superexperts.benchmarks import BENCHMARKS, default_benchmarks, default_shots
from superexperts.checkpoints.source import ModelSource, adapter_folder, local_folder, resolve
from superexperts.core.arguments import joined
from superexperts.core.console import is_main_process, is_shown, note, stdout
from superexperts.core.errors import Field
from superexperts.core.identity import identity
from superexperts.core.runs import completed, fingerprint, read_json, versions, write_manifest
from superexperts.core.settings import (
    ChatConfig,
    SeededConfig,
    ServerConfig,
    Switch,
    require,
    require_device,
    require_seed,
    require_sequences,
    require_unused,
    thinking_of,
)
from superexperts.core.types import ExpertSet, chosen_experts
from superexperts.data.corpora import local_data, require_corpus
from superexperts.engines import ENGINES, Opening, open_engine
from superexperts.evaluation.checks import check_engine, check_tasks

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from superexperts.evaluation.prompts import Prompts

    EngineName = str
else:
    EngineName = Literal[tuple(ENGINES)]

__all__ = ["EvaluateConfig", "rewrite_arguments", "run", "show"]

PROBES = 16
"""Number of prompts on which the effect of an adapter is measured first."""

_ENGINE_HELP = "What runs the model: " + ", ".join(f"`{name}` {one.help}" for name, one in ENGINES.items()) + "."
_TASKS_HELP = "Benchmarks, separated by commas; also available: " + (
    ", ".join(name for name in BENCHMARKS if name not in default_benchmarks()) + "."
)
_SHOTS_HELP = f"loglikelihood: examples before each question; default: {default_shots()}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ChatConfig, ServerConfig, SeededConfig):
    """Ask a model, or a model with an adapter, the questions of benchmarks, and keep its answers unchanged.

    Example: superexperts evaluate pocket --data-dir pocket --tasks gsm8k,boolq --limit 50 --out runs/base

    Example: superexperts evaluate NAME --engine api --base-url http://localhost:8000/v1 --tasks gsm8k --out runs/served
    """

    engine: Annotated[EngineName, tyro.conf.arg(help=_ENGINE_HELP)] = "hf"
    base_url: str | None = None
    """api: URL of the server, such as http://localhost:8000/v1. If it ends in /chat/completions, or with
    --chat-template on, prompts are sent as chat messages."""
    adapter: Path | None = None
    """Adapter folder that `train` wrote."""
    silence: str | None = None
    """Experts (file or inline) that output 0 in this run, as if their down_proj were pruned."""
    tasks: Annotated[str, tyro.conf.arg(help=_TASKS_HELP)] = ",".join(default_benchmarks())
    protocol: Literal["generative", "loglikelihood"] = "generative"
    """`generative`: zero-shot, free text, read by `extract`; `loglikelihood`: the few-shot tasks of
    lm-evaluation-harness, which take the most probable choice (GSM8K generates)."""
    num_fewshot: Annotated[int | None, tyro.conf.arg(help=_SHOTS_HELP)] = None
    split: Literal["default", "test"] = "default"
    """`test`: VMLU's test rows. Their answers are not published; `extract` writes the file to submit."""
    out: Path = Path("runs/evaluate")
    """Folder for answers/."""
    limit: int | None = None
    """Items per benchmark, a sample drawn with --seed and spread over the subjects; default: all. A larger limit only
    asks the new items."""
    limit_first: Switch = False
    """limit: the first items of the file instead, which may all be of one subject."""
    batch_size: int = 64
    """Prompts per generation batch."""
    max_new_tokens: int = 512
    """Longest answer in tokens, its thoughts included unless they have a budget."""
    perplexity: str | None = None
    """Also measure the perplexity on this corpus (names as for profile)."""
    column: str | None = None
    """perplexity: column of a .jsonl file or Hub data set that holds the text; default: text."""
    tokens: int = 16384
    """perplexity: tokens of the corpus, the BOS of each sequence included."""
    seq_len: int = 512
    """perplexity: tokens per sequence."""
    reference_windows: Switch = False
    """perplexity: the whole corpus, cut into windows as in the paper's code (there with --seq-len 2048), with one BOS
    before the first; not with --tokens."""
    variant: str | None = None
    """Name of this variant in the answers; default: that of the adapter's folder, or base without an adapter."""
    data_dir: Path | None = None
    """Folder of local benchmark files instead of the Hub, or `pocket`; default: the environment's SUPEREXPERTS_DATA."""
    overwrite: Switch = False
    """Replace a finished result of other settings or files in --out; the old one stays until the new one is whole."""
    json: Switch = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        # Results are compared by their settings: one spelling for each list.
        object.__setattr__(self, "tasks", ",".join(re.findall(r"[^\s,;]+", self.tasks.lower())))
        ServerConfig.__post_init__(self)
        ChatConfig.__post_init__(self)
        require_seed(self.seed)
        require(
            is_shown(self.variant or ""), "variant", self.variant, "has characters that no terminal shows; rename it"
        )
        require(self.limit is None or self.limit > 0, "limit", self.limit, "is not positive; give at least 1")
        without = self.limit_first and self.limit is None
        require(not without, "limit_first", True, "does nothing when all items are asked; give ", Field("limit"))
        require(self.batch_size > 0, "batch_size", self.batch_size, "is not positive; give at least 1")
        require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "is not positive; give at least 1")
        require_sequences(self.tokens, self.seq_len)
        why = ("does nothing without ", Field("perplexity"), "; name a corpus there")
        require(self.perplexity is not None or not self.reference_windows, "reference_windows", True, *why)
        require(self.perplexity is not None or self.column is None, "column", self.column, *why)
        if self.perplexity is None:
            require_unused(self, ["tokens", "seq_len"], "without ", Field("perplexity"))
        if self.reference_windows:
            require_unused(self, ["tokens"], "with ", Field("reference_windows"), ", which reads the whole corpus")
        require_device(self.device)
        both = self.adapter is not None and self.silence is not None
        merge = ("excludes ", Field("adapter"), "; merge the adapter into a checkpoint first")
        require(not both, "silence", self.silence, *merge)
        check_tasks(self)
        check_engine(self)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The benchmarks, in the order given, each once."""
        return tuple(dict.fromkeys(self.tasks.split(","))) if self.tasks else ()


def rewrite_arguments(words: Sequence[str]) -> list[str]:
    """Joins benchmarks that are given as several words."""
    return joined(words, lambda word: {*re.split("[,;]", word.lower())} <= {*BENCHMARKS, ""})


def check(config: EvaluateConfig) -> None:
    """What is wrong without looking into the files, before any library is imported."""
    if not ENGINES[config.engine].server:
        local_folder(config.model)
    if config.adapter is not None:
        adapter_folder(config.adapter)
    if config.silence is not None:
        ExpertSet.parse(config.silence, "silence")
    local_data(config.data_dir)
    if config.perplexity is not None:
        require_corpus(config.perplexity, "perplexity")


# Functions below import torch, transformers and the harness themselves, so that --help and a wrong setting do not wait
# for them.


def run(config: EvaluateConfig, load: Callable[..., nn.Module] | None = None) -> dict[str, Any]:
    """Writes answers/<benchmark>.jsonl, perplexity.json if asked for, and the manifest; returns what `show` prints.

    The data are checked before the model is loaded. Nothing is done if the folder already holds these answers. The
    model that `load` returns (default: `load_model`, with its arguments) is handed back unchanged, without the adapter.
    """
    from superexperts.adapters.borrow import borrowed
    from superexperts.evaluation.opening import name_after
    from superexperts.models.loading import load_model

    config = dataclasses.replace(config, variant=config.variant or name_after(config.adapter))
    with contextlib.ExitStack() as stack:

        def borrow(source: ModelSource) -> nn.Module:
            model = (load or load_model)(source, device=config.device, dtype=config.dtype)
            # `study` hands one model to many evaluations, so whatever this one attaches is taken off again.
            stack.enter_context(borrowed(model))
            return model

        return _run(config, borrow)


def _run(config: EvaluateConfig, load: Callable[[ModelSource], nn.Module]) -> dict[str, Any]:
    from superexperts.benchmarks.loading import load_benchmarks
    from superexperts.core.distributed import from_main_process, gathered
    from superexperts.data.packing import digest_ids
    from superexperts.evaluation import answers_folder
    from superexperts.evaluation.ask import ask_one, chosen_items, first_prompts, whole_prompt
    from superexperts.evaluation.opening import adapter_to_ask, prepared
    from superexperts.evaluation.outcomes import how_they_ended, sentence
    from superexperts.evaluation.perplexity import measured_perplexity, sequences_of, write_perplexity
    from superexperts.evaluation.prompts import chat_parameters
    from superexperts.models.hooks import silenced
    from superexperts.models.loading import load_tokenizer

    started = time.monotonic()
    out = config.out
    benchmarks = load_benchmarks(
        config.task_names,
        config.data_dir,
        protocol=config.protocol,
        num_fewshot=config.num_fewshot,
        split=config.split,
    )
    silent = chosen_experts(config.silence, config.model, "silence").experts if config.silence else ()
    source = None  # a server only has a name for its model
    if not ENGINES[config.engine].server:
        source = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    tokenizer = None if source is None else load_tokenizer(source)
    prompts = _prompts(config, tokenizer)
    sequences_BL = None
    if config.perplexity is not None and tokenizer is not None:
        sequences_BL = sequences_of(
            config.perplexity,
            config.data_dir,
            tokenizer,
            column=config.column,
            seq_len=config.seq_len,
            tokens=None if config.reference_windows else config.tokens,
        )
    adapter = adapter_to_ask(config.adapter, prompts) if config.adapter else None
    inputs = identity(
        config,
        model={"server": _url(config), "name": config.model} if source is None else source.fingerprint,
        adapter=fingerprint(adapter) if adapter else None,
        silence=silent,
        data={name: benchmark.sha for name, benchmark in benchmarks.items()},
        perplexity=None if sequences_BL is None else digest_ids(sequences_BL),
        harness=versions()["lm_eval"],  # its task files define the few-shot prompts
    )
    if from_main_process(completed(out, "evaluate", inputs)):
        note(f"evaluate: {out} is up to date, nothing to do")
        return _summary(config, read_json(out / "manifest.json", "manifest")) if is_main_process else {}
    if is_main_process:
        answers_folder.require_own_answers(out)
        answers_folder.require_replaceable(out, inputs, overwrite=config.overwrite)
    model, effect = None, None
    if ENGINES[config.engine].in_process and source is not None:
        each = max(1, PROBES // len(benchmarks))
        texts = [text for benchmark in benchmarks.values() for text in first_prompts(benchmark, prompts, each)]
        model, effect = prepared(load(source), tokenizer, adapter, silent, texts)
    answering = _answering(config, source, model, tokenizer)
    if source is None:
        answering.extra = chat_parameters(prompts.style)
    journals = answers_folder.open_folder(out, {name: answers_folder.answers_key(inputs, name) for name in benchmarks})
    outputs, ended, asked = [], {}, {}
    with silenced(model, silent) if model is not None and silent else contextlib.nullcontext():
        for name, benchmark in benchmarks.items():
            numbers = chosen_items(name, benchmark.items, config.limit, seed=config.seed, first=config.limit_first)
            asked[name] = whole_prompt(name, benchmark, numbers[0], prompts)
            answers = ask_one(
                answering,
                name,
                benchmark,
                numbers,
                variant=str(config.variant),
                seed=config.seed,
                max_new_tokens=config.max_new_tokens,
                prompts=prompts,
                journal=journals[name],
            )
            outputs.append(f"answers/{name}.jsonl")
            answers_folder.write_answers(out / outputs[-1], answers)
            ended[name] = how_they_ended(answers)
            if said := sentence(ended[name], len(answers)):
                note(f"evaluate: {name}: {said}")
        if sequences_BL is not None:
            assert model is not None
            measured = measured_perplexity(model, sequences_BL, description=f"{config.variant}: perplexity")
            write_perplexity(out, measured, str(config.perplexity), sequences_BL, config.reference_windows)
            outputs.append("perplexity.json")
    truncated = sum(gathered(answering.truncated))
    if not is_main_process:
        return {}
    if truncated:
        note(f"evaluate: {truncated} prompts are too long for the model and lost their beginning")
    reported: dict[str, Any] = {"truncated": truncated, "ended": ended, "chat": prompts.chat, "prompts": asked}
    write_manifest(out, "evaluate", inputs, outputs, time.monotonic() - started, effect=effect, **reported)
    answers_folder.clear_away(out)
    return _summary(config, reported)


def _url(config: EvaluateConfig) -> str:
    """Where a server is asked."""
    from superexperts.engines.server import chat_url, request_url

    assert config.base_url is not None
    return (chat_url if config.chat_template == "on" else request_url)(config.base_url)


def _prompts(config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase | None) -> Prompts:
    from superexperts.data.chat import ChatStyle
    from superexperts.evaluation.prompts import how_to_ask

    style = ChatStyle(
        system_prompt=config.system_prompt,
        thinking=thinking_of(config.thinking),
        reasoning_effort=config.reasoning_effort,
        prefill=config.prefill,
    )
    url = _url(config) if tokenizer is None else None
    return how_to_ask(config.chat_template, style, tokenizer=tokenizer, url=url)


def _answering(
    config: EvaluateConfig,
    source: ModelSource | None,
    model: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Any:
    """The `HarnessModel` that answers the prompts; `model` is the model in this process, if it runs here."""
    from superexperts.engines.harness import TransformersModel

    if model is not None and tokenizer is not None:
        return TransformersModel(model, tokenizer, config.batch_size, config.max_new_tokens)
    opening = Opening(
        model=config.model,
        folder=None if source is None else source.folder,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        base_url=None if source is not None else _url(config),
        concurrency=config.concurrency,
        timeout=config.timeout,
        retries=config.retries,
    )
    return open_engine(config.engine, opening)


def _summary(config: EvaluateConfig, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The number of answers to each benchmark and how they ended, the perplexity if it was measured, and the number of
    cut prompts."""
    counts = {}
    for name in config.task_names:
        with (config.out / "answers" / f"{name}.jsonl").open(encoding="utf-8") as stream:
            counts[name] = sum(1 for _ in stream)
    found = read_json(config.out / "perplexity.json", "perplexity") if config.perplexity else None
    return {
        "out": str(config.out),
        "variant": config.variant,
        "tasks": counts,
        "perplexity": found["perplexity"] if found else None,
        "perplexity_interval": found["interval"] if found else None,
        "truncated": manifest["truncated"],
        "ended": manifest.get("ended", {}),
    }


def show(result: dict[str, Any]) -> None:
    """Prints the number of answers to each benchmark, and the perplexity if it was measured."""
    for task, items in result["tasks"].items():
        stdout.print(f"{task}: {items} answers")
    if result["perplexity"] is not None:
        interval = result["perplexity_interval"]
        bounds = f" (95%: {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
        stdout.print(f"perplexity: {result['perplexity']:.3f}{bounds}")
    stdout.print(f"in {result['out']}", soft_wrap=True)
