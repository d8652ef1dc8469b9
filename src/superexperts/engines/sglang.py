"""The engine `sglang`."""

from __future__ import annotations

from typing import Any

from superexperts.engines import Opening
from superexperts.engines.harness import quiet
from superexperts.engines.local import LocalModel, shared_arguments
from superexperts.engines.replies import Generated

__all__ = ["open_engine"]


def open_engine(opening: Opening) -> Any:
    """SGLang with the checkpoint in `opening.folder`."""
    with quiet():
        # Imported here, because the harness's module imports the package itself.
        from lm_eval.models.sglang_causallms import SGLangLM

        class SglangModel(LocalModel, SGLangLM):  # type: ignore[misc]  # the harness is untyped
            def _sampling(self, new: int, stop: list[str]) -> Any:
                shown: dict[str, Any] = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
                return {"max_new_tokens": new, "temperature": 0.0, "stop": stop, **shown}

            def _read(self, output: Any) -> Generated:
                reason = (output.get("meta_info") or {}).get("finish_reason")
                kind = reason.get("type") if isinstance(reason, dict) else reason
                return Generated(output.get("text", ""), kind)

        # Its default is no BOS at all.
        model = SglangModel(
            add_bos_token=True,
            random_seed=opening.seed,
            tokenizer_path=str(opening.folder),
            **shared_arguments(opening),
        )
    model.check_room(opening.max_new_tokens)
    return model
