"""What prepare.py promises about answers: score(gold, answer) finds the verdict in what a model
says and never guesses one.

Hand-written tables for every type of gold: right, wrong, verbose, hedged, empty, two answers at
once. Then random ones: a well-formed verbose answer with the gold's value scores 1, with any other
value 0, and no text whatever raises or leaves 0..1.
"""

import itertools
import math
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prepare import VIEWS, BadInput, chance, parse, score, view_concat

EVIDENCE = "Audio 1: a dog, audio 2: a cat, audio 3: a dog. "
CLIP = {"type": "clip", "value": [2]}
CLIP_TABLE = [
    # right
    ("2", 1), ("2.", 1), ("(2)", 1), ("#2", 1), ("Audio 2", 1), ("audio 2.", 1), ("clip two", 1),
    ("Clip Two!", 1), ("recording #2", 1), ("Recording no. 2", 1), ("the second clip", 1),
    ("The second one.", 1), ("second clip", 1), ("the 2nd clip", 1), ("<sound-2>", 1),
    ("number 2", 1), ("the second", 1), ("**Audio 2**", 1), ("Audio2", 1), ("(audio 2)", 1),
    ("It is audio 2.", 1), ("The answer is 2.", 1), ("The correct answer is clip 2.", 1),
    ("Answer: 2", 1), ("Final answer: audio 2, the cat.", 1), ("I think it is the second clip.", 1),
    # verbose: evidence with its index, then the verdict
    (EVIDENCE + "So the answer is audio 2.", 1), (EVIDENCE + "Audio 2.", 1),
    ("audio 1 dog, audio 2 cat, audio 3 dog : audio 2", 1),
    ("Audio 1 has a dog. Audio 2 has a cat. Audio 3 has a dog. Audio 2 is the odd one out.", 1),
    ("Audio 2. Audio 1 and audio 3 are dogs.", 1),
    ("Audio 2, because audio 1 and audio 3 are dogs.", 1),
    ("Audio 2 is the odd one out, whereas audio 1 and 3 are dogs.", 1),
    ("Since audio 1 and 3 are dogs, the answer is audio 2.", 1),
    ("Audio 2 is louder than audio 1.", 1), ("Audio 2 is louder than audio 1 and audio 3.", 1),
    ("Unlike audio 1 and audio 3, audio 2 is a cat.", 1),
    ("The odd one is audio 2 (audio 1 and audio 3 are dogs).", 1),
    ("The cat is in the second recording.", 1), ("Audio 2 does not belong.", 1),
    ("<think>It may be audio 1. Audio 1.</think>Audio 2", 1),
    ("It may be audio 1. Audio 1.</think>Audio 2", 1), ("Audio 1.</think>hm</think>Audio 2", 1),
    ("Since audio 1 and 3 are dogs, audio 2.", 1), ("I would pick 2.", 1),
    ("While audio 1 and audio 3 are dogs, audio 2 is a cat.", 1),
    ("Because it is unlike the rest, I choose the second clip.", 1),
    # a change of mind: the last word counts
    ("The answer is 1. No wait, the answer is 2.", 1), ("Audio 1. Actually, audio 2.", 1),
    ("Audio 2. Actually, audio 1.", 0), ("The answer is audio 2. Wait, it is audio 3.", 0),
    # negated
    ("Not audio 1 but audio 2.", 1), ("Neither audio 1 nor audio 3, so audio 2.", 1),
    ("Audio 1 is not the answer. Audio 2 is.", 1), ("not the second", None),
    ("It is not the second clip.", None), ("It isn't audio 2.", None),
    ("Audio 2 is not the answer.", None), ("Not clip 2, clip 3.", 0),
    # wrong
    ("1", 0), ("Audio 3", 0), ("the first clip", 0), ("clip 12", 0), ("audio 22", 0),
    (EVIDENCE + "So the answer is audio 3.", 0), ("Audio 1 is louder than audio 2.", 0),
    # two at once
    ("Audio 1 and audio 2", 0), ("1 and 2", 0), ("clips 1, 2 and 3", 0), ("all of them", None),
    ("The answer is 2 and 3.", 0), ("1. 2.", None), ("Audio 2. Audio 3.", None),
    # hedged
    ("either 1 or 2", None), ("Either audio 1 or audio 2.", None), ("audio 2 or audio 3", None),
    ("Maybe audio 2.", None), ("It could be audio 2.", None), ("2 or 3", None), ("1/2", None),
    ("2 (or 3)", None), ("Audio 2. Or maybe audio 1.", None), ("Audio 2 / audio 3", None),
    ("It's 1... or 2.", None), ("the second or the third clip", None), ("Not 2.", None),
    ("The answer is either 2 or 3.", None),
    # nothing but what was heard, or nothing
    (EVIDENCE, None), ("Audio 1: dog\nAudio 2: cat\nAudio 3: dog", None),
    ("In audio 1 a dog barks. In audio 2 a cat meows.", None), ("", None), (" \n", None),
    (".", None),
    ("I cannot tell.", None), ("There are 2 dogs.", None), ("2.5", None), ("at 2 s", None),
    ("<think>audio 2", None), ("a cat", None),
]  # fmt: skip
CLIPS = {"type": "clip", "value": [1, 3]}
CLIPS_TABLE = [
    ("1, 3", 1), ("1 and 3", 1), ("3 and 1", 1), ("Audio 1 and audio 3.", 1), ("clips 1 and 3", 1),
    ("the first and the third clip", 1), ("Both the first clip and the third clip", 1),
    ("Audio 1 and audio 3, not audio 2.", 1), ("audio 1: yes, audio 2: no, audio 3: yes: 1, 3", 1),
    ("1", 0), ("1, 2, 3", 0), ("audio 3", 0), ("1 or 3", None), ("Either 1 or 3", None),
    ("Audio 1 has a dog, audio 3 has a cat.", None), ("", None),
]  # fmt: skip
ORDER = {"type": "order", "value": [2, 1, 3]}
ORDER_TABLE = [
    ("2, 1, 3", 1), ("2 1 3", 1), ("2-1-3", 1), ("2→1→3", 1), ("2 -> 1 -> 3", 1), ("2 > 1 > 3", 1),
    ("2, then 1, then 3", 1), ("second, first, third", 1), ("Second, then first, then third.", 1),
    ("audio 2, audio 1, audio 3", 1), ("Audio 2, 1, 3.", 1), ("clips 2, 1 and 3", 1),
    ("the second clip, the first clip, the third clip", 1), ("(2, 1, 3)", 1), ("[2, 1, 3]", 1),
    ("The correct order is 2, 1, 3.", 1), ("The order is audio 2, audio 1, audio 3.", 1),
    ("Audio 2 comes first, then audio 1, and finally audio 3.", 1),
    ("Audio 2 first, audio 1 second, audio 3 third.", 1), ("2 before 1 before 3", 1),
    ("First is audio 2, second is audio 1, third is audio 3.", 1),
    ("clip 2 is followed by clip 1, which is followed by clip 3", 1), ("not 2, 1, 3", None),
    ("1. Audio 2\n2. Audio 1\n3. Audio 3", 1), ("two, one, three", 1),
    ("Audio 2 (dawn), then audio 1 (noon), then audio 3 (dusk).", 1),
    ("audio 1 noon, audio 2 dawn, audio 3 dusk : 2, 1, 3", 1),
    ("Audio 1 is noon. Audio 2 is dawn. Audio 3 is dusk. So 2, 1, 3.", 1),
    ("1, 2, 3. No wait, 2, 1, 3.", 1),
    ("1, 2, 3", 0), ("2, 3, 1", 0), ("2, 1", 0), ("3, 1, 2, 4", 0), ("third, first, second", 0),
    ("2, 1, 3 or 2, 3, 1", None), ("either 2, 1, 3 or 1, 2, 3", None), ("2, 1, 2", None),
    ("2", None),
    ("2, 1, 3. 1, 2, 3.", None), ("", None), ("audio 1 is noon, audio 2 is dawn", None),
    ("Second is audio 1, first is audio 2, third is audio 3.", None),
    ("Maybe 2, 1, 3.", None), ("2, 1 and 3 dogs bark", None), ("213", None),
]  # fmt: skip
COUNT = {"type": "count", "value": 12}
COUNT_TABLE = [
    ("12", 1), ("12.", 1), ("twelve", 1), ("Twelve!", 1), ("a dozen", 1), ("There are 12.", 1),
    ("12 times", 1), ("There are twelve barks.", 1), ("The dog barks 12 times.", 1),
    ("audio 1: 5, audio 2: 7, so 12", 1), ("audio 1 5, audio 2 7 : 12", 1), ("5 + 7 = 12", 1),
    ("There are 5 in audio 1 and 7 in audio 2, 12 in total.", 1), ("a total of 12", 1),
    ("Audio 1 has 5 barks. Audio 2 has 7 barks. There are 12 barks.", 1),
    ("Twelve barks across the 3 clips.", 1), ("Total: 12", 1),
    ("The answer is 12, 5 in audio 1 and 7 in audio 2.", None),
    ("Audio 2, at 1.5 s, has 12 barks.", 1), ("12 (5 in audio 1, 7 in audio 2)", 1),
    ("11. No, wait: 12.", 1),
    ("13", 0), ("1", 0), ("one", 0), ("120", 0), ("112", 0), ("1,200", 0), ("zero", 0), ("none", 0),
    ("There are no barks.", 0), ("half a dozen", 0), ("twice", 0), ("twenty-one", 0), ("-12", None),
    ("between 12 and 13", None), ("between 11 and 12", None), ("12 or 13", None), ("12-13", None),
    ("12 to 13", None), ("at least 12", None), ("more than 12", None), ("about 12", None),
    ("12 or more", None), ("12+", None), ("~12", None), ("roughly a dozen", None),
    ("two dozen", None), ("12 hundred", None), ("12%", None), ("12.5", None), ("12 s", None),
    ("audio 12", None), ("the odd one", None), ("maybe 12", None), ("12. 13.", None),
    ("11 in audio 1 and 12 in audio 2", None), ("Audio 1: 11. Audio 2: 12.", None), ("", None),
    ("many", None),
]  # fmt: skip
SMALL = [
    (0, "none", 1), (0, "zero", 1), (0, "There are no dogs.", 1), (0, "It never barks.", 1),
    (1, "one", 1), (1, "once", 1), (1, "Only one of the clips.", 1), (2, "twice", 1),
    (2, "Two of the clips.", 1), (21, "twenty-one", 1), (21, "twenty one", 1),
    (6, "half a dozen", 1),
    (3, "between 3 and 4", None), (4, "between 3 and 4", None), (1, "this one", None),
    (100, "one hundred", None), (1, "one hundred", None), (1200, "1,200", 1),
]  # fmt: skip
YES = {"type": "yesno", "value": "yes"}
NO = {"type": "yesno", "value": "no"}
NEI = {"type": "yesno", "value": "nei", "choices": ["yes", "no", "nei"]}
YESNO_TABLE = [  # the answer, and what it says
    ("Yes", "yes"), ("yes.", "yes"), ("YES!", "yes"), ("Yes, they are the same.", "yes"),
    ("Yeah", "yes"), ("True", "yes"), ("That is correct.", "yes"), ("The answer is yes.", "yes"),
    ("**Yes**", "yes"), ("So yes.", "yes"), ("The claim is supported.", "yes"),
    ("Yes it is.", "yes"),
    ("Yes - audio 1 says so.", "yes"), ("Audio 1 supports the claim.", "yes"),
    ("audio 1 says five, audio 2 says five : yes", "yes"), ("I would say yes", "yes"),
    ("Audio 1: yes, audio 2: no. So yes.", "yes"), ("No. Actually, yes.", "yes"),
    ("There is no dog in audio 1, so yes.", "yes"), ("Yes, because no dog barks.", "yes"),
    ("Yes. No dog is heard in audio 1.", "yes"), ("No, wait, yes.", "yes"),
    ("It isn't true.", "no"), ("The claim cannot be true.", "no"), ("not yes", "no"),
    ("It does not support the claim.", "no"), ("The clips don't support it.", "no"),
    ("The answer is not yes.", "no"), ("It is not false.", None), ("neither yes nor no", None),
    ("Audio 2 does not contradict it.", None), ("Yes, no doubt.", "yes"), ("no idea", None),
    ("No", "no"), ("no.", "no"), ("Nope", "no"), ("False", "no"), ("It is not true.", "no"),
    ("No, audio 2 says otherwise.", "no"), ("The correct answer is no.", "no"), ("(no)", "no"),
    ("Not supported.", "no"), ("Audio 2 contradicts the claim.", "no"), ("That's incorrect.", "no"),
    ("audio 1 says five, audio 2 says six : no", "no"), ("No, they do not.", "no"),
    ("Yes. Wait, no.", "no"), ("No, because audio 2 is true to life.", "no"),
    ("Not enough information", "nei"), ("There is not enough information.", "nei"),
    ("Not enough information, audio 3 is silent.", "nei"), ("NEI", "nei"),
    ("Insufficient evidence.", "nei"), ("It cannot be determined.", "nei"),
    ("It can't be determined from the clips.", "nei"), ("Unknown", "nei"), ("Neutral.", "nei"),
    ("It is not mentioned.", "nei"), ("The clips do not give enough information.", "nei"),
    ("Yes and no.", None), ("yes or no", None), ("Yes. No.", None), ("Maybe yes.", None),
    ("Possibly.", None), ("Either yes or no.", None), ("", None), ("I am not sure.", None),
    ("There is no dog.", None), ("No dog barks in audio 1.", None), ("yesterday", None),
    ("nothing", None), ("Yes, no.", None), ("Yes. Or maybe no.", None), ("a dog", None),
    ("audio 1 says yes and audio 2 says no", None),
]  # fmt: skip
CHOICE = {"type": "choice", "value": "dog", "choices": ["cat", "dog", "dog and cat", "a siren"]}
CHOICE_TABLE = [
    ("dog", 1), ("Dog.", 1), ("a dog", 1), ("The dog", 1), ("B", 1), ("b", 1), ("B.", 1),
    ("(B)", 1),
    ("B)", 1), ("(B) dog", 1), ("B. dog", 1), ("B: dog", 1), ("**B**", 1), ("B, a dog.", 1),
    ("Option B", 1), ("[B]", 1), ("I choose B.", 1), ("choice b", 1),
    ("B because it barks", 1), ("neither dog nor cat", None), ("The answer isn't B.", None),
    ("The answer is B.", 1), ("The answer is (B) dog.", 1), ("Answer: B", 1),
    ("the answer is dog", 1), ("The sound is a dog.", 1), ("It is a dog, not a cat.", 1),
    ("A dog, rather than a cat.", 1), ("I hear barking. So it is the dog.", 1),
    ("A cat. No wait, a dog.", 1), ("audio 1 barks, audio 2 barks : dog", 1),
    ("cat", 0), ("A", 0), ("(A) cat", 0), ("dog and cat", 0), ("C", 0), ("siren", 0), ("D.", 0),
    ("The answer is C, dog and cat.", 0), ("a", 0), ("It is a cat, not a dog.", 0),
    ("(A) dog", None), ("B. cat", None), ("dog or cat", None), ("A or B", None),
    ("dog, siren", None),
    ("not a dog", None), ("either a dog or a cat", None), ("maybe a dog", None), ("E", None),
    ("", None), ("doghouse", None), ("a bird", None), ("cat. dog.", None), ("I", None),
]  # fmt: skip
CHOICES = [  # choices, the right one, an answer, its score
    (["1, 2, 3", "2, 1, 3"], "2, 1, 3", "2, 1, 3", 1),
    (["1, 2, 3", "2, 1, 3"], "2, 1, 3", "B. 2, 1, 3", 1),
    (["1, 2, 3", "2, 1, 3"], "2, 1, 3", "1, 2, 3", 0),
    (["Audio 1", "Audio 2"], "Audio 2", "the second clip", 1),
    (["Audio 1", "Audio 2"], "Audio 2", "Clip two is louder than clip one.", 1),
    (["12", "13"], "12", "Twelve.", 1), (["2.5 s", "5 s"], "5 s", "5 s", 1),
    (["2.5 s", "5 s"], "5 s", "2.5 s", 0), (["C", "C#"], "C#", "C#", 1),
    (["C", "D", "E", "F"], "D", "The answer is D.", 1), (["C", "D"], "D", "(B)", 1),
    (["C", "D", "E", "F"], "F", "The answer is D.", 0), (["B", "A"], "A", "The answer is A.", 1),
    (["C", "D", "E", "F"], "F", "(D) F", 1), (["C", "D"], "D", "(B) D", 1),
    (["-3 dB", "3 dB"], "3 dB", "-3 dB", 0),
    (["Mr. Smith", "Mrs. Smith"], "Mr. Smith", "Mr. Smith", 1),
    (["Mr. Smith", "Mrs. Smith"], "Mrs. Smith", "The speaker is (B) Mrs. Smith.", 1),
    (["not a dog", "a dog"], "not a dog", "not a dog", 1),
    (["not a dog", "a dog"], "a dog", "not a dog", 0),
    (["A then B", "B then A"], "B then A", "B then A", 1),
    (["A then B", "B then A"], "B then A", "A then B", 0),
    (["Yes", "No"], "No", "No.", 1), (["Yes", "No"], "No", "B", 1), (["Yes", "No"], "No", "Yes", 0),
    (["maybe", "never"], "maybe", "maybe", 1), (["dog", "cat"], "cat", "猫", None),
]  # fmt: skip
SPAN = {"type": "span", "value": {"clip": 2, "on": 1.2, "off": 3.0}}
SPAN_TABLE = [
    ("from 1.2 s to 3 s in audio 2", 1), ("audio 2, 0:01.2-0:03", 1), ("clip 2: 1.2 to 3.0", 1),
    ("Audio 2, 1.2-3.0 s", 1), ("audio 2, 1.2 – 3.0 seconds", 1),
    ("Clip 2, between 1.2 and 3.0 s.", 1),
    ("In the second clip, from 1.2s to 3s.", 1), ("audio 2 [1.2, 3.0]", 1),
    ("audio 2: 1200 ms to 3000 ms", 1),
    ("The siren starts at 1.2 s and ends at 3 s in audio 2.", 1),
    ("audio 2, onset 1.2, offset 3", 1),
    ("It is in audio 2. It runs from 1.2 to 3.0 s.", 1), ("audio 2, from one to three seconds", 1),
    ("audio 1 dog 0.2 to 0.9, audio 2 siren 1.2 to 3.0 : audio 2, 1.2 to 3.0", 1),
    ("audio 2, 1.0 to 3.2 s", 1), ("audio 2, 2.1 to 3.0 s", 1), ("audio 2, 2.2 to 3.0 s", 0),
    ("audio 1, 1.2 to 3.0 s", 0), ("audio 2, 4 to 5 s", 0), ("audio 2, 0 to 30 s", 0),
    ("audio 2", None), ("1.2 to 3.0 s", None), ("audio 2, 3.0 to 1.2 s", None),
    ("audio 2 at 1.2 s", None),
    ("audio 1 or audio 2, 1.2 to 3.0 s", None), ("audio 2, 1.2 to 3.0 or 4.0 s", None), ("", None),
    ("maybe audio 2, 1.2 to 3.0 s. Maybe audio 1, 1.2 to 3.0 s", None),
    ("Maybe audio 2, 1.2 to 3.0 s.", None), ("Audio 2, 1.2 s to 3.0 s, not audio 1.", 1),
]  # fmt: skip
KEYWORDS = {"type": "keywords", "value": ["river", "stone"]}
KEYWORDS_TABLE = [
    ("river, stone", 1), ("stone and river", 1), ("The common words are: river, stone.", 1),
    ("River\nstone", 0.5 * 4 / 3), ("The shared keywords are river and stone", 1),
    ('Both clips mention "river" and "stone", which are outdoors.', 1),
    ("audio 1 the river runs, audio 2 a stone : river, stone", 1), ("river", 2 / 3), ("dog", 0),
    ("river, stone, dog, cat", 2 / 3), ("", None), ("...", None), ("the words are", None),
]  # fmt: skip
TEXT = {"type": "text", "value": {
    "text": "Audio 1: a dog barks. Audio 2: rain.",
    "slots": [["audio 1 dog", "audio 1 hound"], ["rain", "rainfall"]],
}}  # fmt: skip
TEXT_TABLE = [
    ("Audio 1: a dog barks. Audio 2: rain.", 1),
    ("The first clip: a hound. The second clip: rainfall.", 1),
    ("In the first clip we hear a hound, then there is rainfall.", 2 / 3),
    ("We hear: audio 1 dog, and also the rain.", 1), ("audio 1: a dog", 2 / 3),
    ("audio 1: rain, audio 2: a dog", 2 / 3), ("A siren.", 0),
    ("", None), ("?!", None),
    ("audio 1: a dog, rain, siren, bell", 4 / 6), ("audio 1: dogs", 0),
]  # fmt: skip
TRANSCRIPT = {"type": "transcript", "value": "The cat's here, two of them"}
TRANSCRIPT_TABLE = [
    ("the cat's here two of them", 1), ("THE CAT’S HERE: TWO OF THEM!", 1),
    ('The speaker says "the cat\'s here two of them".', 1),
    ("The speaker says: the cat's here two of them", 1),
    ("The cat's here", 0.5), ("the cat's here two of them now", 1 - 1 / 6),
    ("cat's the here two of them", 1 - 2 / 6),
    ("dog " * 20, 0), ("", None), ("...", None),
]  # fmt: skip

