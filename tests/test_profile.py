"""Profiles against a brute-force per-token loop, planted outliers in many families, and what must not matter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import FAMILIES, VOCABULARY, tiny_model
from superexperts import moe, profile
from superexperts.artifacts import ExpertSet, Profile
from superexperts.config import ModelConfig, ProfileConfig, SelectConfig
from superexperts.corpora import documents, pack
from superexperts.errors import ModelError
from superexperts.model import load_model, load_tokenizer
from superexperts.pocket import PLANTED
from superexperts.profile import profile_corpus
from superexperts.select import run as select_run
from superexperts.select import super_experts
from test_moe import by_hand, eager_outputs

IDS_BL = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe", "gpt_oss", "mixtral"])
@torch.no_grad()
def test_peaks_and_counts_equal_a_loop_over_every_token(family: str) -> None:
    model: Any = tiny_model(family)
    model.set_experts_implementation("eager")
    result = profile_corpus(model, IDS_BL, batch_size=2)
    rows = {row.key: row for row in result.experts}
    assert result.tokens == IDS_BL.numel()
    for bank in moe.find_banks(model):
        seen: dict[int, list[tuple[float, int, int]]] = {}
        x_TD, index_TK, _ = inputs_of(model, bank)
        for token in range(len(x_TD)):
            for expert in index_TK[token].tolist():
                y_D = by_hand(bank.module, expert, x_TD[token]).abs()
                seen.setdefault(expert, []).append((float(y_D.max()), int(y_D.argmax()), token))
        for expert in range(bank.num_experts):
            row = rows[bank.layer, expert]
            assert row.tokens == len(seen.get(expert, []))
            if row.tokens:
                peak, channel, token = max(seen[expert])
                assert row.output_max == pytest.approx(peak, rel=1e-5)
                assert (row.channel, row.position) == (channel, token % IDS_BL.shape[1])
                assert row.token_id == int(IDS_BL.flatten()[token])
            else:
                assert (row.output_max, row.channel, row.position, row.token_id) == (0.0, None, None, None)


def inputs_of(model: Any, bank: moe.Bank) -> tuple[Tensor, Tensor, Tensor]:
    seen: list[Any] = []
    handle = bank.module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True
    )
    model(IDS_BL)
    handle.remove()
    x_TD, index_TK, weight_TK = seen[0]
    return x_TD, index_TK, weight_TK


@torch.no_grad()
def test_the_shared_experts_peak_is_that_of_its_down_proj() -> None:
    model: Any = tiny_model("deepseek_v2")
    outputs: dict[int, Tensor] = {}
    for layer in (1, 2):
        model.model.layers[layer].mlp.shared_experts.down_proj.register_forward_hook(
            lambda _, __, y, layer=layer: outputs.__setitem__(layer, y)
        )
    rows = {row.key: row for row in profile_corpus(model, IDS_BL, batch_size=5).experts}
    for layer, y in outputs.items():
        row = rows[layer, "shared"]
        assert row.output_max == float(y.abs().max())
        assert row.tokens == IDS_BL.numel()
        assert float(y[:, row.position, row.channel].abs().max()) == row.output_max


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_planted_outlier_is_found_in_the_right_layer(family: str, dtype: torch.dtype) -> None:
    model: Any = tiny_model(family, dtype=dtype)
    bank = moe.find_banks(model)[0]
    expert = int(eager_outputs(model, bank)[1].flatten()[0])
    with torch.no_grad():
        bank.module.down_proj[expert] *= 1000
    result = profile_corpus(model, IDS_BL)
    found = super_experts(result.experts, 3, percentile=90, depth=1.0)
    assert found[0].key == (bank.layer, expert)


def test_batch_size_and_padding_do_not_matter() -> None:
    model: Any = tiny_model("deepseek_v2")
    one = profile_corpus(model, IDS_BL, batch_size=1)
    all_ = profile_corpus(model, IDS_BL, batch_size=5)
    padded_BL = torch.cat([IDS_BL, torch.zeros(5, 7, dtype=torch.int64)], dim=1)
    mask_BL = torch.cat([torch.ones_like(IDS_BL), torch.zeros(5, 7, dtype=torch.int64)], dim=1)
    padded = profile_corpus(model, padded_BL, mask_BL=mask_BL, batch_size=2)
    for other in (all_, padded):
        assert other.tokens == one.tokens
        for ours, theirs in zip(other.experts, one.experts, strict=True):
            assert (ours.key, ours.tokens, ours.channel, ours.position, ours.token_id) == (
                theirs.key,
                theirs.tokens,
                theirs.channel,
                theirs.position,
                theirs.token_id,
            )
            assert ours.output_max == pytest.approx(theirs.output_max, rel=1e-5)


def test_an_expert_that_writes_infinity_is_an_error() -> None:
    model: Any = copy.deepcopy(tiny_model("mixtral"))
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0] = torch.inf
    with pytest.raises(ModelError, match="L1 expert 0 writes a value that is not finite"):
        profile_corpus(model, IDS_BL)


def test_command_finds_exactly_the_implanted_super_experts(tmp_path: Path) -> None:
    out = tmp_path / "profile"
    result = profile.run(ProfileConfig(out=out, tokens=4096, seq_len=128))
    assert {tuple(key) for key in result["corpora"]["pocket"]["super"]} == set(PLANTED)
    written = Profile.load(out)
    assert written.corpora["pocket"].tokens == 4096
    assert {row.key for row in super_experts(written.corpora["pocket"].experts, written.num_layers)} == set(PLANTED)
    select_run(SelectConfig(profile=out, out=tmp_path / "super.json"))
    assert set(ExpertSet.parse(str(tmp_path / "super.json")).experts) == set(PLANTED)
    pictures = {"heatmap-pocket.png", "heatmap-pocket.svg", "layers-pocket.png", "layers-pocket.svg"}
    assert {file.name for file in out.iterdir()} == pictures | {"profile.json", "manifest.json"}
    assert (out / "heatmap-pocket.png").read_bytes().startswith(b"\x89PNG")


def test_command_does_not_work_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ProfileConfig(out=tmp_path / "p", tokens=256, seq_len=128)
    first = profile.run(settings)
    stamp = (tmp_path / "p" / "profile.json").stat().st_mtime_ns
    assert profile.run(settings) == first
    assert "up to date" in capsys.readouterr().err
    assert (tmp_path / "p" / "profile.json").stat().st_mtime_ns == stamp
    profile.run(ProfileConfig(out=tmp_path / "p", tokens=384, seq_len=128))
    assert Profile.load(tmp_path / "p").corpora["pocket"].tokens == 384


def test_real_english_text_has_the_same_super_experts(shared_data: Path) -> None:
    settings = ModelConfig()
    tokenizer = load_tokenizer(settings)
    ids_BL = pack(documents("wikitext2", data_dir=shared_data), tokenizer, corpus="w", tokens=4096, seq_len=128)
    model = load_model(settings)
    found = super_experts(profile_corpus(model, ids_BL).experts, moe.num_layers(model))
    assert {row.key for row in found} == set(PLANTED)
