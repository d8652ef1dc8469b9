"""No header, index or record of another's making crashes a command, makes it write, or gets past it unseen."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from superexperts.adapters.factors import Factor, Place, own_layout
from superexperts.adapters.files import write_adapter
from superexperts.checkpoints.reader import INDEX, SINGLE
from superexperts.checkpoints.source import resolve
from superexperts.checkpoints.writer import RECORD
from superexperts.cli import main
from superexperts.surgery import prune
from superexperts.surgery.prune import PruneConfig
from tests.support.families import tiny_model
from tests.surgery.test_surgery import contents


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of several shards, `base`, one pruned from it, `out`, and an adapter of it."""
    folder = tmp_path_factory.mktemp("hostile")
    model: Any = tiny_model("olmoe", num_hidden_layers=1, num_experts=3, num_experts_per_tok=2)
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    prune.run(PruneConfig(model=str(folder / "base"), experts="L0E1", out=folder / "out"))
    place = Place(path="model.layers.0.mlp.experts", expert=1, projection="down_proj")
    factor = Factor(a_RI=torch.ones(2, 24), b_OR=torch.ones(32, 2), scaling=2.0)
    (folder / "adapter").mkdir()
    write_adapter(folder / "adapter", *own_layout(model, {place: factor}), resolve(str(folder / "base")))
    return folder


@pytest.fixture
def commands(tmp_path: Path, checkpoints: Path) -> Iterator[Callable[[Path], list[list[str]]]]:
    """Every command that reads a checkpoint without a model, given one that may lie."""
    good, out = str(checkpoints / "base"), str(tmp_path / "written")

    def every(folder: Path) -> list[list[str]]:
        bad = str(folder)
        return [
            ["prune", bad, "--experts=L0E1", f"--out={out}"],
            ["prune", bad, "--experts=L0E1", "--mode=remove", f"--out={out}"],
            ["compare", bad, good, f"--out={out}"],
            ["compare", good, bad, "--expect-only=L0E1", f"--out={out}"],
            ["restore", str(checkpoints / "out"), "--base", bad, f"--out={out}"],
            ["export", str(checkpoints / "adapter"), "--format=merged", "--model", bad, f"--out={out}"],
        ]

    before = contents(checkpoints)
    yield every
    assert contents(checkpoints) == before


def copy_of(folder: Path, target: Path) -> Path:
    """A copy with writable files."""
    shutil.copytree(folder, target)
    return target


def refused(command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must end with one line, exit code 2 and nothing written; returns the line."""
    assert main(command) == 2, command
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith("superexperts: ")]
    assert len(lines) == 1, said.err
    assert not (folder / "written").exists()
    assert not list(folder.glob(".written*"))
    return lines[0]


def ended(command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a command that does its work, or ends with one line, exit code 2 and nothing written."""
    shutil.rmtree(folder / "written", ignore_errors=True)
    code = main(command)
    said = capsys.readouterr()
    assert code in (0, 1, 2)
    assert "Traceback" not in said.err
    if code == 2:
        assert len([line for line in said.err.splitlines() if line.startswith("superexperts: ")]) == 1
        assert not (folder / "written").exists()
    assert not list(folder.glob(".written*"))


def header_of(shard: Path) -> tuple[dict[str, Any], bytes]:
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], number: int = 1) -> None:
    """Changes the header of a shard and leaves its tensors."""
    shard = sorted(folder.glob("model-*.safetensors"))[number]
    header, rest = header_of(shard)
    change(header)
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(value for key, value in header.items() if key != "__metadata__")
    return entry


def reindex(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def settle(folder: Path, **fields: Any) -> None:
    """Changes settings of the model."""
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **fields}))


