"""Two threads on one denoiser: each request is right or refused at once, and nothing is left behind."""

from __future__ import annotations

import asyncio
import copy
import functools
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
import zoo
import zoo_pipelines as pipes
from contract import assert_clean, snapshot
from torch import Tensor

import attnctl
from attnctl.errors import ConflictError
from attnctl.processors import PAG, Capture

STEPS = 2


class Boom(Exception):
    """Raised on purpose."""


def tiny() -> tuple[Any, Any, dict[str, Any]]:
    """Build two pipelines on one small UNet, with schedulers of their own, and a call of either."""
    pipe, _ = pipes.build("sd")
    parts = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)}
    other = pipes.quiet(type(pipe)(**parts, requires_safety_checker=False))
    embeds = pipe.encode_prompt("a cat", "cpu", 1, True, "ugly")
    call = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "height": 16, "width": 16}
    return pipe, other, {**call, "num_inference_steps": STEPS}


class Loop:
    """As little of a pipeline as a stress test needs: a denoiser, a scheduler and the loop."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        self.unet, self.scheduler = unet, scheduler
        self.do_classifier_free_guidance = False

    @torch.no_grad()
    def __call__(self, boom: int | None = None) -> Tensor:
        x = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8)
        self.scheduler.set_timesteps(STEPS)
        for i, t in enumerate(self.scheduler.timesteps):
            noise = self.unet(x, t, encoder_hidden_states=torch.ones(1, 3, 8), return_dict=False)[0]
            x = self.scheduler.step(noise, t, x, return_dict=False)[0]
            if i == boom:
                raise Boom
        return x


def loops() -> tuple[Loop, Loop]:
    """Build two loops on one UNet of a few layers."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    ).eval()  # fmt: skip
    return Loop(unet, diffusers.DDIMScheduler()), Loop(unet, diffusers.DDIMScheduler())


