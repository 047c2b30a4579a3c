"""Train: a small model from nothing, or a base that knows one clip into one that compares several.

    python train.py                                         the small one, on up to 8 cores
    python train.py --resume                                after a stop, in whichever phase
    python train.py --from-phase join                       that phase and what follows, again
    python train.py --ablate                                what each of its parts is for
    python train.py --recipe polyaudio --data data/mine/train.jsonl                 on one GPU
    torchrun --nproc-per-node 8 train.py --recipe polyaudio --data ...              on eight
    python train.py --recipe polyaudio --data ... --dry-run               what it would take
    python train.py --recipe mallm --base weights/qwen2-audio             pairs, as MALLM did
    python train.py --merge runs/polyaudio --out weights/polyaudio      one plain checkpoint

A step reads `batch` examples, whatever the number of ranks: they go into packs of about `tokens`
tokens, the packs go to the ranks so that all have as much to do, and the summed gradients meet in
one all-reduce. So the same seed gives the same steps on one GPU and on eight.

The ideas, in order: recipes and the small model's phases; examples as tokens, of which only the
answers are learned; clips, kept; what is trained; ranks; lessons, what a phase teaches; the plan,
which packs; optimizers; checkpoints; one step; the log; the loop; a model from nothing; its phases,
one after another, and the ablations; what a run would take; one plain checkpoint.
"""

