// Device functions of csrc/cuda behind plain C, for tests that compare them one by one.
#include "philox.cuh"
#include "resize.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace dmdr;

// Words r0..r3 of blocks first .. first + count - 1.
EXPORT void philox_words(const int64_t *seed, int64_t first, int64_t count, uint32_t *words) {
  const Stream stream(seed);
  for (int64_t i = 0; i < count; ++i) {
    const Words block = philox(stream, static_cast<uint64_t>(first + i));
    memcpy(words + 4 * i, &block, sizeof block);
  }
}

// The largest error of a normal against float64, over the most extreme and a spread of the 2^24 radii and angles.
EXPORT double box_muller_error() {
  constexpr uint32_t kWords = 1u << 24, kExtreme = 4096;
  double largest = 0.;
  for (uint32_t a = 0; a < kWords; a += a < kExtreme || a >= kWords - kExtreme ? 1 : 4096 - 7) {
    const double radius = std::sqrt(-2. * std::log((a + 1.) * 0x1p-24));
    for (uint32_t b = 0; b < kWords; b += 40009) {
      const double angle = 2. * M_PI * b * 0x1p-24;
      const float rough = box_muller_radius(a << 8);
      const Rotation rotation = box_muller_angle(b << 8);
      largest = std::fmax(largest, std::fabs(rough * rotation.cos - radius * std::cos(angle)));
      largest = std::fmax(largest, std::fabs(rough * rotation.sin - radius * std::sin(angle)));
    }
  }
  return largest;
}

// The matrix [size_out, size_in] that resizes one dimension.
EXPORT void resize_matrix(int64_t size_in, int64_t size_out, int64_t antialias, float *matrix) {
  const Resize resize(size_in, size_out, antialias != 0);
  for (int output = 0; output < size_out; ++output) {
    const Filter filter(resize, output);
    const float total = filter.total();
    for (int input = filter.window().first; input < filter.window().end; ++input)
      matrix[output * size_in + input] = filter.raw(input) / total;
  }
}

EXPORT void resize_windows(int64_t size_in, int64_t size_out, int64_t antialias, int64_t *first, int64_t *end) {
  const Resize resize(size_in, size_out, antialias != 0);
  for (int output = 0; output < size_out; ++output) {
    const Window window = Filter(resize, output).window();
    first[output] = window.first;
    end[output] = window.end;
  }
}

// What the kernels size their tables by: taps, inputs of `outputs` filters, outputs that cover `inputs`.
EXPORT void resize_bounds(int64_t size_in, int64_t size_out, int64_t antialias, int64_t outputs, int64_t inputs,
                          int64_t *bounds) {
  const Resize resize(size_in, size_out, antialias != 0);
  bounds[0] = resize.most_taps();
  bounds[1] = resize.most_inputs(static_cast<int>(outputs));
  bounds[2] = resize.most_outputs(static_cast<int>(inputs));
}
