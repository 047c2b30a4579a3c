"""Whatever may befall a run: it is killed at any moment, the disk is full, the folder may not be
written, nobody answers, a second one comes along, files are many or strangely named. It goes on or
says so in a line, and what comes out in the end is what an undisturbed run gives, byte for byte.

    python -m tests.faults                     # 200 kills and everything else, some minutes
    python -m tests.faults --kills 1000 killed # one of them, longer
    python -m tests.faults full readonly names

A command runs in a process forked from this one, which has imported everything before: so a kill
hits its work, and not the seconds that it takes to import torch. All else is as on a terminal: its
own session, its own arguments, its exit code, stdout and stderr in files. The four commands are
`prepare.py weights` from a server here, `synth.py` with a world of its own, `train.py` and
`judge.py` on a small random checkpoint.
"""

import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["NO_PROXY"] = "*"

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402

import judge  # noqa: E402
import prepare  # noqa: E402
import sample  # noqa: E402
import synth  # noqa: E402
import train  # noqa: E402
from model import Config, PolyAudio  # noqa: E402
from prepare import expect  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
MEMORY_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
PATIENCE = 120  # seconds, and a command hangs

# ------------------------------------------------------------------------------------------------
# A command in a process of its own.


class Run:
    """Begun when it is made; `before` happens in the new process, before anything else."""

    alive: set = set()  # those that whoever leaves has to end

    def __init__(self, script, *words, before=lambda: None):
        self.words = [f"{script.__name__}.py", *map(str, words)]
        self.pipe, theirs = os.pipe()  # a file would be full when the disk is
        self.said = b""
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.dup2(theirs, 2)
                code = self.act(script, before)
            finally:
                os._exit(code)
        os.close(theirs)
        os.set_blocking(self.pipe, False)
        self.alive.add(self)

    def act(self, script, before) -> int:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))
        torch.set_num_threads(1)
        prepare.PAUSE, sys.argv = 0.01, self.words
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            before()
            prepare.cli(script.main)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        return code

    def end(self, patience=None) -> int:
        """Its exit code, or the signal that ended it, below 0."""
        limit, pid = time.monotonic() + (patience or PATIENCE), 0
        while not pid:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if not pid and time.monotonic() > limit:
                self.kill(whole=True)
            with contextlib.suppress(BlockingIOError):
                self.said += os.read(self.pipe, 1 << 20)
            time.sleep(0 if pid else 0.002)
        os.close(self.pipe)
        self.alive.discard(self)
        return os.waitstatus_to_exitcode(status)

    def kill(self, whole=False):
        """kill -9 of the process, or of all that it has started too."""
        if whole:
            with contextlib.suppress(ProcessLookupError):  # it has not come to be a group yet
                os.killpg(self.pid, signal.SIGKILL)
        os.kill(self.pid, signal.SIGKILL)  # or what is left of it

    def fault(self, *codes) -> str:
        """What is wrong with its end: another code than these, a traceback, a 2 without a line."""
        code, err = self.end(), self.said.decode(errors="replace")
        last = err.strip().rpartition("\n")[2]
        told = code != 2 or last.startswith(f"{self.words[0]}: ")
        if code in codes and "Traceback" not in err and told:
            return ""
        return f"{' '.join(self.words):.200}: ended with {code}: {last or 'not a word'}"


def forked(script, *words, **env) -> subprocess.CompletedProcess:
    """As subprocess.run of a script by its name, without the seconds that its imports take."""
    with tempfile.TemporaryFile("w+") as out:

        def before():
            os.dup2(out.fileno(), 1)
            os.chdir(ROOT)
            os.environ.update(env)

        run = Run(importlib.import_module(script.removesuffix(".py")), *words, before=before)
        code = run.end(3 * PATIENCE)  # no hang is looked for, and a test's machine may be busy
        out.seek(0)
        told = out.read(), run.said.decode(errors="replace")
        return subprocess.CompletedProcess(run.words, code, *told)


# ------------------------------------------------------------------------------------------------
# What they work on: a server with a repository, a small checkpoint, clips and questions on them.

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<sound>", "[BOA]", "[EOA]"]
SAID = ["Which clip is the louder one of them all?", "audio 1: rain. The answer is: audio 2.\n"]
REPOSITORY, COMMIT = "somebody/small", "0" * 40


class Server(BaseHTTPRequestHandler):
    """A repository, at a speed at which a kill can come in the middle of a file."""

    protocol_version = "HTTP/1.1"
    files: dict = {}

    def log_message(self, *args):
        pass

    def do_GET(self):
        data = self.files.get(self.path.split("?")[0], b"")
        start = int(re.findall(r"\d+", self.headers.get("Range", "0"))[0])
        self.send_response(206 if start else 200 if data else 404)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        for place in range(start, len(data), 1 << 16):
            self.wfile.write(data[place : place + (1 << 16)])
            time.sleep(0.003)


