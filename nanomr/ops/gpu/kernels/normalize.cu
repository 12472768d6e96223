// Batch normalisation, ReLU and the Hamming regulariser, in as few passes over the pictures as there can be.
// docs/derivations/batchnorm.md, relu.md, hamming.md; which pass does what: docs/gpu.md.
//
//   REAL         how pictures are stored: float or bf16 (sums are always float)
//   WIDTH        channels that a thread takes at once: 16 bytes, or 1 where C is not a multiple of that
//   ACTIVATION   what follows z = (x - mean) scale + shift: 0 nothing, 1 ReLU, 2 ReLU and Hamming
//
// With Hamming a batch has three branches, [z0; z+; z-]: a thread takes the same place of all three. A place is WIDTH
// channels of a pixel, counted over one branch. scale = gamma inv_std; `mean`, `gamma`, `inv_std` and `shift` (C) may be
// null: 0, 1, 1 and 0. At most 256 WIDTH channels.

constexpr int BRANCHES = ACTIVATION == 2 ? 3 : 1;

struct __align__(sizeof(REAL) * WIDTH) Vector { REAL at[WIDTH]; };

// The same place in each branch, as float.
struct Place {
  float at[BRANCHES][WIDTH];
  __device__ __forceinline__ void load(const REAL* from, int place, int places) {
#pragma unroll
    for (int b = 0; b < BRANCHES; b++) {
      const Vector v = ((const Vector*)from)[(long long)b * places + place];
#pragma unroll
      for (int k = 0; k < WIDTH; k++) at[b][k] = to_float(v.at[k]);
    }
  }
  __device__ __forceinline__ void add(const REAL* from, int place, int places) {
    Place more;
    more.load(from, place, places);
#pragma unroll
    for (int b = 0; b < BRANCHES; b++)
#pragma unroll
      for (int k = 0; k < WIDTH; k++) at[b][k] += more.at[b][k];
  }
  __device__ __forceinline__ void store(REAL* to, int place, int places) const {
#pragma unroll
    for (int b = 0; b < BRANCHES; b++) {
      Vector v;
#pragma unroll
      for (int k = 0; k < WIDTH; k++) assign(v.at[k], at[b][k]);
      ((Vector*)to)[(long long)b * places + place] = v;
    }
  }
};

// x P(x^2) / Q(x^2) for |x| <= 8, as on the CPU (ops/cpu/elementwise.py): relative error 4e-7, where the hardware's tanh has 5e-4.
// NaN stays NaN.
__device__ __forceinline__ float tanh_(float x) {
  x = x < -8.f ? -8.f : (x > 8.f ? 8.f : x);
  const float s = x * x;
  const float p = 0.9999999936323325f + s * (0.13444519612112016f + s * (0.003571623570895721f +
                  s * (2.1895079306142738e-05f + s * 1.5230996862533344e-08f)));
  const float q = 1.f + s * (0.46777846953670105f + s * (0.02616454046641119f +
                  s * (0.00034113336282947087f + s * 8.52268307981854e-07f)));
  return quotient(x * p, q);
}

// A block's 256 threads: `columns` threads take the channels of a pixel, `slots` pixels are taken at once. A thread has
// the same channels in every pixel, so that it reads what belongs to them once.
struct Thread {
  int columns, slots, slot, column, channel;
  __device__ __forceinline__ Thread(int channels) {
    columns = channels / WIDTH, slots = 256 / columns;
    slot = threadIdx.x / columns, column = threadIdx.x % columns, channel = column * WIDTH;
  }
  // body(pixel, place) for this thread's pixels among `pixels`, `part` of `parts` blocks sharing them.
  template <class Body>
  __device__ __forceinline__ void for_each_pixel(int pixels, int part, int parts, Body body) const {
    if (slot >= slots) return;  // 256 is not a multiple of columns
    for (int pixel = part * slots + slot; pixel < pixels; pixel += parts * slots) body(pixel, pixel * columns + column);
  }
};

// WIDTH numbers that belong to channels; `otherwise` where there are none.
struct Channels {
  float at[WIDTH];
  __device__ __forceinline__ Channels(const float* from, int channel, float otherwise) {
#pragma unroll
    for (int k = 0; k < WIDTH; k++) at[k] = from ? from[channel + k] : otherwise;
  }
};

