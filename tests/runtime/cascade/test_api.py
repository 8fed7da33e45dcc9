"""The server against the description of it that it serves, by generated requests."""

import httpx
import pytest

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402


@pytest.fixture
def server(provider, serve):
    price = {"input": 0.1, "output": 0.2}
    member = {"url": provider().url, "price": price, "retries": 0}
    return serve({"members": {"small": member}, "policies": {"one": "single:small"}})


def check(server, mode, examples, fixed):
    """Generate requests of a mode for each operation, and hold the answers to the description."""
    options = {"max_examples": examples, "derandomize": fixed, "deadline": None}
    api = schemathesis.openapi.from_url(f"{server.root}/openapi.json")
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
    assert httpx.get(f"{server.root}/healthz").status_code == 200


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_what_it_says_it_does(server, mode):
    check(server, mode, 25, fixed=True)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_it_ten_thousand_times(server, mode):
    check(server, mode, 10_000 // 8, fixed=False)
