"""Questions in a chat: what the model is given, thoughts, budgets, prefilled answers, and adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from superexperts.core.errors import ModelError, OptionError
from superexperts.data.chat import ChatStyle, write_prompt_record
from superexperts.engines.harness import TransformersModel
from superexperts.engines.replies import Request
from superexperts.evaluation import evaluate
from superexperts.evaluation.ask import ask
from superexperts.evaluation.evaluate import EvaluateConfig
from superexperts.training import train
from superexperts.training.train import TrainConfig
from tests.engines.test_engines import answers, served_config
from tests.support import chats
from tests.support.servers import said, scripted_server


def with_template(checkpoint: Path, folder: Path, template: str | None) -> Path:
    """A copy of the checkpoint with this chat template."""
    shutil.copytree(checkpoint, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chatting(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes the tokenizer one with a template, and the model say given texts, the next in each call; returns what it
    was given."""

    def make(model: nn.Module, template: str, *texts: str) -> list[list[int]]:
        given: list[list[int]] = []
        left = list(texts)

        def say(*, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_length: int, **_: Any) -> torch.Tensor:
            given.extend(row[mask == 1].tolist() for row, mask in zip(input_ids, attention_mask, strict=True))
            new = tokenizer(left.pop(0), add_special_tokens=False, return_tensors="pt").input_ids
            new = new[:, : max_length - input_ids.shape[1]]
            return torch.cat([input_ids, new.expand(len(input_ids), -1)], 1)

        monkeypatch.setattr(model, "generate", say)
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return given

    return make


def test_the_template_is_used_with_one_bos(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Path, chatting: Callable[..., Any]
) -> None:
    given = chatting(model, chats.PLAIN, "yes<eos>")
    how: dict[str, Any] = {"tasks": ["boolq"], "data_dir": data, "limit": 1, "max_new_tokens": 8}
    [answer] = ask(model, tokenizer, style=ChatStyle(system_prompt="Be brief."), **how)["boolq"]
    whole = tokenizer.decode(given[0])
    assert whole == f"<bos><system>Be brief.</s><user>{answer.prompt}</s><assistant>"
    assert given[0].count(tokenizer.bos_token_id) == 1
    assert (answer.response, answer.finish_reason) == ("yes", "stop")
    given = chatting(model, chats.PLAIN, "yes<eos>")
    [plain] = ask(model, tokenizer, chat_template="off", **how)["boolq"]
    assert tokenizer.decode(given[0]) == f"<bos>{plain.prompt}"
    # A template that writes no BOS gets none.
    given = chatting(model, chats.QWEN, "yes<eos>")
    ask(model, tokenizer, **how)
    assert tokenizer.bos_token_id not in given[0]


def test_thoughts_that_the_template_opens(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Path, chatting: Callable[..., Any]
) -> None:
    how: dict[str, Any] = {"tasks": ["boolq"], "data_dir": data, "limit": 1}
    chatting(model, chats.OPENS_THOUGHTS, "No?\nQuestion: so?</think>yes<eos>")
    [answer] = ask(model, tokenizer, max_new_tokens=60, **how)["boolq"]
    assert (answer.thoughts, answer.text) == ("No?\nQuestion: so?", "yes")
    chatting(model, chats.OPENS_THOUGHTS, "Yes or no? I say no, but wait")
    [cut] = ask(model, tokenizer, max_new_tokens=4, **how)["boolq"]
    assert (cut.text, cut.finish_reason) == ("", "length")
    assert cut.parts.finished is False


def test_a_stop_text_in_thoughts_lets_the_model_think_on(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Path, chatting: Callable[..., Any]
) -> None:
    """Without a template there are stop texts; the model is asked again without them."""
    given = chatting(
        model, chats.PLAIN, " <think>So.\nQuestion:", " <think>So.\nQuestion: and?</think>yes\nQuestion: more"
    )
    how: dict[str, Any] = {"tasks": ["boolq"], "data_dir": data, "limit": 1, "max_new_tokens": 90}
    [answer] = ask(model, tokenizer, chat_template="off", **how)["boolq"]
    assert given[0] == given[1]
    assert (answer.thoughts, answer.text, answer.finish_reason) == ("So.\nQuestion: and?", "yes", "stop")


def test_a_budget_ends_thoughts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, chatting: Callable[..., Any]
) -> None:
    given = chatting(model, chats.PLAIN, "one two three four five six seven eight nine ten", "yes<eos>")
    asker = TransformersModel(model, tokenizer, 2, 8)
    request = Request(prompt="Is it?<think>\n", max_new_tokens=5, opened=True, thinking_budget=4)
    [reply] = asker.replies([request])
    assert reply.text == "yes"
    assert reply.finish_reason == "stop"
    thoughts = reply.thoughts or ""
    assert "one two three four five six seven eight nine ten".startswith(thoughts)
    assert tokenizer.decode(given[1]).endswith(f"<think>\n{thoughts}\n</think>\n\n")


def test_a_prefilled_answer_is_part_of_the_response(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Path, chatting: Callable[..., Any]
) -> None:
    given = chatting(model, chats.PLAIN, " yes.<eos>")
    style = ChatStyle(prefill="The answer is")
    [answer] = ask(model, tokenizer, tasks=["boolq"], data_dir=data, limit=1, max_new_tokens=9, style=style)["boolq"]
    assert answer.response == "The answer is yes."
    assert tokenizer.decode(given[0]).endswith("<assistant>The answer is")


