"""What an answer rests on, against brute force: each clip cut out of the prompt by hand, each slot
made a little larger and smaller. And how often, on a bench's needle questions that are answered
right, the clip named first is the one that holds the needle:

    python -m tests.test_why weights/tiny data/toy/bench.jsonl
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import prepare
import pytest
import sample
import soundfile
import torch
from model import Config, PolyAudio
from tests.checkpoints import edit_json, make, make_speaking, waves
from tests.conftest import ROOT
from tests.faults import forked


def right_clip(row) -> int:
    """The clip of a needle question: its gold's, or the one of which the gold's word is said."""
    kind, value = row["gold"]["type"], row["gold"]["value"]
    if kind == "clip":
        return value
    if kind == "text":
        return int(value["slots"][0][0].split()[-1])
    told = [part["clip"] for part in row["meta"]["evidence"] if value[0] in part["says"]]
    assert len(told) == 1, row["id"]
    return told[0]


def named_first(net, bench, most=256) -> tuple[int, int, int]:
    """Of a bench's needle questions: (the right clip is named first, answered right, all)."""
    first, right, total = 0, 0, 0
    args = sample.parse(["--weights", "x", "--ask", "x", "--max-new-tokens", str(most)])
    for row in prepare.read_rows(bench):
        if row["task"] != "needle":
            continue
        clips = [prepare.load_clip(clip, Path(bench).parent) for clip in row["clips"]]
        answer = sample.ask(net, row["question"], clips, args)
        total += 1
        if prepare.score(row["gold"], answer.text.strip()) == 1:
            right += 1
            found = sample.why(net, answer.asked, clips, answer.ids)
            first += found[0]["clip"] == right_clip(row)
    return first, right, total


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("why")
    make_speaking(home / "weights")
    for name, wave in zip("abc", waves((0.5, 0.8, 0.3))):
        soundfile.write(home / f"{name}.wav", wave, 16000)
    return home


@pytest.fixture(scope="module")
def net(home):
    return PolyAudio.from_dir(home / "weights")


CLIPS = waves((0.5, 0.8, 0.3))


def asked(net, question="Which clip is louder?", clips=CLIPS):
    return net.prompt([{"role": "user", "content": question}], clips)


def cut(net, ids, lengths, gone) -> list[int]:
    """The prompt without some of its runs of slots, counted from 0."""
    kept, run, seen = [], 0, 0
    for id in ids:
        if id == net.config.audio_token:
            seen += 1
            if run not in gone:
                kept.append(id)
            if seen == lengths[run]:
                run, seen = run + 1, 0
        else:
            kept.append(id)
    return kept


# --- clips left out


def test_a_clip_is_left_out_as_by_hand(net):
    ids, clips = asked(net)
    said = net.tokenizer.encode("Clip 2 is.")
    found = sample.why(net, (ids, clips), CLIPS, said)
    lengths = [net.n_slots(clip) for clip in CLIPS]
    whole = net.loglik(ids, clips, said)
    drops = {}
    for i in range(3):
        rest = cut(net, ids, lengths, {i})
        assert len(rest) == len(ids) - lengths[i]
        drops[i + 1] = whole - net.loglik(rest, CLIPS[:i] + CLIPS[i + 1 :], said)
    assert {c["clip"]: c["drop"] for c in found} == pytest.approx(drops, abs=1e-3)
    order = [clip["clip"] for clip in found]
    assert order == sorted(drops, key=lambda i: -drops[i])
    assert [len(clip["slots"]) for clip in found] == [lengths[i - 1] for i in order]


def test_a_repeated_clip_goes_everywhere_at_once(net):
    two = CLIPS[:2]
    ids, clips = asked(net, "Is <sound-2> in <sound-1>, or <sound-2> itself?", two)
    said = net.tokenizer.encode("It is.")
    found = {c["clip"]: c for c in sample.why(net, (ids, clips), two, said)}
    lengths = [net.n_slots(clip) for clip in clips]  # 2, 1, 2
    rest = cut(net, ids, lengths, {0, 2})
    drop = net.loglik(ids, clips, said) - net.loglik(rest, two[:1], said)
    assert found[2]["drop"] == pytest.approx(drop, abs=1e-3)
    assert len(found[2]["slots"]) == lengths[0]
    each = sample.contributions(net, ids, clips, said)
    assert len(each) == sum(lengths)
    both = np.array(each[: lengths[0]]) + each[-lengths[2] :]
    assert found[2]["slots"] == pytest.approx(both, abs=1e-3)
    assert found[1]["slots"] == pytest.approx(each[lengths[0] : -lengths[2]], abs=1e-3)


