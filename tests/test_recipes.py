"""What synth.py promises about the recipes of other papers, whose clips are made for the item.

Every gold is found a second time, from what the parts of a clip are (meta.ids) and from the sound
of the clip as it was written: a made clip is taken apart by least squares into the clips that it
was made of, which tells that both are there, how loud each is, and where. Runs by any number of
workers and shards, and a run that was killed, write the same bytes. And whatever goes wrong while a
pool of workers is busy ends in one line.

The corpus is small: two clips of each sound of the toy world in each split, and some speech.
"""

import difflib
import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import ROOT
from tests.test_questions import bare, check, command

import prepare
import synth
from prepare import RATE, load_clip, read_rows, score
from synth import EVENTS, RECIPES, SCENES, SPLITS, Dice, make_item, split_of

COUNTS = {"mallm": (84, 40), "jasco": (14, 8), "compa": (24, 16)}  # items of train and of bench


def sound_row(i, split, label):
    dice = Dice(split, 7, i)
    while True:
        wave, known = synth.sound_clip(dice, [label])
        if known["labels"] == [label]:
            break
    licence = ("CC0-1.0", "CC-BY-4.0", "CC-BY-NC-4.0")[i % 3]
    return wave, {**known, "licence": licence, "corpus": "sounds"}


def speech_row(i, split):
    wave, known = synth.speech_clip(Dice(split, 8, i), synth.FORMANT)
    return wave, {**known, "licence": "CC0-1.0", "corpus": "voices"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    (folder / "clips").mkdir()
    made = []
    for split in SPLITS:
        twice = enumerate([*EVENTS, *EVENTS], len(made))
        made += [(split, *sound_row(i, split, label)) for i, label in twice]
        made += [(split, *speech_row(i, split)) for i in range(8)]
    with open(folder / "corpus.jsonl", "w") as file:
        for i, (split, wave, known) in enumerate(made):
            path = f"clips/{i}.flac"
            synth.write_clip(folder / path, wave)
            seconds = round(len(wave) / RATE, 4)
            row = {"id": f"c{i}", "path": path, "split": split, "duration": seconds, **known}
            file.write(json.dumps(row) + "\n")
    return folder / "corpus.jsonl"


def parts_of(corpus):
    return {row["id"]: row for row in map(json.loads, corpus.read_text().splitlines())}


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    """{recipe: the folder that its run wrote}, and how often each clip was written."""
    base, writes = tmp_path_factory.mktemp("recipes"), Counter()
    write_clip = synth.write_clip

    def counted(path, *rest):
        writes[Path(path)] += 1
        write_clip(path, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synth, "write_clip", counted)
        for recipe, (train, bench) in COUNTS.items():
            flags = ("--train", train, "--bench", bench, "--seed", 2, "--workers", 1)
            line = ("--recipe", recipe, "--corpus", corpus, "--out", base / recipe, *flags)
            code, out, err = command(*line)
            assert (code, err) == (0, ""), err
            assert f"train.jsonl: {train} items" in out and f"bench.jsonl: {bench} items" in out
    return base, writes


def items(made, recipe):
    """[(split, item)] as read_rows() gives them."""
    folder = made[0] / recipe
    for name, split in (("train.jsonl", "train"), ("bench.jsonl", "test")):
        for item in read_rows(folder / name):
            yield split, item


# --- a clip as it was written, taken apart


def heard(made, recipe, item, place):
    return load_clip(item["clips"][place - 1], made[0] / recipe).astype(np.float64)


def part_waves(corpus, known, id):
    """The samples of the clips that an id joins by +."""
    return [load_clip(known[part]["path"], corpus.parent) for part in id.split("+")]


def fitted(clip, parts):
    """How much of each part a clip holds, and how much of its power is none of them."""
    table = np.zeros((len(clip), len(parts)))
    for column, part in enumerate(parts):
        table[: min(len(part), len(clip)), column] = part[: len(clip)]
    gains = np.linalg.lstsq(table, clip, rcond=None)[0]
    rest = clip - table @ gains
    powers = np.mean((table * gains) ** 2, axis=0)
    return gains, 10 * np.log10(powers), np.mean(rest**2) / np.mean(clip**2)


def check_both(clip, parts, decibels):
    """Two parts at once, the first so much louder than the second, and nothing else."""
    assert len(clip) == max(map(len, parts))
    gains, powers, rest = fitted(clip, parts)
    assert rest < 1e-4 and min(gains) > 0, (gains, rest)
    assert abs(powers[0] - powers[1] - decibels) < 0.5, powers
    assert abs(np.abs(clip).max() - 0.5) < 1e-3


# --- MALLM


def test_speech_pairs_differ_by_the_edit_that_is_told(made):
    edits = Counter()
    for split, item in items(made, "mallm"):
        if item["task"] != "speech_pair":
            continue
        voices, texts = zip(*(id.split(":") for id in item["meta"]["ids"]))
        assert len(set(voices)) == 1 and voices[0].startswith(split)
        assert {split_of(text) for text in texts} == {split}, texts
        assert [e["says"] for e in item["meta"]["evidence"]] == [f'"{text}"' for text in texts]
        edit, slots = edit_between(*(text.split() for text in texts))
        assert item["meta"]["about"]["edit"] == edit, texts
        assert item["gold"]["value"]["slots"] == slots, texts
        assert item["gold"]["value"]["text"] == item["meta"]["verdict"]
        check_told(item["meta"]["verdict"], texts, edit)
        edits[edit] += 1
    assert min(edits[name] for name in ("add", "delete", "modify", "restructure")) >= 2, edits


def edit_between(a, b):
    """(what was done to a sentence, what has to be said of it)"""
    more, less = Counter(b) - Counter(a), Counter(a) - Counter(b)
    if not more and not less:
        assert a != b
        return "restructure", [["same words"], ["another order"]]
    if more and less:
        old, new = next((x, y) for x, y in zip(a, b) if x != y)
        assert len(a) == len(b) and sum(x != y for x, y in zip(a, b)) == 1
        return "modify", [[old], [new]]
    longer, shorter = (b, a) if more else (a, b)
    steps = [s for s in difflib.SequenceMatcher(None, shorter, longer, False).get_opcodes()
             if s[0] != "equal"]  # fmt: skip
    assert [s[0] for s in steps] == ["insert"] and len(longer) - len(shorter) < 3
    extra = " ".join(longer[steps[0][3] : steps[0][4]])
    return ("add", [["audio 2"], [extra]]) if more else ("delete", [["audio 1"], [extra]])


def check_told(verdict, texts, edit):
    """What is said of each clip is so, and not so of the other."""
    for place, word in re.findall(r'audio (\d) (?:also )?says "(\w+)"', verdict):
        own, other = texts[int(place) - 1].split(), texts[2 - int(place)].split()
        assert own.count(word) > other.count(word), verdict
    assert verdict.count("says") == {"restructure": 0, "modify": 2}.get(edit, 1)


def labels_of(known, id):
    return {known[part]["labels"][0] for part in id.split("+")}


def case_of(one, two, asked_for_common):
    """(the case of MALLM's Table 7, what has to be said): from the sounds of the two clips."""
    both, first, second = one & two, sorted(one - two), sorted(two - one)
    common = [sorted(both)] if both else []
    if asked_for_common:
        return 5, common
    if not both:
        return 2, [first, second]
    if first and second:
        return 4, [*common, first, second]
    if first or second:
        return 3, [*common, ["audio 1" if first else "audio 2"], first or second]
    return 1, common


def test_sound_pairs_are_the_cases_of_the_table_and_hold_what_they_say(made, corpus):
    known, cases = parts_of(corpus), Counter()
    for split, item in items(made, "mallm"):
        if item["task"] != "sound_pair":
            continue
        ids = item["meta"]["ids"]
        assert len(set(ids)) == 2
        assert {known[part]["split"] for id in ids for part in id.split("+")} == {split}
        one, two = (labels_of(known, id) for id in ids)
        case, facts = case_of(one, two, "have in common" in item["question"])
        gold = item["gold"]
        told = [gold["value"]] if gold["type"] == "keywords" else gold["value"]["slots"]
        assert item["meta"]["about"] == {"case": case} and told == facts, item
        check_claims(item["meta"]["verdict"], {1: one, 2: two}, case)
        for place, (id, own) in enumerate(zip(ids, (one, two)), 1):
            says = item["meta"]["evidence"][place - 1]["says"]
            assert set(says.split(", ")) == own
            if "+" in id:
                parts = part_waves(corpus, known, id)
                check_both(heard(made, "mallm", item, place), parts, 0)
        cases[case] += 1
    assert set(cases) == {1, 2, 3, 4, 5}, cases


def check_claims(verdict, own, case):
    """Every clause of a verdict is so."""
    if case == 5:
        assert {verdict} == own[1] & own[2]
        return
    clauses = re.split(r", | and (?=audio)", verdict)
    for clause in clauses:
        if match := re.fullmatch("both have the sound of (.+)", clause):
            assert match[1] in own[1] & own[2]
            continue
        place, label = re.fullmatch(r"audio (\d) (?:also )?has (.+)", clause).groups()
        assert label in own[int(place)] and label not in own[3 - int(place)]
    assert len(clauses) == {1: 1, 2: 2, 3: 2, 4: 3}[case]


def test_what_is_asked_of_one_clip_is_found_again(made, corpus):
    known, kinds = parts_of(corpus), Counter()
    for _, item in items(made, "mallm"):
        if item["skill"] == "single":
            check(item, [known[id] for id in item["meta"]["ids"]])
            kinds[item["task"]] += 1
    assert set(kinds) == {"transcribe", "tag", "caption"}


def test_tasks_are_mixed_as_in_the_table_of_the_paper():
    recipe, thousands = (
        RECIPES["mallm"],
        dict(zip(RECIPES["mallm"].tasks, (24, 26.9, 28.5, 20.7, 5))),
    )
    plan = dict.fromkeys(recipe.tasks, {})
    for start in (0, 54_321):
        numbers = range(start, start + 2000)
        found = Counter(synth.task_of(i, plan, recipe.mix, recipe.single) for i in numbers)
        for task, share in thousands.items():
            assert abs(found[task] / 2000 - share / 105.1) < 0.02, found
    assert list(thousands) == ["speech_pair", "sound_pair", "transcribe", "tag", "caption"]


@pytest.fixture
def silent(monkeypatch):
    """Clips that nobody renders: what an item is about does not depend on them."""
    monkeypatch.setattr(synth, "heard_in", lambda shelf, row: np.ones(8, "f4"))
    monkeypatch.setattr(synth, "write_made", lambda *_: None)
    monkeypatch.setattr(synth, "say", lambda dice, engine, text, speaker, _: (
        np.ones(8, "f4"), {"transcript": text, "speaker": speaker}))  # fmt: skip


def shelf_of(corpus, split, **more):
    shelf = synth.Shelf(corpus.parent, **more)
    for row in parts_of(corpus).values():
        if row["split"] == split:
            shelf.add(row)
    shelf.close()
    return shelf


def many(shelf, split, task, count, sizes=(2,)):
    plan = {task: {n: list(synth.TASKS[task].kinds) for n in sizes}}
    settings = {"split": split, "seed": 1, "mix": {}, "single": 0.0}
    made = [make_item(shelf, plan, settings, i) for i in range(count)]
    assert all(made), "one came to nothing"
    return made


@pytest.mark.parametrize("split", SPLITS)
def test_every_case_and_every_edit_is_as_likely(split, corpus, silent):
    shelf = shelf_of(corpus, split)
    for task, about, options in (("sound_pair", "case", 5), ("speech_pair", "edit", 4)):
        found = Counter(item["meta"]["about"][about] for item in many(shelf, split, task, 500))
        assert len(found) == options
        assert all(abs(n - 500 / options) < 30 for n in found.values()), found


def test_the_clip_with_one_sound_more_is_either(corpus, silent):
    found = Counter()
    for item in many(shelf_of(corpus, "train"), "train", "sound_pair", 500):
        if item["meta"]["about"]["case"] == 3:
            found["+" in item["meta"]["ids"][0]] += 1
    assert min(found[True], found[False]) > 30, found


# --- JASCO


def test_scenes_are_heard_and_belong_to_one_split(made, corpus):
    known, told = parts_of(corpus), defaultdict(set)
    for split, item in items(made, "jasco"):
        voice, text, id = re.fullmatch(r"(.+):(.+)\+(.+)", item["meta"]["ids"][0]).groups()
        scene = next(scene for scene in SCENES if scene.sentence == text)
        label = known[id]["labels"][0]
        assert split_of(text) == split == known[id]["split"] and voice.startswith(split)
        assert re.search(rf"\b({scene.sound})", label)
        value, about = item["gold"]["value"], item["meta"]["about"]
        assert value["text"] == scene.doing and value["slots"] == [scene.keywords.split(", ")]
        assert (about["by_sound"], about["by_speech"]) == (scene.by_sound, scene.by_speech)
        assert item["meta"]["evidence"] == [{"clip": 1, "says": f'{label}, "{text}"'}]
        assert score(item["gold"], scene.doing) == 1
        assert max(score(item["gold"], x) for x in (scene.by_sound, scene.by_speech)) < 1
        clip, sound = heard(made, "jasco", item, 1), part_waves(corpus, known, id)[0]
        gains, powers, rest = fitted(clip, [sound])
        speech = 10 * np.log10(np.mean(clip**2) * rest)
        assert gains[0] > 0 and -1 < speech - powers[0] < 7, (speech, powers)
        told[text].add(split)
    assert len(told) >= 8 and all(len(splits) == 1 for splits in told.values())
    assert all(any(split_of(scene.sentence) == split for scene in SCENES) for split in SPLITS)


def test_a_clip_that_is_not_to_be_had_is_a_miss(capsys):
    def broken(path):
        raise prepare.BadInput(f"{path}: cannot be read")

    with pytest.raises(synth.Miss, match="clips: not to be had"):
        synth.had(broken, "x.wav")
    assert "warning: x.wav: cannot be read" in capsys.readouterr().err
    mistake = prepare.BadInput("no key")
    mistake.status = next(iter(prepare.HOPELESS))
    with pytest.raises(prepare.BadInput, match="no key"):
        synth.had(lambda: (_ for _ in ()).throw(mistake))


def test_a_colour_is_not_added_twice():
    dice = synth.Dice("train", 0, 1)
    told = [synth.add_words(dice, "the dog is red") for _ in range(100)]
    assert all(text.split().count("red") == 1 for text, _ in told)


def test_names_that_begin_alike_are_other_sounds():
    sounds = {scene.doing: re.compile(rf"\b({scene.sound})") for scene in SCENES}
    for label, doing in (("fireworks", "cooking over a fire"), ("french horn", "behind a car"),
                         ("water drop", "along a stream")):  # fmt: skip
        (named,) = [sound for told, sound in sounds.items() if doing in told]
        assert not named.search(label)
    named = sounds["they are cooking over a fire"]
    assert named.search("crackling fire") and named.search("fire")


def test_a_scene_takes_both_the_sound_and_the_sentence():
    """What they are doing is said neither by the sentence nor by the name of the sound; and what
    each suggests by itself scores less than what is so."""
    for scene in SCENES:
        slots = [scene.keywords.split(", ")]
        gold = {"type": "text", "value": {"text": scene.doing, "slots": slots}}
        assert score(gold, scene.doing) == 1
        for other in (scene.by_sound, scene.by_speech, scene.sentence):
            assert score(gold, other) < 0.5, (scene.doing, other)
    assert (
        len({scene.sentence for scene in SCENES}) == len({s.doing for s in SCENES}) == len(SCENES)
    )


# --- CompA

PHRASES = {event.phrase: label for label, event in EVENTS.items()}
CAPTIONS = (  # (how a caption is put, what it says: the first so much louder, None for in a row)
    (r"(.+), then (.+)", None),
    (r"(.+) and (.+) at the same time", 0),
    (r"loud (.+) and soft (.+)", 12),
    (r"(.+) and (.+), equally loud", 0),
)


def read_caption(text):
    """(the two sounds in their order, how much louder the first is)"""
    for form, louder in CAPTIONS:
        if match := re.fullmatch(form, text):
            return [PHRASES.get(name, name) for name in match.groups()], louder
    raise AssertionError(text)


def check_row(clip, parts):
    """One after the other, a tenth of a second between."""
    (_, a, rest), (_, b, other) = (
        fitted(clip[: len(parts[0])], parts[:1]),
        fitted(clip[len(parts[0]) + RATE // 10 :], parts[1:]),
    )
    assert len(clip) == len(parts[0]) + RATE // 10 + len(parts[1])
    assert max(rest, other) < 1e-4 and not clip[len(parts[0]) :][: RATE // 10].any()
    assert np.isfinite([*a, *b]).all()


def test_captions_of_composed_clips_are_what_is_heard(made, corpus):
    known, put, sizes = parts_of(corpus), Counter(), Counter()
    for split, item in items(made, "compa"):
        captions, ids = item["meta"]["captions"], item["meta"]["ids"]
        assert len(captions) == len(item["clips"]) == len(set(captions))
        assert [e["says"] for e in item["meta"]["evidence"]] == captions
        assert sorted(item["choices"]) == sorted(captions)
        place = int(re.search(r"caption .+? audio (\d):", bare(item["question"]))[1])
        assert item["gold"]["value"] == captions[place - 1]
        assert re.findall('"(.+?)"', item["question"]) == item["choices"]
        assert len(set(ids)) == 1 and {known[x]["split"] for x in ids[0].split("+")} == {split}
        waves = part_waves(corpus, known, ids[0])
        by_label = dict(zip((known[x]["labels"][0] for x in ids[0].split("+")), waves))
        for number, caption in enumerate(captions, 1):
            names, louder = read_caption(caption)
            parts, clip = [by_label[name] for name in names], heard(made, "compa", item, number)
            check_row(clip, parts) if louder is None else check_both(clip, parts, louder)
            put[caption.count(" then "), caption.count("loud "), caption.count("equally")] += 1
        sizes[item["task"], len(captions)] += 1
    assert len(put) == 4 and len(sizes) == 4, (put, sizes)


@pytest.mark.parametrize("task", ["compa_order", "compa_attribute"])
def test_no_choice_is_more_frequent(task, corpus, silent):
    found = defaultdict(Counter)
    for item in many(shelf_of(corpus, "train"), "train", task, 600, (2, 3)):
        right, n = item["gold"]["value"], len(item["clips"])
        found["choice", n][item["choices"].index(right)] += 1
        found["clip", n][item["meta"]["captions"].index(right)] += 1
    for (_, n), counts in found.items():
        total = sum(counts.values())
        assert len(counts) == n and all(abs(c - total / n) < 50 for c in counts.values()), found


# --- of all three


@pytest.mark.parametrize("recipe", COUNTS)
def test_items_are_read_back_and_come_out_right(recipe, made, corpus):
    known, used = parts_of(corpus), set()
    for split, item in items(made, recipe):
        assert score(item["gold"], item["answer"]) == 1 and item["id"].startswith(split)
        names = [part for id in item["meta"]["ids"] for part in id.split("+")]
        licences = {known[x]["licence"] if x in known else "CC0-1.0" for x in names}
        assert item["licences"] == sorted(licences)
        corpora = {known[x]["corpus"] if x in known else "voice-formant" for x in names}
        assert item["source"] == "+".join(sorted(corpora))
        assert {known[x]["split"] for x in names if x in known} <= {split}
        own = [clip for clip in item["clips"] if clip.startswith("clips/")]
        assert own == [f"clips/{item['id']}-{k}.flac" for k, clip in enumerate(item["clips"], 1)
                       if clip in own]  # fmt: skip
        used |= {made[0] / recipe / clip for clip in own}
    there = set((made[0] / recipe / "clips").iterdir())
    assert there == used and len(used) > 10
    assert {path: n for path, n in made[1].items() if path in used} == dict.fromkeys(used, 1)


def test_licences_of_parts_are_all_there(made):
    several = [item for _, item in items(made, "compa") if len(item["licences"]) > 1]
    assert len(several) > 5


def ruled(rows, split, **more):
    """A shelf of rows that only have a lone sound each."""
    shelf = synth.Shelf(**more)
    for i, label in enumerate(rows):
        shelf.add({"id": f"r{i}", "path": f"{i}.flac", "corpus": "x", "split": split,
                   "duration": 1.0, "licence": "CC0-1.0", "labels": [label]})  # fmt: skip
    shelf.close()
    return shelf


@pytest.mark.parametrize("task", ["sound_pair", "compa_order", "compa_attribute"])
def test_names_that_may_mean_the_same_sound_are_not_told_apart(task, silent):
    shelf = ruled(["Rain", "Rain on surface", "Bell", "Siren"] * 3, "train")
    met = Counter()
    for item in many(shelf, "train", task, 120):
        told = " ".join(e["says"] for e in item["meta"]["evidence"])
        found = {name for name in ("Rain on surface", "Bell", "Siren") if name in told}
        found |= {"Rain"} if "Rain" in told.replace("Rain on surface", "") else set()
        assert not {"Rain", "Rain on surface"} <= found, told
        met.update(found)
    assert len(met) == 4


def test_a_clip_without_sound_is_no_part(monkeypatch):
    waves = {f"{i}.flac": np.random.default_rng(i).uniform(-0.3, 0.3, 900 + i) for i in range(9)}
    waves["4.flac"] = np.zeros(900)
    written = []
    monkeypatch.setattr(synth, "load_clip", lambda clip, root: waves[clip].astype("f4"))
    monkeypatch.setattr(synth, "write_made", lambda shelf, id, rows: written.extend(rows))
    shelf = ruled(["rain", "bell", "siren"] * 3, "train")
    for task in ("sound_pair", "compa_order", "compa_attribute"):
        many(shelf, "train", task, 60)
    mixes = [row for row in written if "wave" in row]
    assert all(np.isfinite(row["wave"]).all() for row in mixes)
    used = {part for row in mixes for part in row["id"].split("+")}
    assert used == {f"r{i}" for i in range(9)} - {"r4"}


# --- sentences of a file

UNUSABLE = """\
only three words
a line of much more words than fourteen is left out because it is too long
this line has 5 digits 1234
\u0432\u0456\u043d \u043c\u0430\u0454 \u0441\u043e\u0431\u0430\u043a\u0443 \u0434\u043e\u043c\u0430
the caf\u00e9 is at the corner
- - - - hello
** * -- ** * --
' ' ' ' ' '
the word is aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
"""
NAMES = "zyxomma quokka oryx jabiru vlei".split()  # words that no lexicon has
USABLE = [f"the {name} and a {x} are at the {y}" for name in NAMES
          for x in synth.WORDS["animal"].split() for y in synth.WORDS["place"].split()]  # fmt: skip


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("book") / "book.txt"
    lines = [f"{line.capitalize()}." for line in USABLE]
    lines[0] = f"'{lines[0]}'"  # somebody says it
    path.write_text("\n".join(lines) + "\n" + UNUSABLE)
    return path


def test_lines_go_to_splits_by_checksum_and_unusable_ones_nowhere(book):
    found = {split: synth.read_sentences(book, split) for split in SPLITS}
    assert sorted(line for lines in found.values() for line in lines) == sorted(USABLE)
    for split, lines in found.items():
        assert all(split_of(line) == split for line in lines)
        assert abs(len(lines) / len(USABLE) - {"train": 0.6}.get(split, 0.2)) < 0.1


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_are_made_of_the_sentences_of_the_file(split, book, corpus, silent):
    shelf = shelf_of(corpus, split, sentences=synth.read_sentences(book, split))
    edits, known = Counter(), set(USABLE)
    for item in many(shelf, split, "speech_pair", 120):
        texts = [id.partition(":")[2] for id in item["meta"]["ids"]]
        edit, slots = edit_between(*(text.split() for text in texts))
        assert known & set(texts) and {split_of(text) for text in texts} == {split}
        assert item["gold"]["value"]["slots"] == slots
        edits[edit] += 1
    assert min(edits[edit] for edit in ("add", "delete", "modify", "restructure")) > 15, edits


def test_uncommon_words_are_spoken_letter_by_letter(corpus):
    shelf, dice = synth.Shelf(corpus.parent), Dice("train", 1)
    speaker = synth.speakers(synth.FORMANT, "train")[0]
    row = synth.spoken(shelf, dice, "the quokka is at the zyxomma now", speaker)
    assert not {"quokka", "zyxomma"} & synth.LEXICON.keys()
    wave = row["wave"][RATE // 10 :]
    for word in ("quokka", "zyxomma"):
        on, off = next(span[1:] for span in row["words"] if span[0] == word)
        inside = [name for name, a, b in row["phones"] if on - 1e-6 <= a and b <= off + 1e-6]
        assert inside == synth.pronounce(word) and len(inside) > 3
        said = wave[int(on * RATE) : int(off * RATE)]
        assert np.sqrt(np.mean(said**2)) > 0.1 * np.sqrt(np.mean(wave**2))


def run(recipe, corpus, out, *flags):
    return command("--recipe", recipe, "--corpus", corpus, "--out", out, *flags)


def test_a_file_of_sentences_feeds_a_run(book, corpus, tmp_path):
    flags = ("--sentences", book, "--train", 30, "--bench", 0, "--workers", 1)
    code, _, err = run("mallm", corpus, tmp_path / "q", *flags)
    assert (code, err) == (0, "")
    pairs = [r for r in read_rows(tmp_path / "q/train.jsonl") if r["task"] == "speech_pair"]
    said = [{id.partition(":")[2] for id in row["meta"]["ids"]} for row in pairs]
    assert len(pairs) > 4 and all(texts & set(USABLE) for texts in said)


def test_a_file_without_sentences_is_one_line(corpus, tmp_path):
    (tmp_path / "none.txt").write_text(UNUSABLE)
    for path in (tmp_path / "none.txt", tmp_path / "nowhere.txt", tmp_path):
        flags = ("--sentences", path, "--train", 9, "--bench", 0, "--workers", 1)
        code, out, err = run("mallm", corpus, tmp_path / "q", *flags)
        assert code == 2 and out == "" and err.count("\n") == 1 and str(path) in err, err


def test_a_half_written_file_of_other_sentences_is_another(book, corpus, tmp_path):
    other = tmp_path / "book.txt"
    settings = {"corpus": [str(corpus)], "sentences": str(other)}
    found = set()
    for text in (book.read_text(), book.read_text().replace("quokka", "wombat")):
        other.write_text(text)
        found.add(synth.fingerprint(settings))
    assert len(found) == 2
    assert synth.fingerprint({**settings, "sentences": None}) not in found


# --- the same bytes, whoever writes them


def tree(folder):
    """{file: a hash of it}, locks aside."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest() for path in files
    }


@pytest.mark.parametrize("recipe", COUNTS)
@pytest.mark.parametrize("how", ["workers", "shards"])
def test_clips_and_items_do_not_depend_on_who_makes_them(how, recipe, made, corpus, monkeypatch):
    monkeypatch.setattr(synth, "CHUNK", 7)
    (train, bench), out = COUNTS[recipe], made[0] / f"{recipe}-{how}"
    flags = ["--train", train, "--bench", bench, "--seed", 2]
    if how == "workers":
        assert run(recipe, corpus, out, *flags, "--workers", 2)[0] == 0
    for shard in (3, 1, 2) if how == "shards" else ():
        assert run(recipe, corpus, out, *flags, "--workers", 1, "--shard", f"{shard}/3")[0] == 0
    assert tree(out) == tree(made[0] / recipe)


LINE = "import sys, prepare, synth; synth.CHUNK = 4; prepare.cli(synth.main)"
FLAGS = ("--train", 400, "--bench", 0, "--seed", 6)


class Running:
    """The command with two workers, at work on its items."""

    def __init__(self, corpus, out):
        words = ["--recipe", "mallm", "--corpus", corpus, "--out", out, *FLAGS, "--workers", 2]
        self.started = subprocess.Popen(
            [sys.executable, "-c", LINE, *map(str, words)], cwd=ROOT, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        end = time.monotonic() + 60
        while not any(part.read_bytes().count(b"\n") > 20 for part in out.glob("*.part")):
            assert time.monotonic() < end and self.started.poll() is None
            time.sleep(0.01)

    def workers(self):
        """Their ids, as long as they live."""
        listed = subprocess.run(["ps", "-eo", "sid=,pid=,stat="], capture_output=True, text=True)
        rows = [line.split() for line in listed.stdout.splitlines()]
        ours = [int(pid) for sid, pid, state in rows if int(sid) == self.started.pid
                and state[0] != "Z"]  # fmt: skip
        return [pid for pid in ours if pid != self.started.pid]

    def end(self):
        """(exit code, what it said on stderr), once nobody is left."""
        err = self.started.communicate(timeout=60)[1]
        end = time.monotonic() + 20
        while self.workers():
            assert time.monotonic() < end, "workers outlive who started them"
            time.sleep(0.05)
        return self.started.returncode, err


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "q"
    assert run("mallm", corpus, out, *FLAGS, "--workers", 1)[0] == 0
    return tree(out)


def check_goes_on(corpus, out, whole):
    """The same command goes on, does not begin again, and comes to the same bytes."""
    (part,) = out.glob("*.part")
    kept, done = part.read_bytes().count(b"\n"), Counter()
    make_one = synth.make_item

    def counted(shelf, plan, settings, i):
        done[i] += 1
        return make_one(shelf, plan, settings, i)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synth, "CHUNK", 4)
        patch.setattr(synth, "make_item", counted)
        code, _, err = run("mallm", corpus, out, *FLAGS, "--workers", 1)
    assert (code, err) == (0, "") and kept >= 20
    assert 0 < len(done) <= 400 - kept + 4 and min(done) >= kept - 4
    assert tree(out) == whole


@pytest.mark.long
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(corpus, whole, tmp_path):
    running = Running(corpus, tmp_path / "q")
    running.started.kill()
    assert running.end() == (-signal.SIGKILL, "")
    check_goes_on(corpus, tmp_path / "q", whole)


@pytest.mark.long
def test_ctrl_c_is_quiet_and_the_same_command_goes_on(corpus, whole, tmp_path):
    running = Running(corpus, tmp_path / "q")
    os.killpg(running.started.pid, signal.SIGINT)  # as a terminal does
    code, err = running.end()
    assert code == 130 and "Traceback" not in err and err.count("\n") <= 1, err
    check_goes_on(corpus, tmp_path / "q", whole)


@pytest.mark.long
def test_a_worker_that_is_killed_is_one_line(corpus, whole, tmp_path):
    running = Running(corpus, tmp_path / "q")
    os.kill(max(running.workers()), signal.SIGKILL)
    code, err = running.end()
    assert code == 2 and err.count("\n") == 1 and "--workers 2" in err and "killed" in err, err
    check_goes_on(corpus, tmp_path / "q", whole)


# --- disks


@pytest.mark.parametrize("workers", [1, 2])
def test_a_folder_that_cannot_be_written_is_one_line(workers, corpus, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "q").mkdir()
    (tmp_path / "q/clips").write_text("")  # where the clips' folder should be
    for out in (tmp_path / "file", tmp_path / "file/q", Path("/proc/nowhere"), tmp_path / "q"):
        flags = ("--train", 8, "--bench", 0, "--workers", workers)
        code, printed, err = run("compa", corpus, out, *flags)
        assert code == 2 and printed == "" and err.count("\n") == 1 and str(out) in err, err
        assert not list(tmp_path.rglob("train.jsonl"))


class Full:
    """A file on a disk that takes no more."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def fileno(self):
        return self.file.fileno()

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full(path, *rest, **more):
    file = open(path, *rest, **more)
    return Full(file) if "a" in "".join(rest[:1]) and str(path).endswith(".part") else file


def no_room(path, data):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("what", ["items", "clips"])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    what, workers, made, corpus, monkeypatch
):
    (train, bench), out = COUNTS["compa"], made[0] / f"full-{what}-{workers}"
    flags = ("--train", train, "--bench", bench, "--seed", 2, "--workers", workers)
    with monkeypatch.context() as patch:
        if what == "items":
            patch.setattr(synth, "open", full, raising=False)
        else:
            patch.setattr(Path, "write_bytes", no_room)
        code, printed, err = run("compa", corpus, out, *flags)
    assert code == 2 and printed == "" and err.count("\n") == 1, err
    assert os.strerror(errno.ENOSPC) in err
    assert run("compa", corpus, out, *flags)[0] == 0
    assert tree(out) == tree(made[0] / "compa")
