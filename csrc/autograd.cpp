// A differentiable call of a raw op: its forward, and one node of autograd that calls its backward. The autograd
// functions of milkernels/ops/contract.py do the same for compilers and other observers; both follow one plan, which is
// made there, and both reach kernels through PyTorch's dispatcher. Python costs more than a bag of ten instances.
#include "autograd.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>
#include <string>
#include <vector>

namespace milkernels {
namespace {

namespace py = pybind11;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

constexpr int64_t NONE = -1;

// The elements of a list among flat arguments. One that is optional is empty where its first element is None.
struct List {
  size_t first, last;
  bool optional;
};

struct Operator {
  c10::OperatorHandle handle;
  std::vector<List> lists;

  // Calls it with these arguments, the lists flat; its results take their place.
  void call(Stack& arguments) const {
    if (!lists.empty()) arguments = grouped(std::move(arguments));
    handle.callBoxed(arguments);
  }

 private:
  Stack grouped(Stack flat) const {
    Stack out;
    out.reserve(flat.size());
    size_t at = 0;
    for (const auto& list : lists) {
      for (; at < list.first; ++at) out.push_back(std::move(flat[at]));
      c10::List<std::optional<at::Tensor>> elements;
      if (!(list.optional && flat[at].isNone())) {
        elements.reserve(list.last - list.first);
        for (; at < list.last; ++at) elements.push_back(std::move(flat[at]).toOptional<at::Tensor>());
      }
      at = list.last;
      out.emplace_back(std::move(elements));
    }
    for (; at < flat.size(); ++at) out.push_back(std::move(flat[at]));
    return out;
  }
};

// What a forward and its backward are to each other. Places are those of flat inputs, or of inputs and then outputs.
struct Plan {
  Operator forward, backward;
  std::vector<bool> is_float;  // of each input, whether the schema has a float
  std::vector<int64_t> differentiable;  // inputs, in the backward's order
  std::vector<int64_t> saved;  // inputs and outputs that it takes; NONE: not of this op
  std::vector<int64_t> options;  // inputs
  std::vector<int64_t> gradients;  // outputs whose gradients it takes; NONE: not of this op
  std::vector<int64_t> place_of_output;  // among those that have a gradient; NONE: it has none
  bool keeps;  // the last input limits the last output, which is the backward's alone
};

// Plans live as long as the process, like the ops: a node knows its own by number.
std::vector<std::unique_ptr<Plan>>& plans() {
  static auto* all = new std::vector<std::unique_ptr<Plan>>;
  return *all;
}

at::Tensor tensor_or_none(const c10::IValue& value) { return value.isTensor() ? value.toTensor() : at::Tensor(); }

c10::IValue value_or_none(at::Tensor tensor) {
  return tensor.defined() ? c10::IValue(std::move(tensor)) : c10::IValue();
}

struct Call {
  size_t number;
  Stack inputs;
  uint64_t wanted;  // bits: which of the differentiable inputs require a gradient
  Stack outputs;

  const Plan& plan() const { return *plans()[number]; }

  void run() {
    at::AutoDispatchBelowAutograd below;
    outputs = inputs;
    plan().forward.call(outputs);
  }
};

struct Node : torch::autograd::Function<Node> {
  static constexpr bool is_traceable = true;  // the backward is one op, which compiled autograd records