import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from uuid import uuid4

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the core to others

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import kernels  # noqa: E402
from model import (  # noqa: E402
    ENCODER_FRAMES, Config, PolyAudio, answer_all, find_device, weights_hash, write_tensors,
)  # fmt: skip
from prepare import (  # noqa: E402
    ONE_ROW_VIEWS, RATE, VIEWS, BadInput, Parser, Tokenizer, as_corpus, as_example, check_fits,
    clean, cli, clip_order, clip_samples, conversation, cores, each_alone, expect, git_hash, hold,
    load_clip, n_slots, open_tensors, progress, read_json, read_rows, read_values, reordered,
    score, to_ask, train_bpe, view_as_text, view_captioned, view_text_only, warn, write_json,
    written,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Recipes. Every field is a flag of the same name.


def flag(default, says):
    return field(default=default, metadata={"says": says})


@dataclass(frozen=True)
class Recipe:
    base: str = flag("weights/af3", 'weights to start from; "" for a small model from nothing')
    data: str = flag("data/toy/train.jsonl", "rows to learn from")
    dev: str = flag("", 'rows that are asked on the way; "" for none')
    corpus: str = flag("data/toy/world/corpus.jsonl", "clips by themselves, where those teach")
    out: str = flag("runs/polyaudio", "folder of the run")
    seed: int = flag(0, "of all that is drawn")
    teach: str = flag("answers", "or names of what sounds, or meanings of slots")
    text: float = flag(0.0, "share of examples whose clips are written out, not heard")
    bare: float = flag(0.0, "of those, the share whose answers alone tell of the clips, unlearned")
    view: str = flag("", "another form of what is heard, one that prepare.py names")
    most: int = flag(5, "clips of an example; those of more are passed over")
    tasks: str = flag("", 'how often each task, skill or kind is drawn: "odd 2, single 0.5"')
    cache: str = flag("", 'folder for what is worked out of a clip once; "" for none')
    gate: float = flag(0.0, "what the last look at the dev set must reach")
    trains: str = flag("", "without adapters: beginnings of what is trained; else all of it")
    lora: str = flag("decoder", 'where adapters go, or all (but the audio encoder); "": none')
    rank: int = flag(16, "of an adapter")
    alpha: int = flag(32, "an adapter counts alpha / rank")
    batch: int = flag(128, "examples of a step, on all ranks together")
    tokens: int = flag(16384, "of a pack, at most")
    epochs: float = flag(1.0, "how often each example is read")
    steps: int = flag(0, "instead of epochs")
    lr: float = flag(1e-5, "learning rate")
    muon: float = flag(0.0, "that of matrices that are no adapters, by Muon; 0: as the rest")
    warmup: float = flag(0.05, "share of the steps")
    hold: float = flag(0.0, "share of the steps, warm-up included, before it falls as a cosine")
    floor: float = flag(0.0, "share of the rate to which it falls")
    clip: float = flag(1.0, "gradient norm, at most")
    weight: float = flag(1.0, "of an answer's verdict beside what leads to it")
    recompute: int = flag(1, "1: keep a layer's input and compute the rest again; 0: keep it all")
    workers: int = flag(4, "threads that decode ahead")
    every: int = flag(100, "steps between two lines of the log and checkpoints")
    looks: int = flag(1, "every so many of those, and at the end, the dev set is asked")
    look: int = flag(210, "examples of a look")
    dtype: str = flag("auto", "f32 or bf16; auto: bf16 on a GPU, f32 elsewhere")


RECIPES = {
    "tiny": Recipe(base="", dev="data/toy/bench-dev.jsonl", out="runs/tiny", lora="", lr=3e-3,
                   cache="data/toy/cache", muon=0.02, hold=0.2, floor=0.02, batch=32, tokens=4096,
                   recompute=0, workers=1, looks=10, dtype="bf16"),  # its phases stand below
    "polyaudio": Recipe(),  # the paper's section 4.1; it leaves rank and number of steps open
    "mallm": Recipe(base="weights/qwen2-audio", data="data/mallm/train.jsonl", out="runs/mallm",
                    lora="all", lr=5e-5, batch=16, epochs=5),
}  # fmt: skip
LANGUAGE, JOINT = "language_model, lm_head", "multi_modal_projector"
LAST = "audio_tower.layers.3, audio_tower.layer_norm"  # of the encoder's four
WEIGHED = ("single 0.5, order 0.5, keyword 0.7, quality 0.8, needle 1.4, comparison 1.4, "
           "contrast 1.4, link 1.3, temporal 1.3")  # what is learned soon is drawn less often
# What the small model learns, one after another, each phase from what the one before it left. The
# gate at its end stops nothing; it tells what fell short, before what comes next is built on that.
PHASES = {
    "hear": {"teach": "names", "trains": "audio_tower", "steps": 1500, "gate": 0.6},
    "read": {"text": 1.0, "bare": 0.75, "trains": LANGUAGE, "tasks": "single 0.3", "steps": 1700,
             "batch": 64, "weight": 3.0, "muon": 0.01, "lr": 2e-3, "gate": 0.9},
    "join": {"teach": "meanings", "trains": f"{JOINT}, {LAST}", "steps": 700, "gate": 0.8},
    "answer": {"text": 0.35, "bare": 0.75, "trains": f"{LANGUAGE}, {JOINT}", "tasks": WEIGHED,
               "steps": 1500, "weight": 2.0, "muon": 0.007, "lr": 1.5e-3, "gate": 0.6},
}  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Examples. A row of the file becomes ids, clips, and for each id what learning it counts: nothing
# for the prompt, 1 for what an answer says, `weight` for its verdict.


def open_rows(path):
    try:
        file = open(path, "rb")
    except OSError as error:
        flags = " --train 0 --split dev" if "-dev" in str(path) else ""
        hint = f"; python synth.py{flags} makes it" if "toy" in str(path) else ""
        raise BadInput(f"{path}: cannot be read ({error.strerror}){hint}") from None
    expect(Path(path).is_file(), path, "a file of rows", "something else")
    return file


def headline(line) -> tuple:
    """What a plan has to know of a row before it is read: its kind, task and skill; how many clips
    it has; whether it is for training; whose they are. A bad row is told when it is read."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    row = row if isinstance(row, dict) else {}
    meta, clips, licences = (row.get(name) for name in ("meta", "clips", "licences"))
    kind = meta.get("kind") if isinstance(meta, dict) else None
    told = (kind, row.get("task"), row.get("skill"))
    told = tuple(name if isinstance(name, str) else "" for name in told)
    licences = licences if isinstance(licences, list) else [row.get("licence")]
    licences = [name for name in licences if isinstance(name, str)]
    count = len(clips) if isinstance(clips, list) else 1
    return told, count, row.get("split", "train") == "train", licences


class Rows:
    """The rows of a file by number: kept is where each begins, and its headline. A JSON array has
    no lines to count; its rows are kept as text."""

    def __init__(self, path, read=as_example):
        self.path, self.read, self.array = path, read, None
        self.bad = set()  # what was wrong with some of them
        self.file = open_rows(path)
        if self.file.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            self.array = [json.dumps(row).encode() for _, row in read_values(path, warn)]
        self.file.seek(0)
        starts, place, number, licences, self.hash = [], 0, {}, set(), 0
        task, clips, training = [], [], []
        for line in self.file if self.array is None else self.array:
            self.hash = zlib.crc32(line, self.hash)
            if line.strip():
                told, count, trains, whose = headline(line)
                starts.append(place)
                task.append(number.setdefault(told, len(number)))
                clips.append(count)
                training.append(trains)
                licences.update(whose)
            place += len(line)
        expect(starts, path, "at least one row", "none")
        self.starts = np.array([*starts, place], np.int64)
        self.tasks, self.task = list(number), np.array(task)  # and of each row which of them
        self.clips, self.training = np.array(clips), np.array(training)
        self.licences = sorted(licences)

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, number) -> dict:
        start, end = map(int, self.starts[number : number + 2])
        where = f"{self.path}: row {number + 1}"
        try:
            line = os.pread(self.file.fileno(), end - start, start)
            row = json.loads(line if self.array is None else self.array[number])
            expect(isinstance(row, dict), "row", "an object", f"{row!r:.60}")
            return self.read(row, f"{Path(self.path).stem}-{number + 1}", Path(self.path).parent)
        except (ValueError, RecursionError, BadInput) as mistake:
            raise BadInput(f"{where}: {mistake}") from None

    def whole(self, numbers):
        """Those of these rows that can be read."""
        for number in numbers:
            try:
                yield self[number]
            except BadInput as mistake:
                self.skip(mistake)

    def skip(self, mistake, quiet=False):
        """A bad row is named and left out."""
        self.bad.add(str(mistake))
        if not quiet:
            warn(f"left out: {mistake}")
        self.check_bad(f", the last {mistake}")

    def check_bad(self, last=""):
        """More than one in a hundred are no accident."""
        few = len(self.bad) <= max(1, len(self) / 100) and len(self.bad) < len(self)
        many = f"{len(self.bad)} of {len(self)}{last}"
        expect(few, self.path, "at most 1 % of bad rows", many)


@dataclass
class Example:
    id: str
    task: str
    ids: list[int]
    clips: list  # as the row names them; later their samples, or what was kept of them
    learned: list[float]
    row: dict = None  # of a corpus, where labels are learned
    chance: list = ()  # numbers from 0 to 1, drawn for it alone


def lay_out(row, net, root, weight, lead=1.0) -> Example:
    """Tokens and clips of a row, in the order in which the text names them. lead: how much of an
    answer counts what leads to its verdict."""
    messages = conversation(row)
    samples = [clip_samples(clip, root) for clip in row["clips"]]
    slots = list(map(net.n_slots, samples))
    for clip, n, count in zip(row["clips"], samples, slots):
        expect(count, f"clip {clip}", "at least 321 samples", n)
    ids, learned = [], []
    layout = row.get("layout", net.layout)
    for piece, answer in net.tokenizer.prompt_pieces(messages, slots, layout):
        counts = [0.0] * len(piece)
        if answer:
            counts = verdict_weights(net.tokenizer, piece, weight, lead)
        ids += piece
        learned += counts
    while learned and not learned[-1] and ids[-1] != net.config.audio_token:
        ids.pop()  # what follows the last answer is not read by anybody
        learned.pop()
    check_fits(len(ids), slots, net.config.decoder.context)
    expect(any(learned), "messages", "an answer to learn", "none")
    order = [i - 1 for i in clip_order(messages, len(slots))]
    return Example(row["id"], row["task"], ids, [row["clips"][i] for i in order], learned)


JUDGED = r"(?is)(.*\banswer\b[^:]*:)(.*)"  # what leads to a verdict, and the verdict


def verdict_weights(tokenizer, piece, weight, lead=1.0) -> list[float]:
    """Of "audio 1: a; audio 2: b. That is: a. So the answer is: audio 1." the first sentence is
    what is heard and the last one leads to the verdict; the reason between them, the verdict, and
    the token that ends the turn weigh more. An answer that says no "answer" weighs 1."""
    found = re.fullmatch(JUDGED, tokenizer.decode(piece))
    if not found:
        return [1.0] * len(piece)
    *before, leads = re.split(r"(?<=\.)(?= )", found[1])
    parts = [(part, weight if i else lead) for i, part in enumerate(before)] + [(leads, lead)]
    counts = [count for part, count in parts for _ in tokenizer.encode(part)]
    return list(map(float, counts + [weight] * (len(piece) - len(counts))))


# ------------------------------------------------------------------------------------------------
# Clips, decoded. What does not change while a run lasts is worked out once and kept, if there is a
# folder for it: the mels, and where nobody trains the encoder, its rows.


class Sounds:
    def __init__(self, net, root, cache, frozen):
        self.net, self.root, self.kind = net, root, "rows" if frozen else "mels"
        self.folder = None
        if cache and net.config.encoder:
            weights = net.audio_tower.state_dict() if frozen else {}
            self.folder = Path(cache) / f"{self.kind}-{digest(net.config.raw, weights)}"

    def __call__(self, clip):
        folder = self.folder
        if not folder:
            return self.wave(clip)
        path = folder / f"{self.name(clip)}.safetensors"
        kept = self.kept(path)
        if kept is None:
            kept = self.work_out(self.wave(clip))
            self.keep(path, kept)
        if self.kind == "rows":
            return kept["rows"]
        return [(kept[f"mel.{i}"], int(n)) for i, n in enumerate(kept["frames"])]

    def wave(self, clip) -> np.ndarray:
        """As long as its header says, by which the plan is made: an mp3 may give a little less."""
        wave, wanted = load_clip(clip, self.root), clip_samples(clip, self.root)
        return np.pad(wave, (0, max(0, wanted - len(wave))))

    def kept(self, path) -> dict | None:
        try:
            with open_tensors(path) as file:
                return {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, BadInput):  # not there, or not whole
            return None

    def keep(self, path, tensors):
        """Another thread or rank may be at the same clip: each writes a file of its own. Where
        there is no room the run goes on without."""
        mine = path.with_suffix(f".{uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(mine, tensors)
            mine.replace(path)
        except (OSError, BadInput) as mistake:
            warn(f"{path.parent}: nothing more is kept there ({mistake})")
            self.folder = None

    @torch.no_grad()
    def work_out(self, wave) -> dict:
        if self.kind == "rows":
            kind = torch.bfloat16 if self.net.dtype == torch.bfloat16 else torch.float16
            return {"rows": self.net.listen([wave])[0].to("cpu", kind).contiguous()}
        windows = self.net.windows([wave])[0]
        mels = {f"mel.{i}": mel.half().contiguous() for i, (mel, _) in enumerate(windows)}
        return {**mels, "frames": torch.tensor([frames for _, frames in windows])}

    def name(self, clip) -> str:
        """Of what is kept: another file of the same name is another clip."""
        paths = clip["join"] if isinstance(clip, dict) and "join" in clip else [clip]
        files = [self.root / (path["path"] if isinstance(path, dict) else path) for path in paths]
        try:
            found = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        except OSError as error:
            raise BadInput(f"{clip}: cannot be read ({error.strerror})") from None
        return digest([clip, found], {})


def digest(value, tensors) -> str:
    made = hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        made.update(name.encode())
        made.update(tensor.detach().to("cpu", torch.float32).numpy().tobytes())
    return made.hexdigest()


# ------------------------------------------------------------------------------------------------
# What is trained: adapters on a base, or all of it.

EVERYTHING = (  # all linears but the encoder's and the head
    r"(?!.*audio_tower).*\.((q|k|v|o|out|gate|up|down)_proj|fc\d|linear(_\d)?)"
)
TARGETS = {"decoder": None, "all": EVERYTHING}  # None: as model.py says


def make_trainable(net, recipe) -> list:
    """-> (name, parameter) of all that is trained, in the order of the network."""
    if net.config.encoder:
        net.layout = "polyaudio"  # the clip's index beside it, between BOA and EOA
    if recipe.lora:
        torch.manual_seed(recipe.seed)  # the same adapters on every rank
        rows = net.tokenizer.boundaries if net.config.encoder else ()
        expect(rows is not None, f"{net.dir}: tokenizer", "BOA and EOA", "neither")
        net.add_lora(recipe.rank, recipe.alpha, TARGETS[recipe.lora], rows=rows)
    else:
        starts, names = tuple(map(str.strip, recipe.trains.split(","))), list(net.state_dict())
        for start in starts:
            fine = any(name.startswith(start) for name in names)
            expect(fine, "--trains", "beginnings of a parameter's name, as lm_head", repr(start))
        for name, p in net.named_parameters():
            p.requires_grad_(name.startswith(starts) and not name.endswith("positions.weight"))
    net.language_model.recompute = bool(recipe.recompute)
    return [(name, p) for name, p in net.named_parameters() if p.requires_grad]


def is_frozen(named) -> bool:
    """Whether nobody trains the encoder."""
    return not any(name.startswith("audio_tower") for name, _ in named)


# ------------------------------------------------------------------------------------------------
# Ranks: who else is at it. One process alone is a world of one.


@dataclass
class Ranks:
    rank: int = 0
    count: int = 1

    def sum(self, flat):
        """Add up what all ranks have, in place."""
        if self.count > 1:
            self.together(dist.all_reduce, flat)
        return flat

    def gather(self, value) -> list:
        """Everybody's value, in the order of the ranks."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        self.together(dist.all_gather_object, values, value)
        return values

    def together(self, act, *given):
        try:
            act(*given)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise BadInput(f"rank {self.rank}: another rank is gone ({reason})") from None


def join_ranks(device) -> Ranks:
    """As torchrun set it up: NCCL between GPUs, gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Ranks()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size())


# ------------------------------------------------------------------------------------------------
# Lessons. Each has its rows, makes an example of one, knows how far off the network is on some of
# them, and how well it does on the dev set.


class Answers:
    """What a row asks is answered as it answers."""

    def __init__(self, net, recipe):
        self.net, self.recipe = net, recipe
        self.rows, self.root = Rows(recipe.data), Path(recipe.data).parent
        self.wanted = self.rows.clips <= recipe.most
        self.looks = bool(recipe.dev)
        self.named = make_trainable(net, recipe)
        self.sounds = Sounds(net, self.root, recipe.cache, is_frozen(self.named))

    def lay_out(self, row, dice) -> Example | None:
        if len(row["clips"]) > self.recipe.most:  # of rows in others' forms that is known only now
            return None
        written, bare = dice.random() < self.recipe.text, dice.random() < self.recipe.bare
        if written and bare and re.fullmatch(JUDGED, conversation(row)[-1]["content"]):
            return lay_out(view_text_only(row), self.net, self.root, self.recipe.weight, 0.0)
        return lay_out(self.seen(row, written), self.net, self.root, self.recipe.weight)

    def seen(self, row, as_text) -> dict:
        if as_text:
            return view_as_text(row)
        return VIEWS[self.recipe.view](row) if self.recipe.view else row

    def loss(self, examples):
        """-> summed over what is learned, and the sum of the weights."""
        return self.net.loss([(e.ids, e.clips, e.learned) for e in examples])

    def look(self, ranks, change=None) -> dict:
        """Scores on the first examples of the dev set, by task; each rank asks its share. change:
        of a row, before it is asked."""
        rows = (r for r in read_rows(self.recipe.dev, warn) if "gold" in r)
        rows = list(islice(rows, self.recipe.look))[ranks.rank :: ranks.count]
        rows = [change(row) for row in rows] if change else rows
        seen = [self.seen(row, self.recipe.text == 1) for row in rows]
        found = []
        for row, answer in zip(rows, self.ask(seen)):
            found.append((row["task"], answer and score(row["gold"], answer) or 0.0))
        tasks = {}
        for task, right in sum(ranks.gather(found), []):
            tasks.setdefault(task, []).append(right)
        return {task: sum(scores) / len(scores) for task, scores in sorted(tasks.items())}

    def ask(self, rows) -> list[str | None]:
        """The answer to each row; None where it cannot be asked."""
        root, said = Path(self.recipe.dev).parent, [None] * len(rows)
        for i, answer in answer_all(self.net, to_ask(enumerate(rows), root), max_new_tokens=200):
            said[i] = None if isinstance(answer, BadInput) else answer
        return said


SLOT = 0.04  # seconds
NUMBERS = {  # that a clip as a whole has: (least, greatest, whether by their logarithms)
    ("music", "tempo"): (66, 190, True), ("music", "energy"): (0, 1, False),
    ("voice", "f0"): (85, 260, True), ("voice", "tract"): (13, 19, False),
    ("quality", "strength"): (0, 20, False),
}  # fmt: skip


TIMES = ("once", "twice", "three times", "four times", "five times")


def labels_of(row):
    """(kind, name, from, to) of all that sounds in a clip of the toy world, and of each sound where
    it begins and ends and how often it comes."""
    events, words = row.get("events", ()), row.get("words", ())
    often = Counter(label for label, _, _ in events)
    for label, on, off in events:
        yield "event", label, on, off
        yield "onset", label, on, on + SLOT
        yield "times", TIMES[min(often[label], len(TIMES)) - 1], on, off
    for _, on, off in (*events, *words):
        yield "edge", "from", on, on + SLOT
        yield "edge", "to", off - SLOT, off
    for kind, spans in (("word", words), ("phone", row.get("phones", ()))):
        for name, on, off in spans:
            yield kind, name, on, off
    whole = (0, row["duration"])
    for kind in ("instrument", "mode", "dynamics"):
        if kind in row.get("music", {}):
            yield kind, row["music"][kind], *whole
    for kind, name in (
        ("emotion", row.get("emotion")),
        ("speaker", row.get("speaker")),
        ("quality", row.get("quality", {}).get("label")),
    ):
        if name:
            yield kind, name, *whole


def numbers_of(row) -> list[float]:
    """Each of NUMBERS in 0..1, NaN where the clip has none."""
    found = []
    for (kind, part), (low, high, logarithm) in NUMBERS.items():
        value = row.get(kind, {}).get(part)
        noisy = row.get("quality", {}).get("label") in ("noise", "background")
        if value is None or (logarithm and value <= 0) or (kind == "quality" and not noisy):
            found.append(math.nan)
            continue
        low, high, value = (math.log(x) if logarithm else x for x in (low, high, value))
        found.append(min(1.0, max(0.0, (value - low) / (high - low))))
    return found


class Labels:
    """Rows of a corpus, of which it is known what sounds when."""

    def __init__(self, net, recipe):
        self.net, self.recipe, self.root = net, recipe, Path(recipe.corpus).parent
        self.rows = Rows(recipe.corpus, lambda row, name, root: as_corpus(row, root))
        self.wanted, self.looks = self.rows.training, True
        self.named = make_trainable(net, recipe)
        self.sounds = Sounds(net, self.root, recipe.cache, is_frozen(self.named))
        rows = list(self.rows.whole(range(len(self.rows))))
        found = {(kind, name) for row in rows if row["split"] == "train"
                 for kind, name, _, _ in labels_of(row)}  # fmt: skip
        self.names = sorted(found)
        self.place = {name: i for i, name in enumerate(self.names)}
        expect(self.names, recipe.corpus, "clips to train on, and what sounds in them", "none")
        self.dev = [row for row in rows if row["split"] == "dev"][: recipe.look]
        self.longest = max(row["duration"] for row in rows)

    def lay_out(self, row, dice=None) -> Example:
        slots = n_slots(clip_samples(row["path"], self.root), self.net.config.max_seconds)
        expect(slots, row["path"], "at least 321 samples", "fewer")
        ids, chance = [self.net.config.audio_token] * slots, dice.random(4) if dice else ()
        return Example(row["id"], self.recipe.teach, ids, [row["path"]], [1.0] * slots, row, chance)

    def hot(self, examples) -> torch.Tensor:
        """(Q, names), 1 where a name is heard."""
        hot = torch.zeros(sum(len(e.ids) for e in examples), len(self.names))
        start = 0
        for example in examples:
            slots = len(example.ids)
            for kind, name, on, off in labels_of(example.row):
                if (kind, name) in self.place:
                    first = min(int(on / SLOT), slots - 1)
                    last = max(first + 1, min(slots, math.ceil(off / SLOT)))
                    hot[start + first : start + last, self.place[kind, name]] = 1
            start += slots
        return hot

    def look(self, ranks) -> dict:
        """How well each kind of names is told, by `told` of a few examples at a time."""
        found = {}
        for start in range(ranks.rank * 32, len(self.dev), ranks.count * 32):
            laid_out = [self.lay_out(row) for row in self.dev[start : start + 32]]
            examples = [replace(e, clips=[self.sounds(e.clips[0])]) for e in laid_out]
            for kind, counts in self.told(examples).items():
                found[kind] = found.get(kind, 0) + counts
        sums = {}
        for part in ranks.gather(found):
            for kind, counts in part.items():
                sums[kind] = sums.get(kind, 0) + counts
        return {kind: (right / all).item() for kind, (right, all) in sorted(sums.items()) if all}


def roughened(mel, loud, cut, low, wide):
    """As loud as chance has it, and half the time a few bands of the mel blotted out."""
    mel = mel.float() + 0.2 * (loud - 0.5)
    if cut < 0.5:
        low, wide = int(low * 118), 2 + int(wide * 9)
        mel[low : low + wide] = mel.mean()
    return mel


class Names(Labels):
    """The encoder's rows are to say what sounds: each name by a head of its own, and the numbers
    by the mean over the clip. The heads are a training aid; they do not go along."""

    def __init__(self, net, recipe):
        super().__init__(net, recipe)
        heard = not is_frozen(self.named)
        expect(heard, "--trains", "the audio_tower, which is to learn names", recipe.trains)
        torch.manual_seed(recipe.seed)
        width = net.config.encoder.width
        self.heads = nn.ModuleDict(
            {"name": nn.Linear(width, len(self.names)), "number": nn.Linear(width, len(NUMBERS))}
        ).to(net.device)
        self.named += [(f"heads.{name}", p) for name, p in self.heads.named_parameters()]

    def loss(self, examples):
        clips = []
        for example in examples:
            (clip,) = example.clips
            windows = clip if isinstance(clip, list) else self.net.windows([clip])[0]
            clips.append([(roughened(mel, *example.chance), frames) for mel, frames in windows])
        rows = [x.float() for x in self.net.listen(clips)]
        hot = self.hot(examples).to(self.net.device)
        names = self.heads["name"](torch.cat(rows)).float()
        weight = torch.full((), 4.0, device=hot.device)  # most names are silent most of the time
        off = F.binary_cross_entropy_with_logits(names, hot, pos_weight=weight, reduction="sum")
        numbers = torch.tensor([numbers_of(e.row) for e in examples], device=hot.device)
        told = self.heads["number"](torch.stack([x.mean(0) for x in rows])).float().sigmoid()
        wrong = torch.where(numbers.isnan(), 0.0, told - numbers.nan_to_num()).square().sum(1)
        known = (~numbers.isnan()).sum(1).clamp(min=1)
        slots = torch.tensor([len(e.ids) for e in examples], device=hot.device)
        return off + 40 * (slots * wrong / known).sum(), len(hot)  # 40 names' worth in each slot

    def told(self, examples) -> dict:
        """Twice what is rightly told, and what is told plus what is there: their ratio is F1."""
        rows = torch.cat(self.net.listen([e.clips[0] for e in examples]))
        hot, told = self.hot(examples).to(rows.device), self.heads["name"](rows.float()) > 0
        both = torch.stack([2 * (told * hot).sum(0), told.sum(0) + hot.sum(0)]).cpu()
        kinds = {kind for kind, _ in self.names} - {"speaker"}  # on dev others speak
        where = {k: [i for i, (kind, _) in enumerate(self.names) if kind == k] for k in kinds}
        return {kind: both[:, places].sum(1) for kind, places in where.items()}


class Meanings(Labels):
    """The projector is to make of each row the embeddings of what sounds there and of the time, as
    if they were written: the decoder, which can read, then has less to learn anew. A sum that is
    nearly right may still mean another word; so the right word must be the nearest, and event.
    What has no name is kept small: the more there is in a sum, the less of it is the word."""

    UNSAID = ("phone", "speaker")  # no word says which; a voice is a direction of its own
    APART = ("word", "event")

    def __init__(self, net, recipe):
        super().__init__(net, recipe)
        table = net.language_model.embed_tokens.weight.detach().cpu()

        def meaning(text):
            return table[net.tokenizer.encode(text)].sum(0)

        def moment(seconds):  # a sum has no order: each digit is turned by its place
            places = enumerate(reversed(seconds.replace(".", "")))
            return sum(meaning(digit).roll(place * len(table[0]) // 4) for place, digit in places)

        torch.manual_seed(recipe.seed)
        drawn = torch.randn(len(self.names) + len(NUMBERS), table.shape[1]) * table.std()
        said = [meaning(f" {name}") if kind not in self.UNSAID else (kind == "speaker") * drawn[i]
                for i, (kind, name) in enumerate(self.names)]  # fmt: skip
        self.said, self.numbers = torch.stack(said), drawn[len(self.names) :] / 2  # (names, D)
        moments = range(math.ceil(self.longest / SLOT) + 1)
        self.times = torch.stack([moment(f"{i * SLOT:.1f}") / 2 for i in moments])  # (Q, D)

    def beside(self, examples):
        """What has no name: of each slot the time, of each clip its numbers, (Q, D)."""
        parts = []
        for e in examples:
            numbers = torch.tensor(numbers_of(e.row)).nan_to_num(0.5) * 2 - 1
            parts.append(self.times[: len(e.ids)] + numbers @ self.numbers)
        return torch.cat(parts)

    def project(self, examples):
        """-> what the projector makes of their rows, and what it should, (Q, D)."""
        clips = [[(mel.float(), frames) for mel, frames in clip] if isinstance(clip, list) else clip
                 for e in examples for clip in e.clips]  # fmt: skip
        x, _ = self.net.multi_modal_projector(torch.cat(self.net.listen(clips)), [])
        return x.float().cpu(), self.hot(examples) @ self.said + self.beside(examples)

    def nearest(self, x, examples):
        """Of each kind, where one name alone is heard: how near each is, (n, names), and which it
        is, (n)."""
        x, hot = x - self.beside(examples), self.hot(examples)
        for kind in self.APART:
            places = [i for i, (k, _) in enumerate(self.names) if k == kind]
            if not places:
                continue
            alone, names = hot[:, places].sum(1) == 1, self.said[places]
            near = x[alone] @ (names / names.square().sum(1, keepdim=True)).T  # 1 where it is that
            yield kind, near, hot[alone][:, places].argmax(1)

    def loss(self, examples):
        x, meant = self.project(examples)
        off = (x - meant).square().sum() / self.said.shape[1]
        for _, near, right in self.nearest(x, examples):
            off = off + F.cross_entropy(10 * near, right, reduction="sum")
        return off, len(x)

    def told(self, examples) -> dict:
        """How often the nearest name is the right one."""
        x, _ = self.project(examples)
        return {kind: torch.tensor([(near.argmax(1) == right).sum(), len(right)])
                for kind, near, right in self.nearest(x, examples)}  # fmt: skip


LESSONS = {"answers": Answers, "names": Names, "meanings": Meanings}


def macro(tasks) -> float:
    return sum(tasks.values()) / max(1, len(tasks))


# ------------------------------------------------------------------------------------------------
# The plan: which examples a step reads, and which rank which of them. It depends on (seed, epoch)
# alone. Out of a buffer of examples come packs of at most `tokens` tokens and `batch` examples:
# each begins with the example that has waited longest and takes the longest that still fits, until
# none does. An epoch is over when the buffer is empty; only then the next one is read.

BUFFER = 512  # examples


def how_often(recipe, rows) -> np.ndarray | None:
    """Of each row, how often an epoch draws it: as its kind says, or else its task or its skill."""
    if not recipe.tasks:
        return None
    wanted, known = {}, dict.fromkeys(name for told in rows.tasks for name in told if name)
    for part in filter(None, map(str.strip, recipe.tasks.split(","))):
        task, _, times = part.rpartition(" ")
        fine = task in known and re.fullmatch(r"\d+(\.\d+)?", times)
        expect(fine, "--tasks", f"a name and a number, of {', '.join(known)}", repr(part))
        wanted[task] = float(times)
    times = [next((wanted[name] for name in told if name in wanted), 1.0) for told in rows.tasks]
    return np.array(times)[rows.task]


class Plan:
    """Steps, one after another. `place` says where it is: another run can go on from there."""

    def __init__(self, recipe, lesson, place=None, quiet=False):
        self.recipe, self.lesson, self.quiet = recipe, lesson, quiet
        self.rows, self.drawn = lesson.rows, how_often(recipe, lesson.rows)
        self.epoch, self.taken, self.over = 0, 0, 0
        self.order = self.shuffled()
        self.waiting = {}  # place in that order -> its example, longest-waiting first
        if place:
            self.epoch, self.taken, self.over = (place[k] for k in ("epoch", "taken", "over"))
            self.order = self.shuffled()
            laid_out = ((i, self.lay_out(i)) for i in place["waiting"])
            self.waiting = {i: example for i, example in laid_out if example}

    @property
    def place(self) -> dict:
        waiting = list(self.waiting)
        return {"epoch": self.epoch, "taken": self.taken, "over": self.over, "waiting": waiting}

    @property
    def examples(self) -> int:
        """Of all epochs, if no row is bad."""
        epochs = range(math.ceil(self.recipe.epochs))
        return sum(len(self.shuffled(epoch)) for epoch in epochs)

    def shuffled(self, epoch=None):
        """The rows of an epoch in its order; of the last one perhaps a part."""
        epoch = self.epoch if epoch is None else epoch
        dice = np.random.default_rng((self.recipe.seed, epoch))
        numbers = np.arange(len(self.rows))
        if self.drawn is not None:
            times = np.floor(self.drawn + dice.random(len(numbers))).astype(int)
            numbers = numbers.repeat(times)
        order = dice.permutation(numbers)
        order = order[self.lesson.wanted[order]]
        share = 1 if self.recipe.steps else min(1, self.recipe.epochs - epoch)
        return order[: max(0, round(share * len(order)))]

    def fill(self):
        idle = 0  # rows in a row of which nothing came
        while len(self.waiting) < BUFFER and len(self.order) and idle <= len(self.rows):
            if self.taken == len(self.order):
                if self.waiting:
                    return
                self.epoch, self.taken = self.epoch + 1, 0
                self.order = self.shuffled()
                continue
            place = self.taken
            self.taken += 1
            if example := self.lay_out(place):
                self.waiting[place] = example
            idle = 0 if example else idle + 1

    def lay_out(self, place) -> Example | None:
        number, name = self.order[place], ""
        try:
            row = self.rows[number]
            name = f"{self.rows.path}: row {number + 1} ({row['id']}): "
            dice = np.random.default_rng((self.recipe.seed, self.epoch, place))
            example = self.lesson.lay_out(row, dice)
            long = example and len(example.ids) > self.recipe.tokens
            found = f"one of {len(example.ids)}" if long else ""
            expect(not long, "--tokens", "room for the longest example", found)
            return example
        except BadInput as mistake:
            self.rows.skip(f"{name}{mistake}", self.quiet)

    def pack(self) -> list[Example]:
        """The next pack; empty at the end."""
        self.fill()
        room, taken = self.recipe.tokens, []
        oldest = next(iter(self.waiting), None)  # else the shortest would wait for ever
        first = sorted(self.waiting.items(), key=lambda it: (it[0] != oldest, -len(it[1].ids)))
        for place, example in first:
            if len(example.ids) <= room and len(taken) < self.recipe.batch:
                taken.append(self.waiting.pop(place))
                room -= len(example.ids)
        return taken

    def step(self) -> list[list[Example]]:
        """As many packs as it takes to hold `batch` examples; what they are over counts for the
        next step. Empty at the end."""
        packs, count = [], self.over
        while count < self.recipe.batch and (pack := self.pack()):
            packs.append(pack)
            count += len(pack)
        self.over = count - self.recipe.batch
        return packs


EVEN = 1.05  # what the busiest rank may have to do, by the mean


def length(pack) -> int:
    return sum(len(e.ids) for e in pack)


def shared(packs, ranks, tokens) -> list[list]:
    """A step's packs by rank. Where whole ones cannot be shared evenly, as nine by eight, their
    examples are, and every rank packs its own."""
    parts = dealt(packs, ranks, length)
    loads = [sum(map(length, part)) for part in parts]
    if max(loads) * ranks <= EVEN * sum(loads):
        return parts
    examples = [e for pack in packs for e in pack]
    return [packed(part, tokens) for part in dealt(examples, ranks, lambda e: len(e.ids))]


def dealt(things, ranks, cost) -> list[list]:
    """The largest first, each to whoever has least so far."""
    loads, parts = [0] * ranks, [[] for _ in range(ranks)]
    for thing in sorted(things, key=lambda thing: -cost(thing)):
        least = loads.index(min(loads))
        parts[least].append(thing)
        loads[least] += cost(thing)
    return parts


def packed(examples, tokens) -> list[list[Example]]:
    """In the order given, the largest first, each into the first pack that has room."""
    packs = []
    for example in examples:
        roomy = (pack for pack in packs if length(pack) + len(example.ids) <= tokens)
        pack = next(roomy, None)
        if pack is None:
            packs.append(pack := [])
        pack.append(example)
    return packs


AHEAD = 2  # steps whose clips are being decoded while one is trained on


@dataclass
class Step:
    packs: list[list[Example]]  # this rank's, their clips decoded
    ids: list[str]  # of all ranks' examples
    tokens: int  # in them
    room: int  # for tokens in the packs of all ranks
    place: dict  # where the plan is after it
    last: bool = False


def decoded(plan, rank, ranks):
    """The plan's steps as one rank sees them."""
    queue, tokens = deque(), plan.recipe.tokens
    pool = ThreadPoolExecutor(plan.recipe.workers)
    try:
        while (packs := plan.step()) or queue:
            if packs:
                parts = shared(packs, ranks, tokens)
                mine = [[pool.submit(load, plan, e) for e in pack] for pack in parts[rank]]
                ids = [e.id for pack in packs for e in pack]
                held, room = sum(map(length, packs)), sum(map(len, parts)) * tokens
                queue.append(Step(mine, ids, held, room, plan.place))
            if len(queue) > AHEAD or not packs:
                step = queue.popleft()
                heard = [[e for future in pack if (e := future.result())] for pack in step.packs]
                ended = not packs and not queue
                yield replace(step, packs=[pack for pack in heard if pack], last=ended)
    finally:
        pool.shutdown(cancel_futures=True)


def load(plan, example) -> Example | None:
    """With its clips, decoded. One that cannot be decoded takes its example with it."""
    net, sounds = plan.lesson.net, plan.lesson.sounds
    try:
        heard = {name: sounds(clip) for name, clip in {repr(c): c for c in example.clips}.items()}
        clips = [heard[repr(clip)] for clip in example.clips]
        slots, places = sum(map(net.n_slots, clips)), example.ids.count(net.config.audio_token)
        expect(slots == places, "clips", f"{places} slots, as their headers say", slots)
    except BadInput as mistake:
        plan.rows.skip(f"{example.id}: {mistake}")
        return None
    return replace(example, clips=clips)


# ------------------------------------------------------------------------------------------------
# The optimizer: AdamW, and for the matrices of a model that starts from nothing Muon, which makes
# every direction of a step as long as every other: it replaces the smoothed gradient G = U S V' by
# U V', found by five steps of a polynomial that pulls all singular values towards 1.


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.95, decay=0.02):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            found = [p for p in group["params"] if p.grad is not None]
            shapes = {}
            for p in found:  # those of one shape together: most of the cost is in starting
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                ahead = torch.stack([self.ahead(p, group["momentum"]) for p in params])
                changes = orthogonal(ahead) * max(1, shape[0] / shape[1]) ** 0.5
                for p, change in zip(params, changes):
                    p.mul_(1 - group["lr"] * group["decay"]).sub_(change, alpha=group["lr"])

    def ahead(self, p, momentum):
        """The smoothed gradient, a step ahead."""
        mean = self.state[p].setdefault("mean", torch.zeros_like(p))
        mean.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(mean, momentum)


