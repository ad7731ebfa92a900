"""Settings of every test: eight simulated CPU devices, strict ranks, golden values, the real tokenizers if present."""

import gc
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Compiling small programs is most of the tests' work. Without LLVM's optimisation, without the emitters of fused loops
# through MLIR and without threads of its own, XLA compiles a step of training on eight devices in a sixth of the time
# (jaxlib 0.10.2 and 0.11.2); their results differ by rounding. Processes that tests start inherit the flags. What comes
# later wins, so that the caller's own flags do.
_XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)
os.environ["XLA_FLAGS"] = " ".join((*_XLA_FLAGS, os.environ.get("XLA_FLAGS", "")))
# Torch, too, is given small things to compute, by as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Linux lets a process have 65,530 mappings; XLA's programs take some each, and it aborts when there are no more.
_MAPPINGS = Path("/proc/self/maps")
_MANY_MAPPINGS = 20_000

GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_finish():
    """Spares the garbage collector what is imported, and rare walks through what JAX keeps: an eighth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="module", autouse=True)
def programs_dropped():
    """Drops compiled programs after a module when there are so many that the process would end at a system limit."""
    yield
    if "jax" in sys.modules and _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > _MANY_MAPPINGS:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def golden() -> Path:
    """Directory of golden values; its README defines every file."""
    return GOLDEN


@pytest.fixture(scope="session")
def tokenizers_dir() -> Path:
    """Directory with the real tokenizers `llama3`, `qwen3`, `gemma3`, `gpt_oss`; skips where it is absent."""
    path = os.environ.get("CFT_TOKENIZERS", "")
    if not path or not Path(path).is_dir():
        pytest.skip("CFT_TOKENIZERS does not name a directory with the real tokenizers")
    return Path(path)


_CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role[0] }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>a\n{% endif %}"
)


@pytest.fixture
def small_tokenizer():
    """A byte-level BPE tokenizer with a few merges, among them of digits in ways that real ones do not join."""
    # Imported here: most tests need no transformers, which takes seconds to import.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("1", "2"), ("0", "0"), ("a", "b"), ("ab", "c"), (".", "5"), ("t", "e"), ("te", "n")]
    vocabulary = [*alphabet, *("".join(pair) for pair in merges)]
    rust = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(vocabulary)}, merges=merges))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def write_hf():
    """Writes a random checkpoint in HF format, by torch and transformers, and returns the float32 torch model."""

    def write(directory: Path, config, *, seed: int = 0, dtype: str = "float32", max_shard_size: str = "5GB"):
        import torch
        import transformers

        generator = torch.Generator().manual_seed(seed)
        model_class = getattr(transformers, config.architectures[0])
        torch.manual_seed(seed)  # vectors keep the values that the model's own initialisation draws
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    # Larger than training would leave them, so that logits and attention are far from uniform.
                    parameter.normal_(0, 1.1 / parameter.shape[-1] ** 0.5, generator=generator)
                else:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
        # Loaded again: `to` has rounded the rotary frequencies too.
        return model_class.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()

    return write


_HF_SIZES = {
    "llama": {
        "vocab_size": 97,
        "hidden_size": 60,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 70.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "tie_word_embeddings": False,
    },
    "qwen3": {
        "vocab_size": 89,
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "vocab_size": 101,
        "hidden_size": 36,
        "intermediate_size": 52,
        # One whole period of windows and the beginning of the next.
        "num_hidden_layers": 5,
        "sliding_window_pattern": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 14,
        "query_pre_attn_scalar": 11,
        "sliding_window": 7,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 40.0},
        },
    },
    "gpt_oss": {
        "vocab_size": 103,
        "hidden_size": 40,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "sliding_window": 5,
        "max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 16.0,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "truncate": False,
            "original_max_position_embeddings": 8,
        },
    },
}


@pytest.fixture(scope="session")
def hf_config():
    """Small configs of transformers: sizes pairwise distinct, ropes scaled within a few tokens, short windows."""

    def make(family: str, **changes):
        import transformers

        if family == "gemma3":
            text = make("gemma3_text", **changes).to_dict()
            vision = {
                "hidden_size": 16,
                "intermediate_size": 26,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            }
            return transformers.Gemma3Config(
                text_config=text,
                vision_config=vision,
                mm_tokens_per_image=4,
                image_token_index=100,
                architectures=["Gemma3ForConditionalGeneration"],
            )
        config_class, model_class = {
            "llama": (transformers.LlamaConfig, "LlamaForCausalLM"),
            "qwen3": (transformers.Qwen3Config, "Qwen3ForCausalLM"),
            "gemma3_text": (transformers.Gemma3TextConfig, "Gemma3ForCausalLM"),
            "gpt_oss": (transformers.GptOssConfig, "GptOssForCausalLM"),
        }[family]
        return config_class(**(_HF_SIZES[family] | changes), architectures=[model_class])

    return make


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory) -> Path:
    """A directory of this session of tests, the same for all its workers."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    directory.mkdir(exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def program_cache(shared_dir) -> Path:
    """Directory of compiled programs, shared by the runs of a test session, in this process and in others."""
    import jax

    directory = shared_dir / "programs"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return directory


