"""The example of the documentation, as its first lines say to run it."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from skimp.runtime.cascade.config import load_config

EXAMPLE = Path(__file__).parents[3] / "examples" / "cascade"


def wait_for(url, child):
    end = time.monotonic() + 150  # a busy machine may take minutes to import
    while True:
        try:
            return httpx.get(url, timeout=2)
        except httpx.TransportError:
            assert child.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)


@pytest.mark.timeout(500)
def test_the_example_runs(tmp_path, free_port):
    for file in ("cascade.yaml", "member.py", "ask.py"):
        shutil.copy(EXAMPLE / file, tmp_path)
    ports = {n: free_port() for n in ("8001", "8002", "8080")}
    text = (tmp_path / "cascade.yaml").read_text()
    for old, new in ports.items():
        text = text.replace(old, str(new))
    (tmp_path / "cascade.yaml").write_text(text)
    told = re.findall(r"^#   (\S.*)", re.sub(r"\\\n#\s*", "", text), re.MULTILINE)
    lines = [line.split("#")[0].strip() for line in told]
    assert [x.split()[0] for x in lines] == [
        *["python"] * 3, *["skimp"] * 3, "curl", "python",
    ]  # fmt: skip
    skimp = f"{sys.executable} -m skimp"
    children = []

    def run(line):
        line = re.sub("^skimp", skimp, re.sub("^python", sys.executable, line))
        if line.endswith("&") or " serve " in line:
            command = ["/bin/sh", "-c", "exec " + line.rstrip("& ")]
            children.append(subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL))
            return ""
        return subprocess.run(
            ["/bin/sh", "-c", line], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    try:
        for line in lines[:2]:
            run(line)
        for child, port in zip(children, ("8001", "8002"), strict=True):
            wait_for(f"http://127.0.0.1:{ports[port]}/", child)
        for line in lines[2:6]:
            run(line)
        policy = json.loads((tmp_path / "policy.json").read_text())
        assert 0 < policy["thresholds"][0] <= 1  # some votes must agree, and then it stays cheap
        assert policy["held_out"]["mean_cost"] < policy["held_out"]["mean_cost_of_strongest"]
        root = f"http://127.0.0.1:{ports['8080']}"
        wait_for(f"{root}/healthz", children[-1])
        if shutil.which("curl"):
            answer = json.loads(run(lines[6]))
            assert "391" in answer["choices"][0]["message"]["content"]
            assert answer["skimp"]["policy"] == "cascade"
        whole, told, parts = run(f"{lines[7]} --url {root}/v1").splitlines()
        assert "144" in whole
        assert "144" in parts
        assert "'policy': 'cascade'" in told
        assert "skimp" in httpx.get(f"{root}/").text
    finally:
        for child in children:
            child.kill()
            child.wait(20)


def test_the_example_s_configuration_is_whole():
    config = load_config(EXAMPLE / "cascade.yaml")
    assert set(config.members) == {"small", "large"}
    assert config.members["small"].fallback == ("large",)
