"""The key file: what may stand in it, what is refused with which words, and how it is made and replaced."""

import re

import pytest
from click.testing import CliRunner

from common.cli import main
from gateway.api_keys import KeyFileError, KeyRing, digest_of, line_for, new_key, read_keys

HASH = digest_of("k").hex()


def test_a_new_key_opens_the_door(tmp_path):
    done = CliRunner().invoke(main, ["keys", "new", "web.1"])
    assert done.exit_code == 0, done.output
    (key,) = re.findall(r"tf-\S{43}", done.stderr)
    assert key not in done.stdout
    path = tmp_path / "keys.toml"
    path.write_text(f"# clients\n{done.stdout}{line_for('batch', 'other')}\n")
    ring = KeyRing(path=str(path))
    assert ring.find(key).name == "web.1" and ring.find("other").name == "batch"
    assert ring.find(key[:-1]) is None and ring.find("") is None
    assert new_key() != new_key()


def test_all_fields(tmp_path):
    path = tmp_path / "keys.toml"
    limits = "weight = 5\npriority = 2\nmax_concurrent_requests = 3\nmax_tokens_per_minute = 4000\n"
    path.write_text(f'[batch]\nsha256 = "{HASH.upper()}"\n{limits}')
    (key,) = read_keys(str(path))
    assert (key.name, key.digest) == ("batch", digest_of("k"))
    assert (key.weight, key.priority) == (5, 2)
    assert (key.max_concurrent_requests, key.max_tokens_per_minute) == (3, 4000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("web = 1", "`web` must be a table"),
        ("web = {}", "`web` needs `sha256`, 64 hexadecimal digits"),
        ('web = { sha256 = "abc" }', "`web` needs `sha256`"),
        (f'web = {{ sha256 = "{HASH}", rate = 2 }}', "Given: rate"),
        (f'web = {{ sha256 = "{HASH}", weight = 0 }}', "`weight` of `web` must be strictly"),
        (f'web = {{ sha256 = "{HASH}", priority = 3 }}', "must be 0, 1 or 2. Given: 3"),
        (f'web = {{ sha256 = "{HASH}", max_tokens_per_minute = 0 }}', "strictly positive"),
        (f'web = {{ sha256 = "{HASH}", max_tokens_per_minute = 1.5 }}', "a whole number"),
        (f'web = {{ sha256 = "{HASH}", max_concurrent_requests = true }}', "a whole number"),
        (f'"a b" = {{ sha256 = "{HASH}" }}', "a name has 1 to 64"),
        (f'a = {{ sha256 = "{HASH}" }}\nb = {{ sha256 = "{HASH}" }}', "the same key"),
        ("web = {", "cannot use the key file"),
        (b"\xff", "cannot use the key file"),
    ],
)
def test_mistakes_are_said(tmp_path, text, message):
    path = tmp_path / "keys.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(KeyFileError, match="cannot use the key file") as raised:
        KeyRing(path=str(path))
    assert message in str(raised.value) and HASH not in str(raised.value)


def test_a_missing_file_is_said_by_the_command(tmp_path):
    done = CliRunner().invoke(main, ["gateway", "--api-keys-file", str(tmp_path / "none.toml")])
    assert done.exit_code == 1 and "No such file or directory" in done.output


def test_a_name_that_cannot_be_one():
    done = CliRunner().invoke(main, ["keys", "new", "a b"])
    assert done.exit_code == 2 and "a name has 1 to 64" in done.output


def test_a_broken_file_leaves_the_keys_as_they_were(tmp_path, caplog):
    path = tmp_path / "keys.toml"
    path.write_text(line_for("web", "one"))
    ring = KeyRing("fixed", str(path))
    path.write_text("{")
    ring.reload()
    assert "the keys stay as they were" in caplog.text
    assert ring.find("one").name == "web" and ring.find("fixed").name == ""
    path.write_text(line_for("web", "two"))
    ring.reload()
    assert ring.find("one") is None and ring.find("two").name == "web"


def test_an_empty_file_admits_nobody(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text("")
    assert not KeyRing(path=str(path)).is_open
    assert KeyRing().is_open
