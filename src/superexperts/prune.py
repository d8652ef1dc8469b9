"""Writes a standard checkpoint in which the chosen experts' down_proj is zero (arXiv 2507.23279's pruning)."""

from __future__ import annotations

import shutil
import time
from typing import Any, cast

from transformers import AutoModelForCausalLM

from . import moe
from .artifacts import key_name
from .config import PruneConfig, identity
from .console import note
from .errors import OutputError
from .model import checkpoint_folder, chosen_experts, load_as_stored, load_tokenizer
from .rundir import completed, fingerprint, new_folder, write_manifest

__all__ = ["run"]


def run(config: PruneConfig) -> dict[str, Any]:
    """The command: loads the checkpoint in its own dtype, zeroes the experts, saves model and tokenizer.

    The Python files of a checkpoint that brings its own code go along.
    """
    started = time.monotonic()
    chosen = chosen_experts(config.experts, config.model)
    folder = checkpoint_folder(config.model, config.revision)
    if config.out.resolve() == folder.resolve():
        raise OutputError(f"--out: {config.out} is MODEL itself; choose another folder")
    inputs = identity(config, model=fingerprint(folder), experts=chosen.experts)
    result = {"out": str(config.out), "pruned": [key_name(key) for key in chosen.experts]}
    if completed(config.out, "prune", inputs):
        note(f"prune: {config.out} is up to date, nothing to do")
        return result
    with new_folder(config.out, "prune") as temporary:
        model = load_as_stored(config)
        moe.zero_experts(model, chosen.experts)
        cast(AutoModelForCausalLM, model).save_pretrained(temporary)
        load_tokenizer(config).save_pretrained(temporary)
        for code in folder.glob("*.py"):
            shutil.copy2(code, temporary / code.name)
        outputs = sorted(file.name for file in temporary.iterdir())
        write_manifest(temporary, "prune", inputs, outputs, time.monotonic() - started)
    return result
