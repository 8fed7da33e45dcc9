"""What skimp and its peers can do: read from a run of the tests and from what was timed.

Nobody types a yes. One of skimp is that every test named here exists, ran and passed; one of a peer
is that benchmarks/peers.py saw it. Where it did not look, nothing is said.
"""

import ast
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"

CAPABILITIES = {
    "runs an encoder, at any batch and length": (
        (
            "runtime/test_demo.py::test_the_main_job_and_its_report",
            "runtime/test_backend.py::test_five_shapes_two_compilations_and_tau_at_run_time",
        ),
        "shapes",
    ),
    "writes a decoder's greedy text, token by token that of `model.generate`": (
        (
            "runtime/tree/test_generate.py::test_the_same_call_gives_the_same_text",
            "runtime/tree/test_engine.py::"
            "test_greedy_output_is_that_of_transformers_one_by_one_and_four_at_a_time",
        ),
        "text",
    ),
    "verifies drafted tokens as trees sized by measured cost": (
        (
            "runtime/tree/test_policy.py::test_the_size_is_the_best_of_all",
            "runtime/tree/test_engine.py::test_the_curve_decides_how_much_is_verified",
        ),
        None,
    ),
    "runs only the experts that a token needs": (
        ("ir/test_op.py", "codegen/test_cpu_kernels.py"),
        None,
    ),
    "trades quality for speed at run time, with no compilation": (
        ("runtime/test_backend.py::test_five_shapes_two_compilations_and_tau_at_run_time",),
        None,
    ),
    "bfloat16": (
        (
            "runtime/test_backend.py::test_bfloat16_at_tau_zero_is_the_dense_model",
            "runtime/test_hub.py::test_bfloat16",
        ),
        None,
    ),
    "weights of 8 bits": ((), "int8"),
    "loads by `AutoModel.from_pretrained`": (
        ("runtime/test_hub.py::test_a_fresh_process_loads_every_architecture",),
        None,
    ),
    "exports to ONNX, run by ONNX Runtime": (("export/test_onnx.py",), None),
    "exports a `.pt2` package": (("export/test_package.py",), None),
    "exports MLIR, run by IREE": (("export/test_mlir.py",), None),
    "serves several models with a bound on cost": (
        (
            "runtime/cascade/test_server.py::test_agreement_stays_cheap_and_disagreement_climbs",
            "runtime/cascade/test_faults.py::test_a_budget_is_not_exceeded_by_many_at_once",
        ),
        None,
    ),
    "takes blocks out of a diffusion U-Net": (
        ("runtime/test_unet_command.py::test_a_student_is_written_and_reported",),
        None,
    ),
}
"""By what is claimed: tests of it, files or single ones; and what the benchmark sees of a peer."""


def functions(path):
    """Names of the tests of a file."""
    tree = ast.parse(path.read_text())
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}


def unknown(capabilities=CAPABILITIES, root=TESTS):
    """Tests that are named and do not exist."""
    missing = []
    for test in (t for tests, _ in capabilities.values() for t in tests):
        file, _, name = test.partition("::")
        path = root / file
        if not path.exists() or (name and name not in functions(path)):
            missing.append(test)
    return missing


def run_tests(report, root=TESTS):
    """Run what is named here, and no other test; minutes."""
    named = dict.fromkeys(t for tests, _ in CAPABILITIES.values() for t in tests)
    command = [sys.executable, "-m", "pytest", *named, f"--junitxml={report.absolute()}"]
    subprocess.run(command, cwd=root, stdout=sys.stderr)  # the report says what failed


def outcomes(report):
    """Of a JUnit report: by test, without parameters, its outcomes."""
    found = {}
    for case in ET.parse(report).iter("testcase"):
        module = case.get("classname").removeprefix("tests.").replace(".", "/") + ".py"
        bad = [c.tag for c in case if c.tag in ("failure", "error", "skipped")]
        key = f"{module}::{case.get('name').partition('[')[0]}"
        found.setdefault(key, []).append(bad[0] if bad else "passed")
    return found


def when(report):
    """The day of a JUnit report, and how many tests it has; nothing without one."""
    if not report.exists():
        return ""
    suites = list(ET.parse(report).iter("testsuite"))
    return f"{suites[0].get('timestamp')[:10]}, {sum(int(s.get('tests')) for s in suites)} tests"


def verdict(tests, found):
    """What a report says of tests together, and how many passed."""
    if not tests:
        return "no", 0
    seen = []
    for test in tests:
        mine = [o for key, got in found.items() if key.split("::")[0] == test for o in got]
        mine += found.get(test, []) if "::" in test else []
        if not mine:
            return f"not run: `{test}`", 0
        # of many cases some need what this machine lacks; of none that ran may one fail
        if bad := {"failure", "error"} & set(mine):
            return f"{bad.pop()} in `{test}`", 0
        if "passed" not in mine:
            return f"skipped: `{test}`", 0
        seen += mine
    return "yes", seen.count("passed")


def read_tests(report):
    """Rows of skimp's column, from the JUnit file that ``make test`` leaves."""
    found = outcomes(report) if report.exists() else {}
    rows = []
    for claim, (tests, seen) in CAPABILITIES.items():
        said, passed = verdict(tests, found)
        rows.append(dict(claim=claim, tests=list(tests), verdict=said, passed=passed, seen=seen))
    return rows