  // `differentiated` are the wanted inputs. Outputs without a gradient are not the node's: they are left in `call`.
  static variable_list forward(AutogradContext* context, Call& call, at::TensorList differentiated) {
    const auto& plan = call.plan();
    call.run();
    const auto inputs = static_cast<int64_t>(call.inputs.size());
    variable_list saved;
    saved.reserve(plan.saved.size());
    for (const auto place : plan.saved) {
      saved.push_back(place == NONE
                          ? at::Tensor()
                          : tensor_or_none(place < inputs ? call.inputs[place] : call.outputs[place - inputs]));
    }
    context->save_for_backward(std::move(saved));
    context->set_materialize_grads(false);
    c10::impl::GenericList kept(c10::AnyType::get());  // in a list, numbers are constants to compiled autograd
    kept.reserve(plan.options.size() + 2);
    kept.push_back(static_cast<int64_t>(call.number));
    kept.push_back(static_cast<int64_t>(call.wanted));
    for (const auto place : plan.options) kept.push_back(call.inputs[place]);
    context->saved_data.emplace("plan, wanted, options", std::move(kept));

    variable_list results;
    for (size_t i = 0; i < call.outputs.size(); ++i) {
      if (plan.place_of_output[i] != NONE) results.push_back(call.outputs[i].toTensor());
    }
    return results;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto kept = context->saved_data.begin()->second.toList();
    const auto& plan = *plans()[kept.get(0).toInt()];
    const auto wanted = static_cast<uint64_t>(kept.get(1).toInt());
    const auto count = plan.differentiable.size();
    variable_list found(1);  // the call itself is not a tensor
    std::vector<size_t> places;  // of the wanted inputs, among those that are differentiable
    for (size_t i = 0; i < count; ++i) {
      if (wanted >> i & 1) places.push_back(i);
    }
    found.resize(1 + places.size());

    Stack stack;
    stack.reserve(plan.saved.size() + plan.options.size() + plan.gradients.size() + 1);
    for (auto& tensor : context->get_saved_variables()) stack.push_back(value_or_none(std::move(tensor)));
    for (size_t i = 2; i < kept.size(); ++i) stack.push_back(kept.get(i));
    bool any = false;
    for (const auto place : plan.gradients) {
      const auto gradient = place == NONE ? at::Tensor() : grads[plan.place_of_output[place]];
      any |= gradient.defined();
      stack.push_back(value_or_none(gradient));
    }
    if (!any) return found;
    std::vector<bool> needs(count);
    for (size_t edge = 0; edge < places.size(); ++edge) needs[places[edge]] = context->needs_input_grad(edge);
    c10::List<bool> flags;
    for (const bool need : needs) flags.push_back(need);
    stack.emplace_back(std::move(flags));

    if (at::GradMode::is_enabled()) {  // the op's own kernel of autograd says that it can be differentiated once
      plan.backward.call(stack);
    } else {
      at::AutoDispatchBelowAutograd below;
      plan.backward.call(stack);
    }
    for (size_t edge = 0; edge < places.size(); ++edge) {
      if (needs[places[edge]]) found[1 + edge] = stack[places[edge]].toTensor();
    }
    return found;
  }
};

c10::IValue converted(py::handle object, bool is_float) {
  PyObject* const pointer = object.ptr();
  if (THPVariable_Check(pointer)) return THPVariable_Unpack(pointer);
  if (pointer == Py_None) return {};
  if (PyBool_Check(pointer)) return pointer == Py_True;
  if (is_float) return object.cast<double>();
  if (PyLong_Check(pointer)) return object.cast<int64_t>();
  if (THPDtype_Check(pointer)) return reinterpret_cast<THPDtype*>(pointer)->scalar_type;
  return object.cast<std::string>();
}

py::object wrapped(c10::IValue&& value) {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(value).toTensor()));
}

// The first `count` of these tensors as Python has the results of an op.
py::object results_of(Stack& values, size_t count) {
  if (count == 0) return py::none();
  if (count == 1) return wrapped(std::move(values[0]));
  py::tuple results(count);
  for (size_t i = 0; i < count; ++i) results[i] = wrapped(std::move(values[i]));
  return std::move(results);
}

py::object called(size_t number, const py::args& arguments) {
  const Plan& plan = *plans()[number];
  TORCH_CHECK_TYPE(arguments.size() == plan.is_float.size(), "expected ", plan.is_float.size(), " arguments; got ",
                   arguments.size());
  Call call{number, {}, 0, {}};
  call.inputs.reserve(arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) call.inputs.push_back(converted(arguments[i], plan.is_float[i]));
  {
    py::gil_scoped_release no_gil;
    variable_list differentiated;
    if (at::GradMode::is_enabled()) {
      for (size_t i = 0; i < plan.differentiable.size(); ++i) {
        const auto& input = call.inputs[plan.differentiable[i]];
        if (input.isTensor() && input.toTensor().requires_grad()) {
          call.wanted |= uint64_t{1} << i;
          differentiated.push_back(input.toTensor());
        }
      }
    }
    if (differentiated.empty()) {
      if (plan.keeps) call.inputs.back() = 0;  // there is no backward
      call.run();
    } else {
      const auto results = Node::apply(call, at::TensorList(differentiated));
      for (size_t i = 0; i < call.outputs.size(); ++i) {
        if (plan.place_of_output[i] != NONE) call.outputs[i] = results[plan.place_of_output[i]];
      }
    }
  }
  return results_of(call.outputs, call.outputs.size() - plan.keeps);
}

