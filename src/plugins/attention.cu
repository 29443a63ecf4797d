// Attention over an in-place key/value cache, with rotary positions and grouped heads (Vaswani et al. 2017; RoFormer,
// Su et al. 2021; the online softmax of Milakov and Gimelshein 2018; the split over keys of Flash-Decoding, Dao et al. 2023).
//
// The compiler's command line defines TYPE (0 float32, 1 float16, 2 bfloat16), HEADS, KV_HEADS, HEAD_DIM, ROTARY (0, 1),
// CAUSAL (0, 1), BIAS (0, 1), SCALE and, for caches in INT8, INT8_ROW, the bytes of a row. Arithmetic is float32 whatever
// the type.
//
// query, result: [batch, tokens, HEADS, HEAD_DIM]; key, value: [batch, tokens, KV_HEADS, HEAD_DIM]
// key_cache, value_cache: [batch, KV_HEADS, rows, HEAD_DIM], or INT8 [batch, KV_HEADS, rows, INT8_ROW]: a row's values in
// steps of its scale, which is float32 in its last 4 bytes (the reference's definition: graphs/src/int8_row.rs)
// positions: [batch, tokens]; past, sequence: [batch], rows filled before and after this call
// table: [rows, HEAD_DIM / 2, 2], cosine and sine of position * frequency
// bias: [HEADS, rows], what is added to the score of a key so many rows before the query's own (T5, Raffel et al. 2020)
typedef unsigned short half_bits;
#if TYPE == 0
typedef float element;
__device__ float load(element x) { return x; }
__device__ element store(float x) { return x; }
#elif TYPE == 1
typedef half_bits element;
__device__ float load(element x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
__device__ element store(float x) { element y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
#else
typedef half_bits element;
__device__ float load(element x) { return __uint_as_float((unsigned)x << 16); }
__device__ element store(float x) { element y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
#endif

// What the caches hold, and how many of it a row takes.
#ifdef INT8_ROW
typedef signed char cached;
#define ROW INT8_ROW
#else
typedef element cached;
#define ROW HEAD_DIM
#endif

#define HALF (HEAD_DIM / 2)
#define GROUP (HEADS / KV_HEADS)
#define LOWEST (-1e30f)
#define EVERYONE 0xffffffffu

// Dimension d of a head at a position: halves of the head turn together.
__device__ float rotated(const element *head, int d, const float *table, int position) {
    float x = load(head[d]);
#if ROTARY
    const int i = d < HALF ? d : d - HALF;
    const float cosine = table[(position * HALF + i) * 2], sine = table[(position * HALF + i) * 2 + 1];
    const float other = load(head[d < HALF ? d + HALF : d - HALF]);
    x = d < HALF ? x * cosine - other * sine : x * cosine + other * sine;
#endif
    return x;
}

// Whatever the positions are, only the table is read.
__device__ int place(int position, int rows) { return max(0, min(position, rows - 1)); }

// Keys that token t of a request sees: those up to its own row.
__device__ int visible(int t, int past, int sequence, int rows) {
    int count = CAUSAL ? min(past + t + 1, sequence) : sequence;
    return max(0, min(count, rows));
}

// What is added to the score of a key by its row and the query's; whatever the rows are, only the table is read.
__device__ float nearness(const float *bias, int head, int query, int key, int rows) {
#if BIAS
    return bias[(size_t)head * rows + place(query - key, rows)];
#else
    return 0.0f;
#endif
}

// Dimensions of a lane: LANE of them in a row.
#define LANE ((HEAD_DIM + 31) / 32)

#ifdef INT8_ROW
__device__ float scale_of(const cached *row) { return *reinterpret_cast<const float *>(row + ROW - 4); }

// Element `place` of a cache, which is dimension d of its row.
__device__ float kept(const cached *cache, size_t place, int d) { return (float)cache[place] * scale_of(cache + place - d); }

// The larger, or NaN if either is.
__device__ float larger(float most, float x) { return x > most || x != x ? x : most; }

// Four values in steps, from the bytes of one word: a byte over 128 is the end of a float32 near 2^23.
__device__ void unpack(unsigned bits, float *x) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        x[i] = __uint_as_float(__byte_perm(bits ^ 0x80808080u, 0x4b000000u, 0x7440 | i)) - 8388736.0f;
}

// One warp writes one row: element `lane + 32 i` of it is x[i].
__device__ void keep(const float *x, cached *row, int lane) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < LANE; i++) most = larger(most, fabsf(x[i]));
#pragma unroll
    for (int step = 16; step > 0; step /= 2) most = larger(most, __shfl_xor_sync(EVERYONE, most, step));
    const float scale = most / 127.0f;
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        const int d = lane + 32 * i;
        // NaN, of infinite scales, becomes 0, which such a scale makes NaN again.
        const int steps = scale > 0.0f ? max(-127, min(127, __float2int_rn(x[i] / scale))) : 0;
        if (d < ROW - 4) row[d] = d < HEAD_DIM ? steps : 0;
    }
    if (lane == 0) *reinterpret_cast<float *>(row + ROW - 4) = scale;
}
#else
__device__ float kept(const cached *cache, size_t place, int) { return load(cache[place]); }
#endif