def threads(*jobs: Callable[[], Any]) -> list[Any]:
    """Run jobs at the same time; return what each returned or raised."""
    results: list[Any] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def work(n: int) -> None:
        start.wait()
        try:
            results[n] = jobs[n]()
        except Exception as error:
            results[n] = error

    workers = [threading.Thread(target=work, args=(n,)) for n in range(len(jobs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results


def trials(number: int) -> dict[str, int]:
    """Have two requests meet on one denoiser and count how they end, each right or refused, with nothing left."""
    pipe, other = loops()
    control = PAG(scale=2.0, sites="mid")
    with attnctl.control(pipe, control):
        guided = pipe()
        assert torch.equal(other(), guided)
    plain = pipe()
    assert not torch.equal(plain, guided)
    before = snapshot(pipe.unet, pipe.scheduler, other.scheduler)
    draw = random.Random(0)
    outcomes = {"right": 0, "refused": 0, "failed": 0, "detached": 0}
    for _ in range(number):
        at, detaching = [draw.choice([None, None, 0, 1]) for _ in range(2)], draw.random() < 0.2
        handle = attnctl.control(pipe, control)
        jobs = [functools.partial(host, when) for host, when in zip((pipe, other), at, strict=True)]
        results = threads(*jobs, *([handle.detach] if detaching else []))
        handle.detach()
        for result, when in zip(results, at, strict=False):
            if isinstance(result, Tensor):
                assert when is None
                assert detaching or torch.equal(result, guided)
                outcomes["detached" if detaching else "right"] += 1
            else:
                assert isinstance(result, (ConflictError, Boom)), result
                outcomes["refused" if isinstance(result, ConflictError) else "failed"] += 1
        assert_clean(before, pipe.unet, pipe.scheduler, other.scheduler)
    assert torch.equal(other(), plain)
    return outcomes


def test_two_requests_are_right_or_refused_in_200_trials() -> None:
    outcomes = trials(200)
    assert sum(outcomes.values()) == 400
    assert min(outcomes["right"], outcomes["refused"], outcomes["failed"]) > 10, outcomes


def test_the_second_request_is_refused_at_once_with_the_remedy() -> None:
    pipe, other, call = tiny()
    inside, done = threading.Event(), threading.Event()

    def hold(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        inside.set()
        done.wait(60)
        return tensors

    control = PAG(scale=2.0, sites="mid")
    with attnctl.control(pipe, control) as handle:
        guided = pipes.run(pipe, call)

        def late() -> None:
            inside.wait(60)
            try:
                for host in (other, pipe):
                    with pytest.raises(ConflictError, match=r"one after the other.*copy\.deepcopy"):
                        pipes.run(host, call)
            finally:
                done.set()

        first, second = threads(lambda: pipes.run(pipe, call, callback_on_step_end=hold), late)
        assert second is None
        assert torch.equal(first, guided)
        # The other thread may run when the first is through, or was broken off.
        assert torch.equal(threads(lambda: pipes.run(other, call))[0], guided)
        broken = threads(lambda: pipes.run(pipe, call, callback_on_step_end=lambda *_: 1 / 0))
        assert isinstance(broken[0], ZeroDivisionError)
        assert torch.equal(threads(lambda: pipes.run(other, call))[0], guided)
        assert handle.passes > 0


def test_requests_one_at_a_time_are_right_in_whatever_thread() -> None:
    """Worker after worker, a pool, gradio's and asyncio's threads; a thread that has left a run and works elsewhere."""
    pipe, other = loops()
    elsewhere, inside, done = loops()[0], threading.Event(), threading.Event()
    with attnctl.control(pipe, PAG(scale=2.0, sites="mid")):
        guided = pipe()
        for host in (pipe, other, pipe):
            assert torch.equal(threads(host)[0], guided)
        with ThreadPoolExecutor(4) as pool:
            for host in (pipe, other) * 3:
                assert torch.equal(pool.submit(host).result(), guided)

        async def served() -> list[Tensor]:
            turn = asyncio.Lock()

            async def request(host: Loop) -> Tensor:
                async with turn:
                    return await asyncio.to_thread(host)

            return list(await asyncio.gather(*map(request, (pipe, other, pipe, other))))

        assert all(torch.equal(result, guided) for result in asyncio.run(served()))

        def wait(*_: Any) -> None:
            inside.set()
            done.wait(60)

        def busy() -> None:
            """Break a run off, then run a pipeline of the same class on a denoiser of its own."""
            with pytest.raises(Boom):
                pipe(boom=0)
            elsewhere.unet.register_forward_pre_hook(wait)
            elsewhere()

        def request() -> Tensor:
            inside.wait(60)
            try:
                return other()
            finally:
                done.set()

        left, right = threads(busy, request)
        assert left is None
        assert torch.equal(right, guided), right


def test_a_server_of_a_bare_model_is_not_at_work_between_requests() -> None:
    """Its calls do not depend on each other; one that failed leaves the others to any thread."""
    model, inputs = zoo.build("sd15")
    failed, served = threading.Event(), threading.Event()
    with attnctl.control(model, PAG(scale=2.0, sites="mid"), layout="cond"):
        guided = zoo.call(model, inputs)

        def server() -> None:
            try:
                zoo.call(model, inputs | {"encoder_hidden_states": torch.zeros(1, 2, 3)})
            except RuntimeError:
                failed.set()
            served.wait(60)

        def request() -> Tensor:
            failed.wait(60)
            try:
                return zoo.call(model, inputs)
            finally:
                served.set()

        idle, right = threads(server, request)
        assert idle is None
        assert torch.equal(right, guided), right


def test_copies_run_beside_each_other() -> None:
    pipe, _, call = tiny()
    twin = copy.deepcopy(pipe)
    control = PAG(scale=2.0, sites="mid")
    with attnctl.control(pipe, control):
        guided = pipes.run(pipe, call)
    with attnctl.control(pipe, control), attnctl.control(twin, control):
        for result in threads(*(functools.partial(pipes.run, host, call) for host in (pipe, twin))):
            assert torch.equal(result, guided)


def test_a_bare_model_is_refused_where_a_run_depends_on_its_steps() -> None:
    model, inputs = zoo.build("sd15")
    turn = threading.Barrier(2)

    def loop(handle: Any) -> None:
        for i in range(2):
            handle.set_step(i, 2)
            zoo.call(model, inputs)
            turn.wait(60)
            turn.wait(60)

    with attnctl.control(model, PAG(scale=2.0, sites="mid", start=0.5), Capture(words=(1,)), layout="cond") as handle:

        def intrude() -> None:
            turn.wait(60)
            try:
                with pytest.raises(ConflictError, match="Two threads"):
                    zoo.call(model, inputs)
            finally:
                turn.wait(60)
                turn.wait(60)
                turn.wait(60)

        assert threads(lambda: loop(handle), intrude) == [None, None]
