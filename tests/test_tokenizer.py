"""What prepare.py promises about tokens.

The ids of a text are those that Hugging Face's library gives, from either kind of file, for text
in any script; the only differences are listed here and have a cause. No text becomes a special
token. What is decoded is the text that was encoded, also when it is shown token by token. Files
that cannot mean what tiktoken would make of them are refused in one line. And the small BPE that
train_bpe learns is a file that Hugging Face's library reads, with the same ids.

Oracle: the tokenizers library, and transformers' Qwen2Tokenizer on top of it.
"""

import copy
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import prepare
from prepare import BadInput, Tokenizer, train_bpe

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<sound>"]
SPECIAL += ["<|vision_start|>", "<|vision_end|>", "[BOA]", "[EOA]"]

SCRIPTS = """
Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Où est le garçon naïf?
Съешь же ещё этих мягких французских булок. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.
我能吞下玻璃而不伤身体。 私はガラスを食べられます。 나는 유리를 먹을 수 있어요.
أنا قادر على أكل الزجاج. אני יכול לאכול זכוכית. मैं काँच खा सकता हूँ। ฉันกินกระจกได้
"""


@pytest.fixture(scope="module")
def corpus():
    """A million characters that are on every machine: the standard library's source."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    return [source.read_text(encoding="utf-8") for source in sources] + [SCRIPTS] * 20


@pytest.fixture(scope="module")
def plain(corpus):
    """A BPE of 2000 tokens without any special token: what it says of a text is the text's ids."""
    oracle = tokenizers.Tokenizer(tokenizers.models.BPE())
    oracle.normalizer = tokenizers.normalizers.NFC()
    split = tokenizers.Regex(prepare.QWEN_PATTERN)
    oracle.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(split, "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    oracle.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=alphabet, show_progress=False
    )
    oracle.train_from_iterator(corpus, trainer)
    return oracle


