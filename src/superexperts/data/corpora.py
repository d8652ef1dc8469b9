"""Named corpora and own files -> sequences of token ids."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from superexperts.core.errors import DataError, Field, OptionError
from superexperts.pocket import heldout_documents

__all__ = [
    "HUB_CORPORA",
    "HubCorpus",
    "bos_prefix",
    "check_column",
    "corpus_sequences",
    "corpus_texts",
    "digest_ids",
    "documents",
    "local_data",
    "named_corpus",
    "pack",
    "read_rows",
    "reference_windows",
    "takes_column",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubCorpus:
    """A named corpus: where it is on the Hub, which columns hold its text, and its name among local files."""

    path: str
    config: str | None = None
    split: str
    columns: tuple[str, ...] = ("text",)
    stem: str | None = None
    """Name without suffix of the file below --data-dir that is read instead; None where there is none."""
    language: str | None = None
    """Only rows of that file whose `lang` is this."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; a commit makes a run repeatable."""


FILE_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
BLOCK = 2**20
WHOLE = 50_000_000
"""Characters that a corpus may have where all of it is wanted in one piece."""
"""Characters of a .txt file that are read, and tokenized, at once."""
C4 = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
# The seven data sets of the original command line; `multilingual` is its Afrikaans part of C4. No commit of `math` and
# `legal` is published anywhere that we have seen.
HUB_CORPORA = {
    "math": HubCorpus(
        path="notbadai/math_reasoning",
        split="train",
        columns=("prompt", "reasoning", "answer"),
        stem="math_reasoning_rekeyed",
    ),
    "medical": HubCorpus(
        path="123rc/medical_text",
        revision="3ad6e1681522de5e45284379f7466a2bf1284a3d",
        split="test",
        columns=("medical_abstract",),
        stem="medical_abstracts_test",
    ),
    "legal": HubCorpus(path="Shekswess/legal-documents", split="train", stem="legal_opinions_cap"),
    "wikitext2": HubCorpus(
        path="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        config="wikitext-2-raw-v1",
        split="test",
        stem="wikitext2_raw_test",
    ),
    "c4": HubCorpus(path="allenai/c4", revision=C4, config="en", split="validation", stem="c4_en_demo_text_only"),
    "tinystories": HubCorpus(
        path="roneneldan/TinyStories",
        revision="f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        split="validation",
        stem="tinystories_validation_chunks",
    ),
    "multilingual": HubCorpus(
        path="allenai/c4", revision=C4, config="af", split="validation", stem="multilingual_afrikaans_sentences"
    ),
}


def named_corpus(text: str, column: str = "text") -> HubCorpus | None:
    """The corpus that a name means, None where it is none: one of `HUB_CORPORA`, `multilingual-LANG` for any language
    of multilingual C4, or OWNER/NAME[:CONFIG[:SPLIT]] for any data set on the Hub (or a folder of one; split `train`).

    @REVISION at the end pins it.
    """
    name, _, revision = text.partition("@")
    if name in HUB_CORPORA:
        found = HUB_CORPORA[name]
    elif language := re.fullmatch(r"multilingual-(\w[\w-]*)", name):
        found = dataclasses.replace(
            HUB_CORPORA["multilingual"],
            config=language[1],
            stem="multilingual_xquad_contexts",
            language=language[1],
        )
    elif re.fullmatch(r"[^:]*/[^:]*(:[^:]*){0,2}", name) and not name.endswith(FILE_SUFFIXES):
        path, config, split = (*name.split(":"), "", "")[:3]
        found = HubCorpus(path=path, config=config or None, split=split or "train", columns=(column,))
    else:
        return None
    return dataclasses.replace(found, revision=revision or found.revision)


def local_data(data_dir: Path | None) -> Path | None:
    """The folder of local data files: the option, else the environment's SUPEREXPERTS_DATA, else none."""
    if data_dir is None and os.environ.get("SUPEREXPERTS_DATA"):
        data_dir = Path(os.environ["SUPEREXPERTS_DATA"])
    if data_dir is not None and str(data_dir) != "pocket" and not data_dir.is_dir():
        raise DataError(f"{str(data_dir)!r} is no folder; give the folder of the data files", field="data_dir")
    return data_dir


def local_file(folder: Path, stem: str) -> Path:
    """`stem.jsonl` or `stem.jsonl.gz` in `folder`; `DataError` if neither is there."""
    for suffix in (".jsonl", ".jsonl.gz"):
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise DataError(
        f"{folder} has no {stem}.jsonl or {stem}.jsonl.gz; add it or leave the option out", field="data_dir"
    )


