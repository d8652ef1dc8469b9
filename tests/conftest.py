"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real benchmark rows and corpora; tests that need them are skipped where they are missing."""
    folder = Path(os.environ.get("SUPEREXPERTS_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "mmlu_all_test.jsonl.gz").is_file():
        pytest.skip(f"no benchmark rows in {folder}; set SUPEREXPERTS_DATA")
    return folder
