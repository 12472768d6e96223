// What a training step needs beside the network: random draws, augmentation, losses, the last layer, the optimiser.
// float32 throughout. Scalars that change from step to step are read from memory: a captured CUDA graph replays the
// same arguments.

#define FOR_EACH(i, count) for (int i = blockIdx.x * 256 + threadIdx.x; i < (count); i += 256 * gridDim.x)

// --- random numbers: NumPy's Philox (4 x 64 bits, 10 rounds), bit by bit; see nanomr/rng.py --------------------------

struct Block { uint64_t word[4]; };

// The `number`-th block of four words of the stream (seed, stream, step).
__device__ __forceinline__ Block philox(uint64_t seed, uint64_t stream, uint64_t step, uint64_t number) {
  Block b = {{number + 1, step, 0, 0}};  // NumPy counts up before it draws
  uint64_t k0 = seed, k1 = stream;
  for (int round = 0; round < 10; round++) {
    const uint64_t a = 0xD2E7470EE14C6C93ull, c = 0xCA5A826395121157ull;
    const Block old = b;
    b.word[0] = multiply_high(c, old.word[2]) ^ old.word[1] ^ k0;
    b.word[1] = c * old.word[2];
    b.word[2] = multiply_high(a, old.word[0]) ^ old.word[3] ^ k1;
    b.word[3] = a * old.word[0];
    k0 += 0x9E3779B97F4A7C15ull, k1 += 0xBB67AE8584CAA73Bull;
  }
  return b;
}

// rho = +eps or -eps for each bit, the least significant first; a set bit is -eps. As manifold.corner_pairs. The lanes
// of a warp draw the same 256 bits, which costs less than to wait for one that does, and store neighbours.
extern "C" __global__ void __launch_bounds__(256) draw_corners(float* __restrict__ rho, int count, uint64_t seed,
    uint64_t stream, const uint64_t* __restrict__ step, const float* __restrict__ eps) {
  FOR_EACH(t, 32 * ((count + 255) / 256)) {
    const Block block = philox(seed, stream, *step, t / 32);
    const int lane = t % 32, first = t / 32 * 256 + lane;
#pragma unroll
    for (int i = 0; i < 256; i += 32)
      if (first + i < count) rho[first + i] = block.word[i / 64] >> (i % 64 + lane) & 1 ? -*eps : *eps;
  }
}

// The words themselves, given: as ops.reference.corners.
extern "C" __global__ void __launch_bounds__(256) corners(const uint64_t* __restrict__ words, float* __restrict__ rho,
                                                          int count, float eps) {
  FOR_EACH(i, count) rho[i] = words[i / 64] >> i % 64 & 1 ? -eps : eps;
}

// Lemire's method draws from 0 ... 8: the upper half of 9 * (32 bits), unless the lower one is among the 4 (2^32 mod 9)
// too many. Rejected draws are drawn again.
__device__ __forceinline__ uint64_t times_nine(uint32_t bits) { return bits * 9ull; }
__device__ __forceinline__ bool is_rejected(uint64_t product) { return (uint32_t)product < 4; }

// One block draws what NumPy's Generator does in integers(0, 9, n), twice, and random(n) < 0.5: 2 n draws, two a word,
// the lower half first, and n words. A rejected draw moves all that follow: one thread then begins anew, in order.
extern "C" __global__ void __launch_bounds__(256) draw_augmentation(int* __restrict__ top, int* __restrict__ left,
    int* __restrict__ flip, int n, uint64_t seed, uint64_t stream, const uint64_t* __restrict__ step) {
  __shared__ bool rejected;
  if (threadIdx.x == 0) rejected = false;
  __syncthreads();
  const auto bounded = [&](int i) -> int& { return i < n ? top[i] : left[i - n]; };
  const auto coin = [](uint64_t word) { return word >> 63 == 0; };  // (word >> 11) / 2^53 < 1/2
  for (int b = threadIdx.x; 4 * b < 2 * n; b += 256) {
    const Block block = philox(seed, stream, *step, b);
#pragma unroll
    for (int w = 0; w < 4; w++) {
      const int i = 4 * b + w;
      for (int half = 0; half < 2 && i < n; half++) {
        const uint64_t product = times_nine(block.word[w] >> 32 * half);
        if (is_rejected(product)) rejected = true;
        bounded(2 * i + half) = (int)(product >> 32);
      }
      if (i >= n && i < 2 * n) flip[i - n] = coin(block.word[w]);
    }
  }
  __syncthreads();
  if (!rejected || threadIdx.x) return;

  Block block;
  int used = 0;  // words so far
  const auto next = [&] {
    if (used % 4 == 0) block = philox(seed, stream, *step, used / 4);
    const int w = used++ % 4;
    return w < 2 ? (w ? block.word[1] : block.word[0]) : (w == 2 ? block.word[2] : block.word[3]);
  };
  uint64_t word = 0;
  bool half_left = false;
  for (int i = 0; i < 2 * n; i++) {
    uint64_t product;
    do {
      if (!half_left) word = next();
      product = times_nine(half_left ? word >> 32 : word);
      half_left = !half_left;
    } while (is_rejected(product));
    bounded(i) = (int)(product >> 32);
  }
  for (int i = 0; i < n; i++) flip[i] = coin(next());
}