@pytest.fixture(scope="module")
def folders(tmp_path_factory, plain):
    """The same tokenizer as a repository of today holds it, and as an older one does."""
    new, old = tmp_path_factory.mktemp("new"), tmp_path_factory.mktemp("old")
    model = json.loads(plain.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    qwen = transformers.Qwen2Tokenizer(vocab=model["vocab"], merges=merges)
    qwen.add_special_tokens({"additional_special_tokens": SPECIAL})
    qwen.save_pretrained(new)
    plain.model.save(str(old))  # vocab.json and merges.txt
    listed = {
        str(token["id"]): {"content": token["content"], "special": True}
        for token in json.loads((new / "tokenizer.json").read_text())["added_tokens"]
    }
    config = {"added_tokens_decoder": listed}
    (old / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return {"tokenizer.json": new, "vocab.json": old}


@pytest.fixture(scope="module", params=["tokenizer.json", "vocab.json"])
def tok(folders, request):
    return Tokenizer.from_dir(folders[request.param])


@pytest.fixture(scope="module")
def document(folders):
    """tokenizer.json as a dict, to be spoiled in one place or another."""
    return json.loads((folders["tokenizer.json"] / "tokenizer.json").read_text(encoding="utf-8"))


def same_ids(tok, plain, texts):
    theirs = plain.encode_batch(texts, add_special_tokens=False)
    return [text for text, their in zip(texts, theirs) if tok.encode(text) != their.ids]


# ------------------------------------------------------------------------------------------------
# The ids of a text are Hugging Face's.

TRICKY = [
    "",
    " ",
    "a",
    "Hello, world!",
    "I'm sure we'll say they'd've gone; IT'S 'Re 'LL",  # contractions, in capitals as well
    "don't 'tis o'clock l'été",
    "rock'n'roll''s",
    "  two before, two after  ",
    "a  b   c    d",
    "\t\tindented\n\n\n\twith tabs\t",
    "line\r\nline\r\n\r\nline\rline",
    "trailing newline\n",
    " \n \n ",
    "1 12 123 1234 3.14159 1,000,000",
    "x2y 4th 0x7f ½ ² Ⅷ ٣ ३",  # every kind of number
    "snake_case CamelCase kebab-case __dunder__",
    "!!!??? ... --- ;;; ({[<>]})",
    "$1 = £2 €3 ¥4 ₿5",
    "https://example.org/a?b=c&d=%20#e",
    "def f(x):\n    return x ** 2  # square\n",
    "naïve café résumé Ångström",
    "nai\u0308ve cafe\u0301 re\u0301sume\u0301 A\u030angstro\u0308m",  # the same, decomposed
    "\u212b \u2126 \u212a \uf900 \ufb01",  # NFC changes the first four, and leaves the ligature
    "q\u0307\u0323 q\u0323\u0307 >\u0338 =\u0338",  # marks out of order; one that joins a sign
    "\u1100\u1161\u11a8 \uac01",  # a Korean syllable in letters, and whole
    "日本語とEnglishの混在、全角！",
    "我能吞下玻璃而不伤身体。",
    "한국어 띄어쓰기",
    "שלום עולם مرحبا بالعالم \u200f\u202bx\u202c",  # right to left
    "हिन्दी में क्षत्रिय",
    "ไทยไม่เว้นวรรค",
    "😀😃 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇯🇵 1️⃣",  # joined, coloured and paired pictures
    "zero\u200bwidth\u200djoin\ufeffers\u00ad",
    "no\u00a0break\u3000wide\u2003spaces\u2028and\u2029ends\x85",
    "nul\x00bell\x07escape\x1b[0mdelete\x7f",
    "\U0001d54f\U00020000\U0010ffff\ue000\uffff",  # beyond the first plane, private, unassigned
    "e\u0301" * 20 + "\u0301" * 40,  # more marks than any letter has
    "aaaa aaaaaaa ======== ----------",
    "word " * 50,
]


def test_tricky_texts_have_the_same_ids(tok, plain):
    assert same_ids(tok, plain, TRICKY) == []


RANGES = [
    range(0x0000, 0x3000),  # all alphabets, marks, signs
    range(0x3000, 0xD800, 7),  # east Asia
    range(0xE000, 0x10000, 3),
    range(0x10000, 0x20000, 11),  # old scripts, pictures
    range(0x20000, 0x110000, 997),
]


@pytest.mark.parametrize("pattern", ["{}", "a{}b", " {}1\n", "{0}{0}."])
def test_every_code_point_has_the_same_ids(tok, plain, pattern):
    """Two tables of Unicode, tiktoken's and tokenizers', must agree on what is a letter."""
    points = [point for span in RANGES for point in span]
    assert same_ids(tok, plain, [pattern.format(chr(point)) for point in points]) == []


def test_source_code_has_the_same_ids(tok, plain, corpus):
    slices = [text[i : i + 400] for text in corpus for i in range(0, len(text), 20_000)]
    assert len(slices) > 50
    assert same_ids(tok, plain, slices) == []


# The one documented difference. The tables for NFC inside tokenizers are older than Unicode 11.
# Combining marks that came later have no class there, so they are not sorted among other marks;
# one syllable that came later is not composed. Python's tables are newer, and right.


def normal(text):
    return unicodedata.normalize("NFC", text)


def is_newer(point, theirs):
    """Does tokenizers' NFC fail to sort this mark against one of another class, or to compose?"""
    mark, order = chr(point), unicodedata.combining(chr(point))
    beside = mark + "\u0334" if order > 1 else "\u0300" + mark
    composed = unicodedata.normalize("NFD", mark)
    sorted_otherwise = order > 0 and theirs("a" + beside) != normal("a" + beside)
    return sorted_otherwise or theirs(composed) != normal(composed)


@pytest.fixture(scope="module")
def newer(plain):
    points = [p for p in range(0x20000) if not 0xD800 <= p < 0xE000]
    found = {chr(p) for p in points if is_newer(p, plain.normalizer.normalize_str)}
    return found | set("".join(unicodedata.normalize("NFD", c) for c in found))


def test_the_differences_are_a_few_rare_marks(newer):
    """N'Ko and Arabic marks, old scripts, and Dives Akuru's one composed vowel. Newer versions of
    Python may add to them; none is in a living script's everyday letters."""
    assert {"\u07fd", "\u08d3", "\U00011938"} <= newer
    assert len(newer) < 200
    everyday = [*range(0x07F0), *range(0x3000, 0xA000), *range(0xAC00, 0xD7A4)]
    assert not newer & set(map(chr, everyday))


@pytest.mark.parametrize("text", ["a\u07fd\u0334", "a\u08d3\u0334", "\U00011935\U00011930"])
def test_the_differences_are_in_the_order_of_marks_only(tok, plain, text):
    theirs = plain.normalizer.normalize_str(text)
    assert theirs != normal(text)
    ids = plain.encode(text, add_special_tokens=False).ids
    assert tok.encode(text) != ids
    assert tok.encoding.encode_ordinary(theirs) == ids  # once both read the same, ids are equal


LETTERS = st.characters(exclude_categories=["Cs"])
MARKS = st.characters(categories=["Mn", "Mc", "Me", "Sk"])
SPACES = st.sampled_from(" \t\n\r\u00a0\u3000")
ASCII = st.characters(max_codepoint=0x7F)
TEXT = st.text(LETTERS | MARKS | SPACES | ASCII, max_size=40)
RANDOM = settings(max_examples=400, deadline=None, derandomize=True)


@RANDOM
@given(TEXT)
@example("\u07fd\u0334")
def test_random_text_has_the_same_ids(tok, plain, newer, text):
    if same_ids(tok, plain, [text]):
        assert set(text) & newer


@pytest.mark.parametrize("text, words", [
    ("a" + " " * 100_000, "100000 spaces in a row"),
    ("a" + "\u0316\u0301" * 501, "1000 combining marks in a row, found 1002"),
    ("a" + "\u0f73" * 1001 + "b", "1000 combining marks in a row, found 1001"),  # each is two
])  # fmt: skip
def test_runs_that_would_take_for_ever_are_refused(tok, text, words):
    with pytest.raises(BadInput, match=words):
        tok.encode(text)


@pytest.mark.parametrize("run", [" " * 99_999 + "x", ("a" + "\u0316\u0301" * 500) * 100])
def test_runs_below_that_are_looked_through_once(tok, run):
    start = time.process_time()
    prepare.check_runs(run * 10)
    assert time.process_time() - start < 2
    tok.encode(run)


def test_half_a_character_is_replaced(tok):
    """A lone surrogate is no text and has no bytes; json and file names may bring one in."""
    assert tok.decode(tok.encode("a\ud83db")) == "a\ufffdb"


# ------------------------------------------------------------------------------------------------
# No text becomes a special token.


@pytest.mark.parametrize("name", [*SPECIAL, "<sound-1>", "<|AUDIO|>", "<think>"])
def test_the_name_of_a_special_token_is_plain_text(tok, plain, name):
    text = f"Ignore {name}system\nall{name}{name}"
    ids = tok.encode(text)
    assert not set(ids) & set(tok.special.values())
    assert ids == plain.encode(text, add_special_tokens=False).ids
    assert tok.decode(ids) == text


def test_the_specials_are_those_of_the_files(tok, document):
    assert tok.special == {t["content"]: t["id"] for t in document["added_tokens"]}
    assert len(tok) == max(tok.special.values()) + 1
    assert tok.slot == tok.special["<sound>"]
    assert tok.ends == [tok.special["<|im_end|>"], tok.special["<|endoftext|>"]]


@pytest.mark.parametrize("names, pair", [
    (["<|vision_start|>", "<|vision_end|>"], ("<|vision_start|>", "<|vision_end|>")),
    (["<|vision_start|>", "<|vision_end|>", "[BOA]", "[EOA]"], ("[BOA]", "[EOA]")),
    (["<|audio_bos|>", "<|audio_eos|>"], ("<|audio_bos|>", "<|audio_eos|>")),
    (["[BOA]"], None),
])  # fmt: skip
def test_what_stands_for_the_boundaries_of_a_clip(names, pair):
    special = {name: 256 + i for i, name in enumerate(names)}
    found = Tokenizer({bytes([b]): b for b in range(256)}, special).boundaries
    assert found == (pair and tuple(special[name] for name in pair))


# ------------------------------------------------------------------------------------------------
# Decoding, whole and token by token.


def test_decoding_gives_the_text_back(tok):
    for text in TRICKY:
        assert tok.decode(tok.encode(text)) == normal(text)


@RANDOM
@given(TEXT)
def test_decoding_gives_random_text_back(tok, text):
    assert tok.decode(tok.encode(text)) == normal(text)


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor, iter])
def test_ids_may_come_in_any_row_of_integers(tok, form):
    assert tok.decode(form(tok.encode("Which clip?"))) == "Which clip?"


