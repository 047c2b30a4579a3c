"""Ask about several sounds.

    python sample.py --clips a.wav b.wav --ask "Which clip is louder?"
    python sample.py --clips a.wav b.wav              # what is in each, and how do they differ?
    python sample.py --clips night/ --ask "Put <sound-3> into words." --json
    cat a.wav | python sample.py --clips - b.flac --ask "Same speaker in 1 and 2?" --vote 4
    python sample.py --clips a.wav b.wav --ask "Which one barks?" --why   # which clip says so, when
    python sample.py --weights weights/af3 --serve 8000   # OpenAI's API, clips in place in the text
    python sample.py                                  # a few questions on the clips that come along

Clips are files, folders, globs, or - for standard input; the text may say where one belongs with
<sound-1>, <sound-2>, ...; without that they come first, in order. Without --ask, on a terminal, the
first answer is followed by a chat: /clip PATH adds a clip, every turn sees all earlier ones. The
answer, and the bars of --why, go to stdout, notes and mistakes to stderr. Exit codes: 0, 2 for a
mistake (one line says which), 130 after Ctrl-C, 141 when the reader of stdout has left.
"""

import argparse
import base64
import contextlib
import glob
import io
import itertools
import json
import math
import os
import queue
import random
import re
import select
import signal
import socket
import socketserver
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import quote

# Before torch: threads that wait for work must not burn a core that somebody else could use, yet
# should not fall asleep between two layers. Spinning some 50 microseconds does both.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch  # noqa: E402

import kernels  # noqa: E402
from model import Cache, PolyAudio, add_weight_flags, load_net, numbers  # noqa: E402
from prepare import (  # noqa: E402
    HOP, MARKER, RATE, ROLES, BadInput, Parser, check_fits, clean, cli, clip_samples, expect,
    fail, load_audio, load_clip, note, open_audio, remap_indices, view_concat, view_permute,
)  # fmt: skip

SLOT = 4 * HOP / RATE  # seconds of a slot: two convolutions' step, then neighbours in pairs
TINY = Path(__file__).parent / "weights" / "tiny"
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aif", ".aiff", ".au", ".caf", ".w64")
DEFAULT_QUESTION = "What is in each clip, and how do they differ?"
NO_WEIGHTS = (
    "no weights/tiny here; name a folder: --weights DIR (python train.py makes a small one, python"
    " prepare.py weights nvidia/audio-flamingo-3-hf --out weights/af3 brings a large)"
)
CLIPS = Path(__file__).parent / "clips"
DEMO = (  # what is asked about the clips that come along
    ("dog storm piano", "In which recording do you hear the sound of dog bark?"),
    ("anna ben", "Is it the same speaker in audio 1 and audio 2?"),
    ("anna anna_noisy", "Which audio suffers from noise?"),
)

# ------------------------------------------------------------------------------------------------
# Clips: what the command line means by them.


def find_clips(words: list[str]) -> list[str]:
    """Files as they are, folders and globs in the order of their names."""
    found = []
    for word in words:
        expect(word, "--clips", "a path", "an empty one")
        if word != "-" and os.path.isdir(word):
            inside = sorted(glob.glob(os.path.join(glob.escape(word), "*")))
            inside = [path for path in inside if Path(path).suffix.lower() in SOUNDS]
            expect(inside, word, "sounds in this folder", "none")
            found += inside
        elif glob.has_magic(word) and not os.path.exists(word):
            inside = sorted(filter(os.path.isfile, glob.glob(word, recursive=True)))
            if not inside:
                raise BadInput(f"{word}: no file matches")
            found += inside
        else:
            found.append(word)
    if found.count("-") > 1:
        raise BadInput("--clips: standard input (-) can be one clip only")
    return found


def from_input(path: str):
    """A clip as it is; of standard input its samples, which can be read only once."""
    if path != "-":
        return path
    data = io.BytesIO(sys.stdin.buffer.read())
    data.name = "standard input"
    if not data.getbuffer().nbytes:
        raise BadInput("standard input: no bytes came")
    return load_audio(data)


# ------------------------------------------------------------------------------------------------
# One question.


def check_room(net, messages, clips, args):
    """Refuse what passes the context while the clips are but numbers of samples, from their files'
    headers: thousands of them, decoded to find that out, would fill the memory."""
    ids, placed = net.prompt(messages, clips)
    slots = [net.n_slots(clip) for clip in placed]
    check_fits(len(ids), slots, net.config.decoder.context, args.max_new_tokens)


class Answer:
    """One answer while it is being made: shown piece by piece, its ids and its times kept."""

    def __init__(self, net: PolyAudio, show: bool):
        self.net, self.show = net, show
        self.push = net.tokenizer.stream()
        self.ids, self.text = [], ""
        self.start, self.first = time.perf_counter(), None

    def take(self, id):
        """The next id, as generate's on_token; None when the answer has ended."""
        self.first = self.first or time.perf_counter()
        if id is not None:
            self.ids.append(id)
        piece = self.push(id)
        self.text += piece
        if self.show:
            print(clean(piece, keep="\n\t"), end="", flush=True)

    def make(self, ids, clips, args, cache=None) -> "Answer":
        self.asked = ids, clips
        self.net.generate(
            ids, clips, args.max_new_tokens, args.temperature, self.take,
            top_p=args.top_p, seed=args.seed, stop=self.net.ends, cache=cache,
        )  # fmt: skip
        self.take(None)
        if self.show:
            print(flush=True)
        self.end = time.perf_counter()
        return self


