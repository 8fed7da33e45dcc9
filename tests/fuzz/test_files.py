"""Files that people hand over, damaged in thousands of ways: an error of ours or a good answer.

Where a hash protects a file, damage by value is done with the hash made anew, since whoever edits a
file may do that too.
"""

import json
import zipfile

import pytest
import torch
import yaml
from skimp.codegen import loaded
from skimp.ir import artefact
from skimp.ir.errors import SkimpError
from skimp.passes.convert import prepare
from skimp.passes.unet_distill import ALIGNED, DistillUNet
from skimp.runtime import economics
from skimp.runtime.cascade import policy
from skimp.runtime.cascade.calibrate import Goal, calibrate
from skimp.runtime.cascade.collect import read_prompts
from skimp.runtime.cascade.config import load_config
from skimp.runtime.cascade.judge import Judged, Version, read_log, read_pairs, save_log
from skimp.runtime.cascade.policy import load_policy
from skimp.runtime.cascade.responses import Response, ResponseCache
from skimp.runtime.cascade.router_world import read_questions
from skimp.runtime.cascade.traces import MemberSpec, read_traces, tabulate
from skimp.runtime.unet_store import RECORD
from skimp.runtime.unet_store import read_pairs as read_taps
from torch import nn

from .damage import cases, of_bytes, of_value

FEW, MANY = 100, 10_000


def lines(rows):
    return "\n".join(json.dumps(r) for r in rows).encode()


def traces():
    said = {
        "small": [{"text": "a 7", "cost": 1e-5}, {"text": "8", "cost": 2e-5}],
        "large": [{"answer": "7", "cost": 1e-3}],
    }
    return [{"id": i, "members": {n: {"samples": s} for n, s in said.items()}} for i in range(8)]


def a_policy():
    record = {
        "format": policy.FORMAT, "version": policy.VERSION, "extractor": "number", "mode": "paper",
        "members": [{"name": "small", "samples": 5, "price": {"input": 1, "output": 2}},
                    {"name": "large", "samples": 1}],
        "thresholds": [0.6], "budget": 1.0, "alpha": 0.1, "exceedance_ceiling": 0.1,
        "calibration_costs": [0.001 * i for i in range(50)], "held_out": {"queries": 3},
    }  # fmt: skip
    return record | {"sha256": policy.record_hash(record)}


CONFIG = {
    "members": {
        "small": {"url": "http://127.0.0.1:1/v1", "model": "s", "samples": 3, "fallback": ["large"],
                  "price": {"input": 0.1, "output": 0.2}},
        "large": {"url": "http://127.0.0.1:2/v1", "model": "l", "key": "SOME_KEY",
                  "price": {"input": 1, "output": 2}},
    },
    "policies": {"all": "single:large"}, "active": "all",
    "callers": {"team": {"key": "SOME_KEY", "budget": {"usd": 5, "per": "day"}}},
    "budget": {"usd": 100, "per": "month"}, "ledger": "sqlite://",
}  # fmt: skip


def sweep():
    levels = [economics.Level(n, (0.1,) * 8, (0.2,) * 8, 80, 80, 2.0 / n) for n in (1, 2, 4)]
    return economics.sweep_record({"model": "m", "url": "http://127.0.0.1:1/v1"}, levels, 1.0)


def tabled(path):
    members = (MemberSpec("small", 2), MemberSpec("large", 1))
    return calibrate(tabulate(read_traces(path), members), Goal(budget=0.01, alpha=0.3))


def rehashed(record):
    if isinstance(record, dict):
        record["sha256"] = policy.record_hash(record)
    return record


PAIRS = [{"id": str(i), "question": "q", "a": "x", "b": "y", "label": "A"} for i in range(3)]
TAPS = {"format": "skimp-unet", "version": 1, "teacher": "t", "report": {},
        "pairs": {how: {"mid.attn1": "mid.attn1"} for how in (*ALIGNED, "last")}}  # fmt: skip
