"""Run commands as a user types them, but in the test's process, because imports take most of a command's time."""

import contextlib
import io
import runpy
import sys
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

SOURCE = Path(__file__).parents[2] / "src"


class Ran(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


def run(command: str, *arguments: object) -> Ran:
    """Run `python -m src.<command> <arguments>` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = [command, *(str(argument) for argument in arguments)]
    with (
        patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.resetwarnings()
        warnings.simplefilter("ignore", DeprecationWarning)  # as Python does by default
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        warnings.simplefilter("ignore", ResourceWarning)  # about files that earlier tests left to the garbage collector
        warnings.showwarning = lambda message, category, *_: print(f"{category.__name__}: {message}", file=err)
        try:
            runpy.run_path(str(SOURCE / f"{command}.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=err)
        except BaseException:
            code = 1
            traceback.print_exc(file=err)
    return Ran(code, out.getvalue(), err.getvalue())


def assert_refused(ran: Ran, *phrases: str) -> None:
    """Assert that a command trained nothing and ended with exit code 1 and one line on stderr with these phrases."""
    assert ran.code == 1
    assert len(ran.err.splitlines()) == 1, ran.err
    assert ran.err.startswith("error: ")
    for phrase in phrases:
        assert phrase in ran.err
    assert "epoch 1/" not in ran.out
