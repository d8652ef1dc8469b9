"""Supervised fine-tuning of LoRA on chosen experts, attention or any linear maps; `fit.py` has the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from superexperts.adapters import lora
from superexperts.adapters.borrow import borrowed
from superexperts.adapters.effect import adapter_effect
from superexperts.adapters.exposure import counting
from superexperts.checkpoints.source import checkpoint_folder
from superexperts.core.config import identity
from superexperts.core.config_train import TrainConfig, own_values, recipe_text
from superexperts.core.console import is_main_process, note
from superexperts.core.distributed import together
from superexperts.core.errors import DataError, EffectError, ExpertsError, Field, OptionError, SuperExpertsError
from superexperts.core.runs import (
    completed,
    fingerprint,
    input_key,
    new_folder,
    read_json,
    write_json,
    write_manifest,
    write_text,
)
from superexperts.core.types import ExpertKey, ExpertSet, chosen_experts, key_name
from superexperts.models.loading import load_tokenizer
from superexperts.training.card import model_card, target_name
from superexperts.training.loop import Fitted, fit, last_checkpoint, whole_tensors
from superexperts.training.memory import load_to_train
from superexperts.training.rows import Example, encode, read_rows

__all__ = ["checkpoints_of", "run", "train"]

PROBE_ROWS = 32
"""Rows, evenly spread over the data, on which the adapter's effect is measured."""


def checkpoints_of(out: Path) -> Path:
    """Where a training keeps what `--resume` goes on from; it is there only while it runs, or was killed."""
    return out.with_name(f".{out.name}.checkpoints")


def run(config: TrainConfig) -> dict[str, Any]:
    """The command; `OptionError` for projections where no experts are named, which a study may give to all its runs."""
    if config.experts is None and config.projections != TrainConfig.projections:
        raise OptionError(
            f"{config.projections!r} is of experts; give ", Field("experts"), ", or leave it out", field="projections"
        )
    return train(config)


