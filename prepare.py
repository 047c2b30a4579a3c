"""Turn files into tensors: what a clip is, what a token is, how a prompt is laid out.

    from prepare import load_audio, log_mel, Tokenizer
    wave = load_audio("dog.flac")              # (n,) float32, 16 kHz, mono
    mel = log_mel(wave)                        # (128, F) float32, ten milliseconds a frame
    tok = Tokenizer.from_dir("weights/af3")
    asked = [{"role": "user", "content": "Which clip is louder?"}]
    ids = tok.encode_prompt(asked, n_slots=[75, 50], layout="native")

    python prepare.py weights nvidia/audio-flamingo-3-hf --out weights/af3    # --help has more
    python prepare.py corpus esc50 --root /data/esc50 --out corpus.jsonl --download
    python prepare.py show dog.flac --corpus corpus.jsonl     # length, level, a picture, its row

Everything downstream stands on five ideas, in this order:
  1. a clip is 16 kHz mono, cut into windows of at most 30 s;
  2. a window becomes frames (10 ms), the encoder halves them to positions (20 ms) and pools
     those in pairs to slots (40 ms): the rows that the decoder reads in place of words;
  3. a token comes from the checkpoint's own BPE files, and no text from outside can ever become
     a special token;
  4. a prompt is text with a run of slots wherever a clip belongs;
  5. an example is a question on several clips, with a gold that a program can score.
This file imports nothing of ours. Every other script imports it.
"""

import argparse
import codecs
import csv
import fcntl
import gzip
import hashlib
import heapq
import io
import itertools
import json
import lzma
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tarfile
import threading
import time
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

import numpy as np
import requests
import soundfile
import tiktoken
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

# ------------------------------------------------------------------------------------------------
# Mistakes. A user's mistake is one line on stderr and exit code 2, never a traceback; the line
# says which file, which field, what was expected and what was found.


class BadInput(Exception):
    """Something from outside is not what it has to be; the message is the whole explanation."""


def expect(holds, where, expected, found, most=0):
    """The usual form of such a message, raised unless the condition holds. With `most`, found is
    any value, written out where the message is needed, and cut to that many characters."""
    if not holds:
        found = f"{found!r:.{most}}" if most else found
        raise BadInput(f"{where}: expected {expected}, found {found}")


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line, like every other complaint here. Every script says its
    version, and its help ends with the commands of its docstring."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        how = {"nargs": 0, "default": argparse.SUPPRESS, "help": "of this code and of torch"}
        self.add_argument("--version", action=Version, **how)

    def error(self, message):
        bare = re.search("expected (at least )?one argument|unrecognized", message)
        dash = "; a name that begins with - is written ./-name" if bare else ""
        self.exit(2, f"{self.prog}: {clean(message)}{dash} (--help lists the flags)\n")

    def format_help(self):
        lines = (sys.modules["__main__"].__doc__ or "").splitlines()
        commands = [line for line in lines if line.startswith("    ") and self.prog in line]
        shown = "\n".join(["", "for example:", *commands, ""]) if commands else ""
        return super().format_help() + shown


class Version(argparse.Action):
    """Asks git only when it is asked itself."""

    def __call__(self, parser, *_):
        print(f"polyaudio {git_hash()}, torch {torch.__version__}")
        parser.exit()


def cli(main):
    """Run a script's main(): 2 on bad input, 130 on Ctrl-C, quiet when a pipe's reader has left."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a letter shows "?"
    try:
        main()
        sys.stdout.flush()
    except BadInput as mistake:
        sys.exit(fail(mistake))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the interpreter would flush stdout once more and complain
        sys.exit(141)
    except OSError as error:
        sys.exit(fail(f"{error.filename or 'disk'}: {error.strerror or error}"))


def fail(mistake) -> int:
    print(f"{Path(sys.argv[0]).name}: {clean(str(mistake))}", file=sys.stderr)
    return 2


@lru_cache(maxsize=None)  # so each is said once, however often its cause comes by
def warn(message):
    print(f"warning: {clean(message)}", file=sys.stderr)


def note(message):
    """What is good to know, for people only: stderr, and quiet when nobody watches it."""
    if sys.stderr.isatty():
        print(clean(message), file=sys.stderr)


DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # turn text around


def clean(text, keep="") -> str:
    """Text that is safe to show on a terminal: a model's answer, a file's name or a user's words
    may hold characters that move the cursor, recolour the screen or reverse what is read."""
    kinds = ("Cc", "Cs", "Zl", "Zp")  # controls, halves of characters, line ends
    harmless = (c for c in text if unicodedata.category(c) not in kinds or c in keep)
    return "".join(c for c in harmless if c not in DIRECTIONS)


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: expected JSON, found something else ({error})") from None


@contextmanager
def written(path):
    """A file to write text to. It is written beside, then renamed: a reader sees the old file or
    the new one, never half of one; and where writing fails, nothing is left beside it."""
    beside = Path(f"{path}.part")
    try:
        file = open(beside, "w", encoding="utf-8", errors="replace", newline="\n")
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror})") from None
    try:
        with file:
            yield file
    except BaseException:
        beside.unlink()
        raise
    beside.replace(path)


def write_json(path, value):
    with written(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def git_hash() -> str:
    """Of this code, as far as anybody knows: not that of a repository around a copy of it."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True,
                              text=True, timeout=10).stdout.strip()  # fmt: skip

    try:
        within = git("rev-parse", "--show-prefix")
        return not within and git("describe", "--always", "--dirty") or "no git here"
    except (OSError, subprocess.TimeoutExpired):
        return "no git here"


# ------------------------------------------------------------------------------------------------
# Worker processes: none outlives its job, whoever kills what.


def cores() -> int:
    """That this process may use: a container often has fewer than the machine."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": two cores' time; or "max 100000"
    quota, period = limit.read_text().split() if limit.exists() else ("max", "")
    return count if quota == "max" else max(1, min(count, round(int(quota) / int(period))))


@contextmanager
def worker_map(count, method=None, chunksize=1):
    """map() by `count` worker processes, or the plain one where that is 1. `method` is how they
    are started, by default as this machine does it; each gets `chunksize` things at a time."""
    if count == 1:
        yield map
        return

    def spread(job, things):  # pool.map() would cancel on the way out what the killed still had
        things = iter(things)
        chunks = iter(lambda: list(itertools.islice(things, chunksize)), [])
        waiting = deque(pool.submit(do_each, job, chunk) for chunk in chunks)
        while waiting:  # what was taken is let go
            yield from waiting.popleft().result()

    with ProcessPoolExecutor(count, get_context(method), follow) as pool:
        try:
            yield spread
        except BrokenProcessPool:
            why = "expected all of them to live, found one that was killed"
            hint = "perhaps for want of memory: try fewer"
            raise BadInput(f"--workers {count}: {why}, {hint}") from None
        except BaseException:  # Ctrl-C too: nobody waits for what is under way
            for worker in active_children():
                worker.kill()
            raise


def do_each(job, things) -> list:
    return [job(thing) for thing in things]


def follow():
    """A worker ends with whoever started it, kill -9 included, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# ------------------------------------------------------------------------------------------------
# Shards: several runs, on one machine or many, that each make a part of a file.


def which_shard(asked) -> tuple[int, int]:
    """--shard 3/8, or what torchrun says: (2, 8), counted from 0."""
    ranks = [os.environ.get(name, number) for name, number in (("RANK", "0"), ("WORLD_SIZE", "1"))]
    if asked is None and all(map(str.isdecimal, ranks)):
        asked = f"{int(ranks[0]) + 1}/{ranks[1]}"
    given = asked or "/".join(ranks)
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", given)
    fine = match and 1 <= int(match[1]) <= int(match[2])
    expect(fine, "--shard (or RANK/WORLD_SIZE)", "i/n with i in 1..n", given, 80)
    return int(match[1]) - 1, int(match[2])


def hold(file, name):
    """A file or folder, open, for this run alone: until it is closed or the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"{name}: expected one run at a time, found another") from None


def shard_file(path, shard, shards, mark="") -> Path:
    """A shard's file; `mark` keeps those of other settings apart."""
    named = f"{path.stem}-{mark}{shard:05d}-of-{shards:05d}{path.suffix}"
    return path.with_name(named) if shards > 1 else path


def join_shards(path, shards, mark):
    """One file of all shards' files, once they are all there; whoever comes last does it, and is
    told so."""
    parts = [shard_file(path, shard, shards, mark) for shard in range(shards)]
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(part.exists() for part in parts):
            return False
        joined = Path(f"{path}.part")
        with open(joined, "wb") as file:
            for part in parts:
                with open(part, "rb") as piece:
                    shutil.copyfileobj(piece, file)
        joined.replace(path)
        for part in parts:
            part.unlink()
    print(clean(f"{path}: {shards} shards joined"), file=sys.stderr)
    return True


# ------------------------------------------------------------------------------------------------
# Clips: any file that libsndfile reads (wav, flac, ogg, mp3, ...) -> 16 kHz mono float32.

RATE = 16_000  # samples a second, everywhere after load_audio
MAX_CHANNELS = 32
RATES = (1_000, 768_000)  # what a header may say; beyond that it is damaged
EVEN = 100_000  # from here on rates end in 00: another one would take thousands of long filters
READ_BLOCK = 1 << 22  # samples decoded at a time, so that 32 channels never lie in memory whole
LEAD = 1 << 18  # frames decoded before a block of ogg or mp3, and dropped


def load_audio(path, start=0, end=None) -> np.ndarray:
    """The clip at `path` (or a file object), from `start` to `end` seconds: (n,) float32, 16 kHz.

    A slice of a long file is read by seeking, with just enough around it for the resampler, so it
    equals the same slice of the whole file.
    """
    with open_audio(path) as (name, file):
        return read_slice(name, file, start, end)


@contextmanager
def open_audio(path):
    """(name, SoundFile) with a header that holds. What is wrong with the file, now or when it is
    read, is one line that names it."""
    name = path
    if hasattr(path, "read"):
        name = getattr(path, "name", "a file object")
    else:
        check_file(path)
        path = os.fsencode(path)  # a name need not be Unicode, which soundfile asks of a text
    try:
        try:
            opened = soundfile.SoundFile(path)
        except TypeError as error:  # a .raw file: nothing says what its bytes mean
            raise BadInput(f"{name}: cannot be decoded as audio ({error})") from None
        with opened as file:
            check_header(name, file)
            yield name, file
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip().rstrip(".")
        raise BadInput(f"{name}: cannot be decoded as audio ({reason})") from None


def check_file(path, what="an audio file"):
    path = Path(path)
    try:
        found = path.stat()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error.args[-1]})") from None
    expect(not path.is_dir(), path, what, "a folder")
    if found.st_size == 0 and path.is_file():
        raise BadInput(f"{path}: the file is empty")


def check_header(name, file):
    if file.channels > MAX_CHANNELS:
        raise BadInput(f"{name}: channels: expected at most {MAX_CHANNELS}, found {file.channels}")
    rate, usual = file.samplerate, f"{RATES[0]} to {RATES[1]} Hz, from {EVEN} on whole hundreds"
    fine = RATES[0] <= rate <= RATES[1] and (rate < EVEN or rate % 100 == 0)
    expect(fine, f"{name}: sample rate", usual, rate)
    if file.frames == 0:
        raise BadInput(f"{name}: holds no samples")
    promised, held = promised_bytes(file)
    if promised > held + 1:  # some writers count the byte that makes it even
        length = file.frames / file.samplerate
        raise truncated(name, length * promised / max(held, 1), length)


def truncated(name, promised: float, held: float) -> BadInput:
    return BadInput(
        f"{name}: truncated: the header promises {promised:.2f} s, the file holds {held:.2f} s"
    )