using Lists = std::vector<std::tuple<size_t, size_t, bool>>;

Operator find(const std::string& name, const std::string& overload, const Lists& lists) {
  Operator found{c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str()), {}};
  for (const auto& [first, last, optional] : lists) found.lists.push_back({first, last, optional});
  return found;
}

py::object differentiable_call(const std::string& backend, const std::string& forward, const Lists& forward_lists,
                               const std::string& backward, const Lists& backward_lists, std::vector<bool> is_float,
                               std::vector<int64_t> differentiable, std::vector<int64_t> saved,
                               std::vector<int64_t> options, std::vector<int64_t> gradients,
                               std::vector<bool> has_gradient, bool keeps) {
  std::vector<int64_t> place_of_output;
  int64_t next = 0;
  for (const bool has : has_gradient) place_of_output.push_back(has ? next++ : NONE);
  TORCH_CHECK(differentiable.size() <= 64, "at most 64 inputs can be differentiable");
  plans().push_back(std::make_unique<Plan>(Plan{
      find(forward, backend, forward_lists),
      find(backward, backend, backward_lists),
      std::move(is_float),
      std::move(differentiable),
      std::move(saved),
      std::move(options),
      std::move(gradients),
      std::move(place_of_output),
      keeps,
  }));
  const size_t number = plans().size() - 1;
  return py::cpp_function(
      torch::wrap_pybind_function([number](const py::args& arguments) { return called(number, arguments); }));
}

// How an argument of a raw op comes from Python.
enum class Kind { kFloat, kTensors, kFlags, kOther };

Kind kind_of(const c10::Argument& argument) {
  auto type = argument.type();
  if (const auto optional = type->cast<c10::OptionalType>()) type = optional->getElementType();
  if (type->kind() == c10::TypeKind::FloatType) return Kind::kFloat;
  if (type->kind() != c10::TypeKind::ListType) return Kind::kOther;
  return type->expectRef<c10::ListType>().getElementType()->kind() == c10::TypeKind::BoolType ? Kind::kFlags
                                                                                              : Kind::kTensors;
}

c10::IValue converted(py::handle object, Kind kind) {
  if (kind == Kind::kTensors) {
    c10::List<std::optional<at::Tensor>> elements;
    for (const auto element : object) elements.push_back(converted(element, false).toOptional<at::Tensor>());
    return elements;
  }
  if (kind == Kind::kFlags) {
    c10::List<bool> flags;
    for (const auto flag : object) flags.push_back(flag.cast<bool>());
    return flags;
  }
  return converted(object, kind == Kind::kFloat);
}

py::object raw_call(const std::string& name, const std::string& overload) {
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
  std::vector<Kind> kinds;
  for (const auto& argument : handle.schema().arguments()) kinds.push_back(kind_of(argument));
  return py::cpp_function(torch::wrap_pybind_function([handle, kinds = std::move(kinds)](const py::args& arguments) {
    TORCH_CHECK_TYPE(arguments.size() == kinds.size(), "expected ", kinds.size(), " arguments; got ", arguments.size());
    Stack stack;
    stack.reserve(kinds.size());
    for (size_t i = 0; i < kinds.size(); ++i) stack.push_back(converted(arguments[i], kinds[i]));
    {
      py::gil_scoped_release no_gil;
      handle.callBoxed(stack);
    }
    return results_of(stack, stack.size());
  }));
}

}  // namespace

void bind_autograd(py::module_& m) {
  m.def("differentiable_call", &differentiable_call, py::kw_only(), py::arg("backend"), py::arg("forward"),
        py::arg("forward_lists"), py::arg("backward"), py::arg("backward_lists"), py::arg("is_float"),
        py::arg("differentiable"), py::arg("saved"), py::arg("options"), py::arg("gradients"), py::arg("has_gradient"),
        py::arg("keeps"), "A function that calls a raw op of a backend and records one node for its backward.");
  m.def("raw_call", &raw_call, "A shorter way to a raw op, by its name and overload.");
}

}  // namespace milkernels
