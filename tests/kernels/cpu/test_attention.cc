// Attention below the backend, where pages can be filled with anything.
#include "kernels/cpu/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/base/dtype.h"
#include "kernels/cpu/float_mode.h"
#include "toy_model.h"

namespace rollpack::kernels::cpu {
namespace {

using testing::Numbers;

constexpr int32_t kNumPages = 64;

template <class Element>
Element round_to(float value) {
  if constexpr (sizeof(Element) == 2) {
    return f32_to_bf16(value);
  } else {
    return value;
  }
}
float value_of(uint16_t element) {
  return bf16_to_f32(element);
}
float value_of(float element) {
  return element;
}

// One sequence of `length` keys in pages of an order of its own, everything else NaN.
template <class Element>
class Fixture {
 public:
  explicit Fixture(int32_t length, uint64_t page_seed = 0)
      : length_(length), pages_(shape_, page_bytes() * kNumPages) {
    std::memset(pages_.data(), 0xff, static_cast<size_t>(page_bytes() * kNumPages));
    for (int32_t i = 0; i < kNumPages; ++i) table_.push_back(i);
    Numbers order(page_seed);
    for (size_t i = table_.size(); page_seed != 0 && i > 1; --i) {
      std::swap(table_[i - 1], table_[static_cast<size_t>(order.below(static_cast<int32_t>(i)))]);
    }
    Numbers numbers(11);
    for (int32_t t = 0; t < length; ++t) {
      for (int64_t g = 0; g < shape_.G; ++g) {
        const auto k = elements(numbers, shape_.K), v = elements(numbers, shape_.K);
        pages_.write(table_[static_cast<size_t>(t / kPageTokens)], 0, g, t % kPageTokens, k.data(),
                     v.data());
        keys.push_back(k);
        values.push_back(v);
      }
    }
    q = elements(numbers, length * shape_.H * shape_.K);
  }

  // Attention of rows [begin, end), each a position of its own, in one step.
  std::vector<Element> run(int32_t begin, int32_t end, int num_threads = 2, int32_t window = 0,
                           Isa isa = supported_isas().front()) {
    const FlushSubnormalsScope flush;
    ThreadPool pool(num_threads);
    StepContext step(shape_, {.max_num_seqs = 1, .max_num_batched_tokens = 4096}, kNumPages);
    StepPlan plan;
    testing::add_rows(plan, std::vector<int32_t>(static_cast<size_t>(end - begin), 1), begin,
                      table_);
    step.begin(plan);
    const int64_t width = shape_.H * shape_.K;
    std::vector<Element> out(static_cast<size_t>((end - begin) * width));
    Attention<Element> attention(kernel_table(isa), kernel_table(isa), shape_, pages_, num_threads);
    attention.run(pool, step,
                  {.window = window,
                   .q = {q.data() + begin * width, DType::kF32, {end - begin, width}},
                   .out = {out.data(), DType::kF32, {end - begin, width}}});
    return out;
  }

  // Attention of several sequences in one step. All have this fixture's keys; the first num_shared
  // of them (whole pages) stand in the same pages, the others in each sequence's own copy.
  std::vector<Element> run_siblings(const std::vector<std::pair<int32_t, int32_t>>& rows,
                                    int32_t num_shared) {
    const FlushSubnormalsScope flush;
    ThreadPool pool(2);
    const Siblings siblings = make_siblings(rows, num_shared);
    StepContext step(shape_, {.max_num_seqs = 1, .max_num_batched_tokens = 4096},
                     siblings.pages->num_pages());
    step.begin(siblings.plan);
    std::vector<Element> in, out(static_cast<size_t>(siblings.plan.num_rows() * width()));
    for (const auto& [begin, end] : rows) {
      in.insert(in.end(), q.begin() + begin * width(), q.begin() + end * width());
    }
    const Tensor in_view{in.data(), DType::kF32, {siblings.plan.num_rows(), width()}};
    const Tensor out_view{out.data(), DType::kF32, {siblings.plan.num_rows(), width()}};
    const KernelTable& best = kernel_table(supported_isas().front());
    Attention<Element> attention(best, best, shape_, *siblings.pages, 2);
    attention.run(pool, step, {.q = in_view, .out = out_view});
    return out;
  }
  // Tiles of that step that hold several sequences.
  int64_t num_shared_tiles(const std::vector<std::pair<int32_t, int32_t>>& rows,
                           int32_t num_shared) {
    const Siblings siblings = make_siblings(rows, num_shared);
    StepContext step(shape_, {.max_num_seqs = 1, .max_num_batched_tokens = 4096},
                     siblings.pages->num_pages());
    step.begin(siblings.plan);
    return std::ranges::count_if(step.tiles, [](const auto& t) { return t.num_parts > 1; });
  }

