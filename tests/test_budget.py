"""A format for each layer: exact sizes, the least error, and the proof against brute force."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import make
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cq
import cq_analyze
import cq_quant
from cq.core import sink
from cq.core.errors import PlanError, UsageError
from cq.core.recipe import Rule
from cq.core.recipe_file import load_recipe
from cq_analyze import recipes, saving
from cq_analyze.budget import Mixture, choose_formats
from cq_analyze.deep import Measurements, measure
from cq_analyze.knapsack import Packing, Way, least_size, pack
from tests import processes
from tests.test_architecture import check as check_schema
from tests.test_deep import run

# The problem of numbers -------------------------------------------------------------------------

_WAY = st.builds(Way, st.integers(0, 30), st.floats(0, 8).map(lambda x: round(x, 3)))
_ITEMS = st.lists(st.lists(_WAY, min_size=1, max_size=4), min_size=1, max_size=6)


def brute_force(items: list[list[Way]], capacity: int) -> float | None:
    return min(
        (
            math.fsum(way.loss for way in choice)
            for choice in itertools.product(*items)
            if sum(way.size for way in choice) <= capacity
        ),
        default=None,
    )


def check(items: list[list[Way]], capacity: int, found: Packing) -> None:
    chosen = [ways[i] for ways, i in zip(items, found.places, strict=True)]
    assert found.size == sum(way.size for way in chosen) <= capacity
    assert found.loss == math.fsum(way.loss for way in chosen)
    assert found.bound <= found.loss


@settings(max_examples=300, deadline=None)
@given(items=_ITEMS, spare=st.integers(-3, 100))
def test_pack_is_exact(items: list[list[Way]], spare: int) -> None:
    capacity = least_size(items) + spare
    found, best = pack(items, capacity), brute_force(items, capacity)
    if best is None:
        assert found is None
        return
    assert found is not None
    check(items, capacity, found)
    assert found.loss == pytest.approx(best, rel=1e-8, abs=1e-12)
    assert found.bound == found.loss, "it is known to be the best"


def by_every_size(items: list[list[Way]], capacity: int) -> float:
    """The least loss by dynamic programming over all sizes."""
    least = [0.0] * (capacity + 1)
    for ways in items:
        least = [
            min((least[c - w.size] + w.loss for w in ways if w.size <= c), default=math.inf)
            for c in range(capacity + 1)
        ]
    return least[capacity]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.52, 0.7, 0.95])
def test_pack_of_a_small_model_is_exact(share: float) -> None:
    """Its few sizes leave much of some capacities unused, and greed far from the best."""
    rng = random.Random(7)
    formats = [(8, 0), (4, 5e-5), (4, 4e-5), (4, 7e-4), (3, 5e-3), (2, 6e-3), (2, 0.012)]
    items = [
        [Way(size * n, loss * rng.uniform(0.9, 1.1)) for n, loss in formats]
        for size in (1, 3, 3, 4, 6, 2) * 4
    ]
    least, most = least_size(items), sum(ways[0].size for ways in items)
    capacity = int(least + share * (most - least))
    found = pack(items, capacity)
    assert found is not None
    check(items, capacity, found)
    assert found.loss == pytest.approx(by_every_size(items, capacity), rel=1e-8)
    assert found.bound == found.loss


def greedy(items: list[list[Way]], capacity: int) -> float:
    """From the smallest way of each item, always the step with the most gain a byte that fits."""
    places = [min(range(len(ways)), key=lambda i, w=ways: w[i].size) for ways in items]  # type: ignore[misc]
    room = capacity - sum(ways[i].size for ways, i in zip(items, places, strict=True))
    while True:
        steps = [
            ((ways[at].loss - way.loss) / max(way.size - ways[at].size, 1e-9), item, place)
            for item, (ways, at) in enumerate(zip(items, places, strict=True))
            for place, way in enumerate(ways)
            if way.loss < ways[at].loss and way.size - ways[at].size <= room
        ]
        if not steps:
            return math.fsum(ways[i].loss for ways, i in zip(items, places, strict=True))
        _, item, place = max(steps)
        room -= items[item][place].size - items[item][places[item]].size
        places[item] = place


def model_like(layers: int, seed: int) -> list[list[Way]]:
    """Layers of a few sizes, each with the ways that formats offer."""
    rng = random.Random(seed)
    formats = [(2, 0), (1, 5e-5), (1.03, 4e-5), (1, 7e-4), (0.57, 5e-3), (0.56, 6e-3), (0.5, 0.012)]
    sizes = [9e6, 27e6, 38e6, 38e6, 56e6, 14e6]
    return [
        [Way(int(sizes[i % 6] * b), loss * rng.uniform(0.9, 1.1)) for b, loss in formats]
        for i in range(layers)
    ]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.97])
def test_pack_of_many_layers_is_near_the_bound_and_full(share: float) -> None:
    items = model_like(304, seed=1)
    least, most = least_size(items), sum(ways[0].size for ways in items)
    capacity = int(least + share * (most - least))
    found = pack(items, capacity)
    assert found is not None
    check(items, capacity, found)
    # What the relaxation leaves over is less than one step of one layer.
    assert found.loss <= found.bound + max(way.loss for ways in items for way in ways)
    assert found.size >= 0.99 * capacity
    assert found.loss <= greedy(items, capacity)
    for place in range(len(items[0])):
        if sum(ways[place].size for ways in items) <= capacity:
            assert found.loss <= math.fsum(ways[place].loss for ways in items)


def test_pack_takes_the_best_of_everything_if_it_fits() -> None:
    items = [[Way(9, 0.5), Way(4, 0.5), Way(1, 3.0)], [Way(2, 0.0)]]
    assert pack(items, 10**9) == Packing(places=(1, 0), size=6, loss=0.5, bound=0.5)


# Files ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Measurements:
    return measure(cq.open(processes.BASE))


def smallest(measured: Measurements) -> Mixture:
    return choose_formats(measured, min_sqnr=-1000)


def single_formats(measured: Measurements) -> dict[str, tuple[int, float]]:
    """Size and noise of the file that each candidate alone makes, by a recipe with a rule for each
    layer as well: on a model as small as this the rules in a file's history weigh 0.1 %."""
    found = {}
    for way in measured.candidates:
        asked = {"format": way.format, "scaling": way.scaling, "optimizer": way.optimizer}
        rules = [
            Rule.from_dict(rule, where="a rule")
            for rule in cq_analyze.template(measured.checkpoint, **asked)["rules"]
            if rule["layers"] in {layer.layer for layer in measured.layers}
        ]
        model = cq_quant.quantize(measured.checkpoint, recipe=rules)
        noise = [
            cost.noise
            for layer in measured.layers
            for cost in layer.costs
            if cost.candidate == way and cost.error is not None and cost.against is None
        ]
        found[way.name] = sink.nbytes_file(model), math.fsum(noise)
    return found


