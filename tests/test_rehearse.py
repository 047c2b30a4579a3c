"""The rehearsal of tests/rehearse.py with 46 million parameters, and whether it sees a fault."""

import subprocess
import sys
from types import SimpleNamespace

import prepare
import pytest
import torch
from prepare import BadInput
from safetensors.torch import save_file
from tests import rehearse
from tests.conftest import ROOT
from tests.rehearse import Place, Stage

STAGES = "make download check sample toy train resume merge judge".split()


@pytest.mark.long
def test_every_stage_is_reported(tmp_path):
    words = ["--scale", "0.003", "--steps", "4", "--folder", tmp_path]
    line = [sys.executable, "-m", "tests.rehearse", *map(str, words)]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    head, *rows = run.stdout.splitlines()
    assert head.split()[:3] == ["stage", "seconds", "GB"]
    assert [row.split()[0] for row in rows] == STAGES
    assert all(float(row.split()[1]) > 0 and 0.1 < float(row.split()[2]) < 10 for row in rows)
    assert all("python " in row for row in rows)
    assert not list(tmp_path.iterdir()), "what was made goes"


def test_at_full_size_it_is_audio_flamingo_3():
    """830 tensors, 8.27 billion parameters, but for a few more rows of the vocabulary."""
    config = rehearse.config_of(1)
    config["text_config"]["vocab_size"] = 151672
    table = rehearse.parameters_of(config)
    assert len(table) == 830
    assert sum(p.numel() for p in table.values()) == 8_267_215_360


def refusal(capsys, monkeypatch, *words) -> str:
    monkeypatch.setattr(sys, "argv", ["rehearse.py", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        prepare.cli(rehearse.main)
    said = capsys.readouterr()
    assert (stop.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    return said.err


def test_too_little_disk_is_refused(tmp_path, monkeypatch, capsys):
    free = SimpleNamespace(free=16_500_000_000)
    monkeypatch.setattr(rehearse.shutil, "disk_usage", lambda folder: free)
    said = refusal(capsys, monkeypatch, "--folder", tmp_path)
    assert said.endswith("GB of free space, found 16.500 GB\n")
    assert not list(tmp_path.iterdir())
    for words in (("--scale", 0), ("--scale", 2), ("--steps", 3), ("--steps", "x")):
        assert words[0] in refusal(capsys, monkeypatch, "--folder", tmp_path, *words)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, 0.01, 8)


def says(text, code=0):
    return "-c", f"import sys; print({text!r}, file=sys.stderr); sys.exit({code})"


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (Stage(says("no room", 2), print), "odd: expected exit code 0, found 2: no room"),
        (Stage(says("done"), print, lambda place: False), "expected to be stopped, found 0: done"),
        (Stage(says("train.py: full\n====", 1), print), "found 1: train.py: full$"),
        (Stage(says("done"), lambda place: [][0]), "odd: IndexError.*; done"),
        (Stage(says("done"), rehearse.checked), "odd: it says: expected no faults, found a fault$"),
    ],
)
def test_a_stage_that_fails_is_named(place, stage, words):
    (place.home / "check.out").write_text("a fault")
    stages = {"odd": stage, "never": Stage(says("never"), print)}
    with pytest.raises(BadInput, match=words):
        rehearse.rehearse(place, stages)
    assert not (place.home / "never.out").exists()


def write(dir, shift, other):
    dir.mkdir()
    ones = torch.ones(4, 4)
    tensors = {
        "language_model.model.layers.0.self_attn.q_proj.weight": ones + shift,
        "language_model.model.norm.weight": ones[0] + other,
    }
    save_file(tensors, dir / "model.safetensors")


@pytest.mark.parametrize(("shift", "other"), [(1, 0), (0, 0), (1, 1)])
def test_weights_that_did_not_change_are_seen(place, shift, other, monkeypatch):
    """Or that changed where no adapter is."""
    monkeypatch.setattr(rehearse, "check_size", lambda place, dir: None)
    write(place.home / "base", 0, 0)
    write(place.home / "merged", shift, other)
    (place.home / "run").mkdir()
    key = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({key: torch.ones(1)}, place.home / "run/adapter_model.safetensors")
    if (shift, other) == (1, 0):
        assert rehearse.merges(place) == "1 of 2 tensors are others"
    else:
        with pytest.raises(BadInput, match="nowhere else"):
            rehearse.merges(place)