TABLE = [
    *((CLIP, *row) for row in CLIP_TABLE), *((CLIPS, *row) for row in CLIPS_TABLE),
    *((ORDER, *row) for row in ORDER_TABLE), *((COUNT, *row) for row in COUNT_TABLE),
    *(({"type": "count", "value": value}, answer, right) for value, answer, right in SMALL),
    *((gold, answer, None if says is None else int(says == gold["value"]))
      for gold in (YES, NO, NEI) for answer, says in YESNO_TABLE),
    *((CHOICE, *row) for row in CHOICE_TABLE),
    *(({"type": "choice", "value": value, "choices": choices}, answer, right)
      for choices, value, answer, right in CHOICES),
    *((SPAN, *row) for row in SPAN_TABLE), *((KEYWORDS, *row) for row in KEYWORDS_TABLE),
    *((TEXT, *row) for row in TEXT_TABLE), *((TRANSCRIPT, *row) for row in TRANSCRIPT_TABLE),
]  # fmt: skip


@pytest.mark.parametrize("gold, answer, expected", TABLE)
def test_score(gold, answer, expected):
    found = score(gold, answer)
    assert found == (expected if expected is None else pytest.approx(expected)), parse(gold, answer)
    assert found is None or type(found) is float


# ------------------------------------------------------------------------------------------------
# Random ones.

