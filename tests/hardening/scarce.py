"""The commands where something lacks: room on a disk, memory, or a folder to themselves.

    python tests/hardening/scarce.py space|memory|twice FOLDER [NAME ...]

``space`` needs a folder that is a file system of its own, for it fills it; see ``test_scarce.py``.
"""

import argparse
import asyncio
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
from commands import ready
from moments import Watch, ask, begin, child, end, names, no_drafts, run

MIB = 1 << 20


def made(command, root):
    """A place with an old result, and what is seen of it."""
    place = root / command.name / "place"
    place.mkdir(parents=True)
    child(command.prepare, place)
    assert child(run, command, place, "old") is not None
    return place, child(command.seen, place)


def lacks(command, place, *needles):
    """Ask for the new result: what the message says that it lacks, or ``None`` if it is there."""
    code, text = child(ask, command, place, "new"), place.with_name("said.txt").read_text()
    assert code in (0, 1), f"exit code {code}: {text[-2000:]}"
    assert "Traceback" not in text, text[-3000:]
    told = " ".join(text[f"\n{text}".index("\nerror:") :].split()) if code else None
    assert told is None or any(n in told for n in needles), text[-2000:]
    return told


def results(place):
    """Files but for stages of a conversion: finished ones may take the place of others."""
    return [n for n in names(place) if "-stages/" not in n]


def unharmed(command, place, old, files):
    assert child(command.seen, place) == old, "the old result is not what it was"
    assert results(place) == files
    no_drafts(place)


def space(command, root):
    """No room, and some: the old result stays; with room again, the new one is written."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        (root / command.name).mkdir()
        # what is said has room, as a terminal has
        (root / command.name / "said.txt").symlink_to(Path(elsewhere) / "said.txt")
        return filled(command, root)


def filled(command, root):
    place, old = made(command, root)
    told, ballast = [], root / "ballast"
    files = results(place)
    for left in (0, 4096, 16384, 65536, 1 << 20):
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(root).free - left)
        lack = lacks(command, place, "cannot be written", "no space left in")
        ballast.unlink()
        if lack is None:
            break
        told.append(lack)
        unharmed(command, place, old, files)
    assert told
    assert child(run, command, place, "new") is not None
    assert child(command.seen, place) not in (old, None)
    return told


def limited(command, place, value, spare):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, used + spare))
    return ask(command, place, value)


def memory(command, root):
    """Ever more memory until it is enough: until then a message, and nothing half."""
    place, old = made(command, root)
    told = []
    files = results(place)
    for spare in (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048):
        code = child(limited, command, place, "new", spare * MIB)
        text = place.with_name("said.txt").read_text()
        told.append([spare, code, text[-200:]])
        if code == 0:
            break
        assert code == 1, f"{spare} MiB: {code}: {text[-3000:]}"
        assert "Traceback" not in text, f"{spare} MiB: {text[-5000:]}"
        said = " ".join(text.split())
        assert "not enough memory" in said, f"{spare} MiB: {text[-3000:]}"
        if " is written and " in said:
            assert child(command.seen, place) not in (old, None)
            assert child(run, command, place, "old") is not None
        unharmed(command, place, old, files)
    assert child(command.seen, place) not in (old, None)
    return told


def held_up(command, place, value, moment):
    watch = Watch(place, moment, signal.SIGSTOP)
    return ask(command, place, value, watch, "first.txt")


def twice(command, root):
    """While one runs, another is refused; the first comes to its end."""
    place, old = made(command, root)
    first = begin(held_up, command, place, "new", 1)
    assert os.WIFSTOPPED(os.waitpid(first[0], os.WUNTRACED)[1])
    told = lacks(command, place, "another process is converting into")
    assert told
    assert child(command.seen, place) == old
    os.kill(first[0], signal.SIGCONT)
    assert end(*first) == 0
    assert child(command.seen, place) not in (old, None)
    return told


def ledger(root):
    """Money is not spent where it cannot be written down; with room again, all goes on."""
    from skimp.runtime.cascade.ledger import Ledger
    from skimp.runtime.cascade.rows import Budget, LedgerError, Reservation

    path = root / "ledger.db"
    book = Ledger(f"sqlite:///{path}")
    total = Budget("total", 1e9)

    def held(name):
        now = time.time()
        return Reservation(str(name), "r", "m", (total,), 1.0, now, now + 600)

    async def reserve(*names):
        for i, name in enumerate(names):
            try:
                await book.reserve(held(name))
            except LedgerError as error:
                return i, str(error)
        return len(names), ""

    ballast = root / "ballast"
    assert asyncio.run(reserve("first")) == (1, "")
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(root).free - 65536)
    count, told = asyncio.run(reserve(*range(10_000)))
    assert told
    ballast.unlink()
    assert asyncio.run(reserve("last")) == (1, "")
    book.close()
    import sqlite3

    with sqlite3.connect(path) as again:
        assert again.execute("pragma integrity_check").fetchone() == ("ok",)
        kept = again.execute("select count(*) from reservations").fetchone()[0]
        spoken_for = again.execute("select reserved from budgets").fetchone()[0]
    assert kept == spoken_for == count + 2, (kept, spoken_for, count)
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("space", "memory", "twice"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+")
    args = parser.parse_args()
    root = args.folder.absolute()
    attack = {"space": space, "memory": memory, "twice": twice}[args.what]
    wanted = [n for n in args.names if n != "ledger"]
    if args.what == "space":
        for name in ("SKIMP_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR"):  # there is one disk
            os.environ[name] = str(root / name)
        (root / "TMPDIR").mkdir()
        tempfile.tempdir = None  # asks anew
    with ready(wanted) as commands:
        for command in commands:
            print(json.dumps({command.name: attack(command, root)}), flush=True)  # noqa: T201
        if "ledger" in args.names:
            print(json.dumps({"ledger": child(ledger, root)}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
