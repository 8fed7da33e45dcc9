"""The server against the description of it that it serves, by generated requests."""

import httpx
import pytest

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402

MEMBER = {"price": {"input": 0.1, "output": 0.2}, "retries": 0}


@pytest.fixture(scope="module")
def api(started):
    return schemathesis.openapi.from_url(f"{started.root}/openapi.json")


@pytest.fixture(scope="module")
def started(request, tmp_path_factory, stub_module, running):
    with stub_module.Background() as background:
        provider = stub_module.Stub()
        background.run(provider.listen())
        folder = tmp_path_factory.mktemp("api")
        config = {
            "members": {"small": {"url": provider.url, **MEMBER}},
            "policies": {"one": "single:small"},
            "ledger": f"sqlite:///{folder}/ledger.db",
        }
        server = running(config, folder)
        yield server
        server.stop()
        background.run(provider.runner.cleanup())


def check(api, mode, examples, fixed):
    """Generate requests of a mode for each operation, and hold the answers to the description."""
    options = {"max_examples": examples, "derandomize": fixed, "deadline": None}
    for found in api.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
            continue  # nothing can be wrong

        @settings(**options, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=mode))
        def one(case):
            response = case.call(timeout=20)
            assert response.status_code != 500
            case.validate_response(response)

        one()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_what_it_says_it_does(api, mode, started):
    check(api, mode, 25, fixed=True)
    assert httpx.get(f"{started.root}/healthz").status_code == 200


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_it_ten_thousand_times(api, mode, started):
    check(api, mode, 10_000 // 8, fixed=False)
    assert httpx.get(f"{started.root}/healthz").status_code == 200
