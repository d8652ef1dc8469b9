"""LoRA on chosen experts against brute force: the same model with the chosen weights replaced by W + scaling * B A."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from superexperts.adapters import lora
from superexperts.adapters.effect import adapter_effect
from superexperts.adapters.layer import ExpertLoraConfig, ExpertsLora
from superexperts.core.errors import DataError, ExpertsError, ModelError, OptionError
from superexperts.core.types import ExpertKey
from superexperts.models.banks import find_banks
from tests.support.families import FAMILIES, tiny_model, tiny_tokens

R, ALPHA = 4, 10
SCALING = 2.5
ALL = sorted(FAMILIES)
INTERLEAVED = TRANSPOSED = {"gpt_oss"}
UNGATED = {"nemotron_h"}


def logits(model: nn.Module, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_tokens() if tokens is None else tokens, use_cache=False).logits


def chosen_experts(family: str, model: nn.Module) -> list[ExpertKey]:
    """One expert of the first bank, two of the last, and the last's shared expert where there is one."""
    banks = find_banks(model)
    shared: list[ExpertKey] = [(banks[-1].layer, "shared")] if banks[-1].shared_down is not None else []
    return [(banks[0].layer, 2), (banks[-1].layer, 0), (banks[-1].layer, 3), *shared]


def attach(model: nn.Module, keys: list[ExpertKey], *, dropout: float = 0.0, seed: int = 0) -> PeftModel:
    return lora.attach_experts(model, keys, r=R, alpha=ALPHA, dropout=dropout, seed=seed)


def randomise(adapted: nn.Module, seed: int = 0) -> None:
    """Gives every A and B random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Asserts that the block leaves modules, weights and output as they were."""
    modules = {name: type(module) for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model)
    yield
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), before)


def fused(family: str, gate: Tensor | None, up: Tensor) -> Tensor:
    """gate [F, D] and up [F, D] as the family stores them, row by row: a second way to write the layout."""
    if gate is None:
        whole = up
    elif family in INTERLEAVED:
        whole = torch.stack([row for pair in zip(gate, up, strict=True) for row in pair])
    else:
        whole = torch.stack([*gate, *up])
    return whole.T if family in TRANSPOSED else whole


