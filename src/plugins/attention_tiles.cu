// The same attention for many queries on tensor cores (FlashAttention-2, Dao 2023): a warp has 16 queries, the keys go by
// in steps of 64 through shared memory, scores and their softmax stay in registers. Compiled behind attention.cu, for
// 16-bit types and heads that TILED allows.
#define TILED (TYPE != 0 && HEAD_DIM % 16 == 0 && HEAD_DIM <= 128)
#if TILED

#define TILE_QUERIES 64
#define TILE_KEYS 64
// Rows of shared memory in elements, padded by 16 bytes so that 8 rows read at once lie in different banks.
#define STRIDE (HEAD_DIM + 8)
#define STEPS (HEAD_DIM / 16)

#if TYPE == 1
#define MULTIPLY "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
#define MULTIPLY "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif

// c += a b for a 16 x 16, b 16 x 8.
__device__ void multiply(float *c, const unsigned *a, unsigned b0, unsigned b1) {
    asm volatile(MULTIPLY "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices; each lane names the start of one row.
__device__ void load_matrices(unsigned *r, const element *row) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ void load_transposed(unsigned *r, const element *row) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ unsigned pair(float low, float high) { return (unsigned)store(low) | (unsigned)store(high) << 16; }

// Eight elements of a cache row in the type that is multiplied.
__device__ uint4 load_eight(const cached *row, int d) {
#ifdef INT8_ROW
    float x[8];
    const float scale = scale_of(row);
    unpack(*reinterpret_cast<const unsigned *>(row + d), x), unpack(*reinterpret_cast<const unsigned *>(row + d + 4), x + 4);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] *= scale;
    return uint4{pair(x[0], x[1]), pair(x[2], x[3]), pair(x[4], x[5]), pair(x[6], x[7])};
#else
    return *reinterpret_cast<const uint4 *>(row + d);
#endif
}

// Grid (ceil(tokens / TILE_QUERIES), HEADS, batch), WARPS warps.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    trtvlm_attend_tiles(const element *query, const cached *key_cache, const cached *value_cache, const int *positions,
                        const int *past, const int *sequence, const float *table, const float *bias, element *result,
                        int tokens, int rows) {
    __shared__ __align__(16) element keys[TILE_KEYS * STRIDE];
    __shared__ __align__(16) element values[TILE_KEYS * STRIDE];
    // The last queries see the most keys and go first.
    const int first_query = (gridDim.x - 1 - blockIdx.x) * TILE_QUERIES, head = blockIdx.y, request = blockIdx.z;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own_past = past[request], own_sequence = sequence[request];
    // Rotated queries pass through the room of the keys into registers.
    for (int i = threadIdx.x; i < TILE_QUERIES * HEAD_DIM; i += blockDim.x) {
        const int t = first_query + i / HEAD_DIM, d = i % HEAD_DIM;
        float x = 0.0f;
        if (t < tokens) {
            const int position = ROTARY ? place(positions[request * tokens + t], rows) : 0;
            x = rotated(query + ((size_t)(request * tokens + t) * HEADS + head) * HEAD_DIM, d, table, position);
        }
        keys[i / HEAD_DIM * STRIDE + d] = store(x);
    }
    __syncthreads();
    unsigned q[STEPS][4];
#pragma unroll
    for (int step = 0; step < STEPS; step++)
        load_matrices(q[step], keys + (warp * 16 + lane % 16) * STRIDE + step * 16 + lane / 16 * 8);
    // A lane has two rows of the scores: lane / 4 and 8 below.
    const int row = first_query + warp * 16 + lane / 4;
    const int limit[2] = {row < tokens ? visible(row, own_past, own_sequence, rows) : 0,
                          row + 8 < tokens ? visible(row + 8, own_past, own_sequence, rows) : 0};
    const int last = visible(min(first_query + TILE_QUERIES, tokens) - 1, own_past, own_sequence, rows);
    const size_t plane = (size_t)(request * KV_HEADS + head / GROUP) * rows;
    float mix[HEAD_DIM / 8][4], most[2] = {LOWEST, LOWEST}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; i++) mix[i][0] = mix[i][1] = mix[i][2] = mix[i][3] = 0.0f;
    for (int start = 0; start < last; start += TILE_KEYS) {
        __syncthreads();
        for (int i = threadIdx.x; i < TILE_KEYS * (HEAD_DIM / 8); i += blockDim.x) {
            const int key = i / (HEAD_DIM / 8), d = i % (HEAD_DIM / 8) * 8;
            uint4 k = {0, 0, 0, 0}, v = {0, 0, 0, 0};
            if (start + key < last) {
                const size_t source = (plane + start + key) * ROW;
                k = load_eight(key_cache + source, d);
                v = load_eight(value_cache + source, d);
            }
            *reinterpret_cast<uint4 *>(keys + key * STRIDE + d) = k;
            *reinterpret_cast<uint4 *>(values + key * STRIDE + d) = v;
        }
        __syncthreads();
        float score[TILE_KEYS / 8][4];
#pragma unroll
        for (int n = 0; n < TILE_KEYS / 8; n++) score[n][0] = score[n][1] = score[n][2] = score[n][3] = 0.0f;
#pragma unroll
        for (int n = 0; n < TILE_KEYS / 16; n++) {
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                unsigned k[4];
                load_matrices(k, keys + (n * 16 + lane % 8 + lane / 16 * 8) * STRIDE + step * 16 + lane / 8 % 2 * 8);
                multiply(score[2 * n], q[step], k[0], k[1]);
                multiply(score[2 * n + 1], q[step], k[2], k[3]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float highest = most[half];
#pragma unroll
            for (int n = 0; n < TILE_KEYS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float &s = score[n][half * 2 + i];
                    const int key = start + n * 8 + lane % 4 * 2 + i, own_row = own_past + row + half * 8;
                    s = key < limit[half] ? s * SCALE + nearness(bias, head, own_row, key, rows) : LOWEST;
                    highest = fmaxf(highest, s);
                }
            }
            highest = fmaxf(highest, __shfl_xor_sync(EVERYONE, highest, 1));
            highest = fmaxf(highest, __shfl_xor_sync(EVERYONE, highest, 2));
            const float shrink = __expf(most[half] - highest);
            float total = 0.0f;
#pragma unroll
            for (int n = 0; n < TILE_KEYS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float &s = score[n][half * 2 + i];
                    s = s > LOWEST ? __expf(s - highest) : 0.0f;
                    total += s;
                }
            }
            total += __shfl_xor_sync(EVERYONE, total, 1);
            total += __shfl_xor_sync(EVERYONE, total, 2);
            sum[half] = sum[half] * shrink + total;
            most[half] = highest;
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 8; i++) mix[i][half * 2] *= shrink, mix[i][half * 2 + 1] *= shrink;
        }
#pragma unroll
        for (int n = 0; n < TILE_KEYS / 16; n++) {
            const unsigned shares[4] = {pair(score[2 * n][0], score[2 * n][1]), pair(score[2 * n][2], score[2 * n][3]),
                                        pair(score[2 * n + 1][0], score[2 * n + 1][1]),
                                        pair(score[2 * n + 1][2], score[2 * n + 1][3])};
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 16; i++) {
                unsigned v[4];
                load_transposed(v, values + (n * 16 + lane % 16) * STRIDE + i * 16 + lane / 16 * 8);
                multiply(mix[2 * i], shares, v[0], v[1]);
                multiply(mix[2 * i + 1], shares, v[2], v[3]);
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int t = row + half * 8;
        if (t >= tokens) continue;
        const float factor = sum[half] > 0.0f ? 1.0f / sum[half] : 0.0f;
        element *target = result + ((size_t)(request * tokens + t) * HEADS + head) * HEAD_DIM + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 8; i++)
            *reinterpret_cast<unsigned *>(target + i * 8) = pair(mix[i][half * 2] * factor, mix[i][half * 2 + 1] * factor);
    }
}
#endif
