"""The service on Ray Serve: replicas of the engine, and the client that retries requests of a lost replica."""

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
from tasks.serve.limits import Animation, Refusal, out_of_time
from tasks.serve.messages import EngineSpec, Message, Progress, Status

OWNER_SECONDS = 60.0  # for the start of the actor that owns a service's name
STATUS_SECONDS = 5.0
SPARE_SLOTS = 8  # of a replica, in addition to waiting and running requests: for status calls
TRIES = 3  # a request that kills its replica is not sent forever
PAUSE_SECONDS = 0.5  # before a request whose replica was lost is sent again


class Replica:
    """A replica with its own engine, which only the replica's process imports."""

    def __init__(self, spec: EngineSpec) -> None:
        from tasks.serve.engine import Engine  # imports torch and mlflow, which the gateway does without

        self._engine = Engine(spec)
        self._engine.start()

    async def stream(self, animation: Animation, seconds: float) -> AsyncGenerator[Message, None]:
        async for message in self._engine.stream(animation, seconds):
            yield message

    async def status(self) -> Status:
        return await self._engine.status()

    def check_health(self) -> None:
        """Raises RuntimeError when the engine is dead; Serve then replaces the replica."""
        if not self._engine.alive():
            raise RuntimeError("a thread of the engine has ended")


class Replicas:
    """Sends requests of one event loop to the replicas."""

    def __init__(self, handle: DeploymentHandle, model: str) -> None:
        self._stream = handle.options(method_name="stream", stream=True)
        self._status = handle.options(method_name="status")
        self._model = model
        self.retries = 0

    async def stream(self, animation: Animation, seconds: float) -> AsyncGenerator[Message, None]:
        """Streams as `Engine.stream` does, and sends the request again if its replica is lost.

        Serve retries only requests that no replica has accepted. This method retries accepted ones: the seed gives the
        same clip, and progress restarts at 0. A full queue does not refuse a request that was accepted before the loss.
        """
        deadline = time.monotonic() + seconds
        tries = 1
        accepted = False
        while (left := deadline - time.monotonic()) > 0:
            messages: Any = self._stream.remote(animation, left)  # Ray types it as a single response
            try:
                while True:
                    message = await asyncio.wait_for(anext(messages), deadline - time.monotonic())
                    if accepted and isinstance(message, Refusal) and message.status in (429, 503):
                        break
                    accepted = True
                    yield message
                    if not isinstance(message, Progress):
                        return
            except TimeoutError:
                break
            except BackPressureError:
                if not accepted:
                    yield Refusal(429, "too many requests are waiting; send it again in 2 s", 2)
                    return
            except RayActorError:
                if tries == TRIES:
                    yield Refusal(500, f"{TRIES} replicas were lost during this request; use fewer frames")
                    return
                tries += 1
                self.retries += 1
                accepted = True
            except (RayError, RayServeException) as error:
                yield Refusal(500, f"the replica failed with {type(error).__name__}; send the request again")
                return
            finally:
                # The replica stops at its next step when the client has disconnected. Ray raises the error again of a
                # request that no replica accepted.
                with contextlib.suppress(RayError, RayServeException):
                    messages.cancel()
            await asyncio.sleep(PAUSE_SECONDS)
        yield out_of_time(seconds)

    async def status(self) -> Status:
        """Returns the state of one replica; without a version, and with the reason, when none answers."""
        try:
            return await asyncio.wait_for(self._replica_status(), STATUS_SECONDS)
        except (TimeoutError, RayError, RayServeException):
            return Status(self._model, "", f"no replica answered within {STATUS_SECONDS:g} s", 0, 0, "", {}, 0)

    async def _replica_status(self) -> Status:
        return await self._status.remote()


class Owner:
    """An actor that reserves a service's name on a cluster; it ends with the process that created it."""

    def ping(self) -> None:
        """Returns while the name is reserved."""


@contextlib.contextmanager
def _reserved_name(application: str) -> Iterator[None]:
    """Reserves the name of a Serve application for this process during a `with` block.

    Ray gives a name to one actor at a time and frees it when the process of the actor or of its creator ends. So an
    existing application of that name belongs to a service that was killed, and is removed. Raises UserError.
    """
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1)(Owner)  # restarted if its machine is lost
    try:
        owner = actor.options(name=f"owner of {application}").remote()
        ray.get(owner.ping.remote(), timeout=OWNER_SECONDS)
    except ValueError as error:  # Ray raises it for a name in use
        raise UserError(
            f"a service called {application!r} runs on this Ray cluster; give another --service, or stop that one"
        ) from error
    try:
        if application in serve.status().applications:
            serve.delete(application)
        try:
            yield
        finally:
            if _answers(owner):  # otherwise another service may have the name by now
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
    """Runs replicas on a local Ray, or on the cluster at `address`, during a `with` block.

    Each replica has `cpus` processors, as many threads, and `gpus` GPUs, which may be a fraction of one. `service` is
    their name on the cluster, which must be unique there; "" stands for the names of model and alias.
    Raises UserError.
    """
    application = "trip-" + re.sub(r"[^\w.-]", "-", service or f"{spec.name}-{spec.alias}")
    with ray_session(address), contextlib.ExitStack() as stack:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        decorated: Any = serve.deployment(Replica)  # typed by Ray as a plain function
        deployment = decorated.options(
            num_replicas=replicas,
            max_ongoing_requests=spec.max_queue + spec.max_batch + SPARE_SLOTS,
            max_queued_requests=spec.max_queue,
            health_check_period_s=5,
            # By default the registry's client, and so a replica, waits two minutes for a silent server.
            ray_actor_options={
                "num_cpus": cpus,
                "num_gpus": gpus,
                "runtime_env": {"env_vars": {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}},
            },
        )
        stack.enter_context(_reserved_name(application))
        yield Replicas(serve.run(deployment.bind(spec), name=application, route_prefix=None), spec.name)