EVENTS = ["dog", "cat", "siren", "rain", "bell", "phone call", "dog and cat"]
VERDICTS = [
    "{}",
    "{}.",
    "So {}.",
    "The answer is {}.",
    "So the answer is {}.",
    "Final answer: {}",
    "**{}**",
]
DENIED = [
    "Not {}.", "It is not {}.", "It isn't {}", "The answer is not {}.", "It cannot be {}.",
    "It can't be {}", "It is certainly not {}.", "I don't think it is {}.", "I doubt it is {}",
    "It is unlikely to be {}", "Anything but {}.", "all except {}", "Everything but {}", "Never {}",
    "Any but {}", "other than {}", "{} is wrong", "{} is not it.", "{} can't be right.",
    "{} would be incorrect", "{}, which is wrong", "{}. That is wrong.", "{}? No.", "{}?",
    "{} (wrong)", "The wrong answer is {}", "Neither {}",
]  # fmt: skip
CORRECTED = [  # first the wrong value, then the right one
    "Not {} but {}.", "It is not {}, it is {}.", "It can't be {}, so it is {}.", "{}? No. {}.",
    "It isn't {}. It is {}", "{} is wrong, it is {}.", "{}. That is wrong. It is {}.",
]  # fmt: skip
FORMS = {"clip": ["audio {}", "Clip {}", "{}", "recording #{}", "<sound-{}>"]}
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def heard(facts, style: str) -> str:
    """What a model says that it heard, clip by clip, before its verdict."""
    labelled = [style.format(i, fact) for i, fact in enumerate(facts, 1)]
    return {"audio {}: {}": ", ", "audio {} {}": " , "}.get(style, ". ").join(labelled)


