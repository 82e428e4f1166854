/* Numbers in memory, fp32, bf16 or int8, as fp32 and back. */

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

typedef int64_t i64;
typedef uint16_t bf16;

INLINE float read_fp32(const float *p) { return *p; }

INLINE float read_int8(const int8_t *p) { return *p; }

INLINE void write_fp32(float *p, float x) { *p = x; }

INLINE float read_bf16(const bf16 *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* To the nearest, ties to even; NaN stays NaN. */
INLINE void write_bf16(bf16 *p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    *p = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}
