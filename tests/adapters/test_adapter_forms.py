"""Every form in which adapters are found, through every command that reads one: right, or one line that says why not.

`FORMS` is the table in docs/export.md. Where PEFT can load a form, the logits are PEFT's own; otherwise they are those
of the model with W + scaling * B A in its weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call

from superexperts.adapters import export, import_, lora
from superexperts.adapters.borrow import borrowed
from superexperts.adapters.effect import adapter_effect
from superexperts.adapters.export import ExportConfig
from superexperts.adapters.import_ import ImportConfig
from superexperts.checkpoints.source import adapter_folder
from superexperts.core.errors import UserError
from superexperts.surgery import compare
from superexperts.surgery.compare import CompareConfig
from tests.adapters.test_export import engine_view, stock
from tests.adapters.test_lora import logits
from tests.support.families import VOCABULARY, tiny_model, tiny_tokens
from tests.training.test_train import byte_tokenizer

COMMANDS = ("check-adapter, evaluate", "import", "export peft", "export vllm", "export merged", "compare")
R, SCALING, EXPERTS, HIDDEN, INNER = 4, 4.0, 8, 32, 24
PREFIX = "base_model.model."
OK = "yes"
MORE = "no: more than A and B"
FIRST = "import first"
UNMERGED = "no: cannot be merged"
WORDS = {
    MORE: "which is more than A and B of linear maps; .*(merged|PEFT)",
    FIRST: "import it first",
    "no: layers used twice": "layers.* twice .layer_replication.*PEFT",
    UNMERGED: "cannot be merged.*; use it as it is",
    "no: no bias to merge into": "lora_bias.* has none in the checkpoint",
    "no: parts not gathered": "without gathering its parts",
    "no: a pickle": "as a pickle",
    "no: several adapters": "it is in policy, ref: give one of them",
    "no: start not recorded": "no file records; save it again",
    "no: tied": "tied to another weight",
    "no: other base": "other values of lm_head.weight than this model's",
    "no: resized": "the vocabulary was resized before training",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """One row of the table."""

    title: str
    make: Callable[[Path], tuple[Path, Tensor]]
    """(folder) -> the adapter's folder, and the logits that it should give; the base is in `folder / "base"`."""
    cells: tuple[str, ...]
    """What each of `COMMANDS` does."""


