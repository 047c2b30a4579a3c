"""judge.py's command line, as people use it: who answers is a server in this file, a small random
checkpoint or a real server; runs are killed, split and repeated, and every report is computed
again from its own items."""

import csv
import gc
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from base64 import b64decode
from collections import Counter
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from tests.checkpoints import edit_json, make, make_speaking
from tests.conftest import ROOT
from tests.test_benches import (  # noqa: F401
    Letters, adiff, compa, esc, jasco, jasco_reply, libri, mae, mmar, mmau, pro, urban,
)  # fmt: skip
from tests.test_judges import Marker
from tests.test_writer import KEY, Model, refusal, reply_of, reply_of_null, serving

import judge
import prepare
from prepare import Tokenizer, train_bpe

SECONDS = {"a": 0.5, "b": 0.6, "c": 0.7, "d": 0.8}


def row(i, task, skill, kind, value, answer, question, clips="ab", **gold):
    clips = [f"{name}.wav" for name in clips]
    evidence = [{"clip": k, "says": f"sound {name}"} for k, name in enumerate(clips, 1)]
    return {
        "id": f"r{i}", "task": task, "skill": skill, "clips": clips, "question": question,
        "answer": answer, "gold": {"type": kind, "value": value, **gold}, "source": "test",
        "licences": [], "meta": {"evidence": evidence},
    }  # fmt: skip


def some_rows() -> list[dict]:
    options = ["dog", "rain", "bell"]
    asked = "What is in audio 1?\n(A) dog\n(B) rain\n(C) bell"
    said = {"text": "a dog in the rain", "slots": [["dog"], ["rain"]]}
    rows = [
        row(0, "odd", "comparison", "clip", 2, "audio 2", "Which is odd?"),
        row(1, "odd", "comparison", "clip", 1, "audio 1", "Which is odd?", "cba"),
        row(2, "odd", "comparison", "clip", 3, "audio 3", "<sound-1><sound-2><sound-3>Odd?", "abd"),
        row(3, "factual", "reasoning", "yesno", "yes", "yes", "Is <sound-1> like <sound-2>?"),
        row(4, "factual", "reasoning", "yesno", "no", "no", "So in both? <sound-1> <sound-2>"),
        row(5, "order", "reasoning", "order", [2, 1], "audio 2, audio 1", "In which order?", "dc"),
        row(6, "count", "reasoning", "count", 3, "3", "How many bells are there in all?", "cd"),
        row(7, "pick", "reasoning", "choice", "rain", "rain", asked, "bc", choices=options),
        row(8, "tell", "captioning", "text", said, said["text"], "Tell both apart.", "ac"),
        row(9, "words", "single", "transcript", "one two", "one two", "Write it down.", "a"),
        row(10, "tag", "single", "keywords", ["rain"], "rain", "What is it?", "b"),
    ]  # fmt: skip
    turns = [("user", "<sound-1>\nWhat is this?"), ("assistant", "Rain."),
             ("user", "<sound-2>\nAnd is this the same?")]  # fmt: skip
    talk = row(11, "talk", "reasoning", "yesno", "yes", "", "", "ad")
    del talk["question"], talk["answer"]
    talk["messages"] = [{"role": role, "content": text} for role, text in turns]
    talk["messages"].append({"role": "assistant", "content": "yes"})
    return [*rows, talk]


