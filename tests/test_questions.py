"""What synth.py promises about the questions that it asks.

Every gold is found a second time, by a path that shares nothing with the first: the question is
read as a stranger would read it, what each clip says is looked up in its row, and a rule of a line
or two judges. The same rule, fed with what the evidence says of each clip, must come to the same
verdict, and so must it after the clips have changed places. It must also be possible to fill up any
one clip of an item with others so that the answer is another: who hears one clip only must not
know. A question alone must not tell the answer, no answer may be more frequent than chance has it,
and train and test ask about other clips in other sentences.

The rows are those of a toy world whose samples nobody renders; files are written where somebody
reads them.
"""

import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict, namedtuple
from contextlib import redirect_stderr, redirect_stdout
from functools import cache

import numpy as np
import pytest
import soundfile
from tests.conftest import ROOT

import prepare
import synth
from prepare import RATE, chance, read_rows, score, view_as_text, view_permute
from synth import EVENTS, FORMS, RECIPES, SPLITS, WORDS, make_item, phrasings, plan_tasks

CLIPS = 9000  # of each world
SEEDS = (3, 4)
TASKS = {task: synth.TASKS[task] for task in RECIPES["polyaudio"].tasks}
SINGLE = [task for task in TASKS if TASKS[task].skill == "single"]
SEVERAL = [task for task in TASKS if task not in SINGLE]


# --- worlds without sound, and their items