struct Normalization {
  Channels mean, scale, shift;
  __device__ __forceinline__ Normalization(const float* mean, const float* gamma, const float* inv_std,
                                           const float* shift, int channel)
      : mean(mean, channel, 0.f), scale(gamma, channel, 1.f), shift(shift, channel, 0.f) {
    const Channels by(inv_std, channel, 1.f);
#pragma unroll
    for (int k = 0; k < WIDTH; k++) scale.at[k] *= by.at[k];
  }
  __device__ __forceinline__ float operator()(float x, int k) const {
    return (x - mean.at[k]) * scale.at[k] + shift.at[k];
  }
};

// dy becomes dz: through ReLU, plus the Hamming regulariser's gradient. `weight`: of this sample.
__device__ __forceinline__ void through_activation(Place& dy, const Place& x, const Normalization& normal,
                                                   float alpha, float weight) {
  if (ACTIVATION == 0) return;
#pragma unroll
  for (int k = 0; k < WIDTH; k++) {
#pragma unroll
    for (int b = 0; b < BRANCHES; b++) dy.at[b][k] = normal(x.at[b][k], k) > 0.f ? dy.at[b][k] : 0.f;
    if (ACTIVATION == 2) {
      const float plus = tanh_(alpha * normal(x.at[1 % BRANCHES][k], k));
      const float minus = tanh_(alpha * normal(x.at[2 % BRANCHES][k], k)), d = weight * (plus - minus);
      dy.at[1 % BRANCHES][k] += d * (1.f - plus * plus);
      dy.at[2 % BRANCHES][k] -= d * (1.f - minus * minus);
    }
  }
}

// y = activation((x - mean) scale + shift); without an activation plus `plus`, where that is not null. Grid: (parts,
// samples), without Hamming (parts, 1): a branch is cut into samples of `pixels` pixels. partial (samples, parts): each
// block's share of a sample's (tanh(alpha z+) - tanh(alpha z-))^2.
extern "C" __global__ void __launch_bounds__(256, 2) activate(const REAL* __restrict__ x,
    const float* __restrict__ mean, const float* __restrict__ gamma, const float* __restrict__ inv_std,
    const float* __restrict__ shift, const REAL* __restrict__ plus, REAL* __restrict__ y, float* __restrict__ partial, int pixels, int channels,
    float alpha) {
  const Thread thread(channels);
  const Normalization normal(mean, gamma, inv_std, shift, thread.channel);
  const int sample = pixels * thread.columns, first = sample * blockIdx.y, all = sample * gridDim.y;
  float squares = 0.f;
  thread.for_each_pixel(pixels, blockIdx.x, gridDim.x, [&](int, int place) {
    Place z;
    z.load(x, first + place, all);
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
#pragma unroll
      for (int b = 0; b < BRANCHES; b++) z.at[b][k] = normal(z.at[b][k], k);
      if (ACTIVATION == 2) {
        const float d = tanh_(alpha * z.at[1 % BRANCHES][k]) - tanh_(alpha * z.at[2 % BRANCHES][k]);
        squares += d * d;
      }
#pragma unroll
      for (int b = 0; b < BRANCHES; b++)
        if (ACTIVATION && z.at[b][k] <= 0.f) z.at[b][k] = 0.f;  // NaN stays NaN
    }
    if (!ACTIVATION && plus) z.add(plus, first + place, all);
    z.store(y, first + place, all);
  });
  if (ACTIVATION == 2) {
    __shared__ float of_warp[8];
    for (int lanes = 16; lanes; lanes /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, lanes);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = squares;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < 8; w++) squares += of_warp[w];
      partial[blockIdx.y * gridDim.x + blockIdx.x] = squares;
    }
  }
}

// dz from dy and z. `pixels` of a branch; weight (samples) of pixels_per_sample each.
extern "C" __global__ void __launch_bounds__(256, 2) activate_backward(const REAL* __restrict__ dy,
    const REAL* __restrict__ x, const float* __restrict__ weight, REAL* __restrict__ dz, int pixels,
    int pixels_per_sample, int channels, float alpha) {
  const Thread thread(channels);
  const Normalization normal(nullptr, nullptr, nullptr, nullptr, thread.channel);
  const int all = pixels * thread.columns;
  thread.for_each_pixel(pixels, blockIdx.x, gridDim.x, [&](int pixel, int place) {
    Place in, d;
    in.load(x, place, all);
    d.load(dy, place, all);
    through_activation(d, in, normal, alpha, ACTIVATION == 2 ? weight[pixel / pixels_per_sample] : 0.f);
    d.store(dz, place, all);
  });
}