// Writes the new keys, rotated, and values into the caches. Grid (tokens, batch), a multiple of 32 threads.
extern "C" __global__ void trtvlm_append(const element *key, const element *value, cached *key_cache, cached *value_cache,
                                  const int *positions, const int *past, const int *sequence, const float *table,
                                  int tokens, int rows) {
    const int t = blockIdx.x, request = blockIdx.y;
    const int row = past[request] + t;
    // What pads a shorter prompt is not part of it.
    if (row < 0 || row >= sequence[request] || row >= rows) return;
    const int position = ROTARY ? place(positions[request * tokens + t], rows) : 0;
    const size_t source = (size_t)(request * tokens + t) * KV_HEADS * HEAD_DIM;
#ifdef INT8_ROW
    const int lane = threadIdx.x % 32;
    // A warp takes a head's key or its value.
    for (int i = threadIdx.x / 32; i < 2 * KV_HEADS; i += blockDim.x / 32) {
        const int head = i / 2;
        const element *own = (i % 2 ? value : key) + source + head * HEAD_DIM;
        float x[LANE];
#pragma unroll
        for (int j = 0; j < LANE; j++) {
            const int d = lane + 32 * j;
            x[j] = d >= HEAD_DIM ? 0.0f : i % 2 ? load(own[d]) : rotated(own, d, table, position);
        }
        keep(x, (i % 2 ? value_cache : key_cache) + ((size_t)(request * KV_HEADS + head) * rows + row) * ROW, lane);
    }
#else
    for (int i = threadIdx.x; i < KV_HEADS * HEAD_DIM; i += blockDim.x) {
        const int head = i / HEAD_DIM, d = i % HEAD_DIM;
        const size_t target = ((size_t)(request * KV_HEADS + head) * rows + row) * HEAD_DIM + d;
        key_cache[target] = ROTARY ? store(rotated(key + source + head * HEAD_DIM, d, table, position)) : key[source + i];
        value_cache[target] = value[source + i];
    }
#endif
}

// One lane's part of a cache row, several elements in one load where the head divides evenly; gives the scale that they
// are still to be multiplied by.
__device__ float load_lane(const cached *row, int lane, float *x) {
#ifdef INT8_ROW
#if HEAD_DIM % 32 == 0 && LANE % 4 == 0
#pragma unroll
    for (int i = 0; i < LANE; i += 4) unpack(*reinterpret_cast<const unsigned *>(row + lane * LANE + i), x + i);
#elif HEAD_DIM % 32 == 0 && LANE == 2
    const short bits = *reinterpret_cast<const short *>(row + lane * 2);
    x[0] = (float)(signed char)(bits & 0xff), x[1] = (float)(bits >> 8);
#else
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        const int d = lane * LANE + i;
        x[i] = d < HEAD_DIM ? (float)row[d] : 0.0f;
    }