@cache
def silent_rows(seed):
    """The rows of a world as make_clip writes them, in a twentieth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        flat = {
            "make_event": lambda dice, seconds, layers: np.ones(
                int(seconds * 1000) * synth.MS, "f4"
            ),
            "play": lambda dice, n, *_: np.ones(n, "f4"),
            "utter": lambda segments, ends, *_: np.ones(round(ends[-1] * RATE), "f4"),
            "shaped_noise": lambda dice, n, gain: np.ones(n, "f4"),
            "DEGRADATIONS": {
                label: (lambda wave, strength, dice: wave, *others)
                for label, (_, *others) in synth.DEGRADATIONS.items()
            },
        }
        for name, value in flat.items():
            patch.setattr(synth, name, value)
        return [synth.make_clip(seed, i)[1] for i in range(CLIPS)]


class Deck:
    """A split's clips: on synth's shelf, and by id for us."""

    def __init__(self, rows, split):
        self.split, self.rows = split, [row for row in rows if row["split"] == split]
        self.by_id = {row["id"]: row for row in self.rows}
        self.having = defaultdict(list)
        for row in self.rows:
            for key in holdings(row):
                self.having[key].append(row)
        self.shelf = synth.Shelf()
        for row in self.rows:
            self.shelf.add(row)
        self.shelf.close()
        self.plan = plan_tasks(self.shelf, split, list(TASKS), 5)

    def items(self, task, count, seed=0):
        """`count` items of one task, each with its rows."""
        settings = {"split": self.split, "seed": seed, "mix": synth.MIX, "single": 0.5}
        for i in range(count):
            item = make_item(self.shelf, {task: self.plan[task]}, settings, i)
            assert item, f"{task} {i} came to nothing"
            yield item, [self.by_id[id] for id in item["meta"]["ids"]]


@cache
def deck(seed, split):
    return Deck(silent_rows(seed), split)


# --- a second path to every answer: what a question asks, what a row says, what a text says


class Unclear(Exception):
    """Asked of these clips, the question has no answer, or more than one."""


def clear(holds):
    if not holds:
        raise Unclear


def bare(question):
    """The question without the line that says where the clips are."""
    question = re.sub(r"^Here are \w+ clips: [^\n]*\n", "", question)
    return re.sub(r"\n<sound-[^\n]*$", "", question)


def spoken(row):
    clear("transcript" in row)
    return re.findall(r"[\w']+", row["transcript"].lower())


def content(words):
    """Those that are no function words."""
    return list(dict.fromkeys(w for w in words if w not in synth.STOP and len(w) > 1))


def quoted(text):
    return re.search('"(.*)"', text)[1]


def labels(row):
    """What sounds in a clip, as far as it is known: none is known of an unlabelled one."""
    clear(row.get("labels") and "music" not in row)
    return [x for x in dict.fromkeys(row["labels"]) if x != "speech" or "transcript" not in row]


def is_sound(row):
    return "transcript" not in row and "music" not in row and "labels" in row


def related(label, others):
    """Labels that may well be the same sound by another name."""
    return [
        o
        for o in others
        if o != label and (label.lower() in o.lower() or o.lower() in label.lower())
    ]


def has(row, thing):
    """Whether a word is said or a sound is heard in a clip."""
    if match := re.fullmatch('the word "(.+)"', thing):
        return match[1] in spoken(row)
    label = thing.removeprefix("the sound of ")
    clear(is_sound(row) and not related(label, labels(row)))
    return label in labels(row)


def told_has(text, thing):
    name = thing.removeprefix("the word ").removeprefix("the sound of ")
    return {name: True, f"no {name}": False}[text]


def count(row, label):
    clear(is_sound(row) and not related(label, labels(row)))
    clear("events" in row or label not in labels(row))
    return sum(name == label for name, _, _ in row.get("events", ()))


def told_count(text, label):
    often = {"once": 1, "twice": 2, "three times": 3, "four times": 4, "five times": 5}
    return 0 if text == f"no {label}" else often[text.removeprefix(f"{label} ")]


def onset(row, label, first):
    """When it begins; without "the first" nobody knows which one is meant, unless there is one."""
    clear(is_sound(row) and not related(label, labels(row)))
    starts = [on for name, on, _ in row["events"] if name == label]
    clear(starts and (first or len(starts) == 1))
    return min(starts)


def field(*path):
    def find(row, *_):
        for name in path:
            clear(name in row)
            row = row[name]
        return row

    return find


def figure(text, *_):
    return float(re.search(r"-?\d+(\.\d+)?", text)[0])


def speed(row):
    """With what it could be called instead, near a border."""
    tempo = field("music", "tempo")(row)
    names = ("slow", 0, 106), ("medium", 95, 147), ("fast", 134, 999)
    return [name for name, low, high in names if low <= tempo <= high]


def pace(row, *_):
    clear(len(spoken(row)) > 11)
    return len(spoken(row)) / row["duration"]


def snr(row, *_):
    clear("transcript" in row and row["quality"].get("label") == "noise")
    return row["quality"]["strength"]


MOST = "most latest fastest quickest happiest best highest longest strongest".split()
LEAST = "least earliest slowest fewest saddest worst deepest lowest shortest weakest".split()
ENDS = {**dict.fromkeys(MOST, 1), **dict.fromkeys(LEAST, -1)}
NUMBER = dict(zip(synth.DIGIT_WORDS, range(11)))
CLIP = "(?:audio|clip|recording)"
# How it is asked, heard and told, by what factor or step the first must lead the second, and how
# much is lost in the telling. The last group that matched is the end that is asked for.
Scale = namedtuple("Scale", "asked hear told factor step lost")
SCALES = [
    Scale(f"In which {CLIP} (?:is|do you hear) the (.+?)(?: heard)? (most|least) often",
          lambda row, label, end: count(row, label),
          lambda text, label, end: told_count(text, label), 1, 1, 0),
    Scale(f"In which {CLIP} does the (first )?(.+?) (?:come|begin) (latest|earliest)",
          lambda row, first, label, end: onset(row, label, first or end == "earliest"),
          lambda text, first, label, end: figure(text.removeprefix(label)), 1, 0.25, 0.06),
    Scale(f"Which {CLIP} (?:has|holds|contains) the (most|fewest) different sounds",
          lambda row, end: len(labels(row)) if is_sound(row) and "events" in row else clear(False),
          lambda text, end: NUMBER[text.rpartition(": ")[2]], 1, 1, 0),
    Scale(f"Which {CLIP} has the (fastest|quickest|slowest) (?:music|tempo)",
          field("music", "tempo"), figure, 1.1, 0, 2.6),
    Scale(f"Which {CLIP} has the (?:music with the )?(most|least) (?:energetic music|energy)",
          field("music", "energy"), figure, 1, 0.1, 0.006),
    Scale(f"Which {CLIP} (?:has|holds) the (most|least|happiest|saddest)(?: cheerful)? music",
          field("music", "valence"), figure, 1, 0.1, 0.006),
    Scale(f"Which {CLIP} (?:is|sounds) (best|worst) to dance to",
          field("music", "danceability"), figure, 1, 0.1, 0.006),
    Scale(f"Which {CLIP} has the (?:voice with the )?(highest|deepest|lowest) (?:voice|pitch)",
          field("voice", "f0"), figure, 1.1, 0, 2.6),
    Scale(f"In which {CLIP} (?:are|do you hear) the (most|fewest) words(?: said)?",
          lambda row, end: len(spoken(row)),
          lambda text, end: NUMBER[text.removesuffix(" words")], 1, 1, 0),
    Scale(f"In which {CLIP} does (?:somebody|the speaker) (?:speak|talk) (fastest|slowest)",
          pace, figure, 1.2, 0, 0.06),
    Scale(f"Which {CLIP} (?:is the|lasts) (longest|shortest)", field("duration"), figure,
          1.1, 0.3, 0.06),
    Scale(f"Which {CLIP} has the (best|worst) (?:overall|speech) quality",
          field("quality", "overall_quality"), figure, 1, 1, 0),
    # noise is told as the decibels of the voice above it, and so the other way round
    Scale(f"Which {CLIP} has the (least|most|weakest|strongest) noise behind the (?:voice|speech)",
          lambda row, end: -snr(row), lambda text, end: -figure(text), 1, 3, 0.6),
]  # fmt: skip


def leader(scale):
    """The clip that has the most, or least, by enough that one may be asked to hear it."""

    def judge(values, *names):
        order = sorted(range(len(values)), key=lambda i: -ENDS[names[-1]] * values[i])
        best, second = (abs(values[i]) for i in order[:2])
        clear(abs(best - second) >= scale.step and max(best, second) > min(best, second))
        clear(max(best, second) >= scale.factor * min(best, second))
        return order[0] + 1

    return judge


# What clips are one of: (noun, plural, of a row, of a text)


def lone(row, *_):
    clear(is_sound(row) and len(labels(row)) == 1)
    return labels(row)[0]


def group(row, *_):
    clear(lone(row) in EVENTS and EVENTS[lone(row)].group != "other")
    return EVENTS[lone(row)].group


def lone_speed(row, *_):
    clear(len(speed(row)) == 1)
    return speed(row)[0]


def last(text, *_):
    return text.rpartition(", ")[2]


def as_told(text, *_):
    return text


CATEGORIES = {
    "sound": lone, "kind of sound": group, "instrument": field("music", "instrument"),
    "musical mode": field("music", "mode"), "musical speed": lone_speed,
    "musical dynamics": field("music", "dynamics"), "language": field("music", "language"),
    "speaker": field("speaker"), "mood of the voice": field("emotion"),
    "fault of the recording": field("quality", "label"),
}  # fmt: skip
PLURALS = {
    "kinds of sound": "kind of sound", "moods of the voice": "mood of the voice",
    "musical dynamics": "musical dynamics",
}  # fmt: skip


def of_category(row, noun, *_):
    noun = noun if noun in CATEGORIES else PLURALS.get(noun, noun.removesuffix("s"))
    return CATEGORIES[noun](row)


def told_category(text, noun, *_):
    return last(text) if noun in ("kind of sound", "kinds of sound") else text


def exception(values, noun="", *_):
    """Where all are alike but one."""
    clear(noun != "sound" or not any(related(value, values) for value in values))
    often = Counter(values).most_common()
    clear(len(often) == 2 and often[1][1] == 1 and often[0][1] > 1)
    return values.index(often[1][0]) + 1


def twins(values, *_):
    often = Counter(values).most_common()
    clear(often[0][1] == 2 and all(n == 1 for _, n in often[1:]) and len(often) > 1)
    return frozenset(i for i, value in enumerate(values, 1) if value == often[0][0])


def yes_if(holds):
    return "yes" if holds else "no"


def whose(row, said, *_):
    return field("speaker")(row), spoken(row) == spoken({"transcript": said})


def told_whose(text, said, *_):
    return text.partition(", ")[0], text.endswith(f', "{said}"')


def again(values, *_):
    speakers = [voice for voice, is_quoted in values if is_quoted]
    clear(len(speakers) == 1)
    return yes_if(sum(voice == speakers[0] for voice, _ in values) > 1)


def common(values, *_):
    """Words that all share."""
    shared = [word for word in values[0] if all(word in other for other in values)]
    clear(1 <= len(shared) <= 2)
    return frozenset(shared)


# Sentences that state something, and questions and claims about it.


def one_of(kind):
    return f"({WORDS[kind].replace(' ', '|')})"


ANIMAL, PERSON = one_of("animal"), one_of("person")
FACTS = {  # (whom, what), but for those in which what comes first
    "colour": f"the {ANIMAL} is {one_of('colour')}",
    "place": f"the ({ANIMAL[1:-1]}|{PERSON[1:-1]}) is at the {one_of('place')}",
    "age": f"the {PERSON} is {one_of('number')}",
    "number": f"i see {one_of('number')} {one_of('object')}s",
    "wish": f"the {PERSON} wants the {one_of('object')}",
    "weather": f"it is {one_of('weather')} at the {one_of('place')}",
    "mood": f"the {PERSON} is {one_of('mood')}",
    "pet": f"the {PERSON} has a {ANIMAL}",
}
TOPICS = {
    "colour": r"wh(?:at|ich) colour the (\w+) is", "place": r"where the (\w+) is",
    "age": r"(?:how old|the age of) the (\w+)(?: is)?",
    "number": r"(?:how many|the number of) (\w+)s(?: there are)?",
    "wish": r"what the (\w+) (?:wants|would like)", "pet": r"wh(?:at|ich) animal the (\w+) has",
    "weather": r"(?:how the weather is|what the weather is like) at the (\w+)",
    "mood": r"how the (\w+) (?:is|feels)",
}  # fmt: skip
CLAIMS = [  # (claim, what is known of whoever it is about, of what kind they are, what is claimed)
    (r"the (?P<known>\w+) animal is at the (?P<claimed>\w+)", "colour", "animal", "place"),
    (r"the animal at the (?P<known>\w+) is (?P<claimed>\w+)", "place", "animal", "colour"),
    (r"the person who is (?P<known>\w+) is at the (?P<claimed>\w+)", "age", "person", "place"),
    (r"the (?P<known>(?!animal)\w+) person is at the (?P<claimed>\w+)", "mood", "person", "place"),
    (r"the person who wants the (?P<known>\w+) is (?P<claimed>\w+)", "wish", "person", "age"),
    (r"the person who wants the (?P<known>\w+) is at the (?P<claimed>\w+)",
     "wish", "person", "place"),
    (r"the person who has a (?P<known>\w+) is (?P<claimed>\w+)", "pet", "person", "age"),
    (r"the person who has a (?P<known>\w+) is at the (?P<claimed>\w+)", "pet", "person", "place"),
    # from here on it is the other end of the first fact that the claim is about
    (r"it is (?P<claimed>\w+) where the (?P<known>\w+) is", "at place", "place", "weather"),
    (r"the animal of the (?P<known>\w+) is (?P<claimed>\w+)", "at pet", "animal", "colour"),
    (r"the animal of the (?P<known>\w+) is at the (?P<claimed>\w+)", "at pet", "animal", "place"),
]  # fmt: skip


def read_fact(sentence):
    """(relation, whom, what), or nothing that can be asked about."""
    for relation, form in FACTS.items():
        if match := re.fullmatch(form, sentence):
            whom, what = (
                match.groups() if relation not in ("number", "weather") else match.groups()[::-1]
            )
            return relation, whom, what
    return None


def fact(row, *_):
    return read_fact(" ".join(spoken(row)))


def told_fact(text, *_):
    return read_fact(quoted(text))


def follows(facts, claim):
    """Who is meant, and whether what is claimed is so, not so, or not told."""
    for form, first, kind, second in CLAIMS:
        if match := re.fullmatch(form, claim):
            break
    by_whom, first = first.startswith("at "), first.removeprefix("at ")
    pairs = [f[1:] if by_whom else f[:0:-1] for f in facts if f and f[0] == first]
    meant = {other for known, other in pairs if known == match["known"]}
    meant = {who for who in meant if who in WORDS[kind].split()}
    clear(len(meant) < 2)
    found = {
        what for relation, whom, what in filter(None, facts) if relation == second and whom in meant
    }
    clear(len(found) < 2)
    return yes_if(match["claimed"] in found) if found else "nei"


def topic(text):
    return next((name, m[1]) for name, form in TOPICS.items() if (m := re.fullmatch(form, text)))


def stated(row, about, *_):
    """What a clip says about a topic; that it says something of the kind is given."""
    relation, whom = topic(about)
    found = fact(row)
    clear(found and found[:2] == (relation, whom))
    return found[2]


def told_stated(text, about, *_):
    return quoted(text)


def mention(row, about, *_):
    """What a clip says about a topic, None if that is not what it is about at all."""
    relation, whom = topic(about)
    found = fact(row)
    if found and found[:2] == (relation, whom):
        return found[2]
    clear(whom not in spoken(row) and f"{whom}s" not in spoken(row))
    return None


def told_mention(text, about, *_):
    return None if text == "something else" else mention({"transcript": quoted(text)}, about)


def lone_place(values):
    places = [i for i, value in enumerate(values, 1) if value not in (None, False)]
    clear(len(places) == 1)
    return places[0]


# What comes after what: by the row's place in its group, or by what is said in it.

SCRIPTS = [
    ["in the morning .+", "at noon .+", "in the evening .+", "at night .+"],
    [f"{nth} take the .+" for nth in "first second third fourth fifth".split()],
    [rf"{n} \w+ at the \w+" for n in "one two three four".split()],
    [r"where is the \w+ \w+", rf"the {one_of('object')} is at the \w+", r"is the \w+ at the \w+",
     r"yes with a .+"],
    [r"who wants .+", rf"the {PERSON} wants {one_of('number')} \w+s", r"is the \w+ at the \w+",
     r"no the \w+ is at the \w+"],
    [r"what has the .+", rf"the {PERSON} has a {one_of('colour')} \w+", r"has the .+",
     r"no the \w+ has .+"],
    [r"is it \w+ at .+", r"no it is .+", r"and where is .+", r"at the \w+ with .+"],
    *map(list, synth.PROCESSES),
]  # fmt: skip


def place(row, *_):
    if "order" in row:
        return row["order"]["group"], row["order"]["index"]
    clear("dialogue" in row)
    return row["dialogue"]["id"], row["dialogue"]["turn"]


def steps(text, *_):
    """{script: its step} for all scripts that a text can be of."""
    line = text.strip('"')
    found = ((i, [re.fullmatch(form, line) for form in s]) for i, s in enumerate(SCRIPTS))
    return {
        i: [bool(match) for match in matches].index(True) for i, matches in found if any(matches)
    }


def in_order(values, *_):
    if isinstance(values[0], dict):  # as told: there is one script that all are of
        shared = set.intersection(*map(set, values))
        clear(len(shared) == 1)
        values = [(0, value[min(shared)]) for value in values]
    clear(len({group for group, _ in values}) == 1 and len(set(values)) == len(values))
    return tuple(i + 1 for i in sorted(range(len(values)), key=lambda i: values[i]))


# When something is heard.


def times(row, thing, *_):
    if match := re.fullmatch('the word "(.+)"', thing):
        if match[1] not in spoken(row):
            return ()
        clear("words" in row)
        return tuple((on, off) for word, on, off in row["words"] if word == match[1])
    clear("events" in row or not has(row, thing))
    label = thing.removeprefix("the sound of ")
    return tuple((on, off) for name, on, off in row.get("events", ()) if name == label)


def told_times(text, thing, *_):
    return tuple((float(a), float(b)) for a, b in re.findall(r"from ([\d.]+) to ([\d.]+) s", text))


def only_time(values, *_):
    places = [i for i, spans in enumerate(values, 1) if spans]
    clear(len(places) == 1 and len(values[places[0] - 1]) == 1)
    return (places[0], *values[places[0] - 1][0]) if len(values) > 1 else values[0][0]


# What is heard at all.

SPEEDS = ("slow", "medium", "fast")


def facts(row, *_):
    """What a caption has to name. (A tempo may go unnamed, and is left out on both sides.)"""
    if "transcript" in row:
        return frozenset(content(spoken(row)) + [x for x in row.get("labels", ()) if x != "speech"])
    if "music" in row:
        return frozenset(row["music"][name] for name in ("instrument", "mode"))
    return frozenset(labels(row))


def told_facts(text, *_):
    said, heard = re.match('(?:someone says "(.*)")?(.*)', text, re.DOTALL).groups()
    found = content((said or "").split())
    found += [label for label, event in EVENTS.items() if event.phrase in heard]
    musical = set(heard.replace(",", "").split())
    found += [x for x in (*synth.INSTRUMENTS, "major", "minor") if said is None and x in musical]
    return frozenset(found)


def all_facts(values, *_):
    return frozenset().union(*values)


def features(row, *_):
    """({what it can be told by}, {what it may be told by}): near a border nobody is sure."""
    if "transcript" in row:
        moods = {row.get("emotion", "neutral")} - {"neutral"}
        return facts(row) | {f"a voice that is {mood}" for mood in moods}, frozenset()
    if "music" in row:
        known = {row["music"][name] for name in ("instrument", "mode", "dynamics")}
        fast = speed(row)
        return frozenset(known | set(fast if len(fast) == 1 else ())), frozenset(fast)
    return frozenset(labels(row)), frozenset(labels(row))  # each may be akin to another's


PHRASES = {event.phrase: label for label, event in EVENTS.items()}


def told_features(text, *_):
    parts = [part.strip('"') for part in text.split(", ")]
    parts = [part.removesuffix(" music") for part in parts]
    return frozenset(PHRASES.get(part, part) for part in parts), frozenset()


def alone(values, which):
    i = int(which) - 1
    own, others = values[i][0], [v for j, v in enumerate(values) if j != i]
    found = own - frozenset().union(*(known for known, _ in others))
    doubtful = frozenset().union(*(doubtful for _, doubtful in others))
    clear(found and found != own)
    clear(not found & doubtful and not any(related(name, doubtful) for name in found))
    return frozenset(name.removeprefix("a voice that is ") for name in found)


def unlike(values, *pair):
    """What one of two clips has and the other has not, where they have something in common."""
    sides = [values[int(place) - 1] for place in pair]
    clear(sides[0][0] & sides[1][0])
    found = set()
    for (own, _), (others, doubtful) in (sides, sides[::-1]):
        more = own - others
        clear(not more & doubtful and not any(related(name, doubtful) for name in more))
        found |= {name.removeprefix("a voice that is ") for name in more}
    clear(found)
    return frozenset(found)


# The table: how each kind asks, what is heard in a row, what is told by the evidence, and the rule.

Way = namedtuple("Way", "asked hear told judge lost", defaults=(0.06,))
ENDING = r"(?:So the answer|The answer|So the answer is|The answer is|Answer): .+\."
NOUN = f"({'|'.join(CATEGORIES)})"
NOUNS = f"({'|'.join([*PLURALS, *(f'{noun}s' for noun in CATEGORIES)])})"
ALL = "(?:all clips|all the clips|all recordings|all the audios)"
ACROSS = "(?:across the clips|in all the clips together|over all recordings)"
CLIPS_OF = "(?:clips|recordings|audios)"
THING = r"""(the word ".+?"|the sound of .+?)"""
HEARD = rf"(?:is {THING} heard|do you hear {THING})"
TELLS = f"{CLIP} (?:says|tells) (.+?)"
ONE = r"(\d+)"
TRUE = "(?:Is it true that|Do the clips tell that|Does it follow that|Is it right that)"


def ranked(scales):
    return [Way(s.asked + r"\?", s.hear, s.told, leader(s), s.lost) for s in scales]


def same_words(row, *_):
    return tuple(spoken(row))


def told_words(text, *_):
    return same_words({"transcript": quoted(text)})


HEARD_OF = (lambda row, *t: has(row, t[0])), (lambda text, *t: told_has(text, t[0]))
TOTAL = (lambda row, label: count(row, label)), (lambda text, label: told_count(text, label))
CAPTION = facts, told_facts, all_facts
KINDS = {
    "compare": ranked(SCALES[:-2]),
    "quality_most": ranked(SCALES[-2:]),
    "difference": [Way(rf"(?:What is the difference between|What is different in|How do|How is|"
                       rf"What differs between) audio {ONE} (?:and|different from) audio {ONE}"
                       r"(?: differ)?\?", features, told_features, unlike)],
    "odd_one": [Way(rf"Which {CLIP} has another {NOUN} than the (?:others|rest)\?",
                    of_category, told_category, exception)],
    "clearest": [
        Way(rf"Which {CLIP} has the (clear|clean)est (?:speech|voice)\?", field("quality", "label"),
            as_told, lambda values, *_: lone_place([v == "clean" for v in values])),
        Way(rf"Which {CLIP} (?:suffers from|has) ({'|'.join(synth.DEGRADATIONS)})\?",
            field("quality", "label"), as_told,
            lambda values, fault: lone_place([v == fault for v in values])),
    ],
    "contrast": [Way(r"(?:What|Which things|What sounds or words) can be heard in audio (\d+) and "
                     rf"in no other {CLIP}\?", features, told_features, alone)],
    "same_speaker": [Way(
        rf"(?:Do|Is|Is it) ?(?:the same person speaking in|the voice of|the same speaker in)? ?"
        rf"audio {ONE} (?:and|the voice of) audio {ONE}(?: have the same (?:speaker|voice))?\?",
        lambda row, *_: field("speaker")(row), as_told,
        lambda values, i, j: yes_if(values[int(i) - 1] == values[int(j) - 1]))],
    "speaker_pair": [Way(r"Which two (?:audios|clips|recordings) have the same (speaker)\?",
                         of_category, told_category, twins)],
    "count_speakers": [Way(rf"How many different (speakers) (?:are there|are heard|do you hear) "
                           rf"{ACROSS}\?", of_category, told_category,
                           lambda values, *_: len(set(values)))],
    "heard_again": [Way('One clip says "(.+)". Is (?:its speaker|the same voice|its voice) heard in'
                        rf" (?:another|any other) {CLIP}\?", whose, told_whose, again)],
    "keyword": [Way(rf"(?:Which|What) (?:word|keyword) do {ALL} (?:share|have in common)\?",
                    lambda row, *_: content(spoken(row)),
                    lambda text, *_: content(quoted(text).split()), common)],
    "describe_each": [Way("(?:Describe|Say what you hear in|Caption) (?:each clip|each recording|"
                          r"every clip) in one sentence\.", *CAPTION)],
    "describe_together": [Way(rf"(?:Name|List|Tell) every sound that is heard {ACROSS}\.",
                              lambda row, *_: frozenset(labels(row)),
                              lambda text, *_: frozenset(text.split(", ")), all_facts)],
    "bridge": [Way(rf"{TRUE} (.+)\? (?:Answer|Say) yes, no or not enough information\.",
                   fact, told_fact, follows)],
    "exactly": [Way(rf"{TRUE} {THING} is heard in exactly (\w+) of the {CLIPS_OF}\?", *HEARD_OF,
                    lambda values, _, n: yes_if(sum(values) == NUMBER[n]))],
    "agree": [Way(rf"Do {ALL} (?:agree|say the same) about (.+)\?", stated, told_stated,
                  lambda values, *_: yes_if(len(set(values)) == 1))],
    "dissenter": [Way(rf"Which {CLIP} (?:contradicts|does not agree with) the others about (.+)\?",
                      stated, told_stated, exception)],
    "supporters": [Way(r"Most clips agree about (.+?)\. (?:Which (?:are they|ones agree|clips are "
                       r"these|of the clips agree|are these))\?", stated, told_stated,
                       lambda values, *_: frozenset(range(1, len(values) + 1))
                       - {exception(values)})],
    "same_words": [Way(rf"Do {ALL} say the same (?:words|sentence)\?", same_words, told_words,
                       lambda values, *_: yes_if(len(set(values)) == 1))],
    "needle_fact": [
        Way(rf"Which {TELLS}\?", mention, told_mention, lambda values, _: lone_place(values)),
        Way(rf"One {TELLS}\. What does it say\?", mention, told_mention,
            lambda values, _: frozenset([values[lone_place(values) - 1]])),
        Way(rf"One {TELLS}\. Which is it, and what does it say\?", mention, told_mention,
            lambda values, _: frozenset([f"audio {lone_place(values)}",
                                         values[lone_place(values) - 1]])),
    ],
    "needle_word": [Way(rf"In which {CLIP} {HEARD}\?", *HEARD_OF,
                        lambda values, *_: lone_place(values))],
    "all_same": [Way(rf"Do {ALL} have the same {NOUN}\?", of_category, told_category,
                     lambda values, *_: yes_if(len(set(values)) == 1))],
    "count_kinds": [Way(rf"How many different {NOUNS} (?:are there|are heard|do you hear) "
                        rf"{ACROSS}\?", of_category, told_category,
                        lambda values, *_: len(set(values)))],
    "pair_same": [Way(rf"Which two (?:audios|clips|recordings) have the same {NOUN}\?",
                      of_category, told_category, twins)],
    "chronology": [Way(r"(?:Put|Sort|Bring) .+ in (?:the|order) .+\.", place, steps, in_order)],
    "when": [Way(rf"In which {CLIP} {HEARD}, and (?:when|from when to when)\?", times, told_times,
                 only_time)],
    "total": [Way(rf"How often (?:is|do you hear) the (.+?)(?: heard)? {ACROSS}\?", *TOTAL,
                  lambda values, *_: sum(values))],
    "clips_with": [Way(rf"In how many {CLIPS_OF} {HEARD}\?", *HEARD_OF,
                       lambda values, *_: sum(values))],
    "transcribe": [Way(".+", lambda row: row["transcript"], quoted, lambda values: values[0])],
    "tag": [Way(r"(?:Which|What) sounds (?:are heard|do you hear|are there)\?",
                lambda row: frozenset(w for label in labels(row) for w in label.lower().split()),
                lambda text: frozenset(text.lower().replace(",", "").split()), all_facts)],
    "describe_one": [Way("(?:Describe|Caption) (?:the|this) (?:clip|recording) in one sentence\\.",
                         *CAPTION)],
    "count_one": [Way(r"How often (?:is|do you hear) the (.+?)(?: heard)? (?:here|in this clip|in "
                      r"this recording)\?", *TOTAL, lambda values, *_: sum(values))],
    "locate": [Way(rf"(?:When|From when to when|At what time) (?:is|do you hear|can you hear) "
                   rf"{THING}(?: heard)?\?", times, told_times, only_time)],
    **dict.fromkeys(("voice", "music"), [
        Way(rf"(?:What|Which) is the {NOUN} (?:here|in this clip|in this one): (.+)\?",
            of_category, told_category, lambda values, noun, choices: values[0])]),
}  # fmt: skip


def asked(kind, question):
    """The one way in which a question can be read, and what it names."""
    found = [
        (way, match) for way in KINDS[kind] if (match := re.fullmatch(way.asked, bare(question)))
    ]
    assert len(found) == 1, (kind, question, len(found))
    way, match = found[0]
    names = match.groups()
    if HEARD in way.asked:  # one of its two groups, by how it is put
        names = tuple(name for name in names if name)
    return way, names


def value_of(gold):
    """A gold's value in the form in which the rules give theirs."""
    value = gold["value"]
    if gold["type"] == "order":
        return tuple(value)
    if gold["type"] == "clip" and type(value) is list:
        return frozenset(value)
    if gold["type"] == "span":
        return tuple(value[name] for name in ("clip", "on", "off") if name in value)
    if gold["type"] == "keywords":
        return frozenset(word for keyword in value for word in keyword.split())
    if gold["type"] == "text":
        return frozenset(slot[0] for slot in value["slots"])
    return value


