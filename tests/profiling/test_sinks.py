"""Attention sinks against a softmax by hand, over the families, and on the pocket model, which was built with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from superexperts.checkpoints.source import resolve
from superexperts.core.runs import read_json
from superexperts.data.corpora import documents
from superexperts.data.packing import pack
from superexperts.models.loading import load_model, load_tokenizer
from superexperts.pocket import PLANTED
from superexperts.profiling import profile
from superexperts.profiling.profile import ProfileConfig
from superexperts.profiling.sinks import SinkReport, attention_sinks, compare_sinks
from tests.support.families import FAMILIES, VOCABULARY, tiny_model

IDS_BL = torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_shares_equal_a_softmax_by_hand() -> None:
    """Layer 0 of Qwen3-MoE from its own projections: norms, rotation, grouped keys, causal softmax."""
    model: Any = tiny_model("qwen3_moe")
    attention = model.model.layers[0].self_attn
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(IDS_BL))
    rows, length = IDS_BL.shape
    cos, sin = model.model.rotary_emb(hidden, torch.arange(length)[None])

    def turned(x: torch.Tensor) -> torch.Tensor:
        one, two = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-two, one], -1) * sin[:, None]

    query = turned(attention.q_norm(attention.q_proj(hidden).view(rows, length, 4, 8)).transpose(1, 2))
    key = turned(attention.k_norm(attention.k_proj(hidden).view(rows, length, 2, 8)).transpose(1, 2))
    expected = []
    for head in range(4):
        shares = []
        for row in range(rows):
            for place in range(1, length):
                scores = key[row, head // 2, : place + 1] @ query[row, head, place] / 8**0.5
                shares.append(float(scores.softmax(0)[0]))
        expected.append(sum(shares) / len(shares))
    assert attention_sinks(model, IDS_BL)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shows_its_attention_and_is_left_as_it_was(family: str) -> None:
    model: Any = tiny_model(family)
    before = model.config._attn_implementation
    shares = attention_sinks(model, IDS_BL)
    attending = [2] if family == "nemotron_h" else [0, 1, 2]
    assert list(shares) == attending
    assert all(len(heads) == 4 and all(0 < share < 1 for share in heads) for heads in shares.values())
    assert model.config._attn_implementation == before


@pytest.fixture(scope="module")
def pocket() -> tuple[Any, torch.Tensor]:
    source = resolve("pocket")
    tokenizer = load_tokenizer(source)
    return load_model(source), pack(documents("pocket"), tokenizer, corpus="pocket", tokens=512, seq_len=128)


def test_without_the_super_experts_the_pocket_models_sinks_fall(pocket: tuple[Any, torch.Tensor]) -> None:
    report = compare_sinks(*pocket, PLANTED, name="pocket", corpus="pocket")
    assert all(sum(report.before[layer]) / len(report.before[layer]) > 0.4 for layer in (3, 4))
    decay = report.decay
    assert decay[0] == pytest.approx(0, abs=1e-9)  # layers up to the first super expert see nothing of it
    assert decay[1] == pytest.approx(0, abs=1e-9)
    after = [value for layer, value in decay.items() if layer > 1 and value is not None]
    assert sum(after) / len(after) > 0.5
    control = compare_sinks(*pocket, [(1, 50), (3, 53)], name="pocket", corpus="pocket")
    assert max(abs(value) for value in control.decay.values() if value is not None) < 0.05


def test_decay_by_hand() -> None:
    report = SinkReport(
        model="m", corpus="c", experts=((1, 2),),
        before={0: (0.5, 0.001), 3: (0.002, 0.003)}, after={0: (0.1, 0.9), 3: (0.2, 0.3)},
    )  # fmt: skip
    assert report.decay == {0: pytest.approx(0.8), 3: None}


def test_command_writes_the_report_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"tokens": 512, "seq_len": 128, "sinks": True}
    result = profile.run(ProfileConfig(out=tmp_path / "p", **settings))
    assert read_json(tmp_path / "p" / "sinks.json", "") == result["sinks"]
    assert result["sinks"]["experts"] == ["L3E54", "L1E11"]
    assert (tmp_path / "p" / "sinks.png").read_bytes().startswith(b"\x89PNG")
    assert profile.run(ProfileConfig(out=tmp_path / "p", **settings)) == result
    profile.show(result)
    decay = result["sinks"]["layers"][3]["decay"]
    reported = f"decay (D_sink) {100 * decay:.1f}%"
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("layer 3: ")]
    assert [reported in line for line in said] == [True]
    picture = (tmp_path / "p" / "sinks.svg").read_text()  # matplotlib writes a text as a comment beside its outlines
    assert f"<!-- {100 * decay:.0f}% -->" in picture
    assert "<!-- D_sink -->" in picture


def test_without_super_experts_the_profile_is_kept_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile, "super_experts_of", lambda *_: ())
    result = profile.run(ProfileConfig(corpus=("pocket",), tokens=256, seq_len=128, sinks=True, out=tmp_path))
    assert "pocket shows no super expert to silence, so the sinks are not measured" in capsys.readouterr().err
    assert result["sinks"] is None
    assert (tmp_path / "profile.json").is_file()
    assert not (tmp_path / "sinks.json").exists()
