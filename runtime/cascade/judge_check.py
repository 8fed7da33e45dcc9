"""A cascade that believes an answer only if a judge prefers it to what the next member said before.

Where a member's answer would be served, and the next member's answer to the same request is in the
cache, a judge compares the two in both orders. Only if it prefers the new answer both times is that
served; else the cascade climbs. The judge's calls are calls like any other: reserved, priced,
recorded, and shown in the route.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...ir.errors import ArtefactError
from . import judge_prompts as prompts
from .config import JudgedConfig
from .extract import answer_of, extractor
from .judge import VERDICT_TOKENS, flipped, in_force, read_log
from .judge_prompts import Pair
from .policy import Call, Cascade, Hop, Serve, load_policy
from .responses import ResponseCache
from .router import text_said
from .router_world import text_of

_NOT_ITS = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "stop", "functions")
"""Fields of a request that mean the answer, not a judgment of it."""


@dataclass(frozen=True)
class Checked:
    """A cascade with a judge.

    Attributes:
        inner: The cascade.
        judge: The member that judges.
        cache: What members said before.
        guide: Of the judge; without one it judges plainly, in two calls instead of three.
        name: Of the policy.
    """

    inner: Cascade
    judge: str
    cache: ResponseCache
    guide: str | None = None
    name: str = "judged"

    @property
    def digest(self) -> str:
        """Of cascade, judge and guide."""
        told = json.dumps([self.inner.digest, self.judge, self.guide])
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def members(self) -> tuple[str, ...]:
        """The judge, and the cascade's: the last of them is the one that needs no judgment."""
        names = self.inner.members
        return names if self.judge in names else (self.judge, *names)

    @property
    def extractor(self) -> str:
        """The cascade's."""
        return self.inner.extractor

    @property
    def bound(self) -> tuple[float, float] | None:
        """None: calibration did not count the judge's calls."""
        return None

    def next(self, request: Mapping[str, Any], hops: Sequence[Hop]) -> Call | Serve | None:
        """As the cascade says, but where it would serve before its end, the judge is asked first.

        A judge that does not answer has no say.
        """
        taken = [i for i, h in enumerate(hops) if not h.check]
        asked = [hops[i] for i in taken]
        step = self.inner.next(request, asked)
        if not isinstance(step, Serve):
            return step
        at = taken[step.hop]
        before = self._cached(request, asked)
        if before is None or before[1] == _mode(hops[at]):
            return Serve(at)
        pair = Pair("", text_of(request["messages"]), text_said(hops[at].text), before[0])
        checks = hops[at + 1 :]
        if any(not h.ok for h in checks):
            return Serve(at)
        said = [text_said(h.text) for h in checks]
        want = self._prompts(pair, said)
        if len(said) < len(want):
            return self._call(want[len(said)], long=self.guide is not None and not said)
        verdicts = prompts.read_verdict(said[-2]), flipped(prompts.read_verdict(said[-1]))
        if verdicts == ("A", "A"):
            return Serve(at)
        doubted = replace(asked[step.hop], confidence=-1.0)
        return self.inner.next(request, [*asked[: step.hop], doubted])

    def _prompts(self, pair: Pair, said: Sequence[str]) -> list[str]:
        """What the judge is asked, one after another."""
        if self.guide is None:
            return [prompts.vanilla(pair), prompts.vanilla(pair.swapped)]
        told = said[0] if said else ""
        return [
            prompts.rubric(self.guide, pair),
            prompts.judge(told, pair),
            prompts.judge(told, pair.swapped),
        ]

    def _call(self, prompt: str, long: bool) -> Call:
        change: dict[str, Any] = dict.fromkeys(_NOT_ITS)
        change |= {"messages": [{"role": "user", "content": prompt}], "temperature": 0}
        limit = None if long else VERDICT_TOKENS
        change |= {"max_tokens": limit, "max_completion_tokens": None}
        return Call(self.judge, change=change, check=True)

    def _cached(self, request: Mapping[str, Any], asked: Sequence[Hop]) -> tuple[str, Any] | None:
        """What the next member said to this request before, and its answer."""
        messages, names = request.get("messages"), self.inner.members
        if not isinstance(messages, list) or len(asked) >= len(names):
            return None
        following = names[len(asked)]
        found = self.cache.get(following, messages, self.cache.params_of(following))
        if found is None:
            return None
        return found.text, answer_of({"content": found.text}, extractor(self.extractor))


def _mode(hop: Hop) -> str | None:
    given = [a for a in hop.answers if a is not None]
    return max(given, key=given.count) if given else json.dumps(hop.text)


def load_checked(config: JudgedConfig, folder: Path, name: str) -> Checked:
    """From a configuration.

    Raises:
        ArtefactError: A file is missing or not what it should be.
    """
    inner = load_policy(folder / config.cascade, name)
    if not isinstance(inner, Cascade):
        raise ArtefactError(f"policies.{name}.cascade: {config.cascade} is no cascade")
    if not (folder / config.responses).exists():
        raise ArtefactError(f"policies.{name}.responses: {config.responses} does not exist")
    guide = None
    if config.guide is not None:
        guide = in_force(read_log(folder / config.guide)).text
    return Checked(inner, config.judge, ResponseCache(folder / config.responses), guide, name)
