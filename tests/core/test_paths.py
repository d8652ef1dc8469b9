"""What is said of a file or folder that is not there, or is the other of the two."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from superexperts.checkpoints.source import adapter_folder, is_adapter, local_folder, resolve
from superexperts.core.errors import DataError, ModelError
from superexperts.core.jsonl import read_rows
from superexperts.core.paths import require_file, require_folder, require_inside
from superexperts.core.types import ExpertSet


def test_a_missing_folder_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "pruned").mkdir()
    (tmp_path / "notes.txt").touch()
    near = rf"'{tmp_path}/prund' does not exist \(did you mean '{tmp_path}/pruned'\?\); give the folder x"
    with pytest.raises(DataError, match=near):
        require_folder(tmp_path / "prund", "folder", "the folder x")
    with pytest.raises(DataError, match=r"qqq' does not exist; give the folder x"):
        require_folder(tmp_path / "qqq", "folder", "the folder x")
    with pytest.raises(DataError, match=r"folder: .*notes.txt' is a file; give the folder x"):
        require_folder(tmp_path / "notes.txt", "folder", "the folder x")
    with pytest.raises(DataError, match=r"data: .*pruned' is a folder; give rows"):
        require_file(tmp_path / "pruned", "data", "rows")
    with pytest.raises(DataError, match=r"pruned' has no results.json; give a study"):
        require_inside(tmp_path / "pruned", "results.json", "folder", "a study")
    assert require_folder(tmp_path / "pruned", "folder", "the folder x") == tmp_path / "pruned"


def test_a_name_that_only_a_path_has_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "model.safetensors").touch()
    for name, said in {
        "model.safetensors": "'model.safetensors' is a file; give a checkpoint folder",
        "../no/such": "does not exist; give a checkpoint folder",
        "a/b/c": "'a/b/c' does not exist; give a checkpoint folder",
        "": "the name is empty; give a checkpoint folder",
    }.items():
        with pytest.raises(ModelError, match=re.escape(said)):
            local_folder(name)
    assert local_folder("owner/name") is None
    assert local_folder("pocket") == resolve("pocket").folder


def test_adapters_are_found_by_their_configuration(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no adapter_config.json; give the folder that `train` wrote"):
        adapter_folder(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").touch()
    with pytest.raises(DataError, match="it is in one, two: give one of them"):
        adapter_folder(tmp_path)
    assert is_adapter(tmp_path)
    assert adapter_folder(tmp_path / "one") == tmp_path / "one"
    with pytest.raises(ModelError, match="one' is an adapter, not a checkpoint; give its base model"):
        local_folder(str(tmp_path / "one"))
    (tmp_path / "config.json").touch()
    assert not is_adapter(tmp_path)


@pytest.mark.parametrize("text", ["L2E5, L1E7", "L2E5 L1E7", "l2e5,l1e7", " L2E5;L1E7 ", "2,5;1,7", "2, 5; 1, 7"])
def test_experts_may_have_blanks_and_any_case(text: str) -> None:
    assert ExpertSet.parse(text).experts == ((2, 5), (1, 7))


def test_an_error_of_experts_is_about_the_setting_that_named_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"like: .*none.json' does not exist"):
        ExpertSet.parse(str(tmp_path / "none.json"), "like")


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [("a.csv", b"x,y", "CSV"), ("a.parquet", b"", "Parquet"), ("a.jsonl", b"PAR1\x15", "Parquet")],
)
def test_a_table_of_another_kind_is_named(name: str, content: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"is {kind}, not JSONL; convert it with pandas"):
        list(read_rows(tmp_path / name, "data"))


def test_jsonl_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert list(read_rows(tmp_path / "a.jsonl", "data")) == [(1, {"a": 1})]
