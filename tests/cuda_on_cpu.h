// Runs CUDA C kernels on the CPU, one block after another, to find the mistakes that a GPU would hide or turn into rare
// wrong numbers. It stands in for nanomr/ops/gpu/kernels/device.cuh: the kernel file itself is compiled unchanged, by g++.
//
// One fiber per CUDA thread. It runs until it reaches a barrier or a warp-wide instruction, then hands over. What makes
// a run an honest test:
// - between two block barriers each warp runs alone, in random order, and so do the lanes between two warp-wide
//   instructions: results that need a missing barrier are wrong;
// - a target of an asynchronous copy holds NaN until the copy is waited for; so does dynamic shared memory at the start
//   of a block, and what lies behind it is checked at the end;
// - a barrier that only some threads reach ends the launch with an error that names both places;
// - wgmma reads its descriptors as PTX ISA documents them, when it is started or when it is waited for, at random, and
//   only what a proxy fence has shown it; its sums are NaN until they are waited for.
//
// Not seen: bank conflicts, speed, the memory model between blocks, mistakes in device.cuh's inline PTX.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another
#define DYNAMIC_SHARED(name) unsigned char* const name = emu::shared

inline int min(int a, int b) { return a < b ? a : b; }
struct float2 { float x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }

struct Dim3 { unsigned x = 1, y = 1, z = 1; };
static Dim3 blockIdx, blockDim, gridDim, threadIdx;

