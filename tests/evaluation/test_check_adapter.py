"""What check-adapter says of an adapter, and the same gate before an evaluation; token counts against the router's."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from superexperts.adapters import export, lora
from superexperts.adapters.effect import adapter_effect
from superexperts.adapters.export import ExportConfig
from superexperts.adapters.exposure import adapted_experts, counting
from superexperts.cli import main
from superexperts.core.errors import DataError, ModelError, OptionError
from superexperts.core.types import ExpertKey, key_name
from superexperts.evaluation import check_adapter, evaluate
from superexperts.evaluation.check_adapter import CheckAdapterConfig
from superexperts.evaluation.evaluate import EvaluateConfig
from superexperts.models.experts import BankCall, is_bank
from superexperts.models.hooks import tapped
from tests.adapters.test_export import save_adapter, stock, without
from tests.adapters.test_lora import attach, chosen_experts, randomise
from tests.support.families import FAMILIES, tiny_model, tiny_tokens
from tests.training.test_train import save_checkpoint

ALL = sorted(FAMILIES)


def routed(model: nn.Module, rows: list[torch.Tensor], experts: list[ExpertKey]) -> tuple[dict[str, int], float]:
    """By the taps of the plain model: tokens of each expert, and the share of tokens that reach one of them."""
    counts, reached, total = {key_name(key): 0 for key in experts}, 0, 0
    for row in rows:
        hit = torch.zeros(len(row), dtype=torch.bool)

        def tap(call: BankCall, hit: torch.Tensor = hit) -> None:
            for one in call.each():
                if (one.layer, one.expert) in experts:
                    counts[key_name((one.layer, one.expert))] += len(one.token_N)
                    hit[one.token_N] = True

        with torch.no_grad(), tapped(model, tap):
            model(input_ids=row[None], use_cache=False)
        reached, total = reached + int(hit.sum()), total + len(row)
    return counts, reached / total


@pytest.mark.parametrize("family", ALL)
def test_tokens_are_counted_as_the_router_sends_them(family: str) -> None:
    model = tiny_model(family)
    keys = chosen_experts(family, model)[:1]
    rows = [tiny_tokens(1, 12)[0], tiny_tokens(1, 7, seed=3)[0]]
    expected, share = routed(tiny_model(family), rows, keys)
    # A fresh adapter changes nothing, so the tokens go where they go without it.
    effect = adapter_effect(attach(model, keys), rows)
    assert effect.probe_experts == expected
    assert effect.probe_share == pytest.approx(share)
    assert effect.probe_tokens == 19
    assert 0 < share < 1


def test_a_shared_expert_sees_every_token_and_attention_is_no_expert() -> None:
    adapted = attach(tiny_model("deepseek_v2"), [(1, 0), (2, "shared")])
    effect = adapter_effect(adapted, tiny_tokens())
    assert (effect.probe_experts["L2shared"], effect.probe_share) == (32, 1.0)
    attention = lora.attach_attention(tiny_model("deepseek_v2"), r=2, alpha=4, dropout=0.0, seed=0)
    effect = adapter_effect(attention, tiny_tokens())
    assert (effect.probe_experts, effect.probe_share, effect.probe_tokens) == ({}, None, 32)


def test_padding_evaluation_and_what_checkpointing_repeats_are_not_counted() -> None:
    adapted = attach(tiny_model("deepseek_v2"), [(1, 0), (1, 1), (2, 2), (2, "shared")])
    tokens, mask = tiny_tokens(2, 16), torch.ones(2, 16, dtype=torch.int64)
    mask[1, 9:] = 0
    adapted.train()
    with counting(adapted, training=True) as exposure:
        adapted(input_ids=tokens, attention_mask=mask, use_cache=False)
    assert exposure.tokens == exposure.by_expert()["L2shared"] == 25
    plain, _ = routed(tiny_model("deepseek_v2"), [tokens[0], tokens[1, :9]], [(1, 0), (1, 1)])
    assert {name: exposure.by_expert()[name] for name in plain} == plain
    adapted.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    adapted.enable_input_require_grads()
    with counting(adapted, training=True) as again:
        adapted(input_ids=tokens, attention_mask=mask, labels=tokens, use_cache=False).loss.backward()
        adapted.eval()
        adapted(input_ids=tokens, attention_mask=mask, use_cache=False)
    assert again.by_expert() == exposure.by_expert()
    assert not [module for module in adapted.modules() if module._forward_pre_hooks and is_bank(module)]


def test_the_adapted_experts_of_pefts_own_layer_are_those_with_a_b(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", "deepseek_v2")
    keys: list[ExpertKey] = [(1, 3), (2, 0), (2, "shared")]
    adapted = attach(stock(base), keys)
    randomise(adapted)
    own = adapter_effect(adapted, tiny_tokens())
    adapter = save_adapter(adapted, base, tmp_path / "adapter")
    export.run(ExportConfig(adapter=adapter, format="peft", out=tmp_path / "peft"))
    loaded = lora.load_adapter(stock(base), tmp_path / "peft")
    assert adapted_experts(loaded.get_base_model()) == tuple(keys)
    effect = adapter_effect(loaded, tiny_tokens())
    assert (effect.probe_experts, effect.probe_share) == (own.probe_experts, own.probe_share)
    assert effect.max_logit_change == pytest.approx(own.max_logit_change, rel=1e-4)
    assert effect.kl == pytest.approx(own.kl, rel=1e-3)


# ---- the command --------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, family: str = "deepseek_v3") -> Path:
    return save_checkpoint(folder / "base", family)  # deepseek_v3: nothing reaches expert 5 of layers 1 and 2


def adapter_on(base: Path, folder: Path, keys: list[ExpertKey], random: bool = True) -> Path:
    adapted = attach(stock(base), keys)
    if random:
        randomise(adapted)
    return save_adapter(adapted, base, folder)


def settings(base: Path, adapter: Path, **more: Any) -> CheckAdapterConfig:
    return CheckAdapterConfig(
        model=str(base), adapter=adapter, corpus=str(probe_text(base)), tokens=120, seq_len=40, device="cpu", **more
    )


def probe_text(base: Path) -> Path:
    file = base.parent / "probe.txt"
    file.write_text("The rain in Spain stays mainly in the plain, but Đà Lạt is cool. " * 9, encoding="utf-8")
    return file


def test_the_probe_text_may_be_a_column(tmp_path: Path) -> None:
    base = checkpoint(tmp_path)
    adapter = adapter_on(base, tmp_path / "adapter", [(1, 1)])
    reference = check_adapter.run(settings(base, adapter))
    rows = tmp_path / "probe.jsonl"
    rows.write_text(json.dumps({"body": probe_text(base).read_text(encoding="utf-8")}), encoding="utf-8")
    found = check_adapter.run(dataclasses.replace(settings(base, adapter), corpus=str(rows), column="body"))
    assert found == {**reference, "corpus": str(rows)}
    with pytest.raises(OptionError, match="column: 'body' has no effect on pocket"):
        check_adapter.run(dataclasses.replace(settings(base, adapter), corpus="pocket", column="body"))


def command_line(base: Path, adapter: Path) -> list[str]:
    options = ["--corpus", str(probe_text(base)), "--tokens", "120", "--seq-len", "40", "--device", "cpu"]
    return ["check-adapter", str(base), str(adapter), *options]


def test_what_it_says_of_a_good_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = checkpoint(tmp_path)
    adapter = adapter_on(base, tmp_path / "adapter", [(1, 1), (2, 3), (2, "shared")])
    result = check_adapter.run(settings(base, adapter))
    assert (result["keys"], result["probe_tokens"], result["unreached"]) == (18, 120, [])
    assert result["max_logit_change"] > 0.01
    assert result["kl"] > 0
    assert result["probe_share"] == 1.0
    assert 0 < result["probe_experts"]["L1E1"] < result["probe_experts"]["L2shared"] == 120
    before = sorted(tmp_path.rglob("*"))
    assert CheckAdapterConfig(adapter=adapter).corpus == "pocket"
    arguments = command_line(base, adapter)
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(result))
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "18 keys, each in its place" in said
    assert "120 probe tokens of" in said
    assert "; 100.0% reach an adapted expert" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_that_changes_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = checkpoint(tmp_path)
    fresh = adapter_on(base, tmp_path / "fresh", [(1, 1)], random=False)
    unreached = adapter_on(base, tmp_path / "unreached", [(1, 5), (2, 5)])
    with pytest.raises(DataError, match=r"adapter: .*fresh changes no logit of 120 probe tokens; train it"):
        check_adapter.run(settings(base, fresh))
    with pytest.raises(DataError, match=r"no logit of 120 probe tokens \(L1E5, L2E5 saw none of 120 probe tokens\)"):
        check_adapter.run(settings(base, unreached))
    arguments = command_line(base, fresh)
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("superexperts: ") == 1


def test_names_an_expert_that_no_probe_token_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = checkpoint(tmp_path)
    adapter = adapter_on(base, tmp_path / "adapter", [(1, 1), (1, 5)])
    result = check_adapter.run(settings(base, adapter))
    assert result["unreached"] == ["L1E5"]
    said = " ".join(capsys.readouterr().err.split())
    assert "adapter: L1E5 saw none of 120 probe tokens; 1 other adapted expert was reached" in said


def test_keys_without_a_home_and_modules_without_keys(tmp_path: Path) -> None:
    base = checkpoint(tmp_path)
    adapter = adapter_on(base, tmp_path / "adapter", [(1, 1), (2, 3)])
    without(adapter, "lora_B.3_up_proj")
    with pytest.raises(DataError, match=r"adapter: 1 weights of .* are missing \(.*lora_B.3_up_proj"):
        check_adapter.run(settings(base, adapter))
    adapter = adapter_on(base, tmp_path / "more", [(1, 1)])
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.model.layers.1.mlp.experts.lora_A.2_up_proj"] = torch.ones(4, 32)
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(DataError, match=r"1 weights of .* have no place in the model \(.*2_up_proj"):
        check_adapter.run(settings(base, adapter))
    with pytest.raises(DataError, match="nowhere' does not exist"):
        check_adapter.run(settings(base, tmp_path / "nowhere"))


def test_an_adapter_that_peft_loads_without_a_word_but_not_as_it_is(tmp_path: Path) -> None:
    """Keys on a layer that is not there: PEFT warns at most, engines say nothing."""
    base = checkpoint(tmp_path)
    with lora.quiet():
        adapted: PeftModel = get_peft_model(
            stock(base), LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        )
    adapter = save_adapter(adapted, base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file({name.replace("layers.2", "layers.9"): tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(DataError, match="2 weights of .* are missing"):
        check_adapter.run(settings(base, adapter))


# ---- before an evaluation -----------------------------------------------------------------------------------------


def test_evaluate_asks_nothing_with_an_adapter_that_does_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    base = checkpoint(tmp_path)
    fresh = adapter_on(base, tmp_path / "fresh", [(1, 1)], random=False)
    config = EvaluateConfig(
        model=str(base),
        adapter=fresh,
        tasks="gsm8k",
        data_dir=Path("pocket"),
        limit=2,
        max_new_tokens=8,
        out=tmp_path / "out",
        device="cpu",
    )
    with monkeypatch.context() as patch:
        patch.setattr("superexperts.evaluation.ask.ask_one", None)
        with pytest.raises(DataError, match=r"adapter: .*fresh changes no logit of [\d,]+ probe tokens"):
            evaluate.run(config)
    assert not (tmp_path / "out").exists()
    evaluate.run(dataclasses.replace(config, adapter=adapter_on(base, tmp_path / "good", [(1, 1)])))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["effect"]["max_logit_change"] > 0
    assert manifest["effect"]["probe_experts"]["L1E1"] > 0
    evaluate.run(dataclasses.replace(config, adapter=None, out=tmp_path / "base-out"))
    assert json.loads((tmp_path / "base-out" / "manifest.json").read_text())["effect"] is None


def test_no_answer_stands_for_another_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one folder: the base, an adapter, and that adapter trained on; none takes the answers of the one before."""
    base = checkpoint(tmp_path)
    settings: dict[str, Any] = {"tasks": "gsm8k", "data_dir": Path("pocket"), "limit": 2, "max_new_tokens": 8}
    config = EvaluateConfig(model=str(base), out=tmp_path / "out", device="cpu", **settings)
    evaluate.run(config)
    adapter = adapter_on(base, tmp_path / "adapter", [(1, 1)])
    effects = []
    for factor in (1, 2):
        weights = {name: tensor * factor for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
        save_file(weights, adapter / "adapter_model.safetensors")
        evaluate.run(dataclasses.replace(config, adapter=adapter, overwrite=True))
        effects.append(json.loads((tmp_path / "out" / "manifest.json").read_text())["effect"]["max_logit_change"])
    assert 0 < effects[0] < effects[1]
    said = capsys.readouterr().err
    assert "are kept" not in said
    assert "up to date" not in said


def test_another_models_adapter(tmp_path: Path) -> None:
    base = checkpoint(tmp_path)
    other = save_checkpoint(tmp_path / "other", "mixtral")
    adapter = adapter_on(base, tmp_path / "adapter", [(1, 7)])
    with pytest.raises(ModelError, match="expert 7 .* 0..3 here"):
        check_adapter.run(settings(other, adapter))


def test_a_server_that_applies_the_adapter_and_one_that_does_not(
    served: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = attach(stock(checkpoint), [(1, 11), (3, 54)])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=20)
    merged, copy = tmp_path / "merged", tmp_path / "copy"
    for folder in (merged, copy):
        shutil.copytree(checkpoint, folder)
    adapted.merge_and_unload().save_pretrained(merged)
    url = ["--base-url", f"{served}/chat/completions", "--prompts", "4", "--max-new-tokens", "8"]
    assert main(["check-adapter", str(checkpoint), str(merged), *url, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompts"], found["differ"] > 0) == (4, True)
    assert main(["check-adapter", str(checkpoint), str(copy), *url]) == 2
    said = capsys.readouterr().err
    assert "continues all 4 prompts of pocket alike" in said
    assert main(["check-adapter", str(copy), str(copy), *url]) == 2
