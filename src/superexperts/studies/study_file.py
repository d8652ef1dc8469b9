"""The study file: YAML -> Plan. All of it is checked before anything runs; all errors are reported at once, with lines.

Pydantic checks the fields of the file; the options in its sections are checked by the settings classes of the commands.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, cast, get_type_hints

from pydantic import ValidationError

from superexperts.core.errors import DataError, ExpertsError, Field, OptionError
from superexperts.core.settings import typed
from superexperts.core.types import ExpertSet
from superexperts.engines import ENGINES
from superexperts.evaluation.evaluate import EvaluateConfig
from superexperts.extraction.extract import ExtractConfig
from superexperts.profiling.profile import ProfileConfig
from superexperts.profiling.select import SelectConfig
from superexperts.results.variants import DEFAULT_SETS, Kind
from superexperts.studies.lined_yaml import LinedYaml, Place
from superexperts.studies.plan import Plan, StudyFile, VariantPlan, reads
from superexperts.training.train import TrainConfig

__all__ = ["line_of", "parse", "read_study"]

PER_RUN = {"out", "overwrite", "json", "device", "trust_remote_code"}
"""Options that say where and how a study is run, not what it is."""
SECTIONS: dict[str, tuple[type, set[str]]] = {
    "profile": (ProfileConfig, {"model", "revision", "corpus", "data_dir"}),
    "training": (
        TrainConfig,
        {"model", "revision", "recipe", "data", "experts", "attention", "target", "seed", "resume", "report_to"},
    ),
    "evaluation": (
        EvaluateConfig,
        {"model", "revision", "adapter", "silence", "tasks", "variant", "data_dir", "base_url", "seed", "split"},
    ),
    "extraction": (ExtractConfig, {"folder", "audit"}),
}
"""Fields that hold options of a command: its settings class, and the settings that a study fills in itself."""
FLAT = {"profile": ("tokens", "seq_len", "depth"), "evaluation": ("tokens", "seq_len", "limit", "max_new_tokens")}
"""Options that are fields of the file and not of a section: the most important ones, and those of two commands."""
SHARED = ("tokens", "seq_len", "depth", "limit", "max_new_tokens")
"""The fields that `FLAT` names."""

REASONS = {
    "int_type": "is not a whole number; correct it",
    "float_type": "is not a number; correct it",
    "string_type": "is not a text; put it in quotes",
    "dict_type": "is not a mapping of options; write {option: value}",
    "greater_than_equal": "is not positive; give at least 1",
}
"""Pydantic's type of an error -> the rest of a message that begins with the field and its value."""


def parse(text: str, name: str = "STUDY") -> Plan:
    """Read a study file; `OptionError` lists all errors with their lines. `name` is the name of the file."""
    return _Reader(text, name).plan()


