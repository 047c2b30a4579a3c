"""What prepare.py promises about views: each is the same example in another form, says of itself
how its sound is loaded and its prompt laid out, and leaves the example it came from as it was.
(Concat and permute have more tests in test_prompt.py, beside the words that permute follows.)
"""

import copy

import numpy as np
import pytest
import soundfile

from prepare import (
    BOUNDARIES,
    RATE,
    VIEWS,
    BadInput,
    Tokenizer,
    conversation,
    load_clip,
    score,
    train_bpe,
    view_permute,
)

EXAMPLE = {
    "id": "x1", "task": "odd", "skill": "comparison",
    "clips": ["a.wav", {"path": "b.wav", "start": 0.1, "end": 0.3}, "c.wav"],
    "question": "<sound-1>\n<sound-2> and <sound-3>: which is odd, or is clip 2?",
    "answer": "Clip 2.",
    "gold": {"type": "clip", "value": [2]}, "source": "toy", "licences": ["CC0"],
    "meta": {"evidence": [{"clip": 1, "says": "a dog"}, {"clip": 2, "says": "a cat"},
                          {"clip": 2, "says": "rain"}, {"clip": 3, "says": "a dog"}],
                         "verdict": "2"},
}  # fmt: skip
PLAIN = {**EXAMPLE, "question": "Which is odd?"}
CHAT = {k: v for k,
 v in EXAMPLE.items() if k not in ("question", "answer", "gold")} | {"messages": [
    {"role": "user", "content": "<sound-1><sound-2>Same?"},
    {"role": "assistant", "content": "No, not as <sound-1>."},
    {"role": "user", "content": "And <sound-3>?"}, {"role": "assistant", "content": "Yes."},
]}  # fmt: skip
OTHER = {"clips": ["d.wav", "e.wav"]}
MORE = {"permute": [[3, 1, 2]], "shuffle-audio": [OTHER]}  # what a view takes beside the example


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BOUNDARIES[0], "<sound>"]
    train_bpe(["which clip is odd"], 300, special, folder)
    return Tokenizer.from_dir(folder)


def prompt(tokenizer, example, layout="polyaudio") -> str:
    """The prompt of an example with two slots a clip; its layout is the example's own, if any."""
    slots = [2] * len(example["clips"])
    ids = tokenizer.encode_prompt(conversation(example)[:1], slots, example.get("layout", layout))
    names = {id: name for name, id in tokenizer.special.items()}
    text = "".join(names[id] if id in names else tokenizer.token_bytes(id).decode() for id in ids)
    return text.split("user\n")[-1].split("<|im_end|>")[0]


def test_the_table_has_the_views_that_the_design_names():
    assert set(VIEWS) == {
        "concat", "two-slot", "permute", "no-index", "no-boundary", "text-only", "shuffle-audio",
        "as-text",
    }  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("example", [EXAMPLE, PLAIN, CHAT], ids=["placed", "plain", "chat"])
def test_a_view_leaves_the_example_as_it_was(name, example):
    before = copy.deepcopy(example)
    view = VIEWS[name](example, *MORE.get(name, ()))
    assert view is not example and view != before
    assert example == before
    kept = ("id", "task", "skill", "source", "licences")
    assert {k: view[k] for k in kept} == {k: before[k] for k in kept}
    if name != "permute":
        assert view.get("gold") == before.get("gold") and view["meta"] == before["meta"]


@pytest.mark.parametrize("name", set(VIEWS) - {"permute"})
def test_only_permute_touches_the_gold_and_so_the_right_answer_stays_right(name):
    view = VIEWS[name](EXAMPLE, *MORE.get(name, ()))
    assert score(view["gold"], view["answer"]) == 1


def test_permute_keeps_gold_and_answer_together_in_every_order():
    for order in ([1, 2, 3], [2, 1, 3], [3, 1, 2], [3, 2, 1]):
        view = view_permute(EXAMPLE, order)
        assert score(view["gold"], view["answer"]) == 1
        assert view["gold"]["value"] == [order.index(2) + 1]
        literal = view_permute(EXAMPLE, order, literal=True)
        assert literal["answer"] == "Clip 2." and literal["gold"] == EXAMPLE["gold"]


@pytest.mark.parametrize("clips, made", [
    (["a", "b", "c"], ["a", {"join": ["b", "c"], "silence": 2.0}]),
    (["a", "b"], ["a", "b"]), (["a"], ["a"]), ([], []),
])  # fmt: skip
def test_two_slots_hold_the_first_clip_and_the_rest(clips, made):
    assert VIEWS["two-slot"]({"clips": clips, "question": "Which?"})["clips"] == made


