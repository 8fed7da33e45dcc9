"""Members and their samples, from wherever a command was told them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import ConfigError, load_config, price_of
from .traces import MemberSpec


def specs_of(
    members: str | None, config: Path | None, rows: Sequence[Mapping[str, Any]]
) -> tuple[list[MemberSpec], str]:
    """Members and samples: as told, as configured, or as the traces have them.

    Args:
        members: ``small:5,large:1``, in the order of escalation.
        config: cascade.yaml, for prices, and for members where none are told.
        rows: Traces, for the number of samples where nothing else says it.

    Returns:
        The members, and the configured extractor.
    """
    prices, samples, extract = {}, {}, "number"
    if config is not None:
        loaded = load_config(config)
        prices = {n: price_of(m, config.parent) for n, m in loaded.members.items()}
        samples = {n: m.samples for n, m in loaded.members.items()}
        extract = loaded.extractor
    if members is not None:
        samples = {}
        for part in members.split(","):
            name, _, count = part.strip().rpartition(":")
            if not name or not count.isdigit() or int(count) < 1:
                raise ConfigError(f"--members: {part!r} is not NAME:SAMPLES")
            samples[name] = int(count)
    if not samples:
        for name in rows[0]["members"]:
            found = [r["members"].get(name, {}).get("samples", []) for r in rows]
            samples[name] = max(1, min(len(s) for s in found))
    return [MemberSpec(n, k, prices.get(n)) for n, k in samples.items()], extract
