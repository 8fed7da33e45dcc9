"""Costs of serving: formulas against numbers known, sweeps against servers with known laws."""

import asyncio
import json
import math

import numpy as np
import pytest
from skimp.cli import app
from skimp.runtime import economics as eco
from skimp.runtime.cascade.member import Chunk, MemberError
from skimp.runtime.loadtest import sweep
from typer.testing import CliRunner


def test_the_paper_s_two_prices_inverted():
    """Two A800 at $0.79 per hour each; $0.34 and $3.47 per pass."""
    assert eco.seconds_for(0.34, 1.58) == pytest.approx(775, abs=1)
    assert eco.seconds_for(3.47, 1.58) == pytest.approx(7906, abs=1)
    assert eco.cost_of(eco.seconds_for(0.34, 1.58), 1.58) == pytest.approx(0.34)


def test_utilisation_changes_the_depreciation_alone():
    low, high = (eco.Machine(14_000, utilisation=u).terms() for u in (0.3, 0.9))
    assert low["depreciation"] == pytest.approx(3 * high["depreciation"])
    assert {k: low[k] for k in ("power", "maintenance")} == {
        k: high[k] for k in ("power", "maintenance")
    }
    for bad in (dict(utilisation=0), dict(utilisation=1.1), dict(years=0), dict(pue=0.9)):
        with pytest.raises(eco.EconomicsError):
            eco.Machine(1000, **bad)


class Queue:
    """A server of one law: a fixed time, and a rate of tokens shared by all up to a limit."""

    batches = False

    def __init__(self, fixed, per_token, saturation, scale=1.0):
        self.fixed, self.per_token, self.saturation, self.scale = (
            fixed,
            per_token,
            saturation,
            scale,
        )
        self.active = 0

    async def stream(self, kind, request):
        self.active += 1
        try:
            slow = max(1.0, self.active / self.saturation)
            await asyncio.sleep(self.scale * self.fixed * slow)
            yield Chunk({"choices": [{"delta": {"content": "x"}}]})
            await asyncio.sleep(self.scale * self.per_token * 16 * slow)
            usage = {"prompt_tokens": 8, "completion_tokens": 16}
            yield Chunk({"choices": [], "usage": usage})
        finally:
            self.active -= 1

    async def close(self):
        pass


def by_law(concurrency, saturation=8, fixed=0.1, per_token=0.02, requests=64):
    """The levels that such a server gives without noise."""
    levels = []
    for n in concurrency:
        slow = max(1.0, n / saturation)
        first, whole = fixed * slow, (fixed + 16 * per_token) * slow
        levels.append(
            eco.Level(
                n,
                (first,) * requests,
                (whole,) * requests,
                8 * requests,
                16 * requests,
                whole * requests / n,
            )
        )
    return levels


def test_a_queue_that_saturates_is_recovered():
    rows = eco.curves(by_law([1, 2, 4, 8, 16, 32]), 1.0)
    cost = {r["concurrency"]: r["average_cost"] for r in rows}
    assert cost[1] == pytest.approx(8 * cost[8])
    assert cost[8] == pytest.approx(cost[16]) == pytest.approx(cost[32])
    elastic = {r["concurrency"]: r["elasticity"] for r in rows}
    assert elastic[1] is None
    assert all(elastic[n] == pytest.approx(1) for n in (2, 4, 8))
    assert all(elastic[n] < 0.01 for n in (16, 32))
    zone = eco.zone(rows, slo=0.15)
    assert zone == [8]
    assert 8 in eco.zone(rows)
    assert eco.zone(rows, slo=0.05) == []
    assert rows[3]["marginal_cost"] == pytest.approx(cost[8])  # constant returns: MC = AC
    price = eco.token_price(by_law([4])[0], 2.0)
    total = price.of(8 * 64, 16 * 64)
    assert total == pytest.approx(eco.cost_of(by_law([4])[0].wall, 2.0))  # the machine, no more