def train(
    config: TrainConfig,
    *,
    load: Callable[[], nn.Module] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Any]:
    """Trains an adapter and writes `adapter/`, `recipe.yaml`, `training.json` and, last, the manifest into
    `config.out`.

    What `load` gives is the model that `config.model` names; it comes back as it was, adapter taken off.
    Returns training.json's content and `out`. `EffectError`, with nothing written, where the adapter changes no logit.
    Of several processes that a launcher started, the first one writes.
    """
    started = time.monotonic()
    chosen = None if config.experts is None else chosen_experts(config.experts, config.model).experts
    files = {"data": config.data} | ({"eval_data": config.eval_data} if config.eval_data else {})
    for field, file in files.items():
        if not file.is_file():
            raise DataError(
                f"{file} is no file; give a JSON array or JSONL of {{question, explain, answer}}", field=field
            )
    folder = checkpoint_folder(config.model, config.revision)
    contents = {field: fingerprint(file) for field, file in files.items()}
    inputs = identity(config, model=fingerprint(folder), experts=chosen, **contents)
    if completed(config.out, "train", inputs):
        note(f"train: {config.out} is up to date, nothing to do")
        return {"out": str(config.out), **read_json(config.out / "training.json", "training")}
    work = checkpoints_of(config.out)
    # Within the temporary folder, so that what a killed training left goes with it.
    with _written(config.out) as temporary, tempfile.TemporaryDirectory(prefix="weights-", dir=temporary) as weights:
        scratch = Path(weights)
        tokenizer = tokenizer or load_tokenizer(config)
        examples, held_out = _examples(config, tokenizer)
        model = load() if load else load_to_train(config, lambda empty: _attach(empty, chosen, config), scratch)
        checkpoint = _prepare(work, input_key("train", inputs), config)
        with _kept_when_killed(work), borrowed(model):
            adapted = _attach(model, chosen, config)
            # Trackers print where results belong.
            with counting(adapted, training=True) as exposure, contextlib.redirect_stdout(sys.stderr):
                if checkpoint is not None:
                    note(f"train: going on from step {checkpoint.name.partition('-')[2]}")
                fitted = fit(adapted, tokenizer, examples, held_out, config, exposure, work, checkpoint)
            seen = exposure.by_expert()
            _require_exposure(seen, exposure.tokens, config)
            dtype = _round(adapted, config)
            effect = adapter_effect(adapted, _probe(examples))
            names = None if chosen is None else [key_name(key) for key in chosen]
            if effect.none:
                field = "experts" if names is not None else "attention" if config.attention else "target"
                what = target_name(config, names).removeprefix("experts ")
                raise EffectError(
                    (
                        f"the adapter on {what} changes no logit of {len(_probe(examples))} rows of {config.data}; "
                        "nothing was written: choose experts that these rows reach, or train longer"
                    ),
                    field=field,
                )
            result = _result(fitted, adapted, examples, held_out) | {
                "exposure": seen,
                **dataclasses.asdict(effect),
                "experts": names,
            }
            tensors = whole_tensors(adapted)
            if temporary is not None:
                _save(adapted, tensors, temporary / "adapter", config, dtype)
        if temporary is not None:
            digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files.values()}
            write_text(temporary / "adapter" / "README.md", model_card(config, result, digests))
            comment = "superexperts train --recipe FILE; " + ", ".join(
                f"{name}: sha256 {digest}" for name, digest in digests.items()
            )
            named = None if names is None else ",".join(names)
            write_text(temporary / "recipe.yaml", recipe_text(config, named, comment))
            # What is published with the adapter names the data, not where they lie on this machine.
            published = dataclasses.replace(
                config,
                data=Path(config.data.name),
                eval_data=None if config.eval_data is None else Path(config.eval_data.name),
            )
            write_text(temporary / "adapter" / "recipe.yaml", recipe_text(published, named, comment))
            write_json(temporary / "training.json", result)
            outputs = ["adapter", "recipe.yaml", "training.json"]
            if (work / "logs").is_dir():
                shutil.move(work / "logs", temporary / "logs")
            write_manifest(temporary, "train", inputs, outputs, time.monotonic() - started)
    if is_main_process:
        shutil.rmtree(work, ignore_errors=True)
    return {"out": str(config.out), **result}


@contextlib.contextmanager
def _written(out: Path) -> Iterator[Path | None]:
    """The folder to write into; None in a process that does not write."""
    if not is_main_process:
        yield None
        return
    with new_folder(out, "train") as temporary:
        yield temporary


def _prepare(work: Path, key: str, config: TrainConfig) -> Path | None:
    """The folder of checkpoints and logs, and the checkpoint to go on from."""
    checkpoint = None
    if config.resume:
        there = (work / "key.json").is_file()
        if there and read_json(work / "key.json", "resume") != key:
            raise OptionError(
                (f"the checkpoints of {config.out} are of other settings, data or model; leave it out to start anew"),
                field="resume",
            )
        checkpoint = last_checkpoint(work) if there else None
        if checkpoint is None:
            note(f"train: --resume: {config.out} has no checkpoint, training starts at the first step")
    together()  # all have looked before the first one clears away
    if is_main_process and checkpoint is None:
        shutil.rmtree(work, ignore_errors=True)
        write_json(work / "key.json", key)
    together()
    return checkpoint


@contextlib.contextmanager
def _kept_when_killed(work: Path) -> Iterator[None]:
    """Checkpoints stay for --resume after an interruption, and go with an error that training again would meet too."""
    try:
        yield
    except SuperExpertsError:
        if is_main_process:
            shutil.rmtree(work, ignore_errors=True)
        raise


