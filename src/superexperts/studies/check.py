"""Checks everything that a study file names before it runs: files, rows, corpora, experts, device, engine and judge.

`study_file` checks what depends on the file alone, this module what depends on the machine. It downloads nothing but
config.json of models on the Hub.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import AutoConfig

from superexperts.benchmarks import BENCHMARKS
from superexperts.benchmarks.loading import load_benchmarks
from superexperts.checkpoints.source import JUDGE, MODEL, ModelSource, hub_error, local_folder, resolve
from superexperts.core.errors import DataError, ModelError, OptionError, UserError
from superexperts.core.paths import missing, require_folder
from superexperts.core.types import ExpertSet
from superexperts.data.corpora import documents, local_data, named_corpus
from superexperts.data.packing import pack
from superexperts.engines import require_engine
from superexperts.models.banks import check_experts, find_banks
from superexperts.models.loading import load_tokenizer, pick_device, structure_of
from superexperts.studies.cells import extraction_settings
from superexperts.studies.lined_yaml import Place, together
from superexperts.studies.plan import Plan
from superexperts.studies.study_file import line_of
from superexperts.training.memory import require_bitsandbytes
from superexperts.training.rows import read_rows

__all__ = ["check", "given_experts", "row_files", "settings_of_plan"]

Check = tuple[Place, Callable[[], Any]]
"""The place of a field in the study file, and a function that raises `UserError` if the field is wrong."""


def check(plan: Plan, text: str = "", name: str = "STUDY", *, device: str = "auto", here: bool = True) -> None:
    """`DataError` that lists everything that is missing or wrong, each with its line in the file.

    `text` is the content of the file and `name` its name. `here` says whether the cells run on this machine, which must
    then have the device, the engine and the packages that they need.
    """
    errors = []
    for place, check_field in _checks(plan, device, here):
        try:
            check_field()
        except UserError as error:
            line = line_of(text, place)
            errors.append((f"line {line}: " if line else "") + error.line())
    if errors:
        raise DataError(together(name, list(dict.fromkeys(errors))))


def _checks(plan: Plan, device: str, here: bool) -> Iterator[Check]:
    for option, file in row_files(plan):
        yield tuple(option.split(".")), partial(_rows, option, file)
    if len(plan.prompts) > 1:
        yield ("training", "prompt"), _one_prompt
    if plan.data_dir is not None and plan.data_dir != "pocket" and not Path(plan.data_dir).is_dir():
        yield ("data_dir",), partial(_folder, plan.data_dir)
    else:
        yield from _data(plan)
    try:
        settings = settings_of_plan(plan)
    except ModelError as error:
        yield ("model",), partial(_raise, error)
    else:
        context = getattr(settings.get_text_config(), "max_position_embeddings", None)
        if context is not None:  # a state-space model has none
            yield ("seq_len",), partial(_fits, "seq_len", plan.seq_len, context)
            yield ("max_new_tokens",), partial(_fits, "max_new_tokens", plan.max_new_tokens, context - 1)
        yield from _experts(plan, settings)
    if here:
        yield ("device",), partial(pick_device, device)
        yield ("evaluation", "engine"), partial(require_engine, plan.engine, "evaluation.engine")
        for run in plan.runs:
            if run.kind == "lora" and plan.training_of(run).get("load_in_4bit"):
                own = "load_in_4bit" in plan.variant(run.variant).training
                yield ("variants", run.variant) if own else ("training", "load_in_4bit"), require_bitsandbytes
        yield from _judge(plan)


def row_files(plan: Plan) -> list[tuple[str, Path]]:
    """The files of rows that training reads, each with the field that names it."""
    if not any(variant.kind == "lora" for variant in plan.variants):
        return []
    named = [("train_data", plan.train_data), ("training.eval_data", plan.training.get("eval_data"))]
    named += [(f"variants.{variant.name}.eval_data", variant.training.get("eval_data")) for variant in plan.variants]
    return [(option, Path(file)) for option, file in named if file is not None]


def given_experts(plan: Plan) -> dict[str, ExpertSet]:
    """Name of a set -> the experts that its options list or name by a file."""
    found = {}
    for name, options in plan.experts.items():
        text = options.get("experts", options.get("like"))
        if text is not None and text not in plan.experts:
            found[name] = ExpertSet.parse(text)
    return found


def settings_of_plan(plan: Plan) -> Any:
    """The configuration of the study's model. Of a Hub model only config.json is fetched: there is no folder yet."""
    return _settings(plan.model, plan.revision, "model")


def _settings(model: str, revision: str | None, field: str) -> Any:
    what = MODEL if field == "model" else JUDGE
    folder = local_folder(model, field=field, what=what)
    try:
        return AutoConfig.from_pretrained(folder or model, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        if folder is None:
            raise hub_error(model, revision, error, field=field, what=what) from error
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"{model!r} cannot be built ({why}); check its config.json", field=field) from error


