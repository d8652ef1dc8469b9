"""The report as a browser and a parser see it: right numbers, nothing but text from the model, nothing from the net."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from study_folder import CORRECT, HOSTILE, TITLES, build, results_json
from superexperts.config import ReportConfig
from superexperts.disagreements import script_safe, visible
from superexperts.errors import DataError
from superexperts.report import run, write_report
from superexperts.rundir import write_json
from superexperts.stats import wilson

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = build(tmp_path_factory.mktemp("study"))
    write_report(made)
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
    lines = page.select("#results tbody tr")
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
        "Measured on the pocket model: an embedded toy; not a result about any real model."
    )
    assert page.main.find("section")["id"] == "verdict"  # type: ignore[index]
    assert "Pruning super experts costs 43.3 points of accuracy; pruning random experts" in text_of(page.h1)
    tiles = [text_of(tile) for tile in page.select(".tile")]
    assert tiles[0].startswith("prune super experts −43.3 points 95% interval")
    assert "perplexity 6.00 → 15.00 (×2.5)" in tiles[0]
    assert "no difference detected; over 17.7 points would have been seen, p = 1" in tiles[1]
    assert "perplexity 6.00 → 6.03" in tiles[1]
    assert text_of(page.select("#verdict table tbody tr")[0]).startswith(
        "prune super experts prune random experts −43.3"
    )


def test_no_banner_for_a_real_model(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", results_json() | {"model": "org/real"})
    soup = BeautifulSoup(write_report(tmp_path).read_text(encoding="utf-8"), "html.parser")
    assert soup.select_one("main .banner") is None
    assert not soup.select("#answers, #experts, #training, #data")  # results.json alone is enough
    assert len(soup.select("#results tbody tr")) == 5


def test_nothing_is_loaded_and_only_one_script_may_run(html: str, page: BeautifulSoup) -> None:
    for tag in page.find_all(True):
        for name in ("src", "srcset", "href", "action", "data", "poster"):
            value = tag.get(name)
            if value is not None:
                assert str(value).startswith(("data:", "#")), f"{tag.name} {name}={str(value)[:60]}"
        assert not [name for name in tag.attrs if name.startswith("on")]
    assert "url(" not in html
    assert "@import" not in html
    scripts = page.find_all("script")
    assert [script.get("type") for script in scripts] == ["application/json", None]
    policy = str(page.select_one("meta[http-equiv]")["content"])  # type: ignore[index]
    digest = base64.b64encode(hashlib.sha256(scripts[1].get_text().encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert len(html.encode()) < 5 * 2**20


def test_titles_and_names_are_escaped(html: str) -> None:
    assert "<b>&#34;attention&#34;</b>" not in html
    assert "LoRA on &lt;b&gt;&#34;attention&#34;&lt;/b&gt;" in html
    assert "by &lt;i&gt;hand&lt;/i&gt;" in html


def test_pictures_have_descriptions_and_are_svg(page: BeautifulSoup) -> None:
    pictures = page.select("picture")
    assert len(pictures) == 4  # differences, heatmap, layers, training
    for picture in pictures:
        for address in [*(source["srcset"] for source in picture.select("source")), picture.img["src"]]:  # type: ignore[index]
            kind, data = str(address).split(",", 1)
            assert kind == "data:image/svg+xml;base64"
            assert b"<svg" in base64.b64decode(data)
        assert len(str(picture.img["alt"])) > 40  # type: ignore[index]
    assert "L1E2 900" in str(pictures[1].img["alt"])  # type: ignore[index]
    assert "LoRA on super experts from 2 to 0.5" in str(pictures[3].img["alt"])  # type: ignore[index]


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
    assert item["answers"][1] == {"correct": False, "extracted": None, "how": "unparsed", "response": visible(HOSTILE)}
    assert item["answers"][0]["correct"] is True


def test_what_was_run(page: BeautifulSoup) -> None:
    section = text_of(page.select_one("#run"))
    assert "LoRA on super experts lora super L2E5, L1E2 12,345" in section
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


def test_long_and_many_answers_stay_small(tmp_path: Path) -> None:
    made = build(tmp_path)
    for file in made.glob("variants/*/answers/*.jsonl"):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        file.write_text("".join(json.dumps(row | {"response": "<" * 200_000 + "END"}) + "\n" for row in rows))
    path = write_report(made)
    assert path.stat().st_size < 5 * 2**20
    data = json.loads(BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser").select_one("#data").get_text())  # type: ignore[union-attr]
    response = data["items"][0]["answers"][0]["response"]
    assert response.endswith("<END")
    assert "[… 199,003 characters …]" in response


def test_errors_name_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no results\.json"):
        run(ReportConfig(folder=tmp_path))
    made = build(tmp_path / "study")
    (made / "variants" / "lora-super" / "extractions" / "boolq.jsonl").unlink()
    with pytest.raises(DataError, match=r"boolq\.jsonl is missing"):
        write_report(made)
    assert not (made / "report.html").exists()


def test_report_command_is_repeatable(folder: Path, html: str) -> None:
    assert run(ReportConfig(folder=folder)) == {"out": str(folder), "report": str(folder / "report.html")}
    assert (folder / "report.html").read_text(encoding="utf-8") == html


WATCH = """
window.problems = [];
addEventListener("error", (event) => problems.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => problems.push("policy " + event.violatedDirective));
console.error = (...words) => problems.push(words.join(" "));
"""
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
change("pattern", "won:2");
out.won = ids();
change("pattern", "lost:2");
out.lost = ids();
change("pattern", "");
change("query", "NEEDLE");
out.needle = count();
out.response = document.querySelector("#items pre").textContent;
out.elements = document.querySelectorAll("#items img, #items script, #items em").length;
change("query", "not in any answer");
out.nothing = [ids(), count()];
out.title = document.title;
out.problems = problems;
out.wide = document.documentElement.scrollWidth > innerWidth;
const result = document.createElement("div");
result.id = "outcome";
result.textContent = JSON.stringify(out);
document.body.append(result);
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])
def test_in_a_browser(html: str, tmp_path: Path, width: int) -> None:
    """Runs the page with a driver that its policy is told to allow, and reads what the driver saw."""
    hashes = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in (WATCH, DRIVE)]
    driven = html.replace("script-src ", "script-src " + "".join(f"'sha256-{one}' " for one in hashes), 1)
    driven = driven.replace("<title>", f"<script>{WATCH}</script><title>", 1)
    driven = driven.replace("</body>", f"<script>{DRIVE}</script></body>", 1)
    file = tmp_path / "report.html"
    file.write_text(driven, encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    options += (
        f" --disable-component-update --disable-sync --window-size={width},900 --user-data-dir={tmp_path / 'user'}"
    )
    command = [str(CHROMIUM), *options.split(), "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    outcome = BeautifulSoup(done.stdout, "html.parser").select_one("#outcome")
    assert outcome is not None
    out = json.loads(outcome.get_text())
    differing = len(json.loads(BeautifulSoup(html, "html.parser").select_one("#data").get_text())["items"])  # type: ignore[union-attr]
    assert out["problems"] == []
    assert out["title"] == "by <i>hand</i>: super experts study"
    assert out["first"] == [10, f"10 of {differing} items", False]
    assert out["more"] == 20
    assert out["boolq"][0]
    assert all(name.startswith("boolq-") for name in out["boolq"][0])
    assert out["won"] == ["mmlu-39"]
    assert out["lost"] == ["mmlu-29"]
    assert out["needle"].endswith(" items")
    assert out["response"] == visible(HOSTILE)
    assert out["elements"] == 0
    assert out["nothing"] == [[], "No item matches."]
    assert out["wide"] is False
