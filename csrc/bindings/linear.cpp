#include "bindings/linear.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "linear/pack_source.h"
#include "runtime/kernels.h"

using namespace fuserve;
using namespace fuserve::bindings;

namespace {

constexpr int kMostChannelCols = 65536;  // their products, up to 255 * 127, fit an int32 together

LinearShape checked_shape(int format, int rows, int cols, int group, int row_group) {
  require(format >= 0 && format <= static_cast<int>(WeightFormat::q8_channel),
          "unknown weight format");
  require(rows > 0 && cols > 0, "rows and cols must be positive");
  require(group == 0 || group == 32 || group == 64 || group == 128,
          "group must be 0, 32, 64 or 128");
  require(row_group >= 0 && (row_group == 0 || rows % row_group == 0),
          "rows must be a multiple of row_group");
  LinearShape shape;
  shape.format = static_cast<WeightFormat>(format);
  require(shape.format != WeightFormat::q8_channel || (group == 0 && cols <= kMostChannelCols),
          "int8 with one scale a row has no groups, and at most 65536 columns");
  shape.rows = rows;
  shape.cols = cols;
  shape.group = group;
  shape.row_group = row_group;
  return shape;
}

using Vector = std::optional<Array<const float, 1>>;

LinearInput checked_input(const LinearShape& shape, int kind, float scale, float threshold,
                          const Vector& shift, const Vector& multiplier) {
  require(kind >= 0 && kind <= static_cast<int>(InputKind::outliers), "unknown kind of input");
  LinearInput input;
  input.kind = static_cast<InputKind>(kind);
  input.scale = scale;
  input.threshold = threshold;
  const bool channel = shape.format == WeightFormat::q8_channel;
  require(input.is_whole_row() ? channel : !channel || input.kind == InputKind::floats,
          "int8 weights with one scale a row go with whole rows of int8 or float activations, "
          "and whole rows of int8 with them alone");
  require(input.kind != InputKind::fixed || scale > 0.0F, "a fixed scale must be positive");
  require(input.kind != InputKind::outliers || threshold > 0.0F, "a threshold must be positive");
  for (const Vector* vector : {&shift, &multiplier})
    require(!*vector || (*vector)->size() == static_cast<size_t>(shape.cols),
            "shift and multiplier must be [cols]");
  input.shift = shift ? shift->data() : nullptr;
  input.multiplier = multiplier ? multiplier->data() : nullptr;
  return input;
}

// A source matrix in fp32, or 16-bit floats as uint16.
PackSource float_source(const nb::ndarray<nb::ro, nb::ndim<2>, nb::device::cpu>& array,
                        const LinearShape& shape, bool bfloat) {
  require(array.shape(0) == static_cast<size_t>(shape.rows) &&
              array.shape(1) == static_cast<size_t>(shape.cols) && array.stride(1) == 1,
          "the source must be [rows, cols] with contiguous rows");
  PackSource source;
  if (array.dtype() == nb::dtype<float>())
    source.type = SourceType::f32;
  else if (array.dtype() == nb::dtype<std::uint16_t>())
    source.type = bfloat ? SourceType::bf16 : SourceType::f16;
  else
    throw std::invalid_argument("the source must be float32, or uint16 holding 16-bit floats");
  source.data = array.data();
  source.row_stride = array.stride(0);
  return source;
}

}  // namespace

