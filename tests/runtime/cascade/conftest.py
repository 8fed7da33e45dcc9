"""Providers and servers on loopback, for the tests of serving."""

import importlib.util
import json
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiohttp")
from skimp.runtime.cascade.build import build_gateway
from skimp.runtime.cascade.config import parse_config
from skimp.runtime.cascade.run import build_server

HERE = Path(__file__).parent


def beside(name):
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"skimp_test_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stub = beside("stub")


@pytest.fixture(scope="session")
def free_port():
    """A function that finds a port of loopback at which nobody listens."""

    def find():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def stub_module():
    return stub


@pytest.fixture(scope="session")
def worlds():
    return beside("worlds")


@pytest.fixture
def provider():
    """A function that starts a provider."""
    with stub.Background() as background:
        found = []

        def start():
            one = stub.Stub()
            background.run(one.listen())
            found.append(one)
            return one

        yield start
        for one in found:
            background.run(one.runner.cleanup())


class Running:
    """A server in a thread, its gateway, and what its ledger says."""

    def __init__(self, config, folder):
        self.config = parse_config(config)
        self.gateway = build_gateway(self.config, folder)
        self.server = build_server(self.gateway, self.config, "127.0.0.1", 0)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        end = time.monotonic() + 20
        while not self.server.started:
            assert self.thread.is_alive()
            assert time.monotonic() < end
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def rows(self, table):
        import sqlalchemy as sa
        from skimp.runtime.cascade import rows

        with self.gateway.ledger.reader.connect() as connection:
            query = sa.select(getattr(rows, table))
            return [dict(r) for r in connection.execute(query).mappings()]

    def wait(self, condition, seconds=10):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.02)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)


class OnRay(Running):
    """The same on a cluster, which serves one configuration after another."""

    def __init__(self, port, config, folder):
        from skimp.runtime.cascade.ledger import Ledger
        from skimp.runtime.cascade.on_ray import deploy

        self.config = parse_config(config)
        deploy(self.config, folder, "127.0.0.1", port)
        self.gateway = SimpleNamespace(ledger=Ledger(self.config.ledger))
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def stop(self):
        self.gateway.ledger.close()


@pytest.fixture(scope="module")
def cluster(free_port):
    """The port that a Ray cluster of two nodes, with this process connected, is to serve at.

    Not for a whole session: a process connects to one cluster only, and other files start theirs.
    """
    pytest.importorskip("ray")
    with beside("cluster").two_nodes():
        yield free_port()


def pytest_generate_tests(metafunc):
    """What the server is tested for holds on a cluster too; logs alone are in other processes."""
    server = metafunc.module.__name__.endswith("test_server")
    if server and "serve" in metafunc.fixturenames and "caplog" not in metafunc.fixturenames:
        ray = pytest.param("ray", marks=pytest.mark.nightly)
        metafunc.parametrize("serve", ["here", ray], indirect=True)


@pytest.fixture
def serve(tmp_path, request):
    """A function that serves a configuration."""
    running = []

    def start(config):
        config.setdefault("ledger", f"sqlite:///{tmp_path}/ledger-{len(running)}.db")
        if getattr(request, "param", "here") == "ray":
            running.append(OnRay(request.getfixturevalue("cluster"), config, tmp_path))
        else:
            running.append(Running(config, tmp_path))
        return running[-1]

    yield start
    for one in running:
        one.stop()


@pytest.fixture(scope="module")
def llama():
    """A Llama of random weights with a tokenizer of bytes: small, but the real generate()."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = [chr(c) for c in range(33, 127)] + ["\u0120", "\u010a"]  # ASCII, space, new line
    vocabulary = {"<end>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        eos_token_id=0,
        initializer_range=0.3,  # or the networks would hardly matter
    )
    return transformers.LlamaForCausalLM(config).eval(), fast


@pytest.fixture
def write_policy(tmp_path):
    """A function that writes a policy file with thresholds of one's own."""
    from skimp.runtime.cascade import policy

    def write(members, thresholds, prices=None, **more):
        told = [{"name": n, "samples": k} for n, k in members]
        for member in told:
            if price := (prices or {}).get(member["name"]):
                member["price"] = price
        record = {
            "format": policy.FORMAT,
            "version": policy.VERSION,
            "extractor": "number",
            "members": told,
            "thresholds": thresholds,
            "budget": 1.0,
            "alpha": 0.1,
            "exceedance_ceiling": 0.1,
            "calibration_costs": [0.001 * i for i in range(50)],
            **more,
        }
        record["sha256"] = policy.record_hash(record)
        path = tmp_path / "policy.json"
        policy.save_policy(record, path)
        return path.name

    return write


