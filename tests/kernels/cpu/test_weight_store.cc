// Sets of packed weights: staged, committed, discarded, and handed over through descriptors.
#include "kernels/cpu/weight_store.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <random>
#include <vector>

#include "kernels/base/error.h"
#include "kernels/cpu/thread_pool.h"
#include "toy_model.h"

namespace rollpack::kernels::cpu {
namespace {

using testing::error_text;
using testing::Numbers;

constexpr int64_t kRows = 70, kCols = 5;  // a whole panel and six columns of a second; odd K_in

const KernelTable& best_kernels() {
  return kernel_table(supported_isas().front());
}

struct Store {
  explicit Store(bool is_shared = false, int64_t rows = kRows, DType compute = DType::kF32)
      : store(best_kernels(), compute, is_shared),
        qkv(store.declare({.name = "qkv", .part_rows = {rows, 3}, .cols = kCols})),
        gate_up(store.declare(
            {.name = "gate_up", .kind = WeightKind::kGated, .part_rows = {40, 40}, .cols = kCols})),
        norm(store.declare(
            {.name = "norm", .kind = WeightKind::kVector, .part_rows = {7}, .cols = 1})),
        rows(rows) {}

  void load(WeightId id, int32_t part, int64_t part_rows, int64_t cols,
            const std::vector<float>& values) {
    const TensorSource source({values.data(), DType::kF32, {part_rows, cols}});
    store.load(id, part, source, {0, part_rows}, nullptr);
  }
  void load_all(uint64_t seed) {
    Numbers numbers(seed);
    load(qkv, 0, rows, kCols, numbers.vector(rows * kCols, 1.0f));
    load(qkv, 1, 3, kCols, numbers.vector(3 * kCols, 1.0f));
    load(gate_up, 0, 40, kCols, numbers.vector(40 * kCols, 1.0f));
    load(gate_up, 1, 40, kCols, numbers.vector(40 * kCols, 1.0f));
    load(norm, 0, 7, 1, numbers.vector(7, 1.0f));
  }
  void update(uint64_t seed) {
    store.begin_staging();
    load_all(seed);
    store.commit();
  }
  // Row `row` of qkv as the ops see it.
  std::vector<float> qkv_row(int64_t row) const {
    std::vector<float> values(kCols);
    gather_column(store.matrix(qkv, "test"), row, values.data());
    return values;
  }
  uint64_t hash() const { return store.committed_hash(nullptr); }

