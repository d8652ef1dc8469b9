"""Options of training: resume after a kill, rows set aside, packing, cut rows, chat, recipes, accumulation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from superexperts.adapters import lora
from superexperts.adapters.effect import adapter_effect
from superexperts.cli import main
from superexperts.core.errors import DataError, ModelError, OptionError
from superexperts.training import loop, outcome, resume, train
from superexperts.training.rows import IGNORED, encode, read_rows
from superexperts.training.train import TrainConfig, recipe_settings
from tests.support.chats import PARTS
from tests.support.families import tiny_model
from tests.training.test_train import BOS, EOS, ROWS, byte_tokenizer, ids, quick_settings, row, save_checkpoint

EIGHT = [*ROWS, *({**ROWS[0], "question": f"What is {n} + {n}?"} for n in range(3))]
WEIGHTS = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: save_checkpoint(folder / name, name) for name in ("deepseek_v2", "nemotron_h")}


@pytest.fixture
def config(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[..., TrainConfig]:
    return quick_settings(checkpoints, tmp_path, EIGHT)


# ---- resume -------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from superexperts import cli
from superexperts.training import loop
step, moment = int(sys.argv[1]), sys.argv[2]
class Killer(loop._Keeper):
    def on_step_end(self, args, state, control, **kwargs):
        if moment == "step" and state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
    def on_save(self, args, state, control, **kwargs):
        if moment == "saving" and state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        super().on_save(args, state, control, **kwargs)
loop._Keeper = Killer
sys.exit(cli.main(sys.argv[3:]))
"""


def arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    options = ["--r", "4", "--alpha", "8", "--dropout", "0.2", "--learning-rate", "0.01", "--epochs", "3"]
    options += ["--batch-size", "2", "--checkpoint-steps", "3", "--device", "cpu", "--eval-share", "0.2"]
    options += ["--eval-steps", "2", "--patience", "9", "--experts", "L1E0,L1E2,L2E3"]
    return ["train", str(model), "--data", str(data), "--out", str(out), *options, *more]


@pytest.fixture(scope="module")
def uninterrupted(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "rows.json").write_text(json.dumps(EIGHT), encoding="utf-8")
    assert main(arguments(checkpoints["deepseek_v2"], folder / "rows.json", folder / "out")) == 0
    return folder / "out"


