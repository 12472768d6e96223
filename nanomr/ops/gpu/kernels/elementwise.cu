// Passes that move numbers or add a few of them: conversion, pairs, residuals, pooling.
//
//   REAL    how pictures are stored: float or bf16
//   WIDTH   numbers that a thread takes at once: 16 bytes, or 1

struct __align__(sizeof(REAL) * WIDTH) Vector { REAL at[WIDTH]; };

#define FOR_EACH(i, count) for (int i = blockIdx.x * 256 + threadIdx.x; i < (count); i += 256 * gridDim.x)

// Rows of `channels` floats become rows of `padded` REALs, zeros at their end: tensor cores want multiples of 8.
extern "C" __global__ void __launch_bounds__(256) convert(const float* __restrict__ x, REAL* __restrict__ y, int count,
                                                          int channels, int padded) {
  FOR_EACH(i, count) assign(y[i], i % padded < channels ? x[i / padded * channels + i % padded] : 0.f);
}

// The way back, without rows.
extern "C" __global__ void __launch_bounds__(256) widen(const REAL* __restrict__ x, float* __restrict__ y, int count) {
  FOR_EACH(i, count) y[i] = to_float(x[i]);
}

// Rows of `from` REALs get longer, by zeros at their end, or shorter.
extern "C" __global__ void __launch_bounds__(256) resize_rows(const REAL* __restrict__ x, REAL* __restrict__ y,
                                                              int count, int from, int to) {
  FOR_EACH(i, count) {
    if (i % to < from) y[i] = x[i / to * from + i % to];
    else assign(y[i], 0.f);
  }
}

// c = a + b.
extern "C" __global__ void __launch_bounds__(256) add(const Vector* __restrict__ a, const Vector* __restrict__ b,
                                                      Vector* __restrict__ c, int count) {
  FOR_EACH(i, count) {
    const Vector u = a[i], v = b[i];
    Vector sum;
#pragma unroll
    for (int k = 0; k < WIDTH; k++) assign(sum.at[k], to_float(u.at[k]) + to_float(v.at[k]));
    c[i] = sum;
  }
}

// y = [u; u + v; u - v].
extern "C" __global__ void __launch_bounds__(256) expand_pair(const Vector* __restrict__ u,
                                                              const Vector* __restrict__ v, Vector* __restrict__ y,
                                                              int count) {
  FOR_EACH(i, count) {
    const Vector centre = u[i], step = v[i];
    Vector plus, minus;
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
      assign(plus.at[k], to_float(centre.at[k]) + to_float(step.at[k]));
      assign(minus.at[k], to_float(centre.at[k]) - to_float(step.at[k]));
    }
    y[i] = centre, y[count + i] = plus, y[2 * count + i] = minus;
  }
}

// du = dy0 + dy+ + dy-, dv = dy+ - dy-.
extern "C" __global__ void __launch_bounds__(256) contract_pair(const Vector* __restrict__ dy, Vector* __restrict__ du,
                                                                Vector* __restrict__ dv, int count) {
  FOR_EACH(i, count) {
    const Vector centre = dy[i], plus = dy[count + i], minus = dy[2 * count + i];
    Vector u, v;
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
      assign(u.at[k], to_float(centre.at[k]) + to_float(plus.at[k]) + to_float(minus.at[k]));
      assign(v.at[k], to_float(plus.at[k]) - to_float(minus.at[k]));
    }
    du[i] = u, dv[i] = v;
  }
}

// Means (sums times share) over window x window tiles of x (n, rows window, columns window, C vectors).
// count: vectors of y.
extern "C" __global__ void __launch_bounds__(256) average_pool(const Vector* __restrict__ x, Vector* __restrict__ y,
                                                               int count, int rows, int columns, int vectors,
                                                               int window, float share) {
  FOR_EACH(i, count) {
    const int v = i % vectors, q = i / vectors % columns, p = i / vectors / columns % rows;
    const int image = i / vectors / columns / rows;
    float sums[WIDTH] = {};
    for (int r = 0; r < window; r++)
      for (int s = 0; s < window; s++) {
        const int pixel = ((image * rows + p) * window + r) * columns * window + q * window + s;
        const Vector in = x[(long long)pixel * vectors + v];
#pragma unroll
        for (int k = 0; k < WIDTH; k++) sums[k] += to_float(in.at[k]);
      }
    Vector mean;
#pragma unroll
    for (int k = 0; k < WIDTH; k++) assign(mean.at[k], sums[k] * share);
    y[i] = mean;
  }
}

// Each pixel of a tile gets dy share, share = 1 / window^2. count: vectors of dx (n, rows window, columns window, C).
extern "C" __global__ void __launch_bounds__(256) average_pool_backward(const Vector* __restrict__ dy,
                                                                        Vector* __restrict__ dx, int count, int rows,
                                                                        int columns, int vectors, int window,
                                                                        float share) {
  FOR_EACH(i, count) {
    const int v = i % vectors, q = i / vectors % (columns * window);
    const int p = i / vectors / (columns * window) % (rows * window);
    const int image = i / vectors / (columns * window) / (rows * window);
    Vector d = dy[((image * rows + p / window) * columns + q / window) * vectors + v];
#pragma unroll
    for (int k = 0; k < WIDTH; k++) assign(d.at[k], to_float(d.at[k]) * share);
    dx[i] = d;
  }
}