// --- a step that needs nothing from the host -------------------------------------------------------------------------

// What training step *step takes: its n images' numbers and labels, and its row [lr, eps, gamma_i, gamma_h] of the
// schedule. `order` and `schedule` are of an epoch of `steps` steps.
extern "C" __global__ void __launch_bounds__(256) begin_step(const uint64_t* __restrict__ step,
    const int* __restrict__ order, const int* __restrict__ labels, const float* __restrict__ schedule,
    int* __restrict__ index, int* __restrict__ chosen, float* __restrict__ now, int n, int steps) {
  const int s = (int)(*step % steps);
  FOR_EACH(i, n) {
    index[i] = order[s * n + i];
    chosen[i] = labels[order[s * n + i]];
  }
  if (blockIdx.x == 0 && threadIdx.x < 4) now[threadIdx.x] = schedule[4 * s + threadIdx.x];
}

// One thread: adds what a step found to the epoch's sums, in double, and counts the step. peaks: the most that gamma_i
// intrinsic and gamma_h hamming were, as multiples of the cross-entropy, until one of them is beyond 10. A null pointer
// is a term that the method does not have.
extern "C" __global__ void end_step(const float* __restrict__ loss, const float* __restrict__ entropy,
    const float* __restrict__ pair, const float* __restrict__ hamming, const float* __restrict__ norm,
    const float* __restrict__ now, double* __restrict__ totals, double* __restrict__ peaks,
    uint64_t* __restrict__ step) {
  const double terms[2] = {pair ? *pair : 0., hamming ? *hamming : 0.};
  totals[0] += *loss, totals[1] += *entropy, totals[2] += terms[0], totals[3] += terms[1], totals[4] += *norm;
  const bool beyond = peaks[0] > 10. || peaks[1] > 10.;
  for (int t = 0; t < 2 && !beyond; t++) peaks[t] = fmax(peaks[t], terms[t] * now[2 + t] / *entropy);
  ++*step;
}

// --- data ------------------------------------------------------------------------------------------------------------

// out (n, rows, columns, C) in [0, 1]: images[index] moved by (top, left) - pad, black outside, mirrored where flip.
extern "C" __global__ void __launch_bounds__(256) crop_flip(const unsigned char* __restrict__ images,
    const int* __restrict__ index, const int* __restrict__ top, const int* __restrict__ left,
    const int* __restrict__ flip, float* __restrict__ out, int n, int rows, int columns, int channels, int pad) {
  FOR_EACH(i, n * rows * columns * channels) {
    const int c = i % channels, q = i / channels % columns, p = i / channels / columns % rows;
    const int image = i / channels / columns / rows;
    const int row = p + top[image] - pad, column = (flip[image] ? columns - 1 - q : q) + left[image] - pad;
    const bool inside = (unsigned)row < rows && (unsigned)column < columns;
    const long long pixel = ((long long)index[image] * rows + row) * columns + column;
    out[i] = inside ? images[pixel * channels + c] * (1.f / 255.f) : 0.f;
  }
}

// --- losses ----------------------------------------------------------------------------------------------------------

// One block. logits (branches n, K), branches 1 or 3; labels (n). gradient, as logits: of cross-entropy(branch 0) +
// gamma intrinsic(branches 1 and 2). values: [cross-entropy, intrinsic], means over the batch, without gamma.
extern "C" __global__ void __launch_bounds__(256) losses(const float* __restrict__ logits,
    const int* __restrict__ labels, const float* __restrict__ gamma, float* __restrict__ gradient,
    float* __restrict__ values, int n, int classes, int branches) {
  __shared__ float sums[2][256];
  float entropy = 0.f, pair = 0.f;
  for (int i = threadIdx.x; i < n; i += 256) {
    const float* row = logits + i * classes;
    float top = row[0], total = 0.f;
    for (int k = 1; k < classes; k++) top = row[k] > top ? row[k] : top;
    for (int k = 0; k < classes; k++) total += expf(row[k] - top);
    entropy += logf(total) - (row[labels[i]] - top);
    for (int k = 0; k < classes; k++)
      gradient[i * classes + k] = (expf(row[k] - top) / total - (k == labels[i])) / n;
    if (branches < 3) continue;
    for (int k = 0; k < classes; k++) {
      const int plus = (n + i) * classes + k, minus = (2 * n + i) * classes + k;
      const float d = logits[plus] - logits[minus];
      pair += d * d;
      gradient[plus] = *gamma * d * (2.f / n);
      gradient[minus] = -gradient[plus];
    }
  }
  sums[0][threadIdx.x] = entropy, sums[1][threadIdx.x] = pair;
  for (int half = 128; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half)
      for (int t = 0; t < 2; t++) sums[t][threadIdx.x] += sums[t][threadIdx.x + half];
  }
  if (threadIdx.x == 0)  // the thread that added last
    for (int t = 0; t < 2; t++) values[t] = sums[t][0] / n;
}

