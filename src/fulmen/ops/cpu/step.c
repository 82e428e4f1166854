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
    const float *rates;
    /* what the sequences left behind: states in fp32; keys and values [batch, room, kv_heads, dim] like the weights */
    const float *state;
    float *next;
    void *keys, *values;
    i64 room;
    /* where the tokens go, as `choose` gives it */
    i64 *experts;
    float *weights, *probs;
    i64 *counts;
    float eps_before, eps_norm, eps_after, mixer_alpha, mixer_beta, mlp_alpha, mlp_beta;
};

/* Tensors of one layer that the next one overwrites. */
struct scratch {
    float *normed, *h, *qkv, *gate, *attended, *logits, *act, *scores;
};

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
i64 step_scratch(const struct shape *s, i64 position) {
    i64 inner = s->heads * s->dim;
    i64 each = 3 * s->hidden + 5 * inner + s->num_experts + s->k * s->expert_size + s->heads * (position + 1);
    return s->batch * each;
}

#define NUMBER float
#define READ read_fp32
#define WRITE write_fp32
#define NAMED(name) name##_fp32
#include "step.c"

#undef NUMBER
#undef READ
#undef WRITE
#undef NAMED
#define NUMBER bf16
#define READ read_bf16
#define WRITE write_bf16
#define NAMED(name) name##_bf16
#include "step.c"

#else

static void NAMED(share_lightning)(struct scratch t, const struct shape *s, const struct layer *l) {
    i64 inner = s->heads * s->dim;
    struct residual none = {0};
    NAMED(share_product)(t.qkv, t.normed, l->w_q, s->batch, 3 * inner, s->hidden, SILU, none);
    NAMED(share_product)(t.gate, t.normed, l->w_gate, s->batch, inner, s->hidden, SIGMOID, none);
#pragma omp barrier
    share_step(t.attended, l->next, t.qkv, t.qkv + s->dim, t.qkv + 2 * s->dim, l->rates, l->state, s->batch, s->heads,
               s->dim, s->dim, 3 * inner, 3 * s->dim);
    NAMED(share_norm)(t.qkv, t.attended, l->w_norm, t.gate, s->batch, inner, l->eps_norm);
}

/* out [dim] = softmax(q . keys / sqrt(dim)) values over `count` tokens, `stride` numbers apart. */
static void NAMED(attend)(float *out, float *scores, const float *q, const NUMBER *keys, const NUMBER *values, i64 count,
                          i64 stride, i64 dim) {
    float highest = -INFINITY, total = 0, scale = 1.0f / sqrtf(dim);
    for (i64 t = 0; t < count; t++) {
        scores[t] = NAMED(dot)(keys + t * stride, q, dim) * scale;
        highest = scores[t] > highest ? scores[t] : highest;
    }
    for (i64 t = 0; t < count; t++) total += scores[t] = fast_exp(scores[t] - highest);
    memset(out, 0, dim * sizeof *out);
    for (i64 t = 0; t < count; t++)
        for (i64 i = 0; i < dim; i++) out[i] += scores[t] / total * READ(values + t * stride + i);
}

static void NAMED(share_softmax)(struct scratch t, const struct shape *s, const struct layer *l,
                                 const float *frequencies, i64 position) {
    i64 dim = s->dim, inner = s->heads * dim, kv = s->kv_heads * dim;
    float *q = t.qkv, *k = q + s->batch * inner, *v = k + s->batch * kv;
    struct residual none = {0};
    NAMED(share_product)(q, t.normed, l->w_q, s->batch, inner, s->hidden, NOTHING, none);
    NAMED(share_product)(k, t.normed, l->w_k, s->batch, kv, s->hidden, NOTHING, none);
    NAMED(share_product)(v, t.normed, l->w_v, s->batch, kv, s->hidden, NOTHING, none);
#pragma omp barrier
#pragma omp for schedule(static)
    for (i64 b = 0; b < s->batch; b++) {
        NUMBER *key = (NUMBER *)l->keys + (b * l->room + position) * kv;
        NUMBER *value = (NUMBER *)l->values + (b * l->room + position) * kv;
        rotate(q + b * inner, s->heads, dim, s->rotary, frequencies, position);
        rotate(k + b * kv, s->kv_heads, dim, s->rotary, frequencies, position);
        for (i64 i = 0; i < kv; i++) {
            WRITE(key + i, k[b * kv + i]);
            WRITE(value + i, v[b * kv + i]);
        }
    }
#pragma omp for schedule(static)
    for (i64 head = 0; head < s->batch * s->heads; head++) {
        i64 of_keys = head % s->heads / (s->heads / s->kv_heads);
        i64 start = head / s->heads * l->room * kv + of_keys * dim;
        NAMED(attend)(t.attended + head * dim, t.scores + head * (position + 1), q + head * dim,
                      (const NUMBER *)l->keys + start, (const NUMBER *)l->values + start, position + 1, kv, dim);
    }
}

static void NAMED(share_layer)(float *x, struct scratch t, const struct shape *s, const struct layer *l,
                               const float *frequencies, i64 position) {
    i64 inner = s->heads * s->dim;
    NAMED(share_norm)(t.normed, x, l->w_before, NULL, s->batch, s->hidden, l->eps_before);
    if (l->rates)
        NAMED(share_lightning)(t, s, l);
    else
        NAMED(share_softmax)(t, s, l, frequencies, position);
    NAMED(share_product)(t.h, l->rates ? t.qkv : t.attended, l->w_out, s->batch, s->hidden, inner, RESIDUAL,
                         (struct residual){t.normed, l->mixer_alpha, l->mixer_beta});
#pragma omp barrier
    NAMED(share_norm)(t.normed, t.h, l->w_after, NULL, s->batch, s->hidden, l->eps_after);
    NAMED(share_product)(t.logits, t.normed, l->w_router, s->batch, s->num_experts, s->hidden, NOTHING,
                         (struct residual){0});
#pragma omp barrier
#pragma omp single
    choose(l->experts, l->weights, l->probs, l->counts, t.logits, s->batch, s->num_experts, s->k);
    NAMED(share_experts)(x, t.act, t.normed, l->w13, l->w2, l->experts, l->weights, s->batch, s->k, s->num_experts,
                         s->hidden, s->expert_size, &(struct residual){t.normed, l->mlp_alpha, l->mlp_beta});
#pragma omp barrier
}

/* y [batch, hidden] = norm(layers(x)), one token of each sequence at `position`; keys and values have room for it. */
void NAMED(step)(NUMBER *y, const NUMBER *x, const struct shape *s, const struct layer *layers, i64 num_layers,
                 const NUMBER *w_norm, float eps, const float *frequencies, i64 position, float *memory) {
    i64 hidden = s->batch * s->hidden, inner = s->batch * s->heads * s->dim;
    float *current = memory, *normed = current + hidden, *h = normed + hidden, *qkv = h + hidden;
    float *gate = qkv + 3 * inner, *attended = gate + inner, *logits = attended + inner;
    float *act = logits + s->batch * s->num_experts, *scores = act + s->batch * s->k * s->expert_size;
    struct scratch scratch = {normed, h, qkv, gate, attended, logits, act, scores};
    for (i64 i = 0; i < hidden; i++) current[i] = READ(x + i);
#pragma omp parallel num_threads(s->threads)
    {
        for (i64 i = 0; i < num_layers; i++)
            NAMED(share_layer)(current, scratch, s, layers + i, frequencies, position);
        NAMED(share_norm)(normed, current, w_norm, NULL, s->batch, s->hidden, eps);
    }
    for (i64 i = 0; i < hidden; i++) WRITE(y + i, normed[i]);
}

#endif
