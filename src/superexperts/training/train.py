"""The command `train`: LoRA on chosen experts, attention or any linear maps, by supervised fine-tuning."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import tyro

from superexperts.checkpoints.source import local_folder
from superexperts.core.console import is_main_process, note, stdout
from superexperts.core.errors import Field
from superexperts.core.identity import identity
from superexperts.core.runs import MANIFEST, completed, fingerprint, input_key, new_folder, read_json, write_manifest
from superexperts.core.settings import (
    SeededConfig,
    Switch,
    require,
    require_unused,
)
from superexperts.core.types import ExpertKey, ExpertSet, chosen_experts, key_name
from superexperts.data.row_files import data_files
from superexperts.training.by_expert import values_by_expert
from superexperts.training.checks import check_settings
from superexperts.training.recipe import read_recipe
from superexperts.training.resume import require_something_to_resume

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from superexperts.training.loop import LoopSettings

__all__ = ["TrainConfig", "defaults", "recipe_settings", "run", "show", "train"]

NOT_IN_RECIPE = (
    "recipe",
    "out",
    "overwrite",
    "resume",
    "checkpoint_steps",
    "report_to",
    "json",
    "device",
    "trust_remote_code",
)
"""Settings that say where and how a training runs, not what it trains. They are not written into recipes."""
NEVER_FROM_RECIPE = ("recipe", "overwrite", "resume", "trust_remote_code")
"""Settings that a recipe cannot give. Only the person at the command line can allow a checkpoint's own code to run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(SeededConfig):
    """Fine-tune LoRA on chosen experts only, on attention, or on any linear maps.

    Example: superexperts train pocket --data train.json --experts runs/super.json --out runs/lora

    Example: superexperts train --recipe recipes/train/pocket-super.yaml --data train.json --out runs/lora
    """

    recipe: Path | None = None
    """YAML file with these options, such as the recipe.yaml of an earlier run; options given as well override it."""
    data: Path
    """JSON, JSONL, CSV or Parquet of {question, explain, answer}, or a folder of such files; for more columns see the
    docs."""
    experts: str | None = None
    """Expert set, as a file or inline (L2E54,L3E38): adapt these experts' projections."""
    attention: Switch = False
    """Adapt the attention projections."""
    target: str | None = None
    """Adapt the linear maps with a path that this regular expression matches as a whole."""
    projections: str = "gate,up,down"
    """Which projections of the experts to adapt."""
    out: Path = Path("runs/train")
    """Folder for adapter/ and training.json."""
    r: int = 16
    """LoRA rank."""
    alpha: float = 32
    """LoRA alpha; the update is scaled by alpha / r."""
    ranks: str = ""
    """Ranks of single experts, such as L2E54=32,L3E38=8."""
    alphas: str = ""
    """Alphas of single experts, such as L2E54=64."""
    rslora: Switch = False
    """Scale by alpha / sqrt(r) instead."""
    dropout: float = 0.05
    """Dropout on the LoRA branch's input."""
    adapter_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the saved adapter, which is trained in float32; `auto`: that of the model's weights in memory."""
    prompt: Literal["auto", "plain", "chat"] = "auto"
    """`plain`: Question: ... Answer: ...; `chat`: that as the user's message in the chat template; `auto`: chat where
    the tokenizer has a template. `evaluate` asks in the same way."""
    system_prompt: str | None = None
    """chat: text of the system's message; default: none."""
    learning_rate: float = 1e-4
    """Peak learning rate; the schedule is cosine."""
    warmup: float = 0.03
    """Share of the steps over which the learning rate rises."""
    epochs: float = 2
    """Passes over the data."""
    batch_size: int = 16
    """Rows per device and forward pass; with --packing, sequences of up to --max-length tokens."""
    accumulation: int = 1
    """Forward passes per optimiser step."""
    max_length: int = 1024
    """Longest prompt and response in tokens; longer rows are an error."""
    truncate: Switch = False
    """Cut responses off at --max-length instead, and count them."""
    packing: Switch = False
    """Put several rows into one sequence of up to --max-length tokens; they do not see each other."""
    gradient_checkpointing: Switch = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    eval_data: Path | None = None
    """Rows to measure the loss on, not to train on."""
    eval_share: float = 0
    """Share of --data to set aside for that instead, drawn with --seed."""
    eval_steps: int = 0
    """Optimiser steps between evaluations; 0: once an epoch."""
    patience: int = 0
    """Stop after so many evaluations without a lower loss, and keep the adapter of the lowest; 0: train to the end."""
    checkpoint_steps: int = 50
    """Optimiser steps between checkpoints for --resume; 0: no checkpoints."""
    resume: Switch = False
    """Continue from the last checkpoint of a killed run with the same settings."""
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """Log losses there as well; TensorBoard's files go into logs/ of --out."""
    load_in_4bit: Switch = False
    """Keep linear maps outside the adapted layers in 4 bits (needs bitsandbytes)."""
    offload: Switch = False
    """Keep the layers below the lowest adapted one in main memory, or on disk where there is no GPU."""
    allow_unexposed: Switch = False
    """Accept an adapted expert that no training token reached, which is an error otherwise."""
    overwrite: Switch = False
    """Replace a finished result of other settings or files in --out; the old one stays until the new one is whole."""
    json: Switch = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        check_settings(self)


