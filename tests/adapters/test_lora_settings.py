"""What settings make of the layer: ranks and alphas of single experts, rsLoRA, projections, targets, bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from superexperts.adapters import export, import_, lora
from superexperts.adapters.export import ExportConfig
from superexperts.adapters.import_ import ImportConfig
from superexperts.adapters.layer import ExpertLoraConfig, ExpertsLora
from superexperts.core.errors import ModelError, OptionError
from superexperts.models.banks import find_banks
from tests.adapters.test_export import engine_view, save_adapter, save_base, stock
from tests.adapters.test_lora import (
    SCALING,
    UNGATED,
    adapter_pairs,
    attach,
    chosen_experts,
    fused,
    logits,
    randomise,
    replaced_weights,
)
from tests.support.families import FAMILIES, tiny_model, tiny_tokens

KEYS = [(1, 2), (1, 3), (2, 0), (2, "shared")]
SETTINGS: dict[str, dict[str, Any]] = {
    "one rank and alpha for each": {"ranks": {(1, 2): 2, (2, 0): 7}, "alphas": {(1, 3): 3, (2, 0): 20}},
    "rslora": {"rslora": True},
    "rslora, and a rank and alpha of one": {"rslora": True, "ranks": {(1, 2): 9}, "alphas": {(1, 2): 2}},
    "down alone": {"projections": ["down_proj"]},
    "gate and down": {"projections": ["gate_proj", "down_proj"], "ranks": {(2, 0): 1}},
    "up alone, attention and the dense layer": {
        "projections": ["up_proj"],
        "attention": True,
        "target": r"model\.layers\.0\.mlp\.\w+",
        "alphas": {(1, 3): 1},
    },
}


def expected_scaling(key: Any, r: int = 4, alpha: float = 10, **settings: Any) -> float:
    rank = settings.get("ranks", {}).get(key, r)
    alpha = settings.get("alphas", {}).get(key, alpha)
    return alpha / (rank**0.5 if settings.get("rslora") else rank)


def brute_force(model: Any, adapted: PeftModel, **settings: Any) -> Tensor:
    """Logits of the plain model with the weights W + (own alpha / own r) B A, from parameter names alone."""
    weights = dict(model.named_parameters())
    for name, (a, b) in adapter_pairs(adapted).items():
        path, _, last = name.rpartition(".")
        if path.endswith(".experts"):
            layer, (expert, _, projection) = int(path.split(".")[2]), last.partition("_")
            change = expected_scaling((layer, int(expert)), **settings) * (b @ a)
            if projection != "down_proj":
                half = torch.zeros_like(change)
                gate, up = (change, half) if projection == "gate_proj" else (half, change)
                change, projection = fused("deepseek_v2", gate, up), "gate_up_proj"
            whole = torch.zeros_like(weights[f"{path}.{projection}"])
            whole[int(expert)] = change
            weights[f"{path}.{projection}"] = weights[f"{path}.{projection}"] + whole
        else:
            shared = "shared_experts" in name
            key = (int(path.split(".")[2]), "shared") if shared else None
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + expected_scaling(key, **settings) * (b @ a)
    with torch.no_grad():
        return functional_call(model, weights, kwargs={"input_ids": tiny_tokens(), "use_cache": False}).logits


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_format_has_the_ranks_and_scalings_of_its_own(settings: dict[str, Any], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "deepseek_v2")
    adapted = lora.attach(stock(base), experts=KEYS, r=4, alpha=10, dropout=0.0, seed=0, **settings)
    randomise(adapted)
    adapted.eval()
    trained = logits(adapted)
    expected = brute_force(stock(base), adapted, **settings)
    assert (expected - logits(stock(base))).abs().max() > 0.1
    assert (trained - expected).abs().max() <= 2e-5
    adapter = save_adapter(adapted, base, tmp_path / "adapter")

    loaded = lora.load_adapter(stock(base), adapter)
    assert torch.equal(logits(loaded), trained)
    rounding = 1e-5 * float(trained.abs().max())  # processors differ in the order of sums
    loaded.merge_adapter()
    assert (logits(loaded) - trained).abs().max() <= rounding
    loaded.unmerge_adapter()
    assert (logits(loaded) - trained).abs().max() <= rounding
    with loaded.disable_adapter():
        assert (logits(loaded) - logits(stock(base))).abs().max() <= 1e-5

    for layout in ("merged", "peft", "vllm"):
        export.run(ExportConfig(adapter=adapter, format=layout, out=tmp_path / layout))  # type: ignore[arg-type]
    with lora.quiet():
        peft = PeftModel.from_pretrained(stock(base), str(tmp_path / "peft")).eval()
    for other in (stock(tmp_path / "merged"), peft, stock(engine_view(base, tmp_path / "vllm", tmp_path / "engine"))):
        assert (logits(other) - trained).abs().max() <= 2e-5
    import_.run(ImportConfig(adapter=tmp_path / "peft", model=str(base), out=tmp_path / "back"))
    back = lora.load_adapter(stock(base), tmp_path / "back" / "adapter")
    assert (logits(back) - trained).abs().max() <= 2e-5


def test_which_projections_hold_an_adapter() -> None:
    model = tiny_model("deepseek_v2")
    adapted = lora.attach(
        model, experts=KEYS, r=4, alpha=8, dropout=0.0, seed=0, projections=["down_proj"], ranks={(1, 2): 2}
    )
    assert {name: len(a) for name, (a, _) in adapter_pairs(adapted).items()} == {
        "model.layers.1.mlp.experts.2_down_proj": 2,
        "model.layers.1.mlp.experts.3_down_proj": 4,
        "model.layers.2.mlp.experts.0_down_proj": 4,
        "model.layers.2.mlp.shared_experts.down_proj": 4,
    }


def test_patterns_and_targets_that_fit_nothing() -> None:
    model = tiny_model("deepseek_v2")
    common: dict[str, Any] = {"r": 4, "alpha": 8, "dropout": 0.0, "seed": 0}
    with pytest.raises(OptionError, match=r"ranks: L1E4 is not adapted"):
        lora.attach(model, experts=KEYS, ranks={(1, 4): 2}, **common)
    with pytest.raises(OptionError, match=r"target: 'q_proj' matches no linear map; paths are like model.layers.2"):
        lora.attach(model, target="q_proj", **common)
    adapted = lora.attach(model, target=r".*\.(q_proj|o_proj)", **common)
    assert len(adapter_pairs(adapted)) == 6
    assert not isinstance(adapted.peft_config["default"], ExpertLoraConfig)  # plain PEFT loads it


def test_a_linear_map_that_the_model_has_not(tmp_path: Path) -> None:
    adapted = lora.attach(
        tiny_model("deepseek_v2"), target=r"model\.layers\.0\.mlp\.up_proj", r=2, alpha=2, dropout=0.0, seed=0
    )
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {
        f"base_model.model.model.layers.0.mlp.up_proj.lora_{letter}.weight" for letter in "AB"
    }
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["linears"], fields["target_modules"]) == (["model.layers.0.mlp.up_proj"], ["model.layers.0.mlp"])
    lora.load_adapter(tiny_model("deepseek_v2"), tmp_path)
    with pytest.raises(ModelError, match=r"a linear map at 'model.layers.0.mlp.up_proj'"):
        lora.load_adapter(tiny_model("mixtral"), tmp_path)


def test_two_adapters_with_settings_of_their_own_add_up() -> None:
    model = tiny_model("deepseek_v2")
    adapted = lora.attach(model, experts=KEYS, r=4, alpha=10, dropout=0.0, seed=0, alphas={(1, 2): 1})
    path = "model.layers.1.mlp.experts"
    second = ExpertLoraConfig(
        r=3, lora_alpha=6, target_modules=[path], experts={path: [2, 5]}, projections=["down_proj"],
        rank_pattern={f"{path}.2.down_proj": 1}, use_rslora=True, task_type="CAUSAL_LM",
    )  # fmt: skip
    with lora.quiet():
        adapted.add_adapter("second", second)
    layer = model.get_submodule(path)
    assert isinstance(layer, ExpertsLora)
    assert layer.scaling_of("default", "2_up_proj") == 0.25
    assert layer.scaling_of("default", "3_up_proj") == 2.5
    assert layer.scaling_of("second", "2_down_proj") == pytest.approx(6)
    assert layer.scaling_of("second", "5_down_proj") == pytest.approx(6 / 3**0.5)
    randomise(adapted)
    adapted.base_model.set_adapter(["default", "second"])
    both = logits(adapted)
    adapted.base_model.set_adapter("default")
    assert (both - logits(adapted)).abs().max() > 1e-2
    adapted.merge_adapter(adapter_names=["default", "second"])
    assert (logits(adapted) - both).abs().max() <= 2e-5
    adapted.unmerge_adapter()
    adapted.delete_adapter("second")
    assert layer.relative_scaling.keys() == {"default"}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradients_in_bfloat16_equal_those_of_replaced_weights_up_to_rounding(family: str) -> None:
    # Every token goes to every expert, so that no rounding can send it elsewhere.
    count = 4 if FAMILIES[family].get("num_local_experts") == 4 else 8
    everywhere: dict[str, Any] = {"num_experts_per_tok": count}
    if family == "deepseek_v3":
        everywhere["topk_group"] = 2
    plain = tiny_model(family, torch.bfloat16, **everywhere).float()
    plain.set_experts_implementation("eager")
    model = tiny_model(family, torch.bfloat16, **everywhere)
    adapted = attach(model, chosen_experts(family, model))
    randomise(adapted)
    pairs = adapter_pairs(adapted)
    copies = {
        name: (a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_())
        for name, (a, b) in pairs.items()
    }
    ours = adapted(input_ids=tiny_tokens(), use_cache=False).logits.float()
    weights = replaced_weights(family, plain, copies)
    expected = functional_call(plain, weights, kwargs={"input_ids": tiny_tokens(), "use_cache": False}).logits
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    ours.backward(upstream)
    expected.backward(upstream)
    assert SCALING == 2.5
    assert family in UNGATED or any("gate_proj" in name for name in pairs)
    for name, pair in pairs.items():
        for mine, brute in zip(pair, copies[name], strict=True):
            assert mine.grad is not None
            assert brute.grad is not None
            assert mine.grad.dtype == torch.float32
            error = (mine.grad - brute.grad).norm() / brute.grad.norm()
            assert error <= 0.2, (name, float(error))  # bfloat16 has 8 bits, and every product is rounded


def test_unchosen_weights_keep_every_bit_in_bfloat16_training_and_merging() -> None:
    model = tiny_model("qwen3_moe", torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = attach(model, [(1, 3)])
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        adapted(input_ids=tiny_tokens(4, 24), labels=tiny_tokens(4, 24), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = adapted.merge_and_unload().state_dict()
    for name, tensor in before.items():
        if name.startswith("model.layers.1.mlp.experts."):
            rows = [expert for expert in range(8) if not torch.equal(merged[name][expert], tensor[expert])]
            assert rows == [3]
        else:
            assert torch.equal(merged[name], tensor), name
    assert len(find_banks(model)) == 3
