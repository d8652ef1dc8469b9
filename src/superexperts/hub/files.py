"""Chooses the files of an adapter's or a study's folder that go to the Hub, checks them, and removes local paths."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from superexperts.core.errors import DataError
from superexperts.core.paths import require_folder
from superexperts.core.runs import MANIFEST, MANIFEST_SCHEMA, changed_outputs, read_json

__all__ = ["Bundle", "Upload", "collect"]

ADAPTER_CONFIG = "adapter_config.json"
BASE = "base_model_name_or_path"
TEXT = (".json", ".yaml", ".md", ".html", ".csv", ".svg")
PNG = b"\x89PNG\r\n\x1a\n"
FINISHED = ("results.json", "result.csv", "report.html")
"""Files of a study; if one is missing, the study is not finished."""
OPTIONAL = ("report.md", "study.yaml")
PATH = re.compile(r"(?<![\w./:-])/(?:[^/\s'\"<>|,;:()\[\]{}]+/)+[^/\s'\"<>|,;:()\[\]{}]+")
"""An absolute path of at least two names within a text; one with spaces is found only where it is a whole value."""
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
"""A token of the Hub."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upload:
    """One file of the repository."""

    path: str
    """Path in the repository, with `/` between its parts."""
    content: bytes | Path
    """Bytes of a text or picture; for weights, the path of the local file."""

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A folder's files for the Hub, checked."""

    study: bool
    """Whether the folder is a study's. Otherwise it is one adapter's, and its files go to the top of the repository."""
    adapters: tuple[str, ...]
    """Folders of the adapters in the repository, "" for its top."""
    results: Mapping[str, Any] | None
    """results.json of the study that the folder is, or in which the adapter was trained."""
    files: tuple[Upload, ...]
    """In the order of their paths."""
    stripped: tuple[str, ...]
    """Local paths that were found in the files and are removed from what is sent."""

    def text(self, path: str) -> str:
        """The text of a file as it is sent; `KeyError` if there is no file of that path."""
        content = {file.path: file.content for file in self.files}[path]
        assert isinstance(content, bytes)
        return content.decode()


def collect(folder: Path, base_model: str | None) -> Bundle:
    """Reads and checks what goes to the Hub, and writes nothing; `base_model` replaces what the adapters name.

    Absolute paths found in the JSON and YAML files are shortened in every text file: a path in the folder to the part
    below it, the base model's to `base_model` if that is given, any other to its last name. `DataError` if a file is
    missing, differs from its manifest, is of a kind that these commands do not write, is a link out of the folder,
    still names the user's or the current folder, or holds a token.
    """
    require_folder(folder, "folder", "the folder that `train` or `study` wrote")
    study = (folder / "results.json").is_file()
    if study:
        top, files = folder, _of_study(folder)
        results = read_json(folder / "results.json", "folder")
    else:
        top, files = _of_adapter(folder)
        results = _results_around(top)
    contents = {path: _read(file, top) for path, file in sorted(files.items())}
    adapters = [path.removesuffix(ADAPTER_CONFIG).rstrip("/") for path in contents if path.endswith(ADAPTER_CONFIG)]
    configs = [f"{adapter}/{ADAPTER_CONFIG}".lstrip("/") for adapter in adapters]
    values = {path: _value(path, content) for path, content in contents.items() if path.endswith((".json", ".yaml"))}
    for path, value in values.items():
        if Path(path).name == MANIFEST and not (isinstance(value, dict) and value.get("schema") == MANIFEST_SCHEMA):
            raise DataError(f"{files[path]} was not written by superexperts; take it out of the folder", field="folder")
    cuts = {path: _cut(path, top) for path in _absolute([*values.values(), results])}
    if base_model is not None:
        for path in configs:
            cuts |= dict.fromkeys(_absolute(values[path].get(BASE)), base_model)
            settings = values[path] | {BASE: base_model}
            contents[path] = json.dumps(settings, indent=2, sort_keys=True).encode()  # as PEFT writes it
    sent = []
    for path, content in contents.items():
        if isinstance(content, bytes) and Path(path).suffix in TEXT:
            content = _replaced(content.decode(), cuts).encode()
            _require_clean(content.decode(), files[path], top)
        sent.append(Upload(path=path, content=content))
    return Bundle(
        study=study,
        adapters=tuple(adapters),
        results=None if results is None else json.loads(_replaced(json.dumps(results, ensure_ascii=False), cuts)),
        files=tuple(sent),
        stripped=tuple(sorted(cuts)),
    )


def _of_study(folder: Path) -> dict[str, Path]:
    """Path in the repository -> file, of a finished study: its conclusions, manifests, expert sets and adapters."""
    for name in (*FINISHED, MANIFEST):
        if not (folder / name).is_file():
            raise DataError(f"{folder} has no {name}; run `superexperts study` to its end", field="folder")
    runs = [file.parent.parent for file in sorted(folder.glob(f"variants/*/train/adapter/{ADAPTER_CONFIG}"))]
    files = [folder / name for name in (*FINISHED, *OPTIONAL)]
    files += [file for file in folder.rglob(MANIFEST) if not _hidden(file, folder)]
    files += [*folder.glob("experts/*.json"), *_below(folder / "figures")]
    for run in runs:
        files += [run / "training.json", *_below(run / "adapter")]
    for one in (folder, *runs):
        _require_unchanged(one)
    return {file.relative_to(folder).as_posix(): file for file in files if file.is_file()}


