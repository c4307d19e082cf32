// The activations of layers, as ops name them.
#pragma once

namespace milkernels {

enum class Activation { kTanh, kRelu, kGelu, kIdentity };

}  // namespace milkernels
