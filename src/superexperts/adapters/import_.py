"""Reads LoRA on experts in the layouts of other programs, says which one it saw, and writes an adapter of our own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from superexperts.adapters import lora
from superexperts.adapters.factors import PREFIX, Factors, expert_names, own_layout, save_layout
from superexperts.adapters.formats import Layout, read_fused, read_per_expert, shapes, targeted
from superexperts.checkpoints.source import adapter_folder, resolve
from superexperts.core.config import identity
from superexperts.core.config_adapters import ImportConfig
from superexperts.core.console import note
from superexperts.core.errors import DataError, OptionError
from superexperts.core.runs import completed, fingerprint, new_folder, read_json, write_manifest, write_text
from superexperts.models.loading import load_structure

__all__ = ["detect", "run"]

FUSED = {
    "peft-0.19": Layout(),
    "peft-0.18": Layout(swapped=True),
    "unsloth": Layout(blockwise=True),
    "unsloth-peft-0.18": Layout(swapped=True, blockwise=True),
}


def run(config: ImportConfig) -> dict[str, Any]:
    """The command: finds the layout out, reads the file by it, and writes adapter/ and the manifest."""
    started = time.monotonic()
    folder = adapter_folder(config.adapter)
    fields = lora.read_fields(folder, "adapter")
    checkpoint = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    inputs = identity(config, model=checkpoint.fingerprint, adapter=fingerprint(folder))
    if completed(config.out, "import", inputs):
        note(f"import: {config.out} is up to date, nothing to do")
        return {"out": str(config.out), **read_json(config.out / "manifest.json", "manifest")["result"]}
    if "experts" in fields:
        raise DataError(f"{folder} is an adapter of superexperts already; use it as it is", field="adapter")
    with new_folder(config.out, "import") as temporary:
        saved_config, tensors = lora.read_adapter(folder, "adapter")
        model = load_structure(checkpoint)
        name, why = (
            (config.layout, "as told") if config.layout != "auto" else detect(model, saved_config, tensors, fields)
        )
        if config.layout in FUSED:
            _contradict(config.layout, model, saved_config, tensors)
        if name == "per-expert":
            read = read_per_expert(model, saved_config, tensors)
        else:
            read = read_fused(model, saved_config, tensors, FUSED[name])
        factors: Factors = {place: kept for place, factor in read.items() if (kept := factor.reduced()) is not None}
        if not factors:
            raise DataError(f"{folder} holds zeros only, it changes nothing; train it first", field="adapter")
        own_config, own_tensors = own_layout(model, factors)
        save_layout(temporary / "adapter", own_config, own_tensors, base=checkpoint.name, revision=checkpoint.revision)
        experts = expert_names(model, factors)
        write_text(temporary / "adapter" / "README.md", _card(experts, config.model, name))
        result = {"layout": name, "why": why, "experts": experts, "keys": len(own_tensors), "r": own_config.r}
        write_manifest(temporary, "import", inputs, ["adapter"], time.monotonic() - started, result=result)
    return {"out": str(config.out), **result}


def _card(experts: list[str], model: str, layout: str) -> str:
    return (
        "---\nlibrary_name: peft\ntags:\n- lora\n- superexperts\n---\n\n"
        f"# LoRA on {len(experts)} experts of {model}\n\n"
        f"Read from a file in the layout {layout}: {', '.join(experts)}.\n"
        "\nLoad with `superexperts.adapters.lora.load_adapter(model, folder)`.\n"
    )


def detect(
    model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> tuple[str, str]:
    """The layout of a file and what tells it; `OptionError` where nothing does, since a guess would be silently wrong.

    PEFT 0.18 and 0.19 differ in the shapes, unless a projection is square: then PEFT's version decides. Block by block
    and interleaved B have one shape; they differ in where experts that were never trained leave columns of zeros.
    """
    fused = [(key, bank, name) for key, bank, name in targeted(model, config.target_parameters or ())]
    if not fused:
        return "per-expert", "no 3-D parameter is named in target_parameters"
    version, why = _version(fused, tensors, fields)
    blockwise = _blockwise(fused, tensors)
    if blockwise is None and "unsloth" in str(fields).lower():
        raise OptionError(
            (
                "'auto' cannot tell whether this adapter of Unsloth's holds B expert by expert (trained before "
                "its zoo of September 2026) or as PEFT does; give unsloth or peft-0.19"
            ),
            field="layout",
        )
    if blockwise:
        return (
            "unsloth" if version == "peft-0.19" else "unsloth-peft-0.18"
        ), f"{why}; untrained experts are blocks of B"
    return version, why


def _contradict(told: str, model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """`OptionError` where untrained experts show that B lies in the other order than one was told."""
    seen = _blockwise(list(targeted(model, config.target_parameters or ())), tensors)
    if seen is not None and seen != FUSED[told].blockwise:
        order = "expert by expert, as Unsloth's" if seen else "with the expert as the fast index, as PEFT's"
        raise OptionError(
            f"{told!r} is not this file's: its columns of zeros lie {order}; leave it out", field="layout"
        )


def _version(
    fused: list[tuple[str, Any, str]], tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> tuple[str, str]:
    square = True
    for key, bank, name in fused:
        inputs, outputs = shapes(bank, name)
        a = tensors.get(f"{key}.lora_A.weight")
        if a is None:
            raise DataError(f"{key}.lora_A.weight is missing; save the adapter again", field="adapter")
        if bank.module.is_transposed:
            return "peft-0.19", "parameters kept as [experts, in, out] are the same in both versions"
        if inputs != outputs:
            square = False
            if a.shape[1] == outputs:
                return "peft-0.18", f"A of {key.removeprefix(PREFIX)} has the width of the outputs, {outputs}"
    if not square:
        return "peft-0.19", "A has the width of the inputs"
    version = str(fields.get("peft_version") or "")
    if not version:
        raise OptionError(
            "'auto' finds only square projections and no PEFT version; give peft-0.18 or peft-0.19", field="layout"
        )
    old = tuple(int(part) for part in version.split(".")[:2]) < (0, 19)
    return ("peft-0.18" if old else "peft-0.19"), f"projections are square, and PEFT {version} wrote it"


def _blockwise(fused: list[tuple[str, Any, str]], tensors: Mapping[str, Tensor]) -> bool | None:
    """Whether columns of zeros in B lie expert by expert; None where they fit both orders or there are none."""
    for key, bank, _ in fused:
        b = tensors.get(f"{key}.lora_B.weight")
        if b is None or b.shape[1] % bank.num_experts:
            continue
        empty = ~b.any(0)
        blocks, interleaved = empty.view(bank.num_experts, -1), empty.view(-1, bank.num_experts)
        as_blocks = bool((blocks.all(1) == blocks.any(1)).all())
        as_peft = bool((interleaved.all(0) == interleaved.any(0)).all())
        if as_blocks != as_peft:
            return as_blocks
    return None
