"""Downloading, against a server of the test's own that breaks off, lies, is busy, corrupts and
redirects: the result is right or refused by name, and no good byte comes twice. Weights first, then
what is common to all requests, then the archives of corpora."""

import gzip
import hashlib
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save
from tests.checkpoints import make_speaking
from tests.conftest import ROOT

import prepare
from prepare import BadInput, Refused, download, request, request_json, stays_inside

ID = "somebody/small-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_SECRETsecretSECRET"
SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"


# ------------------------------------------------------------------------------------------------
# The server. `faults[path]` holds what goes wrong with that path's next requests, in order.


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files, self.replies, self.faults, self.log = {}, {}, {}, []
        self.head = None  # or what answers to HEAD
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, address):
        """A client that left early is nothing to report."""

    def asked(self, name=""):
        return [entry for entry in self.log if entry.path.endswith(name)]

    def sent(self, name) -> int:
        """Bytes of that file that went out, over all requests."""
        return sum(entry.sent for entry in self.asked(name))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each small reply waits 40 ms

    def log_message(self, *args):
        pass

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_HEAD(self):
        path = self.path.split("?")[0]
        self.entry = SimpleNamespace(path=path, line=self.requestline, headers={}, sent=0)
        self.server.log.append(self.entry)
        if self.server.head:
            return self.server.head(self)
        size = {"Content-Length": len(self.server.files.get(path, b""))}
        self.reply(200 if path in self.server.files else 404, **size)

    def do_GET(self):
        path = self.path.split("?")[0]
        entry = SimpleNamespace(
            path=path, line=self.requestline, headers=dict(self.headers), sent=0
        )
        with self.server.lock:
            self.server.log.append(entry)
            waiting = self.server.faults.get(path)
            fault = waiting.pop(0) if waiting else None
        self.entry = entry
        if fault:
            return fault(self)
        if path in self.server.replies:
            return self.reply(200, self.server.replies[path])
        if path not in self.server.files:
            return self.reply(404, b'{"error": "not found"}')
        self.send_file(self.server.files[path])

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.entry.sent += len(body)  # first: who asks has read it before this thread goes on
        self.wfile.write(body)

    def data(self) -> bytes:
        return self.server.files[self.entry.path]

    def start(self) -> int:
        return int(re.findall(r"\d+", self.headers.get("Range", "0"))[0])

    def send_file(self, data, end=None, ranged=True, length=None, first=None):
        start = self.start() if ranged else 0
        if start and start >= len(data):
            return self.reply(416, Content_Range=f"bytes */{len(data)}")
        self.send_response(206 if start else 200)
        if start:
            told = start if first is None else first
            self.send_header("Content-Range", f"bytes {told}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start if length is None else length))
        self.end_headers()
        body = data[start:end]
        self.entry.sent += len(body)  # first: who asks has read it before this thread goes on
        self.wfile.write(body)
        if length is not None or end is not None:
            self.wfile.flush()
            self.close_connection = True


def breaks_at(n):
    """The connection ends after byte n of the file."""
    return lambda handler: handler.send_file(handler.data(), end=n)


def status(code, body=b"", **headers):
    return lambda handler: handler.reply(code, body, **headers)


def leaves(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def corrupts(handler):
    data = bytearray(handler.data())
    data[len(data) // 2] ^= 1
    handler.send_file(bytes(data))


def knows_no_range(handler):
    handler.send_file(handler.data(), ranged=False)


def claims(length):
    return lambda handler: handler.send_file(handler.data(), length=length(SIZE))


def compresses(handler):
    """As some do that are told they may."""
    if "gzip" not in handler.headers["Accept-Encoding"]:
        return handler.send_file(handler.data())
    handler.reply(200, gzip.compress(handler.data()), Content_Encoding="gzip")


def starts_elsewhere(handler):
    handler.send_file(handler.data(), first=7)


def endless(handler):
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    while handler.entry.sent < 1 << 28:
        handler.wfile.write(b"x" * 65536)
        handler.entry.sent += 65536


def chunked(cut=None):
    """No length in advance; cut: bytes after which the connection breaks."""

    def fault(handler):
        data = handler.data()
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for i in range(0, len(data) if cut is None else cut, 10_000):
            piece = data[i : i + 10_000]
            handler.entry.sent += len(piece)
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if cut is None:
            handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = True

    return fault


@pytest.fixture
def server():
    made = Server()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No proxy, no token, no netrc of whoever runs this; and short pauses."""
    for name in ("HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("NETRC", "/nonexistent")
    monkeypatch.setattr(prepare, "PAUSE", 0.01)


# ------------------------------------------------------------------------------------------------
# A repository, as the Hub lists and serves it.


def noise(n, seed=0) -> bytes:
    return np.random.default_rng(seed).bytes(n)


def tensors(names, seed=0, n=50_000) -> bytes:
    dice = torch.Generator().manual_seed(seed)
    return save({name: torch.randn(n, generator=dice) for name in names})


@lru_cache(maxsize=None)
def repository() -> dict[str, bytes]:
    weight_map = {"a": SHARD, "b": SHARD, "c": OTHER}
    index = {"metadata": {}, "weight_map": weight_map}
    return {
        "config.json": b'{"model_type": "qwen2"}',
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "README.md": b"# A model",
        "LICENSE": b"",
        "model.safetensors.index.json": json.dumps(index).encode(),
        SHARD: tensors(["a", "b"], 1),
        OTHER: tensors(["c"], 2),
        ".gitattributes": b"*.bin",
        "pytorch_model.bin": noise(1000),
        "onnx/model.safetensors": tensors(["x"]),
        "model.fp16.safetensors": tensors(["y"]),
        "train.py": b"import os",
    }


WANTED = {
    "config.json", "tokenizer.json", "chat_template.jinja", "README.md", "LICENSE",
    "model.safetensors.index.json", SHARD, OTHER,
}  # fmt: skip


def sibling(name, data, large=1000) -> dict:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if len(data) < large:
        return {"rfilename": name, "size": len(data), "blobId": blob}
    lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return {"rfilename": name, "size": len(data), "blobId": "0" * 40, "lfs": lfs}


def publish(server, files, commit=COMMIT, revision="main", id=ID):
    listing = {"sha": commit, "siblings": [sibling(*pair) for pair in files.items()]}
    for name in (revision, commit):
        path = f"/api/models/{id}/revision/{name}"
        server.replies[path] = json.dumps(listing).encode()
    for name, data in files.items():
        server.files[f"/{id}/resolve/{commit}/{name}"] = data
    return listing


@pytest.fixture
def hub(server):
    server.listing = publish(server, repository())
    return server


def at(name, id=ID) -> str:
    return f"/{id}/resolve/{COMMIT}/{name}"


def run(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, words)])
    prepare.cli(prepare.main)


def fetch(server, out, monkeypatch, *words):
    run(monkeypatch, "weights", ID, "--endpoint", server.url, "--out", out, *words)


def refuses(capsys, call, *args) -> str:
    """The one line of a refusal."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    return said.err


def contents(dir) -> dict[str, bytes]:
    return {str(p.relative_to(dir)): p.read_bytes() for p in dir.rglob("*") if p.is_file()}


def is_whole(dir):
    found = contents(dir)
    record = json.loads(found.pop("download.json"))
    assert found == {name: data for name, data in repository().items() if name in WANTED}
    assert record["commit"] == COMMIT
    assert record["id"] == ID
    return True


# ------------------------------------------------------------------------------------------------
# The command.


def test_a_repository_comes_in_and_the_second_run_does_nothing(hub, tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "model"
    fetch(hub, out, monkeypatch)
    assert is_whole(out)
    for name in WANTED:
        assert len(hub.asked(at(name))) == 1 or not repository()[name]
        assert hub.sent(at(name)) == len(repository()[name])
    assert not [e for e in hub.log if e.path.endswith((".bin", ".py", "onnx/model.safetensors"))]
    said = capsys.readouterr()
    assert said.err == "" and "8 files" in said.out and COMMIT[:12] in said.out
    before, asked = {p: p.stat().st_mtime_ns for p in out.iterdir()}, len(hub.log)
    fetch(hub, out, monkeypatch)
    assert "nothing to do" in capsys.readouterr().out
    assert len(hub.log) == asked, "it knew what was there without asking"
    assert before == {p: p.stat().st_mtime_ns for p in out.iterdir()}
    fetch(hub, out, monkeypatch, "--revision", "main")  # a name has to be looked up, no more
    assert [entry.path for entry in hub.log[asked:]] == [f"/api/models/{ID}/revision/main"]


def test_only_what_is_missing_is_fetched_again(hub, tmp_path, monkeypatch):
    fetch(hub, tmp_path, monkeypatch)
    (tmp_path / OTHER).unlink()
    (tmp_path / SHARD).write_bytes(b"cut short")
    hub.log.clear()
    fetch(hub, tmp_path, monkeypatch)
    assert is_whole(tmp_path)
    assert {entry.path for entry in hub.log} == {at(OTHER), at(SHARD)}


# What happens to the first shard's requests: (faults in order, requests, bytes sent beyond its
# size; None where the words say how it is refused instead).
SIZE = len(repository()[SHARD])
FAULTS = {
    "breaks off": ([breaks_at(100_000)], 2, 0),
    "breaks off at an odd place": ([breaks_at(123_457)], 2, 0),
    "breaks off nine times": ([breaks_at(n) for n in range(9_999, 99_999, 10_000)], 10, 0),
    "leaves without a word": ([leaves, leaves], 3, 0),
    "is busy, then breaks off": ([status(429, Retry_After=0), breaks_at(5), status(503)], 4, 0),
    "fails": ([status(500), status(502), status(504)], 4, 0),
    "corrupts a byte": ([corrupts], 2, SIZE),
    "corrupts a byte always": ([corrupts, corrupts], 2, "sha256"),
    "knows no Range": ([breaks_at(100_000), knows_no_range], 2, 100_000),
    "answers 416 to a part": ([breaks_at(100_000), status(416)], 3, 100_000),
    "answers 416 to any part": ([breaks_at(9), status(416), breaks_at(9), status(416)], 4, "416"),
    "compresses": ([compresses], 1, 0),
    "starts elsewhere": ([breaks_at(100_000), starts_elsewhere], 2, "from 100000 on"),
    "claims more": ([claims(lambda n: n + 1)], 1, f"expected {SIZE} bytes, found {SIZE + 1}"),
    "claims less": ([claims(lambda n: n - 1)], 1, f"expected {SIZE} bytes, found {SIZE - 1}"),
    "claims nonsense": ([claims(lambda n: "much")], 1, 0),
    "is somebody else's page": ([status(200, b"<html>log in")], 1, f"expected {SIZE} bytes"),
    "sends without a length": ([chunked()], 1, 0),
    "breaks off without a length": ([chunked(cut=100_000)], 2, 0),
    "never ends": ([endless], None, None),
    "never sends anything": ([breaks_at(0)] * 9, 6, "no more"),
    "is gone": ([status(404, b"no such entry")], 1, "404"),
    "is always busy": ([status(503, b"try later")] * 9, 6, "503"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_whatever_goes_wrong_it_is_right_or_refused(hub, case, tmp_path, monkeypatch, capsys):
    faults, requests, outcome = FAULTS[case]
    hub.faults[at(SHARD)] = list(faults)
    if isinstance(outcome, str):
        line = refuses(capsys, fetch, hub, tmp_path, monkeypatch)
        assert outcome in line and SHARD in line
        assert not (tmp_path / SHARD).exists()
    else:
        fetch(hub, tmp_path, monkeypatch)
        assert is_whole(tmp_path)
    if requests is not None:
        assert len(hub.asked(at(SHARD))) == requests
    if isinstance(outcome, int):
        assert hub.sent(at(SHARD)) == SIZE + outcome
    assert hub.sent(at(SHARD)) < 1 << 26, "what nobody wants is not read"
    hub.faults.clear()
    fetch(hub, tmp_path, monkeypatch)  # and in any case the next run makes it whole
    assert is_whole(tmp_path)


def test_what_a_refused_run_holds_is_not_fetched_again(hub, tmp_path, monkeypatch, capsys):
    hub.faults[at(SHARD)] = [breaks_at(100_000), *[status(503)] * 6]
    refuses(capsys, fetch, hub, tmp_path, monkeypatch)
    assert (tmp_path / f"{SHARD}.part").read_bytes() == repository()[SHARD][:100_000]
    fetch(hub, tmp_path, monkeypatch)
    assert is_whole(tmp_path)
    assert hub.sent(at(SHARD)) == SIZE
    assert hub.asked(at(SHARD))[-1].headers["Range"] == "bytes=100000-"


PARTS = {  # what lies there as .part: its bytes, and those that are then sent
    "all of it": (lambda data: data, 0),
    "half of it": (lambda data: data[: SIZE // 2], SIZE - SIZE // 2),
    "nothing": (lambda data: b"", SIZE),
    "too much": (lambda data: data + b"x", SIZE),
    "something else, as long": (lambda data: bytes(len(data)), SIZE),
    "something else, shorter": (lambda data: b"x" * 1000, 2 * SIZE - 1000),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_part_that_lies_there_is_used_or_dropped(hub, case, tmp_path, monkeypatch):
    make, sent = PARTS[case]
    (tmp_path / f"{SHARD}.part").write_bytes(make(repository()[SHARD]))
    fetch(hub, tmp_path, monkeypatch)
    assert is_whole(tmp_path)
    assert hub.sent(at(SHARD)) == sent


def command(server, out, **extra):
    env = {**os.environ, "NO_PROXY": "*", **extra}
    words = ["weights", ID, "--endpoint", server.url, "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "prepare.py"), *words], env=env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def trickles(handler):
    """Half of the file at once, then so slowly that there is time to kill whoever waits."""
    data, start = handler.data(), handler.start()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    for i in range(start, len(data), 65536):
        handler.entry.sent += len(data[i : i + 65536])
        handler.wfile.write(data[i : i + 65536])
        time.sleep(0.5 if i > len(data) // 2 else 0)


@pytest.mark.long
def test_kill_in_the_middle_and_the_same_command_again(server, tmp_path):
    files = {**repository(), SHARD: tensors(["a", "b"], 1, 500_000)}
    publish(server, files)
    server.faults[at(SHARD)] = [trickles]
    first, part = command(server, tmp_path), tmp_path / f"{SHARD}.part"
    end = time.monotonic() + 60
    while not part.exists() or part.stat().st_size < 1_000_000:
        assert time.monotonic() < end and first.poll() is None
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    held = part.stat().st_size
    assert 1_000_000 <= held < len(files[SHARD])
    assert not (tmp_path / SHARD).exists()
    sent = server.sent(at("config.json"))
    asked = len(server.log)
    again = command(server, tmp_path)
    said = again.communicate()
    assert again.returncode == 0, said
    digest = hashlib.sha256((tmp_path / SHARD).read_bytes()).hexdigest()
    assert digest == hashlib.sha256(files[SHARD]).hexdigest()
    assert server.asked(at(SHARD))[-1].sent == len(files[SHARD]) - held, "no good byte twice"
    assert server.sent(at("config.json")) == sent
    assert not [e for e in server.log[asked:] if e.path.startswith("/api")], "the same commit"


def test_a_branch_that_moves_cannot_mix_two_commits(hub, tmp_path, monkeypatch, capsys):
    hub.faults[at(OTHER)] = [status(403, b"not now")]
    refuses(capsys, fetch, hub, tmp_path, monkeypatch)
    newer = {**repository(), SHARD: tensors(["a", "b"], 3), "config.json": b'{"new": 1}'}
    publish(hub, newer, "f" * 40)
    fetch(hub, tmp_path, monkeypatch)
    assert is_whole(tmp_path), "what was begun is finished"
    capsys.readouterr()
    line = refuses(capsys, fetch, hub, tmp_path, monkeypatch, "--revision", "main")
    assert COMMIT in line and "f" * 40 in line and "--out" in line
    assert is_whole(tmp_path)
    fetch(hub, tmp_path / "new", monkeypatch, "--revision", "main")
    assert (tmp_path / "new" / "config.json").read_bytes() == b'{"new": 1}'
    fetch(hub, tmp_path / "old", monkeypatch, "--revision", COMMIT[:40])


def test_a_revision_with_a_slash(hub, tmp_path, monkeypatch):
    hub.replies[f"/api/models/{ID}/revision/refs%2Fpr%2F1"] = json.dumps(hub.listing).encode()
    fetch(hub, tmp_path, monkeypatch, "--revision", "refs/pr/1")
    assert is_whole(tmp_path)


def test_files_of_somebody_else_are_left_alone(hub, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text("mine")
    line = refuses(capsys, fetch, hub, tmp_path, monkeypatch)
    assert "config.json" in line and "--out" in line
    assert contents(tmp_path) == {"config.json": b"mine"}
    for name in WANTED:  # a copy from elsewhere is taken over, and not fetched
        (tmp_path / name).write_bytes(repository()[name])
    fetch(hub, tmp_path, monkeypatch)
    assert is_whole(tmp_path)
    assert not hub.asked(at(SHARD))
    run_other = ["weights", "other/small-model", "--endpoint", hub.url, "--out", tmp_path]
    publish(hub, repository(), id="other/small-model")
    capsys.readouterr()
    assert ID in refuses(capsys, run, monkeypatch, *run_other)


def test_the_folder_is_named_after_the_repository(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "__file__", str(tmp_path / "prepare.py"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    run(monkeypatch, "weights", ID)
    assert is_whole(tmp_path / "weights" / "small-model")
    assert not [entry.line for entry in hub.log if "//" in entry.line]


def test_an_adapter_comes_in_too(server, tmp_path, monkeypatch, capsys):
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": tensors(["a"])}
    publish(server, {**files, "optimizer.pt": b"x", "README.md": b""})
    fetch(server, tmp_path, monkeypatch)
    assert set(contents(tmp_path)) == {*files, "README.md", "download.json"}
    run(monkeypatch, "weights", "--check", tmp_path)
    assert "no faults" in capsys.readouterr().out


def test_what_comes_in_loads(server, tmp_path, monkeypatch):
    from model import PolyAudio

    make_speaking(tmp_path / "theirs")
    files = {p.name: p.read_bytes() for p in (tmp_path / "theirs").iterdir()}
    publish(server, files)
    fetch(server, tmp_path / "ours", monkeypatch)
    net = PolyAudio.from_dir(tmp_path / "ours")
    expected = PolyAudio.from_dir(tmp_path / "theirs").logits([300, 301], [])
    assert torch.equal(net.logits([300, 301], []), expected)


# ------------------------------------------------------------------------------------------------
# What is refused before the first byte.


def listing(**changes):
    def edit(hub):
        return {**hub.listing, **changes}

    return edit


def with_name(name):
    return lambda hub: {**hub.listing, "siblings": [*hub.listing["siblings"], sibling(name, b"x")]}


def only(*names):
    return lambda hub: {
        **hub.listing,
        "siblings": [sibling(name, b"x" * 2000) for name in ("config.json", *names)],
    }


def field(**changes):
    """The first file's entry, changed."""
    return lambda hub: {
        **hub.listing,
        "siblings": [{**hub.listing["siblings"][0], **changes}, *hub.listing["siblings"][1:]],
    }


LISTINGS = {
    "only a pickle": (only("pytorch_model.bin"), "pytorch_model.bin"),
    "only .pt": (only("model.pt"), "model.pt"),
    "only .pth": (only("consolidated.00.pth"), "consolidated.00.pth"),
    "only .ckpt": (only("last.ckpt"), "last.ckpt"),
    "only .h5": (only("tf_model.h5"), "tf_model.h5"),
    "only .msgpack": (only("flax_model.msgpack"), "flax_model.msgpack"),
    "no weights": (only("README.md"), "safetensors"),
    "up": (with_name("../model.safetensors"), "../model.safetensors"),
    "up, further in": (with_name("a/../../config.json"), "a/../../config.json"),
    "absolute": (with_name("/etc/config.json"), "/etc/config.json"),
    "backslash": (with_name("..\\config.json"), "config.json"),
    "drive": (with_name("C:config.json"), "C:config.json"),
    "NUL": (with_name("config.json\0.md"), "config.json"),
    "empty name": (with_name(""), "names inside"),
    "no name": (with_name(None), "names inside"),
    "commit that leaves": (listing(sha="../../x"), "a commit"),
    "no commit": (listing(sha=None), "a commit"),
    "no list": (listing(siblings=None), "list of files"),
    "a list of texts": (listing(siblings=["config.json"]), "list of files"),
    "another list": (lambda hub: [1], "list of files"),
    "no size": (field(size=None), "sizes and hashes"),
    "negative size": (field(size=-1), "sizes and hashes"),
    "size that is true": (field(size=True), "sizes and hashes"),
    "a hash that is none": (field(blobId="x"), "sizes and hashes"),
    "no hash": (field(lfs={"size": 3}), "list of files"),
}


@pytest.mark.parametrize("case", LISTINGS)
def test_a_list_of_files_that_is_not_right_is_refused(hub, case, tmp_path, monkeypatch, capsys):
    edit, words = LISTINGS[case]
    out = tmp_path / "a" / "b"
    hub.replies[f"/api/models/{ID}/revision/main"] = json.dumps(edit(hub)).encode()
    assert words in refuses(capsys, fetch, hub, out, monkeypatch)
    assert contents(tmp_path) == {}
    assert len(hub.log) == 1, "no file was asked for"


def test_a_reply_that_is_no_json_is_refused(hub, tmp_path, monkeypatch, capsys):
    hub.replies[f"/api/models/{ID}/revision/main"] = b"<html>"
    assert "expected JSON, found b'<html>'" in refuses(capsys, fetch, hub, tmp_path, monkeypatch)


def test_an_index_that_names_what_is_not_there_is_refused(server, tmp_path, monkeypatch, capsys):
    files = {name: data for name, data in repository().items() if name != OTHER}
    publish(server, files)
    line = refuses(capsys, fetch, server, tmp_path, monkeypatch)
    assert OTHER in line


@pytest.mark.parametrize("id", ["..", "a/..", "a/b/c", "/a", "a b/c", "a/b?x", "", "https://x/y"])
def test_an_id_that_is_none_is_refused(id, monkeypatch, capsys):
    assert "ID" in refuses(
        capsys, run, monkeypatch, "weights", id, "--endpoint", "http://x.invalid"
    )


def test_the_disk_is_asked_first(hub, tmp_path, monkeypatch, capsys):
    total = sum(len(repository()[name]) for name in WANTED)
    held = 100_000
    (tmp_path / f"{SHARD}.part").write_bytes(repository()[SHARD][:held])

    def leave(free):
        monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))

    leave(total - held - 1)
    assert "free space" in refuses(capsys, fetch, hub, tmp_path, monkeypatch)
    assert not hub.asked(at(SHARD)) and not hub.asked(at("config.json"))
    leave(total - held)
    fetch(hub, tmp_path, monkeypatch)
    assert is_whole(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_line(hub, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in refuses(capsys, fetch, hub, tmp_path / "file" / "out", monkeypatch)


@pytest.mark.parametrize(
    "word", ["..", "../x", "/x", "a//b", "./x", "a\\b", "c:x", "x\0", "", None]
)
def test_names_that_leave(word):
    assert not stays_inside(word)


@pytest.mark.parametrize("word", ["x", "a/b.wav", "..x", "a b", "ключ", "x..y", "a/...b", "ab:c"])
def test_names_that_stay(word):
    assert stays_inside(word) is True


# ------------------------------------------------------------------------------------------------
# Keys.


def test_the_token_goes_nowhere_else(hub, tmp_path, monkeypatch, capsys, caplog):
    """Shards are redirected to another port, as the Hub does it to another host."""
    elsewhere = Server()
    for path, data in hub.files.items():
        elsewhere.files[path] = data
    away = f"{elsewhere.url}{at(SHARD)}?X-Signature={TOKEN}&Policy=1"
    hub.faults[at(SHARD)] = [status(302, Location=away), status(307, Location=away)]
    elsewhere.faults[at(SHARD)] = [breaks_at(100_000)]
    home = at("config.json")
    hub.faults[home] = [status(307, Location="/other/place")]
    hub.files["/other/place"] = repository()["config.json"]
    monkeypatch.setenv("HF_TOKEN", TOKEN + "\n")
    caplog.set_level(logging.DEBUG)
    fetch(hub, tmp_path, monkeypatch)
    assert is_whole(tmp_path)
    assert {e.headers.get("Authorization") for e in hub.log} == {f"Bearer {TOKEN}"}
    assert [e.headers.get("Range") for e in elsewhere.log] == [None, "bytes=100000-"]
    assert not any("Authorization" in e.headers for e in elsewhere.log)
    assert hub.asked("/other/place")[0].headers["Authorization"], "the same host, so it goes along"
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err + caplog.text
    assert not any(TOKEN.encode() in data for data in contents(tmp_path).values())
    elsewhere.shutdown()


def test_no_token_goes_from_https_to_http(monkeypatch):
    seen = []

    class Wire:
        def request(self, method, url, auth=None, **how):
            seen.append((url, auth is not None))
            targets = {
                "https://a/1": "/2",
                "https://a/2": "http://a/3",
                "http://a/3": "https://a/4",
            }
            target = targets.get(url)
            headers = {"Location": target} if target else {}
            code = 302 if target else 200
            return SimpleNamespace(status_code=code, headers=headers, close=lambda: None)

    monkeypatch.setattr(prepare, "session", lambda *_: Wire())
    request("GET", "https://a/1", token=TOKEN, stream=True)
    signed = {"https://a/1": True, "https://a/2": True, "http://a/3": False, "https://a/4": True}
    assert seen == list(signed.items())


def test_a_netrc_does_not_take_the_place_of_the_token(server, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password other\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.replies["/x"] = b"1"
    request("GET", server.url + "/x", token=TOKEN)
    assert server.log[0].headers["Authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("code, token, where", [
    (401, None, "list"), (401, TOKEN, "file"), (403, None, "file"), (403, TOKEN, "list"),
])  # fmt: skip
def test_gated(hub, code, token, where, tmp_path):
    """The whole program, with a server that repeats the key in its complaint."""
    complaint = f"Access is restricted. Your key: {token} (Bearer {token})".encode()
    path = f"/api/models/{ID}/revision/main" if where == "list" else at(SHARD)
    hub.faults[path] = [status(code, complaint)]
    program = command(hub, tmp_path, **({"HF_TOKEN": token} if token else {}))
    out, line = program.communicate()
    assert program.returncode == 2
    assert out == "" and line.count("\n") == 1
    assert f"{hub.url}/{ID}" in line and "HF_TOKEN" in line and str(code) in line
    assert ("is not set" in line) == (token is None)
    assert "Access is restricted" in line
    assert TOKEN not in line
    assert not any(TOKEN.encode() in data for data in contents(tmp_path).values())
    assert len(hub.asked(path)) == 1, "asking again would not help"


@pytest.mark.parametrize("code", [400, 401, 404, 500])
def test_no_message_of_a_request_holds_a_key(server, code, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    address = server.url.replace("//", "//me:pass@word@") + f"/x?key={TOKEN}&b=1"
    said = f"bad key {TOKEN} at {address}".encode()
    server.faults["/x"] = [status(code, said)] * 6
    with pytest.raises(Refused) as refused:
        request("POST", address, {"a": 1}, token=TOKEN)
    text = f"{refused.value} {refused.value!r} {refused.value.reply}"
    assert TOKEN not in text and "pass" not in text and "word" not in text
    assert refused.value.status == code and "bad key ***" in refused.value.reply
    for broken in (address.replace(server.url.split(":")[-1], "1"), "http://me:pass@ /?k=" + TOKEN):
        with pytest.raises(Refused) as refused:
            request("GET", broken, token=TOKEN)
        text = str(refused.value)
        assert TOKEN not in text and "pass" not in text
    assert TOKEN not in caplog.text and "pass" not in caplog.text


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "naïve", "tab\t", ""])
def test_a_token_that_no_header_can_hold_is_refused_unseen(server, token):
    with pytest.raises(BadInput, match="token") as refused:
        request("GET", server.url + "/x", token=token)
    assert not token or token not in str(refused.value)
    assert server.log == []


# ------------------------------------------------------------------------------------------------
# request() by itself.


@pytest.fixture
def naps(monkeypatch):
    """The pauses that are made, without making them."""
    made = []
    monkeypatch.setattr(prepare.time, "sleep", made.append)
    return made


def test_json_goes_out_and_comes_back(server):
    def echo(handler):
        kind = handler.headers["Content-Type"]
        sent = {"kind": kind, "sent": json.loads(handler.body), "x": handler.headers["X-A"]}
        handler.reply(200, json.dumps(sent).encode())

    server.faults["/v1/chat"] = [status(503), echo]
    reply = request_json("POST", server.url + "/v1/chat", body={"a": ["ü"]}, headers={"X-A": "1"})
    assert reply == {"kind": "application/json", "sent": {"a": ["ü"]}, "x": "1"}


def test_bytes_come_back_as_they_are(server):
    server.replies["/v1/audio/speech"] = noise(300_000)
    assert request("POST", server.url + "/v1/audio/speech", body={}) == noise(300_000)


@pytest.mark.parametrize("code, tries", [
    (400, 1), (401, 1), (403, 1), (404, 1), (422, 1), (304, 1),
    (408, 6), (409, 6), (429, 6), (500, 6), (502, 6), (503, 6), (504, 6),
])  # fmt: skip
def test_only_what_may_pass_is_tried_again(server, code, tries, naps, monkeypatch):
    monkeypatch.setattr(prepare, "PAUSE", 1.0)
    server.faults["/x"] = [status(code)] * 9
    with pytest.raises(Refused, match=str(code)) as refused:
        request("GET", server.url + "/x")
    assert refused.value.status == code
    assert len(server.log) == tries
    assert len(naps) == tries - 1
    for i, nap in enumerate(naps):
        assert 2**i <= nap <= 1.25 * 2**i
    drawn = {round(nap / 2**i, 9) for i, nap in enumerate(naps)}
    assert len(drawn) == len(naps), "or all who were turned away come back at once"


def after(seconds):
    return formatdate(time.time() + seconds, usegmt=True)


WAITS = {  # Retry-After: the least and the most that is waited
    "7": (7, 8.75), "0": (1, 1.25), "1.5": (1.5, 1.9), "86400": (300, 375), "1e999": (300, 375),
    "soon": (1, 1.25), "-5": (1, 1.25), "²": (1, 1.25), "nan": (1, 1.25), "": (1, 1.25),
    "Wed, 21 Oct 2015 07:28:00 GMT": (1, 1.25), "Wed, 99 Oct 9999 07:28:00 GMT": (1, 1.25),
}  # fmt: skip


@pytest.mark.parametrize("asked", [*WAITS, "in 20 s"])
def test_a_server_may_say_how_long(server, asked, naps, monkeypatch):
    monkeypatch.setattr(prepare, "PAUSE", 1.0)
    least, most = WAITS.get(asked, (18, 25))
    header = after(20) if asked == "in 20 s" else asked
    server.faults["/x"] = [status(429, Retry_After=header)]
    server.replies["/x"] = b"1"
    assert request("GET", server.url + "/x") == b"1"
    assert least <= naps[0] <= most


def test_it_does_wait(server):
    server.faults["/x"] = [status(429, Retry_After=1)]
    server.replies["/x"] = b"1"
    start = time.monotonic()
    request("GET", server.url + "/x")
    assert time.monotonic() - start >= 1


def test_a_reply_that_is_too_long_is_not_read_to_its_end(server):
    server.faults["/x"] = [endless]
    with pytest.raises(BadInput, match="at most 100000 bytes"):
        request("GET", server.url + "/x", limit=100_000)
    time.sleep(0.1)
    assert server.sent("/x") < 1 << 26
    server.replies["/y"] = b"x" * 1000
    assert len(request("GET", server.url + "/y", limit=1000)) == 1000
    with pytest.raises(BadInput, match="at most 999 bytes"):
        request("GET", server.url + "/y", limit=999)


@pytest.mark.parametrize("code", [302, 500, 404])
def test_nor_is_the_body_of_a_refusal(server, code):
    def fault(handler):
        handler.send_response(code)
        handler.send_header("Location", "/y")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        while handler.entry.sent < 1 << 28:
            handler.wfile.write(b"x" * 65536)
            handler.entry.sent += 65536

    server.faults["/x"] = [fault]
    server.replies["/x"] = server.replies["/y"] = b"1"
    if code == 404:
        with pytest.raises(Refused, match="404"):
            request("GET", server.url + "/x")
    else:
        assert request("GET", server.url + "/x") == b"1"
    time.sleep(0.1)
    assert server.sent("/x") < 1 << 26


def test_a_body_that_breaks_off_is_asked_for_again(server):
    server.files["/x"] = noise(200_000)
    server.faults["/x"] = [breaks_at(1000)]
    assert request("GET", server.url + "/x") == noise(200_000)
    assert len(server.log) == 2


def test_silence_ends(server):
    server.faults["/x"] = [lambda handler: time.sleep(1.5)] * 6
    server.replies["/x"] = b"1"
    start = time.monotonic()
    with pytest.raises(Refused, match="timed out") as refused:
        request("GET", server.url + "/x", timeout=(1, 0.1))
    assert time.monotonic() - start < 1.4
    assert refused.value.status == 408
    assert len(server.log) == 6


def test_what_is_posted_follows_no_redirect(server):
    server.faults["/x"] = [status(307, b"see /y", Location="/y")]
    with pytest.raises(Refused, match="307.*see /y"):
        request("POST", server.url + "/x", body={"secret": 1})
    assert len(server.log) == 1


def test_a_circle_of_redirects_ends(server):
    server.faults["/x"] = [status(302, Location="/x")] * 99
    with pytest.raises(Refused, match="redirects"):
        request("GET", server.url + "/x")
    assert len(server.log) == 10


@pytest.mark.parametrize(
    "url", ["", "x", "ftp://x/y", "http://", "http://[x", "http://x:y/", "file:///etc/passwd"]
)
def test_an_address_that_is_none_is_refused_at_once(url, naps):
    with pytest.raises(Refused):
        request("GET", url)
    assert naps == []


def test_a_redirect_to_a_file_is_refused(server):
    server.faults["/x"] = [status(302, Location="file:///etc/passwd")]
    with pytest.raises(Refused):
        request("GET", server.url + "/x")


def test_threads_share_it(server):
    def echo(handler):
        handler.reply(200, handler.body)

    server.faults["/x"] = [status(503) if i % 7 == 0 else echo for i in range(400)]
    with ThreadPoolExecutor(16) as pool:
        replies = list(
            pool.map(lambda i: request_json("POST", server.url + "/x", body=i), range(200))
        )
    assert replies == list(range(200))


def test_a_line_of_progress(monkeypatch, capsys):
    show = prepare.progress("x", 100)
    show(100)
    assert capsys.readouterr().err == "", "quiet where nobody watches"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    clock = iter([0.0, 10.0, 10.1, 20.0])
    monkeypatch.setattr(prepare.time, "monotonic", lambda: next(clock))
    show = prepare.progress("x", 8e6, done=2e6)
    show(2e6)
    show(1e6)  # too soon after the last to be drawn
    show(3e6)
    lines = capsys.readouterr().err
    assert "x: 4 of 8 MB, 0.2 MB/s" in lines and "8 of 8 MB, 0.3 MB/s" in lines
    assert lines.endswith("\n") and lines.count("\n") == 1 and lines.count(" of ") == 2


# ------------------------------------------------------------------------------------------------
# download() by itself: archives, with what their owners publish.

DATA = noise(300_000, 5)
KNOWN = {
    "md5": {"digest": f"md5:{hashlib.md5(DATA).hexdigest()}"},
    "sha256": {"digest": f"sha256:{hashlib.sha256(DATA).hexdigest()}", "size": len(DATA)},
    "size": {"size": len(DATA)},
    "nothing": {},
}


@pytest.mark.parametrize("known", KNOWN)
def test_an_archive_comes_in_pieces(server, known, tmp_path):
    server.files["/a.tgz"] = DATA
    server.faults["/a.tgz"] = [breaks_at(100), breaks_at(99_999), status(503)]
    seen = []
    download(server.url + "/a.tgz", tmp_path / "a.tgz", show=seen.append, **KNOWN[known])
    assert contents(tmp_path) == {"a.tgz": DATA}
    assert server.sent("/a.tgz") == sum(seen) == len(DATA)


@pytest.mark.parametrize("known", KNOWN)
def test_an_archive_of_no_stated_length(server, known, tmp_path):
    server.files["/a.zip"] = DATA
    server.faults["/a.zip"] = [chunked(cut=100_000), chunked()]
    download(server.url + "/a.zip", tmp_path / "a.zip", **KNOWN[known])
    assert contents(tmp_path) == {"a.zip": DATA}


@pytest.mark.parametrize("known", ["md5", "sha256", "size"])
def test_an_archive_that_is_another_is_refused(server, known, tmp_path):
    server.files["/a.tgz"] = DATA[:-1] + (b"" if known == "size" else b"!")
    with pytest.raises(BadInput, match="a.tgz.*expected"):
        download(server.url + "/a.tgz", tmp_path / "a.tgz", **KNOWN[known])
    assert not (tmp_path / "a.tgz").exists()


def test_an_endless_archive_ends(server, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "LARGEST", 1_000_000)
    server.faults["/a"] = [endless]
    with pytest.raises(BadInput, match="less than 1000000 bytes"):
        download(server.url + "/a", tmp_path / "a")
    assert (tmp_path / "a.part").stat().st_size <= 1_000_000


@pytest.mark.parametrize("faults", [[], [knows_no_range]], ids=["Range", "no Range"])
def test_an_archive_that_shrank_is_fetched_anew(server, faults, tmp_path):
    server.files["/a"] = DATA
    server.faults["/a"] = faults
    (tmp_path / "a.part").write_bytes(DATA + b"more")
    download(server.url + "/a", tmp_path / "a")
    assert contents(tmp_path) == {"a": DATA}


# ------------------------------------------------------------------------------------------------
# The files of a corpus. picoaudio's owners publish no digest of theirs.

SYN = "data/multi_event_train/syn_1.wav"


@lru_cache(maxsize=None)
def picoaudio() -> dict[str, bytes]:
    sound, packed = io.BytesIO(), io.BytesIO()
    soundfile.write(sound, np.random.default_rng(0).uniform(-0.1, 0.1, 99_999), 16000, format="WAV")
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(SYN, sound.getvalue())
    line = json.dumps({"filepath": SYN, "onoffCaption": "a at 0-1"}).encode()
    files = dict.fromkeys(prepare.CORPORA["picoaudio"].files, b"{}\n")
    return {**files, "meta_data/train.json": line, "audio_data.zip": packed.getvalue()}


@pytest.fixture
def corpus(server, monkeypatch):
    changed = prepare.CORPORA["picoaudio"]._replace(base=server.url + "/")
    monkeypatch.setitem(prepare.CORPORA, "picoaudio", changed)
    server.files = {f"/{name}": data for name, data in picoaudio().items()}
    return server


def bring(root, monkeypatch, *parts):
    words = ("--root", root, "--out", root.parent / "c.jsonl", "--workers", 1, "--download")
    run(monkeypatch, "corpus", "picoaudio", *words, *parts)


def came_once(server):
    return all(server.sent(f"/{name}") == len(data) for name, data in picoaudio().items())


UNKNOWN = {  # what answers to HEAD, and whether the sizes are known then
    "HEAD": None,
    "no HEAD": status(405),
    "a HEAD that is not implemented": status(501),
    "a HEAD without a length": lambda handler: handler.send_response(200) or handler.end_headers(),
    "a HEAD that says nothing": status(200),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_no_file_of_a_corpus_comes_twice(corpus, case, tmp_path, monkeypatch, capsys):
    corpus.head = UNKNOWN[case]
    root = tmp_path / "data"
    bring(root, monkeypatch)
    assert (root / SYN).is_file() and came_once(corpus)
    assert len([entry for entry in corpus.log if entry.line.startswith("HEAD")]) == 6
    asked = len(corpus.log)
    bring(root, monkeypatch)
    (root / "audio_data.zip").unlink()  # its space is wanted; it was unpacked
    bring(root, monkeypatch)
    assert len(corpus.log) == asked, "it knew what was there without asking"
    (root / "meta_data/train.json").unlink()
    bring(root, monkeypatch)
    assert [entry.path for entry in corpus.log[asked:]] == ["/meta_data/train.json"] * 2


def test_what_came_before_a_failure_does_not_come_again(corpus, tmp_path, monkeypatch, capsys):
    root = tmp_path / "data"
    corpus.faults["/meta_data/train.json"] = [status(403)]
    assert "403" in refuses(capsys, bring, root, monkeypatch)
    held = corpus.sent("/audio_data.zip")
    assert held == len(picoaudio()["audio_data.zip"])
    (root / "audio_data.zip").rename(root / "audio_data.zip.part")  # killed before it had its name
    bring(root, monkeypatch)
    assert (root / SYN).is_file() and came_once(corpus)


def test_a_damaged_archive_of_a_corpus_can_be_fetched_anew(corpus, tmp_path, monkeypatch, capsys):
    root, name = tmp_path / "data", "/audio_data.zip"
    corpus.files[name] = corpus.files[name][:-20]
    line = refuses(capsys, bring, root, monkeypatch)
    assert "audio_data.zip" in line and "delete it, and --download brings it again" in line
    corpus.files[name] = picoaudio()[name[1:]]
    (root / name[1:]).unlink()
    bring(root, monkeypatch)
    assert (root / SYN).is_file()


def test_the_disk_is_asked_before_a_corpus_comes(corpus, tmp_path, monkeypatch, capsys):
    root, held = tmp_path / "data", 100_000
    root.mkdir()
    (root / "audio_data.zip.part").write_bytes(picoaudio()["audio_data.zip"][:held])
    packed = sum(map(len, picoaudio().values()))
    with zipfile.ZipFile(io.BytesIO(picoaudio()["audio_data.zip"])) as archive:
        unpacked = archive.getinfo(SYN).file_size

    def leave(*free):
        free = iter(free)
        usage = lambda _: SimpleNamespace(free=next(free))  # noqa: E731
        monkeypatch.setattr(prepare.shutil, "disk_usage", usage)

    leave(packed - held - 1)
    assert "free space" in refuses(capsys, bring, root, monkeypatch)
    assert {entry.line.split()[0] for entry in corpus.log} == {"HEAD"}
    leave(packed - held, unpacked - 1)
    assert "free space" in refuses(capsys, bring, root, monkeypatch)
    assert not (root / "data").exists(), "nothing was unpacked"
    leave(0, unpacked)
    bring(root, monkeypatch)
    assert (root / SYN).is_file()


def test_a_corpus_comes_with_a_line_of_progress(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    size = sum(map(len, picoaudio().values())) / 1e6
    monkeypatch.setattr(prepare.sys, "argv", [])
    bring(tmp_path / "data", monkeypatch)
    lines = capsys.readouterr().err
    assert f"picoaudio: {size:.0f} of {size:.0f} MB, " in lines
    assert "audio_data.zip: looking through: 0 MB, " in lines
    assert "audio_data.zip: unpacking: 0 of 0 MB, " in lines
    assert "picoaudio: 1 rows, " in lines


def test_progress_where_nobody_knows_the_end(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    corpus.head = status(405)
    bring(tmp_path / "data", monkeypatch)
    lines = capsys.readouterr().err
    assert re.search(r"picoaudio: \d+ MB, \d", lines) and "picoaudio: 0 of" not in lines


def test_a_size_is_asked_where_a_file_has_gone(server):
    server.files["/there"] = DATA
    server.replies["/here"] = b""
    server.head = lambda handler: (
        handler.reply(302, Location="/there")
        if handler.path == "/here"
        else handler.reply(200, **{"Content-Length": len(DATA)})
    )
    assert prepare.size_at(server.url + "/here") == len(DATA)
    assert [entry.path for entry in server.log] == ["/here", "/there"]
    server.head = status(404)
    with pytest.raises(Refused, match="404"):
        prepare.size_at(server.url + "/here")


# ------------------------------------------------------------------------------------------------
# --check.


def damage(name, change):
    return lambda dir: (dir / name).write_bytes(change((dir / name).read_bytes()))


def edit_index(change):
    def edit(data):
        document = json.loads(data)
        change(document["weight_map"])
        return json.dumps(document).encode()

    return damage("model.safetensors.index.json", edit)


def flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


DAMAGES = {  # what is done, words of each line, and whether a folder without a record shows it too
    "a byte": (damage(SHARD, flip), [f"{SHARD}: expected sha256"], False),
    "a byte of the config": (damage("config.json", flip), ["config.json: expected git"], False),
    "cut": (damage(SHARD, lambda d: d[:-1]), [SHARD], True),
    "longer": (damage(SHARD, lambda d: d + b"x"), [SHARD], True),
    "a pickle": (damage(SHARD, lambda d: b"PK" + d), [SHARD], True),
    "gone": (lambda dir: (dir / OTHER).unlink(), [OTHER], True),
    "both": (
        lambda dir: [damage(name, lambda d: d[:-1])(dir) for name in (SHARD, OTHER)],
        [SHARD, OTHER], True,
    ),
    "an index that promises more": (
        edit_index(lambda w: w.update(z=SHARD)), ["index.json", f"{SHARD}: z"], None,
    ),
    "an index that leads out": (
        edit_index(lambda w: w.update(z="../x.safetensors")), ["index.json: "], True,
    ),
    "tokenizer gone": (lambda dir: (dir / "tokenizer.json").unlink(), ["tokenizer.json"], False),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    dir = tmp_path_factory.mktemp("sound")
    files = {name: data for name, data in repository().items() if name in WANTED}
    for name, data in files.items():
        (dir / name).write_bytes(data)
    listed = {}
    for name, data in files.items():
        entry = sibling(name, data)
        digest = f"sha256:{entry['lfs']['sha256']}" if "lfs" in entry else f"git:{entry['blobId']}"
        listed[name] = [len(data), digest]
    record = {"id": ID, "commit": COMMIT, "files": listed}
    (dir / "download.json").write_text(json.dumps(record))
    return dir


def check(dir, monkeypatch, capsys) -> list[str]:
    try:
        run(monkeypatch, "weights", "--check", dir)
    except SystemExit as stop:
        assert stop.code == 2
        said = capsys.readouterr()
        assert said.out == ""
        return said.err.splitlines()
    assert "no faults" in capsys.readouterr().out
    return []


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "bare"])
@pytest.mark.parametrize("case", DAMAGES)
def test_check_names_each_fault_in_a_line(sound, case, recorded, tmp_path, monkeypatch, capsys):
    for path in sound.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if not recorded:
        (tmp_path / "download.json").unlink()
    assert check(tmp_path, monkeypatch, capsys) == []
    hurt, words, shows = DAMAGES[case]
    hurt(tmp_path)
    lines = check(tmp_path, monkeypatch, capsys)
    if not recorded and shows is None:
        words = words[1:]
    if not recorded and shows is False:
        words = []
    assert len(lines) == len(words), lines
    for word in words:
        assert any(word in line for line in lines), (word, lines)


RECORDS = {
    "no object": [],
    "no files": {"id": ID, "commit": COMMIT},
    "files that leave": {"id": ID, "commit": COMMIT, "files": {"../x": [1, "git:" + "0" * 40]}},
    "no sizes": {"id": ID, "commit": COMMIT, "files": {"x": ["1", "git:" + "0" * 40]}},
    "no hash": {"id": ID, "commit": COMMIT, "files": {"x": [1, None]}},
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_that_is_none_is_refused(sound, case, tmp_path, monkeypatch, capsys):
    (tmp_path / "download.json").write_text(json.dumps(RECORDS[case]))
    assert "download.json" in check(tmp_path, monkeypatch, capsys)[0]


def test_check_of_what_is_no_folder(tmp_path, monkeypatch, capsys):
    assert "a folder" in check(tmp_path / "none", monkeypatch, capsys)[0]
    assert "safetensors" in check(tmp_path, monkeypatch, capsys)[0]


def test_the_help_teaches(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "weights", "--help")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "python prepare.py weights nvidia/audio-flamingo-3-hf" in said and "HF_TOKEN" in said
    for words in ([], ["nonsense"], ["weights"], ["weights", "a", "b"]):
        refuses(capsys, run, monkeypatch, *words)


def test_two_downloads_of_one_file_do_not_mix_their_bytes(tmp_path):
    with open(tmp_path / "x.bin.part", "ab") as first:
        prepare.hold(first, "x.bin.part")
        with pytest.raises(BadInput, match="x.bin.part: expected one run at a time, found another"):
            prepare.download("http://127.0.0.1:9/x.bin", tmp_path / "x.bin", 3)
    assert (tmp_path / "x.bin.part").read_bytes() == b""