def test_a_sweep_of_a_real_loop(tmp_path):
    member = Queue(0.02, 0.002, saturation=4)
    levels = asyncio.run(sweep(member, [1, 2, 4, 16], requests=24))
    rows = {r["concurrency"]: r for r in eco.curves(levels, 1.0)}
    assert rows[4]["average_cost"] < 0.5 * rows[1]["average_cost"]
    assert rows[16]["elasticity"] < 0.5 < rows[2]["elasticity"]
    assert rows[16]["ttft"] > 2 * rows[4]["ttft"]
    low, high = rows[1]["ttft_interval"]
    assert low <= rows[1]["ttft"] <= high
    assert all(level.failed == 0 for level in levels)
    assert levels[0].prompt_tokens == 24 * 8


def test_failures_count_as_nothing_else():
    class Broken(Queue):
        turn = 0

        async def stream(self, kind, request):
            Broken.turn += 1
            if Broken.turn % 3 == 0:
                raise MemberError("500", "no")
            async for chunk in super().stream(kind, request):
                yield chunk

    (level,) = asyncio.run(sweep(Broken(0.001, 0.0001, 4), [2], requests=12))
    assert level.failed == 4
    assert level.requests == 8
    with pytest.raises(eco.EconomicsError, match="no request was answered"):
        eco.curves([eco.Level(1, (), (), 0, 0, 1.0, 5)], 1.0)


def test_the_frontier():
    kept = eco.frontier([1, 2, 3, 3], [0.5, 0.4, 0.9, 0.9])
    assert kept.tolist() == [True, False, True, True]
    kept = eco.frontier([1, 2], [0.5, 0.4], [5.0, 1.0])
    assert kept.all()  # dearer and worse, but faster
    rng = np.random.default_rng(0)
    cost, quality = rng.random(60), rng.random(60)
    kept = eco.frontier(cost, quality)
    for i in range(60):
        dominated = any(
            cost[j] <= cost[i]
            and quality[j] >= quality[i]
            and (cost[j], quality[j]) != (cost[i], quality[i])
            for j in range(60)
        )
        assert kept[i] != dominated


