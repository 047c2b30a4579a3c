"""What train.py promises: what is learned and what is not, the plan, the same steps on any number
of ranks and after any kill, and adapters that others read as we do.

The base is a small random one with a tokenizer of its own; the clips are noise. So nothing is
learned here but by heart, and numbers that should be the same are.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import prepare
import pytest
import soundfile
import torch
import train
from model import PolyAudio
from peft import PeftModel
from prepare import BadInput
from safetensors.torch import load_file
from tests.checkpoints import edit_json, make, oracle_logits, rewrite
from tests.conftest import ROOT
from train import RECIPES, Example, Plan, Ranks, shared

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'layout'."),
]
SPECIALS = {
    "af3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<sound>", "[BOA]", "[EOA]"],
    "qwen2_audio": [
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>",
        "<|audio_eos|>",
    ],
}  # fmt: skip
SENTENCES = [
    "Which clip is the louder one of them all?", "audio 1: a dog barks; audio 2: rain, water.",
    "The answer is: audio 2.", "user\nassistant\nsystem\n(audio 1: )(audio 2: )(audio 3: )",
]  # fmt: skip
TASKS = ("loudest", "odd", "order")
FLAGS = {"tokens": 200, "batch": 4, "workers": 2, "lr": 1e-3, "every": 2, "dev": "", "steps": 6}


def speaking(kind, dir):
    """A small random base that can be asked in words."""
    make(kind, dir)
    prepare.train_bpe(SENTENCES, 400, SPECIALS[kind], dir)
    ids = prepare.Tokenizer.from_dir(dir).special
    name = {"af3": "audio_token_id", "qwen2_audio": "audio_token_index"}[kind]
    edit_json(dir / "config.json", **{name: ids[SPECIALS[kind][3]]})
    edit_json(dir / "generation_config.json", eos_token_id=ids["<|im_end|>"])


def make_rows(n, clips, seed=0) -> list[dict]:
    dice, rows = random.Random(seed), []
    for i in range(n):
        chosen = dice.sample(clips, dice.randint(1, 3))
        right = dice.randint(1, len(chosen))
        rows.append({
            "id": f"row-{i}", "task": TASKS[i % 3], "skill": "comparison", "clips": chosen,
            "question": "Which clip is the louder one" + " of them" * dice.randint(0, 9) + "?",
            "answer": f"audio 1: rain. The answer is: audio {right}.",
            "gold": {"type": "clip", "value": right}, "source": "noise",
            "licences": ["CC0-1.0" if i else "CC-BY-4.0"], "meta": {},
        })  # fmt: skip
    return rows


def write_rows(path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """weights/, clips, and 40 rows on them."""
    home, dice = tmp_path_factory.mktemp("train"), np.random.default_rng(0)
    speaking("af3", home / "weights")
    clips = [f"{i}.wav" for i in range(12)]
    for i, name in enumerate(clips):
        wave = 0.1 * dice.standard_normal(4000 + 800 * i)
        soundfile.write(home / name, wave.astype(np.float32), 16000)
    write_rows(home / "train.jsonl", make_rows(40, clips))
    write_rows(home / "dev.jsonl", make_rows(6, clips, seed=1))
    return home


@pytest.fixture
def recipe(home, tmp_path):
    """polyaudio in small."""
    given = {**FLAGS, "base": str(home / "weights"), "data": str(home / "train.jsonl")}
    return replace(RECIPES["polyaudio"], **given, out=str(tmp_path / "run"), rank=4, alpha=8)


@pytest.fixture(autouse=True)
def fresh():
    prepare.warn.cache_clear()
    train.STOPPED.asked, train.STOPPED.saved = 0, False


def net_of(recipe) -> PolyAudio:
    return PolyAudio.from_dir(recipe.base)


def learning(recipe, net=None):
    """A lesson: its network, and what is trained of it."""
    return train.LESSONS[recipe.teach](net or net_of(recipe), recipe)


def plan_of(recipe, place=None) -> Plan:
    return Plan(recipe, learning(recipe), place)


def heard(plan, n) -> list[Example]:
    """The plan's first n examples, their clips decoded."""
    plan.fill()
    return [train.load(plan, example) for example in list(plan.waiting.values())[:n]]


def as_given(examples):
    return [(e.ids, e.clips, e.learned) for e in examples]


def flags(recipe, **more) -> list[str]:
    """A recipe as words for the command line."""
    names = ("base", "data", "out", "rank", "alpha", *FLAGS)
    given = {name: getattr(recipe, name) for name in names} | more
    return ["--recipe", "polyaudio", *(f"--{name}={value}" for name, value in given.items())]


def script(*words, **env) -> subprocess.Popen:
    """train.py in a process of its own, one thread each: the sums are then the same."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in env.items()}}
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = [sys.executable, *map(str, words)]
    return subprocess.Popen(words, env=env, cwd=ROOT, start_new_session=True, **out)


def finish(process, code=0, seconds=100) -> str:
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, err[-2000:]
    assert "Traceback" not in err, err
    return err


def ranked(count, *words):
    """train.py on several ranks, as torchrun starts them, without its own watching."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count}
    return [script("train.py", *words, **where, RANK=rank) for rank in range(count)]


