"""The command `push`: an adapter or a finished study on the Hub, in one commit. No other command uploads anything."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, DatasetInfo, HfApi, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tyro.conf import Positional

from superexperts import __version__
from superexperts.core.console import note, stderr, stdout
from superexperts.core.errors import Field, HubError, OptionError
from superexperts.core.settings import Switch, require
from superexperts.hub.cards import adapter_card, study_card
from superexperts.hub.files import Bundle, Upload, collect

__all__ = ["PushConfig", "run", "show"]

CARD = "README.md"
WHAT_TO_DO = {
    400: "fix what it names, and run the same command again",
    401: "the token is missing or not valid; log in with `hf auth login`, or set HF_TOKEN",
    403: "the token has no write access there; give one that has, or push to one of your repositories",
    404: "there is no such repository or branch, or the token cannot see it; check the names of both",
    409: "the repository was changed meanwhile; run the same command again",
    412: "the repository was changed meanwhile; run the same command again",
    413: "the upload is too large for the Hub; push the adapters one by one",
    429: "too many requests; wait a few minutes and run the same command again",
}
"""HTTP status -> what it means and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Put an adapter or a finished study on the Hub, with its card, in one commit. Uses the
    login of `hf auth login`, or HF_TOKEN.

    Example: superexperts push runs/lora --repo OWNER/NAME --dry-run
    """

    folder: Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """Folder of `train`, an adapter in it, or folder of `study`."""
    repo: str
    """OWNER/NAME on the Hub; created if it is missing. A model repository, or a data set repository for a study
    without adapters."""
    private: bool = True
    """Whether a new repository is private. One that exists keeps its setting; a public one needs --no-private."""
    revision: str | None = None
    """Branch; created if it is missing. Default: main."""
    message: str | None = None
    """Commit message; default: what is uploaded, and the version."""
    base_model: str | None = None
    """OWNER/NAME of the base model on the Hub; needed if the adapter was trained from a local folder."""
    license: str | None = None
    """Licence for the card, by the Hub's name for it, such as apache-2.0; default: none."""
    dataset: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """OWNER/NAME of training data on the Hub, for the card; may be given several times."""
    dry_run: Switch = False
    """Check everything and list the files with their sizes; nothing is sent."""
    json: Switch = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        for option, names in (
            ("repo", [self.repo]),
            ("base_model", [self.base_model]),
            ("dataset", self.dataset),
        ):
            for name in names:
                good = name is None or re.fullmatch(r"[\w.-]+/[\w.-]+", name)
                require(bool(good), option, name, "is not OWNER/NAME; give it as the Hub shows it")
        for option, text in (("message", self.message), ("revision", self.revision), ("license", self.license)):
            require(text is None or bool(text.strip()), option, text, "is empty; leave it out, or give one")


def run(config: PushConfig) -> dict[str, Any]:
    """Checks the folder, writes the card, and makes one commit, or none if nothing has changed.

    `HubError` if the Hub refuses or cannot be reached.
    """
    bundle = collect(config.folder, config.base_model)
    # A study without an adapter holds results and no model.
    kind: Literal["model", "dataset"] = "model" if bundle.adapters else "dataset"
    bundle = _with_cards(bundle, config)
    size = sum(file.size for file in bundle.files)
    if bundle.stripped:
        note(f"push: paths of this machine are not sent: {', '.join(bundle.stripped)}")
    result = {
        "repo": config.repo,
        "repo_type": kind,
        "files": [{"path": file.path, "bytes": file.size} for file in bundle.files],
        "bytes": size,
        "stripped": list(bundle.stripped),
        "dry_run": config.dry_run,
    }
    if config.dry_run:
        return result
    if get_token() is None:
        raise HubError(f"{config.repo}: {WHAT_TO_DO[401]}", field="repo")
    note(f"push: {len(bundle.files)} files, {size:,} bytes to {config.repo}")
    with _bars(), _one_line(config):
        return result | _commit(config, bundle, kind)


def _with_cards(bundle: Bundle, config: PushConfig) -> Bundle:
    """Adds the cards: each adapter's with the facts that only this command knows, and the study's."""
    facts = {"base_model": config.base_model, "license": config.license, "datasets": list(config.dataset) or None}
    cards = {f"{adapter}/{CARD}".lstrip("/"): adapter_card(bundle, adapter, facts) for adapter in bundle.adapters}
    if bundle.study:
        cards[CARD] = study_card(bundle, facts)
    files = {file.path: file for file in bundle.files}
    files |= {path: Upload(path=path, content=text.encode()) for path, text in cards.items()}
    return dataclasses.replace(bundle, files=tuple(files[path] for path in sorted(files)))


