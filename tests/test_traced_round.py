"""What mx.compile traces of a round: nothing that could have been computed before it."""

from pathlib import Path

import mlx.core as mx

from mlx_mtp.checkpoint import read_drafter, read_target
from mlx_mtp.drafter import make_drafter
from mlx_mtp.round import play_round
from mlx_mtp.sampling import Sampling, sampler_class, sampling_arrays
from mlx_mtp.state import State, new_kv, no_drafts
from mlx_mtp.target import make_target
from tiny_checkpoints import drafter_config, mlx_names, random_tensors, target_config, write_checkpoint


def test_weights_are_evaluated_before_a_round_is_traced(tmp_path: Path) -> None:
    """A cast or load left lazy would be part of the trace and run again in every round."""
    for name, config, prefix in (
        ("target", target_config("a4b"), "language_model.model."),
        ("drafter", drafter_config("a4b", num_centroids=0), "model."),
    ):
        tensors = random_tensors(config, dtype=mx.bfloat16)
        write_checkpoint(tmp_path / name, config, mlx_names(tensors, prefix, None))
    checkpoint = read_target(tmp_path / "target", dtype=mx.float32)
    small = read_drafter(tmp_path / "drafter", dtype=mx.float32)
    target = make_target(checkpoint.config, checkpoint.tensors)
    drafter = make_drafter(small.config, small.tensors)

    sampling = Sampling(temperature=0.0)
    state = State(
        kv=new_kv(target, 256),
        length=mx.array([3], mx.int32),
        last=mx.array([5], mx.uint32),
        hidden=mx.zeros((1, 1, target.text.hidden_size)),
        drafts=no_drafts(1),
        seed=mx.array([0], mx.uint32),
        sampling=sampling_arrays(sampling, target.text.vocab_size),
        counts=None,
        active=mx.array([True]),
    )
    mx.eval(state)
    rounds = {"k": 2, "bucket": 256, "sampler": sampler_class([sampling])}
    before = _primitives(play_round(target, drafter, state, **rounds)[0], tmp_path)
    mx.eval(play_round(target, drafter, state, **rounds)[0].drafts)  # evaluates whatever was still lazy
    after = _primitives(play_round(target, drafter, state, **rounds)[0], tmp_path)
    assert before > 200, "the graph of a round was expected"
    assert before == after, "the first round's graph holds work that later ones do not"


def _primitives(state: State, folder: Path) -> int:
    """Operations in the graph that leads to a state's drafts."""
    graph = folder / "round.dot"
    mx.export_to_dot(str(graph), state.drafts)
    return graph.read_text().count("[label =")