def log_of(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def losses(out) -> dict:
    lines = [line for line in log_of(out) if "loss" in line]
    assert len({line["step"] for line in lines}) == len(lines), "a step is told once"
    return {line["step"]: line["loss"] for line in lines}


def adapter(out) -> dict:
    return load_file(Path(out) / "adapter_model.safetensors")


def furthest(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def unbroken(home, tmp_path_factory):
    """A run of six steps in one process, a checkpoint every second."""
    given = {**FLAGS, "base": str(home / "weights"), "data": str(home / "train.jsonl")}
    out = tmp_path_factory.mktemp("unbroken") / "run"
    made = replace(RECIPES["polyaudio"], **given, out=str(out), rank=4, alpha=8)
    err = finish(script("train.py", *flags(made, dev=home / "dev.jsonl")))
    return SimpleNamespace(recipe=made, out=out, err=err)


# ------------------------------------------------------------------------------------------------
# What is learned.


def test_one_batch_is_learned_by_heart(recipe):
    lesson = learning(recipe)
    net, named = lesson.net, lesson.named
    frozen = {n: p.detach().clone() for n, p in net.named_parameters() if not p.requires_grad}
    opts = train.optimizers(replace(recipe, lr=1e-2), named)
    rows = [heard(Plan(recipe, lesson), 4)]
    found = []
    for _ in range(60):
        loss = train.gradients(lesson, rows, Ranks(), net.dtype).loss
        train.update(opts, [[1e-2]], named, 1.0, 1.0, loss)
        found.append(loss)
    assert found[0] > 3
    assert found[-1] < 0.05
    now = dict(net.named_parameters())
    assert all(torch.equal(frozen[name], now[name]) for name in frozen), "the base is untouched"
    assert {name for name, _ in named} == {name for name in now if ".lora_" in name}


@pytest.mark.parametrize("turns", [1, 2])
def test_the_answers_are_learned_and_nothing_else(recipe, turns):
    lesson = learning(recipe)
    net = lesson.net
    row = Plan(recipe, lesson).rows[0]
    said = ["audio 1: rain.", row["answer"]][-turns:]
    asked = [f"Clip {i}?" for i in range(turns)]
    pairs = [({"role": "user", "content": q}, {"role": "assistant", "content": a})
             for q, a in zip(asked, said)]  # fmt: skip
    row = {**row, "messages": [message for pair in pairs for message in pair]}
    example = train.lay_out(row, net, lesson.root, 1.0)
    turns = "".join("A" if w else "." for w in example.learned)
    spans = [match.span() for match in re.finditer("A+", turns)]
    tok, end = net.tokenizer, net.tokenizer.special["<|im_end|>"]
    assert [example.ids[a:b] for a, b in spans] == [[*tok.encode(text), end] for text in said]
    header = [tok.special["<|im_start|>"], *tok.encode("assistant\n")]
    assert all(example.ids[:a][-len(header) :] == header for a, _ in spans)
    assert len(example.ids) == spans[-1][1], "nothing is read behind the last answer"


def test_the_prompt_carries_no_loss(recipe, monkeypatch):
    """Foretelling other tokens in the prompt's places costs the same; in an answer's, not."""
    lesson = learning(recipe)
    net = lesson.net
    (example,) = heard(Plan(recipe, lesson), 1)
    seen = []
    monkeypatch.setattr(net, "surprise", lambda h, t: seen.append(t) or torch.zeros(len(t)))
    net.loss(as_given([example]))
    answer = [id for id, w in zip(example.ids, example.learned) if w]
    assert seen[0].tolist() == answer
    assert 0 < len(answer) < len(example.ids) / 2


def test_the_verdict_counts_more_and_linearly(recipe):
    lesson = learning(recipe)
    net = lesson.net
    row, root = Plan(recipe, lesson).rows[0], lesson.root
    laid_out = {w: train.lay_out(row, net, root, w) for w in (1.0, 2.0, 5.0)}
    verdict = row["answer"].rpartition(":")[2]
    heavier = [id for id, w in zip(laid_out[5.0].ids, laid_out[5.0].learned) if w == 5]
    assert net.tokenizer.decode(heavier) == verdict
    assert heavier[-1] == net.tokenizer.special["<|im_end|>"]
    sums, weights = {}, {}
    for w, example in laid_out.items():
        waves = [prepare.load_clip(clip, root) for clip in example.clips]
        with torch.no_grad():
            loss, weights[w] = net.loss([(example.ids, waves, example.learned)])
        sums[w] = loss.item()
    assert weights[5.0] - weights[1.0] == 4 * len(heavier)
    assert sums[2.0] > sums[1.0]
    assert sums[5.0] - sums[1.0] == pytest.approx(4 * (sums[2.0] - sums[1.0]), rel=1e-4)


@pytest.mark.parametrize(
    "answer, verdict",
    [("Answer: yes", " yes"), ("yes", None), ("It is: 3. The answer is: 2: 1.", " 2: 1."),
     ("audio 1: 0.3 s; audio 2: 0.7 s. That is: 0.7 s. So the answer: audio 2.",
      " That is: 0.7 s. audio 2."),
     ("audio 1: 0.3 s; audio 2: no siren. So the answer is: audio 1.", " audio 1.")],
)  # fmt: skip
def test_the_verdict_is_found_and_its_reason(recipe, answer, verdict):
    net = net_of(recipe)
    piece = [*net.tokenizer.encode(answer), net.tokenizer.special["<|im_end|>"]]
    weights = train.verdict_weights(net.tokenizer, piece, 3.0)
    heavier = [id for id, w in zip(piece, weights) if w == 3]
    assert net.tokenizer.decode(heavier) == (verdict or "")
    assert len(weights) == len(piece)


def test_an_adapter_begins_as_the_base_bit_for_bit(recipe):
    lesson = learning(recipe)
    net = lesson.net
    example = heard(Plan(recipe, lesson), 1)[0]
    with torch.no_grad():
        found = net.logits(example.ids, example.clips)
        expected = net_of(recipe).logits(example.ids, example.clips)
    assert torch.equal(found, expected)


def shaken(recipe, seed=1):
    """An adapter that does something; at its start half of its gradients are nothing."""
    lesson = learning(recipe)
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in lesson.named:
            p.add_(0.05 * torch.randn(p.shape, generator=dice))
    return lesson


def slopes(lesson, rows):
    loss = train.gradients(lesson, rows, Ranks(), torch.float32).loss
    found = {name: p.grad.clone() for name, p in lesson.named}
    for _, p in lesson.named:
        p.grad = None
    assert all(grad.abs().max() > 0 for grad in found.values())
    return loss, found


def test_packed_equals_unpacked(recipe):
    lesson = shaken(recipe)
    examples = heard(Plan(recipe, lesson), 5)
    packed, together = slopes(lesson, [examples])
    loss, apart = slopes(lesson, [[example] for example in examples])
    assert packed == pytest.approx(loss, abs=1e-5)
    assert furthest(together, apart) < 1e-5


def test_recomputing_changes_nothing(recipe):
    lesson = shaken(recipe)
    net = lesson.net
    assert net.language_model.recompute
    examples = heard(Plan(recipe, lesson), 3)
    loss, again = slopes(lesson, [examples])
    net.language_model.recompute = False
    kept, plain = slopes(lesson, [examples])
    assert loss == kept
    assert furthest(again, plain) == 0.0
    assert not learning(replace(recipe, recompute=0)).net.language_model.recompute


@pytest.mark.parametrize("recompute, times", [(1, 2), (0, 1)])
def test_what_is_not_kept_is_computed_twice(recipe, recompute, times):
    lesson = learning(replace(recipe, recompute=recompute))
    calls = []
    for layer in lesson.net.language_model.layers:
        layer.register_forward_pre_hook(lambda *given: calls.append(1))
    train.gradients(lesson, [heard(Plan(recipe, lesson), 3)], Ranks(), torch.float32)
    assert len(calls) == times * len(lesson.net.language_model.layers)


def test_a_pack_that_the_memory_has_no_room_for_is_told_in_a_line(recipe):
    lesson = learning(recipe)

    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand more")

    lesson.loss = full
    rows = [heard(Plan(recipe, lesson), 2)]
    said = "--tokens: expected packs .* found [0-9]+: CUDA out of"
    with pytest.raises(BadInput, match=said) as told:
        train.gradients(lesson, rows, Ranks(), torch.float32)
    assert "and more" not in str(told.value)


def test_loss_is_the_mean_over_what_is_learned(recipe):
    """Examples twice: twice the sum and twice the weight."""
    lesson = shaken(recipe)
    examples = heard(Plan(recipe, lesson), 2)
    once, slope = slopes(lesson, [examples])
    twice, same = slopes(lesson, [examples, examples])
    assert once == pytest.approx(twice, abs=1e-6)
    assert furthest(slope, same) < 1e-6


def test_bf16_trains_the_adapter_in_float32(recipe):
    net = PolyAudio.from_dir(recipe.base, dtype=torch.bfloat16)
    lesson = learning(recipe, net)
    named = lesson.named
    assert {p.dtype for _, p in named} == {torch.float32}
    rows = [heard(Plan(recipe, lesson), 3)]
    loss = train.gradients(lesson, rows, Ranks(), torch.bfloat16).loss
    plain = train.gradients(learning(recipe), rows, Ranks(), torch.float32).loss
    assert loss == pytest.approx(plain, abs=0.1)


# ------------------------------------------------------------------------------------------------
# The plan.


class Numbered:
    """Rows that are nothing but their number."""

    licences, path = (), "numbered"

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, number):
        return {"id": str(number), "number": number}


def lengths_like_the_real(n, seed=0):
    """Tokens of examples of 1 to 5 clips of 3 to 30 s, 25 slots a second, and some text."""
    dice, found = np.random.default_rng(seed), []
    for _ in range(n):
        kinds = dice.integers(1, 5, dice.integers(1, 6))
        seconds = [
            (0, 4, dice.uniform(3, 10), min(30, dice.lognormal(2.4, 0.5)), dice.uniform(15, 30))[k]
            for k in kinds
        ]
        found.append(int(25 * sum(seconds)) + int(dice.integers(60, 200)))
    return found


@pytest.fixture
def planned(recipe, monkeypatch):
    """A plan over examples of those lengths."""

    def plan(lengths, place=None, **changes):
        def lay_out(row, dice):
            n = row["number"]
            return Example(str(n), "", [0] * lengths[n], [], [1.0])

        wanted = np.ones(len(lengths), bool)
        lesson = SimpleNamespace(rows=Numbered(len(lengths)), lay_out=lay_out, wanted=wanted)
        return Plan(replace(recipe, **{"steps": 0, **changes}), lesson, place)

    return plan


def steps_of(plan) -> list[list[list[Example]]]:
    found = []
    while step := plan.step():
        found.append(step)
    return found


def ids_of(step) -> list[str]:
    return [e.id for row in step for e in row]


ONE = {"gold": {"type": "clip", "value": 1}}
SIZES = [(1, 10), (7, 3), (40, 4), (700, 16), (1500, 32)]


@pytest.mark.parametrize("n, batch", SIZES)
def test_no_example_is_lost_or_doubled(planned, n, batch):
    plan = planned([5 + 7 * i % 60 for i in range(n)], batch=batch, tokens=64, epochs=3.0)
    order = [id for step in steps_of(plan) for id in ids_of(step)]
    assert len(order) == 3 * n
    epochs = [order[i : i + n] for i in range(0, 3 * n, n)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(n)] for epoch in epochs)
    assert n < 7 or len(set(map(tuple, epochs))) == 3, "every epoch has an order of its own"


def test_an_epoch_and_a_half(planned):
    plan = planned([10] * 300, batch=8, tokens=64, epochs=1.5)
    count = Counter(id for step in steps_of(plan) for id in ids_of(step))
    assert Counter(count.values()) == {1: 150, 2: 150}
    tenth = planned([10] * 10, batch=8, tokens=64, epochs=1.1)
    assert sum(len(ids_of(step)) for step in steps_of(tenth)) == 11


def test_steps_go_on_over_as_many_epochs_as_it_takes(planned):
    plan = planned([10] * 5, batch=4, tokens=64, steps=20)
    found = [ids_of(plan.step()) for _ in range(20)]
    count = Counter(id for ids in found for id in ids)
    assert max(count.values()) - min(count.values()) <= 1
    assert sum(count.values()) >= 80


@pytest.mark.parametrize("batch, tokens", [(4, 10_000), (1, 10_000), (16, 100), (33, 400)])
def test_a_step_holds_a_batch_on_the_average(planned, batch, tokens):
    """Never an empty one, however many examples fit in a row."""
    plan = planned([3 + i % 40 for i in range(1000)], batch=batch, tokens=tokens)
    found = steps_of(plan)
    total = np.cumsum([len(ids_of(step)) for step in found])
    assert total[-1] == 1000
    assert all(0 <= n - batch * (i + 1) < batch for i, n in enumerate(total[:-1]))
    assert all(sum(len(e.ids) for e in row) <= tokens for step in found for row in step)


def test_the_order_depends_on_the_seed_and_the_epoch_alone(planned):
    lengths = lengths_like_the_real(700)
    how = {"batch": 16, "tokens": 8192}
    first, again = (list(map(ids_of, steps_of(planned(lengths, **how)))) for _ in range(2))
    assert first == again
    assert first != list(map(ids_of, steps_of(planned(lengths, **how, seed=1))))