  WeightStore store;
  WeightId qkv, gate_up, norm;
  int64_t rows;
};

std::vector<float> expected_qkv_row(uint64_t seed, int64_t row) {
  const std::vector<float> all = Numbers(seed).vector((kRows + 3) * kCols, 1.0f);
  return {all.begin() + row * kCols, all.begin() + (row + 1) * kCols};
}

TEST(WeightStore, StagedWeightsAreUnseenUntilTheCommit) {
  Store s;
  s.update(1);
  const uint64_t hash = s.hash();
  s.store.begin_staging();
  s.load_all(2);
  for (const int64_t row : {0, 63, 64, 69, 70, 72}) {
    EXPECT_EQ(s.qkv_row(row), expected_qkv_row(1, row));
  }
  EXPECT_EQ(s.hash(), hash);
  s.store.commit();
  for (const int64_t row : {0, 63, 64, 69, 70, 72}) {
    EXPECT_EQ(s.qkv_row(row), expected_qkv_row(2, row));
  }
  EXPECT_NE(s.hash(), hash);
}

TEST(WeightStore, DiscardLeavesTheCommittedSet) {
  Store s;
  s.update(1);
  const uint64_t hash = s.hash();
  s.store.begin_staging();
  s.load_all(2);
  s.store.discard();
  EXPECT_EQ(s.hash(), hash);
  EXPECT_EQ(error_text([&] { s.store.commit(); }),
            "weights = not staged: call begin_staging() first");
  s.update(1);
  EXPECT_EQ(s.hash(), hash);
}

TEST(WeightStore, CopyOfTheCommittedSetTakesSomeTensorsAnew) {
  Store s;
  s.update(1);
  const uint64_t hash = s.hash();
  s.store.begin_staging();
  s.store.copy_committed_to_staged(nullptr);
  s.load(s.norm, 0, 7, 1, std::vector<float>(7, 3.0f));
  s.store.commit();
  EXPECT_NE(s.hash(), hash);
  EXPECT_EQ(s.qkv_row(66), expected_qkv_row(1, 66));
  EXPECT_EQ(s.store.vector(s.norm, 7, "test")[6], 3.0f);
}

TEST(WeightStore, AMissingPartIsNamed) {
  Store s;
  s.store.begin_staging();
  s.load(s.qkv, 0, kRows, kCols, std::vector<float>(kRows * kCols));
  EXPECT_EQ(error_text([&] { s.store.commit(); }),
            "qkv part 1 = not loaded: every part is loaded before a commit or an export");
  EXPECT_FALSE(s.store.has_committed());
}

TEST(WeightStore, SizesDtypesPartsAndShardsAreChecked) {
  Store s;
  s.store.begin_staging();
  const std::vector<float> values(kRows * kCols);
  const auto load = [&](int32_t part, const ConstTensor& source, ShardRange shard) {
    return error_text([&] { s.store.load(s.qkv, part, TensorSource(source), shard, nullptr); });
  };
  EXPECT_EQ(load(0, {values.data(), DType::kF32, {kRows, kCols - 1}}, {0, kRows}),
            "qkv part 0 = [70, 4]: expected [70, 5]");
  EXPECT_EQ(load(0, {values.data(), DType::kI32, {kRows, kCols}}, {0, kRows}),
            "qkv part 0 dtype = int32: expected float32, bfloat16 or float16");
  EXPECT_EQ(load(2, {values.data(), DType::kF32, {kRows, kCols}}, {0, kRows}),
            "qkv part = 2: expected 0 to 1");
  EXPECT_EQ(load(0, {values.data(), DType::kF32, {kRows, kCols}}, {0, kRows + 1}),
            "qkv part 0 shard = [0, 71): expected a range of rows in [0, 70)");
  EXPECT_EQ(
      error_text([&] {
        s.store.load(9, 0, TensorSource({values.data(), DType::kF32, {kRows, kCols}}), {}, nullptr);
      }),
      "load_weight weight = 9: expected a declared weight, 0 to 2");
  EXPECT_EQ(error_text([&] { s.store.declare({.name = "late", .part_rows = {1}, .cols = 1}); }),
            "weight = late: all weights are declared before the first is staged");
}

TEST(WeightStore, ABitOfAnyTensorChangesTheHash) {
  Store s;
  s.update(1);
  const uint64_t hash = s.hash();
  Numbers numbers(1);
  std::vector<float> qkv = numbers.vector(kRows * kCols, 1.0f);
  for (const size_t at : {size_t{0}, size_t{63 * kCols}, size_t{kRows * kCols - 1}}) {
    std::vector<float> changed = qkv;
    changed[at] = std::bit_cast<float>(std::bit_cast<uint32_t>(changed[at]) ^ 1u);
    s.store.begin_staging();
    s.store.copy_committed_to_staged(nullptr);
    s.load(s.qkv, 0, kRows, kCols, changed);
    s.store.commit();
    EXPECT_NE(s.hash(), hash) << at;
    s.store.begin_staging();
    s.store.copy_committed_to_staged(nullptr);
    s.load(s.qkv, 0, kRows, kCols, qkv);
    s.store.commit();
    EXPECT_EQ(s.hash(), hash) << at;
  }
}

// A file that ends too early.
class ShortFile final : public WeightSource {
 public:
  ShortFile(int64_t rows, int64_t cols) : WeightSource(DType::kF32, rows, cols) {}
  const std::byte* read_rows(int64_t begin, int64_t end,
                             std::vector<std::byte>& scratch) const override {
    if (end == rows) throw Error({.code = ErrorCode::kDataLoss, .message = "the file ended"});
    scratch.resize(static_cast<size_t>((end - begin) * row_bytes()));
    return scratch.data();
  }
};

TEST(WeightStore, APartWhoseSourceFailedIsNotLoaded) {
  for (const bool is_loaded_before : {false, true}) {
    Store s;
    ThreadPool pool(2);
    s.store.begin_staging();
    if (is_loaded_before) s.load_all(1);
    EXPECT_EQ(error_text([&] {
                s.store.load(s.qkv, 0, ShortFile(kRows, kCols), {0, kRows}, &pool);
              }),
              "the file ended");
    EXPECT_EQ(error_text([&] { s.store.commit(); }),
              "qkv part 0 = not loaded: every part is loaded before a commit or an export");
  }
}

TEST(WeightStore, AShardIsTheRowsOfItsRange) {
  Store s;
  s.store.begin_staging();
  const std::vector<float> all = Numbers(1).vector(kRows * kCols, 1.0f);
  const TensorSource source({all.data(), DType::kF32, {kRows, kCols}});
  s.store.load(s.qkv, 0, source, {6, 70}, nullptr);
  s.load(s.qkv, 1, 3, kCols, std::vector<float>(3 * kCols, 4.0f));
  s.load(s.gate_up, 0, 40, kCols, std::vector<float>(40 * kCols));
  s.load(s.gate_up, 1, 40, kCols, std::vector<float>(40 * kCols));
  s.load(s.norm, 0, 7, 1, std::vector<float>(7));
  s.store.commit();
  EXPECT_EQ(s.store.matrix(s.qkv, "test").columns, 67);
  EXPECT_EQ(s.qkv_row(0), expected_qkv_row(1, 6));
  EXPECT_EQ(s.qkv_row(63), expected_qkv_row(1, 69));
  EXPECT_EQ(s.qkv_row(64), std::vector<float>(kCols, 4.0f));
}

TEST(SharedWeights, AnAdopterHasTheBitsOfTheWriter) {
  Store writer(true), reader(true);
  writer.store.begin_staging();
  writer.load_all(1);
  const int fd = writer.store.export_staged();
  EXPECT_EQ(writer.store.export_staged(), fd);
  reader.store.adopt_staged(fd);
  EXPECT_EQ(error_text([&] { reader.load_all(2); }),
            "qkv = sealed: an exported or adopted set takes no more tensors");
  reader.store.commit();
  writer.store.commit();
  EXPECT_EQ(reader.hash(), writer.hash());
  EXPECT_EQ(reader.qkv_row(65), expected_qkv_row(1, 65));
  writer.update(2);  // gives the shared set up; the reader keeps its mapping
  EXPECT_EQ(reader.qkv_row(65), expected_qkv_row(1, 65));
  EXPECT_NE(reader.hash(), writer.hash());
}

// Three matrices of some MiB, so that blocks of the hash lie within, across and beside them.
struct LargeStore {
  static constexpr int64_t kQueryRows = 1000, kValueRows = 333, kHalfRows = 900, kCols = 700;

