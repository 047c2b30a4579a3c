"""What every test shares: the environment that must be set before torch and triton are imported,
the markers `long` and `slow`, and small checkpoints made by transformers (tests/checkpoints.py)."""

import fnmatch
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not burn a shared core
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"  # an oracle is a library here, never a download

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # kernels run on the CPU, read at triton's import

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from prepare import cores  # noqa: E402


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # begun by a shell in the background:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # our programs would never hear it
    config.addinivalue_line("markers", "long: takes five seconds; -m 'not slow' runs it, too")
    config.addinivalue_line("markers", "slow: takes minutes; run with -m 'slow or not slow'")
    named = any("::" in word for word in config.args)  # whoever names a test wants it run
    if not config.option.markexpr and not named:
        config.option.markexpr = "not slow and not long"


def pytest_cmdline_main(config):
    """Plain `pytest`, all of it: each core takes one file after the other, the longest first, and
    shows what came of it. Few tests gain from a second core, and some wait for a server."""
    ranks, asked = min(cores(), 4), config.option
    one = asked.collectonly or asked.help or asked.maxfail or asked.xmlpath  # for one process
    if config.args_source is config.ArgsSource.ARGS or ranks == 1 or one:
        return None
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: -path.stat().st_size)
    words = [sys.executable, "-m", "pytest", *config.invocation_params.args]

    def run(path):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        found = subprocess.run([*words, path], cwd=ROOT, env=env, capture_output=True, text=True)
        print(f"{path.name}\n{found.stdout}{found.stderr}", flush=True)
        return found.returncode

    with ThreadPoolExecutor(ranks) as pool:
        codes = list(pool.map(run, files))
    return of_all(codes)


def of_all(codes) -> int:
    """Of processes that each ran a file. One that was killed has a code below 0."""
    fine = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    return int(any(code not in fine for code in codes))


def listed_by_git(root, *words) -> list[str] | None:
    """None where there is no git, or no checkout."""
    try:
        run = subprocess.run(["git", "ls-files", *words], cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.splitlines() if run.returncode == 0 else None


def project_files(root=ROOT) -> list[str]:
    """What belongs to the project, tracked or not yet; without git, all that .gitignore lets be."""
    found = listed_by_git(root, "-co", "--exclude-standard")
    if not found:  # or the repository around it leaves it out
        rules = (root / ".gitignore").read_text().split()
        anywhere = [rule.rstrip("/") for rule in rules if rule[0] not in "/!"] + [".git"]
        here = [rule.strip("/") for rule in rules if rule[0] == "/"]
        kept = [rule.strip("!/") for rule in rules if rule[0] == "!"]

        def lets_be(path):
            parts = path.relative_to(root).parts
            if any(fnmatch.fnmatch(part, rule) for part in parts for rule in anywhere):
                return False
            folders = ["/".join(parts[: i + 1]) for i in range(len(parts))]
            left = any(fnmatch.fnmatch(folder, rule) for folder in folders for rule in here)
            return not left or any(folder in kept for folder in folders)

        found = [str(p.relative_to(root)) for p in sorted(root.rglob("*")) if lets_be(p)]
    return [name for name in found if (root / name).is_file()]
