"""What `pip install mpq` gives: a wheel that works outside the checkout, beside a user's own modules, with its library alone."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from small import ROOT

# the library may be imported where none of these is installed
EXTRAS = ("prefect", "gurobipy", "datasets", "matplotlib", "lm_eval", "s3fs", "adlfs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves its build folder beside the sources."""
    source, into = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "mpq", "flows", "tasks", "pyproject.toml", "README.md"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", into, source], check=True, capture_output=True)
    (built,) = into.glob("mpq-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel in it; other packages are this environment's."""
    home = tmp_path_factory.mktemp("env")
    venv.create(home, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": home, "platbase": home}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # a .pth of paths does not run those in the folders it names: this checkout's own finder stays out
    others = [p for p in sys.path if "site-packages" in p and Path(p) != packages]
    (packages / "others.pth").write_text("\n".join(others))
    return home / "bin" / "python"


def run(python: Path, code: str, where: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a folder, with that folder first on the path, as a user's script has it."""
    return subprocess.run([python, "-c", code], cwd=where, capture_output=True, text=True)


def test_a_users_own_tasks_and_flows_keep_their_names(python: Path, tmp_path: Path) -> None:
    """`import tasks` is the user's file, mpq.tasks and mpq.flows are ours, none of it from the checkout."""
    for name in ("tasks", "flows"):
        (tmp_path / f"{name}.py").write_text("OWN = True\n")
    code = (
        "import mpq, tasks, flows, mpq.tasks.stage, mpq.flows.run\n"
        "assert tasks.OWN and flows.OWN\n"
        "print(mpq.__file__, mpq.tasks.stage.__file__, mpq.flows.run.__file__)"
    )
    done = run(python, code, tmp_path)
    assert done.returncode == 0, done.stderr
    places = done.stdout.split()
    assert len(places) == 3
    assert all(p.startswith(str(python.parents[1])) for p in places), places


def test_the_command_runs_as_a_module(python: Path, tmp_path: Path) -> None:
    """`python -m mpq --version` says the version of the wheel."""
    done = subprocess.run(
        [python, "-m", "mpq", "--version"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "mpq 0.1.0\n"), done.stderr


def test_files_that_are_no_python_are_in_the_wheel(wheel: Path) -> None:
    """Templates, the kernels' sources, the lists of names that are loaded when asked for, and the mark of types."""
    held = set(zipfile.ZipFile(wheel).namelist())
    files = {
        str(path.relative_to(ROOT))
        for suffix in ("*.j2", "*.cpp", "*.h", "*.pyi", "py.typed", "*.py")
        for path in (ROOT / "mpq").rglob(suffix)
    }
    assert "mpq/py.typed" in files
    assert not files - held


def test_the_library_needs_no_extra() -> None:
    """Every module of the library imports where no extra is installed; its figures alone need matplotlib."""
    code = f"""
import importlib, pkgutil, sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import mpq
for name in mpq.__all__:
    getattr(mpq, name)
pictures = ("mpq.report.style", "mpq.report.figures", "mpq.report.pareto_figure", "mpq.report.beside_figure", "mpq.report.maps", "mpq.report.accuracy_figures", "mpq.report.calibration_figure", "mpq.paper")
gpu = ("mpq.kernels.fp8", "mpq.kernels.flash", "mpq.kernels.bgemm", "mpq.kernels.cuda")
for module in pkgutil.walk_packages(mpq.__path__, "mpq."):
    if not module.name.startswith((*pictures, *gpu, "mpq.tasks", "mpq.flows", "mpq.__main__")):
        importlib.import_module(module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_is_light() -> None:
    """`import mpq`, and what the command line needs for its help, load none of the packages that take a second."""
    code = (
        "import sys, mpq, mpq.cli.main; mpq.MpqError\n"
        "print(sorted({'torch', 'polars', 'transformers', 'pydantic', 'matplotlib', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_every_name_is_handed_on() -> None:
    """What `import mpq` promises is there, and has a sentence that says what it is."""
    import mpq

    assert len(mpq.__all__) >= 12
    for name in mpq.__all__:
        assert getattr(mpq, name).__doc__, name
