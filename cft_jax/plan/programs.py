"""The programs that a configuration would run, lowered from shapes alone: no weights are downloaded, none allocated."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from absl import logging
from jax.sharding import AbstractMesh, Mesh
from jax.stages import Lowered

from cft_jax.common.errors import UserError
from cft_jax.config import Config, ModelSettings
from cft_jax.data.batch import Shape
from cft_jax.data.dataset import Dataset
from cft_jax.data.objectives import training_dataset
from cft_jax.distributions import configured_tasks
from cft_jax.distributions.splits import TRAIN
from cft_jax.generate import text_scorer, trie_scorer
from cft_jax.generate.engine import decode_sizes
from cft_jax.generate.lowering import lower_decode, lower_prefill, lower_text_scores, lower_trie_scores
from cft_jax.generate.prefill import cache_bytes_per_token
from cft_jax.generate.sampling import SamplingSettings
from cft_jax.generate.split_model import SplitModel
from cft_jax.models.abstract import abstract_model
from cft_jax.models.config import ModelConfig
from cft_jax.models.flops import Operations
from cft_jax.models.transformer import Transformer
from cft_jax.plan import KINDS
from cft_jax.runs.base import architecture, base_config, model_options, run_tokenizer
from cft_jax.runs.scratch import scratch_model
from cft_jax.sharding.rules import num_shards
from cft_jax.text.tree_rows import bucket
from cft_jax.train.loop import step_options
from cft_jax.train.prefetch import abstract_batch
from cft_jax.train.remembered import abstract_kept
from cft_jax.train.state import abstract_state, split_model, state_shardings
from cft_jax.train.step import make_train_step

# The paper's batch (tokens, target positions, target entries of its rows, tokens that all prompts share) with Qwen3's
# tokenizer; taken where the tokenizer is not to be had. No run of the paper's has fewer steps.
_TOKENS, _POSITIONS, _ENTRIES, _SHARED, _STEPS = 96, 12, 128, 20, 500
# Prompts that the structured suite hands to the sampler at once, and ids that end a text, at most a few.
_PROMPTS, _STOP_IDS = 8, 4


@dataclass(frozen=True)
class Work:
    """What a configuration asks of its model, on whatever devices.

    Attributes:
      model: its sizes.
      shapes: of the train step's batches, by what the number of rows must be a multiple of.
      shared_prefix: tokens that all prompts begin with.
      total_steps: of the run.
      assumed: whether the shapes are the paper's, since the tokenizer is not to be had.
    """

    model: ModelConfig
    shapes: Callable[[int], tuple[Shape, ...]]
    shared_prefix: tuple[int, ...]
    total_steps: int
    assumed: bool


@dataclass(frozen=True)
class Program:
    """One compiled program of a run.

    Attributes:
      name: kind (one of `KINDS`) and shape.
      lower: makes it ready for its devices' compiler.
      ideal_flops: operations that the method asks for, of all devices together.
      unit, units: what it makes, and how many of these.
    """

    name: str
    lower: Callable[[], Lowered]
    ideal_flops: int
    unit: str
    units: float


def work_of(config: Config) -> Work:
    """What a checked configuration asks for; reads config.json and the tokenizer, builds the data or finds it cached.

    Raises:
      UserError: see `configured_tasks`, `model_config` and `training_dataset`.
    """
    settings = _settings(config)
    tasks = configured_tasks(config.data)
    try:
        tokenizer = run_tokenizer(config, tasks)
    except UserError as error:
        if settings.scratch.enabled:
            raise
        logging.warning("the shapes are the paper's, as the tokenizer is not to be had (%s)", error)
        return papers_work(config)
    model = (
        scratch_model(settings.scratch, vocab_size=len(tokenizer))
        if settings.scratch.enabled
        else architecture(settings, settings.checkpoint)
    )
    dataset = training_dataset(config, tokenizer, tasks[TRAIN], row_multiple=1, share_prefix=True)
    return work_of_data(config, model, dataset)


def work_of_data(config: Config, model: ModelConfig, dataset: Dataset) -> Work:
    """What training a model on this data asks for."""

    @functools.cache
    def shapes(row_multiple: int) -> tuple[Shape, ...]:
        layout = dataclasses.replace(dataset.layout, row_multiple=row_multiple)
        return dataclasses.replace(dataset, layout=layout).shapes

    total = dataset.steps_per_epoch * config.train.epochs
    return Work(model, shapes, tuple(dataset.shared_prefix.tolist()), total, assumed=False)


def papers_work(config: Config) -> Work:
    """The paper's shapes for a configuration's model and batch size; reads no tokenizer."""

    def shapes(row_multiple: int) -> tuple[Shape, ...]:
        rows = -(-config.train.batch_size // row_multiple) * row_multiple
        return ((rows, _TOKENS, _POSITIONS, _ENTRIES),)

    settings = _settings(config)
    model = architecture(settings, settings.checkpoint)
    return Work(model, shapes, tuple(range(_SHARED)), _STEPS, assumed=True)


def _settings(config: Config) -> ModelSettings:
    """The settings of the model that a run begins with, which may be those of the run that makes it."""
    while config.model.base:
        config = base_config(config)
    return config.model


def row_multiple(config: Config, mesh: Mesh | AbstractMesh) -> int:
    """What the rows of a batch must be a multiple of, as the main job has it."""
    return num_shards("batch", mesh) * max(config.train.grad_accum_steps, 1)


def programs(
    work: Work, config: Config, mesh: Mesh | AbstractMesh, kinds: tuple[str, ...] = KINDS
) -> Iterator[Program]:
    """What a run of the configuration compiles on this mesh, the train step in each of its shapes first."""
    model = abstract_model(work.model, **model_options(config.model, mesh))
    for shape in work.shapes(row_multiple(config, mesh)) if "train" in kinds else ():
        yield train_program(work, config, model, shape)
    for program in _generation(work, config, model):
        if program.name.split()[0] in kinds:
            yield program


def train_program(work: Work, config: Config, model: Transformer, shape: Shape) -> Program:
    """The train step of a batch of this shape."""
    B, T, P, _ = shape
    mesh = model.mesh
    assert mesh is not None

    def lower() -> Lowered:
        parts, weights, frozen = split_model(model)
        options = step_options(
            model,
            config.train,
            target=config.data.target,
            seed=config.seed,
            shared_prefix=work.shared_prefix,
            total_steps=work.total_steps,
        )
        step = make_train_step(parts, options, state_shardings(weights, options.optimizer))
        state = abstract_state(weights, options.optimizer)
        parts_of_rows = row_multiple(config, mesh)
        kept_rows = -(-config.train.keep.rows // parts_of_rows) * parts_of_rows
        sizes = {"rows": kept_rows, "length": config.data.max_length}
        frozen, kept = abstract_kept(model, frozen, options.keep, **sizes)
        return step.lower(state, frozen, abstract_batch(shape, mesh), kept)  # type: ignore[attr-defined]

    operations = Operations.of(work.model, lora=config.model.lora.enabled)
    answers = {"tokens": B * T + len(work.shared_prefix), "steps": B * P}
    ideal = operations.count(**answers) + _ideal_of_kept(work, config, operations, answers)
    return Program(f"train {_times(shape)}", lower, ideal, "string", float(config.train.batch_size))


def _ideal_of_kept(work: Work, config: Config, operations: Operations, answers: Mapping[str, int]) -> int:
    """Operations of what a step keeps: of the model on the kept texts, and of its base, which has no gradient."""
    keep, base = config.train.keep, Operations.forward(work.model)
    if keep.weight == 0:
        return 0
    if keep.kind == "off_support":
        return base.count(**answers)
    texts = keep.rows * config.data.max_length
    own = operations.count(tokens=texts, steps=texts)
    if keep.kind == "replay":
        return own
    # The hidden states of a base that is trained in full were made before.
    return own + base.count(tokens=texts if config.model.lora.enabled else 0, steps=texts)


def _generation(work: Work, config: Config, model: Transformer) -> Iterator[Program]:
    """Sampling and scoring as the structured suite does them, and likelihoods of texts."""
    split, operations, shards = SplitModel.of(model), Operations.forward(work.model), num_shards("batch", model.mesh)
    _, T, P, _ = work.shapes(1)[-1]
    shared = len(work.shared_prefix)
    # Of an objective that sees whole tries at once the positions do not tell how long an answer is.
    answer = P if config.train.objective == "path" else min(P, _POSITIONS)
    length = bucket(shared + T - P, least=32)
    evaluation = config.eval
    sampling = SamplingSettings(evaluation.temperature, evaluation.top_p)
    sizes = decode_sizes(
        cache_bytes_per_token(model),
        length,
        requests=_PROMPTS,
        num_samples=max(evaluation.num_samples, 1),
        max_new_tokens=evaluation.max_new_tokens,
    )
    rows, draws = sizes.slots * sizes.rows[-1], sizes.slots * max(evaluation.num_samples, 1)
    count = min(bucket(sizes.prefilled, least=1, factor=4), sizes.slots)
    yield Program(
        f"prefill {count}x{length}",
        lambda: lower_prefill(split, rows=count, length=length),
        operations.count(tokens=count * length, steps=0),
        "prompt",
        float(count),
    )
    yield Program(
        f"decode {rows}x{evaluation.max_new_tokens}",
        lambda: lower_decode(
            split,
            prompts=sizes.slots,
            length=length,
            rows=rows,
            columns=evaluation.max_new_tokens,
            draws=draws,
            stop_ids=_STOP_IDS,
            method=sampling.method,
        ),
        operations.count(tokens=rows, steps=rows),
        "sample",
        rows / answer,
    )
    row = trie_scorer.row_length(answer - 1)
    rows = max(trie_scorer.TOKENS_PER_CALL * shards // row, 1)
    yield _scores(
        f"score {rows}x{row}", operations, rows * row, "prefix",
        lambda rows=rows: lower_trie_scores(split, prompt_length=length, rows=rows, length=row, targets=2 * rows * row),
    )  # fmt: skip
    row = text_scorer.ROW_LENGTH
    rows = max(text_scorer.TOKENS_PER_CALL // row, 1) * shards
    yield _scores(
        f"likelihood {rows}x{row}", operations, rows * row, "token",
        lambda: lower_text_scores(split, rows=rows, length=row, targets=2 * rows * row),
    )  # fmt: skip


def _scores(name: str, operations: Operations, tokens: int, unit: str, lower: Callable[[], Lowered]) -> Program:
    return Program(name, lower, operations.count(tokens=tokens, steps=tokens), unit, float(tokens))


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape))
