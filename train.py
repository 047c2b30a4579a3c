"""Train: a small model from nothing, or a base that knows one clip into one that compares several.

    python train.py                                         the small one, on all cores
    python train.py --resume                                after a stop, in whichever phase
    python train.py --from-phase join                       that phase and what follows, again
    python train.py --ablate                                what each of its parts is for
    python train.py --recipe polyaudio --data data/mine/train.jsonl                 on one GPU
    torchrun --nproc-per-node 8 train.py --recipe polyaudio --data ...              on eight
    python train.py --recipe polyaudio --data ... --dry-run               what it would take
    python train.py --recipe mallm --base weights/qwen2-audio             pairs, as MALLM did
    python train.py --merge runs/polyaudio --out weights/polyaudio      one plain checkpoint

A step reads `batch` examples, whatever the number of ranks: they are packed into rows of about
`tokens` tokens, the rows go to the ranks so that all have as much to do, and the summed gradients
meet in one all-reduce. So the same seed gives the same steps on one GPU and on eight.

The ideas, in order: recipes and the small model's phases; examples as tokens, of which only the
answers are learned; clips, kept; lessons, what a phase teaches; the plan, which packs; optimizers;
ranks; a model from nothing; checkpoints; one step; the loop; the phases, one after another, and
the ablations; what a run would take; one plain checkpoint.
"""

