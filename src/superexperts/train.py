"""Supervised fine-tuning of LoRA on chosen experts or on attention, through TRL's trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from . import lora
from .artifacts import ExpertKey, key_name
from .config import TrainConfig, identity
from .console import note, stderr
from .errors import DataError, EffectError, ExpertsError
from .exposure import counting
from .model import checkpoint_folder, chosen_experts, load_model, load_tokenizer
from .rundir import completed, fingerprint, new_folder, read_json, write_json, write_manifest, write_text
from .sft_data import Example, encode, read_rows

__all__ = ["run", "train"]

PROBE_ROWS = 32
"""Rows, evenly spread over the data, on which the adapter's effect is measured."""


def run(config: TrainConfig) -> dict[str, Any]:
    """The command."""
    return train(config)


def train(
    config: TrainConfig, *, model: nn.Module | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, Any]:
    """Trains an adapter and writes `adapter/`, `training.json` and, last, the manifest into `config.out`.

    A model that is handed in is the one that `config.model` names, and comes back as it was, adapter taken off.
    Returns training.json's content and `out`. `EffectError`, with nothing written, where the adapter changes no logit.
    """
    started = time.monotonic()
    chosen = None if config.experts is None else chosen_experts(config.experts, config.model).experts
    if not config.data.is_file():
        raise DataError(
            f"--data: {config.data} is no file; give a JSON array or JSONL of {{question, explain, answer}}"
        )
    folder = checkpoint_folder(config.model, config.revision)
    inputs = identity(config, model=fingerprint(folder), experts=chosen, data=fingerprint(config.data))
    if completed(config.out, "train", inputs):
        note(f"train: {config.out} is up to date, nothing to do")
        return {"out": str(config.out), **read_json(config.out / "training.json", "training")}
    with new_folder(config.out, "train") as temporary:
        rows = read_rows(config.data)
        tokenizer = tokenizer or load_tokenizer(config)
        examples = encode(rows, tokenizer, max_length=config.max_length, file=config.data)
        model = model or load_model(config)
        with _borrowed(model):
            adapted = _attach(model, chosen, config)
            with counting(adapted, training=True) as exposure:
                losses = _fit(adapted, tokenizer, examples, config)
            seen = exposure.by_expert()
            _require_exposure(seen, exposure.tokens, config)
            effect = lora.adapter_effect(adapted, _probe(examples))
            if effect.none:
                target = "attention" if chosen is None else ", ".join(map(key_name, chosen))
                raise EffectError(
                    f"--experts: the adapter on {target} changes no logit of {len(_probe(examples))} rows of "
                    f"{config.data}; nothing was written: choose experts that these rows reach, or train longer"
                )
            trained = lora.trainable_parameters(adapted)
            _save(adapted, temporary / "adapter", chosen, config)
        result = {
            "loss": losses,
            "trainable_parameters": trained,
            "rows": len(examples),
            "tokens": sum(len(example.input_ids) for example in examples),
            "exposure": seen,
            **dataclasses.asdict(effect),
            "experts": None if chosen is None else [key_name(key) for key in chosen],
        }
        write_json(temporary / "training.json", result)
        write_manifest(temporary, "train", inputs, ["adapter", "training.json"], time.monotonic() - started)
    return {"out": str(config.out), **result}


def _require_exposure(seen: Mapping[str, int], tokens: int, config: TrainConfig) -> None:
    """`ExpertsError` for an adapted expert that saw no training token, unless allowed: its A and B are untrained."""
    unseen = [name for name, count in seen.items() if not count]
    if unseen and not config.allow_unexposed:
        raise ExpertsError(
            f"--experts: {', '.join(unseen)} saw none of the {tokens:,} training tokens of {config.data}; nothing was "
            "written: choose experts that these rows reach, or give --allow-unexposed"
        )
    if unseen:
        note(f"train: {', '.join(unseen)} saw none of the {tokens:,} training tokens")


