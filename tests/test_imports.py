"""Who may import whom (DESIGN.md, section 2), read from the source, and what an import of the package loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qmamba_compile

ROOT = Path(qmamba_compile.__file__).parent
PACKAGE = ROOT.name

# What each module may use of the package. A folder stands for all of its modules, which may use each other.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "quant": {"errors"},
    "recurrence": {"errors", "quant"},
    "huge_pages": set(),
    "artifact": {"errors", "quant"},
    "extents": {"quant", "recurrence"},
    "generated_code": {"errors"},
    "cpu_templates": {"errors", "quant", "recurrence", "extents", "generated_code"},
    "triton_templates": {"errors", "quant", "recurrence", "extents", "generated_code"},
    "op_library": set(),
    "scan_ops": {"errors", "quant", "recurrence", "op_library", "cpu_templates", "triton_templates"},
    "layer_ops": {"quant", "op_library", "cpu_templates", "triton_templates"},
    "state": {"errors", "quant", "recurrence", "ops"},
    "fx_utils": set(),
    "static_states": {"state"},
    "report": {"errors"},
    "passes": {"errors", "config", "quant", "recurrence", "huge_pages", "artifact", "state", "fx_utils", "report"},
}
ALLOWED["scan_gradient"] = ALLOWED["scan_ops"] | {"scan_ops", "extents"}
ALLOWED["ops"] = ALLOWED["scan_gradient"] | {"scan_gradient", "layer_ops", "huge_pages"}
ALLOWED["command_line"] = {"errors"}
ALLOWED["print_report"] = {"report"}
ALLOWED["print_text"] = {"errors", "command_line"}
ALLOWED["print_kernel"] = {"errors", "cpu_templates", "triton_templates"}
ALLOWED["startup"] = {"cpu_templates"}
ALLOWED["backend"] = ALLOWED["passes"] | {"passes", "ops", "static_states", "startup", "cpu_templates"}
ALLOWED["__init__"] = ALLOWED["backend"] | {"backend"}
ALLOWED["__main__"] = ALLOWED["__init__"] | {"__init__", "command_line", "print_report", "print_text", "print_kernel"}

FILES = sorted(ROOT.rglob("*.py"))


def unit(path):
    """The name in `ALLOWED` that answers for a file."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """(line, absolute module, names) of every import statement in a file, inside functions as well."""
    root = ROOT if ROOT in path.parents else path.parent
    package = [root.name, *path.relative_to(root).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.append((node.lineno, module, [alias.name for alias in node.names]))
    return found


def units_used(module, names):
    """The units of the package that ``from module import names`` uses."""
    parts = module.split(".")
    if parts[0] != PACKAGE:
        return set()
    if len(parts) > 1:
        return {parts[1]}
    # `from . import quant`, or names that the package itself exports.
    return {name if (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists() else "__init__" for name in names} or {
        "__init__"
    }


def test_the_package_is_there():
    units = {unit(path) for path in FILES}
    assert {"errors", "config", "quant", "artifact", "state", "ops"} <= units
    assert sum(len(imports(path)) for path in FILES) > 20


def test_the_reading_of_imports_sees_every_form(tmp_path, monkeypatch):
    path = ROOT / "passes" / "imaginary.py"
    text = "import triton.language as tl\nfrom . import base\nfrom .. import quant\nfrom ..state import DSQState\n"
    text += "def f():\n    from qmamba_compile import ops, QMambaConfig\n    import qmamba_compile.backend\n"
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    found = imports(path)
    assert [module for _, module, _ in found[:4]] == [
        "triton.language",
        f"{PACKAGE}.passes",
        PACKAGE,
        f"{PACKAGE}.state",
    ]
    used = [units_used(module, names) for _, module, names in found]
    assert used == [set(), {"passes"}, {"quant"}, {"state"}, {"ops", "__init__"}, {"backend"}]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_run_one_way(path):
    own = unit(path)
    assert own in ALLOWED, f"{path.name}: say in ALLOWED, and in DESIGN.md, what it may import"
    for line, module, names in imports(path):
        wrong = units_used(module, names) - ALLOWED[own] - {own}
        assert not wrong, f"{path.relative_to(ROOT)}:{line} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_and_outer_modules_stay_where_they_belong(path):
    for line, module, names in imports(path):
        where = f"{path.relative_to(ROOT)}:{line}"
        top = module.split(".")[0]
        assert top not in ("calibrate", "bench", "tests", "demo"), f"{where}: the package never imports {top}"
        if top == "jinja2":
            assert path == ROOT / "generated_code.py", f"{where}: only generated_code.py imports {top}"
        if top == "triton":
            # `compiled` asks Triton's compilers what they make of a rendered kernel.
            allowed = [ROOT / "triton_templates" / name for name in ("render.py", "compiled.py")]
            assert path in allowed, f"{where}: only render.py imports {top}"
        if "compile_fx" in module.split(".") or "compile_fx" in names:
            assert path == ROOT / "backend.py", f"{where}: only backend.py imports compile_fx"


@pytest.mark.parametrize("path", sorted((ROOT.parent / "calibrate").glob("*.py")), ids=lambda path: path.name)
def test_calibration_needs_no_compiler(path):
    """It runs on the operators; what the passes do with an artifact is theirs."""
    for line, module, names in imports(path):
        if module.split(".")[0] == PACKAGE:
            wrong = units_used(module, names) & {"passes", "backend", "fx_utils"}
            assert not wrong, f"{path.name}:{line} imports {', '.join(sorted(wrong))}"


def loaded_by(statement, *modules):
    """Which of ``modules`` a fresh interpreter has loaded after ``statement``."""
    program = f"{statement}\nimport sys\nprint([name for name in {modules!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return set(ast.literal_eval(result.stdout.splitlines()[-1]))


def test_importing_the_package_is_light():
    heavy = ("triton", "transformers", "jinja2", "torchao", "datasets", "mamba_ssm")
    torch_alone = loaded_by("import torch", *heavy)
    assert loaded_by("import qmamba_compile", *heavy, PACKAGE) - torch_alone == {PACKAGE}
    # The probe can fail: what is imported is seen.
    assert loaded_by("import jinja2", *heavy) == {"jinja2"}


def test_reading_an_artifact_needs_no_transformers():
    assert loaded_by("import qmamba_compile.artifact", "transformers", "safetensors") == {"safetensors"}
