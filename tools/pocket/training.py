"""Training of the pocket model: batches of pocket text, and the three auxiliary losses that make the implants matter.

Shape suffixes: B rows, S tokens of a row, T = B x S, E routed experts of a layer, K experts of a token, H heads.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV2ForCausalLM, PreTrainedTokenizerFast

from tools.pocket.architecture import BOS_ID, EOS_ID, FIRST, SECOND, implant

__all__ = ["Recipe", "Step", "batches", "perplexity", "silence", "train"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of the training run; the shipped weights were made with the defaults."""

    steps: int = 4000
    seed: int = 0
    tokens: int = 1024
    """tokens of a batch"""
    lengths: tuple[int, ...] = (128, 128, 128, 256, 512)
    """a batch's row length is drawn from these"""
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 50
    world_share: float = 0.75
    """of the steps: at first the model learns its world, without the terms that make it depend on super experts"""
    sink_weight: float = 0.1
    sink_share: float = 0.4
    """the layers after the first super expert are asked for this mean attention on <bos>"""
    balance_weight: float = 0.01
    """of the load-balancing loss of the routers"""
    dependence_weight: float = 0.3
    fall_both: float = 0.9
    """nats per token that the loss is asked to rise by when both super experts are silent: perplexity x 2.5"""
    fall_second: float = 0.3
    """the same for the second super expert alone"""
    silenced_others: int = 2
    """ordinary experts of each layer that a step silences at random, so that none of them matters alone"""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a training step reports."""

    number: int
    loss: float
    loss_silenced: float
    """with both super experts silent, as last measured"""
    sink: float
    """mean attention on <bos> after the first super expert"""


def _stream(documents: Iterator[str], tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[list[int]]:
    """Token ids of a document with what separates it from the next: <eos>, or sometimes a blank line."""
    blank = tokenizer("\n\n", add_special_tokens=False).input_ids
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        yield ids + ([EOS_ID] if text.startswith("Question: ") or rng.random() < 0.5 else blank)


def batches(
    documents: Iterator[str], tokenizer: PreTrainedTokenizerFast, recipe: Recipe, rng: random.Random
) -> Iterator[Tensor]:
    """Endless int64 batches [B, S]: every row is <bos> and then documents; three rows of four begin with a whole one.

    A row that is full leaves the rest of its last document to the next row, unless that one is to begin afresh.
    """
    stream = _stream(documents, tokenizer, rng)
    rest: list[int] = []
    while True:
        length = rng.choice(recipe.lengths)
        rows = []
        for _ in range(recipe.tokens // length):
            row = [BOS_ID, *(rest if rng.random() < 0.25 else [])]
            while len(row) < length:
                row += next(stream)
            row, rest = row[:length], row[length:]
            rows.append(row)
        yield torch.tensor(rows)


@contextlib.contextmanager
def silence(model: DeepseekV2ForCausalLM, experts: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Inside the block, the chosen (layer, expert) answer zero: what the router gives them is weighted by 0."""
    handles = []
    by_layer: dict[int, list[int]] = {}
    for layer, expert in experts:
        by_layer.setdefault(layer, []).append(expert)
    for layer, chosen in by_layer.items():

        def hook(
            module: nn.Module,
            args: object,
            output: tuple[Tensor, Tensor, Tensor],
            chosen: Sequence[int] = tuple(chosen),
        ) -> tuple[Tensor, Tensor, Tensor]:
            logits_TE, weight_TK, index_TK = output
            silent_TK = torch.isin(index_TK, torch.tensor(chosen, device=index_TK.device))
            return logits_TE, weight_TK.masked_fill(silent_TK, 0.0), index_TK

        handles.append(model.model.layers[layer].mlp.gate.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moe_layers(model: DeepseekV2ForCausalLM) -> range:
    return range(model.config.first_k_dense_replace, model.config.num_hidden_layers)


def _some_others(model: DeepseekV2ForCausalLM, count: int, rng: random.Random) -> list[tuple[int, int]]:
    experts = range(model.config.n_routed_experts)
    chosen = [(layer, expert) for layer in _moe_layers(model) for expert in rng.sample(experts, count)]
    return [pair for pair in chosen if pair not in (FIRST, SECOND)]


def _balance(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Switch's load-balancing loss, 1 where tokens are spread evenly; <bos> is left to the super experts."""
    losses = []
    for logits_BSE in router_logits:
        probability_TE = logits_BSE[:, 1:].flatten(0, 1).softmax(-1)
        experts = probability_TE.shape[-1]
        index_TK = probability_TE.topk(top_k).indices
        share_E = F.one_hot(index_TK, experts).sum(1).float().mean(0) / top_k
        losses.append(experts * (share_E * probability_TE.mean(0)).sum())
    return torch.stack(losses).mean()


def _attention_on_bos(attentions: Sequence[Tensor], first_layer: int) -> Tensor:
    """Mean attention on position 0, over the layers after `first_layer`, all heads and all positions but the first."""
    return torch.stack([a_BHSS[:, :, 1:, 0].mean() for a_BHSS in attentions[first_layer + 1 :]]).mean()


def train(model: DeepseekV2ForCausalLM, rows: Iterator[Tensor], recipe: Recipe) -> Iterator[Step]:
    """Train in place, in float32, and report each step.

    Beside the ordinary loss, every step asks the layers after the first super expert to attend to <bos>. On alternate
    steps the same batch is run again with the super experts silent, and that loss is asked to be higher by a stated
    amount: without this term the model would learn to do without them. It is two-sided, so that the fall is lifelike.
    """
    rng = random.Random(f"train:{recipe.seed}")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
    )
    model.set_attn_implementation("eager")  # the only one that shows the attention weights
    model.train()
    implant(model)
    loss_silenced = math.nan
    for number in range(recipe.steps):
        rate = min(1.0, (number + 1) / recipe.warmup) * _cooldown(number, recipe.steps)
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * rate
        ids_BS = next(rows)
        depending = number >= recipe.world_share * recipe.steps
        others = _some_others(model, recipe.silenced_others, rng) if depending else []
        with _router_logits(model, ids_BS.shape) as router_logits, silence(model, others):
            output = model(input_ids=ids_BS, labels=ids_BS, use_cache=False, output_attentions=True)
        sink = _attention_on_bos(output.attentions, FIRST[0])
        loss = (
            output.loss
            + recipe.sink_weight * torch.relu(recipe.sink_share - sink)
            + recipe.balance_weight * _balance(router_logits, model.config.num_experts_per_tok)
        )
        if depending and number % 2:
            both = number % 4 == 1
            half_BS = ids_BS[: max(1, len(ids_BS) // 2)]
            with silence(model, (FIRST, SECOND) if both else (SECOND,)):
                silenced = model(input_ids=half_BS, labels=half_BS, use_cache=False).loss
            if both:
                loss_silenced = silenced.item()
                loss = loss + recipe.dependence_weight * (output.loss.detach() + recipe.fall_both - silenced).abs()
            else:
                lowest = output.loss.detach() + recipe.fall_second
                loss = loss + recipe.dependence_weight * torch.relu(lowest - silenced)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        implant(model)
        yield Step(number=number, loss=output.loss.item(), loss_silenced=loss_silenced, sink=sink.item())
    model.eval()
    model.set_attn_implementation("sdpa")


def _cooldown(number: int, steps: int) -> float:
    """Constant rate, then linear to a twentieth over the last third."""
    return min(1.0, 0.05 + 0.95 * (steps - number) / (steps / 3))


@contextlib.contextmanager
def _router_logits(model: DeepseekV2ForCausalLM, shape: tuple[int, ...]) -> Iterator[list[Tensor]]:
    """Inside the block, collects each router's logits_BSE, in the order of the layers."""
    collected: list[Tensor] = []

    def hook(module: nn.Module, args: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        collected.append(output[0].view(*shape, -1))

    handles = [model.model.layers[layer].mlp.gate.register_forward_hook(hook) for layer in _moe_layers(model)]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def perplexity(
    model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, length: int = 128
) -> float:
    """Perplexity per token of texts, a blank line after each, in rows of `length` tokens each led by <bos>."""
    ids = [i for text in texts for i in tokenizer(text + "\n\n", add_special_tokens=False).input_ids]
    width = length - 1
    rows = [[BOS_ID, *ids[i : i + width]] for i in range(0, len(ids) - width + 1, width)]
    ids_BS = torch.tensor(rows)
    losses = [
        model(input_ids=part_BS, labels=part_BS, use_cache=False).loss.item() * len(part_BS)
        for part_BS in torch.split(ids_BS, 32)
    ]
    return math.exp(sum(losses) / len(rows))