def read_slice(name, file, start, end) -> np.ndarray:
    """Seek, decode, mix down, resample. Positions are counted in samples of the file (`first`,
    `last`), in samples at 16 kHz (`begin`, `finish`), and in blocks, `down` of the former or `up`
    of the latter, at whose borders the two grids meet: reading starts on such a border."""
    rate, length = file.samplerate, check_slice(name, file, start, end)
    begin = round(start * RATE)
    up, down = rate_ratio(rate)
    margin = filter_half_width(up, down) // down + 1  # in blocks of `down` input samples
    block = max(0, begin // up - margin) if rate != RATE else begin // up
    first, last = block * down, None
    finish = None
    if end is not None:
        finish = round(min(end, length) * RATE)
        last = (finish // up + 1 + margin) * down
    wave = read_mono(name, file, first, last)
    wave = resample(wave, rate)[begin - block * up :]
    wave = wave if finish is None else wave[: finish - begin]
    if len(wave) == 0:
        raise BadInput(f"{name}: slice: {start} to {end} s holds no samples")
    return np.ascontiguousarray(wave)


def check_slice(name, file, start, end) -> float:
    """The file's length in seconds, if from `start` to `end` is a part of it."""
    length = file.frames / file.samplerate
    over = length + 0.05  # metadata rounds, so a little over is no mistake
    holds = all(isinstance(t, (int, float)) for t in ([start] if end is None else [start, end]))
    holds = holds and 0 <= start < length and (end is None or start < end <= over)
    wanted = f"0 <= start < end <= {length:.3f} s"
    expect(holds, f"{name}: slice", wanted, f"{start!r} to {end!r}")
    return length


def read_blocks(name, file, first=0, last=None):
    """Frames first..last of the file, (n, channels) float32 at a time. Nothing is allocated on the
    word of a header: a header can promise hours that are not there."""
    expected = min(file.frames, file.frames if last is None else last) - first
    found = 0
    while found < expected:
        size = min(READ_BLOCK // file.channels, expected - found)
        block = read_block(file, first + found, size)
        if len(block) == 0:
            break
        yield block
        found += len(block)
    if found < expected * (0.98 if file.format == "MP3" else 1):  # an mp3's length is an estimate
        raise truncated(name, expected / file.samplerate, found / file.samplerate)


def read_mono(name, file, first, last) -> np.ndarray:
    """Frames first..last of the file, channels averaged: (n,) float32."""
    blocks = [block.mean(axis=1) for block in read_blocks(name, file, first, last)]
    wave = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if not np.isfinite(wave).all():
        bad = int(np.flatnonzero(~np.isfinite(wave))[0]) + first
        raise BadInput(f"{name}: sample {bad}: expected a finite number, found NaN or infinity")
    return wave


def read_block(file, first, size) -> np.ndarray:
    """(frames, channels). An ogg's or mp3's decoder needs some past before it is right again after
    a seek, and libsndfile seeks before each read."""
    lead = min(first, LEAD) if file.format in ("OGG", "MP3") else 0
    if first:
        file.seek(first - lead)
    return file.read(lead + size, dtype="float32", always_2d=True)[lead:]


def promised_bytes(file) -> tuple[int, int]:
    """What the header of a wav or aiff says of its data, and what the file has: libsndfile corrects
    a false length by itself, and only its log tells. (0, 0) where they agree, and for a wav that
    was written to a pipe, which cannot go back to fill in its length and says 'about 4 GB'."""
    log = re.search(
        r"^ *(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE
    )
    promised, held = map(int, log.groups()) if log else (0, 0)
    return (0, 0) if promised >= 0x7FFF0000 else (promised, held)


# ------------------------------------------------------------------------------------------------
# Resampling: a windowed sinc, evaluated only where an output sample falls.
#
# Samples can hold frequencies up to half their rate, the Nyquist frequency. Before going down to 16
# kHz, what lies above 8 kHz has to go, or it would come back as false lower tones.
#
# Output sample o lies at input time o * down / up. Its value is the sum over input samples s of
# x[s] * h(o * down / up - s), with h a low-pass in the middle of 0.9 .. 1.0 of the smaller Nyquist
# frequency, under a Kaiser window. The fractional part of that time repeats every `up` outputs, so
# there are only `up` different filters ("phases"), and every `up` outputs the input moves on by
# `down` samples: that is a strided convolution with `up` output channels. Neighbouring phases read
# nearly the same input, so they are computed 32 at a time, each group on just the span it reads.

PASS_EDGE = 0.9  # of the smaller Nyquist frequency: flat up to there, silent from 1.0 on
ATTENUATION = 100.0  # dB in the stop band, which Kaiser's formulas turn into length and shape
PHASES = 32  # a group: wide enough for a good matrix product, narrow enough to waste few taps


def resample(wave: np.ndarray, rate: int) -> np.ndarray:
    """(n,) float32 at `rate` -> (ceil(n * 16000 / rate),) float32 at 16 kHz."""
    if rate == RATE:
        return wave
    up, down = rate_ratio(rate)
    steps = -(-len(wave) // down)
    half = filter_half_width(up, down)
    padded = F.pad(torch.from_numpy(wave), (half, steps * down - len(wave) + down + half))
    out = torch.empty(steps, up)  # a row for each `down` samples of input, a column for each phase
    for phase in range(0, up, PHASES):
        taps, first = phase_filters(up, down, phase)  # (P, 1, width), where the span begins
        y = F.conv1d(padded[None, None, first + half :], taps, stride=down)  # (1, P, >= steps)
        out[:, phase : phase + PHASES] = y[0, :, :steps].T
    return out.flatten()[: -(-len(wave) * RATE // rate)].numpy()


def rate_ratio(rate: int) -> tuple[int, int]:
    """16000 / rate as up / down, scaled to at least 32 phases: 48 kHz is 32/96, not 1/3."""
    common = math.gcd(rate, RATE)
    scale = -(-PHASES * common // RATE)
    return RATE // common * scale, rate // common * scale


def filter_half_width(up: int, down: int) -> int:
    """Half the length of h in input samples, by Kaiser's rule for the transition's width."""
    transition = (1 - PASS_EDGE) * min(1.0, up / down) / 2  # cycles per input sample
    return math.ceil((ATTENUATION - 8) / (2.285 * 2 * math.pi * transition) / 2)


@lru_cache(maxsize=512)
def phase_filters(up: int, down: int, phase: int) -> tuple[torch.Tensor, int]:
    """The filters of up to 32 phases over the input span that they share: (P, 1, width)."""
    half = filter_half_width(up, down)
    last = min(phase + PHASES, up) - 1
    first = phase * down // up - half + 1
    samples = torch.arange(first, last * down // up + half + 1, dtype=torch.float64)
    time = torch.arange(phase, last + 1, dtype=torch.float64)[:, None] * down / up - samples
    # (P, width): how far each sample lies from each phase's output
    cutoff = min(1.0, up / down) * (1 + PASS_EDGE) / 2  # in units of the input's Nyquist frequency
    beta = 0.1102 * (ATTENUATION - 8.7)
    window = torch.i0(beta * (1 - (time / half) ** 2).clamp(min=0).sqrt())
    window = window / torch.i0(torch.tensor(beta, dtype=torch.float64)) * (time.abs() <= half)
    return (cutoff * torch.sinc(cutoff * time) * window).float()[:, None], first


# ------------------------------------------------------------------------------------------------
# From samples to slots. One 30 s window is 480000 samples, 3000 frames, 1500 positions, 750 slots.
#
# A frame tells how strong each of 201 frequencies is in the 25 ms around its centre: a Fourier
# transform. Triangles, narrow for low tones and wide for high ones as in the ear, sum them up to
# 128 mel bins. Of each the logarithm is taken, for what is heard are ratios, and what lies more
# than 80 dB under the loudest is raised to there; (x + 4) / 4 brings it all near -1 .. 1.

HOP = 160  # samples from frame to frame: 10 ms
FFT = 400  # samples that one frame looks at: 25 ms
WINDOW = 30 * RATE
MELS = 128
MAX_FRAMES = WINDOW // HOP  # 3000
CONTEXT = 2  # frames behind the last valid one whose 25 ms still reach back into the clip


def n_frames(samples: int) -> int:
    """Valid frames: those whose centre, sample 160 t, lies inside the clip."""
    return -(-samples // HOP)


def frames_seen(samples: int) -> int:
    """Frames that log_mel makes: the valid ones and their context."""
    return min(n_frames(samples) + CONTEXT, MAX_FRAMES)


def n_positions(samples: int) -> int:
    """What the encoder's second convolution (stride 2) leaves of the frames."""
    return (n_frames(samples) + 1) // 2


def split_windows(wave: np.ndarray, max_seconds: float = 600) -> list[np.ndarray]:
    """A clip as windows of at most 30 s; each is heard alone. What passes the base's limit (AF3:
    10 minutes, Qwen2-Audio: 30 seconds) is cut with a warning. A last window too short to make a
    slot (up to 320 samples) is left out: it would cost an encoder pass and say nothing."""
    limit = int(max_seconds * RATE)
    if len(wave) > limit:
        warn(f"clip: {len(wave) / RATE:.1f} s; this model hears the first {max_seconds:g} s")
        wave = wave[:limit]
    windows = [wave[i : i + WINDOW] for i in range(0, max(len(wave), 1), WINDOW)]
    if len(windows) > 1 and n_positions(len(windows[-1])) < 2:
        windows.pop()
    return windows


def n_slots(samples: int, max_seconds: float = 600) -> int:
    """Slots of a clip of that many samples, over all its windows. 321 samples are the least."""
    full, rest = divmod(min(samples, int(max_seconds * RATE)), WINDOW)
    return full * (n_positions(WINDOW) // 2) + n_positions(rest) // 2


def log_mel(wave) -> torch.Tensor:
    """Whisper's log-mel of one window, without its padding: (n,) -> (128, min(L + 2, 3000)), where
    L is n_frames(n).

    Whisper pads every clip with silence to 30 s and transforms all of it. Frames beyond L + 2 then
    hold nothing but that silence, and the encoder masks what lies beyond L; so only L + 2 frames
    are made here, each from the samples and zeros that the padded clip would have there.
    """
    return log_mels([wave])[0]


def log_mels(waves) -> list[torch.Tensor]:
    """log_mel of many windows, with all their frames in one transform: that saves the cost of
    starting every operation anew, which for short clips is most of it."""
    frames = torch.cat([samples_seen(wave).unfold(0, FFT, HOP) for wave in waves])  # (F, 400)
    counts = [frames_seen(len(wave)) for wave in waves]
    spectrum = torch.fft.rfft(frames.mul_(hann_window()))  # (F, 201)
    power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
    mel = (power @ mel_filters()).clamp_(min=1e-10).log10_()  # (F, M)
    loudest = [part.max() for part in mel.amax(1).split(counts)]  # each window's own
    floor = torch.stack(loudest).repeat_interleave(torch.tensor(counts))[:, None] - 8.0  # (F, 1)
    mel = torch.maximum(mel, floor).add_(4.0).div_(4.0)
    return [part.T for part in mel.split(counts)]  # (M, f) each


def samples_seen(wave) -> torch.Tensor:  # (n,) -> (160 (F - 1) + 400,)
    """The samples that a window's frames look at: frame t is centred on sample 160 t, so there are
    200 before the first, mirrored as Whisper does, and zeros (after 30 s mirrored ones) behind."""
    wave = torch.from_numpy(np.require(wave, np.float32, ["C", "W"]))  # a copy only where needed
    whole = wave.ndim == 1 and 0 < len(wave) <= WINDOW
    expect(whole, "log_mel", f"one window of 1..{WINDOW} samples", tuple(wave.shape))
    frames = frames_seen(len(wave))
    half = FFT // 2
    row = torch.zeros((frames - 1) * HOP + FFT)
    row[half : half + len(wave)] = wave
    row[:half] = row[half + 1 : FFT + 1].flip(0)
    if frames == MAX_FRAMES:
        end = half + WINDOW
        row[end:] = row[2 * end - len(row) - 1 : end - 1].flip(0)
    return row


@lru_cache(maxsize=1)
def hann_window() -> torch.Tensor:
    return torch.hann_window(FFT)


@lru_cache(maxsize=1)
def mel_filters() -> torch.Tensor:
    """Slaney's mel filters, each a triangle of area one: (201, 128) float32, made in float64.

    His scale is linear to 1 kHz (3 mel for 200 Hz) and logarithmic above (27 mel for 6.4 times).
    """
    frequencies = np.linspace(0, RATE / 2, FFT // 2 + 1)
    top = 15 + 27 * np.log(RATE / 2 / 1000) / np.log(6.4)
    mels = np.linspace(0, top, MELS + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    rise = (frequencies[:, None] - edges[None, :-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[None, 2:] - frequencies[:, None]) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0, np.minimum(rise, fall))
    return torch.from_numpy(triangles * 2 / (edges[2:] - edges[:-2])).float()


# ------------------------------------------------------------------------------------------------
# Prompts. A conversation is ChatML; a clip in it is a run of slots, placed where the text says
# <sound-i>. The layouts:
#   native     what the base was trained on. AF3: the slots and a line end.
#              Qwen2-Audio: "Audio i: ", its audio_bos, the slots, its audio_eos, a line end.
#   polyaudio  "(audio i: ", BOA, the slots, EOA, ")": the index is written beside the sound, so
#              that "the third clip" has something to point at.
#   no-index, no-boundary   polyaudio without its index, or without BOA and EOA: to see what each
#              of the two is good for.

LAYOUTS = ("native", "polyaudio", "no-index", "no-boundary")
MARKER = r"<sound-(\d{1,4})>"
ROLES = ("system", "user", "assistant")


def check_prompt(messages, n_slots, layout):
    if layout not in LAYOUTS:
        raise BadInput(f"layout: expected one of {', '.join(LAYOUTS)}, found {layout!r}")
    fine = isinstance(messages, (list, tuple)) and messages
    expect(fine, "messages", "a list of at least one", messages, 80)
    for i, message in enumerate(messages):
        fine = isinstance(message, dict) and message.get("role") in ROLES
        fine = fine and isinstance(message.get("content"), str)
        expect(fine, f"messages[{i}]", f"a role of {', '.join(ROLES)} and a text", message, 80)
    for i, slots in enumerate(n_slots, 1):
        expect(isinstance(slots, int), f"clip {i}: slots", "a whole number", repr(slots))
        if slots < 1:
            raise BadInput(
                f"clip {i}: too short to make a slot (at least {2 * HOP + 1} samples, 20 ms)"
            )


def place_clips(messages, n: int) -> list[dict]:
    """Check that markers and clips agree; without any marker, put the clips before the first
    question, a line each. Only the user's turns hold markers: an answer is text in any case."""
    spoken = [m["content"] for m in messages if m["role"] == "user"]
    used = {int(i) for text in spoken for i in re.findall(MARKER, text)}
    if used - set(range(1, n + 1)):
        wrong = min(used - set(range(1, n + 1)))
        raise BadInput(f"prompt: <sound-{wrong}> names a clip that is not there; {n} clip(s) given")
    if used and len(used) < n:
        unused = min(set(range(1, n + 1)) - used)
        raise BadInput(f"prompt: clip {unused} is given, but no <sound-{unused}> places it")
    if used or n == 0:
        return list(messages)
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
    if first is None:
        raise BadInput(f"prompt: {n} clip(s), but no question of the user's to put them in")
    clips = "".join(f"<sound-{i}>\n" for i in range(1, n + 1))
    asked = {**messages[first], "content": clips + messages[first]["content"]}
    return [*messages[:first], asked, *messages[first + 1 :]]


def clip_order(messages, n: int) -> list[int]:
    """The clips as the prompt will hold them, by index: one for each marker."""
    return [
        int(i)
        for message in place_clips(messages, n)
        if message["role"] == "user"
        for i in re.findall(MARKER, message["content"])
    ]


# ------------------------------------------------------------------------------------------------
# Tokens: byte-level BPE from the checkpoint's own files, run by tiktoken.

# Contractions, words with one leading character, single digits, punctuation, line ends, spaces.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SLOT_NAMES = ("<sound>", "<|AUDIO|>")  # the token that a slot takes the place of
BOUNDARIES = (  # what stands for BOA and EOA: ours, Qwen2-Audio's, a pair that AF3 leaves unused
    ("[BOA]", "[EOA]"),
    ("<|audio_bos|>", "<|audio_eos|>"),
    ("<|vision_start|>", "<|vision_end|>"),
)
END_NAMES = ("<|im_end|>", "<|endoftext|>")
MARKS = 1000  # over one letter; no script has more than a few


def check_runs(text):
    """Refuse what takes the square of its length or worse: many spaces in a row, which tiktoken's
    regex has no stack for, and many combining marks, which NFC puts in order."""
    spaces = re.search(r"(?<!\s)\s{100000}", text)
    expect(not spaces, "text", "fewer than 100000 spaces in a row", "more")
    if len(text) > MARKS and not text.isascii():
        marks = itertools.groupby(unicodedata.category(letter)[0] == "M" for letter in text)
        longest = max(sum(run) for _, run in marks)
        expect(longest <= MARKS, "text", f"at most {MARKS} combining marks in a row", longest)


@lru_cache(maxsize=1)
def byte_letters() -> dict[str, int]:
    """HF files write bytes as printable letters: printable ones as themselves, the other 68 as
    the letters from U+0100 on. This is the way back, letter -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """Text to ids and back, and prompts. `special` maps the names of special tokens to ids."""

    def __init__(self, ranks, special, hidden=(), pattern=QWEN_PATTERN, system=None):
        self.special = special
        self.hidden = set(hidden)  # specials that decode() leaves out: <|im_end|>, yet not <think>
        self.system = system  # the base's default system message, if it has one
        self.encoding = tiktoken.Encoding(
            "polyaudio", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self.known = set(ranks.values()) | set(special.values())
        self.size = max(self.known) + 1
        self.slot = next((special[n] for n in SLOT_NAMES if n in special), None)
        pairs = ((special[b], special[e]) for b, e in BOUNDARIES if b in special and e in special)
        self.boundaries = next(pairs, None)
        self.ends = [special[name] for name in END_NAMES if name in special]

    def __len__(self):
        return self.size

    @classmethod
    def from_dir(cls, dir) -> "Tokenizer":
        """From tokenizer.json, or from vocab.json + merges.txt where there is none."""
        dir = Path(dir)
        name = dir / "tokenizer.json"
        if not name.exists():
            name = dir / "vocab.json"
            whole = name.exists() and (dir / "merges.txt").exists()
            expect(whole, dir, "tokenizer.json, or vocab.json and merges.txt", "none")
        try:
            return cls.from_file(name)
        except (LookupError, AttributeError, TypeError, ValueError, OverflowError) as error:
            found = f"{type(error).__name__}: {error}"
            raise BadInput(f"{name}: expected a tokenizer's files, found {found}") from None

    @classmethod
    def from_file(cls, name: Path) -> "Tokenizer":
        dir, pattern = name.parent, QWEN_PATTERN
        if name.name == "tokenizer.json":
            vocab, merges, pattern, added = read_tokenizer(name)
        else:
            vocab, added = read_json(name), {}
            lines = (dir / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
        added |= more_added_tokens(dir)
        special = {content: token["id"] for content, token in added.items()}
        hidden = [token["id"] for token in added.values() if token.get("special", True)]
        ranks = bpe_ranks(name, {t: i for t, i in vocab.items() if t not in special}, merges)
        ids = [*ranks.values(), *special.values()]
        whole = all(type(id) is int and 0 <= id < 1 << 31 for id in ids)
        once = whole and len(set(ids)) == len(ids)
        expect(once, f"{name}: ids", "whole numbers, each for one token", "others")
        return cls(ranks, special, hidden, pattern, default_system(dir))

    # --- plain text

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. No string in it becomes a special token."""
        check_runs(text)
        return self.encoding.encode_ordinary(unicodedata.normalize("NFC", text))

    def decode(self, ids) -> str:
        """Text of ids, without special tokens and without ids that the vocabulary does not hold."""
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        if id in self.hidden or id not in self.known:
            return b""
        return self.encoding.decode_single_token_bytes(id)

    def stream(self):
        """A function for streaming: give it ids one by one, print what it returns. A character
        whose bytes are spread over tokens is held back until it is whole; None ends the text."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

        def push(id) -> str:
            return decoder.decode(b"" if id is None else self.token_bytes(id), final=id is None)

        return push

    # --- prompts

    def encode_prompt(self, messages, n_slots, layout="native") -> list[int]:
        """Ids of a conversation. messages: [{role, content}], clips as <sound-i> in the content of
        the user's turns (without any, the clips come first); n_slots: slots of clip 1, 2, ..."""
        return [id for ids, _ in self.prompt_pieces(messages, n_slots, layout) for id in ids]

    def prompt_pieces(self, messages, n_slots, layout) -> list[tuple[list[int], bool]]:
        """The same as [(ids, is_answer)]: the answers are what training learns to say."""
        check_prompt(messages, n_slots, layout)
        if n_slots and self.slot is None:
            raise BadInput("prompt: this tokenizer has no audio token, so its model hears no clips")
        if layout in ("polyaudio", "no-index") and n_slots and self.boundaries is None:
            raise BadInput(f"prompt: layout {layout} needs BOA and EOA in the vocabulary")
        messages = place_clips(messages, len(n_slots))
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        start, end = self.special_id("<|im_start|>"), self.special_id("<|im_end|>")
        pieces, parts = [], []
        for message in messages:
            parts += [[start], message["role"] + "\n"]
            if message["role"] == "assistant":  # after the very header that generation ends with
                last = message is messages[-1]  # earlier answers are kept without their thoughts
                parts += self.thinking() if last else []
                pieces.append((self.encode_parts(parts), False))
                pieces.append((self.encode_parts([message["content"], [end]]), True))
                parts = ["\n"]
                continue
            said = [message["content"]]
            if message["role"] == "user":
                said = self.content(message["content"], n_slots, layout)
            parts += [*said, [end], "\n"]
        if messages[-1]["role"] != "assistant":
            parts += [[start], "assistant\n", *self.thinking()]
        return [*pieces, (self.encode_parts(parts), False)]

    def special_id(self, name) -> int:
        if name not in self.special:
            raise BadInput(f"tokenizer: no special token {name} in its files")
        return self.special[name]

    def thinking(self) -> list:
        """Qwen3 answers at once when its thoughts are given, and empty."""
        if "<think>" not in self.special or self.slot is not None:
            return []
        return [[self.special["<think>"]], "\n\n", [self.special["</think>"]], "\n\n"]

    def content(self, text, n_slots, layout) -> list:
        """One message as parts: text, and lists of ids where its clips are."""
        parts = []
        pieces = re.split(MARKER, text)  # text, index, text, index, ..., text
        for i, piece in enumerate(pieces):
            if i % 2 == 0:
                parts.append(piece)
                continue
            run = [self.slot] * n_slots[int(piece) - 1]
            line_end = "" if pieces[i + 1].startswith("\n") else "\n"
            if layout != "native":
                boa, eoa = self.boundaries or (None, None)
                index = "" if layout == "no-index" else f" {int(piece)}"
                run = run if layout == "no-boundary" else [boa, *run, eoa]
                parts += [f"(audio{index}: ", run, ")"]
            elif "<|AUDIO|>" in self.special:
                bos, eos = self.special_id("<|audio_bos|>"), self.special_id("<|audio_eos|>")
                parts += [f"Audio {int(piece)}: ", [bos, *run, eos], line_end]
            else:
                parts += [run, line_end]
        return parts

    def encode_parts(self, parts) -> list[int]:
        """Join neighbouring texts before encoding them: BPE sees across the seams."""
        ids, text = [], ""
        for part in [*parts, []]:
            if isinstance(part, str):
                text += part
                continue
            ids += self.encode(text) + part if text else part
            text = ""
        return ids


def read_tokenizer(name):
    """vocab, merges, pattern and added tokens of a tokenizer.json, if it is of the kind that this
    code computes: NFC, a split by one regex, byte-level BPE that follows its merges."""
    data = read_json(name)
    for field, kind in (("model", dict), ("added_tokens", list), ("pre_tokenizer", dict)):
        expect(isinstance(data.get(field), kind), f"{name}: {field}", kind.__name__, "none")
    split, level = data["pre_tokenizer"]["pretokenizers"]
    pattern, model = split["pattern"]["Regex"], data["model"]
    cuts = (split["type"], split["behavior"], split.get("invert", False))
    computed = {
        "normalizer": data["normalizer"] == {"type": "NFC"},
        "Split": cuts == ("Split", "Isolated", False),
        "ByteLevel": level["type"] == "ByteLevel" and not level["add_prefix_space"],
        "use_regex": not level["use_regex"],
        "affixes": not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")),
        "dropout": not model.get("dropout"),
    }
    for field, holds in computed.items():
        expect(holds, f"{name}: {field}", "byte-level BPE as Qwen has it", "another kind")
    follows = model["type"] == "BPE" and not model.get("ignore_merges")
    expect(follows, f"{name}: model", "a BPE that follows its merges", model["type"])
    for field, kind in (("vocab", dict), ("merges", list)):
        expect(isinstance(model.get(field), kind), f"{name}: {field}", kind.__name__, "none")
    return model["vocab"], model["merges"], pattern, {t["content"]: t for t in data["added_tokens"]}


def more_added_tokens(dir) -> dict:
    """Special tokens that older repositories keep beside the vocabulary."""
    added = {}
    if (dir / "added_tokens.json").exists():
        added |= {name: {"id": id} for name, id in read_json(dir / "added_tokens.json").items()}
    if (dir / "tokenizer_config.json").exists():
        listed = read_json(dir / "tokenizer_config.json").get("added_tokens_decoder", {})
        added |= {token["content"]: {**token, "id": int(id)} for id, token in listed.items()}
    return added


def default_system(dir):
    """The system message that the base's chat template puts where a conversation has none. Without
    a template it is Qwen's own."""
    template = ""
    if (dir / "chat_template.jinja").exists():
        template = (dir / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if not template and (dir / name).exists():
            template = read_json(dir / name).get("chat_template") or ""
    if not isinstance(template, str):  # several, by name
        template = {t["name"]: t["template"] for t in template}["default"]
    if not template:
        return "You are a helpful assistant."
    found = re.search(r"<\|im_start\|>system(?:\\n|\n)([^'\"{<]+)<\|im_end\|>", template)
    return found.group(1) if found else None


def bpe_ranks(name, vocab, merges) -> dict[bytes, int]:
    """{bytes: id}, where an id is also the order of merging. That is how tiktoken works, so a
    vocabulary whose ids do not rise along its merges is refused: its ids would come out wrong."""
    letters = byte_letters()
    try:
        ranks = {bytes(letters[c] for c in token): id for token, id in vocab.items()}
    except KeyError as letter:
        raise BadInput(f"{name}: vocab: {letter} stands for no byte") from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    expect(not missing, f"{name}: vocab", "a token for each byte", f"none for {missing[:1]}")
    last, made = -1, 256
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        fine = isinstance(pair, list) and len(pair) == 2
        expect(fine, f"{name}: merges", "pairs of tokens", merge, 60)
        id = vocab.get(pair[0] + pair[1], -1)
        if id <= last:
            raise BadInput(f"{name}: merges: expected ids to rise, found {id} after {last}")
        last, made = id, made + 1
    if made != len(ranks):
        raise BadInput(f"{name}: vocab: {len(ranks)} tokens, but bytes and merges make {made}")
    return ranks


# Words for training only: QWEN_PATTERN in the letters of Python's own `re`, which has no \p{L}.
# The two differ on rare signs; a merge learned there is merely never used.
TRAINING_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\r\n\w]|_)?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(texts, size: int, special: list[str], dir):
    """Learn a byte-level BPE of `size` tokens (bytes, merges, then `special`) and write it to
    dir/tokenizer.json as HF's tokenizers library reads it.

    The rule: join the most frequent pair of neighbours, everywhere; again; until there are enough.
    Words are kept apart once with how often they occur; a join touches only the words it is in.
    """
    expect(size >= 256 + len(special), "BPE: size", f"at least {256 + len(special)}", size)
    letter = {byte: char for char, byte in byte_letters().items()}
    words = Counter()
    for text in texts:
        words.update(re.findall(TRAINING_WORDS, unicodedata.normalize("NFC", text)))
    pieces = [[letter[b] for b in word.encode()] for word in words]
    counts = list(words.values())
    pairs, where = Counter(), defaultdict(set)
    for w, word in enumerate(pieces):
        for pair in zip(word, word[1:]):
            pairs[pair] += counts[w]
            where[pair].add(w)
    vocab = {letter[byte]: byte for byte in range(256)}
    merges = []
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while len(vocab) + len(special) < size and heap:
        count, pair = heapq.heappop(heap)
        if pairs[pair] != -count:  # the count moved since; come back with the right one
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        joined = pair[0] + pair[1]
        if joined in vocab:  # the same token from other halves: ids could not order both
            continue
        merges.append(list(pair))
        vocab[joined] = len(vocab)
        changed = set()
        for w in where.pop(pair):
            old, pieces[w] = pieces[w], join_pair(pieces[w], pair)
            for p in zip(old, old[1:]):
                pairs[p] -= counts[w]
            for p in zip(pieces[w], pieces[w][1:]):
                pairs[p] += counts[w]
                where[p].add(w)
                changed.add(p)
        for p in changed:
            heapq.heappush(heap, (-pairs[p], p))
    write_tokenizer(dir, vocab, merges, special)


def join_pair(word: list[str], pair) -> list[str]:
    out = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1:] = [pair[0] + pair[1], None]  # None: this piece was joined, start anew
        else:
            out.append(piece)
    return [piece for piece in out if piece is not None]


def write_tokenizer(dir, vocab, merges, special):
    dir = Path(dir)
    dir.mkdir(parents=True, exist_ok=True)
    added = [
        {"id": len(vocab) + i, "content": name, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for i, name in enumerate(special)
    ]  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN_PATTERN}, "behavior": "Isolated"}
    split = {**split, "invert": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**level, "use_regex": False}],
        },
        "post_processor": None,
        "decoder": {**level, "use_regex": False},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
    write_json(dir / "tokenizer.json", document)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(dir / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer", **names})


def clips_that_fit(context: int, text: int, slots: int) -> int:
    """Equation 1 of the PolyAudio paper, N_max = floor((L - T) / K): how many clips of K slots
    fit a context of L positions beside T positions of text and answer."""
    return max(0, (context - text) // slots)


def check_fits(tokens: int, n_slots, context: int, reserve: int = 0):
    """Refuse a prompt (`tokens` in all, `reserve` kept for the answer) that passes the context."""
    if tokens + reserve <= context:
        return
    expect(n_slots, "prompt", f"at most {context} tokens with the answer's", tokens + reserve)
    text = tokens + reserve - sum(n_slots)
    slots = max(n_slots)
    fit = f"floor(({context} - {text}) / {slots}) = {clips_that_fit(context, text, slots)}"
    raise BadInput(
        f"prompt: {len(n_slots)} clips of up to {slots} slots do not fit: "
        f"N_max = floor((L - T) / K) = {fit}"
    )


# ------------------------------------------------------------------------------------------------
# Tables of fields: what a row must hold and what it may. A shape is a type (float: any finite
# number; str: not empty; dict: without null), a set of words, [shape] for a list of it, a tuple
# for a list of fixed length, str | None, or a dictionary of fields that must be there.

SHAPES = {str: "a text", int: "a whole number", float: "a number", dict: "an object without null"}


def fits(value, shape) -> bool:
    if isinstance(shape, UnionType):
        return any(fits(value, each) for each in shape.__args__)
    if isinstance(shape, set):
        return isinstance(value, str) and value in shape
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(v, shape[0]) for v in value)
    if isinstance(shape, tuple):
        whole = isinstance(value, list) and len(value) == len(shape)
        return whole and all(map(fits, value, shape))
    if isinstance(shape, dict):
        whole = isinstance(value, dict) and value.keys() >= shape.keys()
        return whole and all(fits(value[key], inner) for key, inner in shape.items())
    if shape is float:
        return type(value) in (int, float) and abs(value) < 1e15  # NaN is not
    return (
        type(value) is shape and value != "" and (shape is not dict or None not in value.values())
    )


def shape_name(shape) -> str:
    if isinstance(shape, set):
        return " or ".join(sorted(shape))
    if isinstance(shape, list):
        return f"a list, each {shape_name(shape[0])}"
    if isinstance(shape, tuple):
        return f"[{', '.join(map(shape_name, shape))}]"
    if isinstance(shape, dict):
        return "{" + ", ".join(f"{key}: {shape_name(inner)}" for key, inner in shape.items()) + "}"
    return SHAPES[shape]


def check_fields(row: dict, always: dict, known: dict):
    """A row has to hold every field of `always`, and what it holds of both tables in its shape.
    Fields that no table names are nobody's business here."""
    for field, shape in {**always, **known}.items():
        if (field in row or field in always) and not fits(row.get(field), shape):
            found = f"{row[field]!r:.80}" if field in row else "none"
            expect(False, field, shape_name(shape), found)


# ------------------------------------------------------------------------------------------------
# Examples and their views. An example is one row of train.jsonl or bench.jsonl: a question on
# several clips. A view is the same example in another form, to train on or to find out what a
# model leans on; each is one function from example to example.

SILENCE = 2.0  # seconds between the clips of a joined one


def load_clip(clip, root=".") -> np.ndarray:
    """A row's clip as samples: a path, {path, start, end}, the {join, silence} of view_concat, or
    samples that were loaded before."""
    if isinstance(clip, np.ndarray):
        return clip
    if isinstance(clip, str):
        return load_audio(Path(root) / clip)
    if isinstance(clip, dict) and isinstance(clip.get("join"), list) and clip["join"]:
        gap = np.zeros(round(clip["silence"] * RATE), np.float32)
        waves = [load_clip(c, root) for c in clip["join"]]
        return np.concatenate([part for wave in waves for part in (gap, wave)][1:])
    fine = isinstance(clip, dict) and isinstance(clip.get("path"), str)
    expect(fine, "clip", "a path or {path, start, end}", clip, 80)
    return load_audio(Path(root) / clip["path"], clip.get("start", 0), clip.get("end"))


def clip_samples(clip, root=".") -> int:
    """How many samples load_clip gives, from the files' headers alone; of an mp3, which may give up
    to 2 % less, how many its header promises."""
    if isinstance(clip, np.ndarray):
        return len(clip)
    if isinstance(clip, dict) and "join" in clip:
        gaps = (len(clip["join"]) - 1) * round(clip["silence"] * RATE)
        return gaps + sum(clip_samples(part, root) for part in clip["join"])
    part = clip if isinstance(clip, dict) else {"path": clip}
    start, end = part.get("start", 0), part.get("end")
    with open_audio(Path(root) / part["path"]) as (name, file):
        length = check_slice(name, file, start, end)
        whole = -(-file.frames * RATE // file.samplerate)
        finish = whole if end is None else round(min(end, length) * RATE)
    return finish - round(start * RATE)


def view_concat(example: dict) -> dict:
    """All clips as one, two seconds of silence between: how models that hear one clip are asked."""
    return unmarked(example, [join_clips(example["clips"])] if example["clips"] else [])


def view_two_slot(example: dict) -> dict:
    """The first clip, and the rest as one: how models that hear two clips are asked."""
    first, rest = example["clips"][:1], example["clips"][1:]
    return unmarked(example, first + ([join_clips(rest)] if len(rest) > 1 else rest))


def view_text_only(example: dict) -> dict:
    """The question alone: what can be answered without listening."""
    return unmarked(example, [])


def view_shuffle_audio(example: dict, other: dict) -> dict:
    """The clips of another example, of the same file, in the place of its own: an answer that is
    still right was not heard. Where the other has fewer clips they come round again."""
    count, strange = len(example["clips"]), other["clips"]
    expect(strange or not count, "shuffle-audio", "another example with clips", "none")
    return {**example, "clips": [strange[i % len(strange)] for i in range(count)]}


def view_as_text(example: dict) -> dict:
    """What each clip must be heard to say, written in its place: the logic without the sound."""
    evidence, count = example.get("meta", {}).get("evidence"), len(example["clips"])
    shape = [{"clip": int, "says": str}]
    where = f"{example.get('id', 'row')}: meta.evidence"
    fine = evidence and fits(evidence, shape) or not count
    expect(fine, where, shape_name(shape), evidence, 80)

    def say(marker):
        said = [known["says"] for known in evidence if known["clip"] == int(marker[1])]
        return f"(audio {marker[1]}: {'; '.join(said)})" if said else f"(audio {marker[1]})"

    def tell(message):
        told = re.sub(MARKER, say, message["content"])
        return {**message, "content": told} if message["role"] == "user" else message

    messages = [tell(message) for message in place_clips(conversation(example), count)]
    if "messages" in example:
        return {**example, "clips": [], "messages": messages}
    return {**example, "clips": [], "question": messages[0]["content"]}


def view_no_index(example: dict) -> dict:
    """Without the number beside each clip: for encode_prompt, whose layout the example now says."""
    return {**example, "layout": "no-index"}


def view_no_boundary(example: dict) -> dict:
    """Without BOA and EOA around each clip, in the same way."""
    return {**example, "layout": "no-boundary"}


def join_clips(clips) -> dict:
    return {"join": list(clips), "silence": SILENCE}


def unmarked(example: dict, clips: list) -> dict:
    """Other clips, which come before the text: markers before a line go, unless it has more of
    them; one inside of it becomes a name for what it stood for."""

    def unmark(text):
        text = re.sub(rf"(?m)^(?:{MARKER}[ \t]*)+(?!.*<sound-)\n?", "", text)
        return re.sub(MARKER, r"clip \1", text)

    return map_text({**example, "clips": clips}, unmark)


def conversation(example: dict) -> list[dict]:
    """An example as the messages that a prompt is made of, its answer last."""
    if "messages" in example:
        return list(example["messages"])
    return [
        {"role": role, "content": example[field]}
        for role, field in (("user", "question"), ("assistant", "answer"))
        if field in example
    ]


def view_permute(example: dict, order: list[int], literal: bool = False) -> dict:
    """The clips in another order: order[j] is the old index (from 1) of the new clip j + 1.

    literal: the text stays as it was, as in the paper's test; only sound where neither question
    nor answer names a clip. Otherwise every index in text, choices and gold follows its clip.
    """
    whole = all(type(i) is int for i in order)
    whole = whole and sorted(order) == list(range(1, len(example["clips"]) + 1))
    expect(whole, "permute", f"an order of {len(example['clips'])} clips", order)
    moved = {**example, "clips": [example["clips"][i - 1] for i in order]}
    if literal or not order:  # nothing to follow
        return moved
    new = {old: j for j, old in enumerate(order, 1)}
    kind, answers = example.get("gold", {}).get("type"), ("answer", "choices")
    bare = kind in (None, "clip", "order")  # there "2" is a clip; elsewhere it is a number
    listed = " ".join(f"<sound-{i}>" for i in sorted(new))  # is where all clips are heard, in order

    def follow(text):
        return listed.join(remap_indices(part, new) for part in text.split(listed))

    moved = map_text(moved, follow)
    told = map_text(example, lambda text: remap_indices(text, new, bare))
    if kind in ("keywords", "transcript"):  # what was said in a clip, not about one
        told = example
    elif "gold" in example:
        moved["gold"] = remap_gold(example["gold"], new)
    if "evidence" in example.get("meta", {}):
        evidence = remap_gold(example["meta"]["evidence"], new)
        moved["meta"] = {**example["meta"], "evidence": evidence}
    return {**moved, **{field: told[field] for field in answers if field in example}}


VIEWS = {  # by the name that a flag gives them; permute and shuffle-audio take one argument more
    "concat": view_concat, "two-slot": view_two_slot, "permute": view_permute,
    "no-index": view_no_index, "no-boundary": view_no_boundary, "text-only": view_text_only,
    "shuffle-audio": view_shuffle_audio, "as-text": view_as_text,
}  # fmt: skip
ONE_ROW_VIEWS = [
    name for name in VIEWS if name not in ("permute", "shuffle-audio")
]  # of one example


def reordered(example: dict) -> dict:
    """Its clips, two at least, in another order that its id draws, kept as `order`."""
    clips = list(range(1, len(example["clips"]) + 1))
    expect(len(clips) > 1, f"{example['id']}: clips", "two to put in another order", len(clips))
    order, dice = clips[:], random.Random(example["id"].encode("utf-8", "surrogatepass"))
    while order == clips:
        dice.shuffle(order)
    return view_permute({**example, "order": order}, order)


DESCRIBE = "Describe this recording in one sentence."


def each_alone(example: dict) -> list[dict]:
    """Each clip by itself, to be described: the first half of late fusion."""
    alone = {key: value for key, value in example.items() if key != "messages"}
    alone |= {"question": DESCRIBE, "answer": ""}
    return [{**alone, "clips": [clip]} for clip in example["clips"]]


def view_captioned(example: dict, captions: list) -> dict:
    """What was said of each clip, written in its place: the second half of late fusion."""
    evidence = [{"clip": i, "says": said or "nothing"} for i, said in enumerate(captions, 1)]
    return view_as_text({**example, "meta": {**example["meta"], "evidence": evidence}})


def to_ask(rows, root):
    """(key, example) pairs as (key, messages, clips, layout), which is what a network is asked. An
    example is told of and passed over if one of its clips cannot be heard: nobody is asked about
    fewer clips than there are."""
    for key, row in rows:
        try:
            clips = [load_clip(clip, root) for clip in row["clips"]]
            yield key, conversation(row)[:-1], clips, row.get("layout")
        except BadInput as mistake:
            warn(f"{row['id']}: {mistake}")


def map_text(example: dict, change) -> dict:
    """Apply `change` to every text that a model reads or is to say."""
    out = dict(example)
    for field in ("question", "answer"):
        if field in out:
            out[field] = change(out[field])
    if "choices" in out:
        out["choices"] = [change(choice) for choice in out["choices"]]
    if "messages" in out:
        out["messages"] = [{**m, "content": change(m["content"])} for m in out["messages"]]
    return out


def remap_gold(value, new: dict, key=None):
    """Follow the clips inside a gold: values of type clip and order are indices, a span names its
    clip, texts may speak of one; counts and times stay."""
    if isinstance(value, str):
        return remap_indices(value, new, bare=False)
    if isinstance(value, list):
        return [remap_gold(v, new, key) for v in value]
    if isinstance(value, dict):
        indices = value.get("type") in ("clip", "order")
        inner = {k: "clip" if k == "value" and indices else k for k in value}
        return {k: v if k == "type" else remap_gold(v, new, inner[k]) for k, v in value.items()}
    return new.get(value, value) if key == "clip" and type(value) is int else value


# How people write "the second one": a noun and numbers ("clip 2", "clips 1, 2 and 3"), an ordinal
# ("the second clip", "the first and the third"), or a bare number after a preposition. A number
# that counts something ("clip 1, 2 birds", "2 and 3 seconds later") is none of these.
NOUN = r"(?:audio|clip|sound|recording|track|segment|sample|file)"
AND = r"(?:\s*(?:->|→|&|/|<|>)\s*|,?\s+(?:and|or|vs\.?|versus|with)\s+)"
UNITS = r"\s+(?:k?hz|db|m?s|sec|min|(?!sounds\b|plays\b|has\b)\w{3,}s)\b"
WHOLE = r"(?!\d|[.:]\d|\s*[-–]\s*\d|\w)"  # the number ends here, and is not "2.5" or "1-3"
LIST = rf"\d+(?:{AND}\d+{WHOLE}(?!{UNITS}))*{WHOLE}"
LONG_LIST = rf"\d+(?:(?:{AND}|\s*,\s*)\d+{WHOLE}(?!{UNITS}))*{WHOLE}"
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
ORDINAL = rf"(?:{'|'.join(ORDINALS)})"
MORE = rf"(?:,?\s+(?:and|or|nor|than|from|with)\s+(?:the\s+)?{ORDINAL}|,\s+(?:the\s+)?{ORDINAL})*"
ADJECTIVE = r"(?:\s+(?!of\b|in\b|from\b|is\b|comes\b|two\b|three\b|four\b|few\b|\d)\w+)?"
NAMED = (
    rf"<sound-(?P<marker>\d+)>"
    rf"|\b{NOUN}\s*(?:number\s*|no\.\s*|\#\s*)?(?P<one>{LIST})"
    rf"|\b{NOUN}s\s*(?P<many>{LONG_LIST})"
    rf"|\b(?P<ordinal>{ORDINAL})(?={MORE}{ADJECTIVE}\s+(?:{NOUN}s?|one)\b(?!\s*#?\d))"
)
BARE = (
    rf"|\b(?:in|of|between|from|is|are|than|both|either)\s+(?P<bare>{LONG_LIST})"
    rf"(?=\s*(?:[?!;:)\]]|[.,](?!\d)|$|than\b|or\b|and\b|vs\b))"
)


def remap_indices(text: str, new: dict, bare: bool = True) -> str:
    """Rewrite the clip indices that a text names. With `bare`, numbers after "in", "of", ... are
    such too, and a text that is nothing but numbers ("2", "3, 1, 2") is a list of them."""

    def digits(piece):
        return re.sub(r"\d+", lambda m: str(new.get(int(m.group()[:15]), m.group())), piece)

    def ordinal(word):
        old = ORDINALS.index(word.lower()) + 1
        place = new.get(old, old)
        moved = ORDINALS[place - 1] if place <= len(ORDINALS) else f"{place}th"
        return moved.upper() if word.isupper() else moved.title() if word.istitle() else moved

    def replace(match):
        if match.lastgroup == "ordinal":
            return ordinal(match.group())
        start, end = (place - match.start() for place in match.span(match.lastgroup))
        whole = match.group()
        return whole[:start] + digits(whole[start:end]) + whole[end:]

    if re.fullmatch(rf"\s*\(?{LONG_LIST}\)?\.?\s*", text):
        return digits(text) if bare else text
    return re.sub(NAMED + (BARE if bare else ""), replace, text, flags=re.IGNORECASE)


# ------------------------------------------------------------------------------------------------
# Gold and score. An answer is free text, often a verbose one: what is heard in each clip, then a
# verdict. The verdict counts. It is looked for in three steps: put the text in one spelling, cut it
# into statements, and take the last one that commits to a value. Nothing is ever guessed: what
# names two values at once, hedges, asks, denies, or only lists what was heard has no verdict.

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
ONES = f"{ONES} fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = dict(zip([*ONES, *TENS], [*range(20), *range(20, 100, 10)]))
PRONOUN = [  # behind these "one" counts nothing
    "the", "this", "that", "odd", "which", "each", "every", "other", "another", "same",
    "last", "correct", "right", "wrong", "any", "no", *ORDINALS,
]  # fmt: skip
NUMBER_WORD = rf"\b(?:(?:{'|'.join(TENS)})[- ](?:{'|'.join(ONES[1:10])})|{'|'.join(NUMBERS)})\b"
NOT_PRONOUN = "".join(rf"(?<!\b{word} )" for word in PRONOUN)
SIGNS = str.maketrans(
    {"*": "", "`": "", "_": " ", "@": " "}
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")
    | dict.fromkeys("\u2018\u2019", "'") | dict.fromkeys("\u201c\u201d", '"')
)  # fmt: skip
# What opens a verdict, and what marks one wherever it stands.
OPENING = (
    r"(?:so|therefore|thus|hence|overall|in (?:conclusion|total|all|short)|total|actually|no wait"
    r"|wait|correction|sorry|i mean|(?:the |my )?(?:\w+ )?(?:answer|verdict|conclusion))\b"
)
MARK = (
    rf"^\W*(?:(?:and|but|then)\s+)?{OPENING}|\banswer\b|\bodd one out\b|\bstands out\b"
    r"|\bdoes(?: not|n't) (?:belong|fit)\b"
)
HEDGE = (
    r"(?:^|\()\s*or\b|\b(?:either|maybe|perhaps|possibly|(?:might|could|may) be|part(?:ly|ially)"
    r"|necessarily|unsure|uncertain|unclear|whether|or (?:something|none|another)"
    r"|not (?:sure|certain|know))\b|n't know\b"
)
REASON = r"\b(?:because|since|whereas|while|although|though|as (?=[#it]))"
FILLER = set(
    "a about actually after all also always am an and answer answers any appear appears are as at "
    "audio audios be been begins being believe best between both but by can certainly choose "
    "chronological clearly clip clips common conclusion contain contains correct definitely did do "
    "does each end ends event every feature features file final first follows for from go goes has "
    "have hear heard hence here hold holds i in is it it's its keyword keywords last mean mention "
    "mentioned mentions my no number occurs of offset on one ones only onset option order our "
    "overall phrase pick please recording recordings right s said sample say says sec second "
    "seconds segment sequence share shared should so sorry sound sounds speaker spoken start "
    "starts that that's the their them then there there's therefore these they think this those "
    "thus time times to total track tracks until verdict wait was we were what which with word "
    "words would".split()
)
TAIL = 4000  # characters: of a model that never stops, only the end is read


def without_thoughts(answer: str) -> str:
    """An answer without the thoughts in it. Some models are prompted to think, and only end it."""
    answer = re.sub(r"(?is)<think>.*?(?:</think>|\Z)", " ", answer)
    return re.split("(?i)</think>", answer)[-1]


@lru_cache(maxsize=1 << 12)
def plain(text: str) -> str:
    """One spelling: no markdown, lower case, digits, and "#2" for the second clip."""
    text = unicodedata.normalize("NFKC", text).casefold().translate(SIGNS)
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text))
    text = re.sub(r"\bhalf a dozen\b", "6", re.sub(r"(?<!half )\b(?:a|one) dozen\b", "12", text))
    text = re.sub(rf"{NOT_PRONOUN}{NUMBER_WORD}", spell_number, text)
    text = re.sub(r"\b([1-9]|10)(?:st|nd|rd|th)\b", lambda m: ORDINALS[int(m[1]) - 1], text)
    text = re.sub(r"\band (?=\d+ in\b)", "plus ", re.sub(r"\bvs\.", "vs", text))
    text = re.sub(rf"\b({ORDINAL}): ", r"\1 ", text)  # "first: clip 2"
    return re.sub(rf"(#\d+)\s+(?:{NOUN}s?|one)\b", r"\1", tag_clips(text))


def spell_number(match) -> str:
    return str(sum(NUMBERS[word] for word in re.split("[- ]", match.group())))


def tag_clips(text: str, pattern=NAMED) -> str:
    """Write "#2" for what names clip 2."""

    def tag(match):
        group = match.lastgroup
        if group == "ordinal":
            return f"#{ORDINALS.index(match[group]) + 1}"
        before = match.group()[: match.start(group) - match.start()] if group == "bare" else ""
        together = re.sub(r",(?!\s*(?:and|or)\b)", " and", match[group])  # "not clips 1, 2"
        return before + re.sub(r"\d+", r"#\g<0>", together)

    return re.sub(pattern, tag, text)


def terms(text: str) -> list[str]:
    """The words of a text in one spelling, without articles where there are others."""
    return tokens(plain(text))


def tokens(text: str, also: str = "") -> list[str]:
    found = re.findall(rf"[@#]\d+|(?<!\w)-?\d+(?:[.:]\d+)*|[\w']+[#\u266f\u266d]?|%{also}", text)
    return [word for word in found if word not in ("a", "an", "the")] or found


def words(text: str) -> list[str]:
    """The words of a text as they are: lower case, without punctuation."""
    return re.findall(r"[\w']+", unicodedata.normalize("NFKC", text).casefold().translate(SIGNS))


def statements(text: str) -> list[str]:
    """Sentences and lines; a verdict's opening begins a new one, as does a colon that is not that
    of "audio 2: a dog". A reason is no part of what it is given for."""
    if len(re.findall(r"(?m)^ ?\d+[.)]\s+\S", text)) > 1:  # a numbered list is one statement
        text = re.sub(r"\n+", ", ", re.sub(r"(?m)^ ?\d+[.)]\s+", "", text))
    text = re.sub(rf"(?<=[,:;.!?\n-])\s*(?=(?:(?:and|but)\s+)?{OPENING})", "\n", text)
    found = []
    for sentence in re.split(r"(?<=\?)(?=\s)|[.!;]+(?=\s|$)|\n+", text):
        if sentence.rstrip().endswith("?"):  # a question states nothing
            continue
        sentence = re.sub(rf"^\s*{REASON}[^,]*,", "", sentence)
        sentence = re.sub(rf"{REASON}.*", "", sentence)
        marked = re.search(MARK, sentence)
        found += [sentence] if marked else re.split(rf"(?<!#\d)(?<!#\d\d){COLON}", sentence)
    return found


# What is denied is not named: a statement is cut into clauses, and one with a denial counts for
# nothing. "Clip 2 has no dog" may answer a question or deny that clip; without the question nobody
# can tell, so it takes a verdict ("so clip 2", "the one without a dog is clip 2").
NOT = (
    r"\b(?:not?|cannot|\w+n't|(?:is|are|ai|ca|do|does|did|wo)nt|nor|never|neither|none|nothing"
    r"|nobody|hardly|scarcely|unlikely|(?:less|least) likely|doubt\w*|disagree\w*|rul(?:e|ed|ing)"
    r"|reject\w*|exclud\w*|eliminat\w*|discard\w*|ignor\w*|mistake\w*|avoid|refuse"
    r"|lack(?:s|ing)?|absent|missing|fails?|far from|opposite)\b"
)
DENIAL = rf"(?:{NOT}|\b(?:wrong|incorrect|false|untrue)\b)"
EXCEPT = (  # what sets the rest of a clause apart
    r"\b(?:than|unlike|except\w*|the exception|instead of|without|with no|compared (?:to|with)"
    r"|differ\w* from|as opposed to|(?:apart|aside) from|besides|barring|save)\b"
)
SAME_AS = [  # denials that affirm, exceptions that look otherwise, and what each comes to
    (r"\bnot (?:only|just)\b|\b(?:no|without)(?: an?y?)? doubt\b|\bdoubtless\b|\bno wait\b", " "),
    (r"\b(?:no \w+|no(?:ne|thing)|no(?= other)|can(?:no|')t be any\w*) (?:but|(?:other|else) than)",
     " "),
    (r"\b(?:rather|other) than\b", "than"),
    (r"\b(?:any|every|each|all)\w*(?: \w+){0,3} but\b", "not"),
    (r"(?:\bnot|\bnothing|\w+n't) (?:\w+ )?like\b", "unlike"),
    (r"\bdoes(?: not|n't) (?:\w+ )?(?:match|fit|belong)\b", "unlike"),
    (r"^\W*the (?:\w+ ){1,3}(?:that|which|with|without|where)\b(?!.*\b(?:wrong|right|correct|answer"
     r"|it)\b).* is (?:the )?(?=[#@]?\d)", " "),
]  # fmt: skip
COLON = r"(?<!wrong)(?<!incorrect)(?<!false)(?<!answer)(?<!not):\s+"
SOME = r"[#@]\d+(?:\s*,\s*[#@]\d+)*\s*,?\s+(?:and|n?or)\s+(?:the\s+)?[#@]\d+"  # a list, "and" in it
CLAUSE = (  # where one ends: at no comma between bare numbers, nor at one that leads to an "or"
    rf"(?:(?<!\d)|(?!\s*,\s*\d))\s*,(?!(?:\s+(?!{NOT})\S+){{0,3}}\s+n?or\b)|{COLON}|\s-+\s"
    rf"|\b(?:but|so|yet)\b|(?={EXCEPT})|\band\s+(?=(?:there \w+ )?{NOT})|(?<=\d) (?=not [#@\d])"
    rf"|\b(?:that|which|who|where)\b(?=(?:\s+\S+){{0,4}}?\s+{DENIAL})"
)


def clauses(text: str) -> list[str]:
    for pattern, meaning in SAME_AS:
        text = re.sub(pattern, meaning, text)
    return re.split(CLAUSE, re.sub(SOME, lambda m: m.group().replace(",", " "), text))


def takes_back(text: str) -> bool:
    """Whether it only denies what was said before, as "that is wrong" does."""
    rest, denials = re.subn(DENIAL, " ", text)
    return denials > 0 and not set(tokens(rest)) - FILLER


def affirmed(text: str, back: bool = True) -> str:
    """A statement without what it denies. Where a denial may be the answer, none takes back."""
    if not re.search(rf"{DENIAL}|{EXCEPT}|\bbut\b", text):
        return text
    kept = []
    for clause in clauses(text):
        kept = [] if back and takes_back(clause) else kept
        kept.append(";" if re.search(rf"{DENIAL}|{EXCEPT}", clause) else clause)
    return ",".join(kept)


UNSURE = [None, None]  # more values than one, which is what no answer may have


def verdict(answer: str, find, back: bool = True):
    """The value that an answer commits to, or None. find(statement) -> the values it names and the
    rest of its text. What is marked as the answer goes before what is nothing but a value, and
    that before what is said in passing. With `back`, "that is wrong" takes back all before it."""
    passing, bare, marked, hedged = [], [], [], False
    for statement in statements(plain(answer)):
        statement, hedges = re.subn(HEDGE, " ", statement)
        outside = re.sub(r"\([^()]{3,}\)", lambda m: f", {m[0]}" * takes_back(m[0]), statement)
        values, rest = find(outside)
        if not values:
            values, rest = find(statement)
        if not values:
            if back and takes_back(statement):
                passing, bare, marked = [], [], []
            continue
        only = not set(tokens(rest)) - FILLER
        rank = marked if re.search(MARK, statement) else bare if only else passing
        hedged = hedges > 0
        if not hedged:
            rank.append(values)
    if hedged:  # the last word on it takes back what was said before
        return None
    if marked or bare:
        last = (marked or bare)[-1]
        agreed = marked or all(values == last for values in bare)
        return last[0] if agreed and len(last) == 1 else None
    if not passing or len(passing[-1]) > 1:
        return None
    earlier = [value for values in passing[:-1] for value in values]  # a list of what was heard
    return passing[-1][0] if not earlier or passing[-1][0] in earlier else None


# A whole number that counts or points: no index, time, share or part of another.
NUMBER = r"(?<![\w#.:/-])\d+(?!\w|[.:/-]\d|\s*(?:s|sec|seconds?|ms|k?hz|db)\b)"
JOINED = rf"(?:[\s,&+]|\b(?:and|nor|the|both|plus|also|{NOUN}s?)\b)+"  # clips named together
TAGS = rf"#\d+(?:{JOINED}#\d+)*"
ALONE = (
    r"\bnumber\s*(?P<one>\d+)"
    rf"|(?:\bthe\s+|^\W*(?=\w+\W*$))(?P<ordinal>{ORDINAL})(?=\s*(?:[,;.]|$|(?:and|is|was|has)\b))"
)


def find_clips(text: str):
    """Clips named together, but for those that it is said not to be. "Clip 1 is quieter than clip
    2" names clip 1, as one says to "which is quieter?": the question is not known here."""
    text = affirmed(tag_clips(tag_clips(text, NAMED + BARE), ALONE))
    rest = re.sub(TAGS, " ", text)
    groups = re.findall(TAGS, text)
    if not groups:  # numbers alone, as in "2" or "the answer is 1 and 3"
        rest = re.sub(NUMBER, " ", text)
        alone = rest != text and not set(tokens(rest)) - FILLER
        groups = [text] if alone else []
    values = {frozenset(map(int, re.findall(r"\d+", group))) for group in groups}
    return list(values), rest


NEXT = (  # what may stand between one clip of an order and the next
    r"(?:[\s,;<>=\u2192-]|\b(?:and|then|before|followed by|next|finally|lastly|last|comes?|came|is"
    rf"|was|which|after that|the|precedes|{NOUN}s?|{ORDINAL})\b)+"
)


def find_order(text: str):
    """Clips in a row, with nothing but "then" and the like between them."""
    text = tag_clips(text, NAMED + BARE)
    run = rf"(?:\b{ORDINAL}{NEXT})?#\d+(?:{NEXT}#\d+)+"
    if not re.search(run, text):  # "2, 1, 3" or "second, first, third", and nothing else
        text = re.sub("[#-]", " ", text)
        runs = [rf"{item}(?:{NEXT}{item})+" for item in (NUMBER, rf"\b{ORDINAL}\b")]
        run = next((run for run in runs if re.search(run, text)), run)
    text = re.sub(r"\breverse\w*|\bbackwards\b", "wrong", text)
    text = affirmed(re.sub(run, lambda m: re.sub(r",|\s-+\s", " then ", m.group()), text))
    rest = re.sub(run, " ", text)
    if "#" not in text and set(tokens(rest)) - FILLER:
        return [], rest
    values = []
    for found in re.findall(run, text):
        places = [ORDINALS.index(word) + 1 for word in re.findall(ORDINAL, found)]
        order = [int(number) for number in re.findall(r"\d+", found)] or places
        straight = order == places or places == sorted(places)  # not "second: 1, first: 2"
        values += [tuple(order)] if straight and len(set(order)) == len(order) else UNSURE
    return values, rest


VAGUE = (  # what is said around a number that is no count
    r"\b(?:between|at (?:the )?(?:very )?(?:least|most)|more or less|(?:more|less|fewer) than|over"
    r"|under|below|above|up to|about|around|nearly|approximately|roughly|almost|some|double|half of"
    r"|(?:max|min)imum(?: of)?)\s+(?=\d)|[~<>\u2248]\s*(?=\d)"
    r"|(?<=\d)(?:\+|-ish\b|\s*(?:-|to|or)\s*\d|\s+or\s+(?:more|fewer|so)\b)"
    r"|(?<=\d)\s+(?:\w+ ){0,2}(?:too (?:many|few)|at (?:the )?(?:least|most)"
    r"|(?:more|fewer|less) than|(?:max|min)imum)\b"
    r"|(?<=\d)\s*(?:%|/|\bhundred|\bthousand|\bmillion|\bdozen|\bhal(?:f|ves)\b)"
)
NONE_OF = r"\b(?:none|never|there (?:is|are|was|were) no)\b(?! \d)"
TIMES_OF = {"once": "1", "twice": "2", "thrice": "3"}


def find_count(text: str):
    """Numbers that count: no clip's index, no time, no share."""
    text = re.sub(rf"\b(?:across|in|of) (?:all |the |these )*\d+ {NOUN}s\b", " ", text)
    text = affirmed(re.sub(VAGUE, " ~ ", re.sub(NONE_OF, " 0 ", text)))
    text = re.sub(r"\b(?:once|twice|thrice)\b", lambda m: TIMES_OF[m.group()], text)
    text = re.sub(r".*=(?=\s*\d)", "", re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))
    count = rf"(?:~ *)?{NUMBER}(?:\s+[\w~]+)?"
    if total := re.search(rf"{count}\s+(?:in total|in all|altogether|overall)\b", text):
        text = total.group()
    found = sorted({int(number[:15]) for number in re.findall(NUMBER, text)})  # some never end
    rest = re.sub(rf"{NUMBER}(?:\s+[a-z]\w+)?", " ", text)
    return (UNSURE if "~" in text else found), rest


def find_span(text: str, named: bool):
    """One clip, if clips are told apart at all, and two times: 1.2, 1.2 s, 1200 ms or 0:01.2."""
    text = affirmed(re.sub(r"\boutside\b|\bbefore(?=[^,]* after)", "not", text))
    clips = set(re.findall(r"#(\d+)", text))
    text = re.sub(r"#\d+", " ", text)
    time = r"(?<![\w.:])(?:(\d+):)?(\d+(?:\.\d+)?)(?![.:]?\d)\s*(ms\b)?"
    times = [
        (float(minutes or 0) * 60 + float(seconds)) / (1000 if ms else 1)
        for minutes, seconds, ms in re.findall(time, text)
    ]
    fine = len(times) == 2 and times[0] < times[1] and named <= len(clips) <= 1
    clip = int(clips.pop()) if fine and clips else None
    return ([(clip, *times)] if fine else []), re.sub(time, " ", text)


CANNOT = r"(?:can ?not|can't|could(?: not|n't)|impossible to)"
DENIED = (  # a bare "no" is an answer, and denies nothing that follows
    rf"(?:(?!no\b){NOT}|\bwrong\b|\bno (?:{NOUN}|one|evidence|way|means|part|reason)\b)"
    r"\s+(?:(?!and\b)\S+\s+){0,6}?\W*"
)
YESNO = {  # in this order, for "not true" holds "true"
    "nei": r"(?:(?:\bnot|n't) (?:have |give |contain )?enough (?:information|info|evidence)"
    r"|\bnei|insufficient (?:information|info|evidence)|(?:is|are) insufficient|no information"
    rf"|{CANNOT} (?:be )?(?:determined?|tell|told|said|know|known|inferred?|verif(?:y|ied))"
    r"|undetermined|unknown|not (?:mention(?:ed)?|stated|specified)|neutral)\b",
    "no": r"\b(?:nope|false|incorrect|untrue|contradict(?:s|ed)?)\b"
    r"|(?:^\W*(?:(?:that|this|it)(?:'s| is)|is) |\()wrong\b(?! to\b)"
    rf"|{DENIED}(?:yes|true|correct|support(?:s|ed)?|entail(?:s|ed)?)\b"
    r"|\bno\b(?=\s*(?:$|[,:)\"-]|it|they|s?he|this|these|both|all|#|not|we\b|i\b|and\b|or\b))",
    "yes": r"\b(?:yes|yeah|yep|true|correct(?! (?:answer|option|choice|verdict))|supports?"
    r"|supported|entailed)\b",
}
DENIED_ANSWER = (  # "rather than yes", "no is wrong", "not false"
    rf"{EXCEPT}.*|(?:\b(?:yes|no)|{YESNO['nei']})\W{{1,2}}(?=is|was|would|can).*{DENIAL}"
    rf"|{DENIED}(?:no|false|incorrect|untrue|contradict\w*|{YESNO['nei']})\b"
)
LEADING = (
    r"^\W*(yes|no)\b\s*(?:,|-|it\b|they\b|this\b|both\b)"
    r"(?!\s*(?:and |or |but )?(?:yes|no|true|false)\b|.*\b(?:enough|insufficient|determined|wrong)"
    r"\b)"
)


def find_yesno(text: str):
    if leading := re.search(LEADING, text):  # what follows is why
        return [leading[1]], ""
    text = re.sub(
        r"\bto (?:say|tell|answer|decide) \W*(?:yes|no)\b(?:\W+or\W+(?:yes|no)\b)?", " ", text
    )
    values, rest = set(), ""
    for clause in clauses(text):
        clause = re.sub(DENIED_ANSWER, " ", clause)
        for value, pattern in YESNO.items():
            values |= {value} if re.search(pattern, clause) else set()
            clause = re.sub(pattern, " ", clause)
        rest += clause
    return sorted(values), rest


LETTER = (
    r"\b(?:option|choice)\s+\(?([a-z])\b\)?|[(\[]([a-z])[)\]]"
    r"|(?:^|\b(?:answer|it|choose|pick)(?:\s+is|'s)?:?\s|(?<=\bnot )|(?<=\bthan ))\s*([a-z])"
    r"(?=\s*(?:[.,:;)-]|$|(?:and |but )?not\b))\)?"
)


def find_choice(text: str, choices: list[str], back: bool):
    """Choices by their letter or by their text, a longer one before one that it holds. Where a bare
    letter is a text, as of a chord, that is meant."""
    texts = [terms(choice) for choice in choices]

    def letter(match):
        place = ord(match[1] or match[2] or match[3]) - ord("a")
        place = texts.index([match[3]]) if [match[3]] in texts else place
        return f" @{place} " if place < len(choices) else " "

    text = f" {' '.join(tokens(re.sub(LETTER, letter, text), '|,'))} "
    named = {i: " (?:, )?".join(map(re.escape, told)) for i, told in enumerate(texts)}
    for i in sorted(named, key=lambda i: -len(named[i])):
        text = re.sub(rf"(?<= ){named[i]}(?= )", f"@{i}", text)
    text = affirmed(text, back)
    values = sorted({choices[int(i)] for i in re.findall(r"@(\d+)", text)})
    return values, re.sub(r"@\d+", " ", text)


def find_keywords(answer: str, gold: list[str]):
    """The content words of the last statement that has some; of what it quotes, if it quotes."""
    wanted = {word for keyword in gold for word in words(plain(keyword))}
    for statement in reversed(statements(plain(answer))):
        if not re.search(rf"{DENIAL}|{EXCEPT}", " ".join(wanted)):  # else "no" may be one of them
            if takes_back(statement):
                return None
            statement = affirmed(statement)
        quoted = re.findall(r'"([^"]+)"', statement)
        said = set(words(" ".join(quoted) or re.sub(r"#\d+", " ", statement)))
        if found := said - (FILLER - wanted):
            return found
    return None


def said(answer: str) -> str:
    """The words that an answer reports: what it quotes, or what follows "... says:"."""
    lead = re.match(
        r"(?i)[^:\"\u201c]{0,60}\b(?:says?|said|transcript\w*|speech|words)[^:]{0,20}:", answer
    )
    quoted = re.findall(r"[\"\u201c]([^\"\u201c\u201d]+)[\"\u201d]", answer)
    return quoted[0] if len(quoted) == 1 else answer[lead.end() :] if lead else answer


FINDERS = {"yesno": find_yesno, "clip": find_clips, "order": find_order, "count": find_count}


def parse(gold: dict, answer: str):
    """The value that an answer gives to a question of this gold's type, or None where it commits to
    none: a choice's text, "yes"/"no"/"nei", a frozenset of clips, a tuple of clips, a number,
    (clip or None, on, off), a set of words; for text and transcript the answer's own words."""
    kind, value, answer = gold["type"], gold["value"], without_thoughts(answer)
    if kind == "transcript":
        return words(said(answer)) or None
    answer = unicodedata.normalize("NFKC", answer[-TAIL:])[-TAIL:]  # one letter may become 18
    if kind == "choice":
        ways = gold["choices"]
        same = [c for c in ways if plain(c).strip(" .") == plain(answer).strip(" .")]
        back = not re.search(DENIAL, plain(" ".join(ways)))  # else a "no" may be the answer
        return same[0] if same else verdict(answer, lambda s: find_choice(s, ways, back), back)
    if kind == "span":
        named = "clip" in value
        found = verdict(answer, lambda s: find_span(s, named))
        if found or re.search(HEDGE, plain(answer)):
            return found
        answer = ", ".join(statements(plain(answer)))  # a clip in one of them, times in another
        whole, _ = find_span(answer, named)
        return whole[0] if whole else None
    if kind == "keywords":
        return find_keywords(answer, value)
    if kind == "text":  # a caption, or whatever else, may come after what led to it
        return terms(re.split(r"(?i)\banswer(?: is)?:", answer)[-1]) or None
    return verdict(answer, FINDERS[kind], back=kind != "yesno")


def score(gold: dict, answer: str) -> float | None:
    """The primary score of an answer, 0 to 1; None where it could not be parsed, which counts as 0.

    gold is {type, value}, and for choice and yesno `choices`, the whole answer space (read_rows
    copies the row's): a choice's value is the text of the right one, never its letter, so that
    the options can be shuffled. span's value is {clip, on, off}, without clip where there is but
    one; text's is {text, slots}: a slot is the list of ways to say one fact that the answer must
    name. Every word of a text answer that belongs to no fact, nor to `text`, costs as much as a
    wrong fact: naming everything is no answer.
    """
    found = parse(gold, answer)
    if found is None:
        return None
    kind, value = gold["type"], gold["value"]
    if kind == "clip":
        return float(found == frozenset([value] if type(value) is int else value))
    if kind == "order":
        return float(found == tuple(value))
    if kind == "span":
        right = found[0] in (None, value.get("clip", found[0]))
        return float(right and overlap(found[1:], (value["on"], value["off"])) > 0.5 - 1e-9)
    if kind == "keywords":
        return f1(found, {word for keyword in value for word in words(plain(keyword))})
    if kind == "text":
        return score_text(value, found)
    if kind == "transcript":
        return max(0.0, 1 - error_rate(value, answer))
    return float(found == value)


def overlap(a, b) -> float:
    """Intersection over union of two spans of time."""
    both = min(a[1], b[1]) - max(a[0], b[0])
    return max(0.0, both) / (max(a[1], b[1]) - min(a[0], b[0]))


def f1(found: set, wanted: set) -> float:
    return 2 * len(found & wanted) / (len(found) + len(wanted))


def score_text(gold: dict, found: list[str]) -> float:
    answer = f" {' '.join(found)} "
    ways, known = facts_of(gold["text"], tuple(map(tuple, gold["slots"])))
    hits = sum(any(way in answer for way in slot) for slot in ways)
    strange = {w for w in found if w[0] not in "#@"} - known - FILLER
    return 2 * hits / (hits + len(strange) + len(ways))


@lru_cache(maxsize=1 << 15)
def facts_of(text, slots):
    """The ways to say each fact, and all words of theirs and the text's: a tally holds thousands of
    answers against the same golds."""
    ways = [[f" {' '.join(terms(way))} " for way in slot] for slot in slots]
    return ways, {*terms(text), *" ".join(itertools.chain(*ways)).split()}


def error_rate(value: str, answer: str) -> float:
    """Word errors of a transcript. "She said: go" may be a report of "go", or what was said: the
    better of the two counts."""
    answer = without_thoughts(answer)
    ways = {tuple(words(said(answer))), tuple(words(answer))}
    return min(word_errors(words(value), way) for way in ways)


def word_errors(wanted: list[str], found: list[str]) -> float:
    """Word error rate: the least insertions, deletions and substitutions, by what was wanted."""
    row = list(range(len(found) + 1))
    for i, word in enumerate(wanted, 1):
        last, row = row, [i]
        for j, other in enumerate(found, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (word != other)))
    return row[-1] / len(wanted)


def chance(example: dict) -> float:
    """The expected score of a uniform guess over the item's answer space; 0 where it is open. Of
    several clips a guess is taken to know how many; a count is closed by meta.range."""
    gold = example.get("gold", {})
    kind, value = gold.get("type"), gold.get("value")
    if kind in ("choice", "yesno"):
        return 1 / len(gold.get("choices", ("yes", "no", "nei")[: 2 + (value == "nei")]))
    if kind == "clip":
        joined = (c.get("join", [c]) if isinstance(c, dict) else [c] for c in example["clips"])
        clips = sum(map(len, joined))
        expect(clips, "chance", "the example as it was", "a view that has no clips")
        return 1 / math.comb(clips, 1 if type(value) is int else len(value))
    if kind == "order":
        return 1 / math.factorial(len(value))
    if kind == "count" and "range" in example["meta"]:
        least, most = example["meta"]["range"]
        return 1 / (most - least + 1)
    return 0.0


# ------------------------------------------------------------------------------------------------
# Reading rows, one by one, however many there are. A row that is not what it has to be is refused
# by name: read_rows(path) raises at the first; read_rows(path, refused.append) goes on, and
# `refused` tells how many there were and what was wrong with each.

ROW = {"id": str, "task": str, "skill": str, "source": str, "licences": [str], "meta": dict}
ASKED = {"question": str, "answer": str, "gold": dict}  # in ours, but for those of several turns
ROW_KNOWN = {"choices": [str], "gold": dict}
INTERVALS = [(str, float, float)]  # what, from, to
CORPUS = {
    "id": str, "path": str, "corpus": str, "split": {"train", "dev", "test"}, "duration": float,
    "licence": str,
}  # fmt: skip
CORPUS_KNOWN = {
    "speaker": str, "transcript": str, "captions": [str], "labels": [str],
    "events": INTERVALS, "emotion": str, "music": dict, "quality": dict,
    "dialogue": {"id": str, "turn": int}, "order": {"group": str, "index": int},
    "words": INTERVALS, "phones": INTERVALS,
    "voice": {"f0": float, "tract": float, "rate": float, "breath": float},
}  # fmt: skip
WITHIN = {  # what is known of a music or a quality, by the name of both
    **{f"music.{name}": str for name in ("key", "mode", "instrument", "dynamics", "language")},
    **{f"music.{name}": float for name in ("tempo", "energy", "valence", "danceability")},
    "quality.label": str, "quality.strength": float, "quality.unit": str,
}  # fmt: skip
GOLDS = {  # the shape of a gold's value, by its type
    "choice": str, "yesno": {"yes", "no", "nei"}, "clip": [int], "order": [int], "count": int,
    "span": {"on": float, "off": float}, "keywords": [str],
    "text": {"text": str, "slots": [[str]]}, "transcript": str,
}  # fmt: skip
SPEAKERS = {  # AF3 and LLaMA-Factory name them otherwise
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip
BLOCK = 1 << 16  # characters of a JSON array read at a time
LONGEST = 1 << 24  # characters of one row; what is longer is damaged


def stop(mistake: BadInput):
    raise mistake


def read_rows(path, refuse=stop, heard=True):
    """The examples of train.jsonl or bench.jsonl, and of AF3's and ms-swift's files as they are.
    heard=False: the clips' files need not be there, because nobody will listen to them."""
    root = Path(path).parent if heard else None
    yield from checked(path, refuse, lambda row, name: as_example(row, name, root))


def read_corpus(path, refuse=stop):
    """The clips of a corpus.jsonl."""
    yield from checked(path, refuse, lambda row, name: as_corpus(row, Path(path).parent))


def disk_table(columns: str):
    """An empty table `it`, in memory while it is small, then in a file that goes with it. Who
    reads on may be another thread than who began."""
    table = sqlite3.connect("", check_same_thread=False)
    table.execute(f"create table it ({columns})")
    return table


def is_flat(value, levels=50) -> bool:
    """Whether lists and objects lie at most `levels` deep in each other: code that calls itself for
    each level comes back from there."""
    inner = value.values() if isinstance(value, dict) else value
    inner = (part for part in inner if isinstance(part, (dict, list)))
    return levels > 0 and all(is_flat(part, levels - 1) for part in inner)


def checked(path, refuse, check):
    seen = disk_table("id blob primary key")
    for number, row in read_values(path, refuse):
        where = f"{path}: row {number}"
        try:
            expect(isinstance(row, dict), "row", "an object", row, 80)
            expect(is_flat(row), "row", "at most 50 levels of lists and objects", "more")
            where += f" ({row['id']})" if isinstance(row.get("id"), str) else ""
            row = check(row, f"{Path(path).stem}-{number}")
            id = row["id"].encode("utf-8", "surrogatepass")  # JSON can hold half a character
            fresh = seen.execute("insert or ignore into it values (?)", (id,)).rowcount
            expect(fresh, "id", "one of its own", "a duplicate")
        except BadInput as mistake:
            refuse(BadInput(f"{where}: {mistake}"))
            continue
        yield row


def read_values(path, refuse):
    """(number, value) for each line of a .jsonl, or for each element of a JSON array. A bad line is
    refused; a damaged array ends the reading, for nobody knows where its next row begins."""
    try:
        with open(path, "rb") as file:
            if file.read(BLOCK).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                file.seek(0)
                yield from read_array(path, io.TextIOWrapper(file, "utf-8-sig"))
                return
            file.seek(0)
            for number, line in lines_of(file):
                try:
                    if line is None:
                        raise ValueError(f"a line of more than {LONGEST} bytes")
                    value = json.loads(line.removeprefix(codecs.BOM_UTF8)) if line.strip() else None
                except (ValueError, RecursionError) as error:
                    refuse(BadInput(f"{path}: row {number}: expected JSON, found {error}"))
                    continue
                if line.strip():
                    yield number, value
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: expected UTF-8, found {error}") from None


def lines_of(file):
    """(number, line) of a binary file; None in place of a line longer than LONGEST, which never
    lies in memory whole."""
    for number in itertools.count(1):
        line = file.readline(LONGEST)
        if not line:
            return
        whole = len(line) < LONGEST or line.endswith(b"\n")
        yield number, line if whole else None
        while not whole:
            line = file.readline(LONGEST)
            whole = not line or line.endswith(b"\n")


def read_array(path, file):
    """The elements of a JSON array that need not fit in memory: decode the first of what is there;
    where it is not whole, read twice as much."""
    decode, number = json.JSONDecoder().raw_decode, 1
    text = file.read(BLOCK).lstrip()[1:].lstrip()
    while not text.startswith("]"):
        try:
            value, end = decode(text)
            rest = text[end:].lstrip()
            whole = rest[:1] in (",", "]")
        except (ValueError, RecursionError):
            whole = False
        if not whole:
            more = file.read(max(BLOCK, len(text))) if len(text) < LONGEST else ""
            expect(more, f"{path}: row {number}", "an element of a JSON array", text, 60)
            text = (text + more).lstrip()
            continue
        yield number, value
        number, text = number + 1, rest.removeprefix(",").lstrip()
    rest = text[1:] + file.read(BLOCK)
    expect(not rest.strip(), path, "the end behind its JSON array", rest, 60)


def as_corpus(row: dict, root) -> dict:
    check_fields(row, CORPUS, CORPUS_KNOWN)
    parts = ("music", "quality")
    inner = {f"{part}.{k}": v for part in parts for k, v in row.get(part, {}).items()}
    check_fields(inner, {}, WITHIN)
    halves = re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))
    expect(not halves, "row", "whole characters", "half of one")
    expect(row["duration"] > 0, "duration", "more than 0 s", row["duration"])
    for field in ("events", "words", "phones"):
        for what, on, off in row.get(field, ()):
            expect(0 <= on <= off, field, "0 <= on <= off", [what, on, off])
    check_clip(row["path"], "path", root)
    return row


def as_example(row: dict, name: str, root) -> dict:
    """A row of any kind as an example whose clips, markers and gold agree, or BadInput."""
    foreign = "conversations" in row or ("messages" in row and "clips" not in row)
    row = from_foreign(row, name) if foreign else row
    expect(isinstance(row.get("clips"), list), "clips", "a list", repr(row.get("clips", "none")))
    always = ROW if foreign or "messages" in row else {**ROW, **ASKED}
    check_fields(row, always, ROW_KNOWN if foreign else {**ASKED, **ROW_KNOWN})
    for i, clip in enumerate(row["clips"]):
        check_clip(clip, f"clips[{i}]", root)
    turns = row.get("messages", [])
    expect(isinstance(turns, list), "messages", "a list of turns", turns, 80)
    check_prompt(conversation(row), [], "native")
    place_clips(conversation(row), len(row["clips"]))
    check_fields({f"meta.{k}": v for k, v in row["meta"].items()}, {}, {"meta.verdict": str})
    if "gold" not in row:
        return row
    gold = dict(row["gold"])
    if gold.get("type") in ("choice", "yesno") and "choices" in row:
        same = gold.setdefault("choices", row["choices"]) == row["choices"]
        expect(same, "gold.choices", "those of the row", gold["choices"])
    check_gold(gold, len(row["clips"]))
    if gold["type"] == "count" and "range" in row["meta"]:
        span = row["meta"]["range"]
        fine = fits(span, (int, int)) and span[0] <= gold["value"] <= span[1]
        expect(fine, "meta.range", "[least, most] around the value", repr(span))
    return {**row, "gold": gold}


def check_clip(clip, field, root):
    part = {"path": clip} if isinstance(clip, str) else clip
    fine = isinstance(part, dict) and part.keys() <= {"path", "start", "end"}
    fine = fine and fits(part, dict.fromkeys(part, float) | {"path": str})
    fine = fine and 0 <= part.get("start", 0) < part.get("end", math.inf)
    expect(fine, field, "a path or {path, start, end}", clip, 80)
    there = root is None or os.path.isfile(os.path.join(root, part["path"]))
    expect(there, field, "a file", f"none at {part['path']}")


def check_gold(gold: dict, clips: int):
    kind, value = gold.get("type"), gold.get("value")
    known = isinstance(kind, str) and kind in GOLDS
    expect(known, "gold.type", " or ".join(GOLDS), repr(kind))
    shape = GOLDS[kind]
    if kind == "clip" and type(value) is int:
        value = [value]
    if kind == "span" and (clips != 1 or (isinstance(value, dict) and "clip" in value)):
        shape = {**shape, "clip": int}
    given = {"gold.value": value} | {"gold.choices": gold[k] for k in ("choices",) if k in gold}
    check_fields(given, {"gold.value": shape}, {"gold.choices": [str]})
    fine, wanted = True, "a value"
    if kind in ("clip", "order", "span"):
        named = value if kind != "span" else [value.get("clip", 1)]
        fine = 0 < len(named) == len(set(named) & set(range(1, clips + 1)))
        wanted = f"different clips of 1..{clips}"
    elif kind in ("keywords", "transcript", "text"):
        ways = value["slots"] if kind == "text" else [value if kind == "keywords" else [value]]
        fine = ways and all(slot and all(map(words, slot)) for slot in ways)
        wanted = "at least one, and words in each"
    elif kind == "count":
        fine, wanted = value >= 0, "0 or more"
    elif "choices" in gold or kind == "choice":
        texts = [" ".join(terms(choice)) for choice in gold.get("choices", [])]
        fine = value in gold.get("choices", []) and 1 < len(texts) == len(set(texts) - {""})
        wanted = f"one of different choices, {gold.get('choices', 'none')!r:.80}"
    expect(fine, "gold.value", wanted, value, 80)
    ordered = kind != "span" or 0 <= value["on"] < value["off"]
    expect(ordered, "gold.value", "0 <= on < off", value, 80)


def from_foreign(row: dict, name: str) -> dict:
    """AF3, AF-Chat (sound, conversations) or ms-swift, LLaMA-Factory (audios, messages): turns by
    other names, and placeholders without a number, whose k-th is clip k."""
    turns = row.get("conversations", row.get("messages"))
    clips = row.get("sound", row.get("audios")) or []
    fine = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
    expect(fine, "conversations or messages", "a list of turns", turns, 80)
    count, messages = itertools.count(1), []
    for turn in turns:
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        fine = isinstance(text, str) and isinstance(role, str) and role in SPEAKERS
        expect(fine, "turn", f"one of {', '.join(SPEAKERS)}, and a text", turn, 80)
        if SPEAKERS[role] == "user":
            text = re.sub(r"<(?:sound|audio)>", lambda _: f"<sound-{next(count)}>", text)
        messages.append({"role": SPEAKERS[role], "content": text})
    asked = "".join(m["content"] for m in messages if m["role"] == "user")
    placed = next(count) - 1
    whole = placed in (0, len(re.findall(MARKER, asked)))
    expect(whole, "markers", "all with a number, or none", "both")
    said = {"messages": messages}
    if [m["role"] for m in messages] == ["user", "assistant"]:
        said = {"question": messages[0]["content"], "answer": messages[1]["content"]}
    about = {"task": "chat", "skill": "chat", "source": name.rsplit("-", 1)[0]}
    return {
        "id": name if row.get("id") is None else str(row["id"]),
        **about,
        "clips": [clips] if isinstance(clips, str) else clips,
        **said,
        "licences": [],
        "meta": {},
    }


# ------------------------------------------------------------------------------------------------
# The network. Whatever goes over HTTP, to a hub, a language model or a speech server, goes through
# request(): it waits and tries again where that can help, and no message of it shows a key.

ATTEMPTS = 6
PAUSE = 1.0  # seconds before the second try, and twice as long before each one after it
LONGEST_PAUSE = 300.0  # whatever a server asks for
TIMEOUT = (10, 60)  # seconds to connect, and to wait for the next byte
LIMIT = 1 << 26  # bytes of a reply that is kept in memory
LARGEST = 1 << 37  # bytes of a download whose length nobody tells


class Refused(BadInput):
    """A request that came to nothing, for callers who know what to do about it: the status (0
    where nobody was there, 408 where no whole reply came) and the start of the reply."""

    def __init__(self, message, status=0, reply=""):
        super().__init__(message)
        self.status, self.reply = status, reply


def request(
    method, url, body=None, token=None, headers=None, timeout=TIMEOUT, limit=LIMIT, stream=False
):
    """Send `body` as JSON; the bytes of the reply, or with `stream` the open response, for the
    caller to read and close. Anything but a status 2xx is raised as Refused. Safe in threads."""
    where = masked(url)
    fine = token is None or re.fullmatch(r"[!-~]+", token)
    expect(fine, f"{where}: token", "printable characters without spaces", "others")
    for attempt in range(ATTEMPTS):
        asked = ""
        try:
            response = send(method, url, body, token, headers, timeout)
            status, asked = response.status_code, response.headers.get("Retry-After", "")
            if status // 100 == 2:
                return response if stream else read_body(where, response, limit)
            refused = refusal(where, response, token)
            again = status in (408, 409, 425, 429) or (status >= 500 and status != 501)
        except (requests.RequestException, ValueError) as error:
            cause = error.args[0] if error.args else None  # with a reason: no connection was made
            met = not isinstance(error, ValueError) and not hasattr(cause, "reason")
            refused = Refused(f"{where}: {masked(error, token)}", status=408 if met else 0)
            again = not isinstance(error, ValueError)  # an address that is none stays none
        if not again or attempt == ATTEMPTS - 1:
            raise refused
        note(f"{refused}; trying again")
        pause(attempt, asked)


def request_json(method, url, **how):
    """The same, of a service that replies in JSON."""
    reply = request(method, url, **how)
    try:
        return json.loads(reply)
    except (ValueError, RecursionError):
        found = masked(repr(reply[:200]), how.get("token"))
        raise BadInput(f"{masked(url)}: expected JSON, found {found:.80}") from None


def send(method, url, body, token, headers, timeout):
    """One try: the open response. Redirects are followed here, since what lies behind one may
    belong to somebody else: the token goes to the host, port and scheme of the first address
    alone, and what is posted nowhere else at all."""

    def sign(prepared):
        prepared.headers["Authorization"] = f"Bearer {token}"
        return prepared

    home = urlsplit(url)[:2]
    for _ in range(10):
        response = session(threading.get_ident(), os.getpid()).request(
            method, url, json=body, headers=headers, timeout=timeout, stream=True,
            auth=sign if token and urlsplit(url)[:2] == home else None, allow_redirects=False,
        )  # fmt: skip
        target = response.headers.get("Location")
        moved = response.status_code in (301, 302, 303, 307, 308) and target
        if not moved or method not in ("GET", "HEAD"):
            return response
        response.close()
        url = urljoin(url, target)
    raise ValueError("more than 10 redirects")


@lru_cache(maxsize=256)
def session(thread, process) -> requests.Session:
    """One for each thread: its connections stay open, and nobody else reads from them."""
    logging.getLogger("urllib3").setLevel(logging.WARNING)  # below that it tells whole addresses
    made = requests.Session()
    made.get_redirect_target = lambda response: None  # else a redirect's body is read, any length
    return made


def read_body(where, response, limit) -> bytes:
    body = bytearray()
    with response:
        for chunk in response.iter_content(1 << 16):
            body += chunk
            expect(len(body) <= limit, where, f"at most {limit} bytes", "more")
    return bytes(body)


def refusal(where, response, token) -> Refused:
    """What a reply with a bad status says. Services repeat keys in their complaints."""
    try:
        said = read_body(where, response, 1 << 16).decode("utf-8", "replace")
    except (requests.RequestException, BadInput):
        said = ""
    said, status = masked(said, token), response.status_code
    told = " ".join(f"{masked(str(response.reason), token)}: {said}".split())
    return Refused(f"{where}: the server says {status} {told:.200}", status, said[:4000])


URL = r"https?://[^/]"  # how the address of a server begins


def masked(said, token=None) -> str:
    """Text for a message: no key, and of an address neither user and password nor the query, which
    may be a signature. An exception is unwrapped: the innermost reason says most."""
    if isinstance(said, Exception):
        cause = said.args[0] if said.args else said
        said = str(getattr(cause, "reason", cause)).split(": ", 1)[-1]
    said = said.replace(token, "***") if token else said
    return re.sub(r"\?[^\s'\")]+", "?...", re.sub(r"//[^/\s]*@", "//", said))


def pause(attempt, asked=""):
    """Wait as long as the server asked (Retry-After: seconds or a date) or longer each time; never
    quite the same, lest all who were turned away come back at once."""
    try:
        if asked[:1].isdecimal():
            wait = float(asked)
        else:
            wait = parsedate_to_datetime(asked).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        wait = PAUSE * 2**attempt
    time.sleep(min(max(wait, PAUSE), LONGEST_PAUSE) * random.uniform(1, 1.25))


def progress(label, total=None, done=0, unit="MB", scale=1e6):
    """A function to be told how much more is done; it keeps one line on a terminal up to date.
    Without a total, nobody knows how much there will be."""
    start, begun, shown = time.monotonic(), done, 0.0

    def show(more):
        nonlocal done, shown
        done, now = done + more, time.monotonic()
        ended = total is not None and done >= total
        if not sys.stderr.isatty() or (now - shown < 0.2 and not ended):
            return
        shown, rate = now, (done - begun) / max(now - start, 1e-3)
        of = left = ""
        if total is not None:
            of = f" of {total / scale:.0f}"
            left = f", {max(0, total - done) / rate / 60:.0f} min left" if rate else ""
        line = clean(f"{label}: {done / scale:.0f}{of} {unit}, {rate / scale:.1f} {unit}/s{left}")
        print(f"\x1b[K{line}", end="\n" if ended else "\r", file=sys.stderr, flush=True)

    return show


# --- downloads: what has arrived stays in <name>.part; only what was verified loses that ending


def download(url, path, size=None, digest=None, token=None, show=None):
    """Bring the file at `url` to `path`, as far as it is not there in part. `digest` is what it has
    to have: "sha256:...", "md5:..." or "git:..." (of git's blob). `show` is told of new bytes."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    if path.exists() and digest and not file_fault(path, size, digest):
        return  # whoever was to use it was interrupted
    for _ in range(2):  # anew, once, if what was held or came turns out to be wrong
        with open(part, "ab") as mine:
            hold(mine, part)  # two at once would mix what they append
            try:
                fault = file_fault(part, fill_part(part, url, size, token, show), digest)
            except Refused as refused:
                if refused.status != 416:
                    raise
                whole = digest and not file_fault(part, size, digest)  # killed before the renaming
                fault = None if whole else refused
            if not fault:
                part.replace(path)
                return
            part.unlink()
    raise BadInput(f"{masked(url)}: wrong twice: {fault}")


def fill_part(part, url, size, token, show) -> int | None:
    """Append what is missing, however often the connection breaks, as long as more arrives. The
    size is returned, since it may be the server that knows it."""
    where, failed = masked(url), 0
    while size is None or size_of(part) < size:
        held = size_of(part)
        ranged = {"Range": f"bytes={held}-"} if held else {}
        headers = {"Accept-Encoding": "identity", **ranged}
        try:
            with request("GET", url, token=token, headers=headers, stream=True) as response:
                size = whole_size(where, response, held, size)
                append(part, response, held, LARGEST if size is None else size, show)
            if size is None:
                expect(size_of(part) < LARGEST, where, f"less than {LARGEST} bytes", "more")
                break
        except requests.RequestException as error:
            note(f"{where}: {masked(error, token)}; going on")
        failed = 0 if size_of(part) > held else failed + 1
        expect(failed < ATTEMPTS, part, f"{size} bytes", f"{held}, and no more come")
        if size is None or size_of(part) < size:
            pause(failed)
    return size


def whole_size(where, response, held, size) -> int | None:
    """How long the file is: as the headers say, which have to agree with what is known. So a reply
    that is something else, like a network's login page, never gets into it."""
    said = response.headers.get("Content-Length", "")
    if response.status_code == 206:
        span = response.headers.get("Content-Range", "none")
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", span)
        expect(found and int(found[1]) == held, where, f"bytes from {held} on", span)
        said = found[2]
    whole = int(said) if re.fullmatch("[0-9]{1,18}", said) else size
    expect(size in (None, whole), where, f"{size} bytes", whole)
    return whole


def append(part, response, held, whole, show):
    """A server that does not know Range begins anew: what is held already is passed over."""
    skip = 0 if response.status_code == 206 else held
    response.raw.enforce_content_length = False  # it would drop the last bytes of a broken body
    with open(part, "ab") as file:
        for chunk in response.iter_content(1 << 16):
            new = chunk[skip:][: whole - file.tell()]
            skip = max(0, skip - len(chunk))
            file.write(new)
            if show:
                show(len(new))
            if file.tell() == whole:
                return


def size_at(url) -> int | None:
    """The size of the file at `url`, where the server tells it: some know no HEAD, or do not know
    how long what they send will be."""
    try:
        identity = {"Accept-Encoding": "identity"}
        with request("HEAD", url, headers=identity, stream=True) as response:
            said = response.headers.get("Content-Length", "")
    except Refused as refused:
        if refused.status not in (400, 403, 405, 501):
            raise
        return None
    return int(said) or None if re.fullmatch("[0-9]{1,18}", said) else None


def size_of(path) -> int:
    return path.stat().st_size if path.is_file() else 0


def file_fault(path, size, digest, show=None) -> str | None:
    """How a file differs from what was promised, or None."""
    if not path.is_file():
        return f"{path}: no such file"
    found = path.stat().st_size
    if found != size and size is not None:
        return f"{path}: expected {size} bytes, found {found}"
    if digest is None:
        return None
    kind = digest.split(":")[0]
    made = hashlib.new("sha1" if kind == "git" else kind)
    if kind == "git":  # a blob's name is the SHA-1 of this and its content
        made.update(b"blob %d\0" % found)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            made.update(block)
            if show:
                show(len(block))
    found = f"{kind}:{made.hexdigest()}"
    return None if found == digest else f"{path}: expected {digest}, found {found}"


def check_space(folder, needed):
    """Asked before the first byte: a full disk would be noticed hours later."""
    free = shutil.disk_usage(folder).free
    expect(needed <= free, folder, f"{needed / 1e9:.3f} GB of free space", f"{free / 1e9:.3f} GB")


# --- language models. A reply is on the disk before anybody looks at it, and whoever asks the same
# again finds it there: a run that was killed, or comes a second time, pays for nothing twice.

PATIENCE = (10, 600)  # seconds to connect, and to wait for a reply, which comes as a whole
HOPELESS = 0, 401, 402, 403, 404  # nobody there, or nobody who would answer: the next is no better
NO_CONTEXT = r"context[ _]length|maximum context|too many tokens|prompt is too long"
NO_FORMAT = r"response_format|json_schema|schema|structured|guided|grammar"


class NoReply(BadInput):
    """There is no reply to this one thing, and the next may have one; the text says why."""


def hash_of(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Journal:
    """Replies in a file, a JSON object each, found by the hash of what was asked."""

    def __init__(self, path):
        self.lock, self.path = threading.Lock(), path
        self.places = {}  # hash of what was asked -> where the file has the reply
        self.refused = set()  # (model, what it would not do)
        self.new, self.old = Counter(), Counter()  # replies and tokens, now and in earlier runs
        self.file = open(path, "a+b")
        hold(self.file, path)
        self.read()

    def read(self):
        """What earlier runs heard. A line that was torn when they were killed goes."""
        self.file.seek(0)
        end = 0
        for line in self.file:
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                fine = fits(record, {"key": str, "model": str, "usage": (int, int)})
                fine = fine and isinstance(record.get("refused", record.get("content")), str)
            except (ValueError, RecursionError):
                fine = False
            if not fine:
                raise BadInput(f"{self.path}: byte {end}: expected a reply")
            self.note(record, end, len(line), self.old)
            end += len(line)
        self.file.truncate(end)

    def note(self, record, start, length, into):
        self.places[record["key"]] = start, length
        self.refused.add((record["model"], record.get("refused")))
        into.update(replies=1, read=record["usage"][0], written=record["usage"][1])

    def recall(self, asked: dict) -> dict | None:
        place = self.places.get(hash_of(asked))
        return place and json.loads(os.pread(self.file.fileno(), place[1], place[0]))

    def keep(self, asked: dict, **reply) -> dict:
        """The reply, on the disk. Of what was asked only the hash is kept, and who was asked."""
        record = {"key": hash_of(asked), "model": asked["model"], "usage": [0, 0], **reply}
        line = json.dumps(record).encode() + b"\n"
        with self.lock:
            start = self.file.seek(0, os.SEEK_END)
            self.file.write(line)
            self.file.flush()
            os.fsync(self.file.fileno())
            self.note(record, start, len(line), self.new)
        return record

    def close(self):
        self.file.close()


class Service:
    """A model behind a chat server as OpenAI has made it usual. Safe in threads. apart: whether
    one of the same name on another server is another model."""

    def __init__(self, url, model, journal: Journal, per_minute=0, apart=False):
        base = url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
        self.url, self.model, self.journal = f"{base}/v1/chat/completions", model, journal
        self.key = os.environ.get("OPENAI_API_KEY") or None
        self.where = {"server": self.url} if apart else {}
        self.pace = 60 / per_minute if per_minute else 0
        self.lock, self.free_at, self.gone = threading.Lock(), 0.0, None

    def say(self, messages, seed, most, temperature, schema=None) -> dict:
        """The reply to these messages, from the journal or the server: {content, finish}. With a
        schema it is to be JSON of that kind, if the server can see to it."""
        while True:
            body = {"model": self.model, "messages": messages, "temperature": temperature,
                    "seed": seed, "max_tokens": most}  # fmt: skip
            if schema and (self.model, "response_format") not in self.journal.refused:
                body["response_format"] = {"type": "json_schema", "json_schema": schema}
            record = self.journal.recall({**body, **self.where}) or self.ask(body)
            if record.get("refused") == "response_format":  # so the schema in the prompt must do
                continue
            if "refused" in record:
                raise NoReply(record["refused"])
            return record

    def ask(self, body) -> dict:
        with self.lock:  # each waits for its own turn, however many there are
            now = time.monotonic()
            turn = self.free_at = max(now, self.free_at + self.pace)
        time.sleep(turn - now)
        if self.gone:  # another thread was told so
            raise self.gone
        try:
            reply = request("POST", self.url, body, self.key, timeout=PATIENCE, limit=1 << 20)
        except Refused as refused:
            if refused.status in (400, 413, 422) and re.search(NO_CONTEXT, refused.reply, re.I):
                return self.keep(body, refused="context length")
            if refused.status in (400, 422) and "response_format" in body:
                if re.search(NO_FORMAT, refused.reply, re.I):
                    warn(f"{self.model} takes no response_format: the prompt must do")
                    return self.keep(body, refused="response_format")
            if refused.status in HOPELESS or "insufficient_quota" in refused.reply:
                self.gone = refused
                raise
            warn(str(refused))
            raise NoReply(f"status {refused.status}") from None
        except BadInput as mistake:
            warn(str(mistake))
            raise NoReply("no reply") from None
        return self.keep(body, **self.read_reply(reply))

    def keep(self, body, **reply):
        return self.journal.keep({**body, **self.where}, **reply)

    def read_reply(self, reply) -> dict:
        """What matters of it. A server may repeat what it was sent, and that has a key. What is no
        reply is not kept: the same command asks again."""
        text = reply.decode("utf-8", "replace")
        text = text.replace(self.key, "***") if self.key else text
        try:
            value = json.loads(text)
            choice = value["choices"][0]
            said = choice["message"]["content"]
        except (ValueError, RecursionError, LookupError, TypeError):
            wanted = f"{masked(self.url)}: expected a reply with choices, found"
            warn(f"{wanted} {clean(text[:60])!r}")
            raise NoReply("a reply that is none") from None
        usage = value.get("usage") if isinstance(value.get("usage"), dict) else {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        return {
            "content": said if isinstance(said, str) else "",
            "finish": str(choice.get("finish_reason")),
            "usage": [count if type(count) is int and count > 0 else 0 for count in counts],
        }


def leave_at_once():
    """Let Ctrl-C wait for no reply that is under way. What was heard before is in the journal."""

    def leave(*_):
        print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
        os._exit(130)

    signal.signal(signal.SIGINT, leave)


# ------------------------------------------------------------------------------------------------
# Weights: a folder as the Hub has it, brought in and checked. Only safetensors: a pickle is a
# program, and would run.

INDEX = "model.safetensors.index.json"
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
TENSORS = r"(adapter_)?model(-\d+-of-\d+)?\.safetensors"
PAPERS = r"(?i:readme|licen[cs]e|notice)[\w-]*(\.(md|txt))?"
TAKEN = "|".join([TENSORS, PAPERS, "(adapter_)?config.json", INDEX, *COMPANIONS])
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
RECORD = "download.json"  # where a folder comes from: {id, commit, files: {name: [size, digest]}}


def stays_inside(name) -> bool:
    """Whether a name out of an index, a server's list or an archive stays inside its folder."""
    if not isinstance(name, str) or re.search(r"[\\\0]|^[A-Za-z]:", name):
        return False
    return not {"", ".", ".."} & set(name.split("/"))


def pickle_among(names, otherwise) -> str:
    """What there is in place of safetensors, for a message."""
    old = sorted(name for name in names if Path(name).suffix in PICKLES)
    return f"{old[0]}, a pickle or the like, which is not read" if old else otherwise


def open_tensors(path):
    """Open a safetensors file, whose header covers it exactly, or say what it is instead."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        with open(path, "rb") as file:
            start = file.read(9)
        if start[:2] == b"PK" or (start[:1] == b"\x80" and start[8:] != b"{"):
            raise BadInput(f"{path}: expected safetensors, found a pickle, not read") from None
        raise BadInput(f"{path}: not a whole safetensors file ({error})") from None


def open_shard(path: Path, keys=None):
    """The same, holding what an index promises."""
    expect(path.is_file(), path.parent, f"shard {path.name}, which the index names", "no such file")
    file = open_tensors(path)
    for key in sorted(set(file.keys()) ^ set(file.keys() if keys is None else keys)):
        raise BadInput(f"{path}: {key}: the index and the file disagree about it")
    return file


def shard_files(dir: Path) -> dict[Path, list[str] | None]:
    """The files that hold the weights, each with the keys that the index promises in it."""
    index = dir / INDEX
    if not index.exists():
        files = sorted(path for path in dir.glob("model*.safetensors") if path.is_file())
        if len(files) == 1:
            return {files[0]: None}
        found = pickle_among((path.name for path in dir.iterdir()), f"{len(files)} files")
        expect(False, dir, "model.safetensors or shards with an index", found)
    shards = {}
    document = read_json(index)
    names = document.get("weight_map") if isinstance(document, dict) else None
    fine = isinstance(names, dict) and names
    expect(fine, f"{index}: weight_map", "names of files", names, 60)
    for key, name in names.items():
        inside = stays_inside(name) and "/" not in name
        expect(inside, f"{index}: {key}", "a file in this folder", name)
        shards.setdefault(dir / name, []).append(key)
    return shards


def tensor_faults(dir: Path) -> dict[Path, str]:
    """{file: what is wrong with it} of the safetensors in a folder and their index."""
    faults, shards = {}, dict.fromkeys(sorted(dir.glob("*.safetensors")))
    try:
        adapter = [path.name for path in shards] == ["adapter_model.safetensors"]
        shards |= {} if adapter else shard_files(dir)
    except BadInput as mistake:
        faults[dir / INDEX] = str(mistake)
    for path, keys in shards.items():
        try:
            open_shard(path, keys)
        except BadInput as mistake:
            faults[path] = str(mistake)
    return faults


def check_weights(dir: Path):
    """Every fault of a folder in a line; its files are also held against what was downloaded."""
    expect(dir.is_dir(), dir, "a folder of weights", "none")
    files = read_record(dir).get("files", {})
    show = progress(dir, sum(size for size, _ in files.values()))
    found = {dir / name: file_fault(dir / name, *file, show) for name, file in files.items()}
    faults = tensor_faults(dir) | {path: fault for path, fault in found.items() if fault}
    for fault in faults.values():
        fail(fault)
    if faults:
        note("delete what is damaged, and the same download brings it again")
        sys.exit(2)
    held = f"{len(files)} files as downloaded" if files else f"no {RECORD}: no hashes compared"
    print(clean(f"{dir}: no faults ({held})"))


def read_record(dir) -> dict:
    """What download.json says, or {} where there is none."""
    record = read_json(dir / RECORD) if (dir / RECORD).exists() else {}
    fine = isinstance(record, dict) and (not record or {"id", "commit", "files"} <= set(record))
    fine = fine and are_files(record.get("files", {}))
    expect(fine, dir / RECORD, "a list of files as this program writes it", "something else")
    return record


def are_files(files) -> bool:
    """Whether it is {name: [size, digest]}, in every entry."""
    digest = r"(sha256:[0-9a-f]{64}|git:[0-9a-f]{40})"
    return isinstance(files, dict) and all(
        stays_inside(name) and re.fullmatch(rf"\[\d+, '{digest}'\]", repr(file))
        for name, file in files.items()
    )


def list_files(id, revision, endpoint, token) -> tuple[str, dict]:
    """The commit that a revision stands for now, and of its files those to take. For large ones
    the Hub knows a SHA-256, for small ones the name of git's blob."""
    url = f"{endpoint}/api/models/{id}/revision/{quote(revision, safe='')}?blobs=true"
    reply = request_json("GET", url, token=token)
    try:
        commit, listed = str(reply["sha"]), {file["rfilename"]: file for file in reply["siblings"]}
        for name in listed:
            expect(stays_inside(name), f"{id}: list of files", "names inside the folder", name)
        files = {}
        for name in sorted(name for name in listed if re.fullmatch(TAKEN, name)):
            file, large = listed[name], listed[name].get("lfs")
            digest = f"sha256:{large['sha256']}" if large else f"git:{file['blobId']}"
            files[name] = [(large or file)["size"], digest]
    except (LookupError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{masked(url)}: expected the Hub's list of files, found {error!r}"
        ) from None
    fine = re.fullmatch("[0-9a-f]{40}", commit) and are_files(files)
    expect(fine, masked(url), "a commit, and the sizes and hashes of its files", "others")
    tensors = any(re.fullmatch(TENSORS, name) for name in files)
    expect(tensors, id, "safetensors", pickle_among(listed, "none"))
    return commit, files


def fetch_weights(id, revision, endpoint, dir: Path, token):
    """Bring in what `dir` lacks. The commit is written down before the first file: a branch that
    moves on cannot mix two of them, and a second run knows what is there without asking."""
    record = read_record(dir)
    commit, files = record.get("commit"), record.get("files")
    if not record or revision not in (None, commit):
        commit, files = list_files(id, revision or "main", endpoint, token)
    asked = f"{id} at {commit}, or another folder (--out)"
    found = f"{record.get('id', id)} at {record.get('commit', commit)}"
    expect(found == f"{id} at {commit}", dir, asked, found)
    for name, file in files.items() if not record else ():  # what is there is somebody else's
        fault = (dir / name).exists() and file_fault(dir / name, *file)
        expect(not fault, dir, asked, fault)
    dir.mkdir(parents=True, exist_ok=True)
    if not record:
        write_json(dir / RECORD, {"id": id, "commit": commit, "files": files})
    lacking = {name: file for name, file in files.items() if file_fault(dir / name, file[0], None)}
    total = sum(size for size, _ in lacking.values())
    held = sum(min(size, size_of(dir / f"{name}.part")) for name, (size, _) in lacking.items())
    check_space(dir, total - held)
    show = progress(dir, total, held)
    for name, (size, digest) in lacking.items():
        url = f"{endpoint}/{id}/resolve/{commit}/{quote(name)}"
        download(url, dir / name, size, digest, token, show)
    for fault in tensor_faults(dir).values():
        raise BadInput(fault)
    did = f"{len(lacking)} downloaded, {total / 1e6:.1f} MB"
    did = did if lacking else "nothing to do (by their sizes; --check compares hashes)"
    print(clean(f"{dir}: {len(files)} files of {id} at {commit[:12]}, {did}"))


def run_weights(args):
    if args.check:
        expect(not args.id, "ID", "none beside --check", args.id)
        return check_weights(args.check)
    fine = re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", args.id or "", re.ASCII)
    expect(fine, "ID", "a repository like Qwen/Qwen2-Audio-7B-Instruct", args.id or "none")
    token = os.environ.get("HF_TOKEN", "").strip() or None
    endpoint = args.endpoint.rstrip("/")
    fine = re.match(URL, endpoint)
    expect(fine, "--endpoint", "an address that begins with http:// or https://", masked(endpoint))
    dir = args.out or Path(__file__).parent / "weights" / args.id.split("/")[-1]
    try:
        fetch_weights(args.id, args.revision, endpoint, dir, token)
    except Refused as refused:
        if refused.status not in (401, 403):
            raise
        has = "is set, but does not open it" if token else "is not set"
        page = f"{masked(endpoint)}/{args.id}"
        asks = f"ask for access at {page}, then put a token of yours into HF_TOKEN, which {has}"
        raise BadInput(f"{refused}; gated, private or not there: {asks}") from None


def add_weights(commands):
    parser = commands.add_parser(
        "weights", help="bring in a model from the Hub, or check one that is here",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=WEIGHTS_HELP,
    )  # fmt: skip
    home = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    parser.add_argument("id", nargs="?", metavar="ID", help="a repository: owner/name")
    parser.add_argument("--revision", help="a branch, tag or commit; default: main")
    parser.add_argument("--endpoint", default=home, metavar="URL", help="a mirror of the Hub")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: weights/<name>")
    parser.add_argument("--check", type=Path, metavar="DIR", help="verify a folder, offline")
    parser.set_defaults(run=run_weights)


WEIGHTS_HELP = """\
examples:
  python prepare.py weights nvidia/audio-flamingo-3-hf          # 17 GB into weights/
  python prepare.py weights Qwen/Qwen2-Audio-7B-Instruct --out /data/qwen2-audio
  python prepare.py weights --check weights/audio-flamingo-3-hf

Config, tokenizer and safetensors are taken, pickles never. After an interruption the same command
goes on where it was; when all is there it does nothing. download.json holds the commit, and the
folder stays at it: another revision goes to another folder.
HF_TOKEN in the environment opens gated repositories; HF_ENDPOINT is another default for --endpoint.
"""


# ------------------------------------------------------------------------------------------------
# Corpora: from what others have on disk to corpus.jsonl, one clip a line. A corpus is one short
# generator over its documented layout, which yields what the metadata says: id, audio file (None:
# it is not there), split and what else is known. write_corpus adds what the audio says.
# Whatever grows with a corpus lies in a table on disk: AudioSet alone has two million clips.

AUDIO = re.compile(r"\.(wav|flac|mp3|ogg)$", re.IGNORECASE)
PART_SPLITS = {  # what corpora call their splits, and we
    "train": "train", "development": "train", "dev": "dev", "val": "dev", "validation": "dev",
    "test": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


def split_by_group(group: str, splits=("test", "dev", *("train",) * 8)) -> str:
    """For a corpus without a test split: of ten groups one is test, one dev, the same for ever. A
    group is what must not be torn apart: a speaker, an artist, a source recording."""
    number = int.from_bytes(hashlib.sha256(group.encode(errors="replace")).digest(), "big")
    return splits[number % len(splits)]


def clip_row(id, path, part, **known) -> dict:
    return {"id": clean(str(id)), "path": path, "split": PART_SPLITS.get(part), **known}


def stem(name: str) -> str:
    """A file's name without its audio extension. An id may hold dots of its own, and a Mac spells
    accents in another way."""
    name = unicodedata.normalize("NFC", AUDIO.sub("", name.strip()))
    return name.encode(errors="replace").decode()  # halves of characters are no Unicode


def index_audio(root):
    """find(name, ...) -> the first of them that is an audio file under `root`, or None; or every
    file of that name. A name may come with its folder ("test/syn_1"), and with or without an
    extension, in whatever case. The table knows what is under the root, or linked from there by
    who owns it: no name out of a csv leads anywhere else."""
    table = disk_table("name text, path text, primary key (name, path)")
    add = "insert or ignore into it values (?, ?)"
    seek = "select path from it where name = ? order by path limit ?"
    walked = set()  # a link to a folder further up would be walked for ever
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in walked:
            folders.clear()
            continue
        walked.add(real)
        for file in files:
            path = os.path.join(folder, file)
            if AUDIO.search(file) and not re.search("[\ud800-\udfff]", path):  # no Unicode
                names = (stem(file), f"{stem(os.path.basename(folder))}/{stem(file)}")
                table.executemany(add, [(name, path) for name in names])

    def find(*names, every=False):
        for name in map(stem, names):
            if found := [Path(row[0]) for row in table.execute(seek, (name, -1 if every else 1))]:
                return found if every else found[0]

    return find


def find_files(root, *names) -> list[Path]:
    """Files of these names (or patterns) under the root or up to three folders below: archives
    differ in how deep they put things."""
    depths = ("", "*/", "*/*/", "*/*/*/")
    return sorted({path for name in names for depth in depths for path in root.glob(depth + name)})


def part_of(file: Path):
    """The part of its corpus that a file is about, by its name: "eval" of eval_segments.csv."""
    return next((word for word in re.findall("[a-z]+", file.stem) if word in PART_SPLITS), None)


def read_lines(path):
    """Lines of a text file: UTF-8 with or without a byte-order mark, or, line by line where that
    does not hold, Latin-1."""
    check_file(path)
    with open(path, "rb") as file:
        for number, line in lines_of(file):
            if line is None:
                most = f"at most {LONGEST} bytes"
                raise BadInput(f"{path}: line {number}: expected {most}, found more")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError:
                text = line.decode("latin-1")
            yield text.removeprefix("\ufeff") if number == 1 else text


def read_tables(root, names, columns, **style):
    for path in find_files(root, *names):
        yield from read_table(path, columns, **style)


def read_table(path, columns, header=True, tab=False, quotes=True):
    """Rows of a csv or tsv file as {column: text}, with the `part` of the file. With a header,
    `columns` are those it has to have; without one (then lines with # are comments) they are all,
    in order. A short row is filled with "": whoever needs the rest finds it missing."""
    lines = (line for line in read_lines(path) if header or not line.startswith("#"))
    style = {"delimiter": "\t" if tab else ",", "skipinitialspace": not tab}
    rows = csv.reader(lines, quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE, **style)
    found, line = columns.split(), 0
    try:
        if header:
            found = [name.strip().lower().replace(" ", "_") for name in next(rows, [])]
            missing = [name for name in columns.split() if name not in found]
            expect(not missing, f"{path}: header", f"a column {missing[:1]}", found)
        for row in rows:
            if rows.line_num > line + 50:
                raise csv.Error(f"the quote that opens in line {line + 1} does not close")
            line = rows.line_num
            if row:
                cells = [*map(str.strip, row), *[""] * len(found)]
                yield {"part": part_of(path), **dict(zip(found, cells))}
    except csv.Error as error:
        raise BadInput(f"{path}: line {rows.line_num}: {error}") from None


def grouped(rows, column):
    """The rows that share a value, wherever they stand, sorted by it. To join files is the same."""
    table = disk_table("value text, row text")
    pairs = ((row[column], json.dumps(row)) for row in rows)
    table.executemany("insert into it values (?, ?)", pairs)
    ordered = table.execute("select value, row from it order by value, rowid")
    for _, group in itertools.groupby(ordered, lambda pair: pair[0]):
        yield [json.loads(row) for _, row in group]


def number(text) -> float | None:
    return float(text) if re.fullmatch(r"-?\d+\.?\d*(e-?\d+)?", str(text)) else None


def known(fields: dict) -> dict:
    """Without what is not known: an absent field claims nothing."""
    return {name: value for name, value in fields.items() if value not in (None, "", [], {})}


def excerpts(video, start) -> list[str]:
    """What people's downloaders call the excerpt of a video that begins at `start` seconds."""
    at = number(start)
    times = [] if at is None else [f"_{at:g}", f"_{at:.3f}", f"_{at:06.0f}", f"_{at * 1000:.0f}"]
    return [prefix + video + time for time in [*times, ""] for prefix in ("Y", "")]


# --- the corpora, each by its own documents


def audioset_names(root) -> dict:
    """{"/m/09x0r": "Speech"}"""
    style = {"header": False}
    tables = itertools.chain(
        read_tables(root, ["class_labels_indices.csv"], "index mid name", **style),
        read_tables(root, ["mid_to_display_name.tsv"], "mid name", tab=True, **style),
    )
    names = {row["mid"]: row["name"] for row in tables}
    expect(names, root, "class_labels_indices.csv or mid_to_display_name.tsv", "neither")
    return names


def audioset(root, find):
    names, columns = audioset_names(root), "video start end labels"
    for row in read_tables(root, ["*_segments.csv"], columns, header=False):
        id = f"{row['video']}_{(number(row['start']) or 0) * 1000:.0f}"
        labels = [names.get(label.strip(), label) for label in row["labels"].split(",")]
        yield clip_row(id, find(*excerpts(row["video"], row["start"])), row["part"], labels=labels)


def audioset_strong(root, find):
    names, columns = audioset_names(root), "segment_id start_time_seconds end_time_seconds label"
    tables = read_tables(root, ["audioset_*_strong.tsv"], columns, tab=True)
    for rows in grouped(tables, "segment_id"):
        video, _, start = rows[0]["segment_id"].rpartition("_")  # an id may hold "_" itself
        times = [(number(r["start_time_seconds"]), number(r["end_time_seconds"])) for r in rows]
        events = [[names.get(r["label"], r["label"]), *time] for r, time in zip(rows, times)]
        events = merge_events(e for e in events if None not in e and e[1] < e[2])
        path = find(*excerpts(video, (number(start) or 0) / 1000))
        about = {"labels": [label for label, _, _ in events], "events": events}
        yield clip_row(rows[0]["segment_id"], path, rows[0]["part"], **about)


def merge_events(events) -> list:
    """[[label, on, off], ...] in order of time. Where one label's overlap or repeat, they are one
    event: the annotators' strokes are not what a listener counts."""
    merged, last = [], {}
    for label, on, off in sorted(events, key=lambda event: (*event[1:], event[0])):
        if label in last and on <= last[label][2]:
            last[label][2] = max(last[label][2], off)
        else:
            last[label] = [label, on, off]
            merged.append(last[label])
    return merged


def clotho(root, find):
    for part in ("development", "evaluation", "validation"):
        files = [f"clotho_captions_{part}.csv", f"clotho_metadata_{part}.csv"]
        for rows in grouped(read_tables(root, files, "file_name"), "file_name"):
            row = {column: text for row in rows for column, text in row.items()}
            id = f"{part}/{stem(row['file_name'])}"
            about = {"captions": [row.get(f"caption_{i}", "") for i in range(1, 6)]}
            about["labels"] = row.get("keywords", "").split(";")
            if sound := row.get("license"):
                about["licence"] = f"{sound}; captions: Tampere University, non-commercial"
            yield clip_row(id, find(id, f"clotho_audio_{id}"), part, **about)


def audiocaps(root, find):
    columns = "audiocap_id youtube_id start_time caption"
    tables = read_tables(root, ["train.csv", "val.csv", "test.csv"], columns)
    for rows in grouped(tables, "youtube_id"):
        video, names = rows[0]["youtube_id"], [row["audiocap_id"] for row in rows]
        path = find(*excerpts(video, rows[0]["start_time"]), *names)
        yield clip_row(video, path, rows[0]["part"], captions=[row["caption"] for row in rows])


def transcripts(file):
    """(id, what is said) of each line of a chapter."""
    for line in filter(str.strip, read_lines(file)):
        id, _, text = line.strip().partition(" ")
        yield id, text.strip()


def librispeech(root, find):
    for file in sorted(root.glob("**/[!.]*-*.trans.txt")):
        part, speaker, chapter = ("", "", *file.parts)[-4:-1]
        for id, text in transcripts(file):
            about = {"speaker": speaker, "transcript": text}
            if (index := id.rpartition("-")[2]).isdecimal():
                about["order"] = {"group": f"{speaker}-{chapter}", "index": int(index)}
            yield clip_row(id, find(f"{chapter}/{id}"), part.split("-")[0], **about)


def mini_librispeech(root, find):
    """It has no test split: half of its dev speakers are test. None of those in train are, for
    LibriSpeech trains on them too, and the two may be used together."""
    for row in librispeech(root, find):
        if row["split"] == "dev":
            row["split"] = split_by_group(row["speaker"], ("dev", "test"))
        yield row


def common_voice(root, find):
    files = ["train.tsv", "dev.tsv", "test.tsv"]
    for row in read_tables(root, files, "client_id path sentence", tab=True, quotes=False):
        about = {"speaker": row["client_id"], "transcript": row["sentence"]}
        yield clip_row(stem(row["path"]), find(f"clips/{row['path']}"), row["part"], **about)


def dipco(root, find):
    """Utterances at the close-talk microphones, as parts of a session's recording. The far-field
    devices each started at their own time, and hear everyone at once."""
    for file in find_files(root, "transcriptions/*/S*.json"):
        part, session = file.parent.name, file.stem
        said = read_json(file)
        whole = isinstance(said, list) and all(isinstance(turn, dict) for turn in said)
        expect(whole, file, "a list of utterances", said, 60)
        timed = [(clock(t.get("start_time")), clock(t.get("end_time")), t) for t in said]
        for i, (start, end, turn) in enumerate(sorted(timed, key=lambda t: t[:2]), 1):
            speaker = str(turn.get("speaker_id", ""))
            words = re.sub(r"\[[^\]]*\]", " ", str(turn.get("words", "")))  # [laugh] is no word
            about = {"speaker": speaker, "transcript": " ".join(words.split())}
            about["dialogue"] = {"id": session, "turn": i, "speaker": speaker}
            path = find(f"{part}/{session}_{speaker}")
            yield clip_row(f"{session}-{i:04d}", path, part, **about, start=start, end=end)


def clock(times) -> float:
    """{"close-talk": "00:01:02.50"} -> 62.5; -1, which no recording has, where it cannot be read"""
    time = times.get("close-talk") if isinstance(times, dict) else None
    found = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", str(time))
    hours, minutes, seconds = map(float, found.groups()) if found else (0, 0, -1)
    return round(hours * 3600 + minutes * 60 + seconds, 3)


def musiccaps(root, find):
    columns = "ytid start_s end_s aspect_list caption is_audioset_eval"
    for row in read_tables(root, ["musiccaps*.csv"], columns):
        video, start, end = row["ytid"], row["start_s"], row["end_s"]
        path = find(*excerpts(video, start), f"[{video}]-[{start}-{end}]")
        part = "test" if row["is_audioset_eval"].lower() == "true" else "train"
        labels = re.findall(r"""['"](.*?)['"](?=[,\]])""", row["aspect_list"])  # a Python list
        yield clip_row(video, path, part, captions=[row["caption"]], labels=labels)


def music4all(root, find):
    """Tempo, key and so on are of the song that the 30 s come from. So is duration_ms, which is
    left out. Songs of one artist stay in one split."""
    files = [f"id_{part}.csv" for part in "information genres tags lang metadata".split()]
    pitches = "C C# D D# E F F# G G# A A# B".split()
    for rows in grouped(read_tables(root, files, "id", tab=True), "id"):
        row = {column: text for row in rows for column, text in row.items()}
        key, mode = number(row.get("key")), number(row.get("mode"))
        music = {name: number(row.get(name)) for name in ("energy", "valence", "danceability")}
        music["tempo"] = number(row.get("tempo")) or None  # 0, and a key of -1: not found
        music["key"] = pitches[int(key)] if key in range(12) else None
        music["mode"] = {0: "minor", 1: "major"}.get(mode)
        music["language"] = row.get("lang")
        about = {"labels": [*row.get("genres", "").split(","), *row.get("tags", "").split(",")]}
        part = split_by_group(row.get("artist") or row["id"])
        yield clip_row(row["id"], find(f"audios/{row['id']}"), part, **about, music=known(music))


def qualispeech(root, find):
    columns = "id natural_language_description"
    for row in read_tables(root, ["train.csv", "val.csv", "test.csv"], columns):
        id, part, text = (row.pop(name) for name in ("id", "part", columns.split()[1]))
        quality = {name: int(said) if re.fullmatch(r"\d{1,15}", said) else said
                   for name, said in row.items()}  # fmt: skip
        path = find(f"{part}/{id}", id)
        yield clip_row(stem(id), path, part, captions=[text], quality=known(quality))


# "cat meowing at 0.5-2.0, 3.0-4.5 and whistling at 5.0-6.5", "cat meowing two times and ..."
SPAN = r"\d+(?:\.\d+)?-\d+(?:\.\d+)?"
TIMED = re.compile(rf"(\S(?:(?! at \d).)*?) at ({SPAN}(?:, ?{SPAN})*)(?: and |\.?$)")
COUNTED = re.compile(rf"(\S.*?) ({'|'.join(NUMBERS)}) times?(?: and |\.?$)")


def picoaudio(root, find):
    """A mixture stands in one list with its true times, and perhaps in another with times that a
    language model made up from the counts: those are no events."""
    files = find_files(root, "meta_data/*.json")
    for group in grouped((row for file in files for row in picoaudio_rows(file)), "name"):
        timed = next((row["timed"] for row in group if row["timed"]), "")
        counted = [row["counted"] for row in group]
        events = timed_events(timed, counted)
        about = {"captions": [*counted, timed], "events": events, "labels": [e[0] for e in events]}
        yield clip_row(group[0]["name"], find(group[0]["name"]), group[0]["part"], **about)


def picoaudio_rows(file):
    """Its lines; one that is no object has no name, so that it is counted as damaged."""
    damaged = []
    for _, row in read_values(file, damaged.append):
        row = row if isinstance(row, dict) else {}
        yield {
            "name": stem("/".join(str(row.get("filepath", "")).split("/")[-2:])),
            "part": part_of(file),
            "timed": "" if "FromGpt" in file.name else str(row.get("onoffCaption", "")),
            "counted": str(row.get("frequencyCaption", "")),
        }
    yield from [{"name": "", "part": None, "timed": "", "counted": ""}] * len(damaged)


def timed_events(timed: str, counted: list[str]) -> list:
    """[[label, on, off], ...], or none at all where any of it cannot be read or the other caption
    counts otherwise: half an annotation would make a wrong answer."""
    spans = [(label, re.findall(SPAN, spans)) for label, spans in TIMED.findall(timed)]
    events = [[label, *map(float, span.split("-"))] for label, found in spans for span in found]
    counts = Counter(label for label, _, _ in events)
    told = [{label: NUMBERS[n] for label, n in COUNTED.findall(text)} for text in counted]
    whole = not TIMED.sub("", timed) and all(on < off for _, on, off in events)
    whole = whole and all(counts == count for count, text in zip(told, counted) if text)
    return sorted(events, key=lambda event: event[1:]) if whole else []


def esc50(root, find):
    """Its folds are for cross-validation. Like UrbanSound8K's, its clips are cut from Freesound's
    recordings, whose number decides the split; so in both a recording is in the same one."""
    for row in read_tables(root, ["meta/esc50.csv"], "filename category esc10 src_file"):
        path, part = find(f"audio/{row['filename']}"), split_by_group(row["src_file"])
        about = {"licence": "CC BY" if row["esc10"].lower() == "true" else "CC BY-NC"}
        about["labels"] = [row["category"].replace("_", " ")]
        yield clip_row(stem(row["filename"]), path, part, **about)


def urbansound8k(root, find):
    columns = "slice_file_name fsid fold class"
    for row in read_tables(root, ["metadata/UrbanSound8K.csv"], columns):
        name, labels = row["slice_file_name"], [row["class"].replace("_", " ")]
        path = find(f"fold{row['fold']}/{name}")
        yield clip_row(stem(name), path, split_by_group(row["fsid"]), labels=labels)


def vggsound(root, find):
    for row in read_tables(root, ["vggsound.csv"], "video start label split", header=False):
        id, path = f"{row['video']}_{row['start']:0>6}", find(*excerpts(row["video"], row["start"]))
        yield clip_row(id, path, row["split"], labels=[row["label"]])


def speech_commands(root, find):
    """The two lists name what is dev and test; all else is train. A speaker is a hash in the name,
    and the lists keep speakers apart."""
    for tests in find_files(root, "testing_list.txt"):
        lists = {"dev": tests.with_name("validation_list.txt"), "test": tests}
        parts = {stem(line): part for part, file in lists.items() for line in read_lines(file)}
        spoken = tests.parent.glob("[!_.]*/[!.]*_nohash_*")  # not _background_noise_
        names = {f"{path.parent.name}/{stem(path.name)}" for path in spoken}
        for name in sorted(names.union(parts) - {""}):
            word, _, take = name.partition("/")
            about = {"speaker": take.split("_nohash_")[0], "transcript": word}
            yield clip_row(name, find(name), parts.get(name, "train"), **about)


class Corpus(NamedTuple):
    """`files` under `base` are open to everyone, with their digest where one is published."""

    read: Callable
    licence: str
    where: str
    layout: str
    base: str = ""
    files: dict = {}


OPENSLR = "https://www.openslr.org/resources/"
YOUTUBE = "audio as [Y]<id>[_<start>].wav|flac|mp3|ogg in any folder, cut from YouTube by yourself"
LIBRISPEECH = "LibriSpeech/<part>/<speaker>/<chapter>/*.flac beside *.trans.txt"
CORPORA = {
    "audioset": Corpus(
        audioset, "CC BY 4.0 (labels)", "https://research.google.com/audioset/download.html",
        f"*_segments.csv, class_labels_indices.csv; {YOUTUBE}",
    ),
    "audioset-strong": Corpus(
        audioset_strong, "CC BY 4.0 (labels)",
        "https://research.google.com/audioset/download_strong.html",
        f"audioset_{{train,eval}}_strong.tsv, mid_to_display_name.tsv; {YOUTUBE}",
    ),
    "clotho": Corpus(
        clotho, "Freesound's per file; captions: Tampere University, non-commercial",
        "https://zenodo.org/records/4783391",
        "clotho_{captions,metadata}_<part>.csv; {development,validation,evaluation}/*.wav",
        "https://zenodo.org/records/4783391/files/",
        {
            "clotho_audio_development.7z": "md5:c8b05bc7acdb13895bb3c6a29608667e",
            "clotho_audio_validation.7z": "md5:7dba730be08bada48bd15dc4e668df59",
            "clotho_audio_evaluation.7z": "md5:4569624ccadf96223f19cb59fe4f849f",
            "clotho_captions_development.csv": "md5:d4090b39ce9f2491908eebf4d5b09bae",
            "clotho_captions_validation.csv": "md5:5879e023032b22a2c930aaa0528bead4",
            "clotho_captions_evaluation.csv": "md5:1b16b9e57cf7bdb7f13a13802aeb57e2",
            "clotho_metadata_development.csv": "md5:170d20935ecfdf161ce1bb154118cda5",
            "clotho_metadata_validation.csv": "md5:2e010427c56b1ce6008b0f03f41048ce",
            "clotho_metadata_evaluation.csv": "md5:13946f054d4e1bf48079813aac61bf77",
        },
    ),
    "audiocaps": Corpus(
        audiocaps, "academic use only", "https://github.com/cdjkim/audiocaps (csv only)",
        f"train.csv, val.csv, test.csv; {YOUTUBE}, or <audiocap_id>.wav",
    ),
    "librispeech": Corpus(
        librispeech, "CC BY 4.0", "https://www.openslr.org/12", LIBRISPEECH, f"{OPENSLR}12/",
        {
            "dev-clean.tar.gz":
                "sha256:76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3",
            "dev-other.tar.gz":
                "sha256:12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365",
            "test-clean.tar.gz":
                "sha256:39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23",
            "test-other.tar.gz":
                "sha256:d09c181bba5cf717b3dee7d4d592af11a3ee3a09e08ae025c5506f6ebe961c29",
            "train-clean-100.tar.gz":
                "sha256:d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2",
            "train-clean-360.tar.gz":
                "sha256:146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf",
            "train-other-500.tar.gz":
                "sha256:ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2",
        },
    ),
    "mini-librispeech": Corpus(
        mini_librispeech, "CC BY 4.0", "https://www.openslr.org/31", LIBRISPEECH, f"{OPENSLR}31/",
        {"dev-clean-2.tar.gz": None, "train-clean-5.tar.gz": None},
    ),
    "common-voice": Corpus(
        common_voice, "CC0", "https://datacollective.mozillafoundation.org (accept the terms)",
        "cv-corpus-<version>/<language>/{train,dev,test}.tsv and clips/*.mp3",
    ),
    "dipco": Corpus(
        dipco, "CDLA-Permissive", "https://s3.amazonaws.com/dipco/DiPCo.tgz",
        "audio/{dev,eval}/Sxx_Pyy.wav; transcriptions/{dev,eval}/Sxx.json",
        "https://s3.amazonaws.com/dipco/", {"DiPCo.tgz": None},
    ),
    "musiccaps": Corpus(
        musiccaps, "CC BY-SA 4.0", "https://www.kaggle.com/datasets/googleai/musiccaps (csv only)",
        f"musiccaps-public.csv; {YOUTUBE}",
    ),
    "music4all": Corpus(
        music4all, "CC BY-NC-SA 4.0, research only",
        "https://sites.google.com/view/contact4music4all (signed form)",
        "id_{information,genres,tags,lang,metadata}.csv, tab-separated; audios/<id>.mp3",
    ),
    "qualispeech": Corpus(
        qualispeech, "MIT by its card, CC BY-NC-SA 4.0 by the PolyAudio paper",
        "https://huggingface.co/datasets/tsinghua-ee/QualiSpeech (its scripts add the BVCC part)",
        "{train,val,test}.csv; wav/{train,val,test}/*.wav",
        "https://huggingface.co/datasets/tsinghua-ee/QualiSpeech/resolve/main/",
        {"train.csv": None, "val.csv": None, "test.csv": None, "wav_part1.zip": None},
    ),
    "picoaudio": Corpus(
        picoaudio, "Apache-2.0", "https://huggingface.co/datasets/ZeyuXie/PicoAudio",
        "meta_data/{train,test}*.json; data/multi_event_{train,test}/syn_*.wav",
        "https://huggingface.co/datasets/ZeyuXie/PicoAudio/resolve/main/",
        {
            "audio_data.zip": None,
            "meta_data/train.json": None,
            "meta_data/test-onoff-control_multi-event.json": None,
            "meta_data/test-onoff-control_single-event.json": None,
            "meta_data/test-frequency-control_onoffFromGpt_multi-event.json": None,
            "meta_data/test-frequency-control_onoffFromGpt_single-event.json": None,
        },
    ),
    "esc50": Corpus(
        esc50, "CC BY-NC (ESC-10: CC BY)", "https://github.com/karolpiczak/ESC-50",
        "ESC-50-master/meta/esc50.csv and audio/*.wav",
        "https://github.com/karolpiczak/ESC-50/archive/", {"master.zip": None},
    ),
    "urbansound8k": Corpus(
        urbansound8k, "CC BY-NC", "https://zenodo.org/records/1203745",
        "UrbanSound8K/metadata/UrbanSound8K.csv and audio/fold<1..10>/*.wav",
        "https://zenodo.org/records/1203745/files/",
        {"UrbanSound8K.tar.gz": "md5:9aa69802bbf37fb986f71ec1483a196e"},
    ),
    "vggsound": Corpus(
        vggsound, "CC BY 4.0", "https://www.robots.ox.ac.uk/~vgg/data/vggsound (csv only)",
        f"vggsound.csv; {YOUTUBE}",
    ),
    "speech-commands": Corpus(
        speech_commands, "CC BY 4.0", "https://www.tensorflow.org/datasets/catalog/speech_commands",
        "<word>/<speaker>_nohash_<n>.wav; validation_list.txt, testing_list.txt",
        "http://download.tensorflow.org/data/",
        {
            "speech_commands_v0.02.tar.gz":
                "sha256:af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
        },
    ),
}  # fmt: skip

# --- getting a corpus

MOST_UNPACKED = 1 << 40  # bytes
MOST_RATIO = 100  # of unpacked to packed; sound has 1 to 3
MOST_HEADER = 1 << 20  # bytes between two members of a tar; a long name has some hundred


def fetch(name, root, parts):
    """Download a corpus's files into `root`, those that begin with one of `parts` or all, and
    unpack them. What was unpacked before is not fetched again, even where its archive is gone."""
    corpus, by_hand = CORPORA[name], []
    expect(corpus.files, f"{name}: --download", "an open corpus", f"a gated one. {ask(name)}")
    wanted = [file for file in corpus.files if not parts or file.startswith(tuple(parts))]
    expect(wanted, f"{name}: --download", f"parts of {', '.join(corpus.files)}", parts)
    wanted = [file for file in wanted if not (root / f"{file}.unpacked").exists()]
    fetch_files(name, root, wanted)
    for path in (root / file for file in wanted):
        if path.suffix == ".7z":
            by_hand.append(f"7z x -o{shlex.quote(str(root))} {shlex.quote(str(path))}")
        elif path.suffix in (".gz", ".tgz", ".zip"):
            unpack(path, root)
            Path(f"{path}.unpacked").touch()
    if by_hand:
        print("\n".join(by_hand))
        raise BadInput(f"{name}: run the printed lines, then this one without --download")


def fetch_files(name, root, wanted):
    """Download those that are not there. A file has its name only since all of it had come, so
    where no digest is published, being there is enough."""
    base, digests, show = CORPORA[name].base, CORPORA[name].files, progress(f"{name}: checking")
    lacking = [file for file in wanted if file_fault(root / file, None, digests[file], show)]
    sizes = {file: size_at(base + file) for file in lacking}
    held = sum(size_of(root / f"{file}.part") for file in lacking)
    check_space(root, sum(filter(None, sizes.values())) - held)
    show = progress(name, None if None in sizes.values() else sum(sizes.values()), held)
    for file, size in sizes.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        download(base + file, root / file, size, digests[file], show=show)


def ask(name) -> str:
    """What to do for a corpus that is not there."""
    wanted = f"{CORPORA[name].where} for {CORPORA[name].layout}"
    return f"Add --download, or see {wanted}" if CORPORA[name].files else f"Ask at {wanted}"


def unpack(archive, folder):
    """Unpack a tar or zip, which is read through first: where a member is not what it may be, or
    the disk has no place for all of them, nothing is unpacked."""
    folder, total, held = Path(folder), 0, 0
    show = progress(f"{archive}: looking through")
    for path, size in members(archive):
        total, held = total + size, held + min(size, size_of(folder / path))
        show(size)
    folder.mkdir(parents=True, exist_ok=True)
    check_space(folder, total - held)
    show = progress(f"{archive}: unpacking", total)
    for _, size in members(archive, folder):
        show(size)


def members(archive, folder=None):
    """(path, size) of each member, which is then unpacked if there is a folder. None may lead out
    of it, be a link or a device, or make all grow without measure: that one is named."""
    most, total, name = min(MOST_UNPACKED, MOST_RATIO * os.path.getsize(archive)), 0, "its list"
    listed = zip_members if zipfile.is_zipfile(archive) else tar_members
    try:
        for name, plain, size, extract in listed(archive):
            where, path = f"{archive}: {name}", str(PurePosixPath(name))  # "./a/" is "a"
            inside = name and (path == "." or stays_inside(path))
            expect(inside, where, "a path inside of the archive", "one that leads out of it")
            expect(plain, where, "a file or a folder", "a link or a device")
            total += max(size, 512)  # an empty file takes its place too
            fits = total <= most
            expect(fits, where, f"at most {MOST_RATIO} times the packed size", f"{total} bytes")
            yield path, size
            if folder:
                extract(folder)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        hint = "delete it, and --download brings it again"
        raise BadInput(f"{archive}: {name}: cannot be unpacked ({error}); {hint}") from None
    except (OSError, ValueError, RuntimeError) as error:  # the last: a password is wanted
        raise BadInput(f"{archive}: {name}: cannot be unpacked ({error})") from None


def zip_members(archive):
    """(name, whether it is a file or folder, size, function to extract it into a folder)"""
    with zipfile.ZipFile(archive) as packed:
        for member in packed.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            plain = kind in (0, stat.S_IFREG, stat.S_IFDIR)
            yield member.filename, plain, member.file_size, partial(packed.extract, member)


def tar_members(archive):
    """The same of a tar, packed by gzip or not, however many there are."""
    with open(archive, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        tape = Tape(archive, gzip.GzipFile(fileobj=raw) if zipped else raw)
        with tarfile.open(fileobj=tape, mode="r:") as packed:
            while member := packed.next():
                packed.members.clear()  # else it keeps them all
                tape.left = math.inf
                extract = partial(packed.extract, member, filter="data")
                yield member.name, member.isfile() or member.isdir(), member.size, extract
                tape.left = MOST_HEADER
        while tape.file.read(1 << 20):  # gzip's checksum stands behind the end of the tar
            pass


class Tape:
    """A tar's bytes, of which few may be read between two members. Behind a header may lie more of
    it (long names, comments, a map of holes), as much as it says; tarfile holds it all in memory,
    and gzip packs 400 MB of nothing into one."""

    def __init__(self, archive, file):
        self.archive, self.file, self.left, self.name = archive, file, MOST_HEADER, "its list"
        self.seek, self.tell = file.seek, file.tell

    def read(self, size):
        self.left -= size
        if self.left < 0:
            most = f"a header of at most {MOST_HEADER} bytes"
            raise BadInput(f"{self.archive}: {self.name}: expected {most}, found more")
        block = self.file.read(size)
        if block[257:262] == b"ustar":  # a header, and it begins with a name
            self.name = block[:100].split(b"\0")[0].decode(errors="replace")
        return block


# --- writing corpus.jsonl

SILENT = 1e-3  # a peak below -60 dB
SHOWN = 5  # of each kind of trouble; --skipped lists them all


def sound_of(name, file, first=0, last=None) -> tuple[str, float, float]:
    """(hash, peak, root mean square) of the decoded samples, a block at a time. The hash is of
    rate, channels and samples, so it is the same for a wav and its flac."""
    digest = hashlib.blake2b(f"{file.samplerate} {file.channels}".encode(), digest_size=16)
    peak, power, count = 0.0, 0.0, 0
    for block in read_blocks(name, file, first, last):
        block = np.ascontiguousarray(block, "<f4") + 0.0  # a float file's -0.0 is the same sound
        loudest = float(np.abs(block).max())
        expect(math.isfinite(loudest), name, "finite samples", "NaN or infinity")
        digest.update(block)
        peak, count = max(peak, loudest), count + block.size
        power += float(np.square(block, dtype=np.float64).sum())
    return digest.hexdigest(), peak, math.sqrt(power / max(count, 1))


def measure(row: dict, hashed: bool) -> dict:
    """Add what only the audio says. Runs in worker processes; `skip` is why a row is left out."""
    if "skip" in row:
        return row
    try:
        with open_audio(row["path"]) as (name, file):
            start, end = row.get("start", 0), row.get("end")
            length = check_slice(name, file, start, end)
            row["duration"] = round((length if end is None else end) - start, 3)
            expect(row["duration"] > 0, row["path"], "at least a millisecond", "less")
            if hashed:
                last = None if end is None else round(end * file.samplerate)
                heard = sound_of(name, file, round(start * file.samplerate), last)
                row |= {"hash": heard[0], "peak": round(heard[1], 6), "silent": heard[1] < SILENT}
    except BadInput as mistake:
        row["skip"] = "undecodable", str(mistake).removeprefix(f"{row['path']}: ")
    return row


def measured(rows, hashed, workers):
    """The same rows in the same order for any number of workers, a thousand at a time: a pool
    would take in all there are, and hold them."""
    work = partial(measure, hashed=hashed)
    with worker_map(workers, "spawn", chunksize=16) as spread:
        while batch := list(itertools.islice(rows, 1024)):
            yield from spread(work, batch)


def vetted(rows, seen):
    """Mark what cannot be a clip by its metadata alone."""
    fresh = "insert or ignore into it (id, split) values (?, ?)"
    for row in rows:
        if not row["id"] or not row["split"]:
            row["skip"] = "damaged row", ""
        elif not seen.execute(fresh, (row["id"], row["split"])).rowcount:
            row["skip"] = "repeated id", ""
        elif row["path"] is None:
            row["skip"] = "missing", ""
        yield row


def corpus_row(row, name, base) -> dict:
    """A row as it is written: the fields that are always there first, the unknown left out."""
    path = Path(os.path.relpath(row.pop("path"), base)).as_posix()
    for field in row.keys() & {"captions", "labels"}:
        row[field] = list(dict.fromkeys(text.strip() for text in row[field] if text.strip()))
    first = {"id": row["id"], "path": path, "corpus": name, "split": row["split"]}
    first |= {"duration": row["duration"], "licence": CORPORA[name].licence}
    return first | known(row)


def write_corpus(args):
    """Read a corpus, write corpus.jsonl and say what came of it."""
    root, out = Path(args.root), Path(args.out)
    if args.download is not None and not root.exists():
        root.mkdir(parents=True)
    expect(args.workers > 0, "--workers", "at least one", args.workers)
    expect(root.is_dir(), f"--root {root}", "a folder", "a file" if root.exists() else "none")
    expect(out.parent.is_dir(), f"--out {out}", "a file in a folder that is there", "no folder")
    expect(not out.is_dir(), f"--out {out}", "a file", "a folder")
    apart = not args.skipped or os.path.realpath(args.skipped) != os.path.realpath(out)
    expect(apart, f"--skipped {args.skipped}", "another file than --out", "the same")
    if args.download is not None:
        fetch(args.name, root, args.download)
    corpus, real = CORPORA[args.name], Path(os.path.realpath(root))
    seen = disk_table("id text primary key, split text, hash text")
    skipped, clips, seconds = Counter(), Counter(), 0.0
    show = progress(args.name, unit="rows", scale=1)
    log = open(args.skipped, "w", encoding="utf-8", errors="replace") if args.skipped else None
    with log or nullcontext(), written(out) as file:  # the log is kept where nothing else comes
        rows = vetted(corpus.read(real, index_audio(real)), seen)
        for row in measured(rows, args.hash, args.workers):
            show(1)
            if "skip" in row:
                reason, detail = row["skip"]
                skipped[reason] += 1
                line = clean(f"{reason}: {row['id'] or '(no id)'} {detail}".rstrip())
                if skipped[reason] <= SHOWN:
                    print(line, file=sys.stderr)
                if log:
                    log.write(line + "\n")
                continue
            clips[row["split"]] += 1
            seconds += row["duration"]
            if args.hash:
                seen.execute("update it set hash = ? where id = ?", (row["hash"], row["id"]))
            row = corpus_row(row, args.name, os.path.realpath(out.parent))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        found = f"{skipped.total()} rows without sound" if skipped else "nothing of it"
        expect(clips, root, f"the corpus {args.name}", f"{found}. {ask(args.name)}")
    if args.hash:
        report_duplicates(seen)
    splits = ", ".join(f"{split} {n}" for split, n in sorted(clips.items()))
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items())) or "none"
    print(
        f"{args.name}: {clips.total()} clips, {seconds / 3600:.2f} h ({splits}); "
        f"skipped: {reasons}; licence: {corpus.licence}"
    )


def report_duplicates(seen):
    """The same sound in two splits: what is asked of it in test was learned in train."""
    groups = seen.execute(
        "select min(split || ' ' || id), max(split || ' ' || id), count(*) from it "
        "where hash is not null group by hash having count(distinct split) > 1 order by 1"
    )
    total = 0
    for total, (one, other, count) in enumerate(groups, 1):
        if total <= SHOWN:
            print(f"same sound in two splits: {one}, {other} ({count} clips)")
    print(f"sounds in more than one split: {total}")


CORPUS_HELP = f"""\
example: python prepare.py corpus esc50 --root /data/esc50 --out esc50.jsonl --download

A line of corpus.jsonl is a clip and what is known of it. Splits are the corpus's own; where it has
no test split, whole groups are drawn by a hash of their name: the source recordings of esc50 and
urbansound8k, the artists of music4all, and of mini-librispeech half of the dev speakers.
--download works for {", ".join(name for name, corpus in CORPORA.items() if corpus.files)}.

What --root has to hold:
"""


def add_corpus(commands):
    parser = commands.add_parser(
        "corpus",
        help="a public corpus as it lies on disk -> corpus.jsonl",
        epilog=CORPUS_HELP + "\n".join(f"{name}: {c.layout}" for name, c in CORPORA.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", choices=CORPORA, help=", ".join(CORPORA))
    parser.add_argument("--root", required=True, metavar="DIR", help="the folder it lies in")
    parser.add_argument(
        "--out", default="corpus.jsonl", metavar="FILE", help="default: corpus.jsonl"
    )
    parser.add_argument(
        "--download", nargs="*", metavar="PART", help="get it first: all, or files that begin so"
    )
    parser.add_argument(
        "--hash", action="store_true", help="decode all: hash, peak, silence; find duplicates"
    )
    parser.add_argument("--skipped", metavar="FILE", help="list every clip that was left out")
    few = min(8, cores())  # each holds 250 MB of libraries
    parser.add_argument("--workers", type=int, default=few, metavar="N", help=f"default: {few}")
    parser.set_defaults(run=write_corpus)


# ------------------------------------------------------------------------------------------------
# Looking at one clip.

SHADES = " ░▒▓█"
VISIBLE = 1.5  # of log_mel's units: what is 60 dB under the loudest is blank


def picture(wave, width: int, height=16) -> list[str]:
    """The log-mel in shades, a line of text for eight mel bins, low tones at the bottom."""
    windows = split_windows(wave, max_seconds=len(wave))  # all of it, however long
    mel = torch.cat([log_mel(w)[:, : n_frames(len(w))] for w in windows], dim=1)  # (M, F of all)
    cells = F.adaptive_max_pool2d(mel[None], (height, width))[0].flip(0)  # (height, width)
    floor = max(float(cells.max()) - VISIBLE, -1.4)  # -1.5 is digital silence
    shades = ((cells - floor) / VISIBLE).clamp(0, 1) * (len(SHADES) - 1)
    return ["".join(SHADES[round(shade)] for shade in line) for line in shades.tolist()]


def show_clip(args):
    if args.corpus:
        check_file(args.corpus, "a corpus.jsonl")
    with open_audio(args.file) as (name, file):
        length = file.frames / file.samplerate
        kind = f"{file.format} {file.subtype}, {file.samplerate} Hz, {file.channels} channel(s)"
        _, peak, rms = sound_of(name, file)
    level = "silent"
    if peak:
        level = f"peak {20 * math.log10(peak):.1f} dBFS, RMS {20 * math.log10(rms):.1f} dBFS"
    print(clean(f"{args.file}: {length:.3f} s, {kind}, {level}"))
    width = max(20, shutil.get_terminal_size().columns)
    print("\n".join(picture(load_audio(args.file), width)))
    print("0 s" + f"{length:.2f} s".rjust(width - 3))
    if args.corpus:
        print_rows(args.file, args.corpus)


def print_rows(file, corpus):
    """Every row of the corpus that is about this file; a long recording has many."""
    base, wanted, found = Path(corpus).parent, os.path.realpath(file), 0
    for number, row in read_values(corpus, stop):
        expect(isinstance(row, dict), f"{corpus}: row {number}", "an object", row, 80)
        if os.path.realpath(base / str(row.get("path"))) == wanted:
            found += 1
            for name, value in row.items():
                print(clean(f"{name}: {json.dumps(value, ensure_ascii=False)}"))
    if not found:
        print(clean(f"{corpus}: no row names this file"))


def add_show(commands):
    parser = commands.add_parser("show", help="a clip's length, level and picture")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--corpus", metavar="FILE", help="print what this corpus.jsonl knows of it")
    parser.set_defaults(run=show_clip)


# ------------------------------------------------------------------------------------------------

COMMANDS = (add_weights, add_corpus, add_show)


def main():
    parser = Parser(prog="prepare.py", description="Bring in what the other scripts work on.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    cli(main)
