"""Float8 and MXFP4 checkpoints on a CPU: in every command the ordinary numbers that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from superexperts.adapters import export
from superexperts.adapters.export import ExportConfig
from superexperts.adapters.lora import load_adapter
from superexperts.checkpoints.reader import SINGLE
from superexperts.checkpoints.source import resolve
from superexperts.core.errors import ModelError, OptionError
from superexperts.evaluation import check_adapter, evaluate
from superexperts.evaluation.check_adapter import CheckAdapterConfig
from superexperts.evaluation.evaluate import EvaluateConfig
from superexperts.models.loading import load_model
from superexperts.training import train
from superexperts.training.train import TrainConfig
from tests.adapters.test_lora import logits
from tests.adapters.test_merged_bases import float8, mxfp4
from tests.profiling.test_streamed import change, quantize
from tests.support.families import tiny_model
from tests.training.test_train import ROWS, byte_tokenizer


def uneven(plain: Path, quantized: Path, **sizes: int) -> None:
    """DeepSeek-V3 with an odd last block in each matrix: 32 columns are a block of 20 and one of 12."""
    for folder in (plain, quantized):
        tiny_model("deepseek_v3", torch.bfloat16, **sizes).save_pretrained(folder)
    meant = quantize(quantized, (12, 20))
    save_file(load_file(plain / SINGLE) | meant, plain / SINGLE, metadata={"format": "pt"})


MAKERS: list[Callable[..., None]] = [float8, uneven, mxfp4]


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def bases(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    request.param(tmp_path / "plain", tmp_path / "quantized", vocab_size=259, max_position_embeddings=4096)
    for name in ("plain", "quantized"):
        byte_tokenizer().save_pretrained(tmp_path / name)
    return str(tmp_path / "plain"), str(tmp_path / "quantized")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_logits_are_those_of_the_ordinary_numbers(bases: tuple[str, str], dtype: str) -> None:
    plain, quantized = (load_model(resolve(base), device="cpu", dtype=dtype) for base in bases)
    assert {parameter.dtype for parameter in quantized.parameters()} == {
        torch.float32 if dtype == "auto" else torch.bfloat16
    }
    assert torch.equal(logits(quantized), logits(plain))


def test_the_generation_settings_come_along(tmp_path: Path) -> None:
    float8(tmp_path / "plain", tmp_path / "quantized")
    (tmp_path / "quantized" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    loaded: Any = load_model(resolve(str(tmp_path / "quantized")), device="cpu")
    assert loaded.generation_config.eos_token_id == [2, 7]


def test_float8_without_scales_is_not_taken_for_the_numbers(tmp_path: Path) -> None:
    float8(tmp_path / "plain", tmp_path / "quantized")

    def drop(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("_scale_inv")]:
            del tensors[key]

    change(tmp_path / "quantized", drop)
    with pytest.raises(ModelError, match="has no scales for the float8 .*; fetch it again"):
        load_model(resolve(str(tmp_path / "quantized")), device="cpu")


def test_trained_checked_asked_and_merged(tmp_path: Path, bases: tuple[str, str]) -> None:
    """An adapter on the quantized base is the one on its ordinary numbers, bit for bit."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    adapters = []
    for base in bases:
        out = tmp_path / f"trained {Path(base).name}"
        train.run(TrainConfig(model=base, data=tmp_path / "rows.jsonl", experts="L1E1,L1E2", out=out, device="cpu",
                              batch_size=1, epochs=2, learning_rate=1e-2, allow_unexposed=True))  # fmt: skip
        adapters.append(out / "adapter")
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in adapters]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])

    _, base = bases
    found = check_adapter.run(CheckAdapterConfig(model=base, adapter=adapters[1], device="cpu"))
    assert found["max_logit_change"] > 0
    answers = []
    for model, adapter in zip(bases, adapters, strict=True):
        out = tmp_path / f"asked {Path(model).name}"
        evaluate.run(EvaluateConfig(model=model, adapter=adapter, tasks="boolq", data_dir=Path("pocket"), limit=2,
                                    out=out, device="cpu", variant="one", max_new_tokens=8))  # fmt: skip
        rows = [json.loads(line) for line in (out / "answers" / "boolq.jsonl").read_text().splitlines()]
        answers.append([{key: value for key, value in row.items() if "second" not in key} for row in rows])
    assert answers[0] == answers[1]

    export.run(ExportConfig(adapter=adapters[1], format="merged", model=base, out=tmp_path / "merged"))
    merged = logits(load_model(resolve(str(tmp_path / "merged")), device="cpu"))
    adapted = logits(load_adapter(load_model(resolve(base), device="cpu"), adapters[1], "adapter"))
    assert (merged - adapted).abs().mean() < 0.02 * adapted.abs().mean()


@pytest.mark.parametrize("field", ["offload", "load_in_4bit"])
def test_a_quantized_base_is_loaded_whole(tmp_path: Path, field: str) -> None:
    float8(tmp_path / "plain", tmp_path / "quantized", vocab_size=259)
    byte_tokenizer().save_pretrained(tmp_path / "quantized")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings: Any = {field: True}
    with pytest.raises(OptionError, match=f"{field}: the model is quantized already; leave it out"):
        train.run(TrainConfig(model=str(tmp_path / "quantized"), data=tmp_path / "rows.jsonl", experts="L1E1",
                              out=tmp_path / "out", device="cpu", **settings))  # fmt: skip
    assert not (tmp_path / "out" / "adapter").exists()
