/* Sixteen numbers at a time, with the vectors that the processor has. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define BFLOAT16
#endif
#if defined(BFLOAT16) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum {
    SIDE = 16, /* of a tile, and numbers of a vector */
    AREA = SIDE * SIDE,
};

typedef float Lanes __attribute__((vector_size(4 * SIDE), aligned(4), may_alias));
typedef int Pair __attribute__((aligned(2), may_alias)); /* two numbers in bfloat16 */

INLINE Lanes load(const void *from) {
    return *(const Lanes *)from;
}

/* The first `bytes` of them, a multiple of 4, and zeros; all if there are more. */
INLINE Lanes load_some(const void *from, int64_t bytes) {
    if (bytes >= 4 * SIDE)
        return load(from);
#if defined(__AVX512F__)
    return (Lanes)_mm512_maskz_loadu_epi32((__mmask16)((1u << bytes / 4) - 1), from);
#else
    Lanes lanes = {0};
    memcpy(&lanes, from, bytes);
    return lanes;
#endif
}

INLINE void store(void *to, Lanes lanes) {
    *(Lanes *)to = lanes;
}

#if defined(__AVX512F__)
enum { TOGETHER = 16 }; /* sums that the registers hold */

INLINE float sum(Lanes lanes) {
    return _mm512_reduce_add_ps((__m512)lanes);
}

/* e^x = 2^count * e^rest */
INLINE Lanes exponential(Lanes x) {
    __m512 one = _mm512_set1_ps(1), most = _mm512_set1_ps(87); /* beyond, float32 has no place for it */
    __m512 power = _mm512_max_ps(-most, _mm512_min_ps(most, (__m512)x)); /* in this order a NaN stays */
    __m512 count = _mm512_roundscale_ps(_mm512_mul_ps(power, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 rest = _mm512_fnmadd_ps(count, _mm512_set1_ps(0.693359375f), power); /* ln 2 in two numbers */
    rest = _mm512_fmadd_ps(count, _mm512_set1_ps(2.12194440e-4f), rest);
    __m512 series = _mm512_set1_ps(1.0f / 720);
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(1.0f / 120));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(1.0f / 24));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(1.0f / 6));
    series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(0.5f));
    series = _mm512_fmadd_ps(series, rest, one);
    series = _mm512_fmadd_ps(series, rest, one);
    return (Lanes)_mm512_scalef_ps(series, count);
}

/* Of finite numbers; with a step of Newton's, in half the time of a division. */
INLINE Lanes inverse(Lanes x) {
    __m512 near = _mm512_rcp14_ps((__m512)x);
    return (Lanes)_mm512_mul_ps(near, _mm512_fnmadd_ps((__m512)x, near, _mm512_set1_ps(2)));
}

INLINE Lanes sigmoid(Lanes x) {
    return inverse(1 + exponential(-x));
}

/* Of a number that is normally distributed, the probability to be less than x: a series for the logarithm of
 * erfc(z) / t, with z = |x| / sqrt(2) and t = 1 / (1 + z / 2) (Press et al., Numerical Recipes, 6.2), to 1.2e-7. */
INLINE Lanes normal(Lanes x) {
    static const float terms[] = {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f,
                                  0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
    Lanes z = (Lanes)_mm512_abs_ps((__m512)x) * 0.70710678f;
    z = (Lanes)_mm512_min_ps(_mm512_set1_ps(12), (__m512)z); /* beyond, it is 0 or 1; in this order a NaN stays */
    Lanes t = inverse(1 + z / 2);
    __m512 series = _mm512_set1_ps(0.17087277f);
    for (unsigned term = 0; term < sizeof terms / sizeof *terms; term++)
        series = _mm512_fmadd_ps(series, (__m512)t, _mm512_set1_ps(terms[term]));
    Lanes above = t * exponential((Lanes)series - z * z) / 2;
    __mmask16 positive = _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_GT_OQ);
    return (Lanes)_mm512_mask_sub_ps((__m512)above, positive, _mm512_set1_ps(1), (__m512)above);
}

INLINE Lanes positive_part(Lanes x) {
    return (Lanes)_mm512_max_ps(_mm512_setzero_ps(), (__m512)x); /* in this order a NaN stays */
}

/* 1 where x is positive, else 0 */
INLINE Lanes is_positive(Lanes x) {
    return (Lanes)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_GT_OQ),
                                      _mm512_set1_ps(1));
}

/* Exchange the blocks of step x step words beside the diagonal, in all blocks of twice that size. */
INLINE void exchange(__m512i lines[SIDE], int step) {
    __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __mmask16 right = _mm512_test_epi32_mask(lanes, _mm512_set1_epi32(step));
    __m512i other = _mm512_set1_epi32(SIDE), shift = _mm512_set1_epi32(step); /* lanes of the second start at SIDE */
    __m512i upper = _mm512_mask_sub_epi32(lanes, right, _mm512_add_epi32(lanes, other), shift);
    __m512i lower = _mm512_mask_add_epi32(_mm512_add_epi32(lanes, shift), right, lanes, other);
    for (int line = 0; line < SIDE; line++)
        if (!(line & step)) {
            __m512i first = lines[line], second = lines[line + step];
            lines[line] = _mm512_permutex2var_epi32(first, upper, second);
            lines[line + step] = _mm512_permutex2var_epi32(first, lower, second);
        }
}

