"""What vLLM and SGLang have in common: they run a checkpoint in this process, behind a class of the harness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from superexperts.engines import Opening
from superexperts.engines.harness import HarnessModel
from superexperts.engines.replies import Generated, Request

__all__ = ["LocalModel", "shared_arguments"]


class LocalModel(HarnessModel):
    """Stands in front of the harness's class of vLLM or SGLang. A prompt that is cut keeps its BOS."""

    scored_room = -1  # both generate one token more, which is thrown away

    def _generate(self, requests: Sequence[Request]) -> list[Generated]:
        """Not by the harness's `generate_until`, which does not say why an answer ends."""
        model = cast(Any, self)
        new = requests[0].max_new_tokens
        prompts = [self.encode(str(request.prompt), model.max_length - new) for request in requests]
        ends_text = model.tokenizer.decode(model.eot_token_id)
        sampling = [self._sampling(new, [*(one.stop if one.sends_stop else ()), ends_text]) for one in requests]
        found = model._model_generate(requests=prompts, generate=True, sampling_params=sampling)
        read = [self._read(output) for output in found]
        return [one._replace(text=one.text.split(ends_text)[0]) if ends_text else one for one in read]

    def _sampling(self, new: int, stop: list[str]) -> Any:
        """The engine's settings for a greedy answer of at most `new` tokens, special tokens included."""
        raise NotImplementedError

    def _read(self, output: Any) -> Generated:
        """The text in the engine's output, and why it ends."""
        raise NotImplementedError


def shared_arguments(opening: Opening) -> dict[str, Any]:
    """The arguments that both classes of the harness take."""
    return {
        "pretrained": str(opening.folder),
        "dtype": opening.dtype,
        "trust_remote_code": opening.trust_remote_code,  # given, because the harness's default is True
        "batch_size": opening.batch_size,
        "max_gen_toks": opening.max_new_tokens,
    }
