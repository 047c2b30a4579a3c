"""What prepare.py promises about rows: read_rows and read_corpus stream a file of any length, take
three kinds of row as the same example, and refuse by name whatever is not what it has to be.
"""

import copy
import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

from prepare import BadInput, conversation, read_corpus, read_rows

ROW = {
    "id": "x1",
    "task": "odd",
    "skill": "comparison",
    "clips": ["a.wav", {"path": "b.wav", "start": 0.5, "end": 2}],
    "question": "<sound-1> or <sound-2>: which is the dog?",
    "answer": "Audio 2.",
    "gold": {"type": "clip", "value": [2]},
    "source": "toy",
    "licences": ["CC0"],
    "meta": {"verdict": "2"},
}
TURNS = [
    {"role": "user", "content": "<sound-1>What is it?"},
    {"role": "assistant", "content": "A dog, not <sound-9>."},
    {"role": "user", "content": "And <sound-2>, after <sound-1>?"},
    {"role": "assistant", "content": "A cat."},
]
CHAT = {k: v for k, v in ROW.items() if k not in ("question", "answer", "gold")}
CLIP = {
    "id": "c1", "path": "a.wav", "corpus": "toy", "split": "train", "duration": 1.5,
    "licence": "CC0",
    "speaker": "s1", "transcript": "a dog", "captions": ["a dog barks"], "labels": ["dog"],
    "events": [["dog", 0.1, 0.5]], "emotion": "calm", "music": {"tempo": 120, "mode": "minor"},
    "quality": {"noise": 3}, "dialogue": {"id": "d1", "turn": 2, "speaker": "s1"},
    "order": {"group": "g1", "index": 4}, "words": [["a", 0, 0.1], ["dog", 0.1, 0.5]],
    "phones": [["D", 0.1, 0.2]], "voice": {"f0": 120.0, "tract": 1.0, "rate": 1, "breath": 0.1},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name in ("a.wav", "b.wav", "c.wav"):
        (tmp_path / name).touch()
    return tmp_path


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    array = name.endswith(".json")
    path.write_text(
        json.dumps(rows, indent=1) if array else "".join(f"{json.dumps(r)}\n" for r in rows)
    )
    return path


def changed(row, **fields):
    """The row with other fields; None takes one out."""
    row = {**copy.deepcopy(row), **fields}
    return {field: value for field, value in row.items() if value is not None}


# ------------------------------------------------------------------------------------------------
# What is taken.


def test_our_rows_come_out_as_they_are(folder):
    rows = [
        ROW,
        changed(ROW, id="x2", clips=["a.wav"], question="What?", gold={"type": "clip", "value": 1}),
    ]
    rows += [{**CHAT, "id": "x3", "messages": TURNS}]
    rows += [changed(ROW, id="x4", clips=[], question="2?", gold={"type": "count", "value": 2})]
    for name in ("rows.jsonl", "rows.json"):
        assert list(read_rows(write(folder, rows, name))) == rows


def test_a_gold_takes_the_choices_of_its_row(folder):
    row = changed(ROW, choices=["dog", "cat"], gold={"type": "choice", "value": "cat"})
    (example,) = read_rows(write(folder, [row]))
    assert example["gold"] == {"type": "choice", "value": "cat", "choices": ["dog", "cat"]}
    assert {**example, "gold": None} == {**row, "gold": None}


ABOUT = {"task": "chat", "skill": "chat", "source": "rows", "licences": [], "meta": {}}
FOREIGN = [  # a row of somebody else's, and the example that it is
    ({"id": "p1", "sound": "a.wav", "conversations": [
        {"from": "human", "value": "<sound>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]},
     {"id": "p1", "clips": ["a.wav"], "question": "<sound-1>\nWhat is it?", "answer": "A dog."}),
    ({"id": 7, "sound": ["a.wav", "b.wav"], "duration": 9, "conversations": [
        {"from": "human", "value": "<sound-2> or <sound-1>?"}, {"from": "gpt", "value": "Both."},
        {"from": "human", "value": "<sound-2> again?"},
        {"from": "gpt", "value": "Yes, <sound-2>."}]},
     {"id": "7", "clips": ["a.wav", "b.wav"], "messages": [
        {"role": "user", "content": "<sound-2> or <sound-1>?"},
        {"role": "assistant", "content": "Both."},
        {"role": "user", "content": "<sound-2> again?"},
        {"role": "assistant", "content": "Yes, <sound-2>."}]}),
    ({"conversations": [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hello."}]},
     {"id": "rows-3", "clips": [], "question": "Hello.", "answer": "Hello."}),
    ({"audios": ["a.wav", "b.wav"], "messages": [
        {"role": "system", "content": "Listen."},
        {"role": "user", "content": "<audio>then<audio>?"},
        {"role": "assistant", "content": "<audio> is text here."}]},
     {"id": "rows-4", "clips": ["a.wav", "b.wav"], "messages": [
        {"role": "system", "content": "Listen."},
        {"role": "user", "content": "<sound-1>then<sound-2>?"},
        {"role": "assistant", "content": "<audio> is text here."}]}),
    ({"audios": ["c.wav", "a.wav"], "messages": [
        {"role": "user", "content": "<audio>What?"}, {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "<audio>And this?"},
        {"role": "assistant", "content": "A dog."}]},
     {"id": "rows-5", "clips": ["c.wav", "a.wav"], "messages": [
        {"role": "user", "content": "<sound-1>What?"}, {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "<sound-2>And this?"},
        {"role": "assistant", "content": "A dog."}]}),
    ({"audios": [], "messages": [
        {"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes."}]},
     {"id": "rows-6", "clips": [], "question": "Hello.", "answer": "Yes."}),
    ({"audios": ["a.wav"], "conversations": [
        {"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]},
     {"id": "rows-7", "clips": ["a.wav"], "question": "What?", "answer": "A dog."}),
]  # fmt: skip


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_foreign_rows_become_the_same_examples(folder, name):
    rows = [row for row, _ in FOREIGN]
    assert list(read_rows(write(folder, rows, name))) == [{**ABOUT, **made} for _, made in FOREIGN]


def test_an_example_is_a_conversation():
    assert conversation(ROW) == [
        {"role": "user", "content": ROW["question"]}, {"role": "assistant", "content": "Audio 2."},
    ]  # fmt: skip
    assert conversation({**CHAT, "messages": TURNS}) == TURNS


def test_corpus_rows_come_out_as_they_are(folder):
    least = {k: CLIP[k] for k in ("id", "path", "corpus", "split", "duration", "licence")}
    rows = [CLIP, {**least, "id": "c2"}, {**least, "id": "c3", "sha256": "field of tomorrow"}]
    assert list(read_corpus(write(folder, rows))) == rows


def test_clips_need_not_be_there_when_nobody_listens(tmp_path):
    path = write(tmp_path, [ROW])
    with pytest.raises(BadInput, match="none at a.wav"):
        next(read_rows(path))
    assert list(read_rows(path, heard=False)) == [ROW]


# ------------------------------------------------------------------------------------------------
# What is refused, and by which name.

GOLD_REFUSALS = [
    ({}, "gold.type"), ({"type": "guess", "value": 1}, "gold.type"),
    ({"type": ["clip"], "value": 1}, "gold.type"),
    ({"type": "clip"}, "gold.value"), ({"type": "clip", "value": []}, "gold.value"),
    ({"type": "clip", "value": 3}, "gold.value: expected different clips of 1..2"),
    ({"type": "clip", "value": [1, 1]}, "gold.value: expected different"),
    ({"type": "clip", "value": 0}, "gold.value"),
    ({"type": "clip", "value": True}, "gold.value"),
    ({"type": "order", "value": [1, 3]}, "gold.value"),
    ({"type": "order", "value": [1, 1]}, "gold.value"),
    ({"type": "count", "value": 2.0}, "gold.value"),
    ({"type": "count", "value": -1}, "gold.value"),
    ({"type": "yesno", "value": "maybe"}, "nei or no or yes"),
    ({"type": "span", "value": {"clip": 1, "on": 2, "off": 2}}, "0 <= on < off"),
    ({"type": "span", "value": {"on": 1, "off": 2}}, "gold.value"),
    ({"type": "span", "value": {"clip": 3, "on": 1, "off": 2}}, "gold.value"),
    ({"type": "span", "value": {"clip": [1], "on": 1, "off": 2}}, "gold.value"),
    ({"type": "span", "value": {"clip": 1, "on": 1}}, "gold.value"),
    ({"type": "span", "value": {"clip": 1, "on": 1, "off": float("nan")}}, "gold.value"),
    ({"type": "keywords", "value": []}, "gold.value"),
    ({"type": "keywords", "value": "dog"}, "gold.value"),
    ({"type": "keywords", "value": ["?!"]}, "gold.value"),
    ({"type": "transcript", "value": "..."}, "gold.value"),
    ({"type": "text", "value": "a dog"}, "gold.value"),
    ({"type": "text", "value": {"text": "a", "slots": []}}, "gold"),
    ({"type": "text", "value": {"text": "a", "slots": [[]]}}, "gold.value"),
    ({"type": "text", "value": {"text": "a", "slots": ["dog"]}}, "gold.value"),
    ({"type": "text", "value": {"text": "a", "slots": [["?"]]}}, "gold.value"),
    ({"type": "choice", "value": "dog"}, "different choices"),
    ({"type": "choice", "value": "B", "choices": ["dog", "cat"]}, "different choices"),
    ({"type": "choice", "value": "dog", "choices": ["dog", "Dog."]}, "different choices"),
    ({"type": "choice", "value": "dog", "choices": ["dog"]}, "different choices"),
    ({"type": "choice", "value": "dog", "choices": "dog"}, "choices"),
    ({"type": "choice", "value": "dog", "choices": ["dog", 5]}, "choices"),
    ({"type": "yesno", "value": "nei", "choices": ["yes", "no"]}, "choices"),
]  # fmt: skip
REFUSALS = [  # fields changed, and what the complaint must say
    *(({field: None}, f"{field}: expected") for field in
      ("id", "task", "skill", "clips", "question", "answer", "gold", "source", "licences", "meta")),
    ({"id": 5}, "id: expected a text"), ({"id": ""}, "id: expected a text, found ''"),
    ({"licences": "CC0"}, "licences: expected a list"), ({"licences": [None]}, "licences"),
    ({"meta": []}, "meta"), ({"meta": {"range": None}}, "meta: expected an object without null"),
    ({"clips": "a.wav"}, "clips: expected a list"),
    ({"clips": ["a.wav"]}, "<sound-2> names a clip"),
    ({"clips": ["a.wav", "b.wav", "c.wav"]}, "clip 3 is given, but no <sound-3>"),
    ({"clips": []}, "names a clip that is not there"),
    ({"clips": ["a.wav", "gone.wav"]}, "none at gone.wav"),
    ({"clips": ["a.wav", "."]}, r"clips\[1\]: expected a file"),
    ({"clips": ["a.wav", ""]}, r"clips\[1\]"),
    ({"clips": ["a.wav", "b\0.wav"]}, r"clips\[1\]"), ({"clips": ["a.wav", None]}, r"clips\[1\]"),
    ({"clips": ["a.wav", {"start": 1}]}, r"clips\[1\]"),
    ({"clips": ["a.wav", {"path": "b.wav", "stop": 1}]}, "clips"),
    ({"clips": ["a.wav", {"path": "b.wav", "start": 2, "end": 1}]}, r"clips\[1\]"),
    ({"clips": ["a.wav", {"path": "b.wav", "start": -1}]}, r"clips\[1\]"),
    ({"clips": ["a.wav", {"path": "b.wav", "end": "2"}]}, r"clips\[1\]"),
    ({"clips": ["a.wav", {"path": "b.wav", "end": float("inf")}]}, r"clips\[1\]"),
    ({"clips": ["a.wav", {"join": ["a.wav"], "silence": 2}]}, r"clips\[1\]"),
    ({"question": "<sound-1>?"}, "clip 2 is given"), ({"question": "<sound-0>"}, "<sound-0>"),
    ({"question": ["?"]}, "question"), ({"gold": "2"}, "gold: expected an object"),
    ({"choices": ["a", "b"], "gold": {"type": "choice", "value": "a", "choices": ["b", "a"]}},
     "gold.choices"),
    ({"messages": []}, "messages"), ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "<sound-1>?"}]}, "clip 2 is given"),
    *(({"gold": gold}, words) for gold, words in GOLD_REFUSALS),
]  # fmt: skip
SAID = [{"from": "human", "value": "<sound>?"}, {"from": "gpt", "value": "A dog."}]
FOREIGN_REFUSALS = [
    ({"conversations": SAID}, "names a clip that is not there"),
    ({"sound": ["a.wav", "b.wav"], "conversations": SAID}, "clip 2 is given"),
    ({"sound": ["a.wav"], "conversations": [{"from": "human", "value": "<sound> <sound>?"}]},
     "<sound-2> names"),
    ({"sound": ["a.wav", "b.wav"],
      "conversations": [{"from": "human", "value": "<sound> <sound-2>?"}]}, "markers"),
    ({"sound": ["a.wav", "b.wav"],
      "conversations": [{"from": "human", "value": "<sound-2> <sound>?"}]}, "markers"),
    ({"sound": "gone.wav", "conversations": SAID}, "none at gone.wav"),
    ({"conversations": []}, "messages"),
    ({"sound": 5, "conversations": SAID}, "clips: expected a list"),
    ({"conversations": "Hi"}, "list of turns"),
    ({"conversations": [5]}, "list of turns"),
    ({"conversations": [{"from": "tool", "value": "?"}]}, "turn"),
    ({"conversations": [{"from": ["human"], "value": "?"}]}, "turn"),
    ({"messages": [{"role": "user"}]}, "turn"),
    ({"audios": ["a.wav"], "messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "turn"),
    ({"sound": "a.wav", "conversations": [{"from": "gpt", "value": "A dog."}]}, "no question"),
]  # fmt: skip
CORPUS_REFUSALS = [
    *(({field: None}, f"{field}: expected") for field in ("id", "path", "corpus", "split",
      "duration", "licence")),
    ({"split": "val"}, "split: expected dev or test or train, found 'val'"),
    ({"duration": 0}, "duration"),
    ({"duration": "1"}, "duration: expected a number"), ({"duration": float("inf")}, "duration"),
    ({"duration": 10**400}, "duration"), ({"duration": True}, "duration"),
    ({"path": "gone.wav"}, "none at gone.wav"),
    ({"path": {"path": "a.wav"}}, "path: expected a text"), ({"captions": "a dog"}, "captions"),
    ({"labels": [""]}, "labels"), ({"events": [["dog", 1]]}, "events"),
    ({"events": [["dog", 2, 1]]}, "on <= off"),
    ({"events": [["dog", -1, 1]]}, "events"), ({"words": [[0, 1, "dog"]]}, "words"),
    ({"voice": {"f0": 1}}, "voice"),
    ({"order": {"group": "g", "index": 1.5}}, "order"), ({"dialogue": {"id": "d"}}, "dialogue"),
    ({"music": {"tempo": None}}, "music: expected an object without null"),
    ({"transcript": ""}, "transcript"),
]  # fmt: skip


def only_refused(read, path, words):
    refused = []
    good = [row["id"] for row in read(path, refused.append)]
    assert good == ["before", "after"]  # the rows around it are kept
    (mistake,) = refused
    assert isinstance(mistake, BadInput) and "\n" not in str(mistake)
    assert str(mistake).startswith(f"{path}: row 2")
    with pytest.raises(BadInput, match=words) as caught:  # without a list to put it in, it stops
        list(read(path))
    return str(caught.value) == str(mistake)


@pytest.mark.parametrize("fields, words", REFUSALS)
def test_a_bad_row_is_refused_by_name(folder, fields, words):
    rows = [changed(ROW, id="before"), changed(ROW, **fields), changed(ROW, id="after")]
    assert only_refused(read_rows, write(folder, rows), words)


@pytest.mark.parametrize("row, words", FOREIGN_REFUSALS)
def test_a_bad_foreign_row_is_refused_by_name(folder, row, words):
    rows = [{**ROW, "id": "before"}, row, {**ROW, "id": "after"}]
    assert only_refused(read_rows, write(folder, rows), words)


@pytest.mark.parametrize("fields, words", CORPUS_REFUSALS)
def test_a_bad_corpus_row_is_refused_by_name(folder, fields, words):
    rows = [changed(CLIP, id="before"), changed(CLIP, **fields), changed(CLIP, id="after")]
    assert only_refused(read_corpus, write(folder, rows), words)


@pytest.mark.parametrize("field", ["speaker", "captions", "events", "music", "voice", "order"])
def test_unknown_is_absent_and_never_null(folder, field):
    path = write(folder, [{**CLIP, field: None}])
    with pytest.raises(BadInput, match=f"{field}: expected .*, found None"):
        list(read_corpus(path))


@pytest.mark.parametrize("line", [
    b"{", b"no", b"[1", b'{"id": "x"} {}', b"\xff\xfe", b"[" * 100_000, b"5", b"null", b'"text"',
    b"{}",
    b'{"id": ' + b"9" * 5000 + b"}",
])  # fmt: skip
def test_a_line_that_is_no_row_is_refused_and_no_other(folder, line):
    path = write(folder, [{**ROW, "id": "before"}])
    with open(path, "ab") as file:
        file.write(line + b"\n\n" + json.dumps({**ROW, "id": "after"}).encode())
    assert only_refused(read_rows, path, "expected")


def test_the_complaint_names_file_row_id_field_expected_and_found(folder):
    path = write(folder, [{**ROW, "skill": 5}])
    with pytest.raises(BadInput) as caught:
        list(read_rows(path))
    assert str(caught.value) == f"{path}: row 1 (x1): skill: expected a text, found 5"


@pytest.mark.parametrize("read, row", [(read_rows, ROW), (read_corpus, CLIP)])
def test_a_second_row_of_an_id_is_refused_however_far_apart(folder, read, row):
    refused, count = [], 1000
    path = write(folder, [{**row, "id": str(i % (count + 5))} for i in range(count + 8)])
    found = [row["id"] for row in read(path, refused.append)]
    assert found == [str(i) for i in range(count + 5)]
    assert [str(m).split(": ", 1)[1] for m in refused] == [
        f"row {count + 6 + i} ({i}): id: expected one of its own, found a duplicate"
        for i in range(3)
    ]


def test_half_a_character_is_an_id_like_another(folder):
    refused = []
    rows = [{**ROW, "id": id} for id in ("\ud83d", "\ude00", "\ud83d")]
    kept = [row["id"] for row in read_rows(write(folder, rows), refused.append)]
    assert kept == ["\ud83d", "\ude00"] and "a duplicate" in str(refused[0])


def test_another_thread_may_read_on(folder):
    rows = read_rows(write(folder, [{**ROW, "id": str(i)} for i in range(3)]))
    found = [next(rows)["id"]]
    with ThreadPoolExecutor(1) as pool:
        found += pool.submit(lambda: [row["id"] for row in rows]).result()
    assert found == ["0", "1", "2"]


def test_an_id_of_a_refused_row_is_still_free(folder):
    refused = []
    rows = [{**ROW, "skill": 5}, ROW]
    assert list(read_rows(write(folder, rows), refused.append)) == [ROW]
    assert len(refused) == 1


# ------------------------------------------------------------------------------------------------
# Files.


@pytest.mark.parametrize("text", ["[]", " [ ] ", "[\n]\n", "", "\n\n"])
def test_an_empty_file_has_no_rows(folder, text):
    (folder / "rows.json").write_text(text)
    assert list(read_rows(folder / "rows.json")) == []


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1000])
def test_an_array_is_read_whatever_the_blocks(folder, monkeypatch, block):
    monkeypatch.setattr("prepare.BLOCK", max(block, 8))
    rows = [{**ROW, "id": f"é{i} ] , [ }} 猫",
      "question": '<sound-1><sound-2>"\\],' * i + "<sound-1><sound-2>?"}
            for i in range(20)]  # fmt: skip
    for indent in (None, 1):
        for ascii in (True, False):
            text = json.dumps(rows, indent=indent, ensure_ascii=ascii)
            (folder / "rows.json").write_text("\ufeff \n" + text + "\n", encoding="utf-8")
            assert list(read_rows(folder / "rows.json")) == rows


@pytest.mark.parametrize(
    "tail", ["", ",", ", {", "}", " 5]", "] 5", "][", ', {"id": "x2"', ", no]"]
)
def test_a_damaged_array_ends_with_a_complaint_after_its_good_rows(folder, tail):
    path = folder / "rows.json"
    path.write_text("[" + json.dumps(ROW) + tail)
    rows = read_rows(path, pytest.fail)
    if not tail.startswith(("}", " 5", "")) or tail in (
        ",",
        ", {",
        "] 5",
        "][",
        ', {"id": "x2"',
        ", no]",
    ):
        assert next(rows) == ROW
    with pytest.raises(BadInput, match="rows.json"):
        list(rows)


def test_a_damaged_array_is_not_read_to_its_end(folder, monkeypatch):
    monkeypatch.setattr("prepare.LONGEST", 1 << 17)
    path = folder / "rows.json"
    path.write_text("[" + json.dumps(ROW) + ", {no}" + "," * (1 << 23))
    tracemalloc.start()
    with pytest.raises(BadInput, match="row 2: expected an element"):
        list(read_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_line_without_end_is_refused_by_its_number_and_not_held(folder, end, monkeypatch):
    monkeypatch.setattr("prepare.LONGEST", 1 << 17)
    path, refused = write(folder, [ROW, {**ROW, "id": "fits", "answer": "x" * 120_000}]), []
    with open(path, "a") as file:
        file.write('{"id": "' + "x" * (1 << 23) + '"}' + end)
        file.write(json.dumps({**ROW, "id": "after"}) if end else "")
    tracemalloc.start()
    kept = [row["id"] for row in read_rows(path, refused.append)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept == [ROW["id"], "fits"] + ["after"] * bool(end)
    assert [str(mistake) for mistake in refused] == [
        f"{path}: row 3: expected JSON, found a line of more than {1 << 17} bytes"
    ]
    assert peak < 2 << 20


@pytest.mark.parametrize("name", ["gone.jsonl", "folder"])
def test_a_file_that_cannot_be_read_is_named(folder, name):
    (folder / "folder").mkdir()
    with pytest.raises(BadInput, match=f"{name}: cannot be read"):
        list(read_rows(folder / name))


def test_an_array_that_is_not_utf8_is_named(folder):
    (folder / "rows.json").write_bytes(b'["\xff"]')
    with pytest.raises(BadInput, match="rows.json: expected UTF-8"):
        list(read_rows(folder / "rows.json"))


def test_the_first_row_comes_before_the_last_is_read(folder):
    path = write(folder, [ROW])
    with open(path, "a") as file:
        file.write("x" * (1 << 20) + "\n")
    assert next(read_rows(path)) == ROW


@pytest.mark.long
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_memory_stays_flat(folder, name):
    """Eight times the rows take no more memory. 8,000 rows here, not a million: the memory of a row
    does not know which one it is."""
    peaks = []
    for count in (1_000, 8_000):
        rows = (json.dumps({**CLIP, "id": f"clip-{i:09d}"}) for i in range(count))
        with open(folder / name, "w") as file:
            file.write("[" if name.endswith(".json") else "")
            for i, row in enumerate(rows):
                file.write((",\n" if name.endswith(".json") else "\n") * (i > 0) + row)
            file.write("]" if name.endswith(".json") else "\n")
        tracemalloc.start()
        assert sum(1 for _ in read_corpus(folder / name)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (folder / name).stat().st_size > 4e6
    assert peaks[1] < 1.5e6
    assert peaks[1] - peaks[0] < 8_000


@pytest.mark.parametrize("span", [[5, 4], [1], "ab", [9, 1], [4, 9], ["0", "9"]])
def test_a_range_that_is_none_is_refused(tmp_path, span):
    """Else chance would be no number, or below 0."""
    row = {
        "id": "a", "task": "counting", "skill": "reasoning", "source": "world", "licences": [],
        "clips": [], "question": "How many?", "answer": "3", "gold": {"type": "count", "value": 3},
        "meta": {"range": span},
    }  # fmt: skip
    path = tmp_path / "bench.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(BadInput, match="meta.range: expected .least, most. around the value"):
        list(read_rows(path))
    row["meta"]["range"] = [0, 9]
    path.write_text(json.dumps(row))
    assert len(list(read_rows(path))) == 1