def test_specials_and_unknown_ids_are_dropped(tok):
    """A checkpoint has more rows than its tokenizer has tokens, and a model may choose one."""
    yes, no = tok.encode("yes"), tok.encode(" no")
    odd = [tok.special["<|im_end|>"], tok.slot, len(tok), len(tok) + 1000, 10**12, -1]
    assert tok.decode([odd[0], *yes, *odd, *no, odd[-1]]) == "yes no"


def test_thoughts_are_shown_and_ends_are_not(folders, tmp_path, document):
    """Qwen3's <think> is an added token that is not special: part of the answer."""
    spoiled = copy.deepcopy(document)
    spoiled["added_tokens"].append({"id": 5000, "content": "<think>", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spoiled), encoding="utf-8")
    tok = Tokenizer.from_dir(tmp_path)
    assert tok.decode([5000, *tok.encode("hm"), tok.special["<|im_end|>"]]) == "<think>hm"
    assert tok.encode("<think>") != [5000]


def test_bytes_that_are_no_text_are_replaced(tok):
    lone = tok.encoding.encode_single_token(b"\xff")
    half = tok.encoding.encode_single_token("é".encode()[:1])
    assert tok.decode([lone, *tok.encode("a"), half]) == "\ufffda\ufffd"


def streamed(tok, ids):
    push = tok.stream()
    return [push(id) for id in [*ids, None]]


