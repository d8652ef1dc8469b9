"""Rows, tokens, the loss and what training leaves behind, against hand-made lists and a brute-force loss."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from superexperts.adapters import lora
from superexperts.adapters.effect import adapter_effect
from superexperts.adapters.layer import ExpertLoraConfig
from superexperts.core.errors import DataError, EffectError, ExpertsError, ModelError, OptionError, OutputError
from superexperts.core.runs import fingerprint
from superexperts.core.types import key_name
from superexperts.models.banks import find_banks
from superexperts.models.experts import BankCall
from superexperts.models.hooks import tapped
from superexperts.training import card, loop, memory, train
from superexperts.training import rows as sft_data
from superexperts.training.rows import IGNORED, Row, encode, read_rows
from superexperts.training.train import TrainConfig
from tests.support.families import tiny_model

BOS, EOS = 1, 2
ROWS = [
    {"question": "What is 2 + 3?", "explain": "2 + 3 = 5.", "answer": "5"},
    {"question": "Đỏ?", "explain": "Là màu.", "answer": "A"},
    {"question": "Is water wet? " * 3, "explain": "It is.", "answer": "yes"},
    {"question": "Pick.\nA. one\nB. two", "explain": "Two is B.", "answer": "B"},
    {"question": "And 9 - 4?", "explain": "9 - 4 = 5 since 5 + 4 = 9.", "answer": "5"},
]


def byte_tokenizer(merges: list[tuple[str, str]] | None = None, template: str = "<s> $A") -> PreTrainedTokenizerFast:
    """Token id of a byte is 3 + the byte, so that expected ids can be written down; merges follow from 259 on."""
    alphabet = {byte: char for char, byte in _byte_of_char().items()}
    vocabulary = {"<pad>": 0, "<s>": BOS, "</s>": EOS} | {alphabet[byte]: 3 + byte for byte in range(256)}
    for left, right in merges or []:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges or []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 bytes are themselves, the rest follow from U+0100 on, in order."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(others)}


def ids(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


def row(number: int = 1, **fields: str) -> Row:
    return Row(number=number, **{**ROWS[0], **fields})


# ---- rows ---------------------------------------------------------------------------------------------------------


def test_an_array_jsonl_and_gzip_hold_the_same_rows(tmp_path: Path) -> None:
    odd = {"question": "a\u2028b", "explain": "x", "answer": "y", "more": 1}
    rows = [*ROWS, odd]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.json").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    expected = [Row(number=i, **{k: r[k] for k in sft_data.FIELDS}) for i, r in enumerate(rows, start=1)]
    for name in ("a.json", "b.jsonl", "c.jsonl.gz", "d.json"):
        assert read_rows(tmp_path / name) == expected, name
    (tmp_path / "e.jsonl").write_text("\n\n" + json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[1]), encoding="utf-8")
    assert [r.number for r in read_rows(tmp_path / "e.jsonl")] == [3, 5]  # lines, so that an editor finds them


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no rows"),
        ("[]", "has no rows"),
        ("\n \n", "has no rows"),
        ('[{"question": "a"', "not valid JSON"),
        ('{"question": "q", "explain": "e", "answer": "a"}\n{"question"', "row 2 is not valid JSON"),
        ('["a"]', "row 1 is str, not an object"),
        ("3", "row 1 is int, not an object"),
        (
            '[{"question": "q", "explain": "e", "answer": "a"}, {"question": "q", "explain": "e"}]',
            "row 2 has no 'answer'",
        ),
        ('{"explain": "e", "answer": "a"}', "row 1 has no 'question'"),
        ('{"question": "q", "answer": "a"}', "row 1 has no 'explain'"),
        ('{"question": "q", "explain": " ", "answer": "a"}', "row 1: 'explain' is empty"),
        ('{"question": "q", "explain": "e", "answer": true}', "row 1: 'answer' is true, not text"),
        ('{"question": null, "explain": "e", "answer": "5"}', "row 1: 'question' is null, not text"),
    ],
)
def test_a_bad_row_is_named_by_file_number_and_field(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words) as caught:
        read_rows(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.json.gz").write_bytes(b"not gzip")
    for name in ("a.json", "b.json.gz", "missing.json"):
        with pytest.raises(DataError, match=name):
            read_rows(tmp_path / name)


# ---- tokens -------------------------------------------------------------------------------------------------------


def test_tokens_and_labels_are_these() -> None:
    example, second = encode(
        [row(question="1?", explain="é", answer="B"), row()], byte_tokenizer(), max_length=100, file=Path("rows")
    )
    prompt = [BOS, *ids("Question: 1?\nAnswer:")]
    answer = [*ids(" é The answer is B."), EOS]
    assert example.input_ids == prompt + answer
    assert example.labels == [-100] * len(prompt) + answer
    for one in (example, second):
        assert one.input_ids.count(BOS) == one.input_ids.count(EOS) == 1


def test_the_prompt_keeps_its_own_tokens_where_the_tokenizer_merges_over_the_border() -> None:
    tokenizer = byte_tokenizer(merges=[(":", "Ġ")])
    assert tokenizer("a: b").input_ids == [BOS, *ids("a"), 259, *ids("b")]
    (example,) = encode([row(question="1?", explain="x", answer="B")], tokenizer, max_length=100, file=Path("rows"))
    prompt = [BOS, *ids("Question"), 259, *ids("1?\nAnswer:")]
    assert example.input_ids == [*prompt, *ids(" x The answer is B."), EOS]
    assert example.labels[: len(prompt) + 1] == [IGNORED] * len(prompt) + ids(" ")


def test_a_tokenizer_that_ends_every_text_or_begins_none() -> None:
    for template, start in (("<s> $A </s>", [BOS]), ("$A", []), ("$A </s>", [])):
        (example,) = encode([row()], byte_tokenizer(template=template), max_length=100, file=Path("rows"))
        expected = [*start, *ids("Question: What is 2 + 3?\nAnswer:"), *ids(" 2 + 3 = 5. The answer is 5."), EOS]
        assert example.input_ids == expected, template
        assert sum(label != IGNORED for label in example.labels) == len(" 2 + 3 = 5. The answer is 5.") + 1


def test_a_row_over_the_limit_is_named() -> None:
    tokenizer = byte_tokenizer()
    length = len(encode([row()], tokenizer, max_length=1000, file=Path("f"))[0].input_ids)
    assert len(encode([row()], tokenizer, max_length=length, file=Path("f"))) == 1
    with pytest.raises(DataError, match=rf"f\.json row 7 has {length} tokens, over max_length {length - 1}"):
        encode([row(number=7)], tokenizer, max_length=length - 1, file=Path("f.json"))
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        encode([row()], tokenizer, max_length=1000, file=Path("f"))


# ---- training -----------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, family: str, **settings: Any) -> Path:
    model = tiny_model(family, vocab_size=259, **settings)
    if family == "deepseek_v3":  # a bias that the router never overcomes: nothing reaches expert 5
        for layer in (1, 2):
            model.get_submodule(f"model.layers.{layer}.mlp.gate").e_score_correction_bias[5] = -1e9
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: save_checkpoint(folder / name, name) for name in ("deepseek_v2", "deepseek_v3", "qwen3_moe")}


def quick_settings(checkpoints: dict[str, Path], folder: Path, rows: Any) -> Callable[..., TrainConfig]:
    """What makes settings for a quick training on rows in a folder; options replace the quick ones."""
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")

    def make(family: str = "deepseek_v2", **options: Any) -> TrainConfig:
        quick = {
            "data": folder / "rows.json",
            "experts": None if options.get("attention") else "L1E0,L1E2,L2E3",
            "out": folder / "out",
            "r": 4,
            "alpha": 8,
            "dropout": 0.0,
            "learning_rate": 0.01,
            "epochs": 2,
            "batch_size": 2,
            "device": "cpu",
        }
        return TrainConfig(model=str(checkpoints[family]), **{**quick, **options})

    return make


@pytest.fixture
def config(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[..., TrainConfig]:
    return quick_settings(checkpoints, tmp_path, ROWS)


def brute_force_loss(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean over all rows' response tokens of -log p(token | everything before), a token at a time, nothing padded."""
    losses = []
    for fields in ROWS:
        prompt = [BOS, *ids(f"Question: {fields['question']}\nAnswer:")]
        learnt = [*ids(f" {fields['explain']} The answer is {fields['answer']}."), EOS]
        for end, token in enumerate(learnt):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + learnt[:end]]), use_cache=False).logits[0, -1]
            losses.append(-F.log_softmax(logits.double(), -1)[token])
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe"])  # qwen3_moe asks for a router loss besides
def test_the_first_loss_is_that_of_the_responses_alone(config: Any, family: str) -> None:
    expected = brute_force_loss(tiny_model(family, vocab_size=259), byte_tokenizer())
    assert expected > 3
    whole = train.run(config(family, batch_size=8, epochs=3))
    assert whole["loss"][0] == (1, pytest.approx(expected, rel=1e-5))
    assert [step for step, _ in whole["loss"]] == [1, 2, 3]
    parts = train.run(config(family, batch_size=2, accumulation=3, epochs=3, overwrite=True))
    assert parts["loss"][0] == (1, pytest.approx(expected, rel=1e-5))
    assert parts["loss"][2][1] < expected


