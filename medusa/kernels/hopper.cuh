// What the kernels in CUDA's C++ share: numbers of a whole warp, barriers in shared memory, where the tensor cores find a tile,
// and numbers of 16 bits. The launcher defines HALF_TYPE and IS_BFLOAT.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int ROW_BYTES = 128;  // of the swizzled layout: 64 numbers

struct alignas(128) TensorMap {
    char bytes[128];
};

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// A number that all threads of a warp have in common. So the compiler learns it: it then knows that they go one way, and keeps
// addresses and counters once a warp.
__device__ __forceinline__ int common(int number) { return __shfl_sync(~0u, number, 0); }

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool barrier_passed(u32 barrier, u32 parity) {
    u32 passed;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(passed)
        : "r"(barrier), "r"(parity)
        : "memory");
    return passed;
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Where the tensor cores find a tile: rows of 128 bytes, swizzled, eight rows apart 1,024 bytes.
__device__ __forceinline__ u64 operand(u32 address) {
    return (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)1 << 16 | address >> 4;
}

__device__ __forceinline__ float widened(u16 value) {
#if IS_BFLOAT
    return __uint_as_float((u32)value << 16);
#else
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
#endif
}

__device__ __forceinline__ u32 packed(float low, float high) {
    u32 pair;
    asm("cvt.rn." HALF_TYPE "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
