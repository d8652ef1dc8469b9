"""Checkpoints edited on their shards against the same edit in memory; the base is never touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from superexperts.checkpoints import writer
from superexperts.checkpoints.reader import INDEX, SINGLE
from superexperts.checkpoints.writer import RECORD
from superexperts.core.errors import DataError, ExpertsError, ModelError, OutputError
from superexperts.core.runs import MANIFEST
from superexperts.data.packing import pack
from superexperts.models.banks import find_banks, zero_experts
from superexperts.surgery import compare, locate, prune, restore
from superexperts.surgery.compare import CompareConfig
from superexperts.surgery.prune import PruneConfig
from superexperts.surgery.restore import RestoreConfig
from tests.support.families import FAMILIES, MORE_FAMILIES, tiny_model, tiny_tokens
from tests.training.test_train import byte_tokenizer

ALL = sorted(FAMILIES | MORE_FAMILIES)
SHARD = "30KB"


def save(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16, shards: bool = True) -> Any:
    """A tiny checkpoint, of several shards, as transformers writes it."""
    model: Any = tiny_model(family, dtype)
    model.save_pretrained(folder, max_shard_size=SHARD if shards else "1GB")
    (folder / "tokenizer.json").write_text("{}")
    return model


def tensors(folder: Path) -> dict[str, Tensor]:
    """Everything in a checkpoint, by safetensors' own reader."""
    return {
        key: tensor for file in sorted(folder.glob("model*.safetensors")) for key, tensor in load_file(file).items()
    }