def test_what_training_writes_and_returns(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(dropout=0.1)
    result = train.run(settings)
    assert capsys.readouterr().out == ""  # standard output is for results
    out = settings.out
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "manifest.json", "recipe.yaml", "training.json"]
    assert sorted(path.name for path in (out / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "prompt.json",
        "recipe.yaml",
    ]
    written = json.loads((out / "training.json").read_text())
    assert {"out": str(out), **written} == json.loads(json.dumps(result))
    assert written["experts"] == ["L1E0", "L1E2", "L2E3"]
    assert written["rows"] == 5
    tokenizer = byte_tokenizer()
    assert written["tokens"] == sum(
        len(tokenizer(sft_data.prompt(r["question"]) + sft_data.response(r["explain"], r["answer"])).input_ids) + 1
        for r in ROWS
    )
    assert written["trainable_parameters"] == 3 * 4 * 3 * (32 + 24)
    assert len(written["loss"]) == 6  # 3 batches of up to 2 rows, twice
    adapted = lora.load_adapter(tiny_model("deepseek_v2", vocab_size=259), out / "adapter")
    rows = [torch.tensor(e.input_ids) for e in encode(read_rows(settings.data), tokenizer, max_length=1024, file=out)]
    effect = adapter_effect(adapted, rows)
    assert (effect.max_logit_change, effect.kl) == (written["max_logit_change"], written["kl"])
    assert effect.max_logit_change > 1e-3
    fields = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == settings.model
    assert fields["experts"] == {"model.layers.1.mlp.experts": [0, 2], "model.layers.2.mlp.experts": [3]}
    card = (out / "adapter" / "README.md").read_text()
    assert "# LoRA on experts L1E0, L1E2, L2E3 of " in card
    assert hashlib.sha256(settings.data.read_bytes()).hexdigest() in card
    assert f"| loss of the last step | {written['loss'][-1][1]:.4f} |" in card
    assert all(f"| {name} | {count:,} |" in card for name, count in written["exposure"].items())
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "rows.json"]  # checkpoints are gone


