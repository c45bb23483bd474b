// Attention, softmax(q kT / sqrt(d)) v, over blocks of keys, with the maximum and the sum of each query so far
// (Dao et al. 2022, arXiv 2205.14135): the scores of a block stay in the nearest caches. Numbers are float32, or with
// -DBFLOAT16 bfloat16, with scores, sums and exponentials in float32. The products' elements are words (simd.h): of
// queries and keys two neighbours in a row, of values and exponentials those of two neighbouring keys.
//
// Everything is transposed: a panel is COLUMNS queries, stored (d, COLUMNS), with scores (keys, COLUMNS) and outputs
// (d, COLUMNS). So both products read keys and values one number at a time, which need not be transposed for that, and
// maxima and sums over the keys run along vectors of queries, not across them. A query's result depends on the blocks of
// keys alone, not on how the queries are distributed over panels, units and threads.

#include <float.h>
#include <math.h>
#include <string.h>

#include "exponential.h"
#include "parallel.h"
#include "product.h"

#define KEYS 96          // of a block, at most
#define PANELS 64        // of a unit of work, at most: each unit copies all keys and values of its head once
#define UNITS_A_THREAD 4  // if there are enough queries, so that the threads finish at about the same time

typedef struct {
    const number *data;
    index batch, head, row;  // strides; the numbers of a row are contiguous
} Operand;

typedef struct {
    Operand q, k, v;
    number *out;
    float *logsumexp, *scratch;
    index heads, queries, keys, dim;
    index words;          // of a row
    index block;          // keys of a block
    index panels, parts;  // panels of a unit, and units of a head
    float scale, factor;  // 1 / sqrt(dim), and log2(e) times that
} Job;

INLINE index least(index a, index b) { return a < b ? a : b; }

// ---- a panel -----------------------------------------------------------------------------------------------------

// c (rows x COLUMNS) = [scale c +] a b, of which b (depth x COLUMNS) is contiguous and scale is of each column.
INLINE void multiply_tile(const int rows, index depth, const float *a, index a_row, index a_step, const float *b, float *c,
                          const float *scale)
{
    vec sum[ROWS][2];
    sum_products(rows, depth, a, a_row, a_step, b, sum);
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int half = 0; half < 2; half++) {
            float *to = c + i * COLUMNS + half * LANES;
            if (scale) sum[i][half] += load(scale + half * LANES) * load(to);
            store(to, sum[i][half]);
        }
}

// The same for any number of rows.
INLINE void multiply_panel(index rows, index depth, const float *a, index a_row, index a_step, const float *b, float *c,
                           const float *scale)
{
    for (index n; rows > 0; rows -= n, a += n * a_row, c += n * COLUMNS) {
        // 1 or 2 rows alone would be slow
        n = rows == ROWS || rows > ROWS + 2 ? ROWS : rows > 6 ? least((rows + 1) / 2, 6) : rows;
        switch (n) {
        case 1: multiply_tile(1, depth, a, a_row, a_step, b, c, scale); break;
        case 2: multiply_tile(2, depth, a, a_row, a_step, b, c, scale); break;
        case 3: multiply_tile(3, depth, a, a_row, a_step, b, c, scale); break;
        case 4: multiply_tile(4, depth, a, a_row, a_step, b, c, scale); break;
        case 5: multiply_tile(5, depth, a, a_row, a_step, b, c, scale); break;
        case 6: multiply_tile(6, depth, a, a_row, a_step, b, c, scale); break;
        default: multiply_tile(ROWS, depth, a, a_row, a_step, b, c, scale);
        }
    }
}

// Replace scores by 2^(factor (score - the maximum so far)), as words. Update the maxima and the sums, and return in `scale`
// by what the earlier outputs must be multiplied, for each query.
static void exponentiate(index keys, float factor, float *scores, float *maxima, float *sums, float *scale)
{
    for (int half = 0; half < COLUMNS; half += LANES) {
        vec before = load(maxima + half), now = before, sum = repeat(0);
        for (index i = 0; i < keys; i++) now = maximum(load(scores + i * COLUMNS + half), now);
        for (index i = 0; i < keys; i += PAIR) {
            const float *score = scores + i * COLUMNS + half;
            vec share = exponential(load(score) - now, factor);
            sum += share;
#ifdef BFLOAT16
            vec next = i + 1 < keys ? exponential(load(score + COLUMNS) - now, factor) : repeat(0);
            sum += next;
            share = join(share, next);
#endif
            store(scores + i / PAIR * COLUMNS + half, share);
        }
        vec decay = exponential(before - now, factor);
        store(scale + half, decay);
        store(maxima + half, now);
        store(sums + half, load(sums + half) * decay + sum);
    }
}