def contents(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Of every file below a folder: hash, time of the last change and mode."""
    return {
        str(file.relative_to(folder)): (
            hashlib.sha256(file.read_bytes()).hexdigest(),
            file.stat().st_mtime_ns,
            file.stat().st_mode,
        )
        for file in folder.rglob("*")
        if file.is_file()
    }


def assert_equal(found: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    assert found.keys() == reference.keys()
    for key, tensor in reference.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert found[key].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), key


@pytest.mark.parametrize("family", ALL)
def test_pruned_on_shards_equals_pruned_in_memory_and_restore_is_exact(family: str, tmp_path: Path) -> None:
    model = save(family, tmp_path / "base")
    for file in (tmp_path / "base").iterdir():
        file.chmod(0o444)
    before = contents(tmp_path / "base")
    bank = find_banks(model)[-1]
    chosen: list[Any] = [(bank.layer, 0), (bank.layer, 3)]
    if bank.shared_down is not None:
        chosen.append((bank.layer, "shared"))
    names = ",".join(f"L{layer}{'' if expert == 'shared' else 'E'}{expert}" for layer, expert in chosen)
    prune.run(PruneConfig(model=str(tmp_path / "base"), experts=names, out=tmp_path / "pruned"))
    zero_experts(model, chosen)
    model.save_pretrained(tmp_path / "memory", max_shard_size=SHARD)
    assert_equal(tensors(tmp_path / "pruned"), tensors(tmp_path / "memory"))
    record = json.loads((tmp_path / "pruned" / RECORD).read_text())
    touched = {change["file"] for change in record["changes"]}
    assert 0 < len(touched) < len(list((tmp_path / "base").glob("*.safetensors")))
    for file in (tmp_path / "base").glob("*.safetensors"):
        assert file.samefile(tmp_path / "pruned" / file.name) == (file.name not in touched)
    restore.run(RestoreConfig(folder=tmp_path / "pruned", out=tmp_path / "restored"))
    restored = contents(tmp_path / "restored")
    assert {name: sha for name, (sha, *_) in restored.items() if name != MANIFEST} == {
        name: sha for name, (sha, *_) in before.items()
    }
    assert contents(tmp_path / "base") == before


@pytest.mark.parametrize("family", ALL)
def test_removed_on_shards_equals_removed_in_memory(family: str, tmp_path: Path) -> None:
    model = save(family, tmp_path / "base")
    banks = find_banks(model)
    count = banks[0].num_experts
    gone = {bank.layer: [1, count - 1] if number % 2 else [0, count // 2] for number, bank in enumerate(banks)}
    names = ",".join(f"L{layer}E{expert}" for layer, experts in gone.items() for expert in experts)
    prune.run(PruneConfig(model=str(tmp_path / "base"), experts=names, out=tmp_path / "less", mode="remove"))
    # In memory: every tensor of an MoE block with a dimension of `count` that is the experts'.
    smaller: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "less", dtype=torch.bfloat16).eval()
    state, reference = smaller.state_dict(), model.state_dict()
    assert state.keys() == reference.keys()
    shrunk = 0
    for name, tensor in reference.items():
        if tensor.shape != state[name].shape:
            bank = next(b for b in banks if name.startswith(b.path.rpartition(".")[0]))
            kept = torch.tensor([expert for expert in range(count) if expert not in gone[bank.layer]])
            dim = next(d for d, size in enumerate(tensor.shape) if size != state[name].shape[d])
            tensor = tensor.index_select(dim, kept)
            shrunk += 1
        assert torch.equal(state[name], tensor), name
    assert shrunk >= 3 * len(banks)  # up, down and the router
    assert [bank.num_experts for bank in find_banks(smaller)] == [count - 2] * len(banks)
    with torch.no_grad():
        assert smaller(tiny_tokens()).logits.isfinite().all()
    index = json.loads((tmp_path / "less" / INDEX).read_text())
    assert index["weight_map"].keys() == tensors(tmp_path / "less").keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "less").values())
    for file in (tmp_path / "less").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    restore.run(RestoreConfig(folder=tmp_path / "less", out=tmp_path / "restored"))
    assert_equal(tensors(tmp_path / "restored"), tensors(tmp_path / "base"))


def test_removing_experts_that_are_never_chosen_changes_no_answer(tmp_path: Path) -> None:
    model: Any = tiny_model("glm4_moe")
    banks = find_banks(model)
    with torch.no_grad():
        for bank in banks:
            router = model.get_submodule(bank.path.rpartition(".")[0]).gate
            router.e_score_correction_bias[[2, 5]] = -100
    model.save_pretrained(tmp_path / "base")
    names = ",".join(f"L{bank.layer}E{expert}" for bank in banks for expert in (2, 5))
    prune.run(PruneConfig(model=str(tmp_path / "base"), experts=names, out=tmp_path / "less", mode="remove"))
    base, less = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("base", "less"))
    with torch.no_grad():
        one, other = base(tiny_tokens()).logits, less(tiny_tokens()).logits
    assert (one - other).abs().max() < 1e-5 * one.abs().max()


@pytest.mark.parametrize(
    ("family", "experts", "said"),
    [
        ("qwen3_moe", "L1E1", "as many experts from every MoE layer"),
        ("qwen3_moe", "L0E1,L1E1,L2E1,L2E2", "layer 2 loses 2 and layer 0 1"),
        ("deepseek_v2", "L1shared,L2shared", "L1shared cannot be removed"),
        ("deepseek_v3", "L1E0,L2E0", r"n_group|loses \[1, 0\] of them|does not work with 7 experts"),
        ("deepseek_v3", "L1E0,L1E1,L2E4,L2E5", r"loses \[2, 0\] of them"),
        ("mixtral", "L0E0,L0E1,L0E2,L1E0,L1E1,L1E2,L2E0,L2E1,L2E2", "does not work with 1 experts"),
        ("mixtral", ",".join(f"L{layer}E{e}" for layer in range(3) for e in range(4)), "leave none"),
    ],
)
def test_removal_that_makes_no_model_is_refused(family: str, experts: str, said: str, tmp_path: Path) -> None:
    save(family, tmp_path / "base")
    with pytest.raises(ExpertsError, match=said):
        prune.run(PruneConfig(model=str(tmp_path / "base"), experts=experts, out=tmp_path / "out", mode="remove"))
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


# ---- the mean ----


def test_mean_is_what_the_bias_then_holds(tmp_path: Path) -> None:
    """Against gpt_oss's formula written down here, on what the whole model in memory sends the experts."""
    model: Any = tiny_model("gpt_oss", vocab_size=300)
    model.save_pretrained(tmp_path / "base")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("A text of some length, which is read byte by byte. " * 4)
    settings: Any = {"corpus": str(tmp_path / "text.txt"), "tokens": 128, "seq_len": 32, "batch_size": 3}
    prune.run(
        PruneConfig(
            model=str(tmp_path / "base"),
            experts="L0E1,L1E2",
            mode="mean",
            out=tmp_path / "out",
            device="cpu",
            **settings,
        )
    )
    texts = iter([(tmp_path / "text.txt").read_text()])
    ids_SL = pack(texts, tokenizer, corpus="text", tokens=128, seq_len=32)
    given: dict[int, tuple[Tensor, Tensor]] = {}
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, args, n=n: given.update({n: args[:2]}))
        for n, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(ids_SL)
    for handle in handles:
        handle.remove()
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    for layer, expert in ((0, 1), (1, 2)):
        x_TD, index_TK = given[layer][0].reshape(-1, 32), given[layer][1].reshape(-1, 2)
        x_ND = x_TD[(index_TK == expert).any(1)]
        bank = model.model.layers[layer].mlp.experts
        up_NU = x_ND @ bank.gate_up_proj[expert] + bank.gate_up_proj_bias[expert]
        gate_NF, up_NF = up_NU[:, ::2].clamp(max=7), up_NU[:, 1::2].clamp(-7, 7)
        inner_NF = (up_NF + 1) * gate_NF * torch.sigmoid(1.702 * gate_NF)
        mean_D = (inner_NF @ bank.down_proj[expert] + bank.down_proj_bias[expert]).mean(0)
        prefix = f"model.layers.{layer}.mlp.experts.down_proj"
        assert torch.allclose(after.pop(f"{prefix}_bias")[expert], mean_D, rtol=1e-5, atol=1e-6)
        assert not after.pop(prefix)[expert].any()
    assert len(after) == len(before) - 4
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    restore.run(RestoreConfig(folder=tmp_path / "out", out=tmp_path / "restored"))
    assert_equal(tensors(tmp_path / "restored"), before)
    with torch.no_grad():
        assert loaded(ids_SL).logits.isfinite().all()