def config(out: Path, data: Path, model: Path, **changes: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {"tasks": "boolq", "limit": 2, "max_new_tokens": 4, "device": "cpu"}
    return EvaluateConfig(**settings | {"model": str(model), "data_dir": data, "out": out} | changes)


@pytest.mark.parametrize("task", ["boolq", "mmlu"])
def test_log_probabilities_in_a_chat(task: str, tmp_path: Path, data: Path, checkpoint: Path, model: nn.Module) -> None:
    """Examples and question are turns; the choice follows the opening of the assistant's turn."""
    folder = with_template(checkpoint, tmp_path / "model", chats.PLAIN)
    how: dict[str, Any] = {"protocol": "loglikelihood", "num_fewshot": 1, "tasks": task, "limit": 1}
    evaluate.run(config(tmp_path / "out", data, folder, **how))
    [row] = answers(tmp_path / "out")[task]
    sent = json.loads((tmp_path / "out" / "manifest.json").read_text())["prompts"][task]
    assert sent.count("<user>") == 2
    assert sent.count("<assistant>") == 2
    assert sent.startswith("<bos><")
    assert "<bos>" not in row["prompt"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for label, nats, _ in row["loglikelihoods"]:
        ids = tokenizer(f"{sent}{label}", add_special_tokens=False, return_tensors="pt").input_ids
        start = len(tokenizer(sent, add_special_tokens=False).input_ids)
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0].float().log_softmax(-1)
        alone = sum(float(scores[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
        assert nats == pytest.approx(alone, abs=1e-3)


@pytest.mark.parametrize(
    ("template", "changes", "said"),
    [
        (None, {"chat_template": "on"}, "chat_template: 'on' needs a chat template"),
        (None, {"system_prompt": "s"}, "system_prompt: 's' needs a chat; give a model with a chat template"),
        (None, {"chat_template": "off", "thinking": "on"}, "thinking: 'on' needs a chat, but chat_template is off"),
        (chats.PLAIN, {"thinking": "off"}, "thinking: the chat template has no switch for thinking"),
        (chats.RAISES, {"system_prompt": "s"}, r"chat_template: the chat template fails \(System role not supported\)"),
        (
            chats.OPENS_THOUGHTS,
            {"protocol": "loglikelihood"},
            "thinking: missing: the chat template lets",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    template: str | None, changes: dict[str, Any], said: str, tmp_path: Path, data: Path, checkpoint: Path
) -> None:
    folder = with_template(checkpoint, tmp_path / "model", template)
    with pytest.raises((ModelError, OptionError), match=said):
        evaluate.run(config(tmp_path / "out", data, folder, **changes))
    assert not list((tmp_path / "out").glob("answers/*.jsonl"))


def test_an_adapter_trained_in_chat_is_asked_in_chat(tmp_path: Path, data: Path, checkpoint: Path) -> None:
    folder = with_template(checkpoint, tmp_path / "model", chats.PLAIN)
    rows = [{"question": f"What is {i}?", "explain": "It is.", "answer": str(i)} for i in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 2, "learning_rate": 0.01, "device": "cpu", "attention": True}
    trained = TrainConfig(model=str(folder), data=tmp_path / "rows.json", out=tmp_path / "t", **settings)
    train.run(trained)
    how: dict[str, Any] = {"adapter": tmp_path / "t" / "adapter"}
    with pytest.raises(OptionError, match="adapter: .* was trained in chat, but is asked without a chat template"):
        evaluate.run(config(tmp_path / "off", data, folder, chat_template="off", **how))
    evaluate.run(config(tmp_path / "on", data, folder, **how))
    assert json.loads((tmp_path / "on" / "manifest.json").read_text())["chat"] is True
    write_prompt_record(tmp_path / "t" / "adapter", {"schema": "superexperts/prompt/1", "chat": False})
    with pytest.raises(OptionError, match="give chat_template off"):
        evaluate.run(config(tmp_path / "on", data, folder, **how))


def test_a_chat_server_is_sent_what_vllm_takes(tmp_path: Path, data: Path) -> None:
    with scripted_server(lambda *_: said(" yes")) as server:
        how: dict[str, Any] = {"chat_template": "on", "system_prompt": "s", "thinking": "off", "prefill": "It is"}
        settings = served_config(tmp_path, data, server.base_url, tasks="boolq", limit=1, reasoning_effort="low", **how)
        evaluate.run(settings)
    [body] = server.bodies
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant"]
    assert body["reasoning_effort"] == "low"
    assert body["chat_template_kwargs"]["enable_thinking"] is False
    assert (body["add_generation_prompt"], body["continue_final_message"]) == (False, True)
    [row] = answers(tmp_path)["boolq"]
    assert row["response"] == "It is yes"
    sent = json.loads((tmp_path / "manifest.json").read_text())["prompts"]["boolq"]
    assert json.loads(sent) == body["messages"]
    other = served_config(tmp_path, data, f"{server.base_url}/chat/completions", tasks="boolq", chat_template="off")
    with pytest.raises(OptionError, match="chat_template: 'off' does not fit a URL of chat completions"):
        evaluate.run(other)
