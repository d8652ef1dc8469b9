"""Texts -> sequences of token ids of one length.

Shape suffixes: B sequences, L tokens of a sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from superexperts.core.errors import DataError, Field
from superexperts.data.corpora import WHOLE, corpus_texts

__all__ = ["bos_prefix", "corpus_sequences", "digest_ids", "pack", "reference_windows"]


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that the tokenizer puts before every text: [BOS] or []."""
    # Encoding "" shows what is really added; some tokenizers name a BOS and add none, and some add EOS.
    return [token for token in tokenizer("").input_ids if token != tokenizer.eos_token_id][:1]


def pack(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, *, corpus: str, tokens: int, seq_len: int) -> Tensor:
    """Packs texts, separated by blank lines, into full sequences -> int64 [tokens // seq_len, seq_len].

    Each sequence begins with BOS if the tokenizer uses one, so that each has its own attention sink. Nothing is padded,
    and no token is read twice. `DataError` that says how many tokens there are if `corpus` has too few.
    """
    prefix = bos_prefix(tokenizer)
    body = seq_len - len(prefix)
    count = tokens // seq_len
    separator = tokenizer("\n\n", add_special_tokens=False).input_ids
    sequences: list[list[int]] = []
    buffer: list[int] = []
    for text in texts:
        buffer += [*separator, *_ids(tokenizer, text)] if buffer or sequences else _ids(tokenizer, text)
        while len(buffer) >= body and len(sequences) < count:
            sequences.append(prefix + buffer[:body])
            buffer = buffer[body:]
        if len(sequences) == count:
            return torch.tensor(sequences)
    have = len(sequences) * body + len(buffer)  # without BOS, so that it does not depend on the sequences' length
    if not have:
        raise DataError(f"{corpus} is empty, it has no text; give another", field="corpus")
    if not sequences:
        most = have + len(prefix)
        raise DataError(
            f"{corpus} has {have} tokens, under one sequence; give ",
            Field("seq_len"),
            " and ",
            Field("tokens"),
            f" of at most {most}",
            field="corpus",
        )
    bos = ", a BOS in each sequence not counted" if prefix else ""
    raise DataError(
        f"{corpus} has {have} tokens{bos}, under ",
        Field("tokens"),
        f" {tokens}; give ",
        Field("tokens"),
        f" {len(sequences) * seq_len}",
        field="corpus",
    )


def corpus_sequences(
    corpus: str,
    data_dir: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seq_len: int,
    column: str | None = None,
) -> Tensor:
    """`pack` of `corpus_texts` -> int64 [tokens // seq_len, seq_len]."""
    return pack(corpus_texts(corpus, data_dir, column), tokenizer, corpus=corpus, tokens=tokens, seq_len=seq_len)


def reference_windows(
    corpus: str, data_dir: Path | None, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, column: str | None = None
) -> Tensor:
    """A whole corpus in the windows of the paper's code -> int64 [windows, seq_len].

    Its texts, blank ones included, are joined by blank lines and tokenized in one piece, so that only the first window
    begins with BOS. Tokens left over at the end are not used. Source: `_layer_wise_evaluate` and its loader in the code
    of arXiv 2507.23279, with a `seq_len` of 2,048. `DataError` for less than a window or more than `WHOLE` characters.
    """
    texts: list[str] = []
    size = 0
    for text in corpus_texts(corpus, data_dir, column, blank=True):
        texts.append(text)
        size += len(text)
        if size > WHOLE:
            raise DataError(
                f"{corpus} has over {WHOLE:,} characters, but the windows take the whole corpus; give wikitext2 or "
                "a smaller file, or leave it out",
                field="reference_windows",
            )
    ids = tokenizer("\n\n".join(texts), verbose=False).input_ids
    windows = len(ids) // seq_len
    if not windows:
        raise DataError(
            f"{corpus} has {len(ids)} tokens, under one window; give a smaller ", Field("seq_len"), field="perplexity"
        )
    return torch.tensor(ids[: windows * seq_len]).view(windows, seq_len)


def digest_ids(ids_BL: Tensor) -> str:
    """SHA-256 of token ids, for a stage's inputs."""
    return hashlib.sha256(ids_BL.numpy().tobytes()).hexdigest()


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: the tokenizer warns of texts longer than the model's context, but this one is cut into sequences.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids
