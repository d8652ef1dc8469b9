"""What arrives at the Hub is what was meant, byte by byte, in one commit; where anything is wrong, nothing arrives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_xet
import huggingface_hub.constants
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.numpy import save_file

from superexperts.cli import main
from superexperts.core.runs import read_json, write_json, write_manifest, write_text
from superexperts.core.types import ExpertSet
from superexperts.results.tables import markdown_table
from superexperts.training.card import model_card
from superexperts.training.train import TrainConfig
from tests.support import study_folder
from tests.support.hub import TOKEN, Hub, serving

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
RESULT = {
    "experts": ["L1E2", "L2E5"], "rows": 3, "tokens": 99, "trainable_parameters": 64, "loss": [[1, 2.0], [2, 1.5]],
    "eval_loss": [], "kept_step": 2, "max_logit_change": 0.25, "kl": 0.125, "exposure": {"L1E2": 7, "L2E5": 0},
}  # fmt: skip


def train_folder(folder: Path, model: str = "owner/moe") -> Path:
    """What `train` leaves, without the training."""
    config = TrainConfig(model=model, data=Path("rows.json"), experts="L1E2,L2E5", seed=11)
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    save_file({"a": np.arange(64, dtype=np.float32)}, adapter / "adapter_model.safetensors")
    settings = {"base_model_name_or_path": model, "peft_type": "LORA", "r": 4}
    write_text(adapter / "adapter_config.json", json.dumps(settings, indent=2, sort_keys=True))
    write_text(adapter / "README.md", model_card(vars(config), RESULT, {"rows.json": "ab" * 32}))
    write_text(adapter / "recipe.yaml", f"model: {model}\nseed: 11\n")
    write_json(folder / "training.json", RESULT)
    write_text(folder / "recipe.yaml", "data: /home/researcher/rows.json\n")  # not sent: adapter/recipe.yaml is
    inputs = {"options": {"seed": "11"}}
    write_manifest(folder, "train", inputs, ["adapter", "recipe.yaml", "training.json"], 1.5)
    return folder


def finished_study(folder: Path, titles: dict[str, str] | None = None) -> Path:
    study_folder.build(folder, study_folder.TITLES if titles is None else titles)
    if titles is None:
        (folder / "variants" / "lora-super" / "train" / "training.json").unlink()
        train_folder(folder / "variants" / "lora-super" / "train")
    write_text(folder / "result.csv", "Model Variant,MMLU\nbaseline,75.00\n")
    write_text(folder / "report.html", "<!doctype html><p>Việt, /etc/hosts and <script>x</script></p>")
    (folder / "figures").mkdir()
    (folder / "figures" / "forest.png").write_bytes(PNG)
    pruned = folder / "variants" / "prune-super" / "model"
    pruned.mkdir(parents=True)
    save_file({"w": np.zeros(4, dtype=np.float32)}, pruned / "model.safetensors")
    write_manifest(folder, "study", {"plan": {"seed": "0"}}, ["results.json", "result.csv"], 2.0)
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty Hub that this process is logged in to."""
    for kept in (server.repos, server.store, server.requests, server.failures):
        kept.clear()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server


def push(capsys: pytest.CaptureFixture[str], folder: Path, *options: str, repo: str = "me/it") -> dict[str, Any]:
    assert main(["push", str(folder), "--repo", repo, "--json", *options]) == 0
    return dict(json.loads(capsys.readouterr().out))


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *options: str, repo: str = "me/it") -> str:
    capsys.readouterr()
    assert main(["push", str(folder), "--repo", repo, *options]) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("superexperts: ")]
    assert said.out == ""
    assert len(lines) == 1
    assert "Traceback" not in said.err
    assert TOKEN not in said.err
    return lines[0]


