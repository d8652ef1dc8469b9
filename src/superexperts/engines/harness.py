"""What answers the prompts: lm-evaluation-harness's own models, with every answer kept as it comes.

Shape suffixes: B prompts in a batch, L tokens of the longest one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import lm_eval.api.task
import torch
from lm_eval.api.instance import Instance
from lm_eval.models import api_models
from lm_eval.models.huggingface import HFLM
from rich.progress import Progress, TaskID
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from superexperts.core.console import note, stderr
from superexperts.core.errors import Field, ModelError, OptionError
from superexperts.engines.journal import Keeper

__all__ = ["Asker", "HfAsker", "instances", "quiet"]


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
                raise ModelError("a logit is not a number; try ", Field("dtype"), " float32", field="model")
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
                (f"{max_new_tokens} leaves no room for a prompt in the model's context of {context} tokens; give less"),
                field="max_new_tokens",
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


def instances(prompts: Sequence[Any], max_new_tokens: int) -> list[Instance]:
    """The harness's requests for greedy replies that stop where the model stops."""
    settings = {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens}
    return [
        Instance(request_type="generate_until", doc={}, arguments=(prompt, dict(settings)), idx=0) for prompt in prompts
    ]


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
