// A list of numbers that a sample owns, or that lies in memory which the list keeps alive: a frame
// as it was received, from which a layout writes it into a slot without a copy between.
#pragma once

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace rollpack::bridge {

template <class T>
class Numbers {
 public:
  using value_type = T;
  using const_iterator = const T*;
  using iterator = const_iterator;

  Numbers() = default;
  Numbers(std::vector<T> own) : own_(std::move(own)) {}
  Numbers(std::initializer_list<T> own) : own_(own) {}
  // `keeper` keeps what `lying` shows, unchanged.
  Numbers(std::shared_ptr<const void> keeper, std::span<const T> lying)
      : keeper_(std::move(keeper)), lying_(lying) {}

  const T* data() const { return keeper_ ? lying_.data() : own_.data(); }
  size_t size() const { return keeper_ ? lying_.size() : own_.size(); }
  bool empty() const { return size() == 0; }
  const T* begin() const { return data(); }
  const T* end() const { return data() + size(); }
  const T& operator[](size_t i) const { return data()[i]; }
  const T& back() const { return data()[size() - 1]; }
  operator std::vector<T>() const { return {begin(), end()}; }  // a copy

  // To be changed: what lies elsewhere is copied first.
  std::vector<T>& own() {
    if (keeper_) own_.assign(begin(), end());
    keeper_.reset();
    return own_;
  }

  friend bool operator==(const Numbers& a, const Numbers& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }

 private:
  std::vector<T> own_;
  std::shared_ptr<const void> keeper_;
  std::span<const T> lying_;
};

}  // namespace rollpack::bridge
