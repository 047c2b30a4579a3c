"""A few of the faults of tests/faults.py each time, and whether it sees what it looks for."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from prepare import BadInput
from tests import faults
from tests.conftest import ROOT
from tests.faults import Bed, Job


@pytest.mark.long
def test_some_kills_and_a_folder_that_may_not_be_written():
    """In a process of its own: one that has trained cannot be forked to train."""
    line = [sys.executable, "-m", "tests.faults", "--kills", "4", "killed", "readonly"]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    head, killed, readonly = run.stdout.splitlines()
    assert killed.split()[:3] == ["killed", "4", "0"]
    assert readonly.split()[0] == "readonly" and readonly.split()[2] == "0"
    assert readonly.split()[1] == "8" or os.getuid() == 0, "root that may not mount sees nothing"


# ------------------------------------------------------------------------------------------------
# Small commands that do it wrong.


def out() -> Path:
    folder = Path(sys.argv[1])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: {error}") from None
    return folder


def does_well():
    for i in range(10):
        beside = out() / f"{i}.part"
        beside.write_text(str(i) * 100)
        beside.replace(out() / f"{i}.txt")
        time.sleep(0.005)


def appends():
    """What is half written stays, and all is written behind it."""
    with open(out() / "a.txt", "a") as file:
        for i in range(10):
            print(i, file=file, flush=True)
            time.sleep(0.005)


def trips_over_itself():
    """The second run fails at what the first has left."""
    out().joinpath("lock").touch(exist_ok=False)
    does_well()
    out().joinpath("lock").unlink()


def tells_nothing():
    try:
        does_well()
    except OSError:
        sys.exit(2)


@pytest.fixture
def bed(tmp_path):
    def made(main) -> Bed:
        script = SimpleNamespace(__name__="toy", main=main)
        job = Job(script, lambda out: (out,), r".*txt")
        jobs, dice = {"toy": job}, random.Random(0)
        bed = Bed(tmp_path, "", jobs, dice, {}, {}, {"toy": 0.06})
        bed.made["toy"] = bed.fresh()
        assert job.begin(bed.made["toy"]).end() == 0
        bed.whole["toy"] = job.result(bed.made["toy"])
        return bed

    return made


def test_a_command_that_does_well_passes(bed):
    good = bed(does_well)
    assert faults.killed(good, 5) == (5, [])
    assert faults.ends_well(good, "toy", good.fresh()) == ""


@pytest.mark.parametrize(
    ("main", "words"),
    [(appends, "not what an undisturbed run gives: a.txt"), (trips_over_itself, "ended with 2")],
)
def test_one_that_does_not_go_on_is_seen(bed, main, words):
    _, wrong = faults.killed(bed(main), 5)
    assert wrong and all(words in line for line in wrong)


def test_a_full_disk_is_seen_to_be_told_of(bed):
    """Files cannot grow; a 2 without a word is no refusal."""
    for main, fault in ((does_well, ""), (tells_nothing, "ended with 2: not a word")):
        toy = bed(main)
        run = toy.jobs["toy"].begin(toy.fresh(), before=lambda: faults.small_files(0))
        said = run.fault(2)
        assert said.endswith(fault) and bool(said) == bool(fault)


def test_a_command_that_raises_is_seen():
    raised = faults.Run(SimpleNamespace(__name__="toy", main=lambda: {}["x"]))
    assert raised.fault(1).endswith("KeyError: 'x'")


def test_a_command_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(faults, "PATIENCE", 0.3)
    run = faults.Run(SimpleNamespace(__name__="toy", main=lambda: time.sleep(60)))
    assert run.end() == -signal.SIGKILL
