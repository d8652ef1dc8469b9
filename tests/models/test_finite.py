"""A broken model is not a result: NaN and infinite numbers end a run, with the place where they arise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from superexperts.core.errors import ModelError
from superexperts.evaluation.ask import ask
from superexperts.evaluation.perplexity import measured_perplexity
from superexperts.models.banks import find_banks
from superexperts.models.finite import first_not_finite

IDS = torch.arange(3, 67)


@pytest.fixture
def broken(checkpoint: Path) -> Callable[..., Any]:
    """A model of which one number is not finite."""

    def make(kind: str, value: float) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        with torch.no_grad():
            if kind == "head":
                model.lm_head.weight[5, 0] = value
            elif kind == "embedding":
                model.model.embed_tokens.weight[7, 3] = value
            elif kind == "attention":
                next(model.model.layers[2].self_attn.parameters()).view(-1)[0] = value
            else:
                [bank] = [bank for bank in find_banks(model) if bank.layer == 2]
                bank.module.down_proj[:, 0, 0] = value  # whichever experts are reached
        return model

    return make


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("expert", "they arise first in layer 2, in the output of expert L2E"),
        ("attention", "they arise first in layer 2, outside its experts"),
        ("embedding", "they arise in the embeddings"),
        ("head", "every layer's output is finite, so they arise in the output head"),
    ],
)
def test_the_place_is_named(kind: str, said: str, value: float, broken: Callable[..., Any]) -> None:
    assert first_not_finite(broken(kind, value), IDS).startswith(said)


@pytest.mark.parametrize("protocol", ["generative", "loglikelihood"])
def test_an_evaluation_ends(
    protocol: str, broken: Callable[..., Any], tokenizer: PreTrainedTokenizerBase, data: Path
) -> None:
    model = broken("expert", float("nan"))
    how: dict[str, Any] = {"tasks": ["boolq"], "data_dir": data, "limit": 3, "max_new_tokens": 8, "protocol": protocol}
    with pytest.raises(ModelError, match="model: its logits are not finite numbers: .* expert L2E.*float32"):
        ask(model, tokenizer, **how)
    with pytest.raises(ModelError, match="in the output of expert L2E"):
        measured_perplexity(model, IDS[None], description="x")


def test_a_whole_model_is_left_alone(model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Path) -> None:
    [answer] = ask(model, tokenizer, tasks=["boolq"], data_dir=data, limit=1, max_new_tokens=8)["boolq"]
    assert answer.response
