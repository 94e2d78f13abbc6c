"""Whole pairs decode on our Metal source: the same text with any number of drafts, logits as the references give them.

The kernels run on the CPU (tests/msl). While a round is built, stock MLX's products with packed weights and its fused
attention are forbidden, so that nothing can fall back on them unseen; a prefill multiplies by them, as on a Mac.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import pytest

import mlx_mtp.round
from kernel_pairs import KINDS, on_kernels, on_references, quantised_pair
from mlx_mtp import Sampling, generate_batch
from mlx_mtp.draft import draft
from mlx_mtp.drafter import draft_hidden, draft_logits, view_for_drafter
from mlx_mtp.kernels.table import Kernels
from mlx_mtp.pair import Pair
from mlx_mtp.prefill import prefill
from mlx_mtp.round import Rounds
from mlx_mtp.state import KeysValues, State, new_kv
from mlx_mtp.target import embed, logits_of
from mlx_mtp.verify import verify
from mlx_mtp.weights import Weight
from msl.stand_in import Runner
from scripted_drafts import ScriptedDrafts

WINDOW = 16
PROMPTS = [[(i * step + 3) % 256 for i in range(count)] for step, count in ((37, 21), (11, 5), (101, 13))]
SEEDS = (4, 5, 6)
SETTINGS = [Sampling(temperature=1.5, top_k=64, top_p=0.95, seed=seed) for seed in SEEDS]
TEXTS = [[(i * step + 9) % 256 for i in range(16)] for step in (29, 71, 113)]  # teacher-forced
Texts = dict[int, list[int]]  # by member: which of PROMPTS
SOME = [(3, 1, 2)]  # rows of the passes that a text is cut into
MANY = [(4, 1, 9, 2), (2,) * 8, (5, 5, 6), (13, 3), (16,)]
FORBIDDEN = [(mx, "quantized_matmul"), (mx, "gather_qmm"), (mx.fast, "scaled_dot_product_attention")]
DTYPES = (mx.float32, mx.bfloat16)
# How far logits and the drafter's rows may lie from those of the references, in the mean, over what rounding makes of
# these: in float32 one unit in the last place of each product, in bfloat16 all that distinguishes it from float32.
LIMITS = {mx.float32: 10.0, mx.bfloat16: 0.5}
ULP = 2.0**-23


@functools.cache
def pair_on_kernels(kind: str, dtype: mx.Dtype) -> Pair:
    pair = on_kernels(quantised_pair(kind, dtype=dtype))
    assert [row for row in pair.kernel_table if row.by == "stock"] == []
    return pair


@contextmanager
def without_stock(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stock MLX's quantised products and fused attention raise."""

    def refusal(name: str) -> Callable[..., Any]:
        def refuse(*args: Any, **how: Any) -> Any:
            raise AssertionError(f"{name} where every operation has a kernel")

        return refuse

    with patch.context() as inside:
        for module, name in FORBIDDEN:
            inside.setattr(module, name, refusal(name))
        yield


class HalfRight(ScriptedDrafts):
    """The drafter drafts, and then what it says is replaced by the text, or by its neighbour at four in ten."""

    def __init__(self, texts: Texts):
        script = [[*PROMPTS[member], *text] for member, text in texts.items()]
        super().__init__(script, right=0.6, seeds=[SEEDS[member] for member in texts])

    def __call__(self, target: Any, drafter: Any, state: State, *rest: Any, **how: Any) -> mx.array:
        assert bool((draft(target, drafter, state, *rest, **how) < target.text.vocab_size).all())
        return super().__call__(target, drafter, state, *rest, **how)


