"""What answers the prompts: lm-evaluation-harness's own models, with every answer kept as it comes.

`HfAsker` runs a model in this process; `api` asks an OpenAI-compatible server; `vllm` and `sglang` are the harness's.

Shape suffixes: B prompts in a batch, L tokens of the longest one.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import aiohttp
import lm_eval.api.task
import torch
from lm_eval.api.instance import Instance
from lm_eval.models import api_models
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from rich.progress import Progress, TaskID
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .config import EvaluateConfig
from .console import note, stderr
from .corpora import bos_prefix
from .errors import ModelError, OptionError
from .journal import Keeper
from .model import checkpoint_folder

__all__ = ["Asker", "HfAsker", "api", "as_chat", "chat_url", "instances", "open_engine", "quiet", "request_url"]

SYNC_EVERY = 64
"""Answers of a server that may be lost where the machine, and not only the evaluation, goes down."""


class Asker:
    """What `evaluate` needs of a harness model, to be put in front of one: a journal of the answers, and one bar."""

    truncated = 0
    """Prompts whose beginning was cut because the model's context has no room for them."""
    scored_room = 0
    """Tokens of a prompt and a choice after it that are scored, beyond those that the context has."""
    _bar: tuple[Progress, TaskID] | None = None
    _journal: Keeper | None = None

    @contextlib.contextmanager
    def asking(self, description: str, total: int, journal: Keeper | None) -> Iterator[None]:
        """Within the block answers go to the journal and are counted: by a bar, or without a terminal by one line."""
        started = time.monotonic()
        with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
            self._bar, self._journal = (progress, progress.add_task(description, total=total)), journal
            try:
                yield
            finally:
                self._bar = self._journal = None
        if not stderr.is_terminal:
            note(f"{description}: {total} answers in {time.monotonic() - started:.1f} s")

    def _advance(self, answers: int) -> None:
        if self._bar is not None:
            progress, bar = self._bar
            progress.advance(bar, answers)

    def _kept(self) -> dict[int, Any]:
        """The answers of an interrupted run, counted."""
        given = {} if self._journal is None else dict(self._journal.answers)
        self._advance(len(given))
        return given

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As the harness does it, but batch by batch, so that each can be kept."""

        def ask(batch: list[list[Any]]) -> list[Any]:
            return list(cast(Any, super(Asker, self)).generate_until([one for [one] in batch], disable_tqdm=True))

        return self._batch_by_batch([[request] for request in requests], ask)

    def choice_loglikelihoods(self, items: Sequence[list[Any]]) -> list[list[float]]:
        """The log-probability of each choice of each item, in nats; an item is the harness's requests for its choices.

        `ModelError` where one is not a number.
        """

        def ask(batch: list[list[Any]]) -> list[Any]:
            found = iter(cast(Any, self).loglikelihood([one for item in batch for one in item], disable_tqdm=True))
            values = [[float(next(found)[0]) for _ in item] for item in batch]
            if any(math.isnan(value) for item in values for value in item):
                raise ModelError("MODEL: a logit is not a number; try --dtype float32")
            return values

        return self._batch_by_batch(items, ask)

    def _batch_by_batch(self, items: Sequence[list[Any]], ask: Callable[[list[list[Any]]], list[Any]]) -> list[Any]:
        given = self._kept()
        left = [i for i in self._order(items) if i not in given]
        size = int(cast(Any, self).batch_size)
        for start in range(0, len(left), size):
            batch = left[start : start + size]
            new = dict(zip(batch, ask([items[i] for i in batch]), strict=True))
            given |= new
            self._advance(len(batch))
            if self._journal is not None:
                self._journal.add(new)
        return [given[i] for i in range(len(items))]

    def _order(self, items: Sequence[list[Any]]) -> list[int]:
        """Longest first; counts those that are too long."""
        model = cast(Any, self)
        asked = [max((one.args for one in item), key=_characters) for item in items]
        scored = [isinstance(more, str) for _, more in asked]
        texts = [text + more if score else text for (text, more), score in zip(asked, scored, strict=True)]
        longest = [len(ids) for ids in model.tokenizer(texts).input_ids]
        for (_, more), score, length in zip(asked, scored, longest, strict=True):
            room = self.scored_room if score else -more["max_gen_toks"]
            self.truncated += length > model.max_length + room
        return sorted(range(len(items)), key=lambda i: (-longest[i], i))

    def _loglikelihood_tokens(self, requests: list[Any], **more: Any) -> list[tuple[float, bool]]:
        """As the harness does it, but for BOS: what is too long loses its beginning and keeps the sinks' BOS."""
        model, cut = cast(Any, self), []
        bos = model.tokenizer.bos_token_id
        for texts, context, continuation in requests:
            over = len(context) + len(continuation) - model.max_length - self.scored_room
            keep = over > 0 and context[0] == bos and over + 1 < len(context)
            cut.append((texts, [bos, *context[over + 1 :]] if keep else context, continuation))
        return cast(list[tuple[float, bool]], cast(Any, super())._loglikelihood_tokens(cut, **more))

    def check_room(self, max_new_tokens: int) -> None:
        """`OptionError` where no prompt would fit beside so many new tokens."""
        context = cast(Any, self).max_length
        if max_new_tokens >= context:
            raise OptionError(
                f"--max-new-tokens: {max_new_tokens} leaves no room for a prompt in the model's context of "
                f"{context} tokens; give less"
            )


