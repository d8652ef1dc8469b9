"""The report as a browser and a parser see it: right numbers, nothing but text from the model, nothing from the net."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from bs4 import BeautifulSoup
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image

from superexperts.adapters.norms import Changes
from superexperts.core.errors import DataError, OutputError
from superexperts.core.runs import write_json
from superexperts.core.types import Answer, Extraction
from superexperts.reports import pictures
from superexperts.reports.answers import disagreements, script_safe, visible
from superexperts.reports.report import ReportConfig, run, write_report
from superexperts.results.results import Results
from superexperts.results.statistics.single_run import paired_interval, wilson
from superexperts.results.variants import title_of
from tests.support.browser import CHROMIUM, Page, browser
from tests.support.study_folder import CORRECT, HOSTILE, RUNS, TITLES, build, build_runs, profile, results_json

RANDOM = title_of("prune", "random")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = build(tmp_path_factory.mktemp("study"))
    shutil.rmtree(made / "profile")  # its pictures take their time; see `seeds`
    assert run(ReportConfig(folder=made)) == {"out": str(made), "report": str(made / "report.html")}
    return made


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> BeautifulSoup:
    return BeautifulSoup(html, "html.parser")


def text_of(node: object) -> str:
    return " ".join(node.get_text(" ").split())  # type: ignore[attr-defined]


def test_table_holds_the_numbers(page: BeautifulSoup) -> None:
    lines = page.select("#results table.results tbody tr")
    assert [line.th.contents[0] for line in lines if line.th] == list(TITLES.values())
    for line, name in zip(lines, TITLES, strict=True):
        for cell, task in zip(line.select("td"), ("mmlu", "boolq"), strict=False):
            pattern = CORRECT[name][task]
            right, lost = pattern.count("+"), pattern.count("?")
            low, high = wilson(right, len(pattern))
            assert text_of(cell.select_one(".acc")) == f"{100 * right / len(pattern):.1f}"
            assert text_of(cell.select_one(".ci")) == f"{100 * low:.1f}–{100 * high:.1f}"
            unparsed = f"{100 * lost / len(pattern):.1f}% unparsed" if lost else "all parsed"
            assert text_of(cell.select_one(".unparsed")) == unparsed
    cell = lines[1].select_one("td")
    assert cell is not None
    assert text_of(cell.select_one(".diff")) == "▼ −50.0 (detected)"
    assert "down" in cell["class"]
    assert "many" in cell.select_one(".unparsed")["class"]  # type: ignore[index]
    assert text_of(lines[2].select_one("td .diff")) == "0.0"


def test_verdict_comes_first_and_pocket_is_named(page: BeautifulSoup) -> None:
    assert page.main is not None
    assert text_of(page.select_one("main .banner")) == (
        "Measured on the pocket model, a toy that comes with the package. This says nothing about any real model."
    )
    assert page.main.find("section")["id"] == "verdict"  # type: ignore[index]
    assert "Pruning super experts costs 43.3 points of accuracy; pruning random experts" in text_of(page.h1)
    reported = [text_of(line) for line in page.select("#verdict .verdicts")[0].select("li")]
    assert reported[0].startswith("−43.3 points prune super experts 43.3 points lower,")
    assert "Perplexity 6.00 → 15.00 (×2.5)." in reported[0]
    seen = "No difference detected; one over 17.7 points would probably have been"
    low, high = (f"{100 * abs(end):.1f}" for end in paired_interval(1, 1, 60))
    assert (
        f"{seen}; one seed only, so another seed may give another result (95% interval −{low} to +{high}, p = 1)"
        in reported[1]
    )
    assert "Perplexity 6.00 → 6.03." in reported[1]
    assert len(reported) == 4
    direct = [text_of(line) for line in page.select("#verdict .verdicts")[1].select("li")]
    assert direct[0].startswith("−43.3 points prune super experts against prune random experts 43.3 points lower")


def test_no_banner_for_a_real_model(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", results_json() | {"model": "org/real"})
    soup = BeautifulSoup(write_report(tmp_path).read_text(encoding="utf-8"), "html.parser")
    assert soup.select_one("main .banner") is None
    assert not soup.select("#answers, #experts, #training, #data")  # results.json alone is enough
    assert len(soup.select("#results table.results tbody tr")) == 5
    assert sorted(file.name for file in (tmp_path / "figures").glob("*.svg")) == ["controls.svg", "differences.svg"]


@in_a_browser
def test_hostile_names_stay_text_everywhere(tmp_path: Path, tab: Page) -> None:
    """In the title, in attributes, in pictures, in JSON and in Markdown."""
    attack = (
        "\"'></title></script><script>document.title='taken'</script><img src=x onerror=alert(1)> `x` | [a](//b) @c"
    )
    value = json.loads(json.dumps(results_json()).replace("prune super experts", json.dumps(attack)[1:-1]))
    write_json(tmp_path / "results.json", value | {"name": attack, "model": attack, "protocol": attack})
    write_report(tmp_path)
    tab.open(tmp_path / "report.html")
    assert tab.run("document.title") == f"{attack}: super experts study"
    assert tab.run("document.querySelectorAll('script:not([type])').length") == 1
    assert tab.run("[...document.images].every((one) => one.src.startsWith('data:') && one.naturalWidth > 0)")
    assert attack in tab.run("document.images[0].alt")
    tab.run("document.querySelector('#picture-differences .plot').focus();")
    tab.press("ArrowRight")
    assert attack in tab.run("document.querySelector('#picture-differences [role=status]').textContent")
    assert tab.problems == []
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<" not in text
    assert "[a](" not in text
    assert "\\`x\\` \\| \\[a\\](//b) &#64;c" in text


def test_nothing_is_loaded_and_only_one_script_may_run(html: str, page: BeautifulSoup) -> None:
    for tag in page.find_all(True):
        for name in ("src", "srcset", "href", "action", "data", "poster"):
            value = tag.get(name)
            if value is not None:
                assert str(value).startswith(("data:", "#")), f"{tag.name} {name}={str(value)[:60]}"
        assert not [name for name in tag.attrs if name.startswith("on")]
    assert "url(" not in html
    assert "@import" not in html
    scripts = [script for script in page.find_all("script") if script.get("type") != "application/json"]
    assert len(scripts) == 1
    policy = str(page.select_one("meta[http-equiv]")["content"])  # type: ignore[index]
    digest = base64.b64encode(hashlib.sha256(scripts[0].get_text().encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert len(html.encode()) < 5 * 2**20


def test_titles_and_names_are_escaped(html: str) -> None:
    assert "<b>&#34;attention&#34;</b>" not in html
    assert "LoRA on &lt;b&gt;&#34;attention&#34;&lt;/b&gt;" in html
    assert "by &lt;i&gt;hand&lt;/i&gt;" in html


def test_disagreements_are_all_there_as_text(page: BeautifulSoup) -> None:
    data = json.loads(page.select_one("#data").get_text())  # type: ignore[union-attr]
    differing = {
        f"{task}-{i}"
        for task in ("mmlu", "boolq")
        for i, marks in enumerate(zip(*(CORRECT[name][task] for name in TITLES), strict=True))
        if len({mark == "+" for mark in marks}) == 2
    }
    assert {item["id"] for item in data["items"]} == differing
    assert f"{len(differing)} of 60 items" in text_of(page.select_one("#answers p"))
    item = next(item for item in data["items"] if item["id"] == "mmlu-12")
    assert item["answers"][1] == [[item["texts"].index(visible(HOSTILE)), 0, None, "unparsed"]]
    assert item["answers"][0][0][1] == 1
    assert len(item["texts"]) == len(set(item["texts"]))


def test_what_was_run(page: BeautifulSoup) -> None:
    section = text_of(page.select_one("#run"))
    budget = text_of(page.select_one("#budget"))
    assert "LoRA on super experts seed 0 reference L2E5, L1E2 1 in L1, 1 in L2 12,345 150 50 to 100 each" in budget
    assert "evaluate variants/prune-super" in section
    assert "ab" * 32 in section
    assert re.search(r"torch \d+\.\d+", section)


def test_visible_and_script_safe() -> None:
    assert visible("a\x00b\x1b[0m\r\nc\td\u202e\x7f\udcff") == "a␀b␛[0m\nc\td⟨U+202E⟩␡⟨U+DCFF⟩"
    assert visible("Tiếng Việt, 中文, ∑") == "Tiếng Việt, 中文, ∑"
    value = {"a": "</script><!--<script>&\u2028"}
    safe = script_safe(value)
    assert not set(safe) & set("<>&")
    assert json.loads(safe) == value


def test_long_and_many_answers_stay_small() -> None:
    """Six benchmarks of hundreds of long answers, each another one and all of it escaped: still within the budget."""
    tasks = [f"task{number}" for number in range(6)]
    value = results_json()
    for variant in value["variants"]:
        for one in (variant, *variant["runs"]):
            one["scores"] = [one["scores"][0] | {"task": task} for task in tasks]
    per_task = [row | {"task": task} for row in value["comparisons"] if row["task"] == "mmlu" for task in tasks]
    pooled = [row for row in value["comparisons"] if row["task"] is None]
    results = Results.from_json(value | {"tasks": tasks, "comparisons": [*pooled, *per_task]})
    answers = {
        name: {
            task: [
                Answer(
                    id=str(i), prompt="&" * 3_000, response=f"{name}{task}{i}" + "<" * 4_000 + "END", gold="B",
                    choices=(), kind="choice", task=task, variant=name, seed=0,
                )
                for i in range(300)
            ]
            for task in tasks
        }
        for name in TITLES
    }  # fmt: skip
    extractions = {
        name: {
            task: [Extraction(id=str(i), extracted="B", how="rule:x", correct=name == "base") for i in range(300)]
            for task in tasks
        }
        for name in TITLES
    }
    browsed = disagreements(results, answers, extractions)
    assert len(browsed.json.encode()) < 2.1 * 2**20
    data = json.loads(browsed.json)
    assert (browsed.asked, browsed.found, browsed.shown) == (1800, 1800, len(data["items"]))
    assert {item["task"] for item in data["items"]} == set(tasks)
    assert browsed.shown >= 100  # cut shorter, so that there are many
    assert all(text.endswith("<END") and " characters …]" in text for text in data["items"][0]["texts"])


def test_twenty_thousand_long_answers_stay_under_the_limit(tmp_path: Path) -> None:
    """And the page says what it leaves out, and where that is."""
    names = ("base", "prune-super")
    made = build(tmp_path, {name: TITLES[name] for name in names})
    for name in names:
        kept = made / "variants" / name
        said = {"prompt": "Q" * 100, "gold": "B", "choices": [], "kind": "choice", "task": "mmlu", "variant": name}
        how = {"extracted": "B", "how": "rule:label", "correct": name == "base"}
        with (kept / "answers" / "mmlu.jsonl").open("w") as answers:
            for i in range(20_000):
                row = said | {"id": str(i), "seed": 0, "response": f"{name} {i} {'<' * 4_000} THE END"}
                answers.write(json.dumps(row) + "\n")
        rows = "".join(json.dumps(how | {"id": str(i)}) + "\n" for i in range(20_000))
        (kept / "extractions" / "mmlu.jsonl").write_text(rows)
    path = write_report(made)
    assert path.stat().st_size < 5_000_000
    soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    section = soup.select_one("#answers")
    assert section is not None
    text = text_of(section)
    assert "20,006 of 20,020 items were answered correctly by some runs and wrongly by others." in text
    assert "This file holds 66 of them, the first ones of each benchmark." in text
    assert "All answers are in the study's folder, in variants/RUN/answers" in text
    data = json.loads(soup.select_one("#data").get_text())  # type: ignore[union-attr]
    assert [(task["found"], task["shown"]) for task in data["tasks"]] == [(20_000, 60), (6, 6)]
    assert data["items"][0]["texts"][0].startswith("base 0 <")
    assert data["items"][0]["texts"][0].endswith("THE END")


def test_errors_name_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no results\.json"):
        run(ReportConfig(folder=tmp_path))
    made = build(tmp_path / "study")
    (made / "variants" / "lora-super" / "extractions" / "boolq.jsonl").unlink()
    with pytest.raises(DataError, match=r"boolq\.jsonl is missing"):
        write_report(made)
    assert not (made / "report.html").exists()


def test_report_command_is_repeatable(folder: Path, html: str) -> None:
    write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == html


def test_figures_that_are_not_ours_stay(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", results_json())
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.png").write_bytes(b"")
    with pytest.raises(OutputError, match=r"figures exists and was not made by `report`"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


# ---- report.md ----


def test_markdown_says_the_same_and_takes_nothing_for_markup(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# by &lt;i&gt;hand&lt;/i&gt;: super experts study of pocket\n")
    assert not re.search(r"<(?!/?(?:br)>)", text)
    assert "**Pruning super experts costs 43.3 points of accuracy; pruning random experts" in text
    assert '- **LoRA on &lt;b&gt;"attention"&lt;/b&gt;** (+21.7 points):' in text
    table = next(line for line in text.splitlines() if line.startswith("| prune super experts |"))
    assert table.startswith("| prune super experts | 25.0\\* (14.2–40.2), 50.0% unparsed | 40.0 (")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):  # each table has as many cells in every line
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    for name in re.findall(r"\]\((figures/[^)]+)\)", text):
        with Image.open(folder / name) as image:
            assert image.width == 1400
        assert (folder / name).with_suffix(".svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")
    assert len(re.findall(r"\]\(figures/", text)) == 3


# ---- several runs ----


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = build_runs(tmp_path_factory.mktemp("seeds"))
    found = {
        run.name: Changes(experts={(1, 2): 0.02 * (run.seed + 1), (2, 5): 0.1}, others={})
        if run.target == "super"
        else Changes(experts={}, others={3: 0.5})
        for run in RUNS
        if run.kind == "lora"
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "adapter_changes", lambda source, adapters: found)
        write_report(made)
    return made


@pytest.fixture(scope="module")
def soup(seeds: Path) -> BeautifulSoup:
    return BeautifulSoup((seeds / "report.html").read_text(encoding="utf-8"), "html.parser")


def test_runs_stand_beside_their_mean(soup: BeautifulSoup) -> None:
    line = next(row for row in soup.select("table.results tbody tr") if "LoRA on super" in text_of(row.th))
    cell = line.select("td")[1]
    assert text_of(cell.select_one(".acc")) == "93.3"  # of 95, 90 and 95
    assert text_of(cell.select_one(".each")) == "runs: 95.0, 90.0, 95.0"
    assert text_of(line.select("td")[2]) == "94.2 95.0, 92.5, 95.0"
    spots = json.loads(soup.select_one("#picture-differences .spots").get_text())  # type: ignore[union-attr]
    said = next(text for _, _, text in spots["points"] if text.startswith("LoRA, super experts, BoolQ"))
    assert "+23.3 points" in said
    assert "runs +25.0, +20.0, +25.0" in said
    assert "3 against 1 run" in text_of(soup.select(".verdicts")[0])
    assert "seeds random" in text_of(soup.select_one(".all"))


def test_budgets_name_what_differs(soup: BeautifulSoup) -> None:
    lines = {text_of(row) for row in soup.select("#budget tbody tr")}
    reference = "LoRA on super experts seed 0 reference L1E2, L2E5 1 in L1, 1 in L2 24,690 1,050 50 to 1,000 each 95.0"
    assert any(line.startswith(reference) for line in lines)
    assert any(line.startswith("seed 1 L1E2, L2E5 1 in L1, 1 in L2 ≠ 12,345 (×0.5)") for line in lines)
    assert any(line.startswith("LoRA on attention seed 0 – ≠ none 24,690") for line in lines)
    assert any(line.startswith(f"{RANDOM} seed 0 L1E0, L2E1 1 in L1, 1 in L2") for line in lines)


def test_pictures_say_what_they_show(soup: BeautifulSoup) -> None:
    for picture in soup.select("picture"):
        for address in (picture.source["srcset"], picture.img["src"]):  # type: ignore[index]
            kind, data = str(address).split(",", 1)
            assert kind == "data:image/svg+xml;base64"
            assert b"<svg" in base64.b64decode(data)
        assert len(str(picture.img["alt"])) > 40  # type: ignore[index]
    alts = {str(figure["id"]): str(figure.img["alt"]) for figure in soup.select("figure")}  # type: ignore[index]
    assert "L1E2 900" in alts["picture-heatmap-pocket"]
    assert "layer 4 30% and 8%" in alts["picture-sinks"]
    assert "LoRA on super experts: 2 experts by 4% to 10%" in alts["picture-weights"]  # the mean of 2, 4 and 6%
    assert f"{RANDOM}: 2 experts silenced" in alts["picture-weights"]
    assert (
        "super experts, seed 2, 2 over the first and 0.5 over the last tenth of the steps" in alts["picture-training"]
    )

    def points(name: str) -> list[str]:
        spots = json.loads(soup.select_one(f"#picture-{name} .spots").get_text())  # type: ignore[union-attr]
        return [text for _, _, text in spots["points"]]

    assert "super experts, seed 1, step 10: 0.7 on held-out rows" in points("training")
    assert "layer 4, L1E2, L2E5 silenced: 7.5%" in points("sinks")
    assert "LoRA on super experts, L1E2: 4% of its norm" in points("weights")
    grid = json.loads(soup.select_one("#picture-heatmap-pocket .spots").get_text())["grids"][0]  # type: ignore[union-attr]
    assert (grid["rows"][1], grid["columns"][2], grid["values"][1][2]) == ("L1", "E2", 900)
    assert (grid["columns"][-1], grid["values"][0][0], grid["values"][1][0]) == ("shared", None, 0)


def test_how_to_do_it_again(soup: BeautifulSoup, seeds: Path) -> None:
    section = soup.select_one("#run")
    assert section is not None
    assert section.select_one("pre").get_text() == (seeds / "study.yaml").read_text()  # type: ignore[union-attr]
    commands = section.select_one("pre.commands").get_text().splitlines()  # type: ignore[union-attr]
    expected = "--data rows/train.json --experts L1E2,L2shared --learning-rate 0.003 --out variants/lora-super/train"
    assert f"superexperts train pocket {expected}" in commands
    text = (seeds / "report.md").read_text(encoding="utf-8")
    assert "````yaml\n# <b>how</b> ``` it was run\n" in text  # in a fence that it cannot close
    assert f"superexperts train pocket {expected}" in text


def test_a_base_model_that_is_not_here_is_not_fetched_for_its_weights(
    seeds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(name: str, **options: object) -> str:
        assert options["local_files_only"] is True
        raise LocalEntryNotFoundError(name)

    results = dataclasses.replace(Results.load(seeds), model="org/model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", fetch)
        picture = pictures._weights(seeds, results, profile())
    assert picture is not None
    assert "The base model's weights are not on this machine" in picture.caption
    assert "LoRA" not in picture.alt
    assert "report: no weight changes (model: 'org/model' is neither a folder nor" in capsys.readouterr().err


# ---- in a browser ----


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("user")) as page:
        yield page


CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const parse = (colour) => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = (colour) => {
  const part = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = colour.map((value) => part(value / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let one = element; one; one = one.parentElement) {
    const colour = parse(getComputedStyle(one).backgroundColor);
    if (colour[3] === 255) return colour;
  }
  return [255, 255, 255, 255];
};
const found = {seen: 0, low: []};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
  if (element.closest("script, .hidden")) continue;
  const style = getComputedStyle(element);
  const [a, b] = [light(parse(style.color)), light(behind(element))].sort((x, y) => y - x);
  const size = parseFloat(style.fontSize);
  const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
  const ratio = (a + 0.05) / (b + 0.05);
  found.seen += 1;
  if (ratio < (large ? 3 : 4.5)) found.low.push([ratio, element.className, element.textContent.slice(0, 40)]);
}
return found;
"""