@pytest.mark.parametrize("n, batch", SIZES[1:])
def test_a_plan_goes_on_from_its_place(planned, n, batch):
    lengths = [5 + 7 * i % 60 for i in range(n)]
    how = {"batch": batch, "tokens": 64, "epochs": 2.5}
    plan, places, found = planned(lengths, **how), [], []
    while step := plan.step():
        places.append(json.loads(json.dumps(plan.place)))
        found.append(ids_of(step))
    for at in sorted({0, len(found) // 3, len(found) // 2, len(found) - 2, len(found) - 1}):
        rest = steps_of(planned(lengths, places[at], **how))
        assert list(map(ids_of, rest)) == found[at + 1 :], at


def fill(rows, tokens) -> float:
    return sum(len(e.ids) for row in rows for e in row) / len(rows) / tokens


def grouped_fill(lengths, batch=8, buffer=512) -> float:
    """What batches that are padded to their longest hold, after sorting each buffer by length."""
    room = 0
    for start in range(0, len(lengths), buffer):
        part = sorted(lengths[start : start + buffer])
        room += sum(max(part[i : i + batch]) * len(part[i : i + batch])
                    for i in range(0, len(part), batch))  # fmt: skip
    return sum(lengths) / room


def test_rows_are_full(planned, capsys):
    lengths = lengths_like_the_real(20_000)
    assert 900 < np.mean(lengths) < 1200
    plan = planned(lengths, batch=128, tokens=16384)
    rows = [row for step in steps_of(plan) for row in step]
    found, grouped = fill(rows, 16384), grouped_fill(lengths)
    with capsys.disabled():
        print(f" fill {found:.4f} packed, {grouped:.4f} grouped by length", end="")
    assert found >= 0.985
    assert found > grouped


@pytest.mark.parametrize("ranks", [1, 8])
def test_the_fill_that_is_told_is_that_of_the_packs_that_run(planned, monkeypatch, ranks):
    """Where ranks pack their own, these are more, and none of them is full."""
    monkeypatch.setattr(train, "load", lambda plan, example: example)
    views = [
        list(train.decoded(planned(lengths_like_the_real(2000), batch=128, tokens=16384), r, ranks))
        for r in range(ranks)
    ]
    for steps in zip(*views):
        assert {step.room for step in steps} == {16384 * sum(len(step.packs) for step in steps)}
        assert steps[0].tokens == sum(train.length(pack) for step in steps for pack in step.packs)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_have_as_much_to_do(planned, ranks):
    plan = planned(lengths_like_the_real(5000), batch=128, tokens=16384)
    worst = []
    for step in steps_of(plan)[:-1]:
        parts = shared(step, ranks, 16384)
        assert sorted(ids_of(sum(parts, []))) == sorted(ids_of(step)), "none lost, none doubled"
        assert all(sum(len(e.ids) for e in row) <= 16384 for part in parts for row in part)
        loads = [sum(len(e.ids) for row in part for e in row) for part in parts]
        worst.append(max(loads) / np.mean(loads))
    assert np.mean(worst) <= 1.02
    assert max(worst) <= 1.05


def test_rows_that_can_be_shared_stay_whole():
    rows = [[Example(f"{i}-{j}", "", [0] * 10, [], []) for j in range(3)] for i in range(6)]
    assert sorted(map(len, shared(rows, 3, 30))) == [2, 2, 2]
    assert sorted(map(id, sum(shared(rows, 3, 30), []))) == sorted(map(id, rows))
    few = shared(rows[:1], 8, 30)
    assert [len(part) for part in few].count(1) == 3 and len(few) == 8


# --- bad rows


def spoiled(home, tmp_path, bad, n=200):
    """n rows on the clips of home, of which some are bad in one way each."""
    for clip in home.glob("*.wav"):
        shutil.copyfile(clip, tmp_path / clip.name)
    rows = make_rows(n, [f"{i}.wav" for i in range(12)])
    lines = [json.dumps(row) for row in rows]
    for number, line in bad.items():
        lines[number] = line if isinstance(line, str) else json.dumps({**rows[number], **line})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(lines) + "\n")
    return path


def test_bad_rows_are_left_out_by_name(home, recipe, tmp_path, capsys):
    bad = {3: "{broken", 50: {"clips": ["none.wav"]}}
    recipe = replace(recipe, data=str(spoiled(home, tmp_path, bad)), steps=0)
    plan = plan_of(recipe)
    found = [id for step in steps_of(plan) for id in ids_of(step)]
    assert sorted(found) == sorted(f"row-{i}" for i in range(200) if i not in bad)
    assert len(plan.rows.bad) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    for words in ("rows.jsonl: row 4: ", "rows.jsonl: row 51: clips[0]: expected a file"):
        assert [line for line in said if words in line], said


def test_more_than_one_in_a_hundred_stop_the_run(home, recipe, tmp_path):
    bad = dict.fromkeys((3, 50, 120), "[]")
    recipe = replace(recipe, data=str(spoiled(home, tmp_path, bad)), steps=0)
    with pytest.raises(BadInput, match="rows.jsonl: expected at most 1 % of bad rows, found 3 of"):
        steps_of(plan_of(recipe))


def test_all_bad_is_no_endless_search(home, recipe, tmp_path):
    recipe = replace(recipe, data=str(spoiled(home, tmp_path, {0: "?"}, n=1)))
    with pytest.raises(BadInput, match="1 of 1"):
        steps_of(plan_of(recipe))


def test_a_short_clip_and_a_long_example_are_left_out_by_name(home, recipe, tmp_path, capsys):
    path = spoiled(
        home, tmp_path, {7: {**ONE, "clips": ["short.wav"]}, 9: {"question": "why? " * 200}}
    )
    soundfile.write(tmp_path / "short.wav", np.zeros(100), 16000)
    plan = plan_of(replace(recipe, data=str(path), steps=0))
    assert sum(len(ids_of(step)) for step in steps_of(plan)) == 198
    said = capsys.readouterr().err
    assert "row 8 (row-7): clip short.wav: expected at least 321 samples" in said
    assert "row 10 (row-9): --tokens: expected room for the longest example" in said


def test_a_clip_that_cannot_be_decoded_takes_its_example_with_it(home, recipe, tmp_path, capsys):
    """Its header is whole, so only decoding tells; the others of the row stay."""
    path = spoiled(home, tmp_path, {7: {**ONE, "clips": ["0.wav", "cut.flac"]}})
    soundfile.write(tmp_path / "cut.flac", np.random.default_rng(0).uniform(-1, 1, 9000), 16000)
    whole = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[:3000])
    plan = plan_of(replace(recipe, data=str(path), steps=0, batch=20))
    steps = list(train.decoded(plan, 0, 1))
    found = [e.id for step in steps for pack in step.packs for e in pack]
    assert sorted(found) == sorted(f"row-{i}" for i in range(200) if i != 7)
    assert "row-7" in capsys.readouterr().err
    assert [step.last for step in steps] == [False] * (len(steps) - 1) + [True]


def test_rows_may_be_an_array_or_of_others(home, recipe):
    rows = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()]
    array = home / "array.json"
    array.write_text(json.dumps(rows, indent=1))
    theirs = [{"sound": row["clips"][0], "id": row["id"], "conversations": [
        {"from": "human", "value": "<sound>\n" + row["question"]},
        {"from": "gpt", "value": row["answer"]}]} for row in rows]  # fmt: skip
    plain = train.Rows(recipe.data)
    assert [train.Rows(array)[i] for i in range(40)] == [plain[i] for i in range(40)]
    assert train.Rows(array).licences == plain.licences == ["CC-BY-4.0", "CC0-1.0"]
    plan = plan_of(replace(recipe, data=str(write_rows(home / "theirs.jsonl", theirs)), steps=0))
    assert sum(len(ids_of(step)) for step in steps_of(plan)) == 40


def test_a_clip_named_twice_is_given_twice_and_decoded_once(home, recipe):
    row = make_rows(1, ["0.wav", "1.wav", "2.wav"])[0] | ONE
    row |= {"clips": ["0.wav", "1.wav"], "question": "<sound-2> or <sound-1>, <sound-2>?"}
    path = write_rows(home / "twice.jsonl", [row])
    plan = plan_of(replace(recipe, data=str(path)))
    (example,) = heard(plan, 1)
    assert [len(clip) for clip in example.clips] == [4800, 4000, 4800]
    assert example.clips[0] is example.clips[2]


def test_of_more_clips_than_are_asked_for_nothing_is_read(home, recipe, capsys):
    """And the steps are as many as the others make."""
    rows = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()]
    few = [row["id"] for row in rows if len(row["clips"]) <= 2]
    recipe = replace(recipe, most=2, steps=0)
    plan = plan_of(recipe)
    assert plan.examples == len(few) < 40
    assert sorted(id for step in steps_of(plan) for id in ids_of(step)) == sorted(few)
    in_process(recipe)
    assert losses(recipe.out).keys() >= {math.ceil(len(few) / 4)}
    assert f"rows: 40, {40 - len(few)} of them passed over" in capsys.readouterr().err


def test_tasks_that_are_drawn_more_often_take_more_steps(recipe):
    doubled = replace(recipe, steps=0, tasks="odd 2")
    assert plan_of(doubled).examples == 40 + 13
    assert sum(len(ids_of(step)) for step in steps_of(plan_of(doubled))) == 53


@pytest.mark.parametrize("steps", [0, 3])
def test_nothing_to_learn_from_is_one_line(recipe, steps):
    recipe = replace(recipe, tasks=", ".join(f"{task} 0" for task in TASKS), steps=steps)
    with pytest.raises(BadInput, match="train.jsonl: expected an example to learn from"):
        in_process(recipe)


