"""The models of lm-evaluation-harness, which answer the prompts. Every answer is kept as soon as it arrives.

Shape suffixes: B prompts in a batch, L tokens of the longest one.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rich.progress import Progress, TaskID
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from superexperts.benchmarks.quiet import quiet
from superexperts.core.console import note, stderr
from superexperts.core.errors import Field, ModelError, OptionError
from superexperts.engines.journal import Keeper

__all__ = ["HarnessModel", "TransformersModel", "instances", "quiet"]


class HarnessModel:
    """Stands in front of a model class of the harness, and adds a journal of the answers and one progress bar."""

    truncated = 0
    """Number of prompts that lost their beginning, because they are longer than the model's context."""
    scored_room = 0
    """Tokens that a prompt and its choice may have beyond the model's context, when the choice is scored."""
    _bar: tuple[Progress, TaskID] | None = None
    _journal: Keeper | None = None

    @contextlib.contextmanager
    def answering(self, description: str, total: int, journal: Keeper | None) -> Iterator[None]:
        """Within the block, answers go to the journal. A bar counts them; without a terminal, one line does."""
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
        """The answers of an interrupted run, which the progress bar counts as well."""
        kept = {} if self._journal is None else dict(self._journal.answers)
        self._advance(len(kept))
        return kept

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The harness's method, but batch by batch, so that each batch can be kept."""

        def ask(batch: list[list[Any]]) -> list[Any]:
            return list(
                cast(Any, super(HarnessModel, self)).generate_until([one for [one] in batch], disable_tqdm=True)
            )

        return self._batch_by_batch([[request] for request in requests], ask)

    def choice_loglikelihoods(self, items: Sequence[list[Any]]) -> list[list[float]]:
        """The log-probability (nats) of each choice of each item; an item is the harness's requests for its choices.

        `ModelError` if one is not a number.
        """

        def ask(batch: list[list[Any]]) -> list[Any]:
            found = iter(cast(Any, self).loglikelihood([one for item in batch for one in item], disable_tqdm=True))
            values = [[float(next(found)[0]) for _ in item] for item in batch]
            if any(math.isnan(value) for item in values for value in item):
                raise ModelError("a logit is not a number; try ", Field("dtype"), " float32", field="model")
            return values

        return self._batch_by_batch(items, ask)

    def _batch_by_batch(self, items: Sequence[list[Any]], ask: Callable[[list[list[Any]]], list[Any]]) -> list[Any]:
        answers = self._kept()
        left = [i for i in self._order(items) if i not in answers]
        size = int(cast(Any, self).batch_size)
        for start in range(0, len(left), size):
            batch = left[start : start + size]
            new = dict(zip(batch, ask([items[i] for i in batch]), strict=True))
            answers |= new
            self._advance(len(batch))
            if self._journal is not None:
                self._journal.add(new)
        return [answers[i] for i in range(len(items))]

    def _order(self, items: Sequence[list[Any]]) -> list[int]:
        """Indices of the items, longest first; adds those that are too long to `truncated`."""
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
        """The harness's method, but a prompt that is too long keeps its BOS, because the attention sinks need it."""
        model, cut = cast(Any, self), []
        bos = model.tokenizer.bos_token_id
        for texts, context, continuation in requests:
            over = len(context) + len(continuation) - model.max_length - self.scored_room
            keep = over > 0 and context[0] == bos and over + 1 < len(context)
            cut.append((texts, [bos, *context[over + 1 :]] if keep else context, continuation))
        return cast(list[tuple[float, bool]], cast(Any, super())._loglikelihood_tokens(cut, **more))

    def check_room(self, max_new_tokens: int) -> None:
        """`OptionError` if so many new tokens leave no room for a prompt."""
        context = cast(Any, self).max_length
        if max_new_tokens >= context:
            raise OptionError(
                f"{max_new_tokens} leaves no room for a prompt in the model's context of {context} tokens; give less",
                field="max_new_tokens",
            )


def _characters(arguments: tuple[str, Any]) -> int:
    """Length of a request's context, and of the choice after it if there is one."""
    context, more = arguments
    return len(context) + (len(more) if isinstance(more, str) else 0)


class TransformersModel(HarnessModel, HFLM):  # type: ignore[misc]  # the harness is untyped
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
        """Left-padded ids and mask [B, L]. A prompt that is too long loses its beginning but keeps its BOS."""
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
    """The harness's requests for greedy replies that end where the model ends them."""
    settings = {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens}
    return [
        Instance(request_type="generate_until", doc={}, arguments=(prompt, dict(settings)), idx=0) for prompt in prompts
    ]
