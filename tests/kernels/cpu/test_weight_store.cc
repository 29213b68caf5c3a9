#include "kernels/cpu/weight_store.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/cpu/thread_pool.h"
#include "toy_model.h"

namespace rollpack::kernels::cpu {
namespace {

using testing::error_text;
using testing::Numbers;

struct Declared {
  WeightId embedding, qkv, gated, vector;
};

Declared declare(WeightStore& store) {
  return {store.declare({"embed", WeightKind::kEmbedding, {130}, 37}),
          store.declare({"qkv", WeightKind::kLinear, {60, 20, 20}, 37}),
          store.declare({"gate_up", WeightKind::kGated, {50, 50}, 37}),
          store.declare({"norm", WeightKind::kVector, {37}, 1})};
}

void load(WeightStore& store, WeightId id, int32_t part, int64_t rows, int64_t cols, uint64_t seed,
          ThreadPool* pool = nullptr) {
  const auto values = Numbers(seed).vector(rows * cols, 2.0f);
  store.load(id, part, {values.data(), DType::kF32, {rows, cols}}, {0, rows}, pool);
}

void load_all(WeightStore& store, const Declared& ids, uint64_t seed, ThreadPool* pool = nullptr) {
  load(store, ids.embedding, 0, 130, 37, seed, pool);
  load(store, ids.qkv, 2, 20, 37, seed + 3, pool);  // parts in any order
  load(store, ids.qkv, 0, 60, 37, seed + 1, pool);
  load(store, ids.qkv, 1, 20, 37, seed + 2, pool);
  load(store, ids.gated, 0, 50, 37, seed + 4, pool);
  load(store, ids.gated, 1, 50, 37, seed + 5, pool);
  load(store, ids.vector, 0, 37, 1, seed + 6, pool);
}

uint64_t stage_and_hash(WeightStore& store, const Declared& ids, uint64_t seed) {
  store.begin_staging();
  load_all(store, ids, seed);
  store.commit();
  return store.committed_hash(nullptr);
}

class WeightStores : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(, WeightStores, ::testing::Values(DType::kBF16, DType::kF32),
                         [](const auto& info) { return std::string(dtype_name(info.param)); });

TEST_P(WeightStores, PackedColumnsAreTheSourcesRows) {
  WeightStore store(GetParam(), false);
  const Declared ids = declare(store);
  stage_and_hash(store, ids, 1);
  const auto rounded = [](float value) {
    return GetParam() == DType::kBF16 ? bf16_to_f32(f32_to_bf16(value)) : value;
  };
  const auto v = Numbers(4).vector(20 * 37, 2.0f);
  const PackedMatrix qkv = store.matrix(ids.qkv, "test");
  EXPECT_EQ(qkv.columns, 100);
  for (int64_t row = 0; row < 20; ++row) {
    std::vector<float> column(37);
    gather_column(qkv, 80 + row, column.data());
    for (size_t k = 0; k < 37; ++k) {
      ASSERT_EQ(column[k], rounded(v[static_cast<size_t>(row * 37) + k])) << row << ", " << k;
    }
  }
  const auto norm = Numbers(7).vector(37, 2.0f);
  for (size_t i = 0; i < 37; ++i) {
    EXPECT_EQ(store.vector(ids.vector, 37, "test")[i], rounded(norm[i]));
  }
}

TEST_P(WeightStores, GatedPanelsInterleaveGateAndUpInThirtyTwos) {
  WeightStore store(GetParam(), false);
  const Declared ids = declare(store);
  stage_and_hash(store, ids, 1);
  const auto gate = Numbers(5).vector(50 * 37, 2.0f), up = Numbers(6).vector(50 * 37, 2.0f);
  PackedMatrix matrix = store.matrix(ids.gated, "test");
  EXPECT_EQ(matrix.columns, 50);
  EXPECT_EQ(matrix.num_panels(), 2);
  matrix.is_gated = false;  // look at its lanes as plain columns
  for (const int64_t row : {0, 31, 32, 49}) {
    std::vector<float> gate_lane(37), up_lane(37);
    gather_column(matrix, row / 32 * 64 + row % 32, gate_lane.data());
    gather_column(matrix, row / 32 * 64 + 32 + row % 32, up_lane.data());
    for (size_t k = 0; k < 37; ++k) {
      EXPECT_NEAR(gate_lane[k], gate[static_cast<size_t>(row * 37) + k], 0x1p-7);
      EXPECT_NEAR(up_lane[k], up[static_cast<size_t>(row * 37) + k], 0x1p-7);
    }
  }
}

TEST_P(WeightStores, HashesDependOnValuesOnly) {
  ThreadPool pool(3);
  WeightStore store(GetParam(), false);
  const Declared ids = declare(store);
  const uint64_t first = stage_and_hash(store, ids, 1);
  EXPECT_EQ(store.committed_hash(&pool), first);
  EXPECT_NE(stage_and_hash(store, ids, 2), first);
  WeightStore other(GetParam(), true);  // shared memory, packed by a pool
  const Declared other_ids = declare(other);
  other.begin_staging();
  load_all(other, other_ids, 1, &pool);
  other.commit();
  EXPECT_EQ(other.committed_hash(nullptr), first);
}

TEST_P(WeightStores, SourceTypesThatHoldTheSameValuesGiveTheSameBits) {
  WeightStore store(GetParam(), false);
  const WeightId id = store.declare({"w", WeightKind::kLinear, {64}, 8});
  std::vector<float> f32;
  std::vector<uint16_t> bf16, f16;
  for (int i = 0; i < 512; ++i) {
    const float value = static_cast<float>(i % 32 - 16) * 0.125f;
    f32.push_back(value);
    bf16.push_back(f32_to_bf16(value));
    // The same numbers in half precision: sign, exponent and mantissa moved over.
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t half = (bits >> 16 & 0x8000u) |
                          (value == 0 ? 0u : ((bits >> 23 & 0xffu) - 112u) << 10 |
                                                 (bits >> 13 & 0x3ffu));
    f16.push_back(static_cast<uint16_t>(half));
  }
  std::vector<uint64_t> hashes;
  for (const ConstTensor& source : {ConstTensor{f32.data(), DType::kF32, {64, 8}},
                                    ConstTensor{bf16.data(), DType::kBF16, {64, 8}},
                                    ConstTensor{f16.data(), DType::kF16, {64, 8}}}) {
    store.begin_staging();
    store.load(id, 0, source, {0, 64}, nullptr);
    store.commit();
    hashes.push_back(store.committed_hash(nullptr));
  }
  EXPECT_EQ(hashes[1], hashes[0]);
  EXPECT_EQ(hashes[2], hashes[0]);
}

TEST_P(WeightStores, ShardsKeepTheirRowsOnly) {
  WeightStore store(GetParam(), false);
  const WeightId id = store.declare({"w", WeightKind::kLinear, {8, 4}, 2});
  std::vector<float> values;
  for (int i = 0; i < 16; ++i) values.push_back(static_cast<float>(i));
  store.begin_staging();
  store.load(id, 0, {values.data(), DType::kF32, {8, 2}}, {4, 8}, nullptr);
  store.load(id, 1, {values.data(), DType::kF32, {4, 2}}, {2, 4}, nullptr);
  store.commit();
  const PackedMatrix matrix = store.matrix(id, "test");
  EXPECT_EQ(matrix.columns, 6);
  float column[2];
  gather_column(matrix, 0, column);
  EXPECT_EQ(column[0], 8.0f);
  gather_column(matrix, 4, column);
  EXPECT_EQ(column[1], 5.0f);
}

TEST(WeightStore, ACopyOfTheCommittedSetTakesSingleUpdates) {
  WeightStore store(DType::kBF16, false);
  const Declared ids = declare(store);
  const uint64_t first = stage_and_hash(store, ids, 1);
  store.begin_staging();
  store.copy_committed_to_staged();
  load(store, ids.vector, 0, 37, 1, 50);
  EXPECT_EQ(store.committed_hash(nullptr), first) << "staging must not touch the committed set";
  store.commit();
  EXPECT_NE(store.committed_hash(nullptr), first);
  store.begin_staging();
  store.copy_committed_to_staged();
  load(store, ids.vector, 0, 37, 1, 7);  // the first set's values again
  store.commit();
  EXPECT_EQ(store.committed_hash(nullptr), first);
  store.begin_staging();
  store.discard();
  EXPECT_EQ(store.committed_hash(nullptr), first);
}

TEST(WeightStore, ErrorsNameTheWeightAndItsPart) {
  WeightStore store(DType::kBF16, false);
  const Declared ids = declare(store);
  EXPECT_EQ(error_text([&] { load(store, ids.qkv, 0, 60, 37, 1); }),
            "weights = not staged; call begin_staging() first");
  EXPECT_EQ(error_text([&] { store.matrix(ids.qkv, "linear"); }),
            "qkv = not committed; commit weights before a step");
  store.begin_staging();
  load(store, ids.embedding, 0, 130, 37, 1);
  load(store, ids.qkv, 0, 60, 37, 1);
  EXPECT_EQ(error_text([&] { store.commit(); }),
            "qkv part 1 = not loaded; every part is loaded before a commit or an export");
  EXPECT_EQ(error_text([&] { load(store, ids.qkv, 3, 60, 37, 1); }),
            "qkv part = 3: expected 0 to 2");
  EXPECT_EQ(error_text([&] { load(store, ids.qkv, 1, 60, 37, 1); }),
            "qkv part 1 = [60, 37]: expected [20, 37]");
  EXPECT_EQ(error_text([&] { load(store, 9, 0, 60, 37, 1); }),
            "load_weight weight = 9: expected a declared weight, 0 to 3");
  const std::vector<int32_t> integers(37);
  EXPECT_EQ(error_text([&] {
              store.load(ids.vector, 0, {integers.data(), DType::kI32, {37, 1}}, {0, 37}, nullptr);
            }),
            "norm part 0 dtype = int32: expected float32, bfloat16 or float16");
  EXPECT_EQ(error_text([&] { store.begin_staging(); }),
            "weights = staged; commit or discard the staged set first");
  EXPECT_EQ(error_text([&] { store.declare({"late", WeightKind::kVector, {1}, 1}); }),
            "weight = late; all weights are declared before the first is staged");
  store.discard();
  EXPECT_EQ(error_text([&] { stage_and_hash(store, ids, 1), store.matrix(ids.vector, "linear"); }),
            "linear weight = norm: expected a matrix");
}

TEST(WeightStore, PrivateWeightsAreNotExported) {
  WeightStore store(DType::kBF16, false);
  const Declared ids = declare(store);
  store.begin_staging();
  load_all(store, ids, 1);
  EXPECT_EQ(error_text([&] { store.export_staged(); }),
            "shared_weights = false: expected true; private weights have no descriptor to export");
}

TEST(WeightStore, AnotherProcessAdoptsAnExportedSet) {
  WeightStore owner(DType::kBF16, true);
  const Declared ids = declare(owner);
  owner.begin_staging();
  load_all(owner, ids, 1);
  const int fd = owner.export_staged();
  EXPECT_EQ(error_text([&] { load(owner, ids.vector, 0, 37, 1, 1); }),
            "norm = sealed; an exported or adopted set takes no more tensors");
  EXPECT_EQ(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
  owner.commit();
  const uint64_t want = owner.committed_hash(nullptr);

  const pid_t child = fork();  // inherits the descriptor
  if (child == 0) {
    WeightStore adopter(DType::kBF16, true);
    declare(adopter);
    adopter.adopt_staged(fd);
    adopter.commit();
    _exit(adopter.committed_hash(nullptr) == want ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

TEST(WeightStore, AdoptedWeightsOutliveTheirOwnerAndStageAgain) {
  WeightStore adopter(DType::kBF16, false);
  const Declared ids = declare(adopter);
  uint64_t want = 0;
  {
    WeightStore owner(DType::kBF16, true);
    declare(owner);
    owner.begin_staging();
    load_all(owner, ids, 1);
    const int fd = dup(owner.export_staged());
    adopter.adopt_staged(fd);
    close(fd);
    owner.commit();
    want = owner.committed_hash(nullptr);
  }
  adopter.commit();
  EXPECT_EQ(adopter.committed_hash(nullptr), want);
  adopter.begin_staging();
  adopter.copy_committed_to_staged();
  load(adopter, ids.vector, 0, 37, 1, 50);
  adopter.commit();
  EXPECT_NE(adopter.committed_hash(nullptr), want);
}

TEST(WeightStore, UnsealedShortAndForeignDescriptorsAreRefused) {
  WeightStore adopter(DType::kBF16, false);
  declare(adopter);
  const int open_fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  ASSERT_EQ(ftruncate(open_fd, 4096), 0);
  EXPECT_EQ(error_text([&] { adopter.adopt_staged(open_fd); }),
            "weights descriptor = seals 0x0: expected seals 0xe (shrink, grow, write); memory that "
            "its writer can still change is not adopted");
  ASSERT_EQ(fcntl(open_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE), 0);
  EXPECT_EQ(error_text([&] { adopter.adopt_staged(open_fd); }),
            "weights descriptor = 4096 bytes: expected 2097152 bytes; the packed weights are of "
            "another model or layout");
  close(open_fd);

  WeightStore foreign(DType::kBF16, true);
  const WeightId id = foreign.declare({"other", WeightKind::kVector, {37}, 1});
  foreign.begin_staging();
  load(foreign, id, 0, 37, 1, 1);
  const int fd = foreign.export_staged();
  const std::string text = error_text([&] { adopter.adopt_staged(fd); });
  EXPECT_NE(text.find("weights descriptor = layout "), std::string::npos) << text;
  EXPECT_NE(text.find("of another model or layout"), std::string::npos) << text;
}

}  // namespace
}  // namespace rollpack::kernels::cpu
