"""The commands that work on checkpoints without a model: prune, restore and compare; `config.py` has the others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from superexperts.core.errors import Field
from superexperts.core.settings import CheckpointConfig, Switch, require, require_sequences

__all__ = ["CompareConfig", "PruneConfig", "RestoreConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig(CheckpointConfig):
    """Write a checkpoint in which the chosen experts' down_proj is zero, or in which they are no more.

    Example: superexperts prune pocket --experts runs/super.json --out runs/pruned
    """

    experts: str
    """experts.json, or inline such as L2E54,L3E38."""
    mode: Literal["zero", "mean", "remove"] = "zero"
    """`zero`: down_proj is zero (the paper's); `mean`: they answer their mean output over --corpus, in families with a
    bias to hold it; `remove`: they and their router rows leave, as many from every MoE layer."""
    out: Path = Path("runs/pruned")
    """Folder of the new checkpoint."""
    copy: Switch = False
    """Copy the shards without a change, which otherwise are hard links (symbolic ones into the Hub's cache)."""
    corpus: str = "pocket"
    """mean: names as for profile."""
    column: str | None = None
    """mean: column of a .jsonl file or Hub data set that holds the text; default: text."""
    tokens: int = 16384
    """mean: tokens of the corpus, BOS of each sequence counted."""
    seq_len: int = 512
    """mean: tokens per sequence."""
    batch_size: int = 8
    """mean: sequences per forward pass."""
    device: str = "auto"
    """mean: `cpu`, `cuda`, `cuda:1`; `auto` takes a GPU where there is one."""
    data_dir: Path | None = None
    """mean: folder of local data files instead of the Hub; default: the environment's SUPEREXPERTS_DATA."""
    json: Switch = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        require_sequences(self.tokens, self.seq_len)
        require(self.batch_size >= 1, "batch_size", self.batch_size, "is not positive; give at least 1")
        why = ("does nothing without ", Field("mode"), " mean; leave it out")
        require(self.mode == "mean" or self.column is None, "column", self.column, *why)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestoreConfig:
    """Undo what superexperts.json says was done to a checkpoint: the base's files, bit for bit.

    Example: superexperts restore runs/pruned --out runs/restored
    """

    folder: Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]]
    """Checkpoint with a superexperts.json, as prune writes it."""
    base: str | None = None
    """The checkpoint that it was made from; default: the one that superexperts.json names."""
    revision: str | None = None
    """Branch, tag or commit of it on the Hub; default: the one that superexperts.json names."""
    out: Path = Path("runs/restored")
    """Folder to write."""
    copy: Switch = False
    """Copy the shards, which otherwise are hard links (symbolic ones into the Hub's cache)."""
    trust_remote_code: Switch = False
    """Run Python code that comes with the checkpoint. Only for checkpoints that you trust."""
    json: Switch = False
    """Print the result as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What differs between two checkpoints, or between a checkpoint and the same with an adapter merged.

    Example: superexperts compare pocket runs/pruned --expect-only L1E11,L3E54
    """

    a: Positional[Annotated[str, tyro.conf.arg(metavar="A")]]
    """Checkpoint folder, Hub name, or `pocket`."""
    b: Positional[Annotated[str, tyro.conf.arg(metavar="B")]]
    """Another one, or the folder of an adapter."""
    expect_identical: Switch = False
    """Exit code 1 if anything differs."""
    expect_only: str | None = None
    """Exit code 1 if anything differs but these experts (experts.json or inline)."""
    out: Path | None = None
    """Folder for compare.json and the heatmap; default: nothing is written."""
    revision: str | None = None
    """Branch, tag or commit of A on the Hub."""
    revision_b: str | None = None
    """Branch, tag or commit of B on the Hub."""
    trust_remote_code: Switch = False
    """Run Python code that comes with the checkpoint. Only for checkpoints that you trust."""
    json: Switch = False
    """Print the result as JSON."""

    def __post_init__(self) -> None:
        both = self.expect_identical and self.expect_only is not None
        require(
            not both, "expect_only", self.expect_only, "excludes ", Field("expect_identical"), "; give one of the two"
        )