def test_a_model_that_is_handed_in_comes_back_as_it_was(config: Any, tmp_path: Path) -> None:
    model, tokenizer = tiny_model("qwen3_moe", vocab_size=259), byte_tokenizer()
    next(model.parameters()).requires_grad_(False)
    model.get_submodule("model.layers.1").train()

    def state() -> Any:
        return (
            sorted(vars(model)),
            model.config.to_dict(),
            model.generation_config.to_dict(),
            [
                (name, type(module), module.training, len(module._forward_pre_hooks))
                for name, module in model.named_modules()
            ],
            [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()],
        )

    before, weights = copy.deepcopy(state()), {n: t.clone() for n, t in model.state_dict().items()}
    one = train.train(config("qwen3_moe", out=tmp_path / "one"), load=lambda *_, **__: model, tokenizer=tokenizer)
    assert state() == before
    train.train(
        config("qwen3_moe", out=tmp_path / "two", attention=True), load=lambda *_, **__: model, tokenizer=tokenizer
    )
    assert state() == before
    again = train.train(config("qwen3_moe", out=tmp_path / "three"), load=lambda *_, **__: model, tokenizer=tokenizer)
    fresh = train.run(config("qwen3_moe", out=tmp_path / "four"))
    assert one["loss"] == again["loss"] == fresh["loss"]
    with pytest.raises(EffectError):
        train.train(
            config("qwen3_moe", out=tmp_path / "five", learning_rate=1e-30),
            load=lambda *_, **__: model,
            tokenizer=tokenizer,
        )
    assert state() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


