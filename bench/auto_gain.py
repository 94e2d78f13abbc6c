"""What "auto" gains and loses against the best fixed number of drafts, measured on enlarged demo pairs, two BLAS.

    python bench/auto_gain.py stock-dense --passes 4 --json bench/results/auto_gain.json
    python bench/auto_gain.py openblas-dense openblas-moe --passes 3 --json bench/results/auto_gain.json
    python bench/auto_gain.py --json bench/results/auto_gain.json        # no more passes: only the summary

MLX's own BLAS on Linux takes as long for each row as for the first; OpenBLAS reads weights once for several rows, and
checks drafts nearly for nothing. The pairs are enlarge.py's: texts and acceptance are the demo pair's. A pass plays
every text with every arm in turn, each pass beginning with another, decoding only; runs add their passes to those in
the file. Speeds are the best fixed arm's seconds over auto's: below 1 auto is slower. The best of nine arms by noisy
times is best partly by luck, so it is chosen on one half of the passes and compared on the other, both ways; the
stricter figure, chosen in hindsight on the very passes that it is compared on, stands beside it, and so does the one
number that is best for all texts.
"later texts": times of rounds are known from earlier ones. "first text": nothing is known and nothing is traced yet,
against arms that are traced, and against plain decoding whose first text it is too. The measured costs of rounds and
the demo pair's recorded acceptance (traces/demo.json) are then played through the simulator.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from auto_gain_summary import FIRST_PLAIN, summary, words
from demo_models import held_out_chat, held_out_code, load_ours
from enlarge import SOURCE, enlarge, size_for
from preload import check_preloaded, cost_of_rows
from report import commit, machine, record, rounded, save

from mlx_mtp import Sampling
from mlx_mtp.conversation import Conversation
from mlx_mtp.fit import Fit
from mlx_mtp.pair import Pair
from mlx_mtp.policy import CANDIDATES
from mlx_mtp.prompt import prompt_ids
from mlx_mtp.round import Rounds
from mlx_mtp.round_times import RoundTimes
from mlx_mtp.timed_rounds import TimedRounds

OPENBLAS = Path("/usr/lib/x86_64-linux-gnu/libopenblas.so.0")
FIXED = CANDIDATES  # all that "auto" may play
MOST = max(FIXED)
TOKENS = 256
GREEDY = Sampling(temperature=0.0)
# GB of MLPs and experts, with 0.03 of others: beyond a cache of 32 MB; fewer where each row is computed alone.
GIGABYTES = {"stock": 0.03, "openblas": 0.1}
EXPERTS = 32
VARIANTS = tuple(f"{blas}-{kind}" for blas in GIGABYTES for kind in ("dense", "moe"))
CURVE_TURNS = 9
TURN = 3  # arms by which a pass begins later than the one before


@dataclass(frozen=True, slots=True)
class Sample:
    """One text decoded once by one arm, by the clock and in processor time, which other processes hardly lengthen."""

    turn: str
    text: str
    arm: str
    seconds: float
    processor: float
    tokens: int
    rounds: int
    load: float  # of the machine, before
    reason: str | None = None  # why auto parked


def texts_of(pair: Pair) -> dict[str, list[int]]:
    """Token ids of a prompt of code, one of chat and one of prose."""
    card = (SOURCE / "MODEL_CARD.md").read_text(encoding="utf-8").split("\n\n")
    prose = next(part for part in card if len(part) > 200 and part[0].isalpha())
    return {
        "code": held_out_code("demo", 1)[0],
        "chat": held_out_chat(pair, "demo", 1)[0],
        "prose": prompt_ids(pair.prompt_format, prose).ids,
    }


class Arms:
    """Plays texts on one pair; what each arm has learned is its own."""

    def __init__(self, pair: Pair, tokens: int, *, with_first: bool) -> None:
        self.pair, self.tokens, self._with_first = pair, tokens, with_first
        self.later = (RoundTimes(pair.rounds.times.prior), Fit())
        self.written: dict[str, list[int]] = {}

    def names(self) -> list[str]:
        first = ["auto, first", FIRST_PLAIN] if self._with_first else []
        return [*(name_of(k) for k in FIXED), "auto, later", *first]

    def warm_up(self, texts: dict[str, list[int]]) -> None:
        """Trace what the fixed arms play, and let the later texts have earlier ones."""
        for ids in texts.values():
            for k in FIXED:
                self._decode(self.pair, ids, k, rounds=3)
        for name, ids in texts.items():
            self.play("auto, later", name, ids, "warm-up")

    def play(self, arm: str, text: str, ids: list[int], turn: str) -> Sample:
        load = machine()["load_average"][0]
        pair, drafts = self.pair, next((k for k in FIXED if name_of(k) == arm), "auto")
        if arm in ("auto, first", FIRST_PLAIN):
            drafts = "auto" if arm == "auto, first" else 0
            pair = replace(pair, rounds=Rounds(pair.target, pair.drafter))
        else:
            learned = self.later if arm == "auto, later" else (RoundTimes(), Fit())
            pair.rounds.times, pair.rounds.fit = learned
        tokens, seconds, processor, stats = self._decode(pair, ids, drafts)
        same = self.written.setdefault(text, tokens)
        if same != tokens:
            sys.exit(f"{arm} writes another {text} than plain decoding: nothing is reported")
        return Sample(
            turn,
            text,
            arm,
            round(seconds, 4),
            round(processor, 4),
            len(tokens),
            stats.rounds,
            load,
            stats.reason if drafts == "auto" else None,
        )

    def _decode(self, pair: Pair, ids: list[int], drafts: int | str, rounds: int | None = None) -> Any:
        """-> tokens, seconds and processor seconds after the first of them, statistics."""
        chunks = Conversation(pair).stream(
            ids, max_tokens=self.tokens, sampling=GREEDY, num_draft_tokens=drafts
        )
        first = next(chunks)
        tokens, last = list(first.tokens), first
        started, spent = time.perf_counter(), time.process_time()
        for number, chunk in enumerate(chunks, 1):
            tokens += chunk.tokens
            last = chunk
            if number == rounds:
                break
        mx.synchronize()
        seconds, processor = time.perf_counter() - started, time.process_time() - spent
        chunks.close()
        return tokens, seconds, processor, last.stats


def in_turn(names: list[str], number: int) -> list[str]:
    """The arms of a pass, each of which begins with another: what comes last has the warmest machine."""
    first = TURN * number % len(names)
    return names[first:] + names[:first]


def name_of(drafts: int) -> str:
    return f"k={drafts}" if drafts else "plain"


def curve_of(pair: Pair) -> list[float]:
    """Seconds of a round that makes and verifies 0, 1, .. drafts: the least of several, in turn, so that what else runs
    on the machine lengthens none of them."""
    timed = TimedRounds(pair.rounds, room=(MOST + 1) ** 2 * (CURVE_TURNS + 1))
    turns = [[timed.play(drafts) for drafts in range(MOST + 1)] for _ in range(CURVE_TURNS + 1)]
    return [round(min(seconds), 5) for seconds in zip(*turns[1:], strict=True)]


def play_variant(
    variant: str,
    folder: Path,
    passes: int,
    tokens: int,
    gigabytes: float | None,
    seconds: float | None,
    with_first: bool,
) -> dict[str, Any]:
    """Samples of one variant in this process, whose BLAS it is; the curve is measured before them."""
    began, started = time.strftime("%Y-%m-%d %H:%M:%S"), time.perf_counter()
    blas, kind = variant.split("-")
    size = size_for(
        json.loads((SOURCE / "target" / "config.json").read_text()),
        gigabytes or GIGABYTES[blas],
        EXPERTS if kind == "moe" else 0,
    )
    place = folder / f"{variant} {size.mlp} {size.experts} {size.expert}"
    if not (place / "drafter").is_dir():
        enlarge(place, size)
    four_rows = check_preloaded() if blas == "openblas" else cost_of_rows(4)
    pair = load_ours(str(place / "target"))
    arms, texts = Arms(pair, tokens, with_first=with_first), texts_of(pair)
    arms.warm_up(texts)
    samples = []
    for number in range(passes):
        print(f"{variant}: pass {number + 1} of {passes}", file=sys.stderr, flush=True)
        for text, ids in texts.items():
            samples += [
                arms.play(arm, text, ids, f"{began} #{number + 1}") for arm in in_turn(arms.names(), number)
            ]
        if seconds is not None and time.perf_counter() - started > seconds * (number + 1) / (number + 2):
            break  # another pass would take longer than there is time
    return {
        "size": asdict(size) | {"tokens": tokens},
        "four rows cost one row times": rounded(four_rows),
        "began": began,
        "commit": commit(),
        "curve": curve_of(pair),
        "samples": [asdict(sample) for sample in samples],
    }


def in_child(variant: str, arguments: list[str], environment: Callable[[], dict[str, str]]) -> dict[str, Any]:
    """What `play_variant` gives in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [sys.executable, __file__, variant, "--child", str(path), *arguments]
        if subprocess.run(command, env=environment(), check=False).returncode:
            sys.exit(f"{variant}: the measurement failed, nothing of it is kept")
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def environment_of(variant: str) -> dict[str, str]:
    if variant.startswith("stock"):
        return dict(os.environ)
    if not OPENBLAS.is_file():
        sys.exit(f"{OPENBLAS}: no such library; on Debian: apt install libopenblas0-pthread")
    return {**os.environ, "LD_PRELOAD": str(OPENBLAS), "OPENBLAS_NUM_THREADS": "1"}


