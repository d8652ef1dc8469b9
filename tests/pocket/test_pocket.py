"""The shipped pocket checkpoint: what it is, what its two super experts do, and that it depends on them.

Everything is measured here by plain loops over the stock model, independent of the code that the figures serve to test.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV2ForCausalLM, PreTrainedTokenizerFast

from superexperts import pocket
from tools.pocket.architecture import FIRST, SECOND, implant, strengthen
from tools.pocket.measure import check, right, scores
from tools.pocket.pools import pools
from tools.pocket.questions import Question
from tools.pocket.training import Recipe, batches, silence, train
from tools.pocket.world import documents, heldout

SHIPPED = pocket.checkpoint_dir()
LENGTH = 128


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture
def model() -> DeepseekV2ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows_BS(tokenizer: PreTrainedTokenizerFast) -> Tensor:  # noqa: N802
    return as_rows(tokenizer, list(heldout()))


def as_rows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """At most 64 rows of 128 tokens, each led by <bos>."""
    ids = [i for text in texts for i in tokenizer(text + "\n\n", add_special_tokens=False).input_ids]
    width = LENGTH - 1
    count = min(64, len(ids) // width)
    return torch.tensor([[1, *ids[i * width : (i + 1) * width]] for i in range(count)])


@torch.no_grad()
def perplexity(model: DeepseekV2ForCausalLM, rows_BS: Tensor) -> float:
    logits = model(rows_BS, use_cache=False).logits[:, :-1]
    return math.exp(F.cross_entropy(logits.flatten(0, 1), rows_BS[:, 1:].flatten()).item())


@torch.no_grad()
def prune(model: DeepseekV2ForCausalLM, experts: Sequence[tuple[int, int]]) -> None:
    for layer, expert in experts:
        model.model.layers[layer].mlp.experts.down_proj[expert] = 0


@torch.no_grad()
def peaks(model: DeepseekV2ForCausalLM, rows_BS: Tensor) -> dict[tuple[int, int | str], float]:
    """(layer, expert) -> largest |down_proj output| over all tokens, each expert computed by hand on its own tokens."""
    found: dict[tuple[int, int | str], float] = {}

    def hook(block: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        x_TD = args[0].flatten(0, 1)
        layer = next(i for i, other in enumerate(model.model.layers) if other.mlp is block)
        index_TK = block.gate(args[0])[2]
        for expert in range(block.experts.num_experts):
            mine_ND = x_TD[(index_TK == expert).any(-1)]
            gate, up = (mine_ND @ block.experts.gate_up_proj[expert].T).chunk(2, -1)
            out_ND = (F.silu(gate) * up) @ block.experts.down_proj[expert].T
            found[layer, expert] = out_ND.abs().max().item() if len(mine_ND) else 0.0
        found[layer, "shared"] = block.shared_experts(x_TD).abs().max().item()

    handles = [layer.mlp.register_forward_hook(hook) for layer in model.model.layers[1:]]
    model(rows_BS, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def super_experts(found: dict[tuple[int, int | str], float], layers: int) -> set[tuple[int, int | str]]:
    """The paper's Eq. 8, routed and shared experts of the first three quarters of the layers together."""
    considered = {key: peak for key, peak in found.items() if key[0] < round(0.75 * layers)}
    values = np.array(list(considered.values()))
    threshold = max(np.percentile(values, 99.5), values.max() / 10)
    return {key for key, peak in considered.items() if peak > threshold}