@pytest.mark.parametrize("budget", [3_700_000, 4_000_000, 4_500_000, 5_000_000, 6_000_000])
def test_budget_is_kept_and_nearly_used(digits: Measurements, budget: int) -> None:
    found = choose_formats(digits, budget=budget)
    assert 0.99 * budget <= found.nbytes <= budget
    assert found.bound <= found.noise


def test_budget_is_no_worse_than_any_single_format_of_the_size(digits: Measurements) -> None:
    least = smallest(digits).nbytes
    compared = 0
    for name, (nbytes, noise) in single_formats(digits).items():
        if nbytes < least:
            continue
        found = choose_formats(digits, budget=nbytes)
        assert found.nbytes <= nbytes
        assert found.noise <= noise, name
        compared += 1
    assert compared >= 8


def test_no_other_choice_of_formats_has_less_error_in_the_budget(tmp_path: Path) -> None:
    """Every mixture of two formats is laid out as a file, and the best of those that fit taken."""
    model = cq.open(make.save(tmp_path / "in.safetensors", make.model(blocks=2, dim=128)))
    measured = measure(model, formats=["float8_e4m3fn", "nvfp4"], only=["*.mlp.*"])
    ways = [[None, *(c for c in layer.costs if c.error)] for layer in measured.layers]
    files = []
    for choice in itertools.product(*ways):
        rules = [
            Rule.from_dict(
                {"layers": layer.layer, "skip": True}
                if cost is None
                else {"layers": layer.layer, "format": cost.candidate.format, "reason": "r" * 12},
                where="a rule",
            )
            for layer, cost in zip(measured.layers, choice, strict=True)
        ]
        noise = math.fsum(cost.noise for cost in choice if cost)
        if any(choice):
            made = cq_quant.quantize(model, recipe=rules, only=["*.mlp.*"])
            files.append((sink.nbytes_file(made), noise))
    compared = 0
    for budget in range(min(files)[0] + 9_000, max(files)[0], 19_000):
        found = choose_formats(measured, budget=budget)
        # Without files so near the budget that a rule's words decide.
        best = min(noise for nbytes, noise in files if nbytes <= budget - 1_000)
        if best == min(noise for nbytes, noise in files if nbytes <= budget + 1_000):
            assert found.noise == pytest.approx(best, rel=1e-9)
            assert found.best
            compared += 1
    assert compared >= 5