def add(kept: dict[str, Any], variant: str, found: dict[str, Any]) -> None:
    """Samples join those of earlier runs; a pair of another size, or texts of another length, begin anew."""
    own = kept.setdefault(variant, {"size": found["size"], "curves": [], "runs": [], "samples": []})
    if own["size"] != found["size"]:
        kept.pop(variant)
        return add(kept, variant, found)
    own["curves"].append(found["curve"])
    own["runs"].append({name: found[name] for name in ("began", "commit", "four rows cost one row times")})
    own["samples"] += found["samples"]
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="begin no pass that would end later, of a variant")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="a text")
    parser.add_argument("--gigabytes", type=float, help="of added weights, for all variants")
    parser.add_argument("--folder", type=Path, help="where enlarged pairs are kept; else written anew")
    parser.add_argument("--json", type=Path, help="where samples are added and the record is written")
    parser.add_argument("--later-only", action="store_true", help="leave out first texts")
    parser.add_argument("--anew", action="store_true", help="forget the samples of these variants")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.variants) - set(VARIANTS):
        parser.error(f"no such variant: {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    mx.set_default_device(mx.cpu)
    if args.child:
        found = play_variant(
            args.variants[0],
            args.folder,
            args.passes,
            args.tokens,
            args.gigabytes,
            args.seconds,
            not args.later_only,
        )
        args.child.write_text(json.dumps(found))
        return
    measure(args)


def measure(args: argparse.Namespace) -> None:
    before = json.loads(args.json.read_text())["results"] if args.json and args.json.is_file() else {}
    kept = before.get("variants", {})
    for variant in args.variants if args.anew else ():
        kept.pop(variant, None)
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--passes", str(args.passes), "--tokens", str(args.tokens)]
        arguments += ["--folder", str(args.folder or folder)]
        arguments += ["--gigabytes", str(args.gigabytes)] if args.gigabytes else []
        arguments += ["--seconds", str(args.seconds)] if args.seconds else []
        arguments += ["--later-only"] if args.later_only else []
        for variant in args.variants:
            add(kept, variant, in_child(variant, arguments, partial(environment_of, variant)))
    results = {"summary": summary(kept), "variants": kept}
    result = record(
        '"auto" against the best fixed number of drafts, enlarged demo pairs, greedy, float32', {}, results
    )
    print(words(results["summary"]))
    save(result, args.json)


if __name__ == "__main__":
    sys.exit(main())
