"""The shape of the code, read from the code: who imports whom, and what stands where."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "rpn_train"

# A module imports only from what stands before it.
ORDER = [
    *["errors", "options", "stop", "whole_file"],
    *["boxes", "anchors", "windows", "overlaps", "targets", "dense_targets"],
    *["objectness_losses", "losses", "dense_losses", "nms", "proposals", "recall"],
    *["weights", "norms", "timm_body", "sparse", "backbones", "heads", "model", "detectors"],
    *["data.box_faults", "data.faults", "data.index", "data.headers"],
    *["data.coco", "data.voc", "data.painting", "data.shapes", "data.files", "data.index_cache"],
    *["data.transforms", "data.sampler", "data.image_cache", "data.batch", "data.loading"],
    *["method_config", "config", "distributed", "schedule", "checkpoint"],
    *["run_log", "data_report", "figures"],
    *["curves", "misses", "verify", "recall_report", "download"],
    *["proposal_files", "array_pickle", "coco_results", "read_proposals"],
    *["splits", "build", "pretrained", "evaluate", "run_state"],
    *["method_targets", "objective", "step"],
    *["inspect.walk", "inspect.panels", "inspect.learning_figures", "report"],
    *["inspect.receptive_field", "inspect.coverage", "inspect.fit_anchors", "inspect.charts"],
    *["inspect.split_summary", "inspect.views", "inspect.inspection", "inspect.findings"],
    *["inspect.page", "inspect.level_figures", "inspect.figures"],
    *["inspect.network_figures", "inspect.proposal_figures", "inspect.diagram", "inspect.story"],
    *["train", "proposer", "scoring", "propose", "export"],
    *[
        "choice_file",
        "compose",
        "run_folder",
        "shell",
        "cli",
        "cli_trained",
        "cli_inspect",
        "__main__",
    ],
]
CORE = {"boxes", "anchors", "windows", "overlaps", "targets", "dense_targets"}
CORE |= {"objectness_losses", "losses", "dense_losses", "nms", "proposals"}

# What has one home, so that it can be replaced there and nowhere else needs to know it.
HOMES = {
    "hydra": {"compose"},
    "omegaconf": {"choice_file", "compose"},
    "yaml": {"choice_file", "cli", "cli_trained", "compose", "run_log"},
    "torch.distributed": {"distributed"},
    "torch.nn.parallel": {"distributed"},
    "tensorboard": {"run_log"},
    "torch.utils.tensorboard": {"run_log"},
    "msgspec": {"data.coco", "coco_results", "proposal_files"},
    "xml": {"data.voc"},
    "defusedxml": {"data.voc"},
    "timm": {"timm_body"},
    "pycocotools": {"verify"},
    "pickle": {"array_pickle", "proposal_files"},
    "random": set(),
}


def modules() -> dict[str, Path]:
    """All modules but the empty packages: "data.batch" -> its file."""
    files = {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
        for path in sorted(SOURCE.rglob("*.py"))
    }
    return {name: path for name, path in files.items() if path.name != "__init__.py"}


MODULES = modules()
every_module = pytest.mark.parametrize("name", MODULES)


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text())


def dotted(node: ast.AST) -> str:
    """'torch.load' of that expression; empty where it is no chain of names."""
    if isinstance(node, ast.Attribute):
        return f"{before}.{node.attr}" if (before := dotted(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


def imports(name: str) -> Iterator[str]:
    """Full names of what a module imports, wherever it does: 'torch.nn', 'rpn_train.boxes.clip'."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Name of the function, '.name' for a method of some expression, and the call."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call):
            yield dotted(node.func) or f".{getattr(node.func, 'attr', '')}", node


def is_in(full: str, package: str) -> bool:
    return f"{full}.".startswith(f"{package}.")


def test_every_module_has_its_place() -> None:
    assert sorted(ORDER) == sorted(MODULES)


