"""What a study file names, looked for before anything runs: files, rows, corpora, experts, device, engine and judge.

`study_file` checks what can be told from the file alone; this looks at the machine. Nothing is fetched for it but
config.json of models on the Hub.
"""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import AutoConfig

from superexperts.benchmarks import load_benchmarks
from superexperts.checkpoints.source import resolve
from superexperts.core.errors import DataError, ModelError, OptionError, UserError
from superexperts.core.types import ExpertSet
from superexperts.data.corpora import documents, local_data, named_corpus
from superexperts.data.packing import pack
from superexperts.extraction.extract import ExtractConfig
from superexperts.models.banks import check_experts, find_banks
from superexperts.models.loading import load_tokenizer, pick_device, structure_of
from superexperts.pocket import checkpoint_dir
from superexperts.studies.lined_yaml import Place, together
from superexperts.studies.plan import Plan
from superexperts.studies.study_file import line_of
from superexperts.training.rows import read_rows

__all__ = ["check", "given_experts", "row_files", "settings_of_plan"]

Look = tuple[Place, Callable[[], Any]]
"""What may be wrong, and the field that it would be wrong in."""


def check(plan: Plan, text: str = "", name: str = "STUDY", *, device: str = "auto", here: bool = True) -> None:
    """`DataError` that tells everything that is missing or wrong, a line each, with the line of the file's `text`.

    `name` is the file's. `here` says whether the cells run on this machine, so that it must have the device, the engine
    and what else they need.
    """
    told = []
    for place, look in _looks(plan, device, here):
        try:
            look()
        except UserError as error:
            line = line_of(text, place)
            told.append((f"line {line}: " if line else "") + error.line())
    if told:
        raise DataError(together(name, list(dict.fromkeys(told))))


def _looks(plan: Plan, device: str, here: bool) -> Iterator[Look]:
    for option, file in row_files(plan):
        yield tuple(option.split(".")), partial(_rows, option, file)
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
        if context is not None:  # a state-space model has no limit
            yield ("seq_len",), partial(_fits, "seq_len", plan.seq_len, context)
            yield ("max_new_tokens",), partial(_fits, "max_new_tokens", plan.max_new_tokens, context - 1)
        yield from _experts(plan, settings)
    if here:
        yield ("device",), partial(pick_device, device)
        yield ("evaluation", "engine"), partial(_engine, "evaluation.engine", plan.engine)
        for run in plan.runs:
            if run.kind == "lora" and plan.training_of(run).get("load_in_4bit"):
                own = "load_in_4bit" in plan.variant(run.variant).training
                yield ("variants", run.variant) if own else ("training", "load_in_4bit"), _four_bits
        yield from _judge(plan)


def row_files(plan: Plan) -> list[tuple[str, Path]]:
    """Files of rows that the trainings read, each with the field that names it."""
    if not any(variant.kind == "lora" for variant in plan.variants):
        return []
    named = [("train_data", plan.train_data), ("training.eval_data", plan.training.get("eval_data"))]
    named += [(f"variants.{variant.name}.eval_data", variant.training.get("eval_data")) for variant in plan.variants]
    return [(option, Path(file)) for option, file in named if file is not None]


def given_experts(plan: Plan) -> dict[str, ExpertSet]:
    """The sets that stand in the study file or in a file that it names, by the set whose options name them."""
    found = {}
    for name, options in plan.experts.items():
        text = options.get("experts", options.get("like"))
        if text is not None and text not in plan.experts:
            found[name] = ExpertSet.parse(text)
    return found


def settings_of_plan(plan: Plan) -> Any:
    """The configuration of the study's model; of a Hub model only config.json is fetched."""
    return _settings(plan.model, plan.revision, "model")


def _settings(model: str, revision: str | None, field: str) -> Any:
    where = str(checkpoint_dir()) if model == "pocket" else model
    try:
        return AutoConfig.from_pretrained(where, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{model!r} is neither a folder nor a model that the Hub gives ({type(error).__name__}); "
            "check the name and the network, or use `pocket`",
            field=field,
        ) from error


def _raise(error: UserError) -> None:
    raise error


def _rows(field: str, file: Path) -> None:
    if not file.is_file():
        raise DataError(f"{str(file)!r} is missing; check the path", field=field)
    read_rows(file, field)


def _folder(data_dir: str) -> None:
    raise DataError(f"{data_dir!r} is missing; check the path", field="data_dir")


def _data(plan: Plan) -> Iterator[Look]:
    data_dir = Path(plan.data_dir) if plan.data_dir else None
    if plan.data_dir != "pocket":
        # From the Hub nothing is read here; it has all of them but VMLU.
        local = local_data(data_dir) is not None
        for task in plan.tasks:
            if local or task == "vmlu":
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
    """Reads as much of a corpus on this machine as is asked for; the first text where the tokenizer is not here, where
    `quick` needs a few tokens only, and of `pocket`, which is made and not read, and that takes its time."""
    hub = named_corpus(name)
    named = hub is not None and hub.stem is not None
    if named and plan.data_dir == "pocket":
        raise DataError(f"data_dir pocket has no {name!r}; name the corpus pocket or a file", field=field)
    data_dir = local_data(Path(plan.data_dir) if plan.data_dir and plan.data_dir != "pocket" else None)
    if hub is not None and (data_dir is None if named else not Path(name).is_file()):
        return
    try:
        texts = documents(name, column, data_dir)
        folder = None if quick or name == "pocket" else _folder_here(plan)
        if folder is not None:
            tokenizer = load_tokenizer(resolve(str(folder)))
            pack(texts, tokenizer, corpus=name, tokens=plan.tokens, seq_len=plan.seq_len)
        elif next(texts, None) is None:
            raise DataError(f"{name} is empty, it has no text; give another")
    except DataError as error:
        raise error.about(field) from error


def _folder_here(plan: Plan) -> Path | None:
    """The model's folder, if it is on this machine."""
    try:
        return resolve(plan.model, plan.revision, fetch=False).folder
    except ModelError:
        return None


def _fits(field: str, length: int, most: int) -> None:
    if length > most:
        raise OptionError(f"{length} is over the model's context; give at most {most}", field=field)


def _experts(plan: Plan, settings: Any) -> Iterator[Look]:
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
        raise OptionError(f"{count} of {most:,} routed experts; ask for fewer", field=f"experts.{name}.count")


def _engine(field: str, engine: str) -> None:
    if engine != "hf" and importlib.util.find_spec(engine) is None:
        raise OptionError(
            f"{engine!r} needs the package {engine}, which is not installed; pip install {engine}, or use hf",
            field=field,
        )


def _four_bits() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise OptionError("bitsandbytes is not installed; run pip install superexperts[4bit]", field="load_in_4bit")


def _judge(plan: Plan) -> Iterator[Look]:
    asked = ExtractConfig(folder=Path(), **plan.extraction)
    if asked.judge == "off":
        return
    if asked.judge_base_url is not None:
        yield ("extraction", "judge_base_url"), partial(_answers, asked.judge_base_url)
    else:
        yield ("extraction", "judge"), partial(_settings, asked.judge, None, "extraction.judge")
        yield ("extraction", "judge_engine"), partial(_engine, "extraction.judge_engine", asked.judge_engine)


def _answers(url: str) -> None:
    """Whether something listens there; what it is is seen with the first answer."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{url!r} cannot be reached ({type(error).__name__}); start the server or check the URL",
            field="extraction.judge_base_url",
        ) from error
