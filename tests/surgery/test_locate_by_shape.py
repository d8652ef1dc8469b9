"""Experts found from headers and config.json alone are those of the model's structure, or none are found."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from superexperts.checkpoints.reader import Checkpoint, Entry
from superexperts.checkpoints.source import resolve
from superexperts.checkpoints.writer import RECORD
from superexperts.core.errors import ExpertsError, ModelError
from superexperts.models.banks import expert_keys, find_banks
from superexperts.models.loading import load_structure
from superexperts.surgery import locate, locate_by_shape, prune, restore
from superexperts.surgery.prune import PruneConfig
from superexperts.surgery.restore import RestoreConfig
from tests.support.families import FAMILIES, MORE_FAMILIES, tiny_model
from tests.surgery.test_surgery import contents

ORDINARY = {
    "afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo",
    "glm4_moe", "glm4_moe_lite", "hunyuan_v1_moe", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
}  # fmt: skip
"""Families of which no structure is needed. The others have banks that are fused on disk (gpt_oss, granitemoe,
granitemoeshared), experts without a gate (nemotron_h), layers of several kinds (jamba, lfm2_moe, qwen3_next), or
are not a separate family (gemma4_text)."""


@pytest.mark.parametrize("family", sorted(FAMILIES | MORE_FAMILIES))
def test_shapes_give_the_same_answer_as_the_structure(family: str, tmp_path: Path) -> None:
    tiny_model(family, torch.bfloat16).save_pretrained(tmp_path, max_shard_size="30KB")  # type: ignore[operator]
    banks = find_banks(load_structure(resolve(str(tmp_path))))
    keys = [key for key in expert_keys(banks) if key[1] != "shared"]
    with Checkpoint(tmp_path) as base:
        found = locate_by_shape.locate_by_shape(base, keys)
        assert (found is not None) == (family in ORDINARY)
        if found is not None:
            assert found == locate.locate(load_structure(resolve(str(tmp_path))), base, keys, values_matter=False)
            assert locate_by_shape.locate_by_shape(base, [(banks[0].layer, banks[0].num_experts)]) is None
            assert locate_by_shape.locate_by_shape(base, [(banks[0].layer, "shared")]) is None
            assert locate_by_shape.locate_by_shape(base, [(banks[-1].layer + 1, 0)]) is None


class Tensors(dict[str, Entry]):
    """As much of a checkpoint as `locate` asks for."""

    field = "model"


LOADED = """
import json, sys
from superexperts.cli import main
code = main(sys.argv[1:])
print(json.dumps([name for name in ("transformers", "torch", "numpy", "huggingface_hub") if name in sys.modules]))
sys.exit(code)
"""


def loaded_by(*command: str) -> list[str]:
    """Heavy packages that a command has imported when it is done."""
    done = subprocess.run([sys.executable, "-c", LOADED, *command], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_an_ordinary_checkpoint_is_pruned_and_restored_without_torch_and_transformers(tmp_path: Path) -> None:
    tiny_model("deepseek_v2", torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="30KB")  # type: ignore[operator]
    out, experts = tmp_path / "out", "--experts=L1E3,L2E0"
    assert loaded_by("prune", str(tmp_path / "base"), experts, f"--out={out}") == []
    assert loaded_by("restore", str(out), f"--out={tmp_path / 'restored'}") == []
    less = ("--mode=remove", f"--out={tmp_path / 'less'}")
    assert "transformers" in loaded_by("prune", str(tmp_path / "base"), experts, *less)


def test_both_ways_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("qwen2_moe", torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="30KB")  # type: ignore[operator]
    written = []
    for name, change in (("headers", {}), ("structure", {"locate_by_shape": lambda *_: None}), ("trusting", {})):
        for attribute, value in change.items():
            monkeypatch.setattr(prune, attribute, value)
        trust = name == "trusting"  # a checkpoint's own code may read keys as it likes
        out = tmp_path / "out" / name
        prune.run(PruneConfig(model=str(tmp_path / "base"), experts="L1E3,L0E7", out=out, trust_remote_code=trust))
        files = {file: sha for file, (sha, *_) in contents(out).items() if file != "manifest.json"}
        assert RECORD in files
        written.append(files)
    assert written[0] == written[1] == written[2]
    restore.run(RestoreConfig(folder=tmp_path / "out" / "headers", out=tmp_path / "restored"))
    before, after = ({f: sha for f, (sha, *_) in contents(tmp_path / name).items()} for name in ("base", "restored"))
    assert before == {file: sha for file, sha in after.items() if file != "manifest.json"}


# ---- what is not ordinary -----------------------------------------------------------------------------------------

Entries = dict[str, Entry]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a few families with two or three layers."""
    found = {}
    for family, layers in (("deepseek_v2", 3), ("qwen2_moe", 2), ("mixtral", 2), ("olmoe", 2)):
        found[family] = tmp_path_factory.mktemp("plain") / family
        tiny_model(family, torch.bfloat16, num_hidden_layers=layers).save_pretrained(found[family])  # type: ignore[operator]
    return found


