"""Makes the pages of the site that follow from the code: the keys of recipes, the command line, and the notebook.

MkDocs calls `on_files` (see mkdocs.yml). The pages are made at every build and not kept: the help of the fields, the
parsers of the commands and the notebook are the only sources.
"""

import argparse
import dataclasses
import html
import importlib
import json
import pathlib
import re
import textwrap
import typing

from dlm_jax.cli.config import format_value, load_recipe, recipe_folder, recipe_names, type_name
from dlm_jax.cli.main import COMMANDS, Parser
from dlm_jax.training.config import TrainConfig

DOCS = pathlib.Path(__file__).parents[1] / "docs"
NOTEBOOK = "guides/adapt_a_model.ipynb"


def on_files(files, config):
    """Adds the generated pages to the pages of the site."""
    from mkdocs.structure.files import File

    for path, content in generated_pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def generated_pages() -> dict[str, str]:
    """Returns path below docs/ -> Markdown."""
    return {"reference/configuration.md": configuration_page(), "reference/cli.md": command_line_page(),
            str(pathlib.Path(NOTEBOOK).with_suffix(".md")): notebook_page(DOCS / NOTEBOOK)}


# ---- The keys of recipes.


def configuration_page() -> str:
    """Returns a table of all keys for each group, with default, type and help."""
    recipes = _table(["recipe", ""], [[_code(name), _text(_summary(name))] for name in recipe_names()])
    return "\n\n".join([
        "# Configuration", "A training run is a recipe and the keys that you set: `dlm train --config=RECIPE "
        "--config.KEY=VALUE`. A recipe is a name of the first table or a Python file. "
        "`dlm train --config=RECIPE --print_config` prints the keys as that recipe sets them; the defaults below are "
        "those of a recipe that sets nothing.",
        "Values are typed as `none`, `true`, `1e6`, `a,b,c` or `((0,1),(500,4))`.",
        "## Recipes", recipes, "## Top level", *_group(TrainConfig(), "")])


def _summary(recipe: str) -> str:
    """Returns the first sentence of a recipe's docstring."""
    load_recipe(recipe)  # fails here if the recipe does
    source = (recipe_folder() / f"{recipe}.py").read_text()
    return " ".join(source.split('"""')[1].split("\n\n")[0].split())


def _group(config: object, prefix: str) -> typing.Iterator[str]:
    """Yields Markdown for the keys of a dataclass, then for each group in it."""
    hints, rows, groups = typing.get_type_hints(type(config)), [], []
    for field in dataclasses.fields(config):
        value, help_text = getattr(config, field.name), field.metadata["help"]
        if dataclasses.is_dataclass(value):
            groups.append((value, f"{prefix}{field.name}", help_text))
        else:
            shown = "" if value == "" or value == () else _code(format_value(value))
            rows.append([_code(prefix + field.name), shown, _text(type_name(hints[field.name])), _text(help_text)])
    yield _table(["key", "default", "type", "meaning"], rows)
    for value, group, help_text in groups:
        yield f"## {group}"
        yield f"{_capitalized(help_text)}."
        yield from _group(value, f"{group}.")


# ---- The command line.


def command_line_page() -> str:
    """Returns each command's description and a table of its arguments."""
    codes = [("0", "done"), ("1", "failed, with a sentence"), ("2", "wrong arguments"),
             ("3", "`dlm plan`: something does not fit"),
             ("75, 76, 130", "see [Launch](../guides/launch.md#exit-codes)")]
    parts = ["# Command line", "`dlm COMMAND --help` prints the same. An argument is written `--name=value` or "
             "`--name value`. An error is one sentence on stderr, with the exit code of this table.",
             _table(["exit code", ""], [list(row) for row in codes])]
    for name in COMMANDS:
        parser = command_parser(name)
        parts += [f"## dlm {name}", *_description(parser.description), *_arguments(parser)]
    return "\n\n".join(parts)


def command_parser(name: str) -> Parser:
    """Returns the parser of a command, as `dlm` makes it."""
    command = importlib.import_module(f"dlm_jax.cli.{name}")
    parser = Parser(prog=f"dlm {name}", description=command.__doc__, allow_abbrev=False)
    command.add_arguments(parser)
    return parser


def _description(text: str) -> list[str]:
    """Returns a docstring's paragraphs; what is indented are commands."""
    return [f"```bash\n{textwrap.dedent(paragraph).rstrip()}\n```" if paragraph.startswith("  ")
            else _text(" ".join(paragraph.split())) for paragraph in text.strip().split("\n\n")]


def _arguments(parser: argparse.ArgumentParser) -> typing.Iterator[str]:
    """Yields a table for each group of arguments that has any, with its title where it is not argparse's own."""
    for group in parser._action_groups:
        rows = [[_code(_invocation(action)), _text(_help(action, parser))] for action in group._group_actions
                if action.dest != "help" and action.help != argparse.SUPPRESS]
        if not rows:
            continue
        if group.title not in ("positional arguments", "options"):
            yield f"**{_capitalized(group.title)}**"
            if group.description:
                yield f"{_capitalized(group.description)}."
        yield _table(["argument", ""], rows)


def _invocation(action: argparse.Action) -> str:
    name = action.option_strings[-1] if action.option_strings else action.dest
    if action.nargs == 0 or not action.option_strings:
        return name
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    return f"{name}={value}" + (" ..." if action.nargs in ("+", "*") else "")


def _help(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    values = vars(action) | {"prog": parser.prog}
    help_text = (action.help or "") % {name: value for name, value in values.items() if value is not argparse.SUPPRESS}
    return f"{help_text}; required" if action.required else help_text


# ---- The notebook.


def notebook_page(path: pathlib.Path) -> str:
    """Returns a notebook's text, code and printed output."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        printed = "".join(_printed(output) for output in cell["outputs"]).strip("\n")
        if printed:
            parts.append(f"```text\n{printed}\n```")
    heading, *rest = parts
    note = f"[{path.name}]({path.name}), of which this page shows text, code and output, opens in Jupyter and in Colab."
    return "\n\n".join([heading, note, *rest])


def _printed(output: dict) -> str:
    """Returns what a cell printed or returned; progress bars, on stderr, are left out."""
    if output["output_type"] == "stream":
        return "".join(output["text"]) if output["name"] == "stdout" else ""
    return "".join(output["data"]["text/plain"]) + "\n"


# ---- Markdown.


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _code(text: str) -> str:
    """Returns text as code that may be in a table, whatever it has in it."""
    return f"<code>{_escape(text)}</code>"


def _text(text: str) -> str:
    """Returns plain text, in which only `code` is markup."""
    parts = re.split(r"`([^`]+)`", text)
    return "".join(_code(part) if number % 2 else _escape(part) for number, part in enumerate(parts))


def _capitalized(text: str) -> str:
    return _text(text[0].upper() + text[1:])


def _escape(text: str) -> str:
    """Returns text with what Markdown or HTML would read otherwise escaped."""
    escaped = html.escape(text, quote=False).replace("|", "&#124;")
    return "".join(f"\\{character}" if character in "*_`[]" else character for character in escaped)