def orthogonal(g, steps=5):
    """(n, out, in) -> about U V' of its singular value decomposition; eight bits are enough."""
    tall = g.shape[-2] > g.shape[-1]
    x = (g.mT if tall else g).bfloat16().contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):  # x <- 3.4445 x - 4.7750 (x x') x + 2.0315 (x x')^2 x
        a = torch.bmm(x, x.mT)
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return (x.mT if tall else x).to(g.dtype)


def optimizers(recipe, named) -> list:
    apart = ("embed", "lm_head", "heads.", ".lora_")  # rows that come up a few at a time; adapters
    matrices = [p for name, p in named if recipe.muon and p.ndim == 2
                and not any(part in name for part in apart)]  # fmt: skip
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    made = [torch.optim.AdamW(rest, recipe.lr, (0.9, 0.95), weight_decay=0.0)] if rest else []
    return made + ([Muon(matrices, recipe.muon)] if matrices else [])


def rate(recipe, step, steps) -> float:
    """The share of the learning rate at a step: up, along, and down as half a cosine."""
    warm = max(1, round(recipe.warmup * steps))
    if step < warm:
        return (step + 1) / warm
    start = max(warm, recipe.hold * steps)
    along = min(1, max(0, (step - start) / max(1, steps - start)))
    return recipe.floor + (1 - recipe.floor) * (1 + math.cos(math.pi * along)) / 2


