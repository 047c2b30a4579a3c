"""sample.py from the outside: what it prints, what it refuses, and that a chat forgets nothing."""

import io
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys

import numpy as np
import prepare
import pytest
import sample
import soundfile
import torch
from model import PolyAudio
from tests.checkpoints import edit_json, make, make_speaking, rewrite, waves
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small random checkpoint with a tokenizer of its own, and some clips."""
    home = tmp_path_factory.mktemp("sample")
    make_speaking(home / "weights")
    (home / "clips").mkdir()
    for name, wave in zip("abc", waves((0.5, 0.8, 0.3))):
        soundfile.write(home / "clips" / f"{name}.wav", wave, 16000)
    return home


@pytest.fixture
def run(home, monkeypatch, capsys):
    """sample.py in this process: (exit code, stdout, stderr)."""

    def call(*words, weights=home / "weights", stdin=b""):
        monkeypatch.chdir(home / "clips")
        given = ["--weights", str(weights)] if weights else []
        monkeypatch.setattr(
            sys, "argv", ["sample.py", *map(str, words), *given, "--max-new-tokens", "8"]
        )
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        prepare.warn.cache_clear()
        try:
            prepare.cli(sample.main)
            code = 0
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return call


# --- answers


def test_answer_goes_to_stdout_and_nothing_else(run, home):
    code, out, err = run("--clips", "a.wav", "b.wav", "--ask", "Which clip is louder?")
    net = PolyAudio.from_dir(home / "weights")
    clips = [prepare.load_audio(home / "clips" / name) for name in ("a.wav", "b.wav")]
    expected = net.answer("Which clip is louder?", clips, max_new_tokens=8)
    assert (code, err) == (0, "")
    assert out.strip() == prepare.clean(expected, keep="\n\t").strip() != ""


def test_json_holds_the_contract(run):
    plain = run("--clips", "a.wav", "b.wav", "--ask", "Which?")[1]
    code, out, err = run("--clips", "a.wav", "b.wav", "--ask", "Which?", "--json")
    found = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert set(found) == {"answer", "clips", "tokens", "seconds"}
    assert prepare.clean(found["answer"], keep="\n\t").strip() == plain.strip()
    assert found["clips"] == [
        {"path": "a.wav", "seconds": 0.5, "slots": 12},
        {"path": "b.wav", "seconds": 0.8, "slots": 20},
    ]
    assert 1 <= found["tokens"] <= 8
    assert list(found["seconds"]) == ["load", "audio", "prefill", "decode"]
    assert all(value >= 0 for value in found["seconds"].values())


def paths(run, *words, **how):
    return [clip["path"] for clip in json.loads(run(*words, "--json", **how)[1])["clips"]]


def test_folders_globs_and_standard_input(run, home):
    folder = str(home / "clips")
    assert paths(run, "--clips", folder) == [f"{folder}/{name}.wav" for name in "abc"]
    assert paths(run, "--clips", "[bc].wav", "a.wav") == ["b.wav", "c.wav", "a.wav"]
    wav = (home / "clips" / "a.wav").read_bytes()
    piped = run("--clips", "-", "b.wav", "--ask", "Which?", "--json", stdin=wav)[1]
    given = run("--clips", "a.wav", "b.wav", "--ask", "Which?", "--json")[1]
    assert json.loads(piped)["answer"] == json.loads(given)["answer"]
    assert json.loads(piped)["clips"][0]["path"] == "-"


def test_without_a_question_it_says_what_is_there(run):
    asked = run("--clips", "a.wav", "--ask", sample.DEFAULT_QUESTION)[1]
    assert run("--clips", "a.wav")[1] == asked


def test_text_alone_needs_no_clip(run):
    code, out, err = run("--ask", "What is a sound?")
    assert (code, err) == (0, "") and out.strip()


def test_concat_asks_on_one_joined_clip(run, home):
    joined = np.concatenate(
        [
            prepare.load_audio(home / "clips" / "a.wav"),
            np.zeros(32000, np.float32),
            prepare.load_audio(home / "clips" / "b.wav"),
        ]
    )
    soundfile.write(home / "joined.wav", joined, 16000, subtype="FLOAT")
    both = run("--clips", "a.wav", "b.wav", "--ask", "Which?", "--concat")[1]
    one = run("--clips", str(home / "joined.wav"), "--ask", "Which?")[1]
    assert both == one
    assert both != run("--clips", "a.wav", "b.wav", "--ask", "Which?")[1]


def test_a_sampled_answer_repeats_with_its_seed(run):
    words = ("--clips", "a.wav", "--ask", "Which?", "--temperature", "2")
    first = run(*words, "--seed", "1")[1]
    assert first == run(*words, "--seed", "1")[1]
    assert any(first != run(*words, "--seed", str(seed))[1] for seed in (2, 3, 4))


# --- votes


class Judge:
    """Stands in for a network: names, in the order that it hears, the loudest clip, or is biased
    and always says the same."""

    def __init__(self, text=None):
        self.text = text

    def __call__(self, net, question, waves, args, order=None, show=False):
        levels = [np.abs(waves[i - 1]).max() for i in order]
        answer = sample.Answer.__new__(sample.Answer)
        answer.text = self.text or f"Clip {int(np.argmax(levels)) + 1} is the loudest."
        return answer


@pytest.mark.parametrize("loudest", [1, 2, 3])
def test_votes_are_mapped_back_to_the_given_order(monkeypatch, loudest):
    clips = [np.full(400, 0.9 if i == loudest else 0.1, np.float32) for i in (1, 2, 3)]
    monkeypatch.setattr(sample, "ask", Judge())
    args = sample.parse(["--weights", "x", "--clips", "x", "--vote", "5"])
    winner, votes = sample.vote(None, "Which?", clips, args)
    assert winner.text == f"Clip {loudest} is the loudest."
    assert {vote["answer"] for vote in votes} == {winner.text}
    assert len({tuple(vote["order"]) for vote in votes}) == 5


def test_a_bias_for_a_place_wins_no_votes(monkeypatch):
    """Always saying "clip 1" names every clip equally often once the orders are undone."""
    clips = [np.full(400, 0.1, np.float32)] * 3
    monkeypatch.setattr(sample, "ask", Judge("Clip 1."))
    args = sample.parse(["--weights", "x", "--clips", "x", "--vote", "6"])
    answers = [vote["answer"] for vote in sample.vote(None, "Which?", clips, args)[1]]
    assert sorted(answers) == sorted(["Clip 1.", "Clip 2.", "Clip 3."] * 2)


def test_a_number_that_counts_is_no_clip(monkeypatch):
    clips = [np.full(400, 0.1, np.float32)] * 3
    monkeypatch.setattr(sample, "ask", Judge("2"))
    args = sample.parse(["--weights", "x", "--clips", "x", "--vote", "6"])
    for question, told in (("How many clips have a dog?", {"2"}), ("Which one?", set("123"))):
        assert {v["answer"] for v in sample.vote(None, question, clips, args)[1]} == told


@pytest.mark.parametrize("n, k, expected", [(2, 5, 2), (3, 6, 6), (5, 10, 10)])
def test_orders_begin_with_the_given_one_and_differ(n, k, expected):
    orders = sample.clip_orders(n, k, seed=0)
    assert orders[0] == list(range(1, n + 1))
    assert len({tuple(order) for order in orders}) == len(orders) == expected


def test_vote_from_the_command_line(run):
    found = json.loads(
        run("--clips", "a.wav", "b.wav", "--ask", "Which?", "--vote", "2", "--json")[1]
    )
    assert [vote["order"] for vote in found["votes"]] == [[1, 2], [2, 1]]
    assert found["answer"] in {vote["answer"] for vote in found["votes"]}


# --- chat


@pytest.fixture
def chat(home):
    net = PolyAudio.from_dir(home / "weights")
    clips = [prepare.load_audio(home / "clips" / f"{name}.wav") for name in "ab"]
    args = sample.parse(["--weights", "x", "--clips", "x", "--max-new-tokens", "6"])
    return sample.Chat(net, clips, args)


def test_later_turns_see_earlier_ones_and_read_only_what_is_new(chat, home, monkeypatch):
    read = []
    step = chat.net.step
    monkeypatch.setattr(
        chat.net, "step", lambda ids, *rest: read.append(sum(map(len, ids))) or step(ids, *rest)
    )
    chat.say("Which clip is louder?")
    chat.waves.append(prepare.load_audio(home / "clips" / "c.wav"))
    first = read[0]
    read.clear()
    answer = chat.say("And this one?")
    assert (
        "<sound-3>" in chat.messages[2]["content"]
        and "<sound-1>" not in chat.messages[2]["content"]
    )
    fresh = chat.net.answer(chat.messages[:3], chat.waves, max_new_tokens=6)
    assert answer.text.strip() == fresh
    assert read[0] < first  # the second prompt is longer, yet less of it is read


def test_a_chat_outgrows_its_cache(chat):
    chat.say("Which clip is louder?")
    small = chat.cache.capacity
    chat.messages[0]["content"] += " very" * small
    chat.say("And now?")
    assert chat.cache.capacity > small
    assert chat.messages[-1]["content"] == chat.net.answer(chat.messages[:3], chat.waves, 6)


def test_a_mistake_leaves_the_conversation_as_it_was(chat, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "short.wav", np.zeros(320), 16000)
    bad = ["/clip nowhere.wav", f"/clip {tmp_path}/short.wav", "/clip -", "What is <sound-9>?"]
    lines = iter([*bad, "/nonsense", "", "Which?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.run("")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert len(chat.waves) == 2
    out, err = capsys.readouterr()
    assert out.strip() == prepare.clean(chat.messages[1]["content"], "\n\t").strip()
    assert err.count("\n") == len(bad)


def test_a_clip_that_goes_with_its_question_is_told(chat, home, monkeypatch, capsys):
    lines = iter([f"/clip {home}/clips/b.wav", "What is <sound-9>?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    told = []
    monkeypatch.setattr(sample, "note", told.append)
    chat.run("Which clip is louder?")
    assert len(chat.waves) == 2 and told[-1] == "clips from 3 on are dropped; /clip adds them again"


def test_clips_that_do_not_fit_are_dropped_and_the_chat_goes_on(chat, home, monkeypatch, capsys):
    chat.say("Which clip is louder?")
    chat.net.config.decoder.context = 120
    lines = iter([f"/clip {home}/clips/b.wav"] * 5 + ["And these?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.run("")
    assert "N_max" in capsys.readouterr().err
    assert len(chat.waves) == 2
    assert len(chat.messages) == 2


def test_a_real_terminal(home):
    """The whole program under a pseudo-terminal: first answer, /clip, a question, the end."""
    mine, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "sample.py"), "--weights", str(home / "weights")]
    program = subprocess.Popen(
        [*command, "--max-new-tokens", "5", "--clips", "a.wav", "b.wav"],
        cwd=home / "clips", stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    os.write(mine, b"/clip c.wav\nWhich of the three?\n/clip gone.wav\n/quit\n")
    seen = b""
    while True:
        try:
            piece = os.read(mine, 4096)
        except OSError:  # Linux says so when the other end has closed
            break
        if not piece:
            break
        seen += piece
    assert program.wait(timeout=60) == 0
    text = seen.decode(errors="replace")
    assert "clip 3: c.wav, 0.30 s" in text
    assert "gone.wav: no such file" in text
    assert "audioflamingo3 on cpu" in text


# --- refusals


def write_bad_clips(folder):
    """Every kind of file that is not a clip."""
    tone = (0.1 * np.sin(np.arange(16000) * 0.1)).astype(np.float32)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("these are words, not sounds\n")
    (folder / "folder").mkdir()
    soundfile.write(folder / "whole.flac", tone, 16000)
    whole = (folder / "whole.flac").read_bytes()
    (folder / "cut.flac").write_bytes(whole[: len(whole) // 2])
    hole = tone.copy()
    hole[100] = np.nan
    soundfile.write(folder / "nan.wav", hole, 16000, subtype="FLOAT")
    soundfile.write(folder / "many.wav", np.zeros((400, 33)), 16000)
    soundfile.write(folder / "long.wav", tone, 16000)
    data = bytearray((folder / "long.wav").read_bytes())
    at = data.find(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 3 * 3600 * 32000)
    (folder / "long.wav").write_bytes(bytes(data))
    soundfile.write(folder / "short.wav", tone[:320], 16000)


BAD_CLIPS = {
    "gone.wav": "gone.wav: no such file",
    "folder": "folder: expected sounds in this folder, found none",
    "empty.wav": "empty.wav: the file is empty",
    "text.wav": "text.wav: cannot be decoded as audio",
    "cut.flac": "cut.flac: cannot be decoded as audio",
    "nan.wav": "nan.wav: sample 100: expected a finite number, found NaN or infinity",
    "many.wav": "many.wav: channels: expected at most 32, found 33",
    "long.wav": "long.wav: truncated: the header promises 10800.00 s, the file holds 1.00 s",
    "short.wav": "clip 1: too short to make a slot",
    "none*.wav": "none*.wav: no file matches",
}


def check_refused(result, *parts):
    """Exit 2, one line on stderr that holds the parts, nothing on stdout."""
    code, out, err = result
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("sample.py: ")
    assert all(part in err for part in parts), err


@pytest.mark.parametrize("name", BAD_CLIPS)
def test_bad_clips(run, home, name):
    if not (home / "clips" / "text.wav").exists():
        write_bad_clips(home / "clips")
    check_refused(run("--clips", name, "--ask", "What?"), BAD_CLIPS[name])


def test_bad_questions(run):
    check_refused(
        run("--clips", "a.wav", "--ask", "Is <sound-3> loud?"), "<sound-3>", "1 clip(s) given"
    )
    check_refused(
        run("--clips", "a.wav", "b.wav", "--ask", "Is <sound-1> loud?"), "clip 2", "<sound-2>"
    )
    check_refused(run("--clips", "a.wav", "--ask", "Which?", "--vote", "3"), "--vote", "found 1")
    check_refused(run("--clips", "a.wav", "--ask", "Which?", "--vote", "0"), "--vote")
    check_refused(
        run("--clips", "a.wav", "--ask", "Which?", "--device", "abacus"), "--device", "abacus"
    )
    check_refused(run("--clips", "", "--ask", "Which?"), "--clips", "an empty one")
    check_refused(run("--clips", "a" * 5000, "--ask", "Which?"), "File name too long")
    check_refused(run("--ask", "Which?", "--concat"), "--concat")
    for flag, value in (("--temperature", "nan"), ("--seed", "1" * 30), ("--top-p", "0")):
        check_refused(run("--clips", "a.wav", "--ask", "Which?", flag, value), flag)
    check_refused(run("--ask", " " * 200_000 + "x"), "100000 spaces")
    check_refused(run("--json"), "--clips")


@pytest.fixture
def many(home, tmp_path, monkeypatch):
    """A folder of 10,000 clips, none of which may be decoded."""

    def decoded(*_):
        raise AssertionError("decoded")

    for i in range(10_000):
        os.link(home / "clips" / "a.wav", tmp_path / f"{i:05}.wav")
    monkeypatch.setattr(prepare, "read_mono", decoded)
    return tmp_path


def test_of_thousands_of_clips_only_the_headers_are_read(run, many):
    check_refused(run("--clips", many, "--ask", "Which?"), "clips of up to 12 slots", "N_max")


def test_a_chat_takes_no_folder_of_thousands(chat, many):
    with pytest.raises(prepare.BadInput, match="clip"):
        chat.add(str(many))
    assert len(chat.waves) == 2


def test_what_is_wrong_with_the_clips_is_told_before_the_weights_are_read(run, monkeypatch):
    monkeypatch.setattr(sample, "load_net", None)
    check_refused(run("--clips", "a.wav", "gone.wav", "--ask", "Which?"), "gone.wav: no such file")


def test_too_many_clips_for_the_context(run, home):
    """The message quotes the paper's equation 1 with its numbers."""
    small = home / "small"
    if not small.exists():
        rewrite(home / "weights", small)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (small / name).write_bytes((home / "weights" / name).read_bytes())
        config = json.loads((small / "config.json").read_text())
        edit_json(
            small / "config.json",
            text_config={**config["text_config"], "max_position_embeddings": 128},
        )
    result = run("--clips", *["a.wav"] * 9, "--ask", "Which?", weights=small)
    check_refused(result, "9 clips of up to 12 slots", "N_max = floor((L - T) / K) = floor((128 - ")


