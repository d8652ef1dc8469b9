"""The study file: YAML -> Plan. All of it is checked before anything runs; every error is told, with its line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast, get_type_hints

from superexperts.core.config import TASKS, EvaluateConfig, ExtractConfig, ProfileConfig
from superexperts.core.errors import DataError, ExpertsError, OptionError
from superexperts.core.settings import typed
from superexperts.core.types import ExpertSet
from superexperts.profiling.rules import RULES
from superexperts.profiling.select import SelectConfig
from superexperts.results.variants import DEFAULT_SETS, DEFAULT_VARIANTS, Kind, Run
from superexperts.studies.lined_yaml import LinedYaml, Place
from superexperts.training.train import TrainConfig

__all__ = ["Plan", "VariantPlan", "expert_files", "line_of", "parse", "reads"]

PER_RUN = {"out", "json", "device", "trust_remote_code"}
"""Options that belong to where a study is run, not to what it is."""
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
"""Fields that hold options of a command, and those of its options that a study sets itself."""
FLAT = {"profile": ("tokens", "seq_len", "depth"), "evaluation": ("tokens", "seq_len", "limit", "max_new_tokens")}
"""Options that stand in the file by themselves: one always looks for them, or two commands share them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantPlan:
    """One line of `variants`."""

    name: str
    kind: Kind
    target: str | None
    seeds: int
    """How many runs."""
    training: Mapping[str, Any]
    """Options of `train` for this variant alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A study file; `parse` checks it."""

    name: str
    model: str = "pocket"
    revision: str | None = None
    corpus: tuple[str, ...] = ("pocket",)
    """Corpora of the profile; the perplexity is measured on the first."""
    tokens: int = 16384
    seq_len: int = 512
    depth: float = 0.75
    profile: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    experts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Sets of experts by name: options of `select`, or {"experts": TEXT} for a set as it stands."""
    variants: tuple[VariantPlan, ...]
    seed: int = 0
    tasks: tuple[str, ...] = TASKS
    limit: int | None = None
    max_new_tokens: int = 512
    data_dir: str | None = None
    train_data: str | None = None
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extraction: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def runs(self) -> tuple[Run, ...]:
        """Every model that is asked, in the order of the variants."""
        return tuple(
            Run(
                name=variant.name + (f"-s{k}" if k else ""),
                variant=variant.name,
                kind=variant.kind,
                target=variant.target,
                seed=self.seed + k,
                experts=self._stem(variant, k),
                drawn=self.drawn(variant.target),
            )
            for variant in self.variants
            for k in range(variant.seeds)
        )

    def _stem(self, variant: VariantPlan, k: int) -> str | None:
        if variant.target is None or variant.target == "attention":
            return None
        return f"{variant.target}-s{k}" if k and self.drawn(variant.target) else variant.target

    def drawn(self, name: str | None) -> bool:
        """Whether a set of experts is another one for each seed."""
        return name is not None and reads(self.experts.get(name, {}), "seed")

    def variant(self, name: str) -> VariantPlan:
        """The variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)

    def training_of(self, run: Run) -> dict[str, Any]:
        """Options of `train` for a run: the study's, and its variant's own over them."""
        return {**self.training, **self.variant(run.variant).training}

    @property
    def perplexity(self) -> str | None:
        """Corpus of the perplexity, which only a model in this process can tell."""
        return self.evaluation.get("perplexity", self.corpus[0]) if self.engine == "hf" else None

    @property
    def perplexity_column(self) -> str | None:
        """Its column, the profile's unless `evaluation` has one."""
        column: str | None = self.evaluation.get("column", self.profile.get("column"))
        return column

    @property
    def engine(self) -> str:
        """What answers."""
        return str(self.evaluation.get("engine", "hf"))


def parse(text: str, name: str = "STUDY") -> Plan:
    """Reads a study file; `OptionError` tells every error, with its line. `name` is the file's."""
    return _Reader(text, name).plan()