@in_a_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_and_can_be_read(seeds: Path, tab: Page, width: int, dark: bool) -> None:
    tab.open(seeds / "report.html", width, dark=dark)
    tab.run("for (const one of document.querySelectorAll('details')) one.open = true;")
    assert tab.run("innerWidth") == width  # a phone widens its view to what overflows
    assert tab.run("document.documentElement.scrollWidth") == width
    found = tab.run(CONTRAST)
    assert found["low"] == []
    assert found["seen"] > 500
    paper = tab.run("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(18, 20, 24)") is dark
    shown = tab.run("[...document.querySelectorAll('img')].map((one) => [one.currentSrc, one.naturalWidth])")
    assert len(shown) == 7
    assert all(size > 0 for _, size in shown)
    first = BeautifulSoup((seeds / "report.html").read_text(encoding="utf-8"), "html.parser").picture
    assert first is not None
    assert shown[0][0] == (first.source["srcset"] if dark else first.img["src"])  # type: ignore[index]
    assert tab.problems == []


@in_a_browser
def test_what_can_be_focused_has_a_name_and_tables_have_heads(seeds: Path, tab: Page) -> None:
    tab.open(seeds / "report.html")
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    named: dict[str, list[str]] = {}
    for node in nodes:
        properties = {one["name"]: one["value"].get("value") for one in node.get("properties", ())}
        role = node.get("role", {}).get("value", "")
        if properties.get("focusable") and not node.get("ignored") and role != "RootWebArea":
            named.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert [role for role, names in named.items() if not all(name.strip() for name in names)] == []
    assert {"link", "combobox", "searchbox", "application", "button"} <= named.keys()
    assert len(named["application"]) == 7
    bare = "table:not(:has(> caption)), thead th:not([scope=col]), tbody th:not([scope^=row]), img:not([alt])"
    assert tab.run(f"document.querySelectorAll({bare!r}).length") == 0
    ids = tab.run("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))
    levels = tab.run("[...document.querySelectorAll('h1, h2, h3, h4')].map((one) => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


@in_a_browser
def test_values_of_pictures_by_mouse_and_by_keyboard(seeds: Path, tab: Page) -> None:
    tab.open(seeds / "report.html")
    heat = "document.querySelector('#picture-heatmap-pocket .plot')"
    spoken = "document.activeElement.querySelector('[role=status]').textContent"
    tab.run(f"{heat}.scrollIntoView({{block: 'center'}}); {heat}.focus();")
    tab.press("ArrowRight")
    assert tab.run(spoken) == "L1E2: 900"  # the largest first
    tab.press("ArrowRight")
    assert tab.run(spoken).startswith("L1E3: ")
    tab.press("Home", "ArrowUp")
    assert tab.run(spoken) == "L0E0: none"
    tab.press("ArrowDown", "End", "ArrowRight", "ArrowDown")
    assert tab.run(spoken).startswith("L2shared: ")
    tab.press("Escape")
    assert tab.run(spoken) == ""
    assert tab.run(f"{heat}.querySelector('.tip').checkVisibility()") is False
    grid = tab.run(
        f"const box = {heat}.getBoundingClientRect();"
        f"const [left, top, width, height] = JSON.parse({heat}.querySelector('.spots').textContent).grids[0].box;"
        "return [box.left + box.width * (left + width * 5.5 / 9), box.top + box.height * (top + height * 2.5 / 5)];"
    )
    tab.point(*grid)
    assert tab.run(f"{heat}.querySelector('.tip').textContent") == "L2E5: 450"
    tab.run("document.querySelector('#picture-differences .plot').focus()")
    tab.press("ArrowRight")
    assert tab.run(spoken).startswith("pruning, super experts, all items: −43.3 points")
    tab.press("ArrowLeft")
    assert tab.run(spoken).startswith("pruning, super experts, all items: ")
    tab.press("Tab")  # not a trap
    assert tab.run("document.activeElement.closest('#picture-differences')") is None
    assert tab.problems == []


@in_a_browser
def test_words_at_a_picture_stay_in_its_frame_on_a_phone(seeds: Path, tab: Page) -> None:
    tab.open(seeds / "report.html", 390)
    inside = (
        "const [box, frame] = [document.activeElement.querySelector('.tip'), document.activeElement.parentElement]"
        ".map((one) => one.getBoundingClientRect());"
        "return box.width > 0 && box.left >= frame.left && box.right <= frame.right"
        " && box.top >= frame.top && box.bottom <= frame.bottom;"
    )
    for name in ("differences", "controls", "weights"):
        tab.run(f"document.querySelector('#picture-{name} .plot').focus();")
        for _ in range(9):
            tab.press("ArrowRight")
            assert tab.run(inside) is True, name
    assert tab.run("document.querySelector('#picture-differences .scroll').scrollLeft") > 0
    assert tab.run("document.documentElement.scrollWidth") == 390


@in_a_browser
def test_tab_goes_down_the_page_and_motion_can_be_off(seeds: Path, tab: Page) -> None:
    tab.open(seeds / "report.html")
    tab.press("Tab")
    assert tab.run("document.activeElement.className") == "skip"
    assert tab.run("document.activeElement.getBoundingClientRect().left") > 0
    tops = []
    for _ in range(24):
        tab.press("Tab")
        tops.append(tab.run("document.activeElement.getBoundingClientRect().top + scrollY"))
    below = tops[8:]  # after the header, which sticks
    assert below == sorted(below)
    assert tab.run("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    tab.show(still=False)
    assert tab.run("getComputedStyle(document.documentElement).scrollBehavior") == "smooth"


@in_a_browser
def test_paper_is_white_and_narrow(seeds: Path, tab: Page, tmp_path: Path) -> None:
    tab.open(seeds / "report.html", 718, dark=True)
    tab.show(width=718, dark=True, media="print")
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.run("document.querySelector('nav').checkVisibility()") is False
    assert tab.run("[...document.images].every((one) => one.currentSrc === one.src)")  # those of the light theme
    assert tab.run("document.documentElement.scrollWidth") <= 718
    wide = "(one) => one.getBoundingClientRect().right > 719"
    assert tab.run(f"[...document.querySelectorAll('main table, main img')].filter({wide}).length") == 0
    tab.print(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    tab.show()


DRIVE = """
const out = {};
const change = (id, value) => {
  const field = document.getElementById(id);
  field.value = value;
  field.dispatchEvent(new Event("input", {bubbles: true}));
};
const ids = () => [...document.querySelectorAll("#items .id")].map((node) => node.textContent);
const count = () => document.getElementById("count").textContent;
out.first = [ids().length, count(), document.getElementById("more").hidden];
document.getElementById("more").click();
out.more = ids().length;
change("task", "boolq");
out.boolq = [ids(), count()];
change("task", "");
change("variant", "2");
out.random = ids();
change("pattern", "won");
out.won = ids();
change("pattern", "lost");
out.lost = ids();
change("variant", "1");
change("pattern", "unparsed");
out.unparsed = count();
change("variant", "");
change("pattern", "differ");
change("query", "NEEDLE");
out.needle = count();
out.response = document.querySelector("#items pre").textContent;
out.elements = document.querySelectorAll("#items img, #items script, #items em").length;
change("query", "not in any answer");
out.nothing = [ids(), count()];
change("query", "");
out.patterns = [...document.getElementById("pattern").options].map((one) => one.value);
out.title = document.title;
return out;
"""


@in_a_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_filters_and_search_and_text_that_stays_text(folder: Path, html: str, tab: Page, width: int) -> None:
    tab.open(folder / "report.html", width)
    out = tab.run(DRIVE)
    differing = len(json.loads(BeautifulSoup(html, "html.parser").select_one("#data").get_text())["items"])  # type: ignore[union-attr]
    assert out["title"] == "by <i>hand</i>: super experts study"
    assert out["first"] == [10, f"10 of {differing} items", False]
    assert out["more"] == 20
    assert out["boolq"][0]
    assert all(name.startswith("boolq-") for name in out["boolq"][0])
    assert out["random"] == ["mmlu-29", "mmlu-39"]
    assert out["won"] == ["mmlu-39"]
    assert out["lost"] == ["mmlu-29"]
    assert out["unparsed"] == "10 of 20 items"
    assert out["needle"].endswith(" items")
    assert out["response"] == visible(HOSTILE)
    assert out["elements"] == 0
    assert out["nothing"] == [[], "No item matches."]
    assert out["patterns"] == ["differ", "lost", "won", "unparsed"]  # no runs of one variant to disagree
    assert tab.run("document.documentElement.scrollWidth") == width
    assert tab.problems == []


@in_a_browser
def test_runs_that_disagree_are_found(seeds: Path, tab: Page) -> None:
    tab.open(seeds / "report.html")
    code = DRIVE.partition("out.first")[0] + 'change("pattern", "unstable"); return [ids(), count()];'
    assert tab.run(code) == [["boolq-0"], "1 of 1 items"]
    summary = (
        "[...document.querySelectorAll('#items summary')].find((one) => one.textContent.includes('LoRA on super'))"
    )
    assert tab.run(f"{summary}.querySelector('.ticks').textContent") == "✓✗✓"
    assert tab.run(f"{summary}.querySelector('.hidden').textContent") == "2 of 3 runs right: "
    texts = tab.run(f"[...{summary}.parentElement.querySelectorAll('pre')].map((one) => one.textContent)")
    assert texts == [visible(HOSTILE), "otherwise"]  # two runs said and were read alike


def test_one_whole_prompt_for_each_benchmark(tmp_path: Path) -> None:
    folder = build(tmp_path / "study")
    sent = {"boolq": "<bos><user>Is it \x1b so?</s><script>", "mmlu": "Question: which?\nAnswer:"}
    manifest = folder / "variants" / "base" / "manifest.json"
    value = json.loads(manifest.read_text()) if manifest.is_file() else {}
    manifest.write_text(json.dumps({**value, "prompts": sent}))
    shutil.rmtree(folder / "profile")
    run(ReportConfig(folder=folder))
    page = BeautifulSoup((folder / "report.html").read_text(), "html.parser")
    shown = [pre.get_text() for pre in page.find_all("pre") if str(pre.get("aria-label")).startswith("Prompt of")]
    assert shown == ["Question: which?\nAnswer:", "<bos><user>Is it ␛ so?</s><script>"]
    assert "<bos><user>Is it ␛ so?</s><script>" in (folder / "report.md").read_text()