STYLES = ["audio {}: {}", "audio {} {}", "In clip {} there is a {}", "Audio {} has a {}"]


@st.composite
def asked(draw, verdicts=VERDICTS):
    """A gold, a right answer and a wrong one of the same form, verbose or not. A verdict of two
    places takes the other value first."""
    n = draw(st.integers(2, 5))
    kind = draw(st.sampled_from(["clip", "clips", "order", "count", "yesno", "choice", "span"]))
    other = None
    if kind == "clip":
        right, wrong = draw(st.lists(st.integers(1, n), min_size=2, max_size=2, unique=True))
        gold = {"type": "clip", "value": draw(st.sampled_from([right, [right]]))}
        form = draw(st.sampled_from(FORMS["clip"]))
        said, other = form.format(right), form.format(wrong)
    elif kind == "clips":
        sets = [set(c) for k in range(2, n + 1) for c in itertools.combinations(range(1, n + 1), k)]
        right = draw(st.sampled_from(sets))
        wrong = draw(st.sampled_from([{1}, *sets]).filter(lambda s: s != right))
        gold = {"type": "clip", "value": draw(st.permutations(sorted(right)))}
        said, other = (" and ".join(f"audio {i}" for i in s) for s in (right, wrong))
    elif kind == "order":
        right = draw(st.permutations(range(1, n + 1)))
        wrong = draw(st.permutations(range(1, n + 1)).filter(lambda order: order != right))
        gold = {"type": "order", "value": right}
        link = draw(st.sampled_from([", ", " -> ", ", then ", " → "]))
        form = draw(st.sampled_from(["{}", "audio {}", "clip {}"]))
        said, other = (link.join(form.format(i) for i in order) for order in (right, wrong))
    elif kind == "count":
        right, wrong = draw(st.lists(st.integers(0, 12), min_size=2, max_size=2, unique=True))
        gold = {"type": "count", "value": right}
        form = draw(st.sampled_from([str, WORDS.__getitem__]))
        said, other = form(right), form(wrong)
    elif kind == "yesno":
        names = {"yes": "yes", "no": "no", "nei": "not enough information"}
        right, wrong = draw(st.permutations(sorted(names)))[:2]
        gold, said, other = {"type": "yesno", "value": right}, names[right], names[wrong]
    elif kind == "choice":
        choices = draw(st.permutations(EVENTS))[:4]
        right, wrong = draw(st.permutations(range(4)))[:2]
        gold = {"type": "choice", "value": choices[right], "choices": choices}
        form = draw(st.sampled_from(["{1}", "({0}) {1}", "({0})", "a {1}"]))
        said, other = (form.format("ABCD"[i], choices[i]) for i in (right, wrong))
    else:
        on, clip = draw(st.integers(0, 50)) / 10, draw(st.integers(1, n))
        gold = {"type": "span", "value": {"clip": clip, "on": on, "off": on + 2}}
        said = f"audio {clip}, {on} to {on + 2.0} s"
        late = f"audio {clip}, {on + 1.0} to {on + 5.0} s"
        other = draw(st.sampled_from([f"audio {clip % n + 1}, {on} to {on + 2.0} s", late]))
    pattern = draw(st.sampled_from(verdicts))
    facts = (
        ["sound"] * n
        if kind == "choice"
        else draw(st.lists(st.sampled_from([*EVENTS, "cat but no dog"]), min_size=n, max_size=n))
    )
    lead = heard(facts, draw(st.sampled_from(STYLES))) + draw(st.sampled_from([". ", " : ", "\n"]))
    lead = draw(st.sampled_from(["", lead]))
    pairs = [(other, said), (said, other)] if pattern.count("{}") == 2 else [(said,), (other,)]
    return gold, *(lead + pattern.format(*pair) for pair in pairs)