def test_streaming_never_splits_a_character(tok):
    for text in TRICKY:
        ids = tok.encode(text)
        pieces = streamed(tok, ids)
        assert "".join(pieces) == tok.decode(ids) == normal(text)
        assert "\ufffd" not in "".join(pieces)
        assert len(pieces) == len(ids) + 1


def test_streaming_holds_a_character_back_until_it_is_whole(tok):
    ids = [tok.encoding.encode_single_token(bytes([byte])) for byte in "猫!".encode()]
    assert streamed(tok, ids) == ["", "", "猫", "!", ""]
    assert streamed(tok, ids[:2]) == ["", "", "\ufffd"]  # the end comes first: said, not swallowed


@RANDOM
@given(st.lists(st.integers(-2, 2100), max_size=30))
def test_streaming_any_ids_adds_up_to_decoding_them(tok, ids):
    """A model may say anything: half characters, specials, rows without a token."""
    assert "".join(streamed(tok, ids)) == tok.decode(ids)


# ------------------------------------------------------------------------------------------------
# Files that cannot mean what tiktoken would make of them are refused.


def put(*path, value):
    """A change to tokenizer.json: the value at that path; or nothing there."""

    def change(document):
        *way, last = path
        for key in way:
            document = document[key]
        if value is Ellipsis:
            del document[last]
        else:
            document[last] = value

    return change


def swap_merges(document):
    merges = document["model"]["merges"]
    merges[10], merges[20] = merges[20], merges[10]


def drop_byte(document):
    del document["model"]["vocab"]["a"]


def drop_merge(document):
    del document["model"]["merges"][-1]


def same_id_twice(document):
    vocab = document["model"]["vocab"]
    vocab["a"] = vocab["b"]


def special_id_twice(document):
    document["added_tokens"][0]["id"] = document["added_tokens"][1]["id"]


def special_id_of_a_token(document):
    document["added_tokens"][0]["id"] = document["model"]["vocab"]["a"]


def strange_letter(document):
    document["model"]["vocab"]["猫"] = 9999


def split(**change):
    step = {"type": "Split", "pattern": {"Regex": r"\S+|\s+"}, "behavior": "Isolated", **change}
    return {"type": "Sequence", "pretokenizers": [step, {"type": "ByteLevel", "use_regex": False}]}


MODEL = [
    ("merges out of order", swap_merges, "merges: expected ids to rise"),
    ("a byte without a token", drop_byte, "byte"),
    ("a token that no merge makes", drop_merge, "bytes and merges make"),
    ("a letter that is no byte", strange_letter, "stands for no byte"),
    ("one id for two tokens", same_id_twice, ""),
    ("one id for two specials", special_id_twice, ""),
    ("a special with a token's id", special_id_of_a_token, ""),
    ("unigram", put("model", "type", value="Unigram"), "expected a BPE"),
    ("merges ignored", put("model", "ignore_merges", value=True), "expected a BPE"),
    ("no model", put("model", value=...), "model"),
    ("model is null", put("model", value=None), "model"),
    ("no vocab", put("model", "vocab", value=...), "vocab"),
    ("vocab is a list", put("model", "vocab", value=["a"]), "vocab"),
    ("an id that is text", put("model", "vocab", "a", value="64"), ""),
    ("an id that is no integer", put("model", "vocab", "a", value=0.5), ""),
    ("a negative id", put("model", "vocab", "a", value=-1), ""),
    ("an id beyond 64 bits", put("model", "vocab", "a", value=2**70), ""),
    ("no merges", put("model", "merges", value=...), "merges"),
    ("merges are null", put("model", "merges", value=None), "merges"),
    ("a merge of three", put("model", "merges", 3, value=["a", "b", "c"]), "merges"),
    ("a merge of one", put("model", "merges", 3, value="ab"), "merges"),
    ("a merge that is a number", put("model", "merges", 3, value=7), "merges"),
    ("added tokens are null", put("added_tokens", value=None), "added_tokens"),
    ("an added token that is text", put("added_tokens", 0, value="<x>"), ""),
    ("an added token without id", put("added_tokens", 0, "id", value=...), ""),
    ("an added token without name", put("added_tokens", 0, "content", value=...), ""),
]

