"""The one prompt: what evaluation asks, what fine-tuning trains on, and what the pocket model was taught."""

from __future__ import annotations

__all__ = ["prompt_of"]


def prompt_of(body: str) -> str:
    """The whole prompt around a question's body; a response begins right after it, with a space."""
    return f"Question: {body}\nAnswer:"