def _examples(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Example], list[Example]]:
    """Rows to train on, and rows set aside, in tokens."""

    def encoded(file: Path, field: str) -> list[Example]:
        return encode(
            read_rows(file, field),
            tokenizer,
            max_length=config.max_length,
            file=file,
            field=field,
            chat=config.prompt == "chat",
            truncate=config.truncate,
        )

    examples = encoded(config.data, "data")
    cut = sum(example.truncated for example in examples)
    if cut:
        note(f"train: {cut:,} of {len(examples):,} responses were cut off at {config.max_length} tokens")
    if config.eval_data is not None:
        return examples, encoded(config.eval_data, "eval_data")
    aside = max(1, round(config.eval_share * len(examples))) if config.eval_share else 0
    if aside >= len(examples):
        raise OptionError(
            f"{config.eval_share} of {len(examples)} rows leaves none to train on; give less", field="eval_share"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(config.seed)).tolist()
    held_out = set(order[:aside])
    return (
        [example for number, example in enumerate(examples) if number not in held_out],
        [example for number, example in enumerate(examples) if number in held_out],
    )


def _require_exposure(seen: Mapping[str, int], tokens: int, config: TrainConfig) -> None:
    """`ExpertsError` for an adapted expert that saw no training token, unless allowed: its A and B are untrained."""
    unseen = [name for name, count in seen.items() if not count]
    if unseen and not config.allow_unexposed:
        raise ExpertsError(
            (
                f"{', '.join(unseen)} saw none of the {tokens:,} training tokens of {config.data}; nothing was "
                "written: choose experts that these rows reach, or give "
            ),
            Field("allow_unexposed"),
            field="experts",
        )
    if unseen:
        note(f"train: {', '.join(unseen)} saw none of the {tokens:,} training tokens")


def _attach(model: nn.Module, chosen: Sequence[ExpertKey] | None, config: TrainConfig) -> PeftModel:
    def keyed(text: str, field: str) -> dict[ExpertKey, Any]:
        return {ExpertSet.parse(name).experts[0]: value for name, value in own_values(text, field).items()}

    return lora.attach(
        model,
        experts=chosen or (),
        attention=config.attention,
        target=config.target,
        projections=[f"{part}_proj" for part in config.projections.split(",")],
        r=config.r,
        alpha=config.alpha,
        dropout=config.dropout,
        seed=config.seed,
        rslora=config.rslora,
        ranks=keyed(config.ranks, "ranks"),
        alphas=keyed(config.alphas, "alphas"),
    )


def _probe(examples: Sequence[Example]) -> list[Tensor]:
    step = max(1, len(examples) // PROBE_ROWS)
    return [torch.tensor(example.input_ids) for example in examples[::step][:PROBE_ROWS]]


def _result(
    fitted: Fitted, adapted: PeftModel, examples: Sequence[Example], held_out: Sequence[Example]
) -> dict[str, Any]:
    return {
        "loss": fitted.losses,
        "eval_loss": fitted.eval_losses,
        "kept_step": fitted.kept_step,
        "trainable_parameters": lora.trainable_parameters(adapted),
        "rows": len(examples),
        "eval_rows": len(held_out),
        "truncated": sum(example.truncated for example in examples),
        "tokens": sum(len(example.input_ids) for example in examples),
    }


def _round(adapted: PeftModel, config: TrainConfig) -> torch.dtype:
    """Rounds the adapter to the values that will be saved, before anything is measured on it; returns their dtype."""
    own = next(parameter for parameter in adapted.parameters() if not parameter.requires_grad).dtype
    if config.adapter_dtype == "auto":
        dtype = own if own in (torch.float16, torch.bfloat16) else torch.float32
    else:
        dtype = getattr(torch, config.adapter_dtype)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.to(dtype))
    return dtype


def _save(
    adapted: PeftModel, tensors: dict[str, Tensor], folder: Path, config: TrainConfig, dtype: torch.dtype
) -> None:
    """PEFT's files, with the base model as the user names it instead of a path of this machine; what was written must
    be what was trained, key for key."""
    settings = adapted.peft_config["default"]
    settings.base_model_name_or_path, settings.revision = config.model, config.revision
    # Left to itself PEFT asks the Hub whether the embeddings were resized.
    values = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    adapted.save_pretrained(str(folder), state_dict=values, save_embedding_layers=False)
    _, saved = lora.read_adapter(folder, "out")
    trained = {name.replace(".default.", "."): value for name, value in values.items()}
    lora.check_keys(trained, saved, folder, "out", same=torch.equal)
