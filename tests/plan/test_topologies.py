"""Accelerators by name."""

import pytest

from cft_jax.common.errors import UserError
from cft_jax.plan.topologies import larger, topology


@pytest.mark.parametrize(
    ("name", "devices", "libtpu"),
    [
        # cloud.google.com/tpu/docs: v5litepod-N and v6e-N count chips, v4-N and v5p-N cores, of which a chip has two.
        ("v5litepod-16", 16, "v5e:4x4"),
        ("v5e-1", 1, "v5e:1x1"),
        ("v5e-256", 256, "v5e:16x16"),
        ("V6E-8", 8, "v6e:2x4"),
        ("v5p-8", 4, "v5p:2x2x1"),
        ("v5p-128", 64, "v5p:4x4x4"),
        ("tpu-v4-8", 4, "v4:2x2x1"),
        ("tpu7x-8", 8, "tpu7x:2x2x1"),
        ("h100-8", 8, ""),
        ("8xH100", 8, ""),
    ],
)
def test_names_as_people_write_them(name, devices, libtpu):
    found = topology(name)
    assert (found.devices, found.libtpu) == (devices, libtpu)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("v6-8", "v6e-8"), ("v5litepod-12", "v5e-8"), ("v5p-4", "v5p-8"), ("h10-8", "h100-8"), ("v5e", "v5e-8"), ("", "")],
)
def test_unknown_names_are_told_with_the_nearest(name, nearest):
    with pytest.raises(UserError, match=f"--topology={name} is unknown; the nearest is {nearest}"):
        topology(name)


def test_larger_ones_ascend_within_a_kind():
    assert [one.name for one in larger(topology("v5p-64"))] == ["v5p-128", "v5p-256", "v5p-512"]