def test_mean_is_refused_where_nothing_can_hold_it(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "base")
    with pytest.raises(ModelError, match="needs a bias of down_proj to hold the mean, which qwen3_moe does not have"):
        prune.run(PruneConfig(model=str(tmp_path / "base"), experts="L1E1", out=tmp_path / "out", mode="mean"))
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_an_expert_that_no_token_reaches_has_no_mean(tmp_path: Path) -> None:
    model: Any = tiny_model("gpt_oss", vocab_size=300)
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[2] = -1e4
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    settings: Any = {"tokens": 64, "seq_len": 32, "mode": "mean"}
    with pytest.raises(DataError, match="none of 64 tokens reached L1E2"):
        prune.run(PruneConfig(model=str(tmp_path / "base"), experts="L1E2", out=tmp_path / "out", **settings))
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


def test_a_new_text_is_a_new_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("gpt_oss", vocab_size=300).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    byte_tokenizer().save_pretrained(tmp_path / "base")
    text = tmp_path / "text.txt"
    settings: Any = {"corpus": str(text), "tokens": 64, "seq_len": 32, "mode": "mean", "overwrite": True}
    biases = []
    for words in ("one text, ", "one text, ", "another one"):
        text.write_text(words * 20)
        prune.run(PruneConfig(model=str(tmp_path / "base"), experts="L0E1", out=tmp_path / "out", **settings))
        biases.append(tensors(tmp_path / "out")["model.layers.0.mlp.experts.down_proj_bias"][1])
    assert torch.equal(biases[0], biases[1])
    assert not torch.equal(biases[0], biases[2])
    assert capsys.readouterr().err.count("is up to date") == 1
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"body": "another one" * 20}))
    settings |= {"corpus": str(rows), "column": "body"}
    prune.run(PruneConfig(model=str(tmp_path / "base"), experts="L0E1", out=tmp_path / "rows", **settings))
    assert torch.equal(tensors(tmp_path / "rows")["model.layers.0.mlp.experts.down_proj_bias"][1], biases[2])


