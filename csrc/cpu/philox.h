// Philox4x32-10 and the normals drawn from it: the stream of every backend.
//
//   key = (lo32, hi32 of seed[0]);  counter = (lo32, hi32 of block, lo32, hi32 of seed[1]);  block = i / 4
//   words r0..r3; (a, b) = (r0, r1) for lanes i % 4 in {0, 1}, (r2, r3) for {2, 3}
//   u = ((a >> 8) + 1) 2^-24, turns = (b >> 8) 2^-24;  z = sqrt(-2 ln u) cos(2 pi turns) on even lanes, sin on odd
//
// Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include "math.h"

namespace dmdr {
namespace DMDR_LEVEL {

constexpr int kNoiseBlocks = 64;  // blocks drawn at a time: enough independent lanes to fill the multiplier
constexpr int kNoiseElements = 4 * kNoiseBlocks;

struct Stream {
  uint32_t key0, key1, stream0, stream1;
  explicit Stream(const int64_t *seed)
      : key0(static_cast<uint32_t>(seed[0])), key1(static_cast<uint32_t>(static_cast<uint64_t>(seed[0]) >> 32)),
        stream0(static_cast<uint32_t>(seed[1])), stream1(static_cast<uint32_t>(static_cast<uint64_t>(seed[1]) >> 32)) {}
};

struct Words {
  alignas(64) uint32_t word[4][kNoiseBlocks];
};

inline void philox(const Stream &stream, uint64_t first_block, Words &words) {
#pragma omp simd
  for (int lane = 0; lane < kNoiseBlocks; ++lane) {
    const uint64_t block = first_block + lane;
    uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
    uint32_t c2 = stream.stream0, c3 = stream.stream1, k0 = stream.key0, k1 = stream.key1;
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(p1);
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words.word[0][lane] = c0;
    words.word[1][lane] = c1;
    words.word[2][lane] = c2;
    words.word[3][lane] = c3;
  }
}

// The kNoiseElements normals that start at element 4 first_block of the stream.
inline void draw_normals(const Stream &stream, uint64_t first_block, float *normal) {
  Words words;
  philox(stream, first_block, words);
  alignas(64) float lane[4][kNoiseBlocks];
  for (int pair = 0; pair < 2; ++pair) {
    for (int i = 0; i < kNoiseBlocks; i += kLanes) {
      U a, b;
      std::memcpy(&a, &words.word[2 * pair][i], sizeof a);
      std::memcpy(&b, &words.word[2 * pair + 1][i], sizeof b);
      const F u = __builtin_convertvector((I)((a >> 8) + 1u), F) * 0x1p-24f;
      const F turns = __builtin_convertvector((I)(b >> 8), F) * 0x1p-24f;
      const F radius = sqrt(-2.f * log(u));
      const SinCos angle = sincos_turns(turns);
      const F even = radius * angle.cos, odd = radius * angle.sin;
      std::memcpy(&lane[2 * pair][i], &even, sizeof even);
      std::memcpy(&lane[2 * pair + 1][i], &odd, sizeof odd);
    }
  }
  for (int block = 0; block < kNoiseBlocks; ++block)
    for (int j = 0; j < 4; ++j) normal[4 * block + j] = lane[j][block];
}

// use(normals, done, take) for elements element .. element + count - 1 of the stream, `take` at a time. Draws are whole
// blocks from fixed places, of which a caller gets its part: a value never depends on how the work was cut.
template <class Use>
inline void for_normals(const Stream &stream, uint64_t element, int64_t count, Use use) {
  alignas(64) float normal[kNoiseElements];
  for (int64_t done = 0; done < count;) {
    const int skip = static_cast<int>((element + done) % 4);
    draw_normals(stream, (element + done) / 4, normal);
    const int64_t left = count - done, room = kNoiseElements - skip;
    const int64_t take = left < room ? left : room;
    use(normal + skip, done, take);
    done += take;
  }
}

}  // namespace DMDR_LEVEL
}  // namespace dmdr
