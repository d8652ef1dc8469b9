"""The whole workflow as a list of commands: profile, select, then per variant prune | train, evaluate, extract.

A study is nothing but its commands' settings in order, each with a folder of its own. Every command knows by its
inputs' hashes whether it is done, so a killed study goes on where it was, and a finished one does no work.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import yaml

from . import evaluate, extract, profile, prune, select, train
from .conclude import conclude
from .config import (
    TASKS,
    EvaluateConfig,
    ExtractConfig,
    ProfileConfig,
    PruneConfig,
    SelectConfig,
    StudyConfig,
)
from .config_train import TrainConfig
from .console import note, stderr
from .corpora import local_data, local_file, named_corpus
from .errors import DataError, OptionError
from .model import checkpoint_folder
from .pocket import write_data
from .report import write_csv, write_report
from .rundir import completed, fingerprint, new_folder, prepare_folder, read_json, write_json, write_manifest
from .tasks import load_benchmarks
from .variants import Kind, Run

__all__ = ["VARIANTS", "Plan", "Variant", "run"]


OWN_OPTIONS = ("model", "data", "eval_data", "experts", "attention", "target", "out", "json", "seed", "recipe")
"""Options of `train` that a study sets itself, or that take a path of their own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """What is done to the model before it is asked."""

    title: str
    kind: str
    """base, prune or lora."""
    experts: str | None = None
    """Name of the expert set, super or random; None for the base model and for attention."""


