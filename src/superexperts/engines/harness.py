"""The models of lm-evaluation-harness, which answer the prompts. Every answer is kept as soon as it arrives.

Shape suffixes: B prompts in a batch, L tokens of the longest one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from lm_eval.models.huggingface import HFLM
from rich.progress import Progress, TaskID
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from superexperts.benchmarks.quiet import quiet
from superexperts.core.console import note, stderr
from superexperts.core.errors import Field, ModelError, OptionError
from superexperts.core.thoughts import end_for, is_mark
from superexperts.engines.journal import Given, Keeper
from superexperts.engines.replies import Generated, Reply, Request, instances, make_reply, stopped_in_thoughts
from superexperts.models.finite import not_finite_error

__all__ = ["HarnessModel", "TransformersModel", "instances", "quiet"]


class HarnessModel:
    """Stands in front of a model class of the harness, and adds replies, a journal of them and one progress bar."""

    truncated = 0
    """Number of prompts that lost their beginning, because they are longer than the model's context."""
    add_bos_token: bool | None = None
    """The harness's setting: whether a BOS is put in front of a prompt; None as the tokenizer does. A chat template
    writes all special tokens itself."""
    scored_room = 0
    """How many tokens more than the model's context a prompt and its scored choice may have together."""
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

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """What the model says to each request, without its thoughts; the journal keeps the same."""
        self._journal = None if self._journal is None else _SaidOnly(self._journal)
        return [reply.said for reply in self.replies(requests)]

    def replies(self, requests: Sequence[Request]) -> list[Reply]:
        """The reply to each request. All have the same limit of tokens and the same stop texts."""
        given = self._batch_by_batch([[request] for request in requests], self._reply_to)
        return [Reply.from_given(value) for value in given]

    def _reply_to(self, batch: list[list[Request]]) -> list[Given]:
        requests = [request for [request] in batch]
        said = self._within_budget(requests) if requests[0].thinking_budget else self._generate(requests)
        found = [make_reply(generated, request) for generated, request in zip(said, requests, strict=True)]
        # A stop text may have cut thoughts. Asked again without it, the model thinks to the end.
        cut = [i for i, request in enumerate(requests) if stopped_in_thoughts(request, found[i])]
        again = [dataclasses.replace(requests[i], sends_stop=False) for i in cut]
        for i, generated in zip(cut, self._generate(again) if again else (), strict=True):
            found[i] = make_reply(generated, requests[i])
        return [reply.to_given() for reply in found]

    def _within_budget(self, requests: Sequence[Request]) -> list[Generated]:
        """Greedy answers whose thoughts are ended for the model once they have used up their budget."""
        budget = requests[0].thinking_budget
        assert budget is not None, "there is no budget"
        said = self._generate([dataclasses.replace(request, max_new_tokens=budget) for request in requests])
        left = [i for i, generated in enumerate(said) if generated.finish_reason == "length"]
        more = []
        for i in left:
            request, text = requests[i], said[i].text
            if not make_reply(said[i], request).said.strip():
                end = end_for(f"{request.prompt}{text}")
                text = f"{text.rstrip()}\n{end}\n\n" if end else text
                said[i] = said[i]._replace(text=text)
            more.append(dataclasses.replace(request, prompt=f"{request.prompt}{text}"))
        for i, generated in zip(left, self._generate(more) if more else (), strict=True):
            said[i] = generated._replace(text=said[i].text + generated.text)
        return said

    def _generate(self, requests: Sequence[Request]) -> list[Generated]:
        """Greedy answers to one batch."""
        raise NotImplementedError

    def encode(self, text: str, room: int) -> list[int]:
        """The ids of a prompt. One that is longer than `room` loses its beginning, but keeps its BOS."""
        model = cast(Any, self)
        ids: list[int] = model.tok_encode(text)
        bos = model.tokenizer.bos_token_id
        if len(ids) <= room:
            return ids
        return [bos, *ids[len(ids) - room + 1 :]] if ids[0] == bos else ids[len(ids) - room :]

    def choice_loglikelihoods(self, items: Sequence[list[Any]]) -> list[list[float]]:
        """The log-probability (nats) of each choice of each item; an item is the harness's requests for its choices.

        `ModelError` if one is not a number.
        """

        def ask(batch: list[list[Any]]) -> list[Any]:
            found = iter(cast(Any, self).loglikelihood([one for item in batch for one in item], disable_tqdm=True))
            values = [[float(next(found)[0]) for _ in item] for item in batch]
            for item, given in zip(batch, values, strict=True):
                if not all(map(math.isfinite, given)):
                    raise self._not_finite("".join(item[0].args))
            return values

        return self._batch_by_batch(items, ask)

    def _not_finite(self, text: str) -> ModelError:
        """The error for logits on a text that are not finite."""
        return ModelError(
            "its logits are not finite numbers; repair the checkpoint, or try ",
            *(Field("dtype"), " float32"),
            field="model",
        )

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
        asked = [max((_arguments(one) for one in item), key=_characters) for item in items]
        scored = [isinstance(more, str) for _, more in asked]
        texts = [text + more if score else text for (text, more), score in zip(asked, scored, strict=True)]
        longest = [len(ids) for ids in model.tokenizer(texts).input_ids]
        for (_, more), score, length in zip(asked, scored, longest, strict=True):
            room = self.scored_room if score else -more
            self.truncated += length > model.max_length + room
        # Longest first: memory runs out at once if it does, and each batch holds prompts of similar length, so little
        # padding.
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


