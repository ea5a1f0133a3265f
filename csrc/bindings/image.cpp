#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <mutex>
#include <optional>

#include "bindings/conv.h"
#include "bindings/linear.h"
#include "image/program.h"
#include "runtime/kernels.h"

using namespace fuserve;
using namespace fuserve::bindings;

namespace {

using Slice = std::pair<int, int>;  // a value and its first channel

// A program with everything its operations point into. Each method adds one and says which operand
// does not fit.
class ProgramHandle {
 public:
  int add_value(int batch, int height, int width, int channels, std::ptrdiff_t offset,
                int first_row, int above, int below) {
    require(batch > 0 && height > 0 && width > 0 && channels > 0, "a value must not be empty");
    require(above >= 0 && above <= first_row && below >= 0, "a band has only an image's rows");
    program_.values.push_back({batch, height, width, channels, offset, first_row, above, below});
    const ImageValue& v = program_.values.back();
    if (offset >= 0)
      program_.arena_floats =
          std::max(program_.arena_floats,
                   static_cast<size_t>(offset) + static_cast<size_t>(batch) * v.image_floats());
    return static_cast<int>(program_.values.size()) - 1;
  }

  void add_channel_sums(int out, int source, int pivots) {
    const ImageValue &to = value(out), &from = value(source);
    require(from.batch == to.batch, "out must have the source's images");
    require(to.width == 1 && to.channels == 2 * from.channels,
            "out must have a row of sums and of squares");
    require(to.height == from.norm_chunks() + (pivots == kNoValue ? 1 : 0),
            "out must have a row for each 64 pixels of a row");
    if (pivots != kNoValue) {
      const ImageValue& v = value(pivots);
      require(v.pixels() == 1 && v.channels == to.channels && to.batch % v.batch == 0,
              "pivots must be a row of sums");
    }
    program_.ops.emplace_back(ChannelSumsOp{out, source, pivots});
  }

  void add_group_norm(int out, const std::vector<int>& sources, const GroupNorm& norm,
                      const std::vector<int>& sums, int pixels) {
    NormalizeOp op;
    op.out = out;
    op.group = norm;
    set_sources(value(out), sources, op.sources);
    check_norm(norm, channels_of(op.sources));
    op.sums = given_sums(sums, pixels, op.sources, value(out));
    check_pixels(sources[0], value(out), "source");
    require(value(out).channels == channels_of(op.sources), "out must have the sources' channels");
    program_.ops.emplace_back(op);
  }

  void add_layer_norm(int out, int source, const NormHandle& norm, const nb::object& owner) {
    NormalizeOp op;
    op.out = out;
    op.sources[0] = source;
    check_source(source, value(out), value(out).channels, "source");
    op.layer = layer_norm(norm, value(source).channels, owner);
    program_.ops.emplace_back(op);
  }

  void add_conv(int out, const std::vector<int>& sources, const nb::object& weights,
                const std::optional<GroupNorm>& norm, Slice channel_add, int residual,
                int activation, const std::vector<int>& sums, int pixels) {
    ConvOp op;
    op.weights = nb::cast<const ConvHandle&>(weights).weights;
    owners_.push_back(weights);
    op.out = out;
    op.channel_add = {channel_add.first, channel_add.second};
    op.residual = residual;
    require(activation >= 0 && activation <= static_cast<int>(ConvActivation::silu),
            "unknown activation");
    op.activation = static_cast<ConvActivation>(activation);
    const ImageValue& to = value(out);
    set_sources(to, sources, op.sources);
    for (size_t i = 0; i < 2; ++i)
      require(op.weights.channels[i] == (i < sources.size() ? value(sources[i]).channels : 0),
              "the weights are for sources of other channels");
    const ImageValue& from = value(sources[0]);
    require(from.height + op.weights.top + op.weights.bottom >= op.weights.size &&
                from.width + op.weights.left + op.weights.right >= op.weights.size,
            "the padded image is smaller than the filter");
    require(to.height == op.weights.out_height(from.height) &&
                to.width == op.weights.out_width(from.width) &&
                to.channels == op.weights.out_channels,
            "out has another size than the convolution gives");
    if (norm) {
      op.norm = *norm;
      check_norm(op.norm, channels_of(op.sources));
      op.sums = given_sums(sums, pixels, op.sources, to);
    }
    if (residual != kNoValue) check_source(residual, to, to.channels, "residual");
    if (channel_add.first != kNoValue) {
      const ImageValue& added = value(channel_add.first);
      require(added.pixels() == 1 && to.batch % added.batch == 0 && channel_add.second >= 0 &&
                  channel_add.second + to.channels <= added.channels,
              "channel_add must have a pixel, and out's channels");
    }
    program_.ops.emplace_back(op);
  }

