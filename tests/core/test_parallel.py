"""A function of many items by several processes gives what one gives, and none of them is left behind."""

from __future__ import annotations

import errno
import json
import multiprocessing
import multiprocessing.context
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from superexperts.core.errors import DataError, SuperExpertsError
from superexperts.core.parallel import parallel_map
from superexperts.core.types import Answer, Extraction
from superexperts.extraction import scores as module
from superexperts.extraction.scores import extract

ME = os.getpid()


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a command's own process, whatever runs the tests."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    if sys.platform != "linux":
        pytest.skip("only Linux copies a process")


@pytest.mark.parametrize(("size", "processes"), [(0, 1), (1, 1), (5, 1), (6, 2), (10, 3), (13, 4), (1000, 4)])
@pytest.mark.usefixtures("four_cores")
def test_the_items_keep_their_order(size: int, processes: int) -> None:
    found = parallel_map(lambda item: (item * item, os.getpid()), range(size), worth=3)
    assert [value for value, _ in found] == [item * item for item in range(size)]
    assert len({process for _, process in found} | {ME}) == processes
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("other", ["thread", "system"])
@pytest.mark.usefixtures("four_cores")
def test_one_process_where_a_copy_would_not_be_safe(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if other == "thread":
        monkeypatch.setattr(threading, "active_count", lambda: 2)
    else:
        monkeypatch.setattr(sys, "platform", "darwin")
    assert set(parallel_map(lambda _: os.getpid(), range(100), worth=1)) == {ME}


@pytest.mark.usefixtures("four_cores")
def test_a_killed_process_is_an_error() -> None:
    def die(item: int) -> int:
        if item == 99:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(SuperExpertsError, match="was killed, perhaps for lack of memory"):
        parallel_map(die, range(100), worth=1)
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("four_cores")
def test_what_ends_this_process_ends_the_others() -> None:
    def wait(_: int) -> None:
        if os.getpid() == ME:
            raise KeyboardInterrupt
        time.sleep(600)

    with pytest.raises(KeyboardInterrupt):
        parallel_map(wait, range(4), worth=1)
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("four_cores")
def test_answers_are_read_alike_by_one_and_by_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["B", "hm", "The answer is C.", "not A", "A or B", "\ud800", "D. oil", "\x00"] * 5
    choices = (("A", "sand"), ("B", "clay"), ("C", "a river"), ("D", "oil"))
    answers = [
        Answer(
            id=str(number), prompt="Where?", response=text, gold="B", choices=choices, kind="choice", task="mmlu",
            variant="base", seed=0,
        )
        for number, text in enumerate(texts)
    ]  # fmt: skip
    (tmp_path / "answers").mkdir()
    lines = "".join(json.dumps(answer.to_json()) + "\n" for answer in answers)
    (tmp_path / "answers" / "mmlu.jsonl").write_text(lines)
    by_one = [extract(answer) for answer in answers]
    monkeypatch.setattr(module, "WORTH", 7)
    started = []
    start = multiprocessing.context.ForkProcess.start
    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", lambda own: (started.append(own), start(own)))
    (score,) = module.extract_folder(tmp_path)
    assert len(started) == 3
    written = (tmp_path / "extractions" / "mmlu.jsonl").read_text().splitlines()
    assert [Extraction(**json.loads(line)) for line in written] == by_one
    assert score.correct == sum(bool(row.correct) for row in by_one) == 5


@pytest.mark.usefixtures("four_cores")
def test_the_first_error_is_raised_whoever_met_it() -> None:
    bad = [0, 60, 90]

    def refuse(item: int) -> int:
        if item in bad:
            raise DataError(f"{item} is bad")
        return item

    while bad:
        with pytest.raises(DataError, match=f"^{bad[0]} is bad"):
            parallel_map(refuse, range(100), worth=1)
        del bad[0]
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("four_cores")
def test_no_room_for_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fork() -> int:
        tried.append(1)
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    assert parallel_map(lambda item: item, range(100), worth=1) == list(range(100))
    assert len(tried) == 3


@pytest.mark.usefixtures("four_cores")
def test_a_process_that_may_have_no_children_does_all() -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    own = context.Process(
        target=lambda: sender.send(len(set(parallel_map(lambda _: os.getpid(), range(9), worth=1)))), daemon=True
    )
    own.start()
    assert receiver.poll(30)
    assert receiver.recv() == 1
    own.join()


def test_ten_thousand_answers_are_worth_it() -> None:
    assert 10_000 // module.WORTH > 2


SCRIPT = """
import os, pathlib, sys, time
from superexperts.core.parallel import parallel_map
os.sched_getaffinity = lambda _: range(3)
me = os.getpid()
def work(item):
    if os.getpid() == me:
        time.sleep(600)
    pathlib.Path(sys.argv[1], str(item)).touch()
    return "x" * 10**6
parallel_map(work, range(3), worth=1)
"""


GROUP = """
import os, signal, sys, time
from superexperts.core.parallel import parallel_map
os.sched_getaffinity = lambda _: range(4)
signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[1] == "ignores" else signal.default_int_handler)
me = os.getpid()
def work(item):
    if os.getpid() == me:
        time.sleep(0.3)
        os.killpg(me, signal.SIGINT)
    else:
        time.sleep(0.6)
    return item
print(parallel_map(work, range(4), worth=1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux copies a process")
@pytest.mark.parametrize("how", ["ends", "ignores"])
def test_an_interrupt_of_all_is_the_first_process_alone(how: str) -> None:
    """As Ctrl-C in a terminal, and as a script's `command &`, which ignores it."""
    command = [sys.executable, "-c", GROUP, how]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=60)
    if how == "ignores":
        assert (done.stdout, done.stderr) == ("[0, 1, 2, 3]\n", "")
    else:
        assert done.returncode == -signal.SIGINT
        assert done.stderr.count("Traceback") == 1  # the first one's own, which the command line makes a line of


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux copies a process")
def test_a_killed_command_leaves_no_process(tmp_path: Path) -> None:
    """Its forks have more to send than a pipe holds, and the receiver is dead."""
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], stderr=subprocess.PIPE) as command:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        command.kill()
        assert command.communicate(timeout=60)[1] == b""  # ends when the last process has closed the pipe
