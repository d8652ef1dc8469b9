"""The protocol `loglikelihood`: prompts and results of the harness's own tasks, and log-probabilities by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import datasets
import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import nn
from transformers import PreTrainedTokenizerBase

from superexperts.benchmarks import BENCHMARKS, default_benchmarks
from superexperts.benchmarks.base import FewShot
from superexperts.benchmarks.fewshot import with_examples
from superexperts.benchmarks.loading import load_benchmarks
from superexperts.core.errors import DataError, ModelError, OptionError
from superexperts.core.types import Answer
from superexperts.engines.harness import TransformersModel
from superexperts.evaluation import evaluate
from superexperts.evaluation.ask import ask
from superexperts.evaluation.evaluate import EvaluateConfig
from superexperts.extraction.scores import extract, extract_folder, normalized

TASKS = default_benchmarks()


@pytest.fixture(scope="module")
def answers(model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Path) -> dict[str, list[Answer]]:
    """The pocket model's, to nine items of each benchmark."""
    return ask(
        model,
        tokenizer,
        tasks=TASKS,
        data_dir=data,
        limit=9,
        batch_size=4,
        max_new_tokens=40,
        protocol="loglikelihood",
    )


def _choices(answer: Answer) -> list[str]:
    """What follows the prompt, choice by choice."""
    if answer.task == "boolq":
        return [" no", " yes"]
    return [f" {text if answer.task == 'arc_easy' else label}" for label, text in answer.choices]


def _log_probability(model: nn.Module, tokenizer: PreTrainedTokenizerBase, context: str, choice: str) -> float:
    """Token by token, each with a separate forward pass."""
    ids = tokenizer(context + choice).input_ids
    total, begin = 0.0, len(tokenizer(context).input_ids)
    for end in range(begin, len(ids)):
        with torch.no_grad():
            logits = cast(Any, model)(input_ids=torch.tensor([ids[:end]])).logits[0, -1].double()
        total += float(logits[ids[end]] - torch.logsumexp(logits, 0))
    return total


