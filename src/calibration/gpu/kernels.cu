// What calibration computes on the GPU besides products of matrices: the pointwise ops of a network, and what is kept of
// the inputs of its linear layers. All floats are float32. Grids are of one dimension but where it is said; pointwise
// kernels go over `count` values in strides, so any grid does.
typedef unsigned short half_bits;
typedef unsigned long long size;
#define EACH(i, count) for (size i = (size)blockIdx.x * blockDim.x + threadIdx.x; i < (count); i += (size)gridDim.x * blockDim.x)
#define THREADS 256

// kind: 1 float16, 2 bfloat16
extern "C" __global__ void trtvlm_widen(const half_bits *from, float *to, size count, int kind) {
    EACH(i, count) {
        float y;
        if (kind == 1) asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(from[i]));
        else y = __uint_as_float((unsigned)from[i] << 16);
        to[i] = y;
    }
}

// x = high + low, high with the 11 bits that TF32 has.
extern "C" __global__ void trtvlm_split(const float *x, float *high, float *low, size count) {
    EACH(i, count) {
        const float top = __uint_as_float(__float_as_uint(x[i]) & 0xffffe000u);
        high[i] = top;
        low[i] = x[i] - top;
    }
}

// kind: 0 sum, 1 product
extern "C" __global__ void trtvlm_pair(const float *a, const float *b, float *to, size count, int kind) {
    EACH(i, count) to[i] = kind == 0 ? a[i] + b[i] : a[i] * b[i];
}

// A vector repeated over x; kind: 0 sum, 1 product, 2 quotient
extern "C" __global__ void trtvlm_along(const float *x, const float *vector, float *to, size count, size width, int kind) {
    EACH(i, count) {
        const float other = vector[i % width];
        to[i] = kind == 0 ? x[i] + other : kind == 1 ? x[i] * other : x[i] / other;
    }
}

extern "C" __global__ void trtvlm_scale(const float *x, float *to, size count, float factor) {
    EACH(i, count) to[i] = x[i] * factor;
}

// kind: 0 relu, 1 silu, 2 gelu, 3 gelu by tanh, 4 gelu by a sigmoid
extern "C" __global__ void trtvlm_activation(const float *x, float *to, size count, int kind) {
    EACH(i, count) {
        const float v = x[i];
        float y;
        if (kind == 0) y = v > 0.0f || v != v ? v : 0.0f;
        else if (kind == 1) y = v / (1.0f + expf(-v));
        else if (kind == 2) y = 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
        else if (kind == 3) y = 0.5f * v * (1.0f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
        else y = v / (1.0f + expf(-1.702f * v));
        to[i] = y;
    }
}

// Sum over a block of THREADS threads, in all of them.
__device__ double sum_of_block(double value) {
    __shared__ double parts[THREADS / 32];
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0.0;
    for (int i = 0; i < THREADS / 32; i++) value += parts[i];
    return value;
}

// A block for each row; layer: 1 takes the mean off. bias may be null.
extern "C" __global__ void __launch_bounds__(THREADS)
    trtvlm_norm(const float *x, const float *weight, const float *bias, float *to, int width, float epsilon, int layer) {
    const float *row = x + (size)blockIdx.x * width;
    float *out = to + (size)blockIdx.x * width;
    double mean = 0.0;
    if (layer) {
        for (int i = threadIdx.x; i < width; i += THREADS) mean += row[i];
        mean = sum_of_block(mean) / width;
    }
    double variance = 0.0;
    for (int i = threadIdx.x; i < width; i += THREADS) variance += (row[i] - mean) * (row[i] - mean);
    variance = sum_of_block(variance) / width;
    const double scale = 1.0 / sqrt(variance + (double)epsilon);
    for (int i = threadIdx.x; i < width; i += THREADS)
        out[i] = (float)((row[i] - mean) * scale) * weight[i] + (bias ? bias[i] : 0.0f);
}

// Halves of a head turn together. x: [rows, heads, 2 * half]; positions: [rows]; frequencies: [half]; count: rows * heads * half
extern "C" __global__ void trtvlm_rotate(const float *x, const int *positions, const float *frequencies, float *to, size count,
                                         int heads, int half) {
    EACH(i, count) {
        const int at = i % half;
        const size head = i / half;
        float sine, cosine;
        sincosf((float)positions[head / heads] * frequencies[at], &sine, &cosine);
        const size place = head * 2 * half + at;
        const float low = x[place], high = x[place + half];
        to[place] = low * cosine - high * sine;
        to[place + half] = high * cosine + low * sine;
    }
}

// A block for each row of scores [heads, tokens, keys], in place; hidden scores become 0.
extern "C" __global__ void __launch_bounds__(THREADS)
    trtvlm_softmax(float *scores, int tokens, int keys, float scale, int causal) {
    float *row = scores + (size)blockIdx.x * keys;
    const int seen = causal ? min((int)(blockIdx.x % tokens) + 1, keys) : keys;
    __shared__ float parts[THREADS / 32];
    float most = -3.4e38f;
    for (int i = threadIdx.x; i < seen; i += THREADS) most = fmaxf(most, row[i] * scale);
    for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = most;
    __syncthreads();
    for (int i = 0; i < THREADS / 32; i++) most = fmaxf(most, parts[i]);
    double sum = 0.0;
    for (int i = threadIdx.x; i < seen; i += THREADS) {
        const float value = expf(row[i] * scale - most);
        row[i] = value;
        sum += value;
    }
    const float inverse = (float)(1.0 / sum_of_block(sum));
    for (int i = threadIdx.x; i < keys; i += THREADS) row[i] = i < seen ? row[i] * inverse : 0.0f;
}

// Rows of a table, by index. count: rows * width
extern "C" __global__ void trtvlm_rows(const float *table, const int *index, float *to, size count, size width) {
    EACH(i, count) to[i] = table[(size)index[i / width] * width + i % width];
}

// Largest magnitude and sum of magnitudes of each column of x [rows, width]. Grid (width / 32, parts), 256 threads: 8 rows of
// 32 columns at once, a part being `step` rows; absmax, sums: [parts, width]. Magnitudes are compared as their bits, whose
// order has NaN above infinity.
extern "C" __global__ void __launch_bounds__(THREADS)
    trtvlm_columns(const float *x, unsigned *absmax, double *sums, size rows, int width, int step) {
    const int column = blockIdx.x * 32 + threadIdx.x % 32;
    const size first = (size)blockIdx.y * step, last = min(first + step, rows);
    unsigned most = 0;
    double sum = 0.0;
    if (column < width)
        for (size row = first + threadIdx.x / 32; row < last; row += THREADS / 32) {
            const unsigned bits = __float_as_uint(x[row * width + column]) & 0x7fffffffu;
            most = max(most, bits);
            sum += __uint_as_float(bits);
        }
    __shared__ unsigned all_most[THREADS];
    __shared__ double all_sums[THREADS];
    all_most[threadIdx.x] = most, all_sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= 32 || column >= width) return;
    for (int i = threadIdx.x + 32; i < THREADS; i += 32) most = max(most, all_most[i]), sum += all_sums[i];
    absmax[(size)blockIdx.y * width + column] = most;
    sums[(size)blockIdx.y * width + column] = sum;
}
