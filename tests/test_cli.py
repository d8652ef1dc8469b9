"""The command line: help with examples, and one line and exit code 2 for whatever a user gets wrong."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from superexperts.checkpoints.source import resolve
from superexperts.cli import COMMANDS, main
from superexperts.core.types import Answer, ExpertSet
from superexperts.models.loading import load_tokenizer

ROW = {"question": "What is 2 + 3?", "explain": "2 + 3 = 5.", "answer": "5"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"Example: superexperts {command}" in capsys.readouterr().out


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from superexperts.cli import main; print(main(['--help']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 False\n")


def test_rules_do_not_wait_for_torch(tmp_path: Path) -> None:
    answer = Answer(
        id="1", prompt="Question: 1 + 1?\nAnswer:", response="2", gold="2", choices=(), kind="number", task="gsm8k",
        variant="base", seed=0,
    )  # fmt: skip
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "gsm8k.jsonl").write_text(json.dumps(answer.to_json()) + "\n")
    code = "import sys; from superexperts.cli import main; code = main(sys.argv[1:])\n"
    code += "print(code, 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "extract", str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.endswith("0 False\n")
    assert json.loads((tmp_path / "scores.json").read_text())["scores"][0]["correct"] == 1


INTERRUPTED = """
import signal, sys, time, types, weakref
from superexperts import cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it

def run(_):
    held = set()
    weakly = weakref.ref(held, lambda _: signal.raise_signal(signal.SIGINT))
    del held
    time.sleep(60)
    return {"out": "x"}

from superexperts import pocket
pocket.run = run
sys.exit(cli.main(["pocket", "--out=x"]))
"""


@pytest.mark.parametrize("seconds", [60, 0])
def test_an_interrupt_that_falls_into_a_callback_is_not_lost(seconds: int) -> None:
    """Python prints what a callback raises, and goes on."""
    code = INTERRUPTED.replace("60", str(seconds))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 130
    assert done.stderr == "superexperts: interrupted; what was finished is kept\n"


def test_a_command_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs the garbage collector and records errors raised in callbacks."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    hook = sys.unraisablehook

    class Bad:
        def __del__(self) -> None:
            raise ValueError

    def run(_: object) -> dict[str, str]:
        assert gc.isenabled()
        Bad()
        return {"out": "x"}

    monkeypatch.setattr("superexperts.pocket.run", run)
    frozen = gc.get_freeze_count()
    assert main(["pocket", f"--out={tmp_path}", "--json"]) == 0
    assert gc.get_freeze_count() == frozen
    assert [unraisable.exc_type for unraisable in reported] == [ValueError]
    assert sys.unraisablehook is hook
    assert gc.isenabled()


IMPORTED = """
import gc, sys
import superexperts.cli as cli
imported = cli._imported
def watched(name):
    module = imported(name)
    if name == cli.COMMANDS["select"].module and module.run.__name__ == "run":  # imported twice: settings, then module
        module.run = lambda _: print(gc.get_freeze_count()) or {"out": gc.isenabled()}
        print(gc.isenabled())
    return module
