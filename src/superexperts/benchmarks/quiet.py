"""Silences what libraries say while tasks are loaded."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import datasets

__all__ = ["quiet"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block: no bar for a split that is there in a second, and of the harness errors only."""
    logger, bars = logging.getLogger("lm_eval"), datasets.utils.logging.is_progress_bar_enabled()
    level = logger.level
    datasets.disable_progress_bars()
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
