"""Corpora: packing against a case made by hand, each format of files, errors that name file, row and fix."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from superexperts.checkpoints.source import resolve
from superexperts.core.errors import DataError
from superexperts.data import corpora
from superexperts.data.corpora import CORPORA, Corpus, documents, named_corpus, takes_column
from superexperts.data.packing import pack, reference_windows
from superexperts.models.loading import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return load_tokenizer(resolve("pocket"))


def test_pack_is_the_plain_concatenation_cut_with_bos_in_front(tokenizer) -> None:  # type: ignore[no-untyped-def]
    texts = ["one two three four five", "six seven", "eight nine ten eleven twelve"]
    ids_BL = pack(iter(texts), tokenizer, corpus="x", tokens=27, seq_len=9)
    blank = tokenizer("\n\n", add_special_tokens=False).input_ids
    flat: list[int] = []
    for number, text in enumerate(texts):
        flat += (blank if number else []) + tokenizer(text, add_special_tokens=False).input_ids
    bos = tokenizer.bos_token_id
    expected = [[bos, *flat[start : start + 8]] for start in (0, 8, 16)]
    assert ids_BL.dtype == torch.int64
    assert ids_BL.tolist() == expected


def test_pack_says_how_many_tokens_there_are(tokenizer) -> None:  # type: ignore[no-untyped-def]
    have = len(tokenizer("a b c", add_special_tokens=False).input_ids)
    with pytest.raises(DataError, match=f"x has {have} tokens, under one sequence"):
        pack(iter(["a b c"]), tokenizer, corpus="x", tokens=512, seq_len=512)
    with pytest.raises(DataError, match="under tokens 4000; give tokens"):
        pack(iter(["a b c " * 100]), tokenizer, corpus="x", tokens=4000, seq_len=10)
    with pytest.raises(DataError, match="x is empty, it has no text"):
        pack(iter([]), tokenizer, corpus="x", tokens=8, seq_len=8)


def test_the_number_of_tokens_in_the_message_does_not_depend_on_the_sequences(tokenizer) -> None:  # type: ignore[no-untyped-def]
    text = "one two three four five six seven"
    have = len(tokenizer(text, add_special_tokens=False).input_ids)
    for seq_len in (2, 3, 4, have + 1, 4 * have):
        with pytest.raises(DataError, match=f"x has {have} tokens") as error:
            pack(iter([text]), tokenizer, corpus="x", tokens=4 * have, seq_len=seq_len)
        most = int(str(error.value).rpartition(" ")[2])  # what it says to give instead works
        assert pack(iter([text]), tokenizer, corpus="x", tokens=most, seq_len=min(seq_len, most)).numel() == most


def test_reference_windows_are_the_whole_text_in_one_piece(tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Rows joined by blank lines, blank rows too; one BOS in front of all; the rest that fills no window is left."""
    rows = ["", " = Title = \n", "", " One two three four . \n", " Five six seven . \n"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "a.txt").write_text("\n\n".join(rows))
    flat = tokenizer("\n\n".join(rows)).input_ids
    assert flat[0] == tokenizer.bos_token_id
    assert flat.count(tokenizer.bos_token_id) == 1
    assert len(flat) % 5, "nothing is left over"
    for name in ("a.jsonl", "a.txt"):
        ids_BL = reference_windows(str(tmp_path / name), None, tokenizer, seq_len=5)
        assert ids_BL.dtype == torch.int64
        assert ids_BL.shape == (len(flat) // 5, 5)
        assert ids_BL.flatten().tolist() == flat[: ids_BL.numel()]
    with pytest.raises(DataError, match=f"has {len(flat)} tokens, under one window; give a smaller seq_len"):
        reference_windows(str(tmp_path / "a.txt"), None, tokenizer, seq_len=len(flat) + 1)


def test_reference_windows_of_wikitext_are_all_of_it(tokenizer, shared_data: Path) -> None:  # type: ignore[no-untyped-def]
    with gzip.open(shared_data / "wikitext2_raw_test.jsonl.gz", "rt") as stream:
        text = "\n\n".join(json.loads(line)["text"] for line in stream)
    assert len(text) == 1_294_336, "not the test split"
    ids = tokenizer(text).input_ids
    ids_BL = reference_windows("wikitext2", shared_data, tokenizer, seq_len=2048)
    assert ids_BL.shape == (len(ids) // 2048, 2048)
    assert ids_BL.flatten().tolist() == ids[: ids_BL.numel()]


def test_a_corpus_without_end_has_no_reference_windows(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n' * 9)
    monkeypatch.setattr("superexperts.data.packing.WHOLE", 20)
    with pytest.raises(DataError, match="reference_windows: .* has over 20 characters"):
        reference_windows(str(tmp_path / "a.jsonl"), None, tokenizer, seq_len=2)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Việt Nam\nx")
    assert list(documents(str(tmp_path / "a.txt"))) == ["Việt Nam\nx"]
    rows = [{"text": "one"}, {"text": "  "}, {"text": "two"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert list(documents(str(tmp_path / "a.jsonl"))) == ["one", "two"]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.write(json.dumps({"body": "three"}))
    assert list(documents(str(tmp_path / "a.jsonl.gz"), "body")) == ["three"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"body": 1}', "row 1 has no 'text' (it has body)"),
        ('{"text": null}', "row 1 has a NoneType as 'text', not a text"),
        ("[1]", "is a JSON array, not JSONL"),
        ("1", "row 1 is not a JSON object"),
        ('{"text": "a"}\n{', "is not readable as JSONL"),
    ],
)
def test_broken_files_name_the_row(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError) as error:
        list(documents(str(tmp_path / "a.jsonl")))
    assert message in str(error.value)


@pytest.mark.parametrize("damage", ["header", "body", "end"])
def test_a_broken_gzip_is_named(tmp_path: Path, damage: str) -> None:
    data = bytearray(gzip.compress(b'{"text": "one two three four five six seven"}' * 9))
    if damage == "header":
        data[:2] = b"no"
    elif damage == "body":
        data[12:30] = b"\xff" * 18
    else:
        del data[-12:]
    (tmp_path / "a.jsonl.gz").write_bytes(bytes(data))
    with pytest.raises(DataError, match="is not readable as JSONL"):
        list(documents(str(tmp_path / "a.jsonl.gz")))


def test_a_long_text_is_read_in_parts_that_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "BLOCK", 50)
    paragraphs = "\n\n".join(f"paragraph {number}\nof ä lines" for number in range(40))
    (tmp_path / "a.txt").write_text(paragraphs, encoding="utf-8")
    parts = list(documents(str(tmp_path / "a.txt")))
    assert "\n\n".join(parts) == paragraphs
    assert len(parts) > 15
    assert max(map(len, parts)) < 150
    (tmp_path / "a.txt").write_text("\n".join(paragraphs.split()), encoding="utf-8")
    parts = list(documents(str(tmp_path / "a.txt")))
    assert "\n".join(parts) == "\n".join(paragraphs.split())
    assert len(parts) > 15
    (tmp_path / "a.txt").write_text("x" * 200)
    assert list(documents(str(tmp_path / "a.txt"))) == ["x" * 200]
    # Nothing is read past the tokens asked for.
    (tmp_path / "a.txt").write_bytes(b"word\n\n" * 100_000 + b"\xff")
    assert next(documents(str(tmp_path / "a.txt"))).startswith("word")


def test_names_win_over_files_that_are_called_so(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("math", "multilingual-vi", "pocket"):
        (tmp_path / name).write_text("mine")
        assert next(documents(name, data_dir=shared_data)) != "mine"
        with pytest.raises(DataError, match=rf"corpus: ./{name} is not of a kind that is read \(.txt, .jsonl, "):
            next(documents(f"./{name}"))


def test_what_local_rows_cannot_give_is_named(tmp_path: Path, shared_data: Path) -> None:
    with pytest.raises(DataError, match=r"wikitext2@deadbeef is a revision on the Hub, .* give wikitext2, or leave"):
        list(documents("wikitext2@deadbeef", data_dir=shared_data))
    with pytest.raises(DataError, match=r"no row in 'fr' \(it has .*de, .*vi.*\); name one"):
        list(documents("multilingual-fr", data_dir=shared_data))
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"is CSV, not JSONL; convert it with pandas: read_csv"):
        list(documents(str(tmp_path / "rows.csv")))
    for name in ("notes.md",):
        (tmp_path / name).write_text("a,b")
        with pytest.raises(DataError, match=r"not of a kind that is read \(.txt, .jsonl, .jsonl.gz\)"):
            list(documents(str(tmp_path / name)))


class PayloadError(Exception):
    """Of the kind that HTTP libraries raise: no OSError and no ValueError."""


@pytest.mark.parametrize("error", [RuntimeError("Dataset scripts are no longer supported"), PayloadError("half")])
def test_whatever_the_hub_fails_with_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def rows(*_: object, **__: object) -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise error

    monkeypatch.setattr(datasets, "load_dataset", rows)
    texts = documents("owner/name")
    assert next(texts) == "one"
    with pytest.raises(
        DataError, match=f"from the Hub \\(owner/name: {type(error).__name__}: {error}\\); check its name"
    ):
        next(texts)


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xe9")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        list(documents(str(tmp_path / "a.txt")))


def test_an_unknown_corpus_and_a_missing_local_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'c5' is neither a file nor one of pocket, math"):
        list(documents("c5"))
    with pytest.raises(DataError, match="has no c4_en_demo_text_only.jsonl"):
        list(documents("c4", data_dir=tmp_path))
    with pytest.raises(DataError, match="does not exist; give the folder of the data files"):
        list(documents("c4", data_dir=tmp_path / "none"))


@pytest.mark.parametrize("name", ["math", "medical", "legal", "wikitext2", "c4", "tinystories", "multilingual"])
def test_real_rows_of_the_seven_original_corpora(name: str, shared_data: Path) -> None:
    texts = list(documents(name, data_dir=shared_data))
    assert len(texts) >= 14
    assert all(text.strip() for text in texts)


def test_any_language_of_the_multilingual_one(shared_data: Path) -> None:
    texts = list(documents("multilingual-vi", data_dir=shared_data))
    with (shared_data / "multilingual_xquad_contexts.jsonl").open(encoding="utf-8") as stream:
        assert texts == [row["text"] for row in map(json.loads, stream) if row["lang"] == "vi"]
    assert len(texts) == 30
    hub = named_corpus("multilingual-vi")
    assert hub is not None
    assert (hub.path, hub.config, hub.split) == ("allenai/c4", "vi", "validation")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("wikitext2@abc", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "abc")),
        ("owner/name", ("owner/name", None, "train", None)),
        ("owner/name:config", ("owner/name", "config", "train", None)),
        ("owner/name::test@v1.0", ("owner/name", None, "test", "v1.0")),
        ("owner/name:config:test@v1.0", ("owner/name", "config", "test", "v1.0")),
        ("c5", None),
        ("notes/none.txt", None),
    ],
)
def test_names_of_corpora(text: str, want: tuple[str, ...] | None) -> None:
    found = named_corpus(text, "body")
    assert (found and (found.path, found.config, found.split, found.revision)) == want
    if found and found.stem is None:
        assert found.text == ("body",)


