"""What model.py promises, on small random checkpoints (tests/checkpoints.py).

The network gives the numbers of transformers, from whole answers down to the encoder alone, and its
gradients too; and many ways to be slightly wrong show that the comparison would notice. Examples
in a pack, clips in an example, rows in a batch never touch each other. A perceiver gives every clip
the same number of slots. A cache changes the time that an answer takes, and nothing else. No tensor
as large as a mask over a whole pack is ever made.
"""

import copy
import functools
import json
import re
import shutil
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
from model import BadInput, Cache, Config, Perceiver, PolyAudio, answer_all, canonical, choose
from prepare import Tokenizer, log_mels, train_bpe
from tests.checkpoints import (
    HEARS,
    SECONDS,
    SLOT,
    VOCAB,
    edit_json,
    inputs,
    interleave,
    make,
    oracle_greedy,
    oracle_logits,
    oracle_sounds,
    slots_of,
    text,
    waves,
)

LOGITS = 3e-5  # float32, where logits spread over 1.7: what transformers differs from itself by
SOUNDS = 5e-6  # the same for the encoder's slots, which fewer layers have touched
HEARING = ("af3", "qwen2_audio")
READING = ("qwen2", "qwen3")


class Base(NamedTuple):
    """One small checkpoint: where it lies, our network and transformers' from it."""

    kind: str
    dir: object
    net: PolyAudio
    oracle: nn.Module

    def ask(self, seconds, seed=0, **layout):
        """Clips of those lengths and ids around them: (ids, clips)."""
        clips = waves(seconds, seed)
        return interleave(clips, seed, max_seconds=HEARS[self.kind], **layout), clips

    def expected(self, ids, clips):
        return oracle_logits(self.kind, self.oracle, ids, clips, HEARS[self.kind])

    def expected_greedy(self, rows, n):
        return oracle_greedy(self.kind, self.oracle, rows, n, HEARS[self.kind])


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load("af3") -> a Base, made once. Tests that change its network work on a copy."""

    @functools.lru_cache
    def load(kind) -> Base:
        dir = tmp_path_factory.mktemp(kind)
        oracle = make(kind, dir)
        return Base(kind, dir, PolyAudio.from_dir(dir), oracle)

    return load


@pytest.fixture
def af3(load):
    return load("af3")


@pytest.fixture
def qwen2(load):
    return load("qwen2")


def off(a, b) -> float:
    """The largest difference; infinite if anything is not a number."""
    assert a.shape == b.shape
    return torch.nan_to_num((a - b).abs(), nan=torch.inf).max().item()


def packed(net, rows):
    """The logits of several (ids, clips), read in one pack."""
    ids, clips = zip(*rows)
    hidden = net.hidden(list(ids), list(clips))
    return net.project(hidden).split([len(row) for row in ids])


@contextmanager
def counting(module, measure):
    """A list that grows by measure(arguments) whenever the module runs."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(measure(args)))
    yield seen
    hook.remove()


def reading(net):
    """How many tokens the decoder reads, call by call."""
    return counting(net.language_model, lambda args: len(args[0]))


def hearing(net):
    """How many windows the encoder hears, call by call."""
    return counting(net.audio_tower, lambda args: len(args[0]))


# ------------------------------------------------------------------------------------------------
# The same numbers as transformers.

CONVERSATIONS = {
    "text only": ((), {"gap": 40}),
    "the shortest": ((0.03,), {}),
    "a clip alone, no text": ((0.3,), {"adjacent": True}),
    "clip first": ((1.01, 3.0), {}),
    "clip last": ((3.0, 0.3), {"before": 6, "after": 0}),
    "text around": ((0.3, 0.03, 1.01), {"before": 4}),
    "adjacent": ((1.01, 0.03, 3.0), {"adjacent": True, "before": 3, "after": 3}),
    "nearly a window": ((29.99, 0.3), {}),
    "80 samples over a window": ((0.3, 30.005, 1.01), {}),
    "two windows": ((31.0, 0.03), {}),
    "eight": ((0.3, 1.01, 0.03, 3.0, 0.03, 0.3, 1.01, 0.3), {}),
}


@pytest.mark.parametrize("kind", HEARING)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_logits_are_those_of_transformers(load, kind, name):
    seconds, layout = CONVERSATIONS[name]
    base = load(kind)
    ids, clips = base.ask(seconds, **layout)
    assert off(base.net.logits(ids, clips), base.expected(ids, clips)) <= LOGITS


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEARING)
@pytest.mark.parametrize("n", range(1, 9))
def test_logits_of_any_mixture_of_clips(load, kind, n):
    base = load(kind)
    for seed in range(3):
        dice = np.random.default_rng(100 * n + seed)
        spaces = {"before": int(dice.integers(0, 4)), "after": int(dice.integers(0, 4))}
        adjacent = bool(dice.integers(0, 2))
        ids, clips = base.ask(dice.choice(SECONDS, n), seed, adjacent=adjacent, **spaces)
        assert off(base.net.logits(ids, clips), base.expected(ids, clips)) <= LOGITS


@pytest.mark.parametrize("kind", READING)
def test_logits_of_the_text_models(load, kind):
    base = load(kind)
    ids = text(200)
    assert off(base.net.logits(ids, []), base.expected(ids, [])) <= LOGITS


@pytest.mark.parametrize("kind", HEARING + READING)
def test_greedy_tokens_are_those_of_transformers(load, kind):
    base = load(kind)
    ids, clips = base.ask((0.3, 1.01, 3.0)) if kind in HEARING else (text(50), [])
    new = base.net.generate(ids, clips, 32)
    assert len(new) == 32
    assert new == base.expected_greedy([(ids, clips)], 32)[0]


@pytest.mark.parametrize("kind", HEARING)
def test_qwen2_audio_hears_thirty_seconds_and_af3_ten_minutes(load, kind):
    base = load(kind)
    clip = waves((31.0,))[0]
    whole, part = base.net.encode([clip])[0], base.net.encode([clip[:480_000]])[0]
    assert len(part) == 750
    if kind == "qwen2_audio":
        assert off(whole, part) <= 1e-6
    else:
        assert len(whole) == slots_of(clip) == 775