def near(a, b, lost):
    """The same, but for what is lost where a number is told."""
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(near(x, y, lost) for x, y in zip(a, b))
    if {type(a), type(b)} <= {int, float}:
        return abs(a - b) <= lost
    return a == b


VOICES = ("same_speaker", "speaker_pair", "count_speakers", "heard_again")


def agree(item, heard, told, way):
    """Whether what is told of each clip is what is heard in it. Voices have no names, so they only
    have to be the same where they are; and an order has none but its places."""
    kind = item["meta"]["kind"]
    if kind == "chronology":
        return len(heard) == len(told)
    if kind in VOICES or item["meta"]["about"].get("category") == "voice":
        heard, told = (
            [v if type(v) is tuple else (v,) for v in values] for values in (heard, told)
        )
        first = [[[other[0] for other in v].index(voice[0]) for voice in v] for v in (heard, told)]
        return first[0] == first[1] and [v[1:] for v in heard] == [v[1:] for v in told]
    if kind in ("contrast", "difference"):
        heard = [(known, frozenset()) for known, _ in heard]
    return len(heard) == len(told) and all(near(a, b, way.lost) for a, b in zip(heard, told))


def gold_of(item):
    value = value_of(item["gold"])
    return value - set(SPEEDS) if item["meta"]["kind"].startswith("describe") else value


