"""Norms of an adapter's changes against the checkpoint that it is merged into, read back tensor by tensor."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from superexperts.adapters import export, norms
from superexperts.adapters.export import ExportConfig
from superexperts.adapters.factors import Factor
from superexperts.adapters.norms import adapter_changes, change_norm
from superexperts.checkpoints.reader import Checkpoint
from superexperts.checkpoints.source import resolve
from superexperts.core.errors import ModelError
from superexperts.core.types import ExpertSet
from superexperts.surgery import compare
from superexperts.surgery.compare import CompareConfig
from tests.adapters.test_export import save_adapter, save_base, stock, train_like
from tests.support.families import FAMILIES


def test_norm_of_a_change_is_that_of_the_product() -> None:
    torch.manual_seed(0)
    factor = Factor(a_RI=torch.randn(3, 7), b_OR=torch.randn(5, 3), scaling=-2.5)
    product = factor.scaling * factor.b_OR.double() @ factor.a_RI.double()
    assert change_norm(factor) == pytest.approx(float(product.norm()), rel=1e-12)
    assert change_norm(Factor(a_RI=torch.randn(3, 7), b_OR=torch.zeros(5, 3), scaling=2.0)) == 0


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_changes_are_those_of_the_merged_checkpoint(family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family)
    adapter = save_adapter(train_like(stock(base), family), base, tmp_path / "adapter")
    found = adapter_changes(resolve(str(base)), {"one": adapter})["one"]
    export.run(ExportConfig(adapter=adapter, format="merged", out=tmp_path / "merged"))
    compared = compare.run(CompareConfig(a=str(base), b=str(tmp_path / "merged")))
    rows = {ExpertSet.parse(row["expert"]).experts[0]: row["relative_norm"] for row in compared["experts"]}
    assert found.experts == pytest.approx(rows, rel=1e-4)
    moved: dict[int, float] = defaultdict(float)
    whole: dict[int, float] = defaultdict(float)
    with Checkpoint(base) as one, Checkpoint(tmp_path / "merged") as other:
        for row in compared["differences"]:
            layer = re.search(r"layers\.(\d+)\.", row["key"])
            if row["expert"] is None and layer is not None and "[" not in row["key"]:
                before, after = one.read(one[row["key"]]).double(), other.read(other[row["key"]]).double()
                moved[int(layer[1])] += float((after - before).square().sum())
                whole[int(layer[1])] += float(before.square().sum())
    assert found.others == pytest.approx({layer: math.sqrt(moved[layer] / whole[layer]) for layer in moved}, rel=1e-4)
    assert found.others


def test_a_base_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", "deepseek_v2")
    adapter = save_adapter(train_like(stock(base), "deepseek_v2"), base, tmp_path / "adapter")
    read: list[str] = []
    monkeypatch.setattr(norms.Checkpoint, "read", lambda self, entry: read.append(entry.key) or torch.ones(entry.shape))
    both = adapter_changes(resolve(str(base)), {"one": adapter, "two": adapter})
    assert both["one"] == both["two"]
    assert len(read) == len(set(read)) > 0


def test_a_quantized_base_is_an_error_about_the_setting_that_named_it(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "deepseek_v2")
    settings = json.loads((base / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (base / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="quantized") as caught:
        adapter_changes(resolve(str(base), field="base"), {})
    assert caught.value.field == "base"
