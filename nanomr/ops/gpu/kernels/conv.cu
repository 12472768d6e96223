// Convolution of NHWC images as a matrix product that never stores its big matrix ("implicit GEMM"), on tensor cores:
// bf16 in, float32 sums. docs/gpu.md draws the tiles; docs/derivations/convolution.md has the formulas.
//
// What is compiled is chosen by macros:
//   DIRECTION           0 y from x and w, 1 dx from dy and w, 2 dw from x and dy
//   BM, BN, BK          a block computes a BM x BN tile of the result, BK terms of the sums at a time
//   WM, WN              ... of which each warp has WM x WN
//   STAGES              tiles on their way from global memory while one is multiplied
//   WGMMA               if there: by Hopper's instruction (sm_90a), four warps at a time; WM is 16, WN is BN, BK is 64
//
// Weights are (kh, kw, C, Cout), as everywhere. All numbers of channels are multiples of 8: a chunk of 8 channels,
// 16 bytes, is what is copied at once, and it lies in one pixel.

constexpr int THREADS = 32 * (BM / WM) * (BN / WN);
constexpr int CHUNK = 8;
#ifdef WGMMA
constexpr bool SWIZZLED = true;
#else
constexpr bool SWIZZLED = false;
#endif
// Rows of a tile lie 16 bytes further apart than they are long: the 8 rows that load_matrices reads at once then start
// in different banks. wgmma wants another order, `place`.
constexpr int SKEW = 8;
constexpr bool A_BY_K = DIRECTION == 2;  // is a row of the tile one term of the sums (else one row of the result)?
constexpr bool B_BY_K = DIRECTION != 1;
constexpr int A_ROWS = A_BY_K ? BK : BM, A_LENGTH = A_BY_K ? BM : BK;
constexpr int B_ROWS = B_BY_K ? BK : BN, B_LENGTH = B_BY_K ? BN : BK;
constexpr int A_PITCH = A_LENGTH + (SWIZZLED ? 0 : SKEW), B_PITCH = B_LENGTH + (SWIZZLED ? 0 : SKEW);
constexpr int A_SIZE = A_ROWS * A_PITCH, B_SIZE = B_ROWS * B_PITCH;
constexpr int A_CHUNKS = A_LENGTH / CHUNK, B_CHUNKS = B_LENGTH / CHUNK;  // of a row
constexpr int A_TURN = THREADS / A_CHUNKS, B_TURN = THREADS / B_CHUNKS;  // rows that the block copies at once
static_assert(THREADS % A_CHUNKS == 0 && A_ROWS % A_TURN == 0, "every thread copies one column of chunks of A");
static_assert(THREADS % B_CHUNKS == 0, "every thread copies one column of chunks of B");
static_assert(BK % 16 == 0 && WM % 16 == 0 && WN % 16 == 0 && STAGES >= 2, "the tensor cores' shape");

struct __align__(16) Chunk { bf16 at[CHUNK]; };

using Sums = float[WM / 16][WN / 8][4];

__device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
  for (int i = 0; i < WM / 16; i++)
#pragma unroll
    for (int j = 0; j < WN / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums[i][j][e] = 0.f;
}

// Where the chunk at `column` of a tile's row lies. For wgmma a tile of `rows` rows is cut into strips of 64 columns,
// 128 bytes, one behind the other; in row r of a strip, chunk c lies in the place of chunk c ^ r % 8, so that one chunk
// of 8 rows is in 8 banks ("128-byte swizzle": bits 4 to 6 of an address, exclusive-or bits 7 to 9).
template <int rows, int pitch>
__device__ __forceinline__ int place(int row, int column) {
  if (SWIZZLED) return column / 64 * (rows * 64) + row * 64 + (column % 64 ^ row % 8 * CHUNK);
  return row * pitch + column;
}

#ifdef WGMMA

constexpr int ROW_BYTES = 128;  // of a strip
static_assert(BK == 64 && WM == 16 && WN == BN && BM % 64 == 0 && STAGES >= 3, "wgmma's shape");

// What wgmma is told of 16 terms of a tile of `rows` rows: its address, and the distances of its strips (where rows
// are terms) and of its groups of 8 rows, all in units of 16 bytes; 1 << 62: 128-byte swizzle. PTX ISA has the format.
__device__ __forceinline__ uint64_t descriptor(const bf16* tile, int rows) {
  return (shared_address(tile) & 0x3ffff) / 16 | (uint64_t)(rows * ROW_BYTES / 16) << 16 |
         (uint64_t)(8 * ROW_BYTES / 16) << 32 | 1ull << 62;
}

