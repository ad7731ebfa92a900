"""What HLO texts cost, against counts by hand and against XLA's own count of programs without loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cft_jax.plan.hlo import Traffic, cost_of, parse

# As the TPU's compiler writes them: layouts with tiles, estimates in the configuration of the backend.
LOOP = """
HloModule jit_step, is_scheduled=true

%fused_computation.1 (param_0.1: bf16[8,16], param_1.1: bf16[16,32]) -> f32[8,32] {
  %param_0.1 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = f32[8,32]{1,0:T(8,128)} convolution(%param_0.1, %param_1.1), dim_labels=bf_io->bf
}

%body.1 (state: (s32[], f32[8,32])) -> (s32[], f32[8,32]) {
  %state = (s32[]{:T(128)}, f32[8,32]{1,0:T(8,128)}) parameter(0)
  %gathered = bf16[8,16]{1,0:T(8,128)(2,1)} all-gather(%piece), channel_id=1, dimensions={0}
  %piece = bf16[2,16]{1,0:T(8,128)(2,1)} constant({...})
  %weights = bf16[16,32]{1,0:T(8,128)(2,1)} constant({...})
  %fusion.1 = f32[8,32]{1,0:T(8,128)} fusion(%gathered, %weights), kind=kOutput, calls=%fused_computation.1, BACKEND100
  %scattered = f32[8,32]{1,0:T(8,128)} fusion(%fusion.1), kind=kCustom, calls=%none.1, BACKEND9223372036854775807
  ROOT %tuple = (s32[], f32[8,32]) tuple(%state, %scattered)
}

%none.1 (x: f32[8,32]) -> f32[8,32] {
  ROOT %x = f32[8,32]{1,0:T(8,128)} parameter(0)
}

%condition.1 (state.1: (s32[], f32[8,32])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[8,32]{1,0:T(8,128)}) parameter(0)
  %index = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %limit = s32[]{:T(128)} constant(28)
  ROOT %less = pred[]{:T(512)} compare(%index, %limit), direction=LT
}

%cheap (y: f32[8,32]) -> f32[8,32] {
  %y = f32[8,32]{1,0:T(8,128)} parameter(0)
  ROOT %copy.1 = f32[8,32]{0,1:T(8,128)} copy(%y), BACKEND7
}

%dear (z: f32[8,32]) -> f32[8,32] {
  %z = f32[8,32]{1,0:T(8,128)} parameter(0)
  ROOT %kernel = f32[8,32]{1,0} custom-call(%z), custom_call_target="tpu_custom_call", KERNEL
}

ENTRY %main.1 (argument: f32[8,32]) -> f32[8,32] {
  %argument = f32[8,32]{1,0:T(8,128)} parameter(0)
  %start = (s32[]{:T(128)}, f32[8,32]{1,0:T(8,128)}) tuple(%argument)
  %while.1 = (s32[]{:T(128)}, f32[8,32]{1,0:T(8,128)}) while(%start), condition=%condition.1, body=%body.1, TRIPS
  %value = f32[8,32]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
  %which = s32[] constant(0)
  %chosen = f32[8,32] conditional(%which, %value, %value), branch_computations={%cheap, %dear}
  %all-reduce-start.1 = f32[8,32] all-reduce-start(%chosen), to_apply=%add
  ROOT %all-reduce-done.1 = f32[8,32] all-reduce-done(%all-reduce-start.1), BACKEND3
}
""".replace("BACKEND", 'backend_config={"estimated_cycles":"')
LOOP = "\n".join(f'{line}"}}' if '"estimated_cycles' in line else line for line in LOOP.splitlines())
_ESTIMATE = '{"cost_estimate":{"flops":"64","bytes_accessed":"9"}}'
KERNEL = f'backend_config={{"custom_call_config":{_ESTIMATE},"estimated_cycles":"50"}}'


def text(trips=""):
    return LOOP.replace("KERNEL", KERNEL).replace(", TRIPS", trips)


@pytest.mark.parametrize(
    ("noted", "rounds"), [("", 28), (', backend_config={"known_trip_count":{"n":"5"}}', 5)], ids=["condition", "noted"]
)
def test_loops_count_as_often_as_they_run(noted, rounds):
    cost = cost_of(text(noted))
    # By hand: 100 cycles and 2 x 8 x 16 x 32 operations a round, the dearer branch, and a copy that ends a collective;
    # 8 x 16 numbers of two bytes gathered a round, 8 x 32 of four bytes summed once.
    assert cost.cycles == rounds * 100 + 50 + 3
    assert cost.flops == rounds * 2 * 8 * 16 * 32 + 64
    assert cost.collectives == {"all-gather": Traffic(rounds, rounds * 256), "all-reduce": Traffic(1, 1024)}


def test_a_loop_that_data_ends_counts_once():
    by_data = text().replace("constant(28)", "parameter(1)")
    assert cost_of(by_data) == cost_of(text(', {"known_trip_count":{"n":"1"}}'))


CHAIN = """\
HloModule chain

