// The greedy choice: the place of the largest logit of each row, the first of equals. Grid (batch), 1024 threads.
// logits: [batch, vocab]; sequence: [batch], rows of the cache filled; next_tokens, next_sequence: [batch].
#define THREADS 1024
#define EVERYONE 0xffffffffu

__device__ void better(float &value, int &place, float other_value, int other_place) {
    if (other_value > value || (other_value == value && other_place < place)) value = other_value, place = other_place;
}

__device__ void reduce(float &value, int &place) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const float other_value = __shfl_xor_sync(EVERYONE, value, step);
        const int other_place = __shfl_xor_sync(EVERYONE, place, step);
        better(value, place, other_value, other_place);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    trtvlm_choose(const float *logits, const int *sequence, int *next_tokens, int *next_sequence, int vocab) {
    const float *row = logits + (size_t)blockIdx.x * vocab;
    float value = -3.4e38f;
    int place = vocab - 1;
    for (int i = threadIdx.x; i < vocab; i += THREADS) better(value, place, row[i], i);
    reduce(value, place);
    __shared__ float values[THREADS / 32];
    __shared__ int places[THREADS / 32];
    if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = value, places[threadIdx.x / 32] = place;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    value = values[threadIdx.x], place = places[threadIdx.x];
    reduce(value, place);
    if (threadIdx.x == 0) next_tokens[blockIdx.x] = place, next_sequence[blockIdx.x] = sequence[blockIdx.x] + 1;
}
