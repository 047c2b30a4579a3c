"""Judging: what is counted, what is never guessed, and what a report holds."""

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from tests.checkpoints import make_speaking
from tests.faults import forked

import judge
import prepare
from model import find_device
from prepare import score


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


def tallied(rows, said):
    return judge.tally([judge.judged(row, answer) for row, answer in zip(rows, said)])


OWN = [each["answer"] for each in ROWS]


def test_own_answers_are_all_right():
    report = tallied(ROWS, OWN)
    assert report["macro"] == report["weighted"] == 1
    assert list(report["tasks"]) == ["odd", "factual"]
    assert list(report["single"]) == ["tag"]
    assert [item["score"] for item in report["items"]] == [1, 1, 1, 1, 1]


def test_what_is_missing_and_what_cannot_be_read_scores_nothing_and_is_counted():
    told = [None, "perhaps 1, perhaps 2", "audio 2", "no", "rain"]
    report = tallied(ROWS, told)
    odd = report["tasks"]["odd"]
    assert (odd["n"], odd["missing"], odd["unparsed"], odd["score"]) == (3, 1, 1, 1 / 3)
    assert report["macro"] == pytest.approx((1 / 3 + 0) / 2)  # a task weighs as much as a task,
    assert report["weighted"] == pytest.approx(1 / 4)  # an item as much as an item,
    assert report["single"]["tag"]["score"] == 1  # and one clip stands apart
    assert [item["score"] for item in report["items"]] == [None, None, 1, 0, 1]
    assert report["items"][0]["answer"] is None


def test_chance_and_majority():
    odd = tallied(ROWS, ["audio 1"] * 5)["tasks"]["odd"]
    assert odd["chance"] == 1 / 2
    assert odd["majority"] == pytest.approx(2 / 3)  # always "audio 2"
    assert odd["score"] == pytest.approx(1 / 3)


def test_the_best_constant_may_be_a_letter():
    asked = "Which?\n(A) {}\n(B) {}"
    pairs = [("dog", "rain"), ("bell", "wind"), ("cow", "owl")]
    rows = [row(i, "tag", "single", "choice", pair[1], pair[1], clips=["a.wav"],
                question=asked.format(*pair), choices=list(pair)) for i, pair in enumerate(pairs)]
    for each in rows:
        each["gold"]["choices"] = each["choices"]
    found = tallied(rows, ["(A)"] * 3)["single"]["tag"]
    assert (found["majority"], found["score"], found["chance"]) == (1, 0, 1 / 2)  # always (B)


def test_the_table_has_a_line_for_each_task():
    lines = judge.report_lines(tallied(ROWS, OWN))
    assert [line.split()[0] for line in lines[1:]] == ["odd", "factual", "tag", "macro"]
    long = "sound_music_speech (several)"
    lines = judge.report_lines(tallied([*ROWS, row(9, long)], [*OWN, "audio 1"]))
    assert len({len(line) for line in lines[:-1]}) == 1 and lines[3].startswith(f"{long} ")


def test_what_is_the_same_is_computed_once(monkeypatch):
    """The facts of a gold, whatever is held against it; a group that is all of them."""
    texts = [f"a {'red' if i % 2 else 'blue'} dog number {i}" for i in range(60)]
    golds = [{"text": text, "slots": [["dog"], [text]]} for text in texts]
    rows = [row(i, "tell", "captioning", "text", golds[i], texts[i]) for i in range(60)]
    items = [judge.judged(each, "a dog") for each in rows]
    constants = Counter(texts).most_common(judge.CONSTANTS)
    scores = [sum(score(each["gold"], told) for each in rows) for told, _ in constants]
    seen, summary = [], judge.summary
    monkeypatch.setattr(judge, "summary", lambda items: seen.append(len(items)) or summary(items))
    prepare.facts_of.cache_clear()
    judge.worth.cache_clear()
    report = judge.tally(items)
    assert prepare.facts_of.cache_info().misses == 60 and seen == [60]
    assert report["tasks"]["tell"] == report["skills"]["captioning"] == report["clips"]["2"]
    assert report["tasks"]["tell"]["majority"] == pytest.approx(max(scores) / 60)