namespace emu {

enum State { RUNNING, AT_BARRIER, AT_COLLECTIVE, RETURNED };

using Action = void (*)(int first);  // does a warp-wide instruction for the threads first .. first + 31

struct Copy { void* to; const void* from; bool inside; };

// A matrix product of four warps, as one of them sees it: its 16 rows.
struct Product {
  bool a_by_k, b_by_k, add;
  uint64_t a, b;
  int columns;
  std::vector<float> from_a, from_b;  // 16 x 16, 16 x columns: empty until they are read
};

struct Thread {
  ucontext_t start;
  jmp_buf at;
  bool begun;
  std::unique_ptr<char[]> stack{new char[STACK]};
  Dim3 index;
  State state;
  const char* what;  // the instruction it waits at, and where
  int line;
  Action action;
  const void* in[4];  // operands of a warp-wide instruction; they live on the threads' stacks
  void* out;
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;                 // copies not committed yet
  std::vector<unsigned char*> unseen;     // 16 bytes each, copied and not shown to wgmma yet
  float* sums;                            // of the products under way
  std::vector<float> hidden;              // what they will be
  std::vector<std::vector<Product>> products;  // committed, oldest first: lane 0 has its warp's
  std::vector<Product> begun_products;
  bool fenced;
  uint64_t issued;  // what four warps do together must be the same
  static constexpr size_t STACK = 1 << 16;
};

static std::vector<Thread> threads;
static Thread* self;
static ucontext_t entry_context;
static jmp_buf scheduler;
using Kernel = void (*)(void** arguments);
static Kernel kernel;
static void** arguments;
static unsigned char* shared;
static size_t shared_size;
static std::vector<unsigned char> seen_by_wgmma;  // of the shared memory
static std::string failure;  // of a thread; ends the launch

// ucontext only makes the fibers; setjmp and longjmp switch between them, without its system calls.
static void run_fiber() {
  kernel(arguments);
  self->state = RETURNED;
  longjmp(scheduler, 1);
}

inline void resume(Thread& t) {
  self = &t;
  threadIdx = t.index;
  t.state = RUNNING;
  if (setjmp(scheduler)) return;
  if (t.begun) longjmp(t.at, 1);
  t.begun = true;
  setcontext(&t.start);
}

inline void hand_over(State state, const char* what, int line) {
  self->state = state;
  self->what = what;
  self->line = line;
  if (!setjmp(self->at)) longjmp(scheduler, 1);
}

inline void collective(const char* what, int line, Action action) {
  self->action = action;
  hand_over(AT_COLLECTIVE, what, line);
}

inline void fail(const char* what) {
  failure = what;
  hand_over(RETURNED, what, 0);
}

static std::string place(int i) {
  const Thread& t = threads[i];
  std::string where = t.state == RETURNED ? "has returned" : "waits at " + std::string(t.what);
  if (t.state != RETURNED && t.line) where += " of line " + std::to_string(t.line);
  return "thread " + std::to_string(i) + " " + where;
}

inline bool together(int i, int j) {
  const Thread &a = threads[i], &b = threads[j];
  return a.state == b.state && (a.state == RETURNED || (a.line == b.line && !strcmp(a.what, b.what)));
}

static uint64_t random_state;
inline unsigned random_below(unsigned n) {  // good enough to mix an order up
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return (random_state >> 33) % n;
}
inline void shuffle(std::vector<int>& v) {
  for (size_t i = v.size(); i > 1; i--) std::swap(v[i - 1], v[random_below(i)]);
}

// An empty string, or what went wrong.
static std::string run_block(int count) {
  std::vector<int> warps((count + 31) / 32);
  for (size_t w = 0; w < warps.size(); w++) warps[w] = 32 * w;
  while (true) {
    shuffle(warps);
    for (int first : warps) {
      const int last = min(count, first + 32), lanes = last - first;
      do {
        const int turn = random_below(lanes);
        for (int i = 0; i < lanes; i++) {
          Thread& t = threads[first + (i + turn) % lanes];
          if (t.state != RETURNED) resume(t);
          if (!failure.empty()) return failure;
        }
        for (int i = first; i < last; i++)
          if (!together(first, i)) return "divergent warp: " + place(first) + ", " + place(i);
        if (threads[first].state == AT_COLLECTIVE && threads[first].action) {
          if (lanes < 32) return "a warp-wide instruction in a warp of " + std::to_string(lanes) + " threads";
          threads[first].action(first);
          if (!failure.empty()) return failure;
        }
      } while (threads[first].state == AT_COLLECTIVE);
    }
    for (int i = 0; i < count; i++)
      if (!together(0, i)) return "divergent barrier: " + place(0) + ", " + place(i);
    for (int i = 0; i < count; i++)
      if (threads[i].issued != threads[i / 128 * 128].issued) return "four warps that do not start the same products";
    if (threads[0].state == RETURNED) return "";
  }
}

static std::string launch(Dim3 grid, Dim3 block, size_t shared_bytes) {
  gridDim = grid, blockDim = block, shared_size = shared_bytes;
  failure.clear();
  const int count = block.x * block.y * block.z;
  if (count > 1024) return "a block has at most 1024 threads";
  if ((int)threads.size() < count) threads.resize(count);
  constexpr int GUARD = 16384;  // behind the dynamic shared memory
  std::unique_ptr<unsigned char[]> storage(new unsigned char[shared_bytes + 2 * GUARD]);
  shared = (unsigned char*)(((uintptr_t)storage.get() + 1023) & ~(uintptr_t)1023);
  std::vector<int> blocks(grid.x * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); i++) blocks[i] = i;
  shuffle(blocks);
  for (int b : blocks) {
    blockIdx.x = b % grid.x, blockIdx.y = b / grid.x % grid.y, blockIdx.z = b / grid.x / grid.y;
    memset(shared, 0xff, shared_bytes + GUARD);
#ifdef WGMMA
    seen_by_wgmma.assign(shared_bytes, 0xff);
#endif
    for (int i = 0; i < count; i++) {
      Thread& t = threads[i];
      t.index.x = i % block.x, t.index.y = i / block.x % block.y, t.index.z = i / block.x / block.y;
      t.begun = false, t.state = RUNNING, t.groups.clear(), t.open.clear();
      t.unseen.clear(), t.hidden.clear(), t.products.clear(), t.begun_products.clear(), t.fenced = false, t.issued = 0;
      getcontext(&t.start);
      t.start.uc_stack.ss_sp = t.stack.get(), t.start.uc_stack.ss_size = Thread::STACK, t.start.uc_link = nullptr;
      makecontext(&t.start, run_fiber, 0);
    }
    const std::string problem = run_block(count);
    if (!problem.empty()) return problem;
    for (int i = 0; i < GUARD; i++)
      if (shared[shared_bytes + i] != 0xff) return "a write behind the dynamic shared memory";
  }
  return "";
}

// The driver's calling convention: an array of pointers to the arguments.
template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*(std::remove_reference_t<A>*)arguments[I]...);
}
template <class... A>
void call(void (*kernel)(A...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<A...>());
}

static int run(const int* geometry, unsigned seed, char* message, void** given, Kernel function) {
  const unsigned* g = (const unsigned*)geometry;
  random_state = seed, kernel = function, arguments = given;
  const std::string problem = launch({g[0], g[1], g[2]}, {g[3], g[4], g[5]}, g[6]);
  snprintf(message, 500, "%s", problem.c_str());
  return !problem.empty();
}

}  // namespace emu

#define __syncthreads() emu::hand_over(emu::AT_BARRIER, "__syncthreads", __LINE__)
#define __syncwarp() emu::collective("__syncwarp", __LINE__, nullptr)

