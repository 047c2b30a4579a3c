"""The hot loops of model.py, one file an op, each beside its plain PyTorch meaning.

Every op has a public face that checks its arguments and runs one of its implementations; the
plain one is called <name>_ref and says in a few lines what the op means. Which kind runs is
decided once per process: POLYAUDIO_KERNELS if it is set, else the default for the machine. An op
that has no implementation of the chosen kind runs its reference.

    import kernels
    print(kernels.chosen())            # "cpu"
    with kernels.forced("ref"):        # the plain meaning of every op, for comparing
        ...
"""

import contextlib
import os

KINDS = ("ref", "cpu")  # plain PyTorch; oneDNN's own operators where torch's default is slower
DEFAULT = "cpu"  # each fast path looks at its tensors' device itself, so this is safe on a GPU

_choice = []


def chosen() -> str:
    """The kind that runs, decided at the first call."""
    if not _choice:
        kind = os.environ.get("POLYAUDIO_KERNELS", DEFAULT)
        if kind not in KINDS:
            raise ValueError(f"POLYAUDIO_KERNELS: expected {' or '.join(KINDS)}, found {kind!r}")
        _choice.append(kind)
    return _choice[-1]


@contextlib.contextmanager
def forced(kind: str):
    """Run everything inside with that kind."""
    if kind not in KINDS:
        raise ValueError(f"kernels.forced: expected {' or '.join(KINDS)}, found {kind!r}")
    _choice.append(kind)
    try:
        yield
    finally:
        _choice.pop()


# The choice stands above the imports, because the files imported here ask for it.
from .attention import attention, attention_ref  # noqa: E402
from .linear import linear, linear_ref, repack  # noqa: E402

__all__ = ["attention", "attention_ref", "chosen", "forced", "linear", "linear_ref", "repack"]
