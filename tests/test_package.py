"""The distribution: what the wheel holds, that it works away from the checkout, what an import costs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import swincupy

FRAMEWORKS = {"torch", "torchvision", "timm", "transformers"}
LAZY = {"PIL", "cupy", "huggingface_hub", "safetensors", "scipy", "tqdm"}  # imported by what needs them


@pytest.fixture(scope="module")
def distributions(root, tmp_path_factory) -> tuple[Path, Path]:
    """The source distribution of the checkout and the wheel built from that, not from the checkout."""
    out = tmp_path_factory.mktemp("dist")
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(root)], cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    """A virtual environment with the wheel, the dependencies that it names, and nothing else."""
    _, wheel = distributions
    home = tmp_path_factory.mktemp("clean") / "venv"
    _run([sys.executable, "-m", "venv", "--without-pip", str(home)], cwd=home.parent)
    python = _executable(home, "python")
    site = Path(_run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=home).strip())
    # The dependencies are borrowed from the environment of the tests: no network, and what the wheel does not
    # name is not there.
    metadata = importlib.metadata.PathDistribution(zipfile.Path(wheel) / _dist_info(wheel))
    for requirement in metadata.requires or ():
        if "extra ==" not in requirement:
            dependency = importlib.metadata.distribution(re.split(r"[^\w.-]", requirement)[0])
            for name in {file.parts[0] for file in dependency.files or ()} - {"..", "__pycache__"}:
                (site / name).symlink_to(dependency.locate_file(name))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    _run([*pip, str(wheel)], cwd=home)
    return home


def test_the_wheel_holds_the_package_and_its_resources_and_no_more(root, distributions):
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = _dist_info(wheel)
    assert {name.split("/")[0] for name in names} == {"swincupy", info}
    assert {f"{info}/licenses/LICENSE", "swincupy/py.typed"} <= names
    for file in (root / "swincupy").rglob("*.py"):
        assert file.relative_to(root).as_posix() in names
    for file in (root / "cuda").rglob("*"):
        assert file.is_dir() or f"swincupy/{file.relative_to(root).as_posix()}" in names
    weights = {name.split("/")[-1] for name in names if name.startswith("swincupy/weights/")}
    assert weights == {"swin_digits.md", "manifest.json", "swin_digits.safetensors"}


def test_the_source_distribution_is_complete(root, distributions):
    sdist, wheel = distributions
    stem = f"swincupy-{swincupy.__version__}"
    assert sdist.name == f"{stem}.tar.gz"
    assert wheel.name == f"{stem}-py3-none-any.whl"
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(f"{stem}/") for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", ".ci/run", "examples/quickstart.ipynb"} <= names
    for folder in ("cuda", "tests", "weights", "benchmarks", "examples"):
        for file in (root / folder).rglob("*.*"):
            if not {".hypothesis", ".ipynb_checkpoints", "__pycache__"} & set(file.parts):
                assert file.is_dir() or file.relative_to(root).as_posix() in names


def test_the_installed_package_finds_its_resources(installed, tmp_path):
    code = (
        "import json, swincupy; from swincupy.resources import resource_dir\n"
        "print(json.dumps([swincupy.__file__, str(resource_dir('cuda')), str(resource_dir('weights'))]))"
    )
    package, cuda, weights = map(Path, json.loads(_run([_python(installed), "-I", "-c", code], cwd=tmp_path)))
    assert installed in package.parents
    assert (cuda, weights) == (package.parent / "cuda", package.parent / "weights")
    assert (cuda / "README.md").is_file()


def test_the_installed_command_classifies_and_leaves_its_folder_alone(installed, digits, tmp_path):
    package = next(installed.rglob("swincupy/__init__.py")).parent
    before = _snapshot(package)
    for path in [package, *package.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        command = [str(_executable(installed, "swincupy")), "classify", "--json", str(digits[0])]
        answer = _run(command, cwd=tmp_path)
    finally:
        for path in [package, *package.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)
    (image,) = json.loads(answer)
    assert image["predictions"][0]["label"] == "zero"  # the first sample is a 0
    assert _snapshot(package) == before  # the mode bits alone would not stop a superuser
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("statement", "most"),
    [("import swincupy", 10), ("from swincupy import load", 60)],
)
def test_importing_brings_in_no_framework_and_nothing_that_can_wait(tmp_path, statement, most):
    code = (
        "import sys, numpy; before = set(sys.modules)\n"
        f"{statement}; print(*sorted(set(sys.modules) - before), sep='\\n')"
    )
    new = _run([sys.executable, "-c", code], cwd=tmp_path, checkout=True).split()
    top = {name.split(".")[0] for name in new}
    assert not top & (FRAMEWORKS | LAZY)
    assert top - sys.stdlib_module_names <= {"swincupy", "array_api_compat", "numpy"}
    assert len(new) < most, new


def test_ci_runs_the_commands_of_the_readme_word_for_word(root):
    commands = re.findall(r"^python3 -m venv .*$", (root / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    lines = [line.strip() for line in (root / ".ci" / "run").read_text(encoding="utf-8").splitlines()]
    assert len(commands) == 2
    for command in commands:
        assert command in lines


def _run(command: list[str], *, cwd: Path, checkout: bool = False) -> str:
    """Standard output of ``command``; where it fails, the test says what it printed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if checkout:
        env["PYTHONPATH"] = str(Path(swincupy.__file__).parents[1])
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _executable(home: Path, name: str) -> Path:
    return home / ("Scripts" if os.name == "nt" else "bin") / name


def _python(home: Path) -> str:
    return str(_executable(home, "python"))


def _dist_info(wheel: Path) -> str:
    return f"swincupy-{wheel.name.split('-')[1]}.dist-info"


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file under ``folder``."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }
