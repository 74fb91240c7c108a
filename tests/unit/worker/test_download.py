"""`download-weights` against a hub on the loopback that speaks as much of the hub's protocol as the real
library needs: the library is not replaced."""

import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from worker.weights.progress import Progress

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "f" * 40
CONFIG = b'{"architectures": ["LlamaForCausalLM"]}'


@dataclass
class FakeHub:
    """Repositories by name; `cut` breaks the connection after so many bytes of a file, once."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)  # files that always end in an error
    damaged: set[str] = field(default_factory=set)
    stall: dict[str, int] = field(default_factory=dict)  # as `cut`, but silent until `resume`
    stalled: threading.Event = field(default_factory=threading.Event)
    resume: threading.Event = field(default_factory=threading.Event)
    ignores_ranges: bool = False
    downloads: list[tuple[str, int]] = field(default_factory=list)  # (file, first byte)
    url: str = ""

    def find(self, repository: str, revision: str) -> tuple[int, str]:
        """Status and the hub's error code of a look-up."""
        if repository in self.gated:
            return 403, "GatedRepo"
        if repository not in self.repositories:
            return 401, "RepoNotFound"
        return (200, "") if revision in ("main", "v1", COMMIT) else (404, "RevisionNotFound")


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/(\w+/\w+)/revision/(.+)", path):
            self.answer(match, self.info)
        elif match := re.fullmatch(r"/api/models/(\w+/\w+)/tree/([^/]+)/?", path):
            self.answer(match, self.tree)
        elif match := re.fullmatch(r"/(\w+/\w+)/resolve/([^/]+)/(.+)", path):
            self.answer(match, lambda repository: self.file(repository, match[3]))
        else:
            self.reply(404, b"{}")

    def answer(self, match, give):
        status, code = self.hub.find(match[1], match[2])
        if code:
            self.reply(status, b'{"error": "no"}', {"X-Error-Code": code})
        else:
            give(match[1])

    def reply(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def info(self, repository):
        files = [{"rfilename": name} for name in self.hub.repositories[repository]]
        document = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": files}
        self.reply(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def tree(self, repository):
        rows = []
        for name, data in self.hub.repositories[repository].items():
            row = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
            if is_large(name):
                sha256 = hashlib.sha256(data).hexdigest()
                row["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
            rows.append(row)
        self.reply(200, json.dumps(rows).encode(), {"Content-Type": "application/json"})

    def file(self, repository, name):
        data = self.hub.repositories[repository][name]
        etag = hashlib.sha256(data).hexdigest() if is_large(name) else git_hash(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if name in self.hub.damaged:
            data = bytes(len(data))
        first, status = 0, 200
        wanted = "" if self.hub.ignores_ranges else self.headers.get("Range", "")
        if match := re.fullmatch(r"bytes=(\d+)-", wanted):
            first, status = int(match[1]), 206
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if self.command == "HEAD":
            self.reply(200, data, headers)
            return
        self.hub.downloads.append((name, first))
        if name in self.hub.broken:
            self.reply(500, b"")
            return
        size = self.hub.cut.pop(name, None) or self.hub.stall.get(name)
        if size is None:
            self.reply(status, data[first:], headers)
            return
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data) - first), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data[first : first + size])
        if self.hub.stall.pop(name, None):
            self.hub.stalled.set()
            self.hub.resume.wait(60)
        self.close_connection = True


def until(is_so):
    """Wait for what other processes do to files."""
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_large(name):
    return name.endswith((".safetensors", ".bin"))


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def hub():
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def tokenfleet(hub, tmp_path):
    """Runs the command in a process of its own: the library reads the environment when imported."""

    def command(arguments, environment):
        variables = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HOME": str(tmp_path),
            "PATH": "",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **environment,
        }
        command = [sys.executable, "-m", "common.cli", "download-weights", *arguments]
        return {"args": command, "cwd": Path(__file__).parents[3], "env": variables}

    def run(*arguments, **environment):
        options = {"capture_output": True, "text": True, "timeout": 100}
        return subprocess.run(**command(arguments, environment), check=False, **options)

    run.start = lambda *arguments: subprocess.Popen(**command(arguments, {}))
    return run


