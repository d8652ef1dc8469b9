"""The registry of layouts: an entry is enough to export in a layout and to import it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from superexperts.adapters import export, files, import_, lora
from superexperts.adapters.export import ExportConfig
from superexperts.adapters.factors import Factor, Place, read_factors
from superexperts.adapters.formats import FORMATS, Format, readable, writable
from superexperts.adapters.import_ import ImportConfig
from superexperts.models.loading import load_structure
from tests.adapters.test_export import save_adapter, save_base, stock
from tests.adapters.test_lora import attach, logits, randomise

# ---- a layout as a user would add it: the product B A of each projection, in one file ----------------------------


def write(adapter: Path, source: Any, out: Path, *, copy: bool = False) -> dict[str, Any]:
    factors = read_factors(load_structure(source), adapter, "adapter")
    tensors = {}
    for place, factor in factors.items():
        key = f"products.{place.path}/{place.expert}/{place.projection}"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = factor.padded(factor.rank, 1.0)
    save_file(tensors, out / files.WEIGHTS_FILE)
    (out / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    return {"keys": len(tensors)}


def recognise(model: Any, config: Any, tensors: Any, fields: Any) -> str | None:
    return "its keys begin with products" if all(key.startswith("products.") for key in tensors) else None


def read(model: Any, config: Any, tensors: Any) -> dict[Place, Factor]:
    found = {}
    for key, a_RI in tensors.items():
        if key.endswith(".lora_A.weight"):
            path, expert, projection = key.removeprefix("products.").removesuffix(".lora_A.weight").split("/")
            place = Place(path=path, expert=int(expert), projection=projection)
            found[place] = Factor(a_RI=a_RI, b_OR=tensors[key.replace("lora_A", "lora_B")], scaling=1.0)
    return found


def test_a_new_layout_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"products": Format(title="products", writer=__name__, reader=__name__), **FORMATS}
    monkeypatch.setattr(import_, "FORMATS", entries)
    monkeypatch.setattr(import_, "readable", lambda: tuple(name for name in entries if entries[name].reader))
    monkeypatch.setattr(export, "FORMATS", entries)
    base = save_base(tmp_path / "base", "deepseek_v2")
    adapted = attach(stock(base), [(1, 3), (2, 7)])
    randomise(adapted)
    adapter = save_adapter(adapted, base, tmp_path / "adapter")
    result = export.run(ExportConfig(adapter=adapter, format="products", out=tmp_path / "products"))
    assert (result["format"], result["keys"]) == ("products", 12)
    assert result["bytes"] == sum(
        file.stat().st_size for file in (tmp_path / "products").iterdir() if file.name != "manifest.json"
    )
    assert len(load_file(tmp_path / "products" / files.WEIGHTS_FILE)) == 12
    back = import_.run(ImportConfig(adapter=tmp_path / "products", model=str(base), out=tmp_path / "back"))
    assert (back["layout"], back["why"]) == ("products", "its keys begin with products")
    loaded = lora.load_adapter(stock(base), tmp_path / "back" / "adapter")
    assert (logits(loaded) - logits(adapted)).abs().max() <= 1e-5


def test_every_entry_can_be_loaded() -> None:
    assert {"merged", "peft", "vllm"} <= set(writable())
    assert {"mlx-lm", "peft-0.18", "peft-0.19", "stacked", "per-expert", "unsloth", "unsloth-peft-0.18"} <= set(
        readable()
    )
    for entry in FORMATS.values():
        assert entry.title
        assert entry.writer is None or callable(entry.write())
        assert entry.reader is None or (callable(entry.load_reader().read) and callable(entry.load_reader().recognise))
