"""What a step minimizes, as a recipe says it. It needs no JAX: a recipe is checked before JAX is imported."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from dlm_jax.config_fields import check_at_least, check_choices, check_range, field, open_field, settle
from dlm_jax.errors import ConfigError

ObjectiveName = Literal["diffusion", "block_diffusion", "autoregressive", "drafter", "self_drafting"]
# What only the objectives that noise texts have. Autoregression passes over the second kind, so that `objective.name`
# alone makes the parent's run of a recipe.
_NOISE_TERMS = ("noise", "clean_weight", "confidence_weight")
_NOISE_SETTINGS = ("noised_weight", "teacher", "schedule", "power", "loss_normalization", "weight", "half_life",
                   "min_time", "time_curriculum", "anneal_steps", "share_annealed_mask")


DRAFT_LOSSES = "cross_entropy", "kl", "l1", "confidence", "selector"


@dataclasses.dataclass(frozen=True)
class DraftObjective:
    """Anchors of the objective `drafter`, and factors of its losses, `DRAFT_LOSSES`."""

    num_anchors: int = field(512, "blocks per row, at places drawn anew at each step; a row of packed documents needs "
                             "as many for each of them")
    decay: float = field(4.0, "the k-th guess of a block, from 0 on, has the weight exp(-k / decay)")
    adaptive: bool = field(False, "weights by the number of guesses that still have to be accepted instead (D-PACE)")
    cross_entropy: float = field(1.0, "cross-entropy of the text's own token")
    kl: float = field(0.0, "sum q log(q / p), of the target's q and the drafter's p")
    l1: float = field(0.0, "sum of the absolute differences from the target's probabilities")
    confidence: float = field(0.0, "binary cross-entropy of the confidence head, against the share that the target "
                              "accepts")
    selector: float = field(0.0, "cross-entropy of the selector, where the token is among its candidates")

    def __post_init__(self) -> None:
        check_at_least(self.num_anchors, 1, "objective.drafts.num_anchors")
        check_range(self.decay, 0, math.inf, "objective.drafts.decay", open_low=True)
        for name in DRAFT_LOSSES:
            check_at_least(getattr(self, name), 0, f"objective.drafts.{name}")

    @property
    def reads_target(self) -> bool:
        """Whether a loss needs the target's distribution."""
        return self.kl > 0 or self.l1 > 0 or self.confidence > 0