FILES = {
    RECORD: (
        lambda p: read_taps(p.parent, DistillUNet()), TAPS, lambda r: json.dumps(r).encode()
    ),
    "traces": (tabled, traces(), lines),
    "policy": (load_policy, a_policy(), lambda r: json.dumps(rehashed(r)).encode()),
    "configuration": (load_config, CONFIG, lambda r: yaml.safe_dump(r).encode()),
    "prompts": (read_prompts, [{"id": "1", "prompt": "q"}, {"messages": [
        {"role": "user", "content": "q"}]}], lines),
    "questions": (read_questions, [{"id": "1", "prompt": "q", "answer": "#### 3"}], lines),
    "pairs": (read_pairs, PAIRS, lines),
    "sweep": (economics.read_sweep, sweep(), lambda r: json.dumps(r).encode()),
    "points": (lambda p: economics.read_points([p]), [
        {"name": "a", "cost": 1.0, "quality": 0.5}, {"name": "b", "cost": 2, "quality": 0.6,
                                                     "latency": 1}],
        lambda r: json.dumps(r).encode()),
}  # fmt: skip


def attack(read, valid, write, path, count):
    """Damage and read; only errors of ours may come out. Returns how many there were."""
    path.write_bytes(write(valid))
    read(path)  # as it is, it is good
    tried = refused = 0
    for number, rng in cases(count):
        if number % 2:
            data = of_bytes(write(valid), rng)
        else:
            try:
                damaged = of_value(valid, rng)
                data = write(damaged)
            except (ValueError, TypeError, UnicodeError):
                continue  # no such file can be written
        path.write_bytes(data)
        tried += 1
        try:
            read(path)
        except SkimpError:
            refused += 1
        except BaseException as error:
            raise AssertionError(f"case {number}: {error!r} of {data[:2000]!r}") from error
    assert refused > count // 5
    return {"cases": tried, "refused": refused}


@pytest.mark.parametrize("name", FILES)
def test_files_that_people_write(name, tmp_path):
    read, valid, write = FILES[name]
    attack(read, valid, write, tmp_path / name, FEW)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FILES)
def test_files_that_people_write_ten_thousand_times(name, tmp_path):
    read, valid, write = FILES[name]
    attack(read, valid, write, tmp_path / name, MANY)


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    return prepare(model, {"input": torch.randn(4, 8)}, expert_size=4, router_width=4)[0]


@pytest.fixture(scope="module")
def converted():
    return small()


def damage_artefact(model, folder, count):
    """The index by value and by byte, and the weights by byte."""
    artefact.write(folder, model, {})
    index = folder / artefact.INDEX
    weights = next(folder.glob("weights-*.safetensors"))
    whole = index.read_bytes(), weights.read_bytes()
    artefact.read_into(folder, model)
    refused = 0
    for number, rng in cases(count):
        index.write_bytes(whole[0])
        weights.write_bytes(whole[1])
        kind = number % 3
        if kind == 0:
            index.write_bytes(json.dumps(of_value(json.loads(whole[0]), rng)).encode())
        elif kind == 1:
            index.write_bytes(of_bytes(whole[0], rng))
        else:
            weights.write_bytes(of_bytes(whole[1], rng))
        try:
            artefact.read_into(folder, model)
        except SkimpError:
            refused += 1
        except BaseException as error:
            raise AssertionError(f"case {number}: {error!r}") from error
    assert refused > count // 4
    return {"cases": count, "refused": refused}


def test_artefacts(converted, tmp_path):
    damage_artefact(converted, tmp_path, FEW)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_artefacts_ten_thousand_times(converted, tmp_path):
    damage_artefact(converted, tmp_path, MANY)


def damage_responses(place, count):
    path = place / "responses.jsonl"
    cache = ResponseCache(path)
    for i in range(3):
        ask = [{"role": "user", "content": f"{i}?"}]
        cache.put("small", ask, {"temperature": 0}, 0, Response("7", 1e-5))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return attack(ResponseCache, rows, lambda r: lines(r) + b"\n", path, count)


def damage_archives(place, count):
    path = place / "m.pt2"

    def write(index):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/data/code.so", b"kernel" * 50)
        loaded.append(path, index, {"skimp/note": b"text"})
        return path.read_bytes()

    valid = {"version": 1, "taus": {"a": "b"}}
    return attack(lambda p: loaded.read(p, 1), valid, write, path, count)


def damage_log(place, count):
    path = place / "log.json"
    save_log(Judged([], [Version(0, "guide", None, "first")]), path)
    valid = json.loads(path.read_text())
    return attack(read_log, valid, lambda r: json.dumps(r).encode(), path, count)


OTHERS = {
    "stored responses": damage_responses,
    "exported archive": damage_archives,
    "log of a judge": damage_log,
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_that_skimp_writes(name, tmp_path):
    OTHERS[name](tmp_path, FEW)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", OTHERS)
def test_files_that_skimp_writes_ten_thousand_times(name, tmp_path):
    OTHERS[name](tmp_path, MANY)