  void add_linear(int out, int source, const nb::object& weights, const nb::object& norm,
                  int residual, int activation) {
    LinearOp op;
    op.weights = nb::cast<const LinearHandle&>(weights).weights;
    owners_.push_back(weights);
    op.out = out;
    op.source = source;
    op.residual = residual;
    op.activation = activation_of(activation);
    const bool gated = op.activation == LinearActivation::geglu;
    require(
        !gated || (op.weights.rows % 2 == 0 && op.weights.rows_per_group() == op.weights.rows / 2),
        "geglu's weights must be values and gates, on tiles of their own");
    const ImageValue& to = value(out);
    check_source(source, to, op.weights.cols, "source");
    require(to.channels == (gated ? op.weights.rows / 2 : op.weights.rows),
            "out must have the weights' rows as channels");
    if (residual != kNoValue) check_source(residual, to, op.weights.rows, "residual");
    if (!norm.is_none())
      op.norm = layer_norm(nb::cast<const NormHandle&>(norm), op.weights.cols, norm);
    program_.ops.emplace_back(op);
  }

  void add_attention(int out, Slice query, Slice key, Slice values, int heads, int head_dim,
                     bool causal, bool in_pairs) {
    AttentionOp op;
    op.out = out;
    op.heads = heads;
    op.head_dim = head_dim;
    op.causal = causal;
    op.in_pairs = in_pairs;
    require(!(causal && in_pairs), "causal attention is computed in floats");
    require(heads > 0 && head_dim > 0, "heads and head_dim must be positive");
    const ImageValue& to = value(out);
    require(to.channels == heads * head_dim, "out must have heads * head_dim channels");
    op.query = heads_of(query, to, op, "query");
    op.key = heads_of(key, to, op, "key");
    op.value = heads_of(values, to, op, "value");
    require(value(query.first).pixels() == to.pixels(), "query must have out's tokens");
    require(value(key.first).pixels() == value(values.first).pixels(),
            "key and value must have the same tokens");
    require(!causal || value(key.first).pixels() >= to.pixels(),
            "causal attention needs a key for each query");
    program_.ops.emplace_back(op);
  }

  void keep(const nb::object& owner) { owners_.push_back(owner); }
  const ImageProgram& program() const { return program_; }

 private:
  const ImageValue& value(int index) const {
    require(index >= 0 && static_cast<size_t>(index) < program_.values.size(),
            "there is no value " + std::to_string(index));
    return program_.values[static_cast<size_t>(index)];
  }

  // A source of `channels` channels whose images stand for those of `out`.
  void check_source(int index, const ImageValue& out, int channels, const char* name) const {
    const ImageValue& v = value(index);
    require(v.channels == channels, std::string(name) + " has " + std::to_string(v.channels) +
                                        " channels instead of " + std::to_string(channels));
    check_pixels(index, out, name);
    require(out.batch % v.batch == 0, std::string(name) + "'s batch does not divide out's");
  }

  void check_pixels(int index, const ImageValue& out, const char* name) const {
    require(value(index).pixels() == out.pixels(),
            std::string(name) + " has another size than out");
  }

  static void check_norm(const GroupNorm& norm, int channels) {
    require(norm.channels == channels, "the norm is for " + std::to_string(norm.channels) +
                                           " channels, not " + std::to_string(channels));
  }