def test_licences_of_any_spelling(home, tmp_path):
    rows = [{"licence": "CC-BY-NC-4.0"}, {"licences": ["CC0-1.0"]}, {"licences": None}, {}]
    assert train.Rows(write_rows(tmp_path / "rows", rows)).licences == ["CC-BY-NC-4.0", "CC0-1.0"]


def test_an_array_may_begin_with_a_mark(home, tmp_path):
    rows = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()]
    (tmp_path / "rows.json").write_text("\ufeff" + json.dumps(rows))
    assert len(train.Rows(tmp_path / "rows.json")) == 40


def test_depth_without_end_is_a_bad_row(home, recipe, tmp_path):
    recipe = replace(recipe, data=str(spoiled(home, tmp_path, {3: "[" * 100_000})), steps=0)
    assert sum(len(ids_of(step)) for step in steps_of(plan_of(recipe))) == 199


# --- what is kept of clips


def kept_in(recipe, tmp_path):
    return learning(replace(recipe, cache=str(tmp_path / "cache"))).sounds


def test_threads_at_one_clip_do_not_spoil_it(recipe, tmp_path):
    sounds = kept_in(recipe, tmp_path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(sounds, ["3.wav"] * 32))
    assert all(torch.equal(rows, found[0]) for rows in found)
    (file,) = sounds.folder.iterdir()
    assert file.suffix == ".safetensors", "and nothing is left beside it"


def test_what_is_half_kept_is_worked_out_again(recipe, tmp_path):
    sounds = kept_in(recipe, tmp_path)
    whole = sounds("3.wav")
    (file,) = sounds.folder.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(sounds("3.wav"), whole)
    assert torch.equal(load_file(file)["rows"], whole)


def test_where_nothing_can_be_kept_the_run_goes_on(recipe, tmp_path, monkeypatch, capsys):
    plain = train.write_tensors

    def full(path, tensors):
        if (tmp_path / "cache") in path.parents:
            raise BadInput("disk: full")
        plain(path, tensors)

    monkeypatch.setattr(train, "write_tensors", full)
    recipe = replace(recipe, cache=str(tmp_path / "cache"), steps=2)
    in_process(recipe)
    assert losses(recipe.out).keys() == {2}
    said = capsys.readouterr().err
    assert said.count("nothing more is kept there (disk: full)") == 1 and "left out" not in said


# ------------------------------------------------------------------------------------------------
# The rate.


def test_rate_goes_up_along_and_down():
    recipe = replace(RECIPES["polyaudio"], warmup=0.1, hold=0.5, floor=0.02)
    found = [train.rate(recipe, step, 100) for step in range(100)]
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert found[10:51] == [1.0] * 41
    assert all(a > b for a, b in zip(found[50:], found[51:]))
    assert found[75] == pytest.approx(0.51)
    assert found[-1] == pytest.approx(0.02, abs=2e-3)


def test_update_uses_the_share_of_the_rate_and_clips(recipe):
    p = torch.nn.Parameter(torch.zeros(4, 4))
    opts = train.optimizers(replace(recipe, lr=0.5), [("p", p)])
    p.grad = torch.full((4, 4), 10.0)
    assert train.update(opts, [[0.5]], [("p", p)], 1.0, 0.1, 1.0) == pytest.approx(40.0)
    assert p.detach().unique().tolist() == pytest.approx([-0.05], rel=1e-3)
    assert p.grad is None


def test_muon_takes_the_matrices(recipe):
    torch.manual_seed(0)
    named = [(name, torch.nn.Parameter(torch.randn(shape))) for name, shape in
             (("w", (6, 4)), ("b", (6,)), ("embed_tokens.weight", (9, 4)))]  # fmt: skip
    before = named[0][1].detach().clone()
    adam, muon = train.optimizers(replace(recipe, muon=0.1, lr=0.01), named)
    assert [len(opt.param_groups[0]["params"]) for opt in (adam, muon)] == [2, 1]
    for _, p in named:
        p.grad = torch.randn(p.shape)
    train.update([adam, muon], [[0.01], [0.1]], named, 1e9, 1.0, 1.0)
    moved = (before * (1 - 0.1 * 0.02) - named[0][1].detach()) / 0.1 / 1.5**0.5
    spread = torch.linalg.svdvals(moved)
    assert 0.6 < spread.min() and spread.max() < 1.3, "every direction as long as every other"


# ------------------------------------------------------------------------------------------------
# The loop, from the outside.


def test_the_header_and_the_log(unbroken, home):
    recipe, err = unbroken.recipe, unbroken.err
    first = err.splitlines()[0]
    assert first.startswith("recipe polyaudio, but base ")
    assert "lr 0.001" in first and "rank 4" in first
    assert "recompute" not in first and "warmup" not in first, "only what differs"
    lesson = learning(recipe)
    net, named = lesson.net, lesson.named
    total, trained = (
        sum(p.numel() for p in ps) for ps in (net.parameters(), (p for _, p in named))
    )
    for words in (
        "on 1 x cpu", f"parameters: {total:,}, trained: {trained:,}", "code: ", "steps: 6",
        "licences: CC-BY-4.0, CC0-1.0", ": <|im_start|>system\n", "user\n(audio 1: [BOA]<",
        " slots>[EOA])", "<|im_start|>assistant\naudio 1: rain. The answer is: audio ",
    ):  # fmt: skip
        assert words in err, words
    lines = log_of(unbroken.out)
    assert [line["step"] for line in lines] == [2, 2, 4, 4, 6, 6], "a line, and that of a look"
    for line, look in zip(lines[::2], lines[1::2]):
        assert set(line) == {
            "step", "loss", "lr", "norm", "examples/s", "tokens/s", "fill", "memory_gb",
            "left_min", "minutes", "bad_rows", "skipped_steps",
        }  # fmt: skip
        assert line["loss"] > 0 and line["norm"] > 0 and 0.2 < line["fill"] <= 1
        assert set(look) == {"step", "minutes", "dev"} and set(look["dev"]) == set(TASKS)
    kept = json.loads((unbroken.out / "train.json").read_text())
    assert kept["lr"] == 1e-3 and kept["licences"] == ["CC-BY-4.0", "CC0-1.0"] and kept["code"]


def test_recipes_are_the_papers():
    """PolyAudio 4.1; MALLM 5.1."""
    one, other = RECIPES["polyaudio"], RECIPES["mallm"]
    for name, value in {"lora": "decoder", "lr": 1e-5, "batch": 128, "warmup": 0.05, "hold": 0.0,
                        "floor": 0.0, "dtype": "auto"}.items():  # fmt: skip
        assert getattr(one, name) == value
    for name, value in {"lora": "all", "lr": 5e-5, "batch": 16, "epochs": 5}.items():
        assert getattr(other, name) == value


def test_help_says_what_each_field_is(capsys):
    assert run_main("--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    for name, words in (("--most", "clips of an example"), ("--bare", "answers alone tell"),
                        ("--looks", "the dev set is asked")):  # fmt: skip
        assert re.search(rf"{name} X .{{0,40}}{words}", said), name


def test_nothing_differs_from_the_recipe_itself():
    assert train.differs("polyaudio", RECIPES["polyaudio"]) == "recipe polyaudio as it is"
    changed = replace(RECIPES["polyaudio"], lr=0.1)
    assert train.differs("polyaudio", changed) == "recipe polyaudio, but lr 0.1"


def test_the_last_two_checkpoints_and_the_best_are_kept(unbroken):
    names = sorted(path.name for path in unbroken.out.iterdir())
    states = [f"state-{n:07d}.{kind}" for n in (4, 6) for kind in ("json", "safetensors")]
    assert names == ["adapter_config.json", "adapter_model.safetensors", "best", "log.jsonl",
                     *states, "train.json"]  # fmt: skip
    scores = [train.macro(line["dev"]) for line in log_of(unbroken.out)[1::2]]
    about = json.loads((unbroken.out / "state-0000006.json").read_text())
    assert about["best"] == max(scores) and about["step"] == 6
    best = PolyAudio.from_dir(unbroken.out / "best")
    assert best.adapter and best.layout == "polyaudio"


def in_process(recipe, resumed=False, ranks=Ranks(), net=None):
    train.train(net or net_of(recipe), recipe, ranks, resumed)


