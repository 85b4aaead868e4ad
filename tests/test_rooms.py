"""The order of the rooms of `src/`: who may import whom."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
ORDER = (
    "common", "config", "data", "models", "teachers", "methods", "runs", "training", "setup", "analysis", "exporting",
)  # fmt: skip
"""From the ground up, as in docs/concepts.md: a room imports only itself and rooms before it."""
COMMANDS = {file.stem for file in SOURCE.glob("*.py")} - {"__init__", "command"}


def imported_rooms(file: Path) -> set[str]:
    """The rooms and commands that a file imports when it runs; imports for type checking do not count."""
    tree = ast.parse(file.read_text())
    typing_only = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and isinstance(test.test, ast.Name) and test.test.id == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    modules = [
        node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and id(node) not in typing_only
    ]
    return {module.split(".")[1] for module in modules if module.startswith("src.")}


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {folder.name for folder in SOURCE.iterdir() if (folder / "__init__.py").is_file()}
    assert rooms == set(ORDER), "add the room to ORDER in tests/test_rooms.py and to docs/concepts.md"


def test_a_room_imports_only_rooms_below_it() -> None:
    wrong = [
        f"{file.relative_to(SOURCE)} imports {other}"
        for number, room in enumerate(ORDER)
        for file in (SOURCE / room).rglob("*.py")
        for other in imported_rooms(file)
        if other not in ORDER[: number + 1]
    ]
    assert not wrong, wrong


def test_no_command_imports_another() -> None:
    wrong = [
        f"{command} imports {other}"
        for command in COMMANDS
        for other in imported_rooms(SOURCE / f"{command}.py") & COMMANDS
    ]
    assert not wrong, wrong


def test_every_module_of_src_has_its_test_file() -> None:
    tests = Path(__file__).parent
    modules = [file.relative_to(SOURCE) for file in SOURCE.rglob("*.py") if file.name != "__init__.py"]
    missing = [
        str(module)
        for module in modules
        if not list((tests / module.parent).glob(f"test_{module.stem}.py"))
        and not list((tests / module.parent).glob(f"test_{module.stem}_*.py"))
    ]
    assert not missing, f"these modules have no test file of their name: {missing}"


def test_no_test_module_imports_another() -> None:
    tests = Path(__file__).parent
    wrong = [
        f"{file.relative_to(tests)}: {line.strip()}"
        for file in tests.rglob("*.py")
        for line in file.read_text().splitlines()
        if line.strip().startswith(("from tests.", "import tests.")) and "tests.helpers" not in line
    ]
    assert not wrong, wrong


def test_no_test_file_is_longer_than_500_lines() -> None:
    long = {
        str(file): count
        for file in Path(__file__).parent.rglob("*.py")
        if (count := len(file.read_text().splitlines())) > 500
    }
    assert not long, long
