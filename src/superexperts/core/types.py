"""The objects that stages hand to each other: frozen dataclasses, each with `to_json` and `from_json`.

Pydantic checks what is read (`core.validation`). Objects that the package makes itself are not checked again.

Profile -> ExpertSet -> Variant (a checkpoint or an adapter folder)      Answer -> Extraction -> Score
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from superexperts.core.console import is_shown, note
from superexperts.core.errors import DataError, ExpertsError
from superexperts.core.expert_names import ExpertId, ExpertKey, expert_id, key_name, key_order, read_keys
from superexperts.core.paths import require_file, require_inside
from superexperts.core.runs import read_json
from superexperts.core.thoughts import Parts, leaves_open, split_thoughts
from superexperts.core.validation import check_schema, validated

__all__ = [
    "Answer",
    "CorpusProfile",
    "ExpertId",
    "ExpertKey",
    "ExpertSet",
    "ExpertStats",
    "Extraction",
    "Profile",
    "Score",
    "chosen_experts",
    "key_name",
    "key_order",
]

Statistic = Literal["all", "first", "reference"]
PROFILE_SCHEMA = "superexperts/profile/1"
EXPERTS_SCHEMA = "superexperts/experts/1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertStats:
    """Statistics of one expert on one corpus."""

    layer: int
    expert: ExpertId
    tokens: int = 0
    """Tokens routed to the expert; padding is never counted."""
    output_max: float = 0.0
    """Largest |down_proj output| over tokens and channels (arXiv 2507.23279, Eq. 8's a[l,e]); 0.0 without tokens."""
    channel: int | None = None
    """Hidden channel of that peak; None without tokens, as are the next two fields."""
    position: int | None = None
    """Position of the peak's token in its sequence, BOS being 0."""
    token_id: int | None = None
    """Vocabulary id of the peak's token."""
    first_token_output_max: float = 0.0
    """The same, but only over the first token of each sequence that was routed to the expert, and over all tokens for
    a shared expert."""
    reference_output_max: float | None = None
    """The same, but only over the row of each sequence that the reference profiler reads (`profiling.reference`), and
    over all tokens for a shared expert. None without tokens, and in profiles of superexperts 0.1.0."""
    input_max: float = 0.0
    """Largest |input of down_proj|; channel, position and token of that peak follow."""
    input_channel: int | None = None
    input_position: int | None = None
    input_token_id: int | None = None
    gate_sum: float = 0.0
    """Sum of the routing weights over the expert's tokens; a shared expert's weight is 1."""
    reap: float = 0.0
    """Mean over the expert's tokens of routing weight x L2 norm of the down_proj output: REAP's saliency
    (arXiv 2510.13999, Eq. 9)."""
    token_share: float | None = 0.0
    """Its tokens divided by the sum of the tokens of all routed experts in the layer: ESFT's token selection ratio
    (arXiv 2407.01906, Eq. 9), MoE-Sieve's count. None for a shared expert, as is the next field."""
    gate_share: float | None = 0.0
    """Its share in the sum of the routing weights of the layer: ESFT's average gate score (Eq. 8), normalised."""

    @property
    def key(self) -> ExpertKey:
        """(layer, expert)."""
        return self.layer, self.expert


ADDED_STATISTICS = ("reference_output_max",)
"""Fields of `ExpertStats` that profiles of superexperts 0.1.0 lack; their default is None."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusProfile:
    """The part of a profile about one corpus; experts in the order of `key_order`."""

    tokens: int
    """Tokens run through the model, without padding."""
    experts: tuple[ExpertStats, ...]
    stable: bool | None = None
    """For a quick look: whether the super experts stayed the same over its last rounds. None for a full profile."""


CRITERION_DEPTH = 0.75
"""The criterion searches the first three quarters of the layers for super experts (arXiv 2507.23279)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """`profile.json`: per corpus, per (layer, expert) statistics."""

    model: str
    num_layers: int
    """Number of decoder layers, including dense ones."""
    depth: float = 1.0
    """Share of the layers that were run: those with a number below round(depth x num_layers)."""
    statistic: Statistic = "all"
    """Which peaks the criterion uses: `output_max`, `first_token_output_max` or `reference_output_max`."""
    corpora: Mapping[str, CorpusProfile]

    @property
    def criterion_depth(self) -> float:
        """Share of the layers in which the criterion searches for super experts; at most the layers that were run."""
        return min(CRITERION_DEPTH, self.depth)

    def to_json(self) -> dict[str, Any]:
        """A JSON value with the schema's name. A profile of superexperts 0.1.0 stays as it was, for its hash."""
        value = {"schema": PROFILE_SCHEMA, **dataclasses.asdict(self)}
        for row in (row for corpus in value["corpora"].values() for row in corpus["experts"]):
            for name in ADDED_STATISTICS:
                if row[name] is None:
                    del row[name]
        return value

    @classmethod
    def from_json(cls, value: Any) -> Profile:
        """The inverse of `to_json`; `DataError` for anything else."""
        check_schema(value, PROFILE_SCHEMA, "profile", "give the profile.json that `profile` wrote")
        profile = validated(cls, value, "profile", "profile again")
        if not profile.corpora:
            raise DataError("it has no corpus; profile again", field="profile")
        return profile

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Reads `profile.json`, or the one in a folder."""
        what = "the folder that `profile` wrote, or the profile.json in it"
        if path.is_dir():
            path = require_inside(path, "profile.json", "profile", what)
        value = read_json(require_file(path, "profile", what), "profile", f"give {what}")
        try:
            return cls.from_json(value)
        except DataError as error:
            raise DataError(f"{path}: ", *error.parts, field=error.field) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertSet:
    """`experts.json`: the chosen experts, the rule that chose them, and a score each (None where a rule has none)."""

    model: str
    rule: Mapping[str, Any]
    experts: tuple[ExpertKey, ...]
    scores: tuple[float | None, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON value with the schema's name."""
        rows = [
            {"layer": layer, "expert": expert, "score": score}
            for (layer, expert), score in zip(self.experts, self.scores, strict=True)
        ]
        return {"schema": EXPERTS_SCHEMA, "model": self.model, "rule": dict(self.rule), "experts": rows}

    @classmethod
    def from_json(cls, value: Any) -> ExpertSet:
        """Reads our own file, or the upstream profiler's `Super Experts Report.json` (a list of
        `{"layer_index", "expert_index", "output_max", "rank"}`, indices as strings or numbers)."""
        if isinstance(value, list):
            reported = [validated(_ReportedExpert, row, "experts", "select again") for row in value]
            rows = [(row.layer_index, expert_id(row.expert_index), row.output_max) for row in reported]
            return cls._from_rows("", {"name": "upstream report"}, rows)
        check_schema(value, EXPERTS_SCHEMA, "experts", "give the file that `select` wrote")
        file = validated(_ExpertsFile, value, "experts", "select again")
        return cls._from_rows(file.model, file.rule, [(r.layer, expert_id(r.expert), r.score) for r in file.experts])

    @classmethod
    def parse(cls, text: str, field: str = "experts") -> ExpertSet:
        """Reads a file's path, or inline `L2E54,L3E38`, `2,54;3,38`, `L8shared`, `8,-1`; blanks and case do not matter.

        Errors are about `field`.
        """
        try:
            return cls._parse(text)
        except (ExpertsError, DataError) as error:
            raise error.about(field) from error

    @classmethod
    def _parse(cls, text: str) -> ExpertSet:
        path = Path(text)
        if path.is_dir() or path.is_file() or path.suffix == ".json":
            what = "the file that `select` wrote, or experts like L2E54,L3E38"
            file = require_inside(path, "experts.json", "experts", what) if path.is_dir() else path
            return cls.from_json(read_json(require_file(file, "experts", what), "experts", f"give {what}"))
        keys = read_keys(text)
        return cls._from_rows("", {"name": "inline", "text": text}, [(*key, None) for key in keys])

    @classmethod
    def _from_rows(
        cls, model: str, rule: Mapping[str, Any], rows: Iterable[tuple[int, ExpertId, float | None]]
    ) -> ExpertSet:
        rows = list(rows)
        experts = tuple((layer, expert) for layer, expert, _ in rows)
        if not experts:
            raise ExpertsError("the set is empty; select with a rule that finds some", field="experts")
        if len(set(experts)) < len(experts):
            twice = next(key for key in experts if experts.count(key) > 1)
            raise ExpertsError(f"{key_name(twice)} is named twice; name each expert once", field="experts")
        return cls(model=model, rule=rule, experts=experts, scores=tuple(score for *_, score in rows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ExpertRow:
    """An entry of `experts` in experts.json."""

    layer: int
    expert: int | str
    score: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ExpertsFile:
    """experts.json as it is written."""

    model: str
    rule: Mapping[str, Any]
    experts: tuple[_ExpertRow, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ReportedExpert:
    """An entry of the upstream profiler's report."""

    layer_index: int
    expert_index: int | str
    output_max: float


def chosen_experts(text: str, model: str, field: str = "experts") -> ExpertSet:
    """The expert set that the setting `field` names; prints a note if it was selected from another model."""
    chosen = ExpertSet.parse(text, field)
    if chosen.model and chosen.model != model:
        note(f"{field}: {text} was selected from {chosen.model!r}, but the model is {model!r}")
    return chosen


Ended = Literal["cut", "empty", "refused"]
"""How a response ended if not by itself: at the limit of tokens or within thoughts; without a word; by a server that
refused the prompt or filtered the response."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A line of `answers/<task>.jsonl`: the unchanged response of a model to an item."""

    id: str
    prompt: str
    response: str
    gold: str | None
    """Label of the right choice, "yes" or "no", or a number; None if it is not published."""
    choices: tuple[tuple[str, str], ...]
    """(label, text) of each choice in order; empty for numbers and yes/no."""
    kind: Literal["choice", "number", "yesno"]
    task: str
    variant: str
    seed: int
    subject: str | None = None
    """Subject of the item, such as anatomy; None if the benchmark has no subjects."""
    num_fewshot: int = 0
    """Examples in front of the question."""
    loglikelihoods: tuple[tuple[str, float, int], ...] | None = None
    """For each choice (label, log-probability of its tokens after the prompt in nats, number of its characters); None
    if the response was generated. `response` is the label of the most probable choice, the first one of equals."""
    thoughts: str | None = None
    """What a reasoning model thought before it answered: split off the response, or a server's field for it."""
    text: str | None = None
    """The response without its thoughts; None if nothing was split off, so that the whole response is the text."""
    finish_reason: str | None = None
    """Why the response ended, as servers say it: "stop", "length" (the limit of tokens), "content_filter", "refusal",
    "error" (the server refused this prompt); None if it is not known."""

    def __post_init__(self) -> None:
        for name in (self.task, self.variant):
            if not is_shown(name):
                raise DataError(f"{name!r:.60} is not a name of a benchmark or variant; rename it", field="answers")

    @property
    def question(self) -> str:
        """The question without the examples before it and the words around it."""
        own = self.prompt.rpartition("\n\nQuestion: ")[2] if self.num_fewshot else self.prompt
        return own.removeprefix("Question: ").removesuffix("\nAnswer:")

    @property
    def parts(self) -> Parts:
        """The response's thoughts and text. They are split here if `evaluate` did not, as its earlier versions."""
        if self.text is None:
            return split_thoughts(self.response, opened=leaves_open(self.prompt))
        if self.text.strip() or not self.thoughts:
            return Parts(self.thoughts or "", self.text, True)
        finished = self.finish_reason != "length" and split_thoughts(self.response).finished
        return Parts(self.thoughts, "", finished)

    def ended(self, parts: Parts) -> Ended | None:
        """How the response, with these parts, ended if not by itself."""
        if self.finish_reason in _REFUSED:
            return "refused"
        if self.finish_reason == "length" or not parts.finished:
            return "cut"
        return None if parts.text.strip() or parts.thoughts.strip() else "empty"

    def to_json(self) -> dict[str, Any]:
        """A JSON value, without optional fields at their default."""
        value = dict(vars(self))  # a shallow copy is enough: all values are immutable
        for field in dataclasses.fields(self):
            if field.name in _OPTIONAL and value[field.name] == field.default:
                del value[field.name]
        return value

    @classmethod
    def from_json(cls, value: Any) -> Answer:
        """The inverse of `to_json`; `DataError` for anything else."""
        return validated(cls, value, "answers", "evaluate again")


_REFUSED = frozenset(("content_filter", "refusal", "error"))
"""Reasons of a server for which there is no response to judge the model by."""
_OPTIONAL = ("subject", "num_fewshot", "loglikelihoods", "thoughts", "text", "finish_reason")
"""Fields of an answer that only some protocols and benchmarks have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extraction:
    """A line of `extractions/<task>.jsonl`: the answer extracted from a response, and how."""

    id: str
    extracted: str | None
    how: str
    """"rule:NAME", "judge" or "unparsed"."""
    correct: bool | None
    """Unparsed is never correct; None if there is no gold answer."""
    ended: Ended | None = None
    """How the response ended if not by itself. A cut response may have said its answer before."""

    def to_json(self) -> dict[str, Any]:
        """A JSON value, without `ended` where the response ended by itself."""
        value = dict(vars(self))  # much faster than dataclasses.asdict, and there are many
        if self.ended is None:
            del value["ended"]
        return value

    @classmethod
    def from_json(cls, value: Any) -> Extraction:
        """The inverse of `to_json`; `DataError` for anything else."""
        return validated(cls, value, "extractions", "extract again")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """One run on one benchmark, with all counts."""

    task: str
    variant: str
    items: int
    correct: int
    unparsed: int
    """Responses without a recognisable answer; they count as wrong."""
    accuracy: float
    """correct / items, in 0..1."""
    low: float
    high: float
    """95% Wilson score interval of the accuracy."""
    cut: int = 0
    """Responses that were cut at the limit of tokens or within thoughts, parsed or not."""
    empty: int = 0
    """Responses without a word; they are unparsed too."""
    refused: int = 0
    """Prompts that a server refused, and responses that it filtered."""

    def to_json(self) -> dict[str, Any]:
        """A JSON value, without the counts of how responses ended that are 0."""
        value = dataclasses.asdict(self)
        return {name: found for name, found in value.items() if found or name not in ("cut", "empty", "refused")}

    @classmethod
    def from_json(cls, value: Any) -> Score:
        """The inverse of `to_json`; `DataError` for anything else."""
        return validated(cls, value, "scores", "extract again")
