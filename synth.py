"""Make what does not exist: sounds of which all is known, and questions that take several of them.

    python synth.py                                                  a world and questions: data/toy
    python synth.py --corpus clotho.jsonl libri.jsonl --out data/mine    questions on other clips
    python synth.py --llm http://localhost:8000 --model gpt-oss-120b     written by a language model
    python synth.py --recipe mallm                                   or jasco, or compa
    torchrun --nproc-per-node 8 synth.py --train 1300000             eight parts, joined at the end
    python synth.py show data/toy/bench.jsonl 17                     one item
    python synth.py world --out data/world --clips 9000 --seed 0     corpus.jsonl and its clips
    python synth.py world --out data/espeak --clips 900 --voice espeak
    python synth.py world --out data/served --clips 900 --tts http://localhost:8091 --model NAME
    python synth.py clips --out clips                                six short clips to try it on

The first half makes sounds. Nothing is recorded and nothing is downloaded: a sound is a row of
numbers that a few generators read, so its times, counts, keys and voices are known exactly.
  1. chance: a split owns slices of every range, so no number that between() draws for a test clip
     was drawn in training;
  2. three generators (tone, rush, patter) and a table of events; music is notes of the first;
  3. a voice: phones to formants to sound, frame by frame;
  4. mixing, and what recordings suffer, each with its label, strength and unit;
  5. the world: clip i depends on (seed, i) and on nothing else.
The second half makes questions, on these clips or on any others that a corpus.jsonl describes.
  6. how things are put: every way of asking belongs to one split;
  7. the shelf: the clips of a split, and an index of who has what;
  8. the tasks: one function for each kind of question, from rows to a question with one answer;
  9. recipes of other papers, whose clips are made for the item;
  10. items: item i depends on (seed, i); its answer says what is heard, then the verdict, and is
     scored like any other before it is written;
  11. a language model as the writer, whose every word is checked;
  12. files: chunks, workers, shards, and going on after a kill.
"""

import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from array import array
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from threading import Lock, get_ident

import numpy as np
import soundfile

from prepare import (
    HOPELESS, ONES, RATE, URL, BadInput, Journal, NoReply, Parser, Service, chance,
    clean, cli, conversation, cores, expect, fits, hold, join_shards, leave_at_once, load_audio,
    load_clip, open_audio, plain, progress, read_corpus, read_json, read_lines, read_rows,
    read_values, request, score, shard_file, stop, tag_clips, warn, which_shard,
    without_thoughts, word_errors, words, worker_map, write_json, written,
)  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Chance. Every range is cut into eight teeth, and every tooth into three slices, one for each
# split, with gaps between. A number of sound (a pitch, a decay, a tempo, an SNR) drawn for one
# split is therefore never drawn for another, while each split still covers the whole range. Free
# are when something happens, what comes together, and by how little one bark differs from the next.

SPLITS = ("train", "dev", "test")
TEETH = 8
SLICES = {"train": (0.0, 0.6), "dev": (0.65, 0.78), "test": (0.82, 0.97)}


class Miss(Exception):
    """This attempt at an item, a question on some clips, came to nothing; another one may not."""


def need(holds):
    if not holds:
        raise Miss


class Dice:
    """All the chance of one clip or item: a split's slices and one stream of random numbers."""

    def __init__(self, split, *seed):
        self.split = split
        self.rng = np.random.default_rng(seed)

    def between(self, low, high) -> float:
        """A number of sound, from the split's own slices of low..high."""
        place = self.rng.integers(TEETH) + self.rng.uniform(*SLICES[self.split])
        return float(low + (high - low) * place / TEETH)

    def pick(self, options):
        need(options)
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
    return convolved(hits, hit * np.exp(np.float32(-ring) * t)) * loudness(n, **rest)


def humps(f, bands):
    return sum(level * np.exp(-0.5 * ((f - centre) / width) ** 2) for centre, width, level in bands)


def shaped_noise(dice, n, gain) -> np.ndarray:
    """Noise of n samples whose spectrum is gain(frequency in Hz)."""
    return filtered(dice.noise(n), gain)


def filtered(wave, gain) -> np.ndarray:
    size = fast_size(len(wave))
    frequency = np.fft.rfftfreq(size, 1 / RATE).astype(np.float32)
    return np.fft.irfft(np.fft.rfft(wave, size) * gain(frequency), size)[: len(wave)].astype("f4")


def convolved(wave, echo) -> np.ndarray:
    size = fast_size(len(wave) + len(echo))
    spectrum = np.fft.rfft(wave, size) * np.fft.rfft(echo, size)
    return np.fft.irfft(spectrum, size)[: len(wave)].astype(np.float32)


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
    """The event as often as chance and `room` allow, or once within n, and where each one lies."""
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

DIGIT_WORDS = ONES[:11]
TIMES = ("", "", " twice", *(f" {number} times" for number in DIGIT_WORDS[3:]))


def describe(events) -> list[str]:
    """["a dog barks twice, then rain falls", "two dog barks and rain"]"""
    counts = Counter(label for label, _, _ in events)  # in order of their first onset
    story, ended = "", 0
    for label, times in counts.items():
        spans = [event[1:] for event in events if event[0] == label]
        joint = "" if not story else " while " if spans[0][0] < ended else ", then "
        story += joint + EVENTS[label].phrase + TIMES[times]
        ended = max(ended, spans[-1][1])
    listed = [f"{DIGIT_WORDS[n]} {label}s" if n > 1 else label for label, n in counts.items()]
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
    text = re.sub(r"\d", lambda digit: f" {DIGIT_WORDS[int(digit.group())]} ", text.lower())
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
    steps of an irrational number, so that voices spread evenly and no two meet; longer throats
    tend to be deeper."""
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
    timed = [each for each in zip(segments, ends - seconds, ends) if each[0].phone]

    def spans(key):  # a stop's closure and burst are one phone
        runs = (list(run) for _, run in groupby(timed, lambda each: key(each[0])))
        return [(run[0][0], float(run[0][1]), float(run[-1][2])) for run in runs]

    said = spoken_words(text)
    words = [[said[first.word], on, off] for first, on, off in spans(lambda s: s.word)]
    phones = [[s.phone, on, off] for s, on, off in spans(lambda s: (s.word, s.place))]
    return wave, words, phones


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
            rest = (first, last[0] if last else first, phone, w, place)
            if phone in STOPS and segments:  # before the first word nothing is heard to close
                segments.append(Segment(0.05 * stretch, STOPS[phone], 0, 0, 0, *rest))
            segments.append(Segment(seconds * stretch, throat, noise, centre, width, *rest))
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
    throat, hiss = smooth(throat, 5), smooth(hiss, 3)
    pulses = pad_frames(glottis(n, voice, rng, emotion))  # (frames, FRAME)
    noise = pad_frames(rng.standard_normal(n, np.float32))
    spectra = mouth_spectra(pulses, noise, formants, throat, hiss, centre, width, voice, emotion)
    return overlap_add(spectra, n)


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
        write_clip(path, wave, f".{os.getpid()}-{get_ident()}.part")  # two may be at it
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
    key = os.environ.get("TTS_API_KEY") or None
    return request("POST", speech_url(engine), body=body, token=key)


def check_speech(reply, text, where) -> np.ndarray:
    """A reply's samples, if they can be this text: a service is not believed unheard."""
    expect(reply.startswith(MAGIC), where, "sound", f"{reply[:40]!r}")
    longest = 2 + len(text.split())  # seconds
    with open_audio(io.BytesIO(reply)) as (_, file):  # its length first: hours pack into little
        seconds = file.frames / file.samplerate
    wanted = f"0.1 to {longest} s for {text!r:.40}"
    expect(0.1 <= seconds <= longest, where, wanted, f"{seconds:.2f} s")
    wave = load_audio(io.BytesIO(reply))
    peak = np.abs(wave).max()
    expect(peak > 0.01, where, "speech", f"silence (peak {peak:.4f})")
    heard = np.flatnonzero(np.abs(wave) > FLOOR * peak)
    return wave[heard[0] : heard[-1] + 1] / peak


# ------------------------------------------------------------------------------------------------
# Mixing, and what recordings suffer. A degradation takes the wave and a strength in its own unit,
# and gives a wave of the same length.


def mix(wave, noise, snr) -> np.ndarray:
    """Add noise, `snr` dB below the wave: mean power over the whole clip against mean power. Both
    begin at once, and the shorter one is followed by silence."""
    n = max(len(wave), len(noise))
    wave, noise = (np.pad(part, (0, n - len(part))) for part in (wave, noise))
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
    return convolved(wave, room)


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
RELATIONS = {  # what a sentence states: (relation, the slot of whom, the slot of what)
    "the {animal} is {colour}": ("colour", "animal", "colour"),
    "the {animal} is at the {place}": ("place", "animal", "place"),
    "the {person} is at the {place}": ("place", "person", "place"),
    "the {person} is {number}": ("age", "person", "number"),
    "i see {number} {object}s": ("number", "object", "number"),
    "the {person} wants the {object}": ("wish", "person", "object"),
    "it is {weather} at the {place}": ("weather", "place", "weather"),
    "the {person} is {mood}": ("mood", "person", "mood"),
    "the {person} has a {animal}": ("pet", "person", "animal"),
}
WORDS_ALONE = "{word} {word2} {word3}", "{word} {word2} {word3} {word4}"
SENTENCES = (*RELATIONS, *WORDS_ALONE, "{word} and {word2} and {word3}")
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
    """Sentences of the split, by their forms. What is chosen in one line holds in the next."""
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
    labels = list(dict.fromkeys(label for label, _, _ in events))
    known = {"labels": labels, "events": events, "captions": describe(events), "quality": quality}
    return at_level(dice, wave), known


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
    captions = [f"{speed}{instrument} music in {KEYS[key]} {mode}{louder[dynamics]}"]
    known = {"labels": ["music", instrument], "captions": captions, "music": music}
    return wave * np.float32(0.06 + 0.84 * energy), {**known, "quality": CLEAN}


def speech_clip(dice, engine, text=None, speaker=None) -> tuple[np.ndarray, dict]:
    text = text or write_script(dice, [dice.pick(SENTENCES)])[0]
    speaker = speaker or dice.pick(speakers(engine, dice.split))
    emotion = dice.pick(("neutral", "neutral", "neutral", "happy", "sad", "angry"))
    wave, known = say(dice, engine, text, speaker, emotion)
    before, after = dice.rng.integers(50, 300, 2) / 1000
    after = max(after, 1.0 - before - len(wave) / RATE)
    on, off = float(before), float(round(before + len(wave) / RATE + 5e-4, 3))
    for field in {"words", "phones"} & known.keys():
        known[field] = [[name, round(a + on, 3), round(b + on, 3)] for name, a, b in known[field]]
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
    return wave, {**known, "dialogue": {"id": name, "turn": turn + 1, "speaker": "AB"[turn % 2]}}


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
    part = group, f"{corpus}-{seed}-{block}-{kind}", place - CYCLE.index(kind)
    make, *needs = {
        "sound": (sound_clip,), "music": (music_clip,), "speech": (speech_clip, engine),
        "degraded": (degraded_clip, engine), "background": (background_clip, engine),
        "dialogue": (dialogue_clip, engine, *part), "order": (order_clip, engine, *part),
    }[kind]  # fmt: skip
    wave, known = make(dice, *needs)
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
    part.parent.mkdir(parents=True, exist_ok=True)
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
        except BadInput as mistake:
            if getattr(mistake, "status", None) in HOPELESS:  # no later clip would fare better
                raise
            missing.append(str(mistake))
            continue
        write_clip(Path(out) / row["path"], wave)
        rows.append(row)
    write_rows(out, shard, rows)
    return missing


def own_rows(path):
    """(index, row) of a file that this program wrote: a damaged or foreign row is refused."""
    for number, row in read_values(path, stop):
        fine = fits(row, {"id": str, "split": set(SPLITS), "duration": float})
        named = fine and re.fullmatch(r"world-.+-(\d{7})", row["id"], re.ASCII)
        fine = named and row.get("path") == clip_path(int(named[1]))
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


def world_settings(count, seed, engine) -> dict:
    voices = {"voice": engine.kind, "model": engine.model, "voices": engine.voices}
    return {"clips": count, "seed": seed, **voices}


