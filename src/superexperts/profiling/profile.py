"""What every expert does on a corpus: peaks of |down_proj output| and where they came from, tokens, routing weights.

Shape suffixes: B sequences, L tokens per sequence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import operator
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from superexperts.checkpoints import float8
from superexperts.checkpoints.source import resolve
from superexperts.core.config import QUICK_LENGTH, ProfileConfig, identity
from superexperts.core.console import is_main_process, note, progress
from superexperts.core.distributed import from_main_process, is_distributed, my_share
from superexperts.core.errors import OptionError
from superexperts.core.parallel import parallel_map
from superexperts.core.runs import (
    completed,
    input_key,
    prepare_folder,
    read_json,
    write_json,
    write_manifest,
)
from superexperts.core.types import CorpusProfile, ExpertKey, ExpertStats, Profile, key_order
from superexperts.data.corpora import check_column, documents, local_data
from superexperts.data.packing import digest_ids, pack
from superexperts.models.banks import expert_keys, find_banks
from superexperts.models.cpu_attention import padded_values
from superexperts.models.decoder import num_layers, stopped_after, text_config
from superexperts.models.hooks import tapped
from superexperts.models.loading import (
    dtype_to_run,
    empty_model,
    fits_in_memory,
    load_model,
    load_tokenizer,
    pick_device,
    settings_of,
)
from superexperts.models.streaming import StreamedModel
from superexperts.profiling.accumulator import Recorder, merged
from superexperts.profiling.criterion import layers_below, peak, super_experts
from superexperts.profiling.plots import plot_heatmap, plot_layers
from superexperts.profiling.plots_corpora import plot_corpora, plot_top
from superexperts.profiling.sinks import compare_sinks, plot_sinks
from superexperts.profiling.stability import stability
from superexperts.profiling.streamed import QUICK_SEQUENCES, banks_below, profile_streamed, quick_look

__all__ = ["profile_corpus", "run"]

SINK_SEQUENCES = 8
SECTIONS = ".sections"
WRITTEN = re.compile(
    r"(manifest|profile|stability|sinks)\.json|((heatmap|layers|top)-.+|corpora|sinks)\.(png|svg)|\..+\.tmp"
)
"""Names of what the command leaves in --out, also half done; other files there are somebody's."""


@torch.inference_mode()
def profile_corpus(
    model: nn.Module,
    ids_BL: Tensor,
    *,
    mask_BL: Tensor | None = None,
    batch_size: int = 8,
    depth: float = 1.0,
    description: str | None = None,
) -> CorpusProfile:
    """Runs int64 sequences [B, L] through the model and returns every expert's statistics.

    `mask_BL` (1 for tokens, 0 for padding) keeps padding out of every number. The result does not depend on the batch
    size but for rounding. Only layers below round(depth x layers) are run, up to their last experts; the profile has no
    others. `description` shows a progress bar. `ModelError` if an expert writes inf or nan.
    """
    mask_BL = torch.ones_like(ids_BL) if mask_BL is None else mask_BL
    device = next(model.parameters()).device
    banks = banks_below(model, depth)
    recorder = Recorder(expert_keys(banks), ids_BL)
    starts = my_share(range(0, len(ids_BL), batch_size))
    with (
        tapped(model, recorder),
        padded_values(),
        stopped_after(model, banks[-1].path, banks[-1].layer) as forward,
        progress(description, len(starts)) as bar,
    ):
        for start in starts:
            ids, mask = ids_BL[start : start + batch_size].to(device), mask_BL[start : start + batch_size].to(device)
            recorder.start_batch(start, mask)
            # Without padding there is no mask to give: attention has faster ways of being only causal.
            forward(input_ids=ids, attention_mask=None if bool(mask.all()) else mask, use_cache=False)
            bar()
    return CorpusProfile(tokens=int(mask_BL.sum()), experts=merged(recorder).rows())


def run(config: ProfileConfig) -> dict[str, Any]:
    """The command: profiles each corpus, writes profile.json and the pictures."""
    started = time.monotonic()
    config = _settled(config)
    names = tuple(dict.fromkeys(config.corpus)) or ("pocket",)
    source = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    tokenizer = load_tokenizer(source)
    sequences = {name: _sequences(config, name, tokenizer) for name in names}
    inputs = identity(
        config,
        model=source.fingerprint,
        corpora={name: digest_ids(ids_BL) for name, ids_BL in sequences.items()},
    )
    if from_main_process(inputs) != inputs:
        raise OptionError("not every process reads the same; give all of them the same model and files", field="corpus")
    if from_main_process(completed(config.out, "profile", inputs)):
        if not is_main_process:
            return {}
        note(f"profile: {config.out} is up to date, nothing to do")
        return summary(Profile.load(config.out), config, tokenizer)
    with _opened(config) as (model, profile_one):
        _profile_all(config, model, profile_one, sequences, inputs, started)
    return summary(Profile.load(config.out), config, tokenizer) if is_main_process else {}