def _characters(arguments: tuple[str, Any]) -> int:
    """Length of a request's context, and of the choice after it if there is one."""
    context, more = arguments
    return len(context) + (len(more) if isinstance(more, str) else 0)


class HfAsker(Asker, HFLM):  # type: ignore[misc]  # the harness is untyped
    """A transformers model in this process. A prompt that is cut keeps its BOS."""

    scored_room = 1  # the last token is not read, only predicted

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int, max_new_tokens: int
    ) -> None:
        with quiet():
            super().__init__(
                pretrained=cast(Any, model),
                tokenizer=cast(Any, tokenizer),
                batch_size=batch_size,
                softmax_dtype="float32",  # in bfloat16 choices would tie
            )
        self.check_room(max_new_tokens)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **more: Any) -> Tensor:
        with torch.inference_mode():
            return cast(Tensor, super()._model_generate(context, max_length, stop, **more))

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Left-padded ids and mask [B, L]. What is too long loses its beginning, but keeps the sinks' BOS."""
        ids_BL, mask_BL = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len is None or ids_BL.shape[1] <= left_truncate_len:
            return ids_BL, mask_BL
        cut_B = mask_BL.sum(1) > left_truncate_len
        first_B = ids_BL.gather(1, mask_BL.argmax(1, keepdim=True))[:, 0]
        ids_BL, mask_BL = ids_BL[:, -left_truncate_len:], mask_BL[:, -left_truncate_len:]
        keep_B = cut_B & (first_B == (-1 if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id))
        ids_BL[keep_B, 0] = first_B[keep_B]
        return ids_BL, mask_BL


class EngineAsker(Asker):
    """vLLM or SGLang in this process, to be put in front of the harness's class. A prompt that is cut keeps its BOS."""

    scored_room = -1  # both make one token more, which is thrown away

    def _model_generate(self, requests: list[list[int]], **more: Any) -> Any:
        """Answers to token ids, of which the harness has cut the beginning where they are too long."""
        model = cast(Any, self)
        bos = bos_prefix(model.tokenizer)
        kept = [ids if ids[:1] == bos else [*bos, *ids[1:]] for ids in requests] if bos else requests
        return cast(Any, super())._model_generate(requests=kept, **more)


# ---- a server -------------------------------------------------------------------------------------------------------


# Of the connection, of the time, and of a reply that is no JSON or holds no text where it should.
_FAULTS = (aiohttp.ClientError, TimeoutError, json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError)


