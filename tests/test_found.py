"""What `make fuzz` found, shrunk: calls that broke the error promise."""

import pytest
from calls import Call, found

FOUND = {
    "thousands of rows of a bag, added one behind another": Call(
        "attention_pool", (3, 2049), "float32", sizes=(("D", 2), ("K", 2), ("L", 2)), options=(("activation", "tanh"),)
    ),
    "20,000 products of a sum, added one behind another": Call(
        "attention_scores", (69,), "float32", sizes=(("D", 9), ("K", 2), ("L", 20_000))
    ),
    "260 products of a sum for each of two hidden units, which a library adds in the lanes of a vector": Call(
        "attention_pool",
        (3, 129),
        "float32",
        sizes=(("D", 2), ("K", 2), ("L", 260)),
        options=(("activation", "relu"),),
        data="noise",
    ),
    "8,192 hidden units of a gradient, added one behind another": Call(
        "gated_attention_scores", (69,), "float32", sizes=(("D", 4096), ("K", 2), ("L", 24))
    ),
}


@pytest.mark.parametrize("call", FOUND.values(), ids=FOUND)
def test_found(call):
    found(call)
