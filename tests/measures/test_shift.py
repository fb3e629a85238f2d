"""Reciprocal Activation Shift against a re-derivation in plain loops, and its guards one by one."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rim_lens.errors import NotEnoughData, NotFinite, ReferenceMismatch, StatisticsError
from rim_lens.measures.shift import one_sided_shift, reciprocal_activation_shift

# A shared machine may be slow for a moment; that is no failure.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 6))
POSITIVE = st.floats(0.01, 10.0)
# Multiples of 1/64: sums are exact, so that an average is the same in any order and a zero is a zero.
SIGNED = st.integers(-320, 320).map(lambda number: number / 64)


def loop_delta(base, tuned, average, direction):
    """δ as METHOD's formula reads, one neuron at a time, over lists of lists [prompt][neuron]; None where undefined."""
    n_prompts, n = len(base), len(base[0])
    if average == "prompts_first":
        base = [[sum(row[j] for row in base) / n_prompts for j in range(n)]]
        tuned = [[sum(row[j] for row in tuned) / n_prompts for j in range(n)]]
    per_prompt, excluded = [], 0
    for before, after in zip(base, tuned, strict=True):
        total, usable = 0.0, 0
        for a0, at in zip(before, after, strict=True):
            if a0 <= 0 or at <= 0:
                excluded += 1
                continue
            usable += 1
            if direction == "down" and a0 > at:
                total += ((a0 - at) / at) * a0
            if direction == "up" and at > a0:
                total += ((at - a0) / a0) * at
        if usable:
            per_prompt.append(total / n)
    return (sum(per_prompt) / len(per_prompt) if per_prompt else None), excluded


def loop_ras(drop, rise):
    if drop is None or rise is None:
        return math.nan
    return 0.0 if drop == 0 or rise == 0 else 2 * drop * rise / (drop + rise)


@st.composite
def four_arrays(draw, elements):
    n = draw(st.integers(1, 6))
    safety, reasoning = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return [
        draw(hnp.arrays(np.float64, (rows, n), elements=elements))
        for rows in (safety, safety, reasoning, reasoning)
    ]


@settings(UNHURRIED, max_examples=40)
@given(arrays=four_arrays(SIGNED), average=st.sampled_from(["prompts_first", "after"]))
def test_equals_the_formula_in_plain_loops(arrays, average):
    shift = reciprocal_activation_shift(*arrays, average=average)
    b_safe, t_safe, b_task, t_task = (array.tolist() for array in arrays)
    drop, drop_excluded = loop_delta(b_safe, t_safe, average, "down")
    rise, rise_excluded = loop_delta(b_task, t_task, average, "up")
    assert shift.safety_drop == pytest.approx(math.nan if drop is None else drop, rel=1e-9, nan_ok=True)
    assert shift.reasoning_rise == pytest.approx(math.nan if rise is None else rise, rel=1e-9, nan_ok=True)
    assert shift.value == pytest.approx(loop_ras(drop, rise), rel=1e-9, nan_ok=True)
    assert shift.n_excluded == (drop_excluded, rise_excluded)
    assert (shift.reason is None) == (drop is not None and rise is not None)
    rows = (1, 1) if average == "prompts_first" else (len(b_safe), len(b_task))
    assert shift.n_used == tuple(
        count * shift.n - out for count, out in zip(rows, shift.n_excluded, strict=True)
    )


def test_a_case_worked_by_hand():
    # Safety: neuron 0 falls 4 → 2: (4−2)/2·4 = 4; neuron 1 rises, 0; neuron 2 stays. δ⁻ = 4/3.
    # Reasoning: neuron 1 rises 1 → 3: (3−1)/1·3 = 6. δ⁺ = 2.
    shift = reciprocal_activation_shift([4.0, 1.0, 1.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1.0], [0.5, 3.0, 1.0])
    assert shift.safety_drop == pytest.approx(4 / 3)
    assert shift.reasoning_rise == pytest.approx(2.0)
    assert shift.value == pytest.approx(2 * (4 / 3) * 2 / (4 / 3 + 2))
    assert shift.arithmetic == pytest.approx(5 / 3)
    assert shift.geometric == pytest.approx(math.sqrt(8 / 3))
    assert shift.minimum == pytest.approx(4 / 3)
    assert shift.product == pytest.approx(8 / 3)
    assert shift.n == 3
    assert shift.n_used == (3, 3)
    assert shift.n_moved == (1, 1)
    assert shift.n_prompts == (0, 0)