class _Served(Asker):
    """Many requests at a time; each answer is kept the moment it comes."""

    option = "--base-url"
    """Names the server in errors."""
    _given: dict[int, str]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Asks for what the journal has not; `OptionError` where the server fails more often than it may."""
        server = cast(Any, self)
        self._given = self._kept()
        left = [i for i in range(len(requests)) if i not in self._given]
        if left:
            settings = requests[left[0]].args[1]
            messages = [self._message(requests[i].args[0]) for i in left]
            try:
                asyncio.run(server.get_batched_requests(messages, left, generate=True, gen_kwargs=settings))
            except _FAULTS as error:
                raise OptionError(f"{self.option}: {server.base_url!r} {_fault(error, server.timeout)}") from error
        until = requests[0].args[1].get("until", [])
        return [_cut(self._given[i], until) for i in range(len(requests))]

    async def amodel_call(self, session: Any, sem: Any, messages: Any, *, cache_keys: Any, **more: Any) -> list[str]:
        """One request, as the harness makes it; the key is the request's number."""
        answers: list[str] = await cast(Any, super()).amodel_call(session, sem, messages, cache_keys=None, **more)
        self._given[cache_keys[0]] = answers[0]
        if self._journal is not None:
            self._journal.add({cache_keys[0]: answers[0]}, sync=len(self._given) % SYNC_EVERY == 0)
        self._advance(1)
        return answers

    def _create_payload(self, *arguments: Any, **more: Any) -> dict[str, Any]:
        """As the harness has it, but for a `stop` without any text, which some servers fail on."""
        payload: dict[str, Any] = cast(Any, super())._create_payload(*arguments, **more)
        return {name: value for name, value in payload.items() if name != "stop" or value}

    def _message(self, prompt: str) -> Any:
        return prompt


class _Completions(_Served, LocalCompletionsAPI):  # type: ignore[misc]
    """/v1/completions: the prompt as it is."""

    def parse_generations(self, outputs: Any, **_: Any) -> list[str | None]:
        return [_only_text(outputs["choices"][0]["text"])]


class _ChatCompletions(_Served, LocalChatCompletion):  # type: ignore[misc]
    """/v1/chat/completions: the prompt is the user's message."""

    def _message(self, prompt: str) -> Any:
        return self.apply_chat_template([{"role": "user", "content": prompt}])

    def parse_generations(self, outputs: Any, **_: Any) -> list[str | None]:
        """The harness takes a reply without `choices` for an empty answer; here it is an error, and asked again."""
        return [_only_text(outputs["choices"][0]["message"]["content"])]


def _only_text(value: object) -> str | None:
    if not isinstance(value, str | None):
        raise TypeError(f"a {type(value).__name__} where the text should be")
    return value


def request_url(base_url: str) -> str:
    """`http://host:8000/v1` -> `.../v1/completions`; a URL that names an endpoint stays as it is."""
    url = base_url.rstrip("/")
    return url if url.endswith("/completions") else f"{url}/completions"


def chat_url(base_url: str) -> str:
    """`http://host:8000/v1` -> `.../v1/chat/completions`; a URL that names an endpoint stays as it is."""
    url = base_url.rstrip("/")
    return url if url.endswith("/completions") else f"{url}/chat/completions"


def api(
    model: str, url: str, *, concurrency: int, timeout: float, retries: int, seed: int = 0, option: str = "--base-url"
) -> Any:
    """An OpenAI-compatible server's model by its name there; a URL that ends in /chat/completions is asked as a chat.

    The key for the server is the environment's OPENAI_API_KEY, if it needs one.
    """
    kind = _ChatCompletions if url.endswith("/chat/completions") else _Completions
    with quiet():
        asker = kind(
            model=model,
            base_url=url,
            tokenizer_backend=None,
            tokenized_requests=False,
            num_concurrent=concurrency,
            max_retries=retries + 1,
            timeout=timeout,
            seed=seed,
        )
    asker.timeout = timeout  # the harness takes whole seconds only
    asker.option = option
    return asker


def instances(prompts: Sequence[Any], max_new_tokens: int) -> list[Instance]:
    """The harness's requests for greedy replies that stop where the model stops."""
    settings = {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens}
    return [
        Instance(request_type="generate_until", doc={}, arguments=(prompt, dict(settings)), idx=0) for prompt in prompts
    ]


