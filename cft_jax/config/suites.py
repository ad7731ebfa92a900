"""The settings of evaluations: `config.eval` for all suites, `config.suite` for each one's own.

`cft_jax.config` puts them into the configuration of a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

SUITES = ("structured", "open_random", "mcq", "noveltybench", "perplexity", "retention")
METHODS = ("direct", "ssot")
NOVELTYBENCH_STAGES = ("generate", "partition", "score")
PERPLEXITY_WINDOWS = ("paper", "covering")
RETENTION_TASKS = ("tiny_mmlu", "tiny_hellaswag", "tiny_truthfulqa", "tiny_winogrande", "tiny_gsm8k")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation before and after training, and what the suites share; zero prompts per split means all of them.

    With more than one number per completion (the protocol `batch`) each completion is asked for so many, separated by
    commas, and only samples are measured. `max_new_tokens` is of the structured suite. `method` is how sampled suites
    ask: `direct`, or `ssot`, String Seed of Thought (arXiv 2510.21150).
    """

    enabled: bool = True
    suites: tuple[str, ...] = ("structured",)
    max_prompts_per_split: int = 0
    num_samples: int = 1000
    seeds: tuple[int, ...] = (11,)
    max_new_tokens: int = 32
    temperature: float = 1.0
    top_p: float = 1.0
    numbers_per_completion: int = 1
    method: str = "direct"


@dataclass(frozen=True)
class SsotConfig:
    """String Seed of Thought: tokens of a completion, and whether only an `<answer>` counts as one.

    `thinking` asks the template for the model's own reasoning channel: `auto` where it has one.
    """

    max_new_tokens: int = 4096
    strict: bool = False
    thinking: str = "auto"


@dataclass(frozen=True)
class OpenRandomConfig:
    """Open-ended prompts: `prompts` is a JSON list of texts, empty for the package's own.

    `num_samples=0` stands for `eval.num_samples`.
    """

    prompts: str = ""
    num_samples: int = 100
    max_new_tokens: int = 64


@dataclass(frozen=True)
class McqConfig:
    """Multiple-choice questions: `prompt` is a text file, empty for the package's own; 0 samples as `eval` says."""

    prompt: str = ""
    num_samples: int = 0
    max_new_tokens: int = 512


@dataclass(frozen=True)
class NoveltyBenchConfig:
    """NoveltyBench: prompts (JSONL file or hub id), the two scorers (hub ids or directories), and what runs now.

    `num_samples=0` stands for `eval.num_samples`. `classifier_tokenizer` is taken where the classifier brings none, as
    the published one. `scorer_batch` is of both scorers; their dtypes are those of NoveltyBench's own code.
    """

    data: str = "yimingzhang/novelty-bench"
    splits: tuple[str, ...] = ("curated", "wildchat")
    num_samples: int = 10
    max_new_tokens: int = 512
    classifier: str = "yimingzhang/deberta-v3-large-generation-similarity"
    classifier_tokenizer: str = "microsoft/deberta-v3-large"
    classifier_dtype: str = "float32"
    threshold: float = 0.102
    reward_model: str = "Skywork/Skywork-Reward-Gemma-2-27B-v0.2"
    reward_dtype: str = "bfloat16"
    patience: float = 0.8
    scorer_batch: int = 16
    stages: tuple[str, ...] = NOVELTYBENCH_STAGES


@dataclass(frozen=True)
class PerplexityConfig:
    """Texts in PALOMA's layout under `data`, and how they are cut into windows.

    `slices` are directories of `data`, empty for all there are; `max_documents` is by file, 0 for all.
    """

    data: str = ""
    slices: tuple[str, ...] = ()
    split: str = "test"
    context_length: int = 2048
    stride: int = 1024
    windows: tuple[str, ...] = PERPLEXITY_WINDOWS
    max_documents: int = 0


@dataclass(frozen=True)
class RetentionConfig:
    """TinyBenchmarks: tasks, a directory of local data (empty for the hub), and the published item parameters.

    `duplicate_bos` tokenises rendered chats with special tokens added once more, as the paper did.
    """

    tasks: tuple[str, ...] = RETENTION_TASKS
    data: str = ""
    item_parameters: str = ""
    max_new_tokens: int = 256
    duplicate_bos: bool = True


@dataclass(frozen=True)
class LmEvalConfig:
    """How lm-eval asks the tasks that `config.tasks` names; -1 examples and limit 0 leave both to the task.

    `max_length` is lm-eval's argument of that name: tokens of a row, beyond which a context loses its beginning.
    """

    num_fewshot: int = -1
    limit: int = 0
    apply_chat_template: bool = False
    max_length: int = 4096
    include_path: str = ""