def replaced_weights(family: str, model: nn.Module, pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The plain model's parameters with W + scaling * B A, differentiable in A and B.

    `pairs` holds {path of the adapted module}.{projection or expert_projection}: (A, B).
    """
    parameters = dict(model.named_parameters())
    changes = {name: SCALING * (b @ a) for name, (a, b) in pairs.items()}
    for bank in find_banks(model):
        up_name = "up_proj" if family in UNGATED else "gate_up_proj"
        for expert in range(bank.num_experts):
            prefix = f"{bank.path}.{expert}_"
            if f"{prefix}up_proj" not in changes:
                continue
            gate = None if family in UNGATED else changes[f"{prefix}gate_proj"]
            down = changes[f"{prefix}down_proj"]
            for name, change in (
                (f"{bank.path}.{up_name}", fused(family, gate, changes[f"{prefix}up_proj"])),
                (f"{bank.path}.down_proj", down.T if family in TRANSPOSED else down),
            ):
                rows = list(parameters[name])
                rows[expert] = rows[expert] + change
                parameters[name] = torch.stack(rows)
    for name, change in changes.items():
        if f"{name}.weight" in parameters:
            parameters[f"{name}.weight"] = parameters[f"{name}.weight"] + change
    return parameters


def adapter_pairs(adapted: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Every (A, B) of the adapter, copied, by what it adapts; read from parameter names alone."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in adapted.named_parameters():
        if "lora_" not in name:
            continue
        path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
        letter, _, own = rest.partition(".default.")
        target = path if own == "weight" else f"{path}.{own}"
        found.setdefault(target, {})[letter] = parameter
    assert all(pair.keys() == {"A", "B"} for pair in found.values())
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


# ---- exactness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_a_fresh_adapter_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    after = logits(attach(model, chosen_experts(family, model)))
    # The sum over experts has another order: a few units in the last place of logits of up to 4.
    assert (after - before).abs().max() <= 1e-6 * max(1, before.abs().max())
    assert torch.equal(after.argmax(-1), before.argmax(-1))


@pytest.mark.parametrize("family", ALL)
def test_output_and_gradients_equal_those_of_replaced_weights(family: str) -> None:
    plain = tiny_model(family)
    plain.set_experts_implementation("eager")  # the family's own loop over experts
    model = tiny_model(family)
    adapted = attach(model, chosen_experts(family, model))
    randomise(adapted)
    tokens = tiny_tokens(4, 24)
    ours = adapted(input_ids=tokens, use_cache=False).logits
    pairs = adapter_pairs(adapted)
    copies = {
        name: (a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_())
        for name, (a, b) in pairs.items()
    }
    weights = replaced_weights(family, plain, copies)
    expected = functional_call(plain, weights, kwargs={"input_ids": tokens, "use_cache": False}).logits
    assert (ours - expected).abs().max() <= 2e-5
    assert (ours - logits(plain, tokens)).abs().max() > 0.1  # and it is not the base that both equal
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    ours.backward(upstream)
    expected.backward(upstream)
    for name, (a, b) in pairs.items():
        for mine, brute in ((a, copies[name][0]), (b, copies[name][1])):
            assert mine.grad is not None
            assert brute.grad is not None
            assert brute.grad.abs().max() > 0, name
            torch.testing.assert_close(mine.grad, brute.grad, rtol=1e-3, atol=1e-4 * float(brute.grad.abs().max()))


@pytest.mark.parametrize("family", ALL)
def test_saved_and_loaded_is_the_same_merged_is_equal_and_unloaded_is_the_base(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    with unchanged(model):
        keys = chosen_experts(family, model)
        adapted = attach(model, keys)
        randomise(adapted)
        trained = logits(adapted)
        adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        adapted.unload()
    loaded = lora.load_adapter(tiny_model(family), tmp_path)
    assert torch.equal(logits(loaded), trained)
    assert lora.trainable_parameters(loaded) == 0
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(tiny_model(family)))
    loaded.merge_adapter()
    assert (logits(loaded) - trained).abs().max() <= 1e-5
    loaded.unmerge_adapter()
    assert (logits(loaded) - trained).abs().max() <= 1e-5
    merged = loaded.merge_and_unload()
    assert not [module for module in merged.modules() if isinstance(module, ExpertsLora)]
    assert (logits(merged) - trained).abs().max() <= 1e-5


def test_merging_writes_the_chosen_experts_and_no_other() -> None:
    plain, model = tiny_model("deepseek_v2", n_routed_experts=16), tiny_model("deepseek_v2", n_routed_experts=16)
    adapted = attach(model, [(1, 1)])  # a prefix match would take 10 to 15 too
    randomise(adapted)
    before, after = plain.state_dict(), adapted.merge_and_unload().state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"}
    for name in changed:
        rows = [expert for expert in range(16) if not torch.equal(before[name][expert], after[name][expert])]
        assert rows == [1]


def test_plain_peft_loads_it_with_our_configuration(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    adapted = attach(model, chosen_experts("qwen3_moe", model))
    randomise(adapted)
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["experts"] == {"model.layers.0.mlp.experts": [2], "model.layers.2.mlp.experts": [0, 3]}
    with lora.quiet():
        loaded = PeftModel.from_pretrained(tiny_model("qwen3_moe"), str(tmp_path), config=ExpertLoraConfig(**fields))
    assert torch.equal(logits(loaded), logits(adapted))


def test_half_precision_keeps_the_adapter_in_float32(tmp_path: Path) -> None:
    model = tiny_model("qwen2_moe", dtype=torch.bfloat16)
    before = logits(model)
    adapted = attach(model, chosen_experts("qwen2_moe", model))
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    fresh = logits(adapted)
    assert fresh.dtype == torch.bfloat16
    assert torch.equal(fresh.argmax(-1), before.argmax(-1))
    randomise(adapted)
    exact = tiny_model("qwen2_moe")
    exact_adapted = attach(exact, chosen_experts("qwen2_moe", exact))
    randomise(exact_adapted)
    error = (logits(adapted).float() - logits(exact_adapted)).abs().mean()
    assert error < 0.05 * (logits(exact_adapted) - before.float()).abs().mean() + 0.05


# ---- what is trained ----------------------------------------------------------------------------------------------


def test_only_the_chosen_experts_are_trained_and_everything_else_keeps_every_bit() -> None:
    model = tiny_model("deepseek_v2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = attach(model, [(1, 3), (1, "shared")], dropout=0.1)
    layers = model.get_submodule("model.layers")
    assert isinstance(layers[1].mlp.experts, ExpertsLora)
    assert not isinstance(layers[2].mlp.experts, ExpertsLora)
    # r (in + out) for gate and up (32 -> 24), down (24 -> 32); the shared MLP has 2 x 24 inner units
    assert lora.trainable_parameters(adapted) == R * 3 * (32 + 24) + R * 3 * (32 + 48)
    names = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    bank = "base_model.model.model.layers.1.mlp.experts"
    shared = "base_model.model.model.layers.1.mlp.shared_experts"
    projections = ("gate_proj", "up_proj", "down_proj")
    assert names == {f"{bank}.lora_{x}.default.3_{p}" for x in "AB" for p in projections} | {
        f"{shared}.{p}.lora_{x}.default.weight" for x in "AB" for p in projections
    }
    adapted.train()
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.1)
    for _ in range(2):  # A has no gradient while B is 0
        adapted(input_ids=tiny_tokens(), labels=tiny_tokens(), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in adapted.named_parameters() if "lora_B" in name and bool(p.any())}
    assert moved == {name for name in names if "lora_B" in name}
    adapted.unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_expert_that_no_token_reaches_has_a_gradient_of_zero() -> None:
    model = tiny_model("deepseek_v3")
    model.get_submodule("model.layers.2.mlp.gate").e_score_correction_bias[5] = -1e9
    adapted = attach(model, [(2, 5)])
    randomise(adapted)
    adapted(input_ids=tiny_tokens(), labels=tiny_tokens(), use_cache=False).loss.backward()
    gradients = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(gradients) == 6
    assert all(gradient is not None and not bool(gradient.any()) for gradient in gradients)


def test_backward_does_not_go_below_the_lowest_adapted_layer() -> None:
    model = tiny_model("deepseek_v2")
    adapted = attach(model, [(2, 0), (2, 1), (2, 2), (2, 3)])
    needed: list[bool] = []
    layers = model.get_submodule("model.layers")
    for layer in (layers[1], layers[2]):
        layer.register_forward_hook(lambda _, __, output: needed.append(output.requires_grad))
    adapted(input_ids=tiny_tokens(), use_cache=False)
    assert needed == [False, True]


def test_a_seed_gives_one_adapter_and_leaves_the_global_generator_alone() -> None:
    model = tiny_model("qwen2_moe")

    def drawn(seed: int) -> dict[str, Tensor]:
        adapted = attach(model, [(0, 1), (2, "shared")], seed=seed)
        found = {name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad}
        adapted.unload()
        return found

    state = torch.random.get_rng_state()
    first, again, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)
    assert not any(bool(tensor.any()) for name, tensor in first.items() if "lora_B" in name)


def test_dropout_acts_in_training_only() -> None:
    model = tiny_model("deepseek_v2")
    wet, dry = attach(model, [(1, 0), (2, 1)], dropout=0.5), attach(tiny_model("deepseek_v2"), [(1, 0), (2, 1)])
    randomise(wet)
    randomise(dry)
    wet.eval()
    assert torch.equal(logits(wet), logits(dry))
    wet.train()
    assert not torch.allclose(logits(wet), logits(wet), atol=1e-3)


def test_an_expert_that_is_not_in_the_model() -> None:
    model = tiny_model("deepseek_v2")
    with unchanged(model):
        with pytest.raises(ExpertsError, match=r"L0E1 is not in the model \(MoE layers are 1\.\.2\)"):
            attach(model, [(0, 1)])
        with pytest.raises(ExpertsError, match=r"L2E38 is not in the model \(layer 2 has experts 0\.\.7\)"):
            attach(model, [(2, 3), (2, 38)])
    with pytest.raises(ExpertsError, match="no shared expert"):
        attach(tiny_model("mixtral"), [(0, "shared")])


def test_settings_of_peft_that_the_layer_does_not_have_are_refused() -> None:
    model = tiny_model("mixtral")
    path = "model.layers.0.block_sparse_moe.experts"
    if not dict(model.named_modules()).get(path):
        path = "model.layers.0.mlp.experts"
    for settings, words in (({"use_dora": True}, "."), ({"init_lora_weights": "pissa"}, "pissa")):
        config = ExpertLoraConfig(r=2, target_modules=[path], experts={path: [0]}, task_type="CAUSAL_LM", **settings)
        with pytest.raises(ValueError, match=words), lora.quiet():
            PeftModel(tiny_model("mixtral"), config)


# ---- several adapters, merging and back --------------------------------------------------------------------------


def test_two_adapters_switch_and_merge_and_unmerge() -> None:
    model = tiny_model("gpt_oss")
    base = logits(model)
    adapted = attach(model, [(0, 1), (2, 3)])
    randomise(adapted, seed=1)
    first = logits(adapted)
    path = "model.layers.2.mlp.experts"
    second = ExpertLoraConfig(r=2, lora_alpha=8, target_modules=[path], experts={path: [0, 3]}, task_type="CAUSAL_LM")
    with lora.quiet():
        adapted.add_adapter("second", second)
    assert torch.equal(logits(adapted), first)
    adapted.set_adapter("second")
    assert (logits(adapted) - base).abs().max() <= 1e-5
    randomise(adapted, seed=2)
    other = logits(adapted)
    assert (other - first).abs().max() > 1e-2
    adapted.merge_adapter()
    assert (logits(adapted) - other).abs().max() <= 1e-5
    adapted.unmerge_adapter()
    assert (logits(adapted) - other).abs().max() <= 1e-5
    adapted.base_model.set_adapter(["default", "second"])
    both = logits(adapted)
    assert min((both - first).abs().max(), (both - other).abs().max()) > 1e-2
    adapted.merge_adapter(adapter_names=["default", "second"])
    assert (logits(adapted) - both).abs().max() <= 1e-5
    with adapted.disable_adapter():
        assert (logits(adapted) - base).abs().max() <= 1e-5
    adapted.delete_adapter("second")
    assert "second" not in model.get_submodule(path).experts


def test_two_saved_adapters_load_side_by_side(tmp_path: Path) -> None:
    first: list[ExpertKey] = [(1, 0), (1, 3)]
    second: list[ExpertKey] = [(1, 3), (2, 5), (2, "shared")]
    for name, keys, seed in (("one", first, 1), ("two", second, 2)):
        adapted = attach(tiny_model("deepseek_v2"), keys)
        randomise(adapted, seed)
        adapted.save_pretrained(str(tmp_path / name), save_embedding_layers=False)
    apart = {name: logits(lora.load_adapter(tiny_model("deepseek_v2"), tmp_path / name)) for name in ("one", "two")}
    both = lora.load_adapter(tiny_model("deepseek_v2"), tmp_path / "one", name="one")
    assert lora.load_adapter(both, tmp_path / "two", name="two") is both
    assert torch.equal(logits(both), apart["one"])
    both.set_adapter("two")
    assert torch.equal(logits(both), apart["two"])
    with pytest.raises(OptionError, match="the model has an adapter 'two' already"):
        lora.load_adapter(both, tmp_path / "two", name="two")
    _edit_config(tmp_path / "one", r=R + 1)
    with pytest.raises(ModelError, match="does not fit this model"):
        lora.load_adapter(both, tmp_path / "one", name="three")
    assert both.peft_config.keys() == {"one", "two"}
    both.base_model.set_adapter(["one", "two"], inference_mode=True)
    together = logits(both)
    merged = both.merge_and_unload(adapter_names=["one", "two"])
    assert (logits(merged) - together).abs().max() <= 1e-5
    assert min((together - alone).abs().max() for alone in apart.values()) > 1e-2


# ---- attention ---------------------------------------------------------------------------------------------------

MLA = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
PLAIN = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.mark.parametrize(
    ("family", "layers", "linears"),
    [
        ("deepseek_v2", (0, 1, 2), (*MLA, "q_proj")),
        ("deepseek_v3", (0, 1, 2), (*MLA, "q_a_proj", "q_b_proj")),
        ("qwen3_moe", (0, 1, 2), PLAIN),
        ("gpt_oss", (0, 1, 2), PLAIN),
        ("nemotron_h", (2,), PLAIN),
    ],
)
def test_attention_is_every_linear_map_of_every_attention(
    family: str, layers: tuple[int, ...], linears: tuple[str, ...], tmp_path: Path
) -> None:
    model = tiny_model(family)
    module = "mixer" if family == "nemotron_h" else "self_attn"
    adapted = lora.attach_attention(model, r=R, alpha=ALPHA, dropout=0.0, seed=0)
    assert adapter_pairs(adapted).keys() == {f"model.layers.{i}.{module}.{name}" for i in layers for name in linears}
    assert (logits(adapted) - logits(tiny_model(family))).abs().max() <= 1e-6
    randomise(adapted)
    weights = replaced_weights(family, tiny_model(family), adapter_pairs(adapted))
    with torch.no_grad():
        expected = functional_call(
            tiny_model(family), weights, kwargs={"input_ids": tiny_tokens(), "use_cache": False}
        ).logits
    assert (logits(adapted) - expected).abs().max() <= 2e-5
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert torch.equal(logits(lora.load_adapter(tiny_model(family), tmp_path)), logits(adapted))


def test_a_model_that_declares_no_attention() -> None:
    model = tiny_model("mixtral")
    model._can_record_outputs = {}  # type: ignore[assignment]
    with pytest.raises(ModelError, match="declares no attention"):
        lora.attach_attention(model, r=R, alpha=ALPHA, dropout=0.0, seed=0)


# ---- loading what is wrong ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter of the tiny DeepSeek-V2 on disk."""
    adapted = attach(tiny_model("deepseek_v2"), [(1, 3), (2, 7), (2, "shared")])
    randomise(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    return tmp_path / "adapter"


def _edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _drop_key(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    del weights["base_model.model.model.layers.1.mlp.experts.lora_B.3_up_proj"]
    save_file(weights, folder / "adapter_model.safetensors")


def _add_key(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.model.layers.1.mlp.experts.lora_A.5_up_proj"] = torch.zeros(R, 32)
    save_file(weights, folder / "adapter_model.safetensors")


def _not_finite(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.model.layers.1.mlp.experts.lora_A.3_up_proj"][0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), DataError, "has no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), DataError, "not valid JSON"),
        (lambda f: _edit_config(f, peft_type="IA3"), DataError, "does not describe a LoRA adapter"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), DataError, "has no adapter_model.safetensors"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"PK"), DataError, "cannot be read"),
        (_drop_key, DataError, r"1 weights of .* are missing \(.*3_up_proj"),
        (_add_key, DataError, r"1 weights of .* have no place in the model \(.*5_up_proj"),
        (lambda f: _edit_config(f, r=R + 1), ModelError, "does not fit this model"),
        (
            lambda f: _edit_config(f, experts={"model.layers.0.mlp.experts": [1]}),
            ModelError,
            "experts at 'model.layers.0",
        ),
        (lambda f: _edit_config(f, experts={"model.layers.1.mlp.experts": [38]}), ModelError, "expert 38 .* 0..7 here"),
        (lambda f: _edit_config(f, shared=["model.layers.0.mlp.shared_experts"]), ModelError, "a shared expert at"),
        (lambda f: _edit_config(f, experts={"model.layers.1.mlp.experts": ["3"]}), DataError, r"'experts' is .*'3'"),
        (lambda f: _edit_config(f, experts={"model.layers.1.mlp.experts": [-1]}), DataError, "'experts' is .*-1"),
        (lambda f: _edit_config(f, experts={"model.layers.1.mlp.experts": [3, 3]}), DataError, "'experts' is .*3, 3"),
        (lambda f: _edit_config(f, experts=[3]), DataError, r"'experts' is \[3\]; repair it"),
        (
            lambda f: _edit_config(f, experts={"model.layers.1.mlp.experts": [3]}),
            DataError,
            "names none of its exp",
        ),
        (lambda f: _edit_config(f, projections=["foo"]), DataError, "'projections' is "),
        (lambda f: _edit_config(f, r=0), DataError, "'r' is 0; repair it"),
        (lambda f: _edit_config(f, r="4"), DataError, "'r' is 4; repair it"),
        (lambda f: _edit_config(f, lora_dropout="x"), DataError, "'lora_dropout' is x; repair it"),
        (lambda f: _edit_config(f, use_rslora="no"), DataError, "'use_rslora' is no; repair it"),
        (lambda f: _edit_config(f, alpha_pattern={"(": 2}), DataError, "'alpha_pattern' is "),
        (lambda f: _edit_config(f, rank_pattern={"x": 2.5}), DataError, "'rank_pattern' is "),
        (lambda f: _edit_config(f, lora_alpha=None), DataError, "'lora_alpha' is None; repair it"),
        (
            lambda f: _edit_config(f, alpha_pattern={"model.layers.1.mlp.experts.4": 2}),
            DataError,
            "alpha_pattern is for 'model.layers.1.mlp.experts.4', which is not adapted",
        ),
        (
            lambda f: _edit_config(f, rank_pattern={"model.layers.2.mlp.experts.7.gate": 2}),
            DataError,
            "rank_pattern is for .*7.gate', which is not adapted",
        ),
        (_not_finite, DataError, r"lora_A.3_up_proj is not finite; train again"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_the_model_alone(
    saved: Path, damage: Any, error: type[Exception], words: str
) -> None:
    damage(saved)
    model = tiny_model("deepseek_v2")
    with unchanged(model), pytest.raises(error, match=words) as caught:
        lora.load_adapter(model, saved)
    assert str(caught.value).startswith("adapter: ")
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_family_or_width(saved: Path) -> None:
    model = tiny_model("mixtral")
    with unchanged(model), pytest.raises(ModelError, match=r"has experts 0\.\.3 here"):
        lora.load_adapter(model, saved)
    wider = tiny_model("deepseek_v2", moe_intermediate_size=32)
    with unchanged(wider), pytest.raises(ModelError, match="does not fit this model"):
        lora.load_adapter(wider, saved)


# ---- the effect ---------------------------------------------------------------------------------------------------


def test_effect_equals_its_definition() -> None:
    model = tiny_model("deepseek_v2")
    adapted = attach(model, [(1, 0), (1, 1), (2, 2)])
    rows = [tiny_tokens(1, 12)[0], tiny_tokens(1, 7, seed=3)[0]]
    before = adapter_effect(adapted, rows)
    assert (before.max_logit_change, before.kl, before.none) == (0.0, 0.0, True)
    randomise(adapted)
    effect = adapter_effect(adapted, rows)
    assert not effect.none
    changes, divergences = [], []
    plain = tiny_model("deepseek_v2")
    for row in rows:
        p = logits(adapted, row[None])[0].double()
        q = logits(plain, row[None])[0].double()
        changes.append((p - q).abs().max())
        divergences.append((p.softmax(-1) * (p.softmax(-1).log() - q.softmax(-1).log())).sum(-1))
    assert effect.max_logit_change == pytest.approx(float(max(changes)), rel=1e-5)
    assert effect.kl == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4)
    assert effect.kl > 1e-4
    block = tiny_tokens(3, 9)
    assert adapter_effect(adapted, block) == adapter_effect(adapted, list(block))


def test_effect_measures_without_dropout_and_gives_modes_back() -> None:
    adapted = attach(tiny_model("qwen3_moe"), [(0, 0), (1, 1)], dropout=0.5)
    randomise(adapted)
    adapted.train()
    adapted.get_submodule("base_model.model.model.layers.2").eval()
    modes = [module.training for module in adapted.modules()]
    assert adapter_effect(adapted, tiny_tokens()) == adapter_effect(adapted, tiny_tokens())
    assert [module.training for module in adapted.modules()] == modes
