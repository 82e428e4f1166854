/* All layers of the text model for one token of each of a few sequences, in one call; see README.md and decoding.h.

The mathematics is that of fulmen/model: decoder.py, lightning.py, softmax.py, moe.py. step.py has the same structs.
*/

#ifndef STEP_ONCE
#define STEP_ONCE

#include "decoding.h"

struct shape {
    i64 batch, hidden, heads, kv_heads, dim, rotary, num_experts, k, expert_size, threads;
};

/* What differs from layer to layer. The attention of a lightning layer has rates, that of a softmax layer has none. */
struct layer {
    /* weights, fp32 or bf16: w_q is q, k and v packed head by head in a lightning layer */
    const void *w_before, *w_q, *w_k, *w_v, *w_gate, *w_norm, *w_out, *w_after, *w_router, *w13, *w2;
    /* where matrices, but for the router, are int8: the scales of their rows */
    const float *s_q, *s_k, *s_v, *s_gate, *s_out, *s13, *s2;
    const float *rates;
    /* what sequences left behind: states in fp32; keys and values [pages, page_size, kv_heads, dim] like the norms */
    float *state;
    void *keys, *values;
    i64 page_size;
    /* where the tokens go, as `choose` gives it */
    i64 *experts;
    float *weights, *probs;
    i64 *counts;
    float eps_before, eps_norm, eps_after, mixer_alpha, mixer_beta, mlp_alpha, mlp_beta;
};

/* Where each sequence of the batch is in the memories of all layers; see step.py. Without tables, slots are pages. */
struct places {
    const int32_t *slots, *positions, *begins, *tables;
};

/* The pages of a sequence's tokens. */
INLINE const int32_t *table_of(const struct places *p, i64 b) {
    return p->tables ? p->tables + p->begins[b] : p->slots + b;
}

/* Tensors of one layer that the next one overwrites. */
struct scratch {
    float *normed, *h, *qkv, *gate, *attended, *logits, *act;
};

/* Keys at a time, and queries that read them. */
#define KEYS 64
#define GROUP 8

/* Rotate the pairs (i, i + rotary / 2) of each head by position * frequencies[i]. */
static void rotate(float *x, i64 heads, i64 dim, i64 rotary, const float *frequencies, float position) {
    for (i64 i = 0; i < rotary / 2; i++) {
        float cosine = cosf(position * frequencies[i]), sine = sinf(position * frequencies[i]);
        for (float *head = x; head < x + heads * dim; head += dim) {
            float first = head[i], second = head[i + rotary / 2];
            head[i] = first * cosine - second * sine;
            head[i + rotary / 2] = second * cosine + first * sine;
        }
    }
}

/* Floats that `step` needs as scratch. */
i64 step_scratch(const struct shape *s) {
    i64 inner = s->heads * s->dim;
    return s->batch * (3 * s->hidden + 5 * inner + s->num_experts + s->k * s->expert_size);
}

/* NAMED gives the parts of decoding.h for NUMBER, MATRIX those for the matrices, STEP what is made of both. */
#define NUMBER float
#define READ read_fp32
#define WRITE write_fp32
#define LOAD load
#define LOAD_PART load_part
#define NAMED(name) name##_fp32
#define MATRIX(name) name##_fp32
#define STEP(name) name##_fp32
#include "step.c"

#undef MATRIX
#undef STEP
#define MATRIX(name) name##_int8
#define STEP(name) name##_int8
#include "step.c"

#undef NUMBER
#undef READ
#undef WRITE
#undef LOAD
#undef LOAD_PART
#undef NAMED
#undef MATRIX
#undef STEP
#define NUMBER bf16
#define READ read_bf16
#define WRITE write_bf16
#define LOAD load_bf16
#define LOAD_PART load_part_bf16
#define NAMED(name) name##_bf16
#define MATRIX(name) name##_bf16
#define STEP(name) name##_bf16
#include "step.c"

#else

static void STEP(share_lightning)(struct scratch t, const struct shape *s, const struct layer *l,
                                   const struct places *p) {
    i64 inner = s->heads * s->dim;
    struct residual none = {0};
    MATRIX(share_product)(t.qkv, t.normed, l->w_q, l->s_q, s->batch, 3 * inner, s->hidden, SILU, none);
    MATRIX(share_product)(t.gate, t.normed, l->w_gate, l->s_gate, s->batch, inner, s->hidden, SIGMOID, none);
#pragma omp barrier
    share_step(t.attended, l->state, t.qkv, t.qkv + s->dim, t.qkv + 2 * s->dim, l->rates, p->slots, s->batch, s->heads,
               s->dim, s->dim, 3 * inner, 3 * s->dim);
    NAMED(share_norm)(t.qkv, t.attended, l->w_norm, t.gate, s->batch, inner, l->eps_norm);
}