def no_config(dir):
    (dir / "config.json").unlink()
    return "expected config.json"


def wrong_shape(dir):
    rewrite(dir, dir, edit=lambda t: t.update(shrink(t, "lm_head.weight")))
    return "lm_head.weight: expected (2048, 64), found (2047, 64)"


def shrink(tensors, end):
    name = next(key for key in tensors if key.endswith(end))
    return {name: tensors[name][:-1].clone()}


def missing_shard(dir):
    make("af3", dir, shard="200KB")
    (dir / "model.safetensors").unlink()
    gone = sorted(dir.glob("model-*.safetensors"))[2]
    gone.unlink()
    return gone.name


def pickle(dir):
    (dir / "model.safetensors").rename(dir / "pytorch_model.bin")
    return "pytorch_model.bin, a pickle"


def disguised_pickle(dir):
    (dir / "model.safetensors").write_bytes(b"\x80\x04\x95" + bytes(100))
    return "found a pickle"


@pytest.mark.parametrize("spoil", [no_config, wrong_shape, missing_shard, pickle, disguised_pickle])
def test_bad_weights(run, home, tmp_path, spoil):
    rewrite(home / "weights", tmp_path)
    said = spoil(tmp_path)
    check_refused(run("--clips", "a.wav", "--ask", "What?", weights=tmp_path), said)


