"""Profiles a layer at a time against those of the whole model in memory; the quick look; several processes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig

from superexperts.checkpoints import float8
from superexperts.checkpoints.reader import SINGLE
from superexperts.checkpoints.source import resolve
from superexperts.cli import main
from superexperts.core.errors import ModelError, OptionError, OutputError
from superexperts.core.types import CorpusProfile, ExpertStats, Profile
from superexperts.data.corpora import documents
from superexperts.models import experts, read_ahead
from superexperts.models.experts import expert_inner
from superexperts.models.loading import empty_model, load_as_stored, settings_of
from superexperts.models.streaming import StreamedModel
from superexperts.pocket import PLANTED
from superexperts.profiling import measure
from superexperts.profiling import profile as profile_command
from superexperts.profiling import streamed as profile_streamed_module
from superexperts.profiling.measure import profile_corpus
from superexperts.profiling.profile import ProfileConfig
from superexperts.profiling.streamed import profile_streamed, quick_look
from tests.support.families import FAMILIES, MORE_FAMILIES, tiny_model, tiny_tokens

IDS_SL = tiny_tokens(5, 16)


def saved(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Writes a tiny model as transformers does; returns it as transformers loads it."""
    tiny_model(family, dtype).save_pretrained(folder)
    return load_as_stored(resolve(str(folder)))


@contextmanager
def streaming(folder: Path, **settings: Any) -> Iterator[StreamedModel]:
    source = resolve(str(folder))
    with float8.opened(folder, settings_of(source)) as checkpoint:
        empty = empty_model(source, **settings)
        yield StreamedModel(empty, checkpoint, torch.device("cpu"))


def test_a_family_that_does_not_build_without_weights_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoConfig.for_model("qwen3_moe").save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})

    def needs_weights(*_: Any) -> None:
        raise AttributeError("a weight that is not there yet")

    monkeypatch.setattr("transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeModel.__init__", needs_weights)
    with (
        pytest.raises(ModelError, match="cannot be streamed: qwen3_moe does not build without") as error,
        streaming(tmp_path),
    ):
        pass
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 500


def assert_same(found: CorpusProfile, reference: CorpusProfile, tolerance: float) -> None:
    assert found.tokens == reference.tokens
    for row, expected in zip(found.experts, reference.experts, strict=True):
        assert row.key == expected.key
        assert row.tokens == expected.tokens
        for field in ("output_max", "input_max", "first_token_output_max", "reference_output_max", "gate_sum", "reap"):
            wanted_value = getattr(expected, field) or 0.0  # None for an expert without tokens
            assert (getattr(row, field) or 0.0) == pytest.approx(wanted_value, rel=tolerance), (row.key, field)


