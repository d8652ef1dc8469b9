"""The rules that choose experts from a profile: published ones, and random controls. `RULES` lists them all.

To add a rule, write a function here and give it an entry in `RULES`; the command line, its help and study files then
know it. The keyword-only parameters of the function are the settings of `select` that the rule reads. A setting that no
other rule has also needs a field in `select.SelectConfig`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from superexperts.core.errors import ExpertsError, Field, OptionError
from superexperts.core.types import ExpertKey, ExpertSet, ExpertStats, Profile, Statistic, key_order
from superexperts.profiling.criterion import layers_below, peak, super_experts
from superexperts.profiling.prominence import prominence, warning

__all__ = ["RULES", "Rule", "highest", "highest_like", "layer_shares", "random_experts", "readers"]

Measure = Literal["routed", "gate", "reap"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One way to choose experts."""

    help: str
    """What it chooses, in one line for `select --help`."""
    choose: Callable[..., ExpertSet]
    """`choose(profile, corpora, **settings)`: the experts to take from a profile, given the names of its corpora to
    look at. The `rule` of the set holds the settings to record; `select` adds the name of the rule."""
    needs: tuple[str, ...] = ()
    """Settings of which at least one has to be given."""
    exactly_one: bool = False
    """Whether only one of `needs` may be given."""

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings that the rule reads: the keyword-only parameters of its function."""
        parameters = inspect.signature(self.choose).parameters.values()
        return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def readers(setting: str) -> tuple[str, ...]:
    """Names of the rules that read a setting; empty for a setting that is not about a rule, such as `out`."""
    return tuple(name for name, rule in RULES.items() if setting in rule.settings)


def layer_shares(stats: Sequence[ExpertStats], measure: Measure) -> dict[ExpertKey, float]:
    """Each routed expert's share of the total of its layer, so that experts of different layers can be compared.

    `routed`: of the routed tokens (ESFT's token selection ratio, arXiv 2407.01906, Eq. 9; MoE-Sieve, arXiv 2603.24044);
    `gate`: of the routing weights (ESFT's average gate score, Eq. 8, up to normalisation);
    `reap`: of REAP's saliencies (arXiv 2510.13999). All shares are 0 in a layer that no token reached.
    """
    routed = [row for row in stats if row.expert != "shared"]
    values = {
        "routed": [float(row.tokens) for row in routed],
        "gate": [row.gate_sum for row in routed],
        "reap": [row.reap for row in routed],
    }[measure]
    totals: dict[int, float] = defaultdict(float)
    for row, value in zip(routed, values, strict=True):
        totals[row.layer] += value
    return {
        row.key: value / totals[row.layer] if totals[row.layer] else 0.0
        for row, value in zip(routed, values, strict=True)
    }


def highest(
    scores: Mapping[ExpertKey, float], *, count: int | None = None, share: float | None = None, lowest: bool = False
) -> tuple[ExpertKey, ...]:
    """The `count` experts with the highest scores over all layers, or `share` of each layer's experts (at least one).

    `lowest` takes the lowest scores, as for pruning by REAP. Equal scores are ordered by layer and index.
    """
    order = sorted(scores, key=lambda key: (scores[key] if lowest else -scores[key], key_order(key)))
    if share is None:
        if count is None or count > len(order):
            raise OptionError(
                f"{count} of {len(order)} routed experts; ask for fewer, or give ", Field("share"), field="count"
            )
        return tuple(order[:count])
    sizes = Counter(layer for layer, _ in order)
    taken: Counter[int] = Counter()
    chosen = []
    for key in order:
        # At least one per layer: a small share would otherwise leave layers out.
        if taken[key[0]] < max(1, round(share * sizes[key[0]])):
            taken[key[0]] += 1
            chosen.append(key)
    return tuple(chosen)


def highest_like(
    scores: Mapping[ExpertKey, float], like: Collection[ExpertKey], *, lowest: bool = False
) -> tuple[ExpertKey, ...]:
    """The experts with the highest scores, in each layer as many as `like` has there: a set of the same size."""
    chosen: list[ExpertKey] = []
    for layer, count in sorted(Counter(layer for layer, _ in like).items()):
        in_layer = {key: score for key, score in scores.items() if key[0] == layer}
        if count > len(in_layer):
            raise ExpertsError(
                f"{count} experts of layer {layer}, which has {len(in_layer)}; give another set", field="like"
            )
        chosen += highest(in_layer, count=count, lowest=lowest)
    return tuple(chosen)


def random_experts(
    experts: Collection[ExpertKey],
    *,
    seed: int,
    count: int | None = None,
    like: Collection[ExpertKey] = (),
    anywhere: bool = False,
) -> tuple[ExpertKey, ...]:
    """A seeded draw of routed experts that never overlaps `like`.

    With `like` it takes as many per layer as `like` has there, so that layer and budget match; with `anywhere`, or
    without `like`, `count` (default: as many as `like`) from every layer.
    """
    draw = random.Random(seed)
    # Sorted, so that the draw depends on the seed alone and not on the order of the profile. Shared experts see every
    # token, which makes them no control for routed ones.
    free = sorted((key for key in experts if key not in set(like) and key[1] != "shared"), key=key_order)
    if like and not anywhere:
        per_layer = Counter(layer for layer, _ in like)
        if count is not None and count != len(like):
            raise OptionError(
                f"{count} differs from the {len(like)} of ",
                Field("like"),
                "; leave it out or add ",
                Field("anywhere"),
                field="count",
            )
        chosen: list[ExpertKey] = []
        for layer, number in sorted(per_layer.items()):
            chosen += _sample(draw, [key for key in free if key[0] == layer], number, f"layer {layer}")
    else:
        chosen = _sample(draw, free, count or len(like), "the model")
    return tuple(sorted(chosen, key=key_order))


def _sample(draw: random.Random, free: Sequence[ExpertKey], count: int, where: str) -> list[ExpertKey]:
    if count > len(free):
        raise ExpertsError(
            f"{count} random experts are too many, {where} has {len(free)} others; ask for fewer", field="count"
        )
    return draw.sample(free, count)


def _by_criterion(
    profile: Profile,
    corpora: Sequence[str],
    *,
    criterion: Literal["paper", "reference"],
    percentile: float,
    ratio: float,
    depth: float,
) -> ExpertSet:
    """The experts that are super experts on every corpus, ordered by their peaks on the first one."""
    if layers_below(depth, profile.num_layers) > layers_below(profile.depth, profile.num_layers):
        raise OptionError(
            f"{depth} is over the profile's {profile.depth}; profile again with ", Field("depth"), field="depth"
        )
    reference = criterion == "reference"
    statistic: Statistic = "reference" if reference else profile.statistic
    found = [
        super_experts(
            profile.corpora[name].experts,
            profile.num_layers,
            percentile=percentile,
            ratio=ratio,
            depth=depth,
            statistic=statistic,
            floor=reference,
        )
        for name in corpora
    ]
    everywhere = set.intersection(*({row.key for row in rows} for rows in found))
    rows = [row for row in found[0] if row.key in everywhere]
    if not rows:
        raise ExpertsError(
            f"super finds no expert over both bounds on {', '.join(corpora)}; lower ",
            Field("percentile"),
            ", or raise ",
            Field("ratio"),
            " or ",
            Field("depth"),
            field="rule",
        )
    standing = prominence(
        profile.corpora[corpora[0]].experts,
        profile.num_layers,
        [row.key for row in rows],
        depth=depth,
        statistic=statistic,
    )
    return ExpertSet(
        model=profile.model,
        rule={
            "criterion": criterion,
            "statistic": statistic,
            "percentile": percentile,
            "ratio": ratio,
            "depth": depth,
            "prominence": [dataclasses.asdict(one) for one in standing],
            "caution": warning(standing),
        },
        experts=tuple(row.key for row in rows),
        scores=tuple(peak(row, statistic) for row in rows),
    )


def _by_share(
    measure: Measure,
    profile: Profile,
    corpora: Sequence[str],
    *,
    count: int | None,
    share: float | None,
    lowest: bool,
    like: Sequence[ExpertKey],
) -> ExpertSet:
    """The experts with the largest share of their layer, averaged over the corpora."""
    shares = [layer_shares(profile.corpora[name].experts, measure) for name in corpora]
    # Shares, not counts, are averaged: a longer corpus must not weigh more.
    scores = {key: sum(of_corpus[key] for of_corpus in shares) / len(shares) for key in shares[0]}
    if like:
        chosen = highest_like(scores, like, lowest=lowest)
    else:
        chosen = highest(scores, count=count, share=share, lowest=lowest)
    return ExpertSet(
        model=profile.model,
        rule={"count": count, "share": share, "lowest": lowest, "like": [list(key) for key in like]},
        experts=chosen,
        scores=tuple(scores[key] for key in chosen),
    )


def _at_random(
    profile: Profile,
    corpora: Sequence[str],
    *,
    seed: int,
    count: int | None,
    share: float | None,
    like: Sequence[ExpertKey],
    anywhere: bool,
) -> ExpertSet:
    """A seeded draw of routed experts outside `like`."""
    experts = [row.key for row in profile.corpora[corpora[0]].experts]
    if share is not None:
        draw = random.Random(seed)
        scores = {key: draw.random() for key in experts if key[1] != "shared" and key not in set(like)}
        chosen = highest(scores, share=share)
    else:
        chosen = random_experts(experts, seed=seed, count=count, like=like, anywhere=anywhere)
    return ExpertSet(
        model=profile.model,
        rule={"seed": seed, "share": share, "like": [list(key) for key in like], "anywhere": anywhere},
        experts=chosen,
        scores=(None,) * len(chosen),
    )


def _all_of_the_layers(profile: Profile, corpora: Sequence[str], *, like: Sequence[ExpertKey]) -> ExpertSet:
    """All routed experts of every layer in which `like` has an expert."""
    layers = {layer for layer, _ in like}
    experts = [row.key for row in profile.corpora[corpora[0]].experts]
    chosen = tuple(sorted((key for key in experts if key[0] in layers and key[1] != "shared"), key=key_order))
    return ExpertSet(
        model=profile.model,
        rule={"like": [list(key) for key in like]},
        experts=chosen,
        scores=(None,) * len(chosen),
    )


_SIZES = ("count", "share", "like")

RULES: dict[str, Rule] = {
    "super": Rule(help="the paper's criterion", choose=_by_criterion),
    "routed": Rule(
        help="the largest share of a layer's routed tokens",
        choose=functools.partial(_by_share, "routed"),
        needs=_SIZES,
        exactly_one=True,
    ),
    "gate": Rule(
        help="the largest share of a layer's routing weights",
        choose=functools.partial(_by_share, "gate"),
        needs=_SIZES,
        exactly_one=True,
    ),
    "reap": Rule(
        help="the largest share of a layer's REAP saliencies",
        choose=functools.partial(_by_share, "reap"),
        needs=_SIZES,
        exactly_one=True,
    ),
    "random": Rule(help="a seeded draw, as a control", choose=_at_random, needs=_SIZES),
    "layers": Rule(help="all routed experts of the layers of another set", choose=_all_of_the_layers, needs=("like",)),
}
"""Name on the command line and in study files -> rule, in the order of the help."""
