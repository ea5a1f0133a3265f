// The executor: operations as phases between barriers; each method is run by all threads.
#pragma once

#include <functional>

#include "image/program.h"
#include "linear/row_buffer.h"
#include "runtime/buffer.h"

namespace fuserve::FUSERVE_ISA {

class FusedImageExecutor final : public ImageExecutor {
 public:
  void run(const ImageProgram& program, OpRange ops, const std::vector<float*>& bound,
           ThreadPool& pool, double* seconds) override;
  float* arena(const ImageProgram& program) override;
  void release() override;

 private:
  struct ThreadMemory {
    Scratch product;    // outputs of linear_tiles before the epilogue
    Scratch linear;     // unpacked panels
    Scratch attention;  // transposed queries and scores
    Scratch conv;
  };
  // One thread's place in the running program.
  struct Lane {
    Team& team;
    int thread;
    ThreadMemory& memory;
  };

  // A value's memory as a result of `batch` images reads it.
  struct Operand {
    const ImageValue* shape = nullptr;
    float* data = nullptr;
    int repeats = 1;  // consecutive images of the result that one of it stands for

    float* image(int index) const { return own_image(index / repeats); }
    // Of the value's own batch.
    float* own_image(int index) const {
      return data +
             static_cast<std::ptrdiff_t>(index) *
                 static_cast<std::ptrdiff_t>(shape->image_floats()) +
             static_cast<std::ptrdiff_t>(shape->above * shape->width) * shape->channels;
    }
    // A row of channels, counted over all images of the result.
    float* row(int index) const {
      return image(index / shape->pixels()) +
             static_cast<std::ptrdiff_t>(index % shape->pixels()) * shape->channels;
    }
  };
  Operand operand(int value, int batch) const;
  const ImageValue& value(int index) const { return program_->values[static_cast<size_t>(index)]; }

  void reserve(int num_threads);
  void perform(Lane& lane, const NormalizeOp& op);
  void perform(Lane& lane, const ConvOp& op);
  void perform(Lane& lane, const LinearOp& op);
  void perform(Lane& lane, const AttentionOp& op);
  void perform(Lane& lane, const ChannelSumsOp& op);

  // Scales and shifts of each image of the result; ends with a barrier.
  struct Scales {
    const float* data = nullptr;  // [batch][2, channels]; null: there is no norm
    int channels = 0;

    const float* scale(int image) const {
      return data + static_cast<std::ptrdiff_t>(image) * 2 * channels;
    }
    const float* shift(int image) const { return scale(image) + channels; }
  };
  Scales group_statistics(Lane& lane, const GroupNorm& norm, const GivenSums& given,
                          const int (&sources)[2], int batch);
  // The sums of each source's chunks, one after the other in `sums_`; ends with a barrier.
  void sum_sources(Lane& lane, const Operand (&sources)[2], float* const (&sums)[2]);

  // The rows of a linear's input in the form that it wants; ends with a barrier if it makes them.
  bool wants_prepared(const LinearOp& op) const;
  Rows prepare(Lane& lane, const LinearOp& op);
  void finish_rows(const LinearOp& op, const Operand& out, int first, int last, int tile,
                   int last_tile, const float* product, const float* gates) const;

  // Of the running program:
  const ImageProgram* program_ = nullptr;
  const std::vector<float*>* bound_ = nullptr;
  float* arena_memory_ = nullptr;

  Scratch arena_, sums_, scales_;
  RowBuffer rows_;
  std::vector<ThreadMemory> threads_;
};

}  // namespace fuserve::FUSERVE_ISA