@pytest.fixture
def one_thread():
    """As the scripts have it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def asked_late(monkeypatch):
    """To stop in the last pack of a step: the first, or the one of that number."""
    plain, steps, when = train.gradients, [], [1]

    def gradients(*given):
        found = plain(*given)
        steps.append(found)
        if len(steps) >= when[0]:
            train.STOPPED.asked = signal.SIGTERM
            found.wishes = 1.0
        return found

    monkeypatch.setattr(train, "gradients", gradients)
    return when


def test_resuming_at_any_step_gives_the_same_steps(recipe, unbroken, one_thread, asked_late):
    expected, weights = losses(unbroken.out), adapter(unbroken.out)
    recipe = replace(recipe, every=1)
    for step in range(1, 7):
        train.STOPPED.asked = 0
        with pytest.raises(SystemExit) as end:
            in_process(recipe, resumed=step > 1)
        assert end.value.code == 143
        assert train.checkpoints(Path(recipe.out))[-1].name == f"state-{step:07d}.safetensors"
    found = losses(recipe.out)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert {step: found[step] for step in expected} == expected
    assert furthest(adapter(recipe.out), weights) == 0.0


def test_the_best_is_that_of_the_best_look(recipe, home, monkeypatch):
    """Before a stop and after it."""
    scores = iter([0.2, 0.5, 0.3, 0.4])
    monkeypatch.setattr(train, "look", lambda *given: {"odd": next(scores)})
    recipe = replace(recipe, dev=str(home / "dev.jsonl"), every=1, steps=3)
    in_process(recipe)
    state = load_file(Path(recipe.out) / "state-0000002.safetensors")
    in_process(replace(recipe, steps=4), resumed=True)
    rows = state["p.language_model.embed_tokens.lora_rows"]
    (found,) = [t for name, t in adapter(Path(recipe.out) / "best").items() if "delta" in name]
    assert torch.equal(found, rows)
    about = json.loads((Path(recipe.out) / "state-0000004.json").read_text())
    assert about["best"] == 0.5


def test_a_finished_run_resumed_does_nothing(recipe, unbroken, tmp_path, one_thread):
    shutil.copytree(unbroken.out, recipe.out)
    before = adapter(recipe.out)
    in_process(recipe, resumed=True)
    assert furthest(adapter(recipe.out), before) == 0.0
    assert losses(recipe.out) == losses(unbroken.out)


def test_a_run_ends_with_a_checkpoint_even_where_rows_are_bad(home, recipe, tmp_path):
    """Then there are fewer steps than were thought of."""
    path = spoiled(home, tmp_path, {0: "?"}, n=13)
    recipe = replace(recipe, data=str(path), steps=0, epochs=1.0, batch=4, every=100)
    in_process(recipe)
    assert [line["step"] for line in log_of(recipe.out)] == [3]
    assert len(train.checkpoints(Path(recipe.out))) == 1
    assert log_of(recipe.out)[0]["bad_rows"] == 1
    assert train.has_ended(recipe)


def test_only_whole_checkpoints_are_read(recipe, unbroken, one_thread):
    """The last was being written when the process was killed."""
    out = Path(recipe.out)
    shutil.copytree(unbroken.out, out)
    whole = (out / "state-0000006.safetensors").read_bytes()
    (out / "state-0000006.json").unlink()
    (out / "state-0000006.safetensors").write_bytes(whole[:1000])
    (out / "state-0000007.safetensors.part").write_bytes(whole[:1000])
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 8, "lo')
    in_process(recipe, resumed=True)
    assert losses(out) == losses(unbroken.out)
    assert furthest(adapter(out), adapter(unbroken.out)) == 0.0
    assert len(list(out.glob("state-*"))) == 4, "what was half done is gone"


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"batch": 5}, {"tokens": 300}, {"rank": 1}, {"alpha": 9}, {"lora": "all"},
     {"weight": 2.0}, {"dtype": "bf16"}],
)  # fmt: skip
def test_a_checkpoint_of_another_recipe_is_refused(recipe, unbroken, change):
    """Many would fit all the same; the line names what differs."""
    shutil.copytree(unbroken.out, recipe.out)
    (name,) = change
    with pytest.raises(BadInput, match=f"--resume: {name}: expected .*, as so far, found"):
        in_process(replace(recipe, **change), resumed=True)


def test_other_rows_than_so_far_are_refused(home, recipe, unbroken, tmp_path):
    """As many as before, but not the same."""
    rows = [json.loads(line) for line in Path(recipe.data).open()]
    rows[3]["question"] += "?"
    shutil.copytree(unbroken.out, recipe.out)
    data = write_rows(home / "others.jsonl", rows)
    with pytest.raises(BadInput, match="--resume: data: expected"):
        in_process(replace(recipe, data=str(data)), resumed=True)


def test_checkpoints_beside_a_base_are_not_the_base(home, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(home / "weights", base)
    before = train.weights_hash(base)
    (base / "state-0000001.safetensors").write_bytes(b"x")
    assert train.weights_hash(base) == before
    (base / "other.safetensors").write_bytes(b"x")
    assert train.weights_hash(base) != before


def test_the_best_can_be_merged_with_its_card(recipe, unbroken, tmp_path):
    assert run_main("--merge", unbroken.out / "best", "--out", tmp_path / "best") == 0
    card = (tmp_path / "best" / "README.md").read_text()
    assert "CC-BY-4.0, CC0-1.0" in card and "On the dev set, where it was best" in card


def test_a_clip_shorter_than_its_header_says_is_learned_from(recipe, monkeypatch):
    """As of an mp3, which is made a whole number of packets long."""
    plan = plan_of(recipe)
    plan.fill()
    example = next(iter(plan.waiting.values()))
    whole = train.load(plan, example)
    plain = train.load_clip
    monkeypatch.setattr(train, "load_clip", lambda *given: plain(*given)[: -1000])
    found = train.load(plan, example)
    for wave, other in zip(found.clips, whole.clips, strict=True):
        assert len(wave) == len(other) and not wave[-1000:].any()
        assert np.array_equal(wave[:-1000], other[:-1000])


def test_clips_are_decoded_ahead(recipe, monkeypatch):
    """Of the steps to come, while somebody is at the first."""
    seen, plain = [], train.load
    monkeypatch.setattr(train, "load", lambda plan, e: seen.append(e.id) or plain(plan, e))
    steps = train.decoded(plan_of(recipe), 0, 1)
    first = next(steps)
    limit = time.monotonic() + 20
    while len(seen) < (train.AHEAD + 1) * len(first.ids) and time.monotonic() < limit:
        time.sleep(0.01)
    assert len(seen) >= (train.AHEAD + 1) * len(first.ids)
    steps.close()


def test_a_checkpoint_on_another_base_is_refused(home, recipe, unbroken, tmp_path):
    """Of the same shape: what was learned would be added to other numbers."""
    base = rewrite(home / "weights", tmp_path / "base", edit=lambda tensors: [
        tensor.mul_(1.01) for name, tensor in tensors.items() if name.endswith("q_proj.weight")])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (home / "weights" / name).exists():
            shutil.copyfile(home / "weights" / name, base / name)
    shutil.copytree(unbroken.out, recipe.out)
    with pytest.raises(BadInput, match="--resume: base: expected"):
        in_process(replace(recipe, base=str(base)), resumed=True)


def test_a_stop_does_not_wait_for_the_packs_of_a_step(recipe, one_thread, monkeypatch):
    """A step can take minutes. It is made once more, from its beginning."""
    recipe = replace(recipe, batch=8, every=1, steps=3)  # of 200 tokens, several packs a step
    straight = replace(recipe, out=recipe.out + "-straight")
    in_process(straight)
    packs, plain = [], train.Answers.loss

    def counted(lesson, pack):
        packs.append(pack)
        if len(packs) == first + 1:
            train.STOPPED.asked = signal.SIGTERM
        return plain(lesson, pack)

    first = len(next(train.decoded(plan_of(recipe), 0, 1)).packs)
    assert first > 1
    monkeypatch.setattr(train.Answers, "loss", counted)
    with pytest.raises(SystemExit) as end:
        in_process(recipe)
    assert end.value.code == 143 and len(packs) == first + 1, "one of the second step"
    assert train.checkpoints(Path(recipe.out))[-1].name == "state-0000001.safetensors"
    train.STOPPED.asked = 0
    in_process(recipe, resumed=True)
    assert losses(recipe.out) == losses(straight.out)
    assert furthest(adapter(recipe.out), adapter(straight.out)) == 0.0


def test_a_stop_in_the_first_step_saves_its_beginning(recipe, one_thread):
    recipe = replace(recipe, batch=8, every=1, steps=1)
    train.STOPPED.asked = signal.SIGTERM
    with pytest.raises(SystemExit):
        in_process(recipe)
    assert train.checkpoints(Path(recipe.out))[-1].name == "state-0000000.safetensors"
    train.STOPPED.asked = 0
    in_process(recipe, resumed=True)
    assert list(losses(recipe.out)) == [1]


def test_a_stop_while_the_dev_set_is_asked_is_at_once(recipe, home, monkeypatch):
    """All is saved, and the look is for the next time."""
    recipe = replace(recipe, dev=str(home / "dev.jsonl"), every=2, steps=2)

    def stopped(*given):
        train.STOPPED(signal.SIGTERM, None)
        raise AssertionError("it went on")

    with monkeypatch.context() as patch:
        patch.setattr(train, "look", stopped)
        with pytest.raises(SystemExit) as end:
            in_process(recipe)
    assert end.value.code == 143
    assert not train.STOPPED.saved
    train.STOPPED.asked = 0
    in_process(recipe, resumed=True)
    assert [(line["step"], "dev" in line) for line in log_of(recipe.out)] == [(2, False), (2, True)]


def test_who_was_asked_to_stop_before_a_look_does_not_begin_it(recipe, home, monkeypatch):
    """While the step was saved, or by another rank."""
    recipe = replace(recipe, dev=str(home / "dev.jsonl"), every=2, steps=4)
    plain = train.Run.keep

    def kept(run, **more):
        plain(run, **more)
        train.STOPPED(signal.SIGTERM, None)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "keep", kept)
        patch.setattr(train, "look", None)
        with pytest.raises(SystemExit) as end:
            in_process(recipe)
    assert end.value.code == 143
    for _ in range(2):  # nor does who goes on, and is asked while the network is loaded
        train.STOPPED.asked = signal.SIGTERM
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(train, "look", None)
            in_process(recipe, resumed=True)
    train.STOPPED.asked = 0
    in_process(recipe, resumed=True)
    found = [(line["step"], "dev" in line) for line in log_of(recipe.out)]
    assert found == [(2, False), (2, True), (4, False), (4, True)]


def test_the_second_signal_of_another_kind_is_the_same_wish():
    """A terminal tells all; whoever began the ranks passes it on as the other of the two."""
    stop = train.Stop()
    stop(signal.SIGINT, None)
    stop(signal.SIGTERM, None)
    assert stop.asked == signal.SIGINT
    with pytest.raises(SystemExit):
        stop(signal.SIGINT, None)
    stop = train.Stop()
    stop.saved = True
    with pytest.raises(SystemExit):
        stop(signal.SIGINT, None)
    stop(signal.SIGTERM, None)  # while the first takes effect


def test_an_epoch_with_a_bad_row_ends_after_a_resumed_look(home, recipe, tmp_path, monkeypatch):
    path = spoiled(home, tmp_path, {0: "?"}, n=13)
    recipe = replace(recipe, data=str(path), dev=str(home / "dev.jsonl"), steps=0, epochs=1.0,
                     every=100)  # fmt: skip

    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "look", killed)
        in_process(recipe)
    assert not train.has_ended(recipe)
    in_process(recipe, resumed=True)
    assert train.has_ended(recipe)


def test_what_is_otherwise_from_here_on_is_told(recipe, unbroken, capsys):
    shutil.copytree(unbroken.out, recipe.out)
    in_process(replace(recipe, lr=1e-4, dev=""), resumed=True)
    said = capsys.readouterr().err
    assert "lr: from here on 0.0001, before 0.001" in said and "batch: from" not in said
    assert json.loads((Path(recipe.out) / "train.json").read_text())["lr"] == 1e-4


def test_rates_are_those_of_the_time_since_the_last_line(tmp_path, monkeypatch):
    """What a look takes is not counted, and neither is what went before."""
    now = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train, "progress", lambda *given: lambda n: None)
    meter, device = train.Meter(10, 0), torch.device("cpu")
    step = train.Step([], ["a", "b"], 600, 1000, {})
    for seconds in (1, 1, 10, 10):
        now[0] += seconds
        meter.add(step, False)
        if meter.done % 2 == 0:
            meter.tell(tmp_path, 1.0, 0.1, 1.0, device, 0)
            now[0] += 1000
            meter.tell_dev(tmp_path, {"odd": 1.0})
            meter.anew()
    first, second = (line for line in log_of(tmp_path) if "loss" in line)
    assert (first["examples/s"], first["tokens/s"], first["fill"]) == (2.0, 600, 0.6)
    assert (second["examples/s"], second["left_min"]) == (0.2, 1.0)
    assert second["minutes"] == pytest.approx(1022 / 60, abs=0.01)


@pytest.mark.parametrize("tasks, passed", [
    ({"odd": 0.9, "link": 0.95}, True), ({"odd": 1.0, "link": 0.89}, False), ({}, False),
])  # fmt: skip
def test_a_gate_is_passed_by_every_task(recipe, tmp_path, capsys, tasks, passed):
    train.tell_gate(replace(recipe, gate=0.9, out=str(tmp_path)), 7, tasks)
    (line,) = log_of(tmp_path)
    assert (line["passed"], line["dev"], line["step"]) == (passed, tasks, 7)
    said = capsys.readouterr().err
    assert ("NOT passed" in said) != passed
    assert ("below it: link 0.89" in said) == (tasks.get("link") == 0.89)


def test_a_finished_epoch_resumed_does_nothing(recipe, one_thread):
    """The plan is then at its end, and has no example to show."""
    recipe = replace(recipe, steps=0, epochs=1.0, every=100)
    in_process(recipe)
    before, log = adapter(recipe.out), log_of(recipe.out)
    assert log[-1]["step"] == 10
    in_process(recipe, resumed=True)
    assert furthest(adapter(recipe.out), before) == 0.0
    assert log_of(recipe.out) == log


def test_a_stop_in_the_last_step_leaves_the_look_for_the_next_time(recipe, home, asked_late):
    recipe = replace(recipe, dev=str(home / "dev.jsonl"), every=100, steps=3, gate=0.1)
    asked_late[0] = 3
    with pytest.raises(SystemExit):
        in_process(recipe)
    assert [line["step"] for line in log_of(recipe.out)] == [3]
    train.STOPPED.asked = 0
    for _ in range(2):  # the second time all is done
        in_process(recipe, resumed=True)
        loss, look, gate = log_of(recipe.out)
        assert "loss" in loss and set(look["dev"]) == set(TASKS) and gate["gate"] == 0.1
    about = json.loads((Path(recipe.out) / "state-0000003.json").read_text())
    assert about["due"] == "" and set(about["tasks"]) == set(TASKS)


def test_what_was_learned_is_safe_before_a_look(recipe, home, monkeypatch):
    """A look may take minutes; whoever is killed in it loses no step."""
    recipe = replace(recipe, dev=str(home / "dev.jsonl"), every=2, steps=4)

    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "look", killed)
        with pytest.raises(KeyboardInterrupt):
            in_process(recipe)
    assert train.checkpoints(Path(recipe.out))[-1].name == "state-0000002.safetensors"
    in_process(recipe, resumed=True)
    found = [(line["step"], "dev" in line) for line in log_of(recipe.out)]
    assert found == [(2, False), (2, True), (4, False), (4, True)]


class Losing:
    """A network whose loss is no number in some of its calls."""

    def __init__(self, net, when):
        self.plain, self.calls, self.when = net.loss, 0, when
        net.loss = self

    def __call__(self, examples):
        loss, weight = self.plain(examples)
        self.calls += 1
        return (loss * math.nan if self.when(self.calls, examples) else loss), weight


def test_a_step_without_a_gradient_is_left_out(recipe, capsys):
    """Its numbers reach neither the weights nor what AdamW remembers."""
    recipe = replace(recipe, batch=1, steps=5, every=1)
    net = net_of(recipe)
    Losing(net, lambda call, examples: call in (2, 3, 5))
    in_process(recipe, net=net)
    lines = log_of(recipe.out)
    assert [line["loss"] is None for line in lines] == [False, True, True, False, True]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 2, 3]
    assert all(tensor.isfinite().all() for tensor in adapter(recipe.out).values())
    state = load_file(Path(recipe.out) / "state-0000005.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())
    counts = {int(value) for name, value in state.items() if name.startswith("s.step.")}
    assert counts == {2}
    assert (
        "step 2: the gradient is no number, and the step is left out: row-"
        in capsys.readouterr().err
    )


def test_three_in_a_row_stop_the_run_with_the_ids(recipe):
    """The last checkpoint is from before the third."""
    net = net_of(recipe)
    recipe = replace(recipe, batch=1, steps=9, every=1)
    Losing(net, lambda call, examples: call >= 3)
    plan = plan_of(recipe)
    fifth = [ids_of(plan.step()) for _ in range(5)][-1]
    with pytest.raises(
        BadInput, match=rf"step 5: .* none, as in the 2 steps before, on {fifth[0]}"
    ):
        in_process(recipe, net=net)
    assert [line["step"] for line in log_of(recipe.out)] == [1, 2, 3, 4]


def test_the_ids_are_those_of_the_row(recipe):
    lesson = learning(recipe)
    net = lesson.net
    rows = [[e] for e in heard(Plan(recipe, lesson), 3)]
    Losing(net, lambda call, examples: call == 2)
    lost = train.gradients(lesson, rows, Ranks(), net.dtype).lost
    assert lost == [rows[1][0].id]


def test_a_look_scores_by_task(recipe, home, monkeypatch):
    recipe = replace(recipe, dev=str(home / "dev.jsonl"))
    rows = list(prepare.read_rows(recipe.dev))
    right = {"loudest": 1, "odd": 0, "order": 1}

    def answers(net, items, **how):
        for key, messages, clips, _ in items:
            assert messages[-1]["role"] == "user", "the answer is not told"
            assert [len(clip) for clip in clips] == [
                prepare.clip_samples(clip, home) for clip in rows[key]["clips"]
            ]
            yield key, rows[key]["answer"] if right[rows[key]["task"]] else "no idea"

    monkeypatch.setattr(train, "answer_all", answers)
    net = net_of(recipe)
    assert train.look(learning(recipe, net), Ranks()) == right
    assert train.macro(right) == pytest.approx(2 / 3)
    assert net.training, "and it goes on learning"


def test_a_look_asks_in_the_layout_that_is_learned(recipe, home, monkeypatch):
    recipe = replace(recipe, dev=str(home / "dev.jsonl"), view="no-index")
    layouts = set()

    def answers(net, items, **how):
        for key, _, _, layout in items:
            layouts.add(layout)
            yield key, ""

    monkeypatch.setattr(train, "answer_all", answers)
    train.look(learning(recipe), Ranks())
    assert layouts == {"no-index"}


def test_ranks_share_a_look(recipe, home, monkeypatch):
    recipe = replace(recipe, dev=str(home / "dev.jsonl"))
    keys = []
    monkeypatch.setattr(train, "answer_all", lambda net, items, **how: ((k, "") for k, *_ in items))
    monkeypatch.setattr(Ranks, "gather", lambda self, value: keys.append(len(value)) or [value])
    for rank in range(4):
        train.look(learning(recipe), Ranks(rank, 4))
    assert keys == [2, 2, 1, 1]


@pytest.mark.long
def test_a_full_disk_keeps_the_old_checkpoint(recipe, unbroken):
    """Files may grow no further than half a checkpoint: the system then refuses to write, as on a
    disk that is full."""
    out = Path(recipe.out)
    shutil.copytree(unbroken.out, out)
    size = (out / "state-0000006.safetensors").stat().st_size
    words = ["train.py", *flags(recipe, steps=8), "--resume"]
    limited = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))
sys.argv = {words!r}
runpy.run_path('train.py', run_name='__main__')
"""
    err = finish(script("-c", limited), 2)
    assert "state-0000008.safetensors: cannot be written" in err.splitlines()[-1]
    assert [path.name for path in train.checkpoints(out)] == [
        "state-0000004.safetensors", "state-0000006.safetensors",
    ]  # fmt: skip
    assert not list(out.glob("*.part")), "the half of one is not left to fill the disk"
    finish(script("train.py", *flags(recipe, steps=8), "--resume"))
    assert losses(out).keys() == {2, 4, 6, 8}