cli._imported = watched
sys.argv = ["superexperts", "select", "x", "--json"]
sys.exit(cli.main())
"""


def test_a_command_of_its_own_process_imports_without_the_collector() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    before, frozen, result = done.stdout.splitlines()
    assert (before, json.loads(result)) == ("False", {"out": True})
    assert int(frozen) > 10_000


def wrong(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must fail as bad input does: exit code 2, one line on standard error, nothing else."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith("superexperts: ")]
    assert len(lines) == 1
    assert "Traceback" not in said.err
    return lines[0]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SUPEREXPERTS_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["profile", "--depth", "3"], "--depth: 3.0 is out of range"),
        (["profile", "--seq-len", "abc"], "--seq-len: 'abc' is not a whole number"),
        (["evaluate", "--limit", "x y"], "--limit: 'x y' is not a whole number"),
        (["evaluate", "--timeout", "x"], "--timeout: 'x' is not a number"),
        (["profile", "--seq-len", "1"], "--seq-len: 1 is too short"),
        (["profile", "--seq-len", "4096"], "--seq-len: 4096 is over the model's context of 2048"),
        (["profile", "--tokens", "8"], "--tokens: 8 is less than one sequence"),
        (["profile", "--corpus", "nowhere.txt"], "--corpus: 'nowhere.txt' is neither a file nor one of"),
        (["profile", "--device", "cuda:99"], "--device: 'cuda:99'"),
        (["profile", "--device", "meta"], "--device: 'meta' holds no values"),
        (["evaluate", "--device", "meta:0"], "--device: 'meta:0' holds no values"),
        (["train", "--data", "x.json", "--attention", "--device", "meta"], "--device: 'meta' holds no values"),
        (["check-adapter", "pocket", "x", "--device", "meta"], "--device: 'meta' holds no values"),
        (["profile", "--seed", "1"], "--seed"),
        (["profile", "--activation-budget", "inf"], "--activation-budget: inf"),
        (["profile", "--column", "body"], "--column: 'body' has no effect on pocket"),
        (["profile", "--column", "body", "--corpus", "c4"], "--column: 'body' has no effect on c4"),
        (["profile", "--column", "body", "--corpus", "math"], "--column: 'body' has no effect on math"),
        (["profile", "no/such/model"], "MODEL: 'no/such/model'"),
        (["profile", "no-such-model"], "MODEL: 'no-such-model'"),
        (
            ["profile", "--data-dir", "nowhere", "--corpus", "c4"],
            "--data-dir: 'nowhere' does not exist; give the folder of the data files",
        ),
        (["bogus"], "there is no command 'bogus'; see superexperts --help"),
        (["select"], "PROFILE"),
        (["pocket", "--output", "x"], "there is no option --output; did you mean --out?"),
        (
            ["train", "--lr", "1", "--data", "x", "--attention"],
            "there is no option --lr; see superexperts train --help",
        ),
        (["extract", "x", "--judge-scope", "some"], "--judge-scope: 'some' is unknown; choose from left, all"),
        (["select", "nowhere"], "PROFILE: 'nowhere' does not exist; give the folder that `profile` wrote"),
        (["select", "nowhere", "--rule", "random"], "--rule: random needs --count, --share or --like"),
        (["prune", "--experts", "L1E999"], "--experts: L1E999 is not in the model (layer 1 has experts 0.."),
        (["prune", "--experts", "L0E0"], "--experts: L0E0 is not in the model (MoE layers are"),
        (["prune", "--experts", "nonsense"], "--experts: 'nonsense' is neither a file nor like L2E54"),
        (["prune", "--experts", "L1E11", "--mode", "mean"], "--mode: 'mean' needs a bias of down_proj"),
        (["prune", "--experts", "L1E11", "--column", "x"], "--column: 'x' does nothing without --mode mean"),
        (["prune", "--experts", "L1E11", "--mode", "remove"], "as many experts from every MoE layer"),
        (["prune", "--experts", "L1E11", "--tokens", "8"], "--tokens: 8 is less than one sequence"),
        (
            ["prune", "--experts", "L1E11", "--corpus", "c4"],
            "--corpus: 'c4' does nothing without --mode mean",
        ),
        (
            ["prune", "--experts", "L1E11", "--tokens", "4k"],
            "--tokens: 4000 does nothing without --mode mean",
        ),
        (["prune", "--experts", "L1E11", "L1E999"], "--experts: L1E999 is not in the model"),
        (["evaluate", "--tokens", "4096"], "--tokens: 4096 does nothing without --perplexity; leave it out"),
        (["evaluate", "--seq-len", "128"], "--seq-len: 128 does nothing without --perplexity; leave it out"),
        (
            ["evaluate", "--perplexity", "pocket", "--reference-windows", "--tokens", "4096"],
            "--tokens: 4096 does nothing with --reference-windows, which reads the whole corpus",
        ),
        (["evaluate", "--retries", "1"], "--retries: 1 does nothing without --engine api; leave it out"),
        (
            ["evaluate", "m", "--engine", "api", "--base-url", "http://h/v1", "--dtype", "float32"],
            "--dtype: 'float32' does nothing with --engine api, where the server decides; leave it out",
        ),
        (["evaluate", "--base-url", "http://h/v1"], "--base-url: 'http://h/v1' needs --engine api, not hf; give that"),
        (["evaluate", "--tasks", "MMLU, nope"], "--tasks: 'nope' is unknown"),
        (["export", "x", "--format", "peft", "--copy"], "--copy: does nothing without --format merged; leave it out"),
        (["check-adapter", "pocket", "x", "--prompts", "8"], "--prompts: 8 does nothing without --base-url; leave it"),
        (
            ["check-adapter", "m", "x", "--base-url", "http://h/v1", "--tokens", "4096"],
            "--tokens: 4096 does nothing with --base-url, where the server runs the model; leave it out",
        ),
        (["extract", "x", "--batch-size", "2"], "--batch-size: 2 does nothing without --judge; leave it out"),
        (["extract", "x", "--judge", "all", "--timeout", "9"], "--timeout: 9.0 does nothing without --judge-base-url"),
        (["study", "x.yaml", "--demo"], "--demo: excludes STUDY x.yaml; give one of the two"),
        (["study", "x.yaml", "--init", "--workers", "2"], "--workers: 2 does nothing with --init, which runs nothing"),
        (
            ["push", "x", "--repo", "a/b", "--private", "--no-private"],
            "--private: excludes --no-private; give one of the two",
        ),
        (
            ["prune", "pocket", "L2E5"],
            "'L2E5' is one argument too many; give it with --experts, see",
        ),
        (
            ["prune", "--experts", "L2E5", "--tokens", "ten"],
            "--tokens: 'ten' is not a whole number; give one",
        ),
        (["restore"], "DIR"),
        (["restore", "nowhere"], "DIR: 'nowhere' does not exist; give the checkpoint folder that `prune` wrote"),
        (["compare", "pocket"], "B"),
        (["compare", "pocket", "nowhere"], "B: 'nowhere' is neither a folder"),
        (["compare", "pocket", "pocket", "--expect-only", "L9E9"], "--expect-only: L9E9 is not in the model"),
        (["compare", "pocket", "pocket", "--expect-only", "all"], "--expect-only: 'all' is neither a file nor like"),
        (["compare", "pocket", "pocket", "--expect-only", "L1E1", "--expect-identical"], "'L1E1' excludes"),
        (["train", "--data", "x.json"], "--experts: missing; give an expert set"),
        (["train", "--data", "x.json", "--target", "("], "--target: '(' is not a regular expression"),
        (["train", "--data", "x.json", "--attention", "--projections", "gate,q"], "--projections: 'q' is unknown"),
        (
            ["train", "--data", "x.json", "--attention", "--projections", "up"],
            "--projections: 'up' is for experts; give --exp",
        ),
        (["train", "--data", "x.json", "--attention", "--ranks", "L1E1=x"], "--ranks: 'L1E1=x' is not like L2E54=32"),
        (["train", "--data", "x.json", "--attention", "--alphas", "L1E1=2,L1E1=3"], "--alphas: L1E1 is named twice"),
        (
            ["train", "--data", "x.json", "--attention", "--learning-rate", "inf"],
            "--learning-rate: inf is not a finite number",
        ),
        (["train", "--data", "x.json", "--attention", "--seed", "-1"], "--seed: -1 is out of range; give 0 to"),
        (["evaluate", "pocket", "--seed", "-1"], "--seed: -1 is out of range"),
        (["train", "--data", "x.json", "--attention", "--patience", "2"], "--patience: 2 needs rows to evaluate"),
        (["train", "--data", "x.json", "--attention", "--eval-share", "1"], "--eval-share: 1.0 is out of range"),
        (["train", "--data", "x.json", "--attention", "--report-to", "csv"], "--report-to"),
        (["train", "--recipe", "nowhere.yaml", "--data", "x.json"], "--recipe: cannot read nowhere.yaml"),
        (["train", "--data", "x.json", "--attention", "--r", "0"], "--r: 0 is not positive"),
        (["train", "--data", "nowhere.json", "--attention"], "nowhere.json"),
        (["evaluate", "--tasks", "mmlu,nope"], "--tasks: 'nope' is unknown; choose from mmlu"),
        (
            ["evaluate", "--data-dir", "nowhere"],
            "--data-dir: 'nowhere' does not exist; give the folder of the data files",
        ),
        (["evaluate", "--data-dir", "pocket", "--adapter", "nowhere"], "nowhere"),
        (
            ["export", "nowhere", "--format", "peft"],
            "ADAPTER: 'nowhere' does not exist; give the folder that `train` wrote",
        ),
        (["export", "nowhere", "--format", "gguf"], "--format"),
        (["export", "nowhere"], "--format"),
        (
            ["import", "nowhere", "pocket"],
            "ADAPTER: 'nowhere' does not exist; give a folder with adapter_config.json and",
        ),
        (["import", "nowhere"], "MODEL"),
        (["check-adapter", "pocket", "nowhere"], "ADAPTER: 'nowhere' does not exist; give the folder that `train`"),
        (
            ["check-adapter", "pocket", "nowhere", "--tokens", "3"],
            "--tokens: 3 is less than one sequence (--seq-len 256)",
        ),
        (["extract", "nowhere"], "nowhere"),
        (["extract"], "DIR: missing; give the folder with answers, or --audit FILE"),
        (["extract", "nowhere", "--audit", "x"], "--audit: 'x' excludes DIR"),
        (["profile", "--corpus", "x@y"], "--corpus: 'x@y' is neither a file nor one of"),
        (["study"], "STUDY"),
        (["study", "nowhere.yaml"], "STUDY: 'nowhere.yaml' is not a file"),
        (["study", "."], "STUDY: '.' is a folder; give a study file"),
        (["report", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_is_one_line(arguments: list[str], said: str, here: Path, capsys: Any) -> None:
    assert said in wrong(capsys, *arguments)
    assert list(here.rglob("*")) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps([{k: v for k, v in ROW.items() if k != "answer"}]), "answer"),
        (json.dumps([ROW, {**ROW, "question": ""}]), "row 2"),
        ("[]", "rows.json"),
        ("", "rows.json"),
        ("{", "rows.json"),
        (json.dumps([ROW, 3]), "row 2"),
        (json.dumps([{**ROW, "explain": "long " * 2000}]), "--max-length"),
    ],
)
def test_wrong_training_rows_are_one_line(text: str, said: str, here: Path, capsys: Any) -> None:
    (here / "rows.json").write_text(text)
    assert said in wrong(capsys, "train", "--data", "rows.json", "--experts", "L1E11", "--out", "out")
    assert [path for path in here.rglob("*") if path.is_file()] == [here / "rows.json"]


def test_a_dense_model_is_one_line(here: Path, capsys: Any) -> None:
    config = LlamaConfig(
        vocab_size=2048, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(here / "dense")
    load_tokenizer(resolve("pocket")).save_pretrained(here / "dense")
    assert "llama has no routed experts" in wrong(capsys, "profile", "dense", "--tokens", "512", "--out", "out")
    assert "llama has no routed experts" in wrong(capsys, "prune", "dense", "--experts", "L1E1", "--out", "out2")
    assert [path for path in here.rglob("*") if path.is_file() and "dense" not in path.parts] == []


def test_an_empty_or_short_corpus_is_one_line(here: Path, capsys: Any) -> None:
    (here / "empty.txt").write_text("")
    assert "empty.txt is empty" in wrong(capsys, "profile", "--corpus", "empty.txt")
    (here / "short.txt").write_text("a few words only")
    assert "under one sequence" in wrong(capsys, "profile", "--corpus", "short.txt")


def test_an_unwritable_folder_is_one_line(here: Path, capsys: Any) -> None:
    (here / "file").write_text("")
    (here / "rows.json").write_text(json.dumps([ROW]))
    main(["profile", "--tokens", "256", "--seq-len", "128", "--out", "profile"])
    capsys.readouterr()
    train = ["train", "--data", "rows.json", "--experts", "L1E11"]
    for command in (
        ["profile"], ["select", "profile"], ["prune", "--experts", "L1E11"], train,
        ["evaluate", "--data-dir", "pocket"], ["study", "--demo"], ["pocket"],
    ):  # fmt: skip
        assert "--out: " in wrong(capsys, *command, "--out", "file/below")


def test_an_unwritable_folder_of_answers_is_one_line(here: Path, capsys: Any) -> None:
    answer = Answer(
        id="a", prompt="?", response="4", gold="4", choices=(), kind="number", task="gsm8k", variant="base", seed=0
    )
    (here / "answers").mkdir()
    (here / "answers" / "gsm8k.jsonl").write_text(json.dumps(answer.to_json()))
    (here / "extractions").write_text("a file where the folder should be")
    assert "cannot write to extractions" in wrong(capsys, "extract", ".")


def test_an_empty_benchmark_file_is_one_line(here: Path, capsys: Any) -> None:
    (here / "boolq_validation.jsonl").write_text("")
    assert "boolq" in wrong(capsys, "evaluate", "--data-dir", ".", "--tasks", "boolq")
    assert not (here / "runs").exists()


def test_a_checkpoint_is_not_pruned_into_itself(here: Path, capsys: Any) -> None:
    main(["pocket", "--out", "model"])
    capsys.readouterr()
    before = {file.name: file.read_bytes() for file in (here / "model").iterdir()}
    assert "is MODEL itself" in wrong(capsys, "prune", "model", "--experts", "L1E11", "--out", "./model")
    assert {file.name: file.read_bytes() for file in (here / "model").iterdir()} == before


def test_experts_of_another_model_are_told(here: Path, capsys: Any) -> None:
    experts = ExpertSet(model="another", rule={"name": "super"}, experts=((1, 11),), scores=(1.0,))
    (here / "experts.json").write_text(json.dumps(experts.to_json()))
    assert main(["prune", "--experts", "experts.json", "--out", "out"]) == 0
    assert "was selected from 'another', but the model is 'pocket'" in capsys.readouterr().err
    assert main(["prune", "--experts", "L1E11", "--out", "out"]) == 0
    assert "was selected" not in capsys.readouterr().err


def test_pickle_checkpoints_are_refused(here: Path, capsys: Any) -> None:
    (here / "old").mkdir()
    (here / "old" / "config.json").write_text("{}")
    (here / "old" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "pickles are not read" in wrong(capsys, "profile", "old")


def test_json_is_all_that_is_printed(here: Path, capsys: Any) -> None:
    assert main(["profile", "--tokens", "256", "--seq-len", "128", "--out", "p", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["corpora"]["pocket"]["tokens"] == 256
    assert main(["pocket", "--out", "model"]) == 0
    assert (here / "model" / "model.safetensors").is_file()
    assert main(["profile", "model", "--tokens", "256", "--seq-len", "128", "--out", "q", "--json"]) == 0
    capsys.readouterr()
    ours, theirs = (json.loads((here / name / "profile.json").read_text()) for name in "pq")
    assert ours["corpora"] == theirs["corpora"]


@pytest.mark.parametrize("arguments", [[], ["--model_name", "pocket", "--dataset_name", "x", "--save_path", "y"]])
def test_the_original_command_line_says_what_is_wrong_in_one_line(arguments: list[str], here: Path) -> None:
    script = Path(__file__).parents[1] / "run.py"
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("run.py: ")


def test_the_original_command_line(here: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[1] / "run.py"
    arguments = ["--model_name", "pocket", "--dataset_name", "wikitext2", "--save_path", "out"]
    command = [sys.executable, str(script), *arguments, "--profile_super_experts"]
    monkeypatch.setenv("SUPEREXPERTS_DATA", str(shared_data))
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads((here / "out" / "profile.json").read_text())["corpora"].keys() == {"wikitext2"}
    assert len(json.loads((here / "out" / "experts.json").read_text())["experts"]) == 2


@pytest.mark.parametrize("words", [["--help"], ["profile", "--help"], ["select", "p", "--json"]])
def test_a_reader_that_stops_early_is_no_traceback(words: list[str], tmp_path: Path) -> None:
    """As `superexperts profile --help | head -1`: the other end of the pipe is closed before anything is printed."""
    code = "import sys; from superexperts import cli; from superexperts.profiling import select\n"
    code += "select.run = lambda _: {'out': 'x'}\nsys.stdin.readline(); sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, said = process.communicate(b"\n", timeout=60)
    assert (process.returncode, said) == (1, b"")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_no_none(name: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    said = capsys.readouterr().out
    assert "None" not in said
    assert "--json" in said
