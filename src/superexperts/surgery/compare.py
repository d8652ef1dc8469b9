"""The command `compare`: what differs between two checkpoints, tensor by tensor and expert by expert.

The checkpoints are read side by side, without loading a model. What needs torch or transformers is imported in the
functions, so that help and wrong options answer at once.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

from superexperts.checkpoints.reader import Checkpoint
from superexperts.checkpoints.source import ModelSource, adapter_folder, is_adapter, local_folder, resolve
from superexperts.core.console import note, progress, stdout
from superexperts.core.errors import Field, ModelError
from superexperts.core.runs import fingerprint, new_folder, write_json, write_manifest
from superexperts.core.settings import Switch, require
from superexperts.core.types import ExpertKey, ExpertSet, key_name, key_order
from superexperts.surgery.differences import Difference, Status, Sums, compare_units, count, tensor_sums, total

if TYPE_CHECKING:
    from superexperts.models.parts import ModelParts

__all__ = ["CompareConfig", "run", "show"]

SCHEMA = "superexperts/compare/1"
STATUSES = ("identical", "changed", "reshaped", "missing in A", "missing in B")
ADDED_LATER = ("transformers_version", "_name_or_path")
"""Fields of config.json that say which program wrote it, not what the model is."""
RENAMED = {"torch_dtype": "dtype"}
"""Older names of fields -> their names in transformers 5."""
B = "a checkpoint folder, a model on the Hub (OWNER/NAME), `pocket`, or an adapter folder"
"""What B can be, for errors."""
MOST_ROWS = 20
"""Rows of a table in the terminal at most."""
RENUMBERED = (
    "A has {0} experts a layer and B {1}: experts are compared by their present numbers, so many that were only "
    "renumbered differ; `restore` proves what a removal left unchanged"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Show what differs between two checkpoints, or between a checkpoint and the same with an adapter merged.

    Example: superexperts compare pocket runs/pruned --expect-only L1E11,L3E54
    """

    a: Positional[Annotated[str, tyro.conf.arg(metavar="A")]]
    """Checkpoint folder, Hub name, or `pocket`."""
    b: Positional[Annotated[str, tyro.conf.arg(metavar="B")]]
    """Another checkpoint, or the folder of an adapter."""
    expect_identical: Switch = False
    """Exit code 1 if anything differs."""
    expect_only: str | None = None
    """Exit code 1 if anything but these experts (experts.json or inline) differs."""
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


def run(config: CompareConfig) -> dict[str, Any]:
    """Compares A and B. If what was expected does not hold, `exit_code` in the result is 1 and `failed` says why."""
    started = time.monotonic()
    expected = _expected(config.expect_only)
    adapter = adapter_folder(Path(config.b)) if is_adapter(Path(config.b)) else None
    code = config.trust_remote_code
    one = resolve(config.a, config.revision, trust_remote_code=code, field="a")
    other = None
    if adapter is None:
        other = resolve(config.b, config.revision_b, trust_remote_code=code, field="b", what=B)
    with Checkpoint(one.folder, one.field) as a:
        parts = _parts_of(one, a, needed=adapter is not None or expected is not None)
        if parts is not None and expected is not None:
            from superexperts.models.banks import check_experts

            check_experts(parts.banks, expected, "expect_only")
            parts.key_mapping.check_complete(parts.model)  # a tensor that both lack would not show as a difference
        if other is None:
            assert parts is not None
            assert adapter is not None
            differences = _with_adapter(parts, adapter)
        else:
            with Checkpoint(other.folder, other.field) as b:
                other_parts = None if parts is None else _parts_of(other, b, needed=expected is not None)
                differences = _between(a, b, parts, other_parts)
    settings = [] if other is None else _config_differences(one, other)
    result = {
        "a": config.a,
        "b": config.b,
        **_summary(differences),
        "config": settings,
        **_judged(config, expected, differences, settings),
    }
    if config.out is not None:
        second = other.folder if other is not None else adapter
        assert second is not None
        _write(
            config,
            result,
            parts,
            started,
            [one.folder, second],
        )
        result["out"] = str(config.out)
    return result


def check(config: CompareConfig) -> None:
    """What is wrong without looking into the files, before any library is imported."""
    local_folder(config.a, field="a")
    if not is_adapter(Path(config.b)):
        local_folder(config.b, field="b", what=B)
    _expected(config.expect_only)