def test_thoughts_are_in_no_score_of_an_answer():
    text = row(0, "tell", kind="text", value={"text": "a dog in the rain", "slots": [["dog"]]})
    said = row(1, "write", kind="transcript", value="go home")
    told = ["a cat, a bell</think>a dog in the rain", "<think>a</think>go home"]
    found = tallied([text, said], told)["tasks"]
    assert found["tell"]["bleu-4"] == 1 and found["write"]["wer"] == 0
    moved = {**text, "order": [2, 1]}
    assert judge.flips(text, "<think>a cat</think>a dog", moved, "a dog") is False


@pytest.mark.parametrize("value", ["go home", "She said: go home"])
def test_a_word_error_rate_is_of_the_reading_that_is_scored(value):
    assert judge.aside({"type": "transcript", "value": value}, "She said: go home") == {"wer": 0}


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
    return forked("judge.py", *args)


def test_from_weights_and_a_bench_to_a_report(bench):
    out = bench / "reports"
    done = run("--weights", bench / "weights", "--bench", bench / "bench.jsonl", "--out", out)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "weights-bench.json").read_text())
    assert [item["id"] for item in report["items"]] == [f"r{i}" for i in range(6)]
    assert report["items"][5]["answer"] is None  # it was not asked with fewer clips
    assert report["tasks"]["odd"]["missing"] == 1
    assert report["refused"] == 1
    assert "r5" in done.stderr and "broken.wav" in done.stderr
    assert done.stdout.split()[0] == "n"
    fields = {"n", "missing", "unparsed", "score", "low", "high", "chance", "majority"}
    for task in (*report["tasks"].values(), *report["single"].values()):
        assert set(task) == fields
    assert (out / "weights-bench.html").read_text().startswith("<!doctype html>")


def test_the_same_answers_one_by_one(bench):
    """Batches of unequal prompts answer as if each had been asked alone."""
    out = bench / "alone"
    whole = json.loads((bench / "reports" / "weights-bench.json").read_text())
    run("--weights", bench / "weights", "--bench", bench / "bench.jsonl", "--out", out,
        "--items", 1, "--name", "one")  # fmt: skip
    alone = json.loads((out / "one.json").read_text())
    assert len(alone["items"]) == 1
    assert alone["items"][0] in whole["items"]


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
    items = [judge.judged(row, row["answer"]) for row in ROWS]
    for item, value in zip(items, [True, False, None, True, None]):
        item["flips"] = value
    report = judge.tally(items)
    assert report["tasks"]["odd"]["flips"] == 1 / 2
    assert report["tasks"]["factual"]["flips"] == 1
    assert report["single"]["tag"]["flips"] is None
    assert report["flips"] == 3 / 4
    lines = judge.report_lines(report)
    assert lines[0].split()[-1] == "flips"
    assert lines[-1].endswith("flips 0.750")


@pytest.mark.parametrize("view", [[], ["--view", "concat"]])
def test_one_command_gives_all_columns(bench, tmp_path, view):
    words = ["--text-only", "--permute", *view]
    given = ["--weights", bench / "weights", "--bench", bench / "bench.jsonl", "--out", tmp_path]
    done = run(*given, *words)
    assert done.returncode == 0, done.stderr
    name = "-".join(["weights-bench", *view[1:]])  # another view, another report
    report = json.loads((tmp_path / f"{name}.json").read_text())
    several = [item for item in report["items"] if item["skill"] != "single"]
    assert all(type(item["text-only"]) in (int, float) for item in report["items"])
    assert all(item["flips"] in (True, False, None) for item in several)
    assert report["text-only"] <= 1 and 0 <= report["flips"] <= 1
    assert "text-only" in done.stdout and "flips" in done.stdout


# ------------------------------------------------------------------------------------------------
# The tally: intervals, groups, second looks.


def test_an_interval_is_that_of_a_mean():
    dice = np.random.default_rng(1)
    scores = (dice.random(400) < 0.7).astype(float)
    found = judge.interval(judge.drawn_means(scores, np.random.default_rng(0)))
    spread = 1.96 * scores.std() / 400**0.5
    assert found["low"] == pytest.approx(scores.mean() - spread, abs=0.01)
    assert found["high"] == pytest.approx(scores.mean() + spread, abs=0.01)
    same = judge.drawn_means(np.ones(5), np.random.default_rng(0))
    assert judge.interval(same) == {"low": 1, "high": 1}


