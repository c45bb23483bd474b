// Vectors of 8 floats by the vector extension of GCC and Clang; AVX2 by the compiler's flags.

#ifndef SIMD_H
#define SIMD_H

#include <stddef.h>

#define LANES 8
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef ptrdiff_t index;
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec x) { *(vec *)p = x; }
INLINE vec repeat(float x) { return x - (vec){0}; }

INLINE vec maximum(vec a, vec b) { return (vec)__builtin_ia32_maxps256(a, b); }  // b if one of them is NaN

// Return 2^(factor x) for x <= 0, with a relative error below 2e-7; 0 where factor x < -126.5; NaN for NaN.
INLINE vec exponential(vec x, float factor)
{
    typedef unsigned bits __attribute__((vector_size(4 * LANES)));
    const float magic = 0x1.8p23f + 127;  // the last bits of magic + y are 127 + y, rounded: a float's exponent
    x = maximum(repeat(-127 / factor), x);
    vec sum = factor * x + magic, f = factor * x - (sum - magic);
    vec power = (vec)((bits)sum << 23);
    vec y = 0x1.5bda3cp-10f * f + 0x1.3ce8acp-7f;  // the minimax polynomial with value 1 at 0, on [-1/2, 1/2]
    y = y * f + 0x1.c6b6d8p-5f;
    y = y * f + 0x1.ebf9c2p-3f;
    y = y * f + 0x1.62e42ap-1f;
    y = y * f + 1;
    return y * power;
}

// Transpose 8 rows of 8 floats: interleave the first and the second half of the rows, three times.
INLINE void transpose(vec *x)
{
    UNROLL for (int time = 0; time < 3; time++) {
        vec y[LANES];
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = __builtin_shufflevector(x[i], x[i + LANES / 2], 0, 8, 1, 9, 2, 10, 3, 11);
            y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + LANES / 2], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        UNROLL for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
}

#endif