@settings(UNHURRIED, max_examples=40)
@given(
    arrays=four_arrays(SIGNED),
    scale=st.sampled_from([0.125, 0.5, 3.0, 100.0]),
    average=st.sampled_from(["prompts_first", "after"]),
)
def test_scaling_all_activations_scales_ras(arrays, scale, average):
    plain = reciprocal_activation_shift(*arrays, average=average, floor=0.5)
    scaled = reciprocal_activation_shift(
        *(array * scale for array in arrays), average=average, floor=0.5 * scale
    )
    for one, other in ((plain, scaled), (plain.floored, scaled.floored)):
        assert other.safety_drop == pytest.approx(one.safety_drop * scale, rel=1e-9, nan_ok=True)
        assert other.value == pytest.approx(one.value * scale, rel=1e-9, nan_ok=True)


@settings(UNHURRIED, max_examples=40)
@given(arrays=four_arrays(POSITIVE))
def test_swapping_base_and_tuned_where_all_dropped_leaves_no_drop(arrays):
    tuned, other, base_task, tuned_task = arrays
    base = tuned + np.abs(other) + 0.1
    falls = reciprocal_activation_shift(base, tuned, base_task, tuned_task)
    swapped = reciprocal_activation_shift(tuned, base, base_task, tuned_task)
    assert falls.safety_drop > 0
    assert falls.n_moved.safety == falls.n
    assert swapped.safety_drop == 0.0
    assert swapped.value == 0.0
    assert swapped.reason is None
    assert swapped.reasoning_rise == falls.reasoning_rise


@settings(UNHURRIED, max_examples=40)
@given(arrays=four_arrays(POSITIVE))
def test_the_two_sides_are_mirror_images(arrays):
    b_safe, t_safe, b_task, t_task = arrays
    forth = reciprocal_activation_shift(b_safe, t_safe, b_task, t_task)
    back = reciprocal_activation_shift(t_task, b_task, t_safe, b_safe)
    assert (back.safety_drop, back.reasoning_rise) == (forth.reasoning_rise, forth.safety_drop)
    assert back.value == pytest.approx(forth.value)


@settings(UNHURRIED, max_examples=40)
@given(arrays=four_arrays(SIGNED), data=st.data(), average=st.sampled_from(["prompts_first", "after"]))
def test_the_order_of_neurons_and_of_prompts_does_not_matter(arrays, data, average):
    order = data.draw(st.permutations(range(arrays[0].shape[1])))
    rows = data.draw(st.permutations(range(arrays[0].shape[0])))
    mixed = [array[:, order] for array in arrays]
    mixed[0], mixed[1] = mixed[0][rows], mixed[1][rows]
    one = reciprocal_activation_shift(*arrays, average=average)
    other = reciprocal_activation_shift(*mixed, average=average)
    assert other.value == pytest.approx(one.value, rel=1e-9, nan_ok=True)


@settings(UNHURRIED, max_examples=40)
@given(arrays=four_arrays(POSITIVE), data=st.data())
def test_sums_over_a_partition_of_the_neurons_add_up(arrays, data):
    n = arrays[0].shape[1]
    cut = data.draw(st.integers(1, n))
    parts = [slice(0, cut), slice(cut, n)] if cut < n else [slice(0, n)]
    whole = reciprocal_activation_shift(*arrays)
    pieces = [reciprocal_activation_shift(*(array[:, part] for array in arrays)) for part in parts]
    assert sum(piece.n * piece.safety_drop for piece in pieces) == pytest.approx(n * whole.safety_drop)
    assert sum(piece.n * piece.reasoning_rise for piece in pieces) == pytest.approx(n * whole.reasoning_rise)
    low, high = arrays[1].mean(axis=0), arrays[0].mean(axis=0)
    assert one_sided_shift(low, high)[0].sum() == pytest.approx(n * whole.safety_drop)


