"""Loads models and tokenizers: revision pinned, safetensors only, no remote code unless asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import Any, cast

import psutil
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    FineGrainedFP8Config,
    GenerationConfig,
    Mxfp4Config,
    PreTrainedTokenizerBase,
)
from transformers.initialization import meta_device_safe_creation_ops
from transformers.utils.logging import disable_progress_bar

from superexperts.checkpoints import float8
from superexperts.checkpoints.reader import Checkpoint
from superexperts.checkpoints.source import ModelSource
from superexperts.core.console import stderr
from superexperts.core.distributed import device_of_process, processes_on_this_machine
from superexperts.core.errors import Field, ModelError, OptionError
from superexperts.models.vocabulary import fitted

__all__ = [
    "auto_class",
    "dtype_to_run",
    "empty_model",
    "fits_in_memory",
    "load_as_stored",
    "load_model",
    "load_structure",
    "load_tokenizer",
    "load_unquantized",
    "pick_device",
    "settings_of",
    "structure_of",
]

DEQUANTIZED = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
"""Quantization -> the settings by which transformers loads it as ordinary numbers."""

MAX_LAYERS = 1000
"""More than any model has; a structure is built layer by layer, and a hostile number would take hours."""


def pick_device(device: str) -> torch.device:
    """`auto` is the first GPU where there is one."""
    if device == "auto":
        return device_of_process() or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"{device!r} is not on this machine; use cpu or auto", field="device") from error
    return picked


def load_model(source: ModelSource, *, device: str = "auto", dtype: str = "auto", spread: bool = False) -> nn.Module:
    """The causal language model in evaluation mode on its device, or `spread` over all GPUs by Accelerate.

    On a CPU, whose kernels do not compute in them, float8 and MXFP4 weights are loaded as ordinary numbers. It is an
    error if the checkpoint lacks weights of the model, or holds keys that no parameter takes.
    """
    place = pick_device(device)
    dtype = "float32" if dtype == "auto" and place.type == "cpu" else dtype
    if place.type == "cpu" and _quantization(settings_of(source)) in DEQUANTIZED:
        return load_unquantized(source, dtype)
    if spread:
        return load_as_stored(source, dtype, device_map="auto")
    return load_as_stored(source, dtype).to(place)


def dtype_to_run(source: ModelSource, device: str, dtype: str, *, streamed: bool) -> str:
    """What `auto` means: float32 in a CPU's memory; else, and if the model is streamed, the checkpoint's own."""
    if dtype != "auto":
        return dtype
    if pick_device(device).type == "cpu" and not streamed:
        return "float32"
    stored = settings_of(source).get_text_config().dtype
    if stored is None:
        with Checkpoint(source.folder, source.field) as checkpoint:
            stored = next(entry.dtype for entry in checkpoint.values() if entry.dtype.is_floating_point)
    return str(stored).removeprefix("torch.")


def fits_in_memory(source: ModelSource, device: str, dtype: str) -> bool:
    """Whether the model's weights, in the dtype to run in, fit into what is free on the device for each of this
    machine's processes, a tenth of it left for the rest."""
    place, target = pick_device(device), getattr(torch, dtype_to_run(source, device, dtype, streamed=False))
    with Checkpoint(source.folder, source.field) as checkpoint:
        size = sum(entry.nbytes / entry.dtype.itemsize * target.itemsize for entry in checkpoint.values())
    if place.type == "cuda":
        return bool(size < 0.9 * torch.cuda.mem_get_info(place)[0])
    return bool(size * processes_on_this_machine() < 0.9 * psutil.virtual_memory().available)


