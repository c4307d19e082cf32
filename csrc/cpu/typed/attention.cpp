#include "../attention.h"

#include "../attention_score.h"

namespace milkernels {
namespace {

template <typename T, typename E>
AttentionScore<T, E> program_of(const AttentionCall& call) {
  const auto data = [&](int i) { return data_or_null<acc_t<T>>(call.parameters[i]); };
  return {{data(0), data(1), data(2), data(3), data(4), data(5), call.width, call.hidden, call.heads},
          call.activation,
          call.dropout,
          std::max(call.planes, 1),
          call.kept.hidden,
          call.rows};
}

}  // namespace

template <typename T>
void attention_forward(const AttentionCall& call, const Ragged<T>& in, const Tensor& scores, const Tensor& bag,
                       const Tensor& lse) {
  using A = acc_t<T>;
  with_element<T>(call.planes, [&]<typename E>() {
    const auto program = program_of<T, E>(call);
    A* const to = scores.mutable_data_ptr<A>();
    if (bag.defined()) {
      pool_forward(program, in, to,
                   SoftmaxPool<T>(in, program, nullptr, bag.mutable_data_ptr<A>(), lse.mutable_data_ptr<A>()));
    } else {
      pool_forward(program, in, to, NoPool());
    }
  });
}

template <typename T>
void attention_backward(const AttentionCall& call, const Ragged<T>& in, const PooledTensors& pooled,
                        const std::array<bool, 9>& needs, const std::array<Tensor, 9>& grads) {
  using A = acc_t<T>;
  with_element<T>(call.planes, [&]<typename E>() {
    const auto out = [&](int i) { return data_if<A>(needs[i], grads[i]); };
    auto program = program_of<T, E>(call);
    program.prepare_backward(call.rows, out(1), out(3), in.has_gradient());
    pool_backward<T>(program, nullptr, in, typed<A>(pooled));
    program.finish(out(2), out(4), out(5), out(6));
  });
}

template void attention_forward(const AttentionCall&, const Ragged<MILKERNELS_TYPE>&, const Tensor&, const Tensor&,
                                const Tensor&);
template void attention_backward(const AttentionCall&, const Ragged<MILKERNELS_TYPE>&, const PooledTensors&,
                                 const std::array<bool, 9>&, const std::array<Tensor, 9>&);

}  // namespace milkernels
