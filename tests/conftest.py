"""What every test shares: the environment that must be set before torch and triton are imported,
the marker `slow`, and small checkpoints made by transformers (tests/checkpoints.py)."""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not burn a shared core
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"  # an oracle is a library here, never a download

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # kernels run on the CPU, read at triton's import

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # begun by a shell in the background:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # our programs would never hear it
    config.addinivalue_line("markers", "slow: takes minutes; run with -m 'slow or not slow'")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"