@pytest.mark.parametrize("family", FAMILIES | MORE_FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_equals_in_memory(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    reference = profile_corpus(saved(tmp_path, family, dtype), IDS_SL, batch_size=2)
    with streaming(tmp_path) as streamed:
        found = profile_streamed(streamed, IDS_SL, batch_size=2)
        assert all(parameter.device.type == "meta" for parameter in streamed.model.parameters())
    assert_same(found, reference, 1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_one_by_one_equal_the_bank(tmp_path: Path, family: str) -> None:
    """The forward pass of the quick look, which reads experts from the checkpoint one by one."""
    model = saved(tmp_path, family)
    with streaming(tmp_path) as streamed:
        found = quick_look(streamed, IDS_SL, depth=1.0, statistic="all")
    rounds = found.tokens // IDS_SL.shape[1]
    assert_same(found, profile_corpus(model, IDS_SL[:rounds], batch_size=rounds), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_computed_side_by_side_while_others_are_read(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More experts than are read ahead, so that memory is read into again; some take long."""
    monkeypatch.setattr(read_ahead, "AHEAD", 1)
    tiny_model("deepseek_v2", dtype, n_routed_experts=40).save_pretrained(tmp_path)
    reference = profile_corpus(load_as_stored(resolve(str(tmp_path))), IDS_SL, batch_size=5)
    threads, before = set(), torch.get_num_threads()

    def slow(module: nn.Module, up_NU: Tensor) -> Tensor:
        threads.add((threading.current_thread().name, torch.get_num_threads()))
        time.sleep(0.002 * (len(up_NU) % 3))
        return expert_inner(module, up_NU)

    monkeypatch.setattr(experts, "expert_inner", slow)
    torch.set_num_threads(4)
    try:
        with streaming(tmp_path) as streamed:
            found = profile_streamed(streamed, IDS_SL, batch_size=5)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert len(threads) == 2
    assert {count for _, count in threads} == {2}
    assert_same(found, reference, 1e-5 if dtype == torch.float32 else 1e-3)


def test_depth_batches_and_spilled_activations_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget is that of all batches together: each of three is spilled if four of five sequences would fit."""
    made: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda _, __, nbytes: made.append(nbytes))
    model = saved(tmp_path, "deepseek_v2")
    reference = profile_corpus(model, IDS_SL, batch_size=2, depth=0.67)
    with streaming(tmp_path) as streamed:
        sequence = 4 * IDS_SL.shape[1] * streamed.model.config.hidden_size
        more: Any = {"batch_size": 2, "depth": 0.67, "folder": tmp_path}
        kept = profile_streamed(streamed, IDS_SL, budget=5 * sequence, **more)
        read = streamed.checkpoint.bytes_read
        assert not made
        spilled = profile_streamed(streamed, IDS_SL, budget=4 * sequence, **more)
        assert made == [2 * sequence, 2 * sequence, sequence]
    assert kept == spilled
    with streaming(tmp_path) as streamed:
        threads = threading.active_count()
        assert_same(profile_streamed(streamed, IDS_SL, depth=0.67), reference, 1e-5)  # one batch: expert by expert
        assert threading.active_count() == threads
        assert not streamed._spare
        skipped = (streamed.checkpoint[key].nbytes for key in streamed.checkpoint if "layers.2." in key or "lm_" in key)
        assert streamed.checkpoint.bytes_read == sum(e.nbytes for e in streamed.checkpoint.values()) - sum(skipped)
        assert streamed.checkpoint.bytes_read == read  # of three batches, too
    assert_same(kept, reference, 1e-5)
    assert not list(tmp_path.glob(".hidden-*"))
    with streaming(tmp_path) as streamed, pytest.raises(OptionError, match="leaves no MoE layer"):
        profile_streamed(streamed, IDS_SL, depth=0.2)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v2"])
def test_fused_keys_are_read_as_well(tmp_path: Path, family: str) -> None:
    """A checkpoint with the model's own keys: one tensor for all experts of a layer."""
    model = saved(tmp_path, family)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / SINGLE)
    with streaming(tmp_path) as streamed:
        assert all(streamed.holds_alone(layer) for layer in streamed.banks)
        found = profile_streamed(streamed, IDS_SL)
    assert_same(found, profile_corpus(model, IDS_SL), 1e-5)


def test_every_dtype_that_is_asked_for(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3_moe", torch.bfloat16)
    reference = profile_corpus(load_as_stored(resolve(str(tmp_path)), "float32"), IDS_SL)
    with streaming(tmp_path, dtype="float32") as streamed:
        assert_same(profile_streamed(streamed, IDS_SL), reference, 1e-5)
        reference = profile_corpus(load_as_stored(resolve(str(tmp_path)), "float32"), IDS_SL[:4])
        assert_same(quick_look(streamed, IDS_SL[:4], depth=1.0, statistic="all"), reference, 1e-5)


def change(folder: Path, edit: Any) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda tensors: tensors.pop("model.layers.1.input_layernorm.weight"), "has no model.layers.1.input_layernorm"),
        (lambda tensors: tensors.pop("model.layers.1.mlp.gate.weight"), "has no model.layers.1.mlp.gate"),
        (lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"), "does not fit|has no"),
        (lambda tensors: tensors.pop("model.embed_tokens.weight"), "has no model.embed_tokens"),
        (lambda tensors: tensors.update({"model.layers.1.mlp.extra": torch.ones(1)}), "1 unexpected keys"),
        (lambda tensors: tensors.update({"model.layers.1.input_layernorm.weight": torch.ones(3)}), "does not fit"),
    ],
)
def test_a_key_too_few_or_too_many_is_an_error(tmp_path: Path, edit: Any, said: str) -> None:
    saved(tmp_path, "qwen3_moe")
    change(tmp_path, edit)
    with pytest.raises(ModelError, match=said), streaming(tmp_path) as streamed:
        profile_streamed(streamed, IDS_SL)


def test_what_a_layer_leaves_in_its_module_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next batch would overwrite it before the next layer reads it."""
    saved(tmp_path, "qwen3_moe")
    with streaming(tmp_path) as streamed:
        layer: Any = type(streamed.model.get_submodule("model.layers.0"))
        stock = layer.forward

        def leaving(self: Any, hidden: Tensor, **inputs: Any) -> Tensor:
            self.last = hidden
            return cast(Tensor, stock(self, hidden, **inputs))

        monkeypatch.setattr(layer, "forward", leaving)
        with pytest.raises(ModelError, match="qwen3_moe leaves tensors in its layers"):
            profile_streamed(streamed, IDS_SL)


# ---- float8 ----


def quantize(folder: Path, block: tuple[int, int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Rewrites a checkpoint's projections in float8 with scales; returns what each stands for, block by block."""
    stands_for = {}

    def edit(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("_proj.weight")]:
            weight = tensors[key].float()
            grid = [-(-size // step) for size, step in zip(weight.shape, block, strict=True)]
            scales, meant = torch.zeros(grid), torch.zeros_like(weight)
            stored = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
            for row in range(grid[0]):
                for column in range(grid[1]):
                    place = tuple(slice(i * step, (i + 1) * step) for i, step in zip((row, column), block, strict=True))
                    scales[row, column] = (weight[place].abs().max() / 448).to(dtype).float()
                    stored[place] = (weight[place] / scales[row, column]).to(torch.float8_e4m3fn)
                    meant[place] = stored[place].float() * scales[row, column]
            tensors |= {key: stored, f"{key}_scale_inv": scales.to(dtype)}
            stands_for[key] = meant.to(torch.bfloat16)

    change(folder, edit)
    settings = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "fp8", "weight_block_size": list(block), "fmt": "e4m3", "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": said}))
    return stands_for


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "qwen3_moe"])
@pytest.mark.parametrize("block", [(128, 128), (16, 12)])
def test_float8_is_profiled_as_the_bfloat16_that_it_stands_for(
    tmp_path: Path, family: str, block: tuple[int, int]
) -> None:
    """Blocks larger than the matrices, and blocks with smaller ones at the edges."""
    for name in ("plain", "float8"):
        saved(tmp_path / name, family, torch.bfloat16)
    meant = quantize(tmp_path / "float8", block)
    assert len(meant) > 20
    change(tmp_path / "plain", lambda tensors: tensors.update(meant))
    reference = profile_corpus(load_as_stored(resolve(str(tmp_path / "plain"))), IDS_SL)
    with streaming(tmp_path / "float8") as streamed:
        assert profile_streamed(streamed, IDS_SL) == reference
        found = quick_look(streamed, IDS_SL, depth=1.0, statistic="all")
    assert {row.key for row in found.experts} == {row.key for row in reference.experts}


