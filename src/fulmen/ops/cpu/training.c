/* The passes between the matrix products of training, each tensor read and written once; see README.md.

Numbers are fp32 or bf16 in memory and fp32 in between: this file includes itself once for each. Every thread has whole
rows, so that results depend on the number of threads in `rms_norm_backward` alone.
*/

#ifndef NUMBER

#include <math.h>

#include "exp.h"
#include "numbers.h"

#define NUMBER float
#define READ read_fp32
#define WRITE write_fp32
#define NAMED(name) name##_fp32
#include "training.c"

#undef NUMBER
#undef READ
#undef WRITE
#undef NAMED
#define NUMBER bf16
#define READ read_bf16
#define WRITE write_bf16
#define NAMED(name) name##_bf16
#include "training.c"

#else

/* act [rows, f] = SiLU(gate) * up, gate_up [rows, 2 f]. */
void NAMED(swiglu)(NUMBER *restrict act, const NUMBER *gate_up, i64 rows, i64 f, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 t = 0; t < rows; t++) {
        const NUMBER *gate = gate_up + t * 2 * f, *up = gate + f;
#pragma omp simd
        for (i64 j = 0; j < f; j++) {
            float g = READ(gate + j);
            WRITE(act + t * f + j, g / (1.0f + fast_exp(-g)) * READ(up + j));
        }
    }
}

/* For rows whose answer is weights[t] * w2 act: from d_act = w2^T d_answer, before the weight, come d_gate_up,
d_weights [rows] and, for the gradient of w2, weights[t] * act. */
void NAMED(swiglu_backward)(NUMBER *restrict d_gate_up, NUMBER *restrict weighted_act, float *restrict d_weights,
                            const NUMBER *d_act, const NUMBER *gate_up, const NUMBER *weights, i64 rows, i64 f,
                            int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 t = 0; t < rows; t++) {
        const NUMBER *gate = gate_up + t * 2 * f, *up = gate + f, *grads = d_act + t * f;
        NUMBER *d_gate = d_gate_up + t * 2 * f, *d_up = d_gate + f, *act = weighted_act + t * f;
        float weight = READ(weights + t), dot = 0;
#pragma omp simd reduction(+ : dot)
        for (i64 j = 0; j < f; j++) {
            float g = READ(gate + j), u = READ(up + j), grad = READ(grads + j);
            float sigmoid = 1.0f / (1.0f + fast_exp(-g)), silu = g * sigmoid;
            dot += grad * silu * u;
            WRITE(act + j, weight * silu * u);
            grad *= weight;
            WRITE(d_gate + j, grad * u * sigmoid * (1.0f + g * (1.0f - sigmoid)));
            WRITE(d_up + j, grad * silu);
        }
        d_weights[t] = dot;
    }
}

/* y = x * inverse * w with inverse [rows] = 1 / sqrt(mean(x^2) + eps), which the backward pass takes again. */
void NAMED(rms_norm_forward)(NUMBER *restrict y, float *restrict inverse, const NUMBER *x, const float *w, i64 rows,
                             i64 size, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 t = 0; t < rows; t++) {
        const NUMBER *x_t = x + t * size;
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (i64 j = 0; j < size; j++) total += READ(x_t + j) * READ(x_t + j);
        float scale = inverse[t] = 1.0f / sqrtf(total / size + eps);
#pragma omp simd
        for (i64 j = 0; j < size; j++) WRITE(y + t * size + j, READ(x_t + j) * scale * w[j]);
    }
}

/* d_x = (w d_y - normed * mean(w d_y . normed)) * inverse; d_w [threads, size], a sum for each thread. */
void NAMED(rms_norm_backward)(NUMBER *restrict d_x, float *restrict d_w, const NUMBER *d_y, const NUMBER *x,
                              const float *inverse, const float *w, i64 rows, i64 size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int part = 0; part < threads; part++) {
        float *sums = d_w + part * size;
        memset(sums, 0, size * sizeof *sums);
        for (i64 t = rows * part / threads; t < rows * (part + 1) / threads; t++) {
            const NUMBER *x_t = x + t * size, *d_t = d_y + t * size;
            float scale = inverse[t], share = 0;
#pragma omp simd reduction(+ : share)
            for (i64 j = 0; j < size; j++) {
                float along = READ(d_t + j) * READ(x_t + j) * scale;
                sums[j] += along;
                share += along * w[j];
            }
            share /= size;
#pragma omp simd
            for (i64 j = 0; j < size; j++)
                WRITE(d_x + t * size + j, (READ(d_t + j) * w[j] - READ(x_t + j) * scale * share) * scale);
        }
    }
}

