"""Judging: what is counted, what is never guessed, and what a report holds."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from tests.checkpoints import make_speaking
from tests.conftest import ROOT

import judge


def row(i, task="odd", skill="comparison", kind="clip", value=1, answer="audio 1", **more):
    gold = {"type": kind, "value": value}
    about = {"id": f"r{i}", "task": task, "skill": skill, "clips": ["a.wav", "b.wav"]}
    said = {"question": "Which one?", "answer": answer, "gold": gold}
    return {**about, **said, "source": "test", "licences": [], "meta": {"verdict": answer}, **more}


ROWS = [
    row(0, value=1, answer="audio 1"),
    row(1, value=2, answer="audio 2"),
    row(2, value=2, answer="audio 2"),
    row(3, "factual", "reasoning", "yesno", "yes", "yes"),
    row(4, "tag", "single", "keywords", ["rain"], "rain", clips=["a.wav"]),
]


def test_own_answers_are_all_right():
    report = judge.tally([(row, row["answer"]) for row in ROWS])
    assert report["macro"] == report["weighted"] == 1
    assert list(report["tasks"]) == ["odd", "factual"]
    assert list(report["single"]) == ["tag"]
    assert [item["score"] for item in report["items"]] == [1, 1, 1, 1, 1]


def test_what_is_missing_and_what_cannot_be_read_scores_nothing_and_is_counted():
    told = [None, "perhaps 1, perhaps 2", "audio 2", "no", "rain"]
    report = judge.tally(list(zip(ROWS, told)))
    odd = report["tasks"]["odd"]
    assert (odd["n"], odd["missing"], odd["unparsed"], odd["score"]) == (3, 1, 1, 1 / 3)
    assert report["macro"] == pytest.approx((1 / 3 + 0) / 2)  # a task weighs as much as a task,
    assert report["weighted"] == pytest.approx(1 / 4)  # an item as much as an item,
    assert report["single"]["tag"]["score"] == 1  # and one clip stands apart
    assert [item["score"] for item in report["items"]] == [None, None, 1, 0, 1]
    assert report["items"][0]["answer"] is None


def test_chance_and_majority():
    odd = judge.tally([(row, "audio 1") for row in ROWS])["tasks"]["odd"]
    assert odd["chance"] == 1 / 2
    assert odd["majority"] == pytest.approx(2 / 3)  # always "audio 2"
    assert odd["score"] == pytest.approx(1 / 3)


def test_the_table_has_a_line_for_each_task():
    lines = judge.table(judge.tally([(row, row["answer"]) for row in ROWS]))
    assert [line.split()[0] for line in lines[1:]] == ["odd", "factual", "tag", "macro"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A random checkpoint that answers gibberish, and six questions, one on a clip of no sound."""
    folder = tmp_path_factory.mktemp("bench")
    make_speaking(folder / "weights")
    dice = np.random.default_rng(0)
    for name in ("a", "b"):
        soundfile.write(folder / f"{name}.wav", 0.1 * dice.standard_normal(8000), 16000)
    (folder / "broken.wav").write_bytes(b"RIFF and nothing more")
    rows = [*ROWS, row(5, clips=["a.wav", "broken.wav"])]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"id": "no row"}\n'
    (folder / "bench.jsonl").write_text(text)
    return folder


def run(*args):
    command = [sys.executable, str(ROOT / "judge.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ})


def test_from_weights_and_a_bench_to_a_report(bench):
    out = bench / "reports"
    done = run("--weights", bench / "weights", "--bench", bench / "bench.jsonl", "--out", out)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "weights.json").read_text())
    assert [item["id"] for item in report["items"]] == [f"r{i}" for i in range(6)]
    assert report["items"][5]["answer"] is None  # it was not asked with fewer clips
    assert report["tasks"]["odd"]["missing"] == 1
    assert report["refused"] == 1
    assert "r5" in done.stderr and "broken.wav" in done.stderr
    assert done.stdout.split()[0] == "n"
    for task in (*report["tasks"].values(), *report["single"].values()):
        assert set(task) == {"n", "missing", "unparsed", "score", "chance", "majority"}