VARIANTS = {
    "base": Variant(title="baseline", kind="base"),
    "prune-super": Variant(title="prune super experts", kind="prune", experts="super"),
    "prune-random": Variant(title="prune random experts", kind="prune", experts="random"),
    "lora-super": Variant(title="LoRA on super experts", kind="lora", experts="super"),
    "lora-random": Variant(title="LoRA on random experts", kind="lora", experts="random"),
    "lora-attention": Variant(title="LoRA on attention", kind="lora"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A study file."""

    name: str
    model: str = "pocket"
    revision: str | None = None
    corpus: str = "pocket"
    """Corpus of the profile and of the perplexity."""
    tokens: int = 16384
    """Tokens of the profile, and of the perplexity."""
    seq_len: int = 512
    """Tokens of their sequences."""
    depth: float = 0.75
    tasks: tuple[str, ...] = TASKS
    limit: int | None = None
    """Items per benchmark."""
    max_new_tokens: int = 512
    data_dir: str | None = None
    """Local benchmark files, or `pocket`."""
    train_data: str | None = None
    """Rows for LoRA; default with `data_dir: pocket`: the pocket world's."""
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Options of `train`, such as learning_rate."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown:
            raise OptionError(f"STUDY variants: {unknown[0]!r} is unknown; choose from {', '.join(VARIANTS)}")
        if not self.variants or self.variants[0] != "base":
            raise OptionError(f"STUDY variants: {list(self.variants)} does not begin with base; put base first")
        free = {field.name for field in dataclasses.fields(TrainConfig)}
        for option in self.training:
            if option not in free - set(OWN_OPTIONS):
                raise OptionError(f"STUDY training: {option!r} is no option of train; see superexperts train --help")
        try:  # every option error before any work
            ProfileConfig(tokens=self.tokens, seq_len=self.seq_len, depth=self.depth)
            EvaluateConfig(tasks=",".join(self.tasks), limit=self.limit, max_new_tokens=self.max_new_tokens)
            TrainConfig(data=Path("rows"), attention=True, **self.training)
        except TypeError as error:
            raise OptionError(f"STUDY: a value has the wrong type ({error}); see docs/study.md") from error
        trains = any(VARIANTS[name].kind == "lora" for name in self.variants)
        if trains and self.train_data is None and self.data_dir != "pocket":
            raise OptionError("STUDY train_data: None is missing for the lora variants; name a file of rows")

    @classmethod
    def load(cls, text: str) -> Plan:
        """Reads YAML; `OptionError` names a field that is unknown or of the wrong type."""
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise OptionError(f"STUDY: not valid YAML ({' '.join(str(error).split())}); repair the file") from error
        if not isinstance(value, dict) or "name" not in value:
            raise OptionError("STUDY: the file has no `name:`; a study is a mapping with at least a name")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(value) - known)
        if unknown:
            raise OptionError(f"STUDY: {unknown[0]!r} is no field of a study; choose from {', '.join(sorted(known))}")
        for field in dataclasses.fields(cls):
            if field.name in value:
                value[field.name] = _checked(field.name, value[field.name])
        return cls(**value)


TYPES: dict[str, type] = {
    "tokens": int,
    "seq_len": int,
    "limit": int,
    "max_new_tokens": int,
    "seed": int,
    "depth": float,
    "tasks": list,
    "variants": list,
    "training": dict,
}
"""Of a study file's fields; all others are text."""


def _checked(name: str, value: Any) -> Any:
    """A field's value of its right type; YAML 1.1 reads 1e-3 as text, so numbers may come as text."""
    kind = TYPES.get(name, str)
    nullable = name in ("limit", "revision", "data_dir", "train_data")
    if value is None and nullable:
        return None
    if kind in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        number = _number(value)
        if isinstance(number, int | float) and (kind is float or float(number).is_integer()):
            return kind(number)
    elif kind is list and isinstance(value, list) and all(isinstance(item, str) for item in value):
        if len(set(value)) < len(value):
            raise OptionError(f"STUDY {name}: {value} names one twice; name each once")
        return tuple(value)
    elif kind is dict and isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    elif kind is str and isinstance(value, str) and (name != "name" or re.fullmatch(r"[\w.-]*\w[\w.-]*", value)):
        return value
    wanted = {int: "a whole number", float: "a number", list: "a list of names", dict: "a mapping"}.get(kind, "a text")
    raise OptionError(f"STUDY {name}: {value!r} is not {wanted}; write it as docs/study.md shows")


def _number(value: Any) -> Any:
    """A text that is a number as that number, anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def run(config: StudyConfig) -> dict[str, Any]:
    """The command: runs what is not done yet, then writes results.json, result.csv and report.html."""
    started = time.monotonic()
    if config.study is None:
        plan = Plan.load((files(__package__) / "pocket" / "study.yaml").read_text(encoding="utf-8"))
    elif config.study.is_file():
        plan = Plan.load(config.study.read_text(encoding="utf-8", errors="replace"))
    else:
        raise OptionError(f"STUDY: {str(config.study)!r} is no file; give a YAML file, or --demo")
    out = prepare_folder(config.out or Path("runs") / plan.name)
    for option, path in (("data_dir", plan.data_dir), ("train_data", plan.train_data)):
        if path is not None and path != "pocket" and not Path(path).exists():
            raise DataError(f"STUDY {option}: {path!r} is missing; check the path")
    inputs = {
        "plan": {name: str(value) for name, value in dataclasses.asdict(plan).items()},
        "model": fingerprint(checkpoint_folder(plan.model, plan.revision)),
        "train_data": fingerprint(Path(plan.train_data)) if plan.train_data else None,
        "data": _data_identity(plan),
    }
    if completed(out, "study", inputs):
        note(f"study: {out} is up to date, nothing to do")
    else:
        _run_cells(plan, out)
        results = _conclude(plan, out)
        write_json(out / "results.json", results)
        write_csv(results, out / "result.csv")
        cells = [f"variants/{name}/scores.json" for name in plan.variants]
        outputs = ["results.json", "result.csv", "profile/profile.json", *cells]
        (out / "report.html").unlink(missing_ok=True)
        write_manifest(out, "study", inputs, outputs, time.monotonic() - started)
    if not (out / "report.html").is_file():
        write_report(out)  # after the manifest, which it shows
    return {"out": str(out), "report": str(out / "report.html"), "results": read_json(out / "results.json", "STUDY")}


def _data_identity(plan: Plan) -> dict[str, str]:
    """Digests of what is asked and of a corpus that is a file; what comes from the Hub has its revision instead."""
    data_dir = local_data(Path(plan.data_dir) if plan.data_dir else None)
    # The pocket world is made by the package's own sources, which every stage's key holds.
    local = data_dir is not None and str(data_dir) != "pocket"
    benchmarks = load_benchmarks(plan.tasks, data_dir) if local else {}
    digests = {name: benchmark.sha for name, benchmark in benchmarks.items()}
    corpus = named_corpus(plan.corpus)
    if corpus is not None and corpus.stem is not None:
        if data_dir is not None:
            digests["corpus"] = fingerprint(local_file(data_dir, corpus.stem))
    elif Path(plan.corpus).is_file():
        digests["corpus"] = fingerprint(Path(plan.corpus))
    return digests


def _run_cells(plan: Plan, out: Path) -> None:
    data_dir = Path(plan.data_dir) if plan.data_dir else None
    train_data = Path(plan.train_data) if plan.train_data else None
    if plan.data_dir == "pocket":
        if not completed(out / "data", "pocket-data", {}):
            with new_folder(out / "data", "pocket-data") as folder:
                write_data(folder)
                write_manifest(folder, "pocket-data", {}, [file.name for file in sorted(folder.iterdir())], 0)
        data_dir, train_data = out / "data", train_data or out / "data" / "train.json"
    stderr.rule("profile")
    profile.run(
        ProfileConfig(
            model=plan.model,
            revision=plan.revision,
            corpus=(plan.corpus,),
            out=out / "profile",
            tokens=plan.tokens,
            seq_len=plan.seq_len,
            depth=plan.depth,
            data_dir=None if plan.corpus == "pocket" else data_dir,
        )
    )
    experts = {name: str(out / "experts" / f"{name}.json") for name in ("super", "random")}
    select.run(SelectConfig(profile=out / "profile", depth=plan.depth, out=Path(experts["super"])))
    select.run(
        SelectConfig(
            profile=out / "profile", rule="random", like=experts["super"], seed=plan.seed, out=Path(experts["random"])
        )
    )
    for number, name in enumerate(plan.variants, start=1):
        stderr.rule(f"{name} ({number} of {len(plan.variants)})")
        variant, folder = VARIANTS[name], out / "variants" / name
        model, adapter = plan.model, None
        if variant.kind == "prune":
            assert variant.experts is not None
            model = str(folder / "model")
            prune.run(
                PruneConfig(model=plan.model, revision=plan.revision, experts=experts[variant.experts], out=Path(model))
            )
        elif variant.kind == "lora":
            assert train_data is not None
            adapter = folder / "train" / "adapter"
            train.run(
                TrainConfig(
                    model=plan.model,
                    revision=plan.revision,
                    data=train_data,
                    experts=experts[variant.experts] if variant.experts else None,
                    attention=variant.experts is None,
                    out=folder / "train",
                    seed=plan.seed,
                    **plan.training,
                )
            )
        evaluate.run(
            EvaluateConfig(
                model=model,
                revision=plan.revision if model == plan.model else None,
                adapter=adapter,
                tasks=",".join(plan.tasks),
                out=folder,
                limit=plan.limit,
                max_new_tokens=plan.max_new_tokens,
                variant=name,
                data_dir=data_dir,
                perplexity=plan.corpus,
                tokens=plan.tokens,
                seq_len=plan.seq_len,
                seed=plan.seed,
            )
        )
        extract.run(ExtractConfig(folder=folder))


def _conclude(plan: Plan, out: Path) -> dict[str, Any]:
    runs = []
    for name in plan.variants:
        variant = VARIANTS[name]
        target = None if variant.kind == "base" else variant.experts or "attention"
        kind = cast(Kind, variant.kind)
        runs.append(Run(name=name, variant=name, kind=kind, target=target, seed=plan.seed, experts=variant.experts))
    return conclude(
        out,
        runs,
        name=plan.name,
        model=plan.model,
        revision=plan.revision,
        limit=plan.limit,
        protocol="generate",
        corpora=(plan.corpus,),
        tasks=plan.tasks,
    )
