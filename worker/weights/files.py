"""Finds the files of a model: a local folder, the hub's cache, or the hub. Knows neither tensors
nor families; `prepare.py` converts what is not safetensors."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.weights.hub import HubModel

# What an engine reads. Other formats of the same weights can be many times larger.
WANTED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "*.txt",
    "*.py",  # a checkpoint's own code: small, and not run without --trust-remote-code
)
BIN_FILES = ("*.bin", "*.bin.index.json")  # of models that have no safetensors

# The names of weights that the loader reads, and of their index. Others lie beside them: adapters,
# or the same weights in another layout.
_SAFETENSORS = re.compile(r"model(-.*)?\.safetensors|model\.safetensors\.index\.json")

# In the names of `.bin` files beside the weights, for example training_args.bin.
_NO_WEIGHTS = ("arguments", "args", "training", "optimizer", "scheduler", "rng_state")


class ModelFilesError(ValueError):
    """A model's files cannot be had; the message is one sentence that says why and what to do."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder with a model's files, as transformers' `save_pretrained` lays them out."""

    path: Path
    revision: str = ""  # the hub's commit, if it came from there

    def json(self, name: str) -> dict[str, Any]:
        """The parsed file, or an empty dict if there is none. Raises ModelFilesError."""
        path = self.path / name
        if not path.is_file():
            return {}
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelFilesError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise ModelFilesError(f"{path} must hold a JSON object")
        return value

    def config(self) -> dict[str, Any]:
        """The parsed config.json. Raises ModelFilesError."""
        config = self.json("config.json")
        if not config:
            raise ModelFilesError(f"{self.path} has no config.json, so it is not a model folder")
        return config

    def weight_files(self) -> list[Path]:
        """The safetensors files in order, each once. Raises ModelFilesError."""
        index: Mapping[str, str] = self.json("model.safetensors.index.json").get("weight_map", {})
        names = sorted(set(index.values())) or ["model.safetensors"]
        files = [self.path / name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if not missing:
            return files
        if index:
            raise ModelFilesError(
                f"{self.path} lacks weight files that its index names: {', '.join(missing)}"
            )
        raise ModelFilesError(f"{self.path} has no model.safetensors and no index of several files")


def bin_files(folder: ModelFolder) -> list[Path]:
    """The `.bin` files with weights, as an index names them, else by their names; may be empty.

    Raises ModelFilesError when the index names files that are not there.
    """
    index: Mapping[str, str] = folder.json("pytorch_model.bin.index.json").get("weight_map", {})
    if not index:
        found = sorted(folder.path.glob("*.bin"))
        return [file for file in found if not any(word in file.name for word in _NO_WEIGHTS)]
    files = [folder.path / name for name in sorted(set(index.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelFilesError(
            f"{folder.path} lacks weight files that its index names: {', '.join(missing)}"
        )
    return files


def has_safetensors(folder: Path) -> bool:
    """Whether there are weights in the format that the loader reads, complete or not."""
    return any(is_safetensors(file.name) for file in folder.glob("*.safetensors*"))


def is_safetensors(name: str) -> bool:
    """Whether a file of this name in a model's folder holds weights that the loader reads."""
    return _SAFETENSORS.fullmatch(name) is not None


def find_model(
    model_id: str, *, revision: str | None = None, cache_dir: str | None = None
) -> ModelFolder:
    """The model's folder; what the hub's cache lacks is downloaded, unless HF_HUB_OFFLINE forbids
    it.

    Raises:
        ModelFilesError: there is no such folder or repository, or it may not be read.
    """
    path = local_path(model_id)
    if path is None:
        return _from_hub(model_id, revision, cache_dir)
    if path.is_file():
        raise ModelFilesError(f"{path} is a file; name the folder that it is in, or a GGUF file")
    return ModelFolder(path)


def local_path(model_id: str) -> Path | None:
    """The folder or file of this name; None for what may be a hub id.

    Raises ModelFilesError for what can only be a path and is not there.
    """
    path = Path(model_id).expanduser()
    if path.exists():
        return path
    if model_id.startswith((".", "/", "~")) or path.suffix == ".gguf":
        kind = "file" if path.suffix == ".gguf" else "folder"
        raise ModelFilesError(f"there is no {kind} {path}")
    return None


def _from_hub(model_id: str, revision: str | None, cache_dir: str | None) -> ModelFolder:
    model = HubModel(model_id, revision, cache_dir, has_bars=True)
    with explained_hub_errors(model_id, revision):
        path = model.snapshot(WANTED)
        if not has_safetensors(path):
            path = model.snapshot(WANTED + BIN_FILES)
    # The cache keeps each commit in a folder of its own: .../snapshots/<commit>.
    return ModelFolder(path, revision=path.name)


@contextmanager
def explained_hub_errors(model_id: str, revision: str | None) -> Iterator[None]:
    """Turn what goes wrong with the hub into a ModelFilesError of one sentence."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelFilesError(
            f"{model_id} is gated: accept its terms on the hub, "
            "then log in with a token that may read it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelFilesError(
            f"there is no folder and no hub repository called {model_id}, "
            "or it is private and needs a token"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelFilesError(f"{model_id} has no revision {revision}") from error
    except errors.HFValidationError as error:
        raise ModelFilesError(
            f"{model_id!r} is neither a folder nor a hub id like `owner/name`"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelFilesError(
            f"{model_id} is not in the hub's cache on this machine, "
            "and the hub cannot be reached (or is switched off)"
        ) from error
    except (errors.HTTPError, OSError) as error:  # the first: whatever the HTTP library raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelFilesError(f"the hub did not give the files of {model_id}: {reason}") from error
