"""What a study is: its fields, checked by pydantic, its variants and their runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from superexperts.benchmarks import default_benchmarks
from superexperts.engines import ENGINES
from superexperts.profiling.rules import RULES
from superexperts.results.variants import DEFAULT_VARIANTS, Kind, Run

__all__ = ["Plan", "StudyFile", "VariantPlan", "expert_files", "reads"]

# ---- types of the fields ----------------------------------------------------------------------------------------


def _as_number(value: Any) -> Any:
    """Text that is a number as one, since YAML 1.1 reads 1e-4 as text; 1e4 and 10000.0 as whole numbers."""
    try:
        value = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _folder_name(value: str) -> str:
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", value):
        raise ValueError("cannot be the name of a folder; use letters, digits, dots and dashes")
    return value


def _names(value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or not all(isinstance(item, str) for item in names):
        raise ValueError("is not a list of names; write [a, b]")
    if len(set(names)) < len(names):
        raise ValueError("has a name twice; give each once")
    return tuple(names)


def _list(value: Any) -> Any:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("is not a list; write [base, prune-super]")
    return value


Whole = Annotated[int, Strict(), BeforeValidator(_as_number)]
Number = Annotated[float, Strict(), BeforeValidator(_as_number)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Options = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]

# ---- the plan -------------------------------------------------------------------------------------------------------


class VariantPlan(BaseModel):
    """One line of `variants`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Kind
    target: str | None
    seeds: int
    """Number of runs."""
    training: Options
    """Options of `train` for this variant alone."""


class _Fields(BaseModel):
    """The fields that are the same in the file and in the plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(_folder_name)]
    model: str = "pocket"
    revision: str | None = None
    corpus: Names = ("pocket",)
    """Corpora of the profile; the perplexity is measured on the first."""
    tokens: Whole = 16384
    seq_len: Whole = 512
    depth: Number = 0.75
    profile: Options = Field(default_factory=dict)
    seed: Whole = 0
    tasks: Names = Field(default_factory=default_benchmarks)
    limit: Whole | None = None
    max_new_tokens: Whole = 512
    data_dir: str | None = None
    train_data: str | None = None
    training: Options = Field(default_factory=dict)
    evaluation: Options = Field(default_factory=dict)
    extraction: Options = Field(default_factory=dict)


class StudyFile(_Fields):
    """A study file as it is written; `parse` checks the options in its sections, sets and variants."""

    experts: Options = Field(default_factory=dict)
    variants: Annotated[list[Any], BeforeValidator(_list)] = Field(default=list(DEFAULT_VARIANTS))
    seeds: Annotated[Whole, Field(ge=1)] = 1
    """Runs of each variant that has something random in it and no `seeds` itself."""


class Plan(_Fields):
    """A study. `parse` makes it from a file, with the options in the types of the commands' settings."""

    experts: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Sets of experts by name: options of `select`, or {"experts": TEXT} for a set that is written out."""
    variants: tuple[VariantPlan, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """Every model that is evaluated, in the order of the variants."""
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
        """Whether a set of experts is drawn anew for each seed."""
        return name is not None and reads(self.experts.get(name, {}), "seed")

    def variant(self, name: str) -> VariantPlan:
        """The variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)

    def training_of(self, run: Run) -> dict[str, Any]:
        """Options of `train` for a run: those of the study, overridden by those of its variant.

        Rows are put as the questions are asked, unless `training` says otherwise.
        """
        words = {"on": "chat", "off": "plain"}
        as_asked = {
            "prompt": words.get(self.evaluation.get("chat_template", "auto")),
            "system_prompt": self.evaluation.get("system_prompt"),
        }
        known = {name: value for name, value in as_asked.items() if value is not None}
        return {**known, **self.training, **self.variant(run.variant).training}

    @property
    def prompts(self) -> frozenset[str]:
        """The kinds of prompt, plain and chat, that the file gives to trainings and to the evaluation."""
        given = [self.training, *(variant.training for variant in self.variants if variant.kind == "lora")]
        words = {"on": "chat", "off": "plain"}
        found = {str(options.get("prompt")) for options in given} | {
            str(words.get(str(self.evaluation.get("chat_template"))))
        }
        return frozenset(found & set(words.values()))

    @property
    def asking(self) -> dict[str, Any]:
        """Options of `evaluate` for all runs: questions are asked as the trainings put them."""
        if "chat_template" in self.evaluation or len(self.prompts) != 1:
            return dict(self.evaluation)
        return {**self.evaluation, "chat_template": "on" if "chat" in self.prompts else "off"}

    @property
    def perplexity(self) -> str | None:
        """The corpus of the perplexity; None for other engines than hf, which give no log-probabilities of a text."""
        return self.evaluation.get("perplexity", self.corpus[0]) if ENGINES[self.engine].in_process else None

    @property
    def perplexity_column(self) -> str | None:
        """The column of that corpus: the profile's unless `evaluation` names one."""
        column: str | None = self.evaluation.get("column", self.profile.get("column"))
        return column

    @property
    def engine(self) -> str:
        """The engine that answers the questions."""
        return str(self.evaluation.get("engine", "hf"))


def expert_files(plan: Plan) -> dict[str, tuple[str, int]]:
    """Stem of each file of experts that the runs need -> (its set, seed); sets that others depend on come first."""
    needed = {run.experts: (run.target, run.seed) for run in plan.runs if run.experts and run.target}
    followed = {plan.experts[name].get("like") for name, _ in needed.values()}
    first = {name: (name, plan.seed) for name in plan.experts if name in followed}
    return first | needed


def reads(options: Mapping[str, Any], setting: str) -> bool:
    """Whether the rule that a set's options name reads a setting of `select`, such as `seed`."""
    rule = RULES.get(options.get("rule", "super"))
    return rule is not None and setting in rule.settings
