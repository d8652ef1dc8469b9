"""The engine `vllm`."""

from __future__ import annotations

from typing import Any

from superexperts.engines import Opening
from superexperts.engines.harness import quiet
from superexperts.engines.local import LocalModel, shared_arguments
from superexperts.engines.replies import Generated

__all__ = ["open_engine"]


def open_engine(opening: Opening) -> Any:
    """vLLM with the checkpoint in `opening.folder`."""
    with quiet():
        # Imported here, because the harness's module imports the package itself.
        from lm_eval.models.vllm_causallms import VLLM
        from vllm import SamplingParams

        class VllmModel(LocalModel, VLLM):  # type: ignore[misc]  # the harness is untyped
            def _sampling(self, new: int, stop: list[str]) -> Any:
                shown: dict[str, Any] = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
                return SamplingParams(max_tokens=new, temperature=0, stop=stop, **shown)

            def _read(self, output: Any) -> Generated:
                said = output.outputs[0]
                return Generated(said.text, getattr(said, "finish_reason", None))

        model = VllmModel(seed=opening.seed, **shared_arguments(opening))
    model.check_room(opening.max_new_tokens)
    return model