def ask(net, question, waves, args, order=None, show=False) -> Answer:
    """The question on the clips, in another order or joined to one if asked for."""
    example = {"question": question, "clips": waves}
    if order:
        example = view_permute(example, order)
    if args.concat:
        example = view_concat(example)
    clips = [load_clip(clip) for clip in example["clips"]]
    ids, placed = net.prompt([{"role": "user", "content": example["question"]}], clips)
    return Answer(net, show).make(ids, placed, args)


def clip_orders(n: int, k: int, seed: int) -> list[list[int]]:
    """k different orders of n clips, the given one first; all, where there are fewer."""
    given = list(range(1, n + 1))
    if k >= math.factorial(n):
        return [list(order) for order in itertools.permutations(given)]
    dice, orders = random.Random(seed), [given]
    while len(orders) < k:
        order = dice.sample(given, n)
        if order not in orders:
            orders.append(order)
    return orders


def vote(net, question, waves, args) -> tuple[Answer, list[dict]]:
    """Ask under several orders of the clips, name the clips in each answer as they were given, and
    take the answer that most orders agree on, word by word; on a tie, the one that came first. So
    it is for questions with short answers: two free sentences hardly ever agree."""
    bare = not re.search(r"(?i)\bhow (many|often|long|much)\b", question)  # else "2" is no clip
    votes, answers = [], []
    for order in clip_orders(len(waves), args.vote, args.seed):
        answers.append(ask(net, question, waves, args, order))
        given = dict(enumerate(order, 1))  # place in this order -> the clip's own index
        text = remap_indices(answers[-1].text.strip(), given, bare)
        votes.append({"order": order, "answer": text})
        note(f"order {' '.join(map(str, order))}: {text}")
    plain = [" ".join(re.findall(r"\w+", v["answer"].casefold())) for v in votes]
    winner = plain.index(Counter(plain).most_common(1)[0][0])
    note(f"{plain.count(plain[winner])} of {len(plain)} orders agree")
    answers[winner].text = votes[winner]["answer"]
    return answers[winner], votes


# ------------------------------------------------------------------------------------------------
# A chat: every turn reads only what the cache has not read.


class Chat:
    """A conversation. The first turn places the clips of the command line, a later one those that
    /clip has added since: each turn says itself where its clips are."""

    def __init__(self, net: PolyAudio, waves: list, args):
        self.net, self.waves, self.args = net, waves, args
        self.messages, self.cache = [], None
        self.shown = 0  # clips that a turn has held

    def say(self, text: str) -> Answer:
        """One turn; clips that no turn has held, and this text does not place, come before it."""
        placed = {int(i) for i in re.findall(MARKER, text)}
        new = [i for i in range(self.shown + 1, len(self.waves) + 1) if i not in placed]
        content = "".join(f"<sound-{i}>\n" for i in new) + text
        messages = [*self.messages, {"role": "user", "content": content}]
        ids, clips = self.net.prompt(messages, self.waves)
        room = len(ids) + self.args.max_new_tokens
        if self.cache is None or room > self.cache.capacity:
            self.cache = None  # a larger one reads all of it again; first let this one go
            config = self.net.config.decoder
            room = min(max(2 * room, 4096), max(room, config.context))
            self.cache = Cache(config, 1, room, self.net.lm_head.weight)
        answer = Answer(self.net, show=True).make(ids, clips, self.args, self.cache)
        self.messages = [*messages, {"role": "assistant", "content": answer.text.strip()}]
        self.shown = len(self.waves)
        return answer

    def add(self, word: str):
        """More clips, all of them or, if one cannot be heard, none."""
        paths = find_clips([word])
        expect("-" not in paths, "/clip", "a file", "-, from which the questions come")
        samples = [clip_samples(path) for path in paths]
        for path, n in zip(paths, samples):
            expect(self.net.n_slots(n), path, "at least 321 samples (20 ms)", n)
        content = "".join(f"<sound-{i}>\n" for i in range(1, len(self.waves) + len(paths) + 1))
        asked = [{"role": "user", "content": content}]
        check_room(self.net, asked, [*self.waves, *samples], self.args)
        waves = [load_audio(path) for path in paths]
        self.waves += waves
        for i, (path, wave) in enumerate(zip(paths, waves), len(self.waves) - len(waves) + 1):
            note(f"clip {i}: {path}, {len(wave) / RATE:.2f} s")

    def run(self, line: str):
        """From a first question until the end of input. A mistake in one line leaves the
        conversation as it was; clips that were added for a question that failed go with it."""
        note("/clip PATH adds a clip, /quit or Ctrl-D ends")
        while line != "/quit":
            try:
                if line.startswith("/clip "):
                    self.add(line[6:].strip())
                elif line.startswith("/"):
                    note("expected /clip PATH, /quit, or a question")
                elif line:
                    self.say(line)
            except BadInput as mistake:
                fail(mistake)
                if not line.startswith("/") and 0 < self.shown < len(self.waves):
                    note(f"clips from {self.shown + 1} on are dropped; /clip adds them again")
                    del self.waves[self.shown :]
            except KeyboardInterrupt:
                note("stopped")
                self.cache = None  # it may hold half a step
            try:
                line = input("> ").strip()
            except EOFError:
                return