def test_weights_that_are_not_there(run, monkeypatch, tmp_path):
    check_refused(run("--ask", "What?", weights=tmp_path / "no"), "no such folder")
    monkeypatch.setattr(sample, "TINY", tmp_path / "none")
    check_refused(run("--ask", "What?", weights=None), "--weights DIR")


# --- without arguments, and as a program


def test_without_arguments_it_asks_about_the_clips_that_come_along(run, home):
    code, out, err = run(weights=home / "weights")
    assert (code, err) == (0, "")
    net = PolyAudio.from_dir(home / "weights")
    assert 2 <= len(sample.DEMO) <= 3
    blocks = out.split("\n\nclip 1: ")
    assert len(blocks) == len(sample.DEMO)
    for block, (names, question) in zip(blocks, sample.DEMO):
        waves = [prepare.load_audio(ROOT / "clips" / f"{name}.flac") for name in names.split()]
        for name, wave in zip(names.split(), waves):
            assert f"clips/{name}.flac, {len(wave) / 16000:.2f} s\n" in block
        answer = prepare.clean(net.answer(question, waves, 8), keep="\n\t")
        told = block.partition(f"> {question}\n")[2]  # as it was streamed, spaces around it too
        assert told.strip() == answer.strip()


def test_without_arguments_and_weights_it_says_how_to_get_some(run, monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "TINY", tmp_path / "none")
    check_refused(run(weights=None), "--weights DIR", "train.py", "prepare.py weights")


