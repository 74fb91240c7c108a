"""The `download-weights` command: fetch a model into the hub's cache, ready to be served from there.

What is broken off goes on where it was, within a file too, whether a connection broke or the process
was killed. Files whose hash the hub tells are compared with it.
"""

import hashlib
import re
import threading
from dataclasses import dataclass
from pathlib import Path

import click

from common.errors import FleetError
from worker.weights.files import (
    BIN_FILES,
    WANTED,
    ModelFilesError,
    ModelFolder,
    explained_hub_errors,
    has_safetensors,
    is_safetensors,
    local_path,
)
from worker.weights.hub import HubModel
from worker.weights.progress import Progress, on_stderr

SAFETENSORS, BIN = ".safetensors", ".bin"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LOOK_S = 0.5
_PRESENT = "Files are already present in the local cache. Skipping download."


@dataclass(frozen=True, slots=True)
class Download:
    """Which files of which repository, into which cache (None is the hub library's own)."""

    model_id: str
    revision: str | None = None
    cache_dir: str | None = None
    extension: str = SAFETENSORS
    can_convert: bool = True

    @property
    def hub_model(self) -> HubModel:
        return HubModel(self.model_id, self.revision, self.cache_dir)


def download_model(wanted: Download, progress: Progress) -> ModelFolder:
    """Fetch and verify the files; the folder in the cache. Needs no network for what is there.

    Raises:
        ModelFilesError: one sentence on why it cannot be had.
    """
    with explained_hub_errors(wanted.model_id, wanted.revision):
        folder = _fetch(wanted, progress)
    extensions = {file.suffix for file in folder.path.iterdir()}
    if not extensions & {wanted.extension, BIN}:
        raise ModelFilesError(f"{wanted.model_id} has no {wanted.extension} files")
    _verify(folder.path, progress)
    return folder


def _fetch(wanted: Download, progress: Progress) -> ModelFolder:
    """Download what the cache lacks, and tell how far it is."""
    from huggingface_hub import errors

    try:
        files = wanted.hub_model.planned((*WANTED, *BIN_FILES))
    except errors.DryRunError:  # the hub cannot be asked; the library knows why, if it matters
        return _from_cache(wanted, progress)
    as_bin = _chooses_bin(wanted, any(is_safetensors(file.filename) for file in files))
    other = SAFETENSORS if as_bin else BIN
    missing = [f for f in files if f.will_download and not f.filename.endswith(other)]
    if not missing:
        progress.note(_PRESENT)
        return _snapshot(wanted, as_bin)
    num_bytes = sum(file.file_size or 0 for file in missing)
    text = f"Downloading {wanted.model_id}: {len(missing)} files, {num_bytes / 1e6:.1f} MB"
    blobs = Path(missing[0].local_path).parents[2] / "blobs"
    with progress.stage(text), _watched(blobs, num_bytes, progress):
        return _snapshot(wanted, as_bin)


def _from_cache(wanted: Download, progress: Progress) -> ModelFolder:
    """What an earlier download left. Raises the library's errors when it lacks something."""
    folder = None
    if wanted.extension == SAFETENSORS:
        folder = _snapshot(wanted, as_bin=False)
    if _chooses_bin(wanted, folder is not None and has_safetensors(folder.path)):
        folder = _snapshot(wanted, as_bin=True)
    assert folder is not None
    progress.note(_PRESENT)
    return folder


def _chooses_bin(wanted: Download, is_there: bool) -> bool:
    if wanted.extension == SAFETENSORS and not is_there and not wanted.can_convert:
        raise ModelFilesError(
            f"{wanted.model_id} has no .safetensors files; --auto-convert makes them of its "
            ".bin files, and --extension .bin downloads those as they are"
        )
    return wanted.extension == BIN or not is_there


def _snapshot(wanted: Download, as_bin: bool) -> ModelFolder:
    patterns: tuple[str, ...] = WANTED
    if as_bin:
        patterns = (*(one for one in WANTED if "safetensors" not in one), *BIN_FILES)
    path = wanted.hub_model.snapshot(patterns)
    return ModelFolder(path, revision=path.name)


class _watched:
    """While it is open, a thread compares what lies in a cache folder with what is to come."""

    def __init__(self, blobs: Path, num_bytes: int, progress: Progress) -> None:
        self._blobs = blobs
        self._num_bytes = num_bytes
        self._progress = progress
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="download-progress", daemon=True)

    def __enter__(self) -> None:
        self._before = self._stored()
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._is_done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_done.wait(_LOOK_S):
            fetched = max(0, self._stored() - self._before)
            self._progress.update(min(fetched / max(self._num_bytes, 1), 1.0))

    def _stored(self) -> int:
        total = 0
        for file in self._blobs.glob("*"):
            try:
                total += file.stat().st_size
            except FileNotFoundError:  # it was just given its final name
                continue
        return total


def _verify(folder: Path, progress: Progress) -> None:
    """Compare large files with their SHA-256, by which the cache names them.

    Raises ModelFilesError for a damaged file, which is then gone.
    """
    blobs = [file.resolve() for file in sorted(folder.iterdir())]
    named = [blob for blob in blobs if blob.is_file() and _SHA256.fullmatch(blob.name)]
    if not named:
        return
    with progress.stage(f"Verifying {len(named)} files"):
        for done, blob in enumerate(named):
            with blob.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != blob.name:
                blob.unlink()
                raise ModelFilesError(
                    f"a file of {folder} was damaged and has been deleted: its SHA-256 is {found}, "
                    f"not {blob.name}. Download the model again"
                )
            progress.update((done + 1) / len(named))


def prepared(wanted: Download, progress: Progress) -> Path:
    """The model's folder with weights as they were asked for, from the hub or from this machine."""
    from worker.weights.prepare import prepare_model, with_safetensors

    path = local_path(wanted.model_id)
    is_converting = wanted.extension == SAFETENSORS and wanted.can_convert
    if path is not None:
        if not is_converting:
            return path
        folder = prepare_model(wanted.model_id, cache_dir=wanted.cache_dir, progress=progress)
        folder.weight_files()  # raises when something is missing
        return folder.path
    folder = download_model(wanted, progress)
    if is_converting:
        folder = with_safetensors(folder, cache_dir=wanted.cache_dir, progress=progress)
    return folder.path


@click.command("download-weights")
@click.argument("model_id")
@click.option("--revision", envvar="REVISION", help="Hub revision: branch, tag or commit.")
@click.option(
    "--extension",
    type=click.Choice([SAFETENSORS, BIN]),
    default=SAFETENSORS,
    show_default=True,
    help="Which kind of weight files.",
)
@click.option(
    "--auto-convert/--no-auto-convert",
    default=True,
    show_default=True,
    help="Make .safetensors of .bin files when a model has no others.",
)
@click.option(
    "--huggingface-hub-cache", envvar="HUGGINGFACE_HUB_CACHE", help="Folder of the hub cache."
)
def command(
    model_id: str,
    revision: str | None,
    extension: str,
    auto_convert: bool,
    huggingface_hub_cache: str | None,
) -> None:
    """Download MODEL_ID's files, or convert those of a local folder or GGUF file. Prints the folder.

    Interrupted downloads go on. HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE count as everywhere.
    """
    wanted = Download(model_id, revision, huggingface_hub_cache, extension, auto_convert)
    try:
        click.echo(prepared(wanted, on_stderr()))
    except (FleetError, ModelFilesError) as error:
        raise click.ClickException(str(error)) from error
