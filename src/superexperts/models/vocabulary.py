"""Whether a tokenizer and a model fit each other: tokens that the model has no row of embeddings for."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from superexperts.checkpoints.source import ModelSource
from superexperts.core.errors import ModelError

__all__ = ["fitted"]


def fitted(tokenizer: PreTrainedTokenizerBase, source: ModelSource, rows: int | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model with so many rows of embeddings (None: not known).

    `ModelError` if it makes nothing of text. One that knows more tokens than the model has rows raises it when text
    gives such a token, because models are published with tokens beyond their rows that no text gives (Gemma 3).
    """
    if not tokenizer("A text.", add_special_tokens=False).input_ids:
        raise ModelError(
            f"{source.name!r} has no tokenizer files: the tokenizer that loads knows no word; add them",
            field=source.field,
        )
    if rows is None or len(tokenizer) <= rows:
        return tokenizer
    kind: Any = type(tokenizer)

    def encode(self: Any, *arguments: Any, **settings: Any) -> Any:
        encoded = kind._encode_plus(self, *arguments, **settings)
        largest = _largest(encoded["input_ids"])
        if largest >= rows:
            raise ModelError(
                f"{source.name!r}: its tokenizer has {len(self):,} tokens, its model {rows:,} rows of embeddings, and "
                f"the text holds token {largest:,} ({self.convert_ids_to_tokens(largest)!r}); resize the model's "
                "embeddings, or give it the tokenizer that it was trained with",
                field=source.field,
            )
        return encoded

    # The one method that every way of encoding goes through. The class keeps its name, which is saved with it.
    tokenizer.__class__ = type(kind.__name__, (kind,), {"_encode_plus": encode, "__module__": kind.__module__})
    return tokenizer


def _largest(ids: Any) -> int:
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, int):
        return ids
    return max(map(_largest, ids), default=-1)
