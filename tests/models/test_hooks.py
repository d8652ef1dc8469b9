"""The seam equals the stock forward on every family; a tap, a silence and an edit do what a brute-force loop does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from superexperts.core.errors import ExpertsError, ModelError
from superexperts.models import hooks as implementation
from superexperts.models.banks import Bank, find_banks, zero_experts
from superexperts.models.experts import ExpertCall, Piece, expert_down, expert_inner, expert_up, grouped
from superexperts.models.hooks import edited as make_edited
from superexperts.models.hooks import silenced
from superexperts.models.hooks import tapped as make_tapped
from tests.support.families import FAMILIES, MORE_FAMILIES, tiny_model

IDS_BL = torch.randint(0, 64, (3, 11), generator=torch.Generator().manual_seed(1))

REQUIRED = {
    "deepseek_v2",
    "deepseek_v3",
    "qwen3_moe",
    "qwen2_moe",
    "mixtral",
    "olmoe",
    "gpt_oss",
    "glm4_moe",
    "phimoe",
    "granitemoe",
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(IDS_BL).logits
    return result


def test_the_required_families_are_tested() -> None:
    assert FAMILIES.keys() >= REQUIRED


def _tolerance(family: str) -> float:
    """Of the largest logit. Two families enlarge rounding: their stock implementations differ by 9e-7 and 1.4e-6 among
    themselves."""
    return 2e-6 if family in ("qwen3_next", "gemma4_text") else 1e-6


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
@pytest.mark.parametrize("stock", ["eager", "grouped_mm", "batched_mm"])
def test_tapped_forward_equals_every_stock_forward(family: str, stock: str) -> None:
    model = tiny_model(family)
    model.set_experts_implementation(stock)
    expected = logits(model)
    with make_tapped(model, lambda call: None):
        tapped = logits(model)
    assert (tapped - expected).abs().max() <= _tolerance(family) * max(1.0, float(expected.abs().max()))
    assert model.config._experts_implementation == stock
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_tapped_forward_is_the_stock_grouped_one_bit_by_bit_in_bfloat16(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    expected = logits(model)
    with make_tapped(model, lambda call: None):
        assert torch.equal(logits(model), expected)


def eager_outputs(model: nn.Module, bank: Bank) -> tuple[list[Tensor], Tensor, Tensor]:
    """What a bank was given in one eager forward pass: its input, indices and weights."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append((*args, *kwargs.values()))  # type: ignore[arg-type]

    handle = bank.module.register_forward_pre_hook(hook, with_kwargs=True)
    logits(model)
    handle.remove()
    return seen[0]  # type: ignore[return-value]