def said(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return value


def entries_of(folder: Path) -> Entries:
    with Checkpoint(folder) as checkpoint:
        return dict(checkpoint)


def renamed(entries: Entries, old: str, new: str) -> Entries:
    """Every key that matches a pattern gets another name."""
    names = {key: re.sub(old, new, key) for key in entries}
    assert any(key != name for key, name in names.items()), old
    return {name: dataclasses.replace(entries[key], key=name) for key, name in names.items()}


def without(entries: Entries, pattern: str) -> Entries:
    left = {key: entry for key, entry in entries.items() if not re.search(pattern, key)}
    assert len(left) < len(entries), pattern
    return left


def reshaped(entries: Entries, pattern: str, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Entries:
    hits = [key for key in entries if re.search(pattern, key)]
    assert hits, pattern
    return entries | {key: dataclasses.replace(entries[key], shape=change(entries[key].shape)) for key in hits}


def of_kind(entries: Entries, pattern: str, kind: str) -> Entries:
    hits = [key for key in entries if re.search(pattern, key)]
    assert hits, pattern
    return entries | {key: dataclasses.replace(entries[key], kind=kind) for key in hits}


def more(entries: Entries, key: str, like: str) -> Entries:
    return {**entries, key: dataclasses.replace(entries[like], key=key)}


def other(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    return tuple(n - 1 if n == size else n for n in shape)


DOWN, GATE = "model.layers.1.mlp.experts.0.down_proj.weight", "model.layers.1.mlp.gate.weight"
CHANGED_KEYS: dict[str, Callable[[Entries], Entries]] = {
    "nothing at all": lambda e: {},
    "no list": lambda e: {key: entry for key, entry in e.items() if "layers" not in key},
    "a layer too few": lambda e: without(e, r"layers\.2\."),
    "a layer too many": lambda e: more(e, "model.layers.3.mlp.gate.weight", GATE),
    "a number left out": lambda e: renamed(e, r"layers\.2\.", "layers.3."),
    "a number with a zero in front": lambda e: renamed(e, r"layers\.2\.", "layers.02."),
    "a number without end": lambda e: renamed(e, r"layers\.2\.", f"layers.{'2' * 5000}."),
    "a second decoder": lambda e: more(e, "vision.layers.0.mlp.gate.weight", GATE),
    "an expert too few": lambda e: without(e, r"layers\.1\.mlp\.experts\.7\."),
    "an expert too many": lambda e: renamed(e, r"layers\.1\.mlp\.experts\.7\.", "layers.1.mlp.experts.8."),
    "a matrix missing": lambda e: without(e, r"layers\.1\.mlp\.experts\.3\.up_proj"),
    "a matrix missing everywhere": lambda e: without(e, r"experts\.\d\.up_proj"),
    "a bias": lambda e: more(e, DOWN.replace("weight", "bias"), "model.norm.weight"),
    "a second list": lambda e: more(e, "model.layers.1.mlp.others.0.down_proj.weight", DOWN),
    "lists of other names": lambda e: renamed(e, r"layers\.1\.mlp\.experts", "layers.1.mlp.specialists"),
    "experts outside of a block": lambda e: renamed(e, r"mlp\.experts\.", "experts."),
    "a router missing": lambda e: without(e, r"layers\.1\.mlp\.gate\.weight"),
    "all routers missing": lambda e: without(e, r"mlp\.gate\.weight"),
    "attention missing in a layer": lambda e: without(e, r"layers\.1\.self_attn\.o_proj"),
    "attention missing in the dense layer": lambda e: without(e, r"layers\.0\.self_attn\.o_proj"),
    "a norm too many": lambda e: more(e, "model.layers.2.norm.weight", "model.norm.weight"),
    "a dense layer without a gate": lambda e: without(e, r"layers\.0\.mlp\.gate_proj"),
    "a dense layer with another matrix": lambda e: renamed(e, r"layers\.0\.mlp\.up_proj", "layers.0.mlp.more"),
    "a dense layer of another size": lambda e: reshaped(e, r"layers\.0\.mlp\.", lambda s: other(s, 48)),
    "transposed experts": lambda e: reshaped(e, r"mlp\.experts\.", lambda s: s[::-1]),
    "transposed down_proj": lambda e: reshaped(e, r"experts\.\d+\.down_proj", lambda s: s[::-1]),
    "one expert transposed": lambda e: reshaped(e, r"layers\.2\.mlp\.experts\.1\.", lambda s: s[::-1]),
    "square experts": lambda e: reshaped(e, r"mlp\.experts\.", lambda s: (32, 32)),
    "experts of another size": lambda e: reshaped(e, r"mlp\.experts\.", lambda s: other(s, 24)),
    "experts of three dimensions": lambda e: reshaped(e, r"mlp\.experts\.", lambda s: (1, *s)),
    "packed experts": lambda e: of_kind(e, r"mlp\.experts\.", "U8"),
    "experts of two kinds": lambda e: of_kind(e, r"experts\.\d\.down_proj", "F32"),
    "one layer of another kind": lambda e: of_kind(e, r"layers\.2\.mlp\.experts\.", "F32"),
    "no embedding": lambda e: without(e, "embed_tokens"),
    "no norm at the end": lambda e: without(e, r"^model\.norm"),
    "no head": lambda e: without(e, "lm_head"),
    "a second head": lambda e: more(e, "second_head.weight", "lm_head.weight"),
    "another vocabulary": lambda e: reshaped(e, "embed_tokens", lambda s: (s[0] + 1, s[1])),
    "a tensor beside": lambda e: more(e, "model.rotary.inv_freq", "model.norm.weight"),
    "no stem": lambda e: renamed(e, r"^model\.", ""),
}  # fmt: skip
CHANGED_SETTINGS: dict[str, Any] = {
    **{f"hidden size {value!r}": {"hidden_size": value} for value in ("a", None, 0, -1, 31, 32.0, True, [32], 2**70)},
    **{f"layers {value!r}": {"num_hidden_layers": value} for value in ("3", None, 0, -3, 4, 2, 10**9)},
    **{f"experts {value!r}": {"n_routed_experts": value} for value in ("8", None, 7, 8.0, [8])},
    "sizes of experts": {"moe_intermediate_size": 25},
    "sizes of dense layers": {"intermediate_size": 40},
    "the vocabulary's size": {"vocab_size": 98},
    "heads that are not a number": {"num_attention_heads": "four"},
    "heads below nothing": {"num_attention_heads": -4},
    "rank that is not a number": {"kv_lora_rank": 1.5},
    "quantization": {"quantization_config": {"quant_method": "fp8"}},
    "compression": {"compression_config": {}},
    "a model of several parts": {"text_config": {"hidden_size": 32}},
}


@pytest.mark.parametrize("what", CHANGED_KEYS)
def test_other_keys_are_left_to_the_structure(what: str, folders: dict[str, Path]) -> None:
    entries, own = entries_of(folders["deepseek_v2"]), said(folders["deepseek_v2"])
    assert locate_by_shape.down_projections(entries, own) is not None
    assert locate_by_shape.down_projections(CHANGED_KEYS[what](entries), own) is None


@pytest.mark.parametrize("what", CHANGED_SETTINGS)
def test_other_settings_are_left_to_the_structure(what: str, folders: dict[str, Path]) -> None:
    entries, own = entries_of(folders["deepseek_v2"]), said(folders["deepseek_v2"])
    assert locate_by_shape.down_projections(entries, {**own, **CHANGED_SETTINGS[what]}) is None


@pytest.mark.parametrize("value", [None, 3, "x", [], [["hidden_size", 32]], {}])
def test_settings_of_another_kind_are_left_to_the_structure(value: Any, folders: dict[str, Path]) -> None:
    assert locate_by_shape.down_projections(entries_of(folders["deepseek_v2"]), value) is None


def test_a_tied_head_may_be_missing_where_the_settings_say_so(folders: dict[str, Path]) -> None:
    entries, own = entries_of(folders["olmoe"]), said(folders["olmoe"])
    headless = without(entries, "lm_head")
    assert locate_by_shape.down_projections(headless, {**own, "tie_word_embeddings": "yes"}) is None
    assert (
        locate_by_shape.down_projections(headless, {**own, "tie_word_embeddings": True})
        == locate_by_shape.down_projections(entries, own)
        is not None
    )


@pytest.mark.parametrize("pattern", ["self_attn", "q_proj", "lm_head", "layers", "experts", "weight$"])
@pytest.mark.parametrize("word", ["base_layer", "lora_A", "q_porj", "", "qweight", "x y", "\n"])
def test_words_that_the_family_does_not_have_are_left_to_the_structure(
    word: str, pattern: str, folders: dict[str, Path]
) -> None:
    entries, own = entries_of(folders["deepseek_v2"]), said(folders["deepseek_v2"])
    assert locate_by_shape._are_known(entries, own)
    assert not locate_by_shape._are_known(renamed(entries, pattern, word), own)


@pytest.mark.parametrize(
    "family",
    ["llama", "nothing", "../olmoe", "olmoe/../mixtral", "", "OLMOE", None, 3, ["olmoe"], "auto", "gemma4_text"],
)
def test_families_without_banks_are_left_to_the_structure(
    family: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["olmoe"], tmp_path / "base")
    with Checkpoint(tmp_path / "base") as base:
        assert locate_by_shape.locate_by_shape(base, [(1, 2)]) is not None
        (tmp_path / "base" / "config.json").write_text(json.dumps({**said(folders["olmoe"]), "model_type": family}))
        assert locate_by_shape.locate_by_shape(base, [(1, 2)]) is None


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[1]", "null", "1" * 5000, "\udcff"])
def test_a_config_that_cannot_be_read_is_left_to_the_structure(
    text: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["olmoe"], tmp_path / "base")
    (tmp_path / "base" / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with Checkpoint(tmp_path / "base") as base:
        assert locate_by_shape.locate_by_shape(base, [(1, 2)]) is None


# ---- whatever is there --------------------------------------------------------------------------------------------

VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    4,
    8,
    24,
    32,
    48,
    97,
    2.5,
    float("nan"),
    2**70,
    "2",
    [],
    [8],
    {},
    {"hidden_size": 32},
]
PATTERNS = [
    r"layers\.1\.", r"layers\.0\.", r"experts\.0\.", r"experts\.\d\.", r"\.weight", "down_proj|w2", "gate_proj|w1",
    "embed_tokens", r"model\.norm", "lm_head", "mlp|block_sparse_moe", "self_attn", r"layers", "shared_experts?",
    r"mlp\.gate\.|block_sparse_moe\.gate",
]  # fmt: skip
NAMES = [
    "", "x", "0.", "1.", "2.", "layers.1.", "experts.0.", "experts.8.", ".bias", "down_proj", "up_proj", "w3", "mlp",
    "self_attn", "gate.", "model.x", "lm_head", "norm", "model.norm",
]  # fmt: skip
SHAPES: list[Callable[[tuple[int, ...]], tuple[int, ...]]] = [
    lambda s: s[::-1], lambda s: s[:1], lambda s: (*s, 1), lambda s: (), lambda s: (0, *s[1:]), lambda s: (32, 24),
    lambda s: (24, 32), lambda s: tuple(n // 2 for n in s),
]  # fmt: skip


@settings(
    max_examples=300, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_headers_tell_the_structure_tells_as_well(
    data: st.DataObject, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Keys renamed, left out and made up, other shapes and settings, one or several at a time, in all layers or one."""
    family = data.draw(st.sampled_from(sorted(folders)))
    entries, own = entries_of(folders[family]), said(folders[family])
    for _ in range(data.draw(st.integers(1, 2))):
        pattern = data.draw(st.sampled_from(PATTERNS))
        hits = [key for key in entries if re.search(pattern, key)]
        assume(hits)
        if data.draw(st.booleans()):
            hits = [data.draw(st.sampled_from(hits))]
        change = data.draw(st.sampled_from(["name", "copy", "drop", "shape", "kind", "setting"]))
        if change in ("name", "copy"):
            new = data.draw(st.sampled_from(NAMES))
            made = {(name := re.sub(pattern, new, key)): dataclasses.replace(entries[key], key=name) for key in hits}
            entries = {k: v for k, v in entries.items() if change == "copy" or k not in hits} | made
        elif change == "drop":
            entries = {key: entry for key, entry in entries.items() if key not in hits}
        elif change == "shape":
            turned = data.draw(st.sampled_from(SHAPES))
            entries |= {key: dataclasses.replace(entries[key], shape=turned(entries[key].shape)) for key in hits}
        elif change == "kind":
            kind = data.draw(st.sampled_from(["F32", "U8", "F8_E4M3"]))
            entries |= {key: dataclasses.replace(entries[key], kind=kind) for key in hits}
        else:
            own[data.draw(st.sampled_from([*own, "quantization_config"]))] = data.draw(st.sampled_from(VALUES))
    found = locate_by_shape.down_projections(entries, own) if locate_by_shape._are_known(entries, own) else None
    if found is None:
        return
    folder = tmp_path / family
    shutil.copytree(folders[family], folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(own))
    try:
        structure = load_structure(resolve(str(folder)))
        base: Any = Tensors(entries)
        slow = locate.locate(structure, base, list(found), values_matter=False)
    except (ModelError, ExpertsError):
        return
    assert slow is not None
    assert {down.expert: down.weight for down in slow} == found
    assert all(down.bias is None for down in slow)
