"""The paper's criterion on hand-made profiles with known answers, and what a random control may draw."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from superexperts.core.errors import DataError, ExpertsError, OptionError
from superexperts.core.runs import digest, write_json
from superexperts.core.types import CorpusProfile, ExpertKey, ExpertSet, ExpertStats, Profile
from superexperts.profiling.criterion import considered, super_experts, threshold
from superexperts.profiling.rules import highest, layer_shares, random_experts
from superexperts.profiling.select import SelectConfig, run
from superexperts.profiling.stability import stability


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
    bound = threshold([row.output_max for row in rows])
    assert bound.percentile == 199.0  # 0.995 x 200
    assert bound.ratio == 20.0
    assert bound.value == 199.0
    peaks = np.random.default_rng(0).exponential(size=77)
    rows = stats({(1, i): float(peak) for i, peak in enumerate(peaks)})
    bound = threshold([row.output_max for row in rows], 90, 4)
    assert bound.percentile == pytest.approx(np.sort(peaks)[68] * 0.6 + np.sort(peaks)[69] * 0.4)
    assert bound.ratio == peaks.max() / 4


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
    with pytest.raises(OptionError, match="depth: 0.1"):
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
    with pytest.raises(OptionError, match="count: 3 differs"):
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
    with pytest.raises(ExpertsError, match="super finds no expert over both bounds"):
        run(SelectConfig(profile=tmp_path, out=tmp_path / "x.json"))
    with pytest.raises(OptionError, match="'c4' is not in the profile; choose from corpus0"):
        run(SelectConfig(profile=tmp_path, corpus="c4", out=tmp_path / "x.json"))
    with pytest.raises(ExpertsError, match="is not in the profile"):
        run(SelectConfig(profile=tmp_path, rule="random", like="L9E1", out=tmp_path / "x.json"))
    with pytest.raises(OptionError, match="count"):
        SelectConfig(profile=tmp_path, rule="random")
    assert not (tmp_path / "x.json").exists()


def seen_by_the_hook(peaks: dict[ExpertKey, float]) -> list[ExpertStats]:
    """Experts with these peaks in the rows that the reference code reads, and 1e9 elsewhere."""
    return [
        ExpertStats(
            layer=layer, expert=expert, tokens=1, output_max=1e9, first_token_output_max=1e9, reference_output_max=peak
        )
        for (layer, expert), peak in peaks.items()
    ]


def test_the_reference_codes_criterion_to_the_letter() -> None:
    """One row of each sequence, and `max // 10`: 9.95 is over 99 // 10 = 9, and not over 99 / 10."""
    peaks = flat(range(1, 4), 300) | {(1, 0): 99.0, (2, 0): 9.85, (3, 1): 98.0}
    found = super_experts(seen_by_the_hook(peaks), 4, statistic="reference", floor=True)
    assert [row.key for row in found] == [(1, 0), (2, 0)]  # layer 3 is past depth
    assert [row.key for row in super_experts(seen_by_the_hook(peaks), 4, statistic="reference")] == [(1, 0)]


ROWS = [  # layer, expert, tokens, gate_sum, reap: a golden table of two layers
    (1, 0, 60, 6.0, 1.0), (1, 1, 30, 12.0, 1.0), (1, 2, 10, 2.0, 8.0), (1, 3, 0, 0.0, 0.0),
    (1, "shared", 50, 50.0, 99.0),
    (2, 0, 25, 1.0, 2.0), (2, 1, 25, 2.0, 2.0), (2, 2, 25, 3.0, 2.0), (2, 3, 25, 4.0, 4.0),
]  # fmt: skip
GOLDEN = {
    "routed": {
        (1, 0): 0.6,
        (1, 1): 0.3,
        (1, 2): 0.1,
        (1, 3): 0.0,
        (2, 0): 0.25,
        (2, 1): 0.25,
        (2, 2): 0.25,
        (2, 3): 0.25,
    },
    "gate": {(1, 0): 0.3, (1, 1): 0.6, (1, 2): 0.1, (1, 3): 0.0, (2, 0): 0.1, (2, 1): 0.2, (2, 2): 0.3, (2, 3): 0.4},
    "reap": {(1, 0): 0.1, (1, 1): 0.1, (1, 2): 0.8, (1, 3): 0.0, (2, 0): 0.2, (2, 1): 0.2, (2, 2): 0.2, (2, 3): 0.4},
}