@every_module
def test_imports_point_down(name: str) -> None:
    before = ORDER[: ORDER.index(name)]
    for full in imports(name):
        if is_in(full, "rpn_train"):
            inner = full.removeprefix("rpn_train.")
            assert any(is_in(inner, module) for module in before), f"{name} imports {full}"


@every_module
def test_what_has_one_home_stays_there(name: str) -> None:
    used = {*imports(name), *(dotted(node) for node in ast.walk(tree(name)))}
    for package, homes in HOMES.items():
        if name not in homes:
            assert not any(is_in(full, package) for full in used), f"{name} uses {package}"


@pytest.mark.parametrize("name", sorted(CORE))
def test_the_core_is_torch_alone(name: str) -> None:
    allowed = {"torch", "torchvision.ops", *(f"rpn_train.{module}" for module in CORE)}
    allowed |= {"math", "functools", "typing", "collections", "dataclasses", "concurrent.futures"}
    for full in imports(name):
        assert any(is_in(full, package) for package in allowed), f"{name} imports {full}"


@every_module
def test_nothing_acts_when_imported(name: str) -> None:
    """At the top level there are only definitions, and of names."""
    quiet = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    docstring, *rest = tree(name).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value, ast.Constant)
    branches = [node.body if isinstance(node, ast.If) else [node] for node in rest]
    for node in (node for branch in branches for node in branch):
        if name == "__main__" and isinstance(node, ast.Expr):
            continue
        assert isinstance(node, (*quiet, ast.AugAssign)), f"line {node.lineno} acts"
        for target in getattr(node, "targets", []):
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            assert all(isinstance(n, ast.Name) for n in names), f"line {node.lineno} acts"


@every_module
def test_only_commands_speak_and_exit(name: str) -> None:
    for function, node in calls(name):
        if function in {"print", "sys.stdout.write", "sys.stderr.write"}:
            assert name in {"cli", "cli_trained", "cli_inspect", "shell", "scoring", "propose"}, (
                f"line {node.lineno} prints"
            )
        if function in {"sys.exit", "exit", "quit", "os._exit"}:
            assert name in {"cli", "cli_trained", "cli_inspect"}, f"line {node.lineno} exits"


@every_module
def test_no_file_runs_code(name: str) -> None:
    for function, node in calls(name):
        if function in {"torch.load", "torch.hub.load_state_dict_from_url"}:
            safe = {k.arg: k.value for k in node.keywords}.get("weights_only")
            assert isinstance(safe, ast.Constant), f"line {node.lineno}"
            assert safe.value is True, f"line {node.lineno}"
        assert function not in {"yaml.load", "eval", "exec"}, f"line {node.lineno}"


@every_module
def test_no_default_stands_outside_of_the_configuration(name: str) -> None:
    for function, node in calls(name):
        if function == "os.environ.get":
            continue  # what torch's launcher says, or not
        if function.endswith(".get"):
            assert len(node.args) == 1, f"line {node.lineno}: a second home for a default"
        if function == "getattr" and "cfg" in dotted(node.args[0]):
            assert len(node.args) == 2, f"line {node.lineno}: a second home for a default"


@every_module
def test_nothing_draws_from_a_global_random_state(name: str) -> None:
    for function, node in calls(name):
        if function.startswith("np.random."):
            assert function == "np.random.default_rng", f"line {node.lineno}"
        if function in {"torch.manual_seed", "torch.rand", "torch.randn", "torch.randint"}:
            assert name == "build", f"line {node.lineno}"  # initial weights, in fork_rng


@every_module
def test_functions_and_modules_are_short(name: str) -> None:
    """Statements of a function: signatures and docstrings may take the room that they need."""
    lines = MODULES[name].read_text().count("\n")
    assert lines <= 300, f"{lines} lines"
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            code = node.body[1:] if ast.get_docstring(node) else node.body
            length = node.end_lineno - code[0].lineno + 1
            most = 60 if (name, node.name) == ("train", "train") else 40
            assert length <= most, f"{node.name}: {length} lines"
