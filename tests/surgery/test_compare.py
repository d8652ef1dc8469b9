"""Differences between checkpoints against numpy in float64, for every layout; and the proof of `--expect-only`."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from superexperts.adapters import export, merge
from superexperts.adapters.export import ExportConfig
from superexperts.checkpoints.reader import INDEX, SINGLE, Checkpoint, Entry
from superexperts.cli import main
from superexperts.core.errors import DataError, ExpertsError, ModelError
from superexperts.models.banks import find_banks
from superexperts.models.parts import Unit
from superexperts.surgery import compare, prune, restore
from superexperts.surgery.compare import CompareConfig
from superexperts.surgery.differences import BLOCK, compare_unit, same_bytes, tensor_sums
from superexperts.surgery.prune import PruneConfig
from superexperts.surgery.restore import RestoreConfig
from tests.adapters.test_export import save_adapter, save_base, stock, train_like
from tests.support.families import FAMILIES, MORE_FAMILIES
from tests.surgery.test_surgery import contents, save, tensors

ALL = sorted(FAMILIES | MORE_FAMILIES)


def found(a: Path, b: Path, **options: Any) -> dict[str, Any]:
    return compare.run(CompareConfig(a=str(a), b=str(b), **options))


def one_ulp(folder: Path, key: str, index: int) -> None:
    """Changes one element of a bfloat16 tensor to the next number, in a copy of the file."""
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        if key in weights:
            weights[key].view(torch.int16).view(-1)[index] ^= 1
            file.unlink()  # it may be the base's as well
            save_file(weights, file, {"format": "pt"})
            return
    raise AssertionError(key)


@pytest.mark.parametrize("family", ALL)
def test_expect_only_passes_on_a_pruned_checkpoint_and_fails_on_one_ulp(family: str, tmp_path: Path) -> None:
    model = save(family, tmp_path / "base")
    bank = find_banks(model)[-1]
    chosen = f"L{bank.layer}E3" + (f",L{bank.layer}shared" if bank.shared_down is not None else "")
    prune.run(PruneConfig(model=str(tmp_path / "base"), experts=chosen, out=tmp_path / "pruned"))
    result = found(tmp_path / "base", tmp_path / "pruned", expect_only=chosen)
    assert (result["exit_code"], result["failed"], result["expected_but_identical"]) == (0, None, [])
    assert [row["expert"] for row in result["experts"]] == chosen.split(",")
    assert found(tmp_path / "base", tmp_path / "pruned", expect_identical=True)["exit_code"] == 1
    assert found(tmp_path / "base", tmp_path / "base", expect_identical=True)["exit_code"] == 0
    norm = next(key for key in tensors(tmp_path / "base") if "norm" in key)
    for number, key in enumerate((planted_expert(tmp_path / "base", bank.layer), norm)):
        other = tmp_path / f"other-{number}"
        prune.run(PruneConfig(model=str(tmp_path / "base"), experts=chosen, out=other))
        one_ulp(other, key, 5)
        failed = found(tmp_path / "base", other, expect_only=chosen)
        assert failed["exit_code"] == 1, key
        assert key in failed["failed"]
        extra = [row for row in failed["differences"] if row["key"].startswith(key) and row["changed"] == 1]
        assert len(extra) == 1


def planted_expert(folder: Path, layer: int) -> str:
    """A key of expert 2 of a layer, or of all its experts."""
    keys = [key for key in tensors(folder) if f".{layer}." in key]
    alone = [key for key in keys if ".experts.2." in key]
    return alone[0] if alone else next(key for key in keys if "experts" in key or "output_linear" in key)


# ---- the numbers ----

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]


def written(folder: Path, **own: Tensor) -> Checkpoint:
    folder.mkdir()
    save_file(own, folder / SINGLE)
    return Checkpoint(folder)


@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_against_numpy(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 700_001, generator=generator).to(dtype)  # over a block, and no multiple of one
    y = x.clone()
    y[1, 5:900] = (y[1, 5:900].float() * 1.5 + 0.25).to(dtype)
    with written(tmp_path / "a", x=x) as a, written(tmp_path / "b", x=y) as b:
        difference = compare_unit(a, b, Unit(key="x", a=(a["x"],), b=(b["x"],)))
    assert difference.status == "changed"
    numbers = difference.sums.to_json()
    one, other = (tensor.double().numpy().ravel() for tensor in (x, y))
    assert numbers["changed"] == int((x.view(torch.uint8) != y.view(torch.uint8)).view(-1, dtype.itemsize).any(1).sum())
    assert numbers["elements"] == one.size
    assert numbers["share_changed"] == numbers["changed"] / one.size
    assert numbers["relative_norm"] == pytest.approx(np.linalg.norm(other - one) / np.linalg.norm(one), rel=1e-12)
    assert numbers["max_change"] == np.abs(other - one).max()
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert numbers["cosine"] == pytest.approx(cosine, rel=1e-12)


def test_what_is_no_number_is_counted_and_spoils_nothing() -> None:
    x = torch.tensor([1.0, float("nan"), 2.0, float("inf"), 0.0])
    y = torch.tensor([1.0, float("nan"), float("inf"), 5.0, -0.0])
    numbers = tensor_sums(x, y).to_json()
    assert (numbers["changed"], numbers["not_finite"], numbers["max_change"]) == (3, 2, 0.0)  # -0 has other bits
    assert numbers["relative_norm"] == 0
    assert tensor_sums(torch.zeros(2), torch.ones(2)).to_json()["relative_norm"] is None
    assert tensor_sums(torch.ones(2), torch.zeros(2)).to_json()["cosine"] is None
    json.dumps(numbers, allow_nan=False)


def test_statuses(tmp_path: Path) -> None:
    one = {"same": torch.ones(3), "shape": torch.ones(4), "gone": torch.ones(2), "type": torch.tensor([1.0, 2.5])}
    other = {"same": torch.ones(3), "shape": torch.ones(2, 2), "new": torch.ones(5), "type": one["type"].bfloat16()}
    for name, own in (("a", one), ("b", other)):
        written(tmp_path / name, **own).close()
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    result = found(tmp_path / "a", tmp_path / "b", expect_identical=True)
    assert {row["key"]: row["status"] for row in result["differences"]} == {
        "shape": "reshaped", "gone": "missing in B", "new": "missing in A", "type": "changed",
    }  # fmt: skip
    assert result["parts"]["identical"] == 1
    (row,) = (row for row in result["differences"] if row["key"] == "type")
    assert (row["changed"], row["a"]["dtype"], row["b"]["dtype"]) == (0, "float32", "bfloat16")
    assert result["exit_code"] == 1
    assert result["experts"] == []


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_of_any_size_are_paired_rightly(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """The same bytes cut up in two ways are equal, and with one bit changed anywhere they are not."""
    total = data.draw(st.integers(1, 40))
    block = data.draw(st.sampled_from([1, 3, 7, BLOCK]))
    values = torch.arange(total, dtype=torch.float32)
    other = values.clone()
    place = data.draw(st.integers(-1, total - 1))
    if place >= 0:
        other.view(torch.int32)[place] ^= 1
    folder = tmp_path_factory.mktemp("cut")

    def cut(entry: Entry) -> tuple[Entry, ...]:
        at = sorted(data.draw(st.sets(st.integers(1, max(total - 1, 1)), max_size=5)) | {0, total})
        pairs = [(x, y) for x, y in itertools.pairwise(at) if y <= total]
        return tuple(
            Entry(
                key="x", file=SINGLE, kind=entry.kind, shape=(y - x,), offset=entry.offset + 4 * x, nbytes=4 * (y - x)
            )
            for x, y in pairs
        )

    with (
        pytest.MonkeyPatch.context() as patched,
        written(folder / "a", x=values) as a,
        written(folder / "b", x=other) as b,
    ):
        patched.setattr("superexperts.surgery.differences.BLOCK", block * 4)
        ones, others = cut(a["x"]), cut(b["x"])
        assert same_bytes(a, b, ones, others) == (place < 0)
        sums = compare_unit(a, b, Unit(key="x", a=ones, b=others)).sums
    assert (sums.changed, sums.elements) == (int(place >= 0), total)


# ---- layouts ----


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "nemotron_h"])
def test_a_fused_and_a_per_expert_checkpoint_of_one_model_are_identical(family: str, tmp_path: Path) -> None:
    model = save(family, tmp_path / "alone")
    fused = tmp_path / "fused"
    fused.mkdir()
    (fused / "config.json").write_bytes((tmp_path / "alone" / "config.json").read_bytes())
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, fused / SINGLE, {"format": "pt"})
    for a, b in ((tmp_path / "alone", fused), (fused, tmp_path / "alone")):
        result = found(a, b, expect_identical=True)
        assert (result["exit_code"], result["differences"]) == (0, [])
    bank = find_banks(model)[-1]
    state[f"{bank.path}.down_proj"][2].view(torch.int16).view(-1)[7] ^= 1
    save_file(state, fused / SINGLE, {"format": "pt"})
    result = found(tmp_path / "alone", fused, expect_only=f"L{bank.layer}E2")
    (row,) = result["differences"]
    assert (result["exit_code"], row["layer"], row["expert"], row["changed"]) == (0, bank.layer, 2, 1)
    assert found(fused, tmp_path / "alone", expect_only=f"L{bank.layer}E1")["exit_code"] == 1


def test_a_second_name_of_a_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("qwen3_moe", tmp_path / "base")
    prune.run(PruneConfig(model=str(tmp_path / "base"), experts="L1E1", out=tmp_path / "out"))
    read: set[str] = set()
    stock = Checkpoint.read_bytes

    def watched(checkpoint: Checkpoint, entry: Entry, target: memoryview, start: int = 0) -> None:
        read.add(entry.file)
        stock(checkpoint, entry, target, start)

    monkeypatch.setattr(Checkpoint, "read_bytes", watched)
    assert found(tmp_path / "base", tmp_path / "out")["parts"]["changed"] == 1
    assert len(read) == 1


def test_a_broken_checkpoint_is_an_error_about_the_setting_that_named_it(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "base")
    prune.run(PruneConfig(model=str(tmp_path / "base"), experts="L1E1", out=tmp_path / "out"))
    for shard in (tmp_path / "out").glob("*.safetensors"):
        shard.unlink()  # it may be a second name of the base's
        shard.write_bytes(b"{}")
    for command, field in (
        (lambda: found(tmp_path / "base", tmp_path / "out"), "b"),
        (lambda: found(tmp_path / "out", tmp_path / "base"), "a"),
        (lambda: restore.run(RestoreConfig(folder=tmp_path / "out", out=tmp_path / "restored")), "folder"),
    ):
        with pytest.raises(ModelError, match="no header of safetensors") as caught:
            command()
        assert caught.value.field == field


# ---- an adapter as B ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_adapter_differs_as_its_merged_checkpoint_does(
    family: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_base(tmp_path / "base", family, dtype)
    before = contents(base)
    adapter = save_adapter(train_like(stock(base, dtype), family), base, tmp_path / "adapter")
    exported = export.run(ExportConfig(adapter=adapter, format="merged", out=tmp_path / "merged"))
    assert "the model is loaded" not in capsys.readouterr().err
    with_adapter, with_merged = found(base, adapter), found(base, tmp_path / "merged")
    assert exported["changed"] > 3
    assert with_adapter["experts"] == with_merged["experts"] != []
    assert with_adapter["differences"] == with_merged["differences"]
    assert contents(base) == before
    monkey = pytest.MonkeyPatch()
    monkey.setattr(merge, "merged_patches", refuse)
    export.run(ExportConfig(adapter=adapter, format="merged", out=tmp_path / "loaded", copy=True))
    monkey.undo()
    assert "not shard by shard" in capsys.readouterr().err
    for row in found(tmp_path / "merged", tmp_path / "loaded")["differences"]:
        # transformers writes these in float32 whatever they were; on shards they stay as they are
        assert row["key"].endswith("e_score_correction_bias")
        assert (row["changed"], row["b"]["dtype"]) == (0, "float32")


def refuse(*_: Any) -> None:
    raise ModelError("ADAPTER: cannot be edited")


def test_merged_writes_only_shards_that_change(tmp_path: Path) -> None:
    from tests.adapters.test_lora import attach, randomise

    save("deepseek_v2", tmp_path / "base")
    adapted = attach(stock(tmp_path / "base", torch.bfloat16), [(1, 3)])
    randomise(adapted)
    adapter = save_adapter(adapted, tmp_path / "base", tmp_path / "adapter")
    export.run(ExportConfig(adapter=adapter, format="merged", out=tmp_path / "merged"))
    weight_map = json.loads((tmp_path / "base" / INDEX).read_text())["weight_map"]
    changed = {weight_map[f"model.layers.1.mlp.experts.3.{name}_proj.weight"] for name in ("gate", "up", "down")}
    assert changed < set(weight_map.values())
    for name in set(weight_map.values()):
        assert (tmp_path / "merged" / name).samefile(tmp_path / "base" / name) == (name not in changed)
    assert found(tmp_path / "base", tmp_path / "merged", expect_only="L1E3")["exit_code"] == 0
    assert found(tmp_path / "base", adapter, expect_only="L1E3")["exit_code"] == 0
    assert found(tmp_path / "base", adapter, expect_only="L1E2")["exit_code"] == 1


# ---- the command ----


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("qwen2_moe", tmp_path / "a")
    prune.run(PruneConfig(model=str(tmp_path / "a"), experts="L1E1,L2shared", out=tmp_path / "b"))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert main(["compare", a, b]) == 0
    assert main(["compare", a, b, "--expect-only", "L1E1,L2shared,L0E0"]) == 0
    assert "expected, but identical: L0E0" in capsys.readouterr().out
    assert main(["compare", a, b, "--expect-only", "L1E1"]) == 1
    assert (
        "NOT AS EXPECTED: 1 differences beyond L1E1; the first: 'model.layers.2.mlp.shared" in capsys.readouterr().out
    )
    assert main(["compare", a, b, "--expect-identical", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["parts"]["changed"] == 2
    assert main(["compare", a, a, "--expect-identical"]) == 0
    assert main(["compare", a, b, "--out", str(tmp_path / "out")]) == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"compare.json", "compare.png", "compare.svg", "manifest.json"}
    said = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["expert"] for row in said["experts"]] == ["L1E1", "L2shared"]


def test_another_config_is_not_as_expected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("qwen3_moe", tmp_path / "a")
    prune.run(PruneConfig(model=str(tmp_path / "a"), experts="L1E1", out=tmp_path / "b"))
    said = json.loads((tmp_path / "b" / "config.json").read_text())
    said["torch_dtype"] = said.pop("dtype")  # as transformers 4 called it
    said["transformers_version"] = "4"
    (tmp_path / "b" / "config.json").write_text(json.dumps(said))
    assert found(tmp_path / "a", tmp_path / "b", expect_only="L1E1")["exit_code"] == 0
    (tmp_path / "b" / "config.json").write_text(json.dumps({**said, "num_experts_per_tok": 2}))
    result = found(tmp_path / "a", tmp_path / "b", expect_only="L1E1")
    assert (result["exit_code"], result["failed"]) == (1, "config.json differs in 'num_experts_per_tok'")
    assert found(tmp_path / "a", tmp_path / "b")["exit_code"] == 0
    capsys.readouterr()
    prune.run(PruneConfig(model=str(tmp_path / "a"), experts="L0E1,L1E1,L2E1", out=tmp_path / "less", mode="remove"))
    less = found(tmp_path / "a", tmp_path / "less", expect_only="L0E1,L1E1,L2E1")
    assert less["exit_code"] == 1
    reported = capsys.readouterr().err
    assert "A has 8 experts a layer and B 7" in reported
    assert reported.count("\n") == 1


def test_two_checkpoints_are_compared_and_restored_without_what_trains(tmp_path: Path) -> None:
    """The start of a small command is its imports: PEFT takes a second, transformers three and half of the memory."""
    save("qwen3_moe", tmp_path / "a")
    script = (
        "import sys; from superexperts.cli import main; assert not main(sys.argv[2:]); "
        "sys.exit(sys.argv[1] in sys.modules)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    for unwanted, *command in (
        ("peft", "prune", a, "--experts=L1E1", f"--out={b}"),
        ("peft", "compare", a, b),
        ("transformers", "restore", b, f"--out={tmp_path / 'c'}"),
    ):
        done = subprocess.run([sys.executable, "-c", script, unwanted, *command], capture_output=True, check=False)
        assert done.returncode == 0, (command, done.stderr)


def test_wrong_input_is_refused(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "a")
    with pytest.raises(ExpertsError, match="expect_only: L9E1 is not in the model"):
        found(tmp_path / "a", tmp_path / "a", expect_only="L9E1")
    with pytest.raises(ModelError, match="nowhere"):
        found(tmp_path / "a", tmp_path / "nowhere")
    written(tmp_path / "dense", x=torch.ones(1)).close()
    (tmp_path / "dense" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="llama has no routed experts"):
        found(tmp_path / "dense", tmp_path / "dense", expect_only="L1E1")
    shard = next((tmp_path / "a").glob("model-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ModelError, match="is cut off"):
        found(tmp_path / "a", tmp_path / "a")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises((DataError, ModelError)):
        found(tmp_path / "a", tmp_path / "adapter")
