"""Kernels and references that are wrong on purpose: which tests notice?

    python tests/mutants.py [NAME ...] [-- ARGUMENTS OF PYTEST]

puts one after the other into a copy of the sources, build/mutants, compiles there what it needs, and names the tests
that fail.  One that no test notices is a test to write.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "mutants"
NATIVE = ("tests/test_numbers.py", "tests/test_native.py", "tests/test_attention.py", "--legs", "native")
EMULATED = ("tests/test_numbers.py", "tests/test_cuda.py", "--legs", "emulated")
REFERENCE = ("tests/test_numbers.py", "tests/test_reference.py", "--legs", "reference")
GRAPH = ("tests/test_accelerate_graph.py",)
MERGE = ("tests/test_merge.py",)
RANKS = ("tests/test_distributed.py",)
STREAM = ("tests/test_streaming.py", "tests/test_streaming_sources.py")
ENCODER = ("tests/test_encoding.py",)
INTERPRETED = ("tests/test_numbers.py", "tests/test_triton.py", "--legs", "interpreted")


@dataclasses.dataclass(frozen=True)
class Mutant:
    file: str
    old: str  # stands there once
    new: str
    tests: tuple
    which: str  # of the tests: those of ops that have the code


MUTANTS = {
    "graph-any-dimension": Mutant(
        "milkernels/integrations/graph.py",
        "while not (2 <= len(longer(rows)) <= 3 and longer(rows)[-2] == instances):",
        "while not 2 <= len(longer(rows)) <= 3:",
        *(GRAPH, "matcher or look_alikes or share"),
    ),
    "graph-other-rows": Mutant(
        "milkernels/integrations/graph.py",
        "        return [user if others == {root(rows)} else None]",
        "        return [user]",
        *(GRAPH, "matcher or look_alikes or share"),
    ),
    "graph-two-sums": Mutant(
        "milkernels/integrations/graph.py",
        "    bag = found[0] if len(found) == 1 else None",
        "    bag = found[0] if found else None",
        *(GRAPH, "matcher or look_alikes or share"),
    ),
    "graph-averages-of-others": Mutant(
        "milkernels/integrations/graph.py",
        "    if None in averages:\n        return None\n",
        "    averages = tuple(filter(None, averages))\n",
        *(GRAPH, "matcher or look_alikes or share"),
    ),
    "graph-any-head": Mutant(
        "milkernels/integrations/graph.py",
        "(each[i], head) for i, head in enumerate(heads)",
        "(each[i], head) for i, head in enumerate(heads[::-1])",
        *(GRAPH, "matcher or look_alikes or share"),
    ),
    "graph-mean-for-sum": Mutant(
        "milkernels/integrations/graph.py",
        'node if op(node) == "sum" else None',
        'node if op(node) in ("sum", "mean") else None',
        *(GRAPH, "matcher or look_alikes or share"),
    ),
    "graph-summands-read": Mutant(
        "milkernels/integrations/graph.py",
        '[node if op(node) == "sum" else None for node in dict.fromkeys(uses(user))]',
        '[node for node in dict.fromkeys(uses(user)) if op(node) == "sum"]',
        *(GRAPH, "matcher or look_alikes or share"),
    ),
    "graph-two-tensors": Mutant(
        "milkernels/integrations/graph.py",
        " or root(first[0].args[0]) is not root(second[0].args[0])",
        "",
        *(GRAPH, "matcher or look_alikes or share"),
    ),
    "graph-any-gelu": Mutant(
        "milkernels/integrations/graph.py",
        'if op(node) == "gelu" and node.kwargs.get("approximate", "none") != "none":',
        "if False:",
        *(GRAPH, "matcher or look_alikes or share"),
    ),
    "graph-dropped-weights": Mutant(
        "milkernels/integrations/graph.py",
        'return op(node) == "dropout" and (not node.args[2] or node.args[1] == 0)',
        'return op(node) == "dropout"',
        *(GRAPH, "matcher or look_alikes or share"),
    ),
    "graph-part-as-whole": Mutant(
        "milkernels/integrations/graph.py",
        "        return longer(node) == longer(node.args[0])",
        "        return True",
        *(GRAPH, "matcher or look_alikes or share"),
    ),
    "graph-detached": Mutant(
        "milkernels/integrations/graph.py",
        '    "unflatten",\n',
        '    "unflatten",\n    "detach",\n',
        *(GRAPH, "matcher or look_alikes or share"),
    ),
    "graph-writes": Mutant(
        "milkernels/integrations/graph.py",
        "    matches = [match for match in matches if not {root(node) for node in match.nodes} & set(written)]\n",
        "",
        *(GRAPH, "matcher or look_alikes or share"),
    ),
    "graph-product-for-gate": Mutant(
        "milkernels/integrations/graph.py",
        'if op(hidden) != "mul" or',
        'if op(hidden) not in ("mul", "add") or',
        *(GRAPH, "matcher or look_alikes or share"),
    ),
    "merge-share-without-the-whole": Mutant(
        *("milkernels/merging.py", "    return part.sum / whole.sum * below", "    return part.sum * below"),
        *(MERGE, "gradients_of_a_part"),
    ),
    "merge-mean-of-means": Mutant(
        "milkernels/merging.py",
        "    masses = share_of(sums, LogSum(segments.to_rows(top), torch.ones_like(sums.top)))",
        "    masses = (sums.top > -_INF).double()",
        *(MERGE, "promise or order_of_bags"),
    ),
    "merge-lost-digits": Mutant(
        *(
            "milkernels/merging.py",
            "    return torch.where(lse.isfinite(), sums, 1)",
            "    return torch.ones_like(sums)",
        ),
        *(MERGE, "promise"),
    ),
    "merge-lse-gradient-of-the-whole-alone": Mutant(
        *("milkernels/merging.py", "(share * (direct + through))", "(share * (direct + 0 * through))"),
        *(MERGE, "gradients_of_a_part"),
    ),
    "merge-parts-in-their-order": Mutant(
        *(
            "milkernels/merging.py",
            "    if offsets[0] is None:\n        return None\n    rows =",
            "    return None\n    rows =",
        ),
        *(MERGE, "order_of_bags or critical"),
    ),
    "merge-last-of-equals": Mutant(
        "milkernels/merging.py",
        "values.detach()).argmax(0)[None]",
        "values.detach()).flip(0).argmax(0).sub(len(parts) - 1).neg()[None]",
        *(MERGE, "critical"),
    ),
    "ranks-without-offsets": Mutant(
        *("milkernels/distributed.py", "log_sum_of(part, offsets).sum", "log_sum_of(part, None).sum"),
        *(RANKS, "exact or digits"),
    ),
    "ranks-digits-lost": Mutant(
        *("milkernels/distributed.py", "    if offsets is None and num_bags != 1:", "    if num_bags != 0:"),
        *(RANKS, "exact or digits"),
    ),
    "ranks-own-first": Mutant(
        "milkernels/distributed.py",
        "        whole, total = merge_bags([part[..., :-2] for part in parts], found)",
        """        whole, total = merge_bags(
            [part[..., :-2] for part in (*parts[ranks.rank :], *parts[: ranks.rank])],
            [*found[ranks.rank :], *found[: ranks.rank]],
        )""",
        *(RANKS, "exact"),
    ),
    "ranks-gradient-of-the-first": Mutant(
        "milkernels/distributed.py",
        "share_of(found[ranks.rank], total))",
        "share_of(found[0], total))",
        *(RANKS, "exact"),
    ),
    "ranks-mean-of-means": Mutant(
        *(
            "milkernels/distributed.py",
            "top[:, None], counts[:, None], ranks)",
            "top[:, None], counts[:, None] * 0 + 1, ranks)",
        ),
        *(RANKS, "exact"),
    ),
    "ranks-highest-wins-a-tie": Mutant(
        "milkernels/distributed.py",
        "        rank = torch.where(best, order, ranks.size).amin(0)  # [B, C]",
        "        rank = torch.where(best.any(0), torch.where(best, order, -1).amax(0), ranks.size)",
        *(RANKS, "tie"),
    ),
    "ranks-one-rank-s-gradient": Mutant(
        "milkernels/distributed.py",
        "        g = _torch.all_gather(sent, ctx.ranks.size, ctx.ranks.name).double().sum(0)",
        "        g = sent.double() * ctx.ranks.size",
        *(RANKS, "exact"),
    ),
    "ranks-drop-the-same": Mutant(
        "milkernels/distributed.py",
        "    return seed_of_part(seed, ranks.rank << _ROWS)",
        "    return seed",
        *(RANKS, "drop"),
    ),
    "stream-mean-of-means": Mutant(
        "milkernels/streaming/pooling.py",
        '    whole, total = merge_ragged(bag, LogSum(lse.double(), results["lost"]), run.reading.partial_offsets())',
        """    lse = lse.masked_fill(lse > -INF, 0)
    whole, total = merge_ragged(bag, LogSum(lse.double(), results["lost"]), run.reading.partial_offsets())""",
        *(STREAM, "numbers_of_the_whole and mean_pool"),
    ),
    "stream-lost-digits": Mutant(
        *(
            "milkernels/streaming/pooling.py",
            "log_sum_of(pooled, piece.offsets).sum",
            "log_sum_of(pooled, piece.offsets).sum * 0 + 1",
        ),
        *(STREAM, "large_lse"),
    ),
    "stream-rows-of-the-piece": Mutant(
        *("milkernels/streaming/pooling.py", "torch.where(indices < 0, -1, indices + piece.start)", "indices"),
        *(STREAM, "tie or numbers_of_the_whole"),
    ),
    "stream-sum-of-gradients-for-any": Mutant(
        *("milkernels/streaming/replay.py", "bool(p[i].any())", "bool(p[i].sum() != 0)"),
        *(STREAM, "without_gradient"),
    ),
    "stream-norm-of-gradients-for-any": Mutant(
        *("milkernels/streaming/replay.py", "bool(p[i].any())", "bool(p[i].norm() != 0)"),
        *(STREAM, "without_gradient"),
    ),
    "stream-all-again": Mutant(
        *("milkernels/streaming/replay.py", "bool(p[i].any())", "True"),
        *(STREAM, "without_gradient"),
    ),
    "stream-pieces-drop-the-same": Mutant(
        "milkernels/streaming/replay.py",
        "        return seed_of_part(self.seed, piece.start) if self.drops and valid else self.seed",
        "        return self.seed",
        *(STREAM, "drop"),
    ),
    "stream-random-numbers-not-repeated": Mutant(
        *("milkernels/streaming/reading.py", "            torch.set_rng_state(state)\n", ""),
        *(STREAM, "drop or encoder"),
    ),
    "stream-statistics-counted-twice": Mutant(
        *("milkernels/streaming/reading.py", "with self._buffers_kept(), contextlib", "with contextlib"),
        *(STREAM, "encoder"),
    ),
    "stream-rows-not-compared": Mutant(
        *("milkernels/streaming/reading.py", " or mark != self._marks[i]:", ":"),
        *(STREAM, "other_rows or changed"),
    ),
    "encoder-zero-by-norm": Mutant(
        "milkernels/encoding.py",
        "[(rows != 0).any() for rows in g.split(self.chunk)]",
        "[rows.norm() != 0 for rows in g.split(self.chunk)]",
        *(ENCODER, "zero"),
    ),
    "encoder-all-again": Mutant(
        *("milkernels/encoding.py", "                if not alive:\n", "                if False:\n"),
        *(ENCODER, "zero or without_gradient"),
    ),
    "encoder-random-numbers-not-repeated": Mutant(
        "milkernels/encoding.py",
        "                    _set_generator_states(self.devices, state)\n",
        "",
        *(ENCODER, "exact or augmentation"),
    ),
    "encoder-generators-not-left": Mutant(
        *("milkernels/encoding.py", ", _kept_generators(self.devices):", ":"),
        *(ENCODER, "exact or augmentation"),
    ),
    "encoder-statistics-counted-twice": Mutant(
        *(
            "milkernels/encoding.py",
            "_torch.unsharded(self.encoder), _kept_buffers(self.encoder), ",
            "_torch.unsharded(self.encoder), ",
        ),
        *(ENCODER, "exact"),
    ),
    "encoder-shared-casts": Mutant(
        *("milkernels/encoding.py", "enabled=enabled, cache_enabled=False))", "enabled=enabled))"),
        *(ENCODER, "autocast"),
    ),
    "encoder-half-sums": Mutant(
        "milkernels/encoding.py",
        "gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)",
        "gradient.clone()",
        *(ENCODER, "half_parameters"),
    ),
    "encoder-sums-into-a-gradient": Mutant(
        *(
            "milkernels/encoding.py",
            "torch.promote_types(gradient.dtype, torch.float32), copy=True)",
            "torch.promote_types(gradient.dtype, torch.float32))",
        ),
        *(ENCODER, "two_parameters"),
    ),
    "encoder-one-state-for-all": Mutant(
        *("milkernels/encoding.py", "last is not None and all(map(torch.equal, state, last))", "last is not None"),
        *(ENCODER, "exact or augmentation"),
    ),
    "encoder-other-patches": Mutant(
        *("milkernels/encoding.py", "            if other and torch.stack(other).any():", "            if False:"),
        *(ENCODER, "other_patches"),
    ),
    "reference-mask-missing": Mutant(
        "milkernels/ops/trilinear.py",
        "return scores if mask is None else scores.masked_fill(~mask[:, None], -INF)",
        "return scores",
        *(REFERENCE, "softmax or attention or query"),
    ),
    "reference-term-dropped": Mutant(
        *("milkernels/ops/trilinear.py", "lse = (top + z.log())", "lse = z.log()"),
        *(REFERENCE, "softmax or attention or query"),
    ),
    "triton-rows-short": Mutant(
        *("milkernels/triton/pool.py", "for row in tl.range(start, end, BN, num_stages=NS):"),
        *("for row in tl.range(start, end - 1, BN, num_stages=NS):", INTERPRETED, "mean_pool or weighted_pool"),
    ),
    "triton-parts-unscaled": Mutant(
        *("milkernels/triton/pool.py", "factor = tl.exp(part_top - base)"),
        *('factor = tl.where(part_top == float("-inf"), 0.0, 1.0)', INTERPRETED, "softmax_pool"),
    ),
    "cpu-sign": Mutant(
        *("csrc/cpu/scores.cpp", "static_cast<A>(-total[i])", "static_cast<A>(total[i])", NATIVE, "attention_weights"),
    ),
    "cpu-last-of-equals": Mutant(
        *("csrc/cpu/plain_pooling.cpp", "(a > b) | ((a != a)", "(a >= b) | ((a != a)", NATIVE, "max_pool"),
    ),
    "cpu-bias-gradient-dropped": Mutant(
        *("csrc/cpu/attention_score.h", "out.bias[first[b] + j] += bias_sum[b][j];", "(void)bias_sum;"),
        *(NATIVE, "attention and not loss and not weights"),
    ),
    "cpu-dropout-unscaled": Mutant(
        *("csrc/cpu/instances.cpp", "V::blendv(g.lo * scale, zero, h.lo <= zero)"),
        *("V::blendv(g.lo, zero, h.lo <= zero)", NATIVE, "embed and dropout"),
    ),
    "cuda-parts-unscaled": Mutant(
        "csrc/cuda/combine.cu",
        "merge == Merge::kSoftmax ? rescale(partials.top[s * heads + k], top == kDead ? A(0) : top) : A(1);",
        *("A(1);", EMULATED, "softmax_pool or attention_pool"),
    ),
    "cuda-bias-gradient-dropped": Mutant(
        *("csrc/cuda/gate_kernels.cu", "dv_bias[i] += dz[i];", "(void)dv_bias;"),
        *(EMULATED, "attention and not loss and not weights"),
    ),
}


def copy() -> None:
    """Of what git tracks or would; a file that is right already keeps its time, for ninja."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listed.stdout.decode().split("\n"):
        source, target = ROOT / name, COPY / name
        if source.is_file() and not (target.exists() and target.read_bytes() == source.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    for built in filter(Path.exists, (ROOT / "milkernels").glob("_C_*.so")):  # that in the copy may be a mutant's
        shutil.copy2(built, COPY / "milkernels" / built.name)


def build(emulated: bool) -> None:
    chosen = {"MILKERNELS_BUILD_EXT": str(int(not emulated)), "MILKERNELS_BUILD_EMULATED": str(int(emulated))}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=COPY, env=os.environ | {"MILKERNELS_BUILD_CUDA": "0"} | chosen, check=True)


