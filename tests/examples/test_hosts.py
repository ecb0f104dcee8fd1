"""What runs s2d on other hosts: accelerate's configurations, Slurm's jobs, and the container."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sysconfig
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIGS, SLURM = ROOT / "examples" / "configs", ROOT / "examples" / "slurm"
HAS_SCORE = importlib.util.find_spec("s2dcli.stages.score") is not None


def linted(linter: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a linter that the extra `test` has put beside this Python."""
    command = shutil.which(linter, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    assert command, f"{linter} is not installed: pip install -e '.[test]'"
    return subprocess.run([command, *map(str, arguments)], cwd=SLURM, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [
        ("one-gpu", "NO", 1, 1),
        ("eight-gpus-fsdp2", "FSDP", 1, 8),
        ("two-nodes-fsdp2", "FSDP", 2, 16),
    ],
)
def test_accelerate_reads_its_configurations(name, kind, machines, processes):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.distributed_type, config.num_machines, config.num_processes) == (kind, machines, processes)
    assert config.mixed_precision == "no"
    assert not config.use_cpu
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_reshard_after_forward"] is True


def tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/bash\n" + script)
    (folder / name).chmod(0o755)


@pytest.fixture
def cluster(tmp_path, toy, few):
    """Slurm and the commands as stand-ins that write down what they are told; returns the environment of submit.sh."""
    tools = tmp_path / "bin"
    # One line a call: its arguments, each closed by a tab. sbatch prints the number of the job, which is its line.
    write = lambda file: f"printf '%s\\t' \"$@\" >> '{tmp_path / file}'; echo >> '{tmp_path / file}'\n"  # noqa: E731
    tool(tools, "sbatch", write("jobs") + f"wc -l < '{tmp_path / 'jobs'}'\n")
    tool(tools, "s2d", f'if [ "$*" = "score --help" ]; then exit {0 if HAS_SCORE else 2}; fi\n' + write("commands"))
    tool(tools, "accelerate", write("commands"))
    (tmp_path / "environment.sh").write_text(f"""
        source '{SLURM}/environment.sh'
        teacher={toy}/teacher student={toy}/student labelled={few} test_problems={few} out={tmp_path}/out
        shards=2 rollout=(-n 2 --max-tokens 8 --sample-tokens 200) eval=(-k 2 --max-tokens 8 --workers 1)
        verify=(--workers 1) grpo=(--workers 1)
        trainer=(--max-tokens 8 -n 2 --problems-per-step 4 --steps 1) warmup=(--steps 1)
    """)
    return {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tmp_path), "S2D_ENVIRONMENT": str(tmp_path / "environment.sh")}


def calls(path: Path) -> list[list[str]]:
    return [line.split("\t")[:-1] for line in path.read_text().splitlines()]