/* scores[t] = scale * (q . the key in row rows[t]), four at a time: one alone would wait for each of its sums. */
INLINE void STEP(score)(float *scores, const float *q, const NUMBER *keys, const i64 *rows, i64 count, i64 dim) {
    float scale = 1.0f / sqrtf(dim);
    i64 t = 0, whole = dim / LANES * LANES;
    for (; t + 4 <= count; t += 4) {
        vec sums[4] = {0};
        for (i64 i = 0; i < whole; i += LANES)
            for (int r = 0; r < 4; r++) sums[r] = multiply_add(LOAD(keys + rows[t + r] + i), load(q + i), sums[r]);
        for (int r = 0; r < 4; r++) {
            if (whole < dim)
                sums[r] = multiply_add(LOAD_PART(keys + rows[t + r] + whole, dim - whole),
                                       load_part(q + whole, dim - whole), sums[r]);
            scores[t + r] = sum(sums[r]) * scale;
        }
    }
    for (; t < count; t++) scores[t] = NAMED(dot)(keys + rows[t], q, dim) * scale;
}

/* out = fade * out + the sum of weights[t] * the value in row rows[t], of `wide` * LANES dims, which stay in registers. */
INLINE void STEP(blend_part)(float *out, float fade, const float *weights, const NUMBER *values, const i64 *rows,
                              i64 count, int wide) {
    vec sums[4];
    for (int r = 0; r < wide; r++) sums[r] = load(out + r * LANES) * fade;
    for (i64 t = 0; t < count; t++) {
        vec weight = (vec){0} + weights[t];
        for (int r = 0; r < wide; r++) sums[r] = multiply_add(LOAD(values + rows[t] + r * LANES), weight, sums[r]);
    }
    memcpy(out, sums, wide * sizeof *sums);
}

INLINE void STEP(blend)(float *out, float fade, const float *weights, const NUMBER *values, const i64 *rows,
                         i64 count, i64 dim) {
    i64 i = 0;
    for (; i + 4 * LANES <= dim; i += 4 * LANES)
        STEP(blend_part)(out + i, fade, weights, values + i, rows, count, 4);
    for (; i + LANES <= dim; i += LANES) STEP(blend_part)(out + i, fade, weights, values + i, rows, count, 1);
    for (; i < dim; i++) {
        float total = fade * out[i];
        for (i64 t = 0; t < count; t++) total += weights[t] * READ(values + rows[t] + i);
        out[i] = total;
    }
}

/* out [n, dim] = softmax(q . keys / sqrt(dim)) values for n <= GROUP queries that share a key head, over `count` tokens
in the pages of a table, whose rows are `stride` numbers apart. KEYS tokens at a time, which all queries find in the
cache; the numbers do not depend on the size of a page. */
static void STEP(attend)(float *out, const float *q, i64 n, const NUMBER *keys, const NUMBER *values,
                          const int32_t *table, i64 page_size, i64 count, i64 stride, i64 dim) {
    float scores[KEYS], highest[GROUP], total[GROUP] = {0};
    i64 rows[KEYS], page = 0, row = 0;
    memset(out, 0, n * dim * sizeof *out);
    for (i64 h = 0; h < n; h++) highest[h] = -INFINITY;
    for (i64 first = 0; first < count; first += KEYS) {
        i64 here = min(KEYS, count - first);
        for (i64 t = 0; t < here; t++, row++) {
            if (row == page_size) page++, row = 0;
            rows[t] = (table[page] * page_size + row) * stride;
        }
        for (i64 h = 0; h < n; h++) {
            STEP(score)(scores, q + h * dim, keys, rows, here, dim);
            float before = highest[h];
            for (i64 t = 0; t < here; t++) highest[h] = scores[t] > highest[h] ? scores[t] : highest[h];
            /* Nothing has been summed before the first ones, and a difference of infinities would be NaN. */
            float fade = first ? fast_exp(before - highest[h]) : 0;
            for (i64 t = 0; t < here; t++) scores[t] = fast_exp(scores[t] - highest[h]);
            total[h] *= fade;
            for (i64 t = 0; t < here; t++) total[h] += scores[t];
            STEP(blend)(out + h * dim, fade, scores, values, rows, here, dim);
        }
    }
    for (i64 h = 0; h < n; h++)
        for (i64 i = 0; i < dim; i++) out[h * dim + i] /= total[h];
}

