"""What a study file names, looked for before anything runs: files, rows, corpora, experts, device and engine.

`study_file` checks what can be told from the file alone; this looks at the machine. Nothing is fetched for it but a Hub
model's config.json, and that only where the file names experts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from .artifacts import ExpertSet
from .corpora import documents, local_data, named_corpus
from .errors import DataError, ModelError, OptionError, UserError
from .model import pick_device, structure_of
from .moe import check_experts, find_banks
from .options import CheckpointConfig
from .pocket import checkpoint_dir
from .sft_data import read_rows
from .study_file import Plan
from .tasks import load_benchmarks

__all__ = ["check", "given_experts", "row_files", "settings_of_plan"]

Look = Callable[[], Any]


def check(plan: Plan, *, device: str = "auto", here: bool = True) -> None:
    """`DataError` that tells everything that is missing or wrong, a line each.

    `here` says whether the cells run on this machine, so that it must have the device and the engine.
    """
    told = []
    for look in _looks(plan, device, here):
        try:
            look()
        except UserError as error:
            told.append(str(error))
    told = list(dict.fromkeys(told))
    if len(told) == 1:
        raise DataError(told[0])
    if told:
        raise DataError(f"STUDY: {len(told)} errors; nothing was run\n" + "\n".join(f"  {line}" for line in told))


def _looks(plan: Plan, device: str, here: bool) -> Iterator[Look]:
    yield from (partial(_rows, option, file) for option, file in row_files(plan))
    if plan.data_dir is not None and plan.data_dir != "pocket" and not Path(plan.data_dir).is_dir():
        yield partial(_folder, plan.data_dir)
    else:
        yield from _data(plan)
    yield partial(_experts, plan)
    if here:
        yield partial(pick_device, device)
        yield partial(_engine, plan)


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
    where = str(checkpoint_dir()) if plan.model == "pocket" else plan.model
    try:
        return AutoConfig.from_pretrained(where, revision=plan.revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"STUDY model: {plan.model!r} is neither a folder nor a model that the Hub gives ({type(error).__name__}); "
            "check the name and the network, or use `pocket`"
        ) from error


def _rows(option: str, file: Path) -> None:
    if not file.is_file():
        raise DataError(f"STUDY {option}: {str(file)!r} is missing; check the path")
    read_rows(file, f"STUDY {option}")


def _folder(data_dir: str) -> None:
    raise DataError(f"STUDY data_dir: {data_dir!r} is missing; check the path")


def _data(plan: Plan) -> Iterator[Look]:
    data_dir = Path(plan.data_dir) if plan.data_dir else None
    if plan.data_dir != "pocket":
        # From the Hub nothing is read here; it has all of them but VMLU.
        local = local_data(data_dir) is not None
        yield from (partial(load_benchmarks, [task], data_dir) for task in plan.tasks if local or task == "vmlu")
    for name in plan.corpus:
        yield partial(_corpus, plan, name, plan.profile.get("column") or "text", "corpus")
    if plan.perplexity is not None and (plan.perplexity not in plan.corpus or "column" in plan.profile):
        yield partial(_corpus, plan, plan.perplexity, "text", "perplexity")


def _corpus(plan: Plan, name: str, column: str, field: str) -> None:
    """Reads the first text of a corpus on this machine."""
    hub = named_corpus(name)
    named = hub is not None and hub.stem is not None
    if named and plan.data_dir == "pocket":
        raise DataError(f"STUDY {field}: data_dir pocket has no {name!r}; name the corpus pocket or a file")
    data_dir = local_data(Path(plan.data_dir) if plan.data_dir and plan.data_dir != "pocket" else None)
    if hub is not None and (data_dir is None if named else not Path(name).is_file()):
        return
    try:
        empty = next(documents(name, column, data_dir), None) is None
    except DataError as error:
        raise DataError(f"STUDY {field}: {str(error).removeprefix('--corpus: ')}") from error
    if empty:
        raise DataError(f"STUDY {field}: {name} is empty, it has no text; give another")


def _experts(plan: Plan) -> None:
    given = given_experts(plan)
    if not given:
        return
    banks = find_banks(structure_of(settings_of_plan(plan), CheckpointConfig()))
    for name, experts in given.items():
        check_experts(banks, experts.experts, f"STUDY experts.{name}")


def _engine(plan: Plan) -> None:
    engine = plan.engine
    if engine != "hf" and importlib.util.find_spec(engine) is None:
        raise OptionError(
            f"STUDY evaluation.engine: {engine!r} needs the package {engine}, which is not installed; pip install "
            f"{engine}, or use hf"
        )
