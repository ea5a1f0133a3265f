#include "conv/winograd.h"

#include "conv/epilogue.h"
#include "conv/winograd_numbers.h"
#include "conv/winograd_transform.h"
#include "linear/tiles.h"

namespace fuserve::FUSERVE_ISA {
namespace {

// Squares of outputs, at most, whose component products are formed together: their sums stay in the
// second-level cache, beside the transformed filters and the squares' inputs of a block.
constexpr int kChunkGroups = 72 / kPixels;
// Planes of components lie an odd number of cache lines apart, or they would share cache sets.
constexpr std::ptrdiff_t kSumPlane = (kChunkGroups * kPixels + 1) * kTileRows;

// A square of kOutputs x kOutputs pixels is one row of each of the component products, which see
// Side x Side pixels. Squares are numbered row by row. Filters are transformed a block of channels
// at a time, where they are used: kept, they would be 1.8 or 4 times as large and no longer fit
// into the caches, and what is read of them serves so many multiplications that transforming it
// anew hardly shows.
template <class Numbers, int Side>
struct WinogradUnit {
  using Value = typename Numbers::Value;
  using Pixel = typename Numbers::Pixel;
  using Sum = typename Products<Value>::Sum;
  static constexpr int kOutputs = kSquareOutputs<Side>;
  static constexpr int kComponents = Side * Side;
  static constexpr int kInputStep = Side == 3 ? 1 : kOutputs;  // from a square's pixels to the next
  static constexpr std::ptrdiff_t kFilterTile = Numbers::kBlockValues * kFilterStep<kComponents>;

  const PackedConv& w;
  const ConvInput& input;
  const ConvEpilogue& epilogue;
  const ConvUnit& unit;
  float* out;

  int rows() const { return unit.last_row - unit.first_row; }
  int width() const { return w.out_width(input.width); }
  int square_cols() const { return ceil_div(width(), kOutputs); }
  int squares() const { return ceil_div(rows(), kOutputs) * square_cols(); }
  // Squares of a chunk; all chunks of a unit are about as large.
  int chunk() const {
    const int groups = ceil_div(squares(), kPixels);
    return ceil_div(groups, ceil_div(groups, kChunkGroups)) * kPixels;
  }
  int groups(int first_square) const {
    return ceil_div(std::min(chunk(), squares() - first_square), kPixels);
  }
  // Channels, or pairs of them.
  int values(const ChannelBlock& block) const { return w.padded(block.count) / Numbers::kChannels; }
  // The transformed input: [block][component][square][values], as it is read, and to the next
  // component.
  std::ptrdiff_t plane() const {
    return round_up(squares(), kPixels) * Numbers::kBlockValues + kTileRows;
  }

