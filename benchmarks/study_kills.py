"""What a study costs beyond its cells, and whether kills change its results.

    python benchmarks/study_kills.py --kills 20 --folder /tmp/kills

Runs a study of the pocket model without a kill, and prints how much longer it takes than the sum of its cells (read
from its progress.jsonl). Then runs it again in another folder, kills it with SIGKILL at random moments until it has
been killed as often as requested, lets it finish, and compares both results.json byte by byte. `--kills 0` runs the
first part alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

STUDY = """
name: kills
corpus: pocket
tokens: 8192
seq_len: 128
data_dir: pocket
limit: {limit}
max_new_tokens: 48
variants: [base, prune-super, prune-random: {{seeds: 3}}, lora-super, lora-random, lora-attention]
training: {{batch_size: 16, epochs: 1, learning_rate: 3.0e-3, max_length: 256}}
"""
# Timed inside the process: the start of the interpreter and the imports belong to the command, not to the study.
TIMED = """
import sys, time
from pathlib import Path
from superexperts.studies import study, workflow
from superexperts.studies.study import StudyConfig
started = time.monotonic()
study.run(StudyConfig(study=Path(sys.argv[1]), out=Path(sys.argv[2])))
print(time.monotonic() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills")
    parser.add_argument("--limit", type=int, default=40, help="items per benchmark")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--folder", type=Path, required=True, help="new folder for both studies")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    file, whole, killed = (options.folder / name for name in ("study.yaml", "whole", "killed"))
    file.write_text(STUDY.format(limit=options.limit))
    done = subprocess.run(
        [sys.executable, "-c", TIMED, file, whole], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    wall = float(done.stdout)
    events = [json.loads(line) for line in (whole / "progress.jsonl").read_text().splitlines()]
    cells = sum(event["seconds"] for event in events if event["event"] == "end")
    print(
        f"without a kill: {wall:.1f} s, {cells:.1f} s of it in cells: {wall / cells - 1:.2%} beyond the cells",
        flush=True,
    )
    if not options.kills:
        return

    draw, kills = random.Random(options.seed), 0
    command = [sys.executable, "-m", "superexperts", "study", str(file), "--out", str(killed)]
    while kills < options.kills:
        log = killed / "progress.jsonl"
        seen = log.stat().st_size if log.is_file() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not log.is_file() or log.stat().st_size == seen):
            time.sleep(0.05)  # a kill during the imports would prove nothing: they are the same each time
        time.sleep(draw.uniform(0, 2 * wall / options.kills))
        os.kill(process.pid, signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            kills += 1
            cell = json.loads(log.read_text().splitlines()[-1])
            print(f"kill {kills}: {cell['cell']} ({cell['event']})", flush=True)
        if (killed / "results.json").is_file():
            break
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    same = (killed / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    print(f"{kills} kills: results.json is {'the same' if same else 'DIFFERENT'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
