"""The server's configuration: a YAML file, checked before anything starts."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...ir.errors import SkimpError
from ..economics import measured_price
from .price import TOKEN_LIMITS, Price

Positive = Annotated[float, Field(gt=0)]


class ConfigError(SkimpError):
    """A configuration that cannot work; says which entry and what to change."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PriceConfig(_Strict):
    """US dollars per million tokens."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]


class ReplicasConfig(_Strict):
    """How many processes of it a Ray cluster runs, more as more requests are under way.

    Attributes:
        min: At least so many.
        max: At most so many.
        cpus: Cores that each takes from the cluster; what a local member computes with.
    """

    min: Annotated[int, Field(ge=1)] = 1
    max: Annotated[int, Field(ge=1)] = 1
    cpus: Positive = 1.0

    @model_validator(mode="after")
    def _in_order(self) -> "ReplicasConfig":
        if self.max < self.min:
            raise ValueError(f"max {self.max} is less than min {self.min}")
        return self


_OWN = {"model", "messages", "prompt", "stream", "n", "best_of", *TOKEN_LIMITS}
"""What a request says or skimp decides; set behind their backs, no reservation would hold."""


class MemberConfig(_Strict):
    """A model: behind ``url``, or ``local`` in this process.

    Attributes:
        url: OpenAI-compatible, up to and including ``/v1``.
        model: The name that the URL knows it by; its own name here if left out.
        key: The *name of the environment variable* with its key.
        local: ``smollm2``, a folder of ``skimp.save_pretrained``, or a model on the hub.
        tau: Threshold of a converted local model.
        price: US dollars per million tokens, or a file of ``skimp economics sweep``.
        samples: Votes that it draws when there is no policy file to say so.
        batches: Whether the URL honours ``n``; else samples are separate calls.
        timeout_s: For a reply, and between two chunks of a stream.
        retries: After a timeout, a lost connection, 429 or 5xx.
        max_tokens: Asked for, and reserved in the budget, if a request sets no limit.
        fallback: Members to ask instead when it fails.
        temperature: Of votes, whatever the request says.
        params: For requests that do not set them, ``top_p`` for example.
        replicas: Of a local member, with ``skimp serve --ray``.
    """

    url: str | None = None
    model: str | None = None
    key: str | None = None
    local: str | None = None
    tau: float | None = None
    price: PriceConfig | Path
    samples: Annotated[int, Field(ge=1, le=100)] = 1
    batches: bool = False
    timeout_s: Positive = 60.0
    retries: Annotated[int, Field(ge=0, le=10)] = 1
    max_tokens: Annotated[int, Field(ge=1)] = 1024
    fallback: tuple[str, ...] = ()
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    params: dict[str, Any] = {}
    replicas: ReplicasConfig = ReplicasConfig(max=4)

    @model_validator(mode="after")
    def _one_kind(self) -> "MemberConfig":
        if (self.url is None) == (self.local is None):
            raise ValueError("give either `url` or `local`")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url {self.url!r} is neither http nor https")
        if taken := sorted(_OWN & set(self.params)):
            raise ValueError(f"params: {', '.join(taken)} cannot be set here")
        return self


class BudgetConfig(_Strict):
    """A limit on what is spent; ``per`` says when it starts afresh, in UTC."""

    usd: Annotated[float, Field(ge=0)]
    per: Literal["day", "month", "ever"] = "ever"


class CallerConfig(_Strict):
    """Somebody who may call: the environment variable with their key, and their budget.

    ``admin`` callers may change the active policy.
    """

    key: str
    budget: BudgetConfig | None = None
    admin: bool = False


class ServerConfig(_Strict):
    """Where to listen, and limits; of the gateway, with ``skimp serve --ray``, ``replicas`` too."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    max_body_mb: Positive = 20.0
    timeout_s: Positive = 300.0
    max_in_flight: Annotated[int, Field(ge=1)] = 512
    log_prompts: bool = False
    replicas: ReplicasConfig = ReplicasConfig()


class JudgedConfig(_Strict):
    """A cascade whose answers a judge compares with what the next member said before.

    Attributes:
        cascade: The policy file.
        judge: The member that judges.
        responses: A cache of the members' responses, as ``skimp router train`` writes it.
        guide: A log of ``skimp judge``, whose last guide the judge uses.
    """

    cascade: Path
    judge: str
    responses: Path
    guide: Path | None = None


class Config(_Strict):
    """All of it.

    Attributes:
        members: By name.
        policies: By name: a policy file, of a cascade or a router, or ``single:MEMBER``, or
            a cascade with a judge.
        active: The policy that serves ``model: skimp``; the first if left out. May be written as
            ``policy`` too.
        extractor: For requests to single members; a policy file has its own.
        callers: By name; with none, anyone who reaches the port may call.
        ledger: A SQLAlchemy URL.
        budget: Of all callers together.
    """

    members: dict[str, MemberConfig]
    policies: dict[str, str | JudgedConfig] = {}
    active: str | None = Field(None, validation_alias=AliasChoices("active", "policy"))
    extractor: str = "number"
    server: ServerConfig = ServerConfig()
    callers: dict[str, CallerConfig] = {}
    ledger: str = "sqlite:///skimp-ledger.db"
    budget: BudgetConfig | None = None

    @model_validator(mode="after")
    def _names_exist(self) -> "Config":
        if not self.members:
            raise ValueError("no members")
        if "skimp" in self.members:
            raise ValueError("a member cannot be called 'skimp': that asks for the active policy")
        for name in (*self.members, *self.policies, *self.callers):
            if not 0 < len(name) <= 200 or not name.isprintable():  # it goes into the ledger
                raise ValueError(f"{name[:40]!r} is no name: 1 to 200 printable characters")
        for name, member in self.members.items():
            for other in member.fallback:
                if other not in self.members or other == name:
                    raise ValueError(f"members.{name}.fallback: no other member {other!r}")
        for name, policy in self.policies.items():
            if isinstance(policy, JudgedConfig):
                if policy.judge not in self.members:
                    raise ValueError(f"policies.{name}.judge: no member {policy.judge!r}")
            elif policy.startswith("single:") and policy[7:] not in self.members:
                raise ValueError(f"policies.{name}: no member {policy[7:]!r}")
        if self.active is not None and self.active not in self.policies:
            raise ValueError(f"active: no policy {self.active!r}")
        return self


def load_config(path: Path) -> Config:
    """Read and check a YAML file; paths in it are relative to its folder.

    Raises:
        ConfigError: It cannot be read or does not make sense; says where.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return parse_config(data, str(path))


def parse_config(data: Any, where: str = "configuration") -> Config:
    """Check a configuration that has been read."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(p) for p in e['loc']) or 'top'}: {e['msg']}" for e in error.errors()
        ]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from error


def secret(variable: str, where: str) -> str:
    """A key from the environment."""
    value = os.environ.get(variable, "")
    if not value:
        raise ConfigError(f"{where}: the environment variable {variable} is not set")
    return value


def price_of(member: MemberConfig, folder: Path) -> Price:
    """A member's price, measured or given."""
    if isinstance(member.price, PriceConfig):
        return Price(member.price.input, member.price.output)
    return measured_price(folder / member.price)