def test_what_a_budget_leaves_unused_has_a_reason(digits: Measurements) -> None:
    found = choose_formats(digits, budget=5_442_124)
    assert found.unused == 5_442_124 - found.nbytes > 0.01 * 5_442_124
    assert found.best
    code, _, told = run("template", processes.BASE, "--budget", "5442124B")
    assert code == 0
    assert "(1.9 %) of the budget are left: every choice of formats with less error" in told
    assert choose_formats(digits, min_sqnr=30).unused == 0


def test_budget_below_the_least_names_it(digits: Measurements) -> None:
    least = smallest(digits).nbytes
    with pytest.raises(PlanError, match=f"smaller than {least} bytes") as caught:
        choose_formats(digits, budget=least - 1)
    assert caught.value.exit_code == 4
    assert choose_formats(digits, budget=least).nbytes == least


def test_budget_that_needs_no_quantizing_says_so(digits: Measurements) -> None:
    with pytest.raises(PlanError, match="within the budget"):
        choose_formats(digits, budget=digits.nbytes)


def test_limits_that_are_none_are_refused(digits: Measurements) -> None:
    with pytest.raises(UsageError, match="needed"):
        choose_formats(digits)
    with pytest.raises(UsageError, match="nan"):
        choose_formats(digits, min_sqnr=math.nan)
    with pytest.raises(PlanError, match="300 dB"):
        choose_formats(digits, min_sqnr=300)


@pytest.mark.parametrize("level", [20.0, 25.0, 35.0, 42.0])
def test_min_sqnr_holds_for_every_layer_at_the_least_size(
    digits: Measurements, level: float
) -> None:
    found = choose_formats(digits, min_sqnr=level)
    assert found.min_sqnr >= level
    for one in found.chosen:
        better = [
            cost.nbytes
            for cost in one.layer.costs
            if cost.error and cost.against is None and cost.error.sqnr >= level
        ]
        chosen = one.layer.nbytes if one.cost is None else one.cost.nbytes
        assert chosen <= min([*better, one.layer.nbytes])


def test_both_limits_hold_together(digits: Measurements) -> None:
    found = choose_formats(digits, budget=5_300_000, min_sqnr=30)
    assert found.nbytes <= 5_300_000
    assert found.min_sqnr >= 30
    with pytest.raises(PlanError, match="with 30 dB or more"):
        choose_formats(digits, budget=4_000_000, min_sqnr=30)


def test_budget_keeps_what_the_family_keeps(digits: Measurements) -> None:
    found = {one.layer.layer: one for one in smallest(digits).chosen}
    for layer in ("img_in", "txt_in", "time_in.in_layer", "final_layer.linear"):
        assert found[layer].cost is None
    for layer, one in found.items():
        if "mod.lin" in layer or "modulation.lin" in layer:
            assert one.cost is not None
            assert one.cost.nbytes >= one.layer.nbytes // 2, "eight bits"


def test_budget_takes_layers_that_only_names(tmp_path: Path) -> None:
    model = cq.open(make.save(tmp_path / "in.safetensors", make.model(blocks=1, dim=128)))
    measured = measure(model, only=["final_layer.*", "*.mlp.0"])
    found = smallest(measured)
    assert {one.layer.layer for one in found.chosen if one.cost} == {
        "final_layer.linear",
        "blocks.0.mlp.0",
    }
    notes = {n["layer"]: n["action"] for n in found.model.notes}
    assert notes["blocks.0.mlp.2"] == "keep"


def test_budget_obeys_the_rules_of_a_recipe(tmp_path: Path) -> None:
    model = cq.open(make.save(tmp_path / "in.safetensors", make.model(blocks=1, dim=128)))
    rules = [
        {"layers": "*.mlp.0", "format": "int8_tensorwise", "scaling": "tensor", "optimizer": "rtn"},
        {"layers": "*.mlp.2", "skip": True},
    ]
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"cq": 1, "kind": "recipe", "rules": rules}))
    measured = measure(model, rules=load_recipe(path))
    found = {one.layer.layer: one.cost for one in smallest(measured).chosen}
    fixed = found["blocks.0.mlp.0"]
    assert fixed is not None
    assert fixed.candidate.name == "int8_tensorwise/tensor"
    assert found["blocks.0.mlp.2"] is None


