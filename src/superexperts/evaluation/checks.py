"""Whether the benchmarks and the engine of an evaluation fit its other settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from superexperts.benchmarks import BENCHMARKS
from superexperts.core.errors import Field, OptionError
from superexperts.core.settings import SERVER_OPTIONS, require, require_unused, require_url
from superexperts.engines import ENGINES, in_process_engines

if TYPE_CHECKING:
    from superexperts.evaluation.evaluate import EvaluateConfig

__all__ = ["check_engine", "check_tasks"]


def check_tasks(config: EvaluateConfig) -> None:
    """`OptionError` for a benchmark that is unknown, or not for the protocol or the split."""
    known = ",".join(BENCHMARKS)
    unknown = [name for name in config.task_names if name not in BENCHMARKS]
    require(not unknown, "tasks", ",".join(unknown), f"is unknown; choose from {known}")
    require(bool(config.task_names), "tasks", config.tasks, f"names no benchmark; choose from {known}")
    if config.protocol == "generative":
        why = ("does nothing for ", Field("protocol"), " generative, which shows no examples; leave it out")
        require(config.num_fewshot is None, "num_fewshot", config.num_fewshot, *why)
    else:
        fits = config.num_fewshot is None or config.num_fewshot >= 0
        require(fits, "num_fewshot", config.num_fewshot, "is negative; give 0 or more")
        without = [name for name in config.task_names if BENCHMARKS[name].few_shot is None]
        why = ("has no few-shot task; leave it out, or give ", Field("protocol"), " generative")
        require(not without, "tasks", ",".join(without), *why)
    if config.split == "test":
        withheld = [name for name, benchmark in BENCHMARKS.items() if benchmark.withheld is not None]
        others = [name for name in config.task_names if name not in withheld]
        fits_only = f"is for {','.join(withheld)} only; ask {', '.join(others)} in another run, without "
        require(not others, "split", config.split, fits_only, Field("split"))


def check_engine(config: EvaluateConfig) -> None:
    """`OptionError` for a setting that the engine cannot follow."""
    engine = ENGINES[config.engine]
    able = ", ".join(name for name, one in ENGINES.items() if one.loglikelihood)
    why = ("needs ", Field("engine"), f" {able}; a server does not return the log-probabilities of a prompt")
    require(config.protocol == "generative" or engine.loglikelihood, "protocol", config.protocol, *why)
    if engine.server and config.base_url is None:
        raise OptionError("missing for ", Field("engine"), f" {config.engine}; give the server's URL", field="base_url")
    if config.base_url is not None:
        why = ("needs ", Field("engine"), f" api, not {config.engine}; give that as well")
        require(engine.server, "base_url", config.base_url, *why)
        require_url("base_url", config.base_url)
    if engine.server:
        of_loading = ["revision", "trust_remote_code", "dtype", "batch_size"]
        require_unused(config, of_loading, "with ", Field("engine"), f" {config.engine}, where the server decides")
    else:
        servers = " or ".join(name for name, one in ENGINES.items() if one.server)
        require_unused(config, SERVER_OPTIONS, "without ", Field("engine"), f" {servers}")
    if not engine.in_process:
        why = ("needs ", Field("engine"), f" {' or '.join(in_process_engines())}, not {config.engine}; ")
        require(config.silence is None, "silence", config.silence, *why, "or prune and serve that checkpoint")
        require(config.adapter is None, "adapter", str(config.adapter), *why, "or merge it into a checkpoint")
        require(config.perplexity is None, "perplexity", config.perplexity, *why, "leave it out")