def test_a_clip_beyond_ten_minutes_is_cut_and_says_so(af3, capsys):
    clip = np.zeros(600 * 16000 + 5000, np.float32)
    assert af3.net.n_slots(clip) == 20 * 750
    assert "hears the first 600 s" not in capsys.readouterr().err
    assert len(af3.net.encode([clip])[0]) == 20 * 750
    assert "hears the first 600 s" in capsys.readouterr().err


@pytest.mark.parametrize("kind", HEARING)
def test_a_clip_may_be_given_as_what_was_made_of_it(load, kind):
    """Its windows, or the encoder's rows: then the same is heard, and the rest not done again."""
    net = load(kind).net
    clips = waves((0.3, 1.01, 30.5 if HEARS[kind] > 31 else 0.7))
    ids = interleave(clips)
    expected = net.logits(ids, clips)
    windows = net.windows(clips)
    rows = [part.clone() for part in net.listen(clips)]
    assert [net.n_slots(clip) for clip in clips] == [len(part) for part in rows]
    assert [net.n_slots(len(clip)) for clip in clips] == [len(part) for part in rows]
    for given in (windows, rows, [clips[0], windows[1], rows[2]], [rows[0], clips[1], windows[2]]):
        assert [net.n_slots(clip) for clip in given] == [net.n_slots(clip) for clip in clips]
        with hearing(net) as heard:
            assert off(net.logits(ids, given), expected) <= LOGITS
        assert sum(heard) == sum(
            len(windows[i]) for i, clip in enumerate(given) if getattr(clip, "ndim", 1) != 2
        )


@pytest.mark.parametrize("kind", HEARING)
def test_a_repeated_clip_is_heard_once(load, kind):
    base = load(kind)
    (clip, other), again = waves((0.3, 1.01)), waves((0.3,))[0]
    clips = [clip, other, clip, clip]
    ids = interleave(clips)
    expected = base.expected(ids, clips)
    with hearing(base.net) as windows:
        got = base.net.logits(ids, clips)
        copied = base.net.logits(ids, [clip, other, again, clip])
    assert windows == [2, 3]  # another array with the same samples is another clip
    assert off(got, expected) <= LOGITS
    assert off(copied, expected) <= LOGITS


def mixed_rows(base):
    """Prompts that have nothing in common, with and without clips."""
    rows = [base.ask((0.3, 1.01, 3.0)), (text(9, seed=1), [])]
    rows.append(base.ask((1.01, 0.03), seed=2, adjacent=True, before=2))
    clip = waves((0.3,), seed=3)[0]
    return [*rows, (interleave([clip, clip], seed=3), [clip, clip])]


@pytest.mark.parametrize("kind", HEARING)
def test_a_batch_of_different_prompts(load, kind):
    """Ours has no padding; transformers pads on the left. Both equal each prompt alone."""
    base = load(kind)
    rows = mixed_rows(base)
    with torch.no_grad():
        padded = base.oracle(**inputs(kind, rows, HEARS[kind])).logits
    for (ids, clips), got, other in zip(rows, packed(base.net, rows), padded):
        assert off(got, other[-len(ids) :]) <= LOGITS
        assert off(got, base.net.logits(ids, clips)) <= LOGITS
    ids, clips = map(list, zip(*rows))
    new = base.net.generate(ids, clips, 16)
    assert new == base.expected_greedy(rows, 16)
    assert new == [base.net.generate(*row, 16) for row in rows]


@pytest.mark.parametrize("kind", READING)
def test_a_batch_of_texts(load, kind):
    base = load(kind)
    rows = [(text(n, seed=n), []) for n in (30, 1, 12)]
    new = base.net.generate([ids for ids, _ in rows], [[]] * 3, 16)
    assert new == base.expected_greedy(rows, 16)


def rms(a) -> float:
    return a.square().mean().sqrt().item()


@pytest.mark.parametrize("repacked", [False, True])
@pytest.mark.parametrize("kind", HEARING)
def test_bfloat16_is_as_exact_as_that_of_transformers(load, kind, repacked):
    """Two correct networks differ in bfloat16; what counts is the distance to float32. Few rows
    are read from the weights' second copy, many from the first."""
    base = load(kind)
    net = PolyAudio.from_dir(base.dir, dtype=torch.bfloat16)
    rows = [base.ask((1.01, 3.0, 0.3))]
    if repacked:
        net.repack(reserve=0)
        rows = [(text(14, seed), []) for seed in range(20)]
    half = copy.deepcopy(base.oracle).bfloat16()
    ours, theirs = [], []
    for ids, clips in rows:
        given = inputs(kind, [(ids, clips)], HEARS[kind])
        if clips:
            given["input_features"] = given["input_features"].bfloat16()
        exact = base.expected(ids, clips)
        with torch.no_grad():
            theirs.append(half(**given).logits[0].float() - exact)
        ours.append(net.logits(ids, clips).float() - exact)
    ours, theirs = rms(torch.cat(ours)), rms(torch.cat(theirs))
    assert 1e-3 < theirs  # bfloat16 it was
    assert ours <= 1.2 * theirs