def serve(files: dict) -> tuple[str, int]:
    """A server of these, in a process that ends with this one. -> its address and process"""
    listing = [{"rfilename": name, "size": len(data), "blobId": "0" * 40,
                "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}}
               for name, data in files.items()]  # fmt: skip
    body = json.dumps({"sha": COMMIT, "siblings": listing}).encode()
    Server.files = {f"/api/models/{REPOSITORY}/revision/main": body}
    for name, data in files.items():
        Server.files[f"/{REPOSITORY}/resolve/{COMMIT}/{name}"] = data
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.handle_error = lambda *about: None  # who asked was killed
    parent, child = os.getpid(), os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(0)
    server.socket.close()
    return f"http://127.0.0.1:{server.server_address[1]}", child


def make_checkpoint(dir):
    torch.manual_seed(0)
    prepare.train_bpe(SAID, 300, SPECIALS, dir)
    ids = prepare.Tokenizer.from_dir(dir).special
    text = {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
    }  # fmt: skip
    audio = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
             "hidden_size": 16}  # fmt: skip
    net = PolyAudio(
        Config.from_dict(
            {
                "model_type": "audioflamingo3",
                "text_config": text,
                "audio_config": audio,
                "audio_token_id": ids["<sound>"],
            }
        )
    )
    net.save(dir)
    prepare.write_json(dir / "generation_config.json", {"eos_token_id": ids["<|im_end|>"]})
    PolyAudio.from_dir(dir)  # what torch imports when it is first asked to do so, every
    torch.optim.AdamW(net.parameters())  # process would import anew


def make_rows(names, count) -> list[dict]:
    dice, rows = random.Random(0), []
    for i in range(count):
        chosen = dice.sample(names, dice.randint(2, 3))
        right = dice.randint(1, len(chosen))
        rows.append({
            "id": f"row-{i}", "task": ("loudest", "odd")[i % 2], "skill": "comparison",
            "clips": chosen, "question": "Which clip is the louder one?",
            "answer": f"The answer is: audio {right}.", "gold": {"type": "clip", "value": right},
            "source": "noise", "licences": ["CC0-1.0"], "meta": {},
        })  # fmt: skip
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_home(home) -> str:
    """All of it. -> the server's address"""
    dice = np.random.default_rng(0)
    names = [f"{i}.wav" for i in range(6)]
    for i, name in enumerate(names):
        soundfile.write(home / name, 0.1 * dice.standard_normal(4000 + 800 * i), 16000)
    write_rows(home / "rows.jsonl", make_rows(names, 16))
    make_checkpoint(home / "base")
    tensors = {name: torch.from_numpy(dice.standard_normal(100_000)) for name in "ab"}
    train.write_tensors(home / "big.safetensors", tensors)
    return serve({"model.safetensors": (home / "big.safetensors").read_bytes(),
                  "config.json": b"{}", "tokenizer.json": b"[]" * 40_000})  # fmt: skip


# ------------------------------------------------------------------------------------------------
# The four commands, and what of their results is promised.


class Job(NamedTuple):
    script: object
    words: Callable  # folder -> arguments
    kept: str  # of the files there, those that are the same whatever happened

    def begin(self, out, **how) -> Run:
        return Run(self.script, *self.words(out), **how)

    def result(self, out) -> dict:
        files = (path for path in sorted(out.rglob("*")) if path.is_file())
        found = {str(path.relative_to(out)): path.read_bytes() for path in files}
        found = {name: data for name, data in found.items() if re.fullmatch(self.kept, name)}
        return {name: as_promised(name, data) for name, data in found.items()}


def as_promised(name, data):
    """Of a log the steps and losses, for time is never the same; else the bytes."""
    if not name.endswith("log.jsonl"):
        return data
    lines = map(json.loads, data.splitlines())
    return [(line["step"], line["loss"], line["lr"]) for line in lines]


