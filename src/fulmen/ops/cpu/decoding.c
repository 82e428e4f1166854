/* The operations of `fulmen.ops` for a few tokens; see README.md and decoding.h. */

#include "decoding.h"

void linear_fp32(float *y, const float *x, const float *w, i64 rows, i64 n, i64 k, int threads) {
#pragma omp parallel num_threads(threads)
    share_product_fp32(y, x, w, NULL, rows, n, k, NOTHING, (struct residual){0});
}

void linear_bf16(float *y, const float *x, const bf16 *w, i64 rows, i64 n, i64 k, int threads) {
#pragma omp parallel num_threads(threads)
    share_product_bf16(y, x, w, NULL, rows, n, k, NOTHING, (struct residual){0});
}

void linear_int8(float *y, const float *x, const int8_t *w, const float *scales, i64 rows, i64 n, i64 k, int threads) {
#pragma omp parallel num_threads(threads)
    share_product_int8(y, x, w, scales, rows, n, k, NOTHING, (struct residual){0});
}

void rms_norm(float *y, const float *x, const float *w, i64 rows, i64 size, float eps) {
    for (i64 t = 0; t < rows; t++) norm_row_fp32(y + t * size, x + t * size, w, size, eps);
}

void route(i64 *experts, float *weights, float *probs, i64 *counts, const float *logits, i64 rows, i64 n, i64 k) {
    choose(experts, weights, probs, counts, logits, rows, n, k);
}

void experts_mlp_fp32(float *out, float *act, const float *x, const float *w13, const float *w2, const i64 *experts,
                      const float *weights, i64 tokens, i64 k, i64 num_experts, i64 d, i64 f, int threads) {
#pragma omp parallel num_threads(threads)
    share_experts_fp32(out, act, x, w13, NULL, w2, NULL, experts, weights, tokens, k, num_experts, d, f, NULL);
}

void experts_mlp_int8(float *out, float *act, const float *x, const int8_t *w13, const float *s13, const int8_t *w2,
                      const float *s2, const i64 *experts, const float *weights, i64 tokens, i64 k, i64 num_experts,
                      i64 d, i64 f, int threads) {
#pragma omp parallel num_threads(threads)
    share_experts_int8(out, act, x, w13, s13, w2, s2, experts, weights, tokens, k, num_experts, d, f, NULL);
}

/* The state [B, H, K, V] is changed in place. */
void lightning_step(float *out, float *state, const float *q, const float *k, const float *v, const float *rates,
                    i64 batch, i64 heads, i64 key_dim, i64 value_dim, i64 batch_stride, i64 head_stride, int threads) {
#pragma omp parallel num_threads(threads)
    share_step(out, state, q, k, v, rates, NULL, batch, heads, key_dim, value_dim, batch_stride, head_stride);
}