# ---- recipes ------------------------------------------------------------------------------------------------------


def defaults(words: Sequence[str]) -> TrainConfig | None:
    """The settings in the file that `--recipe FILE` names on a command line, as defaults of its other options."""
    if {"-h", "--help"} & set(words):
        return None
    files = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--recipe"]
    files += [word.removeprefix("--recipe=") for word in words if word.startswith("--recipe=")]
    if not files:
        return None
    settings = recipe_settings(Path(files[-1]))
    # Made without __post_init__: the checks run after the command line has overridden some of the settings, since what
    # is to be adapted may come from either.
    unchecked = object.__new__(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        default = tyro.MISSING if field.default is dataclasses.MISSING else field.default
        object.__setattr__(unchecked, field.name, settings.get(field.name, default))
    return unchecked


def recipe_settings(file: Path) -> dict[str, Any]:
    """The settings of `train` that a recipe holds; `OptionError` for a name or a type that `train` does not have."""
    kinds = {name: kind for name, kind in get_type_hints(TrainConfig).items() if name not in NEVER_FROM_RECIPE}
    return read_recipe(file, kinds)


def check(config: TrainConfig) -> None:
    """What is wrong without reading the files, before any library is imported.

    A study may give projections to all its trainings; here they are an error without experts.
    """
    if config.experts is not None:
        ExpertSet.parse(config.experts)
    why = ("is for experts; give ", Field("experts"), ", or leave it out")
    fits = config.experts is not None or config.projections == TrainConfig.projections
    require(fits, "projections", config.projections, *why)
    if config.prompt == "plain":
        require_unused(config, ["system_prompt"], "with ", Field("prompt"), " plain")
    _data_files(config)
    local_folder(config.model)
    if config.resume and not (config.out / MANIFEST).is_file():
        require_something_to_resume(config.out)


def run(config: TrainConfig) -> dict[str, Any]:
    """Checks the settings and trains as `train` does."""
    check(config)
    return train(config)


def train(
    config: TrainConfig,
    *,
    load: Callable[..., nn.Module] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Any]:
    """Trains an adapter; writes `adapter/`, `recipe.yaml`, `training.json` and, last, the manifest into `config.out`.

    `load(source, device=..., dtype=...)` gives the model instead of loading it here; it comes back as it was. Returns
    the content of training.json and `out`. `EffectError`, with nothing written, if the adapter changes no logit. Of
    several processes that a launcher started, only the main one writes.
    """
    # Imported here, so that --help and a wrong option do not wait for torch.
    from superexperts.adapters.borrow import borrowed
    from superexperts.adapters.exposure import counting
    from superexperts.adapters.lora import trainable_parameters
    from superexperts.checkpoints.source import resolve
    from superexperts.data.chat import write_prompt_record
    from superexperts.models.loading import load_tokenizer
    from superexperts.training import outcome
    from superexperts.training.card import adapted_parts
    from superexperts.training.loop import train_loop, whole_tensors
    from superexperts.training.memory import load_to_train
    from superexperts.training.resume import checkpoint_to_resume, checkpoints_folder, kept_when_killed
    from superexperts.training.rows import load_examples, put_in_chat

    started = time.monotonic()
    chosen = None if config.experts is None else chosen_experts(config.experts, config.model).experts
    names = None if chosen is None else [key_name(key) for key in chosen]
    files = _data_files(config)
    source = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    contents = {field: fingerprint(file) for field, file in files.items()}
    inputs = identity(config, model=source.fingerprint, experts=chosen, **contents)
    if completed(config.out, "train", inputs, overwrite=config.overwrite):
        note(f"train: {config.out} is up to date, nothing to do")
        return {"out": str(config.out), **read_json(config.out / "training.json", "training")}
    if config.resume:
        require_something_to_resume(config.out)
    work = checkpoints_folder(config.out)
    # Weights on disk lie in the temporary output folder: what a killed training leaves is cleared away with it.
    with _output_folder(config.out) as temporary, tempfile.TemporaryDirectory(prefix="weights-", dir=temporary) as disk:
        tokenizer = tokenizer or load_tokenizer(source)
        chat, asked = put_in_chat(tokenizer, config.prompt, config.system_prompt)
        examples, held_out = load_examples(
            config.data,
            tokenizer,
            max_length=config.max_length,
            chat=chat,
            system_prompt=config.system_prompt,
            truncate=config.truncate,
            eval_data=config.eval_data,
            eval_share=config.eval_share,
            seed=config.seed,
        )
        model = load(source, device=config.device, dtype=config.dtype) if load else load_to_train(
            source,
            lambda empty: _attach(empty, chosen, config),
            Path(disk),
            device=config.device,
            dtype=config.dtype,
            load_in_4bit=config.load_in_4bit,
            offload=config.offload,
        )  # fmt: skip
        checkpoint = checkpoint_to_resume(work, input_key("train", inputs), resume=config.resume)
        with kept_when_killed(work), borrowed(model):
            # Inside `borrowed`: whatever happens, the model is handed back without the adapter.
            adapted = _attach(model, chosen, config)
            # Trackers print to standard output, which is for results.
            with counting(adapted, training=True) as exposure, contextlib.redirect_stdout(sys.stderr):
                if checkpoint is not None:
                    note(f"train: going on from step {checkpoint.name.partition('-')[2]}")
                done = train_loop(
                    adapted, tokenizer, examples, held_out, _loop_settings(config), exposure, work, checkpoint
                )
            seen = exposure.by_expert()
            outcome.require_exposure(seen, exposure.tokens, config.data, allow_unexposed=config.allow_unexposed)
            dtype = outcome.round_adapter(adapted, config.adapter_dtype)
            effect = outcome.measure_effect(
                adapted,
                examples,
                config.data,
                what=adapted_parts(names, attention=config.attention, target=config.target).removeprefix("experts "),
                field="experts" if chosen is not None else "attention" if config.attention else "target",
            )
            result = {
                "loss": done.losses,
                "eval_loss": done.eval_losses,
                "kept_step": done.kept_step,
                "trainable_parameters": trainable_parameters(adapted),
                "rows": len(examples),
                "eval_rows": len(held_out),
                "truncated": sum(example.truncated for example in examples),
                "tokens": sum(len(example.input_ids) for example in examples),
                "exposure": seen,
                **dataclasses.asdict(effect),
                "experts": names,
            }
            tensors = {name: tensor.to(dtype) for name, tensor in whole_tensors(adapted).items()}
            if temporary is not None:
                outcome.save_adapter(adapted, tensors, temporary / "adapter", source)
                write_prompt_record(temporary / "adapter", asked)
        if temporary is not None:
            digests = {file.name: _sha(file) for file in files.values()}
            experts = None if names is None else ",".join(names)
            outcome.write_description(temporary, _recipe(config, experts), result, digests)
            outputs = ["adapter", "recipe.yaml", "training.json"]
            if (work / "logs").is_dir():
                shutil.move(work / "logs", temporary / "logs")
            write_manifest(temporary, "train", inputs, outputs, time.monotonic() - started)
    if is_main_process:
        shutil.rmtree(work, ignore_errors=True)
    return {"out": str(config.out), **result}


def show(result: dict[str, Any]) -> None:
    """Prints what `run` returned."""
    stdout.print(
        f"trained {result['trainable_parameters']:,} parameters on {result['rows']:,} rows; "
        f"the adapter changes logits by up to {result['max_logit_change']:.3g} (KL {result['kl']:.3g} nats)"
    )
    stdout.print(f"in {result['out']}", soft_wrap=True)


# ---- settings as plain arguments ----------------------------------------------------------------------------------


def _data_files(config: TrainConfig) -> dict[str, Path]:
    """The files of rows by the setting that names them; `DataError` for one that does not exist."""
    files = {"data": config.data} | ({"eval_data": config.eval_data} if config.eval_data else {})
    for field, file in files.items():
        data_files(file, field)
    return files


def _sha(path: Path) -> str:
    """The SHA-256 of a file; of a folder, that of the names and contents of its files."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else fingerprint(path)


@contextlib.contextmanager
def _output_folder(out: Path) -> Iterator[Path | None]:
    """The folder to write into; None in a process that does not write."""
    if not is_main_process:
        yield None
        return
    with new_folder(out, "train") as temporary:
        yield temporary


def _attach(model: nn.Module, chosen: Sequence[ExpertKey] | None, config: TrainConfig) -> PeftModel:
    from superexperts.adapters.lora import attach  # it imports torch

    return attach(
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
        ranks={expert: int(rank) for expert, rank in values_by_expert(config.ranks, "ranks").items()},
        alphas=values_by_expert(config.alphas, "alphas"),
    )


def _loop_settings(config: TrainConfig) -> LoopSettings:
    from superexperts.training.loop import LoopSettings  # it imports trl

    same = {field.name for field in dataclasses.fields(LoopSettings)} - {"run_name"}
    return LoopSettings(run_name=config.out.name, **{name: getattr(config, name) for name in same})


def _recipe(config: TrainConfig, experts: str | None) -> dict[str, Any]:
    """Every setting that decides what is trained; `experts` names them instead of the file that holds the set."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_IN_RECIPE}
    return settings | {"experts": experts}