@settings(deadline=None, max_examples=600)
@given(asked())
def test_a_verbose_answer_scores_by_its_verdict(item):
    gold, right, wrong = item
    assert score(gold, right) == 1, (gold, right)
    assert score(gold, wrong) == 0, (gold, wrong)


@settings(deadline=None, max_examples=600)
@given(asked(DENIED))
def test_no_way_to_deny_a_value_names_it(item):
    gold, denied, _ = item
    agreeing = ("That is wrong.", "which is wrong", "(wrong)", "? No.")
    if gold["value"] == "no" and denied.endswith(agreeing):  # "No. That is wrong." is a plain no
        return
    assert score(gold, denied) in (0.0, None), (gold, denied)


@settings(deadline=None, max_examples=600)
@given(asked(CORRECTED))
def test_what_stands_in_place_of_the_denied_counts(item):
    gold, right, wrong = item
    assert score(gold, wrong) in (0.0, None), (gold, wrong)
    if gold["type"] != "yesno":  # what is not "no" need not be "yes"
        assert score(gold, right) == 1, (gold, right)


@settings(deadline=None, max_examples=300)
@given(asked(), asked())
def test_two_verdicts_of_a_kind_are_never_both_right(one, two):
    """An answer that names the right value and a wrong one with "or" between has no verdict."""
    gold, right, wrong = one
    if "\n" not in right and ":" not in right and ". " not in right and "*" not in right:
        assert score(gold, f"{right.rstrip('.')} or {wrong}") in (None, 0.0)
        assert score(gold, f"Either {right.rstrip('.')} or {wrong}") in (None, 0.0)


