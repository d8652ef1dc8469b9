"""The row that the paper's reference profiler looks at.

That code (arXiv 2507.23279, eval_utils.py) runs one sequence at a time. A hook on each expert's down_proj reads
`output[0]`, the first row that the expert is given. Which token that row belongs to follows from the order in which
the layer of transformers 4.51 gathers an expert's tokens.

Shape suffixes: T tokens of a batch, R rows (a token at one of its experts, sorted by expert and then by token).
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["is_gathered_by_rank", "reference_rows"]

_BY_POSITION = {"deepseek_v2", "deepseek_v3"}
"""Model types with tokens of an expert in the order of the text: transformers 4.51 indexes a token x slot mask, and the
code in DeepSeek's own repositories sorts the flat list of expert ids."""


def is_gathered_by_rank(model_type: str) -> bool:
    """Whether an expert's tokens come in the order of its rank among the token's experts, and only then by position.

    This is how Qwen3-MoE, Mixtral and the other families of transformers 4.51 with the same loop do it: they index a
    slot x token mask. The reference code runs no families beyond Qwen3-MoE, Mixtral and DeepSeek; all others count as
    families with that loop.
    """
    return model_type not in _BY_POSITION


def reference_rows(first_R: Tensor, rank_R: Tensor, token_R: Tensor) -> Tensor:
    """Marks the rows that the hook reads in layers that gather by rank: in each group of consecutive rows, the row of
    lowest rank, and of these the first. Bool [R].

    `first_R` marks the first row of each group, `rank_R` is the expert's place among the token's experts, from 0, and
    `token_R` the token's place in the batch.
    """
    order_R = rank_R * (token_R.max() + 1) + token_R
    group_R = first_R.cumsum(0) - 1
    lowest_R = order_R.scatter_reduce(0, group_R, order_R, "amin", include_self=False)
    return order_R == lowest_R[group_R]
