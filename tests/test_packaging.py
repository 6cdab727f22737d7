"""The wheel holds everything, imports elsewhere, stays light, and shadows nobody."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("search_spaces", "predictors", "kernels")
HEAVY = ("torch", "ray", "mlflow", "optuna", "transformers", "matplotlib", "plotly")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def run(code: str, *, cwd: Path, path: str = "") -> str:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": path, "HOME": str(cwd), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_folders_at_the_top_are_linked_and_no_packages() -> None:
    for name in LINKED:
        link = ROOT / "autocomp" / name
        assert link.is_symlink() and link.readlink() == Path("..") / name
        assert not (ROOT / name / "__init__.py").exists(), f"{name}/__init__.py would shadow other packages"


def test_the_wheel_has_every_module_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    wanted = {
        str(Path("autocomp") / p.relative_to(ROOT / "autocomp"))
        for p in (ROOT / "autocomp").rglob("*.py")
        if "__pycache__" not in p.parts
    }
    wanted |= {str(Path("autocomp") / p.relative_to(ROOT)) for f in LINKED for p in (ROOT / f).rglob("*.py")}
    assert wanted <= set(names), sorted(wanted - set(names))[:5]
    assert "autocomp/py.typed" in names


def test_every_module_imports_from_the_installed_wheel_elsewhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = f"""
import importlib, pathlib, sys
root = pathlib.Path({str(site)!r})
# An editable install of the repository must not stand in for the wheel.
sys.meta_path = [f for f in sys.meta_path if "editable" not in type(f).__module__ + repr(f).lower()]
sys.path.insert(0, str(root))
import autocomp
assert pathlib.Path(autocomp.__file__).is_relative_to(root), autocomp.__file__
count = 0
for file in sorted((root / "autocomp").rglob("*.py")):
    parts = file.relative_to(root).with_suffix("").parts
    if parts[-1] not in ("__init__", "__main__"):
        importlib.import_module(".".join(parts))
        count += 1
print(count)
"""
    assert int(run(code, cwd=tmp_path)) > 80


def test_import_is_light(tmp_path: Path) -> None:
    code = f"""
import sys, autocomp, autocomp.job, autocomp.space, autocomp.study, autocomp.api
print([m for m in {HEAVY} if m in sys.modules])
"""
    assert run(code, cwd=tmp_path).strip() == "[]"


def test_public_names_resolve(tmp_path: Path) -> None:
    run("import autocomp; [getattr(autocomp, n) for n in autocomp.__all__]", cwd=tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        import autocomp

        _ = autocomp.serach


def test_from_the_repository_root_nobody_is_shadowed() -> None:
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    assert str(ROOT) not in run(code, cwd=ROOT, path=str(ROOT))


def test_pins_cover_the_declared_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [r for row in project["optional-dependencies"].values() for r in row if "autocomp" not in r]
    declared = {_name(r) for r in [*project["dependencies"], *extras]}
    pinned = {_name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert declared <= pinned, f"constraints.txt lacks {sorted(declared - pinned)}"


def _name(requirement: str) -> str:
    for mark in "[<>=!;~ ":
        requirement = requirement.partition(mark)[0]
    return requirement.strip().lower().replace("_", "-")