template <class T>
T shuffle_xor_(T value, int mask, int line) {
  T result;
  emu::self->in[0] = &value, emu::self->in[1] = &mask, emu::self->out = &result;
  emu::collective("__shfl_xor_sync", line, [](int first) {
    for (int i = 0; i < 32; i++) {
      emu::Thread& t = emu::threads[first + i];
      *(T*)t.out = *(const T*)emu::threads[first + (i ^ *(const int*)t.in[1])].in[0];
    }
  });
  return result;
}
#define __shfl_xor_sync(all, value, mask) shuffle_xor_(value, mask, __LINE__)

// --- what device.cuh offers, with the same names ---------------------------------------------------------------------

struct bf16 { uint16_t bits; };

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

inline void assign(float& to, float x) { to = x; }
inline void assign(bf16& to, float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  to.bits = std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline float quotient(float a, float b) { return a / b; }

inline uint64_t multiply_high(uint64_t a, uint64_t b) { return (unsigned __int128)a * b >> 64; }

inline void copy16_async(void* to, const void* from, bool inside) {
  if (((uintptr_t)to | (uintptr_t)from) % 16) emu::fail("an asynchronous copy that is not aligned to 16 bytes");
  if ((uint8_t*)to < emu::shared || (uint8_t*)to + 16 > emu::shared + emu::shared_size)
    emu::fail("an asynchronous copy that does not go to shared memory");
  memset(to, 0xff, 16);
#ifdef WGMMA
  memset(&emu::seen_by_wgmma[(uint8_t*)to - emu::shared], 0xff, 16);
#endif
  emu::self->open.push_back({to, from, inside});
}

inline void copy_commit() {
  emu::self->groups.push_back(std::move(emu::self->open));
  emu::self->open.clear();
}

// Wait until at most `pending` of this thread's groups are under way.
template <int pending>
inline void copy_wait() {
  auto& groups = emu::self->groups;
  while ((int)groups.size() > pending) {
    for (const emu::Copy& c : groups.front()) {
      c.inside ? memcpy(c.to, c.from, 16) : memset(c.to, 0, 16);
#ifdef WGMMA
      emu::self->unseen.push_back((unsigned char*)c.to);
#endif
    }
    groups.erase(groups.begin());
  }
}

// Four 8x8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8. Each lane gets two
// neighbours of row lane / 4 of every matrix, or, transposed, of its column lane / 4.
template <bool transposed>
inline void load_matrices(uint32_t (&registers)[4], const void* row) {
  emu::self->in[0] = row, emu::self->out = registers;
  emu::collective(transposed ? "ldmatrix.trans" : "ldmatrix", 0, [](int first) {
    for (int lane = 0; lane < 32; lane++)
      for (int m = 0; m < 4; m++) {
        uint16_t pair[2];
        for (int k = 0; k < 2; k++) {
          const int i = transposed ? 2 * (lane % 4) + k : lane / 4, j = transposed ? lane / 4 : 2 * (lane % 4) + k;
          pair[k] = ((const uint16_t*)emu::threads[first + 8 * m + i].in[0])[j];
        }
        memcpy((uint32_t*)emu::threads[first + lane].out + m, pair, 4);
      }
  });
}

// d (16x8, float) += a (16x16) b (16x8), bf16, distributed over the lanes as mma.sync.m16n8k16 does.
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  emu::self->in[0] = a, emu::self->in[1] = b, emu::self->out = d;
  emu::collective("mma", 0, [](int first) {
    float a[16][16], b[16][8], d[16][8] = {};
    for (int lane = 0; lane < 32; lane++) {
      const bf16* from_a = (const bf16*)emu::threads[first + lane].in[0];
      const bf16* from_b = (const bf16*)emu::threads[first + lane].in[1];
      const int row = lane / 4, pair = 2 * (lane % 4);
      for (int k = 0; k < 2; k++) {
        for (int r = 0; r < 4; r++) a[row + 8 * (r % 2)][pair + 8 * (r / 2) + k] = to_float(from_a[2 * r + k]);
        for (int r = 0; r < 2; r++) b[pair + 8 * r + k][row] = to_float(from_b[2 * r + k]);
      }
    }
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < 16; k++)
        for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < 32; lane++)
      for (int e = 0; e < 4; e++)
        ((float*)emu::threads[first + lane].out)[e] += d[lane / 4 + 8 * (e / 2)][2 * (lane % 4) + e % 2];
  });
}

// --- wgmma: four warps, matrices in shared memory by their descriptors ------------------------------------------------

inline uint32_t shared_address(const void* p) { return (uint32_t)((unsigned char*)p - emu::shared) + 1024; }

inline void wgmma_sees_writes() {
  for (unsigned char* p : emu::self->unseen) memcpy(&emu::seen_by_wgmma[p - emu::shared], p, 16);
  emu::self->unseen.clear();
}

inline void wgmma_fence() { emu::self->fenced = true; }

