"""sample.py --serve: the same answers as without a server, through the client that people use, and
no request, however odd or slow, that brings it down or holds it up."""

import argparse
import base64
import contextlib
import io
import json
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref

import openai
import prepare
import pytest
import sample
import soundfile
from model import PolyAudio
from prepare import BadInput
from tests.checkpoints import edit_json, make_speaking, waves
from tests.conftest import ROOT

MOST = 8  # tokens of an answer here
CLIPS = waves((0.5, 0.8, 0.3, 0.4, 0.6))


def wav(wave, kind="WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, 16000, format=kind, subtype="FLOAT" if kind == "WAV" else None)
    return file.getvalue()


def sound(wave, **changes) -> dict:
    data = base64.b64encode(wav(wave)).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav", **changes}}


def say(text) -> dict:
    return {"type": "text", "text": text}


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": [say(p) if isinstance(p, str) else p for p in parts]}]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("serve")
    make_speaking(home / "weights")
    edit_json(home / "weights" / "config.json", layout="polyaudio")  # where a line end shows
    return home


class Endless(PolyAudio):
    """Nothing that it says ends its answer."""

    ends = []


@pytest.fixture(scope="module")
def net(home):
    return Endless.from_dir(home / "weights")


@contextlib.contextmanager
def serving(net):
    """A server and its one worker, in threads of this process."""
    args = sample.parse(["--weights", "x/tiny", "--serve", "0", "--max-new-tokens", str(MOST)])
    with sample.Server(args) as server:
        server.net = net
        threads = [threading.Thread(target=run) for run in (server.serve_forever, server.work)]
        for thread in threads:
            thread.start()
        try:
            yield server
        finally:
            server.waiting.put(None)
            server.shutdown()
            for thread in threads:
                thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


@pytest.fixture(scope="module")
def server(net):
    with serving(net) as server:
        yield server


def client_of(server):
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        yield client


def ask(client, messages, **how):
    return client.chat.completions.create(model="tiny", messages=messages, **how)


def streamed(client, messages, **how) -> str:
    chunks = list(ask(client, messages, stream=True, **how))
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert chunks[0].choices[0].delta.role == "assistant"
    return "".join(c.choices[0].delta.content or "" for c in chunks)


# --- the same answers


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_clips_are_heard_where_they_stand(client, net, n):
    parts, text = ["Here is"], "Here is"
    for i in range(1, n + 1):
        parts += [sound(CLIPS[i - 1]), f" and then, {i},"]
        text += f"<sound-{i}> and then, {i},"
    expected = net.answer(text, CLIPS[:n], MOST)
    found = ask(client, user(*parts))
    assert found.choices[0].message.content == expected
    assert streamed(client, user(*parts)) == expected
    ids, _ = net.prompt([{"role": "user", "content": text}], CLIPS[:n])
    assert found.usage.prompt_tokens == len(ids)
    assert found.usage.completion_tokens == MOST
    assert found.usage.total_tokens == len(ids) + MOST
    assert (found.choices[0].finish_reason, found.model) == ("length", "tiny")


def test_clips_before_the_text_are_laid_out_as_without_a_server(client, net):
    expected = net.answer("Which clip is louder?", CLIPS[:3], MOST)
    asked = user(*map(sound, CLIPS[:3]), "Which clip is louder?")
    assert ask(client, asked).choices[0].message.content == expected
    other = user("Which clip is louder?", *map(sound, CLIPS[:3]))
    expected = net.answer("Which clip is louder?<sound-1><sound-2><sound-3>", CLIPS[:3], MOST)
    assert ask(client, other).choices[0].message.content == expected


def test_a_conversation_with_a_system_message(client, net):
    messages = [{"role": "system", "content": "Be brief: <sound-1> is a word here."}]
    messages += user(sound(CLIPS[0]), "What is it?")
    messages += [{"role": "assistant", "content": "A dog.", "refusal": None}]
    messages += user("And this? ", sound(CLIPS[1]), " Say.") + [
        {"role": "assistant", "content": "No"}
    ]
    messages += [{"role": "user", "content": "Sure?"}]
    texts = [messages[0]["content"], "<sound-1>\nWhat is it?", "A dog.", "And this? <sound-2> Say."]
    texts += ["No", "Sure?"]
    plain = [{"role": m["role"], "content": text} for m, text in zip(messages, texts)]
    found = ask(client, messages)
    assert found.choices[0].message.content == net.answer(plain, CLIPS[:2], MOST)
    assert found.usage.prompt_tokens == len(net.prompt(plain, CLIPS[:2])[0])


def test_text_alone_and_other_formats(client, net):
    found = ask(client, [{"role": "user", "content": "What is a sound?"}])
    assert found.choices[0].message.content == net.answer("What is a sound?", [], MOST)
    data = base64.b64encode(wav(CLIPS[0], "FLAC")).decode()
    flac = {"type": "input_audio", "input_audio": {"data": data, "format": "flac"}}
    heard = prepare.load_audio(io.BytesIO(wav(CLIPS[0], "FLAC")))
    found = ask(client, user(flac, "What?"))
    assert found.choices[0].message.content == net.answer("What?", [heard], MOST)


def test_how_it_samples_is_honoured(client, net):
    asked, how = user(sound(CLIPS[0]), "Which?"), {"temperature": 1.5, "top_p": 0.9, "seed": 5}
    expected = net.answer("Which?", CLIPS[:1], 5, **how)
    assert ask(client, asked, max_tokens=5, **how).choices[0].message.content == expected
    assert streamed(client, asked, max_completion_tokens=5, **how) == expected
    assert expected != net.answer("Which?", CLIPS[:1], 5)
    assert expected != net.answer("Which?", CLIPS[:1], 5, **{**how, "seed": 6})
    assert ask(client, asked, max_tokens=2).usage.completion_tokens == 2


def test_an_answer_ends_before_a_stop_text(client, net):
    prompt = net.prompt([{"role": "user", "content": "Which clip is louder?"}], CLIPS[:2])
    text = net.tokenizer.decode(net.generate(*prompt, 30))
    asked = user(*map(sound, CLIPS[:2]), "Which clip is louder?")
    for stop in (text[7:10], ["nowhere in it", text[8:10], text[5:9]]):
        at = min(text.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in text)
        found = ask(client, asked, max_tokens=30, stop=stop)
        assert found.choices[0].message.content == text[:at].strip()
        assert found.choices[0].finish_reason == "stop"
        assert found.usage.completion_tokens < 30
        assert streamed(client, asked, max_tokens=30, stop=stop) == text[:at].strip()
    found = ask(client, asked, max_tokens=30, stop="nowhere in it")
    assert found.choices[0].message.content == text.strip()
    assert found.choices[0].finish_reason == "length"


def test_an_answer_that_ends_by_itself(client, net, monkeypatch):
    asked = user("What is a sound?")
    first = net.generate(*net.prompt([{"role": "user", "content": "What is a sound?"}], []), 3)
    monkeypatch.setattr(Endless, "ends", first[2:])
    found = ask(client, asked)
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("stop", 3)


def test_usage_of_a_stream_if_asked_for(client):
    chunks = list(ask(client, user("Hm?"), stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == MOST
    assert chunks[-1].usage.prompt_tokens > 4
    chunks = list(ask(client, user("Hm?"), stream=True, stream_options={"include_usage": False}))
    assert chunks[-1].usage is None


def test_a_developers_message_is_the_systems_and_names_change_nothing(client, net):
    messages = [{"role": "system", "content": "Be brief."}, *user("What is a sound?")]
    expected = net.answer([messages[0], {"role": "user", "content": "What is a sound?"}], [], MOST)
    assert ask(client, messages).choices[0].message.content == expected
    messages[0] = {"role": "developer", "content": "Be brief.", "name": "me"}
    messages[1]["name"] = "you"
    assert ask(client, messages).choices[0].message.content == expected


def test_without_a_seed_each_answer_is_drawn_anew(client, net):
    def answers(**how):
        asked = [ask(client, user("Which?"), temperature=2, **how) for _ in range(6)]
        return {answer.choices[0].message.content for answer in asked}

    assert len(answers()) > 1
    assert len(answers(seed=3)) == 1
    request = {"model": "tiny", "messages": user("Which?")}
    seeded = sample.parse(["--weights", "x", "--serve", "0", "--seed", "5"])
    assert sample.Reply(net, request, seeded).how.seed == 5
    assert sample.Reply(net, {**request, "seed": 7}, seeded).how.seed == 7


class Unseen(list):
    """A long value, which nobody may write out but to complain of it."""

    def __repr__(self):
        raise AssertionError("written out")


def test_what_is_fine_is_not_written_out():
    asked = Unseen([{"role": "user", "content": Unseen([say("Hm?")])}])
    sample.check_request({"model": "tiny", "messages": asked, "stop": Unseen(["x"])})
    assert sample.read_messages(asked) == ([{"role": "user", "content": "Hm?"}], [])


def test_bodies_are_parsed_one_at_a_time(server, monkeypatch):
    """As objects they can take many times the room that they had as text."""
    body = json.dumps({"model": "tiny", "messages": user("Hm?")}).encode()
    parse, inside, most = sample.from_body, [], []

    def counted(data):
        inside.append(data)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return parse(data)

    monkeypatch.setattr(sample, "from_body", counted)
    threads = [threading.Thread(target=post, args=[server, body]) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6


def test_models_and_health(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="GET /v1/models/tiny"):
        client.models.retrieve("other")
    for path in ("/health", "/v1/models", "/v1/models/tiny"):
        asked = f"{path} HTTP/1.1\r\nHost: localhost"
        status, head, reply = get(server, f"HEAD {asked}")
        assert (status, reply) == (200, b"") and "application/json" in head
        assert get(server, f"GET {asked}")[2]
    assert get(server, "HEAD /nothing HTTP/1.1\r\nHost: localhost")[::2] == (404, b"")
    status, head, reply = get(server, "GET /health HTTP/1.1\r\nHost: localhost")
    assert (status, json.loads(reply)) == (200, {"status": "ok", "model": "tiny"})
    assert "application/json" in head


# --- refusals


BAD = [
    ({"messages": []}, 400, "messages: expected a list"),
    ({"messages": "hello"}, 400, "messages: expected a list"),
    ({"messages": ["hello"]}, 400, "messages[0]"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role of system, user, assistant"),
    ({"messages": [{"role": [], "content": "x"}]}, 400, "messages[0]"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, 400, "tool_calls"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "the user's as the last"),
    ({"messages": user({"type": "image_url", "image_url": {"url": "x"}})}, 400, "'image_url'"),
    ({"messages": user({"type": "audio_url", "audio_url": {"url": "http://x"}})}, 400, "audio_url"),
    ({"messages": user({"type": "file", "file": {"file_id": "/etc/passwd"}})}, 400, "'file'"),
    ({"messages": user({"type": "text", "text": 5})}, 400, "content[0]"),
    ({"messages": user({"type": "input_audio", "input_audio": "x"})}, 400, "base64 data"),
    ({"messages": user({"type": "input_audio", "input_audio": {"url": "http://x"}})}, 400, "data"),
    ({"messages": user(sound(CLIPS[0], path="/etc/passwd"))}, 400, "base64 data and a format"),
    ({"messages": user(sound(CLIPS[0], data="/etc/passwd.wav"))}, 400, "expected base64"),
    ({"messages": user(sound(CLIPS[0], data="file:///etc/passwd"))}, 400, "expected base64"),
    ({"messages": user(sound(CLIPS[0], data="Zürich=="))}, 400, "expected base64"),
    ({"messages": user(sound(CLIPS[0], data=sound(CLIPS[0])["input_audio"]["data"] + "!"))}, 400,
     "expected base64"),
    ({"messages": user(sound(CLIPS[0], format="pcm"))}, 400, "format: expected one of"),
    ({"messages": user(sound(CLIPS[0], format=["wav"]))}, 400, "format: expected one of"),
    ({"messages": user(sound(CLIPS[0], data=""))}, 400, "cannot be decoded"),
    ({"messages": user(sound(CLIPS[0], data="AAAA"))}, 400, "content[0]: cannot be decoded"),
    ({"messages": user(sound(CLIPS[0][:100]), "x")}, 400, "too short"),
    ({"messages": user("Is <sound-1> it?", sound(CLIPS[0]))}, 400, "found <sound-n> in a text"),
    ({"messages": user(sound(CLIPS[0]), "Is <sound-", "1> it?")}, 400, "found <sound-n> in a text"),
    ({"messages": user("<sound-", "2>", sound(CLIPS[0]))}, 400, "found <sound-n> in a text"),
    ({"messages": user(sound(CLIPS[0]), "<sound-\u0661>")}, 400, "found <sound-n> in a text"),
    ({"messages": user(*["x"] * 1001)}, 400, "up to 1000 parts"),
    ({"messages": user("x") * 1001}, 400, "messages: expected a list of 1 to 1000"),
    ({"messages": [*user(*["x"] * 999), *user("x", "y")]}, 400, "messages[1]: expected up to 1000"),
    ({"messages": user("e" + "\u0316\u0301" * 501)}, 400, "combining marks"),
    ({"messages": user(*[sound(CLIPS[2])] * 65)}, 400, "up to 64 sounds"),
    ({"messages": [{"role": "system", "content": [sound(CLIPS[0])]}, *user("x")]}, 400, "user's"),
    ({"messages": user("x" * (1 << 20) + "x")}, 400, "letters"),
    ({"messages": user(" " * 200_000)}, 400, "spaces"),
    ({"max_tokens": 1 << 19}, 400, "at most 32768 tokens"),
    ({"max_tokens": 0}, 400, "max_tokens: expected a whole number above 0"),
    ({"max_tokens": 2.5}, 400, "max_tokens"), ({"max_tokens": True}, 400, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_completion_tokens"),
    ({"temperature": -1}, 400, "temperature: expected 0 to 2"),
    ({"temperature": "hot"}, 400, "temperature"), ({"temperature": float("nan")}, 400, "temper"),
    ({"top_p": 0}, 400, "top_p"), ({"seed": 1.5}, 400, "seed"), ({"seed": 1 << 70}, 400, "seed"),
    ({"stop": ""}, 400, "stop"), ({"stop": ["a"] * 5}, 400, "stop"), ({"stop": 3}, 400, "stop"),
    ({"stream": "yes"}, 400, "stream"), ({"stream_options": {"x": 1}}, 400, "stream_options"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options: expected these with"),
    ({"n": 2}, 400, "n: expected 1"), ({"n": True}, 400, "n: "), ({"logprobs": True}, 400, "logp"),
    ({"tools": [{"type": "function"}]}, 400, "tools"), ({"best_of": 3}, 400, "'best_of'"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty"), ({"model": 5}, 400, "model"),
    ({"model": "gpt-4o-audio-preview"}, 404, "expected tiny"), ({"model": None}, 400, "model"),
]  # fmt: skip


@pytest.mark.parametrize("changes, status, said", BAD, ids=range(len(BAD)))
def test_what_cannot_be_done_is_refused_in_one_clear_error(server, changes, status, said):
    body = {"model": "tiny", "messages": user("Hm?"), **changes}
    found, _, reply = post(server, json.dumps(body).encode())
    error = json.loads(reply)["error"]
    assert (found, error["code"], error["type"]) == (status, status, "invalid_request_error")
    assert said in error["message"] and "\n" not in error["message"] and len(error["message"]) < 600


def test_what_changes_nothing_is_let_through(client, net):
    how = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False,
           "response_format": {"type": "text"}, "user": "me", "stop": None}  # fmt: skip
    found = ask(client, user("What is a sound?"), **how)
    assert found.choices[0].message.content == net.answer("What is a sound?", [], MOST)


def test_the_clients_errors_are_its_own_kinds(client):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(client, user("Hm?"), temperature=1.99, extra_body={"temperature": 9})
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.chat.completions.create(model="other", messages=user("Hm?"))


def test_a_clip_longer_than_is_heard_is_refused(server, net, monkeypatch):
    heard = sample.Path  # what is in memory stays small: eight bits, one second more than is heard
    assert heard and net.config.max_seconds == 600
    file = io.BytesIO()
    soundfile.write(file, CLIPS[0].repeat(16)[: 601 * 200], 200 * 5, format="FLAC")
    data = base64.b64encode(file.getvalue()).decode()
    object.__setattr__(net.config, "max_seconds", 60)
    try:
        body = {"model": "tiny", "messages": user(sound(CLIPS[0], data=data, format="flac"))}
        status, _, reply = post(server, json.dumps(body).encode())
    finally:
        object.__setattr__(net.config, "max_seconds", 600)
    assert status == 400 and b"up to 60 s of sound" in reply


def never(*_):
    raise AssertionError("decoded")


def test_more_samples_than_anybody_would_send_are_not_decoded(server, monkeypatch):
    """The limit is on what the headers say, all channels of all sounds."""
    stereo = CLIPS[3].repeat(2).reshape(-1, 2)
    body = {"model": "tiny", "messages": user(sound(stereo), sound(CLIPS[3]), "Which?")}
    size = stereo.size + len(CLIPS[3])
    monkeypatch.setitem(sample.MOST, "samples", size)
    assert post(server, json.dumps(body).encode())[0] == 200
    monkeypatch.setitem(sample.MOST, "samples", size - 1)
    monkeypatch.setattr(sample, "load_audio", never)
    status, _, reply = post(server, json.dumps(body).encode())
    assert status == 400 and f"up to {size - 1} samples in all, found {size}".encode() in reply


def test_too_much_for_the_context(server, net, monkeypatch):
    monkeypatch.setattr(sample, "load_audio", never)
    monkeypatch.setattr(net.config.decoder, "context", 64)
    body = {"model": "tiny", "messages": user(*map(sound, CLIPS), "Which?")}
    status, _, reply = post(server, json.dumps(body).encode())
    assert status == 400 and b"5 clips of up to 20 slots do not fit: N_max" in reply


def test_a_request_that_breaks_something_is_not_the_last(server, client, net, monkeypatch, capsys):
    def broken(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(net, "prefill", broken)
        with pytest.raises(openai.InternalServerError, match="MemoryError"):
            ask(client, user("Hm?"))
        with pytest.raises(openai.InternalServerError, match="MemoryError"):
            ask(client, user("Hm?"), stream=True)
    assert "Traceback" not in capsys.readouterr().err
    assert ask(client, user("Hm?")).usage.completion_tokens == MOST


def test_a_mistake_of_ours_is_told_too(server, client, net, monkeypatch, capsys):
    def broken(*_):
        raise RecursionError

    with monkeypatch.context() as patch:
        patch.setattr(net, "prompt", broken)
        with pytest.raises(openai.InternalServerError, match="RecursionError"):
            ask(client, user("Hm?"))
    assert capsys.readouterr().err.count("\n") == 1
    assert ask(client, user("Hm?")).usage.completion_tokens == MOST


def test_what_breaks_in_the_middle_of_a_stream_is_told_there(client, net, monkeypatch):
    step, count = net.step, iter(range(100))

    def broken(*given):
        if next(count) == 4:
            raise MemoryError
        return step(*given)

    monkeypatch.setattr(net, "step", broken)
    with pytest.raises(openai.APIError, match="MemoryError"):
        list(ask(client, user("Hm?"), stream=True))


# --- raw requests


def talk(server, data: bytes, half=False) -> bytes:
    """Send bytes, read until the server closes."""
    with socket.create_connection(server.server_address, timeout=60) as s:
        with contextlib.suppress(ConnectionError):
            s.sendall(data)
        if half:
            s.shutdown(socket.SHUT_WR)
        got = b""
        while piece := s.recv(1 << 16):
            got += piece
        return got


def split(reply: bytes):
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode(), body


def get(server, head):
    return split(talk(server, f"{head}\r\n\r\n".encode()))


def post(server, body, *more, host="localhost", kind="application/json"):
    head = ["POST /v1/chat/completions HTTP/1.1", f"Host: {host}", f"Content-Type: {kind}"]
    head += [f"Content-Length: {len(body)}", *more]
    return split(talk(server, "\r\n".join(head).encode() + b"\r\n\r\n" + body))


HM = json.dumps({"model": "tiny", "messages": user("Hm?"), "max_tokens": 1}).encode()


def test_only_its_own_host_and_origin(server):
    port = server.server_address[1]
    for host in ("localhost", f"localhost:{port}", "127.0.0.1", f"LOCALHOST:{port}"):
        assert post(server, HM, host=host)[0] == 200
        assert post(server, HM, f"Origin: http://{host}", host=host)[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.x",
                 "10.0.0.1", "", "localhost:80:80", "localhost@evil", "[::1]"):  # fmt: skip
        assert post(server, HM, host=host)[0] == 403, host
    for origin in ("http://evil.example", "null", f"https://localhost:{port}", "http://localhost",
                   f"http://localhost:{port}.evil.example"):  # fmt: skip
        assert post(server, HM, f"Origin: {origin}", host=f"localhost:{port}")[0] == 403, origin
    assert post(server, HM, "Host: evil.example")[0] == 403  # two of them
    assert get(server, "GET /health HTTP/1.1")[0] == 403
    assert get(server, "GET /v1/models HTTP/1.1\r\nHost: evil.example")[0] == 403
    told = json.loads(post(server, HM, host="evil.example")[2])["error"]["message"]
    wanted = "localhost or 127.0.0.1, with or without a port"
    assert told == f"Host: expected {wanted}, found evil.example"
    told = json.loads(post(server, HM, "Origin: null")[2])["error"]["message"]
    assert told == "Origin: expected http://localhost or none, found null"
    head = post(server, HM, f"Origin: http://localhost:{port}", host=f"localhost:{port}")[1]
    assert "access-control" not in head.lower()


ODD = [
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"GET /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"POST /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    (b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    (b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n", 505),
    (b"GET /health\r\n\r\n", 403),
    (b"GET /health HTTP/0.9\r\n\r\n", 403),
    (b"GET /%s HTTP/1.1\r\n\r\n" % (b"x" * 70000), 414),
    (b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
    (b"GET /health HTTP/1.1\r\na: " + b"b" * 70000 + b"\r\n\r\n", 431),
    (b"nonsense\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
]


@pytest.mark.parametrize("data, status", ODD, ids=range(len(ODD)))
def test_what_is_no_request_of_ours(server, data, status):
    found, head, reply = split(talk(server, data))
    assert head.startswith(f"HTTP/1.1 {status} ") and found == status
    assert json.loads(reply)["error"]["code"] == status


def test_bodies_that_are_none(server):
    for body in (b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": "tiny"}',
                 b'{"messages": 1}', b"9" * 5000):  # fmt: skip
        status, _, reply = post(server, body)
        assert status == 400 and json.loads(reply)["error"]["message"]
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    kind = b"Content-Type: application/json\r\n"
    assert split(talk(server, head + kind + b"\r\n"))[0] == 411
    for length in (b"-5", b"1e3", b"\xb2", b"0x10", b"9" * 30):
        assert split(talk(server, head + kind + b"Content-Length: %s\r\n\r\n" % length))[0] == 411
    chunked = b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    assert split(talk(server, head + kind + chunked))[0] == 411
    assert post(server, HM, kind="text/plain")[0] == 415
    short = talk(server, head + kind + b"Content-Length: 500\r\n\r\n{}", half=True)
    assert split(short)[0] == 400 and b"expected 500 bytes, found 2" in short


def test_a_body_too_large_is_told_so_although_it_is_still_coming(server):
    with socket.create_connection(server.server_address, timeout=60) as s:
        s.sendall(request(b" " * (40 << 20)))  # to its end: the server does not hang up on it
        status, _, reply = split(s.makefile("rb").read())
    assert status == 413 and b"33554432 bytes" in reply


# --- others who are slow, gone, or many


@contextlib.contextmanager
def opened(server, count, data=b""):
    with contextlib.ExitStack() as stack:
        made = [socket.create_connection(server.server_address, timeout=60) for _ in range(count)]
        for s in made:
            stack.enter_context(s)
            s.sendall(data)
        yield made


STREAM = json.dumps(
    {"model": "tiny", "messages": user("Hm?"), "max_tokens": 20_000, "stream": True}
).encode()


def request(body) -> bytes:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def wait_for(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


def test_who_sends_slowly_holds_up_nobody(server, client):
    half = b"POST /v1/chat/completions HTTP/1.1\r\nHost: local"
    with opened(server, 30, half) as heads, opened(server, 10, request(HM)[:-5]) as bodies:
        assert ask(client, user("Hm?")).usage.completion_tokens == MOST
        assert select.select([*heads, *bodies], [], [], 0)[0] == []


def test_each_byte_comes_in_time_and_the_request_does_not(server, monkeypatch):
    monkeypatch.setitem(sample.PATIENCE, "request", 1)
    with opened(server, 3, b"POST /v1/chat/completions HTTP/1.1\r\nHost: local") as heads:
        with opened(server, 3, request(STREAM.replace(b"Hm?", b"m" * 2000))[:-1900]) as bodies:
            slow = [*heads, *bodies]

            def told():
                time.sleep(0.2)
                for s in slow:
                    with contextlib.suppress(OSError):
                        s.sendall(b"x")
                return len(select.select(slow, [], [], 0)[0]) == len(slow)

            wait_for(told)
            for s in slow:
                assert split(s.recv(1 << 16))[0] == 408


def test_who_never_stops_sending_is_cut_off(monkeypatch):
    monkeypatch.setitem(sample.PATIENCE, "request", 0.1)
    mine, theirs = socket.socketpair()
    with mine, theirs:
        patient, room = sample.Patient(mine), bytearray(1)
        theirs.sendall(b"x" * 9)
        assert patient.readinto(room) == 1
        time.sleep(0.15)
        with pytest.raises(sample.Refusal, match="not here after 0.1 s"):
            patient.readinto(room)  # although there is more


@pytest.mark.parametrize("way", ["close", "half", "reset"])
@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_not_answered_to_the_end(server, client, net, monkeypatch, way, stream):
    body = json.dumps({**json.loads(STREAM), "stream": stream}).encode()
    steps, step = [], net.step
    monkeypatch.setattr(net, "step", lambda *given: steps.append(1) or step(*given))
    with opened(server, 1, request(body)) as (s,):
        wait_for(lambda: len(steps) > 5)
        if way == "half":
            s.shutdown(socket.SHUT_WR)
        elif way == "reset":
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            s.close()
        else:
            s.close()
        assert ask(client, user("Hm?")).usage.completion_tokens == MOST
    assert len(steps) < 5000


def test_who_does_not_read_holds_up_nobody(server, client):
    with opened(server, 3, request(STREAM)) as readers:
        for s in readers:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        time.sleep(0.3)
    assert ask(client, user("Hm?")).usage.completion_tokens == MOST


def test_more_than_can_wait_are_told_when_to_come_again(server, client, monkeypatch):
    with opened(server, 1, request(STREAM)) as (first,):
        assert b"200 OK" in first.recv(1 << 16)
        with opened(server, sample.MOST["waiting"], request(HM)) as waiting:
            wait_for(lambda: len(server.places) == sample.MOST["waiting"])
            with monkeypatch.context() as patch, pytest.raises(openai.RateLimitError) as told:
                patch.setattr(sample, "load_audio", never)  # nothing is decoded without a place
                ask(client, user(sound(CLIPS[0]), "Hm?"))
            assert int(told.value.response.headers["Retry-After"]) > 0
            assert get(server, "GET /health HTTP/1.1\r\nHost: localhost")[0] == 200
            first.close()
            for s in waiting:
                assert b"200 OK" in s.recv(1 << 16)
    assert ask(client, user("Hm?")).usage.completion_tokens == MOST


def test_who_leaves_while_waiting_gives_the_place_back(server, client):
    with opened(server, 1, request(STREAM)) as (first,):
        assert b"200 OK" in first.recv(1 << 16)
        for _ in range(2):
            with opened(server, sample.MOST["waiting"], request(HM)):
                wait_for(lambda: len(server.places) == sample.MOST["waiting"])
            wait_for(lambda: not server.places)
    assert ask(client, user("Hm?")).usage.completion_tokens == MOST


def test_a_place_is_given_back_by_what_cannot_be_read(server, client):
    for _ in range(sample.MOST["waiting"] + 1):
        with pytest.raises(openai.BadRequestError):
            ask(client, user(sound(CLIPS[0], data="AAAA")))
    assert ask(client, user("Hm?")).usage.completion_tokens == MOST


def test_of_an_answer_that_takes_too_long_there_is_what_there_is(client, net, monkeypatch):
    monkeypatch.setitem(sample.PATIENCE, "answer", 0.3)
    for stop in (None, "what it never says, and whose beginning it might"):
        found = ask(client, user("Hm?"), max_tokens=20_000, stop=stop)
        said, count = found.choices[0].message.content, found.usage.completion_tokens
        assert found.choices[0].finish_reason == "length" and 0 < count < 20_000
        prompt = net.prompt([{"role": "user", "content": "Hm?"}], [])
        assert said == net.tokenizer.decode(net.generate(*prompt, count)).strip()


def test_an_answer_cut_within_a_letter_ends_as_one_cut_by_its_length(net, monkeypatch):
    """The bytes of half a letter are held back until it is whole, or the answer has ended."""
    prompt, decode = net.prompt([{"role": "user", "content": "Hm?"}], []), net.tokenizer.decode
    ids, push, text, cut = net.generate(*prompt, 300), net.tokenizer.stream(), "", 0
    while text == decode(ids[:cut]):
        text += push(ids[cut])
        cut += 1
    how = argparse.Namespace(max_new_tokens=300, temperature=0, top_p=1, seed=0)
    reply = sample.Reply(net, {"messages": []}, how)
    reply.begun = time.monotonic()
    for id in ids[: cut - 1]:
        reply.take(id)
    monkeypatch.setitem(sample.PATIENCE, "answer", -1)
    with pytest.raises(sample.Enough):
        reply.take(ids[cut - 1])
    said = "".join(reply.pieces.get_nowait() for _ in range(reply.pieces.qsize()))
    assert said == decode(ids[:cut]).strip()


def test_neither_the_queue_nor_an_answer_lasts_for_ever(server, client, monkeypatch):
    monkeypatch.setitem(sample.PATIENCE, "queue", 0.5)
    with opened(server, 1, request(STREAM)) as (first,):
        assert b"200 OK" in first.recv(1 << 16)
        with pytest.raises(openai.InternalServerError, match="queue: it took more") as told:
            ask(client, user("Hm?"))
        assert told.value.status_code == 503 and told.value.response.headers["Retry-After"]
        monkeypatch.setitem(sample.PATIENCE, "answer", 0.1)
        rest = b""
        while piece := first.recv(1 << 16):
            rest += piece
    assert b'"finish_reason": "length"' in rest and rest.endswith(b"data: [DONE]\n\n")


def test_large_bodies_are_read_a_few_at_a_time_and_small_ones_pass(server, client, monkeypatch):
    """Else they would be as many as threads, each of the size that a body may have."""
    monkeypatch.setattr(server, "large", threading.BoundedSemaphore(2))
    long = json.dumps({"model": "tiny", "messages": user("Hm?"), "user": "x" * (1 << 20)}).encode()
    with opened(server, 2, request(long)[:-5]) as first:
        wait_for(lambda: server.large._value == 0)
        with opened(server, 1, request(long)) as third:
            assert post(server, HM)[0] == 200
            assert not select.select(third, [], [], 0.5)[0], "it waits for one of the two"
            monkeypatch.setitem(sample.PATIENCE, "queue", 0.2)
            status, _, reply = post(server, long)
            assert status == 503 and b"queue: it took more" in reply
            first[0].sendall(request(long)[-5:])
            assert first[0].recv(100) and third[0].recv(100)
    wait_for(lambda: server.large._value == 2)


def test_what_is_refused_is_let_go_before_its_client_has_left(server, monkeypatch):
    """He may take his time; another such body would be read meanwhile, and another."""

    class Body(dict):
        pass

    kept = []

    def checked(body):
        kept.append(weakref.ref(body))
        raise BadInput("messages: expected others")

    monkeypatch.setattr(sample, "from_body", lambda data: Body())
    monkeypatch.setattr(sample, "check_request", checked)
    with opened(server, 1, request(HM)) as (client,):
        assert b"400" in client.recv(100)
        wait_for(lambda: kept and kept[0]() is None, 5)


def test_of_very_many_connections_some_are_closed(server, client):
    with opened(server, sample.MOST["threads"] + 20) as made:
        wait_for(lambda: len(select.select(made, [], [], 0)[0]) >= 20)
        closed = select.select(made, [], [], 0)[0]
        assert len(closed) < 60 and all(s.recv(10) == b"" for s in closed)
    wait_for(lambda: threading.active_count() < 60)
    assert ask(client, user("Hm?")).usage.completion_tokens == MOST


def test_several_at_once_are_each_answered_as_alone(client, net):
    questions = [f"What is in clip number {i}?" for i in range(4)]
    found = {}

    def work(i):
        found[i] = streamed(client, user(sound(CLIPS[i]), questions[i]))

    threads = [threading.Thread(target=work, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: net.answer(questions[i], [CLIPS[i]], MOST) for i in range(4)}


# --- as a program


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_it_in_the_middle_of_an_answer(home, sent, code):
    command = [sys.executable, str(ROOT / "sample.py"), "--weights", str(home / "weights")]
    program = subprocess.Popen(
        [*command, "--serve", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    line = program.stdout.readline()
    found = re.fullmatch(r"weights on http://(127\.0\.0\.1):(\d+)/v1\n", line)
    with socket.create_connection((found[1], int(found[2])), timeout=60) as s:
        s.sendall(request(STREAM.replace(b"tiny", b"weights")))
        assert b"200 OK" in s.recv(1 << 16)
        program.send_signal(sent)
        out, err = program.communicate(timeout=60)
    assert (program.returncode, out, err) == (code, "", "")


def refused(capsys, *words):
    with pytest.raises(SystemExit) as end:
        sample.parse(["--weights", "x", *words])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "--serve" in err


def test_where_it_cannot_listen(server, capsys, monkeypatch):
    for port in ("port", "70000", "-1", "1:2:3", "http://x:1", ""):
        refused(capsys, f"--serve={port}")
    refused(capsys, "--serve", "0", "--ask", "x")
    refused(capsys, "--serve", "0", "--why")
    words = ["--weights", "x", "--serve", str(server.server_address[1])]
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    monkeypatch.setattr(sample, "load_net", never)  # it is told before the weights are read
    with pytest.raises(prepare.BadInput, match="--serve: cannot listen there"):
        sample.main()
    assert sample.parse(["--weights", "x", "--serve", "0.0.0.0:80"]).serve == ("0.0.0.0", 80)
