"""The server on a Ray cluster: Ray Serve runs the gateway, and each local member apart.

What callers see is the application of :mod:`skimp.runtime.cascade.server`, unchanged. A gateway
takes a new configuration while it serves: requests that are under way end as they began. Ray is
imported when something is deployed, not before.
"""

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Receive, Scope, Send

from ...ir.errors import ClusterError, SkimpError
from .build import build_gateway, build_member, build_policies, ledger_url
from .config import Config, ConfigError, MemberConfig, ReplicasConfig, parse_config
from .gateway import members_exist
from .local import LocalModel
from .member import Chunk, Kind, Member, MemberError, Reply
from .policy import read_record
from .run import log_to_stderr
from .server import create_app

APPLICATION = "skimp"
"""Its name in the cluster: deployed again, it is changed and not doubled."""


def deploy(config: Config, folder: Path, host: str, port: int) -> None:
    """Serve a configuration on the cluster that this process is connected to.

    Where it serves already, only what differs is changed: policies, keys, prices, limits and
    members behind a URL in the gateways as they run, what else there is by new processes that take
    over from the old ones.

    Args:
        config: It.
        folder: What its paths are relative to.
        host: Where every node with a gateway listens; Ray keeps to the first address it was given.
        port: Likewise.

    Raises:
        ConfigError: It needs PostgreSQL; or no other machine could make sense of it, for want of
            a key in its environment for example. What served before serves on.
        ClusterError: Ray could not start it.
    """
    import ray
    from ray import serve

    replicas = config.server.replicas
    config = config.model_copy(update={"ledger": ledger_url(config.ledger, folder)})
    if replicas.max > 1 and config.ledger.startswith("sqlite"):
        raise ConfigError(
            f"ledger: {replicas.max} gateways (server.replicas.max) cannot share SQLite, which is "
            "a file of one machine; give the URL of a PostgreSQL database, or let there be 1"
        )
    members_exist(build_policies(config, folder), config.members)  # or it fails where it serves
    told = packed(config, folder)
    try:
        ray.get(ray.remote(num_cpus=0)(check).remote(told))  # or what serves now would end with it
    except SkimpError as error:
        raise ConfigError(f"on a node of the cluster: {getattr(error, 'cause', error)}") from error
    members = {n: _local(m) for n, m in config.members.items() if m.local is not None}
    handles = {}
    for name, local in members.items():
        called, own = f"member-{quote(name, safe='')}", config.members[name].replicas
        handles[name] = _deployment(serve, LocalReplica, called, own, 2, local).bind(local)
    most = config.server.max_in_flight
    gateway = _deployment(
        serve, serve.ingress(None)(Ingress), "gateway", replicas, max(1, most // 4), sorted(members)
    ).options(
        user_config=told,
        max_ongoing_requests=most + 64,  # more than the limit, so that skimp says what is too much
        graceful_shutdown_timeout_s=config.server.timeout_s + 5,
    )
    try:
        options = {"host": host, "port": port, "keep_alive_timeout_s": 30}
        serve.start(proxy_location="EveryNode", http_options=options)
        serve.run(gateway.bind(handles), name=APPLICATION)
    except RuntimeError as error:
        raise ClusterError(f"the cluster cannot serve this: {_why(serve) or error}") from error


def remove() -> None:
    """Take it from the cluster, once requests under way have ended."""
    from ray import serve

    serve.delete(APPLICATION)


def _deployment(
    serve: Any, kind: type, name: str, replicas: ReplicasConfig, target: int, told: Any
) -> Any:
    """Processes that come and go with the requests under way, ``target`` in each.

    They are replaced where skimp, or what they are told when they start, is another than before.
    """
    from ... import __version__

    made = serve.deployment(
        kind,
        name=name,
        ray_actor_options={"num_cpus": replicas.cpus},
        autoscaling_config={
            "min_replicas": replicas.min,
            "max_replicas": replicas.max,
            "target_ongoing_requests": target,
        },
        max_ongoing_requests=2 * target,
    )
    version = hashlib.sha256(json.dumps([__version__, told]).encode()).hexdigest()
    # without it Ray takes every deployment for a new one, and replaces processes that could go on
    return made.options(version=version, _internal=True)


def _local(member: MemberConfig) -> dict[str, Any]:
    """What :meth:`LocalModel.load` is to be told, in other folders too."""
    name = str(member.local)
    if Path(name).is_dir():
        name = str(Path(name).absolute())
    return dict(
        name=name, tau=member.tau, defaults=dict(member.params), max_tokens=member.max_tokens
    )


def _why(serve: Any) -> str:
    """What went wrong in its processes: the last line that they said."""
    found = serve.status().applications.get(APPLICATION)
    told = [d.message for d in found.deployments.values() if d.message] if found else []
    return " ".join(text.strip().splitlines()[-1] for text in told)


# -- a configuration on its way ---------------------------------------------------------------


def packed(config: Config, folder: Path) -> dict[str, Any]:
    """A configuration and the files that it names, in JSON: gateways may be on other machines.

    Keys stay behind: a gateway reads them from its own machine's environment.
    """
    files: dict[str, str] = {}

    def take(path: str) -> str:
        source, name = folder / path, f"{len(files)}/{Path(path).name}"
        files[name] = base64.b64encode(source.read_bytes()).decode()
        return name

    def take_policy(path: str) -> str:
        name, record = take(path), read_record(folder / path)
        if "weights" in record:  # a router's, which lie beside it
            file = Path(record["weights"]["file"]).name
            data = ((folder / path).parent / file).read_bytes()
            files[f"{Path(name).parent}/{file}"] = base64.b64encode(data).decode()
        return name

    data = config.model_dump(mode="json")
    for member in data["members"].values():
        if isinstance(member["price"], str):
            member["price"] = take(member["price"])
    for name, policy in data["policies"].items():
        if isinstance(policy, dict):
            kept = {k: take(v) for k, v in policy.items() if k in ("responses", "guide") and v}
            data["policies"][name] = policy | kept | {"cascade": take_policy(policy["cascade"])}
        elif not policy.startswith("single:"):
            data["policies"][name] = take_policy(policy)
    return {"config": data, "files": files}


@contextlib.contextmanager
def unpacked(told: Mapping[str, Any]) -> Iterator[tuple[Config, Path]]:
    """What :func:`packed` packed, its files in a folder for as long as they are read."""
    with tempfile.TemporaryDirectory(prefix="skimp-serve-") as folder:
        for name, data in told["files"].items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(base64.b64decode(data))
        yield parse_config(told["config"]), Path(folder)


# -- in the gateways' processes ---------------------------------------------------------------


def check(told: dict[str, Any]) -> None:
    """Start a gateway of it on some node and stop it: keys and the ledger are looked for there.

    Raises:
        SkimpError: It cannot be started.
    """
    local = [n for n, m in told["config"]["members"].items() if m["local"]]
    ingress = Ingress(dict.fromkeys(local, "nobody"))

    async def once() -> None:
        await ingress.reconfigure(told)
        assert ingress.served is not None
        await ingress.served.stop()

    asyncio.run(once())


class Ingress:
    """A process of the gateway.

    Args:
        handles: Of the deployments of local members, by name.
    """

    def __init__(self, handles: Mapping[str, Any]) -> None:
        self.handles = handles
        self.served: Served | None = None
        log_to_stderr()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Ray Serve hands requests to: the application of now, in a frame that stays."""

        async def frame(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "lifespan":
                assert self.served is not None
                await self.served(scope, receive, send)
                return
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            if self.served is not None:
                await self.served.stop()
            await send({"type": "lifespan.shutdown.complete"})

        return frame

    async def reconfigure(self, told: dict[str, Any]) -> None:
        """Serve another configuration from the next request on."""
        served = Served(await asyncio.to_thread(self._build, told))
        await served.start()
        old, self.served = self.served, served
        if old is not None:
            await old.stop()

    def _build(self, told: dict[str, Any]) -> Any:
        def member(name: str, config: MemberConfig) -> Member:
            handle = self.handles.get(name)
            return build_member(name, config) if handle is None else RemoteMember(handle)

        with unpacked(told) as (config, folder):
            gateway = build_gateway(config, folder, member)
            return create_app(gateway, config, alone=config.server.replicas.max == 1)


class Served:
    """An application that is closed when its last request is over."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.under_way, self.stopped = 0, False
        self.stack = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Start what it does beside answering."""
        await self.stack.enter_async_context(self.app.router.lifespan_context(self.app))

    async def stop(self) -> None:
        """Close it, now or with its last request."""
        self.stopped = True
        if self.under_way == 0:
            await self.stack.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        self.under_way += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.under_way -= 1
            if self.stopped and self.under_way == 0:
                await self.stack.aclose()


class RemoteMember:
    """A local member as the gateway sees it: in other processes, maybe on other machines."""

    batches = True

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    async def complete(self, kind: Kind, request: Mapping[str, Any]) -> Reply:
        """Ask one of them."""
        response = self.handle.complete.remote(kind, dict(request))
        with _failing():
            try:
                told = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
        return Reply(_checked(told))

    async def stream(self, kind: Kind, request: Mapping[str, Any]) -> AsyncIterator[Chunk]:
        """Ask one of them, chunk by chunk."""
        response = self.handle.options(stream=True).stream.remote(kind, dict(request))
        try:
            with _failing():
                async for told in response:
                    yield Chunk.of(_checked(told))
        finally:
            response.cancel()

    async def close(self) -> None:
        """The cluster ends them."""


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    """Make the cluster's errors a member's: the next attempt reaches another process."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except (RayError, RayServeException) as error:
        what = f"the process of a local member failed: {type(error).__name__}"
        raise MemberError("connection", what) from error


def _checked(told: dict[str, Any]) -> dict[str, Any]:
    if "failed" in told:
        raise MemberError(**told["failed"])
    answer: dict[str, Any] = told["answer"]
    return answer


# -- in the processes of local members --------------------------------------------------------


class LocalReplica:
    """A process of a local member; its errors travel as data, for Ray would wrap them."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.member = LocalModel.load(**told)

    async def complete(self, kind: Kind, request: Mapping[str, Any]) -> dict[str, Any]:
        """The whole answer."""
        try:
            return {"answer": (await self.member.complete(kind, request)).body}
        except MemberError as error:
            return {"failed": dataclasses.asdict(error)}

    async def stream(self, kind: Kind, request: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The answer in chunks."""
        stream: Any = self.member.stream(kind, request)
        try:
            async with contextlib.aclosing(stream) as chunks:
                async for chunk in chunks:
                    yield {"answer": chunk.data}
        except MemberError as error:
            yield {"failed": dataclasses.asdict(error)}
