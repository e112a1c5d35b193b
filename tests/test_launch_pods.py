"""The scripts of launch/ for several processes: what they would start, and what they do with stand-ins for it."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tap_jax.cli.arguments import parse
from tap_jax.cli.commands import COMMANDS

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
SCRIPTS = ("local.sh", "slurm.sbatch", "tpu_pod.sh", "gke.sh")
RUN = ("--config=configs/demo.py", "--workdir=runs/it", "--config.variants=('tap','local')")

# A trainer that notes how it was called, fails where FAIL is its number, and otherwise lives until SIGTERM.
TRAINER = """#!/usr/bin/env bash
echo "${CUDA_VISIBLE_DEVICES:-} $*" >>"$CALLS"
if [[ ${FAIL:-} && $* == *--process=$FAIL ]]; then exit 9; fi
trap 'echo stopped >>"$CALLS"; exit 143' TERM
if [[ ${DEAF:-} ]]; then trap '' TERM; fi
while :; do sleep 0.1; done
"""
# Notes the call; srun ends with the status in SRUN.
NOTING = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
if [[ $(basename "$0") == srun ]]; then exit "${SRUN:-0}"; fi
if [[ $(basename "$0") == kubectl ]]; then cat >>"$CALLS"; fi
"""
# All machines of the slice are one, whose home is HOME: copies and runs as the flags of gcloud say.
GCLOUD = """#!/usr/bin/env bash
for argument; do
    case $argument in --command=*) cd "$HOME" && exec bash -c "${argument#--command=}" ;; esac
done
echo "gcloud $*" >>"$CALLS"
if [[ $* == *describe* ]]; then echo ACTIVE; fi
"""
# What several processes of `tap-jax train` do first of all, and a sum over them.
SUM = f"""#!{sys.executable}
import sys
from tap_jax.cli import startup
from tap_jax.cli import distributed
from tap_jax.cli.arguments import parse
from tap_jax.cli.commands import COMMANDS, PROCESSES
flags = parse(COMMANDS["train"], sys.argv[2:])
startup.start_jax(flags["config"], distributed.processes(*(flags[f.name] for f in PROCESSES)))
import jax
from jax.experimental.multihost_utils import process_allgather
print(jax.process_count(), process_allgather(jax.numpy.ones(3) + jax.process_index()).sum())
"""


