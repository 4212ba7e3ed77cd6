// One sample of dmd_gradient in a kernel: reading its tensors, measuring a slice of it, writing a slice of its g.
#pragma once

#include "dmd_algebra.cuh"
#include "layout.cuh"

namespace dmdr {

constexpr int kDmdThreads = 512;
// Blocks that a multiprocessor's registers hold: Any's vectors are floats and want twice as many.
template <class Type>
constexpr int kDmdBlocks = Type::kFixed ? 2 : 1;

struct DmdParams {
  Layout layout;
  DmdArgs args;
  float written;           // what multiplies g as it is written
  uint32_t slices, slice;  // blocks per sample, and vectors for each
};

struct Slice {
  uint32_t first, last;  // vectors
  DMDR_DEVICE Slice(const DmdParams &p, uint32_t index) : first(index * p.slice), last(first + p.slice) {
    if (last > p.layout.vectors) last = p.layout.vectors;
  }
};

// For every vector of the slice that is this thread's: body(step, place).
template <class Type, class Body>
DMDR_DEVICE void for_slice(const DmdParams &p, const Slice &slice, Body body) {
  uint32_t step = 0;
#pragma unroll 1
  for (uint32_t i = slice.first + threadIdx.x; i < slice.last; i += kDmdThreads) {
    body(step, p.layout.place<Type>(i));
    ++step;
  }
}

class MaskOfSample {
 public:
  DMDR_DEVICE MaskOfSample(const dmdr_tensor &mask, int64_t b) : mask_(mask) {
    if (mask.data != nullptr) mask_.data = static_cast<uint8_t *>(mask.data) + b * mask.stride[0];
  }
  // Bit j: element j of the vector exists and is selected.
  template <class Type, class Place>
  DMDR_DEVICE uint32_t selected(const Place &place) const {
    constexpr uint32_t kAll = (1u << Type::kWidth) - 1u;
    if (mask_.data == nullptr) return Type::kFixed ? kAll : kAll >> (Type::kWidth - place.extent.count);
    const uint8_t *const from = static_cast<const uint8_t *>(mask_.data) + place.offset(mask_);
    uint32_t bits = 0;
    if constexpr (Type::kFixed) {
#pragma unroll
      for (int i = 0; i < Type::kWidth; i += 4) bits |= nonzero_bytes(*reinterpret_cast<const uint32_t *>(from + i)) << i;
    } else {
#pragma unroll
      for (int i = 0; i < Type::kWidth; ++i)
        if (i < place.extent.count && from[i] != 0) bits |= 1u << i;
    }
    return bits;
  }

 private:
  static DMDR_DEVICE uint32_t nonzero_bytes(uint32_t word) {
    return (word & 1u) | (word >> 7 & 2u) | (word >> 14 & 4u) | (word >> 21 & 8u);
  }
  dmdr_tensor mask_;
};

// fake and real as loaded: everything that a vector needs is on its way before the first value is used.
template <class Type>
struct Predictions {
  Vector<Type> fake, cond, uncond;
};

template <class Type>
class DmdSample {
 public:
  static constexpr int kWidth = Type::kWidth;

  DMDR_DEVICE DmdSample(const DmdArgs &args, int64_t b)
      : denoiser(args, b), x0_(sample_of(args.x0, b)), x_t_(sample_of(args.x_t, b)), fake_(sample_of(args.pred_fake, b)),
        cond_(sample_of(args.pred_real, b)), uncond_(sample_of(args.pred_real_uncond, b)),
        grad_(sample_of(args.grad, b)), mask_(args.mask, b), guided_(args.pred_real_uncond.data != nullptr),
        standard_(args.cfg_mode == DMDR_CFG_STANDARD), measures_(args.normalizer != DMDR_NO_NORMALIZER),
        reads_x_t_(args.prediction != DMDR_X0),
        cfg_(args.cfg != nullptr ? args.cfg[b] : static_cast<float>(args.cfg_scale)) {}

  // Sums over the slice; keep(step, fake - real) for every vector.
  template <class Keep>
  DMDR_DEVICE Measured measure(const DmdParams &p, const Slice &slice, Keep keep) const {
    float distance = 0.f;
    uint32_t count = 0, largest = 0;
    for_slice<Type>(p, slice, [&](uint32_t step, const auto &place) {
      const Predictions<Type> predictions = load(place);
      Vector<Type> x0_vector = Vector<Type>::zero(), x_t_vector = Vector<Type>::zero();
      if (measures_) x0_vector = Vector<Type>::load(x0_, place.offset(x0_), place.extent);
      if (measures_ && reads_x_t_) x_t_vector = Vector<Type>::load(x_t_, place.offset(x_t_), place.extent);
      const uint32_t on = mask_.template selected<Type>(place);
      float x0[kWidth], x_t[kWidth], real[kWidth], difference[kWidth];
      x0_vector.get(x0);
      x_t_vector.get(x_t);
      differences(predictions, difference, real);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const bool selected = (on >> j & 1u) != 0;
        const uint32_t magnitude = float_bits(fabsf(difference[j]));
        distance += selected ? denoiser.distance(x0[j], x_t[j], real[j]) : 0.f;
        largest = selected && magnitude > largest ? magnitude : largest;
      }
      count += __popc(on);
      keep(step, difference);
    });
    return {distance, static_cast<double>(count), largest, 0};
  }

  struct Written {
    double square, count;
  };
  // grad of the slice from get(step, place, fake - real), the sum of g's squares, and how many elements are selected.
  template <class Get>
  DMDR_DEVICE Written write(const DmdParams &p, const Slice &slice, const Scaling &scaling, const NanPolicy &policy,
                            Get get) const {
    float square = 0.f;
    uint32_t count = 0;
    for_slice<Type>(p, slice, [&](uint32_t step, const auto &place) {
      float g[kWidth];
      get(step, place, g);
      const uint32_t on = mask_.template selected<Type>(place);
      scaling.apply(g);
      policy.apply(g);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        g[j] = (on >> j & 1u) != 0 ? g[j] : 0.f;
        square += g[j] * g[j];
        g[j] *= p.written;
      }
      count += __popc(on);
      Vector<Type>::store(grad_, place.offset(grad_), g, place.extent);
    });
    return {square, static_cast<double>(count)};
  }

  template <class Place>
  DMDR_DEVICE Predictions<Type> load(const Place &place) const {
    Predictions<Type> loaded;
    loaded.fake = Vector<Type>::load(fake_, place.offset(fake_), place.extent);
    loaded.cond = Vector<Type>::load(cond_, place.offset(cond_), place.extent);
    loaded.uncond = loaded.cond;
    if (guided_) loaded.uncond = Vector<Type>::load(uncond_, place.offset(uncond_), place.extent);
    return loaded;
  }
  // fake - real and real, with classifier-free guidance.
  DMDR_DEVICE void differences(const Predictions<Type> &loaded, float (&difference)[kWidth],
                               float (&real)[kWidth]) const {
    float uncond[kWidth], fake[kWidth];
    loaded.cond.get(real);
    loaded.fake.get(fake);
    if (guided_) {
      loaded.uncond.get(uncond);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) real[j] = (standard_ ? uncond[j] : real[j]) + cfg_ * (real[j] - uncond[j]);
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) difference[j] = fake[j] - real[j];
  }

  const Denoiser denoiser;

 private:
  const dmdr_tensor x0_, x_t_, fake_, cond_, uncond_, grad_;
  const MaskOfSample mask_;
  const bool guided_, standard_, measures_, reads_x_t_;
  const float cfg_;
};

}  // namespace dmdr
