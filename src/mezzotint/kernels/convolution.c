// 3x3 convolution, stride 1, in float32, by Winograd's minimal filtering F(4x4, 3x3): a quarter of the multiplications
// (Lavin & Gray 2016, arXiv 1509.09308). The points of interpolation are 0, +-2/3, +-3/2 and infinity instead of the
// usual 0, +-1, +-2: with these the error of rounding is that of the direct sum.
//
// A tile is 4x4 pixels of the output, for which 6x6 of the input are needed. Its transform has 36 elements a channel, and
// element e of the output's is the sum over channels of element e of the input's times element e of the weights': 36
// matrix products. The weights stay as they are and are transformed at each call, some channels at a time.

#include <stdlib.h>

#include "parallel.h"
#include "product.h"

#define ELEMENTS 36
#define TILES 128                       // tiles that are transformed at a time
#define DEPTH 64                        // channels of the input that are multiplied at a time
#define PANELS 2
#define BLOCK (PANELS * COLUMNS)        // channels of the output that are computed at a time
// elements lie a cache line more than a power of two apart
#define INPUT (TILES * DEPTH + LINE)    // floats of an element of the input, DEPTH channels
#define WEIGHT (DEPTH * COLUMNS + LINE)  // of the weights, COLUMNS channels of the output
#define OUTPUT (TILES * BLOCK + LINE)   // of the output

#define A (2 / 3.f)
#define B (3 / 2.f)  // 1 / A
#define A2 (A * A)
#define B2 (B * B)

typedef struct {
    const float *x, *weight, *bias;
    float *y, *inputs, *scratch;
    index channels, height, width, top, left;  // of x; rows and columns of zeros around it
    index out_channels, out_height, out_width;
    index rows, columns;                       // tiles of a picture
    index first, count, part;                  // tiles that are worked on, and that a unit of work takes
    int transposed;                            // whether weight is (channels, 3, 3, out_channels) and turned by 180 degrees
} Job;

// ---- the input ---------------------------------------------------------------------------------------------------

INLINE void transform_input(vec *d, int step)
{
    vec d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
    vec even_a = d4 - B2 * d2, odd_a = A * d3 - B * d1, even_b = d4 - A2 * d2, odd_b = B * d3 - A * d1;
    d[0] = d0 + d4 - (A2 + B2) * d2;
    d[step] = even_a + odd_a;
    d[2 * step] = even_a - odd_a;
    d[3 * step] = even_b + odd_b;
    d[4 * step] = even_b - odd_b;
    d[5 * step] = d1 + d5 - (A2 + B2) * d3;
}

// Transform a tile: inputs[DEPTH channels][element][tile][channel].
static void transform_inputs(void *given, ptrdiff_t unit, int thread)
{
    const Job *job = given;
    (void)thread;
    index tile = job->first + unit, row = tile / job->columns % job->rows * 4 - job->top;
    index column = tile % job->columns * 4 - job->left;
    const float *picture = job->x + tile / (job->columns * job->rows) * job->height * job->width * job->channels;
    const float *pixels[ELEMENTS];
    for (int i = 0; i < 6; i++)
        for (int j = 0; j < 6; j++) {
            index r = row + i, c = column + j;
            int inside = r >= 0 && r < job->height && c >= 0 && c < job->width;
            pixels[6 * i + j] = inside ? picture + (r * job->width + c) * job->channels : NULL;
        }
    for (index channel = 0; channel < job->channels; channel += LANES) {
        float *to = job->inputs + channel / DEPTH * ELEMENTS * INPUT + unit * DEPTH + channel % DEPTH;
        vec d[ELEMENTS];
        for (int e = 0; e < ELEMENTS; e++) d[e] = pixels[e] ? load(pixels[e] + channel) : repeat(0);
        for (int j = 0; j < 6; j++) transform_input(d + j, 6);
        for (int i = 0; i < 6; i++) transform_input(d + 6 * i, 1);
        for (int e = 0; e < ELEMENTS; e++) store(to + e * INPUT, d[e]);
    }
}

