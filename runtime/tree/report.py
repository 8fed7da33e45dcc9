"""What a run did: speed, where the time went, how well it was predicted."""

import html
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .calibrate import Draft


@dataclass(slots=True)
class Snapshot:
    """One tree as it was drafted, verified and accepted.

    Attributes:
        tokens: By node.
        parents: By node.
        values: Chances by node.
        verified: Nodes.
        accepted: Nodes, from the root down.
        following: The token that the target chose after the last accepted node.
    """

    tokens: list[int]
    parents: list[int]
    values: list[float]
    verified: list[int]
    accepted: list[int]
    following: int

    @classmethod
    def of(
        cls, draft: Draft, verified: Sequence[int], accepted: Sequence[int], following: int
    ) -> "Snapshot":
        """Copy what is kept of a step."""
        t = draft.tree
        lists = list(t.tokens), list(t.parents), list(t.values)
        return cls(*lists, list(verified), list(accepted), following)


@dataclass(slots=True)
class Report:
    """Figures of a run.

    Attributes:
        hardware: Processor, threads.
        model: What was run: see :attr:`Target.name`.
        batch: Rows at the start.
        steps: Passes of the target after the prompts'.
        tokens: Emitted, of all rows.
        seconds: In all, profiling apart.
        first: Seconds to the first token.
        draft: Seconds of drafting and choosing.
        verify: Seconds of passes.
        other: Seconds of choosing tokens, caches and learning.
        profiling: Seconds spent measuring costs.
        row_steps: Rows verified, of all steps.
        accepted: Drafted tokens accepted.
        expected: Sum of the chances of what was verified.
        sizes: How often a row's tree had so many nodes, the root included.
        off: Predicted over measured seconds of each pass.
        example: The tree of which most was accepted.
    """

    hardware: str = ""
    model: str = ""
    batch: int = 0
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    other: float = 0.0
    profiling: float = 0.0
    row_steps: int = 0
    accepted: int = 0
    expected: float = 0.0
    sizes: Counter[int] = field(default_factory=Counter)
    off: list[float] = field(default_factory=list)
    example: Snapshot | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of the whole run, the prompts' pass included."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens of a row's step: 1 in plain decoding."""
        return 1 + self.accepted / self.row_steps if self.row_steps else 0.0

    @property
    def time_error(self) -> float:
        """Median of how far predicted seconds of a pass were from measured ones, relative."""
        return statistics.median(abs(r - 1) for r in self.off) if self.off else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        del found["off"], found["example"]
        found["sizes"] = {str(k): v for k, v in sorted(self.sizes.items())}
        return found | {
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_step": self.tokens_per_step,
            "time_error": self.time_error,
        }

    def lines(self) -> list[tuple[str, str]]:
        """A table for people."""
        steps = max(self.steps, 1)
        sizes = ", ".join(f"{n}: {c}" for n, c in sorted(self.sizes.items()))
        return [
            ("speed", f"{self.tokens_per_second:.1f} tokens/s ({self.tokens} tokens)"),
            ("first token", f"{1000 * self.first:.0f} ms"),
            ("tokens per step", f"{self.tokens_per_step:.2f} over {self.steps} steps"),
            (
                "ms per step",
                f"draft {1000 * self.draft / steps:.2f}, verify {1000 * self.verify / steps:.2f}, "
                f"other {1000 * self.other / steps:.2f}",
            ),
            ("accepted", f"{self.accepted}, expected {self.expected:.0f}"),
            ("predicted time", f"off by {self.time_error:.1%} (median)"),
            ("nodes per tree", sizes),
            ("profiling", f"{self.profiling:.1f} s"),
            ("machine", self.hardware),
            ("model", f"{self.model}, batch {self.batch}"),
        ]


_PAGE = """<!doctype html><meta charset="utf-8"><title>One tree</title>
<style>
body{font:14px/1.4 system-ui,sans-serif;margin:2em;background:#fff;color:#222}
svg{max-width:100%%}text{font:12px ui-monospace,monospace}
.no{opacity:.45}.box{fill:#eef;stroke:#99c}.yes .box{fill:#cec;stroke:#393;stroke-width:2}
.no .box{stroke-dasharray:3 3}line{stroke:#bbb}line.yes{stroke:#393;stroke-width:3}
.next .box{fill:#fed;stroke:#c80}
@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}text{fill:#ddd}
.box{fill:#223;stroke:#668}.yes .box{fill:#142;stroke:#5a5}.next .box{fill:#420;stroke:#c80}
line{stroke:#555}}
</style>
<h1>One tree</h1>
<p>%(told)s</p>
%(svg)s
"""


def picture(snapshot: Snapshot, decode: Callable[[int], str]) -> str:
    """An HTML page of one tree: what was verified, and the accepted path.

    Args:
        snapshot: Of a run's report.
        decode: Text of a token.
    """
    below: dict[int, list[int]] = {}
    for node, parent in enumerate(snapshot.parents):
        below.setdefault(parent, []).append(node)
    for nodes in below.values():
        nodes.sort(key=lambda n: -snapshot.values[n])
    place: dict[int, tuple[int, int]] = {}
    stack, line = [(0, 0)], 0
    while stack:
        node, depth = stack.pop()
        place[node] = depth, line
        children = below.get(node, [])
        if not children:
            line += 1
        stack += [(c, depth + 1) for c in reversed(children)]
    accepted, verified = set(snapshot.accepted), set(snapshot.verified)
    lines, boxes = [], []

    def box(x: int, y: int, kind: str, text: str, note: str) -> None:
        shown = html.escape(repr(text)[1:-1])
        boxes.append(
            f'<g class="{kind}" transform="translate({130 * x},{34 * y})"><title>{note}</title>'
            f'<rect class="box" x="4" y="4" width="108" height="24" rx="5"/>'
            f'<text x="10" y="20">{shown[:14]}</text></g>'
        )

    def link(a: tuple[int, int], b: tuple[int, int], kind: str) -> None:
        lines.append(
            f'<line class="{kind}" x1="{130 * a[0] + 112}" y1="{34 * a[1] + 16}" '
            f'x2="{130 * b[0] + 4}" y2="{34 * b[1] + 16}"/>'
        )

    for node, (x, y) in place.items():
        kind = "yes" if node in accepted else "seen" if node in verified else "no"
        box(x, y, kind, decode(snapshot.tokens[node]), f"chance {snapshot.values[node]:.2f}")
        if node:
            link(place[snapshot.parents[node]], (x, y), "yes" if node in accepted else "")
    end = place[snapshot.accepted[-1]]
    box(end[0] + 1, line, "next", decode(snapshot.following), "chosen by the target")
    link(end, (end[0] + 1, line), "yes")
    width, height = 130 * (max(x for x, _ in place.values()) + 2), 34 * (line + 1)
    told = (
        f"{len(place) - 1} nodes drafted, {len(verified) - 1} verified (solid), "
        f"{len(accepted) - 1} accepted (green), and one token of the target's own (orange)."
    )
    svg = f'<svg width="{width}" height="{height}">{"".join(lines)}{"".join(boxes)}</svg>'
    return _PAGE % dict(told=told, svg=svg)