def base(folder: Path, family: str = "qwen3_moe", **settings: Any) -> Path:
    tiny_model(family, **settings).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    return folder / "base"


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def by_peft(folder: Path, model: Path, **settings: Any) -> tuple[Path, Tensor]:
    """An adapter that PEFT makes and saves, with random values; and the logits that PEFT gives after loading it."""
    config = LoraConfig(**{"r": R, "lora_alpha": R * SCALING, "task_type": "CAUSAL_LM", **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(stock(model), config)
        for seed, (name, parameter) in enumerate(adapted.named_parameters()):
            if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name:
                parameter.data += drawn(*parameter.shape, seed=seed)
        adapted.save_pretrained(str(folder / "adapter"))
        edit(folder / "adapter", base_model_name_or_path=str(model))
        return folder / "adapter", logits(PeftModel.from_pretrained(stock(model), str(folder / "adapter")).eval())


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def rewrite(folder: Path, change: Callable[[str, Tensor], tuple[str, Tensor] | None]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(dict(pair for item in load_file(file).items() if (pair := change(*item))), file)


def peft(
    title: str,
    *cells: str,
    family: str = "qwen3_moe",
    tied: bool = False,
    then: Callable[[Path], None] | None = None,
    again: bool = False,
    **settings: Any,
) -> Form:
    """A file that PEFT saved and `then` changed; `again` asks PEFT for the logits of the changed file."""

    def make(folder: Path) -> tuple[Path, Tensor]:
        adapter, expected = by_peft(folder, base(folder, family, tie_word_embeddings=tied), **settings)
        if then is not None:
            then(adapter)
        if again:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = logits(PeftModel.from_pretrained(stock(folder / "base"), str(adapter)).eval())
        return adapter, expected

    return Form(title=title, make=make, cells=cells if len(cells) > 1 else cells * len(COMMANDS))


# ---- files that other programs write -------------------------------------------------------------------------------


def by_hand(folder: Path, kind: str) -> tuple[Path, Tensor]:
    """q_proj of layer 0 and all experts of layer 1 in the layout of another program."""
    model = base(folder)
    deltas: dict[str, Tensor] = {}
    a, b = drawn(R, HIDDEN, seed=90), drawn(HIDDEN, R, seed=91)
    deltas["model.layers.0.self_attn.q_proj.weight"] = SCALING * (b @ a)
    up, down = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"
    sizes = {"gate_proj": (HIDDEN, INNER), "up_proj": (HIDDEN, INNER), "down_proj": (INNER, HIDDEN)}
    pairs = {
        name: (drawn(EXPERTS, R, inputs, seed=i), drawn(EXPERTS, outputs, R, seed=i + 9))
        for i, (name, (inputs, outputs)) in enumerate(sizes.items())
    }
    if kind == "shared":
        pairs = {name: (a_ERI[:1].expand(EXPERTS, -1, -1), b_EOR) for name, (a_ERI, b_EOR) in pairs.items()}
    change = {name: SCALING * (b_EOR @ a_ERI) for name, (a_ERI, b_EOR) in pairs.items()}
    deltas |= {up: torch.cat([change["gate_proj"], change["up_proj"]], 1), down: change["down_proj"]}
    fields: dict[str, Any] = {"peft_type": "LORA", "r": R, "lora_alpha": R * SCALING, "target_modules": ["q_proj"]}
    attention, block = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp"
    tensors = {f"{PREFIX}{attention}.lora_A.weight": a, f"{PREFIX}{attention}.lora_B.weight": b}
    name_of_file = "adapter_model.safetensors"
    if kind == "mlx":
        fields = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": R, "scale": SCALING}}
        tensors = {f"{attention}.lora_a": a.T, f"{attention}.lora_b": b.T}
        for name, (a_ERI, b_EOR) in pairs.items():
            tensors |= {f"{block}.switch_mlp.{name}.lora_a": a_ERI, f"{block}.switch_mlp.{name}.lora_b": b_EOR}
        name_of_file = "adapters.safetensors"
    elif kind == "per expert":
        for name, (a_ERI, b_EOR) in pairs.items():
            for expert in range(EXPERTS):
                key = f"{PREFIX}{block}.experts.{expert}.{name}"
                tensors |= {f"{key}.lora_A.weight": a_ERI[expert], f"{key}.lora_B.weight": b_EOR[expert]}
    else:
        for name, (a_ERI, b_EOR) in pairs.items():
            key = f"{PREFIX}{block}.experts.{name}"
            tensors |= {f"{key}.lora_A.weight": a_ERI[:1] if kind == "shared" else a_ERI, f"{key}.lora_B.weight": b_EOR}
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": str(model)}))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, adapter / name_of_file)
    plain = stock(model)
    weights = {name: p + deltas.get(name, 0) for name, p in plain.named_parameters()}
    with torch.no_grad():
        found = functional_call(plain, weights, kwargs={"input_ids": tiny_tokens(), "use_cache": False}).logits
    return adapter, found


def sharded(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = sorted(load_file(file).items())
    for number, part in enumerate((tensors[::2], tensors[1::2]), 1):
        save_file(dict(part), folder / f"adapter_model-{number:05}-of-00002.safetensors")
    file.unlink()


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def in_two_folders(folder: Path) -> None:
    files = [file for file in folder.iterdir() if file.is_file()]
    for name in ("policy", "ref"):
        (folder / name).mkdir()
        for file in files:
            (folder / name / file.name).write_bytes(file.read_bytes())
    for file in files:
        file.unlink()


def in_one_folder(folder: Path) -> None:
    (folder / "policy").mkdir()
    for file in [file for file in folder.iterdir() if file.is_file()]:
        file.rename(folder / "policy" / file.name)


def with_names(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    return f"{PREFIX}_orig_mod.{key.removeprefix(PREFIX)}".replace(".weight", ".default.weight"), tensor


def inside_a_wrapper(folder: Path) -> None:
    rewrite(folder, lambda key, x: (key.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model."), x))
    edit(folder, target_modules=r"model\.language_model\.layers\.\d+\.self_attn\.(q_proj|o_proj)")


def other_head(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    return key, tensor + 1 if key.endswith("lm_head.base_layer.weight") else tensor


def longer_head(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    longer = key.endswith("lm_head.base_layer.weight")
    return key, torch.cat([tensor, tensor[:3]]) if longer else tensor


def longer_embeddings(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    return key, torch.cat([tensor, tensor[:3]]) if len(tensor) == VOCABULARY else tensor


def unknown_fields(folder: Path) -> None:
    edit(folder, a_field_of_tomorrow=None, merge_weights=False)


def plain_lora(title: str, then: Callable[[Path], None], *cells: str) -> Form:
    return peft(title, *(cells or (OK,)), then=then, target_modules=["q_proj", "o_proj"])


def foreign(title: str, kind: str) -> Form:
    cells = (FIRST, OK, FIRST, FIRST, FIRST, FIRST)
    return Form(title=title, make=lambda folder: by_hand(folder, kind), cells=cells)


SOME = (OK, MORE, MORE, MORE, OK, MORE)
NO_BIAS = (OK, MORE, MORE, MORE, "no: no bias to merge into", MORE)
HEAD = ["q_proj", "lm_head"]

FORMS = (
    peft("linear maps", OK, target_modules=["q_proj", "o_proj"]),
    peft("rsLoRA, a rank and an alpha for one map", OK, target_modules=["q_proj", "o_proj"], use_rslora=True,
         rank_pattern={"o_proj": 2}, alpha_pattern={"q_proj": 3}),
    peft("a start by MiCA, EVA or orthogonal matrices", OK, target_modules=["q_proj"], init_lora_weights="mica"),
    peft("DoRA", *SOME, target_modules=["q_proj"], use_dora=True),
    peft("PiSSA", *SOME, target_modules=["q_proj"], init_lora_weights="pissa"),
    peft("OLoRA", *SOME, target_modules=["q_proj"], init_lora_weights="olora"),
    plain_lora("PiSSA by a random SVD, CorDA, LoRA-GA, LoftQ", lambda folder: edit(
        folder, init_lora_weights="pissa_niter_4"),
        "no: start not recorded", MORE, MORE, MORE, "no: start not recorded", MORE),
    peft("`lora_bias`, on maps without a bias", *NO_BIAS, target_modules=["o_proj"], lora_bias=True),
    peft("biases of the base (`bias`)", *SOME, family="qwen2_moe", target_modules=["q_proj"], bias="all"),
    peft("`lora_bias`, on maps with a bias", *SOME, family="qwen2_moe", target_modules=["q_proj"], lora_bias=True),
    peft("aLoRA", OK, MORE, MORE, MORE, UNMERGED, MORE, target_modules=["q_proj"],
         alora_invocation_tokens=[int(tiny_tokens()[0, 0])]),
    peft("`layer_replication`", "no: layers used twice", target_modules=["q_proj"],
         layer_replication=[(0, 2), (1, 3)]),
    peft("output head, as PEFT saves it", OK, target_modules=HEAD),
    peft("output head, tied to the embeddings", OK, OK, OK, "no: tied", OK, "no: tied", tied=True, target_modules=HEAD),
    peft("embeddings", *SOME, target_modules=["q_proj", "embed_tokens"]),
    peft("embeddings, tied to the head", *SOME, tied=True, target_modules=["q_proj", "embed_tokens"]),
    peft("`modules_to_save`", *SOME, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    peft("`modules_to_save`, tied", *SOME, tied=True, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    peft("`modules_to_save`, tied, with `ensure_weight_tying`", *SOME, tied=True, target_modules=["q_proj"],
         modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    peft("embeddings, tied, with `ensure_weight_tying`", *SOME, tied=True, target_modules=["q_proj", "embed_tokens"],
         ensure_weight_tying=True),
    peft("`trainable_token_indices`", *SOME, target_modules=["q_proj"], trainable_token_indices=[3, 5, 40]),
    peft("`trainable_token_indices`, tied", *SOME, tied=True, target_modules=["q_proj"],
         trainable_token_indices=[3, 5, 40]),
    peft("saved with another output head", "no: other base", then=lambda folder: rewrite(folder, other_head),
         target_modules=HEAD),
    peft("saved with a resized vocabulary", "no: resized", then=lambda folder: rewrite(folder, longer_head),
         target_modules=HEAD),
    peft("`modules_to_save` with a resized vocabulary", "no: resized", target_modules=["q_proj"],
         modules_to_save=["embed_tokens", "lm_head"], then=lambda folder: rewrite(folder, longer_embeddings)),
    peft("routers", OK, target_modules=["q_proj", "gate"]),
    peft("`all-linear` with routers and experts", OK, OK, FIRST, FIRST, OK, FIRST, target_modules="all-linear"),
    peft("experts in PEFT's layout", OK, OK, FIRST, FIRST, OK, FIRST, target_modules=["q_proj"],
         target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    foreign("one key for each expert", "per expert"),
    foreign("one tensor for the experts of a layer", "stacked"),
    foreign("the same, with a factor that all experts share", "shared"),
    foreign("mlx-lm", "mlx"),
    peft("values in float8", OK, then=lambda folder: rewrite(folder, lambda key, x: (key, x.to(torch.float8_e5m2))),
         again=True, target_modules=["q_proj", "o_proj"]),
    plain_lora("the adapter's name and wrappers in the keys", lambda folder: rewrite(folder, with_names)),
    plain_lora("keys without `base_model.model.`", lambda folder: rewrite(
        folder, lambda key, x: (key.removeprefix(PREFIX), x))),
    plain_lora("trained inside a larger model (`model.language_model.layers`)", inside_a_wrapper),
    plain_lora("fields that PEFT does not know", unknown_fields),
    plain_lora("in shards", sharded),
    plain_lora("in the only folder below (`policy/`)", in_one_folder),
    plain_lora("in several folders below (`policy/`, `ref/`)", in_two_folders, "no: several adapters"),
    plain_lora("tensors of size 0", lambda folder: rewrite(folder, lambda key, x: (key, x[:0])),
               "no: parts not gathered"),
    plain_lora("`adapter_model.bin`", pickled, "no: a pickle"),
)  # fmt: skip


def commands(adapter: Path, folder: Path) -> dict[str, Callable[[], Tensor | None]]:
    """What runs each command on an adapter, and returns the logits of what it gives."""
    model = folder / "base"

    def exported(layout: Any) -> Path:
        export.run(ExportConfig(adapter=adapter, format=layout, model=str(model), out=folder / layout))
        return folder / layout

    def imported() -> Tensor:
        import_.run(ImportConfig(adapter=adapter, model=str(model), out=folder / "imported"))
        return logits(lora.load_adapter(stock(model), folder / "imported" / "adapter"))

    def compared() -> None:
        found = compare.run(CompareConfig(a=str(model), b=str(adapter)))
        merged = compare.run(CompareConfig(a=str(model), b=str(exported("merged"))))
        assert found["parts"] == merged["parts"]

    def checked() -> Tensor:
        return logits(lora.load_adapter(stock(model), adapter_folder(adapter)))

    runs: tuple[Callable[[], Tensor | None], ...] = (
        checked,
        imported,
        lambda: logits(PeftModel.from_pretrained(stock(model), str(exported("peft"))).eval()),
        lambda: logits(stock(engine_view(model, exported("vllm"), folder / "engine"))),
        lambda: logits(stock(exported("merged"))),
        compared,
    )
    return dict(zip(COMMANDS, runs, strict=True))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.title)
def test_a_form_is_right_or_refused_in_every_command(form: Form, tmp_path: Path) -> None:
    adapter, expected = form.make(tmp_path)
    assert (expected - logits(stock(tmp_path / "base"))).abs().max() > 0.05
    tolerance = 2e-5 * float(expected.abs().max())
    for (name, run), cell in zip(commands(adapter, tmp_path).items(), form.cells, strict=True):
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")
            if cell != OK:
                caught = stack.enter_context(pytest.raises(UserError))
            found = run()
            if found is not None:
                assert (found - expected).abs().max() <= tolerance, name
        if cell != OK:
            assert re.search(WORDS[cell], str(caught.value)), (name, str(caught.value))
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 500
            assert "own model" not in str(caught.value)


@pytest.mark.parametrize("form", [form for form in FORMS if form.cells[0] == OK], ids=lambda form: form.title)
def test_the_effect_is_measured_against_the_base(form: Form, tmp_path: Path) -> None:
    adapter, expected = form.make(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = stock(tmp_path / "base")
        plain = logits(model)
        adapted = lora.load_adapter(model, adapter_folder(adapter))
        effect = adapter_effect(adapted, list(tiny_tokens()))
    largest = float((expected - plain).abs().max())
    assert abs(effect.max_logit_change - largest) <= 1e-4 * max(1, largest)
    assert torch.allclose(logits(adapted), expected, atol=2e-5 * float(expected.abs().max()))
    with borrowed(model):
        pass  # gives the model back without the adapter
    assert torch.allclose(logits(model), plain, atol=2e-5 * float(plain.abs().max()))


def test_the_table_in_the_docs() -> None:
    rows = [f"| {form.title} | {' | '.join(form.cells)} |" for form in FORMS]
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in text
    assert "| " + " | ".join(["form", *COMMANDS]) + " |" in text


def main() -> None:
    """Prints the table for docs/export.md."""
    print("| " + " | ".join(["form", *COMMANDS]) + " |")
    print("|" + " --- |" * (len(COMMANDS) + 1))
    print("\n".join(f"| {form.title} | {' | '.join(form.cells)} |" for form in FORMS))


if __name__ == "__main__":
    main()
