"""Several machines on one: what stands in inside.py, run in a network namespace of its own.

Whatever it starts ends with the namespace, and nothing in it can be reached from outside.
"""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.cluster_nodes import ROOT, command_inside, why_not

HERE = Path(__file__).parent
LIMIT_S = 900

pytestmark = pytest.mark.timeout(LIMIT_S + 60)


@pytest.fixture(autouse=True)
def _namespaces():
    if (reason := why_not()) is not None:
        pytest.skip(reason)


def run_inside(marked: str) -> None:
    """Run the tests of inside.py with that mark; each must pass, and there must be some."""
    tests = [sys.executable, "-m", "pytest", str(HERE / "inside.py"), "-m", marked]
    quiet = ["-p", "no:cacheprovider", "-q", "--durations=0", "--durations-min=1"]
    ran = subprocess.run(
        command_inside([*tests, *quiet]),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.slow
def test_three_nodes_serve_two_models_as_one():
    run_inside("slow")


@pytest.mark.chaos
def test_whatever_breaks_every_request_ends_in_tokens_an_error_or_a_reason():
    run_inside("chaos")