def failures(mutant: Mutant, arguments: list[str]) -> list[str]:
    emulated = mutant.tests is EMULATED
    if mutant.file.startswith("csrc"):
        build(emulated)
    environment = os.environ | {"PYTHONPATH": str(COPY)} | ({"MILKERNELS_EMULATE_CUDA": "1"} if emulated else {})
    chosen = [*mutant.tests, "-k", mutant.which, "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *arguments]
    command = [sys.executable, "-m", "pytest", *chosen]
    done = subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    print(done.stdout.strip().rpartition("\n")[2])
    assert re.search(r"\d (passed|failed)", done.stdout), "no test ran: is the extension built?"
    return re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, re.MULTILINE)


def main(names: list[str], arguments: list[str]) -> None:
    for name in names or MUTANTS:
        mutant = MUTANTS[name]
        copy()
        text = (COPY / mutant.file).read_text()
        assert text.count(mutant.old) == 1, f"{name}: {mutant.file} has {text.count(mutant.old)} of {mutant.old!r}"
        (COPY / mutant.file).write_text(text.replace(mutant.old, mutant.new))
        print(f"\n{name}: {mutant.file}", flush=True)
        failed = failures(mutant, arguments)
        for test, count in Counter(test.partition("[")[0] for test in failed).items():
            print(f"  {count:4} {test}")
        print(f"  {len(failed):4} in all", flush=True)


if __name__ == "__main__":
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    main(given[:end], given[end + 1 :])
