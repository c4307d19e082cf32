"""One benchmark run: gate, interleaved rounds, memory, and the rows that come of it."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType

import torch

from milkernels.bench import contenders, gate, harness, memory, roofline
from milkernels.bench.contenders import Compute, Contender, Unavailable
from milkernels.bench.workload import DTYPES, Workload
from milkernels.testing import Inputs, evaluate

OK, FAIL, ERROR, UNAVAILABLE, DIFFERS = "ok", "FAIL", "error", "unavailable", "differs"
_MEMORY_TIMEOUT = 900.0
_ON_GPU = 1e-3
_SLOW = 2.0  # seconds of a run above which memory is measured in one run, without a full warm-up


@dataclass(frozen=True)
class Options:
    dtypes: Sequence[str]
    modes: Sequence[str]
    contenders: Sequence[str]
    budget: float  # seconds of timing in all, warm-ups and checks not counted
    rounds: int | None = None
    threads: int | None = None
    memory: bool = True


@dataclass
class Row:
    op: str
    dtype: str
    mode: str
    contender: str
    label: str
    ours: bool
    status: str = OK
    reason: str = ""
    once: bool = False  # one run, after a warm-up on a prefix only
    timing: harness.Timing | None = None
    instances: int = 0
    bags: int = 0
    ratios: dict[str, float] = field(default_factory=dict)  # the median of a yardstick over this one
    floor_seconds: float | None = None
    flops: int = 0
    bytes: int = 0
    resident: int | None = None
    allocator: int | None = None
    memory_note: str = ""
    gate_note: str = ""
    errors: list[dict] = field(default_factory=list)  # per output and gradient

    @property
    def timed(self) -> bool:
        return self.status == OK and self.timing is not None and bool(self.timing.seconds)

    def bound(self, workload: Workload, rate: float, bandwidth: float) -> None:
        """The work, and the floor that the machine sets it."""
        case, shape, dtype = workload.case, workload.shape, DTYPES[self.dtype]
        self.instances, self.bags = shape.instances, shape.bags
        self.flops, self.bytes = case.flops(shape, self.mode), case.bytes(shape, dtype, self.mode)
        self.floor_seconds = roofline.floor_seconds(self.flops, self.bytes, rate, bandwidth)

    @property
    def share_of_floor(self) -> float | None:
        return self.floor_seconds / self.timing.median if self.timed and self.floor_seconds else None


@dataclass
class Result:
    rows: list[Row]
    bandwidth: float
    probe: roofline.MatrixProbe

    @property
    def failed(self) -> bool:
        """Whether one of ours is wrong or broken."""
        return any(row.ours and row.status in (FAIL, ERROR) for row in self.rows)


@dataclass
class _Entry:
    """One contender in one type and mode, ready to be timed."""

    row: Row
    contender: Contender
    call: "_Run | None" = None
    guess: float = 0.0


@dataclass(frozen=True)
class _Run:
    """One run of a contender."""

    contender: Contender
    compute: Compute
    inputs: Inputs
    mode: str
    primary: str

    def __call__(self):
        with self.contender.within():
            return evaluate(self.compute, self.inputs, self.mode, self.primary)


class Bench:
    """``finished`` takes the rows of a type and mode as soon as there are no more to come, ``at_work`` the contender
    and mode that run next: for those who look on when it takes the process with it.  ``gpu`` is how that is measured:
    ``benchmarks/cuda.py``."""

    def __init__(
        self,
        workload: Workload,
        options: Options,
        say: Callable[[str], object] = lambda text: None,
        finished: Callable[[list[Row]], object] = lambda rows: None,
        at_work: Callable[[str, str], object] = lambda contender, mode: None,
        gpu: ModuleType | None = None,
    ):
        self.workload, self.options, self.say = workload, options, say
        self.finished, self.at_work, self.gpu = finished, at_work, gpu
        self.case, self.shape = workload.case, workload.shape  # the real instances: padding is not work
        self.group_budget = options.budget / max(1, len(options.dtypes) * len(options.modes))

    def run(self) -> Result:
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        self.say("machine")
        with self.workload.products():
            limits = self.gpu or roofline
            self.bandwidth, _ = limits.read_bandwidth()
            self.probe = limits.MatrixProbe([DTYPES[d] for d in self.options.dtypes])
            rows = [row for dtype in self.options.dtypes for row in self._dtype(dtype)]
        return Result(rows, self.bandwidth, self.probe)

    def _dtype(self, dtype: str) -> list[Row]:
        self.say(f"{dtype}: inputs")
        inputs = self.workload.inputs(DTYPES[dtype])
        modes = self.options.modes
        widest = next(mode for mode in ("step", "frozen", "fwd") if mode in modes)
        self.say(f"{dtype}: float64 and eager's errors")
        self.at_work("eager", widest)
        try:
            eager = contenders.REGISTRY["eager"]
            guesses = {m: self._guess(eager, inputs, m) for m in modes}
            available = contenders.available_memory(self.workload.device) // 2
            baseline = gate.yardstick(self.case, inputs, widest, guesses[widest], available)
        except Exception as error:  # eager may not know a type; the rows will say so
            guesses, baseline = dict.fromkeys(modes, 0.0), harness.describe(error)
        groups = []
        for mode in modes:
            groups.append(self._group(dtype, mode, inputs, guesses[mode], baseline))
            if self.gpu:  # a peak is known after one more run, in this process
                self._peaks(groups[-1])
                self._finish(groups[-1])
        del baseline  # a gigabyte that the measurements to come have no use for
        if not self.gpu:
            self._measure_memory(dtype, [entry for entries in groups for entry in entries])
            for entries in groups:
                self._finish(entries)
        return [entry.row for entries in groups for entry in entries]

    def _clock(self, run: _Run, calls: int = 1) -> float:
        self.at_work(run.contender.name, run.mode)
        return (self.gpu.timed if self.gpu else harness.timed)(run, calls)

    def _finish(self, entries: list[_Entry]) -> None:
        self.finished(_compare([entry.row for entry in entries]))

    def _guess(self, contender: Contender, inputs: Inputs, mode: str) -> float:
        """Seconds of one run; on a GPU, where a prefix would have kernels compiled for itself, few enough that the run
        after the first, which compiles, tells."""
        return _ON_GPU if self.gpu else gate.guess_seconds(contender, self.case, inputs, mode)

    def _peaks(self, entries: list[_Entry]) -> None:
        for entry in entries:
            if entry.row.timed:
                self.at_work(entry.contender.name, entry.row.mode)
                try:
                    entry.row.allocator = self.gpu.peak_memory(entry.call)
                except Exception as error:
                    entry.row.memory_note = harness.describe(error)

    def _group(
        self, dtype: str, mode: str, inputs: Inputs, eager_guess: float, baseline: gate.Yardstick | str
    ) -> list[_Entry]:
        since = self.probe.count()
        entries = []
        for name in self.options.contenders:
            self.say(f"{dtype} {mode}: {name} is prepared and checked")
            contender = contenders.REGISTRY[name]
            row = Row(self.case.name, dtype, mode, name, contender.label(self.case, inputs), contender.ours)
            entries.append(self._entry(row, contender, inputs, eager_guess, baseline))
        waiting = {e.contender.name: e for e in entries if e.row.status == OK and not e.row.once}
        self.say(f"{dtype} {mode}: rounds")
        timings = harness.measure(
            {name: e.call for name, e in waiting.items()},
            self.group_budget,
            self.options.rounds,
            between=self.probe.sample,
            expected={name: e.guess for name, e in waiting.items() if e.guess > 0},
            clock=self._clock,
        )
        for name, timing in timings.items():
            row = waiting[name].row
            row.timing = timing
            if timing.error:
                row.status, row.reason = ERROR, timing.error
        rate = self.probe.rate(DTYPES[dtype], since)
        for entry in entries:
            entry.row.bound(self.workload, rate, self.bandwidth)
        return entries

    def _entry(
        self, row: Row, contender: Contender, inputs: Inputs, eager_guess: float, baseline: gate.Yardstick | str
    ) -> _Entry:
        entry, mode = _Entry(row, contender), row.mode
        self.at_work(contender.name, mode)
        try:
            with contender.within(), self.gpu.sound() if self.gpu else contextlib.nullcontext():
                compute, its_inputs = contender.prepare(self.case, inputs, True)
                entry.guess = eager_guess  # torch.compile's too: a prefix would have to be compiled for itself
                if contender.ours or contender.peer:
                    entry.guess = self._guess(contender, inputs, mode)
                self._check(entry, compute, inputs, mode, baseline)
        except Unavailable as why:
            row.status, row.reason = UNAVAILABLE, str(why)
        except Exception as error:  # any reason: it is a row, not the end
            row.status, row.reason = ERROR, harness.describe(error)
        if row.status == OK:
            only_memory = self.options.memory and self.options.rounds is None
            row.once = only_memory and entry.guess > self.group_budget
            entry.call = _Run(contender, compute, its_inputs, mode, self.case.primary)
        return entry

    def _check(
        self, entry: _Entry, compute: Compute, inputs: Inputs, mode: str, baseline: gate.Yardstick | str
    ) -> None:
        row, contender = entry.row, entry.contender
        if contender.ours:
            if isinstance(baseline, str):
                raise RuntimeError(f"there is nothing to check it against: {baseline}")
            promise = gate.judge(self.case, baseline, compute, inputs, mode, entry.guess)
            row.errors = [asdict(v) | {"ok": v.ok, "ratio": v.ratio} for v in promise.verdicts]
            row.gate_note = baseline.note
            if not promise.ok:
                row.status, row.reason = FAIL, promise.broken()
        elif contender.peer and not isinstance(baseline, str) and not self.workload.dropout:
            # Peers draw their own dropout masks, so only their plain results can be compared.
            their_compute, their_inputs = contender.prepare(self.case, baseline.judged, True)
            difference = gate.disagreement(self.case, baseline, their_compute, their_inputs)
            if difference:
                row.status, row.reason = DIFFERS, difference

    def _measure_memory(self, dtype: str, entries: list[_Entry]) -> None:
        """And the time of what is run once, in the same run."""
        for name in self.options.contenders:
            mine = [e for e in entries if e.contender.name == name and e.row.status == OK]
            answers: dict[str, dict] | str = ""
            if self.options.memory and mine:
                self.say(f"{dtype}: memory of {name}")
                modes = {"modes": [e.row.mode for e in mine]}
                modes["once"] = [e.row.mode for e in mine if e.row.once or e.guess > _SLOW]
                about = {"contender": name, "dtype": dtype, "threads": self.options.threads}
                answers = memory.of_contender(_MEMORY_TIMEOUT, self.workload, **about, **modes)
            for entry in mine:
                row = entry.row
                if isinstance(answers, str):
                    row.memory_note = answers
                    if row.once:  # that run was all there was time for
                        row.status, row.reason = ERROR, answers
                    continue
                answer = answers[row.mode]
                row.resident, row.allocator = answer["resident"], answer["allocator"]
                if row.once:
                    row.timing = harness.Timing([answer["seconds"]], warm=False)


def _compare(rows: list[Row]) -> list[Row]:
    timed = {(r.dtype, r.mode, r.contender): r for r in rows if r.timed}
    for row in timed.values():
        yardsticks = {name: timed.get((row.dtype, row.mode, name)) for name in contenders.YARDSTICKS}
        row.ratios = {n: other.timing.median / row.timing.median for n, other in yardsticks.items() if other}
    return rows
