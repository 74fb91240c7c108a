"""A model's folder as the loader needs it, whatever was named: a folder, a hub id or a GGUF file.
What is not safetensors is converted, once."""

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

from worker.weights.files import (
    ModelFilesError,
    ModelFolder,
    bin_files,
    find_model,
    has_safetensors,
    local_path,
)
from worker.weights.once import locked, made_once
from worker.weights.progress import Progress, silent

log = logging.getLogger(__name__)


def prepare_model(
    model_id: str,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    progress: Progress | None = None,
) -> ModelFolder:
    """Find or download the model, and convert its weights if they are not safetensors.

    Raises:
        ModelFilesError: one sentence on what is missing or cannot be read.
    """
    progress = progress or silent()
    path = local_path(model_id)
    if path is not None and path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path, conversions_folder(cache_dir), progress)
    folder = find_model(model_id, revision=revision, cache_dir=cache_dir)
    return with_safetensors(folder, cache_dir=cache_dir, progress=progress)


def with_safetensors(
    folder: ModelFolder, *, cache_dir: str | None = None, progress: Progress | None = None
) -> ModelFolder:
    """The folder itself if it has safetensors, or once its `.bin` files are converted: beside them,
    or where that may not be written, in a cache folder that links to the other files."""
    if has_safetensors(folder.path):
        return folder
    sources = bin_files(folder)
    if not sources:
        return folder  # whose own error says what it lacks
    progress = progress or silent()
    if os.access(folder.path, os.W_OK):
        _convert_beside(folder, sources, progress)
        return folder
    target = conversions_folder(cache_dir) / _key(folder.path, sources)

    def make(partial: Path) -> Path:
        _convert(sources, partial, progress)
        for file in folder.path.iterdir():
            if file.is_file() and file.suffix != ".bin" and not file.name.startswith("."):
                (partial / file.name).symlink_to(file.resolve())
        return partial

    return ModelFolder(made_once(target, make), revision=folder.revision)


def conversions_folder(cache_dir: str | None) -> Path:
    """Where conversions are kept: in the hub's cache folder, or beside it."""
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HOME).expanduser() / "tokenfleet"


def _from_gguf(source: Path, cache: Path, progress: Progress) -> ModelFolder:
    target = cache / _key(source, [source])

    def make(partial: Path) -> Path:
        from worker.weights.gguf import convert_gguf

        log.info("converting %s to safetensors in %s", source.name, target)
        try:
            with progress.stage(f"Converting {source.name} to safetensors"):
                convert_gguf(source, partial, on_progress=progress.update)
        except ModuleNotFoundError as error:
            raise ModelFilesError(
                "GGUF files are read with the Python package 'gguf', which is missing: "
                "`pip install 'tokenfleet[local]'`"
            ) from error
        except (ValueError, KeyError, IndexError) as error:
            reason = f"its metadata lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ModelFilesError(f"{source} cannot be used: {reason}") from error
        return partial

    return ModelFolder(made_once(target, make))


def _convert_beside(folder: ModelFolder, sources: list[Path], progress: Progress) -> None:
    with locked(folder.path / ".tokenfleet-convert.lock"):
        if has_safetensors(folder.path):  # converted while we waited
            return
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=folder.path) as partial:
            for file in _convert(sources, Path(partial), progress):
                file.rename(folder.path / file.name)


def _convert(sources: list[Path], folder: Path, progress: Progress) -> list[Path]:
    from worker.weights.convert import convert_bin_files  # brings torch along, which takes seconds

    needed = sum(source.stat().st_size for source in sources)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelFilesError(
            f"converting to safetensors needs {needed / 2**30:.1f} GiB in {folder.parent}, "
            f"where {free / 2**30:.1f} GiB are free"
        )
    log.info("converting %d .bin files to safetensors", len(sources))
    with progress.stage(f"Converting {len(sources)} .bin files to safetensors"):
        return convert_bin_files(sources, folder, on_progress=progress.update)


def _key(path: Path, sources: list[Path]) -> str:
    """A folder's name for conversions of these files as they are now."""
    digest = hashlib.sha256(str(path.resolve()).encode())
    for source in sources:
        facts = source.stat()
        digest.update(f"{source.name} {facts.st_size} {facts.st_mtime_ns}".encode())
    return f"{path.stem}-{digest.hexdigest()[:12]}"
