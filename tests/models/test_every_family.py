"""Every family of transformers with swappable experts, tiny, through the commands: the table in docs/families.md.

`python -m tests.models.test_every_family` writes that table anew.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from superexperts.checkpoints import float8
from superexperts.checkpoints.reader import SINGLE
from superexperts.checkpoints.source import resolve
from superexperts.core.errors import UserError
from superexperts.core.types import CorpusProfile
from superexperts.models.banks import find_banks
from superexperts.models.experts import down_weight
from superexperts.models.loading import auto_class, empty_model, load_model, settings_of
from superexperts.models.streaming import StreamedModel
from superexperts.profiling.measure import profile_corpus
from superexperts.profiling.sinks import attention_sinks
from superexperts.profiling.streamed import profile_streamed, quick_look
from superexperts.surgery import compare, prune, restore
from tests.support.every_family import TEXT, WRAPPED, every_config
from tests.support.families import FAMILIES, MORE_FAMILIES, tiny_tokens

DOCS = Path(__file__).parents[2] / "docs" / "families.md"
COMMANDS = ("profile", "--stream", "--quick", "--sinks", "prune", "compare", "restore", "remove")
EVERY = sorted({*FAMILIES, *MORE_FAMILIES, *TEXT, *WRAPPED})
IDS_SL = tiny_tokens(4, 16)


class Family:
    """A tiny checkpoint with one expert that writes far more than all others, and what each command makes of it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.base = name, folder, folder / "base"
        settings = every_config(name)
        model = auto_class(settings).from_config(settings).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                # Of zaya's transformers sets the last of these to -1 after loading, whatever the checkpoint says.
                if tensor.is_floating_point() and not key.endswith("balancing_biases"):
                    noise = torch.randn(tensor.shape, generator=generator) * 0.2
                    tensor.copy_(noise + 1 if bool((tensor == 1).all()) else noise)
            self.banks = find_banks(model)
            layer = self.banks[0].layer
            rows = [
                row for row in profile_corpus(model, IDS_SL).experts if row.layer == layer and row.expert != "shared"
            ]
            self.planted = max(rows, key=lambda row: row.tokens).key
            down_weight(self.banks[0].module)[int(self.planted[1])] *= 100
        model.save_pretrained(self.base)
        self.experts = f"L{layer}E{self.planted[1]}"
        self.source = resolve(str(self.base))
        self.loaded: nn.Module | None = None
        self.in_memory: CorpusProfile | None = None

    def profile(self) -> None:
        self.loaded = load_model(self.source, device="cpu")
        self.in_memory = profile_corpus(self.loaded, IDS_SL, batch_size=2)
        assert top(self.in_memory) == self.planted

    def stream(self) -> None:
        runs = []
        for _ in range(3):
            with float8.opened(self.base, settings_of(self.source)) as checkpoint:
                streamed = StreamedModel(empty_model(self.source), checkpoint, torch.device("cpu"))
                runs.append(profile_streamed(streamed, IDS_SL, batch_size=2))
        assert runs[0] == runs[1] == runs[2]
        if self.in_memory is not None:
            for one, other in zip(self.in_memory.experts, runs[0].experts, strict=True):
                assert (one.key, one.tokens) == (other.key, other.tokens)
                assert other.output_max == pytest.approx(one.output_max, rel=1e-4, abs=1e-6)

    def quick(self) -> None:
        with float8.opened(self.base, settings_of(self.source)) as checkpoint:
            streamed = StreamedModel(empty_model(self.source), checkpoint, torch.device("cpu"))
            assert top(quick_look(streamed, IDS_SL, depth=1.0, statistic="all")) == self.planted

    def sinks(self) -> None:
        assert self.loaded is not None
        shares = attention_sinks(self.loaded, IDS_SL[:2])
        assert all(0 <= share <= 1 for layer in shares.values() for share in layer)

    def prune(self) -> None:
        prune.run(prune.PruneConfig(model=str(self.base), experts=self.experts, out=self.folder / "pruned"))
        pruned = load_model(resolve(str(self.folder / "pruned")), device="cpu")
        peaks = {row.key: row.output_max for row in profile_corpus(pruned, IDS_SL).experts}
        assert peaks[self.planted] == 0
        before, after = (load_file(self.folder / name / SINGLE) for name in ("base", "pruned"))
        assert before.keys() == after.keys()
        changed = [key for key in before if not torch.equal(before[key], after[key])]
        assert len(changed) in (1, 2), "only down_proj, and a bias of it"

    def compare(self) -> None:
        base, pruned = str(self.base), str(self.folder / "pruned")
        found = compare.run(compare.CompareConfig(a=base, b=pruned, expect_only=self.experts))
        assert found["exit_code"] == 0, found["failed"]
        assert not found["expected_but_identical"]

    def restore(self) -> None:
        out = self.folder / "restored"
        restore.run(restore.RestoreConfig(folder=self.folder / "pruned", out=out))
        assert (out / SINGLE).read_bytes() == (self.base / SINGLE).read_bytes()

    def remove(self) -> None:
        experts = ",".join(f"L{bank.layer}E{self.planted[1]}" for bank in self.banks)
        out = self.folder / "removed"
        prune.run(prune.PruneConfig(model=str(self.base), experts=experts, mode="remove", out=out))
        removed = load_model(resolve(str(out)), device="cpu")
        assert [bank.num_experts + 1 for bank in find_banks(removed)] == [bank.num_experts for bank in self.banks]
        assert profile_corpus(removed, IDS_SL).tokens == IDS_SL.numel()


def top(corpus: CorpusProfile) -> tuple[int, int | str]:
    return max(corpus.experts, key=lambda row: row.output_max).key


def lines(name: str, folder: Path) -> list[str]:
    """The family's row in the table, and a line for each refusal."""
    family = Family(name, folder)
    ways: tuple[Callable[[], None], ...] = (
        family.profile, family.stream, family.quick, family.sinks, family.prune, family.compare, family.restore,
        family.remove,
    )  # fmt: skip
    cells, notes = [], []
    for command, way in zip(COMMANDS, ways, strict=True):
        try:
            way()
            cells.append("yes")
        except UserError as error:
            said = " ".join(str(error).split()).replace(str(folder), "DIR")
            cells.append("refused")
            notes.append(f"- {name}, `{command}`: {said}")
    return [f"| {name} | {' | '.join(cells)} |", *notes]


@pytest.mark.parametrize("name", EVERY)
def test_a_family_does_what_the_table_says(name: str, tmp_path: Path) -> None:
    """Every number that a cell stands for is checked: peaks, streamed against in memory, bytes, loaded results."""
    documented = DOCS.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines(name, tmp_path) if line not in documented] == []


def _write() -> None:
    text = DOCS.read_text(encoding="utf-8")
    start = text.index("| family |")
    rows, notes = [], []
    for name in EVERY:
        with tempfile.TemporaryDirectory() as folder:
            row, *more = lines(name, Path(folder))
        print(row, *more, sep="\n", flush=True)
        rows.append(row)
        notes += more
    head = [f"| family | {' | '.join(COMMANDS)} |", "| --- |" + " --- |" * len(COMMANDS)]
    DOCS.write_text(
        text[:start] + "\n".join([*head, *rows, "", "Refused, and why:", "", *notes]) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    _write()