# ------------------------------------------------------------------------------------------------
# Checkpoints: what is trained, what the optimizers remember of it, the place in the data. Chance
# has no state of its own: it depends on (seed, epoch, place).

KEPT = 2  # checkpoints, and the best


def state_tensors(named, opts) -> dict:
    tensors = {f"p.{name}": p.detach() for name, p in named}
    for name, p in named:
        for opt in opts:
            for key, value in opt.state.get(p, {}).items():
                tensors[f"s.{key}.{name}"] = torch.as_tensor(value).detach()
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def save_state(out, named, opts, about):
    path = out / f"state-{about['step']:07d}.safetensors"
    write_tensors(path, state_tensors(named, opts))
    write_json(path.with_suffix(".json"), about)  # the last: without it, no checkpoint
    kept = {path.stem for path in checkpoints(out)[-KEPT:]}
    for old in sorted(out.glob("state-*")):  # what a kill left half done is here, too
        if old.name.split(".")[0] not in kept:
            old.unlink()


def checkpoints(out) -> list[Path]:
    """The whole ones, oldest first."""
    found = sorted(out.glob("state-*.safetensors"))
    return [path for path in found if path.with_suffix(".json").exists()]


def load_state(path, named, opts) -> dict:
    """Put a checkpoint's numbers in place. -> what it says of itself"""
    about = read_json(path.with_suffix(".json"))
    owner = {id(p): opt for opt in opts for group in opt.param_groups for p in group["params"]}
    with open_tensors(path) as file:
        table = {key: file.get_tensor(key) for key in file.keys()}
    parameters = dict(named)
    there = {name.removeprefix("p."): tensor for name, tensor in table.items() if name[0] == "p"}
    left = sorted(there.keys() - parameters.keys())
    expect(not left, path, "what is trained and nothing else", ", ".join(left[:3]))
    for name, p in named:
        found = tuple(there[name].shape) if name in there else "none"
        expect(found == tuple(p.shape), f"{path}: {name}", f"the recipe's {tuple(p.shape)}", found)
        with torch.no_grad():
            p.copy_(there[name])
    for key, value in table.items():
        kind, _, rest = key.partition(".")
        what, _, name = rest.partition(".")
        if kind == "s" and name in parameters:
            p = parameters[name]  # AdamW counts its steps on the CPU
            owner[id(p)].state[p][what] = value.to(p.device) if value.ndim else value
    return about


# ------------------------------------------------------------------------------------------------
# One step, and a look at how well it goes.