#endif
    return scale_of(row);
#elif HEAD_DIM % 32 == 0 && TYPE != 0 && LANE == 4
    const uint2 bits = *reinterpret_cast<const uint2 *>(row + lane * 4);
    x[0] = load(bits.x & 0xffff), x[1] = load(bits.x >> 16), x[2] = load(bits.y & 0xffff), x[3] = load(bits.y >> 16);
#elif HEAD_DIM % 32 == 0 && TYPE != 0 && LANE == 2
    const unsigned bits = *reinterpret_cast<const unsigned *>(row + lane * 2);
    x[0] = load(bits & 0xffff), x[1] = load(bits >> 16);
#else
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        const int d = lane * LANE + i;
        x[i] = d < HEAD_DIM ? load(row[d]) : 0.0f;
    }
#endif
#ifndef INT8_ROW
    return 1.0f;
#endif
}

// Cache rows of one block, and how many a warp loads before it uses the first.
#define CHUNK 64
#define WARPS 4
#ifdef INT8_ROW
#define AHEAD 8
#else
#define AHEAD 4
#endif

// A part of the keys for one query: the running maximum, the sum and the unnormalized mix go to `partial`
// [batch * tokens, HEADS, splits, HEAD_DIM + 2]. Grid (splits, HEADS, batch * tokens), WARPS warps.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    trtvlm_attend_part(const element *query, const cached *key_cache, const cached *value_cache, const int *positions,
                const int *past, const int *sequence, const float *table, const float *bias, float *partial, int tokens,
                int rows) {
    const int split = blockIdx.x, head = blockIdx.y, token = blockIdx.z;
    const int request = token / tokens, t = token % tokens;
    const int own_past = past[request], keys = visible(t, own_past, sequence[request], rows);
    const int start = split * CHUNK, end = min(start + CHUNK, keys);
    if (start >= keys) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int position = ROTARY ? place(positions[request * tokens + t], rows) : 0;
    const element *source = query + ((size_t)token * HEADS + head) * HEAD_DIM;
    float q[LANE], mix[LANE];
#pragma unroll
    for (int i = 0; i < LANE; i++) {
        const int d = lane * LANE + i;
        q[i] = d < HEAD_DIM ? rotated(source, d, table, position) * SCALE : 0.0f;
        mix[i] = 0.0f;
    }
    const size_t plane = (size_t)(request * KV_HEADS + head / GROUP) * rows;
    const cached *keys_of = key_cache + plane * ROW, *values_of = value_cache + plane * ROW;
    float most = LOWEST, sum = 0.0f;
    for (int first = start + warp * AHEAD; first < end; first += WARPS * AHEAD) {
        float k[AHEAD][LANE], v[AHEAD][LANE], key_scale[AHEAD], value_scale[AHEAD], score[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const size_t row = min(first + j, end - 1);
            key_scale[j] = load_lane(keys_of + row * ROW, lane, k[j]);
            value_scale[j] = load_lane(values_of + row * ROW, lane, v[j]);
        }
        float highest = most;
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            float dot = 0.0f;
#pragma unroll
            for (int i = 0; i < LANE; i++) dot += q[i] * k[j][i];
#pragma unroll
            for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(EVERYONE, dot, step);
            dot *= key_scale[j];
            score[j] = first + j < end ? dot + nearness(bias, head, own_past + t, first + j, rows) : LOWEST;
            highest = fmaxf(highest, score[j]);
        }
        const float shrink = __expf(most - highest);
        sum *= shrink;
#pragma unroll
        for (int i = 0; i < LANE; i++) mix[i] *= shrink;
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const float weight = first + j < end ? __expf(score[j] - highest) : 0.0f;
            sum += weight;
#pragma unroll
            for (int i = 0; i < LANE; i++) mix[i] += weight * value_scale[j] * v[j][i];
        }
        most = highest;
    }
    __shared__ float mosts[WARPS], sums[WARPS], mixes[WARPS][32 * LANE];
    if (lane == 0) mosts[warp] = most, sums[warp] = sum;
