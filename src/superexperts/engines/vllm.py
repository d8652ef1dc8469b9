"""The engine `vllm`."""

from __future__ import annotations

from typing import Any

from superexperts.engines import Opening
from superexperts.engines.harness import quiet
from superexperts.engines.local import LocalModel, shared_arguments

__all__ = ["open_engine"]


def open_engine(opening: Opening) -> Any:
    """vLLM with the checkpoint in `opening.folder`."""
    with quiet():
        # Imported here, because the harness's module imports the package itself.
        from lm_eval.models.vllm_causallms import VLLM

        class VllmModel(LocalModel, VLLM):  # type: ignore[misc]  # the harness is untyped
            pass

        model = VllmModel(seed=opening.seed, **shared_arguments(opening))
    model.check_room(opening.max_new_tokens)
    return model
