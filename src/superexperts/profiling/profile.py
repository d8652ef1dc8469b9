"""The command `profile`: runs text through a model and writes the statistics of every expert, and pictures of them.

What imports torch or transformers is imported inside the functions, so that --help and a wrong option answer at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.table import Table
from rich.text import Text

from superexperts.checkpoints.source import ModelSource, local_folder, resolve
from superexperts.core.console import is_main_process, note, stdout
from superexperts.core.errors import Field, OptionError, OutputError
from superexperts.core.identity import identity
from superexperts.core.runs import completed, input_key, prepare_folder, read_json, write_json, write_manifest
from superexperts.core.settings import ModelConfig, Switch, require, require_device, require_sequences
from superexperts.core.types import CorpusProfile, Profile, Statistic, key_name
from superexperts.data.corpora import check_column, local_data, require_corpus
from superexperts.profiling.criterion import PEAK_FIELDS, considered, layers_below, peak, super_experts_of
from superexperts.profiling.prominence import prominence_on, warning

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

__all__ = ["ProfileConfig", "run", "show"]

QUICK_LENGTH = 64
"""Tokens of a sequence in a quick look. Attention sinks, and with them super experts, show on the first tokens."""
QUICK_SEQUENCES = 32
"""Sequences of a quick look at most."""
SINK_SEQUENCES = 8
"""Sequences on which attention sinks are measured, the first ones of the first corpus."""
SECTIONS = ".sections"
"""Folder in `out` that keeps finished corpora until all are done."""
WRITTEN = re.compile(
    r"(manifest|profile|stability|sinks)\.json|((heatmap|layers|top)-.+|corpora|sinks)\.(png|svg)|\..+\.tmp"
)
"""Names of the files that the command writes to `out`, unfinished ones included. Other files there are left alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig(ModelConfig):
    """Measure what every expert writes: peaks of |down_proj output| per (layer, expert), and which tokens it gets.

    Example: superexperts profile pocket --corpus pocket --out runs/profile
    """

    corpus: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """`pocket`, `math`, `medical`, `legal`, `wikitext2`, `c4`, `tinystories`, `multilingual`,
    `multilingual-LANG`, a .txt / .jsonl / .jsonl.gz file, or a Hub data set as OWNER/NAME[:CONFIG[:SPLIT]][@REVISION];
    may be given several times. Default: pocket."""
    column: str | None = None
    """Column of a .jsonl file or Hub data set that holds the text; default: text."""
    out: Path = Path("runs/profile")
    """Folder for profile.json and the pictures."""
    tokens: int = 16384
    """Tokens per corpus, the BOS of each sequence included."""
    seq_len: int = 512
    """Tokens per sequence."""
    batch_size: int = 8
    """Sequences per forward pass."""
    stream: Switch = False
    """Keep only one decoder layer in memory at a time and read the others from the checkpoint; chosen for any
    model that does not fit."""
    quick: Switch = False
    """Take a quick look: streamed, a few sequences of 64 tokens, and more until the super experts stay the same. Only
    experts that a token reaches are read."""
    activation_budget: float = 4.0
    """GiB of hidden states that --stream keeps in memory between layers; any more go to a file in --out."""
    device_map: Literal["none", "auto"] = "none"
    """`auto` spreads a model that is not streamed over several GPUs."""
    depth: float = 0.75
    """Share of the layers that are run and that the criterion considers; 1.0 for all."""
    statistic: Statistic = "all"
    """Peaks of the criterion: over all tokens, over the first one of each sequence that an expert sees, or over the one
    that the paper's reference profiler reads."""
    sinks: Switch = False
    """Also measure the attention on the first token, with all experts and with the super experts silent."""
    data_dir: Path | None = None
    """Folder of local data files instead of the Hub; default: the environment's SUPEREXPERTS_DATA."""
    overwrite: Switch = False
    """Replace a finished result of other settings or files in --out; the old one stays until the new one is whole."""
    json: Switch = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        require_sequences(self.tokens, min(self.seq_len, QUICK_LENGTH) if self.quick else self.seq_len)
        require_device(self.device)
        require(self.batch_size >= 1, "batch_size", self.batch_size, "is not positive; give at least 1")
        require(0 < self.depth <= 1, "depth", self.depth, "is out of range; give a share over 0, up to 1")
        require(
            0 <= self.activation_budget < math.inf,
            "activation_budget",
            self.activation_budget,
            "is not a size; give GiB, 0 or more",
        )
        streamed = "quick" if self.quick else "stream"
        require(
            not (self.sinks and (self.quick or self.stream)),
            "sinks",
            True,
            "needs the model in memory; leave out ",
            Field(streamed),
        )
        require(
            self.device_map == "none" or not (self.quick or self.stream),
            "device_map",
            self.device_map,
            "is for models in memory; leave out ",
            Field(streamed),
        )