/* Scores [heads, n, n] become probabilities in place: row i of a head is softmax(scale * scores) over columns 0..i. */
void NAMED(causal_softmax)(NUMBER *restrict scores, i64 heads, i64 n, float scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 t = 0; t < heads * n; t++) {
        NUMBER *row = scores + t * n;
        i64 seen = t % n + 1;
        float highest = -INFINITY, total = 0;
#pragma omp simd reduction(max : highest)
        for (i64 j = 0; j < seen; j++) highest = READ(row + j) > highest ? READ(row + j) : highest;
#pragma omp simd reduction(+ : total)
        for (i64 j = 0; j < seen; j++) total += fast_exp(scale * (READ(row + j) - highest));
#pragma omp simd
        for (i64 j = 0; j < seen; j++) WRITE(row + j, fast_exp(scale * (READ(row + j) - highest)) / total);
        memset(row + seen, 0, (n - seen) * sizeof *row);
    }
}

/* d_probs [heads, n, n] become d_scores in place: scale * probs * (d_probs - sum(probs * d_probs)). */
void NAMED(causal_softmax_backward)(NUMBER *restrict d_probs, const NUMBER *probs, i64 heads, i64 n, float scale,
                                    int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 t = 0; t < heads * n; t++) {
        NUMBER *row = d_probs + t * n;
        const NUMBER *p = probs + t * n;
        i64 seen = t % n + 1;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (i64 j = 0; j < seen; j++) dot += READ(row + j) * READ(p + j);
#pragma omp simd
        for (i64 j = 0; j < seen; j++) WRITE(row + j, scale * READ(p + j) * (READ(row + j) - dot));
        memset(row + seen, 0, (n - seen) * sizeof *row);
    }
}

/* nll [rows] = -log softmax(logits)[target]; the logits [rows, n] become softmax - onehot(target), their gradient.
A row whose target is `ignore` has neither. */
void NAMED(cross_entropy)(NUMBER *restrict logits, float *restrict nll, const i64 *targets, i64 rows, i64 n, i64 ignore,
                          int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 t = 0; t < rows; t++) {
        NUMBER *row = logits + t * n;
        if (targets[t] == ignore) {
            memset(row, 0, n * sizeof *row);
            nll[t] = 0;
            continue;
        }
        float highest = -INFINITY, total = 0, at_target = READ(row + targets[t]);
#pragma omp simd reduction(max : highest)
        for (i64 j = 0; j < n; j++) highest = READ(row + j) > highest ? READ(row + j) : highest;
#pragma omp simd reduction(+ : total)
        for (i64 j = 0; j < n; j++) total += fast_exp(READ(row + j) - highest);
        nll[t] = (highest - at_target) + logf(total);
#pragma omp simd
        for (i64 j = 0; j < n; j++) WRITE(row + j, fast_exp(READ(row + j) - highest) / total);
        WRITE(row + targets[t], fast_exp(at_target - highest) / total - 1.0f);
    }
}

/* out[b] = state, then state = decays[b] state + inflows[b], over the blocks of each piece, backwards if asked.

inflows and out [g, heads, size]; the state of a piece is entering [m, heads, size] at first and ending at last; decays
[g, heads]; piece i has the blocks starts[i] .. starts[i + 1] - 1. */
void NAMED(scan_states)(NUMBER *restrict out, float *restrict ending, const NUMBER *inflows, const float *entering,
                        const float *decays, const i64 *starts, i64 pieces, i64 heads, i64 size, int backwards,
                        int threads) {
    i64 width = 1024, parts = (size + width - 1) / width;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 task = 0; task < pieces * heads * parts; task++) {
        i64 piece = task / parts / heads, head = task / parts % heads, from = task % parts * width;
        i64 count = size - from < width ? size - from : width, first = starts[piece], last = starts[piece + 1] - 1;
        float *state = ending + (piece * heads + head) * size + from;
        memcpy(state, entering + (piece * heads + head) * size + from, count * sizeof *state);
        for (i64 step = 0; step <= last - first; step++) {
            i64 row = (backwards ? last - step : first + step) * heads + head;
            float decay = decays[row];
            const NUMBER *inflow = inflows + row * size + from;
            NUMBER *written = out + row * size + from;
#pragma omp simd
            for (i64 i = 0; i < count; i++) {
                WRITE(written + i, state[i]);
                state[i] = decay * state[i] + READ(inflow + i);
            }
        }
    }
}

#endif