def _expected(text: str | None) -> tuple[ExpertKey, ...] | None:
    return None if text is None else ExpertSet.parse(text, "expect_only").experts


def _between(a: Checkpoint, b: Checkpoint, one: ModelParts | None, other: ModelParts | None) -> list[Difference]:
    """Every part of two checkpoints; parts are paired by expert if the structure of both is known, else by key."""
    from superexperts.models.parts import pair_units

    if one is not None and other is not None:
        if one.num_experts != other.num_experts:
            note(f"compare: {RENUMBERED.format(one.num_experts, other.num_experts)}")
        units = pair_units(one, other)
    else:
        units = pair_units(a, b)
    differences = []
    with progress("comparing", len(units)) as bar:
        for difference in compare_units(a, b, units):
            differences.append(difference)
            bar()
    return differences


def _parts_of(source: ModelSource, checkpoint: Checkpoint, *, needed: bool) -> ModelParts | None:
    """Which tensors belong to which expert; None, with a note, for a checkpoint without known experts."""
    from superexperts.models.loading import load_structure
    from superexperts.models.parts import ModelParts

    try:
        parts = ModelParts(load_structure(source), checkpoint)
        if needed and not parts.key_mapping.quantized:
            parts.key_mapping.check_complete(parts.model)
            if (bank := parts.unknown) is not None:
                raise ModelError(
                    f"{source.name!r} keeps the experts of layer {bank.layer} in an order that only transformers' "
                    "conversion undoes, so its tensors cannot be assigned to experts; compare without ",
                    Field("expect_only"),
                    field=source.field,
                )
        return parts
    except ModelError as error:
        if needed:
            raise
        note(f"compare: tensors only, not experts ({error})")
        return None


def _with_adapter(parts: ModelParts, adapter: Path) -> list[Difference]:
    """The checkpoint against itself with the adapter merged, as `export --format merged` would write it."""
    from superexperts.adapters.merge import merged_patches
    from superexperts.models.parts import pair_units

    base = parts.checkpoint
    merged = merged_patches(parts.model, parts.key_mapping, base, adapter, "B")
    patches = {(patch.entry.file, patch.entry.offset, patch.entry.nbytes): patch for patch in merged}
    found = []
    for unit in pair_units(parts, parts):
        (entry,) = unit.a
        patch = patches.pop((entry.file, entry.offset, entry.nbytes), None)
        if patch is None:
            found.append(Difference(unit=unit, status="identical", sums=Sums(elements=count(unit.a)), bytes=0))
        else:
            sums = tensor_sums(base.read(entry), patch.data())
            status: Status = "changed" if sums.changed else "identical"
            found.append(Difference(unit=unit, status=status, sums=sums, bytes=entry.nbytes))
    assert not patches, "every part of the checkpoint is in some unit"
    return found


def _summary(differences: Sequence[Difference]) -> dict[str, Any]:
    """Counts of parts, every part that is not identical, and the sums for each expert."""
    experts: dict[ExpertKey, list[Difference]] = defaultdict(list)
    for found in differences:
        if found.expert is not None:
            experts[found.expert].append(found)
    rows = []
    for key in sorted(experts, key=key_order):
        changed = [found for found in experts[key] if found.status != "identical"]
        if changed:
            rows.append(
                {
                    "expert": key_name(key),
                    "parts": len(experts[key]),
                    "not_identical": len(changed),
                    "statuses": sorted({found.status for found in changed}),
                    **total(found.sums for found in changed).to_json(),
                }
            )
    counts = Counter(str(found.status) for found in differences)
    return {
        "parts": {status: counts[status] for status in STATUSES},
        "bytes": sum(found.bytes for found in differences),
        "experts": rows,
        "differences": [found.to_json() for found in differences if found.status != "identical"],
    }


def _config_differences(a: ModelSource, b: ModelSource) -> list[str]:
    """The fields of config.json that differ."""
    one, other = _settings(a), _settings(b)
    names = (one.keys() | other.keys()) - {*ADDED_LATER}
    return sorted(name for name in names if one.get(name) != other.get(name))


def _settings(source: ModelSource) -> dict[str, Any]:
    fields: dict[str, Any] = source.config if isinstance(source.config, dict) else {}
    return {RENAMED.get(name) or name: value for name, value in fields.items()}


