"""A Slurm of one node on this machine, from Debian's packages `slurm-wlm` and `munge`: started, asked, ended."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
CPUS = 2
STARTED_AFTER = 40.0

CONFIGURATION = """
ClusterName=tiny
SlurmctldHost={node}(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={daemon}
SlurmUser=slurm
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmdPidFile={folder}/spool/slurmd.pid
SlurmctldLogFile={folder}/state/slurmctld.log
SlurmdLogFile={folder}/spool/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
MinJobAge=3600
JobRequeue=1
KillWait=5
OverTimeLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={node} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=100000 State=UNKNOWN
PartitionName=usual Nodes={node} Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes={node} MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing() -> str:
    """Why no Slurm can be started here, or ""."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if lacking:
        return f"no {', '.join(lacking)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "only root can start Slurm's daemons"


class Slurm:
    """A running Slurm; jobs are submitted from `home`, with an environment."""

    def __init__(self, configuration: Path, home: Path, environment: Mapping[str, str]) -> None:
        self.home, self.configuration = home, configuration
        self._environment = {**environment, "SLURM_CONF": str(configuration)}

    def ask(self, *command: object) -> str:
        """What a program of Slurm prints."""
        words = [str(word) for word in command]
        done = subprocess.run(words, capture_output=True, text=True, cwd=self.home, env=self._environment)
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout.strip()

    def submit(self, script: Path, *arguments: object, options: tuple[str, ...] = ()) -> str:
        """The number of a new job."""
        return self.ask("sbatch", "--parsable", "--cpus-per-task=1", *options, script, *arguments)

    def states(self, job: str) -> list[str]:
        """The states of a job's tasks."""
        return self.ask("squeue", "--array", "--states=all", "--noheader", "--format=%T", "--jobs", job).split()

    def wait(self, job: str, *wanted: str, seconds: float = 120) -> None:
        """Until all tasks of a job are in one of these states, COMPLETED if none is named."""
        end = time.monotonic() + seconds
        while not set(states := self.states(job)) <= set(wanted or ("COMPLETED",)):
            late = time.monotonic() > end or (not wanted and "FAILED" in states)
            assert not late, f"job {job}: {states}\n{self.ask('squeue', '--array', '--states=all')}\n{self.said()}"
            time.sleep(0.1)

    def said(self) -> str:
        """What the jobs have said."""
        return "\n".join(path.read_text() for path in sorted(self.home.glob("turboesm-*.out")))


@contextmanager
def one_node(home: Path, environment: Mapping[str, str]) -> Iterator[Slurm]:
    """A Slurm with this machine as its node, of CPUS processors."""
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        for part, owner in (("munge", "munge"), ("state", "slurm"), ("spool", "root")):
            (folder / part).mkdir()
            shutil.chown(folder / part, owner)
        key = folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        shutil.chown(key, "munge")
        configuration = folder / "slurm.conf"
        configuration.write_text(
            CONFIGURATION.format(
                node=socket.gethostname().split(".")[0], folder=folder, cpus=CPUS, control=_port(), daemon=_port()
            )
        )
        _start_all(stack, folder, configuration)
        slurm = Slurm(configuration, home, environment)
        _wait_for_node(slurm, folder)
        yield slurm
        slurm.ask("scancel", "--user", pwd.getpwuid(os.geteuid()).pw_name)


def _start_all(stack: ExitStack, folder: Path, configuration: Path) -> None:
    munge = folder / "munge"
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
    options = [f"--{option}={munge / name}" for option, name in files.items()]
    _start(stack, ["munged", "--foreground", "--force", *options], "munge", configuration)
    end = time.monotonic() + STARTED_AFTER
    while not (munge / "socket").exists():
        assert time.monotonic() < end, (munge / "log").read_text()
        time.sleep(0.05)
    _start(stack, ["slurmctld", "-D"], "slurm", configuration)
    _start(stack, ["slurmd", "-D"], "root", configuration)


def _start(stack: ExitStack, command: list[str], user: str, configuration: Path) -> None:
    """A daemon that ends with the stack."""
    group = pwd.getpwnam(user).pw_gid
    process = subprocess.Popen(
        command, user=user, group=group, extra_groups=[], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={"PATH": _path(), "SLURM_CONF": str(configuration)},
    )  # fmt: skip

    def end() -> None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()

    stack.callback(end)


def _wait_for_node(slurm: Slurm, folder: Path) -> None:
    end = time.monotonic() + STARTED_AFTER
    while True:
        with suppress(AssertionError):
            if slurm.ask("sinfo", "--noheader", "--format=%T").split("\n")[0] == "idle":
                return
        logs = [path.read_text() for path in sorted(folder.glob("*/*.log"))]
        assert time.monotonic() < end, "\n".join(logs)
        time.sleep(0.2)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