def check(config: ProfileConfig) -> None:
    """What is wrong without reading the files, before any library is imported."""
    local_folder(config.model)
    for name in config.corpus:
        require_corpus(name)
    check_column(config.column, config.corpus or ("pocket",))
    local_data(config.data_dir)


def run(config: ProfileConfig) -> dict[str, Any]:
    """Profiles each corpus, writes profile.json and the pictures, and returns the numbers that `show` prints.

    Of several processes only the first returns numbers.
    """
    from superexperts.core.distributed import from_main_process
    from superexperts.data.corpora import documents
    from superexperts.data.packing import digest_ids, pack
    from superexperts.models.loading import load_tokenizer

    started = time.monotonic()
    source = resolve(config.model, config.revision, trust_remote_code=config.trust_remote_code)
    if config.out.resolve().is_relative_to(source.folder.resolve()):
        raise OutputError(f"{config.out} is ", Field("model"), " itself or in it; choose another folder", field="out")
    config = _with_open_settings(config, source)
    names = tuple(dict.fromkeys(config.corpus)) or ("pocket",)
    tokenizer = load_tokenizer(source)
    check_column(config.column, names)
    sequences = {
        name: pack(
            documents(name, config.column or "text", local_data(config.data_dir)),
            tokenizer,
            corpus=name,
            tokens=config.tokens,
            seq_len=config.seq_len,
        )
        for name in names
    }
    inputs = identity(
        config,
        model=source.fingerprint,
        corpora={name: digest_ids(ids_BL) for name, ids_BL in sequences.items()},
    )
    if from_main_process(inputs) != inputs:
        raise OptionError(
            "the processes read different models or texts; give all of them the same files", field="corpus"
        )
    if not from_main_process(completed(config.out, "profile", inputs, overwrite=config.overwrite)):
        _measure(config, source, sequences, inputs, started)
    elif is_main_process:
        note(f"profile: {config.out} is up to date, nothing to do")
    return _summary(Profile.load(config.out), config, tokenizer) if is_main_process else {}


def _with_open_settings(config: ProfileConfig, source: ModelSource) -> ProfileConfig:
    """Decides what the settings leave open and the numbers depend on: streaming, the dtype, and the size of a quick
    look's text."""
    from superexperts.checkpoints import float8
    from superexperts.core.distributed import from_main_process, is_distributed
    from superexperts.models.loading import dtype_to_run, fits_in_memory, settings_of

    if config.quick and is_distributed():
        raise OptionError("runs in one process only; start it without accelerate launch", field="quick")
    if not (config.stream or config.quick):
        # transformers builds a quantized checkpoint with other experts modules than those that can be measured.
        quantized = float8.is_quantized(settings_of(source))
        if from_main_process(
            quantized or (config.device_map == "none" and not fits_in_memory(source, config.device, config.dtype))
        ):
            why = "is quantized" if quantized else "does not fit in memory"
            if config.sinks:
                raise OptionError(f"needs the model in memory, and it {why}; leave it out", field="sinks")
            config = dataclasses.replace(config, stream=True)
            note(f"profile: the model {why}, so it is streamed one layer at a time (stream)")
    if config.dtype == "auto":
        dtype: Any = dtype_to_run(source, config.device, "auto", streamed=config.stream or config.quick)
        config = dataclasses.replace(config, dtype=dtype)
    if config.quick:
        seq_len = min(config.seq_len, QUICK_LENGTH)
        tokens = min(config.tokens, QUICK_SEQUENCES * seq_len)
        config = dataclasses.replace(config, seq_len=seq_len, tokens=tokens)
    return config