// ---- the weights -------------------------------------------------------------------------------------------------

INLINE void transform_weight(const vec *g, int step, vec *u, int u_step)
{
    const float a = 1 / (2 * A2 * (A2 - B2)), b = 1 / (2 * B2 * (B2 - A2));
    vec g0 = g[0], g1 = g[step], g2 = g[2 * step];
    vec even_a = a * g0 + a * A2 * g2, odd_a = a * A * g1, even_b = b * g0 + b * B2 * g2, odd_b = b * B * g1;
    u[0] = g0;
    u[u_step] = even_a + odd_a;
    u[2 * u_step] = even_a - odd_a;
    u[3 * u_step] = even_b + odd_b;
    u[4 * u_step] = even_b - odd_b;
    u[5 * u_step] = g2;
}

// Transform the weights of COLUMNS channels of the output, from `out`, and of `depth` channels of the input, from `in`:
// to[element][channel of the input][channel of the output].
static void transform_weights(const Job *job, index out, index in, index depth, float *to)
{
    for (index k = 0; k < depth; k += LANES)
        for (int half = 0; half < COLUMNS; half += LANES) {
            const float *weight = job->weight + (out + half) * 9 * job->channels + in + k;
            const float *turned = job->weight + (in + k) * 9 * job->out_channels + out + half;
            vec g[9][LANES];  // of each tap, for each channel of the input, a vector of channels of the output
            for (int tap = 0; tap < 9; tap++) {
                for (int i = 0; i < LANES; i++)
                    g[tap][i] = load(job->transposed ? turned + (i * 9 + 8 - tap) * job->out_channels
                                                     : weight + (i * 9 + tap) * job->channels);
                if (!job->transposed) transpose(g[tap]);
            }
            for (int i = 0; i < LANES; i++) {
                vec rows[18], u[ELEMENTS];
                for (int j = 0; j < 3; j++) transform_weight(&g[j][i], 3 * LANES, rows + j, 3);
                for (int j = 0; j < 6; j++) transform_weight(rows + 3 * j, 1, u + 6 * j, 1);
                for (int e = 0; e < ELEMENTS; e++) store(to + e * WEIGHT + (k + i) * COLUMNS + half, u[e]);
            }
        }
}

// ---- the output --------------------------------------------------------------------------------------------------

INLINE void transform_output(const vec *m, int step, vec *y, int y_step)
{
    vec sum_a = m[step] + m[2 * step], difference_a = m[step] - m[2 * step];
    vec sum_b = m[3 * step] + m[4 * step], difference_b = m[3 * step] - m[4 * step];
    y[0] = m[0] + sum_a + sum_b;
    y[y_step] = A * difference_a + B * difference_b;
    y[2 * y_step] = A2 * sum_a + B2 * sum_b;
    y[3 * y_step] = A2 * A * difference_a + B2 * B * difference_b + m[5 * step];
}

// Transform products[element][tile][channel] of BLOCK channels from `out` back, and write them.
static void transform_outputs(const Job *job, index first, index count, index out, const float *products)
{
    for (index t = 0; t < count; t++) {
        index tile = first + t, row = tile / job->columns % job->rows * 4, column = tile % job->columns * 4;
        index picture = tile / (job->columns * job->rows);
        for (int channel = 0; channel < BLOCK; channel += LANES) {
            vec m[ELEMENTS], rows[24], y[16], bias = job->bias ? load(job->bias + out + channel) : repeat(0);
            for (int e = 0; e < ELEMENTS; e++) m[e] = load(products + e * OUTPUT + t * BLOCK + channel);
            for (int j = 0; j < 6; j++) transform_output(m + j, 6, rows + j, 6);
            for (int i = 0; i < 4; i++) transform_output(rows + 6 * i, 1, y + 4 * i, 1);
            for (int i = 0; i < 4 && row + i < job->out_height; i++)
                for (int j = 0; j < 4 && column + j < job->out_width; j++) {
                    index pixel = (picture * job->out_height + row + i) * job->out_width + column + j;
                    store(job->y + pixel * job->out_channels + out + channel, y[4 * i + j] + bias);
                }
        }
    }
}

