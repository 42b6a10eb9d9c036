"""The files of examples/cluster, as far as they can be checked without a cluster.

`test_on_a_cluster` runs all of them but the manifest for Kubernetes.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.runtime_env import RuntimeEnv
from ray.scripts.scripts import cli as ray_cli
from repository import CLUSTER, ROOT

from lcray.cli import app
from lcray.tasks.packaging import pack
from lcray.tasks.task import load_task

PAGE = (CLUSTER / "README.md").read_text()
SCRIPTS = [*CLUSTER.glob("*.sh"), ROOT / "tests" / "ssh" / "ray_submit.sh", ROOT / ".ci" / "run"]


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def blocks(text: str) -> list[list[str]]:
    """The commands in the sh blocks of a text, as words."""
    found = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "".join(found).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def in_script(name: str, program: str) -> list[list[str]]:
    """The commands of a script that run a program, or have another one run it."""
    text = (CLUSTER / name).read_text().replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words[words.index(program) :] for words in lines if program in words]


def check_lcray(words: list[str]) -> None:
    """That ``lcray WORDS`` is a command with its arguments."""
    assert words[0] == "lcray"
    app.app.commands[words[1]].make_context(words[1], words[2:])


def check_ray(words: list[str]) -> None:
    """That Ray has the command and its options."""
    command: Any = ray_cli
    words = words[1 : words.index("--") if "--" in words else None]
    while words and hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    used = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert used <= known, (command.name, used - known)


def test_every_file_is_explained() -> None:
    files = {path.name for path in CLUSTER.iterdir()} - {"README.md"}
    assert files >= {"job.sh", "cluster.yaml", "rayjob.yaml", "slurm.sh", "code"}
    assert [name for name in files if f"`{name}" not in PAGE and f" {name}" not in PAGE] == []


def test_commands_exist() -> None:
    words = blocks(PAGE)
    programs = {"lcray": check_lcray, "ray": check_ray}
    assert {line[0] for line in words} >= {"lcray", "ray", "sbatch", "kubectl", "python"}
    for line in words:
        programs.get(line[0], lambda line: None)(line)
        files = [w for w in line if (CLUSTER / w).suffix in {".sh", ".py", ".yaml"}]
        assert all((CLUSTER / name).is_file() for name in files), line
    main = (ROOT / "README.md").read_text().split("## On a cluster")[1].split("\n## ")[0]
    submitted = [line for line in blocks(main) if line[:2] in (["lcray", "submit"], ["ray", "job"])]
    assert submitted
    for line in submitted:
        programs[line[0]](line)


@pytest.mark.usefixtures("forgotten")
def test_the_code_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is missing: the example needs lcray[demo]")
    monkeypatch.chdir(CLUSTER / "code")
    assert set(pack("mytask:task").files) == {"mynet.py", "mytask.py"}
    monkeypatch.syspath_prepend(CLUSTER / "code")
    task = load_task(f"{CLUSTER}/code/mytask.py:task")
    assert callable(task.splits)
    sizes = {name: len(data[0]) for name, data in task.splits().items()}
    assert sizes == {"train": 1400, "test": 397}  # 1797 in all


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Modules of the example are not left to other tests."""
    yield
    for name in ("mytask", "mynet"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is missing: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", ["job.sh", "slurm.sh"])
def test_what_scripts_run_exists(name: str) -> None:
    (ray_line,) = in_script(name, "ray")
    check_ray(ray_line)
    check_lcray(ray_line[ray_line.index("lcray") :])


def test_slurm_asks_for_what_the_script_needs() -> None:
    text = (CLUSTER / "slurm.sh").read_text()
    asked = re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE)
    assert {"nodes", "ntasks-per-node", "exclusive", "time"} <= set(asked)
    assert text.splitlines()[0].startswith("#!") and "#SBATCH" in text.splitlines()[1]
    assert "RAY_AUTH_MODE=token" in text


def test_the_runtime_environment() -> None:
    assert RuntimeEnv(**load("runtime_env.yaml"))["env_vars"] == {"OMP_NUM_THREADS": "1"}