// sums += A B (or = unless `add`), for the 64 rows of the result that this warp and the three beside it have: started,
// not waited for.
__device__ __forceinline__ void start_product(const bf16* a, const bf16* b, Sums& sums, bool add) {
  // 64 rows of 64 columns lie before the next four warps' part of A, whichever of the two are terms.
  const uint64_t from_a = descriptor(a + threadIdx.x / 128 * (64 * 64), A_ROWS), from_b = descriptor(b, B_ROWS);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < BK; k += 16) {
    const int down = k * ROW_BYTES / 16, across = k * 2 / 16;  // 16 terms on: as many rows, or columns of the same rows
    wgmma<A_BY_K, B_BY_K>(sums[0], from_a + (A_BY_K ? down : across), from_b + (B_BY_K ? down : across), add || k);
  }
  wgmma_commit();
}

// The pipeline: load(stage) starts the copies of the next BK terms. While the tensor cores have tile `step`, the warps
// wait for tile `step - 1`, and fill the stage of tile `step - 2`, which everybody has left behind at the barrier.
template <class Load>
__device__ __forceinline__ void sum_products(int steps, bf16* a, bf16* b, int, int, Sums& sums, Load load) {
#pragma unroll
  for (int s = 0; s < STAGES - 2; s++) {
    if (s < steps) load(s);
    copy_commit();  // an empty group too: what is waited for is counted in groups
  }
  for (int step = 0; step < steps; step++) {
    copy_wait<STAGES - 3>();
    wgmma_sees_writes();
    __syncthreads();
    start_product(a + step % STAGES * A_SIZE, b + step % STAGES * B_SIZE, sums, step);
    if (step + STAGES - 2 < steps) load((step + STAGES - 2) % STAGES);
    copy_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  wgmma_done(sums[0]);
  if (steps == 0) clear(sums);
}

#else

// sums += A B, for this warp's rows and columns of two tiles in shared memory.
__device__ __forceinline__ void multiply_tiles(const bf16* a, const bf16* b, int warp_m, int warp_n, Sums& sums) {
  // Which of the four 8x8 matrices this lane points at: load_matrices numbers them 0 1 2 3.
  const int lane = threadIdx.x % 32, row = lane % 8, odd = 8 * (lane / 8 % 2), late = 8 * (lane / 16);
#pragma unroll
  for (int k = 0; k < BK; k += 16) {
    uint32_t fa[WM / 16][4], fb[WN / 16][4];
#pragma unroll
    for (int i = 0; i < WM / 16; i++) {  // in the order (m, k): 00 80 08 88
      const int m = warp_m + 16 * i;
      load_matrices<A_BY_K>(fa[i], A_BY_K ? a + (k + late + row) * A_PITCH + m + odd
                                          : a + (m + odd + row) * A_PITCH + k + late);
    }
#pragma unroll
    for (int j = 0; j < WN / 16; j++) {  // in the order (k, n): 00 80 08 88
      const int n = warp_n + 16 * j;
      load_matrices<B_BY_K>(fb[j], B_BY_K ? b + (k + odd + row) * B_PITCH + n + late
                                          : b + (n + late + row) * B_PITCH + k + odd);
    }
#pragma unroll
    for (int i = 0; i < WM / 16; i++)
#pragma unroll
      for (int j = 0; j < WN / 8; j++) multiply_add(sums[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
  }
}

// The pipeline: load(stage) starts the copies of the next BK terms. Between the barrier of one step and that of the
// next, a warp multiplies tile `step` and fills the stage of tile `step - 1`, which everybody has left behind.
template <class Load>
__device__ __forceinline__ void sum_products(int steps, bf16* a, bf16* b, int warp_m, int warp_n, Sums& sums,
                                             Load load) {
  clear(sums);
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) load(s);
    copy_commit();  // an empty group too: what is waited for is counted in groups
  }
  for (int step = 0; step < steps; step++) {
    copy_wait<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < steps) load((step + STAGES - 1) % STAGES);
    copy_commit();
    multiply_tiles(a + step % STAGES * A_SIZE, b + step % STAGES * B_SIZE, warp_m, warp_n, sums);
  }
}

#endif

#if DIRECTION != 2

