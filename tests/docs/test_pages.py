"""Links, headings, keys, files and commands of the documentation, without running or building anything."""

import ast
import importlib
import re

import pytest

from dlm_jax.cli.config import build_config, load_recipe, recipe_names
from dlm_jax.cli.main import COMMANDS, split_overrides
from dlm_jax.training.config import TrainConfig, flat_dict
from launch.docs_pages import command_parser
from tests.docs.pages import DOCS, ROOT, anchors, blocks, commands, links, notebook_cells, pages, without_code

PAGES = pages()
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
KEYS = flat_dict(TrainConfig())
each_page = pytest.mark.parametrize("path", PAGES, ids=NAMES)


@each_page
def test_links_lead_somewhere(path):
    for link in links(PAGES[path]):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target in PAGES or (target.is_file() and not anchor), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(PAGES[target]), f"{link}: {target.name} has no such heading"


@each_page
def test_headings_of_a_page_are_distinct(path):
    found = anchors(PAGES[path])
    assert len(found) == len(set(found))


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"(?m)^ +- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in PAGES if DOCS in path.parents)


@each_page
def test_keys_exist(path):
    """A key in prose or in a table is one of a recipe."""
    groups = {key.rpartition(".")[0] for key in KEYS} - {""}
    text = PAGES[path]
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        found = re.fullmatch(r"(?:--config\.)?([a-z_.]+\.[a-z_0-9]+)(?:=.*)?", code)
        if not found or code.endswith((".py", ".md", ".json", ".txt")) or "/" in code:
            continue
        group = found[1].rpartition(".")[0]
        assert group not in groups or found[1] in KEYS or found[1] in groups, f"there is no key {found[1]}"


@each_page
def test_programs_exist(path):
    for folder, name in re.findall(r"\b(benchmarks|launch|tests|configs|assets)/([\w/-]+\.\w+)", PAGES[path]):
        assert (ROOT / folder / name).is_file(), f"there is no {folder}/{name}"


@each_page
def test_benchmarks_have_their_flags(path):
    """A benchmark's flags are in its source, where those with a number are keywords of `harness.parser`."""
    for block in blocks(PAGES[path]):
        for words in commands(block.text) if block.language == "bash" else ():
            if words[0] == "python" and words[1].startswith("benchmarks/"):
                source = (ROOT / words[1]).read_text()
                for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
                    assert re.search(rf"{flag}\b|\b{flag[2:]}=", source), f"{words[1]} has no {flag}"


def train_arguments(words: list[str]) -> list[str] | None:
    """Returns the arguments of `dlm train` that a script of launch/ passes on; None for another command."""
    if "--" in words and any("launch/" in word for word in words):
        return words[words.index("--") + 1 :]
    if words[0] == "sbatch":
        return words[words.index("launch/slurm.sbatch") + 1 :]
    return None


def check_command(name: str, arguments: list[str]) -> None:
    parser = command_parser(name)
    parsed = parser.parse(arguments)
    if not hasattr(parsed, "overrides") or name == "quickstart":
        return
    recipe = parsed.config if parsed.config not in ("RECIPE", "...") else "quickstart"
    assert recipe in recipe_names(), f"there is no recipe {recipe}"
    overrides = [(key, text) for key, text in parsed.overrides if key not in ("KEY", "key", "mesh.AXIS")]
    build_config(TrainConfig, load_recipe(recipe), overrides)


@each_page
def test_commands_parse(path):
    """Every `dlm` line has flags that its command knows, a recipe that exists, and keys with values that fit."""
    for block in blocks(PAGES[path]):
        for words in commands(block.text) if block.language == "bash" else ():
            passed_on = train_arguments(words)
            if words[0] == "dlm":
                assert words[1] in COMMANDS, f"line {block.line}: there is no dlm {words[1]}"
                check_command(words[1], words[2:])
            elif passed_on:
                check_command("train", passed_on)
            elif words[0].startswith("--config."):
                overrides, others = split_overrides(words)
                assert not others
                build_config(TrainConfig, load_recipe("quickstart"), overrides)


def python_sources() -> list[tuple[str, str]]:
    found = [(f"{name}:{block.line}", block.text) for name, text in zip(NAMES, PAGES.values(), strict=True)
             for block in blocks(text) if block.language == "python" and "adapt_a_model" not in name]
    return [*found, *((f"notebook cell {number}", source) for number, source in enumerate(notebook_cells()))]


@pytest.mark.parametrize("where, source", python_sources(), ids=[where for where, _ in python_sources()])
def test_python_compiles_and_finds_its_imports(where, source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                pytest.importorskip(alias.name) if alias.name == "lm_eval" else importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            is_extra = node.module == "lm_eval"
            module = pytest.importorskip("lm_eval") if is_extra else importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), f"{where}: {ast.unparse(node)}"


def test_blocks_are_found():
    """The checks above see what they should: a page, its blocks, what is marked, and a shortened training."""
    found = blocks(PAGES[DOCS / "guides" / "adapt.md"])
    marked = [block for block in found if block.runs]
    assert {block.language for block in marked} == {"bash", "python"} and len(found) > len(marked)
    assert any("--config.num_steps=4" in block.extra for block in marked)
    assert "bash" not in without_code("a `bash` b\n```bash\ndlm\n```\n")