def jobs(home, url) -> dict[str, Job]:
    rows, base = home / "rows.jsonl", home / "base"
    return {
        "download": Job(prepare, lambda out: ("weights", REPOSITORY, "--endpoint", url,
                                              "--out", out), r".*"),
        "synth": Job(synth, lambda out: (
            "--out", out, "--clips", 60, "--train", 300, "--bench", 10, "--split", "dev",
            "--seed", 3, "--workers", 2), r".*(jsonl|flac|json|part)"),
        "train": Job(train, lambda out: (
            "--recipe", "polyaudio", "--base", base, "--data", rows, "--dev", "", "--out", out,
            "--rank", 2, "--steps", 12, "--batch", 2, "--tokens", 200, "--lr", 1e-3, "--every", 1,
            "--workers", 2, "--device", "cpu", "--resume"), r"adapter.*|state.*tensors|log.jsonl"),
        "judge": Job(judge, lambda out: (
            "--weights", base, "--bench", rows, "--out", out, "--name", "x", "--text-only",
            "--permute", "--device", "cpu", "--dtype", "f32"), r"x\.(json|html)|.*part"),
    }  # fmt: skip


class Bed(NamedTuple):
    """Where everything happens: the folder, the server's address, the commands, the dice, and of
    each command what an undisturbed run gives, where that lies, and how many seconds it takes."""

    home: Path
    url: str
    jobs: dict
    dice: random.Random
    whole: dict
    made: dict
    seconds: dict

    def fresh(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.home)) / "out"


def undisturbed(home, url, seed) -> Bed:
    bed = Bed(home, url, jobs(home, url), random.Random(seed), {}, {}, {})
    for name, job in bed.jobs.items():
        out, start = bed.fresh(), time.monotonic()
        fault = job.begin(out).fault(0)
        expect(not fault, name, "a run without a fault", fault)
        bed.whole[name], bed.made[name] = job.result(out), out
        bed.seconds[name] = time.monotonic() - start
        expect(bed.whole[name], name, "a result", "none")
    return bed


def ends_well(bed, name, out) -> str:
    """The same command again, undisturbed. -> what is wrong with what then lies there"""
    fault = bed.jobs[name].begin(out).fault(0)
    if fault:
        return fault
    found, whole = bed.jobs[name].result(out), bed.whole[name]
    other = sorted(file for file in {*found, *whole} if found.get(file) != whole.get(file))
    return f"{name}: not what an undisturbed run gives: {', '.join(other[:5])} in {out}" * bool(
        other
    )


# ------------------------------------------------------------------------------------------------
# The faults. Each is a function from (bed, how many kills) to (times, what went wrong).


def kill(bed, name, kills) -> tuple[int, list]:
    """Of one command, until it was hit so often."""
    done, wrong = 0, []
    while done < kills:
        out = bed.fresh()
        for _ in range(min(bed.dice.randint(1, 8), kills - done)):
            run = bed.jobs[name].begin(out)
            time.sleep(bed.dice.uniform(0, bed.seconds[name]))
            run.kill(whole=bed.dice.random() < 0.5)
            code = run.end()
            done += code == -signal.SIGKILL
            if code != -signal.SIGKILL:  # it was over before, which is well too
                wrong += [f"{name}: ended with {code}: {run.said[-200:]}"] * (code != 0)
                break
        wrong += filter(None, [ends_well(bed, name, out)])
        shutil.rmtree(out.parent)
    return done, wrong