@pytest.mark.parametrize(("step", "moment", "from_step"), [(2, "step", None), (8, "step", 6), (6, "saving", 3)])
def test_a_killed_run_goes_on_to_the_same_adapter(
    checkpoints: dict[str, Path], uninterrupted: Path, tmp_path: Path, capsys: Any,
    step: int, moment: str, from_step: int | None,
) -> None:  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(EIGHT), encoding="utf-8")
    killed, scratch = tmp_path / "killed", tmp_path / "scratch"
    scratch.mkdir()
    command = arguments(checkpoints["deepseek_v2"], tmp_path / "rows.json", killed)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(step), moment, *command],
        env={**os.environ, "TMPDIR": str(scratch)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not list(scratch.iterdir())  # a killed process cannot remove its temporary files
    assert not killed.exists()
    assert (tmp_path / ".killed.checkpoints").is_dir()
    capsys.readouterr()
    assert main([*command, "--resume"]) == 0
    said = capsys.readouterr().err
    assert (f"going on from step {from_step}" if from_step else "training starts at the first step") in said
    assert (uninterrupted / WEIGHTS).read_bytes() == (killed / WEIGHTS).read_bytes()
    one, two = (json.loads((folder / "training.json").read_text()) for folder in (uninterrupted, killed))
    assert one == two
    assert len(one["loss"]) == 9
    assert len(one["eval_loss"]) == 5
    assert not list(tmp_path.glob(".killed.*"))


def test_checkpoints_of_other_settings_are_refused_and_left_alone(config: Any, tmp_path: Path) -> None:
    work = tmp_path / ".out.checkpoints"
    work.mkdir()
    (work / "key.json").write_text('"another"')
    with pytest.raises(OptionError, match="resume: the checkpoints in .* belong to other settings"):
        train.run(config(resume=True))
    assert (work / "key.json").is_file()
    train.run(config())  # starts anew
    assert not work.exists()


def test_an_interrupted_run_keeps_its_checkpoints(config: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop._Keeper, "on_step_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run(config(checkpoint_steps=2, out=tmp_path / "new" / "out"))
    monkeypatch.undo()
    assert resume.last_checkpoint(tmp_path / "new" / ".out.checkpoints") is not None
    train.run(config(checkpoint_steps=2, out=tmp_path / "new" / "out", resume=True))
    train.run(config(checkpoint_steps=0, out=tmp_path / "whole"))
    assert (tmp_path / "new" / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_the_lowest_loss_before_an_interruption_is_kept_after_it(config: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == best + 2:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"eval_share": 0.25, "eval_steps": 1, "learning_rate": 0.3, "epochs": 30, "patience": 3}
    whole = train.run(config(out=tmp_path / "whole", checkpoint_steps=0, **options))
    best = whole["kept_step"]
    monkeypatch.setattr(loop._Keeper, "on_step_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.run(config(checkpoint_steps=1, **options))
    monkeypatch.undo()
    assert train.run(config(checkpoint_steps=1, resume=True, **options)) == {**whole, "out": str(tmp_path / "out")}
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("step", [4, None], ids=["in the second epoch", "when all is trained"])
def test_the_loss_of_an_epoch_that_ends_with_a_checkpoint_is_kept(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int | None
) -> None:
    def interrupted(*arguments: Any, **_: Any) -> None:
        if step is None or arguments[2].global_step == step:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"dropout": 0.2, "checkpoint_steps": 3, "eval_share": 0.25, "epochs": 2, "patience": 5}
    whole = train.run(config(out=tmp_path / "whole", **options))
    assert (len(whole["loss"]), [at for at, _ in whole["eval_loss"]]) == (6, [3, 6])
    with monkeypatch.context() as patch:
        if step is None:
            patch.setattr(outcome, "adapter_effect", interrupted)
        else:
            patch.setattr(loop._Keeper, "on_step_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.run(config(**options))
    steps: list[int] = []
    monkeypatch.setattr(
        loop._Keeper, "on_step_end", lambda self, args, state, *_, **__: steps.append(state.global_step)
    )
    assert train.run(config(resume=True, **options)) == {**whole, "out": str(tmp_path / "out")}
    assert steps == ([] if step is None else [4, 5, 6])
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


# ---- rows set aside -----------------------------------------------------------------------------------------------


def test_rows_set_aside_are_not_trained_on_and_the_lowest_loss_is_kept(config: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_share": 0.25, "eval_steps": 1, "learning_rate": 0.3, "epochs": 30}
    result = train.run(config(patience=3, **options))
    assert (result["rows"], result["eval_rows"]) == (6, 2)
    losses = dict(result["eval_loss"])
    best = min(losses, key=lambda step: losses[step])
    assert result["kept_step"] == best
    assert len(result["loss"]) == best + 3  # three evaluations later it stopped
    assert best < 30 * 3 - 3
    adapted = lora.load_adapter(tiny_model("deepseek_v2", vocab_size=259), tmp_path / "out" / "adapter")
    examples = encode(read_rows(tmp_path / "rows.json"), byte_tokenizer(), max_length=1024, file=tmp_path)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    total, count = 0.0, 0
    for number in order[:2]:
        ids_L, labels_L = torch.tensor(examples[number].input_ids), torch.tensor(examples[number].labels)
        with torch.no_grad():
            logp = adapted(input_ids=ids_L[None], use_cache=False).logits[0].double().log_softmax(-1)
        learnt = labels_L[1:] != IGNORED
        total -= float(logp[:-1][learnt].gather(1, labels_L[1:][learnt][:, None]).sum())
        count += int(learnt.sum())
    assert losses[best] == pytest.approx(total / count, rel=1e-5)
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert f"| loss on rows set aside | {losses[best]:.4f} |" in card


def test_the_loss_on_rows_set_aside_does_not_depend_on_the_batch_size(config: Any, tmp_path: Path) -> None:
    """It weighs every response token the same, however long the other rows of its batch are."""
    rows = [row | {"explain": "so " * (1 + 9 * number)} for number, row in enumerate(ROWS[:5])]
    (tmp_path / "other.json").write_text(json.dumps(rows))
    found = []
    for size in (1, 2, 5):
        how: dict[str, Any] = {"batch_size": size, "learning_rate": 1e-4, "epochs": 1, "out": tmp_path / f"out{size}"}
        found.append(train.run(config(eval_data=tmp_path / "other.json", **how))["eval_loss"][-1][1])
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)


def test_rows_of_another_file_are_set_aside(config: Any, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps(ROWS[:2]))
    result = train.run(config(eval_data=tmp_path / "other.json"))
    assert (result["rows"], result["eval_rows"]) == (8, 2)
    assert [step for step, _ in result["eval_loss"]] == [4, 8]  # once an epoch
    assert result["kept_step"] == 8
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(DataError, match=r"eval_data: .*other\.json has no rows"):
        train.run(config(eval_data=tmp_path / "other.json", overwrite=True))


# ---- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "answer", "good"),
    [
        ("Pick.\nA. one\nB. two", "B", True),
        ("Pick.\nA. one\nB. two", "Two.", True),
        ("Pick.\nA) one\nB) two", "B. two", True),
        ("Pick.\nA. one\nB. two", "C", False),
        ("Pick.\nA. one\nB. two", "three", False),
        ("Chọn.\nA. một\nB. hai\n", "ba", False),
        ("A. one\nB. two\nWhich is larger?", "C", True),  # no choices at the end
        ("Name it.\nA. the only line", "C", True),
        ("Order these:\nB. x\nC. y", "A", True),
    ],
)
def test_an_answer_must_be_among_the_choices(tmp_path: Path, question: str, answer: str, good: bool) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([ROWS[0], {"question": question, "explain": "e", "answer": answer}]))
    if good:
        assert read_rows(file)[1].answer == answer
        return
    with pytest.raises(
        DataError, match=r"rows\.json row 2: 'answer' is \".*\", which is neither a letter among"
    ) as caught:
        read_rows(file)
    assert "\n" not in str(caught.value)


def test_long_rows_are_counted_and_cut_off_only_if_asked() -> None:
    rows = [row(number=n, explain="x" * n) for n in (1, 50, 60)]
    (whole, *_) = encode(rows, byte_tokenizer(), max_length=1000, file=Path("f"))
    limit = len(whole.input_ids)
    with pytest.raises(DataError, match=rf"f row 50 has {limit + 49} tokens, over max_length {limit}, and 1 more rows"):
        encode(rows, byte_tokenizer(), max_length=limit, file=Path("f"))
    cut = encode(rows, byte_tokenizer(), max_length=limit, file=Path("f"), truncate=True)
    assert [example.truncated for example in cut] == [False, True, True]
    assert [len(example.input_ids) for example in cut] == [len(example.labels) for example in cut] == [limit] * 3
    assert cut[0].input_ids[-1] == EOS
    assert cut[1].input_ids[-1] == cut[1].labels[-1] == ids("x")[0]
    with pytest.raises(DataError, match=r"row 1: the prompt alone has 33 tokens, which leaves no room"):
        encode(rows[:1], byte_tokenizer(), max_length=33, file=Path("f"), truncate=True)


def test_cut_rows_are_in_the_result(config: Any) -> None:
    assert train.run(config(max_length=70, truncate=True))["truncated"] == 2


CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


def test_a_chat_template_gives_the_prompt_as_the_users_message() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ModelError, match="prompt: 'chat' needs a chat template"):
        encode([row()], tokenizer, max_length=1000, file=Path("f"), chat=True)
    tokenizer.chat_template = CHAT + "{% if add_generation_prompt %}<assistant>{% endif %}"
    (example,) = encode(
        [row(question="1?", explain="x", answer="B")], tokenizer, max_length=1000, file=Path("f"), chat=True
    )
    prompt = [BOS, *ids("<user>Question: 1?\nAnswer:"), EOS, *ids("<assistant>")]
    assert example.input_ids == [*prompt, *ids("x The answer is B."), EOS]
    assert example.labels == [IGNORED] * len(prompt) + [*ids("x The answer is B."), EOS]
    tokenizer.chat_template = PARTS
    (parts,) = encode(
        [row(question="1?", explain="x", answer="B")], tokenizer, max_length=1000, file=Path("f"), chat=True,
        system_prompt="s",
    )  # fmt: skip
    asked = ids("<system>s\n<user>Question: 1?\nAnswer:\n<assistant>")
    assert parts.input_ids == [*asked, *ids("x The answer is B.\n"), EOS]
    assert parts.labels[: len(asked)] == [IGNORED] * len(asked)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{% endfor %}"
    with pytest.raises(ModelError, match="prompt: the chat template leaves out the text of the user's message"):
        encode([row()], tokenizer, max_length=1000, file=Path("f"), chat=True)
    tokenizer.chat_template = "{{ messages | length }}" + CHAT
    with pytest.raises(ModelError, match="whole conversation begins with its prompt"):
        encode([row()], tokenizer, max_length=1000, file=Path("f"), chat=True)


# ---- packing, accumulation, gradient checkpointing ----------------------------------------------------------------


def adapter(config: Any, out: Path, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    result = train.run(config(out=out, **options))
    return load_file(out / WEIGHTS), result


def assert_same_training(one: Any, two: Any, steps: int) -> None:
    """Losses within rounding, weights within what Adam makes of rounding."""
    (weights, result), (other_weights, other) = one, two
    assert [loss for _, loss in result["loss"]] == pytest.approx([loss for _, loss in other["loss"]], rel=1e-4)
    assert len(result["loss"]) == steps
    for name, tensor in weights.items():
        moved = tensor.abs().max()
        assert (tensor - other_weights[name]).abs().max() <= 0.02 * moved, name


def test_eight_passes_of_one_row_equal_one_of_eight(config: Any, tmp_path: Path) -> None:
    one = adapter(config, tmp_path / "1x8", batch_size=1, accumulation=8, epochs=4)
    eight = adapter(config, tmp_path / "8x1", batch_size=8, accumulation=1, epochs=4)
    assert_same_training(one, eight, steps=4)
    assert one[1]["exposure"] == eight[1]["exposure"]


def test_packed_rows_do_not_see_each_other(config: Any, tmp_path: Path) -> None:
    # Everything in one sequence of a step, so that a step has the same rows with and without.
    packed = adapter(config, tmp_path / "packed", batch_size=1, packing=True, epochs=3)
    loose = adapter(config, tmp_path / "loose", batch_size=8, epochs=3)
    assert_same_training(packed, loose, steps=3)
    assert packed[1]["exposure"] == loose[1]["exposure"]
    two = train.run(config(out=tmp_path / "two", batch_size=1, packing=True, max_length=300, epochs=1))
    assert 1 < len(two["loss"]) < 8


def test_packing_is_refused_where_rows_would_see_each_other(config: Any) -> None:
    settings = config("nemotron_h", experts="L1E0", packing=True, allow_unexposed=True)
    with pytest.raises(OptionError, match="packing: rows in one sequence would see each other in nemotron_h"):
        train.run(settings)


def test_checkpointed_activations_train_the_same_and_ask_nothing_of_lower_layers(config: Any, tmp_path: Path) -> None:
    model = tiny_model("deepseek_v2", vocab_size=259)
    calls: dict[int, int] = {}
    needed: dict[int, bool] = {}
    for number, layer in enumerate(model.get_submodule("model.layers")):

        def count(module: Any, inputs: Any, output: Any, number: int = number) -> None:
            if module.training:
                calls[number] = calls.get(number, 0) + 1
                needed[number] = output.requires_grad

        # On a part of the layer, which runs again in the backward pass where the layer is computed anew.
        layer.post_attention_layernorm.register_forward_hook(count)
    options: dict[str, Any] = {"experts": "L1E0,L1E2", "epochs": 1, "batch_size": 4}
    train.train(
        config(out=tmp_path / "less", gradient_checkpointing=True, **options),
        load=lambda *_, **__: model,
        tokenizer=byte_tokenizer(),
    )
    assert calls == {0: 2, 1: 4, 2: 4}  # two steps; layer 0, below the adapter, is never computed again
    assert needed == {0: False, 1: False, 2: True}
    assert not model.is_activation_checkpointing
    train.run(config(out=tmp_path / "more", **options))
    less, more = (load_file(tmp_path / name / WEIGHTS) for name in ("less", "more"))
    assert all(torch.equal(tensor, more[name]) for name, tensor in less.items())


# ---- recipes and what is saved ------------------------------------------------------------------------------------


def test_the_saved_recipe_trains_the_same_adapter_again(config: Any, tmp_path: Path) -> None:
    chosen = "L1E0,L1E2,L2E3"
    first = config(
        experts=chosen, dropout=0.1, ranks="L1E0=2", alphas="L2E3=3.5", projections="gate,down", seed=3, attention=True
    )
    train.run(first)
    recipe = tmp_path / "out" / "recipe.yaml"
    published = (tmp_path / "out" / "adapter" / "recipe.yaml").read_text()
    assert published == recipe.read_text().replace(str(tmp_path / "rows.json"), "rows.json")
    assert yaml.safe_load(recipe.read_text())["experts"] == "L1E0,L1E2,L2E3"
    again = tmp_path / "again"
    assert main(["train", "--recipe", str(recipe), "--out", str(again), "--device", "cpu"]) == 0
    assert (again / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    other = tmp_path / "other"
    assert main(["train", "--recipe", str(recipe), "--out", str(other), "--seed", "4", "--device", "cpu"]) == 0
    assert (other / WEIGHTS).read_bytes() != (again / WEIGHTS).read_bytes()
    assert yaml.safe_load((other / "recipe.yaml").read_text())["seed"] == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("r: [", "line 1: not valid YAML: "),
        ("- r", "is not a mapping of settings"),
        ("rank: 16", "'rank' is not a setting of a recipe; did you mean 'ranks'?"),
        ("trust_remote_code: true", "'trust_remote_code' is not a setting of a recipe"),
        ("prompt: neither", "prompt: 'neither' is unknown; choose from auto, plain, chat"),
        ("r: many", "r: 'many' is not a whole number"),
        ("r: true", "r: True is not a whole number"),
        ("attention: 1", "attention: 1 is not true or false"),
        ("r: 0\nattention: true", "--r: 0 is not positive"),
    ],
)
def test_a_wrong_recipe_is_one_line(text: str, said: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["train", "--recipe", str(tmp_path / "recipe.yaml"), "--data", "x.json"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("learning_rate: 1e-4\nalpha: 8\neval_data: null\ndata: x.json\n")
    settings = recipe_settings(tmp_path / "recipe.yaml")
    assert settings == {"learning_rate": 1e-4, "alpha": 8, "eval_data": None, "data": Path("x.json")}


def test_shipped_recipes_can_be_read() -> None:
    recipes = sorted((Path(__file__).parents[2] / "recipes" / "train").glob("*.yaml"))
    assert len(recipes) >= 4
    for recipe in recipes:
        settings = {"data": Path("x.json"), **recipe_settings(recipe)}
        if not {"experts", "attention", "target"} & settings.keys():
            settings["experts"] = "L1E0"  # a recipe for any model leaves its experts to the command line
        TrainConfig(**settings)


def test_a_saved_adapter_in_bfloat16_is_the_one_that_was_measured(config: Any, tmp_path: Path) -> None:
    result = train.run(config(adapter_dtype="bfloat16"))
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
    adapted = lora.load_adapter(tiny_model("deepseek_v2", vocab_size=259), tmp_path / "out" / "adapter")
    examples = encode(read_rows(tmp_path / "rows.json"), byte_tokenizer(), max_length=1024, file=tmp_path)
    effect = adapter_effect(adapted, [torch.tensor(example.input_ids) for example in examples])
    assert (effect.max_logit_change, effect.kl) == (result["max_logit_change"], result["kl"])


def test_tensorboard_files_lie_in_the_folder(config: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train.run(config(report_to="tensorboard"))
    assert list((tmp_path / "out" / "logs").rglob("events.*"))


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
def test_every_loss_goes_to_the_tracker_that_was_asked_for(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    """The packages are stood in for: none of them is needed here, and two would want an account."""
    logged: list[float] = []
    folders: list[Path] = []

    class Callback(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logged.extend(value for name, value in logs.items() if name == "loss")

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            folders.append(Path(folder))
            folders[0].mkdir(parents=True)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            logged.extend([value] if name == "train/loss" else [])

        def add_text(self, *_: Any) -> None: ...

        add_hparams = flush = close = add_text

    there = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name))
    monkeypatch.setattr("superexperts.training.checks.importlib", there)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    for name in ("wandb", "trackio"):
        other = Callback if name == tracker else TrainerCallback
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, name, other)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    result = train.run(config(report_to=tracker, epochs=1))
    assert logged == [loss for _, loss in result["loss"]]
    assert len(logged) == 4
    assert (tmp_path / "out" / "logs").is_dir() == (tracker == "tensorboard") == bool(folders)
    logged.clear()
    train.run(config(epochs=1, out=tmp_path / "silent"))
    assert not logged


def test_what_a_tracker_prints_is_not_among_the_results(config: Any, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(loop._Keeper, "on_train_begin", lambda *_, **__: print("at example.org"))
    train.run(config(epochs=1))
    said = capsys.readouterr()
    assert "at example.org" in said.err
    assert said.out == ""


def test_other_processes_checkpoints_are_refused_and_kept(config: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop._Keeper, "on_train_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.run(config(checkpoint_steps=2))
    monkeypatch.undo()
    checkpoint = resume.last_checkpoint(tmp_path / ".out.checkpoints")
    assert checkpoint is not None
    kept = json.loads((checkpoint / resume.COMPLETE).read_text())
    (checkpoint / resume.COMPLETE).write_text(json.dumps({**kept, "processes": 4}))
    with pytest.raises(DataError, match=r"resume: .* was written by 4 processes, now there are 1; start as many"):
        train.run(config(checkpoint_steps=2, resume=True))
    assert (checkpoint / resume.COMPLETE).is_file()


def test_a_tracker_that_is_not_installed_is_named(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="report_to: 'wandb' is not installed; run pip install wandb"):
        config(report_to="wandb")


def test_there_must_be_something_to_resume(config: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="resume: nothing to resume: no unfinished training into out .* was found"):
        train.run(config(resume=True))
    assert not (tmp_path / "out").exists()
    train.run(config())
    assert train.run(config(resume=True)) == train.run(config())  # finished meanwhile: nothing to do
    with pytest.raises(OptionError, match="resume: nothing to resume"):
        train.run(config(resume=True, overwrite=True, seed=7))
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_a_systems_message_needs_a_chat(config: Any) -> None:
    with pytest.raises(OptionError, match="system_prompt: 'Be short.' does nothing with prompt plain; leave it out"):
        train.run(config(prompt="plain", system_prompt="Be short."))


def test_a_recipe_that_is_not_yaml_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("r: 4\nalpha: [1\n")
    with pytest.raises(OptionError, match=r"recipe\.yaml: line 3: not valid YAML: .*; correct the file") as caught:
        train.recipe_settings(tmp_path / "recipe.yaml")
    assert "\n" not in str(caught.value)
