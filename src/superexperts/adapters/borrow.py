"""One loaded model for all that differs from it by an adapter or by silent experts only."""

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

__all__ = ["Shelf", "borrowed"]


class Shelf:
    """Holds the model that was asked for last, so that the next one to ask for the same need not load it."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._model: nn.Module | None = None

    def take(self, source: ModelSource, *, device: str, dtype: str) -> nn.Module:
        """The model as `load_model` gives it; it must come back as it was, see `borrowed`."""
        how = [source.fingerprint, device, dtype, source.trust_remote_code]
        if self._model is None or self._key != digest(how):
            self.clear()
            self._key, self._model = digest(how), load_model(source, device=device, dtype=dtype)
        return self._model

    def clear(self) -> None:
        """Lets the model go, and its memory."""
        self._key = self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextlib.contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Gives the model back as it was: PEFT freezes it, and TRL writes to its configuration and replaces its forward.

    The adapter is taken off, also when the block ends in an error. Weights are not copied: nobody changes them.
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
