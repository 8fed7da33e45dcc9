"""Write a folder, a file and an artefact, killed before each change of a file: prints what is left.

Forks for each moment, so that torch is imported once.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from skimp.ir import artefact
from skimp.ir.cost import write_atomically
from torch import nn

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.rmdir")


def folder(place, value):
    with artefact.written_whole(place / "hub") as part:
        (part / "config.json").write_text(json.dumps(value))
        names = ["model.safetensors"] if value == "new" else ["model-1-of-1.safetensors"]
        for name in names:
            (part / name).write_text(value)


def file(place, value):
    write_atomically(place / "file", (value * 1000).encode())


def blocks(place, value):
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, len(value) + (value == "new"))
    nn.init.zeros_(model.bias)
    artefact.write(place / "artefact", model, {"value": value})


def seen_folder(place):
    config = place / "hub" / "config.json"
    if not config.exists():
        return None
    held = [p.read_text() for p in (place / "hub").glob("*.safetensors")]
    value = json.loads(config.read_text())
    assert held == [value], (held, value)
    return value


def seen_file(place):
    data = (place / "file").read_text()
    assert data in ("old" * 1000, "new" * 1000)
    return data[:3]


def seen_blocks(place):
    return artefact.read_into(place / "artefact", nn.Linear(4, 4))["value"]


def attempt(write, place, moment):
    """Write in a child that ends itself at a moment; whether it was killed."""
    pid = os.fork()
    if not pid:
        count = 0

        def watch(event, args):
            nonlocal count
            changes = event in CHANGES or (
                event == "open" and isinstance(args[2], int) and args[2] & WRITES
            )
            if changes:
                count += 1
                if count > moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        write(place, "new")
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def main(root):
    found = {}
    for write, seen in ((folder, seen_folder), (file, seen_file), (blocks, seen_blocks)):
        left, moment, killed = [], 0, True
        while killed:
            place = Path(root) / f"{write.__name__}-{moment}"
            write(place, "old")
            killed = attempt(write, place, moment)
            left.append(seen(place))
            write(place, "new")  # what was left is in nobody's way
            assert seen(place) == "new"
            moment += 1
        found[write.__name__] = left
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1])