def test_gradients_are_those_of_transformers(af3):
    ids, clips = af3.ask((0.3, 1.01))
    net = copy.deepcopy(af3.net).requires_grad_(True)
    loss, n = net.loss([(ids, clips, [True] * len(ids))])
    loss.backward()
    oracle = copy.deepcopy(af3.oracle).requires_grad_(True)
    logits = oracle(**inputs("af3", [(ids, clips)])).logits[0, :-1]
    expected = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
    expected.backward()
    assert n == len(ids) - 1
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = {canonical(name): p.grad for name, p in oracle.named_parameters()}
    ours = {name: p.grad for name, p in net.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert (grad - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


# ------------------------------------------------------------------------------------------------
# The encoder alone: every length at which a rounding could go wrong, in one pack.

FRAMES = [*range(3, 13), *range(2997, 3001)]


def clips_of_frames(missing):
    """One clip for each number of frames, whose last frame lacks that many of its 160 samples."""
    return waves([(frames * 160 - missing) / 16000 for frames in FRAMES])


@pytest.mark.parametrize("missing", [0, 39, 159])
def test_slots_are_those_of_transformers(af3, missing):
    """Up to 39 samples short, two frames more than the valid ones still hold some of the clip."""
    clips = clips_of_frames(missing)
    found = af3.net.encode(clips)
    assert [len(x) for x in found] == [slots_of(clip) for clip in clips]
    assert off(torch.cat(found), oracle_sounds(af3.oracle, clips)) <= SOUNDS


def test_slots_in_float64_are_exact(af3):
    """Both nets get the same mels, so that nothing is left but the networks themselves."""
    clips = clips_of_frames(0)
    features = inputs("af3", [([0], clips)])["input_features"].double()
    mels = [mel[:, : frames + 2] for mel, frames in zip(features, FRAMES)]
    net = copy.deepcopy(af3.net).double()
    x, slots = net.audio_tower(mels, FRAMES)
    got, _ = net.multi_modal_projector(x, slots)
    exact = oracle_sounds(copy.deepcopy(af3.oracle).double(), clips, torch.float64)
    assert exact.dtype == torch.float64
    assert off(got, exact) <= 1e-12


def test_many_windows_go_through_the_encoder_in_several_packs(af3, monkeypatch):
    clips = waves((0.3, 3.0, 1.01, 0.03, 31.0))
    whole = torch.cat(af3.net.encode(clips))
    monkeypatch.setattr(model, "ENCODER_FRAMES", 350)
    with hearing(af3.net) as windows:
        parts = torch.cat(af3.net.encode(clips))
    assert windows == [2, 2, 1, 1]
    assert off(whole, parts) <= SOUNDS


# ------------------------------------------------------------------------------------------------
# Negative controls: what the comparison above would see. Each makes one mistake in our network.

CONTROL = (1.01, 0.3, 3.0)  # 51, 15 and 150 positions: two odd ones, and no two of one length


def rebuilt(net, **changed):
    """The same weights under another text_config."""
    raw = copy.deepcopy(net.config.raw)
    raw["text_config"] |= changed
    other = PolyAudio(Config.from_dict(raw))
    other.load_state_dict(net.state_dict())
    return other


def theta(net, patch):
    return rebuilt(net, rope_parameters={"rope_theta": 1e4, "rope_type": "default"})


def rms_eps(net, patch):
    return rebuilt(net, rms_norm_eps=1e-5)


def layer_norm_eps(net, patch):
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


def tiled_heads(net, patch):
    """Query head h reads key head h mod G; it has to be h // (H / G)."""
    real = model.attention

    def tiled(q, k, v, *rest):
        heads = torch.arange(q.shape[1]).view(-1, k.shape[1]).T.flatten()
        return real(q[:, heads], k, v, *rest)[:, heads.argsort()]

    patch.setattr(model, "attention", tiled)


def rotary_pairs(net, patch):
    """Neighbours turned together, where it has to be the halves of a head: the same as weights
    whose rows lie in the other order."""
    size = net.config.decoder.head_size
    order = torch.arange(size).view(-1, 2).T.flatten()
    for layer in net.language_model.layers:
        for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            proj.weight.data = proj.weight.data.unflatten(0, (-1, size))[:, order].flatten(0, 1)
            proj.bias.data = proj.bias.data.unflatten(0, (-1, size))[:, order].flatten()


def slots_off_by_one(net, patch):
    projector = net.multi_modal_projector
    projector.register_forward_hook(lambda _, args, out: (out[0].roll(1, 0), out[1]))


def norm_before_pool(net, patch):
    norm, net.audio_tower.layer_norm = net.audio_tower.layer_norm, nn.Identity()
    net.audio_tower.layers[-1].register_forward_hook(lambda _, args, out: norm(out))


def no_context(net, patch):
    def cut(_, args):
        mels, frames = args
        return [mel[:, :n] for mel, n in zip(mels, frames)], frames

    net.audio_tower.register_forward_pre_hook(cut)


def silent_context(net, patch):
    """The two frames of context filled with what whisper makes of silence."""

    def fill(_, args):
        mels, frames = args
        mels = [mel.clone() for mel in mels]
        for mel, n in zip(mels, frames):
            mel[:, n:] = max(-1.5, mel.max() - 2)
        return mels, frames

    net.audio_tower.register_forward_pre_hook(fill)


def pool_across_clips(net, patch):
    """Pairs counted from the start of the pack, where each clip has to begin a pair."""

    def shift(_, args, out):
        bounds = args[1].tolist()
        pairs = [torch.arange(a, b - (b - a) % 2) for a, b in zip(bounds, bounds[1:])]
        places = torch.cat(pairs)
        return out.index_copy(0, places, out[: len(places)])

    net.audio_tower.layers[-1].register_forward_hook(shift)


def decoder_k_bias(net, patch):
    for layer in net.language_model.layers:
        layer.self_attn.k_proj.bias.data.zero_()


def encoder_q_bias(net, patch):
    for layer in net.audio_tower.layers:
        layer.self_attn.q_proj.bias.data.zero_()


def tanh_gelu(net, patch):
    real = F.gelu
    patch.setattr(F, "gelu", lambda x: real(x, approximate="tanh"))


def clips_permuted(net, patch):
    real = net.encode
    patch.setattr(net, "encode", lambda clips: real(clips[::-1]))


def positions_go_on(net, patch):
    """Encoder positions counted through the pack, where they have to restart in each window."""
    table = net.audio_tower.embed_positions.weight

    def shift(_, args):
        x, cu, *rest = args
        right = torch.cat([torch.arange(n) for n in cu.diff().tolist()])
        return x - table[right] + table[: len(x)], cu, *rest

    net.audio_tower.layers[0].register_forward_pre_hook(shift)


def encoder_sees_all(net, patch):
    """Attention across windows."""
    real = model.attention

    def open_wide(q, k, v, cu_q, cu_k, causal):
        if not causal:
            cu_q, cu_k = cu_q[[0, -1]], cu_k[[0, -1]]
        return real(q, k, v, cu_q, cu_k, causal)

    patch.setattr(model, "attention", open_wide)


def decoder_sees_ahead(net, patch):
    real = model.attention
    patch.setattr(model, "attention", lambda *args: real(*args[:-1], False))


def norm_skipped(net, patch):
    net.language_model.norm.weight.data.fill_(1)


MISTAKES = [
    theta, rms_eps, layer_norm_eps, tiled_heads, rotary_pairs, slots_off_by_one, norm_before_pool,
    no_context, silent_context, pool_across_clips, decoder_k_bias, encoder_q_bias, tanh_gelu,
    clips_permuted, positions_go_on, encoder_sees_all, decoder_sees_ahead, norm_skipped,
]  # fmt: skip


@pytest.fixture(scope="module")
def control(load):
    base = load("af3")
    ids, clips = base.ask(CONTROL)
    return base, ids, clips, base.expected(ids, clips)


def test_without_a_mistake_the_comparison_passes(control):
    base, ids, clips, expected = control
    assert off(copy.deepcopy(base.net).logits(ids, clips), expected) <= LOGITS


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_seen(control, mistake, monkeypatch):
    base, ids, clips, expected = control
    net = copy.deepcopy(base.net)
    net = mistake(net, monkeypatch) or net
    with torch.no_grad():
        got = net.logits(ids, clips)
    assert got.isfinite().all()
    assert off(got, expected) > 10 * LOGITS


# ------------------------------------------------------------------------------------------------
# Packing: what lies in the same row does not touch.


def test_examples_in_a_pack_are_the_examples_alone(af3):
    rows = mixed_rows(af3)
    alone = [af3.net.logits(*row) for row in rows]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        found = packed(af3.net, [rows[i] for i in order])
        for i, logits in zip(order, found):
            assert off(logits, alone[i]) <= LOGITS


def test_batch_mates_do_not_matter(af3):
    row = af3.ask((0.3, 1.01))
    mates = [(text(40, seed=5), []), af3.ask((3.0,), seed=6), af3.ask((0.03, 0.03), seed=7)]
    alone = af3.net.logits(*row)
    for mate in mates:
        assert off(packed(af3.net, [mate, row])[1], alone) <= LOGITS
        assert off(packed(af3.net, [row, mate])[0], alone) <= LOGITS


def test_nothing_leaks_from_a_spoiled_neighbour(af3):
    """NaN goes wherever a number is read, even where it is then multiplied by zero."""
    net = copy.deepcopy(af3.net)
    net.language_model.embed_tokens.weight.data[VOCAB - 1] = torch.nan
    row = af3.ask((0.3, 1.01))
    broken = waves((0.3,))[0] * np.float32(np.nan)
    spoiled = [
        ([VOCAB - 1] * len(row[0]), []),  # of the same length, so that both share one attention
        (interleave([broken]), [broken]),
    ]
    alone = net.logits(*row)
    for neighbour in spoiled:
        for pack, place in (([neighbour, row], 1), ([row, neighbour], 0)):
            found = packed(net, pack)
            assert found[1 - place].isnan().any()
            assert off(found[place], alone) <= LOGITS


def test_nothing_leaks_from_a_spoiled_clip_before_the_decoder(af3):
    clips = waves((0.3, 0.3, 0.3))
    alone = af3.net.encode(clips)
    clips[1] = clips[1] * np.float32(np.nan)
    found = af3.net.encode(clips)
    assert found[1].isnan().all()
    assert off(found[0], alone[0]) <= 1e-6
    assert off(found[2], alone[2]) <= 1e-6


def test_the_order_of_clips_matters(af3):
    first, second = waves((0.3, 0.3))
    ids = interleave([first, second], before=3)
    a, b = af3.net.logits(ids, [first, second]), af3.net.logits(ids, [second, first])
    assert off(a[:3], b[:3]) <= 1e-6  # before the first clip nothing is known of it
    assert off(a[-1:], b[-1:]) > 0.1


@pytest.mark.parametrize(
    ("ids", "seconds"),
    [
        ([], ()),
        ([5, VOCAB], ()),
        ([5, -1], ()),
        ([5, SLOT], ()),
        ([5] + 6 * [SLOT], (0.3,)),
        ([5] + 7 * [SLOT], ()),
        ([5], (0.3,)),
    ],
)
def test_ids_that_cannot_be_read_are_refused(af3, ids, seconds):
    clips = waves(seconds)
    for call in (af3.net.logits, af3.net.generate):
        with pytest.raises(BadInput, match="ids"):
            call(ids, clips)


@pytest.mark.parametrize("samples", [0, 1, 320])
def test_a_clip_too_short_to_hear_is_refused(af3, samples):
    """It would vanish from the prompt without a word: 321 samples are the least."""
    clip = np.zeros(samples, np.float32)
    assert af3.net.n_slots(clip) == 0
    for call in (af3.net.logits, af3.net.generate):
        with pytest.raises(BadInput):
            call([1, 2, 3], [clip])
    assert af3.net.logits([1, SLOT], [np.zeros(321, np.float32)]).isfinite().all()


# ------------------------------------------------------------------------------------------------
# The perceiver: the same number of slots for every clip.

PERCEIVER = {"kind": "perceiver", "slots": 8, "layers": 2, "heads": 4}


@pytest.fixture(scope="module")
def perceiver(load):
    """A network of our own kind, of AF3's shape, as random as the others."""
    raw = copy.deepcopy(load("af3").net.config.raw) | {"model_type": "polyaudio"}
    torch.manual_seed(1)
    net = PolyAudio(Config.from_dict({**raw, "resampler": PERCEIVER})).requires_grad_(False).eval()
    for parameter in net.parameters():
        parameter += 0.2 * torch.randn_like(parameter) / parameter[0].numel() ** 0.5
    return net


def eights(clips, after=4):
    """Ids around clips of eight slots."""
    ids = [[*text(3, seed), *[SLOT] * 8] for seed, _ in enumerate(clips)]
    return [*sum(ids, []), *text(after, 9)]


def test_a_clip_of_any_length_makes_the_same_number_of_slots(perceiver):
    clips = waves((0.03, 0.3, 1.01, 31.0))
    assert [perceiver.n_slots(clip) for clip in clips] == [8] * 4
    assert [perceiver.n_slots(len(clip)) for clip in clips] == [8] * 4
    assert [x.shape for x in perceiver.encode(clips)] == [(8, 64)] * 4
    assert perceiver.logits(eights(clips), clips).isfinite().all()
    with pytest.raises(BadInput, match="slots"):
        perceiver.logits(eights(clips)[1 + 3 :], clips)


def test_a_clips_slots_depend_on_all_of_it_and_on_nothing_else(perceiver):
    clip, one, other = waves((3.0, 1.01, 0.3))
    alone = perceiver.encode([clip])[0]
    assert off(perceiver.encode([clip, one])[0], alone) <= 1e-6
    assert off(perceiver.encode([other, one, clip])[2], alone) <= 1e-6
    for place in (0, 1.4, 2.9):  # a tenth of a second of it, anywhere
        changed = clip.copy()
        changed[round(place * 16000) :][:1600] *= -3
        assert off(perceiver.encode([changed])[0], alone) > 1e-4


def test_the_slots_differ_from_each_other(perceiver):
    """Each query asks something else."""
    slots = perceiver.encode(waves((1.01,)))[0]
    apart = torch.cdist(slots, slots) + torch.eye(8)
    assert apart.min() > 0.01


AUDIO_OF_EIGHT = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}


def test_the_perceivers_gradient_is_that_of_differences():
    torch.manual_seed(0)
    ours = {"slots": 2, "layers": 2, "heads": 2}
    raw = {"model_type": "polyaudio", "audio_config": AUDIO_OF_EIGHT, "resampler": ours}
    net = Perceiver(Config.from_dict(raw).encoder, 6, ours).double()
    x = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    names = dict(net.named_parameters())

    def run(x, queries):
        given = {**names, "queries": queries}
        return torch.func.functional_call(net, given, (x, [4, 3]))[0]

    assert torch.autograd.gradcheck(run, (x, net.queries))


def test_learning_reaches_queries_and_encoder(perceiver):
    net = copy.deepcopy(perceiver).requires_grad_(True)
    clips = waves((0.3, 1.01))
    ids = eights(clips)
    loss, _ = net.loss([(ids, clips, [True] * len(ids))])
    loss.backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    reached = [name for name, grad in grads.items() if grad.abs().max() > 0]
    assert {"multi_modal_projector.queries", "audio_tower.conv1.weight"} <= set(reached)


def test_a_perceiver_saved_and_read_again_is_the_same(perceiver, tmp_path):
    clips = waves((0.3, 1.01))
    ids = eights(clips)
    perceiver.save(tmp_path)
    again = PolyAudio.from_dir(tmp_path)
    assert torch.equal(again.logits(ids, clips), perceiver.logits(ids, clips))
    assert again.generate(ids, clips, 8) == perceiver.generate(ids, clips, 8)


def test_a_clip_too_short_for_the_perceiver_does_not_shift_the_others(perceiver):
    """It counts as no slot, yet the queries would make eight of it, in the places of the next."""
    short, clip = np.zeros(100, np.float32), waves((0.3,))[0]
    with pytest.raises(BadInput):
        perceiver.logits(eights([clip]), [short, clip])


# ------------------------------------------------------------------------------------------------
# Generation.


def test_reading_from_the_cache_is_reading_anew(af3):
    ids, clips = af3.ask((0.3, 1.01))
    new = af3.net.generate(ids, clips, 24)
    for i, id in enumerate(new):
        assert af3.net.logits([*ids, *new[:i]], clips)[-1].argmax() == id


def test_with_the_cache_each_token_is_read_once(af3):
    ids, clips = af3.ask((0.3, 1.01))
    with reading(af3.net) as tokens, hearing(af3.net) as windows:
        af3.net.generate(ids, clips, 5)
    assert tokens == [len(ids), 1, 1, 1, 1]
    assert windows == [2]


def test_the_vocabulary_is_computed_only_where_it_is_used(af3, monkeypatch):
    ids, clips = af3.ask((0.3, 1.01))
    learned, real, losses = [False] * (len(ids) - 4) + [True] * 4, model.cross_entropy, []
    monkeypatch.setattr(
        model, "cross_entropy", lambda x, *rest: losses.append(len(x)) or real(x, *rest)
    )
    with counting(af3.net.lm_head, lambda args: len(args[0])) as rows:
        af3.net.generate([ids, text(20)], [clips, []], 3)
        af3.net.loss([(ids, clips, learned)])
    assert (rows, losses) == ([2, 2, 2], [4])


A, B, B2, C = waves((0.3, 1.01, 1.01, 0.3))
TALK = interleave([A, B], before=7)  # seven ids, A, five ids, B, five ids
AT_A, AT_B = 7, 7 + slots_of(A) + 5


def turns(new):
    """What may follow TALK on (A, B) and its answer: the next prompt, its clips, how much of it
    the cache cannot know, how many clips are to be heard."""
    said = [*TALK, *new]
    unread = 1  # nobody has read the answer's last token yet
    with_clip = [*said, *text(4), *[SLOT] * slots_of(C), *text(3)]
    return {
        "goes on": ([*said, *text(4)], [A, B], unread + 4, 0),
        "a clip is added": (with_clip, [A, B, C], len(with_clip) - len(said) + unread, 1),
        "an old clip is added": (with_clip, [A, B, A], len(with_clip) - len(said) + unread, 1),
        "asked again": (TALK, [A, B], 1, 0),
        "cut short": (TALK[:-2], [A, B], 1, 0),
        "ends in the slots": (TALK[: AT_B + slots_of(B)], [A, B], len(TALK[AT_B:]) - 5, 1),
        "another word": ([*TALK[:-3], 1, *TALK[-2:]], [A, B], 3, 0),
        "another first word": ([1, *TALK[1:]], [A, B], len(TALK), 2),
        "the last clip changes": ([*said, 1], [A, B2], len(said) + 1 - AT_B, 1),
        "the first clip changes": ([*said, 1], [C, B], len(said) + 1 - AT_A, 2),
        "the clips change places": (
            interleave([B, A], before=7), [B, A], len(interleave([B, A])), 2,
        ),
        "the last clip is gone": (TALK[:AT_B], [A], 1, 0),
        "all is new": (text(30, seed=77), [], 30, 0),
    }  # fmt: skip


@pytest.mark.parametrize("name", turns([]))
def test_a_conversation_goes_on_in_its_cache(af3, name):
    """It gives the answer of a conversation that was read afresh, and reads only what is new."""
    net = af3.net
    cache = Cache(net.config.decoder, 1, 400, net.lm_head.weight)
    cache.keys.fill_(torch.nan)  # whatever memory held before is never read
    cache.values.fill_(torch.nan)
    first = net.generate(TALK, [A, B], 6, cache=cache)
    ids, clips, unread, unheard = turns(first)[name]
    with reading(net) as tokens, hearing(net) as windows:
        second = net.generate(ids, clips, 6, cache=cache)
    assert second == net.generate(ids, clips, 6)
    assert tokens[0] == unread
    assert sum(windows) == unheard
    third = [*ids, *second, *text(5, seed=3)]
    with reading(net) as tokens, hearing(net) as windows:
        last = net.generate(third, clips, 6, cache=cache)
    assert last == net.generate(third, clips, 6)
    assert (tokens[0], windows) == (6, [])


def test_the_rows_of_a_cache_go_on_independently(af3):
    """One row goes on, one begins anew, one is asked again."""
    net = af3.net
    cache = Cache(net.config.decoder, 3, 400, net.lm_head.weight)
    prompts, clips = [TALK, text(20), text(9, seed=1)], [[A, B], [], []]
    first = net.generate(prompts, clips, 4, cache=cache)
    prompts = [[*TALK, *first[0], *text(3)], interleave([C], seed=8), prompts[2]]
    clips = [[A, B], [C], []]
    with reading(net) as tokens:
        second = net.generate(prompts, clips, 4, cache=cache)
    assert tokens[0] == 1 + 3 + len(prompts[1]) + 1
    assert second == [net.generate(*row, 4) for row in zip(prompts, clips)]


def test_a_cache_that_is_too_small_says_so_and_can_be_used_again(af3):
    net = af3.net
    cache = Cache(net.config.decoder, 1, len(TALK) + 6, net.lm_head.weight)
    first = net.generate(TALK, [A, B], 6, cache=cache)
    with pytest.raises(BadInput, match=f"cache.*{len(TALK) + 6}"):
        net.generate([*TALK, *first, 1], [A, B], 6, cache=cache)
    assert net.generate(TALK, [A, B], 6, cache=cache) == first


@pytest.mark.parametrize("n", [0, 1, 2, 17])
def test_as_many_tokens_as_asked_for(qwen2, n):
    assert len(qwen2.net.generate(text(5), [], n)) == n
    rows = qwen2.net.generate([text(5), text(9)], [[], []], n)
    assert [len(row) for row in rows] == [n, n]


def test_tokens_are_handed_out_as_they_come(qwen2):
    prompts = [text(5), text(9, seed=1)]
    seen = []
    new = qwen2.net.generate(prompts[0], [], 6, on_token=seen.append)
    assert seen == new
    seen = []
    rows = qwen2.net.generate(prompts, [[], []], 6, on_token=lambda id, row: seen.append((row, id)))
    assert seen == [(row, rows[row][i]) for i in range(6) for row in (0, 1)]


def with_ends(base, dir, **files):
    """A copy of the checkpoint whose JSON files (generation_config, config) say something else."""
    shutil.copytree(base.dir, dir, dirs_exist_ok=True)
    for name, changes in files.items():
        edit_json(dir / f"{name}.json", **changes)
    return PolyAudio.from_dir(dir)


@pytest.mark.parametrize("many", [False, True])
def test_an_answer_ends_where_the_checkpoint_says(qwen2, tmp_path, many):
    """The ending token is the last one of the answer; a row that has ended costs nothing more."""
    prompts = [text(5), text(9, seed=1), text(7, seed=2)]
    free = qwen2.net.generate(prompts, [[]] * 3, 12)
    end = free[0][4]
    ends = [VOCAB - 1, end] if many else end
    net = with_ends(qwen2, tmp_path, generation_config={"eos_token_id": ends})
    assert net.stops == ([VOCAB - 1, end] if many else [end])
    expected = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert len(expected[0]) <= 5 < len(expected[1])
    with reading(net) as tokens:
        assert net.generate(prompts, [[]] * 3, 12) == expected
    assert sum(tokens[1:]) == sum(len(row) - 1 for row in expected)
    assert net.generate(prompts[0], [], 12) == expected[0]
    assert net.generate(prompts[0], [], 12, stop=[]) == free[0]


def test_what_ends_an_answer_may_stand_in_config_json(qwen2, tmp_path):
    net = with_ends(qwen2, tmp_path, config={"eos_token_id": 77})
    assert PolyAudio(net.config).stops == [77]  # it has no folder
    (tmp_path / "generation_config.json").unlink()
    assert net.stops == [77]


def test_the_caller_may_say_what_ends_an_answer(qwen2):
    free = qwen2.net.generate(text(5), [], 12)
    assert qwen2.net.stops == []
    assert qwen2.net.generate(text(5), [], 12, stop=[free[6]]) == free[: free.index(free[6]) + 1]
    assert qwen2.net.generate(text(5), [], 12, stop={free[0]}) == free[:1]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_rows_of_the_vocabulary_without_a_token_are_never_said(qwen2, monkeypatch, temperature):
    prompts = [text(5, seed) for seed in range(8)]
    how = {"temperature": temperature, "seed": 1}
    free = qwen2.net.generate(prompts, [[]] * 8, 12, **how)
    assert max(map(max, free)) >= 100
    monkeypatch.setattr(qwen2.net, "known_ids", 100)
    bound = qwen2.net.generate(prompts, [[]] * 8, 12, **how)
    assert max(map(max, bound)) < 100


def test_sampling_repeats_with_its_seed(qwen2):
    def sample(seed):
        return qwen2.net.generate(text(5), [], 12, temperature=1.0, seed=seed)

    assert sample(3) == sample(3)
    assert len({tuple(sample(seed)) for seed in range(6)}) == 6


@pytest.mark.parametrize("top_p", [1e-9, 0.0])
def test_the_likeliest_token_stays_however_small_top_p(qwen2, top_p):
    greedy = qwen2.net.generate(text(5), [], 12)
    assert qwen2.net.generate(text(5), [], 12, temperature=1.0, top_p=top_p) == greedy


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (0.0, 1.0, [0, 0, 1, 0]),
        (1e-300, 1.0, [0, 0, 1, 0]),  # which is 0 in float32, and 0 / 0 is nothing
        (5e-5, 1.0, [0, 0, 1, 0]),
        (1.0, 1.0, [0.05, 0.3, 0.5, 0.15]),
        (0.5, 1.0, [0.0025 / 0.365, 0.09 / 0.365, 0.25 / 0.365, 0.0225 / 0.365]),
        (1.0, 0.75, [0, 0.375, 0.625, 0]),  # the one that crosses top_p is in
        (1.0, 0.81, [0, 0.3 / 0.95, 0.5 / 0.95, 0.15 / 0.95]),
        (1.0, 0.45, [0, 0, 1, 0]),
    ],
)
def test_tokens_are_chosen_as_often_as_they_should(temperature, top_p, expected):
    n = 40_000
    logits = torch.tensor([0.05, 0.3, 0.5, 0.15]).log().repeat(n, 1)
    chosen = choose(logits, temperature, top_p, torch.Generator().manual_seed(0))
    found = torch.tensor(chosen).bincount(minlength=4) / n
    assert off(found, torch.tensor(expected, dtype=torch.float32)) <= 0.01  # four deviations


