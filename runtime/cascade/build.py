"""From a configuration to a gateway."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

from .config import Config, ConfigError, MemberConfig, price_of, secret
from .gateway import Gateway
from .ledger import Ledger
from .member import Member
from .policy import Policy, Single, load_policy
from .rows import Budget
from .trip import Entry

log = logging.getLogger("skimp.serve")
MakeMember = Callable[[str, MemberConfig], Member]


def build_gateway(
    config: Config, folder: Path = Path(), member: MakeMember | None = None
) -> Gateway:
    """Members, policies and ledger of a configuration.

    Args:
        config: It.
        folder: What its paths are relative to.
        member: Makes a member, if not :func:`build_member`.

    Raises:
        ConfigError: A key is not in the environment, or nothing says who answers.
        SkimpError: A policy, a price or the ledger cannot be read.
    """
    policies = build_policies(config, folder)
    entries = {name: build_entry(name, m, folder, member) for name, m in config.members.items()}
    for policy in policies.values():
        _compare_prices(policy, entries)
    budgets = config.budget is not None or any(c.budget for c in config.callers.values())
    return Gateway(
        entries,
        policies,
        config.active or next(iter(policies)),
        Ledger(ledger_url(config.ledger, folder)),
        timeout=config.server.timeout_s,
        capped=budgets,
    )


def _compare_prices(policy: Policy, entries: dict[str, Entry]) -> None:
    """Say so where a member costs something else than when its policy was calibrated."""
    for told in getattr(policy, "record", {}).get("members", ()):
        entry, then = entries.get(told["name"]), told.get("price")
        if entry is None or then is None:
            continue
        now = {"input": entry.price.input, "output": entry.price.output}
        if now != then:
            event = {"event": "price", "policy": policy.name, "member": entry.name}
            log.warning(json.dumps(event | {"calibrated": then, "configured": now}))


def build_policies(config: Config, folder: Path) -> dict[str, Policy]:
    """By name; a single member needs no policy to be written down."""
    found: dict[str, Policy] = {}
    for name, text in config.policies.items():
        if not isinstance(text, str):
            from .judge_check import load_checked

            found[name] = load_checked(text, folder, name)
        elif text.startswith("single:"):
            found[name] = Single(text[7:], config.extractor)
        else:
            policy = load_policy(folder / text, name)
            # a router does without members that are gone; a cascade was calibrated with all of them
            among = getattr(policy, "among", None)
            found[name] = policy if among is None else among(tuple(config.members))
    if not found and len(config.members) == 1:
        found["single"] = Single(next(iter(config.members)), config.extractor)
    if not found:
        raise ConfigError("several members, and no policy says which of them answers")
    return found


def build_entry(
    name: str, member: MemberConfig, folder: Path, make: MakeMember | None = None
) -> Entry:
    """A member with its price and limits."""
    return Entry(
        name,
        (make or build_member)(name, member),
        price_of(member, folder),
        member.retries,
        member.max_tokens,
        member.fallback,
        member.temperature,
    )


def build_member(name: str, member: MemberConfig) -> Member:
    """A member alone."""
    if member.local is not None:
        from .local import LocalModel

        return LocalModel.load(
            member.local, tau=member.tau, defaults=member.params, max_tokens=member.max_tokens
        )
    from .endpoint import Endpoint

    return Endpoint(
        str(member.url),
        member.model or name,
        key=secret(member.key, f"members.{name}.key") if member.key else None,
        timeout=member.timeout_s,
        batches=member.batches,
        defaults=member.params,
    )


def caller_keys(config: Config) -> dict[bytes, str]:
    """Callers by the hash of their key; the keys themselves are not kept."""
    found: dict[bytes, str] = {}
    for name, c in config.callers.items():
        where = f"callers.{name}.key"
        key = hashlib.sha256(secret(c.key, where).encode()).digest()
        if key in found:
            raise ConfigError(f"{where}: the same key as that of {found[key]!r}")
        found[key] = name
    return found


def caller_budgets(config: Config) -> dict[str, tuple[Budget, ...]]:
    """The budgets that hold for a caller; ``anyone`` where there are no callers."""
    everyone: tuple[Budget, ...] = ()
    if config.budget is not None:
        everyone = (Budget("total", config.budget.usd, config.budget.per),)
    found: dict[str, tuple[Budget, ...]] = {"anyone": everyone}
    for name, caller in config.callers.items():
        own = caller.budget
        mine = (Budget(f"caller:{name}", own.usd, own.per),) if own is not None else ()
        found[name] = everyone + mine
    return found


def ledger_url(url: str, folder: Path) -> str:
    """The URL of the ledger; a file's with its whole path."""
    start = "sqlite:///"
    if url.startswith(start) and not url.startswith(start + "/") and url != start + ":memory:":
        return start + str((folder / url[len(start) :]).absolute())
    return url