def kill_and_resume(recipe, kills, seed):
    """kill -9 at any moment: while loading, learning or saving. Importing takes most of the time,
    so mostly it first waits for another checkpoint to begin."""
    dice, words, out = (
        random.Random(seed),
        ["train.py", *flags(recipe), "--resume"],
        Path(recipe.out),
    )
    for _ in range(kills):
        names, process = set(out.glob("state-*")), script(*words)
        limit, waits = time.monotonic() + 60, dice.random() < 0.8
        while waits and set(out.glob("state-*")) == names and time.monotonic() < limit:
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was not over before"
    finish(script(*words))


@pytest.mark.long
def test_killed_and_resumed_it_is_the_unbroken_run(recipe, one_thread):
    straight = replace(recipe, every=1, steps=16)
    in_process(straight)
    recipe = replace(straight, out=recipe.out + "-killed")
    kill_and_resume(recipe, 3, 0)
    assert losses(recipe.out) == losses(straight.out)
    assert list(losses(recipe.out)) == list(range(1, 17))
    assert furthest(adapter(recipe.out), adapter(straight.out)) == 0.0


@pytest.mark.slow
def test_killed_ten_times(recipe, one_thread):
    straight = replace(recipe, every=1, steps=80)
    in_process(straight)
    recipe = replace(straight, out=recipe.out + "-killed")
    kill_and_resume(recipe, 10, 1)
    assert losses(recipe.out) == losses(straight.out)
    assert furthest(adapter(recipe.out), adapter(straight.out)) == 0.0


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_first(recipe, number):
    recipe = replace(recipe, steps=100_000, every=100_000)
    process = script("train.py", *flags(recipe))
    for line in process.stderr:
        if line.startswith("<|im_start|>") or "<|im_end|>" in line:
            break
    time.sleep(0.5)
    os.kill(process.pid, number)
    finish(process, 128 + number, 20)
    (path,) = train.checkpoints(Path(recipe.out))
    step = json.loads(path.with_suffix(".json").read_text())["step"]
    assert 0 <= step < 100_000
    log = Path(recipe.out) / "log.jsonl"  # of a step that was broken off nothing is told
    assert not log.exists() or {line["step"] for line in log_of(recipe.out)} <= {step}