@pytest.mark.parametrize("task", [task for task in TASKS if task != "gsm8k"])
def test_log_probabilities_are_those_of_a_plain_forward_pass(
    task: str, answers: dict[str, list[Answer]], model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> None:
    for answer in answers[task][:3]:
        assert answer.loglikelihoods is not None
        by_hand = [_log_probability(model, tokenizer, answer.prompt, choice) for choice in _choices(answer)]
        assert [nats for _, nats, _ in answer.loglikelihoods] == pytest.approx(by_hand, abs=1e-4)
        assert [size for *_, size in answer.loglikelihoods] == [len(choice) - 1 for choice in _choices(answer)]
        labels = [label for label, _ in answer.choices] or ["no", "yes"]
        assert answer.response == labels[by_hand.index(max(by_hand))]
        per_character = [nats / (len(choice) - 1) for nats, choice in zip(by_hand, _choices(answer), strict=True)]
        expected = labels[per_character.index(max(per_character))] == answer.gold if BENCHMARKS[task].acc_norm else None
        assert normalized(answer) is expected
        found = extract(answer)
        assert (found.extracted, found.how) == (answer.response, "rule:loglikelihood")
        assert found.correct is (answer.response == answer.gold)


def test_gsm8k_generates_after_five_examples(
    answers: dict[str, list[Answer]], model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> None:
    for answer in answers["gsm8k"]:
        assert answer.loglikelihoods is None
        assert answer.prompt.count("Question: ") == 6
        assert answer.prompt.count("#### ") == 5
        assert "\n" not in answer.question  # what extraction takes for the question is not the examples
        assert answer.prompt.endswith(f"Question: {answer.question}\nAnswer:")
    first = answers["gsm8k"][0]
    ids = tokenizer(first.prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = cast(Any, model).generate(input_ids=ids, max_new_tokens=40, do_sample=False)
    assert first.response == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("Question:")[0]


def _few_shot(task: str) -> FewShot:
    found = BENCHMARKS[task].few_shot
    assert found is not None
    return found


def _harness(
    task: str, config: dict[str, Any], lm: Any, count: int, shots: int, folder: str | None = None
) -> dict[str, Any]:
    """The harness's own evaluation of its own task, over rows in its own columns."""
    root = Path(lm_eval.tasks.__file__).parent
    manager = TaskManager(include_path=root / (folder or _few_shot(task).folder), include_defaults=False)
    settings = {**config, "num_fewshot": shots}
    name = config["task"]
    loaded = manager.load({"group": "g", "task": [settings]})
    loaded["tasks"][name].set_fewshot_seed(1234)
    results = lm_eval.evaluate(lm=lm, task_dict=loaded, limit=count, bootstrap_iters=0)
    rows = {row["doc_id"]: row for row in results["samples"][name]}  # GSM8K's are there once for each of two filters
    return {"samples": [rows[i] for i in sorted(rows)], **results["results"][name]}


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(("task", "shots"), [("arc_easy", 3), ("boolq", 2), ("medqa", 2), ("gsm8k", 5), ("mmlu", 5)])
def test_it_is_what_the_harness_itself_does(
    task: str, shots: int, data: Path, tmp_path: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Prompts, examples, log-probabilities, acc and acc_norm; the harness asks its first 7, we ask the same ones."""
    stem = {"boolq": "boolq_validation", "medqa": "medqa_gbaker_test"}.get(task, f"{task}_test")
    stem = {"gsm8k": "gsm8k_main_test", "mmlu": "mmlu_all_test"}.get(task, stem)
    rows, shown = ([*_rows(data / f"{name}.jsonl")] for name in (stem, BENCHMARKS[task].examples_file))
    config: dict[str, Any] = {"task": _few_shot(task).task if task != "mmlu" else "mmlu_abstract_algebra"}
    if task == "boolq":
        rows, shown = ([{**row, "label": int(row["answer"])} for row in some] for some in (rows, shown))
    elif task == "medqa":
        rows, shown = (
            [
                {"sent1": row["question"], "label": "ABCD".index(row["answer_idx"])}
                | {f"ending{i}": row["options"][label] for i, label in enumerate("ABCD")}
                for row in some
            ]
            for some in (rows, shown)
        )
    elif task == "mmlu":
        subject = rows[0]["subject"]
        rows, shown = ([row for row in some if row["subject"] == subject] for some in (rows, shown))
        for name, some in ((stem, rows), (BENCHMARKS[task].examples_file, shown)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        data, words = tmp_path, subject.replace("_", " ")
        config["description"] = f"The following are multiple choice questions (with answers) about {words}.\n\n"
    asked, examples = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(shown)
    splits = {"test": asked, "validation": asked, "train": examples, "dev": examples}
    config["custom_dataset"] = lambda **_: splits
    if task == "gsm8k":
        settings = {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False, "max_gen_toks": 40}
        config["generation_kwargs"] = settings
    lm = HFLM(pretrained=cast(Any, model), tokenizer=cast(Any, tokenizer), batch_size=7)
    theirs = _harness(task, config, lm, 7, shots, "mmlu/default" if task == "mmlu" else None)
    ours = ask(
        model, tokenizer, tasks=[task], data_dir=data, limit=7, limit_first=True, max_new_tokens=40,
        protocol="loglikelihood",
        num_fewshot=shots,
    )[task]  # fmt: skip
    assert [answer.prompt for answer in ours] == [sample["arguments"][0][0] for sample in theirs["samples"]]
    assert ours[0].num_fewshot == shots
    if task == "gsm8k":
        assert [answer.response for answer in ours] == [sample["resps"][0][0] for sample in theirs["samples"]]
        return
    for answer, sample in zip(ours, theirs["samples"], strict=True):
        nats = [first[0] for first in sample["resps"]]
        assert [value for _, value, _ in answer.loglikelihoods or ()] == pytest.approx([n[0] for n in nats], abs=1e-4)
    assert sum(bool(extract(answer).correct) for answer in ours) / 7 == theirs["acc,none"]
    assert ("acc_norm,none" in theirs) is (BENCHMARKS[task].acc_norm)
    if BENCHMARKS[task].acc_norm:
        assert sum(bool(normalized(answer)) for answer in ours) / 7 == theirs["acc_norm,none"]


def test_examples_do_not_depend_on_what_else_is_asked(data: Path) -> None:
    for task, shots in (("arc_easy", 3), ("boolq", 2)):
        [part] = load_benchmarks([task], data, protocol="loglikelihood", num_fewshot=shots)[task].parts
        whole = [context for _, context in with_examples(part.task, range(40), shots)]
        assert [context for _, context in with_examples(part.task, [3, 17, 39], shots)] == [
            whole[i] for i in (3, 17, 39)
        ]
        assert len({context.split("\n\n")[0] for context in whole}) > 5  # drawn for each item anew


@pytest.mark.parametrize("task", ["gsm8k", "boolq"])
def test_other_examples_make_answers_old(task: str, tmp_path: Path, data: Path) -> None:
    """Also where only the way to GSM8K's answer is another one, or fewer rows are shown."""
    for file in data.glob(f"{task}_*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    [train] = tmp_path.glob("*_train*")
    seen = [load_benchmarks([task], tmp_path, protocol="loglikelihood", num_fewshot=n)[task].sha for n in (2, 3)]
    rows = list(_rows(train))
    rows[-1] |= {"answer": f"Well. {rows[-1]['answer']}"} if task == "gsm8k" else {"answer": not rows[-1]["answer"]}
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen.append(load_benchmarks([task], tmp_path, protocol="loglikelihood", num_fewshot=3)[task].sha)
    assert len(set(seen)) == 3


def test_exact_prompts_of_real_rows(shared_data: Path) -> None:
    """The first rows, word for word: MMLU after its subject's dev rows, VMLU after its own, BoolQ and ARC bare."""
    tasks = ("mmlu", "arc_easy", "boolq", "medqa", "vmlu", "gsm8k")
    benchmarks = load_benchmarks(tasks, shared_data, protocol="loglikelihood")
    said = {}
    for name, benchmark in benchmarks.items():
        part = benchmark.parts[0]
        [(_, said[name])] = with_examples(part.task, [0], part.num_fewshot)
    head = "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    assert said["mmlu"].startswith(
        f"{head}Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.\nA. 0\nB. 1\nC. 2\n"
    )
    assert said["mmlu"].count("\nAnswer: ") == 5
    assert said["mmlu"].endswith(
        "\n\nFind the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.\n"
        "A. 0\nB. 4\nC. 2\nD. 6\nAnswer:"
    )
    assert (
        said["arc_easy"]
        == "Question: Which statement best explains why photosynthesis is the foundation of most food webs?\nAnswer:"
    )
    assert said["boolq"].startswith("All biomass goes through at least some of these steps: it needs to be grown, ")
    assert said["boolq"].endswith("\nQuestion: does ethanol take more energy make that produces?\nAnswer:")
    assert said["medqa"].startswith("Question: A junior orthopaedic surgery resident is completing a carpal tunnel")
    assert "\nA. Disclose the error to the patient and put it in the operative report\nB. " in said["medqa"]
    assert said["vmlu"].startswith("Trả lời câu hỏi trắc nghiệm.\n\nCâu hỏi: ")
    assert said["vmlu"].count("\nĐáp án đúng là: ") == 5
    assert said["vmlu"].endswith("\nĐáp án đúng là:")
    assert said["gsm8k"].count("\n#### ") == 5
    assert len(benchmarks["mmlu"].parts) == 57
    assert len(benchmarks["vmlu"].parts) == 58
    fewest = {part.num_fewshot for part in benchmarks["vmlu"].parts}
    assert fewest == {3, 4, 5}, "subjects with fewer dev rows than five show them all"
    for benchmark in benchmarks.values():  # every item is asked once
        assert sorted(i for part in benchmark.parts for i in part.numbers) == list(range(len(benchmark.items)))


def test_gold_of_the_harness_is_ours(shared_data: Path) -> None:
    """Labels 1-4, choices that begin with their label, gold by index: what the harness calls right is what we do."""
    for name, benchmark in load_benchmarks(
        ("mmlu", "arc_easy", "arc_challenge", "boolq", "medqa", "vmlu"),
        shared_data,
        protocol="loglikelihood",
        num_fewshot=0,
    ).items():
        for part in benchmark.parts:
            task = cast(Any, part.task)
            for number, row in zip(part.numbers, task.eval_docs, strict=True):
                item = benchmark.items[number]
                labels = [label for label, _ in item.choices] or ["no", "yes"]
                assert len(task.doc_to_choice(row)) == len(labels), (name, item.id)
                assert labels[int(task.doc_to_target(row))] == item.gold, (name, item.id)


def _config(out: Path, data: Path, **changes: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {"data_dir": data, "out": out, "limit": 5, "max_new_tokens": 24, "device": "cpu"}
    return EvaluateConfig(**settings | {"protocol": "loglikelihood"} | changes)


def test_a_killed_run_goes_on_and_silence_counts(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"tasks": "arc_easy,mmlu", "limit": 9, "batch_size": 4}
    evaluate.run(_config(tmp_path / "whole", data, **settings))
    evaluate.run(_config(tmp_path / "silent", data, **settings, silence="L1E11,L3E54"))
    stock, asked = TransformersModel._loglikelihood_tokens, 0

    def counted(self: TransformersModel, requests: list[Any], **more: Any) -> Any:
        nonlocal asked
        asked += len(requests)
        if asked > 36:  # nine of arc_easy, four choices each
            raise KeyboardInterrupt
        return stock(self, requests, **more)

    monkeypatch.setattr(TransformersModel, "_loglikelihood_tokens", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(_config(tmp_path / "killed", data, **settings))
    asked = -1000
    evaluate.run(_config(tmp_path / "killed", data, **settings))
    assert asked == -1000 + 36
    for task in ("arc_easy", "mmlu"):
        reported = [
            (tmp_path / name / "answers" / f"{task}.jsonl").read_text() for name in ("whole", "killed", "silent")
        ]
        assert reported[0] == reported[1] != reported[2]
    extract_folder(tmp_path / "whole")
    scores = json.loads((tmp_path / "whole" / "scores.json").read_text())
    assert [row["unparsed"] for row in scores["scores"]] == [0, 0]
    assert [row["task"] for row in scores["normalized"]] == ["arc_easy"]
    assert [row["task"] for row in scores["subjects"]] == ["mmlu"]


def test_what_is_too_long_loses_its_beginning_but_not_its_bos(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asker = TransformersModel(model, tokenizer, 2, 8)
    monkeypatch.setattr(TransformersModel, "max_length", 20)
    context = "one two three four five six seven eight nine ten" * 3
    item = [Instance("loglikelihood", {}, (context, f" {word}"), i) for i, word in enumerate("AB")]
    short = [type(item[0])("loglikelihood", {}, ("one", " A"), 0)]
    [[first, second], _] = asker.choice_loglikelihoods([item, short])
    assert asker.truncated == 1
    ids = tokenizer(f"{context} A").input_ids
    kept = torch.tensor([[tokenizer.bos_token_id, *ids[-20:]]])
    assert kept.shape == (1, 21)
    with torch.no_grad():
        logits = cast(Any, model)(input_ids=kept[:, :-1]).logits[0]
    scored = len(ids) - len(tokenizer(context).input_ids)
    by_hand = sum(float(torch.log_softmax(logits[i].double(), -1)[kept[0, i + 1]]) for i in range(20 - scored, 20))
    assert first == pytest.approx(by_hand, abs=1e-4)
    assert second != first


def test_a_logit_that_is_no_number_stops_it(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        TransformersModel, "_model_call", lambda self, ids, **_: torch.full((*ids.shape, 1536), float("nan"))
    )
    with pytest.raises(ModelError, match="its logits are not finite numbers"):
        ask(model, tokenizer, tasks=["boolq"], data_dir=data, limit=1, max_new_tokens=8, protocol="loglikelihood")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_fewshot": -1}, "num_fewshot: -1 is negative"),
        ({"protocol": "generative", "num_fewshot": 0}, "num_fewshot: 0 does nothing for protocol generative"),
        ({"engine": "api", "base_url": "http://x"}, "protocol: 'loglikelihood' needs engine hf"),
    ],
)
def test_bad_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        _config(Path("x"), Path("y"), **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("task", "shots", "message"),
    [
        ("arc_easy", 999, "num_fewshot: 999 examples are drawn from 999 rows, arc_easy has"),
        ("boolq", 35, "are drawn from 36 rows, boolq has 35"),
        ("mmlu", 6, "num_fewshot: 6 is more than mmlu has of any subject, 5; give fewer"),
    ],
)
def test_too_few_examples(task: str, shots: int, message: str, data: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_benchmarks([task], data, protocol="loglikelihood", num_fewshot=shots)
    assert message in str(caught.value)


def test_examples_that_are_missing_or_wrong(tmp_path: Path, data: Path) -> None:
    for stem in ("mmlu_all_test", "boolq_validation"):
        (tmp_path / f"{stem}.jsonl").write_bytes((data / f"{stem}.jsonl").read_bytes())
    with pytest.raises(DataError, match=r"has no mmlu_all_dev\.jsonl or \.jsonl\.gz, .*num_fewshot 0"):
        load_benchmarks(["mmlu"], tmp_path, protocol="loglikelihood")
    rows = [row for row in _rows(data / "mmlu_all_dev.jsonl") if row["subject"] != "world_flag"]
    (tmp_path / "mmlu_all_dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="mmlu has no examples of subject 'world_flag'"):
        load_benchmarks(["mmlu"], tmp_path, protocol="loglikelihood")
    rows = [{**row, "subject": None} for row in _rows(data / "mmlu_all_test.jsonl")]
    (tmp_path / "mmlu_all_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="mmlu: mmlu-0 has no subject, so its examples cannot be chosen"):
        load_benchmarks(["mmlu"], tmp_path, protocol="loglikelihood")
    (tmp_path / "boolq_train7.jsonl").write_text('{"question": "a", "passage": "b", "answer": null}\n')
    with pytest.raises(DataError, match=r"boolq_train7\.jsonl: boolq: row 1: field 'answer' is missing"):
        load_benchmarks(["boolq"], tmp_path, protocol="loglikelihood", num_fewshot=1)