def _settled(config: ProfileConfig) -> ProfileConfig:
    """Whether the model is streamed, in which dtype it runs and on how much text, where the options leave it open: the
    numbers depend on it."""
    source = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    settings = settings_of(source)
    if config.quick and is_distributed():
        raise OptionError("True is for one process; leave accelerate launch out", field="quick")
    if not (config.stream or config.quick):
        # What transformers builds of a quantized checkpoint has other experts than the family's own.
        quantized = float8.is_quantized(settings)
        if from_main_process(
            quantized or (config.device_map == "none" and not fits_in_memory(source, config.device, config.dtype))
        ):
            why = "is quantized" if quantized else "does not fit in memory"
            if config.sinks:
                raise OptionError(f"True needs the model in memory, and it {why}; drop the option", field="sinks")
            config = dataclasses.replace(config, stream=True)
            note(f"profile: the model {why}, so it is streamed a layer at a time (--stream)")
    if config.dtype == "auto":
        dtype: Any = dtype_to_run(source, config.device, "auto", streamed=config.stream or config.quick)
        config = dataclasses.replace(config, dtype=dtype)
    if config.quick:
        seq_len = min(config.seq_len, QUICK_LENGTH)
        tokens = min(config.tokens, QUICK_SEQUENCES * seq_len)
        config = dataclasses.replace(config, seq_len=seq_len, tokens=tokens)
    return config


@contextlib.contextmanager
def _opened(config: ProfileConfig) -> Iterator[tuple[nn.Module, Callable[[str, Tensor], CorpusProfile]]]:
    """The model, in memory or without weights, and how a corpus is profiled on it."""
    resolved = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    if not (config.stream or config.quick):
        model = load_model(resolved, device=config.device, dtype=config.dtype, spread=config.device_map == "auto")
        yield (
            model,
            lambda name, ids_BL: profile_corpus(
                model, ids_BL, batch_size=config.batch_size, depth=config.depth, description=f"profile {name}"
            ),
        )
        return
    with float8.opened(resolved.folder, settings_of(resolved)) as checkpoint:
        source = StreamedModel(
            empty_model(resolved, device=config.device, dtype=config.dtype), checkpoint, pick_device(config.device)
        )

        def profile_one(name: str, ids_BL: Tensor) -> CorpusProfile:
            told = f"profile {name}"
            if config.quick:
                return quick_look(source, ids_BL, depth=config.depth, statistic=config.statistic, description=told)
            return profile_streamed(
                source,
                ids_BL,
                batch_size=config.batch_size,
                depth=config.depth,
                budget=int(config.activation_budget * 2**30),
                folder=config.out,
                description=told,
            )

        yield source.model, profile_one
        note(f"profile: {checkpoint.bytes_read / 1e9:.3g} GB of weights were read")


def _profile_all(
    config: ProfileConfig,
    model: nn.Module,
    profile_one: Callable[[str, Tensor], CorpusProfile],
    sequences: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    started: float,
) -> None:
    """Profiles each corpus that has no section yet, and writes all files."""
    context = getattr(text_config(model), "max_position_embeddings", None)  # a state-space model has no limit
    if context is not None and config.seq_len > context:
        raise OptionError(
            f"{config.seq_len} is over the model's context of {context}; give at most that", field="seq_len"
        )
    find_banks(model)
    prepare_folder(config.out)
    # A killed run starts again from the last finished corpus.
    sections = {name: _section(config, inputs, name) for name in sequences}
    kept: dict[str, CorpusProfile] = from_main_process(
        {name: Profile.load(file).corpora[name] for name, file in sections.items() if file.is_file()}
    )
    corpora: dict[str, CorpusProfile] = {}
    for name, ids_BL in sequences.items():
        if name in kept:
            note(f"profile: {name} was finished before, kept")
            corpora[name] = kept[name]
            continue
        corpora[name] = profile_one(name, ids_BL)
        if is_main_process:
            write_json(sections[name], _profile(config, model, {name: corpora[name]}).to_json())
    if not is_main_process:
        return
    profile = _profile(config, model, corpora)
    for old in config.out.iterdir():
        if WRITTEN.fullmatch(old.name):
            old.unlink()  # of a former run, whose corpora may have been others
    write_json(config.out / "profile.json", profile.to_json())
    outputs = ["profile.json", *_pictures(profile, config.out)]
    if len(corpora) > 1:
        write_json(config.out / "stability.json", stability(profile))
        outputs.append("stability.json")
    if config.sinks:
        outputs += _sinks(profile, config, model, sequences)
    write_manifest(config.out, "profile", inputs, outputs, time.monotonic() - started)
    shutil.rmtree(config.out / SECTIONS)