// Load a vector of words with `count` numbers, or as many as it has room for; the rest are 0.
INLINE vec load_some(const number *p, index count)
{
    vec x = {0};
    if (count >= LANES * PAIR) memcpy(&x, p, sizeof x);
    else memcpy(&x, p, sizeof(number) * count);
    return x;
}

// Store `count` floats as numbers, or LANES if there are more.
INLINE void store_some(number *p, vec x, index count)
{
#ifdef BFLOAT16
    half rounded = narrow(x);
#else
    vec rounded = x;
#endif
    if (count >= LANES) memcpy(p, &rounded, sizeof rounded);
    else memcpy(p, &rounded, sizeof(number) * count);
}

// Transpose `count` queries into a panel, and zeros for the missing ones.
static void pack_queries(index dim, const number *q, index q_row, index count, float *panel)
{
    index words = (dim + PAIR - 1) / PAIR;
    for (index j = 0; j < words; j += LANES)
        for (int half = 0; half < COLUMNS; half += LANES) {
            vec x[LANES] = {0};
            for (int i = 0; i < LANES && half + i < count; i++)
                x[i] = load_some(q + (half + i) * q_row + j * PAIR, dim - j * PAIR);
            transpose(x);
            for (int i = 0; i < LANES && j + i < words; i++) store(panel + (j + i) * COLUMNS + half, x[i]);
        }
}

// Write `count` outputs of a panel, divided by their sums.
static void unpack_outputs(index dim, const float *panel, const float *sums, index count, number *out, index out_row)
{
    for (int half = 0; half < COLUMNS; half += LANES) {
        vec factor = 1 / load(sums + half);
        for (index j = 0; j < dim; j += LANES) {
            vec x[LANES] = {0};
            for (int i = 0; i < LANES && j + i < dim; i++) x[i] = factor * load(panel + (j + i) * COLUMNS + half);
            transpose(x);
            for (int i = 0; i < LANES && half + i < count; i++)
                store_some(out + (half + i) * out_row + j, x[i], dim - j);
        }
    }
}

// ---- a unit of work ----------------------------------------------------------------------------------------------

static void copy_keys(index rows, index dim, index words, const number *from, index from_row, float *to)
{
    for (index i = 0; i < rows; i++) {
        to[(i + 1) * words - 1] = 0;  // half of which may be left
        memcpy(to + i * words, from + i * from_row, sizeof(number) * dim);
    }
}

#ifdef BFLOAT16
INLINE half load_half(const number *p, index count)
{
    half x = {0};
    if (count >= LANES) memcpy(&x, p, sizeof x);
    else memcpy(&x, p, sizeof(number) * count);
    return x;
}
#endif

static void copy_values(index rows, index dim, const number *from, index from_row, float *to)
{
#ifdef BFLOAT16
    const number none[LANES * PAIR] = {0};
    for (index i = 0; i < rows; i += PAIR)
        for (index j = 0; j < dim; j += LANES) {
            const number *here = from + i * from_row + j;
            half a = load_half(here, dim - j), b = load_half(i + 1 < rows ? here + from_row : none, dim - j);
            vec x = (vec)(__builtin_convertvector(a, bits) | __builtin_convertvector(b, bits) << 16);
            memcpy(to + i / PAIR * dim + j, &x, 4 * least(dim - j, LANES));
        }
#else
    copy_keys(rows, dim, dim, from, from_row, to);
#endif
}

// Return the words that a thread needs: a block's keys, values and scores, and the panels' queries and outputs.
static index scratch_words(index dim, index panels) { return KEYS * (2 * dim + COLUMNS) + panels * COLUMNS * (2 * dim + 2); }

