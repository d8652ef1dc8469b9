"""Profile -> ExpertSet: the published rules, and random controls. Pure functions; scores in, (layer, expert) out."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from .artifacts import ExpertId, ExpertKey, ExpertSet, ExpertStats, Profile, key_order
from .config import SelectConfig
from .errors import ExpertsError, OptionError
from .rundir import write_json

__all__ = ["Threshold", "considered", "random_experts", "run", "super_experts", "threshold"]


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


def considered(stats: Sequence[ExpertStats], num_layers: int, depth: float) -> list[ExpertStats]:
    """Experts of the layers below round(depth x layers), dense layers counted."""
    return [row for row in stats if row.layer < round(depth * num_layers)]


def threshold(rows: Sequence[ExpertStats], percentile: float = 99.5, ratio: float = 10.0) -> Threshold:
    """The bounds over the considered experts, routed and shared together, unreached experts counting as 0.

    arXiv 2507.23279, Eq. 8; percentiles between two values are linear, as in the reference code (numpy's default).
    """
    peaks = [row.output_max for row in rows]
    return Threshold(percentile=float(np.percentile(peaks, percentile)), ratio=max(peaks) / ratio)


def super_experts(
    stats: Sequence[ExpertStats], num_layers: int, *, percentile: float = 99.5, ratio: float = 10.0, depth: float = 0.75
) -> tuple[ExpertStats, ...]:
    """The experts whose peak is over both bounds of `threshold`, the largest peak first."""
    rows = considered(stats, num_layers, depth)
    if not rows:
        raise OptionError(f"--depth: {depth} leaves no MoE layer of {num_layers} layers; give a larger share")
    bound = threshold(rows, percentile, ratio)
    found = [row for row in rows if row.output_max > bound.percentile and row.output_max > bound.ratio]
    return tuple(sorted(found, key=lambda row: (-row.output_max, key_order(row.key))))


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
                f"--count: {count} differs from the {len(like)} of --like; leave it out or add --anywhere"
            )
        chosen: list[ExpertKey] = []
        for layer, wanted in sorted(per_layer.items()):
            chosen += _sample(draw, [key for key in free if key[0] == layer], wanted, f"layer {layer}")
    else:
        chosen = _sample(draw, free, count or len(like), "the model")
    return tuple(sorted(chosen, key=key_order))


def _sample(draw: random.Random, free: Sequence[ExpertKey], count: int, where: str) -> list[ExpertKey]:
    if count > len(free):
        raise ExpertsError(f"--count: {count} random experts asked for, {where} has {len(free)} others; ask for fewer")
    return draw.sample(free, count)


def run(config: SelectConfig) -> dict[str, Any]:
    """The command: reads the profile, applies the rule, writes experts.json."""
    profile = Profile.load(config.profile)
    if config.corpus is not None and config.corpus not in profile.corpora:
        have = ", ".join(profile.corpora)
        raise OptionError(f"--corpus: {config.corpus!r} is not in the profile; choose from {have}")
    names = [config.corpus] if config.corpus is not None else list(profile.corpora)
    chosen = _super(profile, names, config) if config.rule == "super" else _random(profile, names, config)
    write_json(config.out, chosen.to_json())
    return {"out": str(config.out), **chosen.to_json()}


def _super(profile: Profile, names: Sequence[str], config: SelectConfig) -> ExpertSet:
    found = [
        super_experts(
            profile.corpora[name].experts,
            profile.num_layers,
            percentile=config.percentile,
            ratio=config.ratio,
            depth=config.depth,
        )
        for name in names
    ]
    everywhere = set.intersection(*({row.key for row in rows} for rows in found))
    rows = [row for row in found[0] if row.key in everywhere]
    if not rows:
        raise ExpertsError(
            f"--rule super: no expert is over both bounds on {', '.join(names)}; "
            "lower --percentile, or raise --ratio or --depth"
        )
    rule = {
        "name": "super",
        "percentile": config.percentile,
        "ratio": config.ratio,
        "depth": config.depth,
        "corpora": list(names),
    }
    return ExpertSet(
        model=profile.model,
        rule=rule,
        experts=tuple(row.key for row in rows),
        scores=tuple(row.output_max for row in rows),
    )


def _random(profile: Profile, names: Sequence[str], config: SelectConfig) -> ExpertSet:
    experts = [row.key for row in profile.corpora[names[0]].experts]
    like: tuple[ExpertKey, ...] = ExpertSet.parse(config.like).experts if config.like is not None else ()
    unknown: list[tuple[int, ExpertId]] = [key for key in like if key not in set(experts)]
    if unknown:
        raise ExpertsError(f"--like: {unknown[0]} is not in the profile; select it from the same model")
    chosen = random_experts(experts, seed=config.seed, count=config.count, like=like, anywhere=config.anywhere)
    rule = {"name": "random", "seed": config.seed, "like": [list(key) for key in like], "anywhere": config.anywhere}
    return ExpertSet(model=profile.model, rule=rule, experts=chosen, scores=(None,) * len(chosen))