  LargeStore()
      : store(best_kernels(), DType::kBF16, /*is_shared=*/true),
        qkv(store.declare({.name = "qkv", .part_rows = {kQueryRows, kValueRows}, .cols = kCols})),
        gate_up(store.declare({.name = "gate_up",
                               .kind = WeightKind::kGated,
                               .part_rows = {kHalfRows, kHalfRows},
                               .cols = kCols})),
        norm(store.declare(
            {.name = "norm", .kind = WeightKind::kVector, .part_rows = {kCols}, .cols = 1})) {}

  // Part `which` of five, with random values.
  void load(int which, Numbers& numbers) {
    const WeightId ids[] = {qkv, qkv, gate_up, gate_up, norm};
    const int32_t parts[] = {0, 1, 0, 1, 0};
    const int64_t rows[] = {kQueryRows, kValueRows, kHalfRows, kHalfRows, kCols};
    const int64_t cols = which == 4 ? 1 : kCols;
    const std::vector<float> values = numbers.vector(rows[which] * cols, 1.0f);
    const TensorSource source({values.data(), DType::kF32, {rows[which], cols}});
    store.load(ids[which], parts[which], source, {0, rows[which]},
               which % 2 == 0 ? &pool : nullptr);
  }

  ThreadPool pool{2};
  WeightStore store;
  WeightId qkv, gate_up, norm;
};

TEST(SharedWeights, HashesTakenWhilePackingAreThoseOfTheBytes) {
  std::mt19937 random(5);
  Numbers numbers(5);
  LargeStore writer;
  for (int update = 0; update < 4; ++update) {
    writer.store.begin_staging();
    std::vector<int> order = {0, 1, 2, 3, 4, 0, 2, 3};  // some tensors twice
    std::shuffle(order.begin(), order.end(), random);
    if (update > 0) {
      writer.store.copy_committed_to_staged(&writer.pool);
      order.resize(3);
    }
    for (const int which : order) {
      writer.load(which, numbers);
      if (update == 2) writer.store.staged_hash();  // asked for before the last tensor
    }
    const uint64_t told = writer.store.staged_hash();
    LargeStore reader;  // knows nothing but the bytes
    reader.store.adopt_staged(writer.store.export_staged());
    EXPECT_EQ(reader.store.staged_hash(), told) << "update " << update;
    writer.store.commit();
  }
}

TEST(SharedWeights, PrivateSetsHaveNoDescriptor) {
  Store s(false);
  s.store.begin_staging();
  s.load_all(1);
  EXPECT_EQ(error_text([&] { s.store.export_staged(); }),
            "shared_weights = false: expected true; private weights have no descriptor to export");
}

TEST(SharedWeights, AnotherLayoutIsRefused) {
  Store writer(true), wider(true, kRows + 1), rounded(true, kRows, DType::kBF16);
  writer.store.begin_staging();
  writer.load_all(1);
  const int fd = writer.store.export_staged();
  for (Store* other : {&wider, &rounded}) {
    EXPECT_NE(error_text([&] {
                other->store.adopt_staged(fd);
              }).find("the packed weights are of another model or layout"),
              std::string::npos);
    EXPECT_FALSE(other->store.has_committed());
  }
}

TEST(SharedWeights, AShardIsNotTakenForAWholeSet) {
  WeightStore sharded(best_kernels(), DType::kF32, true);
  const WeightId id = sharded.declare({.name = "w", .part_rows = {kRows, 3}, .cols = kCols});
  WeightStore whole(best_kernels(), DType::kF32, true);
  whole.declare({.name = "w", .part_rows = {kRows, 3}, .cols = kCols});
  const std::vector<float> values(kRows * kCols);
  sharded.begin_staging();
  const TensorSource first({values.data(), DType::kF32, {kRows, kCols}});
  const TensorSource second({values.data(), DType::kF32, {3, kCols}});
  sharded.load(id, 0, first, {0, 64}, nullptr);
  sharded.load(id, 1, second, {0, 3}, nullptr);
  const int fd = sharded.export_staged();
  EXPECT_THROW(whole.adopt_staged(fd), Error);
}

// Descriptors that no store of ours made.
class ForeignMemory : public ::testing::Test {
 protected:
  ForeignMemory() : fd(memfd_create("test", MFD_ALLOW_SEALING)) {}
  ~ForeignMemory() override { close(fd); }
  std::string adopt() {
    return error_text([&] { reader.store.adopt_staged(fd); });
  }
  void resize(int64_t bytes) { ASSERT_EQ(ftruncate(fd, bytes), 0); }
  void seal() { ASSERT_EQ(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE), 0); }

  Store reader{true};
  const int fd;
};

TEST_F(ForeignMemory, UnsealedIsRefused) {
  resize(2 << 20);
  EXPECT_EQ(adopt(),
            "weights descriptor = seals 0x0: expected seals 0xe (shrink, grow, write); memory that "
            "its writer can still change is not adopted");
}

TEST_F(ForeignMemory, TooSmallIsRefused) {
  resize(4096);
  seal();
  EXPECT_EQ(adopt(),
            "weights descriptor = 4096 bytes: expected 2097152 bytes; the packed weights are of "
            "another model or layout");
}

TEST_F(ForeignMemory, OfTheRightSizeWithoutAHeaderIsRefused) {
  resize(2 << 20);
  seal();
  EXPECT_NE(adopt().find("layout 0000000000000000, 0 bytes"), std::string::npos);
}

TEST(ForeignDescriptor, ThatIsNoMemfdIsRefused) {
  Store reader(true);
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  EXPECT_NE(error_text([&] { reader.store.adopt_staged(ends[0]); }).find("not a memfd"),
            std::string::npos);
  close(ends[0]);
  close(ends[1]);
}

}  // namespace
}  // namespace rollpack::kernels::cpu