def table() -> list[ExpertStats]:
    return [
        ExpertStats(layer=layer, expert=expert, tokens=tokens, gate_sum=gate, reap=reap, output_max=1.0)
        for layer, expert, tokens, gate, reap in ROWS
    ]


@pytest.mark.parametrize("rule", GOLDEN)
def test_shares_are_of_the_layers_routed_experts(rule: str) -> None:
    assert layer_shares(table(), rule) == pytest.approx(GOLDEN[rule])


@pytest.mark.parametrize(
    ("rule", "options", "want"),
    [
        ("routed", {"count": 2}, [(1, 0), (1, 1)]),
        ("routed", {"count": 3}, [(1, 0), (1, 1), (2, 0)]),
        ("gate", {"count": 2}, [(1, 1), (2, 3)]),
        ("reap", {"count": 2}, [(1, 2), (2, 3)]),
        ("reap", {"count": 2, "lowest": True}, [(1, 3), (1, 0)]),
        ("gate", {"share": 0.25}, [(1, 1), (2, 3)]),
        ("gate", {"share": 0.5}, [(1, 1), (2, 3), (1, 0), (2, 2)]),
        ("routed", {"share": 0.01}, [(1, 0), (2, 0)]),
    ],
)
def test_command_selects_by_each_rule(tmp_path: Path, rule: Any, options: Any, want: list[ExpertKey]) -> None:
    made = Profile(model="m", num_layers=3, corpora={"c": CorpusProfile(tokens=50, experts=tuple(table()))})
    write_json(tmp_path / "profile.json", made.to_json())
    run(SelectConfig(profile=tmp_path, rule=rule, out=tmp_path / "e.json", **options))
    chosen = ExpertSet.parse(str(tmp_path / "e.json"))
    assert list(chosen.experts) == want
    assert chosen.scores == pytest.approx([GOLDEN[rule][key] for key in want])
    assert chosen.rule["profile"] == digest(made.to_json())


@pytest.mark.parametrize(
    ("rule", "like", "options", "want"),
    [
        ("gate", "L1E3,L1E2,L2E0", {}, [(1, 1), (1, 0), (2, 3)]),
        ("reap", "L1E3,L2E0", {"lowest": True}, [(1, 3), (2, 0)]),
        ("layers", "L2E3", {}, [(2, 0), (2, 1), (2, 2), (2, 3)]),
    ],
)
def test_command_follows_the_layers_of_like(
    tmp_path: Path, rule: Any, like: str, options: Any, want: list[ExpertKey]
) -> None:
    made = Profile(model="m", num_layers=3, corpora={"c": CorpusProfile(tokens=50, experts=tuple(table()))})
    write_json(tmp_path / "profile.json", made.to_json())
    run(SelectConfig(profile=tmp_path, rule=rule, like=like, out=tmp_path / "e.json", **options))
    assert list(ExpertSet.parse(str(tmp_path / "e.json")).experts) == want
    with pytest.raises(ExpertsError, match="like: L7E0 is not in the profile"):
        run(SelectConfig(profile=tmp_path, rule=rule, like="L7E0", out=tmp_path / "e.json", **options))


def test_random_share_of_each_layer(tmp_path: Path) -> None:
    made = Profile(model="m", num_layers=3, corpora={"c": CorpusProfile(tokens=50, experts=tuple(table()))})
    write_json(tmp_path / "profile.json", made.to_json())
    seen = set()
    for seed in range(20):
        run(SelectConfig(profile=tmp_path, rule="random", share=0.5, like="L1E0", seed=seed, out=tmp_path / "e.json"))
        chosen = ExpertSet.parse(str(tmp_path / "e.json")).experts
        assert [layer for layer, _ in sorted(chosen)] == [1, 1, 2, 2]
        assert (1, 0) not in chosen
        seen |= set(chosen)
    assert len(seen) == 7


def test_a_profile_that_stopped_early_says_so(tmp_path: Path) -> None:
    made = Profile(model="m", num_layers=4, depth=0.5, corpora={"c": CorpusProfile(tokens=50, experts=tuple(table()))})
    write_json(tmp_path / "profile.json", made.to_json())
    with pytest.raises(OptionError, match=r"depth: 0\.75 is over the profile's 0\.5; profile again"):
        run(SelectConfig(profile=tmp_path, out=tmp_path / "e.json"))