def test_an_adapter_arrives_byte_by_byte_and_the_second_push_makes_no_commit(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train_folder(tmp_path / "lora")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    first = push(capsys, folder, "--license", "apache-2.0", "--dataset", "a/b", "--dataset", "c/d", "--message", "one")
    repo = hub.repos["model", "me/it"]
    assert repo.private
    arrived = dict(repo.files())
    card = ModelCard(arrived.pop("README.md").decode())
    assert arrived.pop(".gitattributes")
    assert arrived == {
        **{name: (folder / "adapter" / name).read_bytes() for name in ("adapter_config.json", "recipe.yaml")},
        "adapter_model.safetensors": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        **{name: (folder / name).read_bytes() for name in ("manifest.json", "training.json")},
    }
    assert card.data.to_dict() == {
        "library_name": "peft",
        "base_model": "owner/moe",
        "tags": ["lora", "superexperts"],
        "license": "apache-2.0",
        "datasets": ["a/b", "c/d"],
    }
    own = (folder / "adapter" / "README.md").read_text().partition("\n# ")[2]
    assert own.strip() in card.text
    assert f"| torch | {read_json(folder / 'manifest.json', 'x')['versions']['torch']} |" in card.text
    assert [commit.message for commit in repo.branches["main"]] == ["initial commit", "one"]
    assert (first["commit"], first["changed"], first["others"]) == (repo.branches["main"][-1].oid, True, [])
    assert (
        first["bytes"]
        == sum(file["bytes"] for file in first["files"])
        == sum(map(len, repo.files().values())) - len(repo.files()[".gitattributes"])
    )

    again = push(capsys, folder / "adapter", "--license", "apache-2.0", "--dataset", "a/b", "--dataset", "c/d")
    assert (again["commit"], again["changed"]) == (first["commit"], False)
    assert len(repo.branches["main"]) == 2
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before

    # Only what differs is in the next commit, and what this folder lacks stays.
    repo.files()["notes.md"] = b"mine"
    hub.requests.clear()
    third = push(capsys, folder, "--license", "mit")
    assert (third["changed"], third["others"]) == (True, ["notes.md"])
    assert repo.files()["notes.md"] == b"mine"
    assert ModelCard(repo.files()["README.md"].decode()).data.license == "mit"
    assert not any(request.startswith("PUT") for request in hub.requests)


def test_a_study_arrives_without_checkpoints(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished_study(tmp_path / "study")
    (folder / "figures" / ".DS_Store").write_bytes(b"\0")
    write_json(folder / ".variants.x" / "manifest.json", {})
    push(capsys, folder)
    arrived = dict(hub.repos["model", "me/it"].files())
    train = "variants/lora-super/train"
    cards = {path: arrived.pop(path).decode() for path in ("README.md", f"{train}/adapter/README.md")}
    del arrived[".gitattributes"]
    assert arrived == {path: (folder / path).read_bytes() for path in arrived}
    assert sorted(arrived) == sorted([
        "experts/super.json", "figures/forest.png", "manifest.json", "report.html", "result.csv", "results.json",
        *(f"{train}/adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "recipe.yaml")),
        f"{train}/manifest.json", f"{train}/training.json",
        *(f"variants/{name}/manifest.json" for name in study_folder.TITLES),
    ])  # fmt: skip
    table = markdown_table(read_json(folder / "results.json", "x"))
    for text in cards.values():
        assert table in text
        assert ModelCard(text).data.base_model == "owner/moe"
        assert ModelCard(text).data.library_name == "peft"
        assert ModelCard(text).data.license is None
    assert "| super | super |  | L1E2, L2E5 |" in cards["README.md"]
    assert f"| `{train}/adapter` | LoRA on experts L1E2, L2E5 of owner/moe | 11 |" in cards["README.md"]
    assert "# by &lt;i>hand&lt;/i>: a study of pocket" in cards["README.md"]

    # The adapter alone has the table of the study that it lies in.
    push(capsys, folder / train, repo="me/adapter")
    assert table in hub.repos["model", "me/adapter"].files()["README.md"].decode()


def test_a_study_without_an_adapter_is_a_data_set(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    titles = {name: title for name, title in study_folder.TITLES.items() if not name.startswith("lora")}
    push(capsys, finished_study(tmp_path / "study", titles), "--license", "mit", "--dataset", "a/b")
    front = yaml.safe_load(hub.repos["dataset", "me/it"].files()["README.md"].decode().split("---")[1])
    assert front == {"viewer": False, "tags": ["superexperts", "mixture-of-experts"], "license": "mit"}


def test_a_dry_run_asks_nothing_of_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    folder = train_folder(tmp_path / "lora")
    assert main(["push", str(folder), "--repo", "me/it", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    size = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert f"{size}  adapter_model.safetensors" in printed
    assert "for the model repository me/it; nothing was sent" in printed
    assert hub.requests == []


def test_a_branch_is_made(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train_folder(tmp_path / "lora")
    one = push(capsys, folder, "--revision", "try/1", "--no-private")
    repo = hub.repos["model", "me/it"]
    assert not repo.private
    assert list(repo.files("main")) == [".gitattributes"]
    assert "adapter_model.safetensors" in repo.files("try/1")
    two = push(capsys, folder, "--revision", "try/1", "--no-private")
    assert (one["changed"], two["changed"]) == (True, False)


def test_what_is_public_is_not_pushed_to_unasked(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train_folder(tmp_path / "lora")
    push(capsys, folder, "--no-private")
    assert "--private: me/it exists and is public; give --no-private" in refused(capsys, folder, "--revision", "b")
    assert list(hub.repos["model", "me/it"].branches) == ["main"]


def test_paths_of_this_machine_stay_here(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "models" / "mixture 8x1"
    model.mkdir(parents=True)
    base = str(model)
    folder = finished_study(tmp_path / "study")
    adapter = folder / "variants" / "lora-super" / "train"
    shutil.rmtree(adapter)
    train_folder(adapter, base)
    write_text(folder / "study.yaml", f"model: {base}  # mine\ntrain_data: /mnt/a b/rows.json\n")
    write_text(
        folder / "report.html", f"<p>{base}, {model.name}, '{folder}/experts/super.json', /mnt/a b/rows.json.</p>"
    )
    value = {"corpus": f"('{folder}/c.txt', 'pocket')", "out": str(folder), "url": "https://x.org/a/b", "n": "a/b/c"}
    write_manifest(folder, "study", value, ["results.json", "result.csv"], 2.0)
    result = push(capsys, folder, "--base-model", "owner/moe")
    files = hub.repos["model", "me/it"].files()
    for path, data in files.items():
        assert str(tmp_path).encode() not in data, path
    assert files["study.yaml"].decode() == "model: owner/moe  # mine\ntrain_data: rows.json\n"
    assert files["report.html"].decode() == f"<p>owner/moe, {model.name}, './experts/super.json', rows.json.</p>"
    sent = json.loads(files["manifest.json"])["inputs"]
    assert sent == {"corpus": "('c.txt', 'pocket')", "out": ".", "url": value["url"], "n": "a/b/c"}
    card = files["variants/lora-super/train/adapter/README.md"].decode()
    assert ModelCard(card).data.base_model == "owner/moe"
    assert "# LoRA on experts L1E2, L2E5 of owner/moe\n" in card
    config = json.loads(files["variants/lora-super/train/adapter/adapter_config.json"])
    assert config == {"base_model_name_or_path": "owner/moe", "peft_type": "LORA", "r": 4}
    assert {base, "/mnt/a b/rows.json", str(folder), f"{folder}/c.txt"} <= set(result["stripped"])

    push(capsys, folder, repo="me/other")  # without the option: no base model, and still no path
    files = hub.repos["model", "me/other"].files()
    assert ModelCard(files["README.md"].decode()).data.get("base_model") is None
    assert files["study.yaml"].decode().startswith("model: mixture 8x1  # mine")


@pytest.mark.parametrize(
    ("file", "data", "said"),
    [
        ("figures/model.bin", b"\x80\x04", "model.bin is none of the kinds that are pushed"),
        ("figures/forest.png", b"\x80\x04\x95", "forest.png is none of the kinds"),
        ("figures/a.md", b"\x80\x04\x95", "a.md is not UTF-8 text"),
        ("figures/a.safetensors", b"\x80\x04\x95", "a.safetensors"),
        ("figures/a.md", b"see {folder}/x", "a.md names"),
        ("figures/a.svg", b"\n\n<g>{home}/x</g>", "in line 3; take it out"),
        ("figures/a.md", b"export HF_TOKEN=hf_" + b"abcde" * 7, "holds what looks like a token"),
        ("results.json", b"{}\n", "results.json is missing or not as"),
        ("variants/lora-super/train/adapter/extra.json", b"{}", "adapter is missing or not as"),
        ("study.yaml", b"a: [", "study.yaml cannot be read"),
        ("figures/a.json", b"{", "figures/a.json cannot be read"),
        ("experts/manifest.json", b"[]", "manifest.json was not written by superexperts"),
        ("manifest.json", b'{"name": "an app"}', "manifest.json was not written by superexperts"),
    ],
)
def test_what_is_not_whole_or_not_ours_is_refused(
    file: str, data: bytes, said: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished_study(tmp_path / "study")
    data = data.replace(b"{folder}", str(folder).encode()).replace(b"{home}", str(Path.home()).encode())
    (folder / file).write_bytes(data)
    assert said in refused(capsys, folder)
    assert hub.requests == []


def test_links_out_of_the_folder_and_missing_files_are_refused(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished_study(tmp_path / "study")
    write_text(tmp_path / "secret.md", "secret")
    (folder / "figures" / "a.md").symlink_to(tmp_path / "secret.md")
    assert "a.md is a link out of" in refused(capsys, folder)
    (folder / "figures" / "a.md").unlink()
    (folder / "figures" / "a.png").symlink_to(folder / "figures" / "forest.png")
    assert refused(capsys, folder, repo="a--b/c").startswith("superexperts: --repo: 'a--b/c' is not a name on the Hub")
    (folder / "report.html").unlink()
    assert "has no report.html; run `superexperts study` to its end" in refused(capsys, folder)
    assert "holds neither an adapter nor results.json" in refused(capsys, tmp_path)
    lora = train_folder(tmp_path / "lora")
    (lora / "manifest.json").unlink()
    assert "lora has no manifest.json" in refused(capsys, lora)
    for options, advice in (
        (["--base-model", "/a/b"], "--base-model: '/a/b' is not OWNER/NAME"),
        (["--message", " "], "--message: ' ' is empty"),
    ):
        assert advice in refused(capsys, lora, *options)
    assert "--repo: 'it' is not OWNER/NAME" in refused(capsys, lora, repo="it")
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("request_", "reply", "said"),
    [
        ("create", (403, {"error": "no\nright"}, {}), "403 (no right): the token has no write access there"),
        ("create", (500, {}, {}), "500: the Hub failed; run the same command again later"),
        ("validate", (400, {"errors": [{"message": "bad license"}]}, {}), "bad license"),
        ("preupload", (404, {}, {"X-Error-Code": "RevisionNotFound"}), "404: there is no such repository or branch"),
        ("lfs/objects", (403, {"error": "storage"}, {}), "403 (storage)"),
        ("PUT", (403, {}, {}), "adapter_model.safetensors"),
        ("commit", (409, {"error": "a conflict"}, {}), "409 (a conflict): the repository was changed"),
        ("commit", (412, {}, {}), "412: the repository was changed meanwhile; run the same command again"),
        ("commit", (413, {}, {}), "413: the upload is too large"),
        ("create", (200, b"<html>a proxy", {}), "check the network, and run the same command again"),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_a_rerun_goes_on(
    request_: str, reply: Any, said: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train_folder(tmp_path / "lora")
    hub.failures[request_] = reply
    assert said in refused(capsys, folder)
    hub.failures.clear()
    stored = dict(hub.store)
    hub.requests.clear()
    assert push(capsys, folder)["changed"]
    assert any(request.startswith("PUT") for request in hub.requests) != bool(stored)
    assert len(hub.repos["model", "me/it"].branches["main"]) == 2


def test_wrong_tokens_and_no_network_are_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train_folder(tmp_path / "lora")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "401 (Invalid credentials in Authorization header): the token is missing or not valid" in refused(
        capsys, folder
    )
    monkeypatch.delenv("HF_TOKEN")
    assert "the token is missing or not valid; log in with `hf auth login`, or set HF_TOKEN" in refused(capsys, folder)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "Connection refused; check the network" in refused(capsys, folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it" in refused(capsys, folder)
    assert hub.repos == {}


def test_the_command_with_hf_endpoint_and_xet(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user runs it: hf_xet uploads the weights, and the test reads them back from its store on disk."""
    folder = train_folder(tmp_path / "lora")
    monkeypatch.setattr(hub, "xet", tmp_path / "xet")
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    for name in ("HF_HUB_DISABLE_XET", "HF_HUB_OFFLINE"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "superexperts", "push", str(folder), "--repo", "me/it"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("6 files, ")
    assert f"in {hub.url}/me/it\ncommit {hub.repos['model', 'me/it'].branches['main'][-1].oid}\n" in done.stdout
    assert len(done.stderr.splitlines()) == 1
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or TOKEN.encode() not in file.read_bytes()
    weights = folder / "adapter" / "adapter_model.safetensors"
    info = hf_xet.hash_files([str(weights)])[0]
    with hf_xet.XetSession().new_file_download_group(
        token_refresh_url=f"{hub.url}/api/models/me/it/xet-write-token/main",
        token_refresh_headers={"Authorization": f"Bearer {TOKEN}"},
    ) as group:
        group.start_download_file(hf_xet.XetFileInfo(info.hash, info.file_size), str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == weights.read_bytes()


def test_a_set_of_experts_is_named_with_its_seed(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished_study(tmp_path / "study")
    drawn = ExpertSet(
        model="pocket", rule={"name": "random", "seed": 3}, experts=((1, 0), (2, "shared")), scores=(None,) * 2
    )
    write_json(folder / "experts" / "random-s1.json", drawn.to_json())
    push(capsys, folder)
    assert "| random-s1 | random | 3 | L1E0, L2shared |" in hub.repos["model", "me/it"].files()["README.md"].decode()
