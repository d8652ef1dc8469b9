"""Profile -> ExpertSet: the published rules, and random controls. Pure functions; scores in, (layer, expert) out."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from superexperts.core.config import SelectConfig
from superexperts.core.console import note
from superexperts.core.errors import ExpertsError, Field, OptionError
from superexperts.core.runs import digest, write_json
from superexperts.core.types import ExpertId, ExpertKey, ExpertSet, ExpertStats, Profile, Statistic, key_name, key_order

__all__ = [
    "Threshold",
    "considered",
    "highest",
    "highest_like",
    "layer_shares",
    "layers_below",
    "peak",
    "random_experts",
    "run",
    "super_experts",
    "threshold",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold:
    """The two bounds of the paper's criterion; a super expert's peak is over both."""

    percentile: float
    """P99.5 of the considered peaks."""
    ratio: float
    """The largest considered peak / 10."""

    @property
    def value(self) -> float:
        """The bound that counts."""
        return max(self.percentile, self.ratio)


def layers_below(depth: float, num_layers: int) -> int:
    """How many layers, dense ones counted, lie below a depth: round(depth x layers), as the reference code has it."""
    return round(depth * num_layers)


def peak(row: ExpertStats, statistic: Statistic) -> float:
    """The peak that the criterion is about: over all tokens, or over the first one of each sequence."""
    return row.output_max if statistic == "all" else row.first_token_output_max


def considered(stats: Sequence[ExpertStats], num_layers: int, depth: float) -> list[ExpertStats]:
    """Experts of the layers below round(depth x layers), dense layers counted."""
    return [row for row in stats if row.layer < layers_below(depth, num_layers)]


def threshold(
    peaks: Sequence[float], percentile: float = 99.5, ratio: float = 10.0, *, floor: bool = False
) -> Threshold:
    """The bounds over the considered experts' peaks, routed and shared together, unreached experts counting as 0.

    arXiv 2507.23279, Eq. 8; percentiles between two values are linear, as in the reference code (numpy's default).
    `floor` divides the maximum as that code does, by `//`.
    """
    largest = max(peaks) // ratio if floor else max(peaks) / ratio
    return Threshold(percentile=float(np.percentile(peaks, percentile)), ratio=largest)


def super_experts(
    stats: Sequence[ExpertStats],
    num_layers: int,
    *,
    percentile: float = 99.5,
    ratio: float = 10.0,
    depth: float = 0.75,
    statistic: Statistic = "all",
    floor: bool = False,
) -> tuple[ExpertStats, ...]:
    """The experts whose peak is over both bounds of `threshold`, the largest peak first.

    The defaults are the paper's criterion; `statistic="first"` with `floor` is its reference code's, to the letter.
    """
    rows = considered(stats, num_layers, depth)
    if not rows:
        raise OptionError(f"{depth} leaves no MoE layer of {num_layers} layers; give a larger share", field="depth")
    bound = threshold([peak(row, statistic) for row in rows], percentile, ratio, floor=floor)
    found = [row for row in rows if peak(row, statistic) > bound.value]
    return tuple(sorted(found, key=lambda row: (-peak(row, statistic), key_order(row.key))))


def layer_shares(stats: Sequence[ExpertStats], rule: str) -> dict[ExpertKey, float]:
    """Every routed expert's share of its layer's total, so that experts of different layers can be compared.

    `routed`: of the routed tokens (ESFT's token selection ratio, arXiv 2407.01906, Eq. 9; MoE-Sieve, arXiv 2603.24044);
    `gate`: of the routing weights (ESFT's average gate score, Eq. 8, up to normalisation);
    `reap`: of REAP's saliencies (arXiv 2510.13999). 0 in a layer that no token reached.
    """
    routed = [row for row in stats if row.expert != "shared"]
    values = {
        "routed": [float(row.tokens) for row in routed],
        "gate": [row.gate_sum for row in routed],
        "reap": [row.reap for row in routed],
    }[rule]
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
    """The `count` experts with the highest scores over all layers, or `share` of each layer's (at least one).

    `lowest` takes the other end, as one does to prune by REAP. Equal scores go by layer and index.
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
        if taken[key[0]] < max(1, round(share * sizes[key[0]])):
            taken[key[0]] += 1
            chosen.append(key)
    return tuple(chosen)


def highest_like(
    scores: Mapping[ExpertKey, float], like: Collection[ExpertKey], *, lowest: bool = False
) -> tuple[ExpertKey, ...]:
    """The experts with the highest scores, in each layer as many as `like` has there: a set of the same budget."""
    wanted = Counter(layer for layer, _ in like)
    chosen: list[ExpertKey] = []
    for layer, count in sorted(wanted.items()):
        own = {key: score for key, score in scores.items() if key[0] == layer}
        if count > len(own):
            raise ExpertsError(
                f"{count} experts of layer {layer}, which has {len(own)}; give another set", field="like"
            )
        chosen += highest(own, count=count, lowest=lowest)
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
        for layer, wanted in sorted(per_layer.items()):
            chosen += _sample(draw, [key for key in free if key[0] == layer], wanted, f"layer {layer}")
    else:
        chosen = _sample(draw, free, count or len(like), "the model")
    return tuple(sorted(chosen, key=key_order))


def _sample(draw: random.Random, free: Sequence[ExpertKey], count: int, where: str) -> list[ExpertKey]:
    if count > len(free):
        raise ExpertsError(
            f"{count} random experts asked for, {where} has {len(free)} others; ask for fewer", field="count"
        )
    return draw.sample(free, count)


def run(config: SelectConfig) -> dict[str, Any]:
    """The command: reads the profile, applies the rule, writes experts.json."""
    profile = Profile.load(config.profile)
    if config.corpus is not None and config.corpus not in profile.corpora:
        have = ", ".join(profile.corpora)
        raise OptionError(f"{config.corpus!r} is not in the profile; choose from {have}", field="corpus")
    names = [config.corpus] if config.corpus is not None else list(profile.corpora)
    if config.rule == "super":
        chosen = _super(profile, names, config)
    elif config.rule == "random":
        chosen = _random(profile, names, config)
    elif config.rule == "layers":
        chosen = _layers(profile, names, config)
    else:
        chosen = _highest(profile, names, config)
    follows = config.like is not None and config.share is None and not config.anywhere
    run_layers = layers_below(profile.depth, profile.num_layers)
    if config.rule != "super" and not follows and run_layers < profile.num_layers:
        note(
            f"--rule {config.rule}: the profile has layers 0 to {run_layers - 1} of {profile.num_layers} only, and no "
            "expert of the others can be chosen; profile with --depth 1.0 for all"
        )
    made_from = {"corpora": names, "profile": digest(profile.to_json()), "profile_depth": profile.depth}
    chosen = dataclasses.replace(chosen, rule={**chosen.rule, **made_from})
    write_json(config.out, chosen.to_json())
    return {"out": str(config.out), **chosen.to_json()}


def _super(profile: Profile, names: Sequence[str], config: SelectConfig) -> ExpertSet:
    if layers_below(config.depth, profile.num_layers) > layers_below(profile.depth, profile.num_layers):
        raise OptionError(
            f"{config.depth} is over the profile's {profile.depth}; profile again with ", Field("depth"), field="depth"
        )
    reference = config.criterion == "reference"
    statistic: Statistic = "first" if reference else profile.statistic
    found = [
        super_experts(
            profile.corpora[name].experts,
            profile.num_layers,
            percentile=config.percentile,
            ratio=config.ratio,
            depth=config.depth,
            statistic=statistic,
            floor=reference,
        )
        for name in names
    ]
    everywhere = set.intersection(*({row.key for row in rows} for rows in found))
    rows = [row for row in found[0] if row.key in everywhere]
    if not rows:
        raise ExpertsError(
            Field("rule"),
            f" super: no expert is over both bounds on {', '.join(names)}; lower ",
            Field("percentile"),
            ", or raise ",
            Field("ratio"),
            " or ",
            Field("depth"),
        )
    rule = {
        "name": "super",
        "criterion": config.criterion,
        "statistic": statistic,
        "percentile": config.percentile,
        "ratio": config.ratio,
        "depth": config.depth,
    }
    return ExpertSet(
        model=profile.model,
        rule=rule,
        experts=tuple(row.key for row in rows),
        scores=tuple(peak(row, statistic) for row in rows),
    )


def _highest(profile: Profile, names: Sequence[str], config: SelectConfig) -> ExpertSet:
    """By the mean over the corpora of each expert's share of its layer."""
    shares = [layer_shares(profile.corpora[name].experts, config.rule) for name in names]
    scores = {key: sum(share[key] for share in shares) / len(shares) for key in shares[0]}
    like = _like(profile, names, config)
    if like:
        chosen = highest_like(scores, like, lowest=config.lowest)
    else:
        chosen = highest(scores, count=config.count, share=config.share, lowest=config.lowest)
    rule = {
        "name": config.rule,
        "count": config.count,
        "share": config.share,
        "lowest": config.lowest,
        "like": [list(key) for key in like],
    }
    return ExpertSet(model=profile.model, rule=rule, experts=chosen, scores=tuple(scores[key] for key in chosen))


def _layers(profile: Profile, names: Sequence[str], config: SelectConfig) -> ExpertSet:
    like = _like(profile, names, config)
    layers = {layer for layer, _ in like}
    experts = [row.key for row in profile.corpora[names[0]].experts]
    chosen = tuple(sorted((key for key in experts if key[0] in layers and key[1] != "shared"), key=key_order))
    rule = {"name": "layers", "like": [list(key) for key in like]}
    return ExpertSet(model=profile.model, rule=rule, experts=chosen, scores=(None,) * len(chosen))


def _like(profile: Profile, names: Sequence[str], config: SelectConfig) -> tuple[ExpertKey, ...]:
    if config.like is None:
        return ()
    like = ExpertSet.parse(config.like).experts
    experts = {row.key for row in profile.corpora[names[0]].experts}
    unknown: list[tuple[int, ExpertId]] = [key for key in like if key not in experts]
    if unknown:
        raise ExpertsError(f"{key_name(unknown[0])} is not in the profile; select it from the same model", field="like")
    return like


def _random(profile: Profile, names: Sequence[str], config: SelectConfig) -> ExpertSet:
    experts = [row.key for row in profile.corpora[names[0]].experts]
    like = _like(profile, names, config)
    if config.share is not None:
        draw = random.Random(config.seed)
        scores = {key: draw.random() for key in experts if key[1] != "shared" and key not in set(like)}
        chosen = highest(scores, share=config.share)
    else:
        chosen = random_experts(experts, seed=config.seed, count=config.count, like=like, anywhere=config.anywhere)
    rule = {
        "name": "random",
        "seed": config.seed,
        "share": config.share,
        "like": [list(key) for key in like],
        "anywhere": config.anywhere,
    }
    return ExpertSet(model=profile.model, rule=rule, experts=chosen, scores=(None,) * len(chosen))
