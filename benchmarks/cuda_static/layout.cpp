// Prints what the headers of the CUDA kernels know and their machine code does not say: the dynamic
// shared memory of the tensor-core kernels, how splits are grouped to be merged, and what the lanes
// of a warp store and load in shared memory.
//
//   attention FORMAT SPANS ROW_TILES BYTES
//   merge SPLITS SPLITS_OF_A_GROUP
//   access KERNEL PLANE store|load WIDTH ADDRESS...    one per lane, -1 where it has none
//
// A host program: the compiler is told to include cuda_emulation.h first, which stands in for CUDA.
#include "cuda/attention/merge_splits.cuh"
#include "cuda/attention/mma/shared_memory.cuh"
#include "cuda/cache/head_rows.cuh"
#include "cuda/cache/packed_codes.cuh"

namespace int8kv {
namespace {

constexpr int kHeadSize = 128;
constexpr int kPairs = kHeadSize / 64;
constexpr int kSplits = 66;  // of an item: one sequence of 32k tokens on an H200, 8 KV heads

template <typename F, int kSpans, int kRowTiles>
void print_attention(const char* format) {
  std::printf("attention %s %d %d %d\n", format, kSpans, kRowTiles,
              MmaLayout<F, kSpans, kRowTiles>::kBytes);
}

template <typename F>
void print_attention(const char* format) {
  print_attention<F, 1, 1>(format);
  print_attention<F, 1, 2>(format);
  print_attention<F, 1, 4>(format);
  print_attention<F, 2, 1>(format);
  print_attention<F, 2, 2>(format);
  print_attention<F, 2, 4>(format);
}

// One access of a warp: byte(lane) is where a lane stores or loads `width` bytes, or -1.
template <typename Byte>
void print_access(const char* kernel, const char* plane, const char* access, int width,
                  Byte&& byte) {
  std::printf("access %s %s %s %d", kernel, plane, access, width);
  for (int lane = 0; lane < 32; ++lane) std::printf(" %d", byte(lane));
  std::printf("\n");
}

// A slot group of eight bits in shared memory: rows of 8 codes per lane on one side (Int8Writer
// stores them and Int8Gather loads them), vectors of the cache on the other.
void print_tile(const char* kernel, const char* rows, const char* vectors) {
  using Shape = RowShape<kHeadSize / kLaneDims, 1>;
  using Tile = GroupTile<Shape>;
  for (const bool is_key : {true, false}) {
    const char* plane = is_key ? "K" : "V";
    for (int member = 0; member < kSlotGroup; member += Shape::kRows) {
      print_access(kernel, plane, rows, kLaneDims, [&](int lane) {
        return Tile::byte(is_key, member + lane / Shape::kLanes, row_dim<Shape>(lane, 0));
      });
    }
    for (int first = 0; first < kHeadSize * kSlotGroup / kVectorBytes; first += 32) {
      print_access(kernel, plane, vectors, is_key ? 2 : kLaneDims, [&](int lane) {
        const int vector = first + lane;
        return is_key ? Tile::byte(true, Tile::key_slot(vector), Tile::key_dim(vector))
                      : Tile::byte(false, Tile::value_slot(vector), Tile::value_dim(vector));
      });
    }
  }
}

// The stores of LowBitWriter, which has a plane of field 0 of each byte: both codes of a pair of K
// at once, those of V by themselves.
template <typename Plane, bool kIsKey>
void print_plane(const char* name, int member) {
  for (int i = 0; i < kPairs; ++i) {
    for (int dim = 0; dim < (kIsKey ? 1 : 2); ++dim) {
      print_access("write_k6v4", name, "store", kIsKey ? 2 : 1, [&](int lane) {
        const int pair = head_pair(lane, i);
        if (field_shift<Plane, kIsKey>(pair) != 0) return -1;
        return kIsKey ? Plane::k_byte(kHeadSize, member, 2 * pair)
                      : Plane::v_byte(kSlotGroup, member, 2 * pair + dim);
      });
    }
  }
}

}  // namespace
}  // namespace int8kv

int main() {
  using namespace int8kv;
  print_attention<K8V8>("k8v8");
  print_attention<FormatOf<6, 4>>("k6v4");
  std::printf("merge %d %d\n", kSplits, ItemSplits{0, kSplits}.group_size());
  print_tile("write_k8v8", "store", "load");
  print_tile("gather_k8v8", "load", "store");
  for (int member = 0; member < kSlotGroup; ++member) {
    print_plane<Codes<6>::Low, true>("K", member);
    print_plane<Codes<6>::High, true>("K", member);
    print_plane<Codes<4>::Low, false>("V", member);
  }
}
