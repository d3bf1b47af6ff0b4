"""Runs what a page marks to be run, in order, in the current folder and one process:

    python -m tests.docs.run_page guides/sample.md

A line of shell code is a `dlm` command. The Python blocks of a page share their names, as do the cells of a notebook.
"""

import sys

from dlm_jax.cli.main import main as dlm
from tests.docs.pages import DOCS, Block, blocks, commands, notebook_cells


def run_commands(block: Block) -> None:
    for program, *arguments in commands(block.text):
        if program != "dlm":
            sys.exit(f"line {block.line}: only dlm can be run, not {program}")
        extra = block.extra if arguments[0] == "train" else ()
        if code := dlm([*arguments, *extra]):
            sys.exit(f"line {block.line}: dlm {arguments[0]} exits with {code}")


def main(page: str) -> None:
    names: dict[str, object] = {}
    if page.endswith(".ipynb"):
        for number, source in enumerate(notebook_cells()):
            exec(compile(source, f"{page}, cell {number}", "exec"), names)
        return
    for block in blocks((DOCS / page).read_text()):
        if block.runs and block.language == "bash":
            run_commands(block)
        elif block.runs:
            exec(compile(block.text, f"{page}, block at line {block.line}", "exec"), names)


if __name__ == "__main__":
    main(sys.argv[1])
