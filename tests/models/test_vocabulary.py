"""A tokenizer that knows more tokens than the model has rows, or none at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from superexperts.adapters import lora
from superexperts.checkpoints.source import resolve
from superexperts.core.errors import ModelError
from superexperts.evaluation import check_adapter
from superexperts.evaluation.check_adapter import CheckAdapterConfig
from superexperts.models.loading import load_tokenizer
from superexperts.profiling import profile
from superexperts.profiling.profile import ProfileConfig
from superexperts.training import train
from superexperts.training.train import TrainConfig
from tests.support.families import VOCABULARY, tiny_model
from tests.training.test_train import byte_tokenizer

TOKENS = len(byte_tokenizer())


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A model of 97 rows with a tokenizer of all bytes."""
    assert TOKENS > VOCABULARY
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_only_text_with_such_a_token_is_refused(narrow: Path) -> None:
    tokenizer = load_tokenizer(resolve(str(narrow)))
    low = [token for token in range(5, VOCABULARY) if len(tokenizer.decode([token])) == 1]
    assert tokenizer(tokenizer.decode(low), add_special_tokens=False).input_ids == low
    words = rf"model: .* has {TOKENS} tokens, its model {VOCABULARY} rows of embeddings, and the text holds token \d+"
    for encode in (tokenizer, tokenizer.encode, lambda text: tokenizer([text, text], return_tensors="pt")):
        with pytest.raises(ModelError, match=words) as caught:
            encode("every word of this, \u00e9 \u00ff")
        assert "\n" not in str(caught.value)


def test_every_command_says_both_numbers(narrow: Path, tmp_path: Path) -> None:
    words = f"has {TOKENS} tokens, its model {VOCABULARY} rows"
    adapted = lora.attach(tiny_model("qwen3_moe"), attention=True, r=2, alpha=4, dropout=0.0, seed=0)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    (tmp_path / "rows.json").write_text(json.dumps([{"question": "q\u00ff", "explain": "e", "answer": "A"}] * 4))
    with pytest.raises(ModelError, match=words):
        profile.run(ProfileConfig(model=str(narrow), corpus=("pocket",), tokens=128, seq_len=32, out=tmp_path / "p"))
    with pytest.raises(ModelError, match=words):
        check_adapter.run(CheckAdapterConfig(model=str(narrow), adapter=tmp_path / "adapter", tokens=128, seq_len=32))
    with pytest.raises(ModelError, match=words):
        train.run(TrainConfig(model=str(narrow), data=tmp_path / "rows.json", attention=True, out=tmp_path / "t"))
    assert not (tmp_path / "p").exists()
    assert not (tmp_path / "t").exists()


def test_a_folder_without_tokenizer_files_says_so(narrow: Path) -> None:
    for file in narrow.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(resolve(str(narrow)))
