"""Listed values must come out of a model's tokens as they went in."""

import numpy as np
import pytest
from tokenizers import normalizers

from cft_jax.common.errors import UserError
from cft_jax.distributions import OutputSpace, PromptSpec, Task, task_from_spec
from cft_jax.text.values import check_values


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("a</s>", r"task custom_7: the value 'a</s>' becomes 'a' in"),
        ("cafe\u0301", r"the value 'cafe\\u0301' becomes 'caf\\xe9' in this tokenizer's tokens"),
        ("caf\u00e9", None),
        (" spaces and\nlines ", None),
        ("0.50", None),
    ],
)
def test_values_that_cannot_be_answered_are_refused(small_tokenizer, value, problem):
    small_tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # as Qwen3's
    asked = ({"role": "user", "content": "q"},)
    task = Task("train", "custom", "custom_7", asked, space=OutputSpace(("other", value), np.array([0.5, 0.5])))
    family = task_from_spec(PromptSpec("train", "poisson", "p", {"lambda": 2.0}, "q"))
    if problem is None:
        check_values(small_tokenizer, [family, task])
    else:
        with pytest.raises(UserError, match=problem):
            check_values(small_tokenizer, [family, task])
