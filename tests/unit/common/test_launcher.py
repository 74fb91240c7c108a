"""TGI's launcher as a name of `tokenfleet serve`: which flags it takes, and what it makes of them."""

import configparser
import pkgutil
from pathlib import Path
from typing import Any

import click
import pytest
from click.core import ParameterSource
from click.testing import CliRunner, Result

from common import launcher
from common.serve import Grace, serve
from common.tgi_flags import FLAGS, UNSUPPORTED_QUANTIZATION

ROOT = Path(__file__).parents[3]

# Every flag of text-generation-launcher v3.3.7, with a value that it takes; None is a switch.
TGI_V3 = {
    "--model-id": "m",
    "--revision": "main",
    "--validation-workers": "2",
    "--sharded": "false",
    "--num-shard": "1",
    "--quantize": "bitsandbytes",
    "--speculate": "3",
    "--dtype": "float16",
    "--kv-cache-dtype": "fp8_e5m2",
    "--trust-remote-code": None,
    "--max-concurrent-requests": "128",
    "--max-best-of": "2",
    "--max-stop-sequences": "4",
    "--max-top-n-tokens": "5",
    "--max-input-tokens": "100",
    "--max-input-length": "100",
    "--max-total-tokens": "200",
    "--waiting-served-ratio": "0.3",
    "--max-batch-prefill-tokens": "4096",
    "--max-batch-total-tokens": "9000",
    "--max-waiting-tokens": "20",
    "--max-batch-size": "8",
    "--cuda-graphs": "1,2,4",
    "--hostname": "::1",
    "--port": "3000",
    "-p": "3000",
    "--prometheus-port": "9000",
    "--shard-uds-path": "/run/shards",
    "--master-addr": "localhost",
    "--master-port": "29500",
    "--huggingface-hub-cache": "cache",
    "--weights-cache-override": "folder",
    "--disable-custom-kernels": None,
    "--cuda-memory-fraction": "0.9",
    "--rope-scaling": "dynamic",
    "--rope-factor": "2.0",
    "--json-output": None,
    "--otlp-endpoint": "http://o",
    "--otlp-service-name": "service",
    "--cors-allow-origin": "https://a",
    "--api-key": "k3y",
    "--watermark-gamma": "0.4",
    "--watermark-delta": "1.5",
    "--ngrok": None,
    "--ngrok-authtoken": "t",
    "--ngrok-edge": "e",
    "--tokenizer-config-path": "file",
    "--disable-grammar-support": None,
    "--env": None,
    "-e": None,
    "--max-client-batch-size": "4",
    "--lora-adapters": "a",
    "--usage-stats": "off",
    "--payload-limit": "2000000",
    "--enable-prefill-logprobs": None,
    "--graceful-termination-timeout": "30",
}
WITHOUT_VARIABLE = {"-p", "-e", "--env", "--hostname", "--max-input-length"}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path) -> list[dict[str, Any]]:
    """What `serve` would have been called with, and as which the command line gave it."""
    calls: list[dict[str, Any]] = []

    def record(**values: Any) -> None:
        source = click.get_current_context().get_parameter_source
        given = {name for name in values if source(name) is ParameterSource.COMMANDLINE}
        calls.append({**values, "given": given})

    monkeypatch.setattr(serve, "callback", record)
    monkeypatch.setattr(launcher, "DEVICES", tmp_path)
    monkeypatch.setattr(launcher, "configure_logging", lambda *_: None)
    return calls