class Stop:
    """Ctrl-C or a polite kill: the pack that is under way is finished, and what is done is saved.
    The same once more does not wait for that. (Whoever starts several ranks passes on what the
    terminal has told them already, but as the other of the two.)"""

    asked = 0
    saved = False  # while nothing would be lost

    def __call__(self, number, frame):
        first, again = not self.asked, self.asked == number
        self.asked = self.asked or number
        if again or (first and self.saved):
            sys.exit(128 + number)


STOPPED = Stop()


@dataclass
class Found:
    """Of a step, on every rank the same but for `lost`."""

    loss: float  # the mean
    weight: float  # of how many tokens
    wishes: float  # above 0 where anybody wants to stop
    cut: float  # above 0 where packs were left out for that
    lost: list[str]  # this rank's examples whose loss is no number


def gradients(lesson, packs, ranks, dtype) -> Found:
    """Leave the step's mean gradient in every parameter, on every rank the same."""
    net, named = lesson.net, lesson.named
    said = torch.zeros(4, device=net.device)  # summed loss, weight, wishes to stop, left out
    lost = []
    for number, pack in enumerate(packs):
        if STOPPED.asked and number:
            said[3] = 1.0
            break
        try:
            with torch.autocast(net.device.type, dtype, enabled=dtype != net.dtype):
                loss, weight = lesson.loss(pack)
            if loss.requires_grad:  # not so where only hearing is trained, and nothing is heard
                loss.backward()
        except torch.OutOfMemoryError as error:
            found = f"{length(pack)}: {str(error).splitlines()[0]:.120}"
            expect(False, "--tokens", "packs that the memory has room for", found)
        said[:2] += torch.tensor([loss.item(), weight], device=net.device)
        lost += [] if math.isfinite(loss.item()) else [e.id for e in pack]
    said[2] = float(STOPPED.asked)
    params = [p for _, p in named]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([part.float().flatten() for part in parts] + [said])
    loss, weight, wishes, cut = ranks.sum(flat)[-4:].tolist()
    for p, mean in zip(params, flat[:-4].split([p.numel() for p in params])):
        p.grad = (mean / max(weight, 1)).view_as(p).to(p.dtype)
    return Found(loss / max(weight, 1), weight, wishes, cut, lost)


def look(lesson, ranks) -> dict:
    lesson.net.eval()
    with torch.no_grad():
        tasks = lesson.look(ranks)
    lesson.net.train()
    return tasks


def is_half(recipe, device) -> bool:
    return recipe.dtype == "bf16" or (recipe.dtype == "auto" and device.type == "cuda")


def update(opts, full, named, most, share, loss) -> float:
    """A step of every optimizer at its share of the full rate, if the gradient is a number.
    -> its norm before it was clipped"""
    norm = nn.utils.clip_grad_norm_([p for _, p in named], most).item()
    for opt, rates in zip(opts, full):
        for group, lr in zip(opt.param_groups, rates):
            group["lr"] = lr * share
        if math.isfinite(norm + loss):
            opt.step()
        opt.zero_grad(set_to_none=True)
    return norm


PATIENCE = 3  # steps in a row whose gradient is no number


def report(step, wrong, ids, rank):
    """A step without a gradient is no harm; several in a row are."""
    ids = ", ".join(ids[:20]) + (f" and {len(ids) - 20} more" if ids[20:] else "")
    if rank == 0:
        warn(f"step {step}: the gradient is no number, and the step is left out: {ids}")
    expect(wrong < PATIENCE, f"step {step}", "a gradient that is a number", f"none, as in the "
           f"{PATIENCE - 1} steps before, on {ids}")  # fmt: skip


def save_run(net, recipe, out):
    """What sample.py and judge.py load: the adapter, or all of it."""
    (net.save_adapter if recipe.lora else net.save)(out)


# ------------------------------------------------------------------------------------------------
# What a run says of itself, on the terminal and in log.jsonl.


class Meter:
    def __init__(self, steps, done, before=0.0):
        self.steps, self.done, self.skipped, self.before = steps, done, 0, before
        self.begun = time.monotonic()
        self.show = progress("training", steps, done, "steps", 1)
        self.anew()

    def anew(self):
        """Rates are of the time since the last line, and of training alone."""
        self.since, self.first = time.monotonic(), self.done
        self.examples, self.tokens, self.room = 0, 0, 0

    def add(self, step, skipped):
        self.done += 1
        self.examples += len(step.ids)
        self.tokens += step.tokens
        self.room += step.room
        self.skipped += skipped
        self.show(1)

    @property
    def minutes(self) -> float:
        """Of the whole run, earlier parts of it too."""
        return round(self.before + (time.monotonic() - self.begun) / 60, 2)

    def tell(self, out, loss, lr, norm, device, bad):
        seconds = time.monotonic() - self.since
        left = seconds / max(1, self.done - self.first) * (self.steps - self.done)
        line = {
            "step": self.done, "loss": number(loss, 6), "lr": lr, "norm": number(norm, 4),
            "examples/s": round(self.examples / seconds, 1),
            "tokens/s": round(self.tokens / seconds),
            "fill": round(self.tokens / max(1, self.room), 4),
            "memory_gb": round(memory(device) / 1e9, 2), "left_min": round(left / 60, 1),
            "minutes": self.minutes,
            "bad_rows": bad, "skipped_steps": self.skipped,
        }  # fmt: skip
        print("  ".join(f"{name} {value}" for name, value in line.items()), file=sys.stderr)
        log_line(out, line)

    def tell_dev(self, out, tasks):
        told = "  ".join(f"{task} {right:.2f}" for task, right in tasks.items())
        print(clean(f"  dev {macro(tasks):.3f}: {told}"), file=sys.stderr)
        log_line(out, {"step": self.done, "minutes": self.minutes, "dev": tasks})


