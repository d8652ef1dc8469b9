"""The command `select`: chooses experts from a profile by one of the rules in `rules.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import tyro
from tyro.conf import Positional

from superexperts.core.console import note, stdout
from superexperts.core.errors import ExpertsError, Field, OptionError
from superexperts.core.runs import digest, write_json
from superexperts.core.settings import Switch, require, require_positive
from superexperts.core.types import ExpertKey, ExpertSet, Profile, key_name
from superexperts.profiling.criterion import layers_below
from superexperts.profiling.prominence import Prominence, warning
from superexperts.profiling.rules import RULES, readers

__all__ = ["SelectConfig", "run", "show"]

if TYPE_CHECKING:
    RuleName = str
else:
    RuleName = Literal[tuple(RULES)]


def _of_rules(setting: str, text: str) -> Any:
    """The help of a setting that only some rules read, with their names in front."""
    return tyro.conf.arg(help=f"{', '.join(readers(setting))}: {text}")


_RULE_HELP = "; ".join(f"`{name}`: {rule.help}" for name, rule in RULES.items()) + "."


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Choose experts from a profile by a published rule, or at random as a control.

    Example: superexperts select runs/profile --rule super --out runs/super.json
    """

    profile: Positional[Annotated[Path, tyro.conf.arg(metavar="PROFILE")]]
    """profile.json, or the folder that holds it."""
    rule: Annotated[RuleName, tyro.conf.arg(help=_RULE_HELP)] = "super"
    criterion: Annotated[
        Literal["paper", "reference"],
        _of_rules("criterion", "`reference` follows the paper's code exactly (one row of each sequence, //)."),
    ] = "paper"
    corpus: str | None = None
    """Corpus of the profile; default: all of them (`super` takes the experts that it finds on every one, scores are
    averaged)."""
    percentile: Annotated[
        float, _of_rules("percentile", "the peak of an expert must be over this percentile of all considered peaks.")
    ] = 99.5
    ratio: Annotated[float, _of_rules("ratio", "and over the largest considered peak divided by this.")] = 10.0
    depth: Annotated[float, _of_rules("depth", "consider only the layers below round(depth x layers).")] = 0.75
    count: Annotated[
        int | None, _of_rules("count", "number of experts; default for random: as many as --like has.")
    ] = None
    share: Annotated[
        float | None,
        _of_rules("share", "this share of the routed experts of each layer instead, at least one in each."),
    ] = None
    lowest: Annotated[Switch, _of_rules("lowest", "the lowest scores instead, as for pruning.")] = False
    like: Annotated[
        str | None,
        _of_rules(
            "like",
            "an expert set (file or inline); take as many experts in each layer as it has there. A random draw never "
            "takes an expert of it.",
        ),
    ] = None
    anywhere: Annotated[
        Switch,
        _of_rules("anywhere", "draw from every MoE layer instead of only the layers of the set to be like."),
    ] = False
    seed: Annotated[int, _of_rules("seed", "seed of the draw.")] = 0
    out: Path = Path("runs/experts.json")
    """File to write."""
    json: Switch = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        require(0 <= self.percentile <= 100, "percentile", self.percentile, "is out of range; give 0 to 100")
        require_positive("ratio", self.ratio)
        require(0 < self.depth <= 1, "depth", self.depth, "is out of range; give a share over 0, up to 1")
        require(self.count is None or self.count > 0, "count", self.count, "is not positive; give at least 1")
        require(
            self.share is None or 0 < self.share <= 1,
            "share",
            self.share,
            "is out of range; give a share over 0, up to 1",
        )
        self._check_rule()
        if self.anywhere:
            require(self.like is not None, "anywhere", True, "is the default without ", Field("like"), "; leave it out")
            require(self.share is None, "anywhere", True, "does nothing with ", Field("share"), "; leave it out")

    def _check_rule(self) -> None:
        """`OptionError` for a setting that the rule needs and does not get, or gets and does not read."""
        rule = RULES[self.rule]
        for field in dataclasses.fields(self):
            value, rules = getattr(self, field.name), readers(field.name)
            require(
                not rules or self.rule in rules or value == field.default,
                field.name,
                value,
                "does nothing for ",
                Field("rule"),
                f" {self.rule}, only for {', '.join(rules)}; leave it out",
            )
        given = [name for name in rule.needs if getattr(self, name) is not None]
        if rule.needs and not given:
            raise OptionError(f"{self.rule} needs ", *_alternatives(rule.needs), field="rule")
        both = self.count is not None and self.share is not None
        require(not both, "share", self.share, "excludes ", Field("count"), "; give one of the two")
        if rule.exactly_one and len(given) > 1:
            more = given[-1]
            raise OptionError(
                f"{getattr(self, more)!r} excludes ", Field(given[0]), "; give only one of ",
                *_alternatives(rule.needs), field=more,
            )  # fmt: skip


