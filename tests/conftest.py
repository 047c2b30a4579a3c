"""What every test shares: the environment that must be set before torch and triton are imported,
the markers `long` and `slow`, and small checkpoints made by transformers (tests/checkpoints.py)."""

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
    if not config.option.markexpr:
        config.option.markexpr = "not slow and not long"


def pytest_cmdline_main(config):
    """Plain `pytest`, all of it: each core takes one file after the other, the longest first, and
    shows what came of it. Few tests gain from a second core, and some wait for a server."""
    ranks = min(cores(), 4)
    if config.args_source is config.ArgsSource.ARGS or ranks == 1 or config.option.collectonly:
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
    return max((code for code in codes if code != pytest.ExitCode.NO_TESTS_COLLECTED), default=0)
