"""Whatever comes in from outside, spoiled by chance: it is read or refused in one line, in bounded
time and memory. Everything else, a traceback, a hang, a heap, is a finding.

    python -m tests.fuzz                         # every kind of input, a minute each
    python -m tests.fuzz --seconds 600 wav rows  # two of them, longer
    python -m tests.fuzz --inputs 1000           # a thousand of each
    python -m tests.fuzz wav --number 12345      # one input again, with its traceback

Input `number` of a kind depends on (seed, kind, number) alone. It is made by spoiling something
good, for most of what is merely random is refused at the door: bytes are flipped, cut and repeated,
headers get impossible numbers, JSON loses fields, gets others or changes its types, answers are put
together from the words that the parsers look for. What is accepted goes on to what the program does
with it next, since a bad value that passes the door is found there.

The inputs of a kind are read one after another in a process of its own that may use no more than
SECONDS of time for one of them and MEMORY bytes more than at its start. It is killed by a signal if
it does, and the next one goes on behind that input. A finding is made as small as it can be.
"""

import base64
import contextlib
import copy
import faulthandler
import io
import json
import math
import mmap
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402

import judge  # noqa: E402
import prepare  # noqa: E402
import sample  # noqa: E402
import synth  # noqa: E402
from model import Config, PolyAudio  # noqa: E402
from prepare import BadInput, expect  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 5  # of processor time for one input; ten times as long by the clock
MEMORY = 1 << 30  # bytes
LINE = 100_000  # letters of a refusal, at most
MOST = 500  # findings, and a kind has had enough
ENOUGH = 5  # of its processes killed

# ------------------------------------------------------------------------------------------------
# How things are spoiled. `dice` is a random.Random; the same dice, the same damage.

NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
           (1 << 63) - 1, 1 << 63, (1 << 64) - 1]  # fmt: skip


def damaged(dice, data: bytes, head=128) -> bytes:
    """Bytes with one to six faults, half of them among the first `head`."""
    data = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 3, 6))):
        end = min(head, len(data)) if dice.random() < 0.5 else len(data)
        place, length = dice.randrange(end + 1), dice.choice((1, 2, 4, 8, 40, 1000))
        fault = dice.randrange(7)
        if fault == 0 and place < len(data):
            data[place] ^= 1 << dice.randrange(8)
        elif fault == 1:
            size = dice.choice((1, 2, 4, 8))
            number = dice.choice(NUMBERS) & ((1 << 8 * size) - 1)
            data[place : place + size] = number.to_bytes(size, dice.choice(("little", "big")))
        elif fault == 2:
            del data[place : place + length]
        elif fault == 3:
            data[place:place] = data[place : place + length] * dice.choice((1, 1, 50))
        elif fault == 4:
            data[place : place + length] = dice.randbytes(length)
        elif fault == 5:
            del data[place:]
        else:
            other = dice.randrange(len(data) + 1)
            data[place : place + length] = data[other : other + length]
    return bytes(data)


DEEP = "(deep)"  # stands for a value in a value in a value, as only text can hold it
ODD = [
    None, True, False, 0, -1, 1, 2, 7, 1.5, -0.0, math.nan, math.inf, 1e308, 10**30, -(10**400),
    "", " ", "1", "-", ".", "..", "a", "\x00", "\ud800", "\u202e", "x" * 3000, "<sound-1>",
    "<sound-2>", "<sound-0>", "<sound-9999>", "<sound>", "<think>", "(?", "(a+)+$", "/etc/passwd",
    "../a.wav", "a.wav", "b.wav", [], {}, [[]], [None], [1, 1], ["a", "a"], {"": None}, {"a": [1]},
    DEEP,
]  # fmt: skip


def odd(dice):
    return copy.deepcopy(dice.choice(ODD[:-1] if dice.random() < 0.97 else ODD))


def places(value):
    """Every (container, key) inside of a JSON value."""
    inner = []
    if isinstance(value, dict):
        inner = list(value)
    elif isinstance(value, list):
        inner = range(len(value))
    for key in inner:
        yield value, key
        yield from places(value[key])


def changed(dice, value):
    """A JSON value with one to four faults: fields go, come, move, or hold something else."""
    whole = [copy.deepcopy(value)]
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        found = list(places(whole))[:3000]
        held, key = dice.choice(found)
        fault = dice.randrange(7)
        if fault < 2:
            held[key] = odd(dice)
        elif fault == 2 and held is not whole:
            del held[key]
        elif fault == 3:
            other, name = dice.choice(found)
            held[key] = copy.deepcopy(other[name])
        elif fault == 4:
            held[key] = [held[key]] if dice.random() < 0.5 else {"path": held[key]}
        elif fault == 5 and isinstance(held, dict):
            names = [name for other, name in found if isinstance(name, str)]
            held[dice.choice(names)] = odd(dice)
        else:
            held[key] = nearly(dice, held[key])
    return whole[0]


