// y = x w^T + bias in float32, w as a linear layer or a 1x1 convolution keeps it: one row for each column of y.
//
// The product is computed in blocks (Goto & van de Geijn 2008): a thread copies a block of w, of BLOCK rows and DEPTH
// columns, into panels that stay in its L2 cache, and multiplies six rows of x by them at a time, which stay in L1. The
// sums are added over the blocks in order of depth, so that y depends neither on the number of threads nor of rows.

#include "exponential.h"
#include "parallel.h"
#include "product.h"

#define DEPTH 384          // columns of w that are multiplied at a time, at most
#define BLOCK 256          // rows of w, at most
#define PART (171 * ROWS)  // rows of x that a unit of work takes, at most
#define STEP (16 * ROWS)   // rows that are gated at a time

typedef struct {
    const float *x, *w, *bias;
    float *y, *scratch;
    index rows, x_row, inputs, outputs;  // outputs of y
    int gated;                           // whether w has as many rows again, of which the GELU is a factor of the first
    int transposed;                      // whether w has one column for each column of y
    index part, block, blocks, depth;
} Job;

// Return the size of parts of a number, so that there are as few as possible, at most `largest` and multiples of `step`.
static index divide(index size, index largest, index step)
{
    index parts = (size + largest - 1) / largest;
    return (size + parts * step - 1) / (parts * step) * step;
}

// Floats for the panels, and for what is gated afterwards.
static index scratch_of_thread(int gated) { return DEPTH * BLOCK + (gated ? PART * BLOCK : 0); }

// Copy COLUMNS columns of w: to[depth][column].
static void copy(const float *w, index w_row, index depth, float *to)
{
    for (index k = 0; k < depth; k++)
        for (int half = 0; half < COLUMNS; half += LANES) store(to + k * COLUMNS + half, load(w + k * w_row + half));
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

// Return x times the normal distribution function of x, with an error below 2e-7 |x|.
INLINE vec gelu(vec x)
{
    typedef int bits __attribute__((vector_size(4 * LANES)));
    vec size = (vec)((bits)x & 0x7fffffff), t = 1 / (1 + 0.28284271f * size);
    vec tail = -0.10214280f * t + 0.36283605f;  // times exp(-x^2/2) it is the integral beyond |x|; minimax
    tail = tail * t - 0.19892671f;
    tail = tail * t + 0.24504458f;
    tail = tail * t + 0.07652852f;
    tail = tail * t + 0.11666033f;
    tail = tail * t * exponential(-x * x, 0.72134752f);  // log2(e) / 2
    vec lower = (vec)((bits)tail & (x < 0)), upper = (vec)((bits)(1 - tail) & ~(x < 0));
    return x * (vec)((bits)lower | (bits)upper);
}

// y (rows x columns) = the first half of each row of sums (rows x 2 columns) times the GELU of the second.
static void gate(index rows, index columns, const float *sums, float *y, index y_row)
{
    for (index i = 0; i < rows; i++, sums += 2 * columns, y += y_row)
        for (index j = 0; j < columns; j += LANES) store(y + j, load(sums + j) * gelu(load(sums + columns + j)));
}

// Compute a block of columns of y for a part of the rows.
static void multiply_block(void *given, ptrdiff_t unit, int thread)
{
    const Job *job = given;
    index column = unit % job->blocks * job->block, row = unit / job->blocks * job->part;
    index columns = job->outputs - column < job->block ? job->outputs - column : job->block;
    index rows = job->rows - row < job->part ? job->rows - row : job->part;
    index halves = 1 + job->gated, width = halves * columns, to_row = job->gated ? width : job->outputs;
    float *panels = job->scratch + thread * scratch_of_thread(job->gated);
    float *y = job->y + row * job->outputs + column, *to = job->gated ? panels + DEPTH * BLOCK : y, bias[BLOCK] = {0};
    for (index j = 0; job->bias && j < width; j++) bias[j] = job->bias[j / columns * job->outputs + column + j % columns];
    for (index k = 0; k < job->inputs; k += job->depth) {
        index depth = job->inputs - k < job->depth ? job->inputs - k : job->depth;
        for (index j = 0; j < width; j += COLUMNS) {
            index output = j / columns * job->outputs + column + j % columns;
            if (job->transposed)
                copy(job->w + k * job->outputs + output, job->outputs, depth, panels + j * depth);
            else
                pack(job->w + output * job->inputs + k, job->inputs, depth, panels + j * depth);
        }
        int last = job->gated && k + depth == job->inputs;
        index step = last ? STEP : rows;
        for (index i = 0; i < rows; i += step) {
            index count = rows - i < step ? rows - i : step;
            float *sums = to + i * to_row;
            multiply(count, depth, job->x + (row + i) * job->x_row + k, job->x_row, panels, COLUMNS * depth,
                     (int)(width / COLUMNS), sums, to_row, k ? sums : bias, k ? to_row : 0);
            if (last) gate(count, columns, sums, y + i * job->outputs, job->outputs);
        }
    }
}

// Return the floats that linear needs for itself.
ptrdiff_t linear_scratch(int gated, int threads) { return threads * scratch_of_thread(gated); }

// Multiply x (rows, inputs), of rows that are x_row floats apart, by the transpose of w (outputs, inputs) and add bias
// (outputs), unless it is NULL. If gated, w and bias have 2 outputs rows, and y (rows, outputs) is the first half of the
// columns of that times the GELU of the second. If transposed, which excludes gated, w is (inputs, outputs). w and y are
// contiguous; inputs is a multiple of LANES, outputs of COLUMNS. scratch has room for linear_scratch(gated, threads).
void linear(const float *x, const float *w, const float *bias, float *y, float *scratch, ptrdiff_t rows, ptrdiff_t x_row,
            ptrdiff_t inputs, ptrdiff_t outputs, int gated, int transposed, int threads)
{
    Job job = {.x = x, .w = w, .bias = bias, .y = y, .scratch = scratch, .rows = rows, .x_row = x_row, .inputs = inputs,
               .outputs = outputs, .gated = gated, .transposed = transposed, .depth = divide(inputs, DEPTH, LANES),
               .block = divide(outputs, gated ? BLOCK / 2 : BLOCK, COLUMNS)};
    job.blocks = (outputs + job.block - 1) / job.block;
    index parts = (threads + job.blocks - 1) / job.blocks;  // so that each thread has work
    job.part = divide(rows, (rows + parts - 1) / parts < PART ? (rows + parts - 1) / parts : PART, ROWS);
    parallel(multiply_block, &job, job.blocks * ((rows + job.part - 1) / job.part), threads);
}
