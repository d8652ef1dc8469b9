"""The study file: what it becomes, and every error of it at once, each with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from superexperts.core.errors import DataError, OptionError, OutputError
from superexperts.studies.check import check
from superexperts.studies.plan import expert_files
from superexperts.studies.study import StudyConfig, run
from superexperts.studies.study_file import parse

ROOT = Path(__file__).parents[2]


def test_all_errors_are_reported_at_once_with_their_lines() -> None:
    text = """\
name: x
tokens: many
depth: 2
colour: red
tasks: [mmlu, nope]
data_dir: pocket
experts:
  mine: L1E2,L3E4
  top: {rule: gate, count: -3}
  bad: {rul: gate}
  worse: L1
variants:
  - base
  - prune-super: {seeds: 3}
  - lora-mine: {r: -1, alpha: 3}
  - nope
training:
  r: [1]
  seed: 3
evaluation: {batch_size: 0, device: cpu, engine: api}
name: y
"""
    with pytest.raises(OptionError) as error:
        parse(text, "s.yaml")
    first, *reported = str(error.value).splitlines()
    assert first == f"s.yaml: {len(reported)} errors; nothing was run"
    expected = [
        (2, "tokens: 'many' is not a whole number"),
        (3, "depth: 2.0 is out of range"),
        (4, "'colour' is not a field of a study; choose from corpus, data_dir, depth"),
        (5, "tasks: 'nope' is unknown"),
        (9, "count: -3 is not positive"),
        (10, "'rul' is not an option of experts.bad"),
        (11, "worse: 'L1' is neither a file nor like"),
        (14, "seeds: nothing in prune-super is random; leave it out"),
        (15, "r: -1 is not positive"),
        (16, "variants: 'nope' is unknown; choose from base, lora-attention"),
        (18, "training.r: [1] is not a whole number"),
        (19, "'seed' is set by the study itself, not in training"),
        (20, "'device' is set by the study itself, not in evaluation"),
        (20, "batch_size: 0 is not positive"),
        (20, "engine: a server has one model, a study has many"),
        (21, "'name' is given twice; keep one"),
    ]
    assert len(reported) == len(expected), reported
    for line, said in expected:
        assert any(f"line {line}: {said}" in one for one in reported), (line, said, reported)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a", "line 1: the file is a list, not a mapping; write `name: NAME`"),
        ("", "line 1: the file is empty, not a mapping; write `name: NAME`"),
        ("a word", "line 1: the file is a text, not a mapping"),
        ("seeds: 2", "line 1: the file has no `name:`"),
        ("name: [", "line 1: not valid YAML: "),
        ("name: a\nmodel: x: y\n", "line 2: not valid YAML: mapping values are not allowed here; correct the file"),
        ("name: a\nmodel: \x01\n", "line 2: not valid YAML: the character '\\x01' is not allowed; correct the file"),
        ("name: a\nvariant: [base]", "line 2: 'variant' is not a field of a study; did you mean variants?"),
        ("name: a\ntraining: {rank: 3}", "'rank' is not an option of training; did you mean ranks?"),
        ("name: a\nevaluation: {retries: 2}", "retries: 2 does nothing without engine api; leave it out"),
        ("name: &a [*a]", "line 1: "),
        ("{name: 5}", "name: 5 is not a text"),
        ("{name: ../x, data_dir: pocket}", "name: '../x' cannot be the name of a folder"),
        ("name: x", "line 1: train_data: missing for the lora variants"),
        ("{name: x, data_dir: pocket, seeds: 0}", "seeds: 0 is not positive"),
        ("{name: x, data_dir: pocket, tasks: []}", "tasks: [] is not a list of names"),
        ("{name: x, data_dir: pocket, tasks: [mmlu, mmlu]}", "has a name twice"),
        ("{name: x, data_dir: pocket, tokens: 1.5}", "tokens: 1.5 is not a whole number"),
        (
            "{name: x, data_dir: pocket, tokens: 100, seq_len: 200}",
            "tokens: 100 is less than one sequence (seq_len 200)",
        ),
        ("{name: x, data_dir: pocket, training: 3}", "training: 3 is not a mapping of options"),
        (
            "{name: x, data_dir: pocket, training: {prompt: loud}}",
            "prompt: 'loud' is unknown; choose from auto, plain",
        ),
        ("{name: x, data_dir: pocket, variants: [prune-super]}", "the first variant is not base"),
        ("{name: x, data_dir: pocket, variants: [base, base]}", "'base' is given twice"),
        ("{name: x, data_dir: pocket, variants: [base, 5]}", "5 is neither a name nor"),
        ("{name: x, data_dir: pocket, variants: [base, prune-random: {r: 4}]}", "prune-random trains nothing; leave r"),
        ("{name: x, data_dir: pocket, variants: [base, prune-attention]}", "'prune-attention' is unknown"),
        ("{name: x, data_dir: pocket, experts: {A-b: L1E1}}", "'A-b' is not a name for a set"),
        ("{name: x, data_dir: pocket, experts: {a: {rule: gate, like: random}}}", "'random' depends on another set"),
        ("{name: x, data_dir: pocket, experts: {super: L1E1}}", "every study has a set 'super', of rule super"),
        (
            "{name: x, data_dir: pocket, experts: {random: {rule: gate}}}",
            "every study has a set 'random', of rule rand",
        ),
        (
            "{name: x, data_dir: pocket, profile: {sinks: true, stream: true}}",
            "sinks: needs the model in memory",
        ),
        ("{name: x, data_dir: pocket, extraction: {judge_scope: all}}", "judge_scope: 'all' needs a judge"),
        (
            "{name: x, data_dir: pocket, evaluation: {engine: vllm, perplexity: c4}}",
            "perplexity: 'c4' needs engine",
        ),
    ],
)
def test_an_error_is_reported(text: str, said: str) -> None:
    with pytest.raises(OptionError) as error:
        parse(text)
    assert said in str(error.value)


def test_runs_seeds_and_sets() -> None:
    plan = parse(
        "{name: x, data_dir: pocket, seed: 7, seeds: 2, experts: {mine: 'L1E2', odd: {rule: random, count: 3}}, "
        "variants: [base, prune-super, prune-random, prune-odd, lora-super: {seeds: 3, r: 4}, lora-mine, "
        "lora-attention]}"
    )
    rows = [(run.name, run.seed, run.experts, run.random) for run in plan.runs]
    assert rows == [
        ("base", 7, None, False),
        ("prune-super", 7, "super", False),
        ("prune-random", 7, "random", True),
        ("prune-random-s1", 8, "random-s1", True),
        ("prune-odd", 7, "odd", True),
        ("prune-odd-s1", 8, "odd-s1", True),
        ("lora-super", 7, "super", True),
        ("lora-super-s1", 8, "super", True),
        ("lora-super-s2", 9, "super", True),
        ("lora-mine", 7, "mine", True),
        ("lora-mine-s1", 8, "mine", True),
        ("lora-attention", 7, None, True),
        ("lora-attention-s1", 8, None, True),
    ]
    assert dict(plan.variant("lora-super").training) == {"r": 4}
    files = expert_files(plan)
    assert next(iter(files)) == "super"  # random follows it
    assert files["random-s1"] == ("random", 8)
    assert files["odd-s1"] == ("odd", 8)
    assert set(files) == {"super", "random", "random-s1", "odd", "odd-s1", "mine"}


def test_numbers_and_anchors_as_yaml_has_them() -> None:
    plan = parse(
        "name: x\ndata_dir: pocket\ntokens: 1e4\nlimit: null\ntraining: &t {learning_rate: 1e-3}\nvariants:\n"
        "- base\n- lora-super: {<<: *t, r: 8}\n"
    )
    assert (plan.tokens, plan.limit, plan.training["learning_rate"]) == (10_000, None, 0.001)
    assert dict(plan.variants[1].training) == {"learning_rate": 0.001, "r": 8}


def test_init_writes_a_valid_file_and_overwrites_none(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    assert run(StudyConfig(study=file, init=True)) == {"written": str(file)}
    plan = parse(file.read_text(encoding="utf-8"))
    assert [variant.seeds for variant in plan.variants] == [1, 1, 5, 3, 3, 3]
    with pytest.raises(OutputError, match="exists; choose another name"):
        run(StudyConfig(study=file, init=True))


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_studies_are_valid(file: Path) -> None:
    plan = parse(file.read_text(encoding="utf-8"), file.name)
    assert plan.name == file.stem
    seeds = {variant.name: variant.seeds for variant in plan.variants}
    assert seeds["prune-random"] == 5
    assert seeds["lora-super"] == 3
    if plan.model != "pocket":
        assert plan.revision is not None
        assert len(plan.revision) == 40


def test_an_error_that_two_commands_find_is_reported_once() -> None:
    with pytest.raises(OptionError) as error:
        parse(
            "{name: x, data_dir: pocket,\n seq_len: 0,\n training: {r: -1},\n variants: [base, lora-super: {alpha: 3}]}"
        )
    reported = str(error.value).splitlines()[1:]
    assert reported == [
        "  line 2: seq_len: 0 is too short; give at least 2",
        "  line 3: r: -1 is not positive; give more than 0",
    ]


def test_a_known_set_may_have_options_of_its_rule() -> None:
    assert parse("{name: x, data_dir: pocket, experts: {super: {ratio: 5}}}").experts["super"]["ratio"] == 5


@pytest.mark.parametrize(
    ("sections", "trained", "asked"),
    [
        ("", None, "auto"),
        ("evaluation: {chat_template: off}", "plain", "off"),
        ("evaluation: {chat_template: 'on'}", "chat", "on"),
        ("training: {prompt: plain}", "plain", "off"),
        ("training: {prompt: chat}", "chat", "on"),
        ("training: {prompt: auto}", "auto", "auto"),
    ],
)
def test_trainings_and_questions_are_put_alike(sections: str, trained: str | None, asked: str) -> None:
    plan = parse(f"name: x\ndata_dir: pocket\nvariants: [base, lora-super]\n{sections}")
    [run] = [run for run in plan.runs if run.kind == "lora"]
    assert plan.training_of(run).get("prompt") == trained
    assert plan.asking.get("chat_template", "auto") == asked


def test_trainings_and_questions_that_are_put_differently() -> None:
    sections = "training: {prompt: plain}\nevaluation: {chat_template: on}"
    plan = parse(f"name: x\ndata_dir: pocket\nvariants: [base, lora-super]\n{sections}")
    assert plan.prompts == {"plain", "chat"}
    with pytest.raises(DataError, match="training.prompt: some trainings or the evaluation put questions in chat"):
        check(plan, here=False)