def _section(config: ProfileConfig, inputs: Mapping[str, Any], name: str) -> Path:
    """Where one corpus' part of the profile is kept until all are done."""
    alone = {**inputs, "corpora": {name: inputs["corpora"][name]}, "options": {**inputs["options"], "corpus": name}}
    return config.out / SECTIONS / f"{input_key('profile', alone)[:32]}.json"


def _profile(config: ProfileConfig, model: nn.Module, corpora: Mapping[str, CorpusProfile]) -> Profile:
    return Profile(
        model=config.model,
        num_layers=num_layers(model),
        depth=config.depth,
        statistic=config.statistic,
        corpora=corpora,
    )


def _pictures(profile: Profile, folder: Path) -> list[str]:
    """Draws every picture as PNG and SVG; returns their names."""
    drawings: list[Callable[[], object]] = []
    drawn: list[Path] = []
    stems: set[str] = set()
    depth = profile.criterion_depth
    for name, corpus in profile.corpora.items():
        plain = "".join(letter if letter.isalnum() else "-" for letter in Path(name).name)
        numbered = (f"{plain}-{number}" for number in itertools.count(2))
        stem = next(stem for stem in itertools.chain([plain], numbered) if stem not in stems)
        stems.add(stem)
        chosen = [row.key for row in _super(profile, corpus)]
        heatmap, layers, top = (_both(folder, f"{kind}-{stem}") for kind in ("heatmap", "layers", "top"))
        drawings += [
            functools.partial(plot_heatmap, profile, name, chosen, heatmap, depth=depth, ring="super expert"),
            functools.partial(plot_layers, profile, name, chosen, layers, depth=depth),
            functools.partial(plot_top, profile, name, chosen, top),
        ]
        drawn += [*heatmap, *layers, *top]
    if len(profile.corpora) > 1:
        corpora = _both(folder, "corpora")
        drawings.append(functools.partial(plot_corpora, profile, _largest(profile, 12), corpora))
        drawn += corpora
    parallel_map(operator.call, drawings, worth=1)
    return [path.name for path in drawn]


def _both(folder: Path, stem: str) -> list[Path]:
    """A picture's files, which are drawn at once."""
    return [folder / f"{stem}.{suffix}" for suffix in ("png", "svg")]


def _sinks(profile: Profile, config: ProfileConfig, model: nn.Module, sequences: Mapping[str, Tensor]) -> list[str]:
    """Attention sinks on the first sequences of the first corpus, with and without its super experts."""
    name = next(iter(profile.corpora))
    experts = [row.key for row in _super(profile, profile.corpora[name])]
    if not experts:
        note(f"profile: --sinks: {name} shows no super expert to silence, so the sinks are not measured")
        return []
    report = compare_sinks(model, sequences[name][:SINK_SEQUENCES], experts, name=config.model, corpus=name)
    write_json(config.out / "sinks.json", report.to_json())
    plot_sinks(report, pictures := _both(config.out, "sinks"))
    return ["sinks.json", *(path.name for path in pictures)]


def _super(profile: Profile, corpus: CorpusProfile) -> tuple[ExpertStats, ...]:
    return super_experts(corpus.experts, profile.num_layers, depth=profile.criterion_depth, statistic=profile.statistic)


def _largest(profile: Profile, count: int) -> list[ExpertKey]:
    """The experts with the largest peaks on any corpus."""
    best: dict[ExpertKey, float] = {}
    for corpus in profile.corpora.values():
        for row in corpus.experts:
            best[row.key] = max(best.get(row.key, 0.0), peak(row, profile.statistic))
    return sorted(best, key=lambda key: (-best[key], key_order(key)))[:count]


def _sequences(config: ProfileConfig, name: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    check_column(config.column, config.corpus or ("pocket",))
    texts = documents(name, config.column or "text", local_data(config.data_dir))
    return pack(texts, tokenizer, corpus=name, tokens=config.tokens, seq_len=config.seq_len)


def summary(profile: Profile, config: ProfileConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Per corpus the super experts by the paper's criterion, the ten largest peaks and the unreached experts."""
    corpora = {}
    for name, corpus in profile.corpora.items():
        top = sorted(corpus.experts, key=lambda row: -peak(row, profile.statistic))[:10]
        found = _super(profile, corpus)
        corpora[name] = {
            "tokens": corpus.tokens,
            "stable": corpus.stable,
            "super": [row.key for row in found],
            "unreached": sum(row.tokens == 0 for row in corpus.experts),
            "top": [
                dataclasses.asdict(row) | {"token": "" if row.token_id is None else tokenizer.decode([row.token_id])}
                for row in top
            ],
        }
    sinks = config.out / "sinks.json"
    return {
        "out": str(config.out),
        "model": profile.model,
        "num_layers": profile.num_layers,
        "layers_run": layers_below(profile.depth, profile.num_layers),
        "statistic": profile.statistic,
        "corpora": corpora,
        "stability": stability(profile) if len(corpora) > 1 else None,
        "sinks": read_json(sinks, "sinks") if config.sinks and sinks.is_file() else None,
    }
