#include "kernels/base/error.h"

#include <gtest/gtest.h>

namespace rollpack {
namespace {

TEST(ErrorText, NamesFieldValueOriginAllowedAndAdvice) {
  EXPECT_EQ(format_error({.field = "engine.max_num_seqs",
                          .value = "0",
                          .origin = "configs/quickstart.yaml:12",
                          .allowed = "an integer from 1 to 65536",
                          .message = "256 suits most models"}),
            "engine.max_num_seqs = 0 (configs/quickstart.yaml:12): expected an integer from 1 to "
            "65536; 256 suits most models");
}

TEST(ErrorText, LeavesEmptyPartsOut) {
  EXPECT_EQ(format_error({.message = "all is lost"}), "all is lost");
  EXPECT_EQ(format_error({.field = "a"}), "a");
  EXPECT_EQ(format_error({.field = "a", .value = "1"}), "a = 1");
  EXPECT_EQ(format_error({.field = "a", .origin = "x:1"}), "a (x:1)");
  EXPECT_EQ(format_error({.field = "a", .allowed = "b"}), "a: expected b");
  EXPECT_EQ(format_error({.field = "a", .message = "b"}), "a: b");
  EXPECT_EQ(format_error({.value = "1"}), "1");
  EXPECT_EQ(format_error({.origin = "x:1", .message = "b"}), "x:1: b");
  EXPECT_EQ(format_error({.allowed = "b", .message = "c"}), "expected b; c");
  EXPECT_EQ(format_error({}), "");
}

TEST(ErrorText, WhatIsTheFormattedLineAndInfoKeepsTheParts) {
  const Error error({.code = ErrorCode::kNotFound, .field = "model.path", .value = "m"});
  EXPECT_STREQ(error.what(), "model.path = m");
  EXPECT_EQ(error.info.code, ErrorCode::kNotFound);
  EXPECT_EQ(error.info.value, "m");
}

TEST(ErrorCodes, NamesComeBackAsTheirCodes) {
  for (int code = 0; code <= static_cast<int>(ErrorCode::kInternal); ++code) {
    const auto value = static_cast<ErrorCode>(code);
    EXPECT_EQ(error_code_from_name(error_code_name(value)), value);
  }
  EXPECT_EQ(error_code_name(ErrorCode::kInvalidArgument), "invalid_argument");
  EXPECT_EQ(error_code_name(ErrorCode::kWouldBlock), "would_block");
  EXPECT_EQ(error_code_name(ErrorCode::kInternal), "internal");
}

TEST(ErrorCodes, UnknownNamesAreInternal) {
  EXPECT_EQ(error_code_from_name("no_such_code"), ErrorCode::kInternal);
  EXPECT_EQ(error_code_from_name(""), ErrorCode::kInternal);
}

TEST(ErrorText, ABrokenInvariantIsInternalAndSaysWhat) {
  try {
    fail_invariant("two plus two");
  } catch (const Error& error) {
    EXPECT_EQ(error.info.code, ErrorCode::kInternal);
    EXPECT_STREQ(error.what(), "two plus two");
    return;
  }
  FAIL() << "fail_invariant returned";
}

}  // namespace
}  // namespace rollpack