// One block. norms of one layer's Hamming differences from their squares (n): their root each (per_sample), or the root
// of their sum (1). total = before + share (sum of norms), where `before` is not null.
extern "C" __global__ void __launch_bounds__(256) hamming_norms(const float* __restrict__ squares,
    const float* __restrict__ before, float* __restrict__ norms, float* __restrict__ total, int n, int per_sample,
    float share) {
  __shared__ float sums[256];
  float sum = 0.f;
  for (int i = threadIdx.x; i < n; i += 256) {
    const float square = squares[i];
    if (per_sample) norms[i] = sqrtf(square);
    sum += per_sample ? sqrtf(square) : square;
  }
  sums[threadIdx.x] = sum;
  for (int half = 128; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x) return;
  sum = per_sample ? sums[0] : sqrtf(sums[0]);
  if (!per_sample) norms[0] = sum;
  *total = (before ? *before : 0.f) + share * sum;
}

// weight[i] = gamma factor / norm: of sample i, or of all (count 1).
extern "C" __global__ void __launch_bounds__(256) hamming_weight(const float* __restrict__ norms,
    const float* __restrict__ gamma, float* __restrict__ weight, int n, int count, float factor) {
  FOR_EACH(i, n) weight[i] = *gamma * factor / fmaxf(norms[count > 1 ? i : 0], 1e-12f);
}

// --- the last layer --------------------------------------------------------------------------------------------------

// c (rows, columns) = a b + bias, where a[i, k] = a[i a_row + k a_column], b likewise: any of them may be transposed.
// 16 x 16 threads and tiles: for the small products of fully connected layers, which cuBLAS would keep out of a graph.
extern "C" __global__ void __launch_bounds__(256) matrix_product(const float* __restrict__ a, int a_row, int a_column,
    const float* __restrict__ b, int b_row, int b_column, const float* __restrict__ bias, float* __restrict__ c,
    int rows, int columns, int terms) {
  __shared__ float from_a[16][17], from_b[16][17];
  const int x = threadIdx.x % 16, y = threadIdx.x / 16, i = blockIdx.y * 16 + y, j = blockIdx.x * 16 + x;
  float sum = 0.f;
  for (int k0 = 0; k0 < terms; k0 += 16) {
    from_a[y][x] = i < rows && k0 + x < terms ? a[(long long)i * a_row + (long long)(k0 + x) * a_column] : 0.f;
    from_b[y][x] = j < columns && k0 + y < terms ? b[(long long)(k0 + y) * b_row + (long long)j * b_column] : 0.f;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 16; k++) sum += from_a[y][k] * from_b[k][x];
    __syncthreads();
  }
  if (i < rows && j < columns) c[(long long)i * columns + j] = sum + (bias ? bias[j] : 0.f);
}

// --- the optimiser ---------------------------------------------------------------------------------------------------

// partial[block] = the sum of this block's squares; sum_rows of normalize.cu adds them up.
extern "C" __global__ void __launch_bounds__(256) sum_squares(const float* __restrict__ x,
                                                              float* __restrict__ partial, int count) {
  __shared__ float of_warp[8];
  float sum = 0.f;
  FOR_EACH(i, count) sum += x[i] * x[i];
  for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < 8; w++) sum += of_warp[w];
    partial[blockIdx.x] = sum;
  }
}

// v <- momentum v + (g + weight_decay w); w <- w - lr v.
extern "C" __global__ void __launch_bounds__(256) sgd_update(float* __restrict__ w, const float* __restrict__ g,
    float* __restrict__ velocity, int count, const float* __restrict__ lr, float momentum, float weight_decay) {
  FOR_EACH(i, count) {
    const float v = momentum * velocity[i] + (g[i] + weight_decay * w[i]);
    velocity[i] = v;
    w[i] -= *lr * v;
  }
}
