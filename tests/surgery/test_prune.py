"""A pruned checkpoint: the stock model with those matrices at zero and not a bit else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from superexperts.checkpoints.source import resolve
from superexperts.core.errors import ExpertsError, ModelError, OutputError
from superexperts.models.banks import find_banks
from superexperts.models.hooks import silenced
from superexperts.models.loading import load_tokenizer
from superexperts.pocket import PLANTED, checkpoint_dir
from superexperts.surgery import prune
from superexperts.surgery.prune import PruneConfig
from tests.support.families import FAMILIES, tiny_model


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model: Any = tiny_model(family, dtype=dtype)
    model.save_pretrained(folder)
    load_tokenizer(resolve("pocket")).save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_checkpoint_equals_silence_and_changes_nothing_else(family: str, tmp_path: Path) -> None:
    model = save(family, tmp_path / "base", torch.bfloat16)
    bank = find_banks(model)[-1]
    prune.run(PruneConfig(model=str(tmp_path / "base"), experts=f"L{bank.layer}E2", out=tmp_path / "pruned"))
    before, after = load_file(tmp_path / "base/model.safetensors"), load_file(tmp_path / "pruned/model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(f".{bank.layer}." in name for name in changed)
    assert 1 <= len(changed) <= 2  # the matrix, and its bias where there is one
    for name in changed:
        assert after[name].dtype == before[name].dtype
        differs = (before[name] != after[name]).flatten(1 if before[name].ndim == 3 else 0)
        if before[name].ndim == 3:  # a fused bank: only row 2 of it
            assert differs.any(1).nonzero().flatten().tolist() == [2]
            assert not after[name][2].any()
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.bfloat16).eval()
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).eval()
    ids_BL = torch.randint(3, 90, (2, 9))
    with torch.no_grad(), silenced(base, [(bank.layer, 2)]):
        assert torch.equal(loaded(ids_BL).logits, base(ids_BL).logits)


def test_command_writes_an_ordinary_folder_and_does_not_work_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = PruneConfig(experts="L1E11,L3E54", out=tmp_path / "pruned")
    assert prune.run(settings)["pruned"] == ["L1E11", "L3E54"]
    names = {file.name for file in (tmp_path / "pruned").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "manifest.json"}
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "pruned"), AutoTokenizer.from_pretrained(checkpoint_dir())
    assert ours("Một, hai.").input_ids == theirs("Một, hai.").input_ids
    weights = load_file(tmp_path / "pruned/model.safetensors")
    base = load_file(checkpoint_dir() / "model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], weights[name])}
    assert changed == {f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight" for layer, expert in PLANTED}
    prune.run(settings)
    assert "up to date" in capsys.readouterr().err


def test_what_is_wrong_is_named_and_nothing_is_left_behind(tmp_path: Path) -> None:
    with pytest.raises(ExpertsError, match="L1E999 is not in the model"):
        prune.run(PruneConfig(experts="L1E999", out=tmp_path / "pruned"))
    with pytest.raises(ModelError, match="nowhere"):
        prune.run(PruneConfig(model=str(tmp_path / "nowhere"), experts="L1E1", out=tmp_path / "pruned"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(OutputError, match="was not made by `prune`"):
        prune.run(PruneConfig(experts="L1E1", out=tmp_path / "mine"))
    assert {file.name for file in tmp_path.iterdir()} == {"mine"}