  // The same in f64 without chunks.
  double expected(int32_t row, int64_t head, int64_t column, int32_t window) const {
    const int32_t first = window > 0 ? std::max(0, row - window + 1) : 0;
    const int64_t g = head / (shape_.H / shape_.G);
    double max = -1e300, sum = 0, out = 0;
    std::vector<double> scores;
    for (int32_t t = first; t <= row; ++t) {
      double score = 0;
      for (int64_t i = 0; i < shape_.K; ++i) {
        score += static_cast<double>(value_of(q[index(row, head, i)])) *
                 static_cast<double>(value_of(key(t, g)[static_cast<size_t>(i)]));
      }
      scores.push_back(score / std::sqrt(static_cast<double>(shape_.K)));
      max = std::max(max, scores.back());
    }
    for (int32_t t = first; t <= row; ++t) {
      const double p = std::exp(scores[static_cast<size_t>(t - first)] - max);
      sum += p;
      out += p * static_cast<double>(value_of(
                     values[static_cast<size_t>(t * shape_.G + g)][static_cast<size_t>(column)]));
    }
    return out / sum;
  }

  size_t index(int64_t row, int64_t head, int64_t column) const {
    return static_cast<size_t>((row * shape_.H + head) * shape_.K + column);
  }
  const std::vector<Element>& key(int32_t t, int64_t g) const {
    return keys[static_cast<size_t>(t * shape_.G + g)];
  }
  int64_t width() const { return shape_.H * shape_.K; }
  const ModelShape& shape() const { return shape_; }

  std::vector<std::vector<Element>> keys, values;
  std::vector<Element> q;

 private:
  struct Siblings {
    std::unique_ptr<KvPages> pages;
    StepPlan plan;
  };

  Siblings make_siblings(const std::vector<std::pair<int32_t, int32_t>>& rows,
                         int32_t num_shared) const {
    constexpr int32_t kPagesEach = 600 / kPageTokens + 1;
    const auto num_pages = static_cast<int64_t>((rows.size() + 1) * kPagesEach);
    Siblings result{.pages = std::make_unique<KvPages>(shape_, page_bytes() * num_pages)};
    std::memset(result.pages->data(), 0xff, static_cast<size_t>(page_bytes() * num_pages));
    const auto write = [&](int32_t t, int32_t page) {
      for (int64_t g = 0; g < shape_.G; ++g) {
        result.pages->write(page, 0, g, t % kPageTokens, key(t, g).data(),
                            values[static_cast<size_t>(t * shape_.G + g)].data());
      }
    };
    for (int32_t t = 0; t < num_shared; ++t) write(t, t / kPageTokens);
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto [begin, end] = rows[i];
      const auto first_own = static_cast<int32_t>(i + 1) * kPagesEach;
      std::vector<int32_t> table = testing::page_range(0, num_shared / kPageTokens);
      for (int32_t t = num_shared; t < end; ++t) {
        const int32_t page = first_own + (t - num_shared) / kPageTokens;
        if (t % kPageTokens == 0) table.push_back(page);
        write(t, page);
      }
      testing::add_rows(result.plan, std::vector<int32_t>(static_cast<size_t>(end - begin), 1),
                        begin, table);
    }
    return result;
  }

  static std::vector<Element> elements(Numbers& numbers, int64_t count) {
    std::vector<Element> result;
    for (int64_t i = 0; i < count; ++i) result.push_back(round_to<Element>(numbers.uniform(2.0f)));
    return result;
  }
  int64_t page_bytes() const { return KvPages(shape_, int64_t{1} << 24).page_bytes(); }

