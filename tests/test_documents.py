"""README.md, RESULTS.md and the docstrings: every command parses, every link and picture is there."""
import ast
import importlib
import re
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).parent.parent
SCRIPTS = ["random_transformer", "hop_induction", "looped_icl", "ntp_convergence", "memory_birth"]
DOCUMENTS = ["README.md", "RESULTS.md", *[f"{name}.py" for name in SCRIPTS]]


def commands(document):
    """The commands of a document, as pairs of script and flags."""
    text = (ROOT / document).read_text()
    if document.endswith(".py"):
        text = ast.get_docstring(ast.parse(text))
    text = re.sub(r"\\\n\s*", " ", text)
    # a command between backticks may go on in the next line
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", lambda code: re.sub(r"\n\s*", " ", code[0]), text)
    found = []
    for name, flags in re.findall(r"(?:python|torchrun[^\n`]*?) (\w+)\.py([^\n`#|&;)]*)", text):
        flags = re.sub(r"(?<=\S) {2,}\S.*|,.*", "", flags.strip()) if not flags.startswith("   ") else ""     # what it is for, in words
        if name in SCRIPTS:
            found.append((name, flags.split()))
    return found


ALL = sorted({(document, name, " ".join(flags)) for document in DOCUMENTS for name, flags in commands(document)})


def test_there_are_commands():
    assert len(ALL) > 40 and {name for _, name, _ in ALL} == set(SCRIPTS)


@pytest.fixture
def runs_of(tmp_path, monkeypatch):
    """A function that gives the runs of a command; none if it trains nothing."""
    monkeypatch.chdir(tmp_path)

    def runs(name, flags):
        script = importlib.import_module(name)
        Path("FILE").write_text("1 2 0\n0 1 2 1\n" if name == "ntp_convergence" else "one two three. " * 2_000)
        args = script.parse_args(flags)
        if args.preset in ("construct", "mpc", "three-steps"):
            return []
        return common.sweep(args, script.SWEEP, lambda args: None, script.resolve)
    return runs


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_readmes_run_is_all_that_a_training_loop_needs(name, capsys):
    """Two steps, and as many evaluations."""
    block = re.search(r"```python\n(class Run.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    copied = {}
    exec(block, copied)
    script = importlib.import_module(name)
    flags = ["--steps", "2", "--device", "cpu"] + (["--steps-ov", "2"] if name == "ntp_convergence" else ["--eval-every", "1"])
    args = common.sweep(script.parse_args(flags), script.SWEEP, script.build, script.resolve)[0].args
    run = copied["Run"]()
    script.train(args, run)
    assert run.metrics[-1]["step"] == (4 if name == "ntp_convergence" else 2) and len(run.metrics) >= 2


@pytest.mark.parametrize("document, name, flags", ALL)
def test_a_documented_command_parses(document, name, flags, runs_of):
    if "--plot" in flags:
        pytest.importorskip("matplotlib")
    try:
        runs_of(name, flags.split())
    except SystemExit as stop:                               # --help
        assert stop.code == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_that_train_different_things_have_different_folders(script, runs_of):
    trained = {}
    for _, name, flags in ALL:
        flags = [flag for flag in flags.split() if flag != "--plot"]             # trains the same, and wants matplotlib
        if name == script and "--help" not in flags:
            for run in runs_of(name, flags):
                assert trained.setdefault(run.folder, run.settings) == run.settings
    assert len(trained) > 50


@pytest.mark.parametrize("document", ["README.md", "RESULTS.md"])
def test_links_and_pictures_are_there(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\":]+)\"", text):
        path = ROOT / (target[0] or target[1])
        assert path.exists(), path
        assert path.suffix != ".png" or path.stat().st_size <= 200_000
    prose = [line for line in text.splitlines() if not line.startswith(("|", "<img"))]
    assert max(map(len, prose)) <= (120 if document == "README.md" else 200)
