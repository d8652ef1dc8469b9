"""The paper's criterion on hand-made profiles with known answers, and what a random control may draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from superexperts.artifacts import CorpusProfile, ExpertKey, ExpertSet, ExpertStats, Profile
from superexperts.config import SelectConfig
from superexperts.errors import ExpertsError, OptionError
from superexperts.rundir import write_json
from superexperts.select import considered, random_experts, run, super_experts, threshold


def stats(peaks: dict[ExpertKey, float]) -> list[ExpertStats]:
    return [
        ExpertStats(layer=layer, expert=expert, tokens=1, output_max=peak, channel=0, position=0, token_id=0)
        for (layer, expert), peak in peaks.items()
    ]


def flat(layers: range, experts: int, peak: float = 1.0) -> dict[ExpertKey, float]:
    return {(layer, expert): peak for layer in layers for expert in range(experts)}


def profile(*corpora: dict[ExpertKey, float], num_layers: int = 4) -> Profile:
    sections = {f"corpus{i}": CorpusProfile(tokens=10, experts=tuple(stats(peaks))) for i, peaks in enumerate(corpora)}
    return Profile(model="m", num_layers=num_layers, corpora=sections)


def test_criterion_on_published_peaks_of_deepseek_v2_lite() -> None:
    # The three largest peaks and P99.5 of V2-Lite-Chat as published: 1424, 462, 112.5 (under a tenth), P99.5 34.5.
    peaks = flat(range(1, 20), 65, 1.0) | {(2, 54): 1424.0, (3, 38): 462.0, (5, 1): 112.5}
    found = super_experts(stats(peaks), 27)
    assert [row.key for row in found] == [(2, 54), (3, 38)]


def test_threshold_equals_numpy_and_a_hand_computed_case() -> None:
    rows = stats({(1, expert): float(expert) for expert in range(201)})
    bound = threshold(rows)
    assert bound.percentile == 199.0  # 0.995 x 200
    assert bound.ratio == 20.0
    assert bound.value == 199.0
    peaks = np.random.default_rng(0).exponential(size=77)
    rows = stats({(1, i): float(peak) for i, peak in enumerate(peaks)})
    assert threshold(rows, 90, 4).percentile == pytest.approx(np.sort(peaks)[68] * 0.6 + np.sort(peaks)[69] * 0.4)
    assert threshold(rows, 90, 4).ratio == peaks.max() / 4


def test_both_bounds_are_strict() -> None:
    peaks = flat(range(1, 4), 100) | {(1, 0): 100.0, (2, 0): 10.0}
    assert [row.key for row in super_experts(stats(peaks), 4, depth=1)] == [(1, 0)]  # 10.0 is not over 100 / 10
    peaks[2, 0] = 10.1
    assert [row.key for row in super_experts(stats(peaks), 4, depth=1)] == [(1, 0), (2, 0)]


def test_layers_past_depth_neither_count_nor_move_the_bounds() -> None:
    peaks = flat(range(1, 4), 300) | {(1, 7): 50.0, (3, 0): 1e6}
    assert [row.key for row in super_experts(stats(peaks), 4, depth=0.75)] == [(1, 7)]
    assert [row.key for row in super_experts(stats(peaks), 4, depth=1.0)] == [(3, 0)]
    assert {row.layer for row in considered(stats(peaks), 4, 0.75)} == {1, 2}


def test_a_dense_first_layer_does_not_shift_depth() -> None:
    # 27 layers, layer 0 dense: round(0.75 x 27) = 20, so layer 19 is considered and layer 20 is not.
    rows = stats(flat(range(1, 27), 2))
    assert max(row.layer for row in considered(rows, 27, 0.75)) == 19


def test_shared_experts_are_considered_with_the_routed_ones() -> None:
    peaks = flat(range(1, 4), 150) | {(1, "shared"): 90.0, (2, 5): 80.0}
    assert [row.key for row in super_experts(stats(peaks), 4)] == [(1, "shared"), (2, 5)]


def test_depth_without_moe_layers_is_an_error() -> None:
    with pytest.raises(OptionError, match="--depth: 0.1"):
        super_experts(stats(flat(range(3, 4), 4)), 4, depth=0.1)


def test_random_follows_the_layers_of_like_and_never_overlaps_it() -> None:
    experts = [*flat(range(1, 5), 8), (1, "shared")]
    like: list[ExpertKey] = [(1, 0), (1, 3), (4, 7)]
    draws = {random_experts(experts, seed=seed, like=like) for seed in range(200)}
    for draw in draws:
        assert sorted(layer for layer, _ in draw) == [1, 1, 4]
        assert not set(draw) & set(like)
        assert all(expert != "shared" for _, expert in draw)
    assert random_experts(experts, seed=5, like=like) == random_experts(experts, seed=5, like=like)
    # every pair of the 6 free experts of layer 1 with each of the 7 of layer 4 can come out
    assert len(draws) > 60


def test_random_anywhere_and_without_like() -> None:
    experts = list(flat(range(1, 5), 8))
    assert len(random_experts(experts, seed=0, count=32)) == 32
    layers = {
        layer for seed in range(50) for layer, _ in random_experts(experts, seed=seed, like=[(1, 0)], anywhere=True)
    }
    assert layers == {1, 2, 3, 4}


def test_random_refuses_more_than_there_are() -> None:
    with pytest.raises(ExpertsError, match="layer 1 has 1 others"):
        random_experts(list(flat(range(1, 2), 3)), seed=0, like=[(1, 0), (1, 1)])
    with pytest.raises(OptionError, match="--count: 3 differs"):
        random_experts(list(flat(range(1, 2), 9)), seed=0, count=3, like=[(1, 0)])


def test_command_writes_the_experts_that_every_corpus_agrees_on(tmp_path: Path) -> None:
    one = flat(range(1, 3), 150) | {(1, 7): 50.0, (2, 9): 40.0}
    two = flat(range(1, 3), 150) | {(1, 7): 60.0}
    write_json(tmp_path / "profile.json", profile(one, two).to_json())
    run(SelectConfig(profile=tmp_path, out=tmp_path / "both.json"))
    assert ExpertSet.parse(str(tmp_path / "both.json")).experts == ((1, 7),)
    run(SelectConfig(profile=tmp_path, corpus="corpus0", out=tmp_path / "one.json"))
    chosen = ExpertSet.parse(str(tmp_path / "one.json"))
    assert chosen.experts == ((1, 7), (2, 9))
    assert chosen.scores == (50.0, 40.0)
    like = SelectConfig(profile=tmp_path, rule="random", like=str(tmp_path / "one.json"), out=tmp_path / "r.json")
    run(like)
    drawn = ExpertSet.parse(str(tmp_path / "r.json")).experts
    assert [layer for layer, _ in drawn] == [1, 2]
    assert not {(1, 7), (2, 9)} & set(drawn)


def test_command_names_what_is_wrong(tmp_path: Path) -> None:
    write_json(tmp_path / "profile.json", profile(flat(range(1, 3), 150)).to_json())
    with pytest.raises(ExpertsError, match="no expert is over both bounds"):
        run(SelectConfig(profile=tmp_path, out=tmp_path / "x.json"))
    with pytest.raises(OptionError, match="'c4' is not in the profile; choose from corpus0"):
        run(SelectConfig(profile=tmp_path, corpus="c4", out=tmp_path / "x.json"))
    with pytest.raises(ExpertsError, match="is not in the profile"):
        run(SelectConfig(profile=tmp_path, rule="random", like="L9E1", out=tmp_path / "x.json"))
    with pytest.raises(OptionError, match="--count"):
        SelectConfig(profile=tmp_path, rule="random")
    assert not (tmp_path / "x.json").exists()