  const ModelShape shape_{.D = 8,
                          .H = 6,
                          .G = 2,
                          .K = 20,
                          .F = 8,
                          .V = 8,
                          .L = 1,
                          .dtype = sizeof(Element) == 2 ? DType::kBF16 : DType::kF32};
  const int32_t length_;
  std::vector<int32_t> table_;
  KvPages pages_;
};

template <class Element>
class PagedAttention : public ::testing::Test {};
using Elements = ::testing::Types<uint16_t, float>;
TYPED_TEST_SUITE(PagedAttention, Elements);

TYPED_TEST(PagedAttention, StaysWithinTheRoundingOfItsSums) {
  Fixture<TypeParam> fixture(600);
  for (const int32_t window : {0, 1, 100, 300}) {
    const auto out = fixture.run(0, 600, 2, window);
    for (const int32_t row : {0, 1, 15, 16, 255, 256, 257, 511, 512, 599}) {
      for (int64_t head = 0; head < fixture.shape().H; ++head) {
        for (const int64_t column : {0, 15, 16, 19}) {
          // |v| <= 2; p and out are rounded to the element, scores and sums to f32.
          const double unit = sizeof(TypeParam) == 2 ? 0x1p-8 : 0x1p-20;
          EXPECT_NEAR(value_of(out[fixture.index(row, head, column)]),
                      fixture.expected(row, head, column, window), 2 * 2.0 * unit)
              << "row " << row << ", head " << head << ", window " << window;
        }
      }
    }
  }
}

TYPED_TEST(PagedAttention, EveryCutOfAPromptGivesTheBitsOfOnePass) {
  Fixture<TypeParam> fixture(530);
  const auto whole = fixture.run(0, 530);
  for (const int32_t cut : {1, 2, 7, 15, 16, 17, 100, 240, 255, 256, 257, 300, 511, 512, 529}) {
    auto both = fixture.run(0, cut);
    const auto rest = fixture.run(cut, 530);
    both.insert(both.end(), rest.begin(), rest.end());
    EXPECT_EQ(both, whole) << "cut at " << cut;
  }
  for (int32_t row = 0; row < 530; row += 23) {  // decoding: a tile of one query row
    const auto one = fixture.run(row, row + 1);
    EXPECT_TRUE(std::equal(one.begin(), one.end(), whole.begin() + row * fixture.width())) << row;
  }
}

TYPED_TEST(PagedAttention, PageOrderThreadsAndInstructionSetsChangeNoBit) {
  for (const int32_t window : {0, 70}) {
    const auto whole = Fixture<TypeParam>(400).run(0, 400, 1, window);
    for (const uint64_t seed : {1, 2, 3}) {
      EXPECT_EQ(Fixture<TypeParam>(400, seed).run(0, 400, 3, window), whole) << "order " << seed;
    }
    for (const Isa isa : supported_isas()) {
      EXPECT_EQ(Fixture<TypeParam>(400).run(0, 400, 2, window, isa), whole) << isa_name(isa);
    }
  }
}

// Siblings decode side by side on pages that they share up to some length; alone, each gets the
// same bits. Prompts end anywhere in a page and in a chunk; some siblings are longer than others.
TYPED_TEST(PagedAttention, SiblingsThatSharePagesGetTheBitsOfEachAlone) {
  for (const int32_t num_shared : {16, 48, 240, 256, 272, 512}) {
    Fixture<TypeParam> fixture(600);
    std::vector<std::pair<int32_t, int32_t>> rows;  // [begin, end) of each sequence's query rows
    for (int32_t i = 0; i < 12; ++i) {
      const int32_t begin = num_shared - 1 + (i % 5) * 13 + (i % 3);
      rows.push_back({begin, begin + 1 + (i % 4 == 3 ? 2 : 0)});
    }
    EXPECT_GT(fixture.num_shared_tiles(rows, num_shared), 0) << num_shared;
    const auto together = fixture.run_siblings(rows, num_shared);
    size_t at = 0;
    for (const auto& [begin, end] : rows) {
      const auto alone = fixture.run(begin, end);
      ASSERT_TRUE(
          std::equal(alone.begin(), alone.end(), together.begin() + static_cast<int64_t>(at)))
          << "row " << begin << ", " << num_shared << " shared";
      at += alone.size();
    }
  }
}

// Pages are NaN where nothing was written, so a result without NaN read nothing else.
TYPED_TEST(PagedAttention, MemoryPastTheLastKeyNeverMatters) {
  for (const int32_t length : {1, 2, 15, 16, 17, 31, 255, 256, 257, 300}) {
    const auto out = Fixture<TypeParam>(length).run(0, length);
    for (const TypeParam element : out) {
      ASSERT_TRUE(std::isfinite(value_of(element))) << "length " << length;
    }
  }
}

}  // namespace
}  // namespace rollpack::kernels::cpu
