"""Training in two processes against one: the same losses, weights and counts; killed and resumed: the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from superexperts.adapters import layer
from superexperts.cli import main
from tests.training.test_train import save_checkpoint
from tests.training.test_train_options import EIGHT, WEIGHTS

# Two processes on a CPU: with `--cpu` accelerate starts a single one, whatever --num_processes says.
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--mixed_precision=no"]
ACCELERATE = Path(__file__).parents[2] / "recipes" / "accelerate"
WAYS = {
    "ddp": ["--multi_gpu"],
    "fsdp2": [f"--config_file={ACCELERATE / 'fsdp2.yaml'}"],
}
# Accelerate 1.15 shards on accelerators only. If gloo's processes claim to be accelerators, it shards on a CPU too.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from accelerate import PartialState
from accelerate.utils import DistributedType
from superexperts import cli
from superexperts.training import loop
way, commands = sys.argv[1], json.loads(sys.argv[2])
stock = PartialState.__init__
def pretended(self, *arguments, **settings):
    stock(self, *arguments, **settings)
    if way == "fsdp2" and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU
PartialState.__init__ = pretended
class Watched(loop._Keeper):
    def on_step_end(self, args, state, control, **more):
        kinds = {type(parameter).__name__ for parameter in self._adapted.parameters()}
        assert kinds == {"DTensor" if way == "fsdp2" else "Parameter"}, kinds
        if way == "ddp" and state.global_step == 5 and args.process_index == 1:
            self.kill(args)
    def on_save(self, args, state, control, **more):
        if way == "fsdp2" and state.global_step == 6 and args.process_index == 0:
            self.kill(args)
        super().on_save(args, state, control, **more)
    def kill(self, args):
        if args.run_name == "killed" and "--resume" not in commands[-1]:
            Path("killed.note").touch()
            os.kill(os.getpid(), signal.SIGKILL)
loop._Keeper = Watched
for command in commands:
    assert cli.main(command) == 0
"""
OPTIONS = ["--experts", "L1E0,L1E2,L2E3,L2shared", "--r", "4", "--alpha", "8", "--learning-rate", "0.01"]
PLAIN = [*OPTIONS, "--dropout", "0", "--epochs", "3", "--checkpoint-steps", "2"]
WET = [*OPTIONS, "--dropout", "0.2", "--epochs", "4", "--checkpoint-steps", "3", "--patience", "9"]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_the_adapter_of_one_and_go_on_after_a_kill(way: str, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", "deepseek_v2")
    (tmp_path / "rows.json").write_text(json.dumps(EIGHT), encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = ["train", str(model), "--data", str(tmp_path / "rows.json")]
    assert main([*command, *PLAIN, "--batch-size", "4", "--device", "cpu", "--out", str(tmp_path / "one")]) == 0

    def launch(*commands: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*LAUNCH, *WAYS[way], "script.py", way, json.dumps([[*own, "--batch-size=2"] for own in commands])],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        )

    wet = [*command, *WET, f"--eval-data={tmp_path / 'rows.json'}", f"--out={tmp_path / 'killed'}"]
    done = launch([*command, *PLAIN, "--json", f"--out={tmp_path / 'two'}"], [*wet, f"--out={tmp_path / 'whole'}"], wet)
    assert (tmp_path / "killed.note").is_file(), done.stderr
    assert done.returncode != 0
    assert not (tmp_path / "killed").exists()

    one, two = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two"))
    assert json.JSONDecoder().raw_decode(done.stdout)[0]["loss"] == two["loss"]  # printed once
    assert len(two["loss"]) == 6  # half of the rows each: two processes were at work
    assert [loss for _, loss in two["loss"]] == pytest.approx([loss for _, loss in one["loss"]], rel=1e-5)
    assert two["exposure"] == one["exposure"]
    assert two["exposure"]["L2shared"] == 3 * one["tokens"]
    assert two["probe_experts"] == one["probe_experts"]
    weights = load_file(tmp_path / "one" / WEIGHTS)
    for name, tensor in load_file(tmp_path / "two" / WEIGHTS).items():
        assert (tensor - weights[name]).abs().max() <= 1e-4 * weights[name].abs().max(), name

    done = launch([*wet, "--resume"])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("train: going on from step 3") == 1
    whole, killed = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "killed"))
    assert killed == whole
    assert (len(whole["loss"]), len(whole["eval_loss"])) == (8, 4)
    assert (tmp_path / "killed" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    (tmp_path / "killed.note").unlink()
    made = ["killed", "model", "one", "rows.json", "script.py", "two", "whole"]
    assert sorted(path.name for path in tmp_path.iterdir()) == made


def test_the_configuration_for_zero3_is_one() -> None:
    """Training with it needs GPUs (see docs/train.md); that Accelerate takes it, and what saving needs, do not."""
    config = load_config_from_file(str(ACCELERATE / "zero3.yaml"))
    settings = config.deepspeed_config
    assert (config.distributed_type, config.num_processes) == ("DEEPSPEED", 2)
    assert settings["deepspeed_moe_layer_cls_names"] == layer.ExpertsLora.__name__
    file = ACCELERATE.parents[1] / settings["deepspeed_config_file"]
    zero = json.loads(file.read_text())["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["stage3_gather_16bit_weights_on_model_save"]
    # A and B of rank 16 on DeepSeek-V2-Lite's widest map stay whole in every process.
    assert zero["stage3_param_persistence_threshold"] >= 16 * 10944