FOR_SUPER: dict[str, Any] = {"criterion": "reference", "percentile": 90.0, "ratio": 5.0, "depth": 0.5}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rule": "gate"}, "rule: gate needs count, share or like"),
        ({"rule": "reap", "count": 2, "share": 0.5}, "share: 0.5 excludes count; give one of the two"),
        ({"rule": "routed", "share": 1.5}, "share: 1.5 is out of range"),
        ({"ratio": math.inf}, "ratio: inf is not a finite number"),
        ({"ratio": math.nan}, "ratio: nan is not a finite number"),
        *(
            (
                {"rule": rule, name: value} | needed,
                f"{name}: {'' if value is True else f'{value!r} '}does nothing for rule {rule}, only for ",
            )
            for rule, needed, useless in (
                ("super", {}, {"count": 2, "share": 0.5, "lowest": True, "like": "L1E0", "anywhere": True, "seed": 1}),
                *(
                    (rule, {"count": 2}, FOR_SUPER | {"anywhere": True, "seed": 1})
                    for rule in ("routed", "gate", "reap")
                ),
                ("random", {"count": 2}, FOR_SUPER | {"lowest": True}),
                ("layers", {"like": "L1E0"}, FOR_SUPER | {"lowest": True, "count": 2, "share": 0.5, "seed": 1}),
            )
            for name, value in useless.items()
        ),
        ({"rule": "layers"}, "rule: layers needs like"),
        (
            {"rule": "reap", "count": 2, "like": "L1E0"},
            "like: 'L1E0' excludes count; give only one of",
        ),
        ({"rule": "random", "count": 2, "anywhere": True}, "anywhere: is the default without like; leave it out"),
        (
            {"rule": "random", "share": 0.5, "like": "L1E0", "anywhere": True},
            "anywhere: does nothing with share",
        ),
    ],
)
def test_wrong_options(options: Any, said: str) -> None:
    with pytest.raises(OptionError, match=re.escape(said)):
        SelectConfig(profile=Path("p"), **options)


@pytest.mark.parametrize(("depth", "noted"), [(0.5, True), (1.0, False)])
def test_a_choice_from_the_lower_layers_only_is_noted_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], depth: float, noted: bool
) -> None:
    made = Profile(model="m", num_layers=6, depth=depth, corpora={"c": CorpusProfile(tokens=9, experts=tuple(table()))})
    write_json(tmp_path / "profile.json", made.to_json())
    settings: list[dict[str, Any]] = [
        {"rule": "gate", "count": 2}, {"rule": "random", "count": 2}, {"rule": "random", "like": "L1E0"},
    ]  # fmt: skip
    for options in settings:
        run(SelectConfig(profile=tmp_path, out=tmp_path / "e.json", **options))
        said = " ".join(capsys.readouterr().err.split())
        # A draw in the layers of --like loses nothing.
        assert ("the profile has only layers 0 to 2 of 6" in said) == (noted and "like" not in options)
        assert ExpertSet.parse(str(tmp_path / "e.json")).rule["profile_depth"] == depth


@pytest.mark.parametrize("corpora", [{}, [], None])
def test_a_profile_without_corpora_is_named(tmp_path: Path, corpora: Any) -> None:
    write_json(tmp_path / "profile.json", profile(flat(range(1, 3), 3)).to_json() | {"corpora": corpora})
    with pytest.raises(DataError, match="(?i)profile: "):
        run(SelectConfig(profile=tmp_path, out=tmp_path / "e.json"))


def test_the_command_by_the_reference_codes_criterion(tmp_path: Path) -> None:
    """9.85 is over 99 // 10 and not over 99 / 10; peaks over all tokens (1e9) are not looked at."""
    peaks = flat(range(1, 4), 300) | {(1, 0): 99.0, (2, 0): 9.85, (3, 1): 98.0}
    section = CorpusProfile(tokens=9, experts=tuple(seen_by_the_hook(peaks)))
    write_json(tmp_path / "profile.json", Profile(model="m", num_layers=4, corpora={"c": section}).to_json())
    run(SelectConfig(profile=tmp_path, criterion="reference", out=tmp_path / "e.json"))
    chosen = ExpertSet.parse(str(tmp_path / "e.json"))
    assert (chosen.experts, chosen.scores) == (((1, 0), (2, 0)), (99.0, 9.85))
    assert (chosen.rule["criterion"], chosen.rule["statistic"]) == ("reference", "reference")


