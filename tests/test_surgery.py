"""Checkpoints edited on their shards against the same edit in memory; the base is never touched."""

from __future__ import annotations

import hashlib
import json
import os
import resource
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

from families import FAMILIES, MORE_FAMILIES, tiny_model, tiny_tokens
from superexperts import export, moe, prune, restore, surgery
from superexperts.checkpoint import INDEX, SINGLE, Checkpoint
from superexperts.config import PruneConfig
from superexperts.config_surgery import RestoreConfig
from superexperts.errors import DataError, ExpertsError, ModelError, OutputError
from superexperts.rundir import MANIFEST
from superexperts.surgery import RECORD

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
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


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


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert found[key].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), key


@pytest.mark.parametrize("family", ALL)
def test_pruned_on_shards_equals_pruned_in_memory_and_restore_is_exact(family: str, tmp_path: Path) -> None:
    model = save(family, tmp_path / "base")
    for file in (tmp_path / "base").iterdir():
        file.chmod(0o444)
    before = contents(tmp_path / "base")
    bank = moe.find_banks(model)[-1]
    chosen: list[Any] = [(bank.layer, 0), (bank.layer, 3)]
    if bank.shared_down is not None:
        chosen.append((bank.layer, "shared"))
    names = ",".join(f"L{layer}{'' if expert == 'shared' else 'E'}{expert}" for layer, expert in chosen)
    prune.run(PruneConfig(model=str(tmp_path / "base"), experts=names, out=tmp_path / "pruned"))
    moe.zero_experts(model, chosen)
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
    banks = moe.find_banks(model)
    count = banks[0].num_experts
    gone = {bank.layer: [1, count - 1] if number % 2 else [0, count // 2] for number, bank in enumerate(banks)}
    names = ",".join(f"L{layer}E{expert}" for layer, experts in gone.items() for expert in experts)
    prune.run(PruneConfig(model=str(tmp_path / "base"), experts=names, out=tmp_path / "less", mode="remove"))
    # In memory: every tensor of an MoE block with a dimension of `count` that is the experts'.
    smaller: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "less", dtype=torch.bfloat16).eval()
    state, wanted = smaller.state_dict(), model.state_dict()
    assert state.keys() == wanted.keys()
    shrunk = 0
    for name, tensor in wanted.items():
        if tensor.shape != state[name].shape:
            bank = next(b for b in banks if name.startswith(b.path.rpartition(".")[0]))
            kept = torch.tensor([expert for expert in range(count) if expert not in gone[bank.layer]])
            dim = next(d for d, size in enumerate(tensor.shape) if size != state[name].shape[d])
            tensor = tensor.index_select(dim, kept)
            shrunk += 1
        assert torch.equal(state[name], tensor), name
    assert shrunk >= 3 * len(banks)  # up, down and the router
    assert [bank.num_experts for bank in moe.find_banks(smaller)] == [count - 2] * len(banks)
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
    banks = moe.find_banks(model)
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
    """Against hooks of our own on the whole model in memory; the pruned expert answers a constant."""
    folder = tmp_path / "base"
    model = save("gpt_oss", folder, torch.float32)
    CheckpointConfigs = load_tokenizer(CheckpointConfig())  # the pocket model's, whose ids are folded into 97
    CheckpointConfigs.save_pretrained(folder)
