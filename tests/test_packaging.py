"""What is installed: the wheel holds configuration and recipes and runs anywhere, offline; the pins are portable."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
YAML_FOLDERS = {  # in the checkout -> where it is installed
    "conf": "vlm_train/conf",
    "recipes": "vlm_train/recipes",
    "data_pipelines/conf": "data_pipelines/conf",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout, so that no build folder is left in it."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("vlm_train", "data_pipelines", "conf", "recipes"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    _run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", output, source])
    return next(output.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed alone into a folder."""
    target = tmp_path_factory.mktemp("installed")
    _run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel])
    return target


@pytest.mark.slow
def test_wheel_holds_every_module_and_yaml_file(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix() for package in ("vlm_train", "data_pipelines") for path in _sources(package)
    }
    for folder, place in YAML_FOLDERS.items():
        expected |= {f"{place}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.yaml")}
    assert names == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["-m", "vlm_train", "--help"], "recipe"),
        (["-m", "vlm_train", "--cfg", "job", "recipe=llava15_stage1"], "warmup_ratio: 0.03"),
        (["-m", "vlm_train", "--cfg", "job", "recipe=llava15_stage2", "optim.lr=0.125"], "lr: 0.125"),
        (["-m", "vlm_train", "recipe=llava15_stage1", "dry_run=true"], ""),
        (["-m", "data_pipelines.build", "--help"], "easy_vqa"),
    ],
    ids=["help", "recipe", "override", "dry_run", "data"],
)
def test_installed_wheel_runs_elsewhere_offline(
    installed: Path, tmp_path: Path, arguments: list[str], shown: str
) -> None:
    result = _run([*_offline(), sys.executable, *arguments], cwd=tmp_path, env=_environment(installed, tmp_path))
    assert shown in result.stdout


@pytest.mark.slow
def test_installed_wheel_trains_elsewhere_offline(installed: Path, tmp_path: Path) -> None:
    python, settings = [*_offline(), sys.executable], {"cwd": tmp_path, "env": _environment(installed, tmp_path)}
    for split in ("train", "val"):
        _run(
            [*python, "-m", "data_pipelines.build", "source=tiny", f"split={split}", f"output=data/tiny/{split}"],
            **settings,
        )
    result = _run([*python, "-m", "vlm_train", "recipe=llava15_stage1", "size=tiny", "trainer.max_steps=2"], **settings)
    assert "step      2/2" in result.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "report.html").is_file() and (run / "checkpoints" / "step-00000002" / "weights.safetensors").is_file()


@pytest.mark.slow
def test_installed_modules_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = "import vlm_train, vlm_train.config.compose as c; print(vlm_train.__file__)"
    result = _run([sys.executable, "-c", code], cwd=tmp_path, env=_environment(installed, tmp_path))
    assert Path(result.stdout.strip()).is_relative_to(installed)


def test_every_source_folder_is_a_package() -> None:
    folders = {path.parent for package in ("vlm_train", "data_pipelines") for path in (ROOT / package).rglob("*.py")}
    assert sorted(str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()) == []


def test_constraints_are_exact_and_portable() -> None:
    lines = [line for line in _constraints().splitlines() if line and not line.startswith("#")]
    bad = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)]
    assert bad == []  # no paths, editable lines, addresses, local versions such as +cpu
    assert [line for line in lines if re.match(r"nvidia-|triton|vlm", line)] == []


def test_every_dependency_is_pinned_within_its_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = dict(line.split("==") for line in _constraints().splitlines() if "==" in line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = PROJECT["optional-dependencies"]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras["dev"], *extras["demo"]]):
        name = canonicalize_name(requirement.name)
        if name != PROJECT["name"]:
            assert name in pins, f"{name} is not pinned in constraints.txt"
            assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is outside {requirement}"


def test_every_imported_package_is_a_dependency_by_name() -> None:
    """One that only another dependency brings goes when that one does."""
    from importlib.metadata import packages_distributions

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    listed = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    named = {canonicalize_name(Requirement(line).name) for line in listed}
    named |= {"pydantic-core", "griffelib"}  # parts of pydantic and griffe
    owners, missing = packages_distributions(), dict[str, str]()
    for path in (path for package in ("vlm_train", "data_pipelines") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.partition(".")[0] for name in names} - {"vlm_train", "data_pipelines"}:
                given = {canonicalize_name(owner) for owner in owners.get(top, [top])}
                if top not in sys.stdlib_module_names and not given & named:
                    missing[top] = str(path.relative_to(ROOT))
    assert missing == {}


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    shown = _run(["make", "--no-print-directory", "help"], cwd=ROOT).stdout
    assert [target for target in phony[1].split() if f"{target}" not in re.sub(r"\x1b\[\d+m", "", shown).split()] == []


def test_version_says_what_pyproject_says() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert version("vlm-train") == PROJECT["version"]
    except PackageNotFoundError:
        pytest.skip("run from a checkout without an installation")


def _sources(package: str) -> list[Path]:
    return [
        path
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".j2") or path.name in ("moved_targets.yaml", "renamed_keys.yaml")
    ]


def _constraints() -> str:
    return (ROOT / "constraints.txt").read_text(encoding="utf-8")


def _offline() -> list[str]:
    """A prefix that runs a command without a network, where this machine permits that."""
    prefix = ["unshare", "-rn"]
    permitted = shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if permitted else []


def _environment(installed: Path, home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    offline = {"HF_HUB_OFFLINE": "1", "HOME": str(home), "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "1"}
    return kept | offline | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)  # type: ignore
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result
