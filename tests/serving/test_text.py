"""Text of rows that are filled in any order: never taken back, characters entire, stop strings, equal to `decode`."""

import functools

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlm_jax.diffusion import BlockSpec, DiffusionSpec
from dlm_jax.sampling import SamplerConfig, SamplingSpec
from dlm_jax.sampling.text import BROKEN, GAP, TokenTexts, before_end, decode, encode
from dlm_jax.sampling.trace import Change
from dlm_jax.serving.steps import MASK, RowSteps
from dlm_jax.serving.text import GapText, RowText, TextFormat, final_groups, overlap
from tests.serving.conftest import byte_tokenizer

WORDS = ["▁", "▁a", "▁cat", "s", "at", "é", "。", "▁é", "  ", "!", "▁▁"]


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece as in LLaMA: a space at the start that no text has, and bytes that are decoded together."""
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, [],
                                     unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[SEP]", "a", "cat", "##s", "##at", ".", "é", "ing", "##ing"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", bos_token="[SEP]", unk_token="[UNK]")


@functools.cache
def texts_of(kind: str) -> TokenTexts:
    return TokenTexts({"bytes": byte_tokenizer, "pieces": piece_tokenizer, "words": word_tokenizer}[kind]())


def random_tokens(texts: TokenTexts, rng: np.random.Generator, number: int) -> list[int]:
    """Tokens of random text with some of random bytes between, so that characters are complete, split and broken."""
    vocabulary, tokens = len(texts.tokenizer), []
    while len(tokens) < number:
        if rng.random() < 0.5:
            tokens += rng.integers(0, vocabulary, rng.integers(1, 4)).tolist()
        else:
            text = "".join(rng.choice(list("aé你🙂 \n."), rng.integers(1, 5)))
            tokens += texts.tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens[:number]


def random_changes(rng: np.random.Generator, row: list[int], filled: list[int], remask: bool = False) -> list[Change]:
    """Changes that fill the gaps of a row in random order, in steps; with `remask` some are masked again between."""
    gaps = rng.permutation([i for i, token in enumerate(row) if token == GAP]).tolist()
    changes, step = [], 0
    while gaps:
        step += 1
        number = rng.integers(1, 4)
        changes += [Change(step, position, filled[position], -0.5) for position in sorted(gaps[:number])]
        again = gaps[: number - 1] if remask and len(gaps) > number and rng.random() < 0.5 else []
        gaps = gaps[number:]
        if again:
            step += 1
            changes += [Change(step, position, GAP, 0.0) for position in again]
            gaps = [*gaps, *again]
    return changes


def groups(row: list[int], remask: float = 0.0, blocks: BlockSpec | None = None, **settings) -> list[int]:
    return final_groups(row, SamplingSpec(SamplerConfig(remask=remask, **settings), DiffusionSpec(None, blocks=blocks)))


def run_stream(reader: RowText, changes: list[Change], rng: np.random.Generator) -> list[str]:
    """The deltas of a row whose changes come in updates of random sizes."""
    deltas, last = [], changes[-1].step if changes else 0
    while True:
        number = int(rng.integers(1, 6))
        update, changes = changes[:number], changes[number:]
        while changes and update and changes[0].step == update[-1].step:  # a step is not split
            update, changes = [*update, changes[0]], changes[1:]
        delta = reader.update(update, update[-1].step if update else last, is_last=not changes)
        deltas.append(delta.text)
        if delta.finish_reason or not changes:
            return deltas


@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
def test_gap_text_is_what_decode_adds(kind):
    texts, rng = texts_of(kind), np.random.default_rng(0)
    for _ in range(150):
        tokens = random_tokens(texts, rng, 24)
        split = int(rng.integers(1, 10))
        before, gap = tokens[:split], tokens[split:]
        segment = rng.choice(["", "a ", "a"])
        reader, shown = GapText(texts, before, omit_space=segment.endswith(" ")), []
        for token in gap:
            shown.append(reader.add(token))
            assert not shown[-1].endswith(BROKEN)
        shown.append(reader.finish())
        whole = decode(texts.tokenizer, [segment, len(gap), ""], [range(split, len(tokens))], tokens)
        assert "".join(shown) == whole.removeprefix(segment), tokens


@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
@pytest.mark.parametrize("remask", [False, True])
def test_deltas_add_up_to_the_text(kind, remask):
    texts, rng = texts_of(kind), np.random.default_rng(1)
    end = texts.tokenizer.eos_token_id
    for _ in range(80):
        filled = random_tokens(texts, rng, 20)
        start = int(rng.integers(1, 6))
        row = [*filled[:start], *[GAP] * (20 - start)]
        gap, ends = range(start, 20), rng.choice([True, False])
        text_format = TextFormat(["", len(gap)], [gap], (end,) if ends else (),
                                 needed=groups(row, 0.3 if remask else 0.0))
        reader = RowText(row, text_format, texts)
        deltas = run_stream(reader, random_changes(rng, row, filled, remask), rng)
        tokens = before_end(filled[start:], text_format.ends)
        whole = decode(texts.tokenizer, ["", len(gap)], [gap], filled, text_format.ends)
        assert "".join(deltas) == reader.text == whole
        assert reader.finish_reason == ("stop" if len(tokens) < len(gap) else "length")
        assert reader.num_tokens == min(len(tokens) + 1, len(gap))


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_stop_strings(kind):
    """Whatever the tokens are: nothing of a stop string is shown, and the text ends where the first is complete."""
    texts, rng, found = texts_of(kind), np.random.default_rng(2), 0
    for _ in range(120):
        filled = random_tokens(texts, rng, 24)
        gap = range(1, 24)
        row = [filled[0], *[GAP] * 23]
        whole = decode(texts.tokenizer, ["", 23], [gap], filled)
        at = int(rng.integers(0, max(len(whole), 1)))
        stops = tuple({stop for stop in (whole[at : at + 3], whole[at + 1 : at + 2], "zz") if stop})
        readers = []
        for _ in range(2):
            reader = RowText(row, TextFormat(["", 23], [gap], stops=stops, needed=groups(row)), texts)
            deltas = run_stream(reader, random_changes(rng, row, filled), rng)
            assert "".join(deltas) == reader.text
            readers.append(reader)
        hits = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
        expected = whole[: min(hits)[1]] if hits else whole
        found += bool(hits)
        assert readers[0].text == expected
        assert readers[0].finish_reason == ("stop" if hits else "length")
        assert readers[0].num_tokens == readers[1].num_tokens <= 23
    assert found > 60


def test_response_without_space_and_end_text():
    """As `PromptFormat.decode_response`, for a template that ends an answer with ordinary text."""
    texts, rng = texts_of("bytes"), np.random.default_rng(3)
    encode_text = functools.partial(texts.tokenizer, add_special_tokens=False)
    for end in ("", " and", "\n\nc:"):
        for _ in range(40):
            content = "".join(rng.choice(list("ab nd\n c:é"), 12)) + rng.choice(["", end, end + " ", end[:2]])
            filled = [0, *encode_text(content)["input_ids"]]
            gap = range(1, len(filled))
            row = [0, *[GAP] * len(gap)]
            reader = RowText(row, TextFormat(["", len(gap)], [gap], is_response=True, end_text=end,
                                             needed=groups(row)), texts)
            deltas = run_stream(reader, random_changes(rng, row, filled), rng)
            assert "".join(deltas) == reader.text == content.rstrip().removesuffix(end).strip()


def test_text_with_gaps():
    texts, rng = texts_of("bytes"), np.random.default_rng(4)
    segments = ["Zoë  ", 4, " sat — ", 3, "", 2, "."]
    row, gaps = encode(texts.tokenizer, segments, 0)
    for _ in range(30):
        filled = [token if token != GAP else int(rng.integers(1, len(texts.tokenizer))) for token in row]
        text_format = TextFormat(segments, gaps, shows_given=True, full_reason="stop", needed=groups(row))
        reader = RowText(row, text_format, texts)
        first = reader.text
        assert first == "Zoë  "
        deltas = run_stream(reader, random_changes(rng, row, filled), rng)
        assert first + "".join(deltas) == reader.text == decode(texts.tokenizer, segments, gaps, filled)
        given = "".join(segments[i] + (reader.gap_texts[i // 2] if i < 6 else "") for i in range(0, 7, 2))
        assert given == reader.text and reader.finish_reason == "stop"


def test_log_probs_cover_the_text():
    """Every token of the text has one, those after a stop string none, and offsets are where tokens start."""
    texts, rng = texts_of("bytes"), np.random.default_rng(5)
    for stops in ((), ("t",)):
        for _ in range(20):
            filled = [0, *texts.tokenizer("the cat sat on a mat", add_special_tokens=False)["input_ids"]]
            gap = range(1, len(filled))
            row = [0, *[GAP] * len(gap)]
            reader = RowText(row, TextFormat(["", len(gap)], [gap], stops=stops, offset=7, shows_end=True,
                                             needed=groups(row)), texts, top=True)
            changes, entries = random_changes(rng, row, filled), []
            for step in range(1, changes[-1].step + 1):
                update = [change for change in changes if change.step == step]
                entries += reader.update(update, step, is_last=step == changes[-1].step).log_probs
                if reader.finish_reason:
                    break
            assert all(entry.top == ((entry.text, entry.log_prob),) for entry in entries)
            assert "".join(entry.text for entry in entries).startswith(reader.text)
            for entry in entries:
                assert entry.offset - 7 <= len(reader.text)
                assert reader.text[entry.offset - 7 :].startswith(entry.text) or stops


def test_remasked_tokens_wait_for_their_block():
    row = [0, *[GAP] * 5]
    assert groups(row) == [1, 2, 3, 4, 5] and groups(row, 0.5) == [5, 5, 5, 5, 5]
    aligned = [0, 0, GAP, GAP, GAP, GAP, 0, 0, 0, GAP]  # in blocks 0-3, 4-7, 8-11
    assert groups(aligned, 0.5, BlockSpec(4)) == [2, 2, 4, 4, 5]
    spread = [0, 0, GAP, GAP, 0, 0, 0, GAP, GAP, GAP]  # in blocks from the first gap that no block has
    assert groups(spread, 0.5, block_length=4) == [2, 2, 5, 5, 5]


def test_steps_show_every_token():
    texts = texts_of("bytes")
    row, _ = encode(texts.tokenizer, ["the ", 3, " mat"], 0)
    steps = RowSteps(0, row, texts)
    start = steps.start()
    assert start["text"] == f"the{MASK * 3} mat"
    assert [token["position"] for token in start["tokens"]] == [*range(len(row))]
    assert [token["given"] for token in start["tokens"]] == [token != GAP for token in row]
    cat, = texts.tokenizer(" cat", add_special_tokens=False)["input_ids"][:1]
    at = row.index(GAP)
    step = steps.update([Change(1, at, cat, -0.25)], 1)
    assert step["tokens"] == [{"position": at, "id": cat, "text": texts.text(cat), "logprob": -0.25}]
    assert step["text"] == f"the{texts.text(cat)}{MASK * 2} mat"
    assert steps.update([Change(2, at, GAP, 0.0)], 2)["text"] == start["text"]


def test_steps_say_what_is_special_and_which_tokens_spell_one_character():
    texts = texts_of("bytes")
    row, _ = encode(texts.tokenizer, ["the", 6], 0)
    house = texts.tokenizer(" 🏠", add_special_tokens=False)["input_ids"]
    assert 2 < len(house) < 6
    steps, at = RowSteps(0, row, texts), row.index(GAP)
    start = steps.start()
    assert [token.get("special", False) for token in start["tokens"]] == [position == 0 for position in range(len(row))]
    *most, last = [Change(1, at + i, token, -1.0) for i, token in enumerate(house)]
    assert "joined" not in start and "joined" not in steps.update(most, 1)
    (first, count, text), = steps.update([last], 2)["joined"]
    assert text.strip() == "🏠" and at <= first and first + count == at + len(house)
    step, = steps.update([Change(3, at + len(house), 0, -1.0)], 3)["tokens"]
    assert step["special"] is True


def test_overlap():
    assert [overlap("abc", end) for end in ("cd", "bcd", "abcd", "abc", "x", "")] == [1, 2, 3, 3, 0, 0]
