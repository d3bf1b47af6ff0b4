"""Builds what the shipped base model is trained from: the corpus, then the tokenizer and the configuration.

    python assets/build_base.py corpus    --stories=DIR --out=OUT  # OUT/train.jsonl, validation.jsonl
    python assets/build_base.py tokenizer --out=OUT                # OUT/base: tokenizer, config.json

DIR holds `stories_900.json` (a list of cased stories) and `stories_lowercased.txt` (stories of blank-line
separated paragraphs, one newline between stories, all in lower case). The lower-cased file gets its capitals
back from what the cased one shows, so that the model learns one written English instead of two.
"""

import argparse
import collections
import hashlib
import json
import pathlib
import re

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
VALIDATION_FRACTION = 0.05

# ---------------------------------------------------------------- stories

# UTF-8 punctuation once read as cp1252 (and, in one file, lower-cased since).
_MISREAD = "\u00e2\u20ac"
PUNCTUATION = {
    _MISREAD + "\u0153": '"',
    _MISREAD + "\u2122": "'",
    _MISREAD + "\u02dc": "'",
    _MISREAD + "\u00a6": "...",
    _MISREAD + "\u201c": " - ",
    _MISREAD + "\u201d": " - ",
    _MISREAD: '"',
    "\u201c": '"',
    "\u201d": '"',
    "\u2018": "'",
    "\u2019": "'",
    "\u2026": "...",
    "\u2013": " - ",
    "\u2014": " - ",
}

