"""The small model: that it starts out able to copy, what its lessons teach, that its phases follow
one another through any stop, and that others read what comes of it.

Everything runs on a toy world of some hundred clips, a few steps a phase: whether it learns well is
for the bench to say, not for these tests."""

import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import model
import prepare
import pytest
import soundfile
import torch
import torch.nn.functional as F
import train
from model import PolyAudio
from prepare import BadInput, load_clip
from tests.checkpoints import oracle_logits
from tests.conftest import ROOT
from tests.faults import forked
from transformers import AudioFlamingo3ForConditionalGeneration

from train import PHASES, RECIPES, Plan, Ranks


SINGLE = ("transcribe", "tag", "caption", "count", "locate", "voice", "music")


def call(*words, code=0, **env) -> str:
    done = forked(*words, **{"OMP_NUM_THREADS": "1", "POLYAUDIO_KERNELS": "cpu", **env})
    assert done.returncode == code, done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A world of 700 clips, questions on it, and a network from nothing."""
    toy = tmp_path_factory.mktemp("toy")
    words = ["--clips", 700, "--out", toy, "--workers", 1]
    call("synth.py", *words, "--train", 300, "--bench", 0)
    call("synth.py", *words, "--train", 0, "--split", "dev", "--bench", 28)
    train.from_nothing(recipe_on(toy), toy / "base")
    return toy


def recipe_on(toy, **changes):
    where = {
        "data": str(toy / "train.jsonl"), "dev": str(toy / "bench-dev.jsonl"), "look": 16,
        "corpus": str(toy / "world" / "corpus.jsonl"), "base": str(toy / "base"), "workers": 2,
        "out": str(toy / "run"), "cache": "", "steps": 4, "batch": 8,
    }  # fmt: skip
    return replace(RECIPES["tiny"], **{**where, **changes})


@pytest.fixture
def recipe(toy, tmp_path):
    return recipe_on(toy, out=str(tmp_path / "run"))


def lesson_of(recipe):
    net = PolyAudio.from_dir(recipe.base)
    return train.LESSONS[recipe.teach](net, recipe)


def heard(lesson, n):
    plan = Plan(lesson.recipe, lesson)
    plan.fill()
    return [train.load(plan, example) for example in list(plan.waiting.values())[:n]]


# ------------------------------------------------------------------------------------------------
# From nothing.


def test_it_has_the_size_and_the_shape_that_were_promised(toy):
    net = PolyAudio.from_dir(toy / "base")
    total = sum(p.numel() for p in net.parameters())
    assert 5.0e6 < total < 5.5e6
    assert net.config.kind == "audioflamingo3" and net.layout == "polyaudio"
    assert len(net.tokenizer) == net.config.decoder.vocab <= train.VOCABULARY
    assert net.tokenizer.special["<|im_end|>"] in net.stops


def test_transformers_loads_it_with_the_same_logits(toy):
    net = PolyAudio.from_dir(toy / "base")
    wave = np.random.default_rng(0).uniform(-0.1, 0.1, 16_000).astype(np.float32)
    ids = net.prompt([{"role": "user", "content": "Which one is it?"}], [wave])[0]
    with torch.no_grad():
        found = net.logits(ids, [wave])
    theirs = AudioFlamingo3ForConditionalGeneration.from_pretrained(toy / "base").eval()
    expected = oracle_logits("af3", theirs, ids, [wave])
    assert (found - expected).abs().max() < 1e-3


def test_a_word_begins_as_the_same_word_behind_a_space_or_a_quote(toy):
    net = PolyAudio.from_dir(toy / "base")
    table, tokenizer = net.language_model.embed_tokens.weight, net.tokenizer
    like = functools.partial(torch.cosine_similarity, dim=0)
    found = 0
    for word in ("park", "dog", "school", "bird", "house", "garden"):
        bare, spaced = (tokenizer.encode(text) for text in (word, f" {word}"))
        if len(bare) == len(spaced) == 1 and bare != spaced:
            found += 1
            assert like(table[bare[0]], table[spaced[0]]) > 0.4
            other = tokenizer.encode(" audio")[0]
            assert abs(like(table[bare[0]], table[other])) < 0.3
    assert found >= 2
    special = tokenizer.special["<sound>"]
    assert train.kin(tokenizer)[special] == special, "a slot is no word"


@pytest.fixture
def looking(toy, monkeypatch):
    """ids -> for each layer what each head looks at (H, T, T), before anything is learned."""
    net, seen = PolyAudio.from_dir(toy / "base"), []

    def spy(q, k, v, cu_q, cu_k, causal):
        seen.append((q.float(), k.float()))
        return plain(q, k, v, cu_q, cu_k, causal)

    def look(ids):
        seen.clear()
        with torch.no_grad():
            net.logits(ids, [])
        hidden = torch.ones(len(ids), len(ids)).triu(1).bool()
        scores = (torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5 for q, k in seen)
        return [each.masked_fill(hidden, -math.inf).softmax(-1) for each in scores]

    plain = model.attention
    monkeypatch.setattr(model, "attention", spy)
    return look, net.tokenizer


def test_some_heads_look_one_and_two_tokens_back(looking):
    """At least four fifths of their attention is there."""
    look, tokenizer = looking
    text = "one red dog and two green lions are at the beach, said the driver"
    first = look(tokenizer.encode(text))[0]
    for head, back in enumerate((1, 2)):
        assert first[head].diagonal(-back).mean() > 0.8, (head, back)


def test_one_head_looks_at_the_nearest_colon(looking):
    look, tokenizer = looking
    told = "dog bark, rain, a bell rings, then two more birds; "
    ids = tokenizer.encode("".join(f"audio {i}: {told}" for i in range(1, 6)))
    colons = [i for i, id in enumerate(ids) if id == tokenizer.encode(":")[0]]
    assert len(colons) == 5
    nearest = [max(c for c in colons if c <= t) for t in range(colons[0], len(ids))]
    there = look(ids)[1][3][colons[0] :].gather(1, torch.tensor(nearest)[:, None])
    assert there.mean() > 0.8


def test_it_copies_before_it_has_learned(toy):
    """Behind "audio 2:" the likeliest of the words is the one that stood there before; without the
    heads that are set out, it is hardly ever."""
    net = PolyAudio.from_dir(toy / "base")

    def right(net):
        said = ["rain", "wind", "thunder", "snake", "violin", "driver", "beach", "doctor"]
        dice, hits = np.random.default_rng(0), []
        for _ in range(40):
            one, two, three = dice.choice(said, 3, replace=False)
            told = f"audio 1: {one}; audio 2: {two}; audio 3: {three}.\n"
            asked = int(dice.integers(1, 4))
            ids = net.tokenizer.encode(f"{told}audio {asked}:")
            wanted = net.tokenizer.encode(f" {(one, two, three)[asked - 1]}")[0]
            with torch.no_grad():
                logits = net.logits(ids, [])[-1]
            words = [net.tokenizer.encode(f" {word}")[0] for word in said]
            hits.append(words[logits[words].argmax()] == wanted)
        return sum(hits) / len(hits)

    assert right(net) > 0.8
    with torch.no_grad():
        for layer in net.language_model.layers[1:3]:
            layer.self_attn.q_proj.weight.normal_(std=0.07)
    assert right(net) < 0.6


# ------------------------------------------------------------------------------------------------
# Lessons.


def test_labels_say_what_sounds_when():
    row = {
        "duration": 2.0, "split": "train",
        "events": [["dog bark", 0.5, 0.8], ["dog bark", 1.0, 1.2], ["rain", 0.0, 2.0]],
        "words": [["snake", 0.2, 0.6]], "speaker": "toy-1", "quality": {"label": "noise"},
    }  # fmt: skip
    found = list(train.labels_of(row))
    assert ("event", "dog bark", 1.0, 1.2) in found
    assert ("times", "twice", 0.5, 0.8) in found and ("times", "once", 0.0, 2.0) in found
    edges = [(name, round(on, 2)) for kind, name, on, _ in found if kind == "edge"]
    assert ("from", 0.2) in edges and ("to", 0.56) in edges and len(edges) == 8
    assert ("speaker", "toy-1", 0, 2.0) in found and ("quality", "noise", 0, 2.0) in found
    assert not any(kind in ("mode", "emotion") for kind, *_ in found)


def test_numbers_are_scaled_and_absent_where_there_are_none():
    row = {"voice": {"f0": 85}, "quality": {"label": "noise", "strength": 5}}
    tempo, energy, f0, tract, strength = train.numbers_of(row)
    assert math.isnan(tempo) and math.isnan(energy) and math.isnan(tract)
    assert (f0, strength) == (0.0, 0.25)
    assert math.isnan(train.numbers_of({"quality": {"label": "echo", "strength": 5}})[-1])


def test_numbers_beyond_the_scale_are_at_its_end():
    row = {"voice": {"f0": 1e9}, "quality": {"label": "noise", "strength": -1e9}}
    assert train.numbers_of(row)[2::2] == [1.0, 0.0]
    assert math.isnan(train.numbers_of({"music": {"tempo": 0.0}})[0])  # of which there is no log


def test_slots_are_hot_where_a_name_is_heard(recipe):
    lesson = lesson_of(replace(recipe, teach="names", trains="audio_tower"))
    (example,) = heard(lesson, 1)
    hot = lesson.hot([example])
    assert hot.shape == (len(example.ids), len(lesson.names))
    for kind, name, on, off in train.labels_of(example.row):
        column = hot[:, lesson.place[kind, name]]
        assert column[min(int(on / 0.04), len(column) - 1)] == 1
    assert 0 < hot.mean() < 0.2


@pytest.mark.parametrize("teach, trains", [("names", "audio_tower"), ("meanings", "multi_modal")])
def test_a_lesson_is_the_same_however_it_is_packed(recipe, teach, trains):
    """And on whatever rank: what chance does to a clip is drawn for the clip."""
    lesson = lesson_of(replace(recipe, teach=teach, trains=trains))
    examples = heard(lesson, 6)
    with torch.no_grad():
        whole, weight = lesson.loss(examples)
        parts = [lesson.loss(part) for part in (examples[:1], examples[1:4], examples[4:])]
    assert sum(loss for loss, _ in parts).item() == pytest.approx(whole.item(), rel=1e-5)
    assert sum(weight for _, weight in parts) == weight


def test_bad_rows_of_a_corpus_and_of_questions_are_left_out(toy, tmp_path, capsys):
    spoiled = {}
    for name, path in (("data", toy / "train.jsonl"), ("corpus", toy / "world" / "corpus.jsonl")):
        lines = path.read_text().splitlines(True)
        lines[2] = "{broken\n"
        spoiled[name] = path.with_name(f"spoiled-{path.name}")
        spoiled[name].write_text("".join(lines))
    recipe = recipe_on(toy, **{name: str(path) for name, path in spoiled.items()})
    train.from_nothing(recipe, tmp_path / "base")
    assert (tmp_path / "base" / "config.json").exists()
    lesson = lesson_of(replace(recipe, teach="names", trains="audio_tower"))
    assert len(lesson.rows.bad) == 1 and heard(lesson, 2)
    said = capsys.readouterr().err
    assert "spoiled-train.jsonl: row 3: " in said and "spoiled-corpus.jsonl: row 3: " in said


def test_who_teaches_names_trains_the_ear(recipe):
    with pytest.raises(BadInput, match="--trains: expected the audio_tower"):
        lesson_of(replace(recipe, teach="names", trains="lm_head"))


@pytest.mark.long
@pytest.mark.parametrize("teach", ["names", "meanings", "answers"])
def test_each_lesson_is_learned_by_heart(recipe, teach):
    """A few examples, some dozen steps: the loss falls to less than half."""
    trains = {"names": "audio_tower", "meanings": "multi_modal_projector", "answers": ""}[teach]
    recipe = replace(recipe, teach=teach, trains=trains)
    lesson = lesson_of(recipe)
    opts = train.optimizers(recipe, lesson.named)
    full = [[group["lr"] for group in opt.param_groups] for opt in opts]
    rows, found = [heard(lesson, 4)], []
    frozen = {n: p.clone() for n, p in lesson.net.named_parameters() if not p.requires_grad}
    for _ in range(100 if teach == "meanings" else 40):
        loss = train.gradients(lesson, rows, Ranks(), torch.float32).loss
        train.update(opts, full, lesson.named, 1.0, 0.5, loss)
        found.append(loss)
    assert found[-1] < found[0] / 2
    now = dict(lesson.net.named_parameters())
    assert all(torch.equal(p, now[name]) for name, p in frozen.items())
    assert {n.partition(".")[0] for n, _ in lesson.named} >= ({trains} if trains else set())


@pytest.mark.parametrize("teach", ["names", "meanings"])
def test_a_look_counts_on_the_dev_split_alone(recipe, teach, monkeypatch):
    lesson = lesson_of(replace(recipe, teach=teach, trains="audio_tower", look=10_000))
    assert {row["split"] for row in lesson.dev} == {"dev"}
    rows = [lesson.rows[i] for i in range(len(lesson.rows))]
    assert len(lesson.dev) == sum(row["split"] == "dev" for row in rows)
    seen = []
    plain = lesson.told
    monkeypatch.setattr(lesson, "told", lambda e: seen.extend(e) or plain(e))
    with torch.no_grad():
        whole = lesson.look(Ranks())
    assert sorted(e.id for e in seen) == sorted(row["id"] for row in lesson.dev)
    assert whole and all(0 <= right <= 1 for right in whole.values())


def test_a_perfect_ear_gets_full_marks(recipe, monkeypatch):
    """With heads that say what is there, every kind is 1; saying all of the opposite, 0."""
    lesson = lesson_of(replace(recipe, teach="names", trains="audio_tower"))
    examples = heard(lesson, 5)
    for sign, right in ((1, 1.0), (-1, 0.0)):
        said = sign * (lesson.hot(examples) * 2 - 1)
        monkeypatch.setitem(lesson.heads._modules, "name", lambda x: said)
        counts = lesson.told(examples)
        assert {(a / b).item() for a, b in counts.values() if b} == {right}
        assert "speaker" not in counts


def test_meanings_are_sums_of_embeddings(recipe):
    lesson = lesson_of(replace(recipe, teach="meanings", trains="multi_modal_projector"))
    net = lesson.net
    place = lesson.place["event", "rain"]
    table = net.language_model.embed_tokens.weight
    assert torch.equal(lesson.said[place], table[net.tokenizer.encode(" rain")].sum(0))
    phones = [i for i, (kind, _) in enumerate(lesson.names) if kind == "phone"]
    assert (lesson.said[phones] == 0).all()
    speakers = [i for i, (kind, _) in enumerate(lesson.names) if kind == "speaker"]
    assert (lesson.said[speakers].norm(dim=1) > 0).all()
    one, two = (table[net.tokenizer.encode(digit)].sum(0) for digit in "12")
    quarter = table.shape[1] // 4
    assert torch.allclose(lesson.times[30], (two + one.roll(quarter)) / 2)  # slot 30 is at 1.2 s
    longest = max(lesson.rows[i]["duration"] for i in range(len(lesson.rows)))
    assert len(lesson.times) >= longest / train.SLOT, "of the longest clip, too"
    alike = F.cosine_similarity(lesson.times[53], lesson.times[30], dim=0)
    assert alike < 0.5, "2.1 s is not 1.2 s"


def test_the_nearest_name_is_that_of_what_is_heard(recipe):
    """Slots that mean just what they should are told right, and those of another name wrong."""
    lesson = lesson_of(replace(recipe, teach="meanings", trains="multi_modal_projector"))
    examples = heard(lesson, 12)
    _, meant = lesson.project(examples)
    found = {kind: (near, right) for kind, near, right in lesson.nearest(meant, examples)}
    for kind in ("word", "event"):
        near, right = found[kind]
        assert len(right) and (near.argmax(1) == right).float().mean() > 0.95
        assert near.gather(1, right[:, None]).mean() == pytest.approx(1, abs=0.3)
    names = [name for k, name in lesson.names if k == "word"]
    word = lesson.said[lesson.place["word", names[0]]]
    moved = {kind: near for kind, near, _ in lesson.nearest(meant + 9 * word, examples)}
    assert (moved["word"].argmax(1) == 0).all()


# ------------------------------------------------------------------------------------------------
# What examples are drawn, and how they are put.


def drawn(recipe):
    lesson = lesson_of(replace(recipe, steps=0))
    plan = Plan(replace(recipe, steps=0, epochs=1), lesson)
    found = []
    while rows := plan.step():
        found += [e for row in rows for e in row]
    return found, lesson


def test_a_share_is_written_out(recipe):
    found, _ = drawn(replace(recipe, text=0.25))
    written = [e for e in found if not e.clips]
    assert 0.15 < len(written) / len(found) < 0.35
    found, _ = drawn(replace(recipe, text=1.0))
    assert not any(e.clips for e in found)


def test_what_is_bare_stands_in_the_answer_alone_and_what_follows_from_it_is_learned(recipe):
    found, lesson = drawn(replace(recipe, text=1.0, bare=1.0, weight=3.0))
    plain, _ = drawn(replace(recipe, text=1.0, bare=0.0))
    lengths = {e.id: len(e.ids) for e in plain}
    bare = [e for e in found if set(e.learned) == {0.0, 3.0}]
    assert len(bare) > 0.6 * len(found) and not any(e.clips for e in found)
    for e in bare:
        text = train.spelled(lesson.net, e.ids)
        prompt, _, answer = text.partition("<|im_start|>assistant")
        assert "audio 1:" not in prompt and "nswer" in answer
        assert len(e.ids) < lengths[e.id]
        learned = lesson.net.tokenizer.decode([i for i, w in zip(e.ids, e.learned) if w])
        follows = answer.partition(". ")[2].removesuffix("<|im_end|>")
        assert learned == re.sub("(^| )(So the answer|The answer|Answer)( is)?:", "", f" {follows}")
    others = [e for e in found if 1.0 in e.learned]
    assert all(e.task in ("captioning", *SINGLE) for e in others), "those without a verdict"


def test_no_more_clips_than_asked_for(recipe):
    found, _ = drawn(replace(recipe, most=2))
    everything, _ = drawn(recipe)
    assert {len(e.clips) for e in found} == {1, 2}
    assert len(found) == sum(len(e.clips) <= 2 for e in everything)


def test_tasks_are_drawn_as_often_as_told(recipe):
    everything, lesson = drawn(recipe)
    found, _ = drawn(replace(recipe, tasks="counting 2, tag 0, order 1.5"))
    count = {t: [sum(e.task == t for e in some) for some in (everything, found)]
             for _, t, _ in lesson.rows.tasks}  # fmt: skip
    assert count["counting"][1] == 2 * count["counting"][0] > 0
    assert count["tag"][1] == 0 < count["tag"][0]
    assert count["order"][0] < count["order"][1] < 2 * count["order"][0]
    rest = set(count) - {"counting", "tag", "order"}
    assert all(count[task][0] == count[task][1] for task in rest)
    found, _ = drawn(replace(recipe, tasks="counting 0, clips_with 2"))
    those = [sum("In how many" in lesson.net.tokenizer.decode(e.ids) for e in some)
             for some in (everything, found)]  # fmt: skip
    assert those[1] == 2 * those[0] == sum(e.task == "counting" for e in found) > 0
    with pytest.raises(BadInput, match="--tasks: expected a name and a number"):
        drawn(replace(recipe, tasks="dancing 2"))


@pytest.mark.parametrize("view", ["concat", "no-index", "no-boundary", "text-only"])
def test_examples_are_put_as_the_view_says(recipe, view):
    found, lesson = drawn(replace(recipe, view=view))
    text = train.spelled(lesson.net, next(e for e in found if e.task == "odd").ids)
    slots = len(re.findall(r"<\d+ slots>", text))
    prompt = text.partition("<|im_start|>assistant")[0]
    assert (slots == 1) == (view == "concat") and (slots == 0) == (view == "text-only")
    assert ("audio 2:" in prompt) == (view == "no-boundary")
    assert ("[BOA]" in prompt) == (view in ("concat", "no-index"))


# ------------------------------------------------------------------------------------------------
# What is kept of clips.


@pytest.mark.parametrize("trains", ["", "language_model"])
def test_what_is_kept_is_what_would_be_worked_out(recipe, tmp_path, trains, monkeypatch):
    """Mels where the encoder learns, its rows where it does not; the second time from the file."""
    kind = "rows" if trains else "mels"
    kept = replace(recipe, trains=trains, cache=str(tmp_path / "cache"))
    lesson, plain = lesson_of(kept), lesson_of(replace(kept, cache=""))
    first = heard(lesson, 6)
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    assert files and all(path.parent.name.startswith(kind) for path in files)
    monkeypatch.setattr(lesson.sounds, "work_out", None)
    again = heard(lesson, 6)
    losses = []
    for mine, examples in ((lesson, first), (lesson, again), (plain, heard(plain, 6))):
        with torch.no_grad():
            losses.append(mine.loss(examples)[0].item())
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-3)


def test_another_file_of_the_same_name_is_another_clip(recipe, tmp_path):
    lesson = lesson_of(replace(recipe, cache=str(tmp_path / "cache"), trains="language_model"))
    lesson.sounds.root = tmp_path
    lengths = []
    for seconds in (1, 2):
        soundfile.write(tmp_path / "a.wav", np.full(16_000 * seconds, 0.1), 16_000)
        lengths.append(len(lesson.sounds("a.wav")))
    assert lengths == [25, 50]
    other = lesson_of(replace(recipe, cache=str(tmp_path / "cache"), trains=""))
    assert other.sounds.folder != lesson.sounds.folder


# ------------------------------------------------------------------------------------------------
# The phases.


def small(toy, out, *words):
    where = recipe_on(toy)
    names = ("data", "dev", "corpus")
    given = [f"--{name}={getattr(where, name)}" for name in names]
    return ["train.py", *given, f"--out={out}", f"--cache={toy / 'cache'}", "--look=4", "--batch=4",
            "--every=1", "--steps=2", *words]  # fmt: skip


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """All phases, two steps each, on one rank."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, call(*small(toy, out), WORLD_SIZE="1")


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_phases_follow_one_another(whole):
    out, said = whole
    assert re.findall(r"phase (\w+):", said) == list(PHASES)
    assert len(re.findall(r"gate [\d.]+: (?:NOT )?passed", said)) == len(PHASES)
    folders = [train.phase_folder(out, name) for name in PHASES]
    for folder in folders:
        log = log_of(folder)
        assert [line["step"] for line in log] == [1, 2, 2, 2], "two steps, a look, the gate"
        assert log[-1]["gate"] == PHASES[folder.name if folder != out else "answer"]["gate"]
        assert json.loads((folder / "train.json").read_text())["steps"] == 2
    tensors = [dict(PolyAudio.from_dir(folder).named_parameters()) for folder in folders]
    trained = [tuple(PHASES[name]["trains"].split(", ")) for name in PHASES]
    for before, after, names in zip(tensors, tensors[1:], trained[1:]):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed and all(name.startswith(names) for name in changed)
    assert (out / "best" / "model.safetensors").exists()