  // No values: there are none.
  GivenSums given_sums(const std::vector<int>& values, int pixels, const int (&sources)[2],
                       const ImageValue& out) const {
    GivenSums given;
    if (values.empty()) return given;
    require(pixels > 0, "sums must be of some pixels");
    require(values.size() == (sources[1] == kNoValue ? 1U : 2U), "each source must have its sums");
    given.pixels = pixels;
    for (size_t i = 0; i < values.size(); ++i) {
      const ImageValue& v = value(values[i]);
      require(v.height > 1 && v.height == value(values[0]).height && v.width == 1 &&
                  v.channels == 2 * value(sources[i]).channels && out.batch % v.batch == 0,
              "sums must be a source's, with its pivots");
      given.values[i] = values[i];
    }
    return given;
  }

  int channels_of(const int (&sources)[2]) const {
    return value(sources[0]).channels + (sources[1] == kNoValue ? 0 : value(sources[1]).channels);
  }

  void set_sources(const ImageValue& out, const std::vector<int>& given, int (&sources)[2]) const {
    require(given.size() == 1 || given.size() == 2, "there must be one or two sources");
    const ImageValue& first = value(given[0]);
    for (size_t i = 0; i < given.size(); ++i) {
      const ImageValue& v = value(given[i]);
      sources[i] = given[i];
      require(out.batch % v.batch == 0, "a source's batch does not divide out's");
      require(v.height == first.height && v.width == first.width, "sources differ in size");
    }
  }

  Norm layer_norm(const NormHandle& norm, int size, const nb::object& owner) {
    require(nb::len(norm.weight) == static_cast<size_t>(size),
            "the norm must have " + std::to_string(size) + " values");
    owners_.push_back(owner);
    return norm.norm;
  }

  ChannelSlice heads_of(Slice given, const ImageValue& out, const AttentionOp& op,
                        const char* name) const {
    const ImageValue& v = value(given.first);
    require(given.second >= 0 && given.second + op.heads * op.head_dim <= v.channels,
            std::string(name) + " has too few channels");
    require(out.batch % v.batch == 0, std::string(name) + "'s batch does not divide out's");
    return {given.first, given.second};
  }

  static LinearActivation activation_of(int activation) {
    require(activation >= 0 && activation <= static_cast<int>(LinearActivation::relu),
            "unknown activation");
    return static_cast<LinearActivation>(activation);
  }

  ImageProgram program_;
  std::vector<nb::object> owners_;
};

struct GroupNormHandle {
  GroupNorm norm;
  nb::object weight, bias;
};

struct ExecutorHandle {
  std::unique_ptr<ImageExecutor> executor;
  std::mutex mutex;  // one program at a time
};

// Memory of each bound value, by index.
std::vector<float*> bind(const ImageProgram& program, const nb::dict& arrays) {
  std::vector<float*> bound(program.values.size(), nullptr);
  for (const auto& [key, array] : arrays) {
    const auto index = nb::cast<size_t>(key);
    require(index < bound.size(), "there is no value " + std::to_string(index));
    const ImageValue& v = program.values[index];
    const auto memory = nb::cast<nb::ndarray<float, nb::c_contig, nb::device::cpu>>(array);
    require(memory.size() == static_cast<size_t>(v.batch) * v.image_floats(),
            "the array of value " + std::to_string(index) + " has the wrong size");
    bound[index] = memory.data();
  }
  for (size_t i = 0; i < bound.size(); ++i)
    require(program.values[i].offset >= 0 || bound[i] != nullptr,
            "value " + std::to_string(i) + " is not bound");
  return bound;
}

}  // namespace

