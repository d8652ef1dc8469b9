"""Every format gives the trained adapter's logits: reloaded, merged, merged on disk, PEFT's and the engines' layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from superexperts.adapters import export, lora, merge, per_expert
from superexperts.adapters.export import ExportConfig
from superexperts.adapters.factors import injected_keys
from superexperts.adapters.layer import ExpertLoraConfig, linears
from superexperts.core.errors import DataError, ModelError, OptionError, OutputError
from superexperts.models.banks import find_banks
from tests.adapters.test_lora import ALPHA, R, attach, chosen_experts, logits, randomise
from tests.support.families import FAMILIES, tiny_model, tiny_tokens
from tests.training.test_train import byte_tokenizer

ALL = sorted(FAMILIES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNNAMED_ON_DISK = {"granitemoe"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}
SCALING = ALPHA / R


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint as transformers alone loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def train_like(model: nn.Module, family: str) -> PeftModel:
    """Random A and B on three experts, a shared one where there is one, and the attention, in one adapter."""
    first = attach(model, chosen_experts(family, model))
    settings = first.peft_config["default"]
    first.unload()
    attention = [path for path in linears(model) if path.rpartition(".")[2] in ATTENTION]
    config = ExpertLoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=[*settings.experts, *settings.shared, *attention],
        experts=settings.experts,
        shared=settings.shared,
        task_type="CAUSAL_LM",
    )
    with lora.quiet():
        adapted = get_peft_model(model, config)
    randomise(adapted)
    return adapted.eval()


def save_base(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    tiny_model(family, dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(adapted: PeftModel, base: Path, folder: Path) -> Path:
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def engine_view(base: Path, adapter: Path, out: Path) -> Path:
    """The checkpoint as an engine sees it with the adapter on: each key's own weight plus alpha / r B A, by name."""
    fields = json.loads((adapter / "adapter_config.json").read_text())
    weights, changes = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for key, a in changes.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
            change = changes[key.replace("lora_A", "lora_B")] @ a * (fields["lora_alpha"] / fields["r"])
            if name not in weights:  # gpt_oss keeps experts in one tensor, transposed, gate and up row by row
                bank, expert, projection = name.removesuffix(".weight").rsplit(".", 2)
                part = weights[f"{bank}.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"][int(expert)]
                rows = {"gate_proj": part[:, 0::2], "up_proj": part[:, 1::2], "down_proj": part}[projection]
                rows.copy_((rows + change.T).to(rows.dtype))
                continue
            weights[name] = (weights[name] + change).to(weights[name].dtype)
    out.mkdir()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((base / "config.json").read_text())
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ALL)
def test_every_format_gives_the_trained_logits(family: str, dtype: str, tmp_path: Path) -> None:
    kind = DTYPES[dtype]
    base = save_base(tmp_path / "base", family, kind)
    adapted = train_like(stock(base, kind), family)
    adapter = save_adapter(adapted, base, tmp_path / "adapter")
    trained, plain = logits(adapted).float(), logits(stock(base, kind)).float()
    effect = (trained - plain).abs().mean()
    assert effect > 0.1

    def check(model: nn.Module) -> None:
        error = (logits(model).float() - trained).abs()
        if kind == torch.float32:
            assert error.max() <= 1e-5 * max(1, trained.abs().max())
        else:  # each way rounds the changed weights to bfloat16 elsewhere, and a router can choose another expert
            assert error.mean() <= 0.1 * effect

    def exported(layout: Any) -> Path:
        result = export.run(ExportConfig(adapter=adapter, format=layout, out=tmp_path / layout))
        assert result["model"] == str(base)
        return tmp_path / layout

    assert torch.equal(logits(lora.load_adapter(stock(base, kind), adapter)).float(), trained)
    merged = lora.load_adapter(stock(base, kind), adapter).merge_and_unload()
    check(merged)
    on_disk = stock(exported("merged"), kind)
    assert torch.equal(logits(on_disk), logits(merged))
    with lora.quiet():
        check(PeftModel.from_pretrained(stock(base, kind), str(exported("peft"))).eval())
    if family in UNNAMED_ON_DISK:
        with pytest.raises(OptionError, match="format: 'vllm' needs a name for each expert"):
            exported("vllm")
    else:
        check(stock(engine_view(base, exported("vllm"), tmp_path / "engine"), kind))


