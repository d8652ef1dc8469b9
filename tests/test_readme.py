"""README's commands, run as a reader would run them: they print what README says that they print."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def commands() -> list[tuple[str, str]]:
    """(command, what it prints) of the console block; a line `...` stands for any lines."""
    block = re.search(r"```console\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert block, "README has no console block"
    parts = re.split(r"^\$ (.*)\n", block[1], flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def as_pattern(line: str) -> str:
    """A pattern for a line; in a row of a table any numbers match, since rounding differs between machines."""
    if line == "...":
        return "(?s:.*)"
    escaped = re.escape(line.rstrip())
    return re.sub(r"(\\ )*[\d.,\\]*\d(\\ )*", lambda _: r" *[\d.,]+ *", escaped) if line.startswith("│") else escaped


def test_commands_print_what_readme_says(tmp_path: Path) -> None:
    environment = {**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("SUPEREXPERTS_DATA", None)
    assert len(commands()) >= 6
    for command, printed in commands():
        program, *arguments = shlex.split(command)
        assert program == "superexperts"
        done = subprocess.run(
            [sys.executable, "-m", "superexperts", *arguments],
            capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        pattern = "\n".join(map(as_pattern, printed.splitlines()))
        said = "\n".join(map(str.rstrip, done.stdout.splitlines()))
        assert re.fullmatch(pattern, said), f"$ {command}\n{said}"