def launch(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(launcher.launcher, arguments, env=environment)


@pytest.mark.parametrize("flag", TGI_V3)
def test_every_flag_of_tgi_is_known(served, flag):
    value = TGI_V3[flag]
    done = launch(flag, *([] if value is None else [value]))
    assert "No such option" not in done.output and "Invalid value" not in done.output
    is_refused = "is not supported" in done.output or "must be a folder" in done.output
    assert is_refused != bool(served)


@pytest.mark.parametrize("flag", sorted(set(TGI_V3) - WITHOUT_VARIABLE))
def test_every_variable_of_tgi_is_read(flag):
    name = flag.removeprefix("--").replace("-", "_").upper()
    variables = {
        variable
        for parameter in launcher.launcher.params
        for variable in (
            [parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or []
        )
    }
    assert name in variables


def test_flags_and_variables_reach_serve(served):
    done = launch("--max-input-length", "9", "--json-output", MAX_TOTAL_TOKENS="10", PORT="80")
    assert done.exit_code == 0, done.output
    (values,) = served
    assert values["max_input_tokens"] == 9 and values["max_total_tokens"] == 10
    assert values["port"] == 80 and values["json_output"]
    assert values["model_id"] == "bigscience/bloom-560m"
    assert values["graceful_termination_timeout_s"] == 90
    assert values["given"] >= {"max_input_tokens", "json_output", "model_id", "num_shard"}
    assert "max_total_tokens" not in values["given"], "children read the environment themselves"


def test_defaults_are_tgis(served):
    launch()
    assert served[0]["port"] == 3000 and served[0]["hostname"] == "0.0.0.0"


def test_one_line_names_what_has_no_effect(served, caplog):
    caplog.set_level("INFO")
    launch("--cuda-graphs", "0", "--usage-stats=off", "-e", MAX_WAITING_TOKENS="5")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        "accepted without effect: --max-waiting-tokens, --cuda-graphs, --usage-stats, --env"
    )
    launch("--port", "80")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("kind", UNSUPPORTED_QUANTIZATION)
def test_number_formats_that_are_not_there_are_refused(served, kind):
    for done in (launch("--quantize", kind), launch(QUANTIZE=kind)):
        assert done.exit_code == 2 and f"`--quantize {kind}`" in done.output
    assert not served


def test_what_would_change_answers_is_refused(served):
    done = launch(LORA_ADAPTERS="a,b")
    assert done.exit_code == 2 and "`--lora-adapters` is not supported. Merge" in done.output
    assert launch(LORA_ADAPTERS="").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "environment", "num_shard"),
    [
        ([], {}, 1),
        ([], {"NVIDIA_VISIBLE_DEVICES": "0,1"}, 2),
        ([], {"CUDA_VISIBLE_DEVICES": "0,1,-1,2"}, 2),
        (["--device", "cpu"], {"CUDA_VISIBLE_DEVICES": "0,1"}, 1),
        (["--sharded", "false"], {"CUDA_VISIBLE_DEVICES": "0,1"}, 1),
        (["--sharded", "true"], {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4),
        (["--sharded", "true", "--num-shard", "2"], {}, 2),
        (["--num-shard", "2"], {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 2),
        ([], {"NUM_SHARD": "2"}, 2),
    ],
)
def test_number_of_shards(served, arguments, environment, num_shard):
    done = launch(*arguments, **environment)
    assert done.exit_code == 0, done.output
    assert served[0]["num_shard"] == num_shard


def test_shards_are_counted_from_the_devices(served, tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    launch(NVIDIA_VISIBLE_DEVICES="all")
    assert served[0]["num_shard"] == 2


@pytest.mark.parametrize("arguments", [["--num-shard", "1"], []])
def test_sharded_needs_two(served, arguments):
    done = launch("--sharded", "true", *arguments)
    assert done.exit_code == 2 and "at least 2 are needed" in done.output


@pytest.mark.parametrize(
    ("environment", "hostname"),
    [({"HOSTNAME": "pod-7"}, "0.0.0.0"), ({"HOSTNAME": "127.0.0.1"}, "127.0.0.1")],
)
def test_hostname_of_a_container_is_no_address(served, environment, hostname):
    launch(**environment)
    assert served[0]["hostname"] == hostname


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("info,text_generation_router=debug", "info"),
        ("WARN", "warning"),
        ("trace", "debug"),
        ("hyper=off", "info"),
    ],
)
def test_log_filters_of_tgi(served, text, level):
    launch(LOG_LEVEL=text)
    assert served[0]["log_level"] == level


def test_weights_from_a_folder(served, tmp_path):
    arguments = ("--model-id", "org/model", "--weights-cache-override", str(tmp_path))
    assert "there is no config.json" in launch(*arguments).output
    (tmp_path / "config.json").write_text("{}")
    launch(*arguments)
    assert served[0]["model_id"] == str(tmp_path)
    assert served[0]["served_model_name"] == "org/model"


def test_no_flag_is_in_both_tables():
    own = {parameter.name for parameter in serve.params}
    assert not own & {flag.parameter for flag in FLAGS}


def test_drain_s_of_ours_is_stronger_than_the_default_of_tgi(served):
    launch("--drain-s", "7")
    launch(TOKENFLEET_DRAIN_S="7", GRACEFUL_TERMINATION_TIMEOUT="30")
    assert [values["graceful_termination_timeout_s"] for values in served] == [None, 30]
    assert [values["drain_s"] for values in served] == [7, 7]


def test_commands_are_installed():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    scripts = config["options.entry_points"]["console_scripts"].split("\n")
    targets = dict(line.split(" = ") for line in scripts if line)
    assert pkgutil.resolve_name(targets["text-generation-launcher"]) is launcher.launcher
    assert pkgutil.resolve_name(targets["text-generation-server"]) is launcher.server


def test_every_stop_fits_into_the_time_that_was_given():
    for total_s in (0.5, 3, 30, 90):
        grace = Grace.within(total_s)
        assert grace.gateway_s >= total_s / 2
        assert grace.gateway_s + grace.worker_s + 2 * grace.margin_s < total_s


def test_download_weights_takes_tgis_flags(monkeypatch):
    seen = []
    monkeypatch.setattr("worker.weights.download.prepared", lambda wanted, _: seen.append(wanted))
    options = ["--extension", ".safetensors", "--logger-level", "INFO", "--json-output"]
    done = CliRunner().invoke(launcher.server, ["download-weights", "org/m", *options])
    assert done.exit_code == 0, done.output
    assert seen[0].model_id == "org/m"