def _arguments(request: Any) -> tuple[str, Any]:
    """(prompt, the choice to score or the new tokens)"""
    if not isinstance(request, Request):
        return cast(tuple[str, Any], request.args)
    assert isinstance(request.prompt, str), "messages are for servers"
    return request.prompt, request.max_new_tokens + (request.thinking_budget or 0)


@dataclasses.dataclass(frozen=True)
class _SaidOnly:
    """Keeps what a model says without its thoughts."""

    keeper: Keeper

    @property
    def answers(self) -> Mapping[int, Given]:
        return self.keeper.answers

    def add(self, answers: Mapping[int, Given], *, sync: bool = True) -> None:
        self.keeper.add({number: Reply.from_given(given).said for number, given in answers.items()}, sync=sync)


def _characters(arguments: tuple[str, Any]) -> int:
    """Length of a request's context, and of the choice after it if there is one."""
    context, more = arguments
    return len(context) + (len(more) if isinstance(more, str) else 0)


class _NotFiniteError(Exception):
    """A model gives logits that are not finite after these ids [L]."""

    def __init__(self, ids_L: Tensor) -> None:
        super().__init__()
        self.ids_L = ids_L


def _require_finite(ids_BL: Tensor, logits_BV: Tensor) -> Tensor:
    """Looks at the logits of each generated token: generation takes NaN for a number, and an answer of it is empty."""
    finite_B = logits_BV.amax(-1).isfinite()  # also NaN if one is; -inf alone only masks a token
    if not finite_B.all():
        raise _NotFiniteError(ids_BL[int((~finite_B).nonzero()[0, 0])])
    return logits_BV


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

    def _generate(self, requests: Sequence[Request]) -> list[Generated]:
        """As the harness's `generate_until`, which does not say why an answer ends and drops the marks of thoughts."""
        new, stop = requests[0].max_new_tokens, list(requests[0].stop if requests[0].sends_stop else ())
        prompts = [str(request.prompt) for request in requests]
        lengths = [len(ids) for ids in self.tokenizer(prompts).input_ids]
        order = sorted(range(len(prompts)), key=lambda i: (-lengths[i], prompts[i]))
        ids_BL, mask_BL = self.tok_batch_encode([prompts[i] for i in order], left_truncate_len=self.max_length - new)
        ids_BL, mask_BL = ids_BL.to(self.device), mask_BL.to(self.device)
        start = ids_BL.shape[1]
        ends_text = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        said_BN = self._model_generate(
            context=ids_BL, max_length=start + new, stop=[*stop, ends_text], attention_mask=mask_BL, do_sample=False
        )[:, start:]
        found = dict(zip(order, map(self._read, said_BN.tolist(), itertools.repeat(new)), strict=True))
        return [found[i] for i in range(len(requests))]

    def _not_finite(self, text: str) -> ModelError:
        return not_finite_error(self.model, torch.tensor(self.tok_encode(text)))

    def _read(self, ids: list[int], new: int) -> Generated:
        """The text of new ids up to the end of the turn, with marks of thoughts but no other special tokens."""
        end = next((place for place, token in enumerate(ids) if token in self._ends), len(ids))
        text = self.tok_decode([token for token in ids[:end] if token not in self._unsaid], skip_special_tokens=False)
        return Generated(text, "length" if end == len(ids) == new else "stop")

    @functools.cached_property
    def _ends(self) -> frozenset[int]:
        """The ids that end a response."""
        known = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        listed = known if isinstance(known, list) else [known]
        return frozenset(token for token in [*listed, self.eot_token_id] if token is not None)

    @functools.cached_property
    def _unsaid(self) -> frozenset[int]:
        """The special tokens that are not part of a response: all but the marks of thoughts."""
        tokens = dict(zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True))
        return frozenset(number for number, token in tokens.items() if not is_mark(token))

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **more: Any) -> Tensor:
        more["logits_processor"] = [_require_finite]
        try:
            with torch.inference_mode():
                return cast(Tensor, super()._model_generate(context, max_length, stop, **more))
        except _NotFiniteError as error:
            # Without its padding, which may stand in front or behind.
            ids_L = error.ids_L[error.ids_L != self.tokenizer.pad_token_id]
            raise not_finite_error(self.model, ids_L) from error

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
        # Left padding: the first real token is where the mask turns to 1, which argmax finds.
        cut_B = mask_BL.sum(1) > left_truncate_len
        first_B = ids_BL.gather(1, mask_BL.argmax(1, keepdim=True))[:, 0]
        ids_BL, mask_BL = ids_BL[:, -left_truncate_len:], mask_BL[:, -left_truncate_len:]
        keep_B = cut_B & (first_B == (-1 if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id))
        ids_BL[keep_B, 0] = first_B[keep_B]
        return ids_BL, mask_BL
