"""The model card of a trained adapter: what it is on, what it was trained from, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from superexperts.core.config_train import TrainConfig

__all__ = ["front_matter", "model_card", "target_name"]


def target_name(config: TrainConfig, experts: Sequence[str] | None) -> str:
    """What is adapted, in words."""
    parts = []
    if experts is not None:
        parts.append("experts " + ", ".join(experts))
    if config.attention:
        parts.append("attention")
    if config.target is not None:
        parts.append(f"linear maps `{config.target}`")
    return " and ".join(parts)


def front_matter(facts: Mapping[str, Any]) -> list[str]:
    """The lines at the head of a card that the Hub reads."""
    return ["---", yaml.safe_dump(dict(facts), sort_keys=False, allow_unicode=True).strip(), "---", ""]


def model_card(config: TrainConfig, result: Mapping[str, Any], data: Mapping[str, str]) -> str:
    """README.md; `result` is training.json's content, `data` the SHA-256 of each data file by its name."""
    experts = result["experts"]
    front = {
        "library_name": "peft",
        **({} if config.model == "pocket" or Path(config.model).is_dir() else {"base_model": config.model}),
        "tags": ["lora", "superexperts"],
    }
    own = [f"{option} {text}" for option, text in (("ranks", config.ranks), ("alphas", config.alphas)) if text]
    settings = [
        f"rank {config.r}, alpha {config.alpha:g}, dropout {config.dropout:g}" + (", rsLoRA" if config.rslora else ""),
        *own,
        *([f"projections {config.projections}"] if experts is not None else []),
        f"{config.epochs:g} epochs at a learning rate of {config.learning_rate:g}, "
        f"{config.batch_size * config.accumulation} sequences a step and process, seed {config.seed}",
        f"prompt: {config.prompt}",
    ]
    metrics = [
        ("rows", f"{result['rows']:,}"),
        ("tokens of one epoch", f"{result['tokens']:,}"),
        ("trainable parameters", f"{result['trainable_parameters']:,}"),
        ("loss of the first step", f"{result['loss'][0][1]:.4f}"),
        ("loss of the last step", f"{result['loss'][-1][1]:.4f}"),
        *([("loss on rows set aside", f"{_kept(result):.4f}")] if result["eval_loss"] else []),
        ("adapter of step", f"{result['kept_step']:,}"),
        ("largest change of a logit", f"{result['max_logit_change']:.3g}"),
        ("KL of the next token", f"{result['kl']:.3g} nats"),
    ]
    lines = [
        *front_matter(front),
        f"# LoRA on {target_name(config, experts)} of {config.model}",
        "",
        *(f"- {setting}" for setting in settings),
        "",
        "`recipe.yaml` holds every setting: `superexperts train --recipe recipe.yaml` trains it again.",
        "",
        "| data | SHA-256 |",
        "| --- | --- |",
        *(f"| {name} | `{digest}` |" for name, digest in data.items()),
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in metrics),
    ]
    if result["exposure"]:
        lines += ["", "| expert | training tokens that it saw |", "| --- | --- |"]
        lines += [f"| {name} | {count:,} |" for name, count in result["exposure"].items()]
    if experts is not None:
        lines += [
            "",
            "Load with `superexperts.adapters.lora.load_adapter(model, folder)`, or `superexperts export` it.",
        ]
    return "\n".join(lines) + "\n"


def _kept(result: Mapping[str, Any]) -> float:
    """The loss on rows set aside at, or last before, the step whose adapter was kept."""
    losses = [loss for step, loss in result["eval_loss"] if step <= result["kept_step"]]
    return float(losses[-1] if losses else result["eval_loss"][0][1])