struct __align__(16) Four { float at[4]; };

// Where column c of the result's tile lies in its row: in every other 32 columns, the halves of each chunk change
// places. Eight lanes that read 16 bytes of neighbouring chunks then read from different banks.
__device__ __forceinline__ int swap_halves(int c) { return c ^ (c / 32 % 2 * 4); }

// How one axis of the result reads the source: result index first + every * i reads, for j < taps,
// source index base + scale * i + turn * j through kernel index tap + next * j.
struct Axis {
  int first, every, count, base, scale, turn, tap, next, taps;

  // y: one class of indices. dx: source index (t + pad - r) / stride must be whole, so that the result's indices fall
  // into `stride` classes (phases), each with its own taps, and no multiplication by zero is done.
  __device__ __forceinline__ Axis(int size, int kernel, int stride, int pad, int phase) {
    if (DIRECTION == 0) {
      first = 0, every = 1, count = size;
      base = -pad, scale = stride, turn = 1;
      tap = 0, next = 1, taps = kernel;
    } else {
      first = phase, every = stride, count = (size - phase + stride - 1) / stride;
      base = (phase + pad) / stride, scale = 1, turn = -1;
      tap = (phase + pad) % stride, next = stride, taps = tap < kernel ? (kernel - tap + stride - 1) / stride : 0;
    }
  }
};

// result (n, rows, columns, channels) from source (n, source_rows, source_columns, source_channels): y from x, or dx
// from dy. Grid: tiles of pixels, tiles of channels, and for dx the stride^2 phases. `bias` and `plus` may be null;
// `plus`, of the result's shape, is added to it: a residual sum.
extern "C" __global__ void __launch_bounds__(THREADS) convolve(
    const bf16* __restrict__ source, const bf16* __restrict__ w, const float* __restrict__ bias,
    const bf16* __restrict__ plus, bf16* __restrict__ result, int n, int source_rows, int source_columns,
    int source_channels, int rows, int columns, int channels, int kernel_rows, int kernel_columns, int stride,
    int pad_top, int pad_left) {
  const Axis down(rows, kernel_rows, stride, pad_top, blockIdx.z / stride);
  const Axis across(columns, kernel_columns, stride, pad_left, blockIdx.z % stride);
  const int pixels = n * down.count * across.count, m0 = blockIdx.x * BM, n0 = blockIdx.y * BN;
  if (m0 >= pixels) return;

  DYNAMIC_SHARED(memory);
  bf16 *a = (bf16*)memory, *b = a + STAGES * A_SIZE;
  const int a_column = threadIdx.x % A_CHUNKS * CHUNK, a_row = threadIdx.x / A_CHUNKS;
  const int b_column = threadIdx.x % B_CHUNKS * CHUNK, b_row = threadIdx.x / B_CHUNKS;

  // The source pixel that the first tap of each of this thread's rows of A meets.
  int row[A_ROWS / A_TURN], column[A_ROWS / A_TURN], at[A_ROWS / A_TURN];
#pragma unroll
  for (int i = 0; i < A_ROWS / A_TURN; i++) {
    const int m = m0 + a_row + i * A_TURN, image = m / (down.count * across.count);
    row[i] = down.base + down.scale * (m / across.count % down.count);
    column[i] = across.base + across.scale * (m % across.count);
    at[i] = ((image * source_rows + row[i]) * source_columns + column[i]) * source_channels;
    if (m >= pixels) row[i] = -(1 << 20);  // outside, whatever the tap
  }

  // The sum runs over taps and channels; this thread copies chunk a_column of each BK of them, in order.
  int channel = a_column, j_down = 0, j_across = 0, k = 0;
  const auto wrap = [&] {
    while (channel >= source_channels) {
      channel -= source_channels;
      if (++j_across == across.taps) j_across = 0, j_down++;
    }
  };
  wrap();
  const auto load = [&](int stage) {
    const int r = down.turn * j_down, s = across.turn * j_across, step = (r * source_columns + s) * source_channels;
    const bool more = j_down < down.taps;
#pragma unroll
    for (int i = 0; i < A_ROWS / A_TURN; i++) {
      const bool inside = more && (unsigned)(row[i] + r) < source_rows && (unsigned)(column[i] + s) < source_columns;
      copy16_async(a + stage * A_SIZE + place<A_ROWS, A_PITCH>(a_row + i * A_TURN, a_column),
                   inside ? source + at[i] + step + channel : source, inside);
    }
    const int tap = (down.tap + down.next * j_down) * kernel_columns + across.tap + across.next * j_across;
#pragma unroll
    for (int i = 0; i < (B_ROWS + B_TURN - 1) / B_TURN; i++) {
      const int line = b_row + i * B_TURN;
      if (B_ROWS % B_TURN && line >= B_ROWS) break;
      const bf16* from;
      bool inside;
      if (B_BY_K) {  // y: a row holds the weights of one tap and input channel
        inside = k + line < kernel_rows * kernel_columns * source_channels && n0 + b_column < channels;
        from = w + (long long)(k + line) * channels + n0 + b_column;
      } else {  // dx: a row holds those of one tap and result channel
        inside = more && n0 + line < channels;
        from = w + ((long long)tap * channels + n0 + line) * source_channels + channel;
      }
      copy16_async(b + stage * B_SIZE + place<B_ROWS, B_PITCH>(line, b_column), inside ? from : w, inside);
    }
    channel += BK, k += BK;
    wrap();
  };

  const int warp = threadIdx.x / 32, warp_m = warp % (BM / WM) * WM, warp_n = warp / (BM / WM) * WN;
  const int steps = (down.taps * across.taps * source_channels + BK - 1) / BK;
  Sums sums;
  sum_products(steps, a, b, warp_m, warp_n, sums, load);

  // Through shared memory, so that whole chunks are stored, a row's chunks by neighbouring threads. As float, in the
  // room that the tiles no longer need: bias and `plus` are added before anything is rounded.
  constexpr int PITCH = BN + SKEW, LINES = THREADS / (BN / CHUNK);  // that the block stores at once
  constexpr int TOGETHER = 4;  // chunks of `plus` that a thread has on their way before it waits for one
  static_assert(THREADS % (BN / CHUNK) == 0 && BM % (TOGETHER * LINES) == 0, "every thread stores a column of chunks");
  float* const tile = (float*)memory;
  const int lane = threadIdx.x % 32, c = threadIdx.x % (BN / CHUNK) * CHUNK;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WM / 16; i++)
