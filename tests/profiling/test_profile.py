"""Profiles against a brute-force per-token loop, planted outliers in many families, and what must not matter."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from superexperts.checkpoints.source import resolve
from superexperts.core.errors import ModelError, OptionError
from superexperts.core.types import CorpusProfile, ExpertSet, ExpertStats, Profile
from superexperts.data.corpora import documents
from superexperts.data.packing import pack
from superexperts.models import hooks
from superexperts.models.banks import Bank, find_banks
from superexperts.models.decoder import num_layers
from superexperts.models.experts import down_weight, grouped
from superexperts.models.loading import load_model, load_tokenizer
from superexperts.pocket import PLANTED
from superexperts.profiling import measure, plots, profile
from superexperts.profiling.accumulator import _peaks, _Rows
from superexperts.profiling.criterion import super_experts
from superexperts.profiling.measure import profile_corpus
from superexperts.profiling.profile import ProfileConfig
from superexperts.profiling.select import SelectConfig
from superexperts.profiling.select import run as select_run
from tests.models.test_hooks import by_hand
from tests.support.families import FAMILIES, MORE_FAMILIES, VOCABULARY, tiny_model

IDS_BL = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(2))

SEVEN = ("math", "medical", "legal", "wikitext2", "c4", "tinystories", "multilingual")
"""The corpora of the original experiments."""


@pytest.mark.parametrize(
    "family", ["deepseek_v2", "qwen3_moe", "gpt_oss", "mixtral", "nemotron_h", "glm4_moe", "afmoe", "flex_olmo"]
)
@torch.no_grad()
def test_statistics_equal_a_loop_over_every_token(family: str) -> None:
    model: Any = tiny_model(family)
    model.set_experts_implementation("eager")
    result = profile_corpus(model, IDS_BL, batch_size=2)
    rows = {row.key: row for row in result.experts}
    length = IDS_BL.shape[1]
    assert result.tokens == IDS_BL.numel()
    for bank in find_banks(model):
        seen: dict[int, list[tuple[Tensor, Tensor, float, int]]] = {}
        x_TD, index_TK, weight_TK = inputs_of(model, bank)
        all_weights = sum(float(weight) for weight in weight_TK.flatten())
        for token in range(len(x_TD)):
            for slot, expert in enumerate(index_TK[token].tolist()):
                inner_F, y_D = by_hand(bank.module, expert, x_TD[token])
                seen.setdefault(expert, []).append((inner_F.abs(), y_D, float(weight_TK[token, slot]), token))
        for expert in range(bank.num_experts):
            row, calls = rows[bank.layer, expert], seen.get(expert, [])
            if not calls:
                assert row == ExpertStats(layer=bank.layer, expert=expert)
                continue
            assert row.tokens == len(calls)
            assert row.token_share == pytest.approx(len(calls) / index_TK.numel())
            assert row.gate_share == pytest.approx(sum(weight for _, _, weight, _ in calls) / all_weights, rel=1e-5)
            inner_F, _, _, token = max(calls, key=lambda call: float(call[0].max()))
            assert row.input_max == pytest.approx(float(inner_F.max()), rel=1e-5)
            assert (row.input_channel, row.input_position) == (int(inner_F.argmax()), token % length)
            assert row.input_token_id == int(IDS_BL.flatten()[token])
            _, y_D, _, token = max(calls, key=lambda call: float(call[1].abs().max()))
            assert row.output_max == pytest.approx(float(y_D.abs().max()), rel=1e-5)
            assert (row.channel, row.position) == (int(y_D.abs().argmax()), token % length)
            assert row.token_id == int(IDS_BL.flatten()[token])
            assert row.gate_sum == pytest.approx(sum(weight for _, _, weight, _ in calls), rel=1e-5)
            norms = [weight * float(y_D.norm()) for _, y_D, weight, _ in calls]
            assert row.reap == pytest.approx(sum(norms) / len(norms), rel=1e-5)
            firsts: dict[int, float] = {}
            for _, y_D, _, token in calls:  # in the order of the tokens
                firsts.setdefault(token // length, float(y_D.abs().max()))
            assert row.first_token_output_max == pytest.approx(max(firsts.values()), rel=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_all_experts_at_once_give_the_same_statistics(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; padding among the rows."""
    model, mask_BL = tiny_model(family, dtype), torch.ones_like(IDS_BL)
    mask_BL[0, -4:] = mask_BL[3, -1:] = 0
    expected = profile_corpus(model, IDS_BL, mask_BL=mask_BL, batch_size=2)
    monkeypatch.setattr(hooks, "looped", lambda *given, **_: grouped(*given))
    found = profile_corpus(model, IDS_BL, mask_BL=mask_BL, batch_size=2)
    assert found.tokens == expected.tokens == int(mask_BL.sum())
    for row, other in zip(found.experts, expected.experts, strict=True):
        assert (row.key, row.tokens) == (other.key, other.tokens)
        assert (row.channel, row.position, row.input_channel, row.input_position) == (
            other.channel, other.position, other.input_channel, other.input_position,
        )  # fmt: skip
        for field in ("output_max", "input_max", "first_token_output_max", "reference_output_max", "gate_sum", "reap"):
            assert getattr(row, field) == pytest.approx(getattr(other, field), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_row_of_equal_and_of_strange_values(dtype: torch.dtype) -> None:
    """Peaks are compared as bits: signs, zeros, infinities and what is not a number."""
    rows = [[0.0, -0.0, 0.0], [1.5, -3.0, 3.0], [-7.0, 6.5, 0.0], [-1e-7, 0.0, 5e-8], [1.0, -math.inf, 2.0]]
    values = torch.tensor(rows, dtype=torch.float64).to(dtype)
    assert torch.equal(_peaks(values), values.abs().amax(-1).float())
    assert _peaks(torch.tensor([[1.0, math.nan]], dtype=dtype)).isnan().all()
    gathered = _Rows()
    gathered.add(torch.tensor([4, 4]), values[:2], _peaks(values[:2]), True)
    gathered.add(torch.tensor([6, 6, 7]), values[[2, 2, 1]], _peaks(values[[2, 2, 1]]), False)
    expert_P, peak_P, place_P, channel_P = (column.tolist() for column in gathered.highest(torch.arange(10, 15)))
    assert (expert_P, peak_P, place_P, channel_P) == ([4, 6, 7], [3.0, 7.0, 3.0], [11, 12, 14], [1, 0, 1])


def inputs_of(model: Any, bank: Bank, ids_BL: Tensor = IDS_BL) -> tuple[Tensor, Tensor, Tensor]:
    seen: list[Any] = []
    handle = bank.module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True
    )
    model(ids_BL)
    handle.remove()
    x_TD, index_TK, weight_TK = seen[0]
    return x_TD, index_TK, weight_TK


