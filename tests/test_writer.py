"""The second writer: a language model that is asked for questions, and never believed.

The model is a server in this file. By default it answers every prompt well, from what the prompt
told it; each test makes it lie, stammer or fall silent in one way, and looks at what came out."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests.conftest import ROOT

import prepare
import synth
from prepare import BadInput, plain, read_rows, score, words
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
    rest = "old slowly friday|red never morning|tall often winter|cold always sunday|big gladly noon"
    shared = " and the ".join(data["keywords"])
    return {
        "sentences": [
            f"the {a} man {b} took the {shared} on {c}"
            for a, b, c in (line.split() for line in rest.split("|")[: data["n"]])
        ]
    }


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
    questions, answers = [], []
    for clip in data["clips"][:3]:
        name, sound = f"audio {clip['audio']}", clip["sounds"][0]
        questions.append(f"How often and when is the {sound['label']} heard in {name}?")
        when = " and ".join(sound["seconds"])
        told = f"{name} has the {sound['label']} {sound['times']} times, at {when} s."
        answers.append(told.capitalize())
    return {"question": questions, "answer": answers}


def good_difference(data):
    first, second = data["clips"][:2]
    a, b = (clip["events"][0].rsplit("-", 2)[0].lstrip("(") for clip in (first, second))
    answer = f"Audio 1 has the sound of {a}, whereas audio 2 contains {b}."
    return {"question": ["How do audio 1 and audio 2 differ?"], "answer": [answer]}


def good_music(data):
    pieces = [f"audio {c['audio']} is {c['instrument']} music in {c['mode']}" for c in data["clips"]]
    return {
        "reasoning_type": data["reasoning_type"],
        "question": ["How do the pieces differ in what plays and how?"],
        "answer": [f"{', '.join(pieces)}.".capitalize()],
    }


GOOD = {name: globals()[f"good_{name}"] for name in synth.PROMPTS}


class Model(BaseHTTPRequestHandler):
    """A chat server: `say(name, data, body)` gives the content, or (status, headers, bytes)."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        system, user = (message["content"] for message in body["messages"][:2])
        name = next(n for n, text in synth.PROMPTS.items() if system.startswith(text))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.keys.add(self.headers.get("Authorization"))
        said = self.server.say(name, json.loads(user), body)
        if said is None:  # hang up in the middle
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n{")
            self.connection.close()
            return
        status, headers, reply = said if isinstance(said, tuple) else (200, {}, reply_of(said))
        self.send_response(status)
        for field, value in {"Content-Length": str(len(reply)), **headers}.items():
            self.send_header(field, value)
        self.end_headers()
        self.wfile.write(reply)

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


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(prepare, "PAUSE", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    server.daemon_threads = True
    server.asked, server.keys, server.lock, server.say = [], set(), threading.Lock(), do_well
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    synth.make_world(folder, 2100, 5)
    return folder / "corpus.jsonl"


@pytest.fixture
def written(model, corpus, tmp_path):
    """write(count) -> (items, outcomes by prompt, the writer) of one run in this process."""

    def write(count, split="train", out=tmp_path / "out", threads=4, **more):
        out.mkdir(exist_ok=True)
        writer = Writer(model.url, "m", out / "llm.jsonl", threads, **more)
        kept = []
        writer.report = lambda: kept.append({k: +v for k, v in writer.outcomes.items()})
        settings = {
            "seed": 3, "clips": 5, "mix": synth.MIX, "single": 0.1, "sentences": None,
            "tasks": synth.RECIPES["polyaudio"].tasks, "corpus": [str(corpus)], "split": split,
            "first": 0, "last": count,
        }  # fmt: skip
        synth.write_questions(out / f"{split}.jsonl", settings, 1, writer)
        writer.journal.close()
        return list(read_rows(out / f"{split}.jsonl")), kept[0], writer

    return write


def command(model, corpus, out, *flags, count=20):
    llm = ["--llm", model.url, "--model", "m", "--corpus", str(corpus), "--out", str(out)]
    sizes = ["--train", str(count), "--bench", "0", "--seed", "3"]
    return [sys.executable, str(ROOT / "synth.py"), *llm, *sizes, *flags]


def run(*args, **more):
    return subprocess.run(command(*args, **more), capture_output=True, text=True, timeout=300)


def prompts_of(items) -> Counter:
    return Counter(item["meta"]["kind"] for item in items)


# ------------------------------------------------------------------------------------------------
# All is well.


def test_every_prompt_yields_items(written, model):
    items, outcomes, _ = written(160)
    assert set(synth.ASKS) <= set(prompts_of(items))
    assert outcomes.keys() == synth.PROMPTS.keys()
    for name, counts in outcomes.items():
        assert counts["accepted"] == counts.total() > 0, (name, counts)
    for item in items:
        assert score(item["gold"], item["answer"]) == 1
        assert (item["meta"].get("model") == "m") == (
            item["meta"]["kind"] in synth.ASKS or "After listening" in item["answer"]
        )
    assert {f"Bearer {KEY}"} == model.keys


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


def test_scripts_are_spoken_by_voices_of_the_split(written):
    for split in ("train", "test"):
        items, *_ = written(60, split)
        made = [item for item in items if "made" in item["meta"]]
        assert {"factual", "keywords", "entailment"} <= set(prompts_of(made))
        for item in made:
            assert item["licences"] == ["CC0-1.0"]
            said = [e["says"] for e in item["meta"]["evidence"]]
            assert said == [f'"{script["text"]}"' for script in item["meta"]["made"]]
            assert all(s["speaker"].startswith(split) for s in item["meta"]["made"])


def test_verdicts_are_balanced(written):
    items, *_ = written(160)
    told = Counter(
        (item["task"], item["gold"]["value"])
        for item in items
        if item["meta"]["kind"] in ("factual", "entailment")
    )
    assert {v for task, v in told if task == "factual"} == {"yes", "no"}
    assert {v for task, v in told if task == "entailment"} == {"yes", "no", "nei"}


def test_options_and_events_move(written):
    """The model always puts the right order in B, and the same numbers there."""
    items, *_ = written(300)
    ordered = [item for item in items if item["meta"]["kind"] == "ordering"]
    letters = {item["choices"].index(item["gold"]["value"]) for item in ordered}
    assert len(letters) > 2
    assert len({item["gold"]["value"] for item in ordered}) > 2


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
    assert writer.new["replies"] == sum(counts.total() for counts in outcomes.values())


@pytest.mark.parametrize("said", [None, "", "I cannot do that.", "<think>{}", "{" * 5000, "[]"])
def test_no_reply_is_asked_for_once_more(said, written, model):
    def say(name, data, body):
        return 200, {}, reply_of(said) if said is not None else reply_of_null()

    model.say = say
    items, outcomes, writer = written(25)
    lost = outcomes["factual"]
    assert set(lost) <= {"empty", "JSON"} and lost.total() > 0
    assert not [item for item in items if item["meta"]["kind"] in synth.ASKS]
    asked = sum(counts.total() for counts in outcomes.values())
    assert writer.new["replies"] == 2 * asked
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


def share_one_more(reply, _):
    reply["sentences"] = [text.replace("man", "baker") for text in reply["sentences"]]
    reply["sentences"] = [f"{text} with bread" for text in reply["sentences"]]


def true_order(reply, _):
    reply["events"].sort(key=lambda event: event["part"])


def same_verdicts(reply, _):
    for qa in reply["qa"]:
        qa["answer"] = "Maybe, who knows."


def numbers_up(reply, _):
    reply["answer"] = [re.sub(r"\.\d", ".98", text) for text in reply["answer"]]


def swap_clips(reply, _):
    reply["answer"] = [re.sub("(?i)audio 1", "audio 2", text) for text in reply["answer"]]


LIES = [
    ("factual", "label", another_label),
    ("factual", "label", lambda reply, _: [c.update(support=not c["support"]) for c in reply["clips"]]),
    ("factual", "shape", drop_last("clips")),
    ("factual", "length", put("claim", "word " * 21)),
    ("factual", "length", put("clips", 0, "text", "far too short")),
    ("factual", "length", put("rationale", "because " * 26)),
    ("factual", "script", put("clips", 0, "text", "это слова на другом языке и всё")),
    ("factual", "reference", put("rationale", "The second clip says otherwise.")),
    ("factual", "marker", put("claim", "The hammer of <sound-1> is new.")),
    ("factual", "JSON", put("label", "yes")),
    ("keywords", "keywords", share_one_more),
    ("keywords", "keywords", put("sentences", 0, "the old man slowly took a thing on friday")),
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
    ("temporal", "length", put("answer", ["Well."] * 3)),
    ("difference", "lists", drop_last("question")),
    ("difference", "sound", put("answer", ["Audio 1 has a helicopter, and audio 2 has a choir."])),
    ("difference", "reference", put("answer", ["The one has more than the other one."])),
    ("music", "leak", put("question", ["Which piece plays at 120 or more?"])),
    ("music", "question", put("question", ["Which piece is faster, and which is in minor?"])),
    ("music", "music", put("answer", ["Audio 1 is banjo music in minor and audio 2 is guitar."])),
    ("music", "numbers", put("answer", ["Audio 1 has 2222 beats and audio 2 has 3333 of them."])),
]  # fmt: skip


@pytest.fixture
def asked_of(corpus, tmp_path):
    """faults(name, change) -> the complaints at replies with that lie, one for each brief."""
    settings = {"corpus": [str(corpus)], "split": "train", "sentences": None}
    shelf, _ = synth.open_shelf(settings, tmp_path)
    shelf.elsewhere = set()

    def faults(name, change, tries=6):
        tell, check, _ = synth.ASKS[name]
        found = []
        for i in range(tries):
            dice = synth.Dice("train", 9, i)
            n = 2 if name == "dialogue" else 3
            brief = Writer.material(None, shelf, dice, tell, n)
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


@pytest.mark.parametrize("name,kind,change", LIES, ids=lambda value: getattr(value, "__name__", value))
def test_a_lie_is_found_out(name, kind, change, asked_of):
    assert set(asked_of(name, lambda *_: None)) == {None}
    found = [complaint and complaint.partition(":")[0] for complaint in asked_of(name, change)]
    assert set(found) <= {kind, None} and kind in found
    if name not in ("temporal",):  # where a change may leave some clip's numbers as they are
        assert set(found) == {kind}
