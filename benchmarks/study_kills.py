"""What a study costs beyond its cells, and whether kills change what it finds.

    python benchmarks/study_kills.py --kills 20 --folder /tmp/kills

Runs a study of the pocket model without a kill, and prints its time beyond the sum of its cells' (as its own log has
them). Then runs it again in another folder and kills it (SIGKILL) at a random moment, again and again, until it has
been killed so often; lets it end; and compares results.json byte by byte. `--kills 0` is the first part alone.
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
# Timed within the process: what the interpreter and the imports take is the command's, not the study's.
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
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
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
    print(f"without a kill: {wall:.1f} s, {cells:.1f} s of them in cells: {wall / cells - 1:.2%} beyond", flush=True)
    if not options.kills:
        return

    draw, kills = random.Random(options.seed), 0
    command = [sys.executable, "-m", "superexperts", "study", str(file), "--out", str(killed)]
    while kills < options.kills:
        log = killed / "progress.jsonl"
        seen = log.stat().st_size if log.is_file() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not log.is_file() or log.stat().st_size == seen):
            time.sleep(0.05)  # the imports are the same each time: a kill there would prove nothing
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
    print(f"{kills} kills: results.json is {'the same' if same else 'ANOTHER'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
