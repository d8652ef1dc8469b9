"""What differs between two checkpoints, tensor by tensor and expert by expert, read side by side without a model."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from superexperts.checkpoints.reader import Checkpoint
from superexperts.checkpoints.source import CONFIG_FILE, ModelSource, adapter_folder, resolve
from superexperts.core.config_surgery import CompareConfig
from superexperts.core.console import note, progress
from superexperts.core.errors import ExpertsError, ModelError
from superexperts.core.runs import fingerprint, new_folder, read_json, write_json, write_manifest
from superexperts.core.types import ExpertKey, ExpertSet, key_name, key_order
from superexperts.models.banks import check_experts
from superexperts.models.decoder import num_layers
from superexperts.models.loading import load_structure
from superexperts.models.parts import ModelParts, pair_units
from superexperts.surgery.differences import Difference, Status, Sums, compare_units, count, tensor_sums, total

__all__ = ["run"]

SCHEMA = "superexperts/compare/1"
STATUSES = ("identical", "changed", "reshaped", "missing in A", "missing in B")
ADDED_LATER = ("transformers_version", "_name_or_path")
"""Fields of config.json that say who wrote it, not what the model is."""
RENAMED = {"torch_dtype": "dtype"}
"""Fields that transformers 5 calls otherwise."""
RENUMBERED = (
    "A has {0} experts a layer and B {1}: experts are compared by the numbers that they have now, so many differ that "
    "were only renumbered; `restore` proves what a removal left as it was"
)


def run(config: CompareConfig) -> dict[str, Any]:
    """The command: `exit_code` of the result is 1 where what was expected does not hold, and `failed` says why."""
    started = time.monotonic()
    expected = _expected(config.expect_only)
    adapter = adapter_folder(Path(config.b))
    is_adapter = (adapter / CONFIG_FILE).is_file()
    code = config.trust_remote_code
    one = resolve(config.a, config.revision, trust_remote_code=code, field="a")
    other = None if is_adapter else resolve(config.b, config.revision_b, trust_remote_code=code, field="b")
    folder_a, folder_b = one.folder, adapter if other is None else other.folder
    with Checkpoint(folder_a) as a:
        model_parts = _model_parts(one, a, needed=is_adapter or expected is not None)
        if model_parts is not None and expected is not None:
            check_experts(model_parts.banks, expected, "expect_only")
            model_parts.key_mapping.check_complete(model_parts.model)  # what both lack would differ nowhere
        if other is None:
            assert model_parts is not None
            differences = _with_adapter(model_parts, adapter)
        else:
            with Checkpoint(folder_b) as b:
                theirs = None if model_parts is None else _model_parts(other, b, needed=expected is not None)
                numbers = [] if model_parts is None or theirs is None else [model_parts.num_experts, theirs.num_experts]
                if len(set(numbers)) > 1:
                    note(f"compare: {RENUMBERED.format(*numbers)}")
                both = (a, b) if model_parts is None or theirs is None else (model_parts, theirs)
                units = pair_units(*both)
                differences = []
                with progress("comparing", len(units)) as bar:
                    for difference in compare_units(a, b, units):
                        differences.append(difference)
                        bar()
    settings = [] if is_adapter else _config_differences(folder_a, folder_b)
    result = {
        "a": config.a,
        "b": config.b,
        **_summary(differences),
        "config": settings,
        **_judged(config, expected, differences, settings),
    }
    if config.out is not None:
        _write(config, result, model_parts, started, [folder_a, folder_b])
        result["out"] = str(config.out)
    return result


def _expected(text: str | None) -> tuple[ExpertKey, ...] | None:
    if text is None:
        return None
    try:
        return ExpertSet.parse(text).experts
    except ExpertsError as error:
        raise error.about("expect_only") from error


def _model_parts(source: ModelSource, checkpoint: Checkpoint, *, needed: bool) -> ModelParts | None:
    """What belongs to which expert; None, with a note, for a checkpoint without experts that are known here."""
    try:
        return ModelParts(load_structure(source), checkpoint)
    except ModelError as error:
        if needed:
            raise
        note(f"compare: tensors only, not experts ({error})")
        return None


def _with_adapter(model_parts: ModelParts, adapter: Path) -> list[Difference]:
    """The checkpoint against itself with the adapter merged, as `export --format merged` would write it."""
    from superexperts.adapters.merge import merged_patches  # here, so that two checkpoints do not wait for PEFT

    base = model_parts.checkpoint
    merged = merged_patches(model_parts.model, model_parts.key_mapping, base, adapter, "B")
    patches = {(patch.entry.file, patch.entry.offset, patch.entry.nbytes): patch for patch in merged}
    found = []
    for unit in pair_units(model_parts, model_parts):
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
    """Counts, everything that is not identical, and the same summed for each expert."""
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


def _config_differences(a: Path, b: Path) -> list[str]:
    """The fields of config.json that differ."""
    one, other = _settings(a), _settings(b)
    names = (one.keys() | other.keys()) - {*ADDED_LATER}
    return sorted(name for name in names if one.get(name) != other.get(name))


def _settings(folder: Path) -> dict[str, Any]:
    settings: Any = read_json(folder / "config.json", "model")
    fields: dict[str, Any] = settings if isinstance(settings, dict) else {}
    return {RENAMED.get(name) or name: value for name, value in fields.items()}


def _judged(
    config: CompareConfig,
    expected: Collection[ExpertKey] | None,
    differences: Sequence[Difference],
    settings: Sequence[str],
) -> dict[str, Any]:
    """Whether what was expected holds."""
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
    config: CompareConfig,
    result: dict[str, Any],
    model_parts: ModelParts | None,
    started: float,
    folders: Sequence[Path],
) -> None:
    """compare.json, and the heatmap where there are experts."""
    assert config.out is not None
    with new_folder(config.out, "compare") as temporary:
        write_json(temporary / "compare.json", {"schema": SCHEMA, **result})
        if model_parts is not None:
            from superexperts.surgery.plots import (
                plot_changes,  # here, so that a comparison without --out does not wait for it
            )

            norms = {
                parse_name(row["expert"]): row["relative_norm"] if row["statuses"] == ["changed"] else None
                for row in result["experts"]
            }
            sizes = {bank.layer: bank.num_experts for bank in model_parts.banks}
            shared = [bank.layer for bank in model_parts.banks if bank.shared_down is not None]
            title = f"{Path(config.a).name} and {Path(config.b).name}"
            for kind in ("png", "svg"):
                path = temporary / f"compare.{kind}"
                plot_changes(norms, num_layers(model_parts.model), sizes, shared, title, path)
        outputs = sorted(file.name for file in temporary.iterdir())
        inputs = {"folders": [fingerprint(folder) for folder in folders]}
        write_manifest(temporary, "compare", inputs, outputs, time.monotonic() - started)


def parse_name(name: str) -> ExpertKey:
    """`L2E54` -> `(2, 54)`."""
    return ExpertSet.parse(name).experts[0]