# ------------------------------------------------------------------------------------------------
# Why: what an answer rests on. Which clip would be missed is found by leaving each one out in turn,
# and where in a clip it was heard by the gradient: neither tells the other.
#
# A clip is left out by taking its slots from the prompt, and nothing else. "(audio 2: [BOA][EOA])"
# stays, so the others keep their names; and there is no silence in its place, which would be
# something to hear. What is compared is the log-likelihood of the answer, all of it: one that first
# tells what is in each clip loses what it told of the missing one. To let the network tell anew and
# compare the verdict alone names the right clip less often, since it hears what is not there.

WIDE = 48  # characters of the longest bar
INKS = " .:-=+*#%@"


def without(net, ids, clips, gone) -> tuple[list[int], list]:
    """A prompt and its clips with one clip's slots taken out, wherever it stands."""
    taken = iter([clip is gone for clip in clips for _ in range(net.n_slots(clip))])
    kept = [id for id in ids if id != net.config.audio_token or not next(taken)]
    return kept, [clip for clip in clips if clip is not gone]


def contributions(net, ids, clips, said) -> list[float]:
    """Gradient x input of each slot of the prompt: the derivative of the answer's log-likelihood by
    the slot's size, so its sign says whether the slot speaks for the answer or against it."""
    with torch.no_grad():
        x = net.embed([[*ids, *said]], [clips])  # (T, D)
    x.requires_grad_()
    decoder = net.language_model
    before = decoder.recompute
    decoder.recompute = True  # for room: a long prompt would keep every layer's inside
    try:
        with torch.enable_grad():
            hidden = decoder(x, [len(x)])[len(ids) - 1 : -1]
            loss = net.surprise(hidden, numbers(said, net.device)).sum()
            (gradient,) = torch.autograd.grad(loss, x)
    finally:
        decoder.recompute = before
    each = -(gradient.float() * x.detach().float()).sum(1)
    return [value for id, value in zip(ids, each.tolist()) if id == net.config.audio_token]


def why(net, asked, waves, said) -> list[dict]:
    """What the answer `said` to the prompt `asked` rests on: the clips in the order of what it
    loses without each. slots: what each one adds, summed where a clip repeats."""
    with torch.no_grad():
        heard = net.listen(waves)
    rows = {id(wave): row for wave, row in zip(waves, heard)}
    ids, clips = asked[0], [rows[id(wave)] for wave in asked[1]]
    whole, found = net.loglik(ids, clips, said), []
    each = iter(contributions(net, ids, clips, said))
    parts = [(clip, [next(each) for _ in range(net.n_slots(clip))]) for clip in clips]
    for i, clip in enumerate(heard, 1):
        drop = whole - net.loglik(*without(net, ids, clips, clip), said)
        slots = list(map(sum, zip(*(values for part, values in parts if part is clip))))
        found.append({"clip": i, "drop": drop, "slots": slots})
    return sorted(found, key=lambda clip: -clip["drop"])