void bind_linear(nb::module_& m) {
  nb::class_<LinearShape>(m, "LinearShape")
      .def(
          "__init__",
          [](LinearShape* self, int format, int rows, int cols, int group, int row_group) {
            new (self) LinearShape(checked_shape(format, rows, cols, group, row_group));
          },
          nb::arg("format"), nb::arg("rows"), nb::arg("cols"), nb::arg("group") = 0,
          nb::arg("row_group") = 0)
      .def_prop_ro("tiles", &LinearShape::tiles)
      .def_prop_ro("groups", &LinearShape::groups)
      .def_prop_ro("packed_bytes", &LinearShape::packed_bytes);

  m.def(
      "pack_floats",
      [](const std::string& isa, ThreadPool& pool, const LinearShape& shape,
         nb::ndarray<nb::ro, nb::ndim<2>, nb::device::cpu> weights, bool bfloat,
         Array<std::uint8_t, 1> packed) {
        const PackSource source = float_source(weights, shape, bfloat);
        require(packed.size() == shape.packed_bytes(), "packed has the wrong size");
        const nb::gil_scoped_release release;
        kernels(isa).pack(shape, source, packed.data(), pool);
      },
      nb::arg("isa"), nb::arg("pool"), nb::arg("shape"), nb::arg("weights"), nb::arg("bfloat"),
      nb::arg("packed"));

  m.def(
      "pack_codes",
      [](const std::string& isa, ThreadPool& pool, const LinearShape& shape,
         Array<const std::uint8_t, 2> codes, Array<const float, 2> scales,
         std::optional<Array<const float, 2>> minimums, Array<std::uint8_t, 1> packed) {
        const auto rows = static_cast<size_t>(shape.rows);
        const auto groups = static_cast<size_t>(shape.scales());
        require(is_integer(shape.format), "codes need an integer format");
        require(codes.shape(0) == rows && codes.shape(1) == static_cast<size_t>(shape.cols),
                "codes must be [rows, cols]");
        require(scales.shape(0) == rows && scales.shape(1) == groups,
                "scales must be [rows, groups]");
        require(minimums.has_value() == (shape.format == WeightFormat::q4_asymmetric),
                "minimums belong to asymmetric int4, and only to it");
        if (minimums)
          require(minimums->shape(0) == rows && minimums->shape(1) == groups,
                  "minimums must be [rows, groups]");
        require(packed.size() == shape.packed_bytes(), "packed has the wrong size");
        PackSource source;
        source.type = SourceType::codes;
        source.data = codes.data();
        source.row_stride = shape.cols;
        source.scales = scales.data();
        source.minimums = minimums ? minimums->data() : nullptr;
        const nb::gil_scoped_release release;
        kernels(isa).pack(shape, source, packed.data(), pool);
      },
      nb::arg("isa"), nb::arg("pool"), nb::arg("shape"), nb::arg("codes"), nb::arg("scales"),
      nb::arg("minimums").none(), nb::arg("packed"));

  nb::class_<LinearHandle>(m, "PackedLinear")
      .def(
          "__init__",
          [](LinearHandle* self, const LinearShape& shape, Array<const std::uint8_t, 1> data,
             const Vector& bias, int input, float scale, float threshold, const Vector& shift,
             const Vector& multiplier) {
            require(data.size() == shape.packed_bytes(), "packed data has the wrong size");
            require(!bias || bias->size() == static_cast<size_t>(shape.tiles() * kTileRows),
                    "bias must have 16 values a tile");
            const LinearInput checked =
                checked_input(shape, input, scale, threshold, shift, multiplier);
            new (self) LinearHandle();
            static_cast<LinearShape&>(self->weights) = shape;
            self->weights.data = data.data();
            self->weights.bias = bias ? bias->data() : nullptr;
            self->weights.input = checked;
            self->data = nb::cast(data);
            if (bias) self->bias = nb::cast(*bias);
            if (shift) self->shift = nb::cast(*shift);
            if (multiplier) self->multiplier = nb::cast(*multiplier);
          },
          nb::arg("shape"), nb::arg("data"), nb::arg("bias").none(), nb::arg("input"),
          nb::arg("scale") = 0.0F, nb::arg("threshold") = 0.0F,
          nb::arg("shift").none() = nb::none(), nb::arg("multiplier").none() = nb::none())
      .def_prop_ro("is_integer",
                   [](const LinearHandle& self) { return is_integer(self.weights.format); });

  m.def("linear", [](const std::string& isa, ThreadPool& pool, const LinearHandle& handle,
                     Array<const float, 2> x, Array<float, 2> out) {
    const PackedLinear& w = handle.weights;
    require(x.shape(1) == static_cast<size_t>(w.cols), "x must be [rows, cols]");
    require(
        out.shape(0) == x.shape(0) && out.shape(1) == static_cast<size_t>(w.tiles() * kTileRows),
        "out must be [rows, tiles * 16]");
    const nb::gil_scoped_release release;
    kernels(isa).linear(w, x.data(), static_cast<int>(x.shape(0)), out.data(), pool);
  });
  m.def("unpack_row",
        [](const std::string& isa, const LinearHandle& handle, int row, Array<float, 1> out) {
          require(row >= 0 && row < handle.weights.rows, "row is out of range");
          require(out.size() == static_cast<size_t>(handle.weights.cols), "out must be [cols]");
          kernels(isa).unpack_row(handle.weights, row, out.data());
        });

  nb::class_<NormHandle>(m, "Norm").def(
      "__init__",
      [](NormHandle* self, bool layer, float eps, Array<const float, 1> weight,
         std::optional<Array<const float, 1>> bias) {
        require(!bias || bias->size() == weight.size(), "norm weight and bias must match");
        new (self) NormHandle();
        self->norm.kind = layer ? NormKind::layer : NormKind::rms;
        self->norm.eps = eps;
        self->norm.weight = weight.data();
        self->norm.bias = bias ? bias->data() : nullptr;
        self->weight = nb::cast(weight);
        if (bias) self->bias = nb::cast(*bias);
      },
      nb::arg("layer"), nb::arg("eps"), nb::arg("weight"), nb::arg("bias").none());
  m.def("normalize", [](const std::string& isa, const NormHandle& handle, Array<const float, 2> x,
                        Array<float, 2> out) {
    require(out.shape(0) == x.shape(0) && out.shape(1) == x.shape(1), "out must be as x");
    kernels(isa).normalize(handle.norm, x.data(), static_cast<int>(x.shape(0)),
                           static_cast<int>(x.shape(1)), out.data());
  });
}
