"""Virtual environments for programs that cannot share ours, because they need other versions of what we use.

Each is made from a file of requirements, once: it stays in .cache/environments until the file or Python changes.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache"


def python_with(requirements: Path) -> Path:
    """The interpreter of an environment that has what `requirements` lists. Raises CalledProcessError."""
    text = f"{sys.version}\n{requirements.read_text()}"
    stamp = hashlib.sha256(text.encode()).hexdigest()
    folder = CACHE / "environments" / requirements.stem
    python = folder / "bin" / "python"
    with locked(folder):
        made = folder / "made"
        if made.exists() and made.read_text() == stamp:
            return python
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        _install(python, requirements)
        made.write_text(stamp)
    return python


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be alone with what is made there: two test runs may share a checkout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install(python: Path, requirements: Path) -> None:
    """By our own pip; what is never imported is never compiled."""
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    command = [*pip, "install", "--quiet", "--no-compile", "--requirement", requirements]
    subprocess.run(command, check=True)


def main() -> None:
    """Make the environments that are named, so that no test has to."""
    for name in sys.argv[1:]:
        print(python_with(Path(name)))


if __name__ == "__main__":
    main()
