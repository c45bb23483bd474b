// y = x w^T + bias in float32, w as a linear layer or a 1x1 convolution keeps it: one row for each column of y.
//
// The product is computed in blocks (Goto & van de Geijn 2008): a thread copies a block of w, of BLOCK rows and DEPTH
// columns, into panels that stay in its L2 cache, and multiplies six rows of x by them at a time, which stay in L1. The
// sums are added over the blocks in order of depth, so that y depends neither on the number of threads nor of rows.

#include "pool.h"
#include "product.h"

#define DEPTH 384  // columns of w that are multiplied at a time, at most
#define BLOCK 256  // rows of w, at most
#define PART 1024  // rows of x that a unit of work takes, at most

typedef struct {
    const float *x, *w, *bias;
    float *y, *scratch;
    index rows, x_row, inputs, outputs;
    index part, block, blocks, depth;
} Job;

// Return the size of parts of a number, so that there are as few as possible, at most `largest` and multiples of `step`.
static index divide(index size, index largest, index step)
{
    index parts = (size + largest - 1) / largest;
    return (size + parts * step - 1) / (parts * step) * step;
}

// Transpose COLUMNS rows of w: to[depth][row].
static void pack(const float *w, index w_row, index depth, float *to)
{
    for (int half = 0; half < COLUMNS; half += LANES)
        for (index k = 0; k < depth; k += LANES) {
            vec square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = load(w + (half + i) * w_row + k);
            transpose(square);
            for (int i = 0; i < LANES; i++) store(to + (k + i) * COLUMNS + half, square[i]);
        }
}

// Compute a block of columns of y for a part of the rows.
static void multiply_block(void *given, ptrdiff_t unit, int thread)
{
    const Job *job = given;
    index column = unit % job->blocks * job->block, row = unit / job->blocks * job->part;
    index columns = job->outputs - column < job->block ? job->outputs - column : job->block;
    index rows = job->rows - row < job->part ? job->rows - row : job->part;
    float *panels = job->scratch + thread * DEPTH * BLOCK, *y = job->y + row * job->outputs + column;
    for (index k = 0; k < job->inputs; k += job->depth) {
        index depth = job->inputs - k < job->depth ? job->inputs - k : job->depth;
        for (index j = 0; j < columns; j += COLUMNS)
            pack(job->w + (column + j) * job->inputs + k, job->inputs, depth, panels + j * depth);
        const float *from = k ? y : job->bias ? job->bias + column : NULL;
        multiply(rows, depth, job->x + row * job->x_row + k, job->x_row, panels, COLUMNS * depth,
                 (int)(columns / COLUMNS), y, job->outputs, from, k ? job->outputs : 0);
    }
}

// Return the floats that linear needs for itself.
ptrdiff_t linear_scratch(int threads) { return (ptrdiff_t)threads * DEPTH * BLOCK; }

// Multiply x (rows, inputs), of rows that are x_row floats apart, by the transpose of w (outputs, inputs) and add bias
// (outputs), unless it is NULL. w and y are contiguous; inputs is a multiple of LANES, outputs of COLUMNS. scratch has
// room for linear_scratch(threads).
void linear(const float *x, const float *w, const float *bias, float *y, float *scratch, ptrdiff_t rows, ptrdiff_t x_row,
            ptrdiff_t inputs, ptrdiff_t outputs, int threads)
{
    Job job = {.x = x, .w = w, .bias = bias, .y = y, .scratch = scratch, .rows = rows, .x_row = x_row, .inputs = inputs,
               .outputs = outputs, .depth = divide(inputs, DEPTH, LANES), .block = divide(outputs, BLOCK, COLUMNS)};
    job.blocks = (outputs + job.block - 1) / job.block;
    index parts = (threads + job.blocks - 1) / job.blocks;  // so that each thread has work
    job.part = divide(rows, (rows + parts - 1) / parts < PART ? (rows + parts - 1) / parts : PART, ROWS);
    parallel(multiply_block, &job, job.blocks * ((rows + job.part - 1) / job.part), threads);
}