SCRIPT = """
import importlib.util, sys
from pathlib import Path
sys.path = [entry for entry in sys.path if not (Path(entry or ".") / "superexperts").is_dir()]
assert importlib.util.find_spec("superexperts") is None
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(model, str(folder / "peft")).eval()
    with torch.no_grad():
        answer = model(input_ids=load_file(folder / "given")["tokens"], use_cache=False).logits
    save_file({"logits": answer}, folder / "answered")
"""


def test_plain_peft_in_a_process_without_superexperts(tmp_path: Path) -> None:
    families = ("deepseek_v2", "qwen2_moe", "mixtral", "gpt_oss", "nemotron_h")
    expected = {}
    for family in families:
        folder = tmp_path / family
        base = save_base(folder / "base", family)
        adapted = train_like(stock(base), family)
        export.run(ExportConfig(adapter=save_adapter(adapted, base, folder / "a"), format="peft", out=folder / "peft"))
        expected[family] = logits(adapted)
        save_file({"tokens": tiny_tokens()}, folder / "given")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *(str(tmp_path / family) for family in families)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "ignored" not in done.stderr  # PEFT's word for settings that it does not apply
    for family in families:
        answered = load_file(tmp_path / family / "answered")["logits"]
        assert (answered - expected[family]).abs().max() <= 2e-5, family


# ---- what is in the files -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny DeepSeek-V2 and an adapter of it on L1E3 and L1shared; layer 2 is untouched."""
    base = save_base(tmp_path / "base", "deepseek_v2")
    adapted = attach(stock(base), [(1, 3), (1, "shared")])
    randomise(adapted)
    return base, save_adapter(adapted, base, tmp_path / "adapter")


