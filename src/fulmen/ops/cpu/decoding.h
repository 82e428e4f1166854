/* What `decoding.c` and `step.c` are made of: products with weights that are read once, norm, routing, the lightning step.

Activations are fp32 and weights fp32, bf16 or int8, whose rows have a scale each: this file includes itself once for
each. Rows of weights are spread over the threads and each is read once, whatever the number of tokens. Every number is summed in an order that no thread
count and no other token changes. NaN and infinity go the way that IEEE gives them: no -ffast-math.

A function named share_... is called by all threads of a parallel region and divides its work among them. Only where
its comment says so do they wait for each other at its end.
*/

#ifndef NUMBER

#include <math.h>

#ifdef __AVX__
#include <immintrin.h>
#endif

#include "exp.h"
#include "numbers.h"

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

/* A tile of ROWS x COLS sums has to fit the vector registers: 32 of them, but 16 with AVX2. */
#define ROWS 4
#if LANES == 8
#define COLS 2
#else
#define COLS 4
#endif

#define FEW 64
#define AHEAD 2048

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float quad __attribute__((vector_size(16)));
typedef bf16 half_vec __attribute__((vector_size(2 * LANES)));
typedef uint32_t bits_vec __attribute__((vector_size(4 * LANES)));

INLINE i64 min(i64 a, i64 b) { return a < b ? a : b; }

/* Into a register: gcc would read the same numbers anew for every product, which takes as long as the product. */
INLINE vec load(const float *p) {
    vec value = *(const vec_unaligned *)p;
#ifdef __x86_64__
    __asm__("" : "+v"(value));
#endif
    return value;
}

INLINE vec load_bf16(const bf16 *p) {
    half_vec halves;
    memcpy(&halves, p, sizeof halves);
    return (vec)(__builtin_convertvector(halves, bits_vec) << 16);
}

/* Left to itself, gcc 12 takes the bytes one by one. */
INLINE vec load_int8(const int8_t *p) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    float numbers[LANES];
    for (int i = 0; i < LANES; i++) numbers[i] = p[i];
    return load(numbers);
#endif
}

/* a * b + sum. Left to itself, gcc rounds the product in some loops (where it holds chains of FMA for slow) and not in
others, and a number would depend on which loop it came from. */
INLINE vec multiply_add(vec a, vec b, vec sum) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX__) && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

/* The first n < LANES numbers and zeros: what is left over goes the way of all others, or the compiler might round it
in another way here than there. */
INLINE vec load_part(const float *p, i64 n) {
    float numbers[LANES] = {0};
    memcpy(numbers, p, n * sizeof *p);
    return load(numbers);
}

INLINE vec load_part_bf16(const bf16 *p, i64 n) {
    bf16 numbers[LANES] = {0};
    memcpy(numbers, p, n * sizeof *p);
    return load_bf16(numbers);
}

INLINE vec load_part_int8(const int8_t *p, i64 n) {
    int8_t numbers[LANES] = {0};
    memcpy(numbers, p, n * sizeof *p);
    return load_int8(numbers);
}

INLINE float sum(vec v) {
    quad parts[LANES / 4];
    memcpy(parts, &v, sizeof v);
    quad total = parts[0];
    for (int i = 1; i < LANES / 4; i++) total += parts[i];
    return (total[0] + total[1]) + (total[2] + total[3]);
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }
INLINE float silu(float x) { return x / (1.0f + fast_exp(-x)); }

/* alpha * normed + beta * branch, the sum that every sub-layer ends with. */
struct residual {
    const float *normed;
    float alpha, beta;
};

enum after { NOTHING, SILU, SIGMOID, RESIDUAL };

/* Softmax of logits [rows, n], its k largest of each row, best first, renormalised; choices per column in `counts`. */
static void choose(i64 *experts, float *weights, float *probs, i64 *counts, const float *logits, i64 rows, i64 n,
                   i64 k) {
    memset(counts, 0, n * sizeof *counts);
    for (i64 t = 0; t < rows; t++, logits += n, probs += n, experts += k, weights += k) {
        float largest = logits[0], total = 0, chosen = 0;
        for (i64 e = 1; e < n; e++) largest = logits[e] > largest ? logits[e] : largest;
        for (i64 e = 0; e < n; e++) total += probs[e] = fast_exp(logits[e] - largest);
        for (i64 e = 0; e < n; e++) probs[e] /= total;
        for (i64 slot = 0; slot < k; slot++) {
            i64 best = -1;
            for (i64 e = 0; e < n; e++) {
                int taken = 0;
                for (i64 s = 0; s < slot; s++) taken |= experts[s] == e;
                if (!taken && (best < 0 || probs[e] > probs[best])) best = e;
            }
            experts[slot] = best;
            chosen += weights[slot] = probs[best];
            counts[best]++;
        }
        for (i64 slot = 0; slot < k; slot++) weights[slot] /= chosen;
    }
}

/* The next choices of an expert, from `*from` on and at most FEW, as token * k + slot. */
static i64 next_choices(const i64 *experts, i64 total, i64 expert, i64 *from, i64 choices[FEW]) {
    i64 count = 0;
    for (; *from < total && count < FEW; ++*from)
        if (experts[*from] == expert) choices[count++] = *from;
    return count;
}

