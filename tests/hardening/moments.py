"""Kill a command at every change of a file, and look at what is left.

The process that drives this computes nothing and only forks, so that torch is imported once and
no thread of OpenMP is there to be lost in a fork.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from skimp.ir.cost import DRAFT

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
LEAVES_A_TRACE = os.O_TRUNC | os.O_APPEND | os.O_EXCL
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.truncate")
HALF = b'{"ha'


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes:
        name: For people.
        prepare: Makes its inputs in a folder.
        words: Of the command line, by folder and by which of two results, "old" or "new", is
            wanted.
        seen: What the folder holds of it, read as skimp reads it: equal for equal results, ``None``
            if there is nothing; an error if it is no whole result.
        gap: A killed replacement may leave nothing, never a half.
        grows: What it was killed at may be between old and new, as it goes on from there.
        imports: Modules that every fork would import.
    """

    name: str
    prepare: Callable[[Path], None]
    words: Callable[[Path, str], list[object]]
    seen: Callable[[Path], object]
    gap: bool = False
    grows: bool = False
    imports: tuple[str, ...] = ()


def begin(work, *args):
    """Start work in a fork."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.write(write, json.dumps([work(*args)]).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    return pid, read


def end(pid, read):
    """What work returned, through JSON, or ``None`` where it was killed."""
    with os.fdopen(read) as file:
        told = file.read()
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return None
    assert status == 0, "work in a fork failed"
    return json.loads(told)[0]


def child(work, *args):
    """Do work in a fork; see :func:`end`."""
    return end(*begin(work, *args))


class Watch:
    """Counts changes of files in a place; sends the process a signal at one of them.

    An opening for writing counts twice: before it, and when half a line is written.
    """

    def __init__(self, place, moment=None, number=signal.SIGKILL):
        self.place, self.moment, self.number = str(place), moment, number
        self.count, self.busy = 0, False

    def __call__(self, event, args):
        if (event not in CHANGES and event != "open") or self.busy:
            return
        flags = args[2] if event == "open" else 0
        if event == "open" and not (isinstance(flags, int) and flags & WRITES):
            return
        if not _name(event, args).startswith(self.place):
            return
        self.step()
        if event == "open" and flags & LEAVES_A_TRACE:
            if self.count == self.moment:
                self.busy = True
                os.write(os.open(args[0], flags, 0o644), HALF)
            self.step()

    def step(self):
        if self.count == self.moment:
            os.kill(os.getpid(), self.number)
        self.count += 1


def _name(event, args):
    """The path that an audit event is about; children of open folders are named by these."""
    try:
        path = os.fsdecode(args[0])
    except TypeError:
        return ""
    folder = args[-1] if event in ("os.remove", "os.rmdir") else -1
    if isinstance(folder, int) and folder >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return os.path.abspath(path)


def ask(command, place, value, watch=None, said="said.txt"):
    """The command in this process, as the shell runs it: its exit code, what it says in a file."""
    from skimp import cli

    file = os.open(place.with_name(said), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.chdir(place)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["skimp", *(str(w) for w in command.words(place, value))]
    if watch is not None:
        sys.addaudithook(watch)
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0


def run(command, place, value, moment=None):
    """The command, which is killed or succeeds: how many changes of files it made."""
    watch = Watch(place, moment)
    code = ask(command, place, value, watch)
    assert code == 0, f"exit code {code}"
    return watch.count


def names(place):
    """Of all files, but for drafts, whose names say what they are."""
    return sorted(
        str(p.relative_to(place)) for p in place.rglob("*") if DRAFT not in str(p) and p.is_file()
    )


def no_drafts(place):
    drafts = [str(p) for p in place.rglob(f"{DRAFT}*")]
    assert not drafts, f"left behind: {drafts}"


def answers(script, *words, within=()):
    """What a script of this folder printed, a line of JSON by name each."""
    words = [*within, sys.executable, Path(__file__).with_name(script), *words]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    return {name: told for line in found for name, told in line.items()}


def age(place):
    """Make what is there two days old, so that leftovers are what nobody works on."""
    then = time.time() - 2 * 24 * 3600
    for path in place.rglob("*"):
        os.utime(path, (then, then))


def attack(command, root, most=None):
    """Kill a command at ``most`` moments, spread over all that there are.

    Returns:
        By whether a result was there before: how many moments there are, and what was left at
        those that were tried.
    """
    root = root / command.name
    place, inputs, before = root / "place", root / "inputs", root / "before"
    root.mkdir(parents=True)

    def fill(source):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source, place)

    def succeed(value):
        count = child(run, command, place, value)
        assert count is not None, "was killed by somebody else"
        return count

    place.mkdir()
    child(command.prepare, place)
    shutil.copytree(place, inputs)
    succeed("old")
    old = child(command.seen, place)
    assert old is not None
    shutil.copytree(place, before)
    found = {}
    for name, source, was in (("nothing", inputs, None), ("old", before, old)):
        fill(source)
        count = succeed("new")
        new, files = child(command.seen, place), names(place)
        assert new is not None
        assert new != was, "the two results cannot be told apart"
        left = []
        for moment in spread(count, most):
            fill(source)
            where = f"{command.name}, on {name}, killed at {moment} of {count}"
            try:
                assert child(run, command, place, "new", moment) is None, "was not killed"
                value = child(command.seen, place)
                allowed = [was, new] + [None] * command.gap
                assert command.grows or value in allowed, f"left {value}"
                left.append("new" if value == new else "nothing" if value is None else "old")
                age(place)
                succeed("new")
                assert child(command.seen, place) == new
                assert names(place) == files, f"{set(names(place)) ^ set(files)}"
                no_drafts(place)
            except AssertionError as error:
                said = place.with_name("said.txt").read_text()[-3000:]
                raise AssertionError(f"{where}: {error}\n{names(place)}\n{said}") from error
        found[name] = {"moments": count, "left": left}
    return found


def spread(count, most):
    if most is None or count <= most:
        return range(count)
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