PIECES = st.sampled_from(
    "audio clip 1 2 3 , . : ; or and not the second first yes no enough information so answer is "
    "( ) A B dog cat -> 1.2 s to 0:03 either between maybe # <sound-2> <think> </think> = + \n "
    "than because one dozen twenty - % ～ ½ １ ② \x00 \u202e".split(" ")
)
ANYTHING = st.one_of(
    st.text(), st.lists(PIECES, max_size=30).map(" ".join), st.lists(PIECES).map("".join)
)
ALL = [CLIP, CLIPS, ORDER, COUNT, YES, NO, NEI, CHOICE, SPAN, KEYWORDS, TEXT, TRANSCRIPT]


@settings(deadline=None, max_examples=600)
@given(ANYTHING)
@example("#99999999999999999999 audio 0 clip 11 the 10th clip")
@example("9" * 5000)
@example("audio " + "9" * 5000)
@example("İ ß ﬁ ㎑ ١٢ ² ⅷ clip ٢")
def test_no_text_raises_and_every_score_is_within_0_and_1(text):
    for gold in ALL:
        found = score(gold, text)
        assert found is None or (type(found) is float and 0 <= found <= 1)


@pytest.mark.parametrize("text", [
    "audio 1, " * 10_000, "1, " * 20_000, "so " * 20_000, " " * 50_000, "(" * 30_000, "a" * 50_000,
    "not " * 20_000, ": " * 20_000, "first, " * 10_000, "1" * 50_000, "#1 " * 20_000, "\n" * 50_000,
    "because " * 10_000, "1-" * 20_000, "clips 1 and 2 and " * 5_000, '"' * 20_000,
])  # fmt: skip
def test_a_model_that_never_stops_is_scored_in_time(text):
    start = time.perf_counter()
    for gold in ALL:
        score(gold, text)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("text", [
    "the a that b is not ", "no clip but ", "every a b c ", "a, b c d or ", "clip 1, ", "n't like ",
    "that which who not ", "yes is wrong ", "(no) ", "before 1 after ", "than unlike ", "a" * 4_000,
    "12 or so too ", "can't be any but ", "no no", "not and ", "is the ", "1, 2 and ", "- : ; ,",
])  # fmt: skip
@pytest.mark.parametrize("end", ["not", "that is clip 2"])
def test_nothing_that_is_nearly_a_denial_is_searched_forever(text, end):
    """There is no clock here: a pattern that backtracks without end would not come back at all."""
    text = (text * 4_000)[: 4_000 - len(end)] + end
    for gold in ALL:
        found = score(gold, text)
        assert found is None or 0 <= found <= 1


def test_no_order_of_the_options_changes_a_score():
    for choices in itertools.permutations(CHOICE["choices"]):
        letter = "ABCD"[choices.index("dog")]
        assert score({**CHOICE, "choices": list(choices)}, f"({letter}) dog") == 1
        assert score({**CHOICE, "choices": list(choices)}, letter) == 1


# ------------------------------------------------------------------------------------------------
# Chance.

THREE = {"clips": ["a", "b", "c"], "meta": {}}


@pytest.mark.parametrize("gold, meta, space", [
    (CHOICE, {}, 4), (YES, {}, 2), (NO, {}, 2), (NEI, {}, 3),
    ({"type": "yesno", "value": "nei"}, {}, 3),
    ({**YES, "choices": ["yes", "no", "nei"]}, {}, 3), (CLIP, {}, 3),
    ({"type": "clip", "value": 2}, {}, 3),
    (CLIPS, {}, 3), (ORDER, {}, 6), (COUNT, {"range": [0, 12]}, 13),
    (COUNT, {"range": [12, 12]}, 1),
    ({"type": "order", "value": [2, 1]}, {}, 2),
])  # fmt: skip
def test_chance_is_one_over_the_answer_space(gold, meta, space):
    assert chance({**THREE, "gold": gold, "meta": meta}) == 1 / space


@pytest.mark.parametrize("gold", [COUNT, SPAN, KEYWORDS, TEXT, TRANSCRIPT])
def test_chance_is_0_where_the_answer_is_open(gold):
    assert chance({**THREE, "gold": gold}) == 0.0
    assert type(chance({**THREE, "gold": gold})) is float
    assert chance(THREE) == 0.0


def test_chance_is_the_mean_score_of_every_answer():
    """The definition, with every answer of the space written out and scored."""
    spaces = {
        "clip": (CLIP, ["1", "2", "3"]),
        "order": (ORDER, [", ".join(map(str, o)) for o in itertools.permutations([1, 2, 3])]),
        "yesno": (NEI, ["yes", "no", "not enough information"]),
        "choice": (CHOICE, CHOICE["choices"]),
        "count": (COUNT, [str(i) for i in range(10, 15)]),
    }
    for gold, answers in spaces.values():
        expected = sum(score(gold, answer) for answer in answers) / len(answers)
        assert math.isclose(chance({**THREE, "gold": gold, "meta": {"range": [10, 14]}}), expected)