def weights(tmp_path, *, seed=0, columns=100):
    """The bytes of a safetensors file."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"a": torch.randn(64, columns, generator=generator)}
    save_file(tensors, tmp_path / "made.safetensors")
    return (tmp_path / "made.safetensors").read_bytes()


def bin_weights(tmp_path):
    torch.save({"a": torch.arange(6.0)}, tmp_path / "made.bin")
    return (tmp_path / "made.bin").read_bytes()


def failure(done):
    """The one sentence of a failed command."""
    assert done.returncode == 1 and done.stdout == "", done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0].removeprefix("Error: ")


def test_download_then_again_then_offline(hub, tokenfleet, tmp_path):
    data = weights(tmp_path)
    hub.repositories["some/model"] = {
        "config.json": CONFIG,
        "model.safetensors": data,
        "pytorch_model.bin": b"the same in another format",
        "training_args.bin": b"nobody needs it",
        "onnx/model.onnx": b"nor this",
    }
    first = tokenfleet("some/model")
    folder = Path(first.stdout.strip())
    assert first.returncode == 0, first.stderr
    assert folder.name == COMMIT and folder.is_relative_to(tmp_path / "home")
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == data
    assert re.search(r"Downloading some/model: 2 files, 0\.0 MB: done in", first.stderr)
    assert "Verifying 1 files: done" in first.stderr and "\r" not in first.stderr
    hub.downloads.clear()
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        again = tokenfleet("some/model", "--revision", "main", **environment)
        assert again.returncode == 0, again.stderr
        assert again.stdout == first.stdout
        assert "Files are already present in the local cache" in again.stderr
    assert hub.downloads == []


def test_broken_connection_goes_on_where_it_was(hub, tokenfleet, tmp_path):
    data = weights(tmp_path, columns=50_000)
    hub.repositories["some/model"] = {"config.json": CONFIG, "model.safetensors": data}
    cut = hub.cut["model.safetensors"] = 12_000_000  # the library counts pieces of 10 MiB
    done = tokenfleet("some/model")
    assert done.returncode == 0, done.stderr
    starts = [start for name, start in hub.downloads if name == "model.safetensors"]
    assert starts[0] == 0 and 0 < starts[1] <= cut and len(starts) == 2
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == data


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_killed_download_goes_on_within_its_file(hub, tokenfleet, tmp_path, ignores_ranges):
    data = weights(tmp_path, columns=90_000)
    hub.repositories["some/model"] = {"config.json": CONFIG, "model.safetensors": data}
    hub.stall["model.safetensors"] = 12_000_000  # more than the library's pieces of 10 MiB
    process = tokenfleet.start("some/model")
    assert hub.stalled.wait(60)
    blobs = tmp_path / "home" / "hub" / "models--some--model" / "blobs"
    until(lambda: any(file.stat().st_size > 10_000_000 for file in blobs.glob("*.incomplete")))
    process.kill()
    process.wait()
    hub.resume.set()
    (partial,) = blobs.glob("*.incomplete")
    size = partial.stat().st_size
    hub.downloads.clear()
    hub.ignores_ranges = ignores_ranges
    done = tokenfleet("some/model")
    assert done.returncode == 0, done.stderr
    starts = [start for name, start in hub.downloads if name == "model.safetensors"]
    assert starts == [0 if ignores_ranges else size]
    assert (Path(done.stdout.strip()) / "model.safetensors").read_bytes() == data
    assert not list(blobs.glob("*.incomplete"))


def test_interrupted_download_keeps_the_files_that_arrived(hub, tokenfleet, tmp_path):
    parts = {f"model-{n}.safetensors": weights(tmp_path, seed=n) for n in (1, 2)}
    hub.repositories["some/model"] = {"config.json": CONFIG, **parts}
    hub.broken = {"model-2.safetensors"}
    assert "the hub did not give the files of some/model" in failure(tokenfleet("some/model"))
    hub.broken = set()
    hub.downloads.clear()
    assert tokenfleet("some/model").returncode == 0
    assert {name for name, _ in hub.downloads} == {"config.json", "model-2.safetensors"}


def test_damaged_file_is_found_and_deleted(hub, tokenfleet, tmp_path):
    hub.repositories["some/model"] = {"config.json": CONFIG, "model.safetensors": weights(tmp_path)}
    hub.damaged = {"model.safetensors"}
    assert "was damaged and has been deleted" in failure(tokenfleet("some/model"))
    hub.damaged = set()
    done = tokenfleet("some/model")
    assert done.returncode == 0, done.stderr
    assert load_file(Path(done.stdout.strip()) / "model.safetensors")["a"].shape == (64, 100)


def test_bin_files_are_converted(hub, tokenfleet, tmp_path):
    files = {"config.json": CONFIG, "pytorch_model.bin": bin_weights(tmp_path)}
    hub.repositories["old/model"] = files | {"optimizer.bin": b"x"}
    refusal = failure(tokenfleet("old/model", "--no-auto-convert"))
    assert refusal.startswith("old/model has no .safetensors files; --auto-convert makes them")
    plain = tokenfleet("old/model", "--extension", ".bin")
    assert plain.returncode == 0, plain.stderr
    assert not list(Path(plain.stdout.strip()).glob("*.safetensors"))
    done = tokenfleet("old/model")
    assert done.returncode == 0, done.stderr
    assert "Converting 1 .bin files to safetensors: done" in done.stderr
    assert load_file(Path(done.stdout.strip()) / "model.safetensors")["a"].tolist() == [*range(6)]
    offline = tokenfleet("old/model", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and offline.stdout == done.stdout, offline.stderr


def test_adapter_beside_bin_files_is_no_reason_to_leave_them(hub, tokenfleet, tmp_path):
    files = {"config.json": CONFIG, "pytorch_model.bin": bin_weights(tmp_path)}
    hub.repositories["old/model"] = files | {"adapter_model.safetensors": weights(tmp_path)}
    done = tokenfleet("old/model")
    assert done.returncode == 0, done.stderr
    assert load_file(Path(done.stdout.strip()) / "model.safetensors")["a"].tolist() == [*range(6)]


def test_revisions(hub, tokenfleet, tmp_path):
    hub.repositories["some/model"] = {"config.json": CONFIG, "model.safetensors": weights(tmp_path)}
    done = tokenfleet("some/model", "--revision", "v1")
    assert done.returncode == 0 and done.stdout.strip().endswith(COMMIT)
    refusal = failure(tokenfleet("some/model", "--revision", "v2"))
    assert refusal == "some/model has no revision v2"


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("shut/model", "shut/model is gated: accept its terms on the hub, then log in"),
        ("no/model", "there is no folder and no hub repository called no/model"),
        ("empty/model", "empty/model has no .safetensors files"),
        ("a//b", "'a//b' is neither a folder nor a hub id like `owner/name`"),
        ("./nowhere", "there is no folder nowhere"),
        ("nowhere.gguf", "there is no file nowhere.gguf"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(hub, tokenfleet, model, sentence):
    hub.gated = {"shut/model"}
    hub.repositories["empty/model"] = {"config.json": CONFIG}
    assert failure(tokenfleet(model)).startswith(sentence)


@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_without_a_network(tokenfleet, environment):
    sentence = "some/model is not in the hub's cache on this machine, and the hub cannot be reached"
    assert failure(tokenfleet("some/model", **environment)).startswith(sentence)


def test_local_folder(tokenfleet, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert "no model.safetensors and no index" in failure(tokenfleet(str(folder)))
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "pytorch_model.bin").write_bytes(bin_weights(tmp_path))
    done = tokenfleet(str(folder))
    assert done.returncode == 0 and done.stdout.strip() == str(folder), done.stderr
    assert load_file(folder / "model.safetensors")["a"].tolist() == [*range(6)]


def test_progress_on_a_terminal_and_elsewhere(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("worker.weights.progress.time.monotonic", lambda: now[0])

    def told(is_terminal):
        lines = []
        progress = Progress(lines.append, is_terminal=is_terminal)
        now[0] = 0.0
        with progress.stage("Work"):
            for step in range(1, 5):
                now[0] = step * 6.0
                progress.update(step / 4)
        return "".join(lines)

    assert told(True).count("\r") == 5 and "Work 50 %, 12 s left" in told(True)
    assert (
        told(False) == "Work\nWork: 50 %, 12 s left\nWork: 100 %, 0 s left\nWork: done in 24.0 s\n"
    )
