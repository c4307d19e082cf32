// The module of the CUDA kernels: what this build is. The ops register themselves (TORCH_LIBRARY_IMPL beside them);
// their schemas are in milkernels/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "autograd.h"
#include "call.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {
#ifdef MILKERNELS_EMULATED
      {"runs on", "the host"},
#else
      {"runs on", "CUDA"},
      {"CUDA", std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10)},
#endif
      {"compiler", __VERSION__},
      {"built with torch", TORCH_VERSION},
  };
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info, "What this build is, as a dict of strings.");
  milkernels::bind_autograd(m);
#ifdef MILKERNELS_EMULATED
  m.def("set_workspace", [](int64_t bytes) { milkernels::workspace = bytes; }, "Bytes of slices of rows.");
  m.def("launch_count", &milkernels::emulator::launch_count, "Kernels launched so far.");
  m.def("set_dry", &milkernels::emulator::set_dry, "Whether kernels are only counted.");
  m.def(
      "set_order",
      [](const std::string& name) {
        using milkernels::emulator::Order;
        milkernels::emulator::set_order(name == "reverse"    ? Order::kReverse
                                        : name == "shuffled" ? Order::kShuffled
                                                             : Order::kForward);
      },
      "In which order the threads of a block run: forward, reverse or shuffled.");
#endif
}