namespace emu {

// Element (i, k) of a matrix whose rows i belong to the result and whose columns k are summed over, 128-byte swizzle.
// PTX ISA, canonical layouts, in units of 16 bytes: K-major ((8, n), 2) : ((8, stride), 1), MN-major ((8, n), (8, k)) :
// ((1, leading), (8, stride)). Bits of a descriptor: 0-13 address, 16-29 leading, 32-45 stride (all / 16), 49-51 base
// offset, 62-63 swizzle.
inline float element(uint64_t descriptor, bool by_k, int i, int k) {
  const uint32_t start = (descriptor & 0x3fff) * 16, leading = (descriptor >> 16 & 0x3fff) * 16,
                 stride = (descriptor >> 32 & 0x3fff) * 16;
  if (descriptor >> 62 != 1 || descriptor >> 46 & 0xffff) failure = "wgmma: not a descriptor of 128-byte swizzle";
  if (start / 128 % 8) failure = "wgmma: a matrix that does not begin with a row of the swizzle's pattern";
  uint32_t at = by_k ? start + i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128
                     : start + i / 8 * stride + i % 8 * 128 + k * 2;
  at ^= at / 128 % 8 * 16;
  if (at < 1024 || at - 1024 + 2 > shared_size) {
    failure = "wgmma reads outside of shared memory";
    return 0.f;
  }
  bf16 x;
  memcpy(&x, &seen_by_wgmma[at - 1024], 2);
  return to_float(x);
}

inline void read(Product& p, int first) {
  if (!p.from_a.empty()) return;
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++) p.from_a.push_back(element(p.a, p.a_by_k, first / 32 % 4 * 16 + i, k));
  for (int k = 0; k < 16; k++)
    for (int j = 0; j < p.columns; j++) p.from_b.push_back(element(p.b, p.b_by_k, j, k));
}

// Thread t of a warp holds of its 16 rows: row t / 4 + 8 (e / 2), column 8 j + 2 (t % 4) + e % 2 in d[4 j + e].
inline void finish(Product& p, int first) {
  read(p, first);
  for (int lane = 0; lane < 32; lane++)
    for (int e = 0; e < p.columns / 2; e++) {
      const int row = lane / 4 + 8 * (e / 2 % 2), column = e / 4 * 8 + 2 * (lane % 4) + e % 2;
      float sum = 0.f;
      for (int k = 0; k < 16; k++) sum += p.from_a[16 * row + k] * p.from_b[k * p.columns + column];
      float& to = threads[first + lane].hidden[e];
      to = p.add ? to + sum : sum;
    }
}

inline void start(Product p, float* sums) {
  self->in[0] = &p, self->sums = sums;
  if (!self->fenced) fail("wgmma without a fence before it");
  for (uint64_t x : {p.a, p.b, (uint64_t)p.add}) self->issued = self->issued * 31 + x;
  collective("wgmma", 0, [](int first) {
    Product p = *(const Product*)threads[first].in[0];
    for (int i = first; i < first + 32; i++) {
      Thread& t = threads[i];
      const Product& q = *(const Product*)t.in[0];
      if (q.a != p.a || q.b != p.b || q.add != p.add) failure = "wgmma: lanes with different descriptors";
      if (t.hidden.empty()) t.hidden.assign(t.sums, t.sums + p.columns / 2);
      for (int e = 0; e < p.columns / 2; e++) t.sums[e] = NAN;
    }
    if (random_below(2)) read(p, first);
    threads[first].begun_products.push_back(p);
  });
}

}  // namespace emu

template <bool a_by_k, bool b_by_k, int columns>
inline void wgmma(float (&d)[columns][4], uint64_t a, uint64_t b, bool add) {
  emu::start({a_by_k, b_by_k, add, a, b, 8 * columns}, d[0]);
}

inline void wgmma_commit() {
  emu::self->fenced = false;
  emu::collective("wgmma_commit", 0, [](int first) {
    emu::Thread& t = emu::threads[first];
    t.products.push_back(std::move(t.begun_products));
    t.begun_products.clear();
  });
}

template <int pending>
inline void wgmma_wait() {
  emu::collective("wgmma_wait", 0, [](int first) {
    emu::Thread& leader = emu::threads[first];
    while ((int)leader.products.size() > pending) {
      for (emu::Product& p : leader.products.front()) emu::finish(p, first);
      leader.products.erase(leader.products.begin());
    }
    if (!leader.products.empty() || !leader.begun_products.empty()) return;
    for (int i = first; i < first + 32; i++) {
      emu::Thread& t = emu::threads[i];
      std::copy(t.hidden.begin(), t.hidden.end(), t.sums);
      t.hidden.clear();
    }
  });
}

template <int columns>
inline void wgmma_done(float (&)[columns][4]) {}
