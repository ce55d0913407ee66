// The end of attention by a ring: what warpgroups and the programs of a cluster have found, put together. Part of
// ring_attention.cu.

// A warpgroup's sums for the thread that has the same rows and channels in the first.
__device__ __forceinline__ void leave(const Softmax& own, const Shared& at) {
    const u32 group = threadIdx.x / 128, thread = threadIdx.x % 128 * 16;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
        const float* found = own.found + block * 4;
        put(at.left_by(group) + block * 128 * 16 + thread, make_float4(found[0], found[1], found[2], found[3]));
    }
    put(at.ends_left_by(group) + thread, make_float4(own.peak[0], own.total[0], own.peak[1], own.total[1]));
}

__device__ __forceinline__ void take_up(Softmax& own, const Shared& at, int group) {
    const u32 thread = threadIdx.x % 128 * 16;
    const float4 ends = get(at.ends_left_by(group) + thread);
    const float peaks[2] = {ends.x, ends.z}, totals[2] = {ends.y, ends.w};
    float mine[2], its[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const float peak = fmaxf(own.peak[row], peaks[row]);
        mine[row] = exp2_of(own.peak[row] - peak), its[row] = exp2_of(peaks[row] - peak);
        own.total[row] = own.total[row] * mine[row] + totals[row] * its[row];
        own.peak[row] = peak;
    }
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
        if (block == BLOCKS / 2) __syncwarp();  // not all loads at once, for which there are too few registers
        const float4 value = get(at.left_by(group) + block * 128 * 16 + thread);
        float* found = own.found + block * 4;
        found[0] = found[0] * mine[0] + value.x * its[0], found[1] = found[1] * mine[0] + value.y * its[0];
        found[2] = found[2] * mine[1] + value.z * its[1], found[3] = found[3] * mine[1] + value.w * its[1];
    }
}

// The first of a quad's rows in the tile; the other is the eighth below.
__device__ __forceinline__ int row_of(int quad) { return quad / 8 * 16 + quad % 8; }

__device__ __forceinline__ void put_there(u32 to, float4 value) {
    if constexpr (SPLITS == 1) put(to, value);
    else asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(value.x), "f"(value.y), "f"(value.z),
                      "f"(value.w)
                      : "memory");
}

// A program's sums to the programs that put their rows together.
__device__ __forceinline__ void send(const Softmax& own, const Shared& at, const Share& of) {
    const int quad = threadIdx.x / 4;
    float total[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        total[row] = own.total[row] + __shfl_xor_sync(~0u, own.total[row], 1);
        total[row] += __shfl_xor_sync(~0u, total[row], 2);
    }
    if ((of.tile * ROWS + row_of(quad)) / GROUP >= of.count) return;
    u32 to = at.part(SPLITS == 1 ? 0 : blockIdx.z);
    if constexpr (SPLITS > 1) asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(at.part(blockIdx.z)), "r"(quad % SPLITS));
    const u32 sums = to + quad / SPLITS * 64 + threadIdx.x % 4 * 16;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
        const float* found = own.found + block * 4;
        put_there(sums + block * BLOCK_BYTES, make_float4(found[0], found[1], found[2], found[3]));
    }
    if (threadIdx.x % 4 == 0) put_there(to + ENDS + quad / SPLITS * 16, make_float4(own.peak[0], total[0], own.peak[1], total[1]));
}

// Rows put together: a thread has a block of both rows of a quad.
__device__ __forceinline__ void write_found(const Shared& at, const Share& of, u16* out, long out_node, long out_head) {
    const int block = threadIdx.x % BLOCKS;
    for (int taken = threadIdx.x / BLOCKS; taken < TAKEN; taken += ATTENDING / BLOCKS) {
        const int quad = SPLITS == 1 ? taken : taken * SPLITS + blockIdx.z, first = of.tile * ROWS + row_of(quad);
        if (quad >= QUADS || first / GROUP >= of.count) break;
        float4 ends[SPLITS];
        float peak[2] = {-1e30f, -1e30f}, total[2] = {}, found[2][8] = {};
#pragma unroll
        for (int split = 0; split < SPLITS; ++split) {
            ends[split] = get(at.part(split) + ENDS + taken * 16);
            peak[0] = fmaxf(peak[0], ends[split].x), peak[1] = fmaxf(peak[1], ends[split].z);
        }
#pragma unroll
        for (int split = 0; split < SPLITS; ++split) {
            const float weights[2] = {exp2_of(ends[split].x - peak[0]), exp2_of(ends[split].z - peak[1])};
            total[0] += weights[0] * ends[split].y, total[1] += weights[1] * ends[split].w;
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                const float4 value = get(at.part(split) + block * BLOCK_BYTES + taken * 64 + pair * 16);
                found[0][pair * 2] += weights[0] * value.x, found[0][pair * 2 + 1] += weights[0] * value.y;
                found[1][pair * 2] += weights[1] * value.z, found[1][pair * 2 + 1] += weights[1] * value.w;
            }
        }
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
            const int row = first + lower * 8, node = row / GROUP;
            if (node >= of.count) break;
            const float share = total[lower] > 0.0f ? __fdividef(1.0f, total[lower]) : 0.0f;
            u32 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) pairs[i] = packed(found[lower][i * 2] * share, found[lower][i * 2 + 1] * share);
            u16* to = out + (of.start + node) * out_node + (of.head_kv * GROUP + row % GROUP) * out_head + block * 8;
            write(to, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
        }
    }
}
