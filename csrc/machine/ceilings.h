// What this machine can do at most: the yardsticks of every benchmark.
#pragma once

#include "runtime/team.h"

namespace fuserve::FUSERVE_ISA {

// Bytes a second read from memory, streaming over `bytes` of it `passes` times; the best pass.
double read_bandwidth(ThreadPool& pool, size_t bytes, int passes);

// Floating-point operations a second of independent fp32 multiply-adds in registers.
double fp32_rate(ThreadPool& pool);

// Operations a second of the q4 (or q8) block dot product on data in the first-level cache.
double byte_dot_rate(ThreadPool& pool, bool q4);

// The same of whole rows of int8, which W8A8 multiplies.
double row_dot_rate(ThreadPool& pool);

}  // namespace fuserve::FUSERVE_ISA
