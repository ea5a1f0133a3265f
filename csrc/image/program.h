// A program: a flat list of operations over images that lie channels last (NHWC) in fp32, and what
// runs it. The Python side (fuserve.diffusion.program) describes them to people.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "conv/conv_types.h"
#include "linear/format.h"
#include "norm/norm_types.h"
#include "runtime/team.h"

namespace fuserve {

inline constexpr int kNoValue = -1;

// Pixels of a row whose sums a group norm forms in fp32; those of all such chunks are added in
// double.
inline constexpr int kNormPixels = 64;

// Tokens of an attention block are the pixels of the same memory. A value may be a band of a taller
// image: its rows from `first_row` on. Then there are rows of the neighbouring bands in memory,
// `above` and `below` those of each image, which somebody fills and convolutions read.
struct ImageValue {
  int batch = 0;
  int height = 0;
  int width = 0;
  int channels = 0;
  std::ptrdiff_t offset = -1;  // floats from the arena's start; negative: bound at each run
  int first_row = 0;
  int above = 0;
  int below = 0;

  int pixels() const { return height * width; }
  // A chunk ends with its row, so that a band has chunks of its own.
  int norm_chunks() const { return height * chunks_of_row(); }
  int chunks_of_row() const { return ceil_div(width, kNormPixels); }
  // From one image to the next.
  size_t image_floats() const {
    return static_cast<size_t>((above + height + below) * width) * static_cast<size_t>(channels);
  }
};

struct GroupNorm {
  int groups = 0;
  int channels = 0;
  float eps = 0.0F;
  bool silu = false;
  const float* weight = nullptr;  // [channels]; null: this norm does not exist
  const float* bias = nullptr;    // [channels]

  explicit operator bool() const { return weight != nullptr; }
};

enum class LinearActivation : int {
  none = 0,
  silu = 1,
  gelu = 2,
  quick_gelu = 3,
  geglu = 4,
  relu = 5
};

// Sums of images of which a norm's sources are only some rows; see ChannelSumsOp.
struct GivenSums {
  int values[2] = {kNoValue, kNoValue};  // one for each source
  int pixels = 0;                        // of the whole image; 0: the sources are all of it

  explicit operator bool() const { return pixels != 0; }
};

// Operations name their operands by index into the program's values. An operand with fewer images
// than the result stands for as many consecutive ones of it each.
struct NormalizeOp {
  int out = kNoValue;
  int sources[2] = {kNoValue, kNoValue};  // channels one after the other
  GroupNorm group;                        // one of the two
  GivenSums sums;                         // for `group`
  Norm layer;
};

// A value's channels from `first` on.
struct ChannelSlice {
  int value = kNoValue;
  int first = 0;
};

struct ConvOp {
  int out = kNoValue;
  int sources[2] = {kNoValue, kNoValue};
  ChannelSlice channel_add;  // of a value of one pixel
  int residual = kNoValue;
  GroupNorm norm;  // of the sources, before padding and upsampling
  GivenSums sums;
  ConvActivation activation = ConvActivation::none;
  PackedConv weights;
};

// geglu: the weights' rows are values, then gates, each on tiles of their own; so are a residual's
// channels, which is added before the activation.
struct LinearOp {
  int out = kNoValue;
  int source = kNoValue;
  int residual = kNoValue;
  Norm norm;
  LinearActivation activation = LinearActivation::none;
  PackedLinear weights;
};

struct AttentionOp {
  int out = kNoValue;
  ChannelSlice query, key, value;
  int heads = 0;
  int head_dim = 0;
  bool causal = false;
  bool in_pairs = false;  // products of integers of 16 bits
};

// What a group norm needs to know of an image, or of the next rows of one: for each chunk of up to
// kNormPixels pixels of a row the sums of channel_sums, [chunks][2, channels], one a row of `out`.
// Without `pivots` the image begins here, and a row with its first pixel, its pivots, goes before.
struct ChannelSumsOp {
  int out = kNoValue;
  int source = kNoValue;
  int pivots = kNoValue;  // [1, 2 * channels]
};

using ImageOp = std::variant<NormalizeOp, ConvOp, LinearOp, AttentionOp, ChannelSumsOp>;

struct ImageProgram {
  std::vector<ImageValue> values;
  std::vector<ImageOp> ops;
  size_t arena_floats = 0;
};

// Operations [first, last) of a program.
struct OpRange {
  size_t first;
  size_t last;
};

// Runs programs, one at a time, in memory that serves them all. A program may be run in parts, one
// after the other, with no other program in between.
class ImageExecutor {
 public:
  virtual ~ImageExecutor() = default;
  // bound: memory of the values that are bound, by index; null for others.
  // seconds: of each operation, or null.
  virtual void run(const ImageProgram& program, OpRange ops, const std::vector<float*>& bound,
                   ThreadPool& pool, double* seconds) = 0;
  // Where the program's values lie, until a program that needs more memory runs.
  virtual float* arena(const ImageProgram& program) = 0;
  // Gives all memory back; the next run takes what it needs.
  virtual void release() = 0;
};

}  // namespace fuserve