@settings(UNHURRIED, max_examples=40)
@given(arrays=four_arrays(POSITIVE))
def test_ras_lies_between_the_rivals_as_means_do(arrays):
    shift = reciprocal_activation_shift(*arrays)
    slack = 1e-9 * (1 + shift.arithmetic)
    assert shift.minimum <= shift.value + slack
    assert shift.value <= shift.geometric + slack
    assert shift.geometric <= shift.arithmetic + slack
    assert shift.product == pytest.approx(shift.safety_drop * shift.reasoning_rise)


def test_layers_and_neurons_are_one_set_whatever_their_shape():
    rng = np.random.default_rng(0)
    arrays = [rng.uniform(0.1, 2, size=(5, 3, 4)) for _ in range(4)]
    flat = reciprocal_activation_shift(*(array.reshape(5, 12) for array in arrays))
    assert reciprocal_activation_shift(*arrays).value == pytest.approx(flat.value)
    pooled = reciprocal_activation_shift(*(array.mean(axis=0) for array in arrays), prompt_axis=None)
    assert pooled.value == pytest.approx(flat.value)
    assert pooled.n == 12
    assert pooled.n_prompts == (0, 0)
    assert flat.n_prompts == (5, 5)
    single_axis = reciprocal_activation_shift(*(array.mean(axis=0).ravel() for array in arrays))
    assert single_axis.value == pytest.approx(flat.value)
    read_as_prompts = reciprocal_activation_shift(*(array.mean(axis=0) for array in arrays))
    assert read_as_prompts.n == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_give_what_arrays_give(dtype):
    tensors = [
        torch.rand(4, 5, generator=torch.Generator().manual_seed(seed)).to(dtype) + 0.1 for seed in range(4)
    ]
    arrays = [tensor.double().numpy() for tensor in tensors]
    tensors[0].requires_grad_()
    assert reciprocal_activation_shift(*tensors).value == reciprocal_activation_shift(*arrays).value


def test_averaging_before_and_after_differ_where_prompts_disagree():
    base, tuned = [[1.0], [3.0]], [[3.0], [1.0]]
    task = [[1.0]], [[2.0]]
    before = reciprocal_activation_shift(base, tuned, *task)
    after = reciprocal_activation_shift(base, tuned, *task, average="after")
    assert before.safety_drop == 0.0
    # Prompt 1 falls 3 → 1: (3−1)/1·3 = 6, averaged with 0 of prompt 0.
    assert after.safety_drop == 3.0
    assert after.n_used == (2, 1)


# --- guards ------------------------------------------------------------------------------------------


def test_a_neuron_that_is_not_positive_is_left_out_and_counted_and_n_stays():
    shift = reciprocal_activation_shift([2.0, 2.0, 0.0, 2.0], [1.0, -1.0, 1.0, 0.0], [1.0] * 4, [2.0] * 4)
    assert shift.safety_drop == pytest.approx(2.0 / 4)
    assert shift.n_used == (1, 4)
    assert shift.n_excluded == (3, 0)
    assert shift.n == 4


@pytest.mark.parametrize("average", ["prompts_first", "after"])
def test_a_side_without_a_usable_neuron_is_nan_with_the_reason(average):
    shift = reciprocal_activation_shift(
        [[1.0, -2.0]], [[-1.0, 2.0]], [[1.0, 1.0]], [[2.0, 2.0]], average=average
    )
    assert math.isnan(shift.value)
    assert math.isnan(shift.safety_drop)
    assert shift.reasoning_rise == 2.0
    assert shift.reason == "none of 2 neurons is positive in both models on the safety prompts"
    for rival in (shift.arithmetic, shift.geometric, shift.minimum, shift.product):
        assert math.isnan(rival)
    both = reciprocal_activation_shift([-1.0], [1.0], [1.0], [0.0])
    assert "safety" in both.reason
    assert "reasoning" in both.reason


def test_minimum_is_nan_whichever_side_is():
    assert math.isnan(reciprocal_activation_shift([2.0], [1.0], [0.0], [1.0]).minimum)


@pytest.mark.parametrize("base_task", [1.0, 2.0, 3.0])
def test_usable_neurons_that_did_not_move_its_way_give_zero_not_nan(base_task):
    shift = reciprocal_activation_shift([1.0], [1.0], [base_task], [2.0])
    assert shift.safety_drop == 0.0
    assert shift.value == 0.0
    assert shift.reason is None
    assert shift.n_moved.safety == 0
    assert shift.n_used == (1, 1)


