"""An adapter or a finished study on the Hub, in one commit; nothing else in this package uploads anything."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator
from typing import Any, Literal

from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, DatasetInfo, HfApi, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from superexperts import __version__
from superexperts.core.config_adapters import PushConfig
from superexperts.core.console import note, stderr
from superexperts.core.errors import Field, HubError, OptionError
from superexperts.hub.cards import adapter_card, study_card
from superexperts.hub.files import Bundle, Upload, collect

__all__ = ["run"]

CARD = "README.md"
MENDS = {
    400: "mend what it names, and run the same command again",
    401: "the token is missing or not valid; log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there; give one with write access, or name a repository of your own",
    404: "there is no such repository or branch, or the token may not see it; check --repo and --revision",
    409: "somebody else changed it meanwhile; run the same command again",
    412: "somebody else changed it meanwhile; run the same command again",
    413: "it is too large for the Hub; push the adapters one by one",
    429: "too many requests; wait a few minutes and run the same command again",
}
"""HTTP status -> what it means and what to do."""


def run(config: PushConfig) -> dict[str, Any]:
    """The command: checks the folder, writes the card, and makes one commit, or none where nothing has changed.

    `HubError` where the Hub refuses or cannot be reached.
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
        raise HubError(f"{config.repo}: {MENDS[401]}", field="repo")
    note(f"push: {len(bundle.files)} files, {size:,} bytes to {config.repo}")
    with _bars(), _one_line(config):
        return result | _commit(config, bundle, kind)


def _with_cards(bundle: Bundle, config: PushConfig) -> Bundle:
    """The adapters' cards with what only this command knows, and a study's own."""
    facts = {"base_model": config.base_model, "license": config.license, "datasets": list(config.dataset) or None}
    cards = {f"{adapter}/{CARD}".lstrip("/"): adapter_card(bundle, adapter, facts) for adapter in bundle.adapters}
    if bundle.study:
        cards[CARD] = study_card(bundle, facts)
    files = {file.path: file for file in bundle.files}
    files |= {path: Upload(path=path, content=text.encode()) for path, text in cards.items()}
    return dataclasses.replace(bundle, files=tuple(files[path] for path in sorted(files)))


def _commit(config: PushConfig, bundle: Bundle, kind: Literal["model", "dataset"]) -> dict[str, Any]:
    """Makes the repository and the branch where they are missing, and the commit; says what became of it."""
    api = HfApi(library_name="superexperts", library_version=__version__)
    url = api.create_repo(config.repo, repo_type=kind, private=config.private, exist_ok=True)
    if config.private and not api.repo_info(config.repo, repo_type=kind).private:
        raise HubError(
            f"{config.repo} is there and public; give ",
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
    with warnings.catch_warnings(record=True) as said:  # what the Hub has to say of the card
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
    """`HubError` with the mend for what huggingface_hub raises; a rerun sends only what is not yet there."""
    repo = f"--repo: {config.repo}"
    try:
        yield
    except HubError:
        raise
    except HFValidationError as error:
        raise OptionError(
            f"{config.repo!r} is no name on the Hub ({_line(error)}); give another", field="repo"
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE: it is set, and nothing can be pushed; unset it") from error
    except HfHubHTTPError as error:
        raise HubError(f"{repo}: {_status(error, error.server_message)}") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # Of the card and of large files huggingface_hub says which is wrong, and gives the Hub's answer as the cause.
        if isinstance(error.__cause__, HfHubHTTPError):
            raise HubError(f"{repo}: {_status(error.__cause__, error)}") from error
        raise HubError(f"{repo}: {_line(error)}; check the network, and run the same command again") from error


def _status(error: HfHubHTTPError, message: object) -> str:
    status = error.response.status_code
    said = f" ({_line(message)})" if message else ""
    return f"{status}{said}: {MENDS.get(status, 'the Hub failed; run the same command again later')}"


def _line(message: object) -> str:
    """What a server or a library says, as a part of a line."""
    text = " ".join(re.sub(r"[^\x20-\x7e]", " ", str(message)).split())
    return text[:200].rstrip(".:; ")


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    """huggingface_hub's progress bars only where somebody sees them move, as of this package's own."""
    if stderr.is_terminal or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
