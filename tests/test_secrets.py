"""Secrets of the environment and of URLs reach neither files nor messages."""

from pathlib import Path

import pytest
import wandb
from omegaconf import OmegaConf

from tests.helpers.commands import run
from tests.helpers.place import Place

TOKEN = "s3cr3t-t0ken-of-mine"


def files_with(text: str, folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and text.encode() in file.read_bytes()]


def test_secrets_reach_neither_files_nor_messages(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", TOKEN)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("UNSUSPICIOUS", "another-" + TOKEN[::-1])
    ran = place.train(
        "method=vanilla",
        "logger=wandb",
        f"data.root='https://user:{TOKEN}@host/data/${{oc.env:UNSUSPICIOUS}}?sig={TOKEN}'",
        "seed=5",
    )
    wandb.finish()
    wandb.teardown()
    assert ran.code == 0, ran.err
    for secret in (TOKEN, TOKEN[::-1]):
        assert files_with(secret, place.path) == []
        assert secret not in ran.out + ran.err
        assert not any(secret in str(file) for file in place.path.rglob("*"))
    (folder,) = [folder for folder in place.runs.glob("*/*/vanilla/*seed5*") if folder.is_dir()]
    config = OmegaConf.load(folder / "config.yaml")
    assert OmegaConf.to_container(config)["data"]["root"] == "https://host/data/${oc.env:UNSUSPICIOUS}"  # type: ignore[call-overload,index]


@pytest.mark.parametrize("flags", [(), ("-m",)])
def test_error_messages_show_no_secrets(place: Place, flags: tuple[str, ...]) -> None:
    root = f"data.root='https://user:{TOKEN}@127.0.0.1:9/x?sig={TOKEN}'"
    ran = run("train", *flags, "data=stream", root, f"runs={place.runs}")
    assert ran.code == 1
    assert "https://127.0.0.1:9/x" in ran.err
    assert TOKEN not in ran.out + ran.err
    assert files_with(TOKEN, place.path) == []
