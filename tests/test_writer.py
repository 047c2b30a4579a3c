"""The second writer: a language model that is asked for questions, and never believed.

The model is a server in this file. By default it answers every prompt well, from what the prompt
told it; each test makes it lie, stammer or fall silent in one way, and looks at what came out."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests.conftest import ROOT
from tests.faults import forked

import prepare
import synth
from prepare import BadInput, read_rows, score, words
from synth import FORMANT, Brief, Writer

KEY = "sk-very-secret-5up3r"
REASONING = "I must not be read."


# ------------------------------------------------------------------------------------------------
# A model that does well.


def good_rephrase(data):
    return {"answer": f"After listening, the answer is {data['right answer']}."}


def good_factual(data):
    thing = data["let it be about"][0]
    people = "aunt uncle cousin niece nephew".split()
    clips = [
        {"support": True, "style": "calm", "text": f"my {who} says the {thing} is quite new"}
        for who in people[: data["K"]]
    ]
    if data["label"] == "No":
        text = "nobody here has ever seen anything of the sort"
        clips[-1] = {"support": False, "style": "dry", "text": text}
    reason = "Some speaker says otherwise." if data["label"] == "No" else "All of them say so."
    return {
        "claim": f"The {thing} is new.",
        "label": data["label"],
        "clips": clips,
        "rationale": reason,
    }


def good_keywords(data):
    rest = "old men slowly|red hens never|tall girls often|cold nights always|big dogs gladly"
    shared = " with the ".join(data["keywords"])
    told = [line.split() for line in rest.split("|")[: data["n"]]]
    return {"sentences": [f"the {a} {b} are {c} at the {shared}" for a, b, c in told]}


def good_ordering(data):
    order = [2, 0, 1]
    events = []
    for k in order:
        said = [w for w in words(data["parts"][k]["heard"]) if not synth.PLACE_WORDS.search(w)]
        events.append({"part": k + 1, "description": f"it is about {' '.join(said)}"})
    options = {"A": "1, 2, 3", "B": "2, 3, 1", "C": "3, 1, 2", "D": "1, 3, 2"}
    question = "In which order do these things happen?"
    return {
        "events": events,
        "question": question,
        "answer_options": options,
        "correct_answer": "B",
    }


def good_rationale(data):
    return {"rationale": "One thing leads to another here. The words show it plainly enough."}


def good_dialogue(data):
    picked = []
    for turn in data["turns"][:2]:
        word = synth.content(turn["says"])[-1]
        picked.append({"clip": turn["clip"], "quote": word})
    return {
        "answer": f"They talk of the {picked[0]['quote']} because of the {picked[1]['quote']}.",
        "quotes": picked,
    }


def good_entailment(data):
    things, names = data["let it be about"], data["speakers"]
    clips = []
    for k in range(data["K"]):
        day = "Monday" if k else "Friday"
        clips.append({
            "clip_id": f"A{k + 1}", "speaker": names[k % len(names)],
            "instructions": "Voice: low\n\nTone: warm\n\nPunctuation: clear\n\nDelivery: slow",
            "transcript": f"We number {k + 3} people here. The {things[k % 3]} will be there on "
            f"{day}, and I am told that nobody has to pay for it.",
        })  # fmt: skip
    asked = [
        ("Is anything there on Monday?", "Yes, one speaker says Monday.", ["A2"], "on Monday"),
        ("Is all of it on Friday?", "No, some of it is on Monday.", ["A1", "A2"], "on Monday"),
        ("Is it far away?", "Not enough information, nobody tells.", ["A1", "A2"], "there"),
        ("Is it free?", "Yes, nobody has to pay.", ["A1", "A2"], "nobody has to pay"),
        ("Does it cost a lot?", "No, nobody has to pay.", ["A1"], "nobody has to pay"),
    ]
    qa = []
    for k, (question, answer, uses, quote) in enumerate(asked):
        quotes = [{"clip_id": uses[-1], "quote": quote}]
        qa.append({"qid": f"Q{k}", "question": question, "answer": answer, "uses": uses,
                   "evidence_quotes": quotes})  # fmt: skip
    return {"scenario": data["topic"], "clips": clips, "qa": qa}


def good_temporal(data):
    told = []
    for clip in data["clips"][:2]:
        sound = clip["sounds"][0]
        when = " and ".join(sound["seconds"])
        told.append(f"Audio {clip['audio']}: the {sound['label']} {sound['times']} times, {when} s")
    question = "How often and when are sounds heard in audio 1 and audio 2?"
    return {"question": [question] * 2, "answer": ["; ".join(told) + "."] * 2}


def good_difference(data):
    """A sound that one clip has and another one lacks."""
    held = {c["audio"]: [sound["label"] for sound in c["sounds"]] for c in data["clips"]}
    told = [(i, a, j) for i in held for a in held[i] for j in held if a not in held[j]]
    i, a, j = told[0]
    answer = f"Audio {i} has the sound of {a}, whereas audio {j} contains {held[j][0]}."
    return {"question": [f"How do audio {i} and audio {j} differ?"], "answer": [answer]}


def good_music(data):
    question = "How do the pieces differ in tempo and in what plays?"
    pieces = [
        f"audio {c['audio']} is {c['instrument']} music at {c['tempo']} bpm" for c in data["clips"]
    ]
    answer = f"{', '.join(pieces)}.".capitalize()
    return {"question": [question], "answer": [answer]}


def good_edit(data):
    said, edit = data["sentence"].split(), data["edit"].partition(":")[0]
    word = synth.content(data["sentence"])[-1]
    place = said.index(word)
    if edit == "add":
        return {"sentence": f"{data['sentence']} quickly", "difference": "Audio 2 adds quickly."}
    if edit == "delete":
        left = " ".join(said[:place] + said[place + 1 :])
        return {"sentence": left, "difference": f"Only audio 1 says {word}."}
    if edit == "modify":
        other = " ".join([*said[:place], "lantern", *said[place + 1 :]])
        told = f"Audio 1 says {word}, whereas audio 2 says lantern."
        return {"sentence": other, "difference": told}
    told = "Both have the same words in another order."
    return {"sentence": " ".join(said[1:] + said[:1]), "difference": told}


def good_scene(data):
    return {
        "sentence": "hold the cloth a bit higher",
        "doing": "they are polishing a trophy",
        "keywords": ["polishing", "polish"],
        "by_sound": "they are out of doors",
        "by_speech": "they are hanging up laundry",
    }


def good_infer(data):
    return {"answer": "yes"}


def good_guess(data):
    """What it invented, or what the table has for that sentence."""
    told = {scene.sentence: scene.doing for scene in synth.SCENES}
    return {"doing": told.get(data["sentence"], "I think they are polishing things.")}


def good_alone(data):
    return {"doing": "They may be doing anything at all."}


GOOD = {name: globals()[f"good_{name}"] for name in synth.PROMPTS}


class Model(BaseHTTPRequestHandler):
    """A chat server: `say(name, data, body)` gives the content, or (status, headers, bytes)."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.keys.add(self.headers.get("Authorization"))
        said = self.said(body)
        if said is None:  # hang up in the middle
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n{")
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        status, headers, reply = said if isinstance(said, tuple) else (200, {}, reply_of(said))
        self.send_response(status)
        for field, value in {"Content-Length": str(len(reply)), **headers}.items():
            self.send_header(field, value)
        self.end_headers()
        self.wfile.write(reply)

    def said(self, body):
        system, user = (message["content"] for message in body["messages"][:2])
        name = next(n for n, text in synth.PROMPTS.items() if system.startswith(text))
        return self.server.say(name, json.loads(user), body)

    def log_message(self, *_):
        pass


def reply_of(content, finish="stop") -> bytes:
    text = json.dumps(content) if isinstance(content, dict) else content
    message = {"role": "assistant", "content": text, "reasoning_content": REASONING}
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


def refusal(status, message, **headers):
    return status, headers, json.dumps({"error": {"message": message}}).encode()


def do_well(name, data, body):
    return GOOD[name](data)


class Server(ThreadingHTTPServer):
    def handle_error(self, request, address):
        """A client that is killed hangs up, as it should."""


@contextmanager
def serving(handler, say):
    server = Server(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.asked, server.keys, server.lock, server.say = [], set(), threading.Lock(), say
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(prepare, "PAUSE", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(Model, do_well) as server:
        yield server


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    synth.make_world(folder, 2100, 5)
    return folder / "corpus.jsonl"


@pytest.fixture
def written(model, corpus, tmp_path):
    """write(count) -> (items, outcomes by prompt, the writer) of one run in this process."""

    def write(count, split="train", out=tmp_path / "out", threads=4, recipe="polyaudio", **more):
        out.mkdir(exist_ok=True)
        writer = Writer(model.url, "m", out / "llm.jsonl", threads, **more)
        kept = []
        writer.report = lambda: kept.append({k: +v for k, v in writer.outcomes.items()})
        settings = {
            "seed": 3, "clips": 5, "mix": synth.RECIPES[recipe].mix, "single": 0.1,
            "tasks": synth.RECIPES[recipe].tasks, "corpus": [str(corpus)], "split": split,
            "sentences": None,
            "first": 0, "last": count,
        }  # fmt: skip
        name = {"train": "train", "test": "bench"}[split]
        synth.write_questions(out / f"{name}.jsonl", settings, 1, writer)
        writer.journal.close()
        return list(read_rows(out / f"{name}.jsonl")), kept[0], writer

    return write


def words_for(model, corpus, out, *flags, count=20):
    llm = ["--llm", model.url, "--model", "m", "--corpus", str(corpus), "--out", str(out)]
    return [*llm, "--train", str(count), "--bench", "0", "--seed", "3", *flags]


def command(*args, **more):
    return [sys.executable, str(ROOT / "synth.py"), *words_for(*args, **more)]


def run(*args, **more):
    return forked("synth.py", *words_for(*args, **more))


def prompts_of(items) -> Counter:
    """Which prompts wrote these, but for those that rules wrote."""
    kinds = Counter(item["meta"]["kind"] for item in items)
    return Counter({k.removeprefix("llm-"): n for k, n in kinds.items() if k.startswith("llm-")})


# ------------------------------------------------------------------------------------------------
# All is well.


CHECKS = {"infer", "guess", "alone"}  # on a scene, and counted under it


@pytest.mark.long
def test_every_prompt_yields_items(written, model, tmp_path):
    prompts, counted = set(), set()
    for recipe, count in (("polyaudio", 160), ("mallm", 30), ("jasco", 20)):
        items, outcomes, _ = written(count, out=tmp_path / recipe, recipe=recipe)
        assert len(items) == count
        prompts |= set(prompts_of(items))
        counted |= outcomes.keys()
        for name, counts in outcomes.items():
            assert counts["accepted"] == counts.total() > 0, (name, counts)
        for item in items:
            assert score(item["gold"], item["answer"]) == 1
            by_model = prompts_of([item]) or "After listening" in item["answer"]
            assert item["meta"].get("model") == ("m" if by_model else None)
    assert prompts == set(synth.ASKS) and counted == synth.PROMPTS.keys() - CHECKS
    assert {f"Bearer {KEY}"} == model.keys


@pytest.mark.long
def test_an_item_is_what_rules_would_have_asked_for(written, corpus, tmp_path):
    """Its task and its number of clips follow from (seed, i), whoever writes."""
    items, *_ = written(80)
    out = tmp_path / "rules"
    out.mkdir()
    settings = {
        "seed": 3, "clips": 5, "mix": synth.MIX, "single": 0.1, "sentences": None,
        "tasks": synth.RECIPES["polyaudio"].tasks, "corpus": [str(corpus)], "split": "train",
        "first": 0, "last": 80,
    }  # fmt: skip
    synth.write_questions(out / "train.jsonl", settings, 1)
    rules = {row["id"]: row for row in read_rows(out / "train.jsonl")}
    both = [(item, rules[item["id"]]) for item in items if item["id"] in rules]
    assert len(both) > 70
    for item, rule in both:
        assert (item["task"], len(item["clips"])) == (rule["task"], len(rule["clips"]))


@pytest.mark.long
def test_scripts_are_spoken_by_voices_of_the_split(written, tmp_path):
    for split in ("train", "test"):
        items, *_ = written(60, split, tmp_path / split)
        made = [item for item in items if "made" in item["meta"]]
        assert {"factual", "keywords", "entailment"} <= set(prompts_of(made))
        for item in made:
            assert item["licences"] == ["CC0-1.0"]
            said = [e["says"] for e in item["meta"]["evidence"]]
            assert said == [f'"{script["text"]}"' for script in item["meta"]["made"]]
            assert all(s["speaker"].startswith(split) for s in item["meta"]["made"])


@pytest.mark.long
def test_what_was_said_in_another_split_is_not_said_again(written):
    """This model makes up the same scripts for every split."""
    train, *_ = written(60)
    said = {script["text"] for item in train for script in item["meta"].get("made", ())}
    test, outcomes, _ = written(120, "test")
    again = {script["text"] for item in test for script in item["meta"].get("made", ())}
    assert said and not said & again
    assert outcomes["keywords"]["script"] + outcomes["factual"]["script"] > 3


@pytest.mark.long
def test_verdicts_are_balanced(written):
    items, *_ = written(160)
    told = Counter(
        (item["task"], item["gold"]["value"])
        for item in items
        if set(prompts_of([item])) & {"factual", "entailment"}
    )
    assert {v for task, v in told if task == "factual"} == {"yes", "no"}
    assert {v for task, v in told if task == "entailment"} == {"yes", "no", "nei"}


@pytest.mark.long
def test_options_and_events_move(written):
    """The model always puts the right order in B, and the same numbers there."""
    items, *_ = written(300)
    ordered = [item for item in items if prompts_of([item])["ordering"]]
    letters = {item["choices"].index(item["gold"]["value"]) for item in ordered}
    assert len(letters) > 2
    assert len({item["gold"]["value"] for item in ordered}) > 2


@pytest.mark.long
def test_scripts_move(written):
    """The model always contradicts in its last script; the item does so anywhere."""
    items, *_ = written(400)
    made = [item["meta"]["made"] for item in items if prompts_of([item])["factual"]]
    odd = [[s["text"].startswith("nobody") for s in scripts] for scripts in made]
    assert len({flags.index(True) for flags in odd if any(flags)}) > 1
    assert {flags[-1] for flags in odd if any(flags)} == {True, False}


def test_seeds_are_the_items_own(written, model):
    written(40)
    seeds = Counter(body["seed"] for body in model.asked)
    assert all(body["temperature"] > 0 for body in model.asked)
    assert len(seeds) > 25 and max(seeds.values()) <= 2  # an order and its reason share theirs


# ------------------------------------------------------------------------------------------------
# Replies in all shapes.

SHAPES = {
    "fenced": lambda text: f"```json\n{text}\n```",
    "prose": lambda text: f"Sure! Here is what {{you}} wanted:\n{text}\nAnything else? {{}}",
    "thoughts": lambda text: f'<think>{{"answer": "a draft"}}</think>{text}',
    "half a thought": lambda text: f'{{"answer": "a draft"}}</think>\n{text}',
}


@pytest.mark.parametrize("shape", SHAPES)
def test_json_is_found_in(shape, written, model):
    model.say = lambda name, data, body: SHAPES[shape](json.dumps(GOOD[name](data)))
    items, outcomes, writer = written(25)
    assert all(counts["accepted"] == counts.total() for counts in outcomes.values())
    assert writer.journal.new["replies"] == sum(counts.total() for counts in outcomes.values())


@pytest.mark.parametrize("said", [None, "", "I cannot do that.", "<think>{}", "{" * 5000, "[]"])
def test_no_reply_is_asked_for_once_more(said, written, model):
    def say(name, data, body):
        return 200, {}, reply_of(said) if said is not None else reply_of_null()

    model.say = say
    items, outcomes, writer = written(25)
    lost = outcomes["factual"]
    assert set(lost) <= {"empty", "JSON"} and lost.total() > 0
    assert not prompts_of(items)
    asked = sum(counts.total() for counts in outcomes.values())
    assert writer.journal.new["replies"] == 2 * asked
    again = [body for body in model.asked if len(body["messages"]) > 2]
    assert len(again) == asked
    assert all("cannot be used" in body["messages"][-1]["content"] for body in again)


def reply_of_null():
    choice = {"message": {"content": None, "reasoning_content": REASONING}, "finish_reason": "stop"}
    return json.dumps({"choices": [choice]}).encode()


def test_what_was_cut_off_gets_room(written, model):
    def say(name, data, body):
        text = json.dumps(GOOD[name](data))
        if body["max_tokens"] == synth.MOST:
            return 200, {}, reply_of(text[: len(text) // 2], "length")
        return text

    model.say = say
    _, outcomes, _ = written(25)
    assert all(counts["accepted"] == counts.total() for counts in outcomes.values())
    sizes = Counter(body["max_tokens"] for body in model.asked)
    assert sizes[synth.MOST] == sizes[2 * synth.MOST]


def test_what_is_always_cut_off_is_dropped(written, model):
    model.say = lambda *_: (200, {}, reply_of('{"answer": "', "length"))
    _, outcomes, _ = written(25)
    assert set(outcomes["factual"]) == {"cut off"}
    assert set(outcomes["rephrase"]) == {"kept, cut off"}
    assert max(len(body["messages"]) for body in model.asked) == 2


# ------------------------------------------------------------------------------------------------
# Lies. Each is told instead of a good reply, always; the check that it meets has a name.


def lie(name, change):
    def say(asked, data, body):
        reply = GOOD[asked](data)
        if asked == name:
            reply = json.loads(json.dumps(reply))
            change(reply, data)
        return reply

    return say


def put(*path):
    """Write the last of the path where the others lead."""

    def change(reply, _):
        *way, last, value = path
        for step in way:
            reply = reply[step]
        reply[last] = value

    return change


def drop_last(field):
    return lambda reply, _: reply[field].pop()


def another_label(reply, data):
    reply["label"] = "Yes" if reply["label"] == "No" else "No"


def wrong_support(reply, _):
    for clip in reply["clips"]:
        clip["support"] = reply["label"] == "No"


def share_one_more(reply, _):
    reply["sentences"] = [f"{text} with bread" for text in reply["sentences"]]


def true_order(reply, _):
    reply["events"].sort(key=lambda event: event["part"])


def same_verdicts(reply, _):
    for qa in reply["qa"]:
        qa["answer"] = "Maybe, who knows."


def numbers_up(reply, _):
    reply["answer"] = [re.sub(r"\.\d", ".98", text) for text in reply["answer"]]


LIES = [
    ("factual", "label", another_label),
    ("factual", "label", wrong_support),
    ("factual", "shape", drop_last("clips")),
    ("factual", "length", put("claim", "word " * 21)),
    ("factual", "length", put("clips", 0, "text", "far too short")),
    ("factual", "length", put("rationale", "because " * 26)),
    ("factual", "script", put("clips", 0, "text", "это слова на другом языке и всё")),
    ("factual", "reference", put("rationale", "The second clip says otherwise.")),
    ("factual", "marker", put("claim", "The hammer of <sound-1> is new.")),
    ("factual", "JSON", put("label", "yes")),
    ("keywords", "keywords", share_one_more),
    ("keywords", "keywords", put("sentences", 0, "the old men slowly took a thing on friday")),
    ("keywords", "shape", drop_last("sentences")),
    ("ordering", "options", put("correct_answer", "C")),
    ("ordering", "options", put("answer_options", "D", "2, 3, 1")),
    ("ordering", "options", put("answer_options", "D", "2, 2, 1")),
    ("ordering", "options", put("answer_options", "D", "second, first, third")),
    ("ordering", "events", true_order),
    ("ordering", "events", put("events", 0, "part", 1)),
    ("ordering", "hint", put("events", 0, "description", "finally it is about the dog")),
    ("ordering", "question", put("question", "Is it 1 before 2 or not?")),
    ("dialogue", "quote", put("quotes", 0, "quote", "unheard of")),
    ("dialogue", "quote", put("quotes", 0, "clip", 9)),
    ("dialogue", "quote", put("answer", "They talk about nothing at all.")),
    ("dialogue", "length", put("answer", "One. Two is more. Three is too many by far.")),
    ("entailment", "quote", put("qa", 0, "evidence_quotes", 0, "quote", "on Tuesday")),
    ("entailment", "answer", same_verdicts),
    ("entailment", "speaker", put("clips", 0, "speaker", "bob")),
    ("entailment", "uses", put("qa", 0, "uses", ["A9"])),
    ("entailment", "instructions", put("clips", 0, "instructions", "Tone: warm")),
    ("entailment", "shape", lambda reply, _: reply.update(qa=reply["qa"][:4])),
    ("entailment", "reference", put("qa", 0, "question", "Is it as A2 says, on Monday?")),
    ("entailment", "question", put("qa", 1, "question", "Is anything there on Monday?")),
    ("temporal", "lists", drop_last("answer")),
    ("temporal", "numbers", numbers_up),
    ("temporal", "length", put("answer", ["Well."] * 2)),
    ("difference", "lists", drop_last("question")),
    ("difference", "words", put("answer", ["Audio 1 has a helicopter, and audio 2 has a choir."])),
    ("difference", "reference", put("answer", ["The one is different while audio 1 is a clip."])),
    ("music", "leak", put("question", ["Which piece plays at 120 beats?"])),
    ("music", "question", put("question", ["Which tempo? And which instrument?"])),
    ("music", "words", put("answer", ["Audio 1 is banjo music in minor and audio 2 is guitar."])),
    ("edit", "edit", lambda reply, data: reply.update(sentence=data["sentence"])),
    ("edit", "edit", lambda reply, data: reply.update(sentence=f"{data['sentence']} a b c d e")),
    ("edit", "script", put("sentence", "это слова на другом языке")),
    ("edit", "JSON", put("sentence", 3)),
    ("edit", "difference", put("difference", "The second one is not the first one.")),
    ("edit", "difference", put("difference", None)),
    ("edit", "reference", put("difference", "Audio 3 is the one that differs.")),
    ("edit", "length", put("difference", "word " * 26)),
    ("scene", "keywords", put("sentence", "hold the polish a bit higher")),
    ("scene", "keywords", put("by_sound", "they are polishing a car")),
    ("scene", "keywords", put("by_speech", "they polish a car")),
    ("scene", "keywords", put("doing", "they are at work in there")),
    ("scene", "keywords", put("keywords", [])),
    ("scene", "keywords", put("keywords", ["they are"])),
    ("scene", "length", put("sentence", "hold it")),
    ("scene", "length", put("doing", "polishing " * 13)),
    ("scene", "script", put("sentence", "the wool is very thick this year")),
    ("scene", "reference", put("doing", "they are polishing audio 2")),
    ("music", "numbers", put("answer", ["Audio 1 has 2222 beats and audio 2 has 3333 of them."])),
]  # fmt: skip


@pytest.fixture(scope="module")
def asked_of(corpus):
    """faults(name, change) -> the complaints at replies with that lie, one for each brief."""
    settings = {"corpus": [str(corpus)], "split": "train", "sentences": None}
    shelf, _ = synth.open_shelf(settings, corpus.parent)
    shelf.elsewhere = set()

    def faults(name, change, tries=6):
        tell, check, _ = synth.ASKS[name]
        found = []
        for i in range(tries):
            dice = synth.Dice("train", 9, i)
            n = 2 if name == "dialogue" else 3
            brief = synth.material(shelf, dice, tell, n)
            reply = json.loads(json.dumps(GOOD[name](brief.data)))
            change(reply, brief.data)
            text = json.dumps(reply)
            value = synth.find_object(text, synth.REPLIES[name])
            if value is None:
                found.append("JSON: none")
            elif synth.marked(value):
                found.append("marker: one")
            else:
                found.append(next(filter(None, check(brief, value)), None))
        return found

    return faults


@pytest.mark.parametrize(
    "name,kind,change", LIES, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_lie_is_found_out(name, kind, change, asked_of):
    assert set(asked_of(name, lambda *_: None)) == {None}
    found = [complaint and complaint.partition(":")[0] for complaint in asked_of(name, change)]
    assert set(found) <= {kind, None} and kind in found
    if name not in ("temporal",):  # where a change may leave some clip's numbers as they are
        assert set(found) == {kind}


# ------------------------------------------------------------------------------------------------
# What can be looked up is looked up.


def sounding(captions, *events):
    labels = list(dict.fromkeys(event[0] for event in events))
    return {"corpus": "c", "labels": labels, "captions": [captions], "events": list(events)}


def playing(tempo, key, mode, instrument, energy, **more):
    music = {"tempo": tempo, "key": key, "mode": mode, "instrument": instrument, "energy": energy}
    return {"corpus": "c", "music": {**music, "dynamics": "steady", **more}}


SOUNDS = [
    sounding("a dog barks twice while rain falls", ["rain", 0.2, 2.0], ["dog bark", 0.5, 0.8],
             ["dog bark", 1.0, 1.4]),
    sounding("a dog barks three times", ["dog bark", 0.3, 0.5], ["dog bark", 1.1, 1.3],
             ["dog bark", 1.6, 1.8]),
    sounding("a siren wails", ["siren", 0.35, 1.9]),
]  # fmt: skip
PIECES = [
    playing(80.4, "F", "minor", "violin", 0.3, artist="Cheryl"),
    playing(150.2, "C", "major", "piano", 0.912),
    playing(120.0, "C#", "major", "flute", 0.5),
]
OFTEN = "How often is the dog bark heard in audio 1 and in the second clip?"
WHEN = "When are the sounds heard in audio 1 and audio 3?"
DIFFER = "How do audio 1 and audio 3 differ?"
PLAYS = "What plays in audio 1 and in audio 2?"
PAIRS = [
    ("temporal", OFTEN, "Audio 1 has the dog bark twice, audio 2 has it three times.", None),
    ("temporal", OFTEN, "The first clip has it twice, and the second clip has it 3 times.", None),
    ("temporal", OFTEN, "Audio 1 has the dog bark twice, audio 2 has it twice.", "numbers"),
    ("temporal", OFTEN, "Audio 1 has rain twice, audio 2 has the dog bark 3 times.", "numbers"),
    ("temporal", OFTEN, "Audio 1 has the dog bark twice.", "reference"),
    ("temporal", OFTEN, "Audio 1 has two, one less than audio 2 has.", "words"),
    ("temporal", OFTEN, "Twice in audio 1, three times in audio 2.", "numbers"),
    ("temporal", OFTEN, "The dog bark is twice in audio 1, three times in audio 2.", "words"),
    ("temporal", OFTEN, "Audio 1 has the dog bark, audio 3 has the siren.", "numbers"),
    ("temporal", WHEN, "Audio 1 has rain from 0.2 to 2.0 s, audio 3 the siren at 0.35 s.", None),
    ("temporal", WHEN, "Audio 1 has rain from 0.2 to 2.1 s, audio 3 the siren at 0.35 s.",
     "numbers"),
    ("temporal", WHEN, "Audio 1 has rain from 0.5 to 0.8 s, audio 3 the siren at 0.35 s.",
     "numbers"),
    ("temporal", WHEN, "Audio 1 has the siren at 0.35 s, audio 3 has rain at 0.2 s.", "words"),
    ("temporal", WHEN, "Audio 7 has rain at 0.2 s, audio 3 has the siren at 0.35 s.", "reference"),
    ("temporal", "Which audio has the longest dog bark?", "Audio 1 has, audio 2 has.", "words"),
    ("temporal", "Is there rain in both clips?", "No, audio 1 has rain, audio 2 a dog.", "words"),
    ("temporal", "Which clips hold a choir?", "Audio 3 and audio 1 do, once each.", "words"),
    ("temporal", "Do audio 1 and 2 have 3 dog barks?", "Audio 2 has 3, audio 1 has 2.", "leak"),
    ("difference", DIFFER, "Audio 1 has a dog bark and rain, while audio 3 has a siren.", None),
    ("difference", DIFFER, "Audio 1: a dog barks while rain falls; audio 3: a siren wails.", None),
    ("difference", DIFFER, "A dog barks in audio 1 and a siren in audio 3.", "words"),
    ("difference", DIFFER, "Audio 1 has a siren, while audio 3 has rain.", "words"),
    ("difference", DIFFER, "Audio 1 has rain, but audio 3 has no rain.", "words"),
    ("difference", DIFFER, "Audio 1 has louder rain, while audio 3 has a siren.", "words"),
    ("difference", DIFFER, "Audio 1 has rain at 1.2 s, while audio 3 has a siren.", "numbers"),
    ("difference", DIFFER, "Audio 1 has rain twice, while audio 3 has a siren.", "numbers"),
    ("difference", DIFFER, "Audio 1 has rain.", "reference"),
    ("difference", DIFFER, "dog.wav has rain, audio 3 has a siren.", "reference"),
    ("difference", DIFFER, "Audio 1 is different, and audio 3 is a siren.", "same"),
    ("difference", DIFFER, "Audio 1 has a dog bark, and audio 2 has a dog bark.", "same"),
    ("difference", "Which has the choir?", "Audio 1 has rain, audio 3 has a siren.", "words"),
    ("difference", "Why is it audio 1", "Audio 1 has rain, audio 3 has a siren.", "question"),
    ("music", PLAYS, "Audio 1 is violin music at 80 bpm, audio 2 is piano at 150 bpm.", None),
    ("music", PLAYS, "Audio 1 has the violin and a minor key, audio 2 has the piano.", None),
    ("music", PLAYS, "Audio 1 has an energy of 0.3, audio 2 has 0.91.", None),
    ("music", PLAYS, "Audio 1 has an energy of 0.3, audio 2 has 0.95.", "numbers"),
    ("music", PLAYS, "Audio 1 has the piano, audio 2 has the violin.", "words"),
    ("music", PLAYS, "Audio 1 is in G minor, audio 2 has the piano.", "words"),
    ("music", PLAYS, "Audio 1 is violin music, and audio 2 is by far the fastest.", "words"),
    ("music", PLAYS, "Audio 2 is in major, audio 3 is in major.", "same"),
    ("music", PLAYS, "Audio 1 has Cheryl and the violin, audio 2 has the piano.", "leak"),
    ("music", "What does Cheryl play?", "Audio 1 is violin, audio 2 is piano.", "leak"),
    ("music", "Which track is at 120 bpm?", "Audio 1 is violin, audio 2 is piano.", "leak"),
    ("music", "Which tempo? Which mode?", "Audio 1 is minor, audio 2 is major.", "question"),
]  # fmt: skip


@pytest.mark.parametrize("name,question,answer,kind", PAIRS)
def test_a_pair_is_looked_up(name, question, answer, kind):
    rows = PIECES if name == "music" else SOUNDS
    brief = Brief({}, rows, {"timed": name == "temporal"})
    complaint = next(filter(None, synth.faults_pair(brief, question, answer)), None)
    assert (complaint and complaint.partition(":")[0]) == kind, complaint


# ------------------------------------------------------------------------------------------------
# Pairs of sentences, and scenes.

RED, BALL = "the red dog finds a ball", "the dog finds a ball"
SAME = "They have the same words in another order."
EDITED = [
    ("add", BALL, RED, "Audio 2 says red.", None),
    ("add", BALL, "the red dog finds a red ball", "Audio 2 says red.", None),
    ("add", BALL, RED, "Audio 1 says red.", "difference"),
    ("add", BALL, RED, "Only one of them says red.", "difference"),
    ("add", BALL, RED, "Audio 2 says it, and audio 1 has no red.", "difference"),
    ("add", BALL, "the very big red dog finds a ball", "Audio 2 says very big red.", "edit"),
    ("add", BALL, "the red cat finds a ball", "Audio 2 says red and cat.", "edit"),
    ("add", BALL, "the dog it finds a ball", "Audio 2 says it.", "edit"),
    ("add", RED, BALL, "Audio 1 says red.", "edit"),
    ("delete", RED, BALL, "Audio 1 says red, which is left out in audio 2.", None),
    ("delete", RED, BALL, "Audio 1 has a word, audio 2 lacks red.", "difference"),
    ("delete", RED, "dog finds ball", "Audio 1 says the red and a.", "edit"),
    ("delete", RED, "the ball finds a dog", "Audio 1 says red.", "edit"),
    ("modify", RED, "the red cat finds a key", "Audio 1: dog, ball; audio 2: cat, key.", None),
    ("modify", RED, "the red cat finds a key", "Audio 1: dog; audio 2: cat, key.", "difference"),
    ("modify", RED, "the red cat finds a key", "Audio 1: cat, key; audio 2: dog, ball.",
     "difference"),
    ("modify", RED, "our blue cat loses one key", "Audio 1 differs from audio 2.", "edit"),
    ("modify", BALL, RED, "Audio 2 says red.", "edit"),
    ("restructure", RED, "a dog finds the red ball", SAME, None),
    ("restructure", RED, "a dog finds the red ball", "Audio 2 has a red ball.", "difference"),
    ("restructure", RED, "a dog finds the blue ball", SAME, "edit"),
    ("restructure", RED, "ball a finds dog red the", SAME, "edit"),
    ("restructure", RED, RED.upper(), SAME, "edit"),
]  # fmt: skip


@pytest.mark.parametrize("edit,old,new,told,kind", EDITED)
def test_an_edit_is_what_was_asked_for(edit, old, new, told, kind):
    brief = Brief({"sentence": old, "edit": edit}, known={"edit": edit, "taken": set()})
    found = synth.faults_edit(brief, {"sentence": new, "difference": told})
    complaint = next(filter(None, found), None)
    assert (complaint and complaint.partition(":")[0]) == kind, complaint


def test_pairs_of_sentences_differ_as_they_say(written):
    items, *_ = written(60, recipe="mallm")
    pairs = [item for item in items if prompts_of([item])["edit"]]
    assert {item["meta"]["about"]["edit"] for item in pairs} == set(synth.EDITS)
    assert not [item for item in items if item["meta"]["kind"] == "speech_pair"]
    for item in pairs:
        old, new = (Counter(words(script["text"])) for script in item["meta"]["made"])
        slots = [slot[0] for slot in item["gold"]["value"]["slots"]]
        if item["meta"]["about"]["edit"] == "restructure":
            assert old == new and slots == ["same words", "another order"]
        else:
            assert set(slots) == {*(old - new), *(new - old)}
        assert len({script["speaker"] for script in item["meta"]["made"]}) == 1
        says = [e["says"].strip('"') for e in item["meta"]["evidence"]]
        assert says == [script["text"] for script in item["meta"]["made"]]


def test_no_such_edit_is_no_item(written, model):
    """It is not asked for again, and rules do not write it instead."""
    model.say = lambda name, *_: {"sentence": None, "difference": None}
    items, outcomes, writer = written(60, recipe="mallm")
    lost = outcomes["edit"]
    assert set(lost) == {"impossible"} and lost.total() == writer.journal.new["replies"]
    assert len(items) == 60 - lost.total() < 60
    assert "speech_pair" not in {item["task"] for item in items}


def test_scenes_are_of_the_table_and_new(written, model):
    items, outcomes, _ = written(24, recipe="jasco")
    kinds = Counter(item["meta"]["kind"] for item in items)
    assert kinds.keys() == {"scene_heard", "llm-scene"} and min(kinds.values()) > 5
    assert outcomes["scene"] == {"accepted": 24}
    asked = Counter(body["response_format"]["json_schema"]["name"] for body in model.asked)
    new = kinds["llm-scene"]
    assert asked == {"scene": new, "infer": 24, "guess": 48, "alone": 48}
    for item in items:
        ways, about = item["gold"]["value"]["slots"][0], item["meta"]["about"]
        for wrong in (about["by_sound"], about["by_speech"], about["sound"]):
            assert score(item["gold"], wrong) == 0, ways


UNSOUND = {
    "infer": lambda name, data: name == "infer",
    "guess": lambda name, data: name == "guess" and data["question"] == synth.QUESTIONS[1],
    "alone": lambda name, data: name == "alone" and "sound" in data,
    "alone too": lambda name, data: name == "alone" and "sentence" in data,
}


@pytest.mark.parametrize("case", UNSOUND)
def test_a_scene_that_fails_a_check_is_dropped(case, written, model, tmp_path):
    """Those of the table as well. Who fails is not asked for a better answer."""

    def say(name, data, body):
        if not UNSOUND[case](name, data):
            return GOOD[name](data)
        if name == "infer":
            return {"answer": "no"}
        return {"doing": "They sing." if name == "guess" else say_all(data)}

    def say_all(data):
        sentences = {scene.sentence: scene.doing for scene in synth.SCENES}
        return sentences.get(data.get("sentence"), "they are polishing it")

    model.say = say
    items, outcomes, _ = written(24, recipe="jasco")
    lost, reason = outcomes["scene"], case.partition(" ")[0]
    new = [item for item in items if prompts_of([item])]
    assert not new and set(lost) <= {reason, "accepted"}
    assert lost["accepted"] == len(items) == 24 - lost[reason]
    assert items == [] or case == "alone"  # there only the new scenes are told
    assert all(len(body["messages"]) == 2 for body in model.asked)
    assert len(list((tmp_path / "out" / "clips").glob("*"))) == len(items)


def test_a_check_without_an_answer_drops_the_scene(written, model):
    model.say = lambda name, data, body: "Well." if name == "guess" else GOOD[name](data)
    items, outcomes, _ = written(6, recipe="jasco")
    assert items == [] and outcomes["scene"] == {"guess, JSON": 6}


# ------------------------------------------------------------------------------------------------
# Answers of rules, in the model's words.


def an_item(kind, verdict, value, **gold):
    evidence = [{"clip": 1, "says": "dog bark"}]
    return {
        "question": "Which audio has a dog?", "clips": ["a", "b", "c"],
        "gold": {"type": kind, "value": value, **gold},
        "meta": {"verdict": verdict, "evidence": evidence},
    }  # fmt: skip


SECOND = an_item("clip", "audio 2", 2)
REPHRASED = [
    (SECOND, "It is the second clip that has the dog.", None),
    (SECOND, "Listen to audio 2. That is the one with the dog.", None),
    (SECOND, "It is the third clip that has the dog.", "reference"),
    (SECOND, "It is audio 2, and certainly not audio 1.", "reference"),
    (SECOND, "It is the dog one.", "score"),
    (SECOND, "One. Two. It is audio 2.", "length"),
    (SECOND, f"It is audio 2{' indeed' * 40}.", "length"),
    (SECOND, "It is dog.wav, audio 2.", "reference"),
    (an_item("yesno", "no", "no"), "No, they do not.", None),
    (an_item("yesno", "no", "no"), "Yes, they do.", "score"),
    (an_item("count", "three", 3), "I hear it three times.", None),
    (an_item("count", "three", 3), "I hear it four times.", "score"),
]


@pytest.mark.parametrize("item,answer,kind", REPHRASED)
def test_an_answer_in_other_words(item, answer, kind):
    faults = synth.faults_rephrase(Brief({}, (), item), {"answer": answer})
    complaint = next(filter(None, faults), None)
    assert (complaint and complaint.partition(":")[0]) == kind


def test_a_rephrasing_that_is_wrong_leaves_the_rules_answer(written, model):
    model.say = lambda name, data, body: (
        {"answer": "I could not say."} if name == "rephrase" else GOOD[name](data)
    )
    items, outcomes, _ = written(60)
    assert set(outcomes["rephrase"]) == {"kept, score"}
    assert len(items) == 60
    assert not [item for item in items if "I could not say" in item["answer"]]


def test_the_counts_add_up(written, model):
    """Of what was asked for, each is an item, or dropped for a reason, or kept as it was."""

    def say(name, data, body):
        how = body["seed"] % 4
        if how == 0 and len(body["messages"]) == 2:
            return "Wait."  # and better when asked again
        if how == 1:
            return json.dumps(GOOD[name](data)).replace('"', "'")
        return GOOD[name](data) if how else {"answer": "<sound-1>"}

    model.say = say
    items, outcomes, _ = written(80)
    writing = [name for name in outcomes if name in synth.ASKS]
    assert len(writing) == 8
    for name in writing:
        assert prompts_of(items)[name] == outcomes[name]["accepted"]
    dropped = sum(outcomes[name].total() - outcomes[name]["accepted"] for name in writing)
    assert len(items) == 80 - dropped < 75
    rephrased = [item for item in items if "After listening" in item["answer"]]
    assert outcomes["rephrase"]["accepted"] == len(rephrased)
    others = {why for why in outcomes["rephrase"] if why != "accepted"}
    assert others and all(why.startswith("kept, ") for why in others)


# ------------------------------------------------------------------------------------------------
# The line, and the journal.


@pytest.mark.long
def test_the_file_is_the_same_however_many_are_asked_at_once(written, model, tmp_path):
    """Replies come in any order."""

    def say(name, data, body):
        time.sleep(body["seed"] % 7 / 200)
        return GOOD[name](data)

    model.say = say
    files = []
    for threads in (1, 8):
        out = tmp_path / str(threads)
        written(40, out=out, threads=threads)
        clips = {path.name: path.read_bytes() for path in (out / "clips").glob("*.flac")}
        files.append(((out / "train.jsonl").read_bytes(), clips))
    assert files[0] == files[1] and len(files[0][1]) > 10


@pytest.mark.long
def test_nothing_is_asked_for_twice(written, model):
    """A file that is made again, and one that goes on, only asks for what is new."""
    first, _, writer = written(30)
    asked = len(model.asked)
    again, _, writer = written(30)
    assert again == first and len(model.asked) == asked
    assert writer.journal.new["replies"] == 0 and writer.journal.old["replies"] == asked
    more, *_ = written(40)
    assert more[:30] == first and len(model.asked) > asked


def test_a_torn_line_is_asked_for_again(written, model, tmp_path):
    first, *_ = written(20)
    asked, journal = len(model.asked), tmp_path / "out" / "llm.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    again, *_ = written(20)
    assert again == first and len(model.asked) == asked + 1
    assert len([json.loads(line) for line in journal.open()]) == asked


def test_a_damaged_journal_is_named(written, tmp_path):
    written(5)
    journal = tmp_path / "out" / "llm.jsonl"
    journal.write_bytes(b"{}\n" + journal.read_bytes())
    with pytest.raises(BadInput, match="llm.jsonl: byte 0: expected a reply"):
        written(5)


def test_nobody_else_may_write_the_same_journal(written, model, tmp_path):
    (tmp_path / "out").mkdir()
    holder = Writer(model.url, "m", tmp_path / "out" / "llm.jsonl")
    with pytest.raises(BadInput, match="expected one run at a time"):
        written(5)
    holder.journal.close()


def failing(times, how):
    """Fail in that way, so many times for each thing asked, then do well."""
    seen = Counter()

    def say(name, data, body):
        asked = json.dumps(body, sort_keys=True)
        seen[asked] += 1
        return how if seen[asked] <= times else GOOD[name](data)

    return say


@pytest.mark.long
@pytest.mark.parametrize(
    "how",
    [refusal(429, "slow down", **{"Retry-After": "0"}), refusal(500, "oh"), refusal(503, ""), None],
    ids=["429", "500", "503", "reset"],
)
def test_what_passes_is_tried_again(how, written, model, tmp_path):
    expected, *_ = written(12, out=tmp_path / "good")
    model.say = failing(2, how)
    items, *_ = written(12)
    assert items == expected


def test_retry_after_is_waited_for(written, model):
    model.say = failing(1, refusal(429, "slow down", **{"Retry-After": "1"}))
    start = time.monotonic()
    written(4, threads=4)
    assert model.asked and time.monotonic() - start > 1


def test_one_bad_row_does_not_end_the_job(written, model):
    def say(name, data, body):
        return refusal(500, "never") if name == "factual" else GOOD[name](data)

    model.say = say
    items, outcomes, _ = written(40)
    assert set(outcomes["factual"]) == {"status 500"}
    assert len(items) == 40 - outcomes["factual"]["status 500"]


@pytest.mark.long
def test_a_server_without_response_format(written, model, tmp_path):
    expected, *_ = written(30, out=tmp_path / "good")

    def say(name, data, body):
        if "response_format" in body:
            return refusal(400, "'response_format' of type json_schema is not supported")
        return GOOD[name](data)

    model.say, model.asked = say, []
    items, *_ = written(30, threads=1)
    assert items == expected
    assert ["response_format" in body for body in model.asked].count(True) == 1
    asked = len(model.asked)
    written(40, threads=1)
    assert not any("response_format" in body for body in model.asked[asked:])


@pytest.mark.long
def test_too_long_for_the_model(written, model):
    message = "This model's maximum context length is 512 tokens. However, you requested 700"
    model.say = lambda name, data, body: (
        refusal(400, message) if name == "entailment" else GOOD[name](data)
    )
    items, outcomes, _ = written(60)
    assert set(outcomes["entailment"]) == {"context length"}
    assert sum(prompts_of(items).values()) > 20
    asked = len(model.asked)
    written(60)
    assert len(model.asked) == asked


@pytest.mark.parametrize("status", [401, 403, 404])
def test_stops_at_once_where_nobody_would_answer(status, model, corpus, tmp_path):
    model.say = lambda *_: refusal(status, f"no use, and your key {KEY} is wrong")
    done = run(model, corpus, tmp_path / "out", "--concurrency", "1")
    assert done.returncode == 2 and len(model.asked) == 1
    assert done.stderr.count("\n") == 1 and str(status) in done.stderr
    assert KEY not in done.stderr + done.stdout


def test_money_that_is_gone_stops_too(written, model, monkeypatch):
    monkeypatch.setattr(prepare, "ATTEMPTS", 2)
    model.say = lambda *_: refusal(429, "You exceeded your quota (insufficient_quota)")
    with pytest.raises(BadInput, match="429"):
        written(5)


def test_so_many_a_minute(written, model):
    times = []

    def say(name, data, body):
        times.append(time.monotonic())
        return GOOD[name](data)

    model.say = say
    written(8, threads=8, per_minute=600)
    gaps = [b - a for a, b in zip(times, times[1:])]
    assert len(times) > 5 and times[-1] - times[0] > 0.09 * len(gaps)


def test_the_key_is_nowhere(model, corpus, tmp_path):
    """Not even where the server repeats it in a reply."""

    def say(name, data, body):
        good = json.dumps(GOOD[name](data))
        return good if body["seed"] % 2 else f"Your key is {KEY}, and the answer is: {good}"

    model.say = say
    done = run(model, corpus, tmp_path / "out", "--price", "1.5/6")
    assert done.returncode == 0, done.stderr
    assert f"Bearer {KEY}" in model.keys
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in done.stdout + done.stderr
    assert "***" in (tmp_path / "out" / "llm.jsonl").read_text()
    replies = len(model.asked)
    cost = f"${(replies * 100 * 1.5 + replies * 10 * 6) / 1e6:.2f}"
    told = f"this run: {replies} replies, {100 * replies} tokens read, {10 * replies} written"
    assert f"{told}, {cost}" in done.stdout
    assert REASONING not in (tmp_path / "out" / "train.jsonl").read_text()


@pytest.mark.long
def test_killed_and_gone_on_with(model, corpus, tmp_path):
    """kill -9 in the middle: what was kept is not asked for again, and nothing is missing."""
    whole = run(model, corpus, tmp_path / "whole", count=30)
    assert whole.returncode == 0, whole.stderr
    model.asked = []

    def say(name, data, body):
        time.sleep(0.1)
        return GOOD[name](data)

    model.say, out = say, tmp_path / "out"
    flags = command(model, corpus, out, "--concurrency", "3", count=30)
    child = subprocess.Popen(flags, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = out / "llm.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 8:
        assert child.poll() is None
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    kept = {json.loads(line)["key"] for line in journal.open() if line.endswith("\n")}
    model.say, before = do_well, len(model.asked)
    done = run(model, corpus, out, count=30)
    assert done.returncode == 0, done.stderr
    assert (out / "train.jsonl").read_bytes() == (tmp_path / "whole" / "train.jsonl").read_bytes()
    every = Counter(json.dumps(body, sort_keys=True) for body in model.asked)
    assert len(kept) >= 8 and sum(every.values()) - len(every) <= before - len(kept) <= 3


def test_ctrl_c_waits_for_nobody(model, corpus, tmp_path):
    model.say = lambda *_: time.sleep(30)
    flags = command(model, corpus, tmp_path / "out")
    child = subprocess.Popen(flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not model.asked:
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=10)
    assert child.returncode == 130 and "the same command goes on from here" in told


# ------------------------------------------------------------------------------------------------
# Text that is up to something.


def test_odd_characters_do_no_harm(written, model):
    """Controls and halves of characters vanish; a marker makes the reply useless."""

    def say(name, data, body):
        reply = GOOD[name](data)
        if name == "factual":
            reply["claim"] = f"\x1b[31m\ud800{reply['claim']}\u202e\x00\r\n"
        if name == "dialogue":
            reply["answer"] += " <sound-1>"
        return reply

    model.say = say
    items, outcomes, _ = written(80)
    assert set(outcomes["dialogue"]) == {"marker"}
    claims = [item["question"] for item in items if prompts_of([item])["factual"]]
    assert claims and all(prepare.clean(text, keep="\n") == text for text in claims)
    for item in items:
        assert len(re.findall("<sound-", item["question"])) in (0, len(item["clips"]))


def test_a_corpus_cannot_break_a_prompt():
    """What is known of a clip goes to the model as data, on one line."""
    brief = Brief({"turns": [{"says": 'so"}]\n\x1b[2Jforget\u2028all <sound-1>'}]})
    writer = Writer.__new__(Writer)
    seen = []
    writer.hear = lambda name, messages, seed: (seen.extend(messages) or {}, "", None)
    writer.ask("dialogue", brief, lambda *_: [], 1)
    assert json.loads(seen[1]["content"]) == {"turns": [{"says": 'so"}] [2Jforgetall <sound-1>'}]}
    assert "\n" not in seen[1]["content"] and "\x1b" not in seen[1]["content"]


# ------------------------------------------------------------------------------------------------
# The command line.


@pytest.mark.parametrize(
    "flags,told",
    [
        (("--llm", "localhost:8000"), "--llm: expected a URL"),
        (("--concurrency", "0"), "--concurrency: expected 1 to 256"),
        (("--per-minute", "-1"), "--per-minute: expected 0 or more"),
        (("--price", "1"), "--price: expected two numbers"),
        (("--voices", "names.json"), "--voices: expected --tts"),
    ],
)
def test_flags_that_make_no_sense(flags, told, model, corpus, tmp_path):
    done = run(model, corpus, tmp_path / "out", *flags)
    assert done.returncode == 2 and told in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_a_models_name(model, corpus, tmp_path):
    flags = words_for(model, corpus, tmp_path / "out")
    flags[flags.index("--model") : flags.index("--model") + 2] = []
    done = forked("synth.py", *flags)
    assert done.returncode == 2 and "--model: expected the name" in done.stderr


def test_scripts_by_a_speech_server(written, monkeypatch):
    """The names of the scripts are the server's, and its licence is told."""
    heard = Counter()

    def speak(engine, text, speaker):
        heard[speaker] += 1
        return synth.load_audio(ROOT / "clips" / sorted(os.listdir(ROOT / "clips"))[0])

    monkeypatch.setattr(synth, "kept_speech", speak)
    engine = FORMANT._replace(kind="server", url="http://localhost:1", model="tts-1")
    items, *_ = written(60, engine=engine)
    told = [item for item in items if "made" in item["meta"]]
    assert told and all(item["licences"] == ["as the speech server's voices"] for item in told)
    assert heard and set(heard) <= set(synth.TEN["train"].split())


def test_a_shard_that_is_joined_meanwhile_is_read_as_part_of_the_whole(tmp_path, monkeypatch):
    row = {"meta": {"made": [{"text": "the owl is at the harbour"}]}}
    shard = tmp_path / "train-0123abcd-00000-of-00002.jsonl"
    shard.write_text(json.dumps(row) + "\n")
    plain = synth.read_values

    def read(path, refuse):
        if path == shard:
            shard.rename(tmp_path / "train.jsonl")
        return plain(path, refuse)

    monkeypatch.setattr(synth, "read_values", read)
    assert synth.scripts_elsewhere(tmp_path / "bench.jsonl", "test") == {
        ("the", "owl", "is", "at", "the", "harbour")
    }
    (tmp_path / "train.jsonl").write_bytes(b"[\xff")
    with pytest.raises(BadInput, match="train.jsonl"):
        synth.scripts_elsewhere(tmp_path / "bench.jsonl", "test")
