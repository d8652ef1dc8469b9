"""The model card of a trained adapter: what is adapted, what it was trained on, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["adapted_parts", "front_matter", "model_card"]


def adapted_parts(experts: Sequence[str] | None, *, attention: bool, target: str | None) -> str:
    """What an adapter is on, in words; `experts` are names such as `L2E54`."""
    parts = []
    if experts is not None:
        parts.append("experts " + ", ".join(experts))
    if attention:
        parts.append("attention")
    if target is not None:
        parts.append(f"linear maps `{target}`")
    return " and ".join(parts)


def front_matter(facts: Mapping[str, Any]) -> list[str]:
    """The lines at the top of a card that the Hub reads."""
    return ["---", yaml.safe_dump(dict(facts), sort_keys=False, allow_unicode=True).strip(), "---", ""]


def model_card(settings: Mapping[str, Any], result: Mapping[str, Any], data: Mapping[str, str]) -> str:
    """The text of README.md.

    `settings` are those of the recipe, `result` is the content of training.json, and `data` holds the SHA-256 of each
    data file by the file's name.
    """
    model, experts = settings["model"], result["experts"]
    front = {
        "library_name": "peft",
        **({} if model == "pocket" or Path(model).is_dir() else {"base_model": model}),
        "tags": ["lora", "superexperts"],
    }
    metrics = [
        ("rows", f"{result['rows']:,}"),
        ("tokens of one epoch", f"{result['tokens']:,}"),
        ("trainable parameters", f"{result['trainable_parameters']:,}"),
        ("loss of the first step", f"{result['loss'][0][1]:.4f}"),
        ("loss of the last step", f"{result['loss'][-1][1]:.4f}"),
        *([("loss on rows set aside", f"{_kept_loss(result):.4f}")] if result["eval_loss"] else []),
        ("adapter of step", f"{result['kept_step']:,}"),
        ("largest change of a logit", f"{result['max_logit_change']:.3g}"),
        ("KL of the next token", f"{result['kl']:.3g} nats"),
    ]
    parts = adapted_parts(experts, attention=settings["attention"], target=settings["target"])
    lines = [
        *front_matter(front),
        f"# LoRA on {parts} of {model}",
        "",
        *(f"- {line}" for line in _setting_lines(settings, on_experts=experts is not None)),
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


def _setting_lines(settings: Mapping[str, Any], *, on_experts: bool) -> list[str]:
    rslora = ", rsLoRA" if settings["rslora"] else ""
    return [
        f"rank {settings['r']}, alpha {settings['alpha']:g}, dropout {settings['dropout']:g}{rslora}",
        *(f"{name} {settings[name]}" for name in ("ranks", "alphas") if settings[name]),
        *([f"projections {settings['projections']}"] if on_experts else []),
        f"{settings['epochs']:g} epochs at a learning rate of {settings['learning_rate']:g}, "
        f"{settings['batch_size'] * settings['accumulation']} sequences a step and process, seed {settings['seed']}",
        f"prompt: {settings['prompt']}",
    ]


def _kept_loss(result: Mapping[str, Any]) -> float:
    """The loss on rows set aside at the kept step, or at the last evaluation before it."""
    losses = [loss for step, loss in result["eval_loss"] if step <= result["kept_step"]]
    return float(losses[-1] if losses else result["eval_loss"][0][1])
