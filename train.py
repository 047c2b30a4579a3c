"""Train: from a base to a model that reasons over several clips, or a small one from nothing.

    python synth.py && python train.py                          the small one, on a laptop
    python train.py --resume                                    and go on after a kill
    python train.py --recipe polyaudio --base weights/af3 --data data/mine/train.jsonl
    torchrun --nproc-per-node 8 train.py --recipe polyaudio --base weights/af3 --data ...
    python train.py --recipe polyaudio --base weights/af3 --data ... --dry-run    what it would take
    python train.py --merge runs/polyaudio --out weights/polyaudio                one plain checkpoint

A step reads `batch` examples, whatever the number of ranks: they are packed into rows of about
`tokens` tokens, the rows go to the ranks so that all have as much to do, and the summed gradients
meet in one all-reduce. So the same seed gives the same steps on one GPU and on eight.

The ideas, in order: recipes; examples as tokens, of which only the answers are learned; packing;
hearing before reasoning, with labels that only the toy world has; the optimizer; checkpoints; the
loop.
"""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import groupby, islice
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the core to others

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

import kernels  # noqa: E402
from model import PolyAudio, answer_all, find_device, write_tensors  # noqa: E402
from prepare import (  # noqa: E402
    BadInput, Parser, as_example, clean, cli, clip_order, clip_samples, conversation, expect,
    load_clip, n_slots, open_tensors, read_json, read_rows, score, warn, write_json,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Recipes. Every field is a flag of the same name.


@dataclass(frozen=True)
class Recipe:
    base: str = ""  # folder of weights to start from; without one, SHAPE, from nothing
    data: str = "data/toy/train.jsonl"
    dev: str = "data/toy/bench-dev.jsonl"  # what is asked on the way; "" for nothing
    out: str = "runs/tiny"
    seed: int = 0
    lora: str = ""  # where adapters go: decoder, or all (but the audio encoder); "" trains it all
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
    recompute: int = 0  # 1: keep only each layer's input and compute the rest again
    cache: int = 0  # 1: keep what a frozen encoder made of each clip, in memory
    workers: int = 4  # threads that decode ahead
    every: int = 100  # steps between two looks at the dev set and checkpoints
    look: int = 210  # examples of a look
    dtype: str = "auto"  # f32 or bf16; auto: bf16 on a GPU, f32 elsewhere


RECIPES = {
    "tiny": Recipe(batch=32, tokens=4096, lr=3e-3, muon=0.01, hold=0.4, floor=0.02, weight=2.0,
                   cache=1, every=500),
    "polyaudio": Recipe(base="weights/af3", out="runs/polyaudio", lora="decoder", recompute=1),
    "mallm": Recipe(base="weights/qwen2-audio", data="data/mallm/train.jsonl", dev="",
                    out="runs/mallm", lora="all", lr=5e-5, batch=16, epochs=5, recompute=1),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Examples. A row of the file becomes ids, clips, and for each id what learning it counts: nothing
# for the prompt, 1 for what an answer says, `weight` for its verdict.


class Rows:
    """The rows of a file by number: only where each begins is kept, eight bytes a row."""

    def __init__(self, path):
        try:
            self.file = open(path, "rb")
        except OSError as error:
            hint = "; python synth.py makes it" if "toy" in str(path) else ""
            raise BadInput(f"{path}: cannot be read ({error.strerror}){hint}") from None
        self.path, starts, place = path, [], 0
        for line in self.file:
            if line.strip():
                starts.append(place)
            place += len(line)
        expect(starts, path, "at least one row", "none")
        self.starts = np.array(starts, np.int64)

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, number) -> dict:
        start = int(self.starts[number])
        line = os.pread(self.file.fileno(), 1 << 24, start).split(b"\n", 1)[0]
        where = f"{self.path}: row {number + 1}"
        try:
            row = json.loads(line)
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
    while learned and not learned[-1]:  # what follows the last answer is not read by anybody
        ids.pop()
        learned.pop()
    expect(any(learned), "messages", "an answer to learn", "none")
    order = [i - 1 for i in clip_order(messages, len(slots))]
    return Example(row["id"], row["task"], ids, [row["clips"][i] for i in order], learned)


def verdict_weights(tokenizer, piece, weight) -> list[float]:
    """An answer ends in "... answer: verdict."; what is behind the last colon weighs more."""
    if weight == 1:
        return [1.0] * len(piece)
    text = tokenizer.decode(piece)
    tail = len(tokenizer.encode(text.rpartition("answer")[2])) if "answer" in text.lower() else 0
    return [1.0] * (len(piece) - tail) + [weight] * tail


# ------------------------------------------------------------------------------------------------
# The plan: which examples a step reads, and which rank which of them. It depends on (seed, epoch)
# alone. Out of a buffer of examples come rows of at most `tokens` tokens: each begins with the
# example that has waited longest and takes the longest that still fits, until none does.

BUFFER = 512  # examples


class Plan:
    """Steps, one after another. `place` says where it is: another run can go on from there."""

    def __init__(self, recipe, net, place=None):
        self.recipe, self.net = recipe, net
        self.rows, self.root = Rows(recipe.data), Path(recipe.data).parent
        self.epoch, self.taken, self.over, self.bad = 0, 0, 0, Counter()
        self.waiting = {}  # number of a row -> its example, longest-waiting first
        self.order = self.shuffled()
        if place:
            self.epoch, self.taken, self.over = (place[k] for k in ("epoch", "taken", "over"))
            self.order = self.shuffled()
            self.waiting = {n: self.lay_out(n) for n in place["waiting"]}

    @property
    def place(self) -> dict:
        waiting = list(map(int, self.waiting))
        return {"epoch": self.epoch, "taken": self.taken, "over": self.over, "waiting": waiting}

    def shuffled(self):
        """The rows of an epoch in its order; of the last one perhaps a part."""
        order = np.random.default_rng((self.recipe.seed, self.epoch)).permutation(len(self.rows))
        share = 1 if self.recipe.steps else min(1, self.recipe.epochs - self.epoch)
        return order[: max(0, math.ceil(share * len(order)))]

    def fill(self):
        while len(self.waiting) < BUFFER and len(self.order):
            if self.taken == len(self.order):
                self.epoch, self.taken = self.epoch + 1, 0
                self.order = self.shuffled()
                continue
            number = self.order[self.taken]
            self.taken += 1
            if example := self.lay_out(number):
                self.waiting[number] = example

    def lay_out(self, number):
        try:
            return lay_out(self.rows[number], self.net, self.root, self.recipe.weight)
        except BadInput as mistake:
            self.skip(mistake)

    def skip(self, mistake):
        """A bad row is named and left out; more than one in a hundred are no accident."""
        self.bad[str(mistake)] += 1
        warn(f"left out: {mistake}")
        read = self.epoch * len(self.rows) + self.taken
        few = len(self.bad) <= max(3, read / 100)
        expect(few, self.recipe.data, "at most 1 % of bad rows", f"{len(self.bad)} of {read}")

    def row(self) -> list[Example]:
        """The next packed row; empty at the end."""
        self.fill()
        room, taken = self.recipe.tokens, []
        for number, example in self.longest_after_oldest():
            if len(example.ids) <= room or not taken:
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


def shared(rows, ranks) -> list[list]:
    """A step's rows by rank: the largest first, each to whoever has least so far."""
    loads, parts = [0] * ranks, [[] for _ in range(ranks)]
    for row in sorted(rows, key=lambda row: -sum(len(e.ids) for e in row)):
        least = loads.index(min(loads))
        parts[least].append(row)
        loads[least] += sum(len(e.ids) for e in row)
    return parts


AHEAD = 2  # steps whose clips are being decoded while one is trained on


def decoded(plan, rank, ranks):
    """(this rank's rows with their clips decoded, the step's ids, the place after it, its fill)"""
    queue = deque()
    with ThreadPoolExecutor(plan.recipe.workers) as pool:
        while (rows := plan.step()) or queue:
            if rows:
                mine = [
                    [pool.submit(load, plan, e) for e in row] for row in shared(rows, ranks)[rank]
                ]
                tokens = sum(len(e.ids) for row in rows for e in row)
                ids = [e.id for row in rows for e in row]
                queue.append((mine, ids, plan.place, tokens / len(rows) / plan.recipe.tokens))
            if len(queue) > AHEAD or not rows:
                mine, *about = queue.popleft()
                heard = [[e for future in row if (e := future.result())] for row in mine]
                yield [row for row in heard if row], *about


def load(plan, example) -> Example | None:
    """With the clips as samples. A clip that cannot be decoded takes its example with it."""
    try:
        waves = {repr(clip): load_clip(clip, plan.root) for clip in example.clips}
    except BadInput as mistake:
        plan.skip(f"{example.id}: {mistake}")
        return None
    return replace(example, clips=[waves[repr(clip)] for clip in example.clips])


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
            try:
                dist.all_reduce(flat)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise BadInput(f"rank {self.rank}: another rank is gone ({reason})") from None
        return flat

    def gather(self, value) -> list:
        """Everybody's value, in the order of the ranks."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values


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

EVERYTHING = r"(?!.*audio_tower)(?!lm_head).*"  # all linears but the encoder's and the head


def make_trainable(net, recipe) -> list:
    """-> (name, parameter) of all that is trained, in the order of the network."""
    if net.config.encoder:
        net.layout = "polyaudio"  # the clip's index beside it, between BOA and EOA
    if recipe.lora:
        torch.manual_seed(recipe.seed)  # the same adapters on every rank
        rows = net.tokenizer.boundaries if net.config.encoder else ()
        targets = {"decoder": None, "all": EVERYTHING}[recipe.lora]
        net.add_lora(recipe.rank, recipe.alpha, targets, rows=rows or ())
    else:
        net.requires_grad_(True)
    net.language_model.recompute = bool(recipe.recompute)
    return [(name, p) for name, p in net.named_parameters() if p.requires_grad]


# ------------------------------------------------------------------------------------------------
# Checkpoints: what is trained, what the optimizers remember of it, and the place in the data. Chance
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
    write_json(
        path.with_suffix(".json"), about
    )  # the last to be written: without it, no checkpoint
    for old in checkpoints(out)[:-KEPT]:
        old.with_suffix(".json").unlink()
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
        held = set(file.keys())
        missing = [name for name, _ in named if f"p.{name}" not in held]
        expect(not missing, path, "the parameters of this recipe", f"none for {missing[:1]}")
        for name, p in named:
            with torch.no_grad():
                p.copy_(file.get_tensor(f"p.{name}"))
            for key in [key for key in held if key.startswith("s.") and key.endswith("." + name)]:
                value = file.get_tensor(key).to(p.device)
                owner[id(p)].state[p][key[2 : -len(name) - 1]] = value
    return about


# ------------------------------------------------------------------------------------------------
# One step, and a look at how well it goes.


def gradients(net, rows, ranks, named, dtype) -> tuple[float, float, float]:
    """Leave the step's mean gradient in every parameter, on every rank the same. -> mean loss, of
    how many tokens (weighed), and whether anybody wants to stop."""
    said = torch.zeros(3, device=net.device)  # summed loss, weight, wishes to stop
    for row in rows:
        with torch.autocast(net.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss, weight = net.loss([(e.ids, e.clips, e.learned) for e in row])
        loss.backward()
        said += torch.tensor([loss.item(), weight, 0.0], device=net.device)
    said[2] = float(STOPPED.asked)
    params = [p for _, p in named]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([part.float().flatten() for part in parts] + [said])
    loss, weight, wishes = ranks.sum(flat)[-3:].tolist()
    for p, mean in zip(params, flat[:-3].split([p.numel() for p in params])):
        p.grad = (mean / max(weight, 1)).view_as(p).to(p.dtype)
    return loss / max(weight, 1), weight, wishes


class Stop:
    """Ctrl-C or a polite kill: the step that is under way is finished and saved."""

    asked = 0

    def __call__(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number


STOPPED = Stop()


def look(net, recipe, ranks, count) -> dict:
    """Scores on the first examples of the dev set, by task; each rank asks its share."""
    rows = list(islice((r for r in read_rows(recipe.dev) if "gold" in r), count))
    mine, root = rows[ranks.rank :: ranks.count], Path(recipe.dev).parent
    asked = ((i, conversation(row)[:-1], [load_clip(c, root) for c in row["clips"]])
             for i, row in enumerate(mine))  # fmt: skip
    net.eval()
    found = []
    for i, answer in answer_all(net, asked, max_new_tokens=200):
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
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    named, done, best, place = make_trainable(net, recipe), 0, 0.0, None
    opts = optimizers(recipe, named)
    if resumed and checkpoints(out):
        about = load_state(checkpoints(out)[-1], named, opts)
        done, best, place = about["step"], about["best"], about["place"]
    plan = Plan(recipe, net, place)
    steps = recipe.steps or math.ceil(recipe.epochs * len(plan.rows) / recipe.batch)
    dtype = torch.bfloat16 if recipe.dtype == "bf16" else net.dtype
    if ranks.rank == 0:
        print_header(net, recipe, plan, named, ranks, steps, done)
    full = [[group["lr"] for group in opt.param_groups] for opt in opts]
    meter, wrong = Meter(steps, done), 0
    net.train()
    for rows, ids, place, fill in decoded(plan, ranks.rank, ranks.count):
        if done >= steps:
            break
        torch.manual_seed(hash((recipe.seed, done, ranks.rank)) & 0x7FFFFFFF)
        loss, weight, wishes = gradients(net, rows, ranks, named, dtype)
        norm = nn.utils.clip_grad_norm_([p for _, p in named], recipe.clip).item()
        share = rate(recipe, done, steps)
        for opt, rates in zip(opts, full):
            for group, lr in zip(opt.param_groups, rates):
                group["lr"] = lr * share
            if math.isfinite(norm + loss):
                opt.step()
            opt.zero_grad(set_to_none=True)
        wrong = 0 if math.isfinite(norm + loss) else wrong + 1
        if wrong:
            warn(f"step {done}: the gradient is no number, and the step is left out")
        last = f"{PATIENCE} steps in a row without one, the last on {', '.join(ids[:5])}, ..."
        expect(wrong < PATIENCE, f"step {done}", "a finite gradient", last)
        done += 1
        meter.add(len(ids), sum(len(e.ids) for row in rows for e in row) * ranks.count, fill)
        ended = done >= steps or wishes > 0
        if done % recipe.every == 0 or ended:
            tasks = look(net, recipe, ranks, recipe.look) if recipe.dev and not wishes else {}
            better, best = macro(tasks) > best, max(best, macro(tasks))
            if ranks.rank == 0:
                about = {"step": done, "best": best, "place": place}
                save_state(out, named, opts, about)
                save_run(net, recipe, out)
                if better:
                    write_tensors(out / "best.safetensors", state_tensors(named, ()))
                meter.tell(out, loss, recipe.lr * share, norm, net.device, tasks)
        if ended:
            break
    if STOPPED.asked:
        sys.exit(128 + STOPPED.asked)


def save_run(net, recipe, out):
    """What sample.py and judge.py load: the adapter, or all of it."""
    (net.save_adapter if recipe.lora else net.save)(out)


class Meter:
    """What a run says of itself, on the terminal and as JSON, one line each time."""

    def __init__(self, steps, done):
        self.steps, self.first, self.done = steps, done, done
        self.begun, self.examples, self.tokens, self.fills = time.monotonic(), 0, 0, []

    def add(self, examples, tokens, fill):
        self.done += 1
        self.examples += examples
        self.tokens += tokens
        self.fills.append(fill)

    def tell(self, out, loss, lr, norm, device, tasks):
        seconds = time.monotonic() - self.begun
        left = seconds / max(1, self.done - self.first) * (self.steps - self.done)
        line = {
            "step": self.done, "loss": round(loss, 4), "lr": lr, "norm": round(norm, 3),
            "examples/s": round(self.examples / seconds, 1),
            "tokens/s": round(self.tokens / seconds),
            "fill": round(sum(self.fills) / max(1, len(self.fills)), 4),
            "memory": f"{memory(device) / 1e9:.2f} GB", "left": f"{left / 60:.0f} min",
        }  # fmt: skip
        print("  ".join(f"{name} {value}" for name, value in line.items()), file=sys.stderr)
        if tasks:
            told = "  ".join(f"{task} {right:.2f}" for task, right in tasks.items())
            print(f"  dev {macro(tasks):.3f}: {told}", file=sys.stderr)
        with open(out / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps({**line, "dev": tasks}) + "\n")


def memory(device) -> int:
    """The most that was held, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def print_header(net, recipe, plan, named, ranks, steps, done):
    """What this run is: what differs from its recipe, on what, how much, whose data, and one
    example as a reader would see it."""
    total = sum(p.numel() for p in net.parameters())
    trained = sum(p.numel() for _, p in named)
    licences = Counter()
    for row in islice(read_rows(recipe.data, lambda mistake: None), 2000):
        licences.update(row["licences"])
    example = lay_out(plan.rows[0], net, plan.root, recipe.weight)
    for line in (
        f"on {ranks.count} x {net.device}, {kernels.chosen()} kernels, torch {torch.__version__}",
        f"parameters: {total:,}, trained: {trained:,}",
        f"code: {git_hash()}",
        f"licences: {', '.join(sorted(licences)) or 'none stated'}",
        f"steps: {steps}" + (f", from {done}" if done else ""),
        f"{example.id}: {spelled(net, example.ids)}",
    ):
        print(clean(line, keep="\n"), file=sys.stderr)


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
# The command line.


def run_merge(args):
    net = PolyAudio.from_dir(args.merge)
    net.save(args.out)
    print(clean(f"{args.out}: one plain checkpoint"))


def recipe_of(args) -> Recipe:
    given = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    return replace(RECIPES[args.recipe], **given)


def main():
    parser = Parser(
        description=__doc__.split("\n\n")[0], epilog="Flags of a recipe have its values."
    )
    parser.add_argument("--recipe", choices=RECIPES, default="tiny")
    parser.add_argument("--resume", action="store_true", help="go on where a run was stopped")
    parser.add_argument(
        "--merge", metavar="RUN", help="fold a run's adapter into its base, at --out"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what a run would take")
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
    device = find_device(args.device)
    ranks = join_ranks(device)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, STOPPED)
    net = PolyAudio.from_dir(recipe.base, device, torch.float32)
    train(net, recipe, ranks, args.resume)


if __name__ == "__main__":
    cli(main)