ROWS = some_rows()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Twelve questions of every kind, on clips of 16 bits, and a checkpoint that says gibberish."""
    folder = tmp_path_factory.mktemp("bench")
    make_speaking(folder / "weights")
    dice = np.random.default_rng(0)
    for name, seconds in SECONDS.items():
        wave = dice.integers(-(2**15), 2**15, round(16000 * seconds)).astype(np.int16)
        soundfile.write(folder / f"{name}.wav", wave, 16000)
    write_lines(folder / "bench.jsonl", ROWS)
    return folder


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(bench, tmp_path, monkeypatch, capsys):
    """run(words) -> code, out, err, folder and report of the command line, in this process."""
    usual = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(prepare, "PAUSE", 0.001)

    def run(*words, out=tmp_path / "reports", name="x", bench=bench / "bench.jsonl"):
        judge.warn.cache_clear()
        where = ["--bench", bench, "--out", out, "--name", name]
        words = [str(word) for word in ([*words, *where] if bench else words)]
        monkeypatch.setattr(sys, "argv", ["judge.py", *words])
        code = 0
        try:
            prepare.cli(judge.main)
        except SystemExit as left:
            code = left.code
        told, file = capsys.readouterr(), out / f"{name}.json"
        report = json.loads(file.read_text()) if file.exists() else None
        return SimpleNamespace(
            code=code, out=told.out, err=told.err, folder=out, report=report
        )  # fmt: skip

    yield run
    signal.signal(signal.SIGINT, usual)


def done(found):
    """What a run that went well has in its report, which is computed again from its items."""
    assert found.code == 0, found.err
    check_report(found.report)
    return found.report


def check_report(report):
    items = report["items"]
    groups = {"tasks": {}, "single": {}}
    for item in items:
        single = item["skill"] == "single"
        groups["single" if single else "tasks"].setdefault(item["task"], []).append(item)
        told = item["answer"] is not None
        assert item["score"] == (prepare.score(item["gold"], item["answer"]) if told else None)
    for part, tasks in groups.items():
        assert list(report[part]) == list(tasks)
        for task, mine in tasks.items():
            found, scores = report[part][task], [item["score"] or 0 for item in mine]
            missing = sum(item["answer"] is None for item in mine)
            unread = sum(item["score"] is None for item in mine) - missing
            counts = (found["n"], found["missing"], found["unparsed"])
            assert counts == (len(mine), missing, unread)
            assert found["score"] == pytest.approx(sum(scores) / len(mine))
            assert 0 <= found["low"] <= found["score"] <= found["high"] <= 1
    main = groups["tasks"] or groups["single"]
    means = [sum(item["score"] or 0 for item in mine) / len(mine) for mine in main.values()]
    every = [item["score"] or 0 for mine in main.values() for item in mine]
    assert report["macro"] == pytest.approx(sum(means) / len(means))
    assert report["weighted"] == pytest.approx(sum(every) / len(every))
    assert {"python", "torch", "numpy", "code"} <= report["versions"].keys()
    again = judge.tally(items)
    assert again == {name: report[name] for name in again}, "it holds all of it"
    assert {"rows", "prompts"} <= report["hashes"].keys()
    assert report["who"] and report["how"] and os.path.isdir(report["root"])


# ------------------------------------------------------------------------------------------------
# A server that hears. It says the same to the same question and clips, whenever it is asked.


class Hearing(Model):
    """`say(text of what it was asked, body)`: the content, or (status, headers, bytes)."""

    def said(self, body):
        return self.server.say(text_of(body), body)


def text_of(body) -> str:
    turns = [message["content"] for message in body["messages"]]
    turns = [[{"text": turn}] if isinstance(turn, str) else turn for turn in turns]
    return "|".join(part.get("text", "*") for turn in turns for part in turn)


def replies(text, body) -> str:
    clips = json.dumps(body["messages"])
    number = int(judge.hash_of(clips)[:6], 16)
    return ["audio 1", "audio 2", "yes", "no", "3", "rain", "perhaps"][number % 7]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(Hearing, replies) as server:
        yield server


def asks(server, *words):
    return ["--server", server.url, "--server-model", "hears", *words]


def heard(part) -> list[int]:
    """The samples of an input_audio part, 16 bits each."""
    assert part["type"] == "input_audio" and part["input_audio"].keys() == {"data", "format"}
    assert part["input_audio"]["format"] == "wav"
    wave, rate = soundfile.read(BytesIO(b64decode(part["input_audio"]["data"])), dtype="int16")
    assert rate == 16000
    return wave.tolist()


def samples(bench, name) -> list[int]:
    return soundfile.read(bench / f"{name}.wav", dtype="int16")[0].tolist()


def shape(bench, body) -> list[str]:
    """What each turn consists of: texts, and clips by their names, sample for sample."""
    names = {tuple(samples(bench, name)): f"*{name}" for name in SECONDS}
    turns = []
    for message in body["messages"]:
        parts = [part["text"] if part["type"] == "text" else names[tuple(heard(part))]
                 for part in message["content"]]  # fmt: skip
        turns.append((message["role"], parts))
    return turns


def test_each_clip_is_heard_in_its_place(run, server, bench):
    report = done(run(*asks(server)))
    sent = [shape(bench, body) for body in server.asked]
    assert len(sent) == len(ROWS)
    one, two = ["audio 1:", "*a"], ["audio 2:", "*b"]
    for parts in (
        [*one, *two, "\nWhich is odd?"],
        [*one, *two, "audio 3:", "*d", "Odd?"],
        ["Is ", *one, " like ", *two, "?"],
        ["So in both? ", *one, *two],
        ["audio 1:", "*a", "\nWrite it down."],
    ):
        assert [("user", parts)] in sent, sent
    talk = [("user", ["audio 1:", "*a", "\nWhat is this?"]), ("assistant", ["Rain."]),
            ("user", ["audio 2:", "*d", "\nAnd is this the same?"])]  # fmt: skip
    assert talk in sent
    for body in server.asked:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("hears", 0, judge.NEW)
    assert report["who"] == f"hears at {server.url}" and server.keys == {f"Bearer {KEY}"}
    answers = {text_of(body): replies("", body) for body in server.asked}
    for item in report["items"][:2]:
        texts = [text for text in answers if text.count("*") == len(item["clips"])]
        assert item["answer"] in {answers[text] for text in texts}


@pytest.mark.parametrize("view", ["no-index", "concat", "text-only"])
def test_views_of_a_server(run, server, bench, view):
    done(run(*asks(server), "--view", view))
    first = next(b for b in server.asked if text_of(b).endswith("Which is odd?"))
    parts = first["messages"][0]["content"]
    if view == "no-index":
        assert shape(bench, first) == [("user", ["*a", "*b", "\nWhich is odd?"])] or (
            shape(bench, first) == [("user", ["*c", "*b", "*a", "\nWhich is odd?"])]
        )
    elif view == "text-only":
        assert parts == [{"type": "text", "text": "Which is odd?"}]
        assert not any("*" in text_of(body) for body in server.asked)
    else:
        (sound,) = [part for part in parts if part["type"] == "input_audio"]
        lengths = {len(heard(sound))}
        both = len(samples(bench, "a")) + len(samples(bench, "b")) + 32000
        assert lengths <= {both, both + len(samples(bench, "c")) + 32000}


BAD = {  # kind -> (what the server says, whether that is an answer which cannot be read)
    "prose": ("It is hard to say.", True),
    "empty": ("", True),
    "null": ((200, {}, reply_of_null()), True),
    "cut off": ((200, {}, reply_of("well, per", "length")), True),
    "no JSON": ((200, {}, b"<html>502 Bad Gateway</html>"), False),
    "no choices": ((200, {}, b'{"choices": []}'), False),
    "half a JSON": ((200, {}, reply_of("audio 1")[:-9]), False),
    "nested": ((200, {}, b"[" * 100_000), False),
    "500": (refusal(500, "audio 1"), False),
    "429": (refusal(429, "slow down", **{"Retry-After": "0"}), False),
    "400": (refusal(400, "audio 1"), False),
    "too long": (refusal(400, "This model's maximum context length is 16 tokens"), False),
    "reset": (None, False),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_server_that_says_nothing_useful_to_some(kind, run, server, monkeypatch):
    """What fails is missing or unparsed, and everybody else keeps an answer of their own."""
    monkeypatch.setattr(prepare, "ATTEMPTS", 2)
    good, (said, is_answer) = done(run(*asks(server), name="good")), BAD[kind]
    some = ("like", "So in both", "bells")  # r3, r4, r6
    server.say = lambda text, body: (
        said if any(word in text for word in some) else replies(text, body)
    )
    report = done(run(*asks(server)))
    for i, (item, other) in enumerate(zip(report["items"], good["items"])):
        if i not in (3, 4, 6):
            assert item == other
        else:
            assert item["score"] is None and (item["answer"] is None) != is_answer
    missing = sum(task["missing"] for task in report["tasks"].values())
    assert missing == (0 if is_answer else 3)
    assert report["tasks"]["factual"]["unparsed"] == (2 if is_answer else 0)


@pytest.mark.parametrize("how", [refusal(429, "slow", **{"Retry-After": "0"}), refusal(503, "")])
def test_what_passes_is_asked_again(how, run, server):
    seen = Counter()

    def say(text, body):
        seen[text, judge.hash_of(body["messages"])] += 1
        return how if seen[text, judge.hash_of(body["messages"])] == 1 else replies(text, body)

    server.say = say
    report = done(run(*asks(server)))
    assert set(seen.values()) == {2} and len(seen) == len(ROWS)
    assert all(item["answer"] is not None for item in report["items"])


def test_a_late_reply_is_nobody_elses(run, server, monkeypatch):
    monkeypatch.setattr(prepare, "PATIENCE", (1, 0.3))
    monkeypatch.setattr(prepare, "ATTEMPTS", 1)

    def say(text, body):
        if "bells" in text:
            time.sleep(0.6)
            return "3"
        return "audio 1"

    server.say = say
    items = done(run(*asks(server), "--concurrency", 1))["items"]
    assert [item["answer"] for item in items] == [None if i == 6 else "audio 1" for i in range(12)]


def test_only_what_failed_is_asked_again(run, server, monkeypatch):
    monkeypatch.setattr(prepare, "ATTEMPTS", 1)
    server.say = lambda text, body: refusal(500, "") if "bells" in text else replies(text, body)
    assert done(run(*asks(server)))["tasks"]["count"]["missing"] == 1
    before, server.say = len(server.asked), replies
    assert done(run(*asks(server)))["tasks"]["count"]["missing"] == 0
    assert len(server.asked) == before + 1
    again = done(run(*asks(server)))
    assert len(server.asked) == before + 1 and again["macro"] >= 0


@pytest.mark.parametrize("status", [401, 404])
def test_a_server_that_answers_nobody_ends_it_at_once(status, run, server):
    server.say = lambda *_: refusal(status, f"your key {KEY} is wrong")
    found = run(*asks(server), "--concurrency", 2)
    assert found.code == 2 and found.report is None and len(server.asked) <= 2
    assert str(status) in found.err.splitlines()[-1] and KEY not in found.err
    assert "Traceback" not in found.err


def test_the_same_question_on_the_same_clips_is_asked_once(run, server, bench, tmp_path):
    same = [{**ROWS[0], "id": f"same-{i}"} for i in range(5)]
    found = run(*asks(server), bench=write_lines(bench / "same.jsonl", same))
    assert len({item["answer"] for item in done(found)["items"]}) == len(server.asked) == 1


def test_what_has_no_gold_is_left_out_and_counted(run, server, bench):
    bare = {name: value for name, value in ROWS[11].items() if name != "gold"}
    asks_on = {**ROWS[11], "id": "r12", "messages": ROWS[11]["messages"][:-1]}
    rows = write_lines(bench / "bare.jsonl", [ROWS[1], bare, {"id": "r9"}, asks_on])
    found = run(*asks(server), bench=rows)
    assert done(found)["refused"] == 3 and len(found.report["items"]) == 1
    assert "left out: r11: it has no gold" in found.err
    assert "left out: r12: no answer ends it" in found.err, "else its last question is not asked"
    assert found.out.endswith("\n3 rows refused\n")


def test_so_many_tokens(run, server):
    """Who needs more than usual gets them, and is asked anew."""
    done(run(*asks(server)))
    report = done(run(*asks(server), "--most", 1000))
    rooms = Counter(body["max_tokens"] for body in server.asked)
    assert rooms == {judge.NEW: len(ROWS), 1000: len(ROWS)}
    assert report["settings"]["most"] == 1000


def test_a_clip_that_is_gone_is_missing(run, server, bench):
    """Its row scores nothing; a bench without any of its clips is a mistake."""
    rows = [ROWS[1], {**ROWS[2], "clips": ["gone.wav", "b.wav", "a.wav"]}]
    found = run(*asks(server), bench=write_lines(bench / "gone.jsonl", rows))
    assert done(found)["tasks"]["odd"]["missing"] == 1 and found.report["refused"] == 0
    assert "r2: gone.wav" in found.err.replace(str(bench) + "/", "")
    bench_of_none = write_lines(bench / "none.jsonl", rows[1:])
    found = run(*asks(server), bench=bench_of_none)
    assert found.code == 2 and "none.jsonl: expected the clips that its rows name" in found.err
    told = write_lines(bench / "told.jsonl", [{"id": "r2", "answer": "audio 3"}])
    assert done(run("--answers", told, bench=bench_of_none))["macro"] == 1  # nobody has to hear


def test_another_server_is_another_model(run, server):
    done(run(*asks(server)))
    with serving(Hearing, lambda text, body: "audio 1") as other:
        report = done(run("--server", other.url, *asks(server)[2:]))
        assert len(other.asked) == len(ROWS)
    assert all(item["answer"] == "audio 1" for item in report["items"])


def test_a_page_of_a_proxy_is_no_reply_for_good(run, server):
    server.say = lambda text, body: (200, {}, b"<html>502 Bad Gateway</html>")
    assert done(run(*asks(server)))["tasks"]["odd"]["missing"] == 3
    server.say = replies
    assert done(run(*asks(server)))["tasks"]["odd"]["missing"] == 0


def test_a_clip_that_has_changed_is_heard_anew(run, server, bench):
    wave = np.zeros(1600, np.int16)
    soundfile.write(bench / "new.wav", wave, 16000)
    rows = write_lines(bench / "new.jsonl", [{**ROWS[10], "clips": ["new.wav"]}])
    done(run(*asks(server), bench=rows))
    soundfile.write(bench / "new.wav", wave + 7, 16000)
    done(run(*asks(server), bench=rows))
    assert [heard(b["messages"][0]["content"][1])[0] for b in server.asked] == [0, 7]


PROGRAM = """
import os, sys, time
sys.path.insert(0, sys.argv.pop(1))
import judge
judge.NEW = 6
keep, pace = judge.Journal.keep, float(os.environ.get("PACE", 0))
def slowly(*asked, **reply):
    time.sleep(pace)
    return keep(*asked, **reply)
