"""One line a knob: `setting()` declares a dataclass field, its command-line option, its environment name and its help.

click is the only reader of the environment; everything else receives the frozen dataclass.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import click

Settings = TypeVar("Settings")


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    env: tuple[str, ...] = (),
    is_hidden: bool = False,
) -> Any:
    """A field of a settings dataclass.

    Args:
        default: None makes the option optional without a value.
        help: one sentence for `--help` and for the README.
        choices: the values that are accepted.
        aliases: further option names, for example TGI's older ones.
        env: further environment names beside TOKENFLEET_<NAME>, for example TGI's.
        is_hidden: leave it out of `--help`; for options that only our own processes pass.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "aliases": aliases,
        "env": env,
        "hidden": is_hidden,
    }
    return dataclasses.field(default=default, metadata=metadata)


def options_from(cls: type[Settings]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a click command so that it is called with one `settings` argument of type `cls`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        def call(**values: Any) -> Any:
            own = {field.name: values.pop(field.name) for field in dataclasses.fields(cls)}
            try:
                settings = cls(**own)
            except ValueError as error:
                raise click.UsageError(str(error)) from error
            return command(settings=settings, **values)

        call.__doc__ = command.__doc__
        call.__name__ = command.__name__
        call.__click_params__ = list(getattr(command, "__click_params__", []))
        hints = typing.get_type_hints(cls)
        for field in reversed(dataclasses.fields(cls)):
            call = _option(field, hints[field.name])(call)
        return call

    return decorate


def to_arguments(settings: Any, *, only: Collection[str] | None = None) -> list[str]:
    """The command line that builds these settings again.

    Fields at their defaults are left out; with `only`, exactly the fields named there are written, unless they are None.
    """
    arguments: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is None or (value == field.default if only is None else field.name not in only):
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple):
            arguments += [part for item in value for part in (flag, str(item))]
        else:
            arguments += [flag, str(value)]
    return arguments


def merged(name: str, *classes: type) -> type:
    """A settings class with the fields of all `classes`, a shared field once, declared as the first class declares it.

    Where classes disagree on a default, the field is optional, and None stands for the default of each.
    """
    merged_fields: dict[str, tuple[str, Any, dataclasses.Field]] = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            _, hint, seen = merged_fields.get(field.name, ("", hints[field.name], field))
            default = seen.default if seen.default == field.default else None
            hint = hint if default is not None else hint | None
            own = dataclasses.field(default=default, metadata=seen.metadata)
            merged_fields[field.name] = (field.name, hint, own)
    return dataclasses.make_dataclass(name, merged_fields.values(), frozen=True, slots=True)


def part_of(settings: Any, cls: type[Settings]) -> Settings:
    """The `cls` inside merged settings. Raises the ValueError of `cls` when its values do not fit."""
    values = {}
    for field in dataclasses.fields(cls):
        value = getattr(settings, field.name)
        values[field.name] = field.default if value is None else value
    return cls(**values)


def _option(field: dataclasses.Field, hint: Any) -> Callable[..., Any]:
    meta = field.metadata
    kind, is_tuple = _kind(hint)
    flag = f"--{field.name.replace('_', '-')}"
    names = [field.name, flag, *meta["aliases"]]
    options: dict[str, Any] = {
        "help": meta["help"],
        "hidden": meta["hidden"],
        "envvar": [f"TOKENFLEET_{field.name.upper()}", *meta["env"]],
        "show_default": field.default is not None and not is_tuple,
        "show_envvar": True,
        "default": field.default,
    }
    if kind is bool:
        names = [field.name, f"{flag}/--no-{flag[2:]}"]
    else:
        options["type"] = click.Choice(meta["choices"]) if meta["choices"] else kind
        options["multiple"] = is_tuple
    return click.option(*names, **options)


def _kind(hint: Any) -> tuple[type, bool]:
    """The scalar type behind `int | None` or `tuple[str, ...]`, and whether it repeats."""
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None)), False
    return hint, False
