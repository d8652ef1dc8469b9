"""Text corpora: the named ones, data sets on the Hub, and files -> texts one by one.

To add a named corpus, add an entry to `CORPORA`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from superexperts.core.errors import DataError, Field, OptionError
from superexperts.core.jsonl import OTHERS, read_rows, require_text
from superexperts.core.paths import require_folder
from superexperts.pocket import heldout_documents

__all__ = [
    "CORPORA",
    "Corpus",
    "check_column",
    "corpus_texts",
    "documents",
    "local_data",
    "local_file",
    "named_corpus",
    "takes_column",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Where a corpus is on the Hub, what its local file is called, and how a row becomes text."""

    path: str
    """The data set's repository on the Hub, OWNER/NAME."""
    config: str | None = None
    split: str
    revision: str | None = None
    """Branch, tag or commit on the Hub; a commit makes a run repeatable."""
    stem: str | None = None
    """Name, without .jsonl or .jsonl.gz, of the file in the folder of local data that is read instead; None if there
    is none."""
    text: tuple[str, ...] | Callable[[Mapping[str, Any]], str] = ("text",)
    """The columns that are joined by line breaks, or a function of a row."""
    language: str | None = None
    """Only rows of the local file with this `lang` are read; None reads all rows."""


C4 = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
# The first seven are the data sets of the original command line; its `multilingual` is the Afrikaans part of C4. `math`
# and `legal` have no revision, because the original publishes none.
CORPORA = {
    "math": Corpus(
        path="notbadai/math_reasoning",
        split="train",
        text=("prompt", "reasoning", "answer"),
        stem="math_reasoning_rekeyed",
    ),
    "medical": Corpus(
        path="123rc/medical_text",
        revision="3ad6e1681522de5e45284379f7466a2bf1284a3d",
        split="test",
        text=("medical_abstract",),
        stem="medical_abstracts_test",
    ),
    "legal": Corpus(path="Shekswess/legal-documents", split="train", stem="legal_opinions_cap"),
    "wikitext2": Corpus(
        path="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        config="wikitext-2-raw-v1",
        split="test",
        stem="wikitext2_raw_test",
    ),
    "c4": Corpus(path="allenai/c4", revision=C4, config="en", split="validation", stem="c4_en_demo_text_only"),
    "tinystories": Corpus(
        path="roneneldan/TinyStories",
        revision="f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        split="validation",
        stem="tinystories_validation_chunks",
    ),
    "multilingual": Corpus(
        path="allenai/c4", revision=C4, config="af", split="validation", stem="multilingual_afrikaans_sentences"
    ),
}

FILE_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
PATH = ("/", "./", "../", "~")
"""Beginnings of a path that is not OWNER/NAME."""
TABLES = tuple(OTHERS)
"""Suffixes of files in other formats. A name with one of them is a file, never a data set on the Hub."""
BLOCK = 2**20
"""Characters of a .txt file that are read and tokenized at a time."""
WHOLE = 50_000_000
"""Largest size, in characters, of a corpus that is read in one piece."""


def named_corpus(text: str, column: str = "text") -> Corpus | None:
    """The corpus for a name: one of `CORPORA`, `multilingual-LANG` for any language of multilingual C4, or
    OWNER/NAME[:CONFIG[:SPLIT]] for any data set on the Hub, or a folder with one (split `train`).

    `@REVISION` at the end pins it. `column` holds the text of a data set that has no name in `CORPORA`. None for
    anything else, such as the name of a file.
    """
    name, _, revision = text.partition("@")
    if name in CORPORA:
        found = CORPORA[name]
    elif language := re.fullmatch(r"multilingual-(\w[\w-]*)", name):
        found = dataclasses.replace(
            CORPORA["multilingual"],
            config=language[1],
            stem="multilingual_xquad_contexts",
            language=language[1],
        )
    elif re.fullmatch(r"[^:]*/[^:]*(:[^:]*){0,2}", name) and not name.endswith(FILE_SUFFIXES):
        path, config, split = (*name.split(":"), "", "")[:3]
        found = Corpus(path=path, config=config or None, split=split or "train", text=(column,))
    else:
        return None
    return dataclasses.replace(found, revision=revision or found.revision)