def read_study(path: Path | None) -> tuple[str, Plan]:
    """The text of a study file (by default the demo's) and its plan."""
    if path is None:
        text = (files("superexperts.pocket") / "study.yaml").read_text(encoding="utf-8")
        return text, parse(text)
    if not path.is_file():
        raise OptionError(
            f"{str(path)!r} {'is a folder' if path.is_dir() else 'is not a file'}; give a study file, write one with ",
            Field("init"),
            ", or use ",
            Field("demo"),
            field="study",
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    return text, parse(text, str(path))


def line_of(text: str, place: Place) -> int | None:
    """The line of a field in a valid study file; None if the file does not have the first name of `place`.

    The second name of a variant's place is the variant's name, not its number in the list.
    """
    lines = _Reader(text, "").lines
    if place[:1] == ("variants",):
        found = next((path for path in lines if path[0:1] == place[:1] and path[2:3] == place[1:2]), place[:1])
        place = (*found[:3], *place[2:])
    while place and place not in lines:
        place = place[:-1]
    return lines[place] if place else None


class _Reader(LinedYaml):
    # ---- fields ----

    def plan(self) -> Plan:
        if not isinstance(self.value, dict):
            kinds = {list: "a list", type(None): "empty", str: "a text"}
            what = kinds.get(type(self.value), "a single value")
            self.error((), f"the file is {what}, not a mapping; write `name: NAME` and the other fields in lines")
            self.stop()
        if "name" not in self.value:
            self.error((), "the file has no `name:`; a study is a mapping with at least a name")
            self.stop()
        file = self._file()
        sections = {name: self._options((name,), getattr(file, name), *SECTIONS[name]) for name in SECTIONS}
        sets = self._sets(file.experts)
        variants = self._variants(file.variants, sets, file.seeds)
        self._commands(file, sections, variants)
        if self.errors:
            self.stop()
        fields = {name: getattr(file, name) for name in file.model_fields_set - {"seeds"}}
        return Plan(**{**fields, **sections, "experts": sets, "variants": variants})

    def _file(self) -> StudyFile:
        """The file's fields, defaults in place of those that are wrong, so that the others can be checked as well."""
        try:
            return StudyFile.model_validate(self.value)
        except ValidationError as invalid:
            for error in invalid.errors():
                name = error["loc"][0]
                if error["type"] == "extra_forbidden":
                    fields = ", ".join(sorted(StudyFile.model_fields))
                    near = difflib.get_close_matches(str(name), StudyFile.model_fields, n=1)
                    what_to_do = f"did you mean {near[0]}?" if near else f"choose from {fields}"
                    self.error((name,), f"{name!r} is not a field of a study; {what_to_do}")
                    continue
                context = error.get("ctx", {})
                reason = context.get("error") or REASONS.get(error["type"], error["msg"])
                self.error(error["loc"], f"{name}: {error['input']!r} {reason}")
            wrong = {error["loc"][0] for error in invalid.errors()}
            right = {name: value for name, value in self.value.items() if name not in wrong}
            return StudyFile.model_validate({"name": "unnamed"} | right)

    def _options(self, path: Place, value: Any, command: type, own: Collection[str]) -> dict[str, Any]:
        """Options of a command in their types; those that the study fills in and unknown ones are errors."""
        where = ".".join(map(str, path))
        if not isinstance(value, dict):
            self.error(path, f"{where}: {value!r} is not a mapping of options; write {{option: value}}")
            return {}
        hints = get_type_hints(command)
        free = hints.keys() - set(own) - PER_RUN - set(FLAT.get(str(path[0]), ()))
        found = {}
        for key, setting in value.items():
            if key not in free:
                aside = f"set by the study itself, not in {where}" if key in hints else f"not an option of {where}"
                near = difflib.get_close_matches(str(key), free, n=1)
                what_to_do = f"did you mean {near[0]}?" if near else f"choose from {', '.join(sorted(free))}"
                self.error((*path, key), f"{key!r} is {aside}; {what_to_do}")
                continue
            try:
                found[key] = typed(setting, hints[key])
            except ValueError as error:
                self.error((*path, key), f"{where}.{key}: {error}")
        return found

    # ---- experts and variants ----

    def _sets(self, written: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Every set that variants can name: those that every study has, and those of the file."""
        sets = {name: dict(options) for name, options in DEFAULT_SETS.items()}
        for name, options in written.items():
            path: Place = ("experts", name)
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "attention":
                self.error(path, f"experts: {name!r} is not a name for a set; use lower-case letters, digits and _")
            elif isinstance(options, str):
                self._check_set(path, options)
                sets[name] = {"experts": options}
            else:
                given = {} if options is None else options
                sets[name] = self._options(path, given, SelectConfig, {"profile", "seed", "depth"})
            rule = DEFAULT_SETS.get(name, {}).get("rule")
            if rule is not None and ("experts" in sets[name] or sets[name].get("rule", "super") != rule):
                self.error(path, f"experts: every study has a set {name!r}, of rule {rule}; give yours another name")
        for name, options in sets.items():
            self._select(("experts", name), options, sets)
        return sets

    def _select(self, path: Place, options: Mapping[str, Any], sets: Mapping[str, Mapping[str, Any]]) -> None:
        if "experts" in options:
            return
        like = options.get("like")
        if like is not None and like in sets and ("like" in sets[like] or reads(sets[like], "seed")):
            self.error((*path, "like"), f"like: {like!r} depends on another set or is random; name a fixed set")
        elif like is not None and like not in sets:
            self._check_set((*path, "like"), like)
        self._together(SelectConfig, {"profile": Path("profile")}, options, dict.fromkeys(options, path))

    def _check_set(self, path: Place, text: str) -> None:
        try:
            ExpertSet.parse(text, str(path[-1]))
        except (ExpertsError, DataError) as error:
            self.error(path, error.line())

    def _variants(self, items: list[Any], sets: Mapping[str, Any], seeds: int) -> tuple[VariantPlan, ...]:
        plans: list[VariantPlan] = []
        for i, item in enumerate(items):
            plan = self._variant(("variants", i), item, sets, seeds)
            if plan is not None and plan.name in [other.name for other in plans]:
                self.error(("variants", i), f"variants: {plan.name!r} is given twice; keep one")
            elif plan is not None:
                plans.append(plan)
        if not plans or plans[0].name != "base":
            self.error(("variants",), "variants: the first variant is not base; put base first")
        return tuple(plans)

    def _variant(self, path: Place, item: Any, sets: Mapping[str, Any], seeds: int) -> VariantPlan | None:
        """One line: a name, or {name: options of train, and seeds}."""
        name: Any = item
        options: Any = {}
        if isinstance(item, dict) and len(item) == 1:
            ((name, options),) = item.items()
        if not isinstance(name, str) or not isinstance(options, dict):
            self.error(path, f"variants: {item!r} is neither a name nor {{name: {{seeds: 3}}}}; write one of the two")
            return None
        kind, _, target = name.partition("-")
        good = name == "base" or (kind in ("prune", "lora") and target in sets) or name == "lora-attention"
        if not good:
            known = f"base, lora-attention, prune-SET and lora-SET, SET being one of {', '.join(sets)}"
            self.error(path, f"variants: {name!r} is unknown; choose from {known}")
            return None
        own = dict(options)
        number = own.pop("seeds", None)
        random = kind == "lora" or (target in sets and reads(sets[target], "seed"))
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            self.error((*path, name, "seeds"), f"seeds: {number!r} is not a number of runs; give 1 or more")
        elif number is not None and number > 1 and not random:
            self.error((*path, name, "seeds"), f"seeds: nothing in {name} is random; leave it out")
        if own and kind != "lora":
            self.error(path, f"variants: {name} trains nothing; leave {next(iter(own))} out")
            own = {}
        training = self._options((*path, name), own, *SECTIONS["training"])
        runs = number if isinstance(number, int) and number > 0 else seeds
        return VariantPlan(
            name=name, kind=cast(Kind, kind), target=target or None, seeds=runs if random else 1, training=training
        )

    # ---- what the commands say ----

    def _commands(
        self, file: StudyFile, sections: Mapping[str, Mapping[str, Any]], variants: tuple[VariantPlan, ...]
    ) -> None:
        """The checks that the commands make of their settings."""
        # A field with a wrong type has its default here, which must not cause a second error.
        flat = {name: getattr(file, name) for name in SHARED if name in file.model_fields_set}
        servers = [name for name, engine in ENGINES.items() if engine.server]
        commands: tuple[tuple[str, type, dict[str, Any]], ...] = (
            ("profile", ProfileConfig, {}),
            ("evaluation", EvaluateConfig, {}),
            ("extraction", ExtractConfig, {"folder": Path("x")}),
        )
        for name, command, fixed in commands:
            options = {key: flat[key] for key in FLAT.get(name, ()) if key in flat} | dict(sections[name])
            if name == "evaluation":
                options["tasks"] = ",".join(file.tasks)
                if options.get("engine") in servers:
                    del options["engine"]  # this module reports it, below
                # As `Plan.perplexity`: measured on the first corpus unless the file says otherwise.
                in_process = ENGINES[options.get("engine", "hf")].in_process
                measured = in_process and options.get("perplexity", "") is not None
                fixed = {"perplexity": "pocket"} if measured else {}
                for key in ("tokens", "seq_len"):
                    if not measured or (key == "tokens" and options.get("reference_windows")):
                        options.pop(key, None)
            self._together(command, fixed, options, dict.fromkeys(sections[name], (name,)))
        rows, training = {"data": Path("rows"), "attention": True}, sections["training"]
        self._together(TrainConfig, rows, training, dict.fromkeys(training, ("training",)))
        for i, variant in enumerate(variants):
            if variant.training:
                options = {**training, **variant.training}
                where: dict[str, Place] = dict.fromkeys(options, ("training",))
                where |= dict.fromkeys(variant.training, ("variants", i, variant.name))
                self._together(TrainConfig, rows, options, where)
        if sections["evaluation"].get("engine") in servers:
            *others, last = (name for name in ENGINES if name not in servers)
            self.error(
                ("evaluation", "engine"),
                f"engine: a server has one model, a study has many; use {', '.join(others)} or {last}",
            )
        trains = any(variant.kind == "lora" for variant in variants)
        if trains and not self.value.get("train_data") and file.data_dir != "pocket":
            self.error(("train_data",), "train_data: missing for the lora variants; name a file of rows")

    def _together(
        self, command: type, fixed: Mapping[str, Any], options: Mapping[str, Any], places: Mapping[str, Place]
    ) -> None:
        """Record every error that a command finds in its options. A command raises only the first one, so the wrong
        option is left out and the rest is tried again.

        `places` has the place of each option that is in a section; the others are fields of the file.
        """
        left = dict(options)
        while True:
            try:
                command(**{**fixed, **left})
                return
            except OptionError as error:
                key = error.field or ""
                left_out = options.keys() - left.keys()
                # An error that mentions an option left out may come from its absence; so may one about another field.
                caused = any(part in left_out for part in error.parts) or (left_out and key not in left)
                if not caused:
                    self.error((*places.get(key, ()), key), error.line())
                if key not in left:
                    return
                del left[key]
