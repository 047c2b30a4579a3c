"""Train: from a base that knows one clip to a model that reasons over several.

    python train.py --base weights/af3 --data data/mine/train.jsonl             on one GPU
    torchrun --nproc-per-node 8 train.py --base weights/af3 --data ...          on eight
    python train.py --base weights/af3 --data ... --resume                      after a kill
    python train.py --base weights/af3 --data ... --dry-run                     what it would take
    python train.py --recipe mallm --base weights/qwen2-audio                   pairs, as MALLM did
    python train.py --merge runs/polyaudio --out weights/polyaudio              one plain checkpoint

A step reads `batch` examples, whatever the number of ranks: they are packed into rows of about
`tokens` tokens, the rows go to the ranks so that all have as much to do, and the summed gradients
meet in one all-reduce. So the same seed gives the same steps on one GPU and on eight.

The ideas, in order: recipes; examples as tokens, of which only the answers are learned; the plan,
which packs them; optimizers; ranks; checkpoints; one step; the loop; what a run would take.
"""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby, islice
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the core to others

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

import kernels  # noqa: E402
from model import (  # noqa: E402
    ENCODER_FRAMES, Config, PolyAudio, answer_all, find_device, write_tensors,
)  # fmt: skip
from prepare import (  # noqa: E402
    RATE, BadInput, Parser, as_example, check_fits, clean, cli, clip_order, clip_samples,
    conversation, expect, load_clip, n_slots, open_tensors, progress, read_json, read_rows,
    read_values, score, warn, write_json, written,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Recipes. Every field is a flag of the same name.


@dataclass(frozen=True)
class Recipe:
    base: str = "weights/af3"  # folder of weights to start from
    data: str = "data/toy/train.jsonl"
    dev: str = "data/toy/bench-dev.jsonl"  # what is asked on the way; "" for nothing
    out: str = "runs/polyaudio"
    seed: int = 0
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
    every: int = 100  # steps between two looks at the dev set and checkpoints
    look: int = 210  # examples of a look
    dtype: str = "auto"  # f32 or bf16; auto: bf16 on a GPU, f32 elsewhere


RECIPES = {
    "polyaudio": Recipe(),  # the paper's section 4.1; it leaves rank and number of steps open
    "mallm": Recipe(base="weights/qwen2-audio", data="data/mallm/train.jsonl", dev="",
                    out="runs/mallm", lora="all", lr=5e-5, batch=16, epochs=5),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Examples. A row of the file becomes ids, clips, and for each id what learning it counts: nothing
# for the prompt, 1 for what an answer says, `weight` for its verdict.


class Rows:
    """The rows of a file by number: only where each begins is kept, eight bytes a row. A JSON array
    has no lines to count; its rows are kept as text."""

    def __init__(self, path):
        try:
            self.file = open(path, "rb")
        except OSError as error:
            flags = " --train 0 --split dev" if "-dev" in str(path) else ""
            hint = f"; python synth.py{flags} makes it" if "toy" in str(path) else ""
            raise BadInput(f"{path}: cannot be read ({error.strerror}){hint}") from None
        expect(Path(path).is_file(), path, "a file of rows", "something else")
        self.path, self.array, starts, place, found = path, None, [], 0, set()
        if self.file.read(1 << 16).lstrip().startswith(b"["):
            self.array = [json.dumps(row).encode() for _, row in read_values(path, warn)]
        self.file.seek(0)
        for line in self.file if self.array is None else self.array:
            if line.strip():
                starts.append(place)
                found.update(re.findall(rb'"licences": ?\[(.*?)\]', line))
            place += len(line)
        expect(starts, path, "at least one row", "none")
        self.starts = np.array([*starts, place], np.int64)
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
            return as_example(row, f"{Path(self.path).stem}-{number + 1}", Path(self.path).parent)
        except (ValueError, BadInput) as mistake:
            raise BadInput(f"{where}: {mistake}") from None


@dataclass
class Example:
    id: str
    task: str
    ids: list[int]
    clips: list  # as the row names them; later their samples, or their rows of the encoder
    learned: list[float]


def lay_out(row, net, root, weight) -> Example:
    """Tokens and clips of a row, in the order in which the text names them."""
    messages, hears = conversation(row), net.config.max_seconds
    samples = [clip_samples(clip, root) for clip in row["clips"]]
    for clip, n in zip(row["clips"], samples):
        expect(n_slots(n, hears), f"clip {clip}", "at least 321 samples", n)
    slots = [net.config.resampler.get("slots", n_slots(n, hears)) for n in samples]
    ids, learned = [], []
    for piece, answer in net.tokenizer.prompt_pieces(messages, slots, net.layout):
        counts = verdict_weights(net.tokenizer, piece, weight) if answer else [0.0] * len(piece)
        ids += piece
        learned += counts
    while learned and not learned[-1] and ids[-1] != net.config.audio_token:
        ids.pop()  # what follows the last answer is not read by anybody
        learned.pop()
    check_fits(len(ids), slots, net.config.decoder.context)
    expect(any(learned), "messages", "an answer to learn", "none")
    order = [i - 1 for i in clip_order(messages, len(slots))]
    return Example(row["id"], row["task"], ids, [row["clips"][i] for i in order], learned)


def verdict_weights(tokenizer, piece, weight) -> list[float]:
    """An answer ends in "... answer is: verdict."; what is behind that colon weighs more, with the
    token that ends the turn. One that says no "answer" is all of the same weight."""
    found = re.fullmatch(r"(?is).*\banswer\b[^:]*:(.*)", tokenizer.decode(piece))
    tail = len(tokenizer.encode(found[1])) + 1 if found else 0
    return [1.0] * (len(piece) - tail) + [float(weight)] * tail


# ------------------------------------------------------------------------------------------------
# The plan: which examples a step reads, and which rank which of them. It depends on (seed, epoch)
# alone. Out of a buffer of examples come rows of at most `tokens` tokens and `batch` examples: each
# begins with the example that has waited longest and takes the longest that still fits, until none
# does. An epoch is over when the buffer is empty; only then the next one is read.

BUFFER = 512  # examples


class Plan:
    """Steps, one after another. `place` says where it is: another run can go on from there."""

    def __init__(self, recipe, net, place=None, quiet=False):
        self.recipe, self.net, self.quiet = recipe, net, quiet
        self.rows, self.root = Rows(recipe.data), Path(recipe.data).parent
        self.epoch, self.taken, self.over, self.bad = 0, 0, 0, set()
        self.waiting = {}  # number of a row -> its example, longest-waiting first
        self.order = self.shuffled()
        if place:
            self.epoch, self.taken, self.over = (place[k] for k in ("epoch", "taken", "over"))
            self.order = self.shuffled()
            laid_out = ((n, self.lay_out(n)) for n in place["waiting"])
            self.waiting = {n: example for n, example in laid_out if example}

    @property
    def place(self) -> dict:
        waiting = list(map(int, self.waiting))
        return {"epoch": self.epoch, "taken": self.taken, "over": self.over, "waiting": waiting}

    def shuffled(self):
        """The rows of an epoch in its order; of the last one perhaps a part."""
        order = np.random.default_rng((self.recipe.seed, self.epoch)).permutation(len(self.rows))
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
            number = self.order[self.taken]
            self.taken += 1
            if example := self.lay_out(number):
                self.waiting[number] = example

    def lay_out(self, number) -> Example | None:
        name = ""
        try:
            row = self.rows[number]
            name = f"{self.recipe.data}: row {number + 1} ({row['id']}): "
            example = lay_out(row, self.net, self.root, self.recipe.weight)
            fits = len(example.ids) <= self.recipe.tokens
            expect(fits, "--tokens", "room for the longest example", f"one of {len(example.ids)}")
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
        expect(few, self.recipe.data, "at most 1 % of bad rows", many)

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
    """With the clips as samples. A clip that cannot be decoded takes its example with it."""
    try:
        waves = {repr(clip): load_clip(clip, plan.root) for clip in example.clips}
        clips = [waves[repr(clip)] for clip in example.clips]
        slots, places = (
            sum(map(plan.net.n_slots, clips)),
            example.ids.count(plan.net.config.audio_token),
        )
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
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                change = orthogonal(p.grad.lerp(mean, group["momentum"]))
                change *= max(1, p.shape[0] / p.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"]).sub_(change, alpha=group["lr"])


def orthogonal(g, steps=5):
    """(out, in) -> about U V' of its singular value decomposition."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def optimizers(recipe, named) -> list:
    matrices = [p for name, p in named if recipe.muon and p.ndim == 2 and "embed" not in name]
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
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
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
        net.requires_grad_(True)
    net.language_model.recompute = bool(recipe.recompute)
    return [(name, p) for name, p in net.named_parameters() if p.requires_grad]


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


def gradients(net, rows, ranks, named, dtype) -> tuple[float, float, float, list[str]]:
    """Leave the step's mean gradient in every parameter, on every rank the same. -> mean loss, of
    how many tokens (weighed), whether anybody wants to stop, and the examples of this rank whose
    loss is no number."""
    said = torch.zeros(3, device=net.device)  # summed loss, weight, wishes to stop
    lost = []
    for row in rows:
        with torch.autocast(net.device.type, dtype, enabled=dtype != net.dtype):
            loss, weight = net.loss([(e.ids, e.clips, e.learned) for e in row])
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


def look(net, recipe, ranks, count) -> dict:
    """Scores on the first examples of the dev set, by task; each rank asks its share."""
    rows = list(islice((r for r in read_rows(recipe.dev, warn) if "gold" in r), count))
    mine, root = rows[ranks.rank :: ranks.count], Path(recipe.dev).parent

    def asked():
        for i, row in enumerate(mine):
            try:
                yield i, conversation(row)[:-1], [load_clip(c, root) for c in row["clips"]]
            except BadInput as mistake:
                warn(f"{recipe.dev}: {row['id']}: {mistake}")

    net.eval()
    found = []
    for i, answer in answer_all(net, asked(), max_new_tokens=200):
        right = None if isinstance(answer, BadInput) else score(mine[i]["gold"], answer)
        found.append((mine[i]["task"], right or 0.0))
    net.train()
    tasks = {}
    for task, right in sum(ranks.gather(found), []):
        tasks.setdefault(task, []).append(right)
    return {task: sum(scores) / len(scores) for task, scores in sorted(tasks.items())}


def macro(tasks) -> float:
    return sum(tasks.values()) / max(1, len(tasks))


# ------------------------------------------------------------------------------------------------
# The loop.

PATIENCE = 3  # steps in a row whose gradient is no number


def train(net, recipe, ranks, resumed=False):
    out, state = Path(recipe.out), {"step": 0, "best": -1.0, "place": None}
    out.mkdir(parents=True, exist_ok=True)
    named = make_trainable(net, recipe)
    opts = optimizers(recipe, named)
    full = [[group["lr"] for group in opt.param_groups] for opt in opts]
    if resumed and checkpoints(out):
        state = load_state(checkpoints(out)[-1], named, opts)
    plan = Plan(recipe, net, state["place"], quiet=ranks.rank > 0)
    same = {
        "seed": recipe.seed,
        "batch": recipe.batch,
        "tokens": recipe.tokens,
        "rows": len(plan.rows),
    }
    found = state.setdefault("plan", same)
    expect(found == same, "--resume", f"the plan of the run so far, {found}", same)
    steps = recipe.steps or math.ceil(recipe.epochs * len(plan.rows) / recipe.batch)
    if ranks.rank == 0:
        begin(net, recipe, plan, named, ranks, steps, state["step"])
    dtype = torch.bfloat16 if is_half(recipe, net.device) else net.dtype
    meter, wrong = Meter(steps, state["step"]), 0
    net.train()
    for step in decoded(plan, ranks.rank, ranks.count):
        if (done := state["step"]) >= steps:
            break
        torch.manual_seed(hash((recipe.seed, done, ranks.rank)) & 0x7FFFFFFF)
        loss, weight, wishes, lost = gradients(net, step.rows, ranks, named, dtype)
        share = rate(recipe, done, steps)
        norm = update(opts, full, named, recipe.clip, share, loss)
        wrong = 0 if math.isfinite(norm + loss) else wrong + 1
        if wrong:
            report(done, wrong, sum(ranks.gather(lost), []) or step.ids, ranks.rank)
        state = {**state, "step": done + 1, "place": step.place}
        meter.add(step, len(plan.bad), wrong > 0)
        ended = done + 1 >= steps or wishes > 0 or step.last
        if (done + 1) % recipe.every == 0 or ended:
            tasks = look(net, recipe, ranks, recipe.look) if recipe.dev and not wishes else {}
            better = tasks and macro(tasks) > state["best"]
            state["best"] = macro(tasks) if better else state["best"]
            if ranks.rank == 0:
                meter.tell(out, loss, recipe.lr * share, norm, net.device, tasks)
                for folder in [out / "best", out] if better else [out]:
                    save_run(net, recipe, folder)
                save_state(out, named, opts, state)
        if ended:
            break
    if STOPPED.asked:
        sys.exit(128 + STOPPED.asked)


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

    def __init__(self, steps, done):
        self.steps, self.first, self.done = steps, done, done
        self.begun, self.examples, self.tokens, self.room = time.monotonic(), 0, 0, 0
        self.bad, self.skipped = 0, 0
        self.show = progress("training", steps, done, "steps", 1)

    def add(self, step, bad, skipped):
        self.done += 1
        self.examples += len(step.ids)
        self.tokens += step.tokens
        self.room += step.room
        self.bad, self.skipped = bad, self.skipped + skipped
        self.show(1)

    def tell(self, out, loss, lr, norm, device, tasks):
        seconds = time.monotonic() - self.begun
        left = seconds / max(1, self.done - self.first) * (self.steps - self.done)
        line = {
            "step": self.done, "loss": number(loss, 6), "lr": lr, "norm": number(norm, 4),
            "examples/s": round(self.examples / seconds, 1),
            "tokens/s": round(self.tokens / seconds),
            "fill": round(self.tokens / max(1, self.room), 4),
            "memory_gb": round(memory(device) / 1e9, 2), "left_min": round(left / 60, 1),
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
        file.writelines(line for line in whole if json.loads(line)["step"] <= done)


def memory(device) -> int:
    """The most that was held, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def begin(net, recipe, plan, named, ranks, steps, done):
    """Say what this run is: on what, how much, whose data, and one example as a reader would see
    it. Keep that beside what comes of it."""
    total = sum(p.numel() for p in net.parameters())
    trained = sum(p.numel() for _, p in named)
    laid_out = (plan.lay_out(n) for n in range(len(plan.rows)))
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


def git_hash() -> str:
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
            capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "no git here"
    return run.stdout.strip() or "no git here"


# ------------------------------------------------------------------------------------------------
# What a run would take, from the configuration and the data alone.


def run_dry(recipe, args):
    for name, value in (("devices", args.devices), ("flops", args.flops)):
        expect(0 < value < math.inf, f"--{name}", "a number above 0", value)
    with torch.device("meta"):
        net = PolyAudio(Config.from_dir(recipe.base))
    net.dir = Path(recipe.base).resolve()
    device = find_device(args.device)
    width = 2 if is_half(recipe, device) else 4
    base = sum(p.numel() for p in net.parameters())
    trained = sum(p.numel() for _, p in make_trainable(net, recipe))
    total = sum(p.numel() for p in net.parameters())
    plan = Plan(recipe, net)
    plan.fill()
    sample = list(plan.waiting.values())
    epochs = recipe.steps * recipe.batch / len(plan.rows) if recipe.steps else recipe.epochs
    examples = epochs * len(plan.rows)
    tokens = sum(len(e.ids) for e in sample) / len(sample) * len(plan.rows)
    work = sum(work_of(net, recipe, plan.root, e) for e in sample) / len(sample) * examples
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
    """In the type of the base's own file, bf16 mostly."""
    expect(args.out, "--merge", "--out, the folder of the checkpoint to be", "none")
    net = PolyAudio.from_dir(args.merge, dtype=None)
    taken = Path(args.out).resolve() in (net.dir, Path(args.merge).resolve())
    expect(not taken, "--out", "a folder other than what is merged", args.out)
    net.save(args.out)
    print(clean(f"{args.out}: one plain checkpoint"))


def recipe_of(args) -> Recipe:
    given = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    return replace(RECIPES[args.recipe], **given)


def check_recipe(recipe):
    """Fields that would fail later, or train something else than was meant."""
    share = "a share, 0 to 1"
    for name, fine, wanted in (
        ("lora", recipe.lora in ("", *TARGETS), f"nothing, {' or '.join(TARGETS)}"),
        ("dtype", recipe.dtype in ("auto", "f32", "bf16"), "auto, f32 or bf16"),
        ("seed", recipe.seed >= 0, "0 or more"),
        *((name, 0 < getattr(recipe, name) < math.inf, "a number above 0")
          for name in ("rank", "alpha", "batch", "tokens", "lr", "clip", "workers", "every",
                       "look", "weight")),
        ("epochs", recipe.steps > 0 or 0 < recipe.epochs < math.inf, "a number above 0"),
        ("steps", recipe.steps >= 0, "0 or more"),
        ("muon", 0 <= recipe.muon < math.inf, "0 or more"),
        *((name, 0 <= getattr(recipe, name) <= 1, share) for name in ("warmup", "hold", "floor")),
    ):  # fmt: skip
        expect(fine, f"--{name}", wanted, repr(getattr(recipe, name)))
    if recipe.dev:
        Rows(recipe.dev)


def differs(name, recipe) -> str:
    """The recipe by its name, and what is not as it says."""
    own = asdict(RECIPES[name])
    changed = [f"{k} {v!r}" for k, v in asdict(recipe).items() if v != own[k]]
    return f"recipe {name}" + (", but " + ", ".join(changed) if changed else " as it is")


def main():
    parser = Parser(
        description=__doc__.split("\n\n")[0], epilog="Flags of a recipe have its values."
    )
    parser.add_argument("--recipe", choices=RECIPES, default="polyaudio")
    parser.add_argument("--resume", action="store_true", help="go on where a run was stopped")
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
            help=f"recipe's own, {getattr(RECIPES['polyaudio'], field.name)!r} for polyaudio",
        )
    args = parser.parse_args()
    recipe = recipe_of(args)
    if args.merge:
        return run_merge(args)
    check_recipe(recipe)
    if args.dry_run:
        return run_dry(recipe, args)
    device = find_device(args.device)
    ranks = join_ranks(device)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, STOPPED)
    there = checkpoints(Path(recipe.out))
    found = f"that of step {read_json(there[-1].with_suffix('.json'))['step']}" if there else ""
    expect(args.resume or not there, recipe.out, "--resume, or no checkpoint there", found)
    if ranks.rank == 0:
        print(clean(differs(args.recipe, recipe)), file=sys.stderr)
    frozen_half = is_half(recipe, device) and recipe.lora  # what is trained stays in float32
    dtype = torch.bfloat16 if frozen_half else torch.float32
    train(PolyAudio.from_dir(recipe.base, device, dtype), recipe, ranks, args.resume)
    if ranks.count > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main)