def test_the_cluster_launcher_takes_the_configuration() -> None:
    """By Ray's own schema; and every command in it is one of Ray's."""
    config = load("cluster.yaml")
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(config, json.loads(schema.read_text()))
    for line in [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]:
        check_ray(shlex.split(line))
    for local in config["file_mounts"].values():
        assert (CLUSTER / local).is_dir()
    target = next(iter(config["file_mounts"])).removeprefix("~/")
    assert f'Path.home() / "{target}"' in (CLUSTER / "analyze.py").read_text()


def only(*required: str, **fields: Any) -> dict[str, Any]:
    """A JSON schema of an object with these fields and no others."""
    kind = {"type": "object", "additionalProperties": False}
    return {**kind, "required": list(required), "properties": fields}


STRING, INTEGER, BOOLEAN = ({"type": name} for name in ("string", "integer", "boolean"))
STRINGS = {"type": "object", "additionalProperties": STRING}
QUANTITIES = only(requests=STRINGS, limits=STRINGS)
MOUNT = only("name", "mountPath", name=STRING, mountPath=STRING)
CONTAINER = only(
    "name", "image", "volumeMounts", "resources",
    name=STRING, image=STRING, resources=QUANTITIES,
    volumeMounts={"type": "array", "items": MOUNT},
)  # fmt: skip
VOLUME = only(
    "name",
    name=STRING,
    persistentVolumeClaim=only("claimName", claimName=STRING, readOnly=BOOLEAN),
    configMap=only("name", name=STRING),
)
POD = only(
    "spec",
    spec=only(
        "containers",
        containers={"type": "array", "items": CONTAINER, "minItems": 1},
        volumes={"type": "array", "items": VOLUME},
    ),
)
#: The fields that KubeRay's reference of its API (ray.io/v1, 1.5) has, with their types.
RAY_JOB = only(
    "apiVersion", "kind", "metadata", "spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=only("name", name={"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"}),
    spec=only(
        "entrypoint", "rayClusterSpec",
        entrypoint=STRING, runtimeEnvYAML=STRING, jobId=STRING, suspend=BOOLEAN,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        activeDeadlineSeconds=INTEGER, backoffLimit=INTEGER,
        shutdownAfterJobFinishes=BOOLEAN, ttlSecondsAfterFinished=INTEGER,
        rayClusterSpec=only(
            "headGroupSpec",
            rayVersion=STRING,
            authOptions=only(mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling=BOOLEAN,
            headGroupSpec=only("template", rayStartParams=STRINGS, template=POD),
            workerGroupSpecs={
                "type": "array",
                "items": only(
                    "groupName", "template",
                    groupName=STRING, replicas=INTEGER, minReplicas=INTEGER, maxReplicas=INTEGER,
                    rayStartParams=STRINGS, template=POD,
                ),
            },
        ),
    ),
)  # fmt: skip


def test_the_manifest_has_the_fields_of_a_ray_job() -> None:
    manifest = load("rayjob.yaml")
    jsonschema.validate(manifest, RAY_JOB)
    spec = manifest["spec"]
    check_lcray(shlex.split(spec["entrypoint"]))
    assert spec["rayClusterSpec"]["authOptions"]["mode"] == "token"
    assert spec["rayClusterSpec"]["rayVersion"] == ray.__version__
    # KubeRay deletes a cluster after a while only where it is told to delete it at all.
    assert spec["shutdownAfterJobFinishes"] or "ttlSecondsAfterFinished" not in spec


def test_every_pod_sees_the_code_and_the_storage() -> None:
    spec = load("rayjob.yaml")["spec"]
    words = shlex.split(spec["entrypoint"])
    params = app.analyze.make_context("analyze", words[2:]).params
    cluster = spec["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert len({pod["template"]["spec"]["containers"][0]["image"] for pod in pods}) == 1
    for pod in pods:
        inside = pod["template"]["spec"]
        volumes = {volume["name"]: volume for volume in inside["volumes"]}
        mounts = inside["containers"][0]["volumeMounts"]
        at = {mount["mountPath"]: volumes[mount["name"]] for mount in mounts}
        for path, kind in {
            params["task"].rpartition(":")[0]: "configMap",
            str(params["run"]): "persistentVolumeClaim",
            str(params["out"]): "persistentVolumeClaim",
        }.items():
            mount = next(where for where in at if Path(path).is_relative_to(where))
            assert kind in at[mount], path
    config_map = at["/code"]["configMap"]["name"]
    assert f"kubectl create configmap {config_map} --from-file=code" in PAGE
