"""The command `export`: writes an adapter in the layout of another program, or merged into its checkpoint."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from superexperts.adapters.formats import FORMATS, writable
from superexperts.checkpoints.source import ModelSource, adapter_folder, local_folder, resolve
from superexperts.core.console import note, stdout
from superexperts.core.errors import Field, ModelError, OptionError, OutputError
from superexperts.core.identity import identity
from superexperts.core.runs import completed, fingerprint, new_folder, read_json, write_manifest
from superexperts.core.settings import Switch, require_unused

__all__ = ["ExportConfig", "run", "show"]

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[writable()]

TITLES = "; ".join(f"`{name}`: {FORMATS[name].title}" for name in writable())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write an adapter that `train` made as other programs load it.

    Example: superexperts export runs/lora --format peft --out runs/lora-peft
    """

    adapter: Positional[Annotated[Path, tyro.conf.arg(metavar="ADAPTER")]]
    """Adapter folder, or the output folder of `train` that holds it."""
    format: Annotated[FormatName, tyro.conf.arg(help=TITLES)]
    out: Path = Path("runs/export")
    """Folder to write."""
    model: str | None = None
    """The adapter's base model; default: the one that its adapter_config.json names."""
    copy: Switch = False
    """merged: copy the unchanged shards instead of linking them (hard links; symbolic ones into the Hub's cache)."""
    revision: str | None = None
    """Branch, tag or commit of the base model on the Hub; default: the adapter's."""
    trust_remote_code: Switch = False
    """Run Python code that comes with the checkpoint. Only for checkpoints that you trust."""
    overwrite: Switch = False
    """Replace a finished result of other settings or files in --out; the old one stays until the new one is whole."""
    json: Switch = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        if not FORMATS[self.format].links:
            linking = ", ".join(name for name, entry in FORMATS.items() if entry.links)
            require_unused(self, ["copy"], "without ", Field("format"), f" {linking}")


def check(config: ExportConfig) -> None:
    """What is wrong without looking into the files, before any library is imported."""
    adapter_folder(config.adapter)
    if config.model is not None:
        local_folder(config.model)


def run(config: ExportConfig) -> dict[str, Any]:
    """Checks the adapter against its base model, writes it, and checks what was written.

    Returns `out`, `format`, `model`, `bytes` and what the layout's writer returns.
    """
    from superexperts.adapters.files import read_fields  # here, because it imports torch

    started = time.monotonic()
    folder = adapter_folder(config.adapter)
    source = _base_model(config, read_fields(folder, "adapter"))
    if config.out.resolve() in (folder.resolve(), config.adapter.resolve(), source.folder.resolve()):
        raise OutputError(f"{config.out} is to be exported itself; choose another folder", field="out")
    inputs = identity(config, model=source.fingerprint, adapter=fingerprint(folder))
    if completed(config.out, "export", inputs, overwrite=config.overwrite):
        note(f"export: {config.out} is up to date, nothing to do")
        return {"out": str(config.out), **read_json(config.out / "manifest.json", "manifest")["result"]}
    layout = FORMATS[config.format]
    with new_folder(config.out, "export", synced=layout.synced) as temporary:
        written = layout.write()(folder, source, temporary, copy=config.copy)
        files = sorted(temporary.iterdir())
        size = sum(file.stat().st_size for file in files)
        result = {"format": config.format, "model": source.name, **written, "bytes": size}
        names = [file.name for file in files]
        write_manifest(temporary, "export", inputs, names, time.monotonic() - started, result=result)
    return {"out": str(config.out), **result}


def _base_model(config: ExportConfig, fields: dict[str, Any]) -> ModelSource:
    model = config.model or fields.get("base_model_name_or_path")
    if not model:
        raise OptionError(f"{config.adapter} does not name its base model; give its checkpoint", field="model")
    revision = config.revision if config.revision or config.model else fields.get("revision")
    try:
        return resolve(model, revision, trust_remote_code=config.trust_remote_code)
    except ModelError as error:
        if config.model:
            raise
        raise ModelError(
            f"{config.adapter} names {model!r} as its base model, which is not here (perhaps a folder of another "
            "machine); give the checkpoint",
            field="model",
        ) from error


def show(result: dict[str, Any]) -> None:
    """Prints what `run` returned."""
    stdout.print(f"{result['format']}: {result['keys']:,} tensors, {result['bytes']:,} bytes", soft_wrap=True)
    if "logit_error" in result:
        error, effect = result["logit_error"], result["logit_effect"]
        stdout.print(f"logits are {error:.2g} from the adapter's, which moves them by {effect:.2g} (means)")
    if "max_lora_rank" in result:
        stdout.print(f"vLLM needs --enable-lora --max-lora-rank {result['max_lora_rank']}", soft_wrap=True)
    if result.get("mixed_layouts"):
        stdout.print("for this family it also needs --enable-mixed-moe-lora-format", soft_wrap=True)
    stdout.print(f"in {result['out']}", soft_wrap=True)