def log_line(out, line):
    with open(out / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def number(value, digits) -> float | None:
    """JSON knows no NaN."""
    return round(value, digits) if math.isfinite(value) else None


def tell_gate(recipe, step, tasks):
    """What a phase was to reach in every task, and where it did not."""
    low = [f"{task} {right:.2f}" for task, right in tasks.items() if right < recipe.gate]
    passed = bool(tasks) and not low
    said = f"gate {recipe.gate}: {'passed' if passed else 'NOT passed'}, with {macro(tasks):.3f}"
    print(clean(said + (f"; below it: {', '.join(low)}" if low else "")), file=sys.stderr)
    log_line(Path(recipe.out), {"step": step, "gate": recipe.gate, "passed": passed, "dev": tasks})


def cut_log(path, done, due):
    """What comes after the checkpoint is done once more, and says so once more: steps, and the look
    that was due."""
    lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
    lines = [(json.loads(line), line) for line in lines if line.endswith("}\n")]
    lines = [(told, line) for told, line in lines if told.get("step", 0) <= done]
    with written(path) as file:
        file.writelines(line for told, line in lines
                        if not due or told.get("step", 0) < done or "loss" in told)  # fmt: skip


def memory(device) -> int:
    """The most that was held, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def begin(run):
    """Say what this run is: on what, how much, whose data, and one example as a reader would see
    it. Keep that beside what comes of it."""
    net, plan, done = run.net, run.plan, run.state["step"]
    total = sum(p.numel() for p in net.parameters())
    trained = sum(p.numel() for _, p in run.lesson.named)
    device = f"{run.ranks.count} x {net.device}"
    left = len(plan.rows) - int(run.lesson.wanted.sum())
    laid_out = (plan.lay_out(place) for place in range(len(plan.order)))
    example = next((example for example in laid_out if example), None)
    expect(example or done, plan.rows.path, "an example to learn from", "none")
    for line in (
        f"on {device}, {kernels.chosen()} kernels, torch {torch.__version__}",
        f"parameters: {total:,}, trained: {trained:,}",
        f"code: {git_hash()}",
        f"rows: {len(plan.rows):,}" + (f", {left:,} of them passed over" if left else ""),
        f"licences: {', '.join(plan.rows.licences) or 'none stated'}",
        f"steps: {run.steps}" + (f", from {done}" if done else ""),
        *([f"{example.id}: {spelled(net, example.ids)}"] if example else ()),
    ):
        print(clean(line, keep="\n"), file=sys.stderr)
    about = {"code": git_hash(), "licences": plan.rows.licences}
    path = run.out / "train.json"
    before = read_json(path) if done and path.exists() else {}
    for name, value in asdict(run.recipe).items():
        if before.get(name, value) != value:
            said = f"{name}: from here on {value!r}, before {before[name]!r}"
            print(clean(said), file=sys.stderr)
    write_json(path, {**asdict(run.recipe), **about})
    cut_log(run.out / "log.jsonl", done, run.state["due"])


def spelled(net, ids) -> str:
    """Ids as text, special tokens by name and slots by their number."""
    names, parts = {id: name for name, id in net.tokenizer.special.items()}, []
    for id, run in groupby(ids, lambda id: id if id in names else None):
        run = list(run)
        slots = id is not None and id == net.config.audio_token
        text = f"<{len(run)} slots>" if slots else names[id] * len(run) if id in names else None
        parts.append(net.tokenizer.decode(run) if text is None else text)
    return "".join(parts)


# ------------------------------------------------------------------------------------------------
# The loop.

SAME = (  # of a run that is gone on with
    "seed", "batch", "tokens", "teach", "text", "bare", "view", "most", "tasks", "weight", "lora",
    "rank", "alpha", "trains", "dtype",
)  # fmt: skip


class Run:
    """What a run has come to, and how that is kept."""

    def __init__(self, net, recipe, ranks, resumed):
        self.net, self.recipe, self.ranks, self.out = net, recipe, ranks, Path(recipe.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.lesson = LESSONS[recipe.teach](net, recipe)
        self.opts = optimizers(recipe, self.lesson.named)
        self.full = [[group["lr"] for group in opt.param_groups] for opt in self.opts]
        self.state = {"step": 0, "best": -1.0, "place": None, "due": "", "minutes": 0.0, "bad": []}
        rows = self.lesson.rows
        base = ranks.gather(weights_hash(recipe.base) if ranks.rank == 0 else "")[0]
        same = {name: getattr(recipe, name) for name in SAME}
        self.state["plan"] = same | {"muon": recipe.muon > 0, "base": base}
        self.state["plan"] |= {"rows": len(rows), "data": rows.hash}
        if resumed and checkpoints(self.out):
            self.go_on(checkpoints(self.out)[-1])
        steps = ranks.gather(self.state["step"])
        expect(len(set(steps)) == 1, f"--out {self.out}", "a folder that all ranks see", steps)
        rows.bad.update(self.state["bad"])
        self.plan = Plan(recipe, self.lesson, self.state["place"], quiet=ranks.rank > 0)
        self.steps = recipe.steps or math.ceil(self.plan.examples / recipe.batch)
        if self.state["due"] != "last look":
            self.state["steps"] = self.steps

    def go_on(self, path):
        found, same = read_json(path.with_suffix(".json")), self.state["plan"]
        for name in filter(found["plan"].__contains__, same):
            known = found["plan"][name]
            where = f"--resume: {name}"
            expect(known == same[name], where, f"{known!r}, as so far", repr(same[name]))
        self.state = load_state(path, self.lesson.named, self.opts)

    def bad(self) -> int:
        """How many rows are, as all ranks have found by now."""
        rows = self.lesson.rows
        rows.bad.update(*self.ranks.gather(rows.bad))
        rows.check_bad()
        return len(rows.bad)

    def keep(self, **more):
        """On the disk, all of it or nothing."""
        self.state |= {**more, "bad": sorted(self.lesson.rows.bad)}
        if self.ranks.rank == 0:
            save_run(self.net, self.recipe, self.out)
            save_state(self.out, self.lesson.named, self.opts, self.state)

    def look(self, meter) -> float:
        """Ask the dev set, and note that it is done; whoever calls has saved before. -> above 0
        where somebody wished to stop before that"""
        if wishes := sum(self.ranks.gather(STOPPED.asked)):
            return wishes
        STOPPED.saved = True
        try:
            tasks = look(self.lesson, self.ranks)
        finally:
            STOPPED.saved = False
        last, best = self.state["due"] == "last look", self.state["best"]
        if self.ranks.rank == 0:
            meter.tell_dev(self.out, tasks)
            if macro(tasks) > best:
                save_run(self.net, self.recipe, self.out / "best")
            if last and self.recipe.gate:
                tell_gate(self.recipe, self.state["step"], tasks)
        self.keep(tasks=tasks, best=max(best, macro(tasks)), due="", minutes=meter.minutes)
        meter.anew()
        return 0


def train(net, recipe, ranks, resumed=False) -> bool:
    """-> whether it came to its end, or somebody wished it to stop."""
    run = Run(net, recipe, ranks, resumed)
    named, steps = run.lesson.named, run.steps
    if ranks.rank == 0:
        begin(run)
    dtype = torch.bfloat16 if is_half(recipe, net.device) else net.dtype
    meter, wrong, wishes = Meter(steps, run.state["step"], run.state["minutes"]), 0, 0
    net.train()
    if run.state["due"]:
        wishes = run.look(meter)
    for step in decoded(run.plan, ranks.rank, ranks.count):
        if (done := run.state["step"]) >= steps or wishes:
            break
        found = gradients(run.lesson, step.packs, ranks, dtype)
        loss, wishes = found.loss, found.wishes
        if found.cut:  # the next time this step is made from its beginning
            run.keep(minutes=meter.minutes)
            break
        share = rate(recipe, done, steps)
        norm = update(run.opts, run.full, named, recipe.clip, share, loss)
        wrong = 0 if math.isfinite(norm + loss) else wrong + 1
        if wrong:
            report(done + 1, wrong, sum(ranks.gather(found.lost), []) or step.ids, ranks.rank)
        run.state |= {"step": done + 1, "place": step.place}
        meter.add(step, wrong > 0)
        ended = done + 1 >= steps or step.last
        if ended:  # of so many examples as are good it may be sooner than was planned
            run.state["steps"] = done + 1
        if (done + 1) % recipe.every == 0 or ended or wishes:
            due = ended or (done + 1) % (recipe.every * recipe.looks) == 0
            due = run.lesson.looks and due and ("last look" if ended else "look")
            bad = run.bad()
            if ranks.rank == 0:  # before the checkpoint: what comes after one is cut off
                meter.tell(run.out, loss, recipe.lr * share, norm, net.device, bad)
            run.keep(due=due or "", minutes=meter.minutes)
            meter.anew()
            if due and not wishes:
                wishes = run.look(meter)
        if ended or wishes:
            break
    if STOPPED.asked:
        sys.exit(128 + STOPPED.asked)
    return not wishes


# ------------------------------------------------------------------------------------------------
# A model from nothing: a shape, a vocabulary learned from the questions, numbers by chance. One
# thing is not left to chance. An answer says what each clip holds before it says what follows, so
# that what the decoder needs most is copying: behind "audio 2:" comes what stood behind "audio 2:"
# before. That takes two steps, which a decoder finds late by itself: some heads look one or two
# tokens back and note what is there; later ones look for the place whose notes are the last two
# tokens read. Here both kinds stand from the start, to be trained on like everything else.

SHAPE = {
    "model_type": "audioflamingo3", "projector_hidden_act": "gelu", "projector_bias": True,
    "audio_config": {"model_type": "audioflamingo3_encoder", "hidden_size": 192,
                     "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 768,
                     "num_mel_bins": 128, "max_source_positions": 1500},
    "text_config": {"model_type": "qwen2", "hidden_size": 192, "num_hidden_layers": 6,
                    "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 512,
                    "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
                    "tie_word_embeddings": False,
                    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
}  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<sound>", "[BOA]", "[EOA]"]
VOCABULARY = 1200  # with which 97 of 100 words in questions and answers are one token each
CHAT = (  # a conversation as it is, without a system message
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% endif %}"
)
TOLD = 20_000  # rows whose texts make the vocabulary


def from_nothing(recipe, dir):
    rows = Rows(recipe.data)
    texts = (text for row in rows.whole(range(min(TOLD, len(rows)))) for text in said_in(row))
    train_bpe(texts, VOCABULARY, SPECIAL, dir)
    about = Path(dir) / "tokenizer_config.json"
    write_json(about, {**read_json(about), "chat_template": CHAT})
    tokenizer = Tokenizer.from_dir(dir)
    text = {**SHAPE["text_config"], "vocab_size": len(tokenizer)}
    text["eos_token_id"] = tokenizer.special["<|im_end|>"]
    shape = {**SHAPE, "text_config": text, "audio_token_id": tokenizer.slot, "layout": "polyaudio"}
    torch.manual_seed(recipe.seed)
    net = PolyAudio(Config.from_dict(shape))
    net.dir, net.layout = Path(dir).resolve(), "polyaudio"
    set_out(net, tokenizer)
    write_json(Path(dir) / "generation_config.json", {"eos_token_id": text["eos_token_id"]})
    net.save(dir)


def kin(tokenizer) -> list[int]:
    """Of each token the first that spells the same word: behind a space, a quotation mark or with a
    capital a word is another token, and to learn that it is the same word takes long."""
    first, found = {}, []
    for id in range(len(tokenizer)):
        special = id in tokenizer.special.values()
        word = "" if special else re.sub(r"\W", "", tokenizer.decode([id])).casefold()
        found.append(first.setdefault(word or id, id))
    return found


def said_in(row) -> list[str]:
    said = [part["says"] for part in row["meta"].get("evidence", ())] if "meta" in row else []
    return [message["content"] for message in conversation(row)] + said


@torch.no_grad()
def set_out(net, tokenizer):
    for name, p in net.named_parameters():
        last = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight"))
        if name.endswith("bias"):
            p.zero_()
        elif p.ndim > 1 and "conv" not in name:  # what ends a branch starts small
            nn.init.normal_(p, std=p.shape[1] ** -0.5 * (0.3 if last else 1))
    table = net.language_model.embed_tokens.weight
    own, shared = torch.randn(2, *table.shape)
    table.copy_(0.5 * (0.6 * own + 0.8 * shared[kin(tokenizer)]))
    net.lm_head.weight.copy_(0.1 * table)
    e = net.config.encoder  # where a frame stands, as Whisper says it
    rates = 10_000 ** (-torch.arange(e.width // 2) / (e.width // 2 - 1))
    angles = torch.arange(e.positions)[:, None] * rates
    net.audio_tower.embed_positions.weight.copy_(torch.cat([angles.sin(), angles.cos()], 1))
    colon = F.normalize(table[tokenizer.encode(":")[0]], dim=0)
    copy_from_the_start(net.language_model.layers, net.config.decoder, colon)


def copy_from_the_start(layers, config, colon):
    width, size = config.width, config.head_size
    half, slow = size // 2, size // 2 - 5  # RoPE turns the first five planes of a head fast, and
    # the others hardly; those compare what stands far apart
    content, noted = (nn.init.orthogonal_(torch.empty(width, width)) for _ in range(2))
    turn = config.theta ** (-torch.arange(half) / half)
    one_back, two_back = noted[:size], noted[size : 2 * size]  # where the two notes lie
    for head, back in enumerate((1, 2)):
        attention, at = layers[0].self_attn, slice(head * size, (head + 1) * size)
        fast = 6.0 * (torch.arange(half) < 6)
        key = torch.cat([fast, torch.zeros(half)])
        query = torch.cat([fast * (back * turn).cos(), -fast * (back * turn).sin()])
        attention.k_proj.bias[at], attention.q_proj.bias[at] = key, query
        attention.k_proj.weight[at] *= 0.1
        attention.q_proj.weight[at] *= 0.1
        attention.v_proj.weight[at] = content[:size]
        attention.o_proj.weight[:, at] = noted[at].T
    for number in range(6):  # heads, three of a layer: each copies a sixth of what is there
        attention = layers[1 + number // 3].self_attn
        at, part = (slice(n * size, (n + 1) * size) for n in (number % 3, number))
        query, key = torch.zeros(2, size, width)
        one, two = torch.randperm(size)[:slow], torch.randperm(size)[:slow]
        query[5:half], key[5:half] = content[one], one_back[one]  # what is read and what stands
        query[half + 5 :], key[half + 5 :] = one_back[two], two_back[two]  # before that place
        attention.q_proj.weight[at], attention.k_proj.weight[at] = 2 * query, 2 * key
        attention.v_proj.weight[at] = content[part]
        attention.o_proj.weight[:, at] = content[part].T
    attention, at = layers[1].self_attn, slice(3 * size, 4 * size)  # the nearest colon: which clip
    near, still = torch.zeros(2, size)  # is this about? What stands before the colon says it
    near[3:5], still[10:half], still[half + 10 :] = 7.0, 1.0, 1.0
    attention.q_proj.bias[at], attention.k_proj.bias[at] = near + still, near
    attention.q_proj.weight[at] *= 0.1
    attention.k_proj.weight[at] = 0.5 * still[:, None] * colon
    attention.v_proj.weight[at] = one_back
    attention.o_proj.weight[:, at] = noted[2 * size : 3 * size].T


# ------------------------------------------------------------------------------------------------
# The small model's run: its phases, each a run of its own in a folder of its own, the last one in
# the run's.


def run_phases(recipe, given, device, ranks, again=None):
    """given: the fields that flags have set; they hold in every phase. again: the phase from which
    all is done anew."""
    if again and ranks.rank == 0:
        begin_again(phase_of(recipe, given, again), recipe.out, again)
    ranks.gather("forgotten")
    base = Path(recipe.out) / "base"
    if ranks.rank == 0 and not (base / "config.json").exists():  # the last of what is written
        from_nothing(recipe, base)
    ranks.gather("the base is there")
    for name in PHASES:
        said = f"phase {name}: {told(own_fields(given, name))}"
        if not learn(phase_of(recipe, given, name), device, ranks, said):
            return


def own_fields(given, name) -> dict:
    return {field: value for field, value in PHASES[name].items() if field not in given}


def phase_of(recipe, given, name) -> Recipe:
    """A phase's own recipe: it begins where the one before it ended."""
    names = ["base", *PHASES]
    base, out = (phase_folder(recipe.out, names[names.index(name) - back]) for back in (1, 0))
    return replace(recipe, **own_fields(given, name), base=str(base), out=str(out))


def phase_folder(out, name) -> Path:
    return Path(out) if name == list(PHASES)[-1] else Path(out) / name


def has_ended(recipe) -> bool:
    done = checkpoints(Path(recipe.out))
    about = read_json(done[-1].with_suffix(".json")) if done else {"step": -1}
    return about["step"] >= (recipe.steps or about.get("steps", math.inf)) and not about["due"]


def learn(recipe, device, ranks, said) -> bool:
    """A run, unless it has come to its end already. -> whether it has now"""
    if has_ended(recipe):
        return True
    if ranks.rank == 0:
        print(clean(said), file=sys.stderr)
    whole = train(PolyAudio.from_dir(recipe.base, device, torch.float32), recipe, ranks, True)
    if whole:
        ranks.gather("all of it is written")
    return whole


def begin_again(phase, out, first):
    """Forget that phase and what came of it; but a mistake in its flags is told before."""
    if Path(phase.base, "config.json").exists():
        Plan(phase, LESSONS[phase.teach](PolyAudio.from_dir(phase.base), phase))
    after = list(PHASES)[list(PHASES).index(first) :]
    for name in after:
        folder = phase_folder(out, name)
        for path in [*folder.glob("state-*"), *folder.glob("asked.json")]:
            path.unlink()
    gone = ["base"] * (first == "hear") + ["ablate"] * (len(after) > 1)
    for name in gone:
        shutil.rmtree(Path(out) / name, ignore_errors=True)


def told(fields) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in fields.items())