def test_a_data_set_by_its_folder_goes_the_way_of_the_hub(tmp_path: Path) -> None:
    """What `load_dataset` reads as a repository is streamed, without blank rows; a wrong column or split is named."""
    (tmp_path / "set").mkdir()
    for split, words in (("train", ["one", " ", "two"]), ("test", ["three"])):
        lines = "".join(json.dumps({"body": word}) + "\n" for word in words)
        (tmp_path / "set" / f"{split}.jsonl").write_text(lines)
    assert list(documents(f"{tmp_path}/set", "body")) == ["one", "two"]
    assert list(documents(f"{tmp_path}/set::test", "body")) == ["three"]
    with pytest.raises(DataError, match=r"column: .*set row 1 has no 'text' \(it has body\)"):
        list(documents(f"{tmp_path}/set"))
    with pytest.raises(DataError, match=r"cannot be read from the Hub \(.*set: ValueError: .*\); check its name"):
        list(documents(f"{tmp_path}/set::nowhere", "body"))


def test_wikitext_without_its_empty_rows(shared_data: Path) -> None:
    texts = list(documents("wikitext2", data_dir=shared_data))
    assert len(texts) == 2891
    assert texts[0] == " = Robert Boulter = \n"


@pytest.mark.parametrize("text", [("question", "answer"), lambda row: f"{row['question']}\n{row['answer']}"])
def test_a_corpus_is_added_by_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Any) -> None:
    entry = Corpus(path="owner/sums", split="test", revision="abc", stem="sums_test", text=text)
    monkeypatch.setitem(CORPORA, "sums", entry)
    monkeypatch.delenv("SUPEREXPERTS_DATA", raising=False)
    row = {"question": "1 + 1?", "answer": "2"}
    (tmp_path / "sums_test.jsonl").write_text(json.dumps(row))
    assert list(documents("sums", data_dir=tmp_path)) == ["1 + 1?\n2"]
    asked: dict[str, Any] = {}

    def load_dataset(*place: Any, **options: Any) -> list[dict[str, str]]:
        asked.update(place=place, **options)
        return [row]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(documents("sums")) == ["1 + 1?\n2"]
    assert asked == {"place": ("owner/sums", None), "split": "test", "revision": "abc", "streaming": True}
    assert not takes_column("sums")
    with pytest.raises(DataError, match=r"one of pocket, math, .*, multilingual, .*sums, multilingual-LANG"):
        list(documents("nope"))
