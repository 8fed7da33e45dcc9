"""A cascade that needs no network, no key and no file: SmolLM2 twice, in this process.

``quick`` draws three short votes at once, ``careful`` thinks at length, once. Both are the dense
model; a converted one can take the place of ``quick`` in a configuration file (``local`` and
``tau``). What a token costs is measured when the demo starts.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

from ...ir.cost import cache_dir
from ..economics import Machine, token_price
from ..loadtest import sweep
from ..models import DECODER, load_pretrained
from .config import Config, parse_config
from .gateway import Gateway
from .ledger import Ledger
from .local import LocalModel, Weights
from .policy import Cascade, Policy, Single
from .traces import MemberSpec
from .trip import Entry

VOTES = 3


def demo_gateway(
    progress: Callable[[str, float, float], None] | None = None,
) -> tuple[Config, Gateway]:
    """The demo's configuration and gateway.

    Its threshold is set by hand (all votes agree), not calibrated: it promises nothing, and
    ``skimp cascade collect`` and ``calibrate`` say how to do better.

    Args:
        progress: Told what is being done.
    """
    told = progress or (lambda *_: None)
    told("load", 0, 2)
    loaded = load_pretrained(DECODER)
    told("load", 1, 2)
    weights = Weights(loaded.model, loaded.tokenizer)

    def member(name: str, max_tokens: int) -> LocalModel:
        return LocalModel(name, weights, max_tokens=max_tokens)

    quick, careful = member("quick", 48), member("careful", 256)
    machine = Machine(price=600, years=4, utilisation=0.3, kw=0.05)
    (level,) = asyncio.run(sweep(quick, [1], requests=2, max_tokens=24))
    price = token_price(level, machine.hourly)
    told("load", 2, 2)
    entries = {
        "quick": Entry("quick", quick, price, retries=0, max_tokens=48, temperature=0.6),
        "careful": Entry("careful", careful, price, retries=0, max_tokens=256),
    }
    cascade = Cascade((MemberSpec("quick", VOTES), MemberSpec("careful", 1)), (1.0,))
    policies: dict[str, Policy] = {
        "cascade": cascade,
        "always-quick": Single("quick"),
        "always-careful": Single("careful"),
    }
    path = ledger_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    config = parse_config(
        {
            "members": {
                n: {"local": DECODER, "price": {"input": price.input, "output": price.output}}
                for n in entries
            },
            "ledger": f"sqlite:///{path}",
        }
    )
    return config, Gateway(entries, policies, "cascade", Ledger(config.ledger))


def ledger_path() -> Path:
    """Where the demo keeps its ledger from one start to the next."""
    return cache_dir() / "demo-ledger.db"
