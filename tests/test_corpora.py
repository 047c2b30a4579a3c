"""What `prepare.py corpus` and `prepare.py show` promise.

Each corpus is made here in miniature, in its exact layout, with real audio and with the traps that
the real one holds; and what comes out is compared in full, field by field. Nothing may depend on
the number of workers, on where the corpus lies or on what the folder's order happens to be; groups
stay in one split; what is left out is counted and named; and an archive that reaches out of its
folder is refused by the name of the member that does.
"""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
import weakref
import zipfile
from collections import defaultdict

import numpy as np
import pytest
import soundfile

import prepare
from prepare import BadInput, split_by_group, timed_events, unpack
from tests.conftest import ROOT
from tests.faults import forked


def sound(path, seconds=0.5, rate=16000, channels=1, seed=None, **how):
    """A noise that is a different one for each path, or the same for the same seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(path.name.encode()) * len(path.name) if seed is None else seed
    wave = np.random.default_rng(seed).integers(-9000, 9000, (round(seconds * rate), channels))
    kind = {"format": path.suffix[1:].upper()} | how
    soundfile.write(path, wave.astype(np.int16), rate, **kind)
    return path


def text(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))
    return path


def run(*args):
    sys.argv = ["prepare.py", *map(str, args)]
    prepare.main()


@pytest.fixture
def convert(tmp_path, capsys):
    """convert(name, *flags) -> rows, what was said on stdout, what on stderr. The corpus lies in
    data/, the output in out/."""
    (tmp_path / "out").mkdir()

    def do(name, *flags, workers=1):
        out = tmp_path / "out" / "corpus.jsonl"
        args = ("--root", tmp_path / "data", "--out", out, "--workers", workers, *flags)
        run("corpus", name, *args)
        said = capsys.readouterr()
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        for row in rows:
            assert (out.parent / row["path"]).is_file()
        return rows, said.out, said.err

    return do


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def row(id, path, corpus, split, duration, licence, **known):
    first = {"id": id, "path": f"../data/{path}", "corpus": corpus, "split": split}
    return {**first, "duration": duration, "licence": licence, **known}


# ---------------------------------------------------------------- the sixteen, row by row


def label_files(data):
    text(
        data / "class_labels_indices.csv",
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/0k,"Bark, loud"\n',
    )
    text(data / "mid_to_display_name.tsv", '/m/09x0r\tSpeech\n/m/0bt\tMale "speech"\n')


def test_audioset(data, convert):
    label_files(data)
    head = "# Segments csv created Sun\n# num_ytids=3\n# YTID, start_seconds, end_seconds, labels\n"
    lines = (
        '-0RWZT-miFs, 420.000, 430.000, "/m/09x0r,/m/0k"\n'  # a leading dash, two labels, a comma
        'gone_video1, 0.000, 10.000, "/m/09x0r"\n'
        '--aE2O5G5WE, 30.000, 40.000, "/m/unnamed"\n'
        '-0RWZT-miFs, 420.000, 430.000, "/m/09x0r"\n'  # again
        "broken_wave, 0.000, 10.000, /m/09x0r\n"
        "\n"
    )
    text(data / "balanced_train_segments.csv", head + lines)
    text(data / "eval_segments.csv", "\ufeff" + head + 'a.b_c-d_efg, 1.500, 11.500, "/m/0k"\r\n')
    sound(data / "audio/train/Y-0RWZT-miFs.wav")
    sound(data / "audio/train/--aE2O5G5WE_30000.flac", rate=44100, channels=2)
    sound(data / "audio/a.b_c-d_efg.MP3", seconds=1.0)  # an id with a dot, its extension shouted
    text(data / "audio/broken_wave.wav", "RIFF but no more")
    rows, out, err = convert("audioset")
    licence = "CC BY 4.0 (labels)"
    folder = "audio/train"
    assert rows[:2] == [
        row("-0RWZT-miFs_420000", f"{folder}/Y-0RWZT-miFs.wav", "audioset", "train", 0.5, licence,
            labels=["Speech", "Bark, loud"]),
        row("--aE2O5G5WE_30000", f"{folder}/--aE2O5G5WE_30000.flac", "audioset", "train", 0.5,
            licence, labels=["/m/unnamed"]),
    ]  # fmt: skip
    duration = rows[2].pop("duration")
    assert 1.0 <= duration < 1.15  # an mp3 is padded
    expected = row("a.b_c-d_efg_1500", "audio/a.b_c-d_efg.MP3", "audioset", "test", 0, licence)
    assert {**rows[2], "duration": 0} == {**expected, "labels": ["Bark, loud"]}
    assert "3 clips, 0.00 h (test 1, train 2)" in out
    assert "skipped: 1 missing, 1 repeated id, 1 undecodable; licence: CC BY 4.0 (labels)" in out
    assert "missing: gone_video1_0" in err and "repeated id: -0RWZT-miFs_420000" in err
    assert "undecodable: broken_wave_0 " in err and str(data) not in err


def test_audioset_strong(data, convert):
    label_files(data)
    head = "segment_id\tstart_time_seconds\tend_time_seconds\tlabel\n"
    strokes = (  # one segment's rows lie apart, overlap and repeat
        "b_0_CdEfGhI_30000\t0.000\t1.500\t/m/09x0r\n"
        "zzzzzzzzzzz_0\t0.0\t2.0\t/m/0bt\n"
        "b_0_CdEfGhI_30000\t0.100\t0.200\t/m/09x0r\n"
        "b_0_CdEfGhI_30000\t1.200\t2.000\t/m/09x0r\n"
        "b_0_CdEfGhI_30000\t1.200\t2.000\t/m/09x0r\n"
        "b_0_CdEfGhI_30000\t0.500\t0.700\t/m/0bt\n"
        "b_0_CdEfGhI_30000\t2.500\t3.000\t/m/09x0r\n"
        "b_0_CdEfGhI_30000\t2.500\t\t/m/09x0r\n"
    )
    text(data / "audioset_train_strong.tsv", head + strokes)
    text(data / "audioset_eval_strong.tsv", head)
    sound(data / "Yb_0_CdEfGhI.wav", seconds=4)
    rows, out, _ = convert("audioset-strong")
    assert rows == [
        row("b_0_CdEfGhI_30000", "Yb_0_CdEfGhI.wav", "audioset-strong", "train", 4.0,
            "CC BY 4.0 (labels)", labels=["Speech", 'Male "speech"'],
            events=[["Speech", 0.0, 2.0], ['Male "speech"', 0.5, 0.7], ["Speech", 2.5, 3.0]]),
    ]  # fmt: skip
    assert "skipped: 1 missing;" in out


def test_clotho(data, convert):
    head = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
    lines = (
        '"Café, rain (2).wav","A man says ""hi"", twice",Rain falls,,Rain falls, Wind  \n'
        "no audio.wav,a,b,c,d,e\n"
    )
    text(data / "clotho_captions_development.csv", "\ufeff" + head + lines)
    text(data / "clotho_captions_evaluation.csv", head + '"Café, rain (2).wav",Other\n')
    head = "file_name,keywords,sound_id,sound_link,start_end_samples,manufacturer,license\n"
    line = '"Café, rain (2).wav",rain;café;;rain,1,x,"[0, 9]",Zoë,http://by.example/\r\n'
    text(data / "clotho_metadata_development.csv", head + line, "iso-8859-1")
    text(data / "clotho_metadata_test.csv", "file_name;license\nx;y\n", "iso-8859-1")
    sound(data / "development/Cafe\u0301, rain (2).wav", rate=44100)  # as a Mac spells it
    sound(data / "development/._Café, rain (2).wav")
    sound(data / "evaluation/Café, rain (2).wav", seconds=1)  # same name, other split
    rows, out, _ = convert("clotho")
    name = "Café, rain (2)"
    assert rows == [
        row(f"development/{name}", "development/Cafe\u0301, rain (2).wav", "clotho", "train", 0.5,
            "http://by.example/; captions: Tampere University, non-commercial",
            captions=['A man says "hi", twice', "Rain falls", "Wind"], labels=["rain", "café"]),
        row(f"evaluation/{name}", f"evaluation/{name}.wav", "clotho", "test", 1.0,
            "Freesound's per file; captions: Tampere University, non-commercial",
            captions=["Other"]),
    ]  # fmt: skip
    assert "skipped: 1 missing;" in out


def test_audiocaps(data, convert):
    head = "audiocap_id,youtube_id,start_time,caption\n"
    text(data / "dataset/train.csv", head + "91139,-r1nicOVtvkQ,130,A dog barks\n4,abc,1,\n")
    text(data / "dataset/val.csv", head + "7,vvvvvvvvvvv,30,Rain\n")
    five = [f"{i},t.t-t_t=ttt,{30},Caption {i % 4}\n" for i in range(5)]
    apart = five[:2] + ["9,gone,0,Nothing is left\n"] + five[2:]
    text(data / "dataset/test.csv", head + "".join(apart))
    sound(data / "train/Y-r1nicOVtvkQ.wav")
    sound(data / "train/4.wav")  # by its audiocap_id
    sound(data / "val/vvvvvvvvvvv_30.ogg")
    sound(data / "test/Yt.t-t_t=ttt.flac")
    rows, out, err = convert("audiocaps")
    where, licence = "audiocaps", "academic use only"
    captions = [f"Caption {i}" for i in range(4)]
    assert sorted(rows, key=lambda r: r["id"]) == [
        row("-r1nicOVtvkQ", "train/Y-r1nicOVtvkQ.wav", where, "train", 0.5, licence,
            captions=["A dog barks"]),
        row("abc", "train/4.wav", where, "train", 0.5, licence),  # an empty caption is none
        row("t.t-t_t=ttt", "test/Yt.t-t_t=ttt.flac", where, "test", 0.5, licence,
            captions=captions),
        row("vvvvvvvvvvv", "val/vvvvvvvvvvv_30.ogg", where, "dev", 0.5, licence,
            captions=["Rain"]),
    ]  # fmt: skip
    assert "missing: gone" in err


@pytest.mark.parametrize("name", ["librispeech", "mini-librispeech"])
def test_librispeech(name, data, convert):
    base = data / "LibriSpeech"
    lines = "1272-128104-0000 MISTER QUILTER\n1272-128104-0001\n\n1272-128104-0002 GONE\n"
    text(base / "dev-clean-2/1272/128104/1272-128104.trans.txt", lines)
    text(base / "train-clean-5/19/198/19-198.trans.txt", "19-198-0010 A\nhalf\n")
    text(base / "SPEAKERS.TXT", "; comment\n1272 | M | dev-clean | 8.06 | A\n")
    for i in range(2):
        sound(base / f"dev-clean-2/1272/128104/1272-128104-000{i}.flac")
    sound(base / "train-clean-5/19/198/19-198-0010.flac", seconds=2.5)
    rows, out, _ = convert(name)
    folder = "LibriSpeech/dev-clean-2/1272/128104"
    group = "1272-128104"
    assert rows == [
        row(f"{group}-0000", f"{folder}/{group}-0000.flac", name, "dev", 0.5, "CC BY 4.0",
            speaker="1272", transcript="MISTER QUILTER", order={"group": group, "index": 0}),
        row(f"{group}-0001", f"{folder}/{group}-0001.flac", name, "dev", 0.5, "CC BY 4.0",
            speaker="1272", order={"group": group, "index": 1}),
        row("19-198-0010", "LibriSpeech/train-clean-5/19/198/19-198-0010.flac", name, "train", 2.5,
            "CC BY 4.0", speaker="19", transcript="A", order={"group": "19-198", "index": 10}),
    ]  # fmt: skip
    assert "skipped: 2 missing;" in out


def test_mini_librispeech_has_a_test_split_of_whole_speakers(data, convert):
    """Half of the dev speakers, each with all of his chapters; train is left as it is."""
    for speaker in range(40):
        for chapter in (7, 8):
            part = "train-clean-5" if speaker < 20 else "dev-clean-2"
            folder = data / f"LibriSpeech/{part}/{speaker}/{chapter}"
            text(folder / f"{speaker}-{chapter}.trans.txt", f"{speaker}-{chapter}-0000 A\n")
            sound(folder / f"{speaker}-{chapter}-0000.flac", 0.1)
    splits = defaultdict(set)
    for r in convert("mini-librispeech")[0]:
        splits[int(r["speaker"])].add(r["split"])
    assert len(splits) == 40 and all(len(found) == 1 for found in splits.values())
    assert all(splits[speaker] == {"train"} for speaker in range(20))
    found = [split for speaker in range(20, 40) for split in splits[speaker]]
    assert found.count("test") + found.count("dev") == 20 and 5 < found.count("test") < 15


def test_common_voice(data, convert):
    base = data / "cv-corpus-17.0-2024-03-15/de"
    old = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccent\n"
    new = "client_id\tpath\tsentence_id\tsentence\tsentence_domain\tup_votes\taccents\tvariant\n"
    quoted = 'aa\tcommon_voice_de_1.mp3\t9\t"Halb zitiert\t\t2\t\t\n'  # quotes mean nothing here
    more = 'bb\tcommon_voice_de_2.mp3\t9\tEr sagte: "Nein"\t\t2\t\t\n'
    text(base / "train.tsv", new + quoted + more)
    text(base / "test.tsv", old + "cc\tcommon_voice_de_3\tÖl\t2\t0\t\t\t\ndd\tcut")
    text(base / "validated.tsv", new + quoted)
    for i in (1, 2, 3):
        sound(base / f"clips/common_voice_de_{i}.mp3", seconds=1, rate=48000)
    rows, out, _ = convert("common-voice")
    for r in rows:
        assert 1.0 <= r.pop("duration") < 1.15
    expected = [
        row(f"common_voice_de_{i}", f"{base.relative_to(data)}/clips/common_voice_de_{i}.mp3",
            "common-voice", split, 1, "CC0", speaker=speaker, transcript=said)
        for i, split, speaker, said in (
            (3, "test", "cc", "Öl"), (1, "train", "aa", '"Halb zitiert'),
            (2, "train", "bb", 'Er sagte: "Nein"'))
    ]  # fmt: skip
    for r in expected:
        del r["duration"]
    assert rows == expected
    assert "skipped: 1 missing;" in out


def test_dipco(data, convert):
    def turn(start, end, speaker, words, **how):
        times = {"start_time": start, "end_time": end}
        clocks = {k: {"U01": "00:00:09.99", "close-talk": f"00:00:{t}"} for k, t in times.items()}
        return {**clocks, "speaker_id": speaker, "words": words, "session_id": "S02", **how}

    said = [
        turn("02.00", "03.25", "P06", "[laugh] well   then [noise]"),
        turn("00.50", "01.00", "P05", "Hello there."),
        turn("01.10", "01.20", "P05", "[unintelligible]"),
        turn("03.90", "04.90", "P05", "behind the end"),
        turn("00.10", "00.20", "P07", "nobody recorded this"),
        {"words": "no times", "speaker_id": "P05"},
    ]
    text(data / "Dipco/transcriptions/dev/S02.json", json.dumps(said))
    text(data / "Dipco/transcriptions/eval/S01.json", json.dumps([said[1]]))
    sound(data / "Dipco/audio/dev/S02_P05.wav", seconds=4)
    sound(data / "Dipco/audio/dev/S02_P06.wav", seconds=4, seed=1)
    sound(data / "Dipco/audio/eval/S01_P05.wav", seconds=4)
    sound(data / "Dipco/audio/dev/S02_U01.CH1.wav", seconds=4)
    rows, out, err = convert("dipco", "--hash")
    heard = [(r.pop("hash"), r.pop("peak"), r.pop("silent")) for r in rows]
    assert len({h for h, _, _ in heard}) == 4  # parts of a recording are heard for themselves

    def expected(session, i, speaker, start, end, split, **said):
        folder = "dev" if split == "dev" else "eval"
        path = f"Dipco/audio/{folder}/{session}_{speaker}.wav"
        return row(
            f"{session}-{i:04d}", path, "dipco", split, round(end - start, 3), "CDLA-Permissive",
            speaker=speaker, dialogue={"id": session, "turn": i, "speaker": speaker},
            start=start, end=end, **said,
        )  # fmt: skip

    assert rows == [
        expected("S02", 3, "P05", 0.5, 1.0, "dev", transcript="Hello there."),
        expected("S02", 4, "P05", 1.1, 1.2, "dev"),
        expected("S02", 5, "P06", 2.0, 3.25, "dev", transcript="well then"),
        expected("S01", 1, "P05", 0.5, 1.0, "test", transcript="Hello there."),
    ]
    assert "skipped: 1 missing, 2 undecodable" in out  # no times; behind the end of the recording
    wave = prepare.load_clip(rows[2], data.parent / "out")  # a row is a clip as it is
    assert len(wave) == 20000


def test_musiccaps(data, convert):
    head = "ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,author_id,"
    head += "is_balanced_subset,is_audioset_eval\n"
    lines = (
        '-0Gj8-vB1q4,30,40,"/m/0140xf,/m/02cjck","[\'low quality\', ""it\'s slow"", \'a, b\']",'
        '"A song.\nTwo lines, ""quoted"".",4,False,True\n'
        "xxxxxxxxxxx,0,10,/m/1,not a list,Plain,1,True,False\n"
    )
    text(data / "musiccaps-public.csv", head + lines)
    sound(data / "[-0Gj8-vB1q4]-[30-40].wav", rate=48000, channels=2)
    sound(data / "xxxxxxxxxxx.wav")
    rows, _, _ = convert("musiccaps")
    assert rows == [
        row("-0Gj8-vB1q4", "[-0Gj8-vB1q4]-[30-40].wav", "musiccaps", "test", 0.5, "CC BY-SA 4.0",
            captions=['A song.\nTwo lines, "quoted".'],
            labels=["low quality", "it's slow", "a, b"]),
        row("xxxxxxxxxxx", "xxxxxxxxxxx.wav", "musiccaps", "train", 0.5, "CC BY-SA 4.0",
            captions=["Plain"]),
    ]  # fmt: skip


def test_music4all(data, convert):
    text(
        data / "id_information.csv",
        "id\tartist\tsong\talbum_name\n0009fF\tQueen\tX\tY\nb\tQueen\t\t\n",
    )
    text(data / "id_genres.csv", "id\tgenres\nb\t\n0009fF\trock,pop\n")
    text(data / "id_tags.csv", "id\ttags\n0009fF\tpop,live\n")
    text(data / "id_lang.csv", "id\tlang\n0009fF\ten\n")
    head = "id\tspotify_id\tpopularity\trelease\tdanceability\tenergy\tkey\tmode\tvalence\ttempo\t"
    lines = "0009fF\ts\t60.0\t2011\t0.3\t0.9\t1.0\t0.0\t0.5\t119.9\t215707\n"
    text(data / "id_metadata.csv", f"{head}duration_ms\n{lines}b\ts\t1\t2\t\t\t-1\t1\t\t0.0\t9\n")
    sound(data / "audios/0009fF.wav", channels=2)
    sound(data / "audios/b.wav")
    rows, _, _ = convert("music4all")
    split, licence = split_by_group("Queen"), "CC BY-NC-SA 4.0, research only"
    music = {"energy": 0.9, "valence": 0.5, "danceability": 0.3, "tempo": 119.9, "key": "C#"}
    assert rows == [
        row("0009fF", "audios/0009fF.wav", "music4all", split, 0.5, licence,
            labels=["rock", "pop", "live"], music={**music, "mode": "minor", "language": "en"}),
        row("b", "audios/b.wav", "music4all", split, 0.5, licence, music={"mode": "major"}),
    ]  # fmt: skip


def test_qualispeech(data, convert):
    head = "id,Speed,Naturalness,Background noise,Feeling of voice,Natural language description\n"
    text(data / "train.csv", head + 'sys1-utt.2.wav,4,5,1,"A calm, low voice","Good.\n\nVery."\n')
    text(data / "val.csv", head + "v.wav,1,,5,,Bad\n")
    text(data / "test.csv", head.upper() + "gone.wav,1,1,1,,\n")
    sound(data / "wav/train/sys1-utt.2.wav")
    sound(data / "wav/val/v.wav")
    rows, out, _ = convert("qualispeech")
    licence = "MIT by its card, CC BY-NC-SA 4.0 by the PolyAudio paper"
    quality = {"speed": 4, "naturalness": 5, "background_noise": 1}
    assert rows == [
        row("sys1-utt.2", "wav/train/sys1-utt.2.wav", "qualispeech", "train", 0.5, licence,
            captions=["Good.\n\nVery."],
            quality={**quality, "feeling_of_voice": "A calm, low voice"}),
        row("v", "wav/val/v.wav", "qualispeech", "dev", 0.5, licence, captions=["Bad"],
            quality={"speed": 1, "background_noise": 5}),
    ]  # fmt: skip
    assert "skipped: 1 missing;" in out


def test_picoaudio(data, convert):
    def line(name, timed, counted):
        path = f"data/multi_event_{name}.wav"
        return json.dumps({"filepath": path, "onoffCaption": timed, "frequencyCaption": counted})

    cat = "cat meowing at 0.5-2.0, 3.0-4.5 and whistling at 5.0-6.5"
    counted = "cat meowing two times and whistling one times"
    other = "door slamming one times"
    text(data / "meta_data/train.json", line("train/syn_1", cat, counted) + "\nno json\n")
    text(data / "meta_data/test-onoff-control_multi-event.json", line("test/syn_1", cat, other))
    gpt = "test-frequency-control_onoffFromGpt_single-event.json"
    made_up = "door slamming at 1.0-2.0"
    lines = [line("test/syn_1", made_up, other), line("test/syn_2", made_up, other)]
    text(data / "meta_data" / gpt, "\n".join(lines))
    for name in ("train/syn_1", "test/syn_1", "test/syn_2"):
        sound(data / f"data/multi_event_{name}.wav", seed=len(name))
    rows, out, _ = convert("picoaudio")

    def expected(name, split, captions, **known):
        path = f"data/multi_event_{name}.wav"
        return row(
            f"multi_event_{name}", path, "picoaudio", split, 0.5, "Apache-2.0",
            captions=captions, **known,
        )  # fmt: skip

    assert rows == [
        expected("test/syn_1", "test", [other, cat]),  # counts and times disagree: no events
        expected("test/syn_2", "test", [other]),  # times that were made up are none
        expected(
            "train/syn_1", "train", [counted, cat], labels=["cat meowing", "whistling"],
            events=[["cat meowing", 0.5, 2.0], ["cat meowing", 3.0, 4.5], ["whistling", 5.0, 6.5]],
        ),
    ]  # fmt: skip
    assert "skipped: 1 damaged row;" in out


def test_timed_events_are_whole_or_none():
    assert timed_events("a and b at 1-2 and c at 0-1.", [""]) == [["c", 0, 1], ["a and b", 1, 2]]
    for damaged in ("", "a at 1-", "a at 2-1", "a at 1-2 and b", "a at 1-2, and b at 1-2", "a 1-2"):
        assert timed_events(damaged, [""]) == []
    assert timed_events("a at 1-2", ["a two times"]) == timed_events("a at 1-2", ["b"]) == []


def test_esc50_and_urbansound8k_split_a_freesound_recording_alike(data, convert):
    head = "filename,fold,target,category,esc10,src_file,take\n"
    lines = [
        f"1-{i}-{take}-0.wav,1,0,dog_bark,{not i},{i},{take}\n" for i in range(30) for take in "AB"
    ]
    text(data / "ESC-50-master/meta/esc50.csv", head + "".join(lines))
    head = "slice_file_name,fsID,start,end,salience,fold,classID,class\n"
    slices = [f"{i}-3-0-0.wav,{i},0.0,4.0,1,{i % 10 + 1},3,dog_bark\n" for i in range(30)]
    text(data / "UrbanSound8K/metadata/UrbanSound8K.csv", head + "".join(slices))
    for i in range(30):
        for take in "AB":
            sound(data / f"ESC-50-master/audio/1-{i}-{take}-0.wav", 0.1, 44100)
        path = data / f"UrbanSound8K/audio/fold{i % 10 + 1}/{i}-3-0-0.wav"
        sound(path, 0.1, 44100, 2, subtype=("PCM_16", "PCM_24", "PCM_U8")[i % 3])
    esc, out, _ = convert("esc50")
    urban, _, _ = convert("urbansound8k")
    assert len(esc) == 60 and len(urban) == 30
    assert esc[2] == row(
        "1-1-A-0", "ESC-50-master/audio/1-1-A-0.wav", "esc50", split_by_group("1"), 0.1,
        "CC BY-NC", labels=["dog bark"],
    )  # fmt: skip
    assert esc[0]["licence"] == "CC BY"
    assert urban[1] == row(
        "1-3-0-0", "UrbanSound8K/audio/fold2/1-3-0-0.wav", "urbansound8k", split_by_group("1"), 0.1,
        "CC BY-NC", labels=["dog bark"],
    )  # fmt: skip
    splits = defaultdict(set)
    for r in esc:
        splits[r["id"].split("-")[1]].add(r["split"])
    for r in urban:
        splits[r["id"].split("-")[0]].add(r["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert len(set.union(*splits.values())) == 3  # there are three


def test_the_hash_that_splits_is_fair_and_the_same_for_ever():
    found = [split_by_group(str(i)) for i in range(3000)]
    assert 240 < found.count("test") < 360 and 240 < found.count("dev") < 360
    assert [split_by_group(group) for group in ("18", "2", "Queen")] == ["test", "dev", "train"]


def test_vggsound(data, convert):
    lines = (
        '---g-f_I2yQ,1,"people, marching",test\n--0PQM4-hqg,30,waterfall burbling,train\n'
        "-gone-gone-,3,dog,train\nbbbbbbbbbbb,9,cat\nyoutube_id,start,label,split\n"
    )
    text(data / "vggsound.csv", lines)
    sound(data / "video/---g-f_I2yQ_000001.WAV")
    sound(data / "video/--0PQM4-hqg_000030.flac")
    sound(data / "video/bbbbbbbbbbb_000009.flac")
    rows, out, _ = convert("vggsound")
    assert rows == [
        row("---g-f_I2yQ_000001", "video/---g-f_I2yQ_000001.WAV", "vggsound", "test", 0.5,
            "CC BY 4.0", labels=["people, marching"]),
        row("--0PQM4-hqg_000030", "video/--0PQM4-hqg_000030.flac", "vggsound", "train", 0.5,
            "CC BY 4.0", labels=["waterfall burbling"]),
    ]  # fmt: skip
    assert "skipped: 2 damaged row, 1 missing;" in out


def test_speech_commands(data, convert):
    text(data / "testing_list.txt", "yes/0a_nohash_0.wav\r\nyes/gone_nohash_0.wav\r\n")
    text(data / "validation_list.txt", "no/0b_nohash_1.wav\n\n")
    for name in (
        "yes/0a_nohash_0",
        "no/0b_nohash_1",
        "no/0c_nohash_0",
        "_background_noise_/x_nohash_0",
    ):
        sound(data / f"{name}.wav")
    sound(data / "no/._0c_nohash_0.wav")
    rows, out, _ = convert("speech-commands")
    assert rows == [
        row(name, f"{name}.wav", "speech-commands", split, 0.5, "CC BY 4.0",
            speaker=speaker, transcript=name.split("/")[0])
        for name, split, speaker in (
            ("no/0b_nohash_1", "dev", "0b"), ("no/0c_nohash_0", "train", "0c"),
            ("yes/0a_nohash_0", "test", "0a"))
    ]  # fmt: skip
    assert "skipped: 1 missing;" in out


# ---------------------------------------------------------------- what they share


def commands(data, count=40):
    """A corpus of short words, one in eight a recording that another split holds as well."""
    names = [f"yes/{i:02x}_nohash_0" for i in range(count)]
    text(data / "testing_list.txt", "".join(f"{name}.wav\n" for name in names[::4]))
    text(data / "validation_list.txt", "".join(f"{name}.wav\n" for name in names[1::4]))
    for i, name in enumerate(names):
        sound(data / f"{name}.wav", 0.1, seed=i)
    return names


@pytest.mark.long
def test_workers_and_places_change_nothing(data, convert, tmp_path, capsys):
    commands(data)
    text(data / "yes/ff_nohash_0.wav", "no wave")
    convert("speech-commands", "--hash")
    alone = (tmp_path / "out/corpus.jsonl").read_bytes()
    convert("speech-commands", "--hash", workers=2)
    assert (tmp_path / "out/corpus.jsonl").read_bytes() == alone
    elsewhere = tmp_path / "some where" / "else"
    elsewhere.mkdir(parents=True)
    (tmp_path / "out").rename(elsewhere / "out")
    data.rename(elsewhere / "data")
    out = elsewhere / "out" / "corpus.jsonl"
    run("corpus", "speech-commands", "--root", elsewhere / "data", "--out", out, "--hash")
    assert out.read_bytes() == alone and len(alone.splitlines()) == 40
    assert not list(elsewhere.rglob("*.part"))


@pytest.fixture
def working(data, tmp_path):
    """The command with two workers, both of which wait for a clip that never comes: a pipe that
    somebody has to write to. Its process, and a function to list its living children's ids."""
    names = commands(data, 200)
    pipes = [data / f"{names[i]}.wav" for i in (0, 16)]  # a worker gets sixteen clips at a time
    for pipe in pipes:
        pipe.unlink()
        os.mkfifo(pipe)
    words = ["corpus", "speech-commands", "--root", data, "--out", tmp_path / "c.jsonl"]
    started = subprocess.Popen(
        [sys.executable, ROOT / "prepare.py", *words, "--workers", "2"],
        start_new_session=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    def children():
        listed = subprocess.run(["ps", "-eo", "sid=,pid=,stat="], capture_output=True, text=True)
        rows = (line.split() for line in listed.stdout.splitlines())
        ours = [int(pid) for sid, pid, state in rows if int(sid) == started.pid and state[0] != "Z"]
        return [pid for pid in ours if pid != started.pid]

    end, writers = time.monotonic() + 60, []
    while len(writers) < len(pipes):
        assert time.monotonic() < end and started.poll() is None
        try:  # refused until somebody reads
            writers.append(os.open(pipes[len(writers)], os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            time.sleep(0.05)
    yield started, children
    for writer in writers:
        os.close(writer)
    for pid in [started.pid, *children()]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    started.communicate()


def soon_none(children) -> bool:
    end = time.monotonic() + 20
    while children() and time.monotonic() < end:
        time.sleep(0.05)
    return children() == []


def test_workers_do_not_outlive_who_started_them(working):
    started, children = working
    assert len(children()) >= 2
    started.kill()
    assert soon_none(children)


def test_ctrl_c_is_quiet_and_at_once(working, tmp_path):
    started, children = working
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does
    assert started.communicate(timeout=60)[1] == "" and started.returncode == 130
    assert not list(tmp_path.glob("c.jsonl*")) and soon_none(children)


def test_a_worker_that_is_killed_is_one_line(working, tmp_path):
    started, children = working
    os.kill(max(children()), signal.SIGKILL)
    said = started.communicate(timeout=60)[1]
    assert started.returncode == 2 and said.count("\n") == 1, said
    assert "--workers 2: expected all of them to live, found one that was killed" in said
    assert not (tmp_path / "c.jsonl").exists() and soon_none(children)


def test_paths_hold_through_a_link(data, convert, tmp_path):
    commands(data, 4)
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep/er")
    run("corpus", "speech-commands", "--root", data, "--out", tmp_path / "link/c.jsonl")
    first = json.loads((tmp_path / "link/c.jsonl").read_text().splitlines()[0])
    assert (tmp_path / "link" / first["path"]).is_file()


def test_hash_finds_a_wav_and_its_flac_in_two_splits(data, convert):
    names = commands(data, 8)
    (data / f"{names[5]}.wav").write_bytes((data / f"{names[1]}.wav").read_bytes())  # both dev
    for name in names[2], names[6]:  # both are train; what they repeat is test
        (data / f"{name}.wav").unlink()
        wave, rate = soundfile.read(data / f"{names[0]}.wav", dtype="int16")
        soundfile.write(data / f"{name}.flac", wave, rate)
    quiet = np.zeros(1600, np.int16)
    soundfile.write(data / f"{names[3]}.wav", quiet, 16000)
    quiet[5] = 30
    soundfile.write(data / f"{names[7]}.wav", quiet, 16000)
    rows, out, _ = convert("speech-commands", "--hash")
    by_id = {r["id"]: r for r in rows}
    assert by_id[names[0]]["hash"] == by_id[names[2]]["hash"] != by_id[names[4]]["hash"]
    assert f"same sound in two splits: test {names[0]}, train {names[6]} (3 clips)\n" in out
    assert "sounds in more than one split: 1\n" in out
    wave, _ = soundfile.read(data / f"{names[0]}.wav")
    assert by_id[names[0]]["peak"] == round(float(np.abs(wave).max()), 6)
    assert [by_id[names[i]]["silent"] for i in (0, 3, 7)] == [False, True, True]
    assert by_id[names[3]]["peak"] == 0 and by_id[names[7]]["peak"] == round(30 / 32768, 6)


def test_hash_is_of_the_sound_alone(tmp_path):
    """The same for whatever holds the same samples; another for another rate or channel."""
    wave = np.random.default_rng(0).integers(-9000, 9000, 3000).astype(np.int16)
    made = {
        "a.wav": (wave, 16000, "PCM_16"),
        "b.flac": (wave, 16000, "PCM_24"),
        "c.wav": (wave / 32768, 16000, "FLOAT"),
        "rate.wav": (wave, 8000, "PCM_16"),
        "stereo.wav": (np.stack([wave, wave], 1), 16000, "PCM_16"),
        "flat.wav": (wave[::-1], 16000, "PCM_16"),
    }
    hashes = {}
    for name, (samples, rate, subtype) in made.items():
        soundfile.write(tmp_path / name, samples, rate, subtype=subtype)
        with prepare.open_audio(tmp_path / name) as opened:
            hashes[name] = prepare.sound_of(*opened)[0]
    assert hashes["a.wav"] == hashes["b.flac"] == hashes["c.wav"]
    assert len(set(hashes.values())) == 4


def test_a_clip_of_no_length_is_left_out(data, convert):
    """Its duration would be 0.000 s, which no reader of a corpus takes."""
    names = commands(data, 4)
    soundfile.write(data / f"{names[1]}.wav", np.zeros(5), 16000)
    rows, out, err = convert("speech-commands")
    assert [r["id"] for r in rows] == [names[0], *names[2:]]
    assert "skipped: 1 undecodable;" in out and "at least a millisecond" in err


def test_hash_finds_what_a_header_hides(data, convert):
    names = commands(data, 4)
    path = data / f"{names[0]}.wav"
    flac = sound(path.with_suffix(".flac"), 3.0)
    path.unlink()
    flac.write_bytes(flac.read_bytes()[:20000])
    broken = np.full(1600, 0.1, np.float32)
    broken[7] = np.nan
    soundfile.write(data / f"{names[1]}.wav", broken, 16000, subtype="FLOAT")
    assert len(convert("speech-commands")[0]) == 4
    rows, out, err = convert("speech-commands", "--hash")
    assert [r["id"] for r in rows] == names[2:]
    assert "skipped: 2 undecodable;" in out and "NaN" in err


def test_all_that_is_skipped_is_listed(data, convert, tmp_path):
    names = commands(data, 24)
    for name in names[:9]:
        (data / f"{name}.wav").write_bytes(b"")
    list_file = tmp_path / "skipped.txt"
    _, out, err = convert("speech-commands", "--skipped", list_file)
    listed = list_file.read_text().splitlines()
    assert len(listed) == 9 and listed[0] == f"undecodable: {names[0]} the file is empty"
    assert err.count("undecodable") == 5 and "9 undecodable" in out


def test_where_nothing_is_left_the_list_says_why(data, convert, tmp_path):
    names = commands(data, 24)
    for name in names:
        (data / f"{name}.wav").write_bytes(b"")
    with pytest.raises(BadInput, match="24 rows without sound"):
        convert("speech-commands", "--skipped", tmp_path / "skipped.txt")
    said = (tmp_path / "skipped.txt").read_text().splitlines()
    assert len(said) == 24 and said[0] == f"undecodable: {names[0]} the file is empty"


def test_a_link_to_a_folder_further_up_is_walked_once(data):
    sound(data / "a/b/x.wav")
    for name in ("one", "other"):
        (data / "a/b" / name).symlink_to(data)
    find = prepare.index_audio(data)
    assert find("x", every=True) == [data / "a/b/x.wav"]


def test_a_name_in_a_csv_leads_nowhere_else(data, convert, tmp_path):
    sound(tmp_path / "secret.wav")
    sound(data / "clips/ok.mp3")
    try:
        (data / "clips/half-\udcff.mp3").write_bytes(b"a name that is no Unicode")
    except OSError:
        pass  # a file system that takes none such
    head = "client_id\tpath\tsentence\n"
    lines = [f"a\t{path}\tx\n" for path in ("../../secret.wav", tmp_path / "secret.wav", "ok.mp3")]
    text(
        data / "train.tsv", head + "".join(lines) + "a\tx\x00\ud83d\n".replace("\ud83d", "\x1b[2J")
    )
    rows, out, err = convert("common-voice")
    assert [r["id"] for r in rows] == ["ok"] and "3 missing" in out
    assert "\x1b" not in err


def refused(*args):
    """The one line of a BadInput, through the real command."""
    found = forked("prepare.py", *args)
    assert found.returncode == 2 and found.stderr.count("\n") == 1, found.stderr
    return found.stderr


def test_mistakes_are_one_line(data, tmp_path, capsys):
    out = ("--out", tmp_path / "c.jsonl", "--workers", "1")
    said = refused("corpus", "vggsound", "--root", data, *out)
    assert "vggsound.csv" in said and "nothing of it" in said and "robots.ox.ac.uk" in said
    assert "clotho" in refused("corpus", "nonesuch", "--root", data)
    cases = {
        "a folder": ("corpus", "esc50", "--root", tmp_path / "none", *out),
        "a file in a folder": ("corpus", "esc50", "--root", data, "--out", tmp_path / "no/c"),
        "gated one": ("corpus", "audioset", "--root", data, *out, "--download"),
        "at least one": ("corpus", "esc50", "--root", data, "--workers", "0"),
        "parts of": ("corpus", "librispeech", "--root", data, *out, "--download", "x"),
    }
    text(data / "meta/esc50.csv", "file,fold\na,1\n")
    cases["a column ['filename']"] = ("corpus", "esc50", "--root", data, *out)
    text(
        data / "train.csv", 'audiocap_id,youtube_id,start_time,caption\n1,a,0,"open\n' + "x\n" * 99
    )
    cases["does not close"] = ("corpus", "audiocaps", "--root", data, *out)
    text(data / "transcriptions/dev/S01.json", '["x"]')
    cases["a list of utterances"] = ("corpus", "dipco", "--root", data, *out)
    text(data / "balanced_train_segments.csv", "a, 0.0, 1.0, /m/1\n")
    cases["class_labels_indices.csv"] = ("corpus", "audioset", "--root", data, *out)
    text(data / "vggsound.csv", "aaaaaaaaaaa,1,dog,test\n")
    cases["1 rows without sound"] = ("corpus", "vggsound", "--root", data, *out)
    for expected, args in cases.items():
        with pytest.raises(BadInput) as found:
            run(*args)
        assert expected in str(found.value)
    assert {path.name for path in tmp_path.iterdir()} == {"data"}  # and no half of c.jsonl


def test_a_line_without_end_is_not_held(data, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "LONGEST", 1 << 16)
    text(data / "vggsound.csv", "aaaaaaaaaaa,1,dog,test\n" + "x" * (1 << 23))
    tracemalloc.start()
    with pytest.raises(BadInput, match="vggsound.csv: line 2: expected at most 65536 bytes"):
        run("corpus", "vggsound", "--root", data, "--out", tmp_path / "c", "--workers", 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


# ---------------------------------------------------------------- downloads and archives


KINDS = {
    "symlink": tarfile.SYMTYPE,
    "hardlink": tarfile.LNKTYPE,
    "device": tarfile.CHRTYPE,
    "pipe": tarfile.FIFOTYPE,
}


def make_tar(path, members):
    """{name: content, or a word for what is no file}"""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = KINDS[content], "good.txt"
                archive.addfile(member)


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)
            member.compress_type = zipfile.ZIP_DEFLATED
            member.external_attr = (0o120777 if content == "symlink" else 0o100644) << 16
            archive.writestr(member, content)


GOOD = {"./LibriSpeech/a b.txt": b"x" * 10, "LibriSpeech/..b..c.txt": b"\0" * 99, "ü.txt": b"y"}
MAKERS = {"x.tar.gz": make_tar, "x.tgz": make_tar, "x.zip": make_zip}


@pytest.mark.parametrize("name", MAKERS)
def test_unpack(name, tmp_path):
    MAKERS[name](tmp_path / name, GOOD)
    unpack(tmp_path / name, tmp_path / "into")
    for member, content in GOOD.items():
        assert (tmp_path / "into" / member).read_bytes() == content


EVIL = {
    "../out.txt": b"x",
    "a/../../out.txt": b"x",
    "/tmp/absolute-out.txt": b"x",
    "C:\\out.txt": b"x",
    "a\\..\\..\\out.txt": b"x",
    "bomb.wav": b"\0" * 3_000_000,
}


@pytest.mark.parametrize(
    ("kind", "member", "content"),
    [("x.tgz", *item) for item in (EVIL | {kind: kind for kind in KINDS}).items()]
    + [("x.zip", *item) for item in (EVIL | {"symlink": "symlink"}).items()],
)
def test_evil_archives_are_refused_by_the_members_name(kind, member, content, tmp_path):
    (tmp_path / "deep/into").mkdir(parents=True)
    MAKERS[kind](tmp_path / kind, {"good.txt": b"fine", member: content})
    with pytest.raises(BadInput) as found:
        unpack(tmp_path / kind, tmp_path / "deep/into")
    assert f"{kind}: {member}: expected" in str(found.value)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert files == {kind, "deep", "deep/into"}  # nothing of it was unpacked


def add_header(file, kind, content):
    """A tar's header of that type, and the pieces of what is behind it."""
    member = tarfile.TarInfo("much")
    member.type, member.size = kind, sum(map(len, content))
    file.write(member.tobuf(tarfile.USTAR_FORMAT))
    written = sum(file.write(piece) for piece in content)
    file.write(b"\0" * (-written % 512))


MUCH = 64 << 20
HEADERS = {  # kinds of headers, how many of them, and how much is in each
    "a comment": (tarfile.XHDTYPE, 1, [b"%d comment=" % MUCH, b"x" * (MUCH - 18), b"\n"]),
    "a comment for all": (tarfile.XGLTYPE, 1, [b"%d comment=" % MUCH, b"x" * (MUCH - 18), b"\n"]),
    "a long name": (tarfile.GNUTYPE_LONGNAME, 1, [b"x" * MUCH]),
    "a long link": (tarfile.GNUTYPE_LONGLINK, 1, [b"x" * MUCH]),
    "long names one behind another": (tarfile.GNUTYPE_LONGNAME, 200, [b"x" * (1 << 16)]),
}


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("first", [True, False])
def test_what_stands_in_a_header_is_not_held(case, first, tmp_path):
    kind, times, content = HEADERS[case]
    good = tarfile.TarInfo("good.txt").tobuf()
    with gzip.open(tmp_path / "x.tgz", "wb", 1) as file:
        file.write(b"" if first else good)
        for _ in range(times):
            add_header(file, kind, content)
        file.write(good + b"\0" * 1024)
    tracemalloc.start()
    with pytest.raises(BadInput) as found:
        unpack(tmp_path / "x.tgz", tmp_path / "into")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = f"{tmp_path}/x.tgz: much: expected a header of at most {prepare.MOST_HEADER} bytes"
    assert str(found.value) == f"{expected}, found more"
    assert peak < 8 << 20 and not (tmp_path / "into").exists()


@pytest.mark.long
def test_a_map_of_holes_is_not_held(tmp_path):
    """GNU's sparse files: where there is something in them is a list of any length."""
    with gzip.open(tmp_path / "x.tgz", "wb", 1) as file:
        about = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a"}
        records = [f" {name}={value}\n" for name, value in about.items()]
        records = [f"{len(record) + 2}{record}".encode() for record in records]
        add_header(file, tarfile.XHDTYPE, records)
        add_header(file, tarfile.REGTYPE, [b"%d\n" % (MUCH // 4), b"1\n" * (MUCH // 2)])
        file.write(b"\0" * 1024)
    tracemalloc.start()
    with pytest.raises(BadInput, match="x.tgz: much: expected a header of at most"):
        unpack(tmp_path / "x.tgz", tmp_path / "into")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_long_names_that_are_some_are_unpacked(tmp_path):
    names = {"a" * 99 + "/" + "b" * 200 + f"{i}.txt": bytes([i]) for i in range(20)}
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / f"{form}.tar", "w", format=form) as archive:
            for name, content in names.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        unpack(tmp_path / f"{form}.tar", tmp_path / str(form))
        for name, content in names.items():
            assert (tmp_path / str(form) / name).read_bytes() == content


def test_damaged_archives_are_refused(tmp_path):
    for name, make in MAKERS.items():
        noise = {str(i): np.random.default_rng(i).bytes(9999) for i in range(3)}
        make(tmp_path / name, noise)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BadInput, match="cannot be unpacked"):
            unpack(tmp_path / name, tmp_path)
        spoiled = bytearray(whole)
        spoiled[5000] ^= 255
        (tmp_path / name).write_bytes(spoiled)
        with pytest.raises(BadInput, match="cannot be unpacked"):
            unpack(tmp_path / name, tmp_path)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Stands in for the network: download() takes the file from shelf/ by its address."""
    (tmp_path / "shelf").mkdir()
    asked = []

    def download(url, path, size, digest, show):
        asked.append((url, digest))
        path.write_bytes((tmp_path / "shelf" / url.rsplit("/", 1)[-1]).read_bytes())

    monkeypatch.setattr(prepare, "download", download)
    monkeypatch.setattr(prepare, "size_at", lambda url: None)
    return tmp_path / "shelf", asked


def test_download_unpacks_once_and_only_what_is_named(data, convert, served):
    shelf, asked = served
    audio = sound(shelf / "a.flac").read_bytes()
    for part in ("dev-clean", "test-clean"):
        folder = f"LibriSpeech/{part}/1/2"
        lines = {f"{folder}/1-2.trans.txt": b"1-2-0001 A\n", f"{folder}/1-2-0001.flac": audio}
        make_tar(shelf / f"{part}.tar.gz", lines)
    rows, _, _ = convert("librispeech", "--download", "dev-clean")
    assert [r["split"] for r in rows] == ["dev"]
    url = "https://www.openslr.org/resources/12/dev-clean.tar.gz"
    assert asked == [(url, prepare.CORPORA["librispeech"].files["dev-clean.tar.gz"])]
    (data / "dev-clean.tar.gz").unlink()  # its space is wanted
    convert("librispeech", "--download", "dev-clean", "test-clean")
    assert len(asked) == 2 and asked[1][0].endswith("test-clean.tar.gz")


def test_download_of_a_zip_and_of_files_in_folders(data, convert, served):
    shelf, asked = served
    line = {"filepath": "data/multi_event_train/syn_1.wav", "onoffCaption": "a at 0-1"}
    for name in prepare.CORPORA["picoaudio"].files:
        text(shelf / name.split("/")[-1], json.dumps(line) if "train" in name else "")
    for name in shelf.glob("test*"):
        name.write_text("{}\n")
    audio = sound(shelf / "a.wav").read_bytes()
    make_zip(shelf / "audio_data.zip", {"data/multi_event_train/syn_1.wav": audio})
    rows, _, _ = convert("picoaudio", "--download")
    assert rows[0]["events"] == [["a", 0.0, 1.0]] and len(asked) == 6


def test_what_python_cannot_unpack_is_left_to_the_reader(data, served, tmp_path, capsys):
    shelf, asked = served
    for name in prepare.CORPORA["clotho"].files:
        text(shelf / name, "file_name\n")
    with pytest.raises(BadInput, match="run the printed lines"):
        run("corpus", "clotho", "--root", data, "--out", tmp_path / "c.jsonl", "--download")
    lines = capsys.readouterr().out.splitlines()
    assert len(asked) == 9 and len(lines) == 3
    assert lines[0] == f"7z x -o{data} {data}/clotho_audio_development.7z"


@pytest.mark.parametrize("name", prepare.CORPORA)
def test_every_corpus_says_where_and_how(name):
    corpus = prepare.CORPORA[name]
    assert corpus.where.startswith("https://") and corpus.layout and corpus.licence
    assert bool(corpus.base) == bool(corpus.files)
    for digest in corpus.files.values():
        kind, _, digits = (digest or "md5:" + "0" * 32).partition(":")
        assert len(digits) == {"md5": 32, "sha256": 64}[kind]


# ---------------------------------------------------------------- show


def show(*args, **environment):
    found = subprocess.run(
        [sys.executable, ROOT / "prepare.py", "show", *map(str, args)],
        capture_output=True, encoding="utf-8", cwd=args[0].parent,
        env={"PATH": "/usr/bin", "COLUMNS": "60", "PYTHONIOENCODING": "utf-8", **environment},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_show_piped(tmp_path):
    rate, seconds = 44100, 3.0
    time = np.arange(int(rate * seconds)) / rate
    low, high = np.sin(2 * np.pi * 200 * time), np.sin(2 * np.pi * 6000 * time)
    wave = 0.5 * np.where(time < 1.5, low, high)
    soundfile.write(tmp_path / "-clip.wav", np.stack([wave, wave], 1), rate)
    entry = {"id": "x", "path": "-clip.wav", "labels": ["sine\x1b[2J"], "split": "dev"}
    other = json.dumps({**entry, "path": "other.wav", "id": "never"})
    text(tmp_path / "corpus.jsonl", f"{other}\n{json.dumps(entry)}\n")
    lines = show(tmp_path / "-clip.wav", "--corpus", tmp_path / "corpus.jsonl").splitlines()
    expected = "3.000 s, WAV PCM_16, 44100 Hz, 2 channel(s), peak -6.0 dBFS, RMS -9.0 dBFS"
    assert lines[0] == f"{tmp_path}/-clip.wav: {expected}"
    picture = np.array([list(line) for line in lines[1:17]])
    assert picture.shape == (16, 60) and set(picture.flat) <= set(" ░▒▓█")
    shades = np.vectorize(" ░▒▓█".index)(picture)
    low, high = shades[:, :28].sum(1), shades[:, 32:].sum(1)
    assert low.argmax() >= 12 and high.argmax() < 4  # first low, at the bottom; then high
    assert low.max() > 3 * low[:8].max() and high.max() > 3 * high[8:].max()
    assert lines[17] == "0 s" + "3.00 s".rjust(57)
    assert lines[18:] == [
        'id: "x"',
        'path: "-clip.wav"',
        'labels: ["sine\\u001b[2J"]',
        'split: "dev"',
    ]
    assert "\x1b" not in "".join(lines)


@pytest.mark.long
def test_show_of_silence_and_of_little(tmp_path):
    soundfile.write(tmp_path / "nothing.wav", np.zeros(500000, np.int16), 16000)
    lines = show(tmp_path / "nothing.wav", PYTHONIOENCODING="ascii", NO_COLOR="1").splitlines()
    assert lines[0].endswith("1 channel(s), silent") and set("".join(lines[1:17])) == {" "}
    sound(tmp_path / "short.flac", 0.001)
    row = '{"path": "other.flac"}\n'
    out = show(tmp_path / "short.flac", "--corpus", text(tmp_path / "c.jsonl", row))
    assert "0.001 s, FLAC PCM_16" in out and "no row names this file" in out
    assert "no such file" in refused("show", tmp_path / "none.wav")
    assert "cannot be decoded" in refused("show", tmp_path / "c.jsonl")


def test_what_was_left_out_is_not_written_over_the_rows(tmp_path, capsys):
    out = tmp_path / "keep.jsonl"
    out.write_text("precious\n")
    code, said = run_main(capsys, "corpus", "esc50", "--root", tmp_path, "--out", out,
                          "--skipped", tmp_path / "." / "keep.jsonl")  # fmt: skip
    assert code == 2 and "--skipped" in said and "another file than --out" in said
    assert out.read_text() == "precious\n"


@pytest.mark.parametrize(
    "text, named",
    [
        ("not json\n", "row 1: expected JSON"),
        ("{}\n5\n", "row 2: expected an object, found 5"),
        (None, "a corpus.jsonl"),
    ],
)
def test_show_refuses_what_is_no_corpus(tmp_path, capsys, text, named):
    clip, corpus = tmp_path / "a.wav", tmp_path / "corpus.jsonl"
    soundfile.write(clip, np.zeros(1600), 16000)
    corpus.mkdir() if text is None else corpus.write_text(text)
    code, said = run_main(capsys, "show", clip, "--corpus", corpus)
    assert code == 2 and named in said


def run_main(capsys, *argv):
    """(exit code, stderr) of prepare.py."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr("sys.argv", ["prepare.py", *map(str, argv)])
        prepare.cli(prepare.main)
    return stopped.value.code, capsys.readouterr().err


class Result:
    """Something that can be seen to be gone."""


def give(i):
    return Result()


def test_what_a_worker_made_is_let_go_once_it_is_taken():
    """1.3 million items pass through; they must not gather."""
    taken = []
    with prepare.worker_map(2) as spread:
        for result in spread(give, range(20)):
            taken.append(weakref.ref(result))
            assert sum(ref() is not None for ref in taken) <= 2  # this one, and its chunk's last
    assert len(taken) == 20
