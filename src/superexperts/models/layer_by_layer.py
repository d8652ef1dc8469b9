"""One decoder layer of a model at a time: between two layers only what later ones need is kept.

The family's own forward calls the layers, so masks, positions and everything that its loop computes between layers are
what it makes them. A layer that has run before answers what it answered then, as long as anything later depends on it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Protocol, cast

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from superexperts.core.errors import ModelError
from superexperts.models.decoder import decoder_layers, language_model

__all__ = ["Kept", "RunLayer", "layer_by_layer"]

ANSWER, SHARED = "answer", "shared"
Place = tuple[Any, ...]
"""A layer's number; then `ANSWER` and an index in what it returned, or `SHARED` and where it wrote into a mapping that
all layers are given, such as keys and values that others use."""
Kept = Mapping[Place, Tensor]
"""What layers have answered that later layers depend on; hidden states in most families, and nothing else."""


class RunLayer(Protocol):
    """Runs one decoder layer."""

    def __call__(self, layer: int, kept: Kept, **inputs: Any) -> dict[Place, Tensor]:
        """What is to be kept after the layer, given what was kept before it (nothing for layer 0) and the model's own
        inputs, with `input_ids`. Layers run in order, from 0."""


@contextlib.contextmanager
def layer_by_layer(model: nn.Module, path: str) -> Iterator[RunLayer]:
    """Yields a function that runs one decoder layer; those before it answer what is kept of them, those after it and
    the head are not reached.

    `path` names any module inside a decoder layer. `ModelError` where a family passes on what cannot be kept.
    """
    layers = decoder_layers(model, path)
    stepper = _Stepper(model, language_model(model, path), layers)
    try:
        for number, layer in enumerate(layers):
            layer.forward = functools.partial(stepper.forward, number)
        yield stepper.run
    finally:
        for layer in layers:
            del layer.forward  # the instance's, which hides the class's


class _Stepper:
    """What stands in for every layer's forward."""

    def __init__(self, model: nn.Module, language: nn.Module, layers: nn.ModuleList) -> None:
        self.model, self.language = model, language
        self.stocks = [layer.forward for layer in layers]
        self.forms: dict[int, tuple[type, int] | None] = {}
        """Of each layer that has run what it returns: a tuple or a list, and how long; None for a tensor alone."""
        self.last_use: list[int] | None = None
        """Layer -> the last layer whose arguments depend on its answer."""
        self.running = 0
        self.kept: Kept = {}
        self.made: dict[Place, Tensor] = {}
        self.origins: _Origins | None = None
        """Set while dependencies are looked for, when no layer computes."""
        self.uses = [0] * len(layers)

    def run(self, layer: int, kept: Kept, **inputs: Any) -> dict[Place, Tensor]:
        """`RunLayer`."""
        device = inputs["input_ids"].device
        self.running, self.made = layer, {}
        self.kept = {place: tensor.to(device) for place, tensor in kept.items()}
        self._call(inputs)
        if self.last_use is None:
            self.last_use = self._find_uses(inputs)
        written = {place[2:] for place in self.made if place[1] == SHARED}
        needed = {}
        for place, tensor in kept.items():
            replaced = place[2:] in written if place[1] == SHARED else self.last_use[place[0]] <= layer
            if not replaced:
                needed[place] = tensor
        return needed | self.made

    def forward(self, number: int, *args: Any, **kwargs: Any) -> Any:
        """A layer's: its own for the layer that runs, what is kept for those before."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.origins is not None:
            return self._traced(number, hidden, (args, kwargs))
        if number < self.running:
            return self._replayed(number, hidden, (args, kwargs))
        before, loose = dict(_shared((args, kwargs))), self._loose_tensors()
        result = self.stocks[number](*args, **kwargs)
        after = self._loose_tensors()
        if any(after[name] is not loose.get(name) for name in after):
            raise self._unsupported("leaves tensors in its layers")
        parts = (result,) if isinstance(result, Tensor) else tuple(result)
        self.forms[number] = None if isinstance(result, Tensor) else (type(result), len(parts))
        for index, part in enumerate(parts):
            if isinstance(part, Tensor):
                if part.device.type == "meta":
                    raise self._unsupported("computes with weights that are not in memory")
                self.made[number, ANSWER, index] = part
            elif part is not None:
                raise self._unsupported(f"passes a {type(part).__name__} between layers")
        for keys, tensor in _shared((args, kwargs)):
            if before.get(keys) is not tensor:
                self.made[number, SHARED, *keys] = tensor
        raise _StoppedError

    def _call(self, inputs: Mapping[str, Any]) -> None:
        with contextlib.suppress(_StoppedError):
            self.language(**inputs)

    def _replayed(self, number: int, hidden: Tensor, given: Any) -> Any:
        """What is kept of a layer's answer; the hidden states as they came where nothing depends on it any more."""
        own: dict[int, Tensor] = {}
        for place, tensor in self.kept.items():
            if place[:2] == (number, SHARED):
                _put(given, place[2:], tensor)
            elif place[:2] == (number, ANSWER):
                own[place[2]] = tensor
        return self._formed(number, own or {0: hidden})

    def _formed(self, number: int, parts: Mapping[int, Tensor]) -> Any:
        form = self.forms[number]
        return parts[0] if form is None else form[0](parts.get(index) for index in range(form[1]))

    # ---- which answers are needed, and until when ----

    def _find_uses(self, inputs: Mapping[str, Any]) -> list[int]:
        """Sends two tokens through the family's loop, with layers that compute nothing, and follows their answers."""
        few = {name: value[:1, :2] if isinstance(value, Tensor) else value for name, value in inputs.items()}
        self.uses = [number + 1 for number in range(len(self.stocks))]
        try:
            with _Origins() as self.origins:
                self._call(few)
        finally:
            self.origins = None
        return self.uses

    def _traced(self, number: int, hidden: Tensor, given: Any) -> Any:
        assert self.origins is not None
        for origin in self.origins.of(given):
            self.uses[origin] = max(self.uses[origin], number)
        if number + 1 == len(self.stocks):
            raise _StoppedError
        self.forms.setdefault(number, self.forms[0])
        length = 1 if (form := self.forms[0]) is None else form[1]
        parts = {index: hidden.detach().clone() for index in range(length)}
        for part in parts.values():
            self.origins.known[part] = frozenset([number])
        return self._formed(number, parts)

    # ---- what else a layer may leave ----

    def _loose_tensors(self) -> dict[tuple[int, str], Tensor]:
        """Tensors that modules hold beside their parameters and buffers."""
        return {
            (id(module), name): value
            for module in self.model.modules()
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        }

    def _unsupported(self, what: str) -> ModelError:
        family = cast(Any, self.model).config.model_type
        return ModelError(f"{family} {what}; profile it in memory", field="stream")


