"""Probabilities may differ between machines by rounding; what they decide, such as prompts and chosen strings, may not.

Digests of this process against those of others, in which NumPy's and the C library's code for newer CPUs is switched
off step by step, with other hash seeds and in another locale.
"""

import hashlib
import json
import locale
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cft_jax.data.order import epoch_order, uniform_draws
from cft_jax.data.spaces import SpaceTable
from cft_jax.distributions import PromptSpec, build_splits, number_space
from cft_jax.distributions.analytic_space import analytic_space
from cft_jax.distributions.output_space import inner_integers
from cft_jax.text.analytic_trie import AnalyticTrie
from cft_jax.text.chat import ChatOptions, encode_chats
from cft_jax.text.digits import DigitTokens
from cft_jax.text.number_grammar import NumberTokens
from cft_jax.text.scratch import train_tokenizer
from cft_jax.text.tokenizer import fingerprint

# As a tokenizer could number them: "-", ".", digits and the terminator.
TOKENS = NumberTokens(DigitTokens(1, (np.arange(2, 12),), 0, 1), 12)
# Symmetric, so that prefixes come in pairs of equal probability.
SYMMETRIC = {
    "laplace": {"mu": 0.0, "b": 1.0},
    "cauchy": {"x0": 0.0, "gamma": 1.0},
    "gaussian": {"mu": 0.0, "sigma": 1.0},
    "binomial": {"n": 5000.0, "p": 0.5},
}
# The quantiles are multiples of the step but for rounding.
EXACT_CUTS = {
    "pareto": {"alpha": 3.0, "xm": 1.0},
    "lomax": {"alpha": 1.5, "lambda": 0.5},
    "geometric": {"p": 0.5},
}


def digest(*parts):
    """SHA-256 of lines."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def spec_of(family_id, parameters):
    return PromptSpec("train", family_id, family_id, parameters, "")


def splits():
    kinds = {
        "paper": {},
        "selected": {"selection": "paper_selected"},
        "inside": {"unseen": "inside"},
        "seven": {"grid_points": 7},
    }
    for name, options in kinds.items():
        specs = [spec for members in build_splits(**options).values() for spec in members]
        yield name, digest(*((s.split, s.distribution_id, s.prompt, list(s.parameters.values())) for s in specs))


def values():
    """The strings of listed and full spaces, by what makes them."""
    specs = [spec for members in build_splits(selection="paper_selected").values() for spec in members][::60]
    specs += [spec_of(*pair) for pair in EXACT_CUTS.items()]
    for low, high in ((0.001, 0.999), (0.25, 0.75), (0.0625, 0.9375)):
        found = [number_space(s, num_decimals=5, max_bins=1001, quantile_low=low, quantile_high=high) for s in specs]
        yield f"grid {low}", digest(*((s.first, s.range_size, s.probabilities.size) for s in found))
    found = [analytic_space(spec, num_decimals=3, quantile=1e-9) for spec in specs]
    yield "full", digest(*((space.first, space.last) for space in found))


def draws():
    spaces = [number_space(spec_of(*pair), num_decimals=5, max_bins=9001) for pair in SYMMETRIC.items()]
    spaces += [analytic_space(spec_of(*pair), num_decimals=2, quantile=1e-9) for pair in SYMMETRIC.items()]
    uniforms = uniform_draws(0, len(spaces) * 500, seed=11, epoch=0).reshape(len(spaces), -1)
    for half in (slice(4), slice(4, 8)):
        yield f"draws {half.start}", digest(*SpaceTable(spaces[half]).draw(np.arange(4), uniforms[half]).ravel())
    yield "order", digest(*epoch_order(["b", "a", "b", "c"] * 9, 2, seed=11, epoch=3))


def prefixes():
    """Which prefixes are scored whole, the most probable ones."""
    for family_id, parameters in SYMMETRIC.items():
        trie = AnalyticTrie(analytic_space(spec_of(family_id, parameters), num_decimals=2, quantile=1e-9), TOKENS)
        part = trie.expand(64, 32, np.zeros(0, dtype=np.int64))
        yield f"prefixes {family_id}", digest(*part.trie.token, *part.trie.parent, *part.exact)


def prompts():
    tokenizer = train_tokenizer(["Today: 26 Jul 2024, a b c, a b c", "0.12, 0.13"])
    tokenizer.chat_template = '{{ strftime_now("%A %a %d %B %b %Y %%B") }}' + tokenizer.chat_template
    yield "tokenizer", fingerprint(tokenizer)
    yield "date", str(encode_chats(tokenizer, [[{"role": "user", "content": "a"}]], ChatOptions()))


def identities():
    """All digests by name."""
    return dict(pair for part in (splits, values, draws, prefixes, prompts) for pair in part())


def cpu_features():
    """Names of what NumPy has code for beyond its baseline and this CPU has, oldest first."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    return [name for name in __cpu_dispatch__ if __cpu_features__[name]]


def other_locale():
    """A locale that is neither C nor English, where the system has one."""
    try:
        names = subprocess.run(["locale", "-a"], capture_output=True, text=True).stdout.split()
    except FileNotFoundError:
        return "C.UTF-8"
    return next((name for name in names if not name.startswith(("C", "POSIX", "en"))), "C.UTF-8")


def test_the_same_on_every_cpu_and_in_every_locale():
    features = cpu_features()
    newest = [name for name in features if name.startswith("AVX512") or name == "X86_V4"]
    environments = (
        {"NPY_DISABLE_CPU_FEATURES": " ".join(newest), "LC_ALL": other_locale()},
        {
            "NPY_DISABLE_CPU_FEATURES": " ".join(features),
            "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX2,-FMA,-FMA4",
        },
    )
    processes = [
        subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONHASHSEED": str(seed)} | environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed, environment in enumerate(environments)
    ]
    here = identities()
    for process in processes:
        assert json.loads(process.communicate()[0]) == here


@pytest.mark.parametrize("cut", [5e5, -5e5, 0.0, 1e6, 3.25])
def test_the_last_digits_of_a_quantile_decide_nothing(cut):
    beside = [cut - 1e-10 * max(1, abs(cut)), cut, np.nextafter(cut, 2e6), cut + 1e-13 * max(1, abs(cut))]
    assert len({inner_integers(low, 2e6 + 0.5, rounding=2.0**-40)[0] for low in beside[1:]}) == 1
    assert len({inner_integers(-2e6 - 0.5, high, rounding=2.0**-40)[1] for high in beside[1:]}) == 1
    assert inner_integers(-7.5, 9.5, rounding=2.0**-40) == (-7, 9)


if __name__ == "__main__":
    locale.setlocale(locale.LC_ALL, "")
    json.dump(identities(), sys.stdout)
