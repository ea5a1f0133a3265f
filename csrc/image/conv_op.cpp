#include <algorithm>

#include "conv/conv.h"
#include "image/executor.h"

namespace fuserve::FUSERVE_ISA {

void FusedImageExecutor::perform(Lane& lane, const ConvOp& op) {
  const ImageValue& shape = value(op.out);
  const int batch = shape.batch;
  const Operand out = operand(op.out, batch);
  const Scales scales = group_statistics(lane, op.norm, op.sums, op.sources, batch);
  Operand sources[2];
  for (int s = 0; s < 2 && op.sources[s] != kNoValue; ++s)
    sources[s] = operand(op.sources[s], batch);
  const auto image_of = [&](int index, int image) -> const float* {
    return index == kNoValue ? nullptr : operand(index, batch).image(image);
  };
  const int height = sources[0].shape->height, width = sources[0].shape->width;
  const ConvUnits units =
      conv_units(op.weights, batch, height, width, lane.team.size(), shape.first_row);
  lane.team.for_each(lane.thread, batch * units.per_image(), [&](int unit) {
    const int image = unit / units.per_image();
    ConvInput input;
    input.height = height;
    input.width = width;
    input.above = sources[0].shape->above;
    input.below = sources[0].shape->below;
    for (size_t s = 0; s < 2 && sources[s].shape != nullptr; ++s) {
      input.sources[s] = sources[s].image(image);
      input.above = std::min(input.above, sources[s].shape->above);
      input.below = std::min(input.below, sources[s].shape->below);
    }
    if (op.norm) {
      input.scale = scales.scale(image);
      input.shift = scales.shift(image);
      input.silu = op.norm.silu;
    }
    ConvEpilogue epilogue{image_of(op.channel_add.value, image), image_of(op.residual, image),
                          op.activation};
    if (epilogue.channel_add != nullptr) epilogue.channel_add += op.channel_add.first;
    conv_unit(op.weights, input, epilogue, units.unit(unit % units.per_image()), out.image(image),
              lane.memory.conv);
  });
}

}  // namespace fuserve::FUSERVE_ISA