def test_the_same_answers_one_by_one(bench):
    """Batches of unequal prompts answer as if each had been asked alone."""
    out = bench / "alone"
    whole = json.loads((bench / "reports" / "weights.json").read_text())
    run("--weights", bench / "weights", "--bench", bench / "bench.jsonl", "--out", out,
        "--items", 1, "--name", "one")  # fmt: skip
    alone = json.loads((out / "one.json").read_text())
    assert alone["items"] == whole["items"][:1]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--bench", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--items", "0"], "--items"),
        (["--name", "../x"], "--name"),
        (["--weights", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(bench, flags, named):
    given = ["--weights", bench / "weights", "--bench", bench / "bench.jsonl", "--out", bench / "x"]
    done = run(*given, *flags)
    assert done.returncode == 2
    assert named in done.stderr and done.stderr.count("\n") == 1 + done.stderr.count("warning:")
    assert not (bench / "x").exists()


# ------------------------------------------------------------------------------------------------
# Beside the score: without the clips, and with the clips in another order.


def test_another_order_moves_what_names_the_clips_and_is_never_the_same():
    for i in range(30):
        rows = row(i, clips=["a.wav", "b.wav", "c.wav"], value=3, answer="audio 3")
        moved = judge.reordered(rows)
        assert moved["clips"] != rows["clips"]
        assert sorted(moved["clips"]) == sorted(rows["clips"])
        assert moved["clips"][moved["gold"]["value"] - 1] == "c.wav"
        assert moved == judge.reordered(rows), "the same each time"


@pytest.mark.parametrize(
    "kind, answer, again, flipped",
    [
        ("clip", "audio 1: rain; audio 2: wind. Answer: audio 1.", "Answer: audio 2.", False),
        ("clip", "audio 1", "audio 1", True),
        ("clip", "audio 1", "perhaps", True),
        ("clip", "perhaps", "perhaps not", False),
        ("clip", None, "audio 1", None),
        ("yesno", "audio 1: a; audio 2: b. Answer: yes.", "Answer: yes.", False),
        ("yesno", "yes", "no", True),
        ("order", "audio 1, audio 2", "audio 2, audio 1", False),
        ("order", "audio 1, audio 2", "audio 1, audio 2", True),
    ],
)
def test_what_flips(kind, answer, again, flipped):
    value = {"clip": 1, "yesno": "yes", "order": [1, 2]}[kind]
    moved = judge.reordered(row(0, kind=kind, value=value, answer="audio 1"))
    assert judge.flips(row(0, kind=kind, value=value), answer, moved, again) is flipped


def test_texts_flip_by_what_they_say_and_not_by_its_place():
    text = {"text": "audio 1: rain; audio 2: wind", "slots": [["rain"], ["wind"]]}
    one = row(0, "captioning", kind="text", value=text)
    moved = judge.reordered(one)
    said = "audio 1: rain; audio 2: wind"
    assert judge.flips(one, said, moved, "audio 1: wind; audio 2: rain") is False
    assert judge.flips(one, said, moved, "audio 1: rain; audio 2: wind") is True


def test_a_column_is_a_mean_over_those_that_have_it():
    report = judge.tally([(row, row["answer"]) for row in ROWS])
    judge.add_column(report, "flips", [True, False, None, True, None])
    assert report["tasks"]["odd"]["flips"] == 1 / 2
    assert report["tasks"]["factual"]["flips"] == 1
    assert report["single"]["tag"]["flips"] is None
    assert report["flips"] == 3 / 4
    lines = judge.table(report)
    assert lines[0].split()[-1] == "flips"
    assert lines[-1].endswith("flips 0.750")
    assert [item["flips"] for item in report["items"]] == [True, False, None, True, None]


@pytest.mark.parametrize("view", [[], ["--view", "concat"]])
def test_one_command_gives_all_columns(bench, tmp_path, view):
    words = ["--text-only", "--permute", *view]
    given = ["--weights", bench / "weights", "--bench", bench / "bench.jsonl", "--out", tmp_path]
    done = run(*given, *words)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "weights.json").read_text())
    several = [item for item in report["items"] if item["skill"] != "single"]
    assert all(type(item["text-only"]) in (int, float) for item in report["items"])
    assert all(item["flips"] in (True, False, None) for item in several)
    assert report["text-only"] <= 1 and 0 <= report["flips"] <= 1
    assert "text-only" in done.stdout and "flips" in done.stdout
