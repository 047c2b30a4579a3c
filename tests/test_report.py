"""The report for people: what it shows, what it never runs, and how two are compared. The page is
looked at in a real browser where there is one."""

import base64
import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import soundfile
from scipy import stats

import judge
from prepare import BadInput

EVIL = "<script>alert(1)</script>"
HOSTILE = [  # texts that would get out of a page that is written without care
    EVIL,
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "</SCRIPT ><img src=x onerror=alert(1)>",
    "\" onmouseover='alert(1)' &amp; &lt;",
    "a\u2028b\u2029c",
    "\u202egnp.exe\u202c \u2066x",
    "bell\x07 escape\x1b[31m null\x00",
    "half \ud83d of a face",
    "tag \U000e0041 and \u200b nothing",
    "]]> --> {{ {title} %s",
]


def item(i, task="odd", score=1.0, answer="audio 1", clips=("a.wav", "b.wav"), **more):
    about = {"id": f"r{i}", "task": task, "skill": "comparison", "clips": list(clips)}
    about |= {"reference": "audio 1", "meta": {}}
    gold = {"type": "clip", "value": 1}
    said = {"question": f"Which one, {i}?", "gold": gold, "answer": answer, "score": score}
    return {**about, **said, **more}


def report(items, root=".", name="tiny", **more):
    """A report on them as judge.py writes it, in what matters here."""
    tasks = {}
    for task in dict.fromkeys(one["task"] for one in items):
        mine = [one for one in items if one["task"] == task]
        mean = sum(one["score"] or 0 for one in mine) / len(mine)
        tasks[task] = {
            "n": len(mine), "missing": sum(one["answer"] is None for one in mine), "unparsed": 0,
            "score": mean, "low": max(0.0, mean - 0.1), "high": min(1.0, mean + 0.1),
            "chance": 0.25, "majority": 0.4, "text-only": 0.3,
        }  # fmt: skip
    macro = sum(task["score"] for task in tasks.values()) / len(tasks)
    about = {"name": name, "macro": macro, "weighted": macro, "single": {}, "tasks": tasks}
    groups = {"skills": {"comparison": dict(tasks["odd"])}, "clips": {"2": dict(tasks["odd"])}}
    return {**about, **groups, "items": items, "root": str(root), "bench": "bench.jsonl", **more}