  void run(Scratch& scratch) const;
  Fetch next_filters(int index, int tile, int end, int square) const;
  void transform(const ChannelBlock& block, const Window& seen, const Pixel* window,
                 Value* transformed) const;
  template <int R>
  void products(const ChannelBlock& block, int component, int first_square,
                const Value* transformed, const Value* filters, Sum* sums, Fetch& fetch) const;
  void finish(const Numbers& numbers, int tile, int first_square, const Sum* sums) const;
};

template <class Numbers, int Side>
void WinogradUnit<Numbers, Side>::run(Scratch& scratch) const {
  static_assert(sizeof(Value) == 4 && sizeof(Sum) == 4);
  const Window seen{unit.first_row * kInputStep / kOutputs - w.top, -w.left,
                    ceil_div(rows(), kOutputs) * kInputStep + 2, square_cols() * kInputStep + 2};
  const auto transformed_values = static_cast<size_t>(w.blocks() * kComponents * plane());
  const size_t sums_values = static_cast<size_t>(kTilesAtOnce * kComponents * kSumPlane);
  const size_t window_values =
      seen.pixels() * static_cast<size_t>(w.block_channels() / Numbers::kChannels);
  constexpr size_t kFilters = static_cast<size_t>(kTilesAtOnce * kFilterTile);
  const auto kept =
      static_cast<size_t>(round_up(static_cast<int>(std::max(window_values, kFilters)), kTileRows));
  const size_t rest = Numbers::kept_values(seen, rows() * width());
  auto* transformed = scratch.get<Value>(transformed_values + sums_values + kept + rest);
  auto* sums = reinterpret_cast<Sum*>(transformed + transformed_values);
  auto* filters = reinterpret_cast<Value*>(sums + sums_values);
  auto* window = reinterpret_cast<Pixel*>(filters);  // not needed any more, then
  Numbers numbers(w, seen, filters + kept);
  for (int index = 0; index < w.blocks(); ++index) {
    const ChannelBlock block = w.block(index);
    numbers.pack(input, block, window);
    transform(block, seen, window, transformed + index * kComponents * plane());
  }
  numbers.template total<Side>(rows(), width());
  for (int tile = unit.first_tile; tile < unit.last_tile; tile += kTilesAtOnce) {
    const int end = std::min(tile + kTilesAtOnce, unit.last_tile);
    for (int square = 0; square < squares(); square += chunk()) {
      for (int index = 0; index < w.blocks(); ++index) {
        const ChannelBlock block = w.block(index);
        for (int t = tile; t < end; ++t)
          Numbers::template transform_filters<Side>(w, block, t,
                                                    filters + (t - tile) * kFilterTile);
        Fetch fetch = next_filters(index, tile, end, square);
        for (int component = 0; component < kComponents; ++component)
          for_each_tiles(tile, end, true, [&]<int R>(int t) {
            products<R>(block, component, square, transformed + index * kComponents * plane(),
                        filters + (t - tile) * kFilterTile + component * kTileRows,
                        sums + ((t - tile) * kComponents + component) * kSumPlane, fetch);
          });
      }
      for (int t = tile; t < end; ++t)
        finish(numbers, t, square, sums + (t - tile) * kComponents * kSumPlane);
    }
  }
}

// The filters that are wanted after a block of them, a few lines for each call of the kernel.
template <class Numbers, int Side>
Fetch WinogradUnit<Numbers, Side>::next_filters(int index, int tile, int end, int square) const {
  const bool last = index + 1 == w.blocks();
  const ChannelBlock next = w.block(last ? 0 : index + 1);
  const int lines = (end - tile) * static_cast<int>(w.panel_bytes(next.count)) / 64;
  return {w.data + w.panel_offset(next, last && square + chunk() >= squares() ? end : tile),
          ceil_div(lines, (end - tile) * kComponents * groups(square))};
}

template <class Numbers, int Side>
void WinogradUnit<Numbers, Side>::transform(const ChannelBlock& block, const Window& seen,
                                            const Pixel* window, Value* transformed) const {
  const int pixel = w.padded(block.count);
  for (int square = 0; square < squares(); ++square) {
    const int row = square / square_cols() * kInputStep, col = square % square_cols() * kInputStep;
    const Pixel* from = window + static_cast<std::ptrdiff_t>(row * seen.cols + col) * pixel;
    Value* to = transformed + square * Numbers::kBlockValues;
    for (int c = 0; c < values(block); c += kTileRows, from += kTileRows * Numbers::kChannels) {
      const int n = values(block) - c;
      decltype(load16(to)) d[kComponents];
      for (int i = 0; i < kComponents; ++i) {
        const int at = i / Side * seen.cols + i % Side;
        d[i] = Numbers::load(from + static_cast<std::ptrdiff_t>(at) * pixel, n);
      }
      transform_input<Side>(d);
      for (int i = 0; i < kComponents; ++i) Numbers::store(to + i * plane() + c, d[i], n);
    }
  }
}

// What a block of channels adds to a component of a chunk of squares for R output tiles.
template <class Numbers, int Side>
template <int R>
void WinogradUnit<Numbers, Side>::products(const ChannelBlock& block, int component,
                                           int first_square, const Value* transformed,
                                           const Value* filters, Sum* sums, Fetch& fetch) const {
  constexpr int kStride = Numbers::kBlockValues;
  const Value* from = transformed + component * plane() + first_square * kStride;
  const Taps taps{1, values(block), {0}};
  const int last = groups(first_square);
  for (int group = 0; group < last; ++group) {
    const Value* x[kPixels];
#pragma GCC unroll 16
    for (int t = 0; t < kPixels; ++t) x[t] = from + (group * kPixels + t) * kStride;
    multiply<R, kFilterStep<kComponents>>(x, taps, filters, kFilterTile, block.channel == 0,
                                          sums + group * kPixels * kTileRows,
                                          kComponents * kSumPlane, fetch);
    fetch.from += 64 * fetch.lines;
  }
}

template <class Numbers, int Side>
void WinogradUnit<Numbers, Side>::finish(const Numbers& numbers, int tile, int first_square,
                                         const Sum* sums) const {
  const Finisher finisher(w, epilogue, tile, out);
  const auto scale = numbers.template scaling<Side>(tile);
  const int last = std::min(first_square + chunk(), squares());
  for (int square = first_square; square < last; ++square, sums += kTileRows) {
    typename Products<Value>::Sums m[kComponents];
    for (int i = 0; i < kComponents; ++i) m[i] = Products<Value>::load(sums + i * kSumPlane);
    transform_output<Side>(m);
    const int row = square / square_cols() * kOutputs, col = square % square_cols() * kOutputs;
    const int last_row = std::min(row + kOutputs, rows());
    const int last_col = std::min(col + kOutputs, width());
    for (int y = std::max(row, -unit.first_row); y < last_row; ++y)
      for (int x = col; x < last_col; ++x)
        finisher.finish(scale(m[(y - row) * Side + x - col], y * width() + x),
                        static_cast<std::ptrdiff_t>(unit.first_row + y) * width() + x);
  }
}

}  // namespace

void winograd_unit(const PackedConv& w, const ConvInput& input, const ConvEpilogue& epilogue,
                   const ConvUnit& unit, float* out, Scratch& scratch) {
  const auto run = [&]<class Numbers, int Side>() {
    WinogradUnit<Numbers, Side>{w, input, epilogue, unit, out}.run(scratch);
  };
  if (w.is_integer())
    w.upsample ? run.operator()<PairNumbers, 3>() : run.operator()<PairNumbers, 4>();
  else if (w.upsample)
    run.operator()<FloatNumbers, 3>();
  else
    w.method == ConvMethod::winograd2 ? run.operator()<FloatNumbers, 4>()
                                      : run.operator()<FloatNumbers, 6>();
}

}  // namespace fuserve::FUSERVE_ISA
