"""What prepare.py promises about sound.

Any file that holds sound becomes one channel of float32 at 16 kHz, in time with the file; a slice
of it is the same samples as that part of the whole. What is no sound is refused in one line that
names the file. The resampler keeps what 16 kHz can hold and lets nothing else through. The log-mel
is Whisper's, number for number, without its padding; and frames, positions and slots are counted
as the encoder's convolutions count them.

Oracles: soxr for resampling, transformers' WhisperFeatureExtractor for the log-mel, torch's own
convolutions for the counts. A few numbers are written out, so that most of this runs without them.
"""

import importlib
import io
import re
import struct
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from prepare import (
    RATE,
    WINDOW,
    BadInput,
    load_audio,
    log_mel,
    log_mels,
    n_frames,
    n_positions,
    n_slots,
    resample,
    split_windows,
)

RATES = [8000, 11025, 16000, 22050, 44100, 44101, 48000, 96000]
OTHER_RATES = [rate for rate in RATES if rate != RATE]  # the ones that must be resampled


def tone(frequency, rate, seconds=0.5, amplitude=0.5, phase=0.0):
    time = np.arange(round(rate * seconds)) / rate
    return amplitude * np.sin(2 * np.pi * frequency * time + phase)


def noise(n, seed=0, amplitude=0.1):
    return (np.random.default_rng(seed).standard_normal(n) * amplitude).astype(np.float32)


def write(path, wave, rate, subtype=None):
    """Write in pieces: libsndfile's Vorbis encoder overflows its stack on one long write."""
    channels = 1 if wave.ndim == 1 else wave.shape[1]
    with soundfile.SoundFile(path, "w", rate, channels, subtype) as file:
        for i in range(0, len(wave), 10_000):
            file.write(wave[i : i + 10_000])
    return path


# ------------------------------------------------------------------------------------------------
# Any file becomes 16 kHz mono float32.

# What an encoding may cost: the root mean square of its error, relative to that of the tone.
ENCODINGS = {
    ("wav", "PCM_U8"): 2e-2,
    ("wav", "PCM_16"): 1e-4,
    ("wav", "PCM_24"): 1e-5,
    ("wav", "PCM_32"): 1e-5,
    ("wav", "FLOAT"): 1e-5,
    ("wav", "DOUBLE"): 1e-5,
    ("flac", "PCM_16"): 1e-4,
    ("flac", "PCM_24"): 1e-5,
    ("ogg", "VORBIS"): 3e-2,
    ("mp3", "MPEG_LAYER_III"): 1e-1,
}
READABLE = [
    (rate, kind, subtype)
    for kind, subtype in ENCODINGS
    for rate in RATES
    if kind != "mp3" or rate <= 48000 and rate != 44101  # mp3 knows nine rates only
]


@pytest.mark.parametrize("rate, kind, subtype", READABLE)
def test_a_tone_survives_every_encoding_and_rate(tmp_path, rate, kind, subtype):
    wave = load_audio(write(tmp_path / f"tone.{kind}", tone(440, rate), rate, subtype))
    assert wave.dtype == np.float32
    assert wave.shape == (8000,)
    inside = slice(800, -800)  # away from the ends, where a tone that starts at once is no tone
    error = wave[inside] - tone(440, RATE)[inside]
    relative = np.sqrt(np.mean(error**2)) / (0.5 / np.sqrt(2))
    assert relative < ENCODINGS[kind, subtype]


@pytest.mark.parametrize("channels", [1, 2, 6, 32])
def test_channels_are_averaged(tmp_path, channels):
    waves = noise(1000 * channels).reshape(1000, channels)
    wave = load_audio(write(tmp_path / "many.wav", waves, RATE, "FLOAT"))
    assert wave == pytest.approx(waves.mean(axis=1), abs=1e-7)


def test_channels_are_averaged_in_every_block(tmp_path, monkeypatch):
    """A long file is decoded in blocks; nothing of their borders may be heard."""
    path = write(tmp_path / "two.flac", noise(20_000).reshape(-1, 2), RATE)
    whole = load_audio(path)
    monkeypatch.setattr(prepare, "READ_BLOCK", 999)
    assert np.array_equal(load_audio(path), whole)