def takes_column(corpus: str) -> bool:
    """Whether `column` says anything of a corpus: not where there is none, nor where the name stands for it."""
    hub = named_corpus(corpus)
    return corpus != "pocket" and not corpus.endswith(".txt") and (hub is None or hub.stem is None)


def check_column(column: str | None, corpora: Sequence[str]) -> None:
    """`OptionError` for a --column that says nothing of any of the corpora."""
    if column is not None and not any(map(takes_column, corpora)):
        raise OptionError(
            (
                f"{column!r} says nothing of {', '.join(corpora)}; leave it out, it is for .jsonl files and data "
                "sets given as OWNER/NAME"
            ),
            field="column",
        )


def documents(corpus: str, column: str = "text", data_dir: Path | None = None, *, blank: bool = False) -> Iterator[str]:
    """The texts of a corpus one by one, blank ones left out unless wanted (`blank`).

    `corpus` is `pocket`, a name as for `named_corpus`, or a .txt / .jsonl / .jsonl.gz file; of a file or a data set
    that has no name here, `column` holds the text. The names here win over files that are called so (`./math`).
    """
    hub = named_corpus(corpus, column)
    if corpus == "pocket":
        yield from heldout_documents()
    elif hub is not None and hub.stem is not None:
        folder = local_data(data_dir)
        if folder is None:
            yield from _hub_texts(corpus, hub, blank)
            return
        name, _, revision = corpus.partition("@")
        if revision:
            raise DataError(
                (f"{corpus} is a revision on the Hub, but the rows are read from {folder}; give {name}, or leave out "),
                Field("data_dir"),
                " and SUPEREXPERTS_DATA",
                field="corpus",
            )
        yield from _rows_texts(local_file(folder, hub.stem), hub.columns, hub.language, blank=blank)
    elif Path(corpus).is_file():
        if not corpus.endswith(FILE_SUFFIXES):
            raise DataError(
                f"{corpus} is none of the files that are read: {', '.join(FILE_SUFFIXES)}; convert it", field="corpus"
            )
        file = Path(corpus)
        yield from (
            _text_blocks(file, WHOLE + 1 if blank else BLOCK)
            if corpus.endswith(".txt")
            else _rows_texts(file, (column,), blank=blank)
        )
    elif hub is not None:
        yield from _hub_texts(corpus, hub, blank)
    else:
        names = ", ".join(["pocket", *HUB_CORPORA])
        raise DataError(
            (
                f"{corpus!r} is neither a file nor one of {names}, multilingual-LANG and OWNER/NAME; check the "
                "path or the name"
            ),
            field="corpus",
        )


def _hub_texts(name: str, hub: HubCorpus, blank: bool) -> Iterator[str]:
    for number, row in enumerate(_hub_rows(name, hub), start=1):
        text = _row_text(row, hub.columns, f"{hub.path} row {number}")
        if blank or text.strip():
            yield text


def _hub_rows(name: str, hub: HubCorpus) -> Iterator[Mapping[str, Any]]:
    try:
        yield from datasets.load_dataset(hub.path, hub.config, split=hub.split, revision=hub.revision, streaming=True)
    except Exception as error:  # of several HTTP libraries, file formats and data sets' own metadata
        advice = (
            ["check its name and the network"]
            if hub.stem is None
            else ["check the network, or give ", Field("data_dir")]
        )
        why = (str(error).strip().splitlines() or [""])[0][:120]
        raise DataError(
            f"{name} cannot be read from the Hub ({hub.path}: {type(error).__name__}: {why}); ", *advice, field="corpus"
        ) from error


def _text_blocks(file: Path, block: int) -> Iterator[str]:
    """A text file in parts of about `block` characters, cut at blank lines, or at ends of lines where there is none."""
    try:
        with file.open(encoding="utf-8") as stream:
            held = stream.read(block)
            while more := stream.read(block):
                mark = next((mark for mark in ("\n\n", "\n") if mark in held), None)
                part, _, rest = held.rpartition(mark) if mark else ("", "", held)
                if part.strip():
                    yield part
                held = rest + more
            if held.strip():
                yield held
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}); convert it", field="corpus") from error


