"""Damage every kind of file that people hand over in ten thousand ways, and write the page of it.

    python benchmarks/hardening.py [--cases 11000 | --page] [KIND ...]

Each case must end in a good answer or in an error of skimp's own; anything else ends the run. It
writes ``benchmarks/results/hardening.json`` and from that ``docs/hardening.md``.
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

from page import table
from skimp.ir.cost import write_atomically

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "hardening.json"
PAGE = """# Damaged files

Files come from disks that fail, from editors, and from strangers. `benchmarks/hardening.py` damages
each kind of file below: by byte (bits flipped, ends cut off, parts dropped, doubled or replaced by
junk) and by value (keys dropped, doubled or renamed, values replaced by odd ones). The hash of a
policy is made anew after damage by value, as whoever edits one may do. What still makes sense after
the damage is read; all else has to be refused with an error of skimp's own.

In {cases:,} cases no other error came out, and every kind in the table came to its end.
{table}
A hundred cases of each kind run in `make test`, beside requests to the server that are generated
from its description. What `tests/fuzz/test_files.py` damages and this table does not name has not
had its many cases yet. Bundles of GPU kernels are not among either.
"""


def run(count, kinds):
    """Cases and refusals by kind of file, stored as they come; the slowest come last."""
    sys.path.insert(0, str(ROOT / "tests"))
    from fuzz.test_files import FILES, OTHERS, attack, damage_artefact, small

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)

        def people(name):
            read, valid, write = FILES[name]
            return attack(read, valid, write, place / name, count)

        works = {
            n: partial(people, n) for n in sorted(FILES, key=("configuration", "traces").count)
        }
        works |= {n: partial(damage, place, count) for n, damage in OTHERS.items()}
        works["converted model"] = lambda: damage_artefact(small(), place / "model", count)
        for name in kinds or works:
            counted = works[name]()
            print(name, counted, flush=True)
            found = json.loads(RESULTS.read_bytes())
            write_atomically(
                RESULTS, json.dumps(found | {name: counted}, indent=1).encode() + b"\n"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    # of some values no file can be written, and these cases do not count
    parser.add_argument("--cases", type=int, default=11_000)
    parser.add_argument("--page", action="store_true", help="only write the page again")
    parser.add_argument("kinds", nargs="*", help="only these; what is known of others stays")
    args = parser.parse_args()
    if not args.page:
        run(args.cases, args.kinds)
    found = json.loads(RESULTS.read_bytes())
    rows = [[n, f"{f['cases']:,}", f"{f['refused']:,}"] for n, f in found.items()]
    told = table(["file", "cases", "refused with an error of skimp's"], rows)
    cases = sum(f["cases"] for f in found.values())
    write_atomically(
        ROOT / "docs" / "hardening.md", PAGE.format(cases=cases, table="\n" + told).encode()
    )


if __name__ == "__main__":
    main()
