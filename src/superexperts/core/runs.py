"""Run folders: files and folders that are written completely or not at all, and manifests that let a stage run once.

A file or folder is written under a temporary name and then renamed. A manifest names a stage's inputs and outputs with
their hashes; a stage with an unchanged manifest, inputs and outputs is not run again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from superexperts.core.errors import DataError, Field, OutputError
from superexperts.core.stages import stage_version

__all__ = [
    "changed_outputs",
    "completed",
    "differing_inputs",
    "digest",
    "fingerprint",
    "input_key",
    "made_from",
    "new_folder",
    "other_result",
    "prepare_folder",
    "read_json",
    "write_bytes",
    "write_json",
    "write_manifest",
    "write_text",
]

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = "superexperts/manifest/1"
PACKAGES = ("superexperts", "torch", "transformers", "peft", "trl", "lm_eval", "datasets", "accelerate")
TEMPORARY, NEW, OLD = ".tmp", ".new", ".old"
"""Endings of the temporary names `.NAME.XXXXXXXX.tmp` (a file being written), `.new` (a folder being written) and
`.old` (the folder that it replaces). Killed runs leave them behind; a later run removes them."""
WHOLE_FILE_HASH = 64 * 2**20
"""Larger files are hashed by size, time stamp and both ends, since shards have gigabytes."""


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` under a temporary name, syncs it to disk, and renames it to `path`.

    Also removes temporary files that killed processes left of the same file. `OutputError` if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _settle(path)
        handle, temporary = _temporary(path, TEMPORARY)
    except OSError as error:
        raise OutputError(
            f"cannot write to {path.parent} ({error.strerror}); choose another folder", field="out"
        ) from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise OutputError(
                f"cannot write {path} ({reason}); make room or choose another path", field="out"
            ) from error
        raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text; a lone surrogate, which a model can generate, is written as an escape."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` for JSON with a final newline; `ValueError` for NaN, which is not JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, what: str, advice: str = "write it again") -> Any:
    """Reads a JSON file; an error is about the field `what`: the setting that named the file, or the kind of file.

    `advice` says what to do if the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); check the path", field=what) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise DataError(f"{path} is not valid JSON ({error}); {advice}", field=what) from error


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder and its subfolders.

    Of a file over 64 MiB, the size, the time stamp and the first and last MiB are hashed. Manifests and hidden files
    are left out, since they say when something was made, not what it is.
    """
    if not path.exists():
        raise DataError(f"{path} is missing; check the path")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    parts: list[list[str | int]] = []
    for file in files:
        name = "" if file == path else str(file.relative_to(path))
        if file.name == MANIFEST or any(part.startswith(".") for part in Path(name).parts):
            continue
        stat = file.stat()
        with file.open("rb") as stream:
            if stat.st_size <= WHOLE_FILE_HASH:
                parts.append([name, hashlib.file_digest(stream, "sha256").hexdigest()])
            else:
                sha = hashlib.sha256(stream.read(2**20))
                stream.seek(-(2**20), os.SEEK_END)
                sha.update(stream.read())
                parts.append([name, stat.st_size, stat.st_mtime_ns, sha.hexdigest()])
    return digest(parts)


def prepare_folder(folder: Path, field: str = "out") -> Path:
    """Creates `folder` and checks that files can be written to it, before any work is done; `OutputError` if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write to {folder} ({reason}); choose another folder", field=field) from error
    return folder


@contextlib.contextmanager
def new_folder(folder: Path, command: str, field: str = "out", *, synced: bool = True) -> Iterator[Path]:
    """Yields a temporary folder that replaces `folder` when the block ends, and is removed if the block raises.

    An existing folder is replaced only if it is empty or its manifest names the same command, so that no user's files
    are lost; otherwise `OutputError`. Also removes what killed runs left beside it. Without `synced`, files that were
    not written by `write_bytes` are not synced to disk: a kill then leaves no partial folder, but a power loss may.
    """
    folder = folder.resolve() if folder.is_symlink() else folder
    _settle(folder)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _made_by(folder, command))):
        raise OutputError(f"{folder} exists and was not made by `{command}`; choose another folder", field=field)
    parent_is_ours = not folder.parent.exists()
    prepare_folder(folder.parent, field)
    handle, temporary = _temporary(folder, NEW)
    temporary.chmod(0o755)
    outgoing = temporary.with_suffix(OLD)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            # A hard-linked file also belongs to another folder and must not be changed.
            if file.is_file() and not file.is_symlink() and file.stat().st_nlink == 1:
                file.chmod(0o644)  # some libraries write files that only the owner can read
                if synced:
                    with file.open("rb") as stream:
                        os.fsync(stream.fileno())
        if folder.exists():
            with _held(folder):
                folder.replace(outgoing)
                temporary.replace(folder)
            shutil.rmtree(outgoing, ignore_errors=True)
        else:
            temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if outgoing.exists() and not folder.exists():
            outgoing.replace(folder)
        if parent_is_ours:
            with contextlib.suppress(OSError):  # not empty: a command may have left files there to resume from
                folder.parent.rmdir()
        raise
    finally:
        os.close(handle)


