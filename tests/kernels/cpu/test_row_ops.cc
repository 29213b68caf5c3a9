// Rotating and appending rows, and copying pages, below the backend: every byte of the cache is
// watched.
#include "kernels/cpu/row_ops.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/cpu/float_mode.h"
#include "toy_model.h"

namespace rollpack::kernels::cpu {
namespace {

using testing::Numbers;

constexpr int32_t kNumPages = 6;
constexpr uint8_t kUntouched = 0x5a;

template <class Element>
float value_of(Element element) {
  if constexpr (sizeof(Element) == 2) {
    return bf16_to_f32(element);
  } else {
    return element;
  }
}

template <class Element>
class RopeAppend : public ::testing::Test {
 protected:
  RopeAppend() : pages_(shape_, KvPages(shape_, 1 << 20).page_bytes() * kNumPages) {
    std::memset(pages_.data(), kUntouched, bytes());
    for (int p = 0; p < 64; ++p) {
      for (int i = 0; i < 3; ++i) rope_.push_back(std::cos(0.1f * static_cast<float>(p * i)));
      for (int i = 0; i < 3; ++i) rope_.push_back(std::sin(0.1f * static_cast<float>(p * i)));
    }
  }
  size_t bytes() const { return static_cast<size_t>(pages_.page_bytes() * kNumPages); }

  // Runs layer 1 on rows of `plan`; returns the rows that failed.
  std::vector<uint8_t> run(const StepPlan& plan, const std::vector<float>& qkv) {
    const FlushSubnormalsScope flush;
    ThreadPool pool(2);
    StepContext step(shape_, {.max_num_seqs = 1, .max_num_batched_tokens = 64}, kNumPages);
    step.begin(plan);
    q_.assign(static_cast<size_t>(plan.num_rows() * 12), Element{1});
    rope_append_rows<Element>(
        kernel_table(supported_isas().front()), pool, step, shape_, pages_,
        {.layer = 1,
         .qkv = {const_cast<float*>(qkv.data()), DType::kF32, {plan.num_rows(), 36}},
         .rope_table = {rope_.data(), DType::kF32, {64, 6}},
         .q = {q_.data(), shape_.dtype, {plan.num_rows(), 12}}},
        {});
    return step.row_failed;
  }
  float key(int32_t page, int32_t slot, int64_t head, int64_t i) const {
    const int64_t width = sizeof(Element) == 2 ? 2 : 1;
    return value_of(pages_.template keys<Element>(
        page, 1, head)[(i / width) * kPageTokens * width + slot * width + i % width]);
  }
  float value(int32_t page, int32_t slot, int64_t head, int64_t i) const {
    const int64_t width = sizeof(Element) == 2 ? 2 : 1;
    return value_of(pages_.template values<Element>(
        page, 1, head)[((slot / width) * pages_.value_columns() + i) * width + slot % width]);
  }
  bool is_page_untouched(int32_t page) const {
    for (int64_t block = 0; block < pages_.num_blocks(); ++block) {
      const std::byte* at = pages_.block_at(page, block / shape_.G, block % shape_.G);
      for (int64_t i = 0; i < pages_.block_bytes(); ++i) {
        if (at[i] != std::byte{kUntouched}) return false;
      }
    }
    return true;
  }

