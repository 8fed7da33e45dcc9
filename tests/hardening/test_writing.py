"""Writers that are killed, that meet each other, and that find the disk full."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from skimp import cli
from skimp.ir.artefact import alone
from skimp.ir.cost import write_atomically
from skimp.ir.errors import ArtefactError, UnwritableError

HERE = Path(__file__).parent


def test_killed_at_every_change_of_a_file(tmp_path):
    pytest.importorskip("safetensors")
    done = subprocess.run(
        [sys.executable, HERE / "killed.py", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, left in found.items():
        assert left[0] == "old"
        assert left[-1] == "new"
        assert len(left) >= 3, (name, left)
    assert set(found["folder"]) == {"old", None, "new"}
    assert set(found["file"]) == set(found["blocks"]) == {"old", "new"}


def test_who_may_read_a_file_is_for_the_umask_to_say(tmp_path):
    (tmp_path / "other").touch()
    write_atomically(tmp_path / "file", b"x")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_second_conversion_into_one_folder_is_refused(tmp_path):
    with alone(tmp_path / "stages", "converting into"):
        with (
            pytest.raises(ArtefactError, match="another process is converting into"),
            alone(tmp_path / "stages", "converting into"),
        ):
            pass
        with alone(tmp_path / "stages"):  # stages are written meanwhile
            pass
    with alone(tmp_path / "stages", "converting into"):
        pass


def test_a_full_disk_is_said_and_harms_nothing(tmp_path):
    path = tmp_path / "policy.json"
    write_atomically(path, b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(UnwritableError) as caught:
            write_atomically(path, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert f"{path} cannot be written (File too large); free some space" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["policy.json"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "not enough memory"),
        (OSError(12, "Cannot allocate memory"), "not enough memory"),  # of a fork or a mapping
        (ImportError("lib.so: cannot allocate memory in static TLS block"), "not enough memory"),
        (ImportError("x.so: failed to map segment from shared object"), "not enough memory"),
        (OSError(28, "No space left on device", "here"), "here cannot be written"),
        (RuntimeError("cc:\nx.s: No space left on device\n"), "(x.s: No space left on device)"),
    ],
)
def test_what_lacks_is_a_message_and_no_traceback(error, message, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail():
        raise ImportError("no module named x")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ImportError):
        cli.main()