CARD = """\
---
library_name: peft
base_model: OWNER/NAME
tags:
- lora
- superexperts
---

# LoRA on experts L2E54, L3E38 and attention of OWNER/NAME

- rank 8, alpha 12, dropout 0.1, rsLoRA
- ranks L2E54=4
- alphas L3E38=2
- projections gate,down
- 3 epochs at a learning rate of 0.002, 6 sequences a step and process, seed 5
- prompt: chat

`recipe.yaml` holds every setting: `superexperts train --recipe recipe.yaml` trains it again.

| data | SHA-256 |
| --- | --- |
| rows.json | `abc` |
| aside.json | `def` |

| | |
| --- | --- |
| rows | 1,234 |
| tokens of one epoch | 56,789 |
| trainable parameters | 1,024 |
| loss of the first step | 2.5000 |
| loss of the last step | 1.2500 |
| loss on rows set aside | 1.5000 |
| adapter of step | 20 |
| largest change of a logit | 0.125 |
| KL of the next token | 0.0123 nats |

| expert | training tokens that it saw |
| --- | --- |
| L2E54 | 1,000 |
| L3E38 | 7 |

Load with `superexperts.adapters.lora.load_adapter(model, folder)`, or `superexperts export` it.
"""


def test_the_card_names_experts_data_settings_and_measurements() -> None:
    config = TrainConfig(
        model="OWNER/NAME", data=Path("rows.json"), eval_data=Path("aside.json"), experts="L2E54,L3E38", attention=True,
        r=8, alpha=12, dropout=0.1, rslora=True, ranks="L2E54=4", alphas="L3E38=2", projections="gate,down", epochs=3,
        learning_rate=2e-3, batch_size=2, accumulation=3, seed=5, prompt="chat",
    )  # fmt: skip
    result = {
        "experts": ["L2E54", "L3E38"], "rows": 1234, "tokens": 56789, "trainable_parameters": 1024, "kept_step": 20,
        "loss": [(1, 2.5), (30, 1.25)], "eval_loss": [(10, 2.0), (20, 1.5), (30, 1.75)], "max_logit_change": 0.125,
        "kl": 0.01234, "exposure": {"L2E54": 1000, "L3E38": 7},
    }  # fmt: skip
    assert card.model_card(vars(config), result, {"rows.json": "abc", "aside.json": "def"}) == CARD
    plain = dataclasses.replace(config, model="pocket", experts=None, eval_data=None, ranks="", alphas="")
    text = card.model_card(
        vars(plain), {**result, "experts": None, "eval_loss": [], "exposure": {}}, {"rows.json": "abc"}
    )
    assert "# LoRA on attention of pocket" in text
    assert not [word for word in ("base_model", "projections", "load_adapter", "set aside", "L2E54") if word in text]


