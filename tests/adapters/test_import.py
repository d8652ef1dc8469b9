"""LoRA on experts as other programs write it; the change of the weights is worked out by each program's own formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from superexperts.adapters import export, import_, lora
from superexperts.adapters.export import ExportConfig
from superexperts.adapters.import_ import ImportConfig
from superexperts.core.errors import DataError, ModelError, OptionError
from superexperts.models.banks import find_banks
from tests.adapters.test_export import save_adapter, save_base, stock, train_like
from tests.adapters.test_lora import logits, randomise
from tests.support.families import tiny_model, tiny_tokens

R, ALPHA = 3, 12
SCALING = 4.0
FAMILIES = ("deepseek_v2", "gpt_oss", "nemotron_h")  # fused; transposed and interleaved; without a gate
TRANSPOSED = {"gpt_oss"}


def write(folder: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": R, "lora_alpha": ALPHA, "target_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **fields}))
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def fused(layout: str, a: Tensor, b: Tensor, experts: int, transposed: bool) -> Tensor:
    """The change of the whole parameter, as the layout's own program works it out."""
    a = a.reshape(experts, R, -1)
    if layout.startswith("unsloth"):
        b_EOR = b.reshape(len(b), experts, R).permute(1, 0, 2)
        delta = SCALING * torch.stack([b_EOR[e] @ a[e] for e in range(experts)])
        return delta.transpose(1, 2) if transposed or layout.endswith("0.18") else delta
    letters = "o r e, e r i -> e i o" if transposed or layout == "peft-0.18" else "o r e, e r i -> e o i"
    return SCALING * torch.einsum(letters, b.reshape(len(b), R, experts), a)


def example(family: str, layout: str) -> tuple[dict[str, Tensor], list[str], dict[str, Tensor]]:
    """Random tensors in a layout on the last bank, the parameters they are for, and the change of each."""
    model = tiny_model(family)
    bank = find_banks(model)[-1]
    names = [name for name, p in bank.module.named_parameters(recurse=False) if p.dim() == 3]
    tensors, changes = {}, {}
    for seed, (depth, name) in enumerate(enumerate(reversed(names))):
        _, first, second = getattr(bank.module, name).shape
        swapped = layout.endswith("0.18") and family not in TRANSPOSED
        inputs, outputs = (first, second) if swapped or family in TRANSPOSED else (second, first)
        a, b = drawn(R * bank.num_experts, inputs, seed=seed), drawn(outputs, R * bank.num_experts, seed=seed + 9)
        key = f"{bank.path}{'.base_layer' * depth}"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        changes[f"{bank.path}.{name}"] = fused(layout, a, b, bank.num_experts, family in TRANSPOSED)
    return tensors, list(changes), changes


def with_changes(family: str, changes: dict[str, Tensor]) -> Tensor:
    model = tiny_model(family)
    weights = {name: p + changes[name] if name in changes else p for name, p in model.named_parameters()}
    with torch.no_grad():
        return functional_call(model, weights, kwargs={"input_ids": tiny_tokens(), "use_cache": False}).logits


def imported(folder: Path, base: Path, out: Path, family: str, **options: Any) -> tuple[dict[str, Any], Tensor]:
    result = import_.run(ImportConfig(adapter=folder, model=str(base), out=out, **options))
    return result, logits(lora.load_adapter(stock(base), out / "adapter"))


