"""The HTTP face of a gateway: OpenAI's API, metrics, health and a page."""

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from ...ir.errors import SkimpError
from .build import caller_budgets, caller_keys
from .config import Config
from .gateway import Gateway
from .member import Kind, to_json
from .policy import Policy, Single
from .price import answers_wanted
from .refused import Refused, check, failed, handle_errors, parse, unavailable
from .rows import BudgetExceededError, LedgerError
from .sse import Events, unless_gone
from .stats import summary
from .trip import Answer, Query, UnavailableError

log = logging.getLogger("skimp.serve")
PAGE = Path(__file__).with_name("page.html")
API = Path(__file__).with_name("openapi.json")
_CSP = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)


def create_app(gateway: Gateway, config: Config, *, alone: bool = True) -> FastAPI:
    """The application; it closes the gateway when it stops.

    Args:
        gateway: What answers.
        config: What it was made from.
        alone: Whether no other gateway serves the same callers, so that its policy may change.
    """
    face = _Face(gateway, config)
    app = FastAPI(title="skimp", lifespan=face.lifespan, openapi_url=None)
    handle_errors(app)

    async def chat(request: Request) -> Response:
        """Answer a chat."""
        return await face.complete(request, "chat/completions")

    async def completions(request: Request) -> Response:
        """Continue a text."""
        return await face.complete(request, "completions")

    # without FastAPI's reading of arguments, a sixth of what an answer takes: there are none
    app.add_route("/v1/chat/completions", chat, methods=["POST"])
    app.add_route("/v1/completions", completions, methods=["POST"])

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        """What can be asked for: the active policy, the other policies, the members."""
        return face.guarded(request, lambda: JSONResponse(face.models()))

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        """One of them."""
        found = next((m for m in face.models()["data"] if m["id"] == name), None)
        missing = Refused(404, f"no model {name!r}", "model_not_found")
        return face.guarded(request, lambda: JSONResponse(found) if found else missing.response())

    @app.get("/healthz")
    async def health() -> Response:
        """Whether the ledger can be written; open to anyone."""
        return await face.health()

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        return face.guarded(
            request,
            lambda: Response(gateway.metrics.text(), media_type="text/plain; version=0.0.4"),
        )

    @app.get("/")
    async def page() -> Response:
        """The page, which holds no data itself."""
        headers = {"content-security-policy": _CSP, "x-content-type-options": "nosniff"}
        return Response(PAGE.read_bytes(), media_type="text/html", headers=headers)

    @app.get("/openapi.json")
    async def described() -> Response:
        """All of this, for programs that make clients; bodies are read here, not by FastAPI."""
        return Response(API.read_bytes(), media_type="application/json")

    @app.get("/api/summary")
    async def api_summary(request: Request) -> Response:
        """What the page shows."""
        try:
            face.caller(request)
            hours = min(max(float(request.query_params.get("hours", 24)), 0.05), 24 * 90)
            if not math.isfinite(hours):
                raise ValueError(hours)
        except ValueError:
            return Refused(400, "hours is a number", "bad_hours").response()
        except Refused as refused:
            return refused.response()
        return JSONResponse(await face.summary(hours))

    @app.put("/api/policy")
    async def put_policy(request: Request) -> Response:
        """Change the active policy: ``{"name": "cheap"}``."""
        try:
            face.admin(request)
            if not alone:
                text = "several gateways serve: change `active` in the file and deploy it again"
                raise Refused(409, text, "several_gateways")
            body = await face.read(request)
            gateway.use(str(body.get("name")))
        except Refused as refused:
            return refused.response()
        except SkimpError as error:
            return Refused(404, str(error), "policy_not_found").response()
        log.info(json.dumps({"event": "policy", "active": gateway.active}))
        return JSONResponse({"active": gateway.active})

    return app