class _Origins(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no type for it
    """Within the block, follows which layers' answers each tensor was computed from."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: Any = WeakIdKeyDictionary()

    def of(self, tree: Any) -> frozenset[int]:
        """The layers that the tensors of a tree depend on."""
        found = (self.known.get(leaf, frozenset()) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
        return frozenset().union(*found)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        origins = self.of((args, kwargs))
        if origins:
            for leaf in tree_leaves(made):
                if isinstance(leaf, Tensor):
                    self.known[leaf] = origins | self.known.get(leaf, frozenset())
        return made


def _shared(given: tuple[Any, Any]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """What mappings among a layer's arguments hold: (argument, key, index in a tuple) -> tensor."""
    for name, argument in _arguments(given):
        if isinstance(argument, MutableMapping):
            for key, value in argument.items():
                for index, part in enumerate(value if isinstance(value, tuple | list) else (value,)):
                    if isinstance(part, Tensor):
                        yield (name, key, index if isinstance(value, tuple | list) else None), part


def _put(given: tuple[Any, Any], place: tuple[Any, ...], value: Tensor) -> None:
    """Puts a tensor where `_shared` found it."""
    name, key, index = place
    mapping = dict(_arguments(given))[name]
    mapping[key] = value if index is None else (*mapping.get(key, ())[:index], value)


def _arguments(given: tuple[Any, Any]) -> Iterator[tuple[int | str, Any]]:
    yield from enumerate(given[0])
    yield from given[1].items()


class _StoppedError(Exception):
    """Ends a forward pass on purpose."""
