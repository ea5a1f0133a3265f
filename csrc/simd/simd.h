// The instruction set this translation unit is compiled for. Each header defines the same names:
// F32x16 and I32x16 with their arithmetic, conversions, and the byte dot products of the integer
// kernels. Kernels are written once over them; sixteen lanes are sixteen output rows.
#pragma once

#if defined(FUSERVE_ISA_avx512)
#include "simd/avx512.h"
#elif defined(FUSERVE_ISA_avx2)
#include "simd/avx2.h"
#else
#include "simd/scalar.h"
#endif

#include "simd/math.h"
