"""Checkpoints that `prune` and `compare` must not take: what they would write would not be what it is called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3OmniMoeConfig

from superexperts.checkpoints.reader import SINGLE, Checkpoint
from superexperts.checkpoints.source import resolve
from superexperts.core.errors import ModelError
from superexperts.core.types import Profile
from superexperts.models.loading import settings_of, structure_of
from superexperts.profiling.criterion import super_experts_of
from superexperts.profiling.measure import profile_corpus
from superexperts.surgery import remove
from superexperts.surgery.compare import CompareConfig
from superexperts.surgery.compare import run as compare
from superexperts.surgery.locate import locate
from superexperts.surgery.prune import PruneConfig
from superexperts.surgery.prune import run as prune
from tests.support.families import tiny_model, tiny_tokens

LAYER = "model.layers.2."


def rewritten(folder: Path, family: str, edit: Callable[[dict[str, Tensor]], object]) -> str:
    tiny_model(family).save_pretrained(folder)
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("prefix", ["mtp.layers.0.", "model.mtp_layers.0.", "mtp.", "model.layers.3."])
def test_experts_of_a_speculative_head_are_not_left_with_the_old_number(tmp_path: Path, prefix: str) -> None:
    def with_head(tensors: dict[str, Tensor]) -> None:
        layer = {key: tensor for key, tensor in tensors.items() if key.startswith(LAYER)}
        tensors.update({prefix + key.removeprefix(LAYER): tensor.clone() for key, tensor in layer.items()})

    base = rewritten(tmp_path / "base", "qwen3_next", with_head)
    with pytest.raises(ModelError, match="layers that the model does not run|unexpected keys"):
        prune(PruneConfig(model=base, experts="L0E1,L1E1,L2E1", mode="remove", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_a_missing_matrix_of_one_expert_is_noticed(tmp_path: Path, name: str) -> None:
    whole = rewritten(tmp_path / "whole", "qwen3_moe", len)
    missing = f"{LAYER}mlp.experts.5.{name}.weight"
    lacking = rewritten(tmp_path / "lacking", "qwen3_moe", lambda tensors: tensors.pop(missing))
    with pytest.raises(ModelError, match="the checkpoint has 7 of 8 tensors"):
        prune(PruneConfig(model=lacking, experts="L2E1", out=tmp_path / "out"))
    for a, b in ((lacking, whole), (whole, lacking)):
        with pytest.raises(ModelError, match="the checkpoint has 7 of 8 tensors"):
            compare(CompareConfig(a=a, b=b, expect_only="L2E1"))


def test_zeros_under_a_zero_point_are_refused(tmp_path: Path) -> None:
    def quantized(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if "experts" in key and key.endswith("_proj.weight")]:
            tensors[key] = torch.full(tensors[key].shape, 9, dtype=torch.int8)
            tensors[f"{key}_zero_point"] = torch.full((1,), 7, dtype=torch.int8)

    base = resolve(rewritten(tmp_path, "olmoe", quantized))
    structure = structure_of(settings_of(base), base)
    structure.config.quantization_config = {"quant_method": "compressed-tensors"}  # type: ignore[union-attr]
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(ModelError, match="a zero point|cannot be edited"):
        locate(structure, checkpoint, [(2, 1)], values_matter=False)


def test_a_removal_that_does_not_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = rewritten(tmp_path / "base", "qwen3_moe", len)
    shrink = remove._new_settings
    monkeypatch.setattr(remove, "_new_settings", lambda *given: shrink(*given[:-1], given[-1] + 1))
    with pytest.raises(ModelError, match="does not load and run"):
        prune(PruneConfig(model=base, experts="L0E1,L1E1,L2E1", mode="remove", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_shards_without_an_index_are_named(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(ModelError, match=r"1 \.safetensors files, but no model\.safetensors\.index\.json"):
        Checkpoint(tmp_path)


def test_code_that_comes_with_a_checkpoint_is_named(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {"model_type": "somebodys_own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="if you trust that code, give trust_remote_code"):
        settings_of(resolve(str(tmp_path)))


def test_a_late_moe_layer_has_no_super_expert_by_the_criterion() -> None:
    model = tiny_model("deepseek_v2", first_k_dense_replace=3, num_hidden_layers=4)
    corpus = profile_corpus(model, tiny_tokens(), depth=1.0)
    profile = Profile(model="late", num_layers=4, depth=1.0, statistic="all", corpora={"text": corpus})
    assert {row.layer for row in corpus.experts} == {3}
    assert super_experts_of(profile, corpus) == ()


def test_the_number_of_experts_is_found_in_a_part_of_a_part(tmp_path: Path) -> None:
    settings = Qwen3OmniMoeConfig()
    (tmp_path / "config.json").write_text(json.dumps({"thinker_config": {"text_config": {"num_experts": 128}}}))
    new = remove._new_settings(tmp_path, settings, "num_experts", 127)
    assert new["thinker_config"]["text_config"]["num_experts"] == 127
