"""One bank's own parameters and arithmetic: what differs between families in how their experts are laid out.

`banks` finds the banks, and `hooks` runs them; both build on this module.

Shape suffixes: T tokens, K experts per token, R = T x K rows sorted by expert, E experts in the bank, N tokens routed
to one expert, D hidden size, F intermediate size of an expert, U width of its up projection (2F with a gate, F
without), O outputs, I inputs.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

from superexperts.core.types import ExpertId

__all__ = [
    "DOWN",
    "GATE",
    "IN_FLIGHT",
    "UP",
    "WORKERS",
    "BankCall",
    "ExpertCall",
    "Piece",
    "Weights",
    "down_bias",
    "down_weight",
    "expert_down",
    "expert_inner",
    "expert_norm",
    "expert_up",
    "grouped",
    "in_out_features",
    "inputs_first",
    "is_bank",
    "join_gate_up",
    "looped",
    "projections",
    "ready",
    "shared_down",
    "split_projections",
    "split_up",
    "stock_forward",
    "up_name",
    "up_projections",
]

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"

WORKERS = 2
"""Experts that a CPU computes at the same time, each on its share of the cores, while other experts are read from disk.
With all cores on one expert, every operation would wait for the core that is busy reading."""
ROWS = 32
"""In 16 bits a CPU pads each expert's rows to a multiple of this. oneDNN compiles code for every number of rows that it
has not seen before, which takes twice as long as the product itself (docs/benchmarks.md)."""
IN_FLIGHT = 3 * WORKERS
"""Experts in progress at most: some are being computed while the caller uses the result of another."""

Made = TypeVar("Made")
"""What the caller computes from a piece."""
Weights = Callable[[Sequence[int]], Iterator[Mapping[str, Tensor]]]
"""Indices of the experts that some token reached -> for each, its matrices by parameter name (`up_name`, down_proj), in
the layout of the bank's parameters. The memory of a yielded expert is reused after `IN_FLIGHT` more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BankCall:
    """What a layer's routed experts, or its shared one, do in one forward pass, a row for each token at each expert.

    The routing is known before anything is computed. The rows themselves come piece by piece, as they are computed.
    The tensors are the model's own, detached; do not write to them.
    """

    layer: int
    experts: tuple[ExpertId, ...]
    """Every expert of the bank; `expert_R` holds indices into this."""
    expert_R: Tensor
    """int64, ascending."""
    token_R: Tensor
    """Row of each token in the flattened batch (batch index x sequence length + position), int64; ascending within an
    expert."""
    rank_R: Tensor
    """Place of the expert in the list that the router gave the token, from 0, int64; zeros for a shared expert."""
    weight_R: Tensor
    """Routing weight; ones for a shared expert."""
    made: Callable[[Callable[[Piece], Any]], Iterator[Any]]
    """Applies a function to each piece, in order of the rows, on the thread that computed it, and yields the results.
    It can be called once. Pieces that the caller does not consume are computed all the same."""

    @property
    def pieces(self) -> Iterator[Piece]:
        """The pieces themselves."""
        return self.made(lambda piece: piece)

    def each(self) -> Iterator[ExpertCall]:
        """Every expert that some token reached, in order."""
        done = 0
        for piece in self.pieces:
            rows = slice(done, done := done + len(piece.output_ND))
            expert_N = self.expert_R[rows]
            experts, counts = torch.unique_consecutive(expert_N, return_counts=True)
            columns = (self.token_R[rows], piece.inner_NF, piece.output_ND, self.weight_R[rows])
            parts = zip(*(torch.split(column, counts.tolist()) for column in columns), strict=True)
            for expert, (token_N, inner_NF, output_ND, weight_N) in zip(experts.tolist(), parts, strict=True):
                yield ExpertCall(
                    layer=self.layer,
                    expert=self.experts[expert],
                    token_N=token_N,
                    inner_NF=inner_NF,
                    output_ND=output_ND,
                    weight_N=weight_N,
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Some rows of a `BankCall`, of whole experts: each expert's rows are in one piece."""

    inner_NF: Tensor
    """Input of down_proj, in the model's dtype."""
    output_ND: Tensor
    """Output of down_proj, bias included, before any norm and before the routing weight; in the model's dtype."""
    is_one_expert: bool


def ready(*pieces: Piece) -> Callable[[Callable[[Piece], Any]], Iterator[Any]]:
    """`BankCall.made` for pieces that are already computed."""
    return lambda measure: map(measure, pieces)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertCall:
    """One expert's part of a `BankCall`."""

    layer: int
    expert: ExpertId
    token_N: Tensor
    inner_NF: Tensor
    output_ND: Tensor
    weight_N: Tensor


def is_bank(module: nn.Module) -> bool:
    """Whether `use_experts_implementation` made this module: it alone writes these attributes on an instance."""
    return vars(module).keys() >= {"has_gate", "has_bias", "is_transposed", "is_concatenated"}


def down_weight(bank: nn.Module) -> Tensor:
    """down_proj [E, D, F], or [E, F, D] if `inputs_first`."""
    return cast(Tensor, bank.down_proj)


def down_bias(bank: nn.Module) -> Tensor | None:
    """Bias of down_proj [E, D]; None in families without one."""
    return cast(Tensor, bank.down_proj_bias) if cast(Any, bank).has_bias else None


def inputs_first(bank: nn.Module) -> bool:
    """Whether the bank's parameters are [E, I, O] instead of [E, O, I]."""
    return bool(cast(Any, bank).is_transposed)


def in_out_features(bank: nn.Module, name: str) -> tuple[int, int]:
    """(inputs, outputs) of the linear maps in one of the bank's parameters."""
    first, second = cast(Tensor, getattr(bank, name)).shape[1:]
    return (first, second) if inputs_first(bank) else (second, first)


def shared_down(siblings: Iterable[nn.Module], bank: nn.Module) -> nn.Linear | None:
    """down_proj of a shared expert: of the bank's siblings, the last linear map onto the hidden size of one that is
    an MLP (it also has a linear map from the hidden size to that map's input)."""
    hidden = in_out_features(bank, DOWN)[1]
    for sibling in siblings:
        if any(module is bank for module in sibling.modules()):  # the bank, or PEFT's wrapper around it
            continue
        linears = [module for module in sibling.modules() if isinstance(module, nn.Linear)]
        downs = [linear for linear in linears if linear.out_features == hidden]
        if downs and any(up.in_features == hidden and up is not downs[-1] for up in linears):
            return downs[-1]
    return None


def up_projections(bank: nn.Module) -> tuple[str, ...]:
    """The projections before the activation: gate_proj and up_proj, or up_proj alone in families without a gate."""
    return (GATE, UP) if cast(Any, bank).has_gate else (UP,)


def up_name(bank: nn.Module) -> str:
    """Name of the parameter that holds the up projection, fused with the gate where there is one."""
    return "gate_up_proj" if GATE in up_projections(bank) else UP


def expert_up(bank: nn.Module, expert: int, x_ND: Tensor) -> Tensor:
    """First projection of one expert -> [N, U]."""
    return _linear(bank, up_name(bank), expert, x_ND)


def expert_inner(bank: nn.Module, up_NU: Tensor) -> Tensor:
    """Activation, and gate where there is one: [N, U] -> [N, F]."""
    module = cast(Any, bank)
    return cast(Tensor, module._apply_gate(up_NU) if GATE in up_projections(bank) else module.act_fn(up_NU))


def expert_down(bank: nn.Module, expert: int, inner_NF: Tensor) -> Tensor:
    """down_proj of one expert -> [N, D]."""
    return _linear(bank, "down_proj", expert, inner_NF)


def expert_norm(bank: nn.Module, output_ND: Tensor) -> Tensor:
    """The norm that a few families apply to each expert's output."""
    module = cast(Any, bank)
    return cast(Tensor, module.post_expert_norm(output_ND)) if module.has_post_expert_norm else output_ND


def _linear(bank: nn.Module, name: str, expert: int, x: Tensor, weight: Tensor | None = None) -> Tensor:
    weight = getattr(bank, name)[expert] if weight is None else weight
    y = F.linear(x, weight.T if inputs_first(bank) else weight)
    # The bias is added to the rounded product, as the families' own loops do: fused, bfloat16 differs in the last bit.
    return y + getattr(bank, f"{name}_bias")[expert] if cast(Any, bank).has_bias else y


def grouped(
    bank: nn.Module, x_TD: Tensor, expert_R: Tensor, token_R: Tensor, finish: Callable[[Piece, slice], Made]
) -> Iterator[Made]:
    """Every expert on its own tokens, all rows as one piece, in two grouped matrix products, as the stock `grouped_mm`
    does it; rows are sorted by expert. Yields what `finish` makes of a piece and its rows."""
    has_bias = cast(Any, bank).has_bias
    ends_E = torch.bincount(expert_R, minlength=down_weight(bank).shape[0]).cumsum(0).to(torch.int32)

    def linear(name: str, x: Tensor) -> Tensor:
        bias = getattr(bank, f"{name}_bias")[expert_R] if has_bias else None
        weight = getattr(bank, name)
        return cast(Tensor, _grouped_linear(x, weight, ends_E, bias=bias, is_transposed=inputs_first(bank)))

    inner_RF = expert_inner(bank, linear(up_name(bank), x_TD[token_R]))
    piece = Piece(inner_NF=inner_RF, output_ND=linear(DOWN, inner_RF), is_one_expert=False)
    yield finish(piece, slice(0, len(expert_R)))


def looped(
    bank: nn.Module,
    x_TD: Tensor,
    expert_R: Tensor,
    token_R: Tensor,
    finish: Callable[[Piece, slice], Made],
    weights: Weights | None = None,
    workers: Executor | None = None,
) -> Iterator[Made]:
    """As `grouped`, an expert and a piece at a time; the bank's own `weights` unless others are given, of which not all
    need be in memory at once. `workers` compute and finish the next experts while the caller uses one."""
    reached, counts = (column.tolist() for column in torch.unique_consecutive(expert_R, return_counts=True))
    up = up_name(bank)
    own_weights: Iterable[Mapping[str, Tensor]]
    if weights is None:
        own_weights = ({name: getattr(bank, name)[expert] for name in (up, DOWN)} for expert in reached)
    else:
        own_weights = weights(reached)
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    rows = ROWS if x_TD.device.type == "cpu" and x_TD.dtype.itemsize == 2 else 1

    def compute(expert: int, end: int, token_N: Tensor, own: Mapping[str, Tensor]) -> Made:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):  # these modes belong to a thread
            padded = F.pad(token_N, (0, -len(token_N) % rows))
            # Padding repeats row 0; the extra rows are computed and dropped.
            inner = expert_inner(bank, _linear(bank, up, expert, x_TD.index_select(0, padded), own[up]))
            output = _linear(bank, DOWN, expert, inner, own[DOWN])
            piece = Piece(inner_NF=inner[: len(token_N)], output_ND=output[: len(token_N)], is_one_expert=True)
            return finish(piece, slice(end - len(token_N), end))

    jobs = zip(reached, itertools.accumulate(counts), torch.split(token_R, counts), own_weights, strict=True)
    if workers is None:
        yield from itertools.starmap(compute, jobs)
        return
    coming: collections.deque[Future[Made]] = collections.deque()
    for job in jobs:
        coming.append(workers.submit(compute, *job))
        if len(coming) == IN_FLIGHT:
            yield coming.popleft().result()
    while coming:
        yield coming.popleft().result()


