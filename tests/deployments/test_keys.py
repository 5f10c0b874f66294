"""Keys: what the file holds of them, when it is read again, and what a broken one does."""

import json
import logging
import os

import pytest

from deployments.tenants.keys import KeyFile, hash_of, new_key, read_keys
from select_n_core.errors import ConfigError, UnavailableError


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "keys.yaml")


def write(path: str, text: str) -> None:
    """As a mounted secret changes: another file takes its name."""
    with open(f"{path}.new", "w") as file:
        file.write(text)
    os.replace(f"{path}.new", path)


def line(key: str, tenant: str) -> str:
    return f"{hash_of(key)}: {tenant}\n"


def test_a_key_is_random_and_its_hash_is_not_the_key():
    one, other = new_key(), new_key()
    assert one != other
    assert one.startswith("sk-")
    assert len(one) >= 40
    assert hash_of(one) == hash_of(one) != hash_of(other)
    assert one.removeprefix("sk-") not in hash_of(one)


def test_several_keys_may_open_for_one_tenant(path):
    write(path, line("old", "acme") + line("new", "acme") + line("other", "zeta"))
    keys = KeyFile()
    assert [keys.tenant_of(key, path) for key in ("old", "new", "other", "strange")] == [
        "acme",
        "acme",
        "zeta",
        None,
    ]


def test_json_is_read_too(path):
    write(path, json.dumps({hash_of("k"): "acme"}))
    assert KeyFile().tenant_of("k", path) == "acme"


def test_the_hash_of_a_key_does_not_open(path):
    write(path, line("k", "acme"))
    assert KeyFile().tenant_of(hash_of("k"), path) is None


def test_a_new_file_holds_from_the_next_request_on(path):
    write(path, line("old", "acme"))
    keys = KeyFile()
    assert keys.tenant_of("old", path) == "acme"
    write(path, line("new", "acme"))
    assert keys.tenant_of("old", path) is None
    assert keys.tenant_of("new", path) == "acme"


def test_a_file_that_did_not_change_is_not_read_again(path, monkeypatch):
    write(path, line("k", "acme"))
    keys = KeyFile()
    keys.tenant_of("k", path)
    monkeypatch.setattr("deployments.tenants.keys.read_keys", lambda _: pytest.fail("read again"))
    assert keys.tenant_of("k", path) == "acme"


BROKEN = {
    "empty": "",
    "no mapping": "- a\n- b\n",
    "no YAML": "{",
    "a key that nobody hashed": "sk-secret: acme\n",
    "a hash that was cut off": "sha256:00: acme\n",
    "no tenant": f"{hash_of('k')}:\n",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_new_file_changes_nothing_and_is_complained_of_once(path, text, caplog):
    write(path, line("k", "acme"))
    keys = KeyFile()
    assert keys.tenant_of("k", path) == "acme"
    write(path, text)
    for _ in range(3):
        assert keys.tenant_of("k", path) == "acme"
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "keys_file" in record.message
    assert "the keys before it stay" in record.message
    assert "sk-secret" not in record.message
    write(path, line("other", "acme"))
    assert keys.tenant_of("k", path) is None


def test_a_file_that_went_away_changes_nothing(path):
    write(path, line("k", "acme"))
    keys = KeyFile()
    keys.tenant_of("k", path)
    os.remove(path)
    assert keys.tenant_of("k", path) == "acme"


@pytest.mark.parametrize("text", [None, *BROKEN.values()])
def test_without_a_good_file_nobody_can_be_told_apart(path, text):
    if text is not None:
        write(path, text)
    keys = KeyFile()
    for _ in range(2):
        with pytest.raises(UnavailableError):
            keys.tenant_of("k", path)
    write(path, line("k", "acme"))
    assert keys.tenant_of("k", path) == "acme"


def test_another_path_is_another_file(path):
    write(path, line("k", "acme"))
    write(f"{path}2", line("k", "zeta"))
    keys = KeyFile()
    assert [keys.tenant_of("k", each) for each in (path, f"{path}2")] == ["acme", "zeta"]


def test_errors_name_the_entry_and_never_the_key(path):
    write(path, line("k", "acme") + "sk-secret: acme\n")
    with pytest.raises(ConfigError, match="entry 2 of") as caught:
        read_keys(path)
    assert "sk-secret" not in str(caught.value)
    assert "select-n key TENANT" in str(caught.value)
