// Another process's memory read where it lies: what is there, what is not, and a process that went.
#include "trainer_bridge/shared_memory/peer_memory.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "tests/error_text.h"

namespace rollpack::bridge {
namespace {

using rollpack::testing::error_text;

constexpr size_t kPage = 4096;

// Two pages of which the second is taken away again.
class LastPage {
 public:
  LastPage() : data_(static_cast<std::byte*>(::mmap(nullptr, 2 * kPage, PROT_READ | PROT_WRITE,
                                                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    ::munmap(data_ + kPage, kPage);
    std::memset(data_, 7, kPage);
  }
  ~LastPage() { ::munmap(data_, kPage); }
  LastPage(const LastPage&) = delete;
  LastPage& operator=(const LastPage&) = delete;

  uint64_t address() const { return reinterpret_cast<uint64_t>(data_); }

 private:
  std::byte* const data_;
};

// A forked process that has put `text` where this one has something else, until it is told to end.
class Peer {
 public:
  Peer(std::string& shared, const std::string& text) {
    int ready[2], end[2];
    EXPECT_EQ(::pipe(ready), 0);
    EXPECT_EQ(::pipe(end), 0);
    pid_ = ::fork();
    if (pid_ == 0) {
      ::alarm(60);
      ::close(end[1]);
      shared.replace(0, text.size(), text);
      char byte = 0;
      if (::write(ready[1], &byte, 1) != 1) ::_exit(1);
      ::_exit(::read(end[0], &byte, 1) == 0 ? 0 : 2);
    }
    char byte = 0;
    EXPECT_EQ(::read(ready[0], &byte, 1), 1);
    for (const int fd : {ready[0], ready[1], end[0]}) ::close(fd);
    end_ = end[1];
  }
  ~Peer() { stop(); }
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;

  pid_t pid() const { return pid_; }
  void stop() {
    if (end_ < 0) return;
    ::close(end_);
    end_ = -1;
    int status = 0;
    EXPECT_EQ(::waitpid(pid_, &status, 0), pid_);
    EXPECT_EQ(status, 0);
  }

 private:
  pid_t pid_ = -1;
  int end_ = -1;
};

std::string text_at(const PeerMemory& memory, const std::string& place) {
  std::string found(place.size(), '?');
  memory.read(reinterpret_cast<uint64_t>(place.data()), std::as_writable_bytes(std::span(found)));
  return found;
}

TEST(PeerMemory, IsTheOtherProcesssAndIsReadWhereItLies) {
  std::string text(3 * kPage + 5, 'a');
  Peer peer(text, "of the other process");
  EXPECT_EQ(text.substr(0, 2), "aa");
  const std::string found = text_at(PeerMemory(peer.pid()), text);
  EXPECT_EQ(found.substr(0, 20), "of the other process");
  EXPECT_EQ(found.substr(20), text.substr(20));
  EXPECT_EQ(text_at(PeerMemory(::getpid()), text), text) << "this process's own";
}

TEST(PeerMemory, WhatIsNotThereIsRefusedByAddress) {
  const PeerMemory memory(::getpid());
  const LastPage page;
  std::vector<std::byte> bytes(kPage);
  memory.read(page.address(), bytes);
  EXPECT_EQ(bytes.back(), std::byte{7});
  // The first bytes are there, the last are not.
  const std::string text = error_text([&] { memory.read(page.address() + 1, bytes); });
  EXPECT_EQ(text.rfind("invalid_argument: address = 4096 bytes at 0x", 0), 0u) << text;
  EXPECT_NE(text.find("ordinary memory of the process that lends it"), std::string::npos) << text;
  EXPECT_NE(text.find("copy=True"), std::string::npos) << text;
  EXPECT_EQ(error_text([&] { memory.read(8, bytes); }).rfind("invalid_argument", 0), 0u);
}

TEST(PeerMemory, OfAProcessThatHasEndedIsUnavailable) {
  std::string text(64, 'a');
  Peer peer(text, "b");
  const PeerMemory memory(peer.pid());
  EXPECT_EQ(text_at(memory, text).front(), 'b');
  peer.stop();
  EXPECT_EQ(error_text([&] { text_at(memory, text); }).rfind("unavailable: address", 0), 0u);
}

TEST(PeerMemory, HoldsWhatIsThereAndNothingElse) {
  const std::string text = "a probe", other = "another";
  const auto bytes = [](const std::string& of) { return std::as_bytes(std::span(of)); };
  const auto address = reinterpret_cast<uint64_t>(text.data());
  EXPECT_TRUE(PeerMemory(::getpid()).holds(address, bytes(text)));
  EXPECT_FALSE(PeerMemory(::getpid()).holds(address, bytes(other)));
  EXPECT_FALSE(PeerMemory(::getpid()).holds(8, bytes(text)));
  EXPECT_FALSE(PeerMemory(0).holds(address, bytes(text))) << "a process without a number here";
}

}  // namespace
}  // namespace rollpack::bridge