@dataclasses.dataclass(frozen=True)
class TeacherObjective:
    """What the model learns from the parent, which reads the clean text causally; a weight of 0 leaves a term out."""

    distribution_weight: float = field(0.0, "weight of the divergence from the parent's distribution of each noised "
                                       "token, over the full vocabulary")
    divergence: Literal["kl", "tv"] = field("kl", "kl: sum q log(q / p), of the parent's q and the model's p; tv: half "
                                            "of sum |p - q|, the share of drafts that the parent rejects")
    hidden_weight: float = field(0.0, "weight of 1 - cosine between states of model and parent that predict the same "
                                 "noised token, the mean over layers")
    hidden_layers: tuple[int, ...] = field((), "layers whose outputs are compared, from 0 on; empty: all")

    def __post_init__(self) -> None:
        check_choices(self, "objective.teacher")
        for name in ("distribution_weight", "hidden_weight"):
            check_range(getattr(self, name), 0, math.inf, f"objective.teacher.{name}", open_high=True)
        for layer in self.hidden_layers:
            check_at_least(layer, 0, "objective.teacher.hidden_layers")
        if self.hidden_layers and not self.hidden_weight:
            raise ConfigError(f"objective.teacher.hidden_layers is {self.hidden_layers}, but hidden_weight is 0; set "
                              "objective.teacher.hidden_weight, or remove the layers")

    @property
    def is_needed(self) -> bool:
        """Whether the parent is computed."""
        return self.distribution_weight > 0 or self.hidden_weight > 0


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimized: noise x the AR loss of the clean copy x what the parent teaches.

    With the noise of a batch at hand, the loss of a noised token is its weight (`weight`) times the sum of
    `noised_weight` x cross-entropy, `confidence_weight` x entropy, and the terms of `teacher`. Each token of the clean
    copy adds `clean_weight` x its AR loss.
    """

    name: ObjectiveName = field(
        "diffusion", "what is learned; block_diffusion: one block after another, each by diffusion; drafter: a small "
        "model guesses what the base, which does not change, writes next")
    shift: bool = field(True, "position n is predicted from the state at n - 1, as in the AR parent")
    schedule: Literal["linear", "cosine", "polynomial"] = field("linear", "masking probability as a function of time")
    power: float = field(2.0, "exponent of the polynomial schedule")
    loss_normalization: Literal["all_tokens", "masked_tokens", "per_example"] = field(
        "all_tokens", "divide by the tokens that may be masked (unbiased); by those that were masked (as the "
        "DiffuLLaMA reference implementation does; without clean_weight); or each example by the length of its answer, "
        "so that all examples count the same (as LLaDA does for fine-tuning)")
    weight: Literal["elbo", "uniform"] = field("elbo", "weight of a masked token: the bound's (1/t if linear), or 1")
    noise: Literal["rate", "position", "all_masked", "random_tokens"] = field(
        "rate", "how tokens are noised. rate: each is masked with the schedule's probability; position: of each block "
        "as many as that, late ones first (Efficient-DLM); all_masked: every one is masked (I-DLM); random_tokens: "
        "every one is replaced by a random token (Uno)")
    half_life: float = field(0.25, "noise position: the share of a block over which a token becomes twice as likely "
                             "to be masked, when few are")
    noised_weight: float = field(1.0, "weight of the cross-entropy of noised tokens")
    clean_weight: float = field(0.0, "weight of the AR loss of a clean copy, which keeps the parent's ability")
    confidence_weight: float = field(0.0, "weight of the entropy of noised tokens whose most likely token is right "
                                     "(LLaDA2)")
    teacher: TeacherObjective = field(TeacherObjective(), "what the parent teaches")
    min_time: float = field(1e-3, "smallest time")
    time_curriculum: tuple[tuple[int, float, float], ...] = field(
        (), "(first step, low, high) triples: times are in [low, high] from that step on; empty: [min_time, 1]")
    anneal_steps: int = field(0, "steps over which attention opens from causal; 0: bidirectional from the start")
    share_annealed_mask: bool = field(
        False, "one annealed attention pattern for all rows of a batch, as in the DiffuLLaMA reference implementation")
    block_size: int = field(32, "block_diffusion: tokens per block; 1: autoregression, a row's length: full diffusion")
    block_size_schedule: tuple[tuple[int, int], ...] = field(
        (), "block_diffusion: (first step, tokens per block) pairs that grow to block_size; empty: always block_size")
    clean_attention: Literal["causal", "block_bidirectional"] = field(
        "causal", "block_diffusion: attention among clean tokens: causal, as in the parent; or bidirectional within "
        "each block, as in BD3-LM, SDAR and Fast-dLLM v2")
    complementary: bool = field(
        False, "block_diffusion: two noisy views of each text, and each token masked in one of them")
    drafts: DraftObjective = field(DraftObjective(), "anchors and losses of a drafter")

    def __post_init__(self) -> None:
        check_choices(self, "objective")
        check_range(self.min_time, 0, 1, "objective.min_time", open_low=True, open_high=True)
        check_at_least(self.anneal_steps, 0, "objective.anneal_steps")
        check_at_least(self.block_size, 1, "objective.block_size")
        check_range(self.half_life, 0, math.inf, "objective.half_life", open_low=True, open_high=True)
        for name in ("noised_weight", "clean_weight", "confidence_weight"):
            check_range(getattr(self, name), 0, math.inf, f"objective.{name}", open_high=True)
        self._check_terms()
        for name, key, needed in (("half_life", "noise", "position"), ("power", "schedule", "polynomial")):
            if (value := getattr(self, name)) != _default(name) and getattr(self, key) != needed:
                raise ConfigError(f"objective.{name} {value} needs objective.{key} {needed}, got {getattr(self, key)}; "
                                  f"set that too, or remove objective.{name}")
        if self.name == "autoregressive" and not self.shift:
            raise ConfigError("objective.shift must be true for the autoregressive objective, which predicts the next "
                              "token")
        if self.trains_drafts:
            self._check_drafts()
        if self.name == "block_diffusion":
            self._check_blocks()
        elif self.block_size_schedule or self.complementary or self.clean_attention != "causal":
            raise ConfigError("objective.block_size_schedule, objective.complementary and objective.clean_attention "
                              f"need objective.name block_diffusion, got {self.name}")
        _check_starts(self.time_curriculum, "objective.time_curriculum")
        if any(len(stage) != 3 or not 0 <= stage[1] < stage[2] <= 1 for stage in self.time_curriculum):
            raise ConfigError("objective.time_curriculum must consist of (first step, low, high) with "
                              f"0 <= low < high <= 1, got {self.time_curriculum}")

    def _check_terms(self) -> None:
        if self.name in ("diffusion", "block_diffusion"):
            if self.noise != "rate" and (self.complementary or (self.time_curriculum and self.noise != "position")):
                raise ConfigError(f"objective.noise {self.noise} takes neither objective.complementary nor "
                                  "objective.time_curriculum; set noise to rate, or remove them")
            if self.noise == "random_tokens" and (self.name, self.shift, self.clean_attention) != (
                    "block_diffusion", True, "causal"):
                raise ConfigError("objective.noise random_tokens trains drafts that the clean copy checks; it needs "
                                  "objective.name block_diffusion with objective.shift and causal clean_attention")
            if self.clean_weight and self.clean_attention != "causal":
                raise ConfigError("objective.clean_weight is for the AR loss, which objective.clean_attention "
                                  f"{self.clean_attention} would give away; set clean_attention to causal")
            if self.clean_weight and self.loss_normalization == "masked_tokens":
                raise ConfigError("objective.loss_normalization masked_tokens divides by the number of noised tokens, "
                                  "and the AR loss of objective.clean_weight is of all tokens; set "
                                  "loss_normalization to all_tokens or per_example")
            if not (self.noised_weight or self.clean_weight or self.teacher.is_needed):
                raise ConfigError("objective.noised_weight, objective.clean_weight and objective.teacher are all 0, so "
                                  "that nothing is learned; set one of them")
            return
        for name in (*_NOISE_TERMS, *(_NOISE_SETTINGS if self.trains_drafts else ())):
            if (value := getattr(self, name)) != _default(name):
                raise ConfigError(f"objective.{name} is for the objectives diffusion and block_diffusion, and "
                                  f"objective.name is {self.name}, got {value}")

    def _check_drafts(self) -> None:
        drafts, default = self.drafts, DraftObjective()
        if drafts.cross_entropy == drafts.kl == drafts.l1 == 0:
            raise ConfigError("objective.drafts.cross_entropy, objective.drafts.kl and objective.drafts.l1 are all 0, "
                              "so that nothing is learned; set one of them")
        if self.name == "drafter":
            return
        if self.block_size < 2 or not self.shift:
            raise ConfigError("objective.name self_drafting needs objective.block_size of at least 2, one more "
                              f"than the drafts, and objective.shift; got {self.block_size} and {self.shift}")
        for name in ("num_anchors", "confidence", "selector"):
            if (value := getattr(drafts, name)) != getattr(default, name):
                raise ConfigError(f"objective.drafts.{name} is for the objective drafter, and objective.name is "
                                  f"{self.name}, got {value}")

    def _check_blocks(self) -> None:
        if self.anneal_steps:
            raise ConfigError("objective.anneal_steps is for the objective diffusion; for block_diffusion use "
                              "objective.block_size_schedule instead")
        _check_starts(self.block_size_schedule, "objective.block_size_schedule")
        sizes = [size for _, size in self.block_size_schedule] or [self.block_size]
        if min(sizes) < 1 or sizes[-1] != self.block_size:
            raise ConfigError(f"objective.block_size_schedule must have sizes of at least 1 and end with block_size "
                              f"{self.block_size}, got {self.block_size_schedule}")
        if self.complementary and self.schedule != "linear":
            raise ConfigError(f"objective.complementary needs objective.schedule linear, got {self.schedule}")

    @property
    def num_views(self) -> int:
        """Noisy copies of each text in block diffusion."""
        return 2 if self.complementary else 1

    @property
    def trains_drafts(self) -> bool:
        """Whether what is learned are guesses that a model checks, which have losses and measures of their own."""
        return self.name in ("drafter", "self_drafting")

    def at_step(self, step: int) -> Self:
        """Returns the objective of one step: the same with the block size that the schedule has reached."""
        sizes = [size for start, size in self.block_size_schedule if start <= step]
        return dataclasses.replace(self, block_size=sizes[-1], block_size_schedule=()) if sizes else self

    def for_validation(self) -> Self:
        """Returns what held-out rows are scored by: the same without what only shapes training.

        Every field that is not named here, a new one too, holds for validation as well.
        """
        names = ("time_curriculum", "anneal_steps", "share_annealed_mask", "block_size_schedule", "complementary",
                 "weight", "noised_weight", "confidence_weight", "teacher")
        names += ("noise", "half_life") if self.noise == "position" else ()
        return dataclasses.replace(self, **{name: _default(name) for name in names})

    def canonicalize(self, length: int) -> Self:
        """Returns the same objective for rows of `length` by its simplest name.

        Blocks of one token under the shift are autoregression, and one block is full diffusion.
        """
        if self.name != "block_diffusion":
            return self
        plain = dataclasses.replace(self, complementary=False, block_size_schedule=(), block_size=1,
                                    clean_attention="causal")
        if self.block_size == 1 and self.shift:
            return dataclasses.replace(plain, name="autoregressive", noise="rate", half_life=_default("half_life"),
                                       clean_weight=0.0, noised_weight=self.noised_weight + self.clean_weight,
                                       confidence_weight=0.0)
        one_block = self.block_size >= length and not self.complementary
        return dataclasses.replace(plain, name="diffusion") if one_block else self

    def forward_multiplier(self, length: int) -> int:
        """Returns how often the network reads each token of a row per step to learn: once, or per view and clean."""
        canonical = self.canonicalize(length)
        if canonical.name in ("block_diffusion", "self_drafting"):
            return self.num_views + 1
        return 2 if canonical.clean_weight else 1


@dataclasses.dataclass(frozen=True)
class OpenObjective(ObjectiveConfig):
    """The objective as a recipe says it, which may leave to the source what the source was trained with."""

    name: ObjectiveName | None = open_field(ObjectiveConfig, "name")
    shift: bool | None = open_field(ObjectiveConfig, "shift")
    block_size: int | None = open_field(ObjectiveConfig, "block_size")
    clean_attention: Literal["causal", "block_bidirectional"] | None = open_field(ObjectiveConfig, "clean_attention")

    def __post_init__(self) -> None:
        if self.name == "drafter" and self.block_size is not None:
            raise ConfigError(f"objective.block_size is {self.block_size}, and the blocks of a drafter have "
                              "drafter.block_size; set that instead")
        blocks = self.block_size_schedule or self.complementary or self.clean_attention
        self.settle({"name": "block_diffusion"} if blocks else {})  # checks what is stated

    def settle(self, recorded: Mapping[str, Any]) -> ObjectiveConfig:
        """Returns the objective for a source that records these fields.

        Raises:
          ConfigError: they do not go together.
        """
        if self.block_size_schedule:
            recorded = {**recorded, "block_size": self.block_size_schedule[-1][1]}
        return settle(self, ObjectiveConfig, recorded)


def _default(name: str) -> Any:
    return ObjectiveConfig.__dataclass_fields__[name].default


def _check_starts(stages: tuple[tuple, ...], key: str) -> None:
    starts = [stage[0] for stage in stages]
    if starts and (starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts))):
        raise ConfigError(f"{key} must start at step 0 with increasing first steps, got {stages}")
