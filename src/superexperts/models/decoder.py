"""The decoder of a transformers model: number of layers, the layer that holds a module, partial forward passes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import nn

from superexperts.core.errors import ModelError

__all__ = ["decoder_layers", "in_layer", "language_model", "layer_number", "num_layers", "stopped_after", "text_config"]


def num_layers(model: nn.Module) -> int:
    """Decoder layers of the model, dense ones counted."""
    return int(text_config(model).num_hidden_layers)


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, which in a model of several parts is one of several."""
    return cast(Any, model).config.get_text_config()


def layer_number(model: nn.Module, path: str, field: str = "model") -> int:
    """Index of the bank's decoder layer; `ModelError` about `field` if the bank is in none."""
    return _decoder_place(model, path, field)[1]


def decoder_layers(model: nn.Module, path: str, field: str = "model") -> nn.ModuleList:
    """The decoder's list of layers; `path` names any module inside one. `ModelError` about `field` if it does not."""
    return _decoder_place(model, path, field)[0]


def language_model(model: nn.Module, path: str) -> nn.Module:
    """The module that holds the decoder's layers and runs them on `input_ids`: in a model of several parts the one that
    reads text. `path` names any module inside a layer."""
    layers = decoder_layers(model, path)
    return next(module for module in model.modules() if any(child is layers for child in module.children()))


def in_layer(path: str, layer: int) -> re.Pattern[str]:
    """A pattern for the beginning of a name inside any decoder layer. Its group is the layer's number. `path` names a
    module inside layer number `layer`."""
    return re.compile(rf"{re.escape(path.split(f'.{layer}.')[0])}\.(\d+)\.")


def _decoder_place(model: nn.Module, path: str, field: str) -> tuple[nn.ModuleList, int]:
    """The innermost list of modules on the way to the bank that is as long as the decoder, and the index in it.

    The length check skips other numbered lists, such as a list of blocks inside each layer."""
    depth, parts = num_layers(model), path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if parts[end].isdigit():
            container = model.get_submodule(".".join(parts[:end]))
            if isinstance(container, nn.ModuleList) and len(container) == depth:
                return container, int(parts[end])
    raise ModelError(f"the experts at {path!r} are in no decoder layer; this family is not supported", field=field)


@contextlib.contextmanager
def stopped_after(model: nn.Module, path: str, layer: int) -> Iterator[Callable[..., None]]:
    """Yields a function that runs the model up to and including a decoder layer; later layers and the head do not run.

    `path` names any module inside a decoder layer.
    """
    layers, language = decoder_layers(model, path), language_model(model, path)

    def stop(*_: Any) -> None:
        raise _StoppedError

    def forward(**inputs: Any) -> None:
        with contextlib.suppress(_StoppedError):
            language(**inputs)

    handle = layers[layer].register_forward_hook(stop)
    try:
        yield forward
    finally:
        handle.remove()


class _StoppedError(Exception):
    """Ends a forward pass on purpose."""
