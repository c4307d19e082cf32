"""Eight threads call every op at once, forward and backward, and get the numbers that one gets.  Run by
`make sanitize SANITIZER=tsan`; pytest takes it when it is named."""

import threading

import pytest
from op_cases import PLAIN, has_kernel, offsets_of, same_bits, step

THREADS = 8
LENGTHS = ((5, 0, 130), (300,), (70, 1, 64))


@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_threads(case):
    if not has_kernel(case.kernel, "native"):
        pytest.skip("it has no kernel")

    def run(lengths):
        return step(case.ours("native"), case.make(lengths, L=37, D=41), offsets_of(lengths), None)

    expected, wrong = [run(lengths) for lengths in LENGTHS], []
    start = threading.Barrier(THREADS)

    def work(first):
        start.wait()
        for i in range(first, first + 6):
            try:
                same_bits(run(LENGTHS[i % 3]), expected[i % 3])
            except BaseException as error:  # of this thread, which nobody sees
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
