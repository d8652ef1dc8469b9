"""How far super experts stand out: published peaks do, the largest of a heap does not."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from superexperts.core.runs import write_json
from superexperts.core.types import CorpusProfile, ExpertKey, ExpertStats, Profile
from superexperts.profiling import select
from superexperts.profiling.prominence import Prominence, prominence, warning
from superexperts.profiling.select import SelectConfig


def heap(largest: dict[ExpertKey, float]) -> list[ExpertStats]:
    """24 experts in each of 16 layers with peaks around 3, one that no token reached, and the given ones."""
    draw = random.Random(0)
    peaks: dict[ExpertKey, float] = {(layer, expert): draw.uniform(2, 3) for layer in range(16) for expert in range(24)}
    peaks |= {(0, 0): 0.0} | largest
    return [
        ExpertStats(layer=layer, expert=expert, tokens=int(value > 0), output_max=value)
        for (layer, expert), value in peaks.items()
    ]


def standing(largest: dict[ExpertKey, float], found: list[ExpertKey]) -> tuple[Prominence, ...]:
    return prominence(heap(largest), 16, found, depth=0.75, statistic="all")


def test_published_peaks_stand_out() -> None:
    qwen: dict[ExpertKey, float] = {(1, 3): 744.0, (2, 9): 540.0, (3, 2): 430.0, (4, 4): 63.5, (15, 1): 9000.0}
    found = standing(qwen, [(1, 3), (2, 9), (3, 2)])
    assert [one.ratio for one in found] == [pytest.approx(value / 63.5) for value in (744, 540, 430)]  # layer 15 is out
    assert warning(found) is None


def test_the_largest_of_a_heap_does_not() -> None:
    found = standing({(1, 3): 4.65, (2, 9): 3.36}, [(1, 3)])
    assert found[0].ratio == pytest.approx(4.65 / 3.36)
    logs = np.log([row.output_max for row in heap({(1, 3): 4.65, (2, 9): 3.36}) if row.layer < 12 and row.tokens])
    spread = 1.4826 * np.median(np.abs(logs - np.median(logs)))
    assert found[0].z == pytest.approx((math.log(4.65) - np.median(logs)) / spread)
    said = warning(found)
    assert said is not None
    assert said.startswith("L1E3 does not stand out (L1E3: 1.38 times the next, robust z ")


def test_equal_peaks_have_no_score() -> None:
    rows = [ExpertStats(layer=0, expert=expert, tokens=1, output_max=2.0) for expert in range(9)]
    [found] = prominence(rows, 1, [(0, 1)], depth=1.0, statistic="all")
    assert (found.ratio, found.z, found.stands_out) == (1.0, None, False)


def test_select_says_so_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = CorpusProfile(tokens=9, experts=tuple(heap({(1, 3): 4.65, (2, 9): 3.36})))
    write_json(tmp_path / "profile.json", Profile(model="m", num_layers=16, corpora={"c": section}).to_json())
    result = select.run(SelectConfig(profile=tmp_path, percentile=99.9, out=tmp_path / "e.json"))
    select.show(result)
    said = capsys.readouterr().out
    assert "L1E3: 1.38 times the next" in said
    assert "warning: L1E3 does not stand out" in said
    rule = json.loads((tmp_path / "e.json").read_text())["rule"]
    assert rule["caution"].startswith("L1E3 does not stand out")
    assert rule["prominence"][0]["ratio"] == pytest.approx(4.65 / 3.36)