class _Face:
    """What the routes share."""

    def __init__(self, gateway: Gateway, config: Config) -> None:
        self.gateway, self.config = gateway, config
        self.keys = caller_keys(config)
        self.budgets = caller_budgets(config)
        self.most = int(config.server.max_body_mb * 1e6)
        self.in_flight = 0
        self.since = int(time.time())

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Sweep what a killed process left behind, now and every minute."""

        async def sweep() -> None:
            while True:
                with contextlib.suppress(LedgerError):
                    await self.gateway.ledger.sweep()
                await asyncio.sleep(60)

        task = asyncio.create_task(sweep())
        yield
        task.cancel()
        await self.gateway.close()

    # -- who and what -----------------------------------------------------------------------------

    def caller(self, request: Request) -> str:
        """Who is calling; pages of other origins may not."""
        origin = request.headers.get("origin")
        if origin and origin.split("://")[-1] != request.headers.get("host"):
            raise Refused(403, "requests from pages of other origins are refused", "origin")
        if not self.keys:
            return "anyone"
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        known = scheme.lower() == "bearer"
        caller = self.keys.get(hashlib.sha256(given.encode()).digest()) if known else None
        if caller is None:
            raise Refused(
                401, "the API key is missing or unknown", "invalid_api_key", "authentication_error"
            )
        return caller

    def admin(self, request: Request) -> None:
        """Whoever is calling must be allowed to change things."""
        caller = self.caller(request)
        if self.keys and not self.config.callers[caller].admin:
            raise Refused(403, "only an admin may change the policy", "admin", "permission_error")

    def guarded(self, request: Request, make: Any) -> Response:
        """A response for callers only."""
        try:
            self.caller(request)
        except Refused as refused:
            return refused.response()
        response: Response = make()
        return response

    async def read(self, request: Request) -> dict[str, Any]:
        """The body, if it is an object and not too large."""
        too_large = Refused(
            413, f"the body is larger than {self.config.server.max_body_mb:g} MB", "too_large"
        )
        if int(request.headers.get("content-length") or 0) > self.most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(60):
                async for part in request.stream():
                    size += len(part)
                    if size > self.most:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise Refused(408, "the body did not arrive within 60 s", "slow_body") from None
        except ClientDisconnect:
            raise Refused(499, "the caller hung up", "disconnected") from None
        return parse(b"".join(parts))

    def policy(self, body: dict[str, Any], kind: Kind) -> Policy:
        """Who answers: by ``model``, the active policy, another one, or a member alone."""
        check(body, kind)
        model, gateway = body.get("model"), self.gateway
        if model == "skimp":
            policy = gateway.policies[gateway.active]
        elif isinstance(model, str) and model in gateway.policies:
            policy = gateway.policies[model]
        elif isinstance(model, str) and model in gateway.entries:
            policy = Single(model, self.config.extractor)
        else:
            names = [m["id"] for m in self.models()["data"]]
            raise Refused(404, f"no model {model!r}; there are {names}", "model_not_found")
        if answers_wanted(body) > 1:  # several answers to choose from are no vote
            return Single(policy.members[-1], policy.extractor)
        return policy

    def models(self) -> dict[str, Any]:
        """In OpenAI's form."""
        names = dict.fromkeys(["skimp", *self.gateway.policies, *self.gateway.entries])
        data = [
            {"id": n, "object": "model", "created": self.since, "owned_by": "skimp"} for n in names
        ]
        return {"object": "list", "data": data}

    # -- answering --------------------------------------------------------------------------------

    async def complete(self, request: Request, kind: Kind) -> Response:
        """Answer, and write one line into the log."""
        begun = time.perf_counter()
        facts: dict[str, Any] = {"event": "request", "path": kind}
        if self.in_flight >= self.config.server.max_in_flight:
            log.info(json.dumps(facts | {"status": 503, "code": "overloaded"}))
            busy = Refused(503, "too many requests are under way", "overloaded", "server_error")
            return busy.response({"retry-after": "1"})
        self.in_flight += 1
        self.gateway.metrics.in_flight.set(self.in_flight)
        streaming = False
        try:
            caller = self.caller(request)
            body = await self.read(request)
            policy = self.policy(body, kind)
            facts |= {"caller": caller, "policy": policy.name}
            if self.config.server.log_prompts:
                facts["prompt"] = body.get("messages") or body.get("prompt")
            query = Query(kind, body, caller, self.budgets[caller])
            answer = await unless_gone(request, self.gateway.answer(query, policy))
            if answer is None:
                facts["status"] = 499
                return Response(status_code=499)
            facts |= {"status": 200, **{k[2:]: v for k, v in answer.headers.items()}}
            if answer.stream is not None:
                streaming = True
                return Events(answer, lambda: self._done(facts, begun, answer), self._limit())
            raw = to_json(answer.body)
            return Response(raw, media_type="application/json", headers=answer.headers)
        except Refused as refused:
            facts |= {"status": refused.status, "code": refused.code}
            return refused.response()
        except BudgetExceededError as error:
            facts |= {"status": 429, "code": "insufficient_quota"}
            return Refused(429, str(error), "insufficient_quota", "insufficient_quota").response()
        except LedgerError as error:
            facts |= {"status": 503, "code": "ledger"}
            log.error(json.dumps({"event": "ledger", "error": str(error)}))
            return Refused(503, "the ledger cannot be written", "ledger", "server_error").response()
        except UnavailableError as error:
            response, code = unavailable(error)
            facts |= {"status": response.status_code, "code": code}
            return response
        except Exception as error:
            facts |= {"status": 500, "code": "internal"}
            return failed(error)
        finally:
            if not streaming:
                self._done(facts, begun)

    def _limit(self) -> float:
        """Seconds after which a caller who does not read is given up, and a little."""
        return self.config.server.timeout_s + 1

    def _done(self, facts: dict[str, Any], begun: float, streamed: Answer | None = None) -> None:
        """A request is over, its stream too: one line in the log says what became of it."""
        self.in_flight -= 1
        self.gateway.metrics.in_flight.set(self.in_flight)
        if streamed is not None and streamed.report is not None:
            told = streamed.report()
            facts |= {"stream": told["status"], "skimp-cost": f"{told['cost']:.9f}"}
        facts["ms"] = round(1000 * (time.perf_counter() - begun), 2)
        log.info(json.dumps(facts))
        while self.gateway.accounts.alarms:
            policy, alarm = self.gateway.accounts.alarms.pop(0)
            self.gateway.metrics.alarms.labels(policy).inc()
            log.warning(json.dumps({"event": "drift", "policy": policy, "alarm": alarm}))

    # -- looking on -------------------------------------------------------------------------------

    async def health(self) -> Response:
        """Whether the ledger answers within two seconds."""
        try:
            async with asyncio.timeout(2):
                await self.gateway.ledger.sweep()
        except (LedgerError, TimeoutError):
            return JSONResponse({"status": "ledger unavailable"}, 503)
        return JSONResponse({"status": "ok", "policy": self.gateway.active})

    async def summary(self, hours: float) -> dict[str, Any]:
        """What the page shows."""
        found = await asyncio.to_thread(summary, self.gateway.ledger, hours)
        return found | {
            "active": self.gateway.active,
            "in_flight": self.in_flight,
            "policies": [self._describe(n, p) for n, p in self.gateway.policies.items()],
            "prices": {
                n: {"input": e.price.input, "output": e.price.output}
                for n, e in self.gateway.entries.items()
            },
        }

    def _describe(self, name: str, policy: Policy) -> dict[str, Any]:
        record = getattr(policy, "record", {})
        drift = self.gateway.accounts.drift_of(policy)
        told: dict[str, Any] = {
            "name": name,
            "digest": policy.digest,
            "members": list(policy.members),
            "bound": policy.bound,
        }
        kept = (
            "mode",
            "delta",
            "thresholds",
            "held_out",
            "evidence",
            "exceedance_ceiling",
            "split",
        )
        told |= {k: record[k] for k in (*kept, "frontier") if k in record}
        if drift is not None:
            told["drift"] = {
                "queries": drift.exceedance.queries,
                "exceedance": drift.exceedance.rate,
                "ceiling": drift.exceedance.ceiling,
                "evidence": {
                    "exceedance": drift.exceedance.evidence,
                    "exchangeability": drift.exchangeability.evidence,
                },
                "alarms": drift.alarms,
            }
        return told