@torch.no_grad()
def test_the_shared_experts_statistics_are_those_of_its_down_proj() -> None:
    model: Any = tiny_model("deepseek_v2")
    inners: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def hook(layer: int, x: Tensor, y: Tensor) -> None:
        inners[layer], outputs[layer] = x.clone(), y.clone()

    for layer in (1, 2):
        model.model.layers[layer].mlp.shared_experts.down_proj.register_forward_hook(
            lambda _, args, y, layer=layer: hook(layer, args[0], y)
        )
    rows = {row.key: row for row in profile_corpus(model, IDS_BL, batch_size=5).experts}
    for layer, y in outputs.items():
        row = rows[layer, "shared"]
        assert row.output_max == float(y.abs().max())
        assert row.tokens == row.gate_sum == IDS_BL.numel()
        assert (row.token_share, row.gate_share) == (None, None)
        assert row.reap == pytest.approx(float(y.norm(dim=-1).mean()), rel=1e-5)
        inner = inners[layer]
        assert row.input_max == float(inner.abs().max())
        assert float(inner[:, row.input_position, row.input_channel].abs().max()) == row.input_max
        assert row.first_token_output_max == row.output_max  # of a shared expert, all tokens are the first one's
        assert float(y[:, row.position, row.channel].abs().max()) == row.output_max


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_planted_outlier_is_found_in_the_right_place(family: str, dtype: torch.dtype) -> None:
    """In the last MoE layer. That a tap computes what each stock implementation does is tested in test_moe."""
    model: Any = tiny_model(family, dtype=dtype)
    bank = find_banks(model)[-1]
    rows = profile_corpus(model, IDS_BL).experts
    expert = next(row.expert for row in rows if row.layer == bank.layer and row.expert != "shared" and row.tokens)
    with torch.no_grad():
        down_weight(bank.module)[expert] *= 1000
    found = super_experts(profile_corpus(model, IDS_BL).experts, num_layers(model), percentile=90, depth=1.0)
    assert [row.key for row in found] == [(bank.layer, expert)]