// A block's sums for each channel, partial (blocks, 2, C), from those of its threads.
__device__ __forceinline__ void sum_slots(const Thread& thread, const float (&sums)[2][WIDTH], int channels,
                                          float* partial) {
  DYNAMIC_SHARED(memory);
  float* const of_slot = (float*)memory;  // (slots, 2, C)
  if (thread.slot < thread.slots)
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
      for (int k = 0; k < WIDTH; k++) of_slot[(thread.slot * 2 + t) * channels + thread.channel + k] = sums[t][k];
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * channels; i += 256) {
    float sum = 0.f;
    for (int s = 0; s < thread.slots; s++) sum += of_slot[s * 2 * channels + i];
    partial[blockIdx.x * 2 * channels + i] = sum;
  }
}

// Sums of (x - pivot) and its square for each channel; the pivot is the first pixel, so that a large mean does not
// swallow the digits of the variance.
extern "C" __global__ void __launch_bounds__(256, 2) moments(const REAL* __restrict__ x, float* __restrict__ partial,
                                                          int pixels, int channels) {
  const Thread thread(channels);
  float pivot[WIDTH], sums[2][WIDTH] = {};
#pragma unroll
  for (int k = 0; k < WIDTH; k++) pivot[k] = to_float(x[thread.channel + k]);
  thread.for_each_pixel(pixels, blockIdx.x, gridDim.x, [&](int, int place) {
    const Vector v = ((const Vector*)x)[place];
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
      const float d = to_float(v.at[k]) - pivot[k];
      sums[0][k] += d;
      sums[1][k] += d * d;
    }
  });
  sum_slots(thread, sums, channels, partial);
}

// (dbeta, dgamma / inv_std) = sums of dz and dz (x - mean), where dz is computed from dy on the way.
extern "C" __global__ void __launch_bounds__(256, 2) channel_gradients(const REAL* __restrict__ dy,
    const REAL* __restrict__ x, const float* __restrict__ mean, const float* __restrict__ gamma,
    const float* __restrict__ inv_std, const float* __restrict__ shift, const float* __restrict__ weight,
    float* __restrict__ partial, int pixels, int pixels_per_sample, int channels, float alpha) {
  const Thread thread(channels);
  const Normalization normal(mean, gamma, inv_std, shift, thread.channel);
  const int all = pixels * thread.columns;
  float sums[2][WIDTH] = {};
  thread.for_each_pixel(pixels, blockIdx.x, gridDim.x, [&](int pixel, int place) {
    Place in, d;
    in.load(x, place, all);
    d.load(dy, place, all);
    through_activation(d, in, normal, alpha, ACTIVATION == 2 ? weight[pixel / pixels_per_sample] : 0.f);
#pragma unroll
    for (int k = 0; k < WIDTH; k++)
#pragma unroll
      for (int b = 0; b < BRANCHES; b++) {
        sums[0][k] += d.at[b][k];
        sums[1][k] += d.at[b][k] * (in.at[b][k] - normal.mean.at[k]);
      }
  });
  sum_slots(thread, sums, channels, partial);
}