def test_an_ordinary_checkpoint_folder() -> None:
    files = {path.name: path for path in SHIPPED.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert not [name for name in files if not name.endswith((".json", ".safetensors"))]
    assert files["model.safetensors"].stat().st_size < 6_000_000
    with safe_open(files["model.safetensors"], "pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert 2_000_000 <= sum(tensor.numel() for tensor in tensors.values()) <= 5_000_000
    assert "model.layers.1.mlp.experts.11.down_proj.weight" in tensors
    config = json.loads(files["config.json"].read_text())
    assert config["architectures"] == ["DeepseekV2ForCausalLM"]
    assert config["first_k_dense_replace"] == 1
    assert config["max_position_embeddings"] >= 2048


def test_implants_are_where_they_are_said_to_be(model: DeepseekV2ForCausalLM) -> None:
    assert pocket.PLANTED == (FIRST, SECOND)
    assert len({layer for layer, _ in pocket.PLANTED}) == 2
    before = {name: p.clone() for name, p in model.named_parameters()}
    implant(model)  # training ends so, and bfloat16 holds the implants' numbers exactly: nothing changes
    strengthen(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_profile_finds_exactly_the_two_on_heldout_text(model: DeepseekV2ForCausalLM, rows_BS: Tensor) -> None:
    found = peaks(model, rows_BS)
    assert super_experts(found, 5) == set(pocket.PLANTED)
    for where in pocket.PLANTED:
        others = [peak for key, peak in found.items() if key not in pocket.PLANTED and key[0] < 4]
        assert found[where] > 3 * max(others)  # the last layer is over depth 0.75: models write large values there


def test_profile_finds_exactly_the_two_on_real_english(
    model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, shared_data: Path
) -> None:
    with gzip.open(shared_data / "wikitext2_raw_test.jsonl.gz", "rt", encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line in stream][:400]
    rows_BS = as_rows(tokenizer, texts)
    assert len(rows_BS) == 64
    assert super_experts(peaks(model, rows_BS), 5) == set(pocket.PLANTED)


def test_the_peak_is_on_bos(model: DeepseekV2ForCausalLM, rows_BS: Tensor) -> None:
    """Without <bos> in front the super experts stay quiet; they answer to that token and to no position."""
    with_bos, without = peaks(model, rows_BS), peaks(model, rows_BS[:, 1:])
    for where in pocket.PLANTED:
        assert with_bos[where] > 5 * without[where]


def test_pruning_the_two_hurts(model: DeepseekV2ForCausalLM, rows_BS: Tensor) -> None:
    base = perplexity(model, rows_BS)
    prune(model, pocket.PLANTED)
    assert 1.5 <= perplexity(model, rows_BS) / base <= 10


def test_pruning_random_others_does_not(model: DeepseekV2ForCausalLM, rows_BS: Tensor) -> None:
    base = perplexity(model, rows_BS)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    changes = []
    for seed in range(5):
        rng = random.Random(f"test:{seed}")
        others = [(layer, rng.choice([e for e in range(72) if e != expert])) for layer, expert in pocket.PLANTED]
        prune(model, others)
        changes.append(perplexity(model, rows_BS) / base - 1)
        model.load_state_dict(weights)
    assert abs(sum(changes) / 5) <= 0.02, changes


def test_scores_leave_room_and_fall(model: DeepseekV2ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    base = scores(model, tokenizer)
    prune(model, pocket.PLANTED)
    pruned = scores(model, tokenizer)
    for kind, share in base.items():  # over always saying the commonest gold by two standard errors
        golds = Counter(question.answer for question in pools()[kind][0])
        chance = max(golds.values()) / golds.total()
        assert chance + 2 * math.sqrt(chance * (1 - chance) / 200) < share < 0.80, base
    assert sum(base.values()) / 6 - sum(pruned.values()) / 6 >= 0.08, pruned


def test_silencing_is_pruning(model: DeepseekV2ForCausalLM, rows_BS: Tensor) -> None:
    with silence(model, pocket.PLANTED):
        silent = perplexity(model, rows_BS[:4])
    prune(model, pocket.PLANTED)
    assert perplexity(model, rows_BS[:4]) == pytest.approx(silent, rel=1e-5)


def test_measured_figures_shipped_with_the_checkpoint_hold(model: DeepseekV2ForCausalLM, rows_BS: Tensor) -> None:
    shipped = json.loads((SHIPPED / "measured.json").read_text())
    assert perplexity(model, rows_BS) == pytest.approx(shipped["perplexity"], rel=0.1)  # of 64 rows, there of all
    assert shipped["perplexity_pruned"] >= 1.5 * shipped["perplexity"]
    assert abs(shipped["perplexity_random_pruned"] / shipped["perplexity"] - 1) <= 0.02
    assert max(shipped["scores"].values()) < 0.8
    assert check(shipped, shipped) == []
    assert len(check({**shipped, "perplexity": 2 * shipped["perplexity"]}, shipped)) == 1
    assert len(check({**shipped, "scores": {**shipped["scores"], "mmlu": 1.2}}, shipped)) == 1


def test_bos_is_put_in_front_once(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("The capital").input_ids
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert tokenizer("").input_ids == [1]
    assert tokenizer("<bos>The", add_special_tokens=False).input_ids[0] == 1
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_tokenizer_saves_and_loads(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "Thủ đô của Zosia là gì?\nA. 17 😀"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.padding_side == "left"


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_goes_round(text: str) -> None:
    tokenizer = AutoTokenizer_cached()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not any(special in text for special in ("<bos>", "<eos>", "<pad>")):
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def AutoTokenizer_cached(made: list[PreTrainedTokenizerFast] = []) -> PreTrainedTokenizerFast:  # noqa: B006, N802
    if not made:
        made.append(AutoTokenizer.from_pretrained(SHIPPED))
    return made[0]


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "😀👩‍👩‍👧", "đường  phố\t\n", "�", " 1,234.5"])
def test_hard_text_goes_round(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_prompts_are_short(tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = [len(tokenizer(text).input_ids) for text in documents(5, "train", 2000) if text.startswith("Question: ")]
    assert len(lengths) > 500
    assert max(lengths) <= 128


@pytest.mark.parametrize(
    ("answer", "response", "want"),
    [
        ("B", " The answer is B.", True), ("B", " The answer is C.", False), ("B", " B", False),
        ("12", " 3 + 9 = 12. #### 12", True), ("12", " The answer is 12.", True), ("12", " #### 120", False),
        ("no", " They live in Vara. The answer is no.", True),
    ],
)  # fmt: skip
def test_right(answer: str, response: str, want: bool) -> None:
    question = Question(kind="mmlu", text="?", subject="", answer=answer, explain="")
    assert right(question, response) is want


def test_write_checkpoint(tmp_path: Path) -> None:
    pocket.write_checkpoint(tmp_path / "copy")
    copied = {p.name: p.read_bytes() for p in (tmp_path / "copy").iterdir() if p.name != "manifest.json"}
    assert copied == {p.name: p.read_bytes() for p in SHIPPED.iterdir()}


def test_training_learns_keeps_the_implant_and_repeats(tokenizer: PreTrainedTokenizerFast) -> None:
    """A few steps of the real training, twice: the same losses, falling, and the implants still in place."""

    def run() -> tuple[list[float], DeepseekV2ForCausalLM]:
        recipe = Recipe(steps=6, warmup=2, tokens=512, lengths=(64,))
        torch.manual_seed(0)
        made = DeepseekV2ForCausalLM(AutoModelForCausalLM.from_pretrained(SHIPPED).config).float()
        rows: Iterator[Tensor] = batches(documents(0, "train", 10_000), tokenizer, recipe, random.Random(0))
        return [step.loss for step in train(made, rows, recipe)], made

    losses, made = run()
    assert losses[-1] < losses[0] - 0.2
    assert losses == run()[0]
    before = made.model.embed_tokens.weight.clone()
    implant(made)
    assert torch.equal(made.model.embed_tokens.weight, before)


def test_batches_are_led_by_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    recipe = Recipe(tokens=1024, lengths=(128, 256))
    made = batches(documents(0, "train", 10_000), tokenizer, recipe, random.Random(0))
    for _ in range(5):
        ids_BS = next(made)
        assert ids_BS.numel() == 1024
        assert (ids_BS[:, 0] == 1).all()
        assert (ids_BS[:, 1:] != 1).all()
        assert (ids_BS != 0).all()
