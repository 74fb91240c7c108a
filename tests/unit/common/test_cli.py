"""The command group: what it lists, what it imports, what it says when a package is missing."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from common import cli

ROOT = Path(__file__).parents[3]


def modules_after(*arguments: str) -> set[str]:
    """The top-level modules that `tokenfleet <arguments>` has imported when it ends."""
    program = (
        "import sys; from common.cli import main\n"
        f"main({list(arguments)!r}, standalone_mode=False)\n"
        "print('\\n', *{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_help_lists_every_command_and_imports_none() -> None:
    shown = CliRunner().invoke(cli.main, ["--help"]).output
    for name, (_, line) in cli.COMMANDS.items():
        assert name in shown
        assert line in shown
    assert not {"aiohttp", "gateway", "redis", "torch", "worker"} & modules_after("--help")


@pytest.mark.parametrize(
    ("command", "foreign"),
    [
        ("serve", {"aiohttp", "torch", "transformers"}),
        ("gateway", {"torch", "transformers", "worker"}),
        ("worker", {"aiohttp", "gateway", "torch", "transformers"}),
        ("demo-model", {"aiohttp", "gateway", "torch", "transformers"}),
    ],
)
def test_the_help_of_a_command_imports_nothing_heavy(command: str, foreign: set[str]) -> None:
    assert not foreign & modules_after(command, "--help")


def test_an_unknown_command_is_refused() -> None:
    done = CliRunner().invoke(cli.main, ["sevre"])
    assert done.exit_code == 2
    assert "No such command 'sevre'" in done.output


def test_the_version_is_that_of_the_distribution() -> None:
    try:
        installed = version("tokenfleet")
    except PackageNotFoundError:
        pytest.skip("the distribution is not installed")
    done = CliRunner().invoke(cli.main, ["--version"], prog_name="tokenfleet")
    assert done.output == f"tokenfleet {installed}\n"


def test_a_missing_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "gateway", ("package_that_is_not_there.cli:gateway", ""))
    done = CliRunner().invoke(cli.main, ["gateway"])
    assert done.exit_code == 1
    assert "'package_that_is_not_there' is missing" in done.output


def test_the_explanation_names_the_extra_to_install() -> None:
    explained = r"'torch' is missing.*tokenfleet\[worker\]"
    with (
        pytest.raises(click.ClickException, match=explained),
        cli.explained_imports("worker"),
    ):
        raise ModuleNotFoundError(name="torch")


def test_a_mistake_in_our_own_imports_is_not_explained_away() -> None:
    with pytest.raises(ModuleNotFoundError), cli.explained_imports("worker"):
        raise ModuleNotFoundError(name="worker.no_such_module")
