"""Finds the files of a model: a local folder, the hub's cache, or the hub. Knows neither tensors
nor families."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What an engine reads. Other formats of the same weights can be many times larger.
WANTED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "*.txt",
)
UNWANTED = ("original/*", "onnx/*", "consolidated*", "*/*")


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
        others = sorted(file.name for file in self.path.glob("*.bin"))
        hint = (
            f"; it has {others[0]}, which must be converted to safetensors first" if others else ""
        )
        raise ModelFilesError(
            f"{self.path} has no model.safetensors and no index of several files{hint}"
        )


def find_model(
    model_id: str, *, revision: str | None = None, cache_dir: str | None = None
) -> ModelFolder:
    """The model's folder; what the hub's cache lacks is downloaded, unless HF_HUB_OFFLINE forbids
    it.

    Raises:
        ModelFilesError: there is no such folder or repository, or it may not be read.
    """
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return ModelFolder(folder)
    if model_id.startswith((".", "/", "~")):
        raise ModelFilesError(f"there is no folder {folder}")
    return _from_hub(model_id, revision, cache_dir)


def _from_hub(model_id: str, revision: str | None, cache_dir: str | None) -> ModelFolder:
    from huggingface_hub import errors, snapshot_download

    try:
        path = snapshot_download(
            model_id,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
        )
    except errors.GatedRepoError as error:
        raise ModelFilesError(
            f"{model_id} is gated: accept its terms on the hub, then log in with a token that may read it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelFilesError(
            f"there is no folder and no hub repository called {model_id}, or it is private and needs a token"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelFilesError(f"{model_id} has no revision {revision}") from error
    except errors.HFValidationError as error:
        raise ModelFilesError(
            f"{model_id!r} is neither a folder nor a hub id like `owner/name`"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelFilesError(
            f"{model_id} is not in the hub's cache on this machine, and the hub cannot be reached (or is switched off)"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ModelFilesError(f"the hub did not give the files of {model_id}: {error}") from error
    # The cache keeps each commit in a folder of its own: .../snapshots/<commit>.
    return ModelFolder(Path(path), revision=Path(path).name)