def _attach(model: nn.Module, chosen: Sequence[ExpertKey] | None, config: TrainConfig) -> PeftModel:
    settings: Any = {"r": config.r, "alpha": config.alpha, "dropout": config.dropout, "seed": config.seed}
    if chosen is None:
        return lora.attach_attention(model, **settings)
    return lora.attach_experts(model, chosen, **settings)


def _probe(examples: Sequence[Example]) -> list[Tensor]:
    step = max(1, len(examples) // PROBE_ROWS)
    return [torch.tensor(example.input_ids) for example in examples[::step][:PROBE_ROWS]]


def _save(adapted: PeftModel, folder: Path, chosen: Sequence[ExpertKey] | None, config: TrainConfig) -> None:
    """PEFT's files, with the base model as the user names it instead of a path of this machine."""
    settings = adapted.peft_config["default"]
    settings.base_model_name_or_path, settings.revision = config.model, config.revision
    # Left to itself PEFT asks the Hub whether the embeddings were resized.
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    what = "attention" if chosen is None else "experts " + ", ".join(map(key_name, chosen))
    # In place of PEFT's card, which is an empty form.
    write_text(
        folder / "README.md",
        f"---\nlibrary_name: peft\ntags:\n- lora\n- superexperts\n---\n\n# LoRA on {what} of {config.model}\n\n"
        f"Rank {config.r}, alpha {config.alpha:g}, dropout {config.dropout:g}; {config.epochs:g} epochs of "
        f"{config.data.name} at a learning rate of {config.learning_rate:g}, seed {config.seed}.\n"
        + ("" if chosen is None else "\nLoad with `superexperts.lora.load_adapter(model, folder)`.\n"),
    )


# ---- the loop ----------------------------------------------------------------------------------------------------


def _fit(
    adapted: PeftModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], config: TrainConfig
) -> list[tuple[int, float]]:
    """Runs TRL's trainer; returns [(step, mean loss of the step in nats per response token)]."""
    parameter = next(adapted.parameters())
    progress = _Progress()
    on_gpu = parameter.device.type == "cuda"
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=scratch,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.accumulation,
            num_train_epochs=config.epochs,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=config.warmup,  # below 1 it is a share of the steps
            seed=config.seed,
            use_cpu=not on_gpu,
            bf16=on_gpu and parameter.dtype == torch.bfloat16,
            fp16=on_gpu and parameter.dtype == torch.float16,
            # Backward stops at the lowest adapted layer; TRL's checkpointing would take it down to the embeddings.
            activation_checkpointing=False,
            # The loss is that of the response and nothing else; families ask for a router loss over all tokens.
            router_aux_loss_coef=0.0,
            # The rows are tokens with labels already, and too long ones were refused.
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=on_gpu,
        )
        _ = settings.device  # finds the GPUs, several of which TRL refuses in one process
        settings._n_gpu = min(settings._n_gpu, 1)
        trainer = SFTTrainer(
            model=adapted,
            args=settings,
            train_dataset=Dataset.from_dict(
                {
                    "input_ids": [example.input_ids for example in examples],
                    "labels": [example.labels for example in examples],
                }
            ),
            processing_class=tokenizer,
            callbacks=[progress],
        )
        trainer.remove_callback(PrinterCallback)  # it prints every step to standard output
        try:
            trainer.train()
        finally:
            progress.close()
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


class _Progress(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """A bar with the loss on standard error."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=stderr,
        )
        self._task = self._bar.add_task("training", loss="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(self._task, total=state.max_steps)
        self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self._bar.update(self._task, completed=state.global_step, loss=f"loss {logs['loss']:.3f}")

    def close(self) -> None:
        """Gives the terminal back, also after an error."""
        self._bar.stop()


@contextlib.contextmanager
def _borrowed(model: nn.Module) -> Iterator[None]:
    """Gives the model back as it was: PEFT freezes it, and TRL writes to its configuration and replaces its forward.

    The adapter is taken off, also when the block ends in an error. Weights are not copied: nothing
    but the adapter is trained.
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
        lora.detach(model)
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
