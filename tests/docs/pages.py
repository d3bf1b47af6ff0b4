"""The pages of the documentation, their links, headings and blocks of code."""

import dataclasses
import json
import pathlib
import re
import shlex

from launch.docs_pages import DOCS, NOTEBOOK, generated_pages

ROOT = DOCS.parent
FENCE = re.compile(r"(?m)^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.DOTALL)
MARK = re.compile(r"<!-- test: run(?: with (?P<extra>.*?))? -->\n\Z")


def pages() -> dict[pathlib.Path, str]:
    """Returns the text of every page, the README's and the generated ones included, by its path."""
    found = {path: path.read_text() for path in [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]}
    return found | {DOCS / path: text for path, text in generated_pages().items()}


def without_code(text: str) -> str:
    """Returns a page without blocks of code and `code`."""
    return re.sub(r"`[^`\n]+`|<code>.*?</code>", "", FENCE.sub("", text))


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(text))


def anchors(text: str) -> list[str]:
    """Returns the anchors of a page's headings, as Python-Markdown makes them."""
    titles = re.findall(r"(?m)^#+ (.+)$", FENCE.sub("", text))
    return [re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles]


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
      runs: it is marked to be run.
      extra: arguments that its trainings get when it is run, to be short.
    """

    language: str
    text: str
    line: int
    runs: bool = False
    extra: tuple[str, ...] = ()


def blocks(text: str) -> list[Block]:
    """Returns the blocks of code of a page, in order."""
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        mark = MARK.search(before)
        extra = shlex.split(mark["extra"] or "") if mark else ()
        found.append(Block(match["language"], match["text"], before.count("\n") + 1, mark is not None, tuple(extra)))
    return found


def notebook_cells() -> list[str]:
    """Returns the code of the notebook's cells without the installation, which only Jupyter can run."""
    cells = json.loads((DOCS / NOTEBOOK).read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [re.sub(r"(?m)^( *)%pip .*$", r"\1pass", source) for source in sources]


def commands(text: str) -> list[list[str]]:
    """Returns the words of each command of a block of shell code, without comments and redirections."""
    lines = text.replace("\\\n", " ").splitlines()
    words = (shlex.split(line, comments=True) for line in lines)
    return [_without_redirections(command) for command in words if command]


def _without_redirections(words: list[str]) -> list[str]:
    kept = []
    for word in words:
        if word in ("<", ">"):
            break
        kept.append(word)
    return kept