// dx = scale (dz - (dbeta + x_hat dgamma) share), where x_hat = (x - mean) inv_std and share = 1 / pixels of all
// branches. dz is computed from dy on the way. `plus` is added to dx, where it is not null.
extern "C" __global__ void __launch_bounds__(256, 2) normalize_backward(const REAL* __restrict__ dy,
    const REAL* __restrict__ x, const float* __restrict__ mean, const float* __restrict__ gamma,
    const float* __restrict__ inv_std, const float* __restrict__ shift, const float* __restrict__ weight,
    const float* __restrict__ dgamma, const float* __restrict__ dbeta, const REAL* __restrict__ plus,
    REAL* __restrict__ dx, int pixels, int pixels_per_sample, int channels, float alpha, float share) {
  const Thread thread(channels);
  const Normalization normal(mean, gamma, inv_std, shift, thread.channel);
  Channels offset(dbeta, thread.channel, 0.f), slope(dgamma, thread.channel, 0.f);
#pragma unroll
  for (int k = 0; k < WIDTH; k++) {
    slope.at[k] *= inv_std[thread.channel + k] * share;
    offset.at[k] *= share;
  }
  const int all = pixels * thread.columns;
  thread.for_each_pixel(pixels, blockIdx.x, gridDim.x, [&](int pixel, int place) {
    Place in, d;
    in.load(x, place, all);
    d.load(dy, place, all);
    through_activation(d, in, normal, alpha, ACTIVATION == 2 ? weight[pixel / pixels_per_sample] : 0.f);
#pragma unroll
    for (int k = 0; k < WIDTH; k++)
#pragma unroll
      for (int b = 0; b < BRANCHES; b++)
        d.at[b][k] = normal.scale.at[k] *
                     (d.at[b][k] - ((in.at[b][k] - normal.mean.at[k]) * slope.at[k] + offset.at[k]));
    if (plus) d.add(plus, place, all);
    d.store(dx, place, all);
  });
}

// Adds up the blocks' sums, in float64 and always in the same order: one warp for each of the 2 C sums.
__device__ __forceinline__ double sum_of_blocks(const float* partial, int blocks, int stride, int at) {
  double sum = 0;
  for (int b = threadIdx.x; b < blocks; b += 32) sum += partial[(long long)b * stride + at];
  for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  return sum;
}

// One warp for each channel: mean, and the biased variance or 1 / sqrt(variance + eps), whichever is not null, from what
// `moments` left. The running statistics, if any, move by `momentum`, their variance unbiased, and the batch is counted.
extern "C" __global__ void __launch_bounds__(32) finish_moments(const float* __restrict__ partial,
    const REAL* __restrict__ x, float* __restrict__ mean, float* __restrict__ var, float* __restrict__ inv_std,
    float* __restrict__ running_mean, float* __restrict__ running_var, long long* __restrict__ tracked, int blocks,
    int channels, int pixels, float eps, float momentum) {
  const int c = blockIdx.x;
  const double first = sum_of_blocks(partial, blocks, 2 * channels, c) / pixels;
  const double second = sum_of_blocks(partial, blocks, 2 * channels, channels + c) / pixels;
  if (threadIdx.x) return;
  const float m = (float)(to_float(x[c]) + first), v = (float)fmax(second - first * first, 0.);
  mean[c] = m;
  if (var) var[c] = v;
  if (inv_std) inv_std[c] = (float)(1. / sqrt((double)v + eps));
  if (!running_mean) return;
  const float unbiased = v * ((float)pixels / (float)(pixels > 1 ? pixels - 1 : 1));
  running_mean[c] = (1.f - momentum) * running_mean[c] + momentum * m;
  running_var[c] = (1.f - momentum) * running_var[c] + momentum * unbiased;
  if (c == 0) ++*tracked;
}

// One warp for each channel: (dgamma, dbeta) from what `channel_gradients` left. They are added to what lies at to_gamma
// and to_beta, where these are not null.
extern "C" __global__ void __launch_bounds__(32) finish_gradients(const float* __restrict__ partial,
    const float* __restrict__ inv_std, float* __restrict__ dgamma, float* __restrict__ dbeta,
    float* __restrict__ to_gamma, float* __restrict__ to_beta, int blocks, int channels) {
  const int c = blockIdx.x;
  const double of_dz = sum_of_blocks(partial, blocks, 2 * channels, c);
  const double of_dz_x = sum_of_blocks(partial, blocks, 2 * channels, channels + c);
  if (threadIdx.x) return;
  dgamma[c] = (float)(of_dz_x * inv_std[c]);
  dbeta[c] = (float)of_dz;
  if (to_gamma) to_gamma[c] += dgamma[c];
  if (to_beta) to_beta[c] += dbeta[c];
}

// out (rows) = sums of partial (rows, columns), one warp a row: the Hamming squares of each sample.
extern "C" __global__ void __launch_bounds__(32) sum_rows(const float* __restrict__ partial, float* __restrict__ out,
                                                          int columns) {
  float sum = 0.f;
  for (int i = threadIdx.x; i < columns; i += 32) sum += partial[blockIdx.x * columns + i];
  for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