/* Word w of line c becomes word c of line w, of which the first `count` go to `to`, `step` bytes from one to the next. */
INLINE void transpose(const Lanes from[SIDE], char *to, int64_t step, int64_t count) {
    __m512i lines[SIDE];
    for (int line = 0; line < SIDE; line++)
        lines[line] = (__m512i)from[line];
    exchange(lines, 1);
    exchange(lines, 2);
    exchange(lines, 4);
    exchange(lines, 8);
    for (int line = 0; line < SIDE; line++)
        if (line < count)
            _mm512_storeu_si512(to + line * step, lines[line]);
}
#else
enum { TOGETHER = 4 };

INLINE float sum(Lanes lanes) {
    float total = 0;
    for (int lane = 0; lane < SIDE; lane++)
        total += lanes[lane];
    return total;
}

INLINE Lanes exponential(Lanes x) {
    for (int lane = 0; lane < SIDE; lane++)
        x[lane] = expf(x[lane]);
    return x;
}

INLINE Lanes sigmoid(Lanes x) {
    return 1 / (1 + exponential(-x));
}

/* Of a number that is normally distributed, the probability to be less than x. */
INLINE Lanes normal(Lanes x) {
    for (int lane = 0; lane < SIDE; lane++)
        x[lane] = erfcf(x[lane] * -0.70710678f) / 2;
    return x;
}

INLINE Lanes positive_part(Lanes x) {
    for (int lane = 0; lane < SIDE; lane++)
        x[lane] = x[lane] < 0 ? 0 : x[lane];
    return x;
}

/* 1 where x is positive, else 0 */
INLINE Lanes is_positive(Lanes x) {
    for (int lane = 0; lane < SIDE; lane++)
        x[lane] = x[lane] > 0;
    return x;
}

INLINE void transpose(const Lanes from[SIDE], char *to, int64_t step, int64_t count) {
    for (int64_t line = 0; line < count && line < SIDE; line++)
        for (int word = 0; word < SIDE; word++)
            ((float *)(to + line * step))[word] = from[word][line];
}
#endif

/* In the order of FUNCTIONS in activations.py. */
enum { SILU, QUICK_GELU, GELU_TANH, GELU, RELU, RELU_SQUARED };

/* The activation, and where `slope` is no null pointer its derivative. */
INLINE Lanes activation(int64_t kind, Lanes x, Lanes *slope) {
    if (kind == RELU) {
        if (slope)
            *slope = is_positive(x);
        return positive_part(x);
    }
    if (kind == RELU_SQUARED) {
        Lanes part = positive_part(x);
        if (slope)
            *slope = 2 * part;
        return part * part;
    }
    if (kind == GELU) {
        Lanes below = normal(x);
        if (slope)
            *slope = below + x * exponential(x * x / -2) * 0.39894228f; /* 1 / sqrt(2 pi) */
        return x * below;
    }
    /* x * sigmoid(power) */
    Lanes power = x, power_slope = {0};
    power_slope += 1;
    if (kind == QUICK_GELU) {
        power = x * 1.702f;
        power_slope *= 1.702f;
    } else if (kind == GELU_TANH) { /* tanh is another sigmoid */
        power = x * (1.5957691f + 0.071354816f * x * x);
        power_slope = 1.5957691f + 0.21406445f * x * x;
    }
    Lanes part = sigmoid(power);
    if (slope)
        *slope = part * (1 + x * power_slope * (1 - part));
    return x * part;
}

#if defined(BFLOAT16)
INLINE __m256i rounded(Lanes lanes) {
    return (__m256i)_mm512_cvtneps_pbh((__m512)lanes);
}

/* Words of two numbers: lanes of `even` and `odd` in turns. */
INLINE Lanes paired(__m256i even, __m256i odd) {
    return (Lanes)_mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

/* sums + left * right, where a lane of left and right is two numbers */
INLINE Lanes add_pairs(Lanes sums, __m512i left, __m512i right) {
    return (Lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)left, (__m512bh)right);
}
#endif

/* To where numbers are float32, or bfloat16. */
INLINE void store_as(int bfloat16, char *to, Lanes lanes) {
#if defined(BFLOAT16)
    if (bfloat16) {
        _mm256_storeu_si256((__m256i *)to, rounded(lanes));
        return;
    }
#endif
    (void)bfloat16;
    store(to, lanes);
}

/* Words of two rows of numbers: in bfloat16 the one of each pair from `even`, the other from `odd`, to `to`; in float32
 * `even` to `to`, and `odd` to the next line. */
INLINE void store_pair(int bfloat16, char *to, int64_t line, Lanes even, Lanes odd) {
#if defined(BFLOAT16)
    if (bfloat16) {
        store(to, paired(rounded(even), rounded(odd)));
        return;
    }
#endif
    (void)bfloat16;
    store(to, even);
    store(to + line, odd);
}
