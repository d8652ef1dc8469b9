"""Stand-ins for the packages vllm and sglang, which take what those take and run a model by transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.machinery
import importlib.metadata
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

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

    model: Any = None
    """What runs; without it the checkpoint that is given. The harness keeps the classes that it has imported, so there
    is one of each."""

    def __init__(self, folder: str) -> None:
        self.model = self.model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """[L, V] in float32; what the context has no room for is an error, as in both packages."""
        assert 0 < len(ids) < CONTEXT, "no room for a token more"
        ASKED.append(ids)
        with torch.inference_mode():
            logits: torch.Tensor = self.model(input_ids=torch.tensor([ids])).logits[0]
        return logits.float().log_softmax(-1)

    def text(self, ids: list[int], tokens: int, stop: Sequence[str]) -> tuple[str, str]:
        """(text, why it ends)"""
        assert len(ids) + tokens <= CONTEXT, "no room for an answer"
        ASKED.append(ids)
        with torch.inference_mode():
            whole = self.model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
        said: str = self.tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=False)
        cut = min((said.split(end)[0] for end in stop), key=len, default=said)
        return cut, "length" if cut == said and len(whole[0]) == len(ids) + tokens else "stop"


@functools.cache
def vllm_modules() -> dict[str, dict[str, Any]]:
    class LLM(Engine):
        def __init__(self, **settings: Any) -> None:
            BUILT.append(settings)
            super().__init__(settings["model"])
            self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=CONTEXT))

        def generate(self, prompts: Any, *, sampling_params: Any, use_tqdm: bool, lora_request: Any) -> list[Any]:
            assert lora_request is None
            assert not use_tqdm
            return [self.one(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

        def one(self, ids: list[int], how: SamplingParams) -> Any:
            assert how.temperature == 0
            if how.prompt_logprobs is None:
                text, why = self.text(ids, how.max_tokens, how.stop)
                return types.SimpleNamespace(outputs=[types.SimpleNamespace(text=text, finish_reason=why)])
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


@functools.cache
def sglang_modules() -> dict[str, dict[str, Any]]:
    class SglEngine(Engine):
        def __init__(self, **settings: Any) -> None:
            BUILT.append(settings)
            super().__init__(settings["model_path"])
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
            text, why = self.text(ids, how["max_new_tokens"], how["stop"])
            return {"text": text, "meta_info": {"finish_reason": {"type": why}}}

        def scored(self, ids: list[int], start: int) -> Any:
            assert start == 0
            found = self.logprobs(ids)
            logprobs = [(None, ids[0], None), *((float(found[i, t]), t, None) for i, t in enumerate(ids[1:]))]
            return {"meta_info": {"input_token_logprobs": logprobs, "input_top_logprobs": [None] * len(ids)}}

    return {"sglang": {"Engine": SglEngine}}


@contextlib.contextmanager
def installed(name: str, model: nn.Module | None = None) -> Iterator[None]:
    """Within the block the package is there, and runs `model`, or else the checkpoint that it is given."""
    version = importlib.metadata.version
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "model", model)
        for module, values in {"vllm": vllm_modules, "sglang": sglang_modules}[name]().items():
            made = types.ModuleType(module)
            made.__spec__, made.__path__ = importlib.machinery.ModuleSpec(module, None), []
            vars(made).update(values)
            patch.setitem(sys.modules, module, made)
        patch.setattr(importlib.metadata, "version", lambda of: "0.32.0" if of == name else version(of))
        yield
