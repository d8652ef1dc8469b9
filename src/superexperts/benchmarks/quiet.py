"""Silences lm-evaluation-harness and `datasets`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import datasets
import lm_eval.api.task

__all__ = ["quiet"]

LEVELS = {
    "lm_eval": logging.ERROR,
    # It warns of each prompt that is longer than the context. We count those prompts instead.
    "transformers.tokenization_utils_base": logging.ERROR,
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block the libraries show no progress bar and log errors only."""
    levels = {name: logging.getLogger(name).level for name in LEVELS}
    bars = datasets.utils.logging.is_progress_bar_enabled()
    harness_bar = lm_eval.api.task.tqdm
    try:
        for name, level in LEVELS.items():
            logging.getLogger(name).setLevel(level)
        datasets.disable_progress_bars()
        lm_eval.api.task.tqdm = lambda rows, **_: rows
        yield
    finally:
        lm_eval.api.task.tqdm = harness_bar
        if bars:
            datasets.enable_progress_bars()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