judge.Journal.keep = slowly
judge.cli(judge.main)
"""


def command(folder, *words):
    """judge.py in a process of its own, whose answers are short; PACE slows it down."""
    (folder / "program.py").write_text(PROGRAM)
    return [sys.executable, str(folder / "program.py"), str(ROOT), *map(str, words)]


def kill_when(process, ready):
    until = time.monotonic() + 240
    while not ready():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def lines_of(path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.long
def test_killed_while_a_server_is_asked(run, server, short, bench, tmp_path):
    """kill -9 at any moment: the next run asks for what is lacking, and its report is the one that
    an unbroken run writes."""
    flags = asks(server, "--concurrency", 3, "--text-only")
    whole = done(run(*flags))
    total, server.asked = len(server.asked), []
    out, at = tmp_path / "broken", random.randrange(2, 20)

    def say(text, body):
        time.sleep(0.02)
        return replies(text, body)

    server.say = say
    given = ["--bench", bench / "bench.jsonl", "--out", out, "--name", "x"]
    process = subprocess.Popen(command(bench, *flags, *given), stderr=subprocess.DEVNULL)
    kill_when(process, lambda: len(server.asked) >= at)
    time.sleep(0.2)
    with open(out / "x.asked.jsonl", "ab") as file:
        file.write(b'{"key": "torn')
    assert not (out / "x.json").exists() and len(server.asked) < total
    assert done(run(*flags, out=out)) == whole
    times = Counter(json.dumps(body) for body in server.asked)
    assert len(times) == total
    twice = sum(times.values()) - total  # were under way, or not yet on the disk
    assert twice <= 3, f"killed after {at}"


# ------------------------------------------------------------------------------------------------
# A checkpoint on this machine.

COLUMNS = ("--text-only", "--permute")


@pytest.fixture(scope="module")
def short():
    """Answers of a few tokens, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "NEW", 6)
        yield


