"""Settings: dataclass to options and back, and the merging of several classes."""

from dataclasses import dataclass, fields
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from common.settings import merged, options_from, part_of, setting, to_arguments


@dataclass(frozen=True, slots=True)
class Kettle:
    """One field of every kind that settings have."""

    name: str = setting("kettle", "Name.", aliases=("--title",), env=("KETTLE_NAME",))
    litres: float = setting(1.5, "Volume.")
    cups: int | None = setting(None, "Cups; the default is what fits.")
    whistles: bool = setting(True, "Whether it whistles.")
    colours: tuple[str, ...] = setting((), "Colour.")
    kind: str = setting("gas", "Kind.", choices=("gas", "electric"))
    secret: int = setting(0, "Not for people.", is_hidden=True)

    def __post_init__(self) -> None:
        if self.litres <= 0:
            raise ValueError(f"`litres` must be > 0. Given: {self.litres}")


@dataclass(frozen=True, slots=True)
class Pot:
    """Shares three fields with the kettle; two of them have another default."""

    name: str = setting("pot", "Name of the pot.")
    litres: float = setting(1.5, "Volume of the pot.")
    cups: int = setting(4, "Cups of the pot.")
    has_lid: bool = setting(False, "Whether it has a lid.")


def parse(cls: type, arguments: list[str], env: dict[str, str] | None = None) -> Any:
    """The settings that a command gets from a command line."""
    seen = []

    @click.command()
    @options_from(cls)
    def command(settings: Any) -> None:
        seen.append(settings)

    done = CliRunner().invoke(command, arguments, env=env, standalone_mode=False)
    if done.exception:
        raise done.exception
    return seen[0]


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
kettles = st.builds(
    Kettle,
    name=words,
    litres=st.floats(min_value=1e-9, allow_infinity=False),
    cups=st.none() | st.integers(),
    whistles=st.booleans(),
    colours=st.lists(words, max_size=3).map(tuple),
    kind=st.sampled_from(["gas", "electric"]),
    secret=st.integers(),
)


@given(kettles)
def test_the_command_line_builds_the_same_settings(kettle: Kettle) -> None:
    assert parse(Kettle, to_arguments(kettle)) == kettle


@given(kettles)
def test_so_does_the_one_that_writes_defaults_too(kettle: Kettle) -> None:
    names = {field.name for field in fields(Kettle)}
    assert parse(Kettle, to_arguments(kettle, only=names)) == kettle


def test_defaults_are_not_written() -> None:
    assert to_arguments(Kettle()) == []
    assert to_arguments(Kettle(whistles=False, cups=2)) == ["--cups", "2", "--no-whistles"]


def test_only_chosen_fields_are_written() -> None:
    kettle = Kettle(name="old", cups=None)
    assert to_arguments(kettle, only={"litres", "cups", "unknown"}) == ["--litres", "1.5"]


def test_options_have_aliases_and_environment_names() -> None:
    assert parse(Kettle, ["--title", "a"]).name == "a"
    assert parse(Kettle, [], env={"KETTLE_NAME": "b"}).name == "b"
    assert parse(Kettle, [], env={"TOKENFLEET_CUPS": "7"}).cups == 7
    assert parse(Kettle, ["--cups", "8"], env={"TOKENFLEET_CUPS": "7"}).cups == 8


def test_values_out_of_range_are_usage_errors() -> None:
    with pytest.raises(click.UsageError, match=r"`litres` must be > 0. Given: -1.0"):
        parse(Kettle, ["--litres", "-1"])
    with pytest.raises(click.BadParameter, match="'coal' is not one of 'gas', 'electric'"):
        parse(Kettle, ["--kind", "coal"])


def test_hidden_options_work_but_are_not_shown() -> None:
    @click.command()
    @options_from(Kettle)
    def command(settings: Kettle) -> None:
        click.echo(settings.secret)

    shown = CliRunner().invoke(command, ["--help"]).output
    assert "--secret" not in shown
    assert "--litres" in shown
    assert CliRunner().invoke(command, ["--secret", "5"]).output == "5\n"


def test_merged_settings_have_each_field_once() -> None:
    kitchen = merged("Kitchen", Kettle, Pot)
    names = [field.name for field in fields(kitchen)]
    assert names == ["name", "litres", "cups", "whistles", "colours", "kind", "secret", "has_lid"]
    settings = parse(kitchen, ["--name", "both", "--has-lid", "--whistles"])
    assert part_of(settings, Kettle) == Kettle(name="both")
    assert part_of(settings, Pot) == Pot(name="both", has_lid=True)


def test_a_shared_field_left_alone_takes_the_default_of_each_class() -> None:
    settings = parse(merged("Kitchen", Kettle, Pot), [])
    assert settings.name is None
    assert part_of(settings, Kettle) == Kettle()
    assert part_of(settings, Pot) == Pot()


def test_the_rules_of_a_part_hold_in_merged_settings() -> None:
    settings = parse(merged("Kitchen", Kettle, Pot), ["--litres", "-2"])
    with pytest.raises(ValueError, match="`litres` must be > 0"):
        part_of(settings, Kettle)
