// The exchange among ranks as Python holds it.
#pragma once

#include "bindings/bindings.h"
#include "runtime/exchange.h"

namespace fuserve::bindings {

struct ExchangeHandle {
  SharedExchange exchange;
  nb::object memory;
};

}  // namespace fuserve::bindings