@pytest.fixture(scope="module")
def unbroken(bench, tmp_path_factory):
    """The report of one run, by a process of its own."""
    out = tmp_path_factory.mktemp("unbroken")
    given = weights(bench, out, *COLUMNS)
    subprocess.run(command(bench, *given), check=True, capture_output=True)
    return json.loads((out / "x.json").read_text())


def weights(bench, out, *words):
    where = ["--bench", bench / "bench.jsonl", "--out", out, "--name", "x"]
    return ["--weights", bench / "weights", *words, *where, "--dtype", "f32"]


def test_the_report_says_how_it_was_made(unbroken, bench):
    check_report(unbroken)
    assert unbroken["hashes"]["weights"] == judge.weights_hash(bench / "weights")
    assert unbroken["who"] == f"weights {unbroken['hashes']['weights'][:16]}"
    assert unbroken["settings"] == {
        "mode": "strict", "most": 6, "text_only": True, "permute": "remapped", "dtype": "f32",
    }  # fmt: skip
    assert "cpu" in unbroken["how"] or "cuda" in unbroken["how"]
    assert (
        unbroken["hashes"]["rows"]
        == judge.hashes_of(list(judge.read_rows(bench / "bench.jsonl")))["rows"]
    )
    assert all(item["answer"] for item in unbroken["items"])
    assert unbroken["judges"] == {}
    for name in ("text-only", "permuted", "flips"):
        every = [i for i in unbroken["items"] if i["task"] == "odd"]
        mean = sum(item[name] for item in every) / len(every)
        assert unbroken["tasks"]["odd"][name] == pytest.approx(mean)
        means = [task[name] for task in unbroken["tasks"].values()]
        assert unbroken[name] == pytest.approx(sum(means) / len(means))
    assert unbroken["items"][11]["question"].endswith("And is this the same?")


@pytest.mark.long
def test_killed_while_it_answers(unbroken, run, short, bench, tmp_path):
    given, journal = weights(bench, tmp_path, *COLUMNS), tmp_path / "x.asked.jsonl"
    at, slow = random.randrange(1, 30), {**os.environ, "PACE": "0.1"}
    process = subprocess.Popen(command(bench, *given), stderr=subprocess.DEVNULL, env=slow)
    kill_when(process, lambda: lines_of(journal) >= at)
    told = journal.read_bytes()
    told = told[: told.rindex(b"\n") + 1]
    assert not (tmp_path / "x.json").exists(), f"killed after {at}"
    flags = ["--weights", bench / "weights", *COLUMNS, "--dtype", "f32"]
    assert done(run(*flags, out=tmp_path)) == unbroken
    keys = [json.loads(line)["key"] for line in journal.open()]
    assert len(keys) == len(set(keys)) > told.count(b"\n")  # nobody was asked twice
    assert journal.read_bytes().startswith(told)


@pytest.mark.long
def test_shards_by_torchrun(unbroken, bench, tmp_path):
    given = command(bench, *weights(bench, tmp_path, *COLUMNS))[1:]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    port = str(free_port())
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*launch, "--master-port", port, *given],
        capture_output=True, text=True, env=env,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "x.json").read_text()) == unbroken
    assert "whichever shard ends last" in run.stderr


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


@pytest.mark.parametrize("words", [COLUMNS, ("--view", "shuffle-audio")], ids=["columns", "view"])
def test_shards_one_after_the_other(words, run, short, bench, tmp_path):
    flags = ["--weights", bench / "weights", *words]
    whole, out = done(run(*flags)), tmp_path / "parts"
    (out).mkdir()
    first = run(*flags, "--shard", "1/2", out=out)
    assert (first.code, first.report, first.out) == (0, None, "")
    assert "whichever shard ends last" in first.err
    assert done(run(*flags, "--shard", "2/2", out=out)) == whole
    names = {path.name for path in out.iterdir()}
    assert "x.json" in names and not any("items-" in name for name in names)


def test_a_part_that_an_earlier_run_left_is_not_taken_for_this_ones(run, server, tmp_path):
    """Whoever goes first takes away its own part: it had an answer missing then."""
    out, seen = tmp_path / "parts", []
    server.say = lambda text, body: refusal(400, "") if "bells" in text else replies(text, body)
    run(*asks(server), "--shard", "2/2", out=out)
    assert len(list(out.glob("x.items-*-00001-of-00002.jsonl"))) == 1

    def say(text, body):
        seen.extend(out.glob("x.items-*"))
        return replies(text, body)

    server.say, before = say, len(server.asked)
    run(*asks(server), "--shard", "2/2", out=out)
    assert seen == [] and len(server.asked) == before + 1
    report = done(run(*asks(server), "--shard", "1/2", out=out))
    assert [item["answer"] is None for item in report["items"]] == [False] * len(ROWS)


def test_two_runs_in_one_folder(run, bench, tmp_path):
    out = tmp_path / "reports"
    out.mkdir()
    journal = judge.Journal(out / "x.asked.jsonl")
    found = run("--weights", bench / "weights")
    journal.close()
    assert found.code == 2 and found.err.count("\n") == 1
    assert "x.asked.jsonl: expected one run at a time, found another" in found.err


# ------------------------------------------------------------------------------------------------
# Every flag, once at least.