def _judged(
    config: CompareConfig,
    expected: Collection[ExpertKey] | None,
    differences: Sequence[Difference],
    settings: Sequence[str],
) -> dict[str, Any]:
    """Whether what was expected holds; without an expectation, exit code 0."""
    if expected is None and not config.expect_identical:
        return {"exit_code": 0, "failed": None, "expected_but_identical": []}
    allowed = expected or ()
    wrong = [found for found in differences if found.status != "identical" and found.expert not in allowed]
    changed = {found.expert for found in differences if found.status != "identical"}
    failed = None
    if wrong:
        what = f"beyond {', '.join(map(key_name, allowed))}" if allowed else "between A and B"
        failed = f"{len(wrong)} differences {what}; the first: {wrong[0].unit.key!a} is {wrong[0].status}"
    elif settings:
        failed = f"config.json differs in {', '.join(map(ascii, settings))}"
    return {
        "exit_code": 0 if failed is None else 1,
        "failed": failed,
        "expected_but_identical": [key_name(key) for key in allowed if key not in changed],
    }


def _write(
    config: CompareConfig, result: dict[str, Any], parts: ModelParts | None, started: float, folders: Sequence[Path]
) -> None:
    """Writes compare.json, and the heatmap if experts are known."""
    assert config.out is not None
    with new_folder(config.out, "compare") as temporary:
        write_json(temporary / "compare.json", {"schema": SCHEMA, **result})
        if parts is not None:
            from superexperts.models.decoder import num_layers
            from superexperts.surgery.plots import plot_changes

            norms = {}
            for row in result["experts"]:
                (key,) = ExpertSet.parse(row["expert"]).experts
                norms[key] = row["relative_norm"] if row["statuses"] == ["changed"] else None
            sizes = {bank.layer: bank.num_experts for bank in parts.banks}
            shared = [bank.layer for bank in parts.banks if bank.shared_down is not None]
            title = f"{Path(config.a).name} and {Path(config.b).name}"
            for kind in ("png", "svg"):
                path = temporary / f"compare.{kind}"
                plot_changes(norms, num_layers(parts.model), sizes, shared, title, path)
        outputs = sorted(file.name for file in temporary.iterdir())
        inputs = {"folders": [fingerprint(folder) for folder in folders]}
        write_manifest(temporary, "compare", inputs, outputs, time.monotonic() - started)


def show(result: dict[str, Any]) -> None:
    """Prints the counts, a table of the experts and one of the other tensors that differ, and what was expected."""
    counts = ", ".join(f"{number:,} {status}" for status, number in result["parts"].items() if number)
    stdout.print(f"{result['a']} and {result['b']}: {counts}", soft_wrap=True, markup=False)
    rest = [row for row in result["differences"] if row["expert"] is None]
    for title, first, rows in (("experts", "expert", result["experts"]), ("other tensors", "key", rest)):
        if not rows:
            continue
        table = Table(title=title)
        for column in (first, "status", "relative norm", "max change", "cosine", "elements changed"):
            table.add_column(column, justify="left" if column in (first, "status") else "right", overflow="fold")
        for row in rows[:MOST_ROWS]:
            status = row["status"] if first == "key" else ", ".join(row["statuses"])
            norm, cosine = ("" if row[name] is None else f"{row[name]:.4g}" for name in ("relative_norm", "cosine"))
            share = f"{100 * row['share_changed']:.2f}%"
            table.add_row(Text(ascii(row[first])[1:-1]), status, norm, f"{row['max_change']:.4g}", cosine, share)
        stdout.print(table)
        if len(rows) > MOST_ROWS:
            stdout.print(f"and {len(rows) - MOST_ROWS:,} more {title}; --json or --out has all")
    if result["config"]:
        stdout.print(f"config.json differs in {', '.join(map(ascii, result['config']))}", soft_wrap=True, markup=False)
    if result["expected_but_identical"]:
        stdout.print(f"expected, but identical: {', '.join(result['expected_but_identical'])}", soft_wrap=True)
    if result["failed"] is not None:
        stdout.print(f"NOT AS EXPECTED: {result['failed']}", soft_wrap=True, markup=False)
    if "out" in result:
        stdout.print(f"in {result['out']}", soft_wrap=True)