def as_chat(asker: Any, messages: Sequence[str]) -> list[Any]:
    """Each text as a user's message, in the model's own template; as it is where there is no template."""
    if isinstance(asker, _Served) or asker.tokenizer.chat_template is None:
        return list(messages)
    return [asker.apply_chat_template([{"role": "user", "content": text}]) for text in messages]


def _cut(text: str, until: Sequence[str]) -> str:
    """Up to the first stop text, for servers that know no `stop`."""
    for stop in until:
        text = text.split(stop)[0]
    return text


def _fault(error: Exception, timeout: float) -> str:
    """What a server did wrong and what to do, in one line; what it said itself is none of it."""
    if isinstance(error, aiohttp.ClientResponseError) and not isinstance(error, aiohttp.ContentTypeError):
        return f"answers {error.status}; check the URL, the name that the server gives MODEL, and OPENAI_API_KEY"
    if isinstance(error, TimeoutError):
        return (
            f"does not answer within {timeout:g} s; raise --timeout or lower --concurrency, what was answered is kept"
        )
    if isinstance(error, aiohttp.ClientConnectionError):
        return f"cannot be reached ({type(error).__name__}); start the server or check the URL, then run again"
    return f"answers what is no completion ({type(error).__name__}); give the URL of an OpenAI-compatible server"


# ---- engines --------------------------------------------------------------------------------------------------------


def open_engine(config: EvaluateConfig) -> Any:
    """The asker of every engine but hf, which needs its model for more than asking."""
    if config.engine == "api":
        assert config.base_url is not None
        return api(
            config.model,
            request_url(config.base_url),
            concurrency=config.concurrency,
            timeout=config.timeout,
            retries=config.retries,
            seed=config.seed,
        )
    if importlib.util.find_spec(config.engine) is None:
        raise OptionError(
            f"--engine: {config.engine!r} needs the package {config.engine}, which is not installed; "
            f"pip install {config.engine}, or use --engine hf"
        )
    # Both are told what the harness's defaults leave out: the tokenizer's own BOS, and no code from the checkpoint.
    settings = {
        "pretrained": str(checkpoint_folder(config.model, config.revision)),
        "dtype": config.dtype,
        "trust_remote_code": config.trust_remote_code,
        "batch_size": config.batch_size,
        "max_gen_toks": config.max_new_tokens,
    }
    asker: Any
    with quiet():
        if config.engine == "vllm":
            from lm_eval.models.vllm_causallms import VLLM

            asker = type("VllmAsker", (EngineAsker, VLLM), {})(seed=config.seed, **settings)
        else:
            from lm_eval.models.sglang_causallms import SGLangLM

            asker = type("SglangAsker", (EngineAsker, SGLangLM), {})(
                add_bos_token=True, random_seed=config.seed, tokenizer_path=settings["pretrained"], **settings
            )
    asker.check_room(config.max_new_tokens)
    return asker


# ---- quiet ----------------------------------------------------------------------------------------------------------


class _NoBar:
    """Takes the place of the harness's bar over requests."""

    @staticmethod
    async def gather(*tasks: Any, **_: Any) -> list[Any]:
        return list(await asyncio.gather(*tasks))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block the harness says only what is wrong: not that a model is a model, nor how a loop gets on."""
    # transformers warns of each prompt that is longer than the context; `truncated` counts them. What a server says
    # goes to no terminal.
    levels = {
        "lm_eval": logging.ERROR,
        "transformers.tokenization_utils_base": logging.ERROR,
        "lm_eval.models.api_models": logging.CRITICAL,
    }
    before = {name: logging.getLogger(name).level for name in levels}
    bars = lm_eval.api.task.tqdm, api_models.tqdm_asyncio
    try:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        lm_eval.api.task.tqdm = lambda rows, **_: rows  # building 100 prompts is over before its bar is drawn
        api_models.tqdm_asyncio = _NoBar
        yield
    finally:
        lm_eval.api.task.tqdm, api_models.tqdm_asyncio = bars
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
