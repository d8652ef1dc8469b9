"""The engine `sglang`."""

from __future__ import annotations

from typing import Any

from superexperts.engines import Opening
from superexperts.engines.harness import quiet
from superexperts.engines.local import LocalModel, shared_arguments

__all__ = ["open_engine"]


def open_engine(opening: Opening) -> Any:
    """SGLang with the checkpoint in `opening.folder`."""
    with quiet():
        # Imported here, because the harness's module imports the package itself.
        from lm_eval.models.sglang_causallms import SGLangLM

        class SglangModel(LocalModel, SGLangLM):  # type: ignore[misc]  # the harness is untyped
            pass

        # Its default is no BOS at all.
        model = SglangModel(
            add_bos_token=True,
            random_seed=opening.seed,
            tokenizer_path=str(opening.folder),
            **shared_arguments(opening),
        )
    model.check_room(opening.max_new_tokens)
    return model