def test_after_leaves_out_a_prompt_without_any_usable_neuron():
    base, tuned = [[2.0, 2.0], [-1.0, -1.0]], [[1.0, 1.0], [1.0, 1.0]]
    shift = reciprocal_activation_shift(base, tuned, [[1.0, 1.0]], [[2.0, 2.0]], average="after")
    assert shift.safety_drop == 2.0
    assert shift.n_excluded == (2, 0)


def test_the_floored_variant_stands_beside_and_keeps_silenced_neurons():
    args = [2.0, 2.0, -1.0], [1.0, 0.0, -2.0], [1.0, 0.1, 1.0], [2.0, 1.0, 1.0]
    plain = reciprocal_activation_shift(*args)
    shift = reciprocal_activation_shift(*args, floor=0.5)
    assert plain.floored is None
    assert (shift.value, shift.n_excluded) == (plain.value, plain.n_excluded)
    assert shift.floor is None
    # Safety: 2 → 1 adds 2; 2 → 0 adds (2−0)/0.5·2 = 8; −1 → −2 is left out. Reasoning: 1 → 2 adds 2; 0.1 → 1 adds 0.9/0.5·1.
    assert shift.floored.safety_drop == pytest.approx((2 + 8) / 3)
    assert shift.floored.reasoning_rise == pytest.approx((2 + 1.8) / 3)
    assert shift.floored.n_excluded == (1, 0)
    assert shift.floored.floor == 0.5


@settings(UNHURRIED, max_examples=40)
@given(arrays=four_arrays(POSITIVE))
def test_a_floor_below_all_activations_changes_nothing(arrays):
    shift = reciprocal_activation_shift(*arrays, floor=0.001)
    assert shift.floored.value == shift.value


@settings(UNHURRIED, max_examples=40)
@given(arrays=four_arrays(SIGNED), floors=st.tuples(st.floats(0.01, 5), st.floats(0.01, 5)))
def test_a_higher_floor_never_gives_a_larger_shift(arrays, floors):
    small, large = (reciprocal_activation_shift(*arrays, floor=floor).floored for floor in sorted(floors))
    if not math.isnan(small.value):
        assert large.safety_drop <= small.safety_drop * (1 + 1e-12)
        assert large.value <= small.value * (1 + 1e-12)


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_refused_by_name_and_place(position, bad):
    arrays = [np.ones((2, 3)) for _ in range(4)]
    arrays[position][1, 2] = bad
    name = ("base_harmful", "tuned_harmful", "base_reasoning", "tuned_reasoning")[position]
    with pytest.raises(NotFinite, match=rf"{name}: 1 of 6 numbers .*prompt 1, neuron 2"):
        reciprocal_activation_shift(*arrays)


def test_layers_are_named_where_a_number_is_not_finite():
    arrays = [np.ones((2, 3, 4)) for _ in range(4)]
    arrays[1][1, 2, 3] = np.nan
    with pytest.raises(NotFinite, match=r"prompt 1, neuron \(2, 3\)"):
        reciprocal_activation_shift(*arrays)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3), (2, 4), (2, 3), (2, 3)), "tuned_harmful of"),
        (((2, 3), (2, 3), (5, 4), (5, 4)), "base_reasoning of"),
        (((2, 3), (1, 3), (2, 3), (2, 3)), "2 prompts and tuned_harmful 1"),
        (((2, 3), (2, 3), (4, 3), (3,)), "4 prompts and tuned_reasoning none"),
    ],
)
def test_unlike_shapes_are_refused(shapes, message):
    with pytest.raises(ReferenceMismatch, match=message):
        reciprocal_activation_shift(*(np.ones(shape) for shape in shapes))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), ()])
def test_no_prompt_or_no_neuron_is_refused(shape):
    with pytest.raises(NotEnoughData, match="base_harmful has shape"):
        reciprocal_activation_shift(*[np.ones(shape)] * 4)


@pytest.mark.parametrize(
    "options",
    [{"average": "before"}, {"floor": 0.0}, {"floor": -1.0}, {"floor": math.nan}, {"prompt_axis": 1}],
)
def test_unknown_options_are_refused(options):
    with pytest.raises(StatisticsError):
        reciprocal_activation_shift(*[np.ones((2, 2))] * 4, **options)


