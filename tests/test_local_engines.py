"""vLLM and SGLang: the harness's classes over stand-ins that take what the packages take, and run the pocket model."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.metadata
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from superexperts import evaluate
from superexperts.errors import OptionError
from test_engines import answers, config

CONTEXT = 256
BUILT: list[dict[str, Any]] = []
ASKED: list[list[int]] = []


@dataclasses.dataclass(kw_only=True)
class SamplingParams:
    """What vLLM's has of that name, and takes."""

    max_tokens: int
    temperature: float
    prompt_logprobs: int | None = None
    stop: Sequence[str] = ()
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True


class Engine:
    """Greedy tokens and log-probabilities by plain forward passes."""

    def __init__(self, model: nn.Module, folder: str) -> None:
        self.model, self.tokenizer = model, AutoTokenizer.from_pretrained(folder)

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[L, V] in float32; what the context has no room for is an error, as in both packages."""
        assert 0 < len(ids) < CONTEXT, "no room for a token more"
        ASKED.append(ids)
        with torch.inference_mode():
            logits: torch.Tensor = self.model(input_ids=torch.tensor([ids])).logits[0]
        return logits.float().log_softmax(-1)

    def text(self, ids: list[int], tokens: int, stop: Sequence[str]) -> str:
        assert len(ids) + tokens <= CONTEXT, "no room for an answer"
        ASKED.append(ids)
        with torch.inference_mode():
            whole = self.model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
        said: str = self.tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=False)
        return min((said.split(end)[0] for end in stop), key=len, default=said)


def vllm_modules(model: nn.Module) -> dict[str, dict[str, Any]]:
    class LLM(Engine):
        def __init__(self, **settings: Any) -> None:
            BUILT.append(settings)
            super().__init__(model, settings["model"])
            self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=CONTEXT))

        def generate(self, prompts: Any, *, sampling_params: Any, use_tqdm: bool, lora_request: Any) -> list[Any]:
            assert lora_request is None
            assert not use_tqdm
            return [self.one(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

        def one(self, ids: list[int], how: SamplingParams) -> Any:
            assert how.temperature == 0
            if how.prompt_logprobs is None:
                text = self.text(ids, how.max_tokens, how.stop)
                return types.SimpleNamespace(outputs=[types.SimpleNamespace(text=text)])
            found = self.logprobs(ids)
            logprobs = [None, *({token: float(found[i, token])} for i, token in enumerate(ids[1:]))]
            return types.SimpleNamespace(prompt_logprobs=logprobs)

    def get_tokenizer(name: str, **_: Any) -> Any:
        return AutoTokenizer.from_pretrained(name)

    return {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams, "TokensPrompt": dict},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": object},
        "vllm.renderers": {},
        "vllm.renderers.hf": {"resolve_chat_template": lambda **_: None},
        "vllm.tokenizers": {"get_tokenizer": get_tokenizer},
    }


def sglang_modules(model: nn.Module) -> dict[str, dict[str, Any]]:
    class SglEngine(Engine):
        def __init__(self, **settings: Any) -> None:
            BUILT.append(settings)
            super().__init__(model, settings["model_path"])
            self.tokenizer_manager = types.SimpleNamespace(tokenizer=self.tokenizer, context_len=CONTEXT)

        def generate(
            self, *, input_ids: Any, sampling_params: Any, return_logprob: bool, top_logprobs_num: int,
            logprob_start_len: int,
        ) -> list[Any]:  # fmt: skip
            return [
                self.scored(ids, logprob_start_len) if return_logprob else self.said(ids, how)
                for ids, how in zip(input_ids, sampling_params, strict=True)
            ]

        def said(self, ids: list[int], how: dict[str, Any]) -> Any:
            assert how["temperature"] == 0
            more = {"temperature", "max_new_tokens", "stop", "skip_special_tokens", "spaces_between_special_tokens"}
            assert set(how) == more
            return {"text": self.text(ids, how["max_new_tokens"], how["stop"])}

        def scored(self, ids: list[int], start: int) -> Any:
            assert start == 0
            found = self.logprobs(ids)
            logprobs = [(None, ids[0], None), *((float(found[i, t]), t, None) for i, t in enumerate(ids[1:]))]
            return {"meta_info": {"input_token_logprobs": logprobs, "input_top_logprobs": [None] * len(ids)}}

    return {"sglang": {"Engine": SglEngine}}


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def engine(request: pytest.FixtureRequest, model: nn.Module) -> Iterator[str]:
    """The name of a package that stands in for the real one."""
    name, version = str(request.param), importlib.metadata.version
    with pytest.MonkeyPatch.context() as patch:
        for module, values in {"vllm": vllm_modules, "sglang": sglang_modules}[name](model).items():
            made = types.ModuleType(module)
            made.__spec__, made.__path__ = importlib.machinery.ModuleSpec(module, None), []
            vars(made).update(values)
            patch.setitem(sys.modules, module, made)
        patch.setattr(importlib.metadata, "version", lambda of: "0.32.0" if of == name else version(of))
        yield name


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    BUILT.clear()
    ASKED.clear()


@pytest.mark.parametrize("protocol", ["generative", "loglikelihood"])
def test_an_engine_answers_as_transformers_does(
    engine: str, protocol: str, tmp_path: Path, data: Path, checkpoint: Path, model: nn.Module
) -> None:
    """Prompts, BOS, stop text, length and log-probabilities; no code from the checkpoint; greedily."""
    how: dict[str, Any] = {"protocol": protocol, "num_fewshot": 1 if protocol == "loglikelihood" else None}
    how |= {"model": str(checkpoint), "limit": 4, "max_new_tokens": 16, "tasks": "gsm8k,boolq,arc_easy"}
    evaluate.run(config(tmp_path / "hf", data, **how))
    evaluate.run(config(tmp_path / engine, data, engine=engine, **how))
    [built] = BUILT
    assert built["trust_remote_code"] is False
    assert {ids[0] for ids in ASKED} == {AutoTokenizer.from_pretrained(checkpoint).bos_token_id}
    wanted, found = answers(tmp_path / "hf"), answers(tmp_path / engine)
    assert list(found) == list(wanted) == ["arc_easy", "boolq", "gsm8k"]
    for task, rows in wanted.items():
        for one, two in zip(rows, found[task], strict=True):
            for (label, nats, length), other in zip(
                one.pop("loglikelihoods", []), two.pop("loglikelihoods", []), strict=True
            ):
                assert other == [label, pytest.approx(nats, abs=1e-3), length]
            assert one == two


@pytest.mark.parametrize("protocol", ["generative", "loglikelihood"])
def test_what_is_too_long_is_cut_behind_bos_and_counted(
    engine: str, protocol: str, tmp_path: Path, data: Path, checkpoint: Path
) -> None:
    lines = (data / "boolq_validation.jsonl").read_text().splitlines()[:2]
    long = lines[0].replace('"passage": "', f'"passage": "{"the gate is open. " * 200}')
    (tmp_path / "boolq_validation.jsonl").write_text(f"{long}\n{lines[1]}\n")
    how: dict[str, Any] = {"protocol": protocol, "engine": engine, "tasks": "boolq", "max_new_tokens": 16}
    said = evaluate.run(config(tmp_path / "out", tmp_path, model=str(checkpoint), limit=2, **how))
    assert said["truncated"] == 1
    bos = AutoTokenizer.from_pretrained(checkpoint).bos_token_id
    assert max(map(len, ASKED)) == (CONTEXT - 16 if protocol == "generative" else CONTEXT - 1)
    assert {ids[0] for ids in ASKED} == {bos}


def test_no_room_for_a_prompt(engine: str, tmp_path: Path, data: Path, checkpoint: Path) -> None:
    with pytest.raises(OptionError, match=r"--max-new-tokens: 256 leaves no room .* of 256 tokens; give less"):
        evaluate.run(config(tmp_path, data, model=str(checkpoint), engine=engine, max_new_tokens=256))
    assert not (tmp_path / "answers").exists()