class Page(HTMLParser):
    """A page as a program reads it: its elements, and the texts of some."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.rows = [], {}, []
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)
        self.data = json.loads(self.texts["script"][0])

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.rows += [[]] if tag == "tr" else []

    def handle_data(self, data):
        tag = self.tags[-1][0] if self.tags else ""
        self.texts.setdefault(tag, []).append(data)
        if self.rows and data.strip():
            self.rows[-1].append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def page(tmp_path, *reports, embed=0):
    judge.write_page(tmp_path / "page.html", list(reports), embed)
    return Page(tmp_path / "page.html")


# ------------------------------------------------------------------------------------------------
# The page as a file.


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_report_becomes_markup(tmp_path, text):
    calm = page(tmp_path, report([item(0)]))
    hostile = item(0, text, answer=text, question=text, choices=[text], skill=text, marks=[text])
    hostile["gold"] = {"type": "choice", "value": text}
    items = [item(0, id=text), {**hostile, "id": "x"}]
    found = page(tmp_path, report(items, name=text, settings={text: text}, **{"hashes": [text]}))
    kinds = {(tag, *sorted(attrs)) for tag, attrs in found.tags}
    assert kinds <= {(tag, *sorted(attrs)) for tag, attrs in calm.tags}
    assert len(found.all("script")) == 2
    assert "\u2028" not in found.source and "\x00" not in found.source
    assert not any("\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069" for c in found.source)
    told = found.data["items"][1]["said"][0]["answer"]
    assert told == "".join(c if c.isprintable() else f"⟨U+{ord(c):04X}⟩" for c in text)


def test_what_ordinary_text_needs_stays():
    for text in ("two\nlines\tand a tab", "می\u200cخواهم", "👩\u200d🚀", "ein Ä, 中文, שלום"):
        assert judge.seen(text) == text
    assert judge.seen({"a\x1b": ["\u202e", 1, None]}) == {"a⟨U+001B⟩": ["⟨U+202E⟩", 1, None]}


def test_the_policy_lets_this_script_run_and_no_other(tmp_path):
    found = page(tmp_path, report([item(0)]))
    (policy,) = [m["content"] for m in found.all("meta") if "http-equiv" in m]
    rules = dict(rule.split(None, 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert not re.search("unsafe|http|\\*", policy)
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", found.source, re.S)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    named = [value for _, attrs in found.tags for name, value in attrs.items()
             if name in ("src", "href", "srcset", "data")]  # fmt: skip
    assert all(value.startswith(("#", "data:,")) for value in named)
    assert not any("style" in attrs for _, attrs in found.tags), "the policy would drop it"
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)


@pytest.mark.parametrize(
    "clip",
    [
        "a.wav",
        "deep/er/a.wav",
        "spa ce #1 50%?.wav",
        "javascript:alert(1).wav",
        'quo"te<b>.wav',
        "ünï 中.wav",
    ],
)
def test_clips_are_linked_from_the_pages_folder(tmp_path, clip):
    out = tmp_path / "reports" / "x"
    out.mkdir(parents=True)
    found = page(out, report([item(0, clips=[clip])], root=tmp_path / "bench"))
    link = found.data["items"][0]["clips"][0]["link"]
    assert urlsplit(link)[:2] == ("", "") and not set(link) & set(' "<>#?:')
    assert os.path.normpath(out / unquote(link)) == str(tmp_path / "bench" / clip)


def test_a_part_of_a_clip_is_linked_as_such(tmp_path):
    clips = [{"path": "a.wav", "start": 0.5, "end": 1.25}, {"path": "a.wav", "start": 2}]
    found = page(tmp_path, report([item(0, clips=clips)], root=tmp_path))
    assert [c["link"] for c in found.data["items"][0]["clips"]] == ["a.wav#t=0.5,1.25", "a.wav#t=2"]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A folder with clips, one of them with a name that has to be encoded."""
    folder = tmp_path_factory.mktemp("bench")
    time = np.arange(4000) / 16000
    for name, tone in (("a.wav", 300), ("b.wav", 500), ("dir ectory/c #1%.wav", 700)):
        (folder / name).parent.mkdir(exist_ok=True)
        soundfile.write(folder / name, 0.1 * np.sin(2 * np.pi * tone * time), 16000)
    return folder


def test_embedded_clips_travel_and_the_others_stay(tmp_path, sounds, capsys):
    part = {"path": "a.wav", "start": 0.05, "end": 0.15}
    items = [item(0, clips=[part, "gone.wav"]), item(1), item(2)]
    found = page(tmp_path, report(items, sounds), embed=2)
    links = [[clip["link"] for clip in one["clips"]] for one in found.data["items"]]
    embedded = [link.startswith("data:audio/wav;base64,") for link in sum(links, [])]
    assert embedded == [True, False, True, True, False, False]
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(links[0][0].split(",")[1])))
    whole, _ = soundfile.read(sounds / "a.wav")
    assert rate == 16000
    np.testing.assert_allclose(wave, whole[800:2400], atol=1e-4)
    assert "gone.wav" in capsys.readouterr().err


def test_tables_say_what_the_report_says(tmp_path):
    items = [item(0, score=1.0), item(1, score=0.0), item(2, "factual", 0.5), item(3, "factual")]
    rows = page(tmp_path, report(items, wer=0.25)).rows
    assert ["odd", "0.500", "0.400 to 0.600", "0.250", "0.400", "0.300", "2", "0", "0"] in rows
    assert ["factual", "0.750", "0.650 to 0.850", "0.250", "0.400", "0.300", "2", "0", "0"] in rows
    assert ["macro", "0.625", "0.250"] in rows
    heads = ["task", "0 to 1", "score", "95 %", "chance", "majority", "text-only", "n", "missing",
             "unparsed"]  # fmt: skip
    assert heads in rows


def test_every_column_that_stands_there_is_explained(tmp_path):
    found = page(tmp_path, report([item(0)]))
    told = " ".join(found.texts["dt"])
    for name in ("score", "95 %", "chance", "majority", "text-only", "n", "missing", "unparsed"):
        assert name in told and any(m.get("title") == judge.COLUMNS[name] for m in found.all("th"))
    assert "kendall" not in told