#pragma unroll
    for (int i = 0; i < LANE; i++) mixes[warp][lane * LANE + i] = mix[i];
    __syncthreads();
    float highest = LOWEST, total = 0.0f, factor[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, mosts[w]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) factor[w] = __expf(mosts[w] - highest), total += factor[w] * sums[w];
    float *target = partial + (((size_t)token * HEADS + head) * gridDim.x + split) * (HEAD_DIM + 2);
    for (int d = threadIdx.x; d < HEAD_DIM; d += blockDim.x) {
        float joined = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) joined += factor[w] * mixes[w][d];
        target[d] = joined;
    }
    if (threadIdx.x == 0) target[HEAD_DIM] = highest, target[HEAD_DIM + 1] = total;
}

// Joins the parts of a query. Grid (HEADS, batch * tokens), a multiple of 32 threads.
extern "C" __global__ void trtvlm_attend_join(const float *partial, element *result, const int *past, const int *sequence,
                                       int tokens, int rows, int splits) {
    const int head = blockIdx.x, token = blockIdx.y;
    const int request = token / tokens, t = token % tokens;
    const int keys = visible(t, past[request], sequence[request], rows);
    const int used = min(splits, (keys + CHUNK - 1) / CHUNK);
    const float *parts = partial + ((size_t)token * HEADS + head) * splits * (HEAD_DIM + 2);
    float highest = LOWEST, total = 0.0f;
    for (int s = 0; s < used; s++) highest = fmaxf(highest, parts[s * (HEAD_DIM + 2) + HEAD_DIM]);
    for (int s = 0; s < used; s++) {
        const float *part = parts + s * (HEAD_DIM + 2);
        total += __expf(part[HEAD_DIM] - highest) * part[HEAD_DIM + 1];
    }
    for (int d = threadIdx.x; d < HEAD_DIM; d += blockDim.x) {
        float joined = 0.0f;
        for (int s = 0; s < used; s++) {
            const float *part = parts + s * (HEAD_DIM + 2);
            joined += __expf(part[HEAD_DIM] - highest) * part[d];
        }
        result[((size_t)token * HEADS + head) * HEAD_DIM + d] = store(total > 0.0f ? joined / total : 0.0f);
    }
}

// Queries of one block and keys of one step; a warp has QUERIES / WARPS queries, a lane one key.
#define QUERIES 16
#define OWN (QUERIES / WARPS)
#define KEYS 32
// Rows of shared memory, padded so that lanes reading 16 bytes of different rows do not meet in a bank.
#define WIDTH ((HEAD_DIM + 3) / 4 * 4)
#define PADDED (WIDTH + 4)