def decoded(pair: Pair, k: int, tokens: int, texts: Texts, patch: pytest.MonkeyPatch) -> Texts:
    """The members of `texts` together in rounds of k drafts, about half of them right, on kernels alone."""
    stages = {"play_round": mlx_mtp.round.play_round, "draft": HalfRight(texts)}
    with patch.context() as inside:
        for name, stage in stages.items():

            def guarded(*args: Any, stage: Callable[..., Any] = stage, **how: Any) -> Any:
                with without_stock(patch):
                    return stage(*args, **how)

            inside.setattr(mlx_mtp.round, name, guarded)
        prompts, settings = [PROMPTS[b] for b in texts], [SETTINGS[b] for b in texts]
        replies = generate_batch(pair, prompts, max_tokens=tokens, sampling=settings, num_draft_tokens=k)
    for reply in replies:
        assert k == 0 or 0 < reply.stats.accepted < reply.stats.drafted
    return {member: reply.tokens for member, reply in zip(texts, replies, strict=True)}


def plain_text(pair: Pair, member: int, tokens: int, patch: pytest.MonkeyPatch) -> Texts:
    """Decoded alone and without drafts."""
    return decoded(pair, 0, tokens, {member: []}, patch)


def check_text(
    kind: str, dtype: mx.Dtype, ks: Sequence[int], tokens: int, metal: Runner, patch: pytest.MonkeyPatch
) -> None:
    """With every k the text of plain decoding, which goes past the window; each time our kernels ran."""
    pair = pair_on_kernels(kind, dtype)
    plain = plain_text(pair, 0, tokens, patch)
    assert len(PROMPTS[0]) > WINDOW and len(set(plain[0])) > tokens // 4
    assert plain_text(with_all_logits(pair), 0, tokens, patch) == plain
    for k in ks:
        metal.reset()
        assert decoded(pair, k, tokens, plain, patch) == plain, f"k = {k}"
        check_kernels_ran(pair, metal)


def with_all_logits(pair: Pair) -> Pair:
    """Tokens are chosen from all logits by `sampling.choose`, which have the same bits."""
    target = replace(pair.target, kernels=replace(pair.target.kernels, head_choose=None))
    return replace(pair, target=target, rounds=Rounds(target, pair.drafter, compiled=False))


def check_kernels_ran(pair: Pair, metal: Runner) -> None:
    """Of every family that the pair has a use for."""
    expected = {
        "verify_qmm",
        "verify_attention",
        "prefill_attention",
        "norm_rotate",
        "add_norm",
        "head_",
        "choose_",
    }
    if pair.target.text.num_experts:
        expected.add("verify_experts")
    if pair.drafter is not None and pair.drafter.centroid_head is not None:
        expected.add("centroid_head")
    ran = {name for name, counts in metal.counts.items() if counts.launches}
    assert {family for family in expected if any(name.startswith(family) for name in ran)} == expected


class Rows(NamedTuple):
    """What teacher-forced texts leave."""

    logits: mx.array  # [B, rows, V]
    drafter_row: mx.array  # [B, 1, H] of one draft step after them
    drafted: mx.array  # [B, 1, N] its logits, of a clustered head those of the best clusters
    kv: KeysValues

    def of(self, b: int) -> list[mx.array]:
        own = (self.logits, self.drafter_row, self.drafted)
        return [x[b] for x in (*own, *(buffer for both in self.kv for buffer in both))]


def prefilled(pair: Pair, members: Sequence[int]) -> tuple[KeysValues, mx.array]:
    """K/V of the members' prompts, each prefilled alone, and their lengths [B]."""
    solo = []
    for b in members:
        solo.append(list(new_kv(pair.target, 256)))
        prefill(pair.target, solo[-1], PROMPTS[b])
    kv = tuple(
        (mx.concatenate([one[i][0] for one in solo]), mx.concatenate([one[i][1] for one in solo]))
        for i in range(len(solo[0]))
    )
    return kv, mx.array([len(PROMPTS[b]) for b in members], mx.int32)