def test_choosing_leaves_the_logits_alone():
    logits = torch.randn(3, 9)
    kept = logits.clone()
    choose(logits, 0.7, 0.5, torch.Generator())
    assert torch.equal(logits, kept)


def test_a_prompt_that_passes_the_context_is_refused_with_how_many_clips_fit(af3):
    """Equation 1 of the paper: N_max = floor((L - T) / K)."""
    net = rebuilt(af3.net, max_position_embeddings=100)
    clips = waves((1.01, 0.3, 1.01))
    ids = interleave(clips)
    slots = slots_of(clips[0])
    held = len(ids) - sum(map(slots_of, clips)) + 30  # text, and room for the answer
    with pytest.raises(BadInput, match=re.escape(f"floor((100 - {held}) / {slots}) = ")) as refused:
        net.generate(ids, clips, 30)
    assert str(refused.value).endswith(f"= {(100 - held) // slots}")
    assert len(net.generate(ids, clips, 100 - len(ids))) == 100 - len(ids)
    with pytest.raises(BadInput, match="100"):
        net.generate(text(90), [], 11)


# ------------------------------------------------------------------------------------------------
# The loss.


def test_loglik_is_the_sum_over_the_answer(af3):
    ids, clips = af3.ask((0.3, 1.01))
    answer = text(6, seed=8)
    logp = af3.net.logits([*ids, *answer], clips).log_softmax(-1)
    expected = sum(logp[len(ids) + i - 1, id].item() for i, id in enumerate(answer))
    assert af3.net.loglik(ids, clips, answer) == pytest.approx(expected, abs=1e-3)
    assert af3.net.loglik(ids, clips, answer) < -6