def test_a_family_whose_experts_are_no_bank_is_named() -> None:
    config = AutoConfig.for_model(
        "doge", vocab_size=97, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, is_moe=True, num_experts=16, num_experts_per_tok=3,
    )  # fmt: skip
    with pytest.raises(ModelError, match="model: doge has no routed experts that transformers 5 can swap"):
        profile_corpus(AutoModelForCausalLM.from_config(config), IDS_BL)


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss"])
def test_batch_size_and_padding_do_not_matter(family: str) -> None:
    model: Any = tiny_model(family)
    one = profile_corpus(model, IDS_BL, batch_size=1)
    all_ = profile_corpus(model, IDS_BL, batch_size=5)
    padded_BL = torch.cat([IDS_BL, torch.zeros(5, 7, dtype=torch.int64)], dim=1)
    mask_BL = torch.cat([torch.ones_like(IDS_BL), torch.zeros(5, 7, dtype=torch.int64)], dim=1)
    padded = profile_corpus(model, padded_BL, mask_BL=mask_BL, batch_size=2)
    # Padding in front moves the places, and nothing else: positions of rotary embeddings are relative.
    left = profile_corpus(model, padded_BL.roll(7, 1), mask_BL=mask_BL.roll(7, 1), batch_size=2)
    moved = tuple(
        dataclasses.replace(row, position=row.position - 7, input_position=row.input_position - 7)
        if row.tokens
        else row
        for row in left.experts
    )
    for other in (all_, padded, dataclasses.replace(left, experts=moved)):
        assert other.tokens == one.tokens
        for ours, theirs in zip(other.experts, one.experts, strict=True):
            for field in dataclasses.fields(ExpertStats):
                mine, its = getattr(ours, field.name), getattr(theirs, field.name)
                exact = not isinstance(mine, float)
                assert mine == (its if exact else pytest.approx(its, rel=1e-5)), (ours.key, field.name)
    assert profile_corpus(model, IDS_BL, batch_size=5) == all_


def test_the_first_of_equal_peaks_wins_whatever_the_batches() -> None:
    ids_BL = torch.cat([IDS_BL[:1]] * 4)
    model: Any = tiny_model("mixtral")
    for batch_size in (1, 2, 4):
        result = profile_corpus(model, ids_BL, batch_size=batch_size)
        alone = profile_corpus(model, ids_BL[:1])
        for row, one in zip(result.experts, alone.experts, strict=True):
            assert (row.position, row.channel, row.input_position) == (one.position, one.channel, one.input_position)
            assert row.tokens == 4 * one.tokens


def test_only_the_layers_below_depth_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("deepseek_v2")
    ran: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    full = profile_corpus(model, IDS_BL)
    assert set(ran) == {0, 1, 2}
    ran.clear()
    part = profile_corpus(model, IDS_BL, depth=0.6)
    assert set(ran) == {0, 1}
    assert part.experts == tuple(row for row in full.experts if row.layer < 2)
    with pytest.raises(OptionError, match="depth: 0.3 leaves no MoE layer of 3 layers"):
        profile_corpus(model, IDS_BL, depth=0.3)


def test_an_expert_that_writes_infinity_is_an_error() -> None:
    model: Any = copy.deepcopy(tiny_model("mixtral"))
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[0] = torch.inf
    with pytest.raises(ModelError, match="L1E0 writes a value that is not finite"):
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
    pictures = {f"{kind}-pocket.{suffix}" for kind in ("heatmap", "layers", "top") for suffix in ("png", "svg")}
    assert {file.name for file in out.iterdir()} == pictures | {"profile.json", "manifest.json"}
    assert (out / "heatmap-pocket.png").read_bytes().startswith(b"\x89PNG")


