"""A little of tests/fuzz.py each time, and whether it sees what it looks for."""

import os
import random
import re
import signal
import sys
import time

import numpy as np
import prepare
import pytest
from prepare import BadInput
from tests import fuzz
from tests.fuzz import KINDS, Kind, input_of, minimized

# How many of each kind, a second's worth; 150 of those that are not named.
INPUTS = {"weights": 30, "adapter": 30, "answer": 60, "request": 60}


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_in_is_read_or_refused(kind):
    found = fuzz.fuzz(kind, inputs=INPUTS.get(kind, 150))
    assert found.findings == {}
    assert found.inputs == found.accepted + found.refused == INPUTS.get(kind, 150)
    assert found.slowest < fuzz.SECONDS


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_depends_on_its_number_alone(kind):
    before = input_of(kind, 0, 7)
    others = [input_of(kind, *which) for which in ((0, 8), (0, 9), (1, 7), (2, 7))]
    assert repr(input_of(kind, 0, 7)) == repr(before)
    assert any(repr(other) != repr(before) for other in others)


# ------------------------------------------------------------------------------------------------
# Planted faults.


def planted(monkeypatch, read):
    """A kind whose inputs are a letter in the middle of others."""

    def make(dice):
        return "".join(dice.choice("abcdef") for _ in range(20))

    monkeypatch.setitem(KINDS, "planted", Kind(make, lambda value, home: read(value)))
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    monkeypatch.setattr(fuzz, "MEMORY", 1 << 27)
    monkeypatch.setattr(fuzz, "ENOUGH", 2)


def raises(value):
    if "ab" in value:
        {}[value]
    if "cd" in value:
        raise BadInput("no cd")


def hangs(value):
    while "ab" in value:
        pass


def sleeps(value):
    if "ab" in value:
        time.sleep(60)


def eats(value):
    return len(bytearray(1 << 28)) if "ab" in value else 0


def dies(value):
    if "ab" in value:
        os.kill(os.getpid(), signal.SIGSEGV)


def babbles(value):
    if "ab" in value:
        raise BadInput("x" * 300_000)


@pytest.mark.parametrize(
    ("read", "what"),
    [
        (raises, r"KeyError at test_fuzz\.py:\d+"), (hangs, r"hang at tests/test_fuzz\.py:\d+"),
        (sleeps, r"hang at tests/test_fuzz\.py:\d+"), (eats, r"MemoryError at test_fuzz\.py:\d+"),
        (dies, r"SIGSEGV at tests/test_fuzz\.py:\d+"), (babbles, r"AssertionError at fuzz\.py:\d+"),
    ],
    ids=["raises", "hangs", "sleeps", "eats", "dies", "babbles"],
)  # fmt: skip
def test_a_planted_fault_is_found_and_others_go_on(monkeypatch, read, what):
    planted(monkeypatch, read)
    found = fuzz.fuzz("planted", inputs=8 if read is sleeps else 20)
    bad = [n for n in range(found.inputs) if "ab" in input_of("planted", 0, n)]
    assert bad, "or nothing was tested"
    assert all(re.fullmatch(what, wrong) for wrong in found.findings)
    numbers = sorted(sum(found.findings.values(), []))  # a loop hangs in each of its lines
    assert numbers and numbers == bad[: len(numbers)]
    assert found.accepted + found.refused + len(numbers) == found.inputs
    assert (found.refused > 0) == (read is raises)


def test_a_finding_is_made_small(monkeypatch):
    planted(monkeypatch, raises)
    number = next(n for n in range(99) if "ab" in input_of("planted", 0, n))
    what = fuzz.ended_as("planted", input_of("planted", 0, number))
    assert minimized("planted", input_of("planted", 0, number), what) == "ab"


@pytest.mark.parametrize("value", [b"abcd", "abcd", [1, 2, 3], {"a": [1, 2], "b": "xy"}])
def test_smaller_has_a_part_less(value):
    found = list(fuzz.smaller(value))
    assert found and value not in found
    assert all(len(repr(less)) < len(repr(value)) for less in found)


@pytest.mark.parametrize(
    ("name", "instead", "what"),
    [
        ("check_header", lambda name, file: {}[name], "KeyError at"),
        ("load_audio", lambda *part: np.zeros(9), "AssertionError at"),
        ("check_slice", lambda *about: None, "TypeError at"),
    ],
)
def test_a_fault_of_the_program_is_found(monkeypatch, name, instead, what):
    monkeypatch.setattr(prepare, name, instead)
    assert any(found.startswith(what) for found in fuzz.fuzz("wav", inputs=20).findings)


def command(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["fuzz", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        prepare.cli(fuzz.main)
    return end.value.code


def test_the_command_prints_a_table_and_what_does_it_again(monkeypatch, capsys):
    planted(monkeypatch, raises)
    assert command(monkeypatch, "planted", "--inputs", 20, "--seed", 3) == 1
    head, line, whole, again, *rest = capsys.readouterr().out.splitlines()
    assert line.split()[:2] == ["planted", "20"] and whole.split()[-1] == "1" and not rest
    found = re.match(r"python -m tests\.fuzz planted --seed 3 --number (\d+)  # (\d+) x ", again)
    assert again.endswith("smallest: 'ab'")
    monkeypatch.setattr(sys, "argv", ["fuzz", "planted", "--seed", "3", "--number", found[1]])
    with pytest.raises(KeyError):
        fuzz.main()
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)


def test_without_a_finding_it_ends_with_0(monkeypatch, capsys):
    assert command(monkeypatch, "reply", "listing", "--inputs", 20) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["all", "40"]


def test_a_kind_that_is_none_is_refused(monkeypatch, capsys):
    assert command(monkeypatch, "nonsense") == 2
    assert "KIND: expected one of wav, flac" in capsys.readouterr().err


def test_damage_is_damage():
    """Nearly always, that is: a byte may be written over with itself."""
    data = bytes(range(256)) * 4
    same = sum(fuzz.damaged(random.Random(i), data) == data for i in range(300))
    assert same < 20