def load_as_stored(
    source: ModelSource, dtype: str = "auto", device_map: str | dict[str, Any] | None = None, **more: Any
) -> nn.Module:
    """The model on the CPU in the checkpoint's own dtypes unless `dtype` says otherwise, checked as by `load_model`."""
    if not stderr.is_terminal:
        disable_progress_bar()  # in a log, a bar of 65 tensors is 65 lines
    try:
        # The class itself where the tensors are given: transformers' choice among classes needs a folder.
        given = "state_dict" in more
        kind: Any = type(structure_of(more["config"], source)) if given else auto_class(settings_of(source))
        model, info = kind.from_pretrained(
            None if given else source.folder,
            dtype=dtype,
            trust_remote_code=source.trust_remote_code,
            use_safetensors=True,
            device_map=device_map,
            output_loading_info=True,
            **more,
        )
    except Exception as error:  # as in `_readable`
        raise ModelError(
            f"{source.name!r} cannot be loaded ({_first_line(error)}); ",
            *_advice(source, "check the checkpoint"),
            field=source.field,
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            some = ", ".join(map(str, sorted(info[what])[:3]))
            raise ModelError(
                f"{source.name!r} has {len(info[what])} {what} ({some}); repair the checkpoint", field=source.field
            )
    return cast(nn.Module, model.eval())


def load_unquantized(source: ModelSource, dtype: str = "auto") -> nn.Module:
    """As `load_as_stored`, with quantized weights as the bfloat16 numbers that they stand for, in `dtype`.

    `ModelError` for a quantization that cannot be undone.
    """
    settings = settings_of(source)
    method = _quantization(settings)
    if method is None:
        return load_as_stored(source, dtype)
    if method not in DEQUANTIZED:
        raise ModelError(
            f"{source.name!r} is quantized by {method}, which cannot be undone here; give its bfloat16 checkpoint",
            field=source.field,
        )
    if _in_blocks(source, settings):
        return _from_blocks(source, settings, dtype)
    model: Any = load_as_stored(source, dtype, quantization_config=DEQUANTIZED[method](dequantize=True))
    if any(parameter.dtype.itemsize == 1 for parameter in model.parameters()):
        raise ModelError(
            f"{source.name!r} is quantized by {method} and loads so; give its bfloat16 checkpoint", field=source.field
        )
    # What is saved is no longer quantized; with the old settings it would load as other numbers.
    for config in (model.config, model.config.get_text_config()):
        vars(config).pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    model._weight_conversions = None  # how the quantized form was read, which saving would undo
    return cast(nn.Module, model)


class _Unread:
    """A tensor that is read when transformers asks for `[...]`, as it does of its own slices of a file."""

    def __init__(self, checkpoint: Checkpoint, key: str) -> None:
        self._checkpoint, self._key = checkpoint, key

    def __getitem__(self, everything: EllipsisType) -> torch.Tensor:
        return self._checkpoint.read(self._checkpoint[self._key])


def _in_blocks(source: ModelSource, settings: Any) -> bool:
    """Whether the weights are float8 with scales as `checkpoints.float8` reads them."""
    if not isinstance(settings.quantization_config.get("weight_block_size"), list):
        return False
    with Checkpoint(source.folder, source.field) as checkpoint:
        return not any(key.endswith(".scale") for key in checkpoint)  # DeepSeek-V4's, some of them for 4-bit weights


def _from_blocks(source: ModelSource, settings: Any, dtype: str) -> nn.Module:
    """The model with float8 blocks read as `profile` reads them.

    Not by transformers, which takes the block's size from the number of blocks: wrong, or an error, where the last
    block of a matrix is smaller than the others (576 rows of DeepSeek-V3).
    """
    with float8.opened(source.folder, settings, source.field) as checkpoint:
        for config in (settings, settings.get_text_config()):
            vars(config).pop("quantization_config", None)
        if dtype == "auto":
            dtype = str(settings.get_text_config().dtype or torch.bfloat16).removeprefix("torch.")
        tensors = {key: _Unread(checkpoint, key) for key in checkpoint}
        model: Any = load_as_stored(source, dtype, config=settings, state_dict=tensors)
    model.config._name_or_path = model.name_or_path = str(source.folder)
    with contextlib.suppress(OSError):  # without the file, what config.json says
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return cast(nn.Module, model)


def _quantization(settings: Any) -> str | None:
    """The method by which config.json says that the weights are quantized; None where they are not."""
    if not float8.is_quantized(settings):
        return None
    said = settings.quantization_config
    method = said.get("quant_method") if isinstance(said, Mapping) else getattr(said, "quant_method", None)
    return str(getattr(method, "value", method))


def empty_model(source: ModelSource, *, device: str = "auto", dtype: str = "auto") -> nn.Module:
    """The model without weights, in the dtype to run in: the checkpoint's own unless `dtype` names another.

    Parameters are on the meta device; buffers are real and on the device to run on.
    """
    settings = settings_of(source)
    settings.quantization_config = None  # the reader turns float8 blocks into ordinary numbers
    to_run = getattr(torch, dtype_to_run(source, device, dtype, streamed=True))
    try:
        # As from_pretrained does: on a bank of 30 GB even an empty tensor of the CPU fails.
        with torch.device("meta"), meta_device_safe_creation_ops():
            model = auto_class(settings).from_config(settings, dtype=to_run, trust_remote_code=source.trust_remote_code)
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ModelError(
            (
                f"{source.name!r} cannot be streamed: {settings.model_type} does not build without its "
                f"weights ({_first_line(error)}); "
                "leave out "
            ),
            Field("stream"),
            " and ",
            Field("quick"),
            field=source.field,
        ) from error
    _fill_buffers(model, pick_device(device))
    return cast(nn.Module, model.eval())


def _fill_buffers(model: nn.Module, place: torch.device) -> None:
    """Makes buffers as the family's initialization fills them; what it leaves out becomes nan, which no command accepts
    as a result, unless the checkpoint has it."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            unset = torch.nan if buffer.is_floating_point() else 0
            setattr(module, name, torch.full_like(buffer, unset, device=place))
    cast(Any, model).initialize_weights()


def auto_class(settings: Any) -> Any:
    """The class of transformers that loads a model of these settings: that of language models, or where a language
    model is part of a bigger one, that of the whole."""
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if type(settings) in auto._model_mapping:
            return auto
    return AutoModelForCausalLM


def settings_of(source: ModelSource) -> Any:
    """What config.json says; `ModelError` if transformers cannot read it."""
    with _readable(source):
        settings = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
        layers = settings.get_text_config().to_dict().get("num_hidden_layers")
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise ModelError(f"{source.name!r} claims {layers} layers; check its config.json", field=source.field)
    return settings


@contextlib.contextmanager
def _readable(source: ModelSource) -> Iterator[None]:
    """Turns whatever transformers says of a config.json, in which anything may stand, into one line."""
    try:
        yield
    except Exception as error:  # a family's code divides by, indexes with and calls the values in config.json
        raise ModelError(
            f"{source.name!r} cannot be built ({_first_line(error)}); ",
            *_advice(source, "check its config.json"),
            field=source.field,
        ) from error


def _advice(source: ModelSource, otherwise: str) -> tuple[str | Field, ...]:
    """What to do about a model that cannot be built or loaded: its own code may be what is missing."""
    brings_code = isinstance(source.config, dict) and source.config.get("auto_map")
    if brings_code and not source.trust_remote_code:
        return ("it comes with Python code; if you trust that code, give ", Field("trust_remote_code"))
    return (otherwise,)


def load_structure(source: ModelSource) -> nn.Module:
    """The model without its weights (on the meta device): every module and shape, in no memory."""
    return structure_of(settings_of(source), source)


def structure_of(settings: Any, source: ModelSource | None = None) -> nn.Module:
    """As `load_structure`, of settings that may differ from the checkpoint's own."""
    remote_code = source is not None and source.trust_remote_code
    readable = _readable(source) if source else contextlib.nullcontext()
    with readable, torch.device("meta"):
        model = auto_class(settings).from_config(settings, trust_remote_code=remote_code)
    return cast(nn.Module, model.eval())


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with a padding token (EOS where it has none).

    `ModelError` where it does not load, and when text gives a token that the model has no row for (`vocabulary`).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{source.name!r} has no tokenizer that loads ({_first_line(error)}); add its tokenizer files",
            field=source.field,
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = settings_of(source).get_text_config().to_dict().get("vocab_size")
    return fitted(cast(Any, tokenizer), source, rows if isinstance(rows, int) else None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