// Attend from some panels of queries of one head to all keys.
static void attend_unit(void *given, ptrdiff_t unit, int thread)
{
    const Job *job = given;
    index dim = job->dim, words = job->words, panel = COLUMNS * dim, keys = job->block;
    index head = unit / job->parts % job->heads, batch = unit / job->parts / job->heads;
    index first = unit % job->parts * job->panels * COLUMNS, count = least(job->panels * COLUMNS, job->queries - first);
    index panels = (count + COLUMNS - 1) / COLUMNS, out_row = job->heads * dim;
    float *k = job->scratch + thread * scratch_words(dim, job->panels), *v = k + KEYS * dim, *scores = v + KEYS * dim;
    float *q = scores + KEYS * COLUMNS, *out = q + panels * panel;
    float *maxima = out + panels * panel, *sums = maxima + panels * COLUMNS;

    const number *from_q = job->q.data + batch * job->q.batch + head * job->q.head + first * job->q.row;
    const number *from_k = job->k.data + batch * job->k.batch + head * job->k.head;
    const number *from_v = job->v.data + batch * job->v.batch + head * job->v.head;
    number *to = job->out + ((batch * job->queries + first) * job->heads + head) * dim;
    for (index p = 0; p < panels; p++)
        pack_queries(dim, from_q + p * COLUMNS * job->q.row, job->q.row, count - p * COLUMNS, q + p * panel);
    for (index i = 0; i < panels * COLUMNS; i++) maxima[i] = -FLT_MAX, sums[i] = 0;  // -infinity would make differences NaN
    memset(out, 0, 4 * panels * panel);
    for (index key = 0; key < job->keys; key += keys) {
        index some = least(keys, job->keys - key);
        copy_keys(some, dim, words, from_k + key * job->k.row, job->k.row, k);
        copy_values(some, dim, from_v + key * job->v.row, job->v.row, v);
        for (index p = 0; p < panels; p++) {
            float scale[COLUMNS];
            multiply_panel(some, words, k, words, 1, q + p * panel, scores, NULL);
            exponentiate(some, job->factor, scores, maxima + p * COLUMNS, sums + p * COLUMNS, scale);
            multiply_panel(dim, (some + PAIR - 1) / PAIR, v, 1, dim, scores, out + p * panel, scale);
        }
    }
    for (index p = 0; p < panels; p++)
        unpack_outputs(dim, out + p * panel, sums + p * COLUMNS, count - p * COLUMNS, to + p * COLUMNS * out_row, out_row);
    if (job->logsumexp) {
        float *sum = job->logsumexp + (batch * job->heads + head) * job->queries + first;
        for (index i = 0; i < count; i++) sum[i] = maxima[i] * job->scale + logf(sums[i]);
    }
}

// Split the queries of each of `heads` heads into units; return the panels of a unit.
static index panels_of_unit(index heads, index queries, int threads)
{
    index panels = (queries + COLUMNS - 1) / COLUMNS, parts = (panels + PANELS - 1) / PANELS;
    index wanted = (threads * UNITS_A_THREAD + heads - 1) / heads;
    parts = parts > wanted ? parts : least(wanted, panels);
    return (panels + parts - 1) / parts;
}

// Return the words that `attend` needs for itself.
ptrdiff_t attend_scratch(ptrdiff_t batch, ptrdiff_t heads, ptrdiff_t queries, ptrdiff_t dim, int threads)
{
    return threads * scratch_words(dim, panels_of_unit(batch * heads, queries, threads));
}

// Compute out (batch, queries, heads, dim), contiguous, from q (batch, heads, queries, dim) and k and v (batch, heads,
// keys, dim) of any strides but the last. strides[operand][axis] are those of q, k and v for batch, head and row. All sizes
// are positive. scratch has room for attend_scratch(batch, heads, queries, dim, threads). logsumexp (batch, heads, queries), or
// NULL: the logarithm of the sum of the exponentials of each query's scores, which a backward pass needs.
void attend(const number *q, const number *k, const number *v, number *out, float *logsumexp, float *scratch,
            const ptrdiff_t strides[3][3], ptrdiff_t batch, ptrdiff_t heads, ptrdiff_t queries, ptrdiff_t keys,
            ptrdiff_t dim, int threads)
{
    Job job = {.q = {q, strides[0][0], strides[0][1], strides[0][2]},
               .k = {k, strides[1][0], strides[1][1], strides[1][2]},
               .v = {v, strides[2][0], strides[2][1], strides[2][2]},
               .out = out, .logsumexp = logsumexp, .scratch = scratch,
               .heads = heads, .queries = queries, .keys = keys, .dim = dim, .words = (dim + PAIR - 1) / PAIR};
    index blocks = (keys + KEYS - 1) / KEYS;
    job.block = (keys + blocks * PAIR - 1) / (blocks * PAIR) * PAIR;  // of about equal size
    job.scale = (float)(1 / sqrt((double)dim));
    job.factor = (float)(1.4426950408889634 / sqrt((double)dim));
    job.panels = panels_of_unit(batch * heads, queries, threads);
    job.parts = ((queries + COLUMNS - 1) / COLUMNS + job.panels - 1) / job.panels;
    parallel(attend_unit, &job, batch * heads * job.parts, threads);
}
