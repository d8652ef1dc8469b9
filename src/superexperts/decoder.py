"""The decoder of a transformers model: its number of layers, the one that a module is in, a pass through the first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import nn

from .errors import ModelError

__all__ = ["decoder_layers", "layer_number", "num_layers", "stopped_after", "text_config"]


def num_layers(model: nn.Module) -> int:
    """Decoder layers of the model, dense ones counted."""
    return int(text_config(model).num_hidden_layers)


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, which in a model of several parts is one of several."""
    return cast(Any, model).config.get_text_config()


def layer_number(model: nn.Module, path: str) -> int:
    """Index of the bank's decoder layer."""
    return _decoder_place(model, path)[1]


def decoder_layers(model: nn.Module, path: str) -> nn.ModuleList:
    """The decoder's list of layers; `path` names any module inside one."""
    return _decoder_place(model, path)[0]


def _decoder_place(model: nn.Module, path: str) -> tuple[nn.ModuleList, int]:
    """The innermost list of modules on the way to the bank that is as long as the decoder, and the index in it."""
    depth, parts = num_layers(model), path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if parts[end].isdigit():
            container = model.get_submodule(".".join(parts[:end]))
            if isinstance(container, nn.ModuleList) and len(container) == depth:
                return container, int(parts[end])
    raise ModelError(f"MODEL: the experts at {path!r} are in no decoder layer; this family is not supported")


@contextlib.contextmanager
def stopped_after(model: nn.Module, path: str, layer: int) -> Iterator[Callable[..., None]]:
    """Yields a call of the decoder that ends after a decoder layer: those after it, and the head, cost nothing.

    `path` names any module inside a decoder layer.
    """
    layers = decoder_layers(model, path)

    def stop(*_: Any) -> None:
        raise _StoppedError

    def forward(**inputs: Any) -> None:
        with contextlib.suppress(_StoppedError):
            cast(Any, model).base_model(**inputs)

    handle = layers[layer].register_forward_hook(stop)
    try:
        yield forward
    finally:
        handle.remove()


class _StoppedError(Exception):
    """Ends a forward pass on purpose."""