// Compute BLOCK channels of some tiles.
static void convolve_block(void *given, ptrdiff_t unit, int thread)
{
    const Job *job = given;
    index blocks = job->out_channels / BLOCK, out = unit % blocks * BLOCK, first = unit / blocks * job->part;
    index count = job->count - first < job->part ? job->count - first : job->part;
    float *weights = job->scratch + thread * ELEMENTS * (PANELS * WEIGHT + OUTPUT);
    float *products = weights + ELEMENTS * PANELS * WEIGHT;
    for (index in = 0; in < job->channels; in += DEPTH) {
        index depth = job->channels - in < DEPTH ? job->channels - in : DEPTH;
        const float *inputs = job->inputs + in / DEPTH * ELEMENTS * INPUT + first * DEPTH;
        for (int panel = 0; panel < PANELS; panel++)
            transform_weights(job, out + panel * COLUMNS, in, depth, weights + panel * ELEMENTS * WEIGHT);
        for (int e = 0; e < ELEMENTS; e++)
            multiply(count, depth, inputs + e * INPUT, DEPTH, weights + e * WEIGHT, ELEMENTS * WEIGHT, PANELS,
                     products + e * OUTPUT, BLOCK, in ? products + e * OUTPUT : NULL, BLOCK);
    }
    transform_outputs(job, job->first + first, count, out, products);
}

// Return the floats that convolve3x3 needs for itself.
ptrdiff_t convolve3x3_scratch(ptrdiff_t channels, int threads)
{
    return ELEMENTS * ((channels + DEPTH - 1) / DEPTH * INPUT + threads * (PANELS * WEIGHT + OUTPUT));
}

// Convolve x (batch, height, width, channels), with `top` rows of zeros above and below and `left` columns on both sides,
// with weight (out_channels, 3, 3, channels) and add bias (out_channels), unless it is NULL. If transposed, weight is that
// of the convolution of which this is the gradient: (channels, 3, 3, out_channels), turned by 180 degrees. All are
// contiguous; channels is a multiple of LANES, out_channels of BLOCK. scratch has room for
// convolve3x3_scratch(channels, threads).
void convolve3x3(const float *x, const float *weight, const float *bias, float *y, float *scratch, ptrdiff_t batch,
                 ptrdiff_t height, ptrdiff_t width, ptrdiff_t channels, ptrdiff_t out_channels, ptrdiff_t top,
                 ptrdiff_t left, int transposed, int threads)
{
    Job job = {.x = x, .weight = weight, .bias = bias, .y = y, .inputs = scratch, .channels = channels,
               .height = height, .width = width, .top = top, .left = left, .transposed = transposed,
               .out_channels = out_channels,
               .out_height = height + 2 * top - 2, .out_width = width + 2 * left - 2};
    job.scratch = scratch + ELEMENTS * ((channels + DEPTH - 1) / DEPTH) * INPUT;
    job.rows = (job.out_height + 3) / 4, job.columns = (job.out_width + 3) / 4;
    index tiles = batch * job.rows * job.columns, blocks = out_channels / BLOCK;
    for (job.first = 0; job.first < tiles; job.first += TILES) {
        job.count = tiles - job.first < TILES ? tiles - job.first : TILES;
        parallel(transform_inputs, &job, job.count, threads);
        index parts = (threads + blocks - 1) / blocks;  // so that each thread has work
        job.part = (job.count + parts - 1) / parts;
        parallel(convolve_block, &job, blocks * ((job.count + job.part - 1) / job.part), threads);
    }
}