def a_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def twice(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {"x": "a", "x": "a",'))


def piped(folder: Path) -> None:
    """A shard that whoever opens it would wait for."""
    shard = a_shard(folder)
    shard.unlink()
    os.mkfifo(shard)


def pickled(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (lambda f: reindex(f, lambda m: m.update(dict.fromkeys(m, "../base/x.safetensors"))), "outside its folder"),
        (lambda f: reindex(f, lambda m: m.update({next(iter(m)): "/etc/x.safetensors"})), "outside its folder"),
        (lambda f: reindex(f, lambda m: m.update({"more": next(iter(m.values()))})), "where it is not"),
        (lambda f: reindex(f, lambda m: m.pop("model.norm.weight")), "does not name"),
        (twice, "given twice"),
        (lambda f: a_shard(f).write_bytes(a_shard(f).read_bytes()[:-1]), "is cut off"),
        (lambda f: a_shard(f).write_bytes(a_shard(f).read_bytes() + b"x"), "more bytes"),
        (lambda f: a_shard(f).unlink(), "cannot be read"),
        (piped, "cannot be read"),
        (lambda f: rewrite(f, lambda h: first(h).update(data_offsets=[0, 2**60])), "wrong at"),
        (lambda f: rewrite(f, lambda h: first(h).update(shape=[0, 2**62, 2**62], data_offsets=[0, 0])), "wrong at"),
        (lambda f: rewrite(f, lambda h: h.update(x={**first(h)})), "overlap|as does|does not name"),
        (lambda f: rewrite(f, lambda h: h.update(__metadata__=[1])), "wrong at '__metadata__'"),
        (lambda f: rewrite(f, lambda h: h.update(__metadata__={"a": {}})), "wrong at '__metadata__'"),
        (lambda f: a_shard(f).write_bytes(b"\x80\x04" + a_shard(f).read_bytes()), "no header|cannot be read"),
        (lambda f: rewrite(f, lambda h: h.update({"a\n\x1b[31m": {**first(h)}})), "overlap|as does|does not name"),
        (pickled, "pickles are not read"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_lies_is_one_line(
    lie: Any, said: str, commands: Any, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = copy_of(checkpoints / "base", tmp_path / "bad")
    lie(bad)
    for command in commands(bad):
        line = refused(command, tmp_path, capsys)
        assert any(part in line for part in said.split("|")), line


@pytest.mark.parametrize(
    "lie",
    [
        lambda f: settle(f, hidden_size="a"),
        lambda f: settle(f, hidden_size=-1),
        lambda f: settle(f, hidden_size=0),
        lambda f: settle(f, num_experts=None),
        lambda f: settle(f, num_hidden_layers=10**9),
        lambda f: settle(f, model_type=[1]),
        lambda f: (f / "config.json").write_text("[" * 100_000),
    ],
)
def test_settings_of_no_model_are_one_line(
    lie: Any, commands: Any, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = copy_of(checkpoints / "base", tmp_path / "bad")
    lie(bad)
    for command in commands(bad):
        if command[0] == "compare" and "--expect-only=L0E1" not in command:
            continue  # tensors are compared all the same
        said = "'config.json' of" if command[0] == "restore" else "config.json"
        assert said in refused(command, tmp_path, capsys)


@pytest.mark.parametrize("size", [0, 2**40])
def test_experts_of_another_size_crash_nothing(
    size: int, commands: Any, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = copy_of(checkpoints / "base", tmp_path / "bad")
    settle(bad, intermediate_size=size)
    for command in commands(bad):  # zeros are written where the file has the expert, whatever its size
        ended(command, tmp_path, capsys)


def test_removing_keeps_an_infinity_of_the_settings(checkpoints: Path, tmp_path: Path) -> None:
    base = copy_of(checkpoints / "base", tmp_path / "base")
    settle(base, time_step_limit=[0.0, float("inf")])
    assert main(["prune", str(base), "--experts=L0E1", "--mode=remove", f"--out={tmp_path / 'out'}"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["time_step_limit"] == [0.0, float("inf")]


STRANGE = [None, True, 0, -1, 3.5, 2**40, float("nan"), "3", "nothing", [], [1], {}, {"rope_type": "none"}]


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_config_or_adapter_crashes_a_command(
    data: st.DataObject, commands: Any, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings of another kind or size than a model can have, and adapters with bytes changed."""
    bad, adapter = tmp_path / "bad", tmp_path / "bad-adapter"
    for source, target in ((checkpoints / "base", bad), (checkpoints / "adapter", adapter)):
        shutil.rmtree(target, ignore_errors=True)
        copy_of(source, target)
    if data.draw(st.booleans()):
        said = json.loads((bad / "config.json").read_text())
        said[data.draw(st.sampled_from([*said, "quantization_config"]))] = data.draw(st.sampled_from(STRANGE))
        (bad / "config.json").write_text(json.dumps(said))
        command = data.draw(st.sampled_from(commands(bad)))
    else:
        file = data.draw(st.sampled_from(sorted(adapter.glob("adapter_*"))))
        text = bytearray(file.read_bytes())
        text[data.draw(st.integers(0, min(len(text), 300) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(text)
        out = f"--out={tmp_path / 'written'}"
        exported = ["export", str(adapter), "--format=merged", "--model", str(bad), out]
        command = data.draw(st.sampled_from([exported, ["compare", str(bad), str(adapter), out]]))
    ended(command, tmp_path, capsys)


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_header_index_or_record_crashes_a_command(
    data: st.DataObject, commands: Any, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files with a few bytes changed, cut or made up: a command does its work or refuses in one line."""
    bad = tmp_path / "bad"
    shutil.rmtree(bad, ignore_errors=True)
    copy_of(checkpoints / "out", bad)
    names = [INDEX, RECORD, *(file.name for file in bad.glob("model-*"))]
    file = bad / data.draw(st.sampled_from(names))
    text = bytearray(file.read_bytes())
    head = len(text) if file.suffix == ".json" else 8 + int.from_bytes(text[:8], "little")
    if data.draw(st.booleans()):
        for _ in range(data.draw(st.integers(1, 4))):
            text[data.draw(st.integers(0, head - 1))] = data.draw(st.integers(0, 255))
    elif data.draw(st.booleans()):
        start = data.draw(st.integers(0, head - 1))
        text[start : start + data.draw(st.integers(1, 30))] = data.draw(st.binary(max_size=30))
    else:
        text = bytearray(data.draw(st.binary(max_size=200)))
    file.write_bytes(text)
    every = [*commands(bad), ["restore", str(bad), f"--out={tmp_path / 'written'}"]]
    command = data.draw(st.sampled_from(every))
    ended(command, tmp_path, capsys)


def _both(folder: Path) -> None:
    shutil.copy(next(iter(sorted(folder.glob("model-*.safetensors")))), folder / SINGLE)


def _named_elsewhere(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"transformers_weights": "other.safetensors"}))


def _long_name(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    key = next(iter(index["weight_map"]))
    index["weight_map"][key] = "a" * 5000 + ".safetensors"
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_both, "reads the first alone"),
        (_named_elsewhere, "names another file"),
        (_long_name, "outside its folder"),
    ],
)
def test_weights_that_transformers_would_not_read_are_refused(
    change: Callable[[Path], None],
    message: str,
    checkpoints: Path,
    commands: Callable[[Path], list[list[str]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = copy_of(checkpoints / "base", tmp_path / "bad")
    change(bad)
    for command in commands(bad):
        assert message in refused(command, tmp_path, capsys)


@pytest.mark.parametrize("text", ['{"model": ' + "9" * 5000 + "}", "[1]", '{"model": NaN}'])
def test_strange_json_beside_the_weights_is_no_traceback(
    text: str, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned = copy_of(checkpoints / "out", tmp_path / "pruned")
    (pruned / RECORD).write_text(text)
    refused(["restore", str(pruned), f"--out={tmp_path / 'written'}"], tmp_path, capsys)
    adapter = copy_of(checkpoints / "adapter", tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(text)
    refused(["export", str(adapter), "--format=merged", f"--out={tmp_path / 'written'}"], tmp_path, capsys)
    own = tmp_path / "own"
    own.mkdir()
    (own / "manifest.json").write_text(text)
    assert main(["prune", str(checkpoints / "base"), "--experts=L0E1", f"--out={own}"]) == 2
    assert [file.name for file in own.iterdir()] == ["manifest.json"]


def test_an_index_whose_metadata_is_no_number_goes_along(checkpoints: Path, tmp_path: Path) -> None:
    base = copy_of(checkpoints / "base", tmp_path / "base")
    index = json.loads((base / INDEX).read_text())
    (base / INDEX).write_text(json.dumps(index | {"metadata": {"x": float("nan")}}))
    assert main(["prune", str(base), "--experts=L0E1", "--mode=remove", f"--out={tmp_path / 'written'}"]) == 0
    assert math.isnan(json.loads((tmp_path / "written" / INDEX).read_text())["metadata"]["x"])


def test_places_for_the_result_that_are_none(
    checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = copy_of(checkpoints / "base", tmp_path / "base")
    before = contents(base)
    assert "or in it" in refused(["prune", str(base), "--experts=L0E1", f"--out={base / 'sub'}"], tmp_path, capsys)
    assert "too long" in refused(["prune", str(base), "--experts=L0E1", f"--out={'a' * 300}"], tmp_path, capsys)
    assert "too long" in refused(["prune", str(base), f"--experts={'L0E1,' * 2000}", "--out=o"], tmp_path, capsys)
    assert contents(base) == before


def test_an_adapter_beside_the_weights_does_not_go_along(checkpoints: Path, tmp_path: Path) -> None:
    base = copy_of(checkpoints / "base", tmp_path / "base")
    shutil.copy(checkpoints / "adapter" / "adapter_config.json", base)
    assert main(["prune", str(base), "--experts=L0E1", f"--out={tmp_path / 'written'}"]) == 0
    assert not (tmp_path / "written" / "adapter_config.json").exists()


def test_what_both_lack_is_no_proof(checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tensor that every layer lacks is not seen by headers alone."""
    base = tmp_path / "base"
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    model.save_pretrained(base)
    tensors = {key: tensor for key, tensor in load_file(base / SINGLE).items() if "q_proj" not in key}
    save_file(tensors, base / SINGLE, {"format": "pt"})
    assert main(["prune", str(base), "--experts=L0E1", f"--out={tmp_path / 'pruned'}"]) == 0
    capsys.readouterr()
    said = refused(["compare", str(base), str(tmp_path / "pruned"), "--expect-only=L0E1"], tmp_path, capsys)
    assert "has no model.layers.0.self_attn.q_proj.weight" in said


def test_half_a_character_in_a_header_is_refused(
    checkpoints: Path, commands: Callable[[Path], list[list[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = copy_of(checkpoints / "base", tmp_path / "bad")
    shard = next(iter(sorted(bad.glob("*.safetensors"))))
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]) | {"__metadata__": {"format": "\ud800"}}
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    for command in commands(bad):
        assert "cannot be read" in refused(command, tmp_path, capsys)


def test_large_files_beside_the_weights_count(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = copy_of(checkpoints / "base", tmp_path / "base")
    size = sum(file.stat().st_size for file in base.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))
    with (base / "notes.tar").open("wb") as notes:
        notes.truncate(2 * size)
    for mode in ("zero", "remove"):
        command = ["prune", str(base), "--experts=L0E1", f"--mode={mode}", f"--out={tmp_path / 'written'}"]
        assert "are to be written" in refused(command, tmp_path, capsys)
