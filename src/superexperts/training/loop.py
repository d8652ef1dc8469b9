"""The training loop: TRL's trainer, with checkpoints to resume from and the adapter of the lowest loss kept."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer, pack_dataset

from superexperts.adapters.exposure import Exposure
from superexperts.core.console import is_main_process, note, stderr
from superexperts.core.distributed import process_number, wait_for_all
from superexperts.core.errors import OptionError
from superexperts.core.runs import read_json, write_json
from superexperts.training.resume import COMPLETE
from superexperts.training.rows import IGNORED, Example

__all__ = ["LoopResult", "LoopSettings", "train_loop", "whole_tensors"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How the loop runs. The fields mean what the settings of `train` with the same names mean."""

    learning_rate: float
    warmup: float
    epochs: float
    batch_size: int
    accumulation: int
    max_length: int
    packing: bool
    gradient_checkpointing: bool
    eval_steps: int
    patience: int
    checkpoint_steps: int
    seed: int
    report_to: str
    run_name: str
    """Name of the run for a tracker."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopResult:
    """What the loop did."""

    losses: list[tuple[int, float]]
    """(step, mean loss of the step in nats per response token)."""
    eval_losses: list[tuple[int, float]]
    """The same for the rows set aside."""
    kept_step: int
    """The step that the adapter on the model comes from."""


def train_loop(
    adapted: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    settings: LoopSettings,
    exposure: Exposure,
    work: Path,
    checkpoint: Path | None = None,
) -> LoopResult:
    """Trains the adapter in place. Checkpoints and logs go to `work`; `checkpoint` is one of them to go on from.

    `exposure` counts the tokens of this training; its counts are kept in the checkpoints. `OptionError` for packing or
    gradient checkpointing that the model's family does not support.
    """
    progress, keeper = _Progress(), _Keeper(adapted, exposure, settings.patience)
    if checkpoint is not None:
        keeper.restore(checkpoint)
    trainer = _Trainer(
        model=adapted,
        args=_trainer_settings(adapted, settings, work, evaluate=bool(held_out)),
        train_dataset=_dataset(examples, settings),
        eval_dataset=_dataset(held_out, settings) if held_out else None,
        processing_class=tokenizer,
        callbacks=[progress, keeper, *([_EveryEpoch()] if held_out and not settings.eval_steps else [])],
    )
    if settings.report_to == "tensorboard" and is_main_process:
        from torch.utils.tensorboard import SummaryWriter  # an optional package

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(work / "logs"))))
    trainer.remove_callback(PrinterCallback)  # it prints every step to standard output
    if settings.packing:
        _require_rows_apart(adapted, examples)
    base = cast(nn.Module, adapted.get_base_model())
    if settings.gradient_checkpointing:
        _checkpoint_activations(base)
    try:
        if checkpoint is not None and keeper.exhausted:
            # It was killed after early stopping had ended the training: there is no step left to run.
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        progress.close()
        if settings.gradient_checkpointing:
            cast(Any, base).activation_checkpointing_disable()
    history = trainer.state.log_history
    return LoopResult(
        losses=[(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        eval_losses=[(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry],
        kept_step=keeper.finish(trainer.state.global_step),
    )


def _trainer_settings(adapted: PeftModel, settings: LoopSettings, work: Path, *, evaluate: bool) -> SFTConfig:
    parameter = next(adapted.parameters())
    on_gpu = parameter.device.type == "cuda"
    trainer_settings = SFTConfig(
        output_dir=str(work),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,  # below 1 it is a share of the steps
        seed=settings.seed,
        use_cpu=not on_gpu,
        bf16=on_gpu and parameter.dtype == torch.bfloat16,
        fp16=on_gpu and parameter.dtype == torch.float16,
        # TRL's own way would compute gradients down to the embeddings; see `_checkpoint_activations`.
        activation_checkpointing=False,
        # The loss covers the response only; some families ask for a router loss over all tokens.
        router_aux_loss_coef=0.0,
        # The rows are tokens with labels already, and rows that are too long were refused or cut off.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=settings.packing,
        eval_packing=False,
        eval_strategy="steps" if evaluate and settings.eval_steps else "no",  # once an epoch: see `_EveryEpoch`
        eval_steps=settings.eval_steps or None,
        save_strategy="steps" if settings.checkpoint_steps else "no",
        save_steps=settings.checkpoint_steps or 500,
        # Two, because a kill can cut off the newest while it is written; a resume then takes the one before.
        save_total_limit=2,
        logging_steps=1,
        report_to=[settings.report_to] if settings.report_to in ("trackio", "wandb") else [],
        run_name=settings.run_name,
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
        # An expert that a batch does not reach has a gradient of 0, so every process has every gradient.
        ddp_find_unused_parameters=False,
    )
    # TRL refuses several GPUs in one process. Reading `device` counts them; after that the count can be lowered.
    _ = trainer_settings.device
    trainer_settings._n_gpu = min(trainer_settings._n_gpu, 1)
    return trainer_settings


def _dataset(examples: Sequence[Example], settings: LoopSettings) -> Dataset:
    rows = Dataset.from_dict(
        {
            "input_ids": [example.input_ids for example in examples],
            "labels": [example.labels for example in examples],
        }
    )
    return pack_dataset(rows, settings.max_length, "bfd") if settings.packing else rows


@torch.no_grad()
def _require_rows_apart(adapted: PeftModel, examples: Sequence[Example]) -> None:
    """`OptionError` if rows in one sequence see each other, as in families that mix tokens by more than attention.

    This is measured, because a list of families would become outdated: a row's logits behind another row are compared
    with its logits alone.
    """
    first, second, *_ = [*examples, *examples]
    training = adapted.training
    adapted.eval()
    ids_L = torch.tensor([*first.input_ids, *second.input_ids], device=next(adapted.parameters()).device)
    positions_L = torch.cat([torch.arange(len(row.input_ids), device=ids_L.device) for row in (first, second)])
    start = len(first.input_ids)
    behind = adapted(input_ids=ids_L[None], position_ids=positions_L[None], use_cache=False).logits[0, start:].float()
    alone = adapted(input_ids=ids_L[None, start:], use_cache=False).logits[0].float()
    adapted.train(training)
    # The limits leave room for rounding: padding-free attention sums in another order.
    error = float((behind - alone).norm() / alone.norm())
    limit = 1e-3 if next(adapted.parameters()).dtype == torch.float32 else 0.1
    if not error <= limit:
        family = cast(Any, adapted).config.model_type
        raise OptionError(
            f"rows in one sequence would see each other in {family} (logits differ by {error:.1%}); leave it out",
            field="packing",
        )


def _checkpoint_activations(model: nn.Module) -> None:
    """Lets the model compute activations again in the backward pass, from the lowest adapted layer on.

    The variant without reentry needs no gradient at the embeddings, so layers below the lowest adapter have no backward
    pass. transformers switches gradients at the embeddings on all the same; this switches them off again.
    """
    try:
        cast(Any, model).activation_checkpointing_enable({"use_reentrant": False})
        cast(Any, model).disable_input_require_grads()
    except ValueError as error:
        family = cast(Any, model).config.model_type
        raise OptionError(
            f"{family} does not support it ({error}); leave it out", field="gradient_checkpointing"
        ) from error


class _Trainer(SFTTrainer):  # type: ignore[misc]  # TRL is not typed
    """TRL's trainer, but a loss on rows set aside that is the mean over their response tokens.

    TRL's is the mean of the means of batches, so that it, early stopping and the adapter that is kept would depend on
    the batch size.
    """

    _sums_2: Tensor
    """Summed loss, and number of tokens, of the batches so far."""

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        labels_BL = inputs.pop("labels")[:, 1:]
        with torch.no_grad(), self.compute_loss_context_manager():
            logits_BLV = model(**inputs, use_cache=False).logits[:, :-1]
        rows = [
            # Only one row's logits at a time are taken in float32.
            F.cross_entropy(logits_LV.float(), labels_L, ignore_index=IGNORED, reduction="sum").double()
            for logits_LV, labels_L in zip(logits_BLV, labels_BL, strict=True)
        ]
        sums_B2 = torch.stack([torch.stack(rows), (labels_BL != IGNORED).sum(1).double()], 1)
        # Of all processes, without the rows that only fill the last batch.
        self._sums_2 = self._sums_2 + self.gather_function(sums_B2).sum(0).cpu()
        return (sums_B2[:, 0].sum() / sums_B2[:, 1].sum().clamp(min=1)).float(), None, None

    def evaluation_loop(self, *arguments: Any, **named: Any) -> Any:
        self._sums_2 = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*arguments, **named)
        loss, tokens = self._sums_2.tolist()
        return output._replace(metrics=output.metrics | {"eval_loss": loss / max(tokens, 1)})


# ---- checkpoints --------------------------------------------------------------------------------------------------


class _Keeper(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Keeps the adapter of the lowest loss, stops early, and adds both and the token counts to the checkpoints."""

    def __init__(self, adapted: PeftModel, exposure: Exposure, patience: int) -> None:
        self._adapted = adapted
        self._exposure = exposure
        self._patience = patience
        self._worse = 0
        self._best: tuple[float, int] | None = None
        self._tensors: Mapping[str, Tensor] = {}

    @property
    def exhausted(self) -> bool:
        """Whether early stopping has ended the training."""
        return 0 < self._patience <= self._worse

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if not self._patience:
            return
        if self._best is None or metrics["eval_loss"] < self._best[0]:
            self._best, self._worse = (metrics["eval_loss"], state.global_step), 0
            self._tensors = whole_tensors(self._adapted)
        else:
            self._worse += 1
        # |=: another callback may have asked to stop; this must not take it back.
        control.should_training_stop |= self.exhausted

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / f"exposure_{args.process_index}.json", self._exposure.state())
        wait_for_all()
        if not state.is_world_process_zero:
            return
        if self._tensors:
            save_file(dict(self._tensors), folder / "best.safetensors")
        # All files are on disk before the mark that says so.
        for file in (path for path in folder.rglob("*") if path.is_file()):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        write_json(folder / COMPLETE, {"worse": self._worse, "best": self._best, "processes": args.world_size})

    def restore(self, folder: Path) -> None:
        """Reads what `on_save` wrote."""
        saved = read_json(folder / COMPLETE, "resume")
        self._exposure.restore(read_json(folder / f"exposure_{process_number()}.json", "resume"))
        self._worse, self._best = saved["worse"], saved["best"] and (saved["best"][0], saved["best"][1])
        self._tensors = load_file(folder / "best.safetensors") if self._best else {}

    def finish(self, step: int) -> int:
        """Puts the adapter of the lowest loss on the model, if one was kept; returns its step, otherwise `step`."""
        if self._best is None:
            return step
        with torch.no_grad():
            for name, parameter in self._adapted.named_parameters():
                if name in self._tensors:
                    best = self._tensors[name].to(parameter.device)
                    if isinstance(parameter, DTensor):
                        best = distribute_tensor(best, parameter.device_mesh, parameter.placements)
                    parameter.copy_(best)
        if self._best[1] < step:
            note(f"train: the adapter of step {self._best[1]} is kept: its loss on the rows set aside is the lowest")
        return self._best[1]


def whole_tensors(adapted: PeftModel) -> dict[str, Tensor]:
    """Copies of the adapter's tensors on the CPU, by parameter name.

    FSDP holds a part of each tensor in each process; the parts are gathered, so every process has to call this.
    """
    found = {name: parameter.detach() for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    gathered = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in found.items()}
    return {name: tensor.cpu().clone() for name, tensor in gathered.items()}


class _EveryEpoch(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Evaluates after the last step of each epoch, before the checkpoint of that step is written.

    The trainer's own `eval_strategy="epoch"` evaluates after the checkpoint. A training resumed from that checkpoint
    would miss the loss of the epoch and go on with other random numbers.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, train_dataloader: Any, **kwargs: Any) -> None:
        steps = -(-len(train_dataloader) // args.gradient_accumulation_steps)
        control.should_evaluate |= state.global_step % steps == 0 or state.global_step == state.max_steps


class _Progress(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """A progress bar with the loss, on standard error."""

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
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self._bar.update(self._task, completed=state.global_step, loss=f"loss {logs['loss']:.3f}")

    def close(self) -> None:
        """Removes the bar; called after an error as well."""
        self._bar.stop()