static void STEP(share_softmax)(struct scratch t, const struct shape *s, const struct layer *l,
                                 const float *frequencies, const struct places *p) {
    i64 dim = s->dim, inner = s->heads * dim, kv = s->kv_heads * dim;
    float *q = t.qkv, *k = q + s->batch * inner, *v = k + s->batch * kv;
    struct residual none = {0};
    MATRIX(share_product)(q, t.normed, l->w_q, l->s_q, s->batch, inner, s->hidden, NOTHING, none);
    MATRIX(share_product)(k, t.normed, l->w_k, l->s_k, s->batch, kv, s->hidden, NOTHING, none);
    MATRIX(share_product)(v, t.normed, l->w_v, l->s_v, s->batch, kv, s->hidden, NOTHING, none);
#pragma omp barrier
#pragma omp for schedule(static)
    for (i64 b = 0; b < s->batch; b++) {
        i64 position = p->positions[b], page = table_of(p, b)[position / l->page_size];
        i64 place = (page * l->page_size + position % l->page_size) * kv;
        NUMBER *key = (NUMBER *)l->keys + place, *value = (NUMBER *)l->values + place;
        rotate(q + b * inner, s->heads, dim, s->rotary, frequencies, position);
        rotate(k + b * kv, s->kv_heads, dim, s->rotary, frequencies, position);
        for (i64 i = 0; i < kv; i++) {
            WRITE(key + i, k[b * kv + i]);
            WRITE(value + i, v[b * kv + i]);
        }
    }
    /* Queries together that share a key head, unless threads would be left without work. */
    i64 group = s->heads / s->kv_heads, together = s->batch * s->kv_heads < s->threads ? 1 : min(group, GROUP);
    i64 parts = (group + together - 1) / together;
#pragma omp for schedule(dynamic)
    for (i64 item = 0; item < s->batch * s->kv_heads * parts; item++) {
        i64 from = item % parts * together, key_head = item / parts % s->kv_heads, b = item / parts / s->kv_heads;
        i64 head = (b * s->heads + key_head * group + from) * dim;
        STEP(attend)(t.attended + head, q + head, min(together, group - from), (const NUMBER *)l->keys + key_head * dim,
                      (const NUMBER *)l->values + key_head * dim, table_of(p, b), l->page_size, p->positions[b] + 1, kv,
                      dim);
    }
}

static void STEP(share_layer)(float *x, struct scratch t, const struct shape *s, const struct layer *l,
                               const float *frequencies, const struct places *p) {
    i64 inner = s->heads * s->dim;
    NAMED(share_norm)(t.normed, x, l->w_before, NULL, s->batch, s->hidden, l->eps_before);
    if (l->rates)
        STEP(share_lightning)(t, s, l, p);
    else
        STEP(share_softmax)(t, s, l, frequencies, p);
    MATRIX(share_product)(t.h, l->rates ? t.qkv : t.attended, l->w_out, l->s_out, s->batch, s->hidden, inner,
                          RESIDUAL, (struct residual){t.normed, l->mixer_alpha, l->mixer_beta});
#pragma omp barrier
    NAMED(share_norm)(t.normed, t.h, l->w_after, NULL, s->batch, s->hidden, l->eps_after);
    NAMED(share_product)(t.logits, t.normed, l->w_router, NULL, s->batch, s->num_experts, s->hidden, NOTHING,
                         (struct residual){0});
#pragma omp barrier
#pragma omp single
    choose(l->experts, l->weights, l->probs, l->counts, t.logits, s->batch, s->num_experts, s->k);
    MATRIX(share_experts)(x, t.act, t.normed, l->w13, l->s13, l->w2, l->s2, l->experts, l->weights, s->batch, s->k,
                          s->num_experts, s->hidden, s->expert_size,
                          &(struct residual){t.normed, l->mlp_alpha, l->mlp_beta});
#pragma omp barrier
}

/* y [batch, hidden] = norm(layers(x)), the next token of the sequence at each of `places`, whose page has room. */
void STEP(step)(NUMBER *y, const NUMBER *x, const struct shape *s, const struct layer *layers, i64 num_layers,
                 const NUMBER *w_norm, float eps, const float *frequencies, const struct places *places,
                 float *memory) {
    i64 hidden = s->batch * s->hidden, inner = s->batch * s->heads * s->dim;
    float *current = memory, *normed = current + hidden, *h = normed + hidden, *qkv = h + hidden;
    float *gate = qkv + 3 * inner, *attended = gate + inner, *logits = attended + inner;
    float *act = logits + s->batch * s->num_experts;
    struct scratch scratch = {normed, h, qkv, gate, attended, logits, act};
    for (i64 i = 0; i < hidden; i++) current[i] = READ(x + i);
#pragma omp parallel num_threads(s->threads)
    {
        for (i64 i = 0; i < num_layers; i++)
            STEP(share_layer)(current, scratch, s, layers + i, frequencies, places);
        NAMED(share_norm)(normed, current, w_norm, NULL, s->batch, s->hidden, eps);
    }
    for (i64 i = 0; i < hidden; i++) WRITE(y + i, normed[i]);
}

#endif