def check_file(found: Mixture, recipe: Path, out: Path) -> None:
    """The file made from the recipe has the promised size and errors."""
    model = found.measurements.checkpoint
    cq.write(cq_quant.quantize(model, recipe=recipe), out)
    assert out.stat().st_size == found.nbytes
    report = cq_analyze.verify(cq.open(out), against=model)
    assert report.passed
    told = {layer.layer: layer.fidelity for layer in report.layers}
    marked = {o.layer.layer: o.cost for o in found.chosen if o.cost and o.cost.option.marker}
    assert set(told) == set(marked)
    for layer, cost in marked.items():
        fidelity = told[layer]
        assert cost.error is not None
        assert fidelity is not None
        assert cost.error.error_energy == pytest.approx(fidelity.error_energy, rel=2e-5)


@pytest.mark.parametrize("budget", [3_800_000, 4_700_000])
def test_recipe_makes_the_promised_file(digits: Measurements, budget: int, tmp_path: Path) -> None:
    found = choose_formats(digits, budget=budget)
    saving.save(recipes.written(found.to_dict()), tmp_path / "r.json")
    check_file(found, tmp_path / "r.json", tmp_path / "out.safetensors")


def test_recipe_of_odd_names_and_wide_weights_makes_the_promised_file(tmp_path: Path) -> None:
    """Names that are patterns, a prefix, padding, shapes that few formats take, and casts."""
    tensors = make.model(blocks=2, dim=128, dtype="F32", prefix="model.diffusion_model.")
    odd = {"blocks.0.a[1]*": (96, 72), "blocks.1.a[1]*": (77, 80), "re:blocks.0.b": (256, 128)}
    tensors |= {f"{name}.weight": make.weight(*shape, seed=name) for name, shape in odd.items()}
    model = cq.open(make.save(tmp_path / "in.safetensors", tensors))
    measured = measure(model)
    least = smallest(measured).nbytes
    for i, budget in enumerate((least, least * 5 // 4, least * 7 // 4)):
        found = choose_formats(measured, budget=budget)
        assert found.nbytes <= budget
        saving.save(recipes.written(found.to_dict()), tmp_path / f"{i}.json")
        check_file(found, tmp_path / f"{i}.json", tmp_path / f"{i}.safetensors")


# The command ------------------------------------------------------------------------------------


def test_template_budget_is_what_the_library_chooses(digits: Measurements, tmp_path: Path) -> None:
    recipe, out = tmp_path / "r.json", tmp_path / "out.safetensors"
    code, _, told = run("template", processes.BASE, "--budget", "4.5MB", "-o", recipe)
    assert code == 0, told
    found = choose_formats(digits, budget=4_500_000)
    assert recipe.read_text() == recipes.text(found.to_dict()) + "\n"
    assert f"{found.nbytes} bytes" in told
    assert "or newer loads it" in told
    assert "are left" not in told, "all but a little is used"
    code, _, told = run("quant", processes.BASE, "--recipe", recipe, "-o", out)
    assert code == 0, told
    assert out.stat().st_size == found.nbytes <= 4_500_000


def test_template_min_sqnr_prints_a_recipe() -> None:
    code, out, _ = run("template", processes.BASE, "--min-sqnr", 30, "--among", "mxfp8")
    assert code == 0
    check_schema("recipe", json.loads(out))
    formats = {rule.get("format") for rule in json.loads(out)["rules"]}
    assert formats == {None, "mxfp8"}


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--budget", "1kB", "--among", "mxfp8"], 4, "cannot be made smaller"),
        (["--budget", "12"], 2, "has no unit"),
        (["--budget", "4MB", "--format", "nvfp4"], 2, "exclude each other"),
        (["--min-sqnr", "nan"], 2, "cannot be nan"),
        (["--among", "nvfp4"], 2, "`--among` needs"),
    ],
)
def test_template_refuses_wrong_limits(options: list[str], code: int, words: str) -> None:
    told = run("template", processes.BASE, *options)
    assert told[:2] == (code, "")
    assert words in told[2]
