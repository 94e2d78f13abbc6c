"""What is compared on this machine, and who says it: probes, texts, another BLAS, `prove`, stats, the exactness tax.

The BLAS in MLX's wheel for Linux computes row by row: promise (a). In front of it, numpy's own OpenBLAS blocks rows:
promise (b). macOS has neither; there the same is seen on a stand-in, a product whose order of sums depends on its rows.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp import Sampling, generate
from mlx_mtp.attention import Sight, attend
from mlx_mtp.cli.proof_report import SHOWN, Report
from mlx_mtp.exactness import Exactness, OpVerdict, Probed, exactness_of
from mlx_mtp.exactness_probe import SPLITS, measure, rows_in_passes
from mlx_mtp.exactness_tax import Tax, measure_tax
from mlx_mtp.kernels.table import Kernels
from mlx_mtp.pair import Pair
from mlx_mtp.report.here import exactness
from mlx_mtp.round import Rounds
from mlx_mtp.weights import DenseWeight, Weight
from pairs import golden_pair
from report_settings import found_by, setting_of
from test_injected_noise import CHECKS, SIZES, Keys, with_noise

PROMPT = [(i * 37 + 3) % 256 for i in range(45)]
SHIM = """
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
typedef void (*sgemm)(int, int, int, int64_t, int64_t, int64_t, float, const float *, int64_t, const float *, int64_t,
                      float, float *, int64_t);
