"""Silences lm-evaluation-harness and `datasets`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import datasets
import lm_eval.api.task
from lm_eval.models import api_models

__all__ = ["quiet"]

LEVELS = {
    "lm_eval": logging.ERROR,
    # It warns of each prompt that is longer than the context. We count those prompts instead.
    "transformers.tokenization_utils_base": logging.ERROR,
    # It prints what a server replied, which may hold control characters.
    "lm_eval.models.api_models": logging.CRITICAL,
}


class _NoBar:
    """Replaces the harness's progress bar over requests to a server."""

    @staticmethod
    async def gather(*tasks: Any, **_: Any) -> list[Any]:
        return list(await asyncio.gather(*tasks))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block the libraries show no progress bar and log errors only."""
    levels = {name: logging.getLogger(name).level for name in LEVELS}
    bars = datasets.utils.logging.is_progress_bar_enabled()
    harness_bars = lm_eval.api.task.tqdm, api_models.tqdm_asyncio
    try:
        for name, level in LEVELS.items():
            logging.getLogger(name).setLevel(level)
        datasets.disable_progress_bars()
        lm_eval.api.task.tqdm = lambda rows, **_: rows
        api_models.tqdm_asyncio = _NoBar
        yield
    finally:
        lm_eval.api.task.tqdm, api_models.tqdm_asyncio = harness_bars
        if bars:
            datasets.enable_progress_bars()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
