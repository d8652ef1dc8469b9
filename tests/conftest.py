"""Fixtures that several test files share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn
from transformers import PreTrainedTokenizerBase

from superexperts import pocket
from superexperts.checkpoints.source import resolve
from superexperts.models.loading import load_model, load_tokenizer
from tests.support.servers import transformers_server

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real benchmark rows and corpora; tests that need them are skipped where they are missing."""
    folder = Path(os.environ.get("SUPEREXPERTS_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "mmlu_all_test.jsonl.gz").is_file():
        pytest.skip(f"no benchmark rows in {folder}; set SUPEREXPERTS_DATA")
    return folder


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """The pocket model, each test file's own: a test may leave it with an adapter."""
    return load_model(resolve("pocket"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """The pocket model's."""
    return load_tokenizer(resolve("pocket"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket model with a chat template that is nothing but the message."""
    folder = tmp_path_factory.mktemp("pocket") / "model"
    pocket.run(pocket.PocketConfig(out=folder))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a real OpenAI-compatible server, which loads a request's model from its folder."""
    with transformers_server(tmp_path_factory.mktemp("server") / "log") as url:
        yield url


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket world's benchmark files; only to be read."""
    folder = tmp_path_factory.mktemp("data")
    pocket.write_data(folder)
    return folder
