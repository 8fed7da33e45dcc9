"""Ways to damage a file: as disks do, byte by byte, and as people do, value by value."""

import json
import random
import string

VALUES = (
    None, True, -1, 0, 1, 3, 1e308, -1e308, 10**400, 0.5, float("nan"), float("inf"), "", "skip",
    "x", "\ud800", "é" * 50, [], {}, [[]], [None], {"": None}, [1, "a", {}], "../../etc/passwd",
)  # fmt: skip

JUNK = (b"\x00", b"[" * 3000, b'{"a":' * 2000, b"\xff\xfe", b"1e999", b"NaN")


def of_bytes(data, rng):
    """Flip, cut, drop, double or insert somewhere; now and then nothing is left."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.randint(1, 64))
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end]
        elif kind == 4:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
        else:
            junk = rng.choice(
                (b"\x00", b"[" * 3000, b'{"a":' * 2000, b"\xff\xfe", b"1e999", b"NaN")
            )
            data[at:end] = junk
    return bytes(data)


def of_value(value, rng):
    """Replace, drop, double or rename one thing somewhere in what JSON can say."""
    value = json.loads(json.dumps(value))
    places = []

    def walk(held):
        items = list(held.items()) if isinstance(held, dict) else list(enumerate(held))
        for key, inner in items:
            places.append((held, key))
            if isinstance(inner, dict | list):
                walk(inner)

    walk(value if isinstance(value, dict | list) else [value])
    for _ in range(rng.randint(1, 3)):
        if not places:
            return rng.choice(VALUES)
        held, key = rng.choice(places)
        kind = rng.randrange(5)
        inside = key in held if isinstance(held, dict) else key < len(held)
        if not inside:
            continue
        if kind == 0:
            del held[key]
        elif kind == 1 and isinstance(held, list):
            held.append(held[key])
        elif kind == 2 and isinstance(held, dict):
            held["".join(rng.choices(string.printable, k=3))] = held.pop(key)
        else:
            held[key] = rng.choice(VALUES)
    return value


def cases(count, seed=0):
    """Sources of chance, one per case, so that a failure can be had again by its number."""
    return [(i, random.Random(f"{seed}-{i}")) for i in range(count)]