def told_texts(item):
    """What the as-text view says in the place of each clip; nothing else may have changed."""
    asked = view_as_text(item)["question"]
    texts = [evidence["says"] for evidence in item["meta"]["evidence"]]
    for i, text in enumerate(texts, 1):
        assert asked.count(f"(audio {i}: {text})") == 1
        asked = asked.replace(f"(audio {i}: {text})", f"<sound-{i}>")
    assert len(texts) == len(item["clips"]) and "(audio" not in asked
    unmarked = [re.sub(r"<sound-\d>\s*", "", text) for text in (asked, item["question"])]
    assert unmarked[0].strip() == unmarked[1].strip()
    return texts


def check(item, rows):
    """Everything that is told of an item is found in the rows, and the verdict in both."""
    way, names = asked(item["meta"]["kind"], item["question"])
    heard = [way.hear(row, *names) for row in rows]
    told = [way.told(text, *names) for text in told_texts(item)]
    where = (item["meta"]["kind"], item["question"], item["answer"])
    assert agree(item, heard, told, way), (where, heard, told)
    assert near(way.judge(heard, *names), gold_of(item), 0), (where, heard)
    assert near(way.judge(told, *names), gold_of(item), way.lost), (where, told)
    assert score(item["gold"], item["answer"]) == 1, where


def check_answer(item):
    """An answer on several clips: what is heard in each, then the verdict."""
    texts = told_texts(item)
    if len(texts) == 1 or item["meta"]["kind"] == "describe_each":
        return
    evidence = "; ".join(f"audio {i}: {text}" for i, text in enumerate(texts, 1))
    assert re.fullmatch(rf"{re.escape(evidence)}\. {ENDING}", item["answer"]), item


# --- one clip


def holdings(row):
    """What a row can be found by, for the tests below."""
    yield "kind", kind_of(row)
    for label in row.get("labels", ()):
        yield "label", label
    if "transcript" in row:
        yield "said", row["transcript"]
        for word in set(spoken(row)):
            yield "word", word
        if found := fact(row):
            yield "relation", found[0]
            yield "topic", *found[:2]
    for field in {"order", "dialogue"} & row.keys():
        yield "story", place(row)[0]


def kind_of(row):
    return "speech" if "transcript" in row else "music" if "music" in row else "sound"


def replacements(kind, names, row):
    """Keys of the clips that could stand beside a clip in the same question."""
    if kind in ("agree", "dissenter", "supporters"):
        return [("topic", *topic(names[0]))]
    if kind == "bridge":
        claim = next(c for c in CLAIMS if re.fullmatch(c[0], names[0]))
        return [("relation", claim[1].removeprefix("at ")), ("relation", claim[3])]
    if kind == "keyword":
        return [("word", word) for word in content(spoken(row))]
    if kind == "difference":  # those that have something in common with it
        said = content(spoken(row)) if "transcript" in row else ()
        heard = [] if "music" in row else row.get("labels", ())
        alike = [("word", word) for word in said] + [("label", label) for label in heard]
        return [*alike, ("kind", kind_of(row))]
    if kind in ("exactly", "clips_with", "total"):
        word = re.fullmatch('the word "(.+)"', names[0])
        label = ("label", names[0].removeprefix("the sound of "))
        return [("word", word[1]) if word else label, ("kind", kind_of(row))]
    if kind == "chronology":
        return [("story", place(row)[0])]
    if kind in ("same_words", "heard_again"):
        return [("said", names[0] if names else row["transcript"]), ("kind", "speech")]
    if names in (("longest",), ("shortest",)):
        return [("kind", kind) for kind in ("sound", "music", "speech")]
    return [("label", name) for name in names] + [("kind", kind_of(row))]


def completions(deck, item, rows, k, dice, size, tries=400):
    """Answers to the same question, with clip k in its place and others around it, out of `size`
    of those that could stand there."""
    kind = item["meta"]["kind"]
    way, names = asked(kind, item["question"])
    values = [way.hear(row, *names) for row in rows]
    given = [(row["id"], value) for row, value in zip(rows, values)]
    keyed, valued = defaultdict(list), defaultdict(list)  # by what finds them, by what they add
    for key in replacements(kind, names, rows[k]):
        found = deck.having[key]
        for row in dice.sample(found, min(len(found), size)):
            try:
                value = way.hear(row, *names)
            except Unclear:
                continue
            keyed[key].append((row["id"], value))
            valued[value if type(value) is not list else tuple(value)].append((row["id"], value))
    if kind == "heard_again":  # anybody may say what is quoted, even if nobody else did
        for speaker in (values[k][0], "a stranger"):
            quoter = (speaker, True)
            said = [quoter if v[1] and i != k else v for i, v in enumerate(values)]
            yield way.judge(said, *names)
    like = [other for other in itertools.chain(*valued.values()) if other[1] == values[k]]
    keyed, valued = list(keyed.values()), list(valued.values())
    others = [i for i in range(len(rows)) if i != k]
    for _ in range(tries if keyed else 0):
        moved = dict(zip(others, dice.sample(others, len(others))))
        chosen = [given[moved.get(i, i)] for i in range(len(rows))]
        source = dice.choice((like or given, dice.choice(keyed), dice.choice(valued or keyed)))
        changed = dice.sample(others, min(len(source), dice.randint(0, len(others))))
        for i, other in zip(changed, dice.sample(source, len(changed))):
            chosen[i] = other
        if dice.random() < 0.5:
            chosen[dice.choice(others)] = dice.choice(dice.choice(valued or keyed))
        if len({id for id, _ in chosen}) < len(chosen):
            continue
        try:
            yield way.judge([value for _, value in chosen], *names)
        except Unclear:
            pass


# --- the tests: what an item says is so, and follows


@cache
def items(seed, split, task, count):
    """[(item, its rows)], other ones for each task."""
    return list(deck(seed, split).items(task, count, seed=1000 * seed + list(TASKS).index(task)))


DECKS = [(seed, split) for seed in SEEDS for split in SPLITS]


def test_every_kind_has_a_second_path():
    kinds = {kind.__name__ for task in TASKS.values() for kind in task.kinds}
    assert kinds - KINDS.keys() == set(), "a kind whose answers nobody else can find"


@pytest.mark.parametrize("task", TASKS)
def test_gold_evidence_and_verdict_are_found_again(task):
    kinds = Counter()
    for place in DECKS:
        for item, rows in items(*place, task, 60):
            check(item, rows)
            check_answer(item)
            kinds[item["meta"]["kind"]] += 1
    assert set(kinds) == {kind.__name__ for kind in TASKS[task].kinds}
    assert min(kinds.values()) >= 30, kinds


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_gold_evidence_and_verdict_are_found_again_in_many(task):
    for place in DECKS:
        for item, rows in deck(*place).items(task, 500, seed=77):
            check(item, rows)
            check_answer(item)


def test_an_answer_that_tells_something_else_is_noticed():
    for task in SEVERAL:
        for item, _ in items(3, "test", task, 20):
            wrong = item["answer"].replace("audio 2: ", "audio 2: not ", 1)
            if wrong != item["answer"] and item["meta"]["kind"] != "describe_each":
                with pytest.raises(AssertionError):
                    check_answer({**item, "answer": wrong})


def test_a_second_path_sees_what_is_wrong():
    """The gold of another item, and evidence that is of other clips, are both noticed."""
    noticed = Counter()
    for task in TASKS:
        made = items(3, "test", task, 60)
        for (item, rows), (other, _) in zip(made, made[1:]):
            way, names = asked(item["meta"]["kind"], item["question"])
            heard = [way.hear(row, *names) for row in rows]
            if gold_of(other) != gold_of(item) and other["meta"]["kind"] == item["meta"]["kind"]:
                with pytest.raises(AssertionError):
                    check({**item, "gold": other["gold"]}, rows)
                noticed[task, "gold"] += 1
            if not agree(item, heard, heard[::-1], way):
                with pytest.raises(AssertionError):
                    check(item, rows[::-1])
                noticed[task, "evidence"] += 1
    assert all(noticed[task, "gold"] >= 5 for task in TASKS), noticed
    assert all(noticed[task, "evidence"] >= 5 for task in SEVERAL if task != "order"), noticed