def test_groups_by_skill_and_by_number_of_clips():
    ten, four = (row(n, clips=["a.wav"] * n, value=3, answer="audio 3") for n in (10, 4))
    rows = [ten, *ROWS, four]
    report = tallied(rows, ["audio 3", *(r["answer"] for r in ROWS), "audio 1"])
    assert [(n, found["n"]) for n, found in report["clips"].items()] == [
        ("2", 4), ("4", 1), ("10", 1),
    ]  # fmt: skip
    assert report["clips"]["4"]["score"] == 0 and report["clips"]["2"]["score"] == 1
    assert {skill: found["n"] for skill, found in report["skills"].items()} == {
        "comparison": 5, "reasoning": 1,
    }  # fmt: skip


ORDERS = [([1, 2, 3], "audio 1, audio 3, audio 2"), ([2, 1, 3], "audio 3, audio 1, audio 2"),
          ([4, 2, 1, 3], "audio 4, audio 2, audio 3, audio 1")]  # fmt: skip


@pytest.mark.parametrize("value, answer", ORDERS)
def test_kendall_is_scipys(value, answer):
    from scipy.stats import kendalltau

    said = [int(n) for n in re.findall(r"\d", answer)]
    places = [[order.index(clip) for clip in value] for order in (value, said)]
    found = judge.aside({"type": "order", "value": value}, answer)
    assert found["kendall"] == pytest.approx(kendalltau(*places).statistic)


def test_second_looks():
    count, span = {"type": "count", "value": 3}, {"clip": 2, "on": 1.0, "off": 3.0}
    assert judge.aside(count, "five") == {"error": 2}
    assert judge.aside({"type": "span", "value": span}, "audio 2, 2 to 4 s")[
        "iou"
    ] == pytest.approx(1 / 3)
    assert judge.aside({"type": "span", "value": span}, "audio 1, 1 to 3 s") == {"iou": 0}
    assert judge.aside({"type": "transcript", "value": "a red cat"}, "a cat") == {
        "wer": pytest.approx(1 / 3)
    }
    assert judge.aside({"type": "transcript", "value": "a red cat"}, None) == {"wer": 1}
    assert judge.aside(count, "perhaps") == {}
    two = [row(i, "transcribe", "single", "transcript", text, text, clips=["a.wav"])
           for i, text in enumerate(["one two three four", "five"])]  # fmt: skip
    report = tallied(two, ["one two three four", "six"])
    assert report["single"]["transcribe"]["wer"] == pytest.approx(1 / 5), "by words, not by clips"


# ------------------------------------------------------------------------------------------------
# Other ways to ask.


class Says:
    """One who answers by a rule, and remembers what was asked."""

    name, how, most = "says", "a test", judge.NEW

    def __init__(self, rule):
        self.rule, self.heard = rule, []

    def answers(self, items):
        for key, messages, clips, layout in items:
            self.heard.append((messages[-1]["content"], [len(clip) for clip in clips], layout))
            yield key, self.rule(messages[-1]["content"], clips)


@pytest.fixture
def asking(bench, tmp_path):
    journals = []

    def made(rule):
        journals.append(judge.Journal(tmp_path / f"asked-{len(journals)}.jsonl"))
        return judge.Asking(Says(rule), bench, journals[-1])

    yield made
    for journal in journals:
        journal.close()


def test_nobody_is_asked_the_same_twice(asking):
    asks = asking(lambda question, clips: "audio 1")
    assert asks.ask(ROWS, "first") == ["audio 1"] * 5
    asks.who.heard.clear()
    assert asks.ask(ROWS, "again") == ["audio 1"] * 5
    assert asks.who.heard == []
    other = {**ROWS[0], "question": "Which other one?"}
    asks.ask([other, {**ROWS[0], "layout": "no-index"}], "others")
    assert len(asks.who.heard) == 2 and asks.who.heard[1][2] == "no-index"


