"""Launches counted in the graph that Metal would run, and times predicted from them: launches.py and cost_model.py."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_mtp.published_configs import SIZES
from mlx_mtp.sampling import Sampling

ROOT = Path(__file__).parent.parent
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads((ROOT / "bench" / "results" / "launches.json").read_text())["results"]


def test_what_metal_has_a_kernel_for_counts_once(bench):
    """And what mx.compile fuses counts once, what only describes memory anew not at all."""
    graphs = bench("metal_graph")
    x, gain = graphs.leaf((4, 64), mx.bfloat16), graphs.leaf((64,), mx.bfloat16)

    def work(x: mx.array) -> mx.array:
        normed = mx.fast.rms_norm(x, gain, 1e-6)
        wasted = mx.fast.rms_norm(x, None, 1e-6)  # nobody reads it
        del wasted
        heads = (mx.exp(normed) * 2 + 1).reshape(4, 2, 32).transpose(1, 0, 2)
        q = heads.reshape(1, 2, 4, 32)
        wide = graphs.leaf((1, 1, 300, 512), mx.bfloat16)
        narrow = graphs.leaf((1, 1, 300, 256), mx.bfloat16)
        fused = mx.fast.scaled_dot_product_attention(narrow[:, :, :4], narrow, narrow, scale=1.0)
        spelt = mx.fast.scaled_dot_product_attention(wide[:, :, :4], wide, wide, scale=1.0)
        return q.sum() + fused.sum() + spelt.sum()

    with graphs.as_on_metal() as kernels:
        found = graphs.launches(graphs.graph_of([mx.compile(work)(x)]), kernels)
    assert found["RMSNorm"] == 1 and found["SDPA"] == 1
    assert found["Matmul"] == 2 and found["Softmax"] == 1  # head_dim 512 is spelt out
    assert sum(count for name, count in found.items() if "Exp" in name) == 1
    assert not set(found) & (graphs.VIEWS | {graphs.OPAQUE})
    rms_norm = mx.fast.rms_norm(mx.ones((1, 4)), None, 1e-6)
    assert rms_norm.tolist() == [[pytest.approx(1.0, abs=1e-5)] * 4]  # MLX's own function is back


def test_our_kernels_are_counted_by_name_and_nothing_is_evaluated(bench):
    """26B cut to 6 layers: the weights of one layer alone would be 0.4 GB."""
    launches = bench("launches")
    target_config, drafter_config = launches.configs_of("26b-a4b")
    target_config = replace(
        target_config, text=replace(target_config.text, layer_types=target_config.text.layer_types[:6])
    )
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    pair = launches.with_kernels(*launches.pair_of_configs(target_config, drafter_config))
    parts = launches.parts_of_round(*pair, GREEDY, 3)
    assert mx.get_peak_memory() - before < 2**20
    verify, draft = parts["verify"], parts["draft"]
    experts = {name: count for name, count in verify.items() if name.startswith("verify_experts")}
    assert set(experts.values()) == {6} and len(experts) <= 6
    assert verify["head_qmm"] == verify["choose_greedy"] == 1
    assert draft["head_qmm"] == draft["choose_greedy"] == 3
    assert not {"QuantizedMatmul", "GatherQMM", "SDPA", "Softmax", "ArgPartition"} & set(verify + draft)


def test_a_third_fewer_launches_on_26b(bench, committed):
    """Counted anew; what is committed says the same of all sizes."""
    launches = bench("launches")
    pair = launches.pair_without_weights("26b-a4b")
    for drafts in launches.DRAFTS:
        sums = {
            which: sum(
                sum(names.values()) for names in launches.parts_of_round(*own, GREEDY, drafts).values()
            )
            for which, own in {"stock": pair, "ours": launches.with_kernels(*pair)}.items()
        }
        assert 3 * sums["ours"] <= 2 * sums["stock"]
        for which, count in sums.items():
            kept = committed["26b-a4b"][which]["greedy"][f"k={drafts}"]["round"]
            assert count == pytest.approx(kept, rel=0.03), (
                "run bench/launches.py and bench/cost_model.py --write"
            )
    assert set(committed) == set(SIZES)


def test_the_page_holds_the_tables_of_what_is_committed(bench, committed):
    page = (ROOT / "docs" / "kernels-cost.md").read_text(encoding="utf-8")
    assert bench("cost_model").filled(page, committed) == page, "run bench/cost_model.py with --write"
    assert "Nothing was measured by us" in page


def test_predictions_are_near_what_was_published(bench, committed):
    """Half of them within 15 %, and the rounds' costs, which decide how much is drafted, within a third."""
    rows = bench("cost_model").check(committed)
    errors = {one: abs(predicted / one.value - 1) for one, predicted in rows}
    assert statistics.median(errors.values()) < 0.15
    assert max(error for one, error in errors.items() if one.what == "round") < 0.34


def test_kernels_are_predicted_to_help_most_where_rows_are_dear(bench, committed):
    model, chips = bench("cost_model"), bench("chips")
    old, new = chips.CHIPS[0], chips.CHIPS[-1]
    for size in SIZES:
        for chip in chips.CHIPS:
            stock, cautious, bound = (
                model.round_seconds(size, chip, 3, way, committed) for way in model.WAYS
            )
            assert bound < cautious < 1.02 * stock
    gains = [
        model.round_seconds("31b", chip, 3, model.STOCK, committed)
        / model.round_seconds("31b", chip, 3, model.CAUTIOUS, committed)
        for chip in (old, new)
    ]
    assert gains[0] > 1.3 > gains[1]


def test_bytes_of_the_published_shapes(bench):
    """Against parameter counts of the configurations: 31B at 4.5 bits, 26B's active part."""
    model = bench("cost_model")
    dense = model.bytes_of(model.configs_of("31b")[0])
    assert dense.dense == pytest.approx(17.3e9, rel=0.01) and dense.products == pytest.approx(
        30.7e9, rel=0.01
    )
    mixed = model.bytes_of(model.configs_of("26b-a4b")[0])
    active = mixed.dense + mixed.layers * mixed.top_k * mixed.expert
    assert active == pytest.approx(2.15e9, rel=0.01)
    # Every second group of 1 expert of 128 is met by chance only.
    assert model.independent(1) == pytest.approx(8) and model.independent(4) == pytest.approx(29.1, abs=0.1)
