"""Files that are there as a whole or not at all, whenever a run is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """A path beside `file`, with its ending, to write to; it takes the place of `file` unless the block raises."""
    partial = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
