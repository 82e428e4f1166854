/* Products, norm, routing and the lightning step for a few tokens, fp32; see README.md.

Rows of weights are spread over the threads and each is read once, whatever the number of tokens. Every number is summed
in an order that no thread count changes. NaN and infinity go the way that IEEE gives them: no -ffast-math.
*/

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "exp.h"

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
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float quad __attribute__((vector_size(16)));
typedef int64_t i64;

INLINE i64 min(i64 a, i64 b) { return a < b ? a : b; }

/* Into a register: gcc would read the same numbers anew for every product, which takes as long as the product. */
INLINE vec load(const float *p) {
    vec value = *(const vec_unaligned *)p;
#ifdef __x86_64__
    __asm__("" : "+v"(value));
#endif
    return value;
}

INLINE float sum(vec v) {
    quad parts[LANES / 4];
    memcpy(parts, &v, sizeof v);
    quad total = parts[0];
    for (int i = 1; i < LANES / 4; i++) total += parts[i];
    return (total[0] + total[1]) + (total[2] + total[3]);
}

INLINE float silu(float x) { return x / (1.0f + fast_exp(-x)); }

/* out[c][r] = w[r] . x[c].

The processor's own prefetch starts anew with every page of 4 KiB, so the rows to come are asked for here,
into the second cache: the first has no room for them. */
INLINE void tile(const float *const w[ROWS], const float *const x[COLS], i64 k, float out[][ROWS]) {
    vec sums[COLS][ROWS] = {0};
    i64 i = 0;
    for (; i + LANES <= k; i += LANES) {
        vec rows[ROWS];
        for (int r = 0; r < ROWS; r++) {
            rows[r] = load(w[r] + i);
            __builtin_prefetch(w[r] + i + AHEAD, 0, 2);
        }
        for (int c = 0; c < COLS; c++) {
            vec column = load(x[c] + i);
            for (int r = 0; r < ROWS; r++) sums[c][r] += rows[r] * column;
        }
    }
#pragma GCC unroll 4
    for (int c = 0; c < COLS; c++)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) out[c][r] = sum(sums[c][r]);
    if (i == k) return;
    for (int c = 0; c < COLS; c++)
        for (int r = 0; r < ROWS; r++)
            for (i64 rest = i; rest < k; rest++) out[c][r] += w[r][rest] * x[c][rest];
}

/* out[r] = w[r] . x for a single token, summed in the order of `tile`, so that a token's numbers do not depend on its
company. Row after row: here the weights are all that is read, and one stream is what the processor's prefetch likes. */
INLINE void single(const float *const w[ROWS], const float *x, i64 k, float out[ROWS]) {
    for (int r = 0; r < ROWS; r++) {
        vec sums = {0};
        i64 i = 0;
        for (; i + LANES <= k; i += LANES) sums += load(w[r] + i) * load(x + i);
        out[r] = sum(sums);
        for (; i < k; i++) out[r] += w[r][i] * x[i];
    }
}

/* out[c][r] = w[j + r] . x[c] for `count` <= FEW tokens. Past the last row or token the last one stands in, unused. */
static void products(const float *w, i64 n, i64 j, const float *const *x, i64 count, i64 k, float out[FEW][ROWS]) {
    const float *rows[ROWS], *columns[COLS];
    for (int r = 0; r < ROWS; r++) rows[r] = w + min(j + r, n - 1) * k;
    i64 c = 0;
    for (; c + 1 < count; c += COLS) {
        for (int i = 0; i < COLS; i++) columns[i] = x[min(c + i, count - 1)];
        tile(rows, columns, k, out + c);
    }
    if (c < count) single(rows, x[c], k, out[c]);
}

/* y [rows, n] = x [rows, k] w^T, w [n, k], rows <= FEW. */
void linear(float *y, const float *x, const float *w, i64 rows, i64 n, i64 k, int threads) {
    const float *tokens[FEW];
    for (i64 t = 0; t < rows; t++) tokens[t] = x + t * k;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 j = 0; j < n; j += ROWS) {
        float out[FEW][ROWS];
        products(w, n, j, tokens, rows, k, out);
        for (i64 t = 0; t < rows; t++)
            for (i64 r = 0; r < min(ROWS, n - j); r++) y[t * n + j + r] = out[t][r];
    }
}

