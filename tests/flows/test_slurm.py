"""The batch script for Slurm: Ray over the nodes of an allocation, one command on it, and nothing left at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.ingest.demo import write_demo_corpus

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "infra" / "slurm" / "trip.sbatch"

# Two "nodes" on this machine: every step is a process here, as a step of Slurm is one on its node.
SRUN = '#!/usr/bin/env bash\nwhile [[ ${1:-} == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = "#!/usr/bin/env bash\nprintf '127.0.0.1\\n127.0.0.1\\n'\n"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The variables of a job of two nodes, with `srun` and `scontrol` of this machine on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_ON_NODE": "1"}
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PREFECT_", "SLURM_"))}
    more = {"PATH": f"{folder}:{os.environ['PATH']}", "TRIP_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return plain | job | more | {"TRIP_SLURM_TEST": str(tmp_path)}


def leftovers(mark: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if f"TRIP_SLURM_TEST={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append((entry / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found


def test_the_script_is_valid_bash() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True).returncode == 0


@pytest.mark.slow
def test_a_flow_runs_on_both_nodes_and_nothing_is_left(
    environment: dict[str, str], tiny_base: Path, tmp_path: Path
) -> None:
    table = write_demo_corpus(tmp_path / "corpus", 4, 64)
    flags = ["--recipe", "demo", "--source", table, "--root", str(tmp_path / "run"), "--base", str(tiny_base)]
    done = subprocess.run(
        ["bash", str(SCRIPT), "prepare-latents", *flags],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "slurm: Ray runs on 2 nodes" in done.stdout and "4 of 4 clips encoded" in done.stdout
    assert list((tmp_path / "run" / "data").glob("*/manifest.json"))
    assert not leftovers(str(tmp_path))
    code = subprocess.run(
        ["bash", str(SCRIPT), "prepare-latents", "--recipe", "nothing"], cwd=REPOSITORY, env=environment
    )
    assert code.returncode == 2 and not leftovers(str(tmp_path))
