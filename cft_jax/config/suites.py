"""The settings of evaluations: `config.eval` for all suites, `config.suite` for each one's own.

`cft_jax.config` puts them into the configuration of a run.
"""

from dataclasses import dataclass, field

from cft_jax.config.records import at_least, fraction, one_of, ruled, share, some_of

RETENTION_TASKS = ("tiny_mmlu", "tiny_hellaswag", "tiny_truthfulqa", "tiny_winogrande", "tiny_gsm8k")
# Seven topics of two halves each: with fewer questions there would be nothing to take a mean of.
QUESTION_GROUPS = 14


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation before and after training, and what the suites share; zero prompts per split means all of them.

    With more than one number per completion (the protocol `batch`) each completion is asked for so many, separated by
    commas, and only samples are measured. `max_new_tokens` is of the structured suite. `method` is how sampled suites
    ask: `direct`, or `ssot`, String Seed of Thought (arXiv 2510.21150).
    """

    enabled: bool = True
    # Which there are, evaluate/suites/registry.py knows.
    suites: tuple[str, ...] = ("structured",)
    max_prompts_per_split: int = at_least(0, 0)
    num_samples: int = at_least(0, 1000)
    seeds: tuple[int, ...] = (11,)
    max_new_tokens: int = at_least(1, 32)
    temperature: float = at_least(0, 1.0)
    top_p: float = share(1.0)
    numbers_per_completion: int = at_least(1, 1)
    method: str = one_of("direct", "ssot")


@dataclass(frozen=True)
class SsotConfig:
    """String Seed of Thought: tokens of a completion, and whether only an `<answer>` counts as one.

    `thinking` asks the template for the model's own reasoning channel: `auto` where it has one.
    """

    max_new_tokens: int = at_least(1, 4096)
    strict: bool = False
    thinking: str = one_of("auto", "on", "off")


@dataclass(frozen=True)
class OpenRandomConfig:
    """Open-ended prompts: `prompts` is a JSON list of texts, empty for the package's own.

    `num_samples=0` stands for `eval.num_samples`.
    """

    prompts: str = ""
    num_samples: int = at_least(0, 100)
    max_new_tokens: int = at_least(1, 64)


@dataclass(frozen=True)
class McqConfig:
    """Multiple-choice questions: `prompt` is a text file, empty for the package's own; 0 samples as `eval` says."""

    prompt: str = ""
    num_samples: int = at_least(0, 0)
    max_new_tokens: int = at_least(1, 512)


@dataclass(frozen=True)
class QuestionsConfig:
    """The package's own questions: how many of them, evenly of every topic and half; 0 for all."""

    num_questions: int = ruled(
        0, lambda number: number == 0 or number >= QUESTION_GROUPS, f"0 for all, or at least {QUESTION_GROUPS}"
    )


@dataclass(frozen=True)
class NoveltyBenchConfig:
    """NoveltyBench: prompts (JSONL file or hub id), the two judges (hub ids or directories), and what runs now.

    `num_samples=0` stands for `eval.num_samples`. `classifier_tokenizer` is taken where the classifier brings none, as
    the published one. `scorer_batch` is of both judges; their dtypes are those of NoveltyBench's own code.
    """

    data: str = "yimingzhang/novelty-bench"
    splits: tuple[str, ...] = ("curated", "wildchat")
    num_samples: int = at_least(0, 10)
    max_new_tokens: int = at_least(1, 512)
    classifier: str = "yimingzhang/deberta-v3-large-generation-similarity"
    classifier_tokenizer: str = "microsoft/deberta-v3-large"
    classifier_dtype: str = one_of("float32", "bfloat16", "float16")
    threshold: float = fraction(0.102)
    reward_model: str = "Skywork/Skywork-Reward-Gemma-2-27B-v0.2"
    reward_dtype: str = one_of("bfloat16", "float32", "float16")
    patience: float = share(0.8)
    scorer_batch: int = at_least(1, 16)
    stages: tuple[str, ...] = some_of("generate", "partition", "score")


@dataclass(frozen=True)
class PerplexityConfig:
    """Texts in PALOMA's layout under `data`, and how they are cut into windows.

    `slices` are directories of `data`, empty for all there are; `max_documents` is by file, 0 for all.
    """

    data: str = ""
    slices: tuple[str, ...] = ()
    split: str = "test"
    context_length: int = at_least(2, 2048)
    stride: int = at_least(1, 1024)
    windows: tuple[str, ...] = some_of("paper", "covering")
    max_documents: int = at_least(0, 0)


@dataclass(frozen=True)
class RetentionConfig:
    """TinyBenchmarks: tasks, a directory of local data (empty for the hub), and the published item parameters.

    `duplicate_bos` tokenises rendered chats with special tokens added once more, as the paper did.
    """

    tasks: tuple[str, ...] = some_of(*RETENTION_TASKS)
    data: str = ""
    item_parameters: str = ""
    max_new_tokens: int = at_least(1, 256)
    duplicate_bos: bool = True


@dataclass(frozen=True)
class LmEvalConfig:
    """How lm-eval asks the tasks that `config.tasks` names; -1 examples and limit 0 leave both to the task.

    `max_length` is lm-eval's argument of that name: tokens of a row, beyond which a context loses its beginning.
    """

    num_fewshot: int = at_least(-1, -1)
    limit: int = at_least(0, 0)
    apply_chat_template: bool = False
    max_length: int = at_least(2, 4096)
    include_path: str = ""


@dataclass(frozen=True)
class SuiteConfig:
    """What belongs to one suite each."""

    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    ssot: SsotConfig = field(default_factory=SsotConfig)
    open_random: OpenRandomConfig = field(default_factory=OpenRandomConfig)
    mcq: McqConfig = field(default_factory=McqConfig)
    noveltybench: NoveltyBenchConfig = field(default_factory=NoveltyBenchConfig)
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)