def killed(bed, kills):
    """kill -9 at any moment, several times in one folder, then to the end."""
    each = -(-kills // len(bed.jobs))
    found = [kill(bed, name, each) for name in bed.jobs]
    return sum(done for done, _ in found), sum((wrong for _, wrong in found), [])


def small_files(size):
    """No file grows further than that, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def full(bed, kills):
    """A limit to every file, then a disk of its own that is too small, where we may mount one."""
    wrong, times = [], 0
    for name, job in bed.jobs.items():
        sizes = [len(data) for data in bed.whole[name].values() if isinstance(data, bytes)]
        for share in (0.0, 0.6):
            out = bed.fresh()
            run = job.begin(out, before=partial(small_files, int(share * max(sizes))))
            wrong += filter(None, [run.fault(2), ends_well(bed, name, out)])
            times += 1
        found = on_small_disk(bed, name, sum(sizes) // 2)
        times += found is not None
        wrong += found or []
    return times, wrong


@contextlib.contextmanager
def disk_of_its_own(bed, size):
    """A folder on one, and a function to mount it otherwise; (None, None) where we may not."""
    folder = bed.fresh().parent
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
    if os.getuid() or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        yield None, None
        return
    try:
        again = ["mount", "-o"]
        yield folder, lambda how: subprocess.run([*again, f"remount,{how}", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


def on_small_disk(bed, name, size) -> list | None:
    """None: not here."""
    with disk_of_its_own(bed, size) as (disk, change):
        if disk is None:
            return None
        first = bed.jobs[name].begin(disk / "out").fault(2)
        change("size=256m")
        return list(filter(None, [first, ends_well(bed, name, disk / "out")]))


def readonly(bed, kills):
    """A folder that may not be written, new or with a result in it. (Root may write everywhere but
    on a disk mounted so: where it may not mount one, there is nothing to see.)"""
    wrong = []
    for job in bed.jobs.values():
        with disk_of_its_own(bed, 1 << 20) as (disk, change):
            if disk is None and os.getuid() == 0:
                continue
            folder = disk or bed.fresh().parent
            change = change or (lambda how, folder=folder: folder.chmod(0o555))
            (folder / "out").mkdir()
            change("ro")
            if disk is None:
                (folder / "out").chmod(0o555)
            wrong += [job.begin(folder / name).fault(2) for name in ("new", "out")]
    return len(wrong), list(filter(None, wrong))


def offline(bed, kills):
    """Nobody there, and a name that nobody has."""
    wrong = []
    for url in ("http://127.0.0.1:1", "http://nobody.invalid"):
        for run in (
            Run(prepare, "weights", REPOSITORY, "--endpoint", url, "--out", bed.fresh()),
            Run(judge, "--server", url, "--server-model", "m", "--bench", bed.home / "rows.jsonl",
                "--out", bed.fresh()),
            Run(synth, "--out", bed.fresh(), "--llm", url, "--model", "m", "--corpus",
                bed.made["synth"] / "world/corpus.jsonl", "--train", 20, "--bench", 0),
        ):  # fmt: skip
            wrong.append(run.fault(2))
    return len(wrong), list(filter(None, wrong))


def twice(bed, kills):
    """The same command in two processes at once: each ends well, or says that there is another."""
    wrong = []
    for name, job in bed.jobs.items():
        for _ in range(2):
            out = bed.fresh()
            if name == "synth":  # a world is waited for; it is the questions that meet
                shutil.copytree(bed.made[name] / "world", out / "world")
            first = job.begin(out)
            time.sleep(bed.dice.uniform(0, bed.seconds[name] / 8))
            second = job.begin(out)
            wrong += [second.fault(0, 2), first.fault(0, 2), ends_well(bed, name, out)]
    return len(wrong) // 3, list(filter(None, wrong))


def many(bed, kills):
    """Ten thousand clips in a folder, as clips of a question and as a corpus."""
    root, count = bed.fresh(), 10_000
    (root / "audio").mkdir(parents=True)
    (root / "meta").mkdir()
    names = [f"{i}-a.wav" for i in range(count)]
    for name in names:
        os.link(bed.home / "0.wav", root / "audio" / name)
    table = [f"{name},{i % 5},dog_bark,True,{i}\n" for i, name in enumerate(names)]
    head = "filename,fold,category,esc10,src_file\n"
    (root / "meta/esc50.csv").write_text(head + "".join(table))
    found = [Path(path).name for path in sample.find_clips([str(root / "audio")])]
    wrong = ["sample.py: not every clip of the folder"] * (found != sorted(names))
    ask = ("--weights", bed.home / "base", "--ask", "Which?", "--clips", root / "audio")
    wrong += filter(None, [Run(sample, *ask).fault(2)])  # so many do not fit, and it says so
    out = root / "corpus.jsonl"
    run = Run(prepare, "corpus", "esc50", "--root", root, "--out", out, "--workers", 1)
    wrong += filter(None, [run.fault(0)])
    rows = out.read_text().splitlines() if out.exists() else []
    wrong += [f"prepare.py corpus: {len(rows)} rows of {count}"] * (len(rows) != count)
    return 3, wrong


STRANGE = [
    "-a.wav",
    "--json",
    " b .wav",
    "\u00fc \u65e5\u672c.wav",
    "[1].wav",
    "*.wav",
    "a'\"b.wav",
    "$(x).wav",
    "#t=1.wav",
    "%41.wav",
    "a\nb.wav",
    "\u202egpj.wav",
    "~.wav",
    "x" * 250 + ".wav",
]
STRANGE = [name if name.endswith(".wav") else name + ".wav" for name in STRANGE]


def names(bed, kills):
    """Clips and folders by strange names, in every command."""
    folder = bed.fresh().parent / "- \u00fc %20 'q'"
    folder.mkdir()
    no_text = os.fsdecode(b"\xff.wav")  # a name that is no Unicode
    for name in [*STRANGE, no_text]:
        os.link(bed.home / "0.wav", folder / name)
    found = {Path(path).name for path in sample.find_clips([str(folder)])}
    wrong = [f"sample.py: {found ^ {*STRANGE, no_text}}"] * (found != {*STRANGE, no_text})
    runs = [Run(prepare, "show", folder / name) for name in (*STRANGE, no_text)]
    runs += [Run(prepare, "show", f"./{name}", before=partial(os.chdir, folder))
             for name in STRANGE[:2]]  # fmt: skip
    rows = folder / "-r \u00fc.jsonl"
    write_rows(rows, make_rows(STRANGE, 14))
    about = {"corpus": "c", "split": "train", "duration": 0.25, "licence": "CC0"}
    clips = [{"id": str(i), "path": name, "labels": [f"dog {i}"], **about}
             for i, name in enumerate(STRANGE)]  # fmt: skip
    write_rows(folder / "-c.jsonl", clips)
    base, out = bed.home / "base", folder / "-o \u00fc"
    runs += [
        Run(judge, "--weights", base, "--bench", rows, "--out", out, "--name=-x \u00fc"),
        Run(train, "--recipe", "polyaudio", "--base", base, "--data", rows, "--dev=", "--steps", 2,
            "--out", out / "-t", "--batch", 2, "--workers", 1),
        Run(synth, "--corpus", folder / "-c.jsonl", "--out", out / "-s", "--train", 20,
            "--bench", 0, "--workers", 1),
        Run(sample, "--weights", base, "--ask", "Which?", "--max-new-tokens", 2, "--clips",
            *(folder / name for name in STRANGE[:3])),
    ]  # fmt: skip
    wrong += filter(None, [run.fault(0) for run in runs])
    return len(runs) + 1, wrong


def locale(bed, kills):
    """The locale C, and Python told not to help itself: a new interpreter for each command."""
    folder, base = bed.fresh().parent, bed.home / "base"
    clips = [f"{i} \u00fc \u65e5.wav" for i in range(3)]
    for name in clips:
        os.link(bed.home / "0.wav", folder / name)
    rows = [{**row, "question": "Which, \u00fc?"} for row in make_rows(clips, 4)]
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "said.jsonl", [{"id": row["id"], "answer": "\u65e5 1"} for row in rows])
    rows, said = folder / "rows.jsonl", folder / "said.jsonl"
    ask = ("--weights", base, "--max-new-tokens", 2, "--ask", "\u00fc?", "--clips")
    commands = [("prepare.py", "show", folder / clips[0]), ("sample.py", *ask, folder / clips[0]),
                ("synth.py", "show", rows, 1),
                ("judge.py", "--answers", said, "--bench", rows, "--out", folder),
                ("train.py", "--recipe", "polyaudio", "--base", base, "--data", rows, "--dev=",
                 "--dry-run", "--out", folder / "t")]  # fmt: skip
    wrong, helpless = [], {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for more, codes in (({}, (0,)), (helpless, (0, 2))):  # then a name in JSON may have no bytes
        for script, *words in commands:
            run = subprocess.run(
                [sys.executable, *map(str, (ROOT / script, *words))], capture_output=True,
                env={**os.environ, "LC_ALL": "C", **more}, timeout=PATIENCE,
            )  # fmt: skip
            err = run.stderr.decode(errors="replace")
            fine = run.returncode in codes and "Traceback" not in err
            wrong += [f"{script} {more}: {run.returncode}: {err[-300:]}"] * (not fine)
    return 2 * len(commands), wrong


FAULTS = {
    "killed": killed, "full": full, "readonly": readonly, "offline": offline, "twice": twice,
    "many": many, "names": names, "locale": locale,
}  # fmt: skip


def main():
    parser = prepare.Parser(prog="python -m tests.faults", description=__doc__.split("\n\n")[0])
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=", ".join(FAULTS))
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, default: 0")
    args = parser.parse_args()
    for name in args.faults:
        expect(name in FAULTS, "FAULT", f"one of {', '.join(FAULTS)}", name)
    os.umask(0o022)
    signal.signal(signal.SIGTERM, lambda *about: sys.exit(143))  # and what was made goes
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder:
        home, lines = Path(folder), []
        home.chmod(0o755)
        url, server = make_home(home)
        try:
            bed = undisturbed(home, url, args.seed)
            print(f"{'fault':<12}{'times':>7}{'wrong':>7}{'seconds':>9}  what was to happen")
            for name in args.faults or FAULTS:
                start = time.monotonic()
                times, wrong = FAULTS[name](bed, args.kills)
                seconds, what = time.monotonic() - start, FAULTS[name].__doc__
                what = " ".join(what.split())
                print(f"{name:<12}{times:>7}{len(wrong):>7}{seconds:>9.0f}  {what}", flush=True)
                lines += wrong
        finally:
            for run in Run.alive:
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    run.kill(whole=True)
                    os.waitpid(run.pid, 0)
            os.kill(server, signal.SIGKILL)
    print("\n".join(lines), end="\n" * bool(lines))
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    prepare.cli(main)