def _rows_texts(
    file: Path, columns: tuple[str, ...], language: str | None = None, *, blank: bool = False
) -> Iterator[str]:
    languages: set[str] = set()
    for number, row in read_rows(file, "corpus"):
        if language is not None:
            languages.add(str(row.get("lang")))
            if row.get("lang") != language:
                continue
        text = _row_text(row, columns, f"{file} row {number}")
        if blank or text.strip():
            yield text
    if language is not None and language not in languages:
        have = ", ".join(sorted(languages))
        raise DataError(f"{file} has no row in {language!r} (it has {have}); name one of these", field="corpus")


def _row_text(row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> str:
    """The text of a row."""
    missing = [column for column in columns if column not in row]
    if missing:
        have = ", ".join(sorted(row))
        raise DataError(f"{where} has no {missing[0]!r} (it has {have}); name one of these", field="column")
    return "\n".join(_text(row[column], column, where) for column in columns)


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"{where} has a {kind} as {column!r}, not a text; name a column of texts", field="column")
    return value


def read_rows(file: Path, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a JSONL file that may be gzipped; blank lines are skipped."""
    with _open(file) as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"{file} row {number} is no JSON object; write one object a line", field=field)
                yield number, row
        except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise DataError(f"{file} is not readable as JSONL ({error}); repair the file", field=field) from error


def _open(file: Path) -> TextIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of every text: [BOS] or nothing."""
    return [token for token in tokenizer("").input_ids if token != tokenizer.eos_token_id][:1]


def pack(texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, *, corpus: str, tokens: int, seq_len: int) -> Tensor:
    """Packs texts, a blank line apart, into full sequences -> int64 [tokens // seq_len, seq_len].

    Every sequence begins with BOS where the tokenizer puts one, so that each has its own attention sink; nothing is
    padded and nothing is read twice. A corpus that runs out is a `DataError` that says how many tokens there are.
    """
    prefix = bos_prefix(tokenizer)
    body = seq_len - len(prefix)
    wanted = tokens // seq_len
    separator = tokenizer("\n\n", add_special_tokens=False).input_ids
    sequences: list[list[int]] = []
    buffer: list[int] = []
    for text in texts:
        buffer += [*separator, *_ids(tokenizer, text)] if buffer or sequences else _ids(tokenizer, text)
        while len(buffer) >= body and len(sequences) < wanted:
            sequences.append(prefix + buffer[:body])
            buffer = buffer[body:]
        if len(sequences) == wanted:
            return torch.tensor(sequences)
    have = len(sequences) * body + len(buffer)  # of the text, whatever the length of the sequences
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


def corpus_texts(
    corpus: str, data_dir: Path | None, column: str | None = None, *, blank: bool = False
) -> Iterator[str]:
    """`documents` for commands of one corpus whose --data-dir may be `pocket`, which has benchmarks only. `OptionError`
    for a column that says nothing of the corpus."""
    check_column(column, [corpus])
    folder = local_data(data_dir)
    return documents(corpus, column or "text", None if str(folder) == "pocket" else folder, blank=blank)


def corpus_sequences(
    corpus: str,
    data_dir: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    seq_len: int,
    column: str | None = None,
) -> Tensor:
    """`pack` of `corpus_texts`."""
    return pack(corpus_texts(corpus, data_dir, column), tokenizer, corpus=corpus, tokens=tokens, seq_len=seq_len)


def reference_windows(
    corpus: str, data_dir: Path | None, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, column: str | None = None
) -> Tensor:
    """A whole corpus in the windows of the paper's code -> int64 [windows, seq_len].

    Its texts, also the blank ones, are joined by blank lines and tokenized in one piece, so that a BOS stands in front
    of the first window only; what is left over at the end is not used. (`_layer_wise_evaluate` and its loader in the
    code of arXiv 2507.23279, where `seq_len` is 2,048.) `DataError` for less than a window or more than `WHOLE`.
    """
    held: list[str] = []
    size = 0
    for text in corpus_texts(corpus, data_dir, column, blank=True):
        held.append(text)
        size += len(text)
        if size > WHOLE:
            raise DataError(
                (
                    f"{corpus} has over {WHOLE:,} characters, and all of a corpus is taken; give wikitext2 or a "
                    "file, or leave it out"
                ),
                field="reference_windows",
            )
    ids = tokenizer("\n\n".join(held), verbose=False).input_ids
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
    # verbose=False: a whole document is longer than the model's context on purpose, it is cut into sequences here.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids
