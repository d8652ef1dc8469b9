"""The peak that the paper's reference profiler records, against the loops of transformers 4.51 that its hook sat in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from superexperts.core.types import CorpusProfile, ExpertKey
from superexperts.models import hooks
from superexperts.models.banks import Bank, find_banks
from superexperts.models.experts import grouped
from superexperts.profiling.measure import profile_corpus
from superexperts.profiling.reference import reference_rows
from superexperts.profiling.streamed import profile_streamed, quick_look
from tests.models.test_hooks import by_hand
from tests.profiling.test_profile import inputs_of
from tests.profiling.test_streamed import saved, streaming
from tests.support.families import tiny_model, tiny_tokens

IDS_SL = tiny_tokens(5, 16)


def slot_by_slot(index_TK: Tensor, expert: int) -> Tensor:
    """The tokens of an expert as Qwen3-MoE and Mixtral gathered them."""
    _, token_N = torch.where(torch.nn.functional.one_hot(index_TK).permute(2, 1, 0)[expert])
    return token_N


def sorted_by_expert(index_TK: Tensor, expert: int) -> Tensor:
    """The tokens of an expert as DeepSeek's own code gathered them."""
    order_R = index_TK.flatten().argsort(stable=True)
    return order_R[index_TK.flatten()[order_R] == expert] // index_TK.shape[1]


GATHER = {
    "qwen3_moe": slot_by_slot,
    "mixtral": slot_by_slot,
    "deepseek_v2": sorted_by_expert,
    "deepseek_v3": sorted_by_expert,
}


@torch.no_grad()
def old_peaks(model: Any, family: str, ids_SL: Tensor) -> dict[ExpertKey, float]:
    """What the reference profiler records: one sequence at a time, the first row of each call of an expert."""
    model.set_experts_implementation("eager")
    peaks: dict[ExpertKey, float] = {}
    for ids_L in ids_SL:
        for bank in find_banks(model):
            x_TD, index_TK = inputs_for(model, bank, ids_L)
            for expert in index_TK.unique().tolist():
                first = int(GATHER[family](index_TK, expert)[0])
                peak = float(by_hand(bank.module, expert, x_TD[first])[1].abs().max())
                peaks[bank.layer, expert] = max(peaks.get((bank.layer, expert), 0.0), peak)
    return peaks


def inputs_for(model: Any, bank: Bank, ids_L: Tensor) -> tuple[Tensor, Tensor]:
    x_TD, index_TK, _ = inputs_of(model, bank, ids_L[None])
    return x_TD, index_TK


def assert_peaks(found: CorpusProfile, expected: dict[ExpertKey, float]) -> None:
    rows = {row.key: row for row in found.experts if row.expert != "shared"}
    assert {key for key, row in rows.items() if row.tokens} == expected.keys()
    for key, row in rows.items():
        assert row.reference_output_max == (pytest.approx(expected[key], rel=1e-5) if row.tokens else None)


@pytest.mark.parametrize("family", GATHER)
def test_the_peak_of_the_reference_profiler(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path, family)
    expected = old_peaks(model, family, IDS_SL)
    in_memory = profile_corpus(model, IDS_SL, batch_size=3)
    assert_peaks(in_memory, expected)
    differs = [row for row in in_memory.experts if row.reference_output_max not in (None, row.first_token_output_max)]
    assert bool(differs) == (GATHER[family] is slot_by_slot)  # otherwise it is the first token of each sequence
    for row in in_memory.experts:
        if row.expert == "shared":
            assert row.reference_output_max == row.output_max
    with streaming(tmp_path) as streamed:
        assert_peaks(profile_streamed(streamed, IDS_SL, batch_size=2), expected)
    with streaming(tmp_path) as streamed:
        quick = quick_look(streamed, IDS_SL, depth=1.0, statistic="reference")
        assert_peaks(quick, old_peaks(model, family, IDS_SL[: quick.tokens // IDS_SL.shape[1]]))
    monkeypatch.setattr(hooks, "looped", lambda *given, **_: grouped(*given))  # all rows at once, as on a GPU
    assert_peaks(profile_corpus(model, IDS_SL, batch_size=5), expected)


def test_padding_is_not_the_reference_profilers_row() -> None:
    model = tiny_model("qwen3_moe")
    mask_SL = torch.ones_like(IDS_SL)
    mask_SL[:, -6:] = 0
    expected = old_peaks(model, "qwen3_moe", IDS_SL[:, :-6])
    assert_peaks(profile_corpus(model, IDS_SL, mask_BL=mask_SL, batch_size=5), expected)


def test_the_row_of_lowest_rank_and_then_of_lowest_position() -> None:
    first_R = torch.tensor([True, False, False, True, True, False])
    rank_R = torch.tensor([1, 0, 0, 3, 2, 2])
    token_R = torch.tensor([0, 2, 5, 6, 1, 4])
    assert reference_rows(first_R, rank_R, token_R).tolist() == [False, True, False, True, True, False]
