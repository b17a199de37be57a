"""Stand-ins for the programs of Slurm that submitit calls: jobs are processes of this machine, states are files."""

import sys
from pathlib import Path

PROGRAM = """#!{python}
import os, signal, subprocess, sys
from pathlib import Path

STATES = Path({folder!r})
name, arguments = Path(sys.argv[0]).name, sys.argv[1:]


def state_of(job):
    return (STATES / f"{{job}}.state").read_text()


def start(job, script):
    state = STATES / f"{{job}}.state"
    state.write_text("RUNNING")
    environment = {{"SLURM_JOB_ID": job, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0"}}
    process = subprocess.Popen(
        ["bash", "-c", f"bash {{script}} && echo COMPLETED > {{state}} || echo FAILED > {{state}}"],
        env={{**os.environ, **environment}}, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    (STATES / f"{{job}}.pid").write_text(str(process.pid))


if name == "sbatch":
    if (STATES / "refuse").exists():
        sys.exit("sbatch: error: invalid partition specified: no")
    job = str(1 + len(list(STATES.glob("*.state"))))
    script = STATES / f"{{job}}.sbatch"
    script.write_text(Path(arguments[0]).read_text())
    start(job, script)
    print(f"Submitted batch job {{job}}")
elif name == "srun":
    files = {{}}
    while arguments[0].startswith("--"):
        option = arguments.pop(0)
        if option in ("--output", "--error"):
            files[option] = arguments.pop(0).replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", "0")
    with open(files["--output"], "a") as out, open(files["--error"], "a") as err:
        sys.exit(subprocess.call(arguments, stdout=out, stderr=err))
elif name == "sacct":
    print("JobID|State|NodeList")
    for job in arguments[arguments.index("--parsable2") + 1 :][1::2]:
        print(f"{{job}}|{{state_of(job).strip()}}|node1")
elif name == "scontrol":
    action, job = arguments
    assert action == "requeue"
    group = int((STATES / f"{{job}}.pid").read_text())
    start(job, STATES / f"{{job}}.sbatch")
    os.killpg(group, signal.SIGKILL)
elif name == "scancel":
    (job,) = arguments
    os.killpg(int((STATES / f"{{job}}.pid").read_text()), signal.SIGKILL)
    (STATES / f"{{job}}.state").write_text("CANCELLED")
"""


def install(programs: Path, states: Path) -> None:
    """Write the programs into a directory that the caller puts into ``PATH``."""
    programs.mkdir()
    states.mkdir()
    for name in ("sbatch", "srun", "sacct", "scancel", "scontrol"):
        program = programs / name
        program.write_text(PROGRAM.format(python=sys.executable, folder=str(states)))
        program.chmod(0o755)
