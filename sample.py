"""Ask about several sounds.

    python sample.py --clips a.wav b.wav --ask "Which clip is louder?"
    python sample.py --clips a.wav b.wav              # what is in each, and how do they differ?
    python sample.py --clips night/ --ask "Put <sound-3> into words." --json
    cat a.wav | python sample.py --clips - b.flac --ask "Same speaker in 1 and 2?" --vote 4

Clips are files, folders, globs, or - for standard input; the text may say where one belongs with
<sound-1>, <sound-2>, ...; without that they come first, in order. Without --ask, on a terminal, the
first answer is followed by a chat: /clip PATH adds a clip, every turn sees all earlier ones. The
answer goes to stdout, everything else to stderr.
"""

import glob
import io
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

# Before torch: threads that wait for work must not burn a core that somebody else could use, yet
# should not fall asleep between two layers. Spinning some 50 microseconds does both.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import kernels  # noqa: E402
from model import Cache, PolyAudio, add_weight_flags, load_net  # noqa: E402
from prepare import (  # noqa: E402
    MARKER,
    RATE,
    BadInput,
    Parser,
    clean,
    cli,
    expect,
    fail,
    load_audio,
    load_clip,
    note,
    remap_indices,
    view_concat,
    view_permute,
)

TINY = Path(__file__).parent / "weights" / "tiny"
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aif", ".aiff", ".au", ".caf", ".w64")
DEFAULT_QUESTION = "What is in each clip, and how do they differ?"

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


def hear(path: str):
    """A clip as samples, from a file or from standard input."""
    if path != "-":
        return load_audio(path)
    data = io.BytesIO(sys.stdin.buffer.read())
    data.name = "standard input"
    if not data.getbuffer().nbytes:
        raise BadInput("standard input: no bytes came")
    return load_audio(data)


# ------------------------------------------------------------------------------------------------
# One question.


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
        how = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
        self.net.generate(
            ids,
            clips,
            args.max_new_tokens,
            on_token=self.take,
            stop=self.net.ends,
            cache=cache,
            **how,
        )
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
    """k different orders of n clips, the given one first."""
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
    votes, answers = [], []
    for order in clip_orders(len(waves), args.vote, args.seed):
        answers.append(ask(net, question, waves, args, order))
        given = dict(enumerate(order, 1))  # place in this order -> the clip's own index
        text = remap_indices(answers[-1].text.strip(), given)
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
        waves = [hear(path) for path in paths]
        for path, wave in zip(paths, waves):
            expect(self.net.n_slots(wave), path, "at least 321 samples (20 ms)", len(wave))
        self.waves += waves
        for i, (path, wave) in enumerate(zip(paths, waves), len(self.waves) - len(waves) + 1):
            note(f"clip {i}: {path}, {len(wave) / RATE:.2f} s")

    def run(self, line: str):
        """From a first question until the end of input. A mistake in one line leaves the
        conversation as it was; clips that could not be read with their question are dropped."""
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
                if not line.startswith("/") and self.shown:
                    del self.waves[self.shown :]
            except KeyboardInterrupt:
                note("stopped")
                self.cache = None  # it may hold half a step
            try:
                line = input("> ").strip()
            except EOFError:
                return


# ------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = Parser(prog="sample.py", description=__doc__.split("\n")[0])
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
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: always the likeliest token"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the likeliest that sum to this"
    )
    parser.add_argument("--seed", type=int, default=0)
    add_weight_flags(parser)
    args = parser.parse_args(argv)
    if not args.clips and args.ask is None:
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
    if args.concat and not args.clips:
        parser.error("--concat: expected --clips, found none")
    if args.weights is None:
        if not TINY.exists():
            parser.error("no weights come with this version; name a folder of some: --weights DIR")
        args.weights = TINY
    return args


def main():
    args = parse()
    paths = find_clips(args.clips)
    if args.vote:
        expect(len(paths) > 1, "--vote", "at least two clips", len(paths))
    times, start = {}, time.perf_counter()
    waves = [hear(path) for path in paths]
    times["audio"], start = time.perf_counter() - start, time.perf_counter()
    net = load_net(args)
    times["load"] = time.perf_counter() - start
    kind = str(net.dtype).removeprefix("torch.")
    note(f"{net.config.kind} on {net.device}, {kind}, kernels {kernels.chosen()}")
    question = DEFAULT_QUESTION if args.ask is None else args.ask
    chat = args.ask is None and not (args.json or args.vote or args.concat or "-" in paths)
    if chat and sys.stdin.isatty() and sys.stdout.isatty():
        if extra := net.repack():
            note(f"a second copy of the weights, {extra / 1e9:.1f} GB, laid out for decoding")
        return Chat(net, waves, args).run(question)
    votes = {}
    if args.vote:
        answer, found = vote(net, question, waves, args)
        votes = {"votes": found}
        if not args.json:
            print(clean(answer.text, keep="\n\t"))
    else:
        answer = ask(net, question, waves, args, show=not args.json)
    if args.json:
        times |= {"prefill": answer.first - answer.start, "decode": answer.end - answer.first}
        if args.concat:
            heard = view_concat({"clips": waves})["clips"]
            paths, waves = [" + ".join(paths)], [load_clip(clip) for clip in heard]
        clips = [
            {"path": path, "seconds": round(len(wave) / RATE, 3), "slots": net.n_slots(wave)}
            for path, wave in zip(paths, waves)
        ]
        seconds = {name: round(times[name], 4) for name in ("load", "audio", "prefill", "decode")}
        report = {"answer": answer.text.strip(), "clips": clips, "tokens": len(answer.ids), **votes}
        print(json.dumps({**report, "seconds": seconds}))


if __name__ == "__main__":
    cli(main)
