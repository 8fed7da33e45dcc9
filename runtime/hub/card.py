"""The model card of a converted folder; every figure in it comes from what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..report import headline

_HEAD = """\
---
library_name: transformers
tags:
- skimp
- dynamic-k
- mixture-of-experts
{base}---

# {title}

{name} converted by [skimp](https://pypi.org/project/skimp/): feed-forward networks run, for each
token, the experts that the token needs (D2DMoE, [2310.04361](https://arxiv.org/abs/2310.04361)).

**It needs skimp.** Without it transformers refuses to load this folder.

```python
import skimp  # pip install skimp
from transformers import {auto}

model = {auto}.from_pretrained("THIS_REPOSITORY")
skimp.set_tau(model, 0.1)  # quality against speed, at run time; 0 runs every expert
```

A plain dense model, without skimp: `skimp unconvert THIS_REPOSITORY out`.
"""


def card(
    name: str,
    auto: str,
    blocks: Sequence[str],
    history: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Any] | None,
) -> str:
    """Write a model card.

    Args:
        name: Of the dense model.
        auto: The auto class that loads it.
        blocks: One line per block.
        history: What :func:`skimp.convert` recorded of its passes.
        measured: What :func:`skimp.runtime.demo.demo` returned, if it ran.
    """
    hub = name.count("/") == 1 and not name.startswith((".", "/"))
    text = _HEAD.format(
        title=f"{name.rstrip('/').rsplit('/', 1)[-1]}, converted",
        name=f"[{name}](https://huggingface.co/{name})" if hub else name.rsplit("/", 1)[-1],
        base=f"base_model: {name}\n" if hub else "",
        auto=auto,
    )
    rows = [] if measured is None else [(what, value) for value, what in headline(dict(measured))]
    if not rows:
        tried = [r["stats"]["tried"][-1] for r in history if "tried" in r.get("stats", {})]
        rows = _chosen(tried[-1]) if tried else []
    if rows:
        text += "\n## Measured\n\n" + _table(("", ""), rows)
        if measured is not None:
            text += f"\nOn {measured['text']['test_passages']} passages never trained on; torch "
            text += f"{measured['torch']}, {measured['threads']} threads, float32.\n"
        else:
            text += "\nOn the held-out part of the calibration data.\n"
    else:
        text += "\nNothing was measured when this folder was written.\n"
    if history:
        passes = [(str(r["pass"]).replace("|", "\\|"), f"{r['seconds']:.1f}") for r in history]
        text += "\n## Passes\n\n" + _table(("pass", "seconds"), passes)
    return text + "\n## Blocks\n\n```\n" + "\n".join(blocks) + "\n```\n"


def _chosen(tried: Mapping[str, float]) -> list[tuple[str, str]]:
    return [
        ("FFN FLOPs removed, routers included", f"{1 - tried['flops']:.1%}"),
        ("cosine to the dense output", f"{tried['cosine']:.4f}"),
        ("experts that run", f"{tried['share']:.0%}"),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
