"""Which room may import which. The arrows are read from the source with `ast`, so that nothing is imported here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Room -> the rooms of this project that it may import, beside itself. A module at the top of a package is a room.
ARROWS = {
    "drafter.warping": set(),
    "drafter.metrics": set(),
    "drafter.ranks": set(),
    "drafter.interruptions": set(),
    "drafter.progress": set(),
    "drafter.artifacts": set(),
    "drafter.losses": {"drafter.warping"},
    "drafter.models": {"drafter.artifacts"},
    "drafter.decoding": {"drafter.models", "drafter.warping", "drafter.metrics"},
    "drafter.data": {
        *("drafter.decoding", "drafter.losses", "drafter.models", "drafter.artifacts", "drafter.warping"),
        *("drafter.ranks", "drafter.progress"),
    },
    "drafter.training": {
        *("drafter.data", "drafter.decoding", "drafter.losses", "drafter.models"),
        *("drafter.artifacts", "drafter.warping", "drafter.ranks", "drafter.interruptions"),
    },
    "experiments.reporting": {"drafter"},
    "experiments.running": {"drafter", "experiments.reporting"},
    "experiments.exporting": {"drafter", "experiments.reporting", "experiments.running"},
    "experiments.planning": {"drafter", "experiments.reporting", "experiments.running"},
}
HELPERS = {room for room in ARROWS if room.startswith("experiments.")}
COMMANDS = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__"}
FRAMEWORKS = {"torch", "transformers", "lightning", "datasets", "wandb", "hydra"}


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
            assert not node.level, "imports are written in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {
    module_name(path): path.read_text()
    for package in ("drafter", "experiments")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def room(name):
    """The room that an imported name lies in: `drafter.losses.tvd` in drafter.losses."""
    return ".".join(name.split(".")[:2])


def packages(names):
    return {name.split(".")[0] for name in names}


def ours(names):
    return {name for name in names if name.split(".")[0] in ("drafter", "experiments", "conf")}


def module_of(name):
    """The module that an imported name is, or lies in."""
    return name if name in SOURCES else name.rpartition(".")[0]


def test_the_reader_of_imports_sees_what_it_must():
    source = """
import a.b, c as d
from e import f
from drafter.models import load
if TYPE_CHECKING:
    from h import i
else:
    import j
def later():
    import k
"""
    assert imports(source) == {"a.b", "c", "e.f", "drafter.models.load", "j", "k"}
    assert imports(source, type_checking=True) == imports(source) | {"h.i"}
    assert room("drafter.models.loading.load") == "drafter.models"


def test_every_room_has_its_arrows():
    rooms = {room(name) for name in SOURCES if name.count(".")}
    assert rooms - {f"experiments.{name}" for name in COMMANDS} == set(ARROWS)


@pytest.mark.parametrize("module", [name for name in SOURCES if room(name) in ARROWS])
def test_a_room_imports_only_the_rooms_below_it(module):
    allowed = ARROWS[room(module)] | {room(module)}
    found = {room(name) for name in ours(imports(SOURCES[module]))}
    assert {name for name in found if not {name, name.split(".")[0]} & allowed} == set()


@pytest.mark.parametrize("command", sorted(COMMANDS - {"pipeline", "starts"}))
def test_no_command_imports_another(command):
    found = {room(name) for name in ours(imports(SOURCES[f"experiments.{command}"])) if name.startswith("experiments")}
    assert found <= HELPERS


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("drafter")])
def test_the_library_knows_neither_configs_nor_wandb_nor_the_experiments(module):
    found = packages(imports(SOURCES[module], type_checking=True))
    assert not found & {"hydra", "omegaconf", "wandb", "experiments", "conf"}


@pytest.mark.parametrize("module", [name for name in SOURCES if room(name) == "drafter.losses"])
def test_losses_need_torch_alone(module):
    assert not packages(imports(SOURCES[module])) & (FRAMEWORKS - {"torch"})


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("drafter.") and "training" not in name])
def test_lightning_is_for_training_alone(module):
    assert "lightning" not in packages(imports(SOURCES[module]))


def reached(module):
    """Every module of this project that importing a module brings along at run time."""
    found, todo = set(), [module]
    while todo:
        for name in ours(imports(SOURCES[todo.pop()])):
            one = module_of(name)
            if one in SOURCES and one not in found:
                found.add(one)
                todo.append(one)
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_no_module_imports_itself_on_a_detour(module):
    assert module not in reached(module)


@pytest.mark.parametrize("module", [name for name in SOURCES if room(name) == "experiments.reporting"])
def test_reports_are_made_without_torch_and_hydra(module):
    assert (
        not {package for one in {module, *reached(module)} for package in packages(imports(SOURCES[one]))} & FRAMEWORKS
    )


def test_no_file_is_long():
    assert {name: length for name, text in SOURCES.items() if (length := text.count("\n")) > 300} == {}