def test_the_loglik_of_no_answer_is_that_of_certainty(af3):
    assert af3.net.loglik(*af3.ask((0.3,)), []) == 0


def examples_of(base):
    """Three examples that learn some of their tokens, in runs and apart."""
    dice = np.random.default_rng(4)
    rows = [base.ask((0.3, 1.01)), (text(20, seed=1), []), base.ask((3.0,), seed=2, before=3)]
    return [(ids, clips, (dice.random(len(ids)) < 0.4).tolist()) for ids, clips in rows]


def test_the_loss_is_the_cross_entropy_of_what_is_learned(af3):
    examples = examples_of(af3)
    expected, count = 0.0, 0
    for ids, clips, learned in examples:
        logits = af3.net.logits(ids, clips)[:-1]
        targets = torch.tensor(ids[1:]).where(torch.tensor(learned[1:]), -100)
        expected += F.cross_entropy(logits, targets, reduction="sum").item()
        count += sum(learned[1:])
    loss, n = af3.net.loss(examples)
    assert n == count > 20
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_a_loss_of_nothing_is_zero(af3):
    loss, n = af3.net.loss([(text(5), [], [False] * 5)])
    assert (loss.item(), n) == (0.0, 0)


def with_lora(net):
    """A copy with an adapter that does something, and two trained rows of the vocabulary."""
    net = copy.deepcopy(net)
    net.add_lora(rank=4, alpha=8, rows=[5, 6])
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=dice))
    return net