def test_late_fusion_asks_of_descriptions_and_hears_nothing_then(asking):
    def rule(question, clips):
        return f"a clip of {len(clips[0])} samples" if clips else question

    asks = asking(rule)
    said = judge.ask_fused(asks, ROWS[:1])[0]
    assert said.count("a clip of 8000 samples") == 2 and "audio 2" in said
    assert [len(lengths) for _, lengths, _ in asks.who.heard] == [1, 1, 0]


def test_without_a_description_nothing_is_asked_of_the_others(asking, bench):
    rows = [ROWS[0], row(7, clips=["a.wav", "gone.wav"]), row(8, clips=["b.wav", "a.wav"])]
    asks = asking(lambda question, clips: "a clip" if clips else "audio 2")
    assert judge.ask_fused(asks, rows) == ["audio 2", None, "audio 2"]


def test_a_vote_follows_the_clip_and_not_its_place(bench, asking):
    """One who always names the longer clip, wherever it is, and one who always names the first."""
    rows = [row(0, clips=["a.wav", {"path": "b.wav", "start": 0, "end": 0.25}])]
    longer = asking(lambda q, clips: f"audio {1 + (len(clips[1]) > len(clips[0]))}")
    assert judge.ask_voting(longer, rows, 2) == ["audio 1"]
    rows = [row(0, clips=[{"path": "a.wav", "start": 0, "end": 0.25}, "b.wav"])]
    assert judge.ask_voting(longer, rows, 2) == ["audio 2"]
    assert judge.ask_voting(asking(lambda q, clips: "hard to say"), rows, 2) == ["hard to say"]


def test_an_election():
    gold = {"type": "clip", "value": 1}
    assert judge.elect(gold, ["audio 2", "It is audio 1.", "audio 1"]) == "It is audio 1."
    assert judge.elect(gold, ["audio 2", "audio 1"]) == "audio 2", "a tie goes to the first"
    assert judge.elect(gold, ["perhaps", "audio 1"]) == "audio 1"
    assert judge.elect(gold, []) is None


def test_other_clips_are_those_of_the_next_row():
    rows = [row(0), row(1, clips=["c.wav", "d.wav"]), row(2, clips=["e.wav"], skill="single")]
    assert [r["clips"] for r in judge.in_view(rows, "shuffle-audio")] == [
        ["c.wav", "d.wav"], ["e.wav", "e.wav"], ["a.wav"],
    ]  # fmt: skip


def test_literal_and_remapped_orders():
    said = row(0, clips=["a.wav", "b.wav", "c.wav"], value=2, question="Is it audio 2?")
    remapped, literal = judge.permuted(said, False), judge.permuted(said, True)
    assert remapped["clips"] == literal["clips"] != said["clips"]
    assert (literal["question"], literal["gold"]) == (said["question"], said["gold"])
    assert remapped["clips"][remapped["gold"]["value"] - 1] == "b.wav"
    assert judge.permuted(ROWS[4], False) is None
    assert judge.names_index(said)
    same = row(1, kind="yesno", value="yes", answer="yes", question="Are both the same?")
    assert not judge.names_index(same)
    assert judge.flips(said, "audio 2", literal, "audio 2", literal=True) is False


def test_an_index_in_a_turn_is_an_index():
    for text, names in (("Is clip 2 louder?", True), ("Is either loud?", False)):
        turns = [{"role": "user", "content": f"<sound-1> <sound-2> {text}"}]
        one = {**row(0, kind="yesno", value="yes"), "messages": turns}
        del one["question"], one["answer"]
        assert judge.names_index(one) is names


def test_a_marker_that_the_model_once_said_is_text():
    seen = []
    server = object.__new__(judge.Server)
    say = lambda told, *_: seen.append(told) or {"finish": "stop", "content": "x"}
    server.service, server.most = SimpleNamespace(say=say), judge.NEW
    turns = [{"role": "user", "content": "<sound-1> What is it?"},
             {"role": "assistant", "content": "I mean <sound-9>."},
             {"role": "user", "content": "Say it again."}]  # fmt: skip
    assert server.answer((0, turns, [np.zeros(1600, np.float32)], "polyaudio")) == "x"
    assert seen[0][1]["content"] == [{"type": "text", "text": "I mean <sound-9>."}]
    assert [part["type"] for part in seen[0][0]["content"]].count("input_audio") == 1


