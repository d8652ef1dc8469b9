"""A model that stays in its checkpoint: only the decoder layer that is computing is in memory.

The model is built without weights; transformers' own conversion fills a layer's modules. Only the routed experts,
nearly all of a layer's bytes, are read here, each directly into place, so that one expert can be read alone.

Shape suffixes: E experts of a bank, U and D: rows and columns of an expert's matrix.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from superexperts.checkpoints.reader import SPARE, Checkpoint
from superexperts.checkpoints.shard_file import BLOCK
from superexperts.core.errors import ModelError
from superexperts.models.banks import Bank, find_banks
from superexperts.models.decoder import decoder_layers
from superexperts.models.experts import DOWN, up_name
from superexperts.models.key_mapping import KeyMapping, Parts
from superexperts.models.read_ahead import ReadAhead

__all__ = ["StreamedModel"]


class StreamedModel:
    """A model on the meta device and the checkpoint that fills its layers, one after the other.

    `model`: the family's own causal language model, without weights but with its buffers. `device`: where layers
    compute. `ModelError` for a checkpoint without all of the model's weights.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, device: torch.device) -> None:
        self.model, self.checkpoint, self.device = model, checkpoint, device
        self.banks = {bank.layer: bank for bank in find_banks(model, checkpoint.field)}
        first = next(iter(self.banks.values()))
        self._layers = decoder_layers(model, first.path)
        self._decoder = next(name for name, module in model.named_modules() if module is self._layers)
        self._key_mapping = KeyMapping(model, checkpoint)
        self._experts: dict[tuple[int, str], list[Parts]] = {}
        """Of the layers whose experts can be read one by one: all matrices of theirs, or none."""
        for layer, bank in self.banks.items():
            parts = {name: self._key_mapping.expert_parts(bank, name) for name in _matrices(bank)}
            self._experts |= {(layer, name): found for name, found in parts.items() if found and all(parts.values())}
        self._alone = {f"{self.banks[layer].path}.{name}" for layer, name in self._experts}
        """Names of the parameters that are read expert by expert."""
        self._then: dict[int, int] = {}
        """Layer -> the layer to read ahead next, once all experts of the first are read."""
        self._ahead: ReadAhead | None = None
        self._batches_left = 0
        """Batches that will still ask for experts of the layer in memory."""
        self._spare: dict[int, list[Tensor]] = collections.defaultdict(list)
        """Bytes -> unused memory of that size."""
        self._converting = threading.Lock()
        """Transformers' conversion is not safe in two threads."""
        self._dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    @contextlib.contextmanager
    def running(self, layers: Sequence[int], *, batches: int = 1, all_wanted: bool = True) -> Iterator[Iterator[int]]:
        """Within the block, iterating gives the number of each layer while its weights are in memory.

        The next layer is read meanwhile. Experts come from `experts`, which each layer asks once per batch. With
        `all_wanted`, all experts of the next layer are read ahead, since most will be needed.
        """
        alone = [layer for layer in layers if layer in self.banks and self.holds_alone(layer)]
        self._then = dict(itertools.pairwise(alone)) if all_wanted else {}
        self._ahead = ahead = ReadAhead(self._memory, self._read_alone, self._give)
        with ThreadPoolExecutor(max_workers=1) as background:

            def one_by_one(coming: Future[None]) -> Iterator[int]:
                for layer, following in zip(layers, [*layers[1:], None], strict=True):
                    coming.result()
                    if following is not None:
                        coming = background.submit(self._load, following)
                    if layer == layers[0] and all_wanted and alone:
                        ahead.start(self._all_experts(alone[0]))
                    self._batches_left = batches
                    yield layer
                    self._unload(layer)

            try:
                first = background.submit(self._load, layers[0])  # two readers, while nothing can be computed
                self._fill([name for name in self._key_mapping.sources if self._is_outside(name)])
                self._check_full(name for name, _ in self.model.named_parameters() if self._is_outside(name))
                yield one_by_one(first)
            finally:
                background.shutdown(cancel_futures=True)
                ahead.close()
                for parameter_name, _ in list(self.model.named_parameters()):
                    self._empty(parameter_name)
                self._spare.clear()

    def experts(self, layer: int, experts: Sequence[int]) -> Iterator[Mapping[str, Tensor]]:
        """The matrices of some experts, in their order, read ahead while the caller computes. A `hooks.Source`."""
        names = _matrices(self.banks[layer])
        if not self.holds_alone(layer):
            bank = cast(Any, self.banks[layer].module)
            self._check_full(f"{self.banks[layer].path}.{name}" for name in names)
            yield from ({name: getattr(bank, name)[expert] for name in names} for expert in experts)
            return
        assert self._ahead is not None
        self._batches_left -= 1
        following = self._then.get(layer) if not self._batches_left else None
        yield from self._ahead.get(
            [(layer, expert) for expert in experts],
            [] if following is None else self._all_experts(following),
            again=self._batches_left > 0,
        )

    def holds_alone(self, layer: int) -> bool:
        """Whether the checkpoint's layout lets one expert of the layer be read without the others."""
        return all((layer, name) in self._experts for name in _matrices(self.banks[layer]))

    def _all_experts(self, layer: int) -> list[tuple[int, int]]:
        return [(layer, expert) for expert in range(self.banks[layer].num_experts)]

    # ---- filling and emptying ----

    @torch.inference_mode()  # of this thread, as of the one that computes
    def _load(self, layer: int) -> None:
        """Fills a layer's modules but for its experts."""
        prefix = f"{self._decoder}.{layer}."
        self._fill([name for name in self._key_mapping.sources if name.startswith(prefix) and name not in self._alone])
        names = (prefix + name for name, _ in self._layers[layer].named_parameters())
        self._check_full(name for name in names if name not in self._alone)

    def _check_full(self, names: Iterable[str]) -> None:
        for name in names:
            if self.model.get_parameter(name).device.type == "meta":
                stored = self._key_mapping.stored_as(name)
                if stored != name:
                    raise ModelError(
                        f"the checkpoint keeps {name} as {stored}, in another part of the model, and is not streamed; "
                        "profile it in memory",
                        field="stream",
                    )
                raise ModelError(f"the checkpoint has no {name}; repair it", field=self.checkpoint.field)

    def _unload(self, layer: int) -> None:
        prefix = f"{self._decoder}.{layer}."
        for name, _ in list(self._layers[layer].named_parameters()):
            self._empty(prefix + name)

    def _fill(self, names: Collection[str]) -> None:
        """Loads parameters as transformers does, whatever they are made of."""
        entries = [self.checkpoint[key] for name in names for _, key in self._key_mapping.sources[name]]
        state = {entry.key: self.checkpoint.read(entry) for entry in entries}
        model = cast(Any, self.model)
        settings = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self._dtype,
            dtype_plan=model._get_dtype_plan(self._dtype),
            weight_mapping=self._key_mapping.conversions,
        )
        with self._converting, _silent():
            info, _ = convert_and_load_state_dict_in_model(model, state, settings, None)
        if info.mismatched_keys or info.conversion_errors:
            wrong = next(iter(info.mismatched_keys or info.conversion_errors))
            raise ModelError(
                f"{(wrong[0] if isinstance(wrong, tuple) else wrong)} does not fit; repair it",
                field=self.checkpoint.field,
            )

    def _memory(self, key: tuple[int, int]) -> dict[str, Tensor]:
        """Bytes for an expert's matrices."""
        bank = self.banks[key[0]]
        sizes = {name: cast(Tensor, getattr(bank.module, name))[0].nbytes for name in _matrices(bank)}
        return {name: self._take(size + SPARE) for name, size in sizes.items()}

    @torch.inference_mode()  # of this thread
    def _read_alone(self, key: tuple[int, int], memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An expert's matrices [U, D] within the memory."""
        layer, expert = key
        found = {}
        for name, bytes_ in memory.items():
            like_UD = cast(Tensor, getattr(self.banks[layer].module, name))[0]
            parts = self._experts[layer, name][expert]
            as_stored = bytes_.device.type == "cpu" and all(entry.dtype == like_UD.dtype for entry in parts)
            read = self.checkpoint.read_in_place(parts, bytes_) if as_stored else None
            found[name] = (bytes_[: like_UD.nbytes] if read is None else read).view(like_UD.dtype).view(like_UD.shape)
            if read is None:
                self._read_expert(layer, name, expert, found[name])
        return found

    @torch.inference_mode()  # of this thread
    def _read_expert(self, layer: int, name: str, expert: int, target_UD: Tensor) -> None:
        start = 0
        for entry in self._experts[layer, name][expert]:
            rows = target_UD[start : start + entry.shape[0]]
            start += entry.shape[0]
            if rows.device.type == "cpu" and rows.dtype == entry.dtype:
                self.checkpoint.read_into(entry, rows)
            else:
                rows.copy_(self.checkpoint.read(entry))

    def _empty(self, name: str) -> None:
        """Puts a parameter back on the meta device."""
        path, _, last = name.rpartition(".")
        module = self.model.get_submodule(path)
        parameter = cast(Tensor, getattr(module, last))
        if parameter.device.type == "meta":
            return
        setattr(module, last, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def _take(self, nbytes: int) -> Tensor:
        """Memory of `nbytes` bytes that begins at a page. It reuses that of an earlier expert, because the kernel would
        have to clear new pages first."""
        spare = self._spare[nbytes]
        if spare:
            return spare.pop()
        whole = torch.empty(nbytes + BLOCK, dtype=torch.uint8, device=self.device)
        start = -whole.data_ptr() % BLOCK
        return whole[start : start + nbytes]

    def _give(self, memory: Mapping[str, Tensor]) -> None:
        for tensor in memory.values():
            self._spare[tensor.nbytes].append(tensor)

    # ---- names ----

    def _is_outside(self, name: str) -> bool:
        """Whether a parameter is the decoder's own, in none of its layers (embeddings, a norm)."""
        return name.startswith(self._decoder.rpartition(".")[0]) and not name.startswith(self._decoder + ".")


def _matrices(bank: Bank) -> tuple[str, str]:
    """Names of the parameters that hold the experts' matrices."""
    return up_name(bank.module), DOWN


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' progress bar, which would come once for every layer."""
    shown: Callable[[], None] = logging.enable_progress_bar if logging.is_progress_bar_enabled() else lambda: None
    logging.disable_progress_bar()
    try:
        yield
    finally:
        shown()