def test_a_difference_says_which_of_the_two_has_what():
    several = 0
    for place in DECKS:
        for item, rows in items(*place, "comparison", 60):
            if item["meta"]["kind"] != "difference":
                continue
            _, pair = asked("difference", item["question"])
            own = {i: features(rows[int(i) - 1])[0] for i in pair}
            parts = re.split(r"(?:^|; )audio (\d+): ", item["meta"]["verdict"])[1:]
            told = {i: told_features(text)[0] for i, text in zip(parts[::2], parts[1::2])}
            more = {pair[0]: own[pair[0]] - own[pair[1]], pair[1]: own[pair[1]] - own[pair[0]]}
            assert told == {i: found for i, found in more.items() if found}, item
            several += len(told) == 2
    assert several > 50


def test_every_clip_is_another_and_speaks_of_its_licence():
    for place in DECKS:
        for task in TASKS:
            for item, rows in items(*place, task, 60):
                assert len(set(item["meta"]["ids"])) == len(rows) == len(item["clips"])
                assert item["clips"] == [row["path"] for row in rows]
                assert {row["split"] for row in rows} == {place[1]}
                assert item["licences"] == sorted({row["licence"] for row in rows})
                assert (item["task"], item["skill"]) == (task, TASKS[task].skill)
                assert item["meta"]["verdict"] in item["answer"]
                if task in ("voice", "music"):
                    listed = re.split(", | or ", bare(item["question"]).rpartition(": ")[2][:-1])
                    assert listed == item["choices"] == item["gold"]["choices"]


@pytest.mark.parametrize("task", SEVERAL)
def test_all_stays_true_when_the_clips_change_places(task):
    dice = random.Random(5)
    for item, rows in items(3, "test", task, 60) + items(4, "train", task, 60):
        order = dice.sample(range(1, len(rows) + 1), len(rows))
        moved = view_permute(item, order)
        moved["meta"]["evidence"].sort(key=lambda told: told["clip"])
        check(moved, [rows[i - 1] for i in order])
        assert moved["clips"] == [item["clips"][i - 1] for i in order]
        assert chance(moved) == chance(item) and 0 <= chance(item) <= 0.5


# --- the tests: what must not give an answer away

NOT_ALONE = "comparison odd link keyword entailment factual order counting contrast aqa".split()


def told_alone(place, task, count):
    """Clips of a task's items that leave but one answer, whatever is beside them."""
    dice, found = random.Random(9), []
    for item, rows in items(*place, task, count):
        gold = gold_of(item)
        for k in range(len(rows)):
            sizes = (50, 60), (100_000, 2000)  # first a quick look, then a thorough one
            searches = (completions(deck(*place), item, rows, k, dice, *size) for size in sizes)
            if all(other == gold for other in itertools.chain(*searches)):
                found.append((item["question"], item["answer"], k + 1))
    return found


@pytest.mark.parametrize("task", NOT_ALONE)
def test_one_clip_is_never_enough(task):
    for place in ((3, "test"), (4, "train")):
        assert told_alone(place, task, 60) == []


@pytest.mark.slow
@pytest.mark.parametrize("task", NOT_ALONE)
def test_one_clip_is_never_enough_in_many(task):
    for place in ((3, "train"), (3, "dev"), (4, "test")):
        assert told_alone(place, task, 300) == []


CLOSED = [
    task
    for task in TASKS
    if task
    not in (
        "contrast",
        "keyword",
        "captioning",
        "temporal",
        "transcribe",
        "tag",
        "caption",
        "locate",
    )
]


def answers(item):
    """All that could be answered to an item, as texts; none where that is open."""
    gold, n = item["gold"], len(item["clips"])
    if gold["type"] in ("yesno", "choice"):
        return list(gold["choices"])
    if gold["type"] == "clip" and type(gold["value"]) is int:
        return [f"clip {i}" for i in range(1, n + 1)]
    if gold["type"] == "clip":
        return [f"clips {c}" for c in itertools.combinations(range(1, n + 1), len(gold["value"]))]
    if gold["type"] == "order":
        return [f"order {order}" for order in itertools.permutations(range(1, n + 1))]
    if gold["type"] == "count":
        least, most = item["meta"]["range"]
        return [f"count {i}" for i in range(least, most + 1)]
    return []


def right(item):
    gold = item["gold"]
    if gold["type"] in ("yesno", "choice"):
        return gold["value"]
    if type(gold["value"]) is list:
        name = "clips" if gold["type"] == "clip" else "order"
        return f"{name} {tuple(gold['value'])}"
    return f"{gold['type']} {gold['value']}"


def bag(item):
    """The words of a question, alone and together with how many clips there are."""
    words = set(re.findall(r"\w+", bare(item["question"]).lower())) | {""}
    return [(word, n) for word in words for n in (0, len(item["clips"]))]


class Bayes:
    """Naive Bayes on words: the answer that a question makes likely, of those that it may have."""

    def __init__(self, learned):
        self.words, self.classes = (
            defaultdict(lambda: len(self.words)),
            defaultdict(lambda: len(self.classes)),
        )
        pairs = [(self.classes[right(item)], self.words[w]) for item in learned for w in bag(item)]
        seen = np.ones((len(self.classes), len(self.words)))
        np.add.at(seen, tuple(np.array(pairs).T), 1)
        self.weights = np.log(seen / seen.sum(1, keepdims=True))
        often = Counter(right(item) for item in learned)
        self.prior = np.log([often[name] for name in self.classes])

    def guess(self, item):
        known = [self.words[word] for word in bag(item) if word in self.words]
        scores = self.prior + self.weights[:, known].sum(1)
        found = {a: scores[self.classes[a]] for a in answers(item) if a in self.classes}
        return max(found, key=found.get, default=None)


def shortcuts(task, count):
    """{how one could guess: by how much it beats chance}"""
    learned, asked = (
        [item for item, _ in deck(seed, "train").items(task, count, seed=50 + seed)]
        for seed in SEEDS
    )
    learned, asked = ([item for item in x if answers(item)] for x in (learned, asked))
    by_chance = np.mean([chance(item) for item in asked])
    assert np.allclose([chance(item) for item in asked], [1 / len(answers(x)) for x in asked])
    often = Counter(map(right, learned)).most_common(1)[0][0]
    bayes = Bayes(learned)
    hits = {"majority": [right(item) == often for item in asked]}
    hits["words"] = [right(item) == bayes.guess(item) for item in asked]
    return {name: round(float(np.mean(hit) - by_chance), 3) for name, hit in hits.items()}


@pytest.mark.slow
@pytest.mark.parametrize("task", CLOSED)
def test_the_question_does_not_tell_the_answer(task):
    beaten = shortcuts(task, 2000)
    print(task, beaten)
    assert max(beaten.values()) <= 0.05, beaten


@pytest.mark.parametrize("task", CLOSED)
def test_the_question_does_not_tell_the_answer_of_a_few(task):
    assert max(shortcuts(task, 700).values()) <= 0.05


def test_the_classifier_finds_a_shortcut_that_is_there():
    learned, asked = ([dict(x) for x, _ in items(s, "train", "odd", 200)] for s in SEEDS)
    for item in learned + asked:
        item["question"] = f"Which is it, {'abcde'[item['gold']['value'] - 1]}?"
    bayes = Bayes(learned)
    assert np.mean([right(item) == bayes.guess(item) for item in asked]) > 0.9


# --- the tests: balance


def surprise(counts, options):
    """How far counts are from all options being as likely, in standard deviations."""
    expected = sum(counts.values()) / len(options)
    squares = sum((counts[option] - expected) ** 2 / expected for option in options)
    return (squares - len(options) + 1) / np.sqrt(2 * len(options) - 2)


@pytest.mark.parametrize("task", CLOSED)
def test_no_answer_is_more_frequent_than_chance(task):
    found, options = defaultdict(Counter), {}
    for item, rows in deck(3, "train").items(task, 1200, seed=21):
        gold, kind = item["gold"], item["meta"]["kind"]
        if not answers(item):
            continue
        key, value, possible = (kind, gold["type"], len(rows)), right(item), answers(item)
        if gold["type"] == "order":  # who comes first, and who last
            for end in (0, -1):
                found[(*key, end)][gold["value"][end]] += 1
                options[(*key, end)] = range(1, len(rows) + 1)
            continue
        if gold["type"] == "choice":  # where the right one stands
            key = (*key, len(gold["choices"]))
            value, possible = gold["choices"].index(value), range(len(gold["choices"]))
        found[key][value] += 1
        options[key] = possible
    off = {key: surprise(counts, options[key]) for key, counts in found.items()}
    assert max(off.values()) < 6, {key: found[key] for key in off if off[key] >= 6}
    assert sum(sum(counts.values()) for counts in found.values()) > 300


@pytest.mark.parametrize("task", SEVERAL)
def test_any_number_of_clips_is_as_likely(task):
    counts = Counter(len(rows) for _, rows in deck(4, "train").items(task, 600, seed=22))
    sizes = range(TASKS[task].least, 6)
    assert set(counts) == set(sizes) and surprise(counts, sizes) < 6, counts


def skills(mix, single, count, start=0):
    plan = deck(3, "train").plan
    return Counter(synth.task_of(i, plan, mix, single) for i in range(start, start + count))


def test_skills_come_in_the_proportions_of_the_paper():
    for start in (0, 12_345, 1_000_000):
        tasks = skills(synth.MIX, 0.25, 2000, start)
        alone = sum(tasks[task] for task in SINGLE)
        assert abs(alone / 2000 - 0.25) < 0.005
        for skill, share in {
            "comparison": 30,
            "reference": 25,
            "reasoning": 25,
            "temporal": 20,
        }.items():
            mates = [task for task in TASKS if TASKS[task].skill == skill]
            assert abs(sum(tasks[task] for task in mates) / 1500 - share / 100) < 0.01
            even = 1500 * share / 100 / len(mates)
            assert all(abs(tasks[task] - even) < 0.05 * even + 4 for task in mates)
    assert sum(skills(synth.MIX, 2000, 2200)[task] for task in SINGLE) == 200
    other = skills({"comparison": 0, "reference": 0, "reasoning": 3, "temporal": 1}, 0.0, 2000)
    assert {TASKS[task].skill for task in other} == {"reasoning", "temporal"}
    assert abs(sum(other[t] for t in other if TASKS[t].skill == "temporal") - 500) < 20


# --- the tests: how things are put

ALL_FORMS = {**FORMS, **{form: form for form in [*synth.TOPICS.values(), *synth.BRIDGES.values()]}}