def test_of_one_clip_the_bare_question_is_left(net):
    ids, clips = asked(net, clips=CLIPS[:1])
    said = net.tokenizer.encode("A dog.")
    (found,) = sample.why(net, (ids, clips), CLIPS[:1], said)
    bare = [id for id in ids if id != net.config.audio_token]
    drop = net.loglik(ids, clips, said) - net.loglik(bare, [], said)
    assert found["drop"] == pytest.approx(drop, abs=1e-3)


# --- the gradient


def test_contributions_are_the_slope_of_a_slots_size(home, monkeypatch):
    net = PolyAudio.from_dir(home / "weights", dtype=torch.float64)
    ids, clips = asked(net, clips=CLIPS[:2])
    said = net.tokenizer.encode("Clip 2 is.")
    each = sample.contributions(net, ids, clips, said)
    plain = [part.clone() for part in net.encode(CLIPS[:2])]
    scale = torch.ones(len(each), 1, dtype=torch.float64)
    lengths = [len(part) for part in plain]
    monkeypatch.setattr(net, "encode", lambda sounds: (torch.cat(plain) * scale).split(lengths))

    def slope(places, step=1e-4):
        at = []
        for sign in (1, -1):
            scale.fill_(1)
            scale[places] += sign * step
            at.append(net.loglik(ids, clips, said))
        return (at[0] - at[1]) / (2 * step)

    for place in (0, 5, lengths[0] - 1, lengths[0], len(each) - 1):
        assert each[place] == pytest.approx(slope([place]), rel=1e-4, abs=1e-6)
    assert sum(each) == pytest.approx(slope(slice(None)), rel=1e-4, abs=1e-6)
    assert max(map(abs, each)) > 1e-3


def test_a_slot_that_is_nothing_adds_nothing(net, monkeypatch):
    encode = net.encode
    monkeypatch.setattr(
        net, "encode", lambda sounds: [x * (i != 1) for i, x in enumerate(encode(sounds))]
    )
    ids, clips = asked(net)
    said = net.tokenizer.encode("Clip 2 is.")
    slots = {c["clip"]: c["slots"] for c in sample.why(net, (ids, clips), CLIPS, said)}
    assert not any(slots[2])
    assert all(slots[1]) and all(slots[3])


def test_nothing_is_left_behind(net):
    """An answer and its likelihood are the same before and after."""
    ids, clips = asked(net)
    before = net.generate(ids, clips, 6), net.loglik(ids, clips, [5, 6])
    sample.why(net, (ids, clips), CLIPS, [5, 6])
    assert (net.generate(ids, clips, 6), net.loglik(ids, clips, [5, 6])) == before
    assert net.language_model.recompute is False
    assert all(p.grad is None for p in net.parameters())


def test_nothing_is_left_behind_by_what_fails(net, monkeypatch):
    def broken(*_):
        raise MemoryError

    ids, clips = asked(net)
    monkeypatch.setattr(net, "surprise", broken)
    with pytest.raises(MemoryError):
        sample.contributions(net, ids, clips, [5, 6])
    assert net.language_model.recompute is False


# --- other checkpoints


def speaking(kind, dir):
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    specials += ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    make(kind, dir)
    prepare.train_bpe([(ROOT / "sample.py").read_text()], 1000, specials, dir)
    ids = prepare.Tokenizer.from_dir(dir).special
    edit_json(dir / "config.json", audio_token_index=ids["<|AUDIO|>"])
    return dir


def perceiving(home, dir):
    """The same tokenizer under our own kind, its slots made by queries."""
    config = json.loads((home / "weights" / "config.json").read_text())
    config |= {"model_type": "polyaudio", "resampler": {"kind": "perceiver", "slots": 7}}
    torch.manual_seed(0)
    PolyAudio(Config.from_dict(config)).save(dir)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (dir / name).write_bytes((home / "weights" / name).read_bytes())
    return dir