# ------------------------------------------------------------------------------------------------
# Ranks.


@pytest.mark.long
def test_two_ranks_are_one(recipe, unbroken):
    """By torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    finish(script(*torchrun, "train.py", *flags(recipe)))
    found, expected = losses(recipe.out), losses(unbroken.out)
    assert found.keys() == expected.keys()
    assert all(found[step] == pytest.approx(expected[step], abs=1e-6) for step in found)
    assert furthest(adapter(recipe.out), adapter(unbroken.out)) < 1e-6


@pytest.mark.long
def test_three_ranks_do_not_wait_for_each_other_where_there_is_little_to_do(recipe, one_thread):
    """A step of two examples leaves one rank without any."""
    recipe = replace(recipe, batch=2, steps=4)
    for process in ranked(3, *flags(recipe)):
        finish(process)
    alone = replace(recipe, out=recipe.out + "-alone")
    in_process(alone)
    assert losses(recipe.out) == pytest.approx(losses(alone.out), abs=1e-6)
    assert furthest(adapter(recipe.out), adapter(alone.out)) < 1e-5


@pytest.mark.parametrize("batch", [2, 12])
def test_every_example_is_one_ranks(recipe, batch):
    """Where all did all, the mean would be the same, and nobody would be faster."""
    recipe = replace(recipe, batch=batch, steps=0)
    plans = [train.decoded(plan_of(recipe), rank, 3) for rank in range(3)]
    for steps in zip(*plans, strict=True):
        assert sorted(e.id for step in steps for pack in step.packs for e in pack) == sorted(
            steps[0].ids
        )


@pytest.mark.long
def test_resumed_on_another_number_of_ranks(recipe, unbroken):
    out = Path(recipe.out)
    shutil.copytree(unbroken.out, out)
    for path in out.glob("state-0000006.*"):
        path.unlink()
    for process in ranked(2, *flags(recipe), "--resume"):
        finish(process)
    assert losses(out) == pytest.approx(losses(unbroken.out), abs=1e-6)
    assert furthest(adapter(out), adapter(unbroken.out)) < 1e-6


@pytest.mark.long
def test_a_rank_that_is_killed_ends_the_run(recipe):
    processes = ranked(2, *flags(recipe, steps=100_000, every=5))
    limit = time.monotonic() + 60
    while not train.checkpoints(Path(recipe.out)) and time.monotonic() < limit:
        time.sleep(0.05)
    processes[1].kill()
    processes[1].communicate()
    err = finish(processes[0], 2, 30)
    assert "rank 0: another rank is gone" in err.splitlines()[-1]


@pytest.mark.slow
def test_ctrl_c_on_torchrun_saves_first(recipe):
    """The terminal tells everybody, and torchrun passes it on: twice is once here."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    process = script(*torchrun, "train.py", *flags(recipe, steps=100_000, every=100_000))
    for line in process.stderr:
        if "The answer is" in line:
            break
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert len(train.checkpoints(Path(recipe.out))) == 1, err


# ------------------------------------------------------------------------------------------------
# What others make of it.


def their_logits(kind, theirs, ids, clips):
    return oracle_logits(kind, theirs, ids, clips, 600 if kind == "af3" else 30)


def trained(recipe):
    """A run that moved what it trained, and an example to ask."""
    recipe = replace(recipe, steps=3, lr=0.02)
    in_process(recipe)
    net = PolyAudio.from_dir(recipe.out)
    example = heard(plan_of(recipe), 1)[0]
    with torch.no_grad():
        logits = net.logits(example.ids, example.clips)
        before = net_of(recipe).logits(example.ids, example.clips)
    assert (logits - before).abs().max() > 0.1, "an adapter that does nothing shows nothing"
    return recipe, example, logits


@pytest.mark.parametrize("kind, lora", [("af3", "decoder"), ("af3", "all"), ("qwen2_audio", "all")])
def test_peft_and_transformers_answer_the_same(recipe, kind, lora, home, tmp_path, capsys):
    if kind != "af3":
        speaking(kind, tmp_path / "base")
        recipe = replace(recipe, base=str(tmp_path / "base"))
    recipe, example, expected = trained(replace(recipe, lora=lora))
    theirs = type(make(kind)).from_pretrained(recipe.base)
    adapted = PeftModel.from_pretrained(theirs, recipe.out).eval()
    found = their_logits(kind, adapted, example.ids, example.clips)
    assert (found - expected).abs().max() < 3e-5 * expected.std()
    names = {re.sub(r".*\.(audio_tower|multi_modal_projector|language_model)\..*", r"\1", name)
             for name in adapter(recipe.out) if ".lora_" in name}  # fmt: skip
    assert names == {"language_model", *(["multi_modal_projector"] if lora == "all" else [])}
    per_layer = 14 * 3 + (0 if lora == "decoder" else 4 if kind == "af3" else 2)
    assert len(adapter(recipe.out)) == per_layer + 1, "and the rows of BOA and EOA"

    merged = tmp_path / "merged"
    run_main("--merge", recipe.out, "--out", merged)
    assert "one plain checkpoint" in capsys.readouterr().out
    plain = type(theirs).from_pretrained(merged).eval()
    found = their_logits(kind, plain, example.ids, example.clips)
    assert (found - expected).abs().max() < 3e-5 * expected.std()
    own = PolyAudio.from_dir(merged)
    assert own.layout == "polyaudio" and own.tokenizer.boundaries


def test_merging_keeps_the_type_of_the_base(recipe, home, tmp_path):
    base = rewrite(home / "weights", tmp_path / "half", dtype=lambda key: torch.bfloat16)
    shutil.copyfile(home / "weights/tokenizer.json", base / "tokenizer.json")
    recipe = replace(recipe, base=str(base), steps=1, lr=0.02)
    in_process(recipe)
    run_main("--merge", recipe.out, "--out", tmp_path / "merged")
    assert {t.dtype for t in load_file(tmp_path / "merged/model.safetensors").values()} == {
        torch.bfloat16
    }


def test_a_run_that_trains_it_all_is_a_checkpoint(recipe, tmp_path):
    recipe = replace(recipe, lora="", muon=0.01, steps=2, recompute=0)
    net = net_of(recipe)
    in_process(recipe, net=net)
    found = PolyAudio.from_dir(recipe.out)
    assert not found.adapter and found.layout == "polyaudio"
    before = dict(net_of(recipe).named_parameters())
    moved = {n for n, p in found.named_parameters() if not torch.equal(p, before[n])}
    assert {name.partition(".")[0] for name in moved} == {
        "audio_tower", "multi_modal_projector", "language_model", "lm_head",
    }  # fmt: skip


