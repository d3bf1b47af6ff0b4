"""Programs with a gap: HumanEval's in-filling tasks (Bavarian et al., arXiv 2207.14255)."""

from dlm_jax.data.records import BadRecord, get_text
from dlm_jax.evaluation.items import Fields, Item
from dlm_jax.evaluation.sandbox import Program

# By how the names of the rows begin, how many tokens a gap may have; the longer the gaps, the fewer lengths are tried.
_LENGTHS = {"SingleLine": None, "MultiLine": range(16, 241, 16), "RandomSpan": range(4, 97, 4)}


def humaneval_infilling(fields: Fields, release: bool) -> Item:
    """{task_id, prompt, suffix, canonical_solution, test, entry_point}, for a line, several lines or a random span.

    The released script of the parents asks for "the middle code" with prefix and suffix in the prompt.
    """
    kind = get_text(fields, "task_id").partition("Infilling")[0]
    if kind not in _LENGTHS:
        raise BadRecord(f"the task_id {fields['task_id']!r} does not begin with {', '.join(_LENGTHS)}")
    prompt, suffix = get_text(fields, "prompt"), get_text(fields, "suffix")
    asked = f"The prefix is: {prompt} and the suffix is: {suffix}, please return the middle code: " if release else ""
    return Item(prompt=prompt, suffix=suffix, parent_prompt=asked, solution=get_text(fields, "canonical_solution"),
                tests=f"{get_text(fields, 'test')}\ncheck({get_text(fields, 'entry_point')})\n",
                one_line=kind == "SingleLine", lengths=_LENGTHS[kind])


def completed(item: Item, text: str) -> Program:
    """The program with `text` in its gap, and its tests."""
    return Program(item.prompt + text + item.suffix, item.tests)


def cut_code(item: Item, text: str) -> str:
    """What of a text that was written from left to right stands in the gap.

    Of a gap that is a line it is the first line that is not blank; of others it ends where the first line behind the
    gap comes.
    """
    if not item.one_line:
        behind = next((line for line in item.suffix.split("\n") if line.strip()), None)
        return text.partition(behind)[0] if behind else text
    lines = text.split("\n")
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    return "\n".join(lines[: first + 1]) + "\n"
