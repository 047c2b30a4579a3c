"""The README, tried out: every command that does not say it takes minutes or a GPU is run as it
stands there, from the root, and a terminal session must come out word for word.

The commands run in a copy of what git tracks, so that they neither find nor leave anything here.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from tests.conftest import ROOT, project_files

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
LONG = re.compile(r"#.*\b(minutes?|hours?|GPUs?|GB)\b")  # in a comment: what is not run here


def commands() -> list[tuple[str, str]]:
    """(command, what the README says it prints, if it is a session)"""
    found = []
    for language, block in BLOCKS:
        lines = block.splitlines()
        if language or LONG.match(lines[0]):
            continue
        session = block.startswith("$ ")
        for place, line in enumerate(lines):
            if session and not line.startswith("$ ") or line.startswith("#"):
                continue
            told = []
            for after in lines[place + 1 :] if session else ():
                if after.startswith("$ "):
                    break
                told.append(after)
            if not LONG.search(line):
                found.append((re.sub(r"\s+#.*", "", line.removeprefix("$ ")), "\n".join(told)))
    return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    root = tmp_path_factory.mktemp("clone") / "polyaudio"
    for name in project_files():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    return root


def surroundings(clone) -> dict:
    """`python` is the one that runs this."""
    folder = clone.parent / "bin"
    folder.mkdir(exist_ok=True)
    if not (folder / "python").exists():
        (folder / "python").symlink_to(sys.executable)
    home = os.path.dirname(sys.executable)
    return {**os.environ, "PATH": f"{home}:{folder}:{os.environ['PATH']}", "NO_COLOR": "1"}


@pytest.mark.parametrize("command, told", commands(), ids=lambda text: text[:60])
def test_a_command_of_the_readme(command, told, clone):
    if "--serve" in command:
        return serve(command, clone)
    done = subprocess.run(
        command, shell=True, cwd=clone, env=surroundings(clone), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or "sample.py" not in command
    if told:
        assert done.stdout.strip() == told.strip()


def serve(command, clone):
    """It answers, and Ctrl-C ends it. At another port: that of the README may be taken here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = re.sub(r"--serve \d+", f"--serve {port}", command)
    here = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # not by way of a proxy
    server = subprocess.Popen(
        shlex.split(command), cwd=clone, env=surroundings(clone), stderr=subprocess.DEVNULL
    )
    try:
        health = None
        for _ in range(600):
            with contextlib.suppress(OSError):
                health = json.load(here.open(f"http://127.0.0.1:{port}/health"))
                break
            time.sleep(0.1)
        assert health, "nobody answered in a minute"
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=30) == 130


@pytest.mark.parametrize("code", [block for language, block in BLOCKS if language == "python"])
def test_the_python_of_the_readme(code, clone):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, env=surroundings(clone), capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_there_are_commands_and_the_long_ones_say_so():
    found = [command for command, _ in commands()]
    assert len(found) >= 4
    assert not any(re.search("pip install|torchrun|pytest", command) for command in found)


def test_it_is_short():
    assert README.count("\n") < 250


def test_what_it_names_exists():
    """Files, and the flags of our scripts."""
    helps = {}
    for script in ("prepare", "synth", "model", "train", "sample", "judge"):
        helps[script] = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    for name in set(re.findall(r"`((?:kernels/|tests/)?\w+\.(?:py|txt|md))`", README)):
        assert any((ROOT / folder / name).exists() for folder in ("", "kernels")), name
    program = "".join(helps.values()) + (ROOT / "tests" / "bench.py").read_text(encoding="utf-8")
    prose = re.sub("(?ms)^```.*?^```$|`--interleave.*?`", "", README)  # that one is vLLM's
    for flag in re.findall(r"(?<=[ `])--([a-z-]+)", prose):
        assert f'"--{flag}"' in program or f"    {flag.replace('-', '_')}: " in program, flag
    for _, block in BLOCKS:
        for line in block.splitlines():
            if match := re.search(r"\b(prepare|synth|train|sample|judge)\.py\b([^#;]*)", line):
                for flag in re.findall(r"(?<!\S)--([a-z-]+)", match[2]):
                    field = f"    {flag.replace('-', '_')}: "  # of a recipe, whose fields are flags
                    text = helps[match[1]] + helps["model"] * (match[1] in ("sample", "judge"))
                    assert f'"--{flag}"' in text or field in text, f"{match[1]}.py --{flag}"
