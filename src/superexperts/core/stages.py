"""The version of every stage: what decides, together with its inputs, whether a result on disk is still up to date.

Raise a stage's version in the same change that can change its numbers, or the files that it writes. Every user's
results of that stage then count as old, and the stage runs again. Leave it alone for everything else (comments,
names, messages, speed): an upgrade must not train or evaluate anything again without need.

A change further down counts for all stages that it reaches. A different prompt, for example, changes `train` and
`evaluate`, and different attention code changes `profile` as well.
"""

from __future__ import annotations

__all__ = ["STAGE_VERSIONS", "stage_version"]

STAGE_VERSIONS = {
    "pocket": 1,
    "pocket-data": 1,
    "profile": 2,
    "prune": 1,
    "restore": 1,
    "compare": 1,
    "train": 2,
    "export": 2,
    "import": 2,
    "evaluate": 3,
    "extract": 2,
    "study": 2,
    "report": 1,
}
"""Name of the stage in `manifest.json` -> its version, in the order in which a study runs them. Version 1
includes the manifests without a version, which superexperts 0.1.0 wrote."""


def stage_version(stage: str) -> int:
    """The version of a stage; `KeyError` for a stage without an entry in the table."""
    if stage not in STAGE_VERSIONS:
        raise KeyError(f"stage {stage!r} has no version; add it to STAGE_VERSIONS in core/stages.py")
    return STAGE_VERSIONS[stage]