def test_version_and_help(capsys):
    for flag, parts in (("--version", ("torch 2",)), ("--help", ("--why", "--serve", "<sound-1>"))):
        with pytest.raises(SystemExit) as end:
            sample.parse([flag])
        out, err = capsys.readouterr()
        assert (end.value.code, err) == (0, "") and all(part in out for part in parts)


def start(home, *words, **how):
    command = [sys.executable, str(ROOT / "sample.py"), "--weights", str(home / "weights")]
    return subprocess.Popen(
        [*command, *words],
        cwd=home / "clips",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **how,
    )


def test_it_starts_without_what_takes_long(home):
    """Each of these costs every start from a tenth of a second to two; a plain CPU needs none."""
    code = (
        "import sys, sample\n"
        "sys.argv = ['sample.py', '--clips', 'a.wav', '--ask', 'Which?', *sys.argv[1:]]\n"
        "sample.main()\n"
        "print(*sorted({'torch._dynamo', 'sympy', 'triton', 'transformers'} & set(sys.modules)))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "", "POLYAUDIO_KERNELS": ""}
    command = [sys.executable, "-c", code, "--weights", "../weights", "--max-new-tokens", "2"]
    command += ["--device", "cpu"]
    done = subprocess.run(command, cwd=home / "clips", env=env, capture_output=True, text=True)
    found = done.stdout.splitlines()[-1]
    assert (done.returncode, found) == (0, "triton" * torch.cuda.is_available()), done.stderr


def test_anywhere_and_without_triton_it_says_what_the_readme_says(tmp_path):
    """The model that comes along is found, from whichever folder."""
    (tmp_path / "triton.py").write_text("raise ImportError('none here')\n")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    words, told = re.search(r"^\$ python sample.py (--clips .*)\n(.*)\n", readme, re.M).groups()
    words = [str(ROOT / word) if word.startswith("clips/") else word for word in shlex.split(words)]
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": ""}
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), *words], cwd=tmp_path, env=env,
                          capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, told), done.stderr


@pytest.mark.parametrize("leave, code", [("Ctrl-C", 130), ("close", 141)])
def test_ctrl_c_and_a_reader_who_leaves_end_it_quietly(home, leave, code):
    words = ("--clips", "a.wav", "--ask", "Which?", "--max-new-tokens", "30000")
    program = start(home, *words)
    assert program.stdout.read(1)
    program.send_signal(signal.SIGINT) if leave == "Ctrl-C" else program.stdout.close()
    assert program.wait(60) == code
    assert program.stderr.read() == b""


def test_as_a_process_of_its_own(home):
    """The same through the shell: exit code 2 and one line, nothing of torch's."""
    command = [sys.executable, str(ROOT / "sample.py"), "--clips", "gone.wav", "--ask", "What?"]
    done = subprocess.run(
        [*command, "--weights", str(home / "weights")], capture_output=True, text=True, cwd=home
    )
    check_refused((done.returncode, done.stdout, done.stderr), "gone.wav: no such file")