  const ModelShape shape_{.D = 8,
                          .H = 2,
                          .G = 2,
                          .K = 6,
                          .F = 8,
                          .V = 8,
                          .L = 2,
                          .dtype = sizeof(Element) == 2 ? DType::kBF16 : DType::kF32};
  KvPages pages_;
  std::vector<float> rope_;
  std::vector<Element> q_;
};

using Elements = ::testing::Types<uint16_t, float>;
TYPED_TEST_SUITE(RopeAppend, Elements);

TYPED_TEST(RopeAppend, WritesTheRowsSlotAndNoOther) {
  StepPlan plan;
  testing::add_rows(plan, {1}, 19, {2, 4});
  const std::vector<float> qkv = Numbers(1).vector(36, 1.0f);
  EXPECT_EQ(this->run(plan, qkv), std::vector<uint8_t>{0});
  for (const int32_t page : {0, 1, 2, 3, 5}) EXPECT_TRUE(this->is_page_untouched(page));
  const double unit = sizeof(TypeParam) == 2 ? 0x1p-8 : 0x1p-22;
  for (int64_t g = 0; g < 2; ++g) {
    const float* k = qkv.data() + 12 + g * 6;
    const float* v = qkv.data() + 24 + g * 6;
    for (int64_t i = 0; i < 3; ++i) {
      const double angle = 1.9 * static_cast<double>(i), low = k[i], high = k[i + 3];
      EXPECT_NEAR(this->key(4, 3, g, i), low * std::cos(angle) - high * std::sin(angle), 4 * unit);
      EXPECT_NEAR(this->key(4, 3, g, i + 3), high * std::cos(angle) + low * std::sin(angle),
                  4 * unit);
      EXPECT_NEAR(this->value(4, 3, g, i), v[i], unit);
    }
  }
  const KvPages untouched = [this] {
    KvPages pages(this->shape_, static_cast<int64_t>(this->bytes()));
    std::memset(pages.data(), kUntouched, this->bytes());
    return pages;
  }();
  for (const int32_t slot : {2, 4}) {  // the neighbours; slot 2 shares 4 bytes with slot 3
    for (int64_t i = 0; i < 6; ++i) {
      const auto* keys = untouched.template keys<TypeParam>(4, 1, 0);
      EXPECT_EQ(this->key(4, slot, 1, i), value_of(keys[0]));
      EXPECT_EQ(this->value(4, slot, 1, i), value_of(keys[0]));
    }
  }
}

TYPED_TEST(RopeAppend, PadsTouchNoPage) {
  StepPlan plan;
  testing::add_rows(plan, {1, 1, 1}, 0, {0});
  plan.positions = {kPadPosition, kPadPosition, kPadPosition};
  std::vector<float> qkv = Numbers(1).vector(3 * 36, 1.0f);
  qkv[50] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(this->run(plan, qkv), (std::vector<uint8_t>{0, 0, 0}));
  for (int32_t page = 0; page < kNumPages; ++page) EXPECT_TRUE(this->is_page_untouched(page));
  for (const TypeParam element : this->q_) EXPECT_EQ(value_of(element), 0.0f);
}

TYPED_TEST(RopeAppend, ARowThatIsNotFiniteFailsAndWritesZeros) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const size_t bad : {size_t{12}, size_t{23}, size_t{24}, size_t{35}}) {
    StepPlan plan;
    testing::add_rows(plan, {1}, 0, {0});
    testing::add_rows(plan, {1, 1}, 0, {1});
    testing::add_rows(plan, {1}, 0, {2});
    std::vector<float> qkv = Numbers(1).vector(4 * 36, 1.0f);
    qkv[2 * 36 + bad] = bad == 24 ? -infinity : std::numeric_limits<float>::quiet_NaN();
    EXPECT_EQ(this->run(plan, qkv), (std::vector<uint8_t>{0, 0, 1, 0}));
    for (int64_t g = 0; g < 2; ++g) {
      for (int64_t i = 0; i < 6; ++i) {
        EXPECT_EQ(this->key(1, 1, g, i), 0.0f);
        EXPECT_EQ(this->value(1, 1, g, i), 0.0f);
        EXPECT_NE(this->value(1, 0, g, i), 0.0f);
        EXPECT_NE(this->value(2, 0, g, i), 0.0f);
      }
    }
  }
}

TYPED_TEST(RopeAppend, CopiesTakeTheirTokensInTheOrderOfThePlan) {
  StepPlan write;
  testing::add_rows(write, std::vector<int32_t>(16, 1), 0, {0});
  testing::add_rows(write, std::vector<int32_t>(16, 1), 0, {1});
  this->run(write, Numbers(1).vector(32 * 36, 1.0f));
  const auto snapshot = [this](int32_t page) {
    std::vector<float> all;
    for (int32_t slot = 0; slot < kPageTokens; ++slot) {
      for (int64_t i = 0; i < 24; ++i) {
        const int64_t head = i / 6 % 2;
        all.push_back(i < 12 ? this->key(page, slot, head, i % 6)
                             : this->value(page, slot, head, i % 6));
      }
    }
    return all;
  };
  const std::vector<float> first = snapshot(0), second = snapshot(1);
  ThreadPool pool(3);
  // A chain, a page overwritten after it was read, and parts of pages, odd and even.
  StepPlan plan;
  plan.page_copies = {{0, 2, 16}, {1, 0, 16}, {2, 3, 16}, {0, 3, 5},
                      {3, 4, 16}, {2, 4, 2},  {0, 5, 0},  {1, 1, 16}};
  copy_pages(pool, plan, this->pages_);
  EXPECT_EQ(snapshot(0), second);
  EXPECT_EQ(snapshot(1), second);
  EXPECT_EQ(snapshot(2), first);
  std::vector<float> mixed = first;
  std::copy_n(second.begin(), 5 * 24, mixed.begin());
  EXPECT_EQ(snapshot(3), mixed);
  std::copy_n(first.begin(), 2 * 24, mixed.begin());
  EXPECT_EQ(snapshot(4), mixed);
  EXPECT_TRUE(this->is_page_untouched(5));
}

}  // namespace
}  // namespace rollpack::kernels::cpu