def _raise(error: UserError) -> None:
    raise error


def _rows(field: str, file: Path) -> None:
    if not file.exists():
        raise DataError(f"{missing(file)}; give a file of rows", field=field)
    read_rows(file, field)


def _one_prompt() -> None:
    raise OptionError(
        "some trainings or the evaluation put questions in chat and others do not, so their answers cannot be "
        "compared; give one of plain and chat",
        field="training.prompt",
    )


def _folder(data_dir: str) -> None:
    require_folder(Path(data_dir), "data_dir", "the folder of the data files, or pocket")


def _data(plan: Plan) -> Iterator[Check]:
    data_dir = Path(plan.data_dir) if plan.data_dir else None
    if plan.data_dir != "pocket":
        # Nothing is read from the Hub here, but a benchmark that is not on the Hub is an error.
        local = local_data(data_dir) is not None
        for task in plan.tasks:
            if local or BENCHMARKS[task].hub is None:
                yield ("tasks",), partial(load_benchmarks, [task], data_dir)
    quick = bool(plan.profile.get("quick"))
    for name in plan.corpus:
        yield ("corpus",), partial(_corpus, plan, name, plan.profile.get("column") or "text", "corpus", quick)
    column = plan.perplexity_column or "text"
    same = plan.perplexity in plan.corpus and column == (plan.profile.get("column") or "text") and not quick
    if plan.perplexity is not None and not same:
        field = "perplexity" if "perplexity" in plan.evaluation else "corpus"
        yield (
            ("evaluation", field) if field == "perplexity" else (field,),
            partial(_corpus, plan, plan.perplexity, column, field, False),
        )


def _corpus(plan: Plan, name: str, column: str, field: str, quick: bool) -> None:
    """Check that a corpus on this machine has as many tokens as the study needs.

    Only the first text is read if the tokenizer is not on this machine, if `quick` needs few tokens, and of `pocket`,
    since tokenizing takes time. Corpora on the Hub are not read.
    """
    hub = named_corpus(name)
    named = hub is not None and hub.stem is not None
    if named and plan.data_dir == "pocket":
        raise DataError(f"data_dir pocket has no {name!r}; name the corpus pocket or a file", field=field)
    data_dir = local_data(Path(plan.data_dir) if plan.data_dir and plan.data_dir != "pocket" else None)
    if hub is not None and (data_dir is None if named else not Path(name).is_file()):
        return
    try:
        texts = documents(name, column, data_dir)
        source = None if quick or name == "pocket" else _source_here(plan)
        if source is not None:
            pack(texts, load_tokenizer(source), corpus=name, tokens=plan.tokens, seq_len=plan.seq_len)
        elif next(texts, None) is None:
            raise DataError(f"{name} is empty, it has no text; give another")
    except DataError as error:
        raise error.about(field) from error


def _source_here(plan: Plan) -> ModelSource | None:
    """The study's model; None if it is not on this machine."""
    try:
        return resolve(plan.model, plan.revision, fetch=False)
    except ModelError:
        return None


def _fits(field: str, length: int, most: int) -> None:
    if length > most:
        raise OptionError(f"{length} exceeds the model's context; give at most {most}", field=field)


def _experts(plan: Plan, settings: Any) -> Iterator[Check]:
    given = given_experts(plan)
    counts = {name: options["count"] for name, options in plan.experts.items() if options.get("count") is not None}
    if not given and not counts:
        return
    banks = find_banks(structure_of(settings))
    for name, experts in given.items():
        yield ("experts", name), partial(check_experts, banks, experts.experts, f"experts.{name}")
    for name, count in counts.items():
        yield ("experts", name, "count"), partial(_enough, name, count, sum(bank.num_experts for bank in banks))


def _enough(name: str, count: int, most: int) -> None:
    if count > most:
        raise OptionError(
            f"the model has {most:,} routed experts, not {count}; give fewer", field=f"experts.{name}.count"
        )


def _judge(plan: Plan) -> Iterator[Check]:
    asked = extraction_settings(plan, Path())
    if asked.judge == "off":
        return
    if asked.judge_base_url is not None:
        yield ("extraction", "judge_base_url"), partial(_answers, asked.judge_base_url)
    else:
        yield ("extraction", "judge"), partial(_settings, asked.judge, None, "extraction.judge")
        yield ("extraction", "judge_engine"), partial(require_engine, asked.judge_engine, "extraction.judge_engine")


def _answers(url: str) -> None:
    """Check that something accepts connections at the URL; only an answer can show whether it is the right server."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{url!r} cannot be reached ({type(error).__name__}); start the server or check the URL",
            field="extraction.judge_base_url",
        ) from error
