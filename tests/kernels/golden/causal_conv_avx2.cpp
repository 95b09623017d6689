// causal_conv_avx2: the depthwise causal convolution of a sequence.
//
// Tensors (b batch, l seqlen, d channels, t taps; all of one dtype, float32 or bfloat16):
//     x           [b, l, d] strides (batch_stride, head_stride of a token, 1)    read
//     weight      [d, t], bias [d] or null
//     y           [b, l, d]               written; silu of the sum when `silu` is set
//
// Work: blocks of BLOCK tokens, shared among OpenMP threads. A block goes from channels to channels, LANES of them at a
// time, with the window of inputs in registers.
//
// Promises: y is summed in float32, oldest input first, and rounded where torch rounds.
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include <immintrin.h>
#include <vector>

namespace {

constexpr int LANES = 8;  // floats of one vector

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline __m128i in_low_half(Bytes bytes) {
    int64_t word;
    memcpy(&word, &bytes, sizeof word);
    return _mm_cvtsi64_si128(word);
}
inline Ints widen(Bytes bytes) { return (Ints)_mm256_cvtepu8_epi32(in_low_half(bytes)); }
inline Ints widen_signed(Bytes bytes) { return (Ints)_mm256_cvtepi8_epi32(in_low_half(bytes)); }
inline Bytes narrow(Ints lanes) {
    const __m256i low_bytes = (__m256i)(lanes & 0xff);
    const __m128i pairs = _mm_packus_epi32(_mm256_castsi256_si128(low_bytes), _mm256_extracti128_si256(low_bytes, 1));
    const int64_t word = _mm_cvtsi128_si64(_mm_packus_epi16(pairs, pairs));
    Bytes bytes;
    memcpy(&bytes, &word, sizeof bytes);
    return bytes;
}
inline Ints larger(Ints a, Ints b) { return (Ints)_mm256_max_epi32((__m256i)a, (__m256i)b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Words widen_halves(Halves halves) { return (Words)_mm256_cvtepu16_epi32((__m128i)halves); }
inline Halves narrow_to_halves(Words words) {
    const __m256i low_halves = (__m256i)(words & 0xffff), pairs = _mm256_packus_epi32(low_halves, low_halves);
    return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
}

template <class Body>
__attribute__((noinline)) void invoke(const Body& body) {
    body();
}

// `body` by each of so many threads, which share its loops. One alone is no team: a team's barrier costs libgomp a
// system call, 0.4 us. Inside of somebody else's team the loops would be shared with that.
template <class Body>
inline void by_threads(int64_t threads, const Body& body) {
#ifdef _OPENMP
    if (threads == 1 && !omp_in_parallel()) return invoke(body);
#pragma omp parallel num_threads(threads)
#endif
    invoke(body);
}

// Through a type that may be unaligned and alias anything; gcc turns a short memcpy into integer registers instead.
template <class Vector, class Element>
inline Vector load(const Element* from) {
    typedef Vector Anywhere __attribute__((aligned(1), may_alias));
    return *(const Anywhere*)from;
}

template <class Vector, class Element>
inline void store(Element* to, Vector vector) {
    typedef Vector Anywhere __attribute__((aligned(1), may_alias));
    *(Anywhere*)to = vector;
}

// The first `count` lanes from memory, at least one; zero behind them.
template <class Vector, class Element>
inline Vector load_first(const Element* from, int64_t count) {
    if (count >= LANES) return load<Vector>(from);
    Vector vector = {};
    memcpy(&vector, from, count * sizeof(Element));
    return vector;
}

template <class Vector, class Element>
inline void store_first(Element* to, Vector vector, int64_t count) {
    if (count >= LANES) {
        store(to, vector);
    } else {
        memcpy(to, &vector, count * sizeof(Element));
    }
}

// Less zero, which changes no value and costs nothing; plus zero would change -0.
inline Floats splat(float value) { return value - Floats{}; }

inline Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffffu); }

// Lanes of two vectors; those of the second count on from the first's.
#if defined(__clang__)
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SHUFFLED_SHORTS SHUFFLED
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#define SHUFFLED_SHORTS(a, b, ...) __builtin_shuffle(a, b, (Shorts){__VA_ARGS__})
#endif
#define ROTATED(x, ...) SHUFFLED(x, x, __VA_ARGS__)

// Sum of all lanes by halving: lane i and lane i + step. Every lane ends with the same sum.
inline float sum_lanes(Floats x) {
    x += ROTATED(x, 4, 5, 6, 7, 0, 1, 2, 3);
    x += ROTATED(x, 2, 3, 4, 5, 6, 7, 0, 1);
    x += ROTATED(x, 1, 2, 3, 4, 5, 6, 7, 0);
    return x[0];
}

inline float from_bfloat16(uint16_t stored) {
    const uint32_t word = (uint32_t)stored << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

// Round to nearest, ties to even; NaN becomes the NaN that torch stores.
inline uint16_t to_bfloat16(float value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return value != value ? 0x7fc0 : (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

// The same, in the upper half of each lane.
inline Words to_bfloat16(Floats values) {
    const Words words = (Words)values;
    return values == values ? (words + 0x7fff + (words >> 16 & 1)) & 0xffff0000u : Words{} + 0x7fc00000u;
}

// An input as the caller has it: its last dimension is contiguous. dtype: 0 float32, 1 bfloat16.
struct Input {
    const void* data;
    int64_t dtype;
    int64_t batch_stride;
    int64_t head_stride;

    float at(int64_t index) const {
        return dtype == 0 ? ((const float*)data)[index] : from_bfloat16(((const uint16_t*)data)[index]);
    }
};

// Values from `index` of a tensor; `left` of them exist.
inline Floats read(const Input& input, int64_t index, int64_t left) {
    if (input.dtype == 0) return load_first<Floats>((const float*)input.data + index, left);
    return (Floats)(widen_halves(load_first<Halves>((const uint16_t*)input.data + index, left)) << 16);
}

// Round to the precision of a dtype.
inline Floats round_to(Floats values, int64_t dtype) { return dtype == 0 ? values : (Floats)to_bfloat16(values); }

inline void write(void* output, int64_t dtype, int64_t index, Floats values, int64_t left) {
    if (dtype == 0) {
        store_first((float*)output + index, values, left);
    } else {
        store_first((uint16_t*)output + index, narrow_to_halves(to_bfloat16(values) >> 16), left);
    }
}

// e^x by 2^n * e^r with |r| <= log(2) / 2 and the Taylor polynomial of degree 7 (error below 1e-8): within 2 units in
// the last place. Infinite above 88, where float32 nearly ends, e^-87 below -87; NaN stays NaN.
inline Floats exponential(Floats from) {
    const Floats x = from < -87.0f ? splat(-87.0f) : from;
    const Floats shifted = x * 1.44269504f + 12582912.0f;  // n in the low bits
    const Floats n = shifted - 12582912.0f;
    // log(2) in two parts, the first short enough for n times it to be exact.
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats sum = splat(1.0f / 5040.0f);
    sum = multiply_add(sum, r, splat(1.0f / 720.0f));
    sum = multiply_add(sum, r, splat(1.0f / 120.0f));
    sum = multiply_add(sum, r, splat(1.0f / 24.0f));
    sum = multiply_add(sum, r, splat(1.0f / 6.0f));
    sum = multiply_add(sum, r, splat(1.0f / 2.0f));
    sum = multiply_add(sum * r, r, r) + 1.0f;
    const Floats result = sum * (Floats)(((Words)shifted - 0x4b400000u + 127u) << 23);
    return from > 88.0f ? splat(INFINITY) : result;
}

inline Floats silu(Floats x) { return x / (exponential(-x) + 1.0f); }

struct Arguments {
    Input x, weight, bias;
    void* y;
    int64_t batch, seqlen, channels, taps, silu, threads;
};

// Shorter, and the window is read anew too often; longer, and rows some KB apart push each other out of the L1 cache.
// [1, 2048, 1792] float32 in rows of 3352, one thread of Zen 4: 3.2 ms by 2, 2.55 by 4, 2.8 by 8, 5.2 by 16.
constexpr int64_t BLOCK = 4;

// Tokens begin .. end of a sequence.
template <int DTYPE, int TAPS>
void convolve(const Arguments& a, const float* weight, int64_t b, int64_t begin, int64_t end) {
    Input x = a.x;
    x.dtype = DTYPE;
    for (int64_t d = 0; d < a.channels; d += LANES) {
        const int64_t count = a.channels - d, inputs = b * x.batch_stride + d, results = b * a.seqlen * a.channels + d;
        const Floats bias = a.bias.data ? read(a.bias, d, count) : Floats{};
        Floats taps[TAPS], window[TAPS] = {};
#pragma GCC unroll 8
        for (int i = 0; i < TAPS; ++i) taps[i] = load_first<Floats>(weight + i * a.channels + d, count);
        // The inputs before this block, in the places that the first token moves on by one; zeros before the sequence.
#pragma GCC unroll 8
        for (int i = 1; i < TAPS; ++i) {
            const int64_t t = begin + i - TAPS;
            if (t >= 0) window[i] = read(x, inputs + t * x.head_stride, count);
        }
        for (int64_t t = begin; t < end; ++t) {
            Floats y = {};
#pragma GCC unroll 8
            for (int i = 0; i < TAPS; ++i) {
                window[i] = i < TAPS - 1 ? window[i + 1] : read(x, inputs + t * x.head_stride, count);
                y = multiply_add(window[i], taps[i], y);
            }
            y = round_to(y + bias, DTYPE);
            write(a.y, DTYPE, results + t * a.channels, a.silu ? silu(y) : y, count);
        }
    }
}

template <int DTYPE, int TAPS>
void convolve_all(const Arguments& a) {
    std::vector<float> weight(TAPS * a.channels);  // [t, d]
    for (int64_t d = 0; d < a.channels; ++d) {
        for (int i = 0; i < TAPS; ++i) weight[i * a.channels + d] = a.weight.at(d * TAPS + i);
    }
    const int64_t blocks = (a.seqlen + BLOCK - 1) / BLOCK;
    by_threads(a.threads, [&] {
#pragma omp for schedule(static) nowait
        for (int64_t block = 0; block < a.batch * blocks; ++block) {
            const int64_t begin = block % blocks * BLOCK, end = begin + BLOCK < a.seqlen ? begin + BLOCK : a.seqlen;
            convolve<DTYPE, TAPS>(a, weight.data(), block / blocks, begin, end);
        }
    });
}

}  // namespace

extern "C" void causal_conv_avx2(const void* packed_arguments) {
    Arguments a;
    memcpy(&a, packed_arguments, sizeof a);
    switch (a.taps) {
        case 1: return a.x.dtype == 0 ? convolve_all<0, 1>(a) : convolve_all<1, 1>(a);
        case 2: return a.x.dtype == 0 ? convolve_all<0, 2>(a) : convolve_all<1, 2>(a);
        case 3: return a.x.dtype == 0 ? convolve_all<0, 3>(a) : convolve_all<1, 3>(a);
        case 4: return a.x.dtype == 0 ? convolve_all<0, 4>(a) : convolve_all<1, 4>(a);
        case 5: return a.x.dtype == 0 ? convolve_all<0, 5>(a) : convolve_all<1, 5>(a);
        case 6: return a.x.dtype == 0 ? convolve_all<0, 6>(a) : convolve_all<1, 6>(a);
        case 7: return a.x.dtype == 0 ? convolve_all<0, 7>(a) : convolve_all<1, 7>(a);
        case 8: return a.x.dtype == 0 ? convolve_all<0, 8>(a) : convolve_all<1, 8>(a);
    }
}