def test_two_slots_sound_like_their_clips(tmp_path):
    waves = [
        np.random.default_rng(i).uniform(-0.5, 0.5, RATE // 4).astype(np.float32) for i in range(3)
    ]
    for name, wave in zip("abc", waves):
        soundfile.write(tmp_path / f"{name}.wav", wave, RATE, subtype="FLOAT")
    view = VIEWS["two-slot"]({"clips": ["a.wav", "b.wav", "c.wav"], "question": "Which?"})
    first, rest = (load_clip(clip, tmp_path) for clip in view["clips"])
    assert np.array_equal(first, waves[0])
    assert np.array_equal(
        rest, np.concatenate([waves[1], np.zeros(2 * RATE, np.float32), waves[2]])
    )


PROMPTS = [  # view, example, its question in the prompt
    ("concat", EXAMPLE,
     "(audio 1: [BOA]<sound><sound>[EOA])\nclip 2 and clip 3: which is odd, or is clip 2?"),
    ("two-slot", EXAMPLE,
     "(audio 1: [BOA]<sound><sound>[EOA])\n(audio 2: [BOA]<sound><sound>[EOA])\n"
     "clip 2 and clip 3: which is odd, or is clip 2?"),
    ("two-slot", PLAIN,
     "(audio 1: [BOA]<sound><sound>[EOA])\n(audio 2: [BOA]<sound><sound>[EOA])\nWhich is odd?"),
    ("no-index", EXAMPLE,
     "(audio: [BOA]<sound><sound>[EOA])\n(audio: [BOA]<sound><sound>[EOA]) and "
     "(audio: [BOA]<sound><sound>[EOA]): which is odd, or is clip 2?"),
    ("no-boundary", EXAMPLE,
     "(audio 1: <sound><sound>)\n(audio 2: <sound><sound>) and (audio 3: <sound><sound>)"
     ": which is odd, or is clip 2?"),
    ("text-only", EXAMPLE, "clip 2 and clip 3: which is odd, or is clip 2?"),
    ("text-only", PLAIN, "Which is odd?"),
    ("as-text", EXAMPLE,
     "(audio 1: a dog)\n(audio 2: a cat; rain) and (audio 3: a dog): which is odd, or is clip 2?"),
    ("as-text", PLAIN, "(audio 1: a dog)\n(audio 2: a cat; rain)\n(audio 3: a dog)\nWhich is odd?"),
    ("as-text", CHAT, "(audio 1: a dog)(audio 2: a cat; rain)Same?"),
    ("shuffle-audio", EXAMPLE,
     "(audio 1: [BOA]<sound><sound>[EOA])\n(audio 2: [BOA]<sound><sound>[EOA]) and "
     "(audio 3: [BOA]<sound><sound>[EOA]): which is odd, or is clip 2?"),
]  # fmt: skip


@pytest.mark.parametrize("name, example, text", PROMPTS)
def test_a_view_asks_in_this_prompt(tokenizer, name, example, text):
    view = VIEWS[name](example, *MORE.get(name, ()))
    assert prompt(tokenizer, view) == text


def test_as_text_reaches_every_turn_of_the_users_and_no_other():
    view = VIEWS["as-text"](CHAT)
    assert [m["content"] for m in view["messages"]] == [
        "(audio 1: a dog)(audio 2: a cat; rain)Same?", "No, not as <sound-1>.",
        "And (audio 3: a dog)?", "Yes.",
    ]  # fmt: skip
    assert view["clips"] == []


def test_without_clips_there_is_nothing_to_change():
    row = {**{k: v for k, v in PLAIN.items() if k != "meta"}, "clips": [], "meta": {}}
    for name in ("concat", "two-slot", "as-text", "text-only"):
        assert VIEWS[name](row)["clips"] == [] and VIEWS[name](row)["question"] == row["question"]
    assert view_permute(row, []) == row


def test_as_text_names_a_clip_of_which_nothing_is_known():
    view = VIEWS["as-text"]({**PLAIN, "meta": {"evidence": [{"clip": 2, "says": "a cat"}]}})
    assert view["question"] == "(audio 1)\n(audio 2: a cat)\n(audio 3)\nWhich is odd?"


@pytest.mark.parametrize("meta", [
    {}, {"evidence": []}, {"evidence": "a dog"}, {"evidence": [{"clip": 1}]},
    {"evidence": [{"clip": "1", "says": "x"}]},
])  # fmt: skip
def test_as_text_wants_evidence(meta):
    with pytest.raises(
        BadInput, match="meta.evidence: expected a list, each {clip: a whole number"
    ):
        VIEWS["as-text"]({**EXAMPLE, "meta": meta})


def test_as_text_of_a_permuted_example_is_the_permuted_evidence():
    view = VIEWS["as-text"](view_permute(PLAIN, [3, 1, 2]))
    assert (
        view["question"]
        == "(audio 1: a dog)\n(audio 2: a dog)\n(audio 3: a cat; rain)\nWhich is odd?"
    )
    assert view["gold"]["value"] == [3]


@pytest.mark.parametrize("count", range(5))
def test_shuffled_audio_is_as_much_sound_of_somebody_elses(count):
    view = VIEWS["shuffle-audio"]({"clips": ["x"] * count, "question": "?"}, OTHER)
    assert view["clips"] == ["d.wav", "e.wav", "d.wav", "e.wav"][:count]


def test_shuffled_audio_needs_some_to_shuffle():
    assert VIEWS["shuffle-audio"]({"clips": []}, {"clips": []}) == {"clips": []}
    with pytest.raises(BadInput, match="shuffle-audio: expected another example with clips"):
        VIEWS["shuffle-audio"](EXAMPLE, {"clips": []})


def test_no_index_needs_boundaries_and_no_boundary_does_not(tokenizer):
    bare = copy.copy(tokenizer)
    bare.boundaries = None
    with pytest.raises(BadInput, match="layout no-index needs BOA and EOA"):
        prompt(bare, VIEWS["no-index"](EXAMPLE))
    assert prompt(bare, VIEWS["no-boundary"](EXAMPLE)) == prompt(
        tokenizer, VIEWS["no-boundary"](EXAMPLE)
    )