def _measure(
    config: ProfileConfig,
    source: ModelSource,
    sequences: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
    started: float,
) -> None:
    """Profiles each corpus that an interrupted run has not finished, and writes all files."""
    from superexperts.core.distributed import from_main_process
    from superexperts.models.banks import find_banks
    from superexperts.models.decoder import num_layers, text_config
    from superexperts.profiling.measure import opened

    with opened(
        source,
        way="quick" if config.quick else "streamed" if config.stream else "in memory",
        device=config.device,
        dtype=config.dtype,
        spread=config.device_map == "auto",
        depth=config.depth,
        statistic=config.statistic,
        batch_size=config.batch_size,
        budget=int(config.activation_budget * 2**30),
        folder=config.out,
    ) as (model, profile_one):
        context = getattr(text_config(model), "max_position_embeddings", None)  # a state-space model has no limit
        if context is not None and config.seq_len > context:
            raise OptionError(
                f"{config.seq_len} is over the model's context of {context}; give at most that", field="seq_len"
            )
        find_banks(model)  # a model without experts is refused before anything is written
        prepare_folder(config.out)

        def profile_of(corpora: Mapping[str, CorpusProfile]) -> Profile:
            return Profile(
                model=config.model,
                num_layers=num_layers(model),
                depth=config.depth,
                statistic=config.statistic,
                corpora=corpora,
            )

        files = {name: _section(config.out, inputs, name) for name in sequences}
        # The main process looks for all: on a shared disk, one process could see a file that another does not see
        # yet.
        finished: dict[str, CorpusProfile] = from_main_process(
            {name: Profile.load(file).corpora[name] for name, file in files.items() if file.is_file()}
        )
        corpora: dict[str, CorpusProfile] = {}
        for name, ids_BL in sequences.items():
            if name in finished:
                note(f"profile: {name} was finished before, kept")
                corpora[name] = finished[name]
                continue
            corpora[name] = profile_one(name, ids_BL)
            if is_main_process:
                write_json(files[name], profile_of({name: corpora[name]}).to_json())
        if is_main_process:
            outputs = _write(config, profile_of(corpora), model, sequences)
            write_manifest(config.out, "profile", inputs, outputs, time.monotonic() - started)
            shutil.rmtree(config.out / SECTIONS)


def _section(out: Path, inputs: Mapping[str, Any], name: str) -> Path:
    """The file that keeps the profile of one corpus until all are done. Its name depends on everything that the numbers
    depend on."""
    alone = {**inputs, "corpora": {name: inputs["corpora"][name]}, "options": {**inputs["options"], "corpus": name}}
    return out / SECTIONS / f"{input_key('profile', alone)[:32]}.json"


def _write(config: ProfileConfig, profile: Profile, model: nn.Module, sequences: Mapping[str, Tensor]) -> list[str]:
    """Replaces the files of an earlier run; returns the names of the new ones."""
    from superexperts.profiling.plots import draw_pictures
    from superexperts.profiling.stability import stability

    for old in config.out.iterdir():
        if WRITTEN.fullmatch(old.name):
            old.unlink()  # an earlier run may have had other corpora, so writing over its files is not enough
    write_json(config.out / "profile.json", profile.to_json())
    outputs = ["profile.json", *draw_pictures(profile, config.out)]
    if len(profile.corpora) > 1:
        write_json(config.out / "stability.json", stability(profile))
        outputs.append("stability.json")
    if config.sinks:
        name = next(iter(profile.corpora))
        outputs += _write_sinks(profile, name, model, sequences[name][:SINK_SEQUENCES], config.out)
    return outputs