import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby, islice, product
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the core to others

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import kernels  # noqa: E402
from model import (  # noqa: E402
    ENCODER_FRAMES, Config, PolyAudio, answer_all, find_device, write_tensors,
)  # fmt: skip
from prepare import (  # noqa: E402
    ONE_ROW_VIEWS, RATE, VIEWS, BadInput, Parser, Tokenizer, as_corpus, as_example, check_fits,
    clean, cli, clip_order, clip_samples, conversation, each_alone, expect, git_hash, hold,
    load_clip, n_slots, open_tensors, progress, read_json, read_rows, read_values, reordered,
    score, to_ask, train_bpe, view_as_text, view_captioned, view_text_only, warn, write_json,
    written,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Recipes. Every field is a flag of the same name.


@dataclass(frozen=True)
class Recipe:
    base: str = "weights/af3"  # folder of weights to start from; "" for a small one from nothing
    data: str = "data/toy/train.jsonl"
    dev: str = "data/toy/bench-dev.jsonl"  # what is asked on the way; "" for nothing
    corpus: str = "data/toy/world/corpus.jsonl"  # of clips by themselves, where those teach
    out: str = "runs/polyaudio"
    seed: int = 0
    teach: str = "answers"  # or names of what sounds, or meanings of slots: see Lessons
    text: float = 0.0  # share of examples whose clips are written out instead of heard
    bare: float = 0.0  # of those, the share where that stands in the answer alone, not learned
    view: str = ""  # of all examples, one that prepare.py names
    most: int = 5  # clips of an example; those of more are passed over
    tasks: str = ""  # how often each task, skill or kind is drawn, else once: "odd 2, single 0.5"
    cache: str = ""  # folder for what is worked out of a clip once; "" for none
    gate: float = 0.0  # what the last look at the dev set must reach
    trains: str = ""  # without adapters: beginnings of what is trained, "" for all
    lora: str = "decoder"  # where adapters go, or all (but the audio encoder); "": no adapters
    rank: int = 16
    alpha: int = 32
    batch: int = 128  # examples of a step, on all ranks together
    tokens: int = 16384  # of a packed row
    epochs: float = 1.0
    steps: int = 0  # instead of epochs
    lr: float = 1e-5
    muon: float = 0.0  # learning rate of matrices that are not adapters, by Muon; 0: as the rest
    warmup: float = 0.05  # share of the steps
    hold: float = 0.0  # share of the steps at full rate; then it falls, as a cosine, to `floor`
    floor: float = 0.0  # of the full rate
    clip: float = 1.0  # gradient norm
    weight: float = 1.0  # of the answer's verdict beside what leads to it
    recompute: int = 1  # keep only each layer's input and compute the rest again; 0: keep it all
    workers: int = 4  # threads that decode ahead
    every: int = 100  # steps between two lines of the log and checkpoints
    looks: int = 1  # of so many of those, one looks at the dev set, too; the last one does
    look: int = 210  # examples of a look
    dtype: str = "auto"  # f32 or bf16; auto: bf16 on a GPU, f32 elsewhere


RECIPES = {
    "tiny": Recipe(base="", out="runs/tiny", cache="data/toy/cache", lora="", lr=3e-3, muon=0.02,
                   hold=0.2, floor=0.02, batch=32, tokens=4096, recompute=0, workers=1, looks=10,
                   dtype="bf16"),  # its phases stand below
    "polyaudio": Recipe(),  # the paper's section 4.1; it leaves rank and number of steps open
    "mallm": Recipe(base="weights/qwen2-audio", data="data/mallm/train.jsonl", dev="",
                    out="runs/mallm", lora="all", lr=5e-5, batch=16, epochs=5),
}  # fmt: skip
LANGUAGE, JOINT = "language_model, lm_head", "multi_modal_projector"
LAST = "audio_tower.layers.3, audio_tower.layer_norm"  # of the encoder's four
# What the small model learns, one after another, each phase from what the one before it left. The
# gate at its end says whether the next one makes sense: a stall costs minutes and names its cause.
PHASES = {
    "hear": {"teach": "names", "trains": "audio_tower", "steps": 1800, "gate": 0.8},
    "read": {"text": 1.0, "bare": 0.75, "trains": LANGUAGE, "tasks": "single 0.3", "steps": 1500,
             "batch": 64, "weight": 3.0, "muon": 0.01, "lr": 2e-3, "gate": 0.9},
    "join": {"teach": "meanings", "trains": f"{JOINT}, {LAST}", "steps": 800, "gate": 0.8},
    "answer": {"text": 0.35, "bare": 0.75, "trains": f"{LANGUAGE}, {JOINT}", "steps": 1000,
               "weight": 2.0, "muon": 0.007, "lr": 1.5e-3, "gate": 0.6},
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


class Rows:
    """The rows of a file by number: only where each begins is kept, eight bytes a row. A JSON array
    has no lines to count; its rows are kept as text."""

    def __init__(self, path, read=as_example):
        self.read, tasks = read, []
        self.file = open_rows(path)
        self.path, self.array, starts, place, found = path, None, [], 0, set()
        if self.file.read(1 << 16).lstrip().startswith(b"["):
            self.array = [json.dumps(row).encode() for _, row in read_values(path, warn)]
        self.file.seek(0)
        for line in self.file if self.array is None else self.array:
            if line.strip():
                starts.append(place)
                tasks.append(tuple((re.search(rb'"%s": ?"(.*?)"' % name, line) or (b"", b""))[1]
                                   for name in (b"kind", b"task", b"skill")))  # fmt: skip
                found.update(re.findall(rb'"licences": ?\[(.*?)\]', line))
            place += len(line)
        expect(starts, path, "at least one row", "none")
        self.starts = np.array([*starts, place], np.int64)
        names = sorted(set(tasks))
        self.tasks = [tuple(name.decode(errors="replace") for name in told) for told in names]
        number = {told: i for i, told in enumerate(names)}
        self.task = np.array([number[told] for told in tasks])  # of each row: which of them
        quoted = {name for text in found for name in re.findall(rb'"([^"]+)"', text)}
        self.licences = sorted(name.decode(errors="replace") for name in quoted)

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
        except (ValueError, BadInput) as mistake:
            raise BadInput(f"{where}: {mistake}") from None


@dataclass
class Example:
    id: str
    task: str
    ids: list[int]
    clips: list  # as the row names them; later their samples, or what was kept of them
    learned: list[float]
    row: dict = None  # of a corpus, where labels are learned


def lay_out(row, net, root, weight, lead=1.0) -> Example:
    """Tokens and clips of a row, in the order in which the text names them. lead: how much of an
    answer counts what leads to its verdict."""
    messages, hears = conversation(row), net.config.max_seconds
    samples = [clip_samples(clip, root) for clip in row["clips"]]
    for clip, n in zip(row["clips"], samples):
        expect(n_slots(n, hears), f"clip {clip}", "at least 321 samples", n)
    slots = [net.config.resampler.get("slots", n_slots(n, hears)) for n in samples]
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
        if not self.folder:
            return load_clip(clip, self.root)
        path = self.folder / f"{self.name(clip)}.safetensors"
        if path.exists():
            with open_tensors(path) as file:
                kept = {key: file.get_tensor(key) for key in file.keys()}
        else:
            kept = self.work_out(load_clip(clip, self.root))
            path.parent.mkdir(parents=True, exist_ok=True)
            mine = path.with_suffix(f".{os.getpid()}")  # another rank may be at the same clip
            write_tensors(mine, kept)
            mine.replace(path)
        if self.kind == "rows":
            return kept["rows"]
        return [(kept[f"mel.{i}"], int(n)) for i, n in enumerate(kept["frames"])]

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
        found = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return digest([clip, found], {})


def digest(value, tensors) -> str:
    made = hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        made.update(name.encode())
        made.update(tensor.detach().to("cpu", torch.float32).numpy().tobytes())
    return made.hexdigest()


# ------------------------------------------------------------------------------------------------
# Lessons. Each has its rows, makes an example of one, knows how far off the network is on some of
# them, and how well it does on the dev set.


class Answers:
    """What a row asks is answered as it answers."""

    def __init__(self, net, recipe):
        self.net, self.recipe = net, recipe
        self.rows, self.root = Rows(recipe.data), Path(recipe.data).parent
        self.named = make_trainable(net, recipe)
        self.sounds = Sounds(net, self.root, recipe.cache, is_frozen(self.named))

    def lay_out(self, row, dice) -> Example | None:
        if len(row["clips"]) > self.recipe.most:
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
    for (field, part), (low, high, logarithm) in NUMBERS.items():
        value = row.get(field, {}).get(part)
        noisy = row.get("quality", {}).get("label") in ("noise", "background")
        if value is None or (field == "quality" and not noisy):
            found.append(math.nan)
            continue
        low, high, value = (math.log(x) if logarithm else x for x in (low, high, value))
        found.append((value - low) / (high - low))
    return found


class Labels:
    """Rows of a corpus, of which it is known what sounds when."""

    def __init__(self, net, recipe):
        self.net, self.recipe, self.root = net, recipe, Path(recipe.corpus).parent
        self.rows = Rows(recipe.corpus, lambda row, name, root: as_corpus(row, root))
        self.named = make_trainable(net, recipe)
        self.sounds = Sounds(net, self.root, recipe.cache, is_frozen(self.named))
        rows = [self.rows[i] for i in range(len(self.rows))]
        found = {(kind, name) for row in rows if row["split"] == "train"
                 for kind, name, _, _ in labels_of(row)}  # fmt: skip
        self.names = sorted(found)
        self.place = {name: i for i, name in enumerate(self.names)}
        self.dev = [row for row in rows if row["split"] == "dev"][: recipe.look]

    def lay_out(self, row, dice=None) -> Example | None:
        if dice and row["split"] != "train":
            return None
        slots = n_slots(clip_samples(row["path"], self.root), self.net.config.max_seconds)
        expect(slots, row["path"], "at least 321 samples", "fewer")
        ids = [self.net.config.audio_token] * slots
        return Example(row["id"], self.recipe.teach, ids, [row["path"]], [1.0] * slots, row)

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


class Names(Labels):
    """The encoder's rows are to say what sounds: each name by a head of its own, and the numbers
    by the mean over the clip. The heads are a training aid; they do not go along."""

    def __init__(self, net, recipe):
        super().__init__(net, recipe)
        torch.manual_seed(recipe.seed)
        width = net.config.encoder.width
        self.heads = nn.ModuleDict(
            {"name": nn.Linear(width, len(self.names)), "number": nn.Linear(width, len(NUMBERS))}
        ).to(net.device)
        self.named += [(f"heads.{name}", p) for name, p in self.heads.named_parameters()]

    def loss(self, examples):
        clips = [clip if isinstance(clip, list) else self.net.windows([clip])[0]
                 for e in examples for clip in e.clips]  # fmt: skip
        clips = [[self.roughened(*window) for window in clip] for clip in clips]
        rows = [x.float() for x in self.net.listen(clips)]
        hot = self.hot(examples).to(self.net.device)
        names = self.heads["name"](torch.cat(rows)).float()
        weight = torch.full((), 4.0, device=hot.device)  # most names are silent most of the time
        off = F.binary_cross_entropy_with_logits(names, hot, pos_weight=weight, reduction="sum")
        numbers = torch.tensor([numbers_of(e.row) for e in examples], device=hot.device)
        told = self.heads["number"](torch.stack([x.mean(0) for x in rows])).float().sigmoid()
        wrong = torch.where(numbers.isnan(), 0.0, told - numbers.nan_to_num()).square()
        known = (~numbers.isnan()).sum().clamp(min=1)
        return off + 20 * len(hot) * wrong.sum() / known, len(hot)

    def roughened(self, mel, frames):
        """As loud as chance has it, and half the time a few bands of the mel blotted out."""
        loud, cut, low, wide = torch.rand(4).tolist()
        mel = mel.float() + 0.2 * (loud - 0.5)
        if cut < 0.5:
            low, wide = int(low * 118), 2 + int(wide * 9)
            mel[low : low + wide] = mel.mean()
        return mel, frames

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
        apart = torch.randn(len(self.names) + len(NUMBERS), table.shape[1]) * table.std()
        said = [meaning(f" {name}") if kind not in self.UNSAID else (kind == "speaker") * apart[i]
                for i, (kind, name) in enumerate(self.names)]  # fmt: skip
        self.said, self.numbers = torch.stack(said), apart[len(self.names) :] / 2  # (names, D)
        self.times = torch.stack([moment(f"{i * SLOT:.1f}") / 2 for i in range(750)])  # (Q, D)

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


def is_frozen(named) -> bool:
    """Whether nobody trains the encoder."""
    return not any(name.startswith("audio_tower") for name, _ in named)


def macro(tasks) -> float:
    return sum(tasks.values()) / max(1, len(tasks))


# ------------------------------------------------------------------------------------------------
# The plan: which examples a step reads, and which rank which of them. It depends on (seed, epoch)
# alone. Out of a buffer of examples come rows of at most `tokens` tokens and `batch` examples: each
# begins with the example that has waited longest and takes the longest that still fits, until none
# does. An epoch is over when the buffer is empty; only then the next one is read.

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
        self.epoch, self.taken, self.over, self.bad = 0, 0, 0, set()
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

    def shuffled(self):
        """The rows of an epoch in its order; of the last one perhaps a part."""
        dice = np.random.default_rng((self.recipe.seed, self.epoch))
        numbers = np.arange(len(self.rows))
        if self.drawn is not None:
            times = np.floor(self.drawn + dice.random(len(numbers))).astype(int)
            numbers = numbers.repeat(times)
        order = dice.permutation(numbers)
        share = 1 if self.recipe.steps else min(1, self.recipe.epochs - self.epoch)
        return order[: max(0, round(share * len(order)))]

    def fill(self):
        while len(self.waiting) < BUFFER and len(self.order):
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
            self.skip(f"{name}{mistake}", self.quiet)

    def skip(self, mistake, quiet=False):
        """A bad row is named and left out; more than one in a hundred are no accident."""
        self.bad.add(mistake)
        if not quiet:
            warn(f"left out: {mistake}")
        few = len(self.bad) <= max(1, len(self.rows) / 100) and len(self.bad) < len(self.rows)
        many = f"{len(self.bad)} of {len(self.rows)}, the last {mistake}"
        expect(few, self.rows.path, "at most 1 % of bad rows", many)

    def row(self) -> list[Example]:
        """The next packed row; empty at the end."""
        self.fill()
        room, taken = self.recipe.tokens, []
        for number, example in self.longest_after_oldest():
            if len(example.ids) <= room and len(taken) < self.recipe.batch:
                taken.append(self.waiting.pop(number))
                room -= len(example.ids)
        return taken

    def longest_after_oldest(self):
        oldest, *others = self.waiting.items() if self.waiting else [None]
        return [oldest, *sorted(others, key=lambda pair: -len(pair[1].ids))] if oldest else []

    def step(self) -> list[list[Example]]:
        """As many rows as it takes to hold `batch` examples; what they are over counts for the
        next step. Empty at the end."""
        rows, count = [], self.over
        while count < self.recipe.batch and (row := self.row()):
            rows.append(row)
            count += len(row)
        self.over = count - self.recipe.batch
        return rows


EVEN = 1.05  # what the busiest rank may have to do, by the mean


def shared(rows, ranks, tokens) -> list[list]:
    """A step's rows by rank. Where whole rows cannot be shared evenly, as nine by eight, their
    examples are, and every rank packs its own."""
    parts = dealt(rows, ranks, lambda row: sum(len(e.ids) for e in row))
    loads = [sum(len(e.ids) for row in part for e in row) for part in parts]
    if max(loads) * ranks <= EVEN * sum(loads):
        return parts
    examples = [e for row in rows for e in row]
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
    """The largest first, each into the first row that has room."""
    rows = []
    for example in examples:
        held = (row for row in rows if sum(len(e.ids) for e in row) + len(example.ids) <= tokens)
        row = next(held, None)
        if row is None:
            rows.append(row := [])
        row.append(example)
    return rows


AHEAD = 2  # steps whose clips are being decoded while one is trained on


@dataclass
class Step:
    rows: list[list[Example]]  # this rank's, their clips decoded
    ids: list[str]  # of all ranks' examples
    tokens: int  # in them
    room: int  # for tokens in the rows that were planned
    place: dict  # where the plan is after it
    last: bool = False


def decoded(plan, rank, ranks):
    """The plan's steps as one rank sees them."""
    queue, tokens = deque(), plan.recipe.tokens
    with ThreadPoolExecutor(plan.recipe.workers) as pool:
        while (rows := plan.step()) or queue:
            if rows:
                mine = shared(rows, ranks, tokens)[rank]
                mine = [[pool.submit(load, plan, e) for e in row] for row in mine]
                ids = [e.id for row in rows for e in row]
                held = sum(len(e.ids) for row in rows for e in row)
                queue.append(Step(mine, ids, held, len(rows) * tokens, plan.place))
            if len(queue) > AHEAD or not rows:
                step = queue.popleft()
                heard = [[e for future in row if (e := future.result())] for row in step.rows]
                ended = not rows and not queue
                yield replace(step, rows=[row for row in heard if row], last=ended)


def load(plan, example) -> Example | None:
    """With its clips, decoded. One that cannot be decoded takes its example with it."""
    net, sounds = plan.lesson.net, plan.lesson.sounds
    try:
        heard = {repr(clip): sounds(clip) for clip in example.clips}
        clips = [heard[repr(clip)] for clip in example.clips]
        slots, places = sum(map(net.n_slots, clips)), example.ids.count(net.config.audio_token)
        expect(slots == places, "clips", f"{places} slots, as their headers say", slots)
    except BadInput as mistake:
        plan.skip(f"{example.id}: {mistake}")
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
    apart = ("embed", "lm_head", "heads.")  # rows that come up a few at a time
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
        starts = tuple(map(str.strip, recipe.trains.split(",")))
        for name, p in net.named_parameters():
            p.requires_grad_(name.startswith(starts) and not name.endswith("positions.weight"))
    net.language_model.recompute = bool(recipe.recompute)
    return [(name, p) for name, p in net.named_parameters() if p.requires_grad]


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
    rows = [rows[number] for number in range(min(TOLD, len(rows)))]
    texts = (text for row in rows for text in said_in(row))
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
# Checkpoints: what is trained, what the optimizers remember of it, the place in the data. Chance
# has no state of its own: it depends on (seed, step, rank).

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
    for name, p in named:
        found = tuple(table[f"p.{name}"].shape) if f"p.{name}" in table else "none"
        expect(found == tuple(p.shape), f"{path}: {name}", f"the recipe's {tuple(p.shape)}", found)
        with torch.no_grad():
            p.copy_(table[f"p.{name}"])
    parameters = dict(named)
    for key, value in table.items():
        kind, _, rest = key.partition(".")
        field, _, name = rest.partition(".")
        if kind == "s" and name in parameters:
            p = parameters[name]  # AdamW counts its steps on the CPU
            owner[id(p)].state[p][field] = value.to(p.device) if value.ndim else value
    return about


# ------------------------------------------------------------------------------------------------
# One step, and a look at how well it goes.


def gradients(lesson, rows, ranks, dtype) -> tuple[float, float, float, list[str]]:
    """Leave the step's mean gradient in every parameter, on every rank the same. -> mean loss, of
    how many tokens (weighed), whether anybody wants to stop, and the examples of this rank whose
    loss is no number."""
    net, named = lesson.net, lesson.named
    said = torch.zeros(3, device=net.device)  # summed loss, weight, wishes to stop
    lost = []
    for row in rows:
        with torch.autocast(net.device.type, dtype, enabled=dtype != net.dtype):
            loss, weight = lesson.loss(row)
        loss.backward()
        said += torch.tensor([loss.item(), weight, 0.0], device=net.device)
        lost += [] if math.isfinite(loss.item()) else [e.id for e in row]
    said[2] = float(STOPPED.asked)
    params = [p for _, p in named]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([part.float().flatten() for part in parts] + [said])
    loss, weight, wishes = ranks.sum(flat)[-3:].tolist()
    for p, mean in zip(params, flat[:-3].split([p.numel() for p in params])):
        p.grad = (mean / max(weight, 1)).view_as(p).to(p.dtype)
    return loss / max(weight, 1), weight, wishes, lost


class Stop:
    """Ctrl-C or a polite kill: the step that is under way is finished and saved. A second one does
    not wait for that; but torchrun passes on what the terminal has told everybody already."""

    asked = 0

    def __call__(self, number, frame):
        if self.asked and "TORCHELASTIC_RUN_ID" not in os.environ:
            sys.exit(128 + number)
        self.asked = number


STOPPED = Stop()


# ------------------------------------------------------------------------------------------------
# The loop.

PATIENCE = 3  # steps in a row whose gradient is no number


def train(net, recipe, ranks, resumed=False) -> bool:
    """-> whether it came to its end, or somebody wished it to stop."""
    out, state = Path(recipe.out), {"step": 0, "best": -1.0, "place": None}
    out.mkdir(parents=True, exist_ok=True)
    lesson = LESSONS[recipe.teach](net, recipe)
    named = lesson.named
    opts = optimizers(recipe, named)
    full = [[group["lr"] for group in opt.param_groups] for opt in opts]
    if resumed and checkpoints(out):
        state = load_state(checkpoints(out)[-1], named, opts)
    plan = Plan(recipe, lesson, state["place"], quiet=ranks.rank > 0)
    same = {name: getattr(recipe, name) for name in SAME} | {"rows": len(plan.rows)}
    found = state.setdefault("plan", same)
    expect(found == same, "--resume", f"the plan of the run so far, {found}", same)
    steps = recipe.steps or math.ceil(recipe.epochs * len(plan.rows) / recipe.batch)
    if ranks.rank == 0:
        begin(lesson, recipe, plan, ranks, steps, state["step"])
    dtype = torch.bfloat16 if is_half(recipe, net.device) else net.dtype
    meter, wrong, wishes = Meter(steps, state["step"], state.get("minutes", 0.0)), 0, 0
    net.train()
    for step in decoded(plan, ranks.rank, ranks.count):
        if (done := state["step"]) >= steps:
            break
        torch.manual_seed(hash((recipe.seed, done, ranks.rank)) & 0x7FFFFFFF)
        loss, weight, wishes, lost = gradients(lesson, step.rows, ranks, dtype)
        share = rate(recipe, done, steps)
        norm = update(opts, full, named, recipe.clip, share, loss)
        wrong = 0 if math.isfinite(norm + loss) else wrong + 1
        if wrong:
            report(done, wrong, sum(ranks.gather(lost), []) or step.ids, ranks.rank)
        state = {**state, "step": done + 1, "place": step.place}
        meter.add(step, len(plan.bad), wrong > 0)
        ended = done + 1 >= steps or wishes > 0 or step.last
        if (done + 1) % recipe.every == 0 or ended:
            due = ended or (done + 1) % (recipe.every * recipe.looks) == 0
            tasks = look(lesson, ranks) if recipe.dev and due and not wishes else {}
            better = tasks and macro(tasks) > state["best"]
            state["best"] = macro(tasks) if better else state["best"]
            state |= {"tasks": tasks, "minutes": meter.minutes}
            if ranks.rank == 0:
                meter.tell(out, loss, recipe.lr * share, norm, net.device, tasks)
                for folder in [out / "best", out] if better else [out]:
                    save_run(net, recipe, folder)
                save_state(out, named, opts, state)
        if ended:
            break
    if ranks.rank == 0 and recipe.gate and not wishes:
        tell_gate(recipe, state.get("tasks", {}))
    if STOPPED.asked:
        sys.exit(128 + STOPPED.asked)
    return not wishes


# Of a run that is gone on with.
SAME = ("seed", "batch", "tokens", "teach", "text", "bare", "view", "most", "tasks")


def look(lesson, ranks) -> dict:
    lesson.net.eval()
    with torch.no_grad():
        tasks = lesson.look(ranks)
    lesson.net.train()
    return tasks


def tell_gate(recipe, tasks):
    """What a phase was to reach, and what it did not."""
    low = [f"{task} {right:.2f}" for task, right in tasks.items() if right < recipe.gate]
    passed = macro(tasks) >= recipe.gate
    said = f"gate {recipe.gate}: {'passed' if passed else 'NOT passed'}, with {macro(tasks):.3f}"
    print(clean(said + (f"; below it: {', '.join(low)}" if low else "")), file=sys.stderr)
    with open(Path(recipe.out) / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps({"gate": recipe.gate, "passed": passed, "dev": tasks}) + "\n")


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


class Meter:
    """What a run says of itself, on the terminal and as JSON, one line each time."""

    def __init__(self, steps, done, before=0.0):
        self.steps, self.first, self.done = steps, done, done
        self.begun, self.examples, self.tokens, self.room = time.monotonic(), 0, 0, 0
        self.bad, self.skipped, self.before = 0, 0, before
        self.show = progress("training", steps, done, "steps", 1)

    def add(self, step, bad, skipped):
        self.done += 1
        self.examples += len(step.ids)
        self.tokens += step.tokens
        self.room += step.room
        self.bad, self.skipped = bad, self.skipped + skipped
        self.show(1)

    @property
    def minutes(self) -> float:
        """Of the whole run, earlier parts of it too."""
        return round(self.before + (time.monotonic() - self.begun) / 60, 2)

    def tell(self, out, loss, lr, norm, device, tasks):
        seconds = time.monotonic() - self.begun
        left = seconds / max(1, self.done - self.first) * (self.steps - self.done)
        line = {
            "step": self.done, "loss": number(loss, 6), "lr": lr, "norm": number(norm, 4),
            "examples/s": round(self.examples / seconds, 1),
            "tokens/s": round(self.tokens / seconds),
            "fill": round(self.tokens / max(1, self.room), 4),
            "memory_gb": round(memory(device) / 1e9, 2), "left_min": round(left / 60, 1),
            "minutes": self.minutes,
            "bad_rows": self.bad, "skipped_steps": self.skipped,
        }  # fmt: skip
        print("  ".join(f"{name} {value}" for name, value in line.items()), file=sys.stderr)
        if tasks:
            told = "  ".join(f"{task} {right:.2f}" for task, right in tasks.items())
            print(clean(f"  dev {macro(tasks):.3f}: {told}"), file=sys.stderr)
        with open(out / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps({**line, "dev": tasks}) + "\n")


def number(value, digits) -> float | None:
    """JSON knows no NaN."""
    return round(value, digits) if math.isfinite(value) else None


def cut_log(path, done):
    """Steps after the checkpoint are done once more, and say so once more."""
    lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
    whole = (line for line in lines if line.endswith("}\n"))
    with written(path) as file:
        file.writelines(line for line in whole if json.loads(line).get("step", done + 1) <= done)


def memory(device) -> int:
    """The most that was held, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def begin(lesson, recipe, plan, ranks, steps, done):
    """Say what this run is: on what, how much, whose data, and one example as a reader would see
    it. Keep that beside what comes of it."""
    net = lesson.net
    total = sum(p.numel() for p in net.parameters())
    trained = sum(p.numel() for _, p in lesson.named)
    laid_out = (plan.lay_out(place) for place in range(len(plan.order)))
    example = next(example for example in laid_out if example)
    for line in (
        f"on {ranks.count} x {net.device}, {kernels.chosen()} kernels, torch {torch.__version__}",
        f"parameters: {total:,}, trained: {trained:,}",
        f"code: {git_hash()}",
        f"licences: {', '.join(plan.rows.licences) or 'none stated'}",
        f"steps: {steps}" + (f", from {done}" if done else ""),
        f"{example.id}: {spelled(net, example.ids)}",
    ):
        print(clean(line, keep="\n"), file=sys.stderr)
    about = {"code": git_hash(), "licences": plan.rows.licences}
    write_json(Path(recipe.out) / "train.json", {**asdict(recipe), **about})
    cut_log(Path(recipe.out) / "log.jsonl", done)


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
# The small model's run: its phases, each a run of its own in a folder of its own, the last one in
# the run's.


def run_phases(recipe, given, device, ranks):
    """given: the fields that flags have set; they hold in every phase."""
    out, base = Path(recipe.out), Path(recipe.out) / "base"
    if ranks.rank == 0 and not (base / "model.safetensors").exists():
        from_nothing(recipe, base)
    ranks.gather("the base is there")
    for name in PHASES:
        own = {field: value for field, value in PHASES[name].items() if field not in given}
        folder = phase_folder(out, name)
        phase = replace(recipe, **own, base=str(base), out=str(folder))
        if not finished(phase):
            if ranks.rank == 0:
                print(clean(f"phase {name}: {told(own)}"), file=sys.stderr)
            net = PolyAudio.from_dir(base, device, torch.float32)
            if not train(net, phase, ranks, resumed=True):
                return
            ranks.gather("all of it is written")
        base = folder


def phase_folder(out, name) -> Path:
    return Path(out) if name == list(PHASES)[-1] else Path(out) / name


def begin_again(recipe, first):
    """Forget that phase and what came of it."""
    for name in list(PHASES)[list(PHASES).index(first) :]:
        for path in phase_folder(recipe.out, name).glob("state-*"):
            path.unlink()


def finished(recipe) -> bool:
    there = checkpoints(Path(recipe.out))
    return bool(there) and read_json(there[-1].with_suffix(".json"))["step"] >= recipe.steps


def told(fields) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in fields.items())


# What the parts are for: the last phase again, shorter, with one thing changed. The encoder and
# what is worked out with it are the same in all. The last two arms train nothing: they ask the
# first one's network otherwise.
ARMS = {
    "interleaved": {}, "concatenated": {"view": "concat"}, "no index": {"view": "no-index"},
    "no boundary": {"view": "no-boundary"}, "at most 2": {"most": 2}, "at most 3": {"most": 3},
    "at most 4": {"most": 4}, "perceiver of 16": {},
}  # fmt: skip
ASKED = ("permuted", "late fusion")
SEEDS = 2
ARM = {"steps": 560, "gate": 0.0, "looks": 1000, "look": 1000}  # about 12 minutes on two cores


def run_ablations(recipe, given, device, ranks):
    base = Path(recipe.out) / "join"
    expect((base / "model.safetensors").exists(), base, "what the phase join left", "nothing")
    found = {}
    for seed, arm in product(range(recipe.seed, recipe.seed + SEEDS), ARMS):
        folder = Path(recipe.out) / "ablate" / f"{arm.replace(' ', '-')}-{seed}"
        own = {k: v for k, v in {**PHASES["answer"], **ARM}.items() if k not in given}
        own |= {**ARMS[arm], "seed": seed, "out": str(folder), "base": str(base)}
        made = replace(recipe, **own)
        if "perceiver" in arm:
            made = replace(made, base=str(folder / "base"))
            if ranks.rank == 0 and not Path(made.base).exists():
                with_perceiver(base, made.base, 16, seed)
            ranks.gather("the base is there")
        if not finished(made):
            if ranks.rank == 0:
                print(clean(f"arm {arm}, seed {seed}: {told(ARMS[arm])}"), file=sys.stderr)
            net = PolyAudio.from_dir(made.base, device, torch.float32)
            if not train(net, made, ranks, resumed=True):
                return
            ranks.gather("all of it is written")
        last = checkpoints(folder)[-1].with_suffix(".json")
        found.setdefault(arm, []).append(read_json(last)["tasks"])
        if arm == "interleaved":
            kept = folder / "asked.json"
            asked = read_json(kept) if kept.exists() else ask_otherwise(made, folder, device, ranks)
            if ranks.rank == 0:
                write_json(kept, asked)
            for how, tasks in asked.items():
                found.setdefault(how, []).append(tasks)
    if ranks.rank == 0:
        for arm, runs in found.items():
            scores = [macro(tasks) for tasks in runs]
            print(f"{arm:<16}" + "".join(f"{score:>8.3f}" for score in scores))
        write_json(Path(recipe.out) / "ablate" / "table.json", found)


def ask_otherwise(recipe, folder, device, ranks) -> dict:
    """The clips in another order; and, for late fusion, each clip captioned by itself, then the
    question on the captions."""
    lesson = Answers(PolyAudio.from_dir(folder, device, torch.float32).eval(), recipe)

    def permuted(row):
        return reordered(row) if len(row["clips"]) > 1 else row

    def fused(row):
        return view_captioned(row, lesson.ask(each_alone(row)))

    with torch.no_grad():
        tasks = [lesson.look(ranks, change) for change in (permuted, fused)]
    return dict(zip(ASKED, tasks))


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
    So on a CPU this program begins again, by torchrun."""
    cores = min(os.cpu_count() or 1, 8)
    if device.type != "cpu" or cores == 1 or "WORLD_SIZE" in os.environ:
        return
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cores)]
    os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