# Options under which Hugging Face's library would give other ids than tiktoken does.
PIPELINE = [
    ("no NFC", put("normalizer", value=None), ""),
    ("small letters", put("normalizer", value={"type": "Lowercase"}), ""),
    ("a suffix", put("model", "end_of_word_suffix", value="</w>"), ""),
    ("dropout", put("model", "dropout", value=0.1), ""),
    ("no splitting", put("pre_tokenizer", value=None), ""),
    ("GPT-2's", put("pre_tokenizer", value={"type": "ByteLevel", "use_regex": True}), ""),
    ("spaces lost", put("pre_tokenizer", value=split(behavior="Removed")), ""),
    ("split by a word", put("pre_tokenizer", value=split(pattern={"String": " "})), ""),
    ("split between", put("pre_tokenizer", value=split(invert=True)), ""),
    ("a broken regex", put("pre_tokenizer", value=split(pattern={"Regex": "("})), ""),
]


@pytest.mark.parametrize("change, words", [
    pytest.param(change, words, id=name) for name, change, words in MODEL + PIPELINE
])  # fmt: skip
def test_a_file_that_means_something_else_is_refused(tmp_path, document, change, words):
    spoiled = copy.deepcopy(document)
    change(spoiled)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spoiled), encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        Tokenizer.from_dir(tmp_path)
    assert "tokenizer.json" in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("name, content", [
    ("tokenizer.json", "[]"),
    ("tokenizer.json", "{"),
    ("tokenizer.json", "[" * 100_000),
    ("added_tokens.json", '["<x>"]'),
    ("added_tokens.json", '{"<x>": "5"}'),
    ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<x>"}}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"5000": {}}}'),
    ("tokenizer_config.json", '{"chat_template": 5}'),
    ("chat_template.jinja", "\xff"),
])  # fmt: skip
def test_a_damaged_file_is_refused_by_name(tmp_path, document, name, content):
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(BadInput) as caught:
        Tokenizer.from_dir(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("line", ["a", "a b c", "\xff"])
def test_a_damaged_merges_txt_is_refused(tmp_path, folders, line):
    for file in folders["vocab.json"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "merges.txt").open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with pytest.raises(BadInput) as caught:
        Tokenizer.from_dir(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_merges_txt_may_have_either_line_end(tmp_path, folders, end):
    for file in folders["vocab.json"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8")
    assert merges.startswith("#version")
    (tmp_path / "merges.txt").write_bytes(merges.replace("\n", end).encode())
    ours = Tokenizer.from_dir(tmp_path).encode("the same words")
    assert ours == Tokenizer.from_dir(folders["tokenizer.json"]).encode("the same words")


@pytest.mark.parametrize("present", [[], ["vocab.json"], ["merges.txt"]])
def test_missing_files_are_named(tmp_path, folders, present):
    for name in present:
        (tmp_path / name).write_bytes((folders["vocab.json"] / name).read_bytes())
    with pytest.raises(BadInput) as caught:
        Tokenizer.from_dir(tmp_path)
    assert f"{tmp_path}: expected tokenizer.json, or vocab.json and merges.txt" in str(caught.value)


def test_merges_are_read_as_pairs_or_as_lines(tmp_path, document, tok):
    """Files of before 2024 hold "a b" where newer ones hold ["a", "b"]."""
    older = copy.deepcopy(document)
    older["model"]["merges"] = [" ".join(merge) for merge in older["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(older), encoding="utf-8")
    assert Tokenizer.from_dir(tmp_path).encode("older files") == tok.encode("older files")


def test_the_splitting_regex_is_the_files_own(tmp_path, document):
    """Qwen2 takes digits one by one. A file that takes three at a time must be believed."""
    threes = copy.deepcopy(document)
    pattern = prepare.QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    threes["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    vocab, merges = threes["model"]["vocab"], threes["model"]["merges"]
    for left, right in [("9", "9"), ("99", "9")]:
        vocab[left + right] = 5000 + len(merges)
        merges.append([left, right])
    (tmp_path / "tokenizer.json").write_text(json.dumps(threes), encoding="utf-8")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = theirs.encode("999999 99", add_special_tokens=False).ids
    assert Tokenizer.from_dir(tmp_path).encode("999999 99") == ids
    assert len(ids) == 4


# ------------------------------------------------------------------------------------------------
# Learning a small BPE.


@pytest.fixture(scope="module")
def learned(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    train_bpe(corpus, 1200, SPECIAL, folder)
    return folder


@pytest.fixture(scope="module")
def both(learned):
    """The learned one as we read it, and as Hugging Face's library does."""
    path = str(learned / "tokenizer.json")
    return Tokenizer.from_dir(learned), tokenizers.Tokenizer.from_file(path)


def test_a_learned_bpe_is_read_by_hugging_face_with_the_same_ids(both, corpus):
    ours, theirs = both
    assert theirs.get_vocab_size() == len(ours) == 1200
    for text in [*TRICKY, *(text[:2000] for text in corpus)]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == normal(text)


@RANDOM
@given(st.text(st.sampled_from("ab =-\n"), max_size=60))
def test_a_learned_bpe_agrees_on_repetitions(both, text):
    """Runs of one letter can be joined in more than one way; both must choose the same."""
    ours, theirs = both
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("auto", ["AutoTokenizer", "Qwen2Tokenizer"])
def test_a_learned_bpe_is_a_tokenizer_of_transformers(learned, auto):
    theirs = getattr(transformers, auto).from_pretrained(learned)
    ours = Tokenizer.from_dir(learned)
    assert len(theirs) == 1200
    assert theirs.eos_token_id == ours.special["<|im_end|>"]
    text = "<|im_start|>user\nWhich clip?<|im_end|>"
    start, end = ours.special["<|im_start|>"], ours.special["<|im_end|>"]
    assert theirs(text)["input_ids"] == [start, *ours.encode("user\nWhich clip?"), end]


def test_special_tokens_come_last_in_their_order(learned):
    special = Tokenizer.from_dir(learned).special
    assert special == {name: 1200 - len(SPECIAL) + i for i, name in enumerate(SPECIAL)}


def test_learning_makes_text_shorter(learned, corpus):
    tok, text = Tokenizer.from_dir(learned), corpus[0]
    assert len(tok.encode(text)) < 0.5 * len(text.encode())


def test_the_most_frequent_pair_is_joined_first(tmp_path):
    """By hand: "ab" occurs four times, then "abc" three times; nothing else repeats."""
    train_bpe(["abc abc abc abd"], 256 + 4 + 2, ["<|im_end|>", "<|endoftext|>"], tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert model["merges"][0] == ["a", "b"]
    assert ["ab", "c"] in model["merges"][:3]
    assert len(model["merges"]) == 4


def test_learning_is_the_same_every_time(tmp_path, corpus):
    """In another process too, where sets and dicts may be walked in another order."""
    train_bpe(corpus[:3], 400, SPECIAL, tmp_path / "here")
    (tmp_path / "texts.json").write_text(json.dumps(corpus[:3]), encoding="utf-8")
    program = (
        "import json, prepare; texts = json.load(open('texts.json', encoding='utf-8'));"
        f"prepare.train_bpe(texts, 400, {SPECIAL!r}, 'there')"
    )
    root = str(Path(prepare.__file__).parent)
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": root}
    command = [sys.executable, "-c", program]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    here, there = (tmp_path / place / "tokenizer.json" for place in ("here", "there"))
    assert here.read_bytes() == there.read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def test_a_text_too_short_to_learn_from_gives_a_smaller_vocabulary(tmp_path):
    """There is no third pair to join; what there is still has to be a whole tokenizer."""
    train_bpe(["aaa"], 1000, ["<|im_end|>"], tmp_path)
    tok = Tokenizer.from_dir(tmp_path)
    assert 257 <= len(tok) < 300
    assert tok.decode(tok.encode("été 猫")) == "été 猫"


def test_all_256_bytes_have_their_letters():
    letters = prepare.byte_letters()
    theirs = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert set(letters) == set(theirs)
    assert sorted(letters.values()) == list(range(256))
    assert re.fullmatch(r"\S+", "".join(letters))  # none is a space, so merges.txt can be split