def nearly(dice, value):
    """Something of the same type."""
    if isinstance(value, str):
        data = damaged(dice, value.encode("utf-8", "surrogatepass"))
        return data.decode("utf-8", dice.choice(("replace", "ignore")))
    if type(value) in (int, float):
        return dice.choice((-value, value + 1, value * 1000, value // 3, dice.choice(NUMBERS)))
    if isinstance(value, list):
        return dice.choice((value + value, value[1:], value[::-1], value[:1] * 300))
    return odd(dice)


def written_out(dice, value) -> bytes:
    """JSON, in one of the ways to write it, sometimes torn."""
    text = json.dumps(value, ensure_ascii=dice.random() < 0.5, indent=dice.choice((None, 1)))
    if DEEP in text:
        depth = dice.choice((30, 300, 900, 960, 100_000))
        text = text.replace(f'"{DEEP}"', "[" * depth + "]" * depth)
    data = text.encode("utf-8", "surrogatepass")
    return damaged(dice, data, len(data)) if dice.random() < 0.15 else data


LETTERS = (
    "aZ09 \n\t.,:;?!'\"()[]{}<>#@|/\\-_*`~%&+=\u2192\u2019\u00e9\u0660\u00b2\u2473\ufdfa\u0130"
)


def wild(dice) -> str:
    """A few letters of all that there are."""
    letters = [chr(dice.choice((dice.randrange(0x250), dice.randrange(0x110000))))
               for _ in range(dice.randrange(12))]  # fmt: skip
    return "".join(letters) + dice.choice(LETTERS) * dice.choice((0, 1, 3))


def babble(dice, words, most=30) -> str:
    """A text of such words; now and then one of them over and over, as a model may end."""
    said = [wild(dice) if dice.random() < 0.05 else dice.choice(words)
            for _ in range(dice.randrange(most))]  # fmt: skip
    if dice.random() < 0.05:
        said.insert(dice.randrange(len(said) + 1), dice.choice((*words, *LETTERS)) * 4000)
    text = dice.choice((" ", " ", " ", "", "\n", ", ")).join(said)
    return text if dice.random() < 0.7 else text.upper()


# ------------------------------------------------------------------------------------------------
# Kinds of input. Each has a function from dice to an input (bytes, a text, a JSON value, or {name:
# content} of a folder's files) and one that has it read in a folder. The latter checks what it gets
# with `assert`, so that a wrong value is a finding too.


def put(home: Path, files: dict):
    for name, data in files.items():
        (home / name).write_bytes(data)


def one_spoiled(dice, files: dict, spoil) -> dict:
    """The same files but for one of them."""
    name = dice.choice(sorted(files))
    return {**files, name: spoil(dice, name, files[name])}


def spoil_file(dice, name, data) -> bytes:
    """Of JSON the value or the bytes, of everything else the bytes."""
    if name.endswith(".json") and dice.random() < 0.8:
        return written_out(dice, changed(dice, json.loads(data)))
    return damaged(dice, data)


# --- sounds

SOUNDS = {  # by file ending: (format, subtypes, rates)
    "wav": ("WAV", ("PCM_16", "PCM_U8", "PCM_24", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM",
                    "MS_ADPCM", "GSM610"), (8000, 16000, 44100)),
    "flac": ("FLAC", ("PCM_16", "PCM_24"), (16000, 44100)),
    "ogg": ("OGG", ("VORBIS", "OPUS"), (16000, 48000)),
    "mp3": ("MP3", ("MPEG_LAYER_III",), (16000, 44100)),
    "aiff": ("AIFF", ("PCM_16", "FLOAT"), (16000, 44100)),
    "au": ("AU", ("PCM_16", "ULAW"), (8000, 16000)),
    "caf": ("CAF", ("PCM_16", "ALAC_16"), (16000, 44100)),
    "w64": ("W64", ("PCM_16",), (16000,)),
}  # fmt: skip


@lru_cache(maxsize=None)
def sounds(ending) -> list[bytes]:
    """A tenth of a second, in every form."""
    kind, subtypes, rates = SOUNDS[ending]
    noise, found = np.random.default_rng(0), []
    for subtype in subtypes:
        for rate in rates:
            for channels in (1, 2) if subtype != "GSM610" else (1,):
                file, wave = io.BytesIO(), 0.1 * noise.standard_normal((rate // 10, channels))
                soundfile.write(file, wave, rate, subtype, format=kind)
                found.append(file.getvalue())
    return found


def make_sound(dice, endings) -> dict:
    ending = dice.choice(endings)
    data = damaged(dice, dice.choice(sounds(ending)))
    return {f"a.{dice.choice(endings) if dice.random() < 0.02 else ending}": data}


def read_sound(files, home):
    put(home, files)
    path = home / next(iter(files))
    row = prepare.measure({"path": str(path)}, hashed=True)
    length = prepare.clip_samples(str(path))
    wave = prepare.load_audio(path)
    assert wave.dtype == np.float32 and wave.ndim == 1 and np.isfinite(wave).all()
    assert len(wave) == length or path.suffix == ".mp3", (len(wave), length)
    assert "skip" in row or row["duration"] > 0
    part = prepare.load_audio(path, 0.01, 0.02)
    assert len(part) <= 161


# --- weights

SMALL = {
    "model_type": "qwen2", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
HEARING = {
    "model_type": "audioflamingo3", "audio_token_id": 39, "text_config": SMALL,
    "audio_config": {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
                     "hidden_size": 8},
}  # fmt: skip


def files_of(dir: Path) -> dict:
    return {path.name: path.read_bytes() for path in sorted(dir.iterdir())}


@lru_cache(maxsize=None)
def checkpoint(kind) -> dict:
    """The files of a small random one: text, shards, hearing, adapter."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as dir:
        net = PolyAudio(Config.from_dict(HEARING if kind == "hearing" else SMALL))
        if kind == "adapter":
            net.add_lora(rank=2, alpha=4, rows=[1, 2])
            net.save_adapter(dir)
        else:
            net.save(dir, shard_bytes=8000 if kind == "shards" else 1 << 30)
        return files_of(Path(dir))


def spoil_weights(dice, name, data) -> bytes:
    """A safetensors file is the length of its header, the header as JSON, and numbers."""
    if name.endswith(".json") or dice.random() < 0.3:
        return spoil_file(dice, name, data)
    size = int.from_bytes(data[:8], "little")
    header = written_out(dice, changed(dice, json.loads(data[8 : 8 + size])))
    length = dice.choice((len(header), len(header), len(header), dice.choice(NUMBERS)))
    return length.to_bytes(8, "little") + header + data[8 + size :]


def make_weights(dice, kinds) -> dict:
    return one_spoiled(dice, checkpoint(dice.choice(kinds)), spoil_weights)


def read_weights(files, home):
    put(home, files)
    faults = prepare.tensor_faults(home)
    net = PolyAudio.from_dir(home)
    assert not faults, faults
    assert net.logits([1, 2, 3], []).shape == (3, net.config.decoder.vocab)


def read_adapter(files, home):
    base = home.parent / "base"
    if not base.exists():
        base.mkdir()
        put(base, checkpoint("text"))
    put(home, files)
    net = PolyAudio.from_dir(base, adapter=home)
    assert net.logits([1, 2, 3], []).shape == (3, 40)
    net.merge()


def make_listing(dice) -> dict:
    """What the Hub says of a repository, or what a download has left of that."""
    large = {"sha256": "0" * 64, "size": 10, "pointerSize": 134}
    siblings = [
        {"rfilename": "config.json", "size": 10, "blobId": "0" * 40},
        {"rfilename": "model.safetensors", "size": 10, "blobId": "0" * 40, "lfs": large},
    ]
    record = {"id": "a/b", "commit": "0" * 40, "files": {"config.json": [10, "git:" + "0" * 40]}}
    listing = {"sha": "0" * 40, "siblings": siblings}
    return {"listing": written_out(dice, changed(dice, listing)),
            "download.json": written_out(dice, changed(dice, record))}  # fmt: skip


def read_listing(files, home):
    prepare.request = lambda *how, **more: files["listing"]
    put(home, files)
    refused = []
    for act in (lambda: prepare.list_files("a/b", "main", "http://hub", None),
                lambda: prepare.read_record(home)):  # fmt: skip
        try:
            found = act()
        except BadInput as mistake:
            refused.append(mistake)
            continue
        names = found[1] if isinstance(found, tuple) else found.get("files", {})
        assert all(prepare.stays_inside(name) for name in names)
    if refused:
        raise refused[0]


# --- tokenizers and prompts

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<sound>", "[BOA]", "[EOA]"]
SAID = "Which clip is louder? audio 1: a dog barks; audio 2: rain. The answer is: audio 2.\n"


@lru_cache(maxsize=None)
def tokenizer_files(kind) -> dict:
    with tempfile.TemporaryDirectory() as dir:
        prepare.train_bpe([SAID], 280, SPECIALS, dir)
        files = files_of(Path(dir))
    document = json.loads(files["tokenizer.json"])
    added = {str(t["id"]): t for t in document["added_tokens"]}
    config = {**json.loads(files["tokenizer_config.json"]), "added_tokens_decoder": added}
    config["chat_template"] = "<|im_start|>system\\nYou are heard.<|im_end|>"
    files["tokenizer_config.json"] = json.dumps(config).encode()
    if kind == "pairs":
        del files["tokenizer.json"]
        files["vocab.json"] = json.dumps(document["model"]["vocab"]).encode()
        files["merges.txt"] = "\n".join(map(" ".join, document["model"]["merges"])).encode()
        files["added_tokens.json"] = json.dumps({t["content"]: t["id"] for t in added.values()})
        files["added_tokens.json"] = files["added_tokens.json"].encode()
        files["chat_template.jinja"] = config["chat_template"].encode()
    return files


def make_tokenizer(dice) -> dict:
    return one_spoiled(dice, tokenizer_files(dice.choice(("whole", "pairs"))), spoil_file)


def read_tokenizer(files, home):
    put(home, files)
    tok = prepare.Tokenizer.from_dir(home)
    ids = tok.encode(SAID)
    assert tok.decode(ids) == SAID and max(ids) < len(tok)
    asked = [{"role": "user", "content": "Which?"}]
    assert all(type(id) is int for id in tok.encode_prompt(asked, [2], "polyaudio"))


@lru_cache(maxsize=1)
def tokenizer() -> prepare.Tokenizer:
    with tempfile.TemporaryDirectory() as dir:
        put(Path(dir), tokenizer_files("whole"))
        return prepare.Tokenizer.from_dir(dir)


TURNS = ["<sound-1>", "<sound-2>", "<sound-3>", "<sound-01>", "<sound-0>", "<sound>", "\n", " ",
         "<|im_end|>", "<|im_start|>user", "[BOA]", "clip 1", "Which?", "<think>", "</think>",
         "\ud800"]  # fmt: skip


def make_prompt(dice) -> dict:
    roles = ("user", "user", "user", "assistant", "system", "tool")
    asked = [{"role": dice.choice(roles), "content": babble(dice, TURNS, 8)}
             for _ in range(dice.randrange(5))]  # fmt: skip
    slots = [dice.choice((1, 2, 25, 750)) for _ in range(dice.randrange(4))]
    made = {"messages": asked, "n_slots": slots, "layout": dice.choice((*prepare.LAYOUTS, "x"))}
    return {**made, "messages": changed(dice, asked)} if dice.random() < 0.3 else made


def read_prompt(given, home):
    tok, slots = tokenizer(), given["n_slots"]
    asked = given["messages"]
    ids = tok.encode_prompt(asked, slots, given["layout"])
    order = prepare.clip_order(asked, len(slots))
    assert ids.count(tok.slot) == sum(slots[i - 1] for i in order), "each slot is a clip's"
    turns = len(asked) + (asked[0]["role"] != "system")  # there is one that says nothing else
    opened = turns + (asked[-1]["role"] != "assistant")
    assert ids.count(tok.special["<|im_start|>"]) == opened, "no text becomes a special token"
    assert ids.count(tok.special["<|im_end|>"]) == turns


# --- rows

GOLDS = [
    {"type": "choice", "value": "rain"}, {"type": "yesno", "value": "no"},
    {"type": "clip", "value": 2}, {"type": "clip", "value": [1, 2]},
    {"type": "order", "value": [2, 1]}, {"type": "count", "value": 3},
    {"type": "span", "value": {"clip": 1, "on": 0.5, "off": 1.5}},
    {"type": "keywords", "value": ["dog", "park"]},
    {"type": "text", "value": {"text": "a dog barks", "slots": [["dog"], ["bark", "barks"]]}},
    {"type": "transcript", "value": "the dog is at the park"},
]  # fmt: skip
LISTED = {"choice": ["rain", "a dog", "no sound"], "yesno": ["yes", "no"]}


def good_row(dice) -> dict:
    """One of the forms that read_rows takes."""
    form = dice.randrange(6)
    turns = [("user", "<sound-1> <sound-2> Which?"), ("assistant", "Clip 2.")] * dice.choice((1, 2))
    turns = turns[:2] + [
        (role, text.replace("<sound-1> <sound-2> ", "")) for role, text in turns[2:]
    ]
    if form == 0:
        said = [
            {
                "from": {"user": "human", "assistant": "gpt"}[role],
                "value": re.sub(r"<sound-\d>", "<sound>", text),
            }
            for role, text in turns
        ]
        return {"id": "a", "sound": ["a.wav", "b.wav"], "conversations": said}
    messages = [{"role": role, "content": text} for role, text in turns]
    if form == 1:
        said = [{**m, "content": re.sub(r"<sound-\d>", "<audio>", m["content"])} for m in messages]
        return {"audios": ["a.wav", "b.wav"], "messages": said}
    gold = dice.choice(GOLDS)
    row = {
        "id": "a", "task": "odd", "skill": "comparison", "clips": ["a.wav", "b.wav"],
        "question": "<sound-1><sound-2> Which clip has rain, a dog or no sound?",
        "answer": "Clip 2 has it.", "gold": gold, "source": "world", "licences": ["CC0"],
        "meta": {"evidence": [{"clip": 1, "says": "rain"}, {"clip": 2, "says": "dog"}],
                 "verdict": "audio 2", "range": [0, 5]},
    }  # fmt: skip
    if gold["type"] in LISTED:
        row["choices"] = LISTED[gold["type"]]
    if form == 2:
        row["clips"] = [{"path": "a.wav", "start": 0.1, "end": 0.2}, {"path": "b.wav"}]
    if form == 3:
        row = {k: v for k, v in row.items() if k not in ("question", "answer")}
        row["messages"] = messages
    return row


def make_rows(dice, good=good_row) -> dict:
    rows = [good(dice) for _ in range(dice.choice((1, 1, 2)))]
    rows = [{**row, "id": f"{row['id']}{i}"} if "id" in row else row for i, row in enumerate(rows)]
    row = dice.randrange(len(rows))
    rows[row] = changed(dice, rows[row])
    if dice.random() < 0.2:
        return {"rows.json": written_out(dice, rows)}
    lines = (written_out(dice, row).replace(b"\n", b" ") for row in rows)
    return {"rows.jsonl": b"\n".join(lines)}


def accepted(read, path) -> list:
    """The rows that were, or why the first was not."""
    refused = []
    rows = list(read(path, refused.append))
    if refused and not rows:
        raise refused[0]
    return rows


def hear(home, *names):
    """Clips by these names, the same noise in each."""
    noise = home.parent / "noise.wav"
    if not noise.exists():
        soundfile.write(noise, 0.1 * np.random.default_rng(0).standard_normal(4800), 16000)
    for name in names:
        os.link(noise, home / name)


def read_rows(files, home):
    hear(home, "a.wav", "b.wav")
    put(home, files)
    rows = accepted(prepare.read_rows, home / next(iter(files)))
    for row in rows:
        for name in prepare.ONE_ROW_VIEWS:
            allowed(lambda: prepare.VIEWS[name](row))
        allowed(lambda: prepare.view_shuffle_audio(row, rows[0]))
        allowed(lambda: prepare.reordered(row))
        prepare.each_alone(row)
        for clip in row["clips"]:
            allowed(lambda: prepare.clip_samples(clip, home))
        allowed(
            lambda: tokenizer().encode_prompt(prepare.conversation(row), [3] * len(row["clips"]))
        )
        if "gold" in row:
            read_item(row)


def allowed(act):
    """What may be refused here, too."""
    try:
        act()
    except BadInput as mistake:
        check_line(mistake)


def read_item(row):
    """What judge.py does with a row."""
    assert 0 <= prepare.chance(row) <= 1
    assert 0 <= judge.majority([judge.judged(row, None)]) <= 1
    for answer in (None, "Clip 2.", row.get("answer", "")):
        item = judge.judged(row, answer)
        assert item["score"] is None or 0 <= item["score"] <= 1
        json.dumps(item)
    for change in (lambda row: judge.permuted(row, False), judge.options_shuffled):
        if moved := change(row):
            judge.flips(row, "Clip 2.", moved, "Clip 1.")
    judge.names_index(row)
    judge.mark_prompts(row, "Clip 2.")


# --- rows of a corpus, and the tables that corpora come with

CLIP = {
    "id": "a", "path": "a.wav", "corpus": "world", "split": "test", "duration": 1.5,
    "licence": "CC0", "speaker": "s1", "transcript": "the dog is at the park", "hash": "00",
    "captions": ["a dog"], "labels": ["dog bark"], "events": [["dog bark", 0.1, 0.9]],
    "emotion": "happy", "music": {"tempo": 100, "key": "C", "mode": "major", "energy": 0.5},
    "quality": {"label": "noisy", "strength": 0.5}, "order": {"group": "g", "index": 1},
    "dialogue": {"id": "d", "turn": 1, "speaker": "s1"}, "words": [["the", 0.0, 0.2]],
    "voice": {"f0": 100.0, "tract": 1.0, "rate": 1.0, "breath": 0.1},
}  # fmt: skip


def good_clip(dice) -> dict:
    """Some of what may be known of a clip."""
    return {k: v for k, v in CLIP.items() if k in prepare.CORPUS or dice.random() < 0.5}


def read_corpus(files, home):
    hear(home, "a.wav")
    put(home, files)
    for row in accepted(prepare.read_corpus, home / next(iter(files))):
        row = synth.qualified(row)
        synth.held_by(row)
        synth.kind_of(row)
        synth.sounds_of(row)
        synth.features(row)
        with contextlib.suppress(synth.Miss):  # nothing to tell of it
            synth.caption(row)
        prepare.as_corpus(json.loads(json.dumps(row)), None)


TABLES = {  # corpus -> {file: what it holds}
    "esc50": {"meta/esc50.csv": "filename,fold,category,esc10,src_file\na.wav,1,dog_bark,True,7\n"},
    "audioset": {"class_labels_indices.csv": 'index,mid,display_name\n0,/m/1,"Speech, a"\n',
                 "eval_segments.csv": '# x\na, 30.000, 40.000, "/m/1,/m/2"\n'},
    "audioset-strong": {
        "mid_to_display_name.tsv": "/m/1\tSpeech\n", "audioset_eval_strong.tsv":
        "segment_id\tstart_time_seconds\tend_time_seconds\tlabel\na_30000\t0.1\t0.9\t/m/1\n"},
    "clotho": {"clotho_captions_evaluation.csv":
               "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\na.wav,b,c,d,e,f\n",
               "clotho_metadata_evaluation.csv": "file_name,keywords,license\na.wav,x;y,CC0\n"},
    "audiocaps": {"test.csv": "audiocap_id,youtube_id,start_time,caption\n1,a,30,a dog\n"},
    "librispeech": {"test/1/2/1-2.trans.txt": "1-2-0001 THE DOG\n1-2-0002 A CAT\n"},
    "common-voice": {"test.tsv": "client_id\tpath\tsentence\nx\ta.wav\tthe dog\n"},
    "dipco": {"transcriptions/eval/S01.json": json.dumps([{
        "speaker_id": "P01", "words": "the [laugh] dog", "start_time": {"close-talk": "00:00:00.1"},
        "end_time": {"close-talk": "00:00:00.9"}}])},
    "musiccaps": {"musiccaps-public.csv": "ytid,start_s,end_s,aspect_list,caption,is_audioset_eval"
                  "\na,30,40,\"['slow', 'sad']\",a song,True\n"},
    "music4all": {"id_information.csv": "id\tartist\na\tb\n", "id_lang.csv": "id\tlang\na\ten\n",
                  "id_metadata.csv": "id\tkey\tmode\ttempo\tenergy\na\t1\t0\t100\t0.5\n"},
    "qualispeech": {"test.csv": "id,natural_language_description,noise\na.wav,clear,5\n"},
    "picoaudio": {"meta_data/test.json": json.dumps({
        "filepath": "data/a.wav", "onoffCaption": "dog at 0.1-0.5 and cat at 0.6-0.9",
        "frequencyCaption": "dog one time and cat one time"})},
    "urbansound8k": {"metadata/UrbanSound8K.csv": "slice_file_name,fsID,fold,class\na.wav,1,2,d\n"},
    "vggsound": {"vggsound.csv": "a,30,dog barking,test\n"},
    "speech-commands": {"testing_list.txt": "go/a_nohash_0.wav\n", "validation_list.txt": "x\n"},
}  # fmt: skip


def make_tables(dice) -> dict:
    """The tables of a corpus, one of them spoiled, under the corpus's name."""
    name = dice.choice(sorted(TABLES))
    files = {file: text.encode() for file, text in TABLES[name].items()}
    return {f"{name}/{file}": data for file, data in one_spoiled(dice, files, spoil_file).items()}


def read_tables(files, home):
    name = next(iter(files)).split("/")[0]
    root = home / name
    for file in TABLES[name]:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
    hear(root.parent, f"{name}/a.wav")
    put(home, files)
    seen = prepare.disk_table("id text primary key, split text, hash text")
    rows = prepare.vetted(prepare.CORPORA[name].read(root, prepare.index_audio(root)), seen)
    for row in map(partial(prepare.measure, hashed=False), rows):
        if "skip" not in row:
            row = prepare.corpus_row(row, name, str(home))
            json.dumps(row, ensure_ascii=False)
            prepare.as_corpus(row, home)


@lru_cache(maxsize=1)
def archives() -> list[bytes]:
    packed, found = {"a/b.txt": b"x" * 3000, "c.wav": sounds("wav")[0]}, []
    for mode in ("w", "w:gz"):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode=mode) as tape:
            for name, data in packed.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tape.addfile(member, io.BytesIO(data))
        found.append(file.getvalue())
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, data in packed.items():
            zipped.writestr(zipfile.ZipInfo(name), data)
    return [*found, file.getvalue()]


def make_archive(dice) -> bytes:
    return damaged(dice, dice.choice(archives()), 600)


def read_archive(data, home):
    (home / "a.archive").write_bytes(data)
    try:
        prepare.unpack(home / "a.archive", home / "in" / "out")
    finally:
        assert {path.name for path in home.iterdir()} <= {"a.archive", "in"}, "it stays inside"


# --- what models and servers say

WORDS = (
    "clip audio recording sound 1 2 3 #2 1. 2) 10 1.5 0:01.2 1200 ms s sec first second "
    "third the a and or not no yes n't isn't neither nor none but so therefore answer "
    "answer: is: because since then before after , . ; : ? ! - -> < > ( ) [ ] \" ' ** ` \n "
    "\t <think> </think> <sound-1> rain dog a\u00a0dog twenty-one half a dozen 1,000 % ~ "
    "between at least than rather without except wrong correct that is wrong maybe either A "
    "(A) option b choose it true false enough information one two ninety ninety-nine hundred "
    "once twice in total = 3 + 2 clips 1, 2 and 3 odd one out from to seconds \u2473 \ufdfa "
    "\u0663 \u00b2 \u2167 \u01c6 \u1e9e"
).split(" ")  # fmt: skip


def make_answer(dice) -> dict:
    gold = dice.choice(GOLDS)
    if gold["type"] in LISTED:
        gold = {**gold, "choices": LISTED[gold["type"]]}
    return {"gold": gold, "answer": babble(dice, WORDS)}


def read_answer(given, home):
    row = {"id": "a", "task": "t", "skill": "s", "clips": ["a.wav", "b.wav"], "question": "Which?",
           "answer": "Clip 2.", "meta": {}, "gold": given["gold"]}  # fmt: skip
    item = judge.judged(row, given["answer"])
    assert item["score"] is None or 0 <= item["score"] <= 1
    judge.second_looks([item])
    json.dumps(item, allow_nan=False)
    moved = judge.permuted(row, False)
    judge.flips(row, given["answer"], moved, given["answer"])
    judge.as_given(row, [2, 1], given["answer"])
    for prompt, empty in zip(judge.mark_prompts(row, given["answer"]), judge.PROMPTS):
        assert prompt.count("<") == empty.count("<"), "no text ends the data"


REPLIES = [
    "4", "Score: 4", "4/5", '{"score": 4}', "**4**", "```json\n{\"score\": 4}\n```", "yes",
    "No.", "<think>I think 3</think> 5", "The final answer is: yes", "between 3 and 4", "0", "6",
    "\u0664",
]  # fmt: skip


def make_reply(dice) -> dict:
    said = nearly(dice, dice.choice(REPLIES)) if dice.random() < 0.6 else babble(dice, REPLIES, 6)
    object = {"claim": "a", "label": "No", "clips": [{"support": True, "text": said}]}
    reply = {"choices": [{"message": {"content": said}, "finish_reason": "stop"}],
             "usage": {"prompt_tokens": 3, "completion_tokens": 2}}  # fmt: skip
    text = said + written_out(dice, changed(dice, object)).decode("utf-8", "replace")
    body = written_out(dice, changed(dice, reply) if dice.random() < 0.7 else reply)
    return {"said": said, "text": text, "body": body}


def read_reply(given, home):
    assert judge.read_mark(given["said"]) in (None, 1, 2, 3, 4, 5)
    assert judge.read_yesno(given["said"]) in (None, True, False)
    judge.overall(judge.five_marks(given["said"]))
    shape = {"claim": str, "label": {"Yes", "No"}, "clips": [{"support": bool, "text": str}]}
    found = synth.find_object(given["text"], shape)
    assert found is None or prepare.fits(found, shape)
    service = prepare.Service.__new__(prepare.Service)
    service.key, service.url = None, "http://127.0.0.1"
    record = service.read_reply(given["body"])
    assert all(type(count) is int for count in record.get("usage", ()))
    judge.read_mark(record["content"])


def make_written(dice) -> dict:
    rows = [{"id": "a", "answer": "Clip 1."}, {"id": "b", "prediction": None}]
    rows[dice.randrange(2)] = changed(dice, rows[dice.randrange(2)])
    lines = (written_out(dice, row).replace(b"\n", b" ") for row in rows)
    return {"answers.jsonl": b"\n".join(lines)}


def read_written(files, home):
    put(home, files)
    who = judge.Written(home / "answers.jsonl")
    rows = [{"id": "a", "gold": {"type": "clip", "value": 1}}, {"id": "b"}]
    said = judge.Asking(who, home, None).ask(rows, "judged")
    assert all(answer is None or isinstance(answer, str) for answer in said)


ASKED = {"model": "m", "how": "h", "most": judge.NEW, "clips": [], "layout": None,
         "messages": [{"role": "user", "content": "Which?"}]}  # fmt: skip


def make_journal(dice) -> bytes:
    records = [
        {"key": prepare.hash_of(ASKED), "model": "m", "usage": [0, 0], "content": "Clip 1."},
        {"key": "0", "model": "m", "usage": [3, 2], "refused": "response_format"},
    ]
    records[dice.randrange(2)] = changed(dice, records[dice.randrange(2)])
    lines = (json.dumps(record).encode() for record in records)
    data = b"".join(line + b"\n" for line in lines)
    return damaged(dice, data) if dice.random() < 0.3 else data


class Mute:
    """Somebody to ask who says nothing."""

    name, how, most = "m", "h", judge.NEW

    def answers(self, items):
        return iter(())


def read_journal(data, home):
    (home / "asked.jsonl").write_bytes(data)
    journal = prepare.Journal(home / "asked.jsonl")
    try:
        row = {"id": "a", "clips": [], "question": "Which?", "answer": "Clip 1."}
        said = judge.Asking(Mute(), home, journal).ask([row], "judged")
        assert said[0] is None or isinstance(said[0], str)
        journal.keep({"model": "m", "new": 1}, content="yes")
    finally:
        journal.close()
    again = prepare.Journal(home / "asked.jsonl")
    again.close()
    assert again.recall is not None and prepare.hash_of({"model": "m", "new": 1}) in again.places


# --- reports


@lru_cache(maxsize=1)
def report() -> dict:
    """Of two items, as judge.py writes it."""
    rows = [{"id": f"r{i}", "task": "odd", "skill": "comparison", "clips": ["a.wav", "b.wav"],
             "question": "Which?", "answer": "audio 2", "meta": {},
             "gold": {"type": "clip", "value": 2}} for i in range(2)]  # fmt: skip
    items = [judge.judged(row, answer) for row, answer in zip(rows, ("audio 2", None))]
    about = {"name": "x", "who": "m", "bench": "b", "root": "/nowhere", "settings": {"items": 2}}
    return {**about, **judge.tally(items)}


def make_report(dice) -> dict:
    return {"b.json": written_out(dice, changed(dice, report()))}


def read_report(files, home):
    put(home, {"a.json": json.dumps(report()).encode(), **files})
    paths = [home / "a.json", home / "b.json"]
    reports = [judge.read_report(path) for path in paths]
    judge.check_same(paths, *({item["id"]: item for item in each["items"]} for each in reports))
    found = judge.compared(*reports)
    reports = [{**report, **judge.tally(report["items"])} for report in reports]
    judge.write_page(home / "page.html", reports, 0, found)
    assert "<script>alert" not in (home / "page.html").read_text(errors="replace")


# --- requests to the server, with all that stands around them

SPOKEN = [
    {"type": "text", "text": "Which?"},
    {"type": "input_audio", "input_audio": {"data": "(sound)", "format": "wav"}},
]


@lru_cache(maxsize=1)
def served():
    """What a connection knows of its server: a small network, and who makes its answers at once."""
    text = {**SMALL, "vocab_size": 300, "max_position_embeddings": 512}
    with tempfile.TemporaryDirectory() as dir:
        config = {**HEARING, "text_config": text, "audio_token_id": tokenizer().slot}
        PolyAudio(Config.from_dict(config)).save(dir)
        put(Path(dir), tokenizer_files("whole"))
        net = PolyAudio.from_dir(dir)
        net.tokenizer.encode("")
    args = SimpleNamespace(max_new_tokens=2, temperature=0.0, top_p=1.0, seed=0)
    at_once = SimpleNamespace(put=lambda reply: reply.run(reply.asked))
    door = {"enter": lambda reply: None, "leave": lambda reply: None}
    door["desk"] = contextlib.nullcontext()
    return SimpleNamespace(net=net, args=args, name="m", since=0, waiting=at_once, **door)


def make_request(dice) -> bytes:
    sound = base64.b64encode(dice.choice(sounds("wav")[:6])).decode()
    parts = json.dumps([dice.choice(SPOKEN) for _ in range(dice.randrange(1, 4))])
    asked = [{"role": "user", "content": json.loads(parts.replace("(sound)", sound))}]
    body = {"model": "m", "messages": asked, "max_tokens": 2, "stop": ["a"], "temperature": 0,
            "stream": dice.random() < 0.5}  # fmt: skip
    data = written_out(dice, changed(dice, body) if dice.random() < 0.7 else body)
    line = dice.choice(("POST /v1/chat/completions",) * 8 + ("GET /v1/models", "GET /health"))
    head = f"{line} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head = f"{head}Content-Length: {len(data)}\r\n\r\n".encode()
    return (damaged(dice, head) if dice.random() < 0.4 else head) + data


def ask(address, data) -> bytes:
    """All of the reply; the server may close before it has read everything."""
    with socket.create_connection(address) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        reply = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                reply += piece
        return reply


def read_request(data, home):
    sample.PATIENCE["request"] = 0.2  # seconds for what never comes
    with socket.create_server(("127.0.0.1", 0)) as door, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, door.getsockname(), data)
        connection, address = door.accept()
        with connection:
            sample.Client(connection, address, served())
    reply = asked.result()
    assert reply[:9] in (b"", b"HTTP/1.1 "), reply
    assert b'"code": 500' not in reply, reply
    if not reply.startswith(b"HTTP/1.1 200"):
        raise BadInput(f"{reply[:60]}")


class Kind(NamedTuple):
    make: Callable  # dice -> an input
    read: Callable  # (input, folder)


KINDS = {
    **{name: Kind(partial(make_sound, endings=[name]), read_sound)
       for name in ("wav", "flac", "ogg", "mp3")},
    "sounds": Kind(partial(make_sound, endings=["aiff", "au", "caf", "w64"]), read_sound),
    "weights": Kind(partial(make_weights, kinds=("text", "shards", "hearing")), read_weights),
    "adapter": Kind(partial(make_weights, kinds=("adapter",)), read_adapter),
    "listing": Kind(make_listing, read_listing),
    "tokenizer": Kind(make_tokenizer, read_tokenizer),
    "prompt": Kind(make_prompt, read_prompt),
    "rows": Kind(make_rows, read_rows),
    "corpus": Kind(partial(make_rows, good=good_clip), read_corpus),
    "tables": Kind(make_tables, read_tables),
    "archive": Kind(make_archive, read_archive),
    "answer": Kind(make_answer, read_answer),
    "reply": Kind(make_reply, read_reply),
    "written": Kind(make_written, read_written),
    "journal": Kind(make_journal, read_journal),
    "report": Kind(make_report, read_report),
    "request": Kind(make_request, read_request),
}  # fmt: skip


def input_of(kind, seed, number):
    return KINDS[kind].make(random.Random(f"{seed} {kind} {number}"))


# ------------------------------------------------------------------------------------------------
# One process reads many inputs, and tells of those that came to neither a value nor a refusal.


def check_line(mistake):
    assert len(str(mistake)) <= LINE, f"a refusal of {len(str(mistake))} letters"


def outcome(kind, value, home) -> str:
    """accepted, refused, or what went wrong and where."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    try:
        try:
            KINDS[kind].read(value, home)
        except BadInput as mistake:
            check_line(mistake)
            return "refused"
        except OSError as error:  # which prepare.cli tells in a line, if a file is at fault
            if not error.filename:
                raise
            return "refused"
        return "accepted"
    except BaseException as error:  # a library's panic is no Exception
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if ROOT in Path(frame.filename).parents] or frames
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        return f"{type(error).__name__} at {place}"


def timed(seconds):
    """The system ends this process by a signal, unless it is called again in time."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


def confine(pipe):
    """What this process may use, and where its last words go."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    faulthandler.enable(pipe, all_threads=False)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
        faulthandler.register(number, pipe, all_threads=False, chain=True)
    if Path("/proc/self/statm").exists():  # elsewhere nobody holds the limit
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def apart(job) -> tuple[list[str], str]:
    """job(tell) in a process of its own. -> the lines that it told, and, where it was ended by a
    signal, which and at what place of the program."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(ours)
            confine(theirs)
            job(lambda line: os.write(theirs, line.encode(errors="replace") + b"\n"))
            os._exit(0)
        except BaseException:
            os.write(theirs, traceback.format_exc().encode(errors="replace"))
        os._exit(1)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        told = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    expect(not os.WIFEXITED(status) or status == 0, "tests.fuzz", "a reader that runs", told)
    lines, ended = told.splitlines(), ""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        hung = number in (signal.SIGPROF, signal.SIGALRM)
        frames = re.findall(rf'File "{ROOT}/([^"]+)", line (\d+) in', told)
        place = ":".join(frames[0]) if frames else "an unknown place"
        ended = f"{'hang' if hung else signal.Signals(number).name} at {place}"
    return [line for line in lines if line.startswith("{")], ended


def used() -> int:
    """The most memory that this process has had, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def read_many(kind, seed, first, inputs, end, home, board, tell):
    """Read inputs until one of the ends, and keep the board: the next number, how many were
    accepted, refused, the slowest in seconds, the most memory."""
    before = used()
    for number in range(first, inputs):
        if time.monotonic() > end:
            return
        value = input_of(kind, seed, number)
        board[0] = number + 1
        start = time.process_time()
        timed(SECONDS)
        what = outcome(kind, value, home)
        timed(0)
        board[3] = max(board[3], time.process_time() - start)
        board[4] = max(board[4], used() - before)
        if what in ("accepted", "refused"):
            board[1 + (what == "refused")] += 1
        else:
            tell(json.dumps({"number": number, "what": what}))


class Tally(NamedTuple):
    kind: str
    inputs: int
    accepted: int
    refused: int
    slowest: float  # seconds of processor time
    peak: float  # bytes more than at the start
    seconds: float
    findings: dict  # what went wrong -> numbers of the inputs


@lru_cache(maxsize=1)
def warm_up():
    """What a process does only once, so that the next ones inherit it."""
    with torch.device("meta"):
        PolyAudio(Config.from_dict(HEARING))


def fuzz(kind, seed=0, inputs=1 << 60, seconds=math.inf) -> Tally:
    """Inputs of one kind, so many or for so long; enough findings end it, too."""
    warm_up()
    board = np.frombuffer(mmap.mmap(-1, 40), np.float64)
    start, findings, killed, ended = time.monotonic(), {}, 0, "?"
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder:
        home = Path(folder, "in")
        while ended and killed < ENOUGH and sum(map(len, findings.values())) < MOST:
            job = partial(
                read_many, kind, seed, int(board[0]), inputs, start + seconds, home, board
            )
            lines, ended = apart(job)
            for line in map(json.loads, lines):
                findings.setdefault(line["what"], []).append(line["number"])
            if ended:
                killed += 1
                findings.setdefault(ended, []).append(int(board[0]) - 1)
    return Tally(kind, int(board[0]), int(board[1]), int(board[2]), board[3], board[4],
                 time.monotonic() - start, findings)  # fmt: skip


MEMORY_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


# ------------------------------------------------------------------------------------------------
# A finding, made small.


def smaller(value):
    """Everything that has a part less."""
    if isinstance(value, (bytes, str, list)):
        size = len(value)
        while size:
            size //= 2
            for start in range(0, len(value), max(size, 1)):
                yield value[:start] + value[start + max(size, 1) :]
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            if isinstance(value, dict):
                yield {k: v for k, v in value.items() if k != key}
            for less in smaller(value[key]):
                with_less = copy.copy(value)
                with_less[key] = less
                yield with_less


def ended_as(kind, value) -> str:
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder:

        def job(tell):
            timed(SECONDS)
            tell(json.dumps({"what": outcome(kind, value, Path(folder, "in"))}))

        lines, ended = apart(job)
    return ended or json.loads(lines[0])["what"]


def minimized(kind, value, what, seconds=10):
    """The smallest input found in that time that ends in the same way, at the same place."""
    end, tries = time.monotonic() + seconds, smaller(value)
    while time.monotonic() < end:
        less = next(tries, None)
        if less is None:
            break
        if ended_as(kind, less) == what:
            value, tries = less, smaller(less)
    return value


HEAD = ("kind", "inputs", "a second", "accepted", "refused", "slowest ms", "peak MB", "findings")


def line_of(tally) -> str:
    cells = [f"{tally.inputs:,}", f"{tally.inputs / tally.seconds:,.0f}", f"{tally.accepted:,}",
             f"{tally.refused:,}", f"{tally.slowest * 1000:,.0f}", f"{tally.peak / 1e6:,.0f}",
             len(tally.findings)]  # fmt: skip
    return f"{tally.kind:<12}" + "".join(f"{cell:>11}" for cell in cells)


def told(tally, seed) -> list[str]:
    """A line for each way to go wrong, that does it again."""
    lines = []
    for what, numbers in tally.findings.items():
        value = input_of(tally.kind, seed, numbers[0])
        small = repr(minimized(tally.kind, value, what))
        again = f"python -m tests.fuzz {tally.kind} --seed {seed} --number {numbers[0]}"
        lines.append(f"{again}  # {len(numbers)} x {what}; smallest: {small:.400}")
    return lines


def read_one(kind, seed, number):
    """One input again, where everybody can see it."""
    value = input_of(kind, seed, number)
    print(f"{value!r:.2000}")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "in")
        home.mkdir()
        faulthandler.register(signal.SIGPROF, sys.__stderr__, chain=True)
        timed(SECONDS)
        try:
            KINDS[kind].read(value, home)
        except BadInput as mistake:
            return print(f"refused: {mistake}")
    print("accepted")


def main():
    parser = prepare.Parser(prog="python -m tests.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--seconds", type=float, default=60, help="for each, default: 60")
    parser.add_argument("--inputs", type=int, metavar="N", help="of each, instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, metavar="N", help="of one kind, this input alone")
    args = parser.parse_args()
    for kind in args.kinds:
        expect(kind in KINDS, "KIND", f"one of {', '.join(KINDS)}", kind)
    if args.number is not None:
        expect(len(args.kinds) == 1, "--number", "one KIND", len(args.kinds))
        return read_one(args.kinds[0], args.seed, args.number)
    limits = {"inputs": args.inputs} if args.inputs else {"seconds": args.seconds}
    tallies, lines = [], []
    print(f"{HEAD[0]:<12}" + "".join(f"{name:>11}" for name in HEAD[1:]))
    for kind in args.kinds or KINDS:
        tallies.append(fuzz(kind, args.seed, **limits))
        print(line_of(tallies[-1]), flush=True)
        lines += told(tallies[-1], args.seed)
    columns = list(zip(*tallies))
    whole = Tally("all", *map(sum, columns[1:4]), *map(max, columns[4:6]), sum(columns[6]),
                  dict.fromkeys(lines))  # fmt: skip
    print(line_of(whole))
    print("\n".join(lines), end="\n" * bool(lines))
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    prepare.cli(main)