def _temporary(target: Path, ending: str) -> tuple[int, Path]:
    """Creates a hidden file (.tmp) or folder beside `target`; its descriptor holds the lock that `_settle` checks."""
    while True:
        prefix = f".{target.name}."
        if ending == TEMPORARY:
            handle, name = tempfile.mkstemp(ending, prefix, target.parent)
        else:
            name = tempfile.mkdtemp(ending, prefix, target.parent)
            try:
                handle = os.open(name, os.O_RDONLY)
            except FileNotFoundError:
                continue
        _lock(handle)
        if os.path.lexists(name):
            return handle, Path(name)
        os.close(handle)  # another process took it for a leftover and removed it before it was locked


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Locks `folder`; the lock stays with it when it is renamed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle)
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    # Shared, because `_clear` asks for an exclusive lock, and so fails while any writer lives. The kernel frees a lock
    # when its process dies. On a file system without locks `_settle` cannot lock either, and so removes nothing.
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_SH)


def _settle(target: Path) -> None:
    """Removes what killed processes left beside `target`, and restores an older `target` that one of them had moved
    away but not yet replaced. What a running process writes is locked, and stays."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.(tmp|new|old)")
    found: list[Path] = []
    with contextlib.suppress(OSError):  # the folder does not exist
        found = [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]
    for path in found:
        with contextlib.suppress(OSError):  # locked, already removed, or without permission
            _clear(path, target)


def _clear(path: Path, target: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.suffix == OLD and not target.exists():
            path.replace(target)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    finally:
        os.close(handle)


def _made_by(folder: Path, command: str) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_json(folder / MANIFEST, "manifest")
    return isinstance(manifest, dict) and manifest.get("command") == command


def write_manifest(
    folder: Path, command: str, inputs: Mapping[str, Any], outputs: list[str], seconds: float, **more: Any
) -> None:
    """Writes `manifest.json`. Must come last: a manifest with the same `inputs` means that the stage is complete."""
    write_json(
        folder / MANIFEST,
        {
            "schema": MANIFEST_SCHEMA,
            "command": command,
            "version": stage_version(command),
            "key": input_key(command, inputs),
            "inputs": dict(inputs),
            "outputs": {name: fingerprint(folder / name) for name in outputs},
            "versions": versions(),
            "git_commit": git_commit(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 1),
            **more,
        },
    )


def input_key(command: str, inputs: Mapping[str, Any]) -> str:
    """A hash of all that must be equal for a result to be up to date: the stage, its version, and its inputs."""
    return digest([command, stage_version(command), dict(inputs)])


def made_from(manifest: Any, command: str) -> dict[str, Any] | None:
    """The inputs of the result that a manifest describes; None if `command` did not write it in its present version.

    Manifests of superexperts 0.1.0 have no version and count as version 1.
    """
    if not isinstance(manifest, dict) or manifest.get("command") != command:
        return None
    inputs = manifest.get("inputs")
    current = manifest.get("version", 1) == stage_version(command)
    return inputs if current and isinstance(inputs, dict) else None


def completed(folder: Path, command: str, inputs: Mapping[str, Any], *, overwrite: bool = True) -> bool:
    """Whether `folder` holds this command's result for exactly these inputs, with every output unchanged.

    Without `overwrite`, `OutputError` if it holds the finished result of other inputs, which may have taken hours.
    First removes what killed runs left beside the folder: one of them may have moved an older result away and not yet
    put its own in that place.
    """
    _settle(folder)
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        return False
    manifest = read_json(manifest_path, "manifest")
    if not overwrite and (names := differing_inputs(manifest, command, inputs)):
        raise other_result(folder, command, names)
    found = made_from(manifest, command)
    # The manifest holds JSON values: lists where the inputs may have tuples.
    if found is None or digest(found) != digest(dict(inputs)):
        return False
    return not changed_outputs(folder)


def differing_inputs(manifest: Any, command: str, inputs: Mapping[str, Any]) -> list[str]:
    """Names of the inputs and options that a command's manifest and `inputs` both have, with different values.

    Names that only one of the two has are ignored: another version of the stage may have added or removed them, and a
    new version alone must not make the command refuse to run.
    """
    if not isinstance(manifest, dict) or manifest.get("command") != command:
        return []
    old, new = manifest.get("inputs"), json.loads(json.dumps(dict(inputs)))
    pairs = [(old, new), *((one.get("options"), new.get("options")) for one in (old,) if isinstance(one, dict))]
    return [
        name
        for one, other in pairs
        if isinstance(one, dict) and isinstance(other, dict)
        for name in one
        if name != "options" and name in other and one[name] != other[name]
    ]


def other_result(folder: Path, command: str, names: Sequence[str]) -> OutputError:
    """The refusal to replace a finished result; `names` are the inputs in which it differs."""
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return OutputError(
        f"{folder} holds a finished result of `{command}` with another {shown}; choose another folder, or replace it "
        "with ",
        Field("overwrite"),
        field="out",
    )


def changed_outputs(folder: Path) -> list[str]:
    """The outputs named in `folder`'s manifest, relative to it, that are missing or not as they were written."""
    manifest = read_json(folder / MANIFEST, "manifest")
    if not isinstance(manifest, dict) or manifest.get("schema") != MANIFEST_SCHEMA:
        raise DataError(
            f"{folder / MANIFEST} was not written by superexperts; give a folder that it wrote", field="manifest"
        )
    outputs: dict[str, str] = manifest["outputs"]
    return [name for name, sha in outputs.items() if not (folder / name).exists() or fingerprint(folder / name) != sha]


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results can depend on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


@functools.cache
def git_commit() -> str | None:
    """Commit of this package's source tree; None if it was installed from a wheel."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # Check that this file is tracked: an environment may lie inside the repository of another project.
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=False)
        done = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() if tracked.returncode == done.returncode == 0 else None
