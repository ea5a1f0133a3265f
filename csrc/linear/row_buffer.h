// Memory for rows of activations in every form that a linear may want.
#pragma once

#include "linear/activations.h"
#include "runtime/buffer.h"

namespace fuserve::FUSERVE_ISA {

// Rows that a producer fills, in the forms that the next linears want.
struct MutableRows {
  float* values = nullptr;
  std::ptrdiff_t value_stride = 0;
  std::int8_t* records = nullptr;
  QuantizedLayout layout;
  TokenRows tokens;

  float* value_row(int row) const { return values + row * value_stride; }
  std::int8_t* record(int row) const {
    return records + row * static_cast<std::ptrdiff_t>(layout.stride());
  }
  Rows read_only() const { return {values, value_stride, records, layout, tokens}; }
};

// Each form's memory is committed when it is first written to.
class RowBuffer {
 public:
  void reserve(int rows, int cols) {
    const auto r = static_cast<size_t>(rows);
    values_.get<float>(r * static_cast<size_t>(value_stride(cols)));
    records_.get<std::int8_t>(r * QuantizedLayout{cols}.stride());
    tokens_.get<std::int8_t>(r * TokenLayout{cols}.stride());
    outliers_.get<Outlier>(r * static_cast<size_t>(cols));
    quads_.get<LooseQuad>(r * static_cast<size_t>(most_loose_quads(cols)));
  }
  // The buffer as rows of `cols` features, at most as many as were reserved.
  MutableRows view(int cols) {
    const TokenRows tokens{tokens_.get<std::int8_t>(0), outliers_.get<Outlier>(0),
                           quads_.get<LooseQuad>(0), TokenLayout{cols}};
    return {values_.get<float>(0), value_stride(cols), records_.get<std::int8_t>(0),
            QuantizedLayout{cols}, tokens};
  }

 private:
  // An odd number of cache lines, so that equal places of several rows do not share a cache set.
  static int value_stride(int cols) { return (ceil_div(cols, kTileRows) | 1) * kTileRows; }

  Scratch values_, records_, tokens_, outliers_, quads_;
};

}  // namespace fuserve::FUSERVE_ISA