def test_packed_examples_teach_what_they_teach_alone(af3):
    net = with_lora(af3.net)
    examples = [
        ([5, *ids, 6], clips, [True, *learned, True]) for ids, clips, learned in examples_of(af3)
    ]

    def gradients(*packs):
        net.zero_grad()
        losses = [net.loss(pack)[0] for pack in packs]
        sum(losses).backward()
        found = {n: p.grad.clone() for n, p in net.named_parameters() if p.requires_grad}
        return sum(losses).item(), found

    together, in_pack = gradients(examples)
    apart, alone = gradients(*([example] for example in examples))
    assert together == pytest.approx(apart, rel=1e-6)
    assert len(in_pack) == 3 * 7 * 2 + 1  # A and B of seven projections in three layers, and rows
    for name, grad in in_pack.items():
        assert alone[name].norm() > 1e-3, name
        assert (grad - alone[name]).norm() <= 1e-4 * alone[name].norm(), name


def test_learning_after_answering(af3):
    """Generation runs in inference mode, whose tensors autograd refuses: none of them may stay."""
    net = copy.deepcopy(af3.net).requires_grad_(True)
    ids, clips = af3.ask((0.3,))
    cache = Cache(net.config.decoder, 1, 100, net.lm_head.weight)
    net.generate(ids, clips, 2, cache=cache)
    net.loglik(ids, clips, [3])
    net.loss([(ids, clips, [True] * len(ids))])[0].backward()
    assert net.audio_tower.conv1.weight.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------
