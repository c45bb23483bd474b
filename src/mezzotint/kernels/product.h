// Matrix products with sums in float32, of sizes that fit the processor's nearest caches; a factor's elements are words.

#ifndef PRODUCT_H
#define PRODUCT_H

#include "simd.h"

#define ROWS (LANES == 8 ? 6 : 12)  // ROWS x 2 vectors of sums and what they need fill the 16 or 32 registers
#define COLUMNS (2 * LANES)
#define LINE 16               // floats of a cache line

// sum (rows x COLUMNS) = a (rows x depth) b (depth x COLUMNS, contiguous); a's rows and columns are a_row and a_step apart.
INLINE void sum_products(const int rows, index depth, const float *a, index a_row, index a_step, const float *b,
                         vec sum[ROWS][2])
{
    UNROLL for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = repeat(0);
    for (index k = 0; k < depth; k++, a += a_step, b += COLUMNS) {
        vec b0 = load(b), b1 = load(b + LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            vec x = repeat(a[i * a_row]);
            sum[i][0] = multiply_add(x, b0, sum[i][0]);
            sum[i][1] = multiply_add(x, b1, sum[i][1]);
        }
    }
}

// c (rows x COLUMNS) = [from +] a (rows x depth) b (depth x COLUMNS, contiguous). `rows` is known to the compiler.
INLINE void multiply_rows(const int rows, index depth, const float *a, index a_row, const float *b, float *c, index c_row,
                          const float *from, index from_row)
{
    vec sum[ROWS][2];
    UNROLL for (int i = 0; i < rows; i++) __builtin_prefetch(c + i * c_row, 1);
    sum_products(rows, depth, a, a_row, 1, b, sum);
    UNROLL for (int i = 0; i < rows; i++) {
        if (from) {
            sum[i][0] += load(from + i * from_row);
            sum[i][1] += load(from + i * from_row + LANES);
        }
        store(c + i * c_row, sum[i][0]);
        store(c + i * c_row + LANES, sum[i][1]);
    }
}

// The same for any number of rows, and for several panels of COLUMNS columns: those of b are b_panel floats apart. `from`
// is NULL, c itself, or with from_row 0 one row for all.
static inline void multiply(index rows, index depth, const float *a, index a_row, const float *b, index b_panel, int panels,
                            float *c, index c_row, const float *from, index from_row)
{
    while (rows > 0) {
        // split the last 7 or 8 rows in half: with 1 or 2 rows alone, each sum would wait for the one before
        int n = rows > ROWS && rows <= ROWS + 2 ? 4 : rows < ROWS ? (int)rows : ROWS;
        index slice = (depth / panels + LINE) / LINE * LINE;  // of the next rows, to prefetch during each panel
        for (int j = 0; j < panels; j++) {
            for (index k = j * slice; k < (j + 1) * slice && k < depth; k += LINE)
                for (int i = 0; i < ROWS && n + i < rows; i++) __builtin_prefetch(a + (n + i) * a_row + k);
            const float *panel = b + j * b_panel, *start = from ? from + j * COLUMNS : NULL;
            float *to = c + j * COLUMNS;
            switch (n) {
            case 1: multiply_rows(1, depth, a, a_row, panel, to, c_row, start, from_row); break;
            case 2: multiply_rows(2, depth, a, a_row, panel, to, c_row, start, from_row); break;
            case 3: multiply_rows(3, depth, a, a_row, panel, to, c_row, start, from_row); break;
            case 4: multiply_rows(4, depth, a, a_row, panel, to, c_row, start, from_row); break;
            case 5: multiply_rows(5, depth, a, a_row, panel, to, c_row, start, from_row); break;
            default: multiply_rows(ROWS, depth, a, a_row, panel, to, c_row, start, from_row);
            }
        }
        rows -= n, a += n * a_row, c += n * c_row;
        if (from) from += n * from_row;
    }
}

#endif
