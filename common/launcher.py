"""`text-generation-launcher`: `tokenfleet serve` with the flags, the variables and the defaults of TGI's launcher.

`common/tgi_flags.py` is the table of what TGI takes and `serve` does not. What would make other answers than were
asked for is refused, the rest is accepted, and one line at the start says so.
"""

import copy
import ipaddress
import logging
import pkgutil
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from common.cli import explained_imports
from common.serve import serve
from common.telemetry import configure_logging
from common.tgi_flags import FLAGS, UNSUPPORTED_QUANTIZATION, TgiFlag, Treatment

log = logging.getLogger(__name__)

_TIMEOUT = "graceful_termination_timeout_s"
DEFAULTS = {
    "model_id": "bigscience/bloom-560m",
    "port": 3000,
    _TIMEOUT: 90.0,
}
_BY_DEFAULT = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
DEVICES = Path("/dev")
_LEVELS = {"trace": "debug", "warn": "warning"}
_VISIBLE = click.Option(
    ["visible_devices", "--visible-devices"],
    envvar=["CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"],
    hidden=True,
)


def launch(visible_devices: str | None, **values: Any) -> None:
    """Serve a model as TGI's launcher does. Takes its flags and variables, and every option of `tokenfleet serve`.

    The port opens once the model can answer. SIGTERM lets open streams finish, for at most
    --graceful-termination-timeout seconds.
    """
    context = click.get_current_context()
    source = context.get_parameter_source
    tgi = {flag.name: values.pop(flag.parameter) for flag in FLAGS}
    given = [flag for flag in FLAGS if tgi[flag.name]]
    _refuse(given, values["quantize"])
    values["log_level"] = _log_level(values["log_level"])
    values["hostname"] = _hostname(context, values["hostname"])
    if folder := tgi["weights-cache-override"]:
        values |= _in_folder(folder, values)
    values["num_shard"] = _num_shard(
        tgi["sharded"],
        None if source("num_shard") in _BY_DEFAULT else values["num_shard"],
        0 if values["device"] == "cpu" else _num_devices(visible_devices),
    )
    if source("drain_s") not in _BY_DEFAULT and source(_TIMEOUT) in _BY_DEFAULT:
        values[_TIMEOUT] = None
    for name in ("log_level", "hostname", "num_shard", "model_id", "served_model_name"):
        # what stands here goes to the child processes, instead of what they would read for themselves
        context.set_parameter_source(name, ParameterSource.COMMANDLINE)
    configure_logging(values["log_level"], values["json_output"])
    _say_what_has_no_effect(given)
    assert serve.callback is not None
    serve.callback(**values)


def _refuse(given: Iterable[TgiFlag], quantize: str | None) -> None:
    for flag in given:
        if flag.treatment is Treatment.REFUSED:
            raise click.UsageError(f"`--{flag.name}` is not supported. {flag.note}")
    if quantize in UNSUPPORTED_QUANTIZATION:
        raise click.UsageError(f"`--quantize {quantize}` {UNSUPPORTED_QUANTIZATION[quantize]}.")


def _say_what_has_no_effect(given: Iterable[TgiFlag]) -> None:
    idle = [f"--{flag.name}" for flag in given if flag.treatment is Treatment.NO_EFFECT]
    if idle:
        log.warning("accepted without effect: %s (--help says why)", ", ".join(idle))


def _log_level(text: str) -> str:
    """Ours for TGI's filter, such as `info,text_generation_router=debug`: the level that it begins with."""
    first = re.split(r"[,=]", text.strip().lower())[0]
    level = _LEVELS.get(first, first)
    return level if level in ("debug", "info", "warning", "error") else "info"


def _hostname(context: click.Context, hostname: str) -> str:
    """HOSTNAME counts only where it is an address, as in TGI: container runtimes set it to a name."""
    if context.get_parameter_source("hostname") is not ParameterSource.ENVIRONMENT:
        return hostname
    try:
        return str(ipaddress.ip_address(hostname))
    except ValueError:
        return "0.0.0.0"


def _in_folder(folder: str, values: dict[str, Any]) -> dict[str, Any]:
    """The model from `folder`, under the name that it would have without it."""
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise click.UsageError(
            f"`--weights-cache-override` must be a folder with all of the model's files; there is "
            f"no config.json in {folder}. A hub cache is named by --huggingface-hub-cache."
        )
    return {
        "model_id": folder,
        "served_model_name": values["served_model_name"] or values["model_id"],
    }


def _num_shard(sharded: bool | None, num_shard: int | None, num_devices: int) -> int:
    """TGI's rule: as many as were asked for; else one for each GPU, unless --sharded is false."""
    if sharded and (num_shard or num_devices) < 2:
        found = f"`num_shard` is {num_shard}" if num_shard else f"{num_devices} GPUs are visible"
        raise click.UsageError(f"`sharded` is true but {found}; at least 2 are needed")
    if num_shard is not None:
        return num_shard
    return 1 if sharded is False else max(1, num_devices)


def _num_devices(visible: str | None) -> int:
    """GPUs that CUDA would show, told without loading it."""
    if visible and visible != "all":
        names = [name.strip() for name in visible.split(",")]
        hidden = [name for name in names if name in ("-1", "", "none", "void")]
        return names.index(hidden[0]) if hidden else len(names)
    return sum(1 for path in DEVICES.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


def _parameters() -> list[click.Parameter]:
    """Those of `serve`, some of which take more here, and TGI's."""
    own = {parameter.name: copy.copy(parameter) for parameter in serve.params}
    quantize = own["quantize"]
    assert isinstance(quantize.type, click.Choice)
    quantize.type = click.Choice([*quantize.type.choices, *UNSUPPORTED_QUANTIZATION])
    own["log_level"].type = click.STRING
    hostname = own["hostname"]
    assert isinstance(hostname.envvar, list)
    hostname.envvar = [*hostname.envvar, "HOSTNAME"]
    return [*own.values(), *(flag.option() for flag in FLAGS), _VISIBLE]


launcher = click.version_option(package_name="tokenfleet", message="%(prog)s %(version)s")(
    click.Command(
        "text-generation-launcher",
        callback=launch,
        help=launch.__doc__,
        params=_parameters(),
        context_settings={
            "help_option_names": ["-h", "--help"],
            "max_content_width": 110,
            "default_map": DEFAULTS,
        },
    )
)


class _Server(click.Group):
    """Imports the worker only for the command that runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["download-weights"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name != "download-weights":
            return None
        with explained_imports("worker"):
            command = copy.copy(pkgutil.resolve_name("worker.weights.download:command"))
        idle = [
            click.Option(["--logger-level"], expose_value=False, hidden=True),
            *(
                click.Option([f"--{name}/--no-{name}"], expose_value=False, hidden=True)
                for name in ("json-output", "trust-remote-code", "merge-lora")
            ),
        ]
        command.params = [*command.params, *idle]
        return command


@click.group(cls=_Server)
def server() -> None:
    """What TGI's `text-generation-server` has for users: download-weights. Serving needs no such command."""