FLAGS = {
    "plain": [],
    **{view: ["--view", view] for view in (*judge.ONE_ROW_VIEWS, "shuffle-audio")},
    "late fusion": ["--late-fusion"],
    "vote": ["--vote", "3"],
    "literal": ["--permute", "literal"],
    "options": ["--option-shuffle"],
    "items": ["--items", "5"],
    "by n": ["--by-n"],
    "by skill": ["--by-skill"],
    "embed": ["--embed", "2"],
    "fused and permuted": ["--late-fusion", "--permute", "--option-shuffle"],
    "vote and text-only": ["--vote", "2", "--text-only", "--permute"],
    "viewed and permuted": ["--view", "two-slot", "--permute", "--option-shuffle"],
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_checkpoint_with(name, run, short, bench):
    found = run("--weights", bench / "weights", *FLAGS[name])
    report, words = done(found), FLAGS[name]
    assert len(report["items"]) == (5 if name == "items" else len(ROWS))
    assert all(item["answer"] is not None for item in report["items"]), found.err
    last = found.out.splitlines()[-1]
    assert re.match("macro|.* items name an index$|.* had their options shuffled$", last)
    flags = {"--view": "view", "--late-fusion": "late_fusion", "--vote": "vote", "--items": "items",
             "--permute": "permute", "--option-shuffle": "option_shuffle"}  # fmt: skip
    for flag, setting in flags.items():
        assert (flag in words) == (setting in report["settings"])
    assert ("3 clips" in found.out) == (name == "by n")
    assert ("skill reasoning" in found.out) == (name == "by skill")
    if "--permute" in words:
        assert all(type(item["flips"]) is bool for item in report["items"][:9])
        assert report["items"][9]["flips"] is None
        assert re.search(r"\d+ of 10 reordered items name an index", found.out)
    if "--option-shuffle" in words:
        assert [i["id"] for i in report["items"] if i["option-flips"] is not None] == ["r7"]
        assert [i["id"] for i in report["items"] if i["options"] is not None] == ["r7"]
        assert "1 of 12 items had their options shuffled" in found.out


@pytest.mark.parametrize(
    "words, how", [(["--late-fusion"], "ask_fused"), (["--vote", "2"], "ask_voting")]
)
def test_what_is_reordered_is_asked_in_the_same_way(words, how, run, server, monkeypatch):
    """On descriptions where answers are on descriptions: or flips would compare two ways to ask."""
    way, asked = getattr(judge, how), []

    def counting(asking, rows, *more):
        asked.append(len(rows))
        return way(asking, rows, *more)

    monkeypatch.setattr(judge, how, counting)
    done(run(*asks(server), "--permute", *words))
    assert asked == [12, 10]  # two are on a single clip
    alone = [body for body in server.asked if prepare.DESCRIBE in text_of(body)]
    if how == "ask_fused":
        told = [text_of(body) for body in server.asked if body not in alone]
        assert len(alone) == 4 and not any("*" in text for text in told)  # four clips in all


@pytest.fixture
def marks(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(Marker, lambda answer, which, body: str(1 + len(answer) % 5)) as server:
        yield server


@pytest.fixture
def mine(tmp_path):
    """Answers in a file, right but for one that is wrong, one that is none, and one not given."""
    told = [{"id": row["id"], "answer": row.get("answer", "yes")} for row in ROWS[:11]]
    told[0]["answer"], told[3]["answer"] = "audio 1", "perhaps"
    return write_lines(tmp_path / "mine.jsonl", told)


def test_marks_of_a_served_judge(run, marks, mine, tmp_path):
    llm = ["--llm", marks.url, "--model", "m"]
    report = done(run("--answers", mine, *llm))
    assert report["judges"] == {"m": marks.url}
    assert report["hashes"]["answers"].startswith(report["who"].split()[-1])
    assert len(marks.asked) == 2 * 11
    for item in report["items"][:11]:
        wanted = 1 + len(item["answer"]) % 5
        assert item["marks"]["m"]["marks"] == [wanted, wanted]
        assert item["marks"]["m"]["share"] == (wanted - 1) / 4
    assert report["items"][11]["marks"] == {"m": None}
    found = report["tasks"]["odd"]["marks"]["m"]
    wanted = [1 + len(item["answer"]) % 5 for item in report["items"][:3]]
    counts = {"answers": 3, "read": [3, 3], "both": 3}
    assert found == {**counts, "raw": sum(wanted) / 3, "share": (sum(wanted) / 3 - 1) / 4}
    page = (tmp_path / "reports" / "x.html").read_text()
    assert ">raw</th>" in page and f"<td>{sum(wanted) / 3:.3f}</td>" in page
    assert done(run("--answers", mine, *llm)) == report and len(marks.asked) == 2 * 11


def test_marks_of_a_checkpoint(run, mine, tmp_path):
    """It says gibberish, so each of its replies is none."""
    folder = tmp_path / "qwen3"
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    folder.mkdir()
    train_bpe([*judge.PROMPTS, "0 1 2 3 4 5 6 7 8 9 system user assistant"], 500, names, folder)
    make("qwen3", folder, vocab_size=len(Tokenizer.from_dir(folder)))
    report = done(run("--answers", mine, "--llm", folder, "--items", "4"))
    (name,) = report["judges"]
    assert name == f"qwen3 {judge.weights_hash(folder)[:16]}"
    marked = [i["marks"][name] for i in report["items"] if i["answer"] is not None]
    assert marked and all(each["raw"] is None and len(each["replies"]) == 2 for each in marked)
    for task in (*report["tasks"].values(), *report["single"].values()):
        found = {"both": 0, "raw": None, "share": None}
        assert task["marks"][name].items() >= found.items()


def test_no_network_lies_beside_another(run, short, bench, tmp_path, monkeypatch):
    """A judge's is loaded when the answers are there, and who gave them is gone then."""
    load, nets = judge.load_net, []

    def loading(args):
        gc.collect()
        assert not any(net() for net in nets)
        nets.append(weakref.ref(made := load(args)))
        return made

    monkeypatch.setattr(judge, "load_net", loading)
    done(run("--weights", bench / "weights", "--items", "2", "--llm", bench / "weights"))
    assert len(nets) == 2


def test_sheets_for_people(run, marks, mine, tmp_path):
    report = done(run("--answers", mine, "--llm", marks.url, "--model", "m"))
    sheet, file = tmp_path / "sheet.csv", tmp_path / "reports" / "x.json"
    made = run("agree", "--make", 100, "--report", file, "--out", sheet, bench=None)
    assert made.code == 0 and "11 of 11 judged items" in made.out
    with open(sheet, encoding="utf-8-sig", newline="") as it:
        rows = list(csv.DictReader(it))
    by_id = {f"[{item['id']}]": item for item in report["items"]}
    with open(sheet, "w", newline="") as it:
        table = csv.DictWriter(it, rows[0])
        table.writeheader()
        for each in rows:
            mark = by_id[each["id"]]["marks"]["m"]["raw"]
            table.writerow({**each, "score_1": round(mark), "score_2": round(mark)})
    found = run("agree", sheet, "--report", file, bench=None)
    assert found.code == 0 and "m: Spearman 1.000" in found.out and "on 11 of 11" in found.out


def test_two_reports_side_by_side(run, server, mine, tmp_path):
    one = done(run("--answers", mine, name="one"))
    two = done(run(*asks(server), name="two"))
    files = [tmp_path / "reports" / f"{name}.json" for name in ("one", "two")]
    found = run("compare", *files, "--html", tmp_path / "both.html", bench=None)
    assert found.code == 0, found.err
    macro = next(line.split() for line in found.out.splitlines() if line.startswith("macro"))
    assert [float(cell) for cell in macro[2:4]] == pytest.approx(
        [one["macro"], two["macro"]], abs=6e-4
    )
    assert (tmp_path / "both.html").read_text().startswith("<!doctype html>")


def test_benches_are_listed(run):
    found = run("benches", bench=None)
    assert found.code == 0
    assert [line.split()[0] for line in found.out.splitlines()] == list(judge.BENCHES)


# ------------------------------------------------------------------------------------------------
# Published benches, by name.


def test_a_published_bench_by_its_rule(run, short, bench, mmau):  # noqa: F811
    flags = ["--data", mmau, "--mode", "official"]
    report = done(run("--weights", bench / "weights", *flags, bench="mmau"))
    kept = {row["id"]: row for row in judge.BENCHES["mmau"].read(mmau, lambda bad: None)}
    scores = [item["official"] for item in report["items"]]
    for item in report["items"]:
        rule, told = item["meta"]["published"], item["answer"]
        assert rule == kept[item["id"]]["meta"]["published"]
        assert (told is None) == (item["id"] == "q5"), "whose clip is not there"
        assert item["official"] == (None if told is None else judge.token_match(told, **rule))
    scores = [score for score in scores if score is not None]
    assert report["official"]["figures"]["total"] == sum(scores) / len(scores)
    assert report["refused"] == 2 and report["settings"]["data"] == str(mmau)
    answers = [{"id": id, "model_output": row["answer"]} for id, row in list(kept.items())[:2]]
    told = write_lines(mmau / "told.jsonl", answers)
    report = done(run("--answers", told, *flags, bench="mmau", name="y"))
    assert [item["official"] for item in report["items"]][:3] == [1, 1, None]
    assert "rows without an answer are passed over" in str(report["official"]["notes"])


def test_a_rule_that_asks_a_judge_asks_it_of_all_at_once(run, mae, tmp_path):  # noqa: F811
    story = (mae / "esc50-story.jsonl").read_text().splitlines()[0]
    (mae / "urbansound-story.jsonl").write_text(story + "\n")
    told = [{"id": "esc50-story-1", "answer": "A dog in the rain."},
            {"id": "urbansound-story-1", "answer": "A cat."}]  # fmt: skip
    answers = write_lines(tmp_path / "told.jsonl", told)
    busy, most = set(), []

    class Yes(Model):
        def said(self, body):
            busy.add(id(body))
            most.append(len(busy))
            time.sleep(0.2)
            busy.remove(id(body))
            return "Yes" if body["seed"] < 3 and "cat" not in str(body) else "No"

    with serving(Yes, None) as other:
        llm = ["--llm", other.url, "--model", "m", "--data", mae, "--mode", "official"]
        report = done(run("--answers", answers, *llm, bench="mae"))
        assert sorted(body["seed"] for body in other.asked) == [1, 1, 2, 2, 3, 3]
    assert max(most) == 2
    scores = {item["id"]: item["official"] for item in report["items"]}
    assert (scores["esc50-story-1"], scores["urbansound-story-1"]) == (1, 0)
    assert report["official"]["figures"]["esc50-story: accuracy"] == 1 / 2  # of two, one is missing
    assert "marks" not in report["items"][0] and list(report["judges"]) == ["m"]
    items = {item["id"]: item for item in report["items"]}
    assert items["esc50-story-1"]["beside"] == {"votes": [True, True, False]}
    assert items["esc50-story-1"]["meta"] == {"labels": ["dog", "rain"]}
    assert "beside" not in items["esc50-story-3"]
    sheet = ["agree", "--make", 9, "--out", tmp_path / "sheet.csv", "--report"]
    found = run(*sheet, tmp_path / "reports" / "x.json", bench=None)
    assert "2 of 2 judged items" in found.out


def test_figures_of_a_rule_follow_from_its_report(run, jasco, pro, tmp_path):  # noqa: F811
    """What second models said stands beside each item, so nobody has to be asked again."""

    class Says(Model):
        def said(self, body):
            if "input" in body:
                made = enumerate(Letters().embed(body["input"]))
                made = [{"index": i, "embedding": vector} for i, vector in made]
                return 200, {}, json.dumps({"data": made}).encode()
            prompt = body["messages"][0]["content"]
            if "CORRECTNESS" in prompt:
                return "CORRECTNESS: 3\nRELEVANCE: 4\nCOMPLETENESS: 2\nCLARITY: 5"
            n = int(re.search(r"answer (\d+)", prompt)[1])
            return jasco_reply(n % 3, "Both" if n % 2 else "Neither")

    ids = [f"{clip}-{k}" for clip in "12" for k in range(1, 9)]
    told = [{"id": id, "answer": f"answer {n}"} for n, id in enumerate(ids)]
    told += [{"id": id, "answer": answer} for id, answer in (("one", "cats"), ("open", "a dog"))]
    answers = write_lines(tmp_path / "told.jsonl", told)
    with serving(Says, None) as other:
        flags = ["--answers", answers, "--llm", other.url, "--model", "m", "--mode", "official"]
        report = done(run(*flags, "--data", jasco, bench="jasco"))
        flags += ["--embeddings", f"{other.url}/v1"]
        both = done(run(*flags, "--data", pro, bench="mmau-pro", name="y"))
        asked = len(other.asked)
        assert done(run(*flags, "--data", pro, bench="mmau-pro", name="y")) == both
        assert len(other.asked) == asked and list(both["judges"]) == ["m", "nvidia/NV-Embed-v2"]
    best = Counter()
    for item in report["items"]:
        clip = item["meta"]["clip"]
        best[clip] = max(best[clip], item["beside"]["m"][0] or 0)
    assert report["official"]["figures"]["best-mean"] == best.total() / 3 > 0
    for item in both["items"]:
        held, kept = item["beside"], item["meta"].get("published")
        right = float(held["pick"] == kept["gold"]) if kept else judge.overall(held["marks"])
        assert item["official"] == right
    assert {item["official"] for item in both["items"]} == {0, 1, 0.7}


MINIATURES = {
    "mae": "mae", "mmau": "mmau", "mmau-pro": "pro", "mmau-pro-multi": "pro",
    "mmau-pro-several": "pro", "mmar": "mmar", "adiff": "adiff", "jasco": "jasco",
    "compa-order": "compa", "compa-attribute": "compa", "librispeech": "libri", "esc-50": "esc",
    "urbansound8k": "urban",
}  # fmt: skip


@pytest.mark.parametrize("name", judge.BENCHES)
def test_a_published_bench_from_its_files_to_a_report(name, run, server, request, tmp_path):
    """Asked of a server, where a row without its clip is missing; then by answers in a file, for
    which no clip has to be there."""
    data = request.getfixturevalue(MINIATURES[name])
    rows = list(judge.BENCHES[name].read(data, lambda bad: None))
    report = done(run(*asks(server), "--data", data, bench=name))
    assert [item["id"] for item in report["items"]] == [row["id"] for row in rows]
    for item in report["items"]:
        there = all((data / clip).is_file() for clip in item["clips"])
        assert there == (item["answer"] is not None), item["id"]
    for sound in [*data.rglob("*.wav"), *data.rglob("*.flac")]:
        sound.unlink()
    judge.audio_under.cache_clear()
    told = [{"id": row["id"], "prediction": row["answer"]} for row in rows]
    told = write_lines(tmp_path / "told.jsonl", told)
    report = done(run("--answers", told, "--data", data, bench=name, name="y"))
    scores = [prepare.score(row["gold"], row["answer"]) for row in rows]
    assert [item["score"] for item in report["items"]] == scores
    assert set(scores) == {1} or name == "jasco"  # whose answers need not hold their keywords
    found = run(*asks(server), "--data", data, bench=name, name="z")
    assert found.code == 2 and "expected the clips that its rows name" in found.err


def test_likelihoods_are_kept_and_computed_again_from_the_report(
    run,
    short,
    bench,
    compa,  # noqa: F811
    monkeypatch,
):
    flags = ["--weights", bench / "weights", "--data", compa, "--mode", "official"]
    report = done(run(*flags, bench="compa-order"))
    *items, gone = report["items"]
    assert gone["loglik"] is None and gone["official"] == 0
    for item in items:
        pair = judge.compa([line[:2] for line in item["loglik"][:2]])
        assert item["official"] == float(pair[2]) and np.isfinite(item["loglik"]).all()
    figures = report["official"]["figures"]
    assert figures["group"] == sum(i["official"] for i in items) / len(report["items"])
    asked, scores = [], judge.compa_scores
    monkeypatch.setattr(
        judge, "compa_scores", lambda net, row, root: asked.append(row) or scores(net, row, root)
    )
    assert done(run(*flags, bench="compa-order")) == report
    assert [row["id"] for row in asked] == [gone["id"]]  # a second run asks for nothing else


# ------------------------------------------------------------------------------------------------
# A real server.


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """transformers serve, with a Qwen2-Audio of random weights: it hears, and says gibberish."""
    for name in ("fastapi", "uvicorn", "typer", "openai"):
        pytest.importorskip(name, reason="transformers[serving] is not installed")
    program = shutil.which("transformers", path=os.path.dirname(sys.executable))
    if program is None:
        pytest.skip("no program transformers beside this python")
    from transformers import AutoTokenizer, Qwen2AudioProcessor, WhisperFeatureExtractor

    folder = tmp_path_factory.mktemp("real") / "hears"
    folder.mkdir()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names += ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    train_bpe(["0 1 2 3 4 5 6 7 8 9 audio system user assistant"], 300, names, folder)
    tok = Tokenizer.from_dir(folder)
    make("qwen2_audio", folder, vocab_size=len(tok))
    edit_json(folder / "config.json", audio_token_index=tok.special["<|AUDIO|>"])
    heard = WhisperFeatureExtractor(feature_size=128)
    Qwen2AudioProcessor(heard, AutoTokenizer.from_pretrained(folder)).save_pretrained(folder)
    port, env = free_port(), {**os.environ, "OMP_NUM_THREADS": "1"}
    words = ["serve", str(folder), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    log = open(folder.parent / "log", "w")
    process = subprocess.Popen([program, *words], stdout=log, stderr=log, env=env)
    until = time.monotonic() + 120
    while socket.socket().connect_ex(("127.0.0.1", port)):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(f"transformers serve did not start: {(folder.parent / 'log').read_text()}")
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}", folder
    process.kill()
    process.wait()
    log.close()


@pytest.mark.long
def test_a_real_server_that_says_gibberish(real, run, bench, monkeypatch):
    """It hears the clips (a prompt of three is longer than one of one), and every reply of it is
    counted as one that cannot be read."""
    monkeypatch.setattr(judge, "NEW", 8)
    url, folder = real
    flags = ["--server", url, "--server-model", folder, "--concurrency", 2]
    found = run(*flags)
    report = done(found)
    tasks = {**report["tasks"], **report["single"]}
    readable = {"tell", "words", "tag"}  # whatever is said can be scored against a text
    for name, task in tasks.items():
        assert task["missing"] == 0, found.err
        assert task["unparsed"] == (0 if name in readable else task["n"]), report["items"]
        assert task["score"] == 0
    usage = [json.loads(line)["usage"] for line in open(found.folder / "x.asked.jsonl")]
    read = sorted(count for count, _ in usage if count)
    assert len(read) == len(ROWS) and read[-1] > read[0] + 20


# ------------------------------------------------------------------------------------------------
# Mistakes.

MISTAKES = [
    ([], "who answers: expected one of --weights, --answers and --server, found none"),
    (["--weights", "W", "--answers", "M"], "found weights and answers"),
    (["--weights", "nowhere"], "nothing at nowhere"),
    (["--answers", "nowhere.jsonl"], "nothing at nowhere.jsonl"),
    (["--server", "http://x"], "--server-model: expected the model's name"),
    (["--server", "x:80", "--server-model", "m"], "--server: expected a URL"),
    (["--server", "http://x", "--server-model", "m", "--concurrency", "0"], "--concurrency"),
    (["--server", "http://x", "--server-model", "m", "--view", "no-boundary"], "no-boundary"),
    (["--server", "http://127.0.0.1:1", "--server-model", "m"], "Connection refused"),
    (["--weights", "W", "--view", "concat", "--vote", "3"], "expected one of them"),
    (["--weights", "W", "--view", "concat", "--late-fusion"], "expected one of them"),
    (["--weights", "W", "--vote", "1"], "--vote: expected 2 or more"),
    (["--weights", "W", "--items", "0"], "--items: expected 1 or more"),
    (["--weights", "W", "--embed", "-1"], "--embed: expected 0 or more"),
    (["--weights", "W", "--most", "0"], "--most: expected 1 or more"),
    (["--weights", "W", "--embeddings", "http://x"], "--embeddings: expected --mode official"),
    (["--weights", "W", "--answer-field", "x"], "--answer-field: expected --answers"),
    (["--answers", "M", "--answer-field", "x"], "answers named x, or --answer-field NAME, found"),
    (["--weights", "W", "--view", "permute"], "--view"),
    (["--weights", "W", "--permute", "wrongly"], "--permute"),
    (["--weights", "W", "--shard", "3/2"], "--shard"),
    (["--weights", "W", "--shard", "0/2"], "--shard"),
    (["--weights", "W", "--name", "a/b"], "--name: expected a name without folders"),
    (["--weights", "W", "--mode", "official"], "--mode official: expected a published bench"),
    (["--weights", "W", "--data", "D"], "--data: expected a published bench"),
    (["--weights", "W", "--llm", "nowhere"], "--llm: expected a URL or a folder"),
    (["--weights", "W", "--llm", "http://x"], "--model: expected as many as"),
    (["--weights", "W", "--model", "m"], "--model: expected as many as"),
    (["--weights", "D"], "expected config.json in a folder of weights, found none"),
    (["--weights", "W", "--device", "abacus"], "--device"),
    (["--weights", "W", "--bench", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
    (["--weights", "W", "--bench", "mmau"], "--bench mmau: expected --data DIR"),
    (["--weights", "W", "--bench", "mmau", "--data", "D"], "expected mmau-test-mini.json"),
    (["--answers", "M", "--text-only"], "--text-only: expected somebody to ask"),
    (["--answers", "M", "--permute"], "--permute: expected somebody to ask"),
    (["--answers", "OTHER"], "expected ids like 'r0', found none of these"),
    (["--wieghts", "W"], "unrecognized arguments: --wieghts"),
]  # fmt: skip


@pytest.mark.parametrize(
    "words, told", MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_one_line(words, told, run, bench, mine, tmp_path):
    (tmp_path / "D").mkdir()
    other = write_lines(tmp_path / "other.jsonl", [{"id": "r99", "answer": "yes"}])
    at = {"W": bench / "weights", "M": mine, "D": tmp_path / "D", "OTHER": other}
    words = [at.get(word, word) for word in words]
    words = words if "--bench" in words else ["--bench", bench / "bench.jsonl", *words]
    names = [] if "--name" in words else ["--name", "x"]
    found = run(*words, *names, "--out", tmp_path / "reports", bench=None)
    assert found.code == 2, found.err
    lines = [
        line for line in found.err.splitlines() if not re.match(r"hears|m at|weights \w", line)
    ]
    assert len(lines) == 1 and told in lines[0], found.err
    assert found.report is None and found.out == ""


@pytest.mark.parametrize(
    "bench_name, flag",
    [("mae", "--llm"), ("compa-order", "--weights"), ("esc-50", "published rule")],
)
def test_what_a_rule_lacks_is_said_before_anybody_is_asked(
    bench_name, flag, run, server, request, bench
):
    folder = {"mae": "mae", "compa-order": "compa"}.get(bench_name)
    data = request.getfixturevalue(folder) if folder else tiny_esc(bench)
    found = run(*asks(server), "--data", data, "--mode", "official", bench=bench_name)
    lines = [line for line in found.err.splitlines() if not line.startswith("warning:")]
    assert found.code == 2 and len(lines) == 1 and flag in lines[0]
    assert server.asked == [] and found.report is None


def tiny_esc(bench):
    folder = bench / "esc"
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    (folder / "meta").mkdir(exist_ok=True)
    header = "filename,fold,target,category,esc10,src_file,take"
    lines = [header]
    for i, label in enumerate(["dog", "rain"]):
        soundfile.write(folder / "audio" / f"1-{i}-A-{i}.wav", np.zeros(1600), 16000)
        lines.append(f"1-{i}-A-{i}.wav,1,{i},{label},False,{i},A")
    (folder / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    return folder


SERVED = ["--server", "http://x", "--server-model", "m"]


def test_other_mistakes(run, bench, mine, tmp_path):
    report = tmp_path / "reports" / "x.json"
    done(run("--answers", mine))
    (tmp_path / "no.json").write_text("{}")
    clip = {"path": str(bench / "a.wav")}
    bare = write_lines(tmp_path / "b.jsonl", [{**ROWS[0], "clips": [clip] * 2, "meta": {}}])
    for words, told in (
        (["compare", report, tmp_path / "none.json"], "none.json: cannot be read"),
        (["compare", report, tmp_path / "no.json"], "no.json: expected a report"),
        (["compare", report], "the following arguments are required"),
        (["agree", "--report", report], "SHEET or --make N"),
        (["agree", "--make", "5", "--report", report], "expected answers that were judged"),
        (["agree", tmp_path / "no.csv", "--report", report], "no.csv: cannot be read"),
        (["judge"], "invalid choice"),
        ([*SERVED, "--view", "as-text", "--bench", bare, "--out", tmp_path], "r0: meta.evidence"),
    ):
        found = run(*words, bench=None)
        lines = [line for line in found.err.splitlines() if line != "m at http://x: a server"]
        assert found.code == 2 and len(lines) == 1, found.err
        assert told in lines[0] and found.out == ""