def show_why(net, clips, paths):
    """Bars: of each clip what the answer loses without it, and over its seconds how much it hangs
    on them, for or against: neighbours of either sign would cancel. One scale of time and one of
    ink for all clips. Nothing but ASCII and no colour, so any terminal shows it."""
    top = max(max(clip["drop"] for clip in clips), 1e-9)
    per = -(-max(len(clip["slots"]) for clip in clips) // WIDE)  # slots of a character
    rows = [[sum(map(abs, clip["slots"][i : i + per])) for i in range(0, len(clip["slots"]), per)]
            for clip in clips]  # fmt: skip
    darkest = max(map(max, rows)) or 1
    print("\nHow much log-likelihood the answer loses without each clip,")
    print("and which of its seconds it hangs on:")
    for clip, row in zip(clips, rows):
        bar = "#" * round(WIDE * max(clip["drop"], 0) / top)
        name = clean(paths[clip["clip"] - 1])
        print(f"clip {clip['clip']:<3}{bar:<{WIDE + 2}} {clip['drop']:8.2f}  {name}")
        if net.config.resampler["kind"] != "perceiver":  # its slots have no place in time
            ink = "".join(INKS[round((len(INKS) - 1) * value / darkest)] for value in row)
            second = SLOT * per
            most = row.index(max(row)) * second
            length = len(clip["slots"]) * SLOT
            told = f"{length:6.2f} s, most at {most:.2f}-{min(most + second, length):.2f}"
            print(f"        |{ink}|{told}")


# ------------------------------------------------------------------------------------------------
# Serving: OpenAI's chat completions, one answer at a time. A thread for each connection reads the
# request, decodes its clips and lays out its prompt; the main thread generates; the text goes back
# through a queue of the request's own. So whoever is slow to send or to read holds up nobody else.
# What would cost memory or time is asked of a request before it is done for it: the length of its
# body, which is parsed while no other is; a place among those that wait; the lengths in its clips'
# headers; then the samples.
#
# Any page in a browser on this machine can send requests here, and under a name of its own that it
# makes point here it could read the replies. So Host must be the address that was called, and an
# Origin must be the same. Nothing is fetched or opened for a client: a sound comes in the request.

MOST = {
    "bytes": 1 << 25, "small": 1 << 20, "letters": 1 << 20, "parts": 1000, "clips": 64,
    "waiting": 8, "threads": 128,
    "samples": 1 << 27,  # as the files have them, all channels: 23 minutes at 48 kHz in stereo
}  # fmt: skip
PATIENCE = {"request": 20, "queue": 60, "answer": 300, "write": 10}  # seconds
PATHS = ("POST /v1/chat/completions", "GET /v1/models", "GET /health")
MESSAGE = ("role", "content", "name")  # of a message; a name changes nothing
PEEK = socket.MSG_PEEK  # look, and leave it there
SPOKEN_BY = {role: role for role in ROLES} | {"developer": "system"}  # as newer clients call it
PART = "a text, or an input_audio with base64 data and a format"


def number(least, most, kinds=(int, float)):
    return lambda value: type(value) in kinds and least <= value <= most


def listed(value) -> list:
    return value if isinstance(value, list) else [value]


FIELDS = {  # of a request: in words, and the test
    "model": ("a name", lambda v: isinstance(v, str)),
    "messages": (f"a list of 1 to {MOST['parts']}", lambda v: isinstance(v, list)
                 and 0 < len(v) <= MOST["parts"]),
    "stream": ("true or false", lambda v: isinstance(v, bool)),
    "stream_options": ("include_usage, true or false", lambda v: isinstance(v, dict)
                       and all(k == "include_usage" and type(v[k]) is bool for k in v)),
    "max_tokens": ("a whole number above 0", number(1, 1 << 20, (int,))),
    "max_completion_tokens": ("a whole number above 0", number(1, 1 << 20, (int,))),
    "temperature": ("0 to 2", number(0, 2)),
    "top_p": ("above 0, at most 1", number(1e-6, 1)),
    "seed": ("a whole number of 64 bits", number(-1 << 63, (1 << 63) - 1, (int,))),
    "stop": ("up to four texts", lambda v: len(listed(v)) < 5
             and all(isinstance(text, str) and text for text in listed(v))),
    "user": ("a text", lambda v: isinstance(v, str)),  # whoever that is, the answer is the same
}  # fmt: skip
NEUTRAL = {  # what clients send although it changes nothing; any other value is refused
    "n": ["1"], "logprobs": ["false"], "frequency_penalty": ["0", "0.0"], "tools": ["[]"],
    "presence_penalty": ["0", "0.0"], "logit_bias": ["{}"], "modalities": ['["text"]'],
    "response_format": ['{"type": "text"}'], "store": ["false"],
}  # fmt: skip


class Enough(Exception):
    """A stop text has come, or nobody waits any more."""


class Refusal(BadInput):
    """One that has an HTTP status of its own; any other is a 400."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def from_body(body: bytes):
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise BadInput("body: expected JSON, found something else") from None


def check_request(request):
    expect(isinstance(request, dict), "body", "an object", request, 40)
    for name in ("model", "messages"):
        expect(name in request, name, FIELDS[name][0], "none")
    known = f"fields of {', '.join([*FIELDS, *NEUTRAL])}"
    for name, value in request.items():
        expect(name in FIELDS or name in NEUTRAL, "body", known, name, 40)
        if name in NEUTRAL:
            fine = value is None or json.dumps(value) in NEUTRAL[name]
            expect(fine, name, f"{NEUTRAL[name][0]}, or none", value, 40)
        elif value is not None or name in ("model", "messages"):
            expect(FIELDS[name][1](value), name, FIELDS[name][0], value, 40)
    streams = request.get("stream") or not request.get("stream_options")
    expect(streams, "stream_options", "these with stream only", "no stream")
    both = request.get("max_tokens") and request.get("max_completion_tokens")
    expect(not both, "max_tokens", "this or max_completion_tokens", "both")


def read_messages(given) -> tuple[list[dict], list]:
    """A client's messages as ours, and its sounds as (place, file), not decoded yet: the n-th one
    is clip n, <sound-n> in the place of its part. Sounds that all come before their message's text
    get a line each, like those of --clips."""
    messages, sounds, count = [], [], 0
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        role, parts = (message.get(k) if isinstance(message, dict) else 0 for k in MESSAGE[:2])
        fine = isinstance(role, str) and role in SPOKEN_BY
        expect(fine, where, f"a role of {', '.join(SPOKEN_BY)}", role, 40)
        more = [key for key, value in message.items() if value and key not in MESSAGE]
        expect(not more, where, "a role and a content", more, 40)
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        fine = isinstance(parts, list) and all(isinstance(part, dict) for part in parts)
        expect(fine, f"{where}.content", "a text or a list of parts", parts, 40)
        count += len(parts)
        expect(count <= MOST["parts"], where, f"up to {MOST['parts']} parts in all", "more")
        kinds, said, placed = [str(part.get("type")) for part in parts], [], []
        line = "\n" if kinds == sorted(kinds) else ""  # input_audio is before text
        for j, (kind, part) in enumerate(zip(kinds, parts)):
            place, text = f"{where}.content[{j}]", part.get("text")
            if kind == "input_audio":
                fits = role == "user" and len(sounds) < MOST["clips"]
                expect(fits, place, f"up to {MOST['clips']} sounds, all of the user's", "more")
                sounds.append((place, read_sound(part.get("input_audio"), place)))
                placed.append(str(len(sounds)))
                text = f"<sound-{placed[-1]}>{line}"
            else:
                expect(kind == "text" and isinstance(text, str), place, PART, kind, 40)
            said.append(text)
        text = "".join(said)
        spelt = role != "user" or re.findall(MARKER, text) == placed  # in one part or in several
        expect(spelt, f"{where}.content", "sounds as parts, in their place", "<sound-n> in a text")
        messages.append({"role": SPOKEN_BY[role], "content": text})
    letters = sum(len(message["content"]) for message in messages)
    expect(letters <= MOST["letters"], "messages", f"up to {MOST['letters']} letters", letters)
    expect(role == "user", "messages", "the user's as the last one", role)
    return messages, sounds


def read_sound(sound, where):
    """A file in memory from its bytes in base64."""
    fine = isinstance(sound, dict) and set(sound) == {"data", "format"}
    expect(fine and isinstance(sound["data"], str), where, PART, "another input_audio")
    fine = f".{sound['format']}" in SOUNDS
    expect(fine, f"{where}: format", f"one of {' '.join(SOUNDS)}", sound["format"], 40)
    try:
        file = io.BytesIO(base64.b64decode(sound["data"], validate=True))
    except ValueError:
        raise BadInput(f"{where}: data: expected base64, found something else") from None
    file.name = where
    return file


def lengths(sounds, most) -> list[int]:
    """How many samples each sound will have, by its header; none may be longer than `most` seconds,
    nor all together more to decode than a recording in stereo: a few bytes can promise hours."""
    found, total = [], 0
    for where, file in sounds:
        with open_audio(file) as (_, opened):
            frames, rate, channels = opened.frames, opened.samplerate, opened.channels
        file.seek(0)
        expect(frames <= most * rate, where, f"up to {most} s of sound", f"{frames / rate:.1f} s")
        total += frames * channels
        expect(total <= MOST["samples"], where, f"up to {MOST['samples']} samples in all", total)
        found.append(-(-frames * RATE // rate))
    return found


class Reply(Answer):
    """An answer to a client: the main thread makes it, the connection's takes its pieces."""

    def __init__(self, net, request, args):
        super().__init__(net, show=False)
        asked = {name: value for name, value in request.items() if value is not None}
        most = asked.get("max_completion_tokens", asked.get("max_tokens", args.max_new_tokens))
        self.how = argparse.Namespace(max_new_tokens=most)
        for name in ("temperature", "top_p", "seed"):
            setattr(self.how, name, asked.get(name, getattr(args, name)))
        if self.how.seed is None:
            self.how.seed = int.from_bytes(os.urandom(7), "big")
        self.stops, self.messages = listed(asked.get("stop", [])), asked["messages"]
        self.pieces = queue.SimpleQueue()  # texts, then None, or a BadInput
        self.asked, self.begun, self.sent, self.finish = None, None, 0, "length"
        self.dropped = False

    def read(self):
        """Its prompt and clips, once there is a place for it."""
        messages, sounds = read_messages(self.messages)
        samples = lengths(sounds, self.net.config.max_seconds)
        check_room(self.net, messages, samples, self.how)
        self.asked = self.net.prompt(messages, [load_audio(file) for _, file in sounds])

    def take(self, id):
        """As in every answer; without the spaces around it, up to a stop text, or to as far as it
        came in the time it has."""
        super().take(id)
        late = time.monotonic() - self.begun > PATIENCE["answer"]
        if late and id is not None:
            super().take(None)
        ends = [self.text.find(stop) for stop in self.stops if stop in self.text]
        held = max(map(len, self.stops), default=1) - 1  # letters that may be the start of a stop
        last = len(self.text) - (0 if id is None or late else held)
        shown = self.text[: min(ends, default=max(last, 0))].strip()
        if shown[self.sent :]:
            self.pieces.put(shown[self.sent :])
            self.sent = len(shown)
        if ends or id in self.net.ends:
            self.finish = "stop"
        if ends or late or self.dropped:
            raise Enough

    def run(self, asked):
        """In the main thread. Whatever goes wrong with one request, the next is answered."""
        self.begun, ending = time.monotonic(), None
        try:
            self.make(*asked, self.how)
        except Enough:
            pass
        except Exception as error:  # most likely memory
            fail(f"{type(error).__name__}: {error}")
            ending = Refusal(500, f"the answer could not be made ({type(error).__name__})")
        self.pieces.put(ending)

    def follow(self, connection):
        """Its pieces as they come, if it has not to wait too long and the client is there. Who has
        closed his half of the connection counts as gone: the two look the same."""
        start = time.monotonic()
        while True:
            try:
                piece = self.pieces.get(timeout=0.1)
            except queue.Empty:
                piece = ""
            if piece is None:
                return
            if isinstance(piece, BadInput):
                raise piece
            if not self.begun and time.monotonic() - start > PATIENCE["queue"]:
                raise Refusal(503, f"queue: it took more than {PATIENCE['queue']} s")
            if select.select([connection], [], [], 0)[0] and not connection.recv(1, PEEK):
                raise ConnectionResetError
            if piece:
                yield piece


class Patient(io.RawIOBase):
    """What a client sends, if all of it comes in time: a byte now and then could go on for ever."""

    def __init__(self, connection):
        self.connection, self.end = connection, time.monotonic() + PATIENCE["request"]

    def readable(self):
        return True

    def readinto(self, room):
        try:
            if (left := self.end - time.monotonic()) <= 0:
                raise TimeoutError
            self.connection.settimeout(left)
            return self.connection.recv_into(room)
        except TimeoutError:
            raise Refusal(408, f"request: not here after {PATIENCE['request']} s") from None


class Client(BaseHTTPRequestHandler):
    """One connection, and one request."""

    protocol_version, requestline, command, streaming = "HTTP/1.1", "", None, False

    def setup(self):
        super().setup()
        self.rfile = io.BufferedReader(Patient(self.connection))

    def handle(self):
        said = None
        try:
            super().handle()
        except OSError:  # he has left
            raise
        except BadInput as mistake:
            said = getattr(mistake, "status", 400), str(mistake)
        except Exception as error:  # a mistake of ours
            fail(f"{type(error).__name__}: {error}")
            said = 500, f"the request could not be read ({type(error).__name__})"
        if said:  # not before: as long as there is an exception, all that was read is kept, too
            self.refuse(*said)

    def refuse(self, status, message):
        """Then what he still sends is read to its end: closing on it would undo the reply."""
        kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}.get(status)
        error = {"message": message, "type": kind or "invalid_request_error", "code": status}
        self.send(status, {"error": {**error, "param": None}})
        self.connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(Refusal):
            while self.rfile.read1(1 << 16):
                pass

    def send(self, status, value):
        """JSON as the whole reply, or as the next event of a stream, which 200 and None begins."""
        data = value and json.dumps(value).encode()
        if self.streaming:
            self.wfile.write(b"data: %s\n\n" % data)
            return
        self.connection.settimeout(PATIENCE["write"])
        self.request_version = self.protocol_version  # a reply has its head, whatever was asked
        self.send_response(status)
        self.send_header("Connection", "close")
        if status in (429, 503):
            self.send_header("Retry-After", "2")
        self.send_header("Content-Type", "application/json" if data else "text/event-stream")
        self.end_headers()
        self.streaming = data is None
        if self.command != "HEAD":
            self.wfile.write(data or b"")

    def route(self) -> str:
        hosts, origins = (self.headers.get_all(name, []) for name in ("Host", "Origin"))
        names = ("localhost", self.connection.getsockname()[0])
        host = hosts[0] if len(hosts) == 1 else f"{len(hosts)} of them"
        mine = re.fullmatch(rf"({'|'.join(map(re.escape, names))})(:\d{{1,5}})?", host.lower())
        if not mine:
            wanted = f"{' or '.join(names)}, with or without a port"
            raise Refusal(403, f"Host: expected {wanted}, found {host:.80}")
        others = [origin for origin in origins if origin != f"http://{host}"]
        if others:
            raise Refusal(403, f"Origin: expected http://{host} or none, found {others[0]:.80}")
        command = "GET" if self.command == "HEAD" else self.command
        path = f"{command} {self.path.partition('?')[0]}"
        paths = (*PATHS, f"GET /v1/models/{quote(self.server.name)}")
        if path not in paths:
            raise Refusal(404, f"path: expected {' or '.join(paths)}, found {path:.80}")
        return path

    def do_GET(self):
        path, name, since = self.route(), self.server.name, self.server.since
        served = {"id": name, "object": "model", "owned_by": "polyaudio", "created": since}
        known = {"GET /health": {"status": "ok", "model": name},
                 "GET /v1/models": {"object": "list", "data": [served]}}  # fmt: skip
        self.send(200, known.get(path, served))

    do_HEAD = do_GET

    def do_POST(self):
        self.route()
        length, name = self.length(), self.server.name
        with self.turn(length):
            body = self.read_body(length)
            with self.server.desk:  # as objects JSON can take 25 times its room: one at a time
                request = from_body(body)
                check_request(request)
                if request["model"] != name:
                    raise Refusal(404, f"model: expected {name}, found {request['model']:.80}")
                reply = Reply(self.server.net, request, self.server.args)
                self.server.enter(reply)
        try:
            reply.read()
            self.server.waiting.put(reply)
            self.answer(reply, request)
        finally:
            self.server.leave(reply)

    def length(self) -> int:
        """Of the body, by its head."""
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not re.fullmatch("[0-9]{1,18}", length):
            raise Refusal(411, "Content-Length: expected the size of the body, found none")
        if int(length) > MOST["bytes"]:
            raise Refusal(413, f"body: expected up to {MOST['bytes']} bytes, found {length}")
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "Content-Type: expected application/json, found another")
        return int(length)

    @contextlib.contextmanager
    def turn(self, length):
        """Bodies that are not small are read a few at a time; who waits for that loses no time."""
        if length <= MOST["small"]:
            yield
            return
        if not self.server.large.acquire(timeout=PATIENCE["queue"]):
            raise Refusal(503, f"queue: it took more than {PATIENCE['queue']} s")
        try:
            self.rfile.raw.end = time.monotonic() + PATIENCE["request"]
            yield
        finally:
            self.server.large.release()

    def read_body(self, length) -> bytes:
        data = self.rfile.read(length)
        expect(len(data) == length, "body", f"{length} bytes", len(data))
        return data

    def answer(self, reply, request):
        about = {"id": f"chatcmpl-{os.urandom(12).hex()}", "created": int(time.time()),
                 "model": self.server.name, "object": "chat.completion"}  # fmt: skip
        pieces = reply.follow(self.connection)

        def chosen(finish=None, **said):
            return {**about, "choices": [{"index": 0, "finish_reason": finish, **said}]}

        def usage():
            used = {"prompt_tokens": len(reply.asked[0]), "completion_tokens": len(reply.ids)}
            return {"usage": {**used, "total_tokens": sum(used.values())}}

        if not request.get("stream"):
            message = {"role": "assistant", "content": "".join(pieces)}
            return self.send(200, {**chosen(reply.finish, message=message), **usage()})
        about["object"] += ".chunk"
        first = next(pieces, "")  # what is refused before it has a status of its own
        self.send(200, None)
        self.send(200, chosen(delta={"role": "assistant", "content": first}))
        for piece in pieces:
            self.send(200, chosen(delta={"content": piece}))
        self.send(200, chosen(reply.finish, delta={}))
        if (request.get("stream_options") or {}).get("include_usage"):
            self.send(200, {**about, "choices": [], **usage()})
        self.wfile.write(b"data: [DONE]\n\n")

    def send_error(self, code, message=None, explain=None):  # of what is no HTTP
        self.refuse(int(code), message or "request: expected HTTP, found something else")

    def log_message(self, form, *values):
        note(form % values)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address, daemon_threads, request_queue_size = True, True, 64

    def __init__(self, args):
        """Takes its port; who connects waits until there is a network, and a thread that serves."""
        try:
            super().__init__(args.serve, Client)
        except OSError as error:
            raise BadInput(f"--serve: cannot listen there ({error.strerror or error})") from None
        self.net, self.args, self.since = None, args, int(time.time())
        self.name = Path(args.weights).resolve().name
        self.waiting = queue.SimpleQueue()  # those that can be answered
        self.places, self.door = set(), threading.Lock()  # of all that wait or are being read
        self.desk = threading.Lock()  # where a body is parsed
        self.large = threading.BoundedSemaphore(MOST["waiting"])  # bodies that are not small

    def enter(self, reply):
        with self.door:
            if len(self.places) == MOST["waiting"]:
                raise Refusal(429, f"queue: {MOST['waiting']} requests wait already")
            self.places.add(reply)

    def leave(self, reply):
        """Answered or not: what it held is let go, although it may still stand in the queue."""
        reply.dropped, reply.asked = True, None
        self.places.discard(reply)

    def verify_request(self, *_):
        return threading.active_count() <= MOST["threads"]  # else the connection is closed

    def handle_error(self, *_):  # of a connection: nobody is left to be told
        pass

    def work(self):
        while reply := self.waiting.get():
            self.places.discard(reply)
            if asked := reply.asked:
                reply.run(asked)


