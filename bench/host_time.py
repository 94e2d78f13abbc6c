"""What the host does in a round at the depth of 26B and 31B: building its graph, and dispatching and reading it.

    python bench/make_peer_env.py PEERS mlx-lm mlx-vlm
    python bench/host_time.py PEERS --json bench/results/host_time.json

30 and 60 layers in the published pattern, made-up weights of tiny widths, so that arithmetic takes next to nothing.
"Build" is the processor time in which a round is described: for us the compiled round, traced before; for the peers all
that they do outside of MLX's calls that dispatch or wait, which "host" is for everybody. On the CPU backend the
arithmetic happens while dispatching. That backend spells out norms and attention, for all arms alike: on Metal there is
less to build and dispatch.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from make_peer_env import python_of
from peers import ARMS, REFERENCE, Arm, Pair, compare
from report import machine, record, rounded, save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from mlx_mtp.published_configs import published_drafter, published_target
from tiny_checkpoints import published_names, random_tensors, write_checkpoint

SIZES = ("26b-a4b", "31b")
NARROW: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 64,
    "num_kv_shared_layers": 0,  # as published; mlx-lm takes another value where a config does not say
    "use_double_wide_mlp": False,
}
FEW_EXPERTS = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}
DRAFTER_LAYERS = {"num_kv_shared_layers": 4}
PROMPT = [2, 17, 101, 33, 250, 9, 64, 77]
DEEP_ARMS = {
    REFERENCE: ARMS[REFERENCE],
    "ours k=1": Arm("peer_ours.py", None, True, 1),
    "ours k=3": Arm("peer_ours.py", None, True, 3),
    "mlx-lm plain": ARMS["mlx-lm plain"],
    "mlx-vlm k=3": Arm("peer_mlx_vlm.py", "mlx-vlm", True, 3),
}
STEP = "mlx-lm plain"


def write_deep_pair(size: str, folder: Path) -> Pair:
    """The published layers with tiny widths and random weights, float32; almost every draft is wrong."""
    target, drafter = published_target(size), published_drafter(size)
    target["text_config"] |= NARROW
    if target["text_config"].get("enable_moe_block"):
        target["text_config"] |= FEW_EXPERTS
    target["vocab_size"] = NARROW["vocab_size"]
    drafter["text_config"] |= NARROW | DRAFTER_LAYERS
    drafter["backbone_hidden_size"] = NARROW["hidden_size"]
    for name, config, prefix in (
        ("target", target, "model.language_model."),
        ("drafter", drafter, "model."),
    ):
        write_checkpoint(folder / name, config, published_names(random_tensors(config), prefix))
    return Pair(size, folder / "target", folder / "drafter", [PROMPT])


def against_step(figures: dict[str, Any]) -> dict[str, Any]:
    """Building a round, dispatching it and waiting for it, over mlx-lm's plain step; by arm."""
    step = figures[STEP]["host, a round"]
    return {
        name: {
            "build": rounded(own["host, a round"]["build ms"] / step["build ms"]),
            "all host work": rounded(own["host, a round"]["host ms"] / step["host ms"]),
            "build, a token if every draft is kept": rounded(
                own["host, a round"]["build ms"] / (1 + (DEEP_ARMS[name].k or 0)) / step["build ms"]
            ),
        }
        for name, own in figures.items()
    }


def show(name: str, found: dict[str, Any]) -> None:
    print(f"{name}: milliseconds a round")
    print(
        f"{'':14} {'build':>7} {'host':>7} {'dispatch':>8} {'wait':>7} {'syncs':>6}"
        "   build / mlx-lm's step  (a token if every draft is kept)  text"
    )
    for arm, own in found["arms"].items():
        host, ratios = own["host, a round"], found["over mlx-lm's plain step"][arm]
        print(
            f"{arm:14} {host['build ms']:7.2f} {host['host ms']:7.2f} {host['dispatch ms']:8.2f}"
            f" {host['wait ms']:7.2f} {host['syncs']:6.1f}   {ratios['build']:21.2f}"
            f"  {ratios['build, a token if every draft is kept']:30.2f}  {own['text']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", type=Path, help="the folder that make_peer_env.py filled")
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"of {', '.join(SIZES)}; both if none")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each arm")
    parser.add_argument("--json", type=Path, help="also write the record here")
    args = parser.parse_args()
    if unknown := set(args.sizes) - set(SIZES):
        parser.error(f"unknown size {', '.join(sorted(unknown))}; known are {', '.join(SIZES)}")
    for peer in ("mlx-lm", "mlx-vlm"):
        if not python_of(args.peers, peer).exists():
            parser.error(f"{args.peers / peer}: not there; run bench/make_peer_env.py {args.peers} {peer}")
    how = argparse.Namespace(**vars(args), drafts=3, warm_ups=1, runs=1, as_stored=False)
    results: dict[str, Any] = {"load before": machine()["load_average"], "sizes": {}}
    for size in args.sizes or SIZES:
        with tempfile.TemporaryDirectory() as folder:
            figures = compare(write_deep_pair(size, Path(folder)), DEEP_ARMS, how)
        results["sizes"][size] = {"arms": figures, "over mlx-lm's plain step": against_step(figures)}
    settings = {"tokens": args.tokens, "processes of each arm": args.repeats}
    result = record("host time of a round at published depths, tiny widths", settings, results)
    print(f"{result['what']}: {result['label']}")
    for size, found in results["sizes"].items():
        show(size, found)
    save(result, args.json)


if __name__ == "__main__":
    main()