OPENING = re.compile(r'"?(once |there once |(one|on a|it was a) (sunny |nice |bright |hot |cold )?(day|morning)\b)')
CONTINUATION = re.compile(
    r'("|(he|she|they|it|his|her|their|but|so|then|when|after|and|finally|suddenly|next|first|later|soon|from|every'
    r"|as|at last|the end|the moral|the other|inside|just)\b)",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    """One story in plain ASCII punctuation: paragraphs without stray spaces, one blank line between them."""
    for wrong, right in PUNCTUATION.items():
        text = text.replace(wrong, right)
    paragraphs = (re.sub(r"\s+", " ", paragraph).strip() for paragraph in re.split(r"\n+", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def split_stories(text: str) -> list[str]:
    """Stories of the lower-cased file.

    A single newline parts stories, but some use it between their paragraphs: what follows it begins a story if
    it opens like one, follows "the end", or is long and does not sound like a continuation.
    """
    stories: list[str] = []
    for block in re.split(r"(?<!\n)\n(?!\n)", text):
        ended = not stories or stories[-1].rstrip(' ."!').endswith("the end")
        begins = bool(OPENING.match(block)) and (block.startswith("once") or len(block) >= 250)
        begins = begins or (len(block) >= 400 and not CONTINUATION.match(block))
        if block.strip() and (ended or begins):
            stories.append(block)
        elif block.strip():
            stories[-1] += "\n\n" + block
    return stories


def usable(story: str) -> bool:
    """Whole, of ordinary length, and in plain characters."""
    whole = story.endswith((".", "!", "?", '"')) and not CONTINUATION.match(story)
    return whole and 200 <= len(story) <= 2500 and story.isascii() and story.count('"') % 2 == 0


def identity(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def deduplicate(stories: list[str]) -> list[str]:
    """Keeps the first of the stories that share a paragraph of 80 letters or more, whatever its case."""
    seen: set[str] = set()
    kept = []
    for story in stories:
        keys = {identity(story)} | {key for key in map(identity, story.split("\n\n")) if len(key) >= 80}
        if not keys & seen:
            kept.append(story)
        seen |= keys
    return kept


def in_validation(story: str) -> bool:
    digest = hashlib.sha256(identity(story).encode()).digest()
    return int.from_bytes(digest[:8]) < VALIDATION_FRACTION * 2**64


# ---------------------------------------------------------------- capitals

WORD = re.compile(r"[A-Za-z]+")
DETERMINERS = set("a an the his her my your our their its this that some any no two three every".split())
SUBJECT_VERBS = set("said asked was is had went saw wanted loved liked felt smiled looked replied ran".split())
NEVER_NAMES = set("i the a an it after out to him her his for and by or in over back something".split())
ALWAYS = {"i": "I", "tv": "TV", "ok": "OK"} | {
    day: day.capitalize() for day in "monday tuesday wednesday thursday friday saturday sunday christmas".split()
}


def _contexts(text: str):
    """Of each word: (match, previous word, what stands between, the word, next word), lower-cased."""
    words = list(WORD.finditer(text))
    for index, match in enumerate(words):
        start = words[index - 1].end() if index else 0
        gap = re.sub(r"\n+", "\n", text[start : match.start()]) if index else "\n" + text[: match.start()]
        before = words[index - 1].group().lower() if index else ""
        after = words[index + 1].group().lower() if index + 1 < len(words) else ""
        yield match, before, gap, match.group().lower(), after


class Truecaser:
    """Puts capitals back by majority: of (gap, word, neighbor), else (gap, word), else gap or word.

    Names that the cased text does not know are found in the lower-cased one: introduced by "named", or the
    subject of a verb and hardly ever after a determiner.
    """

    def __init__(self, cased: list[str], lowered: list[str]):
        self.counts: dict[tuple, list[int]] = collections.defaultdict(lambda: [0, 0])
        for story in cased:
            for match, before, gap, word, after in _contexts(story):
                for key in self._keys(before, gap, word, after):
                    self.counts[key][match.group()[0].isupper()] += 1
        self.names = self._names(lowered)

    @staticmethod
    def _keys(before: str, gap: str, word: str, after: str) -> list[tuple]:
        if gap in (" ", ", "):
            return [(gap, before, word), ("within", word)]
        return [(gap, word, after), (gap, word), (gap,)]

    def _names(self, lowered: list[str]) -> set[str]:
        total, named, determined, subject = (collections.Counter() for _ in range(4))
        for story in lowered:
            for _, before, gap, word, after in _contexts(story):
                total[word] += 1
                named[word] += before in ("named", "called") and gap == " "
                determined[word] += before in DETERMINERS and gap == " "
                subject[word] += after in SUBJECT_VERBS
        known = {key[1] for key, (lower, _) in self.counts.items() if key[0] == "within" and lower}
        return {
            word
            for word, count in total.items()
            if word not in known
            and word not in NEVER_NAMES
            and determined[word] <= 0.1 * count
            and (named[word] or subject[word] >= max(2, 0.2 * count))
        }

    def _upper(self, before: str, gap: str, word: str, after: str) -> bool:
        if word in self.names:
            return True
        lower, upper = self.counts.get(("within", word), (0, 0))
        if upper > 9 * lower:
            return True
        for key in self._keys(before, gap, word, after):
            lower, upper = self.counts.get(key, (0, 0))
            if lower + upper >= 2:
                return upper > lower
        return bool(re.search(r'[.!?\n]"? *"?$', gap))

    def __call__(self, story: str) -> str:
        own = set(re.findall(r"\bnamed ([a-z]+)", story)) - NEVER_NAMES - DETERMINERS
        pieces, end = [], 0
        for match, before, gap, word, after in _contexts(story):
            upper = word in own or self._upper(before, gap, word, after)
            pieces += [story[end : match.start()], ALWAYS.get(word, word.capitalize() if upper else word)]
            end = match.end()
        return "".join(pieces) + story[end:]


# ---------------------------------------------------------------- steps


def read(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8")


def build_corpus(directory: pathlib.Path, out: pathlib.Path) -> None:
    """Writes OUT/train.jsonl and OUT/validation.jsonl, one {"text": story} a line."""
    cased, lowered = read(directory / "stories_900.json"), read(directory / "stories_lowercased.txt")
    cased = [clean(story) for story in json.loads(cased)]
    lowered = [clean(story) for story in split_stories(lowered)]
    truecase = Truecaser(cased, lowered)
    found = [story for story in cased + [truecase(story) for story in lowered] if usable(story)]
    stories = deduplicate(found)
    out.mkdir(parents=True, exist_ok=True)
    for name, validation in (("train", False), ("validation", True)):
        part = [story for story in stories if in_validation(story) == validation]
        lines = "".join(json.dumps({"text": story}) + "\n" for story in part)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{name}: {len(part)} stories, {sum(map(len, part))} bytes")
    print(
        f"of {len(cased)} cased and {len(lowered)} lower-cased stories {len(found)} are usable, {len(stories)} distinct"
    )


def build_tokenizer(out: pathlib.Path) -> None:
    """Trains the byte-level BPE on OUT/train.jsonl; writes it and the model's config.json to OUT/base."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import GPT2Config, GPT2TokenizerFast

    texts = [json.loads(line)["text"] for line in read(out / "train.jsonl").splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = GPT2TokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        add_prefix_space=False,
        model_max_length=256,
    )
    fast.save_pretrained(out / "base")
    end = fast.convert_tokens_to_ids(END_OF_TEXT)
    GPT2Config(
        vocab_size=len(fast),
        n_positions=256,
        n_embd=192,
        n_layer=4,
        n_head=6,
        bos_token_id=end,
        eos_token_id=end,
        architectures=["GPT2LMHeadModel"],
    ).save_pretrained(out / "base")
    tokens = sum(len(ids) for ids in fast(texts, verbose=False)["input_ids"])
    print(f"{len(fast)} pieces; {tokens} training tokens, {sum(map(len, texts)) / tokens:.2f} bytes a token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["corpus", "tokenizer"])
    parser.add_argument("--stories", type=pathlib.Path, help="folder of the two story files (corpus)")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    if arguments.step == "corpus":
        if arguments.stories is None:
            parser.error("the corpus step needs --stories=DIR")
        build_corpus(arguments.stories, arguments.out)
    else:
        build_tokenizer(arguments.out)


if __name__ == "__main__":
    main()
