#include "bindings/conv.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <tuple>
#include <vector>

#include "conv/layout/pack_weights.h"
#include "runtime/kernels.h"

using namespace fuserve;
using namespace fuserve::bindings;

namespace {

using Images = Array<const float, 4>;
using Rows = std::optional<Array<const float, 2>>;
using Vector = std::optional<Array<const float, 1>>;
using Sides = std::tuple<int, int, int, int>;

ConvMethod checked_method(const ConvShape& shape, int number) {
  require(number >= 0 && number <= static_cast<int>(ConvMethod::winograd4), "unknown method");
  const auto method = static_cast<ConvMethod>(number);
  require(shape.has_method(method),
          "Winograd needs size 3 and stride 1; upsampling needs F(2x2), and F(4x4) needs floats");
  return method;
}

ConvShape checked_shape(std::tuple<int, int> channels, int out_channels, int size, int stride,
                        Sides padding, bool upsample, int method, int weights) {
  const auto [first, second] = channels;
  require(first > 0 && second >= 0 && out_channels > 0, "channels must be positive");
  require(size == 1 || size == 3, "size must be 1 or 3");
  require(stride == 1 || stride == 2, "stride must be 1 or 2");
  const auto [top, left, bottom, right] = padding;
  for (const int side : {top, left, bottom, right})
    require(side >= 0 && side < size, "padding must be less than size");
  require(!upsample || (size == 3 && stride == 1 && padding == Sides(1, 1, 1, 1)),
          "an upsampling convolution has size 3, stride 1 and padding 1");
  ConvShape shape;
  shape.channels = {first, second};
  shape.out_channels = out_channels;
  shape.size = size;
  shape.stride = stride;
  shape.top = top;
  shape.left = left;
  shape.bottom = bottom;
  shape.right = right;
  shape.upsample = upsample;
  require(weights >= 0 && weights <= static_cast<int>(ConvWeights::i8), "unknown weights");
  shape.weights = static_cast<ConvWeights>(weights);
  shape.method = checked_method(shape, method);
  require(!shape.is_integer() || shape.in_channels() * shape.taps() <= shape.most_products(),
          "int8 sums at most 65536 products, and 32768 by Winograd");
  return shape;
}

SourceType source_type(const nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>& array,
                       bool bfloat) {
  if (array.dtype() == nb::dtype<float>()) return SourceType::f32;
  require(array.dtype() == nb::dtype<std::uint16_t>(),
          "weights must be float32, or uint16 holding 16-bit floats");
  return bfloat ? SourceType::bf16 : SourceType::f16;
}

void require_rows(const Rows& rows, size_t batch, size_t channels, const char* message) {
  require(!rows || ((rows->shape(0) == batch || rows->shape(0) == 1) && rows->shape(1) == channels),
          message);
}

// Row `image` of per-image channels; one row serves all images.
const float* row_of(const Rows& rows, size_t image) {
  if (!rows) return nullptr;
  return rows->data() + (rows->shape(0) == 1 ? 0 : image * rows->shape(1));
}

void convolve(const std::string& isa, ThreadPool& pool, const ConvHandle& handle,
              const Images& first, const std::optional<Images>& second, const Rows& scale,
              const Rows& shift, bool silu, const Rows& channel_add,
              const std::optional<Images>& residual, int activation, int band_rows, int unit_tiles,
              Array<float, 4> out) {
  const PackedConv& w = handle.weights;
  const size_t batch = first.shape(0), in_channels = static_cast<size_t>(w.in_channels());
  const size_t out_channels = static_cast<size_t>(w.out_channels);
  const int height = static_cast<int>(first.shape(1)), width = static_cast<int>(first.shape(2));
  require(batch > 0 && first.shape(3) == static_cast<size_t>(w.channels[0]),
          "the first source must be [batch, height, width, channels of the first source]");
  require(second.has_value() == (w.channels[1] > 0), "as many sources as the weights have");
  if (second)
    for (size_t i = 0; i < 4; ++i)
      require(second->shape(i) == (i < 3 ? first.shape(i) : static_cast<size_t>(w.channels[1])),
              "the second source must be as the first, with its own channels");
  require(height + w.top + w.bottom >= w.size && width + w.left + w.right >= w.size,
          "the padded image is smaller than the filter");
  const int out_height = w.out_height(height), out_width = w.out_width(width);
  const size_t want[4] = {batch, static_cast<size_t>(out_height), static_cast<size_t>(out_width),
                          out_channels};
  for (size_t i = 0; i < 4; ++i) {
    require(out.shape(i) == want[i], "out must be [batch, out height, out width, out channels]");
    require(!residual || residual->shape(i) == want[i], "residual must be as out");
  }
  require(scale.has_value() == shift.has_value(), "scale and shift go together");
  require_rows(scale, batch, in_channels, "scale must be [batch or 1, in channels]");
  require_rows(shift, batch, in_channels, "shift must be [batch or 1, in channels]");
  require_rows(channel_add, batch, out_channels, "channel_add must be [batch or 1, out channels]");
  require(activation >= 0 && activation <= static_cast<int>(ConvActivation::silu),
          "unknown activation");
  ConvUnits units = conv_units(w, static_cast<int>(batch), height, width, pool.size());
  require(band_rows >= 0 && band_rows % w.row_step() == 0 && unit_tiles >= 0,
          "a band's rows must be a multiple of the step of rows");
  if (band_rows > 0) units.band_rows = band_rows;
  if (unit_tiles > 0) units.unit_tiles = unit_tiles;

  std::vector<ConvInput> inputs(batch);
  std::vector<ConvEpilogue> epilogues(batch);
  const size_t pixels = static_cast<size_t>(height) * static_cast<size_t>(width);
  for (size_t i = 0; i < batch; ++i) {
    inputs[i].sources[0] = first.data() + i * pixels * first.shape(3);
    inputs[i].sources[1] = second ? second->data() + i * pixels * second->shape(3) : nullptr;
    inputs[i].height = height;
    inputs[i].width = width;
    inputs[i].scale = row_of(scale, i);
    inputs[i].shift = row_of(shift, i);
    inputs[i].silu = silu;
    epilogues[i].channel_add = row_of(channel_add, i);
    epilogues[i].residual = residual ? residual->data() + i * want[1] * want[2] * want[3] : nullptr;
    epilogues[i].activation = static_cast<ConvActivation>(activation);
  }
  const nb::gil_scoped_release release;
  kernels(isa).convolve(w, inputs.data(), epilogues.data(), static_cast<int>(batch), units,
                        out.data(), pool);
}

}  // namespace