def test_likelihoods_are_of_the_rows_as_they_are():
    args = SimpleNamespace(mode="official", bench="compa-order", llm=[], embeddings=None,
                           spice=None, weights="w", view=None, vote=0, late_fusion=False)
    judge.check_mode(args, judge.BENCHES["compa-order"], [])
    for change in ({"view": "text-only"}, {"vote": 3}, {"late_fusion": True}):
        with pytest.raises(judge.BadInput, match="the clips and captions as they are"):
            judge.check_mode(SimpleNamespace(**{**vars(args), **change}),
                             judge.BENCHES["compa-order"], [])  # fmt: skip


def test_who_would_not_be_asked_is_refused():
    """A second model that the published rule has no use for would cost, and mark nothing."""
    plain = SimpleNamespace(mode="official", bench="mmau", llm=[], embeddings=None, spice=None,
                            weights="w", view=None, vote=0, late_fusion=False)  # fmt: skip
    for bench, more, complaint in (
        ("mmau", {"llm": ["w"]}, "--llm: expected a published rule that asks one, found mmau"),
        ("mmar", {"embeddings": "w"}, "--embeddings: expected a published rule that asks one"),
        ("mmau", {"spice": "x.jar"}, "--spice: expected --bench adiff, found mmau"),
        ("mae", {"llm": ["a", "b"]}, "expected one --llm, found 2"),
    ):
        args = SimpleNamespace(**{**vars(plain), "bench": bench, **more})
        with pytest.raises(judge.BadInput, match=re.escape(complaint)):
            judge.check_mode(args, judge.BENCHES[bench], [])
    for bench, more in (("mae", {"llm": ["a"]}), ("jasco", {"llm": ["a", "b"]}),
                        ("adiff", {"spice": "x"})):  # fmt: skip
        args = SimpleNamespace(**{**vars(plain), "bench": bench, **more})
        judge.check_mode(args, judge.BENCHES[bench], [])


def test_a_bench_names_no_clip_outside_its_folder(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "secret.wav").write_bytes(b"")
    with pytest.raises(judge.BadInput, match="expected a file under"):
        judge.clip_at(data, data / "rows.json", "../secret.wav")