# Asking in words.

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<sound>", "[BOA]", "[EOA]"]


@pytest.fixture(scope="module")
def talker(load, tmp_path_factory):
    """AF3's checkpoint with a tokenizer of its own, in which few of the 2048 rows have a token."""
    dir = tmp_path_factory.mktemp("talker") / "af3"
    shutil.copytree(load("af3").dir, dir)
    lines = ["Which clip is louder, the first or the second?", "Is there a dog in clip 2?"]
    train_bpe(lines, 350, SPECIAL, dir)
    slot = Tokenizer.from_dir(dir).special["<sound>"]
    config = json.loads((dir / "config.json").read_text())
    shorter = {**config["text_config"], "max_position_embeddings": 500}
    edit_json(dir / "config.json", audio_token_id=slot, text_config=shorter)
    return PolyAudio.from_dir(dir)


def asked(question):
    return [{"role": "user", "content": question}]


def questions():
    clips = waves((0.3, 1.01, 0.3))
    said = {"role": "assistant", "content": "A dog."}
    return {
        "two": (asked("Which clip is louder?"), clips[:2]),
        "none": (asked("Is there a dog?"), []),
        "placed": (asked("Is <sound-2> louder than <sound-1>, or <sound-3>?"), clips),
        "repeated": (asked("<sound-1> or <sound-2> or <sound-1>?"), clips[:2]),
        "turns": ([*asked("<sound-1>?"), said, *asked("Is it?")], clips[:1]),
    }