def ask_why(net, capsys):
    ids, clips = asked(net)
    said = net.tokenizer.encode("Clip 2 is.")
    found = sample.why(net, (ids, clips), CLIPS, said)
    sample.show_why(net, found, ["a.wav", "b.wav", "c.wav"])
    return {clip["clip"]: clip for clip in found}, capsys.readouterr().out


def test_qwen2_audio_in_its_own_layout(tmp_path, capsys):
    net = PolyAudio.from_dir(speaking("qwen2_audio", tmp_path))
    found, out = ask_why(net, capsys)
    ids, clips = asked(net)
    said = net.tokenizer.encode("Clip 2 is.")
    rest = cut(net, ids, [net.n_slots(c) for c in CLIPS], {1})
    drop = net.loglik(ids, clips, said) - net.loglik(rest, [CLIPS[0], CLIPS[2]], said)
    assert found[2]["drop"] == pytest.approx(drop, abs=1e-3)
    assert out.count("most at") == 3


def test_a_perceivers_slots_have_no_seconds(home, tmp_path, capsys):
    found, out = ask_why(PolyAudio.from_dir(perceiving(home, tmp_path)), capsys)
    assert [len(found[i]["slots"]) for i in (1, 2, 3)] == [7, 7, 7]
    assert "most at" not in out and out.count("clip ") == 3


def test_in_bfloat16_it_is_the_same_but_for_rounding(home, net, capsys):
    exact, _ = ask_why(net, capsys)
    rough, _ = ask_why(PolyAudio.from_dir(home / "weights", dtype=torch.bfloat16), capsys)
    for i in exact:
        assert rough[i]["drop"] == pytest.approx(exact[i]["drop"], abs=0.5)
        a, b = np.array(exact[i]["slots"]), np.array(rough[i]["slots"])
        assert np.corrcoef(a, b)[0, 1] > 0.9


# --- what is shown


def shown(net, capsys, clips, paths=("a.wav", "b.wav")):
    sample.show_why(net, clips, list(paths))
    return capsys.readouterr().out.split("\n")[3:]


