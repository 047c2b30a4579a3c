"""Make what does not exist: a toy world of sounds, music and voices, and all that is known of it.

    python synth.py world --out data/world --clips 9000 --seed 0     corpus.jsonl and its clips
    python synth.py world --out data/espeak --clips 900 --voice espeak
    python synth.py world --out data/served --clips 900 --tts http://localhost:8091 --model NAME
    python synth.py clips --out clips                                six short clips to try it on

Nothing is recorded and nothing is downloaded: a sound is a row of numbers that a few generators
read, so its times, counts, keys and voices are known exactly, and a question about it has one
answer. Ideas, in this order:
  1. chance: a split owns slices of every range, so no number that between() draws for a test clip
     was drawn in training;
  2. three generators (tone, rush, patter) and a table of events; music is notes of the first;
  3. a voice: phones to formants to sound, frame by frame;
  4. mixing, and what recordings suffer, each with its label, strength and unit;
  5. the world: clip i depends on (seed, i) and on nothing else.
"""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections import Counter, namedtuple
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path

import numpy as np
import soundfile

from prepare import (
    RATE, BadInput, Parser, Refused, clean, cli, expect, load_audio, open_audio, progress,
    read_json, read_values, request, stop, warn, worker_map, write_json, written,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Chance. Every range is cut into eight teeth, and every tooth into three slices, one for each
# split, with gaps between. A number of sound (a pitch, a decay, a tempo, an SNR) drawn for one
# split is therefore never drawn for another, while each split still covers the whole range. Free
# are when something happens, what comes together, and by how little one bark differs from the next.

SPLITS = ("train", "dev", "test")
TEETH = 8
SLICES = {"train": (0.0, 0.6), "dev": (0.65, 0.78), "test": (0.82, 0.97)}


class Dice:
    """All the chance of one clip: a split's slices and one stream of random numbers."""

    def __init__(self, split, *seed):
        self.split = split
        self.rng = np.random.default_rng(seed)

    def between(self, low, high) -> float:
        """A number of sound, from the split's own slices of low..high."""
        place = self.rng.integers(TEETH) + self.rng.uniform(*SLICES[self.split])
        return float(low + (high - low) * place / TEETH)

    def pick(self, options):
        return options[self.rng.integers(len(options))]

    def noise(self, n) -> np.ndarray:
        return self.rng.standard_normal(n, np.float32)


# ------------------------------------------------------------------------------------------------
# Three generators. Each makes n samples of a different matter: tone is a stack of partials, rush is
# coloured noise, patter is many small hits. All share loudness(), what happens to it in time.

TAU = 2 * np.pi
TOP = 7600  # Hz; no partial above it, so that nothing folds back at 8 kHz
MS = RATE // 1000  # samples; every on and off is a whole millisecond


def curve(points, n) -> np.ndarray:
    """n values through `points`, which lie evenly in time."""
    where = np.linspace(0, len(points) - 1, n)
    return np.interp(where, np.arange(len(points)), points).astype(np.float32)


def loudness(n, attack=0.004, release=0.01, shape=None, decay=0, flutter=0, beat=0) -> np.ndarray:
    """attack and release in seconds, decay in e-folds a second, flutter 0..1 at `beat` Hz."""
    gain = curve(shape, n) if shape else np.ones(n, np.float32)
    t = np.arange(n, dtype=np.float32) / RATE
    if decay:
        gain *= np.exp(-np.float32(decay) * t)
    if flutter:
        gain *= 1 - np.float32(flutter) * (0.5 - 0.5 * np.cos(np.float32(TAU * beat) * t))
    rise, fall = min(n, int(attack * RATE) + 1), min(n, int(release * RATE) + 1)
    gain[:rise] *= np.linspace(0, 1, rise, dtype=np.float32)
    gain[n - fall :] *= np.linspace(1, 0, fall, dtype=np.float32)
    return gain


def tone(
    dice, n, pitch, depth=0, bend=(0, 0), wobble=0, speed=0,
    partials=((1, 1, 0),), formants=(), tilt=1, breath=0, **rest,
) -> np.ndarray:  # fmt: skip
    """A stack of partials (ratio, level, decay). The pitch follows `bend` by `depth` and wobbles
    `speed` times a second. With formants (frequency, width, level) the partials are all harmonics,
    as a throat lets them through; breath adds noise."""
    swing = 1 + depth * curve(bend, n)
    if wobble:
        swing = swing * (1 + wobble * np.sin(TAU * speed * np.arange(n) / RATE + dice.rng.random()))
    highest = pitch * float(swing.max())
    if formants:
        partials = harmonics(pitch, highest, formants, tilt)
    cycles = np.cumsum(pitch * swing.astype(np.float64)) / RATE
    t = np.arange(n, dtype=np.float32) / RATE
    wave = np.zeros(n, np.float32)
    for ratio, level, decay in partials:
        if ratio * highest < TOP:
            turns = ratio * cycles
            turns -= np.floor(turns)  # keeps float32 exact enough
            part = np.float32(level) * np.sin(np.float32(TAU) * turns.astype(np.float32))
            wave += part * np.exp(np.float32(-decay) * t) if decay else part
    if breath:
        wave += np.float32(breath * np.abs(wave).max()) * dice.noise(n)
    return wave * loudness(n, **rest)


def harmonics(pitch, highest, formants, tilt) -> list:
    """Partials of a voice-like sound: each harmonic as loud as the formants around it are."""
    partials = []
    for h in range(1, int(TOP / highest) + 1):
        heard = sum(level / (1 + ((h * pitch - f) / width) ** 2) for f, width, level in formants)
        if heard > 0.004:
            partials.append((h, heard / h**tilt, 0))
    return partials


def rush(dice, n, bands, size=1, **rest) -> np.ndarray:
    """Noise in bands (frequency, width, level), all moved by `size`."""
    return shaped_noise(dice, n, lambda f: humps(f / size, bands)) * loudness(n, **rest)


def patter(dice, n, rate, centre, width, ring, jitter=1, depth=0, bend=(0, 0), **rest):
    """Hits, `rate` a second: even (jitter 0: a motor) to random (jitter 1: rain). A hit is noise
    around `centre`, or a pure tone where width is 0, and rings off by `ring` e-folds a second."""
    beats = np.cumsum(rate * (1 + depth * curve(bend, n)).astype(np.float64)) / RATE
    starts = np.flatnonzero(np.diff(np.floor(beats + dice.rng.random())) > 0)
    if jitter:
        moved = starts + jitter * RATE / rate * dice.rng.uniform(-0.5, 0.5, len(starts))
        starts = np.clip(moved, 0, n - 1).astype(np.int64)
    hits = np.zeros(n, np.float32)
    strength = 1 + 0.6 * jitter * dice.rng.uniform(-1, 1, len(starts))
    np.add.at(hits, starts, strength.astype(np.float32))
    long = min(n, int(5 / ring * RATE) + MS)
    t = np.arange(long, dtype=np.float32) / RATE
    if width:
        hit = shaped_noise(dice, long, lambda f: humps(f, ((centre, width, 1),)))
    else:
        hit = np.sin(np.float32(TAU * centre) * t)
    size = fast_size(n + long)
    spectrum = np.fft.rfft(hits, size) * np.fft.rfft(hit * np.exp(np.float32(-ring) * t), size)
    return np.fft.irfft(spectrum, size)[:n].astype(np.float32) * loudness(n, **rest)


def humps(f, bands):
    return sum(level * np.exp(-0.5 * ((f - centre) / width) ** 2) for centre, width, level in bands)


def shaped_noise(dice, n, gain) -> np.ndarray:
    """Noise of n samples whose spectrum is gain(frequency in Hz)."""
    return filtered(dice.noise(n), gain)


def filtered(wave, gain) -> np.ndarray:
    size = fast_size(len(wave))
    frequency = np.fft.rfftfreq(size, 1 / RATE).astype(np.float32)
    return np.fft.irfft(np.fft.rfft(wave, size) * gain(frequency), size)[: len(wave)].astype("f4")


def fast_size(n) -> int:
    """The next 2**k or 3 * 2**k: sizes that an FFT likes."""
    power = 1 << max(4, (n - 1).bit_length())
    return power * 3 // 4 if power * 3 // 4 >= n else power


# ------------------------------------------------------------------------------------------------
# The events. A label is a noun, so that "three" + label + "s" is English. (low, high) is drawn,
# once for all repetitions, as one dog barks alike; a list or a tuple of tuples is taken as it is.

Event = namedtuple("Event", "group phrase most seconds layers")  # most: times in a row; layers:
# (generator, level, parameters), which sound together
EVENTS = {
    "dog bark": Event("animal", "a dog barks", 4, (0.13, 0.22), [
        (tone, 1, dict(pitch=(330, 620), depth=(0.3, 0.6), bend=[0, 1, 0], tilt=0.6, breath=0.1,
         formants=[(700, 300, 1), (1500, 400, 0.7), (2600, 500, 0.3)], shape=[0, 1, 1, 0.6, 0]))]),
    "cat meow": Event("animal", "a cat meows", 3, (0.4, 0.65), [
        (tone, 1, dict(pitch=(480, 680), depth=(0.25, 0.5), bend=[0, 1, 0.8, 0], tilt=0.3,
         formants=[(950, 300, 1), (2300, 600, 1)], breath=0.02, attack=0.08, release=0.15))]),
    "cow moo": Event("animal", "a cow moos", 2, (0.6, 1.0), [
        (tone, 1, dict(pitch=(95, 150), depth=(0.1, 0.25), bend=[0, 1, 0.8, 0], tilt=0.9,
         formants=[(300, 120, 1), (700, 200, 0.5)], attack=0.1, release=0.25, breath=0.02))]),
    "sheep bleat": Event("animal", "a sheep bleats", 2, (0.5, 0.8), [
        (tone, 1, dict(pitch=(280, 400), wobble=0.05, speed=9, flutter=0.75, beat=(8, 12), tilt=0.3,
         formants=[(700, 200, 1), (1500, 300, 1), (2700, 400, 0.8)], breath=0.04, attack=0.05))]),
    "rooster crow": Event("animal", "a rooster crows", 2, (0.8, 1.2), [
        (tone, 1, dict(pitch=(520, 700), depth=(0.5, 0.8), bend=[0, 0.2, 0, 1, 1, 0.8, 0], tilt=0.2,
         formants=[(1300, 400, 1), (2700, 600, 1)], breath=0.04, flutter=0.5, beat=(35, 50),
         shape=[0.5, 0.8, 0.4, 1, 1, 0.8, 0.1]))]),
    "duck quack": Event("animal", "a duck quacks", 4, (0.14, 0.22), [
        (tone, 1, dict(pitch=(170, 250), depth=(-0.3, -0.1), bend=[0, 1], tilt=0.1, breath=0.03,
         formants=[(1150, 180, 1), (1900, 250, 0.8), (3300, 300, 0.2)], attack=0.02))]),
    "bird chirp": Event("animal", "a bird chirps", 4, (0.09, 0.17), [
        (tone, 1, dict(pitch=(3200, 4800), depth=(-0.3, 0.3), bend=[0, 1], wobble=0.03, speed=40,
         shape=[0, 1, 1, 0]))]),
    "owl hoot": Event("animal", "an owl hoots", 3, (0.35, 0.6), [
        (tone, 1, dict(pitch=(300, 420), depth=(0.03, 0.1), bend=[0, 1, 0], attack=0.08,
         partials=((1, 1, 0), (2, 0.06, 0)), release=0.15, breath=0.01))]),
    "frog croak": Event("animal", "a frog croaks", 3, (0.25, 0.45), [
        (patter, 1, dict(rate=(38, 55), centre=(750, 1000), width=0, ring=140, jitter=0.05,
         shape=[0.5, 1, 1, 0.4]))]),
    "cricket chirp": Event("animal", "a cricket chirps", 3, (0.3, 0.5), [
        (tone, 1, dict(pitch=(5400, 6600), flutter=1, beat=(28, 38), shape=[0.6, 1, 1]))]),
    "siren": Event("alarm", "a siren wails", 1, (0.9, 2.6), [
        (tone, 1, dict(pitch=(750, 1000), wobble=(0.3, 0.4), speed=(0.9, 2.4), attack=0.05,
         partials=((1, 1, 0), (2, 0.4, 0), (3, 0.2, 0))))]),
    "bell": Event("alarm", "a bell rings", 3, (0.5, 0.8), [
        (tone, 1, dict(pitch=(700, 1300), decay=1, attack=0.001,
         partials=((1, 1, 4), (2, 0.6, 5), (2.76, 0.5, 7), (5.4, 0.3, 12))))]),
    "phone ring": Event("alarm", "a phone rings", 3, (0.4, 0.7), [
        (tone, 1, dict(pitch=(1100, 1500), flutter=0.8, beat=(17, 23),
         partials=((1, 1, 0), (1.3, 1, 0), (2.6, 0.4, 0))))]),
    "alarm beep": Event("alarm", "an alarm beeps", 5, (0.09, 0.18), [
        (tone, 1, dict(pitch=(2000, 2900), partials=((1, 1, 0), (2, 0.1, 0))))]),
    "car horn": Event("alarm", "a car horn honks", 3, (0.3, 0.7), [
        (tone, 1, dict(pitch=(330, 430), partials=[(r * h, 1 / h**0.5, 0) for h in range(1, 9)
         for r in (1, 1.26)], attack=0.02))]),
    "door knock": Event("impact", "someone knocks at a door", 5, (0.13, 0.16), [
        (tone, 1, dict(pitch=(150, 260), partials=((1, 1, 38), (2.3, 0.5, 60)), attack=0.001)),
        (rush, 0.2, dict(bands=((1200, 900, 1),), decay=150, attack=0.001))]),
    "hammer blow": Event("impact", "a hammer strikes metal", 5, (0.16, 0.22), [
        (tone, 1, dict(pitch=(1000, 1600), attack=0.001,
         partials=((1, 0.8, 26), (2.71, 1, 32), (4.35, 0.8, 38)))),
        (rush, 0.6, dict(bands=((3500, 2500, 1),), decay=160, attack=0.001))]),
    "glass break": Event("impact", "a glass breaks", 2, (0.35, 0.6), [
        (rush, 0.8, dict(bands=((5500, 2000, 1),), decay=35, attack=0.001)),
        (patter, 1, dict(rate=(28, 45), centre=(3800, 4600), width=0, ring=40, decay=5)),
        (patter, 1, dict(rate=(28, 45), centre=(5600, 6800), width=0, ring=50, decay=6))]),
    "footstep": Event("impact", "a footstep sounds", 5, (0.14, 0.18), [
        (rush, 1, dict(bands=((330, 230, 1),), size=(0.8, 1.3), decay=28, attack=0.002)),
        (rush, 0.35, dict(bands=((2200, 900, 1),), shape=[0, 0, 1, 0.4, 0], size=(0.8, 1.2)))]),
    "explosion": Event("impact", "something explodes", 2, (0.7, 1.1), [
        (rush, 1, dict(bands=((0, 250, 1), (0, 1200, 0.25)), size=(0.8, 1.5), decay=(3.5, 5.5),
         attack=0.002)),
        (rush, 0.5, dict(bands=((0, 5000, 1),), decay=50, attack=0.001))]),
    "door slam": Event("impact", "a door slams", 2, (0.22, 0.32), [
        (tone, 1, dict(pitch=(65, 100), partials=((1, 1, 12), (1.6, 0.7, 16)), attack=0.001)),
        (rush, 0.9, dict(bands=((500, 500, 1), (2000, 1500, 0.3)), decay=40, attack=0.001))]),
    "rain": Event("weather", "rain falls", 1, (0.9, 2.8), [
        (patter, 1, dict(rate=(350, 700), centre=(4000, 5200), width=2200, ring=500, attack=0.1,
         release=0.1)),
        (rush, 0.35, dict(bands=((5500, 2500, 1),), attack=0.1, release=0.1))]),
    "wind": Event("weather", "the wind blows", 1, (1.0, 2.8), [
        (rush, 1, dict(bands=((420, 130, 1), (900, 150, 0.25)), size=(0.8, 1.25), flutter=0.6,
         beat=(0.6, 1.5), attack=0.15, release=0.2))]),
    "thunder": Event("weather", "thunder rolls", 1, (0.9, 2.2), [
        (rush, 1, dict(bands=((0, 90, 1), (0, 300, 0.12)), size=(0.8, 1.3), attack=0.03,
         shape=[1, 0.7, 1, 0.5, 0.6, 0.2, 0])),
        (patter, 0.7, dict(rate=(9, 15), centre=90, width=70, ring=16, shape=[1, 1, 0.6, 0.2]))]),
    "engine": Event("machine", "an engine runs", 1, (0.9, 2.6), [
        (patter, 1, dict(rate=(38, 70), centre=(110, 170), width=70, ring=70, jitter=0.04,
         depth=(-0.25, 0.25), bend=[0, 1, 0.5, 1], attack=0.1, release=0.1)),
        (rush, 0.08, dict(bands=((900, 600, 1),), attack=0.1, release=0.1))]),
    "saw": Event("machine", "someone saws wood", 1, (0.9, 2.4), [
        (patter, 1, dict(rate=(110, 170), centre=(2600, 3400), width=800, ring=260, jitter=0.2,
         flutter=0.96, beat=(2.5, 4.5), attack=0.05))]),
    "helicopter": Event("machine", "a helicopter hovers", 1, (0.9, 2.6), [
        (patter, 1, dict(rate=(11, 16), centre=(160, 260), width=160, ring=45, jitter=0.02)),
        (rush, 0.25, dict(bands=((1500, 900, 1),), flutter=0.9, beat=13, attack=0.1)),
        (tone, 0.06, dict(pitch=(2400, 3000), attack=0.1))]),
    "drill": Event("machine", "a drill whirs", 1, (0.8, 2.2), [
        (tone, 1, dict(pitch=(190, 300), depth=(0.1, 0.3), bend=[-1, 0, 0, 0.2, 0, -1], attack=0.08,
         partials=[(h, 0.4 + h / 12, 0) for h in range(1, 15)], breath=0.05)),
        (rush, 0.5, dict(bands=((3500, 1200, 1),), attack=0.08))]),
    "clock tick": Event("machine", "a clock ticks", 5, (0.035, 0.05), [
        (tone, 1, dict(pitch=(2400, 3600), partials=((1, 1, 170), (1.6, 0.6, 220)), attack=0.001)),
        (rush, 0.5, dict(bands=((4500, 2500, 1),), decay=320, attack=0.0005))]),
    "water drop": Event("water", "water drips", 5, (0.08, 0.12), [
        (tone, 1, dict(pitch=(600, 950), depth=(0.9, 1.3), bend=[0, 1], decay=28, attack=0.003))]),
    "stream": Event("water", "a stream flows", 1, (0.9, 2.6), [
        (patter, 1, dict(rate=(45, 75), centre=(520, 640), width=0, ring=50, attack=0.1)),
        (patter, 1, dict(rate=(45, 75), centre=(800, 980), width=0, ring=60, attack=0.1)),
        (patter, 0.8, dict(rate=(45, 75), centre=(1250, 1500), width=0, ring=80, attack=0.1))]),
    "laughter": Event("human", "someone laughs", 1, (0.8, 1.8), [
        (tone, 1, dict(pitch=(190, 330), depth=(0.2, 0.4), bend=[0.4, 1, 0.5, 0], flutter=0.97,
         beat=(4.6, 6.2), formants=[(750, 160, 1), (1350, 200, 0.7), (2600, 300, 0.25)], tilt=0.7,
         breath=0.06))]),
    "cough": Event("human", "someone coughs", 3, (0.22, 0.34), [
        (rush, 1, dict(bands=((650, 200, 1), (1500, 350, 0.8), (2900, 500, 0.4)), size=(0.85, 1.2),
         shape=[0.3, 1, 0.5, 0.35, 0.25, 0.1, 0])),
        (tone, 0.5, dict(pitch=(130, 220), formants=[(650, 200, 1), (1500, 300, 0.6)],
         shape=[0, 0.1, 1, 0.8, 0.3, 0]))]),
    "applause": Event("human", "people applaud", 1, (0.9, 2.6), [
        (patter, 1, dict(rate=(45, 90), centre=(1300, 1800), width=500, ring=150, attack=0.15,
         release=0.15))]),
    "snore": Event("human", "someone snores", 2, (0.6, 1.0), [
        (patter, 1, dict(rate=(24, 34), centre=(260, 360), width=90, ring=60, jitter=0.2,
         shape=[0, 0.7, 1, 0.8, 0])),
        (rush, 0.15, dict(bands=((600, 400, 1),), shape=[0, 0.7, 1, 0.8, 0]))]),
    "baby wail": Event("human", "a baby wails", 2, (0.7, 1.1), [
        (tone, 1, dict(pitch=(400, 500), depth=(0.15, 0.3), bend=[-1, 0.8, 1, 0.8, 0.2, -1], tilt=0,
         formants=[(1250, 300, 1), (3400, 500, 1)], breath=0.03, attack=0.05, release=0.15))]),
    "whistle": Event("human", "someone whistles", 3, (0.35, 0.6), [
        (tone, 1, dict(pitch=(1500, 2100), depth=(0.1, 0.3), bend=[0, 1, 0], wobble=0.015, speed=6,
         breath=0.02, attack=0.04, release=0.08))]),
    "fire": Event("other", "a fire crackles", 1, (1.0, 2.8), [
        (patter, 1, dict(rate=(14, 26), centre=(2200, 3200), width=1500, ring=350)),
        (rush, 0.1, dict(bands=((250, 200, 1),), attack=0.1))]),
}  # fmt: skip
FLOOR = 0.01  # of the peak: what is softer is not heard, so an event begins and ends there


def drawn(dice, value):
    """(low, high) becomes a number; everything else is what it is."""
    pair = type(value) is tuple and len(value) == 2 and not isinstance(value[0], tuple)
    return dice.between(*value) if pair else value


def draw_event(dice, label):
    """One dog: the seconds and the layers of an event, with every number chosen."""
    event = EVENTS[label]
    layers = [
        (make, level, {name: drawn(dice, value) for name, value in numbers.items()})
        for make, level, numbers in event.layers
    ]
    return drawn(dice, event.seconds), layers


def make_event(dice, seconds, layers) -> np.ndarray:
    """One bark of it: peak 1, from the first sound to the last, in whole milliseconds."""
    n = int(seconds * RATE)
    wave = np.zeros(n, np.float32)
    for make, level, numbers in layers:
        part = make(dice, n, **numbers)
        wave += part * np.float32(level / max(np.abs(part).max(), 1e-6))
    wave /= np.abs(wave).max()
    heard = np.flatnonzero(np.abs(wave) > FLOOR)
    wave = wave[heard[0] : heard[-1] + 1]
    fade = min(len(wave), 2 * MS)
    wave[len(wave) - fade :] *= np.linspace(1, 0, fade, dtype=np.float32)
    return np.pad(wave, (0, -len(wave) % MS))


def join(waves, gaps) -> np.ndarray:
    """Waves with silence before, between and after them, gaps in seconds: one more than waves."""
    silence = [np.zeros(round(gap * 1000) * MS, np.float32) for gap in gaps]
    return np.concatenate([part for pair in zip(silence, waves) for part in pair] + silence[-1:])


GAP = 90, 350  # milliseconds between two of the same


def repeat_event(dice, label, n, room) -> tuple[np.ndarray, list]:
    """The event as often as chance and `room` samples allow, and where each begins and ends; once
    in any case, within n."""
    seconds, layers = draw_event(dice, label)
    times = 1 + dice.rng.integers(EVENTS[label].most)
    waves = [make_event(dice, min(seconds, n / RATE), layers) for _ in range(times)]
    while len(waves) > 1 and sum(map(len, waves)) + (len(waves) - 1) * GAP[0] * MS > room:
        waves.pop()
    spare = (room - sum(map(len, waves))) // MS // max(1, len(waves) - 1)
    gap = int(dice.rng.integers(GAP[0], 1 + max(GAP[0], min(GAP[1], spare)))) / 1000
    waves = [wave * np.float32(dice.rng.uniform(0.7, 1)) for wave in waves]
    starts = np.cumsum([0, *(len(wave) + round(gap * RATE) for wave in waves[:-1])])
    spans = [(start, start + len(wave)) for start, wave in zip(starts, waves)]
    return join(waves, [0, *[gap] * (len(waves) - 1), 0]), spans


def scene(dice, labels, n) -> tuple[np.ndarray, list]:
    """Events on silence: (n,) and [[label, on, off]] in seconds, by onset. They follow each other
    where there is room, and now and then (or where there is none) sound together."""
    together = len(labels) > 1 and dice.rng.random() < 0.3
    room = n if together else n // len(labels)
    groups = [repeat_event(dice, label, n, room) for label in labels]
    free = n - sum(len(wave) for wave, _ in groups)
    if together or free < 0:
        starts = [int(dice.rng.integers((n - len(wave)) // MS + 1)) * MS for wave, _ in groups]
    else:
        gaps = np.sort(dice.rng.integers(0, free // MS + 1, len(groups))) * MS
        starts = gaps + np.cumsum([0, *(len(wave) for wave, _ in groups[:-1])])
    out = np.zeros(n, np.float32)
    events = []
    for label, (wave, spans), start in zip(labels, groups, starts):
        out[start : start + len(wave)] += wave * np.float32(dice.between(0.4, 1))
        events += [[label, (start + on) / RATE, (start + off) / RATE] for on, off in spans]
    return out, sorted(([e[0], float(e[1]), float(e[2])] for e in events), key=lambda e: e[1])


# ------------------------------------------------------------------------------------------------
# Captions: what is in the events, as a sentence and as a list.

NUMBERS = "zero one two three four five six seven eight nine ten".split()
TIMES = ("", "", " twice", *(f" {number} times" for number in NUMBERS[3:]))


def describe(events) -> list[str]:
    """["a dog barks twice, then rain falls", "two dog barks and rain"]"""
    counts = Counter(label for label, _, _ in events)  # in order of their first onset
    story, ended = "", 0
    for label, times in counts.items():
        spans = [event[1:] for event in events if event[0] == label]
        joint = "" if not story else " while " if spans[0][0] < ended else ", then "
        story += joint + EVENTS[label].phrase + TIMES[times]
        ended = max(ended, spans[-1][1])
    listed = [f"{NUMBERS[n]} {label}s" if n > 1 else label for label, n in counts.items()]
    return [story, " and ".join(listed)]


# ------------------------------------------------------------------------------------------------
# Music: a melody on the notes of a triad and a chord at each bar, one note a beat. The melody lies
# from C5 up, where a frame of 25 ms can tell a minor third from a major one.

KEYS = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
TRIADS = {"major": (0, 4, 7, 12, 16), "minor": (0, 3, 7, 12, 15)}  # semitones above the key
DYNAMICS = {"steady": (1, 1), "rising": (0.25, 1), "falling": (1, 0.25)}
INSTRUMENTS = {
    "piano": dict(partials=((1, 1, 3), (2, 0.5, 4), (3, 0.3, 5), (4, 0.15, 6)), attack=0.003),
    "organ": dict(partials=((1, 1, 0), (2, 0.7, 0), (4, 0.6, 0), (8, 0.3, 0)), attack=0.02),
    "flute": dict(partials=((1, 1, 0), (2, 0.08, 0)), wobble=0.006, speed=5.5, breath=0.05,
                  attack=0.06, release=0.05),
    "violin": dict(partials=[(k, k**-0.7, 0) for k in range(1, 11)], wobble=0.008, speed=6,
                   attack=0.07, release=0.04),
    "guitar": dict(partials=[(k, k**-0.5, 4 + 2 * k) for k in range(1, 10)], attack=0.001),
    "trumpet": dict(partials=((1, 0.5, 0), (2, 0.9, 0), (3, 1, 0), (4, 0.9, 0), (5, 0.7, 0),
                              (6, 0.5, 0), (7, 0.3, 0)), attack=0.03, shape=[0.7, 1, 0.9, 0.9]),
}  # fmt: skip


def play(dice, n, tempo, key, mode, instrument, dynamics) -> np.ndarray:
    """n samples of music, peak 1. `key` counts semitones above C; it may lie between two."""
    beat = 60 / tempo * RATE
    triad = TRIADS[mode]
    order = [0, 1, 2, 1] if dice.rng.random() < 0.5 else [0, 2, 1, 3]
    wave = np.zeros(n, np.float32)
    for i in range(int(np.ceil(n / beat))):
        start = int(i * beat)
        long = min(int(beat * 0.95), n - start)
        if long < 30 * MS:
            break
        step = order[i % 4] if i < 4 else int(dice.rng.integers(5))
        notes = [(12 + triad[step], 1.0)]
        if i % 4 == 0:
            notes += [(semitones, 0.4) for semitones in triad[:3]]
        for semitones, level in notes:
            pitch = 261.63 * 2 ** ((key + semitones) / 12)
            note_wave = tone(dice, long, pitch, **INSTRUMENTS[instrument])
            wave[start : start + long] += np.float32(level) * note_wave
    wave *= curve(DYNAMICS[dynamics], n)
    return wave / np.abs(wave).max()


# ------------------------------------------------------------------------------------------------
# The voice, first what it says. Words are looked up; any other is spelled by rules, tried in order
# at each letter. Phones are ARPABET's, without stress.

LEXICON = {
    "one": "W AH N", "two": "T UW", "three": "TH R IY", "four": "F AO R", "five": "F AY V",
    "six": "S IH K S", "seven": "S EH V AH N", "eight": "EY T", "nine": "N AY N", "ten": "T EH N",
    "zero": "Z IH R OW", "red": "R EH D", "blue": "B L UW", "green": "G R IY N",
    "yellow": "Y EH L OW", "black": "B L AE K", "white": "W AY T", "pink": "P IH NG K",
    "brown": "B R AW N", "dog": "D AO G", "cat": "K AE T", "bird": "B ER D", "cow": "K AW",
    "horse": "HH AO R S", "snake": "S N EY K", "pig": "P IH G", "lion": "L AY AH N",
    "duck": "D AH K", "monkey": "M AH NG K IY", "park": "P AA R K", "school": "S K UW L",
    "house": "HH AW S", "beach": "B IY CH", "market": "M AA R K IH T",
    "station": "S T EY SH AH N", "garden": "G AA R D AH N", "kitchen": "K IH CH AH N",
    "mother": "M AH DH ER", "father": "F AA DH ER", "doctor": "D AA K T ER",
    "teacher": "T IY CH ER", "sister": "S IH S T ER", "brother": "B R AH DH ER",
    "farmer": "F AA R M ER", "driver": "D R AY V ER", "morning": "M AO R N IH NG",
    "noon": "N UW N", "evening": "IY V N IH NG", "night": "N AY T", "first": "F ER S T",
    "second": "S EH K AH N D", "third": "TH ER D", "fourth": "F AO R TH", "fifth": "F IH F TH",
    "car": "K AA R", "book": "B UH K", "ring": "R IH NG", "key": "K IY", "ball": "B AO L",
    "cup": "K AH P", "door": "D AO R", "coat": "K OW T", "lamp": "L AE M P", "hat": "HH AE T",
    "sunny": "S AH N IY", "rainy": "R EY N IY", "snowy": "S N OW IY", "cloudy": "K L AW D IY",
    "happy": "HH AE P IY", "tired": "T AY ER D", "hungry": "HH AH NG G R IY", "busy": "B IH Z IY",
    "the": "DH AH", "a": "AH", "at": "AE T", "i": "AY", "see": "S IY", "it": "IH T", "is": "IH Z",
    "in": "IH N", "on": "AA N", "and": "AE N D", "with": "W IH TH", "of": "AH V", "to": "T UW",
    "has": "HH AE Z", "wants": "W AA N T S", "was": "W AA Z", "where": "W EH R", "who": "HH UW",
    "what": "W AH T", "yes": "Y EH S", "no": "N OW", "you": "Y UW", "we": "W IY", "not": "N AA T",
    "my": "M AY", "take": "T EY K", "now": "N AW", "there": "DH EH R", "are": "AA R",
    "said": "S EH D", "have": "HH AE V", "do": "D UW", "come": "K AH M", "people": "P IY P AH L",
}  # fmt: skip
SHORT_WORDS = set("the a at i it is in on and with of to".split())  # said in passing
SPELLING = [(re.compile(letters), phones.split()) for letters, phones in (
    (r"([b-df-hj-np-tv-z])(?=\1)", ""), ("tion", "SH AH N"), ("sion", "ZH AH N"),
    ("ture$", "CH ER"), ("ough", "AO"), ("augh", "AO"), ("eigh", "EY"), ("igh", "AY"),
    ("tch", "CH"), ("sch", "S K"), ("dge", "JH"), ("ch", "CH"), ("sh", "SH"), ("th", "TH"),
    ("ph", "F"), ("wh", "W"), ("ck", "K"), ("gh", "G"), ("ng", "NG"), ("n(?=[kx])", "NG"),
    ("qu", "K W"), ("^kn", "N"), ("^wr", "R"), ("mb$", "M"),
    ("are$", "EH R"), ("air", "EH R"), ("ear", "IH R"), ("ore", "AO R"), ("oor", "AO R"),
    ("ar", "AA R"), ("or", "AO R"), ("[eiu]r", "ER"),
    ("e[ea]", "IY"), ("oo", "UW"), ("ou", "AW"), ("ow$", "OW"), ("ow", "AW"), ("o[iy]", "OY"),
    ("a[iy]", "EY"), ("a[uw]", "AO"), ("oa", "OW"), ("oe$", "OW"), ("ie$", "AY"), ("ie", "IY"),
    ("u[ei]", "UW"), ("ew", "UW"), ("e[iy]", "EY"), ("le$", "AH L"), ("(?<=[td])ed$", "IH D"),
    ("(?<=..)ed$", "D"), ("(?<=[sxz])es$", "IH Z"),
    ("a(?=[^aeiouwxy](e[sd]?|ing)$)", "EY"), ("i(?=[^aeiouwxy](e[sd]?|ing)$)", "AY"),
    ("o(?=[^aeiouwxy](e[sd]?|ing)$)", "OW"), ("u(?=[^aeiouwxy](e[sd]?|ing)$)", "UW"),
    ("(?<=[a-z][^aeiou])es$", "Z"), ("(?<=..)e$", ""),
    ("(?<=^[^aeiou])y$", "AY"), ("(?<=^[^aeiou]{2})y$", "AY"), ("^y", "Y"), ("y", "IY"),
    ("(?<=^[^aeiou])[eo]$", "OW"), ("c(?=[eiy])", "S"), ("g(?=[eiy])", "JH"), ("x", "K S"),
    ("(?<=[aeiou])s(?=[aeiou])", "Z"), ("o$", "OW"), ("a", "AE"), ("e", "EH"), ("i", "IH"),
    ("o", "AA"), ("u", "AH"), ("b", "B"), ("[ckq]", "K"), ("d", "D"), ("f", "F"), ("g", "G"),
    ("h", "HH"), ("j", "JH"), ("l", "L"), ("m", "M"), ("n", "N"), ("p", "P"), ("r", "R"),
    ("s", "S"), ("t", "T"), ("v", "V"), ("w", "W"), ("z", "Z"),
)]  # fmt: skip


@lru_cache(maxsize=4096)
def pronounce(word) -> list[str]:
    """The phones of one word in small letters."""
    if word in LEXICON:
        return LEXICON[word].split()
    if word.endswith("s") and word[:-1] in LEXICON:
        stem = LEXICON[word[:-1]].split()
        hiss = stem[-1] in ("S", "Z", "SH", "CH", "JH")
        dull = stem[-1] in ("P", "T", "K", "F", "TH")
        return stem + (["IH", "Z"] if hiss else ["S"] if dull else ["Z"])
    phones, place = [], 0
    while place < len(word):
        tried = ((rule.match(word, place), said) for rule, said in SPELLING)
        match, said = next((found for found in tried if found[0]), (None, []))
        phones += said
        place = match.end() if match else place + 1
    return phones or ["AH"]


def spoken_words(text) -> list[str]:
    """Words in small letters; digits one by one, by their names."""
    text = re.sub(r"\d", lambda digit: f" {NUMBERS[int(digit.group())]} ", text.lower())
    words = re.findall(r"[a-z]+", text.replace("'", ""))
    expect(words, "speech: text", "words in Latin letters", f"{text!r:.60}")
    return words


# How each phone is made: seconds, how loud the throat and the noise are, the noise's centre and
# width in Hz (0: noise through the mouth as it stands), and three formants, at its start and, for a
# diphthong, at its end. HH takes the formants of what follows. A stop is closed for 50 ms first.
PHONES = {
    "IY": (0.115, 1, 0, 0, 0, (270, 2290, 3010)), "IH": (0.095, 1, 0, 0, 0, (390, 1990, 2550)),
    "EH": (0.105, 1, 0, 0, 0, (530, 1840, 2480)), "AE": (0.125, 1, 0, 0, 0, (680, 1720, 2410)),
    "AH": (0.095, 1, 0, 0, 0, (620, 1190, 2390)), "AA": (0.125, 1, 0, 0, 0, (760, 1150, 2440)),
    "AO": (0.125, 1, 0, 0, 0, (570, 840, 2410)), "UH": (0.095, 1, 0, 0, 0, (440, 1020, 2240)),
    "UW": (0.115, 1, 0, 0, 0, (300, 870, 2240)), "ER": (0.125, 1, 0, 0, 0, (490, 1350, 1690)),
    "EY": (0.15, 1, 0, 0, 0, (480, 2000, 2550), (330, 2250, 2900)),
    "AY": (0.17, 1, 0, 0, 0, (730, 1150, 2440), (390, 1990, 2600)),
    "OW": (0.15, 1, 0, 0, 0, (520, 950, 2400), (350, 800, 2300)),
    "AW": (0.17, 1, 0, 0, 0, (730, 1200, 2440), (440, 950, 2250)),
    "OY": (0.17, 1, 0, 0, 0, (570, 840, 2410), (390, 1990, 2600)),
    "W": (0.06, 0.6, 0, 0, 0, (300, 610, 2200)), "Y": (0.06, 0.6, 0, 0, 0, (260, 2200, 3000)),
    "R": (0.065, 0.6, 0, 0, 0, (320, 1060, 1400)), "L": (0.065, 0.6, 0, 0, 0, (360, 1100, 2700)),
    "M": (0.07, 0.4, 0, 0, 0, (250, 950, 2200)), "N": (0.07, 0.4, 0, 0, 0, (260, 1550, 2500)),
    "NG": (0.07, 0.4, 0, 0, 0, (260, 2100, 2700)), "HH": (0.06, 0, 0.3, 0, 0, None),
    "S": (0.1, 0, 0.5, 6200, 900, (320, 1700, 2600)),
    "SH": (0.1, 0, 0.5, 3300, 800, (300, 1900, 2500)),
    "F": (0.09, 0, 0.12, 4500, 3000, (320, 1000, 2300)),
    "TH": (0.08, 0, 0.09, 5500, 2200, (320, 1400, 2600)),
    "Z": (0.07, 0.3, 0.3, 6200, 900, (320, 1700, 2600)),
    "ZH": (0.07, 0.3, 0.3, 3300, 800, (300, 1900, 2500)),
    "V": (0.06, 0.35, 0.07, 4500, 3000, (320, 1000, 2300)),
    "DH": (0.05, 0.35, 0.05, 5500, 2200, (320, 1400, 2600)),
    "P": (0.035, 0, 0.4, 900, 700, (300, 800, 2200)),
    "T": (0.035, 0, 0.5, 4200, 1200, (320, 1750, 2650)),
    "K": (0.04, 0, 0.5, 2100, 500, (300, 2000, 2300)),
    "CH": (0.08, 0, 0.5, 3300, 900, (300, 1900, 2500)),
    "B": (0.015, 0.3, 0.3, 700, 600, (300, 800, 2200)),
    "D": (0.015, 0.3, 0.35, 3800, 1200, (320, 1750, 2650)),
    "G": (0.02, 0.3, 0.35, 1900, 500, (300, 2000, 2300)),
    "JH": (0.05, 0.3, 0.35, 3300, 900, (300, 1900, 2500)),
}  # fmt: skip
# How loud the throat is while a stop is closed.
STOPS = {"P": 0, "T": 0, "K": 0, "CH": 0, "B": 0.08, "D": 0.08, "G": 0.08, "JH": 0.08}
EMOTIONS = {  # factors: pitch, its swing, speed, breath; and how bright the voice is
    "neutral": (1.0, 1.0, 1.0, 1.0, 1.0),
    "happy": (1.08, 2.4, 1.08, 1.0, 1.25),
    "sad": (0.95, 0.35, 0.85, 2.0, 0.7),
    "angry": (1.04, 1.5, 1.12, 0.6, 1.7),
}

Voice = namedtuple("Voice", "f0 tract rate breath tilt second third")


def make_voices() -> dict:
    """{name: Voice}, 80 for train, 16 for dev, 16 for test. Each trait goes round its range by
    steps of an irrational number, so that voices spread evenly and no two meet; a longer throat
    tends to be a deeper one."""
    voices = {}
    for k, split in enumerate(("train",) * 80 + ("dev",) * 16 + ("test",) * 16):
        around = [k * step % 1 for step in (0.6180, 0.7549, 0.5698, 0.8567, 0.4142, 0.7321, 0.2361)]
        voices[f"{split}-{k:03d}"] = Voice(
            f0=85 * (260 / 85) ** around[0],  # Hz
            tract=18.5 - 3 * around[0] - 2.2 * around[1],  # cm
            rate=0.88 + 0.3 * around[2],
            breath=0.02 + 0.3 * around[3],
            tilt=0.7 + 0.8 * around[4],
            second=0.94 + 0.12 * around[5],
            third=0.93 + 0.14 * around[6],
        )
    return voices


VOICES = make_voices()

# Then how it sounds. The throat's pulses and a hiss are cut into frames of 25 ms, each frame's
# spectrum is multiplied by the mouth's, and the frames are added up again.

FRAME, STEP, SPECTRUM = 400, 100, 512  # samples: a frame, from frame to frame, its transform
WIDTHS = (80, 110, 160, 250)  # of the formants, Hz


def speak(text, voice: Voice, seed, emotion="neutral") -> tuple[np.ndarray, list, list]:
    """-> the wave (peak 1), [[word, on, off]] and [[phone, on, off]] in seconds. The same text,
    voice, seed and emotion give the same samples."""
    rng = np.random.default_rng(seed)
    segments = lay_out(text, voice, rng, emotion)
    seconds = np.array([segment.seconds for segment in segments])
    ends = np.cumsum(seconds)
    wave = utter(segments, ends, voice, rng, emotion)
    words, phones = [], []
    for segment, on, off in zip(segments, ends - seconds, ends):
        if segment.phone is None:
            continue
        for spans, key, name in (
            (phones, (segment.word, segment.place), segment.phone),
            (words, segment.word, spoken_words(text)[segment.word]),
        ):
            if spans and spans[-1][3] == key:  # a stop's closure and burst are one phone
                spans[-1][2] = float(off)
            else:
                spans.append([name, float(on), float(off), key])
    return wave, [span[:3] for span in words], [span[:3] for span in phones]


Segment = namedtuple("Segment", "seconds throat noise centre width first last phone word place")


def lay_out(text, voice, rng, emotion) -> list[Segment]:
    """Phones one after the other, with how long each lasts."""
    segments, words = [], spoken_words(text)
    pace = voice.rate * EMOTIONS[emotion][2]
    for w, word in enumerate(words):
        phones = pronounce(word)
        for place, phone in enumerate(phones):
            seconds, throat, noise, centre, width, first, *last = PHONES[phone]
            stretch = rng.uniform(0.9, 1.15) / pace
            if word in SHORT_WORDS:
                stretch *= 0.8
            elif place == len(phones) - 1:
                stretch *= 1.15
            mouth = (first, last[0] if last else first)
            if phone in STOPS and segments:  # before the first word nothing is heard to close
                closed = (0.05 * stretch, STOPS[phone], 0, 0, 0, *mouth, phone, w, place)
                segments.append(Segment(*closed))
            segments.append(
                Segment(seconds * stretch, throat, noise, centre, width, *mouth, phone, w, place)
            )
        if w < len(words) - 1 and word not in SHORT_WORDS:
            pause = rng.uniform(0.01, 0.06) / pace
            segments.append(Segment(pause, 0, 0, 0, 0, None, None, None, w, -1))
    return segments


def utter(segments, ends, voice, rng, emotion) -> np.ndarray:
    n = int(ends[-1] * RATE)
    frames = n // STEP + 1
    when = np.arange(frames) * STEP / RATE
    at = np.minimum(np.searchsorted(ends, when, side="right"), len(segments) - 1)
    seconds = np.array([segment.seconds for segment in segments])
    along = np.clip((when - ends[at] + seconds[at]) / seconds[at], 0, 1)[:, None]
    first, last = mouths(segments)
    formants = smooth(first[at] + (last[at] - first[at]) * along, 11)  # (frames, 3)
    columns = np.array([segment[1:5] for segment in segments], np.float32).T[:, at]
    throat, hiss, centre, width = columns
    pulses = pad_frames(glottis(n, voice, rng, emotion))  # (frames, FRAME)
    noise = pad_frames(rng.standard_normal(n, np.float32))
    return overlap_add(
        mouth_spectra(pulses, noise, formants, smooth(throat, 5), smooth(hiss, 3), centre, width,
                      voice, emotion), n,
    )  # fmt: skip


def mouths(segments) -> tuple[np.ndarray, np.ndarray]:
    """Formants at the start and end of each segment: (segments, 3) each. What has none (HH, a
    pause) takes those of the next that has, or of the one before."""
    first, last = ([getattr(s, end) for s in segments] for end in ("first", "last"))
    following = (500, 1500, 2500)
    for i in reversed(range(len(segments))):
        following = first[i] or following
        first[i], last[i] = following, last[i] or following
    return np.array(first, float), np.array(last, float)


def smooth(values, width) -> np.ndarray:
    """A moving average under a Hann window, along time: (frames,) or (frames, n)."""
    window = np.hanning(width + 2)[1:-1].astype(np.float32)
    window /= window.sum()
    edge = [(width // 2, width // 2)] + [(0, 0)] * (values.ndim - 1)
    padded = np.pad(values, edge, mode="edge")
    return sum(w * padded[i : i + len(values)] for i, w in enumerate(window))


def glottis(n, voice, rng, emotion) -> np.ndarray:
    """The throat's pulses: their pitch falls along the sentence and swings, each a little off."""
    pitch, swing, _, _, _ = EMOTIONS[emotion]
    t = np.arange(n) / RATE
    fall = 1 + 0.07 * swing * (1 - 2 * t / t[-1])
    waves = 1 + 0.05 * swing * np.sin(TAU * rng.uniform(1.2, 2.2) * t + TAU * rng.random())
    base = voice.f0 * pitch * rng.uniform(0.98, 1.02)
    cycles = np.cumsum(base * fall * waves) / RATE
    number = np.floor(cycles)
    starts = np.flatnonzero(np.diff(number) > 0) + 1
    late = (cycles[starts] - number[starts]) / (cycles[starts] - cycles[starts - 1])
    strength = np.sqrt(100 / base) * (1 + 0.06 * rng.standard_normal(len(starts)))
    out = np.zeros(n, np.float32)
    out[starts] = strength * (1 - late)  # a pulse falls between two samples; so both get a part
    out[starts - 1] += (strength * late).astype(np.float32)
    return out


def pad_frames(source) -> np.ndarray:
    """(n,) -> (frames, FRAME): frame i is centred on sample i * STEP."""
    frames = len(source) // STEP + 1
    padded = np.zeros((frames - 1) * STEP + FRAME, np.float32)
    padded[FRAME // 2 : FRAME // 2 + len(source)] = source
    windows = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::STEP]
    return windows * np.hanning(FRAME + 1)[:-1].astype(np.float32)


def mouth_spectra(pulses, noise, formants, throat, hiss, centre, width, voice, emotion):
    """(frames, FRAME) twice -> (frames, SPECTRUM // 2 + 1) complex."""
    _, _, _, breath, bright = EMOTIONS[emotion]
    f = np.fft.rfftfreq(SPECTRUM, 1 / RATE).astype(np.float32)[None]
    scale = 16.5 / voice.tract
    fourth = np.full(len(formants), 3500.0)
    places = np.column_stack([formants * [1, voice.second, voice.third], fourth]) * scale
    damped = np.ones(1, np.complex64)
    for place, bandwidth in zip(places.T.astype(np.float32)[:, :, None], WIDTHS):
        # a resonance: 1 at 0 Hz; its width is its damping
        damped = damped * (1 - (f / place) ** 2 + np.complex64(1j * bandwidth) * (f / place**2))
    mouth = 1 / damped
    lips = (f > 50) / (1 + (f / (250 * bright / voice.tilt)) ** 1.1)
    voiced = np.fft.rfft(pulses, SPECTRUM) * (lips * (4 * throat)[:, None])
    hissing = np.float32(0.06 * breath * voice.breath) * np.sqrt(lips) * throat[:, None]
    hissing[width == 0] += 0.075 * hiss[width == 0, None]
    noise = np.fft.rfft(noise, SPECTRUM)
    spectra = mouth * (voiced + noise * hissing)
    teeth = np.flatnonzero(width)  # frames whose noise is made there, and not shaped by the mouth
    away = (f - centre[teeth, None] * scale) / width[teeth, None]
    made = np.exp(-0.5 * away**2) * (0.3 * hiss[teeth, None])
    spectra[teeth] += noise[teeth] * made
    return spectra


def overlap_add(spectra, n) -> np.ndarray:
    frames = np.fft.irfft(spectra, SPECTRUM).astype(np.float32)  # (frames, SPECTRUM)
    count = -(-SPECTRUM // STEP)
    pieces = np.pad(frames, ((0, 0), (0, count * STEP - SPECTRUM))).reshape(-1, count, STEP)
    out = np.zeros((len(frames) + count, STEP), np.float32)
    for i in range(count):
        out[i : i + len(frames)] += pieces[:, i]
    wave = out.reshape(-1)[FRAME // 2 : FRAME // 2 + n]
    return wave / np.abs(wave).max() * loudness(n, 0.004, 0.008)


# ------------------------------------------------------------------------------------------------
# Other voices: espeak-ng where it is installed, or a server that speaks OpenAI's /v1/audio/speech.
# Neither says what its phones are or when. Each text is rendered once for a voice and kept.

ESPEAK = {"train": "m1 m2 m4 m5 m7 f1 f2 f4", "dev": "m3 f3", "test": "m6 f5"}  # variants
PITCHES = range(20, 84, 8)  # of each variant, on espeak's scale of 0..99
TEN = {  # the names that the paper's scripts use, and what a server may call them (--voices)
    "train": "alloy ash ballad coral echo fable",
    "dev": "nova onyx",
    "test": "sage shimmer",
}
MAGIC = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2")

Engine = namedtuple("Engine", "kind url model voices cache", defaults=("", "", {}, "data/speech"))
FORMANT = Engine("formant")


def speakers(engine, split) -> list[str]:
    if engine.kind == "formant":
        return [name for name in VOICES if name.startswith(split)]
    if engine.kind == "espeak":
        return [f"{variant}-{pitch}" for variant in ESPEAK[split].split() for pitch in PITCHES]
    return TEN[split].split()


def say(dice, engine, text, speaker, emotion) -> tuple[np.ndarray, dict]:
    """The sentence, peak 1 and without silence around it, and what is known of it."""
    known = {"transcript": text, "speaker": speaker}
    if engine.kind != "formant":
        return kept_speech(engine, text, speaker), known
    voice = VOICES[speaker]
    wave, words, phones = speak(text, voice, int(dice.rng.integers(1 << 31)), emotion)
    traits = {name: round(getattr(voice, name), 3) for name in ("f0", "tract", "rate", "breath")}
    return wave, {**known, "emotion": emotion, "words": words, "phones": phones, "voice": traits}


def speech_url(engine) -> str:
    return engine.url.rstrip("/").removesuffix("/v1") + "/v1/audio/speech" if engine.url else ""


def kept_speech(engine, text, speaker) -> np.ndarray:
    asked = engine.voices.get(speaker, speaker)
    settings = json.dumps([engine.kind, speech_url(engine), engine.model, asked, text])
    path = Path(engine.cache) / f"{hashlib.sha256(settings.encode()).hexdigest()}.flac"
    if not path.exists():
        render = espeak if engine.kind == "espeak" else ask_server
        wave = check_speech(render(engine, text, asked), text, f"{engine.kind} {asked}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, wave, f".{os.getpid()}.part")  # two workers may be at it
    return load_audio(path)  # what was kept, so that the first time is like every other


def espeak(engine, text, speaker) -> bytes:
    variant, pitch = speaker.split("-")
    command = ["espeak-ng", "-v", f"en-us+{variant}", "-p", pitch, "--stdin", "--stdout"]
    try:
        run = subprocess.run(command, input=text.encode(), capture_output=True, timeout=60)
    except FileNotFoundError:
        raise BadInput("--voice espeak: espeak-ng is not installed here") from None
    except subprocess.TimeoutExpired:
        raise BadInput(f"espeak-ng: no end after 60 s at {text!r:.60}") from None
    expect(run.returncode == 0, "espeak-ng", "exit code 0", f"{run.returncode} {run.stderr!r:.80}")
    return run.stdout


def ask_server(engine, text, speaker) -> bytes:
    body = {"model": engine.model, "input": text, "voice": speaker, "response_format": "wav"}
    return request(
        "POST", speech_url(engine), body=body, token=os.environ.get("TTS_API_KEY") or None
    )


def check_speech(reply, text, where) -> np.ndarray:
    """A reply's samples, if they can be this text: a service is not believed unheard."""
    expect(reply.startswith(MAGIC), where, "sound", f"{reply[:40]!r}")
    longest = 2 + len(text.split())  # seconds
    with open_audio(io.BytesIO(reply)) as (_, file):  # its length first: hours pack into little
        seconds = file.frames / file.samplerate
    expect(
        0.1 <= seconds <= longest, where, f"0.1 to {longest} s for {text!r:.40}", f"{seconds:.2f} s"
    )
    wave = load_audio(io.BytesIO(reply))
    peak = np.abs(wave).max()
    expect(peak > 0.01, where, "speech", f"silence (peak {peak:.4f})")
    heard = np.flatnonzero(np.abs(wave) > FLOOR * peak)
    return wave[heard[0] : heard[-1] + 1] / peak


# ------------------------------------------------------------------------------------------------
# Mixing, and what recordings suffer. A degradation takes the wave and a strength in its own unit,
# and gives a wave of the same length.


def mix(wave, noise, snr) -> np.ndarray:
    """Add noise, `snr` dB below the wave: mean power over the whole clip against mean power."""
    power = np.mean(np.square(wave, dtype=np.float64)) / np.mean(np.square(noise, dtype=np.float64))
    return wave + noise * np.float32(np.sqrt(power / 10 ** (snr / 10)))


def add_noise(wave, snr, dice):
    slope = dice.between(0, 1.6)  # from white to almost brown
    return mix(wave, shaped_noise(dice, len(wave), lambda f: (1 + f / 100) ** -slope), snr)


def clip_peaks(wave, share, dice):
    limit = np.float32(share * np.abs(wave).max())
    return np.clip(wave, -limit, limit)


def reverberate(wave, seconds, dice):
    t = np.arange(int(0.7 * seconds * RATE), dtype=np.float32) / RATE
    room = 0.12 * dice.noise(len(t)) * np.exp(np.float32(-6.9 / seconds) * t)
    room[0] = 1
    size = fast_size(len(wave) + len(room))
    spectrum = np.fft.rfft(wave, size) * np.fft.rfft(room, size)
    return np.fft.irfft(spectrum, size)[: len(wave)].astype(np.float32)


def add_echo(wave, seconds, dice):
    out, late = wave.copy(), int(seconds * RATE)
    for times in (1, 2, 3):
        out[times * late :] += np.float32(0.6**times) * wave[: max(0, len(wave) - times * late)]
    return out


def limit_band(wave, cutoff, dice):
    return filtered(wave, lambda f: 1 / (1 + (f / np.float32(cutoff)) ** 10))


def drop_out(wave, share, dice):
    """Stretches of 40 ms are lost, of those in which there was something to lose."""
    out, long = wave.copy(), 40 * MS
    pieces = out[: len(out) // long * long].reshape(-1, long)
    heard = np.flatnonzero(np.abs(pieces).max(1) > FLOOR * np.abs(wave).max())
    pieces[dice.rng.permutation(heard)[: round(share * len(heard))]] = 0
    return out


def quantise(wave, bits, dice):
    levels = np.float32(2 ** (bits - 1) / np.abs(wave).max())
    return np.round(wave * levels) / levels


DEGRADATIONS = {  # label: how, the range of its strength, and what that is counted in
    "noise": (add_noise, (0, 15), "dB"),  # of SNR
    "clipping": (clip_peaks, (0.04, 0.2), "of peak"),
    "reverb": (reverberate, (0.5, 1.5), "s"),  # until it is 60 dB down
    "echo": (add_echo, (0.13, 0.28), "s"),
    "band limit": (limit_band, (700, 1500), "Hz"),
    "dropouts": (drop_out, (0.2, 0.4), "share"),  # of the time in which there is sound
    "quantisation": (quantise, (2, 3.5), "bits"),
}


def degrade(dice, wave, label) -> tuple[np.ndarray, dict]:
    how, limits, unit = DEGRADATIONS[label]
    strength = round(dice.between(*limits), 3)
    return how(wave, strength, dice), {"label": label, "strength": strength, "unit": unit}


CLEAN = {"label": "clean"}

# ------------------------------------------------------------------------------------------------
# Scripts. A sentence belongs to one split by its own checksum, so that what is said in a test clip
# was never said in training. {animal2} is another animal than {animal}.

WORDS = {
    "number": "two three four five six seven eight nine ten",
    "colour": "red blue green yellow black white pink brown",
    "animal": "dog cat bird cow horse snake pig lion duck monkey",
    "place": "park school house beach market station garden kitchen",
    "person": "mother father doctor teacher sister brother farmer driver",
    "object": "car book ring key ball cup door lamp hat coat",
    "weather": "sunny rainy snowy cloudy",
    "mood": "happy tired hungry busy",
}
ANYTHING = " ".join(WORDS[kind] for kind in ("colour", "animal", "place", "person", "object"))
SENTENCES = (
    "the {animal} is {colour}", "the {animal} is at the {place}", "the {person} is at the {place}",
    "the {person} is {number}", "i see {number} {object}s", "the {person} wants the {object}",
    "it is {weather} at the {place}", "the {person} is {mood}", "the {person} has a {animal}",
    "{word} {word2} {word3}", "{word} {word2} {word3} {word4}", "{word} and {word2} and {word3}",
)  # fmt: skip
DIALOGUES = (
    ("where is the {colour} {object}", "the {object} is at the {place}",
     "is the {person} at the {place}", "yes with a {colour2} {animal}"),
    ("who wants {number} {object}s", "the {person} wants {number} {object}s",
     "is the {person} at the {place}", "no the {person} is at the {place2}"),
    ("what has the {person} at the {place}", "the {person} has a {colour} {animal}",
     "has the {animal} a {object}", "no the {animal} has {number} {object}s"),
    ("is it {weather} at the {place}", "no it is {weather2} at the {place}",
     "and where is the {colour} {animal}", "at the {place2} with the {person}"),
)  # fmt: skip
ORDERS = (  # told one after the other: by the time of day, by number, by count
    ("in the morning i see {number} {animal}s", "at noon the {person} is at the {place}",
     "in the evening i see {number2} {object}s", "at night the {animal} is at the {place2}"),
    ("first take the {colour} {object}", "second take the {colour2} {object2}",
     "third take the {colour3} {object3}", "fourth take the {colour4} {object4}",
     "fifth take the {colour5} {object5}"),
    ("one {animal} at the {place}", "two {animal2}s at the {place2}",
     "three {animal3}s at the {place3}", "four {animal4}s at the {place4}"),
)  # fmt: skip
PROCESSES = (  # what happens one after the other
    ("wind", "thunder", "rain"), ("footstep", "door knock", "door slam"),
    ("car horn", "glass break", "siren"), ("saw", "hammer blow", "applause"),
)  # fmt: skip


def split_of(sentence) -> str:
    return ("train", "train", "train", "dev", "test")[zlib.crc32(sentence.encode()) % 5]


def write_script(dice, forms) -> list[str]:
    """The forms with words in their places, each a sentence of the dice's split. What is chosen in
    one line holds in the next."""
    while True:
        chosen, lines = {}, []
        for form in forms:
            for _ in range(40):
                line, more = fill(form, chosen, dice)
                if split_of(line) == dice.split:
                    break
            else:
                break  # what was chosen before leaves no such line: begin again
            lines.append(line)
            chosen = more
        if len(lines) == len(forms):
            return lines


def fill(form, chosen, dice) -> tuple[str, dict]:
    chosen = dict(chosen)
    for name in re.findall(r"{(\w+)}", form):
        if name not in chosen:
            kind = name.rstrip("2345")
            options = (WORDS.get(kind) or ANYTHING).split()
            chosen[name] = dice.pick([word for word in options if word not in chosen.values()])
    return form.format(**chosen), chosen


# ------------------------------------------------------------------------------------------------
# Clips. Each kind gives the samples and the fields that are known of them.


def sound_clip(dice, labels=None) -> tuple[np.ndarray, dict]:
    """One to four kinds of events, on silence or in noise."""
    n = MS * int(dice.rng.integers(1000, 3001))
    most = min(4, n // (600 * MS))
    labels = labels or dice.rng.permutation(list(EVENTS))[: 1 + dice.rng.integers(most)].tolist()
    wave, events = scene(dice, labels, n)
    quality = CLEAN
    if dice.rng.random() < 0.6:
        snr = round(dice.between(0, 20), 2)
        wave = add_noise(wave, snr, dice)
        quality = {"label": "noise", "strength": snr, "unit": "dB"}
    captions = describe(events)
    labels = list(dict.fromkeys(label for label, _, _ in events))
    return at_level(dice, wave), {
        "labels": labels, "events": events, "captions": captions, "quality": quality
    }  # fmt: skip


def at_level(dice, wave) -> np.ndarray:
    """Recorded softly or loudly, never clipped by that."""
    return wave * np.float32(dice.between(0.15, 0.9) / np.abs(wave).max())


def music_clip(dice) -> tuple[np.ndarray, dict]:
    n = MS * int(dice.rng.integers(2000, 3001))
    tempo, energy = round(dice.between(66, 190), 1), round(dice.between(0, 1), 3)
    key, mode = int(dice.rng.integers(12)), dice.pick(("major", "minor"))
    instrument, dynamics = dice.pick(list(INSTRUMENTS)), dice.pick(list(DYNAMICS))
    mistuned = dice.between(-0.15, 0.15)
    wave = play(dice, n, tempo, key + mistuned, mode, instrument, dynamics)
    speed = "slow " if tempo < 100 else "fast " if tempo > 140 else ""
    louder = {"steady": "", "rising": ", growing louder", "falling": ", growing softer"}
    music = {"tempo": tempo, "key": KEYS[key], "mode": mode, "instrument": instrument,
             "energy": energy, "dynamics": dynamics}  # fmt: skip
    caption = f"{speed}{instrument} music in {KEYS[key]} {mode}{louder[dynamics]}"
    return wave * np.float32(0.06 + 0.84 * energy), {
        "labels": ["music", instrument], "captions": [caption], "music": music, "quality": CLEAN
    }  # fmt: skip


def speech_clip(dice, engine, text=None, speaker=None) -> tuple[np.ndarray, dict]:
    text = text or write_script(dice, [dice.pick(SENTENCES)])[0]
    speaker = speaker or dice.pick(speakers(engine, dice.split))
    emotion = dice.pick(("neutral", "neutral", "neutral", "happy", "sad", "angry"))
    wave, known = say(dice, engine, text, speaker, emotion)
    before, after = dice.rng.integers(50, 300, 2) / 1000
    after = max(after, 1.0 - before - len(wave) / RATE)
    on, off = float(before), float(round(before + len(wave) / RATE + 5e-4, 3))
    for field in {"words", "phones"} & known.keys():
        moved = ([name, round(a + on, 3), round(b + on, 3)] for name, a, b in known[field])
        known[field] = list(moved)
    spans = {"labels": ["speech"], "events": [["speech", on, off]], "quality": CLEAN}
    return at_level(dice, join([wave], [before, after])), {**known, **spans}


def degraded_clip(dice, engine) -> tuple[np.ndarray, dict]:
    wave, known = speech_clip(dice, engine)
    wave, quality = degrade(dice, wave, dice.pick(list(DEGRADATIONS)))
    return at_level(dice, wave), {**known, "quality": quality}


def background_clip(dice, engine) -> tuple[np.ndarray, dict]:
    """Somebody speaks while something else goes on."""
    wave, known = speech_clip(dice, engine)
    label, snr = dice.pick(list(EVENTS)), round(dice.between(0, 20), 2)
    behind, events = scene(dice, [label], len(wave) // MS * MS)
    behind = np.pad(behind, (0, len(wave) - len(behind)))
    return at_level(dice, mix(wave, behind, snr)), {
        **known,
        "labels": ["speech", label],
        "events": sorted(known["events"] + events, key=lambda event: event[1]),
        "quality": {"label": "background", "strength": snr, "unit": "dB"},
    }


def dialogue_clip(dice, engine, group, name, turn) -> tuple[np.ndarray, dict]:
    """One turn of a dialogue between two voices."""
    lines = write_script(group, group.pick(DIALOGUES))
    pair = group.rng.permutation(speakers(engine, group.split))[:2].tolist()
    wave, known = speech_clip(dice, engine, lines[turn], pair[turn % 2])
    place = {"id": name, "turn": turn + 1, "speaker": "AB"[turn % 2]}
    return wave, {**known, "dialogue": place}


def order_clip(dice, engine, group, name, index) -> tuple[np.ndarray, dict]:
    """One step of a story told by one voice, or of what happens in sound; a clip by itself where
    the story is over before its places in the world are."""
    if group.rng.random() < 0.3:
        steps = group.pick(PROCESSES)
        told = index < len(steps)
        wave, known = sound_clip(dice, [steps[index]] if told else None)
    else:
        steps = write_script(group, group.pick(ORDERS))
        told = index < len(steps)
        voice = group.pick(speakers(engine, group.split)) if told else None
        wave, known = speech_clip(dice, engine, steps[index] if told else None, voice)
    place = {"order": {"group": name, "index": index + 1}} if told else {}
    return wave, {**known, **place}


# ------------------------------------------------------------------------------------------------
# The world. Clips come in blocks of one cycle; a block belongs to one split and holds one dialogue
# and one story. Files are written in shards of ten blocks, each with its rows beside it until all
# are there; so a killed run loses the shards that were under way.

CYCLE = ("sound",) * 8 + ("music",) * 4 + ("speech",) * 4 + ("degraded",) * 3
CYCLE += ("background",) * 2 + ("dialogue",) * 4 + ("order",) * 5
BLOCK_SPLITS = ("train", "dev", "test", *("train",) * 4, "test", *("train",) * 2)
SHARD = len(CYCLE) * len(BLOCK_SPLITS)


def clip_path(i) -> str:
    return f"clips/{i // SHARD:04d}/{i:07d}.flac"


def make_clip(seed, i, engine=FORMANT) -> tuple[np.ndarray, dict]:
    """Clip i of the world: its samples and its row. Depends on (seed, i) alone."""
    block, place = divmod(i, len(CYCLE))
    kind, split = CYCLE[place], BLOCK_SPLITS[block % len(BLOCK_SPLITS)]
    dice, group = Dice(split, seed, 0, i), Dice(split, seed, 1, block)
    corpus = "world" if engine.kind == "formant" else f"world-{engine.kind}"
    name, rank = f"{corpus}-{seed}-{block}-{kind}", place - CYCLE.index(kind)
    if kind == "sound":
        wave, known = sound_clip(dice)
    elif kind == "music":
        wave, known = music_clip(dice)
    elif kind == "speech":
        wave, known = speech_clip(dice, engine)
    elif kind == "degraded":
        wave, known = degraded_clip(dice, engine)
    elif kind == "background":
        wave, known = background_clip(dice, engine)
    else:
        make = dialogue_clip if kind == "dialogue" else order_clip
        wave, known = make(dice, engine, group, name, rank)
    served = engine.kind == "server" and "transcript" in known
    row = {
        "id": f"{corpus}-{seed}-{i:07d}",
        "path": clip_path(i),
        "corpus": corpus,
        "split": split,
        "duration": round(len(wave) / RATE, 4),
        "licence": "as the speech server's voices" if served else "CC0-1.0",
    }
    return wave, {**row, **known}


def write_clip(path, wave, ending=".part"):
    part, flac = Path(f"{path}{ending}"), io.BytesIO()
    soundfile.write(flac, wave, RATE, format="FLAC", subtype="PCM_16")
    part.write_bytes(flac.getbuffer())
    part.replace(path)


def rows_file(out, shard) -> Path:
    return Path(out) / f"rows-{shard:04d}.jsonl"


def shard_clips(shard, count) -> range:
    return range(shard * SHARD, min(count, (shard + 1) * SHARD))


def write_rows(out, shard, rows):
    with written(rows_file(out, shard)) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_shard(out, count, seed, engine, shard) -> list[str]:
    """Its clips, then its rows; what a speech service did not deliver is left out and told of."""
    rows, missing = [], []
    for i in shard_clips(shard, count):
        try:
            wave, row = make_clip(seed, i, engine)
        except Refused as refused:
            if refused.status in (0, 401, 403, 404):  # no later clip would fare better
                raise
            missing.append(str(refused))
            continue
        except BadInput as mistake:
            missing.append(str(mistake))
            continue
        path = Path(out) / row["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, wave)
        rows.append(row)
    write_rows(out, shard, rows)
    return missing


def own_rows(path):
    """(index, row) of a file that this program wrote: a damaged or foreign row is refused."""
    for number, row in read_values(path, stop):
        name = row.get("id") if isinstance(row, dict) else None
        named = re.fullmatch(r"world-.+-(\d{7})", name if isinstance(name, str) else "", re.ASCII)
        fine = named and row.get("path") == clip_path(int(named[1]))
        fine = fine and row.get("split") in SPLITS and type(row.get("duration")) is float
        expect(fine, f"{path}: row {number}", "a clip of this world", f"{row!r:.60}")
        yield int(named[1]), row


def is_written(out, count, shard) -> bool:
    """A row for each clip, and each row's clip; an empty file is none."""
    path = rows_file(out, shard)
    if not path.exists():
        return False
    files = [Path(out) / row["path"] for _, row in own_rows(path)]
    whole = len(files) == len(shard_clips(shard, count))
    return whole and all(file.exists() and file.stat().st_size > 0 for file in files)


def unpack_rows(out):
    """The rows of a corpus, by shard again, so that what it lacks can be found and made."""
    if not (out / "corpus.jsonl").exists():
        return
    for shard, rows in groupby(own_rows(out / "corpus.jsonl"), lambda pair: pair[0] // SHARD):
        if not rows_file(out, shard).exists():  # else it is newer
            write_rows(out, shard, (row for _, row in rows))


def open_world(out, settings):
    """Only the same command may go on with a folder."""
    out.mkdir(parents=True, exist_ok=True)
    ours = "an empty folder or a world that this program made"
    if not (out / "world.json").exists():
        held = sorted(os.listdir(out))
        expect(not held, out, ours, ", ".join(held[:3]))
        write_json(out / "world.json", settings)
    found = read_json(out / "world.json")
    fine = isinstance(found, dict) and found.keys() == settings.keys()
    expect(fine, out, ours, f"a world.json of {found!r:.60}")
    for name, asked in settings.items():
        if found[name] != asked:
            both = f"made with --{name} {found[name]}, asked for --{name} {asked}"
            raise BadInput(f"{out}: {both}")


def make_world(out, count, seed, engine=FORMANT, workers=1) -> list[str]:
    """Write the world, or what is missing of it; returns what a speech service did not deliver."""
    out = Path(out)
    voices = {"voice": engine.kind, "model": engine.model, "voices": engine.voices}
    open_world(out, {"clips": count, "seed": seed, **voices})
    unpack_rows(out)
    shards = range(-(-count // SHARD))
    todo = [shard for shard in shards if not is_written(out, count, shard)]
    ready = count - sum(len(shard_clips(shard, count)) for shard in todo)
    show = progress("world", count, ready, unit="clips", scale=1)
    job, missing = partial(write_shard, out, count, seed, engine), []
    with worker_map(workers) as spread:
        for shard, lost in zip(todo, spread(job, todo)):
            missing += lost
            show(len(shard_clips(shard, count)))
    with written(out / "corpus.jsonl") as corpus:
        for shard in shards:
            corpus.write(rows_file(out, shard).read_text(encoding="utf-8"))
    for shard in shards:
        rows_file(out, shard).unlink()
    return missing


# ------------------------------------------------------------------------------------------------
# Six clips to try things on: two by one speaker, one of them noisy; two who disagree; three others.


def tell(dice, speaker, text) -> np.ndarray:
    return join([say(dice, FORMANT, text, speaker, "neutral")[0]], [0.1, 0.2])


ANNA, BEN = "test-100", "test-104"
DEMO = {
    "dog": lambda dice: scene(dice, ["dog bark"], 2 * RATE)[0],
    "storm": lambda dice: scene(dice, ["thunder", "rain"], 5 * RATE // 2)[0],
    "piano": lambda dice: play(dice, 5 * RATE // 2, 120, 0, "minor", "piano", "rising"),
    "anna": lambda dice: tell(dice, ANNA, "the dog is at the park"),
    "anna_noisy": lambda dice: add_noise(tell(dice, ANNA, "it is rainy at the school"), 4, dice),
    "ben": lambda dice: tell(dice, BEN, "the dog is at the beach"),
}


def run_clips(args):
    args.out.mkdir(parents=True, exist_ok=True)
    for i, (name, make) in enumerate(DEMO.items()):
        wave = make(Dice("test", args.seed, i))
        write_clip(args.out / f"{name}.flac", wave * np.float32(0.5 / np.abs(wave).max()))


def summary(path) -> str:
    splits, seconds = Counter(), 0
    for _, row in own_rows(path):
        splits[row["split"]] += 1
        seconds += row["duration"]
    parts = ", ".join(f"{splits[split]} {split}" for split in SPLITS)
    return f"{path}: {splits.total()} clips, {seconds / 3600:.2f} hours ({parts})"


def run_world(args):
    expect(1 <= args.clips <= 9_999_999, "--clips", "1 to 9999999", args.clips)
    expect(args.workers >= 1, "--workers", "1 or more", args.workers)
    expect(args.tts or not args.voices, "--voices", "--tts beside it", "none")
    engine = Engine(args.voice, cache=args.cache)
    if args.tts is not None:
        expect(args.voice == "formant", f"--voice {args.voice}", "no --tts beside it", args.tts)
        fine = re.match(r"https?://[^/]", args.tts)
        expect(fine, "--tts", "a URL that begins with http:// or https://", repr(args.tts))
        voices = read_json(args.voices) if args.voices else {}
        fine = isinstance(voices, dict) and all(type(name) is str for name in voices.values())
        expect(fine, args.voices, "an object of names", f"{voices!r:.60}")
        engine = Engine("server", args.tts, args.model, voices, args.cache)
    elif args.voice == "espeak":
        expect(shutil.which("espeak-ng"), "--voice espeak", "espeak-ng on this machine", "none")
    try:
        missing = make_world(args.out, args.clips, args.seed, engine, args.workers)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise
    for reason in dict.fromkeys(missing):
        warn(reason)
    told = f"; {len(missing)} left out, the same command tries them again" if missing else ""
    print(clean(summary(args.out / "corpus.jsonl") + told))


def add_world(commands):
    parser = commands.add_parser("world", help="render the toy world: corpus.jsonl and its clips")
    parser.add_argument(
        "--out", type=Path, default=Path("data/world"), metavar="DIR", help="default: data/world"
    )
    parser.add_argument("--clips", type=int, default=9000, metavar="N", help="default: 9000")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another one, other clips")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="W", help="default: one per core"
    )
    parser.add_argument(
        "--voice", choices=("formant", "espeak"), default="formant",
        help="who speaks: the synthesiser in here (default), or espeak-ng",
    )  # fmt: skip
    parser.add_argument(
        "--tts", metavar="URL", help="a server with /v1/audio/speech speaks instead"
    )
    parser.add_argument("--model", default="tts-1", metavar="NAME", help="the server's model")
    parser.add_argument(
        "--voices", metavar="FILE", help=f"JSON, the server's names for {' '.join(TEN.values())}"
    )
    parser.add_argument(
        "--cache", default="data/speech", metavar="DIR",
        help="where espeak-ng's or the server's sentences are kept, default: data/speech",
    )  # fmt: skip
    parser.set_defaults(run=run_world)


def add_clips(commands):
    parser = commands.add_parser("clips", help="render six short clips to try things on")
    parser.add_argument(
        "--out", type=Path, default=Path("clips"), metavar="DIR", help="default: clips"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.set_defaults(run=run_clips)


def main():
    parser = Parser(description="Make sounds, music and voices, and all that is known of them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_world(commands)
    add_clips(commands)
    args = parser.parse_args()
    expect(args.seed >= 0, "--seed", "0 or more", args.seed)
    args.run(args)


if __name__ == "__main__":
    cli(main)
