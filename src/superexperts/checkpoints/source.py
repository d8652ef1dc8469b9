"""Which folder a model's or an adapter's name means. Neither torch nor transformers is imported for it."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from superexperts.core.errors import DataError, ModelError
from superexperts.core.paths import missing, require_folder
from superexperts.core.runs import fingerprint, read_json
from superexperts.pocket import checkpoint_dir

__all__ = [
    "CONFIG_FILE",
    "JUDGE",
    "MODEL",
    "TRAINED",
    "ModelSource",
    "adapter_folder",
    "hub_error",
    "is_adapter",
    "local_folder",
    "resolve",
]

# What a checkpoint is made of; .bin and .pt are pickles and are not fetched.
CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]

CONFIG_FILE = "adapter_config.json"
"""Makes a folder an adapter's."""

MODEL = "a checkpoint folder, a model on the Hub (OWNER/NAME), or `pocket`"
"""What a setting that names a model takes, for errors."""
JUDGE = "a checkpoint folder, or a model on the Hub (OWNER/NAME)"
"""What a setting that names a judge takes: the pocket model cannot judge."""
TRAINED = "the folder that `train` wrote, or the folder adapter/ in it"
"""What a setting that names an adapter takes, for errors."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""What a repository on the Hub can be called; anything else can only be a path."""


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: what a command resolves once, and everything below it is handed."""

    name: str
    """As the user gave it: `pocket`, a folder, or OWNER/NAME on the Hub."""
    folder: Path
    """The checkpoint on this machine."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the checkpoint may run."""
    field: str = "model"
    """The setting that named the model, for errors."""

    @functools.cached_property
    def config(self) -> Any:
        """The value in config.json, a dict unless the file is broken; read once."""
        return read_json(self.folder / "config.json", self.field)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the checkpoint's files, see `core.runs.fingerprint`; read once."""
        return fingerprint(self.folder)


def resolve(
    name: str,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    fetch: bool = True,
    field: str = "model",
    what: str = MODEL,
) -> ModelSource:
    """Finds the checkpoint that `name` means: `pocket`, a folder, or a Hub repository.

    A repository's snapshot is fetched unless it is here already; without `fetch` it must be here. `ModelError` about
    `field` if there is no such checkpoint, or if it holds no safetensors; `what` is what the setting takes.
    """
    folder = local_folder(name, field=field, what=what)
    if folder is None:
        folder = _snapshot(name, revision, fetch=fetch, field=field, what=what)
    return ModelSource(name, folder, revision, trust_remote_code, field)


def local_folder(name: str, *, field: str = "model", what: str = MODEL) -> Path | None:
    """The checkpoint folder on this machine that `name` means; None for a name that only the Hub can know.

    Takes no time and asks no one. `ModelError` about `field` for a name that can mean no checkpoint.
    """
    if name == "pocket":
        return checkpoint_dir()
    if not name:
        raise ModelError(f"the name is empty; give {what}", field=field)
    folder = Path(name)
    if folder.is_dir():
        _require_checkpoint(folder, name, field, what)
        return folder
    if folder.exists():
        raise ModelError(f"{name!r} is a file; give {what}", field=field)
    if HUB_NAME.fullmatch(name) is None:
        raise ModelError(f"{missing(folder)}; give {what}", field=field)
    return None


def _require_checkpoint(folder: Path, name: str, field: str, what: str) -> None:
    if not (folder / "config.json").is_file():
        if is_adapter(folder):
            raise ModelError(
                f"{name!r} is an adapter, not a checkpoint; give its base model, or merge it with "
                "`superexperts export --format merged` first",
                field=field,
            )
        raise ModelError(f"{name!r} has no config.json; give {what}", field=field)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{name!r} has no .safetensors file (pickles are not read); convert it first", field=field)


def _snapshot(name: str, revision: str | None, *, fetch: bool, field: str, what: str) -> Path:
    # Imported here, so that a local folder does not wait for the Hub's client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=CHECKPOINT_FILES, local_files_only=not fetch)
        )
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise hub_error(name, revision, error, field=field, what=what) from error


def hub_error(
    name: str, revision: str | None, error: BaseException, *, field: str = "model", what: str = MODEL
) -> ModelError:
    """What to say where a model that is not a folder here could not be had from the Hub because of `error`."""
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    reasons = tuple(_causes(error))

    def because(*kinds: type[BaseException]) -> bool:
        return any(isinstance(reason, kinds) for reason in reasons)

    if because(GatedRepoError):
        text = f"{name!r} is a gated model; accept its terms at huggingface.co/{name}, then log in with `hf auth login`"
    elif because(RevisionNotFoundError):
        text = f"{name!r} has no revision {revision!r} on the Hub; give a branch, tag or commit that it has"
    elif because(RepositoryNotFoundError, HFValidationError):
        text = (
            f"{name!r} is neither a folder nor a model on the Hub; give {what} (a private model needs `hf auth login`)"
        )
    elif is_offline_mode():
        text = (
            f"{name!r} is neither a folder nor a model in the Hub's cache, and HF_HUB_OFFLINE forbids asking the Hub; "
            f"unset it, or give {what}"
        )
    else:
        text = (
            f"{name!r} is neither a folder nor a model in the Hub's cache, and the Hub does not answer; check the "
            f"network, or give {what}"
        )
    return ModelError(text, field=field)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def adapter_folder(path: Path, field: str = "adapter", what: str = TRAINED) -> Path:
    """The folder with the adapter's files: `path` itself; its `adapter/` if it is one that `train` wrote; or the only
    one below it, since PEFT saves an adapter of another name than `default` in a folder of that name.

    `DataError` about `field` if there is none, or more than one; `what` is what the setting takes.
    """
    require_folder(path, field, what)
    if (path / CONFIG_FILE).is_file():
        return path
    inside = [file.parent for file in sorted(path.glob(f"*/{CONFIG_FILE}"))]
    if path / "adapter" in inside:
        return path / "adapter"
    if len(inside) > 1:
        names = ", ".join(folder.name for folder in inside)
        raise DataError(f"{str(path)!r} has no {CONFIG_FILE}; it is in {names}: give one of them", field=field)
    if not inside:
        raise DataError(f"{str(path)!r} has no {CONFIG_FILE}; give {what}", field=field)
    return inside[0]


def is_adapter(folder: Path) -> bool:
    """Whether the folder is an adapter's, or no checkpoint and holds folders of adapters, such as that of `train`."""
    if (folder / CONFIG_FILE).is_file():
        return True
    return not (folder / "config.json").is_file() and any(folder.glob(f"*/{CONFIG_FILE}"))
