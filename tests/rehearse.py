"""A rehearsal of the README's real path, on random weights of Audio Flamingo 3's own size: every
command that a user of the real checkpoint will type, how long it takes, and how much memory.

    python -m tests.rehearse                         8.3 billion parameters: 42 GB of disk
    python -m tests.rehearse --scale 0.01            a hundredth of them: a minute on one core
    python -m tests.rehearse --folder /data --keep   where it all lies, and it stays there

    make      the weights, shard by shard, as the Hub has them      (this file's own)
    download  prepare.py weights, from a small server in here
    check     prepare.py weights --check
    sample    sample.py, one question on five clips
    toy       synth.py, questions to learn from and to judge by
    train     train.py under torchrun, stopped by SIGTERM after about half of the steps
    resume    the same with --resume, to the end
    merge     train.py --merge
    judge     judge.py on what was merged

It takes a GPU where there is one (two ranks where there are two), else the CPU, where the full size
took 17 minutes, in two parts, on one busy core. After each command its exit code and what it left
are checked; the first that fails ends the rehearsal with exit code 1 and a line. `GB` is the most
that one of a command's processes held, mapped files included; `GPU GB` is torch's own peak, where
the command tells it. At most two copies of the weights lie on the disk at a time: the server's goes
when it has come.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

import prepare  # noqa: E402
from model import Config, PolyAudio, batches, canonical, hub_name, write_tensors  # noqa: E402
from prepare import (  # noqa: E402
    INDEX, BadInput, expect, open_tensors, read_json, shard_files, write_json,
)  # fmt: skip
from train import SPECIAL  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ID, COMMIT = "somebody/audio-flamingo-3-by-chance", "0" * 40
WORDS = 1000  # tokens of the tokenizer; the other rows of the vocabulary belong to none
SHARD = 5e9  # bytes of a file at full size
QUESTION = "What is in each clip, and how do they differ?"
EXAMPLES = {"cuda": 32, "cpu": 1}  # of a step
STEPS = {"cuda": 20, "cpu": 4}

# ------------------------------------------------------------------------------------------------
# The weights. Widths, layers and what lies between grow with the cube root of the scale, the
# vocabulary with its square, so that everything grows with the scale.


def config_of(scale) -> dict:
    def part(number, power=1, step=1):
        return max(1, round(number * scale ** (power / 3) / step)) * step

    kv_heads, heads = part(4), part(20)
    return {
        "architectures": ["AudioFlamingo3ForConditionalGeneration"], "dtype": "bfloat16",
        "model_type": "audioflamingo3", "projector_hidden_act": "gelu", "projector_bias": True,
        "audio_config": {
            "model_type": "audioflamingo3_encoder", "hidden_size": 64 * heads,
            "num_hidden_layers": part(32), "num_attention_heads": heads,
            "intermediate_size": 256 * heads, "num_mel_bins": 128, "max_source_positions": 1500,
        },
        "text_config": {
            "model_type": "qwen2", "hidden_size": 896 * kv_heads, "num_hidden_layers": part(28),
            "num_attention_heads": 7 * kv_heads, "num_key_value_heads": kv_heads,
            "intermediate_size": part(18944, step=8), "vocab_size": max(WORDS, part(152064, 2)),
            "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "tie_word_embeddings": False,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        },
    }  # fmt: skip


def parameters_of(config) -> dict:
    """Name in the files: a tensor of that shape that holds nothing."""
    with torch.device("meta"):
        net = PolyAudio(Config.from_dict(config))
    return {hub_name(name, False): p for name, p in net.named_parameters()}


def by_chance(name, shape, device):
    """bf16: matrices that keep the size of what they are given, biases and norms not quite idle."""
    x = torch.randn(shape, dtype=torch.bfloat16, device=device)
    if "embed" in name:
        x *= 0.35
    elif x.ndim == 1:
        x *= 0.1
        x += name.endswith("norm.weight")
    else:
        x /= x[0].numel() ** 0.5
    return x.cpu()


def make(dir, scale):
    """A folder as the Hub has it, and beside it the Hub's list of its files."""
    torch.manual_seed(0)
    prepare.train_bpe([Path(prepare.__file__).read_text()], WORDS, SPECIAL, dir)
    ids = prepare.Tokenizer.from_dir(dir).special
    config = {**config_of(scale), "audio_token_id": ids["<sound>"]}
    write_json(dir / "config.json", config)
    write_json(dir / "generation_config.json", {"eos_token_id": ids["<|im_end|>"]})
    table, index = parameters_of(config), {}
    names, sizes, on = list(table), [p.numel() * 2 for p in table.values()], device()
    parts = list(batches(sizes, SHARD * scale))
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-{len(parts):05}.safetensors"
        write_tensors(dir / file, {n: by_chance(n, table[n].shape, on) for n in names[part]})
        index |= dict.fromkeys(names[part], file)
    write_json(dir / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": index})
    with ThreadPoolExecutor() as pool:
        listed = list(pool.map(listing, sorted(dir.iterdir())))
    write_json(dir.parent / "listing.json", {"sha": COMMIT, "siblings": listed})


def listing(path) -> dict:
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"rfilename": path.name, "size": size, "lfs": {"sha256": digest, "size": size}}