def test_several_corpora_and_what_they_agree_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two files of one name, killed between them: the first is not run again, and each has separate pictures."""
    texts = list(documents("pocket"))
    for folder, part in (("a", texts[:100]), ("b", texts[100:200])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes.txt").write_text("\n\n".join(part), encoding="utf-8")
    files = [str(tmp_path / folder / "notes.txt") for folder in "ab"]
    out = tmp_path / "out"
    settings = ProfileConfig(corpus=(*files, "pocket"), out=out, tokens=1024, seq_len=128)
    run, asked = measure.profile_corpus, 0

    def counted(*arguments: Any, **more: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise KeyboardInterrupt
        return run(*arguments, **more)

    monkeypatch.setattr(measure, "profile_corpus", counted)
    with pytest.raises(KeyboardInterrupt):
        profile.run(settings)
    assert not (out / "profile.json").exists()
    (out / "heatmap-of-a-former-run.png").write_bytes(b"")
    (out / "mine.png").write_bytes(b"not the command's")
    result = profile.run(settings)
    assert asked == 4
    assert "notes.txt was finished before, kept" in capsys.readouterr().err
    names = {file.name for file in out.iterdir()}
    assert names >= {
        "heatmap-notes-txt.png",
        "heatmap-notes-txt-2.png",
        "corpora.svg",
        "stability.json",
        "profile.json",
    }
    assert "heatmap-of-a-former-run.png" not in names
    assert "mine.png" in names
    assert ".sections" not in names
    written = Profile.load(out)
    for name in (*files, "pocket"):
        alone = profile.run(
            ProfileConfig(corpus=(name,), out=tmp_path / name.replace("/", "-"), tokens=1024, seq_len=128)
        )
        assert Profile.load(Path(alone["out"])).corpora[name] == written.corpora[name]
    found = json.loads((out / "stability.json").read_text())
    assert found == result["stability"]
    assert {row["expert"] for row in found["super"]} >= {"L1E11", "L3E54"}
    profile.show(result)
    assert "Jaccard" in capsys.readouterr().out


def test_pictures_of_corpora_of_like_names_are_kept_apart(tmp_path: Path) -> None:
    """`x/n-txt-3` is called as the third picture of another would be."""
    rows = (ExpertStats(layer=0, expert=0, tokens=1, output_max=1.0), ExpertStats(layer=0, expert=1))
    names = ("a/n.txt", "x/n-txt-3", "b/n.txt", "c/n.txt")
    corpora = {name: CorpusProfile(tokens=1, experts=rows) for name in names}
    drawn = plots.draw_pictures(Profile(model="m", num_layers=1, corpora=corpora), tmp_path)
    tops = [name for name in drawn if name.startswith("top-") and name.endswith(".png")]
    assert tops == ["top-n-txt.png", "top-n-txt-3.png", "top-n-txt-2.png", "top-n-txt-4.png"]


def test_killed_at_any_moment_no_file_is_half_written(tmp_path: Path) -> None:
    """Killed three times, from the first corpus to the last picture; then it ends as if it had not been."""
    texts = list(documents("pocket"))
    for name, part in (("a", texts[:40]), ("b", texts[40:80])):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(part), encoding="utf-8")
    corpora = tuple(str(tmp_path / f"{name}.txt") for name in "ab")
    settings = ProfileConfig(corpus=corpora, out=tmp_path / "killed", tokens=512, seq_len=64)
    whole = dataclasses.replace(settings, out=tmp_path / "whole")
    begin = time.monotonic()
    profile.run(whole)
    seconds = time.monotonic() - begin
    for moment in (1, 2, 3):
        process = multiprocessing.get_context("fork").Process(target=profile.run, args=(settings,))
        process.start()
        process.join(seconds * moment / 4)
        process.kill()
        process.join()
        for file in settings.out.rglob("*.json"):
            json.loads(file.read_bytes())
        for file in settings.out.rglob("*.png"):
            assert file.read_bytes().endswith(b"IEND\xaeB`\x82")
        for file in settings.out.rglob("*.svg"):
            assert file.read_text(encoding="utf-8").endswith("</svg>\n")
    profile.run(settings)
    assert {file.name for file in settings.out.iterdir()} == {file.name for file in whole.out.iterdir()}
    assert (settings.out / "profile.json").read_bytes() == (whole.out / "profile.json").read_bytes()


def test_command_does_not_work_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ProfileConfig(out=tmp_path / "p", tokens=256, seq_len=128)
    first = profile.run(settings)
    stamp = (tmp_path / "p" / "profile.json").stat().st_mtime_ns
    assert profile.run(settings) == first
    assert "up to date" in capsys.readouterr().err
    assert (tmp_path / "p" / "profile.json").stat().st_mtime_ns == stamp
    profile.run(ProfileConfig(out=tmp_path / "p", tokens=384, seq_len=128, overwrite=True))
    assert Profile.load(tmp_path / "p").corpora["pocket"].tokens == 384


def test_the_seven_real_corpora_profile_under_their_names(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "draw_pictures", lambda *_: [])
    settings = ProfileConfig(corpus=SEVEN, out=tmp_path / "p", tokens=512, seq_len=128, data_dir=shared_data)
    profile.run(settings)
    written = Profile.load(tmp_path / "p")
    assert tuple(written.corpora) == SEVEN
    for corpus in written.corpora.values():
        assert corpus.tokens == 512
        assert max(corpus.experts, key=lambda row: row.output_max).key in PLANTED
    peaks = {tuple(row.output_max for row in corpus.experts) for corpus in written.corpora.values()}
    assert len(peaks) == 7  # seven texts, none read in another's place


def test_real_english_text_has_the_same_super_experts(shared_data: Path) -> None:
    source = resolve("pocket")
    tokenizer = load_tokenizer(source)
    ids_BL = pack(documents("wikitext2", data_dir=shared_data), tokenizer, corpus="w", tokens=4096, seq_len=128)
    model = load_model(source)
    found = super_experts(profile_corpus(model, ids_BL).experts, num_layers(model))
    assert {row.key for row in found} == set(PLANTED)
