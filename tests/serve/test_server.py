"""`fulmen serve` as a process: signals while streams run, clients that are killed, what it leaves behind."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
import torch

from fulmen.checkpoint import save_model
from fulmen.model import LanguageModel, ModelConfig
from fulmen.serve import server

ENDLESS = {"model": "tiny", "prompt": "state", "max_tokens": 90_000, "ignore_eos": True, "stream": True}
SHORT = ENDLESS | {"max_tokens": 30}
CLIENT = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.sendall(sys.argv[2].encode())
while chunk := connection.recv(4096):
    print(len(chunk), flush=True)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, tokenizer):
    """With positions for an answer that does not end within a test."""
    torch.manual_seed(0)
    config = ModelConfig(**{**vars(model.config), "max_positions": 100_000})
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_model(LanguageModel(config), folder, tokenizer=tokenizer)
    return folder


@pytest.fixture
def start(checkpoint):
    """start(*arguments) gives (process, port) once requests are taken."""
    begun = []

    def make(*arguments):
        command = [sys.executable, "-m", "fulmen", "serve", checkpoint, "--port", "0", "--memory", "0.1", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        )
        begun.append(process)
        line = process.stderr.readline()
        found = re.match(r"tiny: chat at http://127\.0\.0\.1:(\d+)/, API at http://127\.0\.0\.1:\1/v1\n", line)
        assert found, line + process.stderr.read()
        return process, int(found[1])

    yield make
    for process in begun:
        process.kill()
        process.communicate()


class Stream(threading.Thread):
    """A request whose events are read in a thread; `begun` is set at the first."""

    def __init__(self, port, body):
        super().__init__(daemon=True)
        self.port, self.body, self.events, self.begun = port, body, [], threading.Event()
        self.start()
        assert self.begun.wait(60)

    def run(self):
        with httpx.stream("POST", url(self.port), json=self.body, timeout=60) as response:
            for line in response.iter_lines():
                if line:
                    self.events.append(line.removeprefix("data: "))
                    self.begun.set()

    def ended(self):
        """(why, or the error's code) of a stream that ended with [DONE]."""
        self.join(60)
        *_, last, done = self.events
        assert done == "[DONE]"
        last = json.loads(last)
        return last["error"]["code"] if "error" in last else last["choices"][0]["finish_reason"]


def url(port, path="/v1/completions"):
    return f"http://127.0.0.1:{port}{path}"


def request(body):
    """As it is sent."""
    text = json.dumps(body)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\nContent-Type: application/json"
    return f"{head}\r\n\r\n{text}"


def is_listening(port):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionError:
        return False
    return True


def held(port):
    """Pages, sequences and requests, but for the one that asks."""
    names = "pages_in_use|requests_running|requests_waiting|http_requests_in_flight"
    found = re.findall(rf"^fulmen_(?:{names}) (\S+)$", httpx.get(url(port, "/metrics")).text, re.MULTILINE)
    assert len(found) == 4
    return sum(map(float, found)) - 1


def test_sigterm_lets_answers_end_and_breaks_off_what_takes_too_long(start):
    process, port = start("--grace", "1")
    endless, short = Stream(port, ENDLESS), Stream(port, SHORT)
    process.send_signal(signal.SIGTERM)
    assert short.ended() == "length"
    assert endless.ended() == "not_ready"
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not is_listening(port)
    assert process.stderr.read() == "stopping: 1 requests are broken off\n"


def test_a_killed_client_frees_memory_and_a_second_ctrl_c_breaks_off(start):
    process, port = start("--grace", "600")
    client = subprocess.Popen([sys.executable, "-c", CLIENT, str(port), request(ENDLESS)], stdout=subprocess.PIPE)
    assert client.stdout.readline()
    assert held(port) > 0
    client.kill()
    client.communicate()
    while held(port):
        pass  # pytest's time limit ends it if nothing is let go
    endless = Stream(port, ENDLESS)
    process.send_signal(signal.SIGINT)
    while is_listening(port):
        pass
    assert endless.is_alive()
    process.send_signal(signal.SIGINT)
    assert endless.ended() == "not_ready"
    assert process.wait(60) == 128 + signal.SIGINT
    assert "Traceback" not in process.stderr.read()


def test_who_does_not_read_does_not_keep_the_server(engine, monkeypatch, capsys):
    monkeypatch.setattr(server, "LAST_RESORT", 0.1)
    body = SHORT | {"max_tokens": 350, "logprobs": 5}  # much more than fits into the buffers
    with socket.socket() as listening, socket.socket() as client:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listening.bind(("127.0.0.1", 0))
        address = listening.getsockname()

        def ask():
            client.connect(address)
            client.sendall(request(body).encode())
            client.recv(1)
            os.kill(os.getpid(), signal.SIGTERM)

        asker = threading.Thread(target=ask)
        serving = server.serve(engine, listening, model_name="tiny", when_ready=asker.start)
        assert asyncio.run(serving) == signal.SIGTERM
        asker.join()
    assert not engine.has_work
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("sees", [True, False])
def test_images_are_taken_as_it_is_told(request, monkeypatch, sees):
    """A model without eyes takes none, whatever it is told."""
    engine = request.getfixturevalue("seeing_engine" if sees else "engine")
    made = []

    def create_app(_, **settings):
        made.append(settings["images"])
        raise RuntimeError("enough")

    monkeypatch.setattr(server, "create_app", create_app)
    with pytest.raises(RuntimeError, match="enough"):
        asyncio.run(server.serve(engine, None, model_name="tiny", max_images=3, allow_image_urls=True))
    (images,) = made
    assert (images is not None) == sees
    if sees:
        assert (images.max_images, images._allow_urls, images.image_token) == (3, True, engine.image_token)
        assert images._pool._shutdown
