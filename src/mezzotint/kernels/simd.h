// Vectors by the vector extension of GCC and Clang: 8 floats, for AVX2, or with -DBFLOAT16 16 words, for AVX-512. A word is
// 4 bytes: a float, or two bfloat16 numbers, which one instruction multiplies and adds to a float.

#ifndef SIMD_H
#define SIMD_H

#include <stddef.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef BFLOAT16
typedef unsigned short number;
#define PAIR 2  // numbers of a word
#define LANES 16
#else
typedef float number;
#define PAIR 1
#define LANES 8
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef ptrdiff_t index;
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef unsigned bits __attribute__((vector_size(4 * LANES)));

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec x) { *(vec *)p = x; }

#if LANES == 8

INLINE vec repeat(float x) { return (vec){x, x, x, x, x, x, x, x}; }
INLINE vec multiply_add(vec a, vec b, vec sum) { return sum + a * b; }
INLINE vec maximum(vec a, vec b) { return (vec)__builtin_ia32_maxps256(a, b); }  // b if one of them is NaN
#define LOW_HALVES(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)  // interleaved
#define HIGH_HALVES(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)

#else

typedef number half __attribute__((vector_size(2 * LANES)));
INLINE vec repeat(float x) { return (vec){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
#define LOW_HALVES(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH_HALVES(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)

#ifdef __AVX512BF16__

INLINE vec multiply_add(vec a, vec b, vec sum)
{
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
INLINE vec maximum(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }  // b if one of them is NaN
INLINE half narrow(vec x) { return (half)_mm512_cvtneps_pbh((__m512)x); }

#else  // the same without these instructions, for tests on other processors

INLINE vec even(vec x) { return (vec)((bits)x << 16); }
INLINE vec odd(vec x) { return (vec)((bits)x & 0xffff0000); }
INLINE vec multiply_add(vec a, vec b, vec sum) { return sum + even(a) * even(b) + odd(a) * odd(b); }
INLINE bits choose(bits condition, bits a, bits b) { return (condition & a) | (~condition & b); }
INLINE vec maximum(vec a, vec b) { return (vec)choose((bits)(a > b), (bits)a, (bits)b); }
INLINE half narrow(vec x)
{
    bits rounded = (bits)x + 0x7fff + ((bits)x >> 16 & 1);  // to the nearest, ties to even
    return __builtin_convertvector(choose((bits)(x == x), rounded, (bits)x | 0x400000) >> 16, half);
}

#endif

// Return words of the bfloat16 numbers nearest to a and b.
INLINE vec join(vec a, vec b)
{
    return (vec)(__builtin_convertvector(narrow(a), bits) | __builtin_convertvector(narrow(b), bits) << 16);
}

#endif

// Transpose LANES rows of LANES words: interleave the first and the second half of the rows, log2(LANES) times.
INLINE void transpose(vec *x)
{
    UNROLL for (int done = 1; done < LANES; done *= 2) {
        vec y[LANES];
        UNROLL for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = LOW_HALVES(x[i], x[i + LANES / 2]);
            y[2 * i + 1] = HIGH_HALVES(x[i], x[i + LANES / 2]);
        }
        UNROLL for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
}

#endif