class Launch:
    """The scripts of launch/, with stand-ins for the programs that they start."""

    def __init__(self, folder):
        self.home, self.bin, self.calls = folder, folder / "bin", folder / "calls"
        self.bin.mkdir()

    def stand_in(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def noted(self):
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def start(self, script, *arguments, **environment):
        own = {"PATH": f"{self.bin}:{os.environ['PATH']}", "CALLS": str(self.calls), "HOME": str(self.home)}
        return subprocess.Popen(
            ["bash", str(LAUNCH / script), *arguments],
            env=os.environ | own | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script, *arguments, **environment):
        process = self.start(script, *arguments, **environment)
        out, err = process.communicate(timeout=100)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def dry_run(self, script, *arguments, **environment):
        """The commands that a dry run prints, in words; nothing is started by it."""
        done = self.run(script, "--dry-run", *arguments, **environment)
        assert (done.returncode, done.stderr, self.noted()) == (0, "", [])
        return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.fixture
def launch(tmp_path, monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "JAX_NUM_CPU_DEVICES", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TOPOLOGY"):
        monkeypatch.delenv(name, raising=False)
    return Launch(tmp_path)


def soon(condition):
    """Waits for it."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_sound_and_say_what_they_are_for(script):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(LAUNCH / script)], check=True)
    comment = "".join(line for line in (LAUNCH / script).read_text().splitlines(True)[:50] if line.startswith("#"))
    assert all(words in comment for words in (f"launch/{script}", "Needs", "--dry-run", "from the last checkpoint"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_call_shows_how_to_call(script, launch):
    done = launch.run(script, TPU="t", ZONE="z")
    assert done.returncode == 2 and done.stderr.startswith("usage: ")


def flags_of(words):
    """The flags of a tap-jax command, as the command line itself reads them."""
    return parse(COMMANDS[words[words.index("tap-jax") + 1]], words[words.index("tap-jax") + 2 :])


# --- local.sh ------------------------------------------------------------------------------------------------------


def test_local_deals_out_cores(launch):
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // 2
    commands = launch.dry_run("local.sh", "2", *RUN, JAX_PLATFORMS="cpu", PORT="4321")
    for index, words in enumerate(commands):
        if share:
            assert words[:2] == ["taskset", "-c"]
            assert words[2] == ",".join(map(str, cores[index * share : (index + 1) * share]))
        flags = flags_of(words)
        assert (flags["coordinator"], flags["processes"], flags["process"]) == ("127.0.0.1:4321", 2, index)
        assert (flags["workdir"], flags["config"].variants) == ("runs/it", ("tap", "local"))
    assert len(commands) == 2
    more = launch.dry_run("local.sh", str(len(cores) + 1), *RUN, JAX_PLATFORMS="cpu")
    assert all(words[0] == "tap-jax" for words in more), "more processes than cores share all of them"


def test_local_deals_out_gpus(launch):
    commands = launch.dry_run("local.sh", "2", *RUN, CUDA_VISIBLE_DEVICES="0,2,5,7", JAX_PLATFORMS="")
    assert [words[:2] for words in commands] == [
        ["env", "CUDA_VISIBLE_DEVICES=0,2"],
        ["env", "CUDA_VISIBLE_DEVICES=5,7"],
    ]
    done = launch.run("local.sh", "3", *RUN, CUDA_VISIBLE_DEVICES="0,1", JAX_PLATFORMS="")
    assert done.returncode == 2 and "2 GPUs do not divide among 3 processes" in done.stderr
    launch.stand_in("nvidia-smi", "#!/bin/sh\nprintf '0\\n1\\n'\n")
    commands = launch.dry_run("local.sh", "2", *RUN, JAX_PLATFORMS="")
    assert [words[1] for words in commands] == ["CUDA_VISIBLE_DEVICES=0", "CUDA_VISIBLE_DEVICES=1"]


def test_local_passes_sigterm_on(launch):
    launch.stand_in("tap-jax", TRAINER)
    process = launch.start("local.sh", "2", *RUN, JAX_PLATFORMS="cpu")
    soon(lambda: len(launch.noted()) == 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, "")
    assert launch.noted()[2:] == ["stopped", "stopped"]


def test_local_ends_all_when_one_fails(launch):
    launch.stand_in("tap-jax", TRAINER)
    done = launch.run("local.sh", "3", *RUN, JAX_PLATFORMS="cpu", FAIL="1", DEAF="1", PATIENCE="1")
    assert done.returncode == 9
    assert "process 1 has ended with status 9, so the others have to end too" in done.stderr
    assert len(launch.noted()) == 3


def test_local_starts_one_run(launch):
    launch.stand_in("tap-jax", SUM)
    done = launch.run("local.sh", "2", *RUN, JAX_PLATFORMS="cpu")
    assert (done.returncode, done.stdout, done.stderr) == (0, "2 9.0\n", "")


# --- slurm.sbatch --------------------------------------------------------------------------------------------------


def test_slurm_starts_one_process_for_each_task(launch):
    train, again = launch.dry_run("slurm.sbatch", *RUN, SLURM_JOB_ID="77")
    assert train[0] == "env" and train[1].startswith("JAX_COMPILATION_CACHE_DIR=")
    assert train[2:5] == ["srun", "--kill-on-bad-exit=1", "tap-jax"]
    assert flags_of(train)["coordinator"] == "auto"
    assert flags_of(train)["config"].variants == ("tap", "local")
    assert again == ["scontrol", "requeue", "77"]
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("2", "1", "4")
    assert options["signal"].startswith("TERM@") and "requeue" in options and options["open-mode"] == "append"


@pytest.mark.parametrize(
    ("status", "restarts", "queued_again"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (75, 0, True), (134, 3, True), (143, 19, True), (143, 20, False)],
)
def test_slurm_queues_what_can_go_on(status, restarts, queued_again, launch):
    for name in ("srun", "scontrol"):
        launch.stand_in(name, NOTING)
    environment = {"SRUN": str(status), "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(restarts)}
    done = launch.run("slurm.sbatch", *RUN, **environment)
    assert done.returncode == status
    assert launch.noted()[1:] == ["scontrol requeue 77"] * queued_again
    assert launch.noted()[0].startswith("srun --kill-on-bad-exit=1 tap-jax train --coordinator=auto --config=")


# --- tpu_pod.sh ----------------------------------------------------------------------------------------------------

SLICE = {"TPU": "tap", "ZONE": "us-east5-b", "TYPE": "v6e-16", "NFS": "10.0.0.2:/share"}


def flags(words):
    return dict(word[2:].split("=", 1) if "=" in word else (word[2:], "") for word in words if word.startswith("--"))


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_tpu_asks_for_a_slice_with_its_image(kind, image, launch):
    create, describe = launch.dry_run("tpu_pod.sh", "create", **SLICE | {"TYPE": kind, "SPOT": "1"})
    assert create[:6] == "gcloud compute tpus queued-resources create tap".split()
    assert flags(create) == {
        "node-id": "tap", "zone": "us-east5-b", "accelerator-type": kind, "runtime-version": image, "spot": "",
    }  # fmt: skip
    assert describe[4:] == ["describe", "tap", "--zone=us-east5-b", "--format=value(state.state)"]


def test_tpu_installs_this_commit_on_all_machines(launch):
    archive, copy, install = launch.dry_run("tpu_pod.sh", "install", **SLICE)
    assert archive[:2] == ["git", "archive"] and archive[-1] == "HEAD"
    assert copy[:5] == "gcloud compute tpus tpu-vm scp".split() and "tap:tap-jax.tar.gz" in copy
    assert flags(copy)["worker"] == flags(install)["worker"] == "all"
    assert "mount -t nfs 10.0.0.2:/share /mnt/tap" in install[-1] and "constraints.txt" in install[-1]


def test_tpu_starts_leaves_and_stops_the_run(launch):
    launch.stand_in("gcloud", GCLOUD)
    (launch.home / "tap-jax").mkdir()
    (launch.home / "tap-env" / "bin").mkdir(parents=True)
    launch.stand_in("../tap-env/bin/tap-jax", TRAINER)
    assert launch.run("tpu_pod.sh", "train", *RUN, **SLICE).returncode == 0
    soon(launch.noted)
    [found] = launch.noted()
    assert found.split()[:2] == ["train", "--coordinator=auto"] and found.endswith("--config.variants=('tap','local')")
    assert launch.run("tpu_pod.sh", "stop", **SLICE).returncode == 0
    soon(lambda: launch.noted()[1:] == ["stopped"])


def test_tpu_waits_for_the_slice_and_gives_it_back(launch):
    launch.stand_in("gcloud", GCLOUD)
    launch.stand_in("sleep", "#!/bin/sh\n")
    assert launch.run("tpu_pod.sh", "create", **SLICE).returncode == 0
    assert launch.run("tpu_pod.sh", "delete", **SLICE).returncode == 0
    assert [call.split()[4] for call in launch.noted()] == ["create", "describe", "describe", "delete"]


# --- gke.sh --------------------------------------------------------------------------------------------------------

CLUSTER = {"IMAGE": "registry/tap-jax:1", "CLAIM": "disk"}


def job_set(launch, *arguments, **environment):
    done = launch.run("gke.sh", "--dry-run", *arguments, **CLUSTER | environment)
    assert (done.returncode, done.stderr) == (0, "")
    first, *lines, last = done.stdout.splitlines()
    assert (first, last) == ("kubectl apply --server-side -f - <<'EOF'", "EOF")
    assert "${" not in done.stdout
    return yaml.safe_load("\n".join(lines))


def test_gke_fills_in_a_job_set_for_gpus(launch):
    made = job_set(launch, "flava", *RUN, "--config.data.root=$(HOME)", NODES="3", DEVICES="8")
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert made["metadata"] == {"name": "flava", "annotations": {}}
    [worker] = made["spec"]["replicatedJobs"]
    job = worker["template"]["spec"]
    assert (worker["name"], worker["replicas"]) == ("worker", 1)
    assert (job["completionMode"], job["completions"], job["parallelism"], job["backoffLimit"]) == ("Indexed", 3, 3, 0)
    pod = job["template"]["spec"]
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 120)
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-tesla-a100"}
    [container] = pod["containers"]
    assert container["image"] == "registry/tap-jax:1"
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert container["ports"] == [{"containerPort": 8476}]
    claims = [volume.get("persistentVolumeClaim") for volume in pod["volumes"]]
    assert claims == [{"claimName": "disk"}, None]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # The arguments are those of tap-jax train once Kubernetes has put in the pod's number.
    arguments = [word.replace("$(JOB_COMPLETION_INDEX)", "2").replace("$$(", "$(") for word in container["args"]]
    found = parse(COMMANDS[container["command"][1]], arguments)
    assert found["coordinator"] == "flava-worker-0-0.flava:8476" and (found["processes"], found["process"]) == (3, 2)
    assert (found["config"].variants, found["config"].data.root) == (("tap", "local"), "$(HOME)")


def test_gke_starts_again_unless_only_the_user_can_help(launch):
    spec = job_set(launch, "flava", *RUN, RESTARTS="5")["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 5
    [rule] = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    job = spec["replicatedJobs"][0]["template"]["spec"]
    [rule] = job["podFailurePolicy"]["rules"]
    names = [container["name"] for container in job["template"]["spec"]["containers"]]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["containerName"] in names
    assert (rule["onExitCodes"]["operator"], rule["onExitCodes"]["values"]) == ("In", [1, 2])


def test_gke_fills_in_a_job_set_for_a_tpu_slice(launch):
    made = job_set(launch, "flava", *RUN, NODES="4", ACCELERATOR="tpu-v5-lite-podslice", TOPOLOGY="4x4")
    assert made["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    [container] = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["args"][-1] == "--coordinator=auto"
    assert pod["tolerations"][0]["key"] == "google.com/tpu"


def test_gke_gives_kubectl_what_the_dry_run_shows(launch):
    shown = launch.run("gke.sh", "--dry-run", "flava", *RUN, **CLUSTER).stdout.splitlines()[1:-1]
    launch.stand_in("kubectl", NOTING)
    assert launch.run("gke.sh", "flava", *RUN, **CLUSTER).returncode == 0
    assert launch.noted() == ["kubectl apply --server-side -f -", *shown]
    assert launch.run("gke.sh", "Flava_1", *RUN, **CLUSTER).returncode == 2, "no name for Kubernetes"
