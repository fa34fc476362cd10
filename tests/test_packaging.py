"""What the package promises before a kernel runs: a light build, a light import, consistent metadata."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gankern

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest depends on it there

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def makefile():
    return (ROOT / "Makefile").read_text()


def project_name(requirement):
    return re.match(r"[\w.-]+", requirement).group().lower()


def test_build_needs_neither_torch_nor_nvcc(pyproject):
    setup = ast.parse((ROOT / "setup.py").read_text())
    imported = set()
    for node in ast.walk(setup):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    required = {project_name(r) for r in pyproject["build-system"]["requires"]}
    allowed = required | set(sys.stdlib_module_names)
    assert imported <= allowed
    assert required == {"setuptools", "pybind11", "cmake", "ninja"}

    docstrings = {
        ast.get_docstring(n, clean=False)
        for n in ast.walk(setup)
        if isinstance(n, ast.Module | ast.FunctionDef | ast.ClassDef)
    }
    strings = [n.value for n in ast.walk(setup) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    assert not [s for s in strings if s not in docstrings and re.search("nvcc|cudart|cuda_home", s, re.IGNORECASE)]


def test_cmake_asks_for_neither_torch_nor_cuda():
    text = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text())
    assert not re.search(
        r"find_package\(\s*(Torch|CUDA)|enable_language\(\s*CUDA|LANGUAGES[^)]*CUDA", text, re.IGNORECASE
    )


def test_makefile_names_extras_and_build_requirements_that_exist(pyproject, makefile):
    extras = {name for group in re.findall(r"'\.\[([\w,]+)\]'", makefile) for name in group.split(",")}
    assert extras
    assert extras <= pyproject["project"]["optional-dependencies"].keys()
    installed_first = re.search(r"constraints\.txt ([a-z0-9 ]+)$", makefile, re.MULTILINE).group(1).split()
    assert set(installed_first) == {project_name(r) for r in pyproject["build-system"]["requires"]}


def test_every_development_requirement_is_pinned(pyproject):
    pins = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    pinned = set(re.findall(r"^([\w.-]+)==", pins, re.MULTILINE))
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *pyproject["build-system"]["requires"]]
    wanted += [r for extra in ("data", "train", "bench", "docs", "test", "dev") for r in extras[extra]]
    assert {project_name(r) for r in wanted} - {"gankern"} <= pinned


def test_version_is_the_same_everywhere():
    assert importlib.metadata.version("gankern") == gankern.__version__


def test_type_marker_is_installed_beside_the_package():
    assert (Path(gankern.__file__).parent / "py.typed").is_file()


def test_import_works_without_a_gpu_and_brings_no_optional_package(tmp_path):
    # torch._dynamo alone takes longer than torch, and brings triton and sympy where they are installed.
    code = """
import sys, torch
before = set(sys.modules)
import gankern
for name in set(gankern.__all__) - {"profile"}:
    getattr(gankern, name)
added = {".".join(name.split(".")[:2]) for name in sys.modules.keys() - before}
expected = {"gankern", "torch", *sys.stdlib_module_names}
print(sorted(n for n in added if n.split(".")[0] not in expected or n in ("torch._dynamo", "torch._inductor")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_names_come_from_where_type_checkers_look_for_them():
    source = ast.parse(Path(gankern.__file__).read_text())
    (block,) = (node for node in source.body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    modules = {name for name, module in imported.items() if module == "gankern"}
    assert modules == gankern._MODULES
    assert {name: module for name, module in imported.items() if name not in modules} == gankern._MODULE_OF
    assert set(gankern.__all__) <= imported.keys() and set(gankern.__all__) <= set(dir(gankern))
    for name in imported:
        assert getattr(gankern, name).__name__ in (name, f"gankern.{name}")
    with pytest.raises(AttributeError, match="module 'gankern' has no attribute 'fues'"):
        _ = gankern.fues


@pytest.mark.parametrize(
    "code",
    [
        # The first name may be used by Dynamo while it traces.
        "torch.compile(lambda x: gankern.ops.l1_distance(x), fullgraph=True, backend='eager')(torch.rand(2, 3, 4))",
        "gankern.workspace; torch.ops.gankern.clip_weights_; gankern.explain('gradient_penalty', torch.rand(2))",
        "from gankern.profile import formulas",
        "gankern.compiler.planning(False)",
        "from gankern.backends import adapters; import gankern.ops; assert len(adapters('cuda')) >= 6",
    ],
)
def test_the_first_use_loads_what_it_needs(code):
    done = subprocess.run([sys.executable, "-c", f"import gankern, torch; {code}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_install_lines_work_in_a_clone(pyproject):
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("gankern/**/*.py")]
    lines = [line for file in files for line in file.read_text().splitlines() if re.search(r"pip install|\.\[", line)]
    assert not [line for line in lines if re.search(r"install '?gankern\b", line)]
    named = {name for line in lines for group in re.findall(r"'\.\[([a-z0-9,]+)\]'", line) for name in group.split(",")}
    hints = {name for f in files for name in re.findall(r"install_hint\([\"'](\w+)", f.read_text())}
    assert named | hints == {*hints, "bench", "completion", "cuda12", "cuda13", "data", "train", "triton"}
    assert named | hints <= pyproject["project"]["optional-dependencies"].keys()


@pytest.mark.parametrize("extra", ["bench", "train"])
def test_an_extra_brings_what_its_commands_import(pyproject, extra):
    extras = pyproject["project"]["optional-dependencies"]

    def brought(name):
        nested = [r for r in extras[name] if r.startswith("gankern[")]
        deeper = {p for r in nested for part in r[8:-1].split(",") for p in brought(part)}
        return deeper | {project_name(r) for r in extras[name] if r not in nested}

    commands = {"bench": ["bench.cli", "bench.page", "profile.cli", "profile.page"], "train": ["data", "train"]}[extra]
    code = "import sys; [__import__(f'gankern.{name}') for name in sys.argv[1:]]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True, check=True)
    project_of = {"PIL": "pillow", "jinja2": "jinja2", "mlxtend": "mlxtend", "rich": "rich", "tqdm": "tqdm"}
    imported = {project for module, project in project_of.items() if module in done.stdout.split()}
    assert imported and imported <= brought(extra)


def test_metadata_says_what_it_runs_on_and_where_it_lives(pyproject):
    project = pyproject["project"]
    least = int(project["requires-python"].removeprefix(">=3."))
    stated = [c.rpartition(".")[2] for c in project["classifiers"] if re.search(r":: Python :: 3\.\d+$", c)]
    assert [int(minor) for minor in stated] == list(range(least, 14))
    assert {"Operating System :: POSIX :: Linux", "Typing :: Typed"} <= set(project["classifiers"])
    assert {"Homepage", "Documentation", "Source", "Issues", "Changelog"} == project["urls"].keys()
    assert all(url.startswith("https://") for url in project["urls"].values())
