#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.h"
#include "runtime/cpu.h"
#include "runtime/kernels.h"

using namespace fuserve;
using namespace fuserve::bindings;

void bind_machine(nb::module_& m) {
  nb::class_<ThreadPool>(m, "ThreadPool")
      .def("__init__",
           [](ThreadPool* self, int num_threads) {
             require(num_threads >= 1 && num_threads <= 1024, "num_threads must be 1 to 1024");
             new (self) ThreadPool(num_threads);
           })
      .def_prop_ro("size", &ThreadPool::size)
      .def(
          "barrier_seconds",
          [](ThreadPool& pool, int count) {
            const auto start = std::chrono::steady_clock::now();
            pool.run([&](Team& team, int thread) {
              for (int i = 0; i < count; ++i) team.sync(thread);
            });
            const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
            return time.count() / count;
          },
          nb::call_guard<nb::gil_scoped_release>());
  m.def("available_isas", &available_isas);
  m.def("cgroup_quota", &cgroup_quota, nb::arg("root") = "");
  m.def("usable_threads", &usable_threads, nb::arg("root") = "");
  m.def("select_isa", [](const std::string& isa) { return std::string(kernels(isa).isa); });
  m.def(
      "read_bandwidth",
      [](const std::string& isa, ThreadPool& pool, size_t bytes, int passes) {
        return kernels(isa).read_bandwidth(pool, bytes, passes);
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "fp32_rate",
      [](const std::string& isa, ThreadPool& pool) { return kernels(isa).fp32_rate(pool); },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "byte_dot_rate",
      [](const std::string& isa, ThreadPool& pool, bool q4) {
        return kernels(isa).byte_dot_rate(pool, q4);
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "row_dot_rate",
      [](const std::string& isa, ThreadPool& pool) { return kernels(isa).row_dot_rate(pool); },
      nb::call_guard<nb::gil_scoped_release>());
}