@pytest.fixture
def log_restored():
    """For tests that run a command in this process: puts the verbosity back that it sets."""
    from absl import logging

    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="session")
def configured(shared_dir):
    """Reads a config file with overrides (`train.epochs=2`) as the commands do; the data cache is a fresh one."""
    from cft_jax.config import load_config

    cache = shared_dir / "data"
    return lambda file, *overrides: load_config(str(file), [f"data.cache_dir={cache}", *overrides])


TINY = Path(__file__).parent / "configs" / "tiny.py"


@pytest.fixture(scope="session")
def tiny_run(shared_dir, configured, program_cache):
    """Directory of a finished run of `configs/tiny.py`, four steps of its six, and what `run` returned.

    For reading: it is made once for all tests. The worker that comes second finds it finished.
    """
    from filelock import FileLock

    from cft_jax.main import run

    with FileLock(shared_dir / "tiny_run.lock"):
        return shared_dir / "tiny_run", run(configured(TINY, "train.max_steps=4"), shared_dir / "tiny_run")


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Path:
    """The directory behind addresses gs://bucket/..., which epath reaches as it does a store."""
    from etils.epath import backend, gpath

    from cft_jax.common.storage import google_answers

    root = tmp_path / "store"

    class Bucket(backend._OsPathBackend):
        """epath's backend of local files, for addresses gs://NAME/... that lie under a directory."""

        def __getattribute__(self, name):
            found = super().__getattribute__(name)
            if name.startswith("_") or not callable(found):
                return found

            def call(path, *args, **kwargs):
                assert path.startswith("gs://"), path
                return found(str(root / path.removeprefix("gs://")), *args, **kwargs)

            return call

    (root / "bucket").mkdir(parents=True)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "here")
    google_answers.cache_clear()
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Bucket())
    return root / "bucket"


@pytest.fixture(scope="session")
def start_command(tmp_path_factory, program_cache):
    """Starts `python -m cft_jax.<name>` with its arguments on one CPU device; returns the process."""
    import subprocess
    import sys

    home = tmp_path_factory.mktemp("home")

    def start(name: str, *arguments: str | Path) -> subprocess.Popen[str]:
        environment = os.environ | {
            "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1",
            "XDG_CACHE_HOME": str(home),
            "JAX_COMPILATION_CACHE_DIR": str(program_cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        return subprocess.Popen(
            [sys.executable, "-m", f"cft_jax.{name}", *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="session")
def command(start_command):
    """Runs a command to its end; returns exit code, stdout and stderr."""

    def run(name: str, *arguments: str | Path) -> tuple[int, str, str]:
        process = start_command(name, *arguments)
        try:
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
        return process.returncode, out, err

    return run