@pytest.mark.long
def test_a_phase_may_be_begun_again_and_the_rest_follows(whole, toy, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    said = call(*small(toy, out, "--from-phase=join"), WORLD_SIZE="1")
    assert re.findall(r"phase (\w+):", said) == ["join", "answer"]
    for phase in ("join", "."):  # not to the bit: Muon makes much of the last one of a gradient
        logs = ((folder / phase / "log.jsonl").read_text() for folder in (out, whole[0]))
        one, other = ([float(n) for n in re.findall(r"\"loss\": ([\d.]+)", log)] for log in logs)
        assert one == pytest.approx(other, rel=0.01) and len(one) == 2
    said = call(*small(toy, out, "--resume"), WORLD_SIZE="1")
    assert not re.search(r"phase \w+:", said), "nothing is left to do"


@pytest.mark.parametrize("phase, words, said", [
    ("answer", ["--tasks=oder 2"], "--tasks: expected a name"),
    ("join", ["--trains=nothing_here"], "--trains: expected"),
])  # fmt: skip
def test_a_mistake_in_what_is_begun_again_loses_nothing(whole, toy, phase, words, said):
    states = sorted(whole[0].glob("**/state-*"))
    assert said in call(*small(toy, whole[0], f"--from-phase={phase}", *words), code=2,
                        WORLD_SIZE="1")  # fmt: skip
    assert sorted(whole[0].glob("**/state-*")) == states


def test_ablations_want_a_set_to_ask(whole, toy):
    said = call(*small(toy, whole[0], "--ablate", "--dev="), code=2, WORLD_SIZE="1")
    assert "--ablate: expected a --dev set, found none" in said


def test_a_run_that_is_there_is_not_overwritten(whole, toy):
    said = call(*small(toy, whole[0]), code=2)
    assert "expected --resume, or no checkpoint there, found that of step 2" in said


@pytest.mark.long
def test_a_run_goes_on_in_the_phase_where_it_stopped(whole, toy, tmp_path):
    """As if killed in the second phase: its last checkpoint is of step 1."""
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    for folder in ("join", "best"):
        shutil.rmtree(out / folder)
    for path in [*out.glob("state-*"), out / "read" / "state-0000002.json"]:
        path.unlink()
    said = call(*small(toy, out, "--resume"), WORLD_SIZE="1")
    assert re.findall(r"phase (\w+):", said) == ["read", "join", "answer"]
    assert "steps: 2, from 1" in said
    one, other = (PolyAudio.from_dir(folder).parameters() for folder in (out, whole[0]))
    assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_as_many_ranks_as_cores_that_it_may_use(monkeypatch):
    """What is begun by hand begins itself again on each, with the same flags."""
    begun = []

    class Rank:
        def __init__(self, words, env, pass_fds):
            assert str(*pass_fds) == env["POLYAUDIO_LEASH"]
            begun.append((words, env))

        def poll(self):
            return 2

    monkeypatch.setattr(train, "cores", lambda: 3)
    monkeypatch.setattr(train.subprocess, "Popen", Rank)
    monkeypatch.setattr(train.signal, "signal", lambda *given: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(train.sys, "argv", ["train.py", "--seed", "3"])
    with pytest.raises(SystemExit) as end:
        train.spread_out(torch.device("cpu"))
    assert end.value.code == 2, "that of a rank that failed"
    assert [words[1:] for words, _ in begun] == [["train.py", "--seed", "3"]] * 3
    assert [env["RANK"] for _, env in begun] == ["0", "1", "2"]
    assert {env["WORLD_SIZE"] for _, env in begun} == {"3"}
    monkeypatch.setenv("WORLD_SIZE", "2")
    train.spread_out(torch.device("cpu"))
    assert len(begun) == 3, "a rank begins no others"


@pytest.mark.parametrize("ends, codes, killed", [
    ([(0, 1), (0, 5)], [0, 0], False), ([(143, 1), (143, 300)], [143, 143], False),
    ([(-9, 1), (2, 30)], [-9, 2], False), ([(1, 1), (0, math.inf)], [1, -9], True),
])  # fmt: skip
def test_a_rank_that_nobody_can_meet_is_not_waited_for(monkeypatch, ends, codes, killed):
    """ends: the code with which each ends, and after how many looks. Who saves may take long."""
    looks, kills = [0], []

    class Rank:
        def __init__(self, code, when):
            self.code, self.when = code, when

        def poll(self):
            return self.code if looks[0] >= self.when else None

        def kill(self):
            kills.append(self)
            if self.poll() is None:
                self.code, self.when = -9, 0

    monkeypatch.setattr(train.time, "sleep", lambda seconds: looks.append(looks.pop() + 1))
    assert train.waited([Rank(*end) for end in ends]) == codes
    assert bool(kills) == killed


@pytest.mark.long
def test_ranks_end_with_the_one_that_began_them(toy, tmp_path):
    """By kill -9, too; else they would go on unseen, and keep the folder."""
    words = small(toy, tmp_path / "run", "--steps=100000", "--every=100000")
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "POLYAUDIO_KERNELS": "cpu"},
    )  # fmt: skip
    try:
        for line in process.stderr:
            if line.startswith("world-"):
                break
        with pytest.raises(BadInput, match="one run at a time"), train.alone(tmp_path / "run"):
            pass
    finally:
        process.kill()
        process.wait()
    limit, free = time.monotonic() + 20, False
    while not free and time.monotonic() < limit:
        time.sleep(0.1)
        try:
            with train.alone(tmp_path / "run"):
                free = True
        except BadInput:
            pass
    assert free