def _of_adapter(folder: Path) -> tuple[Path, dict[str, Path]]:
    """The folder with the manifest, and path in the repository -> file: the adapter's own lie at the top."""
    adapter = folder if (folder / ADAPTER_CONFIG).is_file() else folder / "adapter"
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise DataError(
            f"{str(folder)!r} holds neither an adapter nor results.json; give the folder that `train` or `study` wrote",
            field="folder",
        )
    own = (adapter / MANIFEST).is_file()
    top = adapter if own else adapter.resolve().parent
    if not (top / MANIFEST).is_file():
        raise DataError(
            f"{folder} has no {MANIFEST}, so that nothing says that it is whole; give train's folder", field="folder"
        )
    _require_unchanged(top)
    files = {file.relative_to(adapter).as_posix(): file for file in _below(adapter)}
    if "README.md" not in files:
        raise DataError(f"{adapter} has no README.md, which becomes the model card; write one", field="folder")
    beside = {} if own else {name: top / name for name in (MANIFEST, "training.json") if (top / name).is_file()}
    return top, files | beside


def _results_around(top: Path) -> Any:
    """results.json of the study that the adapter belongs to (it is in variants/NAME/train); None without a study."""
    parents = top.resolve().parents
    if len(parents) < 3 or parents[1].name != "variants" or not (parents[2] / "results.json").is_file():
        return None
    return read_json(parents[2] / "results.json", "folder")


def _below(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if not file.is_dir() and not _hidden(file, folder)]


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _require_unchanged(folder: Path) -> None:
    changed = changed_outputs(folder)
    if changed:
        raise DataError(
            f"{folder / changed[0]} is missing or not as {folder / MANIFEST} says; run again what wrote it",
            field="folder",
        )


def _read(file: Path, top: Path) -> bytes | Path:
    """The bytes of a text or picture, or the path of weights. `DataError` for any other kind of file, and for content
    that does not match the suffix, such as a renamed pickle."""
    if not file.resolve().is_relative_to(top.resolve()):
        raise DataError(f"{file} is a link out of {top}; put the file itself there", field="folder")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="numpy") as tensors:
                tensors.keys()
            return file
        data = file.read_bytes()
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {file} ({error}); run again what wrote it", field="folder") from error
    if file.suffix in TEXT:
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 text; run again what wrote it", field="folder") from error
    elif file.suffix != ".png" or not data.startswith(PNG):
        kinds = ", ".join(("safetensors", "png", *(kind.removeprefix(".") for kind in TEXT)))
        raise DataError(
            f"{file} is none of the kinds that are pushed ({kinds}); take it out of the folder", field="folder"
        )
    return data


def _value(path: str, content: bytes | Path) -> Any:
    assert isinstance(content, bytes)
    try:
        return json.loads(content) if path.endswith(".json") else yaml.safe_load(content)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}); run again what wrote it", field="folder"
        ) from error


def _absolute(value: Any) -> Iterator[str]:
    """Every absolute path in the texts of a JSON or YAML value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _absolute(key)
            yield from _absolute(item)
    elif isinstance(value, list):
        for item in value:
            yield from _absolute(item)
    elif isinstance(value, str):
        whole = value.startswith("/") and "\n" not in value and value.rstrip("/").count("/") > 1
        yield from [value] if whole else PATH.findall(value)


def _cut(path: str, top: Path) -> str:
    for folder in (top.absolute(), top.resolve()):
        if Path(path).is_relative_to(folder):
            return str(Path(path).relative_to(folder))
    return Path(path).name


def _replaced(text: str, cuts: Mapping[str, str]) -> str:
    if not cuts:
        return text
    # Longest first: a folder's path is also the beginning of the paths of the files in it.
    longest_first = "|".join(re.escape(path) for path in sorted(cuts, key=len, reverse=True))
    return re.sub(rf"(?<![\w.])(?:{longest_first})(?![\w-])", lambda found: cuts[found[0]], text)


def _require_clean(text: str, file: Path, top: Path) -> None:
    """`DataError` for a folder of this machine's user and for a token."""
    own = {str(folder) for folder in (Path.home(), Path.cwd(), top.absolute(), top.resolve())} - {"/"}
    found = re.search(rf"(?<![\w.])(?:{'|'.join(map(re.escape, own))})(?![\w-])[^\s\"'<>]*", text) if own else None
    if found:
        line = text.count("\n", 0, found.start()) + 1
        raise DataError(
            (
                f"{file} names {found[0][:120]!a}, a path of this machine, in line {line}; take it out, or write "
                "the file again with relative paths"
            ),
            field="folder",
        )
    if TOKEN.search(text):
        raise DataError(
            f"{file} holds what looks like a token of the Hub (hf_...); take it out, and revoke it", field="folder"
        )
