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