// All keys for many queries. Grid (ceil(tokens / QUERIES), HEADS, batch), WARPS warps.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    trtvlm_attend_all(const element *query, const cached *key_cache, const cached *value_cache, const int *positions,
               const int *past, const int *sequence, const float *table, const float *bias, element *result, int tokens,
               int rows) {
    extern __shared__ float4 shared[];
    float *queries = reinterpret_cast<float *>(shared);
    float *keys = queries + QUERIES * WIDTH, *values = keys + KEYS * PADDED;
    const int first_query = blockIdx.x * QUERIES, head = blockIdx.y, request = blockIdx.z;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own_past = past[request], own_sequence = sequence[request];
    for (int i = threadIdx.x; i < QUERIES * WIDTH; i += blockDim.x) {
        const int t = first_query + i / WIDTH, d = i % WIDTH;
        float x = 0.0f;
        if (t < tokens && d < HEAD_DIM) {
            const int position = ROTARY ? place(positions[request * tokens + t], rows) : 0;
            x = rotated(query + ((size_t)(request * tokens + t) * HEADS + head) * HEAD_DIM, d, table, position) * SCALE;
        }
        queries[i] = x;
    }
    int limit[OWN], last = 0;
#pragma unroll
    for (int j = 0; j < OWN; j++) {
        const int t = first_query + warp * OWN + j;
        limit[j] = t < tokens ? visible(t, own_past, own_sequence, rows) : 0;
    }
    // The last query of the block sees the most.
    last = visible(min(first_query + QUERIES, tokens) - 1, own_past, own_sequence, rows);
    const size_t plane = (size_t)(request * KV_HEADS + head / GROUP) * rows;
    float most[OWN], sum[OWN], mix[OWN][LANE];
#pragma unroll
    for (int j = 0; j < OWN; j++) {
        most[j] = LOWEST, sum[j] = 0.0f;
#pragma unroll
        for (int i = 0; i < LANE; i++) mix[j][i] = 0.0f;
    }
    for (int start = 0; start < last; start += KEYS) {
        __syncthreads();
        for (int i = threadIdx.x; i < KEYS * WIDTH; i += blockDim.x) {
            const int row = i / WIDTH, d = i % WIDTH;
            const bool inside = start + row < last && d < HEAD_DIM;
            const size_t source = (plane + start + row) * ROW + d;
            keys[row * PADDED + d] = inside ? kept(key_cache, source, d) : 0.0f;
            values[row * PADDED + d] = inside ? kept(value_cache, source, d) : 0.0f;
        }
        __syncthreads();
        float score[OWN];
#pragma unroll
        for (int j = 0; j < OWN; j++) score[j] = 0.0f;
        const float4 *k = reinterpret_cast<const float4 *>(keys + lane * PADDED);
        const float4 *q = reinterpret_cast<const float4 *>(queries + warp * OWN * WIDTH);
#pragma unroll 8
        for (int d = 0; d < WIDTH / 4; d++) {
            const float4 b = k[d];
#pragma unroll
            for (int j = 0; j < OWN; j++) {
                const float4 a = q[j * (WIDTH / 4) + d];
                score[j] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
            }
        }
#pragma unroll
        for (int j = 0; j < OWN; j++) {
            const bool seen = start + lane < limit[j];
            const int own_row = own_past + first_query + warp * OWN + j;
            if (seen) score[j] += nearness(bias, head, own_row, start + lane, rows);
            float highest = seen ? score[j] : LOWEST;
#pragma unroll
            for (int step = 16; step > 0; step /= 2) highest = fmaxf(highest, __shfl_xor_sync(EVERYONE, highest, step));
            highest = fmaxf(highest, most[j]);
            const float shrink = __expf(most[j] - highest);
            score[j] = seen ? __expf(score[j] - highest) : 0.0f;
            float total = score[j];
#pragma unroll
            for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(EVERYONE, total, step);
            sum[j] = sum[j] * shrink + total;
            most[j] = highest;
#pragma unroll
            for (int i = 0; i < LANE; i++) mix[j][i] *= shrink;
        }
#pragma unroll 4
        for (int row = 0; row < KEYS; row++) {
            float weight[OWN];
#pragma unroll
            for (int j = 0; j < OWN; j++) weight[j] = __shfl_sync(EVERYONE, score[j], row);
#pragma unroll
            for (int i = 0; i < LANE; i++) {
                const int d = i * 32 + lane;
                const float v = d < WIDTH ? values[row * PADDED + d] : 0.0f;
#pragma unroll
                for (int j = 0; j < OWN; j++) mix[j][i] += weight[j] * v;
            }
        }
    }
#pragma unroll
    for (int j = 0; j < OWN; j++) {
        const int t = first_query + warp * OWN + j;
        if (t >= tokens) continue;
        element *target = result + ((size_t)(request * tokens + t) * HEADS + head) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < LANE; i++) {
            const int d = i * 32 + lane;
            if (d < HEAD_DIM) target[d] = store(sum[j] > 0.0f ? mix[j][i] / sum[j] : 0.0f);
        }
    }
}
