"""Model cards of earlier versions name `superexperts.lora.load_adapter`."""

from __future__ import annotations

import importlib
import sys

import pytest

from superexperts.adapters.lora import load_adapter


def test_the_former_place_of_load_adapter_warns_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "superexperts.lora", raising=False)
    with pytest.warns(DeprecationWarning, match=r"import load_adapter from superexperts\.adapters\.lora"):
        former = importlib.import_module("superexperts.lora")
    assert former.load_adapter is load_adapter
