"""The engines beside transformers in this process: vLLM, SGLang, a server."""

from __future__ import annotations

import importlib.util
from typing import Any, cast

from superexperts.checkpoints.source import resolve
from superexperts.core.config import EvaluateConfig
from superexperts.core.errors import Field, OptionError
from superexperts.data.packing import bos_prefix
from superexperts.engines.harness import Asker, quiet
from superexperts.engines.server import api, request_url

__all__ = ["EngineAsker", "open_engine", "require_engine"]


class EngineAsker(Asker):
    """vLLM or SGLang in this process, to be put in front of the harness's class. A prompt that is cut keeps its BOS."""

    scored_room = -1  # both make one token more, which is thrown away

    def _model_generate(self, requests: list[list[int]], **more: Any) -> Any:
        """Answers to token ids, of which the harness has cut the beginning where they are too long."""
        model = cast(Any, self)
        bos = bos_prefix(model.tokenizer)
        kept = [ids if ids[:1] == bos else [*bos, *ids[1:]] for ids in requests] if bos else requests
        return cast(Any, super())._model_generate(requests=kept, **more)


def require_engine(engine: str, field: str = "engine") -> None:
    """`OptionError` where the package that an engine needs is not there."""
    if engine != "hf" and importlib.util.find_spec(engine) is None:
        raise OptionError(
            f"{engine!r} needs the package {engine}, which is not installed; pip install {engine}, or use ",
            Field(field),
            " hf",
            field=field,
        )


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
    require_engine(config.engine)
    # Both are told what the harness's defaults leave out: the tokenizer's own BOS, and no code from the checkpoint.
    settings = {
        "pretrained": str(resolve(config.model, config.revision).folder),
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
