"""The command `import`: reads LoRA on experts as other programs write it, and writes it in our own layout."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from superexperts.adapters.formats import FORMATS, readable
from superexperts.checkpoints.source import adapter_folder, local_folder, resolve
from superexperts.core.console import note, stdout
from superexperts.core.errors import DataError, OptionError
from superexperts.core.identity import identity
from superexperts.core.runs import completed, fingerprint, new_folder, read_json, write_manifest, write_text
from superexperts.core.settings import Switch

__all__ = ["ImportConfig", "detect", "run", "show"]

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor, nn

    LayoutName = str
else:
    LayoutName = Literal[("auto", *readable())]


ADAPTER = "a folder with adapter_config.json and adapter_model.safetensors"
"""What ADAPTER can be, for errors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Read LoRA on experts as other programs write it, and say which layout it was.

    Example: superexperts import runs/lora-peft pocket --out runs/imported
    """

    adapter: Positional[Annotated[Path, tyro.conf.arg(metavar="ADAPTER")]]
    """Folder with adapter_config.json and adapter_model.safetensors."""
    model: Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """The adapter's base model: checkpoint folder, Hub name, or `pocket`."""
    out: Path = Path("runs/imported")
    """Folder for adapter/."""
    layout: LayoutName = "auto"
    """How to read the file; `auto` finds out, and asks if the file does not show it."""
    revision: str | None = None
    """Branch, tag or commit of MODEL on the Hub."""
    trust_remote_code: Switch = False
    """Run Python code that comes with the checkpoint. Only for checkpoints that you trust."""
    overwrite: Switch = False
    """Replace a finished result of other settings or files in --out; the old one stays until the new one is whole."""
    json: Switch = False
    """Print the result as JSON."""


def check(config: ImportConfig) -> None:
    """What is wrong without looking into the files, before any library is imported."""
    adapter_folder(config.adapter, what=ADAPTER)
    local_folder(config.model)


def run(config: ImportConfig) -> dict[str, Any]:
    """Finds out the layout, reads the file, and writes adapter/ and the manifest.

    Returns `out`, the `layout` and `why` it is that one, the `experts`, the number of `keys`, and the rank `r`.
    """
    # Imported here, so that --help and a wrong option do not wait for torch.
    from superexperts.adapters import mlx
    from superexperts.adapters.factors import expert_names, own_layout
    from superexperts.adapters.files import MLX, read_fields, read_tensors, write_adapter
    from superexperts.adapters.fitting import beyond_factors, read_fitting, stored_in
    from superexperts.models.loading import load_structure

    started = time.monotonic()
    folder = adapter_folder(config.adapter, what=ADAPTER)
    fields = read_fields(folder, "adapter")
    source = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    inputs = identity(config, model=source.fingerprint, adapter=fingerprint(folder))
    if completed(config.out, "import", inputs, overwrite=config.overwrite):
        note(f"import: {config.out} is up to date, nothing to do")
        return {"out": str(config.out), **read_json(config.out / "manifest.json", "manifest")["result"]}
    if "experts" in fields:
        raise DataError(f"{folder} is an adapter of superexperts already; use it as it is", field="adapter")
    with new_folder(config.out, "import") as temporary:
        model = load_structure(source)
        if MLX in fields:
            saved_config, tensors = mlx.config_of(fields, folder), read_tensors(folder, "adapter")
        else:
            saved_config, tensors = read_fitting(model, folder, "adapter", stored_in(model, source))
        if beyond := beyond_factors(saved_config, tensors):
            raise DataError(f"{folder} {beyond}", field="adapter")
        layout, why = config.layout, "as given"
        if layout == "auto":
            layout, why = detect(model, saved_config, tensors, fields)
        read = FORMATS[layout].load_reader().read(model, saved_config, tensors)
        factors = {place: kept for place, factor in read.items() if (kept := factor.reduced()) is not None}
        if not factors:
            raise DataError(f"{folder} holds only zeros and changes nothing; train it first", field="adapter")
        own_config, own_tensors = own_layout(model, factors)
        adapter = temporary / "adapter"
        write_adapter(adapter, own_config, own_tensors, source)
        experts = expert_names(model, factors)
        write_text(adapter / "README.md", _card(experts, source.name, layout))
        result = {"layout": layout, "why": why, "experts": experts, "keys": len(own_tensors), "r": own_config.r}
        write_manifest(temporary, "import", inputs, ["adapter"], time.monotonic() - started, result=result)
    return {"out": str(config.out), **result}


def detect(
    model: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> tuple[str, str]:
    """The layout of a file and what shows it. `OptionError` about the layout if nothing shows it."""
    for name in readable():
        why = FORMATS[name].load_reader().recognise(model, config, tensors, fields)
        if why is not None:
            return name, why
    raise OptionError(f"'auto' does not recognise this file; give {', '.join(readable())}", field="layout")


def _card(experts: list[str], model: str, layout: str) -> str:
    return (
        "---\nlibrary_name: peft\ntags:\n- lora\n- superexperts\n---\n\n"
        f"# LoRA on {len(experts)} experts of {model}\n\n"
        f"Read from a file in the layout {layout}: {', '.join(experts)}.\n"
        "\nLoad with `superexperts.adapters.lora.load_adapter(model, folder)`.\n"
    )


def show(result: dict[str, Any]) -> None:
    """Prints what `run` returned."""
    stdout.print(f"layout {result['layout']}: {result['why']}", soft_wrap=True)
    count = len(result["experts"])
    stdout.print(f"{count} expert{'s' * (count != 1)}, rank {result['r']}", soft_wrap=True)
    stdout.print(f"in {result['out']}", soft_wrap=True)