def _commit(config: PushConfig, bundle: Bundle, kind: Literal["model", "dataset"]) -> dict[str, Any]:
    """Creates the repository and the branch if they are missing, makes the commit, and returns what was done."""
    api = HfApi(library_name="superexperts", library_version=__version__)
    url = api.create_repo(config.repo, repo_type=kind, private=config.private, exist_ok=True)
    if config.private and not api.repo_info(config.repo, repo_type=kind).private:
        raise HubError(
            f"{config.repo} exists and is public; give ",
            Field("no_private"),
            ", or another ",
            Field("repo"),
            field="private",
        )
    if config.revision is not None:
        api.create_branch(config.repo, branch=config.revision, repo_type=kind, exist_ok=True)
    before = api.repo_info(config.repo, repo_type=kind, revision=config.revision)
    assert isinstance(before, ModelInfo | DatasetInfo)
    what = "study" if bundle.study else "adapter"
    with warnings.catch_warnings(record=True) as said:  # the Hub validates the card and warns
        warnings.simplefilter("always")
        commit = api.create_commit(
            config.repo,
            [CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=file.content) for file in bundle.files],
            commit_message=config.message or f"Upload {what} with superexperts {__version__}",
            repo_type=kind,
            revision=config.revision,
        )
    for warning in said:
        if warning.category is UserWarning:
            note(f"push: {_line(warning.message)}")
    sent = {file.path for file in bundle.files}
    there = [file.rfilename for file in before.siblings or [] if not file.rfilename.startswith(".")]
    return {
        "url": str(url),
        "commit": commit.oid,
        "changed": commit.oid != before.sha,
        "others": sorted(set(there) - sent),
    }


@contextlib.contextmanager
def _one_line(config: PushConfig) -> Iterator[None]:
    """Turns what huggingface_hub raises into one `HubError` that says what to do. A rerun sends what is missing."""
    repo = config.repo
    try:
        yield
    except HubError:
        raise
    except HFValidationError as error:
        raise OptionError(
            f"{config.repo!r} is not a name on the Hub ({_line(error)}); give another", field="repo"
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from error
    except HfHubHTTPError as error:
        raise HubError(f"{repo}: {_status(error, error.server_message)}", field="repo") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # For the card and for large files, huggingface_hub names the file and attaches the Hub's answer as the cause.
        if isinstance(error.__cause__, HfHubHTTPError):
            raise HubError(f"{repo}: {_status(error.__cause__, error)}", field="repo") from error
        raise HubError(
            f"{repo}: {_line(error)}; check the network, and run the same command again", field="repo"
        ) from error


def _status(error: HfHubHTTPError, message: object) -> str:
    status = error.response.status_code
    said = f" ({_line(message)})" if message else ""
    return f"{status}{said}: {WHAT_TO_DO.get(status, 'the Hub failed; run the same command again later')}"


def _line(message: object) -> str:
    """The message of a server or a library, as part of one line of printable ASCII."""
    text = " ".join(re.sub(r"[^\x20-\x7e]", " ", str(message)).split())
    return text[:200].rstrip(".:; ")


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    """Shows huggingface_hub's progress bars only in a terminal, like this package's own."""
    if stderr.is_terminal or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def show(result: dict[str, Any]) -> None:
    """Prints what was sent, or would be."""

    def line(text: str) -> None:
        stdout.print(text, soft_wrap=True, markup=False)

    if result["dry_run"]:
        for file in result["files"]:
            line(f"{file['bytes']:>13,}  {file['path']}")
    size = f"{len(result['files'])} files, {result['bytes']:,} bytes"
    if result["dry_run"]:
        line(f"{size} for the {result['repo_type']} repository {result['repo']}; nothing was sent (--dry-run)")
        return
    if result["others"]:
        others = ", ".join(map(ascii, result["others"]))
        line(f"not touched, since this folder has no files of these names: {others}")
    line(f"{size} in {result['url']}" if result["changed"] else f"{result['url']} has all {size} already")
    line(f"commit {result['commit']}")
