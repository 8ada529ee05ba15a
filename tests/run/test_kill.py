"""Killed (SIGKILL) again and again, while saving too, and resumed: the run ends with the bytes of a straight one.

Few kills, so that the suite stays short; benchmarks/kill_and_resume.py does ten for each method, with the installed
program. Here the processes are forked from one that has imported everything.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny_run

PRELOADED = ["gradientless.cli", "gradientless.run.train", "gradientless.run.report", "gradientless.run.events"]
PRELOADED += ["gradientless.language.surfaces.head_session", "transformers", "matplotlib.backends.backend_agg"]
PATIENCE = 60.0  # seconds after which a run counts as hanging


def _run(arguments: list[str], environment: dict[str, str]) -> None:
    """What a forked process does."""
    import torch

    from gradientless import cli

    os.environ.update(environment)
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    cli.main(arguments)


class Program:
    """`gradientless` in processes that are quick to start."""

    def __init__(self, environment: dict[str, str]):
        self._environment = environment
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def start(self, arguments: list[str]) -> multiprocessing.process.BaseProcess:
        process = self._context.Process(target=_run, args=(arguments, self._environment))
        process.start()
        return process

    def finish(self, arguments: list[str]) -> None:
        """Run to the end."""
        process = self.start(arguments)
        process.join(PATIENCE)
        assert process.exitcode == 0

    def kill(self, arguments: list[str], out: Path, step: int, delay: float, saving: bool) -> None:
        """Start, and kill `delay` seconds after the log shows `step`; saving: at the next sight of a file or folder
        half written after that."""
        shown = tiny_run.Log(out)
        process = self.start(arguments)
        end = time.perf_counter() + PATIENCE
        while process.exitcode is None and not shown.reaches(step):
            assert time.perf_counter() < end
            time.sleep(0.0005)
        process.join(delay)
        while process.exitcode is None and saving and not list(out.glob(".*.partial")):
            assert time.perf_counter() < end
            time.sleep(0.0005)
        process.kill()
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Iterator[Program]:
    cache = str(tmp_path_factory.mktemp("cache"))
    yield Program({"GRADIENTLESS_CACHE": cache, "HF_HUB_OFFLINE": "1"})


@pytest.fixture(scope="module")
def model_and_rows(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("kill")
    return tiny_run.make_model(folder / "model"), tiny_run.write_table(folder / "rows.csv")


@pytest.mark.parametrize("method", sorted(tiny_run.METHODS))
def test_killed_and_resumed_to_the_same_bytes(method, program, model_and_rows, tmp_path):
    optimizer, options = tiny_run.METHODS[method]
    straight, killed = tmp_path / "straight", tmp_path / "killed"

    def arguments(out: Path) -> list[str]:
        return tiny_run.arguments(*model_and_rows, out, *options, *tiny_run.UNEVEN, steps=200, optimizer=optimizer)

    program.finish(arguments(straight))
    moments = random.Random(f"kill {method}")
    for step, saving in ((moments.randint(15, 50), False), (moments.randint(51, 90), True)):
        program.kill([*arguments(killed), "--resume"], killed, step, moments.uniform(0, 0.01), saving)
    program.finish([*arguments(killed), "--resume"])
    assert tiny_run.outcome(killed) == tiny_run.outcome(straight)
    assert not list(killed.glob(".*.partial"))