void bind_image(nb::module_& m) {
  nb::class_<GroupNormHandle>(m, "GroupNorm")
      .def(
          "__init__",
          [](GroupNormHandle* self, int groups, float eps, bool silu, Array<const float, 1> weight,
             Array<const float, 1> bias) {
            const auto channels = static_cast<int>(weight.size());
            require(groups > 0 && channels % groups == 0, "groups must divide the channels");
            require(bias.size() == weight.size(), "norm weight and bias must match");
            new (self) GroupNormHandle();
            self->norm = {groups, channels, eps, silu, weight.data(), bias.data()};
            self->weight = nb::cast(weight);
            self->bias = nb::cast(bias);
          },
          nb::arg("groups"), nb::arg("eps"), nb::arg("silu"), nb::arg("weight"), nb::arg("bias"));

  nb::class_<ProgramHandle>(m, "ImageProgram")
      .def(nb::init<>())
      .def("add_value", &ProgramHandle::add_value, nb::arg("batch"), nb::arg("height"),
           nb::arg("width"), nb::arg("channels"), nb::arg("offset"), nb::arg("first_row") = 0,
           nb::arg("above") = 0, nb::arg("below") = 0)
      .def("add_channel_sums", &ProgramHandle::add_channel_sums)
      .def("add_group_norm",
           [](ProgramHandle& self, int out, const std::vector<int>& sources, const nb::object& norm,
              const std::vector<int>& sums, int pixels) {
             const GroupNorm& given = nb::cast<const GroupNormHandle&>(norm).norm;
             self.add_group_norm(out, sources, given, sums, pixels);
             self.keep(norm);
           })
      .def(
          "add_conv",
          [](ProgramHandle& self, int out, const std::vector<int>& sources,
             const nb::object& weights, const nb::object& norm, Slice channel_add, int residual,
             int activation, const std::vector<int>& sums, int pixels) {
            std::optional<GroupNorm> given;
            if (!norm.is_none()) given = nb::cast<const GroupNormHandle&>(norm).norm;
            self.add_conv(out, sources, weights, given, channel_add, residual, activation, sums,
                          pixels);
            self.keep(norm);
          },
          nb::arg("out"), nb::arg("sources"), nb::arg("weights"), nb::arg("norm").none(),
          nb::arg("channel_add"), nb::arg("residual"), nb::arg("activation"), nb::arg("sums"),
          nb::arg("pixels"))
      .def("add_layer_norm",
           [](ProgramHandle& self, int out, int source, const nb::object& norm) {
             self.add_layer_norm(out, source, nb::cast<const NormHandle&>(norm), norm);
           })
      .def("add_linear", &ProgramHandle::add_linear, nb::arg("out"), nb::arg("source"),
           nb::arg("weights"), nb::arg("norm").none(), nb::arg("residual"), nb::arg("activation"))
      .def("add_attention", &ProgramHandle::add_attention)
      .def_prop_ro("arena_bytes", [](const ProgramHandle& self) {
        return self.program().arena_floats * sizeof(float);
      });

  nb::class_<ExecutorHandle>(m, "ImageExecutor")
      .def("__init__",
           [](ExecutorHandle* self, const std::string& isa) {
             new (self) ExecutorHandle();
             self->executor = kernels(isa).make_image_executor();
           })
      .def(
          "run",
          [](ExecutorHandle& self, const ProgramHandle& program, ThreadPool& pool,
             const nb::dict& arrays, std::optional<Array<double, 1>> seconds,
             std::optional<std::pair<size_t, size_t>> range) {
            const size_t num_ops = program.program().ops.size();
            const auto [first, last] = range.value_or(std::pair<size_t, size_t>{0, num_ops});
            require(first <= last && last <= num_ops, "there are no such operations");
            const std::vector<float*> bound = bind(program.program(), arrays);
            require(!seconds || seconds->size() == num_ops,
                    "seconds must have a value for each operation");
            double* times = seconds ? seconds->data() : nullptr;
            const nb::gil_scoped_release release;
            const std::lock_guard lock(self.mutex);
            self.executor->run(program.program(), {first, last}, bound, pool, times);
          },
          nb::arg("program"), nb::arg("pool"), nb::arg("arrays"),
          nb::arg("seconds").none() = nb::none(), nb::arg("ops").none() = nb::none())
      .def(
          "arena",
          [](ExecutorHandle& self, const ProgramHandle& program) {
            const std::lock_guard lock(self.mutex);
            float* data = self.executor->arena(program.program());
            const size_t floats = program.program().arena_floats;
            return nb::ndarray<nb::numpy, float, nb::ndim<1>>(data, {floats}, nb::find(self));
          },
          nb::arg("program"))
      .def("release", [](ExecutorHandle& self) {
        const nb::gil_scoped_release release;
        const std::lock_guard lock(self.mutex);
        self.executor->release();
      });
}