def by_hand(bank: Any, expert: int, x_D: Tensor) -> tuple[Tensor, Tensor]:
    """One token through one expert, spelled out from the parameters: input and output of down_proj."""
    name = "gate_up_proj" if bank.has_gate else "up_proj"
    up, down = getattr(bank, name)[expert], bank.down_proj[expert]
    up_U = x_D @ up if bank.is_transposed else up @ x_D
    if bank.has_bias:
        up_U = up_U + getattr(bank, f"{name}_bias")[expert]
    inner_F = bank._apply_gate(up_U[None])[0] if bank.has_gate else bank.act_fn(up_U)
    y_D = inner_F @ down if bank.is_transposed else down @ inner_F
    return inner_F, y_D + bank.down_proj_bias[expert] if bank.has_bias else y_D


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tap_sees_each_token_and_expert_as_a_loop_by_hand_does(family: str) -> None:
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    calls: list[ExpertCall] = []
    with make_tapped(model, lambda call: calls.extend(call.each())) as banks:
        logits(model)
    for bank in banks:
        x_TD, index_TK, weight_TK = eager_outputs(model, bank)
        expected = {
            (token, int(expert)): (by_hand(bank.module, int(expert), x_TD[token])[1], weight_TK[token, slot])
            for token in range(len(x_TD))
            for slot, expert in enumerate(index_TK[token])
        }
        seen = {
            (int(token), call.expert): (call.output_ND[row], call.weight_N[row])
            for call in calls
            if call.layer == bank.layer and call.expert != "shared"
            for row, token in enumerate(call.token_N)
        }
        assert seen.keys() == expected.keys()
        for where, (output_D, weight) in expected.items():
            torch.testing.assert_close(seen[where][0], output_D, atol=1e-5, rtol=1e-5)  # type: ignore[index]
            assert float(seen[where][1]) == pytest.approx(float(weight), rel=1e-5)  # type: ignore[index]


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen2_moe", "glm4_moe", "granitemoeshared"])
@torch.no_grad()
def test_tap_sees_the_shared_expert(family: str) -> None:
    model = tiny_model(family)
    expected: list[Tensor] = []
    banks = find_banks(model)
    handles = [
        bank.shared_down.register_forward_hook(lambda _, __, y: expected.append(y.flatten(0, -2).clone()))
        for bank in banks
        if bank.shared_down is not None
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    calls: list[ExpertCall] = []
    with make_tapped(model, lambda call: calls.extend(call.each())):
        logits(model)
    shared = [call.output_ND for call in calls if call.expert == "shared"]
    assert len(expected) == len(shared) == len(banks)
    for ours, theirs in zip(shared, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_silence_equals_zeroed_weights(family: str) -> None:
    model = tiny_model(family)
    bank = find_banks(model)[-1]
    experts = [(bank.layer, 0), (bank.layer, 2)]
    if bank.shared_down is not None:
        experts.append((bank.layer, "shared"))  # type: ignore[arg-type]
    before = logits(model)
    with silenced(model, experts):
        silent = logits(model)
    with silenced(model, experts), make_tapped(model, lambda call: None):
        silent_and_tapped = logits(model)
    assert torch.equal(logits(model), before)
    zeroed = copy.deepcopy(model)
    zero_experts(zeroed, experts)
    expected = logits(zeroed)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(silent, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(silent_and_tapped, expected, atol=2e-6, rtol=1e-5)
    changed = [
        name for name, tensor in zeroed.state_dict().items() if not torch.equal(tensor, model.state_dict()[name])
    ]
    assert all(name.startswith(bank.path.rpartition(".")[0]) for name in changed)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_edit_equals_edited_weights(family: str) -> None:
    model = tiny_model(family)
    bank = find_banks(model)[-1]
    if bank.module.has_post_expert_norm:  # type: ignore[truthy-bool]
        pytest.skip("the norm after the expert makes doubling the weight something else")

    reached = int(eager_outputs(model, bank)[1].flatten()[0])

    def twice(x_ND: Tensor) -> Tensor:
        module = bank.module
        return 2 * expert_down(module, reached, expert_inner(module, expert_up(module, reached, x_ND)))

    with make_edited(model, {(bank.layer, reached): twice}):
        edited = logits(model)
    with make_edited(model, {(bank.layer, reached): twice}), make_tapped(model, lambda call: None):
        edited_and_tapped = logits(model)
    doubled = copy.deepcopy(model)
    module: Any = find_banks(doubled)[-1].module
    module.down_proj[reached] *= 2
    if module.has_bias:
        module.down_proj_bias[reached] *= 2
    expected = logits(doubled)
    assert (expected - logits(model)).abs().max() > 1e-4
    torch.testing.assert_close(edited, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(edited_and_tapped, expected, atol=2e-6, rtol=1e-5)


def test_dense_first_layers_keep_their_numbers() -> None:
    assert [bank.layer for bank in find_banks(tiny_model("deepseek_v2"))] == [1, 2]
    assert [bank.layer for bank in find_banks(tiny_model("mixtral"))] == [0, 1, 2]


def test_nested_blocks_put_the_outer_one_back() -> None:
    model = tiny_model("mixtral")
    outer, inner = [(1, 0)], [(2, 1)]
    with silenced(model, outer):
        alone = logits(model)
        with silenced(model, inner):
            both = logits(model)
        assert torch.equal(logits(model), alone)
    with silenced(model, outer + inner):
        assert torch.equal(logits(model), both)


def test_an_error_inside_the_block_leaves_the_model_as_it_was() -> None:
    model = tiny_model("mixtral")
    before, implementation = logits(model), model.config._experts_implementation
    with pytest.raises(RuntimeError, match="stop"), silenced(model, [(1, 0)]):
        raise RuntimeError("stop")
    assert model.config._experts_implementation == implementation
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ((0, 3), "L0E3 is not in the model (MoE layers are 1..2)"),
        ((1, 8), "L1E8 is not in the model (layer 1 has experts 0..7)"),
        ((9, "shared"), "L9shared"),
    ],
)
def test_an_expert_that_does_not_exist_is_named(key: Any, message: str) -> None:
    with pytest.raises(ExpertsError) as error, silenced(tiny_model("deepseek_v2"), [key]):
        pass
    assert message in str(error.value)


def test_a_missing_shared_expert_is_named() -> None:
    with pytest.raises(ExpertsError, match="has no shared expert"):
        zero_experts(tiny_model("mixtral"), [(1, "shared")])


def test_a_dense_model_is_refused_by_name() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ModelError, match="llama has no routed experts") as caught:
        find_banks(LlamaForCausalLM(config), "base")
    assert caught.value.field == "base"


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
@pytest.mark.parametrize("silent", [False, True])
@torch.no_grad()
def test_rows_of_all_experts_at_once_are_those_of_one_after_the_other(
    family: str, silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path for a GPU, where all rows come in one tensor, run here on a CPU."""
    model = tiny_model(family)
    layer = find_banks(model)[-1].layer

    def tapped() -> tuple[Tensor, list[ExpertCall]]:
        calls: list[ExpertCall] = []
        with silenced(model, [(layer, 1)] if silent else []), make_tapped(model, lambda c: calls.extend(c.each())):
            return logits(model), calls

    expected, expected_calls = tapped()
    pieces: list[int] = []

    def at_once(
        module: nn.Module, x_TD: Tensor, expert_R: Tensor, token_R: Tensor, finish: Any, **_: Any
    ) -> Iterator[Any]:
        def counted(piece: Piece, rows: slice) -> Any:
            pieces.append(len(piece.output_ND))
            return finish(piece, rows)

        yield from grouped(module, x_TD, expert_R, token_R, counted)

    monkeypatch.setattr(implementation, "looped", at_once)
    found, calls = tapped()
    assert len(pieces) == len(find_banks(model))
    assert (found - expected).abs().max() <= _tolerance(family) * max(1.0, float(expected.abs().max()))
    assert [(call.layer, call.expert) for call in calls] == [(call.layer, call.expert) for call in expected_calls]
    assert not (silent and any((call.layer, call.expert) == (layer, 1) for call in calls))
    for call, other in zip(calls, expected_calls, strict=True):
        assert torch.equal(call.token_N, other.token_N)
        for name in ("inner_NF", "output_ND", "weight_N"):
            torch.testing.assert_close(getattr(call, name), getattr(other, name), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_tap_hears_what_experts_write_and_not_what_edits_make_of_it() -> None:
    model = tiny_model("deepseek_v2")
    layer = find_banks(model)[-1].layer

    def heard() -> list[Tensor]:
        calls: list[ExpertCall] = []
        with make_tapped(model, lambda call: calls.extend(call.each())):
            logits(model)
        return [call.output_ND for call in calls if call.layer == layer]

    expected = heard()
    with make_edited(model, {(layer, 1): torch.zeros_like, (layer, 2): torch.ones_like}):
        found = heard()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@torch.no_grad()
def test_a_call_is_gone_through_once() -> None:
    with (
        make_tapped(model := tiny_model("deepseek_v2"), lambda call: [*call.pieces, *call.pieces]),
        pytest.raises(AssertionError, match="gone through once"),
    ):
        logits(model)


@torch.no_grad()
def test_what_a_tap_does_not_ask_for_is_computed_all_the_same() -> None:
    model = tiny_model("deepseek_v2")
    expected = logits(model)
    seen: list[Piece] = []
    with make_tapped(model, lambda call: seen.append(next(iter(call.pieces)))):
        found = logits(model)
    assert len(seen) == 2 * len(find_banks(model))  # routed and shared
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