def test_bars_are_as_long_as_scores(tmp_path):
    found = page(tmp_path, report([item(0, score=1.0), item(1, score=0.0), item(2, score=0.0)]))
    assert {"class": "fill", "width": "33.33%", "y": "5", "height": "10"} in found.all("rect")
    assert {"class": "range", "x1": "23.33%", "x2": "43.33%", "y1": "10", "y2": "10"} in found.all(
        "line"
    )
    assert {"href": "#chance", "x": "25.00%", "y": "10"} in found.all("use")


def test_several_reports_stand_side_by_side(tmp_path):
    one = report([item(0), item(1, answer=None, score=None)], name="old")
    two = report([item(1, answer="audio 2", score=0.0), item(2)], name="new")
    found = page(tmp_path, one, two)
    assert [one["id"] for one in found.data["items"]] == ["r0", "r1", "r2"]
    said = [[one and one["answer"] for one in each["said"]] for each in found.data["items"]]
    assert said == [["audio 1", None], [None, "audio 2"], [None, "audio 1"]]
    assert found.data["items"][0]["said"][1] is None
    assert found.data["items"][1]["said"][0] == {"answer": None, "score": None, "more": []}
    assert [row[:2] for row in found.rows if row[1:2] == ["A"]] == [[n, "A"] for n in
        ("macro", "weighted", "odd", "comparison", "2")]  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Two reports compared.


def pair(n=40, seed=0):
    """Two reports on the same items, the second better at one task and worse at the other."""
    dice = np.random.default_rng(seed)
    old, new = [], []
    for i in range(n):
        task = "odd" if i % 4 else "factual"
        base = dice.random()
        old.append(item(i, task, round(base * 0.6 + 0.2, 3)))
        new.append(
            item(
                i,
                task,
                round(min(1, base * 0.6 + 0.2 + dice.normal(-0.03 if i % 4 else 0.06, 0.1)), 3),
            )
        )
    return report(old, name="old"), report(new, name="new")


def save(tmp_path, *reports):
    paths = [tmp_path / f"{name}.json" for name in "abcdef"[: len(reports)]]
    for path, one in zip(paths, reports):
        path.write_text(json.dumps(one))
    return [str(path) for path in paths]


def compare(*args):
    """judge.run_compare as the command line would call it: what it prints."""
    parser = judge.Parser()
    judge.add_compare(parser.add_subparsers())
    args = parser.parse_args(["compare", *map(str, args)])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        args.run(args)
    return printed.getvalue()