def local_data(data_dir: Path | None) -> Path | None:
    """The folder of local data files: `data_dir`, or else the environment's SUPEREXPERTS_DATA, or else None."""
    if data_dir is None and os.environ.get("SUPEREXPERTS_DATA"):
        data_dir = Path(os.environ["SUPEREXPERTS_DATA"])
    if data_dir is not None and str(data_dir) != "pocket":
        require_folder(data_dir, "data_dir", "the folder of the data files")
    return data_dir


def local_file(folder: Path, stem: str) -> Path:
    """`stem.jsonl` or `stem.jsonl.gz` in `folder`; `DataError` if the folder has neither."""
    for suffix in (".jsonl", ".jsonl.gz"):
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    for file in sorted(folder.glob(f"{stem}.*")):
        require_text(file, "data_dir")
    raise DataError(
        f"{folder} has no {stem}.jsonl or {stem}.jsonl.gz; add it, or leave out ", Field("data_dir"), field="data_dir"
    )


def require_corpus(corpus: str, field: str = "corpus") -> None:
    """`DataError` about `field` unless `corpus` can be a file, a named corpus or a data set on the Hub."""
    found = named_corpus(corpus)
    file = Path(corpus if found is None else found.path)
    if corpus == "pocket" or (found is not None and found.stem is not None):
        return
    if file.is_file():
        require_text(file, field)
        if not corpus.endswith(FILE_SUFFIXES):
            raise DataError(
                f"{corpus} is not of a kind that is read ({', '.join(FILE_SUFFIXES)}); convert it", field=field
            )
    elif found is None or corpus.endswith(TABLES) or (corpus.startswith(PATH) and not file.exists()):
        names = ["pocket", *CORPORA]
        near = difflib.get_close_matches(corpus, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "check the path or the name"
        raise DataError(
            f"{corpus!r} is neither a file nor one of {', '.join(names)}, multilingual-LANG or OWNER/NAME; {hint}",
            field=field,
        )


def takes_column(corpus: str) -> bool:
    """Whether a column can be chosen: named corpora have theirs, and `pocket` and .txt files have no columns."""
    found = named_corpus(corpus)
    return corpus != "pocket" and not corpus.endswith(".txt") and (found is None or found.stem is None)


def check_column(column: str | None, corpora: Sequence[str]) -> None:
    """`OptionError` if a column is given and none of the corpora takes one."""
    if column is not None and not any(map(takes_column, corpora)):
        raise OptionError(
            f"{column!r} has no effect on {', '.join(corpora)}; leave it out, it is for .jsonl files and data sets "
            "given as OWNER/NAME",
            field="column",
        )


def corpus_texts(
    corpus: str, data_dir: Path | None, column: str | None = None, *, blank: bool = False
) -> Iterator[str]:
    """`documents`, for commands with one corpus and a `data_dir` that may be `pocket`, which has benchmarks only.

    `OptionError` for a column that has no effect on the corpus.
    """
    check_column(column, [corpus])
    folder = local_data(data_dir)
    return documents(corpus, column or "text", None if str(folder) == "pocket" else folder, blank=blank)


def documents(corpus: str, column: str = "text", data_dir: Path | None = None, *, blank: bool = False) -> Iterator[str]:
    """Yields the texts of a corpus one by one, with blank ones only if `blank`.

    `corpus` is `pocket`, a name that `named_corpus` knows, or a .txt, .jsonl or .jsonl.gz file. In a file or a data set
    without a name in `CORPORA`, `column` holds the text. Names win over files: a file called `math` is `./math`.
    """
    require_corpus(corpus)
    found = named_corpus(corpus, column)
    if corpus == "pocket":
        yield from heldout_documents()
    elif found is not None and found.stem is not None:
        folder = local_data(data_dir)
        if folder is None:
            yield from _hub_texts(corpus, found, blank)
            return
        name, _, revision = corpus.partition("@")
        if revision:
            raise DataError(
                f"{corpus} is a revision on the Hub, but the rows are read from {folder}; give {name}, or leave out ",
                Field("data_dir"),
                " and SUPEREXPERTS_DATA",
                field="corpus",
            )
        yield from _file_texts(local_file(folder, found.stem), found, blank)
    elif Path(corpus).is_file():
        file = Path(corpus)
        if corpus.endswith(".txt"):
            # One block, where blank texts count: the caller then needs the text exactly as it is.
            yield from _text_blocks(file, WHOLE + 1 if blank else BLOCK)
        else:
            yield from _file_texts(file, Corpus(path=corpus, split="", text=(column,)), blank)
    elif found is not None:
        yield from _hub_texts(corpus, found, blank)


def _hub_texts(name: str, corpus: Corpus, blank: bool) -> Iterator[str]:
    for number, row in enumerate(_hub_rows(name, corpus), start=1):
        text = _row_text(row, corpus, f"{corpus.path} row {number}")
        if blank or text.strip():
            yield text


def _hub_rows(name: str, corpus: Corpus) -> Iterator[Mapping[str, Any]]:
    import datasets  # takes a second to import, and local files are read without it

    try:
        yield from datasets.load_dataset(
            corpus.path, corpus.config, split=corpus.split, revision=corpus.revision, streaming=True
        )
    except Exception as error:  # of several HTTP libraries, file formats and data sets' own metadata
        advice = (
            ["check its name and the network"]
            if corpus.stem is None
            else ["check the network, or give ", Field("data_dir")]
        )
        why = (str(error).strip().splitlines() or [""])[0][:120]
        raise DataError(
            f"{name} cannot be read from the Hub ({corpus.path}: {type(error).__name__}: {why}); ",
            *advice,
            field="corpus",
        ) from error


def _file_texts(file: Path, corpus: Corpus, blank: bool) -> Iterator[str]:
    """The texts of a JSONL file; `DataError` if no row has the corpus's language."""
    languages: set[str] = set()
    for number, row in read_rows(file, "corpus"):
        if corpus.language is not None:
            languages.add(str(row.get("lang")))
            if row.get("lang") != corpus.language:
                continue
        text = _row_text(row, corpus, f"{file} row {number}")
        if blank or text.strip():
            yield text
    if corpus.language is not None and corpus.language not in languages:
        have = ", ".join(sorted(languages))
        raise DataError(f"{file} has no row in {corpus.language!r} (it has {have}); name one of these", field="corpus")


def _row_text(row: Mapping[str, Any], corpus: Corpus, where: str) -> str:
    if callable(corpus.text):
        return corpus.text(row)
    missing = [column for column in corpus.text if column not in row]
    if missing:
        have = ", ".join(sorted(row))
        raise DataError(f"{where} has no {missing[0]!r} (it has {have}); name one of these", field="column")
    return "\n".join(_string(row[column], column, where) for column in corpus.text)


def _string(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"{where} has a {kind} as {column!r}, not a text; name a column of texts", field="column")
    return value


def _text_blocks(file: Path, block: int) -> Iterator[str]:
    """A text file in parts of about `block` characters, cut at blank lines, or else at ends of lines."""
    try:
        with file.open(encoding="utf-8") as stream:
            rest = stream.read(block)
            while more := stream.read(block):
                mark = next((mark for mark in ("\n\n", "\n") if mark in rest), None)
                part, _, rest = rest.rpartition(mark) if mark else ("", "", rest)
                if part.strip():
                    yield part
                rest += more
            if rest.strip():
                yield rest
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}); convert it", field="corpus") from error
