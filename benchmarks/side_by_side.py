"""A row of `benchmarks.gpu`: several runs side by side on one card, against the same runs one after another."""

import contextlib
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from benchmarks.gpu_bench import DEFAULT, TINY, Bench, Finding, Sizes
from benchmarks.timing import Row, divide
from benchmarks.trial import SMALLEST, assemble, fit_timed, silence

MPS = "nvidia-cuda-mps-control"
"""The program that starts NVIDIA's Multi-Process Service."""
PATIENCE = 45
"""Seconds after which a process that does not answer counts as failed."""
STOP = 0


class Task(NamedTuple):
    """The training of one process."""

    folder: Path
    images: Path
    device: torch.device
    sizes: Sizes
    method: str
    seed: int


class Gate(L.Callback):
    """Stop a fit after its warm-up, and let it train only as many steps as the other process asks for.

    The answer to a number of steps is the times at which they began and ended. `STOP` ends this process.
    """

    def __init__(self, connection: Connection, bench: Bench) -> None:
        self.connection, self.bench = connection, bench
        self.last, self.begin = bench.sizes.warm_up, 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Answer, and wait for the next request."""
        if trainer.global_step - 1 < self.last:
            return
        self.bench.wait()
        self.connection.send((self.begin, time.perf_counter()))
        steps = self.connection.recv()
        if steps == STOP:
            self.connection.close()
            os._exit(0)  # without Lightning's evaluation and checkpoint
        self.last += steps
        self.begin = time.perf_counter()


def work(task: Task, connection: Connection) -> None:
    """Train in this process, as the gate's other side demands. Sends the traceback of an error."""
    try:
        silence()
        torch.set_num_threads(1)
        bench = Bench(task.folder, task.images, task.device, task.sizes._replace(matrix=8))
        cfg = bench.compose(task.method, SMALLEST, DEFAULT, f"seed={task.seed}")
        gate = Gate(connection, bench)
        fit_timed(assemble(cfg), gate, task.folder, max_epochs=1000, limit_val_batches=0)
    except BaseException:
        connection.send(traceback.format_exc())


class Fleet:
    """The processes, each of which trains one run."""

    def __init__(self, tasks: Sequence[Task], method: str) -> None:
        context: Any = multiprocessing.get_context(method)
        self.processes, self.connections = [], []
        for task in tasks:
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(task, theirs), daemon=False)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def answers(self, connections: Sequence[Connection]) -> list[tuple[float, float]]:
        """Receive the answer of each process. Raises `RuntimeError` if one fails."""
        found: dict[Connection, tuple[float, float]] = {}
        end = time.monotonic() + PATIENCE
        while len(found) < len(connections):
            missing = [connection for connection in connections if connection not in found]
            ready: Any = wait(missing, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise RuntimeError(f"{len(missing)} processes did not answer within {PATIENCE} seconds")
            for connection in ready:
                try:
                    answer = connection.recv()
                except EOFError:
                    answer = "it was killed"
                if isinstance(answer, str):
                    raise RuntimeError(f"a process failed: {answer}")
                found[connection] = answer
        return [found[connection] for connection in connections]

    def one_after_another(self, steps: int) -> list[float]:
        """Train all runs, one after another. Returns the seconds of each."""
        seconds = []
        for connection in self.connections:
            connection.send(steps)
            ((begin, end),) = self.answers([connection])
            seconds.append(end - begin)
        return seconds

    def together(self, steps: int) -> float:
        """Train all runs side by side. Returns the seconds from the first begin to the last end."""
        for connection in self.connections:
            connection.send(steps)
        begins, ends = zip(*self.answers(self.connections), strict=True)
        return float(max(ends) - min(begins))

    def end(self) -> None:
        """End all processes."""
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send(STOP)
        end = time.monotonic() + 5
        for process in self.processes:
            process.join(timeout=max(0.0, end - time.monotonic()))
            if process.is_alive():
                process.kill()


def side_by_side(bench: Bench) -> Iterator[Finding]:
    """Several methods and seeds side by side on one card, one process each, against one after another."""
    with multi_process_service(bench) as (started, note):
        try:
            yield _finding(bench, "under MPS" if started else f"without MPS ({note})")
        except RuntimeError as error:
            if not started:
                raise
            note = f"under MPS, {str(error).strip().splitlines()[-1]}"
    if started and note:
        yield _finding(bench, f"without MPS ({note})")


def _finding(bench: Bench, how: str) -> Finding:
    sizes = bench.sizes
    tasks = [
        Task(bench.folder, bench.images, bench.device, sizes, method, seed)
        for method in sizes.methods
        for seed in range(sizes.seeds)
    ]
    fleet = Fleet(tasks, "fork" if sizes is TINY and not bench.is_cuda else "spawn")
    try:
        found = _measure(bench, fleet)
    finally:
        fleet.end()
    steps, alone, together = found
    medians = [statistics.median(seconds) for seconds in (alone, together)]
    row = Row(
        f"{len(tasks)} runs side by side, {how}",
        "one after another",
        f"{SMALLEST}, {sizes.batch_size}",
        divide(alone, together),
        "speed >= 3",
        f"{medians[1]:.3g} s, {medians[0]:.3g} s",
    )
    details = {"processes": len(tasks), "steps": steps, "one_after_another": alone, "side_by_side": together}
    return Finding(row, details)


def _measure(bench: Bench, fleet: Fleet) -> tuple[int, list[float], list[float]]:
    """Train all runs in both ways, in turn. Returns the steps of each run in a round, and the seconds of each round."""
    fleet.answers(fleet.connections)  # all processes have started and warmed up
    few = bench.sizes.few_steps
    steps = bench.steps_of_window(max(fleet.one_after_another(few)) / few)
    alone, together = [], []
    for _ in range(bench.sizes.rounds):
        begin = time.perf_counter()
        alone.append(sum(fleet.one_after_another(steps)))
        together.append(fleet.together(steps))
        if 2 * time.perf_counter() - begin > bench.deadline:
            break
    return steps, alone, together


@contextlib.contextmanager
def multi_process_service(bench: Bench) -> Iterator[tuple[bool, str]]:
    """Start NVIDIA's Multi-Process Service for the processes that start in the block, and end it afterwards.

    Returns whether it runs, and else why not.
    """
    program = shutil.which(MPS) if bench.is_cuda else None
    if program is None:
        yield False, f"there is no {MPS}" if bench.is_cuda else "no GPU"
        return
    with tempfile.TemporaryDirectory(prefix="mps", ignore_cleanup_errors=True) as folder:  # a short path, for a socket
        variables = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        os.environ.update(variables)
        try:
            reason = _control_mps(program, "-d")
            yield not reason, reason
        finally:
            _control_mps(program, commands="quit\n")
            for name in variables:
                os.environ.pop(name)


def _control_mps(program: str, *options: str, commands: str = "") -> str:
    """Call MPS's control program. Returns the reason of a failure, or nothing."""
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # the daemon would keep a pipe open
    try:
        subprocess.run([program, *options], input=commands, text=True, check=True, timeout=20, **quiet)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{MPS} fails: {error}"
    return ""
