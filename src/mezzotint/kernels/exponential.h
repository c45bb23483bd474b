// The exponential function of vectors.

#ifndef EXPONENTIAL_H
#define EXPONENTIAL_H

#include "simd.h"

// Return 2^(factor x) for x <= 0, with a relative error below 2e-7; 0 where factor x < -126.5; NaN for NaN.
INLINE vec exponential(vec x, float factor)
{
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

#endif