#pragma unroll
    for (int j = 0; j < WN / 8; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int m = warp_m + 16 * i + lane / 4 + 8 * half, at = swap_halves(warp_n + 8 * j + 2 * (lane % 4));
        *(float2*)(tile + m * PITCH + at) = make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
      }
  __syncthreads();
  if (n0 + c >= channels) return;
  float shift[CHUNK];
#pragma unroll
  for (int k = 0; k < CHUNK; k++) shift[k] = bias ? bias[n0 + c + k] : 0.f;
#pragma unroll 1
  for (int line = threadIdx.x / (BN / CHUNK); line < BM; line += TOGETHER * LINES) {
    int to[TOGETHER];  // where the chunks go; -1: nowhere
    Chunk more[TOGETHER];
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      const int m = m0 + line + i * LINES, image = m / (down.count * across.count);
      const int to_row = down.first + down.every * (m / across.count % down.count);
      const int to_column = across.first + across.every * (m % across.count);
      to[i] = m < pixels ? ((image * rows + to_row) * columns + to_column) * channels + n0 + c : -1;
      more[i] = plus && to[i] >= 0 ? *(const Chunk*)(plus + to[i]) : Chunk{};
    }
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      if (to[i] < 0) continue;
      Chunk rounded;
#pragma unroll
      for (int half = 0; half < CHUNK; half += 4) {
        const Four four = *(const Four*)(tile + (line + i * LINES) * PITCH + swap_halves(c + half));
#pragma unroll
        for (int k = 0; k < 4; k++)
          assign(rounded.at[half + k], four.at[k] + shift[half + k] + to_float(more[i].at[half + k]));
      }
      *(Chunk*)(result + to[i]) = rounded;
    }
  }
}

#else