static sgemm theirs;
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                 int ldb, float beta, float *c, int ldc) {
    if (!theirs) theirs = (sgemm)dlsym(dlopen(OPENBLAS, RTLD_NOW), "scipy_cblas_sgemm64_");
    if (!theirs) abort();
    theirs(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
"""
ASK = """
import json
from mlx_mtp.exactness import exactness_of
from pairs import golden_pair
found = exactness_of(golden_pair("a4b").target)
print(json.dumps({"against": found.why_not(), **found.as_json()}))
"""


def blocked_by_rows(weight: Weight, x: mx.array) -> mx.array:
    """Rows times a dense matrix, as a BLAS does it that sums in another order from two rows on."""
    assert isinstance(weight, DenseWeight)
    if x.shape[-2] == 1:
        return weight.project(x)
    half = x.shape[-1] // 2
    return x[..., :half] @ weight.transposed[:half] + x[..., half:] @ weight.transposed[half:]


def with_project(pair: Pair, project) -> Pair:
    target = replace(pair.target, kernels=Kernels(project=project))
    return replace(pair, target=target, rounds=Rounds(target, pair.drafter, compiled=False))


@pytest.mark.parametrize("variant", ["e2b", "a4b"])
def test_the_derived_promise_is_what_texts_and_logits_show(variant: str) -> None:
    pair = golden_pair(variant)
    found = pair.exactness()
    assert (found.promise, found.holds, found.why_not()) == ("a", True, [])
    assert all(probed.equal for probed in found.probed) and len(found.probed) >= 8
    ids = [(i * 53 + 3) % pair.target.text.vocab_size for i in range(40)]
    passes = [rows_in_passes(pair.target, ids, split, bucket=256, batch=1) for split in SPLITS]
    assert all(np.array_equal(np.array(passes[0]), np.array(one)) for one in passes[1:])
    for sampling in (Sampling(temperature=0.0), Sampling(temperature=1.0, seed=4)):
        texts = {
            tuple(generate(pair, PROMPT, max_tokens=20, sampling=sampling, num_draft_tokens=k).tokens)
            for k in (0, 4)
        }
        assert len(texts) == 1


def test_a_product_that_sums_by_rows_is_found_by_comparing() -> None:
    pair = with_project(golden_pair("31b"), blocked_by_rows)
    measured = measure(pair.target)
    assert not any(measured.products.values()) and all(measured.attention.values()) and measured.masked
    found = pair.exactness()
    assert (found.promise, found.holds) == ("b", False)
    assert "graph" in {row.op for row in found.breaking}  # two products and a sum in the place of one product
    assert {probed.what for probed in found.refuting} > {"rows times a matrix, 64 x 256"}


SEEN_BY_ATTENTION = {
    "five rows": lambda queries, keys, sight: queries.shape[2] == 5,
    "one row": lambda queries, keys, sight: queries.shape[2] == 1,
    "batch": lambda queries, keys, sight: queries.shape[0] - 1,
    "bucket": lambda queries, keys, sight: sight.bucket / 256,
    "slots that no row sees": lambda queries, keys, sight: keys[-1].mean(),
}


@pytest.mark.parametrize("what", SEEN_BY_ATTENTION)
def test_attention_that_depends_on_its_pass_is_found_by_comparing(what: str) -> None:
    def depends(queries: mx.array, keys: mx.array, values: mx.array, sight: Sight) -> mx.array:
        return attend(queries, keys, values, sight) * (
            1 + 1e-3 * SEEN_BY_ATTENTION[what](queries, keys, sight)
        )

    target = golden_pair("31b").target
    measured = measure(replace(target, kernels=Kernels(attend=depends)))
    assert all(measured.products.values()) and measured.masked
    assert measured.attention == dict.fromkeys(measured.attention, False)


def test_rows_mixed_by_views_alone_are_found_by_comparing_whole_passes() -> None:
    """No rule can tell whose values a slice moves; whole passes can."""

    def project(weight: Weight, x: mx.array) -> mx.array:
        return weight.project(mx.concatenate([x[..., :1, :], x[..., :-1, :]], axis=-2))

    found = with_project(golden_pair("31b"), project).exactness()
    assert (found.promise, found.breaking, found.unknown) == ("b", (), ())
    assert "whole passes" in found.refuting[-1].what
    assert all(line.startswith("no operation should do it") for line in found.why_not())


@pytest.mark.parametrize("key", CHECKS)
def test_injected_noise_is_found_and_named(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = with_noise(golden_pair("e2b"), Keys(**{key: True}), SIZES[key])
    found = noisy.exactness()
    assert found.holds == (key == "chunk")
    if key != "chunk":
        assert found.refuting
        named = {row.op: row.reason for row in found.breaking}
        assert named.keys() - {"Matmul"} == {
            "RandomBits"
        }  # the products that it was put on are measured with it
        assert {"rows": "rows", "batch_row": "batch", "bucket": "bucket"}[key] in named["RandomBits"]


if sys.platform == "linux":

    def test_openblas_gives_promise_b(tmp_path: Path) -> None:
        (library,) = (Path(np.__file__).parent.parent / "numpy.libs").glob("libscipy_openblas64_*.so")
        (tmp_path / "shim.c").write_text(SHIM)
        shim = tmp_path / "shim.so"
        compiler = [sys.executable, "-m", "ziglang", "cc", "-shared", "-fPIC", "-O1"]
        where = f'-DOPENBLAS="{library}"'
        subprocess.run([*compiler, where, str(tmp_path / "shim.c"), "-o", str(shim), "-ldl"], check=True)
        path = ":".join(entry for entry in sys.path if entry)
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
        found = {
            name: json.loads(
                subprocess.check_output([sys.executable, "-c", ASK], env={**environment, **more})
            )
            for name, more in (("own", {}), ("openblas", {"LD_PRELOAD": str(shim)}))
        }
        assert found["own"]["promise"] == "a" and found["own"]["against"] == []
        other = found["openblas"]
        assert other["promise"] == "b" and not other["holds"]
        assert {row["op"] for row in other["rows"] if row["invariant"] is False} == {"Matmul"}
        assert all("measured here" in line for line in other["against"])
        assert not next(probed["equal"] for probed in other["probed"] if "whole passes" in probed["what"])


def test_exactness_is_asked_once_and_reaches_stats(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = golden_pair("31b")
    before = generate(pair, PROMPT, max_tokens=4).stats
    assert (before.exact, before.exactness_tax) == (None, None)
    assert pair.check_exact() is True and pair.exactness() is pair.exactness()
    assert pair.exactness_tax().ratio is None
    after = generate(pair, PROMPT, max_tokens=4).stats
    assert (after.exact, after.exactness_tax) == (True, None)
    pair.rounds.tax = Tax(1.25, "in a test")
    assert generate(pair, PROMPT, max_tokens=4).stats.exactness_tax == 1.25


def test_the_tax_is_a_figure_where_both_kinds_of_operations_run() -> None:
    """Products made dear on purpose: the ratio must show it, and must not where they are the same."""

    def dear(weight: Weight, x: mx.array) -> mx.array:
        return sum((weight.project(x) for _ in range(30)), start=mx.zeros(())) / 30

    pair = golden_pair("31b")
    for project, low, high in ((dear, 1.5, 100.0), (lambda weight, x: weight.project(x), 0.6, 1.5)):
        tax = measure_tax(with_project(pair, project).target, compiled=False)
        assert tax.ratio is not None and low < tax.ratio < high
        assert f"{tax.ratio:.2f}x" in str(tax) and "ms a token" in str(tax)


def test_without_kernels_the_tax_is_not_measured_and_says_why() -> None:
    tax = measure_tax(golden_pair("31b").target, why_stock=["no Metal on this machine"] * 3)
    assert tax == Tax(None, "only stock operations run here (no Metal on this machine)")
    assert str(tax).startswith("exactness tax: not measured: ")


def report_of(exactness: Exactness, tax: Tax) -> Report:
    pair = SimpleNamespace(name="tiny", target=golden_pair("31b").target)
    return Report(pair, exactness, tax, [10], 20, [], None)


def test_prove_says_what_breaks_the_promise_and_lists_everything_as_json() -> None:
    rows = tuple(OpVerdict(f"Op{i}", i, False, "for a reason") for i in range(1, 9))
    rows += (OpVerdict("New", 2, None, "no rule for this operation"), OpVerdict("Exp", 3, True, "alone"))
    broken = Exactness("b", False, "Metal generation 13s, MLX 0.32.4", rows, (Probed("whole passes", False),))
    report = report_of(broken, Tax(1.04, "5.2 against 5 ms a token, medians of 15"))
    said = report.as_text()
    assert "promise (b)" in said and "Metal generation 13s" in said and "1.04x the time of stock" in said
    assert said.count("for a reason") == SHOWN and "and 4 more; --json lists every operation" in said
    found = report.as_json()
    assert found["promise"] == "b" and len(found["exactness"]["rows"]) == 10
    assert found["exactness_tax"] == {"ratio": 1.04, "reason": "5.2 against 5 ms a token, medians of 15"}
    only_new = replace(broken, rows=rows[-2:])
    assert "unknown: New (2): no rule" in report_of(only_new, Tax(None, "no Metal")).as_text()
    sound = replace(broken, promise="a", holds=True, rows=rows[-1:], probed=())
    said = report_of(sound, Tax(None, "no Metal")).as_text()
    assert "promise (a)" in said and "not measured: no Metal" in said and "Op1" not in said


def test_the_report_of_a_first_mac_has_the_table() -> None:
    found = found_by(exactness, setting_of("31b"))
    assert (found["promise"], found["rows_invariant"], found["against"]) == ("a", True, [])
    assert found["operations"] > 500 and found["replies_equal"] == found["replies"] == 2
    assert found["tax"]["ratio"] is None and all(found["compared"].values())
    json.dumps(found)


def test_a_probe_that_finds_other_bits_overrules_the_rules() -> None:
    """MLX's packed products on a CPU go row by row; should one not, comparing says so."""

    def project(weight: Weight, x: mx.array) -> mx.array:
        return weight.project(x) * (1 + 1e-3 * (x.shape[-2] > 8))

    found = exactness_of(with_project(golden_pair("31b"), project).target)
    assert not found.holds and found.refuting