def serve(server, net):
    """Until Ctrl-C or SIGTERM, which stop an answer half-way."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    net.repack()
    net.tokenizer.encode("")  # so that no two threads make it
    server.net = net
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("{} on http://{}:{}/v1".format(server.name, *server.server_address), flush=True)
    with server:
        try:
            server.work()
        finally:
            server.shutdown()


# ------------------------------------------------------------------------------------------------


def parse(argv=None):
    head, _, rest = __doc__.split("\n\n")  # what is between is in every script's help
    plain = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="sample.py", description=head, epilog=rest, formatter_class=plain)
    parser.add_argument(
        "--clips", nargs="+", default=[], metavar="CLIP", help="files, folders, globs, or -"
    )
    parser.add_argument("--ask", metavar="TEXT", help=f"default: {DEFAULT_QUESTION}")
    parser.add_argument("--weights", metavar="DIR", help="a base or a run; default: weights/tiny")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the text")
    parser.add_argument(
        "--concat", action="store_true", help="join the clips to one, 2 s of silence between"
    )
    parser.add_argument(
        "--vote", type=int, metavar="K", help="for short answers: ask under K orders and vote"
    )
    parser.add_argument(
        "--why", action="store_true", help="which clip, and which seconds, the answer rests on"
    )
    parser.add_argument(
        "--serve", metavar="PORT", help="answer over HTTP, on this machine; ADDRESS:PORT for others"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: always the likeliest token"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the likeliest that sum to this"
    )
    parser.add_argument("--seed", type=int, help="default: 0; of a server, another each time")
    add_weight_flags(parser)
    args = parser.parse_args(argv)
    check_flags(parser, args)
    if args.seed is None and not args.serve:
        args.seed = 0
    if args.weights is None:
        if not TINY.exists():
            parser.error(NO_WEIGHTS)
        args.weights = TINY
    return args


def check_flags(parser, args):
    """Which of them go together, and in what limits; --serve becomes (address, port)."""
    ways = [way for way in ("json", "concat", "vote", "why") if getattr(args, way)]
    asked = args.clips or args.ask is not None
    args.demo = not (asked or ways or args.serve is not None)
    if args.serve is not None and (asked or ways):
        parser.error("--serve: expected no clips and no question, they come from clients")
    if ways and not asked:
        parser.error("expected --clips, or --ask for a question without sound")
    limits = {  # flag: the least and the most
        "vote": (1, 1000), "max_new_tokens": (1, 1 << 20), "temperature": (0, 100),
        "top_p": (1e-6, 1), "seed": (0, 1 << 62),
    }  # fmt: skip
    for flag, (least, most) in limits.items():
        value = getattr(args, flag)
        if value is not None and not least <= value <= most:
            name = flag.replace("_", "-")
            parser.error(f"--{name}: expected {least} to {most}, found {value}")
    for way in ("concat", "why"):
        if getattr(args, way) and not args.clips:
            parser.error(f"--{way}: expected --clips, found none")
    if args.why and (args.vote or args.concat):
        parser.error("--why: expected neither --vote nor --concat beside it")
    if args.serve is not None:
        address = re.fullmatch(r"(?:([\w.-]+):)?(\d{1,5})", args.serve)
        if not address or int(address[2]) > 65535:
            parser.error(f"--serve: expected PORT or ADDRESS:PORT, found {args.serve}")
        args.serve = address[1] or "127.0.0.1", int(address[2])


def demo(net, args):
    """What the clips that come along are for."""
    for names, question in DEMO:
        paths = [os.path.relpath(CLIPS / f"{name}.flac") for name in names.split()]
        waves = [load_audio(path) for path in paths]
        for i, (path, wave) in enumerate(zip(paths, waves), 1):
            print(clean(f"clip {i}: {path}, {len(wave) / RATE:.2f} s"))
        print(f"> {question}")
        ask(net, question, waves, args, show=True)
        print()


def main():
    args = parse()
    paths = find_clips(args.clips)
    if args.vote:
        expect(len(paths) > 1, "--vote", "at least two clips", len(paths))
    question = DEFAULT_QUESTION if args.ask is None else args.ask
    clips = [from_input(path) for path in paths]
    asked = {"question": question, "clips": clips}
    asked = view_concat(asked) if args.concat else asked
    # No file, and no port to be had, are told before minutes of loading.
    samples = [clip_samples(clip) for clip in asked["clips"]]
    server = Server(args) if args.serve else None
    times, start = {}, time.perf_counter()
    net = load_net(args)
    times["load"] = time.perf_counter() - start
    kind = str(net.dtype).removeprefix("torch.")
    note(f"{net.config.kind} on {net.device}, {kind}, kernels {kernels.chosen()}")
    if args.serve:
        return serve(server, net)
    if args.demo:
        return demo(net, args)
    start = time.perf_counter()
    check_room(net, [{"role": "user", "content": asked["question"]}], samples, args)
    waves = [load_clip(clip) for clip in clips]
    times["audio"] = time.perf_counter() - start
    once = args.json or args.vote or args.concat or args.why or "-" in paths
    chat = args.ask is None and not once
    if chat and sys.stdin.isatty() and sys.stdout.isatty():
        if extra := net.repack():
            note(f"a second copy of the weights, {extra / 1e9:.1f} GB, laid out for decoding")
        return Chat(net, waves, args).run(question)
    more = {}
    if args.vote:
        answer, found = vote(net, question, waves, args)
        more = {"votes": found}
        if not args.json:
            print(clean(answer.text, keep="\n\t"))
    else:
        answer = ask(net, question, waves, args, show=not args.json)
    if args.why:
        reasons = why(net, answer.asked, waves, answer.ids)
        more = {"why": reasons}
        if not args.json:
            show_why(net, reasons, paths)
    if args.json:
        times |= {"prefill": answer.first - answer.start, "decode": answer.end - answer.first}
        if args.concat:
            heard = view_concat({"clips": waves})["clips"]
            paths, waves = [" + ".join(paths)], [load_clip(clip) for clip in heard]
        told = [
            {"path": path, "seconds": round(len(wave) / RATE, 3), "slots": net.n_slots(wave)}
            for path, wave in zip(paths, waves)
        ]
        seconds = {name: round(times[name], 4) for name in ("load", "audio", "prefill", "decode")}
        report = {"answer": answer.text.strip(), "clips": told, "tokens": len(answer.ids), **more}
        print(json.dumps({**report, "seconds": seconds}))


if __name__ == "__main__":
    cli(main)
