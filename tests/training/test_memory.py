"""Models loaded in less memory train the same adapter, or say why they do not."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import nn

from superexperts.checkpoints.source import resolve
from superexperts.core.errors import OptionError
from superexperts.models.loading import load_structure
from superexperts.training import memory, train
from superexperts.training.train import TrainConfig
from tests.training.test_train import save_checkpoint
from tests.training.test_train_options import EIGHT, WEIGHTS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", "deepseek_v2")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Any:
    (tmp_path / "rows.json").write_text(json.dumps(EIGHT))

    def make(name: str, **options: Any) -> TrainConfig:
        plain = {"data": tmp_path / "rows.json", "out": tmp_path / name, "r": 4, "device": "cpu", "batch_size": 4}
        return TrainConfig(model=str(model), **{**plain, "experts": "L2E1,L2E3", **options})

    return make


def test_layers_on_disk_train_the_same_adapter(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded: list[nn.Module] = []
    load = memory.load_as_stored

    def noted(*arguments: Any, **settings: Any) -> nn.Module:
        loaded.append(load(*arguments, **settings))
        away = {name.split(".")[2] for name, p in loaded[0].named_parameters() if p.is_meta}
        assert away == {"0", "1"}
        return loaded[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "load_as_stored", noted)
        train.run(config("away", offload=True))
    assert len(loaded) == 1
    assert "layers 0 to 1 stay on disk" in capsys.readouterr().err
    train.run(config("here"))
    assert (tmp_path / "away" / WEIGHTS).read_bytes() == (tmp_path / "here" / WEIGHTS).read_bytes()


def test_what_cannot_be_offloaded_or_quantized(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OptionError, match="offload: layer 0 carries an adapter"):
        train.run(config("a", attention=True, offload=True))
    with monkeypatch.context() as patch:
        find = importlib.util.find_spec
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
        with pytest.raises(OptionError, match=r"load_in_4bit: bitsandbytes is not installed; run pip install superex"):
            train.run(config("b", load_in_4bit=True))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(OptionError, match="load_in_4bit: no linear map of a suitable size lies outside"):
        train.run(config("c", load_in_4bit=True))  # its maps are 32 wide
    with monkeypatch.context() as patch:
        patch.setattr(memory, "is_quantized", lambda settings: True)
        with pytest.raises(OptionError, match="load_in_4bit: the model is quantized already; leave it out"):
            train.run(config("d", load_in_4bit=True))
    assert sorted(tmp_path.iterdir()) == before


def test_four_bits_are_for_maps_outside_the_adapted_layers(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bitsandbytes: which maps it is asked to leave unchanged, as prefixes of paths."""
    reported: list[Any] = []

    def noted(*_: Any, quantization_config: Any, **__: Any) -> nn.Module:
        reported.append(quantization_config)
        raise KeyboardInterrupt

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: name if name == "bitsandbytes" else find(name))
    monkeypatch.setattr(memory, "BitsAndBytesConfig", lambda **settings: SimpleNamespace(**settings))
    monkeypatch.setattr(memory, "load_as_stored", noted)
    pocket = {**vars(config("x", experts="L1E11,L3E54", load_in_4bit=True, max_length=2048)), "model": "pocket"}
    with pytest.raises(KeyboardInterrupt):
        train.run(TrainConfig(**pocket))
    kept = reported[0].llm_int8_skip_modules
    maps = [name for name, m in load_structure(resolve("pocket")).named_modules() if isinstance(m, nn.Linear)]
    quantized = {name for name in maps if not any(re.match(rf"{pattern}(\.|$)", name) for pattern in kept)}
    assert {name.split(".")[2] for name in quantized} == {"0", "2", "4"}  # layers 1 and 3 and the head stay
    assert "model.layers.2.self_attn.o_proj" in quantized
    assert (reported[0].load_in_4bit, reported[0].bnb_4bit_quant_type) == (True, "nf4")


def test_four_bits_train_nearly_the_same_adapter(config: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    options: dict[str, Any] = {"experts": "L3E54", "max_length": 2048, "learning_rate": 1e-3}
    full = train.run(TrainConfig(**{**vars(config("full", **options)), "model": "pocket"}))
    less = train.run(TrainConfig(**{**vars(config("less", load_in_4bit=True, **options)), "model": "pocket"}))
    assert less["loss"][0][1] == pytest.approx(full["loss"][0][1], rel=0.1)
    assert less["loss"] != full["loss"]
    assert load_file(tmp_path / "less" / WEIGHTS).keys() == load_file(tmp_path / "full" / WEIGHTS).keys()
