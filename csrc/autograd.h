// A differentiable call of a raw op, without Python between its kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace milkernels {

void bind_autograd(pybind11::module_& m);

}  // namespace milkernels