def words_in(texts):
    return {word for text in texts for word in re.findall(r"[\w']+", re.sub(r"{\w+}", " ", text))}


def test_no_sentence_is_asked_in_two_splits():
    for name, form in FORMS.items():
        ways = phrasings(form)
        assert all(ways.values()), name
        for a, b in itertools.combinations(SPLITS, 2):
            assert not set(ways[a]) & set(ways[b]), name
        assert len(ways["train"]) >= len(ways["test"]) == len(ways["dev"])


def test_no_word_is_asked_in_test_alone():
    ways = {split: [w for f in ALL_FORMS.values() for w in phrasings(f)[split]] for split in SPLITS}
    for split in ("dev", "test"):
        assert words_in(ways[split]) - words_in(ways["train"]) == set()
    for scale in synth.SCALES.values():
        for form in (scale.most, scale.least):
            assert words_in(phrasings(form)["test"]) <= words_in(ways["train"])


@pytest.mark.parametrize("split", SPLITS)
def test_questions_and_answers_are_put_as_their_split_has_it(split):
    def fits(form, about):
        return all(slot in about for slot in re.findall(r"{(\w+)}", form))

    for task in TASKS:
        for item, _ in items(3, split, task, 60):
            about, asked = item["meta"]["about"], bare(item["question"])
            ways = [w for f in FORMS.values() for w in phrasings(f)[split] if fits(w, about)]
            assert asked in {synth.filled(way, about) for way in ways}
            if len(item["clips"]) > 1 and item["meta"]["kind"] != "describe_each":
                ends = [
                    w.format(verdict=item["meta"]["verdict"])
                    for w in phrasings(FORMS["answer"])[split]
                ]
                assert item["answer"].endswith(tuple(ends))


# --- the tests: files


def command(*arguments, **environment):
    """synth.py in this process: its exit code, what it wrote to stdout and to stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["synth.py", *map(str, arguments)])
        for name, value in environment.items():
            patch.setenv(name, str(value))
        try:
            prepare.cli(synth.main)
            code = 0
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A corpus whose clips are empty files, and a folder for what is made of it."""
    base = tmp_path_factory.mktemp("base")
    rows = silent_rows(3)[:3000]
    for folder in {(base / "corpus" / row["path"]).parent for row in rows}:
        folder.mkdir(parents=True)
    for row in rows:
        (base / "corpus" / row["path"]).touch()
    write_rows(base / "corpus/corpus.jsonl", rows)
    return base


NAMES = ("train.jsonl", "bench.jsonl")
SIZE = ("--train", 620, "--bench", 300, "--seed", 5)


def make(base, name, *more, **environment):
    corpus = base / "corpus/corpus.jsonl"
    return command("--out", base / name, "--corpus", corpus, *SIZE, *more, **environment)


def read_files(folder):
    return {name: (folder / name).read_bytes() for name in NAMES}


@pytest.fixture(scope="module")
def made(base):
    code, out, err = make(base, "made", "--workers", 1)
    assert (code, err) == (0, ""), err
    assert "train.jsonl: 620 items" in out and "bench.jsonl: 330 items" in out
    return base / "made"


def test_files_hold_what_was_asked_for_and_are_read_back(base, made):
    by_id = {row["id"]: row for row in silent_rows(3)}
    for name, split, count in (("train.jsonl", "train", 620), ("bench.jsonl", "test", 330)):
        rows = list(read_rows(made / name))
        assert len(rows) == count == len({row["id"] for row in rows})
        for row in rows:
            assert score(row["gold"], row["answer"]) == 1
            assert type(chance(row)) in (int, float) and 0 <= chance(row) <= 0.5
            known = [by_id[id] for id in row["meta"]["ids"]]
            assert row["clips"] == [f"../corpus/{clip['path']}" for clip in known]
            assert {clip["split"] for clip in known} == {split}
            check(row, known)
    alone = [row["task"] in SINGLE for row in read_rows(made / "bench.jsonl")]
    assert alone == [False] * 300 + [True] * 30
    single = sum(row["task"] in SINGLE for row in read_rows(made / "train.jsonl"))
    assert abs(single - 155) <= 2


@pytest.mark.long
@pytest.mark.parametrize("how", ["workers", "shards", "torchrun"])
def test_the_files_do_not_depend_on_who_makes_them(how, base, made):
    if how == "workers":
        assert make(base, how, "--workers", 2)[0] == 0
    for shard in (2, 3, 1) if how != "workers" else ():
        flags = ("--shard", f"{shard}/3") if how == "shards" else ()
        ranks = {"RANK": shard - 1, "WORLD_SIZE": 3} if how == "torchrun" else {}
        assert not (base / how / "train.jsonl").exists()
        assert make(base, how, "--workers", 1, *flags, **ranks)[0] == 0
    assert read_files(base / how) == read_files(made)
    left = {path.name for path in (base / how).iterdir()} - set(NAMES)
    assert not [name for name in left if not name.endswith(".lock")], left


