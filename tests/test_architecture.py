"""The shape of the project, held by tests: what may import what, and that the folder maps are true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("common", "gateway", "worker")
FORBIDDEN = {
    "common": {"gateway", "worker", "torch", "transformers", "aiohttp", "httpx2"},
    "gateway": {"worker", "torch", "transformers"},
    "worker": {"gateway", "aiohttp"},
}
# inside the worker, a level may import itself and what is to its right
LEVELS = ("service", "engine", "models", "layers", "kernels")
BRAIN = ("sequence", "block_manager", "scheduler", "plan", "loaded")
# `tokenfleet serve` and the lazy command group name their commands' modules, and import them only when they run
LAZY = {"common/cli.py", "common/serve.py"}
# clients of the service, which nothing on the serving side imports
CLIENTS = {"common/client.py": {"aiohttp"}, "common/httpx_transport.py": {"httpx2"}}
TOP_LEVEL = {
    *PACKAGES,
    "deploy",
    "tests",
    "docker-compose.yml",
    "setup.cfg",
    "pyproject.toml",
    "README.md",
    "Makefile",
    "LICENSE",
    ".ci",
    ".gitignore",
    ".dockerignore",
}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path, *, with_lazy: bool = True) -> set[str]:
    """Dotted names that a file imports, also inside functions."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if with_lazy else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str):
    for path in sources(package):
        name = path.relative_to(ROOT).as_posix()
        tops = {module.split(".")[0] for module in imports(path, with_lazy=name not in LAZY)}
        wrong = tops & (FORBIDDEN[package] - CLIENTS.get(name, set()))
        assert not wrong, f"{name} imports {wrong}"


@pytest.mark.parametrize("level", LEVELS)
def test_levels_of_the_worker_import_downwards(level: str):
    above = LEVELS[: LEVELS.index(level)]
    for path in sources(f"worker/{level}"):
        for module in imports(path):
            for upper in above:
                assert not module.startswith(f"worker.{upper}."), f"{path.name} imports {module}"


def test_brain_and_text_import_no_torch():
    files = [ROOT / f"worker/engine/{name}.py" for name in BRAIN] + sources("worker/text")
    for path in files:
        assert not {module.split(".")[0] for module in imports(path)} & {"torch", "numpy"}, path


def loaded_modules(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after a statement."""
    code = (
        f"import sys; {statement}; print(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_gateway_runs_without_torch():
    assert not loaded_modules("import gateway.app, gateway.cli") & {
        "torch",
        "transformers",
        "worker",
    }


def test_command_line_starts_light():
    heavy = {"torch", "transformers", "aiohttp", "redis", "numpy", "grpc", "pydantic"}
    assert not loaded_modules("import common.cli") & heavy


def test_serving_needs_no_client():
    modules = "common.serve, common.request_queue, common.request_store, common.token_journal"
    assert not loaded_modules(f"import {modules}") & {"aiohttp", "httpx2"}


def test_echo_worker_runs_without_torch():
    statement = "import worker.service.worker, worker.engine.echo"
    assert not loaded_modules(statement) & {"torch", "transformers"}


def maps() -> list[Path]:
    return [path for package in PACKAGES for path in sources(package) if path.name == "__init__.py"]


@pytest.mark.parametrize("path", maps(), ids=lambda path: path.parent.relative_to(ROOT).as_posix())
def test_folder_map_is_true(path: Path):
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree)
    assert docstring and len(tree.body) == 1, "an __init__.py holds its map and nothing else"
    listed = set(re.findall(r"^(\S+?(?:\.py|/))(?=\s)", docstring, re.MULTILINE))
    present = {child.name for child in path.parent.glob("*.py")} - {"__init__.py"}
    present |= {
        f"{child.name}/"
        for child in path.parent.iterdir()
        if child.is_dir() and child.name != "__pycache__" and any(child.iterdir())
    }
    assert listed == present


def test_every_folder_of_code_is_a_package():
    for package in PACKAGES:
        for path in sources(package):
            assert (path.parent / "__init__.py").exists(), path


def test_redis_keys_live_in_one_file():
    for package in PACKAGES:
        for path in sources(package):
            if path.name != "redis_keys.py":
                assert not re.search(r"""["']f?fleet:""", path.read_text()), path


def test_only_click_reads_the_environment():
    for package in PACKAGES:
        for path in sources(package):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                    assert "reads no setting" in _line_before(path, node.lineno), (
                        f"{path}:{node.lineno}"
                    )


def _line_before(path: Path, number: int) -> str:
    return path.read_text().splitlines()[number - 2]


def test_top_level_is_what_the_readme_says():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {name.split("/")[0] for name in listed.stdout.split()} <= TOP_LEVEL
