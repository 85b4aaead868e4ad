"""Secrets are removed from texts, logs, streams and configurations, and nothing else is."""

import io
import logging
import sys

import pytest
from omegaconf import OmegaConf

from src.common.secrecy import SECRET, RedactingRecord, RedactingStream, plain_config, without_secrets
from tests.helpers.configure import configure

TOKEN = "s3cr3t-t0ken-of-mine"


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MY_TOKEN": TOKEN, "HF_KEY": "short", "OTHER": "long enough"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"see s3://me:{TOKEN}@bucket/a?x={TOKEN}&y=1 and b", "see s3://bucket/a and b"),
        (f"a {TOKEN} b", "a ${oc.env:MY_TOKEN} b"),
        (f"'https://host/x?sig={TOKEN}' \"ftp://u@h/y\"", "'https://host/x' \"ftp://h/y\""),
        (f"(https://host/x?sig={TOKEN})", "(https://host/x)"),
    ],
)
def test_users_queries_and_secret_values_are_removed(text: str, clean: str) -> None:
    assert without_secrets(text) == clean


@pytest.mark.parametrize(
    "text",
    ["short", "long enough", "user@host", "a?b=c", "hf://datasets/x@main/y", "http://x.org/a (why?)", ""],
)
def test_text_without_secrets_stays_the_same(text: str) -> None:
    assert without_secrets(text) == text


def test_a_variable_can_be_declared_secret() -> None:
    assert without_secrets("long enough", ["OTHER"]) == "${oc.env:OTHER}"
    assert without_secrets("short", ["HF_KEY"]) == "short", "short values would be found in unrelated text"
    assert without_secrets("long enough", ["UNSET_VARIABLE"]) == "long enough"


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "db_password", "Credentials"])
def test_names_of_secret_variables(name: str) -> None:
    assert SECRET.search(name)


@pytest.mark.parametrize("name", ["PATH", "KEYBOARD", "HOME", "AEKT_DATA"])
def test_names_of_other_variables(name: str) -> None:
    assert not SECRET.search(name)


def test_messages_of_the_log_show_no_secrets() -> None:
    record = RedactingRecord("a", logging.INFO, "file", 1, "token %s of %s", (TOKEN, "me"), None)
    assert record.getMessage() == "token ${oc.env:MY_TOKEN} of me"


def test_a_stream_writes_no_secrets_and_is_otherwise_the_stream_itself() -> None:
    stream = io.StringIO()
    redacting = RedactingStream(stream)
    print(f"read https://me:{TOKEN}@host/x", file=redacting)
    assert stream.getvalue() == redacting.getvalue() == "read https://host/x\n"
    assert RedactingStream(sys.__stderr__).fileno() == sys.__stderr__.fileno()  # type: ignore[union-attr]


def test_a_configuration_without_secrets_is_only_resolved() -> None:
    cfg = configure("model=resnet20_to_resnet8")
    assert plain_config(cfg) == OmegaConf.to_container(cfg, resolve=True)


def test_secrets_are_removed_at_any_depth_of_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSUSPICIOUS", "a-value-of-mine")
    monkeypatch.setenv("AEKT_DATA", "/data/of/mine")
    monkeypatch.setenv("AEKT_CACHE", "/cache/of/mine")
    cfg = OmegaConf.create(
        {
            "number": 3,
            "nothing": None,
            "list": [f"x {TOKEN}", {"root": "https://me:pass@host/${oc.env:UNSUSPICIOUS}?sig=1"}],
            "data": "${oc.env:AEKT_DATA}/cifar",
            "cache": "${oc.env:AEKT_CACHE,none}",
        }
    )
    assert plain_config(cfg) == {
        "number": 3,
        "nothing": None,
        "list": ["x ${oc.env:MY_TOKEN}", {"root": "https://host/${oc.env:UNSUSPICIOUS}"}],
        "data": "/data/of/mine/cifar",
        "cache": "/cache/of/mine",
    }