def test_what_the_peft_layout_holds(saved: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = saved
    result = export.run(ExportConfig(adapter=adapter, format="peft", out=tmp_path / "out"))
    assert (result["experts"], result["keys"], result["r"]) == (["L1E3"], 10, 2 * R)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    bank = "base_model.model.model.layers.1.mlp.experts"
    shared = "base_model.model.model.layers.1.mlp.shared_experts"
    assert {name.rpartition(".lora_")[0] for name in tensors} == {
        bank,
        f"{bank}.base_layer",
        *(f"{shared}.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    }
    own = load_file(adapter / "adapter_model.safetensors")
    for key, inputs, outputs in ((bank, 24, 32), (f"{bank}.base_layer", 32, 48)):
        a = tensors[f"{key}.lora_A.weight"].reshape(8, 2 * R, inputs)
        b = tensors[f"{key}.lora_B.weight"].reshape(outputs, 2 * R, 8)
        others = [expert for expert in range(8) if expert != 3]
        assert not a[others].any()
        assert not b[:, :, others].any()
        if key == bank:
            assert torch.equal(b[:, :, 3] @ a[3], own[f"{bank}.lora_B.3_down_proj"] @ own[f"{bank}.lora_A.3_down_proj"])
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "experts" not in fields
    assert fields["lora_alpha"] / fields["r"] == SCALING
    assert fields["base_model_name_or_path"] == str(base)
    assert fields["target_modules"] == []  # PEFT takes `gate_proj` there for the routed experts', whatever its path
    assert sorted(fields["target_parameters"]) == [
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
        *(f"model.layers.1.mlp.shared_experts.{name}.weight" for name in ("down_proj", "gate_proj", "up_proj")),
    ]


def test_what_the_engines_layout_holds(saved: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = saved
    result = export.run(ExportConfig(adapter=adapter, format="vllm", out=tmp_path / "out"))
    assert (result["experts"], result["r"], result["max_lora_rank"]) == (["L1E3"], R, 8)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    names = ("gate_proj", "up_proj", "down_proj")
    layer = "base_model.model.model.layers.1.mlp"
    assert tensors.keys() == {
        f"{layer}.{module}.{name}.lora_{letter}.weight"
        for module in [*(f"experts.{expert}" for expert in range(8)), "shared_experts"]
        for name in names
        for letter in "AB"
    }
    assert {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name} == {R}
    changed = {name.split(".")[7] for name, tensor in tensors.items() if ".experts." in name and tensor.any()}
    assert changed == {"3"}
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], sorted(fields["target_modules"])) == (R, ALPHA, sorted(names))
    assert fields["use_rslora"] is False
    assert fields["rank_pattern"] == fields["alpha_pattern"] == {}
    stored = load_file(base / "model.safetensors")
    assert all(f"{name.removeprefix('base_model.model.').rpartition('.lora_')[0]}.weight" in stored for name in tensors)


def test_a_merged_checkpoint_is_a_standard_one(saved: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = saved
    result = export.run(ExportConfig(adapter=adapter, format="merged", out=tmp_path / "out"))
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert result["keys"] == len(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layer = "model.layers.1.mlp"
    assert changed == {
        f"{layer}.{module}.{name}_proj.weight"
        for module in ("experts.3", "shared_experts")
        for name in ("gate", "up", "down")
    }
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_folder_of_train_is_an_adapter_too_and_done_work_is_not_done_again(
    saved: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = saved
    (tmp_path / "run").mkdir()
    adapter.rename(tmp_path / "run" / "adapter")
    settings = ExportConfig(adapter=tmp_path / "run", format="vllm", out=tmp_path / "out")
    first = export.run(settings)
    monkeypatch.setattr(per_expert, "write", None)
    assert export.run(settings) == first


@pytest.mark.parametrize(
    ("family", "bank"), [("deepseek_v2", "gate_up_proj"), ("gpt_oss", "gate_up_proj"), ("nemotron_h", "up_proj")]
)
def test_keys_and_shapes_are_those_that_peft_gives(family: str, bank: str) -> None:
    model = tiny_model(family)
    path = find_banks(model)[0].path
    config = LoraConfig(r=2, target_modules=[], target_parameters=[f"{path}.{bank}", f"{path}.down_proj"])
    found = injected_keys(model, config)
    assert len(found) == 4
    assert found[f"base_model.model.{path}.base_layer.lora_A.weight"] == (2 * find_banks(model)[0].num_experts, 32)
    assert find_banks(model)[0].path == path  # the wrappers, one inside the other, are off again
    assert logits(model).isfinite().all()


# ---- what is refused ----------------------------------------------------------------------------------------------


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def without(folder: Path, part: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if part not in name}, file)


def renamed(folder: Path, old: str, new: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize("layout", ["peft", "vllm"])
@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda f: edit(f, experts={"model.layers.1.mlp.experts": [8]}), ModelError, "expert 8 .* 0..7 here"),
        (lambda f: edit(f, experts={"model.layers.0.mlp.experts": [3]}), ModelError, "experts at 'model.layers.0"),
        (lambda f: edit(f, r=R + 1), DataError, "did not load"),
        (lambda f: without(f, "lora_B.3_up_proj"), DataError, r"1 weights of .* are missing \(.*3_up_proj"),
        (lambda f: renamed(f, "3_up_proj", "4_up_proj"), DataError, "2 weights of .* are missing"),
        (lambda f: without(f, "shared_experts.up_proj"), DataError, "2 weights of .* are missing"),
        (lambda f: edit(f, use_dora=True), DataError, "more than A and B"),
        (lambda f: edit(f, base_model_name_or_path=None), OptionError, "model: .* does not name its base model"),
        (lambda f: edit(f, base_model_name_or_path="nowhere"), ModelError, "nowhere"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_written(
    saved: tuple[Path, Path], tmp_path: Path, layout: Any, damage: Any, error: type[Exception], words: str
) -> None:
    _, adapter = saved
    damage(adapter)
    with pytest.raises(error, match=words) as caught:
        export.run(ExportConfig(adapter=adapter, format=layout, out=tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_base_must_be_the_adapters_own(saved: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = saved
    other = save_base(tmp_path / "other", "mixtral")
    with pytest.raises(ModelError, match="has experts 0..3 here|which this model does not have"):
        export.run(ExportConfig(adapter=adapter, format="vllm", model=str(other), out=tmp_path / "out"))
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.experts.5.up_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"holds no weight model.layers.1.mlp.experts.5.up_proj"):
        export.run(ExportConfig(adapter=adapter, format="vllm", out=tmp_path / "out"))


def test_a_broken_adapter_loads_no_model(
    saved: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = saved
    monkeypatch.setattr(merge, "merge_in_memory", None)
    edit(adapter, experts={"model.layers.1.mlp.experts": [8]})
    with pytest.raises(ModelError, match=r"expert 8 .* 0\.\.7 here"):
        export.run(ExportConfig(adapter=adapter, format="merged", out=tmp_path / "out"))
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    for layout in ("merged", "peft", "vllm"):
        with pytest.raises(DataError, match="cannot be read"):
            export.run(ExportConfig(adapter=adapter, format=layout, out=tmp_path / "out"))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_merge_that_is_not_finite_is_refused(saved: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = saved
    file = adapter / "adapter_model.safetensors"
    save_file({name: torch.full_like(tensor, 1e30) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(DataError, match="not finite"):
        export.run(ExportConfig(adapter=adapter, format="merged", out=tmp_path / "out"))


def test_what_an_engine_does_with_ranks_and_with_latent_attention(
    saved: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, _ = saved

    def exported(name: str, **what: Any) -> dict[str, Any]:
        adapted = lora.attach(stock(base), alpha=4, dropout=0.0, seed=0, **what)
        randomise(adapted)
        adapter = save_adapter(adapted, base, tmp_path / name)
        return export.run(ExportConfig(adapter=adapter, format="vllm", out=tmp_path / f"{name} for vllm"))

    assert exported("nine", experts=[(1, 3)], r=9)["max_lora_rank"] == 16
    assert "kv_b_proj" not in capsys.readouterr().err
    with pytest.raises(OptionError, match="format: 'vllm' has ranks up to 512, not 513; use merged"):
        exported("many", experts=[(1, 3)], r=513)
    assert exported("latent", target=r".*\.kv_b_proj", r=2)["max_lora_rank"] == 8
    assert "vLLM drops LoRA on kv_b_proj unless it runs with VLLM_MLA_DISABLE=1" in " ".join(
        capsys.readouterr().err.split()
    )


def test_nothing_of_the_users_is_written_over(saved: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = saved
    for out in (base, adapter):
        with pytest.raises(OutputError, match="out"):
            export.run(ExportConfig(adapter=adapter, format="merged", out=out))


def test_a_foreign_layout_is_imported_first(saved: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = saved
    for layout in ("peft", "vllm"):
        export.run(ExportConfig(adapter=adapter, format=layout, out=tmp_path / layout))
    with pytest.raises(DataError, match="import it first"):
        export.run(ExportConfig(adapter=tmp_path / "peft", format="vllm", out=tmp_path / "out"))
    with pytest.raises(DataError, match="layout of experts .*; import it first"):
        lora.load_adapter(tiny_model("deepseek_v2"), tmp_path / "vllm")


def test_ranks_and_scalings_that_differ_become_one(saved: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = saved
    path = "model.layers.1.self_attn.o_proj"
    config = LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=[path, "model.layers.2.self_attn.q_proj"],
        rank_pattern={path: 3 * R},
        alpha_pattern={path: 5},
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    with lora.quiet():
        adapted = get_peft_model(stock(base), config)
    randomise(adapted)
    trained: Tensor = logits(adapted.eval())
    adapter = save_adapter(adapted, base, tmp_path / "attention")
    result = export.run(ExportConfig(adapter=adapter, format="vllm", out=tmp_path / "vllm"))
    assert result["r"] == 3 * R
    assert (logits(stock(engine_view(base, tmp_path / "vllm", tmp_path / "engine"))) - trained).abs().max() <= 2e-5
    export.run(ExportConfig(adapter=adapter, format="peft", out=tmp_path / "peft"))
    with lora.quiet():
        loaded = PeftModel.from_pretrained(stock(base), str(tmp_path / "peft")).eval()
    assert (logits(loaded) - trained).abs().max() <= 2e-5