def test_joined_clips_are_still_as_many():
    """A view may join the clips: a chance of 1 of 1 would make every score look bad."""
    item = {**THREE, "question": "Which?", "answer": "2", "gold": CLIP}
    assert chance(view_concat(item)) == 1 / 3
    with pytest.raises(BadInput, match="chance: expected the example as it was"):
        chance(VIEWS["text-only"](item))


THREE_OF = {"type": "count", "value": 3}
SPAN_OF_ONE = {"type": "span", "value": {"on": 1.2, "off": 3.0}}
DENIALS = [  # what hostile readers found: each names the gold, and denies it or leaves it open
    (CLIP, [
        "Clip 2 is definitely not the answer", "Clip 2, definitely not", "Rule out clip 2",
        "clip 2: no", "All of the clips but the second", "With the exception of clip 2",
        "There is no dog in clip 2", "Clip 2 does not contain the dog",
        "Clip 2 is not louder than clip 1", "I'm not sure it's 2", "Clip 2 is the least likely",
        "It was said to be clip 2, but that is wrong", "It isnt clip 2",
        "Not clip 1, clip 2 or clip 3.", "It is not clips 1, 2", "Answer: none of 1, 2", "2, no",
        "The clip that is not right is clip 2", "No way it is clip 2", "Wrong: clip 2",
        "Clip 2 (not)", "I don't know whether it is clip 2", "It is not true that clip 2 is louder",
        "It is false that it is 2",
        "clip 2 -- not!", "The answer is clip 2. No, it isn't.", "Is it clip 2?",
        "Clip 2 is wrong, it is clip 3",
    ]),
    (CLIPS, [
        "Neither 1 nor 3", "Clips 1 and 3 are wrong", "Everything but 1 and 3", "1 and not 3",
        "It can't be clips 1 and 3", "clips 1 and 3 do not match", "all except clips 1, 3",
    ]),
    (ORDER, [
        "The order is not clip 2, clip 1, clip 3", "clip 2, clip 1, clip 3 is wrong", "not 2-1-3",
        "The reverse of 2, 1, 3", "2, 1, 3 (wrong)", "clip 2, clip 1, clip 3, but reversed",
        "Clip 2 does not come before clip 1, clip 3", "2 -> 1 -> 3 is not right", "2, 1, 3: no",
    ]),
    (COUNT, [
        "There are not 12", "There aren't 12 barks", "The dog does not bark 12 times", "12, not",
        "at least 12 in total", "a maximum of 12", "12 at most", "not 11 or 12", "double 12",
        "12 is too many", "no more than 12", "all but 12", "It is not 12 in total", "12-ish",
    ]),
    (THREE_OF, ["not 3", "It isn't 3.", "3 is wrong", "neither 3 nor 4", "not exactly three"]),
    (YES, [
        "It is unlikely to be true.", "Neither clip supports the claim.", "No clip supports it",
        "None of the clips supports the claim", "The claim is by no means true", "Partly true",
        "It is not the case that the claim is true", "I see no reason to believe it is true",
        "It is unclear whether it is true", "Rather than yes", '"Yes" is wrong.', "Is it true?",
        "Yes, that is wrong.",
    ]),
    (NO, [
        "Nothing contradicts it", "No clip contradicts it.", "I don't think it is false", "not no",
        "It never contradicts the claim", "far from false", "No, there is not enough information.",
        "False? No, true.",
    ]),
    (NEI, ["It is not unknown", "It isn't impossible to tell", "not not enough information"]),
    (CHOICE, [
        "There is no dog.", "Anything but a dog.", "Any animal but a dog", "Not B", "(B) is wrong",
        "The dog is not heard", "It does not sound like a dog", "I cannot hear the dog", "B: wrong",
        "not cat or dog", "Neither a siren, a cat nor a dog", "There is no sound of a dog",
        "dog or something else", "I don't know whether it is a dog", "The dog can be ruled out",
    ]),
    ({**YES, "type": "choice", "value": "Yes", "choices": ["Yes", "No"]}, ["not yes"]),
    (SPAN, [
        "In audio 2, but not from 1.2 to 3.0 s", "audio 2, outside 1.2 to 3.0 s",
        "There is no siren from 1.2 to 3.0 s in audio 2", "audio 2 is wrong, 1.2 to 3.0 s",
        "audio 2. Not 1.2 to 3.0 s.", "audio 2, 1.2 to 3.0 s, is not right",
    ]),
    (SPAN_OF_ONE, ["not from 1.2 to 3.0 s", "1.2 to 3.0 s is wrong", "except 1.2 to 3.0 s"]),
    (KEYWORDS, [
        "no river and no stone", "neither river nor stone", "not river", "no river or stone",
        "not river, not stone", "anything but river and stone", "without river and stone",
        "river and stone are not mentioned", "They do not share river or stone",
        'neither "river" nor "stone"', "river and stone? No.", "river, stone. That is wrong.",
    ]),
]  # fmt: skip
NEIGHBOURS = [  # as near to a denial as what is right can be
    (CLIP, [
        "Clip 3 is wrong, it is clip 2", "It can't be clip 1 or 3: clip 2", "2 (not 1)", "2 not 1",
        "There is no doubt that it is clip 2", "Nothing but clip 2", "None other than clip 2",
        "Clip 2 is not like the others.", "Clip 2 doesn't fit with the others", "No, clip 2.",
        "The one that doesn't belong is clip 2.", "The clip without a dog is the second one.",
        "Clip 2 is the only one that does not have a dog.",
        "Clip 2 is the odd one out: it has no dog", "The dog is in clip 2, not in clip 1 or 3.",
        "Clip 1 is not louder, clip 2 is.", "All but clip 2 have a dog. The answer is clip 2",
        "Is it clip 1? No. It is clip 2",
        "Clip 1 has a dog, clip 2 does not, clip 3 does. So clip 2.", "Not only is clip 2 louder.",
        "Clip 1: a dog\nClip 2: no dog\nAnswer: 2", "The louder one is clip 2", "Clip 2 is louder.",
    ]),
    (CLIPS, ["1 and 3, not 2", "All but clip 2: clips 1 and 3", "Clip 1, clip 3, but not clip 2"]),
    (ORDER, [
        "Not 1, 2, 3 but 2, 1, 3", "1, 2, 3 is wrong, the order is 2, 1, 3", "2, 1, 3, not 1, 2, 3",
        "2, 1, 3 (not 1, 2, 3)", "clip 2, clip 1, clip 3, not clip 1, clip 2, clip 3",
        "audio 1 no dog, audio 2 dog, audio 3 none : 2, 1, 3",
    ]),
    (COUNT, [
        "not 11 but 12", "12 rather than 11", "12 (not 11)", "12 without a doubt", "12, not 11",
        "It can't be 11, so 12", "12, no more and no less",
    ]),
    (YES, [
        "It is not false but true", "Yes rather than no", "Nothing contradicts it, so yes",
        "There is no doubt that it is true", "The dog does not bark and the claim is true",
    ]),
    (NO, ["That is wrong.", "No, that is wrong", "It is not true but false", "No. They are not."]),
    (NEI, ["There isn't enough information", "There's not enough information to say yes or no"]),
    (CHOICE, [
        "The cat is wrong, it is a dog.", "B, not A.", "It is B and not A", "a dog, never a cat",
        "dog, neither cat nor siren", "None other than a dog",
        "It does not sound like a cat but a dog", "It can't be anything but a dog",
        "a dog (not a cat)", "There is no cat, only a dog",
    ]),
    ({**NO, "type": "choice", "value": "No", "choices": ["Yes", "No"]}, [
        "No, it is not.", "No. They are not.",
    ]),
    (SPAN, [
        "Not audio 1 but audio 2, from 1.2 to 3.0 s", "audio 2, 1.2 to 3.0 s, not 4.0 to 5.0 s",
        "Audio 1 has no siren. Audio 2, 1.2 to 3.0 s.",
    ]),
    (SPAN_OF_ONE, ["1.2 to 3.0 s, not 4.0 to 5.0 s", "Not 4.0 to 5.0 s but 1.2 to 3.0 s"]),
    (KEYWORDS, [
        "river, stone, not bird", "not bird but river and stone", "river and stone, nothing else",
        "river, stone. Not bird.", "not only river but also stone",
        "river and stone without a doubt", '"river" and "stone", not "bird"',
    ]),
    ({"type": "keywords", "value": ["no", "river"]}, ["no, river", "no river"]),
    ({"type": "keywords", "value": ["save", "river"]}, ["save, river"]),
]  # fmt: skip


