"""Which promise holds on this machine: is a row of a target pass computed the same whatever it is computed with?"""

import mlx.core as mx

from mlx_mtp.prefill import prefill
from mlx_mtp.state import MAX_DRAFT_TOKENS, KeysValues, new_kv
from mlx_mtp.target import Target, logits_of
from mlx_mtp.verify import verify

PROMPT_ROWS = 24
SPLITS = ((1,) * (MAX_DRAFT_TOKENS + 1), (2,) * 8, (5, 4, 4, 3), (MAX_DRAFT_TOKENS + 1,))


def rows_are_invariant(target: Target) -> bool:
    """Whether logits and K/V of 16 rows are bitwise equal in passes of 1, 2, 3-5 and 16 rows, in two buckets and as
    one of two rows of a batch. True is promise (a) for what was compared, False means promise (b).
    """
    vocab = target.text.vocab_size
    ids = [(i * 7919 + 3) % vocab for i in range(PROMPT_ROWS + MAX_DRAFT_TOKENS + 1)]
    expected = _rows(target, ids, SPLITS[0], bucket=256, batch=1)
    others = [(split, 256, 1) for split in SPLITS[1:]] + [(SPLITS[0], 512, 1), (SPLITS[2], 256, 2)]
    return all(
        bool(mx.array_equal(expected, _rows(target, ids, split, bucket=bucket, batch=batch)))
        for split, bucket, batch in others
    )


def _rows(target: Target, ids: list[int], split: tuple[int, ...], *, bucket: int, batch: int) -> mx.array:
    """Logits [16, V] of the ids after the prompt, in passes of the sizes in `split`; the last of `batch` equal rows."""
    kv_list = list(new_kv(target, 512))
    prefill(target, kv_list, ids[:PROMPT_ROWS])
    kv: KeysValues = tuple((mx.repeat(k, batch, axis=0), mx.repeat(v, batch, axis=0)) for k, v in kv_list)
    done, logits = PROMPT_ROWS, []
    for rows in split:
        tokens = mx.array([ids[done : done + rows]] * batch, mx.uint32)
        hidden, kv = verify(target, tokens, kv, mx.array([done] * batch, mx.int32), bucket=bucket)
        logits.append(logits_of(target, hidden)[-1])
        done += rows
    out = mx.concatenate(logits)
    mx.eval(out)
    return out