# ------------------------------------------------------------------------------------------------
# What a run would take, from the configuration and the data alone.


def run_dry(recipe, args):
    for name, value in (("devices", args.devices), ("flops", args.flops)):
        expect(0 < value < math.inf, f"--{name}", "a number above 0", value)
    expect(recipe.base, "--dry-run", "a --base", "none")
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
    epochs = recipe.steps * recipe.batch / len(plan.rows) if recipe.steps else recipe.epochs
    examples = epochs * len(plan.rows)
    tokens = sum(len(e.ids) for e in sample) / len(sample) * len(plan.rows)
    work = sum(work_of(net, recipe, lesson.root, e) for e in sample) / len(sample) * examples
    hours = work / args.flops / args.devices / 3600
    weights = base * (width if recipe.lora else 4)
    kept = kept_bytes(net.config, recipe, width)
    files = (KEPT * 3 + 2) * trained * 4  # each with AdamW's two; the run itself, and the best
    for line in (
        f"steps: {recipe.steps or math.ceil(examples / recipe.batch):,} of {recipe.batch} examples",
        f"tokens of an epoch: {tokens:,.0f}, {sum(len(e.ids) for e in sample) / len(sample):,.0f} "
        f"an example, by {len(sample)} of {len(plan.rows):,}",
        f"hours: {hours:,.2f} on {args.devices} x {args.flops:g} FLOP/s (--devices, --flops), for "
        f"{work:.3g} FLOP in all",
        f"parameters: {total:,}, trained: {trained:,}",
        f"memory of each device: about {(weights + 16 * trained + kept) / 1e9:.2f} GB: weights "
        f"{weights / 1e9:.2f}, what is trained {16 * trained / 1e9:.2f} (itself or its float32 "
        f"gradient, twice, and AdamW's two), activations {kept / 1e9:.2f}",
        f"disk: about {files / 1e6:,.2f} MB for {KEPT} checkpoints, the run and the best",
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
    run, out = Path(args.merge), Path(args.out)
    net = PolyAudio.from_dir(
        run, dtype={"bf16": torch.bfloat16, "f32": torch.float32}.get(args.dtype)
    )
    taken = out.resolve() in (net.dir, run.resolve())
    expect(not taken, "--out", "a folder other than what is merged", out)
    net.save(out)
    phases = {name: phase_folder(run, name) for name in PHASES} if (run / "base").exists() else {}
    lines = []
    for name, folder in (phases or {"": run}).items():
        path = folder / "log.jsonl"
        told = path.read_text(encoding="utf-8").splitlines() if path.exists() else ()
        lines += [({"phase": name} if name else {}) | json.loads(line) for line in told]
    if (run / "train.json").exists():
        with written(out / "log.jsonl") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        with written(out / "README.md") as file:
            file.write(card(net, out.resolve().name, read_json(run / "train.json"), lines))
    print(clean(f"{out}: one plain checkpoint"))


def card(net, name, made, lines) -> str:
    """What a checkpoint says of itself: what it is, what it comes from, how well it did."""
    bound = [name for name in made["licences"] if re.search(r"(?i)\bNC\b|research", name)]
    gates = [line for line in lines if "gate" in line and "phase" in line]
    base = "nothing" if gates else f"`{made['base']}`"
    minutes = {line.get("phase"): line["minutes"] for line in lines if "minutes" in line}
    tasks = next((line["dev"] for line in reversed(lines) if line.get("dev")), {})
    small = [
        "Its encoder learned from labels of what sounds when; the heads for that are not in here.",
        "It knows the toy world that synth.py makes and no other sound: real recordings, other",
        "voices and other words are beyond it. It is for reading how such a model is built.", "",
        "What each phase reached on the dev set, and what was wanted:", "",
        *(f"- {line['phase']}: {macro(line['dev']):.3f}, {line['gate']}" for line in gates), "",
    ]  # fmt: skip
    return "\n".join([
        f"# {name}", "",
        f"{sum(p.numel() for p in net.parameters()):,} parameters in the layout of "
        f"{net.config.kind}. It answers questions about several sounds at once:", "",
        "    python sample.py --clips A.wav B.wav --weights DIR", "",
        f"Made from {base} by train.py of {made['code']}, on `{made['data']}`, in "
        f"{sum(minutes.values()):.0f} minutes; log.jsonl tells of them.",
        f"Licences of the data: {', '.join(made['licences']) or 'none stated'}."
        + (f" Not for commerce: {', '.join(bound)}; nor are these weights." if bound else ""), "",
        *(small if gates else ()),
        *(["On the dev set at the end, by task:", ""] if tasks else ()),
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
    for path in (recipe.data, recipe.dev):
        if path:
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
    for field in fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(
            flag,
            type=type(field.default),
            metavar="X",
            help=f"recipe's own, {getattr(RECIPES['tiny'], field.name)!r} for tiny",
        )
    args = parser.parse_args()
    recipe = recipe_of(args)
    if args.merge:
        return run_merge(args)
    check_recipe(recipe)
    if args.dry_run:
        return run_dry(recipe, args)
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    if not recipe.base and on_cpu and shutil.which(os.environ.get("CXX", "g++")):
        os.environ.setdefault("POLYAUDIO_KERNELS", "compiled")  # before the first ask
    device = find_device(args.device)
    resume = args.resume or args.from_phase or args.ablate
    expect(not (recipe.base and (args.from_phase or args.ablate)), "--from-phase, --ablate",
           "the recipe tiny, from nothing", f"--base {recipe.base}")  # fmt: skip
    there = [path for path in Path(recipe.out).glob("**/state-*.json")]
    step = max((read_json(path)["step"] for path in there), default=0)
    found = f"that of step {step}" if there else ""
    expect(resume or not there, recipe.out, "--resume, or no checkpoint there", found)
    if not recipe.base:
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
            if args.from_phase and ranks.rank == 0:
                begin_again(recipe, args.from_phase)
            ranks.gather("forgotten")
            run = run_ablations if args.ablate else run_phases
            run(recipe, given_fields(args), device, ranks)
    if ranks.count > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main)
