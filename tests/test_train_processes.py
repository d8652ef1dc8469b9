"""Training in two processes against one: the same losses, weights and counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from superexperts.cli import main
from test_train import save_checkpoint
from test_train_options import EIGHT, WEIGHTS

# Two processes on a CPU: with `--cpu` accelerate starts a single one, whatever --num_processes says.
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--mixed_precision=no"]
WAYS = {
    "ddp": ["--multi_gpu"],
    "fsdp2": ["--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"],
}
# Accelerate 1.15 shards on accelerators only: told that gloo's processes are such, it shards on a CPU as well.
SCRIPT = """
import sys
from accelerate import PartialState
from accelerate.utils import DistributedType
from superexperts import cli, fit
stock = PartialState.__init__
def pretended(self, *arguments, **settings):
    stock(self, *arguments, **settings)
    if SHARDED and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU
PartialState.__init__ = pretended
def look(self, args, state, control, model=None, **more):
    kinds = {type(parameter).__name__ for parameter in self._adapted.parameters()}
    assert kinds == {"DTensor" if SHARDED else "Parameter"}, kinds
fit._Keeper.on_step_end = look
sys.exit(cli.main(sys.argv[1:]))
"""
OPTIONS = ["--experts", "L1E0,L1E2,L2E3,L2shared", "--r", "4", "--alpha", "8", "--dropout", "0"]
OPTIONS += ["--learning-rate", "0.01", "--epochs", "3", "--checkpoint-steps", "2"]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_the_adapter_of_one(way: str, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", "deepseek_v2")
    (tmp_path / "rows.json").write_text(json.dumps(EIGHT), encoding="utf-8")
    command = ["train", str(model), "--data", str(tmp_path / "rows.json"), *OPTIONS]
    assert main([*command, "--batch-size", "4", "--device", "cpu", "--out", str(tmp_path / "one")]) == 0
    script = tmp_path / "script.py"
    script.write_text(f"SHARDED = {way == 'fsdp2'}\n{SCRIPT}")
    done = subprocess.run(
        [*LAUNCH, *WAYS[way], str(script), *command, "--batch-size=2", "--json", f"--out={tmp_path / 'two'}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two"))
    assert json.loads(done.stdout)["loss"] == two["loss"]  # printed once
    assert len(two["loss"]) == 6  # half of the rows each: two processes were at work
    assert [loss for _, loss in two["loss"]] == pytest.approx([loss for _, loss in one["loss"]], rel=1e-5)
    assert two["exposure"] == one["exposure"]
    assert two["exposure"]["L2shared"] == 3 * one["tokens"]
    assert two["probe_experts"] == one["probe_experts"]
    weights = load_file(tmp_path / "one" / WEIGHTS)
    for name, tensor in load_file(tmp_path / "two" / WEIGHTS).items():
        assert (tensor - weights[name]).abs().max() <= 1e-4 * weights[name].abs().max(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "one", "rows.json", "script.py", "two"]