def _alternatives(names: Sequence[str]) -> list[str]:
    """`--count, --share or --like`, as parts of a message."""
    parts: list[str] = []
    for place, name in enumerate(names):
        if place:
            parts.append(" or " if place == len(names) - 1 else ", ")
        parts.append(Field(name))
    return parts


def run(config: SelectConfig) -> dict[str, Any]:
    """Reads the profile, applies the rule, writes experts.json and returns it."""
    chosen = _chosen(Profile.load(config.profile), config)
    write_json(config.out, chosen.to_json())
    return {"out": str(config.out), **chosen.to_json()}


def choose(profile: Profile, rule: str = "super", *, like: ExpertSet | str | None = None, **settings: Any) -> ExpertSet:
    """As the command, from a profile in memory: `like` may be an `ExpertSet`, and nothing is written."""
    text = ",".join(key_name(key) for key in like.experts) if isinstance(like, ExpertSet) else like
    if rule not in RULES:
        raise OptionError(f"{rule!r} is unknown; choose from {', '.join(RULES)}", field="rule")
    return _chosen(profile, SelectConfig(profile=Path(), rule=cast(Any, rule), like=text, **settings))


def _chosen(profile: Profile, config: SelectConfig) -> ExpertSet:
    if config.corpus is not None and config.corpus not in profile.corpora:
        names = ", ".join(profile.corpora)
        raise OptionError(f"{config.corpus!r} is not in the profile; choose from {names}", field="corpus")
    corpora = [config.corpus] if config.corpus is not None else list(profile.corpora)
    rule = RULES[config.rule]
    settings = {name: getattr(config, name) for name in rule.settings}
    if "like" in settings:
        settings["like"] = _like(profile, corpora[0], config.like)
    chosen = rule.choose(profile, corpora, **settings)
    _note_missing_layers(profile, config)
    made_from = {"corpora": corpora, "profile": digest(profile.to_json()), "profile_depth": profile.depth}
    return dataclasses.replace(chosen, rule={"name": config.rule, **chosen.rule, **made_from})


def _like(profile: Profile, corpus: str, text: str | None) -> tuple[ExpertKey, ...]:
    """The experts of `like`; `ExpertsError` for one that the profile does not have."""
    like = () if text is None else ExpertSet.parse(text, "like").experts
    experts = {row.key for row in profile.corpora[corpus].experts}
    unknown = next((key for key in like if key not in experts), None)
    if unknown is not None:
        raise ExpertsError(f"{key_name(unknown)} is not in the profile; select it from the same model", field="like")
    return like


def _note_missing_layers(profile: Profile, config: SelectConfig) -> None:
    """A note where the rule would consider all layers, and the profile stopped before the last one."""
    stays_in_layers = config.like is not None and config.share is None and not config.anywhere
    # A rule that reads `depth` compares it with the profile's itself.
    if "depth" in RULES[config.rule].settings or stays_in_layers:
        return
    measured = layers_below(profile.depth, profile.num_layers)
    if measured < profile.num_layers:
        note(
            f"select: the profile has only layers 0 to {measured - 1} of {profile.num_layers}, so {config.rule} cannot "
            "choose experts of the others; profile with depth 1.0 for all layers"
        )


def show(result: dict[str, Any]) -> None:
    """Prints each chosen expert with its score."""
    for row in result["experts"]:
        score = "" if row["score"] is None else f"  {row['score']:.4g}"
        stdout.print(f"{key_name((row['layer'], row['expert']))}{score}")
    for said in _standing(result["rule"].get("prominence", [])):
        stdout.print(said, soft_wrap=True)
    stdout.print(f"in {result['out']}", soft_wrap=True)


def _standing(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = [Prominence(**row) for row in rows]
    said = warning(found)
    return [one.sentence for one in found] + ([f"warning: {said}"] if said else [])