def test_every_job_runs_after_those_that_it_waits_for(cluster, tmp_path, s2d):
    subprocess.run([SLURM / "submit.sh"], env=cluster, cwd=ROOT, check=True, capture_output=True)
    done, names = set(), []
    for number, job in enumerate(calls(tmp_path / "jobs"), 1):
        script = next(index for index, word in enumerate(job) if word.endswith(".sh"))
        options = dict(pairwise(job[:script]))
        if "--dependency" in options:
            kind, before = options["--dependency"].split(":")
            assert (kind, int(before) in done) == ("afterok", True)
        names.append(options["--job-name"].removeprefix("s2d-"))
        first, last = map(int, options.get("--array", "0-0").split("-"))
        for task in range(first, last + 1):
            (tmp_path / "commands").unlink(missing_ok=True)
            slurm = {"SLURM_JOB_ID": str(number), "SLURM_JOB_NUM_NODES": "1", "S2D_SLURM": str(SLURM)}
            if last:
                slurm |= {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": str(last)}
            subprocess.run(job[script:], env=cluster | slurm, cwd=ROOT, check=True)
            [command] = calls(tmp_path / "commands")
            if command[0] == "launch":
                assert command[:3] == ["launch", "--config_file", "examples/configs/eight-gpus-fsdp2.yaml"]
                assert "--gpus-per-node" in job
                command = command[command.index("-m") + 2 :]
            command = [word for index, word in enumerate(command) if "vllm" not in command[index : index + 2]]
            result = s2d(*command)
            assert result.code == 0, result.err
        done.add(number)
    scored = ["score"] if HAS_SCORE else []
    assert names == ["teacher", "rollout", "merge", *scored, "warmup", "opd", "eval-teacher", "eval-student"]
    out = tmp_path / "out"
    assert len((out / "rollouts" / "graded.jsonl").read_text().splitlines()) == 16  # 8 problems, 2 samples, whatever the shards
    assert len(list((out / "rollouts").glob("part-*.jsonl"))) == 2
    assert json.loads((out / "eval" / "student" / "results.json").read_text())["problems"] == 8


def test_a_training_on_two_hosts_tells_each_its_rank_and_the_first_ones_address(cluster, tmp_path):
    tool(tmp_path / "bin", "scontrol", 'printf "%s\\n" node7 node8\n')
    tool(tmp_path / "bin", "srun", 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n')
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "S2D_SLURM": str(SLURM)}
    subprocess.run([SLURM / "train.sh", "grpo", "--model", "a b"], env=cluster | slurm, cwd=ROOT, check=True)
    for rank, command in enumerate(calls(tmp_path / "commands")):
        assert command[-6:] == ["-m", "s2dcli", "grpo", "--model", "a b", "--resume"]
        options = dict(pairwise(command))
        assert (options["--machine_rank"], options["--main_process_ip"], options["--main_process_port"]) == (str(rank), "node7", "29500")
    assert rank == 1


def test_a_preempted_job_stops_its_command_and_goes_back_into_the_queue(cluster, tmp_path):
    tool(tmp_path / "bin", "scontrol", f'echo "$@" > {tmp_path}/requeued\n')
    tool(
        tmp_path / "bin",
        "s2d",
        f"trap 'sleep 0.2; touch {tmp_path}/saved; exit 143' TERM\ntouch {tmp_path}/started\nfor _ in {{1..600}}; do sleep 0.1; done\n",
    )
    slurm = {"SLURM_JOB_ID": "7", "S2D_SLURM": str(SLURM)}
    job = subprocess.Popen([SLURM / "eval.sh", "model", "problems", "out"], env=cluster | slurm, cwd=ROOT)
    while not (tmp_path / "started").exists():
        assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 143
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_a_failed_job_is_not_run_again(cluster, tmp_path):
    tool(tmp_path / "bin", "scontrol", f"touch {tmp_path}/requeued\n")
    tool(tmp_path / "bin", "s2d", "exit 1\n")
    slurm = {"SLURM_JOB_ID": "7", "S2D_SLURM": str(SLURM)}
    assert subprocess.run([SLURM / "eval.sh", "model", "problems", "out"], env=cluster | slurm, cwd=ROOT, check=False).returncode == 1
    assert not (tmp_path / "requeued").exists()


def test_linters_find_nothing():
    scripts = [ROOT / ".ci" / "run", *sorted((ROOT / "examples").rglob("*.sh")), *sorted((ROOT / "tests").rglob("*.sh"))]
    for command in (["shellcheck", *scripts], ["hadolint", ROOT / "Dockerfile"], ["docker-compose", "-f", ROOT / "compose.yaml", "config"]):
        found = linted(*command)
        assert (found.returncode, found.stderr) == (0, ""), found.stdout + found.stderr


def test_linters_find_what_is_wrong(tmp_path):
    """So they are there and run."""
    wrong = {"run.sh": "#!/bin/bash\necho $1\n", "Dockerfile": "FROM debian\n", "compose.yaml": "services:\n  a:\n    imagee: b\n"}
    for name, text in wrong.items():
        (tmp_path / name).write_text(text)
    found = [
        linted("shellcheck", tmp_path / "run.sh"),
        linted("hadolint", tmp_path / "Dockerfile"),
        linted("docker-compose", "-f", tmp_path / "compose.yaml", "config"),
    ]
    assert all(result.returncode for result in found)
    assert "SC2086" in found[0].stdout
    assert "DL3006" in found[1].stdout
    assert "imagee" in found[2].stderr


def test_sampler_and_trainer_share_data_and_not_a_gpu():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    sampler, trainer = services["sampler"], services["trainer"]
    assert sampler["volumes"] == trainer["volumes"]
    gpus = [service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for service in (sampler, trainer)]
    assert gpus[0] != gpus[1]
    assert trainer["depends_on"] == {"sampler": {"condition": "service_healthy"}}
    assert "ports" not in sampler  # its dev mode is for nobody outside