def forced(pair: Pair, members: Sequence[int], split: Sequence[int]) -> Rows:
    """The members' texts after their prompts, all together, in passes of `split` rows; then one draft step."""
    target, drafter = pair.target, pair.drafter
    assert drafter is not None
    kv, length = prefilled(pair, members)
    done, logits = 0, []
    for rows in split:
        tokens = mx.array([TEXTS[b][done : done + rows] for b in members], mx.uint32)
        hidden, kv = verify(target, tokens, kv, length, bucket=256)
        logits.append(logits_of(target, hidden))
        mx.eval(logits, kv)
        done, length = done + rows, length + rows
    view = view_for_drafter(target.text, drafter, kv, length, bucket=256)
    row = draft_hidden(drafter, embed(target, tokens[:, -1:]), hidden[:, -1:], view)
    return Rows(mx.concatenate(logits, axis=1), row, draft_logits(drafter, row)[0], kv)


def check_rows(
    kind: str, dtype: mx.Dtype, splits: Sequence[tuple[int, ...]], patch: pytest.MonkeyPatch
) -> None:
    """Bits are the same row by row and alone as in larger passes of a ragged batch; values those of the references."""
    pair = pair_on_kernels(kind, dtype)
    one_by_one = (1,) * sum(splits[0])
    alone = [forced(pair, [b], one_by_one) for b in range(3)]
    for split in splits:
        together = forced(pair, range(3), split)
        for b in range(3):
            for i, (got, want) in enumerate(zip(together.of(b), alone[b].of(0), strict=True)):
                assert mx.array_equal(got, want), f"passes of {split}, row {b}, array {i}"
    check_near(together, kind, dtype, one_by_one, patch)


def check_near(
    got: Rows, kind: str, dtype: mx.Dtype, split: tuple[int, ...], patch: pytest.MonkeyPatch
) -> None:
    """Logits and the drafter's rows against those of the references."""
    pair = on_references(quantised_pair(kind, dtype=dtype), patch)
    want = forced(pair, range(3), split)
    wide = on_references(quantised_pair(kind), patch) if dtype != mx.float32 else with_noise(pair)
    other = forced(wide, range(3), split)
    for name in ("logits", "drafter_row"):
        ours, theirs, rounded = (rows._asdict()[name].astype(mx.float32) for rows in (got, want, other))
        noise = float(mx.abs(rounded - theirs).mean())
        assert 0 < noise < float(theirs.max() - theirs.min()) / 10
        assert float(mx.abs(ours - theirs).mean()) <= LIMITS[dtype] * noise, name


def with_noise(pair: Pair) -> Pair:
    """Every product multiplied by 1 and about a unit in the last place of float32."""
    keys = itertools.count()

    def noisy(kernels: Kernels) -> Kernels:
        def project(weight: Weight, x: mx.array) -> mx.array:
            out = kernels.project(weight, x)
            return out * (1 + ULP * mx.random.normal(out.shape[-1:], key=mx.random.key(next(keys))))

        return replace(kernels, project=project)

    assert pair.drafter is not None
    target = replace(pair.target, kernels=noisy(pair.target.kernels))
    return replace(pair, target=target, drafter=replace(pair.drafter, kernels=noisy(pair.drafter.kernels)))


@pytest.mark.parametrize("kind, tokens", [("a4b", 12), ("e2b", 6)])
def test_text_on_our_metal_source(
    kind: str, tokens: int, metal: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_text(kind, mx.float32, [3], tokens, metal, monkeypatch)


@pytest.mark.parametrize("kind", ["e2b", "31b"])
def test_rows_on_our_metal_source(kind: str, metal: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    check_rows(kind, mx.float32, SOME, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_on_our_metal_source(
    kind: str, dtype: mx.Dtype, metal: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_text(kind, dtype, [1, 2, 3, 4], 48, metal, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_all_passes_on_our_metal_source(
    kind: str, dtype: mx.Dtype, metal: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_rows(kind, dtype, MANY, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_three_ragged_rows_together_have_their_own_texts(
    kind: str, metal: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_on_kernels(kind, mx.float32)
    alone = {member: plain_text(pair, member, 24, monkeypatch)[member] for member in range(3)}
    for k in (0, 2, 4):
        assert decoded(pair, k, 24, alone, monkeypatch) == alone, f"k = {k}"
