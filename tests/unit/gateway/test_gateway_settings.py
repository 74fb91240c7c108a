"""What an operator may set, and what is refused with a sentence."""

import pytest
from click.testing import CliRunner

from gateway.cli import gateway
from gateway.settings import GatewaySettings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"validation_workers": 0}, "`validation_workers` must be strictly positive. Given: 0"),
        ({"max_stop_sequences": -1}, "`max_stop_sequences` must be >= 0. Given: -1"),
        ({"port": 70000}, "`port` must be >= 0 and <= 65535. Given: 70000"),
        ({"api_key": " "}, "`api_key` must not be blank"),
    ],
)
def test_what_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError) as raised:
        GatewaySettings(**values)
    assert message in str(raised.value)


def test_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr("gateway.supervisor.run_gateway", seen.append)
    environment = {
        "PORT": "8123",
        "HOSTNAME": "pod-1",
        "API_KEY": "k3y",
        "CORS_ALLOW_ORIGIN": "https://a",
    }
    options = ["--max-best-of", "3", "--no-json-output", "-p", "8124"]
    result = CliRunner().invoke(gateway, options, env=environment)
    assert result.exit_code == 0, result.output
    (settings,) = seen
    assert settings.port == 8124 and settings.max_best_of == 3 and settings.api_key == "k3y"
    assert settings.hostname == "0.0.0.0", "HOSTNAME is the pod's name, not an address"
    assert settings.cors_allow_origin == ("https://a",)


def test_help_names_every_option_but_the_hidden_ones():
    text = CliRunner().invoke(gateway, ["--help"]).output
    assert "--max-waiting-requests" in text and "--wait-for-model" not in text


def test_error_of_the_port_is_one_line(monkeypatch):
    def refuse(settings):
        raise OSError(98, "Address already in use")

    monkeypatch.setattr("gateway.supervisor.run_gateway", refuse)
    result = CliRunner().invoke(gateway, [], env={})
    assert result.exit_code == 1
    assert result.output == "Error: cannot listen on 0.0.0.0:8080: Address already in use\n"
