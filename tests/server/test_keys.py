"""Keys: what a keys file and the environment may say, that every key is compared, and that no message shows one."""

import hashlib
import hmac
import logging
import os
import traceback
from argparse import Namespace
from pathlib import Path

import pytest

from server.caller import Caller
from server.errors import ConfigError
from server.keys import Keys, refuse_vllms_keys
from server.keys_file import read_keys

SECRET = "sk-0123456789-team-a"
OTHER = "sk-9876543210-team-b"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_a_file_has_keys_as_text_as_digest_and_by_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM_C", "sk-in-a-variable")
    digest = hashlib.sha256(OTHER.encode()).hexdigest().upper()
    path = write(
        tmp_path,
        f'[[key]]\nname = "a"\nkey = "{SECRET}"\nadapters = ["math-*", "code"]\n'
        f'[[key]]\nname = "b"\nsha256 = "{digest}"\nadmin = true\n'
        '[[key]]\nname = "c"\nenv = "TEAM_C"\nadapters = []\n',
    )
    keys = Keys(path)
    assert keys.find(SECRET.encode()) == Caller("a", ("math-*", "code"))
    assert keys.find(OTHER.encode()) == Caller("b", admin=True)
    assert keys.find(b"sk-in-a-variable") == Caller("c", ())
    assert keys.find(digest.encode()) is None
    assert keys.find(b"") is None


def test_the_environment_has_one_key_for_inference_and_one_for_admins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(Keys(None)) == 0
    monkeypatch.setenv("LORAMIX_API_KEY", SECRET)
    assert not Keys(None).has_admin
    monkeypatch.setenv("LORAMIX_ADMIN_KEY", OTHER)
    keys = Keys(None)
    assert keys.has_admin
    assert keys.find(SECRET.encode()) == Caller("default")
    assert keys.find(OTHER.encode()) == Caller("admin", admin=True)