def routerarena(data):
    import ast

    prices = json.loads((data / "routerarena/cost.json").read_text())
    points = []
    for name in ("claude-3-haiku-20240307", "gemini-2.0-flash-001"):
        price = next(v for k, v in prices.items() if k in (name, name.removesuffix("-001")))
        cost, score = [], []
        for line in (data / f"routerarena/{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            usage, result = row["token_usage"], row["evaluation_result"]
            usage = ast.literal_eval(usage) if isinstance(usage, str) else usage
            result = ast.literal_eval(result) if isinstance(result, str) else result
            cost.append(
                1e-6 * price["input_token_price_per_million"] * usage["input_tokens"]
                + 1e-6 * price["output_token_price_per_million"] * usage["output_tokens"]
            )
            score.append(float(result["score"]))
        points.append(
            {"name": name, "cost": float(np.mean(cost)), "quality": float(np.mean(score))}
        )
    return points


def test_routerarena_has_one_point_on_its_frontier(data, tmp_path):
    points = routerarena(data)
    haiku, flash = points
    assert flash["cost"] < haiku["cost"]
    assert flash["quality"] - haiku["quality"] == pytest.approx(0.167, abs=0.01)
    (tmp_path / "p.json").write_text(json.dumps(points))
    args = [
        "economics",
        "frontier",
        str(tmp_path / "p.json"),
        "--json",
        "-o",
        str(tmp_path / "f.html"),
    ]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    kept = [p["name"] for p in json.loads(done.stdout) if p["frontier"]]
    assert kept == ["gemini-2.0-flash-001"]
    page = (tmp_path / "f.html").read_text()
    assert page.count("<svg") == 1
    assert "<script" not in page


def test_the_sweep_command_its_report_and_the_price_it_gives(provider, tmp_path):
    stub = provider()
    out = tmp_path / "s.json"
    args = [
        "economics",
        "sweep",
        "--url",
        stub.url,
        "--model",
        "m",
        "--requests",
        "4",
        "-o",
        str(out),
    ]
    done = CliRunner().invoke(app, [*args, "--concurrency", "1,2", "--hourly", "0.79"])
    assert done.exit_code == 0, done.output
    calls = stub.calls["m"]
    done = CliRunner().invoke(app, [*args, "--concurrency", "1,2,4", "--hourly", "0.79"])
    assert done.exit_code == 0, done.output
    assert stub.calls["m"] == calls + 1 + 4  # a warming request and the new level alone
    record, levels = eco.read_sweep(out)
    assert [v.concurrency for v in levels] == [1, 2, 4]
    page = out.with_suffix(".html").read_text()
    assert page.count("<svg") == 3
    price = eco.measured_price(out)
    assert price.input > 0
    assert price.output > 0
    from skimp.runtime.cascade.config import parse_config, price_of

    config = parse_config({"members": {"a": {"url": "http://x", "price": "s.json"}}})
    assert price_of(config.members["a"], tmp_path) == price
    with pytest.raises(eco.EconomicsError, match="no concurrency 3"):
        eco.measured_price(out, 3)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(eco.EconomicsError):
        eco.read_sweep(tmp_path / "bad.json")
    assert math.isfinite(record["hourly"])


def sweep_file(path, model, url, saturation):
    source = {"model": model, "url": url, "tau": None, "max_tokens": 64}
    path.write_text(json.dumps(eco.sweep_record(source, by_law([1, 4, 16], saturation), 1.0)))
    return str(path)


def test_sweeps_of_different_models_are_not_mixed_unasked(tmp_path):
    here, there = "http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"
    small = sweep_file(tmp_path / "a.json", "small", here, 16)
    again = sweep_file(tmp_path / "b.json", "small", here, 4)
    large = sweep_file(tmp_path / "c.json", "large", here, 4)
    moved = sweep_file(tmp_path / "d.json", "small", there, 4)

    def run(*args):
        done = CliRunner().invoke(app, ["economics", "frontier", "--json", *args])
        return json.loads(done.stdout) if done.exit_code == 0 else str(done.exception)

    one = {p["name"]: p["frontier"] for p in run(small)}
    assert one == {"small, n = 1": False, "small, n = 4": False, "small, n = 16": True}
    assert len(run(small, again)) == 6  # one model, measured twice
    for other in (large, moved):
        assert "sweeps of different things" in run(small, other)
    assert len(run(small, large, "--mix")) == 6
    judged = run(small, large, "--quality", "small=0.6", "--quality", "large=0.9")
    best = [p for p in judged if p["frontier"]]
    assert {p["quality"] for p in best} == {0.6, 0.9}
    assert "some have none" in run(small, large, "--quality", "small=0.6")
    assert "which no sweep is of" in run(small, "--quality", "smal=0.6")
    assert "not MODEL=NUMBER" in run(small, "--quality", "small")
    (tmp_path / "e.json").write_text('{"a": 1}')
    assert "no sweep" in run(str(tmp_path / "e.json"))


def test_a_sweep_does_not_go_on_where_another_model_was(provider, tmp_path):
    stub, out = provider(), str(tmp_path / "s.json")
    args = ["economics", "sweep", "--url", stub.url, "--requests", "2", "-o", out]
    args += ["--concurrency", "1", "--hourly", "1"]
    assert CliRunner().invoke(app, [*args, "--model", "m"]).exit_code == 0
    before = (tmp_path / "s.json").read_bytes()
    done = CliRunner().invoke(app, [*args, "--model", "other"])
    assert "a sweep of something else" in str(done.exception)
    assert (tmp_path / "s.json").read_bytes() == before