def make_world(out, count, seed, engine=FORMANT, workers=1) -> list[str]:
    """Write the world, or what is missing of it; returns what a speech service did not deliver."""
    out = Path(out)
    open_world(out, world_settings(count, seed, engine))
    unpack_rows(out)
    shards = range(-(-count // SHARD))
    left = [shard for shard in shards if not is_written(out, count, shard)]
    ready = count - sum(len(shard_clips(shard, count)) for shard in left)
    show = progress("world", count, ready, unit="clips", scale=1)
    job, missing = partial(write_shard, out, count, seed, engine), []
    with worker_map(workers) as spread:
        for shard, lost in zip(left, spread(job, left)):
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
    for i, (name, make) in enumerate(DEMO.items()):
        wave = make(Dice("test", args.seed, i))
        write_clip(args.out / f"{name}.flac", wave * np.float32(0.5 / np.abs(wave).max()))


def engine_of(args, model) -> Engine:
    """Whoever speaks, by the flags of add_voices()."""
    expect(args.tts or not args.voices, "--voices", "--tts beside it", "none")
    if args.tts is None:
        here = args.voice != "espeak" or shutil.which("espeak-ng")
        expect(here, "--voice espeak", "espeak-ng on this machine", "none")
        return Engine(args.voice, cache=args.cache)
    expect(args.voice == "formant", f"--voice {args.voice}", "no --tts beside it", args.tts)
    fine = re.match(URL, args.tts)
    expect(fine, "--tts", "a URL that begins with http:// or https://", repr(args.tts))
    voices = read_json(args.voices) if args.voices else {}
    fine = isinstance(voices, dict) and all(type(name) is str for name in voices.values())
    expect(fine, args.voices, "an object of names", f"{voices!r:.60}")
    return Engine("server", args.tts, model, voices, args.cache)


def run_world(args):
    expect(1 <= args.clips <= 9_999_999, "--clips", "1 to 9999999", args.clips)
    expect(args.workers >= 1, "--workers", "1 or more", args.workers)
    engine, path = engine_of(args, args.model), args.out / "corpus.jsonl"
    try:
        missing = make_world(args.out, args.clips, args.seed, engine, args.workers)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise
    for reason in dict.fromkeys(missing):
        warn(reason)
    splits, seconds = Counter(), 0
    for _, row in own_rows(path):
        splits[row["split"]] += 1
        seconds += row["duration"]
    parts = ", ".join(f"{splits[split]} {split}" for split in SPLITS)
    told = f"; {len(missing)} left out, the same command tries them again" if missing else ""
    print(clean(f"{path}: {splits.total()} clips, {seconds / 3600:.2f} hours ({parts}){told}"))


# ------------------------------------------------------------------------------------------------
# Questions. From here on the sounds exist, in a corpus.jsonl that was made above or by prepare.py,
# and a question on several of them is made of what their rows say. First, how things are put: every
# way of asking is spelled out from brackets, [this|or that], and dealt to one split by its
# checksum, so that a bench asks in sentences that were never trained on, made of words that were.


@lru_cache(maxsize=4096)
def phrasings(form) -> dict:
    """{split: its ways to say a form}: a fifth are the test's, a fifth dev's, and at least one. Of
    one or two, which are parts of a question, each split has all."""
    parts = [part.split("|") for part in re.split(r"[\[\]]", form)]
    whole = ["".join(chosen) for chosen in itertools.product(*parts)]
    whole.sort(key=lambda text: (zlib.crc32(text.encode()), text))
    held = max(1, len(whole) // 5) if len(whole) > 2 else 0
    parts = {"test": whole[:held], "dev": whole[held : 2 * held], "train": whole[2 * held :]}
    return {split: texts or whole for split, texts in parts.items()}


def phrase(dice, form) -> str:
    return dice.pick(phrasings(form)[dice.split])


def kind_of(row) -> str:
    if "transcript" in row or "overall_quality" in row.get("quality", {}):
        return "speech"
    return "music" if "music" in row or row["corpus"] == "musiccaps" else "sound"


def sounds_of(row) -> list[str]:
    """The labels that name what sounds, but for the music, and the speech that is written out."""
    if "music" in row:
        return []
    heard = dict.fromkeys(row.get("labels", ()))
    return [label for label in heard if label.lower() != "speech" or "transcript" not in row]


def akin(a, b) -> bool:
    """Two labels that may mean the same sound ("Rain", "Rain on surface")."""
    return a != b and (a.lower() in b.lower() or b.lower() in a.lower())


def clear_sounds(row) -> list[str]:
    """Those that one can ask for: no other label of the clip may mean them too."""
    found = sounds_of(row)
    return [label for label in found if not any(akin(label, other) for other in found)]


def lone_sound(row):
    found = sounds_of(row)
    return found[0] if kind_of(row) == "sound" and len(found) == 1 else None


def speed_of(row):
    """slow, medium or fast; a tempo near the border has none."""
    tempo = row.get("music", {}).get("tempo", 0)
    limits = {"slow": (1, 95), "medium": (106, 134), "fast": (147, 999)}
    return next((name for name, (low, high) in limits.items() if low < tempo < high), None)


def music_field(name):
    return lambda row: row.get("music", {}).get(name)


# What a clip is one of, so that clips are alike in it or not: (how to find it, noun, plural)
CATEGORIES = {
    "sound": (lone_sound, "sound", "sounds"),
    "instrument": (music_field("instrument"), "instrument", "instruments"),
    "mode": (music_field("mode"), "musical mode", "musical modes"),
    "speed": (speed_of, "musical speed", "musical speeds"),
    "dynamics": (music_field("dynamics"), "musical dynamics", "musical dynamics"),
    "language": (music_field("language"), "language", "languages"),
    "voice": (lambda row: row.get("speaker"), "speaker", "speakers"),
    "emotion": (lambda row: row.get("emotion"), "mood of the voice", "moods of the voice"),
}


def number_word(n) -> str:
    return DIGIT_WORDS[n] if n < len(DIGIT_WORDS) else str(n)


def count_of(row, label):
    """How often a clip holds a label; None where nobody counted."""
    return sum(event[0] == label for event in row["events"]) if "events" in row else None


def all_told(row) -> bool:
    """All that sounds is labelled, which is so where it is also known when."""
    return kind_of(row) == "sound" and "events" in row and sounds_of(row) == clear_sounds(row)


def told_count(count, label) -> str:
    few = {0: f"no {label}", 1: f"{label} once", 2: f"{label} twice"}
    return few.get(count, f"{label} {number_word(count)} times")


def words_said(row):
    count = len(words(row.get("transcript", "")))
    return count if 1 <= count <= 10 else None


def speaking_rate(row):
    """Words a second, of a speech that is long enough to tell."""
    count = len(words(row.get("transcript", "")))
    return count / row["duration"] if count >= 12 else None


def noise_level(row):
    quality = row.get("quality", {}) if "transcript" in row else {}
    return quality.get("strength") if quality.get("label") == "noise" else None


# What clips have more or less of: the value (of a row, or of a row and a label), how far two must
# lie apart (a factor, or a difference), how value, label and row are told, how either end is asked.
Scale = namedtuple("Scale", "value factor apart told most least")
WHICH = "[Which audio|Which clip|Which recording]"
IN = "[In which audio|In which clip|In which recording]"
SCALES = {
    "count": Scale(count_of, 1, 1, lambda value, label, _: told_count(value, label),
                   IN + " [is the {label} heard|do you hear the {label}] most often?",
                   IN + " [is the {label} heard|do you hear the {label}] least often?"),
    "first": Scale(lambda row, label: min((on for name, on, _ in row.get("events", ())
                                           if name == label), default=None),
                   1, 0.3, "{1} at {0:.1f} s".format,
                   IN + " does the first {label} [come|begin] latest?",
                   IN + " does the [first {label}|{label}] [come|begin] earliest?"),
    "sounds": Scale(lambda row: len(sounds_of(row)) if all_told(row) else None, 1, 1,
                    lambda value, _, row: f"{listed(sounds_of(row))}: {number_word(value)}",
                    WHICH + " [has|holds|contains] the most different sounds?",
                    WHICH + " [has|holds|contains] the fewest different sounds?"),
    "tempo": Scale(music_field("tempo"), 1.2, 0, lambda value, *_: f"{5 * round(value / 5)} bpm",
                   WHICH + " has the [fastest music|fastest tempo|quickest music]?",
                   WHICH + " has the [slowest music|slowest tempo]?"),
    "energy": Scale(music_field("energy"), 1, 0.15, "energy {0:.2f}".format,
                    WHICH + " has the [most energetic music|music with the most energy]?",
                    WHICH + " has the [least energetic music|music with the least energy]?"),
    "valence": Scale(music_field("valence"), 1, 0.2, "cheer {0:.2f}".format,
                     WHICH + " [has|holds] the [most cheerful|happiest] music?",
                     WHICH + " [has|holds] the [least cheerful|saddest] music?"),
    "danceability": Scale(music_field("danceability"), 1, 0.2, "dance {0:.2f}".format,
                          WHICH + " [is|sounds] best to dance to?",
                          WHICH + " [is|sounds] worst to dance to?"),
    "pitch": Scale(lambda row: row.get("voice", {}).get("f0"), 1.2, 0,
                   lambda value, *_: f"{5 * round(value / 5)} hz",
                   WHICH + " has the [highest voice|voice with the highest pitch]?",
                   WHICH + " has the [deepest voice|voice with the lowest pitch]?"),
    "words": Scale(words_said, 1, 1, lambda value, *_: f"{DIGIT_WORDS[value]} words",
                   IN + " [are the most words said|do you hear the most words]?",
                   IN + " [are the fewest words said|do you hear the fewest words]?"),
    "rate": Scale(speaking_rate, 1.25, 0, "{0:.1f} words a second".format,
                  IN + " does [somebody|the speaker] [speak|talk] fastest?",
                  IN + " does [somebody|the speaker] [speak|talk] slowest?"),
    "length": Scale(lambda row: row["duration"], 1.15, 0.4, "{0:.1f} s".format,
                    WHICH + " [is the longest|lasts longest]?",
                    WHICH + " [is the shortest|lasts shortest]?"),
    "noise": Scale(noise_level, 1, 4, "voice {0:.0f} db above the noise".format,
                   WHICH + " has the [least noise|weakest noise] behind the [voice|speech]?",
                   WHICH + " has the [most noise|strongest noise] behind the [voice|speech]?"),
    "rating": Scale(lambda row: row.get("quality", {}).get("overall_quality"), 1, 1,
                    "quality {0}".format, WHICH + " has the best [overall|speech] quality?",
                    WHICH + " has the worst [overall|speech] quality?"),
}  # fmt: skip
LABELLED = ("count", "first")  # scales of one label
QUALITY = ("noise", "rating")  # scales that the task of that name asks for


def valued(scale, row, label=None):
    value = scale.value(row, label) if label else scale.value(row)
    return value if type(value) in (int, float) else None


def within(scale, value, end, most) -> bool:
    """It lies clearly below the upper end, or above the lower one."""
    low, high = sorted((value, end))
    far = high - low >= scale.apart - 1e-9 and high >= scale.factor * low
    return far and low < high and (value < end) == most


# What the world's sentences state: (relation, of whom, what). "the dog is red" -> colour, dog, red.

SORTS = {word: sort for sort, those in WORDS.items() for word in those.split()}
SLOT = re.compile(r"{(\w+)}")
FACTS = [
    (re.compile(SLOT.sub(lambda m: f"(?P<{m[1]}>{WORDS[m[1]].replace(' ', '|')})", form)), *names)
    for form, names in RELATIONS.items()
]
TOPICS = {  # what a sentence is about, as one asks for it
    "colour": "[what colour|which colour] the {whom} is", "place": "where the {whom} is",
    "age": "[how old the {whom} is|the age of the {whom}]",
    "number": "[how many {whom}s there are|the number of {whom}s]",
    "wish": "what the {whom} [wants|would like]",
    "weather": "[how the weather is|what the weather is like] at the {whom}",
    "mood": "[how the {whom} is|how the {whom} feels]",
    "pet": "[which animal|what animal] the {whom} has",
}  # fmt: skip
# Two facts with one in common: the animal that is red, and that it is at the park; or where the dog
# is, and that it is sunny there. (first, the clip in common, second): "by" means that whoever is
# looked for is known by the first fact's what, "of" by its whom.
BRIDGES = {
    ("by", "colour", "place"): "the {first} animal is at the {second}",
    ("by", "place", "colour"): "the animal at the {first} is {second}",
    ("by", "age", "place"): "the person who is {first} is at the {second}",
    ("by", "mood", "place"): "the {first} person is at the {second}",
    ("by", "wish", "age"): "the person who wants the {first} is {second}",
    ("by", "wish", "place"): "the person who wants the {first} is at the {second}",
    ("by", "pet", "age"): "the person who has a {first} is {second}",
    ("by", "pet", "place"): "the person who has a {first} is at the {second}",
    ("of", "place", "weather"): "it is {second} where the {first} is",
    ("of", "pet", "colour"): "the animal of the {first} is {second}",
    ("of", "pet", "place"): "the animal of the {first} is at the {second}",
}


@lru_cache(maxsize=1 << 15)
def read_fact(sentence):
    """(relation, whom, what), or None where the sentence states nothing of the kind."""
    for form, relation, whom, what in FACTS:
        if match := form.fullmatch(sentence):
            return relation, match[whom], match[what]
    return None


def fact_of(row):
    return read_fact(row.get("transcript", ""))


STOP = set(
    "a about all am an and are as at be been but by can could did do does for from had has have he "
    "her him his how i if in into is it its me my no not of on one or our out said she so some "
    "than that the their them then there these they this those to up us was we were what when "
    "where which who will with would yes you your".split()
)


@lru_cache(maxsize=1 << 15)
def content(text) -> tuple:
    """The different words of a text that carry its meaning."""
    return tuple(dict.fromkeys(w for w in words(text) if w not in STOP and len(w) > 1))


def said_in(row) -> tuple:
    return content(row.get("transcript", ""))


def quote(row) -> str:
    return f'"{row["transcript"]}"'


# ------------------------------------------------------------------------------------------------
# The shelf: the clips of one split, with an index of who has what. A corpus may have millions of
# rows, so they lie in a file that goes with it, and only their places and the index in memory.

LABEL_CLIPS = 6  # with fewer of a kind, an item would be the same few clips again and again
BEYOND = 3  # clips of a corpus, at least, have more than one that may win a comparison


def identity(row) -> tuple:
    return row["corpus"], row["id"]


class Shelf:
    def __init__(self, out=".", engine=FORMANT, sentences=()):
        self.out, self.engine, self.sentences = Path(out), engine, sentences
        self.file, self.ends = tempfile.TemporaryFile(), array("Q", [0])
        self.index = defaultdict(lambda: array("I"))  # (what, value, ...) -> numbers of rows
        self.groups = defaultdict(list)  # of an order or a dialogue -> [(index, number)]
        # (scale, label or None) -> a few of the least and of the greatest values; from close() on,
        # what so few lie beyond
        self.extremes = defaultdict(lambda: ([], []))
        self.pitches = {}  # speaker -> f0
        self.elsewhere = set()  # scripts that a language model has made up for other splits
        self.values = lru_cache(maxsize=4096)(self.list_values)
        self.row = lru_cache(maxsize=1 << 16)(self.read)

    def __len__(self):
        return len(self.ends) - 1

    def read(self, number) -> dict:
        start, end = self.ends[number], self.ends[number + 1]
        return json.loads(os.pread(self.file.fileno(), end - start, start))

    def add(self, row):
        number, line = len(self), json.dumps(row).encode()
        self.file.write(line)
        self.ends.append(self.ends[-1] + len(line))
        for key in keys_of(row):
            self.index[key].append(number)
        for name, label, value in scaled(row):
            least, greatest = self.extremes[name, label]
            least[:] = sorted([*least, value])[:BEYOND]
            greatest[:] = sorted([*greatest, value])[-BEYOND:]
        if "order" in row:
            self.groups["order", row["order"]["group"]].append((row["order"]["index"], number))
        if "dialogue" in row:
            self.groups["turn", row["dialogue"]["id"]].append((row["dialogue"]["turn"], number))
        if "voice" in row and "speaker" in row:
            self.pitches[row["speaker"]] = row["voice"]["f0"]

    def close(self):
        """All rows are here: sum up what tasks choose from."""
        self.file.flush()
        self.extremes = {  # of a count, a clip may be without it, too
            key: (0 if key[0] == "count" else low[-1], high[0])
            for key, (low, high) in self.extremes.items()
        }
        for group in self.groups.values():
            group.sort()
        sizes = defaultdict(dict)
        for key, numbers in self.index.items():
            sizes[key[:-1]][key[-1]] = len(numbers)
        self.sizes = {key: dict(sorted(values.items())) for key, values in sizes.items()}
        voices = self.values("category", "voice", least=2)
        self.voices = sorted(voices, key=lambda voice: self.pitches.get(voice, 0))

    def list_values(self, *key, least=1) -> tuple:
        """The values of which there are at least so many clips: values("label") -> labels."""
        return tuple(value for value, size in self.sizes.get(key, {}).items() if size >= least)

    def stories(self, kind, least) -> list:
        """Orders or dialogues of so many clips."""
        return [key for key, group in self.groups.items() if key[0] == kind and len(group) >= least]

    def draw(self, dice, key, count=1, fits=lambda row: True, without=()) -> list[dict]:
        """So many different clips of a key's, or Miss."""
        numbers, taken, found = self.index.get(key, ()), set(map(identity, without)), []
        need(len(numbers) >= count)
        for _ in range(20 * count):
            if len(found) == count:
                return found
            row = self.row(numbers[dice.rng.integers(len(numbers))])
            if identity(row) not in taken and fits(row):
                taken.add(identity(row))
                found.append(row)
        need(len(found) == count)
        return found


def keys_of(row):
    """What a clip is found by."""
    kind, said = kind_of(row), said_in(row)
    yield "kind", kind
    long = lasting(row.get("events", ()))
    for label in clear_sounds(row) if kind == "sound" else ():
        yield "label", label
        if "events" in row:
            yield "times", label, count_of(row, label)
        if label in long:
            yield "span", label
    for name, (value, _, _) in CATEGORIES.items():
        if value(row) is not None:
            yield "category", name, value(row)
    for name, label, _ in scaled(row):
        yield "scale", name, label
    if "label" in row.get("quality", {}) and "transcript" in row:
        yield "quality", row["quality"]["label"]
    for word in said:
        yield "word", word
    if said and len(words(row["transcript"])) < 13:
        yield "text", " ".join(words(row["transcript"]))
    for word in lasting(row.get("words", ())):
        if word in said:
            yield "timed", word
    if fact := fact_of(row):
        relation, whom, what = fact
        yield "fact", relation
        yield "whom", relation, whom
        yield "what", relation, what


def scaled(row):
    """(scale, label or None, value) of all scales that a clip is on."""
    for name, scale in SCALES.items():
        labels = [None] if name not in LABELLED else clear_sounds(row)
        for label in labels if None in labels or kind_of(row) == "sound" else ():
            if (value := valued(scale, row, label)) is not None:
                yield name, label, value


def lasting(events, least=0.3) -> list[str]:
    """What occurs once, and for long enough that its times can be told."""
    counts = Counter(name for name, _, _ in events)
    return [name for name, on, off in events if counts[name] == 1 and off - on >= least]


# ------------------------------------------------------------------------------------------------
# The tasks. One function for each kind of question: (shelf, dice, clips, fate) -> Draft. `fate` is
# what was decided for an item before the first attempt at it, as numbers in 0..1: its verdict, its
# kind. It holds until an attempt succeeds; else what is easy to make would be what is right.

Draft = namedtuple("Draft", "form about rows says verdict gold more reason", defaults=({}, None))
# form: key of FORMS or a question; about: what fills it; rows: the clips as they are heard; says:
# what must be heard in each; verdict: the end of the answer; more: of meta, as a count's range;
# reason: a step from what is heard to the verdict, where a language model has written one
YES_NO = ("yes", "no")


def chosen(options, fate):
    need(options)
    return options[int(fate * len(options))]


def shuffled(dice, rows) -> list:
    return [rows[i] for i in dice.rng.permutation(len(rows))]


def audio(i) -> str:
    return f"audio {i}"


def audios(indices) -> str:
    *most, last = (audio(i) for i in sorted(indices))
    return f"{', '.join(most)} and {last}" if most else last


def the_clips(*places) -> tuple[str, dict]:
    """An answer that names clips: how it ends, and its gold. So are the next four."""
    value = places[0] if len(places) == 1 else sorted(places)
    return audios(places), {"type": "clip", "value": value}


def yes_or_no(value, choices=YES_NO) -> tuple[str, dict]:
    told = "not enough information" if value == "nei" else value
    return told, {"type": "yesno", "value": value, "choices": list(choices)}


def how_many(count) -> tuple[str, dict]:
    return number_word(count), {"type": "count", "value": count}


def the_words(values) -> tuple[str, dict]:
    return listed(values), {"type": "keywords", "value": values}


def in_words(text, facts) -> tuple[str, dict]:
    return text, {"type": "text", "value": {"text": text, "slots": facts}}


def place_of(rows, row) -> int:
    return next(i for i, other in enumerate(rows, 1) if identity(other) == identity(row))


# --- comparison & difference


def compare(shelf, dice, n, fate) -> Draft:
    """Which has most of something. Whoever has more than all but a few of the corpus, or of two
    less, would give the answer away alone: neither is asked about."""
    return ranked(shelf, dice, n, fate, [name for name in SCALES if name not in QUALITY])


def ranked(shelf, dice, n, fate, scales):
    usable = [name for name in scales if labels_of(shelf, name, n)]
    scale_name, most = chosen(usable, fate[1]), fate[0] < 0.5
    scale, label = SCALES[scale_name], dice.pick(labels_of(shelf, scale_name, n))
    key, ends = ("scale", scale_name, label), shelf.extremes[scale_name, label]

    def value(row):
        return valued(scale, row, label)

    def first(row):
        return within(scale, value(row), ends[most], most)

    def behind(row):
        fair = n > 2 or within(scale, value(row), ends[not most], not most)
        return fair and within(scale, value(row), best, most)

    winner = shelf.draw(dice, key, 1, first)
    best = value(winner[0])
    rows = shuffled(dice, winner + shelf.draw(dice, key, n - 1, behind, winner))
    says = [scale.told(value(row), label, row) for row in rows]
    form = f"{scale_name}, {'most' if most else 'least'}"
    return Draft(form, {"label": label or ""}, rows, says, *the_clips(place_of(rows, *winner)))


def labels_of(shelf, scale, n) -> list:
    """The labels that a scale can be asked of; [None] where it has none to name. What is counted
    occurs once in some clips, twice in others and more often in others."""
    labels = shelf.values("scale", scale, least=max(LABEL_CLIPS, n))
    return [label for label in labels if scale != "count" or len(shelf.values("times", label)) > 2]


def alike_in_part(shelf, dice, n, fate, most=np.inf) -> tuple:
    """A kind of clip; two of it that share one feature, of `most` or fewer; and n - 2 others."""
    kind = chosen(shelf.values("kind", least=LABEL_CLIPS), fate[1])
    first = shelf.draw(dice, ("kind", kind), 1, lambda row: 2 <= len(features(row)) <= 6)[0]
    shared = dice.pick(list(features(first)))

    def like(row):
        return shared in features(row) and len(features(row)) <= most

    pair = [first, *shelf.draw(dice, ("kind", kind), 1, like, [first])]
    return kind, pair, shelf.draw(dice, ("kind", kind), n - 2, features, pair)


def difference(shelf, dice, n, fate) -> Draft:
    """What two clips that have something in common do not have in common."""
    kind, pair, others = alike_in_part(shelf, dice, n, fate, 6)
    rows = shuffled(dice, pair + others)
    a, b = sorted(place_of(rows, row) for row in pair)
    own = {i: features(rows[i - 1]) for i in (a, b)}
    alone = {i: [f for f in own[i] if f not in own[j]] for i, j in ((a, b), (b, a))}
    verdict = "; ".join(f"{audio(i)}: {listed(alone[i])}" for i in (a, b) if alone[i])
    facts = [own[i][feature] for i in (a, b) for feature in alone[i]]
    names = [named[0] for named in facts]
    need(1 <= len(set(names)) == len(facts) <= 6)  # a word, and a mood of that name, are one slot
    both = [named[0] for i in (a, b) for named in own[i].values()]
    need(kind == "speech" or not any(akin(name, other) for name in names for other in both))
    says = [listed(features(row)) for row in rows]
    about = {"first": audio(a), "second": audio(b)}
    return Draft("difference", about, rows, says, *in_words(verdict, facts))


def odd_one(shelf, dice, n, fate) -> Draft:
    category = chosen(alike(shelf, n - 1), fate[1])
    value, strange = neighbours(shelf, dice, category, n - 1)
    rows = shelf.draw(dice, ("category", category, value), n - 1)
    other = shelf.draw(dice, ("category", category, strange))
    odd = int(dice.rng.integers(n))
    rows[odd:odd] = other
    return about_category("odd", category, rows, the_clips(odd + 1))


def alike(shelf, clips, kinds=1) -> list[str]:
    """Categories of which two values have so many clips each, and so many values two each."""
    return [
        name for name in CATEGORIES
        if len(shelf.values("category", name, least=max(clips, 2))) > 1
        and len(shelf.values("category", name, least=2)) >= kinds
    ]  # fmt: skip


def neighbours(shelf, dice, category, least) -> tuple:
    """Two values, each of at least so many clips (else the rare one would be known for the odd
    one): sounds of the same class, voices of about the same height, if the corpus has such."""
    value, *others = shuffled(dice, shelf.values("category", category, least=least)) or [None]
    need(others)
    close = classmates(value) if category == "sound" else []
    if category == "voice" and value in shelf.pitches:
        place = shelf.voices.index(value)
        close = shelf.voices[max(0, place - 3) : place + 4]
    return value, dice.pick([other for other in others if other in close] or others)


def classmates(thing) -> list[str]:
    """Other sounds of the same class, or other words of the same sort, of those of the world."""
    if thing in EVENTS:
        group = EVENTS[thing].group
        return [label for label, event in EVENTS.items() if event.group == group and label != thing]
    return [word for word in WORDS[SORTS[thing]].split() if word != thing] if thing in SORTS else []


def decoy(shelf, dice, kind, thing) -> tuple:
    """Where to find a clip without this label or word: half of the time with something like it."""
    like = [other for other in classmates(thing) if (kind, other) in shelf.index]
    if like and dice.rng.random() < 0.5:
        return kind, dice.pick(like)
    return "kind", "sound" if kind == "label" else "speech"


def about_category(form, category, rows, answer, **more) -> Draft:
    found, noun, plural = CATEGORIES[category]
    values = {found(row) for row in rows}
    need(category != "sound" or not any(akin(a, b) for a in values for b in values))
    about = {"category": category, "noun": noun, "plural": plural}
    return Draft(form, about, rows, categories_told(category, rows), *answer, more)


def categories_told(category, rows) -> list[str]:
    """What each clip is of a category. Voices have no names: they are A, B, ... as they come."""
    values = [CATEGORIES[category][0](row) for row in rows]
    if category == "voice":
        heard = list(dict.fromkeys(values))
        names = [chr(65 + i) if len(heard) <= 26 else str(i + 1) for i in range(len(heard))]
        values = [f"voice {names[heard.index(speaker)]}" for speaker in values]
    return values


def clearest(shelf, dice, n, fate) -> Draft:
    """One clean recording among degraded ones, or one degraded in the way that is asked for."""
    labels = [label for label in shelf.values("quality", least=3) if label != "background"]
    if fate[0] < 0.4:
        form, wanted = "clearest", "clean"
    else:
        form, wanted = "impaired", dice.pick([label for label in labels if label != "clean"])
    others = [label for label in labels if label != wanted]
    need(others and wanted in labels)
    rows = shelf.draw(dice, ("quality", wanted))
    for _ in range(n - 1):
        rows += shelf.draw(dice, ("quality", dice.pick(others)), without=rows)
    right, rows = rows[0], shuffled(dice, rows)
    says = [row["quality"]["label"] for row in rows]
    return Draft(form, {"label": wanted}, rows, says, *the_clips(place_of(rows, right)))


def quality_most(shelf, dice, n, fate) -> Draft:
    return ranked(shelf, dice, n, fate, QUALITY)


# --- co-reference & linking


def same_speaker(shelf, dice, n, fate) -> Draft:
    """Of two clips, and the rest are there to mislead: now and then they are one of the two."""
    verdict = chosen(YES_NO, fate[0])
    first, *others = close_voices(shelf, dice, 4)
    pair = shelf.draw(dice, ("category", "voice", first), 2)
    if verdict == "no":
        pair[1:] = shelf.draw(dice, ("category", "voice", others[0]))
    rows = list(pair)
    for _ in range(n - 2):
        speaker = dice.pick([*others[1:], first] if verdict == "no" else others)
        rows += shelf.draw(dice, ("category", "voice", speaker), without=rows)
    rows = shuffled(dice, rows)
    a, b = sorted(place_of(rows, row) for row in pair)
    about, says = {"first": audio(a), "second": audio(b)}, categories_told("voice", rows)
    return Draft("same speaker", about, rows, says, *yes_or_no(verdict))


def close_voices(shelf, dice, count, least=2) -> list[str]:
    """Some voice, of which there are at least so many clips, and others that are as near to its
    height as the corpus has them, where it knows. Each has two clips: one that is heard in a single
    clip is never the same."""
    need(len(shelf.voices) >= count)
    first = dice.pick(shelf.values("category", "voice", least=least) or shelf.voices)
    around = shelf.voices
    if first in shelf.pitches:
        place, reach = around.index(first), count + 1
        around = around[max(0, place - reach) : place + reach + 1]
    voices = [first]
    for _ in range(50 * count):
        voice = dice.pick(around)
        if len(voices) < count and voice not in voices:
            voices.append(voice)
    need(len(voices) == count)
    return voices


def speaker_pair(shelf, dice, n, fate) -> Draft:
    need(n > 2)
    return paired(shelf, dice, "voice", close_voices(shelf, dice, n - 1))


def paired(shelf, dice, category, values) -> Draft:
    """Two clips are alike; each other one is like none."""
    pair = shelf.draw(dice, ("category", category, values[0]), 2)
    rest = [shelf.draw(dice, ("category", category, value))[0] for value in values[1:]]
    rows = shuffled(dice, pair + rest)
    return about_category("pair", category, rows, the_clips(*(place_of(rows, r) for r in pair)))


def count_speakers(shelf, dice, n, fate) -> Draft:
    return count_kinds(shelf, dice, n, fate, ["voice"])


def heard_again(shelf, dice, n, fate) -> Draft:
    """Who said this: is the speaker of one sentence heard in another clip?"""
    verdict = chosen(YES_NO, fate[0])
    first, *others = close_voices(shelf, dice, min(n + 1, 4), least=2)
    rows = shelf.draw(dice, ("category", "voice", first), 1 + (verdict == "yes"))
    asked = rows[0]
    while len(rows) < n:
        rows += shelf.draw(dice, ("category", "voice", dice.pick(others)), without=rows)
    need(all("transcript" in row for row in rows))
    said = words(asked["transcript"])
    need(0 < len(said) <= 20 and all(words(row["transcript"]) != said for row in rows[1:]))
    rows = shuffled(dice, rows)
    says = categories_told("voice", rows)
    says[place_of(rows, asked) - 1] += f", {quote(asked)}"
    return Draft("heard again", {"quote": quote(asked)}, rows, says, *yes_or_no(verdict))


def keyword(shelf, dice, n, fate) -> Draft:
    """The one word that all clips share, but for those that carry no meaning; each has others that
    it shares with clips elsewhere."""
    word = dice.pick(shelf.values("word", least=max(LABEL_CLIPS, n)))
    rows = shelf.draw(dice, ("word", word))
    also = [w for w in said_in(rows[0]) if w != word]
    if n > 2 and also:  # one more word in common, but not to all
        more = ("word", dice.pick(also))
        rows += shelf.draw(dice, more, 1, lambda row: word in said_in(row), rows)
    rows += shelf.draw(dice, ("word", word), n - len(rows), without=rows)
    shared = set.intersection(*(set(said_in(row)) for row in rows))
    need(len(shared) == 1)
    for row in rows:
        need(any(len(shelf.index["word", w]) > n for w in said_in(row) if w not in shared))
    rows = shuffled(dice, rows)
    return Draft("keyword", {}, rows, list(map(quote, rows)), *the_words([word]))


# --- reasoning & logic


def bridge(shelf, dice, n, fate) -> Draft:
    """A claim that takes two clips to judge: one says who it is about, the other what is so. The
    claim is chosen before the verdict, from those that could have each of the three; and what is
    said of somebody else might have been said of whom it is about."""
    verdict = chosen(("yes", "no", "nei"), fate[0])
    (kind, r1, r2), form = dice.pick(list(BRIDGES.items()))
    start = shelf.draw(dice, ("fact", r1))[0]
    side = 1 if kind == "by" else 2  # where a first fact has whoever both facts are about,
    known = fact_of(start)[3 - side]  # and where what the claim knows them by
    firsts = shelf.index.get(("what" if kind == "by" else "whom", r1, known), ())
    firsts = {fact_of(shelf.row(number)): shelf.row(number) for number in firsts}
    claimed = dice.pick(shelf.values("what", r2))
    pairs, elsewhere = {"yes": [], "no": [], "nei": []}, facts_of(shelf, ("what", r2, claimed))
    elsewhere = [fact for fact in elsewhere if fact[1] in {first[side] for first in firsts}]
    for fact, first in firsts.items():
        middle = fact[side]
        about_it = facts_of(shelf, ("whom", r2, middle))
        pairs["yes"] += [(first, fact) for fact in about_it if fact[2] == claimed]
        pairs["no"] += [(first, fact) for fact in about_it if fact[2] != claimed]
        pairs["nei"] += [(first, fact) for fact in elsewhere if about_it and fact[1] != middle]
    need(all(pairs.values()))
    first, second = dice.pick(pairs[verdict])
    middle = fact_of(first)[side]
    rows = []
    for fact in (fact_of(first), second):
        rows += shelf.draw(dice, ("whom", *fact[:2]), 1, lambda row: fact_of(row) == fact, rows)

    def harmless(row):
        """It neither says who the claim is about, nor what is so of them."""
        fact = fact_of(row)
        tells_who = fact[0] == r1 and fact[3 - side] == known
        about_them = fact[0] in (r1, r2) and fact[1] == middle  # and might contradict it
        return not tells_who and not about_them

    for i in range(n - 2):
        tempting = i == 0 and verdict == "no"
        key = ("what", r2, claimed) if tempting else ("fact", dice.pick((r1, r2)))
        key = key if key in shelf.index else ("fact", r1)
        rows += shelf.draw(dice, key, 1, harmless, rows)
    rows = shuffled(dice, rows)
    about = {"claim": phrase(dice, form).format(first=known, second=claimed)}
    answer = yes_or_no(verdict, ("yes", "no", "nei"))
    return Draft("entailment", about, rows, list(map(quote, rows)), *answer)


def facts_of(shelf, key) -> list:
    """The different facts that the clips of a key state."""
    return sorted({fact_of(shelf.row(number)) for number in shelf.index.get(key, ())})


def exactly(shelf, dice, n, fate) -> Draft:
    """A claim about in how many of the clips something occurs."""
    verdict, wanted = chosen(YES_NO, fate[0]), 1 + int(fate[2] * (n - 1))
    there = wanted if verdict == "yes" else dice.pick([t for t in range(n + 1) if t != wanted])
    thing, rows, says, _ = with_and_without(shelf, dice, n, there)
    about = {"thing": thing, "number": number_word(wanted)}
    return Draft("exactly", about, rows, says, *yes_or_no(verdict))


def with_and_without(shelf, dice, n, there) -> tuple[str, list, list, list]:
    """A word or a sound; clips, `there` of them with it and the rest without; whether it is heard
    in each; and the places of those with it."""
    choices = {kind: shelf.values(kind, least=max(LABEL_CLIPS, n)) for kind in ("label", "word")}
    kind = dice.pick([kind for kind, values in choices.items() if values])
    thing = dice.pick(choices[kind])
    those = shelf.draw(dice, (kind, thing), there)
    rows = list(those)
    for _ in range(n - there):
        rows += shelf.draw(dice, decoy(shelf, dice, kind, thing), 1, lacking(kind, thing), rows)
    rows = shuffled(dice, rows)
    name = f'"{thing}"' if kind == "word" else thing
    said = f"the word {name}" if kind == "word" else f"the sound of {name}"
    places = [place_of(rows, row) for row in those]
    return said, rows, [name if i in places else f"no {name}" for i in range(1, n + 1)], places


def lacking(kind, thing):
    """Whether a row is known to be without a word or a sound: it says something else, or has labels
    of which none may mean it. Labels that name what somebody looked for say nothing of the rest."""

    def lacks(row):
        if kind == "word":
            return "transcript" in row and thing not in said_in(row)
        found = sounds_of(row)
        others = not any(thing == label or akin(thing, label) for label in found)
        return bool(found) and row["corpus"] not in WEAK and others

    return lacks


WEAK = ("audioset", "vggsound")


def listed(labels) -> str:
    return ", ".join(labels)


def agree(shelf, dice, n, fate) -> Draft:
    """Do all clips say the same of one thing?"""
    verdict = chosen(YES_NO, fate[0])
    return factual(shelf, dice, n, "agree", int(verdict == "no"), lambda odd: yes_or_no(verdict))


def dissenter(shelf, dice, n, fate) -> Draft:
    need(n > 2)
    return factual(shelf, dice, n, "dissenter", 1, the_clips)


def supporters(shelf, dice, n, fate) -> Draft:
    """Which clips are the many, where one says otherwise?"""
    need(n > 2)

    def rest(odd):
        return the_clips(*(i for i in range(1, n + 1) if i != odd))

    return factual(shelf, dice, n, "supporters", 1, rest)


def factual(shelf, dice, n, form, odd, answer) -> Draft:
    """All clips state the same, but for `odd` (0 or 1) of them. The odd one, too, states what as
    many clips do: else it would be known by its rarity."""
    relation = dice.pick(shelf.values("fact", least=LABEL_CLIPS))
    key = fact_of(shelf.draw(dice, ("fact", relation))[0])[:2]
    often = Counter(fact_of(shelf.row(number)) for number in shelf.index["whom", *key])
    usual = sorted(fact for fact, count in often.items() if count >= n)
    need(len(usual) > 1)
    same, strange = (usual[i] for i in dice.rng.permutation(len(usual))[:2])
    rows = shelf.draw(dice, ("whom", *key), n - odd, lambda row: fact_of(row) == same)
    other = shelf.draw(dice, ("whom", *key), odd, lambda row: fact_of(row) == strange)
    rows = shuffled(dice, rows + other)
    about = {"topic": phrase(dice, TOPICS[relation]).format(whom=key[1])}
    says = [f'"{fact_of(row)[2]}"' for row in rows]
    return Draft(form, about, rows, says, *answer(place_of(rows, other[0]) if other else 0))


def same_words(shelf, dice, n, fate) -> Draft:
    """The same for corpora whose sentences come more than once, whatever they say. Who says
    something else says as many words."""
    verdict = chosen(YES_NO, fate[0])
    texts = shelf.values("text", least=n)
    text = dice.pick(texts)
    others = [t for t in texts if t != text and len(t.split()) == len(text.split())]
    need(others)
    rows = shelf.draw(dice, ("text", text), n - (verdict == "no"))
    if verdict == "no":
        rows += shelf.draw(dice, ("text", dice.pick(others)))
    rows = shuffled(dice, rows)
    return Draft("same words", {}, rows, list(map(quote, rows)), *yes_or_no(verdict))


ELSE = "something else"


def needle_fact(shelf, dice, n, fate) -> Draft:
    """One clip says something of this kind: which one, or what."""
    relation = dice.pick(shelf.values("fact", least=LABEL_CLIPS))
    right = shelf.draw(dice, ("fact", relation))[0]
    _, whom, what = fact_of(right)
    other, others = lacking("word", whom), lacking("word", f"{whom}s")
    rest = []
    for i in range(n - 1):  # not about the same, whether as a fact or by the way
        key = ("fact", relation) if i % 2 else ("kind", "speech")
        rest += shelf.draw(dice, key, 1, lambda row: other(row) and others(row), rest)
    rows = shuffled(dice, [right, *rest])
    place = place_of(rows, right)
    says = [quote(row) if row is right else ELSE for row in rows]
    about = {"topic": phrase(dice, TOPICS[relation]).format(whom=whom)}
    if fate[1] < 0.4:
        return Draft("needle, where", about, rows, says, *the_clips(place))
    if fate[1] < 0.7:
        return Draft("needle, what", about, rows, says, *the_words([what]))
    both = in_words(f"{audio(place)}, {what}", [[audio(place)], [what]])
    return Draft("needle, both", about, rows, says, *both)


def needle_word(shelf, dice, n, fate) -> Draft:
    thing, rows, says, places = with_and_without(shelf, dice, n, 1)
    return Draft("needle, heard", {"thing": thing}, rows, says, *the_clips(*places))


def all_same(shelf, dice, n, fate) -> Draft:
    verdict = chosen(YES_NO, fate[0])
    category = chosen(alike(shelf, n), fate[1])
    value, strange = neighbours(shelf, dice, category, n)
    rows = shelf.draw(dice, ("category", category, value), n - (verdict == "no"))
    if verdict == "no":
        rows += shelf.draw(dice, ("category", category, strange))
    return about_category("all same", category, shuffled(dice, rows), yes_or_no(verdict))


def count_kinds(shelf, dice, n, fate, categories=[*CATEGORIES][:-2]) -> Draft:
    """How many different ones there are, from one to as many as clips."""
    usable = [c for c in alike(shelf, 2, n) if c in categories]
    category, kinds = chosen(usable, fate[1]), 1 + int(fate[0] * n)
    values = shelf.values("category", category, least=2)
    if category == "voice":
        values = close_voices(shelf, dice, kinds, least=n)
    else:
        values = shuffled(dice, values)[:kinds]
    rows = []
    for value in [*values, *(dice.pick(values) for _ in range(n - kinds))]:
        rows += shelf.draw(dice, ("category", category, value), without=rows)
    return about_category("kinds", category, shuffled(dice, rows), how_many(kinds), range=[1, n])


def pair_same(shelf, dice, n, fate) -> Draft:
    need(n > 2)
    category = chosen([c for c in alike(shelf, 2, n - 1) if c != "voice"], fate[1])
    values = shuffled(dice, shelf.values("category", category, least=2))
    return paired(shelf, dice, category, values[: n - 1])


# --- temporal understanding


def chronology(shelf, dice, n, fate) -> Draft:
    """The parts of a story or of a dialogue. Of two, neither may be its first or last: whoever
    hears that one alone would know."""
    kind = "turn" if fate[1] < 0.3 else "order"
    least = n if n > 2 else 4
    stories = next(filter(None, (shelf.stories(k, least) for k in (kind, "order", "turn"))), ())
    group = shelf.groups[chosen(stories, dice.rng.random())]
    group = group[1:-1] if n == 2 else group
    start = int(dice.rng.integers(max(1, len(group) - n)))
    window = group[start : start + n + 1]
    part = sorted(dice.rng.permutation(len(window))[:n])
    told = [shelf.row(window[i][1]) for i in part]
    rows = shuffled(dice, told)
    order = [place_of(rows, row) for row in told]
    says = list(map(heard, rows))
    need(all(says) and len(set(says)) == n)  # who says the same could change places
    gold = {"type": "order", "value": order}
    form = "turns" if "dialogue" in told[0] else "order"
    return Draft(form, {}, rows, says, ", ".join(map(audio, order)), gold)


def heard(row) -> str:
    """What is said in a clip, or else what sounds in it."""
    return quote(row) if "transcript" in row else listed(sounds_of(row))


def when(shelf, dice, n, fate) -> Draft:
    """In which clip something occurs, and from when to when."""
    choices = {kind: shelf.values(kind, least=LABEL_CLIPS) for kind in ("span", "timed")}
    key = "span" if choices["span"] and (fate[1] < 0.7 or not choices["timed"]) else "timed"
    thing = dice.pick(choices[key])
    kind = "label" if key == "span" else "word"
    rows = right, *_ = shelf.draw(dice, (key, thing))
    for _ in range(n - 1):
        rows += shelf.draw(dice, decoy(shelf, dice, kind, thing), 1, lacking(kind, thing), rows)
    spans = right["events" if key == "span" else "words"]
    on, off = next(span[1:] for span in spans if span[0] == thing)
    rows = shuffled(dice, rows)
    place, times = place_of(rows, right), f"{on:.1f} to {off:.1f} s"
    says = [f"{thing} from {times}" if row is right else f"no {thing}" for row in rows]
    about = {"thing": f"the sound of {thing}" if kind == "label" else f'the word "{thing}"'}
    gold = {"type": "span", "value": {"clip": place, "on": on, "off": off}}
    return Draft("when", about, rows, says, f"{audio(place)}, {times}", gold)


def total(shelf, dice, n, fate) -> Draft:
    """How often something is heard in all clips together: any number in 1..2n as likely."""
    wanted = 1 + int(fate[0] * 2 * n)
    labels = [label for label in shelf.values("label") if most_times(shelf, label, n) > 1]
    label = dice.pick(labels)
    most, counts, left = min(most_times(shelf, label, n), 2 * n - 1), [], wanted
    for more in reversed(range(n)):  # clips still to come
        fits = [c for c in range(most + 1) if 0 <= left - c <= most * more]
        counts.append(dice.pick(fits))
        left -= counts[-1]
    rows = []
    for count in counts:
        if count:
            rows += shelf.draw(dice, ("times", label, count), without=rows)
        else:
            key = decoy(shelf, dice, "label", label)
            rows += shelf.draw(dice, key, 1, lacking("label", label), rows)
    rows = shuffled(dice, rows)
    says = [told_count(count_of(row, label) or 0, label) for row in rows]
    return Draft("total", {"label": label}, rows, says, *how_many(wanted), {"range": [1, 2 * n]})


def most_times(shelf, label, n) -> int:
    """The most times that enough clips hold a label, and enough clips any number up to it."""
    most = 0
    while len(shelf.index.get(("times", label, most + 1), ())) >= max(3, n):
        most += 1
    return most


def clips_with(shelf, dice, n, fate) -> Draft:
    there = int(fate[0] * (n + 1))
    thing, rows, says, _ = with_and_without(shelf, dice, n, there)
    return Draft("clips with", {"thing": thing}, rows, says, *how_many(there), {"range": [0, n]})


# --- captions


MUSICAL = ("instrument", "mode", "speed", "dynamics")


def ways(label) -> list[str]:
    return [label, f"{label}s", EVENTS[label].phrase] if label in EVENTS else [label]


def event_phrase(label) -> str:
    return EVENTS[label].phrase if label in EVENTS else f"{label} is heard"


def caption(row) -> tuple[str, list]:
    """A sentence on a clip, and the facts in it, each with the ways to name it."""
    if "transcript" in row:
        need(len(words(row["transcript"])) <= 12 and said_in(row))
        text, facts = f"someone says {quote(row)}", [[word] for word in said_in(row)]
        for label in sounds_of(row):
            text += f" while {event_phrase(label)}"
            facts.append(ways(label))
        return text, facts
    captions = [c for c in row.get("captions", ()) if content(c)]
    if "music" in row and "instrument" in row["music"]:
        need(captions)
        facts = [row["music"]["instrument"], row["music"].get("mode"), speed_of(row)]
        return captions[0], [[fact] for fact in facts if fact not in (None, "medium")]
    if captions and all(label in EVENTS for label in sounds_of(row)) and sounds_of(row):
        return captions[0], [ways(label) for label in sounds_of(row)]
    if captions:  # what more than one listener wrote, or else what the only one did
        counts = Counter(word for c in captions for word in content(c))
        facts = [word for word in content(captions[0]) if counts[word] > 1 or len(captions) == 1]
        need(facts)
        return captions[0], [[word] for word in facts[:6]]
    need(sounds_of(row))
    return listed(sounds_of(row)[:4]), [[label] for label in sounds_of(row)[:4]]


def describe_each(shelf, dice, n, fate) -> Draft:
    kinds = shelf.values("kind", least=n)
    rows, facts, says = [], [], []
    for _ in range(n):
        rows += shelf.draw(dice, ("kind", dice.pick(kinds)), without=rows)
        text, more = caption(rows[-1])
        says.append(text)
        facts += [fact for fact in more if fact not in facts]
    verdict = "; ".join(f"{audio(i)}: {text}" for i, text in enumerate(says, 1))
    return Draft("describe each", {}, rows, says, *in_words(verdict, facts))


def describe_together(shelf, dice, n, fate) -> Draft:
    """All that is heard in any clip, each once."""
    rows = shelf.draw(dice, ("kind", "sound"), n, sounds_of)
    labels = list(dict.fromkeys(label for row in rows for label in sounds_of(row)))
    need(len(labels) <= 8)
    says, answer = list(map(heard, rows)), in_words(listed(labels), list(map(ways, labels)))
    return Draft("describe together", {}, rows, says, *answer)


def features(row) -> dict:
    """What a clip can be told by: {phrase: ways to say it}."""
    if "transcript" in row:
        found = {f'"{word}"': [word] for word in said_in(row)}
        emotion = row.get("emotion", "neutral")
        found |= {f"a voice that is {emotion}": [emotion]} if emotion != "neutral" else {}
    elif "instrument" in row.get("music", {}):
        if "tempo" in row["music"] and not speed_of(row):  # nobody is sure what it is not
            return {}
        values = (CATEGORIES[name][0](row) for name in MUSICAL)
        found = {f"{value} music": [value] for value in values if value}
    else:
        found = {}
    return found | {event_phrase(label): ways(label) for label in sounds_of(row)}


def contrast(shelf, dice, n, fate) -> Draft:
    """What one clip has and no other: some of what it has others have too, and what it has alone
    depends on who they are."""
    kind, (target, *rest), others = alike_in_part(shelf, dice, n, fate)
    rest, own = rest + others, features(target)
    others = {feature: named for row in rest for feature, named in features(row).items()}
    alone = [feature for feature in own if feature not in others]
    need(alone and len(alone) < len(own))
    names = [named[0] for named in others.values()]
    need(kind == "speech" or not any(akin(own[a][0], b) for a in alone for b in names))
    feature = dice.pick(alone)  # which another clip might have had too, without all the rest
    keys = ("word", own[feature][0]), ("label", own[feature][0]), ("kind", kind)
    key = next(key for key in keys if key in shelf.index)
    shelf.draw(
        dice, key, 1, lambda row: feature in features(row) and own.keys() - features(row).keys()
    )
    rows = shuffled(dice, [target, *rest])
    says = [listed(features(row)) for row in rows]
    about = {"first": audio(place_of(rows, target))}
    answer = in_words(listed(alone), [own[feature] for feature in alone])
    return Draft("contrast", about, rows, says, *answer)


# --- on one clip: what it takes to hear, before anything is compared


def transcribe(shelf, dice, n, fate) -> Draft:
    row = shelf.draw(dice, ("kind", "speech"), 1, lambda row: words(row.get("transcript", "")))[0]
    text = row["transcript"]
    return Draft("transcribe", {}, [row], [quote(row)], text, {"type": "transcript", "value": text})


def tag(shelf, dice, n, fate) -> Draft:
    row = shelf.draw(dice, ("kind", "sound"), 1, lambda row: 0 < len(sounds_of(row)) <= 6)[0]
    labels = sounds_of(row)
    gold = {"type": "keywords", "value": [label.lower() for label in labels]}
    return Draft("tag", {}, [row], [listed(labels)], listed(labels), gold)


def describe_one(shelf, dice, n, fate) -> Draft:
    row = shelf.draw(dice, ("kind", chosen(shelf.values("kind"), fate[1])))[0]
    text, facts = caption(row)
    return Draft("describe", {}, [row], [text], *in_words(text, facts))


def count_one(shelf, dice, n, fate) -> Draft:
    """None to three times, each as likely."""
    labels = [label for label in shelf.values("label") if most_times(shelf, label, 1) >= 3]
    label, times = dice.pick(labels), int(fate[0] * 4)
    if times:
        row = shelf.draw(dice, ("times", label, times))[0]
    else:
        row = shelf.draw(dice, ("kind", "sound"), 1, lacking("label", label))[0]
    says, limits = [told_count(times, label)], {"range": [0, 3]}
    return Draft("count", {"label": label}, [row], says, *how_many(times), limits)


def locate(shelf, dice, n, fate) -> Draft:
    draft = when(shelf, dice, 1, fate)
    span = {name: draft.gold["value"][name] for name in ("on", "off")}
    verdict = draft.verdict.partition(", ")[2]
    return draft._replace(form="locate", verdict=verdict, gold={"type": "span", "value": span})


def choose_category(shelf, dice, categories, fate) -> Draft:
    """One of the values that clips have of a category, or of a recording's quality."""
    values = {c: shelf.values("category", c, least=3) for c in categories}
    if "quality" in values:
        faults = shelf.values("quality", least=3)
        values["quality"] = [v for v in faults if v not in ("clean", "background")]
    category = chosen([c for c in values if len(values[c]) > 1], fate[1])
    value = chosen(values[category], fate[0])
    fault = category == "quality"
    row = shelf.draw(dice, ("quality", value) if fault else ("category", category, value))[0]
    others = [other for other in values[category] if other != value]
    choices = shuffled(dice, [value, *shuffled(dice, others)[:3]])
    noun = "fault of the recording" if fault else CATEGORIES[category][1]
    about = {"noun": noun, "choices": f"{', '.join(choices[:-1])} or {choices[-1]}"}
    gold = {"type": "choice", "value": value, "choices": choices}
    return Draft("which value", about, [row], [value], value, gold)


def voice(shelf, dice, n, fate) -> Draft:
    return choose_category(shelf, dice, ("emotion", "quality"), fate)


def music(shelf, dice, n, fate) -> Draft:
    return choose_category(shelf, dice, MUSICAL, fate)


# The tasks of the paper's Table 1 by skill, and those on one clip. The paper names the skills of
# eleven; the other three go where what they ask for is: a caption for each clip is knowing which is
# which, a contrast caption compares, a multi-clip answer reasons.

Task = namedtuple("Task", "skill least kinds")  # the least number of clips; how it can be asked
TASKS = {
    "comparison": Task("comparison", 2, (compare, difference)),
    "odd": Task("comparison", 3, (odd_one,)),
    "quality": Task("comparison", 2, (clearest, quality_most)),
    "contrast": Task("comparison", 2, (contrast,)),
    "link": Task("reference", 2, (same_speaker, speaker_pair, count_speakers, heard_again)),
    "keyword": Task("reference", 2, (keyword,)),
    "captioning": Task("reference", 2, (describe_each, describe_together)),
    "entailment": Task("reasoning", 2, (bridge, exactly)),
    "factual": Task("reasoning", 2, (agree, dissenter, supporters, same_words)),
    "needle": Task("reasoning", 2, (needle_fact, needle_word)),
    "aqa": Task("reasoning", 2, (all_same, count_kinds, pair_same)),
    "order": Task("temporal", 2, (chronology,)),
    "temporal": Task("temporal", 2, (when,)),
    "counting": Task("temporal", 2, (total, clips_with)),
    "transcribe": Task("single", 1, (transcribe,)),
    "tag": Task("single", 1, (tag,)),
    "caption": Task("single", 1, (describe_one,)),
    "count": Task("single", 1, (count_one,)),
    "locate": Task("single", 1, (locate,)),
    "voice": Task("single", 1, (voice,)),
    "music": Task("single", 1, (music,)),
}
POLYAUDIO = list(TASKS)  # the recipe: what follows are others'
MIX = {"comparison": 30, "reference": 25, "reasoning": 25, "temporal": 20}  # the paper's Table 2

# ------------------------------------------------------------------------------------------------
# Three recipes of other papers, whose clips are made for the item: pairs that differ in little
# (MALLM), a sound and a sentence that only together say what goes on (JASCO), and clips of the same
# parts put together otherwise (CompA).


def made(wave, parts, **known) -> dict:
    """The row of a clip that was put together from others; write_item finds a place for it."""
    joined = {
        name: "+".join(dict.fromkeys(row[name] for row in parts)) for name in ("id", "corpus")
    }
    licence = "; ".join(dict.fromkeys(row["licence"] for row in parts))
    return {**joined, "licence": licence, "wave": level(wave), **known}


def level(wave) -> np.ndarray:
    """As loud as can be without clipping, less 6 dB."""
    return wave * np.float32(0.5 / max(np.abs(wave).max(), 1e-6))


def had(get, *given):
    """get(*given), or a Miss where this clip is not to be had, unless no other would be either."""
    try:
        return get(*given)
    except BadInput as mistake:
        if getattr(mistake, "status", None) in HOPELESS:
            raise
        warn(str(mistake))
        raise Miss("clips: not to be had") from None


def spoken(shelf, dice, text, speaker) -> dict:
    wave, known = had(say, dice, shelf.engine, text, speaker, "neutral")
    served = shelf.engine.kind == "server"
    voice = {"id": f"{speaker}:{text}", "corpus": f"voice-{shelf.engine.kind}",
             "licence": "as the speech server's voices" if served else "CC0-1.0"}  # fmt: skip
    return made(join([wave], [0.1, 0.2]), [voice], **known)


def heard_in(shelf, row) -> np.ndarray:
    wave = had(load_clip, clip_of(row), shelf.out)
    need(wave.any())  # silence has no level that it could be mixed at
    return wave


def unlike_sounds(shelf, dice, count, least=1) -> list[str]:
    """So many sounds of which no two may be the same by another name."""
    values = shelf.values("category", "sound", least=least)
    need(len(values) >= count)
    found = shuffled(dice, values)[:count]
    need(not any(akin(a, b) for a, b in itertools.combinations(found, 2)))
    return found


def mixed(shelf, a, b, **known) -> dict:
    """Both at once from the start, equally loud."""
    waves = [level(heard_in(shelf, row)) for row in (a, b)]
    return made(mix(*waves, 0), [a, b], **known)


# MALLM, speech: a sentence and another that an edit of a word or two makes of it.

EDITS = {  # and what a language model is told of each
    "add": "put in one or two words, and change nothing else",
    "delete": "leave out one or two words, and change nothing else",
    "modify": "put other words in the place of one, two or three",
    "restructure": "use exactly the same words in another order; move at most four of them",
}
LATER = "today again now there too".split()
TRAILING = re.compile(r"(.+) ((?:at|in|on|with|from|after|before|under|near) .+)")
IS = re.compile(r"(.+) is (\w+)")


def add_words(dice, text):
    """A colour before a thing that has none, or a word of time or place at the end."""
    spoken_now = text.split()
    free = [i for i, word in enumerate(spoken_now)
            if SORTS.get(word.removesuffix("s")) in ("animal", "object")
            and i and SORTS.get(spoken_now[i - 1]) != "colour"]  # fmt: skip
    if free and dice.rng.random() < 0.7:
        colours = [colour for colour in WORDS["colour"].split() if colour not in spoken_now]
        colour, place = dice.pick(colours), dice.pick(free)
        return " ".join([*spoken_now[:place], colour, *spoken_now[place:]]), colour
    later = dice.pick([word for word in LATER if word not in spoken_now])
    return f"{text} {later}", later


def swap_word(dice, text):
    """One word becomes another of its kind."""
    said = text.split()
    known = [i for i, word in enumerate(said) if word in SORTS]
    need(known)
    place = dice.pick(known)
    others = [w for w in WORDS[SORTS[said[place]]].split() if w not in said]
    new = dice.pick(others)
    return " ".join([*said[:place], new, *said[place + 1 :]]), said[place], new


def turn_round(text) -> str:
    """The same words in another order that is English too."""
    if match := TRAILING.fullmatch(text):
        return f"{match[2]} {match[1]}"
    match = IS.fullmatch(text)
    need(match)
    return f"{match[2]} is {match[1]}"


def base_sentence(shelf, dice) -> str:
    """Of the sentences that were given, one of this split; or one of the world's."""
    if not shelf.sentences:
        return write_script(dice, [dice.pick(SENTENCES)])[0]
    return dice.pick(shelf.sentences)


def speech_pair(shelf, dice, n, fate) -> Draft:
    text, edit = base_sentence(shelf, dice), chosen(list(EDITS), fate[0])
    if edit in ("add", "delete"):  # one is the other read backwards
        longer, word = add_words(dice, text)
        texts = [text, longer] if edit == "add" else [longer, text]
        place = texts.index(longer) + 1
        verdict, facts = f'{audio(place)} also says "{word}"', [[audio(place)], [word]]
    elif edit == "modify":
        other, old, new = swap_word(dice, text)
        texts = [text, other]
        verdict = f'{audio(1)} says "{old}" and {audio(2)} says "{new}"'
        facts = [[old], [new]]
    else:
        texts = [text, turn_round(text)]
        verdict, facts = "the same words in another order", [["same words"], ["another order"]]
    need(all(split_of(said) == dice.split for said in texts))  # an edit may lead elsewhere
    return one_voice(shelf, dice, edit, texts, verdict, facts)


def one_voice(shelf, dice, edit, texts, verdict, facts) -> Draft:
    """The two sentences, so that nothing but their words differs."""
    speaker = dice.pick(speakers(shelf.engine, dice.split))
    rows = [spoken(shelf, dice, said, speaker) for said in texts]
    says, answer = list(map(quote, rows)), in_words(verdict, facts)
    return Draft("speech pair", {"edit": edit}, rows, says, *answer)


def sound_pair(shelf, dice, n, fate) -> Draft:
    """MALLM's Table 7: the same sound; another; one more; one more in each; the common one."""
    case = 1 + int(fate[0] * 5)
    x, y, z = unlike_sounds(shelf, dice, 3, least=2)
    first, again = shelf.draw(dice, ("category", "sound", x), 2)
    second, third = (shelf.draw(dice, ("category", "sound", label))[0] for label in (y, z))
    both = f"both have the sound of {x}"
    if case == 1:
        rows, verdict, facts = [first, again], both, [[x]]
    elif case == 2:
        rows = [first, second]
        verdict, facts = f"{audio(1)} has {x} and {audio(2)} has {y}", [[x], [y]]
    elif case == 3:
        rows = [first, mixed(shelf, first, second, labels=[x, y])]
        rows = rows[::-1] if fate[2] < 0.5 else rows
        more = audio(1 if fate[2] < 0.5 else 2)
        verdict, facts = f"{both}, {more} also has {y}", [[x], [more], [y]]
    else:
        rows = [mixed(shelf, first, other, labels=[x, label])
                for other, label in ((second, y), (third, z))]  # fmt: skip
        verdict = f"{both}, {audio(1)} also has {y} and {audio(2)} also has {z}"
        facts = [[x], [y], [z]]
    says = [listed(row["labels"]) for row in rows]
    if case == 5:
        return Draft("common sound", {"case": 5}, rows, says, *the_words([x]))
    return Draft("sound pair", {"case": case}, rows, says, *in_words(verdict, facts))


# JASCO: what are they doing? Neither the sound nor the sentence says it alone.

Scene = namedtuple("Scene", "sound sentence doing keywords by_sound by_speech")
SCENES = [
    Scene(*told) for told in (
        ("dog|bark", "come here and sit down", "they are training a dog", "training, train",
         "a dog barks at somebody", "a guest is asked to sit down"),
        ("cow|moo", "the bucket is almost full", "they are milking a cow", "milking, milk",
         "they walk past a field", "they fill something with water"),
        ("sheep|bleat", "the wool is very thick this year", "they are shearing sheep",
         "shearing, shear", "they are near a meadow", "they are knitting"),
        ("rooster", "five more minutes please", "they are waking up on a farm", "waking, wake up",
         "they keep chickens", "they wait for something"),
        ("owl", "be quiet and hold the light", "they are watching animals at night",
         "watching, watch", "they are in a wood", "they repair something in the dark"),
        ("bird", "here are the seeds", "they are feeding birds", "feeding, feed",
         "they sit in a garden", "they are planting"),
        ("frog", "one more came into the net", "they are catching frogs", "catching, catch",
         "they are at a pond", "they are fishing at sea"),
        ("siren", "make room for him please", "they are letting an ambulance pass", "ambulance",
         "they hear an accident far away", "they make place at a table"),
        ("bell", "the lesson is over now", "they are leaving a class", "leaving, leave",
         "they pass a church", "they finish a talk"),
        ("phone", "i can not find my bag", "they are looking for a ringing phone",
         "looking, look, search", "they get a call", "they lost their luggage"),
        ("alarm|beep", "who left the pan there", "they are dealing with burning food",
         "burning, burn", "a machine has a fault", "they tidy up a kitchen"),
        ("(?<!french )horn", "the light is green", "they are waiting behind a car",
         "driving, waiting",
         "they stand at a street", "they look at a lamp"),
        ("knock", "the pizza is here at last", "they are getting a delivery", "delivery, deliver",
         "somebody wants to come in", "they are eating out"),
        ("hammer", "hold the board for me", "they are building something", "building, build",
         "metal is worked on", "they surf"),
        ("glass", "take the broom and a bag", "they are cleaning up broken glass",
         "cleaning, clean", "something fell down", "they sweep leaves"),
        ("footstep", "he is right behind us", "they are running away", "running, run",
         "somebody goes for a walk", "they stand in a queue"),
        ("explosion", "look how red and green it is", "they are watching fireworks", "fireworks",
         "there is a war", "they look at a painting"),
        ("rain", "the tent is wet inside", "they are camping in the rain", "camping, camp",
         "they stand at a window", "they wash a tent"),
        ("wind", "hold the string and let it go", "they are flying a kite", "kite",
         "there is a storm", "they are making music"),
        ("thunder", "out of the water all of you", "they are leaving a lake in a storm",
         "leaving, leave", "they see the weather change", "they end a swimming lesson"),
        ("engine", "this time it starts", "they are repairing a car", "repairing, repair",
         "they are driving", "they begin a race"),
        ("saw", "this will keep us warm", "they are cutting firewood", "firewood, cutting",
         "they make furniture", "they buy clothes"),
        ("stream|waterfall", "fill the bottle again", "they are hiking along a stream",
         "hiking, hike",
         "they sit at a river", "they cook"),
        ("applause", "and the winner is my sister", "they are giving a prize", "prize",
         "a concert ends", "they play a game at home"),
        ("snore", "she will miss her train", "they are letting somebody sleep too long", "sleep",
         "it is night", "they talk of a journey"),
        ("baby", "lift both his legs a little", "they are changing a baby", "changing, change",
         "they comfort a child", "they do exercises"),
        ("cough", "open wide and say a", "they are at the doctor", "doctor", "somebody has a cold",
         "they are at a singing lesson"),
        ("whistle", "the ball was out", "they are playing a match", "match, playing",
         "somebody calls a dog", "they lost a toy"),
        ("fire(?!work|cracker| alarm| engine)", "are the potatoes done",
         "they are cooking over a fire", "cooking, cook",
         "a house burns", "they are in a kitchen"),
    )
]  # fmt: skip


def scene_of(shelf, dice) -> tuple:
    """A scene of this split, as a script belongs to one, and a clip of its sound."""
    told = dice.pick([scene for scene in SCENES if split_of(scene.sentence) == dice.split])
    named = re.compile(rf"\b({told.sound})")
    known = [v for v in shelf.values("category", "sound") if named.search(v.lower())]
    return told, shelf.draw(dice, ("category", "sound", dice.pick(known)))[0]


def scene_heard(shelf, dice, n, fate) -> Draft:
    return staged(shelf, dice, *scene_of(shelf, dice))


def staged(shelf, dice, told, sound) -> Draft:
    """One clip with both, the sound behind the sentence."""
    speech = spoken(shelf, dice, told.sentence, dice.pick(speakers(shelf.engine, dice.split)))
    wave = mix(speech["wave"], level(heard_in(shelf, sound)), dice.between(0, 6))
    row = made(wave, [speech, sound], transcript=told.sentence)
    says = f"{lone_sound(sound)}, {quote(row)}"
    _, gold = in_words(told.doing, [told.keywords.split(", ")])
    about = {"sound": lone_sound(sound), "by_sound": told.by_sound, "by_speech": told.by_speech}
    return Draft("scene", about, [row], [says], f"{says}. Answer: {told.doing}", gold)


# CompA: the same two sounds, in another order or with their loudness exchanged.


def same_parts(shelf, dice, n, put_together) -> Draft:
    """put_together(x, y) -> (wave, caption) of n clips; which of the captions fits one of them?"""
    need(n <= 3)
    x, y = unlike_sounds(shelf, dice, 2)
    parts = [shelf.draw(dice, ("category", "sound", label))[0] for label in (x, y)]
    waves = [level(heard_in(shelf, row)) for row in parts]
    rows = [made(wave, parts, caption=text) for wave, text in put_together(x, y, *waves)[:n]]
    rows = shuffled(dice, rows)
    captions = [row["caption"] for row in rows]
    asked = int(dice.rng.integers(n))
    choices = shuffled(dice, captions)
    about = {"first": audio(asked + 1), "choices": " or ".join(f'"{text}"' for text in choices)}
    gold = {"type": "choice", "value": captions[asked], "choices": choices}
    return Draft("caption of", about, rows, captions, gold["value"], gold, {"captions": captions})


def order_parts(shelf, dice, n, fate) -> Draft:
    def put_together(x, y, a, b):
        x, y = event_phrase(x), event_phrase(y)
        return [
            (join([a, b], [0, 0.1, 0]), f"{x}, then {y}"),
            (join([b, a], [0, 0.1, 0]), f"{y}, then {x}"),
            (mix(a, b, 0), f"{x} and {y} at the same time"),
        ]

    return same_parts(shelf, dice, n, put_together)


def attribute_parts(shelf, dice, n, fate) -> Draft:
    def put_together(x, y, a, b):
        return [
            (mix(a, b, 12), f"loud {x} and soft {y}"),
            (mix(a, b, -12), f"loud {y} and soft {x}"),
            (mix(a, b, 0), f"{x} and {y}, equally loud"),
        ]

    return same_parts(shelf, dice, n, put_together)


TASKS |= {
    "speech_pair": Task("pairs", 2, (speech_pair,)),
    "sound_pair": Task("pairs", 2, (sound_pair,)),
    "scene": Task("single", 1, (scene_heard,)),
    "compa_order": Task("composition", 2, (order_parts,)),
    "compa_attribute": Task("composition", 2, (attribute_parts,)),
}
Recipe = namedtuple("Recipe", "tasks mix single")  # mix: shares of skills or of tasks
PAIRS = {"speech_pair": 24, "sound_pair": 26.9, "transcribe": 28.5, "tag": 20.7, "caption": 5}
COMPA = {"compa_order": 1, "compa_attribute": 1}
RECIPES = {
    "polyaudio": Recipe(POLYAUDIO, MIX, 0.25),
    "mallm": Recipe(list(PAIRS), PAIRS, 54.2 / 105.1),  # thousands of items in its Table 8
    "jasco": Recipe(["scene"], {"scene": 1}, 1.0),
    "compa": Recipe(list(COMPA), COMPA, 0.0),
}

# ------------------------------------------------------------------------------------------------
# How each kind asks, and how an answer ends.
ALL = "[all clips|all the clips|all recordings|all the audios]"
ACROSS = "[across the clips|in all the clips together|over all recordings]"
FORMS = {
    **{f"{name}, {end}": form for name, scale in SCALES.items()
       for end, form in (("most", scale.most), ("least", scale.least))},
    "difference": "[What is the difference between {first} and {second}|What is different in"
    " {first} and {second}|How do {first} and {second} differ|What differs between {first} and"
    " {second}|How is {first} different from {second}]?",
    "odd": WHICH + " has another {noun} than the [others|rest]?",
    "clearest": WHICH + " has the [clearest|cleanest] [speech|voice]?",
    "impaired": WHICH + " [suffers from|has] {label}?",
    "same speaker": "[Do {first} and {second} have the same speaker|Is the same person speaking in"
    " {first} and {second}|Is the voice of {first} the voice of {second}|Do {first} and {second}"
    " have the same voice|Is it the same speaker in {first} and {second}]?",
    "pair": "[Which two audios|Which two clips|Which two recordings] have the same {noun}?",
    "kinds": "How many different {plural} [are there|are heard|do you hear] " + ACROSS + "?",
    "heard again": "One clip says {quote}. Is [its speaker|the same voice|its voice] heard in"
    " [another clip|any other clip|another recording]?",
    "keyword": "[Which|What] keyword do " + ALL + " [share|have in common]?",
    "entailment": "[Is it true that|Do the clips tell that|Does it follow that] {claim}?"
    " [Answer|Say] yes, no or not enough information.",
    "exactly": "[Is it true that|Is it right that] {thing} is heard in exactly {number} of the"
    " [clips|recordings|audios]?",
    "agree": "Do " + ALL + " [agree|say the same] about {topic}?",
    "dissenter": WHICH + " [contradicts|does not agree with] the others about {topic}?",
    "supporters": "Most clips agree about {topic}. [Which are they|Which ones agree|Which clips are"
    " these|Which of the clips agree|Which are these]?",
    "same words": "Do " + ALL + " say [the same words|the same sentence]?",
    "needle, where": WHICH + " [says|tells] {topic}?",
    "needle, what": "One [clip|recording|audio] [says|tells] {topic}. What does it say?",
    "needle, both": "One [clip|recording|audio] [says|tells] {topic}. Which is it, and what does it"
    " say?",
    "needle, heard": IN + " [is {thing} heard|do you hear {thing}]?",
    "all same": "Do " + ALL + " have the same {noun}?",
    "order": "[Put|Sort|Bring] [the clips|the recordings|these clips] [in the right order"
    "|in order of time|in the order of time].",
    "turns": "[Put|Sort|Bring] [these turns|the turns] of a [dialogue|conversation] [in the right"
    " order|in order of time|in the order of time].",
    "when": IN + " [is {thing} heard|do you hear {thing}], and [when|from when to when]?",
    "total": "How often [is the {label} heard|do you hear the {label}] " + ACROSS + "?",
    "clips with": "In how many [clips|recordings|audios] [is {thing} heard|do you hear {thing}]?",
    "describe each": "[Describe|Say what you hear in|Caption] [each clip|each recording|every clip]"
    " in one sentence.",
    "describe together": "[Name|List|Tell] every sound that is heard " + ACROSS + ".",
    "contrast": "[What|Which things|What sounds or words] can be heard in {first} and in no other"
    " [clip|recording|audio]?",
    "transcribe": "[Transcribe|Write down] [the speech|the words|what is said|what the speaker"
    " says].",
    "tag": "[Which|What] sounds [are heard|do you hear|are there]?",
    "describe": "[Describe|Caption] [the clip|the recording|this clip|this recording] in one"
    " sentence.",
    "count": "How often [is the {label} heard|do you hear the {label}] [here|in this clip|in this"
    " recording]?",
    "locate": "[When|From when to when|At what time] [is {thing} heard|do you hear {thing}"
    "|can you hear {thing}]?",
    "which value": "[What|Which] is the {noun} [here|in this clip|in this one]: {choices}?",
    "speech pair": "[How do the words of the two"
    " clips differ|What is the difference between the words of the two clips|What differs in the"
    " speech of the two recordings|What is the difference in what is said]?",
    "sound pair": "[How do the two clips differ|What is the difference between the two clips|What"
    " sounds differ between the two recordings|What is the same and what is different in the two"
    " clips|What differs in the sound of the two recordings]?",
    "common sound": "[What|Which] sound do [both clips|both audios|both recordings] have in"
    " common?",
    "scene": "[From the sound and from what is said, what are they doing?|From what is said and"
    " from the sound, what are they doing?|Name the sound and the words, then say what they are"
    " doing.|Name the words and the sound, then say what they are doing.|Name the sound and the"
    " words, then the scene they are in.|Name the words and the sound, then the scene they are in."
    "|Which sound is heard, and what is said? Guess what they are doing.|What is said, and which"
    " sound is heard? Guess what they are doing.]",
    "caption of": "[Which|What] caption [fits|describes|is right for] {first}: {choices}?",
    "answer": "[So the answer is|The answer is|So the answer|The answer|Answer]: {verdict}.",
}  # fmt: skip
PLACES = 2 * ("{question}",) + ("Here are {n} clips: {clips}\n{question}", "{question}\n{clips}")


# ------------------------------------------------------------------------------------------------
# Items. What task item i is, how many clips it has, what its verdict is: all that follows from
# (seed, i), so it does not matter who makes it, when, or beside how many others.

TRIES = 100  # attempts at an item as fate would have it,
REDRAWN = 10  # and how many fates it may have
GOLDEN, SILVER = 0.6180339887498949, 0.4142135623730951  # steps that fill 0..1 evenly


def plan_tasks(shelf, split, tasks, max_clips) -> dict:
    """{task: {clips: [kinds]}}: what this corpus can feed, found out by trying each with a few
    verdicts. A kind that only comes out for some verdicts would tell them."""
    plan = {}
    for task in tasks:
        most = 1 if TASKS[task].skill == "single" else max_clips
        for n in range(TASKS[task].least, most + 1):
            kinds = [kind for kind in TASKS[task].kinds if comes_out(shelf, split, kind, n)]
            if kinds:
                plan.setdefault(task, {})[n] = kinds
    return plan


def comes_out(shelf, split, kind, n) -> bool:
    for number, verdict in enumerate((0.01, 0.35, 0.65, 0.99)):
        dice = Dice(split, 0, 5, n, number)
        for _ in range(TRIES):
            with suppress(Miss):
                kind(shelf, dice, n, (verdict, dice.rng.random(), dice.rng.random()))
                break
        else:
            return False
    return True


def task_of(i, plan, mix, single) -> str:
    """Item i's task: any run of items holds the skills in the proportions of the mix, a skill's
    tasks evenly. Those on one clip are a share of `single`, or, where that is a whole number, all
    from that item on."""
    shares = {}
    for task in plan:
        skill = TASKS[task].skill
        mates = sum(TASKS[other].skill == skill for other in plan)
        shares[task] = mix[skill] / mates if skill in mix else mix.get(task, 1)
    alone = i >= single if type(single) is int else (0.5 + i * SILVER) % 1 < single
    names = [task for task in plan if (TASKS[task].skill == "single") == alone] or list(plan)
    place = (0.5 + i * GOLDEN) % 1 * sum(shares[task] for task in names)
    for task in names:
        place -= shares[task]
        if place < 0:
            break
    return task


def make_item(shelf, plan, settings, i) -> dict | None:
    """Item i, or None where no attempt at it came out."""
    split, seed = settings["split"], settings["seed"]
    task = task_of(i, plan, settings["mix"], settings["single"])
    dice = Dice(split, seed, 2 + SPLITS.index(split), i)
    for _ in range(REDRAWN):
        n = chosen(sorted(plan[task]), dice.rng.random())
        kind, fate = chosen(plan[task][n], dice.rng.random()), dice.rng.random(3).tolist()
        for _ in range(TRIES):
            with suppress(Miss):
                draft = kind(shelf, dice, n, fate)
                item = write_item(draft, dice, task, f"{split}-{seed}-{i:07d}")
                if score(item["gold"], item["answer"]) == 1:
                    item["meta"]["kind"] = kind.__name__
                    write_made(shelf, item["id"], draft.rows)
                    return item
    return None


def write_made(shelf, id, rows):
    """The clips of an item that no corpus has."""
    for place, row in enumerate(rows):
        if "wave" in row:
            write_clip(shelf.out / made_path(id, place), row["wave"])


def write_item(draft, dice, task, id) -> dict:
    """The draft in words: its answer says what is heard, and why if that is known, then judges."""
    n = len(draft.rows)
    question = filled(phrase(dice, FORMS.get(draft.form, draft.form)), draft.about)
    place = dice.pick(PLACES if n > 1 else PLACES[:2])
    markers = " ".join(f"<sound-{i}>" for i in range(1, n + 1))
    asked = place.format(question=question, clips=markers, n=number_word(n))
    answer = draft.verdict
    if n > 1 and draft.form != "describe each":
        evidence = "; ".join(f"{audio(i)}: {says}" for i, says in enumerate(draft.says, 1))
        ending = filled(phrase(dice, FORMS["answer"]), {"verdict": answer})
        answer = " ".join(filter(None, (f"{evidence}.", draft.reason, ending)))
    need("<sound-" not in " ".join([question, answer, *draft.says]))  # a transcript may say it
    corpora = {part for row in draft.rows for part in row["corpus"].split("+")}
    choices = draft.gold["type"] == "choice" and draft.gold["choices"]
    return {
        "id": id,
        "task": task,
        "skill": TASKS[task].skill,
        "clips": [clip_of({"path": made_path(id, k), **row}) for k, row in enumerate(draft.rows)],
        "question": asked,
        "answer": answer,
        "gold": draft.gold,
        **({"choices": choices} if choices else {}),
        "source": "+".join(sorted(corpora)),
        "licences": sorted({part for row in draft.rows for part in row["licence"].split("; ")}),
        "meta": {
            "ids": [row["id"] for row in draft.rows],
            "about": draft.about,
            "evidence": [{"clip": i, "says": says} for i, says in enumerate(draft.says, 1)],
            "verdict": draft.verdict,
            **draft.more,
        },
    }


def made_path(id, place) -> str:
    return f"clips/{id}-{place + 1}.flac"


def clip_of(row):
    """A row's clip, which may be a part of its file."""
    part = {name: row[name] for name in ("start", "end") if name in row}
    return {"path": row["path"], **part} if part else row["path"]


def filled(form, about) -> str:
    return SLOT.sub(lambda slot: about[slot[1]], form)


# ------------------------------------------------------------------------------------------------
# The second writer, a language model (--llm). Which task, how many clips, which verdict: all that
# still follows from (seed, i). The model is told what is known of the clips, or to make scripts up
# that are then spoken, and writes what only somebody who knows English can. Little it says is
# believed: a reply passes the checks of its prompt, or is asked for once more with the complaint,
# or is dropped and counted; whether a script that it made up bears a claim out is its own word.
# Every reply is kept in llm.jsonl before it is looked at, so that a
# killed run asks, and pays, for nothing twice.

RULES = """\
Reply with one JSON object of the schema below, and with nothing before or after it. Plain \
English in straight letters: no markup, no line breaks, no angle brackets. Wherever a clip is \
named, it is by its place alone, as "audio 2" or "the second clip", never by a file, a title or \
an id."""
PROMPTS = {  # one for each figure of the paper's appendix C, in our words
    "rephrase": """\
Somebody asked a question about several audio clips, and the right answer is known. Put that \
answer the way a friendly listener would say it aloud: one or two sentences, 40 words at the \
most, in a wording that is not the one you were given. It has to come out as exactly the same \
answer. Name no clip that the right answer leaves unnamed, and pass no judgement on any other \
clip.""",
    "factual": """\
Make up material for a listening test. Write `claim`, a single statement of 20 words or fewer on \
the given topic, and K scripts that K different people will read aloud, 6 to 15 words each, easy \
to say, no two alike. Everything needed to judge the claim is in the scripts, and a script that \
supports it shares a word of meaning with it. With label Yes each script by itself supports the \
claim; with label No at least one of them says otherwise or leaves it open. `support` tells it \
for each script; `style` is a hint for the reader; `rationale` says in 25 words or fewer why the \
label is right. Never mention a clip's number or place.""",
    "keywords": """\
Write n sentences for a speech synthesiser, all on the given topic, 6 to 14 words each. Every one \
of them holds every keyword, letter for letter. Apart from the keywords and little words such as \
"the", "in" or "with", no word may occur in all of the sentences, so let each tell of something \
else. A word of `extras` may be used in one sentence, never in two.""",
    "ordering": """\
You get the parts of a recording in the order in which they were told. Choose three parts and \
describe what happens in each in a few words of your own that keep its important nouns, 3 to 15 \
words. List the three in any order but the true one; `part` says which part each one is from. No \
description may hint at its place: nothing like first, then, next, later, finally. `question` \
asks for the order in which things happen, without telling the events again and without numbers. \
`answer_options` are four different orders of the numbers 1, 2, 3, which are the places of the \
events in your list, written like "2, 3, 1"; exactly one is right, and `correct_answer` is its \
letter.""",
    "rationale": """\
You get the parts of a recording, and three of its events in the order in which they happen. Say \
in two or three sentences, 60 words at the most, what makes this order the natural one: what \
leads to what, and which words show it. Name no clip, no option and no number of an event.""",
    "dialogue": """\
You get the turns of a conversation, each a clip of its own, and a question about it. Answer the \
question in one or two sentences, 45 words at the most. Build the answer around one to four short \
phrases of the conversation, 1 to 6 words each: every phrase is in the answer word for word, and \
`quotes` lists it with the number of the clip that says it.""",
    "entailment": """\
Invent a small situation and K short monologues about it, one speaker each, which will be spoken \
by a synthesiser. A monologue has 15 to 60 words that are easy to say. `clip_id` is A1, A2 and so \
on; `speaker` is one of the given names, which may come again; `instructions` has four short \
labelled parts: Voice: ... Tone: ... Punctuation: ... Delivery: ... Let at least one fact (a day, \
an amount, who comes along) be stated in one clip and denied in another, and put in a detail or \
two that lead nowhere. Then write 5 to 7 questions that can be answered with yes or no, of no two \
of which the answers disagree. `uses` are the fewest clips that it takes, two or more for at \
least half of the questions. `evidence_quotes` are one or two phrases, word for word from clips \
in `uses`. `answer` is a sentence that begins with "Yes, ", "No, " or "Not enough information, "; \
each of the three occurs. Questions and answers tell clips apart by what is said, never by \
number, place or id.""",
    "temporal": """\
You get, for each of several clips, which sounds it holds, how often, and from when to when in \
seconds. Write two to five different questions on how often or when sounds are heard in two clips \
or more. An answer is one or two sentences, and gives for each clip that it names how often or \
when, in numbers from the data as they are, times with their decimals.""",
    "difference": """\
You get, for each of several clips, captions and the sounds it holds. Write one to five questions \
on what sounds are heard in two clips or more, where these differ. An answer is one or two \
sentences, and names the sounds of each clip by their labels.""",
    "music": """\
You get what is known of several pieces of music. Write one question of the given reasoning type \
that takes listening to two of them or more, single and not two in one. Its answer is one or two \
sentences, and gives what each piece is.""",
    # MALLM's appendix C, its four edits.
    "edit": """\
You get a sentence and an edit. Make that edit and no other, so that the new sentence is good \
English, means something else or says it in another way, and is easy to say aloud. The sentence \
you get is spoken in audio 1, yours in audio 2. `difference` is one sentence of 25 words or fewer \
on how the two differ: it names each changed word letter for letter, after the name of the clip \
that has it, and nothing that a clip lacks. Where only the order is another, it says that they \
have the same words in another order. Where the edit leads to no good sentence, both are null.""",
    # JASCO's section III.A: a scene, and the three checks on it.
    "scene": """\
Invent a scene for a listening test. You get a sound that is heard in the background. Write the \
`sentence`, 3 to 12 words, that somebody in the scene says; `doing`, what they are doing, in 4 to \
12 words, which can only be told from the sound and the sentence together; one to four \
`keywords`, each a word or two that names the action, in its different forms, one of them in \
`doing` word for word; `by_sound` and `by_speech`, what one would wrongly take them to be doing \
from the sound alone and from the sentence alone, 3 to 12 words. No keyword is in the sound, the \
sentence, `by_sound` or `by_speech`.""",
    "infer": """\
You get a sound that is heard in the background, a sentence that somebody says, and what they are \
said to be doing. Can that be inferred from the sound and the sentence taken together? Answer yes \
or no.""",
    "guess": """\
You get a sound that is heard in the background, a sentence that somebody says, and a question on \
both. Answer it with the likeliest activity, in one sentence of 20 words or fewer.""",
    "alone": """\
Of a recording you know one thing only: a sound that is heard in it, or a sentence that is said. \
Tell what the people are most likely doing, in one sentence of 20 words or fewer.""",
}
LOOKED_UP = """ \
question[k] belongs to answer[k]. A question holds no number but those of clips, no name of an \
artist, song or album, and nothing that a listener cannot hear. An answer names two clips at \
least, each before what it says of it, and says of a clip only what its data say, in their words: \
no key of the music, no "not", and no comparison like "longer", "most" or "only"."""
for each in ("temporal", "difference", "music"):
    PROMPTS[each] += LOOKED_UP
TWO_LISTS = {"question": [str], "answer": [str]}
REPLIES = {  # what a reply holds, as prepare.fits() reads it
    "rephrase": {"answer": str},
    "factual": {"claim": str, "label": {"Yes", "No"}, "rationale": str,
                "clips": [{"support": bool, "text": str, "style": str}]},
    "keywords": {"sentences": [str]},
    "ordering": {"events": [{"part": int, "description": str}], "question": str,
                 "answer_options": dict.fromkeys("ABCD", str), "correct_answer": set("ABCD")},
    "rationale": {"rationale": str},
    "dialogue": {"answer": str, "quotes": [{"clip": int, "quote": str}]},
    "entailment": {"scenario": str,
                   "clips": [{"clip_id": str, "speaker": str, "instructions": str,
                              "transcript": str}],
                   "qa": [{"qid": str, "question": str, "uses": [str], "answer": str,
                           "evidence_quotes": [{"clip_id": str, "quote": str}]}]},
    "temporal": TWO_LISTS,
    "difference": TWO_LISTS,
    "music": TWO_LISTS,
    "edit": {"sentence": str | None, "difference": str | None},
    "scene": {"sentence": str, "doing": str, "keywords": [str], "by_sound": str, "by_speech": str},
    "infer": {"answer": {"yes", "no"}}, "guess": {"doing": str}, "alone": {"doing": str},
}  # fmt: skip
TYPES = {str: "string", int: "integer", bool: "boolean", str | None: ["string", "null"]}


def schema_of(shape) -> dict:
    """The JSON schema of a shape."""
    if isinstance(shape, set):
        return {"type": "string", "enum": sorted(shape)}
    if isinstance(shape, list):
        return {"type": "array", "items": schema_of(shape[0])}
    if isinstance(shape, dict):
        fields = {name: schema_of(inner) for name, inner in shape.items()}
        return {"type": "object", "properties": fields, "required": list(fields),
                "additionalProperties": False}  # fmt: skip
    return {"type": TYPES[shape]}


# The checks. Each looks at one thing and gives a complaint, "kind: what", or None; a prompt's
# faults come one after the other, and the first goes back to the model.


def unless(holds, complaint):
    return None if holds else complaint


def wrong_length(name, text, most, least=1):
    count = len(words(text))
    told = f"length: {name} has {count} words, not {least} to {most}"
    return unless(least <= count <= most, told)


def wrong_sentences(text, least, most):
    count = sum(bool(words(part)) for part in re.split(r"(?<=[.!?])\s+", text))
    return unless(least <= count <= most, f"length: {count} sentences, not {least} to {most}")


def named(text) -> list[int]:
    """The clips that a text names, in its order."""
    return list(dict.fromkeys(map(int, re.findall(r"#(\d+)", plain(text)))))


def stray(n, text):
    """A clip is named by a place that there is, and by nothing else."""
    other = re.search(r"(?i)\b[\w-]+\.(?:wav|flac|mp3|ogg)\b|\bA[1-9]\b|\w/\w", text)
    return unless(not other, f"reference: {other and other[0]} is no place of a clip") or unless(
        set(named(text)) <= set(range(1, n + 1)), f"reference: there are {n} clips"
    )


def unplaced(*texts):
    """The clips will be shuffled, or their order is what is asked for: none may be named."""
    return unless(not any(map(named, texts)), "reference: no clip may be named by its place")


def misquoted(quote, text):
    """Word for word, whatever the capitals and commas."""
    inside = f" {' '.join(words(quote))} " in f" {' '.join(words(text))} "
    return unless(words(quote) and inside, f'quote: "{quote:.60}" is not in "{text:.120}"')


def unspeakable(text, least, most, taken):
    fine = re.fullmatch(r"[A-Za-z0-9 ,.;:!?'\"()-]+", text)
    return (
        wrong_length("a script", text, most, least)
        or unless(fine, f'script: "{text:.60}" has letters that cannot be spoken')
        or unless(tuple(words(text)) not in taken, f'script: "{text:.60}" is used elsewhere')
    )


def repeated(texts):
    unlike = {tuple(words(text)) for text in texts}
    return unless(len(unlike) == len(texts), "script: two texts are the same")


# The prompts, one after the other. What a prompt is told, and what must be known to judge the
# reply, is a Brief; faults(brief, reply) yields complaints; draft(shelf, dice, brief, reply) is a
# Draft and, if any, what to say before its verdict.

Brief = namedtuple("Brief", "data rows known", defaults=((), {}))
SUBJECTS = {  # what to write about; words that a sentence on it may share
    "a garden": "garden seeds water roses spade path hedge bench",
    "a train journey": "train ticket station window platform luggage seat bridge",
    "cooking for friends": "kitchen soup bread onions table guests butter oven",
    "a day at school": "teacher lesson chalk pupils homework desk library bell",
    "a visit to the sea": "beach waves boat sand harbour gulls towel island",
    "repairs at home": "hammer ladder paint door roof nails neighbour cupboard",
    "a village market": "market apples stall basket coins farmer cheese honey",
    "winter weather": "snow coat frost stove road storm gloves ice",
    "a small orchestra": "violin concert stage drummer tickets rehearsal singer hall",
    "an animal shelter": "puppy kitten blanket vet cage visitors food fence",
}


def recited(shelf, dice, texts, names=None) -> tuple[list, dict]:
    """The scripts as clips, in an order drawn anew, and what the item tells of them. Only a speech
    server knows the names; elsewhere each stands for some voice of the split."""
    own, names = shuffled(dice, speakers(shelf.engine, dice.split)), names or [*range(len(texts))]
    if shelf.engine.kind != "server" or type(names[0]) is int:
        known = list(dict.fromkeys(names))
        names = [own[known.index(name) % len(own)] for name in names]
    told = shuffled(dice, list(zip(texts, names)))
    rows = [spoken(shelf, dice, text, voice) for text, voice in told]
    return rows, scripts_of(rows)


def scripts_of(rows) -> dict:
    """What was made up, so that no other split says it again."""
    return {"made": [{"text": row["transcript"], "speaker": row["id"].partition(":")[0]}
                     for row in rows]}  # fmt: skip


def material(shelf, dice, tell, n) -> Brief:
    """What a prompt is told: tried, like an item by rules, until the clips for it are found."""
    for _ in range(REDRAWN):
        fate = dice.rng.random(3).tolist()
        for _ in range(TRIES):
            with suppress(Miss):
                return tell(shelf, dice, n, fate)
    raise Miss


def topic_of(dice) -> tuple[str, list]:
    """What to write about, and words of it in some order: without them it is always the same."""
    topic = dice.pick(list(SUBJECTS))
    return topic, shuffled(dice, SUBJECTS[topic].split())


def brief_factual(shelf, dice, n, fate) -> Brief:
    label, (topic, details) = chosen(("Yes", "No"), fate[0]), topic_of(dice)
    data = {"K": n, "label": label, "topic": topic, "let it be about": details[:2]}
    return Brief(data, known={"taken": shelf.elsewhere})


def faults_factual(brief, reply):
    clips, wanted = reply["clips"], brief.data["label"]
    texts, claim = [clip["text"] for clip in clips], reply["claim"]
    yield unless(len(clips) == brief.data["K"], f"shape: {len(clips)} scripts, not K")
    yield unless(reply["label"] == wanted, f"label: {reply['label']}, not {wanted}")
    supported = all(clip["support"] for clip in clips)
    yield unless(supported == (wanted == "Yes"), f"label: {wanted} is not what `support` says")
    yield wrong_length("the claim", claim, 20, 3)
    yield wrong_length("the rationale", reply["rationale"], 25, 3)
    yield unplaced(claim, reply["rationale"])
    yield from (unspeakable(text, 6, 15, brief.known["taken"]) for text in texts)
    yield repeated(texts)
    for clip in clips:
        shared = set(content(claim)) & set(content(clip["text"]))
        told = f'support: "{clip["text"]:.60}" has no word of the claim'
        yield unless(shared or not clip["support"], told)


def draft_factual(shelf, dice, brief, reply):
    rows, made_up = recited(shelf, dice, [clip["text"] for clip in reply["clips"]])
    answer = yes_or_no(brief.data["label"].lower())
    about, says = {"claim": reply["claim"].rstrip(".")}, list(map(heard, rows))
    form = "Do " + ALL + " [support this claim|back this claim|bear this claim out]: {claim}?"
    return Draft(form, about, rows, says, *answer, made_up, reply["rationale"])


def brief_keywords(shelf, dice, n, fate) -> Brief:
    count, (topic, those) = (1 if fate[0] < 0.5 else 2), topic_of(dice)
    data = {"n": n, "topic": topic, "keywords": sorted(those[:count]), "extras": those[count:]}
    return Brief(data, known={"taken": shelf.elsewhere})


def faults_keywords(brief, reply):
    sentences, wanted = reply["sentences"], set(brief.data["keywords"])
    yield unless(len(sentences) == brief.data["n"], f"shape: {len(sentences)} sentences, not n")
    yield from (unspeakable(text, 6, 14, brief.known["taken"]) for text in sentences)
    yield repeated(sentences)
    for text in sentences:
        lost = wanted - set(words(text))
        yield unless(not lost, f'keywords: "{text:.60}" lacks {", ".join(sorted(lost))}')
    more = set.intersection(*(set(content(text)) for text in sentences)) - wanted
    yield unless(not more, f"keywords: {', '.join(sorted(more))} is in all sentences, too")


def draft_keywords(shelf, dice, brief, reply):
    rows, made_up = recited(shelf, dice, reply["sentences"])
    form = "[Which|What] [keywords|content words] [are common to|come up in|are in] " + ALL + "?"
    answer = the_words(brief.data["keywords"])
    return Draft(form, {}, rows, list(map(heard, rows)), *answer, made_up)


PLACE_WORDS = re.compile(
    r"\b(?:first|second|third|fourth|fifth|last|final|finally|lastly|then|next|later|earlier|after"
    r"|afterwards?|before|begins?|beginning|starts?|starting|ends?|ending|initially|eventually"
    r"|originally|ultimately|subsequently|previously|opening|closing|meanwhile|middle|followed"
    r"|following|concludes?|conclusion)\b"
)


def told_in_a_row(shelf, dice, kind, n) -> list[dict]:
    """So many parts of a story or dialogue, one after the other; none where none is so long."""
    if not (stories := shelf.stories(kind, n)):
        return []
    group = shelf.groups[dice.pick(stories)]
    start = int(dice.rng.integers(len(group) - n + 1))
    return [shelf.row(number) for _, number in group[start : start + n]]


def brief_ordering(shelf, dice, n, fate) -> Brief:
    need(n > 2)
    kind = "turn" if fate[1] < 0.3 else "order"
    kinds = (kind, "order", "turn")
    told = next(filter(None, (told_in_a_row(shelf, dice, k, n) for k in kinds)), None)
    need(told and len({heard(row) for row in told}) == n)
    parts = [{"part": k, "heard": heard(row)} for k, row in enumerate(told, 1)]
    return Brief({"parts": parts}, shuffled(dice, told), {"told": told})


def faults_ordering(brief, reply):
    events, told = reply["events"], [set(content(heard(row))) for row in brief.known["told"]]
    parts = [event["part"] for event in events]
    fine = len(set(parts)) == len(events) == 3 and set(parts) <= set(range(1, len(told) + 1))
    yield unless(fine, "events: three of three different parts are wanted")
    yield unless(parts != sorted(parts), "events: they are listed in their true order")
    for event in events:
        text, own = event["description"], set(content(event["description"]))
        yield wrong_length("a description", text, 15, 3)
        hint = PLACE_WORDS.search(text.casefold())
        yield unless(not hint, f"hint: {hint and hint[0]} tells where an event belongs")
        common = [len(own & those) for those in told]
        best = common.pop(event["part"] - 1) > max(common)
        yield unless(best, f'events: "{text:.60}" is not what part {event["part"]} tells')
    question, options = reply["question"], [reply["answer_options"][letter] for letter in "ABCD"]
    yield wrong_length("the question", question, 25, 3)
    fine = "?" in question and not re.search(r"\d", question)
    yield unless(fine, "question: one without numbers, please")
    yield unplaced(question, *(event["description"] for event in events))
    plainly = all(re.fullmatch("[123], ?[123], ?[123]", option) for option in options)
    yield unless(plainly, 'options: each is an order like "2, 3, 1"')
    orders = [tuple(map(int, re.findall(r"\d", option))) for option in options]
    different = len(set(orders)) == 4 and all(len(set(order)) == 3 for order in orders)
    yield unless(different, "options: four different orders are wanted")
    right = tuple(parts.index(part) + 1 for part in sorted(parts))
    letter = reply["correct_answer"]
    fine = orders["ABCD".index(letter)] == right
    yield unless(fine, f"options: {letter} is not the order of the parts")


def draft_ordering(shelf, dice, brief, reply):
    """The events and the options get new places: a model has favourites."""
    events = shuffled(dice, list(enumerate(reply["events"], 1)))
    place = {str(old): str(new) for new, (old, _) in enumerate(events, 1)}
    options = {
        letter: ", ".join(place[old] for old in re.findall(r"\d", reply["answer_options"][letter]))
        for letter in "ABCD"
    }
    right, choices = options[reply["correct_answer"]], shuffled(dice, list(options.values()))
    lettered = {text: f"{letter}: {text}" for letter, text in zip("ABCD", choices)}
    events = (f"({k}) {event['description'].rstrip('.')}" for k, (_, event) in enumerate(events, 1))
    about = {"question": reply["question"], "events": "; ".join(events),
             "choices": "; ".join(lettered.values())}  # fmt: skip
    form = "{question} {events}. [Choose one|Choose|One is right]: {choices}."
    gold = {"type": "choice", "value": right, "choices": choices}
    return Draft(form, about, brief.rows, list(map(heard, brief.rows)), lettered[right], gold)


def faults_rationale(brief, reply):
    text = reply["rationale"]
    yield wrong_sentences(text, 2, 3)
    yield wrong_length("the rationale", text, 60, 6)
    yield unplaced(text)
    numbered = re.search(r"\d|\b(?:option|answer|[A-D])\b(?!')", text.replace("A ", " "))
    yield unless(not numbered, "reference: no option and no number, please")


ASPECTS = {  # of a dialogue: how to ask for it
    "causal": "[What makes the speaker say|What leads the speaker to say|Why does the speaker say"
    "|For what reason does somebody say|What is the reason to say] {quote} [in|at] {turn}?",
    "coherence": "[How do|In what way do] [the turns|these turns|the clips] [hang together|build on"
    " one another|form one conversation|fit together]?",
    "grounding": "[What do|Which things do] [the speakers|both speakers] [take for granted|already"
    " know|assume to be known|need not explain]?",
    "pragmatic": "[What do the speakers want to get done|What is this conversation for|What are the"
    " speakers after|What does this exchange achieve|What purpose does the talk serve]?",
}


def brief_dialogue(shelf, dice, n, fate) -> Brief:
    rows = told_in_a_row(shelf, dice, "turn", n)
    need(rows and all(said_in(row) for row in rows))
    aspect, turn = chosen(list(ASPECTS), fate[1]), 2 + int(fate[2] * (n - 1))
    about = {"turn": audio(turn), "quote": quote(rows[turn - 1])}
    question = filled(phrase(dice, ASPECTS[aspect]), about)
    turns = [{"clip": k, "speaker": row["dialogue"].get("speaker", row.get("speaker", "?")),
              "says": row["transcript"]} for k, row in enumerate(rows, 1)]  # fmt: skip
    return Brief({"aspect": aspect, "turns": turns, "question": question}, rows)


def faults_dialogue(brief, reply):
    answer, quotes, n = reply["answer"], reply["quotes"], len(brief.rows)
    yield wrong_sentences(answer, 1, 2)
    yield wrong_length("the answer", answer, 45, 5)
    yield stray(n, answer)
    yield unless(1 <= len(quotes) <= 4, f"quote: {len(quotes)} quotes, not 1 to 4")
    for said in quotes:
        yield unless(1 <= said["clip"] <= n, f"quote: there is no clip {said['clip']}")
        yield misquoted(said["quote"], brief.rows[said["clip"] - 1]["transcript"])
        yield wrong_length("a quote", said["quote"], 6)
        yield unless(content(said["quote"]), f'quote: "{said["quote"]}" means nothing by itself')
        yield misquoted(said["quote"], answer)


def draft_dialogue(shelf, dice, brief, reply):
    answer = reply["answer"].rstrip(".")
    slots = dict.fromkeys(said["quote"] for said in reply["quotes"])
    about, more = {"question": brief.data["question"]}, {"aspect": brief.data["aspect"]}
    says, answer = list(map(heard, brief.rows)), in_words(answer, [[slot] for slot in slots])
    return Draft("{question}", about, brief.rows, says, *answer, more)


VERDICTS = {"Yes, ": "yes", "No, ": "no", "Not enough information, ": "nei"}
LINES = r"Voice: \S.*Tone: \S.*Punctuation: \S.*Delivery: \S.*"


def verdict_of(answer):
    return next((told for opening, told in VERDICTS.items() if answer.startswith(opening)), None)


def brief_entailment(shelf, dice, n, fate) -> Brief:
    need(3 <= n <= 5)
    verdict, (topic, details) = chosen(("yes", "no", "nei"), fate[0]), topic_of(dice)
    data = {"K": n, "topic": topic, "let it be about": details[:3]}
    data["speakers"] = TEN[dice.split].split()
    return Brief(data, known={"verdict": verdict, "taken": shelf.elsewhere})


def faults_entailment(brief, reply):
    clips, asked, n = reply["clips"], reply["qa"], brief.data["K"]
    said = {clip["clip_id"]: clip["transcript"] for clip in clips}
    ids = [f"A{k}" for k in range(1, n + 1)]
    yield unless([clip["clip_id"] for clip in clips] == ids, f"shape: clips {', '.join(ids)}")
    for clip in clips:
        fine = clip["speaker"] in brief.data["speakers"]
        yield unless(fine, f"speaker: {clip['speaker']:.20} is none of the names")
        fine = re.fullmatch(LINES, clip["instructions"])
        yield unless(fine, "instructions: Voice, Tone, Punctuation and Delivery, in this order")
        yield unspeakable(clip["transcript"], 15, 60, brief.known["taken"])
    yield repeated(list(said.values()))
    yield unless(5 <= len(asked) <= 7, f"shape: {len(asked)} questions, not 5 to 7")
    for qa in asked:
        yield from faults_of_qa(qa, said)
    several = sum(len(set(qa["uses"])) > 1 for qa in asked)
    yield unless(2 * several >= len(asked), "uses: half of the questions take two clips or more")
    unlike = {tuple(words(qa["question"])) for qa in asked}
    yield unless(len(unlike) == len(asked), "question: one is asked twice")
    fine = any(verdict_of(qa["answer"]) == brief.known["verdict"] for qa in asked)
    yield unless(fine, "answer: each of the three verdicts is to occur")


def faults_of_qa(qa, said):
    quotes, text = qa["evidence_quotes"], qa["answer"]
    yield unless(qa["uses"] and set(qa["uses"]) <= said.keys(), "uses: ids of the clips are wanted")
    yield unless(1 <= len(quotes) <= 2, "quote: one or two for each question")
    for given in quotes:
        yield unless(given["clip_id"] in qa["uses"], "quote: it is from a clip in `uses`")
        yield misquoted(given["quote"], said[given["clip_id"]])
    yield unless(verdict_of(text), f'answer: "{text:.40}" does not begin with a verdict')
    yield wrong_length("an answer", text, 40, 2)
    yield wrong_length("a question", qa["question"], 30, 3)
    yield unless(qa["question"].endswith("?"), "question: it ends with ?")
    yield stray(0, f"{qa['question']} {text}")


def draft_entailment(shelf, dice, brief, reply):
    """One of its questions, of those with the verdict that this item is to have."""
    verdict, clips = brief.known["verdict"], reply["clips"]
    qa = dice.pick([qa for qa in reply["qa"] if verdict_of(qa["answer"]) == verdict])
    texts, names = ([clip[field] for clip in clips] for field in ("transcript", "speaker"))
    rows, made_up = recited(shelf, dice, texts, names)
    form = "{question} [Answer|Say] yes, no or not enough information."
    answer, says = yes_or_no(verdict, ("yes", "no", "nei")), list(map(heard, rows))
    more = {**made_up, "quotes": [given["quote"] for given in qa["evidence_quotes"]]}
    return Draft(form, {"question": qa["question"]}, rows, says, *answer, more, qa["answer"])


# Questions on sounds and on music, with answers that can be looked up. One rule serves all three
# prompts: an answer is cut at the clips that it names, and what follows a clip's name may hold that
# clip's own words and numbers, and words that only link. A comparison or a denial has other words:
# nobody could decide it from a list, so it goes.

NUMERAL = re.compile(r"(?<![\w.#])(\d+(?:\.\d+)?)(?:\s*(s\b|sec\w*))?|\b(once|twice)\b")
KEY_NAME = re.compile(r"\b[B-G]\b|\bA[#\u266f]? (?:major|minor)\b|\bof A\b")
LINKING = set(
    "audio clip recording track piece sound noise event music kind instrument play differ "
    "different difference distinguish compare compared contrast hear heard hold contain include "
    "have feature occur present while whereas but between among each every one time times often "
    "many number count second seconds start begin end last span until tempo bpm beat beats minute "
    "energy valence danceability dynamics loudness language mode key".split()
)
NAMES = ("artist", "song", "album", "title", "release")  # what nobody can hear
REASONING = {  # the ways to reason about music, and what must be known for each, one of them
    "instruments and vocals": ("instrument",), "tempo and rhythm": ("tempo",),
    "tonality": ("mode",), "dynamics and loudness": ("dynamics", "energy"),
    "language and vocal style": ("language",), "genre and style": ("valence", "danceability"),
    "form and structure": ("dynamics",),
}  # fmt: skip


def brief_sounds(shelf, dice, n, fate, timed=False) -> Brief:
    """Clips whose events are known, some sound in two of them."""

    def fits(row):
        return 0 < len(row.get("events", ())) <= 12 and 0 < len(sounds_of(row)) <= 5

    first = shelf.draw(dice, ("kind", "sound"), 1, fits)
    like = ("label", dice.pick(sounds_of(first[0])))
    rows = first + shelf.draw(dice, like, 1, fits, first)
    rows = shuffled(dice, rows + shelf.draw(dice, ("kind", "sound"), n - 2, fits, rows))
    need(len({frozenset(sounds_of(row)) for row in rows}) > 1)
    clips = [{"audio": i, "captions": row.get("captions", [])[:2], "sounds": [
        {"label": label, "times": count_of(row, label), "seconds": spans_told(row, label)}
        for label in sounds_of(row)]} for i, row in enumerate(rows, 1)]  # fmt: skip
    return Brief({"clips": clips}, rows, {"timed": timed})


def spans_told(row, label) -> list[str]:
    return [f"{on:.1f}-{off:.1f}" for name, on, off in row["events"] if name == label]


def brief_music(shelf, dice, n, fate) -> Brief:
    rows = shelf.draw(dice, ("kind", "music"), n, lambda row: "music" in row)
    kinds = [kind for kind, fields in REASONING.items()
             if all(any(field in row["music"] for field in fields) for row in rows)]  # fmt: skip
    clips = [{"audio": i, "captions": row.get("captions", [])[:2]} for i, row in enumerate(rows, 1)]
    for clip, row in zip(clips, rows):
        clip |= {field: row["music"][field] for field in row["music"] if field not in NAMES}
        clip.pop("key", None)  # "a minor" may be a key or an article
    return Brief({"reasoning_type": chosen(kinds, fate[1]), "clips": clips}, rows)


def things_in(row) -> list[str]:
    """The labels of a clip's sounds, or the words for what a piece of music is."""
    music = row.get("music", {})
    traits = [music.get(field) for field in ("instrument", "mode", "dynamics", "language")]
    return [*sounds_of(row), *(trait for trait in traits if isinstance(trait, str))]


def heard_there(row) -> str:
    """All of it, as evidence."""
    if "music" not in row:
        return "; ".join(f"{name} {', '.join(spans_told(row, name))}" for name in things_in(row))
    numbers = [SCALES[name].told(row["music"][name], None)
               for name in ("tempo", "energy", "valence", "danceability")
               if name in row["music"]]  # fmt: skip
    return ", ".join([*things_in(row), *numbers])


def by_clip(text) -> list[tuple]:
    """[(clip, what is said of it)]; 0 for what comes before any, unless there is but one."""
    before, *pieces = re.split(r"#(\d+)", plain(text))
    said = [(int(clip), told) for clip, told in zip(pieces[::2], pieces[1::2])]
    if len({clip for clip, _ in said}) == 1:
        return [(said[0][0], before), *said]
    return [(0, before), *said]


def stem(word) -> str:
    return re.sub(r"(?:ing|es|ed|s|e)$", "", word) if len(word) > 4 else word


def mention(thing, text):
    """How a text names a sound: "a dog is barking" names "dog bark"; None if it does not."""
    parts = [re.escape(stem(word)) for word in words(thing)]
    found = re.search(r"\b" + r"\w*[\s,]+(?:is\s+|are\s+)?".join(parts) + r"\w*", text)
    return found[0] if found and parts else None


def strange_words(rows, text) -> list[str]:
    """The words of meaning in a text that neither link nor are known of one of these clips."""
    told = " ".join(each for row in rows for each in (*row.get("captions", ()), *things_in(row)))
    own = tuple(stem(word) for word in content(told) if word[2:])
    linking = {stem(word) for word in LINKING}
    text = NUMERAL.sub(" ", re.sub(r"#\d+", " ", text))
    return [word for word in content(text)
            if stem(word) not in linking and not word.startswith(own)]  # fmt: skip


def numbers_in(text) -> list[tuple]:
    """[(as it stands, value, decimals or None for a count)]"""
    found = []
    for number, unit, word in NUMERAL.findall(text):
        decimals = len(number.partition(".")[2])
        value = float(number) if number else 1 + (word == "twice")
        found.append((number or word, value, decimals if unit or decimals else None))
    return found


def wrong_number(row, question, text):
    """Of music it is a value, near enough. Of sounds it is a count or, with decimals or a unit, a
    time of those that the text names, or else the question."""
    music = [value for value in row.get("music", {}).values() if type(value) in (int, float)]
    named_there = [label for label in things_in(row) if mention(label, text)]
    asked = [label for label in things_in(row) if mention(label, plain(question))]
    events = [event for event in row.get("events", ()) if event[0] in (named_there or asked)]
    counts = Counter(label for label, _, _ in events).values()
    times = [time for _, on, off in events for time in (on, off)]
    for told, value, decimals in numbers_in(text):
        close = 0.5 * 10 ** -(decimals or 0) + 1e-9
        near = any(abs(known - value) < close for known in music or times)
        if not (near if music or decimals is not None else value in counts):
            return told
    return None


def facts_in(rows, answer) -> dict:
    """{clip: the facts that an answer tells of it, each with the ways to name it}"""
    facts = defaultdict(list)
    for i, text in by_clip(answer):
        if i:
            found = ((thing, mention(thing, text)) for thing in things_in(rows[i - 1]))
            facts[i] += [(said, *ways(thing)) for thing, said in found if said]
            facts[i] += [(told,) for told, _, _ in numbers_in(text)]
    return {i: those for i, those in facts.items() if those}


def faults_pair(brief, question, answer):
    rows, both = brief.rows, f"{question} {answer}"
    yield wrong_length("a question", question, 35, 3)
    single = question.endswith("?") and question.count("?") == 1
    yield unless(single, "question: one, which ends with ?")
    yield wrong_length("an answer", answer, 60, 2)
    yield wrong_sentences(answer, 1, 2)
    yield stray(len(rows), both)
    music = [row.get("music", {}) for row in rows]
    names = [str(known[name]) for known in music for name in NAMES if name in known]
    leaked = [name for name in names if not misquoted(name, both)]
    yield unless(not leaked, f"leak: {', '.join(leaked)} cannot be heard")
    bare = re.sub(r"#\d+", " ", tag_clips(question.casefold()))
    yield unless(not re.search(r"\d", bare), "leak: the question holds numbers")
    denied = re.search(r"(?i)\b(?:yes|no|not)\b|n't\b", both)
    yield unless(not denied, "words: neither yes nor no nor not, please")
    keyed = any(music) and KEY_NAME.search(answer)
    yield unless(not keyed, "words: name no key of the music")
    strange = strange_words(rows, plain(question))
    yield unless(not strange, f"words: {', '.join(strange)} is in none of the data")
    yield unless(len(named(answer)) > 1, "reference: the answer names fewer than two clips")
    for i, text in by_clip(answer):
        where = f"audio {i}" if i else "any clip before it is named"
        strange = strange_words([rows[i - 1]] if i else [], text)
        yield unless(not strange, f"words: {', '.join(strange)} is not known of {where}")
        wrong = wrong_number(rows[i - 1] if i else {"corpus": ""}, question, text)
        yield unless(not wrong, f"numbers: {wrong} is not known of {where}")
    told = facts_in(rows, answer)
    unlike = len(set(map(tuple, told.values()))) > 1
    yield unless(unlike, "same: two clips at least, and what sets them apart")
    timed = all(any(map(numbers_in, itertools.chain(*those))) for those in told.values())
    yield unless(timed or not brief.known.get("timed"), "numbers: how often or when, for each")


def faults_lists(brief, reply):
    """Of parallel lists: one pair without a fault is enough, and the others are passed over."""
    questions, answers = reply["question"], reply["answer"]
    same = len(questions) == len(answers)
    yield unless(same, f"lists: {len(questions)} questions, {len(answers)} answers")
    yield unless(1 <= len(questions) <= 8, f"lists: {len(questions)} questions")
    faults = (faults_pair(brief, *pair) for pair in zip(questions, answers))
    found = [next(filter(None, those), None) for those in faults]
    yield None if None in found else found[0]


def draft_lists(shelf, dice, brief, reply):
    both = zip(reply["question"], reply["answer"])
    question, answer = dice.pick([pair for pair in both if not any(faults_pair(brief, *pair))])
    answer, facts = answer.rstrip("."), {}
    for i, told in facts_in(brief.rows, answer).items():
        facts |= dict.fromkeys([(audio(i),), *told])
    says, answer = list(map(heard_there, brief.rows)), in_words(answer, list(map(list, facts)))
    return Draft("{question}", {"question": question}, brief.rows, says, *answer)


# MALLM's edits. The words of both sentences are compared, so nothing is left to belief.


def brief_edit(shelf, dice, n, fate) -> Brief:
    text, edit = base_sentence(shelf, dice), chosen(list(EDITS), fate[0])
    known = {"edit": edit, "taken": shelf.elsewhere}
    return Brief({"sentence": text, "edit": f"{edit}: {EDITS[edit]}"}, known=known)


def in_common(a, b) -> int:
    """How many words of a are in b, in the same order."""
    row = [0] * (len(b) + 1)
    for word in a:
        last, row = row, [0]
        for j, other in enumerate(b, 1):
            row.append(last[j - 1] + 1 if word == other else max(row[-1], last[j]))
    return row[-1]


def changed(brief, reply) -> tuple[list, list]:
    """The words that only the first sentence has, and those that only the second has."""
    old, new = (Counter(words(text)) for text in (brief.data["sentence"], reply["sentence"]))
    return list(old - new), list(new - old)


def is_edit(edit, old, new) -> bool:
    lost, gained = (len(some) - in_common(old, new) for some in (old, new))
    if edit == "add":
        return lost == 0 < gained < 3
    if edit == "delete":
        return gained == 0 < lost < 3
    if edit == "restructure":
        return Counter(old) == Counter(new) and 0 < lost < 5
    return lost > 0 < gained and word_errors(old, new) * len(old) < 4.5  # 4 words, if rounded


def faults_edit(brief, reply):
    text, told = reply["sentence"], reply["difference"]
    if text is None:  # draft_edit lets it go; there is no use in asking again
        return
    edit = brief.known["edit"]
    yield unspeakable(text, 2, 16, brief.known["taken"])
    fine = is_edit(edit, words(brief.data["sentence"]), words(text))
    yield unless(fine, f"edit: not what was asked for, {brief.data['edit']}")
    yield unless(told, "difference: there is none")
    yield wrong_sentences(told, 1, 1)
    yield wrong_length("the difference", told, 25, 4)
    yield stray(2, told)
    lost, gained = changed(brief, reply)
    if edit == "restructure":
        fine = re.search(r"\bsame words\b.*\b(?:other|another|different) order\b", told)
        yield unless(fine, "difference: they are the same words in another order")
        return
    yield unless(lost or gained, "edit: the words are the same")
    for own, others, place in ((lost, gained, 1), (gained, lost, 2)):
        here = {word for i, said in by_clip(told) if i == place for word in words(said)}
        silent = [word for word in own if not {word, *words(plain(word))} & here]
        yield unless(not silent, f"difference: {', '.join(silent)} is said in audio {place}")
        wrong = sorted(set(others) & here)  # in one order: the complaint is part of a prompt
        yield unless(not wrong, f"difference: {', '.join(wrong)} is not said in audio {place}")
        yield unless(not own or content(" ".join(own)), "edit: change a word that has a meaning")


def draft_edit(shelf, dice, brief, reply):
    if reply["sentence"] is None:
        raise NoReply("impossible: no such edit of this sentence")
    edit, (lost, gained) = brief.known["edit"], changed(brief, reply)
    facts = [[word] for word in content(" ".join(lost + gained))]
    if edit == "restructure":
        facts = [["same words"], [f"{other} order" for other in ("another", "other", "different")]]
    texts = [brief.data["sentence"], " ".join(words(reply["sentence"]))]
    draft = one_voice(shelf, dice, edit, texts, reply["difference"].rstrip("."), facts)
    return draft._replace(more=scripts_of(draft.rows))


# JASCO's scenes, those of the table and new ones. Both pass the same three checks.

QUESTIONS = (
    "From the sound and from what is said, what are they doing?",
    "Think of where they are and of why it is said. Which activity are they engaged in?",
)


def brief_scene(shelf, dice, n, fate) -> Brief:
    """Half of them are of the table, where it has one for the sounds of the corpus."""
    if fate[1] < 0.5:
        told, sound = scene_of(shelf, dice)
    else:
        told, values = None, shelf.values("category", "sound")
        sound = shelf.draw(dice, ("category", "sound", dice.pick(values)))[0]
    taken = shelf.elsewhere | {tuple(words(scene.sentence)) for scene in SCENES}
    ready = told and {**told._asdict(), "keywords": told.keywords.split(", ")}
    return Brief({"sound": lone_sound(sound)}, [sound], {"ready": ready, "taken": taken})


def names_one(keywords, text) -> bool:
    return any(not misquoted(keyword, text) for keyword in keywords)


def faults_scene(brief, reply):
    keywords, sound = reply["keywords"], brief.data["sound"]
    yield unspeakable(reply["sentence"], 3, 12, brief.known["taken"])
    for field in ("doing", "by_sound", "by_speech"):
        yield wrong_length(f"`{field}`", reply[field], 12, 3)
    yield unless(1 <= len(keywords) <= 4, f"keywords: {len(keywords)}, not 1 to 4")
    for keyword in keywords:
        yield wrong_length("a keyword", keyword, 3)
        plainly = content(keyword) and "," not in keyword
        yield unless(plainly, f'keywords: "{keyword}" names no action')
    yield unless(names_one(keywords, reply["doing"]), "keywords: `doing` holds none of them")
    told = [sound, reply["sentence"], reply["by_sound"], reply["by_speech"]]
    early = ", ".join(text for text in told if names_one(keywords, text))
    yield unless(not early, f'keywords: "{early:.60}" holds one')
    yield unplaced(*told, reply["doing"])


def faults_guess(brief, reply):
    yield wrong_length("`doing`", reply["doing"], 30, 2)


def checks_scene(brief, reply):
    """JASCO's three checks, as (prompt, what it is told, what the reply must be like)."""
    sound, said = brief.data, {"sentence": reply["sentence"]}
    named = partial(names_one, reply["keywords"])
    told = {**sound, **said, "doing": reply["doing"]}
    yield "infer", told, lambda reply: reply["answer"] == "yes"
    for question in QUESTIONS:
        told = {**sound, **said, "question": question}
        yield "guess", told, lambda reply: named(reply["doing"])
    for told in (sound, said):
        yield "alone", told, lambda reply: not named(reply["doing"])


def draft_scene(shelf, dice, brief, reply):
    told = [", ".join(value) if type(value := reply[field]) is list else value
            for field in Scene._fields[1:]]  # fmt: skip
    draft = staged(shelf, dice, Scene(brief.data["sound"], *told), brief.rows[0])
    return draft._replace(more=scripts_of(draft.rows))


ASKS = {  # prompt: what it is told, what is wrong with a reply, the item it makes
    "factual": (brief_factual, faults_factual, draft_factual),
    "keywords": (brief_keywords, faults_keywords, draft_keywords),
    "ordering": (brief_ordering, faults_ordering, draft_ordering),
    "dialogue": (brief_dialogue, faults_dialogue, draft_dialogue),
    "entailment": (brief_entailment, faults_entailment, draft_entailment),
    "temporal": (partial(brief_sounds, timed=True), faults_lists, draft_lists),
    "difference": (brief_sounds, faults_lists, draft_lists),
    "music": (brief_music, faults_lists, draft_lists),
    "edit": (brief_edit, faults_edit, draft_edit),
    "scene": (brief_scene, faults_scene, draft_scene),
}
WRITTEN = {  # task: the prompts that write it
    "comparison": ("difference", "music"), "contrast": ("difference",), "keyword": ("keywords",),
    "entailment": ("entailment",), "factual": ("factual",), "aqa": ("dialogue",),
    "order": ("ordering",), "temporal": ("temporal",), "speech_pair": ("edit",),
    "scene": ("scene",),
}  # fmt: skip


def faults_rephrase(brief, reply):
    """The same answer, and nothing of clips that it is not about."""
    item, answer = brief.known, reply["answer"]
    told, gold = item["meta"]["verdict"], item["gold"]
    about = "" if gold["type"] == "clip" else item["question"].replace("<sound-", "<")
    yield wrong_sentences(answer, 1, 2)
    yield wrong_length("the answer", answer, 40, 2)
    yield stray(len(item["clips"]), answer)
    more = set(named(answer)) - set(named(told)) - set(named(about))
    yield unless(not more, f"reference: {audios(more) if more else ''} is not in the right answer")
    yield unless(score(gold, answer) == 1, "score: it does not come out as the right answer")


REPHRASED = ("choice", "yesno", "clip", "order", "count", "span")  # what has one right answer


# The model behind it. Replies are kept by what was asked, whatever else of a run changes.

MOST = 2048  # tokens of a reply, and twice that where it was cut off
WARMTH = 0.8  # temperature


def tidy(value):
    """A reply's texts on one line and without characters that show nothing."""
    if isinstance(value, str):
        return " ".join(clean(value, keep="\n\t").split())
    if isinstance(value, list):
        return [tidy(each) for each in value]
    return {key: tidy(each) for key, each in value.items()} if isinstance(value, dict) else value


def find_object(text, shape):
    """The first object of that shape in a reply: bare, fenced, after thoughts or inside prose."""
    text = without_thoughts(text)
    for match in itertools.islice(re.finditer("{", text[:40_000]), 100):
        try:
            value = tidy(json.JSONDecoder().raw_decode(text, match.start())[0])
        except (ValueError, RecursionError):
            continue
        if fits(value, shape):
            return value
    return None


def marked(value):
    """Text that would be taken for a clip's place in a prompt."""
    found = re.search(r"(?i)<\W*(?:sound|audio)", json.dumps(value))
    return unless(not found, "marker: no < and no > in any text")


class Writer:
    """A language model: what it was asked and said, what that cost and what came of it."""

    def __init__(self, url, model, journal, threads=8, per_minute=0, price=(0, 0), engine=FORMANT):
        self.model, self.journal = model, Journal(journal)
        self.service = Service(url, model, self.journal, per_minute)
        self.threads, self.price, self.engine = threads, price, engine
        self.lock, self.outcomes = Lock(), defaultdict(Counter)  # what became of a prompt's items

    def hear(self, name, messages, seed) -> tuple:
        """(the reply's object or None, its text, what is wrong with it)"""
        schema = {"name": name, "strict": True, "schema": schema_of(REPLIES[name])}
        for most in (MOST, 2 * MOST):
            said = self.service.say(messages, seed, most, WARMTH, schema)
            text, value = said["content"], find_object(said["content"], REPLIES[name])
            if value is not None:
                return value, text, marked(value)
            if said["finish"] != "length":
                none = "JSON: none of this schema" if text.strip() else "empty: there was no reply"
                return value, text, none
        raise NoReply("cut off")

    def ask(self, name, brief, faults, seed) -> dict:
        """A reply without a fault: the first, or the one after a complaint; NoReply if neither."""
        schema = json.dumps(schema_of(REPLIES[name]))
        messages = [
            {"role": "system", "content": f"{PROMPTS[name]}\n\n{RULES}\n\nSchema: {schema}"},
            {"role": "user", "content": json.dumps(tidy(brief.data), ensure_ascii=False)},
        ]
        for _ in range(2):
            value, text, wrong = self.hear(name, messages, seed)
            wrong = wrong or next(filter(None, faults(brief, value)), None)
            if wrong is None:
                return value
            again = f"That cannot be used. {wrong}. Write the whole object again, without it."
            messages += [{"role": "assistant", "content": text[:8000] or "{}"},
                         {"role": "user", "content": again}]  # fmt: skip
        raise NoReply(wrong)

    def count(self, name, outcome):
        with self.lock:
            self.outcomes[name][outcome.partition(":")[0]] += 1

    # --- items

    def begin(self, shelf, plan, settings, path):
        """What the prompts can write with this shelf, tasks included that rules cannot."""
        shelf.engine = self.engine
        shelf.elsewhere = scripts_elsewhere(path, settings["split"])
        self.prompts, split = {}, settings["split"]
        for task in settings["tasks"]:
            most = 1 if TASKS[task].skill == "single" else settings["clips"]
            for n in range(TASKS[task].least, most + 1):
                for name in WRITTEN.get(task, ()):
                    if comes_out(shelf, split, ASKS[name][0], n):
                        self.prompts.setdefault((task, n), []).append(name)
        for task, n in self.prompts:
            if not any(kinds for kinds in plan.get(task, {}).values()):
                plan.setdefault(task, {})[n] = []

    def spread(self, numbers):
        """Each item, in a list, or an empty one: in order, however many are under way."""
        numbers = iter(numbers)
        with ThreadPoolExecutor(self.threads) as pool:
            while some := list(itertools.islice(numbers, 100 * self.threads)):
                yield from ([item] if item else [] for item in pool.map(self.item, some))

    def item(self, i) -> dict | None:
        """Item i, of the task and with as many clips as rules would give it."""
        shelf, plan, settings = KEPT
        split, seed = settings["split"], settings["seed"]
        task = task_of(i, plan, settings["mix"], settings["single"])
        dice = Dice(split, seed, 2 + SPLITS.index(split), i)
        n = chosen(sorted(plan[task]), dice.rng.random())
        asked = int(np.random.default_rng([seed, 5, i]).integers(1 << 31))
        if names := self.prompts.get((task, n)):
            name = chosen(names, dice.rng.random())
            return self.compose(shelf, dice, name, task, n, f"{split}-{seed}-{i:07d}", asked)
        item = make_item(shelf, plan, settings, i)
        return self.rephrase(item, asked) if item else None

    def compose(self, shelf, dice, name, task, n, id, seed) -> dict | None:
        tell, faults, make_draft = ASKS[name]
        try:
            brief = material(shelf, dice, tell, n)
            ready = brief.known.get("ready")  # a scene that rules have written
            reply = ready or self.ask(name, brief, faults, seed)
            self.check(checks_scene(brief, reply) if name == "scene" else (), seed)
            draft = make_draft(shelf, dice, brief, reply)
            if name == "ordering":
                events = sorted(reply["events"], key=lambda event: event["part"])
                told = {**brief.data, "events": [event["description"] for event in events]}
                why = self.improve("rationale", Brief(told), faults_rationale, seed)
                draft = draft._replace(reason=why and why["rationale"])
            item = write_item(draft, dice, task, id)
            if score(item["gold"], item["answer"]) != 1:
                raise NoReply("score: not even its own answer is right")
        except (NoReply, Miss) as dropped:  # a miss mostly says nothing
            self.count(name, str(dropped) or "corpus: nothing to tell of")
            return None
        by_model = {"kind": f"llm-{name}", "model": self.model}
        item["meta"] |= {"kind": scene_heard.__name__} if ready else by_model
        write_made(shelf, id, draft.rows)
        self.count(name, "accepted")
        return item

    def check(self, checks, seed):
        """Further questions on a reply; none is asked twice, or its answer would be begged for."""
        for name, told, holds in checks:
            faults = faults_guess if name != "infer" else lambda *_: ()
            try:
                reply = self.ask(name, Brief(told), faults, seed)
            except NoReply as dropped:
                raise NoReply(f"{name}, {dropped}") from None
            if not holds(reply):
                raise NoReply(f"{name}: {json.dumps(reply)} to {json.dumps(told)}")

    def improve(self, name, brief, faults, seed):
        """A reply, or None: then an item stays as it was, which is as good."""
        try:
            reply = self.ask(name, brief, faults, seed)
        except NoReply as dropped:
            self.count(name, f"kept, {dropped}")
            return None
        self.count(name, "accepted")
        return reply

    def rephrase(self, item, seed) -> dict:
        """An item by rules, its answer in the model's words if they are right."""
        if item["gold"]["type"] not in REPHRASED or len(item["clips"]) < 2:
            return item
        told = {"question": item["question"], "right answer": item["meta"]["verdict"],
                "heard": item["meta"]["evidence"]}  # fmt: skip
        if reply := self.improve("rephrase", Brief(told, (), item), faults_rephrase, seed):
            item["answer"], item["meta"]["model"] = reply["answer"], self.model
        return item

    def report(self):
        """What became of what was asked for, and what it cost."""
        for name, outcomes in sorted(self.outcomes.items()):
            good, asked = outcomes["accepted"], outcomes.total()
            rest = ", ".join(f"{why} {count}" for why, count in outcomes.most_common()
                             if why != "accepted")  # fmt: skip
            print(clean(f"  {name:10} {asked:6} asked, {good:6} accepted  {rest}"))
        for label, spent in (("this run", self.journal.new), ("before", self.journal.old)):
            dollars = (spent["read"] * self.price[0] + spent["written"] * self.price[1]) / 1e6
            cost = f", ${dollars:.2f}" if any(self.price) else ""
            told = f"{spent['read']} tokens read, {spent['written']} written{cost}"
            print(clean(f"  {label}: {spent['replies']} replies, {told}"))
        self.outcomes.clear()


def scripts_elsewhere(path, split) -> set:
    """The made-up scripts in files of other splits beside this one that are whole: on several ranks
    `--train N --bench 0` comes first."""
    found = set()
    for file in path.parent.glob("*.jsonl"):
        kind = re.fullmatch(r"(train|bench|bench-dev)(-[0-9a-f]{8}-\d+-of-\d+)?", file.stem)
        other = {"train": "train", "bench": "test", "bench-dev": "dev"}.get(kind and kind[1])
        if other in (None, split):
            continue
        try:
            for _, row in read_values(file, lambda mistake: None):
                for script in row.get("meta", {}).get("made", ()) if isinstance(row, dict) else ():
                    said = tuple(words(script["text"]))
                    found |= {said} if len(said) > 2 else set()
        except BadInput:
            if file.exists():
                raise
            return scripts_elsewhere(path, split)  # a shard, and by now part of the whole
    return found


# ------------------------------------------------------------------------------------------------
# Files. A file is made in chunks, each by any worker, and written in order; what a killed run had
# written is kept. Of n shards each is a file of its own, and whoever ends last joins them.

CHUNK = 250  # items
KEPT = None  # a worker's shelf, plan and settings


def open_shelf(settings, out) -> tuple[Shelf, Counter]:
    """The clips of a split, and what was left out: what is tested on is not trained on, so a train
    clip with a voice or script of dev or test goes, and a dev clip with one of test."""
    split, taken, shelf, lost = settings["split"], set(), Shelf(out), Counter()
    shelf.sentences = read_sentences(settings["sentences"], split)
    later = SPLITS[SPLITS.index(split) + 1 :]  # of train, dev, test
    for path in settings["corpus"] if later else ():
        for row in read_corpus(path, lambda mistake: None):
            if row["split"] in later:
                taken.update(held_by(row))
    for path in settings["corpus"]:
        folder = os.path.relpath(Path(path).parent, out)
        for row in read_corpus(path, partial(refuse_row, lost, f"unreadable rows of {path}")):
            if row["split"] != split:
                continue
            if taken.isdisjoint(held_by(row)):
                row["path"] = os.path.normpath(os.path.join(folder, row["path"]))
                row.pop("wave", None)  # that is what a clip of our own making has
                shelf.add(qualified(row))
            else:
                lost[f"{split} clips whose voice, script or sound is held out"] += 1
    shelf.close()
    return shelf, lost


SHOWN = 5  # of each kind of mistake; the rest is counted


def refuse_row(lost, reason, mistake):
    lost[reason] += 1
    if lost[reason] <= SHOWN:
        warn(str(mistake))


SAYABLE = re.compile("[a-z][a-z']{0,19}").fullmatch


def read_sentences(path, split) -> list[str]:
    """The lines of a text that belong to a split and can be spoken: 4 to 14 words of Latin letters.
    The first million of them are enough."""
    if not path:
        return []
    lines = ([word.strip("'") for word in words(line)] for line in read_lines(path))
    said = ([word for word in line if word] for line in lines)  # not a quotation mark by itself
    fit = (" ".join(those) for those in said if 4 <= len(those) <= 14 and all(map(SAYABLE, those)))
    own = (text for text in fit if split_of(text) == split)
    found = list(itertools.islice(own, 1_000_000))
    wanted = f"lines of 4 to 14 words in Latin letters, some for the split {split}"
    expect(found, path, wanted, "none")
    return found


def qualified(row) -> dict:
    """Names that two corpora may both use, for different people and stories, with the corpus's."""
    own, row = namespace(row), dict(row)
    if "speaker" in row:
        row["speaker"] = f"{own}: {row['speaker']}"
    for field, name in (("order", "group"), ("dialogue", "id")):
        if field in row:
            row[field] = {**row[field], name: f"{own}: {row[field][name]}"}
    return row


def namespace(row) -> str:
    """Both LibriSpeechs number the same people."""
    return row["corpus"].removeprefix("mini-")


def held_by(row) -> dict:
    """What two splits must not share: {eight bytes: which of clip, voice, script or sound}. A
    command of one or two words is no script: everybody says it."""
    keys = [("clip", row["corpus"], row["id"])]
    keys += [("voice", namespace(row), row["speaker"])] if "speaker" in row else []
    keys += [("sound", row["hash"])] if "hash" in row else []
    said = words(row.get("transcript", ""))
    keys += [("script", *said)] if len(said) > 2 else []
    return {hashlib.blake2b(repr(key).encode(), digest_size=8).digest(): key[0] for key in keys}


def begin(settings, out, engine) -> Counter:
    """Take the shelf of these settings in hand, once in each process; what was left out of it."""
    global KEPT
    shelf, lost = open_shelf(settings, out)
    shelf.engine = engine
    plan = plan_tasks(shelf, settings["split"], settings["tasks"], settings["clips"])
    KEPT = shelf, plan, settings
    return lost


def make_chunk(settings, out, engine, start) -> list[dict]:
    """Items start .. start + CHUNK, those that came out."""
    if KEPT is None or KEPT[2] != settings:  # a worker that inherited none
        begin(settings, out, engine)
    numbers = range(start, min(start + CHUNK, settings["last"]))
    return list(filter(None, (make_item(*KEPT, i) for i in numbers)))


def write_questions(path, settings, workers, writer=None, engine=FORMANT):
    """Write the settings' items to a file, and say how many of each task there are."""
    out, begun_at = path.parent, time.monotonic()
    lost = begin(settings, out, engine)
    shelf, plan, _ = KEPT
    if writer:
        writer.begin(shelf, plan, settings, path)
    wanted = f"clips of the split {settings['split']} that feed a task"
    several = any(TASKS[task].skill != "single" for task in settings["tasks"])
    fed = [task for task in plan if TASKS[task].skill != "single" or not several]
    expect(fed, ", ".join(settings["corpus"]), wanted, f"{len(shelf)}, which feed none")
    for reason, count in lost.items():
        warn(f"{count} {reason}: left out")
    if missing := [task for task in settings["tasks"] if task not in plan]:
        warn(f"{path.name}: what is known of these clips feeds no {', '.join(missing)}")
    part = Path(f"{path}.{fingerprint(settings)}.part")
    file = open_alone(part)
    counts, start = resume(part, settings["first"])
    total, done = settings["last"] - settings["first"], start - settings["first"]
    show = progress(path.name, total, done, unit="items", scale=1)
    step = 1 if writer else CHUNK
    starts = range(start, settings["last"], step)
    with file, worker_map(1 if writer else workers) as spread:
        job = partial(make_chunk, settings, out, engine)
        chunks = writer.spread(starts) if writer else spread(job, starts)
        for number, items in zip(starts, chunks):
            lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
            file.write("".join(lines).encode())
            file.flush()
            counts.update(item["task"] for item in items)
            show(min(step, settings["last"] - number))
        part.replace(path)  # before another run may have it
    each = ", ".join(f"{task} {counts[task]}" for task in settings["tasks"] if counts[task])
    failed = total - counts.total()
    rate = (total - done) / (time.monotonic() - begun_at)
    told = f"; {failed} came to nothing" if failed else ""
    print(clean(f"{path}: {counts.total()} items ({each}){told}; {rate:.0f} a second"))
    if writer:
        writer.report()


def open_alone(part):
    """The file to append to, for this run alone: two would write everything twice. Workers of one
    that was killed hold it for the moment that they outlive it."""
    end = time.monotonic() + 2
    while True:
        file = open(part, "ab")
        try:
            hold(file, part)
            if part.exists() and os.path.samestat(os.fstat(file.fileno()), part.stat()):
                return file  # and not what another run has just finished
        except BadInput:
            if time.monotonic() > end:
                raise
        file.close()
        time.sleep(0.05)


def fingerprint(settings) -> str:
    """Of all that an item depends on: a half-written file of other settings is another file."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in filter(None, [*settings["corpus"], settings["sentences"]]):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:8]


def resume(part, first) -> tuple[Counter, int]:
    """What a killed run left: how many of each task its whole chunks hold, and where to go on. The
    last chunk may be torn, and goes."""
    counts, inside, start, place, offset = Counter(), Counter(), first, 0, 0
    if not part.exists():
        return counts, start
    with open(part, "r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            item = json.loads(line)
            chunk = first + (int(item["id"].rpartition("-")[2]) - first) // CHUNK * CHUNK
            if chunk > start:
                counts, inside, start, place = counts + inside, Counter(), chunk, offset
            inside[item["task"]] += 1
            offset += len(line)
        file.truncate(place)
    return counts, start


def shared_between(train, bench, corpora) -> Counter:
    """What the clips of two files both hold, by kind; it must be nothing."""
    held, ids = {}, {}
    for path in (train, bench):
        whole = [id for row in read_rows(path, heard=False) for id in row["meta"].get("ids", ())]
        ids[path] = {*whole, *(part for id in whole for part in id.split("+"))}  # made of several
        held[path] = {}
    for corpus in corpora:
        for row in read_corpus(corpus, lambda mistake: None):
            for path in (train, bench):
                if row["id"] in ids[path]:
                    held[path].update(held_by(row))
    common = held[train].keys() & held[bench].keys()
    return Counter(held[train][key] for key in common)


def run_check(args):
    shared = shared_between(args.train, args.bench, args.corpus)
    for kind in ("clip", "voice", "script", "sound"):
        print(f"{shared[kind]} of the same {kind}")
    sys.exit(int(shared.total() > 0))


# ------------------------------------------------------------------------------------------------
# Showing one item as a person would want to see it.


def run_show(args):
    wanted = int(args.which) if args.which.isdecimal() else None
    for number, row in enumerate(read_rows(args.file, heard=False), 1):
        if number == wanted or row["id"] == args.which:
            break
    else:
        raise BadInput(f"{args.file}: expected an item {args.which}, found none")
    print(clean(f"{row['id']}  {row['skill']}: {row['task']}  ({row['source']})"))
    says = {e["clip"]: e["says"] for e in row["meta"].get("evidence", ()) if "says" in e}
    for i, clip in enumerate(row["clips"], 1):
        part = clip if isinstance(clip, str) else f"{clip['path']} {clip.get('start', 0)}.."
        print(clean(f"  {audio(i)}  {part}" + (f"  [{says[i]}]" if i in says else "")))
    for message in conversation(row):
        print(clean(f"{message['role']:>9}: {message['content']}", keep="\n"))
    if "gold" in row:
        told = json.dumps(row["gold"], ensure_ascii=False)
        print(clean(f"     gold: {told}  (chance {chance(row):.2f})"))
    for i, clip in enumerate(row["clips"] if args.play_out else (), 1):
        write_clip(args.play_out / f"{i}.flac", load_clip(clip, Path(args.file).parent))
        print(clean(f"  {args.play_out / f'{i}.flac'}"))


# ------------------------------------------------------------------------------------------------
# The command line.


def run_questions(args):
    shard, shards = which_shard(args.shard)
    recipe = RECIPES[args.recipe]
    mix = read_mix(args.mix) if args.mix else recipe.mix
    single = recipe.single if args.single is None else args.single
    out = args.out or Path("data", "toy" if args.recipe == "polyaudio" else args.recipe)
    check_flags(args)
    expect(0 <= single <= 1, "--single", "a share, 0 to 1", single)
    out.mkdir(parents=True, exist_ok=True)
    engine = engine_of(args, args.tts_model)
    common = {
        "seed": args.seed, "clips": args.max_clips, "mix": mix, "tasks": recipe.tasks,
        "corpus": args.corpus or [str(world_for(args, out, engine))], "sentences": args.sentences,
        "voice": [engine.kind, engine.model, engine.voices],
    }  # fmt: skip
    writer = None
    if args.llm:
        writer = writer_of(args, shard_file(out / "llm.jsonl", shard, shards), engine)
        common["llm"] = writer.model
    paper = args.recipe == "polyaudio"  # its bench has a tenth more items, on single clips
    bench = "bench.jsonl" if args.split == "test" else f"bench-{args.split}.jsonl"
    for path, split, count, alone in (
        (out / "train.jsonl", "train", args.train, single),
        (out / bench, args.split, args.bench + args.bench // 10 * paper,
         args.bench if paper else single),
    ):  # fmt: skip
        if not count:
            continue
        settings = {**common, "split": split, "single": alone, "first": 0, "last": count}
        mark = f"{fingerprint(settings)}-"
        first, last = (count * k // shards for k in (shard, shard + 1))
        mine = shard_file(path, shard, shards, mark)
        settings |= {"first": first, "last": last}
        if shards == 1 or not mine.exists():  # a shard of these very settings may be whole
            write_questions(mine, settings, args.workers, writer, engine)
        if shards > 1:
            join_shards(path, shards, mark)


def check_flags(args):
    """Numbers within their limits, and no flag that would do nothing."""
    for flag, number, least in (("--train", args.train, 0), ("--bench", args.bench, 0),
                                ("--workers", args.workers, 1)):  # fmt: skip
        expect(number >= least, flag, f"{least} or more", number)
    expect(args.train + args.bench, "--train and --bench", "a number of items in one", "0 and 0")
    expect(2 <= args.max_clips <= 100, "--max-clips", "2 to 100", args.max_clips)
    fine = args.clips is None or 0 < args.clips < 10**7
    expect(fine, "--clips", "1 to 9999999", args.clips)
    for flag, given, beside, holds in (
        ("--clips", args.clips, "no --corpus beside it", not args.corpus),
        ("--mix", args.mix, "--recipe polyaudio", args.recipe == "polyaudio"),
        ("--sentences", args.sentences, "--recipe mallm beside it", args.recipe == "mallm"),
        ("--model", args.model, "--llm beside it", args.llm),
        ("--price", args.price != "0/0", "--llm beside it", args.llm),
        ("--per-minute", args.per_minute, "--llm beside it", args.llm),
    ):
        expect(holds or not given, flag, beside, "none")


def writer_of(args, journal, engine) -> Writer:
    """The language model, by its flags."""
    fine = re.match(URL, args.llm)
    expect(fine, "--llm", "a URL that begins with http:// or https://", repr(args.llm))
    expect(args.model, "--model", "the name of the language model, beside --llm", "none")
    expect(1 <= args.concurrency <= 256, "--concurrency", "1 to 256", args.concurrency)
    expect(args.per_minute >= 0, "--per-minute", "0 or more", args.per_minute)
    price = re.fullmatch(r"(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)", args.price)
    expect(price, "--price", "two numbers, as in 0.15/0.60", repr(args.price))
    leave_at_once()
    price = tuple(map(float, price.groups()))
    return Writer(args.llm, args.model, journal, args.concurrency, args.per_minute, price, engine)


def read_mix(asked) -> dict:
    fine = re.fullmatch(r"\d+(/\d+){3}", asked)
    expect(fine, "--mix", "four numbers, as in 30/25/25/20", repr(asked))
    shares = dict(zip(MIX, map(int, asked.split("/"))))
    expect(any(shares.values()), "--mix", "one that is more than 0", asked)
    return shares


def world_for(args, out, engine) -> Path:
    """A world of its own, made once; whoever comes while it is made waits for it."""
    folder, clips = out / "world", args.clips or 18_000
    with open(out / "world.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "corpus.jsonl").exists():
            open_world(folder, world_settings(clips, args.seed, engine))
        else:
            for reason in make_world(folder, clips, args.seed, engine, args.workers):
                warn(reason)
    return folder / "corpus.jsonl"


def add_voices(add):
    # fmt: off
    add("--voice", choices=("formant", "espeak"), default="formant",
        help="who speaks: the synthesiser in here (default), or espeak-ng")
    add("--tts", metavar="URL", help="a server with /v1/audio/speech speaks instead")
    add("--voices", metavar="FILE",
        help=f"JSON, the server's names for {' '.join(TEN.values())}")
    add("--cache", default="data/speech", metavar="DIR",
        help="where espeak-ng's or the server's sentences are kept, default: data/speech")
    # fmt: on


def main():
    parser = Parser(
        description="Make questions on several sounds, and the sounds.",
        epilog="Without a command: train.jsonl and bench.jsonl.",
    )
    parser.set_defaults(run=run_questions)
    add = parser.add_argument
    # fmt: off
    add("--out", type=Path, metavar="DIR", help="default: data/toy, or data/ and the recipe's name")
    add("--train", type=int, default=100_000, metavar="N", help="items; default: 100000")
    add("--bench", type=int, default=2000, metavar="M",
        help="items, and a tenth more on single clips, default: 2000")
    add("--split", choices=SPLITS[1:], default="test",
        help="what the bench draws from; dev is for tuning, and goes to bench-dev.jsonl")
    add("--seed", type=int, default=0, metavar="S", help="another one, other items")
    add("--corpus", nargs="+", metavar="FILE",
        help="corpus.jsonl of clips to ask about; without it a world is made under --out")
    add("--clips", type=int, metavar="N", help="of that world, default: 18000")
    add("--max-clips", type=int, default=5, metavar="N", help="in one item, default: 5")
    add("--mix", metavar="A/B/C/D",
        help=f"how often {', '.join(MIX)} are asked for, default: 30/25/25/20 as in the paper")
    add("--single", type=float, metavar="SHARE",
        help="of train.jsonl, on one clip, default: 0.25 (MALLM's pairs: 0.52)")
    add("--recipe", choices=RECIPES, default="polyaudio",
        help="PolyAudio's questions (default), MALLM's pairs, JASCO's scenes, CompA's captions")
    add("--sentences", metavar="FILE", help="text, a sentence a line, for MALLM's pairs of them")
    add("--workers", type=int, default=cores(), metavar="W", help="default: one per core")
    add("--shard", metavar="I/N",
        help="make the I-th of N parts; the last to end joins them; torchrun sets it by itself")
    add("--llm", metavar="URL",
        help="a language model with /v1/chat/completions writes too; a key is OPENAI_API_KEY")
    add("--model", metavar="NAME", help="its name there")
    add("--concurrency", type=int, default=8, metavar="N", help="at once, default: 8")
    add("--per-minute", type=float, default=0, metavar="N", help="at most, default: no limit")
    add("--price", default="0/0", metavar="IN/OUT", help="dollars for a million tokens in and out")
    add("--tts-model", default="tts-1", metavar="NAME", help="the speech server's model")
    add_voices(add)
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(name, run, help):
        parser = commands.add_parser(name, help=help)
        parser.set_defaults(run=run)
        return parser.add_argument

    add = command("world", run_world, "render the toy world: corpus.jsonl and its clips")
    add("--out", type=Path, default=Path("data/world"), metavar="DIR", help="default: data/world")
    add("--clips", type=int, default=9000, metavar="N", help="default: 9000")
    add("--seed", type=int, default=0, metavar="S", help="another one, other clips")
    add("--workers", type=int, default=cores(), metavar="W", help="default: one per core")
    add("--model", default="tts-1", metavar="NAME", help="the server's model")
    add_voices(add)
    add = command("clips", run_clips, "render six short clips to try things on")
    add("--out", type=Path, default=Path("clips"), metavar="DIR", help="default: clips")
    add("--seed", type=int, default=0, metavar="S")
    add = command("check", run_check, "do two files share a clip, voice, script or sound?")
    add("train", metavar="TRAIN", help="train.jsonl")
    add("bench", metavar="BENCH", help="bench.jsonl")
    add("--corpus", nargs="+", required=True, metavar="FILE", help="both files' own")
    add = command("show", run_show, "print one item of a file, or write its clips")
    add("file", help="train.jsonl or bench.jsonl")
    add("which", help="its number in the file, from 1, or its id")
    add("--play-out", type=Path, metavar="DIR", help="write its clips here, as flac")
    # fmt: on
    args = parser.parse_args()
    expect(args.seed >= 0, "--seed", "0 or more", args.seed)
    args.run(args)


if __name__ == "__main__":
    cli(main)
