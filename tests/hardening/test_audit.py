"""The check of what is pulled in: real metadata, and pip-audit on a database of our own."""

import importlib.util
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

pytest.importorskip("pip_audit")
HELD = importlib.util.spec_from_file_location(
    "audit", Path(__file__).parents[2] / "tools" / "audit.py"
)
audit = importlib.util.module_from_spec(HELD)
HELD.loader.exec_module(audit)

DISTRIBUTIONS = {
    "skimp-test-root": ["Requires-Dist: Skimp.Test_Leaf[more]>=1", "License: MIT"],
    "skimp-test-leaf": [
        "License-Expression: MIT OR GPL-3.0-only",
        "Requires-Dist: skimp-test-other; extra == 'more'",
        "Requires-Dist: skimp-test-unwanted; extra == 'all'",
        "Requires-Dist: skimp-test-root",
    ],
    "skimp-test-other": ["License: UNKNOWN", "Classifier: License :: OSI Approved :: MIT License"],
    "skimp-test-unwanted": ["License: GPLv2"],
    "skimp-test-copyleft": ["License-Expression: MIT AND GPL-3.0-only"],
    "skimp-test-silent": [],
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    for name, lines in DISTRIBUTIONS.items():
        folder = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        head = ["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0"]
        (folder / "METADATA").write_text("\n".join([*head, *lines, ""]))
    monkeypatch.syspath_prepend(tmp_path)


def test_what_is_pulled_in_is_found_and_no_more(installed):
    found = audit.pulled_in(["skimp-test-root", "skimp-test-not-there>=3"])
    assert list(found) == ["skimp-test-leaf", "skimp-test-other", "skimp-test-root"]
    assert audit.unknown_licences(found) == []


def test_a_licence_that_nobody_looked_at_is_named(installed):
    found = audit.pulled_in(["skimp-test-copyleft", "skimp-test-silent", "skimp-test-unwanted"])
    assert audit.unknown_licences(found) == [
        "skimp-test-copyleft 1.0: its licence is MIT AND GPL-3.0-only",
        "skimp-test-silent 1.0: its licence is nothing",
        "skimp-test-unwanted 1.0: its licence is GPLv2",
    ]


@pytest.mark.parametrize(
    ("expression", "good"),
    [
        ("MIT", True),
        ("GPL-3.0-only OR MIT AND ISC", True),
        ("GPL-3.0-only AND MIT", False),
        ("(MIT OR GPL-3.0-only) AND ISC", False),
        ("(MIT OR ISC) AND Apache-2.0 WITH LLVM-exception", True),
    ],
)
def test_expressions(expression, good):
    assert audit.allowed(expression) is good


@pytest.fixture
def database(monkeypatch):
    """A server that speaks OSV's protocol, and the versions of packages it thinks vulnerable."""
    bad = {}

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            package, told = query["package"], {}
            if bad.get(package["name"]) == query["version"]:
                ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "9.9"}]}]
                affected = [{"package": package, "ranges": ranges}]
                told = {"vulns": [{"id": "PYSEC-0-1", "affected": affected}]}
            body = json.dumps(told).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_AUDIT_VULNERABILITY_SERVICE", "osv")
    monkeypatch.setenv("PIP_AUDIT_OSV_URL", f"http://127.0.0.1:{server.server_port}")
    yield bad
    server.shutdown()


def test_a_vulnerability_fails(database, monkeypatch, capsys):
    name, version = audit.VULNERABLE.split("==")
    database |= {name: version, "pip-audit": audit.distribution("pip-audit").version}
    monkeypatch.setattr(sys, "argv", ["audit.py"])
    assert audit.main() == 1
    said = capsys.readouterr().out
    assert "1 known vulnerabilities" in said
    assert f"error: pip-audit {database['pip-audit']}: PYSEC-0-1, mended in 9.9" in said
    assert "skipped" not in said


def test_a_database_that_knows_nothing_or_does_not_answer_is_said(database, monkeypatch, capsys):
    found = audit.pulled_in(["pip-audit"])
    assert audit.vulnerabilities(found) == []
    assert "skipped: vulnerabilities, whose database cannot be reached" in capsys.readouterr().out
    monkeypatch.setenv("PIP_AUDIT_OSV_URL", "http://127.0.0.1:1")
    assert audit.vulnerabilities(found) == []
    assert "skipped: vulnerabilities, whose database cannot be reached" in capsys.readouterr().out
    assert audit.vulnerabilities({}) == ["pip-audit is not installed; it is in the extra 'dev'"]