def test_float8_scales_may_be_powers_of_two(tmp_path: Path) -> None:
    """Stored as exponents alone, as in newer checkpoints."""
    saved(tmp_path, "qwen3_moe", torch.bfloat16)
    meant = quantize(tmp_path, (16, 16), torch.float8_e8m0fnu)
    with streaming(tmp_path) as streamed:
        for key, tensor in meant.items():
            assert torch.equal(streamed.checkpoint.read(streamed.checkpoint[key]), tensor)


@pytest.mark.parametrize(
    ("said", "edit", "message"),
    [
        ({"quant_method": "gptq"}, {}, "not read here .gptq, blocks"),
        ({"quant_method": "fp8", "weight_block_size": None}, {}, "not read here .fp8, blocks None."),
        ({}, {"model.layers.1.mlp.experts.0.up_proj.weight_scale_inv": None}, "has no scales for the float8"),
        ({}, {"model.layers.1.mlp.experts.0.up_proj.weight_scale_inv": torch.ones(7, 7)}, "has scales of .7, 7., not"),
    ],
)
def test_other_quantizations_and_wrong_scales_are_refused(
    tmp_path: Path, said: dict[str, Any], edit: dict[str, Tensor | None], message: str
) -> None:
    saved(tmp_path, "qwen3_moe")
    quantize(tmp_path, (16, 16))
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] |= said
    (tmp_path / "config.json").write_text(json.dumps(settings))
    edited = {**load_file(tmp_path / SINGLE), **edit}
    save_file({key: tensor for key, tensor in edited.items() if tensor is not None}, tmp_path / SINGLE)
    with pytest.raises(ModelError, match=message), streaming(tmp_path):
        pass