@pytest.mark.parametrize("layout", ["peft-0.19", "peft-0.18", "unsloth", "unsloth-peft-0.18"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_layout_is_read_as_its_program_means_it(family: str, layout: str, tmp_path: Path) -> None:
    tensors, parameters, changes = example(family, layout)
    folder = write(tmp_path / "adapter", tensors, target_parameters=parameters)
    base = save_base(tmp_path / "base", family)
    reported = {} if layout.startswith("peft") and family not in TRANSPOSED else {"layout": layout}
    result, found = imported(folder, base, tmp_path / "out", family, **reported)
    assert result["layout"] == layout
    experts = find_banks(tiny_model(family))[-1].num_experts
    assert (len(result["experts"]), result["r"]) == (experts, R)
    expected = with_changes(family, changes)
    assert (expected - logits(tiny_model(family))).abs().max() > 0.1
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_peft_itself_trained(family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    names = ("experts.up_proj", "experts.gate_up_proj", "experts.down_proj")
    config = LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=["o_proj"], target_parameters=list(names), use_rslora=True,
        rank_pattern={"o_proj": 2}, task_type="CAUSAL_LM",
    )  # fmt: skip
    with lora.quiet():
        adapted = get_peft_model(stock(base), config).eval()
    randomise(adapted)
    result, found = imported(save_adapter(adapted, base, tmp_path / "a"), base, tmp_path / "out", family)
    expected = logits(adapted)
    assert result["layout"] == "peft-0.19"
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize("family", ["deepseek_v2", "mixtral", "nemotron_h"])
@pytest.mark.parametrize("layout", ["peft", "vllm"])
def test_an_export_comes_back_as_it_was(family: str, layout: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    adapted = train_like(stock(base), family)
    adapter = save_adapter(adapted, base, tmp_path / "adapter")
    export.run(ExportConfig(adapter=adapter, format=layout, out=tmp_path / layout))
    result, found = imported(tmp_path / layout, base, tmp_path / "out", family)
    assert result["layout"] == ("peft-0.19" if layout == "peft" else "per-expert")
    assert torch.equal(found, logits(adapted))
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_file_with_some_experts_under_their_checkpoint_names(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral")
    layer = "model.layers.1.block_sparse_moe.experts"
    tensors, weights = {}, load_file(base / "model.safetensors")
    for seed, (expert, name) in enumerate([(1, "w1"), (1, "w2"), (1, "w3"), (3, "w2")]):
        weight = weights[f"{layer}.{expert}.{name}.weight"]
        a, b = drawn(R, weight.shape[1], seed=seed), drawn(weight.shape[0], R, seed=seed + 50)
        tensors |= {f"{layer}.{expert}.{name}.lora_A.weight": a, f"{layer}.{expert}.{name}.lora_B.weight": b}
        weights[f"{layer}.{expert}.{name}.weight"] = weight + SCALING * (b @ a)
    folder = write(tmp_path / "adapter", tensors, target_modules=["w1", "w2", "w3"])
    result, found = imported(folder, base, tmp_path / "out", "mixtral")
    assert (result["layout"], result["experts"]) == ("per-expert", ["L1E1", "L1E3"])
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    expected = logits(stock(base))
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


# ---- which layout it is -------------------------------------------------------------------------------------------


def detected(tensors: dict[str, Tensor], model: nn.Module, parameters: list[str], **fields: Any) -> tuple[str, str]:
    keys = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    return import_.detect(model, LoraConfig(target_modules=[], target_parameters=parameters), keys, fields)


def test_untrained_experts_tell_how_b_lies(tmp_path: Path) -> None:
    for layout, slots in (("peft-0.19", slice(5, None, 8)), ("unsloth", slice(5 * R, 6 * R))):
        tensors, parameters, _ = example("deepseek_v2", layout)
        for name, tensor in tensors.items():
            if ".lora_B." in name:
                tensor[:, slots] = 0
        assert detected(tensors, tiny_model("deepseek_v2"), parameters)[0] == layout
        assert detected(tensors, tiny_model("deepseek_v2"), parameters, tags="unsloth")[0] == layout
        reported = "unsloth" if layout == "peft-0.19" else "peft-0.19"
        base = save_base(tmp_path / f"base of {layout}", "deepseek_v2")
        folder = write(tmp_path / layout, tensors, target_parameters=parameters)
        with pytest.raises(
            OptionError, match=f"layout: {reported!r} does not fit this file: .* as in (PEFT|Unsloth)'s"
        ):
            imported(folder, base, tmp_path / "out", "deepseek_v2", layout=reported)
        imported(folder, base, tmp_path / layout / "out", "deepseek_v2", layout=layout)


def test_where_nothing_tells_it_is_asked() -> None:
    tensors, parameters, _ = example("deepseek_v2", "peft-0.19")
    model = tiny_model("deepseek_v2")
    assert detected(tensors, model, parameters) == ("peft-0.19", "A has the width of the inputs")
    with pytest.raises(OptionError, match="layout: .* Unsloth"):
        detected(tensors, model, parameters, auto_mapping={"unsloth_fixed": True})
    square = tiny_model("deepseek_v2", moe_intermediate_size=16)  # gate and up together are as wide as the model: 32
    path = f"{find_banks(square)[-1].path}.gate_up_proj"
    key = path.replace(".gate_up_proj", "")
    keys = {f"{key}.lora_A.weight": drawn(8 * R, 32, seed=0), f"{key}.lora_B.weight": drawn(32, 8 * R, seed=1)}
    assert detected(keys, square, [path], peft_version="0.18.1")[0] == "peft-0.18"
    assert detected(keys, square, [path], peft_version="0.19.0")[0] == "peft-0.19"
    with pytest.raises(OptionError, match="layout: 'auto' finds only square projections"):
        detected(keys, square, [path])


# ---- what is refused ----------------------------------------------------------------------------------------------


def _drop(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "fields", "words"),
    [
        (lambda t: _drop(t, "lora_B"), {}, r"lora_B.weight is missing"),
        (lambda t: _drop(t, "base_layer.lora_A"), {}, r"lora_A.weight is missing"),
        (lambda t: {n: x[:-1] for n, x in t.items()}, {}, "but model.layers.2.mlp.experts.* has 8 experts"),
        (lambda t: {**t, "model.layers.9.mlp.x.lora_A.weight": torch.ones(1)}, {}, "1 keys have no place"),
        (lambda t: {n: x * 0 for n, x in t.items()}, {}, "holds only zeros"),
        (lambda t: t, {"experts": {}}, "adapter of superexperts already"),
        (lambda t: t, {"target_parameters": None}, "4 keys have no place"),
        (lambda t: t, {"peft_type": "LOHA"}, "does not describe a LoRA adapter"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_nothing_is_written(
    change: Any, fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    tensors, parameters, _ = example("deepseek_v2", "peft-0.19")
    folder = write(tmp_path / "adapter", change(tensors), **{"target_parameters": parameters, **fields})
    base = save_base(tmp_path / "base", "deepseek_v2")
    with pytest.raises((DataError, ModelError), match=words) as caught:
        import_.run(ImportConfig(adapter=folder, model=str(base), out=tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
