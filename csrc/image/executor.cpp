#include "image/executor.h"

#include <algorithm>
#include <chrono>

#include "image/flash_attention.h"
#include "image/group_norm.h"
#include "norm/norm.h"

namespace fuserve::FUSERVE_ISA {

FusedImageExecutor::Operand FusedImageExecutor::operand(int index, int batch) const {
  const ImageValue& v = value(index);
  float* data = v.offset < 0 ? (*bound_)[static_cast<size_t>(index)] : arena_memory_ + v.offset;
  return {&v, data, batch / v.batch};
}

float* FusedImageExecutor::arena(const ImageProgram& program) {
  return arena_.get<float>(program.arena_floats);
}

void FusedImageExecutor::run(const ImageProgram& program, OpRange ops,
                             const std::vector<float*>& bound, ThreadPool& pool, double* seconds) {
  program_ = &program;
  bound_ = &bound;
  reserve(pool.size());
  using Clock = std::chrono::steady_clock;
  pool.run([&](Team& team, int thread) {
    Lane lane{team, thread, threads_[static_cast<size_t>(thread)]};
    Clock::time_point started = Clock::now();
    for (size_t i = ops.first; i < ops.last; ++i) {
      std::visit([&](const auto& op) { perform(lane, op); }, program.ops[i]);
      team.sync(thread);
      if (thread != 0 || seconds == nullptr) continue;
      const Clock::time_point now = Clock::now();
      seconds[i] = std::chrono::duration<double>(now - started).count();
      started = now;
    }
  });
}

void FusedImageExecutor::release() {
  for (Scratch* memory : {&arena_, &sums_, &scales_}) *memory = Scratch();
  rows_ = RowBuffer();
  threads_.clear();
}

// Memory of phases is taken before they run, at its largest, so that it grows once.
void FusedImageExecutor::reserve(int num_threads) {
  threads_.resize(static_cast<size_t>(num_threads));
  arena_memory_ = arena_.get<float>(program_->arena_floats);
  const auto floats = [](int a, int b, int c) {
    return static_cast<size_t>(a) * static_cast<size_t>(b) * static_cast<size_t>(c);
  };
  const auto reserve_norm = [&](const GroupNorm& norm, const int (&sources)[2], int batch) {
    if (!norm) return;
    size_t sums = 0;
    int channels = 0;
    for (const int source : sources) {
      if (source == kNoValue) continue;
      const ImageValue& v = value(source);
      sums += floats(v.batch, v.norm_chunks(), 2 * v.channels);
      channels += v.channels;
    }
    sums_.get<float>(sums);
    scales_.get<float>(floats(batch, 2, channels));
  };
  for (const ImageOp& any : program_->ops) {
    if (const auto* op = std::get_if<NormalizeOp>(&any))
      reserve_norm(op->group, op->sources, value(op->out).batch);
    if (const auto* op = std::get_if<ConvOp>(&any))
      reserve_norm(op->norm, op->sources, value(op->out).batch);
    if (const auto* op = std::get_if<LinearOp>(&any); op != nullptr && wants_prepared(*op))
      rows_.reserve(value(op->out).batch * value(op->out).pixels(), op->weights.cols);
  }
}

void FusedImageExecutor::sum_sources(Lane& lane, const Operand (&sources)[2],
                                     float* const (&sums)[2]) {
  const int chunks = sources[0].shape->norm_chunks();
  const int first_units = sources[0].shape->batch * chunks;
  const int units =
      first_units + (sources[1].shape == nullptr ? 0 : sources[1].shape->batch * chunks);
  lane.team.for_each(lane.thread, units, [&](int unit) {
    const int s = unit < first_units ? 0 : 1;
    if (s == 1) unit -= first_units;
    const float* image = sources[s].own_image(unit / chunks);
    chunk_sums(*sources[s].shape, image, image, unit % chunks,
               sums[s] + static_cast<std::ptrdiff_t>(unit) * 2 * sources[s].shape->channels);
  });
  lane.team.sync(lane.thread);
}

FusedImageExecutor::Scales FusedImageExecutor::group_statistics(Lane& lane, const GroupNorm& norm,
                                                                const GivenSums& given,
                                                                const int (&sources)[2],
                                                                int batch) {
  if (!norm) return {};
  Operand operands[2];
  int channels = 0;
  for (int s = 0; s < 2 && sources[s] != kNoValue; ++s) {
    operands[s] = operand(sources[s], batch);
    channels += operands[s].shape->channels;
  }
  const int pixels = given ? given.pixels : operands[0].shape->pixels();
  const int chunks = given ? value(given.values[0]).height - 1 : operands[0].shape->norm_chunks();
  float* sums[2] = {sums_.get<float>(0), nullptr};
  sums[1] = sums[0] + static_cast<std::ptrdiff_t>(operands[0].shape->batch) * chunks * 2 *
                          operands[0].shape->channels;
  if (!given) sum_sources(lane, operands, sums);
  const auto part_of = [&](int s, int image) -> NormSource {
    const int c = operands[s].shape->channels;
    if (given) {
      const float* pivots = operand(given.values[s], batch).image(image);
      return {pivots + 2 * c, pivots, c};
    }
    return {sums[s] + static_cast<std::ptrdiff_t>(image / operands[s].repeats) * chunks * 2 * c,
            operands[s].image(image), c};
  };
  float* scales = scales_.get<float>(0);
  lane.team.for_each(lane.thread, batch * norm.groups, [&](int unit) {
    const int image = unit / norm.groups;
    NormSource parts[2];
    for (int s = 0; s < 2 && operands[s].shape != nullptr; ++s) parts[s] = part_of(s, image);
    float* scale = scales + static_cast<std::ptrdiff_t>(image) * 2 * channels;
    group_scales(norm, parts, chunks, pixels, unit % norm.groups, scale, scale + channels);
  });
  lane.team.sync(lane.thread);
  return {scales, channels};
}

void FusedImageExecutor::perform(Lane& lane, const ChannelSumsOp& op) {
  const int batch = value(op.out).batch;
  const Operand out = operand(op.out, batch), source = operand(op.source, batch);
  const int channels = source.shape->channels, chunks = source.shape->norm_chunks();
  const bool begins = op.pivots == kNoValue;
  lane.team.for_each(lane.thread, batch * chunks, [&](int unit) {
    const int image = unit / chunks, chunk = unit % chunks;
    const float* pivots = begins ? source.image(image) : operand(op.pivots, batch).image(image);
    float* row = out.image(image);
    if (begins && chunk == 0) std::fill_n(std::copy_n(pivots, channels, row), channels, 0.0F);
    row += static_cast<std::ptrdiff_t>(chunk + (begins ? 1 : 0)) * 2 * channels;
    chunk_sums(*source.shape, source.image(image), pivots, chunk, row);
  });
}

void FusedImageExecutor::perform(Lane& lane, const NormalizeOp& op) {
  const ImageValue& shape = value(op.out);
  const Operand out = operand(op.out, shape.batch);
  const Scales scales = group_statistics(lane, op.group, op.sums, op.sources, shape.batch);
  const int chunks = ceil_div(shape.pixels(), kNormPixels);
  lane.team.for_each(lane.thread, shape.batch * chunks, [&](int unit) {
    const int image = unit / chunks, first = unit % chunks * kNormPixels;
    const int pixels = std::min(kNormPixels, shape.pixels() - first);
    float* target = out.image(image) + static_cast<std::ptrdiff_t>(first) * shape.channels;
    int channel = 0;
    for (int s = 0; s < 2 && op.sources[s] != kNoValue; ++s) {
      const Operand source = operand(op.sources[s], shape.batch);
      const int channels = source.shape->channels;
      const float* from = source.image(image) + static_cast<std::ptrdiff_t>(first) * channels;
      if (op.group)
        apply_scales(from, pixels, channels, scales.scale(image) + channel,
                     scales.shift(image) + channel, op.group.silu, target + channel,
                     shape.channels);
      else
        for (std::ptrdiff_t p = 0; p < pixels; ++p)
          normalize(op.layer, from + p * channels, channels, target + p * channels);
      channel += channels;
    }
  });
}

void FusedImageExecutor::perform(Lane& lane, const AttentionOp& op) {
  const ImageValue& shape = value(op.out);
  const Operand out = operand(op.out, shape.batch);
  const auto operand_of = [&](const ChannelSlice& heads) {
    return operand(heads.value, shape.batch);
  };
  const Operand query = operand_of(op.query), key = operand_of(op.key), v = operand_of(op.value);
  const int queries = shape.pixels(), block = flash_queries(op.head_dim);
  const int blocks = ceil_div(queries, block);
  lane.team.for_each(lane.thread, shape.batch * op.heads * blocks, [&](int unit) {
    const int image = unit / blocks / op.heads, channel = unit / blocks % op.heads * op.head_dim;
    const auto rows = [&](const Operand& from, int first_channel) {
      return HeadRows<const float>{from.image(image) + first_channel + channel,
                                   from.shape->channels};
    };
    FlashTask task;
    task.queries = rows(query, op.query.first);
    task.keys = rows(key, op.key.first);
    task.values = rows(v, op.value.first);
    task.out = {out.image(image) + channel, shape.channels};
    task.first_query = unit % blocks * block;
    task.last_query = std::min(task.first_query + block, queries);
    task.num_keys = key.shape->pixels();
    task.head_dim = op.head_dim;
    task.causal = op.causal;
    task.in_pairs = op.in_pairs;
    flash_attention(task, lane.memory.attention);
  });
}

}  // namespace fuserve::FUSERVE_ISA
