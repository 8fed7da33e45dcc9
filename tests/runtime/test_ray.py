"""Work on a Ray cluster of two nodes: the same numbers, though a worker dies."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimp
import torch
from raylets import two_raylets
from skimp.ir.errors import ClusterError
from skimp.passes.budget import Budget
from skimp.passes.recover import Recover
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy, Sparsify
from skimp.runtime.cluster import on_ray

ray = pytest.importorskip("ray")
hf = pytest.importorskip("transformers")

FEW = [
    Relufy(),
    Sparsify(tokens=400, chunk=200, batch=64),
    Split(),
    Route(tokens=200, steps=10),
    Recover(steps=2),
    Budget("flops <= 0.85"),
]


@pytest.fixture(scope="module")
def address():
    with two_raylets(cpus=1) as cluster:
        yield cluster.address


def convert(**more):
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, initializer_range=0.3,
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    data = [dict(input_ids=torch.randint(2, 60, (6, 7 + i), generator=g)) for i in range(5)]
    model = hf.LlamaForCausalLM(config).eval()
    return skimp.convert(model, data, passes=FEW, expert_size=4, router_width=4, **more)


def test_two_nodes_give_the_same_bits_though_a_worker_is_killed(address, tmp_path):
    marker = tmp_path / "killed"
    here = os.getpid()

    def dies_once(each):
        def other(work, items):
            def deadly(item):
                if not marker.exists():
                    marker.touch()
                    assert os.getpid() != here
                    os.kill(os.getpid(), signal.SIGKILL)
                return work(item)

            return each(deadly, items)

        return other

    want = convert().model.state_dict()
    with on_ray(address) as each:
        assert sum(n["Alive"] for n in ray.nodes()) == 2
        got = convert(each=dies_once(each)).model.state_dict()
    assert marker.exists()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) for k in want)


def counted(each, done, last=-1):
    """Does what ``each`` does, and kills this process after so many layers."""

    def other(work, items):
        for result in each(work, items):
            if len(done) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(1)
            yield result

    return other


def killed_after(last, address, folder):
    """What the driver of a test does, in a process of its own."""
    with on_ray(address) as each:
        convert(each=counted(each, [], int(last)), folder=Path(folder))


def test_a_driver_that_was_killed_goes_on_from_the_layer(address, tmp_path):
    """Its tasks run on in the workers, and nobody waits for them."""
    want, work = convert(each=counted(map, all_done := [])).model.state_dict(), len(all_done)
    driver = "import sys, test_ray; test_ray.killed_after(*sys.argv[1:])"
    here = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = 0
    for last in (1, 4):
        words = [sys.executable, "-c", driver, str(last), address, str(tmp_path)]
        ended = subprocess.run(words, env=here, check=False)
        assert ended.returncode == -signal.SIGKILL
        done += last
    with on_ray(address) as each:
        got = convert(each=counted(each, again := []), folder=tmp_path).model.state_dict()
    assert done + len(again) == work
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) for k in want)


def test_what_fails_in_a_worker_fails_here(address):
    def work(item):
        raise skimp.SkimpError(f"layer {item}")

    with on_ray(address) as each, pytest.raises(skimp.SkimpError, match="layer 0"):
        list(each(work, range(2)))


def test_tensors_begin_where_pytorch_lets_them_begin(address):
    """Sums go by whole vectors from a cache line on; from elsewhere they round differently."""

    def work(x):
        return x.data_ptr() % 64, x + 1

    with on_ray(address) as each:
        for at, y in each(work, [torch.ones(n) for n in (3, 100, 5000, 10**6)]):
            assert (at, y.data_ptr() % 64) == (0, 0)


def test_policies_are_the_same_wherever_they_are_tried(address):
    from skimp.runtime.cascade.calibrate import Goal, _parts, calibrate, grid
    from skimp.runtime.cascade.traces import MemberSpec, Table

    rng, n, samples = np.random.default_rng(0), 400, (39, 39, 39, 1)
    answer = rng.integers(0, 3, (n, 4))
    votes = rng.integers(0, 40, (n, 4)) / samples
    cost = rng.gamma(4, 1, (n, 4)) * 10.0 ** np.arange(-5, -1)
    members = tuple(MemberSpec(f"m{j}", k) for j, k in enumerate(samples))
    table = Table(members, answer, votes, cost, tuple(map(str, range(n))), "made")
    goal = Goal(budget=0.01, alpha=0.2)
    assert len(_parts(grid(samples), n * 2 // 5)) > 1
    with on_ray(address) as each:
        assert calibrate(table, goal, each) == calibrate(table, goal)


COVERAGE = Path(skimp.__file__).parent / "benchmarks" / "coverage.py"
NO_RAY = (
    "import runpy, sys; sys.modules['ray'] = None; "
    "runpy.run_path('coverage.py', run_name='__main__')"
)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_families_are_examined_alike_on_a_cluster_and_without_one(address, tmp_path):
    """One that cannot be built, one that cannot be exported, one that ends, two that are found."""
    kinds = ["bert", "distilbert", "dots1", "edgetam_video", "glm4v_vision"]

    def examined(name, *more, script=(COVERAGE,), only=kinds):
        words = [sys.executable, *script, "--results", tmp_path / name, "--only", *only, *more]
        subprocess.run([str(w) for w in words], check=True, cwd=COVERAGE.parent)
        found = json.loads((tmp_path / name).read_bytes())
        for told in found.values():
            told.pop("seconds", None)
        return found

    plain = examined("plain.json", script=("-c", NO_RAY))
    assert list(plain) == kinds
    known = {"searched", "not built", "no answer", "not exported"}
    assert {told["status"] for told in plain.values()} == known
    assert examined("ray.json", "--ray", address, "--part", "2") == plain
    late = examined("late.json", "--ray", address, "--timeout", "0", only=["bert"])
    assert late["bert"]["reason"] == "more than 0.0 s"


def test_ray_is_imported_only_when_asked_for(monkeypatch):
    code = "import skimp, skimp.runtime.cluster, sys; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"skimp\[ray\]"), on_ray("auto"):
        pass
