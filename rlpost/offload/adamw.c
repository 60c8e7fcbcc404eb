// AdamW with one fixed order of correctly rounded float32 operations: multiplications, additions, divisions and square roots,
// none of them contracted (-ffp-contract=off). Any cut, vector width and number of threads give the same bits, and so does any
// other code that rounds these operations to nearest in this order (numpy's float32, a GPU kernel with _rn operations).
//
// One pass reads the gradient in 16 or 32 bits, applies the clip factor, and may write the model's weights as well.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bfloat16;

static inline float widen_float(float x) { return x; }
static inline float narrow_float(float x) { return x; }

static inline float widen_bfloat16(bfloat16 half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline bfloat16 narrow_bfloat16(float x) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0 : (bfloat16)rounded;
}

// `inverse` is the factor on the gradient, `keep` 1 - rate * decay, `beta_left` 1 - beta, `root` the square root of the second
// moment's bias correction, `size` the rate over the first moment's bias correction.
#define UPDATE(name, GRADIENT, WEIGHT, STORE)                                                                                    \
    void name(float *restrict p, float *restrict m, float *restrict v, const GRADIENT *restrict g, WEIGHT *restrict w, size_t n, \
              float inverse, float keep, float beta1, float beta1_left, float beta2, float beta2_left, float eps, float root,    \
              float size) {                                                                                                      \
        for (size_t i = 0; i < n; i++) {                                                                                         \
            float d = widen_##GRADIENT(g[i]) * inverse;                                                                          \
            float first = m[i] * beta1 + d * beta1_left;                                                                         \
            float second = v[i] * beta2 + (d * d) * beta2_left;                                                                  \
            float x = p[i] * keep - size * (first / (sqrtf(second) / root + eps));                                               \
            m[i] = first, v[i] = second, p[i] = x;                                                                               \
            STORE;                                                                                                               \
        }                                                                                                                        \
    }

UPDATE(adamw_float32_none, float, float, (void)w)
UPDATE(adamw_float32_float32, float, float, w[i] = narrow_float(x))
UPDATE(adamw_float32_bfloat16, float, bfloat16, w[i] = narrow_bfloat16(x))
UPDATE(adamw_bfloat16_none, bfloat16, bfloat16, (void)w)
UPDATE(adamw_bfloat16_float32, bfloat16, float, w[i] = narrow_float(x))
UPDATE(adamw_bfloat16_bfloat16, bfloat16, bfloat16, w[i] = narrow_bfloat16(x))
