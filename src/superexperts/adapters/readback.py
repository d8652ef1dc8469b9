"""Reads a merged checkpoint back as any program would, and compares its logits with the adapter's.

Shape suffixes: B sequences, L tokens per sequence, V vocabulary.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from superexperts.adapters.effect import without_adapter
from superexperts.adapters.lora import load_adapter
from superexperts.checkpoints.float8 import is_quantized
from superexperts.checkpoints.reader import Checkpoint
from superexperts.checkpoints.source import ModelSource
from superexperts.core.console import note
from superexperts.core.errors import DataError
from superexperts.models.loading import fits_in_memory, load_model, load_unquantized, settings_of

__all__ = ["compared_logits"]

SEQUENCES, LENGTH = 4, 32
SHARE = 0.25
"""Largest mean error as a share of the adapter's mean effect, if weights are rounded to half precision; in float32 a
hundredth of it."""
ROUNDING = {torch.float32: 1e-5, torch.float16: 5e-3}
"""Largest mean error as a share of the mean logit, whatever the effect, by dtype."""
BFLOAT16_ROUNDING = 2e-2


def compared_logits(adapter: Path, source: ModelSource, out: Path) -> dict[str, Any]:
    """{`logit_error`, `logit_effect`}: how far the merged checkpoint's logits are from the adapter's, and how far the
    adapter moves the base's; means over random tokens. Empty, with a note, for a model that does not fit in memory.

    `DataError` about the adapter if the error is more than rounding can be.
    """
    merged = ModelSource(str(out), out, trust_remote_code=source.trust_remote_code)
    if not fits_in_memory(merged, "auto", "auto"):
        note("export: the logits were not compared, since the model does not fit in memory; check-adapter can do it")
        return {}
    base = load_unquantized(source).float() if is_quantized(settings_of(source)) else load_model(source)
    adapted = load_adapter(base, adapter, "adapter")
    vocabulary = cast(Any, adapted).get_input_embeddings().weight.shape[0]
    ids_BL = torch.randint(vocabulary, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    with_BLV = _logits(adapted, ids_BL)
    with without_adapter(adapted):
        without_BLV = _logits(adapted, ids_BL)
    del adapted, base
    gc.collect()
    found_BLV = _logits(load_model(merged), ids_BL)
    if found_BLV.shape != with_BLV.shape or not bool(found_BLV.isfinite().all()):
        raise DataError(
            f"{adapter} cannot be merged: what was written gives other logits; use it as it is", field="adapter"
        )
    error, effect = (float((with_BLV - other).abs().mean()) for other in (found_BLV, without_BLV))
    with Checkpoint(out, "out") as written:
        dtypes = {entry.dtype for entry in written.values() if entry.dtype.is_floating_point}
    coarse = max((ROUNDING.get(dtype, BFLOAT16_ROUNDING) for dtype in dtypes), default=BFLOAT16_ROUNDING)
    share = SHARE / 100 if coarse == ROUNDING[torch.float32] else SHARE
    if not error <= share * effect + coarse * float(with_BLV.abs().mean()):
        raise DataError(
            f"{adapter} cannot be merged: the logits of what was written are {error:.3g} from the adapter's, which "
            f"moves them by {effect:.3g}; nothing was kept, use the adapter as it is",
            field="adapter",
        )
    if error > effect / 2:
        note(f"export: rounding hides the adapter: logits are {error:.3g} off, and it moves them by {effect:.3g}")
    return {"logit_error": error, "logit_effect": effect}


@torch.no_grad()
def _logits(model: nn.Module, ids_BL: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return cast(Tensor, model(input_ids=ids_BL.to(device), use_cache=False).logits.float().cpu())
