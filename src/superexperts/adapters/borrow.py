"""One loaded model, lent in turn to everything that differs from it only by an adapter or by silenced experts."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from superexperts.adapters.lora import detach
from superexperts.checkpoints.source import ModelSource
from superexperts.core.runs import digest
from superexperts.models.loading import load_model

__all__ = ["ModelCache", "borrowed"]


class ModelCache:
    """Keeps the model that was loaded last, so that the next stage that needs the same one does not load it again."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._model: nn.Module | None = None

    def take(self, source: ModelSource, *, device: str, dtype: str) -> nn.Module:
        """The model as `load_model` loads it. Whoever changes it must restore it, see `borrowed`."""
        how = [source.fingerprint, device, dtype, source.trust_remote_code]
        if self._model is None or self._key != digest(how):
            self.clear()
            self._key, self._model = digest(how), load_model(source, device=device, dtype=dtype)
        return self._model

    def clear(self) -> None:
        """Drops the model and frees its memory."""
        self._key = self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextlib.contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Restores the model when the block ends, also after an error: the adapter is removed, and its settings come back.

    PEFT freezes the model's parameters, and TRL writes to its configuration and replaces its forward. Weights are not
    copied, because training an adapter does not change them.
    """
    configs = {id(c): c for c in (cast(Any, model).config, cast(Any, model).config.get_text_config())}
    configs[id(cast(Any, model).generation_config)] = cast(Any, model).generation_config
    settings = [(config, dict(vars(config))) for config in configs.values()]
    modules = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = dict(vars(model))
    try:
        yield
    finally:
        detach(model)
        vars(model).clear()
        vars(model).update(attributes)
        for config, before in settings:
            vars(config).clear()
            vars(config).update(before)
        for module, training in modules:
            module.training = training
        for parameter, needed in parameters:
            parameter.requires_grad_(needed)
            parameter.grad = None
