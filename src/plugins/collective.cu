// What the ranks of a divided network do together: each shares its part, and takes the sum of all parts in the order of
// the ranks (every rank gets the same bits), or all parts side by side.
//
// The compiler's command line defines TYPE (0 float32, 1 float16, 2 bfloat16). Sums are float32 whatever the type.
//
// A rank's memory holds two slots of SHARE bytes for each block; a block talks only to the blocks of its number. In one
// launch (SHARES and TAKES and WAITS) it puts its part into a slot, raises its flag at every other rank, waits for theirs
// and reads their slots. A slot is written again two rounds later: by then every rank has raised the flag of the round
// between, after it had read. The number of the round lives in device memory, so that a recorded launch can be replayed.
// Without WAITS the launches are ordered from outside, and the host says which slot.
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

#define LIMIT 8
#define BLOCKS 16
#define THREADS 512
#define SHARE 32768
#define PACK (16 / (int)sizeof(element))
#define SHARES 1
#define TAKES 2
#define WAITS 4

struct Group {
    // Of each rank: its slots [BLOCKS, 2, SHARE], and the rounds up to which others have shared, [LIMIT, BLOCKS].
    char *slots[LIMIT];
    unsigned *arrived[LIMIT];
    // This rank's own: rounds of each block, then whether it has given up, [BLOCKS, 2].
    unsigned *rounds;
    // Host memory: not 0 when the ranks are to stop; whom this rank waited for in vain, plus one.
    volatile unsigned *stop;
    volatile unsigned *late;
    // Nanoseconds to wait for others.
    unsigned long long patience;
    int rank, ranks;
};

union Pack {
    uint4 bits;
    element elements[PACK];
};

__device__ unsigned long long now() {
    unsigned long long time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

// Raises this block's flag at rank `other` and waits for that rank's; false if it does not come.
__device__ bool meet(const Group &group, int other, unsigned round) {
    unsigned *theirs = group.arrived[other] + group.rank * BLOCKS + blockIdx.x;
    const unsigned *mine = group.arrived[group.rank] + other * BLOCKS + blockIdx.x;
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(theirs), "r"(round) : "memory");
    unsigned long long start = 0;
    for (unsigned turn = 1;; turn++) {
        unsigned seen;
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(mine) : "memory");
        // Rounds may wrap around.
        if ((int)(seen - round) >= 0) return true;
        if (turn % 1024) continue;
        if (start == 0) start = now();
        if (*group.stop == 0 && now() - start < group.patience) continue;
        if (*group.stop == 0) *group.late = other + 1;
        return false;
    }
}

// Elements from `start` to `end`, at most `each` in a block and round; `width` 0: the sum, or else the parts are rows
// of so many elements, at the starts of input rows as wide as all ranks' together.
extern "C" __global__ void __launch_bounds__(THREADS) trtvlm_join(
    Group group, const element *input, element *output, long long start, long long end, int each, int width, int phase,
    int slot) {
    const bool waits = phase & WAITS;
    __shared__ int gone;
    if (threadIdx.x == 0) gone = waits ? group.rounds[BLOCKS + blockIdx.x] : 0;
    unsigned round = waits ? group.rounds[blockIdx.x] : slot;
    __syncthreads();
    bool alone = gone;
    const bool aligned = (((size_t)input | (size_t)output) & 15) == 0;
    const long long wide = (long long)width * group.ranks;
    for (long long at = start + (long long)blockIdx.x * each; at < end; at += (long long)gridDim.x * each) {
        const int size = (int)min((long long)each, end - at);
        if (waits) round++;
        const size_t place = ((size_t)blockIdx.x * 2 + round % 2) * SHARE;
        if (phase & SHARES) {
            uint4 *own = (uint4 *)(group.slots[group.rank] + place);
            for (int i = threadIdx.x * PACK; i < size; i += THREADS * PACK) {
                Pack pack;
                if (width == 0 && aligned && i + PACK <= size) {
                    pack.bits = *(const uint4 *)(input + at + i);
                } else {
#pragma unroll
                    for (int e = 0; e < PACK; e++) {
                        const long long from = at + min(i + e, size - 1);
                        pack.elements[e] = input[width == 0 ? from : from / width * wide + from % width];
                    }
                }
                own[i / PACK] = pack.bits;
            }
        }
        if (waits) {
            __threadfence_system();
            __syncthreads();
            if (threadIdx.x < group.ranks && threadIdx.x != group.rank && !alone)
                if (!meet(group, threadIdx.x, round)) gone = 1;
            __syncthreads();
            // Whoever has given up once no longer waits, so that all that is queued ends soon.
            alone = gone;
        }
        if (phase & TAKES) {
            for (int i = threadIdx.x * PACK; i < size; i += THREADS * PACK) {
                float sums[PACK] = {};
                Pack pack;
                for (int other = 0; other < group.ranks; other++) {
                    pack.bits = __ldcv((const uint4 *)(group.slots[other] + place) + i / PACK);
#pragma unroll
                    for (int e = 0; e < PACK; e++) {
                        const long long to = at + i + e;
                        if (width == 0)
                            sums[e] += load(pack.elements[e]);
                        else if (i + e < size)
                            output[to / width * wide + other * width + to % width] = pack.elements[e];
                    }
                }
                if (width != 0) continue;
#pragma unroll
                for (int e = 0; e < PACK; e++) pack.elements[e] = store(sums[e]);
                if (aligned && i + PACK <= size) {
                    *(uint4 *)(output + at + i) = pack.bits;
                } else {
#pragma unroll
                    for (int e = 0; e < PACK; e++)
                        if (i + e < size) output[at + i + e] = pack.elements[e];
                }
            }
        }
    }
    __syncthreads();
    if (waits && threadIdx.x == 0) group.rounds[blockIdx.x] = round, group.rounds[BLOCKS + blockIdx.x] = gone;
}

// For ways that take parts as one piece: rows of `width` elements from the starts of rows as wide as all ranks' together.
extern "C" __global__ void __launch_bounds__(THREADS)
    trtvlm_gather_rows(const element *input, element *output, long long count, int width, int ranks) {
    const long long wide = (long long)width * ranks;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < count; i += (long long)gridDim.x * THREADS)
        output[i] = input[i / width * wide + i % width];
}

// And for ways that give them one rank after the other, count elements each: side by side.
extern "C" __global__ void __launch_bounds__(THREADS)
    trtvlm_join_rows(const element *all, element *output, long long count, int width, int ranks) {
    const long long wide = (long long)width * ranks;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < count * ranks; i += (long long)gridDim.x * THREADS) {
        const long long other = i / count, at = i % count;
        output[at / width * wide + other * width + at % width] = all[i];
    }
}
