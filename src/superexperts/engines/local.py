"""What vLLM and SGLang have in common: they run a checkpoint in this process, behind a class of the harness."""

from __future__ import annotations

from typing import Any, cast

from superexperts.data.packing import bos_prefix
from superexperts.engines import Opening
from superexperts.engines.harness import HarnessModel

__all__ = ["LocalModel", "shared_arguments"]


class LocalModel(HarnessModel):
    """Stands in front of the harness's class of vLLM or SGLang. A prompt that is cut keeps its BOS."""

    scored_room = -1  # both generate one token more, which is thrown away

    def _model_generate(self, requests: list[list[int]], **more: Any) -> Any:
        """Answers to token ids. The harness has cut the beginning of those that are too long, and BOS with it."""
        model = cast(Any, self)
        bos = bos_prefix(model.tokenizer)
        kept = [ids if ids[:1] == bos else [*bos, *ids[1:]] for ids in requests] if bos else requests
        return cast(Any, super())._model_generate(requests=kept, **more)


def shared_arguments(opening: Opening) -> dict[str, Any]:
    """The arguments that both classes of the harness take."""
    return {
        "pretrained": str(opening.folder),
        "dtype": opening.dtype,
        "trust_remote_code": opening.trust_remote_code,  # given, because the harness's default is True
        "batch_size": opening.batch_size,
        "max_gen_toks": opening.max_new_tokens,
    }
