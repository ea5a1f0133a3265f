// The forms in which the consumers of a row of activations want it.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "linear/format.h"
#include "linear/row_buffer.h"

namespace fuserve::FUSERVE_ISA {

class RowForms {
 public:
  // The consumers of a row agree on what is done to it before it is quantized, and on how those
  // that want token rows quantize it.
  explicit RowForms(std::initializer_list<const PackedLinear*> consumers) {
    for (const PackedLinear* w : consumers) {
      if (w->wants_token_rows())
        token_ = &w->input;
      else
        (w->wants_quantized_input() ? blocks_ : floats_) = true;
      if (w->input.is_transformed()) transform_ = &w->input;
    }
  }

  // Makes them of `source`, which may be the row's place in out.values.
  void make(const float* source, int row, const MutableRows& out) const {
    const int cols = out.layout.cols;
    float* values = out.value_row(row);
    if ((floats_ || transform_ != nullptr) && source != values) std::copy_n(source, cols, values);
    if (transform_ != nullptr) {
      transform_features(*transform_, 0, cols, values);
      source = values;
    }
    if (blocks_) quantize_row(source, out.record(row), out.layout);
    if (token_ != nullptr) quantize_token(source, row, *token_, out.tokens);
  }

 private:
  bool blocks_ = false, floats_ = false;
  const LinearInput* token_ = nullptr;
  const LinearInput* transform_ = nullptr;
};

}  // namespace fuserve::FUSERVE_ISA
