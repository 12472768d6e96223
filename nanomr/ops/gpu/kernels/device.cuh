// The few instructions that C has no name for, as inline PTX: no CUDA header is needed. Compiled in front of every
// kernel file. On a machine without a GPU, tests/cuda_on_cpu.h offers the same names to g++ in its place.

typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;

#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]  // a pattern of wgmma's swizzle

struct bf16 { uint16_t bits; };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((uint32_t)x.bits << 16); }

__device__ __forceinline__ void assign(float& to, float x) { to = x; }
__device__ __forceinline__ void assign(bf16& to, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }

// To 2 units in the last place.
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }

__device__ __forceinline__ uint64_t multiply_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// 16 bytes to shared memory, past the registers; zeros where not `inside` (`from` is then not read). Through L1 (.ca):
// the nine taps of a convolution read the same pixels.
__device__ __forceinline__ void copy16_async(void* to, const void* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most `pending` of this thread's groups are under way.
template <int pending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8. Each lane gets two
// neighbours of row lane / 4 of every matrix, or, transposed, of its column lane / 4.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  if (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// d (16x8, float) += a (16x16) b (16x8), bf16, distributed over the lanes.
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- Hopper's matrix product (sm_90a): four warps multiply what lies in shared memory, while they do something else --

#ifdef WGMMA

// Writes of this thread to shared memory, copies that it has waited for among them, are seen by wgmma from then on.
__device__ __forceinline__ void wgmma_sees_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product that takes registers which something else wrote.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most `pending` of these four warps' groups are under way.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Whoever reads d behind wgmma_wait<0> does not do so before it.
template <int columns>
__device__ __forceinline__ void wgmma_done(float (&d)[columns][4]) {
#pragma unroll
  for (int j = 0; j < columns; j++)
    asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3]) :: "memory");
}

// d (64 x 8 columns, float) += a (64 x 16) b (16 x 8 columns), bf16, or = unless `add`; a and b by their descriptors. A
// warp has 16 rows of d, distributed over its lanes as multiply_add's. `a_by_k`: neighbours in memory are neighbours of
// a's rows, not of the sum's terms; b_by_k likewise.
#define WGMMA_FOUR(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define WGMMA_EIGHT(j) WGMMA_FOUR(j), WGMMA_FOUR(j + 1), WGMMA_FOUR(j + 2), WGMMA_FOUR(j + 3), \
    WGMMA_FOUR(j + 4), WGMMA_FOUR(j + 5), WGMMA_FOUR(j + 6), WGMMA_FOUR(j + 7)

template <bool a_by_k, bool b_by_k>
__device__ __forceinline__ void wgmma(float (&d)[8][4], uint64_t a, uint64_t b, bool add) {
  asm volatile("{.reg .pred more; setp.ne.s32 more, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
               "%32, %33, more, 1, 1, %35, %36;}"
               : WGMMA_EIGHT(0) : "l"(a), "l"(b), "r"((int)add), "n"(a_by_k), "n"(b_by_k));
}

template <bool a_by_k, bool b_by_k>
__device__ __forceinline__ void wgmma(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
  asm volatile("{.reg .pred more; setp.ne.s32 more, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
               "%64, %65, more, 1, 1, %67, %68;}"
               : WGMMA_EIGHT(0), WGMMA_EIGHT(8) : "l"(a), "l"(b), "r"((int)add), "n"(a_by_k), "n"(b_by_k));
}

#endif