/* state = exp(-rate) state + k v^T and out [B, H, V] = q^T state, of each sequence the states [H, K, V] of its slot.

q, k and v share the strides of a sequence and of a head; slots may be NULL for 0, 1, 2... The threads wait for each
other. */
static void share_step(float *out, float *states, const float *q, const float *k, const float *v, const float *rates,
                       const int32_t *slots, i64 batch, i64 heads, i64 key_dim, i64 value_dim, i64 batch_stride,
                       i64 head_stride) {
#pragma omp for schedule(static)
    for (i64 head = 0; head < batch * heads; head++) {
        i64 b = head / heads, h = head % heads, place = b * batch_stride + h * head_stride;
        const float *q_h = q + place, *k_h = k + place, *v_h = v + place;
        float *restrict state = states + ((slots ? slots[b] : b) * heads + h) * key_dim * value_dim;
        float *restrict o = out + head * value_dim;
        float decay = expf(-rates[h]);
        memset(o, 0, value_dim * sizeof *o);
        for (i64 i = 0; i < key_dim; i++)
            for (i64 j = 0; j < value_dim; j++) {
                float updated = decay * state[i * value_dim + j] + k_h[i] * v_h[j];
                state[i * value_dim + j] = updated;
                o[j] += q_h[i] * updated;
            }
    }
}

#define NUMBER float
#define READ read_fp32
#define WRITE write_fp32
#define LOAD load
#define LOAD_PART load_part
#define NAMED(name) name##_fp32
#include "decoding.h"

#undef NUMBER
#undef READ
#undef WRITE
#undef LOAD
#undef LOAD_PART
#undef NAMED
#define NUMBER bf16
#define READ read_bf16
#define WRITE write_bf16
#define LOAD load_bf16
#define LOAD_PART load_part_bf16
#define NAMED(name) name##_bf16
#include "decoding.h"

#undef NUMBER
#undef READ
#undef WRITE
#undef LOAD
#undef LOAD_PART
#undef NAMED
#define NUMBER int8_t
#define READ read_int8
#define LOAD load_int8
#define LOAD_PART load_part_int8
#define NAMED(name) name##_int8
#include "decoding.h"

#undef NUMBER
#undef READ
#undef LOAD
#undef LOAD_PART
#undef NAMED

#else

/* out[c][r] = w[r] . x[c].

The processor's own prefetch starts anew with every page of 4 KiB, so the rows to come are asked for here,
into the second cache: the first has no room for them. */
INLINE void NAMED(tile)(const NUMBER *const w[ROWS], const float *const x[COLS], i64 k, float out[][ROWS]) {
    vec sums[COLS][ROWS] = {0};
    i64 i = 0;
    for (; i + LANES <= k; i += LANES) {
        vec rows[ROWS];
        for (int r = 0; r < ROWS; r++) {
            rows[r] = LOAD(w[r] + i);
            __builtin_prefetch(w[r] + i + AHEAD, 0, 2);
        }
        for (int c = 0; c < COLS; c++) {
            vec column = load(x[c] + i);
            for (int r = 0; r < ROWS; r++) sums[c][r] = multiply_add(rows[r], column, sums[c][r]);
        }
    }
    if (i < k)
        for (int r = 0; r < ROWS; r++) {
            vec row = LOAD_PART(w[r] + i, k - i);
            for (int c = 0; c < COLS; c++) sums[c][r] = multiply_add(row, load_part(x[c] + i, k - i), sums[c][r]);
        }
#pragma GCC unroll 4
    for (int c = 0; c < COLS; c++)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) out[c][r] = sum(sums[c][r]);
}

/* w . x, summed in the order of `tile`, so that a token's numbers do not depend on its company. */
INLINE float NAMED(dot)(const NUMBER *w, const float *x, i64 k) {
    vec sums = {0};
    i64 i = 0;
    for (; i + LANES <= k; i += LANES) sums = multiply_add(LOAD(w + i), load(x + i), sums);
    if (i < k) sums = multiply_add(LOAD_PART(w + i, k - i), load_part(x + i, k - i), sums);
    return sum(sums);
}

/* out[c][r] = scales[j + r] (NULL: 1) * w[j + r] . x[c] for `count` <= FEW tokens. Past the last row or token the last
one stands in, unused. */
static void NAMED(products)(const NUMBER *w, const float *scales, i64 n, i64 j, const float *const *x, i64 count, i64 k,
                            float out[FEW][ROWS]) {
    const NUMBER *rows[ROWS];
    const float *columns[COLS];
    for (int r = 0; r < ROWS; r++) rows[r] = w + min(j + r, n - 1) * k;
    i64 c = 0;
    for (; c + 1 < count; c += COLS) {
        for (int i = 0; i < COLS; i++) columns[i] = x[min(c + i, count - 1)];
        NAMED(tile)(rows, columns, k, out + c);
    }
    /* Row after row for a single one: the weights are all that is read, and one stream is what a prefetch likes. */
    if (c < count)
        for (int r = 0; r < ROWS; r++) out[c][r] = NAMED(dot)(rows[r], x[c], k);
    if (!scales) return;
    for (c = 0; c < count; c++)
        for (int r = 0; r < ROWS; r++) out[c][r] *= scales[min(j + r, n - 1)];
}