@pytest.mark.parametrize("kind, rate", [("mp3", 22050), ("mp3", 44100), ("ogg", 22050)])
def test_blocks_of_a_lossy_file_join_without_a_seam(tmp_path, monkeypatch, kind, rate):
    """A packet of mp3 leans on bytes of those before it. Whoever stops and starts again between
    two of them, as soundfile does after each read, must let the decoder find its feet first."""
    path = write(tmp_path / f"long.{kind}", noise(rate * 6), rate)
    whole, _ = soundfile.read(path, dtype="float32")
    monkeypatch.setattr(prepare, "READ_BLOCK", 1 << 14)
    assert load_audio(path) == pytest.approx(resample(whole, rate), abs=1e-5)


def opened(path):
    return path.open("rb")


def in_memory(path):
    return io.BytesIO(path.read_bytes())


def temporary(path):
    """The tempfile module's own kind of file object, which is none of io's."""
    file = tempfile.NamedTemporaryFile(suffix=".wav")
    file.write(path.read_bytes())
    file.seek(0)
    return file


@pytest.mark.parametrize("form", [str, Path, opened, in_memory, temporary])
def test_a_clip_is_a_path_or_an_open_file(tmp_path, form):
    path = write(tmp_path / "clip.wav", noise(4800), 48000)
    assert np.array_equal(load_audio(form(path)), load_audio(str(path)))


# What programs say when they write a wav to a pipe and do not know its length yet.
@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
@pytest.mark.parametrize("part", [(0, None), (0.25, 0.75)])
def test_a_streamed_wav_is_read_to_its_end(tmp_path, size, part):
    path = write(tmp_path / "clip.wav", noise(16000), RATE)
    expected = load_audio(path, *part)
    claim_size(path, size)
    assert np.array_equal(load_audio(path, *part), expected)


# ------------------------------------------------------------------------------------------------
# A slice is the same samples as that part of the whole, without decoding the whole.

SLICES = [(0, 1), (0, 0.01), (2.1234, 3.777), (3, 3.001), (5.00004, 5.9), (4.5, None), (5.9, 6.02)]
SLICED = [("wav", rate) for rate in RATES]
SLICED += [("flac", 22050), ("flac", 44100), ("mp3", 22050), ("mp3", 44100)]
SLICED += [("ogg", 16000), ("ogg", 22050), ("ogg", 44100)]


@pytest.mark.parametrize("kind, rate", SLICED)
def test_a_slice_equals_that_part_of_the_whole(tmp_path, kind, rate):
    path = write(tmp_path / f"six.{kind}", noise(rate * 6), rate)
    whole = load_audio(path)
    for start, end in SLICES[:: 3 if rate == 44101 else 1]:  # 16000 filters take their time
        finish = len(whole) if end is None else min(len(whole), round(end * RATE))
        part = load_audio(path, start, end)
        assert len(part) == finish - round(start * RATE), (start, end)
        assert part == pytest.approx(whole[round(start * RATE) : finish], abs=1e-5), (start, end)