# ---- the quick look ----


def test_quick_look_reads_only_the_experts_that_some_token_reached(tmp_path: Path) -> None:
    model: Any = tiny_model("qwen3_moe")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3:] = 0
            layer.mlp.gate.weight[:3] *= 100  # the others never win
    model.save_pretrained(tmp_path)
    with streaming(tmp_path) as streamed:
        found = quick_look(streamed, IDS_SL[:4], depth=1.0, statistic="all")
        reached = [row for row in found.experts if row.tokens]
        assert 0 < len(reached) < len(found.experts)
        dense = sum(
            entry.nbytes
            for key, entry in streamed.checkpoint.items()
            if ".experts." not in key and not key.startswith("lm_head")
        )
        expert = sum(entry.nbytes for key, entry in streamed.checkpoint.items() if "layers.0.mlp.experts.0." in key)
        assert streamed.checkpoint.bytes_read == dense + len(reached) * expert


def test_quick_look_goes_on_until_the_super_experts_settle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "qwen3_moe")
    asked, one = 0, (ExpertStats(layer=0, expert=1),)

    def found(*_: Any, **__: Any) -> tuple[ExpertStats, ...]:
        nonlocal asked
        asked += 1
        return () if asked < 4 else one  # changes in the fourth round, the last of the first pass

    monkeypatch.setattr("superexperts.profiling.streamed.super_experts_in", found)
    with streaming(tmp_path) as streamed:
        settled = quick_look(streamed, tiny_tokens(20, 16), depth=1.0, statistic="all")
        assert settled.stable
        assert settled.tokens == 12 * 16  # four rounds, then eight more
        asked = -100
        unsettled = quick_look(streamed, IDS_SL[:2], depth=1.0, statistic="all")
        assert not unsettled.stable
        assert unsettled.tokens == 2 * 16


# ---- the command ----


def test_command_streams_and_finds_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"tokens": 1024, "seq_len": 128, "dtype": "float32"}
    for name, more in {"memory": {}, "stream": {"stream": True}}.items():
        profile_command.run(ProfileConfig(out=tmp_path / name, **settings, **more))
    assert Profile.load(tmp_path / "stream") == Profile.load(tmp_path / "memory")
    # Of a sequence longer than the model's context, a quick look takes the 64 tokens that it needs.
    longer = ProfileConfig(out=tmp_path / "quick", quick=True, dtype="float32", tokens=8192, seq_len=4096)
    quick = profile_command.run(longer)["corpora"]["pocket"]
    assert (set(map(tuple, quick["super"])), quick["stable"]) == (set(PLANTED), True)
    assert "weights were read" in capsys.readouterr().err


def test_a_disk_too_full_for_the_hidden_states_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    saved(tmp_path, "qwen3_moe")
    with streaming(tmp_path) as streamed, pytest.raises(OutputError, match="activation_budget: .*No space left"):
        profile_streamed(streamed, IDS_SL, budget=0, folder=tmp_path)


