"""What synth.py promises about the world it makes.

What a row says is what is in the samples: events begin and end where it says and as often as it
says, noise is as loud as it says, words and phones lie where it says, a melody has the key, mode
and tempo that it says, and a degradation does what its label says and the clean clip does not. The
kinds can be told apart, and so can the voices. No voice, sentence or number of sound is shared by
two splits. The folder is the same bytes for any number of workers and after a kill. And a speech
service is not believed unheard.

Every measurement here is made on the samples, by other means than those that made them.
"""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tests.conftest import ROOT

import prepare
import synth
from prepare import RATE, BadInput, load_audio, log_mel
from synth import DEGRADATIONS, EVENTS, SPLITS, VOICES, Dice, Engine, make_clip, speak

CYCLE = len(synth.CYCLE)
CLEAN = {"label": "clean"}
COUNT = 1050  # clips of the world that most tests look at: three shards and a half


def clips(kind, count, seed=5, split="train"):
    """`count` clips of one kind from one split, as the world would hold them."""
    places = ((i, *divmod(i, CYCLE)) for i in range(100_000))
    for i, block, place in places:
        if synth.CYCLE[place] == kind and synth.BLOCK_SPLITS[block % 10] == split:
            yield make_clip(seed, i)
            count -= 1
        if count == 0:
            return