@pytest.mark.parametrize("kind, most", [("wav", 1.1), ("flac", 1.1), ("mp3", 15), ("ogg", 15)])
def test_a_slice_is_found_by_seeking(tmp_path, monkeypatch, kind, most):
    """One second from the middle of forty: nearly all of the file stays undecoded. (mp3 and ogg
    may take a run-up, because their packets lean on each other.)"""
    rate, decoded = 44100, []
    path = write(tmp_path / f"long.{kind}", noise(rate * 40), rate)
    read = soundfile.SoundFile.read

    def counted(*args, **options):
        block = read(*args, **options)
        decoded.append(len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    assert len(load_audio(path, 20, 21)) == RATE
    assert 1 <= sum(decoded) / rate < most


@pytest.mark.parametrize("start, end", [
    (-1, None), (-1, 1), (0, 0), (0.5, 0.25), (1, None), (3600, 3601), (0, 1.06), (0, 1e-6),
    (0, float("inf")), (0, float("nan")), (float("nan"), None), ("0", 1), (0, "1"), (None, None),
])  # fmt: skip
def test_a_slice_outside_the_clip_is_refused(tmp_path, start, end):
    path = write(tmp_path / "one.wav", noise(16000), RATE)
    complaint = refusal(path, start, end)
    assert "slice" in complaint


def test_a_slice_may_end_a_little_after_the_clip(tmp_path):
    """Tables round their times to a tenth or a hundredth of a second."""
    path = write(tmp_path / "one.wav", noise(16000), RATE)
    assert len(load_audio(path, 0.5, 1.04)) == 8000


# ------------------------------------------------------------------------------------------------
# What is no sound is refused in one line that names the file.


def refusal(path, *part) -> str:
    """load_audio must refuse; what it says: one line that names the file."""
    with pytest.raises(BadInput) as caught:
        load_audio(path, *part)
    complaint = str(caught.value)
    assert path.name in complaint
    assert "\n" not in complaint
    return complaint


def claim_size(path, size):
    """Let the header of a plain wav say that it holds so many bytes of samples."""
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", min(size + 36, 0xFFFFFFFF))
    data[40:44] = struct.pack("<I", size)
    path.write_bytes(data)


def claim_samples(path, samples):
    """Let the STREAMINFO of a flac say that it holds so many samples: the low 36 bits of the
    eight bytes from the 18th on."""
    data = bytearray(path.read_bytes())
    fields = int.from_bytes(data[18:26], "big") >> 36 << 36
    data[18:26] = (fields | samples).to_bytes(8, "big")
    path.write_bytes(data)


def missing(folder):
    return folder / "nowhere.wav"


def name_too_long(folder):
    return folder / ("a" * 300 + ".wav")


def a_folder(folder):
    return folder


def no_bytes(folder):
    (folder / "empty.wav").touch()
    return folder / "empty.wav"


def no_samples(folder):
    return write(folder / "silent.wav", noise(0), RATE)


def text(folder, name="text.wav"):
    (folder / name).write_text("This is no sound.\n" * 20)
    return folder / name


def headless(folder):
    return text(folder, "samples.raw")


def cut(folder, kind, part=0.5):
    path = write(folder / f"cut.{kind}", noise(48000), RATE)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    return path


def cut_flac(folder):
    return cut(folder, "flac")


def cut_wav(folder):
    return cut(folder, "wav")


def cut_wav_at_its_end(folder):
    return cut(folder, "wav", 0.95)


def cut_aiff(folder):
    return cut(folder, "aiff")


def cut_mp3(folder):
    return cut(folder, "mp3")


def three_hours_of_wav(folder):
    path = write(folder / "hours.wav", noise(16000), RATE)
    claim_size(path, 3 * 3600 * RATE * 2)
    return path


def three_hours_of_flac(folder):
    path = write(folder / "hours.flac", noise(16000), RATE)
    claim_samples(path, 3 * 3600 * RATE)
    return path


def not_a_number(folder, value=np.nan):
    wave = noise(16000)
    wave[1234] = value
    return write(folder / "broken.wav", wave, RATE, "FLOAT")


def infinite(folder):
    return not_a_number(folder, -np.inf)


def channels_33(folder):
    return write(folder / "crowd.wav", noise(3300).reshape(100, 33), RATE)


def rate_999(folder):
    return write(folder / "slow.wav", noise(1000), 999)


def rate_that_nobody_has(folder):
    """16000 filters of 6000 samples each would be made for it, a gigabyte."""
    return write(folder / "odd.wav", np.zeros(1000), 767_999)


def rate_of_a_damaged_header(folder):
    return write(folder / "fast.wav", noise(1000), 2**31 - 1)


@pytest.mark.parametrize("make, words", [
    (missing, "no such file"),
    (name_too_long, "cannot be read"),
    (a_folder, "folder"),
    (no_bytes, "empty"),
    (no_samples, "no samples"),
    (text, "cannot be decoded"),
    (headless, "raw"),
    (cut_flac, ""),
    (cut_wav, "truncated"),
    (cut_wav_at_its_end, "truncated"),
    (cut_aiff, "truncated"),
    (cut_mp3, "truncated"),
    (three_hours_of_wav, "truncated"),
    (three_hours_of_flac, ""),
    (not_a_number, "sample 1234"),
    (infinite, "sample 1234"),
    (channels_33, "channels: expected at most 32, found 33"),
    (rate_999, "sample rate"),
    (rate_of_a_damaged_header, "sample rate"),
    (rate_that_nobody_has, "sample rate"),
])  # fmt: skip
def test_what_is_no_sound_is_refused_in_one_line(tmp_path, make, words):
    assert words in refusal(make(tmp_path))


@pytest.mark.parametrize("make", [missing, text, cut_mp3, rate_999])
@pytest.mark.parametrize("form", [str, Path])
def test_the_file_is_named_with_its_folder(tmp_path, make, form):
    """Two folders often hold a 1.wav each."""
    path = make(tmp_path)
    with pytest.raises(BadInput) as caught:
        load_audio(form(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("make", [three_hours_of_wav, three_hours_of_flac])
@pytest.mark.parametrize("part", [(0, None), (3600, 3601)])
def test_nothing_is_allocated_on_the_word_of_a_header(tmp_path, make, part):
    path = make(tmp_path)
    tracemalloc.start()
    refusal(path, *part)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6  # the three hours that it promises would be 691 MB


def test_a_broken_sample_is_counted_from_the_beginning_of_the_file(tmp_path):
    assert "sample 1234" in refusal(not_a_number(tmp_path), 0.05, 0.1)
    assert len(load_audio(not_a_number(tmp_path), 0.5)) == 8000  # and does no harm elsewhere


# ------------------------------------------------------------------------------------------------
# The resampler. A tone is what it was; what 16 kHz cannot hold is gone.


def fit(wave, frequency, rate=RATE):
    """Amplitude and phase of the tone that is nearest to the wave, and the largest value of what
    is left of it. The ends are left out: they see the silence around the tone."""
    time = np.arange(len(wave)) / rate
    inside = slice(len(wave) // 4, -len(wave) // 4)
    angle = 2 * np.pi * frequency * time[inside]
    basis = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    (a, b), *_ = np.linalg.lstsq(basis, wave[inside].astype(np.float64), rcond=None)
    rest = wave[inside] - basis @ [a, b]
    return np.hypot(a, b), np.arctan2(b, a), np.abs(rest).max()


def decibel(ratio):
    return 20 * np.log10(ratio)


def pass_band(rate):
    """Up to 7 kHz, or what the source can hold of it."""
    return np.linspace(50, min(7000, 0.44 * rate), 6)


@pytest.mark.parametrize("rate", OTHER_RATES + [15000, 192000])
def test_a_tone_keeps_its_height_its_place_and_its_purity(rate):
    """Flat to a tenth of a decibel, in phase with the source, and alone: neither images, which
    appear where the rate rises, nor distortion above -90 dB."""
    for frequency in pass_band(rate):
        wave = tone(frequency, rate, amplitude=1, phase=0.3).astype(np.float32)
        amplitude, phase, rest = fit(resample(wave, rate), frequency)
        assert abs(decibel(amplitude)) < 0.1, frequency
        assert phase == pytest.approx(0.3, abs=1e-3), frequency
        assert decibel(rest) < -90, frequency


@pytest.mark.parametrize("rate", [17000, 22050, 44100, 44101, 48000, 96000, 192000])
def test_nothing_above_8_khz_comes_through(rate):
    """A tone between 8 kHz and the source's Nyquist frequency would come back as another tone."""
    for frequency in np.linspace(8000, 0.499 * rate, 6):
        wave = tone(frequency, rate, amplitude=1).astype(np.float32)
        out = resample(wave, rate)
        inside = out[len(out) // 4 : -len(out) // 4]
        assert decibel(np.abs(inside).max() + 1e-12) < -90, frequency


def band_limited(rate, source_rate):
    """Forty tones below 7 kHz, or below what the source can hold, seen at a rate: 0.6 s."""
    random = np.random.default_rng(0)
    frequencies = random.uniform(50, min(7000, 0.44 * source_rate), 40)
    phases = random.uniform(0, 2 * np.pi, 40)
    time = np.arange(round(rate * 0.6)) / rate
    return np.sin(2 * np.pi * np.outer(time, frequencies) + phases).sum(axis=1) / 40


@pytest.mark.parametrize("rate", OTHER_RATES)
def test_what_is_in_the_band_is_what_it_would_be_at_16_khz(rate):
    soxr = pytest.importorskip("soxr")
    source = band_limited(rate, rate).astype(np.float32)
    ours, inside = resample(source, rate), slice(1600, 8000)
    assert ours[inside] == pytest.approx(band_limited(RATE, rate)[inside], abs=2e-6)
    theirs = soxr.resample(source, rate, RATE, "VHQ")
    assert ours[inside] == pytest.approx(theirs[inside], abs=1e-4)  # theirs is off by 6e-5


@pytest.mark.parametrize("rate", RATES)
def test_the_length_is_rounded_up(rate):
    """To a sample as long as soxr's, which rounds to the nearest; transformers rounds up too."""
    soxr = pytest.importorskip("soxr")
    for n in [1, 2, 441, 1000, 12345]:
        length = len(resample(noise(n), rate))
        assert length == -(-n * RATE // rate), n
        assert abs(length - len(soxr.resample(noise(n), rate, RATE))) <= 1, n


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_resampling_is_linear(rate):
    a, b = noise(5000, 1), noise(5000, 2)
    mixed = resample(2 * a - 0.5 * b, rate)
    assert mixed == pytest.approx(2 * resample(a, rate) - 0.5 * resample(b, rate), abs=1e-6)


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000, 96000])
def test_a_click_stays_where_it_was(rate):
    """The phase of a tone cannot tell a shift by whole periods; a click can."""
    for at in [0.1, 0.25, 0.4]:
        wave = np.zeros(rate // 2, np.float32)
        wave[round(at * rate)] = 1
        place = np.abs(resample(wave, rate)).argmax()
        assert place == pytest.approx(round(at * rate) * RATE / rate, abs=0.51)


def test_16_khz_is_left_as_it_is():
    wave = noise(1000)
    assert np.array_equal(resample(wave, RATE), wave)


# ------------------------------------------------------------------------------------------------
# The log-mel is Whisper's, without its padding.

LENGTHS = [1, 2, 159, 160, 161, 200, 201, 399, 400, 401]
LENGTHS += [479_800, 479_801, 479_840, 479_841, 479_999, 480_000]  # the right edge reflects here
LENGTHS += [int(n) for n in np.random.default_rng(0).integers(402, 200_000, 8)]
TOLERANCE = 2e-6


def hum(n):
    return tone(440, RATE, n / RATE).astype(np.float32)


def silence(n):
    return np.zeros(n, np.float32)


def click_then_quiet(n):
    """One loud sample, then next to nothing: the click sets the floor that hides the rest."""
    wave = noise(n, amplitude=1e-5)
    wave[n // 7] = 1
    return wave


SIGNALS = [noise, hum, silence, click_then_quiet]


@pytest.fixture(scope="module")
def whisper():
    """transformers' front end: a wave -> its valid frames, and all 3000."""
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)

    def features(wave):
        out = extractor(wave, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt")
        return int(out["attention_mask"].sum()), out["input_features"][0]

    return features


@pytest.mark.parametrize("n", LENGTHS)
def test_log_mel_is_whispers(whisper, n):
    for signal in SIGNALS:
        mel = log_mel(signal(n))
        valid, theirs = whisper(signal(n))
        frames = min(valid + 2, 3000)
        assert mel.dtype == torch.float32
        assert mel.shape == (128, frames)
        assert (mel - theirs[:, :frames]).abs().max() < TOLERANCE, signal.__name__


def test_padding_the_mel_with_zeros_would_be_seen(whisper):
    """The frames after the clip are not zero: Whisper pads with silence first, and the silence has
    a level of its own. These two are why log_mel makes two frames more than are valid."""
    valid, theirs = whisper(noise(1600))
    after = theirs[:, valid : valid + 2]
    assert after.abs().max() > 1000 * TOLERANCE
    assert (log_mel(noise(1600))[:, valid:] - after).abs().max() < TOLERANCE


def test_forgetting_the_clips_own_maximum_would_be_seen():
    """80 dB below the loudest point of its own clip everything is cut. The same quiet samples
    therefore look different behind a click than alone."""
    wave = click_then_quiet(16000)
    alone = log_mel(wave[8000:])
    behind = log_mel(wave)[:, 50:]
    steady = slice(2, 48)  # frames that see the same samples in both
    assert (behind[:, steady] - alone[:, steady]).abs().max() > 1000 * TOLERANCE
    assert behind[:, steady].min() == pytest.approx(float(log_mel(wave).max()) - 2, abs=1e-6)


def chirp():
    """A rising tone and a steady one; the golden numbers below are its log-mel."""
    time = np.arange(1260) / RATE
    rising = np.sin(2 * np.pi * (200 + 9000 * time) * time)
    return 0.4 * rising + 0.05 * np.sin(2 * np.pi * 3100 * time)


GOLDEN_BINS = [0, 10, 25, 50, 75, 127]
GOLDEN = {  # by transformers 5.23.0; frame 7 is the last valid one, 8 and 9 hold the clip's tail
    0: [1.036711, 0.973995, 0.642842, 0.236245, 0.022565, -0.048394],
    2: [-0.309838, 0.255990, 1.282907, -0.586674, -0.661869, -0.661869],
    5: [-0.661869, -0.661869, -0.233544, 1.111068, -0.661869, -0.661869],
    7: [0.071618, 0.076965, 0.192174, 0.662649, 0.204831, -0.661869],
    8: [0.404899, 0.410031, 0.527832, 0.656917, 0.537601, -0.356359],
    9: [-0.408689, -0.407792, -0.288934, -0.199403, -0.271132, -0.661869],
}


def test_log_mel_of_a_chirp_has_these_numbers():
    mel = log_mel(chirp())
    assert mel.shape == (128, 10)
    for frame, expected in GOLDEN.items():
        assert mel[GOLDEN_BINS, frame].tolist() == pytest.approx(expected, abs=1e-5), frame


def test_silence_is_minus_one_and_a_half():
    assert (log_mel(silence(5000)) == -1.5).all()


def test_many_windows_at_once_are_each_as_if_alone():
    """A loud neighbour must not raise a quiet one's floor, nor a long one reach into the next."""
    waves = [signal(n) for n in (1, 321, 16000, 5000) for signal in SIGNALS]
    for wave, mel in zip(waves, log_mels(waves), strict=True):
        assert mel.shape == log_mel(wave).shape
        assert (mel - log_mel(wave)).abs().max() < TOLERANCE


@pytest.mark.parametrize("n", [0, WINDOW + 1])
def test_log_mel_takes_one_window(n):
    with pytest.raises(BadInput, match=f"found \\({n},\\)"):
        log_mel(silence(n))


def test_log_mel_takes_one_channel():
    with pytest.raises(BadInput, match="expected one window"):
        log_mel(noise(3200).reshape(2, 1600))


def read_only(wave):
    wave = wave.copy()
    wave.flags.writeable = False
    return wave


def reversed_twice(wave):
    return wave[::-1].copy()[::-1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", [list, torch.from_numpy, np.float64, read_only, reversed_twice])
def test_log_mel_takes_any_array(form):
    wave = noise(1600)
    assert torch.equal(log_mel(form(wave)), log_mel(wave))


# ------------------------------------------------------------------------------------------------
# Counting: samples to frames, positions and slots; clips to windows.


def counted_by_convolving(samples):
    """Frames, positions and slots of one window as the encoder itself would make them: a kernel of
    three, another with stride two, then the mean of two neighbours."""
    frames = len(range(0, samples, 160))
    x = torch.zeros(1, 1, frames)
    x = F.conv1d(x, torch.zeros(1, 1, 3), padding=1)
    x = F.conv1d(x, torch.zeros(1, 1, 3), padding=1, stride=2)
    slots = F.avg_pool1d(x, 2, 2).shape[-1] if x.shape[-1] >= 2 else 0
    return frames, x.shape[-1], slots


COUNTED = [*range(1, 1300, 7), 160, 161, 320, 321, 640, 641, 960, 961]
COUNTED += [479_680, 479_681, 479_840, 479_841, 480_000]


def test_counts_are_the_convolutions_counts():
    for n in COUNTED:
        assert (n_frames(n), n_positions(n), n_slots(n)) == counted_by_convolving(n), n


def test_321_samples_are_the_least_that_makes_a_slot():
    assert [n_slots(n) for n in (0, 1, 320, 321, 960, 961)] == [0, 0, 0, 1, 1, 2]


def test_a_full_window_is_750_slots():
    assert (n_frames(WINDOW), n_positions(WINDOW), n_slots(WINDOW)) == (3000, 1500, 750)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 12 * WINDOW), st.sampled_from([30, 45.5, 100, 600]))
def test_the_slots_of_a_clip_are_those_of_its_windows(n, limit):
    wave = np.broadcast_to(np.float32(0), n)  # as long as it must be, without the memory
    windows = split_windows(wave, limit)
    assert sum(n_slots(len(window)) for window in windows) == n_slots(n, limit)
    assert all(len(window) == WINDOW for window in windows[:-1])
    assert 1 <= len(windows[-1]) <= WINDOW


def test_windows_are_the_clip_in_order():
    wave = np.arange(2 * WINDOW + 5000, dtype=np.float32)
    assert np.array_equal(np.concatenate(split_windows(wave)), wave)


@pytest.mark.parametrize("rest, windows", [(0, 1), (1, 1), (80, 1), (320, 1), (321, 2), (960, 2)])
def test_a_last_window_without_a_slot_is_dropped(rest, windows):
    """30.005 s are two windows to the reference, worth 750 slots together: the second costs an
    encoder pass and says nothing."""
    assert len(split_windows(silence(WINDOW + rest))) == windows
    assert n_slots(WINDOW + rest) == 750 + (rest > 320)


def test_a_short_clip_keeps_its_only_window():
    """Dropping it would leave a clip of nothing; that it has no slot is for the prompt to say."""
    assert [len(window) for window in split_windows(silence(100))] == [100]


@pytest.mark.parametrize("limit, kept", [(30, 30), (45.5, 45.5), (600, 61)])
def test_what_passes_the_limit_is_cut_with_a_warning(capsys, limit, kept):
    windows = split_windows(silence(61 * RATE), limit)
    assert sum(map(len, windows)) == kept * RATE
    said = capsys.readouterr().err
    assert said.count("\n") == (limit < 61)
    assert ("warning: clip: 61.0 s" in said) == (limit < 61)
    assert (f"hears the first {limit} s" in said) == (limit < 61)


# ------------------------------------------------------------------------------------------------
# Mistakes: one line on stderr, exit code 2, and nothing that a terminal would obey.


@pytest.mark.parametrize("text, shown", [
    ("plain", "plain"),
    ("\x1b[31mred\x1b[0m", "[31mred[0m"),  # without its escape, a sequence is only odd text
    ("\x9b31mred", "31mred"),  # the same in one byte
    ("a\r\nb\tc\x00\x07\x7f", "abc"),
    ("left\u202eright\u2066", "leftright"),  # text that runs backwards
    ("half \ud83d", "half "),
    ("one\u2028two\u2029three\x85", "onetwothree"),  # line ends that are not \n
    ("été 猫 👩\u200d👧", "été 猫 👩\u200d👧"),  # a joiner holds one picture together
])  # fmt: skip
def test_clean_keeps_what_is_safe_to_show(text, shown):
    assert prepare.clean(text) == shown


def test_clean_keeps_what_it_is_told_to():
    assert prepare.clean("one\n\ttwo\x1b", keep="\n\t") == "one\n\ttwo"


def fails(mistake):
    def main():
        raise mistake

    return main


@pytest.mark.parametrize("mistake, code, said", [
    (BadInput("a.wav: no such file"), 2, "ask.py: a.wav: no such file\n"),
    (BadInput("\x1b[2Ja\n.wav: no such file"), 2, "ask.py: [2Ja.wav: no such file\n"),
    (KeyboardInterrupt(), 130, ""),
])  # fmt: skip
def test_a_mistake_is_one_line_and_an_exit_code(monkeypatch, capsys, mistake, code, said):
    monkeypatch.setattr(sys, "argv", ["somewhere/ask.py"])
    with pytest.raises(SystemExit) as ended:
        prepare.cli(fails(mistake))
    assert ended.value.code == code
    assert capsys.readouterr().err == said


def test_a_reader_who_leaves_is_no_mistake(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with pytest.raises(SystemExit) as ended:
        prepare.cli(fails(BrokenPipeError()))
    assert ended.value.code == 141
    assert stderr.closed  # what the interpreter would still say has nowhere to go


def test_other_errors_are_ours_and_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        prepare.cli(fails(ZeroDivisionError()))


def test_a_main_that_returns_ends_quietly(capsys):
    prepare.cli(lambda: print("done"))
    assert capsys.readouterr() == ("done\n", "")


def test_a_wrong_flag_is_one_line(capsys):
    parser = prepare.Parser(prog="ask.py")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--co\x1b[31mlour\n"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert "\x1b" not in said


@pytest.mark.parametrize("words", [["--clips", "-a.wav"], ["--out", "-a"], ["-a.wav"]])
def test_how_to_write_a_name_that_begins_with_a_dash_is_told(words, capsys):
    parser = prepare.Parser(prog="ask.py")
    parser.add_argument("--clips", nargs="+")
    parser.add_argument("--out")
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    said = capsys.readouterr().err
    assert "./-name" in said and said.count("\n") == 1
    words = [word.replace("-a", "./-a") for word in words if word.startswith("--")] + ["./-a.wav"]
    if len(words) > 1:
        assert "./-a.wav" in str(parser.parse_args(words))


def test_the_repository_around_a_copy_is_not_the_codes_own(monkeypatch):
    plain = prepare.git_hash()
    within = Path(prepare.__file__).parent / "tests" / "prepare.py"
    monkeypatch.setattr(prepare, "__file__", str(within))
    assert prepare.git_hash() == "no git here"
    monkeypatch.undo()
    assert prepare.git_hash() == plain


@pytest.mark.parametrize("script", ["prepare", "synth", "train", "sample", "judge"])
def test_every_script_says_its_version_and_shows_its_commands(script, monkeypatch, capsys):
    module = importlib.import_module(script)
    monkeypatch.setitem(sys.modules, "__main__", module)
    said = {}
    for flag in ("--version", "--help"):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", flag])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code in (0, None)
        said[flag] = capsys.readouterr().out
    torch.set_flush_denormal(False)  # which train.py begins with
    assert re.fullmatch(r"polyaudio .*, torch 2\..*\n", said["--version"])
    lines = [line for line in module.__doc__.splitlines() if f"python {script}.py" in line]
    assert lines and all(line in said["--help"] for line in lines)
    assert said["--help"].splitlines().count(lines[0]) == 1


def test_a_commands_help_shows_its_own_commands(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "__main__", prepare)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "corpus", "--help"])
    with pytest.raises(SystemExit):
        prepare.main()
    said = capsys.readouterr().out
    assert "python prepare.py corpus esc50" in said and "python prepare.py show" not in said


@pytest.mark.parametrize("content, words", [
    ("{", "expected"),
    ("\xff", "expected"),  # no UTF-8
    ("[" * 100_000, "expected"),  # deeper than the parser can go
    (None, "cannot be read"),
])  # fmt: skip
def test_a_damaged_json_file_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(BadInput) as caught:
        prepare.read_json(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
