"""What a corpus is, and how it becomes rows."""

import dataclasses
from dataclasses import field

from dlm_jax.errors import ConfigError

PACK_MODES = ("plain", "segments")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A corpus of text files packed into rows of one length."""

    train: tuple[str, ...] = field(
        default=(), metadata={"help": "paths or globs of training text: .txt, .jsonl, .json, each also .gz"}
    )
    validation: tuple[str, ...] = field(
        default=(), metadata={"help": "paths or globs of held-out text; empty: a part of the training text"}
    )
    validation_fraction: float = field(
        default=0.01, metadata={"help": "share of training documents held out where no validation files are"}
    )
    text_key: str = field(default="text", metadata={"help": "the key of the text in JSON records"})
    document_separator: str = field(
        default="",
        metadata={"help": "what parts a .txt file into documents; empty: the file is one document"},
    )
    length: int = field(default=512, metadata={"help": "tokens a row"})
    batch_size: int = field(default=256, metadata={"help": "rows a step, over all devices and accumulation"})
    pack: str = field(
        default="plain",
        metadata={"help": "plain: documents run on, EOS between; segments: each document sees only itself"},
    )
    add_bos: bool | None = field(
        default=None,
        metadata={"help": "BOS before each document; None: as the tokenizer does, and always with segments"},
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "where tokenised rows are kept; None: in the working directory"}
    )

    def __post_init__(self):
        if self.pack not in PACK_MODES:
            raise ConfigError(f"data.pack is {self.pack!r}; it must be one of {', '.join(PACK_MODES)}")
        if self.length < 2:
            raise ConfigError(f"data.length is {self.length}; a row needs a context token and one more")
        if self.batch_size < 1:
            raise ConfigError(f"data.batch_size is {self.batch_size}; it must be at least 1")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"data.validation_fraction is {self.validation_fraction}, not in [0, 1)")
