/* adapted_layer.h: one adapter of a layer in float64, for the tests of its ops. */
#ifndef GPTC_ADAPTED_LAYER_H
#define GPTC_ADAPTED_LAYER_H

#include "reference.h"

/* A layer with its parts: columns `first` to first + rows - 1 of its products, twice as many with SwiGLU. */
typedef struct sizes {
    int N, IC, OC, R, n_parts;
    lora_part parts[3];
} sizes;

static const sizes cases[] = {
    {1, 1, 1, 1, 1, {{0, 1}}},
    {3, 65, 33, 5, 1, {{0, 33}}},
    {3, 65, 65, 1, 1, {{0, 65}}},
    {5, 17, 70, 16, 1, {{0, 70}}},
    {9, 33, 40, 3, 3, {{0, 20}, {20, 7}, {27, 13}}}, /* queries, keys and values */
    {70, 65, 96, 16, 2, {{0, 64}, {80, 16}}},        /* without the keys */
    {67, 130, 129, 5, 1, {{64, 65}}},
    {37, 1101, 9, 2, 1, {{0, 9}}}, /* more terms than a tile has */
    {6, 9, 1101, 7, 1, {{0, 1101}}},
};

static inline gpt_shape shape_of(const sizes *s, int activation) {
    int widest = s->IC > s->OC ? s->IC : s->OC;
    return (gpt_shape){.N = s->N,
                       .T = s->N,
                       .C = widest,
                       .V = 2,
                       .Vp = 2,
                       .NH = 1,
                       .NKV = 1,
                       .HS = widest,
                       .F = widest,
                       .activation = activation,
                       .training = 1,
                       .lora_rank = s->R,
                       .n_params = 1};
}

/* The whole of one adapter in float64. */
typedef struct problem {
    const sizes *s;
    int width, rows; /* of a row of the products; of all parts */
    gpt_dropout dropout;
    double *in, *kept; /* (N, IC) after dropout; which factor each had */
    double *a, *b, *y; /* y: (N, width) the layer's products */
    double scale;
} problem;

static inline problem new_problem(const sizes *s, int width, gpt_dropout_site site) {
    problem p = {.s = s, .width = width, .dropout = dropout_at(site), .scale = 1.25f};
    for (int i = 0; i < s->n_parts; i++) p.rows += s->parts[i].rows;
    p.in = random_act((int64_t)s->N * s->IC, 1.0);
    p.kept = host_zeros((int64_t)s->N * s->IC);
    for (int64_t i = 0; i < (int64_t)s->N * s->IC; i++)
        p.kept[i] = p.dropout.p > 0 ? dropout_factor(p.dropout, (uint64_t)i) : 1;
    p.a = random_f32((int64_t)s->n_parts * s->R * s->IC, 1 / sqrt(s->IC));
    p.b = random_f32((int64_t)p.rows * s->R, 1 / sqrt(s->R));
    p.y = random_act((int64_t)s->N * width, 1.0);
    return p;
}

/* u (N, parts R), and y += scale u b^T. */
static inline double *adapt(const problem *p, double *y) {
    const sizes *s = p->s;
    int R = s->R, W = s->n_parts * R;
    double *u = host_zeros((int64_t)s->N * W);
    for (int n = 0; n < s->N; n++)
        for (int j = 0; j < W; j++)
            for (int c = 0; c < s->IC; c++) {
                int64_t at = (int64_t)n * s->IC + c;
                u[n * W + j] += p->in[at] * p->kept[at] * p->a[j * s->IC + c];
            }
    for (int i = 0, row = 0; i < s->n_parts; row += s->parts[i++].rows)
        for (int n = 0; n < s->N; n++)
            for (int o = 0; o < s->parts[i].rows; o++)
                for (int j = 0; j < R; j++)
                    y[(int64_t)n * p->width + s->parts[i].first + o] +=
                        p->scale * u[n * W + i * R + j] * p->b[(row + o) * R + j];
    return u;
}

/* Gradients in float64 of dout (N, OC): added to those that are there. */
typedef struct gradients {
    double *din, *da, *db;
} gradients;

static inline void differentiate(const problem *p, const double *u, const double *dout,
                                 gradients g) {
    const sizes *s = p->s;
    int R = s->R, W = s->n_parts * R;
    for (int n = 0; n < s->N; n++)
        for (int i = 0, row = 0; i < s->n_parts; row += s->parts[i++].rows)
            for (int j = 0; j < R; j++) {
                double du = 0;
                for (int o = 0; o < s->parts[i].rows; o++) {
                    double d = p->scale * dout[(int64_t)n * s->OC + s->parts[i].first + o];
                    du += d * p->b[(row + o) * R + j];
                    g.db[(row + o) * R + j] += d * u[n * W + i * R + j];
                }
                for (int c = 0; c < s->IC; c++) {
                    int64_t at = (int64_t)n * s->IC + c, of_a = (int64_t)(i * R + j) * s->IC + c;
                    g.da[of_a] += du * p->in[at] * p->kept[at];
                    g.din[at] += du * p->kept[at] * p->a[of_a];
                }
            }
}

#endif
