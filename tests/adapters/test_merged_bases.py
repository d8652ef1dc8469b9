"""Merging into bases that cannot be edited in place, what is read back, and exports by the names on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from superexperts.adapters import export, import_, lora, merge_loaded
from superexperts.adapters.export import ExportConfig
from superexperts.adapters.files import order_config
from superexperts.adapters.import_ import ImportConfig
from superexperts.core.errors import DataError, ModelError
from superexperts.models.banks import find_banks
from tests.adapters.test_export import engine_view, save_adapter, save_base, stock, train_like
from tests.adapters.test_lora import logits, randomise
from tests.profiling.test_streamed import quantize
from tests.support.families import tiny_model
from tests.training.test_train import byte_tokenizer


def mxfp4(plain: Path, quantized: Path, **sizes: int) -> None:
    """gpt_oss with its experts in MXFP4, and the ordinary numbers that these stand for."""
    tiny_model("gpt_oss", torch.bfloat16, intermediate_size=32, **sizes).save_pretrained(quantized)
    weights, generator = load_file(quantized / "model.safetensors"), torch.Generator().manual_seed(0)
    meant = dict(weights)
    for key in [key for key in weights if key.endswith("_proj") and ".experts." in key]:
        count, inputs, outputs = weights.pop(key).shape
        shape = (count, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 124, shape, dtype=torch.uint8, generator=generator)
        weights |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        meant[key] = convert_moe_packed_tensors(blocks, scales).contiguous()
    tiny_model("gpt_oss", torch.bfloat16, intermediate_size=32, **sizes).save_pretrained(plain)
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(weights, quantized / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "mxfp4"}}))


def float8(plain: Path, quantized: Path, **sizes: int) -> None:
    """Qwen3-MoE with float8 projections, and the ordinary numbers that these stand for."""
    for folder in (plain, quantized):
        tiny_model("qwen3_moe", torch.bfloat16, **sizes).save_pretrained(folder)
    meant = quantize(quantized, (128, 128))
    save_file(load_file(plain / "model.safetensors") | meant, plain / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("family", "make"), [("gpt_oss", mxfp4), ("qwen3_moe", float8)])
def test_a_quantized_base_is_merged_as_the_numbers_that_it_stands_for(family: str, make: Any, tmp_path: Path) -> None:
    make(tmp_path / "plain", tmp_path / "base")
    for name in ("plain", "base"):
        byte_tokenizer().save_pretrained(tmp_path / name)
    adapted = train_like(stock(tmp_path / "plain"), family)
    adapter = save_adapter(adapted, tmp_path / "base", tmp_path / "adapter")
    export.run(ExportConfig(adapter=adapter, format="merged", out=tmp_path / "merged"))
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    export.run(
        ExportConfig(adapter=adapter, format="merged", model=str(tmp_path / "plain"), out=tmp_path / "of the plain")
    )
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "of the plain"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].float(), expected[key].float()) for key in found)
    error = (logits(stock(tmp_path / "merged")) - logits(adapted)).abs().mean()
    assert error < 0.1 * (logits(stock(tmp_path / "plain")) - logits(adapted)).abs().mean()


def test_other_quantizations_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen3_moe")
    adapter = save_adapter(train_like(stock(base), "qwen3_moe"), base, tmp_path / "adapter")
    settings = json.loads((base / "config.json").read_text())
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (base / "config.json").write_text(json.dumps(settings | {"quantization_config": said}))
    with pytest.raises(ModelError, match="is quantized by gptq, which cannot be undone here"):
        export.run(ExportConfig(adapter=adapter, format="merged", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ---- reading back --------------------------------------------------------------------------------------------------


@pytest.fixture
def tied_head(tmp_path: Path) -> Path:
    """LoRA on an output head that is tied to the embeddings."""
    tiny_model("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with lora.quiet():
        adapted = get_peft_model(stock(tmp_path / "base"), config)
    randomise(adapted)
    return save_adapter(adapted, tmp_path / "base", tmp_path / "adapter")


def test_a_merge_with_other_logits_is_refused_and_removed(
    tied_head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happened before weights were untied: the input embeddings changed with the head."""
    monkeypatch.setattr(merge_loaded, "_untie", lambda adapted: {})
    with pytest.raises(DataError, match="cannot be merged: the logits of what was written are .* from the adapter's"):
        export.run(ExportConfig(adapter=tied_head, format="merged", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_untied_weights_are_said_to_be(tied_head: Path, tmp_path: Path) -> None:
    result = export.run(ExportConfig(adapter=tied_head, format="merged", out=tmp_path / "out"))
    assert result["logit_error"] < 1e-5 < result["logit_effect"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    weights = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert torch.equal(weights["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])


def test_a_model_that_does_not_fit_in_memory_is_not_compared(
    tied_head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("superexperts.adapters.readback.fits_in_memory", lambda *_: False)
    result = export.run(ExportConfig(adapter=tied_head, format="merged", out=tmp_path / "out"))
    assert "logit_error" not in result
    assert "the logits were not compared" in capsys.readouterr().err


# ---- names on disk -------------------------------------------------------------------------------------------------


def test_experts_in_one_tensor_on_disk_are_exported_for_engines(tmp_path: Path) -> None:
    """Mixtral as other programs write it; engines still know its experts by the family's names."""
    base = save_base(tmp_path / "base", "mixtral")
    adapted = train_like(stock(base), "mixtral")
    adapter = save_adapter(adapted, base, tmp_path / "adapter")
    weights = load_file(base / "model.safetensors")
    fused = {name: p.detach().clone() for name, p in stock(base).named_parameters() if ".experts." in name}
    rest = {key: tensor for key, tensor in weights.items() if ".experts." not in key}
    on_disk = tmp_path / "on disk"
    on_disk.mkdir()
    for file in base.iterdir():
        if file.suffix == ".json":
            (on_disk / file.name).write_bytes(file.read_bytes())
    save_file(rest | fused, on_disk / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(stock(on_disk)), logits(stock(base)))
    result = export.run(ExportConfig(adapter=adapter, format="vllm", model=str(on_disk), out=tmp_path / "out"))
    assert "mixed_layouts" not in result
    engine = stock(engine_view(base, tmp_path / "out", tmp_path / "engine"))
    assert (logits(engine) - logits(adapted)).abs().max() <= 2e-5


def test_a_model_inside_a_larger_one_is_named_as_on_disk(tmp_path: Path) -> None:
    """Qwen3.5-MoE: its checkpoints hold the text model under `model.language_model`."""
    text = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 4,
        "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    whole = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(text_config=text, vision_config=vision)).eval()
    whole.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=2, lora_alpha=8, target_modules=r"model\.language_model\..*\.(q_proj|o_proj)", task_type="CAUSAL_LM",
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    with lora.quiet():
        adapted = get_peft_model(whole, config).eval()
    randomise(adapted)
    adapter = save_adapter(adapted, tmp_path / "base", tmp_path / "adapter")
    import_.run(ImportConfig(adapter=adapter, model=str(tmp_path / "base"), out=tmp_path / "own"))
    own = lora.load_adapter(stock(tmp_path / "base"), tmp_path / "own" / "adapter")
    assert (logits(own) - logits(adapted)).abs().max() <= 2e-5
    export.run(ExportConfig(adapter=tmp_path / "own", format="vllm", out=tmp_path / "out"))
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.model.language_model.layers.") for key in keys)
    engine = engine_view(tmp_path / "base", tmp_path / "out", tmp_path / "engine")
    assert (logits(stock(engine)) - logits(adapted)).abs().max() <= 2e-5


def test_numbered_experts_of_gpt_oss(tmp_path: Path) -> None:
    """Unsloth's names for them: `gate_up_projs.3`, gate and up row by row as in the model."""
    base = save_base(tmp_path / "base", "gpt_oss")
    bank = find_banks(tiny_model("gpt_oss"))[-1]
    tensors: dict[str, Tensor] = {}
    model = stock(base)
    experts: Any = model.get_submodule(bank.path)
    generator = torch.Generator().manual_seed(0)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name)  # [E, I, O]
        for expert in (1, 3):
            a = torch.randn(2, weight.shape[1], generator=generator) * 0.3
            b = torch.randn(weight.shape[2], 2, generator=generator) * 0.3
            key = f"base_model.model.{bank.path}.{name}s.{expert}"
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            weight.data[expert] += 4.0 * (b @ a).T
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["gate_up_projs", "down_projs"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    result = import_.run(ImportConfig(adapter=tmp_path / "adapter", model=str(base), out=tmp_path / "out"))
    assert (result["layout"], len(result["experts"])) == ("stacked", 2)
    loaded = lora.load_adapter(stock(base), tmp_path / "out" / "adapter")
    assert (logits(loaded) - logits(model)).abs().max() <= 2e-5


def test_mlx_lm_names_mixtral_as_its_checkpoints_do(tmp_path: Path) -> None:
    """`block_sparse_moe`, its router among them, and A of the experts in two dimensions, as it once was."""
    base = save_base(tmp_path / "base", "mixtral")
    model = stock(base)
    bank = find_banks(model)[1]
    experts: Any = bank.module
    count, inner = bank.num_experts, experts.down_proj.shape[2]
    block = f"model.layers.{bank.layer}.block_sparse_moe"
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, inputs, outputs in (("gate_proj", 32, inner), ("up_proj", 32, inner), ("down_proj", inner, 32)):
        a = torch.randn(count, 2, inputs, generator=generator) * 0.2
        b = torch.randn(count, outputs, 2, generator=generator) * 0.2
        tensors |= {f"{block}.switch_mlp.{name}.lora_a": a.flatten(0, 1), f"{block}.switch_mlp.{name}.lora_b": b}
        weight = experts.down_proj if name == "down_proj" else experts.gate_up_proj
        rows = {"gate_proj": slice(0, inner), "up_proj": slice(inner, None), "down_proj": slice(None)}[name]
        weight.data[:, rows] += 3.0 * (b @ a)
    router: Any = model.get_submodule(f"{bank.path.rpartition('.')[0]}.gate")
    a, b = (torch.randn(*shape, generator=generator) * 0.2 for shape in ((32, 2), (2, count)))
    tensors |= {f"{block}.gate.lora_a": a, f"{block}.gate.lora_b": b}
    router.weight.data += 3.0 * (a @ b).T
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapters.safetensors")
    fields = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 3.0}}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    result = import_.run(ImportConfig(adapter=tmp_path / "adapter", model=str(base), out=tmp_path / "out"))
    assert (result["layout"], len(result["experts"]), result["r"]) == ("mlx-lm", count, 2)
    loaded = lora.load_adapter(stock(base), tmp_path / "out" / "adapter")
    assert (logits(loaded) - logits(model)).abs().max() <= 2e-5
    for layout in ("merged", "peft", "vllm"):
        result = export.run(ExportConfig(adapter=tmp_path / "out", format=layout, out=tmp_path / layout))  # type: ignore[arg-type]
        assert result["keys"]
    assert (logits(stock(tmp_path / "merged")) - logits(model)).abs().max() <= 2e-5
    fields["fine_tune_type"] = "dora"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match="holds DoRA of mlx-lm"):
        import_.run(ImportConfig(adapter=tmp_path / "adapter", model=str(base), out=tmp_path / "again"))


def test_a_base_of_another_machine(tied_head: Path, tmp_path: Path) -> None:
    file = tied_head / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/home/someone/models/base"}))
    with pytest.raises(ModelError, match="names '/home/someone/models/base' as its base model, which is not here"):
        export.run(ExportConfig(adapter=tied_head, format="merged", out=tmp_path / "out"))
    export.run(ExportConfig(adapter=tied_head, format="merged", model=str(tmp_path / "base"), out=tmp_path / "out"))


def test_the_same_adapter_gives_the_same_settings(tmp_path: Path) -> None:
    names = [f"{letter}_proj" for letter in "zyxkvoqab"]
    LoraConfig(target_modules=names, exclude_modules=names).save_pretrained(str(tmp_path))
    order_config(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["target_modules"] == fields["exclude_modules"] == sorted(names)
