"""Snapshots of hub repositories, in the hub library's own cache. Weights are fetched so that a
download which was killed goes on within the file, at the next start of any process:

    blobs/<etag>.incomplete ──grows, Range: bytes=<size>-──► blobs/<etag> ──► snapshots/<commit>/name

The library names its partial files at random and starts each again (since version 2, because locks
fail on some network filesystems). So two processes on such a filesystem must not fetch the same
model at once; what they would spoil is found by its hash when `download-weights` verifies it.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.weights.once import locked

# Patterns of other formats of the same weights, which can be many times larger.
UNWANTED = ("original/*", "onnx/*", "consolidated*", "*/*", "training_args.bin", "optimizer.bin")

_WEIGHTS = (".safetensors", ".bin")
_AT_ONCE = 4  # files


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository at a revision, and the cache for it (None is the library's own). `has_bars`: the
    library shows how far it is; else who asks does."""

    model_id: str
    revision: str | None = None
    cache_dir: str | None = None
    has_bars: bool = False

    def planned(self, patterns: Sequence[str]) -> list[Any]:
        """What `snapshot` would fetch or find: the library's `DryRunFileInfo`s.

        Raises the library's DryRunError when the hub cannot be asked.
        """
        return self._library_snapshot(patterns, dry_run=True)

    def snapshot(self, patterns: Sequence[str]) -> Path:
        """The folder with all files that match; what the cache lacks is fetched. Raises the
        library's errors."""
        from huggingface_hub import errors

        with suppress(errors.DryRunError):  # offline: the library looks into the cache
            self._fetch_weights(self.planned(patterns))
        return Path(self._library_snapshot(patterns))

    def _fetch_weights(self, files: Sequence[Any]) -> None:
        """Bring large files to where the library would; it then finds them there."""
        missing = [one for one in files if one.will_download and one.filename.endswith(_WEIGHTS)]
        if not missing:
            return
        with ThreadPoolExecutor(_AT_ONCE, "download") as pool:
            jobs = [pool.submit(self._fetch, file) for file in missing]
            try:
                for job in jobs:
                    job.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _fetch(self, file: Any) -> None:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.model_id, file.filename, revision=file.commit_hash)
        found = get_hf_file_metadata(url)
        if found.etag is None or (found.size or 0) > constants.MAX_HTTP_DOWNLOAD_SIZE:
            return  # not to be had this way; the library knows others
        repository = Path(file.local_path).parents[2]
        blob = repository / "blobs" / found.etag
        partial = blob.with_name(f"{blob.name}.incomplete")
        # The library's own lock of this file.
        lock = repository.parent / ".locks" / repository.name / f"{found.etag}.lock"
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(lock):
            if blob.exists():  # fetched while we waited
                return
            with partial.open("ab") as stream:
                if found.size is not None and stream.tell() > found.size:
                    stream.truncate(0)
                http_get(
                    url,
                    stream,
                    resume_size=stream.seek(0, 2),
                    headers=build_hf_headers(),
                    expected_size=found.size,
                    tqdm_class=None if self.has_bars else _quiet_bars(),
                )
            partial.rename(blob)

    def _library_snapshot(self, patterns: Sequence[str], *, dry_run: bool = False) -> Any:
        from huggingface_hub import snapshot_download

        return snapshot_download(
            self.model_id,
            revision=self.revision,
            cache_dir=self.cache_dir,
            allow_patterns=list(patterns),
            ignore_patterns=list(UNWANTED),
            tqdm_class=None if self.has_bars else _quiet_bars(),
            dry_run=dry_run,
        )


def _quiet_bars() -> type:
    """The library's progress bars, invisible."""
    from tqdm import tqdm

    class Quiet(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **options | {"disable": True})

    return Quiet