def run(capsys, monkeypatch, *arguments):
    """The command in this process: its exit code and what it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", ["synth.py", *map(str, arguments)])
    try:
        prepare.cli(synth.main)
        code = 0
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err


def level(wave):
    """Mean power in dB."""
    return 10 * np.log10(np.mean(np.square(wave, dtype=np.float64)) + 1e-20)


def spectrum(wave):
    """Power by frequency, and the frequencies."""
    power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2
    return power, np.fft.rfftfreq(len(wave), 1 / RATE)


# --- events: where and how often


def covered(events, n):
    inside = np.zeros(n, bool)
    for _, on, off in events:
        inside[round(on * RATE) : round(off * RATE)] = True
    return inside


def test_clean_clips_sound_inside_their_events_and_nowhere_else():
    seen = 0
    for kind in ("sound", "order", "speech", "dialogue"):
        for wave, row in clips(kind, 12):
            if row["quality"] != CLEAN:
                continue
            seen += 1
            inside = covered(row["events"], len(wave))
            assert np.abs(wave[~inside]).max(initial=0) == 0
            for label, on, off in row["events"]:
                part = wave[round(on * RATE) : round(off * RATE)]
                edges = part[:160], part[-160:]  # ten milliseconds
                assert all(edge.any() for edge in edges), (row["id"], label)
    assert seen > 20


def test_a_shifted_event_would_be_noticed():
    wave, row = next(c for c in clips("sound", 12) if c[1]["quality"] == CLEAN)
    late = [[label, on + 0.02, off + 0.02] for label, on, off in row["events"]]
    assert np.abs(wave[~covered(late, len(wave))]).max() > 0


def onsets(wave, gap=0.06):
    """How many stretches of sound with at least `gap` seconds of near silence between them."""
    heard = np.flatnonzero(np.abs(wave) > 1e-4 * np.abs(wave).max())
    return 1 + int((np.diff(heard) > gap * RATE).sum())


@pytest.mark.parametrize("label", [k for k, event in EVENTS.items() if event.most > 1])
def test_counts_are_the_onsets(label):
    times = Counter()
    for i in range(12):
        wave, events = synth.scene(Dice("train", 8, i), [label], 3 * RATE)
        assert onsets(wave) == len(events)
        times[len(events)] += 1
    assert len(times) > 1


def test_what_goes_on_happens_once():
    for label in [k for k, event in EVENTS.items() if event.most == 1]:
        assert all(
            len(synth.scene(Dice(split, 8, 0), [label], 3 * RATE)[1]) == 1 for split in SPLITS
        )


def test_scenes_hold_up_to_four_kinds_some_overlap_and_captions_agree():
    kinds, overlaps = Counter(), 0
    for _, row in clips("sound", 60):
        assert row["labels"] == list(dict.fromkeys(e[0] for e in row["events"]))
        kinds[len(row["labels"])] += 1
        spans = sorted(row["events"], key=lambda e: e[1])
        overlap = any(a[2] > b[1] for a, b in zip(spans, spans[1:]))
        overlaps += overlap
        assert overlap or "while" not in row["captions"][0]
        for label in row["labels"]:
            times = sum(e[0] == label for e in row["events"])
            named = f"{synth.DIGIT_WORDS[times]} {label}s" if times > 1 else label
            often = ("", "", " twice", " three times", " four times", " five times")[times]
            parts = re.split(", then | while ", row["captions"][0])
            assert EVENTS[label].phrase + often in parts
            assert named in row["captions"][1].split(" and ")
    assert set(kinds) == {1, 2, 3, 4} and 5 < overlaps < 40


def test_then_is_said_only_after_all_before_has_ended():
    events = [["rain", 0, 3], ["dog bark", 1, 1.2], ["bell", 2, 2.5], ["siren", 3, 4]]
    told = "rain falls while a dog barks while a bell rings, then a siren wails"
    assert synth.describe(events)[0] == told
    assert synth.describe(events[1:])[0] == "a dog barks, then a bell rings, then a siren wails"


def test_what_is_counted_can_be_counted():
    """A plural is label + s, and only what happens can happen three times."""
    many = [label for label, event in EVENTS.items() if event.most > 1]
    assert not [label for label in many if re.search("([^aeiou]y|s|sh|ch|x|z)$", label)]
    steps = [["footstep", i, i + 0.2] for i in range(3)]
    assert synth.describe(steps) == ["a footstep sounds three times", "three footsteps"]


# --- kinds and voices can be told apart


def statistics(wave):
    mel = log_mel(np.pad(wave, (0, max(0, 800 - len(wave)))).astype(np.float32)).numpy()
    moves = np.abs(np.diff(mel, axis=1)).mean(1)
    return np.concatenate([mel.mean(1), mel.std(1), 2 * moves])


def nearest_centroid(samples):
    """samples: {name: list of vectors}; centroids from one half, the share of the other half that
    is nearest to its own."""
    spread = np.concatenate([v[::2] for v in samples.values()]).std(0) + 0.05
    centres = np.stack([np.mean(v[::2], axis=0) for v in samples.values()])
    right = {}
    for i, (name, vectors) in enumerate(samples.items()):
        away = [(((centres - v) / spread) ** 2).sum(1).argmin() == i for v in vectors[1::2]]
        right[name] = np.mean(away)
    return right


def one_event(label, *seed):
    dice = Dice("train", *seed)
    seconds, layers = synth.draw_event(dice, label)
    return synth.make_event(dice, seconds, layers) * np.float32(dice.rng.uniform(0.3, 1))


def test_the_kinds_differ():
    samples = {
        label: [statistics(one_event(label, 1, k, i)) for i in range(16)]
        for k, label in enumerate(EVENTS)
    }
    right = nearest_centroid(samples)
    assert len(EVENTS) >= 24 and np.mean(list(right.values())) >= 0.9, right
    swapped = dict(zip(samples, [samples["rain"]] * 3 + list(samples.values())[3:]))
    assert np.mean(list(nearest_centroid(swapped).values())[:3]) < 0.6  # three names, one sound


def test_the_groups_of_sounds_are_of_different_character():
    groups = Counter(event.group for event in EVENTS.values())
    assert {"animal", "alarm", "impact", "weather", "machine", "water", "human"} <= set(groups)


def test_the_voices_differ():
    texts = ("the dog is at the park", "i see five cups", "the doctor wants the lamp")
    names = [name for name in VOICES if name.startswith("train")]
    samples = {
        name: [statistics(speak(texts[i % 3], VOICES[name], i)[0]) for i in range(6)]
        for name in names
    }
    assert len(names) >= 40
    assert np.mean(list(nearest_centroid(samples).values())) >= 10 / len(names)


def test_pitch_is_the_voice_s():
    """The period of the sound is the one that the row states, within what intonation moves."""
    for name, voice in list(VOICES.items())[::8]:
        wave, _, phones = speak("all are far", voice, 3)
        middle = next(p for p in phones if p[0] == "AA")
        part = wave[round(middle[1] * RATE) : round(middle[2] * RATE)].astype(np.float64)
        part = part * np.hanning(len(part))
        echo = np.fft.irfft(np.abs(np.fft.rfft(part, 1 << 14)) ** 2)
        lags = np.arange(int(RATE / 330), int(RATE / 65))
        found = RATE / lags[np.argmax(echo[lags])]
        assert abs(np.log2(found / voice.f0)) < 0.25, (name, found, voice.f0)


# --- speech


def test_words_and_phones_are_where_the_energy_says():
    for i, (text, hiss) in enumerate((("six sunny stations", "S"), ("she has a fish", "SH"))):
        for voice in list(VOICES.values())[::20]:
            wave, words, phones = speak(text, voice, i)
            assert [word for word, _, _ in words] == text.split()
            assert abs(words[-1][2] - len(wave) / RATE) < 0.001
            for (_, _, off), (_, on, _) in zip(phones, phones[1:]):
                assert -1e-9 <= on - off < 0.1
            for word, on, off in words:
                inner = [p for p in phones if on - 1e-9 <= p[1] and p[2] <= off + 1e-9]
                assert [p[0] for p in inner] == synth.pronounce(word)
            high, low = [], []
            for phone, on, off in phones:
                power, f = spectrum(wave[int(on * RATE) : int(off * RATE)])
                share = power[f > 2200].sum() / power.sum()
                (high if phone == hiss else low).append(share)
            vowels = [p for p in phones if p[0] in ("IH", "AH", "EY", "AE", "IY")]
            loud = [level(wave[int(on * RATE) : int(off * RATE)]) for _, on, off in vowels]
            closed = [p for p in phones if p[0] in ("T", "K")]
            shut = [level(wave[int(on * RATE) :][:400]) for _, on, _ in closed]
            assert min(high) > 0.5 and np.median(low) < 0.3
            assert not shut or max(shut) < min(loud)


def test_shifted_phones_would_be_noticed():
    wave, _, phones = speak("six sunny stations", VOICES["train-000"], 0)
    shares = []
    for phone, on, off in phones:
        if phone == "S":
            late = wave[int(on * RATE) + 1600 : int(off * RATE) + 1600]
            power, f = spectrum(late)
            shares.append(power[f > 2200].sum() / power.sum())
    assert min(shares) < 0.5


def test_the_same_text_and_voice_give_the_same_bytes():
    voice = VOICES["dev-085"]
    once, again = (speak("the cat is black", voice, 9, "sad") for _ in range(2))
    assert once[0].tobytes() == again[0].tobytes() and once[1:] == again[1:]
    others = [
        speak("the cat is black", voice, 10, "sad"),
        speak("the cat is black", voice, 9, "happy"),
        speak("the cat is brown", voice, 9, "sad"),
        speak("the cat is black", VOICES["dev-086"], 9, "sad"),
    ]
    assert all(other[0].tobytes() != once[0].tobytes() for other in others)


def test_formants_follow_the_throat():
    """A shorter throat moves the same vowel up."""
    centres = []
    for tract in (18, 15, 13):
        voice = VOICES["train-003"]._replace(tract=tract, f0=110.0)
        wave, _, phones = speak("ah", voice, 1)
        power, f = spectrum(wave)
        band = (f > 300) & (f < 4000)
        centres.append((power * f)[band].sum() / power[band].sum())
    assert centres == sorted(centres) and centres[2] > 1.1 * centres[0]


def test_letters_become_sounds():
    table = {
        "light": "L AY T", "phone": "F OW N", "knife": "N AY F", "quick": "K W IH K",
        "bake": "B EY K", "baked": "B EY K D", "baking": "B EY K IH NG", "rabbit": "R AE B IH T",
        "fly": "F L AY", "go": "G OW", "bridge": "B R IH JH", "nation": "N AE SH AH N",
        "thought": "TH AO T", "coin": "K OY N", "city": "S IH T IY", "cats": "K AE T S",
        "keys": "K IY Z", "houses": "HH AW S IH Z", "moon": "M UW N", "chair": "CH EH R",
        "turn": "T ER N", "sing": "S IH NG", "lamb": "L AE M", "wrong": "R AA NG",
        "table": "T AE B AH L", "picture": "P IH K CH ER", "wanted": "W AE N T IH D",
    }  # fmt: skip
    assert {word: " ".join(synth.pronounce(word)) for word in table} == table
    assert 40 <= len(synth.SPELLING) <= 100


def test_any_text_can_be_said_or_is_refused():
    for text in ("xyzzy", "Route 66!", "don't", "e", "strengths"):
        wave, words, _ = speak(text, VOICES["train-000"], 0)
        assert len(words) == len(synth.spoken_words(text)) and np.isfinite(wave).all()
    assert synth.spoken_words("Route 66!") == ["route", "six", "six"]
    for text in ("", "你好", "...!"):
        with pytest.raises(BadInput, match="words in Latin letters"):
            speak(text, VOICES["train-000"], 0)


def test_every_phone_and_every_word_is_in_the_tables():
    for word in [*synth.LEXICON, *" ".join(synth.WORDS.values()).split()]:
        assert word in synth.LEXICON
        assert set(synth.pronounce(word)) <= set(synth.PHONES)
    assert len(synth.LEXICON) >= 100
    assert {p for _, phones in synth.SPELLING for p in phones} <= set(synth.PHONES)


def test_emotions_are_heard():
    """Angry is brighter than sad, and happy swings more than sad."""
    text, voice = "the people are in the garden", VOICES["train-004"]
    waves = {name: [speak(text, voice, i, name)[0] for i in range(4)] for name in synth.EMOTIONS}
    seconds = {name: np.mean([len(w) for w in waves[name]]) for name in waves}
    bright = {}
    for name in waves:
        shares = []
        for wave in waves[name]:
            power, f = spectrum(wave)
            shares.append(power[(f > 1000) & (f < 3000)].sum() / power[f < 1000].sum())
        bright[name] = np.mean(shares)
    assert seconds["sad"] > 1.1 * seconds["neutral"] > seconds["angry"]
    assert bright["angry"] > 1.2 * bright["neutral"] > bright["sad"]


# --- music


def chroma(wave):
    """Power at the semitones from C5 up, two octaves, folded to one: (12,)."""
    power, f = spectrum(wave)
    notes = 523.25 * 2 ** (np.arange(24) / 12)
    found = [power[np.abs(f - note) < note * 0.012].sum() for note in notes]
    return np.array(found).reshape(2, 12).sum(0)


def test_key_and_mode_are_in_the_notes():
    right = 0
    trials = [(k, m) for k in range(0, 12, 2) for m in ("major", "minor")]
    for i, (key, mode) in enumerate(trials):
        wave = synth.play(Dice("train", i), 3 * RATE, 150, key, mode, "flute", "steady")
        steps = np.roll(chroma(wave), -key)
        third = {"major": steps[4], "minor": steps[3]}
        wrong = third["minor" if mode == "major" else "major"]
        assert third[mode] > 5 * wrong
        right += steps[0] + steps[7] + third[mode] > 0.8 * steps.sum()
    assert right == len(trials)


def test_tempo_is_the_distance_of_notes():
    for i, instrument in enumerate(synth.INSTRUMENTS):
        for tempo in (80, 130, 185):
            wave = synth.play(Dice("train", i), 6 * RATE, tempo, 3, "major", instrument, "steady")
            power = np.square(wave[: len(wave) // 160 * 160]).reshape(-1, 160).mean(1)
            rise = np.maximum(np.diff(np.log(power + 1e-5)), 0)
            beat = 6000 / tempo  # frames
            where = np.arange(len(rise))
            comb = {
                trial: np.abs((rise * np.exp(2j * np.pi * where * tempo * trial / 6000)).sum())
                for trial in (0.75, 0.87, 1, 1.15, 1.33)
            }
            assert max(comb, key=comb.get) == 1, (instrument, tempo, beat, comb)


def test_instruments_differ_and_dynamics_move():
    samples = {
        name: [
            statistics(synth.play(Dice("train", k, i), 2 * RATE, 90 + 8 * i, i, "major", name,
                                  "steady"))
            for i in range(10)
        ]
        for k, name in enumerate(synth.INSTRUMENTS)
    }  # fmt: skip
    assert len(samples) == 6 and np.mean(list(nearest_centroid(samples).values())) >= 0.9
    for dynamics, sign in (("rising", 1), ("falling", -1)):
        wave = synth.play(Dice("test", 1), 2 * RATE, 120, 0, "minor", "organ", dynamics)
        assert sign * (level(wave[RATE:]) - level(wave[:RATE])) > 3


def test_energy_is_loudness():
    rows = [(row["music"]["energy"], np.abs(wave).max()) for wave, row in clips("music", 12)]
    rows.sort()
    assert all(a[1] <= b[1] for a, b in zip(rows, rows[1:]))


# --- mixing and degrading


def test_mixing_keeps_the_ratio():
    rng = np.random.default_rng(0)
    for snr in (-5, 0, 7.3, 20):
        wave = one_event("bell", 2, 2)
        noise = rng.standard_normal(len(wave)).astype(np.float32) * rng.uniform(0.01, 10)
        added = synth.mix(wave, noise, snr) - wave
        assert abs(level(wave) - level(added) - snr) < 0.1


def test_the_stated_snr_is_in_the_clip(monkeypatch):
    """Of the two parts that were added up to make the clip."""
    kept = []

    def spy(wave, noise, snr):
        kept[:] = [wave, mixed(wave, noise, snr)]
        return kept[1]

    mixed = synth.mix
    monkeypatch.setattr(synth, "mix", spy)
    seen = Counter()
    for kind in ("sound", "background", "degraded"):
        for wave, row in clips(kind, 16, seed=6):
            if row["quality"]["label"] not in ("noise", "background"):
                continue
            clean, whole = kept
            gain = np.abs(wave).max() / np.abs(whole).max()  # of the last step, the level
            assert np.allclose(wave, gain * whole, atol=1e-6)
            inside = covered(row["events"], len(wave))
            assert kind != "sound" or not clean[~inside].any()
            snr = level(gain * clean) - level(wave - gain * clean)
            assert abs(snr - row["quality"]["strength"]) < 0.5
            seen[kind] += 1
    assert seen["sound"] > 5 and seen["background"] > 5 and seen["degraded"] > 0


def test_joining_keeps_the_waves_and_the_silence():
    a, b = np.ones(800, np.float32), np.full(1600, 2, np.float32)
    out = synth.join([a, b], [0.1, 0.25, 0.05])
    assert len(out) == 800 + 1600 + 0.4 * RATE
    assert (
        (out[1600:2400] == 1).all() and (out[2400:6400] == 0).all() and (out[6400:8000] == 2).all()
    )


def flatness(wave):
    """How many samples sit at the very top."""
    return np.mean(np.abs(wave) > 0.999 * np.abs(wave).max())


def tail(wave):
    """Level after the last sound of the clean clip, below the level of the whole."""
    return level(wave[-int(0.25 * RATE) :]) - level(wave)


def treble(wave):
    power, f = spectrum(wave)
    return power[f > 2500].sum() / power.sum()


def echo_at(wave, seconds):
    """Likeness of the wave's outline with itself `seconds` later."""
    outline = np.abs(wave[: len(wave) // 80 * 80]).reshape(-1, 80).mean(1)
    late = round(seconds * RATE / 80)
    a, b = outline[:-late] - outline.mean(), outline[late:] - outline.mean()
    return float((a * b).sum() / (outline - outline.mean()).dot(outline - outline.mean()))


def lost(wave):
    """Share of 40 ms pieces that are exactly silent."""
    pieces = wave[: len(wave) // 640 * 640].reshape(-1, 640)
    return float((np.abs(pieces).max(1) == 0).mean())


def quiet_level(wave):
    """Level of the softest tenth of the clip, in dB below the whole."""
    pieces = np.array([level(p) for p in wave[: len(wave) // 160 * 160].reshape(-1, 160)])
    return np.sort(pieces)[: len(pieces) // 10].mean() - level(wave)


MEASURES = {  # what a label says, measured; and whether more of it means more or less
    "noise": lambda wave, strength: (
        quiet_level(wave) > -10 * np.log10(1 + 10 ** (strength / 10)) - 8
    ),
    "clipping": lambda wave, strength: flatness(wave) > 0.04,
    "reverb": lambda wave, strength: -60 < tail(wave) < 0,
    "echo": lambda wave, strength: -60 < tail(wave) < 0,
    "band limit": lambda wave, strength: treble(wave) < 1e-4,
    "dropouts": lambda wave, strength: lost(wave) > 0.6 * strength,
    "quantisation": lambda wave, strength: len(np.unique(wave)) <= 2**strength + 2,
}


def sentence(i):
    wave = speak("seven sheep sit with the black fish", VOICES["train-006"], i)[0]
    return synth.join([wave], [0, 0.3])


@pytest.mark.parametrize("label", DEGRADATIONS)
def test_a_degradation_does_what_its_label_says(label):
    for i in range(5):
        clean, dice = sentence(i), Dice("test", 3, i)
        wave, quality = synth.degrade(dice, clean.copy(), label)
        low, high = DEGRADATIONS[label][1]
        assert quality["label"] == label and quality["unit"] == UNITS[label]
        assert low <= quality["strength"] <= high
        assert len(wave) == len(clean) and wave.dtype == np.float32
        assert MEASURES[label](wave, quality["strength"])
        voiced = clean[: -int(0.3 * RATE)]
        heard = voiced if label == "dropouts" else clean
        assert not MEASURES[label](heard, quality["strength"])


def test_strengths_are_strengths():
    """Each unit, at two of its values."""
    clean, how = sentence(1), {label: make for label, (make, *_) in DEGRADATIONS.items()}

    def done(label, strength):
        return how[label](clean.copy(), strength, Dice("train", 4))

    assert abs(level(clean) - level(done("noise", 10) - clean) - 10) < 0.5
    for share in (0.05, 0.2):
        assert abs(np.abs(done("clipping", share)).max() - share * np.abs(clean).max()) < 1e-6
    for seconds in (0.14, 0.26):
        wave = done("echo", seconds)
        added = wave - clean
        late = round(seconds * RATE)
        assert np.allclose(added[late : 2 * late], 0.6 * clean[:late], atol=1e-6)
        assert not added[:late].any()
    assert tail(done("reverb", 1.4)) > tail(done("reverb", 0.5)) + 5
    for cutoff in (700, 1400):
        power, f = spectrum(done("band limit", cutoff))
        before, _ = spectrum(clean)
        passed, stopped = f < 0.7 * cutoff, f > 1.5 * cutoff
        assert power[passed].sum() > 0.9 * before[passed].sum()
        assert power[stopped].sum() < 0.01 * before[stopped].sum()
    voiced = clean[: -int(0.3 * RATE)]
    for share in (0.2, 0.4):
        assert abs(lost(how["dropouts"](voiced.copy(), share, Dice("train", 1))) - share) < 0.06
    assert len(np.unique(done("quantisation", 2))) < len(np.unique(done("quantisation", 3.5)))


# --- the world


def test_numbers_of_sound_are_disjoint_between_splits(monkeypatch):
    """Every draw, as a place in its range, lies in its split's slices; and each split covers the
    whole of the range."""
    drawn = defaultdict(list)
    real = Dice.between

    def spy(self, low, high):
        value = real(self, low, high)
        drawn[self.split].append((value - low) / (high - low))
        return value

    monkeypatch.setattr(Dice, "between", spy)
    for i in range(10 * CYCLE):
        make_clip(4, i)
    for split in SPLITS:
        low, high = synth.SLICES[split]
        places = np.array(drawn[split])
        teeth = places * synth.TEETH % 1
        assert len(places) > 100 and (low - 1e-9 <= teeth).all() and (teeth <= high + 1e-9).all()
        assert set((places * synth.TEETH).astype(int)) == set(range(synth.TEETH))
    edges = sorted(synth.SLICES.values())
    assert all(a[1] < b[0] for a, b in zip(edges, edges[1:]))


def test_voices_are_disjoint_and_enough():
    names = Counter(name.split("-")[0] for name in VOICES)
    assert names["train"] >= 40 and names["dev"] >= 16 and names["test"] >= 16
    assert len(set(VOICES.values())) == len(VOICES)
    points = np.array([[np.log2(v.f0) * 6, v.tract, v.rate * 8, v.breath * 8, v.tilt * 3]
                       for v in VOICES.values()])  # fmt: skip
    away = np.abs(points[:, None] - points[None]).max(-1) + np.eye(len(points)) * 9
    assert away.min() > 0.25  # no two voices meet
    for engine in (synth.FORMANT, Engine("espeak"), Engine("server")):
        lists = [set(synth.speakers(engine, split)) for split in SPLITS]
        assert all(lists) and len(set.union(*lists)) == sum(map(len, lists))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "w"
    synth.make_world(out, COUNT, 11, workers=1)
    return out


def read_rows(out):
    return [json.loads(line) for line in (Path(out) / "corpus.jsonl").read_text().splitlines()]


def folder_hashes(out):
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(out).rglob("*"))
        if path.is_file()
    }


@pytest.mark.long
def test_the_folder_is_the_same_for_any_number_of_workers(world, tmp_path):
    command = [sys.executable, ROOT / "synth.py", "world", "--clips", str(COUNT), "--seed", "11"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "elsewhere", "--workers", "2"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    rows = read_rows(world)
    splits = Counter(row["split"] for row in rows)
    hours = sum(row["duration"] for row in rows) / 3600
    parts = ", ".join(f"{splits[split]} {split}" for split in SPLITS)
    told = f"{tmp_path}/elsewhere/corpus.jsonl: {COUNT} clips, {hours:.2f} hours ({parts})\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, told, "")  # no progress in a pipe
    assert folder_hashes(tmp_path / "elsewhere") == folder_hashes(world)
    assert {path.name for path in world.iterdir()} == {"clips", "corpus.jsonl", "world.json"}


def test_a_clip_depends_on_seed_and_index_alone(world):
    rows = read_rows(world)
    for i in (600, 17, 333):
        wave, row = make_clip(11, i)
        assert row == rows[i]
        stored = soundfile.read(world / row["path"], dtype="int16")[0]
        assert np.abs(stored / 32768 - wave).max() <= 1 / 32768 + 1e-9
        assert make_clip(12, i)[1] != row


def children(session):
    """Living processes of a session."""
    listed = subprocess.run(["ps", "-eo", "sid=,pid=,stat="], capture_output=True, text=True).stdout
    rows = (line.split() for line in listed.splitlines())
    return [pid for sid, pid, state in rows if int(sid) == session and state[0] != "Z"]


def interrupted(command, out, sign, wanted):
    """Start it, wait for a file like `wanted`, signal: the exit code and stderr; all are gone."""
    started = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
    while not list(out.rglob(wanted)) and started.poll() is None:
        time.sleep(0.01)
    if sign == signal.SIGINT:
        os.killpg(started.pid, sign)  # as a terminal does
    else:
        os.kill(started.pid, sign)
    said = started.communicate(timeout=60)[1]
    for _ in range(200):
        if not children(started.pid):
            break
        time.sleep(0.05)
    assert children(started.pid) == []  # the workers went with it
    assert not (out / "corpus.jsonl").exists()
    return started.returncode, said


STOPPED = b"stopped; the same command goes on from here\n"


@pytest.mark.long
def test_an_interrupted_run_is_finished_by_the_same_command(world, tmp_path):
    out = tmp_path / "w"
    command = [sys.executable, ROOT / "synth.py", "world", "--clips", str(COUNT), "--seed", "11",
               "--out", out, "--workers", "2"]  # fmt: skip
    assert interrupted(command, out, signal.SIGINT, "*.flac") == (130, STOPPED)
    assert interrupted(command, out, signal.SIGKILL, "rows-*.jsonl")[0] == -signal.SIGKILL
    clip = out / json.loads(next(out.glob("rows-*.jsonl")).open().readline())["path"]
    before = clip.stat().st_mtime_ns
    assert subprocess.run(command).returncode == 0
    assert folder_hashes(out) == folder_hashes(world)
    assert clip.stat().st_mtime_ns == before  # what was there was not made again


def dies(out, count, seed, engine, shard):
    """In place of write_shard: what a machine does that runs out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(synth, "write_shard", dies)
    flags = ("--clips", COUNT, "--workers", 2, "--out", tmp_path / "w")
    code, said = run(capsys, monkeypatch, "world", *flags)
    assert code == 2 and said.count("\n") == 1
    assert "--workers 2: expected all of them to live, found one that was killed" in said


@pytest.mark.long
def test_a_lost_clip_comes_back(world, tmp_path):
    out = tmp_path / "w"
    shutil.copytree(world, out)
    wanted = folder_hashes(out)
    (out / read_rows(out)[5]["path"]).unlink()
    (out / read_rows(out)[400]["path"]).write_bytes(b"")  # as a full disk leaves it
    synth.make_world(out, COUNT, 11)
    assert folder_hashes(out) == wanted


def test_a_folder_of_another_world_is_refused(world, capsys, monkeypatch):
    before = folder_hashes(world)
    for count, seed, told in (
        (COUNT, 12, "made with --seed 11, asked for --seed 12"),
        (COUNT + 1, 11, f"made with --clips {COUNT}, asked for --clips {COUNT + 1}"),
    ):
        flags = ("--out", world, "--clips", count, "--seed", seed)
        code, said = run(capsys, monkeypatch, "world", *flags)
        assert (code, said) == (2, f"synth.py: {world}: {told}\n")
    assert folder_hashes(world) == before


@pytest.mark.parametrize("held", ({"corpus.jsonl": "mine\n"}, {"world.json": "[1]"}))
def test_a_folder_of_something_else_is_left_alone(held, tmp_path, capsys, monkeypatch):
    for name, content in held.items():
        (tmp_path / name).write_text(content)
    before = folder_hashes(tmp_path)
    code, said = run(capsys, monkeypatch, "world", "--clips", 1, "--out", tmp_path)
    wanted = f"{tmp_path}: expected an empty folder or a world that this program made, found "
    assert code == 2 and said.count("\n") == 1 and wanted in said and [*held][0] in said
    assert folder_hashes(tmp_path) == before


@pytest.mark.parametrize(
    "damage",
    (
        lambda line: line[:40],
        lambda line: "[1]",
        lambda line: line.replace("world-3-0000001", "dog"),
        lambda line: line.replace("clips/0000", ".."),
        lambda line: line.replace('"duration": ', '"length": '),
    ),
)
def test_a_damaged_row_is_named(damage, tmp_path, capsys, monkeypatch):
    command = ("world", "--clips", 3, "--seed", 3, "--workers", 1, "--out", tmp_path / "w")
    assert run(capsys, monkeypatch, *command)[0] == 0
    corpus = tmp_path / "w" / "corpus.jsonl"
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join([lines[0], damage(lines[1]), lines[2]]) + "\n")
    before = folder_hashes(tmp_path)
    code, said = run(capsys, monkeypatch, *command)
    assert code == 2 and said.count("\n") == 1 and f"{corpus}: row 2: expected" in said
    assert folder_hashes(tmp_path) == before


@pytest.mark.parametrize(
    "flags, named",
    (
        (["--clips", "0"], "--clips"),
        (["--clips", "x"], "--clips"),
        (["--workers", "0"], "--workers"),
        (["--seed", "-1"], "--seed"),
        (["--out", "/dev/null/x"], "/dev/null/x"),
        (["--voices", "/no/such", "--tts", "http://localhost:1"], "/no/such"),
        (["--voice", "flute"], "--voice"),
        (["--voices", "names.json"], "--voices: expected --tts"),
        (["--voice", "espeak", "--tts", "http://localhost:1"], "--voice espeak: expected no --tts"),
        (["--tts", "localhost:1"], "--tts: expected a URL"),
        (["--tts", ""], "--tts: expected a URL"),
    ),
)
def test_bad_flags_are_one_line(flags, named, tmp_path, capsys, monkeypatch):
    code, said = run(capsys, monkeypatch, "world", "--out", tmp_path / "w", *flags)
    assert code == 2 and said.count("\n") == 1 and named in said
    assert not (tmp_path / "w").exists()


def test_a_bad_seed_of_the_demo_is_one_line(tmp_path, capsys, monkeypatch):
    code, said = run(capsys, monkeypatch, "clips", "--out", tmp_path / "c", "--seed", -1)
    assert (code, said) == (2, "synth.py: --seed: expected 0 or more, found -1\n")
    assert not (tmp_path / "c").exists()


def number(low, high):
    return lambda value: type(value) in (int, float) and low <= value <= high


def one_of(*options):
    return lambda value: value in options


def text(value):
    return isinstance(value, str) and value.strip() == value != ""


def texts(value):
    return isinstance(value, list) and len(value) > 0 and all(map(text, value))


def spans(value):
    return isinstance(value, list) and all(
        text(name) and 0 <= on < off <= 10 for name, on, off in value
    )


def record(**fields):
    return lambda value: (
        isinstance(value, dict)
        and set(value) <= set(fields)
        and all(fields[name](item) for name, item in value.items())
    )


UNITS = {  # what each quality's strength is counted in, also in the table of degradations
    "clean": None, "background": "dB", "noise": "dB", "clipping": "of peak", "reverb": "s",
    "echo": "s", "band limit": "Hz", "dropouts": "share", "quantisation": "bits",
}  # fmt: skip
FIELDS = {  # what a row may hold; the first seven it must
    "id": text, "path": text, "corpus": one_of("world"), "split": one_of(*SPLITS),
    "duration": number(1, 3.3), "licence": text, "labels": texts, "speaker": text,
    "transcript": text, "captions": texts, "events": spans, "words": spans, "phones": spans,
    "emotion": one_of("neutral", "happy", "sad", "angry"),
    "music": record(tempo=number(60, 200), key=one_of(*synth.KEYS), mode=one_of("major", "minor"),
                    instrument=one_of(*synth.INSTRUMENTS), energy=number(0, 1),
                    dynamics=one_of("steady", "rising", "falling")),
    "quality": record(label=one_of(*UNITS), strength=number(0, 1500), unit=text),
    "dialogue": record(id=text, turn=number(1, 4), speaker=one_of("A", "B")),
    "order": record(group=text, index=number(1, 5)),
    "voice": record(f0=number(80, 270), tract=number(12, 19), rate=number(0.8, 1.25),
                    breath=number(0, 0.4)),
}  # fmt: skip


def test_every_row_is_as_the_contract_says(world):
    rows = read_rows(world)
    assert len(rows) == COUNT and len({row["id"] for row in rows}) == COUNT
    always = list(FIELDS)[:7] + ["quality"]
    for row in rows:
        assert set(row) <= set(FIELDS) and set(always) <= set(row)
        wrong = [field for field, value in row.items() if not FIELDS[field](value)]
        assert wrong == [], (row["id"], wrong)
        quality = row["quality"]
        assert quality.get("unit") == UNITS[quality["label"]]
        assert ("strength" in quality) == (quality["label"] != "clean")
        assert all(off <= row["duration"] for _, _, off in row.get("events", []))
        if "transcript" in row:
            for field in ("words", "phones", "voice", "speaker", "emotion"):
                assert field in row
            assert " ".join(word for word, _, _ in row["words"]) == row["transcript"]
            speech = next(e for e in row["events"] if e[0] == "speech")
            assert speech[1] <= row["words"][0][1] and row["words"][-1][2] <= speech[2]
        assert not Path(row["path"]).is_absolute()
        wave = load_audio(world / row["path"])
        assert abs(len(wave) / RATE - row["duration"]) < 1e-4 and 0.01 < np.abs(wave).max() < 1
    assert len({row["duration"] for row in rows}) > 300


def test_all_kinds_and_splits_are_there(world):
    rows = read_rows(world)
    assert {row["split"] for row in rows} == set(SPLITS)
    qualities = {row["quality"]["label"] for row in rows}
    assert qualities == {*UNITS} == {"clean", "background", *DEGRADATIONS}
    heard = {label for row in rows for label in row["labels"]}
    assert heard >= set(EVENTS) | set(synth.INSTRUMENTS) | {"speech", "music"}


def test_no_sentence_and_no_speaker_is_in_two_splits(world):
    said, speaking = defaultdict(set), defaultdict(set)
    for row in read_rows(world):
        if "transcript" in row:
            said[row["transcript"]].add(row["split"])
            speaking[row["speaker"]].add(row["split"])
    assert len(said) > 100 and all(len(splits) == 1 for splits in said.values())
    assert all(len(splits) == 1 for splits in speaking.values())
    assert all(name.startswith(tuple(splits)) for name, splits in speaking.items())


@pytest.mark.parametrize("split", SPLITS)
def test_every_form_has_sentences_in_every_split(split):
    for forms in (*synth.DIALOGUES, *synth.ORDERS, *([form] for form in synth.SENTENCES)):
        lines = synth.write_script(Dice(split, 1), forms)
        assert len(lines) == len(forms) and "{" not in "".join(lines)
        assert {synth.split_of(line) for line in lines} == {split}


def test_groups_are_whole_and_hang_together(world):
    dialogues, orders = defaultdict(list), defaultdict(list)
    for row in read_rows(world):
        if "dialogue" in row:
            dialogues[row["dialogue"]["id"]].append(row)
        if "order" in row:
            orders[row["order"]["group"]].append(row)
    assert len(dialogues) == len(orders) == COUNT // 30
    assert dialogues.keys().isdisjoint(orders)
    for rows in dialogues.values():
        assert [row["dialogue"]["turn"] for row in rows] == [1, 2, 3, 4]
        voices = [(row["dialogue"]["speaker"], row["speaker"]) for row in rows]
        assert voices[0] == voices[2] != voices[1] == voices[3]
        assert voices[0][1] != voices[1][1]
    kinds = Counter()
    for rows in orders.values():
        assert [row["order"]["index"] for row in rows] == list(range(1, len(rows) + 1))
        assert len(rows) >= 3 and len({row["split"] for row in rows}) == 1
        kinds["transcript" in rows[0]] += 1
        if "transcript" in rows[0]:
            assert len({row["speaker"] for row in rows}) == 1
            starts = tuple(row["transcript"].split()[0] for row in rows)
            told = {tuple(form.split()[0] for form in forms) for forms in synth.ORDERS}
            assert starts in told
        else:
            assert tuple(row["labels"][0] for row in rows) in synth.PROCESSES
    assert min(kinds[True], kinds[False]) > 1


def test_the_demo_clips_are_what_the_command_makes(tmp_path, capsys, monkeypatch):
    assert run(capsys, monkeypatch, "clips", "--out", tmp_path / "c") == (0, "")
    made = {path.name: path for path in (tmp_path / "c").iterdir()}
    assert len(made) == 6 and sum(path.stat().st_size for path in made.values()) < 300_000
    assert set(made) == {path.name for path in (ROOT / "clips").iterdir()}
    for name, path in made.items():
        one, other = load_audio(path), load_audio(ROOT / "clips" / name)
        assert len(one) == len(other) and np.abs(one - other).max() < 0.001  # other CPUs round


# --- other voices


def test_espeak_s_command_and_reply(monkeypatch, tmp_path):
    """With a program of that name which writes what it was asked, and a second of noise."""
    fake = tmp_path / "bin" / "espeak-ng"
    fake.parent.mkdir()
    sound = tmp_path / "sound.wav"
    noise = np.random.default_rng(0).standard_normal(22050) * 0.1
    soundfile.write(sound, np.pad(noise, 4000), 22050, subtype="PCM_16")
    fake.write_text(f'#!/bin/sh\nprintf "%s|" "$@" > {tmp_path}/args\ncat > {tmp_path}/said\n'
                    f"echo x >> {tmp_path}/calls\ncat {sound}\n")  # fmt: skip
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    engine = Engine("espeak", cache=tmp_path / "kept")
    text = "--help; rm -rf $HOME `id`"
    wave = synth.kept_speech(engine, text, "m3-44")
    assert (tmp_path / "said").read_text() == text  # over stdin: no flag, no shell
    assert (tmp_path / "args").read_text() == "-v|en-us+m3|-p|44|--stdin|--stdout|"
    assert 0.9 * RATE < len(wave) < 1.1 * RATE and abs(np.abs(wave).max() - 1) < 0.01
    again = synth.kept_speech(engine, text, "m3-44")
    assert again.tobytes() == wave.tobytes() and (tmp_path / "calls").read_text() == "x\n"
    synth.kept_speech(engine, text, "m3-52")
    assert (tmp_path / "calls").read_text() == "x\nx\n"


def test_espeak_itself(tmp_path):
    if not shutil.which("espeak-ng"):
        print("skipped: espeak-ng is not installed")
        pytest.skip("espeak-ng is not installed")
    missing = synth.make_world(tmp_path / "w", 30, 0, Engine("espeak", cache=tmp_path / "kept"))
    rows = [row for row in read_rows(tmp_path / "w") if "transcript" in row]
    assert missing == [] and rows and all("phones" not in row for row in rows)


def test_espeak_missing_is_said_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, said = run(capsys, monkeypatch, "world", "--voice", "espeak", "--out", tmp_path / "w")
    assert code == 2 and "espeak-ng" in said and said.count("\n") == 1
    assert not (tmp_path / "w").exists()


def wav(wave, rate=24000):
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


class Speaker(BaseHTTPRequestHandler):
    """A speech server: `answer(body)` gives (status, bytes)."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        status, reply = self.server.answer(body)
        self.send_response(status)
        self.send_header("Content-Type", "audio/wav")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(prepare, "PAUSE", 0.001)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Speaker)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def good(body):
    """As long as the text, in a pitch of the voice's own."""
    n = 2400 * len(body["input"].split()) * 2
    pitch = 100 + 10 * len(body["voice"])
    return 200, wav(0.3 * np.sin(2 * np.pi * pitch * np.arange(n) / 24000))


def test_another_server_is_asked_too(server, tmp_path):
    """What is kept was said by one of them; a second one has other voices."""
    server.answer, other = good, server.url.replace("127.0.0.1", "localhost")
    for url in (server.url, other, server.url, other):
        engine = Engine("server", url, "m", {}, tmp_path / "kept")
        synth.kept_speech(engine, "the dog is red", "nova")
    assert len(server.asked) == (2 if other != server.url else 1)


def test_a_server_speaks(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TTS_API_KEY", "s3cret-key")
    server.answer = good
    for url in (server.url, server.url + "/v1/"):
        engine = Engine("server", url, "m", {"nova": "en_woman"}, tmp_path / "kept")
        wave = synth.kept_speech(engine, "the dog is red", "nova")
        assert abs(len(wave) / RATE - 0.8) < 0.02
    (path, key, body), *more = server.asked
    assert more == []  # the second time it was kept
    assert path == "/v1/audio/speech" and key == "Bearer s3cret-key"
    assert body == {"model": "m", "input": "the dog is red", "voice": "en_woman",
                    "response_format": "wav"}  # fmt: skip
    held = [p.read_bytes() + p.name.encode() for p in (tmp_path / "kept").rglob("*.*")]
    assert held and not any(b"s3cret" in b for b in held)


BAD = {
    "html": (b"<html>Busy</html>", "expected sound, found"),
    "json": (b'{"error": {"message": "no"}}', "expected sound, found"),
    "nothing": (b"", "expected sound, found"),
    "magic only": (b"RIFF" + b"\0" * 60, "cannot be decoded"),
    "silence": (wav(np.zeros(24000)), "expected speech, found silence"),
    "hum of dither": (wav(np.full(24000, 0.0005)), "expected speech, found silence"),
    "too long": (wav(0.1 * np.ones(24000 * 20)), "expected 0.1 to 6 s"),
    "too short": (wav(0.1 * np.ones(500)), "expected 0.1 to 6 s"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_is_refused_and_not_kept(server, tmp_path, kind):
    reply, complaint = BAD[kind]
    server.answer = lambda body: (200, reply)
    engine = Engine("server", server.url, "m", {}, tmp_path / "kept")
    with pytest.raises(BadInput, match=complaint):
        synth.kept_speech(engine, "the dog is red", "nova")
    assert not list(tmp_path.rglob("*.flac"))
    server.answer = good
    assert len(synth.kept_speech(engine, "the dog is red", "nova"))


def test_a_world_survives_bad_replies_and_is_completed_later(server, tmp_path):
    fine = threading.Event()

    def moody(body):
        bad = not fine.is_set() and len(body["input"]) % 3 == 0
        return (200, b"<html>") if bad else good(body)

    server.answer = moody
    engine = Engine("server", server.url, "m", {}, tmp_path / "kept")
    missing = synth.make_world(tmp_path / "w", 60, 2, engine)
    rows = read_rows(tmp_path / "w")
    assert missing and len(rows) + len(missing) == 60
    spoken = [row for row in rows if "transcript" in row]
    assert spoken and all({"words", "phones", "voice", "emotion"}.isdisjoint(r) for r in spoken)
    licences = {("transcript" in row, row["licence"]) for row in rows}
    assert licences == {(True, "as the speech server's voices"), (False, "CC0-1.0")}
    assert all(row["id"].startswith("world-server-2-") for row in rows)
    names = {split: synth.TEN[split].split() for split in SPLITS}
    assert all(row["speaker"] in names[row["split"]] for row in spoken)
    for row in spoken:
        speech = next(e for e in row["events"] if e[0] == "speech")
        assert speech[2] - speech[1] > 0.1
    asked = Counter((body["input"], body["voice"]) for _, _, body in server.asked)
    fine.set()
    assert synth.make_world(tmp_path / "w", 60, 2, engine) == []
    assert len(read_rows(tmp_path / "w")) == 60
    paid = Counter((body["input"], body["voice"]) for _, _, body in server.asked)
    again = {key for key, n in paid.items() if n > asked[key] and asked[key]}
    assert all(len(text) % 3 == 0 for text, _ in again)  # only what had been refused


@pytest.mark.parametrize("status", (401, 404))
def test_a_server_that_refuses_ends_the_job(server, tmp_path, status):
    server.answer = lambda body: (status, b"no")
    engine = Engine("server", server.url, "m", {}, tmp_path / "kept")
    with pytest.raises(BadInput, match=str(status)):
        synth.make_world(tmp_path / "w", 60, 2, engine)
    assert len(server.asked) == 1 and not (tmp_path / "w" / "corpus.jsonl").exists()
