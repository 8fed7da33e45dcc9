"""The page in a real headless browser."""

import os
import shutil
from pathlib import Path

import httpx
import pytest

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def busy(provider, serve, write_policy, monkeypatch):
    """A server that has served: cheap answers, climbs, failures, a budget."""
    monkeypatch.setenv("TEAM", "team-key")
    a, b = provider(), provider()
    frontier = [{"cost": 1e-5 + 4e-5 * k, "agreement": 0.7 + 0.06 * k} for k in range(6)]
    held = {
        "queries": 200,
        "mean_cost": 6e-5,
        "mean_cost_of_strongest": 2.1e-4,
        "regret": 0.12,
        "exceedance": 0.07,
    }
    policy = write_policy(
        [("small", 3), ("large", 1)],
        [0.6],
        budget=1e-4,
        alpha=0.1,
        exceedance_ceiling=0.14,
        mode="paper",
        frontier=frontier,
        held_out=held,
        calibration_costs=[1e-5] * 180 + [1.5e-4] * 20,
    )
    server = serve(
        {
            "members": {
                "small": {"url": a.url, "price": {"input": 0.1, "output": 0.2}, "retries": 0},
                "large": {"url": b.url, "price": {"input": 3, "output": 15}, "retries": 0},
            },
            "policies": {"cascade": policy, "always-large": "single:large"},
            "budget": {"usd": 0.5, "per": "day"},
        }
    )
    post = lambda text, model="skimp": httpx.post(  # noqa: E731
        f"{server.url}/chat/completions",
        json={"model": model, "messages": [{"role": "user", "content": text}]},
        timeout=30,
    )
    for i in range(24):
        post(f"small=ok:{i}")
    for i in range(2):
        post(f"n={i} small=ok:1|2|3 large=ok:5")
    post("small=500 large=ok:5")
    post("small=ok:1|2|3 large=500")
    post("large=ok:1", "large")
    server.post = post
    return server


def test_the_page_shows_what_the_ledger_says(busy, browser):
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    problems = []
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.goto(busy.root)
    page.get_by_text("live", exact=True).wait_for()
    text = page.inner_text("main")
    for expected in ("Requests\n29", "Cost bound", "Frontier", "Routes", "Members", "Budgets"):
        assert expected in text, expected
    assert "promised: 10%" in text
    row = page.locator("tr", has_text="small").first.inner_text()
    assert "84" in row  # three votes of 28 requests
    page.get_by_label("Active policy").select_option("always-large")
    busy.wait(lambda: busy.gateway.active == "always-large")
    page.get_by_text("promises nothing").wait_for()
    page.get_by_label("Active policy").select_option("cascade")
    page.get_by_text("promised: 10%").wait_for()
    busy.post("small=ok:4")
    page.locator(".tile b", has_text="30").wait_for(timeout=6000)  # by itself: it is live
    assert problems == []
    page.close()


def test_an_alarm_reaches_the_page_and_the_metrics(provider, serve, write_policy, browser):
    a = provider()
    policy = write_policy(
        [("small", 1), ("large", 1)], [0.0], budget=1e-9, calibration_costs=[1e-10] * 50
    )
    member = {"url": a.url, "price": {"input": 1, "output": 1}}
    server = serve({"members": {"small": member, "large": member}, "policies": {"p": policy}})
    page = browser.new_page()
    page.goto(server.root)
    page.get_by_text("live", exact=True).wait_for()
    assert page.get_by_role("alert").count() == 0
    for i in range(30):
        body = {"model": "skimp", "messages": [{"role": "user", "content": f"{i}"}]}
        body["stream"] = i % 2 == 0
        assert httpx.post(f"{server.url}/chat/completions", json=body).status_code == 200
    page.get_by_role("alert").get_by_text("more often than").wait_for(timeout=8000)
    text = httpx.get(f"{server.root}/metrics").text
    assert 'skimp_drift_alarms_total{policy="p"} 2.0' in text  # once each, not once a request
    assert 'skimp_exceedance{policy="p"} 1.0' in text
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_the_page_fits(busy, browser, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(busy.root)
    page.get_by_text("live", exact=True).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(15, 15, 14)") == (scheme == "dark")
    if folder := os.environ.get("SKIMP_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"page-{width}-{scheme}.png", full_page=True)
    page.close()


def test_markup_in_names_is_text(provider, serve, browser):
    name = "<img src=x onerror=document.title='broken'>"
    server = serve(
        {
            "members": {name: {"url": provider().url, "price": {"input": 1, "output": 1}}},
            "policies": {"p": f"single:{name}"},
        }
    )
    page = browser.new_page()
    page.goto(server.root)
    page.get_by_text("live", exact=True).wait_for()
    assert page.locator("main img").count() == 0
    assert page.title() == "skimp"
    page.close()


def test_the_page_asks_for_a_key(provider, serve, browser, monkeypatch):
    monkeypatch.setenv("TEAM", "team-key")
    server = serve(
        {
            "members": {"a": {"url": provider().url, "price": {"input": 1, "output": 1}}},
            "callers": {"team": {"key": "TEAM"}},
        }
    )
    page = browser.new_page()
    page.goto(server.root)
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Open").click()
    page.get_by_text("That key is unknown").wait_for()
    page.get_by_label("API key").fill("team-key")
    page.get_by_role("button", name="Open").click()
    page.get_by_text("live", exact=True).wait_for()
    page.close()