def test_what_is_written_must_be_what_was_trained(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(tmp_path.iterdir())
    save = PeftModel.save_pretrained

    def forgetful(self: Any, folder: str, state_dict: dict[str, torch.Tensor], **more: Any) -> None:
        save(self, folder, state_dict={name: x for name, x in state_dict.items() if "2_up_proj" not in name}, **more)

    monkeypatch.setattr(PeftModel, "save_pretrained", forgetful)
    with pytest.raises(DataError, match=r"out: 2 weights of .* are missing \(.*2_up_proj"):
        train.run(config(epochs=1, checkpoint_steps=0))
    assert sorted(tmp_path.iterdir()) == before


def test_a_seed_gives_one_adapter(config: Any, tmp_path: Path) -> None:
    def adapter(name: str, **options: Any) -> bytes:
        torch.rand(len(name))  # the global generator's state must not matter
        train.run(config(out=tmp_path / name, dropout=0.2, **options))
        return (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()

    assert adapter("a") == adapter("bc")
    assert adapter("a") != adapter("def", seed=1)


def test_the_learning_rate_rises_and_falls_as_a_cosine(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def note(self: Any, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        (group,) = (group for group in optimizer.param_groups if group["params"])
        assert (type(optimizer.optimizer).__name__, group["weight_decay"], args.max_grad_norm) == ("AdamW", 0, 1)
        rates.append(group["lr"])

    monkeypatch.setattr(loop._Keeper, "on_pre_optimizer_step", note)
    train.run(config(warmup=0.25, epochs=4))
    peak, rising, steps = 0.01, 3, 12
    falling = [peak * (1 + math.cos(math.pi * step / (steps - rising))) / 2 for step in range(steps - rising)]
    assert rates == pytest.approx([peak * step / rising for step in range(rising)] + falling)


def test_trl_by_itself_trains_the_layer(config: Any, tmp_path: Path) -> None:
    """TRL's own way to ask for an adapter: a configuration, here ours, beside the model."""
    model = tiny_model("qwen3_moe", vocab_size=259)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = find_banks(model)[1].path
    rows = encode(read_rows(config().data), byte_tokenizer(), max_length=1024, file=tmp_path)
    settings = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=2,
        learning_rate=0.01,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        activation_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    columns = {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    adapter = ExpertLoraConfig(r=2, lora_alpha=4, target_modules=[path], experts={path: [0, 1]}, task_type="CAUSAL_LM")
    with lora.quiet():
        trainer = SFTTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_dict(columns),
            processing_class=byte_tokenizer(),
            peft_config=adapter,
        )
        trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    found = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert len(found) == 2 * 3 * 2
    assert all(tensor.any() for tensor in found.values())
    again = lora.load_adapter(tiny_model("qwen3_moe", vocab_size=259), tmp_path / "saved")
    ids_BL = torch.tensor([rows[0].input_ids])
    trained = trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids_BL).logits, trained(input_ids=ids_BL).logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.unload().state_dict().items())


def test_adapters_on_other_parts_see_the_same_rows_in_the_same_order(config: Any, tmp_path: Path) -> None:
    seen: dict[str, list[list[list[int]]]] = {"experts": [], "attention": []}
    for name, options in (("experts", {}), ("attention", {"attention": True, "r": 2})):
        model = tiny_model("deepseek_v2", vocab_size=259)

        def note(module: nn.Module, arguments: Any, name: str = name) -> None:
            if module.training and torch.is_grad_enabled():
                seen[name].append(arguments[0].tolist())

        model.get_input_embeddings().register_forward_pre_hook(note)  # type: ignore[operator]
        train.train(
            config(out=tmp_path / name, **options), load=lambda *_, m=model, **__: m, tokenizer=byte_tokenizer()
        )  # type: ignore[misc]
    assert len(seen["experts"]) == 6
    assert seen["experts"] == seen["attention"]
    assert seen["experts"][:3] != seen["experts"][3:]  # another order in the second epoch


def test_attention(config: Any) -> None:
    result = train.run(config(attention=True))
    assert result["experts"] is None
    assert result["max_logit_change"] > 1e-3
    # q (4 heads of 16), latent kv with the rotary key (16 + 8), kv_b (4 heads of 8 + 8), o; three layers
    inside = 4 * ((32 + 64) + (32 + 24) + (16 + 64) + (32 + 32))
    assert result["trainable_parameters"] == 3 * inside
    names = load_file(Path(result["out"]) / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[6] for name in names} == {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}


def test_done_work_is_not_done_again_and_changed_work_is(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    train_loop = loop.train_loop

    def counted(adapted: Any, tokenizer: Any, examples: Any, held_out: Any, settings: Any, *more: Any) -> Any:
        calls.append(settings.learning_rate)
        return train_loop(adapted, tokenizer, examples, held_out, settings, *more)

    monkeypatch.setattr(loop, "train_loop", counted)
    first = train.run(config())
    second = train.run(config())
    assert calls == [0.01]
    assert json.loads(json.dumps(second)) == json.loads(json.dumps(first))
    finished = fingerprint(config().out)
    with pytest.raises(OutputError, match="out holds a finished result of `train` with another learning_rate; choose"):
        train.run(config(learning_rate=0.02))
    assert fingerprint(config().out) == finished
    train.run(config(learning_rate=0.02, overwrite=True))
    assert calls == [0.01, 0.02]
    weights = config().out / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    train.run(config(learning_rate=0.02))
    assert calls == [0.01, 0.02, 0.02]
    config().data.write_text(json.dumps(ROWS[:4]), encoding="utf-8")
    assert train.run(config(learning_rate=0.02, overwrite=True))["rows"] == 4
    assert len(calls) == 4


def test_an_adapter_without_effect_is_an_error_and_leaves_nothing(config: Any, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        EffectError, match=r"adapter on L1E5, L2E5 changes no logit of 5 rows of .*rows\.json"
    ) as caught:
        train.run(config("deepseek_v3", experts="L1E5,L2E5", allow_unexposed=True))
    assert caught.value.exit_code == 1
    with pytest.raises(EffectError, match="adapter on attention"):
        train.run(config(attention=True, learning_rate=1e-30))
    assert sorted(tmp_path.iterdir()) == before
    result = train.run(config("deepseek_v3", experts="L1E5,L2E4", allow_unexposed=True))
    assert result["max_logit_change"] > 0
    assert result["exposure"]["L1E5"] == result["probe_experts"]["L1E5"] == 0


def test_an_expert_that_no_training_token_reaches_is_an_error_unless_allowed(config: Any, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    words = r"experts: L1E5 saw none of the [\d,]+ training tokens of .*rows\.json.*allow_unexposed"
    with pytest.raises(ExpertsError, match=words) as caught:
        train.run(config("deepseek_v3", experts="L1E5,L2E4,L2shared"))
    assert (caught.value.exit_code, str(caught.value).count("\n")) == (2, 0)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("batch_size", "epochs"), [(1, 1), (2, 1), (5, 2)])
def test_exposure_is_what_the_router_sends_without_padding(config: Any, batch_size: int, epochs: int) -> None:
    settings = config(
        experts="L1E0,L1E2,L2shared", learning_rate=1e-7, batch_size=batch_size, epochs=epochs, out=config().out
    )
    result = train.run(settings)
    model = tiny_model("deepseek_v2", vocab_size=259)
    expected = {"L1E0": 0, "L1E2": 0, "L2shared": 0}

    def tap(call: BankCall) -> None:
        for one in call.each():
            name = key_name((one.layer, one.expert))
            if name in expected:
                expected[name] += len(one.token_N) * epochs

    examples = encode(read_rows(settings.data), byte_tokenizer(), max_length=1024, file=settings.data)
    with torch.no_grad(), tapped(model, tap):
        for example in examples:
            model(input_ids=torch.tensor([example.input_ids]), use_cache=False)
    assert result["exposure"] == expected
    assert expected["L2shared"] == epochs * result["tokens"]
    assert 0 < expected["L1E0"] < expected["L2shared"]


def test_wrong_input_is_refused_before_any_work(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.json").write_text(json.dumps([*ROWS, {"question": "q", "explain": "e"}]), encoding="utf-8")
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExpertsError, match="L0E1 is not in the model"):
        train.run(config(experts="L0E1"))

    def no_model(*_: Any, **__: Any) -> nn.Module:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(memory, "load_to_train", no_model)
    for options, error, words in (
        ({"data": tmp_path / "none.json"}, DataError, r"data: .*none\.json is not a file"),
        ({"data": tmp_path / "bad.json"}, DataError, r"bad\.json row 6 has no 'answer'"),
        ({"max_length": 60}, DataError, r"rows\.json row \d has \d+ tokens, over max_length 60"),
        ({"out": tmp_path / "file" / "out"}, OutputError, "out: "),
        ({"out": tmp_path / "mine"}, OutputError, "was not made by `train`"),
        ({"experts": "L1"}, ExpertsError, "neither a file nor like"),
    ):
        with pytest.raises(error, match=words):
            train.run(config(**options))
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(OptionError, match="experts: missing; give an expert set, attention, or target"):
        config(experts=None)
