// One function for each room of the native core; each adds its names to the module.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>

namespace fuserve::bindings {

namespace nb = nanobind;

template <class T, size_t Dims>
using Array = nb::ndarray<T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace fuserve::bindings

void bind_machine(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_conv(nanobind::module_& m);
void bind_exchange(nanobind::module_& m);
void bind_decoder(nanobind::module_& m);
void bind_image(nanobind::module_& m);
void bind_sampling(nanobind::module_& m);