%piece.1 (x: bf16[2,8]) -> bf16[8,8] {
  %x = bf16[2,8] parameter(0)
  ROOT %gather.1 = bf16[8,8] all-gather(%x), channel_id=7, dimensions={0}, frontend_attributes={chain_id="0"}
}

%piece.2 (y: bf16[2,8]) -> bf16[8,8] {
  %y = bf16[2,8] parameter(0)
  ROOT %gather.2 = bf16[8,8] all-gather(%y), channel_id=7, dimensions={0}, frontend_attributes={chain_id="0"}
}

ENTRY %main (z: bf16[2,8]) -> bf16[8,8] {
  %z = bf16[2,8] parameter(0)
  %begun = bf16[8,8] fusion(%z), kind=kCustom, calls=%piece.1
  ROOT %done = bf16[8,8] fusion(%z), kind=kCustom, calls=%piece.2
}
"""


def test_a_collective_in_pieces_counts_once():
    assert cost_of(CHAIN).collectives == {"all-gather": Traffic(1, 128)}
    apart = CHAIN.replace("%y), channel_id=7", "%y), channel_id=8")
    assert cost_of(apart).collectives == {"all-gather": Traffic(2, 256)}


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule nothing")


@pytest.mark.parametrize(
    ("attributes", "shapes", "flops"),
    [
        # A batch of 5 products of 3x4 with 4x6, as the TPU's compiler writes it: each window meets one batch.
        ("window={size=5 stride=4 lhs_dilate=5}, dim_labels=0bf_0io->0bf", ((5, 3, 4), (5, 4, 6), (5, 3, 6)), 720),
        # A plain convolution over 8 positions with a window of 3 and padding of 1: 22 pairs, 2 of 24 fall outside.
        ("window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", ((2, 8, 4), (3, 4, 6), (2, 8, 6)), 2 * 2 * 4 * 6 * 22),
    ],
)
def test_convolutions(attributes, shapes, flops):
    left, right, out = ("f32[" + ",".join(map(str, shape)) + "]" for shape in shapes)
    lines = [
        f"ENTRY %main (a: {left}, b: {right}) -> {out} {{",
        f"  %a = {left}{{2,1,0}} parameter(0)",
        f"  %b = {right}{{2,1,0}} parameter(1)",
        f"  ROOT %c = {out}{{2,1,0}} convolution(%a, %b), {attributes}",
        "}",
    ]
    assert cost_of("\n".join(lines)).flops == flops


def test_as_xla_counts_where_nothing_loops():
    """XLA counts operations other than products too, so the function has few of them."""

    def products(x, y, kernel):
        return jnp.einsum("bij,bjk->bik", x, y), jax.lax.conv(x[:, None], kernel, (2, 1), "SAME")

    shapes = [(4, 16, 24), (4, 24, 8), (3, 1, 5, 3)]
    compiled = jax.jit(products).lower(*(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)).compile()
    expected = compiled.cost_analysis()["flops"]
    assert cost_of(compiled.as_text()).flops == pytest.approx(expected, rel=1e-3)


def test_a_scan_counts_its_rounds():
    def rounds(x):
        return jax.lax.scan(lambda carry, _: (carry @ carry, None), x, length=9)[0]

    compiled = jax.jit(rounds).lower(jax.ShapeDtypeStruct((32, 32), np.float32)).compile()
    assert cost_of(compiled.as_text()).flops == 9 * 2 * 32**3
