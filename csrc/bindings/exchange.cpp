#include "bindings/exchange.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>

#include "runtime/kernels.h"

using namespace fuserve;
using namespace fuserve::bindings;

namespace {

constexpr int kMostRanks = 1024;

void all_reduce(const Kernels& table, SharedExchange& exchange, float* values, size_t count) {
  for (size_t first = 0; first < count; first += exchange.capacity()) {
    const size_t size = std::min(exchange.capacity(), count - first);
    std::memcpy(exchange.part(), values + first, size * sizeof(float));
    exchange.sum(size);
    table.add_parts(exchange.parts().data(), exchange.size(), static_cast<int>(size),
                    values + first);
  }
}

// Every rank sees all parts of an exchange through shared memory.
void all_gather(SharedExchange& exchange, const std::vector<float*>& parts,
                const std::vector<size_t>& counts) {
  const size_t longest = *std::max_element(counts.begin(), counts.end());
  for (size_t first = 0; first < longest; first += exchange.capacity()) {
    const auto bytes = [&](size_t rank) {
      const size_t left = counts[rank] - std::min(counts[rank], first);
      return std::min(exchange.capacity(), left) * sizeof(float);
    };
    const auto own = static_cast<size_t>(exchange.rank());
    std::memcpy(exchange.part(), parts[own] + std::min(counts[own], first), bytes(own));
    exchange.gather(nullptr);
    for (size_t rank = 0; rank < parts.size(); ++rank)
      if (rank != own && bytes(rank) > 0)
        std::memcpy(parts[rank] + first, exchange.parts()[rank], bytes(rank));
  }
}

nb::object view(std::vector<float>& values, size_t count) {
  const nb::ndarray<nb::numpy, float, nb::ndim<1>> array(values.data(), {count}, nb::handle());
  return nb::cast(array, nb::rv_policy::reference);
}

}  // namespace

CommunicatorExchange::CommunicatorExchange(nb::object communicator)
    : Exchange(nb::cast<int>(communicator.attr("rank")), nb::cast<int>(communicator.attr("size"))),
      communicator_(std::move(communicator)) {
  require(size() >= 1 && rank() >= 0 && rank() < size(), "rank must be one of size");
  gathered_.resize(static_cast<size_t>(size()));
}

void CommunicatorExchange::reserve(size_t count) {
  if (count > part_.size()) part_.resize(count);
}

void CommunicatorExchange::sum(size_t count) {
  const nb::gil_scoped_acquire acquire;
  communicator_.attr("all_reduce")(view(part_, count));
  parts_.assign(1, part_.data());
}

void CommunicatorExchange::gather(const size_t* counts) {
  const nb::gil_scoped_acquire acquire;
  nb::list parts;
  parts_.clear();
  for (size_t other = 0; other < gathered_.size(); ++other) {
    const bool mine = static_cast<int>(other) == rank();
    std::vector<float>& values = mine ? part_ : gathered_[other];
    if (values.size() < counts[other]) values.resize(counts[other]);
    parts.append(view(values, counts[other]));
    parts_.push_back(values.data());
  }
  communicator_.attr("gather")(parts);
}

void bind_exchange(nb::module_& m) {
  nb::exception<ExchangeError>(m, "ExchangeError",
                               nb::module_::import_("fuserve.errors").attr("FuserveError"));
  m.def("exchange_segment_bytes", [](int size, size_t floats) {
    require(size >= 1 && size <= kMostRanks && floats >= 1, "size and floats must be positive");
    return SharedExchange::segment_bytes(size, floats);
  });
  nb::class_<ExchangeHandle>(m, "SharedExchange")
      .def(
          "__init__",
          [](ExchangeHandle* self, Array<std::uint8_t, 1> memory, int rank, int size, size_t floats,
             double timeout_s) {
            require(size >= 1 && size <= kMostRanks && rank >= 0 && rank < size,
                    "rank must be one of size");
            require(floats >= 1 && floats <= (1U << 30U) && timeout_s > 0.0,
                    "floats and timeout_s must be positive");
            require(memory.size() >= SharedExchange::segment_bytes(size, floats),
                    "the memory is too small");
            require(reinterpret_cast<std::uintptr_t>(memory.data()) % 64 == 0,
                    "the memory must be aligned to 64 bytes");
            new (self) ExchangeHandle{SharedExchange(memory.data(), rank, size, floats, timeout_s),
                                      nb::cast(memory)};
          },
          nb::arg("memory"), nb::arg("rank"), nb::arg("size"), nb::arg("floats"),
          nb::arg("timeout_s"))
      .def_prop_ro("rank", [](const ExchangeHandle& self) { return self.exchange.rank(); })
      .def_prop_ro("size", [](const ExchangeHandle& self) { return self.exchange.size(); })
      .def_prop_ro("floats", [](const ExchangeHandle& self) { return self.exchange.capacity(); })
      .def("abort", [](ExchangeHandle& self) { self.exchange.abort(); })
      .def(
          "all_reduce",
          [](ExchangeHandle& self, const std::string& isa, Array<float, 1> values) {
            const Kernels& table = kernels(isa);
            const nb::gil_scoped_release release;
            all_reduce(table, self.exchange, values.data(), values.size());
          },
          nb::arg("isa"), nb::arg("values"))
      .def(
          "all_gather",
          [](ExchangeHandle& self, const std::vector<Array<float, 1>>& parts) {
            require(parts.size() == static_cast<size_t>(self.exchange.size()),
                    "there must be a part for each rank");
            std::vector<float*> data;
            std::vector<size_t> counts;
            for (const Array<float, 1>& part : parts) {
              data.push_back(part.data());
              counts.push_back(part.size());
            }
            const nb::gil_scoped_release release;
            all_gather(self.exchange, data, counts);
          },
          nb::arg("parts"));
}
