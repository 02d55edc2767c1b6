"""Lower layers never import higher ones; read from the source with `ast`, so that nothing is imported here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {path.stem: path for path in sorted((ROOT / "drafter").glob("*.py")) if path.stem != "__init__"}
LOWEST = (
    "storage",
    "warping",
    "distributions",
    "losses",
    "block_losses",
    "chunked",
    "metrics",
    "artifacts",
    "rows",
    "locks",
    "provenance",
)
LOWER = ("offline", "models", "loading", "fingerprints", "prompts", "decoders", "accepting", "speculative", "costs")
LOWER += (
    "ranks",
    "files",
    "templates",
    "sources",
    "selection",
    "control_tokens",
    "batches",
    "trimming",
    "gate",
    "sharding",
    "roofline",
)
MIDDLE = ("corpus", "instructions", "engines", "responses", "target_cache")
HIGHEST = ("datamodules", "weighting", "modules", "resuming")


def imports(source, type_checking=False):
    """Dotted names imported anywhere in a module, `from a import b` as a.b; TYPE_CHECKING blocks only on demand."""
    tree = ast.parse(source)
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and not type_checking:
            skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = "drafter" if node.level else ""
            names |= {".".join(filter(None, (package, node.module, alias.name))) for alias in node.names}
    return names


def packages(names):
    return {name.split(".")[0] for name in names}


def siblings(names):
    return {name.split(".")[1] for name in names if name.startswith("drafter.")}


def runtime_imports(module):
    return imports(MODULES[module].read_text())


def test_the_reader_of_imports_sees_what_it_must():
    source = """
import a.b, c as d
from e import f
from . import sibling
from .cousin import g
from drafter.models import load
if TYPE_CHECKING:
    from h import i
else:
    import j
def later():
    import k
"""
    assert imports(source) == {
        "a.b",
        "c",
        "e.f",
        "drafter.sibling",
        "drafter.cousin.g",
        "drafter.models.load",
        "j",
        "k",
    }
    assert imports(source, type_checking=True) == imports(source) | {"h.i"}
    assert siblings(imports(source)) == {"sibling", "cousin", "models"}


def test_every_layer_names_modules_that_exist():
    assert set(LOWEST + LOWER + MIDDLE + HIGHEST) <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_the_library_knows_neither_configs_nor_wandb_nor_the_experiments(module):
    found = packages(imports(MODULES[module].read_text(), type_checking=True))
    assert not found & {"hydra", "omegaconf", "wandb", "experiments", "conf"}


@pytest.mark.parametrize("module", LOWEST)
def test_the_lowest_modules_need_torch_and_one_another_alone(module):
    assert siblings(runtime_imports(module)) <= set(LOWEST)
    assert not packages(runtime_imports(module)) & {"transformers", "lightning", "datasets", "tokenizers"}


@pytest.mark.parametrize("module", ["metrics", "artifacts"])
def test_what_the_tables_read_needs_no_torch(module):
    assert "torch" not in packages(runtime_imports(module))


@pytest.mark.parametrize("module", LOWER)
def test_models_and_their_neighbours_import_no_data_and_no_training(module):
    assert not siblings(runtime_imports(module)) & {*MIDDLE, *HIGHEST}
    assert "lightning" not in packages(runtime_imports(module))


@pytest.mark.parametrize("module", MIDDLE)
def test_the_data_modules_import_no_training(module):
    assert not siblings(runtime_imports(module)) & set(HIGHEST)
    assert "lightning" not in packages(runtime_imports(module))


def test_no_two_modules_import_each_other():
    graph = {module: siblings(runtime_imports(module)) for module in MODULES}
    reached = {module: set(direct) for module, direct in graph.items()}
    for _ in graph:
        for found in reached.values():
            found |= {further for near in tuple(found) for further in graph.get(near, ())}
    assert [module for module in graph if module in reached[module]] == []


@pytest.mark.parametrize("name", ["tables", "figures", "report"])
def test_the_tables_and_what_they_draw_with_name_no_training_library(name):
    found = imports((ROOT / "experiments" / f"{name}.py").read_text())
    assert not packages(found) & {"torch", "transformers", "lightning", "datasets", "wandb"}