@dataclass(frozen=True)
class SuiteConfig:
    """What belongs to one suite each."""

    ssot: SsotConfig = field(default_factory=SsotConfig)
    open_random: OpenRandomConfig = field(default_factory=OpenRandomConfig)
    mcq: McqConfig = field(default_factory=McqConfig)
    noveltybench: NoveltyBenchConfig = field(default_factory=NoveltyBenchConfig)
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)


def eval_problems(evaluation: EvalConfig) -> list[str]:
    """What is wrong with `config.eval`, a sentence each."""
    found = [
        f"config.eval.suites has {name!r}; suites are {', '.join(SUITES)}"
        for name in evaluation.suites
        if name not in SUITES
    ]
    found += _at_least(
        "eval",
        [
            ("max_prompts_per_split", evaluation.max_prompts_per_split, 0),
            ("num_samples", evaluation.num_samples, 0),
            ("max_new_tokens", evaluation.max_new_tokens, 1),
            ("numbers_per_completion", evaluation.numbers_per_completion, 1),
            ("temperature", evaluation.temperature, 0),
        ],
    )
    if not 0 < evaluation.top_p <= 1:
        found.append(f"config.eval.top_p={evaluation.top_p} must be in (0, 1]")
    found += _one_of("eval.method", evaluation.method, METHODS)
    if evaluation.method == "ssot" and evaluation.numbers_per_completion > 1:
        found.append("config.eval.method=ssot asks for one answer; set config.eval.numbers_per_completion=1")
    return found


def suite_problems(suite: SuiteConfig) -> list[str]:
    """What is wrong with `config.suite`, a sentence each."""
    return [
        *_at_least("suite.ssot", [("max_new_tokens", suite.ssot.max_new_tokens, 1)]),
        *_one_of("suite.ssot.thinking", suite.ssot.thinking, ("auto", "on", "off")),
        *_sampled_problems("suite.open_random", suite.open_random),
        *_sampled_problems("suite.mcq", suite.mcq),
        *_noveltybench_problems(suite.noveltybench),
        *_perplexity_problems(suite.perplexity),
        *_retention_problems(suite.retention),
        *_at_least(
            "suite.lm_eval",
            [
                ("num_fewshot", suite.lm_eval.num_fewshot, -1),
                ("limit", suite.lm_eval.limit, 0),
                ("max_length", suite.lm_eval.max_length, 2),
            ],
        ),
    ]


def _sampled_problems(path: str, record: OpenRandomConfig | McqConfig | NoveltyBenchConfig) -> list[str]:
    ranges = [("num_samples", record.num_samples, 0), ("max_new_tokens", record.max_new_tokens, 1)]
    return _at_least(path, ranges)


def _noveltybench_problems(record: NoveltyBenchConfig) -> list[str]:
    path = "suite.noveltybench"
    found = _sampled_problems(path, record)
    found += _at_least(path, [("scorer_batch", record.scorer_batch, 1)])
    for name in ("classifier_dtype", "reward_dtype"):
        found += _one_of(f"{path}.{name}", getattr(record, name), ("bfloat16", "float32", "float16"))
    for stage in record.stages:
        found += _one_of(f"{path}.stages", stage, NOVELTYBENCH_STAGES)
    if not record.stages:
        found.append(f"config.{path}.stages is empty; it takes some of {', '.join(NOVELTYBENCH_STAGES)}")
    if not 0 <= record.threshold < 1:
        found.append(f"config.{path}.threshold={record.threshold} must be in [0, 1)")
    if not 0 < record.patience <= 1:
        found.append(f"config.{path}.patience={record.patience} must be in (0, 1]")
    return found


def _perplexity_problems(record: PerplexityConfig) -> list[str]:
    path = "suite.perplexity"
    found = _at_least(path, [("context_length", record.context_length, 2), ("max_documents", record.max_documents, 0)])
    if not 1 <= record.stride <= record.context_length:
        found.append(f"config.{path}.stride={record.stride} must be between 1 and context_length")
    if not record.windows or not set(record.windows) <= set(PERPLEXITY_WINDOWS):
        found.append(f"config.{path}.windows={record.windows} takes one or both of {', '.join(PERPLEXITY_WINDOWS)}")
    return found


def _retention_problems(record: RetentionConfig) -> list[str]:
    path = "suite.retention"
    found = _at_least(path, [("max_new_tokens", record.max_new_tokens, 1)])
    for task in record.tasks:
        found += _one_of(f"{path}.tasks", task, RETENTION_TASKS)
    return found


def _at_least(path: str, ranges: Sequence[tuple[str, float | int, int]]) -> list[str]:
    return [f"config.{path}.{name}={got} must be at least {low}" for name, got, low in ranges if not got >= low]


def _one_of(path: str, got: str, allowed: tuple[str, ...]) -> list[str]:
    return [] if got in allowed else [f"config.{path}={got!r} must be one of {', '.join(allowed)}"]