void bind_conv(nb::module_& m) {
  nb::class_<ConvShape>(m, "ConvShape")
      .def(
          "__init__",
          [](ConvShape* self, std::tuple<int, int> channels, int out_channels, int size, int stride,
             Sides padding, bool upsample, int method, int weights) {
            new (self) ConvShape(checked_shape(channels, out_channels, size, stride, padding,
                                               upsample, method, weights));
          },
          nb::arg("channels"), nb::arg("out_channels"), nb::arg("size"), nb::arg("stride"),
          nb::arg("padding"), nb::arg("upsample"), nb::arg("method"), nb::arg("weights"))
      .def_prop_ro("in_channels", &ConvShape::in_channels)
      .def_ro("out_channels", &ConvShape::out_channels)
      .def_prop_ro("method", [](const ConvShape& self) { return static_cast<int>(self.method); })
      .def_prop_ro("is_integer", &ConvShape::is_integer)
      .def_prop_ro("tiles", &ConvShape::tiles)
      .def_prop_ro("packed_bytes", &ConvShape::packed_bytes)
      .def("out_height", &ConvShape::out_height, nb::arg("height"))
      .def("out_width", &ConvShape::out_width, nb::arg("width"));

  m.def(
      "pack_conv",
      [](ThreadPool& pool, const ConvShape& shape,
         nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu> weights, bool bfloat,
         Array<std::uint8_t, 1> packed) {
        const auto size = static_cast<size_t>(shape.size);
        require(weights.ndim() == 4 &&
                    weights.shape(0) == static_cast<size_t>(shape.out_channels) &&
                    weights.shape(1) == static_cast<size_t>(shape.in_channels()) &&
                    weights.shape(2) == size && weights.shape(3) == size,
                "weights must be [out channels, in channels, size, size]");
        require(packed.size() == shape.packed_bytes(), "packed has the wrong size");
        require(!shape.is_integer(), "an integer convolution has codes");
        const SourceType type = source_type(weights, bfloat);
        const nb::gil_scoped_release release;
        pack_conv(shape, type, weights.data(), packed.data(), pool);
      },
      nb::arg("pool"), nb::arg("shape"), nb::arg("weights"), nb::arg("bfloat"), nb::arg("packed"));

  m.def(
      "pack_conv_codes",
      [](ThreadPool& pool, const ConvShape& shape, Array<const std::int8_t, 4> codes,
         Array<std::uint8_t, 1> packed) {
        const auto size = static_cast<size_t>(shape.size);
        require(shape.is_integer(), "codes belong to an integer convolution");
        require(codes.shape(0) == static_cast<size_t>(shape.out_channels) &&
                    codes.shape(1) == static_cast<size_t>(shape.in_channels()) &&
                    codes.shape(2) == size && codes.shape(3) == size,
                "codes must be [out channels, in channels, size, size]");
        require(packed.size() == shape.packed_bytes(), "packed has the wrong size");
        const nb::gil_scoped_release release;
        pack_conv_codes(shape, codes.data(), packed.data(), pool);
      },
      nb::arg("pool"), nb::arg("shape"), nb::arg("codes"), nb::arg("packed"));

  nb::class_<ConvHandle>(m, "PackedConv")
      .def(
          "__init__",
          [](ConvHandle* self, const ConvShape& shape, Array<const std::uint8_t, 1> data,
             const Vector& bias, float input_scale, const Vector& scales,
             const Vector& multiplier) {
            require(data.size() == shape.packed_bytes(), "packed data has the wrong size");
            require(!bias || bias->size() == static_cast<size_t>(shape.tiles() * kTileRows),
                    "bias must have 16 values a tile");
            require(shape.is_integer() == scales.has_value() &&
                        shape.is_integer() == (input_scale > 0.0F) &&
                        (shape.is_integer() || !multiplier),
                    "an integer convolution has a positive scale of its input and scales, and no "
                    "other has them");
            require(!scales || scales->size() == static_cast<size_t>(shape.tiles() * kTileRows),
                    "scales must have 16 values a tile");
            require(!multiplier || multiplier->size() == static_cast<size_t>(shape.in_channels()),
                    "multiplier must be [in channels]");
            new (self) ConvHandle();
            static_cast<ConvShape&>(self->weights) = shape;
            self->weights.data = data.data();
            self->weights.bias = bias ? bias->data() : nullptr;
            self->data = nb::cast(data);
            if (bias) self->bias = nb::cast(*bias);
            self->weights.input_scale = input_scale;
            self->weights.scales = scales ? scales->data() : nullptr;
            self->weights.multiplier = multiplier ? multiplier->data() : nullptr;
            if (scales) self->scales = nb::cast(*scales);
            if (multiplier) self->multiplier = nb::cast(*multiplier);
          },
          nb::arg("shape"), nb::arg("data"), nb::arg("bias").none(), nb::arg("input_scale") = 0.0F,
          nb::arg("scales").none() = nb::none(), nb::arg("multiplier").none() = nb::none())
      .def_prop_ro("shape", [](const ConvHandle& self) -> ConvShape { return self.weights; });

  m.def("convolve", &convolve, nb::arg("isa"), nb::arg("pool"), nb::arg("weights"),
        nb::arg("first"), nb::arg("second").none(), nb::arg("scale").none(),
        nb::arg("shift").none(), nb::arg("silu"), nb::arg("channel_add").none(),
        nb::arg("residual").none(), nb::arg("activation"), nb::arg("band_rows"),
        nb::arg("unit_tiles"), nb::arg("out"));
}
