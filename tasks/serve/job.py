"""The service on Ray Serve: replicas of the engine, and the door to them, which sends again what a lost one had."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from infra.cluster import ray_session
from tasks.records import UserError
from tasks.serve.limits import Animation, Refusal
from tasks.serve.messages import EngineSpec, Event, Progress, Status

OWNER_SECONDS = 60.0  # for the actor that owns a service's name to start
STATUS_SECONDS = 5.0
SPARE_SLOTS = 8  # of a replica, beside waiting and running requests: questions after its state
TRIES = 3  # a request that takes its replica down with it is not sent for ever
PAUSE_SECONDS = 0.5  # before a request that had its place in a lost replica asks for one again


class Animator:
    """One replica: an engine of its own."""

    def __init__(self, spec: EngineSpec) -> None:
        from tasks.serve.engine import Engine  # and with it torch and mlflow, in replicas alone

        self._engine = Engine(spec)
        self._engine.start()

    async def animate(self, animation: Animation, seconds: float) -> AsyncGenerator[Event, None]:
        async for event in self._engine.animate(animation, seconds):
            yield event

    async def status(self) -> Status:
        return await self._engine.status()

    def check_health(self) -> None:
        """Asked by Serve, which puts a new replica in the place of one that raises."""
        if not self._engine.alive():
            raise RuntimeError("a thread of the engine has ended")


class Replicas:
    """The door to all replicas, for requests of one event loop."""

    def __init__(self, handle: DeploymentHandle, model: str) -> None:
        self._animate = handle.options(method_name="animate", stream=True)
        self._status = handle.options(method_name="status")
        self._model = model
        self.sent_again = 0

    async def animate(self, animation: Animation, seconds: float) -> AsyncGenerator[Event, None]:
        """As `Engine.animate`, through the loss of a replica.

        Serve sends again only what no replica had taken. What was taken is sent again here: its seed makes the same
        clip, and its progress starts anew. A full queue does not refuse a request that had its place before the loss.
        """
        deadline = time.monotonic() + seconds
        tries = 1
        begun = False
        while (left := deadline - time.monotonic()) > 0:
            answers: Any = self._animate.remote(animation, left)  # typed as if it could be no stream
            try:
                while True:
                    event = await asyncio.wait_for(anext(answers), deadline - time.monotonic())
                    if begun and isinstance(event, Refusal) and event.status in (429, 503):
                        break
                    begun = True
                    yield event
                    if not isinstance(event, Progress):
                        return
            except TimeoutError:
                break
            except BackPressureError:
                if not begun:
                    yield Refusal(429, "too many requests wait already; send it again in 2 s", 2)
                    return
            except RayActorError:
                if tries == TRIES:
                    yield Refusal(500, f"{TRIES} replicas were lost on this request; ask for fewer frames")
                    return
                tries += 1
                self.sent_again += 1
                begun = True
            except (RayError, RayServeException) as error:
                yield Refusal(500, f"the replica failed with {type(error).__name__}; send the request again")
                return
            finally:
                answers.cancel()  # the replica stops at its next step when the caller is gone
            await asyncio.sleep(PAUSE_SECONDS)
        yield Refusal(504, f"no clip within {seconds:g} s; ask for fewer steps or frames, or later")

    async def status(self) -> Status:
        """The state of one replica; no version and the reason when none answers."""
        try:
            return await asyncio.wait_for(self._asked(), STATUS_SECONDS)
        except (TimeoutError, RayError, RayServeException):
            return Status(self._model, "", f"no replica answered within {STATUS_SECONDS:g} s", 0, 0, "", {})

    async def _asked(self) -> Status:
        return await self._status.remote()


class Owner:
    """An actor that holds the name of a service on a cluster; it lives as long as the process that made it."""

    def ping(self) -> None:
        """Returns while the name is held."""


@contextlib.contextmanager
def _owned(application: str) -> Iterator[None]:
    """The name of a Serve application, held by this process alone for the length of a `with` block.

    Ray gives a name to one actor at a time, and takes it back when the actor's process or the one that made it ends,
    so an application of that name which is there already was left by a service that was killed, and is removed.
    Raises UserError.
    """
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1)(Owner)  # another one where its machine was lost
    try:
        owner = actor.options(name=f"owner of {application}").remote()
        ray.get(owner.ping.remote(), timeout=OWNER_SECONDS)
    except ValueError as error:  # Ray's word for a name that is taken
        raise UserError(
            f"a service called {application!r} runs on this Ray cluster; give another --service, or stop that one"
        ) from error
    try:
        if application in serve.status().applications:
            serve.delete(application)
        try:
            yield
        finally:
            if _answers(owner):  # else the name, and what is called by it, may be another's
                serve.delete(application)
    finally:
        ray.kill(owner)


def _answers(owner: Any) -> bool:
    try:
        ray.get(owner.ping.remote(), timeout=OWNER_SECONDS)
    except (RayError, TimeoutError):
        return False
    return True


@contextlib.contextmanager
def serving(
    spec: EngineSpec, replicas: int, cpus: float, gpus: float = 0, address: str | None = None, service: str = ""
) -> Iterator[Replicas]:
    """Replicas on a Ray of this machine, or of the cluster at `address`, for the length of a `with` block.

    Each has `cpus` processors, which are also its threads, and `gpus` accelerators, which may be a part of one.
    `service` is their name on the cluster, where no other may have it; "" takes the model's and the alias's.
    Raises UserError.
    """
    application = "trip-" + re.sub(r"[^\w.-]", "-", service or f"{spec.name}-{spec.alias}")
    with ray_session(address), contextlib.ExitStack() as stack:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        animator = serve.deployment(Animator).options(
            num_replicas=replicas,
            max_ongoing_requests=spec.max_queue + spec.max_batch + SPARE_SLOTS,
            max_queued_requests=spec.max_queue,
            health_check_period_s=5,
            # The registry's client waits two minutes for a server that is silent, and a replica with it.
            ray_actor_options={
                "num_cpus": cpus,
                "num_gpus": gpus,
                "runtime_env": {"env_vars": {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}},
            },
        )
        stack.enter_context(_owned(application))
        yield Replicas(serve.run(animator.bind(spec), name=application, route_prefix=None), spec.name)