# What the parts are for: the last phase again, shorter, with one thing changed. The encoder and
# what is worked out with it are the same in all; only the perceiver has not been through `join`.
# Clips in another order, and captions in their place, are asked of the first arm's network: nothing
# is trained for them. Last, clips as one for as long as the phase itself, beside the run as it is.
ARMS = {
    "interleaved": {}, "concatenated": {"view": "concat"}, "no index": {"view": "no-index"},
    "no boundary": {"view": "no-boundary"}, "at most 2": {"most": 2}, "at most 3": {"most": 3},
    "at most 4": {"most": 4}, "perceiver of 16": {},
}  # fmt: skip
SEEDS = 2
ARM = {"steps": 560, "gate": 0.0, "looks": 1000, "look": 1000}  # 9 to 17 minutes on two cores
WHOLE = ", at full length"
PAPER = {  # what PolyAudio found, on other data
    "interleaved": "73.5 (B.2, Table 7)", "concatenated": "61.2 (B.2, Table 7)",
    "at most 2": "64.3 (Fig. 3)", "at most 4": "73.1 (Fig. 3)", "late fusion": "59.8 (B.3)",
    "permuted": "73.4, from 73.8 (B.1)",
}  # fmt: skip


def run_ablations(recipe, given, device, ranks):
    def answer(**more):
        return replace(phase_of(recipe, given, "answer"), **more)

    join, home = Path(recipe.out) / "join", Path(recipe.out) / "ablate"
    expect(has_ended(answer()), recipe.out, "a run that has come to its end", "none")
    expect(recipe.dev, "--ablate", "a --dev set", "none")
    short = {name: value for name, value in ARM.items() if name not in given}
    arms = [(arm, seed) for seed in range(recipe.seed, recipe.seed + SEEDS) for arm in ARMS]
    found = {}
    for arm, seed in [*arms, ("concatenated" + WHOLE, recipe.seed)]:
        change = ARMS[arm.removesuffix(WHOLE)]
        folder = home / re.sub(r"[ ,]+", "-", f"{arm}-{seed}")
        made = answer(**short, **change, seed=seed, out=str(folder), base=str(join))
        if WHOLE in arm:
            made = replace(made, steps=answer().steps)
        if "perceiver" in arm:
            made = replace(made, base=str(folder / "base"))
            if ranks.rank == 0 and not Path(made.base, "config.json").exists():
                with_perceiver(join, made.base, 16, seed)
            ranks.gather("the base is there")
        if not learn(made, device, ranks, f"arm {arm}, seed {seed}: {told(change)}"):
            return
        last = checkpoints(folder)[-1].with_suffix(".json")
        found.setdefault(arm, []).append(read_json(last)["tasks"])
        if arm == "interleaved":
            for way, tasks in ask_again(made, folder, device, ranks, OTHERWISE).items():
                found.setdefault(way, []).append(tasks)
    itself = {"interleaved" + WHOLE: lambda lesson, row: row}
    for way, tasks in ask_again(answer(**short), Path(recipe.out), device, ranks, itself).items():
        found[way] = [tasks]
    if ranks.rank == 0:
        for arm, runs in found.items():
            scores = "".join(f"{macro(tasks):>8.3f}" for tasks in runs)
            paper = PAPER.get(arm.removesuffix(WHOLE))
            print(f"{arm:<32}{scores:<20}" + (f"the paper: {paper}" if paper else ""))
        write_json(home / "table.json", {"scores": found, "paper": PAPER})


def permuted(lesson, row):
    return reordered(row) if len(row["clips"]) > 1 else row


def fused(lesson, row):
    """Each clip captioned by itself, then the question on the captions."""
    return view_captioned(row, lesson.ask(each_alone(row)))


OTHERWISE = {"permuted": permuted, "late fusion": fused}


def ask_again(recipe, folder, device, ranks, ways) -> dict:
    """What a network that has learned scores when its rows are changed in one of these ways."""
    kept = folder / "asked.json"
    if kept.exists():
        return read_json(kept)
    lesson = Answers(PolyAudio.from_dir(folder, device, torch.float32).eval(), recipe)
    with torch.no_grad():
        asked = {way: lesson.look(ranks, partial(change, lesson)) for way, change in ways.items()}
    ranks.gather("all have looked")
    if ranks.rank == 0:
        write_json(kept, asked)
    return asked


def with_perceiver(base, dir, slots, seed):
    """The same network with a fixed number of slots a clip."""
    old = PolyAudio.from_dir(base)
    resampler = {"kind": "perceiver", "slots": slots, "heads": old.config.encoder.heads}
    raw = {**old.config.raw, "model_type": "polyaudio", "resampler": resampler}
    torch.manual_seed(seed)
    net = PolyAudio(Config.from_dict(raw))
    net.dir, net.layout = old.dir, old.layout
    held = {k: v for k, v in old.state_dict().items() if not k.startswith(JOINT)}
    net.load_state_dict({**net.state_dict(), **held})
    net.save(dir)


def spread_out(device):
    """Small matrices gain little from a second core; a rank on each core gains nearly all of it.
    So on a CPU this program begins itself again, on up to eight, as torchrun would, and waits."""
    count = min(cores(), 8)
    if device.type != "cpu" or count == 1 or "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    leash = os.pipe()  # its end for writing is closed when this process ends, by whatever cause
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    env = {"OMP_NUM_THREADS": "1", **os.environ, **where, "POLYAUDIO_LEASH": str(leash[0])}
    ranks, asked = [], []

    def pass_on(number, frame):  # as the other of the two: they may have heard of it already
        asked.append(number)
        for rank in ranks:
            rank.send_signal(signal.SIGINT if number == signal.SIGTERM else signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    for rank in range(count):
        own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen([sys.executable, *sys.argv], env=own, pass_fds=leash[:1]))
    codes = waited(ranks)
    codes = sorted((code for code in codes if code), key=lambda code: code < 0)
    ended = next((code if code > 0 else 128 - code for code in codes), 0)
    sys.exit(128 + asked[0] if ended and asked else ended)


def waited(ranks) -> list[int]:
    """Their exit codes. Where one dies, the others notice and say so; but they may not have met
    yet, and would wait for it."""
    stopped, gone = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM), 0
    while any(rank.poll() is None for rank in ranks):
        gone += any(rank.poll() not in (None, *stopped) for rank in ranks)
        if gone == 100:
            for rank in ranks:
                rank.kill()
        time.sleep(0.1)
    return [rank.poll() for rank in ranks]


def on_leash():
    """A rank that spread_out has begun ends with it."""

    def wait(end):
        os.read(end, 1)
        os._exit(1)

    if end := os.environ.get("POLYAUDIO_LEASH"):
        threading.Thread(target=wait, args=[int(end)], daemon=True).start()


# ------------------------------------------------------------------------------------------------
# What a run would take, from the configuration and the data alone.


def run_dry(recipe, args):
    for name, value in (("devices", args.devices), ("flops", args.flops)):
        expect(0 < value < math.inf, f"--{name}", "a number above 0", value)
    expect(recipe.base, "--dry-run", "a --base", "none")
    expect(recipe.teach == "answers", "--dry-run", "--teach answers", recipe.teach)
    recipe = replace(recipe, cache="")
    with torch.device("meta"):
        net = PolyAudio(Config.from_dir(recipe.base))
    net.dir = Path(recipe.base).resolve()
    device = find_device(args.device)
    width = 2 if is_half(recipe, device) else 4
    base = sum(p.numel() for p in net.parameters())
    lesson = LESSONS[recipe.teach](net, recipe)
    trained = sum(p.numel() for _, p in lesson.named)
    total = sum(p.numel() for p in net.parameters())
    plan = Plan(recipe, lesson)
    plan.fill()
    sample = list(plan.waiting.values())
    expect(sample, plan.rows.path, "an example to learn from", "none")
    examples = recipe.steps * recipe.batch or plan.examples
    tokens = sum(len(e.ids) for e in sample) / len(sample) * len(plan.order)
    work = sum(work_of(net, recipe, lesson.root, e) for e in sample) / len(sample) * examples
    hours = work / args.flops / args.devices / 3600
    weights = base * (width if recipe.lora else 4)
    kept = kept_bytes(net.config, recipe, width)
    # checkpoints, each with AdamW's two, one more while it is written; the run itself, the best
    files = 4 * (3 * (KEPT + 1) * trained + 2 * (trained if recipe.lora else total))
    for line in (
        f"steps: {recipe.steps or math.ceil(examples / recipe.batch):,} of {recipe.batch} examples",
        f"tokens of an epoch: {tokens:,.0f}, {sum(len(e.ids) for e in sample) / len(sample):,.0f} "
        f"an example, by {len(sample)} of {len(plan.order):,}",
        f"hours: {hours:,.2f} on {args.devices} x {args.flops:g} FLOP/s (--devices, --flops), for "
        f"{work:.3g} FLOP in all",
        f"parameters: {total:,}, trained: {trained:,}",
        f"memory of each device: about {(weights + 16 * trained + kept) / 1e9:.2f} GB: weights "
        f"{weights / 1e9:.2f}, what is trained {16 * trained / 1e9:.2f} (itself or its float32 "
        f"gradient, twice, and AdamW's two), activations {kept / 1e9:.2f}",
        f"disk: about {files / 1e6:,.2f} MB for {KEPT} checkpoints, the next one, the run and "
        "the best",
    ):
        print(line)