# ------------------------------------------------------------------------------------------------
# The server.


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as `prepare.py weights` asks for, Range included."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *about):
        pass

    def do_GET(self):
        name, home = self.path.split("/")[-1], self.server.home
        path = {
            f"/api/models/{ID}/revision/main?blobs=true": home / "listing.json",
            f"/{ID}/resolve/{COMMIT}/{name}": home / "hub" / name,
        }.get(self.path)
        if path is None or not path.is_file():
            return self.send_error(404)
        size = path.stat().st_size
        start = int(re.findall(r"\d+", self.headers.get("Range", "0"))[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        with open(path, "rb") as file:
            self.connection.sendfile(file, start)


@contextmanager
def serving(home):
    """-> its address"""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.home, server.daemon_threads = home, True
    server.handle_error = lambda *about: None  # who asked has left; it says so itself
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


# ------------------------------------------------------------------------------------------------
# The stages: what is run, and what has to be there afterwards. Each check gives back what it found.


class Place(NamedTuple):
    home: Path
    scale: float
    steps: int
    url: str = ""

    def said(self, file) -> str:
        return (self.home / file).read_text(errors="replace").strip()


class Stage(NamedTuple):
    words: tuple  # behind `python`
    check: object  # of a place, -> what was found
    stops: object = None  # of a place: whether it is time to ask it to stop


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def stages(place) -> dict[str, Stage]:
    home, on = place.home, ("--device", device())
    hub, base, toy, run, merged = (home / n for n in ("hub", "base", "toy", "run", "merged"))
    ranks = min(2, torch.cuda.device_count()) if device() == "cuda" else 1
    rehearse = ("-m", "tests.rehearse", "--make", hub, "--scale", place.scale)
    clips = sorted((ROOT / "clips").glob("*.flac"))[:5]
    learn = (
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "train.py",
        "--recipe", "polyaudio", "--base", base, "--data", toy / "train.jsonl", "--dev", "",
        "--out", run, "--steps", place.steps, "--batch", EXAMPLES[device()], "--lr", 1e-3,
        "--every", max(1, place.steps // 4), "--dtype", "bf16", *on,
    )  # fmt: skip
    return {
        "make": Stage(rehearse, made),
        "download": Stage(("prepare.py", "weights", ID, "--endpoint", place.url, "--out", base),
                          downloaded),
        "check": Stage(("prepare.py", "weights", "--check", base), checked),
        "sample": Stage(("sample.py", "--weights", base, "--clips", *clips, "--ask", QUESTION,
                         "--max-new-tokens", 16, "--json", "--dtype", "bf16", *on), sampled),
        "toy": Stage(("synth.py", "--out", toy, "--clips", 120, "--train", 200, "--bench", 20),
                     asked),
        "train": Stage(learn, stopped, lambda place: step_of(place) >= place.steps // 2),
        "resume": Stage((*learn, "--resume"), resumed),
        "merge": Stage(("train.py", "--merge", run, "--out", merged), merges),
        "judge": Stage(("judge.py", "--weights", merged, "--bench", toy / "bench.jsonl", "--items",
                        5, "--name", "x", "--out", home / "reports", "--dtype", "bf16", *on),
                       judged),
    }  # fmt: skip


def bytes_of(scale) -> int:
    return sum(2 * p.numel() for p in parameters_of(config_of(scale)).values())


def check_size(place, dir):
    """Two bytes a parameter, and the headers."""
    size, least = sum(file.stat().st_size for file in shard_files(dir)), bytes_of(place.scale)
    expect(least < size < 1.01 * least, dir, f"{least} bytes of weights and a little", size)


def made(place):
    check_size(place, place.home / "hub")
    return f"{bytes_of(place.scale) / 2e9:.3f} billion parameters"


def downloaded(place):
    hub, base = ({path.name: path.stat().st_size for path in (place.home / name).iterdir()}
                 for name in ("hub", "base"))  # fmt: skip
    expect(base.pop("download.json", None) and base == hub, "files", hub, base)
    shutil.rmtree(place.home / "hub")
    return f"{sum(base.values()) / 1e9:.2f} GB in {len(base)} files"


def checked(place):
    said = place.said("check.out")
    expect(re.search(r"no faults \(\d+ files as downloaded\)$", said), "it says", "no faults", said)
    return "no faults"


def sampled(place):
    report = json.loads(place.said("sample.out"))
    slots, tokens = [clip["slots"] for clip in report["clips"]], report["tokens"]
    expect(len(slots) == 5 and all(slots) and tokens, "answer", "five clips, heard", report)
    return f"{len(slots)} clips, {sum(slots)} slots, {tokens} tokens"


def asked(place):
    files = (place.home / "toy" / name for name in ("train.jsonl", "bench.jsonl"))
    train, bench = (len(path.read_text().splitlines()) for path in files)
    expect(train == 200 and bench >= 20, "rows", "200 to learn and 20 to judge", (train, bench))
    return f"{train} rows and {bench}"


def step_of(place) -> int:
    """That of the last checkpoint."""
    files = (place.home / "run").glob("state-*.json")
    return max((int(path.stem.split("-")[1]) for path in files), default=0)


def stopped(place):
    step, last = step_of(place), place.steps
    expect(last // 2 <= step < last, "checkpoint", f"one of step {last // 2} to {last - 1}", step)
    return f"stopped at step {step} of {last}"


def resumed(place):
    before = int(re.search(r"steps: \d+, from (\d+)", place.said("resume.err"))[1])
    lines = [json.loads(line) for line in (place.home / "run/log.jsonl").read_text().splitlines()]
    steps, losses = ([line[name] for line in lines] for name in ("step", "loss"))
    whole = steps == sorted({*steps, before, place.steps}) and step_of(place) == place.steps
    expect(whole, "log.jsonl", f"{before} and {place.steps} among steps that rise", steps)
    expect(None not in losses, "log.jsonl", "losses that are numbers", losses)
    return f"step {before} to {steps[-1]}, loss {losses[-1]:.2f}"


def tensors_of(dir) -> dict:
    """Our name of each tensor: the file that it is in, and its key there."""
    found = {}
    for path in shard_files(dir):
        with open_tensors(path) as file:
            found |= {canonical(key): (path, key) for key in file.keys()}
    return found


def first_rows(path, key):
    """As many as have a token. The file is opened anew, so that what was read is let go again."""
    with open_tensors(path) as file:
        return file.get_slice(key)[:WORDS]


def merges(place):
    """Where there is an adapter the weights are others, and everywhere else the same."""
    check_size(place, place.home / "merged")
    old, new = (tensors_of(place.home / name) for name in ("base", "merged"))
    expect(old.keys() == new.keys(), "merged", "the tensors of the base", old.keys() ^ new.keys())
    changed = {
        name for name in old if not torch.equal(first_rows(*old[name]), first_rows(*new[name]))
    }
    with open_tensors(place.home / "run/adapter_model.safetensors") as file:
        found = [re.sub(r"^base_model\.model\.|\.(lora_|token_adapter).*", "", key)
                 for key in file.keys()]  # fmt: skip
    adapted = {canonical(f"{name}.weight") for name in found}
    expect(adapted, "run", "an adapter", "none")
    other = sorted(changed ^ adapted)
    expect(not other, "merged", "changes where adapters are and nowhere else", f"{other[:3]} ...")
    return f"{len(changed)} of {len(old)} tensors are others"


def judged(place):
    items = read_json(place.home / "reports/x.json")["items"]
    said = [item for item in items if item["answer"] is not None]
    expect(len(items) == len(said) == 5, "report", "5 items with answers", len(said))
    return f"{len(said)} items answered"


# ------------------------------------------------------------------------------------------------
# Running them.


def timed(place, name, stage):
    """-> exit code, seconds, and the most memory, in bytes, that one of its processes held"""
    environment = {**os.environ, "NO_PROXY": "*", "no_proxy": "*"}
    environment.pop("HF_TOKEN", None)
    words, stops, start = [sys.executable, *map(str, stage.words)], stage.stops, time.monotonic()
    with open(place.home / f"{name}.out", "w") as out, open(place.home / f"{name}.err", "w") as err:
        child = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=out, stderr=err)
    pid = 0
    try:
        while not pid:
            pid, status, used = os.wait4(child.pid, os.WNOHANG)
            if not pid and stops and stops(place):
                os.kill(child.pid, signal.SIGTERM)
                stops = None
            time.sleep(0 if pid else 0.05)
    finally:
        if not pid:
            os.kill(child.pid, signal.SIGTERM)
            os.waitpid(child.pid, 0)
        child.returncode = 0  # it has been waited for
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return os.waitstatus_to_exitcode(status), time.monotonic() - start, peak


def last_words(said) -> str:
    """The line that tells what went wrong: torchrun has more to say after it."""
    lines = said.splitlines() or ["not a word"]
    told = r"\w+\.py: |(\[rank\d+\]: ?)?[\w.]+Error: ."
    return next((line for line in reversed(lines) if re.match(told, line)), lines[-1])


def on_gpu(place, name) -> str:
    log = place.home / "run/log.jsonl"
    if device() == "cpu" or name not in ("train", "resume") or not log.exists():
        return "-"
    return f"{max(json.loads(line)['memory_gb'] for line in log.read_text().splitlines()):.1f}"


def rehearse(place, table):
    """Stage after stage, a line of the table each; BadInput names what is not as it should be."""
    print(f"{'stage':<10}{'seconds':>8}{'GB':>8}{'GPU GB':>8}  {'found':<36}command")
    for name, stage in table.items():
        code, seconds, peak = timed(place, name, stage)
        last = last_words(place.said(f"{name}.err"))
        fine = code != 0 if stage.stops else code == 0
        expect(fine, name, "to be stopped" if stage.stops else "exit code 0", f"{code}: {last}")
        try:
            found = stage.check(place)
        except (OSError, LookupError, ValueError) as error:
            raise BadInput(f"{name}: {error!r}; {last}") from None
        except BadInput as mistake:
            raise BadInput(f"{name}: {mistake}") from None
        command = shlex.join(["python", *map(str, stage.words)])
        command = command.replace(f"{place.home}/", "").replace(f"{ROOT}/", "")
        print(f"{name:<10}{seconds:>8.1f}{peak / 1e9:>8.2f}{on_gpu(place, name):>8}  {found:<36}"
              f"{command}", flush=True)  # fmt: skip


def main():
    parser = prepare.Parser(prog="python -m tests.rehearse", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--scale", type=float, default=1.0, metavar="S", help="of the parameters, default: 1")
    add("--folder", type=Path, default=ROOT / "data", help="where it all lies, default: data/")
    add("--steps", type=int, metavar="N", help="of training; default: 20, on a CPU 4")
    add("--keep", action="store_true", help="and leave it there")
    add("--make", type=Path, help=argparse.SUPPRESS)  # for the first stage
    args = parser.parse_args()
    expect(0 < args.scale <= 1, "--scale", "a number above 0, 1 at most", args.scale)
    if args.make:
        return make(args.make, args.scale)
    steps = STEPS[device()] if args.steps is None else args.steps
    expect(steps >= 4, "--steps", "4 or more, to be stopped in between", steps)
    args.folder.mkdir(parents=True, exist_ok=True)
    room = 2.5 * bytes_of(args.scale) + 2e8  # two copies, and a run's checkpoints
    prepare.check_space(args.folder, room)
    signal.signal(signal.SIGTERM, lambda *about: sys.exit(143))  # and what was made goes
    subprocess._USE_VFORK = False  # else the peak of a command would begin at that of this process
    home = Path(tempfile.mkdtemp(prefix="rehearsal-", dir=args.folder)).resolve()
    try:
        with serving(home) as url:
            place = Place(home, args.scale, steps, url)
            rehearse(place, stages(place))
    except BadInput as mistake:
        prepare.fail(mistake)
        sys.exit(1)
    finally:
        if args.keep:
            print(f"kept: {home}")
        else:
            shutil.rmtree(home)


if __name__ == "__main__":
    prepare.cli(main)
