"""``python -m milkernels info | bench``."""

import argparse
import inspect
import os
import sys
import textwrap

import torch

import milkernels
from milkernels import backends, native


def _ops() -> tuple[str, ...]:
    """The public ops, without what is composed of them; a gated one is its plain op with two more parameters."""
    public = {name: getattr(milkernels, name) for name in milkernels.__all__}
    chosen = (name for name, f in public.items() if inspect.isfunction(f) and _takes_backend(f) and not _composed(f))
    return tuple(dict.fromkeys(name.removeprefix("gated_") for name in sorted(chosen)))


def _takes_backend(function) -> bool:
    return "backend" in inspect.signature(function).parameters


def _composed(function) -> bool:
    """Whether it is made of other ops."""
    return function.__module__ == "milkernels.ops.classical"


def info() -> None:
    """Prints what is installed, what was built, and which backend serves which op and why others do not."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(f"milkernels      {milkernels.__version__}, torch {torch.__version__}")
    print(f"CPU capability  {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print(f"GPU             {gpu}")

    for device, title in (("cpu", "Compiled extension"), ("cuda", "Compiled kernels for CUDA tensors")):
        print(f"\n{title}")
        for key, value in native.build_info(device).items():
            running = f" (this is {torch.__version__})" if key == "built with torch" else ""
            print(f"  {key:18}{value}{running}")
        if (error := native.load_error(device)) is not None:
            print(textwrap.fill(f"none: {error}", 110, initial_indent="  ", subsequent_indent="  "))

    groups: dict[tuple, list[str]] = {}  # ops that are served alike, for the same reasons
    for op, device, served_by, reasons in backends.report(_ops()):
        why = tuple((backend, reason.replace(op, "them")) for backend, reason in reasons.items())
        groups.setdefault((device, served_by, why), []).append(op)
    print("\nBackends for float32 tensors")
    for (device, served_by, why), ops in sorted(groups.items()):
        lacking = native.lacks(device).values()
        print(textwrap.fill(", ".join(ops), 110, initial_indent=f"  {device}: ", subsequent_indent="    "))
        print(
            f"    served by {served_by}",
            *([f"native has {', '.join(lacking)}: such calls go past it"] if "native" in served_by and lacking else ()),
            *(f"not by {backend}: {reason}" for backend, reason in why),
            sep="\n    ",
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m milkernels", description="Kernels for MIL in PyTorch.")
    parser.add_argument("--version", action="version", version=f"milkernels {milkernels.__version__}")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("info", help="what is installed, and which backend serves which op")
    commands.add_parser("bench", help="benchmarks on this machine", add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command is None:
        if rest:
            parser.error(f"a command comes first; got {' '.join(rest)}")
        parser.print_help()
        return 0
    if arguments.command == "bench":
        from milkernels.bench import cli  # lazily: it needs the packages of the extra `bench`

        return cli.main(rest) or 0
    if rest:
        parser.error(f"info takes no arguments; got {' '.join(rest)}")
    info()
    return 0


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)