MISTAKEN = {
    "no such clip": (asked("Is <sound-3> a dog?"), waves((0.3,))),
    "a clip without a place": (asked("Is <sound-1> a dog?"), waves((0.3, 0.3))),
    "too short": (asked("A dog?"), [np.zeros(100, np.float32)]),
    "no messages": ([], []),
    "passes the context": (asked("a dog " * 500), []),
    "two channels": (asked("A dog?"), [np.zeros((16000, 2), np.float32)]),
}


def test_only_tokens_of_the_tokenizer_are_said(talker):
    assert len(talker.tokenizer) == talker.known_ids < 400
    new = talker.generate(text(5, seed=1), [], 40, temperature=2.0, stop=[])
    assert max(new) < talker.known_ids


def test_an_answer_is_text_and_ends_with_its_turn(talker):
    net = copy.deepcopy(talker)
    end = net.tokenizer.special["<|im_end|>"]
    question = questions()["two"]
    answer = net.answer("Which clip is louder?", question[1], 12)
    assert isinstance(answer, str)
    assert answer == net.answer(*question, 12)
    ids, placed = net.prompt(*question)
    assert answer == net.tokenizer.decode(net.generate(ids, placed, 12, stop=[end])).strip()
    net.lm_head.weight.data[end] = 100 * net.hidden([ids], [placed])[-1]  # so that it comes next
    assert net.generate(ids, placed, 12, stop=net.tokenizer.ends) == [end]
    assert net.answer(*question, 12) == ""


def test_a_clip_named_twice_is_read_twice_and_heard_once(talker):
    messages, clips = questions()["repeated"]
    ids, placed = talker.prompt(messages, clips)
    assert [id(clip) for clip in placed] == [id(clips[i]) for i in (0, 1, 0)]
    assert ids.count(talker.config.audio_token) == sum(map(slots_of, placed))
    with hearing(talker) as windows:
        talker.answer(messages, clips, 1)
    assert windows == [2]


@pytest.mark.parametrize("batch", [{}, {"batch_rows": 1}, {"batch_rows": 2}, {"batch_tokens": 150}])
def test_answers_to_many_are_the_answers_one_by_one(talker, batch):
    items = [(key, *question) for key, question in questions().items()]
    expected = [(key, talker.answer(*question, 8)) for key, *question in items]
    assert len({answer for _, answer in expected}) > 2
    assert list(answer_all(talker, iter(items), max_new_tokens=8, **batch)) == expected


@pytest.mark.parametrize("batch_rows", [1, 2, 32])
@pytest.mark.parametrize("name", MISTAKEN)
def test_a_bad_item_gets_its_mistake_and_the_others_their_answers(talker, name, batch_rows):
    good = [(key, *question) for key, question in questions().items()]
    items = [good[0], ("bad", *MISTAKEN[name]), *good[1:3]]
    found = dict(answer_all(talker, items, max_new_tokens=4, batch_rows=batch_rows))
    assert list(found) == ["two", "bad", "none", "placed"]
    assert isinstance(found.pop("bad"), BadInput)
    assert found == {key: talker.answer(*question, 4) for key, *question in good[:3]}


def test_nothing_to_answer(talker):
    assert list(answer_all(talker, [])) == []
    items = [(name, *MISTAKEN[name]) for name in ("no such clip", "no messages")]
    found = list(answer_all(talker, items, max_new_tokens=4))
    assert [key for key, _ in found] == ["no such clip", "no messages"]
    assert all(isinstance(mistake, BadInput) for _, mistake in found)


def test_clips_are_taken_a_batch_at_a_time(talker):
    taken = []

    def items():
        for i in range(12):
            taken.append(i)
            yield i, asked("A dog?"), waves((0.03,), seed=i)

    answers = answer_all(talker, items(), batch_rows=3, max_new_tokens=2)
    assert taken == []
    assert next(answers)[0] == 0
    assert len(taken) <= 4
    assert [key for key, _ in answers] == list(range(1, 12))


# ------------------------------------------------------------------------------------------------
# Memory: a mask over a pack of T positions would hold T x T elements. None is made.


class Largest(TorchDispatchMode):
    """Bytes of the largest memory that any operator inside returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return out


def test_the_measure_below_sees_a_mask():
    q = torch.randn(1, 1, 300, 8)
    with Largest() as seen:
        mask = torch.ones(300, 300, dtype=torch.bool).tril()
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert seen.bytes >= 300 * 300


def test_a_pack_in_the_decoder_makes_no_mask(af3):
    rows = [text(200, seed) for seed in range(20)]
    total = 20 * 200
    with Largest() as seen:
        hidden = af3.net.hidden(rows, [[]] * 20)
    assert len(hidden) == total
    widest = total * 160 * 4  # the largest that has to be: rows inside the MLP
    assert seen.bytes <= 1.1 * widest < total**2 / 4


def test_a_pack_in_the_encoder_makes_no_mask(af3):
    clips = waves([8.0] * 20)
    mels = log_mels(clips)
    positions = 20 * 400
    with Largest() as seen:
        x, slots = af3.net.audio_tower(mels, [800] * 20)
    assert slots == [200] * 20
    stem = 20 * 804 * 128 * 4  # the largest that has to be: all mels in one row
    assert seen.bytes <= 1.1 * stem < positions**2 / 4


def test_learning_on_a_pack_makes_no_mask(af3):
    net = with_lora(af3.net)
    examples = [(text(400, seed), [], [False] * 390 + [True] * 10) for seed in range(20)]
    with Largest() as seen:
        net.loss(examples)[0].backward()
    widest = 20 * 400 * 160 * 4
    assert seen.bytes <= 1.1 * widest < (20 * 400) ** 2 / 4


def test_a_long_prompt_gets_a_batch_of_its_own(talker, monkeypatch):
    """A row's place in the cache is as long as the longest row's, so rows times that is bounded."""
    made = []
    real = Cache.__init__

    def noted(cache, config, rows, size, like):
        made.append((rows, size))
        real(cache, config, rows, size, like)

    monkeypatch.setattr(Cache, "__init__", noted)
    texts = ["7" * (400 if i == 3 else 4) for i in range(9)]  # a token each
    items = [(i, [{"role": "user", "content": text}], []) for i, text in enumerate(texts)]
    answered = list(answer_all(talker, items, max_new_tokens=2, batch_tokens=600))
    assert [key for key, _ in answered] == list(range(9))
    assert max(rows for rows, _ in made) > 1 and max(size for _, size in made) > 200
    assert all(rows == 1 or rows * size <= 600 for rows, size in made)