def each(table):
    return [(gold, answer) for gold, answers in table for answer in answers]


@pytest.mark.parametrize("gold, answer", each(DENIALS))
def test_what_is_denied_is_not_right(gold, answer):
    assert score(gold, answer) in (0.0, None), parse(gold, answer)


@pytest.mark.parametrize("gold, answer", each(NEIGHBOURS))
def test_what_stands_beside_a_denial_still_counts(gold, answer):
    assert score(gold, answer) == 1.0, parse(gold, answer)


def test_a_comparison_names_its_subject():
    """The question is not known, so "quieter" may be what it asked for."""
    assert score(CLIP, "Clip 2 is quieter than clip 1") == 1.0
    assert score(CLIP, "Clip 1 is quieter than clip 2") == 0.0
    assert score(CLIP, "Clip 1 is quieter than clip 2, so clip 2 is louder") != 0.0


def test_what_was_thought_has_no_say_however_long_it_was():
    """Thoughts go before the answer is cut to its end, or their own end would be taken for it."""
    long = "Audio 1. " * 1000
    assert score(CLIP, f"<think>{long}</think>Audio 2") == 1
    assert score(CLIP, f"{long}</think>Audio 2") == 1  # begun in the prompt
    assert score(CLIP, f"Audio 2.<think>{long}") == 1
    assert score(CLIP, f"<think>{long}") is score(CLIP, f"{long}</think>") is None
    said = {"type": "transcript", "value": "go home"}
    assert score(said, 'It says "stop".</think>She says: go home') == 1


def test_a_transcript_is_right_word_by_word():
    assert score({"type": "transcript", "value": "She said: go home"}, "She said: go home") == 1.0
    assert score({"type": "transcript", "value": "go home"}, "She said: go home") == 1.0


@pytest.mark.parametrize("answer", ["2nd", "Second."])
def test_an_ordinal_alone_names_a_clip(answer):
    assert score({"type": "clip", "value": [2]}, answer) == 1.0
    assert score({"type": "clip", "value": [1]}, answer) == 0.0


@pytest.mark.parametrize("answer", ["9" * 400, "9" * 4000, "\u2473" * 4000, "9" * 400 + ":1 to 2"])
@pytest.mark.parametrize("kind", ["count", "clip", "order", "span"])
def test_a_number_that_never_ends_is_a_wrong_one(kind, answer):
    """Of some letters one is a number of two digits, and Python reads no more than 4300."""
    value = {"count": 3, "clip": 2, "order": [2, 1], "span": {"on": 0.5, "off": 1.0}}[kind]
    gold = {"type": kind, "value": value}
    found = parse(gold, answer)
    assert not score(gold, answer)
    assert kind != "count" or found is None or math.isfinite(abs(found - 3) / 2)
