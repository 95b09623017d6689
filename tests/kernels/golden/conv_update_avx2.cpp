// conv_update_avx2: one decode step of the depthwise causal convolution, its state shifted in place.
//
// Tensors (b batch, d channels, s length of the state, t taps <= s + 1; all of one dtype, float32 or bfloat16):
//     state       [b, d, s]               read, then rewritten: shifted by the new input
//     x           [b, d] strides          read: the new inputs
//     weight      [d, t], bias [d] or null
//     y           [b, d]                  written; silu of the sum when `silu` is set
//
// Work: sequences are shared among OpenMP threads; one moves half a megabyte at the most, so one thread does it.
//
// Promises: the state is the reference's. y is summed in float32, oldest input first, and rounded where torch rounds.
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
    void* state;
    Input x, weight, bias;
    void* y;
    int64_t batch, channels, length, taps, silu, threads;
};

inline float from_stored(float value) { return value; }
inline float from_stored(uint16_t value) { return from_bfloat16(value); }

// Shift the state of a channel and return its sum.
template <class Element>
inline float step_channel(Element* state, Element x, const Element* weight, int64_t length, int64_t taps) {
    // With length == taps - 1 the oldest input of the window is the one that leaves the state.
    float sum = taps > length ? from_stored(state[0]) * from_stored(weight[0]) : 0.0f;
    for (int64_t i = 0; i + 1 < length; ++i) state[i] = state[i + 1];
    state[length - 1] = x;
    const int64_t inside = taps > length ? length : taps;
    for (int64_t i = 0; i < inside; ++i) {
        sum += from_stored(state[length - inside + i]) * from_stored(weight[taps - inside + i]);
    }
    return sum;
}

// Floats of a vector in memory, and back; bfloat16 holds what was read from bfloat16.
inline Floats widen_stored(const float* from) { return load<Floats>(from); }
inline Floats widen_stored(const uint16_t* from) { return (Floats)(widen_halves(load<Halves>(from)) << 16); }
inline void narrow_stored(float* to, Floats values) { store(to, values); }
inline void narrow_stored(uint16_t* to, Floats values) { store(to, narrow_to_halves((Words)values >> 16)); }

// Four taps on a state of four, as Mamba2 has them, for LANES channels: a vector holds a quarter of them.
template <class Element>
inline Floats step_channels(Element* state, Floats x, const Element* weight) {
    const Floats old0 = widen_stored(state + 0 * LANES);
    const Floats now0 = SHUFFLED(old0, x, 1, 2, 3, 8, 5, 6, 7, 9);
    narrow_stored(state + 0 * LANES, now0);
    const Floats product0 = now0 * widen_stored(weight + 0 * LANES);
    const Floats old1 = widen_stored(state + 1 * LANES);
    const Floats now1 = SHUFFLED(old1, x, 1, 2, 3, 10, 5, 6, 7, 11);
    narrow_stored(state + 1 * LANES, now1);
    const Floats product1 = now1 * widen_stored(weight + 1 * LANES);
    const Floats old2 = widen_stored(state + 2 * LANES);
    const Floats now2 = SHUFFLED(old2, x, 1, 2, 3, 12, 5, 6, 7, 13);
    narrow_stored(state + 2 * LANES, now2);
    const Floats product2 = now2 * widen_stored(weight + 2 * LANES);
    const Floats old3 = widen_stored(state + 3 * LANES);
    const Floats now3 = SHUFFLED(old3, x, 1, 2, 3, 14, 5, 6, 7, 15);
    narrow_stored(state + 3 * LANES, now3);
    const Floats product3 = now3 * widen_stored(weight + 3 * LANES);
    // By taps: of half of the channels the first two and the last two, then of all channels each.
    const Floats first0 = SHUFFLED(product0, product1, 0, 4, 8, 12, 1, 5, 9, 13);
    const Floats last0 = SHUFFLED(product0, product1, 2, 6, 10, 14, 3, 7, 11, 15);
    const Floats first1 = SHUFFLED(product2, product3, 0, 4, 8, 12, 1, 5, 9, 13);
    const Floats last1 = SHUFFLED(product2, product3, 2, 6, 10, 14, 3, 7, 11, 15);
    const Floats tap0 = SHUFFLED(first0, first1, 0, 1, 2, 3, 8, 9, 10, 11);
    const Floats tap1 = SHUFFLED(first0, first1, 4, 5, 6, 7, 12, 13, 14, 15);
    const Floats tap2 = SHUFFLED(last0, last1, 0, 1, 2, 3, 8, 9, 10, 11);
    const Floats tap3 = SHUFFLED(last0, last1, 4, 5, 6, 7, 12, 13, 14, 15);
    return tap0 + tap1 + tap2 + tap3;
}

template <class Element>
void step(const Arguments& a) {
    const bool four = a.length == 4 && a.taps == 4 && a.x.head_stride == 1;
    const Element* weight = (const Element*)a.weight.data;
    by_threads(a.threads, [&] {
#pragma omp for schedule(static) nowait
        for (int64_t b = 0; b < a.batch; ++b) {
            const Element* x = (const Element*)a.x.data + b * a.x.batch_stride;
            Element* state = (Element*)a.state + b * a.channels * a.length;
            for (int64_t d = 0; d < a.channels; d += LANES) {
                const int64_t count = a.channels - d < LANES ? a.channels - d : LANES;
                Floats y;
                if (four && count == LANES) {
                    y = step_channels(state + d * 4, widen_stored(x + d), weight + d * 4);
                } else {
                    float sums[LANES] = {};
                    for (int64_t lane = 0; lane < count; ++lane) {
                        Element* old = state + (d + lane) * a.length;
                        const Element input = x[(d + lane) * a.x.head_stride];
                        sums[lane] = step_channel(old, input, weight + (d + lane) * a.taps, a.length, a.taps);
                    }
                    y = load<Floats>(sums);
                }
                if (a.bias.data) y += read(a.bias, d, count);
                y = round_to(y, a.x.dtype);
                if (a.silu) y = silu(y);
                write(a.y, a.x.dtype, b * a.channels + d, y, count);
            }
        }
    });
}

}  // namespace

extern "C" void conv_update_avx2(const void* packed_arguments) {
    Arguments a;
    memcpy(&a, packed_arguments, sizeof a);
    if (a.x.dtype == 0) {
        step<float>(a);
    } else {
        step<uint16_t>(a);
    }
}