/* y [rows, n] = x [rows, k] w^T, w [n, k] times its scales [n], rows <= FEW, then SiLU, the sigmoid or the residual. */
INLINE void NAMED(share_product)(float *y, const float *x, const NUMBER *w, const float *scales, i64 rows, i64 n, i64 k,
                                 enum after after, struct residual residual) {
    const float *tokens[FEW];
    for (i64 t = 0; t < rows; t++) tokens[t] = x + t * k;
#pragma omp for schedule(static) nowait
    for (i64 j = 0; j < n; j += ROWS) {
        float out[FEW][ROWS];
        NAMED(products)(w, scales, n, j, tokens, rows, k, out);
        for (i64 t = 0; t < rows; t++)
            for (i64 r = 0; r < min(ROWS, n - j); r++) {
                i64 place = t * n + j + r;
                float value = out[t][r];
                if (after == SILU) value = silu(value);
                if (after == SIGMOID) value = sigmoid(value);
                if (after == RESIDUAL) value = residual.alpha * residual.normed[place] + residual.beta * value;
                y[place] = value;
            }
    }
}

/* y [size] = x / sqrt(mean(x^2) + eps) * w. */
static void NAMED(norm_row)(float *y, const float *x, const NUMBER *w, i64 size, float eps) {
    vec squares[4] = {0};
    i64 i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES)
        for (int part = 0; part < 4; part++) {
            vec values = load(x + i + part * LANES);
            squares[part] += values * values;
        }
    float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < size; i++) total += x[i] * x[i];
    float inverse = 1.0f / sqrtf(total / size + eps);
    for (i = 0; i < size; i++) y[i] = x[i] * inverse * READ(w + i);
}

/* The norm of all rows, times `gate` where there is one; the threads wait for each other. */
static void NAMED(share_norm)(float *y, const float *x, const NUMBER *w, const float *gate, i64 rows, i64 size, float eps) {
#pragma omp for schedule(static)
    for (i64 t = 0; t < rows; t++) {
        NAMED(norm_row)(y + t * size, x + t * size, w, size, eps);
        if (!gate) continue;
        for (i64 i = t * size; i < (t + 1) * size; i++) y[i] *= gate[i];
    }
}

/* out [tokens, d] = the residual (NULL: zero) plus, summed over a token's k choices, weight * w2 (SiLU(w1 x) * (w3 x)).

s13 [num_experts, 2 f] and s2 [num_experts, d] are the scales of rows, or NULL. act [tokens * k, f] is scratch. A thread has the same rows of w2 for all experts, so that it alone adds to its part of
`out`. */
static void NAMED(share_experts)(float *out, float *act, const float *x, const NUMBER *w13, const float *s13,
                                 const NUMBER *w2, const float *s2, const i64 *experts, const float *weights,
                                 i64 tokens, i64 k, i64 num_experts, i64 d, i64 f, const struct residual *residual) {
    const float *inputs[FEW];
    i64 choices[FEW], count;
    float gate[FEW][ROWS], up[FEW][ROWS], beta = residual ? residual->beta : 1;
    for (i64 e = 0; e < num_experts; e++)
        for (i64 from = 0; (count = next_choices(experts, tokens * k, e, &from, choices));) {
            const NUMBER *w1 = w13 + e * 2 * f * d, *w3 = w1 + f * d;
            const float *s1 = s13 ? s13 + e * 2 * f : NULL, *s3 = s13 ? s1 + f : NULL;
            for (i64 c = 0; c < count; c++) inputs[c] = x + choices[c] / k * d;
#pragma omp for schedule(static) nowait
            for (i64 j = 0; j < f; j += ROWS) {
                NAMED(products)(w1, s1, f, j, inputs, count, d, gate);
                NAMED(products)(w3, s3, f, j, inputs, count, d, up);
                for (i64 c = 0; c < count; c++)
                    for (i64 r = 0; r < min(ROWS, f - j); r++)
                        act[choices[c] * f + j + r] = silu(gate[c][r]) * up[c][r];
            }
        }
#pragma omp for schedule(static)
    for (i64 i = 0; i < tokens * d; i++) out[i] = residual ? residual->alpha * residual->normed[i] : 0;
    for (i64 e = 0; e < num_experts; e++)
        for (i64 from = 0; (count = next_choices(experts, tokens * k, e, &from, choices));) {
            for (i64 c = 0; c < count; c++) inputs[c] = act + choices[c] * f;
#pragma omp for schedule(static) nowait
            for (i64 j = 0; j < d; j += ROWS) {
                NAMED(products)(w2 + e * d * f, s2 ? s2 + e * d : NULL, d, j, inputs, count, f, up);
                for (i64 c = 0; c < count; c++)
                    for (i64 r = 0; r < min(ROWS, d - j); r++)
                        out[choices[c] / k * d + j + r] += beta * weights[choices[c]] * up[c][r];
            }
        }
}

#endif