// dw (kh kw C, Cout) = sum over the pixels of y of x_gathered^T dy. The pixels are split over blockIdx.z, each with a
// `partial` of its own: sum_splits adds them in a fixed order, so that the same call gives the same bits.
extern "C" __global__ void __launch_bounds__(THREADS) weight_gradient(
    const bf16* __restrict__ x, const bf16* __restrict__ dy, float* __restrict__ partial, int n, int x_rows,
    int x_columns, int x_channels, int rows, int columns, int channels, int kernel_rows, int kernel_columns, int stride,
    int pad_top, int pad_left, int pixels_per_split) {
  const int terms = kernel_rows * kernel_columns * x_channels, m0 = blockIdx.x * BM, n0 = blockIdx.y * BN;
  const int first = blockIdx.z * pixels_per_split, last = min(first + pixels_per_split, n * rows * columns);

  DYNAMIC_SHARED(memory);
  bf16 *a = (bf16*)memory, *b = a + STAGES * A_SIZE;
  const int a_column = threadIdx.x % A_CHUNKS * CHUNK, a_row = threadIdx.x / A_CHUNKS;
  const int b_column = threadIdx.x % B_CHUNKS * CHUNK, b_row = threadIdx.x / B_CHUNKS;

  // This thread's column of A: one tap and chunk of channels of x, at all pixels.
  const int tap = (m0 + a_column) / x_channels, channel = (m0 + a_column) % x_channels;
  const int r = tap / kernel_columns - pad_top, s = tap % kernel_columns - pad_left;
  const bool used = m0 + a_column < terms;
  // Its rows' pixels (image, p, q) of y, which move on by BK pixels at a time, without a division.
  int image[A_ROWS / A_TURN], p[A_ROWS / A_TURN], q[A_ROWS / A_TURN];
#pragma unroll
  for (int i = 0; i < A_ROWS / A_TURN; i++) {
    const int pixel = first + a_row + i * A_TURN;
    image[i] = pixel / (rows * columns), p[i] = pixel / columns % rows, q[i] = pixel % columns;
  }
  const int images_on = BK / (rows * columns), rows_on = BK / columns % rows, columns_on = BK % columns;

  int pixel0 = first;  // of the next tile
  const auto load = [&](int stage) {
#pragma unroll
    for (int i = 0; i < A_ROWS / A_TURN; i++) {
      const int x_row = p[i] * stride + r, x_column = q[i] * stride + s;
      const bool inside = used && pixel0 + a_row + i * A_TURN < last && (unsigned)x_row < x_rows &&
                          (unsigned)x_column < x_columns;
      const bf16* from = x + ((image[i] * x_rows + x_row) * x_columns + x_column) * x_channels + channel;
      copy16_async(a + stage * A_SIZE + place<A_ROWS, A_PITCH>(a_row + i * A_TURN, a_column), inside ? from : x, inside);
      q[i] += columns_on;
      if (q[i] >= columns) q[i] -= columns, p[i]++;
      p[i] += rows_on;
      if (p[i] >= rows) p[i] -= rows, image[i]++;
      image[i] += images_on;
    }
#pragma unroll
    for (int i = 0; i < (B_ROWS + B_TURN - 1) / B_TURN; i++) {
      const int line = b_row + i * B_TURN;
      if (B_ROWS % B_TURN && line >= B_ROWS) break;
      const bool inside = pixel0 + line < last && n0 + b_column < channels;
      const bf16* from = dy + (long long)(pixel0 + line) * channels + n0 + b_column;
      copy16_async(b + stage * B_SIZE + place<B_ROWS, B_PITCH>(line, b_column), inside ? from : dy, inside);
    }
    pixel0 += BK;
  };

  const int warp = threadIdx.x / 32, warp_m = warp % (BM / WM) * WM, warp_n = warp / (BM / WM) * WN;
  Sums sums;
  sum_products((last - first + BK - 1) / BK, a, b, warp_m, warp_n, sums, load);

  const int lane = threadIdx.x % 32;
  partial += (long long)blockIdx.z * terms * channels;
#pragma unroll
  for (int i = 0; i < WM / 16; i++)
#pragma unroll
    for (int j = 0; j < WN / 8; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int m = m0 + warp_m + 16 * i + lane / 4 + 8 * half, c = n0 + warp_n + 8 * j + 2 * (lane % 4);
        if (m < terms && c < channels)
          *(float2*)(partial + (long long)m * channels + c) =
              make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
      }
}

// dw = the sum of `splits` partial results of `count` numbers each; `more`: added to what is there.
extern "C" __global__ void __launch_bounds__(256) sum_splits(const float* __restrict__ partial, float* __restrict__ dw,
                                                             int count, int splits, int more) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= count) return;
  float sum = more ? dw[i] : 0.f;
  for (int s = 0; s < splits; s++) sum += partial[(long long)s * count + i];
  dw[i] = sum;
}

#endif
