"""The command ``python -m milkernels bench``."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from milkernels.bench import contenders, report
from milkernels.bench.run import Bench, Options
from milkernels.bench.workload import DTYPES, Workload, fast_dtypes, load_features
from milkernels.testing import CASES, FEATURES, MODES, Shape, even_lengths, skewed_lengths, small_lengths

_EXAMPLES = """examples:
  python -m milkernels bench
  python -m milkernels bench --distribution skewed --dtype float32 --mode fwd,step,frozen
  python -m milkernels bench --features musk2.npz --json result.json
"""


def names_among(known: Sequence[str]):
    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(filter(None, text.split(","))))
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{text!r}: give some of {', '.join(known)}")
        return names

    return parse


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m milkernels bench",
        description="Times an op against what people write today, on this machine, after checking its "
        "results against float64. Without arguments: one bag of 100,000 instances.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--op", choices=CASES, default="gated_attention_pool", metavar="OP", help=", ".join(CASES))
    shape = p.add_argument_group("shape")
    shape.add_argument("--instances", type=positive, default=100_000)
    shape.add_argument("--dim", type=positive, default=512, help="of an instance (512); its embedding has half as many")
    shape.add_argument("--hidden", type=positive, help="default: 128 for DSMIL, else 256")
    shape.add_argument("--heads", type=positive, help="or classes; default: 2 or 4 where the op has classes, else 1")
    bags = shape.add_mutually_exclusive_group()
    bags.add_argument("--lengths", type=_lengths, help="of the bags: 100,200,...")
    kinds = ("one", "even", "skewed", "small")
    bags.add_argument("--distribution", choices=kinds, help="of lengths; small: 5 to 50 whatever --instances says")
    shape.add_argument("--bags", type=positive, help="how many (even 32, skewed 32, small 512)")
    shape.add_argument("--padded", action="store_true", help="hand over a padded batch and its mask")
    shape.add_argument("--features", default="relu", help=f"{', '.join(FEATURES)}, FILE.npz: features and offsets")
    what = p.add_argument_group("what is measured")
    types = "default: float32, and bfloat16 where PyTorch has fast products for it"
    what.add_argument("--dtype", type=names_among(list(DTYPES)), default=fast_dtypes(), help=types)
    what.add_argument("--mode", type=names_among(MODES), default=["fwd", "step"], help=", ".join(MODES))
    what.add_argument("--backends", help="native, triton, reference; default: the one that serves the op")
    what.add_argument("--contenders", help=f"{', '.join(contenders.REGISTRY)}; default: eager, compile and peers")
    what.add_argument("--dropout", type=float, default=0.0)
    what.add_argument("--seed", type=int, default=0)
    what.add_argument("--threads", type=positive)
    what.add_argument("--budget", type=float, default=40.0, help="seconds of timing in all (default 40)")
    what.add_argument("--rounds", type=positive, help="exactly so many, whatever they take")
    what.add_argument("--no-memory", action="store_true", help="do not measure memory")
    p.add_argument("--json", type=Path, metavar="FILE", help="writes all that was measured")
    return p


def _shape(arguments: argparse.Namespace) -> Shape:
    lengths, dim = arguments.lengths, arguments.dim
    if arguments.features not in FEATURES:
        features, lengths = load_features(arguments.features)
        dim = features.shape[1]
    elif lengths is None:
        kind = arguments.distribution or ("even" if arguments.bags else "one")
        if kind == "one":
            if (arguments.bags or 1) > 1:
                raise ValueError(f"--distribution one has one bag; got --bags {arguments.bags}")
            lengths = (arguments.instances,)
        elif kind == "small":
            lengths = small_lengths(arguments.bags or 512, arguments.seed)
        else:
            make = even_lengths if kind == "even" else lambda b, n: skewed_lengths(b, n, arguments.seed)
            lengths = make(arguments.bags or 32, arguments.instances)
    if 0 in lengths:
        raise ValueError(f"{arguments.instances} instances are too few for {len(lengths)} bags")
    case = CASES[arguments.op]
    heads = arguments.heads or case.default_heads
    # Scores stand alone: their width is the number of heads.
    width = dim if case.leading == "x" else heads
    return Shape(lengths, width, arguments.hidden or case.default_hidden, heads)


def _contenders(arguments: argparse.Namespace, workload: Workload) -> list[str]:
    """The names to run: peers, then ours."""
    known = list(contenders.REGISTRY)
    case, bags = workload.case, min(2, workload.shape.bags)
    tiny = replace(workload, shape=replace(workload.shape, lengths=(2,) * bags), features=FEATURES[0])
    inputs = tiny.inputs(DTYPES[arguments.dtype[0]])
    if arguments.contenders:
        names = known if arguments.contenders == "all" else names_among(known)(arguments.contenders)
    else:
        names = contenders.default_contenders(case, inputs)
    if arguments.backends:
        ours = [name for name in known if contenders.REGISTRY[name].ours]
        return list(dict.fromkeys([*names, *names_among(ours)(arguments.backends)]))
    if any(contenders.REGISTRY[name].ours for name in names):
        return names
    return [*names, *contenders.default_backends(case, inputs)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code is 1 where one of our results is wrong or missing, else 0."""
    argv = list(sys.argv[1:] if argv is None else argv)
    p = parser()
    arguments = p.parse_args(argv)
    try:
        shape = _shape(arguments)
        about = (arguments.features, arguments.padded, arguments.dropout, arguments.seed)
        workload = Workload(arguments.op, shape, *about)
        names = _contenders(arguments, workload)
        if unknown := [mode for mode in arguments.mode if mode not in workload.case.modes()]:
            raise ValueError(f"{arguments.op} has no parameters to train: no mode {', '.join(unknown)}")
    except (ValueError, OSError, argparse.ArgumentTypeError) as error:
        p.error(str(error))
    chosen = (arguments.dtype, arguments.mode, names, arguments.budget, arguments.rounds, arguments.threads)
    options = Options(*chosen, memory=not arguments.no_memory)
    console = Console(width=None if sys.stdout.isatty() else 170)
    with console.status("") as status:
        result = Bench(workload, options, status.update).run()
    report.show(console, result, workload)
    if arguments.json:
        report.write(report.of_run(result, workload, argv), arguments.json)
    return int(result.failed)