def test_patterns_say_which_adapters_a_caller_may_use() -> None:
    caller = Caller("a", ("math-*", "code"))
    assert [name for name in ("math-1", "math", "Math-1", "code", "codes", "xmath-1") if caller.may_use(name)] == [
        "math-1",
        "code",
    ]
    assert caller.restricted
    assert Caller("b", ("code", "*")).may_use("anything")
    assert not Caller("b", ("code", "*")).restricted
    assert Caller("c", ()).restricted
    assert not Caller("c", ()).may_use("code")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it has no keys; write each as a table [[key]]"),
        ("key = []", "it has no keys"),
        (f'key = "{SECRET}"', "it has no keys"),
        (f'[[key]]\nkey = "{SECRET}"', "key 1: name: field required"),
        (f'[[key]]\nname = ""\nkey = "{SECRET}"', "key 1: name: string should match pattern '^[A-Za-z0-9._-]{1,64}$'"),
        (f'[[key]]\nname = "a\\nb"\nkey = "{SECRET}"', "key 1: name: string should match"),
        ('[[key]]\nname = "a"', "key 1: give one of key, sha256 and env"),
        (f'[[key]]\nname = "a"\nkey = "{SECRET}"\nenv = "HOME"', "key 1: give one of key, sha256 and env"),
        (f'[[key]]\nname = "a"\nkey = "{SECRET[:15]}"', "key 1 (a): a key has at least 16 characters; `openssl rand"),
        (f'[[key]]\nname = "a"\nkey = "{SECRET}\\n"', "key 1 (a): a key has letters, digits and signs of ASCII"),
        (f'[[key]]\nname = "a"\nkey = "{SECRET}é"', "key 1 (a): a key has letters, digits and signs of ASCII"),
        (f'[[key]]\nname = "a"\nsha256 = "{SECRET}"', "key 1: sha256: string should match pattern"),
        ('[[key]]\nname = "a"\nenv = "NOT_SET_ANYWHERE"', "key 1 (a): the variable that env names is not set"),
        (f'[[key]]\nname = "a"\nkey = "{SECRET}"\nadapter = ["x"]', "key 1: unknown field 'adapter'; known under [[key]]"),
        (f'[[key]]\nname = "a"\nkey = "{SECRET}"\nadmin = "no"', "key 1: admin: input should be a valid boolean"),
        (f'[[key]]\nname = "a"\nkey = "{SECRET}"\nadapters = "x"', "key 1: adapters: input should be a valid list"),
        (f'[[key]]\nname = "a"\nkey = "{SECRET}"\nadmin = true\nadapters = ["x"]', "an admin key may use every adapter"),
        (f'"{SECRET}" = "a"', "it has no keys"),
        (f'"{SECRET}" = "a"\n[[key]]\nname = "a"\nkey = "{OTHER}"', "unknown field; known under [[key]]: name, key"),
        (f'[[key]]\n"{SECRET}" = "a"', "key 1: "),
        (f'[{SECRET}]\n[{SECRET}]', "is not TOML (at line 2)"),
        (f'[[key]]\nname = "a"\nkey = {SECRET}', "is not TOML (at line 3)"),
        (f'[[key]]\nname = "a"\nkey = "{SECRET}"\n[[key]]\nname = "a"\nkey = "{OTHER}"', "two keys are named 'a'"),
        (f'[[key]]\nname = "a"\nkey = "{SECRET}"\n[[key]]\nname = "b"\nkey = "{SECRET}"', "'a' and 'b' are one key"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_one_line_that_shows_no_key(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        read_keys(path)
    assert str(path) in str(refused.value) or "two keys" in said or "one key" in said
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert SECRET[:15] not in str(refused.value)
    assert SECRET[:15] not in "".join(traceback.format_exception(refused.value))


def test_a_file_that_is_not_there_or_not_text_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml cannot be read \(No such file"):
        read_keys(tmp_path / "none.toml")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="bytes is not TOML"):
        read_keys(tmp_path / "bytes")


@pytest.mark.parametrize("value", ["", "short", f"{SECRET}\n"])
def test_a_bad_key_in_the_environment_is_refused_and_does_not_open_the_server(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("LORAMIX_API_KEY", value)
    with pytest.raises(ConfigError, match="LORAMIX_API_KEY: a key has") as refused:
        read_keys(None)
    assert SECRET not in str(refused.value)


def test_one_key_for_inference_and_admins_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMIX_API_KEY", SECRET)
    monkeypatch.setenv("LORAMIX_ADMIN_KEY", SECRET)
    with pytest.raises(ConfigError, match="'default' and 'admin' are one key"):
        read_keys(None)


@pytest.mark.parametrize("secret", [SECRET, OTHER, "sk-of-nobody-at-all"])
def test_every_key_is_compared_in_constant_time_whoever_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    text = "".join(f'[[key]]\nname = "k{n}"\nkey = "{key}"\n' for n, key in enumerate([SECRET, OTHER, "sk-abcdefghijklmnop"]))
    keys = Keys(write(tmp_path, text))
    compared: list[bytes] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or compare(a, b))
    found = keys.find(secret.encode())
    assert (found is not None) == (secret in (SECRET, OTHER))
    assert len(set(compared)) == 3


def test_a_key_that_leaves_the_file_opens_nothing_any_more_and_a_new_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.keys._LOOK_SECONDS", 0)
    path = write(tmp_path, f'[[key]]\nname = "a"\nkey = "{SECRET}"\n')
    keys = Keys(path)
    write(tmp_path, f'[[key]]\nname = "somebody-else"\nkey = "{OTHER}"\n')
    assert keys.find(SECRET.encode()) is None
    assert keys.find(OTHER.encode()) == Caller("somebody-else")


@pytest.mark.parametrize("text", [None, "", '[[key]]\nname = "a"', f'[[key]]\nname = "a"\nkey = {OTHER}'])
def test_a_file_that_becomes_bad_changes_nothing_and_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str | None
) -> None:
    monkeypatch.setattr("server.keys._LOOK_SECONDS", 0)
    path = write(tmp_path, f'[[key]]\nname = "team-a"\nkey = "{SECRET}"\n')
    keys = Keys(path)
    path.unlink() if text is None else write(tmp_path, text)
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            assert keys.find(SECRET.encode()) == Caller("team-a")
            assert keys.find(OTHER.encode()) is None
    assert caplog.text.count("keys are kept as they were") == 1
    assert OTHER not in caplog.text


def test_keys_are_shown_by_no_repr_and_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, f'[[key]]\nname = "a"\nkey = "{SECRET}"\n')
    with caplog.at_level(logging.DEBUG):
        keys = Keys(path)
        keys.find(SECRET.encode())
        keys.find(OTHER.encode())
    shown = f"{caplog.text}{keys!r}{vars(keys)!r}{read_keys(path)!r}"
    digest = hashlib.sha256(SECRET.encode())
    assert not [text for text in (SECRET, OTHER, digest.hexdigest(), repr(digest.digest())) if text in shown]


def test_a_file_that_everybody_can_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, f'[[key]]\nname = "a"\nkey = "{SECRET}"\n')
    Keys(path)
    assert "chmod" not in caplog.text
    path.chmod(0o644)
    Keys(path)
    assert f"{path} can be read by everybody on this machine; chmod 600 it" in caplog.text


def test_vllms_own_keys_do_not_go_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Namespace(api_key=[OTHER])
    refuse_vllms_keys(theirs)  # alone they work as ever
    monkeypatch.setenv("LORAMIX_ADMIN_KEY", SECRET)
    refuse_vllms_keys(Namespace(api_key=None))
    with pytest.raises(ConfigError, match="--api-key is vLLM's own and does not go with LORAMIX_ADMIN_KEY") as refused:
        refuse_vllms_keys(theirs)
    assert OTHER not in str(refused.value)
    monkeypatch.setenv("LORAMIX_KEYS_FILE", os.devnull)
    monkeypatch.setenv("VLLM_API_KEY", OTHER)
    with pytest.raises(ConfigError, match="VLLM_API_KEY is vLLM's own and does not go with --keys-file"):
        refuse_vllms_keys(Namespace(api_key=None))