def test_a_quick_look_needs_no_more_tokens_than_one_of_its_own_sequences() -> None:
    ProfileConfig(quick=True, tokens=64)
    with pytest.raises(OptionError, match="tokens: 63 is less than one sequence .seq_len 64.; give at least 64"):
        ProfileConfig(quick=True, tokens=63)


def test_no_process_of_several_takes_a_quick_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="quick: runs in one process only"):
        profile_command.run(ProfileConfig(quick=True))


def test_no_weight_is_made_on_the_way_to_a_model_without_weights(tmp_path: Path) -> None:
    """Not even an empty one: those of a large model have more bytes than a machine will promise."""
    saved(tmp_path, "deepseek_v2")
    made: list[torch.Size] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.device.type == "cpu" and result.ndim == 3 and len(result) == 8:
                made.append(result.shape)
            return result

    with Watch():
        assert next(empty_model(resolve(str(tmp_path))).parameters()).is_meta
    assert not made


def test_a_model_too_large_for_memory_is_streamed_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    settings: dict[str, Any] = {"tokens": 256, "seq_len": 128, "dtype": "float32"}
    profile_command.run(ProfileConfig(out=tmp_path / "a", **settings))
    assert "does not fit in memory, so it is streamed" in capsys.readouterr().err
    said = json.loads((tmp_path / "a" / "manifest.json").read_text())["inputs"]["options"]
    assert (said["stream"], said["dtype"]) == ("True", "float32")
    with pytest.raises(OptionError, match="sinks: needs the model in memory, and it does not fit"):
        profile_command.run(ProfileConfig(out=tmp_path / "b", sinks=True, **settings))


@pytest.mark.parametrize("more", [{"sinks": True}, {"device_map": "auto"}])
def test_options_that_need_the_model_in_memory_do_not_go_with_stream(more: Any) -> None:
    for streamed in ({"stream": True}, {"quick": True}):
        with pytest.raises(OptionError, match="memory; leave out (stream|quick)"):
            ProfileConfig(**streamed, **more)


def test_a_device_map_changes_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tokens": 256, "seq_len": 128}
    profile_command.run(ProfileConfig(out=tmp_path / "a", **settings))
    profile_command.run(ProfileConfig(out=tmp_path / "b", device_map="auto", **settings))
    assert Profile.load(tmp_path / "a") == Profile.load(tmp_path / "b")


SCRIPT = """
import os, sys
from accelerate import PartialState
from superexperts import cli
code = cli.main([*sys.argv[1:], "--out=" + os.environ["OUT"] + os.environ["RANK"]])
assert PartialState().num_processes == 2  # else each would have done everything
sys.exit(code)
"""
# Two processes on a CPU: with `--cpu` accelerate starts a single one, whatever --num_processes says.
LAUNCH = ["-m", "accelerate.commands.launch", "--num_processes=2", "--multi_gpu", "--mixed_precision=no"]


@pytest.mark.parametrize("option", ["--batch-size=2", "--stream"])
def test_two_processes_write_the_profile_of_one(
    tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where the first one goes on with a corpus that the second one's disk knows nothing of."""
    texts = list(documents("pocket"))
    for name, part in (("a", texts[:40]), ("b", texts[40:80])):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(part), encoding="utf-8")
    command = ["profile", "pocket", *(f"--corpus={tmp_path / name}.txt" for name in "ab")]
    command += ["--tokens=640", "--seq-len=64", "--dtype=float32", option]
    asked = 0

    def interrupted(recorder: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise KeyboardInterrupt
        return recorder

    with monkeypatch.context() as patch:
        for module in (measure, profile_streamed_module):
            patch.setattr(module, "merged", interrupted)
        assert main([*command, f"--out={tmp_path / 'two0'}"]) == 130
    assert main([*command, f"--out={tmp_path / 'one'}"]) == 0
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, *LAUNCH, str(tmp_path / "script.py"), *command, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "OUT": str(tmp_path / "two")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("a.txt was finished before, kept") == 1
    assert (tmp_path / "one" / "profile.json").read_bytes() == (tmp_path / "two0" / "profile.json").read_bytes()
    assert len(json.loads(done.stdout)["corpora"]) == 2  # printed once