def test_of_two_files_of_a_name_none_is_taken(tmp_path):
    for name in ("one/a.wav", "two/a.wav", "two/b.wav", "two/b.flac", "c.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("two")
    at = partial(judge.clip_at, tmp_path, tmp_path / "one" / "rows.csv")
    assert at("a.wav") == "one/a.wav"  # beside the rows
    assert at("b.wav") in ("link/b.flac", "two/b.flac")  # one folder, by two names
    assert at("d.wav", "c.wav") == "c.wav" and at("d.wav") == "d.wav"
    far = partial(judge.clip_at, tmp_path, tmp_path / "rows.csv")
    with pytest.raises(judge.BadInput, match="one file of its name, found .*/a.wav and .*/a.wav"):
        far("a.wav")
    assert far("a.wav", kind="one") == "one/a.wav"
    assert far("a.wav", beside=True) == "a.wav"  # which is not there


def test_odd_rows_of_a_bench_are_refused():
    asked = {"audio1": "a", "audio2": "b", "question": "q", "labels": 5}
    with pytest.raises(judge.BadInput, match="labels, reference"):
        judge.mae_row(asked, 1, Path(f"{next(iter(judge.MAE))}.json"), None)


def test_each_process_has_its_gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the name of the GPU is known from an error only where there is none")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(judge.BadInput, match="--device cuda:3"):
        find_device("cuda")


def test_a_strange_clip_is_another_one():
    rows = [{**row(i), "clips": clips} for i, clips in enumerate((["a"], ["a"], ["b"]))]
    assert [r["clips"] for r in judge.in_view(rows, "shuffle-audio")] == [["b"], ["b"], ["a"]]
    with pytest.raises(judge.BadInput, match="a bench with other clips"):
        judge.in_view(rows[:2], "shuffle-audio")


def test_shuffled_options_are_the_same_question():
    choices = ["dog", "dog bark", "cat"]
    asked = "What is heard?\n(A) dog\n(B) dog bark\n(C) cat"
    gold = {"type": "choice", "value": "cat", "choices": choices}
    one = {**row(0, kind="choice", value="cat", answer="cat"), "gold": gold, "choices": choices}
    twice = {**one, "question": f"Is it a dog? {asked}"}
    assert judge.options_shuffled(twice) is None, "dog is named twice"
    moved = judge.options_shuffled({**one, "question": asked})
    lines = moved["question"].splitlines()
    assert [line[4:] for line in lines[1:]] == moved["choices"] != choices, "one may hold another"
    assert sorted(moved["choices"]) == sorted(choices)
    assert [line[:4] for line in lines[1:]] == ["(A) ", "(B) ", "(C) "]
    letter = "ABC"[moved["choices"].index("cat")]
    assert judge.score(moved["gold"], letter) == 1
    assert judge.flips(one, "(C)", moved, f"({letter})") is False, "cat, by its letter"
    assert judge.flips(one, "(C)", moved, "(C)") is True, "the letter stays, the option does not"
    assert judge.options_shuffled(ROWS[0]) is None


# ------------------------------------------------------------------------------------------------
# Answers from a file.


def test_answers_from_a_file(bench, tmp_path):
    told = [{"id": "r0", "answer": "audio 1"}, {"id": "r1", "answer": "audio 1"},
            {"id": "r3", "answer": "perhaps"}, {"id": "r4", "note": "no answer"}]  # fmt: skip
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(each) + "\n" for each in told))
    done = run(
        "--answers", tmp_path / "mine.jsonl", "--bench", bench / "bench.jsonl", "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "mine-bench.json").read_text())
    assert [item["score"] for item in report["items"]] == [1, 0, None, None, None, None]
    assert report["tasks"]["odd"]["missing"] == 2 and report["tasks"]["factual"]["unparsed"] == 1
    again = run(
        "--answers",
        tmp_path / "mine.jsonl",
        "--bench",
        bench / "bench.jsonl",
        "--out",
        tmp_path,
        "--text-only",
    )
    assert again.returncode == 2 and "--text-only" in again.stderr


def test_predictions_beside_the_golds_of_a_bench(tmp_path):
    """Where rows hold the bench's `answer` too, it is nobody's prediction, said or not."""
    for name in ("prediction", "pred", "model_output", "model_prediction", "answer_prediction"):
        rows = [{"id": "a", "answer": "dog", name: "cat"}, {"id": "b", "answer": "rain"}]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(rows))
        assert judge.Written(path).said == {"a": "cat", "b": None}


def test_the_benchs_own_answers_are_nobodys(tmp_path):
    """Beside the bench's own fields, `answer` is the gold, whatever else a tool has called its."""
    rows = [{"id": 7, "question": "What?", "choices": ["dog", "cat"], "answer": "dog"}]
    rows[0]["response"] = "cat"
    path = tmp_path / "told.json"
    path.write_text(json.dumps(rows))
    found = "found id, question, choices, answer, response"
    with pytest.raises(judge.BadInput, match=f"answer_prediction, or --answer-field NAME, {found}"):
        judge.Written(path)
    assert judge.Written(path, "response").said == {"7": "cat"}, "an id may be a number"
    assert judge.Written(path, "answer").said == {"7": "dog"}
    with pytest.raises(judge.BadInput, match="answers named reply"):
        judge.Written(path, "reply")
    path.write_text(json.dumps([*rows, {"id": "7", "response": "dog"}]))
    with pytest.raises(judge.BadInput, match="row 2: expected each id once"):
        judge.Written(path, "response")


NO_ANSWERS = ['{"id": "r0", "answer": 3}', '{"answer": "audio 1"}', '["r0"]',
              '{"id": "r0", "answer": "x"}\n{"id": "r0", "answer": "y"}']  # fmt: skip


@pytest.mark.parametrize("line", NO_ANSWERS)
def test_answers_that_are_none(bench, tmp_path, line):
    (tmp_path / "mine.jsonl").write_text(line + "\n")
    done = run(
        "--answers", tmp_path / "mine.jsonl", "--bench", bench / "bench.jsonl", "--out", tmp_path
    )
    assert done.returncode == 2 and "mine.jsonl: row" in done.stderr
    assert done.stderr.count("\n") == 1 + done.stderr.count("warning:")