def projections(bank: nn.Module, expert: int) -> dict[str, Tensor]:
    """One expert's gate_proj (where there is one), up_proj and down_proj [O, I], as views of the bank's own weights."""
    up, down = getattr(bank, up_name(bank)).data[expert], down_weight(bank).data[expert]
    return split_projections(bank, up_name(bank), up) | split_projections(bank, DOWN, down)


def split_projections(bank: nn.Module, name: str, own: Tensor) -> dict[str, Tensor]:
    """As `projections`, of one expert's own part of the parameter `name`, wherever that is."""
    # gpt_oss keeps its matrices transposed; everything outside this module sees [O, I].
    weight_OI = own.T if inputs_first(bank) else own
    return {DOWN: weight_OI} if name == DOWN else split_up(bank, weight_OI)


def join_gate_up(bank: nn.Module, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """[N, 2F] in the order that the bank's fused projection has."""
    if cast(Any, bank).is_concatenated:
        return torch.cat([gate_NF, up_NF], dim=-1)
    return torch.stack([gate_NF, up_NF], dim=-1).flatten(-2)


def split_up(bank: nn.Module, up_UN: Tensor) -> dict[str, Tensor]:
    """The rows [F, N] of each of `up_projections`, as views."""
    if GATE not in up_projections(bank):
        return {UP: up_UN}
    # Two conventions: gate rows first, then up rows; or alternating rows (gpt_oss).
    gate_FN, up_FN = up_UN.chunk(2) if cast(Any, bank).is_concatenated else (up_UN[0::2], up_UN[1::2])
    return {GATE: gate_FN, UP: up_FN}


def stock_forward(bank: nn.Module, stock: str, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The bank's forward by a stock implementation ("eager" is the family's own loop)."""
    # The decorator replaces `forward` by the lookup that led here, so the family's own loop is reached underneath it.
    eager = type(bank).forward.__wrapped__  # type: ignore[attr-defined]  # functools.wraps of the decorator keeps it
    return cast(Tensor, ALL_EXPERTS_FUNCTIONS.get_interface(stock, eager)(bank, x_TD, index_TK, weight_TK))