def _postgres_bin():
    found = shutil.which("initdb")
    if found:
        return os.path.dirname(found)
    for path in (
        sorted(os.listdir("/usr/lib/postgresql")) if os.path.isdir("/usr/lib/postgresql") else ()
    ):
        return f"/usr/lib/postgresql/{path}/bin"
    return None


@pytest.fixture
def postgres(postgres_server):
    """The URL of an empty PostgreSQL database."""
    from skimp.runtime.cascade import rows
    from skimp.runtime.cascade.database import connect

    engine = connect(postgres_server)
    rows.meta.drop_all(engine)
    engine.dispose()
    return postgres_server


@pytest.fixture(scope="session")
def postgres_server(free_port):
    """The URL of a PostgreSQL server of its own."""
    folder = _postgres_bin()
    if folder is None:
        pytest.skip("no PostgreSQL server: `apt-get install postgresql`")
    # not in pytest's folder: a run of pytest that starts meanwhile shuts that to everybody else
    base = Path(tempfile.mkdtemp(prefix="skimp-postgres-"))
    # PostgreSQL refuses to run as root, so it runs as somebody else, in a folder of theirs
    user = "postgres" if "postgres" in {u.pw_name for u in pwd.getpwall()} else "nobody"
    root = os.geteuid() == 0
    extra = {}
    if root:
        ids = pwd.getpwnam(user)
        os.chown(base, ids.pw_uid, ids.pw_gid)
        extra = {"user": user, "group": ids.pw_gid, "extra_groups": []}
    port = free_port()
    data = base / "data"
    run = lambda *a: subprocess.run(  # noqa: E731
        a,
        check=True,
        capture_output=True,
        text=True,
        cwd=base,
        env={"PATH": os.environ["PATH"], "HOME": str(base), "LC_ALL": "C"},
        **extra,
    )
    run(f"{folder}/initdb", "-D", str(data), "-U", "skimp", "-A", "trust", "-N", "-E", "UTF8")
    options = f"-p {port} -k {base} -c listen_addresses=127.0.0.1 -c fsync=off"
    run(f"{folder}/pg_ctl", "-D", str(data), "-o", options, "-w", "-l", str(base / "log"), "start")
    yield f"postgresql://skimp@127.0.0.1:{port}/postgres"
    run(f"{folder}/pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
    shutil.rmtree(base)


@pytest.fixture(scope="session")
def data():
    """The folder of real data, or a skip."""
    default = Path(__file__).resolve().parents[4] / "shared" / "data"
    path = Path(os.environ.get("SKIMP_DATA") or default)
    if not path.exists():
        pytest.skip(f"no data in {path}; set SKIMP_DATA")
    return path


@pytest.fixture(scope="session")
def gsm_traces(data):
    """Recorded samples of Llama-2-13B and GPT-4 on 400 questions of GSM8K, as traces.

    Prices are those of the paper's settings: words as tokens, US dollars per million.
    """
    weak = json.loads((data / "cascade_samples/gsm_pot_llama2_13B.json").read_text())
    strong = json.loads((data / "cascade_samples/gsm_pot_GPT4.json").read_text())[: len(weak)]
    traces, gold = [], []

    def samples(row, stored, price):
        tokens = [round(1.25 * len(g.split())) for g in row["generated"]]
        tokens += [tokens[-1] if tokens else 60] * stored
        answers = [*row["results"], *[None] * stored][:stored]
        prompt = round(1.25 * len(row["question"].split())) + 900  # eight worked examples
        return [
            {"answer": a, "cost": 1e-6 * (price[0] * prompt / stored + price[1] * t)}
            for a, t in zip(answers, tokens, strict=False)
        ]

    for i, (a, b) in enumerate(zip(weak, strong, strict=True)):
        assert a["question"] == b["question"]
        members = {
            "llama-13b": {"samples": samples(a, 24, (0.25, 0.5))},
            "gpt-4": {"samples": samples(b, 3, (10, 30))},
        }
        traces.append({"id": str(i), "members": members, "gold": a["answer"]})
        gold.append(float(a["answer"]))
    return traces, gold
