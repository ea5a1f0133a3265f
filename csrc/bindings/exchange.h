// The exchange among ranks as Python holds it.
#pragma once

#include "bindings/bindings.h"
#include "runtime/exchange.h"

namespace fuserve::bindings {

struct ExchangeHandle {
  SharedExchange exchange;
  nb::object memory;
};

// Through the methods of a fuserve.decoder.communicator.Communicator, called on the thread that
// called the step: how ranks of several hosts exchange.
class CommunicatorExchange final : public Exchange {
 public:
  explicit CommunicatorExchange(nb::object communicator);

  size_t capacity() const override { return static_cast<size_t>(-1) / sizeof(float); }
  void reserve(size_t count) override;
  float* part() override { return part_.data(); }
  void sum(size_t count) override;
  void gather(const size_t* counts) override;

 private:
  nb::object communicator_;
  std::vector<float> part_;
  std::vector<std::vector<float>> gathered_;  // of the other ranks
};

}  // namespace fuserve::bindings
