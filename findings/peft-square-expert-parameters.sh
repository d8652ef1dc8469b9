#!/usr/bin/env bash
# LoRA on a fused expert parameter, saved by PEFT 0.18 and loaded by PEFT 0.21.
#
# One would guess: an adapter either gives the same logits in a later version of PEFT, or does not load.
# What happens: PEFT 0.18 took a 3-D parameter [experts, out, in] for [experts, in, out], so that A has the width of the
#   outputs. Later versions exchange the two back. Where a projection is square the shapes agree: the adapter loads
#   without an error and without a warning, and changes the logits in another way than the one that was trained. Where a
#   projection is not square, loading fails with a size mismatch. A projection is square in published models: the gate and
#   up projection of OLMoE-1B-7B is [64, 2 x 1024, 2048].
# Source: peft/tuners/lora/layer.py, ParamWrapper.__init__ (0.18.1) and ParamWrapper._get_in_out_features (0.21.2).
# What superexperts does: `import` reads both layouts, and asks where the file cannot tell.
#
# Run by hand: findings/peft-square-expert-parameters.sh    (exit code 1 if the behaviour has changed)
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0
pip transformers==5.23.0 accelerate==1.15.0 psutil==7.2.2 numpy==2.4.6
pip --no-deps --target "$work/old" peft==0.18.1
pip --no-deps --target "$work/new" peft==0.21.2

cat >"$work/adapter.py" <<'PYTHON'
"""save|load FOLDER ROWSxCOLUMNS: LoRA on one bank of four experts, each a matrix [rows, columns]."""
import sys

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

action, folder, shape = sys.argv[1:]
rows, columns = map(int, shape.split("x"))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, rows, columns, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return torch.einsum("eoi,ti->teo", self.weight, x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x)


torch.manual_seed(1)
x, model = torch.randn(3, columns), Model()
base = model(x).detach()
if action == "save":
    settings = LoraConfig(r=2, target_parameters=["experts.weight"], init_lora_weights=False)
    adapted = get_peft_model(model, settings)
    adapted.save_pretrained(folder)
    save_file({"output": adapted(x).detach().contiguous()}, f"{folder}/output.safetensors")
else:
    trained = load_file(f"{folder}/output.safetensors")["output"]
    loaded = PeftModel.from_pretrained(model, folder)(x).detach()
    change, error = (trained - base).abs().max().item(), (trained - loaded).abs().max().item()
    print(f"PEFT {peft.__version__}, {shape}: trained change {change:.3f}, error after loading {error:.3f}")
    sys.exit(3 if error > 0.1 * change else 0)
PYTHON

run() { # run OLD_OR_NEW ARGUMENTS: the exit code of the script, its last line printed
  local code=0
  PYTHONPATH="$work/$1" "$work/venv/bin/python" "$work/adapter.py" "${@:2}" >"$work/log" 2>&1 || code=$?
  tail -n 1 "$work/log"
  return "$code"
}
expect() { # expect CODE OLD_OR_NEW ARGUMENTS
  local code=0
  run "${@:2}" || code=$?
  [ "$code" = "$1" ] || { echo "changed: exit code $code, expected $1"; exit 1; }
}

for shape in 8x8 8x6; do run old save "$work/$shape" "$shape" >/dev/null; done
expect 0 old load "$work/8x8" 8x8 # the version that saved it
expect 3 new load "$work/8x8" 8x8 # loads, and is wrong
grep -iq warn "$work/log" && { echo "changed: there is a warning now"; exit 1; }
expect 0 old load "$work/8x6" 8x6
expect 1 new load "$work/8x6" 8x6 # a size mismatch
grep -q "size mismatch" "$work/log" || { echo "changed: another error"; exit 1; }
echo "as described"