def test_cores_are_those_of_the_container(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr(prepare, "Path", lambda path: limit)
    found = []
    for text in ("max 100000\n", "250000 100000\n", "30000 100000\n"):
        limit.write_text(text)
        found.append(prepare.cores())
    limit.unlink()
    assert [*found, prepare.cores()] == [64, 2, 1, 64]


@pytest.mark.long
def test_ranks_that_fail_say_so_in_a_line(toy, tmp_path):
    said = call(*small(toy, tmp_path / "run", "--from-phase=hear", "--tokens=3"), code=2)
    assert "--tokens: expected room for the longest example" in said


@pytest.mark.long
def test_ctrl_c_ends_all_ranks_and_saves(toy, tmp_path):
    """The terminal tells the one that waits and those that learn, all at once."""
    words = small(toy, tmp_path / "run", "--steps=100000", "--every=100000")
    env = {**os.environ, "POLYAUDIO_KERNELS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("world-"):  # the example that a run shows before it begins
            break
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in err, err
    (path,) = train.checkpoints(tmp_path / "run" / "hear")
    assert json.loads(path.with_suffix(".json").read_text())["step"] > 0


@pytest.mark.long
def test_the_default_command_runs_on_all_cores(toy, tmp_path):
    said = call(*small(toy, tmp_path / "run"))
    assert re.findall(r"phase (\w+):", said) == list(PHASES)
    assert f"on {min(train.cores(), 8)} x cpu" in said


def test_a_checkpoint_with_a_card_and_a_log(whole, tmp_path):
    out = tmp_path / "tiny"
    call("train.py", "--merge", whole[0], "--out", out, "--dtype", "bf16")
    size = sum(path.stat().st_size for path in out.iterdir())
    assert size < 11e6
    text = (out / "README.md").read_text()
    total = sum(p.numel() for p in PolyAudio.from_dir(out).parameters())
    assert text.startswith("# tiny\n") and f"{total:,} parameters" in text
    assert "Made from nothing" in text and "CC0-1.0" in text and "- hear: " in text
    phases = [line["phase"] for line in map(json.loads, (out / "log.jsonl").open())]
    assert list(dict.fromkeys(phases)) == list(PHASES)
    call("train.py", "--merge", whole[0] / "best", "--out", tmp_path / "best")
    card = (tmp_path / "best" / "README.md").read_text()
    assert "Made from nothing" in card and "where it was best" in card
    one, other = PolyAudio.from_dir(out), PolyAudio.from_dir(whole[0])
    for a, b in zip(one.parameters(), other.parameters()):
        assert torch.equal(a, b.bfloat16().float())
    clip = ROOT / "clips" / "dog.flac"
    said = call("sample.py", "--clips", clip, "--ask", "What?", "--weights", out, "--json")
    report, _ = json.JSONDecoder().raw_decode(said, said.index("{"))
    assert report["tokens"] > 0  # whatever they say, after four steps


def test_what_forbids_commerce_says_so(whole):
    made = json.loads((whole[0] / "train.json").read_text())
    net = PolyAudio.from_dir(whole[0])
    bound = train.card(net, "x", {**made, "licences": ["CC0-1.0", "CC-BY-NC-4.0"]}, [])
    assert "Not for commerce: CC-BY-NC-4.0" in bound
    assert "Not for commerce" not in train.card(net, "x", made, [])


@pytest.mark.long
def test_arms_are_learned_and_told_in_a_table(whole, toy, tmp_path, monkeypatch, capsys):
    """Three of them here, one seed: the others differ in a field, see below."""
    few = ("interleaved", "concatenated", "perceiver of 16")
    monkeypatch.setattr(train, "ARMS", {arm: train.ARMS[arm] for arm in few})
    monkeypatch.setattr(train, "SEEDS", 1)
    out, given = tmp_path / "run", {"steps": 1, "look": 4, "batch": 4, "cache": ""}
    shutil.copytree(whole[0], out)
    recipe = recipe_on(toy, out=str(out), **given)
    device = torch.device("cpu")
    train.run_ablations(recipe, given, device, Ranks())
    told = capsys.readouterr()
    table = json.loads((out / "ablate" / "table.json").read_text())
    full = [f"{arm}{train.WHOLE}" for arm in ("concatenated", "interleaved")]
    assert list(table["scores"]) == [few[0], *train.OTHERWISE, *few[1:], *full]
    assert all(len(runs) == 1 and runs[0] for runs in table["scores"].values())
    assert re.search(r"concatenated +0\.\d{3} +the paper: 61\.2", told.out)
    assert re.search(r"perceiver of 16 +0\.\d{3} *\n", told.out), "of which no paper tells"
    made = PolyAudio.from_dir(out / "ablate" / "perceiver-of-16-0").config.resampler
    assert made["kind"] == "perceiver" and made["slots"] == 16
    train.run_ablations(recipe, given, device, Ranks())
    again = capsys.readouterr()
    assert again.out == told.out and "arm " not in again.err, "what is done is not done again"
    assert (out / "asked.json").exists()
    def again(name):
        train.begin_again(train.phase_of(recipe, given, name), out, name)

    again("answer")
    assert (out / "ablate").exists() and not (out / "asked.json").exists()
    again("join")
    assert not (out / "ablate").exists(), "arms on another encoder would not compare"


def test_arms_differ_in_one_thing(monkeypatch, toy, tmp_path):
    seen = {}
    monkeypatch.setattr(train, "learn", lambda made, *given: seen.update({made.out: made}) or True)
    monkeypatch.setattr(train, "checkpoints", lambda folder: [folder / "x"])
    monkeypatch.setattr(train, "read_json", lambda path: {"tasks": {}})
    monkeypatch.setattr(train, "ask_again", lambda *given: {})
    monkeypatch.setattr(train, "has_ended", lambda recipe: True)
    monkeypatch.setattr(train, "with_perceiver", lambda *given: None)
    monkeypatch.setattr(train, "write_json", lambda *given: None)
    train.run_ablations(recipe_on(toy, out=str(tmp_path)), {}, "cpu", Ranks())
    made = list(seen.values())
    short, long = train.ARM["steps"], PHASES["answer"]["steps"]
    assert [each.steps for each in made] == [short] * 16 + [long]
    first = asdict(made[0])
    for each, (arm, change) in zip(made, train.ARMS.items()):
        own = {name for name, value in asdict(each).items() if value != first[name]} - {"out"}
        assert own == set(change) | ({"base"} if "perc" in arm else set())
    assert [each.seed for each in made] == [0] * 8 + [1] * 8 + [0]
    assert made[-1].view == "concat"


def test_ablations_want_a_run_that_has_ended(toy, tmp_path):
    said = call(*small(toy, tmp_path / "none", "--ablate"), code=2, WORLD_SIZE="1")
    assert "expected a run that has come to its end, found none" in said
    assert not list((tmp_path / "none").glob("*"))


def test_without_data_the_first_command_says_how_to_make_it(tmp_path):
    said = call("train.py", "--data", tmp_path / "toy.jsonl", code=2)
    assert "python synth.py makes it" in said


def test_what_comes_along_is_small_and_others_read_it_alike():
    """weights/tiny, with two of the clips that come along."""
    folder = ROOT / "weights" / "tiny"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 11e6
    net = PolyAudio.from_dir(folder, dtype=torch.float32)
    waves = [load_clip(f"clips/{name}", ROOT) for name in ("dog.flac", "storm.flac")]
    ids, clips = net.prompt([{"role": "user", "content": "In which clip is a dog heard?"}], waves)
    with torch.no_grad():
        found = net.logits(ids, clips)
    theirs = AudioFlamingo3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    expected = oracle_logits("af3", theirs.eval(), ids, clips)
    assert (found - expected).abs().max() < 3e-5 * expected.std()
    assert "layout of audioflamingo3" in (folder / "README.md").read_text()


@pytest.mark.long
def test_who_goes_on_from_a_run_has_a_card_too(whole, toy, tmp_path):
    """With a gate, and without phases."""
    run = tmp_path / "run"
    call(*small(toy, run, f"--base={whole[0]}", "--gate=0.5", "--trains=lm_head"), WORLD_SIZE="1")
    call("train.py", "--merge", run, "--out", tmp_path / "more")
    assert f"Made from `{whole[0]}`" in (tmp_path / "more" / "README.md").read_text()