def test_a_checkpoint_in_fp8_is_zeroed_and_nothing_else(tmp_path: Path) -> None:
    """Keys for scales that the model has no place for, as DeepSeek-V3's on the Hub."""
    save("qwen3_moe", tmp_path / "base", shards=False)
    weights = tensors(tmp_path / "base")
    for key in [key for key in weights if ".experts." in key]:
        weights[key] = weights[key].to(torch.float8_e4m3fn)
        weights[f"{key}_scale_inv"] = torch.rand(1, 1)
    save_file(weights, tmp_path / "base" / SINGLE, {"format": "pt"})
    said = json.loads((tmp_path / "base" / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(said))
    out = pruned(tmp_path / "base", tmp_path / "out")
    weights["model.layers.1.mlp.experts.3.down_proj.weight"] = torch.zeros(32, 24).to(torch.float8_e4m3fn)
    assert_equal(tensors(out), weights)
    result = compare.run(CompareConfig(a=str(tmp_path / "base"), b=str(out), expect_only="L1E3"))
    assert (result["exit_code"], result["parts"]["changed"]) == (0, 1)
    with pytest.raises(ModelError, match="not quantized; use mode zero"):
        prune.run(
            PruneConfig(model=str(tmp_path / "base"), experts="L0E1,L1E1,L2E1", out=tmp_path / "x", mode="remove")
        )
    packed = {key.replace("down_proj.weight", "down_proj.qweight"): tensor for key, tensor in weights.items()}
    save_file(packed, tmp_path / "base" / SINGLE, {"format": "pt"})
    with pytest.raises(ModelError, match="is quantized"):
        pruned(tmp_path / "base", tmp_path / "x")


def test_mxfp4_is_zeroed_and_nothing_else(tmp_path: Path) -> None:
    """gpt_oss as it is published: blocks of 4-bit numbers and scales; read back by transformers' own conversion."""
    model: Any = tiny_model("gpt_oss", torch.bfloat16, intermediate_size=32)
    model.save_pretrained(tmp_path / "base")
    weights, generator = tensors(tmp_path / "base"), torch.Generator().manual_seed(0)
    for key in [key for key in weights if key.endswith("_proj") and ".experts." in key]:
        count, inputs, outputs = weights.pop(key).shape
        shape = (count, outputs, inputs // 32)
        weights[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        weights[f"{key}_scales"] = torch.randint(120, 130, shape, dtype=torch.uint8, generator=generator)
    save_file(weights, tmp_path / "base" / SINGLE, {"format": "pt"})
    said = json.loads((tmp_path / "base" / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(said))
    out = pruned(tmp_path / "base", tmp_path / "out")
    prefix = "model.layers.1.mlp.experts.down_proj"
    for key in (f"{prefix}_blocks", f"{prefix}_bias"):
        assert weights[key][3].any()
        weights[key][3] = 0
    assert_equal(tensors(out), weights)
    widened = convert_moe_packed_tensors(weights[f"{prefix}_blocks"], weights[f"{prefix}_scales"])
    assert [bool(expert.any()) for expert in widened] == [True, True, True, False]
    result = compare.run(CompareConfig(a=str(tmp_path / "base"), b=str(out), expect_only="L1E3"))
    assert (result["exit_code"], result["parts"]["changed"], result["experts"][0]["expert"]) == (0, 2, "L1E3")
    assert compare.run(CompareConfig(a=str(tmp_path / "base"), b=str(out), expect_only="L1E2"))["exit_code"] == 1
    restore.run(RestoreConfig(folder=out, out=tmp_path / "restored"))
    assert (tmp_path / "restored" / SINGLE).read_bytes() == (tmp_path / "base" / SINGLE).read_bytes()
    with pytest.raises(ModelError, match="not quantized; use mode zero"):
        prune.run(
            PruneConfig(model=str(tmp_path / "base"), experts="L0E1,L1E1,L2E1", out=tmp_path / "x", mode="remove")
        )
    del weights[f"{prefix}_blocks"]
    save_file(weights, tmp_path / "base" / SINGLE, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"cannot be edited \(it has no {prefix}\); use its bfloat16"):
        pruned(tmp_path / "base", tmp_path / "x")


def test_a_checkpoint_without_one_of_its_tensors_is_refused(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path / "base", shards=False)
    weights = tensors(tmp_path / "base")
    del weights["model.layers.1.mlp.gate.weight"]
    save_file(weights, tmp_path / "base" / SINGLE, {"format": "pt"})
    for mode, experts in (("zero", "L1E1"), ("remove", "L0E1,L1E1,L2E1")):
        with pytest.raises(ModelError, match=r"has no model\.layers\.1\.mlp\.gate\.weight"):
            prune.run(PruneConfig(model=str(tmp_path / "base"), experts=experts, out=tmp_path / "x", mode=mode))  # type: ignore[arg-type]


# ---- files ----


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A sharded checkpoint with what lies beside one, and what is not to go along."""
    folder = tmp_path / "base"
    save("deepseek_v2", folder)
    (folder / "modeling_own.py").write_text("x = 1")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("free")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    for name in ("pytorch_model.bin", "consolidated.safetensors", ".hidden", "manifest.json"):
        (folder / name).write_bytes(b"{}")
    return folder


def pruned(base: Path, out: Path, **settings: Any) -> Path:
    prune.run(PruneConfig(model=str(base), experts="L1E3", out=out, **settings))
    return out


def test_what_belongs_to_a_checkpoint_goes_along(base: Path, tmp_path: Path) -> None:
    out = pruned(base, tmp_path / "out")
    names = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    shards = {file.name for file in base.glob("model-*.safetensors")}
    assert len(shards) > 3
    assert names == shards | {
        INDEX, "config.json", "generation_config.json", "tokenizer.json", "modeling_own.py", "chat_template.jinja",
        "LICENSE", "additional_chat_templates/tools.jinja", RECORD, MANIFEST,
    }  # fmt: skip
    for name in names - shards - {RECORD, MANIFEST}:
        assert (out / name).read_bytes() == (base / name).read_bytes()
        assert not (out / name).samefile(base / name)  # a changed setting is not to change the base's


def test_only_the_changed_bytes_differ(base: Path, tmp_path: Path) -> None:
    out = pruned(base, tmp_path / "out")
    (change,) = json.loads((out / RECORD).read_text())["changes"]
    assert change["key"] == "model.layers.1.mlp.experts.3.down_proj.weight"
    before, after = ((folder / change["file"]).read_bytes() for folder in (base, out))
    start, end = change["offset"], change["offset"] + change["bytes"]
    assert before[:start] + bytes(end - start) + before[end:] == after
    assert hashlib.sha256(before[start:end]).hexdigest() == change["sha256_before"]
    assert hashlib.sha256(after[start:end]).hexdigest() == change["sha256_after"]


def test_copies_share_nothing_with_the_base(base: Path, tmp_path: Path) -> None:
    out = pruned(base, tmp_path / "out", copy=True)
    assert not any(file.samefile(base / file.name) for file in out.glob("*.safetensors"))
    assert_equal(tensors(out), tensors(pruned(base, tmp_path / "linked")))


def test_a_hub_snapshot_gives_links_into_its_cache(base: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "cache" / "snapshot", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate([*sorted(base.glob("*model-*")), base / INDEX, base / "config.json"]):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../blobs/{number}")
    before = contents(tmp_path / "cache")
    out = pruned(snapshot, tmp_path / "out")
    links = [file for file in out.glob("*.safetensors") if file.is_symlink()]
    assert len(links) == len(list(out.glob("*.safetensors"))) - 1
    assert all(link.readlink().is_absolute() and link.readlink().parent == blobs for link in links)
    assert not (out / INDEX).is_symlink()
    assert contents(tmp_path / "cache") == before
    assert all(file.stat().st_nlink == 1 for file in blobs.iterdir())
    prune.run(PruneConfig(model=str(snapshot), experts="L1E3", out=tmp_path / "copied", copy=True))
    assert not any(file.is_symlink() for file in (tmp_path / "copied").iterdir())


def test_a_second_result_in_the_same_folder_leaves_the_base_alone(base: Path, tmp_path: Path) -> None:
    before = contents(base)
    pruned(base, tmp_path / "out")
    first = contents(tmp_path / "out")
    with pytest.raises(OutputError, match="out: .*out holds a finished result of `prune` with another experts; choose"):
        prune.run(PruneConfig(model=str(base), experts="L2E1", out=tmp_path / "out"))
    assert contents(tmp_path / "out") == first
    prune.run(PruneConfig(model=str(base), experts="L2E1", out=tmp_path / "out", overwrite=True))
    assert contents(base) == before
    changed = {key for key, tensor in tensors(tmp_path / "out").items() if not tensor.equal(tensors(base)[key])}
    assert changed == {"model.layers.2.mlp.experts.1.down_proj.weight"}


@pytest.mark.parametrize("kernel", ["reflink", "copy_file_range", "read and write"])
def test_every_way_of_copying_gives_the_same(
    kernel: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No disk here shares blocks: the ioctl is played by a copy, and the rest by errors that real ones give."""

    def ioctl(target: int, request: int, source: int) -> None:
        assert request == 0x40049409
        if kernel != "reflink":
            raise OSError(95, "Operation not supported")
        os.sendfile(target, source, 0, os.fstat(source).st_size)

    def across(*_: Any) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(writer.fcntl, "ioctl", ioctl)
    if kernel != "copy_file_range":
        monkeypatch.setattr(os, "copy_file_range", across)
    out = pruned(base, tmp_path / "out")
    reference = tensors(base)
    reference["model.layers.1.mlp.experts.3.down_proj.weight"].zero_()
    assert_equal(tensors(out), reference)


def test_without_hard_links_shards_are_copied_and_it_is_said(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def link(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    out = pruned(base, tmp_path / "out")
    assert "no hard links" in capsys.readouterr().err
    assert not any(file.samefile(base / file.name) for file in out.glob("*.safetensors"))


def test_no_room_is_seen_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    for settings in ({}, {"copy": True}):
        with pytest.raises(OutputError, match="are to be written, 0.00 GB are free"):
            pruned(base, tmp_path / "out", **settings)
    assert [file.name for file in tmp_path.iterdir()] == ["base"]


LIMITED = """
import resource, sys
from superexperts.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(sys.argv[1:]))
"""
KILLED = """
import os, signal, sys
from superexperts.checkpoints import writer
from superexperts.cli import main
writer._patch = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


def in_a_process(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("mode", ["zero", "remove"])
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(mode: str, base: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands in for the disk: writing past it fails, half-way through a shard."""
    before = contents(base)
    done = in_a_process(
        LIMITED, "prune", str(base), "--experts=L1E3,L2E3", f"--mode={mode}", f"--out={tmp_path / 'out'}"
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "--out: cannot write" in done.stderr
    assert "make room" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["base"]
    assert contents(base) == before


def test_a_kill_leaves_nothing_under_the_final_name(base: Path, tmp_path: Path) -> None:
    before = contents(base)
    done = in_a_process(KILLED, "prune", str(base), "--experts=L1E3", f"--out={tmp_path / 'out'}")
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    assert contents(base) == before
    pruned(base, tmp_path / "out")
    assert (tmp_path / "out" / RECORD).is_file()


def test_an_order_that_cannot_be_edited_is_pruned_in_memory(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = tensors(pruned(base, tmp_path / "shards"))
    monkeypatch.setattr(prune, "locate_by_shape", lambda *_: None)
    monkeypatch.setattr(locate, "down_projections", lambda *_: None)
    byte_tokenizer().save_pretrained(base)
    out = pruned(base, tmp_path / "memory")
    assert "the model is loaded" in capsys.readouterr().err
    assert_equal(tensors(out), reference)
    with pytest.raises(DataError, match="was written from a loaded model"):
        restore.run(RestoreConfig(folder=out, out=tmp_path / "restored"))


def test_one_file_is_a_checkpoint_as_well(tmp_path: Path) -> None:
    save("olmoe", tmp_path / "base", shards=False)
    for mode, experts in (("zero", "L1E3"), ("remove", "L0E1,L1E2,L2E7")):
        out = tmp_path / mode
        prune.run(PruneConfig(model=str(tmp_path / "base"), experts=experts, out=out, mode=mode))  # type: ignore[arg-type]
        assert [file.name for file in out.glob("*.safetensors*")] == [SINGLE]
        assert AutoModelForCausalLM.from_pretrained(out)
        restore.run(RestoreConfig(folder=out, out=tmp_path / f"{mode}-restored"))
        assert (tmp_path / f"{mode}-restored" / SINGLE).read_bytes() == (tmp_path / "base" / SINGLE).read_bytes()


# ---- restore proves its base ----


def edit(file: Path, offset: int) -> None:
    """Flips one bit of one byte in a copy of the file."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.unlink()
    file.write_bytes(data)


def change_of(out: Path) -> dict[str, Any]:
    change: dict[str, Any] = json.loads((out / RECORD).read_text())["changes"][0]
    return change


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda b, o: edit(b / change_of(o)["file"], change_of(o)["offset"]), "differs from the record"),
        (lambda b, o: edit(b / change_of(o)["file"], -1), "which prune did not change"),
        (lambda b, o: edit(o / change_of(o)["file"], -1), "which prune did not change"),
        (lambda b, o: edit(next(f for f in sorted(b.glob("model-*")) if f.name != change_of(o)["file"]), -1),
         "which prune did not change"),
        (lambda b, o: (b / "config.json").write_text((b / "config.json").read_text() + " "), "config.json' of"),
        (lambda b, o: (b / "LICENSE").unlink(), "LICENSE' of"),
        (lambda b, o: (b / INDEX).write_text((b / INDEX).read_text() + " "), INDEX),
        (lambda b, o: (o / RECORD).unlink(), "has no superexperts.json"),
        (lambda b, o: (o / RECORD).write_text("{"), "is not valid JSON"),
        (lambda b, o: (o / RECORD).write_text("[1]"), "expected a file of schema .*, found 'list'"),
        (lambda b, o: (o / RECORD).write_text('{"schema": "superexperts/surgery/1"}'), "json: command is missing"),
        (lambda b, o: amend(o, changes=[{**change_of(o), "offset": -1}]), r"changes\.0\.offset: -1 should be greater"),
        (lambda b, o: amend(o, changes=[{**change_of(o), "bytes": 10**15}]), "differs from the record"),
        (lambda b, o: amend(o, changes=[{**change_of(o), "file": "../../etc/passwd"}]), "differs from the record"),
        (lambda b, o: amend(o, files={"a\nb": {"bytes": 1, "sha256": ""}}), "of .* is not the recorded file"),
        (lambda b, o: amend(o, model="../nowhere"), "'../nowhere' does not exist"),
        (lambda b, o: amend(o, files={"config.json": 3}), r"files\.config\.json: 3 should be an object"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["zero", "remove"])
def test_restore_refuses_what_is_not_the_base(mode: str, wrong: Any, said: str, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune.run(PruneConfig(model=str(base), experts="L1E3,L2E3", out=out, mode=mode, copy=True))  # type: ignore[arg-type]
    wrong(base, out)
    with pytest.raises((DataError, ModelError), match=said) as caught:
        restore.run(RestoreConfig(folder=out, out=tmp_path / "restored"))
    assert "\n" not in str(caught.value)
    assert {file.name for file in tmp_path.iterdir()} == {"base", "out"}


def amend(out: Path, **fields: Any) -> None:
    record = json.loads((out / RECORD).read_text())
    (out / RECORD).write_text(json.dumps({**record, **fields}))


def test_restore_of_a_chain_undoes_its_last_step(base: Path, tmp_path: Path) -> None:
    first = pruned(base, tmp_path / "first")
    prune.run(PruneConfig(model=str(first), experts="L2E1", out=tmp_path / "second"))
    result = restore.run(RestoreConfig(folder=tmp_path / "second", out=tmp_path / "restored"))
    assert result["base"] == str(first)
    assert_equal(tensors(tmp_path / "restored"), tensors(first))
    again = restore.run(RestoreConfig(folder=tmp_path / "restored", out=tmp_path / "again"))
    assert again["base"] == str(base)
    assert_equal(tensors(tmp_path / "again"), tensors(base))