def _write_sinks(profile: Profile, name: str, model: nn.Module, ids_BL: Tensor, out: Path) -> list[str]:
    """Measures the attention sinks on sequences of a corpus, with and without its super experts."""
    from superexperts.profiling.sinks import compare_sinks, plot_sinks

    experts = [row.key for row in super_experts_of(profile, profile.corpora[name])]
    if not experts:
        note(f"profile: sinks: {name} shows no super expert to silence, so the sinks are not measured")
        return []
    report = compare_sinks(model, ids_BL, experts, name=profile.model, corpus=name)
    write_json(out / "sinks.json", report.to_json())
    pictures = [out / "sinks.png", out / "sinks.svg"]
    plot_sinks(report, pictures)
    return ["sinks.json", *(path.name for path in pictures)]


def _summary(profile: Profile, config: ProfileConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """For each corpus the super experts by the paper's criterion, the ten largest peaks and how many experts no token
    reached."""
    from superexperts.profiling.stability import stability

    corpora = {}
    for name, corpus in profile.corpora.items():
        top = sorted(corpus.experts, key=lambda row: -peak(row, profile.statistic))[:10]
        found, standing = super_experts_of(profile, corpus), prominence_on(profile, corpus)
        corpora[name] = {
            "tokens": corpus.tokens,
            "stable": corpus.stable,
            "considered": len(considered(corpus.experts, profile.num_layers, profile.criterion_depth)),
            "super": [row.key for row in found],
            "prominence": [one.sentence for one in standing],
            "warning": warning(standing),
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


def show(result: dict[str, Any]) -> None:
    """Prints, for each corpus, a table of the largest peaks, then the sinks and the agreement of the corpora."""
    for name, corpus in result["corpora"].items():
        found = {tuple(key) for key in corpus["super"]}
        found_text = f"{len(found)} super expert{'s' * (len(found) != 1)}"
        if not corpus["considered"]:
            found_text = "no super experts: all MoE layers are beyond the three quarters that the criterion considers"
        details = f"{found_text}; experts reached by no token: {corpus['unreached']}"
        if corpus["stable"] is not None:
            stable = "the same" if corpus["stable"] else "not the same"
            details += f"; {stable} over the last rounds of the quick look"
        if result["layers_run"] < result["num_layers"]:
            details += f"; layers 0 to {result['layers_run'] - 1} of {result['num_layers']} were run (--depth)"
        title = f"peaks of |down_proj output|: {result['model']} on {name}, {corpus['tokens']:,} tokens"
        table = Table(title=title)
        for column in ("expert", "peak", "channel", "position", "token", "tokens routed", "super"):
            table.add_column(column, justify="left" if column in ("expert", "token", "super") else "right")
        for row in corpus["top"]:
            key = (row["layer"], row["expert"])
            table.add_row(
                key_name(key),
                f"{row[PEAK_FIELDS[result['statistic']]] or 0:.4g}",
                str(row["channel"]),
                str(row["position"]),
                Text(ascii(row["token"])),
                f"{row['tokens']:,}",
                "yes" if key in found else "",
            )
        stdout.print(table)
        stdout.print(details, soft_wrap=True)
        for sentence in corpus["prominence"]:
            stdout.print(sentence, soft_wrap=True)
        if corpus["warning"]:
            stdout.print(f"warning: {corpus['warning']}", soft_wrap=True)
    if result["sinks"] is not None:
        for row in result["sinks"]["layers"]:
            before, after = (100 * sum(row[side]) / len(row[side]) for side in ("before", "after"))
            decay = "no head has a sink" if row["decay"] is None else f"decay (D_sink) {100 * row['decay']:.1f}%"
            shares = f"{before:.1f}% of attention on the first token, {after:.1f}% without them"
            stdout.print(f"layer {row['layer']}: {shares}; {decay}", soft_wrap=True)
    if result["stability"] is not None:
        from superexperts.profiling.stability import show_stability

        show_stability(result["stability"])
    stdout.print(f"in {result['out']}", soft_wrap=True)
