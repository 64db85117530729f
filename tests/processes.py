"""Processes of their own for tests, forked from one that has imported torch and diffusers and has run nothing.

    done = processes.run(CODE, "argument", cwd=folder)
    done.returncode, done.stdout, done.stderr

An interpreter of its own spends seconds on these imports, each time. A fork has them; what is imported of attnctl, set
or patched stays in the fork. Tests of the start itself (imports, the installed command, Python's own options) still run
an interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

LARGE = ["torch", "transformers", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"]
"""What the server imports."""


def context() -> Any:
    """Return the way of starting processes from the server; where there is none, from nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(LARGE)
    return found


def run(
    code: str, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run code as `python -c code arguments` would.

    Args:
        code: What is run.
        *arguments: What stands behind the first entry of `sys.argv`.
        cwd: The folder that it runs in, from which it imports too.
        env: The variables of the environment; by default those of this process.
        timeout: Seconds after which the process is killed.

    Raises:
        subprocess.TimeoutExpired: It was killed.
    """
    (done,) = run_all(code, [list(arguments)], cwd=cwd, envs=[env], timeout=timeout)
    return done


def run_all(
    code: str,
    arguments: Sequence[list[str]],
    *,
    cwd: Path | None = None,
    envs: Sequence[Mapping[str, str] | None] | None = None,
    timeout: float = 600,
) -> list[subprocess.CompletedProcess[str]]:
    """Run code in several processes at the same time, each with its own arguments and environment."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for number, (words, env) in enumerate(zip(arguments, envs or [None] * len(arguments), strict=True)):
            said = [os.path.join(folder, f"{number}-{name}") for name in ("stdout", "stderr")]
            told = (code, words, str(cwd or Path.cwd()), dict(os.environ if env is None else env), said)
            process = context().Process(target=_child, args=told)
            process.start()
            running.append((process, said))
        finished = []
        for process, said in running:
            process.join(timeout)
            if process.exitcode is None:
                process.kill()
                process.join()
                raise subprocess.TimeoutExpired(code[:80], timeout)
            out, err = (Path(name).read_text(encoding="utf-8", errors="replace") for name in said)
            finished.append(subprocess.CompletedProcess(code, process.exitcode, out, err))
        return finished


def alone(measure: Callable[[], Any]) -> Any:
    """Call a function of a test's module in a process of its own and return what it returns."""
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, mp_context=context()) as pool:
        return pool.submit(measure).result()


def _child(code: str, words: list[str], cwd: str, env: dict[str, str], said: list[str]) -> None:
    for number, name in enumerate(said, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv, sys.path[:0] = ["-c", *words], [cwd]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