@pytest.mark.long
def test_a_killed_run_goes_on_where_it_was(base):
    flags = [
        "--corpus",
        base / "corpus/corpus.jsonl",
        "--train",
        "3000",
        "--bench",
        "0",
        "--seed",
        "6",
    ]
    line = [sys.executable, ROOT / "synth.py", "--out", base / "killed", *flags, "--workers", "2"]
    started = subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while started.poll() is None:
        if any(part.read_bytes().count(b"\n") > 500 for part in (base / "killed").glob("*.part")):
            break
        time.sleep(0.005)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate(timeout=60)
    parts = list((base / "killed").glob("*.part"))
    assert len(parts) == 1 and not (base / "killed/train.jsonl").exists()
    kept = parts[0].read_bytes()
    parts[0].write_bytes(kept + b'{"id": "train-6-00')  # a torn line at the end
    done = Counter()
    for name in ("whole", "killed"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(synth, "make_item", counted(done, name, synth.make_item))
            assert command("--out", base / name, *flags, "--workers", 1)[0] == 0
    assert done["whole"] == 3000 and 0 < done["killed"] <= 2500  # the last chunk is made again
    assert (base / "killed/train.jsonl").read_bytes() == (base / "whole/train.jsonl").read_bytes()
    assert not list((base / "killed").glob("*.part"))


def counted(done, name, function):
    def call(*arguments):
        done[name] += 1
        return function(*arguments)

    return call


@pytest.mark.long
def test_another_seed_asks_other_questions(base, made):
    assert make(base, "other", "--workers", 1, "--seed", 6)[0] == 0
    for name in NAMES:
        a, b = ([(r["question"], r["clips"]) for r in read_rows(folder / name)]
                for folder in (made, base / "other"))  # fmt: skip
        assert sum(x in a for x in b) <= 0.02 * len(b)


def test_the_mix_and_the_share_of_single_clips_are_kept(base):
    flags = ("--workers", 1, "--bench", 0, "--mix", "0/0/3/1", "--single", 0)
    assert make(base, "mixed", *flags)[0] == 0
    found = Counter(row["skill"] for row in read_rows(base / "mixed/train.jsonl"))
    assert set(found) == {"reasoning", "temporal"} and abs(found["temporal"] - 155) <= 5
    assert {path.name for path in (base / "mixed").iterdir()} == {"train.jsonl"}


def test_a_bench_for_tuning_is_of_dev_and_by_itself(base):
    flags = ("--workers", 1, "--train", 0, "--bench", 60, "--split", "dev", "--max-clips", 3)
    assert make(base, "dev", *flags)[0] == 0
    assert {path.name for path in (base / "dev").iterdir()} == {"bench-dev.jsonl"}
    rows = list(read_rows(base / "dev/bench-dev.jsonl"))
    by_id = {row["id"]: row["split"] for row in silent_rows(3)}
    assert {by_id[id] for row in rows for id in row["meta"]["ids"]} == {"dev"}
    assert max(len(row["clips"]) for row in rows) == 3


WRONG = """--train -1
--train many
--train 0 --bench 0
--max-clips 1
--single 1.5
--mix 30/25/25
--mix 0/0/0/0
--mix a/1/1/1
--shard 0/3
--shard 4/3
--shard x
--workers 0
--seed -1
--split train
--clips 100
--mix 1/1/1/1 --recipe mallm
--sentences nowhere.txt
--model m
--price 1/2
--per-minute 3
--corpus nowhere.jsonl"""


@pytest.mark.parametrize("line", WRONG.splitlines())
def test_wrong_flags_are_one_line(line, base, tmp_path):
    flags = line.split()
    named = flags[1] if "--corpus" in flags else flags[0]
    given = [] if "--corpus" in flags else ["--corpus", base / "corpus/corpus.jsonl"]
    code, out, err = command("--out", tmp_path / "q", *given, "--workers", "1", *flags)
    assert code == 2 and out == "" and err.count("\n") == 1 and named in err, (out, err)
    assert not list(tmp_path.glob("q/*.jsonl"))


def test_a_shard_that_is_whole_is_not_made_again(base, monkeypatch):
    out, corpus = base / "whole-shard", base / "corpus/corpus.jsonl"
    given = ("--out", out, "--corpus", corpus, "--train", 6, "--bench", 0)
    assert command(*given, "--shard", "1/2")[0] == 0
    made = []
    plain = synth.write_questions
    monkeypatch.setattr(synth, "write_questions", lambda *a: made.append(a[0]) or plain(*a))
    assert command(*given, "--shard", "1/2")[0] == 0 and not made
    assert command(*given, "--shard", "2/2")[0] == 0 and len(made) == 1
    assert len((out / "train.jsonl").read_text().splitlines()) == 6


def test_shards_of_two_seeds_are_never_joined(base):
    """Two halves of different wholes make none."""
    flags = ("--corpus", base / "corpus/corpus.jsonl", "--train", 0, "--bench", 100)
    for seed, shard in ((1, "1/2"), (2, "2/2")):
        given = ("--out", base / "mixed", *flags, "--workers", 1, "--seed", seed)
        assert command(*given, "--shard", shard)[0] == 0
    assert not (base / "mixed/bench.jsonl").exists()
    assert len(list((base / "mixed").glob("bench-*-of-00002.jsonl"))) == 2
    assert command(*given, "--shard", "1/2")[0] == 0  # now the second one's other half
    ids = [row["id"] for row in read_rows(base / "mixed/bench.jsonl", heard=False)]
    assert {id.split("-")[1] for id in ids} == {"2"}


def test_check_tells_what_two_files_share(made, base):
    corpus = ("--corpus", base / "corpus/corpus.jsonl")
    code, out, _ = command("check", made / "train.jsonl", made / "bench.jsonl", *corpus)
    assert code == 0 and out.split("\n")[:2] == ["0 of the same clip", "0 of the same voice"]
    code, out, _ = command("check", made / "train.jsonl", made / "train.jsonl", *corpus)
    assert code == 1 and not out.startswith("0 ")


# --- odd corpora


def talk(i, corpus="a", **known):
    """A row of speech that nothing lies behind."""
    row = {"id": f"{i}", "path": f"{corpus}/{i}.flac", "corpus": corpus, "split": "train",
           "duration": 2.0, "licence": "CC0-1.0"}  # fmt: skip
    return {
        **row,
        "speaker": f"{i % 4}",
        "transcript": f"word{'abcdefghij'[i % 10]} other",
        **known,
    }


def put_down(folder, rows):
    for row in rows:
        (folder / row["path"]).parent.mkdir(parents=True, exist_ok=True)
        (folder / row["path"]).touch()
    return write_rows(folder / f"{rows[0]['corpus']}.jsonl", rows)


def asked_of(corpora, out, *flags):
    code, _, err = command("--out", out, "--corpus", *corpora, "--bench", 0, "--train", 400,
                           "--workers", 1, *flags)  # fmt: skip
    assert code == 0, err
    return list(read_rows(out / "train.jsonl")), err


def test_two_corpora_may_number_their_people_alike(tmp_path):
    """Speaker 1 of one is not speaker 1 of the other, and the same id is another clip."""
    files = [put_down(tmp_path, [talk(i, corpus) for i in range(40)]) for corpus in ("a", "b")]
    seen = 0
    for item in asked_of(files, tmp_path / "out", "--mix", "0/1/0/0")[0]:
        if item["meta"]["kind"] == "same_speaker" and item["gold"]["value"] == "yes":
            places = [int(n) for n in re.findall(r"audio (\d+)", bare(item["question"]))]
            folders = {item["clips"][i - 1].split("/")[-2] for i in places}
            assert len(folders) == 1, item
            seen += 1
    assert seen > 5


def test_turns_that_sound_alike_are_not_put_in_order(tmp_path):
    rows = [
        talk(i, transcript="yeah" if i % 3 else f"number {synth.DIGIT_WORDS[i % 10]}",
             dialogue={"id": f"d{i // 10}", "turn": i % 10})
        for i in range(100)
    ]  # fmt: skip
    orders = [
        item for item in asked_of([put_down(tmp_path, rows)], tmp_path / "out")[0]
        if item["task"] == "order"
    ]  # fmt: skip
    assert len(orders) > 5
    for item in orders:
        said = [evidence["says"] for evidence in item["meta"]["evidence"]]
        assert len(set(said)) == len(said)


def test_a_marker_that_somebody_says_gets_into_no_item(tmp_path):
    rows = [talk(i, transcript=f"see <sound-{i % 5}> {'abcdefghij'[i % 10]}x") for i in range(40)]
    rows += [talk(40 + i) for i in range(40)]
    for item in asked_of([put_down(tmp_path, rows)], tmp_path / "out")[0]:
        assert "<sound-" not in item["answer"]
        view_as_text(item)


@pytest.mark.parametrize(
    "known, field",
    [
        ({"music": {"tempo": "120"}}, "music.tempo"),
        ({"music": {"instrument": ["piano"]}}, "music.instrument"),
        ({"quality": {"label": ["noise"]}}, "quality.label"),
        ({"transcript": "half \ud800 of one"}, "whole characters"),
    ],
)
def test_a_damaged_row_is_named_and_the_rest_is_asked_about(tmp_path, known, field):
    rows = [talk(i) for i in range(40)] + [talk(40, **known)]
    items, err = asked_of([put_down(tmp_path, rows)], tmp_path / "out")
    assert items and field in err and "row 41" in err


def test_odd_rows_are_no_crash(tmp_path):
    """Fields that may be missing are, and one that nobody knows has the name of one of ours."""
    rows = [talk(i) for i in range(40)]
    rows += [
        talk(40 + i, wave=[1, 2], voice={"f0": 100, "tract": 15, "rate": 1, "breath": 0.1},
             quality={"label": "noise"}, music={"instrument": "piano"})
        for i in range(10)
    ]  # fmt: skip
    for row in rows[40:]:
        del row["speaker"], row["transcript"]
    assert asked_of([put_down(tmp_path, rows)], tmp_path / "out")[0]


def test_a_corpus_that_feeds_nothing_is_one_line(tmp_path):
    (tmp_path / "a.flac").touch()
    row = {"id": "a", "path": "a.flac", "corpus": "x", "split": "train", "duration": 1.0,
           "licence": "CC0-1.0"}  # fmt: skip
    corpus = write_rows(tmp_path / "corpus.jsonl", [row])
    code, _, err = command("--out", tmp_path, "--corpus", corpus, "--bench", 0, "--workers", 1)
    assert code == 2 and err.count("\n") == 1 and "feed" in err


def test_show_prints_an_item_by_number_and_by_id(made):
    rows = list(read_rows(made / "bench.jsonl"))
    for which, row in ((1, rows[0]), (rows[6]["id"], rows[6]), (330, rows[329])):
        code, out, err = command("show", made / "bench.jsonl", which)
        assert (code, err) == (0, "")
        assert row["id"] in out and row["task"] in out and row["answer"] in out
        assert bare(row["question"]) in out and json.dumps(row["gold"], ensure_ascii=False) in out
        for told in row["meta"]["evidence"]:
            assert re.search(rf"audio {told['clip']} .*{re.escape(told['says'])}", out)
    for which in ("331", "no-such-item"):
        code, out, err = command("show", made / "bench.jsonl", which)
        assert code == 2 and err.count("\n") == 1 and which in err


def test_show_plays_the_clips_in_order(made, tmp_path):
    row = next(row for row in read_rows(made / "bench.jsonl") if len(row["clips"]) == 4)
    waves = [np.random.default_rng(i).uniform(-0.5, 0.5, 1600 + i).astype("f4") for i in range(4)]
    paths = [made / clip for clip in row["clips"]]
    for path, wave in zip(paths, waves):
        soundfile.write(path, wave, RATE, format="FLAC")
    code, out, _ = command("show", made / "bench.jsonl", row["id"], "--play-out", tmp_path / "p")
    for path in paths:
        path.write_bytes(b"")
    assert code == 0 and sorted(p.name for p in (tmp_path / "p").iterdir()) == [
        f"{i}.flac" for i in range(1, 5)
    ]
    for i, wave in enumerate(waves, 1):
        played, rate = soundfile.read(tmp_path / f"p/{i}.flac", dtype="float32")
        assert rate == RATE and np.abs(played - wave).max() < 1e-4 and f"{i}.flac" in out


def test_clips_made_of_two_are_both(base, made, tmp_path):
    corpus = base / "corpus/corpus.jsonl"
    files = [tmp_path / name for name in ("one.jsonl", "other.jsonl")]
    row = next(row for row in map(json.loads, (made / NAMES[0]).open()) if len(row["clips"]) > 1)
    a, b = row["meta"]["ids"][:2]
    for file, ids in zip(files, ([f"{a}+{b}"], [b])):
        file.write_text(json.dumps({**row, "meta": {**row["meta"], "ids": ids}}) + "\n")
    assert synth.shared_between(*files, [corpus])["clip"] == 1


def test_only_numbers_of_clips_that_can_be(tmp_path):
    for number in (-5, 0):
        code, _, said = command("--out", tmp_path, "--clips", number)
        assert code == 2 and f"--clips: expected 1 to 9999999, found {number}" in said
    assert not list(tmp_path.iterdir())


def known_of(path, corpus):
    """What clips of a file say and who says it, and which they are."""
    ids = {id for row in read_rows(path) for id in row["meta"]["ids"]}
    rows = [row for row in map(json.loads, corpus.read_text().splitlines()) if row["id"] in ids]
    said = {row["transcript"] for row in rows if len(row.get("transcript", "").split()) > 2}
    return ids | said | {row["speaker"] for row in rows if "speaker" in row}


def test_train_and_test_share_no_clip_script_or_voice(base, made):
    corpus, files = base / "corpus/corpus.jsonl", [made / name for name in NAMES]
    assert not known_of(files[0], corpus) & known_of(files[1], corpus)
    assert not synth.shared_between(*files, [corpus])
    found = synth.shared_between(files[1], files[1], [corpus])
    assert set(found) == {"clip", "voice", "script"}


@pytest.mark.long
def test_what_is_held_out_is_left_out_of_train_and_told(base):
    rows = [dict(row) for row in silent_rows(3)[:3000]]
    speech = [row for row in rows if len(row.get("transcript", "").split()) > 2]
    mine, held = ([row for row in speech if row["split"] == split] for split in ("train", "test"))
    for row in mine[:30]:
        row["speaker"] = held[0]["speaker"]
    for row in mine[30:70]:
        row["transcript"] = held[1]["transcript"].upper() + "!"
    for row in mine[70:75]:
        row["hash"] = "5eed"
    held[2]["hash"] = "5eed"
    corpus = write_rows(base / "corpus/leaky.jsonl", rows)
    flags = ("--corpus", corpus, "--train", 900, "--bench", 60, "--workers", 1)
    code, _, err = command("--out", base / "leaky", *flags)
    assert code == 0
    assert "75 train clips whose voice, script or sound is held out: left out" in err
    used = {id for row in read_rows(base / "leaky/train.jsonl") for id in row["meta"]["ids"]}
    assert not used & {row["id"] for row in mine[:75]} and used & {row["id"] for row in mine[75:]}
    assert not synth.shared_between(*(base / "leaky" / name for name in NAMES), [corpus])


# --- the tests: what each corpus can feed, through prepare.py


def sound(path, seconds=0.3):
    """A soft noise at 8 kHz; what is in it nobody asks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = np.random.default_rng(len(path.name)).integers(-99, 99, round(8000 * seconds))
    soundfile.write(path, wave.astype(np.int16), 8000, format=path.suffix[1:].upper())


def table(path, *lines, split="\t"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(split.join(map(str, line)) + "\n" for line in lines))


THINGS = "house river garden window letter soldier morning captain island horse forest".split()
VERBS = "found crossed watched carried remembered painted followed admired".split()


def sentence(dice, longest):
    """From three words to as many as `longest`."""
    said = ["the", dice.choice(THINGS), dice.choice(VERBS)]
    while len(said) < longest and dice.random() < 0.85:
        said += ["and", "the", dice.choice(THINGS)]
    return " ".join(said)


def librispeech(root, dice):
    for speaker, chapter in itertools.product(range(20, 28), (1, 2)):
        folder = root / f"LibriSpeech/train-clean-5/{speaker}/{chapter}"
        lines = []
        for i in range(8):
            name = f"{speaker}-{chapter}-{i:04d}"
            text = f"{sentence(dice, dice.choice((3, 6, 9, 40)))} at noon {speaker + i}".upper()
            lines.append((name, text) if i != 5 or chapter == 1 else (name,))  # one is not known
            sound(folder / f"{name}.flac", dice.uniform(0.5, 4))
        table(folder / f"{speaker}-{chapter}.trans.txt", *lines, split=" ")


def clotho(root, dice):
    tags = "rain wind birds traffic water voices footsteps thunder bells insects".split()
    captions = [("file_name", *(f"caption_{i}" for i in range(1, 6)))]
    known = [("file_name", "keywords", "license")]
    for i in range(100):
        found = dice.sample(tags, dice.randint(1, 5))
        told = [f"{' and '.join(dice.sample(found, len(found)))} are heard" for _ in range(5)]
        captions.append((f"clip {i}.wav", *told))
        known.append((f"clip {i}.wav", ";".join(found), "CC0"))
        sound(root / f"development/clip {i}.wav", dice.uniform(0.5, 3))
    table(root / "clotho_captions_development.csv", *captions, split=",")
    table(root / "clotho_metadata_development.csv", *known, split=",")


def strong_events(dice, names, least=1):
    """[(name, on, off)] of a few kinds, each a few times, one after the other."""
    for name in dice.sample(names, dice.randint(least, 3)):
        on = dice.uniform(0, 1)
        for _ in range(dice.randint(1, 4)):
            off = round(on + dice.uniform(0.2, 0.9), 3)
            yield name, round(on, 3), off
            on = off + dice.uniform(0.2, 0.8)


def audioset_strong(root, dice):
    names = {"/m/1": "Speech", "/m/2": "Rain", "/m/3": "Rain on surface", "/m/4": "Bark",
             "/m/5": "Horn, car horn, honking", "/m/6": "Siren", "/m/7": "Bell"}  # fmt: skip
    table(root / "mid_to_display_name.tsv", *names.items())
    lines = [("segment_id", "start_time_seconds", "end_time_seconds", "label")]
    for i in range(160):
        lines += [(f"clip{i}_0", on, off, mid) for mid, on, off in strong_events(dice, list(names))]
        sound(root / f"Yclip{i}.wav", dice.uniform(0.5, 3))
    table(root / "audioset_train_strong.tsv", *lines)


def picoaudio(root, dice):
    names = ["dog barking", "cat meowing", "door slamming", "rain", "siren", "bells"]
    lines = []
    for i in range(120):
        events = list(strong_events(dice, names))
        spans = {
            name: [f"{on}-{off}" for n, on, off in events if n == name] for name, _, _ in events
        }
        timed = " and ".join(f"{name} at {', '.join(at)}" for name, at in spans.items())
        often = " and ".join(f"{n} {synth.DIGIT_WORDS[len(at)]} times" for n, at in spans.items())
        path = f"data/multi_event_train/syn_{i}.wav"
        lines.append(
            json.dumps({"filepath": path, "onoffCaption": timed, "frequencyCaption": often})
        )
        sound(root / path, dice.uniform(0.5, 3))
    table(root / "meta_data/train.json", *((line,) for line in lines))


def music4all(root, dice):
    songs = [f"song{i}" for i in range(140)]
    table(root / "id_information.csv", ("id", "artist"), *((song, f"by {song}") for song in songs))
    table(root / "id_genres.csv", ("id", "genres"), *((song, "rock,pop") for song in songs))
    table(
        root / "id_lang.csv", ("id", "lang"), *((s, dice.choice(("en", "pt", "es"))) for s in songs)
    )
    numbers = [("id", "danceability", "energy", "key", "mode", "valence", "tempo")]
    for song in songs:
        three = [round(dice.random(), 3) for _ in range(3)]
        mode, tempo = dice.randint(0, 1), round(dice.uniform(60, 190), 2)
        numbers.append((song, *three[:2], dice.randint(0, 11), mode, three[2], tempo))
        sound(root / f"audios/{song}.wav", dice.uniform(0.5, 3))
    table(root / "id_metadata.csv", *numbers)


def qualispeech(root, dice):
    lines = [("id", "Speed", "Overall quality", "Natural language description")]
    words = "clear noisy hoarse calm distant sharp muffled bright".split()
    for i in range(90):
        told = f"The voice is {dice.choice(words)} and the recording {dice.choice(words)}."
        lines.append((f"s{i}.wav", dice.randint(1, 5), dice.randint(1, 5), told))
        sound(root / f"train/s{i}.wav", dice.uniform(0.5, 3))
    table(root / "train.csv", *lines, split=",")


def common_voice(root, dice):
    said = [sentence(dice, 4) for _ in range(10)]
    lines = [("client_id", "path", "sentence")]
    for i, (speaker, text) in enumerate(itertools.product(range(10), said)):
        text = text.capitalize() + dice.choice((".", "", "!"))  # nobody hears the difference
        lines.append((f"voice{speaker}", f"cv_{i}.flac", text))
        sound(root / f"clips/cv_{i}.flac", dice.uniform(0.5, 3))
    table(root / "train.tsv", *lines)


def esc50(root, dice):
    kinds = "dog rain cow frog siren clock_tick rooster crow".split()
    lines = [("filename", "category", "esc10", "src_file")]
    for i in range(130):
        lines.append((f"1-{i}-A-0.wav", kinds[i % 8], "False", i))
        sound(root / f"audio/1-{i}-A-0.wav")
    table(root / "meta/esc50.csv", *lines, split=",")


def speech_commands(root, dice):
    for word, speaker in itertools.product("bed cat dog five house left marvin".split(), range(14)):
        sound(root / f"{word}/{speaker:08x}_nohash_0.wav")
    for name in ("testing_list.txt", "validation_list.txt"):
        table(root / name, ("bed/0000000d_nohash_0.wav",) if name[0] == "t" else ())


HEARD_SOUND = "captioning entailment needle counting tag caption"
FED = {  # what is known of a corpus' clips decides which tasks they can feed
    "librispeech": (librispeech, "comparison odd contrast link keyword captioning entailment needle"
                    " aqa order counting transcribe caption"),
    "clotho": (clotho, f"comparison odd contrast aqa {HEARD_SOUND}"),
    "audioset-strong": (audioset_strong, "comparison odd contrast aqa temporal count locate "
                        + HEARD_SOUND),
    "picoaudio": (picoaudio, f"comparison odd contrast aqa temporal count locate {HEARD_SOUND}"),
    "music4all": (music4all, "comparison odd aqa music"),
    "qualispeech": (qualispeech, "comparison quality captioning caption"),
    "common-voice": (common_voice, "comparison odd contrast link keyword captioning entailment"
                     " factual needle aqa counting transcribe caption"),
    "esc50": (esc50, f"odd aqa {HEARD_SOUND}"),  # of one length, and one sound in each
    "speech-commands": (speech_commands, "odd link captioning entailment factual needle aqa"
                        " counting transcribe caption"),
}  # fmt: skip


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """{name: corpus.jsonl}, each made by prepare.py from files as the corpus has them."""
    base, found = tmp_path_factory.mktemp("corpora"), {}
    for name, (build, _) in FED.items():
        (base / name).mkdir()
        build(base / name, random.Random(name))
        found[name] = base / f"{name}.jsonl"
        line = ["corpus", name, "--root", base / name, "--out", found[name], "--workers", 1]
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
            patch.setattr(sys, "argv", ["prepare.py", *map(str, line)])
            prepare.main()
    return found


def check_heard(item, rows):
    """As check, but for what is told: other corpora caption as they like."""
    way, names = asked(item["meta"]["kind"], item["question"])
    if not item["meta"]["kind"].startswith("describe"):
        heard = way.judge([way.hear(row, *names) for row in rows], *names)
        assert heard == gold_of(item), (item["question"], item["answer"], rows)
    assert score(item["gold"], item["answer"]) == 1
    told = [evidence["says"] for evidence in item["meta"]["evidence"]]
    assert len(told) == len(rows) and all(told) and view_as_text(item)


@pytest.mark.parametrize("name", FED)
def test_each_corpus_feeds_the_tasks_that_it_can(name, corpora):
    rows = [json.loads(line) for line in corpora[name].read_text().splitlines()]
    fed = Deck(rows, "train")
    assert set(fed.plan) == set(FED[name][1].split())
    for task in fed.plan:
        for item, known in fed.items(task, 40):
            check_heard(item, known)
            if item["meta"]["kind"].startswith("describe"):
                words = set(re.findall(r"\w+", json.dumps(known).lower()))
                for slot in item["gold"]["value"]["slots"]:
                    assert set(re.findall(r"\w+", slot[0].lower())) <= words


MIXED = [
    ["librispeech", "qualispeech"],
    ["clotho", "picoaudio", "esc50"],  # three that know of rain, and one of them when
    list(FED),
]


@pytest.mark.parametrize("names", MIXED)
def test_corpora_that_are_mixed_do_not_tell_what_only_one_of_them_knows(names, corpora):
    rows = [json.loads(line) for name in names for line in corpora[name].read_text().splitlines()]
    fed = Deck(rows, "train")
    assert set(fed.plan) >= {task for name in names for task in FED[name][1].split()} - {"order"}
    for task in fed.plan:
        for item, known in fed.items(task, 60):
            check_heard(item, known)
            assert item["source"] == "+".join(sorted({row["corpus"] for row in known}))


def test_the_command_says_what_a_corpus_does_not_feed(corpora, tmp_path):
    flags = ("--train", 150, "--bench", 0, "--workers", 1)
    code, out, err = command("--out", tmp_path, "--corpus", corpora["librispeech"], *flags)
    assert code == 0 and "train.jsonl: 150 items" in out
    unfed = set(TASKS) - set(FED["librispeech"][1].split())
    assert err.startswith("warning: ") and err.count("\n") == 1
    assert set(re.findall(r"\w+", err.rpartition("feeds no ")[2])) == unfed
    rows = list(read_rows(tmp_path / "train.jsonl"))
    assert {row["task"] for row in rows} == set(TASKS) - unfed
    assert {row["source"] for row in rows} == {"librispeech"}