def test_all_of_it_goes_on_as_it_began(recipe, one_thread, asked_late):
    """What Muon remembers, too."""
    recipe = replace(recipe, lora="", muon=0.01, steps=4, recompute=0, every=1)
    halfway = replace(recipe, out=recipe.out + "-halfway")
    with pytest.raises(SystemExit):
        in_process(halfway)
    assert train.checkpoints(Path(halfway.out))[-1].name == "state-0000001.safetensors"
    train.STOPPED.asked, asked_late[0] = 0, math.inf
    in_process(recipe)
    in_process(halfway, resumed=True)
    assert losses(halfway.out) == losses(recipe.out)
    states = [load_file(Path(r.out) / "state-0000004.safetensors") for r in (recipe, halfway)]
    assert any(name.startswith("s.mean.") for name in states[0])
    assert furthest(*states) == 0.0


# ------------------------------------------------------------------------------------------------
# The command line.


def run_main(*words):
    """train.py in this process. -> its exit code"""
    before = sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = ["train.py", *map(str, words)]
    try:
        prepare.cli(train.main)
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


MISTAKES = {
    "no data": ({"data": "none.jsonl"}, "none.jsonl: cannot be read"),
    "no corpus": ({"corpus": "none.jsonl", "teach": "names"}, "none.jsonl: cannot be read"),
    "nobody": ({"lora": "", "trains": "lm_head, audio_towr"}, "as lm_head, found 'audio_towr'"),
    "no base": ({"base": "nowhere"}, "nowhere: expected a folder of weights"),
    "no dev": ({"dev": "none.jsonl"}, "none.jsonl: cannot be read"),
    "where adapters go": ({"lora": "head"}, "--lora: expected nothing, decoder or all"),
    "a type": ({"dtype": "f8"}, "--dtype: expected auto, f32 or bf16"),
    "no rate": ({"lr": 0}, "--lr: expected a number above 0"),
    "a rate below": ({"lr": -1}, "--lr: expected a number above 0"),
    "a rate that is none": ({"lr": "nan"}, "--lr: expected a number above 0"),
    "no number": ({"lr": "much"}, "argument --lr: invalid float value"),
    "a batch of none": ({"batch": 0}, "--batch: expected a number above 0"),
    "tokens for nobody": ({"tokens": 10}, "--tokens: expected room for the longest example"),
    "no epochs": ({"epochs": 0, "steps": 0}, "--epochs: expected a number above 0"),
    "a share": ({"warmup": 2}, "--warmup: expected a share, 0 to 1"),
    "a seed": ({"seed": -1}, "--seed: expected 0 or more"),
    "a device": ({"device": "abacus"}, "--device: expected cuda, mps or cpu"),
    "a recipe": ({"recipe": "cake"}, "argument --recipe: invalid choice"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(recipe, case, capsys):
    change, words = MISTAKES[case]
    words_given = [f"--{name}={value}" for name, value in change.items()]
    assert run_main(*flags(recipe), *words_given) == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not line.startswith(("warning: ", "recipe "))]
    assert len(lines) == 1 and words in lines[0], lines


def test_merging_needs_a_folder_of_its_own(recipe, unbroken, capsys):
    before = (unbroken.out / "adapter_model.safetensors").read_bytes()
    for words in ([], ["--out", unbroken.out], ["--out", recipe.base]):
        assert run_main("--merge", unbroken.out, *words) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert (unbroken.out / "adapter_model.safetensors").read_bytes() == before
    assert not (unbroken.out / "model.safetensors").exists()


def test_a_run_by_epochs_ends_where_they_end(recipe, tmp_path):
    """It knows its number of steps only from its data, which the last checkpoint tells."""
    recipe = replace(recipe, out=str(tmp_path), steps=0)
    for step, steps, due, ended in ((100, 782, "", False), (782, 782, "look", False),
                                    (782, 782, "", True)):  # fmt: skip
        name = tmp_path / f"state-{step:07d}"
        name.with_suffix(".safetensors").touch()
        name.with_suffix(".json").write_text(json.dumps({"step": step, "steps": steps, "due": due}))
        assert train.has_ended(recipe) == ended
    assert not train.has_ended(replace(recipe, steps=900))


def test_a_run_is_not_its_own_base(recipe, home, capsys):
    """It would be written over."""
    assert run_main(*flags(recipe, out=home / "weights")) == 2
    assert "--out: expected a folder other than the base's" in capsys.readouterr().err


def test_where_only_hearing_is_trained_text_teaches_nothing(recipe):
    lesson = learning(replace(recipe, lora="", trains="multi_modal_projector"))
    texts = [Example("t", "odd", list(range(9)), [], [0.0] * 5 + [1.0] * 4)]
    found = train.gradients(lesson, [texts], Ranks(), torch.float32)
    loss, weight = found.loss, found.weight
    assert loss > 0 and weight == 4
    assert not any(p.grad.any() for _, p in lesson.named)


def test_a_run_is_not_begun_over_another(recipe, unbroken, capsys):
    shutil.copytree(unbroken.out, recipe.out)
    assert run_main(*flags(recipe)) == 2
    assert "--resume" in capsys.readouterr().err
    assert losses(recipe.out) == losses(unbroken.out)


def dry(capsys, *words) -> str:
    assert run_main("--dry-run", *words) == 0
    return capsys.readouterr().out


def test_a_dry_run_is_of_answers(recipe, capsys):
    assert run_main("--dry-run", *flags(recipe, corpus=recipe.data), "--teach", "names") == 2
    assert "--dry-run: expected --teach answers, found names" in capsys.readouterr().err


def test_a_dry_run_counts_all_that_is_written(recipe, capsys):
    def disk(**more):
        return float(re.search(r"disk: about ([\d.]+)", dry(capsys, *flags(recipe, **more)))[1])

    total = sum(p.numel() for p in net_of(recipe).parameters())
    trained = sum(p.numel() for p in net_of(recipe).multi_modal_projector.parameters())
    found = disk(lora="", trains="multi_modal_projector")
    assert found == pytest.approx(4e-6 * (3 * 3 * trained + 2 * total), abs=0.01)


def test_a_dry_run_counts_right(recipe, unbroken, tmp_path, capsys):
    """All rows are in the sample here, so it is exact where it counts and near where it is said to
    be about so; the weights themselves need not be there."""
    base = tmp_path / "base"
    shutil.copytree(recipe.base, base, ignore=shutil.ignore_patterns("*.safetensors*"))
    recipe = replace(recipe, base=str(base), steps=0)
    said = dry(capsys, *flags(recipe, steps=0, epochs=2))
    tokens = sum(
        s.tokens for s in train.decoded(plan_of(replace(unbroken.recipe, steps=0, epochs=1)), 0, 1)
    )
    assert f"tokens of an epoch: {tokens:,}, {tokens / 40:,.0f} an example, by 40 of 40" in said
    assert "steps: 20 of 4 examples" in said
    parameters = re.search(r"parameters: .*", unbroken.err)[0]
    assert parameters in said
    disk = sum(path.stat().st_size for path in unbroken.out.rglob("*.safetensors"))
    about = float(re.search(r"disk: about ([\d.]+) MB", said)[1]) * 1e6
    assert disk < about < 1.5 * disk, "with room for the next checkpoint before the first goes"
    assert not Path(recipe.out).exists()


def test_a_dry_run_is_linear_in_what_it_is_told(recipe, capsys):
    def hours(*words):
        said = dry(capsys, *words)
        return float(re.search(r"([\d.]+(e[+-]\d+)?) FLOP in all", said)[1]), float(
            re.search(r"hours: ([\d,.]+)", said)[1].replace(",", "")
        )

    plain = flags(recipe, steps=0)
    work, one = hours(*plain, "--flops", "1e6")
    assert one == pytest.approx(work / 1e6 / 3600, rel=2e-3)
    assert hours(*plain, "--flops", "1e6", "--devices", 4)[1] == pytest.approx(one / 4, rel=1e-2)
    assert hours(*plain, "--epochs", 3)[0] == pytest.approx(3 * work, rel=1e-2)
    assert hours(*plain, "--recompute", 0)[0] < work < hours(*plain, "--lora", "")[0]


def test_work_is_what_the_matrices_do(recipe):
    """Counted by torch on the real network: forward, without the encoder, and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    recipe = replace(recipe, recompute=0, tokens=4000)
    lesson = learning(recipe)
    net = lesson.net
    example = heard(Plan(recipe, lesson), 1)[0]
    text = replace(
        example, clips=[], ids=[5 if i == net.config.audio_token else i for i in example.ids]
    )
    with FlopCounterMode(display=False) as counter:
        net.loss(as_given([text]))[0].backward()
    expected = train.work_of(net, recipe, Path(recipe.data).parent, text)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.35)


def test_memory_of_a_dry_run_knows_the_types(recipe, capsys):
    def weights(*words):
        said = dry(capsys, *words)
        return float(re.search(r"weights ([\d.]+)", said)[1])

    big = {"hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 8192}
    base = Path(recipe.out).with_name("large")
    shutil.copytree(recipe.base, base)
    text = json.loads((base / "config.json").read_text())["text_config"]
    edit_json(base / "config.json", text_config={**text, **big})
    plain = flags(recipe, base=base)
    full = weights(*plain)
    assert full > 4
    assert weights(*plain, "--dtype", "bf16") == pytest.approx(full / 2, rel=0.01)
    assert weights(*plain, "--dtype", "bf16", "--lora", "") == pytest.approx(full, rel=0.01)