def test_bars_are_in_proportion(net, capsys):
    slots = [0.0] * 10 + [1.0, -3.0] + [0.0] * 48  # 60 slots: two to a character
    lines = shown(
        net, capsys, [{"clip": 2, "drop": 4.0, "slots": slots},
                      {"clip": 1, "drop": 1.0, "slots": [2.0, 0.0, -2.0]}]
    )  # fmt: skip
    assert lines[0].split() == ["clip", "2", "#" * sample.WIDE, "4.00", "b.wav"]
    assert lines[2].split() == ["clip", "1", "#" * (sample.WIDE // 4), "1.00", "a.wav"]
    ink = [re.search(r"\|(.*)\|", line)[1] for line in (lines[1], lines[3])]
    assert ink[0] == " " * 5 + "@" + " " * 24  # 1 and 3 do not cancel
    assert ink[1] == sample.INKS[round(9 * 2 / 4)] * 2
    assert "2.40 s, most at 0.40-0.48" in lines[1]
    assert "0.12 s, most at 0.00-0.08" in lines[3]


def test_a_clip_that_speaks_against_the_answer_has_no_bar(net, capsys):
    lines = shown(net, capsys, [{"clip": 1, "drop": -1.0, "slots": [0.0, 0.0]}])
    assert lines[0].split() == ["clip", "1", "-1.00", "a.wav"]


def test_names_cannot_write_on_the_terminal(net, capsys):
    lines = shown(net, capsys, [{"clip": 1, "drop": 1.0, "slots": [1.0]}], ("\x1b[31mred\n.wav",))
    assert lines[0].endswith("[31mred.wav")


# --- from the command line


@pytest.fixture
def run(home, monkeypatch, capsys):
    def call(*words):
        monkeypatch.chdir(home)
        words = ["--weights", "weights", "--max-new-tokens", "6", *words]
        monkeypatch.setattr(sys, "argv", ["sample.py", *words])
        code = 0
        try:
            prepare.cli(sample.main)
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return call


def test_json_and_bars_say_the_same(run):
    words = ("--clips", "a.wav", "b.wav", "c.wav", "--ask", "Which?", "--why")
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    about = out[out.index("\nHow much") :]
    assert about.isascii()
    clips = json.loads(run(*words, "--json")[1])["why"]
    names = re.findall(r"^clip (\d) .* (-?\d+\.\d\d)  (\w)\.wav$", about, re.M)
    assert [(int(i), "abc"[int(i) - 1]) for i, _, _ in names] == [(int(i), n) for i, _, n in names]
    assert [int(i) for i, _, _ in names] == [clip["clip"] for clip in clips]
    drops = [clip["drop"] for clip in clips]
    assert [float(drop) for _, drop, _ in names] == pytest.approx(drops, abs=0.006)
    assert drops == sorted(drops, reverse=True)


def test_a_file_given_twice_is_two_clips(run):
    code, out, _ = run("--clips", "a.wav", "a.wav", "--ask", "Same?", "--why", "--json")
    found = json.loads(out)["why"]
    assert code == 0 and sorted(clip["clip"] for clip in found) == [1, 2]


@pytest.mark.parametrize(
    "words", [("--clips", "a.wav", "b.wav", "--vote", "2"), ("--clips", "a.wav", "--concat"), ()]
)
def test_what_it_does_not_go_with(run, words):
    code, out, err = run("--ask", "Which?", "--why", *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and "--why" in err


# --- the measure


def test_the_measure_counts_what_it_says(home, net, tmp_path, monkeypatch):
    """Four needles and another item; three are answered right, of them two point right."""
    base = {"skill": "reasoning", "clips": ["a.wav", "b.wav"], "question": "Which?", "answer": "x",
            "source": "made", "licences": ["CC0-1.0"]}  # fmt: skip
    said = [{"clip": 1, "says": "a dog"}, {"clip": 2, "says": "the ring"}]
    golds = [
        {"type": "clip", "value": 2}, {"type": "keywords", "value": ["ring"]},
        {"type": "text", "value": {"text": "audio 1, dog", "slots": [["audio 1"], ["dog"]]}},
        {"type": "clip", "value": 1}, {"type": "clip", "value": 2},
    ]  # fmt: skip
    with open(tmp_path / "bench.jsonl", "w") as file:
        for i, gold in enumerate(golds):
            row = {**base, "id": str(i), "task": "needle" if i < 4 else "count", "gold": gold,
                   "meta": {"evidence": said}}  # fmt: skip
            file.write(json.dumps(row) + "\n")
    for name in "ab":
        (tmp_path / f"{name}.wav").write_bytes((home / f"{name}.wav").read_bytes())
    answers = iter(["audio 2", "ring", "audio 1, dog", "audio 2"])

    class Said:
        ids, asked = [1], ([1], [])

        def __init__(self, *_):
            self.text = next(answers)

    monkeypatch.setattr(sample, "ask", Said)
    monkeypatch.setattr(sample, "why", lambda *_: [{"clip": 2}, {"clip": 1}])
    assert named_first(net, tmp_path / "bench.jsonl") == (2, 3, 4)


@pytest.mark.slow
def test_of_needles_that_it_answers_right_it_names_the_right_clip_first(tmp_path):
    """The model that comes along, on clips that it has not learned from."""
    words = "--train 0 --bench 400 --split dev --clips 9000 --mix 0/0/100/0".split()
    done = forked("synth.py", *words, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    net = PolyAudio.from_dir(ROOT / "weights" / "tiny")
    first, right, total = named_first(net, tmp_path / "bench-dev.jsonl")
    print(f"{total} needles, {right} answered right, the right clip first in {first} of those")
    assert total >= 90 and right >= 30 and first >= 0.9 * right


def main():
    parser = prepare.Parser(prog="python -m tests.test_why", description=__doc__)
    parser.add_argument("weights", help="a folder of them")
    parser.add_argument("bench", help="of whose needle questions it counts")
    args = parser.parse_args()
    first, right, total = named_first(PolyAudio.from_dir(args.weights), args.bench)
    print(f"{total} needles, {right} answered right, the right clip first in {first} of those")


if __name__ == "__main__":
    prepare.cli(main)
