"""Exactness in every family, float32 and bfloat16: against a copy with `nn.Linear` experts, and in `train`."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from superexperts.adapters import lora
from superexperts.models.banks import find_banks
from superexperts.training import loop, train
from superexperts.training.train import TrainConfig
from tests.adapters.test_lora import ALPHA, TRANSPOSED, UNGATED, R, attach, logits, randomise
from tests.support.families import FAMILIES, tiny_model, tiny_tokens
from tests.training.test_train import byte_tokenizer, save_checkpoint
from tests.training.test_train_options import EIGHT, WEIGHTS

ALL = sorted(FAMILIES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
both = pytest.mark.parametrize("dtype", DTYPES)
every = pytest.mark.parametrize("family", ALL)
OWN_ACTIVATION = {"gpt_oss"}


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    """The trainer collects garbage after each run, a third of its time here: what is imported is none."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Unfused(nn.Module):
    """An experts bank as it was before transformers 5: a linear map for each projection of each expert, and a loop.

    The maps are called `3_up_proj`: PEFT takes `up_proj` for the old name of fused experts.
    """

    def __init__(self, family: str, bank: Any) -> None:
        super().__init__()
        self.family, self.count, self.act = family, len(bank.down_proj), getattr(bank, "act_fn", None)
        self.maps = nn.ModuleDict()
        for name in ("down_proj", "up_proj" if family in UNGATED else "gate_up_proj"):
            for expert, stored in enumerate(getattr(bank, name).detach()):
                weight = stored.T if family in TRANSPOSED else stored
                bias = getattr(bank, f"{name}_bias")[expert].detach() if family == "gpt_oss" else None
                halves = {name: slice(None)}
                if name == "gate_up_proj" and family == "gpt_oss":
                    halves = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
                elif name == "gate_up_proj":
                    middle = len(weight) // 2
                    halves = {"gate_proj": slice(middle), "up_proj": slice(middle, None)}
                for half, rows in halves.items():
                    linear = nn.Linear(weight.shape[1], len(weight[rows]), bias=bias is not None, dtype=weight.dtype)
                    linear.weight.data = weight[rows].clone()
                    if bias is not None:
                        linear.bias.data = bias[rows].clone()
                    self.maps[f"{expert}_{half}"] = linear

    def forward(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for expert in range(self.count):
            token_N, slot_N = torch.where(index_TK == expert)
            x_ND = x_TD[token_N]
            up_NF = self.maps[f"{expert}_up_proj"](x_ND)  # before the gate: the order of draws in dropout
            if self.family in UNGATED:
                inner_NF = self.act(up_NF)  # type: ignore[misc]
            elif self.family in OWN_ACTIVATION:
                gate_NF = self.maps[f"{expert}_gate_proj"](x_ND).clamp(max=7)
                inner_NF = (up_NF.clamp(-7, 7) + 1) * (gate_NF * torch.sigmoid(gate_NF * 1.702))
            else:
                inner_NF = self.act(self.maps[f"{expert}_gate_proj"](x_ND)) * up_NF  # type: ignore[misc]
            y_ND = self.maps[f"{expert}_down_proj"](inner_NF) * weight_TK[token_N, slot_N, None]
            y_TD.index_add_(0, token_N, y_ND.to(y_TD.dtype))
        return y_TD


def everywhere(family: str) -> dict[str, Any]:
    """Settings by which every token goes to every expert, so that no rounding can send it elsewhere."""
    count = 4 if FAMILIES[family].get("num_local_experts") == 4 else 8
    return {"num_experts_per_tok": count} | ({"topk_group": 2} if family == "deepseek_v3" else {})


@both
@every
def test_output_and_gradients_are_those_of_stock_lora_on_unfused_experts(family: str, dtype: str) -> None:
    """Stock PEFT on `nn.Linear`s, in the same precision, with the same dropout."""
    model, copy = (tiny_model(family, DTYPES[dtype], **everywhere(family)) for _ in range(2))
    plain = logits(model).float()
    banks = find_banks(model)
    keys: list[Any] = [(banks[0].layer, 2), (banks[-1].layer, 0), (banks[-1].layer, 3)]
    paths = {layer: bank.path for bank in banks for layer in [bank.layer]}
    for path in paths.values():
        copy.set_submodule(path, Unfused(family, copy.get_submodule(path)))
    names = {
        f"{paths[layer]}.lora_{letter}.default.{expert}_{part}": f"{paths[layer]}.maps.{expert}_{part}"
        for layer, expert in keys
        for part in ("gate_proj", "up_proj", "down_proj")
        for letter in "AB"
        if not (family in UNGATED and part == "gate_proj")
    }
    adapted = attach(model, keys, dropout=0.3)
    fresh = logits(adapted).float()
    limit = 1e-6 if dtype == "float32" else 0.02
    assert (fresh - plain).norm() <= limit * plain.norm()  # B = 0
    config = LoraConfig(
        r=R, lora_alpha=ALPHA, lora_dropout=0.3, target_modules=list(set(names.values())), task_type="CAUSAL_LM"
    )
    with lora.quiet():
        stock = get_peft_model(copy, config)
    randomise(adapted)
    ours = {name.removeprefix("base_model.model."): p for name, p in adapted.named_parameters() if p.requires_grad}
    assert ours.keys() == names.keys()
    theirs = {
        name: stock.get_submodule(f"base_model.model.{path}.lora_{name.split('.lora_')[1][0]}.default").weight
        for name, path in names.items()
    }
    found = []
    for one, parameters in ((adapted, ours), (stock, theirs)):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(ours[name])
        one.train()
        torch.manual_seed(7)
        output = one(input_ids=tiny_tokens(4, 24), use_cache=False).logits.float()
        output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
        found.append(output)
    limit = 2e-6 if dtype == "float32" else 0.03  # the sum over experts is rounded in another order
    assert (found[0] - found[1]).norm() <= limit * found[1].norm()
    for name, parameter in ours.items():
        assert parameter.grad is not None
        expected = theirs[name].grad
        assert expected.any(), name
        assert (parameter.grad - expected).norm() <= 4 * limit * expected.norm(), name


@both
@every
def test_training_accumulates_resumes_and_leaves_every_weight_alone(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = dtype == "float32"
    settings = {} if exact else everywhere(family)
    (tmp_path / "rows.json").write_text(json.dumps(EIGHT), encoding="utf-8")
    # In training phimoe's own router adds noise to what it sees, which no two orders of rows draw alike.
    still: dict[str, Any] = {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0} if family == "phimoe" else {}
    base = save_checkpoint(tmp_path / "base", family, **settings, **still)
    model = tiny_model(family, DTYPES[dtype], vocab_size=259, **settings, **still)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = find_banks(model)[0].layer
    tokenizer = byte_tokenizer()

    def trained(out: str, **options: Any) -> tuple[dict[str, Tensor], Any]:
        config = TrainConfig(
            model=str(base), data=tmp_path / "rows.json", out=tmp_path / out, device="cpu", experts=f"L{layer}E0",
            r=4, dropout=0, learning_rate=0.01, epochs=2, adapter_dtype="float32", allow_unexposed=True,
            checkpoint_steps=1, **options,
        )  # fmt: skip
        result = train.train(config, load=lambda *_, **__: model, tokenizer=tokenizer)
        return load_file(tmp_path / out / WEIGHTS), {name: x for name, x in result.items() if name != "out"}

    gradients: list[Tensor] = []

    def note(self: Any, *_: Any, **__: Any) -> None:
        own = [p.grad.flatten() for p in self._adapted.parameters() if p.grad is not None]
        gradients.append(torch.cat(own).clone())

    monkeypatch.setattr(loop._Keeper, "on_pre_optimizer_step", note)
    one, result = trained("1x8", batch_size=1, accumulation=8)
    eight, other = trained("8x1", batch_size=8)
    assert [loss for _, loss in result["loss"]] == pytest.approx(
        [loss for _, loss in other["loss"]], rel=1e-5 if exact else 5e-3
    )
    # The gradient of the first step: what Adam makes of it is little more than its signs.
    first, second = gradients[0], gradients[2]
    assert first.any()
    limit = 1e-5 if exact else 0.2 if family == "phimoe" else 0.02  # phimoe's two experts for a token are two always
    assert (first - second).norm() <= limit * second.norm()
    if exact:
        assert all((tensor - eight[name]).norm() <= 1e-3 * eight[name].norm() for name, tensor in one.items())

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._Keeper, "on_step_begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained("resumed", batch_size=1, accumulation=8)
    resumed, again = trained("resumed", batch_size=1, accumulation=8, resume=True)
    assert again == result
    assert all(torch.equal(tensor, one[name]) for name, tensor in resumed.items())
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