def work_of(net, recipe, root, example) -> float:
    """FLOP of learning from an example: two for each weight and token forward, as many again for
    the gradient of what comes in, for that of the weight, and for computing twice."""
    config, t = net.config, len(example.ids)
    sizes = Counter()
    for name, p in net.named_parameters():
        if p.ndim > 1 and "embed" not in name and ".lora_" not in name:
            sizes[name.partition(".")[0]] += p.numel()
    d, again = config.decoder, bool(recipe.recompute)
    decoder = 2 * t * sizes["language_model"] + 2 * t * t * d.heads * d.head_size * d.layers
    head = 2 * sum(map(bool, example.learned)) * sizes["lm_head"]
    total = (3 - bool(recipe.lora)) * (decoder + head) + again * decoder
    for clip in example.clips:
        seconds = min(clip_samples(clip, root) / RATE, config.max_seconds)
        positions, last = 50 * seconds, 50 * (seconds % 30)
        pairs = 1500 * (positions - last) + last * last
        e = config.encoder
        heard = 2 * positions * sizes["audio_tower"] + 4 * pairs * e.width * e.layers
        heard += positions * sizes["multi_modal_projector"]  # two positions a slot
        total += heard * (1 if recipe.lora else 3)
    return total


def kept_bytes(config, recipe, width) -> float:
    """Of activations: what a decoder's layers keep of a row, or only their inputs and one layer's
    all; and what the encoder holds at a time. An adapter keeps its inputs in float32."""
    d, e = config.decoder, config.encoder
    wide = (d.heads + 2 * d.kv_heads) * d.head_size
    layer = width * (6 * d.width + 2 * wide + 4 * d.ffn)
    layer += 4 * (6 * d.width + d.ffn) if recipe.lora and width == 2 else 0
    layers = d.layers * width * d.width + layer if recipe.recompute else d.layers * layer
    heard = e.layers if e and not recipe.lora else 1
    positions = min(recipe.tokens * 2, ENCODER_FRAMES / 2) if e else 0
    sound = positions * width * (6 * e.width + 2 * e.ffn) * heard if e else 0
    return recipe.tokens * layers + sound


# ------------------------------------------------------------------------------------------------
# The command line.


def run_merge(args):
    """In the type of the base's own file, bf16 mostly, or as --dtype says; with the run's log and
    a card that says where it comes from."""
    expect(args.out, "--merge", "--out, the folder of the checkpoint to be", "none")
    kinds = {None: None, "auto": None, "bf16": torch.bfloat16, "f32": torch.float32}
    expect(args.dtype in kinds, "--dtype", "auto, f32 or bf16", args.dtype)
    run, out = Path(args.merge), Path(args.out)
    home = run.parent if run.name == "best" else run  # where its log lies
    net = PolyAudio.from_dir(run, dtype=kinds[args.dtype])
    taken = out.resolve() in (net.dir, run.resolve())
    expect(not taken, "--out", "a folder other than what is merged", out)
    net.save(out)
    phased = (home / next(iter(PHASES))).exists()
    phases = {name: phase_folder(home, name) for name in PHASES} if phased else {}
    lines = []
    for name, folder in (phases or {"": home}).items():
        path = folder / "log.jsonl"
        told = path.read_text(encoding="utf-8").splitlines() if path.exists() else ()
        whole = [json.loads(line) for line in told if line.endswith("}")]
        lines += [({"phase": name} if name else {}) | line for line in whole]
    if (home / "train.json").exists():
        told = [folder / "train.json" for folder in {home, *phases.values()}]
        licences = sorted({name for path in told for name in read_json(path)["licences"]})
        made = {**read_json(home / "train.json"), "licences": licences, "best": run != home}
        with written(out / "log.jsonl") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        with written(out / "README.md") as file:
            file.write(card(net, out.resolve().name, made, lines))
    print(clean(f"{out}: one plain checkpoint"))


def card(net, name, made, lines) -> str:
    """What a checkpoint says of itself: what it is, what it comes from, how well it did."""
    against = r"(?i)\bNC\b|non-?commercial|research"
    bound = [name for name in made["licences"] if re.search(against, name)]
    gates = [line for line in lines if "gate" in line and "phase" in line]
    nothing = any("phase" in line for line in lines)
    base = "nothing" if nothing else f"`{made['base']}`"
    minutes = {line.get("phase"): line["minutes"] for line in lines if "minutes" in line}
    last = lines[-1].get("phase") if lines else None
    looks = [line["dev"] for line in lines if line.get("dev") and line.get("phase") == last] or [{}]
    tasks = max(looks, key=macro) if made.get("best") else looks[-1]
    small = [
        "Its encoder learned from labels of what sounds when; the heads for that are not in here.",
        "It knows the toy world that synth.py makes and no other sound: real recordings, other",
        "voices and other words are beyond it. It is for reading how such a model is built.", "",
        "What each phase reached on the dev set, on the mean and at the lowest, and what was to be",
        "the lowest:", "",
        *(f"- {line['phase']}: {macro(line['dev']):.3f}, {min(line['dev'].values()):.3f}, "
          f"{line['gate']}" for line in gates if line["dev"]), "",
    ]  # fmt: skip
    return "\n".join([
        f"# {name}", "",
        f"{sum(p.numel() for p in net.parameters()):,} parameters in the layout of "
        f"{net.config.kind}. It answers questions about several sounds at once:", "",
        "    python sample.py --clips A.wav B.wav --weights DIR", "",
        f"Made from {base} by train.py of {made['code']}, on `{made['data']}`, in "
        f"{sum(minutes.values()):.0f} minutes; log.jsonl tells of them.",
        f"Licences of the data: {', '.join(made['licences']) or 'none stated'}."
        + (f" Not for commerce: {', '.join(bound)}; nor are these weights." if bound else ""),
        *([] if nothing else ["What its base's licence forbids is forbidden here, too; that of",
                              "Audio Flamingo 3 forbids commerce."]), "",
        *(small if nothing else ()),
        *([f"On the dev set, {'where it was best' if made.get('best') else 'at the end'}, by task:",
           ""] if tasks else ()),
        *(f"- {task}: {right:.3f}" for task, right in tasks.items()), "",
    ])  # fmt: skip


def given_fields(args) -> dict:
    given = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    return {name: value for name, value in given.items() if value is not None}


def recipe_of(args) -> Recipe:
    return replace(RECIPES[args.recipe], **given_fields(args))


def check_recipe(recipe):
    """Fields that would fail later, or train something else than was meant."""
    share = "a share, 0 to 1"
    for name, fine, wanted in (
        ("lora", recipe.lora in ("", *TARGETS), f"nothing, {' or '.join(TARGETS)}"),
        ("dtype", recipe.dtype in ("auto", "f32", "bf16"), "auto, f32 or bf16"),
        ("teach", recipe.teach in LESSONS, " or ".join(LESSONS)),
        ("view", recipe.view in ("", *ONE_ROW_VIEWS), f"nothing, {', '.join(ONE_ROW_VIEWS)}"),
        ("seed", recipe.seed >= 0, "0 or more"),
        *((name, 0 < getattr(recipe, name) < math.inf, "a number above 0")
          for name in ("rank", "alpha", "batch", "tokens", "lr", "clip", "workers", "every",
                       "look", "looks", "weight", "most")),
        ("epochs", recipe.steps > 0 or 0 < recipe.epochs < math.inf, "a number above 0"),
        ("steps", recipe.steps >= 0, "0 or more"),
        ("muon", 0 <= recipe.muon < math.inf, "0 or more"),
        *((name, 0 <= getattr(recipe, name) <= 1, share)
          for name in ("warmup", "hold", "floor", "text", "bare", "gate")),
    ):  # fmt: skip
        expect(fine, f"--{name}", wanted, repr(getattr(recipe, name)))
    apart = not recipe.base or Path(recipe.out).resolve() != Path(recipe.base).resolve()
    expect(apart, "--out", "a folder other than the base's", recipe.out)
    heard = "" if recipe.base and recipe.teach == "answers" else recipe.corpus
    for path in filter(None, (recipe.data, recipe.dev, heard)):
        open_rows(path).close()


@contextmanager
def alone(out):
    """Two runs in one folder would write over each other. The lock ends with the process."""
    Path(out).mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        hold(folder, out)
        yield
    finally:
        os.close(folder)


def differs(name, recipe) -> str:
    """The recipe by its name, and what is not as it says."""
    own = asdict(RECIPES[name])
    changed = [f"{k} {v!r}" for k, v in asdict(recipe).items() if v != own[k]]
    return f"recipe {name}" + (", but " + ", ".join(changed) if changed else " as it is")


def main():
    torch.set_flush_denormal(True)  # numbers next to nothing cost a CPU twice as much
    parser = Parser(
        description=__doc__.split("\n\n")[0], epilog="Flags of a recipe have its values."
    )
    parser.add_argument("--recipe", choices=RECIPES, default="tiny")
    parser.add_argument("--resume", action="store_true", help="go on where a run was stopped")
    parser.add_argument(
        "--from-phase", choices=PHASES, help="of recipe tiny: do this one and what follows again"
    )
    parser.add_argument(
        "--ablate", action="store_true", help="of recipe tiny: what each of its parts is for"
    )
    parser.add_argument(
        "--merge", metavar="RUN", help="fold a run's adapter into its base, at --out"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what a run would take")
    parser.add_argument("--devices", type=int, default=1, help="of --dry-run (default: 1)")
    parser.add_argument(
        "--flops", type=float, default=6e13, help="a second, by each (default: %(default)g)"
    )
    parser.add_argument("--device", help="default: the first of cuda, mps, cpu that is there")
    for each in fields(Recipe):
        usual = f"{each.metadata['says']} (tiny: {getattr(RECIPES['tiny'], each.name)!r})"
        parser.add_argument(f"--{each.name}", type=type(each.default), metavar="X", help=usual)
    args = parser.parse_args()
    recipe = recipe_of(args)
    if args.merge:
        return run_merge(args)
    check_recipe(recipe)
    if args.dry_run:
        return run_dry(recipe, args)
    on_cpu = args.device == "cpu" or not (
        torch.cuda.is_available() or torch.backends.mps.is_available()
    )
    if not recipe.base and on_cpu and shutil.which(os.environ.get("CXX", "g++")):
        os.environ.setdefault("POLYAUDIO_KERNELS", "compiled")  # before the first ask
    device = find_device(args.device)
    resume = args.resume or args.from_phase or args.ablate
    expect(not (recipe.base and (args.from_phase or args.ablate)), "--from-phase, --ablate",
           "the recipe tiny, from nothing", f"--base {recipe.base}")  # fmt: skip
    expect(not (args.from_phase and args.ablate), "--from-phase, --ablate", "one of them", "both")
    there = [path for path in Path(recipe.out).glob("**/state-*.json")]
    step = max((read_json(path)["step"] for path in there), default=0)
    found = f"that of step {step}" if there else ""
    expect(resume or not there, recipe.out, "--resume, or no checkpoint there", found)
    if not recipe.base:
        on_leash()
        spread_out(device)
    ranks = join_ranks(device)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, STOPPED)
    if ranks.rank == 0:
        print(clean(differs(args.recipe, recipe)), file=sys.stderr)
    with alone(recipe.out) if ranks.rank == 0 else nullcontext():
        if recipe.base:
            frozen_half = is_half(recipe, device) and recipe.lora  # what is trained stays float32
            dtype = torch.bfloat16 if frozen_half else torch.float32
            train(PolyAudio.from_dir(recipe.base, device, dtype), recipe, ranks, args.resume)
        else:
            given = given_fields(args)
            if args.ablate:
                run_ablations(recipe, given, device, ranks)
            else:
                run_phases(recipe, given, device, ranks, args.from_phase)
    if ranks.count > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main)