def test_a_profile_without_the_reference_codes_peaks_is_made_again(tmp_path: Path) -> None:
    section = CorpusProfile(tokens=9, experts=tuple(seen_by_the_hook(flat(range(1, 4), 300))))
    value: Any = Profile(model="m", num_layers=4, corpora={"c": section}).to_json()
    for row in value["corpora"]["c"]["experts"]:
        del row["reference_output_max"]  # as in files of superexperts 0.1.0
    write_json(tmp_path / "profile.json", value)
    with pytest.raises(DataError, match="^profile: it does not have the reference profiler's peaks; profile again$"):
        run(SelectConfig(profile=tmp_path, criterion="reference", out=tmp_path / "e.json"))
    assert not (tmp_path / "e.json").exists()


def test_more_than_there_are_is_an_error() -> None:
    with pytest.raises(OptionError, match="count: 9 of 8 routed experts"):
        highest(layer_shares(table(), "gate"), count=9)


def test_stability_by_hand() -> None:
    """Two corpora that agree on one super expert of two, with ranks that are reversed but for the largest."""
    one = flat(range(1, 3), 150) | {(1, 0): 90.0, (1, 1): 80.0}
    two = flat(range(1, 3), 150) | {(1, 0): 90.0, (2, 1): 80.0}
    found = stability(dataclasses.replace(profile(one, two), depth=0.75))
    assert [(row["expert"], row["corpora"]) for row in found["super"]] == [
        ("L1E0", ["corpus0", "corpus1"]), ("L1E1", ["corpus0"]), ("L2E1", ["corpus1"]),
    ]  # fmt: skip
    assert found["super"][1]["peaks"] == {"corpus0": 80.0, "corpus1": 1.0}
    [pair] = found["pairs"]
    assert pair["jaccard"] == 1 / 3
    # Ties take the mean rank: 298 experts share rank 149.5 in both; Pearson's correlation of these ranks.
    x, y = np.full(300, 149.5), np.full(300, 149.5)
    x[[0, 1]], y[[0, 151]] = (300, 299), (300, 299)
    assert pair["rank_correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    equal = stability(dataclasses.replace(profile(flat(range(1, 3), 3), one), depth=0.75))
    assert equal["pairs"][0]["rank_correlation"] is None
    assert equal["pairs"][0]["jaccard"] == 0.0


NEW_RULE = """
import sys
from superexperts.core.types import ExpertSet
from superexperts.profiling.rules import RULES, Rule

def least_used(profile, corpora, *, count, lowest):
    rows = sorted(profile.corpora[corpora[0]].experts, key=lambda row: row.tokens, reverse=not lowest)[:count]
    return ExpertSet(
        model=profile.model,
        rule={"count": count},
        experts=tuple(row.key for row in rows),
        scores=tuple(float(row.tokens) for row in rows),
    )

RULES["used"] = Rule(help="the experts with the most tokens", choose=least_used, needs=("count",))

from superexperts.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_rule_is_one_function_and_one_entry(tmp_path: Path) -> None:
    """A rule that is added to the registry can be chosen by name, and help and checks know what it reads."""
    made = Profile(model="m", num_layers=3, corpora={"c": CorpusProfile(tokens=50, experts=tuple(table()))})
    write_json(tmp_path / "profile.json", made.to_json())

    def select(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", NEW_RULE, "select", str(tmp_path), "--rule", "used", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    out = tmp_path / "e.json"
    done = select("--count", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    chosen = ExpertSet.parse(str(out))
    most = sorted((row.tokens for row in table()), reverse=True)[:2]
    assert list(chosen.scores) == most
    assert (chosen.rule["name"], chosen.rule["count"]) == ("used", 2)
    for words, said in (
        ((), "--rule: used needs --count"),
        (("--count", "2", "--share", "0.5"), "--share: 0.5 does nothing for --rule used, only for routed, gate, reap,"),
    ):
        done = select(*words)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    shown = " ".join(select("--help").stdout.replace("│", " ").split())  # the frame divides lines that wrap
    assert "`used`: the experts with the most tokens" in shown
    assert "routed, gate, reap, used: the lowest scores" in shown
