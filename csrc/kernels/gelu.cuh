// Exact (erf) GELU: value and derivative. Error function of Abramowitz & Stegun 7.1.26, as in kernels/gelu.py.
#pragma once
#include "simt.cuh"

#include <math.h>

namespace d2v {

// Phi(u), and exp(-u^2 / 2), which it needs anyway. The lower tail is computed as such, not as a difference from 1.
D2V_DEVICE float normal_cdf(float u, float& bell) {
  const float a = fabsf(u) * 0.70710678f;
  const float t = reciprocal_fast(fmaf(0.3275911f, a, 1.f));
  bell = exp2_fast(-1.44269504f * a * a);
  float p = fmaf(t, 0.5307027145f, -0.7265760135f);  // half the published coefficients
  p = fmaf(t, p, 0.7107068705f);
  p = fmaf(t, p, -0.142248368f);
  p = fmaf(t, p, 0.127414796f);
  const float tail = t * p * bell;  // Phi(-|u|)
  return u >= 0.f ? 1.f - tail : tail;
}

D2V_DEVICE float gelu(float u) {
  float bell;
  return u * normal_cdf(u, bell);
}

struct Gelu {
  float value, slope;
};
D2V_DEVICE Gelu gelu_and_slope(float u) {
  float bell;
  const float cdf = normal_cdf(u, bell);
  return {u * cdf, fmaf(u, bell * 0.39894228f, cdf)};
}

}  // namespace d2v
