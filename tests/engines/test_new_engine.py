"""An engine is one module with `open_engine`, and one line in the registry."""

from __future__ import annotations

import sys
import types

import pytest

from superexperts.core.errors import OptionError
from superexperts.engines import ENGINES, Engine, Opening, open_engine, require_engine


def test_a_new_engine_is_a_module_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("fake_engine")
    vars(module)["open_engine"] = lambda opening: ("opened", opening.model, opening.max_new_tokens)
    monkeypatch.setitem(sys.modules, "fake_engine", module)
    monkeypatch.setitem(ENGINES, "fake", Engine(help="a fake", module="fake_engine"))
    assert open_engine("fake", Opening(model="m", max_new_tokens=7)) == ("opened", "m", 7)
    monkeypatch.setitem(ENGINES, "fake", Engine(help="a fake", module="fake_engine", package="no_such_package"))
    with pytest.raises(OptionError, match="judge_engine: 'fake' needs the package no_such_package"):
        require_engine("fake", "judge_engine")