/* y [rows, size] = x / sqrt(mean(x^2) + eps) * w. */
void rms_norm(float *y, const float *x, const float *w, i64 rows, i64 size, float eps) {
    for (i64 t = 0; t < rows; t++, x += size, y += size) {
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
        for (i = 0; i < size; i++) y[i] = x[i] * inverse * w[i];
    }
}

/* Softmax of logits [rows, n], its k largest of each row, best first, renormalised; choices per column in `counts`. */
void route(i64 *experts, float *weights, float *probs, i64 *counts, const float *logits, i64 rows, i64 n, i64 k) {
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

/* out [tokens, d] = sum over a token's k choices of weight * w2 (SiLU(w1 x) * (w3 x)); act [tokens * k, f] is scratch.

A thread has the same rows of w2 for all experts, so that it alone adds to its part of `out`. */
void experts_mlp(float *out, float *act, const float *x, const float *w13, const float *w2, const i64 *experts,
                 const float *weights, i64 tokens, i64 k, i64 num_experts, i64 d, i64 f, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const float *inputs[FEW];
        i64 choices[FEW], count;
        float gate[FEW][ROWS], up[FEW][ROWS];
        for (i64 e = 0; e < num_experts; e++)
            for (i64 from = 0; (count = next_choices(experts, tokens * k, e, &from, choices));) {
                const float *w1 = w13 + e * 2 * f * d, *w3 = w1 + f * d;
                for (i64 c = 0; c < count; c++) inputs[c] = x + choices[c] / k * d;
#pragma omp for schedule(static) nowait
                for (i64 j = 0; j < f; j += ROWS) {
                    products(w1, f, j, inputs, count, d, gate);
                    products(w3, f, j, inputs, count, d, up);
                    for (i64 c = 0; c < count; c++)
                        for (i64 r = 0; r < min(ROWS, f - j); r++)
                            act[choices[c] * f + j + r] = silu(gate[c][r]) * up[c][r];
                }
            }
#pragma omp for schedule(static)
        for (i64 i = 0; i < tokens * d; i++) out[i] = 0;
        for (i64 e = 0; e < num_experts; e++)
            for (i64 from = 0; (count = next_choices(experts, tokens * k, e, &from, choices));) {
                for (i64 c = 0; c < count; c++) inputs[c] = act + choices[c] * f;
#pragma omp for schedule(static) nowait
                for (i64 j = 0; j < d; j += ROWS) {
                    products(w2 + e * d * f, d, j, inputs, count, f, up);
                    for (i64 c = 0; c < count; c++)
                        for (i64 r = 0; r < min(ROWS, d - j); r++)
                            out[choices[c] / k * d + j + r] += weights[choices[c]] * up[c][r];
                }
            }
    }
}

/* next [B, H, K, V] = exp(-rate) state + k v^T and out [B, H, V] = q^T next; state may be NULL for zeros.

q, k and v share the strides of a sequence and of a head. */
void lightning_step(float *out, float *next, const float *q, const float *k, const float *v, const float *rates,
                    const float *state, i64 batch, i64 heads, i64 key_dim, i64 value_dim, i64 batch_stride,
                    i64 head_stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 head = 0; head < batch * heads; head++) {
        i64 place = head / heads * batch_stride + head % heads * head_stride, size = key_dim * value_dim;
        const float *q_h = q + place, *k_h = k + place, *v_h = v + place;
        const float *old = state ? state + head * size : NULL;
        float *restrict new = next + head * size, *restrict o = out + head * value_dim;
        float decay = expf(-rates[head % heads]);
        memset(o, 0, value_dim * sizeof *o);
        for (i64 i = 0; i < key_dim; i++)
            for (i64 j = 0; j < value_dim; j++) {
                float updated = k_h[i] * v_h[j];
                if (old) updated += decay * old[i * value_dim + j];
                new[i * value_dim + j] = updated;
                o[j] += q_h[i] * updated;
            }
    }
}
