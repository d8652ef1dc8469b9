"""Asking through the harness: BOS, batches, adapters, what is written, and when nothing is done again."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from superexperts.adapters.lora import attach_attention
from superexperts.benchmarks import default_benchmarks
from superexperts.checkpoints.source import resolve
from superexperts.core.errors import DataError, ExpertsError, OptionError, OutputError
from superexperts.core.types import Answer
from superexperts.data.corpora import documents
from superexperts.data.packing import pack
from superexperts.engines.harness import TransformersModel
from superexperts.engines.journal import Journal
from superexperts.evaluation import evaluate
from superexperts.evaluation.ask import ask
from superexperts.evaluation.evaluate import EvaluateConfig
from superexperts.evaluation.perplexity import perplexity
from superexperts.extraction.scores import extract_folder
from superexperts.models.loading import load_model
from superexperts.surgery import prune
from superexperts.surgery.prune import PruneConfig

TASKS = default_benchmarks()

NEW_TOKENS = 24


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_batched_answers_equal_plain_greedy_generation_one_by_one(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Path
) -> None:
    found = ask(model, tokenizer, tasks=["gsm8k", "boolq"], data_dir=data, limit=7, limit_first=True, batch_size=4,
                max_new_tokens=24)  # fmt: skip
    assert list(found) == ["gsm8k", "boolq"]
    for task, answers in found.items():
        assert [answer.id for answer in answers] == [f"{task}-{index}" for index in range(7)]
        for answer in answers:
            ids = tokenizer(answer.prompt, return_tensors="pt").input_ids
            assert (ids == tokenizer.bos_token_id).sum() == 1
            with torch.no_grad():
                out = cast(Any, model).generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False)
            alone = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            assert answer.response == alone.split("\nQuestion:")[0]


def test_one_bos_in_front_even_where_the_beginning_is_cut(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    asker = TransformersModel(model, tokenizer, 2, NEW_TOKENS)
    texts = ["Question: one two three four five six seven eight nine ten\nAnswer:", "Question: one\nAnswer:"]
    ids_BL, mask_BL = asker.tok_batch_encode(texts)
    assert ((ids_BL == tokenizer.bos_token_id).sum(1) == 1).all()
    whole = ids_BL[0, mask_BL[0] == 1]
    assert whole[0] == tokenizer.bos_token_id
    room = len(whole) - 3
    cut_BL, cut_mask_BL = asker.tok_batch_encode(texts, left_truncate_len=room)
    assert cut_BL.shape == (2, room)
    assert cut_BL[0].tolist() == [tokenizer.bos_token_id, *whole[4:].tolist()]
    assert cut_BL[1, cut_mask_BL[1] == 1].tolist() == ids_BL[1, mask_BL[1] == 1].tolist()


def test_stops_at_a_new_question(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    """The response ends before the next question, and the harness's generation is greedy whatever the seed."""

    def say(*, input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        assert settings["do_sample"] is False
        said = tokenizer(" B\nQuestion: Which?\nAnswer: C", add_special_tokens=False, return_tensors="pt").input_ids
        return torch.cat([input_ids, said.expand(len(input_ids), -1)], 1)

    monkeypatch.setattr(model, "generate", say)
    answers = ask(model, tokenizer, tasks=["mmlu"], data_dir=data, limit=3, max_new_tokens=NEW_TOKENS)["mmlu"]
    assert [answer.response for answer in answers] == [" B"] * 3


def test_an_adapter_is_asked_the_same_way(tokenizer: PreTrainedTokenizerBase, data: Path) -> None:
    """A fresh LoRA changes no answer; one with weights does."""
    model = load_model(resolve("pocket"), device="cpu", dtype="float32")

    def responses(asked: nn.Module) -> list[str]:
        found = ask(asked, tokenizer, tasks=["arc_easy"], data_dir=data, limit=6, max_new_tokens=NEW_TOKENS)
        return [answer.response for answer in found["arc_easy"]]

    base = responses(model)
    torch.manual_seed(0)
    adapted = attach_attention(model, r=2, alpha=4, dropout=0.0, seed=0).eval()
    assert responses(adapted) == base
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert responses(adapted) != base


def _config(out: Path, data: Path, **changes: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {
        "data_dir": data,
        "out": out,
        "limit": 3,
        "max_new_tokens": NEW_TOKENS,
        "device": "cpu",
        "perplexity": "pocket",
    }
    return EvaluateConfig(**settings | changes)


def test_run_writes_answers_and_does_no_work_twice(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = _config(tmp_path / "run", data)
    first = evaluate.run(config)
    assert first["tasks"] == dict.fromkeys(TASKS, 3)
    assert first["truncated"] == 0
    for task in TASKS:
        lines = (tmp_path / "run" / "answers" / f"{task}.jsonl").read_text().splitlines()
        answers = [Answer.from_json(json.loads(line)) for line in lines]
        assert [(answer.task, answer.variant, answer.seed) for answer in answers] == [(task, "base", 0)] * 3
    ids_BL = pack(documents("pocket"), tokenizer, corpus="pocket", tokens=16384, seq_len=512)
    assert first["perplexity"] == pytest.approx(perplexity(model, ids_BL), rel=1e-6)
    assert not list((tmp_path / "run" / "answers").glob(".*"))

    monkeypatch.setattr(
        "superexperts.models.loading.load_model", lambda *_, **__: pytest.fail("the model was loaded again")
    )
    assert evaluate.run(config) == first
    with pytest.raises(pytest.fail.Exception, match="loaded again"):  # another question of the same number
        evaluate.run(_config(tmp_path / "run", data, limit=2, overwrite=True))


def test_perplexity_in_reference_windows_is_the_paper_codes(
    tmp_path: Path, data: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> None:
    """exp of the mean over the windows of their mean cross-entropy, a window at a time."""
    rows = [text for text, _ in zip(documents("pocket"), range(12), strict=False)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    settings: dict[str, Any] = {"tasks": "boolq", "limit": 1, "perplexity": str(tmp_path / "a.jsonl"), "seq_len": 64}
    found = evaluate.run(_config(tmp_path / "run", data, reference_windows=True, **settings))
    ids = tokenizer("\n\n".join(rows)).input_ids
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - 63, 64):
            window = torch.tensor(ids[start : start + 64])
            logits = model(window[None]).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    reported = json.loads((tmp_path / "run" / "perplexity.json").read_text())
    assert (reported["tokens"], reported["seq_len"], reported["reference_windows"]) == (64 * len(losses), 64, True)
    packed = evaluate.run(_config(tmp_path / "run", data, tokens=512, **settings))
    assert packed["perplexity"] != pytest.approx(found["perplexity"], rel=1e-3)


@pytest.mark.parametrize("reference_windows", [False, True])
def test_perplexity_of_a_column_of_ones_own(reference_windows: bool, tmp_path: Path, data: Path) -> None:
    """The same text in the usual column and in another one; a file that has changed is measured anew."""
    rows = [text for text, _ in zip(documents("pocket"), range(24), strict=False)]
    how: dict[str, Any] = {"tasks": "boolq", "limit": 1, "seq_len": 64}
    if not reference_windows:
        how["tokens"] = 512
    found = []
    for column, name, texts in ((None, "text", rows[:12]), ("body", "body", rows[:12]), ("body", "body", rows[12:])):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({name: text}) + "\n" for text in texts))
        more = {"perplexity": str(file), "column": column, "reference_windows": reference_windows}
        found.append(evaluate.run(_config(tmp_path / "run", data, **how, **more))["perplexity"])
    assert found[0] == found[1] != found[2]


def test_silenced_experts_answer_as_the_pruned_checkpoint_does(tmp_path: Path, data: Path) -> None:
    prune.run(PruneConfig(experts="L1E11,L3E54", out=tmp_path / "pruned"))
    settings: dict[str, Any] = {"tasks": "arc_easy,vmlu", "limit": 8}
    base = evaluate.run(_config(tmp_path / "base", data, **settings))
    pruned = evaluate.run(_config(tmp_path / "p", data, model=str(tmp_path / "pruned"), **settings))
    silent = evaluate.run(_config(tmp_path / "s", data, silence="L1E11,L3E54", **settings))
    assert silent["perplexity"] == pytest.approx(pruned["perplexity"], rel=1e-5)
    assert silent["perplexity"] > 1.5 * base["perplexity"]
    for task in ("arc_easy", "vmlu"):
        reported = [(tmp_path / name / "answers" / f"{task}.jsonl").read_text() for name in ("p", "s", "base")]
        assert reported[0] == reported[1] != reported[2]


def test_a_killed_run_asks_nothing_twice_and_answers_the_same(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"tasks": "gsm8k,boolq", "limit": 10, "batch_size": 4, "perplexity": None}
    evaluate.run(_config(tmp_path / "whole", data, **settings))
    generate, asked = TransformersModel._model_generate, 0

    def counted(self: TransformersModel, context: Any, *arguments: Any, **more: Any) -> Any:
        nonlocal asked
        asked += len(context)
        if asked == 18:  # 10 of gsm8k, and the second batch of boolq
            raise KeyboardInterrupt
        return generate(self, context, *arguments, **more)

    monkeypatch.setattr(TransformersModel, "_model_generate", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(_config(tmp_path / "killed", data, **settings))
    with pytest.raises(DataError, match="are not complete; run `evaluate` again"):
        extract_folder(tmp_path / "killed")
    asked = 100
    evaluate.run(_config(tmp_path / "killed", data, **settings))
    assert asked == 106
    assert "14 answers of an earlier run are kept" in capsys.readouterr().err
    whole, killed = (
        {file.name: file.read_bytes() for file in (tmp_path / name / "answers").iterdir()}
        for name in ("whole", "killed")
    )
    assert whole == killed
    assert set(whole) == {"gsm8k.jsonl", "boolq.jsonl"}


def test_another_limit_keeps_no_answer_of_a_killed_run(tmp_path: Path, data: Path, capsys: Any) -> None:
    (tmp_path / "answers").mkdir()
    Journal(tmp_path / "answers" / ".boolq.partial", "of another model").add({"boolq-0": "yes"})
    evaluate.run(_config(tmp_path, data, tasks="boolq", limit=1, perplexity=None))
    answer = json.loads((tmp_path / "answers" / "boolq.jsonl").read_text())
    assert answer["response"] != "yes"
    assert "are kept" not in capsys.readouterr().err


def test_an_earlier_runs_files_are_not_left_behind(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.run(_config(tmp_path, data, tasks="mmlu,boolq", limit=1))
    assert "replaced" not in capsys.readouterr().err
    second = evaluate.run(_config(tmp_path, data, tasks="boolq", limit=1, perplexity=None, overwrite=True))
    assert "evaluate: mmlu: an earlier run asked other questions; its answers are replaced" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "answers").iterdir()] == ["boolq.jsonl"]
    assert second["perplexity"] is None
    assert not (tmp_path / "perplexity.json").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_new_tokens": 2048}, OptionError, "max_new_tokens: 2048 leaves no room"),
        ({"adapter": Path("no/such")}, DataError, "adapter: 'no/such' does not exist"),
        ({"perplexity": "no-such-corpus"}, DataError, "no-such-corpus"),
        ({"silence": "L1E99"}, ExpertsError, "silence: L1E99 is not in the model"),
        ({"silence": "L1E9", "adapter": Path("a")}, OptionError, "silence: 'L1E9' excludes adapter"),
        ({"tokens": 256}, OptionError, "tokens: 256 is less than one sequence (seq_len 512); give at least 512"),
    ],
)
def test_bad_options(tmp_path: Path, data: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        evaluate.run(_config(tmp_path, data, **changes))
    assert message in str(caught.value)
    assert not (tmp_path / "answers").exists()


def test_answers_of_somebody_elses_are_left_alone(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "mmlu.jsonl").write_text("mine")
    monkeypatch.setattr("superexperts.models.loading.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(OutputError, match=r"out: .*mmlu\.jsonl was not written by `evaluate`.*choose another folder"):
        evaluate.run(_config(tmp_path, data, perplexity=None))
    assert (tmp_path / "answers" / "mmlu.jsonl").read_text() == "mine"


def test_unwritable_folder(tmp_path: Path, data: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="out: cannot write"):
        evaluate.run(_config(tmp_path / "file" / "run", data))


def test_bad_rows_stop_it_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"question": "a", "passage": "b", "answer": True}
    (tmp_path / "boolq_validation.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(good | {'answer': None})}\n")
    monkeypatch.setattr("superexperts.models.loading.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(DataError, match=r"boolq_validation\.jsonl: boolq: row 2: field 'answer' is missing"):
        evaluate.run(_config(tmp_path / "out", tmp_path, tasks="boolq", limit=1))


def test_real_rows_go_the_same_way(model: nn.Module, tokenizer: PreTrainedTokenizerBase, shared_data: Path) -> None:
    tasks = (*TASKS, "arc_challenge")
    found = ask(model, tokenizer, tasks=tasks, data_dir=shared_data, limit=2, max_new_tokens=8)
    assert {task: len(answers) for task, answers in found.items()} == dict.fromkeys(tasks, 2)