def line_of(text: str, place: Place) -> int | None:
    """The line of a field in a study file that `parse` takes; None where its first name does not stand there.

    Of a variant the second name is its own, not its number.
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
        fields = {field.name for field in dataclasses.fields(Plan)} | {"seeds"}
        if not isinstance(self.value, dict) or "name" not in self.value:
            self.error((), "the file has no `name:`; a study is a mapping with at least a name")
            self.stop()
        for key in self.value.keys() - fields:
            self.error((key,), f"{key!r} is no field of a study; choose from {', '.join(sorted(fields))}")
        given = {key: value for key, value in self.value.items() if key in fields}
        plain = {name: self._plain(name, value) for name, value in given.items() if name in PLAIN}
        read = {name: value for name, value in plain.items() if value is not _WRONG}
        if "name" in read and not re.fullmatch(r"[\w.-]*\w[\w.-]*", read["name"]):
            self.error(("name",), f"name: {read['name']!r} becomes a folder; use letters, digits, dots and dashes")
        seeds = read.pop("seeds", 1)
        if seeds < 1:
            self.error(("seeds",), f"seeds: {seeds} is not positive; give at least 1")
        for name in ("corpus", "tasks"):
            if name in given:
                read[name] = self._names(name, given[name])
        for name in SECTIONS:
            read[name] = self._options((name,), given.get(name), *SECTIONS[name])
        read["experts"] = self._sets(given.get("experts"))
        read["variants"] = self._variants(given.get("variants", list(DEFAULT_VARIANTS)), read["experts"], max(1, seeds))
        self._commands(read)
        if self.errors:
            self.stop()
        return Plan(**read)

    def _plain(self, name: str, value: Any) -> Any:
        try:
            return typed(value, PLAIN[name])
        except ValueError as error:
            self.error((name,), f"{name}: {error}")
            return _WRONG

    def _names(self, name: str, value: Any) -> tuple[str, ...]:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not all(isinstance(item, str) for item in names):
            self.error((name,), f"{name}: {value!r} is no list of names; write [a, b]")
            return ()
        if len(set(names)) < len(names):
            self.error((name,), f"{name}: {names} names one twice; name each once")
        return tuple(names)

    def _options(self, path: Place, value: Any, command: type, own: Collection[str]) -> dict[str, Any]:
        """Options of a command in their types; a study's own and unknown ones are errors."""
        if value is None:
            return {}
        where = ".".join(map(str, path))
        if not isinstance(value, dict):
            self.error(path, f"{where}: {value!r} is no mapping of options; write {{option: value}}")
            return {}
        hints = get_type_hints(command)
        free = hints.keys() - set(own) - PER_RUN - set(FLAT.get(str(path[0]), ()))
        found = {}
        for key, setting in value.items():
            if key not in free:
                aside = f"set by the study itself, not in {where}" if key in hints else f"no option of {where}"
                self.error((*path, key), f"{key!r} is {aside}; choose from {', '.join(sorted(free))}")
                continue
            try:
                found[key] = typed(setting, hints[key])
            except ValueError as error:
                self.error((*path, key), f"{where}.{key}: {error}")
        return found

    # ---- experts and variants ----

    def _sets(self, value: Any) -> dict[str, dict[str, Any]]:
        """Every set that the file may name: those that every study knows, and its own."""
        sets = {name: dict(options) for name, options in DEFAULT_SETS.items()}
        if value is not None and not isinstance(value, dict):
            self.error(("experts",), f"experts: {value!r} is no mapping; write {{name: {{rule: gate, count: 4}}}}")
            return sets
        for name, options in (value or {}).items():
            path: Place = ("experts", name)
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "attention":
                self.error(path, f"experts: {name!r} is no name for a set; use small letters, digits and _")
            elif isinstance(options, str):
                self._check_set(path, options)
                sets[name] = {"experts": options}
            else:
                sets[name] = self._options(path, options, SelectConfig, {"profile", "seed", "depth"})
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
            self.error((*path, "like"), f"like: {like!r} follows another set or is drawn; name the set itself")
        elif like is not None and like not in sets:
            self._check_set((*path, "like"), like)
        self._together(SelectConfig, {"profile": Path("profile")}, options, dict.fromkeys(options, path))

    def _check_set(self, path: Place, text: str) -> None:
        try:
            ExpertSet.parse(text)
        except (ExpertsError, DataError) as error:
            self.error(path, error.about(str(path[-1])).line())

    def _variants(self, value: Any, sets: Mapping[str, Any], seeds: int) -> tuple[VariantPlan, ...]:
        if not isinstance(value, list) or not value:
            self.error(("variants",), f"variants: {value!r} is no list; write [base, prune-super]")
            return ()
        plans: list[VariantPlan] = []
        for i, item in enumerate(value):
            plan = self._variant(("variants", i), item, sets, seeds)
            if plan is not None and plan.name in [other.name for other in plans]:
                self.error(("variants", i), f"variants: {plan.name!r} stands here twice; keep one")
            elif plan is not None:
                plans.append(plan)
        if not plans or plans[0].name != "base":
            self.error(("variants",), "variants: the first one is not base; put base first")
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
            self.error((*path, name, "seeds"), f"seeds: {number!r} is no count of runs; give 1 or more")
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

    def _commands(self, read: Mapping[str, Any]) -> None:
        """The checks that the commands make of their options, all of them."""
        where: dict[str, Place] = dict.fromkeys(PLAIN, ())
        flat = {name: read[name] for name in ("tokens", "seq_len", "depth", "limit", "max_new_tokens") if name in read}
        for name, command, fixed in (
            ("profile", ProfileConfig, {}),
            ("evaluation", EvaluateConfig, {}),
            ("extraction", ExtractConfig, {"folder": Path("x")}),
        ):
            options = {key: flat[key] for key in FLAT.get(name, ()) if key in flat} | read[name]
            if name == "evaluation":
                options["tasks"] = ",".join(read.get("tasks", TASKS))
                if options.get("engine") == "api":
                    del options["engine"]  # told below
            places = where | dict.fromkeys(read[name], (name,)) | {"tasks": ()}
            self._together(command, fixed, options, places)
        rows = {"data": Path("rows"), "attention": True}
        self._together(TrainConfig, rows, read["training"], dict.fromkeys(read["training"], ("training",)))
        for i, variant in enumerate(read["variants"]):
            if variant.training:
                options = {**read["training"], **variant.training}
                own: dict[str, Place] = dict.fromkeys(variant.training, ("variants", i, variant.name))
                self._together(TrainConfig, rows, options, dict.fromkeys(options, ("training",)) | own)
        if read["evaluation"].get("engine") == "api":
            self.error(
                ("evaluation", "engine"), "engine: a server has one model, a study has many; use hf, vllm or sglang"
            )
        trains = any(variant.kind == "lora" for variant in read["variants"])
        if trains and read.get("train_data") is None and read.get("data_dir") != "pocket":
            self.error(("train_data",), "train_data: missing for the lora variants; name a file of rows")

    def _together(
        self, command: type, fixed: Mapping[str, Any], options: Mapping[str, Any], places: Mapping[str, Place]
    ) -> None:
        """Note every error that a command finds in its options: each wrong option is left out, and the rest tried."""
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


_WRONG = object()
PLAIN: dict[str, Any] = {
    name: hint for name, hint in get_type_hints(Plan).items() if name not in (*SECTIONS, "experts")
}
for _name in ("corpus", "tasks", "variants"):
    del PLAIN[_name]
PLAIN["seeds"] = int


def expert_files(plan: Plan) -> dict[str, tuple[str, int]]:
    """Stem of each file of experts that the runs need -> (its set, seed), sets that others follow first."""
    needed = {run.experts: (run.target, run.seed) for run in plan.runs if run.experts and run.target}
    followed = {plan.experts[name].get("like") for name, _ in needed.values()}
    first = {name: (name, plan.seed) for name in plan.experts if name in followed}
    return first | needed


def reads(options: Mapping[str, Any], setting: str) -> bool:
    """Whether the rule that a set's options name reads a setting of `select`, such as `seed`."""
    rule = RULES.get(options.get("rule", "super"))
    return rule is not None and setting in rule.settings