def test_the_interval_is_that_of_scipy():
    old, new = pair()
    found = judge.compared(old, new)["odd"]
    scores = [
        [one["score"] for one in each["items"] if one["task"] == "odd"] for each in (old, new)
    ]
    gaps = np.array(scores[1]) - np.array(scores[0])
    theirs = stats.bootstrap((gaps,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert found["n"] == 30
    assert found["A"] == pytest.approx(np.mean(scores[0])) and found["B"] == np.mean(scores[1])
    assert found["B - A"] == pytest.approx(gaps.mean())
    assert found["low"] == pytest.approx(theirs.confidence_interval.low, abs=0.05 * width)
    assert found["high"] == pytest.approx(theirs.confidence_interval.high, abs=0.05 * width)
    better = np.mean(theirs.bootstrap_distribution > 0)
    assert 0 < better < 1 and found["B better"] == pytest.approx(better, abs=0.02)


def test_the_macro_draws_within_each_task():
    """Against a slow loop, and apart from what pooling all items would give."""
    old, new = pair()
    found = judge.compared(old, new)
    gaps = {}
    for a, b in zip(old["items"], new["items"]):
        gaps.setdefault(a["task"], []).append(b["score"] - a["score"])
    dice, means = np.random.default_rng(5), []
    for _ in range(4000):
        means.append(np.mean([np.mean(dice.choice(each, len(each))) for each in gaps.values()]))
    low, high = np.quantile(means, [0.025, 0.975])
    macro = found["macro"]
    assert macro["B - A"] == pytest.approx(np.mean([np.mean(each) for each in gaps.values()]))
    assert macro["low"] == pytest.approx(low, abs=0.06 * (high - low))
    assert macro["high"] == pytest.approx(high, abs=0.06 * (high - low))
    assert macro["B better"] == pytest.approx(np.mean(np.array(means) > 0), abs=0.025)


def test_coin_flips_have_the_binomials_interval():
    """Where B is right on k of n more and else the same, a draw's difference is binomial / n."""
    n, k = 50, 10
    old = report([item(i, score=0.0) for i in range(n)])
    new = report([item(i, score=float(i < k)) for i in range(n)])
    found = judge.compared(old, new)["odd"]
    wanted = stats.binom.ppf([0.025, 0.975], n, k / n) / n
    assert [found["low"], found["high"]] == pytest.approx(list(wanted), abs=1e-9)
    assert found["B better"] == pytest.approx(1 - stats.binom.pmf(0, n, k / n), abs=0.001)


def test_the_same_report_twice_is_no_better():
    old, _ = pair()
    for row in judge.compared(old, old).values():
        assert [row[name] for name in ("B - A", "low", "high", "B better")] == [0, 0, 0, 0]


def test_rounding_makes_no_winner():
    """0.1 + 0.2 against 0.3 is a tie."""
    old = report([item(0, score=0.3), item(1, score=0.0)])
    new = report([item(0, score=0.1 + 0.2), item(1, score=0.0)])
    assert judge.compared(old, new)["odd"]["B better"] == 0


def test_missing_and_unparsed_count_as_nothing():
    old = report([item(0, score=None, answer=None), item(1, score=None, answer="perhaps")])
    new = report([item(0, score=1.0), item(1, score=0.5)])
    found = judge.compared(old, new)["odd"]
    assert (found["A"], found["B"]) == (0, 0.75)


def test_single_clips_stay_out_of_the_macro():
    old, new = (
        report([item(0, score=s), item(1, "tag", 1 - s, skill="single")]) for s in (0.0, 1.0)
    )
    found = judge.compared(old, new)
    assert found["tag"]["B - A"] == -1
    assert (found["macro"]["B - A"], found["macro"]["n"]) == (1, 1)


def test_what_a_report_says_of_itself_is_computed_again(tmp_path):
    """By hand, or by another version of the rule: it is the answers that are compared."""
    old = report([item(0, score=0.0), item(1, score=0.0)])  # both are right
    new = {**report([item(0, score=1.0, answer="audio 2"), item(1)]), "macro": 7.0}
    told = compare(*save(tmp_path, old, new), "--html", tmp_path / "both.html")
    assert "macro                 2    1.000    0.500" in told
    assert "7.000" not in (tmp_path / "both.html").read_text()


def test_where_all_are_of_single_clips_they_are_what_is_compared(tmp_path):
    old, new = (report([item(0, skill="single", answer=f"audio {n}")]) for n in (1, 2))
    told = compare(*save(tmp_path, old, new))
    assert "macro                 1    1.000    0.000" in told


def test_only_what_is_in_both_is_compared_and_the_rest_is_counted(tmp_path):
    old = report([item(i, score=1.0) for i in (0, 1, 2, 3)])
    new = report([item(i, score=0.0, answer="audio 2") for i in (5, 3, 2)])
    told = compare(*save(tmp_path, old, new))
    lines = [line.split() for line in told.splitlines()]
    assert lines[1] == ["odd", "2", "1.000", "0.000", "-1.000", "-1.000", "..", "-1.000", "0.000"]
    assert [line[0] for line in lines] == ["n", "odd", "macro", "A:", "B:"]
    assert (
        "a.json; items that are in it alone: 2" in told
        and "b.json; items that are in it alone: 1" in told
    )
    same = [compare(*save(tmp_path, *pair())) for _ in range(2)]
    assert same[0] == same[1], "the same draws each time"


def test_compare_writes_a_page_of_both(tmp_path):
    old, new = pair()
    compare(*save(tmp_path, old, new), "--html", tmp_path / "both.html")
    found = Page(tmp_path / "both.html")
    assert found.data["names"] == ["A old", "B new"]
    heads = ["B against A", "A", "B", "B - A", "95 %", "B better", "n"]
    assert heads in found.rows
    (row,) = [row for row in found.rows if row[0] == "factual" and len(row) == 7]
    assert row[-1] == "10"


def changed(**fields):
    return report([item(0), item(1, **fields)])


def holding(*items):
    return {**report([item(0)]), "items": list(items)}


@pytest.mark.parametrize(
    "other, named",
    [
        (changed(gold={"type": "clip", "value": 2}), "r1: gold"),
        (changed(gold={"type": "count", "value": 1}), "r1: gold"),
        (changed(task="comparison"), "r1: task"),
        (changed(question="Which was it?"), "r1: question"),
        (report([item(7)]), "none of them"),
        ({"macro": 1}, "a report"),
        ([], "a report"),
        (holding(item(0, answer=1)), "item 1 (r0): answer: expected a text"),
        (holding(item(0, flips="no")), "item 1 (r0): flips: expected a number"),
        (holding(item(0, marks={"m": {"raw": 3}})), "item 1 (r0): marks: expected a model's name"),
        (holding(item(0, beside=[1])), "item 1 (r0): beside: expected what second models said"),
        (holding(item(0, beside={"votes": ["yes"]})), "item 1 (r0): beside: expected what"),
        (holding(item(0, gold={"type": "clip", "value": 9})), "item 1 (r0): gold.value: expected"),
        (holding({k: v for k, v in item(0).items() if k != "answer"}), "expected one of judge.py"),
        (holding("r0"), "item 1: item: expected one of judge.py"),
        ({**holding(item(0)), "name": [1]}, "name: expected a text"),
        (holding(), "a report"),
        (report([item(0), item(0)]), "r0"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(tmp_path, other, named):
    paths = save(tmp_path, report([item(0), item(1)]), other)
    with pytest.raises(BadInput) as refused:
        compare(*paths, "--html", tmp_path / "both.html")
    message = str(refused.value)
    assert "b.json" in message and named in message and "\n" not in message
    assert not (tmp_path / "both.html").exists()


# ------------------------------------------------------------------------------------------------
# The page in a browser.


class Browser:
    """Chromium without a window, driven over two file descriptors: it reads JSON messages, each
    with a NUL behind it, from its 3, and writes its own to its 4."""

    LAUNCH = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4);"
        "os.nice(max(0, 19 - os.nice(0))); os.execvp(sys.argv[3], sys.argv[3:])"
    )

    def __init__(self, program, folder):
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (*os.pipe(), *os.pipe())]
        self.theirs, self.out, self.into, written = ends
        flags = [
            "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}",
            "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-dev-shm-usage", *["--no-sandbox"] * (os.getuid() == 0),
        ]  # fmt: skip
        words = [sys.executable, "-c", self.LAUNCH, str(self.theirs), str(written), program, *flags]
        self.process = subprocess.Popen(
            words,
            pass_fds=(self.theirs, written),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(self.theirs)
        os.close(written)
        self.rest, self.last, self.events, self.session = b"", 0, [], {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        found = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": found["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def read(self, until):
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.into], [], [], max(0, until - time.monotonic()))
            assert ready, "the browser says nothing"
            part = os.read(self.into, 1 << 20)
            assert part, "the browser has gone"
            self.rest += part
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def send(self, method, **params):
        self.last += 1
        message = {"id": self.last, "method": method, "params": params, **self.session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + 60
        while True:
            message = self.read(until)
            if message.get("id") == self.last:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def open(self, url, width, height, dark=False):
        mode = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[mode])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Page.navigate", url="about:blank")
        self.events.clear()
        self.send("Page.navigate", url=url)
        self.run("new Promise(done => document.readyState === 'complete' ? done() : onload = done)")

    def run(self, script):
        given = {"expression": script, "awaitPromise": True, "returnByValue": True}
        found = self.send("Runtime.evaluate", **given)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self):
        """Everything that would be red in the console, and scripts that opened a dialog."""
        self.run("new Promise(done => setTimeout(done, 50))")
        found = []
        for event in self.events:
            kind, about = event.get("method"), event.get("params", {})
            error = about.get("entry", {}).get("level") == "error" or about.get("type") == "error"
            if kind in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening") or (
                kind in ("Log.entryAdded", "Runtime.consoleAPICalled") and error
            ):
                found.append(about)
        return found

    def asked(self):
        """The kinds of address that anything was fetched from."""
        sent = [e["params"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return {urlsplit(one["request"]["url"]).scheme for one in sent}

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self.send("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        os.close(self.into)
        os.close(self.out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser here: none of {', '.join(names)} is installed")
    browser = Browser(program, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


SHOWN = "[...document.querySelectorAll('article a')].map(a => a.textContent)"
HEARD = """Promise.all([...document.querySelectorAll('audio')].map(player => new Promise(done => {
    player.addEventListener('loadedmetadata', () => done(player.duration));
    player.addEventListener('error', () => done('error'));
    player.preload = 'metadata';
    player.load();
})))"""


def choose(field, value):
    set_it = f"const field = document.forms[0].elements[{field!r}]; field.value = {value!r};"
    return f"{{ {set_it} field.dispatchEvent(new Event('input', {{bubbles: true}})); }}" + SHOWN


@pytest.fixture(scope="module")
def small(sounds):
    """The page of twelve items, of which the first two travel with their clips."""
    kinds = [("audio 1", 1.0), ("audio 2", 0.0), (None, None), ("perhaps", None), ("audio 1", 0.5)]
    items = []
    for i in range(12):
        answer, score = kinds[i % 5]
        clips = ["a.wav", "dir ectory/c #1%.wav", {"path": "b.wav", "start": 0.05, "end": 0.2}]
        items.append(item(i, "odd" if i < 7 else "factual", score, answer, clips[: 2 + i % 2]))
    items[1]["answer"] = f"{EVIL} and \u202eback"
    items[6]["answer"] = "</script><script>window.broken = 1</script>"
    items[0]["choices"] = ["the first", "the second", EVIL]
    (sounds / "reports").mkdir(exist_ok=True)
    path = sounds / "reports" / "small.html"
    judge.write_page(path, [report(items, sounds, settings={"seed": 1})], embed=2)
    return path.as_uri()


@pytest.mark.parametrize("width, height", [(400, 800), (1400, 900)])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_opens_without_a_complaint(browser, small, width, height, dark):
    browser.open(small, width, height, dark)
    assert browser.run(SHOWN) == [f"r{i}" for i in range(12)]
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("typeof window.broken") == "undefined"
    assert browser.run("document.querySelectorAll('article script').length") == 0
    assert EVIL in browser.run("document.querySelectorAll('.told')[4].textContent")
    heard = browser.run(HEARD)
    assert len(heard) == 6 * 2 + 6 * 3 and "error" not in heard
    assert min(heard) == pytest.approx(0.15, abs=0.01) and max(heard) == pytest.approx(0.25)
    assert browser.complaints() == []
    assert browser.asked() <= {"file", "data"}


def test_filters(browser, small):
    browser.open(small, 1400, 900)
    assert browser.run(choose("task", "factual")) == [f"r{i}" for i in range(7, 12)]
    assert browser.run(choose("verdict", "right")) == ["r10"]
    assert browser.run("document.querySelector('output').textContent") == "1 of 12 items"
    assert browser.run("location.hash") == "#task=factual&verdict=right"
    assert browser.run(choose("task", "")) == ["r0", "r5", "r10"]
    assert browser.run(choose("verdict", "wrong")) == ["r1", "r6", "r11"]
    assert browser.run(choose("verdict", "missing")) == ["r2", "r7"]
    assert browser.run(choose("verdict", "unparsed")) == ["r3", "r8"]
    assert browser.run(choose("verdict", "partly")) == ["r4", "r9"]
    assert browser.run(choose("verdict", "")) == [f"r{i}" for i in range(12)]
    assert browser.run(choose("text", "ALERT(1)")) == ["r0", "r1"]
    assert browser.run(choose("text", "nowhere to be found")) == []
    assert browser.complaints() == []


def test_the_address_keeps_what_was_chosen(browser, small):
    browser.open(small + "#task=odd&verdict=wrong&text=which", 1400, 900)
    assert browser.run(SHOWN) == ["r1", "r6"]
    fields = "[...document.forms[0].elements].map(field => field.value)"
    assert browser.run(fields) == ["odd", "wrong", "which"]
    follow = "new Promise(done => { addEventListener('hashchange', () => done()); %s })"
    browser.run(follow % "document.querySelector('tr a[href=\"#task=factual\"]').click()")
    assert browser.run(SHOWN) == [f"r{i}" for i in range(7, 12)]
    browser.run(follow % "location.hash = '#task=no%20such&page=99'")
    assert browser.run(SHOWN) == [f"r{i}" for i in range(12)]
    assert browser.run("document.forms[0].elements.task.selectedIndex") == 0
    assert browser.complaints() == []


def test_keys_reach_the_filter_and_the_clips(browser, small):
    """Tab goes through the tables, the filter and the first item; letters typed there filter."""
    browser.open(small, 1400, 900)
    reached = []
    for _ in range(20):
        for kind in ("keyDown", "keyUp"):
            browser.send("Input.dispatchKeyEvent", type=kind, key="Tab", windowsVirtualKeyCode=9)
        reached.append(browser.run("document.activeElement.name || document.activeElement.tagName"))
        if reached[-1] == "text":
            browser.send("Input.insertText", text="r11")
            assert browser.run(SHOWN) == ["r11"]
    assert {"DIV", "task", "verdict", "text", "A", "AUDIO"} <= set(reached)


def test_a_clip_that_is_gone_says_so(browser, tmp_path):
    judge.write_page(tmp_path / "x.html", [report([item(0, clips=["gone.wav"])], tmp_path)], 0)
    browser.open((tmp_path / "x.html").as_uri(), 1400, 900)
    assert browser.run(HEARD) == ["error"]
    assert "cannot be played" in browser.run("document.querySelector('.clips').textContent")


def test_thousands_of_items_open_at_once(browser, tmp_path):
    items = [item(i, score=float(i % 2), question="Which? " * 40) for i in range(5000)]
    judge.write_page(tmp_path / "x.html", [report(items, tmp_path)], 0)
    begun = time.monotonic()
    browser.open((tmp_path / "x.html").as_uri(), 1400, 900)
    shown = browser.run(SHOWN)
    assert time.monotonic() - begun < 10
    assert shown == [f"r{i}" for i in range(25)]
    click = "document.querySelectorAll('nav button')[%d].click();" + SHOWN
    assert browser.run(click % 1) == [f"r{i}" for i in range(25, 50)]
    assert browser.run("location.hash") == "#page=1"
    assert browser.run(choose("verdict", "right"))[:2] == ["r1", "r3"], "from the first page"
    assert browser.run("document.querySelector('nav button').disabled") is True
    assert browser.run("document.querySelector('output').textContent") == (
        "2500 of 5000 items, 1 to 25 shown"
    )
    took = browser.run(
        "(() => { const begun = performance.now(); for (let i = 0; i < 10; i++) filter();"
        "return (performance.now() - begun) / 10; })()"
    )
    assert took < 500, "milliseconds from a key to the items that fit"


def test_several_reports_in_the_browser(browser, sounds):
    old = report([item(i, score=float(i % 2)) for i in range(4)], sounds, name="old")
    new = report([item(i, score=1.0) for i in range(3)], sounds, name="new")
    judge.write_page(sounds / "both.html", [old, new], 0, judge.compared(old, new))
    browser.open((sounds / "both.html").as_uri(), 400, 800)
    assert browser.run("document.documentElement.scrollWidth") <= 400
    assert browser.run(choose("verdict", "differ")) == ["r0", "r2", "r3"]
    assert browser.run(choose("verdict", "wrong")) == ["r0", "r2"]
    assert browser.run(choose("of", "1")) == []
    assert browser.run(choose("verdict", "right")) == ["r0", "r1", "r2"]
    assert browser.run("location.hash") == "#verdict=right&of=1"
    assert browser.complaints() == []


def test_the_browser_test_would_see_what_it_looks_for(browser, tmp_path):
    """A guard that cannot fail guards nothing."""
    bad = "<p>x</p><script>alert = console.error; alert(1); undefined.x</script>"
    (tmp_path / "bad.html").write_text(bad + '<img src="http://127.0.0.1:9/x.png">')
    browser.open((tmp_path / "bad.html").as_uri(), 400, 800)
    assert len(browser.complaints()) >= 2
    assert "http" in browser.asked()