# --- labelled arrays ---------------------------------------------------------------------------------


def labelled(array, prompts, dims=("prompt", "layer", "neuron")):
    return xr.DataArray(array, dims=dims, coords={"prompt": prompts, "layer": [3, 7]})


@pytest.fixture
def four_labelled():
    rng = np.random.default_rng(1)
    prompts = {"safety": ["a", "b"], "task": ["x", "y", "z"]}
    return [
        labelled(rng.uniform(0.1, 2, size=(len(prompts[side]), 2, 3)), prompts[side])
        for side in ("safety", "safety", "task", "task")
    ]


def test_labelled_arrays_need_no_prompt_axis_and_any_order_of_dimensions(four_labelled):
    plain = reciprocal_activation_shift(*(array.values for array in four_labelled))
    assert reciprocal_activation_shift(*four_labelled) == plain
    orders = (("neuron", "prompt", "layer"), ("layer", "neuron", "prompt"), ("prompt", "neuron", "layer"))
    turned = [array.transpose(*order) for array, order in zip(four_labelled[:3], orders, strict=True)]
    assert reciprocal_activation_shift(*turned, four_labelled[3]).value == pytest.approx(plain.value)
    averaged = [array.mean("prompt") for array in four_labelled]
    assert reciprocal_activation_shift(*averaged).value == pytest.approx(plain.value)
    assert reciprocal_activation_shift(*averaged).n_prompts == (0, 0)


def test_labelled_arrays_of_other_prompts_are_refused(four_labelled):
    base, tuned, *task = four_labelled
    with pytest.raises(ReferenceMismatch, match="another order"):
        reciprocal_activation_shift(base, tuned.isel(prompt=[1, 0]), *task)
    with pytest.raises(ReferenceMismatch, match="tuned_harmful has other prompts"):
        reciprocal_activation_shift(base, tuned.assign_coords(prompt=["a", "c"]), *task)
    with pytest.raises(ReferenceMismatch, match="prompts"):
        reciprocal_activation_shift(base, tuned.mean("prompt"), *task)


def test_labelled_arrays_of_other_neurons_are_refused(four_labelled):
    base, tuned, base_task, tuned_task = four_labelled
    with pytest.raises(ReferenceMismatch, match="labels along 'layer'"):
        reciprocal_activation_shift(base, tuned, base_task, tuned_task.assign_coords(layer=[3, 8]))
    with pytest.raises(ReferenceMismatch, match="tuned_harmful of"):
        reciprocal_activation_shift(base, tuned.rename(neuron="unit"), base_task, tuned_task)
    with pytest.raises(ReferenceMismatch, match="give all four alike"):
        reciprocal_activation_shift(base, tuned.values, base_task, tuned_task)


# --- showing -----------------------------------------------------------------------------------------


def test_to_dict_is_strict_json_and_html_shows_both_variants():
    shift = reciprocal_activation_shift([1.0, 1.0], [0.0, -1.0], [1.0, 1.0], [2.0, 2.0], floor=0.25)
    plain = json.loads(json.dumps(shift.to_dict(), allow_nan=False))
    assert plain["value"] is None
    assert plain["arithmetic"] is None
    assert plain["reason"]
    assert plain["n_excluded"] == {"safety": 2, "reasoning": 0}
    assert plain["floored"]["value"] == pytest.approx(shift.floored.value)
    page = shift._repr_html_()
    assert page.count("<tr>") == 3
    assert "floored at 0.25" in page
    assert shift.reason in page
    assert reciprocal_activation_shift([1.0], [2.0], [1.0], [2.0])._repr_html_().count("<tr>") == 2


@settings(UNHURRIED, max_examples=20)
@given(shape=SHAPES, data=st.data())
def test_no_drift_is_no_shift(shape, data):
    base = data.draw(hnp.arrays(np.float64, shape, elements=POSITIVE))
    shift = reciprocal_activation_shift(base, base, base, base)
    assert (shift.value, shift.safety_drop, shift.reasoning_rise) == (0.0, 0.0, 0.0)
    assert shift.n_moved == (0, 0)
