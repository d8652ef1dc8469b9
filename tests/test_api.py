"""The public Python functions: what README shows, and that importing the package loads none of the heavy libraries."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import superexperts as se
from superexperts.core.errors import ModelError, OptionError
from superexperts.core.types import ExpertSet, Profile
from superexperts.pocket import PLANTED

README = Path(__file__).parents[1] / "README.md"


def test_importing_the_package_imports_no_heavy_library() -> None:
    code = "import sys, superexperts; print(sorted({'torch', 'transformers', 'tyro', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_all_names_exist() -> None:
    assert all(getattr(se, name) is not None for name in se.__all__)


@pytest.fixture(scope="module")
def loaded() -> tuple[nn.Module, Any]:
    return se.load("pocket", device="cpu")


@pytest.fixture(scope="module")
def profile(loaded: tuple[nn.Module, Any]) -> Profile:
    return se.profile(*loaded, corpus="pocket", tokens=2048, seq_len=128)


def test_a_profile_finds_the_implanted_super_experts(profile: Profile) -> None:
    assert set(se.select(profile, rule="super").experts) == set(PLANTED)


def test_a_random_control_is_like_another_set(profile: Profile) -> None:
    chosen = se.select(profile)
    control = se.select(profile, "random", like=chosen, seed=3)
    assert [layer for layer, _ in sorted(control.experts)] == [layer for layer, _ in sorted(chosen.experts)]
    assert not set(control.experts) & set(chosen.experts)
    assert control == se.select(profile, "random", like=chosen, seed=3)


def test_silenced_experts_answer_nothing_and_come_back(loaded: tuple[nn.Module, Any]) -> None:
    model, _ = loaded
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = model(ids).logits
        with se.silenced(model, ExpertSet(model="pocket", rule={}, experts=PLANTED, scores=(None, None))):
            silent = model(ids).logits
        with se.silenced(model, PLANTED):
            assert torch.equal(model(ids).logits, silent)
        assert torch.equal(model(ids).logits, before)
    assert (silent - before).abs().max() > 1


def test_errors_are_sentences_without_dashes(profile: Profile) -> None:
    with pytest.raises(OptionError) as caught:
        se.select(profile, "gate")
    assert str(caught.value) == "rule: gate needs count, share or like"
    with pytest.raises(OptionError, match="rule: 'best' is unknown; choose from super, "):
        se.select(profile, "best")
    with pytest.raises(ModelError, match="model: 'nowhere' is neither a folder nor"):
        se.load("nowhere")


def test_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert block
    names: dict[str, Any] = {}
    exec(block[1], names)
    assert set(names["chosen"].experts) == set(PLANTED)
