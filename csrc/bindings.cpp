// The extension module: what this build is. The ops register themselves (TORCH_LIBRARY_IMPL in cpu/ and cuda/); their
// schemas are in milkernels/ops.
#include <ATen/native/CPUBlas.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "autograd.h"
#include "cpu/cpu.h"

#define MILKERNELS_STRING_(x) #x
#define MILKERNELS_STRING(x) MILKERNELS_STRING_(x)

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"instruction set", MILKERNELS_STRING(CPU_CAPABILITY)},
      {"matrix units", at::native::cpublas::could_pack(at::kBFloat16) ? "bfloat16" : "none"},
      {"compiler", __VERSION__},
      {"built with torch", TORCH_VERSION},
  };
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info, "What this build is, as a dict of strings.");
  m.def("product_rate", &milkernels::product_rate, pybind11::call_guard<pybind11::gil_scoped_release>(),
        "FLOP/s of float32 tile products on all threads, measured now (about 10 ms).");
  m.def("release_workspace", &milkernels::release_workspace, "Frees the workspace that this thread keeps.");
  m.def("emulate_matrix_units", &milkernels::emulate_matrix_units, pybind11::arg("on"),
        "For tests: run half types in the layouts of the matrix units on machines that have none (slowly).");
  milkernels::bind_autograd(m);
}
